"""What the node knows about itself: rates, ages, drops by reason, latencies. No rclpy; the caller brings the clock.

Thread-safe: callbacks and the worker both report here. Times are seconds of a steady clock, so that pauses, jumps and
replay rates of the ROS clock do not look like faults.
"""

import os
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

OK, WARN, ERROR, STALE = range(4)  # levels of diagnostic_msgs/DiagnosticStatus
LIDAR = "LiDAR"  # its name among the cameras'
WINDOW = 300  # latest values kept for rates and percentiles


@dataclass(frozen=True)
class Status:
    name: str
    level: int
    message: str
    values: dict[str, object]


class Health:
    def __init__(
        self,
        cameras: Sequence[str],
        model_name: str,
        quiet: float = 2.0,  # s of silence that is a fault
        lidar: bool = False,  # whether the model needs one: it is told of under the name LIDAR
    ):
        self.cameras, self.model_name, self.quiet = tuple(cameras), model_name, quiet
        self.sensors = (*self.cameras, LIDAR) if lidar else self.cameras
        self.active = True  # an inactive node is silent on purpose
        self._lock = threading.Lock()
        self._arrivals: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in self.sensors}
        self._used: dict[str, float] = {}
        self._drops: dict[str, Counter[str]] = {name: Counter() for name in (*self.sensors, "sets")}
        self._latest_drop: dict[str, str] = {}
        self._refused: set[str] = set()  # whose latest message was refused
        self._doubts: dict[str, str] = {}
        self._latencies: dict[str, deque[float]] = {}
        self._counts: Counter[str] = Counter()
        self._said: dict[str, float] = {}
        self._told: dict[str, object] = {}
        self._served: float | None = None
        self._idle: float | None = None
        self._failure = ""

    def image(self, camera: str, now: float) -> None:
        """An image of a camera, or a scan of the LiDAR, came and can be used as far as anybody knows."""
        with self._lock:
            self._arrivals[camera].append(now)
            self._refused.discard(camera)

    def used(self, camera: str, now: float) -> None:
        """An image of this camera, or the LiDAR's scan, went into an output: arriving is not enough."""
        with self._lock:
            self._used[camera] = now

    def dropped(self, what: str, reason: str, sentence: str = "") -> None:
        """Counts a loss; `what` is a camera's name, LIDAR or "sets". The sentence, if any, is shown with the counts."""
        with self._lock:
            self._drops[what][reason] += 1
            if sentence:
                self._latest_drop[what] = sentence

    def refused(self, sensor: str, reason: str, sentence: str) -> None:
        """Counts a message that was refused as it came: the sensor is not well until one is not."""
        self.dropped(sensor, reason, sentence)
        with self._lock:
            self._refused.add(sensor)

    def explain(self, what: str, sentence: str) -> None:
        """Why a sensor, or "sets", may be silent, where nothing was lost that could be counted."""
        with self._lock:
            self._latest_drop[what] = sentence

    def doubted(self, sensor: str, sentence: str) -> None:
        """A sensor works, but something about it is not as it should be, and is a warning; "" takes it back."""
        with self._lock:
            self._doubts[sensor] = sentence

    def collected(self, drops: Counter) -> None:
        """Takes over the collector's own counts, which are totals: (camera index or None, reason) -> count."""
        with self._lock:
            for (camera, reason), count in drops.items():
                self._drops["sets" if camera is None else self.cameras[camera]][reason] = count

    def count(self, what: str) -> None:
        """One more of: sets complete, sets partial, sets skipped, messages out, clock jumps, ..."""
        with self._lock:
            self._counts[what] += 1

    def tell(self, what: str, value: object) -> None:
        """A fact of the whole, as it is now: memory, the age of TF, whose weights, ..."""
        with self._lock:
            self._told[what] = value

    def took(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._latencies.setdefault(stage, deque(maxlen=WINDOW)).append(seconds)

    def served(self, now: float) -> None:
        with self._lock:
            self._counts["messages out"] += 1
            self._served = now

    def idle(self, now: float) -> None:
        """A set came that nobody would have heard the answer of."""
        with self._lock:
            self._counts["sets nobody listened to"] += 1
            self._idle = now

    def fail(self, sentence: str) -> None:
        """What the node cannot go on with."""
        with self._lock:
            self._failure = sentence

    def may_say(self, key: str, now: float, every: float = 5.0) -> bool:
        """Throttle for log lines: true once per `every` seconds for a key."""
        with self._lock:
            if now - self._said.get(key, -every) < every:
                return False
            self._said[key] = now
            return True

    def latest(self) -> dict[str, float]:
        """Stage -> s, what it took the last time."""
        with self._lock:
            return {stage: values[-1] for stage, values in self._latencies.items()}

    def latencies_ms(self) -> dict[str, dict[str, float]]:
        """Stage -> p50, p95, p99 in ms over the latest window."""
        with self._lock:
            windows = {stage: np.array(values) * 1e3 for stage, values in self._latencies.items() if values}
        return {
            stage: {f"p{p}": round(float(np.percentile(values, p)), 2) for p in (50, 95, 99)}
            for stage, values in windows.items()
        }

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def report(self, now: float) -> list[Status]:
        """One status for the whole, one a camera, one for the LiDAR where it is needed."""
        with self._lock:
            statuses = [self._sensor(name, now) for name in self.sensors]
            doubts = [self._doubts[name] for name in self.sensors if self._doubts.get(name)]
            silent = [s.name for s in statuses if s.level != OK and s.message != self._doubts.get(s.name)]
            values: dict[str, object] = {"model": self.model_name, **self._told, **self._counts}
            values |= {f"sets dropped: {reason}": n for reason, n in self._drops["sets"].items()}
            active = self.active
            done = max((t for t in (self._served, self._idle) if t is not None), default=None)
            since, idle = None if done is None else now - done, done is not None and done == self._idle
            failure = self._failure
        for stage, percentiles in self.latencies_ms().items():
            values |= {f"{stage} {p} ms": value for p, value in percentiles.items()}
        if failure:
            level, message = ERROR, failure
        elif not active:
            level, message = OK, "inactive"
        elif since is None:
            level, message = WARN, f"no output yet{self._why('sets')}"
        elif since > self.quiet:
            level, message = ERROR, f"no output for {since:.1f} s{self._why('sets')}"
        elif silent:
            level, message = WARN, f"running without {', '.join(silent)}"
        elif doubts:
            level, message = WARN, "; ".join(doubts)
        else:
            level, message = OK, "idle: nobody listens" if idle else "running"
        return [Status("occupancy", level, message, values), *statuses]

    def _sensor(self, name: str, now: float) -> Status:
        thing = "scan" if name == LIDAR else "image"
        arrivals, used = self._arrivals[name], self._used.get(name)
        values: dict[str, object] = {f"dropped: {reason}": n for reason, n in self._drops[name].items()}
        if arrivals:
            span = arrivals[-1] - arrivals[0]
            rate = round((len(arrivals) - 1) / span, 2) if span > 0 else ""
            values |= {"rate Hz": rate, "age s": round(now - arrivals[-1], 3)}
        if not self.active:
            return Status(name, OK, "inactive", values)
        if not arrivals:
            return Status(name, WARN, f"no {thing} yet{self._why(name)}", values)
        if now - arrivals[-1] > self.quiet:
            return Status(name, ERROR, f"no {thing} for {now - arrivals[-1]:.1f} s{self._why(name)}", values)
        if used is None or now - used > self.quiet:
            return Status(name, ERROR, f"{thing}s come, none of them can be used{self._why(name)}", values)
        if name in self._refused:  # before `quiet` has passed: whoever reads this need not wait to know it
            return Status(name, WARN, f"the latest {thing} was refused{self._why(name)}", values)
        if self._doubts.get(name):
            return Status(name, WARN, self._doubts[name], values)
        return Status(name, OK, "running", values)

    def _why(self, what: str) -> str:
        return f" (latest: {self._latest_drop[what]})" if what in self._latest_drop else ""


def resident_mb() -> float | None:
    """Memory of this process that is in RAM, MB; None where no /proc tells it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
