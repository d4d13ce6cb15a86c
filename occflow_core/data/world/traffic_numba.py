"""The compiled loop of `traffic`: how far everybody can drive. K drivers, M round bodies."""

import math

import numpy as np

from ...ops.compiled_numba import compiled


@compiled
def gaps(sheets, first, count, spacing, s, front, v, half, places, radii, owner):
    """(K,) m of free path before each bumper, 99 where nobody is near.

    sheets: all paths' points (P, 2), driver k's are count[k] from first[k], `spacing` m apart; owner (M,): whose body
    it is (nobody stands in his own way).
    """
    out = np.full(len(s), 99.0)
    for k in range(len(s)):
        nose, reach = s[k] + front[k], 12 + 2.2 * v[k]
        steps = int((reach - 0.5) / 0.75) + 1
        x0, y0 = _at(sheets, first[k], count[k], spacing, nose)
        for b in range(len(places)):
            px, py = places[b, 0], places[b, 1]
            if owner[b] == k or abs(px - x0) > reach + 3 or abs(py - y0) > reach + 3:
                continue
            free = radii[b] + half[k] + 0.15
            for n in range(steps):
                ahead = 0.75 * n
                if ahead >= out[k]:
                    break
                x, y = _at(sheets, first[k], count[k], spacing, nose + 0.5 + ahead)
                if (x - px) * (x - px) + (y - py) * (y - py) < free * free:
                    out[k] = ahead
                    break
    return out


@compiled
def along(sheets, first, count, spacing, s, owner, offset):
    """(M, 2): points `offset` (M,) m ahead of the drivers `owner` (M,) on their paths."""
    out = np.empty((len(owner), 2))
    for m in range(len(owner)):
        k = owner[m]
        out[m, 0], out[m, 1] = _at(sheets, first[k], count[k], spacing, s[k] + offset[m])
    return out


@compiled
def _at(sheets, first, count, spacing, s):
    k = min(max(int(math.floor(s / spacing)), 0), count - 2)
    part = s / spacing - k
    a, b = sheets[first + k], sheets[first + k + 1]
    return a[0] * (1 - part) + b[0] * part, a[1] * (1 - part) + b[1] * part
