"""`visibility.observed` compiled for the CPU: the same targets and the same walk, hence the same mask, without ever
holding the rays in memory."""

import numpy as np
import torch
from torch import Tensor

from . import visibility
from .raycast_numba import compiled, side_by_side, sweep

_ROWS = 100  # rows of targets in one job of a thread


def observed(filled: Tensor, eyes: Tensor, edges: Tensor) -> Tensor:
    """filled (X, Y, Z) bool, eyes (M, 3) and edges (M, 5, 4) in voxel units -> (X, Y, Z) bool."""
    crossed = np.zeros(tuple(filled.shape), np.bool_)
    nx, ny, _ = filled.shape
    rows = 2 * (ny + nx + nx) + nx
    jobs = []
    for eye, its_edges in zip(eyes, edges):
        blocks = np.ascontiguousarray(visibility._opened(filled, eye).numpy())
        arguments = (blocks, eye.numpy(), np.ascontiguousarray(its_edges.numpy()), crossed)
        # threads write into one array: they only ever write True, so it does not matter who comes first
        jobs += [(_observe, *arguments, first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS)]
    side_by_side(jobs)
    return torch.from_numpy(crossed)


@compiled
def _observe(filled, eye, edges, crossed, first, last):
    """Rows first to last of the targets of one camera: first those on the six sides, then the border voxels by x."""
    size = filled.shape
    sides = (size[1], size[1], size[0], size[0], size[0], size[0])
    for row in range(first, last):
        side, a = 0, row
        while side < 6 and a >= sides[side]:
            a -= sides[side]
            side += 1
        if side < 6:
            _faces(filled, eye, edges, crossed, side // 2, side % 2, a)
        else:
            _border(filled, eye, edges, crossed, a)


@compiled
def _faces(filled, eye, edges, crossed, axis, upper, a):
    """Row `a` of the faces on one side of the grid."""
    size = filled.shape
    at = float(size[axis]) if upper else 0.0
    if not (eye[axis] < at if upper else eye[axis] > at):
        return
    i, j = (1 if axis == 0 else 0), (1 if axis == 2 else 2)
    fixed = np.empty(5)
    for k in range(5):
        fixed[k] = (edges[k, axis] * at + edges[k, 3]) + edges[k, i] * (a + 0.5)
        ends = fixed[k] + edges[k, j] * 0.5, fixed[k] + edges[k, j] * (size[j] - 0.5)
        if ends[0] <= 0 and ends[1] <= 0:
            return
    target = np.empty(3)
    target[axis], target[i] = at, a + 0.5
    for b in range(size[j]):
        within = True
        for k in range(5):
            within = within and fixed[k] + edges[k, j] * (b + 0.5) > 0
        if within:
            target[j] = b + 0.5
            _aim(filled, eye, target, crossed)


@compiled
def _border(filled, eye, edges, crossed, ix):
    """Voxels with this x whose centre is within all edges and a corner is not."""
    _, ny, nz = filled.shape
    floor, reach = np.empty(5), np.empty(5)
    target = np.empty(3)
    for k in range(5):
        reach[k] = 0.5 * (abs(edges[k, 0]) + abs(edges[k, 1]) + abs(edges[k, 2]))
    for iy in range(ny):
        seen, whole = True, True
        for k in range(5):
            floor[k] = (edges[k, 0] * (ix + 0.5) + (edges[k, 3] + 0.5 * edges[k, 2])) + edges[k, 1] * (iy + 0.5)
            top = floor[k] + edges[k, 2] * (nz - 1)
            seen = seen and max(floor[k], top) > 0
            whole = whole and min(floor[k], top) > reach[k]
        if whole or not seen:
            continue
        for iz in range(nz):
            within, cut = True, False
            for k in range(5):
                value = floor[k] + edges[k, 2] * iz
                within = within and value > 0
                cut = cut or value <= reach[k]
            if within and cut:
                target[0], target[1], target[2] = ix + 0.5, iy + 0.5, iz + 0.5
                _aim(filled, eye, target, crossed)


@compiled
def _aim(filled, eye, target, crossed):
    begin, outside = 0.0, False
    for k in range(3):
        way = target[k] - eye[k]
        if way > 0:
            begin = max(begin, -eye[k] / way)
        elif way < 0:
            begin = max(begin, (filled.shape[k] - eye[k]) / way)
        outside = outside or not 0 <= eye[k] < filled.shape[k]
    x, y, z = target[0] - eye[0], target[1] - eye[1], target[2] - eye[2]
    if outside:
        sweep(filled, crossed, eye[0] + begin * x, eye[1] + begin * y, eye[2] + begin * z, x, y, z)
    else:
        sweep(filled, crossed, eye[0], eye[1], eye[2], x, y, z)
