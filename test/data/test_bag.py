"""A bag holds what a car would have recorded, is whole or not there, and says so."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from recorded import scene0103

from occflow_core.data import bag as bags
from occflow_core.data import pattern
from occflow_core.geometry import Cameras, Grid, rigid
from occflow_core.types import OCC3D, Prediction
from occflow_core.voxelflow import pack, unpack

yaml = pytest.importorskip("ruamel.yaml", reason="comes with rosbags")
HEIGHT, WIDTH = 90, 160


@pytest.fixture(scope="module")
def frames():
    return list(pattern.drive(4, height=HEIGHT, width=WIDTH))


@pytest.fixture(scope="module")
def rig() -> Cameras:
    return pattern.rig(HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, frames, rig):
    path = tmp_path_factory.mktemp("bag") / "drive"
    bags.write_bag(path, frames, rig, progress=False)
    return path


def stamp_of(header) -> int:
    return header.stamp.sec * 10**9 + header.stamp.nanosec


def pose_of(transform) -> torch.Tensor:
    q, t = transform.rotation, transform.translation
    return rigid.from_quaternion([q.w, q.x, q.y, q.z], [t.x, t.y, t.z])


def poses(path) -> dict[int, torch.Tensor]:
    """map <- base_link by stamp."""
    found = {}
    for _, _, message in bags.read_bag(path, ["/tf"]):
        for one in message.transforms:
            assert (one.header.frame_id, one.child_frame_id) == ("map", "base_link")
            assert stamp_of(one.header) not in found, "a pose is told once"
            found[stamp_of(one.header)] = pose_of(one.transform)
    return found


def mounts(path) -> dict[str, torch.Tensor]:
    ((_, _, message),) = bags.read_bag(path, ["/tf_static"])
    assert all(one.header.frame_id == "base_link" for one in message.transforms)
    return {one.child_frame_id: pose_of(one.transform) for one in message.transforms}


def world_from_camera_by_tf(path, name: str, stamp: int) -> torch.Tensor:
    return poses(path)[stamp] @ mounts(path)[f"{name.lower()}_optical_frame"]


@pytest.mark.parametrize("telling", ["lidar", "newest"])
def test_tf_of_a_recorded_scene_puts_every_camera_where_its_own_pose_says(tmp_path, telling):
    """The chain map <- base_link <- camera at the camera's own stamp is infos.json's ego2global @ sensor2ego."""
    scene = scene0103(telling)
    bags.write_bag(tmp_path / "b", scene.frames, scene.rig, scene.jpegs, progress=False)
    moved, fixed = poses(tmp_path / "b"), mounts(tmp_path / "b")
    for info in scene.infos["frames"]:
        for name, cam in info["cams"].items():
            by_tf = moved[cam["timestamp_us"] * 1000] @ fixed[f"{name.lower()}_optical_frame"]
            told = np.array(cam["ego2global"]) @ np.array(cam["sensor2ego"])
            assert np.abs(by_tf.numpy() - told).max() < 1e-6, name
    stamps = {frame.stamp for frame in scene.frames}
    assert stamps <= set(moved), "the frame's own stamp has a pose too"


def test_recorded_files_are_stored_as_they_are(tmp_path):
    scene = scene0103("lidar")
    bags.write_bag(tmp_path / "b", scene.frames[:1], scene.rig, scene.jpegs[:1], progress=False)
    for name, file in zip(scene.frames[0].names, scene.jpegs[0]):
        ((_, _, message),) = bags.read_bag(tmp_path / "b", [f"/{name.lower()}/image_raw/compressed"])
        assert message.data.tobytes() == file and message.format == "jpeg"


def test_every_picture_and_its_calibration_carry_the_cameras_own_stamp_and_frame(folder, frames):
    for i, name in enumerate(pattern.NAMES):
        topics = [f"/{name.lower()}/image_raw/compressed", f"/{name.lower()}/camera_info"]
        got = {topic: [] for topic in topics}
        for topic, time, message in bags.read_bag(folder, topics):
            assert time == stamp_of(message.header)
            assert message.header.frame_id == f"{name.lower()}_optical_frame"
            got[topic].append(message)
        for topic in topics:
            assert [stamp_of(m.header) for m in got[topic]] == [int(f.stamps[i]) for f in frames]
        for message, frame in zip(got[topics[0]], frames):
            back = torch.from_numpy(cv2.imdecode(message.data, cv2.IMREAD_COLOR)[..., ::-1].copy()).permute(2, 0, 1)
            difference = (back.float() - frame.images[i].float()).abs()
            assert difference.mean() < 4.0, "the picture, in its colours"
        for message, frame in zip(got[topics[1]], frames):
            k = frame.cameras.pixels_from_camera[i].numpy()
            assert (message.height, message.width, message.distortion_model) == (HEIGHT, WIDTH, "plumb_bob")
            assert np.array_equal(message.k.reshape(3, 3), k) and not message.d.any()
            assert np.array_equal(message.p.reshape(3, 4), np.hstack([k, np.zeros((3, 1))]))
            assert np.array_equal(message.r.reshape(3, 3), np.eye(3))


def test_messages_are_in_time_order_and_a_picture_comes_after_its_pose_and_calibration(folder):
    times, known, calibrated = [], set(), set()
    for topic, time, message in bags.read_bag(folder):
        times.append(time)
        if topic == "/tf":
            known.update(stamp_of(one.header) for one in message.transforms)
        elif topic.endswith("camera_info"):
            calibrated.add((topic.split("/")[1], stamp_of(message.header)))
        elif topic.endswith("compressed"):
            assert stamp_of(message.header) in known, "its pose"
            assert (topic.split("/")[1], stamp_of(message.header)) in calibrated, "its CameraInfo"
    assert times == sorted(times) and len(times) == 1 + 4 * (6 + 12)  # the newest camera's pose is the frame's own


def test_the_metadata_is_what_ros2_bag_play_expects(folder):
    info = yaml.YAML(typ="safe").load((folder / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert info["version"] == 8 and info["storage_identifier"] == "mcap"  # 8: read by Humble, Jazzy and Kilted
    assert info["relative_file_paths"] == [f["path"] for f in info["files"]]
    assert all((folder / path).is_file() for path in info["relative_file_paths"])
    assert (info["compression_format"], info["compression_mode"]) == ("", "")
    topics = {t["topic_metadata"]["name"]: t for t in info["topics_with_message_count"]}
    assert info["message_count"] == sum(t["message_count"] for t in topics.values())
    times = [time for _, time, _ in bags.read_bag(folder)]
    assert info["starting_time"]["nanoseconds_since_epoch"] == times[0]
    assert info["duration"]["nanoseconds"] == times[-1] - times[0]
    for name, topic in topics.items():
        meta = topic["topic_metadata"]
        assert meta["serialization_format"] == "cdr" and meta["type_description_hash"].startswith("RIHS01_")
        (qos,) = yaml.YAML(typ="safe").load(meta["offered_qos_profiles"])  # up to version 8 a YAML text within YAML
        assert qos["durability"] == (1 if name == "/tf_static" else 2), "1 = transient local, 2 = volatile"
        assert qos["reliability"] == 1 and qos["history"] == 1 and qos["depth"] >= 1
    assert topics["/tf_static"]["message_count"] == 1
    assert topics["/tf"]["topic_metadata"]["type"] == "tf2_msgs/msg/TFMessage"


def test_type_hashes_are_those_of_the_installed_ros(folder):
    """The RIHS01 hashes in the metadata against the ones that rosidl wrote when the message packages were built."""
    pytest.importorskip("rclpy", reason="needs ROS 2: make setup")
    info = yaml.YAML(typ="safe").load((folder / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    prefixes = [Path(p) for p in [sys.prefix, *os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)] if p]
    compared = 0
    for topic in info["topics_with_message_count"]:
        kind, package = topic["topic_metadata"]["type"], topic["topic_metadata"]["type"].split("/")[0]
        for described in (p / "share" / package / f"{kind.removeprefix(package)[1:]}.json" for p in prefixes):
            if described.exists():
                hashes = {h["type_name"]: h["hash_string"] for h in json.loads(described.read_text())["type_hashes"]}
                assert topic["topic_metadata"]["type_description_hash"] == hashes[kind]
                compared += 1
    assert compared >= 3, f"no type descriptions under {prefixes}"


def test_definitions_travel_in_the_file(folder):
    from rosbags.rosbag2 import Reader

    with Reader(folder) as reader:
        for connection in reader.connections:
            assert connection.msgdef.data.strip(), connection.topic


def test_a_camera_that_is_not_used_is_not_written(tmp_path, frames, rig):
    dead = pattern.NAMES.index("CAM_BACK")
    used = torch.ones(6, dtype=torch.bool)
    used[dead] = False
    late = [replace(frames[0], used=used), frames[1]]
    bags.write_bag(tmp_path / "b", late, rig, progress=False)
    found = list(bags.read_bag(tmp_path / "b"))
    assert sum(topic.startswith("/cam_back/") for topic, _, _ in found) == 2  # of the second frame only
    assert sum(topic.endswith("compressed") for topic, _, _ in found) == 11
    assert int(frames[0].stamps[dead]) not in poses(tmp_path / "b")


def test_a_parked_car_keeps_telling_where_it_is_once_a_stamp(tmp_path, frames, rig):
    """All cameras at one instant, the car standing: one pose a frame, stamps rising."""
    still = [
        replace(
            frames[0],
            cameras=replace(rig, car_from_camera=rig.car_from_camera),
            stamps=torch.full((6,), 10**9 * k),
            stamp=10**9 * k,
        )
        for k in (5, 6, 7)
    ]
    bags.write_bag(tmp_path / "b", still, rig, progress=False)
    assert list(poses(tmp_path / "b")) == [5 * 10**9, 6 * 10**9, 7 * 10**9]


def test_a_rig_that_holds_the_cars_motion_is_refused(tmp_path, frames, rig):
    """Six cameras at one stamp cannot put the car in six places."""
    shifted = rig.car_from_camera.clone()
    shifted[3, 0, 3] += 0.2
    one = replace(frames[0], cameras=rig, stamps=torch.full((6,), frames[0].stamp))
    with pytest.raises(ValueError, match="pure mounting"):
        bags.write_bag(tmp_path / "b", [one], replace(rig, car_from_camera=shifted), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_frames_out_of_order_and_of_another_rig_are_refused_and_leave_nothing(tmp_path, frames, rig):
    with pytest.raises(ValueError, match="time order"):
        bags.write_bag(tmp_path / "b", [frames[2], frames[0]], rig, progress=False)
    with pytest.raises(ValueError, match=r"expected .* with a rig of \(5,\)"):
        bags.write_bag(tmp_path / "b", frames[:1], rig[:5], progress=False)
    with pytest.raises(ValueError, match="CAM_FRONT: .* not a JPEG"):
        bags.write_bag(tmp_path / "b", frames[:1], rig, [[b"GIF89a"] * 6], progress=False)
    with pytest.raises(ValueError, match="jpegs ended after 1"):
        bags.write_bag(tmp_path / "b", frames[:2], rig, [[b"\xff\xd8"] * 6], progress=False)
    with pytest.raises(ValueError, match="nothing was written"):
        bags.write_bag(tmp_path / "b", [], rig, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_nothing_under_the_name(tmp_path, frames, rig):
    def stream():
        yield frames[0]
        assert not (tmp_path / "b").exists(), "nothing stands there before the end"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bags.write_bag(tmp_path / "b", stream(), rig, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_written_over(tmp_path, frames, rig):
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        bags.write_bag(tmp_path / "b", frames[:1], rig, progress=False)


def test_what_is_not_a_whole_bag_is_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no such bag"):
        bags.read_bag(tmp_path / "none")
    (tmp_path / "half").mkdir()
    with pytest.raises(ValueError, match="not a whole bag"):
        bags.read_bag(tmp_path / "half")
    cut = tmp_path / "cut.mcap"
    whole = next(folder.glob("*.mcap")).read_bytes()
    for length in (0, 3, 40, len(whole) // 2, len(whole) - 5):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole bag"):
            list(bags.read_bag(cut))
    with pytest.raises(ValueError, match="no topic /up; the bag has /cam_back/camera_info"):
        bags.read_bag(folder, ["/up"])


def test_a_part_of_the_time_is_that_part(folder):
    whole = [(topic, time) for topic, time, _ in bags.read_bag(folder)]
    start, stop = whole[10][1], whole[40][1]
    part = [(topic, time) for topic, time, _ in bags.read_bag(folder, start=start, stop=stop)]
    assert part == [(topic, time) for topic, time in whole if start <= time < stop] and part


def test_voxelflow_messages_come_back_from_objects_and_from_bytes(tmp_path):
    rng = torch.Generator().manual_seed(0)
    grid = Grid((-2.0, -2.0, -1.0), (0.4, 0.4, 0.4), (10, 10, 5))
    labels = torch.randint(0, 18, grid.shape, generator=rng, dtype=torch.uint8)
    flow = torch.rand(*grid.shape, 2, generator=rng) * torch.isin(labels, torch.tensor(OCC3D.moving_ids))[..., None]
    before = Prediction(grid, OCC3D, labels, (labels != 17).float(), flow, labels == 3)
    with bags.BagWriter(tmp_path / "b") as bag:
        bag.add("/occupancy", "occflow_msgs/msg/VoxelFlow")
        message = voxel_flow(bag.types, pack(before, ["front"], [True], [0], "made up", moving_speed=0.0), 7, grid.low)
        bag.write("/occupancy", 7, message)
        bag.write("/occupancy", 8, bytes(bag.types.serialize_cdr(message, "occflow_msgs/msg/VoxelFlow")))
    for _, _, message in bags.read_bag(tmp_path / "b"):
        after = unpack(message)
        assert torch.equal(after.labels, labels) and torch.equal(after.flow, flow)
        assert torch.equal(after.unobserved, labels == 3) and message.model_name == "made up"


def voxel_flow(types, fields: dict, stamp: int, low):
    """A VoxelFlow object of rosbags' from `pack`'s fields."""
    make = types.types
    header = make["std_msgs/msg/Header"](make["builtin_interfaces/msg/Time"](*divmod(stamp, 10**9)), "base_link")
    place = make["geometry_msgs/msg/Pose"](
        make["geometry_msgs/msg/Point"](*low), make["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, 1.0)
    )
    return make["occflow_msgs/msg/VoxelFlow"](header=header, origin=place, **fields)


def test_topics_and_types_that_nobody_announced_are_refused(tmp_path):
    with pytest.raises(ValueError, match="/b was not added"), bags.BagWriter(tmp_path / "x") as bag:
        bag.write("/b", 0, b"")
    with pytest.raises(ValueError, match="no_msgs/msg/Thing is not known"), bags.BagWriter(tmp_path / "x") as bag:
        bag.add("/b", "no_msgs/msg/Thing")
    with pytest.raises(ValueError, match="/b was added before"), bags.BagWriter(tmp_path / "x") as bag:
        bag.add("/b", "std_msgs/msg/String")
        bag.add("/b", "std_msgs/msg/String")
    assert list(tmp_path.iterdir()) == []
