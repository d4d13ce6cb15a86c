"""LiDAR scans -> the points of a Frame, wherever they come from; PointCloud2's bytes without ROS. P points."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .geometry import rigid

# m along the sensor's own x and y: what an earlier scan met nearer than this is the car and its roof, which drove on
# (mmdet3d `LoadPointsFromMultiSweeps`, remove_close; the newest scan keeps it)
CLOSE = 1.0
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}  # sensor_msgs/PointField


@dataclass(frozen=True)
class Scan:
    """What a LiDAR met in one turn."""

    points: Tensor  # (P, 4 or more) float32: x y z (m, the sensor's frame), intensity
    car_from_sensor: Tensor  # (4, 4) float64: sensor at its own stamp -> car now
    age: float  # s before now


def together(scans: Sequence[Scan]) -> Tensor:
    """Scans, the newest first -> (P, 5) float32 as `types.Frame` has it: x y z in the car frame now, intensity, age."""
    parts = []
    for k, scan in enumerate(scans):
        points = scan.points
        if k:
            points = points[~(points[:, :2].abs() < CLOSE).all(-1)]
        place = rigid.apply(scan.car_from_sensor, points[:, :3].double()).float()
        parts.append(torch.cat([place, points[:, 3:4], torch.full((len(points), 1), scan.age)], dim=1))
    return torch.cat(parts)


def fields(message: Any, names: Sequence[str]) -> np.ndarray:
    """Named fields of a sensor_msgs/PointCloud2, of rclpy or of rosbags -> (P,) structured, a view of its bytes."""
    order = ">" if message.is_bigendian else "<"
    there = {f.name: (order + _NUMBERS[f.datatype], f.offset) for f in message.fields if f.datatype in _NUMBERS}
    layout = np.dtype(
        {
            "names": list(names),
            "formats": [there[name][0] for name in names],
            "offsets": [there[name][1] for name in names],
            "itemsize": int(message.point_step),
        }
    )
    return np.ndarray((int(message.height) * int(message.width),), layout, buffer=message.data)


def read(message: Any, fields: Callable[[Any, list[str]], np.ndarray] = fields) -> np.ndarray:
    """sensor_msgs/PointCloud2, of rclpy or of rosbags -> (P, 5) float32: x y z intensity ring.

    0 where a cloud, or a point, has no intensity or ring. Points that are not finite (no echo) are dropped. ValueError
    where a cloud has no x, y and z, or fewer bytes than it says. `fields` is who takes named fields out of the bytes.
    """
    there = [f.name for f in message.fields if f.datatype in _NUMBERS]
    if not {"x", "y", "z"} <= {*there}:
        raise ValueError(f"a cloud with the fields {', '.join(there) or 'none'}, expected x, y and z")
    size, count, step = len(message.data), int(message.height) * int(message.width), int(message.point_step)
    if int(message.row_step) != step * int(message.width) or size < count * step:
        raise ValueError(f"a cloud of {size} bytes, expected {count} points of {step}")
    names = [name for name in ("x", "y", "z", "intensity", "ring") if name in there]
    cloud = fields(message, names)
    points = np.zeros((count, 5), np.float32)
    for i, name in enumerate(("x", "y", "z", "intensity", "ring")):
        if name in names:
            points[:, i] = cloud[name]
    points = points[np.isfinite(points[:, :3]).all(1)]
    points[~np.isfinite(points)] = 0  # an intensity that is no number: one would make all of the network's output NaN
    return points
