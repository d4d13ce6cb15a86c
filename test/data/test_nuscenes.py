"""A data set in nuScenes' layout is read as it is: what stands in the tables and files comes out, or a sentence."""

import json
import math
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import recorded
import torch
from data import layout
from pyquaternion import Quaternion

from occflow_core.data import nuscenes
from occflow_core.data.nuscenes import Box, NuScenes, class_of, each, read_label, things
from occflow_core.geometry import Grid, rigid
from occflow_core.types import OCC3D, OPENOCC, Clip, Occupancy

SCENE = "scene-0002"
BEGIN = (layout.BEGIN + 100_000_000) * 1000  # ns, of that scene


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return layout.write(tmp_path_factory.mktemp("world") / "data", scenes=2, keyframes=5, lidarseg=True)


@pytest.fixture(scope="module")
def world(root):
    return NuScenes(root, progress=False)


@pytest.fixture
def mine(root, tmp_path):
    """A copy to break; the files are links."""
    shutil.copytree(root, tmp_path / "data", copy_function=os.link, ignore=shutil.ignore_patterns(".occflow"))
    for table in (tmp_path / "data" / "v1.0-mini").iterdir():
        text = table.read_text()
        table.unlink()
        table.write_text(text)
    return tmp_path / "data"


def opened(root):
    return NuScenes(root, progress=False)


def exact(pose) -> torch.Tensor:
    """4x4 of (translation, quaternion), by pyquaternion alone."""
    matrix = Quaternion(pose[1]).transformation_matrix
    matrix[:3, 3] = pose[0]
    return torch.from_numpy(matrix)


# ---- frames


def test_the_cameras_are_those_of_the_tables_nuscenes_own_first(mine):
    path = mine / "v1.0-mini" / "sensor.json"
    rows = json.loads(path.read_text())
    rewrite(path, json.dumps([{"token": "0" * 32, "channel": "CAM_ROOF", "modality": "camera"}, *rows[::-1]]).encode())
    assert opened(mine).cameras == (*layout.CAMERAS, "CAM_ROOF")
    rewrite(path, json.dumps([row for row in rows if row["modality"] != "camera"]).encode())
    with pytest.raises(ValueError, match="table sensor: no row is a camera .*sensor.json"):
        _ = opened(mine).cameras


def test_a_keyframe_has_the_pictures_the_stamps_and_the_pose_of_its_tables(world):
    frame = world.frame(world.keyframes(SCENE)[3])
    assert frame.stamp == BEGIN + 1_500_000_000 and frame.drive == SCENE and frame.names == layout.CAMERAS
    assert frame.used.all() and frame.points is None
    assert frame.stamps.tolist() == [frame.stamp - round(early * 1e9) for early in layout.EARLIER]
    assert torch.allclose(frame.world_from_car, exact(layout.car_pose(1.5)), atol=1e-12)
    for camera, picture in enumerate(frame.images):
        expected = torch.tensor(layout.colour(camera, 18))[:, None, None]
        assert (picture.int() - expected).abs().max() <= 3, layout.CAMERAS[camera]


def test_cameras_carry_the_cars_motion_between_their_stamp_and_the_frames(world):
    """A point of the world projects as it does from the car's pose at the camera's own stamp."""
    frame = world.frame(world.keyframes(SCENE)[3])
    point = exact(layout.car_pose(1.5)) @ torch.tensor([9.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    in_car = rigid.inverse(frame.world_from_car) @ point
    pixels, depth = frame.cameras.project(in_car[None, :3].expand(6, 1, 3))
    for camera, early in enumerate(layout.EARLIER):
        by_hand = exact(layout.car_pose(1.5 - early)) @ exact(layout.mounting(camera))
        x, y, z, _ = rigid.inverse(by_hand) @ point
        assert math.isclose(z, depth[camera], abs_tol=1e-9)
        u, v = layout.FOCAL * x / z + layout.WIDTH / 2, layout.FOCAL * y / z + layout.HEIGHT / 2
        assert torch.allclose(pixels[camera, 0], torch.stack([u, v]), atol=1e-6)
    still = rigid.inverse(exact(layout.mounting(0)))
    assert (frame.cameras.car_from_camera[0] @ still)[:3, 3].norm() > 0.25, "8 m/s for 35 ms is 28 cm"


def test_cameras_come_in_the_order_that_was_asked_for(root):
    names = ("CAM_BACK", "CAM_FRONT")
    world = NuScenes(root, cameras=names, progress=False)
    frame = world.frame(world.keyframes(SCENE)[1])
    assert frame.names == names
    assert [int(p[0, 5, 5]) // 10 for p in frame.images] == [layout.colour(3, 6)[0] // 10, layout.colour(0, 6)[0] // 10]


def test_between_keyframes_there_are_sets_of_six_pictures_twelve_a_second(world):
    moments = world.moments(SCENE)
    assert [moment.sample is not None for moment in moments] == [i % 6 == 0 for i in range(25)]
    for step, moment in enumerate(moments):
        frame = world.frame(moment)
        assert frame.used.all()
        for camera in range(6):
            expected = torch.tensor(layout.colour(camera, step))
            assert (frame.images[camera, :, 5, 5].int() - expected).abs().max() <= 3, (step, camera)
        if moment.sample is None:
            assert frame.stamp == frame.stamps.max(), "a sweep is told at its newest picture"
            seconds = (frame.stamp - BEGIN) / 1e9
            assert torch.allclose(frame.world_from_car, exact(layout.car_pose(seconds)), atol=1e-5)


def test_a_camera_that_drops_a_picture_leaves_a_hole_and_shifts_nothing(mine):
    lost = layout.token("data", 1, "CAM_FRONT", 8)
    layout.edit(mine, "sample_data", lambda rows: relinked(rows, lost))
    world = opened(mine)
    moments = world.moments(SCENE)
    assert len(moments) == 25
    for step, moment in enumerate(moments):
        frame = world.frame(moment)
        assert frame.used.tolist() == [step != 8] + [True] * 5
        assert int(frame.images[1, 1, 5, 5]) == pytest.approx(layout.colour(1, step)[1], abs=3)
    assert frame.images[0].any() and not world.frame(moments[8]).images[0].any(), "the hole is black"


def relinked(rows, lost):
    """Rows without one, whose neighbours know each other."""
    gone = next(row for row in rows if row["token"] == lost)
    for row in rows:
        if row["prev"] == lost:
            row["prev"] = gone["prev"]
        if row["next"] == lost:
            row["next"] = gone["next"]
    return [row for row in rows if row["token"] != lost]


def test_lidar_points_lie_in_the_car_frame_of_the_moment_with_their_age(world):
    moment = world.keyframes(SCENE)[2]
    points = world.frame(moment, lidar=3).points
    assert points.shape == (9, 5) and points.dtype == torch.float32
    for k in range(3):
        step, age = 20 - k, 0.05 * k
        raw = torch.tensor([[5.0, 0, -1, 1], [0, 7, 0.5, 1], [-3, 2, 1, 1]], dtype=torch.float64)
        moved = exact(layout.car_pose(1.0 - age)) @ exact(layout.LIDAR_MOUNT) @ raw.mT
        expected = (rigid.inverse(exact(layout.car_pose(1.0))) @ moved).mT[:, :3]
        three = points[3 * k : 3 * k + 3]
        assert torch.allclose(three[:, :3].double(), expected, atol=1e-4)
        assert three[:, 3].tolist() == [step] * 3 and torch.allclose(three[:, 4], torch.tensor(age), atol=1e-6)


def test_camera_work_touches_no_lidar_file_and_no_picture_that_is_not_asked_for(mine):
    shutil.rmtree(mine / "samples" / "LIDAR_TOP")
    shutil.rmtree(mine / "sweeps")
    shutil.rmtree(mine / "samples" / "CAM_BACK")
    world = NuScenes(mine, cameras=layout.CAMERAS[:2], progress=False)
    frame = world.frame(world.keyframes(SCENE)[1])
    assert frame.images.any() and world.boxes(world.samples(SCENE)[0])
    with pytest.raises(FileNotFoundError, match=r"sample_data.*LIDAR_TOP.*not there.*pcd\.bin"):
        world.frame(world.keyframes(SCENE)[1], lidar=1)


def test_frames_of_the_real_recording_are_those_of_its_own_matrices(tmp_path):
    """Four real keyframes told as tables; the LiDAR's files do not even exist."""
    scene = recorded.scene0103("lidar")
    root = real_tables(tmp_path, scene.infos)
    world = opened(root)
    for moment, frame in zip(world.keyframes("scene-0103"), scene.frames):
        read = world.frame(moment)
        assert torch.equal(read.images, frame.images) and torch.equal(read.stamps, frame.stamps)
        assert read.stamp == frame.stamp and read.names == frame.names
        assert torch.allclose(read.world_from_car, frame.world_from_car, atol=1e-4)
        assert torch.allclose(read.cameras.car_from_camera, frame.cameras.car_from_camera, atol=1e-4)
        assert torch.equal(read.cameras.pixels_from_camera, frame.cameras.pixels_from_camera)
    Clip.of([world.frame(moment) for moment in world.keyframes("scene-0103")[::-1]])


def real_tables(tmp_path, infos):
    """Tables of the recorded keyframes; pictures are links to where they are."""
    root = layout.write(tmp_path / "real", scenes=1, keyframes=1, boxes=0, files=False)
    tables: dict[str, list] = {name: [] for name in ("scene", "sample", "sample_data", "ego_pose", "calibrated_sensor")}
    tokens = [info["sample_token"] for info in infos["frames"]]

    def pose(rows):
        quaternion, place = rigid.to_quaternion(torch.tensor(rows, dtype=torch.float64))
        return {"translation": place, "rotation": quaternion}

    for i, info in enumerate(infos["frames"]):
        links = {"prev": tokens[i - 1] if i else "", "next": tokens[i + 1] if i + 1 < len(tokens) else ""}
        tables["sample"].append(
            {"token": tokens[i], "timestamp": info["timestamp_us"], "scene_token": info["scene_token"], **links}
        )
        lidar = {**info, "sensor2ego": info["lidar2ego"], "intrinsics": [], "file": "", "width": 0, "height": 0}
        for channel, cam in {**info["cams"], "LIDAR_TOP": lidar}.items():
            if i == 0:
                tables["calibrated_sensor"].append(
                    {
                        "token": channel,
                        "sensor_token": layout.token("sensor", channel),
                        "camera_intrinsic": cam["intrinsics"],
                        **pose(cam["sensor2ego"]),
                    }
                )
            name = f"samples/{channel}/{i}.{'jpg' if cam['file'] else 'pcd.bin'}"
            if cam["file"]:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).symlink_to(recorded.shared() / "scene0103_keyframes" / cam["file"])
            token = f"{channel}{i}"
            tables["ego_pose"].append({"token": token, "timestamp": 0, **pose(cam["ego2global"])})
            tables["sample_data"].append(
                {
                    "token": token,
                    "sample_token": tokens[i],
                    "ego_pose_token": token,
                    "calibrated_sensor_token": channel,
                    "timestamp": cam["timestamp_us"],
                    "is_key_frame": True,
                    "filename": name,
                    "height": cam["height"],
                    "width": cam["width"],
                    "prev": f"{channel}{i - 1}" if i else "",
                    "next": f"{channel}{i + 1}" if i + 1 < len(tokens) else "",
                }
            )
    tables["scene"].append(
        {
            "token": infos["frames"][0]["scene_token"],
            "name": "scene-0103",
            "nbr_samples": len(tokens),
            "first_sample_token": tokens[0],
            "last_sample_token": tokens[-1],
        }
    )
    for name, rows in tables.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))
    return root


# ---- scenes and splits


def test_scenes_come_in_the_order_of_time_whatever_the_order_of_the_table(mine):
    layout.edit(mine, "scene", lambda rows: rows[::-1])
    layout.edit(mine, "sample_data", lambda rows: rows[::-1])
    layout.edit(mine, "ego_pose", lambda rows: rows[3:] + rows[:3])
    world = opened(mine)
    assert world.scenes == ("scene-0001", SCENE) and len(world.samples(SCENE)) == 5
    frame = world.frame(world.keyframes(SCENE)[3], lidar=1)
    assert torch.allclose(frame.world_from_car, exact(layout.car_pose(1.5)), atol=1e-12)
    assert frame.points[0, 3] == 30 and world.location(SCENE) == "here"


def test_official_validation_has_150_scenes_and_splits_of_our_own_are_read(mine, tmp_path):
    assert len(nuscenes._official_val()) == 150 and "scene-0103" in nuscenes._official_val()
    assert "scene-0061" not in nuscenes._official_val()
    world = opened(mine)
    assert world.split("all") == world.split("mini_train") == world.scenes and world.split("mini_val") == ()
    with pytest.raises(ValueError, match=r"split 'night'.*splits\.json.*does not exist"):
        world.split("night")
    (mine / "v1.0-mini" / "splits.json").write_text(json.dumps({"night": [SCENE], "wrong": ["scene-9"]}))
    assert world.split("night") == (SCENE,)
    with pytest.raises(ValueError, match="split wrong: scene-9"):
        world.split("wrong")


def test_a_worker_opens_its_own(world):
    again = pickle.loads(pickle.dumps(world))
    moment = world.keyframes(SCENE)[1]
    assert torch.equal(again.frame(moment).images, world.frame(moment).images)


def test_the_version_is_found_where_there_is_one_and_asked_for_where_there_are_two(mine):
    assert opened(mine).version == "v1.0-mini"
    shutil.copytree(mine / "v1.0-mini", mine / "v1.0-world")
    with pytest.raises(ValueError, match="which of v1.0-mini, v1.0-world"):
        opened(mine)
    assert NuScenes(mine, "v1.0-world", progress=False).scenes == ("scene-0001", SCENE)


# ---- boxes


def test_boxes_stand_where_they_are_annotated_with_nuscenes_velocities(world):
    sample = world.samples(SCENE)[2]
    first, second = world.boxes(sample)
    assert (first.name, first.lidar_points, first.attributes) == ("vehicle.car", 2, ("vehicle.moving",))
    assert first.size == (4.5, 1.9, 1.6) and first.visibility == "v80-100" and second.attributes == ()
    assert torch.allclose(second.world_from_box, exact(layout.box_pose(1, 1.0)), atol=1e-12)
    assert torch.allclose(second.velocity, torch.tensor([2.0, 0, 0], dtype=torch.float64), atol=1e-9)
    front = second.corners()[[0, 1, 4, 5]].mean(0) - second.world_from_box[:3, 3]
    assert torch.allclose(front, 2.25 * second.world_from_box[:3, 0], atol=1e-9)
    left = second.corners()[[0, 3, 4, 7]].mean(0) - second.world_from_box[:3, 3]
    assert torch.allclose(left, 0.95 * second.world_from_box[:3, 1], atol=1e-9)


@pytest.mark.parametrize(
    ("seconds", "keep", "expected"),
    [  # times of the annotations, which of them exist, velocity of the middle one
        ((0.0, 0.5, 1.0), (1, 1, 1), 1.0),  # central difference
        ((0.0, 1.4, 2.9), (1, 1, 1), 1.0),  # 2.9 s from before to after: twice 1.5 s are allowed
        ((0.0, 1.5, 3.1), (1, 1, 1), None),
        ((0.0, 1.5, 3.1), (1, 1, 0), 1.0),  # one side: 1.5 s
        ((0.0, 1.6, 3.1), (1, 1, 0), None),
        ((0.0, 0.5, 1.0), (0, 1, 0), None),
    ],
)
def test_a_velocity_that_nobody_knows_is_nan_and_never_zero(tmp_path, seconds, keep, expected):
    root = layout.write(tmp_path / "w", keyframes=3, boxes=1, files=False)
    token = [layout.token("annotation", 0, 0, k) for k in range(3)]

    def times(rows):
        for row, s in zip(rows, seconds):
            row["timestamp"] = layout.BEGIN + round(s * 1e6)

    def places(rows):
        for k, row in enumerate(rows):
            row["translation"] = [500 + seconds[k], 0, 0]
            row["prev"] = token[k - 1] if k and keep[k - 1] else ""
            row["next"] = token[k + 1] if k < 2 and keep[k + 1] else ""
        return [row for row, kept in zip(rows, keep) if kept]

    layout.edit(root, "sample", times)
    layout.edit(root, "sample_annotation", places)
    (box,) = opened(root).boxes(layout.token("sample", 0, 1))
    if expected is None:
        assert torch.isnan(box.velocity).all()
    else:
        assert torch.allclose(box.velocity, torch.tensor([expected, 0, 0], dtype=torch.float64), atol=1e-9)


def test_between_keyframes_boxes_are_where_both_neighbours_say(world):
    stamp = BEGIN + 1_300_000_000
    for number, box in enumerate(world.boxes_at(SCENE, stamp)):
        assert torch.allclose(box.world_from_box, exact(layout.box_pose(number, 1.3)), atol=1e-6)
    at_key = world.boxes_at(SCENE, BEGIN + 1_000_000_000)
    assert [box.token for box in at_key] == [box.token for box in world.boxes(world.samples(SCENE)[2])]
    with pytest.raises(ValueError, match="not between its keyframes"):
        world.boxes_at(SCENE, BEGIN - 1)


def test_every_category_of_nuscenes_has_a_class_or_is_nothing():
    assert set(layout.CATEGORIES) == set(nuscenes.CLASS_OF)
    assert class_of("vehicle.bus.bendy", OCC3D) == OCC3D.id("bus") and class_of("vehicle.car", OPENOCC) == 0
    assert class_of("animal", OCC3D) == OCC3D.id("others") and class_of("animal", OPENOCC) is None
    assert class_of("vehicle.ego", OCC3D) is None
    covered = {name for name in nuscenes.CLASS_OF.values() if name}
    assert covered == set(OCC3D.names)
    with pytest.raises(ValueError, match=r"'vehicle\.ufo'"):
        class_of("vehicle.ufo", OCC3D)


# ---- labels


def test_lidarseg_labels_each_point_and_must_be_as_many(mine):
    world = opened(mine)
    sample = world.samples(SCENE)[0]
    labels = world.lidarseg(sample)
    names = [world.category_names[int(label)] for label in labels]
    assert names == ["flat.driveable_surface", "vehicle.car", "noise"]
    file = next((mine / "lidarseg" / "v1.0-mini").glob(f"{layout.token('data', 1, 'LIDAR_TOP', 0)}*"))
    rewrite(file, b"\x18\x11")
    with pytest.raises(ValueError, match=r"2 labels for 3 points.*lidarseg\.bin"):
        world.lidarseg(sample)


def label(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


def empty(free=17, kind=np.uint8):
    return np.full((200, 200, 16), free, kind)


def test_occ3d_is_seen_where_a_camera_or_if_asked_for_the_lidar_saw_and_has_no_flow(mine):
    world = opened(mine)
    sample = world.samples(SCENE)[1]
    semantics, camera, lidar = empty(), np.zeros((200, 200, 16), np.uint8), np.zeros((200, 200, 16), np.uint8)
    semantics[3, 4, 5], camera[3, 4, :6], lidar[3, 4:6, :9] = OCC3D.id("car"), 1, 1
    path = mine / "gts" / SCENE / sample / "labels.npz"
    label(path, semantics=semantics, mask_lidar=lidar, mask_camera=camera)
    truth = world.occupancy(sample, "occ3d")
    assert truth.classes is OCC3D and truth.flow is None and truth.labels[3, 4, 5] == 4
    assert truth.seen.sum() == 6 and truth.seen[3, 4, 5] and (truth.labels == 17).sum() == 639_999
    assert world.occupancy(sample, "occ3d", seen_by="lidar").seen.numpy().tolist() == (lidar > 0).tolist()
    with pytest.raises(ValueError, match=f"sample {sample}: seen_by is 'camera' or 'lidar', got 'radar'"):
        world.occupancy(sample, "occ3d", seen_by="radar")
    label(path, semantics=semantics, mask_lidar=lidar * 3, mask_camera=camera)
    assert torch.equal(world.occupancy(sample, "occ3d").seen, truth.seen), "the other mask is not looked at"
    with pytest.raises(ValueError, match=f"sample {sample}: mask_lidar holds something else than 0 and 1"):
        world.occupancy(sample, "occ3d", seen_by="lidar")


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64, np.uint16])
def test_openocc_takes_any_whole_numbers_and_unknown_flow_is_nan(tmp_path, kind):
    semantics, flow = empty(16, kind), np.zeros((200, 200, 16, 2), np.float32)
    semantics[0, 0, :6] = 0
    flow[0, 0, :6] = [[1, -2], [np.nan, 0], [255, 0], [0, -255], [np.inf, 0], [254, 0]]
    truth = read_label(label(tmp_path / "labels.npz", semantics=semantics, flow=flow), OPENOCC)
    assert truth.labels.dtype == torch.uint8 and (truth.labels != 16).sum() == 6 and truth.seen.all()
    assert truth.flow[0, 0, 0].tolist() == [1, -2] and truth.flow[0, 0, 5].tolist() == [254, 0]
    assert torch.isnan(truth.flow[0, 0, 1:5]).all() and not torch.isnan(truth.flow[0, 1:]).any()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"semantics": np.zeros((200, 200, 15), np.uint8)}, r"semantics is of shape \(200, 200, 15\)"),
        ({"semantics": empty(18)}, "from 18 to 18, expected whole numbers from 0 to 17"),
        ({"semantics": empty(-1, np.int32)}, "from -1"),
        ({"semantics": empty(1, np.float32)}, "semantics of float32"),
        ({"semantics": empty(), "flow": np.zeros((200, 200, 16), np.float32)}, "flow is of shape"),
        ({"semantics": empty(), "mask_camera": empty(2)}, "something else than 0 and 1"),
        ({"other": empty()}, "no array named semantics"),
    ],
)
def test_a_label_that_is_not_one_is_refused_with_its_path(tmp_path, arrays, words):
    path = label(tmp_path / "labels.npz", **arrays)
    with pytest.raises(ValueError, match=f"{words}.*labels.npz|labels.npz.*{words}"):
        read_label(path, OCC3D)


def test_a_truncated_label_and_a_missing_one_are_named(mine):
    world = opened(mine)
    sample = world.samples(SCENE)[1]
    with pytest.raises(FileNotFoundError, match=rf"sample {sample}: no label file .*gts.*labels\.npz"):
        world.occupancy(sample, "occ3d")
    path = label(mine / "openocc_v2" / SCENE / sample / "labels.npz", semantics=empty(16))
    rewrite(path, path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"sample {sample}.*labels\.npz is no whole"):
        world.occupancy(sample, "openocc")


def test_instances_of_a_label_are_those_of_things(tmp_path):
    semantics, ids = empty(16), np.zeros((200, 200, 16), np.int64)
    semantics[0, 0, :4], ids[0, 0, :4] = [0, 7, 14, 0], [3, 2, 9, 70_000]  # a car, a person, a wall, another car
    path = label(tmp_path / "labels.npz", semantics=semantics, instances=ids)
    told = read_label(path, OPENOCC, instances=True).instances
    assert told.dtype == torch.int32 and told[0, 0, :5].tolist() == [3, 2, 0, 70_000, 0] and not told[1:].any()
    assert read_label(path, OPENOCC).instances is None
    for wrong, words in (
        (ids[1:], r"instances is of shape \(199, 200, 16\)"),
        (ids - 1, "instances of int64 from -1 to 69999, expected whole"),
        (ids + 0.5, "instances of float64"),
        (ids << 20, "expected whole numbers"),
    ):
        label(path, semantics=semantics, instances=wrong)
        with pytest.raises(ValueError, match=words):
            read_label(path, OPENOCC, instances=True)


def street(kind: str, *middles, size=(4.0, 1.9, 1.9), turn=0.0):
    """Boxes of one kind at middles (x, y, z) m, turned by radians."""
    return [
        Box(kind, str(m), str(m), rigid.from_quaternion(layout.quaternion(turn), m), size, torch.zeros(3), 1, 0, (), "")
        for m in middles
    ]


def volume(kind: int) -> Occupancy:
    grid = Grid((0.0, 0.0, 0.0), (0.4, 0.4, 0.4), (24, 12, 8))
    return Occupancy(grid, OCC3D, torch.full(grid.shape, kind, dtype=torch.uint8), None, torch.ones(grid.shape).bool())


def test_a_voxel_belongs_to_the_nearest_box_of_its_class_that_reaches_it():
    boxes = street("vehicle.car", (2.0, 2.0, 1.0), (6.3, 2.0, 1.0))  # 0 to 4 and 4.3 to 8.3 along x, 1.05 to 2.95
    truth = volume(OCC3D.id("car"))
    ids = things(truth, boxes, torch.eye(4).double())
    assert ids.dtype == torch.int32 and ids.shape == truth.labels.shape
    # centres at 0.2, 0.6, ...: 4.2 lies 0.2 m beyond the first and 0.1 m before the second; 8.6 is reached, 9.0 is not
    assert ids[:, 4, 2].tolist() == [1] * 10 + [2] * 12 + [0] * 2
    assert ids[3, :, 2].tolist() == [0, 0] + [1] * 6 + [0] * 4 and ids[3, 4].tolist() == [1] * 6 + [0] * 2
    assert things(truth, boxes[::-1], torch.eye(4).double())[3, 4, 2] == 2, "the place of its box"
    # in two boxes: the one that it lies deeper in
    over = street("vehicle.car", (2.0, 2.0, 1.0), (5.1, 2.0, 1.0))
    assert things(truth, over, torch.eye(4).double())[:, 4, 2].tolist() == [1] * 9 + [2] * 10 + [0] * 5


def test_a_box_takes_voxels_of_its_own_class_and_only_if_that_moves():
    ahead = torch.eye(4).double()
    people = street("human.pedestrian.adult", (2.0, 2.0, 1.0)) + street("vehicle.emergency.police", (2.0, 2.0, 1.0))
    barrier = street("movable_object.barrier", (2.0, 2.0, 1.0))
    for kind, boxes, some in (
        ("pedestrian", people, True),
        ("car", people, False),
        ("others", people, False),
        ("barrier", barrier, False),
        ("car", [], False),
    ):
        assert bool(things(volume(OCC3D.id(kind)), boxes, ahead).any()) == some, kind


def test_instances_do_not_depend_on_where_the_car_is_in_the_world():
    truth = volume(OCC3D.id("truck"))
    boxes = street("vehicle.truck", (2.0, 2.0, 1.0), (6.3, 2.5, 1.1), turn=0.4)
    world_from_car = exact(layout.car_pose(0.5))
    moved = [replace(box, world_from_box=world_from_car @ box.world_from_box) for box in boxes]
    ids = things(truth, boxes, torch.eye(4).double())
    assert set(ids.unique().tolist()) == {0, 1, 2}
    assert torch.equal(things(truth, moved, rigid.inverse(world_from_car)), ids)


def test_a_keyframe_s_instances_are_the_file_s_or_those_of_its_boxes_at_its_own_pose(mine):
    time = 0.5  # the second keyframe's; 4 m on from the first's
    world_from_car = exact(layout.car_pose(time))

    def ahead(rows):
        for row in rows:
            if row["token"] == layout.token("annotation", 1, 0, 1):
                place = world_from_car @ torch.tensor([10.0, 0.0, 1.0, 1.0]).double()
                row |= {"translation": place[:3].tolist(), "rotation": layout.car_pose(time)[1]}

    layout.edit(mine, "sample_annotation", ahead)
    world = opened(mine)
    sample = world.samples(SCENE)[1]
    semantics = empty(16)
    semantics[110:140, 80:120] = OPENOCC.id("car")
    path = label(mine / "openocc_v2" / SCENE / sample / "labels.npz", semantics=semantics)
    truth = world.occupancy(sample, "openocc", instances=True)
    x, y, z = truth.grid.centres().unbind(-1)
    box = ((x - 10).abs() < 2.25 + 0.4) & (y.abs() < 0.95 + 0.4) & ((z - 1).abs() < 0.8 + 0.4)  # 4.5 x 1.9 x 1.6 m
    assert torch.equal(truth.instances, box.int()) and truth.instances.any()
    assert world.occupancy(sample, "openocc").instances is None
    label(path, semantics=semantics, instances=np.full((200, 200, 16), 5, np.uint8))
    told = world.occupancy(sample, "openocc", instances=True).instances
    assert torch.equal(told, 5 * (truth.labels == OPENOCC.id("car")).int())


def test_published_labels_are_read_as_they_were_counted():
    """Counts of the file that the fact card of the metrics describes."""
    folder = recorded.shared() / "occ_labels"
    old = read_label(folder / "occ3d_challenge2023.npz", OCC3D)
    assert int(old.seen.sum()) == 43_355 and int((old.labels != 17).sum()) == 39_092
    assert old.labels[100, 100, 0] == OCC3D.id("driveable_surface")
    read_label(folder / "occ3d.npz", OCC3D)
    new = read_label(folder / "openocc_v2_flow.npz", OPENOCC)
    assert new.seen.all() and not torch.isnan(new.flow).any()
    moving = new.flow.norm(dim=-1) > 0
    assert set(new.labels[moving].tolist()) <= set(OPENOCC.moving_ids)
    assert -1.35 < new.flow.min() < -1.3 and 1.2 < new.flow.max() < 1.25
    ids = read_label(folder / "openocc_v2_flow.npz", OPENOCC, instances=True).instances
    kinds = [set(new.labels[ids == i].tolist()) for i in range(1, 11)]  # the file's own: two cars, eight people
    assert ids.max() == 10 and sorted(map(list, kinds)) == [[0]] * 2 + [[7]] * 8
    things = torch.isin(new.labels, torch.tensor(OPENOCC.moving_ids))
    assert int(things.sum()) == 888 and int((ids[things] == 0).sum()) == 3 and not ids[~things].any()


# ---- what is broken


def rewrite(path, content: bytes):
    path.unlink()  # the copy is a link
    path.write_bytes(content)


def drop(rows, token):
    return [row for row in rows if row["token"] != token]


def change(token, **values):
    def edit(rows):
        for row in rows:
            if row["token"] == token:
                row.update(values)

    return edit


FRONT = layout.token("data", 1, "CAM_FRONT", 6)  # keyframe 1 of the second scene
SAMPLE = layout.token("sample", 1, 1)
POSE = layout.token("pose", 1, "CAM_FRONT", 6)
MOUNT = layout.token("calibrated", 0, "CAM_FRONT")
BROKEN = {  # table, edit, what the sentence must say
    "ego_pose is gone": ("ego_pose", lambda r: drop(r, POSE), f"sample_data: {FRONT}.*{POSE}.*ego_pose.*ego_pose.json"),
    "pose is NaN": ("ego_pose", change(POSE, translation=[None, 0, 0]), f"ego_pose.*{FRONT}.*nan.*ego_pose.json"),
    "rotation is zero": ("ego_pose", change(POSE, rotation=[0, 0, 0, 0]), f"ego_pose.*{FRONT}.*quaternion"),
    "pose jumps": ("ego_pose", change(POSE, translation=[0, 0, 0]), f"ego_pose: a gap.*{FRONT}.*m from.*ego_pose.json"),
    "keyframe is gone": (
        "sample_data",
        lambda r: relinked(r, FRONT),
        f"{SAMPLE}: no keyframe of CAM_FRONT.*sample_data",
    ),
    "chain is cut": ("sample_data", lambda r: drop(r, FRONT), "sample_data: .*follow each other on CAM_FRONT"),
    "calibration is gone": (
        "sample_data",
        change(FRONT, calibrated_sensor_token="x"),
        f"{FRONT}.*x.*calibrated_sensor",
    ),
    "matrix is no matrix": ("calibrated_sensor", change(MOUNT, camera_intrinsic=[[1.0]]), f"{MOUNT}.*camera_intrinsic"),
    "sample is gone": ("sample", lambda r: drop(r, SAMPLE), f"sample: token {SAMPLE}.*sample.json"),
    "samples are crossed": ("sample", change(SAMPLE, prev="x"), f"sample: {SAMPLE} follows.*names prev x"),
    "scene miscounts": ("scene", change(layout.token("scene", 1), nbr_samples=9), "scene-0002 tells of 9 samples"),
    "token stands twice": ("sample_data", lambda r: [*r, r[3]], "sample_data: token .* stands there twice"),
    "field is gone": (
        "sample_data",
        lambda r: [{k: v for k, v in r[0].items() if k != "prev"}, *r[1:]],
        r"prev.*\[0\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tables_are_told_in_one_sentence_that_names_table_token_and_path(mine, case):
    table, edit, words = BROKEN[case]
    layout.edit(mine, table, edit)
    with pytest.raises(ValueError, match=words) as told:
        world = opened(mine)
        world.frame(world.keyframe(world.samples(SCENE)[1]))
    assert str(mine) in str(told.value) and "\n" not in str(told.value)


def test_what_is_broken_in_one_scene_does_not_stop_the_other(mine):
    layout.edit(mine, "ego_pose", lambda rows: drop(rows, POSE))
    layout.edit(mine, "sample", lambda rows: rows)
    world = opened(mine)
    assert len([world.frame(moment) for moment in world.moments("scene-0001")]) == 25
    skipped: list[str] = []
    moments = world.moments(SCENE)
    good = list(each(moments, world.frame, keep_going=True, skipped=skipped))
    assert len(good) == 24 and len(skipped) == 1 and POSE in skipped[0]
    with pytest.raises(ValueError, match=POSE):
        list(each(moments, world.frame))


@pytest.mark.parametrize("table", ["scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "sensor"])
def test_a_missing_table_is_named(mine, table):
    (mine / "v1.0-mini" / f"{table}.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"table {table} is missing: .*{table}\.json"):
        world = opened(mine)
        world.frame(world.keyframes(SCENE)[0])


def test_tables_that_are_not_needed_may_be_missing(mine):
    """As in a drive without annotations."""
    for table in ("sample_annotation", "instance", "lidarseg", "map", "log", "attribute", "visibility", "category"):
        (mine / "v1.0-mini" / f"{table}.json").unlink()
    world = opened(mine)
    world.frame(world.keyframes(SCENE)[0])
    with pytest.raises(FileNotFoundError, match="table sample_annotation is missing"):
        world.boxes(world.samples(SCENE)[0])


@pytest.mark.parametrize("cut", [0, 50, -20])
def test_a_truncated_picture_is_named_and_never_grey(mine, cut):
    world = opened(mine)
    path = world.data(world.keyframes(SCENE)[1].rows[0]).path
    rewrite(path, path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=rf"{FRONT} \(CAM_FRONT\).*{path.name}"):
        world.frame(world.keyframes(SCENE)[1])


def test_a_truncated_lidar_file_is_named(mine):
    world = opened(mine)
    path = world.data(world.keyframes(SCENE)[1].reference).path
    for content in (path.read_bytes()[:-7], path.read_bytes()[:44], b""):
        rewrite(path, content)
        with pytest.raises(ValueError, match=rf"{len(content)} bytes are no whole number of points.*{path.name}"):
            world.frame(world.keyframes(SCENE)[1], lidar=1)


def test_scenes_samples_splits_and_channels_that_do_not_exist_are_named(world, root):
    for ask, words in (
        (lambda: world.samples("scene-9"), "scene: no row is named 'scene-9'.*scene.json"),
        (lambda: world.keyframe("x"), "sample: token x is not there.*sample.json"),
        (lambda: world.sweeps(SCENE, "CAM_UP"), "no channel 'CAM_UP'"),
        (lambda: world.occupancy(world.samples(SCENE)[0], "kitti"), "occ3d, openocc, got 'kitti'"),
    ):
        with pytest.raises(ValueError, match=words):
            ask()
    with pytest.raises(FileNotFoundError, match="no tables v1.0-test"):
        NuScenes(root, "v1.0-test")


def test_a_partial_keyframe_is_taken_when_that_is_asked_for(mine):
    layout.edit(mine, "sample_data", lambda rows: relinked(rows, FRONT))
    world = opened(mine)
    frame = world.frame(world.keyframes(SCENE)[1], partial=True)
    assert frame.used.tolist() == [False] + [True] * 5 and not frame.images[0].any()
