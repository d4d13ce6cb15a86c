"""Real cameras, real calibration: our projection against the plain product of the recorded matrices."""

import numpy as np
import pytest
import torch
from recorded import Scene, scene0103

from occflow_core.geometry import rigid


def plain(info: dict, camera: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (K, 8, 2) and depths (K, 8) of all boxes of a frame in one camera, straight from infos.json."""
    cam = info["cams"][camera]
    pixels_from_camera = np.array(cam["intrinsics"])
    camera_from_lidar = (
        np.linalg.inv(np.array(cam["sensor2ego"]))
        @ np.linalg.inv(np.array(cam["ego2global"]))
        @ np.array(info["ego2global"])
        @ np.array(info["lidar2ego"])
    )
    corners = []
    for x, y, z, length, width, height, yaw in info["gt_boxes_lidar_xyz_lwh_yaw"]:
        c, s = np.cos(yaw), np.sin(yaw)
        for up in (-1, 1):
            for ahead, left in ((1, 1), (1, -1), (-1, -1), (-1, 1)):
                a, b = ahead * length / 2, left * width / 2
                corners.append([x + c * a - s * b, y + s * a + c * b, z + up * height / 2, 1.0])
    seen = (pixels_from_camera @ (camera_from_lidar @ np.array(corners).T)[:3]).T.reshape(-1, 8, 3)
    return seen[..., :2] / seen[..., 2:], seen[..., 2]


@pytest.mark.parametrize("stamp", ["lidar", "newest"])
def test_boxes_fall_where_the_plain_product_of_the_recorded_matrices_puts_them(stamp):
    scene: Scene = scene0103(stamp)
    compared = 0
    for frame, boxes, info in zip(scene.frames, scene.boxes, scene.infos["frames"], strict=True):
        car_from_lidar_car = rigid.inverse(frame.world_from_car) @ torch.tensor(info["ego2global"], dtype=torch.float64)
        corners = torch.stack([rigid.apply(car_from_lidar_car, box.corners) for box in boxes])
        for i, name in enumerate(frame.names):
            pixels, depth = frame.cameras[i].project(corners.reshape(-1, 3))
            theirs, their_depth = plain(info, name)
            ahead = their_depth.reshape(-1) > 0.5
            assert np.abs(depth.numpy() - their_depth.reshape(-1))[ahead].max(initial=0) < 1e-6
            assert np.abs(pixels.numpy() - theirs.reshape(-1, 2))[ahead].max(initial=0) < 0.5
            compared += ahead.sum()
    assert compared > 1000


def test_the_cars_motion_between_the_stamps_matters():
    """Without it the boxes would be off: the test above must be able to fail."""
    scene = scene0103("lidar")
    worst = 0.0
    for frame, boxes in zip(scene.frames, scene.boxes, strict=True):
        corners = torch.cat([box.corners for box in boxes])
        for moved, mounted in zip(frame.cameras.to(torch.float64), scene.rig, strict=True):
            seen = moved.sees(corners) & mounted.sees(corners)
            shift = (moved.project(corners)[0] - mounted.project(corners)[0])[seen].abs()
            worst = max(worst, float(shift.max()) if len(shift) else 0.0)
    assert worst > 5.0


def test_both_tellings_of_a_frame_are_the_same_cameras_in_the_world():
    for one, other in zip(scene0103("lidar").frames, scene0103("newest").frames, strict=True):
        assert one.stamp != other.stamp and other.stamp == int(other.stamps.max())
        first = one.world_from_car @ one.cameras.car_from_camera
        second = other.world_from_car @ other.cameras.car_from_camera
        assert (first - second).abs().max() < 1e-9
