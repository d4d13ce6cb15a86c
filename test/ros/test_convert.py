"""Messages are checked before they are used; what cannot be used is refused with what came and what was expected."""

import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import simplejpeg
import torch

from occflow_core.geometry import Grid
from occflow_core.types import OPENOCC, Prediction
from occflow_core.voxelflow import NO_IMAGE, unpack
from occflow_ros import convert
from occflow_ros.convert import Refused

H, W = 24, 32


def rgb(seed=0) -> np.ndarray:
    smooth = np.linspace(0, 200, W)[None, :, None] + np.linspace(0, 40, H)[:, None, None] + np.array([0, 10, 15 * seed])
    return np.clip(smooth, 0, 255).astype(np.uint8)


def raw(picture, encoding, step=None, height=H, width=W):
    rows = picture.reshape(picture.shape[0], -1)
    step = rows.shape[1] if step is None else step
    padded = np.zeros((picture.shape[0], step), np.uint8)
    padded[:, : min(step, rows.shape[1])] = rows[:, :step]
    return SimpleNamespace(encoding=encoding, height=height, width=width, step=step, data=padded.tobytes())


def compressed(data: bytes, kind="jpeg"):
    return SimpleNamespace(format=kind, data=data)


def decoded(picture) -> np.ndarray:
    out = np.full((picture.height, picture.width, 3), 77, np.uint8)
    picture.decode_into(out)
    return out


@pytest.mark.parametrize(
    ("encoding", "code"),
    [
        ("rgb8", None),
        ("bgr8", cv2.COLOR_RGB2BGR),
        ("rgba8", cv2.COLOR_RGB2RGBA),
        ("bgra8", cv2.COLOR_RGB2BGRA),
    ],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_every_raw_encoding_becomes_the_same_rgb_whatever_the_row_padding(encoding, code, padding):
    source = rgb(1)
    stored = source if code is None else cv2.cvtColor(source, code)
    message = raw(stored, encoding, step=W * stored.shape[2] + padding)
    assert np.array_equal(decoded(convert.raw_picture(message)), source)


def test_mono8_becomes_grey():
    grey = rgb()[:, :, 0].copy()
    assert np.array_equal(decoded(convert.raw_picture(raw(grey, "mono8"))), np.repeat(grey[..., None], 3, axis=2))


RED_BLUE = np.where(np.arange(W)[None, :, None] < W // 2, (200, 90, 30), (10, 60, 220)).repeat(H, axis=0)


@pytest.mark.parametrize(
    ("encoding", "sites"),  # what the pixels (0, 0), (0, 1), (1, 0), (1, 1) are sensitive to
    [("bayer_rggb8", "rggb"), ("BAYER_BGGR8", "bggr"), ("bayer_gbrg8", "gbrg"), ("bayer_grbg8", "grbg")],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_behind_a_bayer_filter_red_stays_red_and_on_the_left(encoding, sites, padding):
    mosaic = np.empty((H, W), np.uint8)
    for site, colour in enumerate(sites):
        row, column = divmod(site, 2)
        mosaic[row::2, column::2] = RED_BLUE[row::2, column::2, "rgb".index(colour)]
    seen = decoded(convert.raw_picture(raw(mosaic, encoding, step=W + padding)))
    edge = slice(W // 2 - 2, W // 2 + 2)  # where two colours meet, they mix
    assert np.array_equal(np.delete(seen, edge, axis=1), np.delete(RED_BLUE, edge, axis=1))


@pytest.mark.parametrize(
    ("encoding", "order"),  # of the bytes of two pixels
    [("yuv422", "uyvz"), ("uyvy", "uyvz"), ("yuv422_yuy2", "yuzv"), ("YUYV", "yuzv")],
)
@pytest.mark.parametrize("padding", [0, 6])
def test_two_pixels_that_share_their_colour_keep_their_own_light(encoding, order, padding):
    # BT.601: black and white; a pure red and a grey of its chroma's opposite
    for (y, z, u, v), left, right in (
        ((16, 235, 128, 128), (0, 0, 0), (255, 255, 255)),
        ((81, 81, 90, 240), (255, 0, 0), (255, 0, 0)),
        ((41, 41, 240, 110), (0, 0, 255), (0, 0, 255)),
    ):
        pair = [{"y": y, "z": z, "u": u, "v": v}[name] for name in order]
        rows = np.tile(np.array(pair, np.uint8), (H, W // 2))
        seen = decoded(convert.raw_picture(raw(rows, encoding, step=2 * W + padding)))
        assert np.abs(seen[:, 0::2].astype(int) - left).max() <= 2
        assert np.abs(seen[:, 1::2].astype(int) - right).max() <= 2


@pytest.mark.parametrize(
    ("encoding", "depth", "size", "words"),
    [
        ("bayer_rggb8", 1, (H, W - 1), "bayer_rggb8 of 31 x 24 pixels, expected an even width and height"),
        ("bayer_rggb8", 1, (H - 1, W), "bayer_rggb8 of 32 x 23 pixels, expected an even width and height"),
        ("bayer_rggb8", 1, (2, 2), "bayer_rggb8 of 2 x 2 pixels, expected an even width and height of at least 4"),
        ("yuv422", 2, (H, W - 1), "yuv422 of 31 x 24 pixels, expected an even width"),
        ("yuv422_yuy2", 2, (H, W - 1), "yuv422_yuy2 of 31 x 24 pixels, expected an even width"),
        ("yuv422", 2, (H - 1, W), None),
        ("mono8", 1, (H - 1, W - 1), None),
        ("mono8", 1, (1, 1), None),
    ],
)
def test_sizes_that_a_format_cannot_have_are_refused(encoding, depth, size, words):
    message = raw(np.zeros((size[0], size[1] * depth), np.uint8), encoding, height=size[0], width=size[1])
    if words is None:
        assert decoded(convert.raw_picture(message)).shape == (*size, 3)
        return
    with pytest.raises(Refused, match=words) as refused:
        convert.raw_picture(message)
    assert refused.value.reason == "impossible size"


def test_the_last_row_may_lack_its_padding():
    message = raw(rgb(), "rgb8", step=W * 3 + 4)
    message.data = message.data[:-4]
    assert np.array_equal(decoded(convert.raw_picture(message)), rgb())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoding": "yuv9"}, "encoding 'yuv9', expected one of rgb8"),
        ({"step": W}, "step 32 bytes, but 32 pixels of rgb8 need 96"),
        ({"height": 1000}, "need 96000"),
        ({"height": 0}, "32 x 0 pixels"),
        ({"width": 10**6}, "1000000 x 24 pixels"),
        ({"width": 16000, "height": 16000, "step": 48000}, "16000 x 16000 pixels, expected at most 16384 a side and"),
        ({"height": H - 1}, "2304 bytes, but 23 rows of 96 bytes are 2208"),
    ],
)
def test_raw_images_that_contradict_themselves_are_refused(change, words):
    message = raw(rgb(), "rgb8")
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(Refused, match=words):
        convert.raw_picture(message)


def test_jpeg_and_png_come_back_as_they_were_and_the_bytes_decide_not_the_format():
    jpeg = simplejpeg.encode_jpeg(rgb(1), quality=98, colorsubsampling="444")
    picture = convert.compressed_picture(compressed(jpeg, "bgr8; jpeg compressed bgr8"))
    assert (picture.encoding, picture.height, picture.width) == ("jpeg", H, W)
    assert np.abs(decoded(picture).astype(int) - rgb(1)).max() <= 4
    png = cv2.imencode(".png", cv2.cvtColor(rgb(1), cv2.COLOR_RGB2BGR))[1].tobytes()
    assert np.array_equal(decoded(convert.compressed_picture(compressed(png, "jpeg"))), rgb(1))


def test_a_truncated_jpeg_is_refused_not_filled_with_grey():
    rng = np.random.default_rng(0)
    jpeg = simplejpeg.encode_jpeg(rng.integers(0, 255, (H, W, 3), dtype=np.uint8))
    picture = convert.compressed_picture(compressed(jpeg[: len(jpeg) // 2]))
    with pytest.raises(Refused, match="broken JPEG"):
        decoded(picture)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"hello world, this is no picture", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_picture_are_refused(data):
    with pytest.raises(Refused):
        convert.compressed_picture(compressed(data))


def test_a_broken_png_is_refused():
    png = cv2.imencode(".png", rgb())[1].tobytes()
    picture = convert.compressed_picture(compressed(png[:40]))
    with pytest.raises(Refused, match="broken PNG"):
        decoded(picture)


def info(**change):
    k = [500.0, 0.0, 16.0, 0.0, 500.0, 12.0, 0.0, 0.0, 1.0]
    p = [400.0, 0.0, 15.0, 0.0, 0.0, 400.0, 11.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    message = SimpleNamespace(
        header=SimpleNamespace(frame_id="/cam"),
        height=H,
        width=W,
        k=k,
        p=p,
        d=[0.0] * 5,
        r=[1.0, 0, 0, 0, 1, 0, 0, 0, 1],
        distortion_model="plumb_bob",
        binning_x=0,
        binning_y=0,
        roi=SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0),
    )
    for name, value in change.items():
        setattr(message, name, value)
    return message


def test_raw_images_use_k_and_rectified_images_use_p():
    assert convert.calibration(info(), rectified=False).pixels_from_camera[0].tolist() == [500.0, 0.0, 16.0]
    distorted = info(d=[0.1, 0.0, 0.0, 0.0, 0.0])
    known = convert.calibration(distorted, rectified=True)
    assert known.pixels_from_camera[0].tolist() == [400.0, 0.0, 15.0]
    assert known.optical_frame == "cam"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": [float("nan")] * 9}, "expected finite"),
        ({"k": [0.0] * 9}, "positive focal lengths"),
        ({"width": 0}, "0 x 24"),
        ({"k": [500.0, 0, 16, 3.0, 500, 12, 0, 0, 1]}, "expected finite, positive focal lengths"),
        ({"k": [1e9, 0, 16, 0, 1e9, 12, 0, 0, 1]}, "expected finite"),
        ({"d": [float("nan")] * 5}, "plumb_bob distortion .* expected finite .* `rectified` set to true"),
        ({"d": [0.1] * 3}, "plumb_bob with 3 coefficients of distortion, expected 4 or 5, or rectified images"),
        ({"d": [0.1] * 5, "distortion_model": "fov"}, "distortion model 'fov', expected one of plumb_bob"),
        ({"d": [0.1] * 5, "distortion_model": "equidistant"}, "equidistant with 5 coefficients"),
        ({"d": [0.1] * 4, "p": [float("nan")] + [0.0] * 11}, "with P = "),
        ({"d": [0.1] * 4, "r": [0.995, 0.1, 0, -0.1, 0.995, 0, 0, 0, 1]}, "stereo pair"),
        ({"binning_x": 2}, "binning"),
        ({"roi": SimpleNamespace(x_offset=0, y_offset=0, width=3, height=3)}, "region of interest"),
        ({"roi": SimpleNamespace(x_offset=1, y_offset=0, width=W, height=H)}, "region of interest"),
        ({"header": SimpleNamespace(frame_id="")}, "frame_id"),
    ],
)
def test_calibration_that_does_not_hold_is_refused_never_guessed(change, words):
    with pytest.raises(Refused, match=words):
        convert.calibration(info(**change), rectified=False)


@pytest.mark.parametrize(
    ("model", "bend"),
    [
        ("plumb_bob", [0.1] * 4),
        ("plumb_bob", [0.1] * 5),
        ("rational_polynomial", [0.1] * 8),
        ("equidistant", [0.1] * 4),
    ],
)
def test_a_lens_is_kept_with_its_k_and_p_says_what_is_wanted_without_it(model, bend):
    known = convert.calibration(info(d=bend, distortion_model=model), rectified=False)
    assert known.pixels_from_camera[0].tolist() == [500.0, 0.0, 16.0]
    assert (known.lens.model, list(known.lens.coefficients)) == (model, bend)
    assert known.pinhole[0].tolist() == [400.0, 0.0, 15.0]
    silent = convert.calibration(info(d=bend, distortion_model=model, p=[0.0] * 12), rectified=False)
    assert silent.pinhole[0].tolist() == [500.0, 0.0, 16.0]
    assert convert.calibration(info(d=bend, distortion_model=model), rectified=True).lens is None


def test_d_of_zeros_is_no_lens_whatever_the_model():
    for model, bend in (("plumb_bob", [0.0] * 5), ("equidistant", [0.0] * 4), ("", []), ("made up", [0.0, -0.0])):
        known = convert.calibration(info(d=bend, distortion_model=model), rectified=False)
        assert known.lens is None and known.pixels_from_camera[0, 0] == 500


def test_what_a_camera_info_tells_changes_with_every_field_that_is_read():
    before = convert.told(info())
    assert convert.told(info()) == before
    assert convert.told(info(k=[float("nan")] * 9)) == convert.told(info(k=[float("nan")] * 9))  # by their bytes
    for change in (
        {"k": [501.0] + [0.0] * 8},
        {"p": [401.0] + [0.0] * 11},
        {"d": [0.1] + [0.0] * 4},
        {"d": [0.0] * 4},
        {"r": [0.5] + [0.0] * 8},
        {"height": 25},
        {"width": 33},
        {"distortion_model": "equidistant"},
        {"header": SimpleNamespace(frame_id="other")},
        {"binning_x": 2},
        {"binning_y": 2},
        {"roi": SimpleNamespace(x_offset=0, y_offset=0, width=3, height=0)},
        {"roi": SimpleNamespace(x_offset=0, y_offset=0, width=0, height=3)},
    ):
        assert convert.told(info(**change)) != before, change


def test_a_region_of_interest_that_is_the_whole_picture_is_none():
    whole = SimpleNamespace(x_offset=0, y_offset=0, width=W, height=H)
    assert convert.calibration(info(roi=whole), rectified=False).key == convert.calibration(info(), False).key


def test_rectified_cameras_of_a_stereo_pair_are_refused():
    turned = [0.995, 0.1, 0, -0.1, 0.995, 0, 0, 0, 1]
    shifted = [400.0, 0.0, 15.0, -80.0, 0.0, 400.0, 11.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    for change in ({"r": turned}, {"p": shifted}):
        with pytest.raises(Refused, match="stereo pair"):
            convert.calibration(info(**change), rectified=True)
        convert.calibration(info(**change), rectified=False)


def test_many_different_broken_images_have_one_reason():
    reasons = set()
    for size in range(20, 120):
        with pytest.raises(Refused) as refused:
            convert.compressed_picture(compressed(b"x" * size))
        reasons.add(refused.value.reason)
    assert reasons == {"unknown format"}


def test_a_transform_of_nan_or_a_zero_quaternion_is_refused():
    def stamped(w, x):
        vector = SimpleNamespace
        return SimpleNamespace(
            header=SimpleNamespace(frame_id="map", stamp=SimpleNamespace(sec=1, nanosec=5)),
            child_frame_id="base_link",
            transform=SimpleNamespace(rotation=vector(w=w, x=0.0, y=0.0, z=0.0), translation=vector(x=x, y=0.0, z=0.0)),
        )

    parent, child, stamp, matrix = convert.transform(stamped(1.0, 2.0))
    assert (parent, child, stamp, float(matrix[0, 3])) == ("map", "base_link", 1_000_000_005, 2.0)
    for w, x in ((0.0, 0.0), (1.0, float("nan")), (float("inf"), 0.0)):
        with pytest.raises(Refused, match="map <- base_link"):
            convert.transform(stamped(w, x))


# ---- what goes out: needs ROS's message classes


@pytest.fixture
def ros():
    return pytest.importorskip("occflow_msgs.msg", reason="needs ROS 2 and the built messages")


def street(classes=OPENOCC):
    """Four filled voxels: a parked and a driving car (two voxels high), and road."""
    grid = Grid((-4.0, -4.0, -1.0), (0.4, 0.4, 0.4), (20, 20, 8))
    labels = torch.full(grid.shape, classes.free, dtype=torch.uint8)
    flow = torch.zeros(*grid.shape, 2)
    labels[3, 4, 1] = labels[10, 10, 1] = labels[10, 10, 2] = classes.id("car")
    labels[0, 0, 0] = classes.id("driveable_surface")
    flow[10, 10, 1:3] = torch.tensor([3.0, -4.0])
    flow[0, 0, 0] = torch.tensor([9.0, 9.0])  # nonsense that a network may say of a road
    score = torch.where(labels != classes.free, 0.8, 0.0)
    return Prediction(grid, classes, labels, score, flow, torch.zeros(grid.shape, dtype=torch.bool))


def test_the_message_carries_stamp_frame_origin_and_the_arrays_of_pack(ros):
    message = convert.voxel_flow(street(), 5_000_000_007, "base_link", ["a", "b"], [4_999_000_007, None], "net", 0.2)
    assert (message.header.stamp.sec, message.header.stamp.nanosec, message.header.frame_id) == (5, 7, "base_link")
    assert (message.origin.position.x, message.origin.position.z, message.origin.orientation.w) == (-4.0, -1.0, 1.0)
    assert list(message.camera_age_us) == [1000, NO_IMAGE] and message.cameras_used == 0b01
    assert unpack(message).labels.equal(street().labels)
    assert list(message.flow_velocity) == pytest.approx([3.0, -4.0] * 2)


def test_a_full_message_stays_below_half_a_megabyte(ros):
    from rclpy.serialization import deserialize_message, serialize_message

    from occflow_core.bench import _full_prediction

    names = [f"camera_{i}" for i in range(6)]
    message = convert.voxel_flow(_full_prediction(), 10**18, "base_link", names, [10**18] * 6, "net", 0.2)
    wire = serialize_message(message)
    assert len(message.index) == 40_000 and len(message.flow_index) == 10_000
    assert len(wire) <= 500_000
    assert unpack(deserialize_message(wire, ros.VoxelFlow)).labels.equal(_full_prediction().labels)


def test_the_cloud_holds_every_filled_voxel_at_its_centre_with_class_and_velocity(ros):
    header = convert.voxel_flow(street(), 1, "base_link", ["a"], [1], "net", 0.2).header
    cloud = convert.points(street(), header)
    kinds = {7: "<f4", 2: "u1"}
    layout = np.dtype(
        {
            "names": [f.name for f in cloud.fields],
            "formats": [kinds[f.datatype] if f.name != "rgb" else "<u4" for f in cloud.fields],
            "offsets": [f.offset for f in cloud.fields],
            "itemsize": cloud.point_step,
        }
    )
    points = np.frombuffer(bytes(cloud.data), layout)
    assert {"x", "y", "z", "rgb", "class_id", "confidence", "vx", "vy"} == set(layout.names)
    assert len(points) == cloud.width == 4 and cloud.row_step == len(cloud.data)
    (driving,) = [p for p in points if p["vx"] == 3.0 and p["z"] < -0.3]
    assert (driving["x"], driving["y"], driving["z"]) == pytest.approx((0.2, 0.2, -0.4))
    assert driving["class_id"] == OPENOCC.id("car") and driving["confidence"] == pytest.approx(0.8)
    assert driving["rgb"] == 0xFF9E00


def test_markers_show_what_moves_and_nothing_else(ros):
    header = convert.voxel_flow(street(), 1, "base_link", ["a"], [1], "net", 0.2).header
    cubes, arrows = convert.markers(street(), header, 0.2).markers
    assert len(cubes.points) == len(cubes.colors) == 2
    assert len(arrows.points) == 6  # one arrow for the column: shaft and two barbs
    shaft = np.array([[p.x, p.y, p.z] for p in arrows.points[:2]])
    assert shaft[0] == pytest.approx([0.2, 0.2, 0.0]) and shaft[1] - shaft[0] == pytest.approx([3.0, -4.0, 0.0])
    nothing = convert.markers(street(), header, 100.0).markers
    assert all(m.action == m.DELETE for m in nothing)


def test_markers_of_things_that_stand_or_are_nonsense_are_finite(ros):
    broken = street()
    broken.flow[10, 10, 1] = torch.tensor([float("inf"), 0.0])
    header = convert.voxel_flow(broken, 1, "base_link", ["a"], [1], "net", 0.0).header
    cubes, arrows = convert.markers(broken, header, 0.0).markers
    assert len(cubes.points) == 1 and len(arrows.points) == 6
    assert all(np.isfinite([p.x, p.y, p.z]).all() for p in arrows.points)


def cloud(points, frame="lidar_top", sec=5):
    header = SimpleNamespace(frame_id=frame, stamp=SimpleNamespace(sec=sec, nanosec=7))
    fields = [SimpleNamespace(name=n, offset=4 * i, datatype=7, count=1) for i, n in enumerate("xyz")]
    points = np.asarray(points, np.float32).reshape(-1, 3)
    shape = {"height": 1, "width": len(points), "point_step": 12, "row_step": points.nbytes}
    return SimpleNamespace(header=header, fields=fields, is_bigendian=False, data=points.tobytes(), **shape)


def test_a_cloud_keeps_its_points_its_frame_and_its_stamp():
    taken = convert.cloud(cloud([[1, 2, 3], [np.inf, 0, 0]], frame="/lidar_top"))
    assert taken.points.tolist() == [[1, 2, 3, 0, 0]] and (taken.frame, taken.stamp) == ("lidar_top", 5_000_000_007)


def test_clouds_that_nobody_can_place_are_refused():
    lame = cloud([[1, 2, 3]])
    lame.fields = lame.fields[:2]
    stampless = cloud([[1, 2, 3]], sec=0)
    stampless.header.stamp.nanosec = 0
    for message, reason in (
        (cloud([[1, 2, 3]], frame=""), "no frame"),
        (stampless, "no stamp"),
        (lame, "unusable cloud"),
        (cloud([[np.nan] * 3]), "empty cloud"),
    ):
        with pytest.raises(Refused) as refused:
            convert.cloud(message)
        assert refused.value.reason == reason


def test_times_are_milliseconds_with_autowares_stamp_where_its_package_is(monkeypatch):
    pytest.importorskip("std_msgs", reason="needs ROS 2")
    plain = convert.time_kind()
    assert plain.__name__ == "Float64" and convert.milliseconds(plain, 0.25, 7).data == 250.0

    class Float64Stamped:
        def __init__(self, data):
            self.data, self.stamp = data, None

    for name in ("autoware_internal_debug_msgs", "autoware_internal_debug_msgs.msg"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(Float64Stamped=Float64Stamped))
    stamped = convert.milliseconds(convert.time_kind(), 0.25, 3_000_000_007)
    assert (stamped.data, stamped.stamp.sec, stamped.stamp.nanosec) == (250.0, 3, 7)


def test_one_row_cannot_ask_for_gigabytes_of_padding():
    message = raw(rgb()[:1], "rgb8", height=1)
    message.step = 2**32 - 1
    with pytest.raises(Refused, match="at most 65536 with padding"):
        convert.raw_picture(message)


@pytest.mark.parametrize("side", [8000, 65500])
def test_a_small_jpeg_that_claims_an_enormous_picture_is_refused_by_its_header(side):
    jpeg = bytearray(simplejpeg.encode_jpeg(rgb()))
    start = jpeg.index(b"\xff\xc0") + 5  # SOF0: marker, length, precision, then height and width
    jpeg[start : start + 4] = side.to_bytes(2, "big") * 2
    with pytest.raises(Refused, match=f"{side} x {side} pixels, expected at most"):
        convert.compressed_picture(compressed(bytes(jpeg)))
    png = bytearray(cv2.imencode(".png", rgb())[1].tobytes())
    png[16:24] = side.to_bytes(4, "big") * 2
    with pytest.raises(Refused, match=f"{side} x {side} pixels, expected at most"):
        convert.compressed_picture(compressed(bytes(png)))


def test_more_bytes_than_a_picture_can_have_are_refused_unread(monkeypatch):
    monkeypatch.setattr(convert, "MOST_BYTES", 100)
    with pytest.raises(Refused, match="a compressed picture of 101 bytes, expected at most 100"):
        convert.compressed_picture(compressed(b"\xff\xd8" + bytes(99)))


def test_a_camera_info_with_more_coefficients_than_any_model_is_refused():
    with pytest.raises(Refused, match="with 15 coefficients of distortion, expected at most 14"):
        convert.calibration(info(d=[0.0] * 15), rectified=False)


def test_a_cloud_of_more_points_than_a_lidar_sends_is_refused_before_it_is_read():
    header = SimpleNamespace(frame_id="lidar", stamp=SimpleNamespace(sec=1, nanosec=0))
    message = SimpleNamespace(header=header, height=4096, width=4096)  # its bytes are not even looked at
    with pytest.raises(Refused, match="a cloud of 4096 x 4096 points, expected at most"):
        convert.cloud(message)
