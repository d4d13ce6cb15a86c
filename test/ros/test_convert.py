"""Messages are checked before they are used; what cannot be used is refused with what came and what was expected."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import simplejpeg

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
        distortion_model="plumb_bob",
        binning_x=0,
        binning_y=0,
        roi=SimpleNamespace(width=0, height=0),
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
        ({"d": [0.1, 0, 0, 0, 0]}, "rectified"),
        ({"d": [float("nan")]}, "rectified"),
        ({"binning_x": 2}, "binning"),
        ({"roi": SimpleNamespace(width=3, height=3)}, "region of interest"),
        ({"header": SimpleNamespace(frame_id="")}, "frame_id"),
    ],
)
def test_calibration_that_does_not_hold_is_refused_never_guessed(change, words):
    with pytest.raises(Refused, match=words):
        convert.calibration(info(**change), rectified=False)


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
