"""A very small OPUS-V1-Fusion for tests, its authors' names, and the numbers of the parity fixture.

Numbers come from NumPy's RandomState, whose streams never change.
"""

from dataclasses import replace

import numpy as np
import torch
from systems import small, small_v2
from systems.small_v2 import LANES, view

from occflow_core.geometry import Grid
from occflow_core.nn import Second, SecondFPN, SparseEncoder
from occflow_core.systems import opus_fusion
from occflow_core.systems.base import load_strictly, seeded

CONFIG = opus_fusion.Config(
    height=64,
    width=96,
    queries=60,
    refines=(1, 4, 8),
    samples=2,
    mixed=18,
    sweeps=3,
    lidar_width=2,
    backbone="resnet18-half",
    channels=16,
    hidden=32,
    heads=4,
    grid=Grid((-12.0, -10.0, -1.0), (1.0, 1.0, 0.8), (24, 20, 8)),
)


def authors_tensors(config: opus_fusion.Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' checkpoint: `models/opusv1_fusion` at 216dc53, mmdet3d v1.0.0rc6, spconv 2."""
    shapes = {n: s for n, s in small.authors_tensors(config).items() if ".mixing." not in n and "init_points" not in n}
    c, g, looked = config.channels, config.groups, config.samples * (config.frames + 1)
    for i in range(len(config.refines)):
        at = f"pts_bbox_head.transformer.decoder.decoder_layers.{i}.img_pts_mixing."
        given = g * ((c // g) ** 2 + looked * config.mixed)
        shapes |= {at + "parameter_generator.weight": (given, c), at + "parameter_generator.bias": (given,)}
        shapes |= {at + "out_proj.weight": (c, c * config.mixed), at + "out_proj.bias": (c,)}
    w = config.lidar_width
    with torch.device("meta"):  # whose names are mmdet3d's: `test/nn/test_lidar.py`
        parts = {
            "pts_middle_encoder.": SparseEncoder(5, w),
            "pts_backbone.": Second(16 * w, 8 * w),
            "pts_neck.": SecondFPN(8 * w),
        }
    for prefix, part in parts.items():
        shapes |= {prefix + name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}
    return shapes | {"final_conv.conv.weight": (c, 32 * w, 3, 3), "final_conv.conv.bias": (c,)}


# what the authors' code lets be small; the rest stands in it
PARITY = replace(
    CONFIG,
    queries=8,
    refines=(1, 3, 4),
    mixed=10,
    heads=8,
    hidden=512,
    frames=4,
    dropout=0.0,
    grid=small_v2.PARITY.grid,
)


def authors_checkpoint(config: opus_fusion.Config, seed=0) -> dict[str, torch.Tensor]:
    """Numbers under the authors' names, for the grid of the config, such that every term has something to say."""
    grid = opus_fusion.OpusFusion.constants(type("Grid only", (), {"config": config}))
    return small.numbered(authors_tensors(config), seed) | grid


def build(config=CONFIG) -> opus_fusion.OpusFusion:
    return seeded(opus_fusion.OpusFusion(config), 0).eval()


def as_theirs(config=PARITY) -> opus_fusion.OpusFusion:
    """The system that speaks with the numbers of `authors_checkpoint`."""
    system = opus_fusion.OpusFusion(config).eval()
    load_strictly(system, authors_checkpoint(config), opus_fusion.NAMES, system.constants())
    return system


def scans(seed=5) -> list[np.ndarray]:
    """Points (P, 5) of every lane, float64: 40 of the newest scan and 20 earlier ones."""
    random, grid = np.random.RandomState(seed), PARITY.grid
    lanes = []
    for _ in range(LANES):
        points = random.uniform(size=(60, 5)) * [*grid.size, 255.0, 0.0] + [*grid.low, 0.0, 0.0]
        points[40:, 4] = 0.05
        lanes.append(points)
    return lanes


def above(seed=6) -> np.ndarray:
    """The map of LiDAR features (B, C, Y, X), float64."""
    x, y, _ = PARITY.grid.shape
    return np.random.RandomState(seed).standard_normal((LANES, PARITY.channels, y, x))


def said(system: opus_fusion.OpusFusion, config=PARITY) -> opus_fusion.Output:
    """What the decoder makes of `small_v2.view`, of the map above and of the scans, in float64."""
    begin = torch.stack([opus_fusion._begin(torch.as_tensor(points), config.queries) for points in scans()])
    both = opus_fusion._View(view(), torch.as_tensor(above()), config.grid)
    layers = system.double().layers.train()  # as where it learns: all are named, not the last alone
    return opus_fusion.refined(layers, config.grid.unit(begin), both, config)
