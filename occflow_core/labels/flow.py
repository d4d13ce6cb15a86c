"""How fast what fills a voxel moves. X Y Z voxels."""

from collections.abc import Sequence

import numpy as np
import torch

from ..geometry import Grid
from ..types import OCC3D
from .scene import Keyframe, Track

_MOVES = np.isin(np.arange(OCC3D.free + 1), OCC3D.moving_ids)


def flow_of(
    labels: np.ndarray, track: np.ndarray, tracks: Sequence[Track], keyframe: Keyframe, grid: Grid
) -> np.ndarray:
    """(X, Y, Z, 2) float32 m/s: velocity over ground of the point of the rigid object in the middle of each voxel, x
    and y of the car frame at the keyframe.

    labels (X, Y, Z) OCC3D; track (X, Y, Z): which of `tracks` fills a voxel, -1 none. The object's turning is in it:
    v + w x r. Zero for classes that do not move and for free space; NaN where a class that moves has no track, or its
    track no motion (`Track.motion`).
    """
    flow = np.zeros((*labels.shape, 2), np.float32)
    moving = _MOVES[labels]
    flow[moving] = np.nan
    at = np.argwhere(moving & (track >= 0))
    whose = track[tuple(at.T)]
    centres = (at + 0.5) * np.array(grid.voxel) + np.array(grid.low)
    world_from_car = keyframe.world_from_car.to(torch.float64).numpy()
    turn = world_from_car[:3, :3].T
    for i in np.unique(whose):
        mine = whose == i
        pose, (velocity, spin) = tracks[i].at(keyframe.stamp), tracks[i].motion(keyframe.stamp)
        if pose is None:
            continue
        middle = turn @ (pose[:3, 3] - world_from_car[:3, 3])
        seen = turn @ velocity + np.cross(turn @ spin, centres[mine] - middle)
        flow[tuple(at[mine].T)] = seen[:, :2]
    return flow
