"""The world's truth, read back through `data.nuscenes`, is the generator's own: every number of every kind."""

import numpy as np
import pytest
import torch
from data.world.small import KEYFRAMES, SIZE, Triangles, distance

pytest.importorskip("embreex", reason="the synthetic world needs Embree (pip install embreex)")

from occflow_core.data.nuscenes import CAMERAS, LIDAR, Box, NuScenes, class_of
from occflow_core.data.world import scene, truth
from occflow_core.geometry import rigid
from occflow_core.types import OCC3D, OPENOCC

pytestmark = pytest.mark.timeout(300)  # the first one makes the world, and compiles what makes it
SCENE = "scene-0000"
HALF_A_PIXEL = 0.5 * SIZE[1] / 1600  # of nuScenes' own pictures


@pytest.fixture(scope="module")
def reader(folder) -> NuScenes:
    return NuScenes(folder, progress=False)


@pytest.fixture(scope="module")
def shots(world) -> list[truth.Shot]:
    """The generator's sweeps of the keyframes."""
    return [world.sweep(k / scene.KEYFRAMES) for k in range(KEYFRAMES)]


def seconds(stamp: int) -> float:
    """ns of the tables -> s after the first keyframe, as the generator counts."""
    assert stamp % 1000 == 0
    return (stamp // 1000 - scene.BEGIN) / scene.MICRO


def applied(motion: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ motion[:3, :3].T + motion[:3, 3]


def everybody(world):
    return [*world.traffic.actors, *world.scenery.things]


def by_thing(world, boxes, time) -> dict[int, Box]:
    """Boxes by the number (in `everybody`) of the one thing whose box has the same middle."""
    middles = np.array([applied(a.world_from_actor(time), np.array(a.model.middle)) for a in everybody(world)])
    found = {}
    for box in boxes:
        near = np.linalg.norm(middles - box.world_from_box[:3, 3].numpy(), axis=1)
        assert (near < 1e-6).sum() == 1, (box.name, np.sort(near)[:2])
        found[int(near.argmin())] = box
    assert len(found) == len(boxes), "one box a thing"
    return found


def speed(actor, time) -> np.ndarray:
    """(3,) m/s of the middle of an actor's box, over ground."""
    before, after = (applied(actor.world_from_actor(time + d), np.array(actor.model.middle)) for d in (-0.01, 0.01))
    return (after - before) / 0.02


def test_the_world_that_is_read_back_has_a_turn_and_traffic_in_sight(world, shots):
    """Without them the laws below would say little."""
    ahead = [world.traffic.world_from_car(k / scene.KEYFRAMES)[:3, 0] for k in (0, KEYFRAMES - 1)]
    assert np.degrees(np.arccos(ahead[0] @ ahead[1])) > 20
    met = {shot.who[n] for shot in shots for n in np.unique(shot.sweep.actor[shot.sweep.actor >= 0])}
    fast = [world.traffic.actors[n] for n in met if np.linalg.norm(speed(world.traffic.actors[n], 1.0)) > 2]
    assert {"car", "truck", "bicycle"} <= {actor.model.kind for actor in fast}


def test_stamps_and_poses_are_those_of_the_drive(world, reader):
    moments = reader.moments(SCENE)
    assert len(moments) == 1 + (KEYFRAMES - 1) * 6 and sum(m.sample is not None for m in moments) == KEYFRAMES
    assert [seconds(m.stamp) for m in reader.keyframes(SCENE)] == [k / 2 for k in range(KEYFRAMES)]
    for channel in (*CAMERAS, LIDAR):
        rate = 20 if channel == LIDAR else 12
        delay = 0 if channel == LIDAR else world.plan.rig.delays[world.plan.rig.names.index(channel)] / 1e6
        for k, row in enumerate(reader.sweeps(SCENE, channel)):
            data = reader.data(row)
            assert abs(seconds(data.stamp) - (k / rate + delay)) < 1e-6
            wanted = world.traffic.world_from_car(k / rate + delay)
            assert np.allclose(data.world_from_car.numpy(), wanted, rtol=0, atol=1e-8)


def test_labels_flow_and_both_masks_are_the_generator_s(world, reader, shots):
    names = np.array([*OCC3D.names, "free"])
    for k, sample in enumerate(reader.samples(SCENE)):
        time = k / scene.KEYFRAMES
        car, poses = world.traffic.world_from_car(time), world.traffic.poses(time)
        semantics, flow = truth.occupancy(world.tracer, world.traffic, time, car)
        lidar, camera = truth.masks(semantics, shots, time, poses, car, world.cameras(time))
        occ3d, openocc = reader.occupancy(sample, "occ3d"), reader.occupancy(sample, "openocc")
        assert occ3d.classes is OCC3D and openocc.classes is OPENOCC and occ3d.flow is None
        assert np.array_equal(occ3d.labels, semantics)
        assert np.array_equal(occ3d.seen, camera > 0)
        assert np.array_equal(reader.occupancy(sample, "occ3d", seen_by="lidar").seen, lidar > 0)
        told = names[semantics]
        told[told == "others"] = "free"  # OpenOcc has no such class
        assert np.array_equal(np.array([*OPENOCC.names, "free"])[openocc.labels], told)
        assert np.array_equal(openocc.flow, flow) and openocc.seen.all()
        moving = np.linalg.norm(flow, axis=-1) > 1
        assert moving.sum() > 20 and (camera > 0).sum() > 5_000 and (lidar > 0).sum() > (camera > 0).sum()


def test_boxes_have_the_place_the_size_the_velocity_and_the_name_of_the_things(world, reader, shots):
    kept: dict[str, int] = {}  # instance -> number of the thing
    fast = 0
    found = [by_thing(world, reader.boxes(s), k / 2) for k, s in enumerate(reader.samples(SCENE))]
    for k, boxes in enumerate(found):
        time, sweep, who = k / scene.KEYFRAMES, shots[k].sweep, shots[k].who
        points = np.zeros(len(everybody(world)), int)
        np.add.at(points, np.array(who, int)[sweep.actor[sweep.actor >= 0]], 1)
        standing = world.tracer.instance[sweep.face[sweep.actor < 0]]
        np.add.at(points, standing[standing >= 0] + len(world.traffic.actors), 1)
        car = world.traffic.world_from_car(time)
        for number, thing in enumerate(everybody(world)):
            pose = thing.world_from_actor(time)
            if points[number] and np.linalg.norm((pose - car)[:2, 3]) < 75:
                assert number in boxes, (thing.model.name, points[number])
        for number, box in boxes.items():
            thing = everybody(world)[number]
            assert kept.setdefault(box.instance, number) == number
            assert box.name == thing.model.category and box.size == pytest.approx(thing.model.size, abs=1e-12)
            turn = thing.world_from_actor(time)[:3, :3]
            assert np.allclose(box.world_from_box[:3, :3].numpy(), turn, rtol=0, atol=1e-8)
            assert box.lidar_points == points[number]
            assert box.attributes == tuple(filter(None, [thing.attribute(time)]))
            # nuScenes' rule: from the keyframe before to the one after, as far as they have the thing
            ends = [j if 0 <= j < KEYFRAMES and number in found[j] else k for j in (k - 1, k + 1)]
            if ends[0] == ends[1]:
                assert torch.isnan(box.velocity).all()
                continue
            middle = np.array(thing.model.middle)
            way = np.subtract(*(applied(thing.world_from_actor(j / 2), middle) for j in reversed(ends)))
            assert np.allclose(box.velocity.numpy(), way / ((ends[1] - ends[0]) / 2), rtol=0, atol=1e-6)
            if ends == [k - 1, k + 1]:  # over one second that is nearly its speed
                assert np.linalg.norm(box.velocity.numpy() - speed(thing, time)) < 0.8
                fast += np.linalg.norm(box.velocity.numpy()) > 3
    assert len(set(kept.values())) == len(kept) > 30 and fast >= 4


def test_instances_are_the_things_that_fill_the_voxels(world, reader):
    """By their boxes: what cameras see has all of them, a voxel that one thing alone reaches into is its own, and an
    instance is of one class."""
    shares, right = {}, []
    for k, sample in enumerate(reader.samples(SCENE)):
        time = k / scene.KEYFRAMES
        car_from_world = np.linalg.inv(world.traffic.world_from_car(time))
        boxes = reader.boxes(sample)
        place = {number: 1 + boxes.index(box) for number, box in by_thing(world, boxes, time).items()}
        for kind in ("occ3d", "openocc"):
            truth = reader.occupancy(sample, kind, instances=True)
            ids, kinds = truth.instances, torch.tensor(truth.classes.moving_ids)
            moving = torch.isin(truth.labels, kinds)
            assert not ids[~moving].any()
            assert all(len(truth.labels[ids == i].unique()) == 1 for i in ids.unique() if i)
            for what, where in (("all", moving), ("seen", moving & truth.seen)):
                shares.setdefault((kind, what), []).append((ids[where] > 0).float().mean().item())
        assert len(ids.unique()) > 10
        reached: dict[tuple, set[int]] = {}  # voxel -> those with a corner of a face in it
        for number, actor in enumerate(world.traffic.actors):
            pose = car_from_world @ actor.world_from_actor(time)
            index, inside = truth.grid.index(
                torch.from_numpy(applied(pose, world.tracer.shape(actor, time)[1].vertices))
            )
            for voxel in index[inside].tolist():
                reached.setdefault(tuple(voxel), set()).add(number)
        for voxel, numbers in reached.items():
            number = min(numbers)
            kind = class_of(everybody(world)[number].model.category, truth.classes)
            if len(numbers) == 1 and number in place and truth.labels[voxel] == kind:
                right.append(int(ids[voxel]) == place[number])
    # the rest is of things that no sweep met: as in nuScenes, they have no box
    assert min(shares["occ3d", "seen"]) == 1.0 and min(shares["openocc", "all"]) > 0.9
    # the other half per cent: voxels that another thing's face crosses without a corner
    assert np.mean(right) > 0.995 and len(right) > 1000


def test_lidarseg_says_what_the_rays_met(world, reader, shots):
    for k, sample in enumerate(reader.samples(SCENE)):
        sweep = shots[k].sweep
        names = np.array([reader.category_names[i] for i in range(len(reader.category_names))])
        told = names[reader.lidarseg(sample).numpy()]
        assert np.array_equal(reader.points(reader.keyframe(sample).reference), sweep.points)
        kinds = np.array([class_of(name, OCC3D) for name in told])
        assert np.array_equal(kinds, world.tracer.classes[sweep.face])
        for n in np.unique(sweep.actor[sweep.actor >= 0]):
            assert set(told[sweep.actor == n]) == {world.traffic.actors[shots[k].who[n]].model.category}


def test_lidar_points_lie_on_surfaces_also_on_those_that_move(world, reader):
    """The points of a Frame: half a second of sweeps in the frame of its car, things where they were at each time."""
    rng = np.random.default_rng(0)
    key = reader.keyframes(SCENE)[2]
    frame = reader.frame(key, lidar=10)
    points = applied(frame.world_from_car.numpy(), frame.points[:, :3].double().numpy())
    ages = np.round(frame.points[:, 4].double().numpy(), 6)
    assert np.array_equal(np.unique(ages), np.arange(10) / 20)
    moving = 0
    for age in (0.0, 0.2, 0.45):
        time = seconds(key.stamp) - age
        mine, shot, surface = points[ages == age], world.sweep(time), Triangles(world, time)
        assert len(mine) == len(shot.sweep.points)
        fast = [n for n, a in enumerate(shot.who) if np.linalg.norm(speed(world.traffic.actors[a], time)) > 1]
        on_fast = np.flatnonzero(np.isin(shot.sweep.actor, fast))
        moving += len(on_fast)
        for i in [*rng.choice(len(mine), 60, replace=False), *rng.permutation(on_fast)[:60]]:
            near = surface.near(mine[i], 0.05)
            same = surface.classes[near] == world.tracer.classes[shot.sweep.face[i]]
            assert distance(mine[i], surface.corners[near[same]]) < 0.02
    assert moving > 100


def test_frames_show_what_the_cameras_saw_and_project_it_to_the_pixel_that_shows_it(world, reader):
    """Keyframes and sweeps: the surface that a pixel's ray met, taken from the mesh, at the camera's own time."""
    rng, tracer, rig = np.random.default_rng(1), world.tracer, world.plan.rig
    shown = 0
    for moment in reader.moments(SCENE)[2::3]:
        frame = reader.frame(moment)
        assert frame.used.all() and frame.names == CAMERAS
        car_from_world = rigid.inverse(frame.world_from_car)
        assert np.allclose(
            frame.world_from_car.numpy(), world.traffic.world_from_car(seconds(frame.stamp)), rtol=0, atol=1e-5
        )
        pictures = []
        for k, name in enumerate(CAMERAS):
            number, time = rig.names.index(name), seconds(int(frame.stamps[k]))
            picture, hits, who = world.picture(number, time)
            pictures.append(picture[..., ::-1].astype(int))
            # by the generator's own camera
            own = world.traffic.world_from_car(time) @ rig.cameras.car_from_camera[number].numpy()
            pixels_from_world = rig.cameras.pixels_from_camera[number].numpy() @ np.linalg.inv(own)[:3]
            chosen = rng.permutation(np.flatnonzero((hits.face >= 0) & (hits.t < 60)))[:150]
            chosen = np.union1d(chosen, np.flatnonzero(hits.actor >= 0)[:50])
            places = np.empty((len(chosen), 3))
            for i, at in enumerate(chosen):
                face, weights = hits.face[at], np.array([1 - hits.u[at] - hits.v[at], hits.u[at], hits.v[at]])
                if hits.actor[at] < 0:
                    places[i] = weights @ tracer.static.vertices[tracer.static.faces[face]]
                else:
                    actor = world.traffic.actors[who[hits.actor[at]]]
                    first, mesh = tracer.shape(actor, time)
                    pose = actor.world_from_actor(time)
                    places[i] = applied(pose, weights @ mesh.vertices[mesh.faces[face - first]])
                    shown += np.linalg.norm(speed(actor, time)) > 1
            by_generator = np.c_[places, np.ones(len(places))] @ pixels_from_world.T
            got, depth = frame.cameras[k].project(rigid.apply(car_from_world, torch.from_numpy(places)))
            assert np.allclose(depth.numpy(), by_generator[:, 2], atol=1e-4)
            off = np.abs(got.numpy() - by_generator[:, :2] / by_generator[:, 2:])
            assert off.max() < HALF_A_PIXEL, (moment.sample, name, off.max())
            middle = np.stack([chosen % SIZE[1], chosen // SIZE[1]], 1) + 0.5
            assert np.abs(got.numpy() - middle).max() < HALF_A_PIXEL
        read = frame.images.permute(0, 2, 3, 1).numpy().astype(int)
        apart = np.array([[np.abs(a - b).mean() for b in pictures] for a in read])
        assert np.diag(apart).max() < 8 and apart[~np.eye(len(CAMERAS), dtype=bool)].min() > 12
    assert shown > 50
