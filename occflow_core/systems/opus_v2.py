"""OPUS-V2: points that bring features to their voxels, and a sparse network that names the voxels around them.

No paper tells of it yet; the decoder is that of OPUS (arXiv 2409.09350). Source: github.com/jbwang1997/OPUS,
`models/opusv2/` at 216dc53 (also in the fork w1394945493/OPUS), MIT licence; nothing is copied. The presets tiny,
small, medium and large are its T, S, M and L on the grid of Occ3D and take the authors' weights through NAMES; those
that end in -openoccupancy are the same on the grid of OpenOccupancy, which is fixed to the LiDAR: what we call the car
frame must then be that of LIDAR_TOP (x right, y forward, z up).

What differs from OPUS: five layers; a place to look at is a learned prototype in the spread of the query's points plus
an offset in metres; a layer tells features of its points, not names; and where they lie a voxel takes the maximum of
its points' features, from where two convolutions reach all voxels around (the authors' `Densifier`).

Where we depart, always:
- Every lane of a batch is decoded; the authors count them by the last row.
- A point that is not finite makes its voxels say nothing; the authors move it to the grid's corner.
- A camera that is not used is never looked into.
Where `Config.as_published` is off (our own recipes), also:
- the sampling rules of `ops.sample`;
- queries and points begin spread evenly over the grid (`nn.starts`), and each class at its share;
- what no camera sees counts little, and a point far from every voxel is not drawn there (`nn.points`): the voxels
  around it learn that they are free;
- batch norms forget ten times as fast;
- rare classes go by name; the authors' numbers are those of Occ3D, and name others in OpenOccupancy.
Where `Config.flow` is on: every voxel also has a velocity.

B batch, T time (newest first), N cameras, Q queries, P points of a query, G groups, S sampled points of a group and
time, C channels, D channels of a point's features, V voxels, K classes.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..geometry import OCC3D_GRID, OPENOCCUPANCY_GRID, Grid
from ..nn import BACKBONES, FPN
from ..nn.instants import Memory, View, see
from ..nn.losses import focal, mean_over_processes
from ..nn.points import FLOW_WEIGHT, HIDDEN, NAME_WEIGHTS, NAMES_WEIGHT, RARE, Target, points_loss
from ..nn.queries import STEP, Attention, Mixing, branch
from ..nn.starts import SHARES, columns
from ..types import OCC3D, OPENOCCUPANCY, TABLES, Classes, Clip, Occupancy, Prediction
from .base import OPUS_NAMES, opus_constants

RARE_NUMBERS = (0, 2, 5, 8)  # classes that are rare as published, in every table (`opus_head.py`, a default)
AROUND = (3, 3, 3)  # voxels that a convolution sees


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
    told: int = 32  # channels of what a query tells of each of its points
    cells: int = 64  # channels of a voxel
    frames: int = 8  # times of a window, `nn.instants.SPACING` apart
    dropout: float = 0.1  # in training, of what queries say to each other and of the feed-forward block
    threshold: float = 0.25  # a score above this makes a voxel occupied
    flow: bool = False  # whether each voxel has a velocity
    as_published: bool = True  # the authors' rules, oddities included; their weights need them
    grid: Grid = field(default=OCC3D_GRID)  # where occupancy is told
    classes: str = OCC3D.table  # which table of classes
    sweeps: ClassVar[int] = 0  # LiDAR scans: cameras alone
    panoptic: ClassVar[bool] = False  # no instances are told apart

    def __post_init__(self):
        if self.classes not in TABLES:
            raise ValueError(f"opus-v2: classes must be one of {sorted(TABLES)}, got {self.classes!r}")
        if self.backbone not in BACKBONES or not 1 <= self.levels <= 4:
            raise ValueError(
                f"opus-v2: expected 1 to 4 levels of one of {sorted(BACKBONES)}, got {self.levels} of {self.backbone!r}"
            )
        if self.channels % self.groups or self.channels % self.heads or self.cells % 2:
            raise ValueError(
                f"opus-v2: {self.groups} groups or {self.heads} heads do not divide {self.channels} channels, or "
                f"{self.cells} cells are not even"
            )
        if not self.refines or min(*self.refines, self.queries, self.samples, self.frames, self.told, self.cells) < 1:
            raise ValueError("opus-v2: refines, queries, samples, frames, told and cells must be positive")

    @property
    def table(self) -> Classes:
        return TABLES[self.classes]


_PUBLISHED = {
    "tiny": Config(256, 704, queries=600, refines=(8, 16, 32, 64, 128), samples=4),
    "small": Config(256, 704, queries=1200, refines=(4, 8, 16, 32, 64), samples=2),
    "medium": Config(256, 704, queries=2400, refines=(2, 4, 8, 16, 32), samples=2),
    "large": Config(256, 704, queries=4800, refines=(1, 2, 4, 8, 16), samples=2),
}
PRESETS = {
    **_PUBLISHED,
    **{
        f"{name}-openoccupancy": replace(config, grid=OPENOCCUPANCY_GRID, classes=OPENOCCUPANCY.table)
        for name, config in _PUBLISHED.items()
    },
    # ours: the smallest
    "nano": Config(
        128,
        352,
        queries=600,
        refines=(4, 8, 8),
        samples=4,
        backbone="resnet18-half",
        channels=96,
        mixed=16,
        hidden=192,
        told=16,
        cells=16,
        dropout=0.0,
        threshold=0.3,
        flow=True,
        as_published=False,
    ),
}

# The authors' parameter names -> ours (`systems.base.translate` says how to read it); None = known, dropped
_LAYER = "pts_bbox_head.transformer.decoder.decoder_layers.#."
_DENSIFIER = "pts_bbox_head.densifiers.#."
NAMES = OPUS_NAMES | {
    "pts_bbox_head.init_points.weight": "queries.weight",
    _LAYER + "sampling.sampling_prototype.": "layers.#.sampling.prototype.",
    _LAYER + "mixing.parameter_generator.": "layers.#.mixing.matrices.",
    _LAYER + "mixing.out_proj.": "layers.#.mixing.out.",
    _LAYER + "cls_branch.": "layers.#.tell.",
    _DENSIFIER + "pfn_layers.#.": "densifiers.#.pools.#.",
    _DENSIFIER + "cls_branch.0.": "densifiers.#.spread.",
    _DENSIFIER + "cls_branch.2.": "densifiers.#.name.",
    _DENSIFIER + "pc_range": None,  # these two must equal `OpusV2.constants`
    _DENSIFIER + "voxel_num": None,
}


@dataclass(frozen=True)
class Voxels:
    """What one layer says of the voxels that its points reach, V of them over all lanes; elsewhere nothing is."""

    sites: Tensor  # (V, 4) int64: lane, x, y, z; ascending
    logits: Tensor  # (V, K)
    flow: Tensor | None  # (V, 2) m/s over ground, car frame now

    def lane(self, b: int) -> "Voxels":
        """A batch of one: those of lane b."""
        mine = self.sites[:, 0] == b
        sites = self.sites[mine] * self.sites.new_tensor([0, 1, 1, 1])
        return Voxels(sites, self.logits[mine], None if self.flow is None else self.flow[mine])


@dataclass(frozen=True)
class Output:
    """What every decoder layer says, first layer first; P differs from layer to layer."""

    points: tuple[Tensor, ...]  # (B, Q, P, 3) m, car frame now
    voxels: tuple[Voxels, ...]  # of every layer where something may learn, else of the last alone

    def told(self) -> list[tuple[Tensor | None, Tensor]]:
        """Everything said, to be compared: values, and places (M, D) that rows (M, C) belong to; None: their order."""
        rows = [(v.sites, v.logits if v.flow is None else torch.cat([v.logits, v.flow], dim=1)) for v in self.voxels]
        return [*((None, points) for points in self.points), *rows]


class OpusV2(nn.Module):
    """Clips -> points with features -> occupancy (and velocities). See `systems.base.System` for the contract."""

    PRESETS, NAMES = PRESETS, NAMES

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.backbone = BACKBONES[config.backbone]()
        self.neck = FPN(self.backbone.channels[-config.levels :], config.channels)
        self.queries = nn.Embedding(config.queries, 3)  # where each query begins, fractions of the grid's box
        before = (1, *config.refines[:-1])
        self.layers = nn.ModuleList(Layer(config, *points) for points in zip(before, config.refines, strict=True))
        self.densifiers = nn.ModuleList(Densifier(config) for _ in config.refines)
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
        for layer, densifier in zip(self.layers, self.densifiers, strict=True):
            layer.initialise()
            densifier.initialise(torch.tensor(shares if prior is None else [prior] * len(shares)))
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
        unit = self.queries.weight[None, :, None].expand(len(view.rows), -1, -1, -1)  # (B, Q, 1, 3)
        query = unit.new_zeros(*unit.shape[:2], self.config.channels)
        points, voxels = [], []
        learns = self.training or torch.is_grad_enabled()
        for layer, densifier in zip(self.layers, self.densifiers, strict=True):
            query, unit = layer(query, unit.detach(), view)
            points.append(self.config.grid.metres(unit))
            if learns or layer is self.layers[-1]:
                voxels.append(densifier(points[-1], layer.told(query)))
        return Output(tuple(points), tuple(voxels))

    def loss(self, output: Output, truth: Occupancy) -> dict[str, Tensor]:
        """Scalars to be added up: where the points of the queries begin, and of each layer where its points are, what
        its voxels are called and (with `Config.flow`) how fast they are. truth: a lane of labels a lane of the output.

        Source of the losses: the authors' `opus_head.loss_single`. ValueError where the truth is told in another grid
        or in other classes.
        """
        config = self.config
        if (truth.grid, truth.classes) != (config.grid, config.table):
            raise ValueError(
                f"opus-v2: the truth is told in {truth.classes.table} on {truth.grid}, the network speaks "
                f"{config.classes} on {config.grid}"
            )
        published, terms = config.as_published, {}
        rare = [truth.classes.names[number] for number in RARE_NUMBERS] if published else RARE
        targets = [Target.of(truth, lane, rare) for lane in range(len(truth.labels))]
        if published:
            begin = config.grid.metres(self.queries.weight).expand(len(targets), -1, -1)
            terms["points begin"] = points_loss(begin, targets, published)[0]
        for k, points in enumerate(output.points):
            terms[f"points {k}"], _ = points_loss(points.flatten(1, 2), targets, published)
        for k, voxels in enumerate(output.voxels, start=len(output.points) - len(output.voxels)):
            terms[f"names {k}"] = _names_loss(voxels, truth, published)
            if voxels.flow is not None:
                terms[f"flow {k}"] = _flow_loss(voxels, truth)
        return terms

    @torch.no_grad()
    def decode(self, output: Output) -> list[Prediction]:
        """One prediction a lane, from the last layer (`opus_head.get_occ`)."""
        grid, classes, threshold = self.config.grid, self.config.table, self.config.threshold
        predictions = []
        for b, points in enumerate(output.points[-1]):
            voxels = output.voxels[-1].lane(b)
            best, label = voxels.logits.sigmoid().max(-1)
            sure = best > threshold
            where = voxels.sites[sure][:, 1:].unbind(1)
            labels = torch.full(grid.shape, classes.free, dtype=torch.uint8, device=points.device)
            score, flow = points.new_zeros(grid.shape), None
            labels[where], score[where] = label[sure].to(torch.uint8), best[sure].to(score)
            if voxels.flow is not None:
                flow = points.new_zeros(*grid.shape, 2)
                flow[where] = voxels.flow[sure].to(flow)
            predictions.append(Prediction(grid, classes, labels, score, flow))
        return predictions

    def constants(self) -> dict[str, Tensor]:
        """The authors' buffers that say which grid their weights are for."""
        constants = opus_constants(self.config.grid)
        for i in range(len(self.config.refines)):
            for name in ("pc_range", "voxel_num"):
                constants[f"pts_bbox_head.densifiers.{i}.{name}"] = constants[f"pts_bbox_head.{name}"]
        return constants


# ---- decoder --------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Look, mix, talk to the other queries, move the points and tell of them."""

    def __init__(self, config: Config, before: int, after: int):
        super().__init__()
        c, self.config, self.after = config.channels, config, after
        self.position = nn.Sequential(
            nn.Linear(3 * before, c), nn.LayerNorm(c), nn.ReLU(), nn.Linear(c, c), nn.LayerNorm(c), nn.ReLU()
        )
        self.sampling = Sampling(config)
        self.mixing = Mixing(c, config.groups, config.samples * config.frames, config.mixed)
        self.attention = Attention(c, config.heads, config.dropout)
        self.feed = nn.Sequential(
            *(nn.Linear(c, config.hidden), nn.ReLU(), nn.Dropout(config.dropout)),
            *(nn.Linear(config.hidden, c), nn.Dropout(config.dropout)),
        )
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(c), nn.LayerNorm(c), nn.LayerNorm(c)
        self.tell = nn.Sequential(
            *(nn.Linear(c, c), nn.LayerNorm(c), nn.ReLU()),
            *(nn.Linear(c, c), nn.LayerNorm(c), nn.ReLU()),
            nn.Linear(c, after * config.told),
        )
        self.move = branch(c, 3 * after)

    def initialise(self) -> None:
        self.sampling.initialise()
        self.mixing.initialise()
        self.attention.initialise()

    def forward(self, query: Tensor, unit: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Queries (B, Q, C) with points (B, Q, P, 3), fractions of the box -> both anew."""
        grid = self.config.grid
        b, q, _, _ = unit.shape
        points = grid.metres(unit)
        centre = points.mean(dim=2)  # (B, Q, 3)
        query = query + self.position(unit.flatten(2))
        query = self.norm1(self.mixing(self.sampling(query, points, view), query))
        query = self.norm2(self.attention(query, centre))
        query = self.norm3(query + self.feed(query))
        moved = centre[:, :, None] + STEP * self.move(query).view(b, q, self.after, 3)
        return query, grid.unit(moved)

    def told(self, query: Tensor) -> Tensor:
        """Queries as `forward` gives them -> features (B, Q, P, D) of their points."""
        return self.tell(query).unflatten(-1, (self.after, -1))


class Sampling(nn.Module):
    """Where to look, and in which levels."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.prototype = nn.Embedding(config.groups * config.samples, 3)  # in the spread of the query's points
        self.offset = nn.Linear(config.channels, config.groups * config.samples * 3)  # m
        self.levels = nn.Linear(config.channels, config.groups * config.samples * config.levels)

    @torch.no_grad()
    def initialise(self) -> None:
        nn.init.normal_(self.prototype.weight)
        nn.init.zeros_(self.offset.weight)
        nn.init.uniform_(self.offset.bias, -0.5, 0.5)

    def forward(self, query: Tensor, points: Tensor, view: View) -> Tensor:
        """Queries (B, Q, C) with points (B, Q, P, 3) in metres -> (B, Q, G, T*S, C/G)."""
        c = self.config
        b, q, p, _ = points.shape
        spread = points.std(dim=2, keepdim=True) if p > 1 else torch.ones_like(points)
        offset = self.offset(query).view(b, q, c.groups * c.samples, 3)
        places = points.mean(dim=2, keepdim=True) + self.prototype.weight * spread + offset
        weights = self.levels(query).view(b, q, c.groups, c.samples, c.levels).softmax(dim=-1)
        return view.sample(places.view(b, q, c.groups, c.samples, 3), weights, c.as_published)


# ---- points -> voxels -----------------------------------------------------------------------------------------------


class Densifier(nn.Module):
    """Points with features -> their voxels and those around them, named. Its cost follows the voxels, not the grid."""

    def __init__(self, config: Config):
        super().__init__()
        self.grid = config.grid
        memory = 0.01 if config.as_published else 0.1  # of batch norms; a short training ends before the former settles
        taken, given = (6 + config.told, config.cells), (config.cells // 2, config.cells)
        self.pools = nn.ModuleList(Pool(*sizes, memory) for sizes in zip(taken, given, strict=True))
        self.spread = Kernel(config.cells, config.cells)
        self.name = Kernel(config.cells, len(config.table.names))
        self.flow = Kernel(config.cells, 2) if config.flow else None

    def initialise(self, prior: Tensor) -> None:
        self.name.bias.copy_(prior.logit())

    def forward(self, points: Tensor, told: Tensor) -> Voxels:
        """Points (B, Q, P, 3) in metres with features (B, Q, P, D)."""
        grid = self.grid
        shape = torch.tensor(grid.shape, device=points.device)
        # computed as published: a border between two voxels lies where float32 puts it
        cell = (grid.unit(points.detach()) * shape).floor()
        cell = torch.minimum(cell.nan_to_num().clamp_min(0), shape - 1)  # from outside, onto the border
        middle = grid.metres((cell + 0.5) / shape)
        features = torch.cat([points - middle, points - points.mean(dim=2, keepdim=True), told], dim=-1).flatten(0, 2)

        lane = torch.arange(len(points), device=points.device).view(-1, 1, 1)
        x, y, z = cell.long().unbind(-1)
        ids, place = (((lane * shape[0] + x) * shape[1] + y) * shape[2] + z).flatten().unique(return_inverse=True)
        features, most = self.pools[0](features, place, ids.shape[0])
        _, most = self.pools[1](torch.cat([features, most[place]], dim=1), place, ids.shape[0])

        sites = torch.stack(torch.unravel_index(ids, (len(points), *grid.shape)), dim=1)
        sites, _, taps = ops.regular_taps(sites, grid.shape, AROUND, padding=(1, 1, 1))
        features = F.relu(self.spread(most, taps))
        taps = ops.submanifold_taps(sites, grid.shape, AROUND)
        if self.flow is None:
            return Voxels(sites, self.name(features, taps), None)
        # both at once: most of the time goes into fetching neighbours
        weight, bias = (torch.cat([a, b]) for a, b in zip(self.name.parameters(), self.flow.parameters(), strict=True))
        said = convolve(features, taps, weight, bias).split([len(self.name.bias), 2], dim=1)
        return Voxels(sites, *said)


class Pool(nn.Module):
    """A layer for every point, and of each voxel the maximum over its points (PointPillars, arXiv 1812.05784)."""

    def __init__(self, taken: int, given: int, momentum: float):
        super().__init__()
        self.linear = nn.Linear(taken, given, bias=False)
        self.norm = nn.BatchNorm1d(given, eps=1e-3, momentum=momentum)

    def forward(self, features: Tensor, place: Tensor, voxels: int) -> tuple[Tensor, Tensor]:
        """Features of points, each in the voxel `place` of so many -> features of points, and of voxels."""
        features = F.relu(self.norm(self.linear(features)))
        return features, ops.scatter_max(features, place, voxels)


class Kernel(nn.Module):
    """Weights of a convolution over voxels, as spconv stores them: (out, x, y, z, in)."""

    def __init__(self, taken: int, given: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(given, *AROUND, taken)), nn.Parameter(torch.empty(given))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As those of torch.nn.Conv3d."""
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, features: Tensor, taps: Tensor) -> Tensor:
        """See `ops.convolve`."""
        return convolve(features, taps, self.weight, self.bias)


def convolve(features: Tensor, taps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`ops.convolve` with weights (out, x, y, z, in)."""
    return ops.convolve(features, taps, weight.permute(0, 4, 1, 2, 3), bias)


# ---- losses ---------------------------------------------------------------------------------------------------------


def _names_loss(voxels: Voxels, truth: Occupancy, published: bool) -> Tensor:
    """Every voxel is called what it is, or nothing (ours: what no camera sees counts HIDDEN); per occupied voxel."""
    where = voxels.sites.unbind(1)
    label = truth.labels[where].long()
    costs = focal(voxels.logits, label) @ voxels.logits.new_tensor([NAME_WEIGHTS[name] for name in truth.classes.names])
    if not published:
        costs = torch.where(truth.seen[where], costs, HIDDEN * costs)
    occupied = (label != truth.classes.free).sum().to(costs)
    return NAMES_WEIGHT * costs.sum() / mean_over_processes(occupied)


def _flow_loss(voxels: Voxels, truth: Occupancy) -> Tensor:
    """L1 of the velocities of voxels of classes that move, where it is known. Ours."""
    nothing = voxels.flow.sum() * 0.0  # of the same graph: every process of a training has the same terms
    if truth.flow is None:
        return nothing
    where = voxels.sites.unbind(1)
    label, true = truth.labels[where], truth.flow[where]
    known = torch.isin(label, label.new_tensor(truth.classes.moving_ids)) & true.isfinite().all(-1)
    apart = (voxels.flow[known] - true[known]).abs().sum()
    return nothing + FLOW_WEIGHT * apart / mean_over_processes(known.sum().to(apart))
