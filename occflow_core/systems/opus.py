"""OPUS: occupancy as a set of points that a decoder moves and names.

Paper: "OPUS: Occupancy Prediction Using a Sparse Set", arXiv 2409.09350 (NeurIPS 2024), version 1.
Source: github.com/jbwang1997/OPUS at dde4209, MIT licence; nothing is copied. The presets tiny, small, medium and
large are the paper's T, S, M and L and take the authors' weights through NAMES.

Where we depart, always:
- A voxel with more than ten points keeps the first ten in the order of the queries; the authors' kernel keeps any ten.
- Every lane of a batch is decoded; the authors' loop is right for a batch of one only.
- Points that are not finite fall out of the grid; the authors replace them by zeros.
- A camera that is not used is never looked into.
Where `Config.as_published` is off (our own recipes), also:
- the sampling rules of `ops.sample`, and a query that carries one point samples within its offsets in metres
  (as OPUS V2 does) instead of at one place;
- the queries stand on an even grid and their points begin spread over columns there (`nn.starts`), so that to say
  what is where is at first to name points, and only then to move them;
- a point that strays from every voxel is called nothing, where the authors call it after the nearest one, and what no
  camera sees counts little.
Where `Config.flow` is on: every point also has a velocity.
Where `Config.look` is not 0: every cell of the finest maps tells how far it sees and what, learned from rays through
the truth; every point of the last layer is named once more by what the cells say before which it lies, and where a cell
is sure of its surface the voxel there is filled, too (`nn.sight`).

B batch, T time (newest first), N cameras, R rows of a camera's pyramid, Q queries, P points of a query, G groups,
S sampled points of a group and time, C channels, K classes.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..geometry import OCC3D_GRID, Grid
from ..nn import BACKBONES, FPN
from ..nn.decoder import Layer, Output, losses, predictions, refined, targets
from ..nn.instants import Memory, View, see
from ..nn.points import points_loss
from ..nn.queries import STEP
from ..nn.sight import FARTHEST, Look, Pixels, filled, sight_losses
from ..nn.starts import SHARES, columns
from ..types import OCC3D, OPENOCC, TABLES, Classes, Clip, Occupancy, Prediction
from .base import OPUS_NAMES, opus_constants


@dataclass(frozen=True)
class Config:
    height: int  # pixels of the pictures the network takes
    width: int  # pixels
    queries: int  # each carries a bundle of points
    refines: tuple[int, ...]  # points of a query after each decoder layer; as many layers as numbers
    samples: int  # points looked up per query, group and time
    backbone: str = "resnet50"  # a word of `nn.BACKBONES`
    levels: int = 4  # of the pyramid: the backbone's coarsest maps, 4 reach down to stride 4
    channels: int = 256  # of the pyramid and of a query
    groups: int = 4  # channel groups that look at places of their own
    heads: int = 8  # of the attention among queries
    mixed: int = 32  # points that the sampled ones are mixed into
    hidden: int = 512  # channels inside the feed-forward block
    frames: int = 8  # times of a window, SPACING apart
    dropout: float = 0.1  # in training, of what queries say to each other and of the feed-forward block
    threshold: float = 0.5  # a score above this makes a voxel occupied
    closing: bool = True  # whether gaps between occupied voxels are closed
    flow: bool = False  # whether each point has a velocity
    look: int = 0  # channels of what each point sees for itself; 0: it is named by its query alone
    as_published: bool = True  # the authors' sampling rules, oddities included; their weights need them
    grid: Grid = field(default=OCC3D_GRID)  # where occupancy is told
    classes: str = OCC3D.table  # which table of classes
    sweeps: ClassVar[int] = 0  # LiDAR scans: cameras alone
    panoptic: ClassVar[bool] = False  # no instances are told apart

    def __post_init__(self):
        if self.classes not in TABLES:
            raise ValueError(f"opus: classes must be one of {sorted(TABLES)}, got {self.classes!r}")
        if self.backbone not in BACKBONES or not 1 <= self.levels <= 4:
            raise ValueError(
                f"opus: expected 1 to 4 levels of one of {sorted(BACKBONES)}, got {self.levels} of {self.backbone!r}"
            )
        if self.channels % self.groups or self.channels % self.heads:
            raise ValueError(f"opus: {self.groups} groups or {self.heads} heads do not divide {self.channels} channels")
        if self.look < 0:
            raise ValueError(f"opus: look is a number of channels, or 0 for none; got {self.look}")
        corner = math.hypot(*(max(-low, high) for low, high in zip(self.grid.low[:2], self.grid.high[:2], strict=True)))
        if self.look and corner > FARTHEST:
            raise ValueError(f"opus: look knows {FARTHEST:g} m around the car, the grid's corner is at {corner:.0f} m")
        if not self.refines or min(*self.refines, self.queries, self.samples, self.frames) < 1:
            raise ValueError("opus: refines, queries, samples and frames must be positive")

    @property
    def table(self) -> Classes:
        return TABLES[self.classes]


PRESETS = {
    "tiny": Config(256, 704, queries=600, refines=(1, 4, 16, 32, 64, 128), samples=4),
    "small": Config(256, 704, queries=1200, refines=(1, 4, 8, 16, 32, 64), samples=2),
    "medium": Config(256, 704, queries=2400, refines=(1, 2, 4, 8, 16, 32), samples=2),
    "large": Config(256, 704, queries=4800, refines=(1, 2, 4, 8, 16, 16), samples=2),
    # ours: learned on the synthetic world within an hour on two processor cores, and shipped
    "demo": Config(
        128,
        352,
        queries=1225,
        refines=(16, 48),
        samples=8,
        backbone="efficientnet-lite0",
        levels=3,
        channels=96,
        heads=4,
        mixed=16,
        hidden=192,
        frames=2,
        dropout=0.0,
        threshold=0.4,
        flow=True,
        look=48,
        as_published=False,
        classes=OPENOCC.table,
    ),
    # ours: the smallest
    "nano": Config(
        128,
        352,
        queries=600,
        refines=(4, 16, 64),
        samples=2,
        backbone="resnet18-half",
        channels=96,
        mixed=16,
        hidden=192,
        flow=True,
        as_published=False,
    ),
}

# The authors' parameter names -> ours (`systems.base.translate` says how to read it); None = known, dropped
_LAYER = "pts_bbox_head.transformer.decoder.decoder_layers.#."
NAMES = OPUS_NAMES | {
    "pts_bbox_head.init_points.weight": "queries.weight",
    _LAYER + "mixing.parameter_generator.": "layers.#.mixing.matrices.",
    _LAYER + "mixing.out_proj.": "layers.#.mixing.out.",
    _LAYER + "cls_branch.": "layers.#.name.",
}


class Opus(nn.Module):
    """Clips -> points with class scores (and velocities) -> occupancy. See `systems.base.System` for the contract."""

    PRESETS, NAMES = PRESETS, NAMES

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.backbone = BACKBONES[config.backbone]()
        self.neck = FPN(self.backbone.channels[-config.levels :], config.channels)
        self.queries = nn.Embedding(config.queries, 3)  # where each query begins, fractions of the grid's box
        before = (1, *config.refines[:-1])
        looked = config.samples * config.frames
        self.layers = nn.ModuleList(Layer(config, *p, looked) for p in zip(before, config.refines, strict=True))
        classes = len(config.table.names)
        self.pixels = Pixels(config.channels, classes) if config.look else None
        self.look = Look(config.channels, config.look, config.frames, classes, config.flow) if config.look else None
        if not config.as_published:  # a column is not a guess that could be better
            self.queries.weight.requires_grad_(False)
        for name, values in zip(("mean", "std"), self.backbone.normal, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self, prior: float | None = None) -> None:
        """Random weights as the authors draw them; our own networks begin as even columns (`nn.starts`).

        prior: what every class scores before anything is learned; None: 0.01 as published, else each class its share.
        """
        config = self.config
        self.backbone.initialise()
        self.neck.initialise()
        shares = [0.01 if config.as_published else SHARES[name] for name in config.table.names]
        for layer in self.layers:
            layer.initialise(torch.tensor(shares if prior is None else [prior] * len(shares)))
        if self.look is not None:
            self.look.initialise()
        if config.as_published:
            nn.init.uniform_(self.queries.weight)
        else:
            columns(self.queries.weight, self.layers, config.grid, STEP)

    def forward(self, clip: Clip, memory: Memory | None) -> tuple[Output, Memory]:
        """A clip that brings `config.frames` times is the window; a shorter one is completed from memory."""
        view, _, memory = see(self, clip, memory)
        return self.answer(view), memory

    def answer(self, view: View) -> Output:
        """The decoder alone, whatever the pictures were encoded by."""
        begin = self.queries.weight.expand(len(view.rows), -1, -1)
        output = refined(self.layers, begin, view, self.config)
        if self.look is not None:
            now = torch.stack([lane[0] for lane in view.rows])  # (B, N, R, C)
            output = self.look(output, view, self.pixels(now, view.sizes[0], view.cameras, view.used[:, 0]))
        return output

    def loss(self, output: Output, truth: Occupancy) -> dict[str, Tensor]:
        """Scalars to be added up: where the points of the queries begin, and of each layer where its points are, what
        they are called and (with `Config.flow`) how fast they are. truth: one lane of labels a lane of the output.

        Card of the authors' losses: `opus_head.loss_single` (arXiv 2409.09350, section 3.4). ValueError where the truth
        is told in another grid or in other classes.
        """
        lanes, published, terms = targets(truth, self.config), self.config.as_published, {}
        if published:
            begin = self.config.grid.metres(self.queries.weight).expand(len(lanes), -1, -1)
            terms["points begin"] = points_loss(begin, lanes, published)[0]
        if output.sight is not None:
            terms |= sight_losses(output.sight, truth)
        return terms | losses(output, lanes, published)

    def decode(self, output: Output) -> list[Prediction]:
        """One prediction a lane."""
        said = predictions(output, self.config)
        if output.sight is None:
            return said
        points, flow = output.points[-1].flatten(1, 2), output.flow and output.flow[-1].flatten(1, 2)
        moves = [None if flow is None else (points[b], flow[b]) for b in range(len(said))]
        return [filled(p, output.sight, b, moves[b], self.config.threshold) for b, p in enumerate(said)]

    def constants(self) -> dict[str, Tensor]:
        """The authors' buffers that say which grid their weights are for."""
        return opus_constants(self.config.grid)
