import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occflow_core.geometry import Grid
from occflow_core.ops import nearest
from occflow_core.ops.nearest import nearest_plain


def exact(points, among):
    """All squared distances in float64; the first of equals."""
    return ((points.double()[:, None] - among.double()[None]) ** 2).sum(-1).argmin(1)


def clouds():
    def scattered(n, *scale):
        return torch.randn(n, 3) * torch.tensor(scale)

    torch.manual_seed(0)
    street = torch.rand(3000, 3) * torch.tensor([80.0, 80.0, 1.0]) - torch.tensor([40.0, 40.0, 0.0])
    outlier = torch.cat([scattered(500, 1.0, 1.0, 1.0), torch.tensor([[1e6, 0.0, 0.0], [0.0, -3e5, 2.0]])])
    return {
        "a street": (street, scattered(800, 20.0, 20.0, 1.0)),
        "a ball": (scattered(2000, 5.0, 5.0, 5.0), scattered(900, 6.0, 6.0, 6.0)),
        "a line": (scattered(1000, 30.0, 0.0, 0.0), scattered(500, 30.0, 1.0, 1.0)),
        "two far away": (outlier, torch.cat([scattered(500, 2.0, 2.0, 2.0), scattered(100, 1e6, 1e6, 1.0)])),
        "all at one place": (torch.ones(300, 3), scattered(200, 3.0, 3.0, 3.0)),
        "a single one": (torch.ones(1, 3), scattered(50, 3.0, 3.0, 3.0)),
        "askers far outside": (street, scattered(300, 1.0, 1.0, 1.0) + 500.0),
        "askers of many threads": (street, scattered(20000, 20.0, 20.0, 2.0)),
    }


@pytest.mark.parametrize("cloud", clouds().items(), ids=lambda c: c[0])
def test_the_nearest_is_the_nearest_of_all(cloud):
    among, points = cloud[1]
    assert torch.equal(nearest(points, among), exact(points, among))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(-9, 9)] * 3), min_size=1, max_size=40),
    st.lists(st.tuples(*[st.integers(-12, 12)] * 3), min_size=1, max_size=20),
)
def test_of_equally_near_ones_the_first_is_taken(among, points):
    among, points = torch.tensor(among).float() / 2, torch.tensor(points).float() / 2
    assert torch.equal(nearest(points, among), exact(points, among))
    assert torch.equal(nearest_plain(points, among), exact(points, among))


def test_voxels_find_their_own_centres():
    grid = Grid((-4.0, -3.0, -1.0), (0.4, 0.4, 0.4), (20, 15, 6))
    centres = grid.centres().flatten(0, 2)
    jitter = centres + (torch.rand_like(centres) - 0.5) * 0.39
    assert torch.equal(nearest(jitter, centres), torch.arange(len(centres)))


def test_who_is_nowhere_is_never_found_and_disturbs_nobody():
    among = torch.randn(200, 3)
    among[[3, 50]] = torch.tensor([torch.nan, torch.inf])[:, None]
    points = torch.randn(100, 3)
    clean = among.clone()
    clean[[3, 50]] = 1e9
    assert torch.equal(nearest(points, among), exact(points, clean))
    points[7] = torch.nan
    assert 0 <= nearest(points, among)[7] < 200


def test_nobody_asks_and_nobody_to_ask():
    assert len(nearest(torch.zeros(0, 3), torch.ones(4, 3))) == 0
    assert len(nearest_plain(torch.zeros(0, 3), torch.ones(4, 3))) == 0
    with pytest.raises(ValueError, match="5 points ask for the nearest of none"):
        nearest(torch.zeros(5, 3), torch.zeros(0, 3))
