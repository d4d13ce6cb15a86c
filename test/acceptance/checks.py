"""The checks. Each is a function that drives the real node and returns what it measured and whether that is enough.

Where the stand-in network drives, its voxels are 0.8 m long, or 1.6 m where nothing but the sets counts: what a camera
sees of 640,000 voxels of 0.4 m takes a CPU longer than the 83 ms between two sweeps.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import torch
from ros.fake import CAMERAS, HEIGHT, WIDTH, seen_by_one_alone

from occflow_core.types import NANO
from occflow_core.voxelflow import unpack

from .ride import ALL, PERIOD, ROOT, STAGGER, Answer, Ride, environment

MAIN = 60  # the DDS domains of the checks begin after it, one each; the tests' end before it, or begin at 80


@dataclass(frozen=True)
class Outcome:
    ours: str  # in a few words, for the table
    reached: bool | None  # None: nobody measured it here
    figures: dict[str, Any] = field(default_factory=dict)


# ---- 1 a dead camera


def dead_camera(
    domain: int = MAIN + 1, cameras: Sequence[str] = CAMERAS, dead: int = 36, back: int = 12, spared: int = 0
) -> Outcome:
    """One camera after the other is silent for `dead` sweeps; then it is back for `back`.

    `spared`: sweeps of each camera's that a busy machine may leave unanswered, answer without others, or answer late.
    """
    figures = {}
    with Ride(domain, coarser=2) as ride:
        for camera in cameras:
            bit, alone = 1 << CAMERAS.index(camera), None
            ride.clear()
            ride.drive(12)
            before = [a for a in ride.answers if a.used == ALL]
            ride.clear()
            gone = set(ride.drive(dead, lost=lambda _, name: name == camera))  # noqa: B023
            there = ride.drive(back)
            ride.spin(0.5)
            partial = [a for a in ride.answers if a.stamp in gone]
            full = [there.index(a.stamp) + 1 for a in ride.answers if a.stamp in there and a.used == ALL]
            alone = seen_by_one_alone(camera, unpack(ride.answers[-1].message).grid)
            figures[camera] = {
                "sets of sweeps": round(len(partial) / dead, 3),
                "sets with it": sum(bool(a.used & bit) for a in partial),
                "sets without another": sum(a.used | bit != ALL for a in partial),
                "voxels that it alone sees": int(alone.sum()),
                "of them observed before": round(_observed(before, alone, max), 3),
                "of them observed without it": _observed(partial, alone, max),
                "full again with set": min(full, default=None),
            }
    least = min(f["sets of sweeps"] for f in figures.values())
    masks = all(not f["sets with it"] and f["sets without another"] <= spared for f in figures.values())
    leaked = max(f["of them observed without it"] for f in figures.values())
    known = min(f["of them observed before"] for f in figures.values())
    again = max(f["full again with set"] or back for f in figures.values())
    ours = (
        f"{len(cameras)} cameras in turn: at least {least:.1%} of the rate; masks {'right' if masks else 'wrong'}; "
        f"{leaked:.1%} of its own view observed (before: {known:.0%}); full again with set {again}"
    )
    rate = least >= 0.95 - spared / dead
    return Outcome(ours, rate and masks and leaked == 0 and known > 0.5 and again <= 2 + spared, figures)


def _observed(answers: list[Answer], voxels: np.ndarray, of: Callable) -> float:
    """The share of voxels that a message calls observed, of the message with the most."""
    return of((float((~unpack(a.message).unobserved.numpy()[voxels]).mean()) for a in answers), default=0.0)


# ---- 2 random loss


def random_loss(domain: int = MAIN + 2, sweeps: int = 720, share: float = 0.01, spared: int = 0) -> Outcome:
    """Each image is lost with this probability; cameras trigger in turn, as nuScenes' do.

    A partial set leaves together with the next one, and while the network has one of the two in hand a third would push
    the other out: the coarsest voxels, so that sets and not voxels are what is measured. `spared`: sweeps that a busy
    machine may leave unanswered.
    """
    random = np.random.default_rng(0)
    losses = random.random((sweeps, len(CAMERAS))) < share
    with Ride(domain, coarser=8, stagger=STAGGER) as ride:
        newest = ride.drive(sweeps, lost=lambda sweep, name: bool(losses[sweep, CAMERAS.index(name)]))
        ride.spin(1.5)
        answers, last, told = ride.answers, ride.stamp, ride.status()[2]
        # a sweep begins every period; its images lie within 43 ms of that
        first = last - (sweeps - 1) * round(PERIOD * NANO)
        sweep_of = [{(s * 1000 - first + NANO // 1000) // round(PERIOD * NANO) for s in a.stamps()} for a in answers]
    mixed = sum(len(of) > 1 for of in sweep_of)
    answered = {of.pop() for of in sweep_of if len(of) == 1}
    figures = {
        "sweeps": sweeps,
        "images lost": int(losses.sum()),
        "sweeps with a loss": int(losses.any(1).sum()),
        "sweeps without an image": int(losses.all(1).sum()),
        "messages": len(answers),
        "sweeps answered": len(answered),
        "unanswered": sorted({*range(sweeps)} - answered),
        "mixed": mixed,
        "complete": sum(a.used == ALL for a in answers),
        "counted by the node": {k: v for k, v in told.items() if k.startswith("sets ")},
    }
    ours = (
        f"{len(answered)} of {len(newest)} sweeps answered ({figures['complete']} complete, "
        f"{len(answers) - figures['complete']} partial), {mixed} mixed; {figures['images lost']} images lost"
    )
    enough = len(answered) >= len(newest) - spared and len(answers) == len(answered)
    return Outcome(ours, enough and mixed == 0, figures)


# ---- 3 laps


def laps(domain: int = MAIN + 3, sweeps: int = 228, silent: float = 2.0, count: int = 3) -> Outcome:
    """A bag is played `count` times; one camera is silent for the last `silent` s of each lap."""
    from occflow_core.data import pattern
    from occflow_core.data.bag import write_bag

    frames = []
    for k, frame in enumerate(pattern.drive(sweeps, height=90, width=160)):
        used = frame.used.clone()
        used[3] = k < sweeps - round(silent / PERIOD)
        frames.append(replace(frame, used=used))
    with tempfile.TemporaryDirectory() as folder, Ride(domain, coarser=4, stagger=STAGGER, ready=False) as ride:
        write_bag(Path(folder) / "bag", frames, pattern.rig(90, 160), progress=False)
        # the car's own publishers would be second ones on the bag's topics
        for publisher in (*ride.car.images.values(), *ride.car.infos.values(), ride.car.clock):
            ride.car.node.destroy_publisher(publisher)
        ride.until(lambda: "active" in ride.log, 60.0)
        replay = ride.start(
            ["-m", "occflow_ros.replay", str(Path(folder) / "bag"), "--loop", str(count), "--wait", "60"]
        )
        ride.until(lambda: replay.poll() is not None, 90.0 + count * (sweeps * PERIOD + 3))
        ride.spin(1.0)
        replay.kill()
        answers, exit_code = ride.answers, replay.wait()
    counts, partial, before = [0], [0], -1
    for answer in answers:
        if answer.stamp < before:
            counts.append(0)
            partial.append(0)
        before = answer.stamp
        counts[-1] += 1
        partial[-1] += answer.used != ALL
    figures = {"sweeps a lap": sweeps, "sets a lap": counts, "partial": partial, "replay exit code": exit_code}
    right = len(counts) == count and all(abs(n - sweeps) <= 2 for n in counts) and exit_code == 0
    ours = f"{', '.join(map(str, counts))} sets in laps of {sweeps} sweeps"
    return Outcome(ours, right and min(partial) >= round(silent / PERIOD) - 2, figures)


# ---- 4 a frozen camera


def frozen_camera(domain: int = MAIN + 4, night: int = 120) -> Outcome:
    """One camera repeats its last image, then its last picture under new stamps; then `night` sweeps in the dark."""
    camera = "cam_back"
    bit = 1 << CAMERAS.index(camera)
    kept = array("B", _jpeg(np.full((HEIGHT, WIDTH, 3), 90, np.uint8)))
    random = np.random.default_rng(0)

    def dark() -> array:
        noise = np.abs(random.normal(0.0, 2.0, (HEIGHT, WIDTH, 3)))
        return array("B", _jpeg(np.minimum(noise, 255).astype(np.uint8)))

    figures: dict[str, Any] = {}
    with Ride(domain, coarser=2) as ride:
        for what in ("stamp", "picture"):
            ride.drive(12)
            ride.clear()
            held = ride.stamp + round(PERIOD * NANO)

            def shoot(name: str, stamp: int) -> None:
                if name == camera:
                    ride.car.shoot(name, held if what == "stamp" else stamp, kept)  # noqa: B023
                else:
                    ride.car.shoot(name, stamp)

            # by its stamp alone no image of it enters a second set: when the image left of which it is said counts
            begin, found = time.monotonic(), None
            for _ in range(24):
                ride.drive(1, shoot=shoot)
                if found is None and f"frozen: the {what}" in ride.log:
                    found = ride.sent[ride.stamp] - begin
            last = max((a.arrived for a in ride.answers if a.used & bit), default=begin)
            figures[f"same {what}: masked after s"] = round(max(last - begin, found or 0.0), 2)
            figures[f"same {what}: said"] = found is not None
            figures[f"same {what}: last sets without it"] = all(not a.used & bit for a in ride.answers[-6:])
        ride.drive(12)
        ride.clear()
        before = _frozen(ride)
        pictures = {name: [dark() for _ in range(night)] for name in CAMERAS}
        counted = Counter(dict.fromkeys(CAMERAS, 0))

        def at_night(name: str, stamp: int) -> None:
            ride.car.shoot(name, stamp, pictures[name][counted[name]])
            counted[name] += 1

        ride.drive(night, shoot=at_night)
        ride.spin(0.5)
        figures["night: sweeps"] = night
        figures["night: sets"] = len(ride.answers)
        figures["night: sets without a camera"] = sum(a.used != ALL for a in ride.answers)
        figures["night: images called frozen"] = _frozen(ride) - before
    stamp, picture = figures["same stamp: masked after s"], figures["same picture: masked after s"]
    alarms = figures["night: images called frozen"]  # a set may lack a camera for want of time alone
    right = all(figures[f"same {w}: {x}"] for w in ("stamp", "picture") for x in ("said", "last sets without it"))
    ours = (
        f"same stamp masked after {stamp} s, same bytes after {picture} s; {alarms} false alarms in {night} dark sets"
    )
    return Outcome(ours, right and max(stamp, picture) <= 1.0 and alarms == 0 and len(ride.answers) > 0, figures)


def _frozen(ride: Ride) -> int:
    """How many images the node has refused until now as those of a frozen camera."""
    ride.diagnostics.clear()
    ride.until(lambda: len(ride.diagnostics) >= 2)  # the first one may have been on its way
    told = [item for name in CAMERAS for item in ride.status(name)[2].items()]
    return sum(int(value) for key, value in told if key.startswith("dropped: frozen"))


def _jpeg(picture: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


# ---- 5 a start among faults


def faulty_start(domain: int = MAIN + 5) -> Outcome:
    """Four of six cameras are wrong from the start, each in its own way; and a drive without any TF of the car."""
    from sensor_msgs.msg import Image

    wrong = {
        "cam_front": "no TF of its frame",
        "cam_back": "NaN in K",
        "cam_front_left": "unknown encoding",
        "cam_back_left": "truncated JPEG",
    }
    good = ALL & ~sum(1 << CAMERAS.index(name) for name in wrong)
    whole = array("B", _jpeg(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)))
    figures: dict[str, Any] = {}
    with Ride(domain, coarser=2, ready=False, **{"camera.cam_front_left.compressed": False}) as ride:
        car = ride.car
        car.node.destroy_publisher(car.images["cam_front_left"])
        car.images["cam_front_left"] = car.node.create_publisher(Image, "/cam_front_left/image_raw/compressed", 5)
        car.names = tuple(name for name in CAMERAS if name != "cam_front")  # what `mount` tells of

        def lie() -> None:
            car.mount()
            for name in CAMERAS:
                car.info(name, **({"k": [float("nan"), *[0.0] * 8]} if name == "cam_back" else {}))

        def shoot(name: str, stamp: int) -> None:
            if name == "cam_front_left":
                message = Image(height=HEIGHT, width=WIDTH, step=WIDTH, encoding="32FC7")
                message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, NANO)
                message.data = array("B", bytes(HEIGHT * WIDTH))
                car.images[name].publish(message)
            else:
                car.shoot(name, stamp, whole[: len(whole) // 2] if name == "cam_back_left" else None)

        ride.introduce = lie
        ride.connected()
        ride.drive(36, shoot=shoot)
        ride.spin(1.0)
        log = ride.log
        figures["alive"] = ride.alive
        figures["sets"] = len(ride.answers)
        figures["of wrong cameras"] = sum(bool(a.used & ~good) for a in ride.answers)
        figures["said"] = {
            wrong["cam_front"]: _said(log, "/cam_front/image_raw/compressed", "cam_front_optical_frame"),
            wrong["cam_back"]: _said(log, "/cam_back/camera_info", "nan"),
            wrong["cam_front_left"]: _said(log, "/cam_front_left/image_raw/compressed", "32FC7"),
            wrong["cam_back_left"]: _said(log, "/cam_back_left/image_raw/compressed", "JPEG"),
        }
    with Ride(domain, coarser=2, ready=False) as ride:
        ride.connected()
        ride.drive(36, move=False)
        ride.spin(1.0)
        figures["alive without TF"] = ride.alive
        figures["sets without TF"] = len(ride.answers)
        figures["said"]["no TF of the car"] = _said(ride.log, "TF", "map")
    said = sum(figures["said"].values())
    right = figures["alive"] and figures["alive without TF"] and figures["sets"] > 20 and said == len(figures["said"])
    ours = (
        f"{said} of 5 faults named with topic and frame; {figures['of wrong cameras']} images of theirs in "
        f"{figures['sets']} sets, {figures['sets without TF']} sets without TF; the node "
        f"{'lives' if figures['alive'] and figures['alive without TF'] else 'died'}"
    )
    return Outcome(ours, right and figures["of wrong cameras"] == figures["sets without TF"] == 0, figures)


def _said(log: str, *words: str) -> bool:
    """Is there one line with all of them?"""
    return any(all(word in line for word in words) for line in log.splitlines())


# ---- 7 overload


def overload(domain: int = MAIN + 7, seconds: float = 300.0, slower: float = 3.0, slack: float = 0.0) -> Outcome:
    """The network takes `slower` periods of the cameras. An output's age counts from when its newest image was sent to
    when it was received here; `slack` s more than the bound, and of growth, may be allowed."""
    from occflow_ros import convert

    delay, took = slower * PERIOD, []  # took: s, each set from its first decoding until it is published
    with Ride(domain, delay=delay, coarser=2) as ride:
        topic = "/occflow/debug/processing_time/total_ms"
        ride.listener.create_subscription(convert.time_kind(), topic, lambda m: took.append(m.data / 1e3), 100)
        ride.drive(round(seconds / PERIOD))
        ride.spin(1.0)
        ages = np.array([a.arrived - ride.sent[a.stamp] for a in ride.answers if a.stamp in ride.sent])
        total = {f"p{p}": float(np.percentile(took, p)) for p in (50, 99)}
    quarter = len(ages) // 4
    first, last = float(np.median(ages[:quarter])), float(np.median(ages[-quarter:]))
    p50, p99, most = (round(float(v), 4) for v in (*np.percentile(ages, (50, 99)), ages.max()))
    bound = total["p99"] + PERIOD + slack
    figures = {
        "seconds": seconds,
        "sets": len(ages),
        "network s": round(delay, 4),
        "a set takes s": total,
        "age s": {"p50": p50, "p99": p99, "max": most},
        "bound s": round(bound, 4),
        "median age of the first quarter, of the last": [round(first, 4), round(last, 4)],
    }
    ours = (
        f"{seconds:g} s, a set takes {total['p50'] * 1e3:.0f} ms: age p50 {p50 * 1e3:.0f}, p99 {p99 * 1e3:.0f}, max "
        f"{most * 1e3:.0f} ms (bound {bound * 1e3:.0f}); first quarter {first * 1e3:.0f}, last {last * 1e3:.0f} ms"
    )
    # ages spread over a period, as sweeps come anywhere within an inference; a queue that grows adds whole ones
    return Outcome(ours, p99 <= bound and last <= first + PERIOD / 2 + slack, figures)


# ---- 8 throughput, and 11 with the shipped weights


def throughput(sets: int = 20) -> Outcome:
    """What ships, outside of ROS and inside, for each stage."""
    from occflow_core.bench import bench_model, bench_node

    model = bench_model(sets, "opus-demo")
    node = _apart(bench_node, sets=100)
    recording, _ = drive_with_what_ships()
    inside: dict[str, dict[str, float]] = {}
    for key, value in recording.counts().items():
        if key.endswith(" ms"):
            stage, percentile, _ = key.rsplit(" ", 2)
            inside.setdefault(stage, {})[percentile] = float(value)
    figures = {"outside ROS": model["ms"], "the node without a network": node["ms"], "inside ROS": inside}
    full = all({"p50", "p95", "p99"} <= set(row) for rows in figures.values() for row in rows.values())
    one = lambda row: " / ".join(f"{row[p]:.0f}" for p in ("p50", "p95", "p99"))  # noqa: E731
    ours = (
        f"opus-demo on this CPU, p50 / p95 / p99 ms: outside ROS {one(model['ms']['all'])}, "
        f"inside {one(inside['total'])} (network {one(inside['network'])}); "
        f"the node's own share, 40,000 voxels, {one(node['ms']['all'])}"
    )
    return Outcome(ours, full and {"decode", "network", "publish", "total"} <= set(inside), figures)


def _apart(function: Callable, **arguments) -> Any:
    """A function of occflow_core.bench in a process and a DDS domain of its own."""
    call = f"import json; from occflow_core.bench import *; print(json.dumps({function.__name__}(**{arguments!r})))"
    ended = subprocess.run(
        [sys.executable, "-c", call], env=environment(MAIN + 8), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    if ended.returncode:
        raise RuntimeError(f"{function.__name__}: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


FRAMES, GONE = 24, range(8, 16)  # of the drive below; when its camera is silent


@cache
def drive_with_what_ships() -> tuple[Any, list[Any]]:
    """opus-demo over DDS, six JPEGs of 1600 x 900 twice a second, none skipped; cam_back is silent in the middle."""
    from occflow_msgs.msg import VoxelFlow
    from rclpy.serialization import deserialize_message

    from occflow_core.data import pattern
    from occflow_core.data.bag import write_bag
    from occflow_core.demo import drive

    back = pattern.NAMES.index("CAM_BACK")
    with tempfile.TemporaryDirectory() as folder:

        def frames():
            for k, frame in enumerate(pattern.drive(FRAMES, height=900, width=1600, rate=2.0)):
                used = frame.used.clone()
                used[back] = k not in GONE
                yield replace(frame, used=used, stamp=int(frame.stamps[used].max()))

        write_bag(Path(folder) / "bag", frames(), pattern.rig(900, 1600), progress=False)
        recording = drive(Path(folder) / "bag", overrides=["camera_rate:=2.0", "set_deadline:=0.2"], answered=True)
    return recording, [deserialize_message(raw, VoxelFlow) for _, raw in recording.occupancy]


def returning_camera() -> Outcome:
    """The shipped weights with a camera that dies and returns."""
    recording, messages = drive_with_what_ships()
    bit = 1 << list(messages[0].cameras).index("cam_back") if messages else 0
    wanted = [ALL & ~bit if k in GONE else ALL for k in range(FRAMES)]
    used = [m.cameras_used for m in messages]
    names = {m.model_name for m in messages}
    behind = [
        bool(p.unobserved[tuple(p.grid.index(torch.tensor([-15.0, 0.0, 1.0]))[0])])
        for p in (unpack(messages[k]) for k in GONE if k < len(messages))
    ]
    figures = {"sets": len(messages), "masks": used, "model": sorted(names), "exit code": recording.node_exit}
    ours = (
        f"{len(messages)} of {FRAMES} sets, masks {'right' if used == wanted else 'wrong'}, "
        f"behind the car unobserved in {sum(behind)} of {len(GONE)}; exit code {recording.node_exit}"
    )
    right = used == wanted and names == {"opus-demo"} and all(behind) and len(behind) == len(GONE)
    return Outcome(ours, right and recording.node_exit == 0, figures)


# ---- 9 the message


def message_size() -> Outcome:
    """40,000 voxels, 10,000 of them moving; the README's reader reads them."""
    from rclpy.serialization import serialize_message

    from occflow_core.bench import _full_prediction
    from occflow_ros import convert

    prediction = _full_prediction()
    message = convert.voxel_flow(prediction, NANO, "base_link", CAMERAS, (NANO,) * len(CAMERAS), "full", 0.2)
    size = len(serialize_message(message))
    (code,) = [s for s in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "read(m)" in s]
    lines, names = sum(bool(line.strip()) for line in code.splitlines()), {}
    exec(compile(code, "README.md", "exec"), names)
    centres, labels, _, velocity, unobserved = names["read"](message)
    cells, inside = prediction.grid.index(torch.from_numpy(centres))
    at = tuple(cells.T)
    equal = (
        bool(inside.all())
        and len(labels) == 40_000
        and np.array_equal(labels, prediction.labels[at])
        and np.allclose(velocity, prediction.flow[at])
        and np.array_equal(unobserved, prediction.unobserved.numpy())
        and "occflow" not in code
    )
    figures = {"bytes": size, "lines of the reader": lines, "read as written": equal}
    ours = f"{size / 1e6:.2f} MB with flow and mask; a reader of {lines} lines, numpy alone, reads it"
    return Outcome(ours if equal else f"{ours} wrongly", size <= 500_000 and lines <= 20 and equal, figures)


# ---- 10, 11, 12, 13, 14 what the test suite states


def suite(*files: str, words: str = "", timeout: float = 600.0) -> tuple[Counter, list[str]]:
    """How many tests of some files passed, failed, were skipped; the names of those that failed."""
    missing = [name for name in files if not (ROOT / name).is_file()]
    if missing:
        return Counter(missing=len(missing)), missing
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *files,
            f"--junitxml={report}",
            *(["-k", words] if words else []),
        ]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        if not report.is_file():
            raise RuntimeError(f"pytest: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        counts, failed = Counter(), []
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            bad = bool(kinds & {"failure", "error"})
            counts["failed" if bad else "skipped" if kinds else "passed"] += 1
            failed += [case.get("name")] if bad else []
    return counts, failed


def by_tests(*files: str, words: str = "", what: str = "tests") -> Outcome:
    counts, failed = suite(*files, words=words)
    names = ", ".join(Path(name).name for name in files)
    if counts["missing"]:
        return Outcome(f"{', '.join(failed)} is not there", False, {"missing": failed})
    whole = counts["passed"] + counts["failed"]
    ours = f"{counts['passed']} of {whole} {what} pass ({names})" + (f"; not: {', '.join(failed)}" if failed else "")
    if counts["skipped"]:
        ours += f"; {counts['skipped']} skipped"
    return Outcome(ours, whole > 0 and not failed, {**counts, "failed": failed})


def first_five_minutes() -> Outcome:
    """The launch file needs no argument, knows RViz and a bag; the README has a picture."""
    launched = by_tests("test/ros/test_launch.py")
    text = (ROOT / "launch" / "occflow.launch.py").read_text()
    declared = re.findall(r"^\s+([a-z_]+):=", text.partition('"""\n')[0], re.M)
    pictures = [p for p in re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text()) if (ROOT / p).is_file()]
    right = launched.reached and bool(pictures) and {"bag", "rviz"} <= set(re.findall(r"[a-z]+", text))
    ours = f"no required argument, RViz and bag in one file; {len(pictures)} picture in the README; {launched.ours}"
    return Outcome(ours, bool(right), launched.figures | {"pictures": pictures, "arguments": declared})


def interrupted(domain: int = MAIN + 13, delay: float = 2.0, bound: float = 5.0) -> Outcome:
    """SIGINT while the network is at work; and the tests of the lifecycle."""
    with Ride(domain, delay=delay, coarser=4, ready=False) as ride:
        ride.connected()
        ride.introduce()
        ride.spin(0.5)
        while not ride.answers and ride.alive:
            ride.drive(3)
        ride.drive(6)  # the worker has the next set, and one waits
        begin, number = time.monotonic(), len(ride.answers)
        ride.process.send_signal(signal.SIGINT)
        code = ride.process.wait(30)
        took = time.monotonic() - begin
        trace = "Traceback" in ride.log or "terminate" in ride.log
    tests = by_tests(
        "test/ros/test_parameters.py",
        "test/ros/test_faults.py",
        words="configure or activat or given_back or transition or the_start or killed",
    )
    figures = {"exit code": code, "seconds": round(took, 2), "answers before": number, "tests": tests.figures}
    ours = f"SIGINT in a {delay:g} s inference: exit code {code} after {took:.1f} s; {tests.ours}"
    return Outcome(ours, code == 0 and took <= bound and not trace and number > 0 and bool(tests.reached), figures)


# ---- 15 soak


def soak(domain: int = MAIN + 15, sets: int = 10_000, growth: float = 0.01, spared: int = 10) -> Outcome:
    """As many sets as fast as the node answers; the first tenth warms up. RSS: medians of the first and last tenth of
    what follows. `spared`: sets that a busy machine may leave unanswered."""
    page, resident = os.sysconf("SC_PAGE_SIZE"), []
    with Ride(domain, coarser=4) as ride:
        statm = Path(f"/proc/{ride.process.pid}/statm")
        begin, lost = time.monotonic(), 0
        for k in range(sets):
            ride.stamp += round(PERIOD * NANO)
            if k % 100 == 0:
                ride.introduce()
                ride.clear()
            before = len(ride.answers)
            ride.car.sweep(ride.stamp)
            lost += not ride.until(lambda: len(ride.answers) > before, 2.0)  # noqa: B023
            if k % 20 == 19:
                resident.append(int(statm.read_text().split()[1]) * page / 1e6)
        took, exit_code = time.monotonic() - begin, ride.end()
    warm = resident[len(resident) // 10 :]
    tenth = max(1, len(warm) // 10)
    first, last = float(np.median(warm[:tenth])), float(np.median(warm[-tenth:]))
    figures = {
        "sets": sets,
        "unanswered": lost,
        "sets a second": round(sets / took, 1),
        "RSS MB": [round(resident[0], 1), round(first, 1), round(last, 1), round(max(resident), 1)],
        "exit code": exit_code,
    }
    ours = (
        f"{sets} sets at {sets / took:.0f} a second, {lost} unanswered: RSS {first:.1f} MB after the first tenth, "
        f"{last:.1f} MB at the end ({last / first - 1:+.2%})"
    )
    return Outcome(ours, last / first - 1 <= growth and lost <= spared and exit_code == 0, figures)


# ---- 16 a slow subscriber

_LISTENER = """
import rclpy
from occflow_msgs.msg import VoxelFlow
from rclpy.signals import SignalHandlerOptions
rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
node = rclpy.create_node("slow")
node.create_subscription(VoxelFlow, "/occflow/occupancy", lambda message: print("heard", flush=True), 10)
rclpy.spin(node)
"""


def slow_subscriber(domain: int = MAIN + 16, stopped: float = 5.0) -> Outcome:
    """A reliable subscriber stands still (SIGSTOP) for a while; publishing must not."""
    from occflow_ros import convert

    times: list[float] = []  # ms
    with Ride(domain, coarser=2) as ride, tempfile.TemporaryFile("w+") as heard:
        topic = "/occflow/debug/processing_time/publish_ms"
        ride.listener.create_subscription(convert.time_kind(), topic, lambda m: times.append(m.data), 100)
        slow = ride.start(["-c", _LISTENER], stdout=heard)
        try:
            for _ in range(20):
                ride.drive(12)
                if os.fstat(heard.fileno()).st_size:
                    break
            connected = os.fstat(heard.fileno()).st_size > 0
            ride.clear()
            times.clear()
            ride.drive(round(stopped / PERIOD))
            free = list(times)
            slow.send_signal(signal.SIGSTOP)
            times.clear()
            ride.clear()
            sweeps = round(stopped / PERIOD)
            ride.drive(sweeps)
            ride.spin(0.3)
            still, answered = list(times), len(ride.answers)
            slow.send_signal(signal.SIGCONT)
            at = os.fstat(heard.fileno()).st_size
            ride.drive(12)
            again = os.fstat(heard.fileno()).st_size > at
        finally:
            slow.send_signal(signal.SIGCONT)
            slow.kill()
            slow.wait()
    p99, most = round(float(np.percentile(still, 99)), 2), round(max(still), 2)
    figures = {
        "stopped s": stopped,
        "publish ms while it runs": [round(float(np.percentile(free, 99)), 2), round(max(free), 2)],
        "publish ms while it stands": [p99, most],
        "sets heard by the other": answered,
        "of sweeps": sweeps,
        "hears again": again,
    }
    ours = (
        f"one of two subscribers stopped for {stopped:g} s: publish p99 {p99} ms, max {most} ms "
        f"(running: {figures['publish ms while it runs'][1]}); the other heard {answered} of {sweeps} sweeps"
    )
    right = connected and again and most <= PERIOD * 1e3 and answered >= 0.95 * sweeps
    return Outcome(ours, right, figures)
