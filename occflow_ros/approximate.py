"""Complete sets of images only, by the rule of `message_filters.ApproximateTimeSynchronizer`, for those who want it.

Each camera has a queue. With each image, the images of the other cameras that are near it are tried, the nearest first;
the first choice of one for each camera that spans less than the slop is a set. There is no deadline: while one camera
is silent there is no set. Where the distribution brings message_filters its class does it, else ours; `matcher`
chooses. What is laid around either: its queues are cleared when the clock is turned back (message_filters keeps the
stamps of the lap before, and drops new ones for them), images that are pushed out are counted, each camera has an
offset, the same stamp twice is not a new image, and sets go forward.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from occflow_core.types import NANO

from . import convert
from .assemble import Gatherer, ImageSet


class Matcher:
    """The queues, and the rule of `ApproximateTimeSynchronizer.add` (ros2/message_filters 4.11, Python).

    The same sets in the same order; a choice that is already too wide is not tried to its end, where message_filters
    tries all, up to queue ** (cameras - 1).
    """

    source = "ourselves"

    def __init__(self, cameras: int, queue: int, slop: float):  # images a camera; s
        self.queue, self.slop = queue, int(slop * NANO)
        self.queues: list[dict[int, Any]] = [{} for _ in range(cameras)]  # reference, ns -> image

    def add(self, camera: int, reference: int, image: Any) -> list[Any] | None:
        """Takes an image; gives one of each camera, in camera order, where that completes a set."""
        own = self.queues[camera]
        own[reference] = image
        while len(own) > self.queue:
            del own[min(own)]
        if reference not in own:  # older than all that wait
            return None
        near = [[reference]]
        for queue in (q for i, q in enumerate(self.queues) if i != camera):
            near.append(sorted((t for t in queue if abs(t - reference) <= self.slop), key=lambda t: abs(t - reference)))
        chosen = self._choose(near, reference, reference, set())
        if chosen is None:
            return None
        _, *others = chosen
        others.insert(camera, reference)
        return [queue.pop(t) for queue, t in zip(self.queues, others, strict=True)]

    def _choose(self, near: list[list[int]], low: int, high: int, dead: set) -> list[int] | None:
        """The first choice of one of each list that spans less than the slop together with `low` and `high`."""
        if not near:
            return []
        if (len(near), low, high) in dead:
            return None
        for t in near[0]:
            least, most = min(low, t), max(high, t)
            # less, not at most: a set that is exactly as wide as the slop is none
            if most - least < self.slop and (rest := self._choose(near[1:], least, most, dead)) is not None:
                return [t, *rest]
        dead.add((len(near), low, high))
        return None


class DistributionMatcher:
    """The same by message_filters."""

    source = "message_filters"

    def __init__(self, cameras: int, queue: int, slop: float):
        from message_filters import ApproximateTimeSynchronizer, SimpleFilter

        self._inputs = [SimpleFilter() for _ in range(cameras)]
        self._synchronizer = ApproximateTimeSynchronizer(self._inputs, queue, slop)
        self._synchronizer.registerCallback(self._take)
        self.queues: list[dict[int, Any]] = self._synchronizer.queues
        self._found: list[Any] | None = None

    def add(self, camera: int, reference: int, image: Any) -> list[Any] | None:
        self._found = None
        header = SimpleNamespace(stamp=convert.time_message(reference))
        self._inputs[camera].signalMessage(SimpleNamespace(header=header, image=image))
        return self._found

    def _take(self, *messages: SimpleNamespace) -> None:
        # under its lock, which an exception would leave closed: nothing here may fail
        self._found = [message.image for message in messages]


def matcher() -> type[Matcher] | type[DistributionMatcher]:
    """message_filters' where the distribution brings it, else our own."""
    try:
        import message_filters  # noqa: F401
    except ImportError:
        return Matcher
    return DistributionMatcher


class Approximate(Gatherer):
    """Complete sets only, each narrower than the slop; images come and sets leave as with the `Collector`."""

    def __init__(
        self,
        cameras: int,
        queue: int = 10,  # images of each camera that wait
        slop: float = 0.05,  # s: the references of a set differ by less
        offsets: Sequence[float] | None = None,
        jump: float = 1.0,
    ):
        super().__init__(cameras, offsets, jump)
        if queue < 1 or slop <= 0:
            raise ValueError(f"sets need a queue of at least 1 image (got {queue}) and a slop > 0 s (got {slop})")
        self._matcher = matcher()(cameras, queue, slop)

    def _place(self, camera: int, reference: int, stamp: int, picture: Any, now: float, clock: float) -> list[ImageSet]:
        queue = self._matcher.queues[camera]
        if reference in queue:
            return self._drop(camera, "same stamp again")
        waited = len(queue) + 1
        found = self._matcher.add(camera, reference, (stamp, picture))
        if pushed_out := waited - len(queue) - (found is not None):
            self.dropped[camera, "queue full"] += pushed_out
        if found is None:
            return []
        stamps, pictures = zip(*found, strict=True)
        return self._give(dict(enumerate(pictures)), dict(enumerate(stamps)))

    def _forget(self) -> list[int]:
        cameras = [camera for camera, queue in enumerate(self._matcher.queues) for _ in queue]
        for queue in self._matcher.queues:
            queue.clear()
        return cameras
