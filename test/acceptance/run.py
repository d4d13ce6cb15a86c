"""What this project promises, measured on this machine: one line a check, beside what the best public code does.

    make acceptance                                      all of it, 15 to 20 minutes
    PYTHONPATH=test python -m acceptance.run --only 1,3   some

Writes out/acceptance/table.md and figures.json. The exit code is 1 where a check was missed. A check that fails does
not stop the others.
"""

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from occflow_core.bench import machine, write_json

from . import checks
from .checks import Outcome, by_tests

OUT = Path("out/acceptance")


@dataclass(frozen=True)
class Check:
    number: str
    what: str
    best: str  # of public code
    measure: Callable[[], Outcome]


def _elsewhere(sentence: str) -> Callable[[], Outcome]:
    return lambda: Outcome(sentence, None)


ENGINES = ("test/runtime/test_cache.py", "test/runtime/test_backends.py", "test/ros/test_engine.py")
CHECKS = (
    Check(
        "1",
        "any one camera dead: at least 95 % of the rate, mask right, its own view unobserved, full within 2 sets",
        "Autoware's fusion: partial sets; its six-camera node: no output",
        checks.dead_camera,
    ),
    Check(
        "2",
        "1 % of the images lost for 60 s: a set for every sweep, none mixed",
        "ApproximateTime (slop 0.1 s): 690 of 720, 471 of them mixed",
        checks.random_loss,
    ),
    Check(
        "3",
        "a bag three times, one camera silent at the end of each lap: equal sets ± 2",
        "ApproximateTime: 204, then 10, 10",
        checks.laps,
    ),
    Check("4", "a frozen camera found within 1 s, no false alarm at night", "nobody looks", checks.frozen_camera),
    Check(
        "5",
        "start without TF, with NaN in K, wrong encoding, broken JPEG: no exit, none of it published, all named",
        "in parts: Nav2 (TF), image_pipeline (K)",
        checks.faulty_start,
    ),
    Check(
        "6",
        "engine cache: rebuilt when anything of its key changed; a kill leaves it usable",
        "Autoware: TensorRT's version alone",
        lambda: by_tests(*ENGINES, words="cache or engine"),
    ),
    Check(
        "7",
        "network three times slower than the cameras: p99 of the age at most a set's time + 1 period, no growth",
        "Autoware #6575: 24 ms grew to 116 for good",
        checks.overload,
    ),
    Check(
        "8",
        "throughput stated outside and inside ROS, for each stage",
        "26.0 ms on an RTX 3090 (streampetr, boxes); 5.07 ms network alone (TRT_FlashOcc)",
        checks.throughput,
    ),
    Check("8 GPU", "the same on a GPU", "as above", _elsewhere("not measured: no GPU in this run")),
    Check(
        "9",
        "at most 0.5 MB for 40,000 voxels with flow; read in at most 20 lines without our code",
        "nvblox: 1.19 MB, without labels",
        checks.message_size,
    ),
    Check(
        "10",
        "diagnostics right at half and double rate, paused, after a loop",
        "Autoware's fusion: per input; Python's updater stalls",
        lambda: by_tests("test/ros/test_diagnostics.py"),
    ),
    Check(
        "11",
        "every fault of the list as a test over DDS, without a GPU",
        "Autoware's concatenation: 8 scenarios",
        lambda: by_tests("test/ros/test_faults.py", what="faults"),
    ),
    Check(
        "11 weights",
        "the shipped weights with a camera that dies and returns",
        "nobody",
        checks.returning_camera,
    ),
    Check("11 GPU", "the faults once on a GPU", "nobody", _elsewhere("not measured: no GPU in this run")),
    Check(
        "12",
        "no more than one required launch argument; RViz and bag in the same file; a picture",
        "KISS-ICP: one argument",
        checks.first_five_minutes,
    ),
    Check(
        "13",
        "lifecycle tested, with configure that fails and then succeeds; SIGINT during inference exits 0",
        "Nav2's tests; yolo_ros",
        checks.interrupted,
    ),
    Check(
        "14",
        "every parameter with type, range and text; YAML and README equal",
        "Autoware: a schema in CI, nothing in `ros2 param describe`",
        lambda: by_tests("test/ros/test_parameters.py"),
    ),
    Check("15", "soak of 10,000 sets: RSS grows by at most 1 %", "nobody", checks.soak),
    Check(
        "16",
        "a subscriber that stands still does not hold up publishing (at most one period)",
        "nobody measures it",
        checks.slow_subscriber,
    ),
)
WORDS = {True: "yes", False: "**no**", None: "not measured"}


def measured(check: Check) -> tuple[Outcome, float]:
    """What came of a check, and how many s it took; one that breaks is missed."""
    begin = time.monotonic()
    try:
        outcome = check.measure()
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome(
            f"broke: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}", False
        )
    return outcome, time.monotonic() - begin


def row(check: Check, outcome: Outcome) -> str:
    cells = (check.number, check.what, outcome.ours, check.best, WORDS[outcome.reached])
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="acceptance", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="1,3", help="the checks to run, by their numbers, e.g. 1,3 or '11 weights'")
    parser.add_argument("--out", type=Path, default=OUT, help="where table.md and figures.json go")
    options = parser.parse_args(arguments)
    known = [check.number for check in CHECKS]
    wanted = known if options.only is None else [word.strip() for word in options.only.split(",")]
    if strangers := [word for word in wanted if word not in known]:
        parser.error(f"no check {', '.join(strangers)}; there are {', '.join(known)}")
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    lines = [f"{machine()}; {date}", "", "| # | check | ours | the public best | reached |", "|---|---|---|---|---|"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the nodes end with us
    figures: dict[str, Any] = {"machine": machine(), "date": date, "checks": {}}
    missed, begin = [], time.monotonic()
    for check in CHECKS:
        if check.number not in wanted:
            continue
        print(f"{check.number:>10}  {check.what} ...", flush=True)
        outcome, took = measured(check)
        print(f"{'':>10}  {WORDS[outcome.reached]}, {took:.0f} s: {outcome.ours}", flush=True)
        missed += [check.number] if outcome.reached is False else []
        lines.append(row(check, outcome))
        told = {"ours": outcome.ours, "reached": outcome.reached, "seconds": round(took, 1)}
        figures["checks"][check.number] = told | {"figures": outcome.figures}
    figures["seconds"] = round(time.monotonic() - begin, 1)
    table = "\n".join(lines)
    write_json(options.out / "figures.json", figures)
    (options.out / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\n{figures['seconds'] / 60:.1f} minutes; {options.out}/table.md and figures.json")
    if missed:
        print(f"missed: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
