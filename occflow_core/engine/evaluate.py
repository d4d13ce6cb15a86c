"""Scores of a model: every drive is streamed in order through `runtime.Stream`, the code that drives.

`evaluate` gives the tallies of a model, also between steps of training; `evaluate_into` scores it beside baselines and
keeps everything in a folder: finished drives are not repeated.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from ..data.nuscenes import LIDAR, Moment, NuScenes
from ..geometry import OCC3D_GRID
from ..metrics import Scores, hits, origins
from ..metrics.flow_error import Over
from ..metrics.miou import Absent
from ..metrics.scores import total
from ..runtime import Model, Stream, built, load
from ..types import OCC3D, OPENOCC, Classes, Frame, Occupancy, Prediction
from . import share, submission
from .average import average_world
from .average import load as load_average
from .average import save as save_average
from .run import Run

TABLES = {"occ3d": OCC3D, "openocc": OPENOCC}  # kind of labels -> their classes
MODEL = "model"  # names of rows, beside the baselines
AVERAGE, ASIDE, TRUTH = "average world", "truth, one voxel aside", "truth against truth"
_LAYOUT = 2  # of the stored tallies

Items = TypeVar("Items")


@dataclass(frozen=True)
class Job:
    """What is scored, on what."""

    world: NuScenes
    labels: str  # "openocc" or "occ3d": which truth
    model: Model | None = None
    average: Prediction | None = None  # the average world of the training split
    baselines: bool = True  # also truth against truth, and one voxel aside
    sweeps: bool = False  # the model sees what lies between keyframes, too; keyframes are scored in any case
    keep_going: bool = False  # count keyframes that cannot be scored instead of stopping at the first

    def __post_init__(self):
        if self.labels not in TABLES:
            raise ValueError(f"labels: expected one of {', '.join(TABLES)}, got {self.labels!r}")
        told = {}
        if self.model is not None:
            told["model"] = self.model.system.config.classes, self.model.system.config.grid
        if self.average is not None:
            told["average world"] = self.average.classes.table, self.average.grid
        for who, (table, grid) in told.items():
            if table != self.classes.table:
                raise ValueError(
                    f"the {who} speaks of classes {table}, the labels {self.labels!r} of {self.classes.table}: they "
                    "cannot be compared; choose the other labels or another model"
                )
            if grid != OCC3D_GRID:
                raise ValueError(f"the {who} fills {grid}, the labels {OCC3D_GRID}: it would be another measure")

    @property
    def classes(self) -> Classes:
        return TABLES[self.labels]

    @property
    def panoptic(self) -> bool:
        """Whether the truth must have instances."""
        return self.model is not None and self.model.system.config.panoptic

    @property
    def rows(self) -> list[str]:
        """Who is scored."""
        named = [(MODEL, self.model is not None), (AVERAGE, self.average is not None)]
        return [name for name, there in (*named, (ASIDE, self.baselines), (TRUTH, self.baselines)) if there]

    def fingerprint(self) -> dict[str, Any]:
        """What stored tallies must have been made with to be taken over."""
        average = None
        if self.average is not None:
            average = hashlib.sha256(self.average.labels.numpy().tobytes()).hexdigest()
        return {
            "layout": _LAYOUT,
            "version": self.world.version,
            "labels": self.labels,
            "model": self.model and self.model.name,
            "weights": self.model and self.model.weights,
            "backend": self.model and self.model.backend,
            "precision": self.model and self.model.precision,
            "average": average,
            "rows": self.rows,
            "sweeps": self.sweeps,
            "panoptic": self.panoptic,
        }


@dataclass
class Tallies:
    """Scores of everyone in `Job.rows`, and a sentence for each keyframe that could not be scored."""

    rows: dict[str, Scores]
    problems: list[str] = field(default_factory=list)

    @staticmethod
    def of(job: Job) -> "Tallies":
        return Tallies({name: Scores(job.classes) for name in job.rows})

    def __add__(self, other: "Tallies") -> "Tallies":
        return Tallies({name: s + other.rows[name] for name, s in self.rows.items()}, self.problems + other.problems)

    def to_json(self) -> dict[str, Any]:
        return {"rows": {name: scores.to_json() for name, scores in self.rows.items()}, "problems": self.problems}

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "Tallies":
        rows = {name: Scores.from_json(scores) for name, scores in stored["rows"].items()}
        return Tallies(rows, list(stored["problems"]))


def evaluate(
    model: Model, world: NuScenes, scenes: Sequence[str], labels: str, sweeps: bool = False, progress: bool = True
) -> Scores:
    """A model's tallies over the keyframes of scenes. Nothing is written.

    labels: "openocc" or "occ3d", which must be of the model's classes. sweeps: feed what lies between keyframes, too.
    Under `torchrun` every process takes its part of the drives and all return the same: call it on all of them.

    ValueError and OSError as the data set and `Scores.add` have them, naming the sample.
    """
    job = Job(world, labels, model, baselines=False, sweeps=sweeps)
    with _Bar(world, share.mine(scenes), progress) as bar:
        tallies = share.all_or_none(lambda: _sum(job, (_drive(job, scene, bar) for scene in share.mine(scenes))))
    return _gathered(job, tallies).rows[MODEL]


def evaluate_said(job: Job, scene: str, said: dict[str, Prediction]) -> Tallies:
    """Tallies of what somebody said about a drive's keyframes (sample -> prediction), e.g. a node in a recording.

    job: its `model` is not asked; the row MODEL is what was said. A keyframe that nobody spoke about is not scored:
    compare the tallies' samples with those of the scene. Errors as `evaluate`.
    """
    tallies = Tallies({name: Scores(job.classes) for name in (MODEL, *job.rows)})
    keyframes = job.world.keyframes(scene)
    places = _lidar_poses(job.world, keyframes)
    for k, moment in enumerate(keyframes):
        if moment.sample in said:
            asked = said[moment.sample].instances is not None
            truth = job.world.occupancy(moment.sample, job.labels, instances=asked)
            eyes = origins([pose for pose, _ in places], k, places[k][1])
            _score(job, tallies, moment.sample, truth, said[moment.sample], eyes, None)
    return tallies


def evaluate_into(
    out: Path | str,
    job: Job,
    scenes: Sequence[str],
    about: dict[str, Any],
    submit: dict[str, str] | None = None,
    absent: Absent = "zero",
    over: Over = "right",
    progress: bool = True,
) -> dict[str, Any]:
    """Scores everyone in the job over scenes; what is in `scores.json`, which appears in `out` beside `scores.md`.

    Each drive's tallies are kept in `out`/drives when it is finished, and a run that was cut off goes on there. about:
    what else scores.json says at its top. submit: also write `submission.gz` of the model, signed with these fields
    (`submission.FIELDS`). absent, over: as in `Scores.result`; stored drives serve all of them. Under `torchrun` the
    processes share out the drives; `out` must be one folder for all.

    ValueError: `out` holds tallies of something else; nothing to score; else as `evaluate`.
    """
    out = Path(out)
    expected = [sample for scene in scenes for sample in job.world.samples(scene)]
    if not expected or len(set(scenes)) != len(scenes):
        raise ValueError(f"evaluate: expected different scenes with keyframes, got {', '.join(scenes) or 'none'}")
    with _Bar(job.world, share.mine(scenes), progress) as bar:
        kept = partial(_kept_drive, out, job, bar=bar, rays=submit is not None)
        tallies = share.all_or_none(lambda: _sum(job, map(kept, share.mine(scenes))))
    report = about | reported(job, _gathered(job, tallies), scenes, absent, over)
    if share.process()[0] == 0:
        _write(out / "scores.json", json.dumps(report, indent=2).encode() + b"\n")
        _write(out / "scores.md", table(report).encode() + b"\n")
        if submit is not None:
            submission.write(out / "submission.gz", _stored_rays(out, scenes, progress), submit)
    return report


def reported(
    job: Job, tallies: Tallies, scenes: Sequence[str], absent: Absent = "zero", over: Over = "right"
) -> dict[str, Any]:
    """Tallies of scenes as scores, with what was scored and which keyframes were not."""
    expected = [sample for scene in scenes for sample in job.world.samples(scene)]
    missing = next(iter(tallies.rows.values())).missing(expected)
    return {
        **job.fingerprint(),
        "scenes": len(scenes),
        "samples expected": len(expected),
        "samples missing": len(missing),
        "missing": missing,
        "problems": tallies.problems,
        "scores": {
            name: scores.result(absent, over) if scores.samples else None for name, scores in tallies.rows.items()
        },
    }


def table(report: dict[str, Any]) -> str:
    """What `evaluate_into` returns, as Markdown: everyone in one table, then the first of them class by class."""
    scores = {name: result for name, result in report["scores"].items() if result}
    names = {MODEL: report["model"]}
    told = report["samples expected"] - report["samples missing"]
    rules = [] if all(r["absent classes"] == "zero" for r in scores.values()) else ["absent classes left out"]
    rules += [] if all(r["flow"]["over"] == "right" for r in scores.values() if "flow" in r) else ["AVE over all rays"]
    if (report["backend"], report["precision"]) not in ((None, None), ("eager", "float32")):
        rules.append(f"network {report['backend']} in {report['precision']}")
    panoptic = any("RayPQ" in result for result in scores.values())
    lines = [
        f"{told} of {report['samples expected']} keyframes in {report['scenes']} drives, labels {report['labels']} of "
        f"{report['version']}{''.join(f', {rule}' for rule in rules)}",
        "",
        f"| | mIoU | RayIoU | @1 m | @2 m | @4 m | mAVE m/s | Occ Score |{' RayPQ |' * panoptic}",
        f"|---|---:|---:|---:|---:|---:|---:|---:|{'---:|' * panoptic}",
    ]
    for name, result in scores.items():
        shares = [result["mIoU"], result["RayIoU"], *(result["rays"]["at"][t] for t in "124")]
        shares = [_percent(share) for share in shares]
        row = [names.get(name, name), *shares, _speed(result.get("mAVE")), _percent(result.get("OccScore"))]
        row += [_percent(result.get("RayPQ"))] * panoptic
        lines.append(f"| {' | '.join(row)} |")
    if not scores:
        return "\n".join(lines)
    first, result = next(iter(scores.items()))
    seen = result["voxels seen"]
    rings = ", ".join(f"{_percent(share)} in {name}" for name, share in seen["rings"].items())
    unseen = "" if result["voxels unseen"]["voxels"] == 0 else f"; unseen {_percent(result['voxels unseen']['miou'])}"
    lines += [
        "",
        f"{names.get(first, first)}: mIoU of what moves {_percent(seen['moving'])}, of what does not "
        f"{_percent(seen['static'])}; {rings}{unseen}; filled or free {_percent(seen['occupied'])}",
        "",
        "| | IoU | ray IoU @1 m | @2 m | @4 m | AVE m/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rays in result["rays"]["classes"].items():
        ave = result["flow"]["classes"].get(name) if "flow" in result else None
        row = [name, _percent(seen["classes"][name]), *map(_percent, rays), _speed(ave)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def aside(truth: Occupancy) -> Prediction:
    """The truth one voxel ahead: what an error of 0.4 m costs."""

    def ahead(volume: Tensor | None, fill: int = 0) -> Tensor | None:
        return None if volume is None else torch.cat([torch.full_like(volume[:1], fill), volume[:-1]])

    labels = ahead(truth.labels, truth.classes.free)
    return as_prediction(replace(truth, labels=labels, flow=ahead(truth.flow), instances=ahead(truth.instances)))


def as_prediction(truth: Occupancy) -> Prediction:
    """A truth as somebody would predict it: unknown velocities are zero, unlabelled voxels free."""
    labels = torch.where(truth.labels > truth.classes.free, truth.classes.free, truth.labels)
    flow = None if truth.flow is None else truth.flow.nan_to_num()
    score = (labels != truth.classes.free).float()
    return Prediction(truth.grid, truth.classes, labels, score, flow, instances=truth.instances)


# ---- a recipe's


def evaluate_run(
    run: Run,
    checkpoint: Path | None,
    out: Path,
    *,
    scenes: Sequence[str] = (),
    against_truth: bool = False,
    average: Path | None = None,
    sweeps: bool = False,
    submit: dict[str, str] | None = None,
    absent: Absent = "zero",
    over: Over = "right",
    device: str | torch.device = "cpu",
    backend: str = "eager",
    precision: str = "float32",
    keep_going: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """`evaluate_into` for the validation split of a recipe, or some scenes of it, beside all baselines.

    checkpoint: what `runtime.load` takes; None: baselines alone. against_truth: also make sure that the truth scores
    100 % against itself. average: file of the average world; None: the one beside the checkpoint or in `out`, and
    where there is none it is made of the training split and kept in `out`. device: where the network runs; backend and
    precision: how, as `runtime.built` has them.

    ValueError: as `evaluate_into`, `runtime.load`, `runtime.built` and `average.load` have it; scenes that the data set
    lacks. RuntimeError: the truth is not 100 % against itself.
    """
    world = opened(run, progress)
    unknown = sorted(set(scenes) - set(world.scenes))
    if unknown:
        raise ValueError(f"{world.folder} has no scene {', '.join(unknown)}; it has {', '.join(world.scenes[:5])} ...")
    model = None
    if checkpoint is not None:
        model = built(load(run.model, checkpoint, device), backend, len(world.cameras), precision)
    usual, source = _average(run, world, checkpoint, out, average, progress)
    job = Job(world, run.data.labels, model, usual, sweeps=sweeps, keep_going=keep_going)
    chosen = tuple(scenes) or world.split(run.data.val)
    about = {"split": None if scenes else run.data.val, "average world of": source}
    report = evaluate_into(out, job, chosen, about, None if model is None else submit, absent, over, progress)
    if against_truth:
        _perfect(report["scores"][TRUTH])
    return report


def make_average(run: Run, path: Path, progress: bool = True) -> tuple[Prediction, str]:
    """The average world of a recipe's training split, written to `path`; and what it was counted over."""
    world = opened(run, progress)
    scenes = world.split(run.data.train)
    if not scenes:
        raise ValueError(
            f"split {run.data.train} of {world.folder} has no scenes to make the average world of: name its file "
            "(--average FILE), or another split (--set data.train=NAME)"
        )
    made, keyframes = average_world(world, scenes, run.data.labels, progress)
    source = f"{_source(run, world)}, {keyframes} keyframes"
    if share.process()[0] == 0:
        save_average(made, path, source)
    share.told(None)  # nobody reads it before it is there
    return load_average(path)


def average_path(checkpoint: Path) -> Path:
    """Where the average world lies that ships with weights."""
    return checkpoint.with_suffix(".average.safetensors")


def opened(run: Run, progress: bool = True) -> NuScenes:
    """A recipe's data set; its synthetic world is made first, as far as it is not there. Errors as both have them."""
    made = run.data.world
    if made is not None:
        from ..data.world import write_world

        def write():
            if share.process()[0] == 0:
                write_world(run.data.root, **asdict(made), progress=progress)

        share.all_or_none(write)
    return NuScenes(run.data.root, run.data.version, progress=progress)


def _average(run: Run, world: NuScenes, checkpoint: Path | None, out: Path, given: Path | None, progress: bool):
    """The average world and its source."""
    if given is not None:
        return load_average(given)
    if checkpoint is not None and average_path(checkpoint).is_file():
        return load_average(average_path(checkpoint))
    kept = out / "average.safetensors"
    if kept.is_file():
        average, source = load_average(kept)
        if source.startswith(_source(run, world) + ","):
            return average, source
    return make_average(run, kept, progress)


def _source(run: Run, world: NuScenes) -> str:
    return f"{run.data.labels} labels of {world.version}, split {run.data.train}"


def _perfect(result: dict[str, Any] | None) -> None:
    shares = {name: result and result.get(name) for name in ("mIoU", "RayIoU", "OccScore")}
    if result and result.get("mAVE") is None:
        del shares["OccScore"]  # no flow in the labels, or nothing that moves was met
    if result and "RayPQ" in result:
        shares["RayPQ"] = result["RayPQ"]
    if any(share != 1.0 for share in shares.values()):
        raise RuntimeError(f"the truth against itself must score 100 %, got {shares}: do not trust these scores")


# ---- one drive


def _kept_drive(out: Path, job: Job, scene: str, bar: "_Bar", rays: bool) -> Tallies:
    """A drive's tallies from their file, or scored now and written there."""
    path = _drive_path(out, scene)
    about = job.fingerprint() | {"scene": scene, "samples": list(job.world.samples(scene))}
    if path.is_file() and (not rays or path.with_suffix(".npz").is_file()):
        try:
            stored = json.loads(path.read_bytes())
            if stored["about"] != about:
                raise ValueError("it was made of other weights, labels or settings")
            tallies = Tallies.from_json(stored["tallies"])
        except (ValueError, KeyError, TypeError) as problem:
            raise ValueError(f"{path} cannot be gone on with: {problem}; choose another folder or delete it") from None
        bar.passed(len(about["samples"]), tallies)
        return tallies
    said: dict[str, submission.Rays] | None = {} if rays else None
    tallies = _drive(job, scene, bar, said)
    if said is not None:  # before the tallies: those say that the drive is finished
        arrays = {f"{sample}/{name}": array for sample, its in said.items() for name, array in its.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        np.savez_compressed(beside, **arrays)
        beside.replace(path.with_suffix(".npz"))
    _write(path, json.dumps({"about": about, "tallies": tallies.to_json()}).encode())
    return tallies


def _drive(job: Job, scene: str, bar: "_Bar", said: dict[str, submission.Rays] | None = None) -> Tallies:
    """Streams one drive and scores its keyframes. said: takes the model's rays of each keyframe."""
    world, tallies = job.world, Tallies.of(job)
    stream = None if job.model is None else Stream(job.model)
    keyframes = world.keyframes(scene)
    places = _lidar_poses(world, keyframes)
    load = partial(_loaded, job)
    moments = world.moments(scene) if job.sweeps and stream is not None else keyframes
    number = 0
    for moment, (frame, truth, problem) in _ahead(moments, load):
        told, k = None, number
        number += moment.sample is not None
        try:
            if problem is not None:
                raise problem
            if stream is not None:
                told = stream.step(frame)
            if moment.sample is None:
                continue
            eyes = origins([pose for pose, _ in places], k, places[k][1])
            _score(job, tallies, moment.sample, truth, told, eyes, said)
        except (ValueError, OSError, FloatingPointError) as error:
            sentence = f"{scene}, {moment.sample or f'sweep at {moment.stamp} ns'}: {error}"
            if not job.keep_going:
                raise ValueError(sentence) from error
            tallies.problems.append(sentence)
        if moment.sample is not None:
            bar.step(tallies)
    return tallies


def _score(job: Job, tallies: Tallies, sample: str, truth: Occupancy, told, eyes: Tensor, said) -> None:
    """One keyframe of everyone in the job."""
    device = "cpu" if job.model is None else job.model.device
    truth, eyes = truth.to(device), eyes.to(device)
    true = hits(truth, eyes)
    contenders = {
        MODEL: lambda: told,
        AVERAGE: lambda: job.average,
        ASIDE: lambda: aside(truth),
        TRUTH: lambda: as_prediction(truth),
    }
    for name in tallies.rows:
        met = tallies.rows[name].add(sample, contenders[name]().to(device), truth, eyes, true)
        if name == MODEL and said is not None:
            said[sample] = submission.rays(met)


def _loaded(job: Job, moment: Moment) -> tuple[Frame | None, Occupancy | None, Exception | None]:
    """What a moment brings, or why it brings nothing."""
    try:
        frame = None
        if job.model is not None:
            frame = job.world.frame(moment, job.model.system.config.sweeps, job.keep_going)
        truth = None
        if moment.sample is not None:
            truth = job.world.occupancy(moment.sample, job.labels, instances=job.panoptic)
    except (ValueError, OSError) as problem:
        return None, None, problem
    return frame, truth, None


def _ahead(items: Sequence[Items], load: Callable[[Items], Any]) -> Iterator[tuple[Items, Any]]:
    """(item, load(item)) in order; the next one is loaded while the last is worked on."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            loading = item, pool.submit(load, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = loading
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _lidar_poses(world: NuScenes, keyframes: Sequence[Moment]) -> list[tuple[Tensor, Tensor]]:
    """world_from_lidar and car_from_lidar of every keyframe of a scene: where RayIoU's rays begin."""
    poses = []
    for moment in keyframes:
        data = world.data(moment.reference)
        if data.channel != LIDAR:
            raise ValueError(f"sample {moment.sample} has no {LIDAR}: RayIoU's rays begin where the LiDAR was")
        poses.append((data.world_from_car @ data.car_from_sensor, data.car_from_sensor))
    return poses


# ---- many of them


def _sum(job: Job, parts: Iterator[Tallies]) -> Tallies:
    parts = list(parts)
    return Tallies(
        {name: total([part.rows[name] for part in parts], job.classes) for name in job.rows},
        [sentence for part in parts for sentence in part.problems],
    )


def _gathered(job: Job, tallies: Tallies) -> Tallies:
    """The tallies of all processes together, on all of them."""
    if share.process()[1] == 1:
        return tallies
    return _sum(job, map(Tallies.from_json, share.told(tallies.to_json())))


def _stored_rays(out: Path, scenes: Sequence[str], progress: bool) -> Iterator[tuple[str, submission.Rays]]:
    from tqdm import tqdm

    for scene in tqdm(scenes, unit=" drives", desc="submission.gz", disable=not progress):
        with np.load(_drive_path(out, scene).with_suffix(".npz"), allow_pickle=False) as file:
            for sample in dict.fromkeys(name.split("/")[0] for name in file.files):
                yield sample, {name: file[f"{sample}/{name}"] for name in ("pcd_cls", "pcd_dist", "pcd_flow")}


def _drive_path(out: Path, scene: str) -> Path:
    return out / "drives" / f"{quote(scene, safe='')}.json"  # names are others' words


def _write(path: Path, content: bytes) -> None:
    """Beside and renamed: nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


class _Bar:
    """A bar over this process' keyframes with the running scores of the first row; only the first process shows one."""

    def __init__(self, world: NuScenes, scenes: Sequence[str], progress: bool):
        from tqdm import tqdm

        samples = sum(len(world.samples(scene)) for scene in scenes)
        self.bar = tqdm(total=samples, unit=" keyframes", disable=not progress or share.process()[0] > 0)
        self.done: Scores | None = None  # of drives that are through
        self.now: Scores | None = None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def step(self, tallies: Tallies) -> None:
        """One more keyframe of a drive whose tallies are these."""
        self.bar.update()
        scores = next(iter(tallies.rows.values()))
        if self.bar.disable or not scores.samples:
            return
        if self.now is not None and self.now is not scores:
            self.done = self.now if self.done is None else self.done + self.now
        self.now = scores
        running = (scores if self.done is None else self.done + scores).result()
        told = {name: running.get(name) for name in ("mIoU", "RayIoU", "mAVE", "RayPQ")}
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in told.items() if value is not None})

    def passed(self, samples: int, tallies: Tallies) -> None:
        """A drive that was scored before."""
        scores = next(iter(tallies.rows.values()))
        self.done = scores if self.done is None else self.done + scores
        self.bar.update(samples)


def _percent(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:.2f}"


def _speed(error: float | None) -> str:
    return "–" if error is None else f"{error:.3f}"
