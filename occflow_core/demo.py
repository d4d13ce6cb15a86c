"""The whole path on one machine: a recorded drive, the real node, real ROS 2 between separate processes.

replay process -> DDS -> node process -> DDS -> this process (records) -> output bag, pictures, summary.json
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bench import machine, write_json

CONFIG = Path(__file__).resolve().parents[1] / "config" / "occflow.yaml"
TOPIC = "/occflow/occupancy"
MODEL_NAME = "opus-demo"


@dataclass
class Recording:
    """What the node said during one drive."""

    occupancy: list[tuple[float, bytes]] = field(default_factory=list)  # (s, steady; CDR of a VoxelFlow)
    diagnostics: list[Any] = field(default_factory=list)  # diagnostic_msgs/DiagnosticArray, all of /diagnostics
    node_exit: int | None = None
    log: str = ""  # what the node printed

    def counts(self) -> dict[str, str]:
        """The newest values of the node's own status: counts, latencies, the model's name."""
        for message in reversed(self.diagnostics):
            for status in message.status:
                if status.name == "occflow: occupancy":
                    return {pair.key: pair.value for pair in status.values}
        return {}

    def cameras(self) -> dict[str, dict[str, str]]:
        """The newest status of each camera."""
        if not self.diagnostics:
            return {}
        statuses = self.diagnostics[-1].status[1:]
        told = {s.name: {"message": s.message} | {p.key: p.value for p in s.values} for s in statuses}
        return {name.removeprefix("occflow: "): values for name, values in told.items()}


def drive(
    bag: Path,
    config: Path = CONFIG,
    overrides: Sequence[str] = (),  # further `name:=value` parameters of the node
    rate: float = 1.0,
    settle: float = 3.0,  # s without a message after the replay's end, after which the node has said all
    start_within: float = 90.0,  # s for the node to load, warm up and listen
    answered: bool = False,  # the replay waits for the node after each set: nothing is skipped, however slow it is
) -> Recording:
    """Replays a bag into a node and records what it says: three processes, a DDS domain of their own, localhost."""
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from occflow_msgs.msg import VoxelFlow
    from rclpy.qos import QoSProfile

    domain = random.SystemRandom().randint(1, 101)
    environment = {**os.environ, "ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"  # read by this process's own context below
    parameters = [item for o in ("use_sim_time:=true", *overrides) for item in ("-p", o)]
    node_command = [sys.executable, "-m", "occflow_ros.node", "--ros-args", "--params-file", str(config), *parameters]
    replay_command = [sys.executable, "-m", "occflow_ros.replay", str(bag), "--rate", str(rate)]
    replay_command += ["--wait", str(start_within), *(["--answers", TOPIC] if answered else [])]

    recording, context = Recording(), rclpy.Context()
    rclpy.init(context=context, domain_id=domain)
    node = executor = running = replay = None
    with tempfile.TemporaryFile("w+") as log:
        try:
            node = rclpy.create_node("occflow_demo", context=context)
            executor = rclpy.executors.SingleThreadedExecutor(context=context)
            executor.add_node(node)
            node.create_subscription(
                VoxelFlow,
                TOPIC,
                lambda raw: recording.occupancy.append((time.monotonic(), raw)),
                QoSProfile(depth=100),
                raw=True,
            )
            node.create_subscription(DiagnosticArray, "/diagnostics", recording.diagnostics.append, 100)
            running = subprocess.Popen(node_command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            replay = subprocess.Popen(replay_command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            while replay.poll() is None:
                executor.spin_once(timeout_sec=0.1)
                if running.poll() is not None:
                    raise RuntimeError(f"the node ended with exit code {running.returncode}: {_tail(log)}")
            if replay.returncode != 0:
                raise RuntimeError(f"the replay ended with exit code {replay.returncode}: {_tail(log)}")
            quiet, heard = time.monotonic() + settle, len(recording.occupancy)
            while time.monotonic() < quiet:
                executor.spin_once(timeout_sec=0.1)
                if len(recording.occupancy) > heard:
                    quiet, heard = time.monotonic() + settle, len(recording.occupancy)
            running.send_signal(signal.SIGINT)
            recording.node_exit = running.wait(timeout=20)
        finally:
            for process in (running, replay):
                if process is not None and process.poll() is None:
                    process.kill()
                    process.wait()
            if executor is not None:
                executor.shutdown()
            if node is not None:
                node.destroy_node()
            rclpy.try_shutdown(context=context)
            log.seek(0)
            recording.log = log.read()
    return recording


def run(out: Path, seconds: float, rate: float) -> str:
    """Makes a drive, drives it, and replaces `out` by what came of it; gives the summary as text.

    The drive is a scene of the synthetic world: keyframes at 2 Hz, which is what the truth beside them is for.
    """
    from occflow_ros.replay import header_stamp

    from .data.bag import BagWriter
    from .data.drives import write_scene_bag
    from .data.nuscenes import NuScenes
    from .data.world import write_world
    from .data.world.write import DEMO_SEED
    from .show.pictures import show_bag

    keyframes = round(2 * seconds) + 1
    if keyframes < 2:
        raise ValueError(f"a drive of {seconds:g} s has no second keyframe, give at least 0.5")
    if out.exists() and not (out / "summary.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} holds something that is no demo's result; it would be replaced, so name another --out")
    begin = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        print(f"1/4 making a synthetic street: {keyframes} keyframes, six cameras, a LiDAR, exact labels", flush=True)
        made = write_world(
            work / "world", seed=DEMO_SEED, keyframes=keyframes, size=(198, 352), weather="clear", sweeps=False
        )
        world = NuScenes(made, progress=False)
        (scene,) = world.scenes
        write_scene_bag(work / "world", scene, work / "recording")
        print("2/4 driving the node through it", flush=True)
        # the deadline runs on the steady clock: a slower replay needs a longer one
        overrides = ["camera_rate:=2.0", f"set_deadline:={max(0.12, 0.12 / rate):.3f}"]
        recording = drive(work / "recording", overrides=overrides, rate=rate, answered=True)
        print("3/4 writing what it said", flush=True)
        with BagWriter(work / "predictions") as bag:
            bag.add(TOPIC, "occflow_msgs/msg/VoxelFlow")
            for _, raw in recording.occupancy:
                bag.write(TOPIC, header_stamp(raw), raw)
        report = scored(work / "predictions", world, scene, recording.counts().get("model", "none"))
        print("4/4 making pictures", flush=True)
        pictures = show_bag(work / "recording", work / "predictions", work / "pictures")
        summary = summarise(recording, keyframes, rate) | {"scores": report}
        summary["pictures"] = len(pictures)
        summary["seconds in all"] = round(time.monotonic() - begin, 1)
        write_json(work / "summary.json", summary)
        (work / "node.log").write_text(recording.log)
        work.chmod(0o755)  # what mkdtemp makes is for its maker's eyes only
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return text(summary, out)


def scored(predictions: Path, world: Any, scene: str, model: str) -> dict[str, Any]:
    """What the node said in a bag against the world's truth, beside the baselines, as `evaluate_into` reports it.

    world: the `NuScenes` that the drive came from.
    """
    from .data.bag import read_bag
    from .engine.average import load as load_average
    from .engine.evaluate import Job, average_path, evaluate_said, reported
    from .runtime import shipped
    from .show.pictures import SAME
    from .voxelflow import unpack

    said = {}
    keyframes = world.keyframes(scene)
    for _, stamp, message in read_bag(predictions):
        nearest = min(keyframes, key=lambda moment: abs(moment.stamp - stamp))
        if abs(nearest.stamp - stamp) <= SAME:  # a message's stamp is its newest picture's
            said[nearest.sample] = unpack(message)
    weights = shipped(MODEL_NAME)
    average = None if weights is None else load_average(average_path(weights))[0]
    job = Job(world, "openocc", average=average)
    report = reported(job, evaluate_said(job, scene, said), [scene])
    return report | {"model": model, "answered": f"{len(said)} of {len(keyframes)}"}


def summarise(recording: Recording, frames: int, rate: float) -> dict[str, Any]:
    """The figures of summary.json, all of them counted or timed in this run."""
    counts = recording.counts()
    stages: dict[str, dict[str, float]] = {}
    for key, value in counts.items():
        if key.endswith(" ms"):
            stage, percentile, _ = key.rsplit(" ", 2)
            stages.setdefault(stage, {})[percentile] = float(value)
    times = [t for t, _ in recording.occupancy]
    number = {k: int(v) for k, v in counts.items() if v.isdigit()}
    return {
        "model": counts.get("model", "none"),
        "trained": "(untrained)" not in counts.get("model", "(untrained)"),
        "machine": machine(),
        "replay rate": rate,
        "frames in": frames,
        "sets": {name: number.get(f"sets {name}", 0) for name in ("complete", "partial", "skipped")},
        "messages out": len(recording.occupancy),
        "answered": round(len(recording.occupancy) / frames, 3),
        "output rate Hz": round((len(times) - 1) / (times[-1] - times[0]), 2) if len(times) > 1 else 0.0,
        "latency ms": stages,
        "cameras": recording.cameras(),
        "node exit code": recording.node_exit,
    }


def text(summary: dict[str, Any], out: Path) -> str:
    """The summary for people."""
    from .engine.evaluate import table

    sets = summary["sets"]
    lines = [
        "",
        f"model            {summary['model']}",
        f"recording        {summary['frames in']} frames of six cameras at 2 Hz, at {summary['replay rate']:g}x",
        f"sets             {sets['complete']} complete, {sets['partial']} partial, {sets['skipped']} skipped",
        f"messages out     {summary['messages out']}, {summary['output rate Hz']} Hz",
        "",
        table(summary["scores"]),
        "",
        f"{'stage':<14}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}",
    ]
    lines += [f"{s:<14}{p['p50']:>9}{p['p95']:>9}{p['p99']:>9}" for s, p in summary["latency ms"].items()]
    lines += ["", f"{summary['pictures']} pictures, both bags and summary.json in {out}; {summary['seconds in all']} s"]
    if not summary["trained"]:
        lines.append("The weights are random numbers (untrained): the path is real, what it shows means nothing yet.")
    return "\n".join(lines)


def _tail(log) -> str:
    log.flush()
    log.seek(0)
    return " | ".join(log.read().strip().splitlines()[-5:])
