"""Sweeps, tracks and keyframes of a scene -> labels, and labels -> the files that others read. X Y Z voxels."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..geometry import OCC3D_GRID, Grid
from ..types import OCC3D, OPENOCC
from .aggregate import Cloud, Settings, aggregate
from .coarse import coarser, coarser_flow, coarser_mask
from .flow import flow_of
from .scene import Keyframe, Sweep, Track
from .voxelise import Rule, voxelise

SCALES = (2, 4, 8)
OCC3D_FOLDER, OPENOCC_FOLDER = "gts", "openocc_v2"
# Occ3D -> OpenOcc v2, by name; "others" has no counterpart there
_OPENOCC_OF = np.array([OPENOCC.id(n) if n in OPENOCC.names else OPENOCC.free for n in OCC3D.names] + [OPENOCC.free])


@dataclass(frozen=True)
class Label:
    """What is true at one keyframe, as far as the LiDAR of its scene tells."""

    token: str
    grid: Grid
    occ3d: Tensor  # (X, Y, Z) uint8, ids of OCC3D
    openocc: Tensor  # (X, Y, Z) uint8, ids of OPENOCC: "others" became the voxel's second choice, or free
    flow: Tensor  # (X, Y, Z, 2) float32 m/s over ground, car frame; 0 for what does not move, NaN = not known
    mask_lidar: Tensor  # (X, Y, Z) bool: a point or a beam of the scene was there
    mask_camera: Tensor  # (X, Y, Z) bool: a camera of the keyframe sees it, and mask_lidar

    def coarser(self, factor: int) -> "Label":
        """The same in voxels `factor` times as long; `labels.coarse` has the rules."""
        occ3d, openocc = self.occ3d.numpy(), self.openocc.numpy()
        low = coarser(occ3d, OCC3D, factor)
        low_open = coarser(openocc, OPENOCC, factor)
        flow = coarser_flow(self.flow.numpy(), openocc, low_open, OPENOCC, factor)
        masks = (coarser_mask(mask.numpy(), occ3d, low, OCC3D, factor) for mask in (self.mask_lidar, self.mask_camera))
        arrays = (low, low_open, flow, *masks)
        tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
        return Label(self.token, self.grid.coarser(factor), *tensors)


def label_scene(
    sweeps: Iterable[Sweep],
    tracks: Sequence[Track],
    keyframes: Sequence[Keyframe],
    grid: Grid = OCC3D_GRID,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    rule: Rule = Rule(),  # noqa: B008
    threads: int | None = None,
) -> Iterator[Label]:
    """The labels of a scene's keyframes, in their order.

    sweeps: of the whole scene, read once, with or without labels; tracks: its annotated objects. threads: keyframes
    that are worked on at once, None: as many as torch has. ValueError from `aggregate`.
    """
    cloud = aggregate(sweeps, tracks, settings)
    threads = torch.get_num_threads() if threads is None else threads
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque = deque()
        for keyframe in keyframes:
            ahead.append(pool.submit(label_keyframe, cloud, keyframe, grid, rule))
            if len(ahead) > threads:  # not all at once: a label is 9 MB
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def label_keyframe(cloud: Cloud, keyframe: Keyframe, grid: Grid = OCC3D_GRID, rule: Rule = Rule()) -> Label:  # noqa: B008
    """The label of one keyframe of an aggregated scene."""
    voxels = voxelise(cloud, keyframe, grid, rule)
    flow = flow_of(voxels.labels, voxels.track, [thing.track for thing in cloud.objects], keyframe, grid)
    openocc = _OPENOCC_OF[voxels.others].astype(np.uint8)
    # a second choice that moves has nobody's velocity
    flow[(voxels.others != voxels.labels) & np.isin(openocc, OPENOCC.moving_ids)] = np.nan
    arrays = (voxels.labels, openocc, flow, voxels.mask_lidar, voxels.mask_camera)
    return Label(keyframe.token, grid, *(torch.from_numpy(array) for array in arrays))


# ---- files


def paths(root: Path | str, scene: str, token: str) -> tuple[Path, Path]:
    """The Occ3D and the OpenOcc v2 file of a keyframe."""
    return tuple(Path(root) / folder / scene / token / "labels.npz" for folder in (OCC3D_FOLDER, OPENOCC_FOLDER))


def finished(root: Path | str, scene: str, token: str) -> bool:
    """Does a keyframe have both? Files are renamed into place when whole, and the coarser ones before these two."""
    return all(path.exists() for path in paths(root, scene, token))


def write(label: Label, root: Path | str, scene: str, scales: Sequence[int] = SCALES, overwrite: bool = False) -> None:
    """Writes a keyframe's files below root, each beside and renamed.

    gts/<scene>/<token>/labels.npz (Occ3D): semantics, mask_lidar, mask_camera, uint8 (X, Y, Z).
    openocc_v2/<scene>/<token>/labels.npz (OpenOcc v2): semantics uint8, flow float32 (X, Y, Z, 2), NaN where not known.
    Beside each, labels_1_2.npz, 1_4 and 1_8 (`scales`): semantics, flow, mask_lidar, mask_camera of the coarser grids.
    A folder whose labels.npz exists is left as it is, unless `overwrite`.
    """
    for path, kind in zip(paths(root, scene, label.token), ("occ3d", "openocc")):
        if path.exists() and not overwrite:
            continue
        for scale in (*scales, 1):  # the finest last: it says that all is there
            low = label if scale == 1 else label.coarser(scale)
            arrays = {"semantics": getattr(low, kind).numpy()}
            if scale > 1 or kind == "openocc":
                arrays["flow"] = low.flow.numpy()
            if scale > 1 or kind == "occ3d":
                arrays |= {m: getattr(low, m).numpy().astype(np.uint8) for m in ("mask_lidar", "mask_camera")}
            _save(path if scale == 1 else path.with_name(f"labels_1_{scale}.npz"), arrays)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            np.savez_compressed(file, **arrays)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
