"""What every measure shares: counts over samples that may be added, stored and taken up again."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..types import TABLES, Classes

UNLABELLED = 255  # in a truth: nobody knows what is there


class Tally:
    """Counts of the samples that were added so far. A measure counts in its `add` and reads in its `result`.

    All counts are integers, so that a sum does not depend on who counted what: `a + b` is the tally of one process
    that had seen the samples of both.
    """

    def __init__(self, classes: Classes, **counts: tuple[int, ...]):
        """counts: the shape of each array of counts."""
        self.classes = classes
        self.samples: set[str] = set()
        self.counts = {name: np.zeros(shape, np.int64) for name, shape in counts.items()}

    def __add__(self, other: "Tally") -> "Tally":
        """The tally of all samples of both. ValueError if they count other things or a sample stands in both."""
        if type(self) is not type(other) or self.classes != other.classes:
            raise ValueError(f"tallies: {self._name()} and {other._name()} count different things")
        twice = self.samples & other.samples
        if twice:
            raise ValueError(f"tallies: {len(twice)} samples stand in both, among them {min(twice)}")
        both = type(self)(self.classes)
        both.samples = self.samples | other.samples
        both.counts = {name: counts + other.counts[name] for name, counts in self.counts.items()}
        return both

    def missing(self, expected: Iterable[str]) -> list[str]:
        """Those of the expected samples that were never added, in their order."""
        return [sample for sample in expected if sample not in self.samples]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` makes the same tally of; only lists, numbers and words."""
        return {
            "measure": type(self).__name__,
            "classes": self.classes.table,
            "samples": sorted(self.samples),
            "counts": {name: counts.tolist() for name, counts in self.counts.items()},
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Tally":
        """ValueError where it is another measure's, or holds counts of another shape."""
        if stored.get("measure") != cls.__name__ or stored.get("classes") not in TABLES:
            raise ValueError(
                f"tallies: expected a stored {cls.__name__} of a known table of classes, "
                f"got {stored.get('measure')!r} of {stored.get('classes')!r}"
            )
        tally = cls(TABLES[stored["classes"]])
        tally.samples = set(stored["samples"])
        for name, counts in tally.counts.items():
            told = np.array(stored["counts"][name], np.int64)
            if told.shape != counts.shape:
                raise ValueError(f"tallies: stored {name} is of shape {told.shape}, expected {counts.shape}")
            tally.counts[name] = told
        return tally

    def _name(self) -> str:
        return f"{type(self).__name__} of {self.classes.table}"

    def _new(self, sample: str, *tables: Classes) -> None:
        """Refuses a sample that is there already, and what speaks of other classes. Call before counting."""
        if sample in self.samples:
            raise ValueError(f"sample {sample} is scored twice: it has been added to this tally before")
        for classes in tables:
            if classes != self.classes:
                raise ValueError(
                    f"sample {sample}: classes of {classes.table} cannot be scored by {self._name()}; prediction, "
                    "truth and tally must share one table"
                )

    def _scored(self) -> None:
        if not self.samples:
            raise ValueError(f"{self._name()}: no sample was added, there is nothing to tell")


def mean(values: np.ndarray) -> float:
    """The mean of those that are not NaN; NaN if none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole in float64, NaN where there is nothing."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0)
