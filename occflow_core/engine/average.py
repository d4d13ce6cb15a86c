"""The average world: what every voxel is most often. A system that looks at its pictures should do better."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..data.nuscenes import NuScenes
from ..geometry import Grid
from ..metrics.tally import TABLES
from ..types import Prediction
from . import share

FORMAT = "occflow-average"  # the key of our JSON in the file's metadata


def average_world(world: NuScenes, scenes: Sequence[str], labels: str, progress: bool = True) -> tuple[Prediction, int]:
    """The majority label of every voxel over the keyframes of scenes in which it is seen, with a flow of zero; and how
    many keyframes that were. Ties go to the smaller id; what is never seen is free. The share of votes is its score.

    Under `torchrun` every process counts its part of the scenes. Errors as `NuScenes.occupancy`; ValueError for no
    keyframes.
    """
    from tqdm import tqdm

    samples = [sample for scene in share.mine(scenes) for sample in world.samples(scene)]

    def count():
        votes, truth = None, None
        for sample in tqdm(samples, unit=" keyframes", desc="average world", disable=not progress):
            truth = world.occupancy(sample, labels)
            if votes is None:
                votes = torch.zeros(len(truth.grid), truth.classes.free + 1, dtype=torch.int32)
            here = truth.labels.reshape(-1, 1).long()
            votes.scatter_add_(1, here, truth.seen.reshape(-1, 1).int())
        return votes, truth

    votes, truth = share.all_or_none(count)
    kinds = share.told(None if truth is None else votes.shape)
    shape = next((kind for kind in kinds if kind is not None), None)
    if shape is None:
        raise ValueError(f"the average world needs keyframes, got those of {len(scenes)} scenes: none")
    if truth is None:  # more processes than scenes: the grid and the classes are another's
        votes, truth = torch.zeros(shape, dtype=torch.int32), world.occupancy(world.samples(scenes[0])[0], labels)
    votes = share.added(votes)
    keyframes = sum(share.told(len(samples)))
    seen = votes.sum(1)
    label = votes.argmax(1)  # of equal ones the first
    most = votes.gather(1, label[:, None])[:, 0]
    free = truth.classes.free
    label[seen == 0] = free
    score = torch.where(label == free, 0.0, most / seen.clamp(min=1))
    shape = truth.grid.shape
    return (
        Prediction(
            truth.grid,
            truth.classes,
            label.to(torch.uint8).reshape(shape),
            score.reshape(shape),
            torch.zeros(*shape, 2) if truth.flow is not None else None,
        ),
        keyframes,
    )


def save(average: Prediction, path: Path | str, source: str) -> None:
    """Write the map so that `load` has it back; it appears whole or not at all. source: what it was counted over."""
    from safetensors.torch import save_file

    path = Path(path)
    about = {"classes": average.classes.table, "grid": asdict(average.grid), "source": source}
    about["flow"] = average.flow is not None
    # one byte for the share of votes is enough, and the file ships beside weights
    tensors = {"labels": average.labels.contiguous(), "score": (average.score * 255).round().to(torch.uint8)}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, beside, metadata={FORMAT: json.dumps(about)})
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path | str) -> tuple[Prediction, str]:
    """The map of a file that `save` wrote, and its source. ValueError in one sentence where it is none."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no map of the average world at {path}; `occflow evaluate --make-average` makes one")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[FORMAT])
            labels, score = file.get_tensor("labels"), file.get_tensor("score")
        grid, classes = Grid(**about["grid"]), TABLES[about["classes"]]
        flow = torch.zeros(*labels.shape, 2) if about["flow"] else None
        average, source = Prediction(grid, classes, labels, score.float() / 255, flow), str(about["source"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no map of the average world ({error})") from error
    return average, source
