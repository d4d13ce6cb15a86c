"""A rosbag2 into the ROS graph: its messages with their recorded QoS, and /clock, at a chosen speed.

What `ros2 bag play --clock` does, for machines that have rclpy and no rosbag2. Messages are published as the bytes
that were recorded; nothing is decoded.
"""

import argparse
import importlib
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rclpy
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosReliability
from rosbags.rosbag2 import Reader, ReaderError
from rosgraph_msgs.msg import Clock

NANO = 1_000_000_000
TICK = 0.01  # s of wall time between two /clock messages; each wakes every node that lives by it
LEAD = 1.0  # s of wall time in which the clock runs before the first message and after the last
ANSWER = "occflow_msgs/msg/VoxelFlow"
IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")


class Refused(Exception):
    """A mistake of the user's; the text says which."""


def main(args: list[str] | None = None) -> int:
    """python -m occflow_ros.replay BAG [--rate 1.0] [--loop 1] [--wait 10] [--skip TOPIC ...] [--answers TOPIC]

    The exit code: 0, or 2 after a mistake that was named in one sentence.
    """
    args = sys.argv if args is None else ["replay", *args]
    options = _options(remove_ros_args(args)[1:])
    # a launch system's stop is an ordinary stop; SIGINT too is set, since shells start background jobs deaf to it
    for word in (signal.SIGINT, signal.SIGTERM):
        signal.signal(word, signal.default_int_handler)
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    node = None
    try:
        with _opened(options.bag) as reader:
            node = rclpy.create_node("replay")
            Replay(node, reader, options).run()
    except Refused as refused:
        print(f"replay: {refused}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nreplay: stopped", flush=True)
    finally:
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


class Replay:
    """One run through a bag, or several laps."""

    def __init__(self, node: Node, reader: Reader, options: argparse.Namespace):
        self.node, self.reader, self.rate, self.laps = node, reader, options.rate, options.loop
        self.wait, self.patience = options.wait, options.patience
        there = {c.topic for c in reader.connections}
        strangers = sorted(set(options.skip) - there)
        if strangers:
            raise Refused(f"no topic {', '.join(strangers)} to skip; {options.bag} has {', '.join(sorted(there))}")
        self.publishers: dict[int, Any] = {}  # by connection
        self.images, self.asked = [], {}  # topic of images -> stamp of the one that nobody has answered yet
        for connection in reader.connections:
            if connection.topic in options.skip or connection.topic == "/clock":
                continue
            kind = _type(connection.msgtype)
            if kind is None:
                print(f"replay: {connection.topic} is left out: {connection.msgtype} is not installed", file=sys.stderr)
                continue
            publisher = node.create_publisher(kind, connection.topic, _profile(connection.ext.offered_qos_profiles))
            self.publishers[connection.id] = publisher
            if connection.msgtype in IMAGES:
                self.images.append(publisher)
        if not self.publishers:
            raise Refused(f"{options.bag}: nothing is left to publish")
        self.clock = node.create_publisher(Clock, "/clock", QoSProfile(depth=10))
        self.answered = -1  # stamp (ns) of the newest answer
        self.answers = options.answers
        if self.answers:
            kind = _type(ANSWER)
            if kind is None:
                raise Refused(f"{options.answers} cannot be listened to: occflow_msgs is not installed")
            node.create_subscription(kind, self.answers, self._on_answer, QoSProfile(depth=10), raw=True)
        self.sent, self.worst, self.shown = 0, 0.0, 0.0

    def run(self) -> None:
        """All laps, and the lead before and after."""
        begin, end = self.reader.start_time, self.reader.end_time
        lead = round(LEAD * self.rate * NANO)
        self._subscribers(begin - lead)
        lap = 0
        while self.laps == 0 or lap < self.laps:
            lap += 1
            self.started, self.next_tick, self.first = time.monotonic(), 0.0, begin - lead
            for connection, stamp, data in self._messages():
                self.worst = max(self.worst, self._until(stamp))
                if self.answers and connection.msgtype in IMAGES:
                    self._hold(connection.topic, header_stamp(data))
                self.publishers[connection.id].publish(bytes(data))
                self.sent += 1
                self._show((stamp - begin) / NANO, (end - begin) / NANO, lap)
            self._until(end + lead)
            self._await_answer()
        for publisher in self.publishers.values():  # what is reliable is received before the process ends
            publisher.wait_for_all_acked(Duration(seconds=2))
        self._show((end - begin) / NANO, (end - begin) / NANO, lap, last=True)

    def _until(self, stamp: int) -> float:
        """Keeps the clock ticking until the stamp is due; returns how late it is then, in s. Steady time, so that
        a correction of the computer's clock does not disturb the pace."""
        due = self.started + (stamp - self.first) / NANO / self.rate
        while True:
            now = time.monotonic()
            if now >= self.next_tick:
                self._tick(self.first + round((now - self.started) * self.rate * NANO))
                self.next_tick = max(self.next_tick + TICK, now)
            if now >= due:
                return now - due
            time.sleep(max(0.0, min(due, self.next_tick) - now))

    def _hold(self, topic: str, stamp: int) -> None:
        """Before an image of the next set: the clock stands until somebody has answered the last one.

        A topic whose image is still unanswered begins a new set; what comes between two sets (transforms) flows on.
        """
        if topic in self.asked:
            self._await_answer()
        self.asked[topic] = stamp

    def _await_answer(self) -> None:
        """Until an answer is as new as the oldest image of the set, but not for ever."""
        begin, wanted = time.monotonic(), min(self.asked.values(), default=-1)
        while self.answers and self.answered < wanted:
            waited = time.monotonic() - begin
            if waited > self.patience:
                print(f"replay: no answer on {self.answers} within {self.patience:g} s, going on", file=sys.stderr)
                break
            rclpy.spin_once(self.node, timeout_sec=TICK)
        self.asked.clear()
        self.started += time.monotonic() - begin  # for the clock that time was none

    def _on_answer(self, raw: bytes) -> None:
        self.answered = max(self.answered, header_stamp(raw))

    def _messages(self) -> Iterator[tuple[Any, int, bytes]]:
        chosen = [c for c in self.reader.connections if c.id in self.publishers]
        try:
            yield from self.reader.messages(chosen)
        except ReaderError as error:
            raise Refused(f"{self.reader.path}: not a whole bag: {error}") from None

    def _subscribers(self, stamp: int) -> None:
        """Waits until every image topic has a subscriber, for a bounded time; the clock stands meanwhile."""
        until = time.monotonic() + self.wait
        while time.monotonic() < until and self._unheard():
            self._tick(stamp)
            time.sleep(TICK)
        if self.wait > 0 and (unheard := self._unheard()):
            print(f"replay: nobody listens to {', '.join(unheard)}; starting all the same", file=sys.stderr)

    def _unheard(self) -> list[str]:
        return [p.topic_name for p in self.images if p.get_subscription_count() == 0]

    def _tick(self, stamp: int) -> None:
        clock = Clock()
        clock.clock.sec, clock.clock.nanosec = divmod(max(stamp, 0), NANO)
        self.clock.publish(clock)

    def _show(self, at: float, whole: float, lap: int, last: bool = False) -> None:
        now = time.monotonic()
        if not last and (not sys.stdout.isatty() or now - self.shown < 0.2):
            return
        self.shown = now
        laps = f", lap {lap} of {self.laps or 'many'}" if self.laps != 1 else ""
        line = f"replay: {at:.1f} of {whole:.1f} s{laps}, {self.sent} messages, at most {self.worst * 1e3:.0f} ms late"
        print(f"\r{line}" if sys.stdout.isatty() else line, end="\n" if last else "", flush=True)


def header_stamp(raw: bytes) -> int:
    """Stamp (ns) of a serialised message that begins with a header: 4 bytes of CDR, then seconds and nanoseconds."""
    seconds, nanoseconds = struct.unpack_from("<iI" if raw[1] & 1 else ">iI", raw, 4)
    return seconds * NANO + nanoseconds


def _options(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="replay", description="A rosbag2 into the ROS graph, with /clock.")
    parser.add_argument("bag", type=Path, help="folder of the bag, or its .mcap or .db3 file")
    parser.add_argument("--rate", type=_above(0.0, float), default=1.0, help="speed; 2 = twice as fast as recorded")
    parser.add_argument("--loop", type=_above(-1, int), default=1, metavar="N", help="laps; 0 = for ever")
    parser.add_argument(
        "--wait", type=_above(-1e-9, float), default=10.0, metavar="S",
        help="longest wait, in s, until every image topic has a subscriber; 0 = start at once",
    )  # fmt: skip
    parser.add_argument("--skip", action="extend", nargs="+", default=[], metavar="TOPIC", help="topics to leave out")
    parser.add_argument(
        "--answers", metavar="TOPIC",
        help="of occflow_msgs/VoxelFlow: the clock stands before each set of images until the last one was answered "
        "there, so that nothing is skipped however slow the machine is",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=_above(0.0, float), default=30.0, metavar="S", help="longest wait, in s, for an answer"
    )
    return parser.parse_args(args)


def _above(low: float, kind: type) -> Callable[[str], Any]:
    def parse(text: str):
        value = kind(text)
        if not low < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above {low}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _opened(path: Path) -> Reader:
    if not path.exists():
        raise Refused(f"{path}: no such bag")
    try:
        reader = Reader(path)
        with reader:
            if not reader.message_count:
                raise Refused(f"{path}: the bag is empty")
    except (ReaderError, OSError, IndexError, TypeError) as error:
        raise Refused(f"{path}: not a whole bag: {error}") from None
    return reader


def _type(name: str) -> type | None:
    """ "sensor_msgs/msg/Image" -> its class, None where the package is not installed."""
    package, _, kind = name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), kind, None)
    except ModuleNotFoundError:
        return None


def _profile(recorded: list[Qos]) -> QoSProfile:
    """The recorded QoS; where a recorder noted none, reliable, volatile, keep last 10.

    rosbag2 itself notes history UNKNOWN and depth 0: DDS does not tell a subscriber how deep a publisher keeps.
    """
    qos = recorded[0] if recorded else None
    if qos is None:
        return QoSProfile(depth=10)
    keep_all = qos.history == QosHistory.KEEP_ALL
    return QoSProfile(
        history=HistoryPolicy.KEEP_ALL if keep_all else HistoryPolicy.KEEP_LAST,
        depth=qos.depth if qos.history == QosHistory.KEEP_LAST and qos.depth > 0 else 10,
        reliability=ReliabilityPolicy.BEST_EFFORT
        if qos.reliability == QosReliability.BEST_EFFORT
        else ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL
        if qos.durability == QosDurability.TRANSIENT_LOCAL
        else DurabilityPolicy.VOLATILE,
    )


if __name__ == "__main__":
    sys.exit(main())
