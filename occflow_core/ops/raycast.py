"""Rays through a voxel grid, first hit first. R rays; X Y Z voxels.

Everything is told in voxel units: voxel (i, j, k) fills the cube from (i, j, k) to (i+1, j+1, k+1), so that a point in
metres enters as (p - low) / voxel. The walk is Amanatides and Woo's (A fast voxel traversal algorithm for ray tracing,
1987) with the habits of the tracer behind the published RayIoU numbers (`dvr.cu` of tarashakhurana/4d-occ-forecasting,
as SparseOcc and OccNet call it in "test" mode), because a metric that is off by a habit is another metric:

- a distance is where the ray *leaves* the voxel, from the origin;
- the voxel of the origin is its coordinates cut toward zero, so an origin up to one voxel below the grid counts as
  inside, and the origin's own voxel can be hit;
- where two borders are reached at once the walk goes through z before y before x;
- an origin outside enters the grid if the ray points there; a walk ends after 1001 steps.

The functions of this file are the definition, on any device. On the CPU `raycast_numba` does the same, ray for ray,
about two hundred times as fast, and on a GPU `raycast_triton`; without numba or Triton installed the
definition runs there too.
"""

from functools import cache

import torch
from torch import Tensor

from . import gpu

STEPS = 1001  # the published tracer's limit; a walk that begins inside a 200 x 200 x 16 grid needs at most 416
_FAR = 2.0**52  # where origins are clamped: no integer holds 1e300
_NEVER = torch.finfo(torch.float64).max  # when a ray that runs along an axis' borders meets one


def cast(filled: Tensor, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays are stopped: distance (R,) float64 in voxels and voxel (R, 3) int64.

    filled (X, Y, Z) bool; origins and directions (R, 3) in voxel units, directions of any length above zero. A ray
    that hits nothing gets the last voxel that it crossed (which is then not filled); one that never comes inside gets
    distance -1 and voxel (0, 0, 0). (Only an origin that was cut toward zero can bring other distances below zero.)
    ValueError on wrong shapes and on rays that are not finite.
    """
    origins, directions = _rays(filled, origins, directions)
    directions = directions / directions.pow(2).sum(1, keepdim=True).sqrt()
    fast = _fast(filled)
    if fast is not None:
        return fast.cast(filled, origins, directions)
    distance = torch.full(origins.shape[:1], -1.0, dtype=torch.float64, device=filled.device)
    index = torch.zeros(origins.shape, dtype=torch.int64, device=filled.device)
    for rays, voxels, leaves in _walk(filled, origins, directions):
        distance[rays], index[rays] = leaves, voxels
    return distance, index


def swept(filled: Tensor, origins: Tensor, directions: Tensor) -> Tensor:
    """Every voxel that a ray crosses up to and including its first filled one, (X, Y, Z) bool. Arguments as `cast`."""
    origins, directions = _rays(filled, origins, directions)
    fast = _fast(filled)
    if fast is not None:
        return fast.swept(filled, origins, directions)
    crossed = torch.zeros_like(filled)
    for _, voxels, _ in _walk(filled, origins, directions):
        crossed[voxels.unbind(1)] = True
    return crossed


def _walk(filled: Tensor, origins: Tensor, directions: Tensor):
    """All rays in step; yields (rays (M,), their voxels (M, 3), distances at which they leave them (M,))."""
    ray = torch.arange(len(origins), device=filled.device)  # rays still walking; all tensors below follow it
    size = torch.tensor(filled.shape, device=filled.device)
    voxel, step, border, across = _begin(origins, directions)
    for _ in range(STEPS):
        inside = ((voxel >= 0) & (voxel < size)).all(1)
        # beyond the grid on the side to which it goes: it has left, or will never enter
        walking = ~((voxel < 0) & (step < 0) | (voxel >= size) & (step > 0)).any(1)
        x, y, z = border.unbind(1)
        axis = torch.where(x < y, torch.where(x < z, 0, 2), torch.where(y < z, 1, 2))[:, None]
        leaves = border.gather(1, axis)[:, 0]
        if inside.any():
            yield ray[inside], voxel[inside], leaves[inside]
            walking &= ~(inside & filled[tuple(torch.where(inside[:, None], voxel, 0).unbind(1))])
        voxel = voxel.scatter_add(1, axis, step.gather(1, axis))
        border = border.scatter_add(1, axis, across.gather(1, axis))
        ray, voxel, step, border, across = (a[walking] for a in (ray, voxel, step, border, across))
        if not len(ray):
            return


def _begin(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a walk carries, each (R, 3): its voxel and step (int64), the distances at which it meets the next border of
    each axis, and from one border to the next (float64)."""
    voxel = _start(origins)
    step = torch.where(directions >= 0, 1, -1)
    border = torch.where(directions == 0, _NEVER, (voxel + (step > 0) - origins) / directions)
    across = torch.where(directions == 0, _NEVER, step / directions)
    return voxel, step, border, across


def _rays(filled: Tensor, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Checked, in float64."""
    if filled.ndim != 3 or filled.dtype != torch.bool:
        raise ValueError(f"rays: filled must be (X, Y, Z) bool, got {tuple(filled.shape)} {filled.dtype}")
    if origins.shape != directions.shape or origins.ndim != 2 or origins.shape[1] != 3:
        raise ValueError(
            "rays: origins and directions must both be (R, 3), "
            f"got {tuple(origins.shape)} and {tuple(directions.shape)}"
        )
    origins, directions = origins.to(filled.device, torch.float64), directions.to(filled.device, torch.float64)
    finite = torch.isfinite(origins).all() and torch.isfinite(directions).all()
    if not finite or not (directions != 0).any(1).all():
        raise ValueError("rays: origins and directions must be finite and directions longer than zero")
    return origins, directions


def _start(origins: Tensor) -> Tensor:
    """Cut toward zero, as a cast does in C."""
    return origins.clamp(-_FAR, _FAR).trunc().to(torch.int64)


def _fast(filled: Tensor):
    """The file whose walk is made for this device, or None where the definition runs."""
    if filled.device.type == "cpu":
        return _numba()
    if not gpu.serves(filled.device):
        return None
    from . import raycast_triton

    return raycast_triton


@cache
def _numba():
    """The compiled walk, or None where numba is not installed."""
    try:
        from . import raycast_numba
    except ImportError:
        return None
    return raycast_numba
