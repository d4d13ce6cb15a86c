"""A scene as a bag holds what the tables hold; a bag as a data set holds what the bag held; and back and forth."""

import json
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from data import layout

from occflow_core.data import bag as bags
from occflow_core.data import drives, pattern
from occflow_core.data.nuscenes import NuScenes
from occflow_core.geometry import OCC3D_GRID, rigid
from occflow_core.types import OCC3D, OPENOCC
from occflow_core.voxelflow import unpack

SCENE = "scene-0001"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Five keyframes with truth: Occ3D at all, OpenOcc at all."""
    root = layout.write(tmp_path_factory.mktemp("world") / "data", keyframes=5)
    rng = np.random.default_rng(0)
    for sample in NuScenes(root, progress=False).samples(SCENE):
        for kind, classes in (("gts", OCC3D), ("openocc_v2", OPENOCC)):
            labels = np.full(OCC3D_GRID.shape, classes.free, np.uint8)
            labels[rng.integers(0, 200, 500), rng.integers(0, 200, 500), rng.integers(0, 16, 500)] = classes.id("car")
            arrays = {"semantics": labels}
            if kind == "gts":
                arrays["mask_camera"] = (rng.random(OCC3D_GRID.shape) < 0.3).astype(np.uint8)
            else:
                flow = np.zeros((*OCC3D_GRID.shape, 2), np.float32)
                flow[labels == 0] = [3.0, -1.0]
                flow[:50][labels[:50] == 0] = np.nan
                arrays["flow"] = flow
            path = root / kind / SCENE / sample / "labels.npz"
            path.parent.mkdir(parents=True)
            np.savez_compressed(path, **arrays)
    return root


@pytest.fixture(scope="module")
def world(root):
    return NuScenes(root, progress=False)


@pytest.fixture(scope="module")
def bag(root):
    out = root.parent / "bag"
    done = drives.write_scene_bag(root, SCENE, out, progress=False)
    assert (done.keyframes, done.truths, done.pictures, done.sweeps, done.holes) == (5, 5, 150, 41, 0)
    return out


def stamp_of(message) -> int:
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def test_a_scene_as_a_bag_has_every_picture_as_it_was_recorded(world, bag):
    found: dict[str, list] = {}
    for topic, stamp, message in bags.read_bag(bag):
        found.setdefault(topic, []).append((stamp, message))
    for channel in layout.CAMERAS:
        rows = world.sweeps(SCENE, channel)
        messages = found[f"/{channel.lower()}/image_raw/compressed"]
        assert len(messages) == len(rows) == 25
        for row, (stamp, message) in zip(rows, messages):
            data = world.data(row)
            assert stamp == stamp_of(message) == data.stamp and message.format == "jpeg"
            assert message.data.tobytes() == data.path.read_bytes()
            assert message.header.frame_id == f"{channel.lower()}_optical_frame"
        _, info = found[f"/{channel.lower()}/camera_info"][0]
        assert (info.height, info.width, info.k[0]) == (layout.HEIGHT, layout.WIDTH, layout.FOCAL)


def test_tf_of_a_scene_as_a_bag_is_the_poses_of_the_tables(world, bag):
    poses, mounts = {}, {}
    for topic, _, message in bags.read_bag(bag, ["/tf", "/tf_static"]):
        for one in message.transforms:
            q, t = one.transform.rotation, one.transform.translation
            pose = rigid.from_quaternion([q.w, q.x, q.y, q.z], [t.x, t.y, t.z])
            if topic == "/tf":
                assert (one.header.frame_id, one.child_frame_id) == ("map", "base_link")
                assert stamp_of(one) not in poses, "a pose is told once"
                poses[stamp_of(one)] = pose
            else:
                mounts[one.child_frame_id] = pose
    for channel in (*layout.CAMERAS, "LIDAR_TOP"):
        for row in world.sweeps(SCENE, channel):
            data = world.data(row)
            assert torch.allclose(poses[data.stamp], data.world_from_car, atol=1e-9)
        assert torch.allclose(mounts[drives._frame(channel)], data.car_from_sensor, atol=1e-9)


@pytest.mark.parametrize("labels", ["auto", "occ3d"])
def test_truth_in_the_bag_is_the_label_at_the_keyframes_stamp(root, world, bag, tmp_path, labels):
    """Labels, flow where it is known, and what no camera sees: from Occ3D's mask also for OpenOcc's classes."""
    if labels == "occ3d":
        bag = tmp_path / "bag"
        drives.write_scene_bag(root, SCENE, bag, labels=labels, lidar=False, boxes=False, progress=False)
        assert "/lidar_top/points" not in bags.topics_of(bag) and drives.BOXES not in bags.topics_of(bag)
    keys = world.keyframes(SCENE)
    messages = list(bags.read_bag(bag, [drives.TRUTH]))
    assert len(messages) == 5
    for key, (_, stamp, message) in zip(keys, messages):
        truth = world.occupancy(key.sample, "openocc" if labels == "auto" else "occ3d")
        said = unpack(message)
        assert stamp == stamp_of(message) == key.stamp and message.header.frame_id == "base_link"
        assert said.classes == truth.classes and said.grid == OCC3D_GRID and "ground truth" in message.model_name
        assert torch.equal(said.labels, truth.labels)
        assert torch.equal(said.unobserved, ~world.occupancy(key.sample, "occ3d").seen)
        assert message.camera_age_us.tolist() == [round(early * 1e6) for early in layout.EARLIER]
        if labels == "auto":
            assert torch.equal(said.flow, torch.nan_to_num(truth.flow, nan=0.0)), "an unknown flow is not sent"
            assert torch.isnan(truth.flow).any() and (said.flow != 0).any()


def test_without_a_mask_nothing_is_said_about_what_cameras_see(root, tmp_path):
    shutil.copytree(root, tmp_path / "data", ignore=shutil.ignore_patterns("gts", ".occflow"))
    drives.write_scene_bag(tmp_path / "data", SCENE, tmp_path / "bag", lidar=False, progress=False)
    _, _, message = next(bags.read_bag(tmp_path / "bag", [drives.TRUTH]))
    assert len(message.unobserved) == 0 and message.label_set == "openocc-v2"


def test_boxes_are_markers_in_the_car_frame(world, bag):
    for key, (_, _, message) in zip(world.keyframes(SCENE), bags.read_bag(bag, [drives.BOXES])):
        first, *rest = message.markers
        assert first.action == 3, "the boxes of the keyframe before are deleted"
        cubes = [m for m in rest if m.type == 1]
        arrows = [m for m in rest if m.type == 0]
        boxes = world.boxes(key.sample)
        assert len(cubes) == len(arrows) == len(boxes) == 2
        car_from_world = rigid.inverse(world.pose(key))
        for box, cube, arrow in zip(boxes, cubes, arrows):
            assert cube.header.frame_id == "base_link" and cube.ns == box.name
            place = (car_from_world @ box.world_from_box)[:3, 3].tolist()
            assert [cube.pose.position.x, cube.pose.position.y, cube.pose.position.z] == pytest.approx(place)
            assert (cube.scale.x, cube.scale.y, cube.scale.z) == box.size
            way = np.subtract(*[[p.x, p.y, p.z] for p in arrow.points[::-1]])
            assert np.linalg.norm(way) == pytest.approx(float(box.velocity.norm()))


def test_a_scene_through_a_bag_is_the_scene(root, world, bag, tmp_path):
    """Pictures, cameras, poses and LiDAR of keyframes and sweeps; only annotations are gone."""
    done = drives.bag_to_dataset(bag, tmp_path / "back", scene=SCENE, progress=False)
    assert (done.keyframes, done.pictures, done.sweeps, done.holes, dict(done.skipped)) == (5, 150, 41, 0, {})
    back = NuScenes(tmp_path / "back", progress=False)
    assert back.scenes == (SCENE,)
    assert [m.sample is None for m in back.moments(SCENE)] == [m.sample is None for m in world.moments(SCENE)]
    for ours, theirs in zip(world.moments(SCENE), back.moments(SCENE)):
        a, b = world.frame(ours, lidar=2), back.frame(theirs, lidar=2)
        assert a.stamp == b.stamp and torch.equal(a.images, b.images) and torch.equal(a.stamps, b.stamps)
        assert torch.allclose(a.world_from_car, b.world_from_car, atol=1e-9)
        assert torch.allclose(a.cameras.car_from_camera, b.cameras.car_from_camera, atol=1e-9)
        assert torch.allclose(a.points, b.points, atol=1e-5)
    for row in back.sweeps(SCENE, "LIDAR_TOP"):
        assert back.points(row)[:, 4].tolist() == [0, 1, 300], "rings"
    assert back.boxes(back.samples(SCENE)[0]) == () and back.split("all") == (SCENE,)
    tables = {path.stem for path in (tmp_path / "back" / "v1.0-mini").iterdir()}
    assert {"map", "log", "category", "attribute", "visibility", "instance", "sample_annotation"} <= tables
    (row,) = json.loads((tmp_path / "back" / "v1.0-mini" / "map.json").read_text())
    assert (tmp_path / "back" / row["filename"]).exists() and row["log_tokens"], "the devkit asks for both"


def test_a_silence_leaves_out_the_keyframes_in_it_and_keeps_the_beat(bag, tmp_path):
    """Nothing from 0.6 to 1.29 s: no keyframe near 1.0 s, and none at 1.3 s either."""
    begin = layout.BEGIN * 1000

    def silent(_, topic, stamp, message):
        lost = begin + 600_000_000 <= stamp < begin + 1_290_000_000
        return None if lost and not topic.startswith("/tf") else message

    out = rebagged(bag, tmp_path / "bag", silent)
    drives.bag_to_dataset(out, tmp_path / "data", scene=SCENE, progress=False)
    stamps = [moment.stamp - begin for moment in NuScenes(tmp_path / "data", progress=False).keyframes(SCENE)]
    assert stamps == [0, 500_000_000, 1_500_000_000, 2_000_000_000]


# ---- a car without LiDAR

HEIGHT, WIDTH = 90, 160


@pytest.fixture(scope="module")
def frames():
    return list(pattern.drive(15, height=HEIGHT, width=WIDTH, rate=6.0))


@pytest.fixture(scope="module")
def recorded_bag(frames, tmp_path_factory):
    out = tmp_path_factory.mktemp("pattern") / "drive"
    bags.write_bag(out, frames, pattern.rig(HEIGHT, WIDTH), progress=False)
    return out


def test_a_recorded_drive_of_cameras_becomes_a_scene(frames, recorded_bag, tmp_path):
    """Every set of six comes back with its pictures (as JPEG), cameras and pose; a keyframe every 0.5 s."""
    done = drives.bag_to_dataset(recorded_bag, tmp_path / "data", progress=False)
    assert (done.pictures, done.sweeps, done.keyframes, done.holes) == (90, 0, 5, 0)
    world = NuScenes(tmp_path / "data", cameras=pattern.NAMES, progress=False)
    moments = world.moments("drive")
    assert len(moments) == 15 and [i for i, m in enumerate(moments) if m.sample] == [0, 3, 6, 9, 12]
    for frame, moment in zip(frames, moments):
        read = world.frame(moment)
        assert (read.stamps - frame.stamps).abs().max() < 1000, "tables count whole microseconds"
        assert abs(read.stamp - frame.stamp) < 1000 and read.used.all()
        assert torch.allclose(read.world_from_car, frame.world_from_car, atol=1e-4)
        assert torch.allclose(read.cameras.car_from_camera, frame.cameras.car_from_camera, atol=1e-4)
        assert torch.allclose(read.cameras.pixels_from_camera, frame.cameras.pixels_from_camera)
        assert (read.images.int() - frame.images.int()).abs().float().mean() < 6
    assert not (tmp_path / "data" / "samples" / "LIDAR_TOP").exists()


def rebagged(source, out, change):
    """The bag again, each message as `change(topic, stamp, message)` gives it; None drops it."""
    kinds = bags.topics_of(source)
    with bags.BagWriter(out) as bag:
        added = set()
        for topic, stamp, message in bags.read_bag(source):
            changed = change(bag.types.types, topic, stamp, message)
            if changed is None:
                continue
            name, kind, message = changed if isinstance(changed, tuple) else (topic, kinds[topic], changed)
            if name not in added:
                bag.add(name, kind, latched=name == "/tf_static")
                added.add(name)
            bag.write(name, stamp, message)
    return out


@pytest.mark.parametrize("encoding", ["rgb8", "mono8"])
def test_raw_pictures_are_stored_as_jpeg(frames, recorded_bag, tmp_path, encoding):
    def raw(make, topic, _, message):
        if not topic.endswith("compressed"):
            return message
        picture = cv2.imdecode(message.data, cv2.IMREAD_COLOR)
        if encoding != "bgr8":
            picture = cv2.cvtColor(picture, {"rgb8": cv2.COLOR_BGR2RGB, "mono8": cv2.COLOR_BGR2GRAY}[encoding])
        padded = np.zeros((HEIGHT, WIDTH * (picture.size // HEIGHT // WIDTH) + 8), np.uint8)
        padded[:, :-8] = picture.reshape(HEIGHT, -1)
        image = make["sensor_msgs/msg/Image"](
            message.header, HEIGHT, WIDTH, encoding, 0, padded.shape[1], padded.reshape(-1)
        )
        return topic.removesuffix("/compressed"), "sensor_msgs/msg/Image", image

    bag = rebagged(recorded_bag, tmp_path / "raw", raw)
    drives.bag_to_dataset(bag, tmp_path / "data", scene="x", progress=False)
    world = NuScenes(tmp_path / "data", cameras=pattern.NAMES, progress=False)
    read = world.frame(world.keyframes("x")[1]).images.float()
    expected = frames[3].images.float()
    if encoding == "mono8":
        expected = (expected * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    assert (read - expected).abs().mean() < 6


def test_a_lens_is_taken_out_of_pictures_that_are_not_rectified(frames, recorded_bag, tmp_path):
    """Pictures bent by a known lens come back straight; K stays what it was."""
    bend = np.array([-0.25, 0.06, 0.001, -0.001, 0.0])
    k = pattern.rig(HEIGHT, WIDTH).pixels_from_camera[0].numpy()
    grid = np.stack(np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT)), axis=-1).astype(np.float32).reshape(-1, 1, 2)
    straight = cv2.undistortPoints(grid, k, bend, P=k).reshape(HEIGHT, WIDTH, 2).astype(np.float32)

    def bent(make, topic, _, message):
        if topic == "/cam_front/camera_info":
            return replace(message, d=bend)
        if topic == "/cam_front/image_raw/compressed":
            picture = cv2.remap(cv2.imdecode(message.data, cv2.IMREAD_COLOR), straight, None, cv2.INTER_LINEAR)
            return replace(message, data=cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 98])[1].reshape(-1))
        return message

    bag = rebagged(recorded_bag, tmp_path / "bent", bent)
    drives.bag_to_dataset(bag, tmp_path / "data", scene="x", progress=False)
    world = NuScenes(tmp_path / "data", cameras=pattern.NAMES, progress=False)
    read = world.frame(world.keyframes("x")[1])
    assert torch.allclose(read.cameras.pixels_from_camera[0], torch.from_numpy(k))

    def off(picture):
        inside = (picture.int() - frames[3].images[0].int())[:, 15 : HEIGHT - 15, 25 : WIDTH - 25]
        return float(inside.abs().float().mean())

    straightened = off(read.images[0])
    drives.bag_to_dataset(bag, tmp_path / "left", scene="x", rectified=True, progress=False)
    world = NuScenes(tmp_path / "left", cameras=pattern.NAMES, progress=False)
    assert off(world.frame(world.keyframes("x")[1]).images[0]) > 1.25 * straightened


def test_what_has_no_pose_is_left_out_and_counted(frames, recorded_bag, tmp_path):
    """TF that begins a second late and is silent for 1.2 s later on."""
    begin = frames[0].stamp

    def silent(_, topic, stamp, message):
        late = stamp < begin + 900_000_000 or begin + 1_100_000_000 < stamp < begin + 2_300_000_000
        return None if topic == "/tf" and late else message

    bag = rebagged(recorded_bag, tmp_path / "bag", silent)
    done = drives.bag_to_dataset(bag, tmp_path / "data", scene="x", progress=False)
    assert any("map <- base_link before it began" in reason for reason in done.skipped)
    assert any("in a gap of more than 1.0 s" in reason for reason in done.skipped)
    assert done.pictures + sum(done.skipped.values()) == 90 and "left out" in str(done)
    world = NuScenes(tmp_path / "data", cameras=pattern.NAMES, progress=False)
    assert all(moment.stamp >= begin + 8e8 for moment in world.moments("x"))


def test_a_dead_camera_leaves_holes_that_are_counted(recorded_bag, frames, tmp_path):
    def dead(_, topic, stamp, message):
        return None if topic.startswith("/cam_back/image") and stamp > frames[4].stamp else message

    bag = rebagged(recorded_bag, tmp_path / "bag", dead)
    done = drives.bag_to_dataset(bag, tmp_path / "data", scene="x", progress=False)
    assert done.keyframes == 5 and done.holes == 3
    world = NuScenes(tmp_path / "data", cameras=pattern.NAMES, progress=False)
    used = [world.frame(key, partial=True).used.tolist() for key in world.keyframes("x")]
    back = pattern.NAMES.index("CAM_BACK")
    assert [row[back] for row in used] == [True, True, False, False, False]
    assert all(all(row[:back] + row[back + 1 :]) for row in used)


def test_a_broken_picture_stops_or_is_counted(recorded_bag, tmp_path):
    broken = []

    def cut(_, topic, stamp, message):
        if topic == "/cam_front/image_raw/compressed" and not broken:
            broken.append(stamp)
            return replace(message, data=message.data[:-200])
        return message

    bag = rebagged(recorded_bag, tmp_path / "bag", cut)
    with pytest.raises(ValueError, match=rf"/cam_front/image_raw/compressed at {broken[0]} ns: a broken JPEG"):
        drives.bag_to_dataset(bag, tmp_path / "data", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bag"], "nothing is left of it"
    done = drives.bag_to_dataset(bag, tmp_path / "data", keep_going=True, progress=False)
    assert done.pictures == 89 and sum(done.skipped.values()) == 1


def renamed(make, topic, _, message):
    """As another team records: topics, the place of CameraInfo and TF frames of its own, and a second LiDAR."""
    frames = {"base_link": "chassis", "map": "site"}
    if topic in ("/tf", "/tf_static"):
        moved = [
            replace(
                one,
                header=replace(one.header, frame_id=frames.get(one.header.frame_id, one.header.frame_id)),
                child_frame_id=frames.get(one.child_frame_id, one.child_frame_id),
            )
            for one in message.transforms
        ]
        return replace(message, transforms=moved)
    name = topic.split("/")[1].removeprefix("cam_")
    if topic.endswith("camera_info"):
        return f"/calibration/{name}", "sensor_msgs/msg/CameraInfo", message
    return f"/rig/{name}/jpeg", "sensor_msgs/msg/CompressedImage", message


def test_a_car_with_topics_and_frames_of_its_own_becomes_a_scene_of_its_own_cameras(frames, recorded_bag, tmp_path):
    bag = rebagged(recorded_bag, tmp_path / "bag", renamed)
    sides = {"LEFT": "front_left", "AHEAD": "front", "RIGHT": "front_right"}
    given = {
        "cameras": {name: f"/rig/{side}/jpeg" for name, side in sides.items()},
        "infos": {name: f"/calibration/{side}" for name, side in sides.items()},
        "base": "chassis",
        "world": "site",
    }
    done = drives.bag_to_dataset(bag, tmp_path / "data", scene="x", progress=False, **given)
    assert (done.pictures, done.keyframes, done.holes) == (45, 5, 0)
    world = NuScenes(tmp_path / "data", progress=False)
    assert world.cameras == ("LEFT", "AHEAD", "RIGHT"), "those of the tables, in their order"
    read = world.frame(world.keyframes("x")[1])
    places = [pattern.NAMES.index(f"CAM_{side.upper()}") for side in sides.values()]
    ours, theirs = (f.world_from_car @ f.cameras.car_from_camera for f in (read, frames[3]))
    assert torch.allclose(ours, theirs[places], atol=1e-4), "in the world: the newest of three pictures is another"
    assert (read.images.int() - frames[3].images[places].int()).abs().float().mean() < 6
    back = drives.write_scene_bag(tmp_path / "data", "x", tmp_path / "again", progress=False)
    assert (back.pictures, back.keyframes, back.holes) == (45, 5, 0)
    for wrong, words in (
        ({"infos": {}}, "no CameraInfo of LEFT, AHEAD, RIGHT came"),
        ({"infos": {"REAR": "/calibration/front"}}, "a CameraInfo topic of REAR, but the cameras are LEFT, AHEAD"),
        ({"infos": {"LEFT": "/rig/front/jpeg"}}, "no CameraInfo on /rig/front/jpeg"),
        ({"infos": dict.fromkeys(sides, "/calibration/front")}, "LEFT and AHEAD have the same CameraInfo topic"),
        ({"world": "map"}, "TF does not join chassis to map"),
        ({"quality": 0}, "quality is from 1 to 100, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            drives.bag_to_dataset(bag, tmp_path / "other", progress=False, **{**given, **wrong})
        assert not (tmp_path / "other").exists()


def test_bags_that_cannot_become_a_data_set_say_why(recorded_bag, tmp_path):
    def without(*topics):
        name = tmp_path / "-".join(t.strip("/").replace("/", "_") for t in topics)
        return rebagged(recorded_bag, name, lambda _, topic, __, message: None if topic in topics else message)

    for bag, given, words in (
        (without("/tf"), {}, "TF does not join base_link to map or odom"),
        (without("/tf_static"), {}, "TF does not join base_link and cam_"),
        (recorded_bag, {"base": "chassis"}, "TF does not join chassis"),
        (recorded_bag, {"lidar": "/points"}, "no PointCloud2 on /points"),
        (recorded_bag, {"cameras": {"CAM": "/tf"}}, "no images on /tf"),
        (without(*[f"/{n.lower()}/camera_info" for n in pattern.NAMES]), {}, "no image topic with a camera_info"),
    ):
        with pytest.raises(ValueError, match=words):
            drives.bag_to_dataset(bag, tmp_path / "data", progress=False, **given)
        assert not (tmp_path / "data").exists()
    with pytest.raises(FileExistsError, match="exists already"):
        drives.bag_to_dataset(recorded_bag, tmp_path, progress=False)


def test_what_a_scene_lacks_stops_the_bag_or_is_counted(root, tmp_path):
    shutil.copytree(root, tmp_path / "data", ignore=shutil.ignore_patterns(".occflow"))
    world = NuScenes(tmp_path / "data", progress=False)
    gone, cut = (world.data(world.sweeps(SCENE, "CAM_FRONT")[i]).path for i in (3, 4))
    lidar = world.data(world.sweeps(SCENE, "LIDAR_TOP")[2]).path
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-30])
    lidar.write_bytes(lidar.read_bytes()[:-3])
    world.label_path(world.samples(SCENE)[1], "openocc").unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=f"{gone.name}|{cut.name}|{lidar.name}"):
        drives.write_scene_bag(tmp_path / "data", SCENE, tmp_path / "bag", progress=False)
    assert not (tmp_path / "bag").exists()
    done = drives.write_scene_bag(tmp_path / "data", SCENE, tmp_path / "bag", keep_going=True, progress=False)
    assert (done.pictures, done.sweeps, done.truths, sum(done.skipped.values())) == (148, 40, 4, 4)
    for name in (gone.name, cut.name, lidar.name, "labels.npz"):
        assert any(name in reason for reason in done.skipped)
    with pytest.raises(ValueError, match="no row is named 'scene-9'"):
        drives.write_scene_bag(tmp_path / "data", "scene-9", tmp_path / "other", progress=False)
