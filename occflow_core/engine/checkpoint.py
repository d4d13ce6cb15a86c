"""A training on disk, to go on from: a folder for each kept step, safetensors and JSON, nothing that could run code.

    checkpoints/step-00000500/state.json          settings, step, schedule's place, scaler
                              state.safetensors   weights, their average, the optimiser's moments
                              process-0.*         of each process: random states, what the system remembers of its lanes

A folder is written beside under a hidden name and renamed when it is whole.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .distributed import Processes

FORMAT = 1


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step; None where there is none."""
    return max((path for path in folder.glob("step-*") if path.is_dir()), default=None)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def write(
    folder: Path,
    step: int,
    about: dict[str, Any],
    tensors: Mapping[str, Tensor],
    own_about: dict[str, Any],
    own: Mapping[str, Tensor],
    keep: int,
    processes: Processes,
) -> Path:
    """Save after `step` steps: `about` and `tensors` by the first process, `own` by each; all but `keep` are removed.

    OSError, with the older checkpoints as they were, where there is no room.
    """
    path = path_of(folder, step)
    beside = folder / f".{path.name}.part"
    try:
        if processes.first:
            for left in folder.glob(".step-*"):  # of a run that was killed while it saved
                shutil.rmtree(left)
            beside.mkdir(parents=True)
        processes.wait()
        if processes.first:
            _write(beside / "state", {"format": FORMAT, "step": step, **about}, tensors)
        _write(beside / f"process-{processes.rank}", own_about, own)
        processes.wait()
        if processes.first:
            shutil.rmtree(path, ignore_errors=True)
            beside.rename(path)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        left = newest(folder)
        raise OSError(
            f"cannot save {path}: {error.strerror or error}; "
            + (f"{left.name} is whole, the same command goes on from it" if left else "there is no older checkpoint")
        ) from error
    if processes.first:
        for old in sorted(folder.glob("step-*"))[:-keep]:
            hidden = old.rename(folder / f".{old.name}.old")  # half a folder must not look whole
            shutil.rmtree(hidden)
    return path


def read(stem: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` put into one `.json` and one `.safetensors`. ValueError for files that are missing or broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        about = json.loads(stem.with_suffix(".json").read_text())
        # copies: the file's own memory begins anywhere, and a dot product's last digit depends on where its numbers lie
        tensors = {name: t.clone() for name, t in load_file(stem.with_suffix(".safetensors")).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"{stem.parent} is no whole checkpoint ({error}); remove the folder to go on from the one before"
        ) from error
    return about, tensors


def unexplained(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Every tensor that is missing, too many, or of another shape or type, as a line each."""
    lines = [f"missing: {name}" for name in expected if name not in found]
    lines += [f"not of this run: {name}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        theirs, ours = found[name], expected[name]
        if (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
            kinds = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (theirs, ours)]
            lines.append(f"shape: {name}: there {kinds[0]}, here {kinds[1]}")
    return sorted(lines)


def _write(stem: Path, about: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file = stem.with_suffix(".safetensors")
    try:
        # clones: safetensors refuses views of one memory
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, file)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    stem.with_suffix(".json").write_text(json.dumps(about, indent=1))
    for path in (file, stem.with_suffix(".json")):
        with open(path, "rb") as written:
            os.fsync(written.fileno())  # the rename must not reach the disk before what it names


# ---- what a system remembers: its own dataclasses, of any depth


def flatten(value: Any, tensors: dict[str, Tensor], path: str = "memory") -> Any:
    """A value of dataclasses, tuples, tensors and numbers as JSON; its tensors go into `tensors` by their path."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return {type(value).__name__: [flatten(part, tensors, f"{path}.{i}") for i, part in enumerate(value)]}
    if is_dataclass(value):
        names = [f.name for f in fields(value)]
        parts = {name: flatten(getattr(value, name), tensors, f"{path}.{name}") for name in names}
        return {"dataclass": type(value).__name__, "fields": parts}
    raise TypeError(f"{path}: a memory is made of dataclasses, tuples, tensors and numbers, got {type(value).__name__}")


def unflatten(told: Any, hint: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """The value again, on the device. hint: its annotated type; no other class than those it names is ever made.

    ValueError where the two do not fit.
    """
    if told is None or isinstance(told, bool | int | float | str):
        return told
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    if "tensor" in told and told["tensor"] in tensors:
        return tensors[told["tensor"]].to(device)
    if is_dataclass(hint) and told.get("dataclass") == hint.__name__:
        hints, parts = get_type_hints(hint), told["fields"]
        if parts.keys() == {f.name for f in fields(hint)}:
            return hint(**{name: unflatten(part, hints[name], tensors, device) for name, part in parts.items()})
    kind = get_origin(hint)
    if kind in (tuple, list) and kind.__name__ in told:
        parts, kinds = told[kind.__name__], get_args(hint)
        kinds = kinds[:1] * len(parts) if kind is list or kinds[-1] is Ellipsis else kinds
        return kind(unflatten(part, inner, tensors, device) for part, inner in zip(parts, kinds, strict=True))
    raise ValueError(f"a memory of {hint} cannot be made of {sorted(told)} {told.get('dataclass', '')}".strip())


def memory_type(system: type) -> Any:
    """The annotated type of what a system remembers: that of `memory` in its `forward`."""
    return get_type_hints(system.forward)["memory"]
