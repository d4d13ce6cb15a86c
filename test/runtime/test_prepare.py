from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from systems.rig import frame, ring
from torch.nn import functional as F

from occflow_core.runtime.prepare import Fit, fit, prepare
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
