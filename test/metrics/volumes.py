"""Small volumes and the challenge's own sample label, for tests of measures."""

import numpy as np
import pytest
import torch
from recorded import shared
from torch import Tensor

from occflow_core.geometry import OCC3D_GRID, Grid
from occflow_core.metrics import Hits
from occflow_core.types import OCC3D, OPENOCC, Classes, Occupancy, Prediction

EYES = torch.tensor([[0.9858, 0.0, 1.8402], [5.9858, 0.0, 1.8402]], dtype=torch.float64)  # of the worked numbers


def truth(labels, classes: Classes = OCC3D, flow=None, seen=None, grid: Grid | None = None) -> Occupancy:
    labels = volume(labels)
    seen = torch.ones(labels.shape, dtype=torch.bool) if seen is None else seen
    return Occupancy(grid or grid_of(labels), classes, labels, flow, seen)


def prediction(labels, classes: Classes = OCC3D, flow=None, grid: Grid | None = None) -> Prediction:
    labels = volume(labels)
    return Prediction(grid or grid_of(labels), classes, labels, (labels != classes.free).float(), flow)


def volume(labels) -> Tensor:
    """A list of labels becomes a row of voxels along x."""
    labels = torch.as_tensor(labels, dtype=torch.uint8)
    return labels if labels.ndim == 3 else labels[:, None, None]


def grid_of(labels: Tensor) -> Grid:
    return OCC3D_GRID if tuple(labels.shape) == OCC3D_GRID.shape else Grid((0, 0, 0), (0.4, 0.4, 0.4), labels.shape)


def shifted(labels: Tensor, by: int, fill) -> Tensor:
    """Toward +x; the new cells hold `fill`."""
    out = torch.full_like(labels, fill)
    out[by:] = labels[: len(labels) - by]
    return out


def rays(labels, distances, flow=None, classes: Classes = OPENOCC) -> Hits:
    """Hits told ray by ray."""
    labels = torch.tensor(labels, dtype=torch.uint8)
    flow = None if flow is None else torch.tensor(flow, dtype=torch.float32)
    return Hits(classes, labels, torch.tensor(distances, dtype=torch.float32), torch.arange(len(labels)), flow)


def challenge_label() -> tuple[Tensor, Tensor]:
    """labels (200, 200, 16) uint8 of Occ3D and its mask_camera, bool; skips the test where the file is absent."""
    path = shared() / "occ_labels" / "occ3d_challenge2023.npz"
    if not path.is_file():
        pytest.skip(f"needs the sample label of the CVPR 2023 challenge at {path}")
    with np.load(path, allow_pickle=False) as file:
        return torch.from_numpy(file["semantics"]), torch.from_numpy(file["mask_camera"].astype(bool))


def openocc_of(labels: Tensor) -> Tensor:
    """Occ3D ids -> OpenOcc v2 ids by name; what has no name there is free."""
    ids = [OPENOCC.id(n) if n in OPENOCC.names else OPENOCC.free for n in OCC3D.names] + [OPENOCC.free]
    return torch.tensor(ids, dtype=torch.uint8)[labels.long()]
