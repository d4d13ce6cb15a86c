"""Rays walk as the published tracer's do: its worked numbers, and the compiled walk equal to the definition."""

import math

import pytest
import torch

from occflow_core.ops import cast, raycast, swept
from occflow_core.types import OCC3D

ROOT_HALF = math.sqrt(0.5)
STRAIGHT, DIAGONAL, SPACE = (1.5, 0.5, 0.5), (1.5, 1.5, 0.5), (1.5, 1.5, 1.5)


@pytest.fixture(params=["definition", "numba"])
def walk(request, monkeypatch):
    """Runs a test with each implementation."""
    if request.param == "numba":
        pytest.importorskip("numba", reason="the compiled walk needs numba: pip install numba")
    else:
        monkeypatch.setattr(raycast, "_numba", lambda: None)
    return request.param


def shoot(occupied, origin, end, shape=(4, 3, 2)):
    filled = torch.zeros(shape, dtype=torch.bool)
    if occupied:
        filled[occupied] = True
    origin, end = torch.tensor([origin], dtype=torch.float64), torch.tensor([end], dtype=torch.float64)
    distance, index = cast(filled, origin, end - origin)
    return filled, origin, end - origin, distance.item(), tuple(index[0].tolist())


@pytest.mark.parametrize(
    ("occupied", "origin", "end", "distance", "index"),
    [
        ((2, 0, 0), (0.5, 0.5, 0.5), STRAIGHT, 2.5, (2, 0, 0)),
        (None, (0.5, 0.5, 0.5), DIAGONAL, 5 * ROOT_HALF, (2, 2, 0)),
        ((0, 1, 0), (0.5, 0.5, 0.5), DIAGONAL, ROOT_HALF, (0, 1, 0)),  # the tie goes through y
        ((1, 0, 0), (0.5, 0.5, 0.5), DIAGONAL, 5 * ROOT_HALF, (2, 2, 0)),  # and not through x
        (None, (0.5, 0.5, 0.5), SPACE, 1.5 * math.sqrt(3), (1, 1, 1)),
        ((0, 0, 0), (0.5, 0.5, 0.5), STRAIGHT, 0.5, (0, 0, 0)),
        (None, (2.5, 0.5, 0.5), (1.5, 0.5, 0.5), 2.5, (0, 0, 0)),
        (None, (2.5, 0.5, 0.5), (-7.5, 0.5, 0.5), 2.5, (0, 0, 0)),
        ((0, 0, 0), (-2.5, 0.5, 0.5), (-1.5, 0.5, 0.5), 3.5, (0, 0, 0)),
        ((0, 0, 0), (0.5, -3.5, 0.5), (1.5, -3.5, 0.5), -1.0, (0, 0, 0)),  # never inside
        ((0, 0, 0), (0.5, -0.4, 0.5), (1.5, -0.4, 0.5), 0.5, (0, 0, 0)),  # cut toward zero
    ],
)
def test_the_worked_rays_of_the_published_tracer(walk, occupied, origin, end, distance, index):
    *_, got, voxel = shoot(occupied, origin, end)
    assert got == pytest.approx(distance, abs=1e-12) and voxel == index


@pytest.mark.parametrize(
    ("end", "path"),
    [
        (STRAIGHT, "000 100 200 300"),
        (DIAGONAL, "000 010 110 120 220"),  # both borders at once: y first
        (SPACE, "000 001 011 111"),  # all three at once: z, then y, then x
    ],
)
def test_the_voxels_of_a_ray_are_those_of_the_published_tracer(walk, end, path):
    origin = torch.full((1, 3), 0.5)
    crossed = swept(torch.zeros(4, 3, 2, dtype=torch.bool), origin, torch.tensor([end]) - origin)
    assert {"".join(map(str, v)) for v in crossed.nonzero().tolist()} == set(path.split())


@pytest.mark.parametrize(
    ("elevation", "azimuth", "label", "metres"),
    [
        (0, 0, 11, 3.697043), (0, 90, 11, 3.959796), (0, 180, 11, 3.656872), (1, 0, 11, 5.606046),
        (4, 0, 15, 9.600638), (9, 0, 15, 9.461154), (18, 0, 15, 9.414203), (38, 0, 15, 9.644558),
        (4, 45, 11, 12.691542), (18, 90, 17, 40.000011), (18, 180, 17, 40.985813), (38, 180, 17, 16.385509),
    ],
)  # fmt: skip
def test_a_road_and_a_wall_at_metre_scale(walk, elevation, azimuth, label, metres):
    """Occ3D's grid: the lowest layer a road, x index 125 a wall; a ray of the RayIoU metric from the LiDAR's place."""
    labels = torch.full((200, 200, 16), OCC3D.free)
    labels[:, :, 0], labels[125] = OCC3D.id("driveable_surface"), OCC3D.id("manmade")
    steep = [-(math.pi / 2 - math.atan(k + 1)) for k in range(10)]
    rise = steep + [steep[9] + (steep[9] - steep[8]) * (k + 1) for k in range(29)]
    e, a = rise[elevation], math.radians(azimuth)
    # as the published evaluators: float32 directions, float64 places, voxels of float32 0.4, all cut to float32 at last
    direction = torch.tensor([[math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)]])
    origin = torch.tensor([[0.9858, 0.0, 1.8402]], dtype=torch.float64)
    low, voxel = torch.tensor([-40.0, -40.0, -1.0]), torch.tensor([0.4, 0.4, 0.4])
    start, end = ((p - low).div(voxel).float().double() for p in (origin, origin + direction))
    distance, index = cast(labels != OCC3D.free, start, end - start)
    assert int(labels[tuple(index[0])]) == label
    assert distance.item() * 0.4 == pytest.approx(metres, abs=2e-5)


def random_rays(rays: int, shape, seed: int):
    """Origins inside and outside; a part of the directions along axes and diagonals, where ties are."""
    rng = torch.Generator().manual_seed(seed)
    size = torch.tensor(shape)
    origins = (torch.rand(rays, 3, generator=rng, dtype=torch.float64) * 2 - 0.5) * size
    directions = torch.randn(rays, 3, generator=rng, dtype=torch.float64)
    special = rays // 3
    origins[:special] = (origins[:special] * 2).round() / 2
    directions[:special] = torch.randint(-1, 2, (special, 3), generator=rng).double()
    directions[:special][directions[:special].abs().sum(1) == 0] = 1.0
    return origins, directions


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3])
def test_the_compiled_walk_equals_the_definition_on_every_ray(monkeypatch, density):
    pytest.importorskip("numba", reason="the compiled walk needs numba: pip install numba")
    shape = (40, 30, 12)
    filled = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density
    rays = random_rays(10_000, shape, seed=2)  # enough for several threads
    fast, fast_swept = cast(filled, *rays), swept(filled, *rays)
    monkeypatch.setattr(raycast, "_numba", lambda: None)
    slow, slow_swept = cast(filled, *rays), swept(filled, *rays)
    assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])
    assert torch.equal(fast_swept, slow_swept)
    assert 0.1 < (slow[0] < 0).double().mean() < 0.9, "some rays must miss the grid, and some must not"


def test_a_walk_ends_after_the_published_number_of_steps(walk):
    filled = torch.zeros(4, 1, 1, dtype=torch.bool)
    filled[0] = True
    for far, reaches in ((1000.5, True), (1001.5, False)):  # step 1001 is the first inside, or is not
        distance, _ = cast(filled, torch.tensor([[-far, 0.5, 0.5]]), torch.tensor([[1.0, 0.0, 0.0]]))
        assert (distance.item() > 0) == reaches, far


def test_swept_is_what_the_casts_voxels_end(walk):
    """A ray's last crossed voxel is where the cast says it was stopped."""
    filled = torch.rand(12, 9, 5, generator=torch.Generator().manual_seed(3)) < 0.1
    origins, directions = random_rays(40, filled.shape, seed=4)
    for origin, direction in zip(origins[:, None], directions[:, None], strict=True):
        distance, index = cast(filled, origin, direction)
        crossed = swept(filled, origin, direction)
        assert crossed.any() or distance.item() == -1.0
        if crossed.any():
            assert crossed[tuple(index[0])]
            stopped = filled[tuple(index[0])]
            assert (crossed & filled).sum() == stopped.sum(), "a ray crosses at most one filled voxel: its last"


def test_the_length_of_a_direction_means_nothing(walk):
    filled = torch.rand(12, 9, 5, generator=torch.Generator().manual_seed(5)) < 0.1
    origins, directions = random_rays(500, filled.shape, seed=6)
    first, second = cast(filled, origins, directions), cast(filled, origins, directions * 1024.0)
    assert torch.equal(first[1], second[1]) and torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("filled", "origins", "directions", "says"),
    [
        (torch.zeros(2, 2, 2), torch.zeros(1, 3), torch.ones(1, 3), "float32"),
        (torch.zeros(2, 2, dtype=torch.bool), torch.zeros(1, 3), torch.ones(1, 3), r"\(2, 2\)"),
        (torch.zeros(2, 2, 2, dtype=torch.bool), torch.zeros(2, 3), torch.ones(1, 3), r"\(2, 3\) and \(1, 3\)"),
        (torch.zeros(2, 2, 2, dtype=torch.bool), torch.zeros(1, 3), torch.zeros(1, 3), "longer than zero"),
        (torch.zeros(2, 2, 2, dtype=torch.bool), torch.full((1, 3), math.nan), torch.ones(1, 3), "finite"),
    ],
)
def test_rays_that_are_none_are_refused_by_what_came(filled, origins, directions, says):
    with pytest.raises(ValueError, match=says):
        cast(filled, origins, directions)


def test_no_rays_sweep_nothing(walk):
    nothing = torch.zeros(0, 3)
    filled = torch.ones(2, 2, 2, dtype=torch.bool)
    assert cast(filled, nothing, nothing)[0].shape == (0,) and not swept(filled, nothing, nothing).any()
