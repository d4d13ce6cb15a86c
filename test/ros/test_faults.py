"""Every fault that a node on a car must expect, injected over real DDS into the whole node with a stand-in network.

Each test is a fault and what is promised of it: what is said, what is published, and that it goes on. The ROS clock is
the test's. Faults of engine files are with the backends; more of the collector's in test_assemble.py.
"""

import gc
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from array import array
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median

import pytest
import torch

pytest.importorskip("rclpy", reason="needs ROS 2")

from rclpy.lifecycle import TransitionCallbackReturn as Result  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.qos import QoSProfile, ReliabilityPolicy  # noqa: E402
from ros import fake  # noqa: E402
from ros.fake import CAMERAS, Stage, mounting, seen_by_one_alone  # noqa: E402

from occflow_core.types import NANO  # noqa: E402
from occflow_core.voxelflow import unpack  # noqa: E402
from occflow_ros.health import ERROR, OK, WARN  # noqa: E402

pytestmark = [pytest.mark.dds, pytest.mark.timeout(120)]
DOMAIN = 1 + os.getpid() % 20  # of this process alone, so that parallel runs do not hear each other
ALL = 0b111111


@pytest.fixture(scope="module")
def _stage():
    with pytest.MonkeyPatch.context() as patch, Stage(patch, DOMAIN) as stage:
        yield stage


@pytest.fixture
def stage(_stage):
    """The node as after its start, all that a car needs said, nothing answered yet."""
    _stage.network.delay, _stage.network.spoilt = 0.0, 0
    _stage.network.failures.clear()
    _stage.network.used.clear()
    _stage.stamp += 100 * NANO
    return _stage.again(frozen_after=0.3, min_cameras=1, startup_wait=0.0, lazy=True, tf_wait=0.1, image_depth=2)


def bit(name: str) -> int:
    return 1 << CAMERAS.index(name)


def memory(message) -> int:
    """How many steps the network remembered: see `fake.Network`."""
    return len(message.index) - 1


def level(stage, name: str) -> int:
    return stage.status(name)[0]


# ---- cameras that fail


def test_one_camera_stops(stage):
    before = stage.answer()
    assert before.cameras_used == ALL
    own = seen_by_one_alone("cam_back", fake.Config().grid)
    assert own.sum() > 1000
    # what the picture's crop leaves out is not looked at by anybody
    looked_at = own & ~unpack(before).unobserved
    assert looked_at.sum() > 1000
    for _ in range(3):
        message = stage.answer(without=["cam_back"])
        assert message.cameras_used == ALL & ~bit("cam_back")
        assert unpack(message).unobserved[own].all(), "what only the dead camera saw must be unobserved"
    assert not stage.network.used[-1][CAMERAS.index("cam_back")] and memory(message) == 3
    stage.until(lambda: level(stage, "cam_back") == WARN)
    stage.drive(25, without=["cam_back"])  # longer than `quiet`
    stage.until(lambda: level(stage, "cam_back") == ERROR)
    number, words, _ = stage.status()
    assert number == WARN and "cam_back" in words
    message = stage.answer()
    assert message.cameras_used == ALL, "its first image is used again"
    assert not unpack(message).unobserved[looked_at].any()
    stage.drive_until(lambda: level(stage, "cam_back") == OK and level(stage, "occupancy") == OK)


def test_fewer_cameras_than_the_least(stage):
    stage.again(min_cameras=3)
    stage.answer()
    stage.drive(25, without=CAMERAS[:4])
    assert stage.heard.stamps[-1] < stage.stamp - 2 * NANO
    stage.until(lambda: level(stage, "occupancy") == ERROR)
    assert int(stage.status()[2]["sets dropped: too few cameras"]) >= 20
    assert stage.answer().cameras_used == ALL and memory(stage.heard.messages[-1]) == 0, "a long gap is a new drive"
    stage.drive_until(lambda: level(stage, "occupancy") == OK)


def test_all_cameras_stop_and_the_node_stays(stage):
    stage.answer()
    stage.drive(25, without=CAMERAS)  # the clock and the transforms go on
    stage.until(lambda: level(stage, "occupancy") == ERROR)
    assert len(stage.heard.messages) == 1
    assert stage.answer().cameras_used == ALL
    stage.drive_until(lambda: level(stage, "occupancy") == OK)


@pytest.mark.parametrize("what", ["stamp", "picture"])
def test_a_frozen_camera_is_found_within_a_second(stage, what):
    first = stage.answer().header.stamp
    left, frozen = [], fake._jpegs("frozen")[0]  # s, steady: when each left; a picture that it never sends otherwise
    at = first.sec * NANO + first.nanosec

    def still(stamp):
        left.append(time.monotonic())
        stage.car.shoot("cam_front", at if what == "stamp" else stamp, frozen)

    def masked():
        return stage.answer(without=["cam_front"], instead=still).cameras_used != ALL

    if what == "picture":
        assert not masked(), "once is no sign yet"
        while not masked():
            assert left[-1] - left[0] < 1.0
    else:
        assert masked(), "an old stamp is of no use at once"
        stage.drive(4, without=["cam_front"], instead=still)
    stage.until(lambda: stage.said(f"/cam_front/image_raw/compressed: refused: the camera is frozen: the {what}"))
    stage.until(lambda: level(stage, "cam_front") in (WARN, ERROR))
    assert stage.answer().cameras_used == ALL, "its first new image counts again"


def test_a_late_image_is_counted_and_stamps_never_go_back(stage):
    stage.answer()
    stage.answer(without=["cam_front"])
    stage.car.shoot("cam_front", stage.stamp)
    stage.until(lambda: stage.node._collector.dropped[0, "late"] == 1)
    assert stage.answer().cameras_used == ALL
    assert stage.heard.stamps == sorted(set(stage.heard.stamps)) and len(stage.heard.stamps) == 3


def test_of_two_images_of_one_stamp_the_first_is_kept(stage):
    stage.answer(without=["cam_back"], instead=lambda stamp: [stage.car.shoot("cam_back", stamp) for _ in range(2)])
    stage.until(lambda: stage.node._collector.dropped[CAMERAS.index("cam_back"), "same stamp again"] == 1)
    assert len(stage.heard.messages) == 1 and stage.heard.messages[0].cameras_used == ALL


@pytest.mark.parametrize(
    ("stamp", "reason"),
    [(lambda now: 0, "no stamp"), (lambda now: now + 5 * NANO, "stamp far from the clock")],
    ids=["zero", "of the future"],
)
def test_a_stamp_that_cannot_be(stage, stamp, reason):
    stage.answer()
    message = stage.answer(without=["cam_back"], instead=lambda now: stage.car.shoot("cam_back", stamp(now)))
    assert message.cameras_used == ALL & ~bit("cam_back")
    stage.until(lambda: int(stage.status("cam_back")[2].get(f"dropped: {reason}", 0)) == 1)
    assert stage.answer().cameras_used == ALL


def test_a_broken_jpeg_costs_one_camera_one_set(stage):
    whole = fake._jpegs("cam_back")[0]
    for broken in (whole[: len(whole) // 2], array("B", b"\xff\xd8\xff no picture"), array("B", b"")):
        shoot = partial(stage.car.shoot, "cam_back", data=broken)
        message = stage.answer(without=["cam_back"], instead=shoot)
        assert message.cameras_used == ALL & ~bit("cam_back")
    stage.until(lambda: stage.said("/cam_back/image_raw/compressed: refused: "))
    assert stage.answer().cameras_used == ALL


# ---- time


def test_the_clock_is_turned_back(stage):
    for _ in range(3):
        last = stage.answer()
    assert memory(last) == 2
    stage.car.sweep(stage.stamp + NANO // 10, without=["cam_back"])  # an open set of the old lap
    stage.node._transforms.add("base_link", "trailer", stage.stamp, mounting("trailer"), static=False)
    stage.stamp -= 60 * NANO
    first = stage.answer()
    assert memory(first) == 0 and first.cameras_used == ALL, "the first set of the new lap, with no memory of the old"
    assert memory(stage.answer()) == 1
    stage.until(lambda: stage.said("stamps went back"))
    assert not stage.node._transforms.joined("base_link", "trailer"), "what was said of the old lap is forgotten"
    assert stage.node.health.counts()["clock jumps"] == 1, "static transforms were kept: nothing had to be sent again"


def test_the_clock_steps_back_a_little(stage):
    for _ in range(3):
        stage.answer()
    stage.stamp -= round(0.25 * NANO)  # as NTP does
    stage.drive(2)
    assert memory(stage.answer()) == 3, "no lap began"
    assert "clock jumps" not in stage.node.health.counts()
    assert stage.heard.stamps == sorted(set(stage.heard.stamps))


def test_the_clock_jumps_ahead(stage):
    stage.answer()
    assert memory(stage.answer(period=1.5)) == 1, "within `longest_gap`"
    assert memory(stage.answer(period=30.0)) == 0
    assert memory(stage.answer()) == 1


def test_a_pause_is_no_fault(stage):
    for _ in range(5):
        stage.answer()
    stage.heard.diagnostics.clear()  # a start may take long, and no output meanwhile is said
    stage.spin(2.5)  # longer than `quiet`: nothing comes, and the clock stands
    levels = {status.level for report in stage.heard.diagnostics for status in report.status}
    assert bytes([ERROR]) not in levels
    assert memory(stage.answer()) == 5


# ---- transforms


def test_transforms_are_missing_at_the_start(stage):
    node = stage.node
    stage.unconfigure()
    node.set_parameters([Parameter("startup_wait", value=2.0), Parameter("fixed_frame", value="odom")])
    heard = threading.Event()
    try:
        assert node.trigger_configure() == Result.SUCCESS
        began = time.monotonic()
        assert node.trigger_activate() == Result.FAILURE
        assert 2.0 <= time.monotonic() - began < 20.0 and node.waiting
        assert stage.state == "inactive"
        stage.until(lambda: stage.said("still without CameraInfo on /cam_front/camera_info; "))
        assert stage.said("a transform odom <- base_link")
        stage.car.fixed = "odom"

        def told():
            while not heard.is_set():
                stage.car.move(stage.stamp)
                for name in CAMERAS:
                    stage.car.info(name)
                time.sleep(0.1)

        thread = threading.Thread(target=told)
        thread.start()
        node.settings = replace(node.settings, startup_wait=20.0)  # as long as a busy machine may take to hear
        assert node.trigger_activate() == Result.SUCCESS, "it hears of them while it waits"
        heard.set()
        thread.join()
        stage.connected()
        for name in CAMERAS:
            stage.car.info(name)
        stage.until(lambda: all(node._calibrations))
        assert stage.answer().cameras_used == ALL
    finally:
        heard.set()
        stage.car.fixed = "map"
        stage.unconfigure()
        node.set_parameters([Parameter("fixed_frame", value="map")])


def test_a_transition_that_is_asked_for_while_activation_waits_comes_after_it(stage):
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState

    node, answers = stage.node, []
    stage.unconfigure()
    node.set_parameters([Parameter("startup_wait", value=2.0), Parameter("fixed_frame", value="odom")])
    client = stage.listener.create_client(ChangeState, "/occflow/change_state")
    try:
        assert node.trigger_configure() == Result.SUCCESS
        assert client.wait_for_service(10.0)
        request = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CLEANUP))
        client.call_async(request).add_done_callback(lambda future: answers.append(future.result().success))
        assert node.trigger_activate() == Result.FAILURE
        assert node.waiting and stage.state == "inactive"
        stage.until(lambda: answers == [True] and stage.state == "unconfigured")
    finally:
        stage.listener.destroy_client(client)
        stage.unconfigure()
        node.set_parameters([Parameter("fixed_frame", value="map")])


def test_a_transition_that_cannot_be_had_is_refused_and_the_node_drives_on(stage):
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState

    answers = []
    client = stage.listener.create_client(ChangeState, "/occflow/change_state")
    try:
        assert client.wait_for_service(10.0)
        request = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_ACTIVATE))
        client.call_async(request).add_done_callback(lambda future: answers.append(future.result().success))
        stage.until(lambda: answers == [False] and stage.said("transition 3 cannot be had while the node is active"))
    finally:
        stage.listener.destroy_client(client)
    assert stage.state == "active" and stage.answer().cameras_used == ALL


def test_transforms_stop_and_come_back(stage):
    for _ in range(3):
        stage.answer()
    unmoved = stage.heard.stamps[-1]
    # the car's place is not known any more: neither an identity nor the last one takes its place
    for dropped in ("1", "2", "3"):
        stage.stamp += NANO // 10
        stage.car.tick(stage.stamp)
        for name in CAMERAS:
            stage.car.shoot(name, stage.stamp)
        stage.until(lambda: stage.status("cam_front")[2].get("dropped: no transform") == dropped)  # noqa: B023
    assert stage.heard.stamps[-1] == unmoved
    stage.until(lambda: stage.said("map <- base_link"))
    assert memory(stage.answer()) == 3, "the gap was short: what was remembered still holds"


def test_a_transform_that_comes_late_is_waited_for(stage):
    stage.again(tf_wait=5.0)
    stage.answer()
    stage.stamp += NANO // 10
    stage.car.tick(stage.stamp)
    for name in CAMERAS:
        stage.car.shoot(name, stage.stamp)
    stage.until(lambda: stage.node.health.counts()["sets complete"] == 2)
    stage.spin(0.3)
    assert len(stage.heard.messages) == 1
    stage.car.move(stage.stamp)
    assert stage.answered().cameras_used == ALL


def test_a_camera_is_mounted_anew(stage):
    for _ in range(3):
        stage.answer()
    stage.car.mount(lifted=0.05)
    stage.until(lambda: stage.node._transforms.lookup("base_link", "cam_back_optical_frame", stage.stamp)[2, 3] > 1.54)
    assert memory(stage.answer()) == 0
    stage.until(lambda: stage.said("base_link <- cam_back_optical_frame changed by 0.050 m and 0.00 degrees"))
    assert memory(stage.answer()) == 1 and stage.node.health.counts()["extrinsics changed"] == 6


# ---- messages that contradict themselves


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": [math.nan] * 9}, "expected finite, positive focal lengths"),
        ({"k": [0.0] * 9}, "expected finite, positive focal lengths"),
        ({"height": 0}, "CameraInfo of 160 x 0 pixels"),
        ({"distortion_model": "guessed", "d": [0.1] * 5}, "guessed"),
    ],
    ids=["NaN", "zero K", "no pixels", "unknown model"],
)
def test_a_camera_info_that_cannot_be(stage, changes, words):
    assert stage.answer().cameras_used == ALL
    stage.car.info("cam_back", **changes)
    stage.until(lambda: stage.node._calibrations[CAMERAS.index("cam_back")] is None)
    assert stage.answer().cameras_used == ALL & ~bit("cam_back"), "what held before does not hold any more"
    stage.until(lambda: stage.said("/cam_back/camera_info: refused") and stage.said(words))
    stage.car.info("cam_back")
    stage.until(lambda: all(stage.node._calibrations))
    assert stage.answer().cameras_used == ALL


def test_a_camera_info_that_changes_is_taken_and_memory_forgotten(stage):
    for _ in range(3):
        stage.answer()
    assert memory(stage.answer(without=["cam_back"])) == 3  # while it is missing nothing is compared
    zoomed = [2 * fake.FOCAL, 0.0, 80.0, 0.0, 2 * fake.FOCAL, 45.0, 0.0, 0.0, 1.0]
    before = stage.node._calibrations[3]
    stage.car.info("cam_back", k=zoomed)
    stage.until(lambda: stage.node._calibrations[3] is not before)
    message = stage.answer()
    assert message.cameras_used == ALL and memory(message) == 0
    assert stage.node.health.counts()["intrinsics changed"] == 1
    far = seen_by_one_alone("cam_back", fake.Config().grid)
    assert unpack(message).unobserved[far].float().mean() > 0.3, "it sees half as wide"


def test_a_camera_whose_info_begins_to_tell_of_a_lens_is_used_without_it(stage):
    assert stage.answer().cameras_used == ALL
    stage.car.info("cam_back", d=[-0.2, 0.05, 0.0, 0.0, 0.0])
    stage.until(lambda: stage.said("/cam_back/camera_info changed: it was 160 x 90 pixels in cam_back_optical_frame"))
    assert stage.answer().cameras_used == ALL and stage.node._calibrations[3].lens is not None
    stage.car.info("cam_back", d=[-20.0, 0.0, 0.0, 0.0, 0.0])
    stage.until(lambda: stage.node._calibrations[3].lens.coefficients[0] == -20)
    assert stage.answer().cameras_used == ALL & ~bit("cam_back")
    stage.until(lambda: stage.said("/cam_back/image_raw/compressed: refused: the plumb_bob lens [-20.0, "))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoding": "32FC1"}, "encoding '32FC1', expected one of"),
        ({"step": 7}, "step 7 bytes"),
        ({"width": 80, "step": 480}, "80 x 90 pixels, but /cam_back/camera_info says 160 x 90"),
        ({"data": array("B", bytes(100))}, "100 bytes, but 90 rows"),
        ({"height": 0}, "160 x 0 pixels"),
    ],
    ids=["encoding", "step", "size", "bytes", "no rows"],
)
def test_a_raw_image_that_contradicts_itself(_stage, changes, words):
    from sensor_msgs.msg import Image

    stage, topic = _stage, "/cam_back/image_raw/compressed"
    stage.unconfigure()
    stage.stamp += 100 * NANO
    stage.node.set_parameters([Parameter("camera.cam_back.compressed", value=False)])
    compressed = stage.car.images["cam_back"]
    stage.car.images["cam_back"] = raw = stage.car.node.create_publisher(Image, "/cam_back/image_raw", 5)
    stage.node.set_parameters([Parameter("camera.cam_back.image_topic", value="/cam_back/image_raw")])
    try:
        stage.again()

        def shoot(stamp, **changes):
            image = Image(height=90, width=160, encoding="bgr8", step=480, data=array("B", os.urandom(90 * 480)))
            for key, value in changes.items():
                setattr(image, key, value)
            image.header.frame_id = "cam_back_optical_frame"
            image.header.stamp.sec, image.header.stamp.nanosec = divmod(stamp, NANO)
            raw.publish(image)

        assert stage.answer(without=["cam_back"], instead=shoot).cameras_used == ALL
        message = stage.answer(without=["cam_back"], instead=lambda stamp: shoot(stamp, **changes))
        assert message.cameras_used == ALL & ~bit("cam_back")
        stage.until(lambda: stage.said("/cam_back/image_raw: refused: ") and stage.said(words))
        assert stage.answer(without=["cam_back"], instead=shoot).cameras_used == ALL
    finally:
        stage.car.images["cam_back"] = compressed
        stage.car.node.destroy_publisher(raw)
        stage.unconfigure()
        back = {"camera.cam_back.compressed": True, "camera.cam_back.image_topic": topic}
        stage.node.set_parameters([Parameter(name, value=value) for name, value in back.items()])


# ---- the network


def test_memory_runs_out_once(stage):
    stage.answer()
    stage.network.failures.append(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    message = stage.answer()
    assert message.cameras_used == ALL and memory(message) == 0, "the same set, with a new model"
    assert memory(stage.answer()) == 1
    stage.until(lambda: stage.said("out of memory (CUDA out of memory"))
    assert stage.node.health.counts()["out of memory"] == 1 and stage.node.failure is None


def test_memory_runs_out_for_good(stage):
    stage.answer()
    stage.network.failures.extend(MemoryError("none left") for _ in range(3))
    stage.stamp += NANO // 10
    stage.car.sweep(stage.stamp)
    stage.until(lambda: stage.state == "inactive")
    stage.until(lambda: level(stage, "occupancy") == ERROR)
    words = "a set was lost twice, also with a new model: none left"
    assert words in stage.status()[1] and stage.said(words)
    stage.network.failures.clear()
    stage.again()  # a supervisor may try again
    assert stage.answer().cameras_used == ALL


def test_what_the_cpu_says_when_its_memory_runs_out_is_understood():
    from occflow_ros.node import _out_of_memory

    with pytest.raises(RuntimeError) as told:
        torch.empty(1 << 46, dtype=torch.uint8)
    assert _out_of_memory(told.value) and not _out_of_memory(RuntimeError("shapes differ"))


def test_errors_that_never_end_end_the_node(stage, monkeypatch):
    from occflow_ros import node as module

    monkeypatch.setattr(module, "LOST", 3)
    made = []
    load = module.load
    monkeypatch.setattr(module, "load", lambda *a, **k: made.append(1) or load(*a, **k))
    stage.answer()
    stage.network.failures.extend(RuntimeError("CUDA error: device-side assert") for _ in range(2))
    stage.drive(2)
    stage.until(lambda: not stage.network.failures)
    assert stage.answer().cameras_used == ALL and not made, "two in a row are forgiven"
    stage.network.failures.extend(RuntimeError("CUDA error: device-side assert") for _ in range(3))
    stage.drive(3)
    stage.until(lambda: made and not stage.network.failures)
    assert stage.answer().cameras_used == ALL and len(made) == 1, "after three the model was made anew"
    stage.network.failures.extend(RuntimeError("CUDA error: device-side assert") for _ in range(20))
    stage.drive_until(lambda: stage.state == "inactive")
    stage.until(lambda: level(stage, "occupancy") == ERROR)
    assert "6 sets were lost in a row, the latest by RuntimeError" in stage.status()[1]


def test_a_model_that_cannot_be_made_anew_is_a_failure_and_can_be_mended(stage, monkeypatch):
    from occflow_ros import node as module

    stage.answer()
    monkeypatch.setattr(module, "load", lambda *_, **__: 1 / 0)
    stage.network.failures.append(MemoryError("none left"))
    stage.drive(1)
    stage.until(lambda: stage.state == "inactive")
    assert "could not be made anew" in stage.node.failure
    monkeypatch.undo()
    monkeypatch.setattr(module, "load", lambda *_, **__: fake.model(stage.network))
    assert stage.node.trigger_activate() == Result.SUCCESS
    stage.connected()
    assert stage.answer().cameras_used == ALL


def test_the_network_says_nonsense(stage):
    for _ in range(3):
        stage.answer()
    stage.network.spoilt = 1
    stage.stamp += NANO // 10
    stage.car.sweep(stage.stamp)
    stage.until(lambda: stage.said("not finite"))
    assert len(stage.heard.messages) == 3, "nonsense is not published"
    assert memory(stage.answer()) == 0
    assert int(stage.node.health.report(0.0)[0].values["sets dropped: FloatingPointError"]) == 1


def test_the_network_is_slower_than_the_cameras(stage, monkeypatch):
    stage.network.delay = 0.3
    begun, sent = [], {}  # s, steady: when the network began a set; stamp of a sweep, ns -> when it left
    monkeypatch.setattr(stage.network, "before", lambda: begun.append(time.monotonic()))
    stage.drive(30, instead=lambda stamp: sent.update({stamp: time.monotonic()}))
    stage.answered()
    assert len(begun) >= 4 and stage.node.health.counts()["sets skipped"] >= 10
    # the newest set there is wins: when the network begins one, the next sweep has not left, or only just. In a queue
    # that grows it left long ago, and with each set longer. What the network and the machine take does not count
    left = [*sent.values(), math.inf]
    following = [left[1 + list(sent).index(stamp)] for stamp in stage.heard.stamps]
    overdue = [at - after for at, after in zip(begun, following, strict=True)]
    assert median(overdue) <= 0.1 and max(overdue) <= 0.5, overdue


# ---- ROS


def test_a_publisher_whose_qos_does_not_fit(stage):
    from sensor_msgs.msg import CompressedImage

    topic = "/cam_front/image_raw/compressed"
    stage.again(reliable_images=True)
    try:
        unfit = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        publisher = stage.car.node.create_publisher(CompressedImage, topic, unfit)
        words = f"{topic}: a publisher offers reliability"
        stage.until(lambda: stage.said(words))
        assert stage.said("BEST_EFFORT") and stage.said("we ask for RELIABLE")
        stage.car.node.destroy_publisher(publisher)
    finally:
        stage.again(reliable_images=False)


def test_a_subscriber_whose_qos_does_not_fit(stage):
    stage.unconfigure()
    stage.node.set_parameters([Parameter("reliable_output", value=False)])
    try:
        assert stage.node.trigger_configure() == Result.SUCCESS  # the listener asks for reliable
        stage.until(lambda: stage.said("/occflow/occupancy: a subscriber asks for reliability RELIABLE"))
        assert stage.said("we offer BEST_EFFORT")
    finally:
        stage.unconfigure()
        stage.node.set_parameters([Parameter("reliable_output", value=True)])


@pytest.mark.parametrize("depth", [1, 7])
def test_images_wait_in_a_queue_as_deep_as_asked(stage, depth):
    stage.again(image_depth=depth)
    images = [s for s in stage.node.subscriptions if s.topic_name.endswith("/image_raw/compressed")]
    assert len(images) == 6 and {s.qos_profile.depth for s in images} == {depth}


def test_best_effort_outputs_where_asked(stage):
    from occflow_msgs.msg import VoxelFlow

    stage.unconfigure()
    for reliable, kind in ((False, ReliabilityPolicy.BEST_EFFORT), (True, ReliabilityPolicy.RELIABLE)):
        stage.node.set_parameters([Parameter("reliable_output", value=reliable)])
        assert stage.node.trigger_configure() == Result.SUCCESS
        (out,) = [p for p in stage.node.publishers if p.msg_type is VoxelFlow]
        assert out.qos_profile.reliability == kind
        assert stage.node.trigger_cleanup() == Result.SUCCESS


def test_a_callback_that_throws(stage, monkeypatch):
    from occflow_ros import convert

    stage.answer()
    whole = convert.compressed_picture
    monkeypatch.setattr(convert, "compressed_picture", lambda message: 1 / 0)
    stage.drive(1)  # at its own pace: stamps that run ahead of the arrivals are those of a clock that does
    stage.until(lambda: stage.node.health.counts().get("exceptions in callbacks") == 6)
    stage.until(lambda: stage.said("_on_image: ZeroDivisionError"))
    monkeypatch.setattr(convert, "compressed_picture", whole)
    assert stage.answer().cameras_used == ALL


def test_two_publishers_on_one_topic(stage):
    from sensor_msgs.msg import CompressedImage

    publisher = stage.car.node.create_publisher(CompressedImage, "/cam_front/image_raw/compressed", 1)
    stage.answer()
    stage.until(lambda: "2 publishers on /cam_front/image_raw/compressed" in stage.status("cam_front")[1])
    stage.car.node.destroy_publisher(publisher)
    stage.answer()
    stage.until(lambda: level(stage, "cam_front") == OK)


def test_nobody_listens_and_the_network_is_to_run_all_the_same(stage):
    stage.again(lazy=False)
    stage.answer()
    asked = len(stage.network.used)
    with stage.deaf():
        for more in (1, 2, 3):  # one after the other: a set that waits for the worker is pushed out by the next
            stage.drive(1)
            stage.until(lambda: len(stage.network.used) == asked + more)  # noqa: B023


def test_nobody_listens(stage):
    stage.answer()
    asked = len(stage.network.used)
    with stage.deaf():
        stage.drive(10)
        assert len(stage.network.used) == asked, "no work for nobody"
        stage.drive_until(lambda: stage.status()[:2] == (OK, "idle: nobody listens") and level(stage, "cam_back") == OK)
        stage.drive(25, without=["cam_back"])
        stage.until(lambda: level(stage, "cam_back") == ERROR)  # a dead camera is one, whoever listens
    stage.until(stage.node._out.get_subscription_count)
    assert stage.answer().cameras_used == ALL
    stage.drive_until(lambda: stage.status()[1] == "running")


def test_the_heart_beats_in_every_state_and_stops_with_a_worker_that_hangs(stage, monkeypatch):
    from lifecycle_msgs.msg import State
    from rclpy.event_handler import SubscriptionEventCallbacks
    from rclpy.qos import LivelinessPolicy

    from occflow_ros import node as module

    states, lives = [], []
    qos = QoSProfile(
        depth=10,
        liveliness=LivelinessPolicy.MANUAL_BY_TOPIC,
        liveliness_lease_duration=rclpy_duration(module.LEASE),
    )
    heart = stage.listener.create_subscription(
        State,
        "/occflow/heartbeat",
        lambda m: states.append(m.label),
        qos,
        event_callbacks=SubscriptionEventCallbacks(liveliness=lambda event: lives.append(event.alive_count)),
    )
    try:
        stage.until(lambda: states[-1:] == ["active"])
        stage.node.trigger_deactivate()
        stage.until(lambda: states[-1:] == ["inactive"])
        assert stage.node.trigger_activate() == Result.SUCCESS
        stage.connected()
        stage.until(lambda: states[-1:] == ["active"] and lives[-1:] == [1])
        monkeypatch.setattr(module, "STUCK", 0.5)
        stage.network.delay = 3.0
        stage.stamp += NANO // 10
        stage.car.sweep(stage.stamp)
        stage.until(lambda: 0 in lives[-3:], 5.0)  # DDS tells whoever asked for it
        stage.until(lambda: stage.said("the worker has been at one set for"))
        stage.network.delay = 0.0
        stage.until(lambda: lives[-1] == 1)
    finally:
        stage.listener.destroy_subscription(heart)


def rclpy_duration(seconds: float):
    from rclpy.duration import Duration

    return Duration(seconds=seconds)


@contextmanager
def watchdog(stage):
    """One who listens to the heart in a thread of its own, as from another process: (s, steady; state) of each beat,
    and how many hearts DDS calls alive, at each change."""
    import rclpy
    from lifecycle_msgs.msg import State
    from rclpy.event_handler import SubscriptionEventCallbacks
    from rclpy.qos import LivelinessPolicy

    from occflow_ros import node as module

    beats, lives, done = [], [], threading.Event()
    lease = {"liveliness_lease_duration": rclpy_duration(module.LEASE)}
    node, executor = (
        rclpy.create_node("watchdog", context=stage.context),
        rclpy.executors.SingleThreadedExecutor(context=stage.context),
    )
    executor.add_node(node)
    node.create_subscription(
        State,
        "/occflow/heartbeat",
        lambda m: beats.append((time.monotonic(), m.label)),
        QoSProfile(depth=10, liveliness=LivelinessPolicy.MANUAL_BY_TOPIC, **lease),
        event_callbacks=SubscriptionEventCallbacks(liveliness=lambda event: lives.append(event.alive_count)),
    )

    def watch():
        while not done.is_set():
            executor.spin_once(timeout_sec=0.1)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        stage.until(lambda: beats and lives[-1:] == [1])
        yield beats, lives
    finally:
        done.set()
        thread.join()
        executor.shutdown()
        node.destroy_node()


def slow_load(monkeypatch, seconds: float) -> threading.Event:
    """Each load of the node takes that long; set when one has begun."""
    from occflow_ros import node as module

    load, begun = module.load, threading.Event()

    def slow(*arguments, **named):
        begun.set()
        time.sleep(seconds)
        return load(*arguments, **named)

    monkeypatch.setattr(module, "load", slow)
    return begun


def test_the_heart_beats_while_activation_loads(stage, monkeypatch):
    from occflow_ros import node as module

    stage.node.trigger_deactivate()
    load, frozen = module.load, []
    monkeypatch.setattr(module, "load", lambda *a, **k: frozen.append(gc.get_freeze_count()) or load(*a, **k))
    slow_load(monkeypatch, 3.0)
    with watchdog(stage) as (beats, lives):
        began = time.monotonic()
        assert stage.node.trigger_activate() == Result.SUCCESS
        assert time.monotonic() - began >= 3.0
        stage.until(lambda: beats[-1][1] == "active")
        while_loading = [state for at, state in beats if began + 0.5 < at < began + 3.0]
        assert len(while_loading) >= 6 and {*while_loading} == {"activating"}
        assert 0 not in lives, "nobody was told that it is dead"
        assert frozen[0] > 10_000, "collections of what a compiler makes walk only that"
    stage.connected()
    assert stage.answer().cameras_used == ALL


def test_what_goes_wrong_while_activation_loads_fails_it_and_the_next_one_drives(stage, monkeypatch):
    from occflow_ros import node as module

    stage.node.trigger_deactivate()
    with monkeypatch.context() as patch:
        patch.setattr(module.Stream, "warm_up", lambda *_: torch.empty(1 << 46, dtype=torch.uint8))
        assert stage.node.trigger_activate() == Result.FAILURE
    assert stage.said("activate failed: ") and stage.state == "inactive" and not stage.node.waiting
    assert stage.node._model is None, "what is not warm is not kept"
    assert stage.node.trigger_activate() == Result.SUCCESS
    stage.connected()
    assert stage.answer().cameras_used == ALL


def test_a_worker_that_makes_the_model_anew_is_waited_for(stage, monkeypatch):
    from occflow_ros import node as module

    stage.answer()
    begun = slow_load(monkeypatch, 3.0)
    monkeypatch.setattr(module, "STUCK", 0.5)
    stage.network.failures.append(MemoryError("none left"))
    with watchdog(stage) as (beats, lives):
        stage.drive(1)
        assert begun.wait(10.0)
        began = time.monotonic()
        assert stage.node.trigger_deactivate() == Result.SUCCESS
        assert stage.said("the worker makes the model anew: it is stopped when that is done")
        assert stage.state == "inactive" and stage.node.failure is None and stage.node.left is None
        ended = time.monotonic()
        states = [state for at, state in beats if began + 0.5 < at < ended]
        assert len(states) >= 4 and {*states} == {"deactivating"} and 0 not in lives
    assert stage.node.trigger_activate() == Result.SUCCESS
    stage.connected()
    assert stage.answer().cameras_used == ALL


def test_what_was_taken_is_given_back(stage):
    stage.answer()
    node = stage.node
    taken = [weakref.ref(thing) for thing in (node._stream, node._model)]
    others = [weakref.ref(thing) for thing in (node._watches[0], node._mailbox, node._worker, node._collector)]
    assert gc.get_freeze_count() > 10_000, "a full collection would walk all of it while sets wait"
    node.trigger_deactivate()
    gc.collect()
    assert gc.get_freeze_count() == 0
    assert [ref() for ref in taken] == [None, None], "an inactive node keeps no model"
    node.trigger_cleanup()
    gc.collect()
    assert [ref() for ref in others] == [None] * 4
    assert [t.name for t in threading.enumerate() if t.name == "worker" or t.name.startswith("decode")] == []


# ---- the process


class Process:
    """The node as a process of its own, and a car that drives on."""

    def __init__(self, stage, delay: float = 0.0, failures: int = 0, loading: float = 0.0):
        self.stage = stage
        stage.processes.append(self)
        environment = {
            **os.environ,
            "ROS_DOMAIN_ID": str(DOMAIN),
            "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
            "FAKE_DELAY": str(delay),
            "FAKE_FAILURES": str(failures),
            "FAKE_LOADING": str(loading),
        }
        command = [sys.executable, fake.__file__, "--ros-args", "-p", "use_sim_time:=true"]
        command += ["-r", "/occflow/change_state:=/alone/change_state"]  # the stage's own node has that one
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as this
        self.process = subprocess.Popen(command, env=environment, stdout=self._log, stderr=subprocess.STDOUT)

    def said(self) -> str:
        log = self._log.fileno()
        return os.pread(log, os.fstat(log).st_size, 0).decode()  # the process writes on where its last word ended

    def drive_until_answered(self, seconds: float = 60.0):
        """Its first message."""
        stage, end, begun = self.stage, time.monotonic() + seconds, self.stage.stamp

        def answers():  # not of one that was here before
            heard = zip(stage.heard.messages, stage.heard.stamps, strict=True)
            return [message for message, stamp in heard if stamp > begun]

        while not answers() and time.monotonic() < end:
            for name in CAMERAS:
                stage.car.info(name)
            stage.drive(1)
        assert answers(), self.end(signal.SIGKILL)[1]
        return answers()[0]

    def drive_until_said(self, words: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while words not in self.said() and time.monotonic() < end:
            for name in CAMERAS:
                self.stage.car.info(name)
            self.stage.drive(1)
        assert words in self.said(), self.end(signal.SIGKILL)[1]

    def end(self, word: int) -> tuple[int, str]:
        self.process.send_signal(word)
        return self.process.wait(timeout=30), self.said()


@pytest.fixture
def alone(stage):
    """The stage without its own node: another process is the node, and ends with the test, however that ends."""
    stage.unconfigure()
    stage.processes = []
    yield stage
    for each in stage.processes:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


def test_the_node_is_killed_and_started_again(alone):
    first = Process(alone)
    first.drive_until_answered()
    assert first.end(signal.SIGKILL)[0] == -signal.SIGKILL
    second = Process(alone)
    assert memory(second.drive_until_answered()) <= 1, "nothing of before is needed"
    code, said = second.end(signal.SIGINT)
    assert code == 0, said


def test_a_process_whose_memory_runs_out_for_good_ends_with_an_error(alone):
    node = Process(alone, failures=2)
    end = time.monotonic() + 60
    while node.process.poll() is None and time.monotonic() < end:
        for name in CAMERAS:
            alone.car.info(name)
        alone.drive(1)
    assert node.process.wait(20) == 1
    alone.until(lambda: level(alone, "occupancy") == ERROR)
    assert "also with a new model" in alone.status()[1], "its last word"


@pytest.mark.parametrize("word", [signal.SIGINT, signal.SIGTERM])
def test_it_is_stopped_while_the_network_thinks(alone, word):
    node = Process(alone, delay=3.0)
    node.drive_until_said(fake.THINKING)
    began = time.monotonic()
    code, said = node.end(word)
    assert code == 0 and "Traceback" not in said, said
    assert time.monotonic() - began < 10


def change(stage, transition: int) -> None:
    """Asks the node that is a process of its own for a transition, and does not wait for it."""
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState

    client = stage.listener.create_client(ChangeState, "/alone/change_state")
    try:
        stage.until(client.service_is_ready)
        client.call_async(ChangeState.Request(transition=Transition(id=transition)))
        stage.spin(1.0)
    finally:
        stage.listener.destroy_client(client)


@pytest.mark.parametrize("asked", [False, True], ids=["active", "deactivating"])
def test_it_is_stopped_while_the_model_is_made_anew(alone, asked):
    from lifecycle_msgs.msg import Transition

    node = Process(alone, failures=1, loading=600.0)
    node.drive_until_said(fake.LOADING)
    if asked:
        change(alone, Transition.TRANSITION_DEACTIVATE)
        node.drive_until_said("the worker makes the model anew: it is stopped when that is done")
    began = time.monotonic()
    code, said = node.end(signal.SIGINT)
    assert code == 0 and "Traceback" not in said and "cannot be stopped" not in said, said
    assert time.monotonic() - began < 10


def test_it_is_stopped_while_activation_loads(alone):
    from lifecycle_msgs.msg import Transition

    node = Process(alone, loading=600.0)
    node.drive_until_answered()
    change(alone, Transition.TRANSITION_DEACTIVATE)
    change(alone, Transition.TRANSITION_ACTIVATE)
    node.drive_until_said(fake.LOADING)
    began = time.monotonic()
    code, said = node.end(signal.SIGINT)
    assert code == 0 and "Traceback" not in said, said
    assert time.monotonic() - began < 10


def test_a_worker_that_hangs_does_not_keep_the_process(alone):
    node = Process(alone, delay=600.0)
    node.drive_until_said(fake.THINKING)  # a complete set is not enough: nobody listens yet, perhaps
    code, said = node.end(signal.SIGINT)
    assert code == 1 and "cannot be stopped" in said, said


# ---- the last one: what a killed reader did not read stays in Fast DDS's shared memory, and then this process may
# not be found by anybody new (half the times that was tried; never by UDP alone)


def test_a_subscriber_that_does_not_read_blocks_nothing(stage):
    script = (
        "import rclpy; from occflow_msgs.msg import VoxelFlow; rclpy.init(); node = rclpy.create_node('deaf'); "
        "node.create_subscription(VoxelFlow, '/occflow/occupancy', lambda _: None, 1); rclpy.spin(node)"
    )
    here = {**os.environ, "ROS_DOMAIN_ID": str(DOMAIN), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    deaf = subprocess.Popen([sys.executable, "-c", script], env=here)
    try:
        stage.until(lambda: stage.node._out.get_subscription_count() == 2)
        deaf.send_signal(signal.SIGSTOP)
        for _ in range(40):  # 80 kB each: more than a subscriber's buffers take
            stage.answer()
        assert stage.node.health.latencies_ms()["publish"]["p95"] < 100  # all but two of them
    finally:
        deaf.kill()
        deaf.wait()
