"""What falls into one place is brought together. M rows of D numbers, V places.

What is written here is the definition, on any device; on a GPU `scatter_triton` does the same, and adds in the order
in which rows come, every time.
"""

import torch
from torch import Tensor

from . import gpu


def scatter_mean(rows: Tensor, place: Tensor, places: int) -> Tensor:
    """The mean of the rows (M, D) of each place, (V, D); zero where there are none.

    rows: floating point. place: (M,) int64, from 0 up to places, which is V.
    """
    assert place.shape == rows.shape[:1] and rows.ndim == 2, (rows.shape, place.shape)
    fast = _fast(rows)
    if fast is not None:
        return fast.scatter(rows, place, places, "mean")
    count = place.bincount(minlength=places).clamp_min(1)[:, None]
    return rows.new_zeros(places, rows.shape[1]).index_add(0, place, rows) / count


def scatter_max(rows: Tensor, place: Tensor, places: int) -> Tensor:
    """The maximum over the rows (M, D) of each place, number by number, (V, D); zero where there are none.

    Arguments as `scatter_mean`; rows may be integers. Rows that are equal share a gradient equally.
    """
    assert place.shape == rows.shape[:1] and rows.ndim == 2, (rows.shape, place.shape)
    fast = _fast(rows)
    if fast is not None:
        return fast.scatter(rows, place, places, "max")
    lowest = -torch.inf if rows.is_floating_point() else torch.iinfo(rows.dtype).min
    most = rows.new_full((places, rows.shape[1]), lowest)
    most = most.scatter_reduce(0, place[:, None].expand_as(rows), rows, "amax")
    there = place.bincount(minlength=places) > 0
    return torch.where(there[:, None], most, 0)


def _fast(rows: Tensor):
    """The file whose `scatter` is made for such rows, or None where the definition runs."""
    if not gpu.serves(rows.device):
        return None
    from . import scatter_triton

    return scatter_triton
