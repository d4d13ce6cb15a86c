"""All parameters of the node: type, default, range and text, once. The YAML in `config/` and the README's table are
checked against this file by the tests."""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

SYNCS = ("collector", "approximate")  # how images are put into sets


class ParameterProblem(ValueError):
    """A parameter that cannot be; the text names it."""


def _parameter(
    default: Any, text: str, low: float | None = None, high: float | None = None, read_only: bool = False
) -> Any:
    return field(default=default, metadata={"text": text, "low": low, "high": high, "read_only": read_only})


@dataclass(frozen=True)
class CameraSettings:
    """Parameters `camera.<name>.*`. In a default, {} stands for the camera's name."""

    image_topic: str = _parameter("/{}/image_raw/compressed", "images of this camera")
    info_topic: str = _parameter("/{}/camera_info", "its sensor_msgs/CameraInfo")
    compressed: bool = _parameter(True, "true: CompressedImage (JPEG or PNG); false: Image")
    rectified: bool = _parameter(
        False, "true: images are rectified, P holds; false: K and D hold, the lens is taken out"
    )
    offset: float = _parameter(0.0, "s; stamp minus offset is equal within a set (cameras that trigger in turn)", -1, 1)


@dataclass(frozen=True)
class Settings:
    """Parameters of the node itself."""

    cameras: tuple[str, ...] = _parameter(
        ("cam_front", "cam_front_right", "cam_front_left", "cam_back", "cam_back_left", "cam_back_right"),
        "names of the cameras, 1 to 8, in the order of the message's bits",
    )
    base_frame: str = _parameter("base_link", "frame of the grid: x forward, y left, z up (REP 103)")
    fixed_frame: str = _parameter("map", "frame in which TF tells how the car moves, e.g. map or odom")
    model: str = _parameter("opus-demo", "system and preset, as `occflow` names them")
    weights: str = _parameter("", "a .safetensors file; empty: those that ship with the model, else random (untrained)")
    folders: str = _parameter(
        "",
        "folders, with : between them, whose weights may be loaded, besides that of the `weights` given at the start; "
        "read-only: who may set parameters later may not open any file",
        read_only=True,
    )
    device: str = _parameter("auto", "auto (CUDA where present, else CPU), cpu, cuda or cuda:1")
    backend: str = _parameter(
        "eager", "what runs the network: eager, compiled, aot or tensorrt; the last two are built once and kept"
    )
    precision: str = _parameter(
        "float32",
        "of the network's products: float32, bf16 or fp16; half is compared with float32 before it answers",
    )
    threads: int = _parameter(0, "CPU threads of the network; 0: PyTorch's choice", 0, 256)
    camera_rate: float = _parameter(12.0, "Hz of each camera", 0.1, 240)
    sync: str = _parameter(
        "collector",
        "collector: sets leave at `set_deadline`, whoever is missing; approximate: complete sets only, by the rule of "
        "message_filters' ApproximateTimeSynchronizer, so that one dead camera silences the node",
    )
    approximate_queue: int = _parameter(10, "images of each camera that wait, where `sync` is approximate", 1, 100)
    approximate_slop: float = _parameter(
        0.05,
        "s; stamps of one set, less offsets, differ by less than this, where `sync` is approximate; half a camera "
        "period or more mixes sweeps without a sign",
        0.001,
        1,
    )
    set_deadline: float = _parameter(0.12, "s after its first image, a set leaves incomplete", 0.005, 10)
    set_tolerance: float = _parameter(0.4, "of the camera period: how far apart images of one set may be", 0.05, 0.49)
    min_cameras: int = _parameter(1, "sets with fewer usable images are dropped and counted", 1, 8)
    frozen_after: float = _parameter(
        0.8, "s of the same stamp, or the same picture byte for byte, after which a camera is masked; 0: never", 0, 60
    )
    clock_jump: float = _parameter(1.0, "s; stamps that go back by more begin a new lap: memory is forgotten", 0.1, 60)
    longest_gap: float = _parameter(2.0, "s between two sets after which memory is forgotten", 0.1, 60)
    tf_wait: float = _parameter(0.1, "s that a set may wait for its transforms", 0, 5)
    startup_wait: float = _parameter(
        0.0,
        "s that activation waits for CameraInfo and TF of min_cameras cameras, then fails; 0: it asks for none",
        0,
        600,
    )
    lidar_topic: str = _parameter(
        "/lidar_top/points", "PointCloud2 of the LiDAR; heard only for models that need it (opus-fusion)"
    )
    lidar_rate: float = _parameter(20.0, "Hz of the LiDAR's scans", 0.1, 100)
    lidar_gap: float = _parameter(
        0.5, "s; a set whose newest scan is older is dropped and counted, where the model needs LiDAR", 0.01, 5
    )
    moving_speed: float = _parameter(0.2, "m/s; slower voxels are published without a velocity", 0, 10)
    reliable_images: bool = _parameter(False, "true: reliable image subscriptions; false: best effort (sensor data)")
    image_depth: int = _parameter(2, "images of a camera that wait in its subscription", 1, 100)
    reliable_output: bool = _parameter(True, "false: what is published is best effort; reliable serves either kind")
    lazy: bool = _parameter(True, "true: while nobody subscribes to an output the network rests")
    diagnostics_period: float = _parameter(1.0, "s between two messages on /diagnostics, by the steady clock", 0.1, 60)
    autostart: bool = _parameter(True, "true: configure and activate at start; false: a lifecycle manager does it")
    camera: tuple[CameraSettings, ...] = ()  # one a camera, in order; `camera.<name>.*`


def declare(node) -> None:
    """Declares everything on an rclpy node. ParameterProblem when the given values do not fit or are not known."""
    from rclpy.exceptions import ParameterException

    try:
        for spec in fields(Settings):
            if spec.name != "camera":
                node.declare_parameter(spec.name, _ros_value(spec.default), _descriptor(spec))
        for name in _distinct(node.get_parameter("cameras").value):
            for spec in fields(CameraSettings):
                value = spec.default.format(name) if isinstance(spec.default, str) else spec.default
                node.declare_parameter(f"camera.{name}.{spec.name}", value, _descriptor(spec))
    except ParameterException as error:
        raise ParameterProblem(str(error)) from None
    foreign = ("use_sim_time", "qos_overrides.", "start_type_description_service")
    unknown = [
        name
        for name in node._parameter_overrides  # rclpy drops what nobody declared without a word
        if not node.has_parameter(name) and not name.startswith(foreign)
    ]
    if unknown:
        raise ParameterProblem(f"unknown parameter {', '.join(sorted(unknown))}; `ros2 param list` shows what there is")


def named_folders(node) -> tuple[Path, ...]:
    """The folders from which weights may be loaded, as they were named when the node started."""
    weights = node.get_parameter("weights").value
    named = [f for f in node.get_parameter("folders").value.split(os.pathsep) if f]
    return tuple(Path(f).expanduser().resolve() for f in [*named, *([Path(weights).parent] if weights else [])])


def read(node, folders: tuple[Path, ...]) -> Settings:
    """The values as they stand. ParameterProblem when they contradict each other or lead out of the folders."""
    values = {s.name: node.get_parameter(s.name).value for s in fields(Settings) if s.name != "camera"}
    names = values["cameras"] = _distinct(values["cameras"])
    if values["sync"] not in SYNCS:
        raise ParameterProblem(f"sync: {values['sync']!r} is not known, expected {' or '.join(SYNCS)}")
    if weights := values["weights"]:
        path = Path(weights).expanduser().resolve()  # a link leads where it leads
        if not any(path.is_relative_to(folder) for folder in folders):
            there = ", ".join(map(str, folders)) or "none"
            raise ParameterProblem(
                f"weights: {weights} is in none of the folders that were named at the start ({there}); name its folder "
                "in `folders`, and start the node anew"
            )
    undeclared = [n for n in names if not node.has_parameter(f"camera.{n}.image_topic")]
    if undeclared:
        raise ParameterProblem(f"cameras: {', '.join(undeclared)} was added after the start; restart the node for it")
    if values["min_cameras"] > len(names):
        raise ParameterProblem(f"min_cameras: {values['min_cameras']} of {len(names)} cameras can never be")
    cameras = tuple(
        CameraSettings(**{s.name: node.get_parameter(f"camera.{n}.{s.name}").value for s in fields(CameraSettings)})
        for n in names
    )
    from rclpy.exceptions import InvalidTopicNameException
    from rclpy.validate_topic_name import validate_topic_name

    named = [("lidar_topic", values["lidar_topic"])]
    for kind in ("image_topic", "info_topic"):
        topics = [getattr(c, kind) for c in cameras]
        if len(set(topics)) != len(topics):
            raise ParameterProblem(f"camera.*.{kind}: two cameras share a topic, got {sorted(topics)}")
        named += [(f"camera.{name}.{kind}", topic) for name, topic in zip(names, topics, strict=True)]
    for name, topic in named:
        try:
            validate_topic_name(topic)
        except InvalidTopicNameException as error:
            text = " ".join(str(error).split())
            raise ParameterProblem(f"{name}: {topic!r} is no topic's name ({text})") from None
    return Settings(**values, camera=cameras)


def _distinct(names) -> tuple[str, ...]:
    if not 1 <= len(names) <= 8 or len(set(names)) != len(names) or not all(names):
        raise ParameterProblem(f"cameras: expected 1 to 8 different names, got {list(names)}")
    return tuple(names)


def _ros_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _descriptor(spec):
    from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor

    descriptor = ParameterDescriptor(description=spec.metadata["text"], read_only=spec.metadata["read_only"])
    low, high = spec.metadata["low"], spec.metadata["high"]
    if low is not None and isinstance(spec.default, float):
        descriptor.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high))]
    elif low is not None:
        descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=1)]
    return descriptor
