"""A very small OPUS-V2 for tests, its authors' names, and the numbers of the parity fixture.

Numbers come from NumPy's RandomState, whose streams never change.
"""

from dataclasses import replace

import numpy as np
import torch
from systems import small

from occflow_core.geometry import Grid
from occflow_core.nn.instants import View
from occflow_core.systems import opus_v2
from occflow_core.systems.base import load_strictly
from occflow_core.types import OCC3D, Occupancy

CONFIG = opus_v2.Config(
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
    told=8,
    cells=8,
    flow=True,
    as_published=False,
    grid=Grid((-12.0, -10.0, -1.0), (1.0, 1.0, 0.8), (24, 20, 8)),
)
PUBLISHED = replace(CONFIG, flow=False, as_published=True)
# what the authors' code lets be small; the rest stands in it
PARITY = replace(
    PUBLISHED,
    queries=8,
    refines=(1, 3, 4),
    heads=8,
    mixed=32,
    hidden=512,
    frames=4,
    dropout=0.0,
    grid=Grid((-10.0, -10.0, -1.0), (1.0, 1.0, 0.8), (20, 20, 8)),  # its losses ask for a square
)
LANES, CAMERAS = 2, 6
FAINT = 1.65  # less in every logit, and half of the voxels fall below the threshold
SIZES = ((8, 12), (4, 6), (2, 3), (1, 2))


def authors_tensors(config: opus_v2.Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' V2 checkpoint: `models/opusv2/` at 216dc53; kernels as spconv 2.3 has them."""
    tensors = small.authors_tensors(config)
    looks, k, cells = config.groups * config.samples, len(config.table.names), config.cells
    for i, after in enumerate(config.refines):
        at = f"pts_bbox_head.transformer.decoder.decoder_layers.{i}."
        tensors[at + "sampling.sampling_prototype.weight"] = (looks, 3)
        tensors[at + "cls_branch.6.weight"] = (after * config.told, config.channels)
        tensors[at + "cls_branch.6.bias"] = (after * config.told,)
        at = f"pts_bbox_head.densifiers.{i}."
        tensors |= {at + "pc_range": (6,), at + "voxel_num": (3,)}
        for layer, (taken, given) in enumerate(((config.told + 6, cells // 2), (cells, cells))):
            tensors[f"{at}pfn_layers.{layer}.linear.weight"] = (given, taken)
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensors[f"{at}pfn_layers.{layer}.norm.{name}"] = (given,)
            tensors[f"{at}pfn_layers.{layer}.norm.num_batches_tracked"] = ()
        for layer, given in ((0, cells), (2, k)):
            tensors[f"{at}cls_branch.{layer}.weight"] = (given, 3, 3, 3, cells)
            tensors[f"{at}cls_branch.{layer}.bias"] = (given,)
    return tensors


def authors_checkpoint(config: opus_v2.Config, seed=0) -> dict[str, torch.Tensor]:
    """Numbers under the authors' names, for the grid of the config, such that every term has something to say."""
    grid = opus_v2.OpusV2.constants(type("Grid only", (), {"config": config}))
    return small.numbered(authors_tensors(config), seed) | grid


def build(config=CONFIG, seed=0) -> opus_v2.OpusV2:
    """Random weights in which every term has something to say."""
    system = opus_v2.OpusV2(config)
    if config.as_published:
        load_strictly(system, authors_checkpoint(config, seed), opus_v2.NAMES, system.constants())
        return system.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in system.named_parameters():
            if name.startswith(("layers", "densifiers")) and "norm" not in name:
                p += 0.3 * p.std(correction=0).clamp_min(0.1) * torch.randn(p.shape, generator=generator)
    return system.eval()


def seen(seed=1) -> tuple[list[np.ndarray], np.ndarray]:
    """Maps of every level, (B, T, N, C, H_l, W_l), and pixels_from_now (B, T, N, 4, 4), float64."""
    random, c = np.random.RandomState(seed), PARITY
    maps = [random.standard_normal((LANES, c.frames, CAMERAS, c.channels, *size)) for size in SIZES]
    matrices = np.zeros((LANES, c.frames, CAMERAS, 4, 4))
    for b, t, n in np.ndindex(matrices.shape[:3]):
        yaw = 2 * np.pi * n / CAMERAS + 0.1 * t + 0.05 * b
        ahead, left = np.array([np.cos(yaw), np.sin(yaw), 0]), np.array([-np.sin(yaw), np.cos(yaw), 0])
        place = np.array([0.8 * t, 0.3 * b, 1.5])
        rows = np.stack([-left, [0, 0, -1.0], ahead])  # right, down, ahead
        lens = np.array([[0.7 * c.width, 0, c.width / 2], [0, 0.7 * c.width, 0.45 * c.height], [0, 0, 1]])
        matrices[b, t, n, :3] = lens @ np.concatenate([rows, -(rows @ place)[:, None]], axis=1)
        matrices[b, t, n, 3, 3] = 1
    return maps, matrices


def view() -> View:
    maps, matrices = seen()
    rows = torch.cat([torch.as_tensor(m).flatten(-2).mT for m in maps], dim=-2)  # (B, T, N, R, C)
    used = torch.ones(LANES, PARITY.frames, CAMERAS, dtype=torch.bool)
    pixels = torch.as_tensor(matrices[..., :3, :])
    return View([list(lane) for lane in rows], SIZES, (PARITY.height, PARITY.width), pixels, used)


def truth(seed=2) -> Occupancy:
    random, shape = np.random.RandomState(seed), (LANES, *PARITY.grid.shape)
    labels = np.where(random.uniform(size=shape) < 0.2, random.randint(0, OCC3D.free, shape), OCC3D.free)
    labels, mask = torch.as_tensor(labels.astype(np.uint8)), torch.as_tensor(random.uniform(size=shape) < 0.6)
    return Occupancy(PARITY.grid, OCC3D, labels, None, mask)


def brief(numbers: torch.Tensor) -> np.ndarray:
    """(..., K) -> (..., 2): two mixtures of every row, in a fixture's stead of all K."""
    return numbers.detach().double().numpy() @ np.random.RandomState(3).standard_normal((numbers.shape[-1], 2))
