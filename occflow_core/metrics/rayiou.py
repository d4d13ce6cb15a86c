"""RayIoU: intersection over union of what a LiDAR would see (SparseOcc, arXiv 2312.17118, section 3.4).

Rules of the published code (`loaders/ray_metrics.py` there, and OccNet's for the 2024 challenge): rays that meet
nothing in the truth do not count at all; a ray is right if its class is the truth's and its distance is *less* than
1, 2 or 4 m off; a right class at a wrong distance is a false positive and a false negative.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..types import Classes
from .rays import Hits
from .tally import UNLABELLED, Tally, mean, ratio

THRESHOLDS = (1.0, 2.0, 4.0)  # m


@dataclass(frozen=True)
class RayIouResult:
    """Shares, 0 to 1; NaN where there is nothing to tell."""

    rayiou: float  # the mean of the next three
    at: dict[int, float]  # threshold in m -> mean over classes
    classes: dict[str, tuple[float, float, float]]  # at each threshold; NaN: neither in the truth nor predicted
    rays: int  # that the truth stops
    unlabelled: int  # of them on voxels of which the truth says that nobody knows (255): misses, whatever was predicted
    empty: int  # samples in which the truth stops no ray


class RayIou(Tally):
    """Running RayIoU@1, @2 and @4."""

    def __init__(self, classes: Classes):
        c = (classes.free,)
        super().__init__(classes, true=c, told=c, right=(len(THRESHOLDS), *c), unlabelled=(), empty=())

    def add(self, sample: str, prediction: Hits, truth: Hits) -> None:
        """The same rays in the prediction's and in the truth's volume.

        ValueError: a sample that was added before, other classes, other rays, predicted labels beyond the table.
        """
        self._new(sample, prediction.classes, truth.classes)
        kept, _ = comparable(sample, prediction, truth)
        true, told = truth.label[kept].long(), prediction.label[kept].long()
        error = (prediction.distance[kept] - truth.distance[kept]).abs()
        number = self.classes.free
        self.counts["true"] += _count(true, number)
        self.counts["told"] += _count(told, number)
        for row, threshold in zip(self.counts["right"], THRESHOLDS):
            row += _count(true[(true == told) & (error < threshold)], number)
        self.counts["unlabelled"] += int((true == UNLABELLED).sum())
        self.counts["empty"] += int(not kept.any())
        self.samples.add(sample)

    def result(self) -> RayIouResult:
        """ValueError if nothing was added."""
        self._scored()
        true, told, right = (self.counts[name] for name in ("true", "told", "right"))
        iou = ratio(right, true + told - right)
        return RayIouResult(
            rayiou=mean(iou),
            at={int(threshold): mean(row) for threshold, row in zip(THRESHOLDS, iou)},
            classes={name: tuple(iou[:, c].tolist()) for c, name in enumerate(self.classes.names)},
            rays=int(true.sum() + self.counts["unlabelled"]),
            unlabelled=int(self.counts["unlabelled"]),
            empty=int(self.counts["empty"]),
        )


def comparable(sample: str, prediction: Hits, truth: Hits) -> tuple[Tensor, Tensor]:
    """Rays that count (R,) bool, and those of them of the right class. ValueError as in `RayIou.add`."""
    free = truth.classes.free
    if prediction.label.shape != truth.label.shape:
        raise ValueError(
            f"sample {sample}: {len(prediction.label)} rays in the prediction, {len(truth.label)} in the truth; cast "
            "both from the same origins"
        )
    if len(prediction.label) and int(prediction.label.max()) > free:
        raise ValueError(f"sample {sample}: predicted label {int(prediction.label.max())}, expected 0 to {free}")
    if ((truth.label > free) & (truth.label != UNLABELLED)).any():
        raise ValueError(f"sample {sample}: true labels beyond {free} that are not {UNLABELLED} (not labelled)")
    kept = truth.label != free
    return kept, kept & (prediction.label == truth.label)


def _count(labels: Tensor, number: int) -> np.ndarray:
    """How many of each class below `number`."""
    return torch.bincount(labels, minlength=number)[:number].cpu().numpy()
