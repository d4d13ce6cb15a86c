"""Matrices stay true for the pixels beside them: against the camera's law worked out by hand, and against pictures."""

import cv2
import numpy as np
import pytest
import torch

from occflow_core.geometry import Cameras, rigid

HEIGHT, WIDTH = 60, 100


@pytest.fixture
def cameras() -> Cameras:
    rng = np.random.default_rng(0)
    poses = [rigid.from_quaternion(rng.normal(size=4), rng.uniform(-2, 2, 3)) for _ in range(6)]
    k = torch.tensor([[80.0, 0.5, 48.0], [0.0, 85.0, 33.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    return Cameras(k.expand(6, 3, 3).clone(), torch.stack(poses), HEIGHT, WIDTH)


@pytest.fixture
def points() -> torch.Tensor:
    return torch.randn(400, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 6


def by_hand(cameras: Cameras, i: int, point) -> tuple[float, float, float]:
    x, y, z = np.linalg.inv(cameras.car_from_camera[i].numpy())[:3] @ [*point, 1.0]
    k = cameras.pixels_from_camera[i].numpy()
    return (k[0, 0] * x + k[0, 1] * y) / z + k[0, 2], k[1, 1] * y / z + k[1, 2], z


def test_projection_is_the_pinholes_law(cameras, points):
    pixels, depth = cameras.project(points)
    assert pixels.shape == (6, 400, 2) and depth.shape == (6, 400)
    for i in range(6):
        for p in range(0, 400, 7):
            u, v, z = by_hand(cameras, i, points[p].numpy())
            assert depth[i, p].item() == pytest.approx(z, abs=1e-9)
            if z > 0.1:
                assert pixels[i, p].tolist() == pytest.approx([u, v], abs=1e-6)


def test_there_and_back_is_the_identity(cameras, points):
    pixels, depth = cameras.project(points)
    back = cameras.unproject(pixels, depth)
    ahead = depth > 0.1
    assert ahead.any() and (back - points)[ahead].abs().max() < 1e-8


def test_a_camera_sees_what_falls_into_its_picture_in_front_of_it(cameras, points):
    pixels, depth = cameras.project(points)
    seen = cameras.sees(points)
    for i in range(6):
        for p in range(400):
            u, v, z = by_hand(cameras, i, points[p].numpy())
            assert bool(seen[i, p]) == (z > 1e-5 and 0 < u < WIDTH and 0 < v < HEIGHT)
    assert seen.any() and not seen[depth <= 0].any()


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        (lambda c: c.resized(30, 100), lambda u, v: (u, v / 2)),
        (lambda c: c.resized(90, 25), lambda u, v: (u / 4, v * 1.5)),
        (lambda c: c.cropped(7, 11, 40, 50), lambda u, v: (u - 11, v - 7)),
        (lambda c: c.cropped(-5, -3, 80, 120), lambda u, v: (u + 3, v + 5)),
        (lambda c: c.flipped(), lambda u, v: (WIDTH - u, v)),
        (lambda c: c.resized(30, 50).cropped(4, 6, 20, 30).flipped(), lambda u, v: (30 - (u / 2 - 6), v / 2 - 4)),
    ],
    ids=["half as high", "other shape", "window", "window beyond the picture", "mirror", "all three"],
)
def test_pixels_follow_what_was_done_to_the_picture(cameras, points, change, moved):
    before, depth = cameras.project(points)
    after, after_depth = change(cameras).project(points)
    ahead = depth > 0.1
    u, v = moved(*before.unbind(-1))
    assert torch.allclose(after[ahead], torch.stack([u, v], -1)[ahead], atol=1e-6)
    assert torch.allclose(after_depth, depth)


def test_a_dot_stays_under_its_projection_through_resize_crop_and_flip():
    """Brute force: paint a blob where a point projects, treat the picture as the cameras are treated, find it again."""
    camera = Cameras(
        torch.tensor([[[80.0, 0, 50.0], [0, 80.0, 30.0], [0, 0, 1.0]]], dtype=torch.float64),
        torch.eye(4, dtype=torch.float64)[None],
        HEIGHT,
        WIDTH,
    )
    for point in ([0.2, 0.1, 4.0], [-1.1, 0.4, 3.0], [0.9, -0.5, 2.5]):
        point = torch.tensor([point], dtype=torch.float64)
        u, v = camera.project(point)[0][0, 0].tolist()
        x, y = np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5
        picture = np.exp(-((x[None] - u) ** 2 + (y[:, None] - v) ** 2) / 8.0)  # pixel (i, j) has its middle at + 0.5
        picture = cv2.resize(picture, (WIDTH * 2, HEIGHT * 2), interpolation=cv2.INTER_LINEAR)
        changed = camera.resized(HEIGHT * 2, WIDTH * 2).cropped(10, 20, 100, 170).flipped()
        picture = picture[10:110, 20:190][:, ::-1]
        assert (changed.height, changed.width) == picture.shape
        rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]] + 0.5
        found = [(picture * columns).sum() / picture.sum(), (picture * rows).sum() / picture.sum()]
        assert changed.project(point)[0][0, 0].tolist() == pytest.approx(found, abs=0.2)


def test_cameras_told_in_another_frame_see_the_same_things(cameras, points):
    new_from_car = rigid.from_quaternion([0.9, 0.1, -0.2, 0.3], [5.0, -3.0, 1.0])
    pixels, depth = cameras.project(points)
    moved, moved_depth = cameras.moved(new_from_car).project(rigid.apply(new_from_car, points))
    ahead = depth > 0.1
    assert torch.allclose(depth, moved_depth, atol=1e-9) and torch.allclose(pixels[ahead], moved[ahead], atol=1e-6)


def test_one_of_many_is_that_one(cameras, points):
    assert torch.allclose(cameras[2].project(points)[0], cameras.project(points)[0][2])
    assert len(cameras) == 6 and cameras[1:3].shape == (2,)


def test_points_that_are_not_finite_are_not_seen(cameras):
    for bad in (float("nan"), float("inf"), float("-inf")):
        points = torch.zeros(3, 3, dtype=torch.float64)
        points[range(3), range(3)] = bad
        assert not cameras.sees(points).any()


def test_cameras_of_different_numbers_or_without_pixels_are_refused():
    with pytest.raises(ValueError, match=r"got \(2, 3, 3\) and \(3, 4, 4\)"):
        Cameras(torch.eye(3).expand(2, 3, 3), torch.eye(4).expand(3, 4, 4), 10, 10)
    with pytest.raises(ValueError, match="no pixels"):
        Cameras(torch.eye(3), torch.eye(4), 0, 10)
