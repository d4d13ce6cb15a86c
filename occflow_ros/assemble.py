"""Images of many cameras -> sets -> Frames, or the reason why not. No rclpy: everything here runs anywhere.

The collector keeps a few open sets, each known by its reference time r = stamp - offset of its camera. An image joins
the nearest open set within the tolerance, or opens one. A set leaves when it is complete, when its deadline has passed
(by the caller's steady clock), or when a younger set completes; it leaves with a hole for each camera that is missing.
Unlike `message_filters.ApproximateTimeSynchronizer` a dead camera makes the sets partial, not silent, and two sweeps
are never mixed. The cost of an image is O(open sets). Who wants complete sets only finds them in `approximate`.
"""

import threading
from abc import ABC, abstractmethod
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch

from occflow_core.geometry import Cameras, rigid
from occflow_core.geometry.lenses import Lens
from occflow_core.types import NANO, Frame

KEEP_SCANS = 2.0  # s of scans that wait for sets which come late
AHEAD = 1.0  # s that a stamp may be ahead of the ROS clock: /clock comes in steps, and clocks differ a little
BLOCK = 1 << 16  # bytes compared at once: two different pictures are told apart at the first block that differs
OPEN_SETS = 3  # more would mean that images arrive three periods late: such sets have passed their deadline


@dataclass(frozen=True)
class ImageSet:
    """What the cameras saw of one instant; a hole (None) for each camera that said nothing."""

    pictures: tuple[Any | None, ...]  # what was given to `add` (the node gives `Shot`s), in camera order
    stamps: tuple[int | None, ...]  # ns, each camera's own
    lap: int  # counts clock jumps: sets of different laps do not follow each other

    @property
    def stamp(self) -> int:
        """The reference stamp: that of the newest image, ns."""
        return max(stamp for stamp in self.stamps if stamp is not None)

    @property
    def complete(self) -> bool:
        return None not in self.pictures

    def without(self, camera: int) -> "ImageSet":
        """The same set after an image turned out to be unusable."""
        pictures, stamps = list(self.pictures), list(self.stamps)
        pictures[camera] = stamps[camera] = None
        return replace(self, pictures=tuple(pictures), stamps=tuple(stamps))


@dataclass
class _Open:
    reference: int  # ns, r of the image that opened the set
    deadline: float  # s, steady clock
    pictures: dict[int, Any]
    stamps: dict[int, int]


class Gatherer(ABC):
    """What all who put images of several cameras into sets share: offsets, laps, counts of what was dropped, and sets
    that go forward. One caller at a time."""

    def __init__(
        self,
        cameras: int,
        offsets: Sequence[float] | None = None,  # s, one a camera: stamp - offset is equal within a set
        jump: float = 1.0,  # s: a stamp that goes back by more means that the clock was turned back
    ):
        offsets = [0.0] * cameras if offsets is None else list(offsets)
        if cameras < 1 or len(offsets) != cameras:
            raise ValueError(
                f"sets need cameras >= 1 (got {cameras}) and an offset for each of them (got {len(offsets)})"
            )
        self.cameras = cameras
        self.offsets = [round(offset * NANO) for offset in offsets]
        self.jump = round(jump * NANO)
        self.lap = 0
        self.dropped: Counter[tuple[int | None, str]] = Counter()  # (camera or None for whole sets, reason) -> count
        self._newest: list[int | None] = [None] * cameras  # stamp of the newest image of each camera
        self._told: int | None = None  # stamp of the last set that was given out

    def add(self, camera: int, stamp: int, picture: Any, now: float, clock: float | None = None) -> list[ImageSet]:
        """Takes one image (stamp ns; now s, steady); gives the sets that leave because of it, oldest first.

        clock: s, by the clock that the stamps follow, where it is not as fast as the steady one: that of a replay.
        """
        reference, before = stamp - self.offsets[camera], self._newest[camera]
        if min(stamp, reference) <= 0:
            return self._drop(camera, "no stamp")
        # a camera's own stamps tell whether its clock was turned back; that it lags behind others does not
        if before is not None and stamp < before - self.jump:
            self.clear()
            before = None
        if stamp == before:
            return self._drop(camera, "same stamp again")
        self._newest[camera] = stamp if before is None else max(before, stamp)
        return self._place(camera, reference, stamp, picture, now, now if clock is None else clock)

    def poll(self, now: float) -> list[ImageSet]:
        """Gives the sets whose time has come without an image (now s, steady)."""
        return []

    @property
    def waiting(self) -> bool:
        """May `poll` have something to give, sooner or later?"""
        return False

    def clear(self, reason: str = "clock jump") -> None:
        """Forgets what waits: the clock was turned back, or somebody asked for it. A new lap begins."""
        for camera in self._forget():
            self.dropped[camera, reason] += 1
        self.lap += 1
        self._newest, self._told = [None] * self.cameras, None

    @abstractmethod
    def _place(self, camera: int, reference: int, stamp: int, picture: Any, now: float, clock: float) -> list[ImageSet]:
        """Puts an image where it belongs; gives the sets that leave because of it."""

    @abstractmethod
    def _forget(self) -> list[int]:
        """Drops all images that wait; gives the camera of each."""

    def _drop(self, camera: int, reason: str) -> list[ImageSet]:
        self.dropped[camera, reason] += 1
        return []

    def _drop_set(self, cameras: Iterable[int], reason: str, of_images: str) -> list[ImageSet]:
        self.dropped[None, reason] += 1
        for camera in cameras:
            self.dropped[camera, of_images] += 1
        return []

    def _give(self, pictures: dict[int, Any], stamps: dict[int, int]) -> list[ImageSet]:
        images = ImageSet(
            tuple(pictures.get(i) for i in range(self.cameras)),
            tuple(stamps.get(i) for i in range(self.cameras)),
            self.lap,
        )
        # references may go forward where the newest stamps do not: offsets are large, or stamps uneven
        if self._told is not None and images.stamp <= self._told:
            return self._drop_set(stamps, "not newer than the last", "set was not newer than the last")
        self._told = images.stamp
        return [images]


class Collector(Gatherer):
    """Sets that leave at their deadline, whoever is missing. The caller brings the steady clock."""

    def __init__(
        self,
        cameras: int,
        period: float,  # s between two images of one camera
        offsets: Sequence[float] | None = None,
        deadline: float = 0.12,  # s after its first image, by the steady clock, a set leaves as it is
        tolerance: float = 0.4,  # of the period: how far an image may be from the set's reference
        min_cameras: int = 1,  # sets with fewer images are dropped and counted
        jump: float = 1.0,
    ):
        super().__init__(cameras, offsets, jump)
        if not 1 <= min_cameras <= cameras or period <= 0 or deadline <= 0:
            raise ValueError(
                f"a collector of {cameras} cameras needs 1 <= min_cameras <= cameras (got {min_cameras}), "
                f"period and deadline > 0 (got {period}, {deadline})"
            )
        self.min_cameras, self.deadline = min_cameras, deadline
        self.tolerance = round(tolerance * period * NANO)
        self._open: list[_Open] = []  # oldest reference first
        # reference minus arrival of each camera's newest image, ns, and when that was, s, steady
        self._lead: list[tuple[float, float] | None] = [None] * cameras
        self._fresh = deadline + 2 * period  # s: who was silent for longer tells nothing of the clocks
        self._left: int | None = None  # reference of the youngest set that has left

    def _place(self, camera: int, reference: int, stamp: int, picture: Any, now: float, clock: float) -> list[ImageSet]:
        self._lead[camera] = reference - clock * NANO, now
        if self._runs_ahead(camera, now):  # its sets would leave before the others' images come, and make those late
            return self._drop(camera, "clock ahead of the other cameras")
        if self._left is not None and reference <= self._left + self.tolerance:
            return self._drop(camera, "late")
        home = min(self._open, key=lambda s: abs(s.reference - reference), default=None)
        if home is None or abs(home.reference - reference) > self.tolerance:
            home = _Open(reference, now + self.deadline, {}, {})
            self._open.append(home)
            self._open.sort(key=lambda s: s.reference)
        elif camera in home.pictures:
            return self._drop(camera, "second image of a set")
        home.pictures[camera], home.stamps[camera] = picture, stamp
        if len(home.pictures) == self.cameras:
            return self._leave(lambda s: s.reference <= home.reference)
        if len(self._open) > OPEN_SETS:
            return self._leave(lambda s: s is self._open[0])
        return []

    def poll(self, now: float) -> list[ImageSet]:
        """Gives the sets whose deadline has passed; older sets leave with them, so that order is kept."""
        due = [s.reference for s in self._open if s.deadline <= now]
        return self._leave(lambda s: s.reference <= max(due)) if due else []

    @property
    def waiting(self) -> bool:
        return bool(self._open)

    def _forget(self) -> list[int]:
        cameras = [camera for waiting in self._open for camera in waiting.pictures]
        self._open, self._left, self._lead = [], None, [None] * self.cameras
        return cameras

    def _runs_ahead(self, camera: int, now: float) -> bool:
        """Is a camera's clock ahead of the middle one of the others by more than a set waits? Two others must speak."""
        others = [
            lead[0]
            for i, lead in enumerate(self._lead)
            if lead is not None and i != camera and now - lead[1] <= self._fresh
        ]
        if len(others) < 2:
            return False
        return self._lead[camera][0] - median(others) > self.deadline * NANO + self.tolerance

    def _leave(self, goes: Callable[[_Open], bool]) -> list[ImageSet]:
        leaving = [s for s in self._open if goes(s)]
        self._open = [s for s in self._open if not goes(s)]
        sets = []
        for s in leaving:
            self._left = s.reference if self._left is None else max(self._left, s.reference)
            if len(s.pictures) < self.min_cameras:
                self._drop_set(s.pictures, "too few cameras", "set had too few cameras")
            else:
                sets += self._give(s.pictures, s.stamps)
        return sets


@dataclass
class _Repeated:
    what: Any  # a stamp, or the bytes of a picture
    stamp: int  # ns, of the image that first had it
    since: float  # s, steady: when that image came
    times: int = 0  # how often it came again


class Watch:
    """Tells when one camera is frozen: it goes on sending, but the same stamp or the same picture; and when it sends
    stamps of the future. The caller brings the clocks.

    The whole picture is compared with the one before, not a checksum of it: only a camera whose every byte stands still
    is frozen, so neither sensor noise at night nor one changed byte is. A camera that is not frozen costs the first
    block that differs (6 us); one that is costs the whole picture (0.4 ms for 1600 x 900 bgr8, 0.02 ms for its JPEG).
    What cannot be seen: a sensor that stands still behind a driver which writes time or a counter into each picture.

    A stamp ahead of the ROS clock is always wrong, and must not enter a set: whatever came after it would be late. One
    far behind it is not: so is every image of a recording that is played without `use_sim_time`. If only one camera
    is behind, its images are late for the collector, which counts them.
    """

    def __init__(self, frozen_after: float):  # s that the same may come again before it counts; 0: always
        if frozen_after < 0:
            raise ValueError(f"a watch needs frozen_after >= 0 s, got {frozen_after}")
        self.frozen_after = frozen_after
        self._stamp: _Repeated | None = None
        self._picture: _Repeated | None = None

    def fault(self, stamp: int, data: np.ndarray, now: float, clock: int) -> tuple[str, str] | None:
        """What is wrong with an image: a few fixed words to count it by, and a sentence; None where nothing is.

        stamp: ns; data: (n,) uint8, the picture's bytes, kept until others come; now: s, steady; clock: ns, the ROS
        clock, 0 while it has no time yet.
        """
        if clock > 0 and stamp > clock + AHEAD * NANO:
            return "stamp far from the clock", (
                f"the stamp {stamp / NANO:.3f} s is {(stamp - clock) / NANO:.3f} s ahead of the ROS clock, "
                f"{clock / NANO:.3f} s, expected at most {AHEAD} s; is use_sim_time as it should be?"
            )
        if self.frozen_after == 0:
            return None
        if self._stamp is not None and stamp == self._stamp.what:
            self._stamp.times += 1
        else:
            self._stamp = _Repeated(stamp, stamp, now)
        if self._picture is not None and _same(data, self._picture.what):
            self._picture.times += 1
        else:
            self._picture = _Repeated(data, stamp, now)
        for what, run in (("stamp", self._stamp), ("picture", self._picture)):
            if now - run.since >= self.frozen_after:
                return f"frozen: same {what}", (
                    f"the camera is frozen: the {what} of {run.stamp / NANO:.3f} s came {run.times} more times "
                    f"within {now - run.since:.2f} s, expected a new one each time"
                )
        return None


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Are two (n,) uint8 equal? Most pictures differ in their first block."""
    return a.size == b.size and all(np.array_equal(a[i : i + BLOCK], b[i : i + BLOCK]) for i in range(0, a.size, BLOCK))


class Mailbox:
    """One place between the callbacks and the worker: the newest set wins, so latency cannot grow.

    A worker that waits is given the next letter into its hand, and the place stays free: of two sets that leave at once
    (a partial one, because a younger one is complete) an idle worker answers both.
    """

    def __init__(self):
        self._condition = threading.Condition()
        self._letter: Any | None = None
        self._hand: Any | None = None  # for the worker that waits
        self._waits = self._closed = False

    def put(self, letter: Any | None) -> Any | None:
        """Leaves a letter, or with None only empties the place; gives back the one that nobody had taken, or None."""
        with self._condition:
            if self._waits and letter is not None:
                self._hand, self._waits = letter, False
                self._condition.notify()
                return None
            before, self._letter = self._letter, letter
            return before

    def take(self) -> Any | None:
        """Waits for a letter; None when the mailbox was closed."""
        with self._condition:
            if self._letter is None and not self._closed:
                self._waits = True
                self._condition.wait_for(lambda: self._hand is not None or self._closed)
                self._waits = False
                letter, self._hand = self._hand, None
            else:
                letter, self._letter = self._letter, None
            return None if self._closed else letter

    def close(self) -> None:
        with self._condition:
            self._closed, self._letter, self._hand = True, None, None
            self._condition.notify_all()


@dataclass(frozen=True)
class Cloud:
    """One scan as it came."""

    points: np.ndarray  # (P, 4 or more) float32: x y z (m, in `frame`), intensity
    frame: str  # TF name
    stamp: int  # ns


class Scans:
    """The latest scans of one LiDAR. Thread-safe: a callback adds, the worker takes."""

    def __init__(
        self,
        topic: str,  # where they come from, for what is said
        count: int,  # scans that a set gets: the newest and those before it
        period: float,  # s from scan to scan
        gap: float = 0.5,  # s: a set whose newest scan is older than this has none
        jump: float = 1.0,  # s: a stamp that goes back by more means that the clock was turned back
    ):
        if count < 1 or period <= 0 or gap <= 0:
            raise ValueError(f"scans need count >= 1 (got {count}), period and gap > 0 (got {period}, {gap})")
        self.topic, self.count, self.gap = topic, count, gap
        self._period, self._jump = round(period * NANO), round(jump * NANO)
        self._kept = count + round(KEEP_SCANS / period)
        self._clouds: list[Cloud] = []  # oldest first
        self._condition = threading.Condition()

    def add(self, cloud: Cloud) -> None:
        with self._condition:
            if self._clouds and cloud.stamp < self._clouds[-1].stamp - self._jump:
                self._clouds.clear()
            self._clouds = [other for other in self._clouds if other.stamp != cloud.stamp]
            insort(self._clouds, cloud, key=lambda c: c.stamp)
            del self._clouds[: -self._kept]
            self._condition.notify_all()

    def take(self, stamp: int, timeout: float) -> list[Cloud]:
        """The scans of a set at `stamp` ns, the newest first; none where the newest is older than the gap.

        A scan may be half a period ahead: its stamp can be that of its end. Where the newest is older than a period,
        up to `timeout` s (steady clock) are waited for the next.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._before(stamp, self._period), timeout)
            return self._before(stamp, round(self.gap * NANO))

    def newest(self) -> int | None:
        """The stamp of the newest scan, ns."""
        with self._condition:
            return self._clouds[-1].stamp if self._clouds else None

    def _before(self, stamp: int, gap: int) -> list[Cloud]:
        there = [cloud for cloud in reversed(self._clouds) if cloud.stamp <= stamp + self._period // 2]
        return there[: self.count] if there and there[0].stamp >= stamp - gap else []


@dataclass(frozen=True, eq=False)
class Calibration:
    """One camera's picture size and intrinsics, as its CameraInfo gave them."""

    pixels_from_camera: np.ndarray  # (3, 3) float64, of the picture as it comes
    height: int
    width: int
    optical_frame: str  # TF name
    lens: Lens | None = None  # None: a pinhole
    pinhole: np.ndarray | None = None  # (3, 3) float64, where there is a lens: what the picture without it should have

    def __str__(self) -> str:
        said = f"{self.width} x {self.height} pixels in {self.optical_frame}, {_told(self.pixels_from_camera)}"
        if self.lens is not None:
            bend = [round(c, 6) for c in self.lens.coefficients]
            said += f", {self.lens.model} {bend}, without it {_told(self.pinhole)}"
        return said

    @property
    def key(self) -> tuple:
        """Equal where two calibrations make the same of a picture."""
        pinhole = None if self.pinhole is None else self.pinhole.tobytes()
        return self.pixels_from_camera.tobytes(), self.height, self.width, self.lens, pinhole


def _told(k: np.ndarray) -> str:
    return f"fx {k[0, 0]:.6g} fy {k[1, 1]:.6g} cx {k[0, 2]:.6g} cy {k[1, 2]:.6g}"


@dataclass(frozen=True)
class Shot:
    """An image and the calibration that held when it came."""

    picture: Any  # convert.Picture
    calibration: Calibration


def frame_of(
    images: ImageSet,  # of Shots
    names: Sequence[str],
    pictures: torch.Tensor,  # (N, H, W, 3) uint8 RGB, black where there is no image
    mounts: Sequence[torch.Tensor | None],  # base_from_camera at each camera's stamp
    poses: Sequence[torch.Tensor | None],  # world_from_base at each camera's stamp
    world_from_car: torch.Tensor,  # (4, 4) float64 at the set's stamp
    points: torch.Tensor | None = None,  # as Frame has them
) -> Frame:
    """The Frame of a set whose pictures are decoded and whose transforms are known.

    Each camera's `car_from_camera` gets the car's motion between its own stamp and the set's. A camera without an
    image has no calibration that anybody may look at: `used` says so, its matrices are placeholders.
    """
    used = torch.tensor([shot is not None for shot in images.pictures])
    intrinsics, extrinsics = [], []
    for shot, base_from_camera, world_from_base in zip(images.pictures, mounts, poses, strict=True):
        if shot is not None:
            intrinsics.append(torch.from_numpy(shot.calibration.pixels_from_camera).double())
            extrinsics.append(rigid.inverse(world_from_car) @ world_from_base @ base_from_camera)
        else:
            intrinsics.append(torch.eye(3, dtype=torch.float64))
            extrinsics.append(torch.eye(4, dtype=torch.float64))
    return Frame(
        images=pictures.permute(0, 3, 1, 2),
        cameras=Cameras(torch.stack(intrinsics), torch.stack(extrinsics), pictures.shape[1], pictures.shape[2]),
        used=used,
        stamps=torch.tensor([images.stamp if s is None else s for s in images.stamps]),
        stamp=images.stamp,
        world_from_car=world_from_car,
        drive=f"lap {images.lap}",
        names=tuple(names),
        points=points,
    )
