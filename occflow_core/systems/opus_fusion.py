"""OPUS-V1-Fusion: OPUS whose queries begin at LiDAR points and also look at a map of LiDAR features from above.

Paper of the cameras' part: "OPUS: Occupancy Prediction Using a Sparse Set", arXiv 2409.09350 (NeurIPS 2024).
Source: github.com/jbwang1997/OPUS, `models/opusv1_fusion` as of 216dc53, MIT licence; LiDAR blocks as mmdet3d
v1.0.0rc6 and spconv 2 have them. Nothing is copied. The presets tiny, small, medium and large are the authors' T, S, M
and L and take their weights through NAMES.

Points are voxels' means (5 cm), a sparse encoder and SECOND make a map of them with cells as long as the grid's voxels.
The decoder is that of OPUS (`nn.decoder`): a point that a query samples is looked up in the pictures of all times and
once in the map. Losses and votes are those of OPUS, but for the loss of where points begin: farthest point sampling
of the newest scan says that.

Where we depart, always:
- as OPUS: the first ten points of a voxel count, every lane is decoded, what is not finite falls out of the grid, a
  camera that is not used is never looked into;
- no voxel of LiDAR points is left out, where the authors stop at 120,000 (90,000 in training);
- ages count from the newest scan, so that its points begin the queries also where no camera is as new;
- a scan that lacks earlier ones stands alone, where the authors repeat it as if it were nine more; and scans more than
  REACH before it are left out, however many are asked for: a slow LiDAR's would be older than any the authors had.
Where `Config.as_published` is off (our own recipes), also:
- the sampling rules of `ops.sample`, cells of the map that tile the grid, and a query that carries one point samples
  within its offsets in metres instead of at one place;
- a point that strays from every voxel is called nothing, and what no camera sees counts little.
Where `Config.flow` is on: every point also has a velocity.

B batch, T time (newest first), N cameras, Q queries, P points of a query, G groups, S sampled points of a group and
time, C channels, K classes, X Y Z voxels of the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..geometry import OCC3D_GRID, Grid
from ..nn import BACKBONES, FPN, Second, SecondFPN, SparseEncoder
from ..nn.decoder import Layer, Output, losses, predictions, refined, targets
from ..nn.instants import Memory, View, see
from ..nn.lidar import LAYERS, STRIDE
from ..nn.starts import SHARES
from ..nn.voxels import CAP
from ..transfer import numbers
from ..types import OCC3D, TABLES, Classes, Clip, Occupancy, Prediction
from .base import OPUS_NAMES, opus_constants

REACH = 0.55  # s from the newest scan to the oldest: ten at nuScenes' 20 Hz, with one lost


@dataclass(frozen=True)
class Config:
    height: int  # pixels of the pictures the network takes
    width: int  # pixels
    queries: int  # each carries a bundle of points
    refines: tuple[int, ...]  # points of a query after each decoder layer; as many layers as numbers
    samples: int  # points looked up per query, group and time, and in the map
    mixed: int  # points that the sampled ones are mixed into; published: as many, samples * (frames + 1)
    sweeps: int = 10  # LiDAR scans: the newest and those before it, as far as REACH
    lidar_width: int = 16  # channels of the finest LiDAR voxels; all other widths of that branch follow
    backbone: str = "resnet50"  # a word of `nn.BACKBONES`
    levels: int = 4  # of the pyramid: the backbone's coarsest maps, 4 reach down to stride 4
    channels: int = 256  # of the pyramid, of the map and of a query
    groups: int = 4  # channel groups that look at places of their own
    heads: int = 8  # of the attention among queries
    hidden: int = 512  # channels inside the feed-forward block
    frames: int = 8  # times of a window, SPACING apart
    dropout: float = 0.1  # in training, of what queries say to each other and of the feed-forward block
    threshold: float = 0.5  # a score above this makes a voxel occupied
    closing: bool = True  # whether gaps between occupied voxels are closed
    flow: bool = False  # whether each point has a velocity
    as_published: bool = True  # the authors' sampling rules, oddities included; their weights need them
    grid: Grid = field(default=OCC3D_GRID)  # where occupancy is told
    classes: str = OCC3D.table  # which table of classes
    panoptic: ClassVar[bool] = False  # no instances are told apart

    def __post_init__(self):
        if self.classes not in TABLES:
            raise ValueError(f"opus-fusion: classes must be one of {sorted(TABLES)}, got {self.classes!r}")
        if self.backbone not in BACKBONES or not 1 <= self.levels <= 4:
            raise ValueError(
                f"opus-fusion: expected 1 to 4 levels of one of {sorted(BACKBONES)}, got {self.levels} of "
                f"{self.backbone!r}"
            )
        if self.channels % self.groups or self.channels % self.heads:
            raise ValueError(
                f"opus-fusion: {self.groups} groups or {self.heads} heads do not divide {self.channels} channels"
            )
        positive = (*self.refines, self.queries, self.samples, self.mixed, self.frames, self.sweeps, self.lidar_width)
        if not self.refines or min(positive) < 1:
            raise ValueError(
                "opus-fusion: refines, queries, samples, mixed, frames, sweeps and lidar_width must be positive"
            )
        if self.grid.shape[0] % 2 or self.grid.shape[1] % 2:
            raise ValueError(f"opus-fusion: the map is halved, its grid must be even along x and y: {self.grid.shape}")

    @property
    def table(self) -> Classes:
        return TABLES[self.classes]

    @property
    def fine(self) -> Grid:
        """The grid of LiDAR voxels."""
        (x, y, z), (long, wide, high) = self.grid.shape, self.grid.voxel
        return Grid(self.grid.low, (long / STRIDE, wide / STRIDE, z * high / LAYERS), (x * STRIDE, y * STRIDE, LAYERS))


PRESETS = {
    "tiny": Config(256, 704, queries=600, refines=(1, 4, 16, 32, 64, 128), samples=4, mixed=36),
    "small": Config(256, 704, queries=1200, refines=(1, 4, 8, 16, 32, 64), samples=2, mixed=18),
    "medium": Config(256, 704, queries=2400, refines=(1, 2, 4, 8, 16, 32), samples=2, mixed=18),
    "large": Config(256, 704, queries=4800, refines=(1, 2, 4, 8, 16, 16), samples=2, mixed=18),
    # ours: the smallest
    "nano": Config(
        128,
        352,
        queries=600,
        refines=(4, 16, 64),
        samples=2,
        mixed=16,
        sweeps=3,
        lidar_width=4,
        backbone="resnet18-half",
        channels=96,
        hidden=192,
        flow=True,
        as_published=False,
    ),
}

# The authors' parameter names -> ours (`systems.base.translate` says how to read it)
_LAYER = "pts_bbox_head.transformer.decoder.decoder_layers.#."
NAMES = OPUS_NAMES | {
    "pts_middle_encoder.": "lidar.encoder.",
    "pts_backbone.": "lidar.backbone.",
    "pts_neck.": "lidar.neck.",
    "final_conv.conv.": "lidar.out.",
    _LAYER + "img_pts_mixing.parameter_generator.": "layers.#.mixing.matrices.",
    _LAYER + "img_pts_mixing.out_proj.": "layers.#.mixing.out.",
    _LAYER + "cls_branch.": "layers.#.name.",
}


class OpusFusion(nn.Module):
    """Clips with LiDAR points -> points with class scores (and velocities) -> occupancy.

    See `systems.base.System` for the contract.
    """

    PRESETS, NAMES = PRESETS, NAMES

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.backbone = BACKBONES[config.backbone]()
        self.neck = FPN(self.backbone.channels[-config.levels :], config.channels)
        self.lidar = Lidar(config.fine, config.lidar_width, config.channels)
        before, looked = (1, *config.refines[:-1]), config.samples * (config.frames + 1)
        self.layers = nn.ModuleList(Layer(config, *p, looked) for p in zip(before, config.refines, strict=True))
        for name, values in zip(("mean", "std"), self.backbone.normal, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self, prior: float | None = None) -> None:
        """Random weights as the authors draw them.

        prior: what every class scores before anything is learned; None: 0.01 as published, else each class its share.
        """
        config = self.config
        for part in (self.backbone, self.neck, self.lidar.backbone, self.lidar.neck):
            part.initialise()
        shares = [0.01 if config.as_published else SHARES[name] for name in config.table.names]
        for layer in self.layers:
            layer.initialise(torch.tensor(shares if prior is None else [prior] * len(shares)))

    def forward(self, clip: Clip, memory: Memory | None) -> tuple[Output, Memory]:
        """A clip that brings `config.frames` times is the window; a shorter one is completed from memory.

        ValueError where a lane brings no points, or its newest scan none inside the grid: nothing could begin there.
        """
        config = self.config
        view, _, memory = see(self, clip, memory)
        scans = [self._scans(points) for points in _given(clip)]
        begin = torch.stack([_begin(points, config.queries) for points in scans])  # (B, Q, 3) m
        view = _View(view, self.lidar(scans), config.grid)
        return refined(self.layers, config.grid.unit(begin), view, config), memory

    def _scans(self, points: Tensor) -> Tensor:
        """Points (P, 5) of the newest `config.sweeps` scans inside the grid; their ages count from the newest."""
        grid, age = self.config.grid, points[:, 4]
        if not len(points):
            raise ValueError("opus-fusion: a lane brings no LiDAR point; without a scan there is nothing to begin with")
        ages = age.unique()  # of each scan, the newest first
        ages = ages[ages - ages[0] <= REACH][: self.config.sweeps]
        place, low, high = points[:, :3], numbers(grid.low, points), numbers(grid.high, points)
        kept = (age <= ages[-1]) & ((place > low) & (place < high)).all(-1)
        return torch.cat([points[:, :4], (age - ages[0])[:, None]], dim=1)[kept]

    def loss(self, output: Output, truth: Occupancy) -> dict[str, Tensor]:
        """Scalars to be added up: of each layer where its points are, what they are called and (with `Config.flow`)
        how fast they are. truth: one lane of labels a lane of the output.

        ValueError where the truth is told in another grid or in other classes.
        """
        return losses(output, targets(truth, self.config), self.config.as_published)

    def decode(self, output: Output) -> list[Prediction]:
        """One prediction a lane."""
        return predictions(output, self.config)

    def constants(self) -> dict[str, Tensor]:
        """The authors' buffers that say which grid their weights are for."""
        return opus_constants(self.config.grid)


# ---- LiDAR ----------------------------------------------------------------------------------------------------------


class Lidar(nn.Module):
    """Scans -> a map of features seen from above."""

    def __init__(self, fine: Grid, width: int, channels: int):
        """fine: the grid of the voxels. width: channels of the finest ones. channels: of the map."""
        super().__init__()
        self.fine = fine
        self.encoder = SparseEncoder(5, width)
        self.backbone = Second(16 * width, 8 * width)
        self.neck = SecondFPN(8 * width)
        self.out = nn.Conv2d(32 * width, channels, 3, padding=1)

    def forward(self, scans: Sequence[Tensor]) -> Tensor:
        """A tensor (P, 5) a lane: x y z m, intensity, age s -> (B, C, Y, X), in cells of the occupancy's grid."""
        sites, features = [], []
        for lane, points in enumerate(scans):
            index, means = ops.voxel_means(points, self.fine, CAP)
            sites.append(F.pad(index.flip(1), (1, 0), value=lane))  # lane, z, y, x
            features.append(means)
        x, y, z = self.fine.shape
        # one layer more than there are: halved three times it ends as two, as SECOND has it
        dense = self.encoder(torch.cat(sites), torch.cat(features), len(scans), (z + 1, y, x))
        return F.relu(self.out(self.neck(self.backbone(dense))))


def _given(clip: Clip) -> tuple[Tensor, ...]:
    if clip.points is None:
        raise ValueError("opus-fusion: the clip brings no LiDAR points; frames need `points`, see `types.Frame`")
    return clip.points


def _begin(scans: Tensor, queries: int) -> Tensor:
    """Places (Q, 3) m that lie far apart among the points (P, 5) of the newest scan, whose age is 0."""
    newest = scans[scans[:, 4] == 0][:, :3]
    if not len(newest):
        raise ValueError("opus-fusion: no point of the newest LiDAR scan lies inside the grid; is its transform right?")
    return newest[ops.farthest(newest, queries)]


@dataclass(frozen=True)
class _View:
    """What the decoder looks into: pictures of all times, and the map."""

    cameras: View
    above: Tensor  # (B, C, Y, X)
    grid: Grid

    def sample(self, points: Tensor, weights: Tensor, as_published: bool) -> Tensor:
        """Features (B, Q, G, (T+1)*S, C/G) of points (B, Q, G, S, 3) m: of each time, then of the map.

        In the map bilinear, zero beyond it. as_published: the middles of its outer cells lie on the grid's border
        (`opus_sampling.sampling_pts_feats`, align_corners); else its cells tile the grid.
        """
        b, q, g, s, _ = points.shape
        place = 2 * self.grid.unit(points)[..., :2].transpose(1, 2).flatten(0, 1) - 1  # (B*G, Q, S, 2)
        above = self.above.to(place).unflatten(1, (g, -1)).flatten(0, 1)  # (B*G, C/G, Y, X)
        found = F.grid_sample(above, place, padding_mode="zeros", align_corners=as_published)
        found = found.view(b, g, -1, q, s).permute(0, 3, 1, 4, 2)
        return torch.cat([self.cameras.sample(points, weights, as_published), found], dim=3)
