"""M sites, C channels."""

import time

import pytest
import torch
from torch.nn import functional as F

from occflow_core.ops import convolve, dense, regular_taps, submanifold_taps

SHAPE = (7, 6, 9)


def scattered(count=80, lanes=2, shape=SHAPE, seed=0):
    """Random sites in random order, one in every corner of lane 0 among them."""
    torch.manual_seed(seed)
    volume = lanes * shape[0] * shape[1] * shape[2]
    ids = torch.randperm(volume)[:count]
    sites = torch.stack(torch.unravel_index(ids, (lanes, *shape)), dim=1)
    corners = torch.cartesian_prod(torch.tensor([0]), *(torch.tensor([0, n - 1]) for n in shape))
    sites = torch.cat([sites, corners]).unique(dim=0)
    return sites[torch.randperm(len(sites))]


def at(volume, sites):
    """(B, C, X, Y, Z) -> (M, C)."""
    lane, x, y, z = sites.unbind(1)
    return volume[lane, :, x, y, z]


def numbers(sites, out, taken, kernel, dtype=torch.float64):
    features = torch.randn(len(sites), taken, dtype=dtype, requires_grad=True)
    weight = torch.randn(out, taken, *kernel, dtype=dtype, requires_grad=True)
    return features, weight, torch.randn(out, dtype=dtype, requires_grad=True)


def same(mine, theirs, leaves):
    """Values and, through one random cotangent, gradients."""
    assert torch.allclose(mine, theirs, atol=1e-10), (mine - theirs).abs().max()
    cotangent = torch.randn_like(mine)
    for a, b in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (mine, theirs))):
        assert torch.allclose(a, b, atol=1e-10), (a - b).abs().max()


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 1, 1), (1, 3, 5)])
def test_a_submanifold_convolution_is_the_dense_one_read_at_its_own_sites(kernel):
    sites = scattered()
    features, weight, bias = numbers(sites, 4, 3, kernel)
    mine = convolve(features, submanifold_taps(sites, SHAPE, kernel), weight, bias)
    volume = dense(sites, features, 2, SHAPE)
    theirs = at(F.conv3d(volume, weight, bias, padding=[k // 2 for k in kernel]), sites)
    same(mine, theirs, (features, weight, bias))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((3, 3, 3), (1, 1, 1), (1, 1, 1)),  # dilating
        ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
        ((3, 3, 3), (2, 2, 2), (0, 1, 1)),
        ((3, 1, 1), (2, 1, 1), (0, 0, 0)),
        ((2, 2, 2), (2, 2, 2), (0, 0, 0)),
        ((1, 1, 1), (2, 2, 2), (0, 0, 0)),  # leaves sites out
        ((2, 3, 4), (3, 1, 2), (0, 2, 1)),
    ],
)
def test_a_regular_convolution_is_the_dense_one_read_where_it_reaches(kernel, stride, padding):
    sites = scattered(30)
    features, weight, bias = numbers(sites, 4, 3, kernel)
    there, shape, taps = regular_taps(sites, SHAPE, kernel, stride, padding)
    ones = dense(sites, torch.ones(len(sites), 1), 2, SHAPE)
    reached = F.conv3d(ones, torch.ones(1, 1, *kernel), stride=stride, padding=padding) > 0.5
    assert torch.equal(there, reached[:, 0].nonzero())
    assert shape == tuple(reached.shape[2:])
    volume = dense(sites, features, 2, SHAPE)
    theirs = at(F.conv3d(volume, weight, bias, stride=stride, padding=padding), there)
    same(convolve(features, taps, weight, bias), theirs, (features, weight, bias))


def test_neither_lanes_nor_far_ends_of_the_grid_touch_each_other():
    x, y, z = SHAPE
    sites = torch.tensor([[0, x - 1, y - 1, z - 1], [1, 0, 0, 0], [0, 0, 0, z - 1], [0, 0, 1, 0]])
    taps = submanifold_taps(sites, SHAPE, (3, 3, 3))
    alone = torch.full((27, 4), 4)
    alone[13] = torch.arange(4)
    assert torch.equal(taps, alone)


def test_sums_are_in_float32_under_autocast():
    sites = scattered()
    features, weight, bias = numbers(sites, 4, 3, (3, 3, 3), torch.float32)
    taps = submanifold_taps(sites, SHAPE, (3, 3, 3))
    exact = convolve(features, taps, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = convolve(features, taps, weight)
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded + bias, exact, atol=0.2) and not torch.equal(rounded + bias, exact)
    gradient = torch.autograd.grad(rounded.float().square().sum(), (features, weight))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradient)


def test_nothing_gives_nothing():
    sites = torch.zeros(0, 4, dtype=torch.int64)
    weight = torch.randn(4, 3, 3, 3, 3)
    assert convolve(torch.zeros(0, 3), submanifold_taps(sites, SHAPE, (3, 3, 3)), weight).shape == (0, 4)
    there, _, taps = regular_taps(sites, SHAPE, (3, 3, 3), (2, 2, 2), (1, 1, 1))
    assert there.shape == (0, 4) and convolve(torch.zeros(0, 3), taps, weight).shape == (0, 4)


def test_a_grid_smaller_than_the_kernel_is_refused():
    with pytest.raises(ValueError, match=r"kernel \(3, 1, 1\) is larger than the grid \(2, 5, 5\)"):
        regular_taps(torch.zeros(1, 4, dtype=torch.int64), (2, 5, 5), (3, 1, 1))


class _Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3, 3))
        self.next = torch.nn.Parameter(torch.randn(2, 4, 3, 3, 3))

    def forward(self, sites, features):
        sites, shape, taps = regular_taps(sites, SHAPE, (3, 3, 3), (2, 2, 2), (1, 1, 1))
        features = convolve(features, taps, self.weight).relu()
        features = convolve(features, submanifold_taps(sites, shape, (3, 3, 3)), self.next)
        return dense(sites, features, 2, shape)


def test_it_can_be_exported_for_any_number_of_sites():
    net = _Net().eval()
    few, many = scattered(20), scattered(90, seed=1)
    count = torch.export.Dim("count", min=2)
    with torch.no_grad():
        program = torch.export.export(
            net, (few, torch.randn(len(few), 3)), dynamic_shapes=({0: count}, {0: count}), strict=False
        )
        features = torch.randn(len(many), 3)
        assert torch.allclose(program.module()(many, features), net(many, features), atol=1e-5)


def test_time_follows_the_sites_and_not_the_grid():
    shape = (1600, 1600, 41)  # a dense map of 16 channels would be 6.7 GB
    sites = scattered(20_000, 1, (400, 400, 16))
    features, weight = torch.randn(len(sites), 16), torch.randn(16, 16, 3, 3, 3)
    began = time.process_time()
    convolve(features, submanifold_taps(sites, shape, (3, 3, 3)), weight)
    there, _, taps = regular_taps(sites, shape, (3, 3, 3), (2, 2, 2), (1, 1, 1))
    convolve(features, taps, weight)
    assert time.process_time() - began < 10
