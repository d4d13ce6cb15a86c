"""What the node knows about itself: rates, ages, drops by reason, latencies. No rclpy; the caller brings the clocks.

Thread-safe: callbacks and the worker both report here. `now` is always s of the steady clock, so that a ROS clock that
died is noticed. `clock` brings what /clock says beside it, so that a bag that is paused, slow or begins anew is no
fault: silent is who is silent by both.
"""

import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from occflow_core.types import NANO

OK, WARN, ERROR, STALE = range(4)  # levels of diagnostic_msgs/DiagnosticStatus
LIDAR = "LiDAR"  # its name among the cameras'
WINDOW = 300  # latest values kept for percentiles
RATED = 60  # latest stamps a rate is of: 5 s at 12 Hz
LATE = 3.0  # of a sensor's own periods: the silence that is said at once; less is jitter
GONE = 10.0  # s without output until it is STALE: even at 4 m/s the car has by then left the 40 m it last looked ahead
STILL = 1.5  # s that /clock may stand still: some publish it once a second
SPEED = 3.0  # s over which the speed of /clock is measured
PAUSED = "paused"
TICK = 0.1  # s from one kept reading of /clock to the next


@dataclass(frozen=True)
class Status:
    name: str
    level: int
    message: str
    values: dict[str, object]


class _Mark(NamedTuple):
    """A moment on both clocks."""

    steady: float  # s
    ran: float  # s that /clock had run until then


class _Clocks:
    """The steady clock, and /clock where the node lives by it. Not thread-safe."""

    def __init__(self, jump: float):
        self.jump = jump
        self.ros: float | None = None  # s, what /clock said last; None: the node does not live by it
        self.ran = 0.0  # s that /clock has run, without its jumps back
        self.moved = 0.0  # s, steady: when it was first seen to say what it says
        self._heard: tuple[float, float] | None = None  # s, steady: of the messages since, first and last of a run
        self._readings: deque[_Mark] = deque()

    def tick(self, now: float, ros: float | None) -> bool:
        """Takes a reading; was the clock turned back?"""
        before, self.ros = self.ros, ros
        if ros is None:
            self._readings.clear()
            return False
        if ros != before:
            self.moved, self._heard = now, None
        step = ros - before if before else 0.0  # 0 is no time: /clock did not run from there to its first message
        if turned_back := step < -self.jump:
            step = 0.0
            self._readings.clear()  # how far it ran before is not known
        self.ran += step
        if not self._readings or now - self._readings[-1].steady >= TICK:
            self._readings.append(self.mark(now))
        while len(self._readings) > 2 and now - self._readings[1].steady >= SPEED:
            self._readings.popleft()
        return turned_back

    def mark(self, now: float) -> _Mark:
        return _Mark(now, self.ran)

    def hear(self, now: float) -> None:
        """A message came."""
        first, last = self._heard or (now, now)
        self._heard = (first if now - last <= STILL else now, now)

    def dead(self) -> bool:
        """Does /clock stand still while messages go on? A few as it stops, or as it runs on, do not count."""
        return self.ros is not None and self._heard is not None and self._heard[1] - self._heard[0] > STILL

    def age(self, mark: _Mark, now: float) -> float:
        """s since then: by /clock where the node lives by it."""
        return now - mark.steady if self.ros is None or self.dead() else max(0.0, self.ran - mark.ran)

    def silence(self, mark: _Mark, now: float) -> float:
        """s since then by either clock, whichever says less."""
        return min(now - mark.steady, self.age(mark, now))

    def speed(self) -> float | None:
        """s of /clock in a steady second, lately."""
        if not self._readings or (span := self._readings[-1].steady - self._readings[0].steady) <= 0:
            return None
        return (self._readings[-1].ran - self._readings[0].ran) / span

    def doubt(self, now: float) -> str:
        """What is wrong with /clock; "" where nothing is."""
        if self.ros is None or now - self.moved <= STILL:
            return ""
        if self.ros == 0:
            return "no /clock yet, though use_sim_time is on"
        still = f"/clock has stood still for {now - self.moved:.1f} s"
        return f"{still}, though messages come" if self.dead() else f"{PAUSED}: {still}"


class Health:
    def __init__(
        self,
        cameras: Sequence[str],
        model_name: str,
        quiet: float = 2.0,  # s of silence that is a fault
        lidar: bool = False,  # whether the model needs one: it is told of under the name LIDAR
        least: int = 1,  # cameras without which no set is answered
        jump: float = 1.0,  # s: a stamp, or /clock, that goes back by more was turned back
    ):
        self.cameras, self.model_name, self.quiet = tuple(cameras), model_name, quiet
        self.sensors = (*self.cameras, LIDAR) if lidar else self.cameras
        self.least, self.gone = least, max(GONE, 2 * quiet)
        self.active = False  # an inactive node is silent on purpose
        self._lock = threading.Lock()
        self._clocks = _Clocks(jump)
        self._drops: dict[str, Counter[str]] = {name: Counter() for name in (*self.sensors, "sets")}
        self._lost = 0  # sets that the collector gave to nobody
        self._latest_drop: dict[str, str] = {}
        self._doubts: dict[str, str] = {}
        self._latencies: dict[str, deque[float]] = {}
        self._counts = Counter(dict.fromkeys(("sets complete", "sets partial", "sets skipped", "messages out"), 0))
        self._said: dict[str, float] = {}
        self._lap = self._clocks.mark(-np.inf)  # when /clock was last turned back
        self._told: dict[str, object] = {}
        self._failure = ""
        self._collected: Counter[tuple[int | None, str]] = Counter()  # the totals of this activation's collector
        self._begin(0.0)

    def _begin(self, now: float) -> None:
        self._activated = self._clocks.mark(now)
        self._stamps: dict[str, deque[int]] = {name: deque(maxlen=RATED) for name in self.sensors}
        self._began: dict[str, _Mark] = {}  # when a sensor was heard after silence
        self._arrived: dict[str, _Mark] = {}
        self._used: dict[str, _Mark] = {}
        self._served: _Mark | None = None
        self._idle = False  # whether the newest set was not answered, as nobody listened
        self._missing: set[str] = set()  # from the newest set that was answered
        self._refused: set[str] = set()  # whose latest message was refused

    def activate(self, now: float) -> None:
        """From now on silence is a fault; counts go on, what was heard before is forgotten."""
        with self._lock:
            self._begin(now)
            self._collected.clear()
            self._latest_drop.clear()
            self._failure = ""
            self.active = True

    def clock(self, now: float, ros: float | None) -> None:
        """What /clock says, s; 0 before it said anything, None where the node does not live by it (no use_sim_time).

        To be brought before each message and each report: what it did between two calls is not seen.
        """
        with self._lock:
            if not self._clocks.tick(now, ros):
                return
            # a lap ends and begins without images: whoever spoke in the last one has the time anew, once
            lap, before = self._clocks.mark(now), self._lap
            for marks in (self._began, self._arrived, self._used):
                marks.update((name, lap) for name, mark in marks.items() if mark > before)
            if self._served is not None and self._served > before:
                self._served = lap
            self._lap = lap

    def image(self, camera: str, now: float, stamp: int) -> None:
        """An image of a camera, or a scan of the LiDAR, of `stamp` ns came and can be used as far as anybody knows."""
        with self._lock:
            stamps, mark = self._stamps[camera], self._clocks.mark(now)
            if camera not in self._arrived or self._clocks.silence(self._arrived[camera], now) > self.quiet:
                self._began[camera] = mark
            # a gap, or another lap: the rate is that of what came since
            if stamps and not -self._clocks.jump <= (stamp - stamps[-1]) / NANO <= self.quiet:
                stamps.clear()
            if not stamps or stamp != stamps[-1]:
                stamps.append(stamp)
            self._arrived[camera] = mark
            self._refused.discard(camera)
            self._clocks.hear(now)

    def dropped(self, what: str, reason: str, sentence: str = "") -> None:
        """Counts a loss; `what` is a camera's name, LIDAR or "sets". The sentence, if any, is shown with the counts."""
        with self._lock:
            self._drops[what][reason] += 1
            if sentence:
                self._latest_drop[what] = sentence

    def refused(self, sensor: str, now: float, reason: str, sentence: str) -> None:
        """Counts a message that was refused as it came: the sensor is not well until one is not."""
        self.dropped(sensor, reason, sentence)
        with self._lock:
            self._refused.add(sensor)
            self._clocks.hear(now)

    def explain(self, what: str, sentence: str) -> None:
        """Why a sensor, or "sets", may be silent, where nothing was lost that could be counted."""
        with self._lock:
            self._latest_drop[what] = sentence

    def doubted(self, what: str, sentence: str) -> bool:
        """A sensor, or something else by its name, works and is not as it should be: a warning; "" takes it back.

        Is it a new one?
        """
        with self._lock:
            new = bool(sentence) and self._doubts.get(what) != sentence
            self._doubts[what] = sentence
            return new

    def collected(self, drops: Counter) -> None:
        """Takes over the collector's own counts, which are totals: (camera index or None, reason) -> count."""
        with self._lock:
            for (camera, reason), count in drops.items():
                more = count - self._collected[camera, reason]
                self._drops["sets" if camera is None else self.cameras[camera]][reason] += more
                self._lost += more if camera is None else 0
            self._collected = Counter(drops)

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

    def served(self, now: float, sensors: Iterable[str]) -> None:
        """An output left; what of these sensors went into it was used: arriving is not enough."""
        with self._lock:
            self._counts["messages out"] += 1
            self._served, self._idle = self._clocks.mark(now), False
            self._missing = {*self.sensors} - {*sensors}
            for name in {*sensors}:
                self._used[name] = self._served
                self._latest_drop.pop(name, None)  # what was lost before it explains no later silence
            self._latest_drop.pop("sets", None)

    def idle(self, now: float) -> None:
        """A set came that nobody would have heard the answer of. Nobody looked into it, so it tells that images come,
        and not that they can be used."""
        with self._lock:
            self._counts["sets nobody listened to"] += 1
            self._served, self._idle = self._clocks.mark(now), True
            self._missing.clear()
            self._began.update(dict.fromkeys(self._arrived, self._served))

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
        stages = self.latencies_ms().items()
        latencies = {f"{stage} {p} ms": ms for stage, percentiles in stages for p, ms in percentiles.items()}
        with self._lock:
            statuses = [self._sensor(name, now) for name in self.sensors]
            values = {"model": self.model_name, **self._told, **self._clock_values(now), **self._counts}
            values |= {f"sets dropped: {reason}": n for reason, n in self._drops["sets"].items()}
            counts = self._counts
            asked = counts["sets complete"] + counts["sets partial"] + self._lost - counts["sets nobody listened to"]
            if asked > 0:
                values["share of sets answered"] = round(counts["messages out"] / asked, 3)
            level, message = self._whole(statuses, now)
        return [Status("occupancy", level, message, values | latencies), *statuses]

    def _clock_values(self, now: float) -> dict[str, object]:
        values: dict[str, object] = {"use_sim_time": str(self._clocks.ros is not None).lower()}
        if (speed := self._clocks.speed()) is not None:
            values["clock speed"] = round(speed, 2)
        if self.active:
            values["active s"] = round(now - self._activated.steady, 1)
        return values

    def _whole(self, statuses: list[Status], now: float) -> tuple[int, str]:
        if self._failure:
            return ERROR, self._failure
        if not self.active:
            return OK, "inactive"
        clock, doubts = self._clocks.doubt(now), [doubt for doubt in self._doubts.values() if doubt]
        here = sum(not self._late(name, now) and name not in self._refused for name in self.cameras)
        few = f"{here} of {len(self.cameras)} cameras, expected at least {self.least}" if here < self.least else ""
        silence = self._clocks.silence(self._served or self._activated, now)
        if self._served is None or silence > self.quiet:
            level = WARN if silence <= self.quiet else ERROR if silence <= self.gone else STALE
            message = "no output yet" if self._served is None else f"no output for {silence:.1f} s"
            latest = self._latest_drop.get("sets")
            reasons = [reason for reason in (clock, few, latest and f"latest: {latest}") if reason]
            return level, "; ".join([f"{message} ({'; '.join(reasons)})" if reasons else message, *doubts])
        absent = [s.name for s in statuses if s.level != OK and s.message != self._doubts.get(s.name)]
        without = f"running without {', '.join(absent)}" if absent else ""
        warnings = [warning for warning in (clock, few, without, *doubts) if warning]
        return (WARN, "; ".join(warnings)) if warnings else (OK, "idle: nobody listens" if self._idle else "running")

    def _sensor(self, name: str, now: float) -> Status:
        values: dict[str, object] = {f"dropped: {reason}": n for reason, n in self._drops[name].items()}
        arrived = self._arrived.get(name)
        silence = self._clocks.silence(arrived or self._activated, now)
        if arrived is not None:
            rate = 0.0 if silence > self.quiet else self._rate(name)
            values["rate Hz"] = "" if rate is None else round(rate, 2)
            values["age s"] = round(self._clocks.age(arrived, now), 3)
        if not self.active:
            return Status(name, OK, "inactive", values)
        level, message = self._fault(name, silence, now)
        if level != OK:
            latest = self._latest_drop.get(name)
            return Status(name, level, f"{message} (latest: {latest})" if latest else message, values)
        if self._doubts.get(name):
            return Status(name, WARN, self._doubts[name], values)
        paused = self._clocks.doubt(now).startswith(PAUSED)
        return Status(name, OK, PAUSED if paused else "idle" if self._idle else "running", values)

    def _fault(self, name: str, silence: float, now: float) -> tuple[int, str]:
        thing = "scan" if name == LIDAR else "image"
        if name not in self._arrived:
            return ERROR if silence > self.quiet else WARN, f"no {thing} yet"
        if silence > self.quiet:
            return ERROR, f"no {thing} for {silence:.1f} s"
        began, used = self._began[name], self._used.get(name)
        unused = self._clocks.silence(began if used is None else max(began, used), now)
        if unused > self.quiet and not self._idle:
            return ERROR, f"{thing}s come, none of them was used for {unused:.1f} s"
        # from here on it is said before `quiet` has passed: whoever reads it need not wait to know
        if name in self._refused:
            return WARN, f"the latest {thing} was refused"
        if (used is None or used < began) and not self._idle:
            return WARN, f"{thing}s come, none of them was used yet"
        if name in self._missing:
            return WARN, "missing from the newest set"
        if self._late(name, now):
            return WARN, f"no {thing} for {silence:.2f} s"
        return OK, ""

    def _rate(self, name: str) -> float | None:
        """Hz, from the stamps: the sensor's own, however fast a recording is played."""
        stamps = self._stamps[name]
        span = (max(stamps) - min(stamps)) / NANO if stamps else 0.0
        return (len(stamps) - 1) / span if span > 0 else None

    def _late(self, name: str, now: float) -> bool:
        """Should more of a sensor have come by now?"""
        if name not in self._arrived:
            return True
        silence, rate = self._clocks.silence(self._arrived[name], now), self._rate(name)
        return silence > (self.quiet if rate is None else min(self.quiet, LATE / rate))


def resident_mb() -> float | None:
    """Memory of this process that is in RAM, MB; None where no /proc tells it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
