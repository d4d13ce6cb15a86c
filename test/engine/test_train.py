"""Training: the same curve whatever happens to the process, and one sentence for what cannot be."""

import csv
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine import tiny
from safetensors.torch import load_file, save_file

from occflow_core import runtime
from occflow_core.engine import with_settings
from occflow_core.engine.train import train
from occflow_core.geometry import Grid

PROGRAM = str(Path(tiny.__file__))
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
TIMES = ("seconds", "waited")  # the columns that may differ


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tiny.world(tmp_path_factory.mktemp("world") / "data")


def curve(out: Path) -> list[dict[str, str]]:
    with (out / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def trained(root: Path, out: Path, *settings: str, **kinds) -> Path:
    train(with_settings(tiny.run(root), settings), out, "cpu", progress=False, **kinds)
    return out


def program(*words, processes: int = 0, restarts: int = 0, **variables) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher = [*launcher, f"--max-restarts={restarts}"] if processes else []
    command = [sys.executable, *launcher, PROGRAM, *map(str, words)]
    return subprocess.run(command, env={**ALONE, **variables}, capture_output=True, text=True, timeout=800)


def edited(path: Path, change) -> None:
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)


# ---- what comes out


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    return trained(root, tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_leaves_weights_settings_a_curve_and_its_newest_checkpoints(whole, root):
    run = tiny.run(root)
    model = runtime.load("tiny-preset", whole / "weights.safetensors")
    assert model.trained and model.system.config == run.config
    kept = load_file(whole / "checkpoints/step-00000012/state.safetensors")
    for name, parameter in model.system.named_parameters():
        assert torch.equal(parameter, kept[f"average/{name}"]) and not torch.equal(parameter, kept[f"weights/{name}"])
    assert json.loads((whole / "run.json").read_text())["optimise"]["rate"] == 1e-2
    rows = curve(whole)
    assert [row["step"] for row in rows] == [str(k) for k in range(12)]
    assert all(float(r["loss"]) == float(r["filled"]) + float(r["size"]) for r in rows)
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    kinds = {p.suffix for p in whole.rglob("*") if p.is_file() and "events" not in str(p)}
    assert kinds == {".json", ".csv", ".safetensors"}


def test_tensorboard_reads_the_same_curve(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "events"))
    events.Reload()
    told = {event.step: event.value for event in events.Scalars("loss")}
    assert told == pytest.approx({step: float(curve(whole)[step]["loss"]) for step in (0, 10)})
    assert {"terms/filled", "terms/size", "gradient", "rate", "waiting for data"} <= set(events.Tags()["scalars"])


def test_a_run_that_is_through_is_not_run_again(whole, root, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    stamp = (again / "checkpoints/step-00000012/state.safetensors").stat().st_mtime_ns
    trained(root, again)
    assert curve(again) == curve(whole)
    assert (again / "checkpoints/step-00000012/state.safetensors").stat().st_mtime_ns == stamp


def test_hooks_see_every_step_and_the_model_as_it_would_be_saved(root, whole, tmp_path):
    seen = []

    def hook(step, model):
        seen.append(step.number)
        if step.number == 11:
            seen.append(model().system.state_dict())

    trained(root, tmp_path / "run", after_step=[hook])
    assert seen[:-1] == list(range(12))
    saved = runtime.load("tiny-preset", whole / "weights.safetensors").system.state_dict()
    assert all(torch.equal(seen[-1][name], saved[name]) for name in saved)
    assert curve(tmp_path / "run") == curve(whole)  # and change nothing


def test_the_network_learns(root, tmp_path):
    run = replace(tiny.run(root), steps=40, save_every=100, config=replace(tiny.Config(), channels=8, dropout=0.0))
    run = replace(run, data=replace(run.data, colours=False, view=False), optimise=replace(run.optimise, warm_up=0))
    train(run, tmp_path, "cpu", progress=False)
    losses = [float(row["loss"]) for row in curve(tmp_path)]
    assert sum(losses[-8:]) < 0.995 * sum(losses[:8])


# ---- kill -9 and go on


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "settings",
    [(), ("data.window=window",), ("data.workers=1", "optimise.accumulate=2")],
    ids=["stream", "window", "accumulate"],
)
def test_killed_at_any_step_and_started_again_it_draws_the_same_curve_to_the_last_digit(root, tmp_path, settings):
    settings = ("steps=18", *settings)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    done = program("tiny", whole, root, *settings)
    assert done.returncode == 0, done.stderr
    for rows in (2, 9, 13):
        command = [sys.executable, PROGRAM, "tiny", str(torn), str(root), *settings]
        process = subprocess.Popen(command, env=ALONE, start_new_session=True)
        try:
            until = time.monotonic() + 100
            while time.monotonic() < until and process.poll() is None:
                if (torn / "curve.csv").exists() and len((torn / "curve.csv").read_text().splitlines()) > rows + 1:
                    break
                time.sleep(0.002)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL, "it was through before it was killed"
    assert program("tiny", torn, root, *settings).returncode == 0
    assert curve(torn) == curve(whole) and len(curve(whole)) == 18
    assert (torn / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


def test_what_is_remembered_random_and_averaged_is_gone_on_with(root, whole, tmp_path):
    """In one process: the run stops after a checkpoint in the middle of drives; each part of the state matters."""
    torn = tmp_path / "torn"

    class Enough(Exception):
        pass

    def stop(step, _):
        if step.number == 8:
            raise Enough

    with pytest.raises(Enough):
        trained(root, torn, after_step=[stop])
    kept = tmp_path / "kept"
    shutil.copytree(torn, kept)
    trained(root, torn)
    assert curve(torn) == curve(whole)
    assert (torn / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()

    def without_memory(folder):
        about = json.loads((folder / "process-0.json").read_text())
        (folder / "process-0.json").write_text(json.dumps({**about, "memory": None}))

    def other_random(folder):
        torch.manual_seed(99)
        edited(folder / "process-0.safetensors", lambda t: t | {"random/cpu": torch.get_rng_state()})

    def without_moments(folder):
        edited(folder / "state.safetensors", lambda t: {k: v * (not k.startswith("adam")) for k, v in t.items()})

    for harm in (without_memory, other_random, without_moments):
        harmed = tmp_path / harm.__name__
        shutil.copytree(kept, harmed)
        harm(harmed / "checkpoints/step-00000008")
        trained(root, harmed)
        assert curve(harmed)[:8] == curve(whole)[:8] and curve(harmed)[8:] != curve(whole)[8:], harm.__name__


@pytest.mark.parametrize("model", ["opus", "opus-v2", "opus-fusion", "sparseocc4d"])
def test_a_system_goes_on_in_the_middle_of_a_drive_as_if_nothing_had_happened(root, tmp_path, model):
    """Thirty-two channels a group: long enough for a dot product to depend on where its numbers lie in memory."""
    run = with_settings(tiny.run(root, model), ["steps=6", "save_every=3", "keep=9"])
    run = replace(run, config=replace(run.config, channels=64, groups=2))
    train(run, tmp_path / "whole", "cpu", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    shutil.rmtree(tmp_path / "torn/checkpoints/step-00000006")
    train(run, tmp_path / "torn", "cpu", progress=False)
    about = json.loads((tmp_path / "torn/checkpoints/step-00000003/process-0.json").read_text())
    assert any(about["memory"]["fields"]["lanes"]["tuple"])
    assert curve(tmp_path / "torn") == curve(tmp_path / "whole")
    one, two = (
        load_file(tmp_path / f"{name}/checkpoints/step-00000006/state.safetensors") for name in ("torn", "whole")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_frozen_norms_are_those_of_the_backbone_and_all_others_learn(root, tmp_path):
    run = with_settings(tiny.run(root, "opus-v2"), ["steps=1", "frozen_norms=true"])
    train(run, tmp_path, "cpu", progress=False)
    weights = load_file(tmp_path / "weights.safetensors")
    means = {name: t for name, t in weights.items() if name.endswith("running_mean")}
    assert {name.split(".")[0] for name in means} == {"backbone", "densifiers"}
    assert all(bool(t.any()) != name.startswith("backbone") for name, t in means.items())


# ---- several processes


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ["tiny", "opus", "sparseocc4d"])
def test_two_processes_have_the_gradient_of_one_with_the_doubled_batch(root, tmp_path, model):
    """float32, dropout 0, batch norms as they are: to 1e-5 of each tensor's length. Adam's first moment tells it."""
    settings = ("steps=1", "batch=4", "frozen_norms=true", "config.dropout=0", "optimise.clip=1e9", "optimise.rates=()")
    gradients = []
    for processes in (0, 2):
        out = tmp_path / str(processes)
        done = program(model, out, root, *settings, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        tensors = load_file(out / "checkpoints/step-00000001/state.safetensors")
        gradients.append({name: t.double() for name, t in tensors.items() if name.endswith("/exp_avg")})
    one, two = gradients
    assert one.keys() == two.keys()
    assert sum(bool(t.any()) for t in one.values()) > 0.9 * len(one)
    for name, t in one.items():
        assert float((two[name] - t).norm()) <= 1e-5 * max(float(t.norm()), 1e-9), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_starts_again_where_a_process_was_lost(root, tmp_path):
    settings = ("steps=8", "batch=4", "save_every=3")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert program("tiny", whole, root, *settings, processes=2).returncode == 0
    done = program("tiny", torn, root, *settings, processes=2, restarts=1, DIES="1:4")
    assert done.returncode == 0, done.stderr[-3000:]
    # it was really lost; torchrun tells of the other one, where that noticed first
    assert (torn / "died").exists() and not (whole / "died").exists()
    assert curve(torn) == curve(whole)
    assert sorted(p.name for p in (torn / "checkpoints/step-00000008").iterdir() if p.suffix == ".json") == [
        "process-0.json",
        "process-1.json",
        "state.json",
    ]
    # on another number of processes it goes on too; lanes have forgotten
    path = torn / "checkpoints/step-00000008"
    shutil.rmtree(path)
    trained(root, torn, *settings)
    assert [row["step"] for row in curve(torn)] == [str(k) for k in range(8)]


def test_lanes_that_cannot_be_shared_are_refused(root):
    from occflow_core.engine.distributed import Processes

    cpu = torch.device("cpu")
    assert [list(Processes(rank, 2, cpu).lanes(4)) for rank in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="batch: 3 lanes cannot be shared by 2 processes"):
        Processes(0, 2, cpu).lanes(3)


# ---- what cannot be


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """The whole run with a checkpoint of step 8 as its newest."""
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints/step-00000012")
    return out


def test_a_checkpoint_of_another_grid_is_refused_and_the_difference_named(root, copy):
    run = tiny.run(root)
    other = replace(run, config=replace(run.config, grid=Grid((-2.0, -2.0, -1.0), (0.4,) * 3, (10, 10, 8))))
    before = curve(copy)
    with pytest.raises(ValueError, match=r"step-00000008 is of another run: config.grid.shape was \[10, 10, 4\]"):
        train(other, copy, "cpu", progress=False)
    assert curve(copy) == before  # nothing was touched
    with pytest.raises(ValueError, match="model was 'tiny-preset', is 'opus-nano'"):
        train(tiny.run(root, "opus"), copy, "cpu", progress=False)
    with pytest.raises(ValueError, match="optimise.rate was 0.01, is 0.02"):
        trained(root, copy, "optimise.rate=0.02")
    trained(root, copy, "data.workers=1", "keep=1", "save_every=2")  # these change nothing that comes out
    assert curve(copy) == before


def test_tensors_that_are_missing_too_many_or_of_another_shape_are_all_listed(root, copy):
    def change(tensors):
        tensors["weights/head.9.weight"] = torch.zeros(2)
        tensors["adam/head.0.bias/exp_avg"] = torch.zeros(3)
        del tensors["average/head.2.bias"], tensors["weights/backbone.0.weight"]

    edited(copy / "checkpoints/step-00000008/state.safetensors", change)
    with pytest.raises(ValueError) as told:
        trained(root, copy)
    assert str(told.value).split("\n  ")[1:] == [
        "missing: average/head.2.bias",
        "missing: weights/backbone.0.weight",
        "not of this run: weights/head.9.weight",
        "shape: adam/head.0.bias/exp_avg: there (3,) float32, here (16,) float32",
    ]


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(root, copy, tmp_path):
    evil, mark = tmp_path / "evil.pt", tmp_path / "mark"
    evil.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ValueError, match="evil.pt is not a safetensors file"):
        trained(root, tmp_path / "run", f"weights={evil}")
    torch.save({"weights": Evil(mark)}, evil)
    shutil.copy(evil, copy / "checkpoints/step-00000008/state.safetensors")
    with pytest.raises(ValueError, match="no whole checkpoint.*remove the folder"):
        trained(root, copy)
    assert not mark.exists()


def test_half_a_checkpoint_is_named(root, copy):
    file = copy / "checkpoints/step-00000008/state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="step-00000008 is no whole checkpoint"):
        trained(root, copy)


def test_a_disk_that_is_full_leaves_the_old_checkpoint_and_the_run_goes_on_from_it(root, whole, tmp_path):
    """A limit on the size of files is what a full disk is to the one who writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, _):
        if step.number == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        with pytest.raises(OSError, match="cannot save .*step-00000008.*step-00000004 is whole"):
            trained(root, tmp_path / "run", after_step=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]
    trained(root, tmp_path / "run")
    assert curve(tmp_path / "run") == curve(whole)


def test_a_gpu_that_is_out_of_memory_says_what_to_lower(root, tmp_path, monkeypatch):
    def forward(self, clip, memory):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB\nmore")

    monkeypatch.setattr(tiny.Tiny, "forward", forward)
    with pytest.raises(
        RuntimeError, match=r"Tried to allocate 3.00 GiB.*lower batch \(now 2.*checkpointing.*bf16"
    ) as e:
        trained(root, tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_terms(root, tmp_path, monkeypatch, value):
    learned = tiny.Tiny.loss

    def loss(self, output, truth):
        return {**learned(self, output, truth), "bad": output.sum() * value}

    monkeypatch.setattr(tiny.Tiny, "loss", loss)
    with pytest.raises(FloatingPointError, match=r"step 0: the loss is not finite in bad \(filled 0\.\d+, size"):
        trained(root, tmp_path)


def test_weights_to_begin_with_must_be_of_the_same_config(root, whole, tmp_path):
    weights = whole / "weights.safetensors"
    with pytest.raises(ValueError, match="config.channels was 4, is 8"):
        trained(root, tmp_path / "a", f"weights={weights}", "config.channels=8")
    first = []
    trained(root, tmp_path / "b", f"weights={weights}", "steps=1", after_step=[lambda s, m: first.append(s.loss)])
    assert first[0] < float(curve(whole)[0]["loss"])


def test_weights_go_on_with_more_frames_and_larger_pictures_and_it_is_said_what_grew(root, tmp_path, capsys):
    short = ["steps=2", "data.window=window"]
    train(with_settings(tiny.run(root, "sparseocc4d"), short), tmp_path / "a", "cpu", progress=False)
    weights = f"weights={tmp_path / 'a/weights.safetensors'}"
    more = [*short, weights, "config.frames=3", "config.height=96", "config.width=128"]
    train(with_settings(tiny.run(root, "sparseocc4d"), more), tmp_path / "b", "cpu")
    said = capsys.readouterr().err
    assert "config.frames was 2, is 3" in said and "grew: scales.0.mixing.matrices.weight, " in said
    config = runtime.load("sparseocc4d-nano", tmp_path / "b/weights.safetensors").system.config
    assert (config.frames, config.height, config.width) == (3, 96, 128)
    for wrong, words in (("config.queries=11", "queries was 12, is 11"), ("config.frames=1", "does not shrink to 1")):
        with pytest.raises(ValueError, match=words):
            train(with_settings(tiny.run(root, "sparseocc4d"), [*short, weights, wrong]), tmp_path / "c", "cpu")
    with pytest.raises(ValueError, match="holds sparseocc4d-nano, not opus-nano"):
        train(with_settings(tiny.run(root, "opus"), [weights]), tmp_path / "d", "cpu", progress=False)


def test_a_part_that_is_not_there_is_named(root, tmp_path):
    with pytest.raises(ValueError, match="Tiny has no part 'backbon'; it has backbone, head"):
        trained(root, tmp_path, "checkpointing=('backbon',)")


# ---- the command line, on one machine and on two


SMALL = (
    *("data.world=none", "data.train=train", "data.camera_mask=false", "data.cache=0.1"),
    *("steps=3", "batch=2", "save_every=2"),
    *("config.height=64", "config.width=96", "config.queries=20", "config.refines=(2,4)", "config.frames=2"),
    *("config.grid.low=(-6,-6,-1)", "config.grid.shape=(30,30,16)", "optimise.warm_up=2"),
)


def occflow(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "occflow_core", *map(str, words)]
    return subprocess.run(command, env=ALONE, capture_output=True, text=True, timeout=800)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_occflow_train_makes_weights_that_the_runtime_loads_and_says_in_one_sentence_what_cannot_be(root, tmp_path):
    out, settings = tmp_path / "run", ("--set", f"data.root={root}", *SMALL)
    done = occflow("train", "demo", "--out", out, *settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out / "weights.safetensors")
    assert "loss" in done.stderr and "data" in done.stderr and "3/3" in done.stderr  # the bar
    name = json.loads((out / "run.json").read_text())["model"]
    assert runtime.load(name, out / "weights.safetensors").trained
    refused = occflow("train", "demo", "--out", out, *settings, "seed=1")
    assert refused.returncode == 1 and "seed was 0, is 1" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_launcher_for_several_machines_trains_one_network_on_two(root, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher = Path(__file__).resolve().parents[2] / "training" / "torchrun.sh"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**ALONE, "PATH": path, "PORT": port, "PROCESSES": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = ["localhost", "2", "demo", "--out", tmp_path / "run", "--set", f"data.root={root}", *SMALL]
    command = [str(launcher), *map(str, words)]
    machines = [
        subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [machine.communicate(timeout=800) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert len(curve(tmp_path / "run")) == 3
    last = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert {p.name for p in last.glob("process-*.json")} == {"process-0.json", "process-1.json"}
