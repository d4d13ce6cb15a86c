"""SparseOcc and SparseOcc4D: voxels that are kept only where something is, and masks that say what.

SparseOcc: arXiv 2312.17118; github.com/MCG-NJU/SparseOcc, Apache-2.0 licence; nothing is copied. It exists in two
generations: v1.0 at 550b12a tells whether a voxel is filled by one logit and names what is kept; v1.1 at fe9a966 names
all, free among the names, and keeps what is least free. Presets that begin with v1.0 are the first, the others the
second; either takes the authors' weights through NAMES, and `adapted` tells by the names in a file which one it is.

SparseOcc4D: N. Li, technical report of the CVPR 2024 challenge on occupancy and flow. SparseOcc (v1.0: it speaks of
class-agnostic occupancy, and came before v1.1) with a flow predictor at each of three scales, and six losses. Its code
is not public and it states of its weights only that of the flow, 2.0. What it leaves open we decided:
- a predictor is two linear layers with a ReLU between (as in the challenge's baseline, OccNet), 2 C wide, on features
  of the kept voxels, beside the one that names them; it tells m/s as they are;
- its loss is over voxels of classes that move and whose velocity is known: a mean over those of the whole batch, so
  that a scale's cell is drawn to the mean velocity of the finest voxels in it;
- at inference the last scale's velocities are those of its voxels of classes that move, and all else has none;
- the other weights are those of SparseOcc: 1 and 1 of voxels, 2 times 2 of classes, 5 and 5 of masks.

A forward pass: voxels of eight times the edge, everywhere; three times (a `Scale`) they look into the pictures, are cut
in eight, and the likeliest are kept. Then queries, each with a mask over the voxels kept last and a class, look where
their masks are (a `Masks`), again and again through one layer.

Where we depart, always:
- Grids of any shape: cells that lie outside are never looked at by a loss, a mask or a prediction.
- A camera that is not used is never looked into.
- Where a mask is looked at is drawn from a table (`Masks.draws`), not anew each time: a frame seen twice says the same.
- What a turned world brings from outside the labels is free and unseen; of the authors' losses of v1.1 only Lovász and
  masks hear of it.
- No voxel of a class, no query without a voxel: means over nothing cost nothing; the authors' code stops.
- Losses of v1.0's names are cross-entropies over what is filled; where nothing is, nought.
Where `Config.as_published` is off (our own recipes), also:
- the sampling rules of `ops.sample`;
- v1.0: being filled or free is asked of all children, not of those alone that were kept: of the eight children of a
  voxel one that is seldom kept would seldom learn that it should have been;
- kept voxels stay in the order of the grid, not of their scores: nothing then hangs on which of two equals is first;
- masks are looked at in the middle of voxels, not at their corners, and where none has any voxel, all over the grid;
- what no camera sees counts HIDDEN in the losses of voxels and not at all in those of whole sets (Lovász, affinities);
  masks cover it as they cover all else;
- classes begin at 0.01, not at one half;
- every segment of a class that does not move is named, not only its first.

B batch, T time (newest first), Q queries, K voxels kept, G groups, S sampled points of a group, C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry import OCC3D_GRID, Grid
from ..nn import BACKBONES, FPN, losses
from ..nn.instants import Memory, View, see
from ..nn.losses import mean_over_processes
from ..nn.points import HIDDEN
from ..nn.queries import Attention, Mixing
from ..transfer import numbers, sent
from ..types import OCC3D, OPENOCC, TABLES, Classes, Clip, Occupancy, Prediction

SCALES = 3  # each halves the edge of a voxel
CHILDREN = torch.tensor(  # in this order, halves of a voxel along x, y, z
    [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
)
OVERLAP = 0.8  # a segment of which others take more than the rest is none (`overlap_threshold`)
# of the costs that match queries with segments: class (2 by the matcher, 2 by its focal loss), mask, dice
MATCHING = (4.0, 5.0, 5.0)
CLASS_WEIGHTS = {  # of v1.1's cross-entropy: 1 / ln(how many voxels of nuScenes) (`NUSC_CLASS_FREQ`)
    "others": 0.072686,
    "barrier": 0.069176,
    "bicycle": 0.083793,
    "bus": 0.068085,
    "car": 0.060074,
    "construction_vehicle": 0.074114,
    "motorcycle": 0.082307,
    "pedestrian": 0.068751,
    "traffic_cone": 0.077326,
    "trailer": 0.068099,
    "truck": 0.064130,
    "driveable_surface": 0.052672,
    "other_flat": 0.065495,
    "sidewalk": 0.056322,
    "terrain": 0.055763,
    "manmade": 0.054116,
    "vegetation": 0.053842,
    "free": 0.046814,
}


@dataclass(frozen=True)
class Config:
    height: int  # pixels of the pictures the network takes
    width: int  # pixels
    generation: Literal["v1.0", "v1.1"] = "v1.1"  # of the authors' code: what decides which voxels are kept
    iterations: int = 2  # how often queries pass through the one layer of masks
    kept: tuple[int, int, int] = (2000, 8000, 32000)  # voxels after each scale
    kept_in_training: tuple[int, int, int] = (4000, 16000, 64000)
    queries: int = 100  # each has a mask and a class
    samples: int = 4  # points looked up per group and time: of a query, and of a voxel, halved from scale to scale
    backbone: str = "resnet50"  # a word of `nn.BACKBONES`
    levels: int = 4  # of the pyramid: the backbone's coarsest maps, 4 reach down to stride 4
    channels: int = 256  # of the pyramid, of a voxel and of a query
    groups: int = 4  # channel groups that look at places of their own
    heads: int = 8  # of the attention among voxels and among queries
    mixed: int = 128  # points that a query's sampled ones are mixed into; of a voxel: `groups` times as many as sampled
    hidden: int = 512  # channels inside the feed-forward block of a query; a voxel's has twice its own
    frames: int = 8  # times of a window, `nn.instants.SPACING` apart
    dropout: float = 0.1  # in training, of what voxels say to each other and of feed-forward blocks
    threshold: float = 0.3  # a query whose best class scores less says nothing
    faint: float = 0.01  # a voxel of which masks together say less is free; if panoptic, segments decide instead
    panoptic: bool = False  # whether masks are of single things, and predictions tell which
    flow: int = 0  # scales that predict flow, counted from the finest; 0: none
    filled_weight: float = 1.0  # of being filled or free: v1.0's binary cross-entropy, v1.1's geometric affinity
    names_weight: float = 1.0  # of what kept voxels are called: cross-entropy; v1.1: also Lovász, semantic affinity
    flow_weight: float = 2.0  # of the squared error of velocities
    class_weight: float = 4.0  # of the focal loss of the queries' classes
    mask_weight: float = 5.0  # of the cross-entropy of their masks
    dice_weight: float = 5.0  # of the dice loss of their masks
    as_published: bool = True  # the authors' rules, oddities included; their weights need them
    grid: Grid = field(default=OCC3D_GRID)  # where occupancy is told
    classes: str = OCC3D.table  # which table of classes
    sweeps: ClassVar[int] = 0  # LiDAR scans: cameras alone

    def __post_init__(self):
        if self.classes not in TABLES or self.generation not in ("v1.0", "v1.1"):
            raise ValueError(
                f"sparseocc: classes must be one of {sorted(TABLES)} and generation v1.0 or v1.1, got "
                f"{self.classes!r} and {self.generation!r}"
            )
        if self.backbone not in BACKBONES or not 1 <= self.levels <= 4:
            raise ValueError(
                f"sparseocc: expected 1 to 4 levels of one of {sorted(BACKBONES)}, got {self.levels} of "
                f"{self.backbone!r}"
            )
        if self.channels % self.groups or self.channels % self.heads:
            raise ValueError(
                f"sparseocc: {self.groups} groups or {self.heads} heads do not divide {self.channels} channels"
            )
        if any(len(kept) != SCALES for kept in (self.kept, self.kept_in_training)) or not 0 <= self.flow <= SCALES:
            raise ValueError(
                f"sparseocc: kept needs {SCALES} numbers and flow at most {SCALES}, got {self.kept}, {self.flow}"
            )
        if self.samples < 1 or self.samples % 2 ** (SCALES - 1):
            raise ValueError(f"sparseocc: samples are halved twice and must divide by 4, got {self.samples}")
        if min(*self.kept, *self.kept_in_training, self.queries, self.iterations, self.frames) < 1:
            raise ValueError("sparseocc: kept, queries, iterations and frames must be positive")

    @property
    def table(self) -> Classes:
        return TABLES[self.classes]


PRESETS = {
    "8f": Config(256, 704),
    "16f": Config(256, 704, frames=16),
    "512": Config(512, 1408),
    "8f-pano": Config(256, 704, panoptic=True),
    "v1.0-8f": Config(256, 704, generation="v1.0", iterations=4, kept_in_training=(2000, 8000, 32000)),
}
PRESETS["v1.0-8f-pano"] = replace(PRESETS["v1.0-8f"], panoptic=True)
# ours: the smallest, which needs no pretrained encoder
PRESETS["nano"] = Config(
    128,
    352,
    kept_in_training=(2000, 8000, 32000),
    queries=60,
    backbone="resnet18-half",
    channels=96,
    heads=4,
    mixed=32,
    hidden=192,
    dropout=0.0,
    faint=0.2,  # so few steps do not make masks sure of what they do not cover
    as_published=False,
)
_4D = replace(PRESETS["v1.0-8f"], flow=SCALES, as_published=False, classes=OPENOCC.table)
PRESETS_4D = {
    "8f": _4D,
    "16f": replace(_4D, frames=16),
    "512": replace(_4D, height=512, width=1408),
    "nano": replace(PRESETS["nano"], generation="v1.0", iterations=4, flow=SCALES, classes=OPENOCC.table),
}

# The authors' parameter names -> ours (`systems.base.translate` says how to read it); None = known, dropped
_VOXELS, _MASKS = "pts_bbox_head.transformer.voxel_decoder.", "pts_bbox_head.transformer.decoder."
_SCALE, _LAYER = _VOXELS + "decoder_layers.#.", _MASKS + "decoder_layer."
NAMES = {
    "img_backbone.": "backbone.",
    "img_neck.lateral_convs.#.conv.": "neck.lateral.#.",
    "img_neck.fpn_convs.#.conv.": "neck.output.#.",
    _SCALE + "position_encoder.": "scales.#.position.",
    _SCALE + "self_attn.attention.attn.in_proj_weight": "scales.#.attention.taken.weight",
    _SCALE + "self_attn.attention.attn.in_proj_bias": "scales.#.attention.taken.bias",
    _SCALE + "self_attn.attention.attn.out_proj.": "scales.#.attention.out.",
    _SCALE + "self_attn.gen_tau.": "scales.#.attention.reach.",
    _SCALE + "sampling.sampling_offset.": "scales.#.sampling.offset.",
    _SCALE + "sampling.scale_weights.": "scales.#.sampling.levels.",
    _SCALE + "mixing.parameter_generator.": "scales.#.mixing.matrices.",
    _SCALE + "mixing.out_proj.": "scales.#.mixing.out.",
    _SCALE + "ffn.layers.0.0.": "scales.#.feed.0.",
    _SCALE + "ffn.layers.1.": "scales.#.feed.3.",
    _SCALE + "norm#.": "scales.#.norm#.",
    _VOXELS + "lift_feat_heads.#.0.": "scales.#.lift.",
    _VOXELS + "occ_pred_heads.#.": "scales.#.filled.",
    _VOXELS + "seg_pred_heads.#.": "scales.#.name.",
    _MASKS + "query_feat.": "masks.begin.",
    _MASKS + "query_pos.": "masks.position.",
    _LAYER + "self_attn.self_attn.": "masks.attention.",
    _LAYER + "sampling.offset.": "masks.sampling.offset.",
    _LAYER + "sampling.scale_weights.": "masks.sampling.levels.",
    _LAYER + "mixing.parameter_generator.": "masks.mixing.matrices.",
    _LAYER + "mixing.out_proj.": "masks.mixing.out.",
    _LAYER + "ffn.layers.0.0.": "masks.feed.0.",
    _LAYER + "ffn.layers.1.": "masks.feed.3.",
    _LAYER + "norm#.": "masks.norm#.",
    _LAYER + "mask_proj.": "masks.mask.",
    _LAYER + "classifier.": "masks.name.",
}


@dataclass(frozen=True)
class Kept:
    """The voxels that one scale keeps, and what it says of them."""

    edge: int  # of such a voxel, in the grid's own
    where: Tensor  # (B, K, 3) int64, in voxels of that edge
    inside: Tensor  # (B, K) bool: not beyond the grid, which need not divide by eight
    filled: Tensor | None  # (B, K) logits; v1.0
    names: Tensor  # (B, K, classes) logits of what is filled; v1.1: the last one is free
    flow: Tensor | None  # (B, K, 2) m/s over ground, car frame now
    # v1.0, ours: all children that there were to keep, where (B, N, 3), inside (B, N), filled (B, N)
    asked: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Output:
    kept: tuple[Kept, ...]  # coarsest first; the last has the grid's own voxels
    masks: tuple[Tensor, ...]  # (B, Q, K) logits over the voxels kept last: before any layer, and after each
    names: tuple[Tensor, ...]  # (B, Q, classes) logits

    def told(self) -> list[tuple[Tensor | None, Tensor]]:
        """Everything said, to be compared: values, and places (M, D) that rows (M, C) belong to; None: their order."""
        rows = []
        for kept in self.kept:
            lane = torch.arange(len(kept.where), device=kept.where.device)[:, None, None].expand_as(kept.where[..., :1])
            place = torch.cat([lane, kept.where], dim=-1).flatten(0, 1)
            said = [kept.names, *(() if kept.filled is None else (kept.filled[..., None],))]
            said += () if kept.flow is None else (kept.flow,)
            rows += [(place, part.flatten(0, 1)) for part in said]
        masks = [(place, mask.mT.flatten(0, 1)) for mask in self.masks]  # over the voxels kept last
        return [*rows, *masks, *((None, names) for names in self.names)]


class SparseOcc(nn.Module):
    """Clips -> voxels, and masks with classes over them -> occupancy. See `systems.base.System` for the contract."""

    PRESETS, NAMES = PRESETS, NAMES

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.backbone = BACKBONES[config.backbone]()
        self.neck = FPN(self.backbone.channels[-config.levels :], config.channels)
        self.scales = nn.ModuleList(Scale(config, i) for i in range(SCALES))
        self.masks = Masks(config)
        for name, values in zip(("mean", "std"), self.backbone.normal, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self, prior: float | None = None) -> None:
        """Random weights as the authors draw them. prior: what every class of a query scores before anything is
        learned; None: one half as published, else 0.01."""
        self.backbone.initialise()
        self.neck.initialise()
        for scale in self.scales:
            scale.initialise()
        self.masks.initialise(prior)

    def forward(self, clip: Clip, memory: Memory | None) -> tuple[Output, Memory]:
        """A clip that brings `config.frames` times is the window; a shorter one is completed from memory."""
        view, _, memory = see(self, clip, memory)
        return self.answer(view), memory

    def answer(self, view: View) -> Output:
        """Voxels and masks alone, whatever the pictures were encoded by."""
        config, device = self.config, view.pixels_from_now.device
        numbers = config.kept_in_training if self.training else config.kept
        edge = 2**SCALES
        axes = [torch.arange(0, n, edge, device=device) for n in config.grid.shape]
        corner = torch.cartesian_prod(*axes).expand(len(view.rows), -1, -1)  # (B, K, 3), in the grid's voxels
        feature = self.masks.begin.weight.new_zeros(*corner.shape[:2], config.channels)
        kept = []
        for scale, number in zip(self.scales, numbers, strict=True):
            one, corner, told = scale(feature, corner, number, view)
            kept.append(one)
            feature, corner = told.detach(), corner.detach()
        masks, names = self.masks(told, kept[-1], view)
        return Output(tuple(kept), masks, names)

    def loss(self, output: Output, truth: Occupancy) -> dict[str, Tensor]:
        """Scalars to be added up: of each scale what its voxels are, of each prediction what masks cover and are
        called, and (with `Config.flow`) of scales how fast voxels are. truth: a lane of labels a lane of the output.

        Source: the authors' `sparseocc_head.loss_single`. ValueError where the truth is told in another grid or in
        other classes, or lacks the instances that a panoptic network learns.
        """
        config = self.config
        if (truth.grid, truth.classes) != (config.grid, config.table):
            raise ValueError(
                f"sparseocc: the truth is told in {truth.classes.table} on {truth.grid}, the network speaks "
                f"{config.classes} on {config.grid}"
            )
        if config.panoptic and truth.instances is None:
            raise ValueError("sparseocc: a panoptic network learns instances, the truth has none")
        terms = {}
        for i, kept in enumerate(output.kept):
            fine = Fine.of(kept.where, kept.inside, kept.edge, truth, config.as_published)
            if kept.filled is not None:
                filled, asked = kept.filled, fine
                if kept.asked is not None:
                    where, inside, filled = kept.asked
                    asked = Fine.of(where, inside, kept.edge, truth, config.as_published)
                terms[f"filled {i}"] = config.filled_weight * filled_loss(filled, asked, config.table)
            terms |= {f"{name} {i}": term for name, term in names_losses(kept, fine, config).items()}
            if kept.flow is not None:
                terms[f"flow {i}"] = config.flow_weight * flow_loss(kept.flow, fine, config.table)
        segments = [segments_of(output.kept[-1], truth, lane, config.panoptic) for lane in range(len(truth.labels))]
        count = mean_over_processes(output.masks[0].new_tensor(float(sum(len(label) for _, label in segments))))
        for j, (masks, names) in enumerate(zip(output.masks, output.names, strict=True)):
            costs = mask_losses(masks, names, segments, output.kept[-1].inside, config)
            terms |= {f"{name} {j}": term / count for name, term in costs.items()}
        return terms

    @torch.no_grad()
    def decode(self, output: Output) -> list[Prediction]:
        """One prediction a lane, from the last masks (`sparseocc_head.merge_occ_pred`)."""
        last = output.kept[-1]
        flows = [None] * len(last.where) if last.flow is None else last.flow
        lanes = zip(last.where, last.inside, output.masks[-1], output.names[-1], flows, strict=True)
        return [decoded(*lane, self.config) for lane in lanes]

    @torch.no_grad()
    def grown(self, config: Config) -> "SparseOcc":
        """A system whose config differs in more frames (and perhaps the size of pictures), which goes on from here.

        Four blocks change their shapes, each `mixing` with its `matrices` and `out`: they mix the frames that were
        there as before, and the new, older ones not yet. The rows that a voxel's mixing gains begin as those that were
        there, and are not heard yet. So a window of twice the frames, each there twice, says what the window said (but
        for the published order of level weights, which depends on the number of frames). ValueError for fewer frames,
        or anything else that differs.
        """
        mine = self.config
        if replace(config, height=mine.height, width=mine.width, frames=mine.frames) != mine:
            raise ValueError("sparseocc: only pictures and frames may differ where a network grows")
        if config.frames < mine.frames:
            raise ValueError(f"sparseocc: a network of {mine.frames} frames does not shrink to {config.frames}")
        more, tensors = type(self)(config), self.state_dict()
        for name, block in more.named_modules():
            if isinstance(block, Mixing):
                tensors |= _grown_mixing(name, self.get_submodule(name), block)
        more.load_state_dict(tensors)
        return more.to(self.mean.device).train(self.training)

    def constants(self) -> dict[str, Tensor]:
        """None: the authors' checkpoints hold no buffers that say what they are for."""
        return {}

    @staticmethod
    def adapted(config: Config, theirs: Mapping[str, Tensor]) -> Config:
        """The config for an authors' checkpoint of either generation, told by the names in it."""
        first = any(name.startswith(_VOXELS + "occ_pred_heads.") for name in theirs)
        like = PRESETS["v1.0-8f" if first else "8f"]
        told = {name: getattr(like, name) for name in ("generation", "iterations", "kept_in_training")}
        return config if config.generation == like.generation else replace(config, **told)


class SparseOcc4D(SparseOcc):
    """SparseOcc that also tells how fast voxels are."""

    PRESETS = PRESETS_4D


# ---- voxels ---------------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """Voxels look at the pictures, are cut in eight, and the likeliest of their children are kept."""

    def __init__(self, config: Config, number: int):
        super().__init__()
        c, self.config, self.number = config.channels, config, number
        samples, classes = config.samples // 2**number, len(config.table.names)
        looked = samples * config.frames
        self.position = nn.Sequential(
            nn.Linear(3, c), nn.LayerNorm(c), nn.ReLU(), nn.Linear(c, c), nn.LayerNorm(c), nn.ReLU()
        )
        if number < SCALES - 1:  # too many to talk to each other on the last
            self.attention, self.norm1 = Attention(c, config.heads, config.dropout), nn.LayerNorm(c)
        else:
            self.attention = None
        self.sampling = Sampling(config, samples)
        self.mixing = Mixing(c, config.groups, looked, looked * config.groups)
        self.feed = feed(c, 2 * c, config.dropout)
        self.norm2, self.norm3 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.lift = nn.Linear(c, 8 * c)
        first = config.generation == "v1.0"
        self.filled = nn.Linear(c, 1) if first else None
        self.name = nn.Linear(c, classes if first else classes + 1)
        says_flow = SCALES - number <= config.flow
        self.flow = nn.Sequential(nn.Linear(c, 2 * c), nn.ReLU(), nn.Linear(2 * c, 2)) if says_flow else None

    @torch.no_grad()
    def initialise(self) -> None:
        if self.attention is not None:
            self.attention.initialise()
        nn.init.zeros_(self.sampling.offset.weight)
        nn.init.uniform_(self.sampling.offset.bias, -0.5, 0.5)
        self.mixing.initialise()

    def forward(self, feature: Tensor, corner: Tensor, number: int, view: View) -> tuple[Kept, Tensor, Tensor]:
        """Voxels (B, Q, C) at (B, Q, 3), their lowest corners in the grid's voxels -> what is kept of their children,
        at most `number`, those children's corners (B, K, 3) and features (B, K, C)."""
        grid, edge = self.config.grid, 2 ** (SCALES - self.number)
        voxel, low = numbers(grid.voxel, feature), numbers(grid.low, feature)
        place = corner.to(feature) * voxel + low  # m; it is the corner that a voxel tells as its place
        feature = feature + self.position(grid.unit(place))
        if self.attention is not None:
            flat = place * numbers([1.0, 1.0, 0.0], place)  # how far apart they are, seen from above
            feature = self.norm1(self.attention(feature, flat))
        size = edge * voxel
        sampled = self.sampling(feature, (place + size / 2)[:, :, None], size, view)
        feature = self.norm2(self.mixing(sampled, feature))
        feature = self.norm3(feature + self.feed(feature))

        # ---- children, and which of them are kept
        feature = F.relu(self.lift(feature)).unflatten(-1, (8, -1)).flatten(1, 2)  # (B, 8 Q, C)
        corner = (corner[:, :, None] + sent(CHILDREN.to(corner.dtype), corner.device) * (edge // 2)).flatten(1, 2)
        inside = (corner < numbers(grid.shape, corner)).all(-1)
        with torch.autocast(feature.device.type, enabled=False):  # in half precision many scores would be equal
            feature = feature.float() if feature.dtype != torch.float64 else feature
            if self.filled is not None:
                filled = self.filled(feature)[..., 0]
                score = filled
            else:
                names = self.name(feature)
                score = 1 - names.softmax(-1)[..., -1]
            score = score.detach().masked_fill(~inside, -torch.inf)
            best = score.topk(min(number, score.shape[1]), dim=1).indices
            if not self.config.as_published:
                best = best.sort(dim=1).values
            asked = None
            if self.filled is not None and not self.config.as_published:
                asked = corner // (edge // 2), inside, filled
            feature, corner = _taken(feature, best), _taken(corner, best)
            if self.filled is not None:
                filled, names = filled.gather(1, best), self.name(feature)
            else:
                filled, names = None, _taken(names, best)
            flow = None if self.flow is None else self.flow(feature)
        return (
            Kept(edge // 2, corner // (edge // 2), inside.gather(1, best), filled, names, flow, asked),
            corner,
            feature,
        )


class Sampling(nn.Module):
    """Where to look around places, and in which levels of the pyramid."""

    def __init__(self, config: Config, samples: int):
        super().__init__()
        self.config, self.samples = config, samples
        self.offset = nn.Linear(config.channels, config.groups * samples * 3)
        self.levels = nn.Linear(config.channels, config.groups * samples * config.levels)

    def forward(self, query: Tensor, places: Tensor, step: Tensor, view: View) -> Tensor:
        """Queries (B, Q, C), places (B, Q, G S or 1, 3) m -> what lies there, (B, Q, G, T S, C / G); offsets are told
        in steps of (3,) m."""
        c = self.config
        shape = (*query.shape[:2], c.groups, self.samples)
        points = places + step * self.offset(query).unflatten(-1, (-1, 3))
        weights = self.levels(query).view(*shape, c.levels).softmax(dim=-1)
        return view.sample(points.view(*shape, 3), weights, c.as_published)


def feed(channels: int, hidden: int, dropout: float) -> nn.Sequential:
    """What stands in a feed-forward block beside its residual."""
    return nn.Sequential(
        *(nn.Linear(channels, hidden), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Linear(hidden, channels), nn.Dropout(dropout)),
    )


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Rows (B, N, D) at (B, K) -> (B, K, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _grown_mixing(name: str, old: Mixing, new: Mixing) -> dict[str, Tensor]:
    """The parameters of `new`, which mixes more points, time after time, than `old`: by their names below `name`."""
    square, again = old.inner**2, torch.arange(new.given) % old.given
    rows = []
    for parameter in (old.matrices.weight, old.matrices.bias):
        by_channel, by_point = parameter.view(old.groups, -1, *parameter.shape[1:]).split(
            [square, old.given * old.taken], dim=1
        )
        by_point = by_point.unflatten(1, (old.given, old.taken))[:, again]
        unheard = by_point.new_zeros(*by_point.shape[:2], new.taken - old.taken, *by_point.shape[3:])
        by_point = torch.cat([by_point, unheard], dim=2).flatten(1, 2)
        rows.append(torch.cat([by_channel, by_point], dim=1).flatten(0, 1))
    out = old.out.weight.view(-1, old.groups, old.given, old.inner)
    unheard = out.new_zeros(len(out), old.groups, new.given - old.given, old.inner)
    out = torch.cat([out, unheard], dim=2).flatten(1)
    return {
        f"{name}.matrices.weight": rows[0],
        f"{name}.matrices.bias": rows[1],
        f"{name}.out.weight": out,
        f"{name}.out.bias": old.out.bias,
    }


# ---- masks ----------------------------------------------------------------------------------------------------------


class Masks(nn.Module):
    """Queries that look where their masks are, and tell each a mask and a class; one layer, passed again and again."""

    def __init__(self, config: Config):
        super().__init__()
        c, self.config = config.channels, config
        self.begin, self.position = nn.Embedding(config.queries, c), nn.Embedding(config.queries, c)
        self.attention = nn.MultiheadAttention(c, config.heads, batch_first=True)
        self.sampling = Sampling(config, config.samples)
        self.mixing = Mixing(c, config.groups, config.samples * config.frames, config.mixed)
        self.feed = feed(c, config.hidden, config.dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(c), nn.LayerNorm(c), nn.LayerNorm(c)
        self.mask = nn.Linear(c, c)
        self.name = nn.Linear(c, len(config.table.names))
        draws, anywhere = tables(config.iterations, config.queries, config.groups * config.samples)
        self.register_buffer("draws", draws, persistent=False)  # (iterations, Q, G S) in [0, 1)
        self.register_buffer("anywhere", anywhere, persistent=False)  # (iterations, Q, G S, 3) in [0, 1)

    @torch.no_grad()
    def initialise(self, prior: float | None) -> None:
        for embedding in (self.begin, self.position):
            nn.init.normal_(embedding.weight)
        nn.init.xavier_uniform_(self.attention.in_proj_weight)
        nn.init.xavier_uniform_(self.attention.out_proj.weight)
        nn.init.zeros_(self.sampling.offset.weight)
        nn.init.zeros_(self.sampling.offset.bias)
        self.mixing.initialise()
        if prior is None and not self.config.as_published:
            prior = 0.01
        if prior is not None:
            nn.init.constant_(self.name.bias, torch.tensor(prior).logit())

    def forward(self, told: Tensor, kept: Kept, view: View) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Features (B, K, C) of the voxels kept last -> masks (B, Q, K) and classes (B, Q, classes), logits: what
        queries say before the layer, and each time after it."""
        query = self.begin.weight.expand(len(told), -1, -1)
        position = self.position.weight
        voxel = numbers(self.config.grid.voxel, self.draws)
        masks, names = [self.mask(query) @ told.mT], [self.name(query)]
        for i in range(self.config.iterations):
            asking = query + position
            heard, _ = self.attention(asking, asking, query, need_weights=False)
            query = self.norm1(query + heard)
            sampled = self.sampling(query, self._places(masks[-1], kept, i), voxel, view)
            query = self.norm2(self.mixing(sampled, query))
            query = self.norm3(query + self.feed(query))
            masks.append(self.mask(query) @ told.mT)
            names.append(self.name(query))
        return tuple(masks), tuple(names)

    def _places(self, mask: Tensor, kept: Kept, iteration: int) -> Tensor:
        """Places (B, Q, G S, 3) m that each query's mask (B, Q, K) covers, as the tables draw them; any place of the
        grid for one that covers nothing."""
        config, grid = self.config, self.config.grid
        covered = ((mask > 0) & kept.inside[:, None]).cumsum(-1, dtype=torch.int32)  # (B, Q, K)
        count = covered[..., -1:]
        rank = (self.draws[iteration] * count).floor().int()  # (B, Q, G S)
        index = torch.searchsorted(covered, rank + 1).clamp_max(mask.shape[-1] - 1)
        # in the precision of the tables: half a number is no place in the grid
        drawn = _taken(kept.where, index.flatten(1)).unflatten(1, index.shape[1:]).to(self.draws)
        anywhere = self.anywhere[iteration] * numbers(grid.shape, self.draws)
        if config.as_published:  # a lane of which no query covers anything draws its places in the first voxel
            none = (count == 0).all(1, keepdim=True)[..., None]
            anywhere = torch.where(none, self.anywhere[iteration].expand(len(mask), -1, -1, -1), anywhere)
        else:
            drawn = drawn + 0.5
        voxels = torch.where(count[..., None] > 0, drawn, anywhere)
        return voxels * numbers(grid.voxel, voxels) + numbers(grid.low, voxels)


def tables(iterations: int, queries: int, samples: int) -> tuple[Tensor, Tensor]:
    """Numbers in [0, 1) that are spread evenly, (iterations, Q, S) and (iterations, Q, S, 3): the same on any machine.

    The first: S equal steps of a mask's voxels, in each query and iteration begun elsewhere (multiples of the golden
    ratio). The second: the sequence R3 (M. Roberts, 2018), which fills a box evenly however far one goes.
    """
    golden = (5**0.5 - 1) / 2
    begin = (torch.arange(iterations * queries, dtype=torch.float64) * golden % 1.0).view(iterations, queries, 1)
    draws = (torch.arange(samples, dtype=torch.float64) + begin) / samples
    root = 1.2207440846057596  # of x**4 = x + 1
    steps = torch.tensor([root**-1, root**-2, root**-3], dtype=torch.float64)
    number = torch.arange(iterations * queries * samples, dtype=torch.float64)
    anywhere = ((0.5 + number[:, None] * steps) % 1.0).view(iterations, queries, samples, 3)
    below = 1 - 2**-24  # float32 rounds up
    return draws.float().clamp_max(below), anywhere.float().clamp_max(below)


# ---- losses ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fine:
    """The grid's own voxels inside voxels of some scale, of one lane, V of them."""

    owner: Tensor  # (V,) int64: inside which
    label: Tensor  # (V,) int64
    flow: Tensor | None  # (V, 2)
    weight: Tensor  # (V,) what it counts

    @staticmethod
    def of(where: Tensor, inside: Tensor, edge: int, truth: Occupancy, published: bool) -> "list[Fine]":
        """One a lane. where (B, K, 3), in voxels of that edge; inside (B, K): which of them count."""
        steps = torch.cartesian_prod(*[torch.arange(edge, device=where.device)] * 3)
        many = []
        for lane, (mine, counts) in enumerate(zip(where, inside, strict=True)):
            places = mine[:, None] * edge + steps.view(-1, 3)  # (K, edge^3, 3)
            there = (places < places.new_tensor(truth.grid.shape)).all(-1) & counts[:, None]
            at = places[there].unbind(-1)
            seen = truth.seen[lane][at]
            weight = torch.ones_like(seen, dtype=torch.float32) if published else torch.where(seen, 1.0, HIDDEN)
            flow = None if truth.flow is None else truth.flow[lane][at]
            many.append(Fine(there.nonzero()[:, 0], truth.labels[lane][at].long(), flow, weight))
        return many


def filled_loss(filled: Tensor, fine: Sequence[Fine], classes: Classes) -> Tensor:
    """Logits (B, K) against the finest labels in each voxel, every class that is there weighing the same; the mean over
    the lanes. Labels beyond the table are nobody's."""
    total = filled.sum() * 0.0
    for told, voxels in zip(filled, fine, strict=True):
        known = voxels.label <= classes.free
        label = voxels.label[known]
        costs = losses.balanced(told[voxels.owner[known]], label != classes.free, label)
        total = total + _mean(costs, voxels.weight[known].to(costs))
    return total / len(filled)


def names_losses(kept: Kept, fine: Sequence[Fine], config: Config) -> dict[str, Tensor]:
    """What the voxels of one scale are called, against the finest labels in each of them; means over the lanes.

    "names"; v1.1, where free is a name, also "filled", "lovász" and "names' affinity". Labels beyond the table are
    nobody's.
    """
    free = config.table.free
    sums: dict[str, Tensor | float] = {}
    for names, voxels in zip(kept.names, fine, strict=True):
        known = voxels.label <= free
        if kept.filled is not None:
            known &= voxels.label < free
        of, label, weight = voxels.owner[known], voxels.label[known], voxels.weight[known].to(names)
        named = F.cross_entropy(names[of], label, reduction="none")
        if kept.filled is not None:
            terms = {"names": config.names_weight * _mean(named, weight)}
        else:
            price = names.new_tensor([CLASS_WEIGHTS[name] for name in (*config.table.names, "free")])
            probabilities, seen = names.softmax(-1), voxels.weight == 1
            told = probabilities[voxels.owner[seen & known]], voxels.label[seen & known]
            # Lovász also hears of labels that are nobody's
            wide = probabilities[voxels.owner[seen]], voxels.label[seen]
            terms = {
                "names": config.names_weight * _mean(named, weight * price[label]),
                "lovász": config.names_weight * losses.lovasz_softmax(*wide),
                "filled": config.filled_weight * losses.geometric_affinity(*told),
                "names' affinity": config.names_weight * losses.semantic_affinity(*told),
            }
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term / len(kept.names)
    return sums


def _mean(costs: Tensor, weights: Tensor) -> Tensor:
    return (costs * weights).sum() / weights.sum().clamp_min(1e-9)


def flow_loss(flow: Tensor, fine: Sequence[Fine], classes: Classes) -> Tensor:
    """Velocities (B, K, 2): mean squared error, m^2/s^2, over the finest voxels of classes that move and whose velocity
    is known, and over both of its parts; of the whole batch, on all processes."""
    apart, count = flow.sum() * 0.0, 0.0  # of the same graph: every process of a training has the same terms
    moving = torch.tensor(classes.moving_ids, device=flow.device)
    for told, voxels in zip(flow, fine, strict=True):
        if voxels.flow is not None:
            known = torch.isin(voxels.label, moving) & voxels.flow.isfinite().all(-1)
            apart = apart + ((told[voxels.owner[known]] - voxels.flow[known]) ** 2).sum()
            count = count + 2.0 * known.sum()
    return apart / mean_over_processes(torch.as_tensor(count, device=apart.device).to(apart))


def segments_of(kept: Kept, truth: Occupancy, lane: int, panoptic: bool) -> tuple[Tensor, Tensor]:
    """What masks shall cover: (M, K) of 0 and 1 over the voxels kept last, and the classes (M,) int64.

    One segment a class that is there; where panoptic, one a thing of those classes that move (what no instance is known
    of is one more). Segments without a voxel that was kept are none.
    """
    inside, classes = kept.inside[lane], truth.classes
    where = torch.where(inside[:, None], kept.where[lane], 0).unbind(-1)
    label = truth.labels[lane][where].long()
    some = inside & (label < classes.free)
    key = label << 32
    if panoptic:
        thing = torch.isin(label, label.new_tensor(classes.moving_ids))
        key = key + torch.where(thing, truth.instances[lane][where].long(), 0)
    keys = key[some].unique()
    return ((key == keys[:, None]) & some).to(kept.names.dtype), keys >> 32


def mask_losses(
    masks: Tensor, names: Tensor, segments: list[tuple[Tensor, Tensor]], inside: Tensor, config: Config
) -> dict[str, Tensor]:
    """The terms "classes", "masks" and "dice" of one prediction of all lanes: sums, to be divided by their segments.

    masks (B, Q, K) and names (B, Q, classes) logits; inside (B, K). Every segment is held against the query that tells
    it best, and what all other queries are called is nothing.
    """
    classes, covering, overlap = names.sum() * 0.0, masks.sum() * 0.0, masks.sum() * 0.0
    for mask, name, (true, label), there in zip(masks, names, segments, inside, strict=True):
        mask, true = mask[:, there], true[:, there]
        query, segment = losses.matched(mask, name, true, label, MATCHING)
        target = torch.full_like(name[:, 0], name.shape[1], dtype=torch.int64)
        target[query] = label[segment]
        classes = classes + losses.focal(name, target).sum()
        told, true = mask[query], true[segment]
        cost = F.binary_cross_entropy_with_logits(told, true, reduction="none")
        covering = covering + cost.sum() / max(mask.shape[1], 1)
        overlap = overlap + losses.dice(told, true).sum()
    return {
        "classes": config.class_weight * classes,
        "masks": config.mask_weight * covering,
        "dice": config.dice_weight * overlap,
    }


# ---- what is made of it ---------------------------------------------------------------------------------------------


def decoded(
    where: Tensor, inside: Tensor, masks: Tensor, names: Tensor, flow: Tensor | None, config: Config
) -> Prediction:
    """Occupancy of one lane: voxels (K, 3) with masks (Q, K), classes (Q, classes) and velocities (K, 2) or None.

    A voxel is what the masks over it say together, each with its query's classes (arXiv 2107.06278, section 3.4).
    """
    grid, classes = config.grid, config.table
    said, covered = names.sigmoid(), masks.sigmoid()
    sure = said.amax(-1) > config.threshold
    score, label = torch.einsum("qc,qk->ck", said * sure[:, None], covered).max(0)
    label = torch.where(score < config.faint, classes.free, label)
    instance = None
    if config.panoptic:
        label, instance = segments_told(said[sure], covered[sure], classes, config.as_published)
    at = where[inside].unbind(-1)
    label, score = label[inside], score.clamp_max(1.0)[inside]
    labels = torch.full(grid.shape, classes.free, dtype=torch.uint8, device=where.device)
    labels[at] = label.to(torch.uint8)
    scores = score.new_zeros(grid.shape, dtype=torch.float32)
    scores[at] = torch.where(label == classes.free, 0.0, score).float()
    flows = instances = None
    if flow is not None:
        flows = scores.new_zeros(*grid.shape, 2)
        moves = torch.isin(label, label.new_tensor(classes.moving_ids))
        flows[at] = torch.where(moves[:, None], flow[inside], 0.0).float()
    if instance is not None:
        instances = torch.zeros(grid.shape, dtype=torch.int32, device=where.device)
        instances[at] = instance[inside].int()
    return Prediction(grid, classes, labels, scores, flows, instances=instances)


def segments_told(said: Tensor, covered: Tensor, classes: Classes, published: bool) -> tuple[Tensor, Tensor]:
    """Classes and numbers of segments (K,) of the voxels that queries cover: scores (Q, classes), shares (Q, K).

    A voxel belongs to the query that is surest of it; a query that loses more than a fifth of what it covers to others
    has no segment. Things are numbered each by itself, all else by its class. Number 0: nothing, which is free.
    Source: `sparseocc_head.merge_panoseg_single`, after Mask2Former.
    """
    k = covered.shape[1]
    label = torch.full((k,), classes.free, dtype=torch.int64, device=covered.device)
    number = torch.zeros_like(label)
    if len(said):
        score, name = said.max(-1)
        owner = (score[:, None] * covered).argmax(0)
        wins = owner == torch.arange(len(said), device=owner.device)[:, None]  # (Q, K)
        whole = covered >= 0.5
        won, size, both = wins.sum(-1), whole.sum(-1), (wins & whole).sum(-1)
        # a share of 0.8 in doubles, as it is there
        kept = (both > 0) & (won.double() / size.clamp_min(1) >= OVERLAP)
        stuff, next_number = {}, 1
        for q in kept.nonzero()[:, 0].tolist():
            c, mine = int(name[q]), wins[q] & whole[q]
            first = c in classes.moving_ids or c not in stuff
            if first:
                stuff[c] = next_number
                next_number += 1
            number[mine] = stuff[c]
            if first or not published:
                label[mine] = c
    return label, number
