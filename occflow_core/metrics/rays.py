"""Rays of a LiDAR that stood where the car's LiDAR was at the keyframes of a scene, cast into voxels.

Source: github.com/MCG-NJU/SparseOcc, `loaders/ray_metrics.py` and `loaders/ego_pose_dataset.py`; OpenDriveLab/OccNet,
branch `challenge`, has the same. K origins, R = K * 14,040 rays, X Y Z voxels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..geometry import Grid, rigid
from ..ops import cast
from ..types import Classes, Occupancy, Prediction

MOST = 8  # origins of one sample
NEAR = 39.0  # m: farther away in x or y an origin is not used
STEEP = 10  # elevations whose rays meet flat ground 1, 2, .. 10 heights away; then steps of the last difference
HIGHEST = 0.21  # rad: elevations are added until the last reaches it
AZIMUTHS = 360  # steps of one degree, counter-clockwise from straight ahead


@dataclass(frozen=True)
class Hits:
    """Where rays were stopped in one volume, origin by origin, in each by elevation, then by azimuth."""

    classes: Classes
    label: Tensor  # (R,) uint8; classes.free where a ray met nothing
    distance: Tensor  # (R,) float32 m, where the ray leaves the voxel that stopped it, or the grid
    voxel: Tensor  # (R,) int64: flat index of the voxel that stopped it, or of the last one inside
    flow: Tensor | None = None  # (R, 2) float32 m/s of that voxel; NaN = not known; None = the volume has none

    def half(self) -> "Hits":
        """As files for the challenge's server keep them: distance and flow rounded to float16."""
        flow = None if self.flow is None else self.flow.half().float()
        return Hits(self.classes, self.label, self.distance.half().float(), self.voxel, flow)


def hits(volume: Occupancy | Prediction, origins: Tensor) -> Hits:
    """Casts all rays from `origins` (K, 3), m, in the volume's frame and on its device.

    Whatever is not free stops a ray, a label beyond the table too (255, "nobody knows", as in the published code).
    ValueError for origins of another shape or not finite, for no origin, and for a batched volume.
    """
    if volume.labels.ndim != 3:
        raise ValueError(f"rays: expected one volume (X, Y, Z), got labels of {tuple(volume.labels.shape)}")
    if origins.ndim != 2 or origins.shape[1] != 3 or not len(origins) or not torch.isfinite(origins).all():
        raise ValueError(f"rays: expected finite origins (K, 3) with K > 0, got {tuple(origins.shape)}")
    start, way = _in_voxels(volume.grid, origins.to(volume.labels.device))
    distance, index = cast(volume.labels != volume.classes.free, start, way)
    _, ny, nz = volume.grid.shape
    voxel = (index[:, 0] * ny + index[:, 1]) * nz + index[:, 2]
    flow = None if volume.flow is None else volume.flow.reshape(-1, 2)[voxel].float()
    # in float32, as published: errors are compared with 1, 2 and 4 m to the last bit
    metres = distance.float() * volume.grid.voxel[0]
    return Hits(volume.classes, volume.labels.reshape(-1)[voxel], metres, voxel, flow)


def origins(world_from_lidar: Sequence[Tensor] | Tensor, reference: int, car_from_lidar: Tensor) -> Tensor:
    """Where the LiDAR stood at the keyframes of a scene, seen from the car at keyframe `reference`: (K, 3) float64 m.

    world_from_lidar (T, 4, 4) float64 of *all* keyframes of the scene in the order of time, for the choice depends on
    them; car_from_lidar (4, 4) the mounting. Those within 39 m in x and in y stay, the reference's own only if it does;
    of more than 8, eight are taken evenly. ValueError where poses are no rigid motions or the reference is none.
    """
    poses = torch.stack(list(world_from_lidar))
    if poses.dtype != torch.float64 or poses.shape[1:] != (4, 4) or not rigid.is_rigid(poses):
        raise ValueError(f"origins: expected rigid poses (T, 4, 4) float64, got {tuple(poses.shape)} {poses.dtype}")
    if not 0 <= reference < len(poses):
        raise ValueError(f"origins: {len(poses)} keyframes have no number {reference}")
    then = (rigid.inverse(poses[reference]) @ poses)[:, :3, 3]
    then[reference] = 0.0  # exactly
    places = rigid.apply(car_from_lidar.double(), then.float().double())  # float32 between, as published
    places = places[(places[:, :2].abs() < NEAR).all(1)]
    if len(places) > MOST:
        # numpy's: halves are rounded to even numbers
        places = places[np.round(np.linspace(0, len(places) - 1, MOST)).astype(np.int64)]
    return places


@cache
def directions() -> Tensor:
    """The rays of one origin, (14,040, 3) float32 of length 1, in the car frame: 39 elevations x 360 azimuths."""
    elevations = [-(math.pi / 2 - math.atan(k + 1)) for k in range(STEEP)]
    step = elevations[-1] - elevations[-2]
    while elevations[-1] < HIGHEST:
        elevations.append(elevations[-1] + step)
    e, a = np.meshgrid(np.array(elevations), np.deg2rad(np.arange(AZIMUTHS, dtype=np.float64)), indexing="ij")
    rays = np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], -1)
    return torch.from_numpy(rays.reshape(-1, 3).astype(np.float32))


def _in_voxels(grid: Grid, origins: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and ways of all rays, both (R, 3) float64 in voxels.

    As published to the bit: a voxel of float32's 0.4 m, and the two ends of a ray (1 m apart) cut to float32 before
    they are subtracted; grazing rays hang on it.
    """
    rays = directions().to(origins.device)
    start = origins.double()[:, None].expand(-1, len(rays), -1)
    # lists of floats would become float64, whose 0.4 is another
    low, voxel = (torch.tensor(v, dtype=torch.float32, device=origins.device) for v in (grid.low, grid.voxel))
    start, end = (((p - low) / voxel).float().double().reshape(-1, 3) for p in (start, start + rays))
    return start, end - start
