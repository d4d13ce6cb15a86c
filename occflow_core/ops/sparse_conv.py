"""Three-dimensional convolutions over few sites of a large grid. M sites, C channels, K taps (cells) of a kernel.

Sites are (M, 4) int64: lane of the batch, then indices along the grid's three axes; each at most once, in any order.
Features are (M, C), row by row those of the sites; everywhere else the grid is zero. Time and memory follow the sites,
not the grid. A convolution has two steps: which site each tap of the kernel meets (`submanifold_taps`, `regular_taps`;
layers that share their sites share the answer), and the sum over the taps (`convolve`).

Both kinds equal a dense convolution (`torch.nn.functional.conv3d`) read at the sites that they give: the submanifold
kind (arXiv 1706.01307) those it was given, the regular kind all whose kernel holds one of them. The layouts differ from
spconv's in the weights only, which are torch's here: (out, in, k, k, k).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..transfer import numbers


@torch.no_grad()
def submanifold_taps(sites: Tensor, shape: Sequence[int], kernel: Sequence[int]) -> Tensor:
    """(K, M) int64: for every tap and site the row of the site that the tap meets, M where it meets none.

    shape: of the grid, three axes. kernel: odd edge lengths; its middle lies on the site.
    """
    assert all(k % 2 for k in kernel), kernel
    return _taps(sites, sites, shape, kernel, stride=(1, 1, 1), padding=[k // 2 for k in kernel])


@torch.no_grad()
def regular_taps(
    sites: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
) -> tuple[Tensor, tuple[int, int, int], Tensor]:
    """Sites (M', 4) that the convolution reaches, in order, their grid's shape, and taps (K, M') as above.

    A stride of 1 dilates what is there, a larger one thins it. ValueError where nothing of the grid is left.
    """
    given = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape, kernel, stride, padding, strict=True))
    if min(given) < 1:
        raise ValueError(f"sparse convolution: kernel {tuple(kernel)} is larger than the grid {tuple(shape)}")
    # along each axis a site lies under the kernels of at most ceil(k / s) places
    reach = [torch.arange(-(-k // s), device=sites.device) for k, s in zip(kernel, stride, strict=True)]
    back = torch.stack(torch.meshgrid(*reach, indexing="ij"), dim=-1).view(-1, 3)
    padded = (sites[:, 1:] + numbers(padding, sites))[:, None]  # (M, 1, 3)
    step = numbers(stride, sites)
    places = padded // step - back  # (M, J, 3)
    under = padded - places * step < numbers(kernel, sites)
    found = (under & (places >= 0) & (places < numbers(given, sites))).all(-1)
    lane = sites[:, :1].expand(found.shape)
    there = _sites(_ids(torch.cat([lane[..., None], places], dim=-1)[found], given).unique(), given)
    return there, given, _taps(sites, there, shape, kernel, stride, padding)


def convolve(features: Tensor, taps: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Features (M, C) of the sites that were met -> (M', C'), with taps (K, M') and weight (C', C, k, k, k).

    Under autocast in its precision, with sums in float32. Gradients are as exact, and add in the same order every time.
    """
    assert taps.shape[0] == weight[0, 0].numel(), (taps.shape, weight.shape)
    assert features.shape[1] == weight.shape[1], (features.shape, weight.shape)
    device = features.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        features, weight = features.to(dtype), weight.to(dtype)
    matrices = weight.permute(2, 3, 4, 1, 0).flatten(0, 2)  # (K, C, C')
    given = _Convolve.apply(features, matrices, taps)
    return given if bias is None else given + bias


def dense(sites: Tensor, features: Tensor, lanes: int, shape: Sequence[int]) -> Tensor:
    """Features (M, C) at their sites -> (B, C, X, Y, Z), zero elsewhere. lanes: B."""
    x, y, z = shape
    volume = features.new_zeros(lanes * x * y * z, features.shape[1])
    volume = volume.index_put((_ids(sites, shape),), features)
    return volume.view(lanes, x, y, z, -1).permute(0, 4, 1, 2, 3)


class _Convolve(torch.autograd.Function):
    """Keeps what it is given and not what it gathers, which is K times as much."""

    @staticmethod
    def forward(ctx, features: Tensor, matrices: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(features, matrices, taps)
        return _gather(features, taps, matrices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        features, matrices, taps = ctx.saved_tensors
        of_features = of_matrices = None
        if ctx.needs_input_grad[0]:
            # a tap meets a site from one place at most: from where, so that gradients too are gathered
            count = features.shape[0]
            back = torch.full((taps.shape[0], count + 1), taps.shape[1], device=taps.device)
            back = back.scatter(1, taps, torch.arange(taps.shape[1], device=taps.device).expand_as(taps))
            of_features = _gather(gradient, back[:, :count], matrices.mT)
        if ctx.needs_input_grad[1]:
            met = (_met(rows, features) for rows in taps)
            of_matrices = torch.stack([features[rows].mT @ gradient[at] for at, rows in met])
        return of_features, of_matrices, None


def _gather(features: Tensor, taps: Tensor, matrices: Tensor) -> Tensor:
    """Sum over the taps of the rows that they meet, each through the tap's matrix."""
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    total = features.new_zeros(taps.shape[1], matrices.shape[2], dtype=wide)
    if features.device.type == "cpu" and not torch.compiler.is_compiling():
        for rows, matrix in zip(taps, matrices, strict=True):
            at, rows = _met(rows, features)
            total[at] += features[rows] @ matrix
        return total.to(features.dtype)
    # elsewhere, and in a program that is exported, sizes that depend on the data cost more than they save: what meets
    # nothing meets a row of zeros
    padded = torch.cat([features, features.new_zeros(1, features.shape[1])])
    for k in range(matrices.shape[0]):
        total = total + padded[taps[k]] @ matrices[k]
    return total.to(features.dtype)


def _met(rows: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """One tap, (M',) -> where it meets a site, and which: where a convolution dilates, one tap in twenty does."""
    at = (rows < features.shape[0]).nonzero()[:, 0]
    return at, rows[at]


def _taps(sites: Tensor, at: Tensor, shape, kernel, stride, padding) -> Tensor:
    """(K, M'): rows of `sites` (M, 4) that the taps of kernels meet which stand at (M', 4); M where none."""
    # with the padding as a shell around the grid, no tap leaves it, and a step along an axis is a constant
    shelled = tuple(n + 2 * p for n, p in zip(shape, padding, strict=True))
    lane, axes = sites[:, :1], sites[:, 1:] + numbers(padding, sites)
    ids, order = _ids(torch.cat([lane, axes], dim=1), shelled).sort()
    # one more row, which nothing equals, so that a look-up behind the last site is one as well
    ids = torch.cat([ids, ids.new_full((1,), torch.iinfo(ids.dtype).max)])
    order = torch.cat([order, order.new_full((1,), sites.shape[0])])
    first = _ids(torch.cat([at[:, :1], at[:, 1:] * numbers(stride, at)], dim=1), shelled)
    columns = [(x * shelled[1] + y) * shelled[2] for x in range(kernel[0]) for y in range(kernel[1])]
    if torch.compiler.is_compiling():  # all at once: a ninth of the program, which takes minutes to build
        columns = [at.new_tensor(columns)[:, None]]
    rows = []
    for column in columns:
        wanted = first + column
        place = torch.searchsorted(ids, wanted)
        along = []
        for _ in range(kernel[2]):  # what is next in the grid is next in order, if it is there
            met = ids[place] == wanted
            along.append(torch.where(met, order[place], order[-1]))
            place, wanted = place + met, wanted + 1
        rows.append(torch.stack(along, dim=-2).flatten(end_dim=-2))
    return torch.cat(rows)


def _ids(sites: Tensor, shape: Sequence[int]) -> Tensor:
    """(..., 4) -> (...): lane and indices as one number."""
    lane, x, y, z = sites.unbind(-1)
    return ((lane * shape[0] + x) * shape[1] + y) * shape[2] + z


def _sites(ids: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `_ids`."""
    _, y, z = shape
    return torch.stack([ids // (shape[0] * y * z), ids // (y * z) % shape[0], ids // z % y, ids % z], dim=-1)
