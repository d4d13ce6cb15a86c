"""The node as a process of its own, a car that drives it and one who listens: real DDS, a domain of its own, localhost.

The network is the stand-in of test/ros/fake.py; everything else is the node that ships.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ros.fake import BEGIN, CAMERAS, Car

from occflow_core.types import NANO
from occflow_core.voxelflow import NO_IMAGE

ROOT = Path(__file__).resolve().parents[2]
PERIOD = 1 / 12  # s between two sweeps
# s within a sweep at which nuScenes' cameras trigger, one after the other
STAGGER = dict(zip(CAMERAS, (0.008, 0.016, 0.0, 0.033, 0.043, 0.024), strict=True))
ALL = (1 << len(CAMERAS)) - 1


def environment(domain: int) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "test"), os.environ.get("PYTHONPATH"))))
    here = {"ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "PYTHONPATH": path}
    return {**os.environ, **here}


@dataclass(frozen=True)
class Answer:
    """One message of the node."""

    arrived: float  # s, steady
    message: Any  # VoxelFlow

    @property
    def stamp(self) -> int:
        return self.message.header.stamp.sec * NANO + self.message.header.stamp.nanosec

    @property
    def used(self) -> int:
        return self.message.cameras_used

    def stamps(self) -> list[int]:
        """Of the images that went into it, in whole microseconds."""
        return [self.stamp // 1000 - int(age) for age in self.message.camera_age_us if age != NO_IMAGE]


class Ride:
    """`with Ride(domain) as ride:` the node answers full sets when the block begins, unless `ready` is false."""

    def __init__(
        self,
        domain: int,
        delay: float = 0.0,  # s that the network takes
        coarser: int = 1,  # voxels that many times as long
        stagger: Mapping[str, float] | None = None,  # s, camera -> when it triggers within a sweep; None: all at once
        ready: bool = True,
        **parameters: Any,  # of the node
    ):
        self.domain, self.stagger, self.ready = domain, stagger or dict.fromkeys(CAMERAS, 0.0), ready
        self.environment = environment(domain) | {"FAKE_DELAY": str(delay), "FAKE_COARSER": str(coarser)}
        self.parameters = {"use_sim_time": True, **parameters}
        self.parameters |= {f"camera.{name}.offset": late for name, late in self.stagger.items()}
        self.answers: list[Answer] = []
        self.diagnostics: list[Any] = []  # DiagnosticArray
        self.sent: dict[int, float] = {}  # stamp of a sweep's newest image, ns -> when that left, s, steady
        self.stamp, self._sweeps = BEGIN, 0  # ns, the newest sweep's beginning; how many there were

    def __enter__(self) -> "Ride":
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from occflow_msgs.msg import VoxelFlow
        from rclpy.executors import SingleThreadedExecutor

        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"  # read by this process's own context
        self._log = tempfile.TemporaryFile("w+")
        said = [item for k, v in self.parameters.items() for item in ("-p", f"{k}:={str(v).lower()}")]
        self.process = self.start([str(ROOT / "test" / "ros" / "fake.py"), "--ros-args", *said])
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=self.domain)
        self.car = Car(self._context)
        self.listener = rclpy.create_node("listener", context=self._context)
        hear = lambda message: self.answers.append(Answer(time.monotonic(), message))  # noqa: E731
        self.listener.create_subscription(VoxelFlow, "/occflow/occupancy", hear, 100)
        self.listener.create_subscription(DiagnosticArray, "/diagnostics", self.diagnostics.append, 100)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.listener)
        try:
            if self.ready:
                self.until_full()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        import rclpy

        self.end()
        self._executor.shutdown()
        for node in (self.car.node, self.listener):
            node.destroy_node()
        rclpy.try_shutdown(context=self._context)
        self._log.close()

    def start(self, command: list[str], **options) -> subprocess.Popen:
        """A Python process on this ride's domain; what it prints goes to `log`."""
        return subprocess.Popen(
            [sys.executable, *command],
            **({"env": self.environment, "cwd": ROOT, "stdout": self._log, "stderr": subprocess.STDOUT} | options),
        )

    def end(self) -> int:
        """Stops the node as a launch system does; its exit code, or that of SIGKILL after 20 s."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    @property
    def log(self) -> str:
        """What the node printed so far."""
        return os.pread(self._log.fileno(), 10_000_000, 0).decode(errors="replace")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def until(self, holds: Callable[[], Any], seconds: float = 30.0) -> bool:
        """Listens until something holds; whether it came to hold in time."""
        end = time.monotonic() + seconds
        while not (value := holds()) and time.monotonic() < end:
            self._executor.spin_once(timeout_sec=0.02)
        return bool(value)

    def introduce(self) -> None:
        """What a car tells once: where its cameras are and what they are."""
        self.car.mount()
        for name in CAMERAS:
            self.car.info(name)

    def connected(self) -> None:
        """Waits for the node. RuntimeError where it does not come, or where another one speaks on this domain."""
        heard = lambda: all(p.get_subscription_count() for p in self.car.images.values())  # noqa: E731
        if not self.until(lambda: heard() or not self.alive, 90.0) or not self.alive:
            raise RuntimeError(f"the node does not listen: {self.log[-2000:]}")
        if (nodes := self.listener.count_publishers("/occflow/occupancy")) > 1:
            raise RuntimeError(f"{nodes} nodes speak on ROS domain {self.domain}: stop the other, or wait for it")

    def until_full(self) -> None:
        """Drives until the node answers with all six cameras. RuntimeError where it does not."""
        self.connected()
        for _ in range(240):
            self.introduce()
            self.drive(1)
            if self.answers and self.answers[-1].used == ALL:
                self.drive(6)
                self.spin(0.5)
                self.clear()
                return
        raise RuntimeError(f"no answer with six cameras: {self.log[-2000:]}")

    def clear(self) -> None:
        self.answers.clear()
        self.sent.clear()

    def drive(
        self,
        sweeps: int,
        pace: float = 1.0,  # s of the drive in a second
        lost: Callable[[int, str], bool] = lambda sweep, camera: False,
        shoot: Callable[[str, int], None] | None = None,  # instead of the car's own way: camera, stamp
        move: bool = True,  # false: TF says nothing of where the car is
    ) -> list[int]:
        """That many sweeps, in time; the newest stamp of each that had an image at all, ns.

        A computer that stalls makes them late, not hasty: sweeps that were missed and come at once are lost in queues.
        """
        shoot, newest = shoot or self.car.shoot, []
        begin, first = time.monotonic(), self.stamp
        for sweep in range(sweeps):
            self.stamp += round(PERIOD * NANO)
            if self._sweeps % 12 == 0:
                self.introduce()
            self._sweeps += 1
            late = time.monotonic() - (begin + (self.stamp - first) / NANO / pace)
            begin += max(0.0, late - PERIOD / pace / 2)
            stamps = []
            for name, late in sorted(self.stagger.items(), key=lambda item: item[1]):
                stamp = self.stamp + round(late * NANO)
                self.spin(begin + (stamp - first) / NANO / pace - time.monotonic())
                self.car.tick(stamp)
                if move and (not stamps or stamps[-1] != stamp):
                    self.car.move(stamp)
                if not lost(sweep, name):
                    shoot(name, stamp)
                    stamps.append(stamp)
                    left = time.monotonic()
            if stamps:
                self.sent[stamps[-1]] = left
                newest.append(stamps[-1])
        self.spin(begin + (self.stamp + round(PERIOD * NANO) - first) / NANO / pace - time.monotonic())
        return newest

    def status(self, name: str = "occupancy") -> tuple[int, str, dict[str, str]]:
        """Of the newest report: level, message and values of one status."""
        for status in self.diagnostics[-1].status:
            if status.name.endswith(name):
                return int.from_bytes(status.level, "little"), status.message, {v.key: v.value for v in status.values}
        raise KeyError(name)
