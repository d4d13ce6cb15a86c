"""Exact labels of one instant, from the geometry itself. X Y Z voxels, M actors.

- A voxel is occupied where a sample of a surface lies in it (samples at most 5 cm apart); interiors hold no surface and
  are free. Its class is the one with the largest area in it, the lowest id of occ3d-nuscenes where two are equal.
- Flow is the velocity over ground of the surface (the mean over the samples of the winning class), in the car frame,
  for classes that move; zero elsewhere. A person's limbs move with the person.
- `mask_lidar`: free voxels that a LiDAR ray of a keyframe within 5 s crossed, occupied ones in which a ray ended
  (points on actors travel with them). `mask_camera`: voxels that the cameras see, walking through the grid until the
  first occupied voxel, as Occ3D defines it; only where `mask_lidar` holds too, as in Occ3D's files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...geometry import OCC3D_GRID, Cameras, Grid, rigid
from ...ops.visibility import observed
from ...types import OCC3D, OPENOCC
from . import truth_numba as loops
from .lidar import Sweep
from .shade_numba import turned
from .tracer import Tracer
from .traffic import Traffic

SPACING = 0.05  # m between samples of a surface
_WINDOW = 5.0  # s before and after, in which sweeps count for mask_lidar
_H = 0.02  # s, half of the difference that gives velocities


@dataclass(frozen=True)
class Labels:
    """What the two kinds of label files hold."""

    semantics: np.ndarray  # (X, Y, Z) uint8, occ3d-nuscenes, free 17
    flow: np.ndarray  # (X, Y, Z, 2) float32 m/s
    mask_lidar: np.ndarray  # (X, Y, Z) uint8
    mask_camera: np.ndarray  # (X, Y, Z) uint8

    @property
    def openocc(self) -> np.ndarray:
        """(X, Y, Z) uint8 in openocc-v2, free 16; what Occ3D calls others has no class there and counts as free."""
        table = np.full(OCC3D.free + 1, OPENOCC.free, np.uint8)
        for k, name in enumerate(OCC3D.names):
            if name in OPENOCC.names:
                table[k] = OPENOCC.id(name)
        return table[self.semantics]


@dataclass(frozen=True)
class Shot:
    """A sweep with what stood around it."""

    time: float  # s
    sweep: Sweep
    world_from_lidar: np.ndarray  # (4, 4)
    who: list[int]  # numbers among all actors of those that `Sweep.actor` counts
    poses: np.ndarray  # (M, 4, 4) of those


def occupancy(
    tracer: Tracer, traffic: Traffic, time: float, world_from_car: np.ndarray, grid: Grid = OCC3D_GRID
) -> tuple[np.ndarray, np.ndarray]:
    """Semantics (X, Y, Z) uint8 and flow (X, Y, Z, 2) float32 of the world at a time in s."""
    car_from_world = rigid.inverse(torch.from_numpy(world_from_car)).numpy()
    low, voxel = np.array(grid.low), np.array(grid.voxel)
    reach = np.linalg.norm(np.abs([grid.low, grid.high]).max(0))
    area = np.zeros((*grid.shape, len(OCC3D.names)), np.float32)
    static = tracer.static
    places = turned(static.vertices, car_from_world[:3, :3].copy(), car_from_world[:3, 3].copy())
    n = len(static.faces)
    loops.stamp(places, static.faces, tracer.classes[:n], low, voxel, SPACING, area)
    shown = []
    before, now, after = (car_from_world @ traffic.poses(time + h) for h in (-_H, 0.0, _H))
    changes = (after - before)[:, :2] / (2 * _H)
    for actor, pose, change in zip(traffic.actors, now, changes):
        if np.linalg.norm(pose[:3, 3]) > reach + actor.model.reach:
            continue
        first, mesh = tracer.shape(actor, time)
        vertices = mesh.vertices @ pose[:3, :3].T + pose[:3, 3]
        speeds = mesh.vertices @ change[:, :3].T + change[:, 3]
        classes = tracer.classes[first : first + len(mesh.faces)]
        loops.stamp(vertices, mesh.faces, classes, low, voxel, SPACING, area)
        shown.append((vertices, speeds, mesh.faces, classes))
    labels = loops.winners(area, OCC3D.free)
    weight, motion = np.zeros(grid.shape, np.float32), np.zeros((*grid.shape, 2), np.float32)
    for vertices, speeds, faces, classes in shown:
        loops.stamp_motion(vertices, speeds, faces, classes, low, voxel, SPACING, labels, weight, motion)
    # parked vehicles share voxels with moving ones now and then: their samples have speed zero
    for kind in OCC3D.moving_ids:
        crowded = (labels == kind) & (weight > 0)
        weight[crowded] = np.maximum(weight[crowded], area[..., kind][crowded])
    flow = np.where(weight[..., None] > 0, motion / np.maximum(weight, 1e-12)[..., None], 0).astype(np.float32)
    flow[~np.isin(labels, OCC3D.moving_ids)] = 0
    return labels, flow


def masks(
    semantics: np.ndarray,
    sweeps: Sequence[Shot],
    time: float,
    poses: np.ndarray,
    world_from_car: np.ndarray,
    cameras: Cameras,
    grid: Grid = OCC3D_GRID,
) -> tuple[np.ndarray, np.ndarray]:
    """mask_lidar and mask_camera (X, Y, Z) uint8.

    sweeps: those of keyframes; poses (A, 4, 4): world_from_actor of all actors at `time` s; cameras (N) in the car
    frame of `time`, each at its own stamp.
    """
    car_from_world = rigid.inverse(torch.from_numpy(world_from_car)).numpy()
    low, voxel = np.array(grid.low), np.array(grid.voxel)
    empty = semantics == OCC3D.free
    seen = np.zeros(grid.shape, bool)
    for shot in sweeps:
        sweep, world_from_lidar = shot.sweep, shot.world_from_lidar
        if abs(shot.time - time) > _WINDOW + 1e-6:
            continue
        car_from_lidar = car_from_world @ world_from_lidar
        local = sweep.points[:, :3].astype(np.float64)
        points = turned(local, car_from_lidar[:3, :3].copy(), car_from_lidar[:3, 3].copy())
        loops.observe(car_from_lidar[:3, 3].copy(), points, empty, seen, low, voxel)
        for number in np.unique(sweep.actor[sweep.actor >= 0]):
            mine = sweep.actor == number
            now_from_then = car_from_world @ poses[shot.who[number]] @ np.linalg.inv(shot.poses[number])
            world = sweep.points[mine, :3] @ world_from_lidar[:3, :3].T + world_from_lidar[:3, 3]
            moved = world @ now_from_then[:3, :3].T + now_from_then[:3, 3]
            index, inside = grid.index(torch.from_numpy(moved))
            x, y, z = index[inside].numpy().T
            filled = ~empty[x, y, z]
            seen[x[filled], y[filled], z[filled]] = True
    used = torch.ones(len(cameras), dtype=torch.bool)
    camera = observed(torch.from_numpy(~empty), grid, cameras, used).numpy()
    return seen.astype(np.uint8), (camera & seen).astype(np.uint8)
