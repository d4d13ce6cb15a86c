"""mIoU: intersection over union of labels, voxel by voxel.

Rules of the CVPR 2023 challenge (`projects/mmdet3d_plugin/datasets/occ_metrics.py` of its repository): counts over all
samples, one division at the end; only voxels that a camera sees; the mean goes over all classes but free. Truth with
label 255 is left out. X Y Z voxels.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..geometry import Grid
from ..types import Classes, Occupancy, Prediction
from .tally import UNLABELLED, Tally, mean, ratio

RINGS = (20.0, 40.0)  # m from the car's origin, over ground, to the middle of a voxel
RING_NAMES = ("0-20 m", "20-40 m", "beyond 40 m")  # the last: the corners of the square
_UNSEEN, _SEEN = 0, 1
Where = Literal["seen", "unseen", "all"]
Absent = Literal["zero", "skip"]


@dataclass(frozen=True)
class MiouResult:
    """Shares, 0 to 1; NaN where there is nothing to tell."""

    miou: float
    moving: float  # mean over the classes that move
    static: float  # and over the others
    occupied: float  # IoU of filled and free, whatever the class
    classes: dict[str, float]
    free: float  # IoU of free space; in no mean
    rings: dict[str, float]  # mIoU of the voxels in each ring
    voxels: int  # that were compared
    unlabelled: int  # left out because the truth does not know them (255)
    empty: int  # samples whose truth has not one filled voxel


class Miou(Tally):
    """Running confusion between true and predicted labels, apart by distance and by visibility."""

    def __init__(self, classes: Classes):
        c = classes.free + 1
        super().__init__(classes, pairs=(2, len(RING_NAMES), c, c), unlabelled=(2,), empty=())

    def add(self, sample: str, prediction: Prediction, truth: Occupancy) -> None:
        """One sample, (X, Y, Z) each.

        ValueError: a sample that was added before, other classes or another grid, labels beyond the table.
        """
        self._new(sample, prediction.classes, truth.classes)
        same_volume(sample, prediction, truth)
        free, c = self.classes.free, self.classes.free + 1
        true, told = truth.labels, prediction.labels.to(truth.labels.device)
        highest = int(told.max())
        if highest > free:
            raise ValueError(f"sample {sample}: predicted label {highest}, expected 0 to {free} ({self.classes.table})")
        # a cell of counts for each visibility and ring
        cell = _rings(truth.grid, true.device) + truth.seen.reshape(-1) * len(RING_NAMES)
        count = pairs if true.device.type != "cpu" or _numba() is None else _numba().pairs
        counted = count(cell, true.reshape(-1), told.reshape(-1), 2 * len(RING_NAMES), c)
        counted = counted.reshape(2, len(RING_NAMES), c + 1, c).cpu().numpy()
        beyond = counted[:, :, c].sum((1, 2))
        if beyond.any() and bool(((true > free) & (true != UNLABELLED)).any()):
            raise ValueError(
                f"sample {sample}: true labels beyond {free} that are not {UNLABELLED} (not labelled); are they of the "
                f"table {self.classes.table}?"
            )
        self.counts["pairs"] += counted[:, :, :c]
        self.counts["unlabelled"] += beyond
        self.counts["empty"] += int(not counted[:, :, :free].any())
        self.samples.add(sample)

    def result(self, where: Where = "seen", absent: Absent = "zero") -> MiouResult:
        """where: voxels that a camera sees, that none does, or all of them; labels without masks (OpenOcc) are seen
        everywhere. absent: a class that the truth never has but that was predicted counts as "zero" in the mean
        (the 2023 challenge's code) or is left out, "skip" (SparseOcc, `loaders/old_metrics.py`). The two agree once
        every class has occurred. ValueError if nothing was added."""
        self._scored()
        part = {"seen": slice(_SEEN, None), "unseen": slice(_UNSEEN, _SEEN), "all": slice(None)}[where]
        rings = self.counts["pairs"][part].sum(0)
        pairs = rings.sum(0)
        iou = _iou(pairs, absent)
        moves = np.isin(np.arange(self.classes.free), self.classes.moving_ids)
        free, total = pairs[-1, -1], pairs.sum()
        return MiouResult(
            miou=mean(iou[:-1]),
            moving=mean(iou[:-1][moves]),
            static=mean(iou[:-1][~moves]),
            occupied=float(ratio(pairs[:-1, :-1].sum(), total - free)),
            classes=dict(zip(self.classes.names, iou.tolist())),
            free=float(iou[-1]),
            rings={name: mean(_iou(ring, absent)[:-1]) for name, ring in zip(RING_NAMES, rings)},
            voxels=int(total),
            unlabelled=int(self.counts["unlabelled"][part].sum()),
            empty=int(self.counts["empty"]),
        )


def pairs(cell: Tensor, true: Tensor, told: Tensor, cells: int, kinds: int) -> Tensor:
    """How often (cells, kinds + 1, kinds) int64 each true and told label came together in each cell.

    Arguments (V,) uint8; told < kinds; true labels beyond the kinds are counted together, as the last. This is the
    definition, on any device; `miou_numba` counts the same on the CPU, at once and without threads.
    """
    row = cell.int() * (kinds + 1) + true.clamp(max=kinds)
    shape = cells, kinds + 1, kinds
    return torch.bincount(row * kinds + told, minlength=shape[0] * shape[1] * shape[2]).reshape(shape)


def same_volume(sample: str, prediction: Prediction, truth: Occupancy) -> None:
    """ValueError unless both fill one grid, once."""
    if prediction.grid != truth.grid or prediction.labels.shape != truth.labels.shape:
        raise ValueError(
            f"sample {sample}: prediction {tuple(prediction.labels.shape)} in {prediction.grid} and truth "
            f"{tuple(truth.labels.shape)} in {truth.grid} are not the same volume"
        )


def _iou(pairs: np.ndarray, absent: Absent) -> np.ndarray:
    """Of each class, from [true, told] counts."""
    true, told, right = pairs.sum(1), pairs.sum(0), np.diag(pairs)
    iou = ratio(right, true + told - right)
    return np.where(true > 0, iou, np.nan) if absent == "skip" else iou


@cache
def _rings(grid: Grid, device: torch.device) -> Tensor:
    """The ring of every voxel, (X * Y * Z,) uint8."""
    far = grid.centres(torch.float64)[..., :2].norm(dim=-1)
    return sum((far >= edge).to(torch.uint8) for edge in RINGS).reshape(-1).to(device)


@cache
def _numba():
    """The compiled count, or None where numba is not installed."""
    try:
        from . import miou_numba
    except ImportError:
        return None
    return miou_numba
