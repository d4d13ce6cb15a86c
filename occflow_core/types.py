"""The nouns: Classes, Frame, Clip, Occupancy, Prediction (with Cameras and Grid from `geometry`: seven).

B batch, T time (newest first), N cameras, P points, X Y Z voxels. All frozen: what you hold does not change under you.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .geometry import Cameras, Grid, rigid
from .transfer import sent

NANO = 1_000_000_000  # stamps are integer nanoseconds; differences become seconds


@dataclass(frozen=True)
class Classes:
    """A table of class names; the id of a class is its place."""

    table: str  # the id that messages carry, e.g. "occ3d-nuscenes"
    names: tuple[str, ...]  # without "free"
    moving: tuple[str, ...]  # names of the classes that have a flow
    colours: tuple[tuple[int, int, int], ...]  # RGB, one a name

    def __post_init__(self):
        unknown = set(self.moving) - set(self.names)
        if unknown or len(set(self.names)) != len(self.names) or len(self.colours) != len(self.names):
            raise ValueError(f"classes {self.table}: names repeat, lack a colour, or do not hold {sorted(unknown)}")

    @property
    def free(self) -> int:
        """The id of free space: one past the last class."""
        return len(self.names)

    @property
    def moving_ids(self) -> tuple[int, ...]:
        return tuple(self.names.index(name) for name in self.moving)

    def id(self, name: str) -> int:
        return self.names.index(name)


# nuScenes' own colours (nuscenes-devkit, `utils/color_map.py`, the map of lidarseg)
_COLOURS = {
    "others": (0, 0, 0),
    "barrier": (112, 128, 144),
    "bicycle": (220, 20, 60),
    "bus": (255, 127, 80),
    "car": (255, 158, 0),
    "construction_vehicle": (233, 150, 70),
    "motorcycle": (255, 61, 99),
    "pedestrian": (0, 0, 230),
    "traffic_cone": (47, 79, 79),
    "trailer": (255, 140, 0),
    "truck": (255, 99, 71),
    "driveable_surface": (0, 207, 191),
    "other_flat": (175, 0, 75),
    "sidewalk": (75, 0, 75),
    "terrain": (112, 180, 60),
    "manmade": (222, 184, 135),
    "vegetation": (0, 175, 0),
}
_MOVING = ("car", "truck", "trailer", "bus", "construction_vehicle", "bicycle", "motorcycle", "pedestrian")


def _classes(table: str, names: str) -> Classes:
    names = tuple(names.split())
    return Classes(table, names, _MOVING, tuple(_COLOURS[name] for name in names))


# Occ3D-nuScenes (arXiv 2304.14365) and OpenOcc v2 (arXiv 2306.02851 and the 2024 challenge): ids of their label files
OCC3D = _classes(
    "occ3d-nuscenes",
    "others barrier bicycle bus car construction_vehicle motorcycle pedestrian traffic_cone trailer truck "
    "driveable_surface other_flat sidewalk terrain manmade vegetation",
)
OPENOCC = _classes(
    "openocc-v2",
    "car truck trailer bus construction_vehicle bicycle motorcycle pedestrian traffic_cone barrier "
    "driveable_surface other_flat sidewalk terrain manmade vegetation",
)
# OpenOccupancy (arXiv 2303.03991): its labels less one, and its 0, which is noise, free
OPENOCCUPANCY = _classes(
    "openoccupancy",
    "barrier bicycle bus car construction_vehicle motorcycle pedestrian traffic_cone trailer truck "
    "driveable_surface other_flat sidewalk terrain manmade vegetation",
)
TABLES = {classes.table: classes for classes in (OCC3D, OPENOCC, OPENOCCUPANCY)}


@dataclass(frozen=True)
class Frame:
    """One instant: what the ROS node and a dataset both produce.

    `stamp` is the newest used image's (in data sets the keyframe's LIDAR stamp); `world_from_car` is the pose there,
    and each camera's `car_from_camera` includes the car's motion between that camera's own stamp and `stamp`.
    """

    images: Tensor  # (N, 3, H, W) uint8 RGB, at camera size or the network's, on any device; black where not used
    cameras: Cameras  # (N), float64, true for these pixels
    used: Tensor  # (N,) bool: cameras that are really in this frame
    stamps: Tensor  # (N,) int64 ns, each camera's own; where not used: `stamp`
    stamp: int  # ns, the reference
    world_from_car: Tensor  # (4, 4) float64
    drive: str  # frames of one drive follow each other
    names: tuple[str, ...]  # of the cameras, in order
    points: Tensor | None = None  # (P, 5) float32: x y z (car frame, m), intensity, age s

    def __post_init__(self):
        n, planes, height, width = self.images.shape if self.images.ndim == 4 else (0, 0, 0, 0)
        if planes != 3 or self.images.dtype != torch.uint8:
            raise ValueError(f"frame: images must be (N, 3, H, W) uint8, got {_kind(self.images)}")
        if self.cameras.shape != (n,) or (self.cameras.height, self.cameras.width) != (height, width):
            raise ValueError(
                f"frame: {n} pictures of {width} x {height} with cameras {tuple(self.cameras.shape)} of "
                f"{self.cameras.width} x {self.cameras.height}"
            )
        _expect("frame: used", self.used, (n,), torch.bool)
        _expect("frame: stamps", self.stamps, (n,), torch.int64)
        _expect("frame: world_from_car", self.world_from_car, (4, 4), torch.float64)
        if len(self.names) != n or len(set(self.names)) != n:
            raise ValueError(f"frame: {n} pictures need {n} different camera names, got {self.names}")
        if not rigid.is_rigid(self.world_from_car) or not rigid.is_rigid(self.cameras.car_from_camera):
            raise ValueError("frame: world_from_car and car_from_camera must be rigid motions (finite, orthonormal)")
        if self.points is not None and (self.points.ndim != 2 or self.points.shape[1] != 5):
            raise ValueError(f"frame: points must be (P, 5): x y z intensity age, got {_kind(self.points)}")


@dataclass(frozen=True)
class Clip:
    """A batch of short histories, newest first: the only input of a system.

    Each lane of the batch follows a drive of its own. `last` is the clip that this lane was given before; lanes that
    are `fresh` begin a drive: their `now_from_last` and `since_last` are NaN, and a system must not look at them.
    """

    images: Tensor  # (B, T, N, 3, H, W) uint8 RGB, at network size
    cameras: Cameras  # (B, T, N) float32; car frame of each time
    used: Tensor  # (B, T, N) bool
    now_from_then: Tensor  # (B, T, 4, 4) float32, car at t -> car now; [:, 0] is the identity
    age: Tensor  # (B, T) float32 s before now
    now_from_last: Tensor  # (B, 4, 4) float32
    since_last: Tensor  # (B,) float32 s
    fresh: Tensor  # (B,) bool
    points: tuple[Tensor, ...] | None = None  # B x (P, 5), as in Frame, of the newest frame

    def __post_init__(self):
        if self.images.ndim != 6 or self.images.shape[3] != 3:
            raise ValueError(f"clip: images must be (B, T, N, 3, H, W), got {_kind(self.images)}")
        b, t, n, _, height, width = self.images.shape
        if self.cameras.shape != (b, t, n) or (self.cameras.height, self.cameras.width) != (height, width):
            raise ValueError(f"clip: images {tuple(self.images.shape)} and cameras {tuple(self.cameras.shape)} differ")
        _expect("clip: used", self.used, (b, t, n), torch.bool)
        _expect("clip: now_from_then", self.now_from_then, (b, t, 4, 4))
        _expect("clip: age", self.age, (b, t))
        _expect("clip: now_from_last", self.now_from_last, (b, 4, 4))
        _expect("clip: since_last", self.since_last, (b,))
        _expect("clip: fresh", self.fresh, (b,), torch.bool)
        if self.points is not None and len(self.points) != b:
            raise ValueError(f"clip: {b} lanes need {b} point clouds, got {len(self.points)}")

    @staticmethod
    def of(frames: "Frame | Sequence[Frame]", after: "Frame | None" = None) -> "Clip":
        """A batch of one from one frame, or from a window of frames, newest first.

        `after`: the newest frame of the clip that the system was given before, or None where a drive begins.
        """
        frames = [frames] if isinstance(frames, Frame) else list(frames)
        now = frames[0]
        if any(then.stamp > newer.stamp for newer, then in zip(frames, frames[1:], strict=False)):
            raise ValueError(f"clip: frames must be newest first, got stamps {[f.stamp for f in frames]}")
        if any(f.names != now.names or f.drive != now.drive for f in frames):
            raise ValueError("clip: the frames of a window must share their drive and their cameras")
        if after is not None and (after.drive != now.drive or after.stamp > now.stamp):
            raise ValueError(f"clip: {now.drive} at {now.stamp} ns does not follow {after.drive} at {after.stamp} ns")
        car_from_world = rigid.inverse(now.world_from_car)
        relative = torch.stack([car_from_world @ f.world_from_car for f in frames])
        relative[0] = torch.eye(4, dtype=relative.dtype)
        nan = torch.tensor(float("nan"))
        return Clip(
            images=torch.stack([f.images for f in frames])[None],
            cameras=Cameras(
                torch.stack([f.cameras.pixels_from_camera for f in frames])[None].float(),
                torch.stack([f.cameras.car_from_camera for f in frames])[None].float(),
                now.cameras.height,
                now.cameras.width,
            ),
            used=torch.stack([f.used for f in frames])[None],
            now_from_then=relative[None].float(),
            age=torch.tensor([[(now.stamp - f.stamp) / NANO for f in frames]], dtype=torch.float32),
            now_from_last=(nan.expand(4, 4) if after is None else car_from_world @ after.world_from_car)[None].float(),
            since_last=(nan if after is None else torch.tensor((now.stamp - after.stamp) / NANO))[None].float(),
            fresh=torch.tensor([after is None]),
            points=None if now.points is None else (now.points,),
        )

    @staticmethod
    def batch(clips: "Sequence[Clip]") -> "Clip":
        """Clips side by side: a batch of two is two batches of one."""
        first = clips[0]
        if any((c.points is None) != (first.points is None) for c in clips):
            raise ValueError("clip: either every lane brings points or none does")

        def join(name):
            return torch.cat([getattr(c, name) for c in clips])

        return Clip(
            images=join("images"),
            cameras=Cameras(
                torch.cat([c.cameras.pixels_from_camera for c in clips]),
                torch.cat([c.cameras.car_from_camera for c in clips]),
                first.cameras.height,
                first.cameras.width,
            ),
            points=None if first.points is None else tuple(p for c in clips for p in c.points),
            **{name: join(name) for name in ("used", "now_from_then", "age", "now_from_last", "since_last", "fresh")},
        )

    def to(self, device) -> "Clip":
        """On a device; but `age`, `since_last` and `fresh` stay: they decide which instants are looked at, and the host
        would have to wait until it could read them back."""
        cameras = replace(
            self.cameras,
            pixels_from_camera=sent(self.cameras.pixels_from_camera, device),
            car_from_camera=sent(self.cameras.car_from_camera, device),
        )
        names = ("images", "used", "now_from_then", "now_from_last")
        points = None if self.points is None else tuple(sent(p, device) for p in self.points)
        return replace(self, cameras=cameras, points=points, **{n: sent(getattr(self, n), device) for n in names})


@dataclass(frozen=True)
class Occupancy:
    """What is true: labels of every voxel, the velocity of what fills it, and whether anybody saw it."""

    grid: Grid
    classes: Classes
    labels: Tensor  # (..., X, Y, Z) uint8, classes.free where nothing is
    flow: Tensor | None  # (..., X, Y, Z, 2) float32: vx vy over ground, m/s, car frame now; NaN = not known
    seen: Tensor  # (..., X, Y, Z) bool
    instances: Tensor | None = None  # (..., X, Y, Z) int32: ids of things, i.e. of what can move; 0 = of none

    def __post_init__(self):
        _expect_voxels("occupancy", self.grid, self.labels, self.flow, self.seen, self.instances)

    def to(self, device) -> "Occupancy":
        return _moved(self, device)


@dataclass(frozen=True)
class Prediction:
    """What a system says about one instant."""

    grid: Grid
    classes: Classes
    labels: Tensor  # (X, Y, Z) uint8, classes.free where nothing is
    score: Tensor  # (X, Y, Z) float32 in [0, 1]: confidence of the label; 0 where free
    flow: Tensor | None = None  # (X, Y, Z, 2) float32: vx vy over ground, m/s, car frame now; 0 where free
    unobserved: Tensor | None = None  # (X, Y, Z) bool: no ray of a used camera of this set came here; None = not asked
    instances: Tensor | None = None  # (X, Y, Z) int32, 0 = of none; what cannot move may have ids, too

    def __post_init__(self):
        _expect_voxels("prediction", self.grid, self.labels, self.flow, self.unobserved, self.instances)
        _expect("prediction: score", self.score, self.labels.shape)

    def sparse(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Filled voxels: indices (M, 3) int64 in x, y, z, labels (M,), score (M,), flow (M, 2) or None."""
        filled = self.labels != self.classes.free
        flow = None if self.flow is None else self.flow[filled]
        return filled.nonzero(), self.labels[filled], self.score[filled], flow

    def to(self, device) -> "Prediction":
        return _moved(self, device)


def _moved(noun, device):
    """The same with all its own tensors on a device."""
    tensors = {f.name: getattr(noun, f.name) for f in fields(noun) if isinstance(getattr(noun, f.name), Tensor)}
    return replace(noun, **{name: tensor.to(device) for name, tensor in tensors.items()})


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _expect(what: str, tensor: Tensor, shape: tuple, dtype: torch.dtype | None = None) -> None:
    if tuple(tensor.shape) != tuple(shape) or (dtype is not None and tensor.dtype != dtype):
        wanted = f"{tuple(shape)} {'' if dtype is None else str(dtype).removeprefix('torch.')}".strip()
        raise ValueError(f"{what}: expected {wanted}, got {_kind(tensor)}")


def _expect_voxels(
    what: str, grid: Grid, labels: Tensor, flow: Tensor | None, mask: Tensor | None, instances: Tensor | None
) -> None:
    if tuple(labels.shape[-3:]) != grid.shape or labels.dtype != torch.uint8:
        raise ValueError(f"{what}: labels must be uint8 with last axes {grid.shape}, got {_kind(labels)}")
    if flow is not None:
        _expect(f"{what}: flow", flow, (*labels.shape, 2))
    if mask is not None:
        _expect(f"{what}: mask", mask, labels.shape, torch.bool)
    if instances is not None:
        _expect(f"{what}: instances", instances, labels.shape, torch.int32)
