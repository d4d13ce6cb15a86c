import pytest
import torch

from occflow_core.geometry import Grid
from occflow_core.ops import farthest, voxel_means

GRID = Grid((-2.0, -1.0, 0.0), (0.5, 0.25, 0.4), (8, 8, 5))


def cloud(count=3000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([5.0, 2.4, 2.4, 255.0, 0.45])  # some lie outside
    return (torch.rand(count, 5, generator=generator) - torch.tensor([0.5, 0.5, 0.1, 0.0, 0.0])) * spread


def slowly(points, grid, cap):
    voxels = {}
    for point in points:
        index, inside = grid.index(point[:3])
        if inside:
            voxels.setdefault(tuple(index.tolist()), []).append(point)
    return {index: torch.stack(mine[:cap]).mean(0) for index, mine in sorted(voxels.items())}


@pytest.mark.parametrize("cap", [1, 10])
def test_a_voxel_is_the_mean_of_its_first_points(cap):
    points = cloud()
    index, means = voxel_means(points, GRID, cap)
    expected = slowly(points, GRID, cap)
    assert list(map(tuple, index.tolist())) == list(expected)
    assert torch.allclose(means, torch.stack(list(expected.values())), atol=1e-4)


def test_an_empty_cloud_has_no_voxels():
    far = torch.full((4, 5), 1e9)
    for points in (far, far[:0], torch.full((1, 5), torch.nan)):
        index, means = voxel_means(points, GRID, 10)
        assert index.shape == (0, 3) and means.shape == (0, 5)


def test_farthest_points_are_chosen_one_by_one():
    points = cloud(400)[:, :3]
    chosen = [0]
    for _ in range(59):
        away = (points[:, None] - points[chosen]).square().sum(-1).amin(1)
        chosen.append(int(away.argmax()))
    assert farthest(points, 60).tolist() == chosen


def test_of_equally_far_points_the_first_is_taken_and_few_points_repeat():
    square = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    assert farthest(square, 4).tolist() == [0, 3, 1, 2]
    assert farthest(square[:2], 4).tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="3 points wanted of none"):
        farthest(square[:0], 3)
