"""Which class a voxel gets, what is free and what nobody knows, what the cameras see."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from labels.tiny import FAR_AWAY, Thing, World, ring_of_cameras, street

from occflow_core.geometry import Grid
from occflow_core.labels import Keyframe, Rule, Settings, Sweep, label_keyframe
from occflow_core.labels import voxelise as room
from occflow_core.labels.aggregate import aggregate
from occflow_core.labels.voxelise import carve, vote, voxelise, winner
from occflow_core.types import OCC3D

CAR, ROAD, WALL, TREE, WALKER, CONE = (
    OCC3D.id(n) for n in ("car", "driveable_surface", "manmade", "vegetation", "pedestrian", "traffic_cone")
)
GRID = Grid((-4.0, -4.0, -1.0), (0.4, 0.4, 0.4), (20, 20, 10))
EYE = torch.eye(4, dtype=torch.float64)


def cloud_of(points, classes, lidar=(0.0, 0.0, 1.8), tracks=()):
    """One sweep, one keyframe: car, world and grid agree."""
    pose = EYE.clone()
    pose[:3, 3] = torch.tensor(lidar)
    own = torch.tensor(np.asarray(points) - lidar, dtype=torch.float32).reshape(-1, 3)
    sweep = Sweep(own, pose, EYE, 0, torch.tensor(np.asarray(classes), dtype=torch.uint8).reshape(-1))
    return aggregate([sweep], tracks, Settings(ego=((0, 0, 0), (0, 0, 0))))


def voxels(cloud, grid=GRID, rule=Rule(), cameras=None):  # noqa: B008
    return voxelise(cloud, Keyframe("k", 0, EYE, cameras), grid, rule)


def at(grid, *points):
    return tuple(grid.index(torch.tensor(np.array(points), dtype=torch.float64))[0].numpy().T)


def test_ids_are_counted_and_never_averaged():
    """A voxel with as many points of ids 11 and 15 is one of the two, not 13."""
    points = [[2.0 + 0.1 * i, 2.05, 0.5] for i in (0, 1, 2, 3)]
    for classes in ([ROAD, ROAD, WALL, WALL], [WALL, WALL, ROAD, ROAD]):
        labels = voxels(cloud_of(points, classes)).labels
        assert set(np.unique(labels)) <= {ROAD, WALL, OCC3D.free} and labels[at(GRID, [2.05, 2.05, 0.5])] == WALL


def test_a_vote_is_by_area_not_by_how_often_a_beam_came():
    often = [[2.05, 2.05, 0.45]] * 50
    wide = [[2.05 + 0.1 * i, 2.05, 0.55] for i in range(3)]
    labels = voxels(cloud_of(often + wide, [WALL] * 50 + [TREE] * 3)).labels
    assert labels[at(GRID, [2.1, 2.1, 0.5])] == TREE


def test_ties_go_to_objects_then_to_what_stands_then_to_ground():
    area = np.zeros((4, OCC3D.free))
    area[0, [ROAD, WALL, CONE]] = 2
    area[1, [ROAD, WALL]] = 2
    area[2, [ROAD, 12]] = 2
    area[3, ROAD], area[3, CONE] = 3, 2
    assert winner(area).tolist() == [CONE, WALL, ROAD, ROAD]


def test_points_outside_of_the_grid_are_in_no_voxel():
    points = [[4.01, 0, 0], [0.05, -4.3, 0.0], [1.6, 2.4, 3.001], [-4.5, 0.1, 0], [3.95, 3.95, 2.95]]
    labels = voxels(cloud_of(points, [WALL] * 5)).labels
    assert np.argwhere(labels != OCC3D.free).tolist() == [[19, 19, 9]]


def test_a_stray_point_of_a_neighbours_surface_fills_nothing_and_a_thin_thing_does():
    rng = np.random.default_rng(0)
    wall = np.stack([np.full(3000, 2.3), *rng.uniform(-3.9, 3.9, (1, 3000)), rng.uniform(0, 2.9, 3000)], 1)
    dense = np.concatenate([wall] + [wall + rng.normal(0, 0.005, wall.shape) for _ in range(9)])
    stray = [[2.42, 0.1, 1.1]]
    thin = [[-2.0, 2.0, 0.3]]
    seen = voxels(cloud_of([*dense, *stray, *thin], [WALL] * len(dense) + [WALL, CONE]), rule=Rule(least_share=0.05))
    assert seen.labels[at(GRID, stray[0])] == OCC3D.free
    assert seen.labels[at(GRID, thin[0])] == CONE


def test_in_front_of_a_wall_is_free_and_behind_it_nobody_knows():
    y, z = np.meshgrid(np.arange(-3.95, 4, 0.05), np.arange(-0.95, 3, 0.05))
    wall = np.stack([np.full(y.size, 1.83), y.ravel(), z.ravel()], 1)
    seen = voxels(cloud_of(wall, [WALL] * len(wall), lidar=(-3.5, 0.03, 1.0)))
    x = np.arange(20) * 0.4 - 3.8
    row = at(GRID, *[[v, 0.2, 1.2] for v in x])
    assert (seen.labels[row] == WALL).tolist() == [1.6 <= v < 2.0 for v in x]
    assert seen.mask_lidar[row].tolist() == [bool(-3.6 < v < 2.0) for v in x]
    assert not seen.mask_lidar[at(GRID, [-3.8, 3.8, 2.8])]  # beside the LiDAR, where no beam went


def test_a_voxel_that_beams_only_graze_is_not_called_free():
    """A road in the middle of its voxels, hit at -2 m and at 3.8 m: between, beams pass through the upper half."""
    ring = [[x, y, 0.03] for x in (-2.0, -1.9, 3.7, 3.8) for y in np.arange(-0.6, 0.6, 0.05)]
    seen = voxels(cloud_of(ring, [ROAD] * len(ring), lidar=(-3.9, 0.0, 0.9)))
    between = at(GRID, [2.7, 0.1, 0.0], [3.1, 0.1, 0.0])
    assert not seen.mask_lidar[between].any() and (seen.labels[between] == OCC3D.free).all()
    careless = voxels(cloud_of(ring, [ROAD] * len(ring), lidar=(-3.9, 0.0, 0.9)), rule=Rule(1, 0, 1, 1, -9.0))
    assert careless.mask_lidar[between].all()
    assert seen.mask_lidar[at(GRID, [-0.6, 0.1, 0.5])].all()  # clear above the road


def test_where_an_object_stands_now_beams_of_other_times_say_nothing():
    """A car drives off at 2 s: later beams sweep its place, but at 1 s its inside is not free."""
    car = Thing("car", (4.4, 1.8, 1.5), (10.0, 3.0, 1.01))
    world = World((car, Thing("manmade", (40, 1, 5), (10, 9, 2.5), annotated=False)), speed=0.0, columns=720)
    told = [world.sweep(t, True) for t in (0.0, 0.5)]
    gone = replace(world, things=world.things[1:])
    told += [gone.sweep(t, True) for t in (1.0, 1.5)]
    tracks = [t for t in world.tracks(0.5) if t.name == "car"]
    cloud = aggregate(told, tracks)
    inside = np.argwhere(np.ones((3, 3, 1))) * [0.4, 0.4, 0] + [9.5, 2.5, 1.0]
    with_car = label_keyframe(cloud, world.keyframe(0.0))
    index = at(with_car.grid, *inside)
    assert (with_car.occ3d.numpy()[index] == OCC3D.free).all() and not with_car.mask_lidar.numpy()[index].any()
    without = label_keyframe(cloud, world.keyframe(1.5))
    assert without.mask_lidar.numpy()[index].all() and not (without.occ3d == CAR).any()


@pytest.fixture(scope="module")
def drive():
    """Two seconds of the street: cloud and world."""
    world = replace(street(), columns=720)
    return world, aggregate(world.sweeps(2.0), world.tracks(2.0))


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_labels_are_what_stands_there(drive, t):
    world, cloud = drive
    label = label_keyframe(cloud, world.keyframe(t, ring_of_cameras()))
    true, flow = world.truth(t)
    ours, mask = label.occ3d.numpy(), label.mask_lidar.numpy()
    filled, truly = (ours != OCC3D.free) & mask, (true != OCC3D.free) & mask
    assert (filled & truly).sum() / (filled | truly).sum() > 0.97
    for kind, least in ((CAR, 0.9), (OCC3D.id("truck"), 0.85), (WALKER, 0.6)):
        hit, either = (ours == kind) & (true == kind), (ours == kind) | (true == kind)
        assert (hit & mask).sum() / (either & mask).sum() > least, kind
    both = mask & (ours == true) & np.isin(ours, OCC3D.moving_ids)
    error = np.linalg.norm(label.flow.numpy() - flow, axis=-1)[both]
    assert both.sum() > 200 and error.mean() < 0.05 and np.isfinite(error).all()
    assert (label.flow.numpy()[~np.isin(ours, OCC3D.moving_ids)] == 0).all()


def test_cameras_see_what_is_before_walls_and_no_more_than_the_lidar_knows(drive):
    world, cloud = drive
    label = label_keyframe(cloud, world.keyframe(1.0, ring_of_cameras()))
    lidar, camera = label.mask_lidar.numpy(), label.mask_camera.numpy()
    assert camera.sum() > 20_000 and not (camera & ~lidar).any()
    centres = label.grid.centres().numpy() + world.car(1.0)[:3, 3]
    hidden = (np.abs(centres[..., 0] - 15) < 10) & (centres[..., 1] > 17) & (centres[..., 2] < 3)
    assert hidden.sum() > 1000 and not camera[hidden].any()
    without = label_keyframe(cloud, world.keyframe(1.0))
    assert not without.mask_camera.any() and np.array_equal(without.mask_lidar.numpy(), lidar)
    used = torch.zeros(6, dtype=torch.bool)
    blind = label_keyframe(cloud, replace(world.keyframe(1.0, ring_of_cameras()), used=used))
    assert not blind.mask_camera.any()


def test_a_keyframe_far_from_all_sweeps_knows_nothing(drive):
    world, cloud = drive
    pose = EYE.clone()
    pose[:3, 3] = torch.tensor(FAR_AWAY) + 5000
    label = label_keyframe(cloud, Keyframe("far", 0, pose, ring_of_cameras()))
    assert (label.occ3d == OCC3D.free).all() and not label.mask_lidar.any() and not label.mask_camera.any()


# ---- the compiled loops equal their definitions


@pytest.fixture
def both(monkeypatch):
    def call(work):
        fast = work()
        with monkeypatch.context() as patch:
            patch.setattr(room, "_numba", lambda: None)
            return fast, work()

    return call


def matrix(rng):
    out = np.eye(4)
    out[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * 2
    out[:3, 3] = rng.uniform(3, 8, 3)
    return out


def test_compiled_votes_equal_the_definition(both):
    rng = np.random.default_rng(5)
    shape, turn = (12, 10, 8), matrix(rng)
    points = rng.uniform(-6, 6, (5000, 3)).astype(np.float32)
    classes = rng.choice([ROAD, WALL, TREE], 5000).astype(np.uint8)
    when = rng.choice([-1, 0, 3], 5000).astype(np.int32)
    owner = rng.choice([-1, -1, 2], tuple(2 * n for n in shape)).astype(np.int32)

    def work():
        bits, hits = np.zeros((960, OCC3D.free), np.uint64), np.zeros(960, np.uint32)
        vote(points, classes, when, 3, turn, shape, owner, bits, hits)
        return bits, hits

    fast, plain = both(work)
    assert np.array_equal(fast[0], plain[0]) and np.array_equal(fast[1], plain[1]) and fast[1].sum() > 100


def test_compiled_rays_equal_the_definition(both):
    rng = np.random.default_rng(6)
    turn = matrix(rng)
    starts, ends = rng.uniform(-9, 9, (2, 400, 3))

    def work():
        free = np.zeros((14, 11, 9), bool)
        carve(starts, ends, turn, free)
        carve(np.zeros((1, 3)), ends, turn, free)
        return free

    fast, plain = both(work)
    assert np.array_equal(fast, plain) and 100 < fast.sum() < fast.size
