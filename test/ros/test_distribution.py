"""Parts of the ROS distribution and our own do the same, wherever both exist. On PyPI those parts do not exist."""

import random
import sys

import pytest
import torch

from occflow_core.geometry import rigid
from occflow_ros import approximate, frames
from occflow_ros.approximate import Approximate, DistributionMatcher, Matcher
from occflow_ros.frames import DistributionPoses, Poses, TransformBuffer, TransformError

S = 1_000_000_000
MS = 1_000_000
ABSENT = "comes with a ROS distribution, not from PyPI"


def outcome(question, *arguments):
    """What came of a lookup: a pose, or what was said and whether it may still come."""
    try:
        return question(*arguments)
    except TransformError as error:
        return str(error), error.may_come


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.allclose(a, b, rtol=0, atol=1e-9)
    return type(a) is type(b) and a == b


def random_pose(rng: random.Random) -> torch.Tensor:
    near = rng.random() < 0.3  # turns of less than a degree, as between two odometry messages
    wxyz = [1.0, *(rng.uniform(-0.005, 0.005) for _ in range(3))] if near else [rng.gauss(0, 1) for _ in range(4)]
    return rigid.from_quaternion(wxyz, [rng.uniform(-50, 50) for _ in range(3)])


@pytest.fixture
def tf2():
    return pytest.importorskip("tf2_py", reason=f"tf2_ros {ABSENT}")


def transform_message(parent, child, stamp, parent_from_child):
    from geometry_msgs.msg import TransformStamped

    from occflow_ros import convert

    message = TransformStamped(child_frame_id=child)
    message.header.frame_id, message.header.stamp = parent, convert.time_message(stamp)
    q, t = message.transform.rotation, message.transform.translation
    (q.w, q.x, q.y, q.z), (t.x, t.y, t.z) = rigid.to_quaternion(parent_from_child)
    return message


@pytest.mark.parametrize("seed", range(20))
def test_tf2_and_our_buffer_know_the_same_poses_and_refuse_the_same(tf2, seed):
    """Two random trees, some frames static, stamps in any order; beside both buffers tf2's bare core."""
    from builtin_interfaces.msg import Duration

    from occflow_ros import convert

    rng = random.Random(seed)
    jump = 60.0  # s: what is out of order here is not a lap
    ours, theirs = (TransformBuffer(10.0, jump, poses) for poses in (Poses(), DistributionPoses(10.0)))
    core = tf2.BufferCore(Duration(sec=10))
    names, said = [f"f{i}" for i in range(rng.randint(4, 12))], []
    for i, child in enumerate(names):
        if i < 2:  # the roots
            continue
        parent, static = rng.choice(names[:i]), rng.random() < 0.4
        begin, end = sorted(rng.uniform(100, 109) for _ in range(2))
        stamps = [0] if static else {round(rng.uniform(begin, end) * S) for _ in range(rng.randint(1, 20))}
        said += [(parent, child, stamp, random_pose(rng), static) for stamp in stamps]
    rng.shuffle(said)
    for parent, child, stamp, pose, static in said:
        ours.add(parent, child, stamp, pose, static)
        theirs.add(parent, child, stamp, pose, static)
        put = core.set_transform_static if static else core.set_transform
        put(transform_message(parent, child, stamp, pose), "test")
    refused, roots = 0, {(parent, child) for parent, child, *_ in said if parent in names[:2]}
    for _ in range(200):
        target, source = rng.choice([*names, "nobody"]), rng.choice(names)
        stamp = rng.choice([round(rng.uniform(99, 110) * S), max(1, rng.choice(said)[2])])
        mine = outcome(ours.lookup, target, source, stamp)
        assert same(mine, outcome(theirs.lookup, target, source, stamp))
        assert ours.newest(target, source) == theirs.newest(target, source)
        try:
            core.lookup_transform_core(target, source, convert.time_message(stamp))
            assert isinstance(mine, torch.Tensor), mine
        except tf2.TransformException as problem:
            assert isinstance(mine, tuple), problem
            if (target, source) in roots:  # of a longer way tf2 may blame a frame that lies above it
                assert "only time" in str(problem) or mine[1] == ("into the future" in str(problem))
            refused += 1
    assert 0 < refused < 200


@pytest.mark.parametrize("seed", range(20))
def test_laps_repeats_new_parents_and_old_stamps_end_alike_in_both_buffers(tf2, seed):
    rng = random.Random(seed)
    ours, theirs = (TransformBuffer(2.0, 1.0, poses) for poses in (Poses(), DistributionPoses(2.0)))
    names, now = ["map", "odom", "base_link", "cam", "wheel"], 100.0
    for _ in range(400):
        now += rng.choice([0.0, 0.05, 0.1, 0.1, -0.3]) if rng.random() < 0.97 else rng.uniform(-8.0, 3.0)
        now = max(now, 50.0)
        child = rng.choice(names[1:])  # a loop may come of it
        parent = names[names.index(child) - 1] if rng.random() < 0.9 else rng.choice(names)
        stamp, pose, static = round(now * 20) * S // 20, random_pose(rng), rng.random() < 0.1
        said = []
        for buffer in (ours, theirs):
            try:
                said.append(buffer.add(parent, child, stamp, pose, static))
            except ValueError as error:
                said.append(str(error))
        assert said[0] == said[1]
        for _ in range(3):
            target, source = rng.choice(names), rng.choice(names)
            at = rng.choice([stamp, 0, round((now + rng.uniform(-4.0, 0.2)) * S)])
            assert same(outcome(ours.lookup, target, source, at), outcome(theirs.lookup, target, source, at))
            assert ours.newest(target, source) == theirs.newest(target, source)


def test_the_node_s_buffer_is_kept_by_tf2_where_it_is(tf2):
    assert frames.buffer().source == "tf2"


def test_without_tf2_the_node_s_buffer_is_our_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2_py", None)
    buffer = frames.buffer(keep=3.0, jump=0.5)
    assert (buffer.source, buffer.keep, buffer.jump) == ("ourselves", 3 * S, S // 2)


@pytest.fixture
def message_filters():
    return pytest.importorskip("message_filters", reason=f"message_filters {ABSENT}")


def stream(rng: random.Random, cameras: int) -> list[tuple[int, int]]:
    """(camera, stamp) as they arrive: loss, jitter, disorder, repetition, a silent camera, a clock turned back."""
    events, begin = [], 1000 * S
    for _ in range(rng.randint(1, 3)):
        jitter, delay, lost = rng.choice([0, 5, 40]) * MS, rng.choice([0.0, 0.03, 0.3]), rng.choice([0.0, 0.02, 0.2])
        silent, since = rng.randrange(2 * cameras), rng.randint(0, 40)
        lap = []
        for k in range(40):
            for camera in range(cameras):
                if rng.random() < lost or (camera == silent and k >= since):
                    continue
                stamp = begin + k * 83 * MS + camera * 7 * MS + rng.randint(-jitter, jitter)
                stamp -= stamp % (10 * MS) if jitter else 0  # ties: two images that are equally near
                for _ in range(1 + (rng.random() < 0.05)):
                    lap.append((k * 0.083 + rng.uniform(0, delay), camera, stamp))
        events += [(camera, stamp) for _, camera, stamp in sorted(lap)]
        begin += rng.choice([-500, -1, 5]) * S
    return events


def test_message_filters_and_our_matcher_make_the_same_sets(message_filters, monkeypatch):
    total = 0
    for seed in range(150):
        rng = random.Random(seed)
        cameras, queue, slop = rng.randint(1, 4), rng.randint(1, 12), rng.choice([0.01, 0.02, 0.03, 0.05, 0.1, 0.29])
        offsets = [c * rng.choice([0.0, 0.007]) for c in range(cameras)]
        both = []
        for kind in (Matcher, DistributionMatcher):
            monkeypatch.setattr(approximate, "matcher", lambda kind=kind: kind)
            both.append(Approximate(cameras, queue, slop, offsets))
        for i, (camera, stamp) in enumerate(stream(rng, cameras)):
            ours, theirs = (gatherer.add(camera, stamp, i, 0.0) for gatherer in both)
            assert ours == theirs, f"seed {seed}, image {i}"
            total += len(ours)
        assert both[0].dropped == both[1].dropped and both[0].lap == both[1].lap
        assert [[*q] for q in both[0]._matcher.queues] == [[*q] for q in both[1]._matcher.queues]
    assert total > 2000


def test_the_node_s_matcher_is_message_filters_where_it_is(message_filters):
    assert approximate.matcher() is DistributionMatcher


def test_without_message_filters_the_node_s_matcher_is_our_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "message_filters", None)
    assert approximate.matcher() is Matcher
