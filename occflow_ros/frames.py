"""TF -> 4x4 motions at a stamp. Interpolates, never extrapolates, and never answers with an identity it does not know.

The rules are those of tf2: linear translation, slerp rotation, static transforms hold at all times, a stamp outside
what was heard is an error. Poses are kept and joined by tf2's own core where it is installed, else here; `buffer`
chooses, and everything else is the same for both. No rclpy: transforms come in as matrices.

Where tf2 and a vehicle disagree, the vehicle is right:
- A frame whose stamps go back by more than a jump (a bag loops) begins anew, and `turned_back` drops what others said
  of the lap before; tf2's Python buffer keeps all of it for ever (ros2/geometry2 issue 606).
- Stamp 0 is a stamp; tf2 takes it for "whatever is newest".
- What a frame said first about a stamp holds; tf2 keeps both and interpolates with the first before that stamp and
  with the second after it, so that the car would jump.
- A frame that gets another parent begins anew; tf2 holds the pose of the old parent still until the new one spoke.
- A loop is an error wherever it lies; tf2 does not see one above the frame it was asked for.
"""

import bisect
import threading
import time

import torch
from torch import Tensor

from occflow_core.geometry import rigid
from occflow_core.types import NANO

KEEP = 10.0  # s of history, as tf2 keeps
JUMP = 1.0  # s back that mean a new lap


class TransformError(LookupError):
    """A transform that is not known; the text names both frames and what was heard."""

    may_come = False  # is it only that TF has not come so far yet?


class _Edge:
    """What is known of one frame, but for its poses; one frame has one parent."""

    def __init__(self, parent: str, static: bool):
        self.parent, self.static = parent, static
        self.stamps: list[int] = []  # ns, oldest first; of a static one only the latest

    def refusal(self, stamp: int, child: str) -> TransformError | None:
        """Why the pose at a stamp would be a guess; None where it would not."""
        if self.static or self.stamps[0] <= stamp <= self.stamps[-1]:
            return None
        older = stamp < self.stamps[0]
        side, known = ("oldest", self.stamps[0]) if older else ("newest", self.stamps[-1])
        error = TransformError(
            f"no transform {self.parent} <- {child} at {_seconds(stamp)} s ({side} is {_seconds(known)} s)"
        )
        error.may_come = not older
        return error


Climb = list[tuple[str, _Edge]]  # frames on the way up, each with its edge


class Poses:
    """parent_from_child of each frame over time. It is asked only for what `TransformBuffer` knows to be there."""

    source = "ourselves"

    def __init__(self):
        self._poses: dict[str, dict[int, Tensor]] = {}

    def begin(self, child: str) -> None:
        """A frame is new, or begins anew: nothing of it holds any longer."""
        self._poses[child] = {}

    def put(self, parent: str, child: str, stamp: int, parent_from_child: Tensor, static: bool) -> None:
        if static:
            self._poses[child].clear()
        self._poses[child][stamp] = parent_from_child

    def drop(self, child: str, stamps: list[int]) -> None:
        for stamp in stamps:
            del self._poses[child][stamp]

    def at(self, target: str, source: str, stamp: int, up: tuple[Climb, Climb]) -> Tensor:
        """target_from_source; up: the edges from target and from source to the frame above both."""
        common_from_target, common_from_source = (self._climb(climb, stamp) for climb in up)
        return rigid.inverse(common_from_target) @ common_from_source

    def _climb(self, climb: Climb, stamp: int) -> Tensor:
        ancestor_from_frame = torch.eye(4, dtype=torch.float64)
        for child, edge in climb:
            ancestor_from_frame = self._parent_from(child, edge, stamp) @ ancestor_from_frame
        return ancestor_from_frame

    def _parent_from(self, child: str, edge: _Edge, stamp: int) -> Tensor:
        poses = self._poses[child]
        if edge.static:
            return poses[edge.stamps[0]]
        if stamp in poses:
            return poses[stamp]
        i = bisect.bisect_left(edge.stamps, stamp)
        before, after = edge.stamps[i - 1], edge.stamps[i]
        return rigid.interpolate(poses[before], poses[after], (stamp - before) / (after - before))


class DistributionPoses:
    """The same by the core of tf2 (`tf2_py`), which `tf2_ros.Buffer` stands on.

    Not by that buffer: without a node it listens to a clock of its own, and its lookups sleep in steps of 20 ms.
    """

    source = "tf2"

    def __init__(self, keep: float):  # s
        import tf2_py
        from builtin_interfaces.msg import Duration, Time
        from geometry_msgs.msg import TransformStamped

        seconds, rest = divmod(round(keep * NANO), NANO)
        # a second more than the book, which says what is old: tf2 tidies up only when the next transform comes
        self._core = tf2_py.BufferCore(Duration(sec=seconds + 1, nanosec=rest))
        self._problem, self._time, self._kind = tf2_py.TransformException, Time, TransformStamped

    def begin(self, child: str) -> None:
        # tf2 cannot forget one frame; but one that turns static and back loses its history
        self._put("-", child, 0, ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0)), True)

    def put(self, parent: str, child: str, stamp: int, parent_from_child: Tensor, static: bool) -> None:
        self._put(parent, child, stamp, rigid.to_quaternion(parent_from_child), static)

    def _put(self, parent: str, child: str, stamp: int, pose: tuple, static: bool) -> None:
        message = self._kind()
        message.header.frame_id, message.child_frame_id = parent, child
        message.header.stamp = self._stamp(stamp)
        q, t = message.transform.rotation, message.transform.translation
        (q.w, q.x, q.y, q.z), (t.x, t.y, t.z) = pose
        (self._core.set_transform_static if static else self._core.set_transform)(message, "occflow")

    def drop(self, child: str, stamps: list[int]) -> None:
        """tf2 does it by itself."""

    def at(self, target: str, source: str, stamp: int, up: tuple[Climb, Climb]) -> Tensor:
        try:
            found = self._core.lookup_transform_core(target, source, self._stamp(stamp)).transform
        except self._problem as problem:
            raise TransformError(f"tf2: {problem}") from None
        q, t = found.rotation, found.translation
        return rigid.from_quaternion((q.w, q.x, q.y, q.z), (t.x, t.y, t.z))

    def _stamp(self, stamp: int):
        return self._time(sec=stamp // NANO, nanosec=stamp % NANO)


def buffer(keep: float = KEEP, jump: float = JUMP) -> "TransformBuffer":
    """A TransformBuffer whose poses are kept by tf2 where the distribution brings it, else by ourselves."""
    try:
        return TransformBuffer(keep, jump, DistributionPoses(keep))
    except ImportError:
        return TransformBuffer(keep, jump)


class TransformBuffer:
    """What TF has said lately. Thread-safe: callbacks add, the worker looks up."""

    def __init__(self, keep: float = KEEP, jump: float = JUMP, poses: Poses | DistributionPoses | None = None):
        self.keep, self.jump = round(keep * NANO), round(jump * NANO)
        self._edges: dict[str, _Edge] = {}
        self._poses = Poses() if poses is None else poses
        self._condition = threading.Condition()

    @property
    def source(self) -> str:
        """Who keeps the poses: tf2 or ourselves."""
        return self._poses.source

    def add(self, parent: str, child: str, stamp: int, parent_from_child: Tensor, static: bool) -> None:
        """Takes one transform (stamp ns). ValueError when frames are empty or equal, or a moving one has no stamp."""
        parent, child = parent.lstrip("/"), child.lstrip("/")
        if not parent or not child or parent == child:
            raise ValueError(f"a transform needs two different frames, got {parent!r} <- {child!r}")
        if not static and stamp <= 0:
            raise ValueError(f"transform {parent} <- {child} has no stamp, expected one on /tf")
        with self._condition:
            edge = self._edges.get(child)
            # a frame that goes back behind itself begins anew, alone: one that is late says nothing of the others
            if edge is not None and not edge.static and stamp < edge.stamps[-1] - self.jump:
                edge = None
            if edge is None or edge.parent != parent or edge.static != static:
                edge = self._edges[child] = _Edge(parent, static)
                self._poses.begin(child)
            if static:
                edge.stamps = [stamp]
                self._poses.put(parent, child, stamp, parent_from_child, True)
            elif self._new(edge, stamp):
                bisect.insort(edge.stamps, stamp)
                self._poses.put(parent, child, stamp, parent_from_child, False)
                old = bisect.bisect_left(edge.stamps, edge.stamps[-1] - self.keep)
                self._poses.drop(child, edge.stamps[:old])
                del edge.stamps[:old]
            self._condition.notify_all()

    def _new(self, edge: _Edge, stamp: int) -> bool:
        """Does a stamp say what is neither too old nor known? What was looked up once is not changed behind it."""
        i = bisect.bisect_left(edge.stamps, stamp)
        known = i < len(edge.stamps) and edge.stamps[i] == stamp
        return not known and (not edge.stamps or stamp >= edge.stamps[-1] - self.keep)

    def turned_back(self, stamp: int) -> None:
        """Time goes on from a stamp, ns, that was before: what was said of later times is of the lap before."""
        with self._condition:
            self._edges = {
                child: edge
                for child, edge in self._edges.items()
                if edge.static or edge.stamps[-1] <= stamp + self.jump
            }

    def lookup(self, target: str, source: str, stamp: int) -> Tensor:
        """target_from_source (4, 4) float64 at a stamp in ns. TransformError when it is not known there."""
        with self._condition:
            return self._lookup(target.lstrip("/"), source.lstrip("/"), stamp)

    def wait(self, target: str, source: str, stamp: int, timeout: float) -> Tensor:
        """`lookup`, given up to `timeout` s (steady clock) for TF to come as far as the stamp.

        What waiting cannot mend is said at once: frames nobody has named, stamps older than what is kept.
        """
        until = time.monotonic() + timeout
        with self._condition:
            while True:
                try:
                    return self._lookup(target.lstrip("/"), source.lstrip("/"), stamp)
                except TransformError as error:
                    left = until - time.monotonic()
                    if left <= 0 or not error.may_come:
                        raise
                    self._condition.wait(left)

    def joined(self, target: str, source: str) -> bool:
        """Does TF know both frames and what lies between them, at whatever time?"""
        with self._condition:
            try:
                return self._ancestors(target.lstrip("/"))[-1] == self._ancestors(source.lstrip("/"))[-1]
            except TransformError:
                return False

    def newest(self, target: str, source: str) -> int | None:
        """The newest stamp, ns, for which `target` <- `source` is known; None where it never is, or always."""
        with self._condition:
            try:
                up_target, up_source = self._ancestors(target.lstrip("/")), self._ancestors(source.lstrip("/"))
            except TransformError:
                return None
            if up_target[-1] != up_source[-1]:
                return None
            between = [self._edges[frame] for frame in {*up_target} ^ {*up_source}]  # what both hang under is not
            return min((edge.stamps[-1] for edge in between if not edge.static), default=None)

    def _lookup(self, target: str, source: str, stamp: int) -> Tensor:
        up_target, up_source = self._ancestors(target), self._ancestors(source)
        common = next((frame for frame in up_source if frame in up_target), None)
        if common is None:
            known = sorted({*self._edges, *(edge.parent for edge in self._edges.values())})
            for frame in (target, source):
                if frame not in known:
                    raise TransformError(
                        f"no transform {target} <- {source} at {_seconds(stamp)} s: TF has not named {frame} "
                        f"(heard of: {', '.join(known) or 'nothing at all'})"
                    )
            raise TransformError(
                f"no transform {target} <- {source} at {_seconds(stamp)} s: {target} hangs under {up_target[-1]}, "
                f"{source} under {up_source[-1]}, and nothing joins the two"
            )
        up = (self._climb(target, common), self._climb(source, common))
        refusals = [edge.refusal(stamp, child) for child, edge in (*up[1], *up[0])]
        refusals = sorted(filter(None, refusals), key=lambda error: error.may_come)  # first what waiting cannot mend
        try:
            if refusals:
                raise refusals[0]
            return self._poses.at(target, source, stamp, up)
        except TransformError as error:
            whole = TransformError(f"{target} <- {source}: {error}")
            whole.may_come = error.may_come
            raise whole from None

    def _ancestors(self, frame: str) -> list[str]:
        line = [frame]
        while (edge := self._edges.get(line[-1])) is not None:
            if edge.parent in line:
                raise TransformError(f"TF has a loop: {' <- '.join([*reversed(line), edge.parent])}")
            line.append(edge.parent)
        return line

    def _climb(self, frame: str, ancestor: str) -> Climb:
        climb = []
        while frame != ancestor:
            climb.append((frame, self._edges[frame]))
            frame = climb[-1][1].parent
        return climb


def _seconds(stamp: int) -> str:
    return f"{stamp // NANO}.{stamp % NANO // 1_000_000:03d}"
