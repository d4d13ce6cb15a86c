"""TF's laws: interpolation inside what was heard, an error outside, and never an identity nobody sent.

They hold for poses that we keep, and for those that tf2 keeps where the distribution brings it.
"""

import threading
from importlib.util import find_spec

import pytest
import torch

from occflow_core.geometry import rigid
from occflow_ros.frames import KEEP, DistributionPoses, Poses, TransformBuffer, TransformError

S = 1_000_000_000


def pose(x=0.0, yaw=0.0) -> torch.Tensor:
    half = torch.tensor(yaw / 2)
    return rigid.from_quaternion((torch.cos(half), 0, 0, torch.sin(half)), (x, 0.0, 0.0))


def kept_by_tf2() -> DistributionPoses:
    return DistributionPoses(KEEP)


@pytest.fixture(params=[Poses, kept_by_tf2] if find_spec("tf2_py") else [Poses])
def buffer(request) -> TransformBuffer:
    b = TransformBuffer(poses=request.param())
    b.add("base_link", "cam", 0, pose(1.7, 0.3), static=True)
    b.add("map", "base_link", 10 * S, pose(0.0, 0.0), static=False)
    b.add("map", "base_link", 11 * S, pose(10.0, 1.0), static=False)
    return b


def test_a_static_transform_holds_at_any_time(buffer):
    for stamp in (0, 5 * S, 10**6 * S):
        assert torch.allclose(buffer.lookup("base_link", "cam", stamp), pose(1.7, 0.3))


def test_between_two_stamps_it_is_linear_and_slerp(buffer):
    assert torch.allclose(buffer.lookup("map", "base_link", 10 * S + S // 4), pose(2.5, 0.25), atol=1e-6)


def test_at_a_stamp_it_is_what_was_sent(buffer):
    assert torch.allclose(buffer.lookup("map", "base_link", 11 * S), pose(10.0, 1.0))


def test_there_and_back_is_the_identity_and_chains_multiply(buffer):
    there, back = buffer.lookup("map", "cam", 10 * S), buffer.lookup("cam", "map", 10 * S)
    assert torch.allclose(there @ back, torch.eye(4, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(there, pose(0.0) @ pose(1.7, 0.3))


def test_transforms_that_come_out_of_order_are_sorted(buffer):
    buffer.add("map", "base_link", 10 * S + S // 2, pose(9.0), static=False)
    assert torch.allclose(buffer.lookup("map", "base_link", 10 * S + 3 * S // 4)[0, 3], torch.tensor(9.5).double())


def test_what_a_frame_said_first_about_a_stamp_holds(buffer):
    buffer.add("map", "base_link", 11 * S, pose(20.0), static=False)
    assert torch.allclose(buffer.lookup("map", "base_link", 11 * S), pose(10.0, 1.0))
    assert torch.allclose(buffer.lookup("map", "base_link", 10 * S + S // 2)[0, 3], torch.tensor(5.0).double())


def test_a_frame_that_gets_another_parent_begins_anew(buffer):
    buffer.add("odom", "base_link", 10 * S + S // 2, pose(3.0), static=False)
    assert torch.allclose(buffer.lookup("odom", "base_link", 10 * S + S // 2), pose(3.0))
    for parent, stamp in (("map", 10 * S), ("odom", 10 * S), ("odom", 11 * S)):
        with pytest.raises(TransformError):
            buffer.lookup(parent, "base_link", stamp)


@pytest.mark.parametrize(
    ("stamp", "words"), [(12 * S, "newest is 11.000"), (9 * S, "oldest is 10.000"), (0, "oldest is 10.000")]
)
def test_it_never_extrapolates_and_says_what_it_has(buffer, stamp, words):
    with pytest.raises(TransformError, match=f"map <- base_link.*{words}"):
        buffer.lookup("map", "base_link", stamp)


def test_unknown_frames_are_named_never_guessed(buffer):
    with pytest.raises(TransformError, match="TF has not named cam_left .heard of: base_link, cam, map"):
        buffer.lookup("base_link", "cam_left", 10 * S)
    with pytest.raises(TransformError, match="nothing at all"):
        TransformBuffer().lookup("base_link", "cam", 0)


def test_two_trees_that_do_not_touch_are_said_to_be_two(buffer):
    buffer.add("elsewhere", "lidar", 0, pose(), static=True)
    with pytest.raises(TransformError, match="nothing joins"):
        buffer.lookup("base_link", "lidar", 10 * S)


def test_a_loop_is_an_error_not_a_hang(buffer):
    buffer.add("cam", "map", 0, pose(), static=True)
    with pytest.raises(TransformError, match="loop"):
        buffer.lookup("base_link", "elsewhere", 10 * S)


def test_stamps_that_go_back_drop_the_lap_before_and_keep_what_is_static(buffer):
    buffer.add("map", "base_link", 1 * S, pose(-5.0), static=False)
    assert torch.allclose(buffer.lookup("map", "base_link", 1 * S), pose(-5.0))
    with pytest.raises(TransformError):
        buffer.lookup("map", "base_link", 10 * S + S // 2)
    buffer.lookup("base_link", "cam", 1 * S)


def test_where_time_is_turned_back_all_that_moves_is_forgotten_and_what_is_static_is_not(buffer):
    buffer.add("base_link", "wheel", 11 * S, pose(), static=False)
    buffer.turned_back(1 * S)
    for source in ("base_link", "wheel"):
        with pytest.raises(TransformError, match="TF has not named"):
            buffer.lookup("map", source, 10 * S + S // 2)
    buffer.lookup("base_link", "cam", 1 * S)
    buffer.add("map", "base_link", 1 * S, pose(-5.0), static=False)
    buffer.turned_back(S // 2)  # what the new lap has said already stays
    assert torch.allclose(buffer.lookup("map", "base_link", 1 * S), pose(-5.0))


def test_one_late_transform_costs_its_own_frame_only(buffer):
    buffer.add("base_link", "wheel", 11 * S, pose(), static=False)
    buffer.add("base_link", "wheel", 9 * S, pose(), static=False)
    assert torch.allclose(buffer.lookup("map", "base_link", 11 * S), pose(10.0, 1.0))


def test_a_stale_publisher_does_not_wipe_what_others_say(buffer):
    for k in range(5):
        buffer.add("base_link", "wheel", 2 * S + k, pose(), static=False)  # nine seconds behind the car's own pose
    assert torch.allclose(buffer.lookup("map", "base_link", 11 * S), pose(10.0, 1.0))
    with pytest.raises(ValueError, match="base_link <- wheel has no stamp"):
        buffer.add("base_link", "wheel", 0, pose(), static=False)
    assert torch.allclose(buffer.lookup("map", "base_link", 11 * S), pose(10.0, 1.0))


@pytest.mark.parametrize(("source", "stamp"), [("nobody", 11 * S), ("base_link", 5 * S), ("wheel", 9 * S)])
def test_nobody_waits_for_what_cannot_come(buffer, monkeypatch, source, stamp):
    buffer.add("base_link", "wheel", 8 * S, pose(), static=False)  # this one may still come, the car's own pose cannot
    monkeypatch.setattr(buffer._condition, "wait", lambda *_: pytest.fail("it waited"), raising=False)
    with pytest.raises(TransformError):
        buffer.wait("map", source, stamp, 60.0)


def test_history_is_bounded(buffer):
    for k in range(1000):
        buffer.add("map", "base_link", 11 * S + k * S // 10, pose(k), static=False)
    assert len(buffer._edges["base_link"].stamps) <= 102


def test_waiting_ends_when_the_transform_arrives(buffer):
    timer = threading.Timer(0.05, lambda: buffer.add("map", "base_link", 12 * S, pose(20.0, 1.0), static=False))
    timer.start()
    assert torch.allclose(buffer.wait("map", "base_link", 11 * S + S // 2, 2.0)[0, 3], torch.tensor(15.0).double())


def test_waiting_is_bounded(buffer):
    with pytest.raises(TransformError):
        buffer.wait("map", "base_link", 99 * S, 0.02)


def test_frames_without_a_name_are_refused(buffer):
    with pytest.raises(ValueError, match="two different frames"):
        buffer.add("", "cam", 0, pose(), static=True)


def test_a_chain_is_known_up_to_the_newest_of_its_slowest_transform(buffer):
    assert buffer.newest("map", "cam") == buffer.newest("map", "base_link") == 11 * S
    buffer.add("earth", "map", 10 * S + S // 2, pose(1.0), static=False)
    assert buffer.newest("earth", "base_link") == 10 * S + S // 2
    assert buffer.newest("map", "base_link") == 11 * S  # what joins both to the earth does not matter between them


def test_what_is_unknown_or_static_has_no_newest(buffer):
    for target, source in (("odom", "base_link"), ("map", "cam_left"), ("base_link", "cam"), ("map", "map")):
        assert buffer.newest(target, source) is None
