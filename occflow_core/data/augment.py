"""Augmentation that keeps cameras, poses and truth true for each other. B batch, T time, N cameras, H W pixels.

    view = augment.opus_view(rng)                                 # one draw for all pictures of a clip
    frames = [augment.seen(frame, view) for frame in frames]      # resize, crop, mirror, turn; Cameras follow
    clip, truth = augment.moved(clip, truth, augment.flip(x=True))  # the world itself, mirrored or turned
    images = augment.photometric(clip.images, rng)                # colours, on the device where the images are

All draws come from a numpy Generator: the same generator gives the same draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry import Cameras, Grid, rigid
from ..types import Clip, Frame, Occupancy

# ---- pictures


@dataclass(frozen=True)
class View:
    """How a picture becomes one of height x width: resize, then crop, then mirror, then turn about the middle."""

    resized: tuple[int, int]  # height, width after the resize, pixels
    top: int  # where the crop begins; may be negative: what lies outside is black
    left: int
    height: int  # of the result, pixels
    width: int
    mirror: bool = False  # u -> width - u
    turn: float = 0.0  # degrees, counter-clockwise as one looks at the picture

    def after(self, cameras: Cameras) -> Cameras:
        """The cameras of the changed pictures."""
        cameras = cameras.resized(*self.resized).cropped(self.top, self.left, self.height, self.width)
        cameras = cameras.flipped() if self.mirror else cameras
        matrix = self._turned().to(cameras.pixels_from_camera)
        return replace(cameras, pixels_from_camera=matrix @ cameras.pixels_from_camera)

    def of(self, images: Tensor) -> Tensor:
        """Pictures (..., 3, H, W) uint8 or float -> (..., 3, height, width) of the same type, on their own device."""
        lead, kind = images.shape[:-3], images.dtype
        pictures = images.reshape(-1, *images.shape[-3:])
        if pictures.shape[-2:] != self.resized:
            # antialiased, as published systems do it (Pillow's bicubic); on uint8 within one grey level of Pillow.
            # Whole numbers are resized on CPUs only
            pictures = pictures if pictures.device.type == "cpu" else pictures.float()
            pictures = F.interpolate(pictures, size=self.resized, mode="bicubic", antialias=True)
        bottom, right = self.resized[0] - self.top - self.height, self.resized[1] - self.left - self.width
        pictures = F.pad(pictures, (-self.left, -right, -self.top, -bottom))  # negative: cuts off
        pictures = pictures.flip(-1) if self.mirror else pictures
        if self.turn:
            pictures = _warped(pictures, torch.linalg.inv(self._turned()))
        if kind == torch.uint8 and pictures.dtype != kind:
            pictures = pictures.round().clamp(0, 255).to(kind)
        return pictures.reshape(*lead, *pictures.shape[-3:])

    def _turned(self) -> Tensor:
        """(3, 3) float64: pixels after the turn <- pixels before it."""
        angle, u, v = math.radians(self.turn), self.width / 2, self.height / 2
        c, s = math.cos(angle), math.sin(angle)
        # v points down: counter-clockwise for the eye is (u, v) -> (c u + s v, -s u + c v)
        return torch.tensor(
            [[c, s, u - c * u - s * v], [-s, c, v + s * u - c * v], [0.0, 0.0, 1.0]], dtype=torch.float64
        )


def seen(frame: Frame, views: View | Sequence[View]) -> Frame:
    """The frame through one view, or each camera through its own (N views of one result size)."""
    views = [views] * len(frame.names) if isinstance(views, View) else list(views)
    if len(views) != len(frame.names) or len({(view.height, view.width) for view in views}) != 1:
        raise ValueError(
            f"augment: {len(frame.names)} cameras need as many views of one size, got "
            f"{[f'{view.width} x {view.height}' for view in views]}"
        )
    cameras = [view.after(frame.cameras[i]) for i, view in enumerate(views)]
    if len(set(views)) == 1:
        images = views[0].of(frame.images)
    else:
        images = torch.stack([view.of(picture) for view, picture in zip(views, frame.images)])
    return replace(
        frame,
        images=images,
        cameras=Cameras(
            torch.stack([c.pixels_from_camera for c in cameras]), frame.cameras.car_from_camera, *images.shape[-2:]
        ),
    )


def opus_view(
    rng: np.random.Generator, source: tuple[int, int] = (900, 1600), size: tuple[int, int] = (256, 704)
) -> View:
    """OPUS's training view: one draw for all pictures of a clip (height, width of the source and of the result).

    Scale 0.38 to 0.55 of 1600 pixels (of another source: so that the result shows as much), the bottom kept, the
    left edge anywhere, mirrored every other time. Source: github.com/jbwang1997/OPUS, `ida_aug_conf` of its configs.
    """
    scale = rng.uniform(0.38, 0.55) * (size[1] / 704) * (1600 / source[1])
    resized = int(source[0] * scale), int(source[1] * scale)
    left = int(rng.uniform(0, max(0, resized[1] - size[1])))
    return View(resized, resized[0] - size[0], left, *size, mirror=bool(rng.integers(2)))


def stcocc_view(
    rng: np.random.Generator, source: tuple[int, int] = (900, 1600), size: tuple[int, int] = (256, 704)
) -> View:
    """STCOcc's training view: one draw for each camera, the same for all of its times.

    Scale width / 1600 plus -0.06 to 0.11, the bottom kept, the left edge anywhere, mirrored every other time, turned
    by up to 5.4 degrees. Source: BEVDet's `data_config`, which STCOcc shares. The turn is sampled bilinearly, theirs
    takes the nearest pixel.
    """
    scale = size[1] / source[1] + rng.uniform(-0.06, 0.11) * (size[1] / 704) * (1600 / source[1])
    resized = int(source[0] * scale), int(source[1] * scale)
    left = int(rng.uniform(0, max(0, resized[1] - size[1])))
    mirror = bool(rng.integers(2))
    return View(resized, resized[0] - size[0], left, *size, mirror=mirror, turn=float(rng.uniform(-5.4, 5.4)))


def _warped(pictures: Tensor, before_from_after: Tensor) -> Tensor:
    """Pictures (M, 3, H, W), bilinear; black where the source does not reach."""
    height, width = pictures.shape[-2:]
    # affine_grid speaks of [-1, 1] over the whole picture, edges included (align_corners=False), as our pixels do
    unit = torch.tensor([[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]], dtype=torch.float64)
    theta = (unit @ before_from_after @ torch.linalg.inv(unit))[:2].to(pictures.device, torch.float32)
    grid = F.affine_grid(theta[None], (1, 3, height, width), align_corners=False).expand(len(pictures), -1, -1, -1)
    floats = pictures if pictures.is_floating_point() else pictures.float()
    return F.grid_sample(floats, grid.to(floats.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)


# ---- the world


def flip(x: bool = False, y: bool = False) -> Tensor:
    """new_from_car (4, 4) float64 of a world that is mirrored: front and back change places (x), left and right (y)."""
    return torch.diag(torch.tensor([-1.0 if x else 1.0, -1.0 if y else 1.0, 1.0, 1.0], dtype=torch.float64))


def turn(degrees: float) -> Tensor:
    """new_from_car (4, 4) float64 of a world that is turned about the car's z, counter-clockwise seen from above.

    Quarter turns move voxels exactly; between them each voxel takes the label of the old voxel that its centre lay in.
    """
    quarters, rest = divmod(degrees / 90.0, 1.0)
    # exact at quarter turns: the sine of pi is not 0 in floats
    c, s = ((1, 0), (0, 1), (-1, 0), (0, -1))[int(quarters) % 4]
    if rest:
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    new_from_car = torch.eye(4, dtype=torch.float64)
    new_from_car[:2, :2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return new_from_car


def moved(
    clip: Clip, truth: Occupancy | None, new_from_car: Tensor, new_from_car_last: Tensor | None = None
) -> tuple[Clip, Occupancy | None]:
    """The whole clip and its truth told in another car frame: mirrored (`flip`), turned (`turn`), or both.

    Pictures and pixels stay as they are: a camera sees the same, its `car_from_camera` says where (for a mirrored
    world with determinant -1: nothing rigid, but exact). Poses of the past, points, labels, flow, `seen` and instances
    follow. Voxels that come from outside the grid are free, not seen and of no instance. new_from_car_last: what the
    clip before was moved by, where this differs; a drive that is streamed is best moved by one matrix throughout.

    ValueError where the matrix does more than mirror and turn about z.
    """
    new = new_from_car.to(torch.float64).cpu()
    last = new if new_from_car_last is None else new_from_car_last.to(torch.float64).cpu()
    for matrix in (new, last):
        flat = torch.eye(4, dtype=torch.float64)
        flat[:2, :2] = matrix[:2, :2]
        if not torch.equal(flat, matrix) or (matrix @ matrix.mT - torch.eye(4)).abs().max() > 1e-9:
            raise ValueError(f"augment: the world can be mirrored and turned about z, got {matrix.tolist()}")
    like = clip.now_from_then
    turned = replace(
        clip,
        cameras=clip.cameras.moved(new.to(like)),
        # every time of the clip is told in its own moved frame
        now_from_then=_product(new, clip.now_from_then, new),
        now_from_last=_product(new, clip.now_from_last, last),
        points=None
        if clip.points is None
        else tuple(torch.cat([rigid.apply(new.to(p), p[:, :3]), p[:, 3:]], dim=1) for p in clip.points),
    )
    return turned, None if truth is None else _moved_truth(truth, new)


def _product(new: Tensor, now_from_then: Tensor, new_then: Tensor) -> Tensor:
    return (new @ now_from_then.to("cpu", torch.float64) @ new_then.mT).to(now_from_then)


def _moved_truth(truth: Occupancy, new_from_car: Tensor) -> Occupancy:
    grid, device = truth.grid, truth.labels.device
    if _onto_itself(grid, new_from_car):
        return _permuted(truth, new_from_car)
    # where did what is now in a voxel lie before? centres lie far from edges, so quarter turns round to nothing
    old, inside = grid.index(rigid.apply(new_from_car.mT, grid.centres(torch.float64)))
    ix, iy, iz = old.to(device).unbind(-1)
    inside = inside.to(device)
    labels, seen = truth.labels[..., ix, iy, iz], truth.seen[..., ix, iy, iz] & inside
    flow = truth.flow
    if flow is not None:
        flow = flow[..., ix, iy, iz, :] @ new_from_car[:2, :2].mT.to(flow)
        flow = torch.where(inside[..., None], flow, torch.nan)
    instances = None if truth.instances is None else truth.instances[..., ix, iy, iz] * inside
    free = torch.full_like(labels, truth.classes.free)
    return replace(truth, labels=torch.where(inside, labels, free), flow=flow, seen=seen, instances=instances)


def _onto_itself(grid: Grid, new_from_car: Tensor) -> bool:
    """Does every voxel land in one voxel? Mirrors and quarter turns of a grid with the car in its middle."""
    swapped = new_from_car[0, 0] == 0
    middle = all(abs(low + high) < 1e-6 for low, high in zip(grid.low[:2], grid.high[:2]))
    square = grid.shape[0] == grid.shape[1] and grid.voxel[0] == grid.voxel[1]
    return middle and set(new_from_car[:2, :2].abs().flatten().tolist()) == {0.0, 1.0} and (square or not swapped)


def _permuted(truth: Occupancy, new_from_car: Tensor) -> Occupancy:
    """The truth moved by a matrix of which `_onto_itself` is true, a hundred times as fast as by indices."""
    matrix = new_from_car[:2, :2]
    mirrored = [axis - 3 for axis in range(2) if matrix[axis].sum() < 0]  # -3 is x, -2 is y

    def placed(volume: Tensor) -> Tensor:
        return (volume.transpose(-3, -2) if matrix[0, 0] == 0 else volume).flip(mirrored)

    flow = None
    if truth.flow is not None:
        flow = torch.stack([placed(part) for part in truth.flow.unbind(-1)], dim=-1) @ matrix.mT.to(truth.flow)
    instances = None if truth.instances is None else placed(truth.instances)
    return replace(truth, labels=placed(truth.labels), flow=flow, seen=placed(truth.seen), instances=instances)


# ---- colours


def photometric(
    images: Tensor,
    rng: np.random.Generator,
    brightness: float = 32.0,
    contrast: tuple[float, float] = (0.5, 1.5),
    saturation: tuple[float, float] = (0.5, 1.5),
    hue: float = 18.0,
) -> Tensor:
    """Pictures (..., 3, H, W) RGB in 0..255 -> float32 of the same shape and device, each with draws of its own.

    Each step happens every other time: brightness plus up to `brightness` grey levels; contrast times a factor, before
    the colours are changed or after (a coin decides); saturation times a factor; hue plus up to `hue` degrees; the
    channels permuted. Values are not clipped. As OPUS trains (`GpuPhotoMetricMultiViewImage`, after SparseBEV).
    """
    pictures = images.reshape(-1, *images.shape[-3:]).to(torch.float32)
    count, device = len(pictures), pictures.device

    def drawn(low: float, high: float, rest: float) -> Tensor:
        values = np.where(rng.integers(2, size=count) == 1, rng.uniform(low, high, count), rest)
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]

    shift, factor = drawn(-brightness, brightness, 0.0), drawn(*contrast, 1.0)
    early = torch.tensor(rng.integers(2, size=count) == 1, device=device)[:, None, None]
    richer, around = drawn(*saturation, 1.0), drawn(-hue, hue, 0.0)
    order = np.stack([rng.permutation(3) if rng.integers(2) else np.arange(3) for _ in range(count)])

    pictures = pictures + shift[:, None]
    pictures = pictures * torch.where(early, factor, 1.0)[:, None]
    angle, rich, value = _hsv(pictures)
    pictures = _rgb((angle + around) % 360.0, rich * richer, value)
    pictures = pictures * torch.where(early, 1.0, factor)[:, None]
    order = torch.as_tensor(order, device=device)[:, :, None, None].expand_as(pictures)
    return pictures.gather(1, order).reshape(images.shape)


def _hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(M, 3, H, W) -> hue in degrees, saturation, value; as OpenCV defines them for float pictures."""
    value, which = rgb.max(1)
    spread = value - rgb.amin(1)
    r, g, b = rgb.unbind(1)
    step = torch.where(spread == 0, 1.0, spread)
    sector = torch.stack([(g - b) / step, 2.0 + (b - r) / step, 4.0 + (r - g) / step], dim=1)
    angle = sector.gather(1, which[:, None])[:, 0] * 60.0 % 360.0
    return angle, torch.where(value == 0, 0.0, spread / torch.where(value == 0, 1.0, value)), value


def _rgb(angle: Tensor, rich: Tensor, value: Tensor) -> Tensor:
    """The inverse of `_hsv`: (M, 3, H, W)."""
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (offset + angle / 60.0) % 6.0
        channels.append(value - value * rich * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return torch.stack(channels, dim=1)
