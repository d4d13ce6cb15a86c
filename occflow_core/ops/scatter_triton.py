"""`scatter.scatter_mean` and `scatter_max` for a GPU, without atomics.

The places are sorted, so that each knows its rows; a program then walks through the rows of a few places, in the order
in which they come, and writes each place once. Gradients go the other way: a program of rows reads those of their
places. Both are the same from run to run. A place with very many rows holds up its program only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 1024  # places, or rows, of a program times numbers of a row
_WIDTH = 128  # numbers of a row that a program takes


def scatter(rows: Tensor, place: Tensor, places: int, how: str) -> Tensor:
    """how: "mean" or "max". As `scatter.scatter_mean` and `scatter_max` after their checks.

    A maximum is exact. Sums of a mean are float32 or wider, in the order in which rows come.
    """
    return _Scatter.apply(rows, place, places, how)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, place: Tensor, places: int, how: str) -> Tensor:
        rows, place = rows.contiguous(), place.contiguous()
        number = rows.shape[1]
        ordered, order = place.sort(stable=True)
        begin = torch.searchsorted(ordered, torch.arange(places + 1, device=place.device))
        told = rows.new_empty(places, number)
        # of a mean how many rows a place has, of a maximum how many are equal to it
        shared = torch.empty(places, number if how == "max" else 1, dtype=torch.int32, device=rows.device)
        grid, options = _launch(places, number, how)
        with torch.cuda.device_of(rows):  # Triton launches on the current GPU, which need not be the rows'
            _gather[grid](rows, order, begin, told, shared, places, number, **options)
        ctx.how = how
        ctx.save_for_backward(place, shared, *((rows, told) if how == "max" else ()))
        return told

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        place, shared, *known = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_rows = gradient.new_empty(len(place), gradient.shape[1])
        rows, told = known or (of_rows, gradient)  # of a mean they are not looked at
        grid, options = _launch(*of_rows.shape, ctx.how)
        with torch.cuda.device_of(gradient):
            _spread[grid](rows, place, told, shared, gradient, of_rows, *of_rows.shape, **options)
        return of_rows, None, None, None


def _launch(count: int, number: int, how: str):
    """The grid of a launch for so many places or rows, and the sizes of its blocks."""
    width = min(_WIDTH, triton.next_power_of_2(max(1, number)))
    block = max(1, _NUMBERS // width)
    grid = (triton.cdiv(count, block), triton.cdiv(number, width))
    return grid, {"MAX": how == "max", "BLOCK": block, "WIDTH": width}


@triton.jit(do_not_specialize=["places"])
def _gather(
    rows,  # (M, D)
    order,  # (M,), that sorts their places
    begin,  # (V+1,), of each place in `order`
    told,  # (V, D)
    shared,  # (V, D) of a maximum, (V, 1) of a mean
    places,
    number,
    MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < places
    first = tl.load(begin + place, real, other=0)
    count = tl.load(begin + place + 1, real, other=0) - first
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    kind = rows.dtype.element_ty
    if MAX:
        total = tl.zeros((BLOCK, WIDTH), kind)
    else:
        total = tl.zeros((BLOCK, WIDTH), tl.float64 if kind == tl.float64 else tl.float32)
    equal = tl.zeros((BLOCK, WIDTH), tl.int32)
    for k in range(tl.max(count, 0)):
        row = tl.load(order + first + k, k < count, other=0)
        taken = (k < count)[:, None] & (d < number)
        value = tl.load(rows + row[:, None] * number + d, taken, other=0).to(total.dtype)
        if MAX:
            more = taken & ((value > total) | (value != value) | (k == 0))  # what is no number wins, as in PyTorch
            equal = tl.where(more, 1, equal + (taken & (value == total)).to(tl.int32))
            total = tl.where(more, value, total)
        else:
            total += value
    to = place[:, None] * number + d
    there = real[:, None] & (d < number)
    if MAX:
        tl.store(told + to, total, there)
        tl.store(shared + to, equal, there)
    else:
        tl.store(told + to, (total / tl.maximum(count, 1)[:, None].to(total.dtype)).to(kind), there)
        tl.store(shared + place, tl.maximum(count, 1).to(tl.int32), real)


@triton.jit(do_not_specialize=["count"])
def _spread(
    rows,
    place,  # (M,)
    told,
    shared,
    gradient,  # of told
    of_rows,  # (M, D)
    count,
    number,
    MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = row < count
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    at = tl.load(place + row, real, other=0)
    from_, to = at[:, None] * number + d, row[:, None] * number + d
    there = real[:, None] & (d < number)
    back = tl.load(gradient + from_, there, other=0.0)
    if MAX:
        won = tl.load(rows + to, there, other=0.0) == tl.load(told + from_, there, other=1.0)
        back = tl.where(won, back / tl.load(shared + from_, there, other=1), 0.0)
    else:
        back = back / tl.load(shared + at, real, other=1)[:, None]
    tl.store(of_rows + to, back.to(of_rows.dtype.element_ty), there)
