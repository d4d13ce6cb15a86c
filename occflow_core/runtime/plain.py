"""Operators that other runtimes lack, said in those that they have: another program that tells the same numbers.

torch's exporter to ONNX (2.13) has no words for distances among points, a search in sorted numbers and counts, and says
sums over rows (`embedding_bag`) as a loop over the sums. TensorRT's converters lack the last three, too.
"""

import torch
from torch import Tensor

aten = torch.ops.aten
LONGEST = 31  # binary digits of a length that is not known before the program runs


def plain(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program without the operators of OPERATORS."""
    return program.run_decompositions(dict(OPERATORS))


def _cdist(one: Tensor, other: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """(..., M, D) and (..., N, D) -> (..., M, N), by differences, one axis after the other: D times M N may not fit."""
    assert p == 2, p
    apart = (one[..., :, None, i] - other[..., None, :, i] for i in range(one.shape[-1]))
    return sum(difference * difference for difference in apart).sqrt()


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, ...]:
    """Sums of as many rows each: what `ops.sample` asks for, whose `index` has two axes."""
    assert (mode, include_last_offset, padding_idx) == (0, False, None) and per_sample_weights is not None
    each = indices.shape[0] // offsets.shape[0]
    rows = (weight[indices.long()] * per_sample_weights[:, None]).unflatten(0, (-1, each))
    return rows.sum(1), offsets, offsets, offsets  # the last three are for gradients


def _searchsorted(
    ordered: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """How many of `ordered` (..., N), or (N,) for all, lie before each value: found digit by digit, highest first."""
    assert sorter is None
    length = ordered.shape[-1]
    before = torch.zeros_like(values, dtype=torch.int64)
    for digit in reversed(range(length.bit_length() if isinstance(length, int) else LONGEST)):
        more = before + 2**digit
        at = more.clamp_max(length) - 1
        found = ordered[at] if ordered.ndim == 1 else ordered.gather(-1, at)
        comes = found <= values if right or side == "right" else found < values
        before = torch.where(comes & (more <= length), more, before)
    return before.int() if out_int32 else before


def _bincount(values: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """Counts of 0 up to minlength: `ops.scatter` counts nothing beyond."""
    assert weights is None
    counts = values.new_zeros(minlength).index_put((values,), torch.ones_like(values), accumulate=True)
    return counts[counts >= 0]  # all of them, but of a length that torch.export may call by a new name, as it does


def _clamp(values: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    """One bound after the other where one is whole and one is not: torch's exporter promotes the former alone."""
    if type(min) is type(max) or min is None or max is None or not values.is_floating_point():
        return NotImplemented
    return values.clamp_min(float(min)).clamp_max(float(max))


OPERATORS = {
    aten.clamp.default: _clamp,
    aten.cdist.default: _cdist,
    aten.embedding_bag.padding_idx: _embedding_bag,
    aten.searchsorted.Tensor: _searchsorted,
    aten.bincount.default: _bincount,
}
