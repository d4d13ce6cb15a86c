"""nuScenes as it is, or anything in its layout: tables and files -> Frame, Occupancy, Box. N cameras, P points.

The v1.0 tables (mini, trainval, test, or a world of our own) are read directly; nuScenes' devkit is not used. Nothing
is opened before it is asked for: work with cameras touches no LiDAR file. Words of the field: a *scene* is a drive, a
*sample* is one of its keyframes (2 Hz, annotated), *sample_data* is one file of one sensor, a *sweep* is one between
two keyframes. A `Moment` is what the cameras recorded together: one picture each, of a keyframe or of a sweep (12 Hz).

Every error is one sentence that names table, token and path.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import cv2
import msgspec
import numpy as np
import torch
from torch import Tensor

from ..geometry import OCC3D_GRID, Cameras, rigid
from ..pointcloud import Scan, together
from ..types import NANO, OCC3D, OPENOCC, Classes, Frame, Occupancy
from . import tables

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
LIDAR = "LIDAR_TOP"
MICRO = 1000  # tables count microseconds, we count nanoseconds
FASTEST = 70.0  # m/s: a car whose poses say more has a gap in them
MOST_APART = 1.5  # s between two annotations of an object that still give a velocity (nuscenes-devkit, box_velocity)
INVALID_FLOW = 255.0  # m/s and above: "not known" (STCOcc's loader keeps it apart)
# m beyond a box's faces where a voxel's centre may lie and the voxel still be the box's. Any point in it fills a voxel:
# its centre is up to 0.28 m, half a diagonal seen from above, outside the box that the point is in, and boxes that are
# exact need no more. The rest is for boxes that people drew; SparseOcc's script takes as much
REACH = 0.4

# What nuScenes calls things -> classes of ours. As nuScenes-lidarseg merges them to 16 classes (devkit,
# `lidarseg/lidarseg_utils.py`), where the rest is Occ3D's "others"; None: noise and the car itself are nothing.
CLASS_OF = {
    "noise": None,
    "vehicle.ego": None,
    "animal": "others",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "human.pedestrian.personal_mobility": "others",
    "human.pedestrian.stroller": "others",
    "human.pedestrian.wheelchair": "others",
    "movable_object.barrier": "barrier",
    "movable_object.debris": "others",
    "movable_object.pushable_pullable": "others",
    "movable_object.trafficcone": "traffic_cone",
    "static_object.bicycle_rack": "others",
    "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.car": "car",
    "vehicle.construction": "construction_vehicle",
    "vehicle.emergency.ambulance": "others",
    "vehicle.emergency.police": "others",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.trailer": "trailer",
    "vehicle.truck": "truck",
    "flat.driveable_surface": "driveable_surface",
    "flat.other": "other_flat",
    "flat.sidewalk": "sidewalk",
    "flat.terrain": "terrain",
    "static.manmade": "manmade",
    "static.other": "others",
    "static.vegetation": "vegetation",
}

# Scenes of nuScenes' official validation split (devkit, `utils/splits.py`); the other 700 of trainval are its training
_VAL = (
    "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 770-771 775 "
    "777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073"
)


def class_of(category: str, classes: Classes) -> int | None:
    """The id of a nuScenes category in OCC3D or OPENOCC; None for what is nothing there (noise, the car itself, and
    in a table without "others" whatever would be one). ValueError for a category that nuScenes does not have."""
    if category not in CLASS_OF:
        raise ValueError(f"category: {category!r} is none of nuScenes' {len(CLASS_OF)} (lidarseg's included)")
    name = CLASS_OF[category]
    return classes.id(name) if name in classes.names else None


# ---- what comes out


@dataclass(frozen=True)
class SampleData:
    """One file of one sensor, with the car's pose at its stamp."""

    token: str
    channel: str
    scene: str  # name
    stamp: int  # ns
    key: bool  # of a keyframe
    path: Path
    world_from_car: Tensor  # (4, 4) float64, at the stamp
    car_from_sensor: Tensor  # (4, 4) float64, the mounting
    pixels_from_camera: Tensor | None  # (3, 3) float64; None where it is no camera
    height: int  # pixels; 0 where it is no camera
    width: int


@dataclass(frozen=True)
class Moment:
    """What the cameras recorded together: places in `sample_data`, nothing opened yet."""

    scene: str  # name
    sample: str | None  # token of the keyframe; None for a sweep
    stamp: int  # ns: of the keyframe's LiDAR where there is one, else of the newest picture
    rows: tuple[int, ...]  # one a camera, -1 where it recorded nothing
    reference: int  # the row whose pose is the moment's


@dataclass(frozen=True)
class Box:
    """An annotated object."""

    name: str  # nuScenes category
    instance: str  # token: the same object in other keyframes
    token: str  # of the annotation
    world_from_box: Tensor  # (4, 4) float64; the box's x is ahead, y left, z up, its origin the middle
    size: tuple[float, float, float]  # length (x), width (y), height (z), m
    velocity: Tensor  # (3,) float64 m/s over ground, world axes; NaN = not known
    lidar_points: int  # in the keyframe's sweep
    radar_points: int
    attributes: tuple[str, ...]
    visibility: str  # v0-40, v40-60, v60-80, v80-100: % of it seen by the cameras; "" where not told

    def corners(self) -> Tensor:
        """(8, 3) float64, world, m: 0-3 the bottom, 4-7 above them; 0 and 1 ahead, 0 and 3 left."""
        half = torch.tensor(self.size, dtype=torch.float64) / 2
        signs = [[a, b, c] for c in (-1, 1) for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1))]
        return rigid.apply(self.world_from_box, torch.tensor(signs, dtype=torch.float64) * half)


# ---- rows of the tables, as far as they are used


class _Row(msgspec.Struct, gc=False):
    token: str


class _Scene(_Row):
    name: str
    first_sample_token: str
    last_sample_token: str
    nbr_samples: int
    log_token: str = ""
    description: str = ""


class _Sample(_Row):
    timestamp: float  # whole numbers below 2^53: exact, also where a converter wrote 1.5e15
    scene_token: str
    prev: str
    next: str


class _SampleData(_Row):
    sample_token: str
    ego_pose_token: str
    calibrated_sensor_token: str
    timestamp: float
    is_key_frame: bool
    filename: str
    prev: str
    next: str
    height: int | None = None
    width: int | None = None


class _EgoPose(_Row):
    translation: tuple[float | None, float | None, float | None]
    rotation: tuple[float | None, float | None, float | None, float | None]


class _Calibrated(_Row):
    sensor_token: str
    translation: tuple[float, float, float]
    rotation: tuple[float, float, float, float]
    camera_intrinsic: list[list[float]]


class _Sensor(_Row):
    channel: str
    modality: str


class _Log(_Row):
    logfile: str = ""
    vehicle: str = ""
    date_captured: str = ""
    location: str = ""


class _Category(_Row):
    name: str
    index: int | None = None  # nuScenes-lidarseg's


class _Name(_Row):
    name: str


class _Visibility(_Row):
    level: str


class _Instance(_Row):
    category_token: str


class _Annotation(_Row):
    sample_token: str
    instance_token: str
    attribute_tokens: list[str]
    translation: tuple[float, float, float]
    size: tuple[float, float, float]
    rotation: tuple[float, float, float, float]
    prev: str
    next: str
    num_lidar_pts: int = 0
    num_radar_pts: int = 0
    visibility_token: str = ""


class _Lidarseg(_Row):
    sample_data_token: str
    filename: str


class _Map(_Row):
    category: str = ""
    filename: str = ""
    log_tokens: list[str] = []  # noqa: RUF012 (msgspec copies it)


_ROWS = {
    "scene": _Scene,
    "sample": _Sample,
    "calibrated_sensor": _Calibrated,
    "sensor": _Sensor,
    "log": _Log,
    "category": _Category,
    "attribute": _Name,
    "visibility": _Visibility,
    "instance": _Instance,
    "lidarseg": _Lidarseg,
    "map": _Map,
}


# ---- the data set


class NuScenes:
    """A data set in nuScenes' layout, below `dataroot`.

    version: the tables' folder, e.g. "v1.0-trainval"; None where there is only one. cameras: channels in the order that
    Frames have them; None: all cameras of table sensor, nuScenes' own before others. cache: folder for the parsed large
    tables; None: below dataroot, else in the user's cache. progress: bars while tables are parsed.
    """

    def __init__(
        self,
        dataroot: Path | str,
        version: str | None = None,
        cameras: Sequence[str] | None = None,
        cache: Path | str | None = None,
        progress: bool = True,
    ):
        self.dataroot, self.progress = Path(dataroot), progress
        self.version = _version(self.dataroot) if version is None else version
        self.folder = self.dataroot / self.version
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.dataroot} has no tables {self.version}: there is no folder {self.folder}")
        if cameras is not None:
            self.cameras = tuple(cameras)
            if not self.cameras or len(set(self.cameras)) != len(self.cameras):
                raise ValueError(f"cameras: expected some different channels, got {self.cameras}")
        self._cache = tables.cache_folders(self.dataroot) if cache is None else [Path(cache)]
        self._given = (dataroot, version, cameras, cache, progress)
        self._tables: dict[str, list] = {}
        self._index: dict[str, dict[str, int]] = {}
        self._sets: dict[str, tuple[Moment, ...]] = {}

    def __reduce__(self):
        return NuScenes, self._given  # a worker process opens its own: mapped columns do not travel

    @cached_property
    def cameras(self) -> tuple[str, ...]:
        """Channels of the cameras, in the order that Frames have them."""
        told = [row.channel for row in self._table("sensor") if row.modality == "camera"]
        if not told:
            raise ValueError(f"table sensor: no row is a camera ({self._path('sensor')})")
        return (*(c for c in CAMERAS if c in told), *(c for c in dict.fromkeys(told) if c not in CAMERAS))

    # -- scenes and their keyframes

    @property
    def scenes(self) -> tuple[str, ...]:
        """Names, in the order of time."""
        return tuple(scene.name for scene in self._scenes)

    def split(self, name: str) -> tuple[str, ...]:
        """Scenes of a split, in the order of time: "train", "val", "test", "mini_train", "mini_val" as nuScenes has
        them, "all", or a name of `splits.json` beside the tables (as the devkit reads it).

        ValueError where there is no such split; scenes that these tables lack are left out.
        """
        own = self.folder / "splits.json"
        told = msgspec.json.decode(own.read_bytes(), type=dict[str, list[str]]) if own.exists() else {}
        if name in told:
            unknown = sorted(set(told[name]) - set(self.scenes))
            if unknown:
                raise ValueError(f"split {name}: {', '.join(unknown)} stand in no row of table scene ({own})")
            wanted = set(told[name]).__contains__
        elif name == "all" or (name == "test" and self.version.endswith("test")):
            wanted = bool
        elif name in ("val", "train") and self.version.endswith("trainval"):
            wanted = _official_val().__contains__ if name == "val" else lambda s: s not in _official_val()
        elif name in ("mini_val", "mini_train") and self.version.endswith("mini"):
            wanted = lambda s: (s in ("scene-0103", "scene-0916")) == (name == "mini_val")  # noqa: E731
        else:
            raise ValueError(
                f"split {name!r}: {self.version} has none of that name, and {own} "
                + (f"has {', '.join(told)}" if told else "does not exist")
            )
        return tuple(scene for scene in self.scenes if wanted(scene))

    def samples(self, scene: str) -> tuple[str, ...]:
        """Tokens of a scene's keyframes, in the order of time.

        ValueError naming the token where the chain of prev and next is not whole.
        """
        return tuple(self._table("sample")[row].token for row in self._sample_rows(scene))

    def scene_of(self, sample: str) -> str:
        """The name of the scene that a keyframe belongs to."""
        return self._by_token("scene", self._row("sample", sample).scene_token, "sample", sample).name

    def location(self, scene: str) -> str:
        """Where a scene was recorded, as its log tells it."""
        row = self._scene(scene)
        return self._by_token("log", row.log_token, "scene", row.token).location

    # -- what the sensors recorded

    def channels(self, scene: str) -> tuple[str, ...]:
        """Sensors that recorded anything in a scene."""
        first, last = self._slice(scene)
        return tuple(c for i, c in enumerate(self._channels) if self._begin[first + i + 1] > self._begin[first + i])

    def sweeps(self, scene: str, channel: str) -> range:
        """Rows of everything that a sensor recorded in a scene, keyframes too, in the order of time: for `data`.

        ValueError where the sensor recorded nothing or the chain of prev and next contradicts the stamps.
        """
        rows = self._rows(scene, channel)
        if not rows:
            raise ValueError(f"table sample_data: no row of {channel} in {scene} ({self._path('sample_data')})")
        return rows

    def data(self, row: int) -> SampleData:
        """A row of sample_data, with its pose and calibration. ValueError where either is broken."""
        columns = self._columns
        token = columns["token"][row].decode()
        if columns["broken"][row] >= 0:
            raise ValueError(self._sentences[columns["broken"][row]])
        calibrated = self._table("calibrated_sensor")[columns["calibrated"][row]]
        scene, channel = divmod(int(np.searchsorted(self._begin, row, "right")) - 1, len(self._channels))
        where = f"table calibrated_sensor: {calibrated.token}"
        matrix = None
        if calibrated.camera_intrinsic:
            matrix = torch.tensor(calibrated.camera_intrinsic, dtype=torch.float64)
            if matrix.shape != (3, 3) or not torch.isfinite(matrix).all() or matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
                raise ValueError(
                    f"{where} has the camera_intrinsic {calibrated.camera_intrinsic}, expected a 3 x 3 matrix of a "
                    f"pinhole camera ({self._path('calibrated_sensor')})"
                )
        try:
            mounting = rigid.from_quaternion(calibrated.rotation, calibrated.translation)
        except ValueError as error:
            raise ValueError(f"{where}: {error} ({self._path('calibrated_sensor')})") from None
        return SampleData(
            token=token,
            channel=self._channels[channel],
            scene=self._scenes[scene].name,
            stamp=int(columns["stamp"][row]),
            key=bool(columns["key"][row]),
            path=self.dataroot / self._filename(row),
            world_from_car=self._pose(row),
            car_from_sensor=mounting,
            pixels_from_camera=matrix,
            height=int(columns["height"][row]),
            width=int(columns["width"][row]),
        )

    def points(self, row: int) -> Tensor:
        """A LiDAR sweep (P, 5) float32 as it was recorded: x y z (m, the sensor's frame), intensity, ring.

        FileNotFoundError and ValueError where the file is missing, truncated or holds what is not finite.
        """
        data = self.data(row)
        values = self._read(data, lambda path: np.fromfile(path, np.float32))
        if values.size == 0 or values.size % 5 or data.path.stat().st_size % 4:
            raise ValueError(
                f"sample_data {data.token}: {data.path.stat().st_size} bytes are no whole number of points of 5 "
                f"float32 (is it truncated?): {data.path}"
            )
        points = torch.from_numpy(values.reshape(-1, 5))
        if not torch.isfinite(points[:, :3]).all():
            raise ValueError(f"sample_data {data.token}: there are points that are not finite: {data.path}")
        return points

    def lidarseg(self, sample: str) -> Tensor:
        """nuScenes-lidarseg's label of each point of a keyframe's LiDAR, (P,) uint8: indices of `category_names`.

        FileNotFoundError where this data set has none; ValueError where their number is not that of the points.
        """
        row = self.keyframe(sample).reference
        data = self.data(row)
        if data.channel != LIDAR:
            raise ValueError(f"sample {sample}: no keyframe of {LIDAR} in table sample_data, so nothing has labels")
        if "lidarseg" not in self._index:
            self._index["lidarseg"] = {r.sample_data_token: i for i, r in enumerate(self._table("lidarseg"))}
        place = self._index["lidarseg"].get(data.token)
        if place is None:
            raise ValueError(f"table lidarseg: no row for sample_data {data.token} ({self._path('lidarseg')})")
        path = self.dataroot / self._table("lidarseg")[place].filename
        if not path.exists():
            raise FileNotFoundError(f"lidarseg of sample_data {data.token}: no file {path}")
        labels, points = np.fromfile(path, np.uint8), data.path.stat().st_size // 20
        if len(labels) != points:
            raise ValueError(f"lidarseg of sample_data {data.token}: {len(labels)} labels for {points} points: {path}")
        if len(labels) and int(labels.max()) not in self.category_names:
            raise ValueError(
                f"lidarseg of sample_data {data.token}: label {labels.max()} has no row in table category: {path}"
            )
        return torch.from_numpy(labels)

    @cached_property
    def category_names(self) -> dict[int, str]:
        """nuScenes-lidarseg's ids -> category names. Without lidarseg, the rows in their order."""
        rows = self._table("category")
        return {i if row.index is None else row.index: row.name for i, row in enumerate(rows)}

    # -- moments and frames

    def moments(self, scene: str) -> tuple[Moment, ...]:
        """All of a scene in the order of time: keyframes, and between them the sweeps of the cameras (12 Hz).

        A keyframe's pictures are those that the tables call so. Sweeps are put together by their stamps less each
        camera's usual lead over the keyframe, within 0.4 periods; a camera that dropped a picture leaves a hole.
        """
        if scene not in self._sets:
            self._sets[scene] = tuple(self._moments(scene))
        return self._sets[scene]

    def keyframes(self, scene: str) -> tuple[Moment, ...]:
        """A scene's keyframes, in the order of time."""
        return tuple(moment for moment in self.moments(scene) if moment.sample is not None)

    def keyframe(self, sample: str) -> Moment:
        """The moment of a keyframe's token."""
        scene = self.scene_of(sample)
        return next(moment for moment in self.moments(scene) if moment.sample == sample)

    def earlier(self, moment: Moment, steps: int) -> Moment:
        """What each camera recorded `steps` pictures before its picture of this moment; holes where nothing is left.

        This is how the published systems walk (`prev` of each camera), whatever the stamps say; `moments` goes by the
        stamps. The two agree where no camera dropped a picture.
        """
        rows = []
        for channel, row in zip(self.cameras, moment.rows):
            there = self._rows(moment.scene, channel)
            rows.append(row - steps if row >= 0 and row - steps >= there.start else -1)
        for key in self.keyframes(moment.scene):
            if key.rows == tuple(rows):
                return key
        return self._sweep(moment.scene, rows)

    def pose(self, moment: Moment) -> Tensor:
        """world_from_car (4, 4) float64 at a moment's stamp. ValueError where table ego_pose has none that can be."""
        self.data(moment.reference)  # says what is broken there
        return self._pose(moment.reference)

    def rig(self, moment: Moment, partial: bool = False) -> tuple[Cameras, Tensor, Tensor]:
        """Cameras (N) float64 that are true at the moment, `used` (N,) bool and `stamps` (N,) int64 ns; no picture is
        opened. Errors as `frame`."""
        seen = [None if row < 0 else self.data(row) for row in moment.rows]
        holes = [name for name, data in zip(self.cameras, seen) if data is None]
        if moment.sample is not None and holes and not partial:
            raise ValueError(
                f"sample {moment.sample}: no keyframe of {', '.join(holes)} in table sample_data "
                f"({self._path('sample_data')})"
            )
        sizes = {(data.height, data.width) for data in seen if data}
        if len(sizes) != 1 or any(data and data.pixels_from_camera is None for data in seen):
            raise ValueError(
                f"{moment.scene} at {moment.stamp} ns: expected cameras with pictures of one size, got "
                f"{ {d.channel: f'{d.width} x {d.height}' for d in seen if d} } ({self._path('sample_data')})"
            )
        now = self.pose(moment)
        car_from_world, height_width = rigid.inverse(now), sizes.pop()
        intrinsics, poses, stamps = [], [], []
        for data in seen:
            if data is None:
                intrinsics.append(torch.eye(3, dtype=torch.float64))
                poses.append(torch.eye(4, dtype=torch.float64))
                stamps.append(moment.stamp)
                continue
            self.no_gap(data, now, moment.stamp)
            intrinsics.append(data.pixels_from_camera)
            # float64 until relative: the car's own motion between the picture and the moment is in it
            poses.append(car_from_world @ data.world_from_car @ data.car_from_sensor)
            stamps.append(data.stamp)
        cameras = Cameras(torch.stack(intrinsics), torch.stack(poses), *height_width)
        return cameras, torch.tensor([data is not None for data in seen]), torch.tensor(stamps)

    def frame(self, moment: Moment, lidar: int = 0, partial: bool = False) -> Frame:
        """The pictures of a moment as a Frame.

        lidar: how many LiDAR sweeps its `points` get, the newest first and none younger than the moment (x y z in the
        car frame of the moment, intensity, age in s); 0: no LiDAR file is touched. partial: take a keyframe that lacks
        a camera; sweeps are taken with holes in any case, and `used` says which. FileNotFoundError for a file that is
        missing; ValueError for one that is broken, for a pose that cannot be or a row that is missing.
        """
        cameras, used, stamps = self.rig(moment, partial)
        images = torch.zeros((len(used), cameras.height, cameras.width, 3), dtype=torch.uint8)
        for i, row in enumerate(moment.rows):
            if row >= 0:
                self._decode(self.data(row), images[i].numpy())
        return Frame(
            images=images.permute(0, 3, 1, 2),
            cameras=cameras,
            used=used,
            stamps=stamps,
            stamp=moment.stamp,
            world_from_car=self._pose(moment.reference),
            drive=moment.scene,
            names=self.cameras,
            points=self.cloud(moment, lidar) if lidar else None,
        )

    def cloud(self, moment: Moment, sweeps: int = 1) -> Tensor:
        """Points (P, 5) float32 of the last LiDAR sweeps: x y z (m, the moment's car frame), intensity, age (s).

        The newest sweep, and all of it, comes first; those before leave out what is close to the sensor
        (`pointcloud.CLOSE`). Fewer sweeps where the scene has no more. ValueError where there
        is none before the moment, and where the poses have a gap.
        """
        rows = self.sweeps(moment.scene, LIDAR)
        stamps = self._columns["stamp"][rows.start : rows.stop]
        newest = rows.start + int(np.searchsorted(stamps, moment.stamp, "right")) - 1
        if newest < rows.start:
            raise ValueError(f"{moment.scene}: no row of {LIDAR} at or before {moment.stamp} ns in table sample_data")
        now, scans = self._pose(moment.reference), []
        car_from_world = rigid.inverse(now)
        for row in range(newest, max(rows.start, newest - sweeps + 1) - 1, -1):
            data = self.data(row)
            self.no_gap(data, now, moment.stamp)
            car_from_sensor = car_from_world @ data.world_from_car @ data.car_from_sensor
            scans.append(Scan(self.points(row), car_from_sensor, (moment.stamp - data.stamp) / NANO))
        return together(scans)

    def no_gap(self, data: SampleData, world_from_car: Tensor, stamp: int) -> None:
        """ValueError where the car cannot have come from one pose to the other: that of `data`, and another (4, 4)
        float64 of the same scene at `stamp` ns."""
        far = float((data.world_from_car[:3, 3] - world_from_car[:3, 3]).norm())
        seconds = abs(data.stamp - stamp) / NANO
        if far > FASTEST * seconds + 0.5:
            raise ValueError(
                f"table ego_pose: a gap: the pose of sample_data {data.token} ({data.channel}) lies {far:.1f} m from "
                f"that of {data.scene} at {stamp} ns, {seconds:.3f} s apart ({self._path('ego_pose')})"
            )

    # -- what is true

    def label_path(self, sample: str, kind: str) -> Path:
        """Where the label of a keyframe lies: kind "occ3d" (gts/) or "openocc" (openocc_v2/)."""
        return self.dataroot / _label_kind(kind)[0] / self.scene_of(sample) / sample / "labels.npz"

    def occupancy(self, sample: str, kind: str, seen_by: str = "camera", instances: bool = False) -> Occupancy:
        """A keyframe's label in the Occ3D grid: kind "occ3d" or "openocc" (v2). `seen_by`, errors: as `read_label`.

        instances: with those that the file has or, where it has none, those of the keyframe's boxes (`things`).
        """
        path, classes = self.label_path(sample, kind), _label_kind(kind)[1]
        truth = read_label(path, classes, f"sample {sample}", seen_by, instances)
        if instances and truth.instances is None:
            car_from_world = rigid.inverse(self.pose(self.keyframe(sample)))
            truth = replace(truth, instances=things(truth, self.boxes(sample), car_from_world))
        return truth

    def boxes(self, sample: str) -> tuple[Box, ...]:
        """The annotated objects of a keyframe, with velocities by nuScenes' rule.

        Velocity: position after less position before, over the time between; where one of the two is missing, now takes
        its place. NaN where both are, or where more than 1.5 s (3 s from before to after) lie between.
        """
        row = self._place("sample", sample)
        begin = self._boxes["begin"]
        return tuple(self._box(i) for i in range(int(begin[row]), int(begin[row + 1])))

    def boxes_at(self, scene: str, stamp: int) -> tuple[Box, ...]:
        """The objects of a scene at any stamp (ns) between its first and its last keyframe.

        Objects that both neighbouring keyframes have are interpolated (places linearly, turns by slerp); others are
        left out, as nobody knows where they are. At a keyframe's own stamp: its `boxes`. ValueError outside.
        """
        rows = self._sample_rows(scene)
        stamps = [round(self._table("sample")[row].timestamp) * MICRO for row in rows]
        after = int(np.searchsorted(stamps, stamp))
        if stamp < stamps[0] or stamp > stamps[-1]:
            raise ValueError(f"{scene}: {stamp} ns is not between its keyframes, {stamps[0]} to {stamps[-1]} ns")
        samples = self.samples(scene)
        if stamps[after] == stamp:
            return self.boxes(samples[after])
        fraction = (stamp - stamps[after - 1]) / (stamps[after] - stamps[after - 1])
        later = {box.instance: box for box in self.boxes(samples[after])}
        return tuple(
            _between(box, later[box.instance], fraction)
            for box in self.boxes(samples[after - 1])
            if box.instance in later
        )

    # -- tables

    def _path(self, table: str) -> Path:
        return self.folder / f"{table}.json"

    def _table(self, name: str) -> list:
        if name not in self._tables:
            rows = [row for part in tables.read(self._path(name), _ROWS[name]) for row in part]
            if name == "scene":
                wrong = next((a.name for i, a in enumerate(rows) if a.name in {b.name for b in rows[:i]}), None)
                if wrong:
                    raise ValueError(f"table scene: {wrong} stands there twice ({self._path('scene')})")
            self._tables[name] = rows
        return self._tables[name]

    def _place(self, table: str, token: str, asked_by: str = "") -> int:
        if table not in self._index:
            rows = self._table(table)
            self._index[table] = {row.token: i for i, row in enumerate(rows)}
            if len(self._index[table]) != len(rows):
                twice = tables.twice(tables.texts([row.token for row in rows]))
                raise ValueError(f"table {table}: token {twice} stands there twice ({self._path(table)})")
        place = self._index[table].get(token)
        if place is None:
            asked_by = f", which {asked_by} names," if asked_by else ""
            raise ValueError(f"table {table}: token {token}{asked_by} is not there ({self._path(table)})")
        return place

    def _row(self, table: str, token: str):
        return self._table(table)[self._place(table, token)]

    def _by_token(self, table: str, token: str, asking: str, by: str):
        return self._table(table)[self._place(table, token, f"{asking} {by}")]

    @cached_property
    def _scenes(self) -> list[_Scene]:
        """Rows of table scene by the time of their first keyframe; those whose first keyframe is unknown at the end."""
        stamps = {row.token: row.timestamp for row in self._table("sample")}
        return sorted(self._table("scene"), key=lambda s: stamps.get(s.first_sample_token, float("inf")))

    def _scene(self, name: str) -> _Scene:
        for row in self._scenes:
            if row.name == name:
                return row
        raise ValueError(f"table scene: no row is named {name!r} ({self._path('scene')})")

    def _sample_rows(self, scene: str) -> list[int]:
        """Places in table sample of a scene's keyframes, along `next`."""
        row = self._scene(scene)
        chain, token, before = [], row.first_sample_token, f"scene {row.token}"
        while token:
            place = self._place("sample", token, before)
            sample = self._table("sample")[place]
            last = self._table("sample")[chain[-1]] if chain else None
            if sample.scene_token != row.token or sample.prev != (last.token if last else "") or len(chain) > 1e6:
                raise ValueError(
                    f"table sample: {token} follows {last.token if last else 'nothing'} in {scene}, but names prev "
                    f"{sample.prev or 'nothing'} and scene {sample.scene_token} ({self._path('sample')})"
                )
            if last and sample.timestamp <= last.timestamp:
                raise ValueError(
                    f"table sample: {token} follows {last.token} but is not younger ({self._path('sample')})"
                )
            chain.append(place)
            token, before = sample.next, f"sample {token}"
        last = self._table("sample")[chain[-1]].token if chain else "nothing"
        if last != row.last_sample_token or len(chain) != row.nbr_samples:
            raise ValueError(
                f"table scene: {scene} tells of {row.nbr_samples} samples up to {row.last_sample_token}, table sample "
                f"has {len(chain)} up to {last} ({self._path('scene')})"
            )
        return chain

    # -- sample_data

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        """Columns of sample_data, in the order of scene, channel and time, with the poses."""
        names = ("sample_data", "ego_pose", "scene", "sample", "calibrated_sensor", "sensor")
        return tables.kept(
            f"{self.version}-data", [self._path(name) for name in names], self._cache, self._build_columns
        )

    @cached_property
    def _channels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.channel for row in self._table("sensor")))

    @cached_property
    def _begin(self) -> np.ndarray:
        return np.asarray(self._columns["begin"])

    @cached_property
    def _sentences(self) -> list[str]:
        return [s.decode() for s in self._columns["sentences"].tolist()]

    def _build_columns(self) -> dict[str, np.ndarray]:
        def columns(rows: list[_SampleData]) -> dict[str, np.ndarray]:
            return {
                "token": tables.texts([r.token for r in rows]),
                "sample": tables.texts([r.sample_token for r in rows]),
                "pose": tables.texts([r.ego_pose_token for r in rows]),
                "calibrated": tables.texts([r.calibrated_sensor_token for r in rows]),
                "stamp": np.array([r.timestamp for r in rows]).astype(np.int64) * MICRO,
                "key": np.array([r.is_key_frame for r in rows], bool),
                "height": np.array([r.height or 0 for r in rows], np.int32),
                "width": np.array([r.width or 0 for r in rows], np.int32),
                "prev": tables.texts([r.prev for r in rows]),
                "next": tables.texts([r.next for r in rows]),
                "name": tables.texts([r.filename for r in rows]),
            }

        raw = tables.joined(tables.read(self._path("sample_data"), _SampleData, columns, self.progress))
        # where in other tables: -2 = nowhere
        samples, sensors = self._table("sample"), self._table("sensor")
        sample = tables.places([r.token for r in samples])(raw["sample"])
        calibrated = tables.places([r.token for r in self._table("calibrated_sensor")])(raw["calibrated"])
        sensor_place = {r.token: self._channels.index(r.channel) for r in sensors}
        channel = np.array(
            [sensor_place.get(r.sensor_token, -2) for r in self._table("calibrated_sensor")] + [-2, -2], np.int64
        )[calibrated]
        scene_place = {row.token: i for i, row in enumerate(self._scenes)}
        scene = np.array([scene_place.get(r.scene_token, -2) for r in samples] + [-2, -2], np.int64)[sample]
        poses = tables.joined(tables.read(self._path("ego_pose"), _EgoPose, _poses, self.progress))
        pose = tables.places(poses["token"])(raw["pose"])
        world_from_car = np.where((pose >= 0)[:, None], poses["pose"][pose], np.nan)
        del poses
        sentences: list[str] = []
        broken = np.full(len(pose), -1, np.int32)
        for what, place, field, table in (
            (raw["sample"], np.where(sample >= 0, scene, -2), "sample_token", "sample"),
            (raw["calibrated"], np.where(calibrated >= 0, channel, -2), "calibrated_sensor_token", "calibrated_sensor"),
            (raw["pose"], pose, "ego_pose_token", "ego_pose"),
        ):
            for row in np.flatnonzero(place < 0):
                broken[row] = len(sentences)
                sentences.append(
                    f"table sample_data: {raw['token'][row].decode()} names {field} {what[row].decode() or 'nothing'}, "
                    f"which is not (or not wholly) in table {table} ({self._path(table)})"
                )
        if (double := tables.twice(raw["token"])) is not None:
            raise ValueError(f"table sample_data: token {double} stands there twice ({self._path('sample_data')})")
        place = tables.places(raw["token"])
        prev, following = place(raw["prev"]), place(raw["next"])
        # by scene, channel and time; what belongs to no scene or channel goes to the end, where nobody looks
        lost = (scene < 0) | (channel < 0)
        group = np.where(lost, len(self._scenes) * len(self._channels), scene * len(self._channels) + channel)
        order = np.lexsort((raw["stamp"], group))
        rank = np.empty(len(order) + 2, np.int64)
        rank[order] = np.arange(len(order))
        rank[-2:] = -2, -1  # places -2 and -1 stay what they are
        begin = np.searchsorted(group[order], np.arange(len(self._scenes) * len(self._channels) + 1))
        return {
            "token": raw["token"][order],
            "sample": sample[order].astype(np.int32),
            "calibrated": calibrated[order].astype(np.int32),
            "stamp": raw["stamp"][order],
            "key": raw["key"][order],
            "height": raw["height"][order],
            "width": raw["width"][order],
            "prev": rank[prev[order]].astype(np.int32),
            "next": rank[following[order]].astype(np.int32),
            "world_from_car": world_from_car[order],
            "name": raw["name"][order],
            "begin": begin,
            "broken": broken[order],
            "sentences": np.array([s.encode() for s in sentences] or [b""], "S"),
        }

    def _slice(self, scene: str) -> tuple[int, int]:
        """Which groups of `_begin` are a scene's: first, and one past the last."""
        first = next((i for i, row in enumerate(self._scenes) if row.name == scene), None)
        if first is None:
            self._scene(scene)  # says that there is none
        return first * len(self._channels), (first + 1) * len(self._channels)

    def _rows(self, scene: str, channel: str) -> range:
        if channel not in self._channels:
            raise ValueError(
                f"table sensor: no channel {channel!r}, only {', '.join(self._channels)} ({self._path('sensor')})"
            )
        group = self._slice(scene)[0] + self._channels.index(channel)
        rows = range(int(self._begin[group]), int(self._begin[group + 1]))
        inner = slice(rows.start, max(rows.start, rows.stop - 1))
        following, expected = self._columns["next"][inner], np.arange(rows.start, rows.start + len(rows) - 1)
        before = self._columns["prev"][inner.start + 1 : inner.stop + 1]
        # an empty link (-1) is a gap that the recording tells of; any other row is a contradiction
        wrong = ((following != expected + 1) & (following != -1)) | ((before != expected) & (before != -1))
        if wrong.any():
            row = int(expected[np.flatnonzero(wrong)[0]])
            here, there = (self._columns["token"][r].decode() for r in (row, row + 1))
            between = max(int(self._columns["next"][row]), int(self._columns["prev"][row + 1]))
            if between >= 0 and self._columns["broken"][between] >= 0:  # it belongs here, but has lost its scene
                raise ValueError(self._sentences[self._columns["broken"][between]])
            raise ValueError(
                f"table sample_data: {here} and {there} follow each other on {channel} of {scene} by their stamps, but "
                f"not by next and prev ({self._path('sample_data')})"
            )
        return rows

    def _filename(self, row: int) -> str:
        return self._columns["name"][row].decode()

    def _pose(self, row: int) -> Tensor:
        x, y, z, *wxyz = self._columns["world_from_car"][row].tolist()
        try:
            return rigid.from_quaternion(wxyz, [x, y, z])
        except ValueError as error:
            token = self._columns["token"][row].decode()
            raise ValueError(
                f"table ego_pose: the pose of sample_data {token}: {error} ({self._path('ego_pose')})"
            ) from None

    # -- files

    def _read(self, data: SampleData, read: Callable[[Path], Any]):
        try:
            return read(data.path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"table sample_data: {data.token} ({data.channel}) names a file that is not there: {data.path}"
            ) from None

    def _decode(self, data: SampleData, out: np.ndarray) -> None:
        """Writes RGB into out (H, W, 3)."""
        import simplejpeg

        file = self._read(data, Path.read_bytes)
        if file[:2] == b"\xff\xd8":
            try:  # strict: OpenCV fills the lost part of a truncated JPEG with grey and says nothing
                simplejpeg.decode_jpeg(file, "RGB", buffer=out)
                return
            except ValueError as error:
                problem = f"a broken JPEG of {len(file)} bytes ({error})"
        else:
            picture = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR) if file else None
            if picture is not None and picture.shape == out.shape:
                cv2.cvtColor(picture, cv2.COLOR_BGR2RGB, dst=out)
                return
            problem = f"{len(file)} bytes that are no picture of {data.width} x {data.height}"
        raise ValueError(f"sample_data {data.token} ({data.channel}): {problem}: {data.path}")

    # -- moments

    def _moments(self, scene: str) -> Iterator[Moment]:
        columns = self._columns
        rows = [self._rows(scene, channel) if channel in self._channels else range(0) for channel in self.cameras]
        if not any(rows):
            raise ValueError(
                f"table sample_data: no row of {', '.join(self.cameras)} in {scene} ({self._path('sample_data')})"
            )
        lidar = self._rows(scene, LIDAR) if LIDAR in self._channels else range(0)
        made, leads = [], [[] for _ in rows]
        of_sample = [self._key_rows(there) for there in (*rows, lidar)]
        for place in self._sample_rows(scene):
            *pictures, sweep = (keys.get(place, -1) for keys in of_sample)
            token = self._table("sample")[place].token
            if sweep < 0 and max(pictures) < 0:
                raise ValueError(
                    f"sample {token}: no keyframe of any camera in table sample_data ({self._path('sample_data')})"
                )
            newest = max((int(columns["stamp"][r]), r) for r in (pictures if sweep < 0 else [sweep]) if r >= 0)
            made.append(Moment(scene, token, newest[0], tuple(pictures), newest[1]))
            for lead, r in zip(leads, pictures):
                if r >= 0:
                    lead.append(newest[0] - int(columns["stamp"][r]))
        # Sweeps: a picture's reference time is its stamp plus its camera's usual lead; what lies close together there
        # was recorded together. One open set suffices, as pictures come in the order of that time.
        steps = [np.diff(columns["stamp"][there.start : there.stop]) for there in rows if len(there) > 1]
        period = min((int(np.median(step)) for step in steps), default=0)
        waiting = []
        for i, there in enumerate(rows):
            lead = int(np.median(leads[i])) if leads[i] else 0
            stamps, keys = columns["stamp"][there.start : there.stop], columns["key"][there.start : there.stop]
            waiting += [(int(s) + lead, i, there.start + k) for k, s in enumerate(stamps) if not keys[k]]
        group: dict[int, int] = {}
        begun = 0
        for reference, i, row in [*sorted(waiting), (1 << 62, -1, -1)]:
            if group and (i < 0 or reference - begun > 0.4 * period or i in group):
                made.append(self._sweep(scene, [group.get(k, -1) for k in range(len(rows))]))
                group = {}
            begun = begun if group else reference
            group[i] = row
        yield from sorted(made, key=lambda moment: moment.stamp)

    def _sweep(self, scene: str, rows: list[int]) -> Moment:
        """A moment that is no keyframe: told at its newest picture."""
        newest = max(((int(self._columns["stamp"][row]), row) for row in rows if row >= 0), default=(0, -1))
        return Moment(scene, None, newest[0], tuple(rows), newest[1])

    def _key_rows(self, rows: range) -> dict[int, int]:
        """Place in table sample -> row, of the keyframes among a channel's rows."""
        keys = rows.start + np.flatnonzero(self._columns["key"][rows.start : rows.stop])
        return dict(zip(self._columns["sample"][keys].tolist(), keys.tolist()))

    # -- annotations

    @cached_property
    def _boxes(self) -> dict[str, np.ndarray]:
        """Columns of sample_annotation, in the order of table sample."""
        names = ("sample_annotation", "sample", "instance", "category", "attribute", "visibility")
        return tables.kept(
            f"{self.version}-boxes", [self._path(name) for name in names], self._cache, self._build_boxes
        )

    def _build_boxes(self) -> dict[str, np.ndarray]:
        attribute = {row.token: 1 << i for i, row in enumerate(self._table("attribute"))}
        visible = {row.token: i for i, row in enumerate(self._table("visibility"))}

        def bits(tokens: list[str]) -> int:
            """Attributes are few: a bit each; -1 where the table lacks one."""
            return sum(attribute[token] for token in tokens) if attribute.keys() >= {*tokens} else -1

        def columns(rows: list[_Annotation]) -> dict[str, np.ndarray]:
            return {
                "token": tables.texts([r.token for r in rows]),
                "sample": tables.texts([r.sample_token for r in rows]),
                "instance": tables.texts([r.instance_token for r in rows]),
                "pose": np.array([r.translation + r.rotation for r in rows], np.float64).reshape(-1, 7),
                "size": np.array([r.size for r in rows], np.float64).reshape(-1, 3),
                "prev": tables.texts([r.prev for r in rows]),
                "next": tables.texts([r.next for r in rows]),
                "points": np.array([(r.num_lidar_pts, r.num_radar_pts) for r in rows], np.int32).reshape(-1, 2),
                "attributes": np.array([bits(r.attribute_tokens) for r in rows], np.int64),
                "visibility": np.array([visible.get(r.visibility_token, -1) for r in rows], np.int8),
            }

        raw = tables.joined(tables.read(self._path("sample_annotation"), _Annotation, columns, self.progress))
        sample = tables.places([r.token for r in self._table("sample")])(raw["sample"])
        instance = tables.places([r.token for r in self._table("instance")])(raw["instance"])
        for what, place in (("sample", sample), ("instance", instance)):
            if (place < 0).any():
                row = int(np.flatnonzero(place < 0)[0])
                raise ValueError(
                    f"table sample_annotation: {raw['token'][row].decode()} names {what} {raw[what][row].decode()}, "
                    f"which is not in table {what} ({self._path('sample_annotation')})"
                )
        place = tables.places(raw["token"])
        prev, following = place(raw["prev"]), place(raw["next"])
        order = np.argsort(sample, kind="stable")
        rank = np.empty(len(order) + 2, np.int64)
        rank[order] = np.arange(len(order))
        rank[-2:] = -2, -1
        return {
            "token": raw["token"][order],
            "sample": sample[order].astype(np.int32),
            "instance": instance[order].astype(np.int32),
            "prev": rank[prev[order]].astype(np.int32),
            "next": rank[following[order]].astype(np.int32),
            "begin": np.searchsorted(sample[order], np.arange(len(self._table("sample")) + 1)),
            **{name: raw[name][order] for name in ("pose", "size", "points", "attributes", "visibility")},
        }

    def _box(self, row: int) -> Box:
        columns = self._boxes
        token = columns["token"][row].decode()
        instance = self._table("instance")[columns["instance"][row]]
        category = self._by_token("category", instance.category_token, "instance", instance.token)
        bits, visible = int(columns["attributes"][row]), int(columns["visibility"][row])
        if bits < 0:
            raise ValueError(
                f"table sample_annotation: {token} names an attribute that is not in {self._path('attribute')}"
            )
        x, y, z, *wxyz = columns["pose"][row].tolist()
        try:
            pose = rigid.from_quaternion(wxyz, [x, y, z])
        except ValueError as error:
            raise ValueError(f"table sample_annotation: {token}: {error} ({self._path('sample_annotation')})") from None
        width, length, height = columns["size"][row].tolist()
        if not min(width, length, height) > 0:
            raise ValueError(
                f"table sample_annotation: {token} has the size {width}, {length}, {height} m "
                f"({self._path('sample_annotation')})"
            )
        return Box(
            name=category.name,
            instance=instance.token,
            token=token,
            world_from_box=pose,
            size=(length, width, height),
            velocity=self._velocity(row),
            lidar_points=int(columns["points"][row, 0]),
            radar_points=int(columns["points"][row, 1]),
            attributes=tuple(a.name for i, a in enumerate(self._table("attribute")) if bits >> i & 1),
            visibility=self._table("visibility")[visible].level if visible >= 0 else "",
        )

    def _velocity(self, row: int) -> Tensor:
        before, after = int(self._boxes["prev"][row]), int(self._boxes["next"][row])
        if -2 in (before, after):
            token, link = self._boxes["token"][row].decode(), "prev" if before == -2 else "next"
            raise ValueError(
                f"table sample_annotation: the {link} of {token} is not there ({self._path('sample_annotation')})"
            )
        first, last = row if before < 0 else before, row if after < 0 else after
        times = [self._table("sample")[self._boxes["sample"][r]].timestamp / 1e6 for r in (first, last)]
        allowed = MOST_APART * (2 if before >= 0 and after >= 0 else 1)
        if first == last or times[1] - times[0] > allowed:
            return torch.full((3,), float("nan"), dtype=torch.float64)
        way = self._boxes["pose"][last, :3] - self._boxes["pose"][first, :3]
        return torch.from_numpy(way / (times[1] - times[0]))


# ---- labels


def read_label(
    path: Path | str, classes: Classes, whose: str = "label", seen_by: str = "camera", instances: bool = False
) -> Occupancy:
    """An Occ3D or OpenOcc v2 `labels.npz` in the Occ3D grid.

    `semantics` (200, 200, 16) of any integer type with ids up to `classes.free`; `flow` (200, 200, 16, 2) m/s where the
    file has one, NaN = not known: what is not finite, or of 255 m/s and more in either component, becomes NaN, never
    zero. `seen` is `mask_camera` (seen_by "camera") or `mask_lidar` ("lidar") where the file has it (Occ3D); without
    masks (OpenOcc v2) everything counts as seen. instances: also `instances` (200, 200, 16), whole numbers, 0 = none,
    where the file has it (OpenOcc v2.1, and Occ3D after SparseOcc's script): the ids of things as they stand there;
    what does not move has ids there, too, and becomes 0.
    FileNotFoundError where there is no such file; ValueError naming the path for one that is broken or has another
    shape.
    """
    if seen_by not in ("camera", "lidar"):
        raise ValueError(f"{whose}: seen_by is 'camera' or 'lidar', got {seen_by!r}")
    path, mask = Path(path), f"mask_{seen_by}"
    wanted = ("semantics", "flow", mask, *(("instances",) if instances else ()))
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in wanted if name in file.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"{whose}: no label file {path}") from None
    except Exception as error:  # a broken archive shows itself as one of many: zip, zlib, struct, EOF
        raise ValueError(f"{whose}: {path} is no whole .npz file ({error})") from None
    if "semantics" not in held:
        raise ValueError(f"{whose}: {path} holds no array named semantics")
    shape = OCC3D_GRID.shape
    shapes = {"flow": (*shape, 2)}
    for name, array in held.items():
        if array.shape != shapes.get(name, shape):
            raise ValueError(f"{whose}: {name} is of shape {array.shape}, expected {shapes.get(name, shape)}: {path}")
    semantics = held["semantics"]
    if semantics.dtype.kind not in "iu" or semantics.min() < 0 or semantics.max() > classes.free:
        raise ValueError(
            f"{whose}: semantics of {semantics.dtype} from {semantics.min()} to {semantics.max()}, expected whole "
            f"numbers from 0 to {classes.free} ({classes.table}, {classes.free} = free): {path}"
        )
    flow = None
    if "flow" in held:
        if held["flow"].dtype.kind not in "fiu":
            raise ValueError(f"{whose}: flow of {held['flow'].dtype}, expected numbers: {path}")
        flow = torch.from_numpy(held["flow"].astype(np.float32))
        known = (flow.abs() < INVALID_FLOW).all(-1, keepdim=True)  # false for NaN too
        flow = torch.where(known, flow, torch.nan)
    seen = torch.ones(shape, dtype=torch.bool)
    if mask in held:
        if held[mask].dtype.kind not in "biu" or not np.isin(held[mask], (0, 1)).all():
            raise ValueError(f"{whose}: {mask} holds something else than 0 and 1: {path}")
        seen = torch.from_numpy(held[mask].astype(bool))
    ids = None
    if "instances" in held:
        told = held["instances"]
        if told.dtype.kind not in "iu" or told.min() < 0 or told.max() > np.iinfo(np.int32).max:
            raise ValueError(
                f"{whose}: instances of {told.dtype} from {told.min()} to {told.max()}, expected whole numbers from 0: "
                f"{path}"
            )
        ids = torch.from_numpy(np.where(np.isin(semantics, classes.moving_ids), told, 0).astype(np.int32))
    return Occupancy(OCC3D_GRID, classes, torch.from_numpy(semantics.astype(np.uint8)), flow, seen, ids)


def things(truth: Occupancy, boxes: Sequence[Box], car_from_world: Tensor) -> Tensor:
    """Which thing fills each voxel: (X, Y, Z) int32, the place of its box among `boxes` plus one, 0 = none.

    A voxel of a class that moves is the nearest box's of that class, if its centre lies in the box or up to REACH
    outside its faces. Nearness is counted from the faces; inside, the deepest is the nearest. car_from_world (4, 4)
    float64, at the stamp of the boxes and of the truth.

    SparseOcc's `gen_instance_info.py` (github.com/MCG-NJU/SparseOcc), which made its panoptic Occ3D, agrees in this: a
    voxel goes by its centre, and to a box of its own class alone; boxes reach 0.4 m beyond their faces. It differs in
    this: a voxel inside several boxes is the first one's there, and outside of all that of the box whose middle is
    nearest; a box that holds no centre gets nothing there, not even within its reach; barriers and cones have
    instances, every other class that does not move is one, and ids are bytes. So the two tell the same but where boxes
    of one class overlap or nearly touch, and of things so thin that they lie between centres: on a drive of the
    synthetic world, of all voxels of things but 0.2 %.
    """
    low, edges = (torch.tensor(v, dtype=torch.float64) for v in (truth.grid.low, truth.grid.voxel))
    ids = torch.zeros(truth.labels.shape, dtype=torch.int32)
    kinds = [class_of(box.name, truth.classes) for box in boxes]
    for kind in truth.classes.moving_ids:
        where = truth.labels == kind
        centres = low + edges * (where.nonzero() + 0.5)
        owner, nearest = torch.zeros(len(centres), dtype=torch.int32), torch.full((len(centres),), REACH).double()
        for number, box in enumerate(boxes, 1):
            if kinds[number - 1] == kind:
                half = torch.tensor(box.size, dtype=torch.float64) / 2
                inner = rigid.apply(rigid.inverse(car_from_world @ box.world_from_box), centres)
                beyond = (inner.abs() - half).amax(-1)  # m beyond the faces; less than 0 inside
                owner[beyond < nearest] = number
                nearest = torch.minimum(beyond, nearest)
        ids[where] = owner
    return ids


def _label_kind(kind: str) -> tuple[str, Classes]:
    kinds = {"occ3d": ("gts", OCC3D), "openocc": ("openocc_v2", OPENOCC)}
    if kind not in kinds:
        raise ValueError(f"labels: expected one of {', '.join(kinds)}, got {kind!r}")
    return kinds[kind]


# ---- many of them


T = TypeVar("T")
R = TypeVar("R")


def each(
    items: Iterable[T], load: Callable[[T], R], keep_going: bool = False, skipped: list[str] | None = None
) -> Iterator[R]:
    """`load(item)` of every item. keep_going: an item whose load fails by bad input (ValueError, OSError) is left out,
    and its sentence appended to `skipped`; without it the error goes on up."""
    for item in items:
        try:
            product = load(item)
        except (ValueError, OSError) as problem:
            if not keep_going:
                raise
            if skipped is not None:
                skipped.append(str(problem))
            continue
        yield product


def _poses(rows: list[_EgoPose]) -> dict[str, np.ndarray]:
    """null becomes NaN: such a pose is an error for whoever asks for it, not for all."""
    values = np.array([r.translation + r.rotation for r in rows], np.float64).reshape(-1, 7)
    return {"token": tables.texts([r.token for r in rows]), "pose": values}


def _between(first: Box, last: Box, fraction: float) -> Box:
    pose = rigid.interpolate(first.world_from_box, last.world_from_box, fraction)
    velocity = first.velocity + (last.velocity - first.velocity) * fraction
    return replace(first, world_from_box=pose, velocity=velocity)


def _version(dataroot: Path) -> str:
    found = sorted(path.name for path in dataroot.glob("v1.0-*") if path.is_dir())
    if len(found) != 1:
        raise ValueError(
            f"{dataroot}: "
            + (f"which of {', '.join(found)}? Name the version" if found else "no folder v1.0-... with tables is in it")
        )
    return found[0]


def _official_val() -> set[str]:
    spans = [(*map(int, span.split("-")),) for span in _VAL.split()]
    return {f"scene-{n:04d}" for span in spans for n in range(span[0], span[-1] + 1)}
