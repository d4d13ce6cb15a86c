"""`raycast.cast` and `swept` compiled for a GPU: the same arithmetic in the same order, hence equal ray for ray.

A walk begins with what `raycast._begin` says, so that the only divisions are those of the definition. The kernel itself
only compares and adds distances: it has no product of them that a compiler could fuse with a sum and round differently.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import raycast

_BLOCK = 32  # rays in a program: one warp, which asks itself without a barrier whether any of them still walks


def cast(filled: Tensor, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """`raycast.cast` after its checks: float64 rays of unit direction."""
    rays = len(origins)
    distance = torch.empty(rays, dtype=torch.float64, device=filled.device)
    index = torch.empty(rays, 3, dtype=torch.int64, device=filled.device)
    _launch(filled, origins, directions, distance, index, index, swept=False)
    return distance, index


def swept(filled: Tensor, origins: Tensor, directions: Tensor) -> Tensor:
    """`raycast.swept` after its checks: float64 rays."""
    crossed = torch.zeros(filled.shape, dtype=torch.uint8, device=filled.device)
    _launch(filled, origins, directions, crossed, crossed, crossed, swept=True)
    return crossed.view(torch.bool)


def _launch(filled, origins, directions, distance, index, crossed, swept):
    """Of distance and index, or crossed, only those are written that the kind of walk is for."""
    walk = [t.contiguous() for t in (filled.view(torch.uint8), *raycast._begin(origins, directions))]
    grid = (triton.cdiv(len(origins), _BLOCK),)
    with torch.cuda.device_of(filled):  # Triton launches on the current GPU, which need not be the rays'
        _cast[grid](
            *(*walk, distance, index, crossed, len(origins), *filled.shape),
            SWEPT=swept,
            STEPS=raycast.STEPS,
            BLOCK=_BLOCK,
            num_warps=1,
        )


@triton.jit
def _cast(
    filled,
    voxel,
    step,
    border,
    across,
    distance,
    index,
    crossed,
    rays,
    nx,
    ny,
    nz,
    SWEPT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ray = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    walking = ray < rays
    first, second, third = 3 * ray, 3 * ray + 1, 3 * ray + 2  # places of x, y and z in (R, 3)
    x, y, z = tl.load(voxel + first, walking), tl.load(voxel + second, walking), tl.load(voxel + third, walking)
    sx, sy, sz = tl.load(step + first, walking), tl.load(step + second, walking), tl.load(step + third, walking)
    bx, by, bz = tl.load(border + first, walking), tl.load(border + second, walking), tl.load(border + third, walking)
    ax, ay, az = tl.load(across + first, walking), tl.load(across + second, walking), tl.load(across + third, walking)
    leaves = tl.full((BLOCK,), -1.0, tl.float64)
    last_x, last_y, last_z = tl.zeros_like(x), tl.zeros_like(y), tl.zeros_like(z)
    steps = 0
    while (steps < STEPS) & (tl.max(walking.to(tl.int32), 0) > 0):
        inside = walking & (x >= 0) & (x < nx) & (y >= 0) & (y < ny) & (z >= 0) & (z < nz)
        # beyond the grid on the side to which it goes: it has left, or will never enter
        beyond = ((x < 0) & (sx < 0)) | ((x >= nx) & (sx > 0))
        beyond |= ((y < 0) & (sy < 0)) | ((y >= ny) & (sy > 0))
        beyond |= ((z < 0) & (sz < 0)) | ((z >= nz) & (sz > 0))
        along_x = (bx < by) & (bx < bz)
        along_y = ~(bx < by) & (by < bz)
        along_z = ~(along_x | along_y)
        leaves = tl.where(inside, tl.where(along_x, bx, tl.where(along_y, by, bz)), leaves)
        last_x, last_y, last_z = tl.where(inside, x, last_x), tl.where(inside, y, last_y), tl.where(inside, z, last_z)
        here = (x * ny + y) * nz + z
        if SWEPT:  # several rays may write at once, all the same
            tl.store(crossed + here, tl.full((BLOCK,), 1, tl.uint8), inside)
        stopped = tl.load(filled + here, inside, other=0) != 0
        walking = walking & ~beyond & ~stopped
        x, bx = tl.where(along_x, x + sx, x), tl.where(along_x, bx + ax, bx)
        y, by = tl.where(along_y, y + sy, y), tl.where(along_y, by + ay, by)
        z, bz = tl.where(along_z, z + sz, z), tl.where(along_z, bz + az, bz)
        steps += 1
    if not SWEPT:
        real = ray < rays
        tl.store(distance + ray, leaves, real)
        tl.store(index + first, last_x, real)
        tl.store(index + second, last_y, real)
        tl.store(index + third, last_z, real)
