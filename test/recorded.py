"""Real recordings for tests: they live beside the checkout and are never copied into it."""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import pytest
import torch
from torch import Tensor

from occflow_core.geometry import Cameras, rigid
from occflow_core.types import Frame


@dataclass(frozen=True)
class Box:
    """One annotated object of a frame."""

    name: str
    corners: Tensor  # (8, 3) float64, car frame at the LiDAR's stamp, m; 0-3 the bottom, 4-7 above them; 0-1 ahead
    lidar_points: int  # LiDAR points inside: few = far or hidden


@dataclass(frozen=True)
class Scene:
    """Four keyframes of nuScenes' scene-0103, 0.5 s apart, six cameras of 1600 x 900."""

    frames: tuple[Frame, ...]
    rig: Cameras  # (6): the mounting, car_from_camera without the car's motion
    jpegs: tuple[tuple[bytes, ...], ...]  # a frame's recorded files, in the order of frame.names
    boxes: tuple[tuple[Box, ...], ...]
    infos: dict  # the raw infos.json, for checks that must not go through our code


def shared() -> Path:
    """The folder of recordings: $OCCFLOW_SHARED, or ../shared/data of the checkout; skips the test without it."""
    folder = Path(os.environ.get("OCCFLOW_SHARED") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs the recordings of nuScenes at {folder} (or OCCFLOW_SHARED)")
    return folder


@cache
def scene0103(stamp: str = "lidar") -> Scene:
    """The scene, told as data sets do (stamp="lidar": the LiDAR's stamp and pose) or as the node does (stamp="newest":
    those of the newest camera). Both are true; the cameras' `car_from_camera` differ by the car's motion between."""
    folder = shared() / "scene0103_keyframes"
    infos = json.loads((folder / "infos.json").read_text())
    frames, jpegs, boxes = [], [], []
    for info in infos["frames"]:
        cams = info["cams"]
        newest = max(cams.values(), key=lambda cam: cam["timestamp_us"])
        reference = {"lidar": info, "newest": newest}[stamp]
        world_from_car = _matrix(reference["ego2global"])
        car_from_world = rigid.inverse(world_from_car)
        files = tuple((folder / cam["file"]).read_bytes() for cam in cams.values())
        poses = [car_from_world @ _matrix(cam["ego2global"]) @ _matrix(cam["sensor2ego"]) for cam in cams.values()]
        frames.append(
            Frame(
                images=torch.stack([decoded(file) for file in files]),
                cameras=Cameras(
                    torch.stack([_matrix(cam["intrinsics"]) for cam in cams.values()]), torch.stack(poses), 900, 1600
                ),
                used=torch.ones(len(cams), dtype=torch.bool),
                stamps=torch.tensor([cam["timestamp_us"] * 1000 for cam in cams.values()]),
                stamp=reference["timestamp_us"] * 1000,
                world_from_car=world_from_car,
                drive=info["scene"],
                names=tuple(cams),
            )
        )
        jpegs.append(files)
        boxes.append(tuple(_boxes(info)))
    first = infos["frames"][0]["cams"].values()
    rig = Cameras(
        torch.stack([_matrix(cam["intrinsics"]) for cam in first]),
        torch.stack([_matrix(cam["sensor2ego"]) for cam in first]),
        900,
        1600,
    )
    return Scene(tuple(frames), rig, tuple(jpegs), tuple(boxes), infos)


def decoded(jpeg: bytes) -> Tensor:
    """(3, H, W) uint8 RGB."""
    picture = cv2.imdecode(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8).numpy(), cv2.IMREAD_COLOR)
    return torch.from_numpy(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).contiguous()


def _boxes(info: dict):
    car_from_lidar = _matrix(info["lidar2ego"])
    for (x, y, z, length, width, height, yaw), name, points in zip(
        info["gt_boxes_lidar_xyz_lwh_yaw"], info["gt_names"], info["num_lidar_pts"], strict=True
    ):
        half = torch.tensor([length, width, height], dtype=torch.float64) / 2
        signs = torch.tensor(
            [[a, b, c] for c in (-1, 1) for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1))], dtype=torch.float64
        )
        yaw = torch.tensor(yaw, dtype=torch.float64)
        turn = torch.stack([yaw.cos(), -yaw.sin(), yaw.sin(), yaw.cos()]).reshape(2, 2)
        corners = signs * half
        corners[:, :2] = corners[:, :2] @ turn.mT
        corners += torch.tensor([x, y, z], dtype=torch.float64)
        yield Box(name, rigid.apply(car_from_lidar, corners), points)


def _matrix(rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)
