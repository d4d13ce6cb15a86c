"""A network of settable delay and a car of settable faults: the whole node, real DDS, and no model.

In one process: a `Stage` has the node, the car and one who listens. As a process of its own, `python test/ros/fake.py
--ros-args ...` is the node with the stand-in network, which waits $FAKE_DELAY seconds for each set and fails at the
first $FAKE_FAILURES; its voxels are $FAKE_COARSER times as long as usual. Each load but the first takes $FAKE_LOADING
seconds.
"""

import ctypes
import os
import signal
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, product, repeat

import cv2
import numpy as np
import torch
from torch import nn

from occflow_core.geometry import OCC3D_GRID, Grid, rigid
from occflow_core.runtime.load import Model
from occflow_core.types import NANO, OPENOCC, Classes, Prediction

CAMERAS = ("cam_front", "cam_front_right", "cam_front_left", "cam_back", "cam_back_left", "cam_back_right")
YAW = dict(zip(CAMERAS, (0.0, -55.0, 55.0, 180.0, 110.0, -110.0), strict=True))  # degrees from ahead
BEGIN = 1_700_000_000 * NANO  # ns
HEIGHT, WIDTH, FOCAL = 90, 160, 100.0  # pixels: 77 degrees wide, so neighbours overlap a little
SPEED = 10.0  # m/s, of the car
PICTURES = 16  # different ones a camera has
THINKING, LOADING = "the network has begun", "a load has begun"  # what the node prints as a process of its own


# ---- the network


@dataclass(frozen=True)
class Config:
    height: int = 64
    width: int = 112
    grid: Grid = OCC3D_GRID
    classes: Classes = OPENOCC
    sweeps: int = 0
    as_published: bool = False
    panoptic: bool = False


class Network(nn.Module):
    """Says one filled voxel more with each step of a drive, along the lowest row of a corner of the grid: how long its
    memory is can be counted in the message, and almost everything that a camera sees is free."""

    def __init__(self, delay: float = 0.0, grid: Grid = OCC3D_GRID):
        super().__init__()
        self.config, self.delay = Config(grid=grid), delay
        self.nothing = nn.Parameter(torch.zeros(1))
        self.before: Callable[[], None] = lambda: None  # called as a step begins, the warm-up's apart
        self.failures: deque[Exception] = deque()  # what the next steps raise, the warm-up's apart
        self.spoilt = 0  # how many of the next steps say NaN
        self.used: list[list[bool]] = []  # the cameras of every step

    def forward(self, clip, memory):
        real = bool(clip.images.any())  # the warm-up's pictures are black
        if real:
            self.before()
        time.sleep(self.delay if real else 0.0)  # as a GPU does: other threads go on
        self.used.append(clip.used[0, 0].tolist())
        if self.failures and real:
            raise self.failures.popleft()
        steps = 0 if bool(clip.fresh) else memory + 1
        output = torch.full((1,), float(steps))
        if self.spoilt:
            self.spoilt -= 1
            output[:] = float("nan")
        return output, steps

    def decode(self, output):
        grid, classes = self.config.grid, self.config.classes
        labels = torch.full(grid.shape, classes.free, dtype=torch.uint8)
        labels[: 1 + int(output), 0, 0] = classes.id("terrain")
        filled = labels != classes.free
        return [Prediction(grid, classes, labels, filled.float(), torch.zeros(*grid.shape, 2))]


def model(network: Network) -> Model:
    return Model(network.eval(), "fake", True, "fast", "f" * 64)


# ---- the car


@cache
def _jpegs(camera: str) -> list[array]:
    """Noise: no two pictures are the same."""
    random = np.random.default_rng(sum(camera.encode()))
    pictures = random.integers(0, 255, (PICTURES, HEIGHT, WIDTH, 3), np.uint8)
    return [array("B", cv2.imencode(".jpg", picture)[1].tobytes()) for picture in pictures]


class Car:
    """Drives straight on along x of the map. Publishes what it is told to, when it is told to."""

    def __init__(self, context, names: Collection[str] = CAMERAS):
        import rclpy
        from geometry_msgs.msg import TransformStamped
        from rclpy.qos import DurabilityPolicy, QoSProfile
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import CameraInfo, CompressedImage
        from tf2_msgs.msg import TFMessage

        self.names, self.fixed, self.sent = tuple(names), "map", 0
        self.node = rclpy.create_node("car", context=context)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.clock = self.node.create_publisher(Clock, "/clock", 10)
        self.tf = self.node.create_publisher(TFMessage, "/tf", 100)
        self.tf_static = self.node.create_publisher(TFMessage, "/tf_static", latched)
        self.images = {n: self.node.create_publisher(CompressedImage, f"/{n}/image_raw/compressed", 5) for n in names}
        self.infos = {n: self.node.create_publisher(CameraInfo, f"/{n}/camera_info", 5) for n in names}
        self._transform, self._transforms = TransformStamped, TFMessage
        self._clock, self._image, self._info = Clock, CompressedImage, CameraInfo

    def mount(self, lifted: float = 0.0) -> None:
        """Where the cameras are, on /tf_static; `lifted` m higher than usual."""
        mounts = {f"{name}_optical_frame": mounting(name, lifted) for name in self.names}
        self.tf_static.publish(
            self._transforms(transforms=[self._stamped("base_link", *mount) for mount in mounts.items()])
        )

    def tick(self, stamp: int) -> None:
        message = self._clock()
        message.clock.sec, message.clock.nanosec = divmod(stamp, NANO)
        self.clock.publish(message)

    def move(self, stamp: int) -> None:
        """Where the car is at a stamp."""
        pose = torch.eye(4, dtype=torch.float64)
        pose[0, 3] = SPEED * (stamp - BEGIN) / NANO
        self.tf.publish(self._transforms(transforms=[self._stamped(self.fixed, "base_link", pose, stamp)]))

    def info(self, name: str, **changes) -> None:
        message = self._info(height=HEIGHT, width=WIDTH, distortion_model="plumb_bob", d=[0.0] * 5)
        message.header.frame_id = f"{name}_optical_frame"
        message.k = [FOCAL, 0.0, WIDTH / 2, 0.0, FOCAL, HEIGHT / 2, 0.0, 0.0, 1.0]
        message.r = np.eye(3).ravel()
        message.p = [FOCAL, 0.0, WIDTH / 2, 0.0, 0.0, FOCAL, HEIGHT / 2, 0.0, 0.0, 0.0, 1.0, 0.0]
        for key, value in changes.items():
            setattr(message, key, value)
        self.infos[name].publish(message)

    def shoot(self, name: str, stamp: int, data: array | None = None) -> None:
        """One image of one camera, by default a new one."""
        message = self._image(format="jpeg")
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, NANO)
        message.header.frame_id = f"{name}_optical_frame"
        self.sent += 1
        message.data = _jpegs(name)[self.sent % PICTURES] if data is None else data
        self.images[name].publish(message)

    def sweep(self, stamp: int, without: Collection[str] = ()) -> None:
        """All cameras at one stamp, and the car's place there; the clock is not later than the images."""
        self.tick(stamp)
        self.move(stamp)
        for name in self.names:
            if name not in without:
                self.shoot(name, stamp)

    def _stamped(self, parent: str, child: str, pose, stamp: int = BEGIN):
        message = self._transform(child_frame_id=child)
        message.header.frame_id = parent
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, NANO)
        t, q = message.transform.translation, message.transform.rotation
        (q.w, q.x, q.y, q.z), (t.x, t.y, t.z) = rigid.to_quaternion(pose)
        return message


def mounting(name: str, lifted: float = 0.0):
    """base_from_camera of a camera of CAMERAS; others look ahead."""
    half = np.deg2rad(YAW.get(name, 0.0)) / 2
    body_from_optical = rigid.from_quaternion([0.5, -0.5, 0.5, -0.5], [0.0, 0.0, 0.0])
    place = (np.cos(2 * half), np.sin(2 * half), 1.5 + lifted)
    return rigid.from_quaternion([np.cos(half), 0.0, 0.0, np.sin(half)], place) @ body_from_optical


def seen_by_one_alone(camera: str, grid: Grid) -> torch.Tensor:
    """(X, Y, Z) bool: voxels whose centre this camera sees and of which no part is in any other's picture: all eight
    corners lie beyond one plane of its frustum."""
    centres = grid.centres(torch.float64)
    signs = torch.tensor(list(product((-0.5, 0.5), repeat=3)), dtype=torch.float64)
    corners = centres[..., None, :] + signs * torch.tensor(grid.voxel, dtype=torch.float64)
    alone = (_inside(camera, centres) > 0).all(-1)
    for other in set(CAMERAS) - {camera}:
        alone &= (_inside(other, corners) < 0).all(-2).any(-1)
    return alone


def _inside(camera: str, points: torch.Tensor) -> torch.Tensor:
    """Points (..., 3) -> (..., 5): positive inside of the frustum's left, right, upper, lower and near plane."""
    x, y, z = rigid.apply(rigid.inverse(mounting(camera)), points.reshape(-1, 3)).reshape(points.shape).unbind(-1)
    across, up = WIDTH / 2 / FOCAL, HEIGHT / 2 / FOCAL
    return torch.stack([x + across * z, across * z - x, y + up * z, up * z - y, z], -1)


# ---- both, and one who listens


@dataclass
class Heard:
    messages: list = field(default_factory=list)  # VoxelFlow
    diagnostics: list = field(default_factory=list)  # DiagnosticArray
    lines: list[str] = field(default_factory=list)  # what the node logs

    @property
    def stamps(self) -> list[int]:
        return [m.header.stamp.sec * NANO + m.header.stamp.nanosec for m in self.messages]


class Stage:
    """The node with a stand-in network, the car, and one who listens, in one process, spun by hand. The ROS clock is
    the car's."""

    def __init__(self, patch, domain: int, network: Network | None = None, names=CAMERAS, **parameters):
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from rclpy.parameter import Parameter

        from occflow_ros import node

        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        self.network = network or Network()
        patch.setattr(node, "load", lambda *_, **__: model(self.network))
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        values = {"use_sim_time": True, "cameras": list(names), "set_deadline": 0.1, "diagnostics_period": 0.1}
        values |= parameters
        self.node = node.OccupancyNode(
            context=self.context, parameter_overrides=[Parameter(k, value=v) for k, v in values.items()]
        )
        self.car, self.heard = Car(self.context, names), Heard()
        self.listener = rclpy.create_node("listener", context=self.context)
        self.listen()
        self.listener.create_subscription(DiagnosticArray, "/diagnostics", self.heard.diagnostics.append, 100)
        self._overhear()
        self.executor = rclpy.executors.SingleThreadedExecutor(context=self.context)
        for each in (self.node, self.car.node, self.listener):
            self.executor.add_node(each)
        self.stamp = BEGIN

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def start(self) -> "Stage":
        """configure, activate, and everything connected and told that the car tells once."""
        from rclpy.lifecycle import TransitionCallbackReturn as Result

        assert self.node.trigger_configure() == Result.SUCCESS
        assert self.node.trigger_activate() == Result.SUCCESS
        self.connected()
        self.car.mount()
        for name in self.car.names:
            self.car.info(name)
        self.car.tick(self.stamp)  # images may overtake it: a clock that is far behind their stamps would refuse them
        self.until(lambda: all(self.node._calibrations) and self.node.get_clock().now().nanoseconds == self.stamp)
        return self

    def _overhear(self) -> None:
        """What the node logs, from its logger: /rosout is one a process for all nodes of one name."""
        logger, lines = self.node.get_logger(), self.heard.lines
        say = logger.info, logger.warning, logger.error

        def info(sentence: str) -> None:  # a line of code may log at one level only, so each level has its own
            lines.append(sentence)
            say[0](sentence)

        def warning(sentence: str) -> None:
            lines.append(sentence)
            say[1](sentence)

        def error(sentence: str) -> None:
            lines.append(sentence)
            say[2](sentence)

        logger.info, logger.warning, logger.error = info, warning, error

    @property
    def state(self) -> str:
        return self.node._state_machine.current_state[1]

    def unconfigure(self) -> None:
        """From whatever state."""
        if self.state == "active":
            self.node.trigger_deactivate()
        if self.state == "inactive":
            self.node.trigger_cleanup()

    def again(self, **parameters) -> "Stage":
        """From the beginning, with other parameters; those that are not named stay."""
        from rclpy.parameter import Parameter

        self.unconfigure()
        for result in self.node.set_parameters([Parameter(k, value=v) for k, v in parameters.items()]):
            assert result.successful, result.reason
        for heard in (self.heard.messages, self.heard.diagnostics, self.heard.lines):
            heard.clear()
        self._deafen()  # what is still on its way is an answer of before
        self.listen()
        return self.start()

    def listen(self) -> None:
        from occflow_msgs.msg import VoxelFlow

        self.listener.create_subscription(VoxelFlow, "/occflow/occupancy", self.heard.messages.append, 100)

    def _deafen(self) -> None:
        for subscription in [s for s in self.listener.subscriptions if s.topic_name == "/occflow/occupancy"]:
            self.listener.destroy_subscription(subscription)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Within it nobody listens to the output. After it somebody does, also where a test failed: others follow."""
        try:
            self._deafen()
            self.until(lambda: not self.node._out.get_subscription_count())
            yield
        finally:
            self.listen()

    def connected(self) -> None:
        publishers = [*self.car.images.values(), *self.car.infos.values(), self.car.tf, self.car.tf_static]
        self.until(
            lambda: all(p.get_subscription_count() for p in publishers) and self.car.clock.get_subscription_count()
        )
        self.until(lambda: self.node._out.get_subscription_count())

    def until(self, holds: Callable, seconds: float = 20.0):
        end = time.monotonic() + seconds
        while not (value := holds()) and time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.02)
        assert value, f"not within {seconds} s; {self.node.health and self.node.health.report(time.monotonic())}"
        return value

    def spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.executor.spin_once(timeout_sec=left)

    def drive(
        self,
        sweeps: int,
        period: float = 0.1,
        pace: float | None = None,
        without: Collection[str] = (),
        instead: Callable[[int], None] | None = None,
    ) -> None:
        """That many sweeps, `period` s apart by their stamps and `pace` s (by default as much) apart in time.

        A computer that stalls makes them late, not hasty: sweeps that were missed and come at once are lost in queues.
        """
        pace = period if pace is None else pace
        due = time.monotonic()
        for _ in range(sweeps):
            self._sweep(period, without, instead)
            due = max(due + pace, time.monotonic() + pace / 2)
            self.spin(max(0.0, due - time.monotonic()))

    def drive_until(self, holds: Callable, seconds: float = 20.0, **how) -> None:
        """Sweeps until something holds: what is well is so only while /clock runs."""
        end = time.monotonic() + seconds
        while not (value := holds()) and time.monotonic() < end:
            self.drive(1, **how)
        assert value, f"not within {seconds} s; {self.node.health and self.node.health.report(time.monotonic())}"

    def status(self, name: str = "occupancy"):
        """Of the newest report: level, message, values of one status."""
        for status in self.heard.diagnostics[-1].status if self.heard.diagnostics else ():
            if status.name.endswith(name):
                return int.from_bytes(status.level, "little"), status.message, {v.key: v.value for v in status.values}
        return None, "", {}  # nothing was heard yet

    def answer(self, period: float = 0.1, without: Collection[str] = (), instead: Callable[[int], None] | None = None):
        """One sweep, and the message that answers it. `instead` sends something at the sweep's stamp, ns, before."""
        self._sweep(period, without, instead)
        return self.answered()

    def _sweep(self, period: float, without: Collection[str], instead: Callable[[int], None] | None) -> None:
        self.stamp += round(period * NANO)
        self.car.tick(self.stamp)
        if instead is not None:
            instead(self.stamp)
        self.car.sweep(self.stamp, without)

    def answered(self, seconds: float = 10.0):
        """The message that answers the newest stamp."""
        self.until(lambda: self.heard.stamps[-1:] == [self.stamp], seconds)
        return self.heard.messages[-1]

    def said(self, words: str) -> bool:
        return any(words in line for line in self.heard.lines)

    def close(self) -> None:
        import rclpy

        self.node.close()
        self.executor.shutdown()
        for each in (self.node, self.car.node, self.listener):
            each.destroy_node()
        rclpy.try_shutdown(context=self.context)


def main() -> int:
    from occflow_ros import node

    if sys.platform == "linux":  # a test run that is killed leaves no node behind, which would speak on its domain
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    grid = OCC3D_GRID.coarser(int(os.environ.get("FAKE_COARSER", "1")))
    network = Network(float(os.environ.get("FAKE_DELAY", "0")), grid)
    network.failures.extend(MemoryError("none left") for _ in range(int(os.environ.get("FAKE_FAILURES", "0"))))
    network.before = lambda: print(THINKING, flush=True)
    waits = chain([0.0], repeat(float(os.environ.get("FAKE_LOADING", "0"))))

    def load(*_, **__):
        if seconds := next(waits):
            print(LOADING, flush=True)
            time.sleep(seconds)
        return model(network)

    node.load = load
    return node.main()


if __name__ == "__main__":
    sys.exit(main())
