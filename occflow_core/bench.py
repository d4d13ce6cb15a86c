"""Timings. What is measured here is printed with the machine it ran on; nothing is asserted."""

import ctypes
import gc
import itertools
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .geometry import OCC3D_GRID, rigid
from .metrics import FlowError, Miou, RayIou, Scores, hits
from .types import OPENOCC, Clip, Frame, Occupancy, Prediction


def bench_node(sets: int, pictures: Path | None = None) -> dict[str, Any]:
    """The node's own cost for a set of six JPEGs: everything from the bytes on the wire to the bytes on the wire, but
    the network. Needs ROS. Stages, each in ms (p50, p95, p99):

    receive: CDR -> CompressedImage, six times; collect: checks and collector; decode; assemble: transforms and Frame;
    convert: Prediction -> VoxelFlow (40,000 voxels, 10,000 of them moving); publish: to a subscriber over DDS.
    """
    import rclpy
    from occflow_msgs.msg import VoxelFlow
    from rclpy.serialization import deserialize_message, serialize_message
    from sensor_msgs.msg import CompressedImage

    from occflow_ros import convert
    from occflow_ros.assemble import Calibration, Collector, Shot
    from occflow_ros.frames import TransformBuffer
    from occflow_ros.health import Health
    from occflow_ros.pipeline import Pipeline

    jpegs = _read_pictures(pictures) if pictures is not None else _generated_pictures()
    height, width = jpegs[0][1]
    names = [f"cam_{i}" for i in range(len(jpegs))]
    prediction = _full_prediction()
    transforms = TransformBuffer(keep=1e6)
    for i, name in enumerate(names):
        mount = rigid.from_quaternion((0.5, -0.5, 0.5, -0.5), (1.5, 0.1 * i, 1.5))
        transforms.add("base_link", name, 0, mount, static=True)
    k = np.array([[1260.0, 0, width / 2], [0, 1260.0, height / 2], [0, 0, 1]])
    calibrations = tuple(Calibration(k, height, width, name) for name in names)
    health = Health(names, "bench")
    still, silent = _Still(prediction), lambda key, sentence: None
    pipeline = Pipeline(names, names, transforms, still, health, "map", "base_link", 0.0, len(names), silent)
    collector = Collector(len(names), 1 / 12)

    rclpy.init()
    node = rclpy.create_node("occflow_bench")
    publisher = node.create_publisher(VoxelFlow, "~/occupancy", 1)
    heard = []
    node.create_subscription(VoxelFlow, "~/occupancy", heard.append, 1, raw=True)
    executor = rclpy.executors.SingleThreadedExecutor()
    executor.add_node(node)
    stages: dict[str, list[float]] = {}
    try:
        for k in range(-3, sets):  # three to warm up
            stamp = 1_000_000_000 + (k + 3) * 83_000_000
            transforms.add("map", "base_link", stamp - 40_000_000, torch.eye(4, dtype=torch.float64), static=False)
            transforms.add("map", "base_link", stamp + 40_000_000, torch.eye(4, dtype=torch.float64), static=False)
            wire = []
            for (data, _), name in zip(jpegs, names, strict=True):
                message = CompressedImage(format="jpeg")
                message.header.frame_id, message.header.stamp = name, convert.time_message(stamp)
                message.data.frombytes(data)
                wire.append(serialize_message(message))
            times = [("receive", time.perf_counter())]
            messages = [deserialize_message(bytes_, CompressedImage) for bytes_ in wire]
            times.append(("collect", time.perf_counter()))
            ready = []
            for i, message in enumerate(messages):
                shot = Shot(convert.compressed_picture(message), calibrations[i])
                ready += collector.add(i, convert.nanoseconds(message.header.stamp), shot, time.monotonic())
            times.append(("serve", time.perf_counter()))
            served = pipeline.serve(ready[0])
            times.append(("convert", time.perf_counter()))
            flow = convert.voxel_flow(served.prediction, stamp, "base_link", names, served.images.stamps, "bench", 0.2)
            times.append(("publish", time.perf_counter()))
            publisher.publish(flow)
            times.append(("", time.perf_counter()))
            executor.spin_once(timeout_sec=0.5)
            if k >= 0:
                took = {name: t1 - t0 for (name, t0), (_, t1) in zip(times, times[1:], strict=False)}
                for name, seconds in took.items():
                    stages.setdefault(name, []).append(seconds)
                stages.setdefault("all", []).append(sum(took.values()))
    finally:
        pipeline.close()
        node.destroy_node()
        rclpy.try_shutdown()
    if len(heard) < sets:
        raise RuntimeError(f"of {sets + 3} messages only {len(heard)} were heard: publishing was not measured")
    within = {name: stage for name, stage in health.latencies_ms().items() if name in ("decode", "assemble")}
    rows = {name: _percentiles(values) for name, values in stages.items() if name != "serve"}
    order = ("receive", "collect", "decode", "assemble", "convert", "publish", "all")
    return {
        "what": f"node without network, {len(jpegs)} JPEGs of {width} x {height}, {sets} sets",
        "machine": machine(),
        "ms": {name: {**rows, **within}[name] for name in order},
    }


class _Still:
    """A stream whose network costs nothing."""

    def __init__(self, prediction: Prediction):
        self.prediction, self.seconds = prediction, {}
        self.model = SimpleNamespace(device=torch.device("cpu"))

    def step(self, frame) -> Prediction:
        return self.prediction


def _full_prediction() -> Prediction:
    """40,000 filled voxels, 10,000 of them moving: twice what a nuScenes street has."""
    rng = torch.Generator().manual_seed(0)
    cells = torch.randperm(len(OCC3D_GRID), generator=rng)[:40_000]
    labels = torch.full((len(OCC3D_GRID),), OPENOCC.free, dtype=torch.uint8)
    labels[cells], labels[cells[:10_000]] = OPENOCC.id("manmade"), OPENOCC.id("car")
    flow = torch.zeros(len(OCC3D_GRID), 2)
    flow[cells[:10_000]] = 3.0
    shape = OCC3D_GRID.shape
    filled = (labels != OPENOCC.free).float()
    mask = torch.rand(len(OCC3D_GRID), generator=rng) < 0.5
    parts = (t.reshape(*shape, *t.shape[1:]) for t in (labels, filled, flow, mask))
    return Prediction(OCC3D_GRID, OPENOCC, *parts)


def bench_model(
    sets: int,
    model: str,
    weights: Path | None = None,
    device: str = "cpu",
    backend: str = "eager",
    precision: str = "float32",
) -> dict[str, Any]:
    """What a network costs from six pictures of 1600 x 900 (and a made-up LiDAR scan, if it takes one) to voxels,
    streaming at 2 Hz. Stages, each in ms (p50, p95, p99):

    prepare: pictures to the network's size; network; voxels: decode; visibility: what the cameras observe; all. Errors
    are those of `runtime.load` and `runtime.built`.
    """
    from .data import pattern
    from .runtime import Stream, built, load
    from .runtime.stream import made_up_points

    loaded = built(load(model, weights, device), backend, len(pattern.NAMES), precision)
    config = loaded.system.config
    points = made_up_points(config) if config.sweeps else None
    stream, stages, warm_up = Stream(loaded), {}, config.frames
    for k, frame in enumerate(pattern.drive(sets + warm_up, height=900, width=1600, rate=2.0)):
        stream.step(replace(frame, points=points))
        for name, seconds in stream.seconds.items() if k >= warm_up else ():
            stages.setdefault(name, []).append(seconds)
    stages["all"] = [sum(parts) for parts in zip(*stages.values(), strict=True)]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # kB on Linux
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    parameters = sum(p.numel() for p in loaded.system.parameters())
    return {
        "what": f"{loaded.name}, {backend} in {precision}, {parameters / 1e6:.1f} M parameters, {sets} sets, "
        f"{threads}, process of {memory} MB",
        "machine": machine(),
        "ms": {name: _percentiles(seconds) for name, seconds in stages.items()},
        "memory MB": memory,
        "parameters": parameters,
    }


def bench_metrics(sets: int, device: str = "cpu") -> dict[str, Any]:
    """What it costs to score one sample: a street in the Occ3D grid and a copy of it that is one voxel aside, rays from
    8 origins. Stages, each in ms (p50, p95, p99):

    mIoU; RayIoU: both volumes cast, 2 x 112,320 rays, and counted; mAVE: counted, from rays that were cast; all: the
    three together, as `Scores.add` does it.
    """
    truth, prediction, origins = (part.to(device) for part in _street())
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    true, told = hits(truth, origins), hits(prediction, origins)
    tallies = Miou(OPENOCC), RayIou(OPENOCC), FlowError(OPENOCC), Scores(OPENOCC)
    miou, rayiou, flow, scores = tallies
    work = {
        "mIoU": lambda k: miou.add(k, prediction, truth),
        "RayIoU": lambda k: rayiou.add(k, hits(prediction, origins), hits(truth, origins)),
        "mAVE": lambda k: flow.add(k, told, true),
        "all": lambda k: scores.add(k, prediction, truth, origins),
    }
    stages: dict[str, list[float]] = {name: [] for name in work}
    for k in range(-3, sets):  # three to warm up
        for name, add in work.items():
            wait()
            begun = time.perf_counter()
            add(str(k))
            wait()
            if k >= 0:
                stages[name].append(time.perf_counter() - begun)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # kB on Linux
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    return {
        "what": f"scores of {sets} samples, {len(origins)} origins each, {threads}, process of {memory} MB at most",
        "machine": machine(),
        "ms": {name: _percentiles(seconds) for name, seconds in stages.items()},
        "memory MB": memory,
    }


def _street() -> tuple[Occupancy, Prediction, torch.Tensor]:
    """A road between pavements, houses with gaps, trees, cars that drive; the same one voxel ahead; 8 origins."""
    labels = torch.full(OCC3D_GRID.shape, OPENOCC.free, dtype=torch.uint8)
    flow = torch.zeros(*OCC3D_GRID.shape, 2)
    labels[:, :, 2] = OPENOCC.id("sidewalk")
    labels[:, 90:112, 2] = OPENOCC.id("driveable_surface")
    for x in range(0, 200, 25):
        labels[x : x + 20, 70:73, 2:14] = labels[x + 3 : x + 17, 130:133, 2:16] = OPENOCC.id("manmade")
        labels[x + 10 : x + 14, 82:86, 5:12] = OPENOCC.id("vegetation")
        labels[x + 6 : x + 17, 104:109, 3:7] = OPENOCC.id("car")
        flow[x + 6 : x + 17, 104:109, 3:7] = torch.tensor([-8.0, 0.0])
    aside = labels.roll(1, 0)
    origins = torch.tensor([[4.0 * k - 14, 0.0, 1.84] for k in range(8)], dtype=torch.float64)
    truth = Occupancy(OCC3D_GRID, OPENOCC, labels, flow, torch.ones_like(labels, dtype=torch.bool))
    return truth, Prediction(OCC3D_GRID, OPENOCC, aside, (aside != OPENOCC.free).float(), flow.roll(1, 0)), origins


def _read_pictures(folder: Path) -> list[tuple[bytes, tuple[int, int]]]:
    import simplejpeg

    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg"))
    if not 1 <= len(files) <= 8:
        raise ValueError(f"{folder}: expected 1 to 8 JPEG files, one a camera, found {len(files)}")
    datas = [path.read_bytes() for path in files]
    jpegs = [(data, simplejpeg.decode_jpeg_header(data)[:2]) for data in datas]
    if len({size for _, size in jpegs}) > 1:
        raise ValueError(f"{folder}: the pictures differ in size: {sorted({size for _, size in jpegs})}")
    return jpegs


def _generated_pictures() -> list[tuple[bytes, tuple[int, int]]]:
    """Six pictures as heavy as a camera's: smooth shapes under noise, about 150 kB each as JPEG."""
    import cv2
    import simplejpeg

    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(6):
        coarse = cv2.resize(rng.integers(0, 256, (30, 50, 3), np.uint8), (1600, 900), interpolation=cv2.INTER_CUBIC)
        noisy = np.clip(coarse + rng.normal(0, 6, coarse.shape), 0, 255).astype(np.uint8)
        jpegs.append((simplejpeg.encode_jpeg(noisy, quality=75), (900, 1600)))
    return jpegs


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(seconds, p)) * 1e3, 2) for p in (50, 95, 99)}


def machine() -> str:
    """Processor, cores and library versions: a figure without them is worth nothing."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, PyTorch {torch.__version__}"


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [figures["what"], figures["machine"], "", "| stage | p50 ms | p95 ms | p99 ms |", "|---|---|---|---|"]
    lines += [f"| {name} | {ms['p50']} | {ms['p95']} | {ms['p99']} |" for name, ms in figures["ms"].items()]
    return "\n".join(lines)


def write_json(path: Path, content: Any) -> None:
    """Writes beside and renames: nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    beside.replace(path)


# ---- streams: models x backends x precisions x devices --------------------------------------------------------------

PRECISIONS = ("float32", "bf16")  # unless told otherwise
PICTURE = (198, 352)  # pixels, as in the demo's recording
PLAIN = ("eager", "float32")  # what others are compared with
FEW = 3  # steps that are also computed from their whole window
STAGES = ("prepare", "network", "voxels", "visibility", "total")
CANNOT = (ValueError, RuntimeError, ArithmeticError, MemoryError, ImportError)  # what ends a row, not the table


def bench_stream(
    steps: int,
    models: Sequence[str],
    backends: Sequence[str] = ("eager",),
    precisions: Sequence[str] = PRECISIONS,
    devices: Sequence[str] = ("cpu",),
    out: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """What `runtime.Stream` costs a step, along the drawn drive at 2 Hz, a row for each combination.

    A row: ms of each stage (p50, p95, p99), steps a second, peak memory, how many times longer the network takes where
    it is given its whole window each time, what a step counts (`counted`) and the least time for that on this machine
    (`probed`), and how far it is from eager in float32. Where a combination cannot be had the row says why. Each is
    measured after as many steps as its window has.

    out: the figures as JSON, written after each row. Rows of a file that was not finished are kept where all that they
    depend on is the same; a finished file is measured anew. ValueError for words that are not known.
    """
    from tqdm import tqdm

    from .data import pattern
    from .runtime import Stream, load
    from .runtime.backends import Backend, Precision, check_backend, known
    from .runtime.cache import key
    from .runtime.load import parse

    if steps < 1:
        raise ValueError(f"bench: steps must be at least 1, got {steps}")
    if not models:
        raise ValueError("bench: name at least one model")
    for what, given, kind in (("backend", backends, Backend), ("precision", precisions, Precision)):
        for word in given:
            if word not in get_args(kind):
                raise ValueError(f"bench: {what} must be one of {', '.join(get_args(kind))}, got {word!r}")
    for model in models:
        parse(model)
    for device in devices:
        _absent(device)
    loaded = {model: load(model) for model in dict.fromkeys(models)}
    longest = max(model.system.config.frames for model in loaded.values())
    height, width = PICTURE
    frames = list(pattern.drive(longest + steps + FEW, height=height, width=width, rate=2.0))
    Stream(next(iter(loaded.values()))).warm_up(pattern.NAMES, height, width)  # else the first row pays for libraries
    kept = {} if out is None else _kept_rows(out)
    counts: dict[str, dict[str, float]] = {}
    figures = {
        "what": f"streams, {steps} steps of six {width} x {height} pictures at 2 Hz, {torch.get_num_threads()} threads",
        "machine": machine(),
        "finished": False,
        "probes": {device: probed(device, precisions) for device in devices if _absent(device) is None},
        "rows": [],
    }
    combinations = list(itertools.product(loaded, devices, backends, precisions))
    with tqdm(total=len(combinations) * steps, unit="step", disable=None if progress else True) as bar:
        for model, device, backend, precision in combinations:
            name = loaded[model].name
            row = {"model": name, "backend": backend, "precision": precision, "device": device, "why": None}

            def say(word: str, row=row) -> None:
                bar.set_description(f"{row['model']} {row['backend']} {row['precision']} {row['device']}: {word}")

            try:
                why = _absent(device)
                if why is not None:
                    raise ValueError(why)
                there = loaded[model] if device == "cpu" else load(model, device=device)
                if (backend, precision) != PLAIN:
                    check_backend(there, backend)
                facts = known(there, backend, len(pattern.NAMES), precision)
                del there  # what it takes is not the row's
                facts |= {"steps": steps, "on": [figures["machine"], figures["what"]]}
                row["key"] = key(facts)
                if row["key"] in kept:
                    row = kept[row["key"]]
                else:
                    say("counting")
                    if model not in counts:
                        counts[model] = counted(loaded[model], _with_points(loaded[model], frames))
                    row |= _measured(model, device, backend, precision, frames, steps, bar.update, say)
                    row |= counts[model]
                row |= _floor(row, figures["probes"][device], precision)
            except CANNOT as problem:
                row["why"] = (str(problem).strip() or repr(problem)).splitlines()[0]
            figures["rows"].append(row)
            bar.update(len(figures["rows"]) * steps - bar.n)
            figures["finished"] = len(figures["rows"]) == len(combinations)
            if out is not None:
                write_json(out, figures)
    return figures


def _absent(device: str) -> str | None:
    """Why there is no such device here; None where there is one. ValueError for words that name none."""
    try:
        kind = torch.device(device)
    except RuntimeError:
        kind = None
    if kind is None or kind.type not in ("cpu", "cuda"):
        raise ValueError(f"bench: devices are cpu, cuda, cuda:1 and so on, got {device!r}")
    there = 1 if kind.type == "cpu" else torch.cuda.device_count()
    return None if (kind.index or 0) < there else f"PyTorch sees no {device} here"


def _kept_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows that a run which was cut off has measured, by their key."""
    try:
        told = json.loads(path.read_text())
        rows = [] if told["finished"] else [row for row in told["rows"] if row["why"] is None]
        return {row["key"]: row for row in rows}
    except (OSError, ValueError, KeyError, TypeError):  # none, or of something else
        return {}


def _with_points(model, frames: Sequence[Frame]) -> list[Frame]:
    """The frames with a made-up LiDAR scan, where the model takes one."""
    from .runtime.stream import made_up_points

    config = model.system.config
    points = made_up_points(config) if config.sweeps else None
    return [replace(frame, points=points) for frame in frames]


def _measured(
    word: str,
    device: str,
    backend: str,
    precision: str,
    frames: Sequence[Frame],
    steps: int,
    done: Callable[[int], Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What one combination costs, and how far it is from eager in float32."""
    from .data import pattern
    from .runtime import Stream, built, load

    before = _memory_begins(device)
    say("built or found")
    model = built(load(word, device=device), backend, len(pattern.NAMES), precision)
    warm_up = model.system.config.frames
    frames = _with_points(model, frames)[: warm_up + steps + FEW]
    stream, stages = Stream(model), {name: [] for name in STAGES}
    say("warming up")
    for k, frame in enumerate(frames[: warm_up + steps]):
        if k == warm_up:
            say("streaming")
            _forget_peak(device)
        stream.step(frame)
        for name, seconds in stream.seconds.items() if k >= warm_up else ():
            stages[name].append(seconds)
        if k >= warm_up:
            done(1)
    memory = _memory_peak(device, before)
    stages["total"] = [sum(parts) for parts in zip(*(stages[name] for name in STAGES[:-1]), strict=True)]
    told = {
        "ms": {name: _percentiles(seconds) for name, seconds in stages.items()},
        "steps/s": round(steps / sum(stages["total"]), 2),
        "memory MB": memory,
        "window": None,
        "from float32": None,
    }
    if (backend, precision) == PLAIN:  # an engine is made for one instant
        say("from its whole window")
        told["window"] = _recomputed(stream, frames, told["ms"]["network"]["p50"])
    else:
        say("compared")
        told["from float32"] = _apart(Stream(load(word, device=device)), Stream(model), frames[: warm_up + FEW])
    return told


@torch.inference_mode()
def _recomputed(stream, frames: Sequence[Frame], p50: float) -> dict[str, float]:
    """The last FEW frames, each also from its whole window as one clip. ms: median of the network, with its encoder for
    all instants; times: as many as a streaming step's p50; labels differ: share of filled voxels that it calls
    something else than the stream does."""
    from .runtime.prepare import prepare

    model, seconds, apart = stream.model, [], []
    system, wait = model.system, _wait(str(model.device))
    config = system.config
    for k in range(len(frames) - FEW, len(frames)):
        told = stream.step(frames[k])
        window = [prepare(f, config.height, config.width, model.resize) for f in frames[k - config.frames + 1 : k + 1]]
        begun = time.perf_counter()
        output, _ = system(Clip.of(window[::-1]).to(model.device), None)
        wait()
        seconds.append(time.perf_counter() - begun)
        apart.append(_labels_and_scores(told, system.decode(output)[0].to("cpu"))[0])
    ms = round(median(seconds) * 1e3, 2)
    return {"ms": ms, "times": round(ms / p50, 2), "labels differ": float(f"{fmean(apart):.2e}")}


def _labels_and_scores(one: Prediction, other: Prediction) -> tuple[float, float, float]:
    """Over voxels that either fills: share with another label; largest and mean difference of scores."""
    filled = (one.labels != one.classes.free) | (other.labels != other.classes.free)
    if not filled.any():
        return 0.0, 0.0, 0.0
    scores = (one.score.float() - other.score.float())[filled].abs()
    return float((one.labels != other.labels)[filled].float().mean()), float(scores.max()), float(scores.mean())


def _apart(exact, stream, frames: Sequence[Frame]) -> dict[str, float]:
    """Two streams along the same frames: the share of labels that differ, its mean over the steps and its largest, and
    of scores the mean and largest difference; each over voxels that either fills."""
    shares, largest, means = zip(*(_labels_and_scores(exact.step(f), stream.step(f)) for f in frames), strict=True)
    found = {
        "labels mean": fmean(shares),
        "labels largest": max(shares),
        "scores mean": fmean(means),
        "scores largest": max(largest),
    }
    return {name: float(f"{value:.2e}") for name, value in found.items()}


# ---- what a step counts, and the least time for it ------------------------------------------------------------------


def counted(model, frames: Sequence[Frame]) -> dict[str, float]:
    """GFLOP and MB of the network in one streaming step that has its whole window, counted on the CPU in float32.

    Operations: products of matrices, convolutions and attention, two a multiplication and addition. Not: what is done
    number by number, norms, sampling, distances, the making of voxels, what the cameras observe.

    Bytes: all weights once; each row of features that a point looks up once, though several layers look and many points
    share it; the pictures that are new. Not: what layers write and read again between each other, the program itself.
    So it is what even a network of one kernel would have to fetch, if nothing of it were in a cache.

    model: eager, on the CPU. frames: at least `config.frames` of them.
    """
    from .runtime.prepare import prepare

    system = deepcopy(model.system).requires_grad_(False)  # the counter asks for gradients of what needs some
    config, memory, last = system.config, None, None
    for frame in frames[: config.frames]:
        frame = prepare(frame, config.height, config.width, model.resize)
        clip = Clip.of(frame, after=last)
        with torch.inference_mode(), Work() as work:  # the last one is told
            _, memory = system(clip, memory)
        last = frame
    weights = sum(p.numel() * p.element_size() for p in system.parameters())
    return {
        "GFLOP": round(work.operations / 1e9, 3),
        "MB": round((weights + work.rows + last.images.numel()) / 1e6, 3),
    }


class Work:
    """Counts what runs inside, on the CPU: `operations` (FLOP), and `rows`, bytes of the features that are sampled."""

    def __enter__(self) -> "Work":
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the counter knows those of GPUs only
        self._rows, self._flops = _Rows(), FlopCounterMode(display=False, custom_mapping={attention: _attention})
        self._rows.__enter__()
        self._flops.__enter__()  # inside: it takes apart what inference mode leaves whole
        return self

    def __exit__(self, *problem) -> None:
        self._flops.__exit__(*problem)
        self._rows.__exit__(*problem)
        self.operations, self.rows = self._flops.get_total_flops(), self._rows.bytes()


def _attention(query, key, value, *_, out_shape=None, **__) -> int:
    """Of shapes (B, heads, Q, C): products with keys, then with values."""
    batch, heads, queries, channels = query
    return 2 * batch * heads * queries * key[2] * (channels + value[3])


class _Rows(TorchDispatchMode):
    """Which rows of tables are looked up with a share that is not zero."""

    def __init__(self):
        super().__init__()
        self.met: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by its address: table, which of its rows

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten._embedding_bag.default, aten._embedding_bag_forward_only.default):
            table, index, shares = args[0], args[1], args[6]
            index = index.flatten()[shares.flatten() != 0].long()
            _, rows = self.met.setdefault(table.data_ptr(), (table, torch.zeros(len(table), dtype=torch.bool)))
            rows[index] = True
        return func(*args, **(kwargs or {}))

    def bytes(self) -> int:
        return sum(int(rows.sum()) * table.shape[1] * table.element_size() for table, rows in self.met.values())


def probed(device: str, precisions: Sequence[str] = PRECISIONS) -> dict[str, float]:
    """What a device does at best, of a short try: GFLOP/s of a product of square matrices, by precision, and "GB/s",
    read and written, of a copy that no cache holds.

    On a GPU float32 goes through TF32 where PyTorch lets convolutions do so.
    """
    from .runtime.backends import ROUNDINGS

    gpu = torch.device(device).type == "cuda"
    told, matmul = {}, torch.backends.cuda.matmul
    edge, size = (8192, 2**30) if gpu else (1024, 2**28)
    before, matmul.allow_tf32 = matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for precision in precisions:
            kind = ROUNDINGS[precision].kind or torch.float32
            a = torch.full((edge, edge), 0.5, dtype=kind, device=device)
            given = torch.empty_like(a)
            told[precision] = round(2e-9 * edge**3 / _least(lambda a=a, to=given: torch.mm(a, a, out=to), device), 1)
    finally:
        matmul.allow_tf32 = before
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    return told | {"GB/s": round(2e-9 * size / _least(lambda: b.copy_(a), device), 2)}


def _least(work: Callable[[], Any], device: str, seconds: float = 0.3) -> float:
    """s of the fastest of the runs that fit into a time, after one that does not count."""
    wait, found = _wait(device), []
    work()
    wait()
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        begun = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - begun)
    return min(found)


def _floor(row: dict[str, Any], probes: dict[str, float], precision: str) -> dict[str, float]:
    """The least ms for what is counted: operations at the peak or bytes at the bandwidth, whichever is longer; and its
    share of what the network takes. (Kernels that multiply less than counted, as Winograd's, may be below it.)"""
    floor = max(row["GFLOP"] / probes[precision], row["MB"] / 1e3 / probes["GB/s"]) * 1e3
    return {"floor ms": round(floor, 3), "floor reached": round(floor / row["ms"]["network"]["p50"], 4)}


# ---- memory and time of a device ------------------------------------------------------------------------------------


def _wait(device: str) -> Callable[[], None]:
    """Until the device has done what it was told."""
    return (lambda: torch.cuda.synchronize(device)) if torch.device(device).type == "cuda" else lambda: None


def _memory_begins(device: str) -> float | None:
    """MB before a model is loaded: what was let go is given back first, as far as that can be had."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        return 0.0
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
    return _resident("VmRSS")


def _forget_peak(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is that from now on


def _memory_peak(device: str, before: float | None) -> float | None:
    """MB: on a GPU the most that tensors took, on the CPU by how much the process grew (what compiled an engine in it
    counts); None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    peak = _resident("VmHWM")
    return None if peak is None or before is None else round(peak - before, 1)


def _resident(field: str) -> float | None:
    """MB, of /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return int(found[0]) * 1024 / 1e6 if found else None


def stream_table(figures: dict[str, Any]) -> str:
    """The figures of `bench_stream` as a Markdown table, with what they mean below."""
    names = ["model", "backend", "precision", "device", *(f"{stage} ms" for stage in STAGES), "steps/s", "memory MB"]
    names += ["whole window", "GFLOP", "MB", "floor ms", "floor reached", "note"]
    lines = [figures["what"], figures["machine"], "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in figures["rows"]:
        cells = [row[name] for name in names[:4]]
        if row["why"] is not None:
            cells += ["–"] * (len(names) - 5) + [row["why"]]
        else:
            cells += [" / ".join(str(ms) for ms in row["ms"][stage].values()) for stage in STAGES]
            window, apart = row["window"], row["from float32"]
            cells += [row["steps/s"], row["memory MB"], None if window is None else f"{window['times']} x"]
            cells += [row["GFLOP"], row["MB"], row["floor ms"], f"{100 * row['floor reached']:.3g} %"]
            note = ""
            if apart is not None:
                labels = f"labels {100 * apart['labels mean']:.3g} % (at most {100 * apart['labels largest']:.3g} %)"
                note = f"from eager float32: {labels}, scores {apart['scores mean']:g} (at most "
                note += f"{apart['scores largest']:g})"
            cells.append(note)
        lines.append("| " + " | ".join("–" if cell is None else str(cell) for cell in cells) + " |")
    lines.append("")
    for device, probes in figures["probes"].items():
        peaks = ", ".join(f"{most} GFLOP/s in {p}" for p, most in probes.items() if p != "GB/s")
        lines.append(f"{device}, tried before: {peaks}, {probes['GB/s']} GB/s read and written by a copy.")
    lines += [
        "Stages: p50 / p95 / p99. Whole window: the network's time where it is given all its instants at each step, in "
        "streaming steps.",
        "Floor: GFLOP at that rate or MB at that bandwidth, whichever is longer; reached: its share of the network's "
        "p50.",
    ]
    return "\n".join(lines)
