"""Labels in larger voxels, for systems that are supervised at several scales (STCOcc, `tools/generate_ms_occ.py`).

The published files have no masks, and where they promise flow they hold a copy of the classes; these have both.
B blocks of the fine grid, X Y Z voxels of the coarse one.
"""

import numpy as np

from ..types import Classes

MOSTLY = 0.95  # of a block's voxels must be free for it to be free


def coarser(labels: np.ndarray, classes: Classes, factor: int) -> np.ndarray:
    """Labels (X f, Y f, Z f) uint8 -> (X, Y, Z): free if more than 95 % of a block is, else the class that is most
    frequent in it beside free space; ties go to the smaller id (as published, so that checkpoints see what they know).
    """
    cubes = _blocks(labels, factor)
    votes = np.stack([(cubes == c).sum(-1) for c in range(classes.free)], -1)
    free = (cubes == classes.free).sum(-1) > MOSTLY * factor**3
    return np.where(free | (votes.sum(-1) == 0), classes.free, votes.argmax(-1)).astype(np.uint8)


def coarser_flow(flow: np.ndarray, labels: np.ndarray, coarse: np.ndarray, classes: Classes, factor: int) -> np.ndarray:
    """Flow (X f, Y f, Z f, 2) -> (X, Y, Z, 2): the mean over those voxels of a block that have its class and a known
    velocity. Zero where the class does not move, NaN where it does and nobody knows how fast."""
    moves = np.isin(np.arange(classes.free + 1), classes.moving_ids)[coarse]
    speeds = np.stack([_blocks(flow[..., i], factor) for i in range(2)], -1)  # (X, Y, Z, B, 2)
    same = (_blocks(labels, factor) == coarse[..., None]) & np.isfinite(speeds).all(-1) & moves[..., None]
    number = same.sum(-1)
    total = np.where(same[..., None], speeds, 0).sum(-2, dtype=np.float64)
    mean = (total / np.maximum(number, 1)[..., None]).astype(np.float32)
    mean[moves & (number == 0)] = np.nan
    return mean


def coarser_mask(mask: np.ndarray, labels: np.ndarray, coarse: np.ndarray, classes: Classes, factor: int) -> np.ndarray:
    """Mask (X f, Y f, Z f) bool -> (X, Y, Z): a block is seen if one of its filled voxels is, a free one if half of
    its voxels are."""
    seen = _blocks(mask, factor)
    filled = _blocks(labels, factor) != classes.free
    return np.where(coarse == classes.free, 2 * seen.sum(-1) >= factor**3, (seen & filled).any(-1))


def _blocks(array: np.ndarray, f: int) -> np.ndarray:
    """(X f, Y f, Z f) -> (X, Y, Z, f * f * f)."""
    if any(n % f for n in array.shape):
        raise ValueError(f"labels: a grid of {array.shape} voxels does not divide by {f}")
    x, y, z = (n // f for n in array.shape)
    return array.reshape(x, f, y, f, z, f).transpose(0, 2, 4, 1, 3, 5).reshape(x, y, z, f**3)
