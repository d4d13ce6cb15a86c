"""Parts of the ROS distribution and our own do the same, wherever both exist. On PyPI those parts do not exist."""

import random
import sys

import numpy as np
import pytest
import torch

from occflow_core import pointcloud
from occflow_core.geometry import rigid
from occflow_ros import approximate, convert, frames
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

    message = TransformStamped(child_frame_id=child)
    message.header.frame_id, message.header.stamp = parent, convert.time_message(stamp)
    q, t = message.transform.rotation, message.transform.translation
    (q.w, q.x, q.y, q.z), (t.x, t.y, t.z) = rigid.to_quaternion(parent_from_child)
    return message


def test_tf2_and_our_buffer_know_the_same_poses_and_refuse_the_same(tf2):
    for seed in range(20):
        in_two_trees(tf2, seed)


def in_two_trees(tf2, seed: int) -> None:
    """Two random trees, some frames static, stamps in any order; beside both buffers tf2's bare core."""
    from builtin_interfaces.msg import Duration

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


def test_laps_repeats_new_parents_and_old_stamps_end_alike_in_both_buffers(tf2):
    for seed in range(20):
        whatever_comes(seed)


def whatever_comes(seed: int) -> None:
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


@pytest.fixture
def point_cloud2():
    return pytest.importorskip("sensor_msgs_py.point_cloud2", reason=f"sensor_msgs_py {ABSENT}")


KINDS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}  # sensor_msgs/PointField


def random_cloud(rng: random.Random, big: bool = False):
    """A PointCloud2 with fields in any order and of any type, padding between and behind, NaN, organised or not."""
    from sensor_msgs.msg import PointCloud2, PointField

    names = ["x", "y", "z", *rng.sample(["intensity", "ring", "time", "azimuth", "return_type"], rng.randint(0, 5))]
    rng.shuffle(names)
    fields, end = [], 0
    for name in names:
        kind = rng.choice([7, 7, 8]) if name in "xyz" else rng.choice([*KINDS])
        end += rng.choice([0, 0, 1, 4])
        fields.append(PointField(name=name, offset=end, datatype=kind, count=1))
        end += np.dtype(KINDS[kind]).itemsize
    height, width, step = rng.choice([1, 1, 4]), rng.randint(1, 60), end + rng.choice([0, 3, 8])
    message = PointCloud2(height=height, width=width, point_step=step, row_step=step * width, is_bigendian=big)
    message.header.frame_id, message.header.stamp.sec = "lidar", 5
    message.fields, message.is_dense = fields, rng.random() < 0.5
    message.data.frombytes(rng.randbytes(step * width * height))
    cloud = pointcloud.fields(message, names)
    for field in fields:
        if field.datatype in (7, 8):  # random bits hold numbers that float32 cannot
            values = [rng.choice([rng.uniform(-99, 99)] * 5 + [np.nan, np.inf]) for _ in range(len(cloud))]
            cloud[field.name] = values
    return message, names


@pytest.mark.parametrize("big", [False, True])
def test_sensor_msgs_py_and_our_reading_find_the_same_points(point_cloud2, monkeypatch, big):
    points = 0
    for seed in range(150):
        message, names = random_cloud(random.Random(seed), big)
        before = bytes(message.data)
        ours, by_node = pointcloud.fields(message, names), convert.cloud_fields(message, names)
        assert by_node.tobytes() == ours.tobytes() or all(
            np.array_equal(by_node[name], ours[name], equal_nan=True) for name in names
        )
        with_it = outcome_of_cloud(message)
        monkeypatch.setattr(convert, "point_cloud2", None)
        without = outcome_of_cloud(message)
        monkeypatch.undo()
        assert np.array_equal(with_it, without, equal_nan=True)
        points += len(with_it)
        assert bytes(message.data) == before
        values = {name: ours[name].astype(ours[name].dtype.newbyteorder("=")) for name in names}
        theirs = point_cloud2.read_points(message, names)  # turns a big-endian message itself round
        assert all(theirs[name].tobytes() == values[name].tobytes() for name in names)
        assert (bytes(message.data) != before) == big
    assert points > 2000


def outcome_of_cloud(message) -> np.ndarray:
    try:
        return convert.cloud(message).points
    except convert.Refused as refused:
        assert refused.reason == "empty cloud"
        return np.zeros((0, 5), np.float32)


@pytest.mark.parametrize("change", ["count 0", "unknown type", "twice"])
def test_clouds_that_sensor_msgs_py_refuses_are_read_all_the_same(point_cloud2, change):
    message, _ = next(c for c in map(random_cloud, map(random.Random, range(50))) if len(c[1]) > 4)
    other = next(f for f in message.fields if f.name not in ("x", "y", "z"))
    expected = convert.cloud(message).points[:, :3]
    if change == "count 0":
        other.count = 0
    elif change == "unknown type":
        other.datatype = 99
    else:
        message.fields = [*message.fields, other]
    with pytest.raises((AssertionError, KeyError)):
        point_cloud2.read_points(message, ["x", "y", "z"])
    assert np.array_equal(convert.cloud(message).points[:, :3], expected)


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_sensor_msgs_py_and_we_write_the_same_cloud(point_cloud2, monkeypatch, count):
    from sensor_msgs.msg import PointField
    from std_msgs.msg import Header

    rng = np.random.default_rng(count)
    cloud = np.frombuffer(rng.bytes(count * convert.POINT.itemsize), convert.POINT)
    fields = [
        PointField(name=name, offset=convert.POINT.fields[name][1], datatype=2 if name == "class_id" else 7, count=1)
        for name in convert.POINT.names[:-1]
    ]
    header = Header(frame_id="base_link")
    with_it = convert.cloud_message(header, fields, cloud)
    monkeypatch.setattr(convert, "point_cloud2", None)
    assert with_it == convert.cloud_message(header, fields, cloud)
    assert len(with_it.data) == count * convert.POINT.itemsize


@pytest.mark.parametrize("encoding", convert.RAW_ENCODINGS)
@pytest.mark.parametrize("padding", [0, 12])
def test_cv_bridge_and_our_views_see_the_same_rgb(encoding, padding):
    """We use none of it: a picture is decoded straight into the batch, by a view of the message's bytes."""
    cv_bridge = pytest.importorskip("cv_bridge", reason=f"cv_bridge {ABSENT}")
    from sensor_msgs.msg import Image

    bridge, (height, width) = cv_bridge.CvBridge(), (24, 32)
    try:
        kind, channels = bridge.encoding_to_dtype_with_channels(encoding)
    except cv_bridge.CvBridgeError:
        pytest.skip(f"cv_bridge does not know {encoding}")
    step = width * channels * np.dtype(kind).itemsize + padding
    message = Image(encoding=encoding, height=height, width=width, step=step)
    message.data.frombytes(random.Random(7).randbytes(height * step))
    ours = np.zeros((height, width, 3), np.uint8)
    convert.raw_picture(message).decode_into(ours)
    assert np.array_equal(ours, bridge.imgmsg_to_cv2(message, desired_encoding="rgb8"))
