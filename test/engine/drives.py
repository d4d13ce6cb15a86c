"""Small drives with labels and a model of random weights, for tests of what scores them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from data import layout
from systems.small import CONFIG, build

from occflow_core.data.nuscenes import NuScenes
from occflow_core.geometry import OCC3D_GRID
from occflow_core.runtime import Model, save
from occflow_core.types import OCC3D, OPENOCC

FULL = replace(CONFIG, grid=OCC3D_GRID, classes=OPENOCC.table)  # a tiny network that fills the labels' grid


def write(root: Path, scenes: int = 3, keyframes: int = 3) -> Path:
    """A data set whose labels are a road, walls and two cars that are somewhere else in each keyframe.

    OpenOcc's files have instances, as they do: of things, and one of every other class.
    """
    layout.write(root, scenes, keyframes)
    world = NuScenes(root, progress=False)
    for s, scene in enumerate(world.scenes):
        for k, sample in enumerate(world.samples(scene)):
            _label(world.label_path(sample, "openocc"), OPENOCC, s, k)
            _label(world.label_path(sample, "occ3d"), OCC3D, s, k)
    (root / "v1.0-mini" / "splits.json").write_text(
        f'{{"here_train": ["{world.scenes[0]}"], "here_val": {list(world.scenes[1:])}}}'.replace("'", '"')
    )
    return root


def _label(path: Path, classes, s: int, k: int) -> None:
    labels = np.full(OCC3D_GRID.shape, classes.free, np.uint8)
    labels[:, :, 0] = classes.id("driveable_surface")
    labels[:, 140 + s : 142 + s, :8] = classes.id("manmade")
    flow = np.zeros((*OCC3D_GRID.shape, 2), np.float32)
    at = slice(108 + 4 * k, 116 + 4 * k)
    labels[at, 90:95, 1:5], flow[at, 90:95, 1:5] = classes.id("car"), (4.0 + s, 0.5)
    labels[60:62, 99:101, 1:5] = classes.id("pedestrian")
    flow[60:62, 99:101, 1:5] = np.nan if k == 1 else 0.3
    path.parent.mkdir(parents=True, exist_ok=True)
    if classes is OPENOCC:
        instances = np.where(labels == classes.free, 0, labels + 10).astype(np.uint8)
        instances[at, 90:92, 1:5] = 1
        np.savez_compressed(path, semantics=labels.astype(np.int32), flow=flow, instances=instances)
    else:
        seen = np.zeros(labels.shape, np.uint8)
        seen[50:] = 1
        np.savez_compressed(path, semantics=labels, mask_camera=seen, mask_lidar=seen)


def weights(path: Path, seed: int = 0) -> Path:
    """A file that `runtime.load("opus-nano", path)` takes."""
    save(build(FULL, seed), "opus-nano", "fast", path, trained=True)
    return path


def model(seed: int = 0) -> Model:
    return Model(build(FULL, seed).eval(), "small", True, "fast", f"seed {seed}")


def volumes(prediction) -> tuple[torch.Tensor, torch.Tensor]:
    return prediction.labels, prediction.flow
