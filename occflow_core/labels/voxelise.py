"""A scene's cloud -> classes of voxels at one keyframe, and which voxels the LiDAR and the cameras have seen.

The rule, voxel by voxel:

- **occupied** if points fall into it (but not if all it got are stray points of a neighbour's surface: `least_share`);
- else **free** if beams passed through it on their way to what they hit: through `free_parts` of its 2 x 2 x 2 parts,
  or through `free_beside` of them where it touches an occupied voxel; and if the ground, or what it would be between
  the ground around, does not go through it. For beams graze voxels that hold a surface without hitting it: counting
  every crossed voxel as free (Occ3D) made 43 % of what stands inside mask_lidar free in a synthetic scene whose car
  waits at a crossing;
- else **unknown**: neither mask has it, and files, which know no third state, say free.

The class is a vote of area, not of points: each class counts in how many of the voxel's 4 x 4 x 4 parts it has a point,
so what a beam hit often does not outweigh what it hit once, and a thin thing counts for all of its surface. Ties go to
objects; `thing_weight` above 1 favours them further (1.5 cost 0.4 points of mIoU against exact truth). Ids are never
averaged. A point outside of the grid is in no voxel.

P points, R rays, X Y Z voxels, V = X * Y * Z of them, C classes of OCC3D.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..geometry import Grid
from ..ops import observed
from ..types import OCC3D
from .aggregate import ALWAYS, IS_GROUND, IS_THING, Cloud, Placed, _numba, look_up
from .scene import Keyframe

_FAR = 120.0  # m from the car, beyond which a sweep cannot say much about the grid


@dataclass(frozen=True)
class Rule:
    """How voxels get their state and class."""

    thing_weight: float = 1.0  # votes of objects, ground and the rest having 1
    least_share: float = 0.01  # of the points of its fullest face neighbour, below which a voxel's points are strays
    free_parts: int = 1  # of 8 that beams must have crossed
    free_beside: int = 7  # the same for a voxel that touches a filled one
    ground_margin: float = 0.1  # m above and below a voxel, in which the ground keeps it from being free
    beside: float = 0.05  # s between a keyframe and the sweep that is its own


@dataclass(frozen=True)
class Voxels:
    """One keyframe."""

    labels: np.ndarray  # (X, Y, Z) uint8 OCC3D
    others: np.ndarray  # (X, Y, Z) uint8 OCC3D: second choice where the label is "others", for tables without; or free
    track: np.ndarray  # (X, Y, Z) int32, which of the cloud's objects fills it, -1 none
    mask_lidar: np.ndarray  # (X, Y, Z) bool
    mask_camera: np.ndarray  # (X, Y, Z) bool


def voxelise(cloud: Cloud, keyframe: Keyframe, grid: Grid, rule: Rule = Rule()) -> Voxels:  # noqa: B008
    """The voxels of one keyframe."""
    shape = grid.shape
    car_from_local = _car_from_local(cloud, keyframe)
    voxels_from_car = np.eye(4)
    voxels_from_car[:3, :3] = np.diag(1 / np.array(grid.voxel))
    voxels_from_car[:3, 3] = -np.array(grid.low) / np.array(grid.voxel)
    voxels_from_local = voxels_from_car @ car_from_local
    halves = np.diag([2.0, 2.0, 2.0, 1.0])

    present = []  # (number, object, voxels_from_box)
    for i, thing in enumerate(cloud.objects):
        pose = thing.at(keyframe.stamp)
        if pose is not None:
            local = pose.copy()
            local[:3, 3] -= cloud.origin
            present.append((i, thing, voxels_from_local @ local))
    owner = _owners(present, shape)

    bits = np.zeros((len(grid), OCC3D.free), np.uint64)
    hits = np.zeros(len(grid), np.uint32)
    away = np.abs(cloud.stamps - keyframe.stamp)
    now = int(np.argmin(away)) if away.min() <= rule.beside * 1e9 else -2
    vote(cloud.points, cloud.classes, cloud.when, now, voxels_from_local, shape, owner, bits, hits)
    nobody = np.full((1, 1, 1), -1, np.int32)
    votes = []
    for i, thing, voxels_from_box in present:
        kind = np.full(len(thing.points), OCC3D.id(thing.track.name), np.uint8)
        always = np.full(len(thing.points), ALWAYS, np.int32)
        vote(thing.points, kind, always, now, voxels_from_box, shape, nobody, bits, hits)
        votes.append(_places(thing.points, voxels_from_box, shape, i))

    kept = np.flatnonzero(hits)
    kept = kept[hits[kept] >= rule.least_share * _fullest_neighbour(hits, kept, shape)]
    weight = np.where(IS_THING, rule.thing_weight, 1.0)
    area = _counted(bits[kept]) * weight
    labels, second = (np.full(len(grid), OCC3D.free, np.uint8) for _ in range(2))
    labels[kept] = winner(area)
    others = OCC3D.id("others")
    area[:, others] = 0
    second[kept] = np.where(area.max(1, initial=0) > 0, winner(area), OCC3D.free)
    filled = (labels != OCC3D.free).reshape(shape)

    free = np.zeros(tuple(2 * n for n in shape), bool)
    parts_from_local = halves @ voxels_from_local
    reach = np.linalg.norm(cloud.eyes @ car_from_local[:3, :3].T + car_from_local[:3, 3], axis=1) < _FAR
    for s in np.flatnonzero(reach):
        carve(cloud.eyes[s : s + 1], cloud.ends[cloud.begin[s] : cloud.begin[s + 1]], parts_from_local, free)
    # where an object stands now, beams that passed before it came or after it left say nothing
    free[owner >= 0] = False
    for _, thing, voxels_from_box in present:
        carve(thing.starts, thing.stops, halves @ voxels_from_box, free)
    nx, ny, nz = shape
    parts = free.reshape(nx, 2, ny, 2, nz, 2).sum((1, 3, 5))
    crossed = parts >= np.where(_beside(filled), rule.free_beside, rule.free_parts)
    crossed &= ~_doubtful(cloud, np.linalg.inv(car_from_local), grid, rule.ground_margin)
    mask_lidar = filled | crossed
    mask_camera = np.zeros(shape, bool)
    if keyframe.cameras is not None:
        used = torch.ones(len(keyframe.cameras), dtype=torch.bool) if keyframe.used is None else keyframe.used
        # Occ3D: what a camera looks at is observed if the LiDAR knows what it is
        mask_camera = observed(torch.from_numpy(filled), grid, keyframe.cameras, used).numpy() & mask_lidar
    return Voxels(
        labels=labels.reshape(shape),
        others=np.where(labels == others, second, labels).reshape(shape),
        track=_tracks(votes, labels, cloud.objects).reshape(shape),
        mask_lidar=mask_lidar,
        mask_camera=mask_camera,
    )


def _counted(bits: np.ndarray) -> np.ndarray:
    """Bits that are set in uint64 (n, C), (n, C)."""
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)
    return ones[np.ascontiguousarray(bits).view(np.uint8)].reshape(*bits.shape, 8).sum(-1)


def winner(area: np.ndarray) -> np.ndarray:
    """Votes (n, C) -> class (n,) uint8. Ties: objects, then buildings and plants, then ground; the smaller id."""
    order = np.argsort(np.where(IS_THING, 0, np.where(IS_GROUND, 2, 1)), kind="stable")
    return order[np.argmax(area[:, order], axis=1)].astype(np.uint8)


def vote(points, classes, when, now, voxels_from_local, shape, owner, bits, hits) -> None:
    """Adds points (P, 3) to bits (V, C) uint64, one bit for each 4 x 4 x 4th of a voxel, and to hits (V,).

    Left out: points outside of the grid; points whose instant `when` is not ALWAYS and not `now`; and buildings and
    plants inside the box of an object that stands there now, by owner (2X, 2Y, 2Z), -1 where nobody does.
    """
    if owner.shape == (1, 1, 1):
        owner = np.broadcast_to(owner, tuple(2 * n for n in shape))
    if _numba() is not None:
        _numba().vote(points, classes, when, now, voxels_from_local, shape, owner, IS_GROUND, bits, hits)
        return
    place = points.astype(np.float64) @ voxels_from_local[:3, :3].T + voxels_from_local[:3, 3]
    with np.errstate(invalid="ignore"):
        good = ((place >= 0) & (place < shape)).all(1) & ((when == ALWAYS) | (when == now))
    place, classes = place[good], classes[good]
    free = owner[tuple((2 * place).astype(np.int64).T)] < 0
    place, classes = place[free | IS_GROUND[classes]], classes[free | IS_GROUND[classes]]
    cell = place.astype(np.int64)
    at = (cell[:, 0] * shape[1] + cell[:, 1]) * shape[2] + cell[:, 2]
    part = (4 * (place - cell)).astype(np.int64) @ [16, 4, 1]
    np.bitwise_or.at(bits, (at, classes), np.uint64(1) << part.astype(np.uint64))
    np.add.at(hits, at, 1)


def carve(starts, ends, parts_from_local, free) -> None:
    """Marks in free (X, Y, Z) bool every cell that the way from starts (R, 3), or one start (1, 3) for all, to ends
    (R, 3) crosses before the cell of its end. Segments may begin and end outside."""
    if not len(ends):
        return
    if _numba() is not None:
        _numba().carve(starts, ends, parts_from_local, free)
        return
    turn, shift = parts_from_local[:3, :3], parts_from_local[:3, 3]
    size = np.array(free.shape)
    for start, end in zip(np.broadcast_to(starts, ends.shape) @ turn.T + shift, ends @ turn.T + shift):
        # the borders that it crosses, in order: between two of them it is in one cell
        cuts = [np.array([0.0, 1.0])]
        for a, b in zip(start, end):
            low, high = np.ceil(min(a, b)), np.floor(max(a, b))
            if high >= low and a != b:
                cuts.append((np.arange(low, high + 1) - a) / (b - a))
        cuts = np.sort(np.concatenate(cuts).clip(0, 1))
        middle = (cuts[1:] + cuts[:-1])[cuts[1:] > cuts[:-1]] / 2
        cells = np.floor(start + middle[:, None] * (end - start)).astype(np.int64)
        cells = cells[((cells >= 0) & (cells < size)).all(1) & (cells != np.floor(end)).any(1)]
        free[tuple(cells.T)] = True


def _car_from_local(cloud: Cloud, keyframe: Keyframe) -> np.ndarray:
    world_from_car = keyframe.world_from_car.to(torch.float64).numpy()
    car_from_local = np.eye(4)
    car_from_local[:3, :3] = world_from_car[:3, :3].T
    car_from_local[:3, 3] = world_from_car[:3, :3].T @ (cloud.origin - world_from_car[:3, 3])
    return car_from_local


def _beside(filled: np.ndarray) -> np.ndarray:
    """Does a voxel touch a filled one, at least at a corner? (X, Y, Z) bool."""
    for axis in range(3):
        wide = np.pad(filled, [(int(a == axis), int(a == axis)) for a in range(3)])
        n = filled.shape[axis]
        filled = np.logical_or.reduce([np.take(wide, range(i, i + n), axis) for i in range(3)])
    return filled


def _doubtful(cloud: Cloud, local_from_car: np.ndarray, grid: Grid, margin: float) -> np.ndarray:
    """Voxels (X, Y, Z) that the ground goes through, as far as anybody can guess."""
    centres = grid.centres(torch.float64).numpy().reshape(-1, 3)
    places = centres @ local_from_car[:3, :3].T + local_from_car[:3, 3]
    height = look_up(cloud.floor, cloud.floor_low, cloud.floor_cell, places)
    with np.errstate(invalid="ignore"):  # unknown: no doubt
        return (np.abs(places[:, 2] - height) <= grid.voxel[2] / 2 + margin).reshape(grid.shape)


def _owners(present, shape) -> np.ndarray:
    """(2X, 2Y, 2Z) int32: whose box the middle of an eighth of a voxel is in, -1 nobody's."""
    owner = np.full(tuple(2 * n for n in shape), -1, np.int32)
    for i, thing, voxels_from_box in present:
        half = np.array(thing.track.size) / 2
        middle, span = 2 * voxels_from_box[:3, 3], 2 * np.abs(voxels_from_box[:3, :3]) @ half
        low = np.clip(np.floor(middle - span).astype(int), 0, owner.shape)
        high = np.clip(np.ceil(middle + span).astype(int), 0, owner.shape)
        if (high <= low).any():
            continue
        axes = np.meshgrid(*(np.arange(a, b) + 0.5 for a, b in zip(low, high)), indexing="ij")
        box_from_voxels = np.linalg.inv(voxels_from_box)
        place = np.stack(axes, -1) / 2 @ box_from_voxels[:3, :3].T + box_from_voxels[:3, 3]
        part = owner[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        part[(np.abs(place) <= half).all(-1)] = i
    return owner


def _places(points, voxels_from_box, shape, number) -> np.ndarray:
    """(n, 3) int64: voxel, object, how many of its points fall there."""
    place = np.floor(points @ voxels_from_box[:3, :3].T + voxels_from_box[:3, 3]).astype(np.int64)
    place = place[((place >= 0) & (place < shape)).all(1)]
    at, count = np.unique((place[:, 0] * shape[1] + place[:, 1]) * shape[2] + place[:, 2], return_counts=True)
    return np.stack([at, np.full_like(at, number), count], 1)


def _tracks(votes, labels: np.ndarray, objects: tuple[Placed, ...]) -> np.ndarray:
    """(V,) int32: of the objects of the winning class the one with the most points there."""
    track = np.full(len(labels), -1, np.int32)
    if not votes:
        return track
    rows = np.concatenate(votes)
    kinds = np.array([OCC3D.id(thing.track.name) for thing in objects])
    rows = rows[labels[rows[:, 0]] == kinds[rows[:, 1]]]
    rows = rows[np.argsort(rows[:, 2], kind="stable")]  # the last one written stays
    track[rows[:, 0]] = rows[:, 1]
    return track


def _fullest_neighbour(hits: np.ndarray, kept: np.ndarray, shape) -> np.ndarray:
    """Points of the fullest of the six neighbours of voxels (n,)."""
    wide = np.pad(hits.reshape(shape), 1)
    x, y, z = (i + 1 for i in np.unravel_index(kept, shape))
    steps = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
    return np.max([wide[x + a, y + b, z + c] for a, b, c in steps], axis=0)
