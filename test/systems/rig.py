"""Frames of a made-up car: N cameras in a ring, smooth random pictures, random LiDAR points, any pose."""

import math

import torch

from occflow_core.geometry import Cameras, rigid
from occflow_core.types import NANO, Frame

OPTICAL = torch.tensor([[0, 0, 1.0], [-1, 0, 0], [0, -1, 0]], dtype=torch.float64)  # camera axes in a car that looks on


def turn(yaw: float) -> torch.Tensor:
    c, s = math.cos(yaw), math.sin(yaw)
    return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1.0]], dtype=torch.float64)


def ring(n: int, height: int, width: int) -> Cameras:
    pose = torch.eye(4, dtype=torch.float64).repeat(n, 1, 1)
    for i in range(n):
        pose[i, :3, :3] = turn(2 * math.pi * i / n) @ OPTICAL
        pose[i, :3, 3] = turn(2 * math.pi * i / n) @ torch.tensor([1.0, 0.0, 1.5], dtype=torch.float64)
    k = torch.tensor([[0.7 * width, 0, width / 2], [0, 0.7 * width, 0.45 * height], [0, 0, 1]], dtype=torch.float64)
    return Cameras(k.repeat(n, 1, 1), pose, height, width)


def frame(height=64, width=96, n=3, at=0.0, seed=0, x=0.0, yaw=0.0, drive="drive", used=None) -> Frame:
    """at: seconds. x, yaw: where the car stands, m and rad."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(n, 3, max(2, height // 8), max(2, width // 8), generator=generator) * 255
    images = torch.nn.functional.interpolate(rough, size=(height, width), mode="bilinear").to(torch.uint8)
    world_from_car = torch.eye(4, dtype=torch.float64)
    world_from_car[:3, :3] = turn(yaw)
    world_from_car[0, 3] = 600 + x
    assert rigid.is_rigid(world_from_car)
    stamp = round(at * NANO)
    return Frame(
        images=images,
        cameras=ring(n, height, width),
        used=torch.ones(n, dtype=torch.bool) if used is None else torch.tensor(used),
        stamps=torch.full((n,), stamp),
        stamp=stamp,
        world_from_car=world_from_car,
        drive=drive,
        names=tuple(f"camera{i}" for i in range(n)),
        points=cloud(generator),
    )


def cloud(generator: torch.Generator, scans: int = 3, points: int = 300) -> torch.Tensor:
    """Scans 50 ms apart around the car, (P, 5) as in `Frame`, the newest first."""
    low, size = torch.tensor([-11.0, -9.0, -0.9, 0.0]), torch.tensor([22.0, 18.0, 5.0, 255.0])
    values = low + size * torch.rand(scans * points, 4, generator=generator)
    age = 0.05 * torch.arange(scans).repeat_interleave(points)
    return torch.cat([values, age[:, None]], dim=1)


def drive(count: int, every: float, start: int = 0, **kinds) -> list[Frame]:
    """Frames of one drive, oldest first, of a car that goes straight and turns a little."""
    return [frame(at=i * every, seed=start + i, x=4 * i * every, yaw=0.1 * i * every, **kinds) for i in range(count)]
