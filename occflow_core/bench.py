"""Timings. What is measured here is printed with the machine it ran on; nothing is asserted."""

import json
import os
import platform
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .geometry import OCC3D_GRID, rigid
from .metrics import FlowError, Miou, RayIou, Scores, hits
from .types import OPENOCC, Occupancy, Prediction


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
    sets: int, model: str, weights: Path | None = None, device: str = "cpu", backend: str = "eager"
) -> dict[str, Any]:
    """What a network costs from six pictures of 1600 x 900 (and a made-up LiDAR scan, if it takes one) to voxels,
    streaming at 2 Hz. Stages, each in ms (p50, p95, p99):

    prepare: pictures to the network's size; network; voxels: decode; visibility: what the cameras observe; all. Errors
    are those of `runtime.load` and `runtime.built`.
    """
    from .data import pattern
    from .runtime import Stream, built, load
    from .runtime.stream import made_up_points

    loaded = built(load(model, weights, device), backend, cameras=len(pattern.NAMES))
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
        "what": f"{loaded.name}, {backend}, {parameters / 1e6:.1f} M parameters, {sets} sets, {threads}, "
        f"process of {memory} MB",
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
