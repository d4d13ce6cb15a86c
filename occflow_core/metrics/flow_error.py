"""mAVE, the error of velocities along rays, and the challenge's Occ Score.

Two published scorers disagree (both OpenDriveLab/OccNet, branch `challenge`; docs/conventions.md has the difference in
a sentence): `ray_metrics.py`, which trains and papers use, averages over rays that hit the right class less than 2 m
off; `tools/ray_iou/metric.py`, which reads submission files, averages for every class over *all* rays of the samples
in which that class was hit once. The first is what the challenge's rules describe, and the default here.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..types import Classes
from .rayiou import comparable
from .rays import Hits
from .tally import Tally, mean

RIGHT = 2.0  # m: how far off a ray may be for its velocity to count
OF_FLOW = 0.1  # weight of the velocities in the Occ Score
Over = Literal["right", "all"]


@dataclass(frozen=True)
class FlowErrorResult:
    """In m/s; NaN where there is nothing to tell."""

    mave: float  # mean over the classes that have one
    classes: dict[str, float]  # of those that move
    rays: int  # whose velocities were compared, of all classes that move
    unknown: int  # rays of the right class and distance whose true velocity nobody knows: not compared


class FlowError(Tally):
    """Running AVE of each class that moves.

    Sums of errors are kept for each sample and added exactly at the end, so that they too do not depend on the order.
    """

    def __init__(self, classes: Classes):
        super().__init__(classes, unknown=())
        # sample -> of each class that moves, and last of all rays of the truth: sum of errors in m/s, number of rays
        self.errors: dict[str, list[tuple[float, int]]] = {}

    def add(self, sample: str, prediction: Hits, truth: Hits) -> None:
        """The same rays in the prediction's and in the truth's volume, both with flow.

        ValueError: a volume without flow, and whatever `RayIou.add` refuses.
        """
        self._new(sample, prediction.classes, truth.classes)
        kept, same = comparable(sample, prediction, truth)
        if prediction.flow is None or truth.flow is None:
            who = "prediction" if prediction.flow is None else "truth"
            raise ValueError(f"sample {sample}: the {who} has no flow to be scored")
        error = (prediction.flow - truth.flow).double().square().sum(1).sqrt()
        known = truth.flow.isfinite().all(1)
        if not prediction.flow[kept].isfinite().all():
            raise ValueError(f"sample {sample}: predicted velocities that are not finite")
        right = same & ((prediction.distance - truth.distance).abs() < RIGHT)
        label, error, known, right, kept = (t.cpu().numpy() for t in (truth.label, error, known, right, kept))
        moving = np.isin(label, self.classes.moving_ids)
        self.counts["unknown"] += int((right & moving & ~known).sum())
        groups = [right & known & (label == c) for c in self.classes.moving_ids]
        self.errors[sample] = [(math.fsum(error[g].tolist()), int(g.sum())) for g in (*groups, kept & known)]
        self.samples.add(sample)

    def result(self, over: Over = "right") -> FlowErrorResult:
        """over: which rays of a sample count for a class, see above. ValueError if nothing was added."""
        self._scored()
        sums: list[list[float]] = [[] for _ in self.classes.moving]
        rays = [0] * len(sums)
        for *classes, everything in self.errors.values():
            for c, (total, number) in enumerate(classes):
                if number:
                    total, number = (total, number) if over == "right" else everything
                    sums[c].append(total)
                    rays[c] += number
        ave = [math.fsum(s) / n if n else math.nan for s, n in zip(sums, rays)]
        return FlowErrorResult(
            mave=mean(np.array(ave)),
            classes=dict(zip(self.classes.moving, ave)),
            rays=sum(rays),
            unknown=int(self.counts["unknown"]),
        )

    def __add__(self, other: "FlowError") -> "FlowError":
        both = super().__add__(other)
        both.errors = self.errors | other.errors
        return both

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"errors": {sample: self.errors[sample] for sample in sorted(self.errors)}}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "FlowError":
        tally = super().from_json(stored)
        tally.errors = {sample: [(s, n) for s, n in rows] for sample, rows in stored["errors"].items()}
        return tally


def occ_score(rayiou: float, mave: float) -> float:
    """The 2024 challenge's score, 0 to 1: 0.9 RayIoU + 0.1 max(1 - mAVE, 0). NaN where either is."""
    return (1 - OF_FLOW) * rayiou + OF_FLOW * max(1 - mave, 0.0) if not math.isnan(mave) else math.nan
