"""A set and the scans before it become one Frame; without a scan, where the model needs one, nothing is answered."""

import numpy as np
import pytest
import torch

from occflow_core.geometry import rigid
from occflow_ros.assemble import Calibration, Cloud, ImageSet, Scans, Shot
from occflow_ros.frames import TransformBuffer
from occflow_ros.health import Health
from occflow_ros.pipeline import Pipeline

MS = 1_000_000
START = 1_700_000_000_000 * MS
MOUNT = rigid.from_quaternion((0.5**0.5, 0.0, 0.0, 0.5**0.5), (1.0, 0.0, 1.8))  # of the LiDAR: it looks to the left


class Picture:
    height, width = 8, 12

    def decode_into(self, out):
        out[:] = 90


class Asked:
    """A stream that keeps what it was given."""

    def __init__(self):
        self.frames, self.seconds = [], {}

    def step(self, frame):
        self.frames.append(frame)
        return "a prediction"


def rig(scans, said):
    """A car that drives 10 m/s along x, one camera, one LiDAR."""
    transforms = TransformBuffer()
    still = torch.eye(4, dtype=torch.float64)
    transforms.add("base_link", "camera", START, still, static=True)
    transforms.add("base_link", "lidar", START, MOUNT, static=True)
    for k in range(11):
        pose = still.clone()
        pose[0, 3] = 600.0 + 1.0 * k
        transforms.add("map", "base_link", START + 100 * k * MS, pose, static=False)
    health, stream = Health(["camera"], "net", lidar=True), Asked()
    health.activate(0.0)
    say = lambda key, sentence: said.append(sentence)  # noqa: E731
    names = ["camera"], ["/camera/image"]
    return Pipeline(*names, transforms, stream, health, "map", "base_link", 0.0, 1, say, scans), health, stream


def images(ms: int) -> ImageSet:
    calibration = Calibration(np.diag([20.0, 20.0, 1.0]), 8, 12, "camera")
    return ImageSet((Shot(Picture(), calibration),), (START + ms * MS,), 0)


def cloud(ms: int, frame="lidar") -> Cloud:
    return Cloud(np.array([[5.0, 0.0, -1.0, 30.0, 4.0]], np.float32), frame, START + ms * MS)


def test_scans_lie_where_the_car_is_at_the_sets_stamp():
    scans, said = Scans("/lidar", 2, 0.05), []
    pipeline, _, stream = rig(scans, said)
    for ms in (250, 300, 350, 400):
        scans.add(cloud(ms))
    assert pipeline.serve(images(360)).prediction == "a prediction" and not said
    points = stream.frames[0].points
    # 5 m ahead of a LiDAR that looks to the left; the car has driven on by 0.1 m and 0.6 m since
    expected = [[1.0 - 0.1, 5.0, 0.8, 30.0, 0.01], [1.0 - 0.6, 5.0, 0.8, 30.0, 0.06]]
    assert torch.allclose(points, torch.tensor(expected), atol=1e-4)
    pipeline.close()


def test_cameras_alone_ask_for_no_scan():
    pipeline, _, stream = rig(None, [])
    assert pipeline.serve(images(300)) is not None and stream.frames[0].points is None
    pipeline.close()


@pytest.mark.parametrize(
    ("ms", "frame", "words"),
    [
        (None, "lidar", "/lidar: a set was refused: no scan came yet, and the model needs LiDAR"),
        (100, "lidar", "/lidar: a set was refused: the newest scan is 0.80 s old, expected at most 0.5 s"),
        (850, "nowhere", "/lidar: a set was refused: no scan's transform is known"),
    ],
)
def test_without_a_scan_that_can_be_used_the_set_is_refused_and_the_reason_is_said(ms, frame, words):
    scans, said = Scans("/lidar", 2, 0.05), []
    pipeline, health, stream = rig(scans, said)
    if ms is not None:
        scans.add(cloud(ms, frame))
    assert pipeline.serve(images(900)) is None and not stream.frames
    assert said[-1].startswith(words)
    whole = health.report(0.0)[0]
    assert whole.values["sets dropped: no LiDAR scan"] == 1 and words in whole.message
    scans.add(cloud(890))  # and once there is one, it goes on
    assert pipeline.serve(images(900)) is not None
    pipeline.close()


def test_a_scan_whose_transform_is_unknown_is_left_out():
    scans, said = Scans("/lidar", 3, 0.05), []
    pipeline, health, stream = rig(scans, said)
    for ms, frame in ((800, "lidar"), (850, "nowhere"), (900, "lidar")):
        scans.add(cloud(ms, frame))
    assert pipeline.serve(images(900)) is not None
    assert torch.allclose(stream.frames[0].points[:, 4], torch.tensor([0.0, 0.1]))
    assert health.report(0.0)[2].values["dropped: no transform"] == 1
    assert "TF has not named nowhere" in said[0]
    pipeline.close()
