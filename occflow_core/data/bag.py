"""rosbag2 (MCAP) without ROS: Frames go in as a car would have recorded them, messages come out. N cameras.

A bag is written beside its place and renamed when it is whole: under the final name there is never half a bag.
"""

import heapq
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from ..geometry import Cameras, rigid
from ..types import NANO, Frame
from ..voxelflow import definitions

# Metadata version 8: Humble, Jazzy and Kilted all play it. From 9 on, QoS stands there in a form on which Humble's
# player stops (rosbag2_storage/yaml.hpp of each branch).
METADATA_VERSION = 8
_END = object()
SAME_POSE = 1e-3  # m, and entries of the rotation: two poses of one stamp that differ by more contradict each other


# ---- writing


class BagWriter:
    """A new bag, for any messages:

    with BagWriter(folder) as bag:
        bag.add("/chatter", "std_msgs/msg/String")
        bag.write("/chatter", stamp, message)

    When the block ends well the bag stands at `folder`; when it ends with an error nothing does.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if self.folder.exists():
            raise FileExistsError(f"{self.folder} exists already, and a bag is not written over anything: name another")
        self.types = _jazzy()

    def __enter__(self) -> "BagWriter":
        from rosbags.rosbag2 import StoragePlugin, Writer

        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._beside = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.folder.parent))
        self._writer = Writer(
            self._beside / self.folder.name, version=METADATA_VERSION, storage_plugin=StoragePlugin.MCAP
        )
        self._writer.open()
        self._connections: dict[str, Any] = {}
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self._writer.__exit__(kind, error, trace)  # finishes the file, or leaves it
            if kind is None:
                (self._beside / self.folder.name).rename(self.folder)
        finally:
            shutil.rmtree(self._beside, ignore_errors=True)

    def add(self, topic: str, kind: str, latched: bool = False, depth: int = 10) -> None:
        """Announces a topic of a message type such as "sensor_msgs/msg/Image".

        Offered as reliable, keep last `depth`; latched = transient local, so that late subscribers get it too.
        """
        if topic in self._connections:
            raise ValueError(f"bag {self.folder.name}: {topic} was added before")
        if kind not in self.types.fielddefs and kind.startswith("occflow_msgs/"):
            _register(self.types, definitions())
        if kind not in self.types.fielddefs:
            raise ValueError(f"bag {self.folder.name}: {topic}: the message type {kind} is not known")
        self._connections[topic] = self._writer.add_connection(
            topic, kind, typestore=self.types, offered_qos_profiles=[_qos(latched, depth)]
        )

    def write(self, topic: str, stamp: int, message: Any) -> None:
        """A message (an object with the type's fields, arrays as numpy, or CDR bytes) at a time in ns."""
        if topic not in self._connections:
            raise ValueError(f"bag {self.folder.name}: {topic} was not added; there are {sorted(self._connections)}")
        connection = self._connections[topic]
        if not isinstance(message, (bytes, bytearray, memoryview)):
            message = self.types.serialize_cdr(message, connection.msgtype)
        self._writer.write(connection, int(stamp), bytes(message))


def write_bag(
    folder: Path | str,
    frames: Iterable[Frame],
    rig: Cameras,
    jpegs: Iterable[Sequence[bytes | None]] | None = None,
    *,
    base: str = "base_link",
    fixed: str = "map",
    image_topic: str = "/{}/image_raw/compressed",
    info_topic: str = "/{}/camera_info",
    optical: str = "{}_optical_frame",
    quality: int = 90,
    progress: bool = True,
) -> None:
    """Frames as a car records them: JPEG pictures, CameraInfo, /tf_static and /tf, each at its own stamp.

    rig: the mounting of the N cameras, base_from_camera without the car's motion; the frames' cameras hold both, and
    /tf gets the difference: the car's pose at each used camera's stamp and at the frame's. jpegs: for each frame the N
    files as recorded, to be stored as they are (None where not used); without, pictures are encoded at `quality`.
    In topics and frame ids {} stands for the camera's name in lower case. Only used cameras are written. Frames come
    in time order; ValueError where they do not, where a frame does not fit the rig, or where two poses contradict.
    FileExistsError where the folder exists.
    """
    messages = _merged(_messages(frames, rig, jpegs, base, fixed, image_topic, info_topic, optical, quality, progress))
    with BagWriter(folder) as bag:
        bag.add("/tf_static", "tf2_msgs/msg/TFMessage", latched=True, depth=1)
        bag.add("/tf", "tf2_msgs/msg/TFMessage", depth=100)
        added, car_at = set(), None  # car_at: (stamp, pose) of the last transform written
        for stamp, _, _, topic, kind, message in messages:
            if topic == "/tf":
                pose = message
                if car_at is not None and car_at[0] == stamp:
                    if (car_at[1] - pose).abs().max() > SAME_POSE:
                        raise ValueError(
                            f"bag {bag.folder.name}: two poses of {base} at {stamp} ns, {_place(car_at[1])} and "
                            f"{_place(pose)}: does the rig hold the pure mounting?"
                        )
                    continue
                car_at = stamp, pose
                message = _transforms(bag.types, [(fixed, base, stamp, pose)])
            elif topic == "/tf_static":
                message = _transforms(bag.types, message)
            elif topic not in added:
                bag.add(topic, kind)
                added.add(topic)
            bag.write(topic, stamp, message)
        if not added:
            raise ValueError(f"bag {bag.folder.name}: no frame with a used camera came, nothing was written")


def _messages(frames, rig, jpegs, base, fixed, image_topic, info_topic, optical, quality, progress):
    """(stamp, rank, order, topic, type, content) of every message and, before each frame's, a bare earliest stamp.
    At one stamp transforms come first, then CameraInfo, then pictures."""
    from tqdm import tqdm

    types, names, order = _jazzy(), None, 0
    camera_from_base = rigid.inverse(rig.car_from_camera.to(torch.float64))
    pairs = ((frame, None) for frame in frames) if jpegs is None else zip_longest(frames, jpegs, fillvalue=_END)
    total = len(frames) if isinstance(frames, Sequence) else None
    bar = tqdm(pairs, desc="bag", unit="frame", total=total, disable=None if progress else True)
    for k, (frame, files) in enumerate(bar):
        if frame is _END or files is _END:
            raise ValueError(f"bag: {'frames' if frame is _END else 'jpegs'} ended after {k}, the other did not")
        names = frame.names if names is None else names
        if rig.shape != frame.cameras.shape or frame.names != names:
            raise ValueError(
                f"bag: frame {k} has cameras {frame.names}, expected {names} with a rig of {tuple(rig.shape)} cameras"
            )
        if files is not None and len(files) != len(names):
            raise ValueError(f"bag: frame {k} came with {len(files)} files for {len(names)} cameras")
        ids = [name.lower() for name in names]
        used = frame.used.nonzero()[:, 0].tolist()
        if not used:
            continue
        earliest = min([frame.stamp, *(int(frame.stamps[i]) for i in used)])
        yield earliest
        order += 1
        if order == 1:
            mounts = [(base, optical.format(n), earliest, m) for n, m in zip(ids, rig.car_from_camera)]
            yield earliest, 0, order, "/tf_static", None, mounts
        yield frame.stamp, 1, order, "/tf", None, frame.world_from_car
        for i in used:
            stamp, name = int(frame.stamps[i]), ids[i]
            order += 1
            # the camera's place in the world is known; so is its place on the car: hence the car's, at its own stamp
            pose = frame.world_from_car @ frame.cameras.car_from_camera[i].to(torch.float64) @ camera_from_base[i]
            yield stamp, 1, order, "/tf", None, pose
            header = _header(types, stamp, optical.format(name))
            info = _camera_info(types, header, frame.cameras[i])
            yield stamp, 2, order, info_topic.format(name), "sensor_msgs/msg/CameraInfo", info
            picture = _encoded(frame.images[i], quality) if files is None else files[i]
            if picture is None or picture[:2] != b"\xff\xd8":
                raise ValueError(f"bag: frame {k}, {names[i]}: the file given for it is not a JPEG")
            content = np.frombuffer(picture, np.uint8)
            message = types.types["sensor_msgs/msg/CompressedImage"](header=header, format="jpeg", data=content)
            yield stamp, 3, order, image_topic.format(name), "sensor_msgs/msg/CompressedImage", message


def _merged(messages) -> Iterator[tuple]:
    """All messages in the order of their stamps: those before a frame's earliest can go when that frame begins."""
    waiting, begun = [], None
    for message in messages:
        if not isinstance(message, int):
            heapq.heappush(waiting, message)
            continue
        if begun is not None and message < begun:
            raise ValueError(f"bag: frames must come in time order, got {message} ns after {begun} ns")
        begun = message
        while waiting and waiting[0][0] < begun:
            yield heapq.heappop(waiting)
    while waiting:
        yield heapq.heappop(waiting)


def _encoded(picture: Tensor, quality: int) -> bytes:
    """(3, H, W) uint8 RGB -> JPEG."""
    done, file = cv2.imencode(
        ".jpg",
        cv2.cvtColor(picture.permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2BGR),
        [cv2.IMWRITE_JPEG_QUALITY, quality],
    )
    assert done
    return file.tobytes()


def _camera_info(types, header, camera: Cameras):
    """A rectified pinhole camera: no distortion, P = K without a baseline."""
    k = camera.pixels_from_camera.to(torch.float64).cpu().numpy()
    return types.types["sensor_msgs/msg/CameraInfo"](
        header=header,
        height=camera.height,
        width=camera.width,
        distortion_model="plumb_bob",
        d=np.zeros(5),
        k=k.reshape(9),
        r=np.eye(3).reshape(9),
        p=np.hstack([k, np.zeros((3, 1))]).reshape(12),
        binning_x=0,
        binning_y=0,
        roi=types.types["sensor_msgs/msg/RegionOfInterest"](
            x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
        ),
    )


def _transforms(types, edges: list[tuple[str, str, int, Tensor]]):
    """TFMessage of (parent, child, stamp, parent_from_child)."""

    def one(parent, child, stamp, pose):
        (w, x, y, z), shift = rigid.to_quaternion(pose)
        return types.types["geometry_msgs/msg/TransformStamped"](
            header=_header(types, stamp, parent),
            child_frame_id=child,
            transform=types.types["geometry_msgs/msg/Transform"](
                translation=types.types["geometry_msgs/msg/Vector3"](*shift),
                rotation=types.types["geometry_msgs/msg/Quaternion"](x, y, z, w),
            ),
        )

    return types.types["tf2_msgs/msg/TFMessage"]([one(*edge) for edge in edges])


def _header(types, stamp: int, frame_id: str):
    time = types.types["builtin_interfaces/msg/Time"](sec=stamp // NANO, nanosec=stamp % NANO)
    return types.types["std_msgs/msg/Header"](stamp=time, frame_id=frame_id)


def _place(pose: Tensor) -> str:
    return "({:.3f}, {:.3f}, {:.3f}) m".format(*pose[:3, 3].tolist())


def _qos(latched: bool, depth: int):
    from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime

    endless = QosTime(9223372036, 854775807)  # RMW_DURATION_INFINITE, as recorders write it
    return Qos(
        QosHistory.KEEP_LAST,
        depth,
        QosReliability.RELIABLE,
        QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        endless,
        endless,
        QosLiveliness.AUTOMATIC,
        endless,
        False,
    )


# ---- reading


def topics_of(path: Path | str) -> dict[str, str]:
    """Topics of a bag and their message types. Errors as `read_bag`."""
    with _opened(Path(path)) as reader:
        return {c.topic: c.msgtype for c in sorted(reader.connections, key=lambda c: c.topic)}


def read_bag(
    path: Path | str, topics: Sequence[str] | None = None, start: int | None = None, stop: int | None = None
) -> Iterator[tuple[str, int, Any]]:
    """(topic, time in ns, message) of all or some topics, in the order of time, from `start` on and before `stop`.

    Messages have ROS's field names; arrays are numpy. Types come from the bag's own definitions. FileNotFoundError
    where there is no bag; ValueError where it is not whole or a topic is not in it: at the call, not at the first
    message.
    """
    path, there = Path(path), topics_of(path)
    missing = [t for t in topics or () if t not in there]
    if missing:
        raise ValueError(f"{path}: no topic {', '.join(missing)}; the bag has {', '.join(there) or 'none'}")
    return _read(path, None if topics is None else set(topics), start, stop)


def _read(path: Path, topics: set[str] | None, start: int | None, stop: int | None):
    from rosbags.rosbag2 import ReaderError

    with _opened(path) as reader:
        types = _jazzy()
        chosen = [c for c in reader.connections if topics is None or c.topic in topics]
        for connection in chosen:
            if connection.msgtype not in types.fielddefs:
                _register(types, {connection.msgtype: connection.msgdef.data})
        if not chosen:  # an empty choice means everything to rosbags
            return
        try:
            for connection, stamp, data in reader.messages(chosen, start, stop):
                yield connection.topic, stamp, types.deserialize_cdr(data, connection.msgtype)
        except ReaderError as error:
            raise ValueError(f"{path}: not a whole bag: {error}") from None


def _opened(path: Path):
    """An opened rosbags Reader, to be used as a context."""
    from contextlib import closing

    from rosbags.rosbag2 import Reader, ReaderError

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such bag")
    if path.is_dir() and not (path / "metadata.yaml").exists():
        raise ValueError(f"{path}: not a whole bag: there is no metadata.yaml in it (was its recording interrupted?)")
    try:
        reader = Reader(path)
        reader.open()
    except (ReaderError, FileNotFoundError, OSError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: not a whole bag: {error}") from None
    return closing(reader)


def _jazzy():
    from rosbags.typesys import Stores, get_typestore

    return get_typestore(Stores.ROS2_JAZZY)


def _register(types, texts: dict[str, str]) -> None:
    from rosbags.typesys import get_types_from_msg

    found = {}
    for name, text in texts.items():
        found.update(get_types_from_msg(text, name))
    types.register({name: fields for name, fields in found.items() if name not in types.fielddefs})
