"""A bag replayed into the graph arrives whole, in order and in time, in another process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2: make setup")

from occflow_core.data import bag as bags  # noqa: E402
from occflow_core.data import pattern  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DOMAIN = str(41 + os.getpid() % 20)  # of this process alone, so that parallel runs do not hear each other
FRAMES, RATE = 6, 12.0

LISTENER = """
import hashlib, json, sys, time
import rclpy
from rclpy.qos import QoSProfile, DurabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage
from tf2_msgs.msg import TFMessage
KINDS = {"image": CompressedImage, "info": CameraInfo, "tf": TFMessage}
topics, enough, longest = json.loads(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
rclpy.init()
node = rclpy.create_node("listener")
got, clock = [], []
def hear(topic):
    # what RTPS adds to the recorded bytes: padding at the end, and its length in the four bytes of the encapsulation
    return lambda data: got.append([topic, hashlib.sha256(data[4:].rstrip(b"\\0")).hexdigest(), time.monotonic()])
for topic, kind in topics.items():
    if topic == "/tf_static":
        continue
    node.create_subscription(KINDS[kind], topic, hear(topic), QoSProfile(depth=200), raw=True)
def tick(m):
    clock.append([time.monotonic(), m.clock.sec * 10**9 + m.clock.nanosec])
node.create_subscription(Clock, "/clock", tick, QoSProfile(depth=10))
print("ready", flush=True)
until, heard, late = time.monotonic() + longest, [0, time.monotonic()], False
# until all has come and nothing more does: /clock runs on
while time.monotonic() < until and (len(got) < enough or time.monotonic() < heard[1] + 0.7):
    rclpy.spin_once(node, timeout_sec=0.05)
    if len(got) + len(clock) > heard[0]:
        heard = [len(got) + len(clock), time.monotonic()]
    if not late and len(got) > 20 and "/tf_static" in topics:  # a latched topic is heard by who comes late
        late = True
        node.create_subscription(TFMessage, "/tf_static", hear("/tf_static"),
                                 QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL), raw=True)
print(json.dumps({"got": got, "clock": clock}), flush=True)
rclpy.shutdown()
"""


def environment() -> dict:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "ROS_DOMAIN_ID": DOMAIN, "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "PYTHONPATH": path}


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def replay(*arguments) -> subprocess.Popen:
    return start("-m", "occflow_ros.replay", *map(str, arguments))


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("replay") / "drive"
    bags.write_bag(folder, pattern.drive(FRAMES, height=90, width=160, rate=RATE), pattern.rig(90, 160), progress=False)
    return folder


def recorded(folder: Path, skip=()) -> list[tuple[str, int, str]]:
    """(topic, ns, hash of the bytes) as the file has them, read apart from the code under test."""
    import hashlib

    from rosbags.rosbag2 import Reader

    with Reader(folder) as reader:
        return [
            (c.topic, t, hashlib.sha256(data[4:].rstrip(b"\0")).hexdigest())
            for c, t, data in reader.messages()
            if c.topic not in skip
        ]


def listen_while(folder: Path, *options, laps: int = 1, skip=()) -> tuple[dict, subprocess.CompletedProcess]:
    kinds = {"CompressedImage": "image", "CameraInfo": "info", "TFMessage": "tf"}
    topics = {t: kinds[k.split("/")[-1]] for t, k in bags.topics_of(folder).items() if t not in skip}
    enough = len(recorded(folder, skip)) + (laps - 1) * len(recorded(folder, (*skip, "/tf_static")))
    listener = start("-c", LISTENER, json.dumps(topics), str(enough), "60")
    player = None
    try:
        assert listener.stdout.readline().strip() == "ready", listener.stderr.read()
        player = replay(folder, *options)
        said, wrong = player.communicate(timeout=90)
        heard, errors = listener.communicate(timeout=90)
    finally:
        for process in (listener, player):
            if process is not None and process.poll() is None:
                process.kill()
    assert player.returncode == 0, wrong
    assert listener.returncode == 0, errors
    return json.loads(heard), subprocess.CompletedProcess(player.args, 0, said, wrong)


@pytest.mark.dds
def test_everything_arrives_byte_for_byte_in_order_and_in_time(bag):
    heard, player = listen_while(bag)
    mine = recorded(bag)
    for topic in {topic for topic, _, _ in mine}:
        want = [digest for t, _, digest in mine if t == topic]
        assert [digest for t, digest, _ in heard["got"] if t == topic] == want, topic
    # pictures came at the recorded pace: counted from one that was not late itself, the last took as long as recorded
    topic = "/cam_front/image_raw/compressed"
    stamps = [stamp for t, stamp, _ in mine if t == topic]
    times = [at for t, _, at in heard["got"] if t == topic]
    paces = [(stamps[-1] - stamp) / 1e9 / (times[-1] - at) for stamp, at in zip(stamps[:-1], times[:-1])]
    assert min(paces) < 1.25  # not faster; slower is the machine's matter
    assert f"{len(mine)} messages" in player.stdout and player.stderr == ""


@pytest.mark.dds
def test_the_clock_runs_before_during_and_after_at_the_chosen_rate(bag):
    heard, _ = listen_while(bag, "--rate", "0.5")
    mine = recorded(bag)
    walls, stamps = zip(*heard["clock"])
    assert stamps[0] < mine[0][1] - 0.1e9 and stamps[-1] > mine[-1][1] + 0.1e9, "0.25 s of the bag before and after"
    assert all(b >= a for a, b in zip(stamps, stamps[1:]))
    running = [(w, s) for w, s in zip(walls, stamps) if s > stamps[0]]
    (w0, s0), (w1, s1) = running[0], running[-1]
    assert (s1 - s0) / 1e9 / (w1 - w0) == pytest.approx(0.5, rel=0.3)


def test_a_history_that_the_recorder_could_not_know_becomes_ten_messages():

    from rosbags.interfaces import QosHistory

    from occflow_core.data.bag import _qos
    from occflow_ros.replay import _profile

    known = _qos(False, 7)
    assert _profile([known]).depth == 7
    assert _profile([known._replace(history=QosHistory.UNKNOWN, depth=0)]).depth == 10
    assert _profile([]).depth == 10


def test_publishers_offer_what_was_recorded(bag):
    from rclpy.qos import DurabilityPolicy, HistoryPolicy, ReliabilityPolicy
    from rosbags.rosbag2 import Reader

    from occflow_ros.replay import _profile

    with Reader(bag) as reader:
        profiles = {c.topic: _profile(c.ext.offered_qos_profiles) for c in reader.connections}
    assert profiles["/tf"].depth == 100 and profiles["/tf"].durability == DurabilityPolicy.VOLATILE
    assert profiles["/tf_static"].durability == DurabilityPolicy.TRANSIENT_LOCAL
    assert all(p.reliability == ReliabilityPolicy.RELIABLE for p in profiles.values())
    assert all(p.history == HistoryPolicy.KEEP_LAST for p in profiles.values())


@pytest.mark.dds
def test_laps_repeat_the_bag_and_a_skipped_topic_stays_silent(bag):
    silent = "/cam_back/image_raw/compressed"
    heard, player = listen_while(bag, "--loop", "2", "--rate", "2", "--skip", silent, laps=2, skip=(silent,))
    mine = [t for t, _, _ in recorded(bag, (silent,))]
    got = [t for t, _, _ in heard["got"]]
    assert silent not in got
    for topic in set(mine) - {"/tf_static"}:
        assert got.count(topic) == 2 * mine.count(topic), topic
    stamps = [s for _, s in heard["clock"]]
    assert sum(b < a for a, b in zip(stamps, stamps[1:])) == 1, "the clock goes back once, between the laps"
    assert "lap 2 of 2" in player.stdout


@pytest.mark.dds
@pytest.mark.parametrize("with_what", [signal.SIGINT, signal.SIGTERM])
def test_it_is_stopped_by_a_signal_without_a_fuss(bag, with_what, monkeypatch):
    from rclpy.executors import SingleThreadedExecutor
    from rosgraph_msgs.msg import Clock

    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context, clock = rclpy.Context(), []
    rclpy.init(context=context, domain_id=int(DOMAIN))
    executor = SingleThreadedExecutor(context=context)
    node = rclpy.create_node("waits", context=context)
    node.create_subscription(Clock, "/clock", clock.append, 10)
    executor.add_node(node)
    player = replay(bag, "--loop", "0", "--wait", "0")
    try:
        end = time.monotonic() + 60
        while not clock and player.poll() is None and time.monotonic() < end:  # before it plays, a signal ends Python
            executor.spin_once(timeout_sec=0.1)
        assert player.poll() is None, player.stderr.read()
        assert clock, "nothing on /clock"
        player.send_signal(with_what)
        said, wrong = player.communicate(timeout=30)
    finally:
        player.kill()
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown(context=context)
    assert player.returncode == 0 and wrong == "" and "stopped" in said


@pytest.mark.dds
def test_the_wait_for_subscribers_is_bounded_and_says_who_is_missing(bag):
    player = replay(bag, "--wait", "0.5", "--rate", "10")
    _, wrong = player.communicate(timeout=20)
    assert player.returncode == 0
    assert "nobody listens to" in wrong and "/cam_front/image_raw/compressed" in wrong and wrong.count("\n") == 1


ANSWERER = """
import sys, time
import rclpy
from occflow_msgs.msg import VoxelFlow
from sensor_msgs.msg import CompressedImage

rclpy.init()
node = rclpy.create_node("answerer")
answers = node.create_publisher(VoxelFlow, "/answers", 10)
heard = []

def on_image(image):
    heard.append(image.header.stamp)
    time.sleep(0.15)  # slower than the replay by far
    if len(heard) < int(sys.argv[1]):  # the last one stays without an answer
        answers.publish(VoxelFlow(header=image.header))
    print(len(heard), flush=True)

node.create_subscription(CompressedImage, "/cam_front/image_raw/compressed", on_image, 1)  # one at a time, or lost
for topic in sys.argv[2:]:  # the replay begins when all are listened to
    node.create_subscription(CompressedImage, topic, lambda image: None, 1)
print("ready", flush=True)
while len(heard) < int(sys.argv[1]):
    rclpy.spin_once(node, timeout_sec=0.1)
time.sleep(1.0)
"""


@pytest.mark.dds
def test_it_waits_for_answers_and_gives_up_where_none_comes(bag):
    pytest.importorskip("occflow_msgs.msg")
    others = [t for t in bags.topics_of(bag) if t.endswith("/compressed") and "/cam_front/" not in t]
    assert len(others) == 5
    answerer, player = start("-c", ANSWERER, str(FRAMES), *others), None
    try:
        assert answerer.stdout.readline().strip() == "ready", answerer.stderr.read()
        player = replay(bag, "--rate", "50", "--wait", "20", "--answers", "/answers", "--patience", "5")
        _, wrong = player.communicate(timeout=60)
        heard, errors = answerer.communicate(timeout=20)
    finally:
        for process in (answerer, player):
            if process is not None and process.poll() is None:
                process.kill()
    assert player.returncode == 0 and heard.split()[-1] == str(FRAMES), (heard, wrong, errors)
    assert wrong.count("no answer on /answers within 5 s") == 1  # the last


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "no such bag"),
        (lambda folder: folder.mkdir(), "not a whole bag"),
        (lambda folder: folder.write_text("nothing"), "not a whole bag"),
    ],
    ids=["absent", "half", "no bag at all"],
)
def test_a_bad_path_is_one_sentence_and_exit_code_2(tmp_path, make, says):
    make(tmp_path / "bag")
    player = replay(tmp_path / "bag")
    said, wrong = player.communicate(timeout=20)
    assert player.returncode == 2 and says in wrong and wrong.count("\n") == 1 and said == ""


def test_a_topic_to_skip_that_is_not_there_is_refused(bag):
    player = replay(bag, "--skip", "/cam_up/image")
    _, wrong = player.communicate(timeout=20)
    assert player.returncode == 2 and "/cam_up/image" in wrong and "/cam_front/camera_info" in wrong


def test_a_rate_of_zero_is_refused(bag):
    player = replay(bag, "--rate", "0")
    _, wrong = player.communicate(timeout=20)
    assert player.returncode == 2 and "--rate" in wrong
