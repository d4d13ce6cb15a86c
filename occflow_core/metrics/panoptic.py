"""RayPQ: panoptic quality along rays (github.com/MCG-NJU/SparseOcc, `loaders/ray_pq.py`).

A segment is what one instance covers of a class, seen along the rays of one sample; areas count all rays that the truth
stops, intersections only those whose distance is less than 1, 2 or 4 m off; two segments match where their IoU exceeds
one half. Segments of fewer than ten rays are neither missed nor wrong. R rays.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..types import Classes
from .rayiou import THRESHOLDS, comparable
from .rays import Hits
from .tally import Tally, mean, ratio

SMALLEST = 10  # rays: an unmatched segment of fewer does not count


@dataclass(frozen=True)
class RayPqResult:
    """Shares, 0 to 1; NaN where there is nothing to tell. Tuples have one value for each threshold."""

    raypq: float  # the mean of the next three
    at: dict[int, float]  # threshold in m -> mean over classes
    classes: dict[str, tuple[float, float, float]]  # PQ
    matched: dict[str, tuple[int, int, int]]  # segments
    missed: dict[str, tuple[int, int, int]]
    wrong: dict[str, tuple[int, int, int]]


class RayPq(Tally):
    """Running RayPQ@1, @2 and @4. Things are the classes that move; every other class is one segment a sample."""

    def __init__(self, classes: Classes):
        c = (len(THRESHOLDS), classes.free)
        super().__init__(classes, matched=c, missed=c, wrong=c)
        self.quality: dict[str, np.ndarray] = {}  # sample -> matches (M, 4) int64: threshold, class, I, U

    def add(self, sample: str, prediction: Hits, truth: Hits, ids: Tensor, true_ids: Tensor) -> None:
        """Rays with the instance that stopped each, (R,) integers, 0 = none; `instances.reshape(-1)[hits.voxel]`.

        Segments are matched within the sample. ValueError as in `RayIou.add`, and for ids of another shape.
        """
        self._new(sample, prediction.classes, truth.classes)
        kept, _ = comparable(sample, prediction, truth)
        if ids.shape != truth.label.shape or true_ids.shape != truth.label.shape:
            raise ValueError(
                f"sample {sample}: instances {tuple(ids.shape)} and {tuple(true_ids.shape)} of {len(truth.label)} rays"
            )
        error = (prediction.distance - truth.distance).abs()[kept].cpu().numpy()
        true = _segments(self.classes, truth.label[kept], true_ids[kept])
        told = _segments(self.classes, prediction.label[kept], ids[kept])
        found: list[tuple[int, int, int, int]] = []
        for c in range(self.classes.free):
            here_true, here_told = true[0] == c, told[0] == c
            segments = np.unique(true[1][here_true], return_counts=True)
            guesses = np.unique(told[1][here_told], return_counts=True)
            for t, threshold in enumerate(THRESHOLDS):
                both = here_true & here_told & (error < threshold)
                matches = _matches(true[1][both], told[1][both], segments, guesses)
                found += [(t, c, i, u) for _, _, i, u in matches]
                self.counts["matched"][t, c] += len(matches)
                self.counts["missed"][t, c] += _large(segments, [m[0] for m in matches])
                self.counts["wrong"][t, c] += _large(guesses, [m[1] for m in matches])
        self.quality[sample] = _rows(found)
        self.samples.add(sample)

    def result(self) -> RayPqResult:
        """ValueError if nothing was added."""
        self._scored()
        matched, missed, wrong = (self.counts[name] for name in ("matched", "missed", "wrong"))
        iou = np.zeros(matched.shape)
        # in one order, whoever counted what: rounding must not depend on it
        t, c, intersection, union = np.concatenate([self.quality[sample] for sample in sorted(self.quality)]).T
        np.add.at(iou, (t, c), intersection / union)
        pq = ratio(2 * iou, 2 * matched + missed + wrong)  # = SQ * RQ
        names = self.classes.names
        return RayPqResult(
            raypq=mean(pq),
            at={int(threshold): mean(row) for threshold, row in zip(THRESHOLDS, pq)},
            classes={name: tuple(pq[:, c].tolist()) for c, name in enumerate(names)},
            **{
                what: {name: tuple(self.counts[what][:, c].tolist()) for c, name in enumerate(names)}
                for what in ("matched", "missed", "wrong")
            },
        )

    def __add__(self, other: "RayPq") -> "RayPq":
        both = super().__add__(other)
        both.quality = self.quality | other.quality
        return both

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"quality": {s: self.quality[s].tolist() for s in sorted(self.quality)}}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "RayPq":
        tally = super().from_json(stored)
        tally.quality = {sample: _rows(matches) for sample, matches in stored["quality"].items()}
        return tally


def _rows(matches: list) -> np.ndarray:
    return np.array(matches, np.int64).reshape(-1, 4)


def _segments(classes: Classes, labels: Tensor, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Class and segment of each ray. An instance keeps its class only if all its rays agree on it; rays of a thing
    without an instance, or of one of two classes, make one segment of their class (id 0)."""
    labels, ids = labels.cpu().numpy().astype(np.int64), ids.cpu().numpy().astype(np.int64)
    number, of = np.unique(_pairs(ids, labels)[0], return_counts=True)
    mixed = np.isin(ids, number[of > 1])
    things = np.isin(labels, classes.moving_ids)
    return labels, np.where(things & ~mixed, ids, 0)


def _matches(true: np.ndarray, told: np.ndarray, segments, guesses) -> list[tuple[int, int, int, int]]:
    """(true id, told id, intersection, union) of those that overlap by more than half; ids of the rays in both."""
    area, guess = dict(zip(*segments)), dict(zip(*guesses))
    out = []
    for a, b, intersection in zip(*(part.tolist() for part in _pairs(true, told))):
        union = int(area[a] + guess[b]) - intersection
        if 2 * intersection > union:
            out.append((a, b, intersection, union))
    return out


def _pairs(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different pairs of two int64 arrays of int32's numbers, in order, and how often each is there."""
    # as one number each: sorting those takes a tenth of the time that sorting pairs takes
    keys, times = np.unique(one * 2**32 + other, return_counts=True)
    other = (keys + 2**31) % 2**32 - 2**31
    return (keys - other) >> 32, other, times


def _large(segments: tuple[np.ndarray, np.ndarray], matched: list[int]) -> int:
    """How many unmatched ones are large enough to count."""
    ids, areas = segments
    return int((~np.isin(ids, matched) & (areas >= SMALLEST)).sum())
