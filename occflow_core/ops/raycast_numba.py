"""`raycast` and `visibility` compiled for the CPU: the same arithmetic in the same order, hence equal ray for ray.

All kernels stand in one file, because numba's cache looks at the file of a kernel only, not at what it calls elsewhere.

Threads are ours (the kernels release the interpreter lock) and not numba's own pool, whose usual backends may neither
be entered from two threads at once nor survive a fork, which a data loader does.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from . import raycast
from .compiled_numba import compiled

_FEW = 4096  # rays below which a thread costs more than it brings
_ROWS = 100  # rows of `observed`'s targets in one job of a thread
_STEPS, _NEVER, _FAR = raycast.STEPS, raycast._NEVER, raycast._FAR


def cast(filled: Tensor, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """`raycast.cast` after its checks: float64 rays of unit direction."""
    distance = np.full(len(origins), -1.0)
    index = np.zeros((len(origins), 3), np.int64)
    arrays = [_array(t) for t in (filled, origins, raycast._start(origins), directions)]
    _share(len(origins), lambda first, last: _cast(*arrays, distance, index, first, last))
    return torch.from_numpy(distance), torch.from_numpy(index)


def swept(filled: Tensor, origins: Tensor, directions: Tensor) -> Tensor:
    """`raycast.swept` after its checks."""
    crossed = np.zeros(tuple(filled.shape), np.bool_)
    arrays = [_array(t) for t in (filled, origins, directions)]
    # threads write into one array: they only ever write True, so it does not matter who comes first
    _share(len(origins), lambda first, last: _swept(*arrays, crossed, first, last))
    return torch.from_numpy(crossed)


def observed(blocks: list[Tensor], eyes: Tensor, edges: Tensor) -> Tensor:
    """The loop over cameras of `visibility.observed`, without ever holding the rays in memory.

    blocks: M x (X, Y, Z) bool, what is filled for each camera; eyes (M, 3) and edges (M, 5, 4) float64, voxel units.
    """
    crossed = np.zeros(tuple(blocks[0].shape), np.bool_)
    nx, ny, _ = crossed.shape
    rows = 2 * (ny + nx + nx) + nx
    jobs = []
    for filled, eye, its_edges in zip(blocks, eyes, edges):
        arguments = (*(_array(t) for t in (filled, eye, its_edges)), crossed)
        # threads write into one array: they only ever write True, so it does not matter who comes first
        jobs += [(_observe, *arguments, first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS)]
    _side_by_side(jobs)
    return torch.from_numpy(crossed)


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().numpy())


def _share(rays: int, work) -> None:
    """work(first, last) over all rays."""
    # several parts a thread: neighbouring rays are of one kind, and the long ones must not fall to one thread
    parts = min(rays // _FEW + 1, 8 * torch.get_num_threads())
    bounds = [rays * i // parts for i in range(parts + 1)]
    _side_by_side([(work, *pair) for pair in zip(bounds[:-1], bounds[1:])])


def _side_by_side(jobs: list[tuple]) -> None:
    """Calls (function, *arguments), on as many threads as torch was given."""
    threads = min(torch.get_num_threads(), os.cpu_count() or 1, len(jobs))
    if threads < 2:
        for function, *arguments in jobs:
            function(*arguments)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(*job) for job in jobs]:
            done.result()


@compiled
def _cut(place):
    """`raycast._start` for one number."""
    return np.int64(min(max(place, -_FAR), _FAR))


@compiled
def _sweep(filled, crossed, ox, oy, oz, dx, dy, dz):
    """One ray: marks in crossed (X, Y, Z) what it crosses up to and including the first filled voxel."""
    nx, ny, nz = filled.shape
    x, y, z = _cut(ox), _cut(oy), _cut(oz)
    sx, sy, sz = 1 if dx >= 0 else -1, 1 if dy >= 0 else -1, 1 if dz >= 0 else -1
    bx = _NEVER if dx == 0 else (x + (sx > 0) - ox) / dx
    by = _NEVER if dy == 0 else (y + (sy > 0) - oy) / dy
    bz = _NEVER if dz == 0 else (z + (sz > 0) - oz) / dz
    ax = _NEVER if dx == 0 else sx / dx
    ay = _NEVER if dy == 0 else sy / dy
    az = _NEVER if dz == 0 else sz / dz
    steps = _STEPS
    while not (0 <= x < nx and 0 <= y < ny and 0 <= z < nz):
        if bx < by:
            along_x, along_y = bx < bz, False
        else:
            along_x, along_y = False, by < bz
        if along_x:
            x += sx
            bx += ax
        elif along_y:
            y += sy
            by += ay
        else:
            z += sz
            bz += az
        steps -= 1
        if steps == 0:
            return
    # inside: one number says where, and a step has to look at its own axis only
    at, right, ahead, up = (x * ny + y) * nz + z, sx * ny * nz, sy * nz, sz
    left_x, left_y, left_z = (nx - 1 - x if sx > 0 else x), (ny - 1 - y if sy > 0 else y), (nz - 1 - z if sz > 0 else z)
    is_filled, is_crossed = filled.ravel(), crossed.ravel()
    while True:
        is_crossed[at] = True
        if is_filled[at]:
            return
        if bx < by:
            along_x, along_y = bx < bz, False
        else:
            along_x, along_y = False, by < bz
        if along_x:
            if left_x == 0:
                return
            left_x -= 1
            at += right
            bx += ax
        elif along_y:
            if left_y == 0:
                return
            left_y -= 1
            at += ahead
            by += ay
        else:
            if left_z == 0:
                return
            left_z -= 1
            at += up
            bz += az
        steps -= 1
        if steps == 0:
            return


@compiled
def _cast(filled, origins, starts, directions, distance, index, first, last):
    nx, ny, nz = filled.shape
    for r in range(first, last):
        x, y, z = starts[r, 0], starts[r, 1], starts[r, 2]
        dx, dy, dz = directions[r, 0], directions[r, 1], directions[r, 2]
        sx, sy, sz = 1 if dx >= 0 else -1, 1 if dy >= 0 else -1, 1 if dz >= 0 else -1
        bx = _NEVER if dx == 0 else (x + (sx > 0) - origins[r, 0]) / dx
        by = _NEVER if dy == 0 else (y + (sy > 0) - origins[r, 1]) / dy
        bz = _NEVER if dz == 0 else (z + (sz > 0) - origins[r, 2]) / dz
        ax = _NEVER if dx == 0 else sx / dx
        ay = _NEVER if dy == 0 else sy / dy
        az = _NEVER if dz == 0 else sz / dz
        entered = False
        for _ in range(_STEPS):
            inside = 0 <= x < nx and 0 <= y < ny and 0 <= z < nz
            if inside:
                entered = True
                index[r, 0], index[r, 1], index[r, 2] = x, y, z
            elif entered:
                break
            stop = inside and filled[x, y, z]
            if bx < by:
                along_x, along_y = bx < bz, False
            else:
                along_x, along_y = False, by < bz
            if along_x:
                leaves = bx
                x += sx
                bx += ax
            elif along_y:
                leaves = by
                y += sy
                by += ay
            else:
                leaves = bz
                z += sz
                bz += az
            if inside:
                distance[r] = leaves
            if stop:
                break


@compiled
def _swept(filled, origins, directions, crossed, first, last):
    for r in range(first, last):
        _sweep(
            filled,
            crossed,
            origins[r, 0],
            origins[r, 1],
            origins[r, 2],
            directions[r, 0],
            directions[r, 1],
            directions[r, 2],
        )


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
        _sweep(filled, crossed, eye[0] + begin * x, eye[1] + begin * y, eye[2] + begin * z, x, y, z)
    else:
        _sweep(filled, crossed, eye[0], eye[1], eye[2], x, y, z)
