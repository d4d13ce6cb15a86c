"""What becomes of pictures before the network sees them, and that their cameras stay true."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from far import GPU, Bus, Far
from PIL import Image
from systems.rig import frame, ring
from torch.nn import functional as F

from occflow_core.geometry import Cameras
from occflow_core.geometry.lenses import Lens, zoomed
from occflow_core.runtime.prepare import Fit, Rectifier, Resizer, fit, prepare
from occflow_core.types import Frame


def pictures(kind, n, height, width):
    """(N, 3, H, W) uint8 views of (N, H, W, 3) memory, as decoders give them."""
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        made = torch.randint(0, 256, (n, height, width, 3), generator=generator, dtype=torch.uint8)
        return made.permute(0, 3, 1, 2)
    rough = torch.rand(n, 3, 9, 16, generator=generator) * 255
    smooth = F.interpolate(rough, size=(height, width), mode="bicubic").clamp(0, 255).to(torch.uint8)
    return smooth.contiguous(memory_format=torch.channels_last)


def frame_of(images: torch.Tensor) -> Frame:
    n, _, height, width = images.shape
    return replace(frame(n=n), images=images, cameras=ring(n, height, width))


def test_a_camera_of_nuscenes_is_resized_by_044_and_loses_its_top_140_rows():
    assert fit((900, 1600), (256, 704)) == Fit(height=396, width=704, top=140, left=0)
    assert fit((900, 1600), (128, 352)) == Fit(height=198, width=352, top=70, left=0)


@pytest.mark.parametrize("size", [(900, 1600), (480, 640), (1208, 1920), (720, 1280), (97, 1001), (1001, 97), (64, 96)])
@pytest.mark.parametrize("to", [(256, 704), (128, 352), (64, 64)])
def test_any_camera_covers_any_network_picture(size, to):
    plan = fit(size, to)
    assert plan.top == plan.height - to[0] >= 0 and 0 <= plan.left <= plan.width - to[1]
    assert plan.top == 0 or plan.width == to[1]  # no larger than it must be
    images = pictures("smooth", 1, *size)
    for resize in ("fast", "pillow"):
        ready = prepare(frame_of(images), *to, resize)
        assert ready.images.shape == (1, 3, *to) and ready.images.dtype == torch.uint8


@pytest.mark.parametrize("kind", ["noise", "smooth"])
@pytest.mark.parametrize("size", [(900, 1600), (600, 960), (480, 640), (200, 300)])
def test_the_pillow_resize_equals_pillows_bicubic_within_one_grey_level_rarely_two_where_it_hardly_shrinks(kind, size):
    images = pictures(kind, 2, *size)
    ready = prepare(frame_of(images), 256, 704, "pillow")
    plan = fit(size, (256, 704))
    for mine, given in zip(ready.images, images):
        picture = Image.fromarray(given.permute(1, 2, 0).numpy()).resize((plan.width, plan.height), Image.BICUBIC)
        box = (plan.left, plan.top, plan.left + 704, plan.top + 256)
        theirs = np.asarray(picture.crop(box)).astype(int)
        off = np.abs(mine.permute(1, 2, 0).numpy().astype(int) - theirs)
        assert off.max() <= (1 if plan.width < 0.6 * size[1] else 2) and (off > 1).mean() < 1e-4


@pytest.mark.parametrize("resize", ["fast", "pillow"])
@pytest.mark.parametrize("size", [(900, 1600), (1208, 1920), (600, 601)])
def test_rows_that_are_cropped_away_need_not_be_resized(resize, size):
    images = pictures("noise", 1, *size)
    plan = fit(size, (128, 352))
    mode = {"fast": "bilinear", "pillow": "bicubic"}[resize]
    whole = F.interpolate(images, size=(plan.height, plan.width), mode=mode, antialias=True)
    whole = whole[:, :, plan.top : plan.top + 128, plan.left : plan.left + 352]
    mine = prepare(frame_of(images), 128, 352, resize).images
    assert (mine.int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize("resize", ["fast", "pillow"])
def test_what_is_finer_than_a_pixel_becomes_its_mean(resize):
    board = (torch.arange(900)[:, None] + torch.arange(1600)) % 2 * 200
    images = board.to(torch.uint8).expand(1, 3, 900, 1600)
    ready = prepare(frame_of(images), 128, 352, resize).images.int()
    assert (ready - 100).abs().max() <= 4


@pytest.mark.parametrize("resize", ["fast", "pillow"])
@pytest.mark.parametrize("size", [(900, 1600), (600, 600), (300, 1600)])
def test_the_cameras_stay_true_for_the_pictures(resize, size):
    height, width = size
    cameras = ring(1, height, width)
    spot = torch.tensor([[[0.4 * width, 0.75 * height]]], dtype=torch.float64)
    point = cameras.unproject(spot, torch.tensor([[12.0]], dtype=torch.float64))
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    blob = 250 * torch.exp(-((x - spot[0, 0, 0]) ** 2 + (y - spot[0, 0, 1]) ** 2) / (2 * (width / 60) ** 2))
    ready = prepare(frame_of(blob.to(torch.uint8).expand(1, 3, height, width)), 128, 352, resize)
    pixel = ready.cameras.project(point)[0][0, 0]
    seen = ready.images[0, 0].double()
    y, x = torch.meshgrid(torch.arange(128) + 0.5, torch.arange(352) + 0.5, indexing="ij")
    found = torch.stack([(seen * x).sum(), (seen * y).sum()]) / seen.sum()
    assert (found - pixel).abs().max() < 0.05
    assert (ready.cameras.height, ready.cameras.width) == (128, 352)


def test_pictures_that_fit_already_are_left_alone():
    given = frame(128, 352)
    assert prepare(given, 128, 352, "fast") is given


def test_an_unknown_resize_is_refused():
    with pytest.raises(ValueError, match=r"\['fast', 'pillow'\], got 'nearest'"):
        prepare(frame(), 64, 96, "nearest")


# ---- one camera at a time: sizes that differ, and lenses

LENSES = [
    Lens("plumb_bob", (-0.3, 0.1, 0.001, -0.002, -0.02)),
    Lens("rational_polynomial", (0.6, 0.2, 0.001, 0.0005, 0.02, 0.9, 0.3, 0.04)),
    Lens("equidistant", (0.02, -0.01, 0.003, -0.001)),
]
SIZE, TO = (450, 800), (64, 176)
K = np.array([[400.0, 0.0, 405.0], [0.0, 395.0, 220.0], [0.0, 0.0, 1.0]])


def made(way, picture, to=TO) -> np.ndarray:
    """The network's picture of one (H, W, 3) uint8."""
    out = torch.empty(*to, 3, dtype=torch.uint8)
    way.into(out, torch.from_numpy(picture))
    return out.numpy()


def middles(height, width):
    """(height, width, 2): pixels' middles."""
    return np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)


def straightened(lens, pixels, k):
    """Rays (..., 2) of pixels of a lens's picture, by OpenCV."""
    given, bend = pixels.reshape(-1, 1, 2), np.array(lens.coefficients)
    ends = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 200, 1e-12)
    if lens.model == "equidistant":
        rays = cv2.fisheye.undistortPoints(given, k, bend, criteria=ends)
    else:
        rays = cv2.undistortPointsIter(given, k, bend, None, None, ends)
    return rays.reshape(pixels.shape)


def scene(rays):
    """A smooth pattern far away: grey levels (..., 3) of rays (..., 2)."""
    x, y = rays[..., 0], rays[..., 1]
    waves = np.stack([np.sin(9 * x + 2 * y), np.cos(7 * y - 3 * x), np.sin(5 * x) * np.cos(6 * y)], axis=-1)
    return 128 + 100 * waves


@pytest.mark.parametrize("wide", [1.0, 0.7], ids=["as K", "zoomed in"])
@pytest.mark.parametrize("lens", LENSES, ids=lambda lens: lens.model)
def test_a_picture_through_a_lens_becomes_the_pinhole_picture_of_the_same_scene(lens, wide):
    seen = scene(straightened(lens, middles(*SIZE), K)).round().astype(np.uint8)
    way = Rectifier(lens, K, zoomed(K, wide), SIZE, TO)
    assert (way.zoom > 1) == (wide < 1)
    out = made(way, seen)
    back = np.linalg.inv(way.pixels_from_camera)
    off = out - scene(middles(*TO) @ back[:2, :2].T + back[:2, 2])
    assert np.abs(off).max() < 2 and np.abs(off).mean() < 0.4


@pytest.mark.parametrize("lens", LENSES, ids=lambda lens: lens.model)
def test_a_points_pixel_through_a_lens_lands_where_the_frames_camera_says(lens):
    way = Rectifier(lens, K, K, SIZE, TO)
    cameras = Cameras(torch.from_numpy(way.pixels_from_camera)[None], torch.eye(4, dtype=torch.float64)[None], *TO)
    points = cameras.unproject(
        torch.tensor([[[14.3, 11.6], [90.2, 30.7], [160.8, 53.1]]]).double(), torch.tensor([8.0])
    )
    project = cv2.fisheye.projectPoints if lens.model == "equidistant" else cv2.projectPoints
    given = points[0].numpy()[None]
    places = project(given, np.zeros(3), np.zeros(3), K, np.array(lens.coefficients))[0].reshape(-1, 2)
    for place, pixel in zip(places, cameras.project(points)[0][0], strict=True):
        blob = 250 * np.exp(-((middles(*SIZE) - place) ** 2).sum(-1) / (2 * 2.5**2))
        weight = made(way, np.repeat(blob[..., None], 3, axis=-1).round().astype(np.uint8))[..., :1].astype(float)
        found = (weight * middles(*TO)).sum((0, 1)) / weight.sum()
        assert np.abs(found - pixel.numpy()).max() < 0.05


@pytest.mark.parametrize("to", [(256, 704), (128, 352)])
@pytest.mark.parametrize("lens", LENSES, ids=lambda lens: lens.model)
def test_what_is_finer_than_a_pixel_becomes_its_mean_through_a_lens_too(lens, to):
    k = np.diag([2.0, 2.0, 1.0]) @ K
    board = np.indices((900, 1600)).sum(0)[..., None] % 2 * 200
    way = Rectifier(lens, k, k, (900, 1600), to)
    off = made(way, np.repeat(board, 3, axis=-1).astype(np.uint8), to).astype(int) - 100
    assert abs(off.mean()) < 2 and off.std() < 5 and np.abs(off).max() < 30  # one sample a pixel: 50 and 100


def test_no_black_border_is_shown_and_the_largest_picture_stays_whole():
    lens = Lens("plumb_bob", (0.25, 0.05, 0.001, 0.001))  # a cushion: the same K would look beyond the picture
    way = Rectifier(lens, K, K, SIZE, TO)
    assert way.zoom > 1.1 and (made(way, np.full((*SIZE, 3), 255, np.uint8)) == 255).all()
    assert way.pixels_from_camera[0, 0] == pytest.approx(way.zoom * 400 * 176 / 800)
    assert way.pixels_from_camera[0, 2] == pytest.approx(405 * 176 / 800)


def test_a_lens_that_hardly_bends_is_a_resize():
    given = pictures("smooth", 1, *SIZE)[0].permute(1, 2, 0).contiguous().numpy()
    resizer, rectifier = Resizer(K, SIZE, TO, "fast"), Rectifier(Lens("plumb_bob", (1e-9, 0, 0, 0)), K, K, SIZE, TO)
    assert np.abs(made(resizer, given).astype(int) - made(rectifier, given)).max() <= 1
    assert np.allclose(resizer.pixels_from_camera, rectifier.pixels_from_camera, rtol=1e-6)


@pytest.mark.parametrize("resize", ["fast", "pillow"])
@pytest.mark.parametrize("size", [(900, 1600), (480, 640), (128, 352), (97, 200)])
def test_one_picture_is_resized_as_all_of_a_frame_are(resize, size):
    frame = frame_of(pictures("noise", 3, *size))
    together = prepare(frame, 128, 352, resize)
    for i, image in enumerate(frame.images):
        way = Resizer(frame.cameras.pixels_from_camera[i].numpy(), size, (128, 352), resize)
        out = made(way, image.permute(1, 2, 0).numpy(), (128, 352))
        assert torch.equal(torch.from_numpy(out).permute(2, 0, 1), together.images[i])
        assert np.array_equal(way.pixels_from_camera, together.cameras.pixels_from_camera[i].numpy())


def test_a_lens_without_any_pinhole_picture_is_refused():
    with pytest.raises(ValueError, match="leaves no pinhole picture"):
        Rectifier(Lens("plumb_bob", (-20.0, 0, 0, 0)), K, K, SIZE, TO)


# ---- where the network is on a GPU, here on one that is not there


def apart(there: torch.Tensor, here: torch.Tensor) -> int:
    """Grey levels."""
    return int((there.near.int() - here.int()).abs().max())


def colours(kind, height, width) -> torch.Tensor:
    """One picture (H, W, 3) uint8."""
    return pictures(kind, 1, height, width)[0].permute(1, 2, 0).contiguous()


@pytest.mark.parametrize("kind", ["noise", "smooth"])
@pytest.mark.parametrize("resize", ["fast", "pillow"])
@pytest.mark.parametrize("size", [(900, 1600), (480, 640), (1208, 1920), (97, 200)])
def test_a_gpu_is_sent_what_the_cameras_gave_and_makes_the_same_of_it(kind, resize, size):
    given = frame_of(pictures(kind, 2, *size))
    here = prepare(given, 128, 352, resize)
    with Bus() as bus:
        there = prepare(given, 128, 352, resize, GPU)
    off = apart(there.images, here.images)
    assert there.images.device == GPU and off <= 1
    assert torch.equal(there.cameras.pixels_from_camera, here.cameras.pixels_from_camera)
    assert bus.sent == [(torch.uint8, given.images.numel())] and not bus.waits


def test_a_bicubic_filter_that_overshoots_is_cut_off_between_rows_and_columns_there_too():
    stripes = (torch.arange(300)[:, None] // 3 + torch.arange(500) // 4) % 2 * 255
    given = frame_of(stripes.to(torch.uint8).expand(1, 3, 300, 500))
    with Bus():
        there = prepare(given, 128, 352, "pillow", GPU)
    assert apart(there.images, prepare(given, 128, 352, "pillow").images) <= 1


@pytest.mark.parametrize("size", [SIZE, (900, 1600), (60, 170)], ids=str)
@pytest.mark.parametrize("wide", [1.0, 0.7], ids=["as K", "zoomed in"])
@pytest.mark.parametrize("lens", LENSES, ids=lambda lens: lens.model)
def test_a_lens_is_taken_out_on_a_gpu_as_here(lens, wide, size):
    k = np.diag([size[1] / 800, size[0] / 450, 1.0]) @ K
    way, here, there = Rectifier(lens, k, zoomed(k, wide), size, TO), *torch.zeros(2, *TO, 3, dtype=torch.uint8)
    with Bus() as bus:
        there = Far(there)
        for kind in ("noise", "smooth"):
            picture = colours(kind, *size)
            way.into(here, picture)
            bus.sent.clear()
            way.into(there, picture)
            assert apart(there, here) <= 1
    assert bus.sent == [(torch.uint8, picture.numel())] and not bus.waits  # the maps went there once, before


@pytest.mark.parametrize("resize", ["fast", "pillow"])
@pytest.mark.parametrize("size", [(900, 1600), (480, 640), (64, 176), (97, 200)])
def test_one_picture_is_resized_on_a_gpu_as_here(resize, size):
    way, picture, here = Resizer(K, size, TO, resize), colours("noise", *size), torch.zeros(*TO, 3, dtype=torch.uint8)
    way.into(here, picture)
    with Bus() as bus:
        there = Far(torch.zeros_like(here))
        way.into(there, picture)
    assert apart(there, here) <= 1 and bus.sent == [(torch.uint8, picture.numel())] and not bus.waits
