"""The walk of `raycast` compiled for the CPU: the same arithmetic in the same order, hence equal ray for ray.

Threads are ours (the kernels release the interpreter lock) and not numba's own pool, whose usual backends may neither
be entered from two threads at once nor survive a fork, which a data loader does.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

from . import raycast

_FEW = 4096  # rays below which a thread costs more than it brings
_STEPS, _NEVER, _FAR = raycast.STEPS, raycast._NEVER, raycast._FAR


def compiled(function):
    """Compiled once and kept beside the file or in numba's cache folder; in each process where neither can be."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # "no locator available": nowhere to write
        return njit(nogil=True)(function)


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


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().numpy())


def _share(rays: int, work) -> None:
    """work(first, last) over all rays."""
    # several parts a thread: neighbouring rays are of one kind, and the long ones must not fall to one thread
    parts = min(rays // _FEW + 1, 8 * torch.get_num_threads())
    bounds = [rays * i // parts for i in range(parts + 1)]
    side_by_side([(work, *pair) for pair in zip(bounds[:-1], bounds[1:])])


def side_by_side(jobs: list[tuple]) -> None:
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
def sweep(filled, crossed, ox, oy, oz, dx, dy, dz):
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
        sweep(
            filled, crossed, origins[r, 0], origins[r, 1], origins[r, 2], directions[r, 0], directions[r, 1], directions[r, 2]
        )
