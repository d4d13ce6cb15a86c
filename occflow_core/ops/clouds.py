"""Point clouds -> voxels, and points spread over a cloud. P points, C numbers of a point, M voxels."""

import torch
from torch import Tensor

from ..geometry import Grid


def voxel_means(points: Tensor, grid: Grid, cap: int) -> tuple[Tensor, Tensor]:
    """Points (P, C), of which the first three numbers are x y z in metres -> voxels (M, 3) int64, means (M, C).

    Voxels are those with a point inside, by index x, y, z. Of a voxel's points the first `cap` count, in the order
    they come in (mmcv's hard `Voxelization` with its cap, whose CUDA kernel keeps any). The same on every device.
    """
    index, inside = grid.index(points[:, :3])
    _, y, z = grid.shape
    ids, order = ((index[:, 0] * y + index[:, 1]) * z + index[:, 2])[inside].sort(stable=True)
    points = points[inside][order]
    ids, place, counts = ids.unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(points.shape[0], device=points.device) - (counts.cumsum(0) - counts)[place]
    kept = rank < cap
    # each in a cell of its own: sums by atomics would differ in their last digit from run to run
    cells = points.new_zeros(ids.shape[0], cap, points.shape[1]).index_put((place[kept], rank[kept]), points[kept])
    means = cells.sum(1) / counts.clamp_max(cap)[:, None]
    return torch.stack([ids // (y * z), ids // z % y, ids % z], dim=1), means


@torch.no_grad()
def farthest(points: Tensor, count: int) -> Tensor:
    """`count` of points (P, 3) that lie far apart, as places (count,) int64: farthest point sampling.

    The first point, then again and again the one that is farthest from all that were taken (the first of equals;
    PointNet++, arXiv 1706.02413, section 3.2). Where all are taken, places repeat. ValueError where there are none.
    """
    if not len(points):
        raise ValueError(f"farthest: {count} points wanted of none")
    taken = torch.zeros(count, dtype=torch.int64, device=points.device)
    away = points.new_full((len(points),), torch.inf)
    axes = points.mT.contiguous()
    for k in range(1, count):
        last = axes.index_select(1, taken[k - 1 : k])
        away = torch.minimum(away, (axes - last).square().sum(0))
        taken[k] = away.argmax()
    return taken
