"""Prediction <-> the plain arrays of `occflow_msgs/VoxelFlow`, without ROS.

The node fills a ROS message from `pack`; bags are written and pictures made from the same arrays on machines that have
no ROS. What each field means, with units, stands in `msg/msg/VoxelFlow.msg`. Index order there is
ix + nx * (iy + ny * iz) (x fastest), ours is [x, y, z] (z fastest): the exchange happens here and nowhere else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .geometry import Grid
from .types import TABLES, Classes, Prediction

NO_IMAGE = -(2**31)  # camera_age_us of a camera without an image


def definitions() -> dict[str, str]:
    """`.msg` texts by full type name, for writers and readers of bags that have no ROS."""
    folder = Path(__file__).parent / "msg"
    texts = {f"occflow_msgs/msg/{path.stem}": path.read_text() for path in sorted(folder.glob("*.msg"))}
    if not texts:
        raise FileNotFoundError(f"no .msg files in {folder}: the installation is incomplete, install occflow again")
    return texts


def pack(
    prediction: Prediction,
    cameras: Sequence[str],
    used: Sequence[bool],
    age_us: Sequence[int | None],
    model_name: str,
    moving_speed: float = 0.2,
) -> dict[str, Any]:
    """All fields of a VoxelFlow but `header` and `origin`.

    cameras, used, age_us: one entry for each expected camera, in bit order (at most 8); age in microseconds before the
    header's stamp, None where there was no image. moving_speed: m/s; voxels of moving classes that are slower, or
    whose velocity is not finite, are written without one.
    """
    if not 1 <= len(cameras) <= 8 or not len(cameras) == len(used) == len(age_us):
        raise ValueError(f"1 to 8 cameras, each with used and age, got {len(cameras)}, {len(used)} and {len(age_us)}")
    nx, ny, nz = prediction.grid.shape
    labels = _x_fastest(prediction.labels)
    index = np.flatnonzero(labels != prediction.classes.free)
    label = labels[index]
    # dense floats are gathered in their own order: turning 640,000 of them for 20,000 voxels costs milliseconds
    iz, rest = np.divmod(index, nx * ny)
    iy, ix = np.divmod(rest, nx)
    own = (ix * ny + iy) * nz + iz
    flow_index, velocity = np.empty(0, np.uint32), np.empty((0, 2), np.float32)
    if prediction.flow is not None:
        flow = prediction.flow.reshape(-1, 2).cpu().numpy()[own]
        moving = moves(label, flow, prediction.classes, moving_speed)
        flow_index, velocity = np.flatnonzero(moving), flow[moving]
    unobserved = np.empty(0, np.uint8)
    if prediction.unobserved is not None:
        unobserved = np.packbits(_x_fastest(prediction.unobserved), bitorder="little")
    score = prediction.score.reshape(-1).cpu().numpy()[own]
    return {
        "voxel_size": np.asarray(prediction.grid.voxel, np.float32),
        "grid_size": np.asarray(prediction.grid.shape, np.uint32),
        "index": index.astype(np.uint32),
        "label": label,
        "confidence": np.rint(np.clip(score, 0.0, 1.0) * 255.0).astype(np.uint8),
        "flow_index": flow_index.astype(np.uint32),
        "flow_velocity": np.ascontiguousarray(velocity, np.float32).reshape(-1),
        "unobserved": unobserved,
        "cameras_expected": (1 << len(cameras)) - 1,
        "cameras_used": sum(1 << i for i, here in enumerate(used) if here),
        "cameras": list(cameras),
        "camera_age_us": np.asarray([NO_IMAGE if age is None else age for age in age_us], np.int32),
        "label_set": prediction.classes.table,
        "model_name": model_name,
    }


def moves(label: np.ndarray, flow: np.ndarray, classes: Classes, moving_speed: float) -> np.ndarray:
    """Which voxels with labels (M,) and velocities (M, 2) m/s are told to move, (M,) bool: those of moving classes, of
    a finite velocity that is not zero and not below moving_speed."""
    speed = np.hypot(flow[:, 0], flow[:, 1])
    with np.errstate(invalid="ignore"):  # NaN compares false
        return np.isin(label, classes.moving_ids) & np.isfinite(speed) & (speed > 0) & (speed >= moving_speed)


def unpack(message) -> Prediction:
    """The Prediction of a VoxelFlow: any object with the message's fields (rclpy's, rosbags', a namespace).

    Flow is dense again, zero where the message has none. ValueError naming the invariant that a message breaks.
    """
    shape = tuple(int(n) for n in message.grid_size)
    cells = shape[0] * shape[1] * shape[2]
    index, label = np.asarray(message.index, np.int64), np.asarray(message.label, np.uint8)
    confidence, bits = np.asarray(message.confidence, np.uint8), np.asarray(message.unobserved, np.uint8)
    flow_index = np.asarray(message.flow_index, np.int64)
    velocity = np.asarray(message.flow_velocity, np.float32).reshape(-1)
    classes = TABLES.get(message.label_set)
    low = message.origin.position
    for holds, rule in (
        (classes is not None, f"label_set is one of {sorted(TABLES)}, got {message.label_set!r}"),
        (len(label) == len(index) and len(confidence) in (0, len(index)), "label and confidence are as long as index"),
        (_ascending(index, cells), f"index is strictly ascending and below {cells}"),
        (_ascending(flow_index, len(index)), f"flow_index is strictly ascending and below {len(index)}"),
        (len(velocity) == 2 * len(flow_index), "flow_velocity holds two numbers for each flow_index"),
        (bool(np.isfinite(velocity).all()), "flow_velocity is finite"),
        (len(bits) in (0, (cells + 7) // 8), f"unobserved is empty or {(cells + 7) // 8} bytes long"),
        (classes is None or not len(label) or int(label.max()) < classes.free, "every label has a name in label_set"),
    ):
        if not holds:
            raise ValueError(f"broken VoxelFlow: expected that {rule}")
    labels = np.full(cells, classes.free, np.uint8)
    labels[index] = label
    score = np.zeros(cells, np.float32)
    score[index] = confidence.astype(np.float32) / 255.0 if len(confidence) else 1.0
    flow = np.zeros((cells, 2), np.float32)
    flow[index[flow_index]] = velocity.reshape(-1, 2)
    unobserved = None
    if len(bits):
        unobserved = _z_fastest(np.unpackbits(bits, count=cells, bitorder="little").astype(bool), shape)
    grid = Grid((low.x, low.y, low.z), _tidy(message.voxel_size), shape)
    return Prediction(grid, classes, *(_z_fastest(a, shape) for a in (labels, score, flow)), unobserved)


def _x_fastest(voxels: torch.Tensor) -> np.ndarray:
    return voxels.permute(2, 1, 0).contiguous().cpu().numpy().reshape(-1)


def _z_fastest(flat: np.ndarray, shape: tuple[int, int, int]) -> torch.Tensor:
    nx, ny, nz = shape
    dense = flat.reshape(nz, ny, nx, *flat.shape[1:])
    return torch.from_numpy(np.ascontiguousarray(dense.swapaxes(0, 2)))


def _ascending(index: np.ndarray, below: int) -> bool:
    return len(index) == 0 or bool(index[0] >= 0 and (np.diff(index) > 0).all() and index[-1] < below)


def _tidy(voxel_size) -> tuple[float, ...]:
    """float32 0.4 is 0.4000000059604645: the shortest decimal that gives the same float32 is what was meant."""
    return tuple(float(str(np.float32(v))) for v in voxel_size)
