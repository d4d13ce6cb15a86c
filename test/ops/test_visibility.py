"""Observed means: a ray of a used camera of this set came here before it met anything."""

import math

import pytest
import torch

from occflow_core.geometry import OCC3D_GRID, Cameras, Grid, rigid
from occflow_core.ops import observed, raycast

GRID = Grid((-8.0, -6.0, -1.0), (0.4, 0.4, 0.4), (40, 30, 12))


def camera(yaw: float, place=(0.3, 0.1, 0.9), pitch=0.0, focal=60.0, height=72, width=128) -> Cameras:
    """One camera of the car; yaw (counter-clockwise from ahead) and pitch (down) in degrees."""
    yaw, pitch = math.radians(yaw), math.radians(pitch)
    turn = torch.tensor(
        [[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]], dtype=torch.float64
    )
    dip = torch.tensor(
        [[math.cos(pitch), 0, math.sin(pitch)], [0, 1, 0], [-math.sin(pitch), 0, math.cos(pitch)]], dtype=torch.float64
    )
    pose = torch.eye(4, dtype=torch.float64)
    body_from_optical = torch.tensor([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], dtype=torch.float64)
    pose[:3, :3] = turn @ dip @ body_from_optical
    pose[:3, 3] = torch.tensor(place)
    k = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64)
    return Cameras(k[None], pose[None], height, width)


def together(*cameras: Cameras) -> Cameras:
    first = cameras[0]
    return Cameras(
        torch.cat([c.pixels_from_camera for c in cameras]),
        torch.cat([c.car_from_camera for c in cameras]),
        first.height,
        first.width,
    )


RING = together(*(camera(60.0 * i, place=(math.cos(i), math.sin(i) * 0.5, 1.0)) for i in range(6)))
ALL = torch.ones(6, dtype=torch.bool)


def clutter(density: float, seed: int = 0, grid: Grid = GRID) -> torch.Tensor:
    return torch.rand(grid.shape, generator=torch.Generator().manual_seed(seed)) < density


def seen(cameras: Cameras, grid: Grid = GRID) -> torch.Tensor:
    return cameras.sees(grid.centres(torch.float64).reshape(-1, 3)).any(0).reshape(grid.shape)


def corners_seen(cameras: Cameras, grid: Grid = GRID) -> tuple[torch.Tensor, torch.Tensor]:
    """Voxels that some picture may touch (not wholly behind one edge of it), and those wholly in one, (X, Y, Z)."""
    eight = torch.tensor([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)]) * 0.4
    points = (grid.centres(torch.float64)[..., None, :] + eight).reshape(-1, 3)
    touched, whole = torch.zeros(2, *grid.shape, dtype=torch.bool)
    for matrix in cameras.pixels_from_car():
        x, y, depth = (points @ matrix[:, :3].mT + matrix[:, 3]).reshape(*grid.shape, 8, 3).unbind(-1)
        edges = torch.stack([x, cameras.width * depth - x, y, cameras.height * depth - y, depth])
        touched |= (edges > 0).any(-1).all(0)
        whole |= (edges > 0).all(-1).all(0)
    return touched, whole


@pytest.mark.parametrize(
    "place",
    [(0.3, 0.1, 0.9), (0.2, 0.2, 0.2), (7.9, 5.9, 3.7), (-11.0, 1.0, 1.0), (3.0, 2.0, 9.0), (1.0, -9.0, 0.5)],
    ids=["inside", "in a voxel's middle", "in the corner", "behind", "above", "beside"],
)
def test_in_an_empty_grid_all_that_is_seen_is_observed(place):
    rng = torch.Generator().manual_seed(7)
    for _ in range(6):
        yaw, pitch, focal = torch.rand(3, generator=rng).tolist()
        one = camera(yaw * 360, place, pitch * 120 - 60, 30 + 300 * focal)
        got = observed(clutter(0.0), GRID, one, ALL[:1])
        missed = seen(one) & ~got
        assert not missed.any(), f"{missed.sum()} of {seen(one).sum()} missed at {yaw=} {pitch=} {focal=}"
        beyond = got & ~corners_seen(one)[0]
        assert not beyond.any(), f"{beyond.sum()} voxels observed that no pixel looks at"


def test_long_and_flat_voxels_are_no_different():
    grid = Grid((-8.0, -6.0, -1.0), (0.8, 0.5, 0.2), (20, 24, 24))
    got = observed(torch.zeros(grid.shape, dtype=torch.bool), grid, RING, ALL)
    assert not (seen(RING, grid) & ~got).any()


def test_more_things_never_show_more():
    sparse = clutter(0.01)
    for seed in range(1, 4):
        fuller = sparse | clutter(0.02, seed)
        before, after = observed(sparse, GRID, RING, ALL), observed(fuller, GRID, RING, ALL)
        assert not (after & ~before).any() and (before & ~after).any()
        sparse = fuller


def test_a_wall_is_observed_and_hides_what_is_behind():
    filled = clutter(0.0)
    filled[30] = True  # x = 4.0 to 4.4 m, the camera at 0.3 m looks ahead
    got = observed(filled, GRID, camera(0.0), ALL[:1])
    whole = corners_seen(camera(0.0))[1]
    assert whole[30].sum() > 50 and (got | ~whole)[:31].all() and not got[31:].any()


def test_together_the_cameras_observe_what_each_observes_alone():
    filled = clutter(0.02)
    alone = torch.stack([observed(filled, GRID, RING, torch.arange(6) == i) for i in range(6)])
    assert torch.equal(observed(filled, GRID, RING, ALL), alone.any(0))
    dead = ALL.clone()
    dead[2] = False
    got = observed(filled, GRID, RING, dead)
    exclusive = alone[2] & ~alone[[0, 1, 3, 4, 5]].any(0)
    assert exclusive.any() and not got[exclusive].any(), "what only the dead camera could see is unobserved"


def test_without_a_used_camera_nothing_is_observed():
    assert not observed(clutter(0.1), GRID, RING, ~ALL).any()


def test_a_voxel_around_the_lens_does_not_blind_the_camera():
    filled = clutter(0.0)
    index, inside = GRID.index(RING.car_from_camera[:, :3, 3])
    assert inside.all()
    filled[index.unbind(1)] = True
    free = observed(clutter(0.0), GRID, RING[:1], ALL[:1])
    filled[tuple(index[0])] = False
    without = observed(filled, GRID, RING[:1], ALL[:1])
    filled[tuple(index[0])] = True
    assert torch.equal(observed(filled, GRID, RING[:1], ALL[:1]), without) and without.sum() > free.sum() // 2


@pytest.mark.parametrize("density", [0.0, 0.02])
def test_the_compiled_twin_gives_the_same_mask(monkeypatch, density):
    pytest.importorskip("numba", reason="the compiled twin needs numba: pip install numba")
    filled = clutter(density)
    views = [RING, *(camera(yaw, place, 10.0) for yaw, place in ((20, (-11.0, 1.0, 1.0)), (200, (0.2, 0.2, 9.0))))]
    fast = [observed(filled, GRID, view, ALL[: len(view)]) for view in views]
    monkeypatch.setattr(raycast, "_numba", lambda: None)
    for view, mask in zip(views, fast):
        assert torch.equal(observed(filled, GRID, view, ALL[: len(view)]), mask)


def test_cameras_told_in_float32_observe_what_they_see():
    got = observed(torch.zeros(OCC3D_GRID.shape, dtype=torch.bool), OCC3D_GRID, RING.to(torch.float32), ALL)
    assert not (seen(RING, OCC3D_GRID) & ~got).double().mean() > 1e-6


def test_the_frame_of_the_cameras_is_the_frame_of_the_grid():
    """A camera that looks left observes the left: y grows to the left in the car frame."""
    got = observed(clutter(0.0), GRID, camera(90.0), ALL[:1])
    assert got[20, 25:].any() and not got[20, :14].any()
    turned = camera(0.0).moved(rigid.from_quaternion([math.sqrt(0.5), 0, 0, math.sqrt(0.5)], [0, 0, 0]))
    left = observed(clutter(0.0), GRID, turned, ALL[:1])
    assert left[20, 25:].any() and not left[20, :14].any()


def test_masks_and_grids_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"\(40, 30, 12\) bool"):
        observed(torch.zeros(4, 4, 4, dtype=torch.bool), GRID, RING, ALL)
    with pytest.raises(ValueError, match=r"used \(N,\)"):
        observed(clutter(0.0), GRID, RING, ALL[:3])
