"""The file that the 2024 challenge's server takes: what the rays of every sample meet. Written only; we never read one.

Format: github.com/OpenDriveLab/OccNet, branch `challenge`, README: a gzip of a pickled dict with `results` = {token:
{`pcd_cls` uint8 (R,), `pcd_dist` float16 (R,) m, `pcd_flow` float16 (R, 2) m/s}}, rays origin by origin, in each by
elevation, then by azimuth.
"""

import gzip
import os
import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..metrics import Hits

FIELDS = ("method", "team", "authors", "e-mail", "institution / company", "country / region")
Rays = dict[str, np.ndarray]


def rays(hits: Hits) -> Rays:
    """What a submission says about one sample. A prediction without flow says zero, as the challenge's baseline."""
    flow = np.zeros((len(hits.label), 2), np.float16)
    if hits.flow is not None:
        flow = hits.flow.cpu().numpy().astype(np.float16)
    return {
        "pcd_cls": hits.label.cpu().numpy(),
        "pcd_dist": hits.distance.cpu().numpy().astype(np.float16),
        "pcd_flow": flow,
    }


def write(path: Path | str, samples: Iterable[tuple[str, Rays]], about: dict[str, str]) -> None:
    """The file, from (token, rays) one by one: a validation split is gigabytes, and only one sample is in memory.

    about: values of FIELDS; those left out are empty. ValueError for others.
    """
    unknown = sorted(set(about) - set(FIELDS))
    if unknown:
        raise ValueError(f"submission: {', '.join(unknown)} is no field of it; there are: {', '.join(FIELDS)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # without a name and a time inside, equal predictions give equal files
        with beside.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as zipped:
            pickler = _Pickler(zipped, 4)
            pickler.fast = True  # remembers nothing of what it wrote, so that it may go
            pickler.dump({name: about.get(name, "") for name in FIELDS} | {"results": _Told(samples)})
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class _Told:
    """Becomes a plain dict when it is read; is never one here."""

    def __init__(self, items: Iterable[tuple[str, Rays]]):
        self.items = items

    def __reduce__(self):
        return dict, (), None, None, iter(self.items)


class _Pickler(pickle.Pickler):
    """Arrays as `numpy.ndarray(shape, type, bytes)`, which every NumPy knows: 1.x cannot read what 2.x pickles."""

    def reducer_override(self, what):
        if isinstance(what, np.ndarray):
            return np.ndarray, (what.shape, what.dtype.str, what.tobytes())
        return NotImplemented
