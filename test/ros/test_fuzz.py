"""Whatever arrives is taken, or refused in words: no other exception, and no memory that a header asks for."""

import contextlib
import tracemalloc
from dataclasses import fields
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import simplejpeg
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from occflow_core.runtime.prepare import Rectifier
from occflow_ros import convert
from occflow_ros.assemble import Calibration
from occflow_ros.convert import RAW_ENCODINGS, Refused
from occflow_ros.frames import TransformBuffer
from occflow_ros.parameters import CameraSettings, ParameterProblem, Settings

MANY = 80  # examples of a kind; the words of a failure say which
fuzz = settings(max_examples=MANY, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

UINT32 = st.one_of(
    st.integers(0, 70), st.sampled_from([0, 1, 16384, 16385, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1)
)
FLOAT = st.one_of(
    st.floats(), st.sampled_from([0.0, -0.0, 1.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")])
)
TEXT = st.one_of(st.sampled_from(["", "/", "cam", "base_link"]), st.text(max_size=8))
STAMP = st.builds(lambda s, n: SimpleNamespace(sec=s, nanosec=n), st.integers(-(2**31), 2**31 - 1), UINT32)
HEADER = st.builds(lambda stamp, frame: SimpleNamespace(stamp=stamp, frame_id=frame), STAMP, TEXT)
MEMORY = 64 << 20  # bytes that no small message may cost


def message(**fields):
    """Messages as SimpleNamespaces of these fields, each drawn by its strategy."""
    return st.builds(SimpleNamespace, **fields)


def changed(given: SimpleNamespace, changes: dict) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(given), **changes})


def mostly_right(right, **fields):
    """A message that is right but for a few fields."""
    wrong = st.fixed_dictionaries({}, optional=fields)
    return st.one_of(right, st.builds(changed, right, wrong), message(**fields))


@st.composite
def whole_image(draw):
    encoding = draw(st.sampled_from(sorted(RAW_ENCODINGS)))
    height, width = 2 * draw(st.integers(2, 8)), 2 * draw(st.integers(2, 8))
    step = width * RAW_ENCODINGS[encoding][0] + draw(st.integers(0, 5))
    return SimpleNamespace(
        header=draw(HEADER),
        encoding=encoding,
        height=height,
        width=width,
        step=step,
        is_bigendian=1,
        data=bytes(step * height),
    )


IMAGE = mostly_right(
    whole_image(),
    header=HEADER,
    encoding=st.one_of(st.sampled_from([*RAW_ENCODINGS, "BGR8", "16UC1", "bayer_rggb16", "nv21"]), TEXT),
    height=UINT32,
    width=UINT32,
    step=UINT32,
    is_bigendian=st.integers(0, 255),
    data=st.binary(max_size=4000),
)


def taken(convert_it, *arguments):
    """What became of a message; None where it was refused. Anything else than Refused, and memory, is the failure."""
    tracemalloc.start()
    try:
        return convert_it(*arguments)
    except Refused as refused:
        assert refused.reason and str(refused) and "\n" not in refused.reason
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY, f"{peak} bytes"


def look(picture) -> None:
    """Decodes a picture that was taken, unless it is large."""
    if picture is None or picture.height * picture.width > 1 << 20:
        return
    out = np.empty((picture.height, picture.width, 3), np.uint8)
    with contextlib.suppress(ValueError):  # Refused is one
        picture.decode_into(out)


@fuzz
@given(IMAGE)
def test_any_image_is_taken_or_refused(image):
    look(taken(convert.raw_picture, image))


ROUND = np.indices((24, 32)).sum(0)[..., None].repeat(3, axis=-1).astype(np.uint8) * 4
FILES = {
    "jpeg": simplejpeg.encode_jpeg(ROUND),
    "grey jpeg": simplejpeg.encode_jpeg(ROUND[..., :1].copy(), colorspace="GRAY"),
    "progressive": cv2.imencode(".jpg", ROUND, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes(),
    "png": cv2.imencode(".png", ROUND)[1].tobytes(),
    "deep png": cv2.imencode(".png", ROUND.astype(np.uint16) * 256)[1].tobytes(),
    "grey png": cv2.imencode(".png", ROUND[..., 0])[1].tobytes(),
}


@st.composite
def broken_file(draw):
    data = bytearray(draw(st.sampled_from(sorted(FILES.values()))))
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=6)):
        data[place] = value
    begin, end = draw(st.integers(0, 40)) if draw(st.booleans()) else 0, draw(st.integers(0, len(data)))
    return bytes(data[begin:] if draw(st.booleans()) else data[:end])


@fuzz
@given(st.one_of(broken_file(), st.binary(max_size=300)), TEXT)
def test_any_compressed_image_is_taken_or_refused(data, kind):
    look(taken(convert.compressed_picture, SimpleNamespace(data=data, format=kind)))


def floats(count: int):
    return st.lists(FLOAT, min_size=count, max_size=count)


def right_info(model="plumb_bob", bend=(-0.3, 0.1, 0.0, 0.0, 0.0)):
    k = [80.0, 0.0, 64.0, 0.0, 80.0, 36.0, 0.0, 0.0, 1.0]
    return SimpleNamespace(
        header=SimpleNamespace(frame_id="cam"),
        height=72,
        width=128,
        distortion_model=model,
        d=list(bend),
        k=k,
        r=np.eye(3).ravel().tolist(),
        p=[80.0, 0.0, 64.0, 0.0, 0.0, 80.0, 36.0, 0.0, 0.0, 0.0, 1.0, 0.0],
        binning_x=0,
        binning_y=0,
        roi=SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0),
    )


BENDS = st.one_of(
    st.lists(FLOAT, max_size=16),
    *(st.lists(st.one_of(st.floats(-2, 2), FLOAT), min_size=n, max_size=n) for n in (4, 5, 8, 12, 14)),
    *(st.lists(st.floats(-2, 2), min_size=n, max_size=n) for n in (4, 5, 8, 12)),
)
INFO = mostly_right(
    st.builds(right_info, st.sampled_from(["plumb_bob", "rational_polynomial", "equidistant"]), BENDS),
    header=HEADER,
    height=UINT32,
    width=UINT32,
    distortion_model=st.one_of(st.sampled_from(["plumb_bob", "rational_polynomial", "equidistant", "fov"]), TEXT),
    d=BENDS,
    k=floats(9),
    r=floats(9),
    p=floats(12),
    binning_x=UINT32,
    binning_y=UINT32,
    roi=message(x_offset=UINT32, y_offset=UINT32, width=UINT32, height=UINT32),
)


@fuzz
@given(INFO, st.booleans())
def test_any_camera_info_is_taken_or_refused_and_so_is_its_lens(info, rectified):
    known = taken(convert.calibration, info, rectified)
    assert convert.told(info) == convert.told(info)
    if known is None:
        return
    assert isinstance(known, Calibration) and str(known) and np.isfinite(known.pixels_from_camera).all()
    if known.lens is not None:
        try:
            way = Rectifier(known.lens, known.pixels_from_camera, known.pinhole, (known.height, known.width), (32, 56))
        except ValueError as problem:
            assert "leaves no pinhole picture" in str(problem)
        else:
            assert np.isfinite(way.pixels_from_camera).all() and 1 <= way.zoom <= 4


@st.composite
def whole_cloud(draw):
    count = draw(st.integers(0, 4))
    fields = [
        SimpleNamespace(name=n, offset=4 * i, datatype=7, count=1) for i, n in enumerate(("x", "y", "z", "intensity"))
    ]
    values = np.array(draw(st.lists(floats(4), min_size=count, max_size=count)), np.float64).reshape(count, 4)
    with np.errstate(over="ignore"):
        data = values.astype(np.float32).tobytes()
    return SimpleNamespace(
        header=draw(HEADER),
        height=1,
        width=count,
        fields=fields,
        is_bigendian=False,
        point_step=16,
        row_step=16 * count,
        data=data,
    )


FIELD = message(
    name=st.one_of(st.sampled_from(["x", "y", "z", "intensity", "ring"]), TEXT),
    offset=UINT32,
    datatype=st.integers(0, 255) | st.integers(0, 9),
    count=UINT32,
)
CLOUD = mostly_right(
    whole_cloud(),
    header=HEADER,
    height=UINT32,
    width=UINT32,
    fields=st.lists(FIELD, max_size=6),
    is_bigendian=st.booleans(),
    point_step=UINT32,
    row_step=UINT32,
    data=st.binary(max_size=300),
)


@fuzz
@given(CLOUD)
def test_any_cloud_is_taken_or_refused(cloud):
    known = taken(convert.cloud, cloud)
    assert known is None or (known.points.shape[1] == 5 and np.isfinite(known.points).all())


TRANSFORM = message(
    header=HEADER,
    child_frame_id=TEXT,
    transform=message(
        rotation=message(x=FLOAT, y=FLOAT, z=FLOAT, w=FLOAT), translation=message(x=FLOAT, y=FLOAT, z=FLOAT)
    ),
)


@fuzz
@given(st.lists(st.tuples(TRANSFORM, st.booleans()), max_size=6))
def test_any_transform_is_taken_or_refused_by_the_buffer_too(transforms):
    buffer = TransformBuffer()
    for stamped, static in transforms:
        known = taken(convert.transform, stamped)
        if known is not None:
            try:
                buffer.add(*known, static)
            except ValueError as refused:  # as the node expects it
                assert str(refused)


# ---- parameters: any YAML


class Log:
    """Keeps what a logger is told."""

    def __init__(self):
        self.errors = []

    def error(self, sentence):
        self.errors.append(sentence)

    def info(self, sentence):
        pass

    warning = info


WORD = st.one_of(
    st.sampled_from(
        ["", "/", "a b", "~", "~/x", "cpu", "cuda:99", "cuda:x", "opus-nano", "{}", "{x}", "a/b", "a.b", "/\U0001f697"]
    ),
    st.text(max_size=8),
)
NUMBER = st.one_of(
    st.floats(0.05, 1.0), st.floats(), st.sampled_from([float("nan"), float("inf"), -0.0, 1e-300, 1e300])
)
OF_KIND = {
    str: WORD,
    float: NUMBER,
    int: st.integers(0, 8) | st.integers(-(2**63), 2**63 - 1),
    bool: st.booleans(),
    tuple: st.lists(WORD, max_size=9) | st.lists(st.sampled_from(["a", "b", "cam_front"]), unique=True),
}
ANYTHING = st.one_of(*OF_KIND.values(), st.lists(st.integers(0, 9), max_size=3), st.lists(st.booleans(), max_size=3))


def some_of(kind, skip: str = ""):
    """A few parameters of a dataclass, one in six of them of another type than it must be."""
    values = {
        f.name: st.integers(0, 5).flatmap(lambda n, f=f: OF_KIND[type(f.default)] if n else ANYTHING)
        for f in fields(kind)
        if f.name != skip
    }
    chosen = st.lists(st.sampled_from(sorted(values)), max_size=3, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({name: values[name] for name in names}))


YAML = st.builds(
    lambda model, known, cameras, other: model | known | cameras | other,
    st.just({"model": "opus-nano"}),
    some_of(Settings, skip="camera"),
    st.one_of(
        st.just({}), st.builds(lambda c: {"camera": c}, st.dictionaries(st.just("cam_front"), some_of(CameraSettings)))
    ),
    st.one_of(*[st.just({})] * 5, st.dictionaries(st.text(max_size=6), ANYTHING, max_size=1)),
)


@pytest.fixture(scope="module")
def context():
    rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
    context = rclpy.Context()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        rclpy.init(context=context, domain_id=100)
        yield context
        rclpy.try_shutdown(context=context)


@pytest.mark.dds
@settings(parent=fuzz, max_examples=25)
@given(values=YAML)
def test_any_parameters_are_taken_or_end_in_one_sentence(context, tmp_path_factory, values):
    """The node is made and configured as `main` does it; what it would load and warm up is not the question here."""
    from rclpy.lifecycle import TransitionCallbackReturn

    from occflow_ros import node as module

    path = tmp_path_factory.mktemp("fuzz") / "parameters.yaml"
    path.write_text(yaml.safe_dump({"/**": {"ros__parameters": values}}, allow_unicode=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Stream, "warm_up", lambda *_: None)
        patch.setattr(module.torch, "set_num_threads", lambda _: None)
        try:
            node = module.OccupancyNode(context=context, cli_args=["--ros-args", "--params-file", str(path)])
        except (ParameterProblem, RuntimeError, ValueError) as problem:  # what `main` says in one sentence
            assert str(problem)
            return
        try:
            log = Log()
            patch.setattr(node, "get_logger", lambda: log)
            if node.trigger_configure() == TransitionCallbackReturn.SUCCESS:
                assert not log.errors
                node.trigger_activate()
            assert node._state_machine.current_state[1] in ("unconfigured", "inactive", "active")
            failed = node._state_machine.current_state[1] != "active"
            assert len(log.errors) == failed and not any("\n" in e.strip() or "Traceback" in e for e in log.errors)
        finally:
            node.close()
            node.destroy_node()


@pytest.mark.parametrize("name", ["", "gpu", "cpu:1", "cuda:x", "cuda:9999"])
def test_a_device_that_is_not_here_is_refused_with_what_there_is(name):
    module = pytest.importorskip("occflow_ros.node", reason="needs ROS 2")
    with pytest.raises(ParameterProblem, match=rf"device: '{name}' is not here; .*this machine has \d+ of cuda"):
        module._device(name)
