"""All measures of one run at once: mIoU, RayIoU, with flow mAVE and the Occ Score, and with instances RayPQ."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..types import Classes, Occupancy, Prediction
from .flow_error import FlowError, Over, occ_score
from .miou import Absent, Miou
from .panoptic import RayPq
from .rayiou import RayIou, comparable
from .rays import Hits, hits

_TALLIES = {"miou": Miou, "rayiou": RayIou, "flow_error": FlowError, "raypq": RayPq}


class Scores:
    """Running tallies over samples; `a + b` is the tally of one process that had seen the samples of both.

    scores = Scores(OPENOCC)
    scores.add(sample, prediction, truth, origins)
    scores.result()["RayIoU"]
    """

    def __init__(self, classes: Classes):
        self.classes = classes
        self.miou, self.rayiou, self.flow_error = Miou(classes), RayIou(classes), FlowError(classes)
        self.raypq = RayPq(classes)  # of samples whose truth and prediction have instances
        self.without_flow: set[str] = set()  # samples whose truth has a flow and whose prediction has none

    @property
    def samples(self) -> set[str]:
        return self.miou.samples

    def add(
        self, sample: str, prediction: Prediction, truth: Occupancy, origins: Tensor, true: Hits | None = None
    ) -> Hits:
        """One sample, and the origins (K, 3) of its rays (`metrics.origins`). Returns where the prediction stops them.

        true: where the truth stops them, if it has been cast from these origins before; several predictions of one
        sample need it once. A sample that is refused leaves the tallies as they were.

        ValueError: a sample that was added before; prediction, truth and tally of different classes; different grids;
        labels beyond the table; velocities or origins that are not finite.
        """
        true = hits(truth, origins) if true is None else true
        told = hits(prediction, origins)
        self.rayiou._new(sample, prediction.classes, truth.classes)
        comparable(sample, told, true)
        flows = true.flow is not None and told.flow is not None
        if flows and not prediction.flow.isfinite().all():
            raise ValueError(f"sample {sample}: predicted velocities that are not finite")
        self.miou.add(sample, prediction, truth)
        self.rayiou.add(sample, told, true)
        if flows:
            self.flow_error.add(sample, told, true)
        elif true.flow is not None:
            self.without_flow.add(sample)
        if truth.instances is not None and prediction.instances is not None:
            ids, true_ids = prediction.instances.reshape(-1)[told.voxel], truth.instances.reshape(-1)[true.voxel]
            self.raypq.add(sample, told, true, ids, true_ids)
        return told

    def __add__(self, other: "Scores") -> "Scores":
        """ValueError if they count other things or a sample stands in both."""
        both = Scores(self.classes)
        for name in _TALLIES:
            setattr(both, name, getattr(self, name) + getattr(other, name))
        both.without_flow = self.without_flow | other.without_flow
        return both

    def missing(self, expected: Iterable[str]) -> list[str]:
        """Those of the expected samples that were never added, in their order."""
        return self.miou.missing(expected)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` makes the same tallies of; only lists, numbers and words."""
        tallies = {name: getattr(self, name).to_json() for name in _TALLIES}
        return tallies | {"without_flow": sorted(self.without_flow)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Scores":
        """ValueError where it is not what `to_json` wrote."""
        try:
            tallies = {name: kind.from_json(stored[name]) for name, kind in _TALLIES.items()}
            scores = cls(tallies["miou"].classes)
            for name, tally in tallies.items():
                setattr(scores, name, tally)
            scores.without_flow = set(stored["without_flow"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"stored scores: {error!r} where a tally was expected") from None
        return scores

    def result(self, absent: Absent = "zero", over: Over = "right") -> dict[str, Any]:
        """Everything that can be told, for `scores.json`: shares 0 to 1, errors in m/s, None where there is nothing.

        absent: as in `Miou.result`; over: as in `FlowError.result`. ValueError if nothing was added.
        """
        seen, everywhere = (self.miou.result(where, absent) for where in ("seen", "all"))
        unseen = self.miou.result("unseen", absent)
        rays = self.rayiou.result()
        out: dict[str, Any] = {
            "samples": len(self.samples),
            "classes": self.classes.table,
            "mIoU": seen.miou,
            "RayIoU": rays.rayiou,
        }
        if self.flow_error.samples:
            flow = self.flow_error.result(over)
            out |= {"mAVE": flow.mave, "OccScore": occ_score(rays.rayiou, flow.mave), "flow": asdict(flow)}
            out["flow"]["over"] = over
        if self.without_flow:
            out["samples without predicted flow"] = len(self.without_flow)
        if self.raypq.samples:
            panoptic = self.raypq.result()
            out |= {"RayPQ": panoptic.raypq, "panoptic": asdict(panoptic)}
        out |= {"voxels seen": asdict(seen), "voxels unseen": asdict(unseen), "all voxels": asdict(everywhere)}
        out |= {"rays": asdict(rays), "absent classes": absent}
        return _plain(out)


def total(parts: Sequence[Any], classes: Classes) -> Any:
    """The sum of tallies of drives or processes, an empty one of none."""
    out = Scores(classes)
    for part in parts:
        out = out + part
    return out


def _plain(value: Any) -> Any:
    """NaN -> None, and only what JSON has."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
