"""Which voxels the cameras of this set can speak for. N cameras, R rays, X Y Z voxels."""

import torch
from torch import Tensor

from ..geometry import Cameras, Grid
from . import raycast


def observed(filled: Tensor, grid: Grid, cameras: Cameras, used: Tensor) -> Tensor:
    """Voxels that a ray of a used camera reaches before or at the first filled voxel, (X, Y, Z) bool.

    filled (X, Y, Z) bool: what is predicted to be occupied; cameras (N) in the car frame of the grid; used (N,) bool.
    Rays leave through the picture only, and there are enough of them: in an empty grid every voxel whose centre a used
    camera `sees` is observed. The voxel that a camera stands in does not block that camera (it cannot be inside of
    what it looks at); everything else that is filled does. ValueError on shapes that do not belong together.
    """
    if tuple(filled.shape) != grid.shape or filled.dtype != torch.bool:
        raise ValueError(f"observed: filled must be {grid.shape} bool, got {tuple(filled.shape)} {filled.dtype}")
    if len(cameras.shape) != 1 or used.shape != cameras.shape or used.dtype != torch.bool:
        raise ValueError(
            f"observed: expected N cameras and used (N,) bool, got {tuple(cameras.shape)}, "
            f"{tuple(used.shape)} {used.dtype}"
        )
    # everything in voxel units: straight lines stay straight, whatever the voxels' edges
    metres_from_voxels = torch.diag(torch.tensor([*grid.voxel, 1.0], dtype=torch.float64))
    metres_from_voxels[:3, 3] = torch.tensor(grid.low)
    chosen = cameras[used].to("cpu", torch.float64)
    eyes = (chosen.car_from_camera[:, :3, 3] - metres_from_voxels[:3, 3]) / metres_from_voxels.diag()[:3]  # (M, 3)
    edges = _edges(chosen) @ metres_from_voxels  # (M, 5, 4)
    out, fast = torch.zeros_like(filled), raycast._numba()
    if not len(eyes):
        return out
    if fast is not None:  # from another device too: the grid is small, and the walk is no work for a GPU
        here = filled.cpu()
        return fast.observed([_opened(here, eye) for eye in eyes], eyes, edges).to(filled.device)
    for eye, its_edges in zip(eyes, edges):
        targets = _targets(grid.shape, eye, its_edges)
        if len(targets):
            out |= raycast.swept(_opened(filled, eye), _entries(grid.shape, eye, targets), targets - eye)
    return out


def _opened(filled: Tensor, eye: Tensor) -> Tensor:
    """Without the voxel that the eye is in."""
    home = tuple(eye.floor().long().tolist())
    if all(0 <= v < n for v, n in zip(home, filled.shape, strict=True)) and filled[home]:
        filled = filled.clone()
        filled[home] = False
    return filled


def _edges(cameras: Cameras) -> Tensor:
    """(M, 5, 4): functions of homogeneous metres that are positive where `Cameras.sees` says yes: right of the
    picture's left edge, left of its right edge, below, above, and in front of the camera."""
    x, y, depth = cameras.pixels_from_car().unbind(-2)
    near = depth - depth.new_tensor([0, 0, 0, 1e-5])
    return torch.stack([x, cameras.width * depth - x, y, cameras.height * depth - y, near], dim=-2)


def _targets(shape: tuple[int, int, int], eye: Tensor, edges: Tensor) -> Tensor:
    """Points (R, 3) to aim at, so that no voxel whose centre lies within the edges is missed in an empty grid.

    Rays go to the middle of every boundary face through which a line of sight can leave the grid. That suffices for
    voxels wholly within the picture: the slice through a voxel's centre, parallel to the face through which the ray of
    the centre leaves, casts a shadow with an edge of more than one voxel on that face's plane, at least the half of it
    on the grid, and no such square fits between the middles of the faces. Voxels cut by the picture's border are aimed
    at one by one.
    """
    normals, offsets = edges[:, :3], edges[:, 3]
    nx, ny, nz = shape
    middles = [torch.arange(n, dtype=torch.float64) + 0.5 for n in shape]
    found = []
    for axis in range(3):
        first, second = (a for a in range(3) if a != axis)
        # f at (a, b) of a face = normal . p + offset: a sum of a row and a column, no products for every face
        rows = normals[:, first, None] * middles[first]
        columns = normals[:, second, None] * middles[second]
        for at, leaves in ((0.0, eye[axis] > 0), (float(shape[axis]), eye[axis] < shape[axis])):
            if not leaves:
                continue
            fixed = (normals[:, axis] * at + offsets)[:, None] + rows
            within = (fixed[:, :, None] + columns[:, None, :]).amin(0) > 0
            a, b = within.nonzero().unbind(1)
            points = torch.full((len(a), 3), at, dtype=torch.float64)
            points[:, first], points[:, second] = middles[first][a], middles[second][b]
            found.append(points)
    # border voxels: the centre is inside all edges, a corner is not. f is linear, so the least of the corners is f at
    # the centre minus `reach`, and along a column of voxels f lies between its ends
    reach = 0.5 * normals.abs().sum(1)
    floor = (normals[:, 0, None] * middles[0] + (offsets + 0.5 * normals[:, 2])[:, None])[:, :, None] + (
        normals[:, 1, None] * middles[1]
    )[:, None, :]  # (5, X, Y), f at the lowest centre of each column
    rise = (normals[:, 2] * (nz - 1))[:, None, None]
    seen = (torch.maximum(floor, floor + rise) > 0).all(0)
    whole = (torch.minimum(floor, floor + rise) > reach[:, None, None]).all(0)
    ix, iy = (seen & ~whole).nonzero().unbind(1)
    values = floor[:, ix, iy, None] + normals[:, 2, None, None] * torch.arange(nz)  # (5, C, Z)
    cut = (values > 0).all(0) & (values <= reach[:, None, None]).any(0)
    column, iz = cut.nonzero().unbind(1)
    found.append(torch.stack([middles[0][ix[column]], middles[1][iy[column]], middles[2][iz]], 1))
    return torch.cat(found)


def _entries(shape: tuple[int, int, int], eye: Tensor, targets: Tensor) -> Tensor:
    """Where the rays begin, (R, 3): the eye, or for an eye outside the grid the points where its rays come in, since
    a walk has a limited number of steps."""
    if all(0 <= v < n for v, n in zip(eye.tolist(), shape, strict=True)):
        return eye.expand_as(targets)
    directions = targets - eye
    size = eye.new_tensor(shape)
    enters = torch.where(directions > 0, -eye / directions, (size - eye) / directions)  # fraction of the way, by axis
    enters = torch.where(directions == 0, 0.0, enters)
    begin = enters.amax(1, keepdim=True).clamp_min(0.0)
    return eye + begin * directions
