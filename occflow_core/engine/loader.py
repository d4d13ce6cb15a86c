"""Batches as a pure function of (seed, number): the place in the data is a number, and going on is exact.

Lanes are counted over all processes. "stream": each lane follows drives, one keyframe a batch; drives are handed out so
that the lane which is through first gets the next one. "window": each lane gets a keyframe with its past, by itself.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data import augment, windows
from ..data.nuscenes import Moment, NuScenes
from ..geometry import Grid
from ..runtime.prepare import prepare
from ..types import NANO, Clip, Frame, Occupancy
from .run import Data

LONGEST_GAP = 2.0  # s between two keyframes that follow each other
_ORDER, _DRIVE, _WINDOW, _COLOURS = range(4)  # draws that must not be the same numbers


@dataclass(frozen=True)
class Turn:
    """What one lane gets in one batch."""

    sample: str  # token of the keyframe
    before: str | None  # of the keyframe that the lane was given before; None: fresh
    draw: tuple[int, ...]  # the seed of what is drawn once for a drive (or a window)


class StreamPlan:
    """Which keyframe a lane is given in which batch, for ever."""

    def __init__(self, scenes: list[tuple[str, ...]], lanes: int, parts: int, seed: int):
        """scenes: the keyframes of each, in the order of time."""
        self.scenes, self.parts, self.seed = scenes, parts, seed
        self.drives: list[list[tuple[int, tuple[str, ...], int]]] = [[] for _ in range(lanes)]  # begin, samples, number
        self.free = [(0, lane) for lane in range(lanes)]  # when a lane is through with what it has
        self.handed, self.epoch = 0, 0

    def at(self, number: int) -> list[Turn]:
        while self.free[0][0] <= number:
            self._hand_out()
        turns = []
        for drives in self.drives:
            begin, samples, drive = next(d for d in reversed(drives) if d[0] <= number)
            k = number - begin
            turns.append(Turn(samples[k], samples[k - 1] if k else None, (self.seed, _DRIVE, drive)))
        return turns

    def _hand_out(self) -> None:
        """One epoch: every keyframe once."""
        rng = np.random.default_rng([self.seed, _ORDER, self.epoch])
        drives = []
        for samples in self.scenes:
            first = int(rng.integers(-(-len(samples) // self.parts)))
            drives += [samples[:first]] if first else []
            drives += windows.sequences(samples[first:], self.parts)
        for place in rng.permutation(len(drives)):
            begin, lane = heapq.heappop(self.free)
            self.drives[lane].append((begin, drives[place], self.handed))
            self.handed += 1
            heapq.heappush(self.free, (begin + len(drives[place]), lane))
        self.epoch += 1


class WindowPlan:
    """The keyframes of all scenes in an order that is new in every epoch."""

    def __init__(self, scenes: list[tuple[str, ...]], lanes: int, seed: int):
        self.samples, self.lanes, self.seed = [s for scene in scenes for s in scene], lanes, seed

    def at(self, number: int) -> list[Turn]:
        turns = []
        for count in range(number * self.lanes, (number + 1) * self.lanes):
            epoch, place = divmod(count, len(self.samples))
            order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(len(self.samples))
            turns.append(Turn(self.samples[order[place]], None, (self.seed, _WINDOW, count)))
        return turns


class Batches(Dataset):
    """Batch number -> (Clip, Occupancy) of this process' lanes, on the CPU, without colours changed."""

    def __init__(
        self,
        world: NuScenes,
        data: Data,
        config: Any,
        resize: str,
        seed: int,
        lanes: range,
        all_lanes: int,
    ):
        """config: the system's; lanes: those of this process, of all there are. ValueError where the labels do not fit
        the config, or the split has no keyframes."""
        self.world, self.data, self.config, self.resize, self.lanes = world, data, config, resize, lanes
        scenes = [part for scene in world.split(data.train) for part in _unbroken(world, scene)]
        if not scenes:
            raise ValueError(f"split {data.train} of {world.folder} has no keyframes to train on")
        if data.window == "stream":
            self.plan = StreamPlan(scenes, all_lanes, data.parts, seed)
        else:
            self.plan = WindowPlan(scenes, all_lanes, seed)
        self.cache = _Cache(data.cache * 1e9 / max(data.workers, 1))
        fitted(self._truth(scenes[0][0]), config)  # says at once, and not in a worker, what does not fit

    def __getitem__(self, number: int) -> "tuple[Clip, Occupancy] | Failure":
        turns = self.plan.at(number)
        try:
            lanes = [self._lane(turns[lane]) for lane in self.lanes]
        except (ValueError, OSError) as problem:  # a sentence for the user, which a worker would wrap in its own
            return Failure(f"batch {number}: {problem}")
        return Clip.batch([clip for clip, _ in lanes]), _stacked([truth for _, truth in lanes])

    def _lane(self, turn: Turn) -> tuple[Clip, Occupancy]:
        rng = np.random.default_rng(turn.draw)
        now = self.world.keyframe(turn.sample)
        size = self.config.height, self.config.width
        cameras = self.world.rig(now)[0]
        view = augment.opus_view(rng, (cameras.height, cameras.width), size) if self.data.view else None
        new_from_car = _world_draw(self.data, rng)
        if self.data.window == "window":
            window = windows.opus(self.world, turn.sample, self.config.frames, rng)
            older = [self._frame(moment, view, 0) for moment in window[1:]]
            frames, after = [self._frame(window[0], view, self.config.sweeps), *older], None
        else:
            frames, after = [self._frame(now, view, self.config.sweeps)], None
            if turn.before is not None:
                before = self.world.keyframe(turn.before)
                # only where and when it was matters
                after = replace(frames[0], stamp=before.stamp, world_from_car=self.world.pose(before))
        clip, truth = Clip.of(frames, after), fitted(self._truth(turn.sample), self.config)
        return (clip, truth) if new_from_car is None else augment.moved(clip, truth, new_from_car)

    def _frame(self, moment: Moment, view: augment.View | None, sweeps: int) -> Frame:
        frame = self.cache.get((moment, sweeps), lambda: self.world.frame(moment, sweeps), _frame_bytes)
        if view is None:
            return prepare(frame, self.config.height, self.config.width, self.resize)
        return augment.seen(frame, view)

    def _truth(self, sample: str) -> Occupancy:
        return self.cache.get(sample, lambda: _Packed(self._label(sample)), len).unpacked()

    def _label(self, sample: str) -> Occupancy:
        label = self.world.occupancy(sample, self.data.labels, instances=self.config.panoptic)
        return replace(label, seen=self.world.occupancy(sample, "occ3d").seen) if self.data.camera_mask else label


@dataclass(frozen=True)
class Failure:
    """A batch that could not be loaded, and why."""

    sentence: str


def batches(dataset: Batches, workers: int, start: int, stop: int) -> Iterator[tuple[Clip, Occupancy]]:
    """Batches `start` to `stop` - 1, loaded ahead by `workers` processes.

    ValueError in one sentence for what cannot be loaded; RuntimeError for a worker that died.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        # spawned, not forked: threads of PyTorch and Embree do not survive a fork
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),  # else it would draw from the one that dropout draws from
    )
    try:
        for batch in loader:
            if isinstance(batch, Failure):
                raise ValueError(batch.sentence)
            yield batch
    except (OSError, EOFError) as problem:
        if not workers:
            raise
        raise RuntimeError(
            f"a worker that loads data was killed or exited unexpectedly, often for want of memory ({problem}); lower "
            "data.workers or data.cache"
        ) from problem


def coloured(clip: Clip, seed: int, number: int, lanes: range) -> Clip:
    """The clip with colours changed where its pictures are; each lane's draws are the same on any process."""
    images = [
        augment.photometric(pictures, np.random.default_rng([seed, _COLOURS, number, lane]))
        for lane, pictures in zip(lanes, clip.images, strict=True)
    ]
    return replace(clip, images=torch.stack(images))


def fitted(truth: Occupancy, config: Any) -> Occupancy:
    """The truth in the config's grid: as it is, or the part of it that the grid covers.

    ValueError for another table of classes, other voxels, or a grid that reaches beyond the labels.
    """
    if truth.classes.table != config.classes:
        raise ValueError(f"the labels are of {truth.classes.table}, the config says classes={config.classes}")
    there, wanted = truth.grid, config.grid
    if there == wanted:
        return truth
    first = [(a - b) / edge for a, b, edge in zip(wanted.low, there.low, there.voxel)]
    begin = [round(f) for f in first]
    whole = max(abs(f - b) for f, b in zip(first, begin)) < 1e-3
    end = [b + n for b, n in zip(begin, wanted.shape)]
    inside = min(begin) >= 0 and all(e <= n for e, n in zip(end, there.shape))
    if wanted.voxel != there.voxel or not whole or not inside:
        raise ValueError(f"the config's {wanted} is no part of the labels' {there}")
    return _cut(truth, wanted, tuple(slice(b, e) for b, e in zip(begin, end)))


def _cut(truth: Occupancy, grid: Grid, at: tuple[slice, ...]) -> Occupancy:
    flow, instances = (None if volume is None else volume[at] for volume in (truth.flow, truth.instances))
    return Occupancy(grid, truth.classes, truth.labels[at], flow, truth.seen[at], instances)


def _unbroken(world: NuScenes, scene: str) -> list[tuple[str, ...]]:
    """A scene's keyframes, cut where so much time is missing that a car would have forgotten (`runtime.Stream`)."""
    parts: list[list[str]] = []
    last = None
    for moment in world.keyframes(scene):
        if last is None or (moment.stamp - last) / NANO > LONGEST_GAP:
            parts.append([])
        parts[-1].append(moment.sample)
        last = moment.stamp
    return [tuple(part) for part in parts]


def _world_draw(data: Data, rng: np.random.Generator) -> Tensor | None:
    if not data.flips and not data.turn:
        return None
    x, y = (bool(rng.integers(2)) for _ in range(2)) if data.flips else (False, False)
    return augment.turn(float(rng.uniform(-data.turn, data.turn))) @ augment.flip(x, y)


def _stacked(truths: list[Occupancy]) -> Occupancy:
    return replace(
        truths[0],
        labels=torch.stack([t.labels for t in truths]),
        flow=None if truths[0].flow is None else torch.stack([t.flow for t in truths]),
        seen=torch.stack([t.seen for t in truths]),
        instances=None if truths[0].instances is None else torch.stack([t.instances for t in truths]),
    )


# ---- what stays in memory


class _Cache:
    """Values by key until the budget is used up; then what is there stays, and the rest is loaded each time."""

    def __init__(self, budget: float):
        self.budget, self.used, self.held = budget, 0, {}

    def get(self, key, load, size):
        if key in self.held:
            return self.held[key]
        value = load()
        if self.used + size(value) <= self.budget:
            self.held[key] = value
            self.used += size(value)
        return value

    def __reduce__(self):
        return _Cache, (self.budget,)  # what a process holds stays with it


def _frame_bytes(frame: Frame) -> int:
    return frame.images.numel() + (0 if frame.points is None else 4 * frame.points.numel())


class _Packed:
    """A label without its emptiness: 6 MB become 0.5 MB, exactly."""

    def __init__(self, truth: Occupancy):
        self.grid, self.classes = truth.grid, truth.classes
        flat = truth.labels.flatten()
        self.where = (flat != truth.classes.free).nonzero()[:, 0].int()
        self.labels = flat[self.where]
        self.unseen = np.packbits(~truth.seen.numpy()) if not truth.seen.all() else None
        self.flow = None
        if truth.flow is not None:
            flow = truth.flow.flatten(0, -2)
            self.unknown = np.packbits(flow[:, 0].isnan().numpy())
            moving = (flow.nan_to_num() != 0).any(-1).nonzero()[:, 0].int()
            self.flow = moving, flow[moving]
        self.instances = None
        if truth.instances is not None:
            ids = truth.instances.flatten()
            things = ids.nonzero()[:, 0].int()
            self.instances = things, ids[things]

    def __len__(self) -> int:
        """Bytes."""
        parts = 5 * len(self.where) + (0 if self.unseen is None else len(self.unseen))
        parts += 0 if self.flow is None else len(self.unknown) + 12 * len(self.flow[0])
        return parts + (0 if self.instances is None else 8 * len(self.instances[0]))

    def unpacked(self) -> Occupancy:
        shape = self.grid.shape
        labels = torch.full((len(self.grid),), self.classes.free, dtype=torch.uint8)
        labels[self.where] = self.labels
        flow = None
        if self.flow is not None:
            flow = torch.zeros(len(self.grid), 2)
            flow[self.flow[0]] = self.flow[1]
            flow[self._bits(self.unknown)] = torch.nan
            flow = flow.view(*shape, 2)
        seen = torch.ones(shape, dtype=torch.bool) if self.unseen is None else ~self._bits(self.unseen).view(shape)
        instances = None
        if self.instances is not None:
            instances = torch.zeros(len(self.grid), dtype=torch.int32)
            instances[self.instances[0]] = self.instances[1]
            instances = instances.view(shape)
        return Occupancy(self.grid, self.classes, labels.view(shape), flow, seen, instances)

    def _bits(self, packed: np.ndarray) -> Tensor:
        return torch.from_numpy(np.unpackbits(packed, count=len(self.grid)).view(bool))
