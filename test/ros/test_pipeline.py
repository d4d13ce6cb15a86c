"""A set and the scans before it become one Frame, whatever the sizes and lenses of its cameras; without a scan, where
the model needs one, nothing is answered."""

from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from far import CPU, GPU, Bus, Far
from systems.small import build

from occflow_core.geometry import rigid
from occflow_core.geometry.lenses import Lens
from occflow_core.runtime import Model, stream
from occflow_core.runtime.prepare import prepare
from occflow_ros.assemble import Calibration, Cloud, ImageSet, Scans, Shot
from occflow_ros.frames import TransformBuffer
from occflow_ros.health import Health
from occflow_ros.pipeline import Pipeline, Rectifier

MS = 1_000_000
START = 1_700_000_000_000 * MS
MOUNT = rigid.from_quaternion((0.5**0.5, 0.0, 0.0, 0.5**0.5), (1.0, 0.0, 1.8))  # of the LiDAR: it looks to the left


class Picture:
    height, width = 8, 12

    def decode_into(self, out):
        out[:] = 90


class Asked:
    """A stream that keeps what it was given."""

    def __init__(self, height=64, width=96, device=CPU):
        self.frames, self.seconds, self.forgot = [], {}, 0
        config = SimpleNamespace(height=height, width=width)
        self.model = SimpleNamespace(system=SimpleNamespace(config=config), resize="fast", device=device)

    def forget(self):
        self.forgot += 1

    def step(self, frame):
        self.frames.append(frame)
        return "a prediction"


def rig(scans, said):
    """A car that drives 10 m/s along x, one camera, one LiDAR."""
    transforms = TransformBuffer()
    still = torch.eye(4, dtype=torch.float64)
    transforms.add("base_link", "camera", START, still, static=True)
    transforms.add("base_link", "lidar", START, MOUNT, static=True)
    for k in range(11):
        pose = still.clone()
        pose[0, 3] = 600.0 + 1.0 * k
        transforms.add("map", "base_link", START + 100 * k * MS, pose, static=False)
    health, stream = Health(["camera"], "net", lidar=True), Asked()
    health.activate(0.0)
    say = lambda key, sentence: said.append(sentence)  # noqa: E731
    names = ["camera"], ["/camera/image"]
    return Pipeline(*names, transforms, stream, health, "map", "base_link", 0.0, 1, say, scans), health, stream


def images(ms: int) -> ImageSet:
    calibration = Calibration(np.diag([20.0, 20.0, 1.0]), 8, 12, "camera")
    return ImageSet((Shot(Picture(), calibration),), (START + ms * MS,), 0)


def cloud(ms: int, frame="lidar") -> Cloud:
    return Cloud(np.array([[5.0, 0.0, -1.0, 30.0, 4.0]], np.float32), frame, START + ms * MS)


def test_scans_lie_where_the_car_is_at_the_sets_stamp():
    scans, said = Scans("/lidar", 2, 0.05), []
    pipeline, _, stream = rig(scans, said)
    for ms in (250, 300, 350, 400):
        scans.add(cloud(ms))
    assert pipeline.serve(images(360)).prediction == "a prediction" and not said
    points = stream.frames[0].points
    # 5 m ahead of a LiDAR that looks to the left; the car has driven on by 0.1 m and 0.6 m since
    expected = [[1.0 - 0.1, 5.0, 0.8, 30.0, 0.01], [1.0 - 0.6, 5.0, 0.8, 30.0, 0.06]]
    assert torch.allclose(points, torch.tensor(expected), atol=1e-4)
    pipeline.close()


def test_cameras_alone_ask_for_no_scan():
    pipeline, _, stream = rig(None, [])
    assert pipeline.serve(images(300)) is not None and stream.frames[0].points is None
    pipeline.close()


@pytest.mark.parametrize(
    ("ms", "frame", "words"),
    [
        (None, "lidar", "/lidar: a set was refused: no scan came yet, and the model needs LiDAR"),
        (100, "lidar", "/lidar: a set was refused: the newest scan is 0.80 s old, expected at most 0.5 s"),
        (850, "nowhere", "/lidar: a set was refused: no scan's transform is known"),
    ],
)
def test_without_a_scan_that_can_be_used_the_set_is_refused_and_the_reason_is_said(ms, frame, words):
    scans, said = Scans("/lidar", 2, 0.05), []
    pipeline, health, stream = rig(scans, said)
    if ms is not None:
        scans.add(cloud(ms, frame))
    assert pipeline.serve(images(900)) is None and not stream.frames
    assert said[-1].startswith(words)
    whole = health.report(0.0)[0]
    assert whole.values["sets dropped: no LiDAR scan"] == 1 and words in whole.message
    scans.add(cloud(890))  # and once there is one, it goes on
    assert pipeline.serve(images(900)) is not None
    pipeline.close()


def test_a_scan_whose_transform_is_unknown_is_left_out():
    scans, said = Scans("/lidar", 3, 0.05), []
    pipeline, health, stream = rig(scans, said)
    for ms, frame in ((800, "lidar"), (850, "nowhere"), (900, "lidar")):
        scans.add(cloud(ms, frame))
    assert pipeline.serve(images(900)) is not None
    assert torch.allclose(stream.frames[0].points[:, 4], torch.tensor([0.0, 0.1]))
    assert health.report(0.0)[2].values["dropped: no transform"] == 1
    assert "TF has not named nowhere" in said[0]
    pipeline.close()


# ---- sizes and lenses

BARREL = Lens("plumb_bob", (-0.3, 0.1, 0.001, -0.002, -0.02))
FISHEYE = Lens("equidistant", (0.02, -0.01, 0.003, -0.001))


class Seen:
    """A picture that is decoded already."""

    def __init__(self, pixels):
        self.pixels, (self.height, self.width) = pixels, pixels.shape[:2]

    def decode_into(self, out):
        out[:] = self.pixels


def calibrated(name, height, width, lens=None, focus=0.5) -> Calibration:
    k = np.array([[focus * width, 0, 0.51 * width], [0, focus * width, 0.48 * height], [0, 0, 1.0]])
    return Calibration(k, height, width, name, lens, None if lens is None else k)


def noise(calibration, seed=0) -> Seen:
    rng = np.random.default_rng(seed)
    return Seen(rng.integers(0, 256, (calibration.height, calibration.width, 3), dtype=np.uint8))


def fleet(names, device=CPU):
    """A pipeline of cameras that all look ahead from where they stand on a car that does not move."""
    transforms, said = TransformBuffer(), []
    for i, name in enumerate(names):
        mount = rigid.from_quaternion((0.5, -0.5, 0.5, -0.5), (1.0, 0.2 * i, 1.5))
        transforms.add("base_link", name, START, mount, static=True)
    transforms.add("map", "base_link", START, torch.eye(4, dtype=torch.float64), static=True)
    asked, say = Asked(device=device), lambda key, sentence: said.append(sentence)
    health = Health(names, "net")
    topics = [f"/{name}/image" for name in names]
    return Pipeline(names, topics, transforms, asked, health, "map", "base_link", 0.0, 1, say), asked, said


def together(calibrations, ms=0, pictures=None) -> ImageSet:
    """A set of all cameras that have a calibration."""
    pictures = pictures or [None if c is None else noise(c, i) for i, c in enumerate(calibrations)]
    shots = [None if c is None else Shot(p, c) for p, c in zip(pictures, calibrations, strict=True)]
    return ImageSet(tuple(shots), tuple(None if s is None else START + ms * MS for s in shots), 0)


def test_pinholes_of_one_size_stay_at_camera_size():
    names = ["a", "b"]
    pipeline, asked, _ = fleet(names)
    calibrations = [calibrated(name, 120, 200) for name in names]
    assert pipeline.serve(together(calibrations)) is not None
    assert asked.frames[0].images.shape == (2, 3, 120, 200)
    assert np.array_equal(asked.frames[0].images[1].permute(1, 2, 0).numpy(), noise(calibrations[1], 1).pixels)
    pipeline.close()


@pytest.mark.parametrize("count", [1, 3, 8])
def test_cameras_of_any_number_name_and_size_are_seen_as_each_would_be_alone(count):
    names = ["x", "Kamera_2", "rear", "d/e", "mirror", "f6", "roof.left", "h"][:count]
    sizes = [(120, 200), (90, 300), (64, 96), (200, 120), (120, 200), (480, 640), (97, 101), (64, 97)][:count]
    pipeline, asked, said = fleet(names)
    calibrations = [calibrated(name, *size) for name, size in zip(names, sizes, strict=True)]
    assert pipeline.serve(together(calibrations)) is not None and not said
    mixed = prepare(asked.frames[0], 64, 96, "fast")
    assert mixed.names == tuple(names) and mixed.used.all()
    for i, calibration in enumerate(calibrations):
        single, alone, _ = fleet(names)
        assert single.serve(together([calibration if j == i else None for j in range(count)])) is not None
        expected = prepare(alone.frames[0], 64, 96, "fast")
        assert torch.equal(mixed.cameras.pixels_from_camera[i], expected.cameras.pixels_from_camera[i])
        assert torch.equal(mixed.cameras.car_from_camera[i], expected.cameras.car_from_camera[i])
        assert torch.equal(mixed.images[i], expected.images[i])
        single.close()
    pipeline.close()


@pytest.mark.parametrize("other", [calibrated("b", 90, 300), calibrated("b", 120, 200, BARREL)], ids=["size", "lens"])
def test_a_camera_that_is_missing_for_a_while_changes_nothing_for_the_others(other):
    pipeline, asked, _ = fleet(["a", "b"])
    a = calibrated("a", 120, 200)
    for k, b in enumerate((other, None, other)):
        assert pipeline.serve(together([a, b], ms=k)) is not None
    first, without, last = asked.frames
    assert first.images.shape == without.images.shape == last.images.shape == (2, 3, 64, 96)
    assert torch.equal(first.images[0], without.images[0]) and not without.images[1].any()
    assert without.used.tolist() == [True, False]
    assert all(stream.follows(f, g, 2.0) for f, g in ((first, without), (without, last)))
    pipeline.close()


def test_memory_is_forgotten_where_a_calibration_really_changed_and_not_where_only_the_size_did():
    pipeline, asked, _ = fleet(["a", "b"])
    a = calibrated("a", 120, 200, BARREL)
    tele = calibrated("b", 120, 200, focus=0.7)
    for k, b in enumerate((calibrated("b", 120, 200), calibrated("b", 240, 400), tele)):
        pipeline.serve(together([a, b], ms=k))
    first, larger, longer = asked.frames
    assert asked.forgot == 1
    bent = replace(a, lens=FISHEYE)
    pipeline.serve(together([bent, tele], ms=3))
    assert asked.forgot == 2, "another lens alone, though its pinhole is the same"
    assert stream.follows(first, larger, 2.0) and not stream.follows(larger, longer, 2.0)
    pipeline.close()


def test_a_network_answers_a_rig_of_mixed_sizes_and_lenses_and_remembers():
    pipeline, _, said = fleet(["a", "b", "c"])
    pipeline.stream = taker = stream.Stream(Model(build(), "small", False, "fast", None))
    rig = [calibrated("a", 120, 200, BARREL), calibrated("b", 90, 300), calibrated("c", 240, 240, FISHEYE)]
    for k, calibrations in enumerate((rig, [rig[0], None, None], rig)):
        memory = taker.memory
        served = pipeline.serve(together(calibrations, ms=100 * k))
        assert (memory is None) == (k == 0) and taker.last.stamp == START + 100 * k * MS
        assert served.prediction.unobserved.any() and not served.prediction.unobserved.all()
    assert not said
    pipeline.close()


@pytest.mark.parametrize("lens", [BARREL, FISHEYE], ids=lambda lens: lens.model)
def test_what_a_lens_shows_lands_where_the_frames_camera_projects_it(lens):
    pipeline, asked, said = fleet(["a", "b"])
    calibration = calibrated("a", 480, 720, lens)
    point = torch.tensor([[9.0, 1.7, 0.9]], dtype=torch.float64)  # in the car frame
    camera_from_car = rigid.inverse(rigid.from_quaternion((0.5, -0.5, 0.5, -0.5), (1.0, 0.0, 1.5)))
    given, bend = rigid.apply(camera_from_car, point).numpy()[None], np.array(lens.coefficients)
    project = cv2.fisheye.projectPoints if lens is FISHEYE else cv2.projectPoints
    place = project(given, np.zeros(3), np.zeros(3), calibration.pixels_from_camera, bend)[0].reshape(2)
    rows, columns = np.indices((480, 720)) + 0.5
    blob = 250 * np.exp(-((columns - place[0]) ** 2 + (rows - place[1]) ** 2) / (2 * 5.0**2))
    picture = Seen(blob.round().astype(np.uint8)[..., None].repeat(3, axis=-1))
    assert pipeline.serve(together([calibration, None], pictures=[picture, None])) is not None and not said
    frame = asked.frames[0]
    assert frame.images.shape == (2, 3, 64, 96)
    pixel = frame.cameras.project(point.expand(2, 1, 3))[0][0, 0]
    weight = frame.images[0, 0].double()
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    found = torch.stack([(weight * x).sum(), (weight * y).sum()]) / weight.sum()
    assert (found - pixel).abs().max() < 0.05
    pipeline.close()


def test_the_map_of_a_lens_is_made_once_for_ten_frames_and_anew_for_another_calibration(monkeypatch):
    made, fresh = [], Rectifier.__init__
    monkeypatch.setattr(Rectifier, "__init__", lambda self, *a: made.append(a) or fresh(self, *a))
    pipeline, asked, _ = fleet(["a", "b"])
    for k in range(10):  # equal calibrations, though not the same objects
        pipeline.serve(together([calibrated("a", 120, 200, BARREL), calibrated("b", 120, 200)], ms=k))
    assert len(asked.frames) == 10 and len(made) == 1
    for k in range(4):  # two publishers that contradict each other
        lens = replace(BARREL, coefficients=(-0.2 - 0.1 * (k % 2), 0, 0, 0))
        pipeline.serve(together([calibrated("a", 120, 200, lens), calibrated("b", 120, 200)], ms=20 + k))
    assert len(made) == 3
    for k in range(20):  # what is kept is bounded
        pipeline.serve(together([calibrated("a", 120, 200 + k, BARREL), None], ms=30 + k))
    assert len(pipeline._ways) == 4
    pipeline.close()


def test_a_lens_that_leaves_no_picture_costs_its_camera_and_is_said(monkeypatch):
    made, fresh = [], Rectifier.__init__
    monkeypatch.setattr(Rectifier, "__init__", lambda self, *a: made.append(a) or fresh(self, *a))
    pipeline, asked, said = fleet(["a", "b"])
    hopeless = calibrated("a", 120, 200, Lens("plumb_bob", (-20.0, 0, 0, 0)))
    for k in range(3):
        served = pipeline.serve(together([hopeless, calibrated("b", 120, 200)], ms=k))
        assert served.images.pictures[0] is None
    assert asked.frames[2].used.tolist() == [False, True] and len(made) == 1
    assert said[0].startswith("/a/image: refused: the plumb_bob lens [-20.0, 0, 0, 0] leaves no pinhole picture")
    assert pipeline.health.report(0.0)[1].values["dropped: unusable lens"] == 3
    pipeline.close()


def test_a_broken_picture_behind_a_lens_becomes_a_hole():
    pipeline, asked, said = fleet(["a", "b"])
    calibration = calibrated("a", 120, 200, BARREL)
    small = noise(calibrated("a", 60, 100))  # not what its calibration says
    small.height, small.width = 120, 200
    assert pipeline.serve(together([calibration, calibration], pictures=[small, noise(calibration)])) is not None
    assert asked.frames[0].used.tolist() == [False, True] and not asked.frames[0].images[0].any()
    assert said[0].startswith("/a/image: refused: ") and said[0].endswith("expected a whole picture of 200 x 120")
    pipeline.close()


# ---- a network on a GPU, here on one that is not there


def served_on_a_gpu(names, images):
    """The Frame of a set, what went to the GPU, and what was waited for."""
    pipeline, asked, said = fleet(names, GPU)
    pipeline.close()
    pipeline._decoders = SimpleNamespace(map=map)  # the bus is that of one thread
    with Bus() as bus:
        assert pipeline.serve(images) is not None
    return asked.frames[0], bus, said


def test_pinholes_of_one_size_wait_in_pinned_memory_for_a_gpu():
    calibrations = [calibrated(name, 120, 200) for name in "ab"]
    frame, bus, _ = served_on_a_gpu(["a", "b"], together(calibrations))
    assert frame.images.device.type == "cpu" and not bus.sent
    with bus:
        assert frame.images.is_pinned()
        there = prepare(frame, 64, 96, "fast", GPU)
    assert bus.sent == [(torch.uint8, 2 * 3 * 120 * 200)] and not bus.waits
    assert (there.images.near.int() - prepare(frame, 64, 96, "fast").images.int()).abs().max() <= 1


def test_mixed_sizes_and_lenses_are_resampled_on_a_gpu_as_here_and_go_there_as_they_came():
    names = ["a", "b", "c", "d", "e"]
    rig = [
        calibrated("a", 120, 200, BARREL),
        calibrated("b", 90, 300),
        calibrated("c", 240, 240, FISHEYE),
        None,
        calibrated("e", 64, 96),
    ]
    here, asked, _ = fleet(names)
    assert here.serve(together(rig)) is not None
    here.close()
    expected = asked.frames[0]
    frame, bus, said = served_on_a_gpu(names, together(rig))
    assert not said and isinstance(frame.images, Far) and frame.used.tolist() == expected.used.tolist()
    assert (frame.images.near.int() - expected.images.int()).abs().max() <= 1 and not frame.images.near[3].any()
    assert torch.equal(frame.cameras.pixels_from_camera, expected.cameras.pixels_from_camera)
    assert torch.equal(frame.cameras.car_from_camera, expected.cameras.car_from_camera)
    whole = [size for kind, size in bus.sent if kind == torch.uint8]
    assert whole == [3 * c.height * c.width for c in rig if c is not None] and not bus.waits


def test_a_broken_picture_for_a_gpu_becomes_a_hole():
    calibration = calibrated("a", 120, 200, BARREL)
    small = noise(calibrated("a", 60, 100))  # not what its calibration says
    small.height, small.width = 120, 200
    images = together([calibration, calibration], pictures=[small, noise(calibration)])
    frame, bus, said = served_on_a_gpu(["a", "b"], images)
    assert frame.used.tolist() == [False, True] and not frame.images.near[0].any() and frame.images.near[1].any()
    assert [size for kind, size in bus.sent if kind == torch.uint8] == [3 * 120 * 200]
    assert said[0].startswith("/a/image: refused: ")


def test_a_gpu_that_fails_is_no_broken_picture(monkeypatch):
    def fails(self, out, picture):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Rectifier, "into", fails)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        served_on_a_gpu(["a"], together([calibrated("a", 120, 200, BARREL)]))
