"""`sample` compiled for the CPU, values alone: each point is projected, looked up and written once, nothing is kept in
between. The same arithmetic in the numbers' own precision; only the order of a sum may differ in its last digit, and
what no camera sees is zero even where features are not finite.

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
    picture_height, picture_width, eps = limits
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
                    ahead = used[n] and depth > eps
                    if not ahead and n > 0:
                        continue
                    away = eps if depth < eps else depth
                    across = x * matrices[n, 0, 0] + y * matrices[n, 0, 1] + z * matrices[n, 0, 2] + matrices[n, 0, 3]
                    down = x * matrices[n, 1, 0] + y * matrices[n, 1, 1] + z * matrices[n, 1, 2] + matrices[n, 1, 3]
                    across, down = across / away / picture_width, down / away / picture_height
                    if n == 0:  # where no camera sees the point
                        u, v = across, down
                    if ahead and nought < across < one and nought < down < one:
                        camera, u, v = n, across, down
                        break
                part = one if camera >= 0 or (published and used[0]) else nought
                camera = max(camera, 0)
                seen = sampled[q, g, time * samples + s]
                seen[:] = nought
                if part == nought and np.isfinite(u) and np.isfinite(v):
                    continue
                begin, low, high = 0, g * channels, (g + 1) * channels
                for level in range(len(levels)):
                    height, width = levels[level]
                    last_row, last_column = kind(height - 1), kind(width - 1)
                    if published:
                        i, j = v * last_row, u * last_column
                    else:
                        i = _within(nought, v * kind(height) - half, last_row)
                        j = _within(nought, u * kind(width) - half, last_column)
                    up, left = np.floor(i), np.floor(j)
                    weight = weights[q, taken, s, level] * part
                    upper = (one - (i - up)) * kind(nought <= up <= last_row) * weight
                    lower = (i - up) * kind(nought <= up + one <= last_row) * weight
                    west = (one - (j - left)) * kind(nought <= left <= last_column)
                    east = (j - left) * kind(nought <= left + one <= last_column)
                    above = begin + _cell(up, height) * width
                    below = begin + _cell(up + one, height) * width
                    column, next_column = _cell(left, width), _cell(left + one, width)
                    upper_west = table[camera, above + column, low:high]
                    upper_east = table[camera, above + next_column, low:high]
                    lower_west = table[camera, below + column, low:high]
                    lower_east = table[camera, below + next_column, low:high]
                    a, b, c, d = upper * west, upper * east, lower * west, lower * east
                    for k in range(channels):  # one pass: what is summed is fetched and put back once a level
                        seen[k] += a * upper_west[k] + b * upper_east[k] + c * lower_west[k] + d * lower_east[k]
                    begin += height * width


# Numbers of one kind throughout: with a whole number or a float64 among them numba makes what follows float64, which
# halved the speed.


@compiled
def _within(least, x, most):
    """x in [least, most]; what is not a number stays so."""
    return least if x < least else most if x > most else x


@compiled
def _cell(x, size):
    """A cell that exists, whatever x is."""
    return 0 if not x > 0 else int(x) if x < size else size - 1
