"""A very small OPUS for tests, and the names under which the authors would store it."""

from dataclasses import replace

import numpy as np
import torch

from occflow_core.geometry import Grid
from occflow_core.nn import BACKBONES
from occflow_core.systems import opus
from occflow_core.systems.base import seeded

CONFIG = opus.Config(
    height=64,
    width=96,
    queries=60,
    refines=(1, 4, 8),
    samples=2,
    backbone="resnet18-half",
    channels=16,
    groups=4,
    heads=4,
    mixed=4,
    hidden=32,
    flow=True,
    as_published=False,
    grid=Grid((-12.0, -10.0, -1.0), (1.0, 1.0, 0.8), (24, 20, 8)),
)
BRIEF = replace(CONFIG, refines=(8,), frames=2, levels=2, look=8)  # for compilers, which take seconds a layer
NORMS = ("norm1", "norm2", "norm3")
PUBLISHED = replace(CONFIG, flow=False, as_published=True)


def build(config=CONFIG, seed=0) -> opus.Opus:
    """Random weights in which every term has something to say."""
    system = seeded(opus.Opus(config), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in system.named_parameters():
            if name.startswith("layers") and "norm" not in name:
                p += 0.3 * p.std(correction=0).clamp_min(0.1) * torch.randn(p.shape, generator=generator)
    return system


def authors_tensors(config: opus.Config) -> dict[str, torch.Size]:
    """Names and shapes of the authors' V1 checkpoint: modules as mmdet and `models/opus_*.py` at dde4209 name them."""
    c, layers = config.channels, {}

    def linear(name, taken, given):
        layers[f"{name}.weight"], layers[f"{name}.bias"] = (given, taken), (given,)

    def norm(name):
        layers[f"{name}.weight"], layers[f"{name}.bias"] = (c,), (c,)

    with torch.device("meta"):
        net = BACKBONES[config.backbone]()
    layers |= {f"img_backbone.{name}": tuple(t.shape) for name, t in net.state_dict().items()}
    for i, taken in enumerate(net.channels):
        for name, kernel, given in (("lateral_convs", 1, taken), ("fpn_convs", 3, c)):
            layers[f"img_neck.{name}.{i}.conv.weight"] = (c, given, kernel, kernel)
            layers[f"img_neck.{name}.{i}.conv.bias"] = (c,)
    head = "pts_bbox_head."
    layers |= {head + "pc_range": (6,), head + "scene_size": (3,), head + "voxel_size": (3,), head + "voxel_num": (3,)}
    layers[head + "init_points.weight"] = (config.queries, 3)
    looks, times = config.groups * config.samples, config.samples * config.frames
    for i, (before, after) in enumerate(zip((1, *config.refines), config.refines)):
        at = f"{head}transformer.decoder.decoder_layers.{i}."
        linear(at + "position_encoder.0", 3 * before, c)
        linear(at + "position_encoder.3", c, c)
        layers[at + "self_attn.attention.attn.in_proj_weight"] = (3 * c, c)
        layers[at + "self_attn.attention.attn.in_proj_bias"] = (3 * c,)
        linear(at + "self_attn.attention.attn.out_proj", c, c)
        linear(at + "self_attn.gen_tau", c, config.heads)
        linear(at + "sampling.sampling_offset", c, 3 * looks)
        linear(at + "sampling.scale_weights", c, 4 * looks)
        linear(at + "mixing.parameter_generator", c, config.groups * ((c // config.groups) ** 2 + times * config.mixed))
        linear(at + "mixing.out_proj", c * config.mixed, c)
        linear(at + "ffn.layers.0.0", c, config.hidden)
        linear(at + "ffn.layers.1", config.hidden, c)
        for name in ("position_encoder.1", "position_encoder.4", "cls_branch.1", "cls_branch.4", *NORMS):
            norm(at + name)
        for name in ("cls_branch.0", "cls_branch.3", "reg_branch.0", "reg_branch.2"):
            linear(at + name, c, c)
        linear(at + "cls_branch.6", c, after * len(config.table.names))
        linear(at + "reg_branch.4", c, 3 * after)
    return layers


def numbered(shapes: dict[str, tuple[int, ...]], seed=0) -> dict[str, torch.Tensor]:
    """Numbers under the authors' names such that every term has something to say, from NumPy's RandomState, whose
    streams never change: the weights of the parity fixtures."""
    made, random = {}, np.random.RandomState(seed)
    for name, shape in sorted(shapes.items()):
        numbers = random.standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            numbers = np.int64(7)
        elif name.endswith("running_var"):
            numbers = abs(numbers) + 0.5
        elif name.endswith("init_points.weight"):
            numbers = 0.5 + 0.3 * numbers  # some lie outside
        elif name.endswith("prototype.weight"):
            numbers = numbers * 0.7
        elif len(shape) > 1:
            numbers = numbers * (np.prod(shape[1:]) ** -0.5)
        else:
            numbers = 0.3 * numbers + (1.0 if name.endswith(".weight") else 0.0)
        made[name] = torch.as_tensor(numbers) if name.endswith("tracked") else torch.as_tensor(numbers).float()
    return made


def authors_checkpoint(config: opus.Config, seed=0) -> dict[str, torch.Tensor]:
    """Numbers under the authors' names, for the grid of the config, such that every term has something to say."""
    grid = opus.Opus.constants(type("Grid only", (), {"config": config}))
    return numbered(authors_tensors(config), seed) | grid
