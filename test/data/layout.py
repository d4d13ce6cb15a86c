"""A small exact world in nuScenes' layout, for tests: a car on a circle, boxes that drive, pictures of one colour each.

Run as a program it writes tables of trainval's size (no pictures): `python test/data/layout.py OUT --scenes 850`.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import cv2
import numpy as np

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
RADARS = ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT", "RADAR_BACK_LEFT", "RADAR_BACK_RIGHT")
EARLIER = (0.035, 0.027, 0.043, 0.010, 0.0, 0.020)  # s before the LiDAR's stamp, each camera
YAW = (0.0, -55.0, 55.0, 180.0, 108.0, -110.0)  # degrees from ahead
BEGIN = 1_531_883_530_449_377  # us
HEIGHT, WIDTH = 18, 32
FOCAL = 16.0
CATEGORIES = (  # the 23 of boxes, and those that only LiDAR points have; place = index of nuScenes-lidarseg
    "noise animal human.pedestrian.adult human.pedestrian.child human.pedestrian.construction_worker "
    "human.pedestrian.personal_mobility human.pedestrian.police_officer human.pedestrian.stroller "
    "human.pedestrian.wheelchair movable_object.barrier movable_object.debris movable_object.pushable_pullable "
    "movable_object.trafficcone static_object.bicycle_rack vehicle.bicycle vehicle.bus.bendy vehicle.bus.rigid "
    "vehicle.car vehicle.construction vehicle.emergency.ambulance vehicle.emergency.police vehicle.motorcycle "
    "vehicle.trailer vehicle.truck flat.driveable_surface flat.other flat.sidewalk flat.terrain static.manmade "
    "static.other static.vegetation vehicle.ego"
).split()
ATTRIBUTES = ("vehicle.moving", "vehicle.parked", "pedestrian.moving")


def token(*words) -> str:
    return hashlib.md5("/".join(map(str, words)).encode()).hexdigest()


def quaternion(yaw: float) -> list[float]:
    return [math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]


def car_pose(seconds: float) -> tuple[list[float], list[float]]:
    """Translation (m) and quaternion (w x y z) of the car: 8 m/s on a circle of 60 m, far from the map's origin."""
    angle = 8.0 / 60.0 * seconds
    return [600 + 60 * math.cos(angle), 1600 + 60 * math.sin(angle), 0.5], quaternion(angle + math.pi / 2)


def box_pose(number: int, seconds: float) -> tuple[list[float], list[float]]:
    """Box `number` drives along x at (number + 1) m/s."""
    return [590.0 + (number + 1) * seconds, 1650.0 + 4 * number, 1.0], quaternion(0.1 * number)


def colour(camera: int, step: int) -> tuple[int, int, int]:
    """RGB of the picture number `step` (12 a second, 0 the first keyframe) of a camera."""
    return 40 * camera + 20, (step * 7) % 250, 128


def mounting(camera: int) -> tuple[list[float], list[float]]:
    """Translation and quaternion, car from camera (optical axes)."""
    half = math.radians(YAW[camera]) / 2
    a, b = math.cos(half), math.sin(half)
    # yaw * (0.5, -0.5, 0.5, -0.5): x right, y down, z forward -> x forward, y left, z up
    q = [0.5 * a + 0.5 * b, -0.5 * a - 0.5 * b, 0.5 * a - 0.5 * b, -0.5 * a + 0.5 * b]
    return [1.5 - 0.2 * camera, 0.1 * camera, 1.5], q


LIDAR_MOUNT = ([0.94, 0.0, 1.84], quaternion(-math.pi / 2))


class _Table:
    """Writes rows as nuScenes does: one list, no indentation, a line a field."""

    def __init__(self, path: Path):
        self.file, self.first = path.open("w"), True
        self.file.write("[\n")

    def add(self, **row) -> None:
        self.file.write(("" if self.first else ",\n") + json.dumps(row, indent=0))
        self.first = False

    def close(self) -> None:
        self.file.write("\n]")
        self.file.close()


def write(
    root: Path,
    scenes: int = 1,
    keyframes: int = 5,
    boxes: int = 2,
    *,
    version: str = "v1.0-mini",
    radars: bool = False,
    files: bool = True,
    lidarseg: bool = False,
) -> Path:
    """The tables below root / version and, if asked, all sensor files; returns root.

    Scene s is "scene-000<s+1>"; its keyframe k lies 0.5 k s after its begin, 6 camera and 10 LiDAR periods apart.
    """
    root, folder = Path(root), Path(root) / version
    folder.mkdir(parents=True)
    names = "category attribute visibility instance sensor calibrated_sensor ego_pose log scene sample sample_data"
    tables = {n: _Table(folder / f"{n}.json") for n in [*names.split(), "sample_annotation", "map"]}
    for i, name in enumerate(CATEGORIES):
        tables["category"].add(token=token("category", name), name=name, description="a }, { b", index=i)
    for name in ATTRIBUTES:
        tables["attribute"].add(token=token("attribute", name), name=name, description="")
    for i, level in enumerate(("v0-40", "v40-60", "v60-80", "v80-100")):
        tables["visibility"].add(token=str(i + 1), level=level, description="")
    channels = (*CAMERAS, "LIDAR_TOP", *(RADARS if radars else ()))
    for channel in channels:
        modality = {"C": "camera", "L": "lidar", "R": "radar"}[channel[0]]
        tables["sensor"].add(token=token("sensor", channel), channel=channel, modality=modality)
    logs = (scenes + 9) // 10  # about ten scenes a log
    for log in range(logs):
        tables["log"].add(
            token=token("log", log), logfile=f"n015-{log}", vehicle="n015", date_captured="2018-07-18", location="here"
        )
        for i, channel in enumerate(channels):
            shift, turn = mounting(i) if channel in CAMERAS else LIDAR_MOUNT
            matrix = [[FOCAL, 0.0, WIDTH / 2], [0.0, FOCAL, HEIGHT / 2], [0.0, 0.0, 1.0]] if channel in CAMERAS else []
            tables["calibrated_sensor"].add(
                token=token("calibrated", log, channel),
                sensor_token=token("sensor", channel),
                translation=shift,
                rotation=turn,
                camera_intrinsic=matrix,
            )
    tables["map"].add(token=token("map"), category="semantic_prior", filename="", log_tokens=[token("log", 0)])
    sweeps = _Table(folder / "lidarseg.json") if lidarseg else None
    for s in range(scenes):
        _scene(root, tables, s, keyframes, boxes, channels, files, sweeps, version)
    for table in [*tables.values(), *([sweeps] if sweeps else [])]:
        table.close()
    return root


def _scene(root, tables, s, keyframes, boxes, channels, files, sweeps, version):
    begin = BEGIN + s * 100_000_000
    samples = [token("sample", s, k) for k in range(keyframes)]
    tables["scene"].add(
        token=token("scene", s),
        log_token=token("log", s // 10),
        nbr_samples=keyframes,
        first_sample_token=samples[0],
        last_sample_token=samples[-1],
        name=f"scene-{s + 1:04d}",
        description="a street",
    )
    for k, sample in enumerate(samples):
        tables["sample"].add(
            token=sample,
            timestamp=begin + k * 500_000,
            prev=samples[k - 1] if k else "",
            next=samples[k + 1] if k + 1 < keyframes else "",
            scene_token=token("scene", s),
        )
    for i, channel in enumerate(channels):
        periods, early = (6, EARLIER[i]) if channel in CAMERAS else (10 if channel == "LIDAR_TOP" else 7, 0.0)
        steps = (keyframes - 1) * periods + 1
        for step in range(steps):
            us = round(step * 500_000 / periods) - round(early * 1e6)
            ours = token("data", s, channel, step)
            key, kind = step % periods == 0, "jpg" if channel in CAMERAS else "pcd.bin"
            name = f"{'samples' if key else 'sweeps'}/{channel}/n015-{s}__{channel}__{begin + us}.{kind}"
            where, turn = car_pose(us / 1e6)
            pose = token("pose", s, channel, step)
            tables["ego_pose"].add(token=pose, timestamp=begin + us, rotation=turn, translation=where)
            tables["sample_data"].add(
                token=ours,
                sample_token=samples[-(-step // periods)],
                ego_pose_token=pose,
                calibrated_sensor_token=token("calibrated", s // 10, channel),
                timestamp=begin + us,
                fileformat=kind.split(".")[0],
                is_key_frame=key,
                height=HEIGHT if channel in CAMERAS else 0,
                width=WIDTH if channel in CAMERAS else 0,
                filename=name,
                prev=token("data", s, channel, step - 1) if step else "",
                next=token("data", s, channel, step + 1) if step + 1 < steps else "",
            )
            if files and channel in CAMERAS:
                _picture(root / name, colour(i, step))
            elif files:
                _points(root / name, step)
            if sweeps and key and channel == "LIDAR_TOP":
                labels = f"lidarseg/{version}/{ours}_lidarseg.bin"
                sweeps.add(token=ours, sample_data_token=ours, filename=labels)
                (root / labels).parent.mkdir(parents=True, exist_ok=True)
                np.array([24, 17, 0], np.uint8).tofile(root / labels)
    for number in range(boxes):
        ours = [token("annotation", s, number, k) for k in range(keyframes)]
        tables["instance"].add(
            token=token("instance", s, number),
            category_token=token("category", ("vehicle.car", "human.pedestrian.adult")[number % 2]),
            nbr_annotations=keyframes,
            first_annotation_token=ours[0],
            last_annotation_token=ours[-1],
        )
        for k in range(keyframes):
            where, turn = box_pose(number, k * 0.5)
            tables["sample_annotation"].add(
                token=ours[k],
                sample_token=samples[k],
                instance_token=token("instance", s, number),
                visibility_token="4",
                attribute_tokens=[token("attribute", "vehicle.moving")] if number == 0 else [],
                translation=where,
                size=[1.9, 4.5, 1.6],
                rotation=turn,
                prev=ours[k - 1] if k else "",
                next=ours[k + 1] if k + 1 < keyframes else "",
                num_lidar_pts=10 * number + k,
                num_radar_pts=0,
            )


def _picture(path: Path, rgb) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((HEIGHT, WIDTH, 3), rgb[::-1], np.uint8))


def _points(path: Path, step: int) -> None:
    """Three points in the LiDAR's frame: intensity = the step, ring 0, 1, 300."""
    path.parent.mkdir(parents=True, exist_ok=True)
    points = [[5.0, 0.0, -1.0, step, 0.0], [0.0, 7.0, 0.5, step, 1.0], [-3.0, 2.0, 1.0, step, 300.0]]
    np.array(points, np.float32).tofile(path)


def edit(root: Path, table: str, change, version: str = "v1.0-mini") -> None:
    """Rewrites a table: change(rows) alters the list in place, or returns another."""
    path = Path(root) / version / f"{table}.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(change(rows) or rows, indent=0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=850)
    parser.add_argument("--keyframes", type=int, default=41)
    parser.add_argument("--boxes", type=int, default=34)
    given = parser.parse_args()
    write(given.out, given.scenes, given.keyframes, given.boxes, version="v1.0-trainval", radars=True, files=False)
