"""The node over real DDS, between separate processes: what goes in, what must come out, what must not kill it."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from data import layout
from recorded import scene0103

from occflow_core.data import pattern
from occflow_core.data.bag import write_bag
from occflow_core.data.drives import write_scene_bag
from occflow_core.geometry import OCC3D_GRID
from occflow_core.runtime import load
from occflow_core.types import NANO
from occflow_core.voxelflow import NO_IMAGE, unpack

pytest.importorskip("rclpy", reason="needs ROS 2")
from occflow_core.demo import CONFIG, Recording, drive  # noqa: E402

pytestmark = [pytest.mark.dds, pytest.mark.timeout(240)]


def said(recording: Recording) -> list:
    """The VoxelFlow messages of a drive."""
    from occflow_msgs.msg import VoxelFlow
    from rclpy.serialization import deserialize_message

    return [deserialize_message(raw, VoxelFlow) for _, raw in recording.occupancy]


def stamp(message) -> int:
    return message.header.stamp.sec * NANO + message.header.stamp.nanosec


def config(folder: Path, **changes) -> Path:
    """A parameter file with a few values changed; `camera_rate=2.0`, or `camera={"cam_front": {...}}`."""
    content = yaml.safe_load(CONFIG.read_text())
    parameters = content["/**"]["ros__parameters"]
    for name, value in changes.items():
        if name == "camera":
            for camera, settings in value.items():
                parameters["camera"][camera].update(settings)
        else:
            parameters[name] = value
    path = folder / "parameters.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def recorded_bag(folder: Path, without: str | None = None) -> tuple[Path, list[int], tuple[str, ...]]:
    """Four recorded keyframes as a bag; the stamps the node must answer with; the cameras' names."""
    scene = scene0103("newest")
    frames, jpegs, stamps = [], [], []
    for frame, files in zip(scene.frames, scene.jpegs, strict=True):
        used = torch.tensor([name != without for name in frame.names])
        frames.append(replace(frame, used=used))
        jpegs.append([file if here else None for file, here in zip(files, used, strict=True)])
        stamps.append(int(frame.stamps[used].max()))
    write_bag(folder / "bag", frames, scene.rig, jpegs, progress=False)
    return folder / "bag", stamps, frames[0].names


@pytest.mark.parametrize("without", [None, "CAM_BACK_LEFT"], ids=["six cameras", "one withheld"])
def test_four_recorded_sets_give_four_messages_that_say_which_cameras_they_saw(tmp_path, without):
    bag, stamps, names = recorded_bag(tmp_path, without)
    order = [name.lower() for name in yaml.safe_load(CONFIG.read_text())["/**"]["ros__parameters"]["cameras"]]
    recording = drive(bag, config(tmp_path, camera_rate=2.0, set_deadline=1.0), rate=0.3, answered=True)
    messages = said(recording)
    assert [stamp(m) for m in messages] == stamps, recording.log
    assert recording.node_exit == 0
    sets = "sets complete" if without is None else "sets partial"
    assert recording.counts()[sets] == "4"
    told = recording.counts()
    assert told["trained"] == "true" and load().weights.startswith(told["weights SHA-256"])
    assert float(told["resident memory MB"]) > 100 and abs(float(told["TF age s"])) < 1.0
    sent = {name.lower(): i for i, name in enumerate(names)}
    for message, frame in zip(messages, scene0103("newest").frames, strict=True):
        assert message.header.frame_id == "base_link"
        assert list(message.cameras) == order and message.cameras_expected == 0b111111
        for bit, name in enumerate(order):
            gone = without is not None and name == without.lower()
            assert bool(message.cameras_used >> bit & 1) != gone
            age = (stamp(message) - int(frame.stamps[sent[name]])) // 1000
            assert message.camera_age_us[bit] == (NO_IMAGE if gone else age)
        assert message.grid_size.tolist() == [200, 200, 16]
        assert message.voxel_size.tolist() == pytest.approx([0.4] * 3)
        assert message.label_set == "openocc-v2" and message.model_name == "opus-demo"
        prediction = unpack(message)
        assert prediction.grid == OCC3D_GRID
        # nobody looks into the ground below the car; far ahead at eye height somebody does unless something is there
        assert prediction.unobserved[100, 100, 0] and not prediction.unobserved.all()
        assert len(message.index) > 0


def test_a_withheld_cameras_own_field_of_view_is_unobserved(tmp_path):
    bag, _, _ = recorded_bag(tmp_path, "CAM_BACK")
    recording = drive(bag, config(tmp_path, camera_rate=2.0, set_deadline=1.0), rate=0.3, answered=True)
    behind = OCC3D_GRID.index(torch.tensor([[-15.0, 0.0, 1.0], [-25.0, 1.0, 1.4]]))[0]
    assert len(said(recording)) == 4
    for message in said(recording):
        assert unpack(message).unobserved[tuple(behind.T)].all()


def test_what_is_broken_is_refused_by_name_and_the_rest_goes_on(tmp_path):
    """Three cameras of a generated drive send broken JPEGs, a lying CameraInfo, and an unknown frame."""
    frames = list(pattern.drive(8, rate=4.0, height=180, width=320))
    jpegs = []
    import simplejpeg

    for frame in frames:
        files = [simplejpeg.encode_jpeg(image.permute(1, 2, 0).contiguous().numpy()) for image in frame.images]
        files[0] = files[0][: len(files[0]) // 2]
        jpegs.append(files)
    bag = tmp_path / "bag"
    write_bag(bag, frames, pattern.rig(180, 320), jpegs, progress=False)
    broken = {
        "cam_back": {"info_topic": "/cam_back_left/camera_info_nobody_sends"},
        "cam_back_right": {"compressed": False},  # listens as Image to a CompressedImage topic: hears nothing
    }
    parameters = config(tmp_path, camera_rate=4.0, set_deadline=0.4, camera=broken)
    # the replay waits as long as it may: one of the topics never has a subscriber of its type
    recording = drive(bag, parameters, rate=0.3, start_within=25.0, answered=True)
    cameras = [name.lower() for name in frames[0].names]
    messages = said(recording)
    assert len(messages) >= 6, recording.log
    bits = {name: i for i, name in enumerate(messages[0].cameras)}
    expected = sum(1 << bits[c] for c in cameras if c not in ("cam_front", "cam_back", "cam_back_right"))
    assert {m.cameras_used for m in messages} == {expected}
    # one line each in five seconds, with the topic, what came and what was expected
    assert "/cam_front/image_raw/compressed: refused: a broken JPEG" in recording.log
    assert "expected a whole picture of 320 x 180" in recording.log
    unheard = "/cam_back/image_raw/compressed: refused: no usable CameraInfo on /cam_back_left/camera_info_nobody_sends"
    assert unheard in recording.log
    for words in ("broken JPEG", "camera_info_nobody_sends yet"):
        said_at = [float(at) for at in re.findall(rf"\[(\d+\.\d+)\] \[occflow\]:.*{words}", recording.log)]
        assert len(said_at) == recording.log.count(words) >= 1, recording.log
        assert all(after - before > 4.0 for before, after in pairwise(said_at)), recording.log
    assert recording.node_exit == 0
    told = recording.cameras()
    assert int(told["cam_front"]["dropped: broken image"]) >= 6
    assert "no" in told["cam_front"]["message"]  # its images came, none could be used
    assert "no image yet" in told["cam_back_right"]["message"]


def test_with_approximate_sync_only_complete_sets_are_answered_and_a_dead_camera_is_silence(tmp_path):
    frames = list(pattern.drive(8, rate=4.0, height=180, width=320))
    seeing = torch.arange(6) != 2
    frames = [frame if k < 5 else replace(frame, used=seeing) for k, frame in enumerate(frames)]
    bag = tmp_path / "bag"
    write_bag(bag, frames, pattern.rig(180, 320), progress=False)
    parameters = config(tmp_path, camera_rate=4.0, sync="approximate", approximate_slop=0.1)
    recording = drive(bag, parameters, rate=0.3)
    answered = [stamp(m) for m in said(recording)]  # the newest wins where the machine is slow
    assert answered and set(answered) <= {frame.stamp for frame in frames[:5]}, recording.log
    assert all(m.cameras_used == 0b111111 for m in said(recording))
    assert "while one camera is silent nothing is published" in recording.log
    assert recording.counts()["sets complete"] == "5" and recording.node_exit == 0


def test_a_frozen_camera_is_said_and_masked_and_the_rest_goes_on(tmp_path):
    """The stamps of one camera run on, its picture stands still after the first."""
    import simplejpeg

    frames, jpegs = list(pattern.drive(8, rate=4.0, height=180, width=320)), []
    for frame in frames:
        files = [simplejpeg.encode_jpeg(image.permute(1, 2, 0).contiguous().numpy()) for image in frame.images]
        jpegs.append([jpegs[0][0], *files[1:]] if jpegs else files)
    bag, frozen = tmp_path / "bag", frames[0].names[0].lower()
    write_bag(bag, frames, pattern.rig(180, 320), jpegs, progress=False)
    parameters = config(tmp_path, camera_rate=4.0, set_deadline=0.4)
    recording = drive(bag, parameters, rate=0.3, answered=True)
    messages = said(recording)
    assert len(messages) == 8, recording.log
    bit = 1 << list(messages[0].cameras).index(frozen)
    assert [m.cameras_used for m in messages[:1] + messages[2:]] == [0b111111] + [0b111111 & ~bit] * 6
    assert f"/{frozen}/image_raw/compressed: refused: the camera is frozen: the picture of" in recording.log
    told = recording.cameras()[frozen]
    assert int(told["dropped: frozen: same picture"]) >= 6 and "frozen" in told["message"]


def test_without_ego_motion_nothing_is_published_and_the_reason_is_said(tmp_path):
    bag = tmp_path / "bag"
    write_bag(bag, pattern.drive(6, rate=4.0, height=180, width=320), pattern.rig(180, 320), progress=False)
    recording = drive(bag, config(tmp_path, camera_rate=4.0, fixed_frame="odom"), settle=1.0)
    assert recording.occupancy == []
    assert "TF has not named odom" in recording.log
    assert recording.node_exit == 0


@pytest.mark.parametrize("model", ["opus-v2-nano", "opus-fusion-nano", "sparseocc4d-nano"])
def test_another_system_drives_by_changing_one_parameter(tmp_path, model):
    layout.write(tmp_path / "data", keyframes=2)
    write_scene_bag(tmp_path / "data", "scene-0001", tmp_path / "bag", progress=False)
    recording = drive(tmp_path / "bag", config(tmp_path, model=model), ["set_deadline:=0.5"], rate=0.2, answered=True)
    assert recording.node_exit == 0 and len(said(recording)) >= 2, recording.log
    assert {m.model_name for m in said(recording)} == {f"{model} (untrained)"}


@pytest.mark.parametrize("topic", ["/lidar_top/points", "/nobody"])
def test_a_model_that_needs_lidar_answers_with_it_and_says_why_it_does_not_without(tmp_path, topic):
    layout.write(tmp_path / "data", keyframes=2)
    write_scene_bag(tmp_path / "data", "scene-0001", tmp_path / "bag", progress=False)
    there = topic != "/nobody"
    parameters = config(tmp_path, model="opus-fusion-nano", lidar_topic=topic)
    recording = drive(tmp_path / "bag", parameters, ["set_deadline:=0.5"], rate=0.2, answered=there)
    assert recording.node_exit == 0 and f"for scans on {topic}" in recording.log
    lidar = recording.cameras()["LiDAR"]
    if there:
        assert len(said(recording)) >= 2, recording.log
        assert {m.model_name for m in said(recording)} == {"opus-fusion-nano (untrained)"}
        assert float(lidar["rate Hz"]) > 0
    else:
        assert recording.occupancy == []
        assert "/nobody: a set was refused: no scan came yet, and the model needs LiDAR" in recording.log
        assert lidar["message"] == "no scan yet" and int(recording.counts()["sets dropped: no LiDAR scan"]) >= 2


def node(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "occflow_ros.node", "--ros-args", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "ROS_DOMAIN_ID": "97"},
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "speed:=3"], "unknown parameter speed"),
        (["-p", "min_cameras:=9"], "min_cameras out of range"),
        (["-p", "camera_rate:=fast"], "camera_rate"),
        (["-p", "min_cameras:=7"], "min_cameras: 7 of 6"),
        (["-p", "camera.cam_front.info_topic:='bad topic'"], "camera.cam_front.info_topic: 'bad topic'"),
        (["-p", "cameras:=['cam-front', b]"], "camera.cam-front.image_topic"),
        (["-p", "camera.cam_back.info_topic:=/cam_front/camera_info"], "two cameras share a topic"),
        (["-p", "cameras:=[a,a]"], "different names, got ['a', 'a']"),
        (["-p", "weights:=nowhere.safetensors"], "nowhere.safetensors"),
        (["-p", "model:=opus-nanoo"], "nearest is 'opus-nano'"),
        (["-p", "device:=cuda:7"], "cuda:7"),
        (["--params-file", "no_such_file.yaml"], "no_such_file.yaml"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_a_start_that_cannot_be_ends_with_one_sentence_and_a_code(arguments, words):
    ended = node(*arguments)
    assert ended.returncode == 1
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_bad_yaml_is_named(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: [b\n")
    ended = node("--params-file", str(path))
    assert ended.returncode == 1 and "bad.yaml" in ended.stderr and "Traceback" not in ended.stderr


def test_weights_that_do_not_fit_are_named(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "foreign.safetensors"
    save_file({"weight": np.zeros(3, np.float32)}, path)
    ended = node("-p", f"weights:={path}")
    assert ended.returncode == 1 and "foreign.safetensors" in ended.stderr and "Traceback" not in ended.stderr


def test_without_the_messages_the_node_says_so_in_one_sentence(tmp_path):
    """A package of that name without messages stands before the real one, as on a machine that did not build them."""
    (tmp_path / "occflow_msgs").mkdir()
    (tmp_path / "occflow_msgs" / "__init__.py").write_text("")
    ended = subprocess.run(
        [sys.executable, "-m", "occflow_ros.node"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert ended.returncode == 1
    assert ended.stderr.strip().count("\n") == 0 and "occflow_msgs" in ended.stderr and "colcon build" in ended.stderr
