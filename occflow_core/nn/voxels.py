"""Points with class scores -> voxels, as OPUS votes: the mean of what the points of a voxel say.

Q queries, P points of a query, K classes, V voxels.
"""

import torch
from torch import Tensor

from .. import ops
from ..geometry import Grid
from ..types import Classes, Prediction

CAP = 10  # points of a voxel that count (mmcv `Voxelization`, max_num_points)
CENTRE_DISTANCE = 3.0  # m: a point this far from its query's mean is dropped (`opus_head.get_occ`, default)


def decode(
    points: Tensor,
    logits: Tensor,
    flow: Tensor | None,
    grid: Grid,
    classes: Classes,
    threshold: float,
    closing: bool,
) -> Prediction:
    """Points (Q, P, 3) m, logits (Q, P, K), flow (Q, P, 2) or None -> one prediction (`opus_head.get_occ`).

    A score above `threshold` makes a voxel occupied. closing: whether gaps between occupied voxels are closed.
    """
    volume = len(grid)

    # ---- points that count: near their query's middle, sure of something, inside, the first CAP of their voxel
    near = (points - points.mean(dim=1, keepdim=True)).norm(dim=-1) < CENTRE_DISTANCE
    chosen = (near & (logits.amax(-1).sigmoid() > threshold)).flatten().nonzero()[:, 0]
    index, inside = grid.index(points.flatten(0, 1)[chosen])
    chosen, index = chosen[inside], index[inside]
    voxel = (index[:, 0] * grid.shape[1] + index[:, 1]) * grid.shape[2] + index[:, 2]
    voxel, order = voxel.sort(stable=True)
    chosen = chosen[order]
    place, counts = voxel.unique_consecutive(return_inverse=True, return_counts=True)[1:]
    rank = torch.arange(len(voxel), device=voxel.device) - (counts.cumsum(0) - counts)[place]
    kept = rank < CAP
    voxel, chosen, place = voxel[kept], chosen[kept], place[kept]

    # ---- their mean
    where = voxel[torch.cat([place.new_ones(1), place.diff()])[: len(place)].bool()]  # (V,) each voxel once
    scores = ops.scatter_mean(logits.flatten(0, 1)[chosen].sigmoid(), place, len(where))
    speed = None if flow is None else ops.scatter_mean(flow.flatten(0, 1)[chosen], place, len(where))

    # ---- voxels that are sure of something, and what the closing adds between them
    sure = (scores > threshold).any(-1)
    where, scores = where[sure], scores[sure]
    best, label = scores.max(-1)
    labels = torch.full((volume,), classes.free, dtype=torch.uint8, device=points.device)
    score = points.new_zeros(volume)
    labels[where], score[where] = label.to(torch.uint8), best
    dense = None if speed is None else points.new_zeros(volume, 2)
    if dense is not None:
        dense[where] = speed[sure]
    if closing:
        added, label, best = _closing(where, scores, grid.shape, threshold)
        labels[added], score[added] = label.to(torch.uint8), best
        if dense is not None:
            dense[added] = _neighbours_mean(where, speed[sure], added, grid.shape)
    shape = grid.shape
    return Prediction(
        grid,
        classes,
        labels.view(shape),
        score.view(shape),
        None if dense is None else dense.view(*shape, 2),
    )


def _closing(where: Tensor, scores: Tensor, shape: tuple[int, int, int], threshold: float):
    """What a greyscale closing (3x3x3 maximum, then minimum, class by class) lifts above the threshold.

    where (V,) flat indices of the voxels with scores (V, K), each with one above the threshold; none elsewhere.
    -> flat indices (A,) of further voxels, their best class (A,) and its closed score (A,).

    The same as two dense 3-D poolings of K volumes, in a hundredth of their time: which voxels and classes is decided
    for all classes at once by bits, how much only where it is needed. Outside the grid nothing is, and nothing erodes.
    """
    device = where.device
    assert scores.shape[1] < 32, scores.shape  # classes are bits of an int32, the sign is for outside
    above = scores > threshold  # (V, K)
    inner, around = _shell(shape, device)

    bits = torch.zeros([n + 2 for n in shape], dtype=torch.int32, device=device)
    bits.view(-1)[inner(where)] = (above.int() << torch.arange(scores.shape[1], device=device)).sum(-1).int()
    closed = torch.full_like(bits, -1)
    closed[1:-1, 1:-1, 1:-1] = _three(bits, torch.bitwise_or)
    closed = _three(closed, torch.bitwise_and).view(-1)
    closed[where] = 0  # what is sure already stays as it is
    added = closed.nonzero()[:, 0]
    has, padded = closed[added], inner(added)

    best, label = scores.new_zeros(len(added)), added.new_zeros(len(added))
    widened = scores.new_full(bits.shape, torch.inf)
    flat, offsets = widened.view(-1), around.tolist()
    for k in range(scores.shape[1]):
        asked = (has >> k & 1).nonzero()[:, 0]
        if not len(asked):
            continue
        widened[1:-1, 1:-1, 1:-1] = 0
        from_, value = inner(where[above[:, k]]), scores[above[:, k], k]
        for offset in offsets:
            to = from_ + offset
            flat[to] = torch.maximum(flat[to], value)
        value = flat[padded[asked, None] + around].amin(-1)
        better = value > best[asked]
        best[asked] = torch.where(better, value, best[asked])
        label[asked] = torch.where(better, k, label[asked])
    return added, label, best


def _neighbours_mean(where: Tensor, values: Tensor, asked: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Mean of values (V, D) at flat voxels (V,) over the 3x3x3 neighbourhood of others (A,) -> (A, D)."""
    inner, around = _shell(shape, where.device)
    padded = values.new_zeros((shape[0] + 2) * (shape[1] + 2) * (shape[2] + 2), values.shape[1] + 1)
    padded[inner(where)] = torch.cat([values, torch.ones_like(values[:, :1])], dim=-1)
    total = padded[inner(asked)[:, None] + around].sum(1)
    return total[:, :-1] / total[:, -1:].clamp_min(1)


def _shell(shape: tuple[int, int, int], device: torch.device):
    """Flat indices of a grid -> those in it with a shell of one voxel around; steps (27,) to neighbours there."""
    _, y, z = shape
    across, along = (y + 2) * (z + 2), z + 2
    step = torch.arange(-1, 2, device=device)
    around = (step[:, None, None] * across + step[:, None] * along + step).flatten()
    return lambda flat: (flat // (y * z) + 1) * across + (flat // z % y + 1) * along + flat % z + 1, around


def _three(volume: Tensor, join) -> Tensor:
    """Join each inner voxel with its 26 neighbours, one axis after the other."""
    for axis in range(3):
        n = volume.shape[axis] - 2
        volume = join(join(volume.narrow(axis, 0, n), volume.narrow(axis, 1, n)), volume.narrow(axis, 2, n))
    return volume
