"""Sweeps of a whole scene put together: the standing world in one cloud, each annotated object in a frame of its own.

P points, S sweeps, M boxes, R rays, T tracks. Places are float32 in a local world frame (the world's axes, `origin`
subtracted), poses float64. Departures from the published label makers (Occ3D, arXiv 2304.14365; OpenOcc; Tian et al.'s
`data_converter.py`), because they lose points or invent classes:

- tracks are carried through time as smooth curves, not as straight lines from keyframe to keyframe;
- points just outside a box are neither glued to the object nor burnt into the world (`ring`); ground under an object
  stays ground;
- what was labelled as a mover and lies in no box counts at its own instant only, instead of drawing a trail;
- the ground between the rings of the LiDAR is filled where it is flanked by ground (`filled`);
- every point keeps its ray, also one that got no class: where a beam passed, nothing stands.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from ..types import OCC3D
from .scene import UNLABELLED, Sweep, Track

GROUND = ("driveable_surface", "other_flat", "sidewalk", "terrain")
IS_GROUND = np.array([name in GROUND for name in OCC3D.names])
IS_MOVER = np.array([name in OCC3D.moving for name in OCC3D.names])
IS_THING = np.array([name not in GROUND + ("manmade", "vegetation") for name in OCC3D.names])  # boxes may hold these
ALWAYS = -1  # `when` of a point of the standing world


@dataclass(frozen=True)
class Settings:
    """How sweeps are put together; lengths in metres."""

    ego: tuple = ((-1.2, -1.15, -0.5), (4.0, 1.15, 2.4))  # low and high corner of the car itself, car frame
    far: float = 110.0  # longest ray from the LiDAR that is believed
    grow: float = 0.1  # by which boxes are grown to hold all of their object
    ring: float = 0.3  # up to here outside a box points are of the object if their label says so, else of nobody
    carried: float = 0.5  # s that an object is followed before its first and after its last annotation: to keep it
    # out of the world, not to label it
    near: float = 0.5  # an unlabelled point takes the class of the nearest labelled one up to here
    near_box: float = 0.2  # the same in the ring of a box
    foot: float = 0.12  # above the ground, below which a point in a box is ground
    cell: float = 0.2  # of the map of the ground
    gap: float = 1.6  # widest hole in the ground that is filled
    slope: float = 0.15  # steepest ground across a hole
    guess: float = 10.0  # how far from known ground its height is guessed, to doubt free space there
    without_labels: tuple[str, str] = ("driveable_surface", "manmade")  # ground and the rest, where no sweep of a
    # scene has labels


@dataclass(frozen=True)
class Placed:
    """All that the LiDAR found of one track, in the frame of its box."""

    track: Track
    points: np.ndarray  # (P, 3) float32
    starts: np.ndarray  # (R, 3) float32: pieces of rays inside the grown box,
    stops: np.ndarray  # (R, 3) float32: up to where they hit something or left it
    gone: tuple[int, ...] = ()  # stamps, ns, at which beams went through where it should have stood

    def at(self, stamp: int) -> np.ndarray | None:
        """world_from_box as the track tells it, unless it was seen to be gone since, or not to have come yet."""
        return None if _went(self.track, self.gone, stamp) else self.track.at(stamp)


@dataclass(frozen=True)
class Cloud:
    """A scene, ready to be cut into voxels at any keyframe."""

    origin: np.ndarray  # (3,) float64, world
    stamps: np.ndarray  # (S,) int64 ns, rising
    eyes: np.ndarray  # (S, 3) float64, local: where the LiDAR was
    begin: np.ndarray  # (S + 1,) int64: sweep s has ends[begin[s]:begin[s + 1]]
    ends: np.ndarray  # (R, 3) float32, local: every hit, whatever it is
    points: np.ndarray  # (P, 3) float32, local: hits and filled ground that count as the world
    classes: np.ndarray  # (P,) uint8, OCC3D
    when: np.ndarray  # (P,) int32: ALWAYS, or the only sweep at whose instant the point is there
    objects: tuple[Placed, ...]
    floor_low: np.ndarray  # (2,) float64, local: corner of
    floor: np.ndarray  # (X, Y) float64, local: the ground's height in squares of `floor_cell`, also where it was only
    # guessed from what lies around; NaN far from any ground
    floor_cell: float


def aggregate(sweeps: Iterable[Sweep], tracks: Sequence[Track], settings: Settings = Settings()) -> Cloud:  # noqa: B008
    """A scene's sweeps, in any order, -> Cloud.

    Classes: a labelled point has its own, or its box's class if it is in one and its label is no ground, building or
    plant. An unlabelled point in a box belongs to that object; any other takes the class of the nearest labelled point
    of the standing world within `settings.near`, and without one it is only the end of a ray. Where no sweep has
    labels, points outside of boxes are `settings.without_labels`, told apart by height. ValueError without any sweep.
    """
    seen, origin = [], None
    for sweep in sweeps:
        if origin is None:
            origin = sweep.world_from_car[:3, 3].to("cpu", torch.float64).numpy().copy()
        seen.append(_look(sweep, tracks, origin, settings))
    if not seen:
        raise ValueError("labels: a scene needs at least one LiDAR sweep, got none")
    seen.sort(key=lambda s: s.stamp)
    labelled = any(s.labelled for s in seen)
    begin = np.cumsum([0] + [len(s.points) for s in seen])
    ends, label, box, depth = (
        np.concatenate([getattr(s, name) for s in seen]) for name in ("points", "label", "box", "depth")
    )
    known = np.concatenate([np.full(len(s.points), s.labelled) for s in seen])
    sweep = np.repeat(np.arange(len(seen), dtype=np.int32), np.diff(begin))
    eyes, cars = np.stack([s.eye for s in seen]), np.stack([s.car for s in seen])
    stamps = np.array([s.stamp for s in seen], dtype=np.int64)
    gone = [tuple(s.stamp for s in seen if i in s.gone) for i in range(len(tracks))]
    for i, track in enumerate(tracks):
        for s in range(len(seen)) if gone[i] else ():
            if _went(track, gone[i], stamps[s]):  # somebody else's: of no object, and not sure to be of the world
                mine = box[begin[s] : begin[s + 1]]
                mine[mine == i] = -2
    del seen

    # the standing world and the objects, as far as labels tell
    thing = np.zeros(len(ends), bool)
    thing[known] = IS_THING[label[known]]
    of_object = known & thing & (box >= 0)
    stays = known & (label != UNLABELLED) & ~of_object
    only = stays & IS_MOVER[np.where(stays, label, 0)]
    if not labelled:
        label, stays = _by_height(ends, box, cars, settings)
        known = known | stays
    map_low, height, kind = ground_map(ends[stays], label[stays], settings.cell)

    # what labels do not tell: ground below objects is ground, the rest of a box is the object
    loose = np.flatnonzero(~known)
    in_box = box[loose] >= 0
    floor = look_up(height, map_low, settings.cell, ends[loose])
    wide_low, wide, _ = ground_map(ends[stays], label[stays], 8 * settings.cell)
    floor = np.where(np.isnan(floor), look_up(wide, wide_low, 8 * settings.cell, ends[loose]), floor)
    with np.errstate(invalid="ignore"):  # no ground known there: the object's
        under = in_box & (ends[loose, 2] - floor < settings.foot)
    of_object[loose[in_box & (depth[loose] <= settings.grow) & ~under]] = True
    limit = np.where(in_box & ~under, settings.near_box, settings.near).astype(np.float32)
    limit[in_box & (depth[loose] <= settings.grow) & ~under] = 0
    limit[box[loose] == -2] = 0  # somewhere near where an object would have been carried to: of nobody
    if len(loose):
        base = stays & ~only
        refs, kinds = thinned(ends[base], label[base], 0.1)
        for _ in range(2):  # twice: what was found in the first round lends its class to what lies further out
            found = nearest(ends[loose], limit, refs, kinds)
            new = found != UNLABELLED
            label[loose[new]] = found[new]
            stays[loose[new]] = True
            limit[new] = 0
            refs, kinds = thinned(ends[loose[new]], found[new], 0.1)

    map_low, height, kind = ground_map(ends[stays], label[stays], settings.cell)
    extra, extra_kind = filled(map_low, height, kind, settings)
    objects = [
        _placed(track, gone[i], stamps, np.flatnonzero(of_object & (box == i)), ends, begin, eyes, origin, settings)
        for i, track in enumerate(tracks)
    ]
    return Cloud(
        origin=origin,
        stamps=stamps,
        eyes=eyes,
        begin=begin,
        ends=ends,
        points=np.concatenate([ends[stays], extra]),
        classes=np.concatenate([label[stays], extra_kind]),
        when=np.append(np.where(only, sweep, ALWAYS)[stays], np.full(len(extra), ALWAYS)).astype(np.int32),
        objects=tuple(objects),
        floor_low=map_low,
        floor=surroundings(height, int(settings.guess / settings.cell)),
        floor_cell=settings.cell,
    )


# ---- one sweep


@dataclass(frozen=True)
class _Seen:
    points: np.ndarray  # (P, 3) float32, local
    label: np.ndarray  # (P,) uint8
    box: np.ndarray  # (P,) int32: track; -1 none; -2 where a track may have been, that nobody annotated
    depth: np.ndarray  # (P,) float32 m outside of that box (below 0: inside)
    eye: np.ndarray  # (3,), local
    car: np.ndarray  # (3,), local
    stamp: int  # ns
    labelled: bool
    gone: tuple[int, ...]  # tracks that should stand somewhere, where beams went through


def _look(sweep: Sweep, tracks: Sequence[Track], origin: np.ndarray, settings: Settings) -> _Seen:
    raw = sweep.points[:, :3].to("cpu", torch.float64).numpy()
    label = np.full(len(raw), UNLABELLED, np.uint8) if sweep.labels is None else sweep.labels.cpu().numpy()
    good = np.isfinite(raw).all(1)
    good &= (np.where(good[:, None], raw, 0) ** 2).sum(1) < settings.far**2
    if sweep.labels is not None:
        good &= label != UNLABELLED
    raw, label = raw[good], label[good]
    car_from_lidar, world_from_car = (
        pose.to("cpu", torch.float64).numpy() for pose in (sweep.car_from_lidar, sweep.world_from_car)
    )
    car = raw @ car_from_lidar[:3, :3].T + car_from_lidar[:3, 3]
    own = ((car > settings.ego[0]) & (car < settings.ego[1])).all(1)
    car, label = car[~own], label[~own]
    local_from_car = world_from_car.copy()
    local_from_car[:3, 3] -= origin
    points = (car @ local_from_car[:3, :3].T + local_from_car[:3, 3]).astype(np.float32)
    eye = (local_from_car @ car_from_lidar)[:3, 3]
    poses, empty = [track.at(sweep.stamp) for track in tracks], []
    for i, (pose, track) in enumerate(zip(poses, tracks)):
        if pose is None or not track.assumed(sweep.stamp) or np.linalg.norm(pose[:3, 3] - origin - eye) > 60:
            continue
        if _through(points, eye, pose, track, origin):
            empty.append(i)
            poses[i] = None
    there = [i for i, pose in enumerate(poses) if pose is not None]
    box, depth = np.full(len(points), -1, np.int32), np.zeros(len(points), np.float32)
    if there:
        box_from_local, half = boxes([poses[i] for i in there], [tracks[i] for i in there], origin)
        kinds = np.array([OCC3D.id(tracks[i].name) for i in there], np.uint8)
        place, depth = inside(points, label, box_from_local, half, kinds, settings.grow, settings.ring)
        box = np.where(place >= 0, np.array(there, np.int32)[place], -1).astype(np.int32)
    gone = [
        (pose, track)
        for track, now in zip(tracks, poses)
        if now is None and (pose := track.at(sweep.stamp, settings.carried)) is not None
    ]
    if gone and sweep.labels is None:
        box_from_local, half = boxes([pose for pose, _ in gone], [track for _, track in gone], origin)
        place, _ = inside(
            points, label, box_from_local, half, np.zeros(len(gone), np.uint8), settings.ring, settings.ring
        )
        box[(place >= 0) & (box < 0)] = -2
    labelled, car = sweep.labels is not None, local_from_car[:3, 3]
    return _Seen(points, label, box, depth, eye, car, sweep.stamp, labelled, tuple(empty))


def _through(points, eye, pose, track: Track, origin) -> bool:
    """Do beams go through the middle of a box as if nothing stood there? (Windows let a few pass.)"""
    box_from_local, half = boxes([pose], [track], origin)
    ray, _, leave = crossings(points, eye, box_from_local, 0.7 * half)
    passed = int((leave < 1).sum())
    if passed < 10:
        return False
    local = points @ box_from_local[0, :3, :3].T + box_from_local[0, :3, 3]
    hits = int((np.abs(local) <= half[0]).all(1).sum())
    return 2 * hits < passed


def _went(track: Track, gone: Sequence[int], stamp: int) -> bool:
    """Was it seen to be gone between its nearest annotation and a stamp?"""
    if not gone:
        return False
    near = track.annotated(stamp)
    return any(min(near, stamp) <= g <= max(near, stamp) for g in gone)


def boxes(poses: Sequence[np.ndarray], tracks: Sequence[Track], origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Poses world_from_box -> box_from_local (M, 4, 4) and half edges (M, 3)."""
    box_from_local = np.tile(np.eye(4), (len(poses), 1, 1))
    for place, pose in zip(box_from_local, poses):
        place[:3, :3] = pose[:3, :3].T
        place[:3, 3] = -pose[:3, :3].T @ (pose[:3, 3] - origin)
    return box_from_local, np.array([track.size for track in tracks]).reshape(-1, 3) / 2


def inside(points, wanted, box_from_local, half, kinds, grow, ring) -> tuple[np.ndarray, np.ndarray]:
    """Which box a point belongs to: (P,) int32, -1 none, and how far it is outside of it, (P,) m, below 0: inside.

    points (P, 3) float32; wanted (P,) uint8, its class or UNLABELLED; boxes (M, 4, 4), half edges (M, 3), classes
    kinds (M,). Up to `grow` outside any box does, up to `ring` only one of the wanted class (of any class for an
    unlabelled point). Boxes of the wanted class come first, then the one that it is deepest in.
    """
    box, depth = np.full(len(points), -1, np.int32), np.zeros(len(points), np.float32)
    if _numba() is not None:
        _numba().inside(points, wanted, box_from_local, half, kinds, grow, ring, box, depth)
        return box, depth
    best = np.full(len(points), 1e9)
    for m, (pose, edges) in enumerate(zip(box_from_local, half)):
        out = (np.abs(points @ pose[:3, :3].T + pose[:3, 3]) - edges).max(1)
        same = wanted == kinds[m]
        rank = out - 1000.0 * same
        better = (out <= ring) & ((out <= grow) | same | (wanted == UNLABELLED)) & (rank < best)
        best[better], box[better], depth[better] = rank[better], m, out[better]
    return box, depth


# ---- classes by what is near


def thinned(points: np.ndarray, classes: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """One point of each class in each cell of space."""
    if not len(points):
        return points, classes
    place = np.floor((points - points.min(0)) / cell).astype(np.int64)
    size = place.max(0) + 1
    key = ((place[:, 0] * size[1] + place[:, 1]) * size[2] + place[:, 2]) * 256 + classes
    first = np.unique(key, return_index=True)[1]
    return points[first], classes[first]


def nearest(points: np.ndarray, limit: np.ndarray, refs: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Class of the nearest reference closer than limit (P,) m, (P,) uint8; UNLABELLED where there is none.

    Ground lends its class only to what is at its height: up to 15 cm, and 10 cm more for each metre away.
    """
    label = np.full(len(points), UNLABELLED, np.uint8)
    if not len(refs) or not len(points):
        return label
    if _numba() is not None:
        cell, low = 0.3, refs.min(0).astype(np.float64) - 1e-3
        place = ((refs - low) // cell).astype(np.int64)
        steps = place.max(0) + 1
        cells = (place[:, 0] * steps[1] + place[:, 1]) * steps[2] + place[:, 2]
        room = 1 << int(np.ceil(np.log2(2 * len(refs) + 1)))
        heads, keys, links = np.full(room, -1, np.int64), np.zeros(room, np.int64), np.empty(len(refs), np.int64)
        _numba().table(cells, heads, keys, links)
        _numba().nearest(points, limit, heads, keys, links, refs, kinds, cell, low, steps, IS_GROUND, label)
        return label
    for p, point in enumerate(points):
        away = refs - point
        square = (away**2).sum(1)
        near = square < limit[p] ** 2
        near &= ~IS_GROUND[kinds] | (np.abs(away[:, 2]) <= 0.15 + 0.1 * np.hypot(away[:, 0], away[:, 1]))
        if near.any():
            label[p] = kinds[np.argmin(np.where(near, square, np.inf))]
    return label


# ---- the ground


def ground_map(points: np.ndarray, classes: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points -> low corner (2,) and maps (X, Y) of the ground's mean height (NaN: none) and class."""
    on = IS_GROUND[classes]
    points, classes = points[on], classes[on]
    if not len(points):
        return np.zeros(2), np.full((1, 1), np.nan), np.zeros((1, 1), np.uint8)
    low = np.floor(points[:, :2].min(0).astype(np.float64) / cell) * cell
    place = ((points[:, :2] - low) / cell).astype(np.int64)
    shape = tuple(place.max(0) + 1)
    flat = place[:, 0] * shape[1] + place[:, 1]
    size = shape[0] * shape[1]
    number = np.bincount(flat, minlength=size)
    with np.errstate(invalid="ignore"):
        height = np.bincount(flat, points[:, 2], size) / number
    kind, most = np.zeros(size, np.uint8), np.zeros(size, np.int64)
    for c in np.flatnonzero(IS_GROUND):
        votes = np.bincount(flat[classes == c], minlength=size)
        kind[votes > most] = c
        most = np.maximum(most, votes)
    return low, height.reshape(shape), kind.reshape(shape)


def filled(low, height, kind, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Points (P, 3) float32 and classes of ground for the holes of its map.

    A hole is filled where ground lies on both sides of it along x, y or a diagonal, at most `settings.gap` apart and
    no steeper than `settings.slope` (10 cm are always let pass: kerbs); the narrowest way counts.
    """
    reach = int(round(settings.gap / settings.cell))
    out, out_kind = np.full(height.shape, np.nan), np.zeros(height.shape, np.uint8)
    if _numba() is not None:
        _numba().fill(height, kind, reach, settings.slope * settings.cell, out, out_kind)
    else:
        _fill(height, kind, reach, settings.slope * settings.cell, out, out_kind)
    x, y = np.nonzero(~np.isnan(out))
    places = [low[0] + (x + 0.5) * settings.cell, low[1] + (y + 0.5) * settings.cell, out[x, y]]
    return np.stack(places, 1).astype(np.float32), out_kind[x, y]


def _fill(height, kind, reach, slope, out, out_kind) -> None:
    def first(x, y, dx, dy):
        for i in range(1, reach + 1):
            u, v = x + i * dx, y + i * dy
            if not (0 <= u < height.shape[0] and 0 <= v < height.shape[1]):
                return None
            if not np.isnan(height[u, v]):
                return i, height[u, v], kind[u, v]
        return None

    for x, y in zip(*np.nonzero(np.isnan(height))):
        best = 2 * reach + 1
        for dx, dy in ((1, 0), (0, 1), (1, 1), (1, -1)):
            one, two = first(x, y, dx, dy), first(x, y, -dx, -dy)
            if one is None or two is None or one[0] + two[0] >= best:
                continue
            if abs(one[1] - two[1]) <= slope * (one[0] + two[0]) + 0.1:
                best = one[0] + two[0]
                out[x, y] = (one[1] * two[0] + two[1] * one[0]) / best
                out_kind[x, y] = one[2] if one[0] <= two[0] else two[2]


def surroundings(height: np.ndarray, reach: int) -> np.ndarray:
    """A map (X, Y) whose holes, up to `reach` cells from what is known, take the mean of what lies around: of the 4
    finer cells' known ones, level by level until known, then back down smoothly."""
    if reach < 1 or np.isnan(height).all():
        return height
    x, y = height.shape
    wide = np.pad(height, ((0, x % 2), (0, y % 2)), constant_values=np.nan)
    known = ~np.isnan(wide)
    parts = wide.reshape(wide.shape[0] // 2, 2, wide.shape[1] // 2, 2)
    number = (~np.isnan(parts)).sum((1, 3))
    coarse = np.where(number > 0, np.nansum(parts, (1, 3)) / np.maximum(number, 1), np.nan)
    coarse = surroundings(coarse, reach // 2)
    # from the coarser map: bilinear where it can be, else its own cell
    u = [(np.arange(n) + 0.5) / 2 - 0.5 for n in wide.shape]
    i = [np.clip(np.floor(v).astype(int), 0, n - 1) for v, n in zip(u, coarse.shape)]
    j = [np.clip(a + 1, 0, n - 1) for a, n in zip(i, coarse.shape)]
    f, g = (np.clip(v - a, 0, 1) for v, a in zip(u, i))
    corners = [coarse[np.ix_(a, b)] for a in (i[0], j[0]) for b in (i[1], j[1])]
    weights = [np.outer(a, b) for a in (1 - f, f) for b in (1 - g, g)]
    sure = [np.where(np.isnan(c), 0, w) for c, w in zip(corners, weights)]
    total = sum(sure)
    mean = sum(np.nan_to_num(c) * w for c, w in zip(corners, sure)) / np.maximum(total, 1e-9)
    return np.where(known, wide, np.where(total > 1e-6, mean, np.nan))[:x, :y]


def look_up(height, low, cell, points) -> np.ndarray:
    """The ground's height at points (P, 3), NaN where nobody knows it."""
    place = np.floor((points[:, :2] - low) / cell).astype(np.int64)
    there = ((place >= 0) & (place < height.shape)).all(1)
    place[~there] = 0
    return np.where(there, height[place[:, 0], place[:, 1]], np.nan)


def _by_height(ends, box, cars, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Labels (P,) and which points have one, for a scene without any: ground or not, by height.

    Ground is what lies up to 20 cm above a low, smooth surface: the 10th percentile of what is within 1 m of the car's
    own ground in squares of 4 m, holes taking the mean of their neighbours.
    """
    cell, outside = 4.0, box == -1
    low = np.floor(ends[:, :2].min(0) / cell) * cell if len(ends) else np.zeros(2)
    place = ((ends[:, :2] - low) / cell).astype(np.int64)
    shape = tuple(place.max(0) + 1) if len(ends) else (1, 1)
    centres = np.stack(np.meshgrid(*((np.arange(n) + 0.5) * cell for n in shape), indexing="ij"), -1) + low
    closest = np.argmin(((centres[:, :, None] - cars[:, :2]) ** 2).sum(-1), axis=2)
    floor = cars[closest, 2]  # of the car, where it was nearest
    around = outside & (np.abs(ends[:, 2] - floor[place[:, 0], place[:, 1]]) < 1.0)
    flat = place[around, 0] * shape[1] + place[around, 1]
    order = np.lexsort((ends[around, 2], flat))
    cells, first, number = np.unique(flat[order], return_index=True, return_counts=True)
    height = np.full(shape[0] * shape[1], np.nan)
    height[cells] = ends[around, 2][order][first + number // 10]
    height = height.reshape(shape)
    while np.isnan(height).any() and not np.isnan(height).all():
        wide = np.pad(height, 1, constant_values=np.nan)
        parts = np.stack([wide[i : i + shape[0], j : j + shape[1]] for i in range(3) for j in range(3)])
        number = (~np.isnan(parts)).sum(0)
        mean = np.where(number > 0, np.nansum(parts, 0) / np.maximum(number, 1), np.nan)
        height = np.where(np.isnan(height), mean, height)
    # between the middles of the squares: bilinear
    u = np.clip((ends[:, :2] - low) / cell - 0.5, 0, np.array(shape) - 1)
    i = np.minimum(u.astype(np.int64), np.maximum(np.array(shape) - 2, 0))
    j = np.minimum(i + 1, np.array(shape) - 1)
    f = u - i
    surface = (height[i[:, 0], i[:, 1]] * (1 - f[:, 1]) + height[i[:, 0], j[:, 1]] * f[:, 1]) * (1 - f[:, 0]) + (
        height[j[:, 0], i[:, 1]] * (1 - f[:, 1]) + height[j[:, 0], j[:, 1]] * f[:, 1]
    ) * f[:, 0]
    ground, rest = (OCC3D.id(name) for name in settings.without_labels)
    on = ends[:, 2] < surface + 0.2
    return np.where(on, ground, rest).astype(np.uint8), outside


# ---- the objects


def _placed(track, gone, stamps, mine, ends, begin, eyes, origin, settings: Settings) -> Placed:
    """Points and pieces of rays of one track, from all sweeps, in the frame of its box."""
    points, starts, stops = [np.empty((0, 3), np.float32)], [], []
    grown = np.array(track.size) / 2 + settings.ring
    for s, stamp in enumerate(stamps):
        pose = None if _went(track, gone, stamp) else track.at(stamp)
        if pose is None:
            continue
        box_from_local, _ = boxes([pose], [track], origin)
        turn, shift = box_from_local[0, :3, :3], box_from_local[0, :3, 3]
        own = mine[np.searchsorted(mine, begin[s]) : np.searchsorted(mine, begin[s + 1])]
        points.append((ends[own] @ turn.T + shift).astype(np.float32))
        if np.linalg.norm(turn @ eyes[s] + shift) > settings.far:
            continue
        rays = ends[begin[s] : begin[s + 1]]
        ray, enter, leave = crossings(rays, eyes[s], box_from_local, grown[None])
        eye = turn @ eyes[s] + shift
        way = rays[ray] @ turn.T + shift - eye
        starts.append((eye + way * enter[:, None]).astype(np.float32))
        stops.append((eye + way * leave[:, None]).astype(np.float32))
    nothing = [np.empty((0, 3), np.float32)]
    return Placed(track, np.concatenate(points), *(np.concatenate(nothing + p) for p in (starts, stops)), gone)


def crossings(ends, eye, box_from_local, half) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rays from eye (3,) to ends (R, 3) that cross a box (1, 4, 4) of half edges (1, 3): which, and the fractions of
    their way at which they come in and leave (1: end) it."""
    if _numba() is not None:
        ray, box = np.empty((2, len(ends)), np.int64)
        enter, leave = np.empty((2, len(ends)))
        n = _numba().crossings(ends, eye, box_from_local, half, ray, box, enter, leave)
        return ray[:n], enter[:n], leave[:n]
    turn, shift = box_from_local[0, :3, :3], box_from_local[0, :3, 3]
    start, way = turn @ eye + shift, (ends - eye) @ turn.T
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (-half[0] - start) / way, (half[0] - start) / way
    along = way == 0  # never crosses these sides: between them always or never
    between = np.abs(start) <= half[0]
    low = np.where(along, np.where(between, -np.inf, np.inf), np.minimum(a, b)).max(1)
    high = np.where(along, np.where(between, np.inf, -np.inf), np.maximum(a, b)).min(1)
    enter, leave = np.maximum(low, 0), np.minimum(high, 1)
    ray = np.flatnonzero(enter < leave)
    return ray, enter[ray], leave[ray]


@cache
def _numba():
    """The compiled loops, or None where numba is not installed."""
    try:
        from . import kernels_numba
    except ImportError:
        return None
    return kernels_numba
