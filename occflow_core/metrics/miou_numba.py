"""`miou.pairs` compiled for the CPU: one pass, one thread, the same counts.

A voxel costs a nanosecond here; handing parts of it to threads would cost more, and much more on a busy machine.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor


def pairs(cell: Tensor, true: Tensor, told: Tensor, cells: int, kinds: int) -> Tensor:
    """`miou.pairs`."""
    counts = np.zeros((cells, kinds + 1, kinds), np.int64)
    _count(*(t.contiguous().numpy() for t in (cell, true, told)), counts)
    return torch.from_numpy(counts)


def _compiled(function):
    """Compiled once and kept beside the file or in numba's cache folder; in each process where neither can be."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # "no locator available": nowhere to write
        return njit(nogil=True)(function)


@_compiled
def _count(cell, true, told, counts):
    last = counts.shape[1] - 1
    for i in range(len(true)):
        counts[cell[i], min(true[i], last), told[i]] += 1
