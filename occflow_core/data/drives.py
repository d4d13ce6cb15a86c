"""Drives between two forms: a scene in nuScenes' layout <-> a rosbag2 (MCAP) as a car records it.

    write_scene_bag(dataroot, "scene-0103", out)      # pictures, LiDAR, TF, boxes and truth, for RViz or Foxglove
    bag_to_dataset(bag, out)                          # a team's own recording -> tables and files that `NuScenes` reads

Either result is written beside its place and renamed when it is whole.
"""

import bisect
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from ..geometry import OCC3D_GRID, Cameras, rigid
from ..pointcloud import read as read_cloud
from ..types import NANO, OCC3D, Occupancy, Prediction
from ..voxelflow import pack
from .bag import BagWriter, _camera_info, _header, _read, _transforms, topics_of
from .nuscenes import CLASS_OF, LIDAR, Box, Moment, NuScenes, SampleData, class_of

BASE, WORLD = "base_link", "map"
TRUTH, BOXES = "/ground_truth/occupancy", "/ground_truth/boxes"
WORLDS = ("map", "odom", "world", "earth")  # frames that a car is looked for in, the best first
KEY_PERIOD = 0.5  # s from one keyframe to the next
TF_GAP = 1.0  # s between two transforms, beyond which nothing is interpolated
_POINT = np.dtype([("xyz", "<f4", 3), ("intensity", "<f4"), ("ring", "<u2"), ("pad", "<u2")])


@dataclass
class Drive:
    """What was written, and what was left out and why."""

    keyframes: int = 0
    pictures: int = 0
    sweeps: int = 0  # of the LiDAR
    truths: int = 0  # keyframes with occupancy
    holes: int = 0  # pictures that keyframes lack
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> how often

    def __str__(self) -> str:
        left = "".join(f"\nleft out {count} x: {reason}" for reason, count in self.skipped.most_common())
        return (
            f"{self.keyframes} keyframes ({self.truths} with occupancy, {self.holes} pictures missing), "
            f"{self.pictures} pictures, {self.sweeps} LiDAR sweeps{left}"
        )


# ---- a scene -> a bag


def write_scene_bag(
    dataroot: Path | str,
    scene: str,
    out: Path | str,
    *,
    version: str | None = None,
    cameras: Sequence[str] | None = None,
    labels: str | None = "auto",
    lidar: bool = True,
    boxes: bool = True,
    moving_speed: float = 0.2,
    keep_going: bool = False,
    progress: bool = True,
) -> Drive:
    """Everything that was recorded in a scene as a rosbag2 folder `out` with one MCAP.

    /<camera>/image_raw/compressed (the recorded files, 12 Hz) and /<camera>/camera_info, /lidar_top/points (x y z
    intensity ring, the LiDAR's frame), /tf (map <- base_link at every stamp) and /tf_static, /ground_truth/boxes
    (MarkerArray in base_link) and /ground_truth/occupancy (VoxelFlow in base_link at the keyframe's stamp). Topics and
    frames carry channels in lower case: /cam_front/..., cam_front_optical_frame, lidar_top.

    cameras: channels, None: all that the data set has. labels: "openocc", "occ3d", None, or "auto": OpenOcc v2's where
    the data set has any, else Occ3D's, else none. What cameras cannot see comes from Occ3D's mask_camera, also for
    OpenOcc's classes; where there is no mask the message says that it was not computed. moving_speed: m/s, slower
    voxels are written without flow. keep_going: leaves out what cannot be read and counts it; without, it stops with a
    ValueError or FileNotFoundError. FileExistsError where `out` exists.
    """
    from tqdm import tqdm

    world = NuScenes(dataroot, version, cameras, progress=progress)
    channels = world.channels(scene)
    present = [name for name in world.cameras if name in channels]
    with_lidar = lidar and LIDAR in channels
    kind = _labels(world, scene, labels)
    done = Drive()
    keys = world.keyframes(scene)
    # what comes at one stamp: transforms, calibrations, pictures, clouds, truth. Nothing is opened before its turn
    events: list[tuple[int, int, Callable[[], Iterator[tuple[str, str, Any]]]]] = []
    sensors: dict[str, SampleData] = {}
    with BagWriter(out) as bag:
        make = bag.types.types

        def moved(data: SampleData):
            yield (
                "/tf",
                "tf2_msgs/msg/TFMessage",
                _transforms(bag.types, [(WORLD, BASE, data.stamp, data.world_from_car)]),
            )

        def picture(data: SampleData):
            header = _header(bag.types, data.stamp, _frame(data.channel))
            seen = Cameras(data.pixels_from_camera, data.car_from_sensor, data.height, data.width)
            file = np.frombuffer(_bytes(data), np.uint8)
            image = make["sensor_msgs/msg/CompressedImage"](
                header=header, format="jpeg" if file[:2].tobytes() == b"\xff\xd8" else data.path.suffix[1:], data=file
            )
            done.pictures += 1
            yield (
                f"/{data.channel.lower()}/camera_info",
                "sensor_msgs/msg/CameraInfo",
                _camera_info(bag.types, header, seen),
            )
            yield f"/{data.channel.lower()}/image_raw/compressed", "sensor_msgs/msg/CompressedImage", image

        def cloud(row: int, data: SampleData):
            message = _cloud(bag.types, world.points(row), data.stamp, _frame(data.channel))
            done.sweeps += 1
            yield f"/{data.channel.lower()}/points", "sensor_msgs/msg/PointCloud2", message

        def markers(key: Moment):
            yield BOXES, "visualization_msgs/msg/MarkerArray", _markers(bag.types, world, key)

        def truth(key: Moment):
            fields = _voxel_flow(world, key, kind, moving_speed)
            done.truths += 1
            yield TRUTH, "occflow_msgs/msg/VoxelFlow", _message(bag.types, key.stamp, fields)

        for channel in [*present, *([LIDAR] if with_lidar else [])]:
            for row in world.sweeps(scene, channel):
                try:
                    data = world.data(row)
                except ValueError as problem:
                    _or_raise(problem, keep_going, done)
                    continue
                sensors.setdefault(channel, data)
                events.append((data.stamp, 0, lambda data=data: moved(data)))
                if channel == LIDAR:
                    events.append((data.stamp, 2, lambda row=row, data=data: cloud(row, data)))
                else:
                    events.append((data.stamp, 1, lambda data=data: picture(data)))
        for key in keys:
            done.keyframes += 1
            done.holes += sum(row < 0 for row in key.rows)
            if boxes:
                events.append((key.stamp, 3, lambda key=key: markers(key)))
            if kind is not None:
                events.append((key.stamp, 4, lambda key=key: truth(key)))
        events.sort(key=lambda event: event[:2])
        bag.add("/tf_static", "tf2_msgs/msg/TFMessage", latched=True, depth=1)
        bag.add("/tf", "tf2_msgs/msg/TFMessage", depth=100)
        mounts = [(BASE, _frame(name), events[0][0], data.car_from_sensor) for name, data in sensors.items()]
        bag.write("/tf_static", events[0][0], _transforms(bag.types, mounts))
        if kind is not None:
            bag.add(TRUTH, "occflow_msgs/msg/VoxelFlow")
        added, told = {"/tf", TRUTH}, None
        for stamp, rank, messages in tqdm(events, desc=scene, unit="message", disable=None if progress else True):
            if rank == 0 and stamp == told:
                continue  # a pose is told once a stamp
            try:
                made = list(messages())
            except (ValueError, OSError) as problem:
                _or_raise(problem, keep_going, done)
                continue
            told = stamp if rank == 0 else told
            for topic, type_name, message in made:
                if topic not in added:
                    bag.add(topic, type_name)
                    added.add(topic)
                bag.write(topic, stamp, message)
    return done


def _or_raise(problem: Exception, keep_going: bool, done: Drive) -> None:
    if not keep_going:
        raise problem
    done.skipped[str(problem)] += 1


def _labels(world: NuScenes, scene: str, labels: str | None) -> str | None:
    if labels != "auto":
        return labels
    samples = world.samples(scene)
    return next((k for k in ("openocc", "occ3d") if any(world.label_path(s, k).exists() for s in samples)), None)


def _frame(channel: str) -> str:
    return f"{channel.lower()}_optical_frame" if channel.startswith("CAM") else channel.lower()


def _bytes(data: SampleData) -> bytes:
    """The recorded file. A JPEG without its end is truncated; to find all else that can be broken, one must decode."""
    try:
        file = data.path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"table sample_data: {data.token} ({data.channel}) names a file that is not there: {data.path}"
        ) from None
    if len(file) < 4 or (file[:2] == b"\xff\xd8" and b"\xff\xd9" not in file[-64:]):
        raise ValueError(f"sample_data {data.token} ({data.channel}): a truncated picture: {data.path}")
    return file


def _cloud(types, points: Tensor, stamp: int, frame: str):
    packed = np.zeros(len(points), _POINT)
    packed["xyz"], packed["intensity"] = points[:, :3].numpy(), points[:, 3].numpy()
    packed["ring"] = points[:, 4].clamp(0, 65535).numpy().astype(np.uint16)
    layout = [("x", 0, 7), ("y", 4, 7), ("z", 8, 7), ("intensity", 12, 7), ("ring", 16, 4)]  # 7 FLOAT32, 4 UINT16
    point_field = types.types["sensor_msgs/msg/PointField"]
    return types.types["sensor_msgs/msg/PointCloud2"](
        header=_header(types, stamp, frame),
        height=1,
        width=len(points),
        fields=[point_field(name=name, offset=at, datatype=kind, count=1) for name, at, kind in layout],
        is_bigendian=False,
        point_step=_POINT.itemsize,
        row_step=packed.nbytes,
        data=packed.view(np.uint8).reshape(-1),
        is_dense=True,
    )


def _markers(types, world: NuScenes, key: Moment):
    """All boxes of a keyframe in the car frame: a cube each, and an arrow of one second's way where it moves."""
    make, now = types.types, world.pose(key)
    header = _header(types, key.stamp, BASE)
    car_from_world = rigid.inverse(now)

    def marker(number: int, space: str, shape: int, **rest):
        zero, one = (
            make["geometry_msgs/msg/Point"](0.0, 0.0, 0.0),
            make["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, 1.0),
        )
        time = make["builtin_interfaces/msg/Duration"](sec=0, nanosec=0)
        nothing = {
            "header": header,
            "ns": space,
            "id": number,
            "type": shape,
            "action": 0,  # ADD
            "pose": make["geometry_msgs/msg/Pose"](position=zero, orientation=one),
            "scale": make["geometry_msgs/msg/Vector3"](0.0, 0.0, 0.0),
            "color": make["std_msgs/msg/ColorRGBA"](0.0, 0.0, 0.0, 0.0),
            "lifetime": time,
            "frame_locked": False,
            "points": [],
            "colors": [],
            "texture_resource": "",
            "texture": make["sensor_msgs/msg/CompressedImage"](header=header, format="", data=np.empty(0, np.uint8)),
            "uv_coordinates": [],
            "text": "",
            "mesh_resource": "",
            "mesh_file": make["visualization_msgs/msg/MeshFile"](filename="", data=np.empty(0, np.uint8)),
            "mesh_use_embedded_materials": False,
        }
        return make["visualization_msgs/msg/Marker"](**{**nothing, **rest})

    made = [marker(0, "", 0, action=3)]  # DELETEALL: what stood there half a second ago is gone
    for number, box in enumerate(world.boxes(key.sample)):
        car_from_box = car_from_world @ box.world_from_box
        (w, x, y, z), place = rigid.to_quaternion(car_from_box)
        colour = make["std_msgs/msg/ColorRGBA"](*(c / 255 for c in _colour(box)), 0.5)
        middle = make["geometry_msgs/msg/Point"](*place)
        turned = make["geometry_msgs/msg/Quaternion"](x, y, z, w)
        pose = make["geometry_msgs/msg/Pose"](position=middle, orientation=turned)
        size = make["geometry_msgs/msg/Vector3"](*box.size)
        made.append(marker(number, box.name, 1, pose=pose, scale=size, color=colour))  # CUBE
        way = car_from_world[:3, :3] @ box.velocity  # NaN where nobody knows: then there is no arrow
        if bool(way.norm() > 0.2):
            end = make["geometry_msgs/msg/Point"](*(torch.tensor(place, dtype=torch.float64) + way).tolist())
            thick = make["geometry_msgs/msg/Vector3"](0.15, 0.4, 0.4)
            made.append(marker(number, "velocity", 0, points=[middle, end], scale=thick, color=colour))  # ARROW
    return make["visualization_msgs/msg/MarkerArray"](markers=made)


def _colour(box: Box) -> tuple[int, int, int]:
    return OCC3D.colours[class_of(box.name, OCC3D) or 0]


def _voxel_flow(world: NuScenes, key: Moment, kind: str, moving_speed: float) -> dict[str, Any]:
    truth = world.occupancy(key.sample, kind)
    seen = truth.seen
    if kind == "openocc" and bool(seen.all()) and world.label_path(key.sample, "occ3d").exists():
        seen = world.occupancy(key.sample, "occ3d").seen  # the same voxels, told in other classes
    ages = [None if row < 0 else (key.stamp - world.data(row).stamp) // 1000 for row in key.rows]
    return pack(
        _said(truth, seen),
        [name.lower() for name in world.cameras],
        [age is not None for age in ages],
        ages,
        f"ground truth ({kind})",
        moving_speed,
    )


def _said(truth: Occupancy, seen: Tensor) -> Prediction:
    """Truth in the form of a prediction that is sure of itself."""
    score = (truth.labels != truth.classes.free).float()
    unobserved = None if bool(seen.all()) else ~seen  # a file without masks does not tell what cameras see
    return Prediction(truth.grid, truth.classes, truth.labels, score, truth.flow, unobserved)


def _message(types, stamp: int, fields: dict[str, Any]):
    make = types.types
    corner = make["geometry_msgs/msg/Pose"](
        position=make["geometry_msgs/msg/Point"](*OCC3D_GRID.low),
        orientation=make["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, 1.0),
    )
    return make["occflow_msgs/msg/VoxelFlow"](header=_header(types, stamp, BASE), origin=corner, **fields)


# ---- a bag -> a data set


@dataclass(frozen=True)
class _Info:
    """A camera's CameraInfo."""

    matrix: np.ndarray  # (3, 3) pixels, of the pictures as they are stored
    size: tuple[int, int]  # height, width
    frame: str  # optical
    maps: tuple[np.ndarray, np.ndarray] | None  # what takes the lens's distortion out; None: there is none


@dataclass(frozen=True)
class _File:
    """One file of one sensor."""

    channel: str
    stamp: int  # ns
    path: str  # where it lies now, below the data set
    suffix: str
    size: tuple[int, int]  # height, width; 0, 0 of a LiDAR
    world_from_car: Tensor  # (4, 4) float64 at the stamp


def bag_to_dataset(
    bag: Path | str,
    out: Path | str,
    *,
    scene: str | None = None,
    version: str = "v1.0-mini",
    cameras: Mapping[str, str] | None = None,
    infos: Mapping[str, str] | None = None,
    lidar: str | None = "auto",
    base: str = BASE,
    world: str | None = None,
    rectified: bool = False,
    quality: int = 95,
    keep_going: bool = False,
    progress: bool = True,
) -> Drive:
    """A recorded drive as a data set of one scene, without annotations, that `NuScenes` (and nuScenes' devkit) reads.

    cameras: channel -> image topic (sensor_msgs/Image or CompressedImage); None: every image topic that has a
    camera_info beside it, called as its namespace in capitals (/cam_front/image_raw -> CAM_FRONT). infos: channel ->
    CameraInfo topic of those where it is not camera_info beside the image topic. lidar: a PointCloud2 topic, "auto"
    (the only one, if any) or None. base, world: TF frames of the car and of what it drives in; world None: the first of
    map, odom, world, earth that TF joins to the car. rectified: the pictures are rectified already (P holds); without
    it a lens's distortion is taken out. JPEGs are kept as they came unless that changes them; other pictures become
    JPEGs of `quality` (1 to 100).

    Keyframes: every 0.5 s, at a LiDAR sweep where there is a LiDAR, else at the newest of the pictures that were taken
    together. What has no pose at its stamp (TF begins later, or has a gap of more than 1 s) is left out and counted;
    so is a picture that cannot be decoded, if keep_going. ValueError where nothing can be made of the bag.
    """
    bag, out = Path(bag), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already, and a data set is not written over anything: name another")
    if not 1 <= quality <= 100:
        raise ValueError(f"a JPEG's quality is from 1 to 100, got {quality}")
    there, done = topics_of(bag), Drive()
    topics = _camera_topics(there, cameras)
    cloud_topic = _cloud_topic(there, lidar)
    tf, calibrations = _heard(bag, there, _info_topics(there, topics, infos or {}), rectified)
    world = _world(tf, base, world)
    missing = [name for name in topics if name not in calibrations]
    if missing:
        raise ValueError(f"{bag}: no CameraInfo of {', '.join(missing)} came: there is no calibration to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        files = _extract(
            bag, beside, topics, cloud_topic, tf, calibrations, (base, world), quality, keep_going, progress, done
        )
        frames = {**{name: told.frame for name, told in calibrations.items()}, **tf.clouds}
        began = {name: min((f.stamp for f in files if f.channel == name), default=None) for name in (*topics, LIDAR)}
        mounts = {name: tf.at(base, frames[name], stamp) for name, stamp in began.items() if stamp is not None}
        _write_tables(beside, version, scene or bag.stem, files, mounts, calibrations, list(topics), done)
        beside.chmod(0o755)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return done


def _camera_topics(there: dict[str, str], cameras: Mapping[str, str] | None) -> dict[str, str]:
    """Channel -> image topic."""
    kinds = {"sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"}
    if cameras is not None:
        wrong = [topic for topic in cameras.values() if there.get(topic) not in kinds]
        if wrong or not cameras:
            raise ValueError(
                f"no images on {', '.join(wrong) or 'no topic'}; the bag has {', '.join(there) or 'nothing'}"
            )
        return dict(cameras)
    found: dict[str, str] = {}
    for topic, kind in there.items():
        if kind in kinds and _info_topic(topic) in there:
            name = _info_topic(topic).rsplit("/", 1)[0].strip("/").replace("/", "_").upper() or "CAMERA"
            if name not in found or kind.endswith("CompressedImage"):  # compressed is smaller, and what cars record
                found[name] = topic
    if not found:
        raise ValueError(f"no image topic with a camera_info beside it; the bag has {', '.join(there) or 'nothing'}")
    return found


def _info_topic(topic: str) -> str:
    """/front/image_raw/compressed -> /front/camera_info, as image_transport's."""
    parts = topic.removesuffix("/compressed").split("/")
    return "/".join([*parts[:-1], "camera_info"])


def _info_topics(there: dict[str, str], topics: dict[str, str], infos: Mapping[str, str]) -> dict[str, str]:
    """CameraInfo topic -> channel."""
    unknown = sorted(set(infos) - set(topics))
    if unknown:
        raise ValueError(f"a CameraInfo topic of {', '.join(unknown)}, but the cameras are {', '.join(topics)}")
    wrong = [topic for topic in infos.values() if there.get(topic) != "sensor_msgs/msg/CameraInfo"]
    if wrong:
        raise ValueError(f"no CameraInfo on {', '.join(wrong)}; the bag has {', '.join(there) or 'nothing'}")
    found: dict[str, str] = {}
    for name, topic in topics.items():
        other = found.setdefault(infos.get(name, _info_topic(topic)), name)
        if other != name:
            raise ValueError(f"{other} and {name} have the same CameraInfo topic {infos.get(name, _info_topic(topic))}")
    return found


def _cloud_topic(there: dict[str, str], lidar: str | None) -> str | None:
    clouds = [topic for topic, kind in there.items() if kind == "sensor_msgs/msg/PointCloud2"]
    if lidar is None or (lidar == "auto" and not clouds):
        return None
    if lidar == "auto" and len(clouds) > 1:
        raise ValueError(f"which of {', '.join(clouds)} is the LiDAR? Name its topic")
    if lidar != "auto" and lidar not in clouds:
        raise ValueError(f"no PointCloud2 on {lidar}; the bag has {', '.join(clouds) or 'no point clouds'}")
    return clouds[0] if lidar == "auto" else lidar


class _Transforms:
    """All of a bag's TF. As tf2: translation linear, rotation by slerp, no extrapolation, and no gaps of > TF_GAP s."""

    def __init__(self):
        self.parent: dict[str, str] = {}
        self.fixed: dict[str, Tensor] = {}
        self.moving: dict[str, dict[int, Tensor]] = {}
        self.clouds: dict[str, str] = {}  # channel of a LiDAR -> its frame
        self._stamps: dict[str, list[int]] = {}

    def add(self, message, static: bool) -> None:
        for one in message.transforms:
            parent, child = one.header.frame_id.lstrip("/"), one.child_frame_id.lstrip("/")
            q, t = one.transform.rotation, one.transform.translation
            pose = rigid.from_quaternion([q.w, q.x, q.y, q.z], [t.x, t.y, t.z])
            if self.parent.setdefault(child, parent) != parent:
                raise ValueError(f"TF gives {child} two parents, {self.parent[child]} and {parent}")
            if static:
                self.fixed[child] = pose
            else:
                self.moving.setdefault(child, {})[_nano(one.header.stamp)] = pose

    def line(self, frame: str) -> list[str]:
        """A frame and its ancestors."""
        line = [frame]
        while (parent := self.parent.get(line[-1])) is not None:
            if parent in line:
                raise ValueError(f"TF has a loop at {parent}")
            line.append(parent)
        return line

    def at(self, target: str, source: str, stamp: int) -> Tensor:
        """target_from_source (4, 4) float64. LookupError with a reason that is the same for all alike."""
        up_target, up_source = self.line(target), self.line(source)
        common = next((frame for frame in up_source if frame in up_target), None)
        if common is None:
            raise LookupError(f"TF does not join {target} and {source}")
        return rigid.inverse(self._climb(up_target, common, stamp)) @ self._climb(up_source, common, stamp)

    def _climb(self, line: list[str], ancestor: str, stamp: int) -> Tensor:
        pose = torch.eye(4, dtype=torch.float64)
        for child in line[: line.index(ancestor)]:
            pose = (self.fixed[child] if child in self.fixed else self._between(child, stamp)) @ pose
        return pose

    def _between(self, child: str, stamp: int) -> Tensor:
        poses = self.moving[child]
        if stamp in poses:
            return poses[stamp]
        stamps = self._stamps.setdefault(child, sorted(poses))
        i = bisect.bisect_left(stamps, stamp)
        edge = f"{self.parent[child]} <- {child}"
        if i in (0, len(stamps)):
            raise LookupError(f"no transform {edge} {'before it began' if i == 0 else 'after it ended'}")
        if stamps[i] - stamps[i - 1] > TF_GAP * NANO:
            raise LookupError(f"no transform {edge} in a gap of more than {TF_GAP} s")
        share = (stamp - stamps[i - 1]) / (stamps[i] - stamps[i - 1])
        return rigid.interpolate(poses[stamps[i - 1]], poses[stamps[i]], share)


def _heard(bag: Path, there: dict[str, str], cameras: dict[str, str], rectified: bool) -> tuple[_Transforms, dict]:
    """All of TF, and each camera's calibration; cameras: CameraInfo topic -> channel. ValueError where a calibration
    changes on the way."""
    tf, infos = _Transforms(), {}
    wanted = [t for t in ("/tf", "/tf_static", *cameras) if t in there]
    first: dict[str, bytes] = {}
    for topic, _, message in _read(bag, set(wanted), None, None):
        if topic in ("/tf", "/tf_static"):
            tf.add(message, static=topic == "/tf_static")
            continue
        name = cameras[topic]
        told = np.concatenate([message.k, message.d, message.p, [message.height, message.width]]).tobytes()
        if first.setdefault(name, told) != told:
            raise ValueError(f"{bag}: {topic} changes on the way; a data set holds one calibration a camera and scene")
        if name not in infos:
            infos[name] = _info(message, topic, rectified)
    return tf, infos


def _info(message, topic: str, rectified: bool) -> _Info:
    matrix = np.array(message.p, np.float64).reshape(3, 4)[:, :3] if rectified else np.array(message.k).reshape(3, 3)
    size, bent = (int(message.height), int(message.width)), np.array(message.d, np.float64)
    if not np.isfinite(matrix).all() or matrix[0, 0] <= 0 or matrix[1, 1] <= 0 or not np.isfinite(bent).all():
        raise ValueError(
            f"{topic}: expected finite, positive focal lengths and finite distortion, got {matrix.tolist()}"
        )
    if message.binning_x > 1 or message.binning_y > 1 or message.roi.width or message.roi.height:
        raise ValueError(f"{topic}: binning or a region of interest, expected the CameraInfo of the whole picture")
    maps = None
    if not rectified and bent.any():
        if message.distortion_model in ("plumb_bob", "rational_polynomial"):
            maps = cv2.initUndistortRectifyMap(matrix, bent, None, matrix, size[::-1], cv2.CV_32FC1)
        elif message.distortion_model in ("equidistant", "fisheye"):
            maps = cv2.fisheye.initUndistortRectifyMap(matrix, bent[:4], np.eye(3), matrix, size[::-1], cv2.CV_32FC1)
        else:
            raise ValueError(f"{topic}: the distortion model {message.distortion_model!r} is not known")
    if not message.header.frame_id:
        raise ValueError(f"{topic}: no frame_id, expected the camera's optical frame")
    return _Info(matrix, size, message.header.frame_id.lstrip("/"), maps)


def _world(tf: _Transforms, base: str, world: str | None) -> str:
    line = tf.line(base)
    found = next((frame for frame in ((world,) if world else WORLDS) if frame in line[1:]), None)
    if found is None:
        raise ValueError(
            f"TF does not join {base} to {world or ' or '.join(WORLDS)}: it has {' <- '.join(reversed(line))}; where "
            "the car was must be known"
        )
    return found


def _extract(bag, folder, topics, cloud_topic, tf, infos, frames, quality, keep_going, progress, done) -> list[_File]:
    """Writes every picture and sweep that has a pose below `folder`, in no final place yet."""
    from tqdm import tqdm

    base, world = frames
    names = {topic: name for name, topic in topics.items()} | ({cloud_topic: LIDAR} if cloud_topic else {})
    files: list[_File] = []
    seen: set[tuple[str, int]] = set()
    for topic, _, message in tqdm(
        _read(bag, set(names), None, None), desc=bag.name, unit="message", disable=None if progress else True
    ):
        name, stamp = names[topic], _nano(message.header.stamp)
        if (name, stamp) in seen:
            done.skipped[f"{name}: the same stamp again"] += 1
            continue
        seen.add((name, stamp))
        if name == LIDAR:
            tf.clouds.setdefault(LIDAR, message.header.frame_id.lstrip("/"))
        try:
            pose = tf.at(world, base, stamp)
            tf.at(base, tf.clouds[LIDAR] if name == LIDAR else infos[name].frame, stamp)
        except LookupError as reason:
            done.skipped[f"{name}: {reason}"] += 1
            continue
        try:
            if name == LIDAR:
                suffix, data = "pcd.bin", read_cloud(message).tobytes()
            else:
                suffix, data = _stored(message, infos[name], quality)
        except ValueError as problem:
            _or_raise(ValueError(f"{bag}: {topic} at {stamp} ns: {problem}"), keep_going, done)
            continue
        path = f"{name}__{stamp // 1000}.{suffix}"
        (folder / path).write_bytes(data)
        files.append(_File(name, stamp, path, suffix, (0, 0) if name == LIDAR else infos[name].size, pose))
    if not any(file.channel != LIDAR for file in files):
        left = "; ".join(f"{count} x {reason}" for reason, count in done.skipped.most_common(3)) or "no image came"
        raise ValueError(f"{bag}: no picture with a pose is left: {left}")
    return files


def _stored(message, info: _Info, quality: int) -> tuple[str, bytes]:
    """A picture message as (suffix, file). ValueError where it is not a whole picture of its CameraInfo's size."""
    import simplejpeg

    if hasattr(message, "encoding"):
        picture, file = _raw(message), None
    else:
        file = message.data.tobytes()
        if file[:2] == b"\xff\xd8":
            try:  # strict: a truncated JPEG is no picture
                picture = cv2.cvtColor(simplejpeg.decode_jpeg(file, "RGB"), cv2.COLOR_RGB2BGR)
            except ValueError as error:
                raise ValueError(f"a broken JPEG of {len(file)} bytes ({error})") from None
        else:
            picture, file = cv2.imdecode(message.data, cv2.IMREAD_COLOR), None
            if picture is None:
                raise ValueError(f"{len(message.data)} bytes of format {message.format!r} that are no picture")
    if picture.shape[:2] != info.size:
        raise ValueError(f"a picture of {picture.shape[1]} x {picture.shape[0]}, its CameraInfo says {info.size[::-1]}")
    if info.maps is not None:
        picture, file = cv2.remap(picture, *info.maps, cv2.INTER_LINEAR), None
    if file is None:
        file = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    return "jpg", file


def _raw(message) -> np.ndarray:
    """sensor_msgs/Image -> (H, W, 3) BGR."""
    kinds = {
        "bgr8": (3, None),
        "rgb8": (3, cv2.COLOR_RGB2BGR),
        "bgra8": (4, cv2.COLOR_BGRA2BGR),
        "rgba8": (4, cv2.COLOR_RGBA2BGR),
        "mono8": (1, cv2.COLOR_GRAY2BGR),
        # ROS names a Bayer pattern by its first two pixels, OpenCV by the two below and right of the first
        "bayer_rggb8": (1, cv2.COLOR_BayerBG2BGR),
        "bayer_bggr8": (1, cv2.COLOR_BayerRG2BGR),
        "bayer_gbrg8": (1, cv2.COLOR_BayerGR2BGR),
        "bayer_grbg8": (1, cv2.COLOR_BayerGB2BGR),
    }
    if message.encoding not in kinds:
        raise ValueError(f"encoding {message.encoding!r}, expected one of {', '.join(kinds)}")
    depth, change = kinds[message.encoding]
    height, width, step = int(message.height), int(message.width), int(message.step)
    if step < width * depth or message.data.size < step * height:
        raise ValueError(f"{message.data.size} bytes with rows of {step} for {width} x {height} of {message.encoding}")
    picture = message.data[: step * height].reshape(height, step)[:, : width * depth]
    picture = np.ascontiguousarray(picture).reshape((height, width) if depth == 1 else (height, width, depth))
    return picture if change is None else cv2.cvtColor(picture, change)


def _keyframes(files: list[_File], cameras: list[str]) -> list[tuple[int, dict[str, _File]]]:
    """(stamp, channel -> file) of keyframes 0.5 s apart.

    They are anchored in the LiDAR's sweeps, else in the pictures of the camera that has most; the first is the first
    anchor at which all cameras are there, if there is such a one.
    """
    there: dict[str, list[_File]] = {name: [] for name in cameras}
    for file in files:
        if file.channel in there:
            there[file.channel].append(file)
    pictures = {name: ([f.stamp for f in files], files) for name, files in there.items() if files}
    sweeps = [f for f in files if f.channel == LIDAR]
    anchors = sweeps or max((files for _, files in pictures.values()), key=len)
    stamps, beat = np.array([f.stamp for f in anchors]), round(KEY_PERIOD * NANO)
    period = int(np.median([gap for when, _ in pictures.values() for gap in np.diff(when)] or [beat]))
    own = int(np.median(np.diff(stamps))) if len(stamps) > 1 else beat
    first = next((a for a in anchors if len(_together(pictures, a.stamp, period)) == len(pictures)), anchors[0]).stamp
    keys, used = [], set()
    for wanted in range(first, int(stamps[-1]) + own // 2, beat):
        anchor = anchors[int(np.abs(stamps - wanted).argmin())]
        chosen = _together(pictures, anchor.stamp, period)
        # an anchor far from the beat belongs to another one: here the recording has a gap
        if abs(anchor.stamp - wanted) > beat // 2 or not chosen or any(id(f) in used for f in chosen.values()):
            continue
        used |= {id(file) for file in chosen.values()}
        stamp = anchor.stamp if sweeps else max(file.stamp for file in chosen.values())
        keys.append((stamp, {**chosen, **({LIDAR: anchor} if sweeps else {})}))
    return keys


def _together(pictures: dict[str, tuple[list[int], list[_File]]], stamp: int, period: int) -> dict[str, _File]:
    """One picture a camera around a stamp: those that were taken in the shortest time (cameras fire one after the
    other, and the nearest picture of each need not be of one round); where two rounds are as short, the nearer one."""
    near = {}
    for name, (when, files) in pictures.items():
        first, last = bisect.bisect_left(when, stamp - period * 5 // 4), bisect.bisect_right(when, stamp + period)
        if first < last:
            near[name] = files[first:last]
    best, least = {}, None
    for begin in sorted(f.stamp for files in near.values() for f in files):
        chosen = {name: next((f for f in files if f.stamp >= begin), None) for name, files in near.items()}
        if None in chosen.values():
            continue
        newest = max(f.stamp for f in chosen.values())
        cost = newest - begin + abs(newest - stamp)
        if least is None or cost < least:
            best, least = chosen, cost
    return best


def _write_tables(folder, version, scene, files, mounts, infos, cameras, done: Drive) -> None:
    files = sorted(files, key=lambda f: (f.channel, f.stamp))
    keys = _keyframes(files, cameras)
    if not keys:
        raise ValueError(f"{scene}: no instant at which cameras{' and LiDAR' if LIDAR in mounts else ''} said anything")

    def token(*words) -> str:
        return hashlib.md5("/".join(map(str, (scene, *words))).encode()).hexdigest()

    samples = [token("sample", stamp) for stamp, _ in keys]
    key_of = {id(file): i for i, (_, chosen) in enumerate(keys) for file in chosen.values()}
    begins = [stamp for stamp, _ in keys]
    tables: dict[str, list[dict]] = {name: [] for name in ("sample_data", "ego_pose", "sensor", "calibrated_sensor")}
    for channel, mount in mounts.items():
        turn, place = rigid.to_quaternion(mount)
        lens = channel in infos
        tables["sensor"].append(
            {"token": token("sensor", channel), "channel": channel, "modality": "camera" if lens else "lidar"}
        )
        tables["calibrated_sensor"].append(
            {
                "token": token("calibrated", channel),
                "sensor_token": token("sensor", channel),
                "translation": place,
                "rotation": turn,
                "camera_intrinsic": infos[channel].matrix.tolist() if lens else [],
            }
        )
        there = [f for f in files if f.channel == channel]
        names = [token(channel, f.stamp) for f in there]
        for i, file in enumerate(there):
            key = key_of.get(id(file))
            # a sweep belongs to the keyframe after it, as in nuScenes
            sample = key if key is not None else min(bisect.bisect_left(begins, file.stamp), len(keys) - 1)
            kind = "sweeps" if key is None else "samples"
            name = f"{kind}/{channel}/{scene}__{channel}__{file.stamp // 1000}.{file.suffix}"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.path).rename(folder / name)
            turn, place = rigid.to_quaternion(file.world_from_car)
            stamp = file.stamp // 1000
            tables["ego_pose"].append({"token": names[i], "timestamp": stamp, "rotation": turn, "translation": place})
            tables["sample_data"].append(
                {
                    "token": names[i],
                    "sample_token": samples[sample],
                    "ego_pose_token": names[i],
                    "calibrated_sensor_token": token("calibrated", channel),
                    "timestamp": stamp,
                    "fileformat": file.suffix.split(".")[0],
                    "is_key_frame": key is not None,
                    "height": file.size[0],
                    "width": file.size[1],
                    "filename": name,
                    "prev": names[i - 1] if i else "",
                    "next": names[i + 1] if i + 1 < len(names) else "",
                }
            )
    tables["sample"] = [
        {
            "token": sample,
            "timestamp": keys[i][0] // 1000,
            "prev": samples[i - 1] if i else "",
            "next": samples[i + 1] if i + 1 < len(samples) else "",
            "scene_token": token("scene"),
        }
        for i, sample in enumerate(samples)
    ]
    tables["scene"] = [
        {
            "token": token("scene"),
            "log_token": token("log"),
            "nbr_samples": len(samples),
            "first_sample_token": samples[0],
            "last_sample_token": samples[-1],
            "name": scene,
            "description": "recorded with ROS 2",
        }
    ]
    tables["log"] = [{"token": token("log"), "logfile": scene, "vehicle": "", "date_captured": "", "location": ""}]
    # an empty map: the devkit opens it, and nothing is known about the place
    (folder / "maps").mkdir()
    cv2.imwrite(str(folder / "maps" / f"{token('map')}.png"), np.zeros((1, 1), np.uint8))
    name = f"maps/{token('map')}.png"
    tables["map"] = [
        {"token": token("map"), "category": "semantic_prior", "filename": name, "log_tokens": [token("log")]}
    ]
    tables["category"] = [
        {"token": token("category", name), "name": name, "description": "", "index": i}
        for i, name in enumerate(CLASS_OF)
    ]
    tables |= {"attribute": [], "visibility": [], "instance": [], "sample_annotation": []}
    (folder / version).mkdir()
    for table, rows in tables.items():
        (folder / version / f"{table}.json").write_text(json.dumps(rows, indent=0))
    done.keyframes, done.pictures = len(keys), sum(f.channel != LIDAR for f in files)
    done.sweeps = len(files) - done.pictures
    done.holes = sum(name not in chosen for _, chosen in keys for name in cameras)


def _nano(stamp) -> int:
    return stamp.sec * NANO + stamp.nanosec
