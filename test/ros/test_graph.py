"""What the node shows on the ROS graph, in one process with those who look at it: services, events, names."""

import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")

from rclpy.lifecycle import TransitionCallbackReturn as Result  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.qos import QoSProfile, ReliabilityPolicy  # noqa: E402
from sensor_msgs.msg import CompressedImage  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402

from occflow_ros import convert  # noqa: E402
from occflow_ros.node import OccupancyNode  # noqa: E402

pytestmark = [pytest.mark.dds, pytest.mark.timeout(240)]
POLICY = Path(__file__).resolve().parents[2] / "config" / "sros2" / "policy.xml"
FRONT = "/cam_front/image_raw/compressed"


class Graph:
    """The node and one who looks on, spun by hand."""

    def __init__(self, context):
        self.node = OccupancyNode(
            context=context,
            parameter_overrides=[
                Parameter("model", value="opus-nano"),
                Parameter("use_sim_time", value=True),
                Parameter("reliable_images", value=True),
            ],
        )
        self.other = rclpy.create_node("other", context=context)
        self.executor = rclpy.executors.SingleThreadedExecutor(context=context)
        for node in (self.node, self.other):
            self.executor.add_node(node)

    def until(self, holds, seconds=20.0):
        end = time.monotonic() + seconds
        while not (value := holds()) and time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.05)
        assert value
        return value

    def call(self, client):
        assert client.wait_for_service(20.0)
        asked = client.call_async(Trigger.Request())
        self.until(asked.done)
        return asked.result()

    def close(self):
        self.node.close()
        self.executor.shutdown()
        for node in (self.node, self.other):
            node.destroy_node()


@pytest.fixture(scope="module")
def graph():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=96)
        graph = Graph(context)
        assert graph.node.trigger_configure() == Result.SUCCESS
        yield graph
        graph.close()
        rclpy.try_shutdown(context=context)


@pytest.fixture
def active(graph):
    assert graph.node.trigger_activate() == Result.SUCCESS
    yield graph
    assert graph.node.trigger_deactivate() == Result.SUCCESS


def test_an_inactive_node_says_why_it_resets_nothing(graph):
    client = graph.other.create_client(Trigger, "/occflow/reset_memory")
    answer = graph.call(client)
    assert not answer.success and "not active" in answer.message


def test_a_reset_drops_what_waits_and_the_next_set_is_of_a_new_lap(active):
    collector, client = active.node._collector, active.other.create_client(Trigger, "/occflow/reset_memory")
    lap = collector.lap
    collector.add(0, 10**9, "picture", time.monotonic())
    assert collector.waiting
    answer = active.call(client)
    assert answer.success and "without memory" in answer.message
    assert collector.lap == lap + 1 and not collector.waiting
    assert active.node.health.report(0.0)[0].values["sets dropped: memory reset"] == 1
    assert "dropped: clock jump" not in active.node.health.report(0.0)[1].values
    (again,) = [collector.add(i, 10**9, "picture", time.monotonic()) for i in range(6)][-1]
    assert again.lap == lap + 1  # the same instant anew: `frame_of` makes the lap the drive, and a Stream forgets at it


def test_times_are_published_where_somebody_listens(active):
    heard = {}
    kind = convert.time_kind()

    def listen(name):
        active.other.create_subscription(kind, f"/occflow/debug/{name}", lambda m: heard.update({name: m.data}), 1)

    for name in ("cyclic_time_ms", "pipeline_latency_ms", "processing_time/network_ms"):
        listen(name)
    publishers = [active.node._out_times[n] for n in ("cyclic_time", "pipeline_latency", "processing_time/network")]
    active.until(lambda: all(p.get_subscription_count() for p in publishers))
    active.node.health.took("network", 0.25)
    active.node._publish_times(2 * 10**9, 5.0)
    active.until(lambda: len(heard) == 2)
    # the ROS clock is that of /clock and stands at 0; before the second answer there is no cycle
    assert heard == {"pipeline_latency_ms": -2000.0, "processing_time/network_ms": 250.0}
    active.node._publish_times(2 * 10**9, 5.5)
    assert active.until(lambda: heard.get("cyclic_time_ms")) == 500.0


def test_a_publisher_whose_qos_does_not_fit_is_named_with_both_sides(active):
    unfit = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    publisher = active.other.create_publisher(CompressedImage, FRONT, unfit)
    words = f"{FRONT}: a publisher offers reliability BEST_EFFORT, we ask for RELIABLE"
    active.until(lambda: words in active.node.health.report(0.0)[1].message)
    active.other.destroy_publisher(publisher)


def test_two_publishers_on_one_topic_are_a_warning_until_one_goes(active):
    def camera():
        active.node._diagnose()
        return active.node.health.report(1.0)[1].message

    first, second = (active.other.create_publisher(CompressedImage, FRONT, 1) for _ in range(2))
    active.node.health.image("cam_front", 1.0, 10**9)
    active.node.health.served(1.0, ["cam_front"])
    active.until(lambda: camera() == f"2 publishers on {FRONT}")
    active.other.destroy_publisher(second)
    active.until(lambda: camera() == "running")
    active.other.destroy_publisher(first)


def test_the_policy_allows_exactly_what_the_node_shows(active):
    def allowed(items: str, action: str) -> list[str]:
        rules = profile.findall(f"{items}[@{action}='ALLOW']/*")
        return sorted(rule.text for rule in rules)

    (profile,) = ElementTree.parse(POLICY).getroot().findall("enclaves/enclave/profiles/profile")
    assert (profile.get("ns"), profile.get("node")) == ("/", "occflow") and len(profile) == 3
    other = active.other
    for items, action, show in (
        ("topics", "publish", other.get_publisher_names_and_types_by_node),
        ("topics", "subscribe", other.get_subscriber_names_and_types_by_node),
        ("services", "reply", other.get_service_names_and_types_by_node),
    ):
        shown = []

        def same(items=items, action=action, show=show, shown=shown):
            shown[:] = sorted(name for name, _ in show("occflow", "/"))
            return shown == allowed(items, action)

        try:
            active.until(same, 10.0)
        except AssertionError:
            assert shown == allowed(items, action)
            raise
