"""TF -> 4x4 motions at a stamp. Interpolates, never extrapolates, and never answers with an identity it does not know.

The rules are those of tf2: linear translation, slerp rotation, static transforms hold at all times, a stamp outside
what was heard is an error. No rclpy: transforms come in as matrices. One difference is meant: when stamps go back by
more than a jump (a bag loops), dynamic transforms of the lap before are dropped by the buffer itself; tf2's Python
buffer keeps them for ever (ros2/geometry2 issue 606).
"""

import bisect
import threading
import time

import torch
from torch import Tensor

from occflow_core.geometry import rigid
from occflow_core.types import NANO


class TransformError(LookupError):
    """A transform that is not known; the text names both frames and what was heard."""

    may_come = False  # is it only that TF has not come so far yet?


class _Edge:
    """parent_from_child over time; one frame has one parent."""

    def __init__(self, parent: str, static: bool):
        self.parent, self.static = parent, static
        self.stamps: list[int] = []
        self.poses: list[Tensor] = []

    def at(self, stamp: int, child: str) -> Tensor:
        if self.static:
            return self.poses[-1]
        i = bisect.bisect_left(self.stamps, stamp)
        if i < len(self.stamps) and self.stamps[i] == stamp:
            return self.poses[i]
        if i == 0 or i == len(self.stamps):
            side, known = ("oldest", self.stamps[0]) if i == 0 else ("newest", self.stamps[-1])
            error = TransformError(
                f"no transform {self.parent} <- {child} at {_seconds(stamp)} s ({side} is {_seconds(known)} s)"
            )
            error.may_come = i != 0
            raise error
        before, after = self.stamps[i - 1], self.stamps[i]
        return rigid.interpolate(self.poses[i - 1], self.poses[i], (stamp - before) / (after - before))


class TransformBuffer:
    """What TF has said lately. Thread-safe: callbacks add, the worker looks up."""

    def __init__(self, keep: float = 10.0, jump: float = 1.0):  # s of history; s back that mean a new lap
        self.keep, self.jump = round(keep * NANO), round(jump * NANO)
        self._edges: dict[str, _Edge] = {}
        self._condition = threading.Condition()

    def add(self, parent: str, child: str, stamp: int, parent_from_child: Tensor, static: bool) -> None:
        """Takes one transform (stamp ns). ValueError when frames are empty or equal, or a moving one has no stamp."""
        parent, child = parent.lstrip("/"), child.lstrip("/")
        if not parent or not child or parent == child:
            raise ValueError(f"a transform needs two different frames, got {parent!r} <- {child!r}")
        if not static and stamp <= 0:
            raise ValueError(f"transform {parent} <- {child} has no stamp, expected one on /tf")
        with self._condition:
            edge = self._edges.get(child)
            # a lap is over when a transform goes back behind itself; that others lag behind it says nothing
            if edge is not None and not edge.static and stamp < edge.stamps[-1] - self.jump:
                self._edges = {name: other for name, other in self._edges.items() if other.static}
                edge = None
            if edge is None or edge.parent != parent or edge.static != static:
                edge = self._edges[child] = _Edge(parent, static)
            if static:
                edge.stamps, edge.poses = [stamp], [parent_from_child]
            else:
                i = bisect.bisect_left(edge.stamps, stamp)
                if i < len(edge.stamps) and edge.stamps[i] == stamp:
                    edge.poses[i] = parent_from_child
                else:
                    edge.stamps.insert(i, stamp)
                    edge.poses.insert(i, parent_from_child)
                old = bisect.bisect_left(edge.stamps, edge.stamps[-1] - self.keep)
                del edge.stamps[:old], edge.poses[:old]
            self._condition.notify_all()

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
        try:
            common_from_source = self._climb(source, common, stamp)
            return rigid.inverse(self._climb(target, common, stamp)) @ common_from_source
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

    def _climb(self, frame: str, ancestor: str, stamp: int) -> Tensor:
        ancestor_from_frame = torch.eye(4, dtype=torch.float64)
        while frame != ancestor:
            edge = self._edges[frame]
            ancestor_from_frame = edge.at(stamp, frame) @ ancestor_from_frame
            frame = edge.parent
        return ancestor_from_frame


def _seconds(stamp: int) -> str:
    return f"{stamp // NANO}.{stamp % NANO // 1_000_000:03d}"
