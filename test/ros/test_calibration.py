"""CameraInfo while the node runs: what repeats costs nothing, what changes is said once and holds from then on."""

import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from occflow_ros import convert  # noqa: E402

TOPIC = "/cam_front/camera_info"


@pytest.fixture
def node(monkeypatch):
    from rclpy.lifecycle import TransitionCallbackReturn
    from rclpy.parameter import Parameter

    from occflow_ros.node import OccupancyNode

    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=99)
    node = OccupancyNode(context=context)
    node.set_parameters([Parameter("model", value="opus-nano")])
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    yield node
    node.close()
    node.destroy_node()
    rclpy.try_shutdown(context=context)


def info(focus=800.0, bend=(), model="plumb_bob"):
    from sensor_msgs.msg import CameraInfo

    message = CameraInfo(height=900, width=1600, distortion_model=model, d=list(bend))
    message.k = [focus, 0.0, 800.0, 0.0, focus, 450.0, 0.0, 0.0, 1.0]
    message.header.frame_id = "cam_front"
    return message


@pytest.mark.dds
def test_a_camera_info_that_repeats_is_read_once_and_one_that_changes_is_said_once(node, monkeypatch):
    read, said = [], []
    whole = convert.calibration
    monkeypatch.setattr(convert, "calibration", lambda *a: read.append(a) or whole(*a))
    monkeypatch.setattr(node, "_say", lambda key, sentence: said.append((key, sentence)))
    for k in range(30):
        message = info()
        message.header.stamp.sec = k
        node._on_info(message, 0, "cam_front")
    first = node._calibrations[0]
    assert len(read) == 1 and not said and first.lens is None
    for _ in range(30):
        node._on_info(info(810.0, (-0.3, 0.1, 0.0, 0.0, 0.0)), 0, "cam_front")
    assert len(read) == 2 and node._calibrations[0].lens is not None
    ((key, sentence),) = said
    assert key == "cam_front CameraInfo"
    assert sentence == (
        f"{TOPIC} changed: it was 1600 x 900 pixels in cam_front, fx 800 fy 800 cx 800 cy 450; it is 1600 x 900 pixels "
        "in cam_front, fx 810 fy 810 cx 800 cy 450, plumb_bob [-0.3, 0.1, 0.0, 0.0, 0.0], without it fx 810 fy 810 "
        "cx 800 cy 450"
    )


@pytest.mark.dds
def test_a_camera_info_that_no_longer_holds_masks_its_camera_until_one_does(node, monkeypatch):
    said = []
    monkeypatch.setattr(node, "_say", lambda key, sentence: said.append(sentence))
    node._on_info(info(), 0, "cam_front")
    for _ in range(3):  # each is counted, the change is said once
        node._on_info(info(bend=(0.1,), model="fov"), 0, "cam_front")
        assert node._calibrations[0] is None
    assert sum(" changed: it was 1600 x 900" in sentence for sentence in said) == 1
    assert node.health.report(0.0)[1].values["dropped: unusable CameraInfo"] == 3
    assert (
        sum(sentence.startswith(f"{TOPIC}: refused: CameraInfo with distortion model 'fov'") for sentence in said) == 3
    )
    node._on_info(info(), 0, "cam_front")
    assert node._calibrations[0].pixels_from_camera[0, 0] == 800
