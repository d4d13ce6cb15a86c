"""`sample` compiled for the CPU, values alone: each point is projected, looked up and written once, nothing is kept in
between. The same arithmetic in the numbers' own precision; only the order of a sum may differ in its last digit.

All kernels stand in one file, because numba's cache looks at the file of a kernel only. Threads are torch's number, see
`raycast_numba`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .compiled_numba import compiled
from .raycast_numba import _array, _side_by_side

_FEW = 2048  # points below which a thread costs more than it brings


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
    """`sample.sample` after its checks."""
    from .sample import EPS

    b, t, _ = used.shape
    _, q, g, s, _ = points.shape
    kind = points.numpy().dtype.type
    channels = rows[0][0].shape[-1] // g
    sampled = np.empty((b, q, g, t * s, channels), kind)
    levels = np.array(sizes, np.int64)
    limits = np.array([picture[0], picture[1], EPS], kind)
    matrices, uses, places, shares = (_array(tensor) for tensor in (pixels_from_now, used, points, weights))
    parts = max(1, min(q * g * s // _FEW, 2 * torch.get_num_threads()))
    bounds = [q * i // parts for i in range(parts + 1)]
    jobs = []
    for lane in range(b):
        for time in range(t):
            table, given = _array(rows[lane][time]), (matrices[lane, time], uses[lane, time])
            asked = (places[lane], shares[lane], sampled[lane])
            rest = (levels, limits, time, t, as_published)
            jobs += [(_look, table, *given, *asked, *rest, *pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]
    _side_by_side(jobs)
    return torch.from_numpy(sampled)


@compiled
def _look(table, matrices, used, points, weights, sampled, levels, limits, time, times, published, first, last):
    """Queries `first` to `last` - 1 at one time: table (N, R, G*C), matrices (N, 3, 4), used (N,), points (Q, G, S, 3),
    weights (Q, G, S, L), sampled (Q, G, T*S, C)."""
    kind = points.dtype.type
    half, one, nought = kind(0.5), kind(1.0), kind(0.0)
    height, width, eps = limits
    _, groups, samples, _ = points.shape
    channels = sampled.shape[3]
    for q in range(first, last):
        for g in range(groups):
            taken = (time * groups + g) // times if published else g
            for s in range(samples):
                x, y, z = points[q, g, s, 0], points[q, g, s, 1], points[q, g, s, 2]
                camera, u, v = -1, nought, nought
                for n in range(len(matrices)):
                    depth = x * matrices[n, 2, 0] + y * matrices[n, 2, 1] + z * matrices[n, 2, 2] + matrices[n, 2, 3]
                    seen = used[n] and depth > eps
                    if not seen and n > 0:
                        continue
                    away = eps if depth < eps else depth
                    across = x * matrices[n, 0, 0] + y * matrices[n, 0, 1] + z * matrices[n, 0, 2] + matrices[n, 0, 3]
                    down = x * matrices[n, 1, 0] + y * matrices[n, 1, 1] + z * matrices[n, 1, 2] + matrices[n, 1, 3]
                    across, down = across / away / width, down / away / height
                    if n == 0:  # where no camera sees the point
                        u, v = across, down
                    if seen and nought < across < one and nought < down < one:
                        camera, u, v = n, across, down
                        break
                part = one if camera >= 0 or (published and used[0]) else nought
                camera = max(camera, 0)
                at = time * samples + s
                for c in range(channels):
                    sampled[q, g, at, c] = nought
                if part == nought and np.isfinite(u) and np.isfinite(v):
                    continue
                begin = 0
                for level in range(len(levels)):
                    rows, columns = levels[level]
                    if published:
                        i, j = v * kind(rows - 1), u * kind(columns - 1)
                    else:
                        i = _within(v * kind(rows) - half, kind(rows - 1))
                        j = _within(u * kind(columns) - half, kind(columns - 1))
                    weight = weights[q, taken, s, level] * part
                    up, left = np.floor(i), np.floor(j)
                    for a in range(2):
                        row = up + kind(a)
                        by_row = (one - (i - up) if a == 0 else i - up) * kind(nought <= row < rows)
                        for b in range(2):
                            column = left + kind(b)
                            by_column = (one - (j - left) if b == 0 else j - left) * kind(nought <= column < columns)
                            share = by_row * by_column * weight
                            if share == nought:
                                continue
                            cell = begin + _cell(row, rows) * columns + _cell(column, columns)
                            for c in range(channels):
                                sampled[q, g, at, c] += share * table[camera, cell, g * channels + c]
                    begin += rows * columns


@compiled
def _within(x, most):
    """x in [0, most]; what is not a number stays so."""
    return x if x != x else min(max(x, most * 0), most)


@compiled
def _cell(x, size):
    """A cell that exists, whatever x is."""
    return int(min(max(x, 0.0), size - 1.0)) if x == x else 0
