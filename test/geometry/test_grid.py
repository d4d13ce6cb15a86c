"""Voxel grids: metres to indices and back, and points that are nowhere."""

import pytest
import torch

from occflow_core.geometry import OCC3D_GRID, Grid

GRID = Grid((-4.0, -2.0, -1.0), (0.4, 0.5, 0.25), (20, 8, 16))


@pytest.mark.parametrize("grid", [GRID, OCC3D_GRID], ids=["uneven", "occ3d"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_centre_of_every_voxel_lies_in_that_voxel(grid, kind):
    index, inside = grid.index(grid.centres(kind))
    assert inside.all()
    expected = torch.stack(torch.meshgrid(*map(torch.arange, grid.shape), indexing="ij"), -1)
    assert torch.equal(index, expected)


def test_a_voxel_holds_its_lower_faces_and_not_its_upper_ones():
    low, high = torch.tensor(GRID.low).double(), torch.tensor(GRID.high).double()
    index, inside = GRID.index(torch.stack([low, high - 1e-9, high, low - 1e-9]))
    assert inside.tolist() == [True, True, False, False]
    assert index[0].tolist() == [0, 0, 0] and index[1].tolist() == [n - 1 for n in GRID.shape]


def test_points_that_are_not_finite_or_far_away_are_outside():
    for bad in (float("nan"), float("inf"), float("-inf"), 1e30, -1e30):
        points = torch.zeros(3, 3)
        points[range(3), range(3)] = bad
        index, inside = GRID.index(points)
        assert not inside.any() and (index == 0).all()


def test_fractions_there_and_back_are_the_identity():
    points = torch.randn(100, 3, dtype=torch.float64) * 5
    assert torch.allclose(GRID.metres(GRID.unit(points)), points)
    corners = torch.tensor([GRID.low, GRID.high], dtype=torch.float64)
    assert torch.allclose(GRID.unit(corners), torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float64))


def test_a_coarser_grid_fills_the_same_box_and_its_voxels_hold_their_children():
    coarse = GRID.coarser(4)
    assert coarse.shape == (5, 2, 4) and coarse.low == GRID.low and coarse.high == pytest.approx(GRID.high)
    assert len(GRID) == 64 * len(coarse)
    parents, _ = coarse.index(GRID.centres(torch.float64))
    children, _ = GRID.index(GRID.centres(torch.float64))
    assert torch.equal(parents, children // 4)
    with pytest.raises(ValueError, match="does not divide by 3"):
        GRID.coarser(3)


def test_numbers_that_are_no_grid_are_refused():
    with pytest.raises(ValueError, match="low needs three values"):
        Grid((0.0, 0.0), (1.0, 1.0, 1.0), (1, 1, 1))
    with pytest.raises(ValueError, match="must be positive"):
        Grid((0.0, 0.0, 0.0), (1.0, 0.0, 1.0), (1, 1, 1))
    with pytest.raises(ValueError, match="must be positive"):
        Grid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1, 0, 1))


def test_equal_numbers_are_an_equal_grid():
    assert Grid([-40, -40, -1], [0.4, 0.4, 0.4], [200, 200, 16]) == OCC3D_GRID
    assert OCC3D_GRID.high == pytest.approx((40.0, 40.0, 5.4)) and len(OCC3D_GRID) == 640_000
