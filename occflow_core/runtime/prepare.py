"""Frames at camera size -> frames at network size. N cameras, H W pixels."""

from dataclasses import dataclass, replace
from math import gcd

from torch import Tensor
from torch.nn import functional as F

from ..types import Frame

# Both are antialiased. "pillow" equals Pillow's BICUBIC, which published weights were trained with, within one grey
# level; where it hardly shrinks or enlarges (scale above 0.6), fewer than one pixel in ten thousand is off by two.
RESIZES = {"fast": "bilinear", "pillow": "bicubic"}
REACH = 2  # pixels of the result that a filter reaches (bicubic; bilinear 1)


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


def prepare(frame: Frame, height: int, width: int, resize: str) -> Frame:
    """The frame with pictures of height x width pixels, and cameras that are true for them.

    resize: a word of RESIZES; ValueError for others.
    """
    if resize not in RESIZES:
        raise ValueError(f"prepare: resize must be one of {sorted(RESIZES)}, got {resize!r}")
    size = (frame.cameras.height, frame.cameras.width)
    if size == (height, width):
        return frame
    to = fit(size, (height, width))
    cameras = frame.cameras.resized(to.height, to.width).cropped(to.top, to.left, height, width)
    return replace(frame, images=_resize(frame.images, to, height, width, RESIZES[resize]), cameras=cameras)


def _resize(images: Tensor, to: Fit, height: int, width: int, mode: str) -> Tensor:
    """Pictures (N, 3, H, W) uint8 -> (N, 3, height, width); fastest as views of (N, H, W, 3) memory."""
    # Rows that the crop drops anyway need no resize. Only whole periods of the scale are left out (at 0.44, 25 rows
    # become 11), so that the filter falls on the others exactly as it would have.
    period = to.height // gcd(images.shape[2], to.height)
    dropped = max(0, to.top - REACH) // period * period
    images = images[:, :, dropped * images.shape[2] // to.height :]
    resized = F.interpolate(images, size=(to.height - dropped, to.width), mode=mode, antialias=True)
    top = to.top - dropped
    return resized[:, :, top : top + height, to.left : to.left + width]
