"""B batch, T time, N cameras, G groups, C channels of a group, Q queries, S points, L levels."""

import math

import pytest
import torch
from systems.rig import ring
from torch.nn import functional as F

from occflow_core.ops import flatten_levels, sample
from occflow_core.ops.sample import _neighbours

PICTURE = (64, 96)
SIZES = ((16, 24), (8, 12), (4, 6), (2, 3))


def world(b=2, t=3, n=4, g=2, c=3, q=5, s=2, seed=0, dtype=torch.float64):
    """Levels, matrices, used, points, weights: all random, the points around the car."""
    torch.manual_seed(seed)
    levels = [torch.randn(b, t, n, g * c, *size, dtype=dtype) for size in SIZES]
    matrix = ring(n, *PICTURE).pixels_from_car().to(dtype).expand(b, t, n, 3, 4).clone()
    matrix[..., 3] += torch.randn(b, t, n, 3, dtype=dtype)  # every time and lane has its own
    points = (torch.rand(b, q, g, s, 3, dtype=dtype) - 0.5) * torch.tensor([20.0, 20.0, 6.0], dtype=dtype)
    weights = torch.rand(b, q, g, s, len(SIZES), dtype=dtype)
    return levels, matrix, torch.ones(b, t, n, dtype=torch.bool), points, weights


def look(levels, matrix, used, points, weights, as_published):
    rows, sizes = flatten_levels(levels)
    return sample([list(lane) for lane in rows], sizes, PICTURE, matrix, used, points, weights, as_published)


def slowly(levels, matrix, used, points, weights, as_published):
    """The definition, one number at a time."""
    b_, q_, g_, s_, _ = points.shape
    t_, n_ = used.shape[1:]
    c_ = levels[0].shape[3] // g_
    out = torch.zeros(b_, q_, g_, t_ * s_, c_, dtype=points.dtype)
    for b in range(b_):
        for q in range(q_):
            for g in range(g_):
                for t in range(t_):
                    for s in range(s_):
                        choice = None
                        for n in range(n_):
                            u, v, d = (matrix[b, t, n] @ torch.cat([points[b, q, g, s], torch.ones(1)])).tolist()
                            u, v = u / max(d, 1e-5) / PICTURE[1], v / max(d, 1e-5) / PICTURE[0]
                            if n == 0:
                                first = (0, u, v)
                            if used[b, t, n] and d > 1e-5 and 0 < u < 1 and 0 < v < 1:
                                choice = (n, u, v)
                                break
                        if choice is None:
                            if not (as_published and used[b, t, 0]):
                                continue
                            choice = first
                        n, u, v = choice
                        taken = (t * g_ + g) // t_ if as_published else g
                        for level, w in zip(levels, weights[b, q, taken, s]):
                            cells = level[b, t, n, g * c_ : (g + 1) * c_]
                            out[b, q, g, t * s_ + s] += w * bilinear(cells, u, v, as_published)
    return out


def bilinear(cells, u, v, as_published):
    _, height, width = cells.shape
    if as_published:
        x, y = u * (width - 1), v * (height - 1)
    else:
        x = min(max(u * width - 0.5, 0.0), width - 1.0)
        y = min(max(v * height - 0.5, 0.0), height - 1.0)
    total = torch.zeros(cells.shape[0], dtype=cells.dtype)
    for j in (math.floor(y), math.floor(y) + 1):
        for i in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < width and 0 <= j < height:
                total += cells[:, j, i] * (1 - abs(x - i)) * (1 - abs(y - j))
    return total


@pytest.mark.parametrize("as_published", [True, False])
@pytest.mark.parametrize("shape", [{}, {"b": 1, "t": 8, "n": 6, "g": 4, "c": 2, "q": 3}, {"t": 1, "n": 1, "s": 1}])
def test_sampling_equals_explicit_loops(as_published, shape):
    levels, matrix, used, points, weights = world(**shape)
    if shape == {}:
        used[:, 1, 0] = False
        used[1, 2] = False
    mine = look(levels, matrix, used, points, weights, as_published)
    theirs = slowly(levels, matrix, used, points, weights, as_published)
    assert theirs.abs().sum() > 0
    assert torch.allclose(mine, theirs, atol=1e-10)


def test_a_picture_that_shows_its_own_coordinates_tells_where_a_point_is():
    cameras = ring(4, *PICTURE)
    levels = []
    for height, width in SIZES:
        x = (torch.arange(width, dtype=torch.float64) + 0.5) / width * PICTURE[1]
        y = (torch.arange(height, dtype=torch.float64) + 0.5) / height * PICTURE[0]
        shown = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
        levels.append(shown.expand(1, 1, 4, 2, height, width))
    pixels = torch.tensor([[20.0, 17.0], [48.0, 32.0], [75.5, 40.25]], dtype=torch.float64)
    points = cameras[2:3].unproject(pixels[None], torch.tensor([[4.0, 9.0, 30.0]], dtype=torch.float64))[0]
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).expand(1, 3, 1, 1, 4)
    matrix = cameras.pixels_from_car()[None, None]
    used = torch.ones(1, 1, 4, dtype=torch.bool)
    told = look(levels, matrix, used, points[None, :, None, None], weights, as_published=False)
    assert torch.allclose(told[0, :, 0, 0], pixels, atol=1e-9)


def test_published_level_weights_are_those_that_flattening_in_two_orders_gives():
    levels, matrix, used, points, weights = world(b=2, t=8, g=4, n=2, seed=1)
    b, q, g, s, n_levels = weights.shape
    t = used.shape[1]
    # as the authors' code lays them out: weights go (B, G, T), features (B, T, G), and they meet side by side
    mixed = weights[:, :, :, None].expand(b, q, g, t, s, n_levels).permute(0, 2, 3, 1, 4, 5)
    mixed = mixed.reshape(b, t, g, q, s, n_levels)
    together = look(levels, matrix, used, points, weights, as_published=True)
    for time in range(t):
        alone = look(
            [level[:, time : time + 1] for level in levels],
            matrix[:, time : time + 1],
            used[:, time : time + 1],
            points,
            mixed[:, time].transpose(1, 2),
            as_published=True,
        )
        assert torch.allclose(together[..., time * s : (time + 1) * s, :], alone, atol=1e-12)


def test_one_camera_and_one_level_is_grid_sample():
    levels, matrix, used, points, weights = world(b=1, t=1, n=1, g=1, q=200)
    weights[:] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    h = torch.cat([points[0, :, 0], torch.ones(200, 2, 1)], -1) @ matrix[0, 0, 0].T
    uv = h[..., :2] / h[..., 2:].clamp_min(1e-5) / torch.tensor([PICTURE[1], PICTURE[0]])
    expected = F.grid_sample(levels[1][0, 0], uv[None] * 2 - 1, align_corners=True, padding_mode="zeros")
    mine = look(levels, matrix, used, points, weights, as_published=True)
    assert torch.allclose(mine[0, :, 0], expected[0].permute(1, 2, 0), atol=1e-9)

    expected = F.grid_sample(levels[1][0, 0], uv[None] * 2 - 1, align_corners=False, padding_mode="border")
    seen = (h[..., 2:] > 0) & (uv > 0).all(-1, keepdim=True) & (uv < 1).all(-1, keepdim=True)
    mine = look(levels, matrix, used, points, weights, as_published=False)
    assert 20 < seen.sum() < 380
    assert torch.allclose(mine[0, :, 0], expected[0].permute(1, 2, 0) * seen, atol=1e-9)


@pytest.mark.parametrize("as_published", [True, False])
def test_what_an_unused_camera_shows_does_not_matter(as_published):
    levels, matrix, used, points, weights = world(q=50)
    used[:, :, 0] = False
    used[0, 1, 2] = False
    before = look(levels, matrix, used, points, weights, as_published)
    for level in levels:
        level[~used] = 1e6 * torch.randn_like(level[~used])
    assert torch.equal(look(levels, matrix, used, points, weights, as_published), before)


def test_a_point_that_no_camera_sees_is_zero_or_camera_zero_as_published():
    levels, matrix, used, points, weights = world(b=1, t=1, n=2)
    matrix = ring(2, *PICTURE).pixels_from_car().expand(1, 1, 2, 3, 4)
    # beside the first camera's picture, by less than half of a coarse cell
    edge = ring(2, *PICTURE)[:1].unproject(torch.tensor([[[-2.0, 30.0]]], dtype=torch.float64), torch.tensor([[5.0]]))
    points = edge.view(3).expand_as(points)
    assert look(levels, matrix, used, points, weights, as_published=False).abs().max() == 0
    assert look(levels, matrix, used, points, weights, as_published=True).abs().min() > 0


@pytest.mark.parametrize("as_published", [True, False])
def test_points_behind_far_away_or_not_finite_are_survived(as_published):
    levels, matrix, used, points, weights = world(dtype=torch.float32)
    points[0, 0] = torch.tensor([1e30, -1e30, 1e30])
    points[0, 1] = float("inf")
    points[0, 2] = float("nan")
    told = look(levels, matrix, used, points, weights, as_published)
    rest = look(levels, matrix, used, points[:, 3:], weights[:, 3:], as_published)
    assert torch.equal(told[:, 3:], rest)
    assert torch.isfinite(told[1]).all()


def test_no_coordinate_leads_to_a_cell_that_does_not_exist():
    cells, share = _neighbours(torch.tensor([-1e30, -0.5, 2.25, 6.5, 1e30, float("inf"), float("nan")]), 7)
    assert cells.min() >= 0 and cells.max() <= 6
    assert share[:5].tolist() == [[0, 0], [0, 0.5], [0.75, 0.25], [0.5, 0], [0, 0]]


@pytest.mark.parametrize("as_published", [True, False])
def test_gradients_are_those_of_finite_differences(as_published):
    levels, matrix, used, points, weights = world(b=1, t=2, n=2, g=2, c=1, q=3, s=1, seed=3)
    rows, sizes = flatten_levels(levels)

    def told(rows, points, weights):
        return sample([list(rows[0])], sizes, PICTURE, matrix, used, points, weights, as_published)

    inputs = [x.detach().requires_grad_() for x in (rows, points, weights)]
    assert torch.autograd.gradcheck(told, inputs, eps=1e-7, atol=1e-5, fast_mode=True)


def test_shapes_that_do_not_belong_together_are_refused():
    levels, matrix, used, points, weights = world()
    with pytest.raises(AssertionError):
        look(levels[:-1], matrix, used, points, weights, True)
    with pytest.raises(AssertionError):
        look(levels, matrix[:, :, :-1], used, points, weights, True)
