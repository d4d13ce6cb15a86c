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
- the queries stand on an even grid and their points begin spread over columns there (`_column`), so that to say
  what is where is at first to name points, and only then to move them;
- a point that strays from every voxel is called nothing, where the authors call it after the nearest one, and what no
  camera sees counts little.
Where `Config.flow` is on: every point also has a velocity.

B batch, T time (newest first), N cameras, R rows of a camera's pyramid, Q queries, P points of a query, G groups,
S sampled points of a group and time, C channels, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..geometry import OCC3D_GRID, Cameras, Grid, rigid
from ..nn import BACKBONES, FPN
from ..nn.losses import focal, mean_over_processes, smooth_l1
from ..types import OCC3D, OPENOCC, Classes, Clip, Occupancy, Prediction

SPACING = 0.5  # s between the times of a window: nuScenes' key frames
KEEP_EVERY = 0.25  # s: a frame enters the memory when the newest one there is this old
JITTER = 0.015  # s by which a camera's clock may be early
KEEP = 15  # frames in the memory: at KEEP_EVERY they reach back to the eighth time of a window

CAP = 10  # points of a voxel that count (mmcv `Voxelization`, max_num_points)
CENTRE_DISTANCE = 3.0  # m: a point this far from its query's mean is dropped (`opus_head.get_occ`, default)
STEP = 0.5  # m by which an output of one of the point branches moves a point (configs, `scales`)

# ---- losses (`opus_head.py`; the numbers stand there as defaults, not in the configs)
POINTS_WEIGHT, NAMES_WEIGHT = 0.5, 2.0
FLOW_WEIGHT = 0.05  # ours: at 0.25 its few points drown what the names' many say
BETA = 0.2  # m, where the loss of a distance turns from a square into a line
NEAR = 0.2  # m: a voxel that the camera sees and whose nearest point is farther away counts FAR_WEIGHT times
FAR_WEIGHT, RARE_WEIGHT = 5.0, 10.0
# ours, where `Config.as_published` is off
STRAY = 0.35  # m along any axis: a point farther than this from the voxel nearest to it is told to be nothing ...
PULL = 0.8  # m: ... and farther than this it is not drawn there: what is nothing may be anywhere
HIDDEN = 0.1  # weight of what no camera sees: three of four points of a street, and nobody can know them
OUR_NAMES_WEIGHT = 8.0  # points begin spread over the whole box, so that names have more to say than places
RARE = ("others", "bicycle", "construction_vehicle", "traffic_cone")  # seen, they count RARE_WEIGHT times at least
NAME_WEIGHTS = {  # of a class's scores, whether they should be high or low
    "others": 10.0,
    "barrier": 5.0,
    "bicycle": 10.0,
    "bus": 5.0,
    "car": 5.0,
    "construction_vehicle": 10.0,
    "motorcycle": 10.0,
    "pedestrian": 5.0,
    "traffic_cone": 10.0,
    "trailer": 5.0,
    "truck": 5.0,
    "driveable_surface": 1.0,
    "other_flat": 5.0,
    "sidewalk": 1.0,
    "terrain": 1.0,
    "manmade": 2.0,
    "vegetation": 1.0,
}

# ---- where our own networks begin; the authors draw all at random, and train on millions of samples
GROUND = 0.0  # m: the foot of the columns over which points begin spread
LOOK = 3**0.5  # a query looks as far around as its points lie, in their spread
# of the occupied voxels of streets (96 keyframes of the synthetic world; `others` is a guess): a point's first name
SHARES = {
    "others": 0.001,
    "barrier": 0.014,
    "bicycle": 0.0008,
    "bus": 0.004,
    "car": 0.045,
    "construction_vehicle": 0.004,
    "motorcycle": 0.0004,
    "pedestrian": 0.003,
    "traffic_cone": 0.0006,
    "trailer": 0.0013,
    "truck": 0.016,
    "driveable_surface": 0.22,
    "other_flat": 0.035,
    "sidewalk": 0.16,
    "terrain": 0.18,
    "manmade": 0.2,
    "vegetation": 0.11,
}


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
    as_published: bool = True  # the authors' sampling rules, oddities included; their weights need them
    grid: Grid = field(default=OCC3D_GRID)  # where occupancy is told
    classes: str = OCC3D.table  # which table of classes

    def __post_init__(self):
        if self.classes not in _TABLES:
            raise ValueError(f"opus: classes must be one of {sorted(_TABLES)}, got {self.classes!r}")
        if self.backbone not in BACKBONES or not 1 <= self.levels <= 4:
            raise ValueError(
                f"opus: expected 1 to 4 levels of one of {sorted(BACKBONES)}, got {self.levels} of {self.backbone!r}"
            )
        if self.channels % self.groups or self.channels % self.heads:
            raise ValueError(f"opus: {self.groups} groups or {self.heads} heads do not divide {self.channels} channels")
        if not self.refines or min(*self.refines, self.queries, self.samples, self.frames) < 1:
            raise ValueError("opus: refines, queries, samples and frames must be positive")

    @property
    def table(self) -> Classes:
        return _TABLES[self.classes]


_TABLES = {classes.table: classes for classes in (OCC3D, OPENOCC)}

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
        threshold=0.2,
        flow=True,
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
NAMES = {
    "img_backbone.": "backbone.",
    "img_neck.lateral_convs.#.conv.": "neck.lateral.#.",
    "img_neck.fpn_convs.#.conv.": "neck.output.#.",
    "pts_bbox_head.init_points.weight": "queries.weight",
    "pts_bbox_head.pc_range": None,  # these four must equal `Opus.constants`
    "pts_bbox_head.scene_size": None,
    "pts_bbox_head.voxel_size": None,
    "pts_bbox_head.voxel_num": None,
    _LAYER + "position_encoder.": "layers.#.position.",
    _LAYER + "self_attn.attention.attn.in_proj_weight": "layers.#.attention.taken.weight",
    _LAYER + "self_attn.attention.attn.in_proj_bias": "layers.#.attention.taken.bias",
    _LAYER + "self_attn.attention.attn.out_proj.": "layers.#.attention.out.",
    _LAYER + "self_attn.gen_tau.": "layers.#.attention.reach.",
    _LAYER + "sampling.sampling_offset.": "layers.#.sampling.offset.",
    _LAYER + "sampling.scale_weights.": "layers.#.sampling.levels.",
    _LAYER + "mixing.parameter_generator.": "layers.#.mixing.matrices.",
    _LAYER + "mixing.out_proj.": "layers.#.mixing.out.",
    _LAYER + "ffn.layers.0.0.": "layers.#.feed.0.",
    _LAYER + "ffn.layers.1.": "layers.#.feed.3.",
    _LAYER + "norm#.": "layers.#.norm#.",
    _LAYER + "cls_branch.": "layers.#.name.",
    _LAYER + "reg_branch.": "layers.#.move.",
}


@dataclass(frozen=True)
class Entry:
    """One instant of one lane, as the network sees it."""

    rows: Tensor  # (N, R, C): each camera's pyramid
    cameras: Cameras  # (N), car frame of that instant
    used: Tensor  # (N,) bool
    now_from_then: Tensor  # (4, 4) float64
    age: float  # s before now


@dataclass(frozen=True)
class Memory:
    """Instants of the past, newest first, a tuple for each lane; `now` is that of the clip just seen."""

    lanes: tuple[tuple[Entry, ...], ...]


@dataclass(frozen=True)
class Output:
    """What every decoder layer says, first layer first; P differs from layer to layer."""

    points: tuple[Tensor, ...]  # (B, Q, P, 3) m, car frame now
    logits: tuple[Tensor, ...]  # (B, Q, P, K)
    flow: tuple[Tensor, ...] | None  # (B, Q, P, 2) m/s over ground, car frame now


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
        self.layers = nn.ModuleList(Layer(config, *points) for points in zip(before, config.refines, strict=True))
        if not config.as_published:  # a column is not a guess that could be better
            self.queries.weight.requires_grad_(False)
        for name, values in zip(("mean", "std"), self.backbone.normal, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self, prior: float | None = None) -> None:
        """Random weights as the authors draw them; our own networks begin as even columns, see GROUND, LOOK, SHARES.

        prior: what every class scores before anything is learned; None: 0.01 as published, else each class its share.
        """
        config = self.config
        self.backbone.initialise()
        self.neck.initialise()
        shares = [0.01 if config.as_published else SHARES[name] for name in config.table.names]
        for layer in self.layers:
            layer.initialise(torch.tensor(shares if prior is None else [prior] * len(shares)))
        if config.as_published:
            nn.init.uniform_(self.queries.weight)
            return
        # each query stands in the middle of a column of its own, and its points are spread over that
        grid = config.grid
        ground = min(max(GROUND, grid.low[2]), grid.high[2])
        edge = math.sqrt(grid.size[0] * grid.size[1] / config.queries)
        middle = torch.tensor([0.0, 0.0, (grid.high[2] - ground) / 2])  # m above its foot
        self.queries.weight[:, :2] = _even(config.queries, *grid.size[:2])
        self.queries.weight[:, 2] = (ground + middle[2] - grid.low[2]) / grid.size[2]
        spread = torch.tensor([edge, edge, grid.high[2] - ground]) / 12**0.5  # of one point, which has none itself
        for layer in self.layers:
            column = _column(layer.after, edge, grid.high[2] - ground)
            layer.move[-1].bias.copy_(((column - middle) / STEP).flatten())
            looks = layer.sampling.offset.bias.view(-1, 3)
            looks.uniform_(-LOOK, LOOK).mul_(spread)
            middle, spread = column.mean(dim=0), torch.ones(3)

    def forward(self, clip: Clip, memory: Memory | None) -> tuple[Output, Memory]:
        """A clip that brings `config.frames` times is the window; a shorter one is completed from memory."""
        config = self.config
        expected = (3, config.height, config.width)
        if clip.images.shape[3:] != expected or clip.images.shape[1] > config.frames:
            raise ValueError(
                f"opus: expected at most {config.frames} times of pictures {expected}, got {tuple(clip.images.shape)}"
            )
        rows, sizes = self.encode(clip.images, clip.used)
        windows, memory = _remember(clip, rows, memory, config.frames)

        pixels_from_now = torch.stack([torch.stack([_pixels_from_now(e) for e in lane]) for lane in windows])
        view = _View(
            rows=[[entry.rows for entry in lane] for lane in windows],
            sizes=sizes,
            pixels_from_now=pixels_from_now,  # (B, T, N, 3, 4)
            used=torch.stack([torch.stack([entry.used for entry in lane]) for lane in windows]),
        )
        unit = self.queries.weight[None, :, None].expand(len(windows), -1, -1, -1)  # (B, Q, 1, 3)
        query = unit.new_zeros(len(windows), config.queries, config.channels)
        points, logits, flow = [], [], []
        for layer in self.layers:
            query, unit, named, moving = layer(query, unit.detach(), view)
            points.append(config.grid.metres(unit))
            logits.append(named)
            flow.append(moving)
        return Output(tuple(points), tuple(logits), tuple(flow) if config.flow else None), memory

    def encode(self, images: Tensor, used: Tensor) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """Pictures (B, T, N, 3, H, W) uint8 -> pyramids (B, T, N, R, C) and the sizes of their levels."""
        pictures = (images.flatten(0, 2) - self.mean) / self.std
        pictures = pictures * used.flatten()[:, None, None, None]  # in training, batch norm looks at all
        maps = self.backbone(pictures.contiguous(memory_format=torch.channels_last))
        levels = self.neck(maps[-self.config.levels :])
        rows, sizes = ops.flatten_levels(levels)
        return rows.unflatten(0, images.shape[:3]), sizes

    def loss(self, output: Output, truth: Occupancy) -> dict[str, Tensor]:
        """Scalars to be added up: where the points of the queries begin, and of each layer where its points are, what
        they are called and (with `Config.flow`) how fast they are. truth: one lane of labels a lane of the output.

        Card of the authors' losses: `opus_head.loss_single` (arXiv 2409.09350, section 3.4). ValueError where the truth
        is told in another grid or in other classes.
        """
        if (truth.grid, truth.classes) != (self.config.grid, self.config.table):
            raise ValueError(
                f"opus: the truth is told in {truth.classes.table} on {truth.grid}, the network speaks "
                f"{self.config.classes} on {self.config.grid}"
            )
        targets = [_Target.of(truth, lane) for lane in range(len(truth.labels))]
        published, terms = self.config.as_published, {}
        if published:
            begin = self.config.grid.metres(self.queries.weight).expand(len(targets), -1, -1)
            terms["points begin"] = _points_loss(begin, targets, published)[0]
        for k, (points, logits) in enumerate(zip(output.points, output.logits, strict=True)):
            points, logits = points.flatten(1, 2), logits.flatten(1, 2)
            terms[f"points {k}"], met = _points_loss(points, targets, published)
            terms[f"names {k}"] = _names_loss(logits, points.detach(), targets, met, published)
            if output.flow is not None:
                terms[f"flow {k}"] = _flow_loss(output.flow[k].flatten(1, 2), targets, met)
        return terms

    @torch.no_grad()
    def decode(self, output: Output) -> list[Prediction]:
        """One prediction a lane, from the last layer (`opus_head.get_occ`)."""
        flow = [None] * len(output.points[-1]) if output.flow is None else output.flow[-1]
        lanes = zip(output.points[-1], output.logits[-1], flow, strict=True)
        return [_decode(points, logits, moving, self.config) for points, logits, moving in lanes]

    def constants(self) -> dict[str, Tensor]:
        """The authors' buffers that say which grid their weights are for."""
        grid = self.config.grid
        return {
            "pts_bbox_head.pc_range": torch.tensor((*grid.low, *grid.high)),
            "pts_bbox_head.scene_size": torch.tensor(grid.size),
            "pts_bbox_head.voxel_size": torch.tensor(grid.voxel),
            "pts_bbox_head.voxel_num": torch.tensor(grid.shape),
        }


# ---- memory ---------------------------------------------------------------------------------------------------------


def _remember(clip: Clip, rows: Tensor, memory: Memory | None, frames: int) -> tuple[list[list[Entry]], Memory]:
    """The window of every lane, `frames` entries each, and what to remember."""
    if memory is not None and len(memory.lanes) != len(clip.fresh):
        raise ValueError(f"opus: memory of {len(memory.lanes)} lanes for a clip of {len(clip.fresh)}")
    ages, since_last, fresh = clip.age.tolist(), clip.since_last.tolist(), clip.fresh.tolist()
    now_from_then, now_from_last = clip.now_from_then.double(), clip.now_from_last.double()
    windows, lanes = [], []
    for b, forget in enumerate(fresh):
        given = [
            Entry(rows[b, t], clip.cameras[b, t], clip.used[b, t], now_from_then[b, t], age)
            for t, age in enumerate(ages[b])
        ]
        past = []
        if memory is not None and not forget:
            past = [
                replace(e, now_from_then=now_from_last[b] @ e.now_from_then, age=e.age + since_last[b])
                for e in memory.lanes[b]
            ]
        if any(e.rows.shape != rows.shape[2:] for e in past):
            raise ValueError("opus: the cameras or pictures of a lane changed without a fresh start")
        windows.append(given if len(given) == frames else _window(given + past, frames))
        for entry in reversed(given):  # oldest first
            if not past or past[0].age - entry.age >= KEEP_EVERY - JITTER:
                past = [replace(entry, rows=entry.rows.detach()), *past]
        lanes.append(tuple(past[:KEEP]))
    return windows, Memory(tuple(lanes))


def _window(entries: Sequence[Entry], frames: int) -> list[Entry]:
    """Now, and for each earlier time the entry nearest to it: the oldest again and again where a drive begins."""
    return [min(entries, key=lambda e: abs(e.age - k * SPACING)) if k else entries[0] for k in range(frames)]


def _pixels_from_now(entry: Entry) -> Tensor:
    """(N, 3, 4) float32, composed in float64."""
    cameras = entry.cameras.to(torch.float64)
    return (cameras.pixels_from_car() @ rigid.inverse(entry.now_from_then)).float()


# ---- decoder --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """What the decoder looks at: see `ops.sample` for the shapes."""

    rows: list[list[Tensor]]
    sizes: tuple[tuple[int, int], ...]
    pixels_from_now: Tensor
    used: Tensor


class Layer(nn.Module):
    """Look, mix, talk to the other queries, move and name the points."""

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
        self.name = nn.Sequential(
            *(nn.Linear(c, c), nn.LayerNorm(c), nn.ReLU()),
            *(nn.Linear(c, c), nn.LayerNorm(c), nn.ReLU()),
            nn.Linear(c, after * len(config.table.names)),
        )
        self.move = _branch(c, 3 * after)
        self.flow = _branch(c, 2 * after) if config.flow else None

    @torch.no_grad()
    def initialise(self, prior: Tensor) -> None:
        self.sampling.initialise()
        self.mixing.initialise()
        self.attention.initialise()
        self.name[-1].bias.copy_(prior.logit().repeat(self.after))

    def forward(self, query: Tensor, unit: Tensor, view: _View) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries (B, Q, C) with points (B, Q, P, 3), fractions of the box -> both anew, logits, velocities or None."""
        grid = self.config.grid
        b, q, _, _ = unit.shape
        points = grid.metres(unit)
        centre = points.mean(dim=2)  # (B, Q, 3)
        query = query + self.position(unit.flatten(2))
        query = self.norm1(self.mixing(self.sampling(query, points, view), query))
        query = self.norm2(self.attention(query, centre))
        query = self.norm3(query + self.feed(query))
        logits = self.name(query).view(b, q, self.after, -1)
        moved = centre[:, :, None] + STEP * self.move(query).view(b, q, self.after, 3)
        flow = None if self.flow is None else self.flow(query).view(b, q, self.after, 2)
        return query, grid.unit(moved), logits, flow


def _even(count: int, long: float, wide: float) -> Tensor:
    """`count` places spread evenly over a rectangle `long` by `wide`, row after row: (count, 2), fractions of it."""
    rows = min(max(round(math.sqrt(count * long / wide)), 1), count)
    filled = [count * (row + 1) // rows - count * row // rows for row in range(rows)]
    return torch.tensor([((r + 0.5) / rows, (k + 0.5) / n) for r, n in enumerate(filled) for k in range(n)])


def _column(count: int, edge: float, height: float) -> Tensor:
    """`count` places spread evenly over a column around 0, floor after floor from its foot: (count, 3) m."""
    step = (edge * edge * height / count) ** (1 / 3) if height > 0 else math.inf
    floors = min(max(round(height / step), 1), count)
    filled = [-(-(count - k) // floors) for k in range(floors)]  # what is left over stands on the lowest
    return torch.cat(
        [
            torch.cat([(_even(n, edge, edge) - 0.5) * edge, torch.full((n, 1), k * height / floors)], dim=1)
            for k, n in enumerate(filled)
        ]
    )


def _branch(channels: int, out: int) -> nn.Sequential:
    c = channels
    return nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c), nn.ReLU(), nn.Linear(c, out))


class Sampling(nn.Module):
    """Where to look, and in which levels."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.offset = nn.Linear(config.channels, config.groups * config.samples * 3)
        self.levels = nn.Linear(config.channels, config.groups * config.samples * config.levels)

    @torch.no_grad()
    def initialise(self) -> None:
        nn.init.zeros_(self.offset.weight)
        nn.init.uniform_(self.offset.bias, -0.5, 0.5)

    def forward(self, query: Tensor, points: Tensor, view: _View) -> Tensor:
        """Queries (B, Q, C) with points (B, Q, P, 3) in metres -> (B, Q, G, T*S, C/G)."""
        c = self.config
        b, q, p, _ = points.shape
        if p > 1:
            spread = points.std(dim=2, keepdim=True)
        else:  # the authors look at one place then; see the departures at the top
            spread = torch.full_like(points, 0.0 if c.as_published else 1.0)
        offset = self.offset(query).view(b, q, c.groups * c.samples, 3)
        places = (points.mean(dim=2, keepdim=True) + offset * spread).view(b, q, c.groups, c.samples, 3)
        weights = self.levels(query).view(b, q, c.groups, c.samples, c.levels).softmax(dim=-1)
        return ops.sample(
            view.rows,
            view.sizes,
            (c.height, c.width),
            view.pixels_from_now,
            view.used,
            places,
            weights,
            as_published=c.as_published,
        )


class Mixing(nn.Module):
    """Sampled points mixed by matrices that the query makes (AdaMixer, arXiv 2203.16507), added to the query."""

    def __init__(self, channels: int, groups: int, taken: int, given: int):
        super().__init__()
        self.groups, self.taken, self.given, self.inner = groups, taken, given, channels // groups
        self.matrices = nn.Linear(channels, groups * (self.inner**2 + taken * given))
        self.out = nn.Linear(given * channels, channels)

    @torch.no_grad()
    def initialise(self) -> None:
        nn.init.zeros_(self.matrices.weight)

    def forward(self, sampled: Tensor, query: Tensor) -> Tensor:
        b, q, g, p, c = sampled.shape
        assert (g, p, c) == (self.groups, self.taken, self.inner), sampled.shape
        by_channel, by_point = self.matrices(query).view(b, q, g, -1).split([c * c, p * self.given], dim=-1)
        x = sampled @ by_channel.reshape(b, q, g, c, c)
        x = F.relu(F.layer_norm(x, (p, c)))
        x = by_point.reshape(b, q, g, self.given, p) @ x
        x = F.relu(F.layer_norm(x, (self.given, c)))
        return query + self.out(x.flatten(2))


class Attention(nn.Module):
    """Queries attend to each other, the less the farther apart, each head with a reach of the query's own choice."""

    def __init__(self, channels: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.taken = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.reach = nn.Linear(channels, heads)

    @torch.no_grad()
    def initialise(self) -> None:
        nn.init.xavier_uniform_(self.taken.weight)  # as torch.nn.MultiheadAttention, which the authors use
        nn.init.zeros_(self.taken.bias)
        nn.init.zeros_(self.out.bias)
        nn.init.zeros_(self.reach.weight)
        nn.init.uniform_(self.reach.bias, 0.0, 2.0)

    def forward(self, query: Tensor, centre: Tensor) -> Tensor:
        """Queries (B, Q, C) at (B, Q, 3) metres."""
        b, q, c = query.shape
        distance = _distances(centre.detach())
        mask = -distance[:, None] * self.reach(query).mT[..., None]  # (B, heads, Q, Q): the row's reach counts
        parts = self.taken(query).view(b, q, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        talked = F.scaled_dot_product_attention(*parts, attn_mask=mask, dropout_p=dropout)
        return query + self.out(talked.transpose(1, 2).reshape(b, q, c))


def _distances(centre: Tensor) -> Tensor:
    """(B, Q, 3) -> (B, Q, Q) m, by differences: the quick way through products loses centimetres in float32."""
    return torch.cdist(centre, centre, compute_mode="donot_use_mm_for_euclid_dist")


# ---- losses ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """The occupied voxels of one lane, V of them, and what cameras see."""

    grid: Grid
    seen: Tensor  # (X, Y, Z) bool
    visible: Tensor  # (V,) bool: `seen` of the occupied voxels
    centre: Tensor  # (V, 3) m
    label: Tensor  # (V,) int64
    flow: Tensor  # (V, 2) m/s; NaN where it is not known or the class does not move
    distance: Tensor  # (V,) what a wrong name costs more, the farther from the car: 1 to 1.5
    far: Tensor  # (V,) weight of a voxel that no point came near
    least: Tensor  # (V,) weight of a voxel at least
    weight: Tensor  # (K,) of each class's scores

    @staticmethod
    def of(truth: Occupancy, lane: int) -> "_Target":
        labels, classes, grid = truth.labels[lane], truth.classes, truth.grid
        index = (labels != classes.free).nonzero()
        where = index.unbind(1)
        label, seen = labels[where].long(), truth.seen[lane][where]
        centre = (index + 0.5) * labels.new_tensor(grid.voxel, dtype=torch.float32)
        centre = centre + centre.new_tensor(grid.low)
        moves = torch.isin(label, label.new_tensor(classes.moving_ids))
        known = truth.flow[lane][where] if truth.flow is not None else torch.full_like(centre[:, :2], torch.nan)
        rare = torch.isin(label, label.new_tensor([classes.id(name) for name in RARE if name in classes.names]))
        return _Target(
            grid=grid,
            seen=truth.seen[lane],
            visible=seen,
            centre=centre,
            label=label,
            flow=known.masked_fill(~moves[:, None], torch.nan),
            distance=1 + centre[:, :2].norm(dim=-1) / math.hypot(*grid.size[:2]),
            far=torch.where(seen, FAR_WEIGHT, 1.0),
            least=torch.where(seen & rare, RARE_WEIGHT, 1.0),
            weight=centre.new_tensor([NAME_WEIGHTS[name] for name in classes.names]),
        )


def _points_loss(points: Tensor, targets: Sequence[_Target], published: bool) -> tuple[Tensor, list[Tensor]]:
    """Points (B, P, 3) m -> the loss, and for each lane which voxel each of its points is nearest to, (P,) int64.

    Both ways: from every voxel to the point nearest to it, which draws points to what nobody tells yet, and from every
    point to the voxel nearest to it (ours: within PULL). A lane whose truth is empty has nothing to say; its points
    meet nobody.
    """
    missed, strayed, voxels, count, met = [], [], 0, 0, []
    for mine, target in zip(points, targets, strict=True):
        if not len(target.centre):
            met.append(torch.zeros(0, dtype=torch.int64, device=points.device))
            continue
        to_point, to_voxel = ops.nearest(target.centre, mine), ops.nearest(mine, target.centre)
        away = target.centre - mine[to_point]
        far = away.detach().norm(dim=-1) > NEAR
        weight = torch.maximum(torch.where(far, target.far, 1.0), target.least)
        off = mine - target.centre[to_voxel]
        drawn = torch.ones_like(off[:, 0])
        if not published:
            weight = torch.where(target.visible, weight, HIDDEN)
            drawn = (off.detach().norm(dim=-1) <= PULL).to(off)
        missed.append((weight * smooth_l1(away, BETA)).sum())
        strayed.append((drawn * smooth_l1(off, BETA)).sum())
        voxels, count = voxels + len(target.centre), count + len(mine)
        met.append(to_voxel)
    nothing = points.sum() * 0.0  # of the same graph: every process of a training has the same terms
    both = (
        sum(parts, nothing) / mean_over_processes(points.new_tensor(float(n)))
        for parts, n in ((missed, voxels), (strayed, count))
    )
    return POINTS_WEIGHT * sum(both), met


def _names_loss(
    logits: Tensor, points: Tensor, targets: Sequence[_Target], met: Sequence[Tensor], published: bool
) -> Tensor:
    """Logits (B, P, K) of points (B, P, 3): each is called what the voxel is called that it is nearest to (ours: or
    nothing, where that is farther than STRAY, and what no camera sees counts HIDDEN)."""
    total, count = logits.sum() * 0.0, 0
    for mine, where, target, voxel in zip(logits, points, targets, met, strict=True):
        if len(voxel):
            label, weight = target.label[voxel], target.distance[voxel]
            if not published:
                near = (where - target.centre[voxel]).abs().amax(dim=-1) <= STRAY
                label = torch.where(near, label, mine.shape[-1])
                index, inside = target.grid.index(where)
                weight = torch.where(inside & target.seen[index.unbind(1)], weight, HIDDEN * weight)
            costs = focal(mine, label) * target.weight
            total = total + (costs.sum(-1) * weight).sum()
            count += len(voxel)
    weight = NAMES_WEIGHT if published else OUR_NAMES_WEIGHT
    return weight * total / mean_over_processes(logits.new_tensor(float(count)))


def _flow_loss(flow: Tensor, targets: Sequence[_Target], met: Sequence[Tensor]) -> Tensor:
    """Velocities (B, P, 2), L1: each point that met a voxel of a class that moves is as fast as that. Ours."""
    total, count = flow.sum() * 0.0, 0
    for mine, target, voxel in zip(flow, targets, met, strict=True):
        if len(voxel):
            true = target.flow[voxel]
            known = true.isfinite().all(-1)
            total = total + (mine[known] - true[known]).abs().sum()
            count = count + known.sum()
    return FLOW_WEIGHT * total / mean_over_processes(torch.as_tensor(count, device=flow.device).to(flow))


# ---- points -> voxels -----------------------------------------------------------------------------------------------


def _decode(points: Tensor, logits: Tensor, flow: Tensor | None, config: Config) -> Prediction:
    """Points (Q, P, 3) m, logits (Q, P, K), flow (Q, P, 2) or None -> one prediction."""
    grid, classes, threshold = config.grid, config.table, config.threshold
    volume = len(grid)

    # ---- points that count: near their query's middle, sure of something, inside, the first CAP of their voxel
    near = (points - points.mean(dim=1, keepdim=True)).norm(dim=-1) < CENTRE_DISTANCE
    chosen = (near & (logits.amax(-1).sigmoid() > threshold)).flatten().nonzero()[:, 0]
    index, inside = grid.index(points.flatten(0, 1)[chosen])
    chosen, index = chosen[inside], index[inside]
    voxel = (index[:, 0] * grid.shape[1] + index[:, 1]) * grid.shape[2] + index[:, 2]
    voxel, order = voxel.sort(stable=True)
    chosen = chosen[order]
    place, counts = voxel.unique_consecutive(return_inverse=True, return_counts=True)[1:]
    rank = torch.arange(len(voxel), device=voxel.device) - (counts.cumsum(0) - counts)[place]
    kept = rank < CAP
    voxel, chosen, place = voxel[kept], chosen[kept], place[kept]

    # ---- their mean
    where = voxel[torch.cat([place.new_ones(1), place.diff()])[: len(place)].bool()]  # (V,) each voxel once
    counts = counts.clamp_max(CAP)[:, None]
    scores = logits.new_zeros(len(where), logits.shape[-1])
    scores = scores.index_add(0, place, logits.flatten(0, 1)[chosen].sigmoid()) / counts
    speed = None
    if flow is not None:
        speed = flow.new_zeros(len(where), 2).index_add(0, place, flow.flatten(0, 1)[chosen]) / counts

    # ---- voxels that are sure of something, and what the closing adds between them
    sure = (scores > threshold).any(-1)
    where, scores = where[sure], scores[sure]
    best, label = scores.max(-1)
    labels = torch.full((volume,), classes.free, dtype=torch.uint8, device=points.device)
    score = points.new_zeros(volume)
    labels[where], score[where] = label.to(torch.uint8), best
    dense = None if speed is None else points.new_zeros(volume, 2)
    if dense is not None:
        dense[where] = speed[sure]
    if config.closing:
        added, label, best = _closing(where, scores, grid.shape, threshold)
        labels[added], score[added] = label.to(torch.uint8), best
        if dense is not None:
            dense[added] = _neighbours_mean(where, speed[sure], added, grid.shape)
    shape = grid.shape
    return Prediction(
        grid,
        classes,
        labels.view(shape),
        score.view(shape),
        None if dense is None else dense.view(*shape, 2),
    )


def _closing(where: Tensor, scores: Tensor, shape: tuple[int, int, int], threshold: float):
    """What a greyscale closing (3x3x3 maximum, then minimum, class by class) lifts above the threshold.

    where (V,) flat indices of the voxels with scores (V, K), each with one above the threshold; none elsewhere.
    -> flat indices (A,) of further voxels, their best class (A,) and its closed score (A,).

    The same as two dense 3-D poolings of K volumes, in a hundredth of their time: which voxels and classes is decided
    for all classes at once by bits, how much only where it is needed. Outside the grid nothing is, and nothing erodes.
    """
    device = where.device
    assert scores.shape[1] < 32, scores.shape  # classes are bits of an int32, the sign is for outside
    above = scores > threshold  # (V, K)
    inner, around = _shell(shape, device)

    bits = torch.zeros([n + 2 for n in shape], dtype=torch.int32, device=device)
    bits.view(-1)[inner(where)] = (above.int() << torch.arange(scores.shape[1], device=device)).sum(-1).int()
    closed = torch.full_like(bits, -1)
    closed[1:-1, 1:-1, 1:-1] = _three(bits, torch.bitwise_or)
    closed = _three(closed, torch.bitwise_and).view(-1)
    closed[where] = 0  # what is sure already stays as it is
    added = closed.nonzero()[:, 0]
    has, padded = closed[added], inner(added)

    best, label = scores.new_zeros(len(added)), added.new_zeros(len(added))
    widened = scores.new_full(bits.shape, torch.inf)
    flat = widened.view(-1)
    for k in range(scores.shape[1]):
        asked = (has >> k & 1).nonzero()[:, 0]
        if not len(asked):
            continue
        widened[1:-1, 1:-1, 1:-1] = 0
        from_, value = inner(where[above[:, k]]), scores[above[:, k], k]
        for offset in around.tolist():
            to = from_ + offset
            flat[to] = torch.maximum(flat[to], value)
        value = flat[padded[asked, None] + around].amin(-1)
        better = value > best[asked]
        best[asked] = torch.where(better, value, best[asked])
        label[asked] = torch.where(better, k, label[asked])
    return added, label, best


def _neighbours_mean(where: Tensor, values: Tensor, asked: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Mean of values (V, D) at flat voxels (V,) over the 3x3x3 neighbourhood of others (A,) -> (A, D)."""
    inner, around = _shell(shape, where.device)
    padded = values.new_zeros((shape[0] + 2) * (shape[1] + 2) * (shape[2] + 2), values.shape[1] + 1)
    padded[inner(where)] = torch.cat([values, torch.ones_like(values[:, :1])], dim=-1)
    total = padded[inner(asked)[:, None] + around].sum(1)
    return total[:, :-1] / total[:, -1:].clamp_min(1)


def _shell(shape: tuple[int, int, int], device: torch.device):
    """Flat indices of a grid -> those in it with a shell of one voxel around; steps (27,) to neighbours there."""
    _, y, z = shape
    across, along = (y + 2) * (z + 2), z + 2
    step = torch.arange(-1, 2, device=device)
    around = (step[:, None, None] * across + step[:, None] * along + step).flatten()
    return lambda flat: (flat // (y * z) + 1) * across + (flat // z % y + 1) * along + flat % z + 1, around


def _three(volume: Tensor, join) -> Tensor:
    """Join each inner voxel with its 26 neighbours, one axis after the other."""
    for axis in range(3):
        n = volume.shape[axis] - 2
        volume = join(join(volume.narrow(axis, 0, n), volume.narrow(axis, 1, n)), volume.narrow(axis, 2, n))
    return volume
