"""The built `occflow_msgs`: real ROS, small enough, and readable from its text alone."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
DEFINITION = ROOT / "msg" / "msg" / "VoxelFlow.msg"
SHAPE = (200, 200, 16)
OCCUPIED, MOVING = 40_000, 10_000


@pytest.fixture(scope="module")
def filled():
    """An rclpy VoxelFlow as large as they come."""
    pytest.importorskip("rclpy")
    from occflow_msgs.msg import VoxelFlow

    rng = np.random.default_rng(0)
    cells = int(np.prod(SHAPE))
    message = VoxelFlow()
    message.header.stamp.sec, message.header.stamp.nanosec = 1_531_281_439, 800_013_000
    message.header.frame_id = "base_link"
    message.origin.position.x, message.origin.position.y, message.origin.position.z = -40.0, -40.0, -1.0
    message.voxel_size = np.full(3, 0.4, np.float32)
    message.grid_size = np.array(SHAPE, np.uint32)
    message.index = np.sort(rng.choice(cells, OCCUPIED, replace=False)).astype(np.uint32)
    message.label = rng.integers(0, 17, OCCUPIED).astype(np.uint8)
    message.confidence = rng.integers(0, 256, OCCUPIED).astype(np.uint8)
    message.flow_index = np.sort(rng.choice(OCCUPIED, MOVING, replace=False)).astype(np.uint32)
    message.flow_velocity = rng.normal(0, 5, 2 * MOVING).astype(np.float32)
    message.unobserved = np.packbits(rng.random(cells) < 0.5, bitorder="little")
    message.cameras = ["front", "front_right", "back_right", "back", "back_left", "front_left"]
    message.cameras_expected, message.cameras_used = 0b111111, 0b110111
    message.camera_age_us = np.array([0, 5_000, 12_000, VoxelFlow.NO_IMAGE, 30_000, 43_000], np.int32)
    message.label_set, message.model_name = "occ3d-nuscenes", "opus-nano (untrained)"
    return message


def fields() -> list[str]:
    """Names of the fields in the definition, constants left out."""
    lines = (line.split("#")[0].split() for line in DEFINITION.read_text().splitlines())
    return [line[1] for line in lines if len(line) == 2 and "=" not in line[1]]


def as_arrays(message) -> dict:
    return {name: np.asarray(getattr(message, name)) for name in fields() if name not in ("header", "origin")}


def test_the_built_message_has_the_fields_of_the_definition(filled):
    assert list(filled.get_fields_and_field_types()) == fields()


def test_the_largest_usual_message_stays_below_half_a_megabyte(filled):
    from rclpy.serialization import serialize_message

    size = len(serialize_message(filled))
    assert 400_000 < size <= 500_000, size


def test_a_reader_without_ros_understands_what_rclpy_wrote(filled):
    """Header and origin too: everything arrives equal, by the text of the definition alone."""
    from rclpy.serialization import serialize_message
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    store.register(get_types_from_msg(DEFINITION.read_text(), "occflow_msgs/msg/VoxelFlow"))
    read = store.deserialize_cdr(serialize_message(filled), "occflow_msgs/msg/VoxelFlow")
    for name, value in as_arrays(filled).items():
        assert np.array_equal(as_arrays(read)[name], value), name
    assert (read.header.stamp.sec, read.header.stamp.nanosec) == (1_531_281_439, 800_013_000)
    assert read.header.frame_id == "base_link"
    assert (read.origin.position.x, read.origin.position.y, read.origin.position.z) == (-40.0, -40.0, -1.0)
    assert read.origin.orientation.w == 1.0
    assert read.NO_IMAGE == filled.NO_IMAGE == np.iinfo(np.int32).min


def test_rclpy_reads_what_a_writer_without_ros_wrote(filled):
    from rclpy.serialization import deserialize_message, serialize_message
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    store.register(get_types_from_msg(DEFINITION.read_text(), "occflow_msgs/msg/VoxelFlow"))
    read = store.deserialize_cdr(serialize_message(filled), "occflow_msgs/msg/VoxelFlow")
    written = bytes(store.serialize_cdr(read, "occflow_msgs/msg/VoxelFlow"))
    assert deserialize_message(written, type(filled)) == filled


def test_the_readme_reader_reads_the_message(filled):
    """The code in msg/README.md is run as it stands there, and agrees with a slow loop."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "msg" / "README.md").read_text(), re.S).group(1)
    assert max(len(f.strip().splitlines()) for f in code.split("\n\n\n")) <= 20
    names = {"np": np}
    exec(code, names)
    centres, labels, confidence, velocity = names["voxels"](filled)
    unknown = names["unknown"](filled)
    moving = {int(k): filled.flow_velocity[2 * m : 2 * m + 2] for m, k in enumerate(filled.flow_index)}
    occupied = set(map(int, filled.index))
    nx, ny, nz = SHAPE
    for k in range(0, OCCUPIED, 97):
        i = int(filled.index[k])
        cell = np.array([i % nx, i // nx % ny, i // (nx * ny)])
        np.testing.assert_allclose(centres[k], [-40, -40, -1] + (cell + 0.5) * 0.4, atol=1e-5)
        np.testing.assert_array_equal(velocity[k], moving.get(k, [0, 0]))
        assert labels[k] == filled.label[k] and confidence[k] == pytest.approx(filled.confidence[k] / 255)
        assert not unknown[tuple(cell)]
    for i in range(0, nx * ny * nz, 997):
        bit = filled.unobserved[i >> 3] >> (i & 7) & 1
        assert unknown[i % nx, i // nx % ny, i // (nx * ny)] == (bit == 1 and i not in occupied)


def test_every_field_is_explained_and_the_class_tables_are_ours():
    from occflow_core.types import TABLES

    text = DEFINITION.read_text()
    said = " ".join(text.replace("#", " ").split())
    for table in TABLES.values():
        names = re.search(rf'"{table.table}" (.*?); free would be (\d+)', said)
        listed = dict(re.findall(r"(\d+) (\w+)", names.group(1)))
        assert int(names.group(2)) == table.free == len(listed)
        assert all(table.id(name) == int(number) for number, name in listed.items())
    before = ""
    for line in text.splitlines():
        if line and not line.startswith("#"):
            assert before, f"{line!r} stands without a word"
        before = line


@pytest.mark.skipif(not (Path(sys.prefix) / "share/occflow_msgs").is_dir(), reason="the messages are built elsewhere")
def test_type_hashes_are_those_of_an_independent_reader():
    """Equal hashes: to nodes elsewhere and to their bags the types are the same. tf2_msgs is built here too."""
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    store.register(get_types_from_msg(DEFINITION.read_text(), "occflow_msgs/msg/VoxelFlow"))
    for name in ("occflow_msgs/msg/VoxelFlow", "tf2_msgs/msg/TFMessage"):
        told = json.loads((Path(sys.prefix) / "share" / f"{name}.json").read_text())["type_hashes"]
        hashes = {entry["type_name"]: entry["hash_string"] for entry in told}
        assert hashes[name] == store.hash_rihs01(name), name
