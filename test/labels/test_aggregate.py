"""What becomes of points: the world stands, objects travel with their boxes, nothing leaves a trail."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from labels.tiny import FAR_AWAY, Thing, World, away, stamp, street

from occflow_core.labels import UNLABELLED, Settings, Sweep
from occflow_core.labels import aggregate as room
from occflow_core.labels.aggregate import ALWAYS, IS_GROUND, aggregate, crossings, filled, inside, nearest, surroundings
from occflow_core.types import OCC3D

CAR, ROAD, WALK, WALL = (OCC3D.id(n) for n in ("car", "driveable_surface", "sidewalk", "manmade"))


@pytest.fixture(scope="module")
def moving():
    """A car that overtakes, from 2 s, with keyframes labelled."""
    world = replace(street(), columns=360)
    return world, aggregate(world.sweeps(2.0), world.tracks(2.0))


def test_points_of_a_moving_object_lie_on_its_surface(moving):
    world, cloud = moving
    for thing in cloud.objects:
        assert len(thing.points) > 50
        out = np.abs(thing.points) - np.array(thing.track.size) / 2
        assert np.abs(out.max(1)).max() < 0.03  # nothing else came along, nothing is smeared


def test_a_moving_object_leaves_no_trail(moving):
    world, cloud = moving
    places = cloud.points + cloud.origin - FAR_AWAY
    over_road = (np.abs(places[:, 1]) < 4.8) & (places[:, 2] > 0.1) & (cloud.when == ALWAYS)
    assert not over_road.any()


def test_the_world_has_its_own_classes(moving):
    world, cloud = moving
    places, always = cloud.points + cloud.origin - FAR_AWAY, cloud.when == ALWAYS
    ground = IS_GROUND[cloud.classes]
    assert np.abs(places[ground, 2]).max() < 0.12  # an unlabelled foot of a wall may pass for ground, no more
    clear = ground & (np.abs(np.abs(places[:, 1]) - 5.0) > 0.5)
    right = np.where(np.abs(places[:, 1]) < 5.0, ROAD, WALK) == cloud.classes
    assert right[clear].mean() > 0.999
    assert (cloud.classes[always & (places[:, 2] > 0.6)] != ROAD).all()


def test_the_order_of_sweeps_does_not_matter():
    world = replace(street(), columns=90)
    told, tracks = list(world.sweeps(1.0)), world.tracks(1.0)
    one, two = aggregate(told, tracks), aggregate(told[:1] + told[:0:-1], tracks)
    for name in ("stamps", "eyes", "ends", "points", "classes", "when"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name


def test_ground_below_an_object_stays_ground():
    """Points on the road under a car, in its box: their label says so, and in a sweep without labels their height."""
    eye = torch.eye(4, dtype=torch.float64)
    car = World((Thing("car", (4.0, 2.0, 1.6), (10.0, 3.0, 0.8)),)).tracks(0.5)[0]
    car = replace(car, world_from_box=car.world_from_box - torch.tensor(away(0 * np.eye(4))))
    x, y = (v.ravel() for v in np.meshgrid(np.arange(6, 14, 0.2), np.arange(1, 5, 0.2)))
    road = np.stack([x, y, 0.01 * np.sin(x)], 1)
    body = np.stack([x, y, 0 * x + 1.2], 1)[(np.abs(x - 10) < 1.9) & (np.abs(y - 3) < 0.9)]
    points = torch.tensor(np.concatenate([road, body]), dtype=torch.float32)
    labels = torch.tensor([ROAD] * len(road) + [CAR] * len(body), dtype=torch.uint8)
    told = [Sweep(points, eye, eye, stamp(0.0), labels), Sweep(points, eye, eye, stamp(0.1))]
    cloud = aggregate(told, [car], Settings(ego=((0, 0, 0), (0, 0, 0)), gap=0.0))
    assert len(cloud.objects[0].points) == 2 * len(body) and (cloud.objects[0].points[:, 2] > 0).all()
    assert len(cloud.points) == 2 * len(road) and (cloud.classes == ROAD).all()


def test_a_mover_that_nobody_annotated_is_there_at_its_own_instant_only():
    ghost = Thing("car", (4.5, 1.8, 1.5), (12.0, 3.0, 0.95), speed=8.0, annotated=False)
    world = World((ghost,), speed=0.0, columns=360)
    cloud = aggregate(world.sweeps(1.0), [])
    cars = cloud.classes == CAR
    assert cars.any() and (cloud.when[cars] != ALWAYS).all()
    places = cloud.points + cloud.origin - FAR_AWAY
    for s in np.unique(cloud.when[cars]):
        t = (cloud.stamps[s] - cloud.stamps[0]) / 1e9
        mine = places[cars & (cloud.when == s), 0] - ghost.pose(t)[0, 3]
        assert np.abs(mine).max() < 4.5 / 2 + 0.02
    stays = (cloud.when == ALWAYS) & (places[:, 2] > 0.25)
    assert not stays.any()


def test_the_car_itself_and_what_is_no_number_vanish():
    eye = torch.eye(4, dtype=torch.float64)
    points = torch.tensor([[0.5, 0, 1.0], [torch.nan, 1, 1], [5, 0, 1], [500, 0, 1], [6, 0, 1]])
    points = torch.cat([points, torch.zeros(5, 2)], 1)
    labels = torch.tensor([WALL, WALL, WALL, WALL, UNLABELLED], dtype=torch.uint8)
    cloud = aggregate([Sweep(points, eye, eye, 1, labels)], [])
    assert len(cloud.ends) == 1 and np.allclose(cloud.points, [[5, 0, 1]])


def test_a_label_of_its_own_kind_saves_a_point_just_outside_a_box():
    """Boxes are often a little small: the ring belongs to the object if the label says so, and to nobody else."""
    world = World((Thing("car", (4.4, 1.8, 1.5), (12.0, 3.0, 0.95)),), columns=720)
    tight = [replace(t, size=(4.1, 1.4, 1.3)) for t in world.tracks(0.5)]
    cloud = aggregate([world.sweep(0.0, True), world.sweep(0.1, False)], tight)
    cars = cloud.classes == CAR
    assert not cars.any() and (cloud.points[cloud.classes == WALL] == 0).all()
    _, classes, _ = world.hits(0.0)
    assert len(cloud.objects[0].points) >= (classes == CAR).sum()
    places = cloud.points + cloud.origin - FAR_AWAY
    assert not ((np.abs(places - [12, 3, 0.95]) < [2.2, 0.9, 0.7]).all(1) & (places[:, 2] > 0.25)).any()


def test_holes_in_the_ground_are_filled_where_ground_is_on_both_sides():
    height = np.full((40, 20), np.nan)
    height[:5], height[9:14], height[30:] = 0.0, 0.1, 0.1
    kind = np.full((40, 20), ROAD, np.uint8)
    kind[9:] = WALK
    points, kinds = filled(np.array([10.0, 0.0]), height, kind, Settings(cell=0.2, gap=1.6))
    cells = np.unique(((points[:, 0] - 10.0) / 0.2).astype(int))
    assert cells.tolist() == [5, 6, 7, 8]  # 0.8 m wide; the other hole, 3.2 m, stays open
    assert (points[:, 2] >= 0).all() and (points[:, 2] <= 0.1).all()
    assert set(kinds[points[:, 0] < 11.3]) == {ROAD} and set(kinds[points[:, 0] > 11.5]) == {WALK}
    steep = np.where(height == 0.1, 1.0, height)
    assert not len(filled(np.zeros(2), steep, kind, Settings(cell=0.2, gap=1.6))[0])


def test_the_height_of_the_ground_is_guessed_near_ground_and_kept_where_known():
    height = np.full((128, 20), np.nan)
    height[:10] = 1.0
    height[20:24] = 2.0
    guess = surroundings(height, 16)
    assert np.array_equal(guess[~np.isnan(height)], height[~np.isnan(height)])
    assert ((guess[10:20] >= 1) & (guess[10:20] <= 2)).all() and np.isnan(guess[70:]).all()


def test_without_any_labels_ground_is_told_from_the_rest_by_height():
    world = World(street().things, columns=360)
    cloud = aggregate(world.sweeps(1.0, labels=False), world.tracks(1.0))
    places = cloud.points + cloud.origin - FAR_AWAY
    assert set(np.unique(cloud.classes)) == {ROAD, WALL}
    assert (np.abs(places[cloud.classes == ROAD, 2]) < 0.25).mean() > 0.99
    assert (places[cloud.classes == WALL, 2] > 0.1).all() and (cloud.classes == WALL).sum() > 1000
    assert all(len(thing.points) for thing in cloud.objects)


def test_a_scene_needs_a_sweep_but_not_points_tracks_or_labels():
    with pytest.raises(ValueError, match="at least one LiDAR sweep"):
        aggregate([], [])
    eye = torch.eye(4, dtype=torch.float64)
    for labels in (None, torch.empty(0, dtype=torch.uint8)):
        cloud = aggregate([Sweep(torch.empty(0, 5), eye, eye, 1, labels)], street().tracks(1.0))
        assert not len(cloud.points) and not len(cloud.ends)
    one = Sweep(torch.tensor([[5.0, 0, 0, 0, 0]]), eye, eye, 1)
    assert len(aggregate([one], []).ends) == 1


# ---- the compiled loops equal their definitions


@pytest.fixture
def both(monkeypatch):
    """Calls a function with and without the compiled loops."""

    def call(work):
        fast = work()
        with monkeypatch.context() as patch:
            patch.setattr(room, "_numba", lambda: None)
            return fast, work()

    return call


def test_compiled_boxes_equal_the_definition(both):
    rng = np.random.default_rng(1)
    things = [Thing("car", tuple(rng.uniform(1, 6, 3)), tuple(rng.uniform(-8, 8, 3)), float(m)) for m in range(9)]
    poses = np.stack([np.linalg.inv(t.pose(0.0)) for t in things])
    half = np.array([t.size for t in things]) / 2
    points = rng.uniform(-12, 12, (3000, 3)).astype(np.float32)
    wanted = rng.choice([CAR, WALL, UNLABELLED], 3000).astype(np.uint8)
    kinds = rng.choice([CAR, 7], 9).astype(np.uint8)
    fast, plain = both(lambda: inside(points, wanted, poses, half, kinds, 0.1, 0.5))
    assert np.array_equal(fast[0], plain[0]) and (fast[0] >= 0).sum() > 100 and (fast[0] < 0).sum() > 100
    assert np.allclose(fast[1], plain[1], atol=1e-5)


def test_compiled_neighbours_equal_the_definition(both):
    rng = np.random.default_rng(2)
    refs = rng.uniform(0, 4, (700, 3)).astype(np.float32)
    kinds = rng.choice([ROAD, WALL], 700).astype(np.uint8)
    points = rng.uniform(-1, 5, (900, 3)).astype(np.float32)
    limit = rng.choice([0.0, 0.2, 0.5], 900).astype(np.float32)
    fast, plain = both(lambda: nearest(points, limit, refs, kinds))
    assert np.array_equal(fast, plain) and len(set(fast)) == 3
    assert (fast[limit == 0] == UNLABELLED).all()


def test_compiled_filling_equals_the_definition(both):
    rng = np.random.default_rng(3)
    height = np.where(rng.random((50, 40)) < 0.15, rng.uniform(0, 0.3, (50, 40)), np.nan)
    kind = rng.choice([ROAD, WALK], (50, 40)).astype(np.uint8)
    fast, plain = both(lambda: filled(np.zeros(2), height, kind, Settings()))
    assert np.allclose(fast[0], plain[0]) and np.array_equal(fast[1], plain[1]) and len(fast[0]) > 100


def test_compiled_crossings_equal_the_definition(both):
    rng = np.random.default_rng(4)
    ends = rng.uniform(-9, 9, (2000, 3)).astype(np.float32)
    ends[:3] = [[5, 0, 0], [-5, 0, 0], [0.5, 0, 0]]  # along an axis, away from it, and ending inside
    pose = np.linalg.inv(Thing("car", (4, 2, 2), (3.0, 0.2, 0.1)).pose(0.0))[None]
    fast, plain = both(lambda: crossings(ends, np.zeros(3), pose, np.array([[2.0, 1.0, 1.0]])))
    assert all(np.allclose(a, b) for a, b in zip(fast, plain)) and len(fast[0]) > 50
    assert (fast[1] < fast[2]).all() and (fast[2] <= 1).all() and 1 not in fast[0]
