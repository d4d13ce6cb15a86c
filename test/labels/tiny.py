"""A small exact world: a street, boxes that stand and boxes that move, a LiDAR that meets them exactly.

The ground is the plane z = 0: road where |y| < 5 m, sidewalk beyond. Everything else is a box.
"""

from dataclasses import dataclass

import numpy as np
import torch

from occflow_core.geometry import OCC3D_GRID, Cameras, Grid, rigid
from occflow_core.labels import Keyframe, Sweep, Track
from occflow_core.types import OCC3D

BEGIN = 1_600_000_000 * 10**9  # ns
FAR_AWAY = np.array([1200.0, 800.0, 3.0])  # the world's origin is not the map's
MOUNT = np.array([0.94, 0.0, 1.84])  # LiDAR, car frame
STREET = 5.0  # m, half the road's width


@dataclass(frozen=True)
class Thing:
    """A box; one that moves has a speed (m/s), a speeding up (m/s^2) and a turn rate (rad/s)."""

    name: str
    size: tuple[float, float, float]
    at: tuple[float, float, float]  # its middle at time 0
    yaw: float = 0.0
    speed: float = 0.0
    gains: float = 0.0
    turns: float = 0.0
    annotated: bool = True

    def pose(self, t: float) -> np.ndarray:
        """world_from_box (4, 4), world without FAR_AWAY."""
        steps = np.linspace(0, t, 201)
        heading = self.yaw + self.turns * steps
        velocity = (self.speed + self.gains * steps) * np.stack([np.cos(heading), np.sin(heading)])
        moved = np.trapezoid(velocity, steps, axis=1) if hasattr(np, "trapezoid") else np.trapz(velocity, steps, axis=1)
        pose = turned(heading[-1])
        pose[:3, 3] = np.array(self.at) + [*moved, 0]
        return pose

    def velocity(self, points: np.ndarray, t: float) -> np.ndarray:
        """(P, 2) m/s, world axes, of points (P, 3) of it."""
        pose, heading = self.pose(t), self.yaw + self.turns * t
        forward = (self.speed + self.gains * t) * np.array([np.cos(heading), np.sin(heading)])
        arm = points[:, :2] - pose[:2, 3]
        return forward + self.turns * np.stack([-arm[:, 1], arm[:, 0]], 1)


def turned(yaw: float) -> np.ndarray:
    pose = np.eye(4)
    pose[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
    return pose


@dataclass(frozen=True)
class World:
    things: tuple[Thing, ...]
    speed: float = 5.0  # m/s of the car, along x
    beams: int = 32
    columns: int = 720

    def car(self, t: float) -> np.ndarray:
        pose = np.eye(4)
        pose[0, 3] = self.speed * t
        return pose

    def hits(self, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One turn of the LiDAR: points (P, 3) in the world, classes (P,), which thing (P,), -1 ground."""
        up = np.radians(np.linspace(-30.67, 10.67, self.beams))
        around = np.linspace(0, 2 * np.pi, self.columns, endpoint=False) + 0.1 * t
        way = np.stack(
            [
                np.cos(up)[:, None] * np.cos(around),
                np.cos(up)[:, None] * np.sin(around),
                np.sin(up)[:, None] * np.ones_like(around),
            ],
            -1,
        ).reshape(-1, 3)
        eye = self.car(t)[:3, 3] + MOUNT
        with np.errstate(divide="ignore"):
            distance = np.where(way[:, 2] < 0, -eye[2] / way[:, 2], np.inf)
        whose = np.full(len(way), -1)
        for i, thing in enumerate(self.things):
            box_from_world = np.linalg.inv(thing.pose(t))
            start, d = box_from_world[:3, :3] @ eye + box_from_world[:3, 3], way @ box_from_world[:3, :3].T
            with np.errstate(divide="ignore", invalid="ignore"):
                a, b = (-np.array(thing.size) / 2 - start) / d, (np.array(thing.size) / 2 - start) / d
            near, far = np.minimum(a, b).max(1), np.maximum(a, b).min(1)
            hit = (near < far) & (near > 0) & (near < distance)
            distance[hit], whose[hit] = near[hit], i
        back = distance < 70
        points = eye + way[back] * distance[back, None]
        classes = np.array([OCC3D.id(thing.name) for thing in self.things] + [0])[whose[back]]
        road = np.where(np.abs(points[:, 1]) < STREET, OCC3D.id("driveable_surface"), OCC3D.id("sidewalk"))
        return points, np.where(whose[back] < 0, road, classes).astype(np.uint8), whose[back]

    def sweep(self, t: float, labelled: bool, noise: float = 0.0) -> Sweep:
        points, classes, _ = self.hits(t)
        points = points + np.random.default_rng(int(t * 1000)).normal(0, noise, points.shape) if noise else points
        car_from_lidar = turned(-np.pi / 2)
        car_from_lidar[:3, 3] = MOUNT
        lidar_from_world = np.linalg.inv(self.car(t) @ car_from_lidar)
        own = points @ lidar_from_world[:3, :3].T + lidar_from_world[:3, 3]
        rows = np.concatenate([own, np.zeros((len(own), 2))], 1).astype(np.float32)
        return Sweep(
            torch.from_numpy(rows),
            torch.from_numpy(car_from_lidar),
            torch.from_numpy(away(self.car(t))),
            stamp(t),
            torch.from_numpy(classes) if labelled else None,
        )

    def sweeps(self, seconds: float, noise: float = 0.0, rate: int = 10, labels: bool = True):
        """All of a scene; keyframes, twice a second, have labels."""
        for i in range(int(seconds * rate) + 1):
            yield self.sweep(i / rate, labels and i % (rate // 2) == 0, noise)

    def tracks(self, seconds: float) -> list[Track]:
        times = np.arange(0, seconds + 0.01, 0.5)
        return [
            Track(
                f"thing-{i}",
                thing.name,
                thing.size,
                tuple(stamp(t) for t in times),
                torch.from_numpy(np.stack([away(thing.pose(t)) for t in times])),
            )
            for i, thing in enumerate(self.things)
            if thing.annotated
        ]

    def keyframe(self, t: float, cameras: Cameras | None = None) -> Keyframe:
        return Keyframe(f"key-{t}", stamp(t), torch.from_numpy(away(self.car(t))), cameras)

    def truth(self, t: float, grid: Grid = OCC3D_GRID) -> tuple[np.ndarray, np.ndarray]:
        """Labels (X, Y, Z) and flow (X, Y, Z, 2) of all surfaces, from samples 5 cm apart; things over ground."""
        labels = np.full(grid.shape, OCC3D.free, np.uint8)
        flow = np.zeros((*grid.shape, 2), np.float32)
        car = self.car(t)
        for names, inner in (("sidewalk", False), ("driveable_surface", True)):
            x, y = (np.arange(lo + 0.025, hi, 0.05) for lo, hi in zip(grid.low[:2], grid.high[:2]))
            x, y = np.meshgrid(x, y, indexing="ij")
            on = (np.abs(y) < STREET) == inner
            place = np.stack([x[on], y[on], np.zeros(on.sum())], 1)
            index, inside = grid.index(torch.from_numpy(place))
            labels[tuple(index[inside].numpy().T)] = OCC3D.id(names)
        centres = grid.centres(torch.float64).numpy()
        for thing in self.things:
            pose = np.linalg.inv(car) @ thing.pose(t)
            points = surface(thing.size) @ pose[:3, :3].T + pose[:3, 3]
            index, inside = grid.index(torch.from_numpy(points))
            at = tuple(index[inside].numpy().T)
            labels[at] = OCC3D.id(thing.name)
            flow[at] = thing.velocity(centres[at] + car[:3, 3], t) if thing.name in OCC3D.moving else 0
        return labels, flow


def surface(size) -> np.ndarray:
    """Samples (P, 3) of the six sides of a box, 5 cm apart."""
    axes = [np.linspace(-s / 2, s / 2, int(np.ceil(s / 0.05)) + 1) for s in size]
    sides = []
    for k in range(3):
        for end in (axes[k][0], axes[k][-1]):
            parts = list(axes)
            parts[k] = np.array([end])
            sides.append(np.stack(np.meshgrid(*parts, indexing="ij"), -1).reshape(-1, 3))
    return np.concatenate(sides)


def away(pose: np.ndarray) -> np.ndarray:
    """Into the map's frame."""
    pose = pose.copy()
    pose[:3, 3] += FAR_AWAY
    return pose


def stamp(t: float) -> int:
    return BEGIN + round(t * 1e9)


def ring_of_cameras(height: int = 90, width: int = 160) -> Cameras:
    """Six cameras that look all around, 70 degrees each, 1.5 m above the ground."""
    focal = width / 2 / np.tan(np.radians(35))
    k = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64)
    poses = []
    for i in range(6):
        a = np.pi / 3 * i
        pose = np.eye(4)
        pose[:3, :3] = np.stack([[np.sin(a), -np.cos(a), 0], [0, 0, -1], [np.cos(a), np.sin(a), 0]], 1)
        pose[:3, 3] = [1.0, 0.0, 1.5]
        poses.append(torch.from_numpy(pose))
    poses = torch.stack(poses)
    assert rigid.is_rigid(poses)
    return Cameras(k.expand(6, 3, 3), poses, height, width)


def street() -> World:
    """A car that stands, one that overtakes and brakes, one that turns, a walker, a cone, walls."""
    return World(
        (
            Thing("car", (4.4, 1.8, 1.5), (14.0, 3.6, 1.01)),
            Thing("car", (4.6, 1.9, 1.5), (-12.0, -3.4, 1.01), speed=9.0, gains=-0.8),
            Thing("truck", (7.0, 2.5, 3.0), (30.0, 8.0, 1.76), yaw=-1.2, speed=3.0, turns=0.25),
            Thing("pedestrian", (0.6, 0.6, 1.7), (16.0, -7.0, 1.11), yaw=1.2, speed=1.3),
            Thing("traffic_cone", (0.4, 0.4, 0.7), (9.0, -4.2, 0.61)),
            Thing("manmade", (40.0, 4.0, 6.0), (15.0, 18.0, 3.0), annotated=False),
            Thing("manmade", (30.0, 3.0, 5.0), (18.0, -15.3, 2.5), annotated=False),
            Thing("vegetation", (1.0, 1.0, 4.0), (24.0, -8.0, 2.0), annotated=False),
        )
    )
