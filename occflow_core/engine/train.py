"""A Run becomes weights: everything is put together here, and goes on from the newest checkpoint."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as twice

from .. import runtime
from ..data.nuscenes import NuScenes
from ..runtime.load import parse
from ..systems import SYSTEMS
from ..types import Clip, Occupancy
from . import checkpoint
from .distributed import Processes, joined
from .fit import Step, fit
from .loader import Batches, batches, coloured
from .optimise import Average, Optimiser, still
from .pretrained import fill_backbone
from .reports import Bar, Curve, Events
from .run import Run, World, differences, told

# Settings that do not change what comes out: a run may go on with others
FREE = ("data.workers", "data.cache", "half", "save_every", "keep")
Hook = Callable[[Step, Callable[[], runtime.Model]], None]


def train(
    run: Run, out: Path | str, device: str | None = None, after_step: Sequence[Hook] = (), progress: bool = True
) -> Path:
    """Train, or go on where the folder `out` left off, to `out/weights.safetensors`, which is returned.

    Beside it: run.json (all settings), curve.csv (a row a step), events/ (TensorBoard), checkpoints/. after_step: what
    is called after every step, on every process, with what happened and a function that makes the model as it would be
    saved now.

    ValueError: settings that do not fit the data, or a folder of another run. FloatingPointError: a loss or gradient
    that is not finite. RuntimeError: a GPU without room, or a worker that died. OSError: no room on the disk.
    """
    with ExitStack() as stack:
        processes = stack.enter_context(joined(device))
        stack.enter_context(_reproducible(_deterministic(run, processes.device)))
        try:
            return _train(run, Path(out), processes, after_step, progress and processes.first, stack)
        except torch.cuda.OutOfMemoryError as error:
            raise RuntimeError(_what_to_lower(run, processes, error)) from error


def _train(run: Run, out: Path, processes: Processes, after_step, progress: bool, stack: ExitStack) -> Path:
    device, optimise = processes.device, run.optimise
    lanes = processes.lanes(run.batch)
    if run.data.world is not None and processes.first:
        _make_world(run.data.root, run.data.world, progress)
    processes.wait()
    dataset = Batches(
        NuScenes(run.data.root, run.data.version, progress=progress),
        run.data,
        run.config,
        run.resize,
        run.seed,
        lanes,
        run.batch,
    )

    # ---- the network, its optimiser, and where they were
    system = _built(run, partial(print, file=sys.stderr) if progress else _silent).to(device).train()
    _freeze(system, run.frozen)
    if run.frozen_norms:
        still(system.backbone)
    for name in run.checkpointing:
        _keep_no_activations(system, name)
    optimiser = Optimiser(system, optimise, run.steps, device)
    average = None if optimise.average is None else Average(system, optimise.average)
    torch.manual_seed(int(np.random.SeedSequence([run.seed, processes.rank]).generate_state(1)[0]))  # of dropout
    state = _State(run, system, optimiser, average, processes)
    start, memory = state.resume(out / "checkpoints")
    forward = system
    if processes.count > 1:
        forward = nn.parallel.DistributedDataParallel(system)

    # ---- what happens after each step
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
        _replace(out / "run.json", json.dumps(told(run), indent=1))
    model = partial(_model, run, system, average)
    curve = stack.enter_context(Curve(out / "curve.csv", start)) if processes.first else None
    events = stack.enter_context(Events(out / "events", start)) if processes.first else None
    bar = stack.enter_context(Bar(start, run.steps)) if progress else None

    def after(step: Step) -> None:
        if average is not None:
            average.update(system)
        terms = dict(zip(step.terms, processes.mean(list(step.terms.values()))))
        mean = replace(step, terms=terms)
        for report in (curve, events, bar):
            if report is not None:
                report.add(mean, optimiser.adam.param_groups[0]["lr"])
        for hook in after_step:
            hook(step, model)
        if (step.number + 1) % run.save_every == 0 or step.number + 1 == run.steps:
            state.save(out / "checkpoints", step.number + 1, step.memory)

    def ready(number: int, clip: Clip, truth: Occupancy) -> tuple[Clip, Occupancy]:
        clip = clip.to(device)
        return coloured(clip, run.seed, number, lanes) if run.data.colours else clip, truth.to(device)

    fit(
        forward,
        system,
        batches(dataset, run.data.workers, start * optimise.accumulate, run.steps * optimise.accumulate),
        ready,
        optimiser,
        run.steps,
        start,
        memory,
        remembers=run.data.window == "stream",
        after_step=after,
    )
    weights = out / "weights.safetensors"
    if processes.first:
        runtime.save(model().system, run.model, run.resize, weights, trained=True, half=run.half)
    processes.wait()
    return weights


# ---- where a run is


class _State:
    """All that a step changes, and how it gets to disk and back."""

    def __init__(self, run: Run, system, optimiser: Optimiser, average: Average | None, processes: Processes):
        self.run, self.system, self.optimiser, self.average = run, system, optimiser, average
        self.processes = processes

    def tensors(self) -> dict[str, Tensor]:
        parts = {"weights": self.system.state_dict(), "adam": self.optimiser.moments()}
        if self.average is not None:
            parts["average"] = self.average.weights
        return {f"{part}/{name}": t for part, named in parts.items() for name, t in named.items()}

    def save(self, folder: Path, step: int, memory: Any) -> None:
        about = {
            "run": told(self.run),
            "processes": self.processes.count,
            "averaged": 0 if self.average is None else self.average.count,
            "scaler": self.optimiser.scaler.state_dict(),
        }
        own: dict[str, Tensor] = {"random/cpu": torch.get_rng_state()}
        if self.processes.device.type == "cuda":
            own["random/cuda"] = torch.cuda.get_rng_state(self.processes.device)
        own_about = {"memory": checkpoint.flatten(memory, own)}
        checkpoint.write(folder, step, about, self.tensors(), own_about, own, self.run.keep, self.processes)

    def resume(self, folder: Path) -> tuple[int, Any]:
        """The steps that were done, and what the system remembered then. (0, None) where nothing was saved.

        ValueError for a checkpoint of another run or with tensors that do not fit, all of them listed.
        """
        newest = checkpoint.newest(folder)
        step = self.processes.agree(-1 if newest is None else checkpoint.step_of(newest))
        if step < 0:
            return 0, None
        path = checkpoint.path_of(folder, step)
        about, found = checkpoint.read(path / "state")
        if about.get("format") != checkpoint.FORMAT:
            raise ValueError(f"{path} is of format {about.get('format')}, expected {checkpoint.FORMAT}")
        wrong = [d for d in differences(about["run"], told(self.run)) if not d.startswith(FREE)]
        if wrong:
            raise ValueError(f"{path} is of another run: {'; '.join(wrong)}; choose another folder, or set these back")
        ours = self.tensors()
        unexplained = checkpoint.unexplained(found, ours)
        if unexplained:
            raise ValueError(f"{path} does not fit:\n  " + "\n  ".join(unexplained))

        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}/"): t for key, t in found.items() if key.startswith(f"{name}/")}

        self.system.load_state_dict(part("weights"))
        self.optimiser.fill(part("adam"))
        self.optimiser.scaler.load_state_dict(about["scaler"])
        if self.average is not None:
            self.average.fill(part("average"), about["averaged"])
        if about["processes"] != self.processes.count:
            return about["step"], None  # lanes went to other processes: they begin without a past
        own_about, own = checkpoint.read(path / f"process-{self.processes.rank}")
        torch.set_rng_state(own["random/cpu"])
        if self.processes.device.type == "cuda":
            torch.cuda.set_rng_state(own["random/cuda"], self.processes.device)
        remembered = checkpoint.memory_type(type(self.system))
        return about["step"], checkpoint.unflatten(own_about["memory"], remembered, own, self.processes.device)


# ---- parts


def _silent(sentence: str) -> None:
    pass


def _built(run: Run, say: Callable[[str], None]) -> nn.Module:
    name, _ = parse(run.model)
    made = SYSTEMS[name]
    if run.weights is None:
        torch.manual_seed(run.seed)
        system = made(run.config)
        if run.backbone is not None:
            fill_backbone(system, run.backbone)
        return system
    return _begun(run, made, say)


def _begun(run: Run, made: type[nn.Module], say: Callable[[str], None]) -> nn.Module:
    """The system that `run.weights` hold, at the run's config: of pictures of another size, and of more frames where
    the system can grow; `say` is told which tensors changed their shapes. ValueError where anything else differs."""
    model = runtime.stored(run.weights)
    system = model.system
    if type(system) is not made:
        raise ValueError(f"{run.weights} holds {model.name}, not {run.model}")
    wrong = differences(_as_dict(system.config), _as_dict(run.config))
    may = ["config.height", "config.width"]
    if hasattr(made, "grown"):
        may.append("config.frames")
    others = [line for line in wrong if line.split(" ")[0] not in may]
    if others:
        raise ValueError(f"{run.weights} is of another config: {'; '.join(others)}")
    if not wrong:
        return system
    before = system.state_dict()
    if system.config.frames != run.config.frames:
        system = system.grown(run.config)
    else:
        system = made(run.config)
        system.load_state_dict(before)
    grew = [n for n, t in system.state_dict().items() if t.shape != before[n].shape]
    say(f"{run.weights}: {'; '.join(wrong)}; {'grew: ' + ', '.join(grew) if grew else 'all tensors fit'}")
    return system


def _freeze(system: nn.Module, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        found = [p for name, p in system.named_parameters() if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"frozen: no parameter fits {pattern!r}; they are named like {_some_names(system)}")
        for parameter in found:
            parameter.requires_grad_(False)


def _some_names(system: nn.Module) -> str:
    return ", ".join(name for name, _ in list(system.named_parameters())[:3])


def _as_dict(config: Any) -> dict[str, Any]:
    return {"config": asdict(config)}


def _model(run: Run, system: nn.Module, average: Average | None) -> runtime.Model:
    """The model as it would be saved now: a copy, in eval mode."""
    name, _ = parse(run.model)
    copy = SYSTEMS[name](run.config)
    copy.load_state_dict(system.state_dict() if average is None else average.state(system))
    device = next(system.parameters()).device
    return runtime.Model(copy.eval().to(device), run.model, True, run.resize, None)


def _keep_no_activations(system: nn.Module, name: str) -> None:
    """Run a part twice, for less memory: its activations are computed again when gradients are asked for."""
    try:
        part = system.get_submodule(name)
    except AttributeError:
        names = ", ".join(name for name, _ in system.named_children())
        raise ValueError(f"checkpointing: {type(system).__name__} has no part {name!r}; it has {names}") from None
    norms = [m for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    @contextmanager
    def again():
        """The second time, batch norms must not learn the same batch's statistics again."""
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        try:
            yield
        finally:
            for norm, (momentum, count) in zip(norms, before):
                norm.momentum, norm.num_batches_tracked = momentum, count

    once = part.forward
    part.forward = partial(twice, once, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))


def _make_world(root: Path, world: World, progress: bool) -> None:
    from ..data.world import write_world

    write_world(root, progress=progress, **asdict(world))


def _deterministic(run: Run, device: torch.device) -> bool:
    return device.type == "cpu" if run.deterministic is None else run.deterministic


@contextmanager
def _reproducible(on: bool) -> Iterator[None]:
    """Only kernels that give the same sums in every run; torch's RuntimeError names what has none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA begins
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # for hunting bugs; costs a pass over all memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def _what_to_lower(run: Run, processes: Processes, error: Exception) -> str:
    said = str(error).split("\n")[0]
    ways = [f"batch (now {run.batch}, {run.batch // processes.count} on this GPU; optimise.accumulate makes up for it)"]
    if not run.checkpointing:
        ways.append("memory by checkpointing=('backbone',)")
    if run.optimise.precision == "float32":
        ways.append("precision by optimise.precision=bf16")
    ways.append("config.height and config.width")
    return f"{processes.device} is out of memory ({said}); lower {', or '.join(ways)}"


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    beside.replace(path)
