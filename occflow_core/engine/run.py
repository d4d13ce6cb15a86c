"""What a training run is, whole: a frozen value that a recipe returns and that `field=value` texts change."""

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class World:
    """A synthetic world to train on: arguments of `data.world.write_world`."""

    scenes: int  # drives
    seed: int  # the same seed gives the same bytes
    keyframes: int = 40  # of each scene, two a second
    size: tuple[int, int] = (198, 352)  # height, width of the pictures, pixels
    weather: str | None = None  # the same for all scenes; None: each its own
    sweeps: bool = False  # also what lies between keyframes; mode "window" looks there


@dataclass(frozen=True)
class Data:
    """Where frames and truth come from, and how they are varied."""

    root: Path  # folder of a data set in nuScenes' layout
    version: str | None = None  # of its tables, e.g. "v1.0-trainval"; None where there is only one
    world: World | None = None  # made at `root` before anything else, as far as it is not there yet
    labels: Literal["openocc", "occ3d"] = "openocc"  # which truth
    # what a camera sees is told by the Occ3D label of the keyframe; OpenOcc's own have no mask, all counts as seen
    camera_mask: bool = False
    train: str = "train"  # the split to learn from
    val: str = "val"  # the split to be scored on
    # stream: a lane follows a drive, one keyframe a step, and remembers; window: each step brings all its times
    window: Literal["stream", "window"] = "stream"
    parts: int = 2  # stream: drives that a scene is cut into, at places that differ from epoch to epoch
    view: bool = True  # pictures resized, cropped and mirrored at random (`augment.opus_view`), one draw a drive
    flips: bool = False  # the world mirrored along x and y, each every other time
    turn: float = 0.0  # degrees by which the world is turned about the car's z at most, one draw a drive
    colours: bool = True  # brightness, contrast, saturation, hue, order of the channels, drawn for each picture
    workers: int = 0  # processes that load ahead of the network; 0: the network waits for its data
    cache: float = 0.0  # GB of decoded frames and labels kept in memory by all workers of a process together


@dataclass(frozen=True)
class Optimise:
    """AdamW: rates, schedule, precision. Patterns name parameters as a shell names files: "backbone.*"."""

    rate: float = 2e-4  # of the learning, at its highest
    rates: tuple[tuple[str, float], ...] = ()  # pattern -> factor on the rate; the first that fits counts
    decay: float = 0.01  # of the weights
    no_decay: tuple[str, ...] = ()  # patterns of what does not decay
    betas: tuple[float, float] = (0.9, 0.999)
    warm_up: int = 500  # steps in which the rate rises linearly ...
    warm_from: float = 1 / 3  # ... from this share of it
    floor: float = 1e-3  # share of the rate that the cosine ends at
    clip: float = 35.0  # longest gradient (L2 norm over all parameters)
    accumulate: int = 1  # batches whose gradients make one step
    precision: Literal["float32", "bf16", "fp16"] = "float32"  # of the network's products; losses are float32
    average: float | None = None  # decay of the moving average of the weights that is saved and scored; None: none

    def __post_init__(self):
        if self.rate <= 0 or self.clip <= 0 or self.accumulate < 1 or self.warm_up < 0:
            raise ValueError("optimise: rate and clip must be above 0, accumulate at least 1, warm_up at least 0")
        if self.average is not None and not 0 <= self.average < 1:
            raise ValueError(f"optimise: average must be in [0, 1), got {self.average}")


@dataclass(frozen=True)
class Run:
    """Everything that decides what a training gives; `with_settings` changes it by words."""

    model: str  # as `runtime.load` names them, e.g. "opus-nano"
    config: Any  # the system's whole Config
    data: Data
    optimise: Optimise
    steps: int  # of the optimiser
    batch: int  # lanes, over all processes
    seed: int = 0  # of weights, order, augmentation and dropout
    resize: str = "fast"  # how pictures are resized where they are not varied; the weights carry it to the car
    # begin with these of the same system and config, but for the size of pictures and, where the system has `grown`,
    # more frames; None: at random
    weights: Path | None = None
    # the backbone begins with "imagenet" (EfficientNet-Lite0) or with a .pth file of torchvision or mmdetection
    backbone: str | None = None
    frozen: tuple[str, ...] = ()  # patterns of parameters that stay as they begin, e.g. ("backbone.layer1.*",)
    checkpointing: tuple[str, ...] = ()  # parts whose activations are computed twice, not kept, e.g. ("backbone",)
    # the backbone's batch norms keep the statistics they began with: for batches too small to have any
    frozen_norms: bool = False
    deterministic: bool | None = None  # refuse kernels whose sums change from run to run; None: on CPUs only
    half: bool = False  # the weights that come out hold matrices and kernels as float16: half the file
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # newest checkpoints that stay

    def __post_init__(self):
        for name in ("steps", "batch", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def recipe(recipes: Mapping[str, Callable[[], Run]], name: str) -> Run:
    """The Run of a recipe. ValueError with the nearest name for one that there is not."""
    if name not in recipes:
        raise ValueError(f"there is no recipe {name!r}; {_nearest(name, recipes)}")
    return recipes[name]()


def with_settings(run: Run, settings: Sequence[str]) -> Run:
    """The run with fields changed by texts such as "steps=50", "optimise.rate=3e-4" or "config.refines=(4, 16)".

    All at once: what may not be as long as another field is as it was can be set together with that one. Of one field
    the last text counts. ValueError that names the nearest field, or what the field expects.
    """
    changes: dict[str, Any] = {}  # name -> (text, path), or the same again for the fields of a field
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"expected field=value, got {setting!r}")
        *outer, name = path.split(".")
        inside = changes
        for part in outer:
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                raise ValueError(f"{path}: there is nothing inside it to set {name!r} in")
        if isinstance(inside.get(name), dict):
            raise ValueError(f"{path}: set its fields one by one")
        inside[name] = text, path
    return _changed(run, changes)


def told(run: Run) -> dict[str, Any]:
    """The run as JSON can hold it: dicts, lists, numbers, texts."""
    return _plain(asdict(run))


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Where two `told` runs differ, as sentences "optimise.rate was 0.1, is 0.2"."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for name in {**before, **after}
            for line in differences(before.get(name), after.get(name), f"{path}.{name}" if path else name)
        ]
    return [] if before == after else [f"{path} was {before!r}, is {after!r}"]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _nearest(name: str, known) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"the nearest is {near[0]!r}, all are: {', '.join(known)}"


def _changed(value: Any, changes: Mapping[str, Any]) -> Any:
    """A dataclass with fields read from texts; all above them rebuilt once, so that they check themselves."""
    known = [f.name for f in fields(value)] if is_dataclass(value) else []
    made = {}
    for name, change in changes.items():
        whole = _path(change)
        if not known:
            raise ValueError(f"{whole}: there is nothing inside it to set {name!r} in")
        if name not in known:
            raise ValueError(f"there is no field {whole!r}; {_nearest(name, known)}")
        if isinstance(change, dict):
            made[name] = _changed(getattr(value, name), change)
        else:
            made[name] = _read(change[0], get_type_hints(type(value))[name], whole)
    return replace(value, **made)


def _path(change: Any) -> str:
    """Of the first field that a change names."""
    return _path(next(iter(change.values()))) if isinstance(change, dict) else change[1]


_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


def _read(text: str, hint: Any, path: str) -> Any:
    """A value of the annotated type, from its text. Nothing is evaluated: numbers and tuples are literals."""
    if get_origin(hint) in (Union, UnionType):
        kinds = get_args(hint)
        if NoneType in kinds and text.lower() == "none":
            return None
        (hint,) = (kind for kind in kinds if kind is not NoneType)
        return _read(text, hint, path)
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise ValueError(f"{path}: expected one of {', '.join(get_args(hint))}, got {text!r}")
        return text
    if hint in (str, Path):
        return hint(text)
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            pass
    if get_origin(hint) is tuple:
        try:
            return _tuple(ast.literal_eval(text), hint)
        except (ValueError, SyntaxError, TypeError):
            raise ValueError(f"{path}: expected values like {hint}, got {text!r}") from None
    if is_dataclass(hint):
        raise ValueError(f"{path}: set its fields one by one: {', '.join(f'{path}.{f.name}' for f in fields(hint))}")
    raise ValueError(f"{path}: expected {_WORDS.get(hint, hint)}, got {text!r}")


def _tuple(value: Any, hint: Any) -> tuple:
    kinds = get_args(hint)
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    kinds = (kinds[0],) * len(values) if kinds[-1] is Ellipsis else kinds
    if len(kinds) != len(values):
        raise ValueError(f"expected {len(kinds)} values")
    made = []
    for kind, part in zip(kinds, values):
        if get_origin(kind) is tuple:
            made.append(_tuple(part, kind))
        elif type(part) is kind or (kind is float and type(part) is int):
            made.append(kind(part))
        else:
            raise ValueError(f"expected {kind}")
    return tuple(made)
