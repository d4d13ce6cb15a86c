"""Where cameras and LiDAR sit and when they fire: nuScenes' car, or another from a JSON file.

The JSON: {"width": 1600, "height": 900, "lidar": {"translation": [x, y, z], "rotation": [w, x, y, z]}, "cameras":
[{"name": ..., "intrinsic": 3x3, "translation": [...], "rotation": [...], "delay_us": ...}, ...]}: optical frames of
REP 103 in the car frame, pixels of width x height, delay after the LiDAR's stamp in microseconds (negative: before).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...geometry import Cameras, rigid

# Calibration of nuScenes' scene-0103 (log n008-2018-08-01-15-16-36-0400), rounded: focal length, centre (pixels of
# 1600 x 900); quaternion w x y z and place of the optical frame in the ego frame; us after the LiDAR's stamp.
_NUSCENES = {
    "CAM_FRONT": (1252.813, (826.588, 469.985), -35186),
    "CAM_FRONT_RIGHT": (1256.749, (817.789, 451.954), -27108),
    "CAM_FRONT_LEFT": (1257.863, (827.241, 450.916), -42791),
    "CAM_BACK": (796.891, (857.777, 476.885), -10032),
    "CAM_BACK_LEFT": (1254.986, (829.577, 467.168), -185),
    "CAM_BACK_RIGHT": (1249.963, (825.377, 462.548), -19477),
}
_POSES = {
    "CAM_FRONT": ((0.507724, -0.497339, 0.498372, -0.496483), (1.722006, 0.004755, 1.494913)),
    "CAM_FRONT_RIGHT": ((0.203352, -0.191463, 0.678571, -0.679361), (1.580826, -0.499079, 1.517494)),
    "CAM_FRONT_LEFT": ((0.681209, -0.668751, 0.21017, -0.211082), (1.575256, 0.500519, 1.50696)),
    "CAM_BACK": ((0.5068, -0.497757, -0.498785, 0.496594), (0.055246, 0.010788, 1.567943)),
    "CAM_BACK_LEFT": ((0.704862, -0.690731, -0.112091, 0.116173), (1.04852, 0.483058, 1.562102)),
    "CAM_BACK_RIGHT": ((0.138192, -0.137967, -0.689333, 0.69763), (1.059452, -0.467203, 1.550509)),
}
_LIDAR = ((0.706749, -0.015301, 0.017397, -0.707085), (0.985793, 0.0, 1.84019))


@dataclass(frozen=True)
class Rig:
    """Cameras (N) in the car frame with their delays, and the LiDAR's pose."""

    names: tuple[str, ...]
    cameras: Cameras  # (N) float64
    delays: tuple[int, ...]  # us after the LiDAR's stamp
    car_from_lidar: np.ndarray  # (4, 4)

    def resized(self, height: int, width: int) -> "Rig":
        return Rig(self.names, self.cameras.resized(height, width), self.delays, self.car_from_lidar)


def nuscenes() -> Rig:
    """nuScenes' six cameras at 1600 x 900."""
    matrices = [[[f, 0, cx], [0, f, cy], [0, 0, 1]] for f, (cx, cy), _ in _NUSCENES.values()]
    poses = torch.stack([rigid.from_quaternion(*_POSES[name]) for name in _NUSCENES])
    cameras = Cameras(torch.tensor(matrices, dtype=torch.float64), poses, 900, 1600)
    delays = tuple(delay for *_, delay in _NUSCENES.values())
    return Rig(tuple(_NUSCENES), cameras, delays, rigid.from_quaternion(*_LIDAR).numpy())


def read(path: Path | str) -> Rig:
    """A rig from its JSON. ValueError that names the file and the field that is missing or wrong."""
    path = Path(path)
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"rig {path}: cannot be read as JSON: {error}") from error
    where = "rig"

    def field(of, name, shape=None):
        if not isinstance(of, dict) or name not in of:
            raise ValueError(f"rig {path}: {where} lacks the field {name!r}")
        if shape is None:
            return of[name]
        try:
            value = np.asarray(of[name], dtype=np.float64)
        except (TypeError, ValueError):
            value = np.full(1, np.nan)
        if value.shape != shape or not np.isfinite(value).all():
            raise ValueError(f"rig {path}: {where} needs {name!r} as finite numbers of shape {shape}, got {of[name]!r}")
        return value

    width, height = int(field(table, "width", ())), int(field(table, "height", ()))
    rows = field(table, "cameras")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"rig {path}: 'cameras' must be a list of at least one camera")
    names, matrices, poses, delays = [], [], [], []
    for k, row in enumerate(rows):
        where = f"camera {k}"
        names.append(str(field(row, "name")))
        where = f"camera {names[-1]}"
        matrices.append(field(row, "intrinsic", (3, 3)))
        poses.append(rigid.from_quaternion(field(row, "rotation", (4,)), field(row, "translation", (3,))))
        delays.append(int(field(row, "delay_us", ())))
    if len(set(names)) != len(names):
        raise ValueError(f"rig {path}: two cameras share a name among {names}")
    where = "lidar"
    lidar = field(table, "lidar")
    pose = rigid.from_quaternion(field(lidar, "rotation", (4,)), field(lidar, "translation", (3,)))
    cameras = Cameras(torch.tensor(np.array(matrices)), torch.stack(poses), height, width)
    return Rig(tuple(names), cameras, tuple(delays), pose.numpy())
