"""A word -> a model with its weights; and back into a file that says what it is."""

import json
import os
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..geometry import Grid
from ..systems import SYSTEMS
from ..systems.base import load_strictly, seeded
from .prepare import RESIZES

_ABOUT = {"system", "preset", "resize", "trained", "config"}  # what a file says about itself
SIZES = {"t": "tiny", "s": "small", "m": "medium", "l": "large"}  # as the papers name them
UNTRAINED = " (untrained)"  # ends the name of a model that has learned nothing
FORMAT = "occflow"  # the key of our JSON in the file's metadata
_SHIPPED = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class Model:
    """A system that is ready to be stepped."""

    system: nn.Module  # a `systems.base.System`, in eval mode, on its device
    name: str  # e.g. "opus-nano (untrained)"; predictions are signed with it
    trained: bool
    resize: str  # how its pictures must be resized: a word of `prepare.RESIZES`
    weights: str | None  # SHA-256 of the file of the weights
    backend: str = "eager"  # what runs it, and in which precision: words of `runtime.built`
    precision: str = "float32"

    @property
    def device(self) -> torch.device:
        return next(self.system.parameters()).device


def names() -> list[str]:
    """All models that `load` knows."""
    return [f"{system}-{preset}" for system, made in SYSTEMS.items() for preset in made.PRESETS]


def shipped(model: str) -> Path | None:
    """The weights of a model that ship with the package; None where there are none."""
    path = _SHIPPED / f"{model}.safetensors"
    return path if path.is_file() else None


def load(
    model: str = "opus-demo", weights: Path | str | None = None, device: str | torch.device = "cpu", seed: int = 0
) -> Model:
    """A model by its name, with the weights of a file that `save` wrote; without one those that are `shipped`.

    Where there are none either, weights are random: the model's name says "(untrained)", and the same seed gives the
    same weights. ValueError, in one sentence,
    when the name is not known, the file is missing or not ours, or holds another model or tensors that do not fit.
    """
    system, preset = parse(model)
    model, made = f"{system}-{preset}", SYSTEMS[system]
    weights = shipped(model) if weights is None else weights
    if weights is None:
        built = seeded(made(made.PRESETS[preset]), seed)
        resize = "pillow" if built.config.as_published else "fast"
        return Model(built.eval().to(device), model + UNTRAINED, False, resize, None)
    about, tensors, digest = _read(Path(weights))
    if (about["system"], about["preset"]) != (system, preset):
        raise ValueError(f"{weights} holds {about['system']}-{about['preset']}, not {model}")
    return _filled(weights, about, tensors, digest, device)


def stored(weights: Path | str, device: str | torch.device = "cpu") -> Model:
    """The model that a file of weights holds, whichever it is. ValueError as `load`."""
    about, tensors, digest = _read(Path(weights))
    if about["preset"] not in getattr(SYSTEMS.get(about["system"]), "PRESETS", ()):
        raise ValueError(f"{weights} holds {about['system']}-{about['preset']}, which this version does not know")
    return _filled(weights, about, tensors, digest, device)


def _filled(weights: Path | str, about: dict[str, Any], tensors: dict[str, torch.Tensor], digest: str, device) -> Model:
    """What `_read` found as a model."""
    model, made = f"{about['system']}-{about['preset']}", SYSTEMS[about["system"]]
    try:
        built = made(_config(type(made.PRESETS[about["preset"]]), about["config"]))
        load_strictly(built, tensors)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{weights} does not fit {model}: {error}") from error
    name = model if about["trained"] else model + UNTRAINED
    return Model(built.eval().to(device), name, about["trained"], about["resize"], digest)


def save(system: nn.Module, model: str, resize: str, path: Path | str, *, trained: bool, half: bool = False) -> None:
    """Write weights so that `load(model, path)` has them back. The file appears whole or not at all.

    trained: whether the weights have learned anything; files of random ones go on saying "(untrained)". half: matrices
    and kernels as float16, which halves the file; biases, norms and their statistics stay float32. What is loaded
    computes in float32 either way.
    """
    from safetensors.torch import save_file

    name, preset = parse(model)
    if resize not in RESIZES or not isinstance(system, SYSTEMS[name]):
        raise ValueError(f"save: {model} with resize {resize!r} does not describe a {type(system).__name__}")
    about = {"system": name, "preset": preset, "resize": resize, "trained": trained, "config": asdict(system.config)}
    tensors = {
        key: tensor.detach().cpu().to(torch.float16 if half and tensor.ndim > 1 else tensor.dtype).contiguous()
        for key, tensor in system.state_dict().items()
    }
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, beside, metadata={FORMAT: json.dumps(about)})
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def parse(model: str) -> tuple[str, str]:
    """System and preset of a name: "opus-v2-tiny" -> ("opus-v2", "tiny"). ValueError with the nearest for others.

    The papers' letters do as well: "opus-v2-t", and s, m, l.
    """
    told = {f"{system}-{preset}": (system, preset) for system, made in SYSTEMS.items() for preset in made.PRESETS}
    stem, _, last = model.rpartition("-")
    name = f"{stem}-{SIZES[last]}" if last in SIZES else model
    if name not in told:
        near = get_close_matches(model, told, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no model {model!r}; the nearest is {near!r}, all are: {', '.join(told)}")
    return told[name]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
    """What a file says about itself, its tensors, and its SHA-256."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"there is no file of weights at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(FORMAT, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError) as error:
        hint = "`occflow convert` takes the authors' files"
        raise ValueError(f"{path} is not a safetensors file ({error}); {hint}") from error
    if not isinstance(about, dict) or not about.keys() >= _ABOUT:
        raise ValueError(f"{path} does not say which model it holds; `occflow convert` and `save` write files that do")
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{path} holds weights that are not finite: {', '.join(broken[:5])}; it cannot be used")
    return about, tensors, sha256(path.read_bytes()).hexdigest()


def _config(kind: type, told: dict[str, Any]) -> Any:
    """A system's Config from what `asdict` made of it. A field that files of old lack has its default, so that of a new
    one must be what was done before; a field that nobody knows is an error."""
    known = {f.name for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is f.default_factory is MISSING}
    wrong = (told.keys() - known) | (needed - told.keys())
    if wrong:
        raise ValueError(f"its config differs in {sorted(wrong)}")
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    return kind(**{name: Grid(**value) if isinstance(value, dict) else value for name, value in tuples.items()})
