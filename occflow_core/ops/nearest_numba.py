"""`nearest` compiled for the CPU: points sorted into cells, which are asked shell by shell until none can be nearer.

All kernels stand in one file, because numba's cache looks at the file of a kernel only. Threads are torch's number, see
`raycast_numba`.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .compiled_numba import compiled

_PER_CELL = 8.0  # points that a cell should hold where they lie on surfaces
_FEW = 4096  # points below which a thread costs more than it brings
_NOWHERE = 1e9  # m: where points are put that are not finite


def nearest(points: Tensor, among: Tensor) -> Tensor:
    """`nearest.nearest` after its checks."""
    asking, asked = (
        np.nan_to_num(np.ascontiguousarray(t.numpy(), np.float32), nan=_NOWHERE, posinf=_NOWHERE, neginf=-_NOWHERE)
        for t in (points, among)
    )
    low, edge, shape = _cells(asked)
    begin, order = _sort(asked, low, edge, shape)
    found = np.empty(len(asking), np.int64)
    parts = max(1, min(len(asking) // _FEW, 4 * torch.get_num_threads()))
    bounds = [len(asking) * i // parts for i in range(parts + 1)]
    jobs = list(zip(bounds[:-1], bounds[1:], strict=True))
    arguments = (asking, asked[order], order, begin, low, edge, shape, found)
    with ThreadPoolExecutor(min(torch.get_num_threads(), parts, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda job: _ask(*arguments, *job), jobs))
    return torch.from_numpy(found)


def _cells(asked: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """The low corner, edge (m) and shape of a grid of cells over the bulk of the points; the outermost have no outside.

    Few points far away must not make all cells large: what lies beyond the bulk falls into the cells at its border.
    """
    few = asked[:: max(1, len(asked) // 4096)]
    low, high = np.percentile(few, (1, 99), axis=0)
    size = np.sort(np.maximum(high - low, 1e-3))
    # a surface fills the two long sides of the box, a cloud all three: whatever makes the larger cells
    share = _PER_CELL / len(asked)
    edge = float(max((size[1] * size[2] * share) ** 0.5, 1e-3))
    shape = np.clip(np.ceil((high - low) / edge), 1, 512).astype(np.int64)
    edge = float(max(edge, ((high - low) / shape).max()))
    return low.astype(np.float64), edge, shape


@compiled
def _cell(x, low, edge, n):
    cell = np.floor((x - low) / edge)
    return int(min(max(cell, 0.0), n - 1.0))


@compiled
def _sort(asked, low, edge, shape):
    """Where each cell begins in the order (C + 1,), and the order: point numbers by cell, ascending within one."""
    cells = np.empty(len(asked), np.int64)
    begin = np.zeros(shape[0] * shape[1] * shape[2] + 1, np.int64)
    for i in range(len(asked)):
        x, y, z = (
            _cell(asked[i, 0], low[0], edge, shape[0]),
            _cell(asked[i, 1], low[1], edge, shape[1]),
            _cell(asked[i, 2], low[2], edge, shape[2]),
        )
        cells[i] = (x * shape[1] + y) * shape[2] + z
        begin[cells[i] + 1] += 1
    for c in range(len(begin) - 1):
        begin[c + 1] += begin[c]
    filled = begin[:-1].copy()
    order = np.empty(len(asked), np.int64)
    for i in range(len(asked)):
        order[filled[cells[i]]] = i
        filled[cells[i]] += 1
    return begin, order


@compiled
def _ask(asking, asked, order, begin, low, edge, shape, found, first, last):
    for i in range(first, last):
        px, py, pz = np.float64(asking[i, 0]), np.float64(asking[i, 1]), np.float64(asking[i, 2])
        cx, cy, cz = (
            _cell(px, low[0], edge, shape[0]),
            _cell(py, low[1], edge, shape[1]),
            _cell(pz, low[2], edge, shape[2]),
        )
        best, who, shell = np.inf, np.int64(-1), 0
        while True:
            x0, x1 = max(cx - shell, 0), min(cx + shell, shape[0] - 1)
            y0, y1 = max(cy - shell, 0), min(cy + shell, shape[1] - 1)
            z0, z1 = max(cz - shell, 0), min(cz + shell, shape[2] - 1)
            for x in range(x0, x1 + 1):
                for y in range(y0, y1 + 1):
                    if abs(x - cx) == shell or abs(y - cy) == shell:
                        first_z, step = z0, 1
                    else:  # between them everything was asked already: the lid and the floor of the shell
                        first_z, step = (cz - shell if z0 == cz - shell else cz + shell), 2 * shell
                    for z in range(first_z, z1 + 1, step):
                        c = (x * shape[1] + y) * shape[2] + z
                        for k in range(begin[c], begin[c + 1]):
                            dx, dy, dz = px - asked[k, 0], py - asked[k, 1], pz - asked[k, 2]
                            away = dx * dx + dy * dy + dz * dz
                            if away < best or (away == best and order[k] < who):
                                best, who = away, order[k]
            # whatever was not asked lies beyond one of the faces of what was; the outermost cells have no outside
            clear = np.inf
            if cx - shell > 0:
                clear = min(clear, px - (low[0] + (cx - shell) * edge))
            if cx + shell < shape[0] - 1:
                clear = min(clear, low[0] + (cx + shell + 1) * edge - px)
            if cy - shell > 0:
                clear = min(clear, py - (low[1] + (cy - shell) * edge))
            if cy + shell < shape[1] - 1:
                clear = min(clear, low[1] + (cy + shell + 1) * edge - py)
            if cz - shell > 0:
                clear = min(clear, pz - (low[2] + (cz - shell) * edge))
            if cz + shell < shape[2] - 1:
                clear = min(clear, low[2] + (cz + shell + 1) * edge - pz)
            if clear == np.inf or (who >= 0 and clear > 0 and best < clear * clear):
                break
            shell += 1
        found[i] = who
