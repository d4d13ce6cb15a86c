"""What labels are made of: LiDAR sweeps, tracks of boxes, keyframes. P points, K annotations of one object, N cameras.

World frames are the caller's; poses are float64, because map coordinates are too large for float32.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..geometry import Cameras, rigid
from ..types import NANO, OCC3D

UNLABELLED = 255  # label of a point that nobody classified
STANDS = 0.2  # m/s, below which an object stands (OpenOcc)
STAYS = 5.0  # s that an object which stands is taken to stay where it was, before and after its annotations
GAP = 1.5  # s between two annotations of an object, above which nothing between them is known (devkit, box_velocity)


@dataclass(frozen=True)
class Sweep:
    """One turn of the LiDAR."""

    points: Tensor  # (P, 3 or more) float32: x y z in the LiDAR's frame, m; further columns are not looked at
    car_from_lidar: Tensor  # (4, 4) float64
    world_from_car: Tensor  # (4, 4) float64, at `stamp`
    stamp: int  # ns
    labels: Tensor | None = None  # (P,) uint8: ids of OCC3D, UNLABELLED for noise and the car itself; None: not known

    def __post_init__(self):
        if self.points.ndim != 2 or self.points.shape[1] < 3:
            raise ValueError(f"sweep at {self.stamp} ns: points must be (P, 3 or more), got {tuple(self.points.shape)}")
        if not rigid.is_rigid(self.car_from_lidar) or not rigid.is_rigid(self.world_from_car):
            raise ValueError(f"sweep at {self.stamp} ns: its pose is no rigid motion (finite, orthonormal)")
        if self.labels is None:
            return
        if tuple(self.labels.shape) != (len(self.points),) or self.labels.dtype != torch.uint8:
            raise ValueError(
                f"sweep at {self.stamp} ns: expected {len(self.points)} labels uint8, one a point, "
                f"got {tuple(self.labels.shape)} {str(self.labels.dtype).removeprefix('torch.')}"
            )
        strange = (self.labels >= OCC3D.free) & (self.labels != UNLABELLED)
        if strange.any():
            raise ValueError(
                f"sweep at {self.stamp} ns: label {int(self.labels[strange][0])} is no id of {OCC3D.table} "
                f"(0 to {OCC3D.free - 1}, or {UNLABELLED})"
            )


@dataclass(frozen=True)
class Track:
    """One object through the scene: where its box was annotated."""

    instance: str
    name: str  # of its class in OCC3D
    size: tuple[float, float, float]  # m: length (x of the box), width (y), height (z)
    stamps: tuple[int, ...]  # (K,) ns, rising
    world_from_box: Tensor  # (K, 4, 4) float64; NaN where the pose is not known. The box's origin is its middle

    def __post_init__(self):
        who = f"track {self.instance}"
        if self.name not in OCC3D.names:
            raise ValueError(f"{who}: {self.name!r} is no class of {OCC3D.table}")
        if len(self.size) != 3 or not all(0 < s < 100 for s in self.size):
            raise ValueError(f"{who}: a box needs three edges above 0 and below 100 m, got {self.size}")
        if tuple(self.world_from_box.shape) != (len(self.stamps), 4, 4) or not self.stamps:
            raise ValueError(f"{who}: {len(self.stamps)} stamps with poses {tuple(self.world_from_box.shape)}")
        if any(b <= a for a, b in zip(self.stamps[:-1], self.stamps[1:])):
            raise ValueError(f"{who}: stamps must rise, got {self.stamps}")
        known = torch.isfinite(self.world_from_box).flatten(1).all(1)
        if not rigid.is_rigid(self.world_from_box[known]):
            raise ValueError(f"{who}: a pose of its box is no rigid motion")

    def at(self, stamp: int, beyond: float = 0.05) -> np.ndarray | None:
        """world_from_box (4, 4) at any stamp (ns), or None where nobody knows it.

        Between annotations: cubic, with the velocities of `motion` at both ends, because a car that brakes or turns is
        up to 12 cm off the straight line. `beyond`: s before the first and after the last annotation of a stretch
        that its motion is carried on for. What stands is not annotated while nobody sees it, and is there all the same:
        it stays for STAYS, and in between if it stands at the same place afterwards.
        """
        knots = self._knots
        t, i = knots.place(stamp)
        if i is None:
            return None
        begin = knots.seconds[i]
        follows = i + 1 < len(knots.seconds) and knots.seconds[i + 1] - begin <= GAP
        if t <= begin or not follows:
            near = i if t <= begin or i + 1 == len(knots.seconds) or t - begin <= knots.seconds[i + 1] - t else i + 1
            away = t - knots.seconds[near]
            if abs(away) > 0.05 and knots.stands(i, near, away):
                return knots.poses[near]
            return knots.carried(near, away) if abs(away) <= beyond else None
        return knots.between(i, t)

    def motion(self, stamp: int) -> tuple[np.ndarray, np.ndarray]:
        """Velocity (3,) m/s of the box's middle and spin (3,) rad/s, both in world axes; NaN where not known.

        At an annotation: the slope of the parabola through it and its neighbours, one-sided at the ends of a track
        (the plain difference of devkit's `box_velocity` is 0.5 m/s off there for a car that brakes with 2 m/s^2).
        Neighbours further away than GAP do not count; a track of one annotation has no motion.
        """
        knots, unknown = self._knots, np.full(3, np.nan)
        t, i = knots.place(stamp)
        if i is None:
            return unknown, unknown
        for near in (i, i + 1):
            if near < len(knots.seconds) and abs(t - knots.seconds[near]) <= 0.05:
                return knots.velocity[near], knots.spin[near]
        if i + 1 < len(knots.seconds) and knots.seconds[i] < t and knots.seconds[i + 1] - knots.seconds[i] <= GAP:
            step = 1e-3
            a, b = knots.between(i, t - step), knots.between(i, t + step)
            return (b[:3, 3] - a[:3, 3]) / (2 * step), _turn(b[:3, :3] @ a[:3, :3].T) / (2 * step)
        if self.at(stamp) is not None:  # it stands
            return np.zeros(3), np.zeros(3)
        return unknown, unknown

    def assumed(self, stamp: int) -> bool:
        """Is it beyond its annotations, or in a gap of them: does `at` only take it to stand still?"""
        knots = self._knots
        t, i = knots.place(stamp)
        if i is None or np.abs(knots.seconds - t).min() <= 0.05:
            return False
        return t < knots.seconds[0] or i + 1 == len(knots.seconds) or knots.seconds[i + 1] - knots.seconds[i] > GAP

    def annotated(self, stamp: int) -> int | None:
        """The stamp of the nearest annotation with a pose, None where there is none."""
        knots = self._knots
        if not len(knots.seconds):
            return None
        nearest = np.argmin(np.abs(knots.seconds - (int(stamp) - knots.zero) / NANO))
        return knots.zero + round(float(knots.seconds[nearest]) * NANO)

    @cached_property
    def _knots(self) -> "_Knots":
        poses = self.world_from_box.to(torch.float64).numpy()
        known = np.isfinite(poses).all((1, 2))
        return _Knots(np.array(self.stamps, dtype=np.int64)[known], poses[known])


@dataclass(frozen=True)
class Keyframe:
    """An instant that gets a label."""

    token: str
    stamp: int  # ns, of the LiDAR
    world_from_car: Tensor  # (4, 4) float64
    cameras: Cameras | None = None  # (N) float64, in the car frame of this instant; None: nobody asks for mask_camera
    used: Tensor | None = field(default=None)  # (N,) bool; None: all

    def __post_init__(self):
        if not rigid.is_rigid(self.world_from_car):
            raise ValueError(f"keyframe {self.token}: its pose is no rigid motion (finite, orthonormal)")


class _Knots:
    """The annotations of a track that have a pose, with their motion. K of them."""

    def __init__(self, stamps: np.ndarray, poses: np.ndarray):
        self.zero = int(stamps[0]) if len(stamps) else 0
        self.seconds, self.poses = (stamps - self.zero) / NANO, poses
        self.velocity, self.spin = np.full((2, len(stamps), 3), np.nan)
        for i in range(len(stamps)):
            near = self._neighbours(i)
            if len(near) < 2:
                continue
            weights = _slope(self.seconds[near] - self.seconds[i])
            turns = np.stack([_turn(poses[i, :3, :3].T @ poses[j, :3, :3]) for j in near])
            self.velocity[i] = weights @ poses[near, :3, 3]
            self.spin[i] = poses[i, :3, :3] @ (weights @ turns)

    def _neighbours(self, i: int) -> list[int]:
        """Up to three annotations that tell the motion at the i-th, no two further apart than GAP."""
        stretch = [i]
        for step in (-1, 1):
            j = i
            while len(stretch) < 5 and 0 <= j + step < len(self.seconds) and abs(j + step - i) <= 2:
                if abs(self.seconds[j + step] - self.seconds[j]) > GAP:
                    break
                j += step
                stretch.append(j)
        return sorted(sorted(stretch, key=lambda j: (abs(j - i), j))[:3])

    def place(self, stamp: int) -> tuple[float, int | None]:
        """Seconds on our clock, and the last annotation at or before (the first, for what is before all)."""
        t = (int(stamp) - self.zero) / NANO
        return t, (max(int(np.searchsorted(self.seconds, t, "right")) - 1, 0) if len(self.seconds) else None)

    def stands(self, i: int, near: int, away: float) -> bool:
        """Is the object, `away` s from annotation `near` and after the i-th, still where it was there?"""
        if self.seconds[i] < self.seconds[near] + away and i + 1 < len(self.seconds):  # a gap: what comes after it?
            moved = np.linalg.norm(self.poses[i + 1, :3, 3] - self.poses[i, :3, 3])
            return moved < 0.3 and not np.linalg.norm(self.velocity[near]) >= STANDS
        return abs(away) <= STAYS and np.linalg.norm(self.velocity[near]) < STANDS  # NaN: nobody knows

    def carried(self, i: int, seconds: float) -> np.ndarray | None:
        """The i-th pose moved on by its own motion; None where that is not known and would be needed."""
        pose = self.poses[i].copy()
        if np.isfinite(self.velocity[i]).all():
            pose[:3, 3] += self.velocity[i] * seconds
            pose[:3, :3] = _rotation(self.spin[i] * seconds) @ pose[:3, :3]
        elif abs(seconds) > 0.05:
            return None
        return pose

    def between(self, i: int, t: float) -> np.ndarray:
        """Hermite's cubic for the place and for the turn since the i-th pose."""
        first, last, length = self.poses[i], self.poses[i + 1], self.seconds[i + 1] - self.seconds[i]
        s = (t - self.seconds[i]) / length
        start, end = s * (s - 1) ** 2 * length, s * s * (s - 1) * length  # weights of the two slopes
        blend = s * s * (3 - 2 * s)
        turn = _turn(first[:3, :3].T @ last[:3, :3])
        spins = [first[:3, :3].T @ self.spin[j] for j in (i, i + 1)]  # of both ends, seen from the first
        pose = np.eye(4)
        pose[:3, 3] = first[:3, 3] + blend * (last[:3, 3] - first[:3, 3])
        pose[:3, 3] += start * self.velocity[i] + end * self.velocity[i + 1]
        pose[:3, :3] = first[:3, :3] @ _rotation(blend * turn + start * spins[0] + end * spins[1])
        return pose


def _slope(t: np.ndarray) -> np.ndarray:
    """Weights of values at times t (2 or 3 of them) that give the slope at time 0 of the polynomial through them."""
    if len(t) == 2:
        return np.array([-1.0, 1.0]) / (t[1] - t[0])
    a, b, c = t
    return np.array([-(b + c) / ((a - b) * (a - c)), -(a + c) / ((b - a) * (b - c)), -(a + b) / ((c - a) * (c - b))])


def _turn(rotation: np.ndarray) -> np.ndarray:
    """Rotation (3, 3) -> axis times angle (3,), rad. Half a turn has no sign; any is taken."""
    sine = (
        np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
        / 2
    )
    size, cosine = np.linalg.norm(sine), (np.trace(rotation) - 1) / 2
    angle = np.arctan2(size, cosine)
    if size > 1e-9:
        return sine * (angle / size)
    if cosine > 0:
        return sine
    axis = (rotation + np.eye(3))[:, np.argmax(np.diag(rotation))]
    return np.pi * axis / np.linalg.norm(axis)


def _rotation(turn: np.ndarray) -> np.ndarray:
    """Axis times angle (3,) -> rotation (3, 3)."""
    angle = np.linalg.norm(turn)
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = turn / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
