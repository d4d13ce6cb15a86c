"""A very small SparseOcc, its authors' names, and the numbers of the parity fixtures of both generations.

What is seen is what `small_v2` sees. Numbers come from NumPy's RandomState, whose streams never change.
"""

from dataclasses import replace

import numpy as np
import torch
from systems import small, small_v2
from systems.small_v2 import LANES

from occflow_core.geometry import Grid
from occflow_core.nn import BACKBONES
from occflow_core.systems import sparseocc
from occflow_core.systems.base import load_strictly
from occflow_core.types import Occupancy

CONFIG = replace(
    sparseocc.PRESETS_4D["nano"],
    height=64,
    width=96,
    kept=(40, 160, 600),
    kept_in_training=(50, 200, 700),
    queries=12,
    channels=32,
    mixed=8,
    hidden=64,
    frames=2,
    grid=Grid((-12.0, -10.0, -1.0), (1.0, 1.0, 0.8), (24, 20, 8)),  # 20 does not divide by 8
)
V11 = replace(
    sparseocc.PRESETS["8f"],
    height=small_v2.PARITY.height,
    width=small_v2.PARITY.width,
    kept=(40, 120, 300),
    kept_in_training=(48, 160, 400),
    queries=24,
    backbone="resnet18-half",
    channels=small_v2.PARITY.channels,
    frames=small_v2.PARITY.frames,
    dropout=0.0,
    grid=Grid((-4.8, -3.2, -1.0), (0.4, 0.4, 0.4), (24, 16, 16)),  # their voxels are cubes of 0.4 m
)
V10 = replace(V11, generation="v1.0", iterations=4, kept_in_training=V11.kept)
PARITY = {"v1.0": V10, "v1.1": V11}

_LAYER = "pts_bbox_head.transformer.decoder.decoder_layer."
MASK_BIAS = _LAYER + "mask_proj.bias"
# added to the numbers of a checkpoint: some queries cover nothing, and some say nothing
SHIFTS = {MASK_BIAS: -0.3, _LAYER + "classifier.bias": -2.0}
# instead: at first no query of one of the lanes covers anything, and none of either lane
BARREN = {"v1.0": (-0.5, -0.6), "v1.1": (-0.585, -0.6)}


def authors_tensors(config: sparseocc.Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' checkpoint: `models/` at 550b12a (v1.0) and fe9a966 (v1.1)."""
    c, k, first = config.channels, len(config.table.names), config.generation == "v1.0"
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name, taken, given):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (given, taken), (given,)

    def norms(*names):
        for name in names:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (c,), (c,)

    def attention(name):
        shapes[f"{name}.in_proj_weight"], shapes[f"{name}.in_proj_bias"] = (3 * c, c), (3 * c,)
        linear(f"{name}.out_proj", c, c)

    def looking(at, offset, samples, mixed, hidden):
        looks, times = config.groups * samples, config.frames * samples
        linear(f"{at}sampling.{offset}", c, 3 * looks)
        linear(f"{at}sampling.scale_weights", c, config.levels * looks)
        linear(f"{at}mixing.parameter_generator", c, config.groups * ((c // config.groups) ** 2 + times * mixed))
        linear(f"{at}mixing.out_proj", c * mixed, c)
        linear(f"{at}ffn.layers.0.0", c, hidden)
        linear(f"{at}ffn.layers.1", hidden, c)

    with torch.device("meta"):
        net = BACKBONES[config.backbone]()
    shapes |= {f"img_backbone.{name}": tuple(t.shape) for name, t in net.state_dict().items()}
    for i, taken in enumerate(net.channels):
        for name, kernel, given in (("lateral_convs", 1, taken), ("fpn_convs", 3, c)):
            shapes[f"img_neck.{name}.{i}.conv.weight"] = (c, given, kernel, kernel)
            shapes[f"img_neck.{name}.{i}.conv.bias"] = (c,)

    voxels = "pts_bbox_head.transformer.voxel_decoder."
    for i in range(3):
        at, samples = f"{voxels}decoder_layers.{i}.", config.samples // 2**i
        linear(at + "position_encoder.0", 3, c)
        linear(at + "position_encoder.3", c, c)
        if i < 2:
            attention(at + "self_attn.attention.attn")
            linear(at + "self_attn.gen_tau", c, config.heads)
            norms(at + "norm1")
        looking(at, "sampling_offset", samples, samples * config.frames * config.groups, 2 * c)
        norms(*(at + name for name in ("position_encoder.1", "position_encoder.4", "norm2", "norm3")))
        linear(f"{voxels}lift_feat_heads.{i}.0", c, 8 * c)
        linear(f"{voxels}seg_pred_heads.{i}", c, k if first else k + 1)
        if first:
            linear(f"{voxels}occ_pred_heads.{i}", c, 1)

    shapes["pts_bbox_head.transformer.decoder.query_feat.weight"] = (config.queries, c)
    shapes["pts_bbox_head.transformer.decoder.query_pos.weight"] = (config.queries, c)
    attention(_LAYER + "self_attn.self_attn")
    looking(_LAYER, "offset", config.samples, config.mixed, config.hidden)
    norms(*(_LAYER + name for name in ("norm1", "norm2", "norm3")))
    linear(_LAYER + "mask_proj", c, c)
    linear(_LAYER + "classifier", c, k)
    return shapes


def authors_checkpoint(config: sparseocc.Config, shifts=SHIFTS) -> dict[str, torch.Tensor]:
    """Numbers under the authors' names such that every term has something to say."""
    numbers = small.numbered(authors_tensors(config))
    return numbers | {name: numbers[name] + shift for name, shift in shifts.items()}


def draws(config: sparseocc.Config, seed=5) -> tuple[torch.Tensor, torch.Tensor]:
    """What the authors draw anew: which voxel of its mask a query looks at (iterations, Q, G S) and, where it covers
    none, where in the grid (iterations, Q, G S, 3); in [0, 1)."""
    random, shape = np.random.RandomState(seed), (config.iterations, config.queries, config.groups * config.samples)
    return torch.as_tensor(random.uniform(size=shape)), torch.as_tensor(random.uniform(size=(*shape, 3)))


def as_theirs(config: sparseocc.Config, shifts=SHIFTS) -> sparseocc.SparseOcc:
    """The system that speaks with the numbers of `authors_checkpoint` and `draws`, in float64."""
    system = sparseocc.SparseOcc(config).eval()
    load_strictly(system, authors_checkpoint(config, shifts), sparseocc.NAMES, system.constants())
    system.double()
    system.masks.draws, system.masks.anywhere = draws(config)
    return system


def told(seed=2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (LANES, X, Y, Z); instances, of which things have two a class; and voxels that came from nowhere when the
    world was turned."""
    random, shape, table = np.random.RandomState(seed), (LANES, *V11.grid.shape), V11.table
    filled = random.uniform(size=shape) < 0.35
    labels = np.where(filled, (table.free * random.uniform(size=shape) ** 2).astype(int), table.free)
    one = random.uniform(size=shape) < 0.4
    nowhere = random.uniform(size=shape) < 0.1
    instances = np.where(np.isin(labels, table.moving_ids), 2 * labels + 1 + one, 0)
    return labels.astype(np.uint8), instances, nowhere


def truth(turned=False) -> Occupancy:
    labels, instances, nowhere = told()
    labels = torch.as_tensor(np.where(nowhere, 255, labels).astype(np.uint8) if turned else labels)
    seen = torch.ones_like(labels, dtype=torch.bool)
    return Occupancy(V11.grid, V11.table, labels, None, seen, torch.as_tensor(instances.astype(np.int32)))


def crowd(seed=7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Voxels (LANES, K, 3), masks (LANES, Q, K) and classes (LANES, Q, classes), logits, in which every rule of the
    merges has a say."""
    random, q, k, c = np.random.RandomState(seed), 40, 400, len(V11.table.names)
    shape, n = V11.grid.shape, int(np.prod(V11.grid.shape))
    where = np.stack([np.stack(np.unravel_index(random.permutation(n)[:k], shape), -1) for _ in range(LANES)])
    favourite = np.array([1, 4, 4, 7, 11, 11, 13, 16])[random.randint(0, 8, size=(LANES, q))]
    names = random.standard_normal((LANES, q, c)) - 2.5 + 3 * random.uniform(size=(LANES, q, 1)) * np.eye(c)[favourite]
    begin, length = random.randint(0, k - 40, size=(LANES, q, 1)), random.randint(1, 25, size=(LANES, q, 1))
    inside = (np.arange(k) >= begin) & (np.arange(k) < begin + length)
    masks = random.standard_normal((LANES, q, k)) - 8.5 + 10.5 * inside
    # of five voxels another query takes one: four fifths are still a segment; of another five, two: three are none
    masks[:, :4], masks[:, 4:, -10:] = -9.0, -9.0 - random.uniform(size=(LANES, q - 4, 10))
    masks[:, 0, -10:-5], masks[:, 1, -6], masks[:, 2, -5:], masks[:, 3, -2:] = 2.0, 6.0, 2.0, 6.0
    masks[:, :, -30:-10], masks[:, 1, -30:-10] = -9.0, np.linspace(-4.8, -3.8, 20)  # hardly anything: 0.006 to 0.016
    names[:, :4] = -4.0
    for i, name in enumerate(("other_flat", "terrain", "trailer", "traffic_cone")):
        names[:, i, V11.table.id(name)] = 1.0
    return tuple(torch.as_tensor(part) for part in (where, masks, names))
