"""`sample.sample` for a GPU: where a point lies, the cells around it and their sum, in one kernel, with gradients.

A launch serves one time of one lane, because that is how the rows come: a memory is a list of tensors that are not to
be copied, and a launch takes the address of one of them as it is. One launch for all would need a table of addresses:
a copy to the GPU each time, and a compiler that no longer knows how addresses are aligned.

What the definition keeps between its steps, (B, T, N, P, 3) places in pictures and (B, T, P, 4 L) cells and shares,
stays in registers; gradients compute it again. They are the same from run to run for points and weights (each time
writes its own, then they are added); those for rows are added by atomics, in an order that changes, and so may their
last digits. The definition adds atomically there too.

A cell of which a point takes nothing is not fetched: where features are not finite the definition may say NaN of
points beside them, as nought times NaN is NaN, and the kernel a number.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sample import EPS

_NUMBERS = 512  # points of a program times channels of a group: four a thread, so that gradients fit into registers


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
    """`sample.sample` after its checks, of one type of numbers, float32 or float64. No gradient for the cameras.

    Equal to the definition but for rounding. float32 tells a place in a picture to some 1e-7 of its width: of a level W
    cells wide numbers differ by 1e-7 W times what rows differ from cell to cell, and a point that near to a picture's
    border may be seen by one and not by the other. In float64 values and gradients agree to 1e-12.
    """
    flat = [row for lane in rows for row in lane]
    return _Sample.apply(tuple(sizes), picture, as_published, pixels_from_now, used, points, weights, *flat)


class _Sample(torch.autograd.Function):
    """Rows come flat, lane after lane, each with its own gradient."""

    @staticmethod
    def forward(ctx, sizes, picture, as_published, pixels_from_now, used, points, weights, *rows):
        ctx.constants = sizes, picture, as_published
        tensors = [t.contiguous() for t in (pixels_from_now, used, points, weights, *rows)]
        ctx.save_for_backward(*tensors)
        pixels_from_now, used, points, weights, *rows = tensors
        b, t, _ = used.shape
        _, q, g, s, _ = points.shape
        sampled = points.new_empty(b, q, g, t * s, rows[0].shape[-1] // g)
        grid, options = _launch(points, used, sampled, sizes, picture, as_published)
        with torch.cuda.device_of(points):  # Triton launches on the current GPU, which need not be the points'
            for i, row in enumerate(rows):
                _look[grid](
                    row, pixels_from_now, used.view(torch.uint8), points, weights, sampled, i // t, i % t, **options
                )
        return sampled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        sizes, picture, as_published = ctx.constants
        pixels_from_now, used, points, weights, *rows = ctx.saved_tensors
        b, t, _ = used.shape
        _, q, g, s, _ = points.shape
        of_points = points.new_empty(b, t, *points.shape[1:])
        of_weights = weights.new_empty(b, t * g, q, s, len(sizes))
        of_rows = [torch.zeros_like(row) if asked else None for row, asked in zip(rows, ctx.needs_input_grad[7:])]
        gradient = gradient.contiguous()
        grid, options = _launch(points, used, gradient, sizes, picture, as_published)
        with torch.cuda.device_of(points):
            for i, (row, of_row) in enumerate(zip(rows, of_rows)):
                _look_back[grid](
                    *(row, pixels_from_now, used.view(torch.uint8), points, weights, gradient),
                    *(row if of_row is None else of_row, of_points, of_weights, i // t, i % t),
                    **options,
                    ROWS=of_row is not None,
                )
        # time t of group g took the weights of group (t*G + g) // T, or of its own
        if as_published:
            of_weights = of_weights.view(b, g, t, q, s, len(sizes)).sum(2)
        else:
            of_weights = of_weights.view(b, t, g, q, s, len(sizes)).sum(1)
        return None, None, None, None, None, of_points.sum(1), of_weights.transpose(1, 2), *of_rows


def _launch(points, used, sampled, sizes, picture, as_published):
    """The grid of a launch, and what is the same for every launch."""
    _, q, g, s, _ = points.shape
    channels = sampled.shape[-1]
    width = triton.next_power_of_2(channels)
    block = max(1, _NUMBERS // width)
    options = {
        "times": used.shape[1],
        "cameras": used.shape[2],
        "queries": q,
        "groups": g,
        "samples": s,
        "channels": channels,
        "total": sum(h * w for h, w in sizes),
        "height": picture[0],
        "width": picture[1],
        "SIZES": tuple(n for size in sizes for n in size),
        "PUBLISHED": as_published,
        "EPS": EPS,
        "BLOCK": block,
        "CHANNELS": width,
    }
    return (triton.cdiv(q * g * s, block),), options


@triton.jit
def _divided(a, b):
    """Rounded as IEEE 754 says: what is quicker is not exact, and a border is where it is exact."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _placed(pixels, used, points, at, real, frame, cameras, height, width, EPS: tl.constexpr):
    """Points `at` -> the first camera that holds each (or 0), whether there is one, where in its picture (fractions),
    its depth, and whether camera 0 is used."""
    x = tl.load(points + 3 * at, real, other=0.0)
    y = tl.load(points + 3 * at + 1, real, other=0.0)
    z = tl.load(points + 3 * at + 2, real, other=0.0)
    view = tl.zeros_like(at).to(tl.int32)
    found = view > 0
    u, v, d = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    across, down = tl.zeros_like(x) + width, tl.zeros_like(x) + height
    for camera in range(cameras):
        m = pixels + (frame * cameras + camera) * 12
        su = x * tl.load(m) + y * tl.load(m + 1) + z * tl.load(m + 2) + tl.load(m + 3)
        sv = x * tl.load(m + 4) + y * tl.load(m + 5) + z * tl.load(m + 6) + tl.load(m + 7)
        sd = x * tl.load(m + 8) + y * tl.load(m + 9) + z * tl.load(m + 10) + tl.load(m + 11)
        depth = tl.where(sd < EPS, tl.zeros_like(sd) + EPS, sd)  # what is no number stays none
        cu = _divided(_divided(su, depth), across)
        cv = _divided(_divided(sv, depth), down)
        valid = (sd > EPS) & (cu > 0) & (cu < 1) & (cv > 0) & (cv < 1)
        valid = valid & (tl.load(used + frame * cameras + camera) != 0)
        taken = (valid & ~found) | (camera == 0)
        view = tl.where(taken, camera, view)
        u, v, d = tl.where(taken, cu, u), tl.where(taken, cv, v), tl.where(taken, sd, d)
        found = found | valid
    return view, found, u, v, d, tl.load(used + frame * cameras) != 0


@triton.jit
def _in_cells(u, SIZE: tl.constexpr, PUBLISHED: tl.constexpr):
    """Fractions of a picture -> cells of a level, and by how many cells one moves when the other grows by one."""
    if PUBLISHED:
        x = u * (SIZE - 1)
        slope = tl.zeros_like(u) + (SIZE - 1)
    else:
        x = u * SIZE - 0.5
        slope = tl.where((x >= 0) & (x <= SIZE - 1), tl.zeros_like(u) + SIZE, 0.0)
        x = tl.where(x < 0, 0.0, tl.where(x > SIZE - 1, tl.zeros_like(u) + (SIZE - 1), x))
    return x, slope


@triton.jit
def _neighbour(x, side, SIZE: tl.constexpr):
    """The cell on one side of x (0 left, 1 right), whether it exists, its share, and how the share grows with x."""
    left = tl.floor(x)
    cell = left + side
    there = (cell >= 0) & (cell < SIZE)
    share = tl.where(side == 0, 1 - (x - left), x - left)
    slope = tl.where(there, 2.0 * side - 1, tl.zeros_like(x))
    return tl.where(there, cell, 0.0).to(tl.int32), there, share * there.to(x.dtype), slope


@triton.jit
def _weight_at(at, time, times, groups, samples, PUBLISHED: tl.constexpr):
    """Where the level weights of points (Q, G, S) lie, in points."""
    if PUBLISHED:
        group = at // samples % groups
        return (at // (samples * groups) * groups + (time * groups + group) // times) * samples + at % samples
    else:
        return at


@triton.jit(do_not_specialize=["lane", "time"])
def _look(
    rows,  # (N, R, G*C) of this lane and time
    pixels,  # (B, T, N, 3, 4)
    used,  # (B, T, N)
    points,  # (B, Q, G, S, 3)
    weights,  # (B, Q, G, S, L)
    sampled,  # (B, Q, G, T*S, C)
    lane,
    time,
    times,
    cameras,
    queries,
    groups,
    samples,
    channels,
    total,
    height,
    width,
    SIZES: tl.constexpr,
    PUBLISHED: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    count = queries * groups * samples
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    frame = lane.to(tl.int64) * times + time
    begin = lane.to(tl.int64) * count
    view, found, u, v, d, first = _placed(
        pixels, used, points + 3 * begin, at, real, frame, cameras, height, width, EPS
    )
    counts = real & (found | first if PUBLISHED else found)
    c = tl.arange(0, CHANNELS)[None, :]
    weight_at = (begin + _weight_at(at, time, times, groups, samples, PUBLISHED)) * (len(SIZES) // 2)
    row = view.to(tl.int64) * total
    told = tl.zeros((BLOCK, CHANNELS), points.dtype.element_ty)
    for level in tl.static_range(len(SIZES) // 2):
        weight = tl.load(weights + weight_at + level, real, other=0.0) * counts.to(u.dtype)
        x, _ = _in_cells(u, SIZES[2 * level + 1], PUBLISHED)
        y, _ = _in_cells(v, SIZES[2 * level], PUBLISHED)
        for corner in tl.static_range(4):
            i, in_x, share_x, _ = _neighbour(x, corner % 2, SIZES[2 * level + 1])
            j, in_y, share_y, _ = _neighbour(y, corner // 2, SIZES[2 * level])
            cell = row + j * SIZES[2 * level + 1] + i
            place = (cell * groups + at // samples % groups)[:, None] * channels + c
            value = tl.load(rows + place, (counts & in_x & in_y)[:, None] & (c < channels), other=0.0)
            told += (share_y * share_x * weight)[:, None] * value
        row += SIZES[2 * level] * SIZES[2 * level + 1]
    to = ((begin // samples + at // samples) * times + time) * samples + at % samples
    tl.store(sampled + to[:, None] * channels + c, told, real[:, None] & (c < channels))


@triton.jit(do_not_specialize=["lane", "time"])
def _look_back(
    rows,
    pixels,
    used,
    points,
    weights,
    gradient,  # of sampled
    of_rows,  # (N, R, G*C), added to where ROWS
    of_points,  # (B, T, Q, G, S, 3)
    of_weights,  # (B, T*G, Q, S, L)
    lane,
    time,
    times,
    cameras,
    queries,
    groups,
    samples,
    channels,
    total,
    height,
    width,
    SIZES: tl.constexpr,
    PUBLISHED: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    count = queries * groups * samples
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    frame = lane.to(tl.int64) * times + time
    begin = lane.to(tl.int64) * count
    view, found, u, v, d, first = _placed(
        pixels, used, points + 3 * begin, at, real, frame, cameras, height, width, EPS
    )
    counts = real & (found | first if PUBLISHED else found)
    c = tl.arange(0, CHANNELS)[None, :]
    group = at // samples % groups
    weight_at = (begin + _weight_at(at, time, times, groups, samples, PUBLISHED)) * (len(SIZES) // 2)
    to = ((begin // samples + at // samples) * times + time) * samples + at % samples
    back = tl.load(gradient + to[:, None] * channels + c, real[:, None] & (c < channels), other=0.0)
    of_weight_at = (frame * groups + group) * queries + at // (samples * groups)
    of_weight_at = (of_weight_at * samples + at % samples) * (len(SIZES) // 2)
    row = view.to(tl.int64) * total
    of_u, of_v = tl.zeros_like(u), tl.zeros_like(v)
    for level in tl.static_range(len(SIZES) // 2):
        weight = tl.load(weights + weight_at + level, real, other=0.0) * counts.to(u.dtype)
        x, slope_x = _in_cells(u, SIZES[2 * level + 1], PUBLISHED)
        y, slope_y = _in_cells(v, SIZES[2 * level], PUBLISHED)
        of_weight, of_x, of_y = tl.zeros_like(u), tl.zeros_like(u), tl.zeros_like(u)
        for corner in range(4):  # not unrolled: sixteen corners at once would not fit into registers
            i, in_x, share_x, grows_x = _neighbour(x, corner % 2, SIZES[2 * level + 1])
            j, in_y, share_y, grows_y = _neighbour(y, corner // 2, SIZES[2 * level])
            cell = row + j * SIZES[2 * level + 1] + i
            place = (cell * groups + group)[:, None] * channels + c
            read = (counts & in_x & in_y)[:, None] & (c < channels)
            value = tl.load(rows + place, read, other=0.0)
            if ROWS:
                tl.atomic_add(of_rows + place, (share_y * share_x * weight)[:, None] * back, read, sem="relaxed")
            heard = tl.sum(value * back, 1)
            of_weight += share_y * share_x * heard
            of_x += share_y * grows_x * heard
            of_y += share_x * grows_y * heard
        tl.store(of_weights + of_weight_at + level, of_weight, real)
        of_u += of_x * weight * slope_x
        of_v += of_y * weight * slope_y
        row += SIZES[2 * level] * SIZES[2 * level + 1]
    # ---- through the projection: u = su / max(sd, EPS) / width
    depth = tl.where(d < EPS, tl.zeros_like(d) + EPS, d)
    of_sd = tl.where(d < EPS, 0.0, -(of_u * u + of_v * v) / depth)
    of_su, of_sv = of_u / depth / width, of_v / depth / height
    m = pixels + (frame * cameras + view) * 12
    to = of_points + 3 * (frame * count + at)
    for axis in tl.static_range(3):
        moved = of_su * tl.load(m + axis) + of_sv * tl.load(m + 4 + axis) + of_sd * tl.load(m + 8 + axis)
        tl.store(to + axis, moved, real)
