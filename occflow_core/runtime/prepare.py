"""Frames, or single pictures, at camera size -> at network size. N cameras, H W pixels.

Where the network is on a GPU, pictures go there as they came, uint8, and are resampled there; else here. Where the
result is to lie decides it. It is the same within one grey level: there is one `Fit`, and one map of a lens.
"""

from dataclasses import dataclass, replace
from math import ceil, gcd

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry import Cameras
from ..geometry.lenses import Lens, least_zoom, real_pixels, zoomed
from ..transfer import numbers, sent
from ..types import Frame

# Both are antialiased. "pillow" equals Pillow's BICUBIC, which published weights were trained with, within one grey
# level; where it hardly shrinks or enlarges (scale above 0.6), fewer than one pixel in ten thousand is off by two.
RESIZES = {"fast": "bilinear", "pillow": "bicubic"}
REACH = 2  # pixels of the result that a filter reaches (bicubic; bilinear 1)
APART = 1.25  # pixels of the given picture between two of its samples, see `Rectifier`
BAND = 16  # rows of the result whose places are computed at once
FINEST = 8  # samples along a pixel of the result: maps of a network's picture stay below 100 MB
PARTS = 32  # of a pixel, in which OpenCV's maps tell places
HOST = torch.device("cpu")


@dataclass(frozen=True)
class Fit:
    """How pictures of one size become pictures of another: resize to height x width, then crop."""

    height: int  # pixels after the resize
    width: int  # pixels after the resize
    top: int  # rows that the crop drops above
    left: int  # columns that the crop drops on the left


def fit(from_size: tuple[int, int], to_size: tuple[int, int]) -> Fit:
    """Sizes are (height, width): the smallest scale that covers both, keeping the bottom and the middle.

    As the published systems do in tests (OPUS `loaders/pipelines/transforms.py`, RandomTransformImage): 900 x 1600 ->
    256 x 704 is a resize by 0.44 to 396 x 704 and a crop of the top 140 rows.
    """
    scale = max(to / given for to, given in zip(to_size, from_size, strict=True))
    # a hair above: a product of 703.99... must not lose the column that it is meant to have
    height, width = (int(given * scale + 1e-6) for given in from_size)
    return Fit(height, width, top=height - to_size[0], left=(width - to_size[1]) // 2)


def prepare(frame: Frame, height: int, width: int, resize: str, device: torch.device = HOST) -> Frame:
    """The frame with pictures of height x width pixels, and cameras that are true for them.

    resize: a word of RESIZES; ValueError for others. device: where the pictures are resized, and lie afterwards; those
    that fit already stay where they are.
    """
    if resize not in RESIZES:
        raise ValueError(f"prepare: resize must be one of {sorted(RESIZES)}, got {resize!r}")
    size = (frame.cameras.height, frame.cameras.width)
    if size == (height, width):
        return frame
    to = fit(size, (height, width))
    cameras = frame.cameras.resized(to.height, to.width).cropped(to.top, to.left, height, width)
    images = _resize(sent(frame.images, device), to, height, width, RESIZES[resize])
    return replace(frame, images=images, cameras=cameras)


class Resizer:
    """Pictures of one pinhole camera -> the network's: `prepare` for one camera of a rig whose sizes differ."""

    def __init__(self, pixels_from_camera: np.ndarray, size: tuple[int, int], to_size: tuple[int, int], resize: str):
        """pixels_from_camera (3, 3); sizes are (height, width); resize: a word of RESIZES."""
        self.pixels_from_camera = _fitted(pixels_from_camera, size, to_size)  # (3, 3), true for the network's pictures
        self._fit, self._size, self._mode = fit(size, to_size), to_size, RESIZES[resize]

    def into(self, out: Tensor, picture: Tensor) -> None:
        """Writes the network's picture of `picture` (H, W, 3) uint8 into `out` (height, width, 3) uint8, and resizes it
        where `out` lies."""
        given = sent(picture, out.device).permute(2, 0, 1)[None]
        out.copy_(_resize(given, self._fit, *self._size, self._mode)[0].permute(1, 2, 0))


class Rectifier:
    """Pictures through a lens -> the network's pictures of a pinhole camera at the same place, in one resampling.

    The pinhole camera is the wanted one, fitted as `fit` does and zoomed in as far as it must be, so that each of its
    pixels was really seen: what it claims to see, `ops.observed` may believe.

    A pixel of the result takes several of the given picture together, so it is the mean of a square of bilinear
    samples: one alone, at 1600x900 -> 352x128, would look at four of the twenty pixels that belong to it, and fine
    patterns would become coarse ones. Neighbouring samples are at most APART pixels apart; each reaches one pixel to
    every side, so all pixels count nearly alike. Maps are made once, in float64, and kept as fixed-point numbers (1/32
    pixel), for which OpenCV is fastest; a GPU is told the same places.
    """

    def __init__(
        self,
        lens: Lens,
        real_pixels_from_camera: np.ndarray,  # (3, 3), of the lens's picture
        wanted_pixels_from_camera: np.ndarray,  # (3, 3), of a pinhole picture of the same size
        size: tuple[int, int],  # height, width
        to_size: tuple[int, int],
    ):
        """ValueError where no zoom of at most `lenses.MOST_ZOOM` does it."""
        import cv2

        wanted = _fitted(wanted_pixels_from_camera, size, to_size)
        self.zoom = least_zoom(lens, real_pixels_from_camera, size, wanted, to_size)
        self.pixels_from_camera = zoomed(wanted, self.zoom)  # (3, 3), true for the network's pictures
        self._from_size, self._size = size, to_size
        self._grid: Tensor | None = None  # the maps on a device, once a picture was wanted there

        def places(samples: int, first: int, last: int) -> np.ndarray:
            """(rows samples, width samples, 2) for rows `first` to `last` - 1 of the result: where each of its samples
            is taken in the given picture, whose first pixel's middle is (0, 0)."""
            v = (np.arange(first * samples, last * samples) + 0.5) / samples
            u = (np.arange(to_size[1] * samples) + 0.5) / samples
            pixels = np.stack(np.meshgrid(u, v), axis=-1)
            return real_pixels(lens, real_pixels_from_camera, self.pixels_from_camera, pixels)[0] - 0.5

        each = places(1, 0, to_size[0])
        apart = max(np.linalg.norm(np.diff(each, axis=axis), axis=-1).max(initial=0.0) for axis in (0, 1))
        samples = min(max(1, ceil(apart / APART)), FINEST)
        bands = []
        for first in range(0, to_size[0], BAND):  # float64 for all rows at once could be a gigabyte
            x, y = np.moveaxis(places(samples, first, min(first + BAND, to_size[0])), -1, 0).astype(np.float32)
            bands.append(cv2.convertMaps(x, y, cv2.CV_16SC2))
        self._maps = [np.concatenate(parts) for parts in zip(*bands, strict=True)]

    def into(self, out: Tensor, picture: Tensor) -> None:
        """Writes the network's picture of `picture` (H, W, 3) uint8 into `out` (height, width, 3) uint8, and resamples
        it where `out` lies."""
        # the border is repeated for the outer half of the outermost pixels only: no sample lies farther out
        if out.device.type == "cpu":
            import cv2

            samples = cv2.remap(picture.numpy(), *self._maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            cv2.resize(samples, self._size[::-1], dst=out.numpy(), interpolation=cv2.INTER_AREA)
            return
        if self._grid is None or self._grid.device != out.device:
            maps = [sent(torch.from_numpy(part.astype(np.int16)), out.device) for part in self._maps]
            self._grid = _grid(*maps, self._from_size)
        given = sent(picture, out.device).permute(2, 0, 1)[None].float()
        samples = F.grid_sample(given, self._grid, mode="bilinear", padding_mode="border", align_corners=False)
        out.copy_(_rounded(F.adaptive_avg_pool2d(samples, self._size))[0].permute(1, 2, 0))


def _fitted(pixels_from_camera: np.ndarray, size: tuple[int, int], to_size: tuple[int, int]) -> np.ndarray:
    """(3, 3) of the pictures after `fit`."""
    to, nowhere = fit(size, to_size), torch.eye(4, dtype=torch.float64)
    camera = Cameras(torch.from_numpy(pixels_from_camera).double(), nowhere, *size)
    return camera.resized(to.height, to.width).cropped(to.top, to.left, *to_size).pixels_from_camera.numpy()


def _resize(images: Tensor, to: Fit, height: int, width: int, mode: str) -> Tensor:
    """Pictures (N, 3, H, W) uint8 -> (N, 3, height, width); fastest as views of (N, H, W, 3) memory."""
    # Rows that the crop drops anyway need no resize. Only whole periods of the scale are left out (at 0.44, 25 rows
    # become 11), so that the filter falls on the others exactly as it would have.
    period = to.height // gcd(images.shape[2], to.height)
    dropped = max(0, to.top - REACH) // period * period
    images = images[:, :, dropped * images.shape[2] // to.height :]
    size, top = (to.height - dropped, to.width), to.top - dropped
    if images.device.type == "cpu":
        images = F.interpolate(images, size=size, mode=mode, antialias=True)
    else:  # PyTorch's antialiased kernels of other devices take no uint8
        # along rows, then along columns, as Pillow does and the above: where a bicubic filter overshoots in the first
        # half, what is cut off there shows in the second
        images = F.interpolate(images.float(), size=(images.shape[2], to.width), mode=mode, antialias=True)
        images = _rounded(F.interpolate(images.clamp(0, 255), size=size, mode=mode, antialias=True))
    return images[:, :, top : top + height, to.left : to.left + width]


def _grid(whole: Tensor, part: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps of OpenCV, (R, S, 2) pixels and (R, S) parts of them, into pictures of a size -> (1, R, S, 2) as
    `grid_sample` takes it: -1 and 1 are a picture's borders, not its outermost pixels' middles."""
    places = whole + torch.stack([part % PARTS, part // PARTS], dim=-1) / PARTS
    return ((2 * places + 1) / numbers(size[::-1], places) - 1)[None]


def _rounded(levels: Tensor) -> Tensor:
    """Grey levels as uint8; those out of its range are cut off."""
    return levels.round().clamp(0, 255).to(torch.uint8)
