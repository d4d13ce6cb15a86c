"""What each pixel sees, how far away and what it is, and what that says of points in space. Ours.

A query speaks for a column of points two metres wide; which of them lies on a surface is told by the pixel behind which
it lies. As where pixels are lifted by a distribution of depths (Lift, Splat, Shoot, arXiv 2008.05711, section 3.1) that
is learned from what a ray meets (BEVDepth, arXiv 2206.10092), here by rays through the truth; but it is read at points,
and only its surest surfaces are written into the grid.

B batch, T time, N cameras, H W cells of the finest maps, P points, K classes.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..geometry import Cameras
from ..types import Occupancy, Prediction
from .decoder import Output
from .instants import View
from .losses import mean_over_processes
from .points import NAME_WEIGHTS

RANGES, NEAREST, FARTHEST = 32, 1.0, 60.0  # steps of the range, each a seventh longer than the one before; m
RANGE_WEIGHT, NAME_WEIGHT, NOTHING_WEIGHT = 0.3, 0.2, 0.3  # of the losses; and of pixels whose ray meets nothing
# seen at a grazing angle: where its range is a little short, such a surface floats and hides what is behind it
FLAT = ("driveable_surface", "other_flat", "sidewalk", "terrain")
PLACE = 20  # numbers that `_place` makes of a point
FINER = 2  # surfaces are read this many times as densely as the cells lie, along either side: else rays slip between
TINY = 1e-3  # below this a probability says no more


@dataclass(frozen=True)
class Sight:
    """What the pixels of the newest time see."""

    ranges: Tensor  # (B, N, H*W, RANGES + 1) logits of `_step` of the surface; the last: nothing inside the grid
    names: Tensor  # (B, N, H*W, K) logits of its class
    size: tuple[int, int]  # (H, W)
    cameras: Cameras  # (B, N)
    used: Tensor  # (B, N) bool


class Pixels(nn.Module):
    """The finest maps of the newest time -> what each of their cells sees."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.near = nn.Conv2d(channels, channels, 3, padding=1)
        self.say = nn.Conv2d(channels, RANGES + 1 + classes, 1)

    def forward(self, rows: Tensor, size: tuple[int, int], cameras: Cameras, used: Tensor) -> Sight:
        """rows (B, N, R, C): pyramids, the finest level, `size`, first. cameras and used (B, N)."""
        b, n, _, c = rows.shape
        maps = rows[:, :, : size[0] * size[1]].mT.reshape(b * n, c, *size)
        said = self.say(F.relu(self.near(maps))).flatten(2).mT.float().unflatten(0, (b, n))
        return Sight(said[..., : RANGES + 1], said[..., RANGES + 1 :], size, cameras, used)


class Look(nn.Module):
    """The last layer's points once more, each with what its own pixels say of it."""

    def __init__(self, channels: int, width: int, frames: int, classes: int, flow: bool):
        super().__init__()
        self.classes = classes
        self.narrow = nn.Linear(channels, width)
        self.place = nn.Sequential(nn.Linear(PLACE, 64), nn.ReLU(), nn.Linear(64, frames * width))
        own = classes + 2 * flow
        self.mix = nn.Linear(frames * width + 5 + 2 * classes + own, width)
        self.say = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, own))

    @torch.no_grad()
    def initialise(self) -> None:
        """At first the points stay what their queries say."""
        nn.init.zeros_(self.say[-1].weight)
        nn.init.zeros_(self.say[-1].bias)

    def forward(self, output: Output, view: View, sight: Sight) -> Output:
        """Names and velocities of the last layer anew; the points stay where they are."""
        points, logits = output.points[-1].detach(), output.logits[-1]
        b, q, p, _ = points.shape
        own = logits if output.flow is None else torch.cat([logits, output.flow[-1]], dim=-1)
        features = view.finest(self.narrow).sample(*_asked(points), as_published=False)
        features = features.view(b, q, -1, p, self.narrow.out_features).transpose(2, 3).flatten(3)
        evidence = _evidence(points, view, sight)
        x = torch.cat([features * self.place(_place(points)), evidence, own], dim=-1)
        said = own + self.say(self.mix(x))
        flow = None if output.flow is None else (*output.flow[:-1], said[..., self.classes :])
        return replace(output, logits=(*output.logits[:-1], said[..., : self.classes]), flow=flow, sight=sight)


def sight_losses(sight: Sight, truth: Occupancy) -> dict[str, Tensor]:
    """Scalars to be added up: cross entropy of how far the pixels see and of what, as rays through the truth tell.

    truth: one lane of labels a lane of the sight.
    """
    weight = sight.names.new_tensor([NAME_WEIGHTS[name] for name in truth.classes.names]).sqrt()
    far, named, pixels, weights = [], [], 0, 0.0
    for lane in range(len(sight.used)):
        used = sight.used[lane]
        hit, step, label = _met(truth, lane, sight.cameras[lane][used], sight.size)
        ranges = sight.ranges[lane][used].flatten(0, 1).log_softmax(dim=-1)
        low, share = step.long(), step.frac()
        cost = (1 - share) * _at(ranges, low) + share * _at(ranges, low + 1)
        far.append(-torch.where(hit, cost, NOTHING_WEIGHT * ranges[:, -1]).sum())
        names = sight.names[lane][used].flatten(0, 1)[hit]
        named.append(-(weight[label[hit]] * _at(names.log_softmax(dim=-1), label[hit])).sum())
        pixels, weights = pixels + len(hit), weights + weight[label[hit]].sum()
    nothing = (sight.ranges.sum() + sight.names.sum()) * 0.0  # every process of a training has the same terms
    pixels, weights = (mean_over_processes(torch.as_tensor(n).to(weight)) for n in (pixels, weights))
    return {
        "pixels' ranges": RANGE_WEIGHT * sum(far, nothing) / pixels,
        "pixels' names": NAME_WEIGHT * sum(named, nothing) / weights,
    }


@torch.no_grad()
def filled(
    said: Prediction, sight: Sight, lane: int, velocities: tuple[Tensor, Tensor] | None, threshold: float
) -> Prediction:
    """The prediction, and where it is free the voxels in which a pixel sees its surface, surer than `threshold`.

    What is thin or small falls between the points of the queries, but not between pixels; what lies flat does not, and
    stays as the points say. velocities: points (P, 3) and how fast they are, (P, 2); such a voxel is as fast as the
    point nearest to where it is seen.
    """
    points, label, score = _surfaces(sight, lane)
    index, inside = said.grid.index(points)
    labels = said.labels.flatten().clone()
    _, ny, nz = said.grid.shape
    voxel = (index[:, 0] * ny + index[:, 1]) * nz + index[:, 2]
    flat = label.new_tensor([said.classes.id(name) for name in FLAT if name in said.classes.names])
    sure = inside & (score > threshold) & ~torch.isin(label, flat)
    sure &= labels[torch.where(inside, voxel, 0)] == said.classes.free
    best = score[sure].argsort(descending=True, stable=True)  # of the pixels that see one voxel the surest counts
    voxel, order = voxel[sure][best].sort(stable=True)
    first = torch.cat([voxel.new_ones(1), voxel.diff()])[: len(voxel)].bool()
    chosen = sure.nonzero()[:, 0][best][order][first]
    voxel = voxel[first]
    labels[voxel] = label[chosen].to(labels)
    scores, flow = said.score.flatten().clone(), said.flow
    scores[voxel] = score[chosen].to(scores)
    if flow is not None and velocities is not None and len(voxel):
        where, speed = velocities
        flow = flow.flatten(0, -2).clone()
        flow[voxel] = speed[ops.nearest(points[chosen].to(where), where)].to(flow)
        flow = flow.view(*said.labels.shape, 2)
    shape = said.labels.shape
    return replace(said, labels=labels.view(shape), score=scores.view(shape), flow=flow)


def _surfaces(sight: Sight, lane: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the used cameras of a lane see, FINER times as densely as the cells lie: points (M, 3) m, classes (M,) and
    how sure both are, (M,). A range is the mean around its likeliest step, a range that ends behind the camera sure of
    nothing."""
    used = sight.used[lane]
    cameras, size = sight.cameras[lane][used], tuple(FINER * n for n in sight.size)

    def read(logits: Tensor) -> Tensor:
        maps = logits[lane][used].softmax(dim=-1).mT.unflatten(-1, sight.size)
        return F.interpolate(maps, size, mode="bilinear", align_corners=False).flatten(2).mT.flatten(0, 1)

    ranges, names = read(sight.ranges)[:, :RANGES], read(sight.names)
    around = ranges.argmax(dim=-1).clamp(1, RANGES - 2)[:, None] + torch.arange(-1, 2, device=ranges.device)
    share = ranges.gather(-1, around)
    sure = share.sum(dim=-1)
    away = NEAREST * ((share * around).sum(dim=-1) / sure.clamp_min(TINY) * _ratio()).exp()
    begin, way = _rays(cameras, size)
    # where the ray through a cell's middle is so far from the car's origin, over ground
    a, b = way[:, :2].square().sum(dim=-1), (begin * way)[:, :2].sum(dim=-1)
    c = begin[:, :2].square().sum(dim=-1) - away**2
    ahead = ((b * b - a * c).clamp_min(0).sqrt() - b) / a
    best, label = names.max(dim=-1)
    return begin + way * ahead[:, None], label, sure * best * (ahead > 0)  # nearer than the camera itself is nowhere


@torch.no_grad()
def _met(truth: Occupancy, lane: int, cameras: Cameras, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """What the ray through the middle of each cell of cameras (N) meets: whether anything, (N*H*W,) bool, the `_step`
    of its range, float, and its class, int64."""
    grid, labels = truth.grid, truth.labels[lane]
    begin, way = _rays(cameras, size)
    low, edge = begin.new_tensor(grid.low), begin.new_tensor(grid.voxel)
    distance, index = ops.cast(labels != truth.classes.free, (begin - low) / edge, way / edge)
    label = labels[index.unbind(1)].long()
    centre = (index + 0.5) * edge + low
    return (distance > 0) & (label != truth.classes.free), _step(centre), label


def _rays(cameras: Cameras, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Begin and way, (N*H*W, 3) m each, of the rays through the middles of cells of cameras (N), as float32."""
    v, u = (torch.arange(n, device=cameras.car_from_camera.device) + 0.5 for n in size)
    v, u = torch.meshgrid(v / size[0] * cameras.height, u / size[1] * cameras.width, indexing="ij")
    pixels = torch.stack([u, v], dim=-1).view(1, -1, 2).expand(len(cameras), -1, -1).to(cameras.car_from_camera)
    ahead = cameras.unproject(pixels, torch.ones_like(pixels[..., 0]))
    begin = cameras.car_from_camera[:, None, :3, 3].expand_as(ahead)
    return begin.flatten(0, 1).float(), (ahead - begin).flatten(0, 1).float()


def _ratio() -> float:
    """The logarithm of one step."""
    return math.log(FARTHEST / NEAREST) / (RANGES - 1)


def _step(points: Tensor) -> Tensor:
    """How far (..., 3) m lie from the car's origin, over ground, in the steps of RANGES: (...) in [0, RANGES - 1)."""
    away = points[..., :2].norm(dim=-1).clamp_min(NEAREST)
    return ((away / NEAREST).log() / _ratio()).clamp(0, RANGES - 1 - 1e-3)


def _evidence(points: Tensor, view: View, sight: Sight) -> Tensor:
    """What the pixels say of points (B, Q, P, 3) m before which they lie, (B, Q, P, 5 + 2 K): that their surface is
    here, that it is here or before, each as a probability and as its logarithm, that there is none, and their names,
    as they are and here. Where no camera looks all of them are nought (and logarithms those of TINY)."""
    said = torch.cat([sight.ranges.softmax(dim=-1), sight.names.softmax(dim=-1)], dim=-1)
    read = view.now(said, sight.size).sample(*_asked(points), as_published=False)[:, :, 0]
    ranges, nothing, names = read.split([RANGES, 1, read.shape[-1] - RANGES - 1], dim=-1)
    step = _step(points)
    low, share = step.nan_to_num().long(), step.frac()[..., None]  # of a point that is nowhere the share says so
    after = ranges.gather(-1, low[..., None] + 1) * share
    here = ranges.gather(-1, low[..., None]) * (1 - share) + after
    passed = torch.arange(RANGES, device=low.device) <= low[..., None]
    before = (ranges * passed).sum(dim=-1, keepdim=True) + after
    logs = ((here + TINY).log() / 3, (before + TINY).log() / 3)
    return torch.cat([here, before, *logs, nothing, names, names * here], dim=-1)


def _place(points: Tensor) -> Tensor:
    """Points (..., 3) m -> numbers that a linear layer can tell places apart by, (..., PLACE)."""
    away = (points[..., :2].square().sum(dim=-1) + 1).sqrt().log()
    height = points[..., 2]
    parts = [away - 2.5, height / 3, points[..., 0] / 40, points[..., 1] / 40]
    waves = [away * 1.5 * 1.7**k for k in range(5)] + [height * 0.7 * 2**k for k in range(3)]
    return torch.stack(parts + [f(wave) for wave in waves for f in (torch.sin, torch.cos)], dim=-1)


def _asked(points: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q, P, 3) as `View.sample` takes them, one group and one level."""
    return points[:, :, None], torch.ones_like(points[:, :, None, :, :1])


def _at(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(-1, index[:, None])[:, 0]
