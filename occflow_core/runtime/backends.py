"""One callable, whatever runs the network: Python, compiled code, or an engine that was built before.

Two parts of a network become programs, tensors in and tensors out: the encoder (pictures -> rows of features) and the
decoder (a window of instants -> output). Which instants a window has is decided between them, in Python on lists
(`nn.instants.remember`), and voxels are made of the output by the system's own `decode`. Shapes are fixed: one lane,
one instant a clip, so many cameras.

- eager: the system as it is.
- compiled: torch.compile, at every load anew; with CUDA graphs on a GPU.
- aot: an AOTInductor package, built once and kept (`runtime.cache`); it runs without Python.
- tensorrt: a TensorRT engine inside such a package, by torch_tensorrt; GPUs only.

Each runs in a precision: in half precision products are rounded as autocast has it, while what goes between the parts
and what is remembered stays float32.

None is used before it said on a made-up drive what eager says in float32. B batch, T time (newest first), N cameras, R
rows of a camera's pyramid, C channels.
"""

import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from hashlib import sha256
from importlib import metadata
from itertools import chain
from logging import getLogger
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from ..geometry import Cameras, rigid
from ..nn.instants import Memory, View, encode, remember
from ..types import NANO, Clip, Frame, Prediction
from .cache import Unfit, engine, home
from .load import Model
from .plain import plain

Backend = Literal["eager", "compiled", "aot", "tensorrt"]
Precision = Literal["float32", "bf16", "fp16"]
TOLERANCE, SLACK = 1e-3, 3.0
DRIVES, FRAMES = 2, 3  # made-up drives that are compared; frames of each
ENGINE = ".pt2"
log = getLogger("occflow")
Run = Callable[..., Any]


@dataclass(frozen=True)
class Rounding:
    """How a precision rounds products, and how far a tensor may be from what eager says in float32."""

    kind: torch.dtype | None  # of autocast; None: none
    tolerance: float  # mean difference over mean number
    # A network in which the least change decides (which voxel is kept, which place a mask covers first) may be farther:
    # SLACK times as far as eager is from itself where the encoder's features change by this share
    features: float

    def cast(self, device: torch.device) -> AbstractContextManager:
        return nullcontext() if self.kind is None else torch.autocast(device.type, self.kind)


# Over the made-up drives bf16 is 0.8 to 1.1 % off in the features of networks with random weights, 5 % in those of
# opus-demo and 6 % in what that says of them; fp16, whose numbers have three bits more, 0.1 %, and 2.5 % in SparseOcc
# where another voxel is kept. SparseOcc's masks are 13 to 44 % off in either, and nearly as far in float32 where the
# features change by the share that stands here
ROUNDINGS: dict[str, Rounding] = {
    "float32": Rounding(None, TOLERANCE, 1e-6),
    "bf16": Rounding(torch.bfloat16, 0.1, 2**-6),
    "fp16": Rounding(torch.float16, 0.05, 2**-9),
}


@dataclass(frozen=True)
class Difference:
    """How far what one says is from what the other says."""

    largest: float  # difference, as a share of the largest number of its tensor
    mean: float  # difference over mean number, of the worst tensor

    def __str__(self):
        return f"largest difference {self.largest:.1e} of a tensor's largest number, mean {self.mean:.1e} of its mean"


def built(
    model: Model, backend: str = "eager", cameras: int = 6, precision: str = "float32", cache: Path | None = None
) -> Model:
    """The model with its network run by a backend in a precision, for so many cameras; the model itself for "eager" in
    "float32".

    cache: folder of engines; None: the user's. ValueError, in one sentence, where it cannot be had, or says something
    else than eager in float32; there is no other in its stead.
    """
    for what, word, words in (("backend", backend, get_args(Backend)), ("precision", precision, get_args(Precision))):
        if word not in words:
            raise ValueError(f"{what} must be one of {', '.join(words)}, got {word!r}")
    if (backend, precision) == ("eager", "float32"):
        return model
    check_backend(model, backend)
    name = model.name if precision == "float32" else f"{model.name} in {precision}"
    try:
        parts = Parts.of(model.system, cameras, precision)
        began = perf_counter()
        if backend == "eager":
            made, difference = parts.compared(dict(parts.modules))
        elif backend == "compiled":
            made, difference = parts.compared({name: _compiled(parts, name) for name in parts.modules})
        else:
            build = {"aot": build_aot, "tensorrt": build_tensorrt}[backend]

            def begun(folder: Path) -> None:
                log.warning("building the %s engine of %s, once: this may take minutes", backend, name)
                build(parts, folder)

            folder = home() if cache is None else Path(cache)
            facts = known(model, backend, cameras, precision)
            made, difference = engine(folder, facts, begun, lambda at: _tried(parts, at, backend))
        log.info("%s: %s ready after %.1f s, %s", name, backend, perf_counter() - began, difference)
    except (MemoryError, torch.OutOfMemoryError):  # told by their kind
        raise
    except Exception as problem:  # compilers fail in any way
        first = (str(problem).strip() or repr(problem)).split("\n")[0]
        raise ValueError(f"backend {backend} of {name} on {model.device}: {first}") from problem
    return replace(model, system=made, backend=backend, precision=precision)


def _tried(parts: "Parts", folder: Path, backend: str) -> tuple["Engine", Difference]:
    """A folder's engine, compared. Unfit whatever goes wrong: one that loads may still hold what this driver or GPU
    cannot run."""
    try:
        return parts.compared(loaded(parts, folder, backend))
    except (Unfit, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # whatever machine code may throw
        if "out of memory" in str(problem).lower():  # a package's own has no kind, and another build would not help
            raise
        raise Unfit(f"it cannot be run ({(str(problem).strip() or repr(problem)).splitlines()[0]})") from problem


def check_backend(model: Model, backend: str) -> None:
    """ValueError where a backend cannot be had for a model, before anything is built."""
    if not hasattr(model.system, "answer"):
        raise ValueError(f"{model.name} runs eager alone, in float32: what it makes of LiDAR points is not exported")
    if backend == "tensorrt":
        if model.device.type != "cuda":
            told = "`occflow export MODEL --coverage` tells what it would run"
            raise ValueError(f"backend tensorrt needs an NVIDIA GPU, the model is on {model.device}; {told}")
        try:
            import torch_tensorrt  # noqa: F401
        except ImportError as problem:
            raise ValueError("backend tensorrt needs torch_tensorrt: pip install torch-tensorrt") from problem


# ---- what becomes a program -----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Pictures (1, 1, N, 3, H, W) uint8, used (1, 1, N) bool -> {"rows": (1, 1, N, R, C)} float32."""

    def __init__(self, system: nn.Module, rounding: Rounding):
        super().__init__()
        self.system, self.rounding = system, rounding
        self.backbone = system.backbone if rounding.kind is None else folded(system.backbone, system.config)

    def forward(self, images: Tensor, used: Tensor) -> dict[str, Tensor]:
        s = self.system
        with self.rounding.cast(images.device):
            return {"rows": encode(images, used, (s.mean, s.std), self.backbone, s.neck)[0]}


class Decoder(nn.Module):
    """A window -> the tensors of the system's output by their names, none in half precision.

    rows: T of (N, R, C). pixels_from_now (1, T, N, 3, 4), used (1, T, N). The newest instant's cameras:
    pixels_from_camera (1, N, 3, 3), car_from_camera (1, N, 4, 4).
    """

    def __init__(self, system: nn.Module, sizes: tuple[tuple[int, int], ...], rounding: Rounding):
        super().__init__()
        self.system, self.sizes, self.rounding = system, sizes, rounding

    def forward(
        self,
        rows: list[Tensor],
        pixels_from_now: Tensor,
        used: Tensor,
        pixels_from_camera: Tensor,
        car_from_camera: Tensor,
    ) -> dict[str, Tensor]:
        picture = (self.system.config.height, self.system.config.width)
        cameras = Cameras(pixels_from_camera, car_from_camera, *picture)
        view = View([rows], self.sizes, picture, pixels_from_now, used, cameras)
        with self.rounding.cast(used.device):
            said = dict(_named(self.system.answer(view)))
        return {name: t.float() if t.dtype == self.rounding.kind else t for name, t in said.items()}


@dataclass(frozen=True)
class Parts:
    """The parts of a system that become programs, and what is known about them."""

    system: nn.Module
    cameras: int
    rounding: Rounding
    modules: dict[str, nn.Module]  # "encoder", "decoder"
    inputs: dict[str, tuple]  # what each may be given: shapes and types are fixed by it
    sizes: tuple[tuple[int, int], ...]  # (H, W) of the levels of a pyramid
    output: Any  # what the decoder's tensors stand in; its own hold no numbers

    @staticmethod
    def of(system: nn.Module, cameras: int, precision: str = "float32") -> "Parts":
        rounding = ROUNDINGS[precision]
        device, frames = system.mean.device, system.config.frames
        with torch.inference_mode(False), torch.no_grad():  # a program that is exported may not hold such tensors
            clip = made_up_drive(system.config, cameras, 0)[0].to(device)
            rows, sizes = encode(clip.images, clip.used, (system.mean, system.std), system.backbone, system.neck)
            view = View.of(remember(clip, rows, None, frames)[0], sizes)
            output = _refilled(system.answer(view), lambda tensor: tensor.to("meta"))
            modules = {"encoder": Encoder(system, rounding), "decoder": Decoder(system, sizes, rounding)}
        inputs = {"encoder": _pictures(clip), "decoder": _window(view)}
        return Parts(system, cameras, rounding, modules, inputs, sizes, output)

    def program(self, part: str) -> torch.export.ExportedProgram:
        """A part as torch.export sees it."""
        with torch.inference_mode(False), torch.no_grad():
            return torch.export.export(self.modules[part].eval(), self.inputs[part], strict=False)

    def compared(self, runs: dict[str, Run]) -> tuple["Engine", Difference]:
        """The parts put together, and how far they are from eager in float32. Unfit where that is farther than their
        precision may be."""
        made = Engine(self, runs)
        with torch.inference_mode():  # tensors as a drive's: for others a compiler would compile again
            rows = runs["encoder"](*(given.clone() for given in self.inputs["encoder"]))["rows"]
        if not rows.isfinite().all():
            raise Unfit("what it says is not what eager says: its features are not finite")
        found = self._differences(made)
        worst = Difference(max(d.largest for d in found), max(d.mean for d in found))
        tolerance = self.rounding.tolerance
        if not worst.mean <= tolerance:
            exact = Parts.of(self.system, self.cameras).modules
            off = Engine(self, {**exact, "encoder": partial(self._off, exact["encoder"])})
            allowed = [max(tolerance, SLACK * d.mean) for d in self._differences(off)]
            wrong = [i for i, (d, most) in enumerate(zip(found, allowed, strict=True)) if not d.mean <= most]
            if wrong:
                most = allowed[wrong[0]]
                raise Unfit(f"what it says is not what eager says: {found[wrong[0]]}, where {most:.1e} is allowed")
        return made, worst

    def _off(self, encoder: nn.Module, images: Tensor, used: Tensor) -> dict[str, Tensor]:
        """An encoder's features a little off: always by the same for the same pictures."""
        rows = encoder(images, used)["rows"]
        generator = torch.Generator(rows.device).manual_seed(0)
        noise = torch.randn(rows.shape, generator=generator, device=rows.device)
        return {"rows": rows * (1 + self.rounding.features * noise)}

    @torch.inference_mode()
    def _differences(self, made: nn.Module) -> list[Difference]:
        """Of the encoder's features, and of every tensor that the system and another say of the clips of drives, each
        with its own memory."""
        worst: list[Difference] = []
        for seed in range(DRIVES):
            mine = other = None
            for clip in made_up_drive(self.system.config, self.cameras, seed):
                clip = clip.to(self.system.mean.device)
                (expected, mine), (told, other) = self.system(clip, mine), made(clip, other)
                rows = [((None, m.lanes[0][0].rows),) for m in (mine, other)]  # what the encoder said just now
                both = ((*first, *said.told()) for first, said in zip(rows, (expected, told), strict=True))
                found = [differ(*pair) for pair in zip(*both, strict=True)]
                pairs = zip(worst or found, found, strict=True)
                worst = [Difference(max(a.largest, b.largest), max(a.mean, b.mean)) for a, b in pairs]
        return worst


class Engine(nn.Module):
    """A system whose parts are run by a backend: clips of one lane and one instant, as `Stream` gives them."""

    def __init__(self, parts: Parts, runs: dict[str, Run]):
        super().__init__()
        self.system, self.config = parts.system, parts.system.config
        self.runs, self.sizes, self.output = runs, parts.sizes, parts.output  # not what it was only built from
        self.pictures = tuple(parts.inputs["encoder"][0].shape)

    @torch.inference_mode()
    def forward(self, clip: Clip, memory: Memory | None) -> tuple[Any, Memory]:
        """As the system's own. ValueError for clips of other shapes."""
        pictures = _pictures(clip)
        if tuple(pictures[0].shape) != self.pictures:
            raise ValueError(f"this engine was built for pictures {self.pictures}, got {tuple(pictures[0].shape)}")
        rows = self.runs["encoder"](*pictures)["rows"]
        windows, memory = remember(clip, rows, memory, self.config.frames)
        told = self.runs["decoder"](*_window(View.of(windows, self.sizes)))
        names = iter([name for name, _ in _named(self.output)])
        return _refilled(self.output, lambda _: told[next(names)]), memory

    def decode(self, output: Any) -> list[Prediction]:
        return self.system.decode(output)


@torch.no_grad()
def folded(backbone: nn.Module, config: Any) -> nn.Module:
    """A copy whose convolutions hold the norms that follow them: what is rounded is rounded once, and exact before.

    A norm that takes what no convolution gave stays. ValueError where somebody else takes it, too.
    """
    original, backbone, gave, pairs = backbone, deepcopy(backbone).eval(), {}, []
    names = {module: name for name, module in backbone.named_modules()}
    hooks = [
        module.register_forward_hook(lambda m, _, given: gave.update({id(given): (m, given)}))
        if isinstance(module, nn.Conv2d)
        else module.register_forward_pre_hook(lambda m, taken: pairs.append((gave.get(id(taken[0])), m)))
        for module in backbone.modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
    ]
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, config.height, config.width, generator=generator).to(next(original.parameters()).device)
    expected = backbone(picture)
    for hook in hooks:
        hook.remove()
    for (convolution, _), norm in [pair for pair in pairs if pair[0] is not None]:
        backbone.set_submodule(names[convolution], fuse_conv_bn_eval(convolution, norm))
        backbone.set_submodule(names[norm], nn.Identity())
    for told, level in zip(backbone(picture), expected, strict=True):
        if not (told - level).abs().max() <= TOLERANCE * level.abs().max():
            raise ValueError(f"the norms of {type(original).__name__} cannot be folded: others read what they take")
    return backbone


def _pictures(clip: Clip) -> tuple[Tensor, Tensor]:
    return clip.images.contiguous(), clip.used.contiguous()


def _window(view: View) -> tuple:
    # each a tensor of its own, though at first the oldest is there again and again: a program for every pattern of
    # equal ones would be compiled
    rows = [rows.view(rows.shape) for rows in view.rows[0]]
    cameras = (view.cameras.pixels_from_camera, view.cameras.car_from_camera)
    return rows, *(t.contiguous() for t in (view.pixels_from_now, view.used, *cameras))


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in dataclasses and sequences, each with the way to it as its name: points.0, kept.2.where."""
    if isinstance(value, Tensor):
        yield name, value
    elif is_dataclass(value):
        for f in fields(value):
            yield from _named(getattr(value, f.name), f"{name}.{f.name}".lstrip("."))
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _named(part, f"{name}.{i}")


def _refilled(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors; `change` is asked in the order of `_named`."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value):
        return replace(value, **{f.name: _refilled(getattr(value, f.name), change) for f in fields(value)})
    if isinstance(value, (tuple, list)):
        return type(value)(_refilled(part, change) for part in value)
    return value


# ---- backends -------------------------------------------------------------------------------------------------------


def _compiled(parts: Parts, part: str) -> Run:
    graphs = parts.system.mean.device.type == "cuda"
    program = torch.compile(parts.program(part).module(), fullgraph=True, mode="reduce-overhead" if graphs else None)

    def run(*inputs):
        # V2 has as many voxels as its points reach
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
            told = program(*inputs)
        # a graph writes its next results where these are
        return {name: tensor.clone() for name, tensor in told.items()} if graphs else told

    return run


def build_aot(parts: Parts, folder: Path) -> None:
    """Packages encoder.pt2 and decoder.pt2, which `torch._inductor.aoti_load_package` or C++ runs."""
    for part in parts.modules:
        freezing = parts.system.mean.device.type == "cpu"
        try:
            _package(parts.program(part), folder / (part + ENGINE), freezing)
        except RuntimeError as problem:
            # PyTorch 2.13 drops a constant that SparseOcc's decoder still needs, while it freezes
            if not freezing or "references nonexistent attribute" not in str(problem):
                raise
            log.info("%s: its weights are not frozen, PyTorch cannot", part)
            _package(parts.program(part), folder / (part + ENGINE), freezing=False)


def _package(program: torch.export.ExportedProgram, path: Path, freezing: bool) -> None:
    """freezing: weights are rounded, and laid out for the CPU's kernels, while it is built and not at every step."""
    # dynamic threads: as many as the process has, not as this one had
    how = {"cpp.dynamic_threads": True, "freezing": freezing}
    with torch.no_grad():  # else PyTorch does not freeze
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=how)


def build_tensorrt(parts: Parts, folder: Path) -> None:
    """The same packages, in which TensorRT runs what it can."""
    import torch_tensorrt

    for part, inputs in parts.inputs.items():
        module = torch_tensorrt.dynamo.compile(plain(parts.program(part)), arg_inputs=inputs)
        path = str(folder / (part + ENGINE))
        torch_tensorrt.save(module, path, output_format="aot_inductor", arg_inputs=inputs, retrace=True)


def loaded(parts: Parts, folder: Path, backend: str) -> dict[str, Run]:
    """The packages of a folder. Unfit where one cannot be loaded."""
    if backend == "tensorrt":
        import torch_tensorrt  # noqa: F401 (its runtime must be there before its engines)
    device = parts.system.mean.device
    index = -1 if device.index is None else device.index
    try:
        return {
            part: torch._inductor.aoti_load_package(str(folder / (part + ENGINE)), device_index=index)
            for part in parts.modules
        }
    except Exception as problem:  # whatever a loader of machine code may throw
        raise Unfit(f"it cannot be loaded ({str(problem).strip().splitlines()[0]})") from problem


# ---- what an engine depends on --------------------------------------------------------------------------------------


def known(model: Model, backend: str, cameras: int, precision: str = "float32") -> dict[str, Any]:
    """All that an engine is built from, as plain JSON."""
    config = model.system.config
    return {
        "weights": _weights(model.system),
        "model": model.name,
        "config": asdict(config),
        "backend": backend,
        "precision": precision,
        "cameras": cameras,
        "pictures": [config.height, config.width],
        "device": _device(model.device),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: _version(name) for name in ("torch", "triton", "tensorrt", "torch-tensorrt")},
        "code": _code(),
    }


def _weights(system: nn.Module) -> str:
    """SHA-256 of all that was learned or drawn, whichever file or seed it came from."""
    digest = sha256()
    for name, tensor in sorted(system.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _device(device: torch.device) -> str:
    """The name of the GPU or of the processor: engines hold what only that one may be able to run."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {torch.cuda.get_device_capability(device)}"
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else f"{platform.machine()} {platform.processor()}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _code() -> str:
    """SHA-256 of the code that is compiled: stricter than a version, which stands still while code is written."""
    root, digest = Path(__file__).parents[1], sha256()
    rooms = (sorted((root / room).rglob("*.py")) for room in ("geometry", "nn", "ops", "systems", "runtime"))
    for path in (root / "transfer.py", root / "types.py", *chain.from_iterable(rooms)):
        digest.update(f"{path.relative_to(root)}{os.linesep}".encode() + path.read_bytes())
    return digest.hexdigest()


# ---- is it the same? ------------------------------------------------------------------------------------------------


def made_up_drive(config: Any, cameras: int, seed: int) -> list[Clip]:
    """FRAMES clips, half a second apart, of a car that drives 4 m in each: smooth random pictures of cameras that look
    around; in the last one a camera is missing, if there are others. The same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    height, width = config.height, config.width
    looks = torch.eye(3, dtype=torch.float64)
    looks[0, 0] = looks[1, 1] = 0.6 * width
    looks[0, 2], looks[1, 2] = width / 2, height / 2
    yaw = 2 * torch.pi * torch.arange(cameras, dtype=torch.float64) / cameras
    turns = [rigid.from_quaternion((c, 0, 0, s), (0, 0, 1.5)) for c, s in zip((yaw / 2).cos(), (yaw / 2).sin())]
    mounts = torch.stack(turns) @ rigid.from_quaternion((0.5, -0.5, 0.5, -0.5), (1.0, 0.0, 0.0))
    clips, last = [], None
    for k in range(FRAMES):
        rough = 255 * torch.rand(cameras, 3, max(2, height // 16), max(2, width // 16), generator=generator)
        images = F.interpolate(rough, size=(height, width), mode="bilinear").to(torch.uint8)
        used = torch.ones(cameras, dtype=torch.bool)
        used[cameras - 1] = cameras == 1 or k < FRAMES - 1
        stamp = k * NANO // 2
        frame = Frame(
            images=images * used[:, None, None, None],
            cameras=Cameras(looks.expand(cameras, 3, 3), mounts, height, width),
            used=used,
            stamps=torch.full((cameras,), stamp),
            stamp=stamp,
            world_from_car=rigid.from_quaternion((1.0, 0.0, 0.0, 0.02 * k), (4.0 * k, 0.0, 0.0)),
            drive=f"made up {seed}",
            names=tuple(map(str, range(cameras))),
        )
        clips.append(Clip.of(frame, after=last))
        last = frame
    return clips


def differ(mine: tuple[Tensor | None, Tensor], other: tuple[Tensor | None, Tensor]) -> Difference:
    """Of two pairs (places or None, values), as an output's `told` gives them: what is expected, and what is told.
    What is told of a place by one of them alone counts whole."""
    (places, expected), (their_places, told) = mine, other
    apart = scale = 0.0
    if places is not None:
        inverse, count = torch.cat([places, their_places]).unique(dim=0, return_inverse=True, return_counts=True)[1:]
        shared = (count == 2)[inverse].split([len(places), len(their_places)])
        rows = inverse.split([len(places), len(their_places)])
        apart = expected[~shared[0]].double().abs().sum() + told[~shared[1]].double().abs().sum()
        scale = expected[~shared[0]].double().abs().sum()
        expected, told = (
            values[both][row[both].argsort()] for values, both, row in zip((expected, told), shared, rows, strict=True)
        )
    if expected.shape != told.shape:
        return Difference(float("inf"), float("inf"))
    difference, size = (told.double() - expected.double()).abs(), expected.double().abs()
    apart, scale = float(apart + difference.sum()), float(scale + size.sum())
    if not (isfinite(apart) and isfinite(scale)):  # one number is enough, also one of a place that but one knows
        return Difference(float("inf"), float("inf"))
    largest = float(difference.max() / size.max().clamp_min(1e-3)) if size.numel() else 0.0
    # numbers are metres, metres per second and logits: of less than a thousandth on average none matters
    return Difference(largest, apart / max(scale, 1e-3 * max(size.numel(), 1)))
