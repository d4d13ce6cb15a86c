"""Occupancy labels for a data set in nuScenes' layout: `data` and `labels` brought together."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from .data.nuscenes import CLASS_OF, LIDAR, NuScenes, class_of
from .labels import UNLABELLED, Keyframe, Sweep, Track, agreement, finished, label_scene, make, write
from .types import OCC3D


@dataclass
class Report:
    """What came of it."""

    made: int = 0  # keyframes
    there: int = 0  # keyframes that had their labels before
    failed: list[str] = field(default_factory=list)  # a sentence each

    def __str__(self) -> str:
        text = f"{self.made} keyframes labelled, {self.there} were there already, {len(self.failed)} failures"
        return "\n".join([text, *(f"  {sentence}" for sentence in self.failed)])


def make_labels(
    dataroot: Path | str,
    out: Path | str | None = None,
    version: str | None = None,
    scenes: Sequence[str] | None = None,
    shard: str = "0/1",
    every: int = 2,
    processes: int = 1,
    scales: bool = True,
    overwrite: bool = False,
    keep_going: bool = False,
    progress: bool = True,
) -> Report:
    """Labels of all scenes, or of those named, below `out` (None: dataroot): Occ3D's gts/, OpenOcc v2's openocc_v2/.

    shard: "i/n", the i-th of n equal parts of the scenes (0 is the first), for many machines; processes: scenes at
    once on this one. every: which of the sweeps between keyframes are used, 1 all, 2 every second. scales: also
    labels_1_2, 1_4 and 1_8. Keyframes that have their labels are not made again, unless `overwrite`. keep_going: bad
    input costs the sweep, keyframe or scene that it is in and is counted; without, the first error ends the work.
    ValueError and OSError as the reader has them, and for a shard or a scene that is none.
    """
    dataset = NuScenes(dataroot, version, progress=progress)
    names = dataset.scenes if scenes is None else tuple(scenes)
    unknown = sorted(set(names) - set(dataset.scenes))
    if unknown:
        some = ", ".join(dataset.scenes[:5])
        raise ValueError(f"{dataset.folder} has no scene {', '.join(unknown)}; it has {some} ...")
    if every < 1 or processes < 1:
        raise ValueError(f"every ({every}) and processes ({processes}) must be 1 or more")
    names = _part(names, shard)
    out = Path(dataroot if out is None else out)
    report, total = Report(), sum(len(dataset.samples(name)) for name in names)
    work = partial(_scene, dataset, out=out, every=every, scales=scales, overwrite=overwrite, keep_going=keep_going)
    with _bar(total, progress) as bar:
        if processes == 1:
            for name in names:
                _join(report, work(name, None, bar))
            return report
        threads = max(1, (os.cpu_count() or 1) // processes)
        # spawned, not forked: torch's threads do not survive a fork
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(work, name, threads) for name in names]
            try:
                for job in as_completed(jobs):
                    done = job.result()
                    _join(report, done)
                    bar.update(done.made + done.there)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return report


def sweeps(dataset: NuScenes, scene: str, every: int = 2, failed: list[str] | None = None) -> Iterator[Sweep]:
    """A scene's LiDAR: all keyframes, with lidarseg where the data set has it, and every n-th sweep between them.

    failed: None lets the first error through; a list takes the sentences, and the sweeps are left out. A sweep is bad
    input, too, whose pose is out of reach of the one before.
    """
    key_of = {moment.reference: moment.sample for moment in dataset.keyframes(scene)}
    classes = _class_ids(dataset)
    since, last = 0, None
    for row in dataset.sweeps(scene, LIDAR):
        since = 0 if row in key_of else since + 1
        if since % every:
            continue
        try:
            sweep = _sweep(dataset, row, key_of.get(row), classes)
            if last is not None:
                dataset.no_gap(dataset.data(row), last.world_from_car, last.stamp)
            last = sweep
            yield sweep
        except (ValueError, OSError) as problem:
            if failed is None:
                raise
            failed.append(str(problem))


def tracks(dataset: NuScenes, scene: str) -> list[Track]:
    """The annotated objects of a scene, as far as they are of a class."""
    found: dict[str, list] = {}
    for moment in dataset.keyframes(scene):
        for box in dataset.boxes(moment.sample):
            found.setdefault(box.instance, []).append((moment.stamp, box))
    out = []
    for instance, rows in found.items():
        name = CLASS_OF.get(rows[0][1].name)
        if class_of(rows[0][1].name, OCC3D) is None:
            continue
        size = tuple(float(edge) for edge in np.max([box.size for _, box in rows], axis=0))
        poses = torch.stack([box.world_from_box for _, box in rows])
        out.append(Track(instance, name, size, tuple(stamp for stamp, _ in rows), poses))
    return out


def keyframes(dataset: NuScenes, scene: str, failed: list[str] | None = None) -> Iterator[Keyframe]:
    """The instants of a scene that get labels, with the cameras that recorded there. failed: as in `sweeps`."""
    for moment in dataset.keyframes(scene):
        try:
            cameras, used, _ = dataset.rig(moment, partial=True)
            yield Keyframe(moment.sample, moment.stamp, dataset.data(moment.reference).world_from_car, cameras, used)
        except (ValueError, OSError) as problem:
            if failed is None:
                raise
            failed.append(f"keyframe {moment.sample}: {problem}")


def compare(
    dataroot: Path | str,
    labels: Path | str,
    version: str | None = None,
    scenes: Sequence[str] | None = None,
    progress: bool = True,
) -> list[agreement.Agreement]:
    """Labels below `labels` against those below `dataroot`, taken as the truth: inside the truth's two masks, then
    inside our own, which is where somebody who trains on ours will look. `agreement.table` prints them."""
    dataset = NuScenes(dataroot, version, progress=progress)
    tallies = [agreement.Agreement(name) for name in ("mask_lidar", "mask_camera", "our mask_lidar", "our mask_camera")]
    names = dataset.scenes if scenes is None else scenes
    pairs = [(name, token) for name in names for token in dataset.samples(name)]
    with _bar(len(pairs), progress) as bar:
        for name, token in pairs:
            true, true_open = (_arrays(path) for path in make.paths(dataroot, name, token))
            ours, ours_open = (_arrays(path) for path in make.paths(labels, name, token))
            masks = [arrays[mask].astype(bool) for arrays in (true, ours) for mask in ("mask_lidar", "mask_camera")]
            for tally, where in zip(tallies, masks):
                tally.add(true["semantics"], ours["semantics"], where, true_open["flow"], ours_open["flow"])
            bar.update()
    return tallies


# ---- one scene


def _scene(dataset, name, threads=None, bar=None, *, out, every, scales, overwrite, keep_going) -> Report:
    report = Report()
    failed = report.failed if keep_going else None
    try:
        wanted = []
        for keyframe in keyframes(dataset, name, failed):
            if not overwrite and finished(out, name, keyframe.token):
                report.there += 1
            else:
                wanted.append(keyframe)
        if bar is not None:
            bar.set_description(name)
            bar.update(report.there)
        if not wanted:
            return report
        told = sweeps(dataset, name, every, failed)
        for label in label_scene(told, tracks(dataset, name), wanted, threads=threads):
            write(label, out, name, make.SCALES if scales else (), overwrite)
            report.made += 1
            if bar is not None:
                bar.update()
    except (ValueError, OSError) as problem:
        if not keep_going:
            raise
        report.failed.append(f"{name}: {problem}")
    return report


def _sweep(dataset: NuScenes, row: int, sample: str | None, classes: torch.Tensor | None) -> Sweep:
    data = dataset.data(row)
    labels = None if sample is None or classes is None else classes[dataset.lidarseg(sample).long()]
    return Sweep(dataset.points(row), data.car_from_sensor, data.world_from_car, data.stamp, labels)


def _class_ids(dataset: NuScenes) -> torch.Tensor | None:
    """lidarseg's ids -> ids of OCC3D, (256,) uint8; None where the data set has no lidarseg."""
    if not (dataset.folder / "lidarseg.json").exists():
        return None
    ids = torch.full((256,), UNLABELLED, dtype=torch.uint8)
    for number, name in dataset.category_names.items():
        kind = class_of(name, OCC3D)
        ids[number] = UNLABELLED if kind is None else kind
    return ids


def _part(names: Sequence[str], shard: str) -> Sequence[str]:
    try:
        i, n = (int(word) for word in shard.split("/"))
    except ValueError:
        raise ValueError(f"shard {shard!r}: expected i/n, as in 0/4 for the first of four parts") from None
    if not 0 <= i < n:
        raise ValueError(f"shard {shard!r}: the parts of {n} are 0 to {n - 1}")
    return names[i::n]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise FileNotFoundError(f"no label file {path}")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _join(report: Report, other: Report) -> None:
    report.made += other.made
    report.there += other.there
    report.failed += other.failed


def _bar(total: int, progress: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit=" keyframes", disable=not progress)
