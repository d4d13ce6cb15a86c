"""A real keyframe of nuScenes: one sweep, boxes, no lidarseg."""

import json

import numpy as np
import pytest
import torch
from recorded import shared

from occflow_core.geometry import OCC3D_GRID, Cameras, rigid
from occflow_core.labels import Keyframe, Sweep, Track, label_scene
from occflow_core.types import OCC3D


@pytest.fixture(scope="module")
def scene0061():
    """(sweep, tracks, keyframe)."""
    folder = shared() / "scene0061_keyframe"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    info = json.loads((folder / "info.json").read_text())
    car_from_lidar, world_from_car = pose(info["lidar_points"]["lidar2ego"]), pose(info["ego2global"])
    stamp = round(info["timestamp"] * 1e6) * 1000
    points = torch.from_numpy(np.fromfile(folder / "LIDAR_TOP.pcd.bin", np.float32).reshape(-1, 5))
    tracks = []
    for i, box in enumerate(info["instances"]):
        if box["name"] not in OCC3D.names:
            continue
        x, y, z, length, width, height, yaw = box["bbox_3d"]
        lidar_from_box = np.eye(4)
        lidar_from_box[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
        lidar_from_box[:3, 3] = [x, y, z]
        at = world_from_car @ car_from_lidar @ torch.from_numpy(lidar_from_box)
        tracks.append(Track(str(i), box["name"], (length, width, height), (stamp,), at[None]))
    cams = info["images"].values()
    cameras = Cameras(
        torch.stack([torch.tensor(cam["cam2img"], dtype=torch.float64) for cam in cams]),
        torch.stack([pose(cam["cam2ego"]) for cam in cams]),
        900,
        1600,
    )
    sweep = Sweep(points, car_from_lidar, world_from_car, stamp)
    return sweep, tracks, Keyframe(info["token"], stamp, world_from_car, cameras)


def pose(rows) -> torch.Tensor:
    matrix = torch.tensor(rows, dtype=torch.float64)
    matrix[:3, :3] = rigid.closest_rotation(matrix[:3, :3])[0]
    return matrix


@pytest.fixture(scope="module")
def label(scene0061):
    sweep, tracks, keyframe = scene0061
    (one,) = label_scene([sweep], tracks, [keyframe])
    return one


def test_points_in_a_box_land_in_voxels_of_its_class(scene0061, label):
    sweep, tracks, keyframe = scene0061
    points = rigid.apply(sweep.car_from_lidar, sweep.points[:, :3].double())
    index, in_grid = OCC3D_GRID.index(points)
    right = total = 0
    for track in tracks:
        box_from_car = rigid.inverse(track.world_from_box[0]) @ keyframe.world_from_car
        local = rigid.apply(box_from_car, points)
        inside = (local.abs() <= torch.tensor(track.size, dtype=torch.float64) / 2).all(1) & in_grid
        total += int(inside.sum())
        right += int((label.occ3d[index[inside].unbind(1)] == OCC3D.id(track.name)).sum())
    assert total > 500 and right / total >= 0.95, (right, total)


def test_road_is_under_the_car_and_free_space_above_it(label):
    road = OCC3D.id("driveable_surface")
    around = label.occ3d[90:125, 96:104]  # 4 m behind to 10 m ahead, 1.6 m to both sides
    under = (around == road).any(-1)
    assert under[20:].float().mean() > 0.9
    above = label.occ3d[112:125, 96:104, 4:8] == OCC3D.free
    assert above.all() and label.mask_lidar[112:125, 96:104, 4:8].float().mean() > 0.95


def test_cameras_see_a_good_part_of_what_the_lidar_did_and_a_box_seen_once_has_no_speed(label):
    assert 0.5 < label.mask_camera.sum() / label.mask_lidar.sum() <= 1
    movers = torch.isin(label.occ3d, torch.tensor(OCC3D.moving_ids, dtype=torch.uint8))
    assert movers.sum() > 100 and torch.equal(torch.isnan(label.flow).any(-1), movers)
