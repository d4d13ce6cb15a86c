"""What do the pictures say about a point in space? Multi-view, multi-level feature sampling.

B batch, T time, N cameras, L pyramid levels, R rows (cells of all levels of one camera), G channel groups, C channels
of a group, Q queries, S points of a query's group.

Each point is looked up in one camera per time, the first (in camera order) whose picture holds it, bilinearly in every
level, and the levels are averaged by the point's own weights (arXiv 2308.09244, section 3.3, and 2409.09350).

What is written here is the definition, on any device. Where no gradient is asked for, `sample_numba` does the same on
the CPU about ten times as fast; on a GPU `sample_triton` does it in one kernel, with gradients.
"""

import itertools
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import gpu

EPS = 1e-5  # m: what is nearer to a camera's plane than this counts as behind it (SparseBEV, `sampling_4d`)


def flatten_levels(levels: Sequence[Tensor]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Maps (..., G*C, H_l, W_l), finest first -> rows (..., R, G*C), level after level, and the sizes (H_l, W_l)."""
    rows = torch.cat([level.flatten(-2).mT for level in levels], dim=-2)
    return rows, tuple((level.shape[-2], level.shape[-1]) for level in levels)


def sample(
    rows: Sequence[Sequence[Tensor]],
    sizes: Sequence[tuple[int, int]],
    picture: tuple[int, int],
    pixels_from_now: Tensor,
    used: Tensor,
    points: Tensor,
    weights: Tensor,
    as_published: bool,
) -> Tensor:
    """The features of points in space, (B, Q, G, T*S, C), time-major along T*S.

    rows: rows[b][t] is (N, R, G*C), as `flatten_levels` makes them; apart, so that a memory need not be copied.
    sizes: (H_l, W_l) of the L levels. picture: height and width in pixels of what `pixels_from_now` projects into.
    pixels_from_now: (B, T, N, 3, 4), car frame now -> (u d, v d, d). used: (B, T, N) bool.
    points: (B, Q, G, S, 3) metres, car frame now. weights: (B, Q, G, S, L).

    A camera that is not used is never looked into. `as_published` chooses between two sets of rules:
    - True, for published weights (SparseBEV `models/sparsebev_sampling.py`, OPUS `models/opus_sampling.py` at dde4209):
      a point that no camera sees is still read from camera 0, fading out within one cell of its border; the corner
      cells' centres lie on the picture's corners; and time t of group g takes the level weights of group
      (t*G + g) // T, because the authors' code flattens features in the order (T, G) and weights in the order (G, T).
    - False: a point that no camera sees is zero, cells are squares that tile the picture, every group takes its
      own weights.
    """
    b, t, n = used.shape
    _, q, g, s, _ = points.shape
    total = sum(height * width for height, width in sizes)
    assert pixels_from_now.shape == (b, t, n, 3, 4), pixels_from_now.shape
    assert points.shape == (b, q, g, s, 3), points.shape
    assert weights.shape == (b, q, g, s, len(sizes)), weights.shape
    assert len(rows) == b and all(len(lane) == t for lane in rows), [len(lane) for lane in rows]
    channels = rows[0][0].shape[-1] // g
    assert all(r.shape == (n, total, g * channels) for lane in rows for r in lane), rows[0][0].shape

    fast = _fast(rows, pixels_from_now, points, weights)
    if fast is not None:
        return fast.sample(rows, sizes, picture, pixels_from_now, used, points, weights, as_published)

    # ---- which camera, and where in its picture: (B, T, P) with P = Q*S*G, group fastest as in the rows
    flat = points.transpose(2, 3).reshape(b, 1, 1, q * s * g, 3)
    seen = flat @ pixels_from_now[..., :3].mT + pixels_from_now[..., None, :, 3]  # (B, T, N, P, 3)
    depth = seen[..., 2]
    u = seen[..., 0] / depth.clamp_min(EPS) / picture[1]
    v = seen[..., 1] / depth.clamp_min(EPS) / picture[0]
    valid = (depth > EPS) & (u > 0) & (u < 1) & (v > 0) & (v < 1) & used[..., None]
    view = torch.full_like(valid[:, :, 0], n - 1, dtype=torch.int32)  # (B, T, P)
    for camera in range(n - 2, -1, -1):  # the first valid one wins; where none is, it is camera 0
        view = torch.where(valid[:, :, camera], camera, view)
    found = valid.any(dim=2)
    view = view.where(found, 0).long()
    u, v = (coordinate.gather(2, view[:, :, None])[:, :, 0] for coordinate in (u, v))
    counts = used.gather(2, view) if as_published else found  # (B, T, P): whether the point takes part at all

    # ---- the level weights of each time: (B, T, P, L)
    if as_published:
        times, groups = torch.arange(t), torch.arange(g)
        group = (times[:, None] * g + groups) // t  # (T, G)
        level_weights = weights[:, :, group.to(weights.device)]  # (B, Q, T, G, S, L)
        level_weights = level_weights.permute(0, 2, 1, 4, 3, 5)
    else:
        level_weights = weights[:, None].transpose(3, 4).expand(b, t, q, s, g, len(sizes))
    level_weights = level_weights.reshape(b, t, q * s * g, len(sizes)) * counts[..., None]

    # ---- four corners of every level: which row, and how much of it, (B, T, P, 4 L)
    group = torch.arange(g, dtype=torch.int32, device=points.device).repeat(q * s)
    index, share, first = [], [], view.int() * total
    for level, (height, width) in enumerate(sizes):
        if as_published:
            x, y = u * (width - 1), v * (height - 1)
        else:  # within half a cell of the border the nearest cell is the best there is
            x, y = (u * width - 0.5).clamp(0, width - 1), (v * height - 0.5).clamp(0, height - 1)
        column, part_x = _neighbours(x, width)
        row, part_y = _neighbours(y, height)
        cell = (row[..., :, None] * width + column[..., None, :]).flatten(-2)
        index.append((first[..., None] + cell) * g + group[:, None])
        part = (part_y[..., :, None] * part_x[..., None, :]).flatten(-2)
        share.append(part * level_weights[..., level, None])
        first = first + height * width
    index, share = torch.cat(index, dim=-1), torch.cat(share, dim=-1)

    # ---- gather: a weighted sum of rows for every point
    sampled = [
        F.embedding_bag(index[i, j], rows[i][j].reshape(-1, channels), mode="sum", per_sample_weights=share[i, j])
        for i in range(b)
        for j in range(t)
    ]
    sampled = torch.stack(sampled).view(b, t, q, s, g, channels)
    return sampled.permute(0, 2, 4, 1, 3, 5).reshape(b, q, g, t * s, channels)


def _neighbours(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two cells around x (...), in cells, and their shares, (..., 2) each; a cell outside [0, size) has none.

    A coordinate that is not finite makes shares that are not finite, but never a cell that does not exist.
    """
    left = x.floor()
    cells = torch.stack([left, left + 1], dim=-1)
    share = torch.stack([1 - (x - left), x - left], dim=-1) * ((cells >= 0) & (cells < size))
    return cells.nan_to_num().clamp(0, size - 1).int(), share


def _fast(rows: Sequence[Sequence[Tensor]], pixels_from_now: Tensor, points: Tensor, weights: Tensor):
    """The file whose `sample` is made for such tensors, or None where the definition runs."""
    given = (*itertools.chain(*rows), pixels_from_now, points, weights)
    if {t.dtype for t in given} not in ({torch.float32}, {torch.float64}):
        return None
    if points.device.type == "cpu":
        # who traces or counts operations sees none in a compiled loop
        watched = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
        moves = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        return None if watched or moves else _numba()
    if not gpu.serves(points.device) or pixels_from_now.requires_grad:
        return None
    from . import sample_triton

    return sample_triton


@cache
def _numba():
    """The compiled loop, or None where numba is not installed."""
    try:
        from . import sample_numba
    except ImportError:
        return None
    return sample_numba
