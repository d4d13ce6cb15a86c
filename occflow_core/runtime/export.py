"""A model -> files that run without its Python: an AOTInductor package of each part, or ONNX."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Literal

import torch

from .backends import TOLERANCE, Difference, Parts, build_aot, check_backend, differ, known, loaded, made_up_drive
from .cache import write_manifest
from .load import Model

Format = Literal["aot", "onnx"]


def export(model: Model, out: Path | str, backend: Format = "aot", cameras: int = 6) -> str:
    """Write a folder with the parts of a model (see `runtime.backends`) and a manifest; what was compared, as a text.

    aot: encoder.pt2 and decoder.pt2, for the machine and the device at hand. onnx: encoder.onnx; of the decoder ONNX
    lacks the distances among queries. Each is compared with eager before the folder appears, which is whole or not at
    all. ValueError where it says something else, the folder exists, or the format cannot be had.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"export: {out} exists already; name a folder that does not")
    check_backend(model, backend)
    parts = Parts.of(model.system, cameras)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        if backend == "aot":
            build_aot(parts, beside)
            _, difference = parts.compared(loaded(parts, beside, backend))
        else:
            difference = _onnx(parts, beside)
        write_manifest(beside, known(model, backend, cameras))
        files = ", ".join(f"{p.name} {p.stat().st_size / 1e6:.1f} MB" for p in sorted(beside.iterdir()))
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    what = "encoder and decoder over made-up drives" if backend == "aot" else "the encoder alone, on made-up pictures"
    return f"{out}: {model.name}, {files}\ncompared with eager, {what}: {difference}"


def _onnx(parts: Parts, folder: Path) -> Difference:
    """encoder.onnx: inputs `images` uint8 and `used` bool, output `rows`. How far ONNX Runtime on it is from eager."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter speaks it)
    except ImportError as problem:
        raise ValueError("export to onnx needs: pip install onnx onnxscript onnxruntime") from problem
    path = folder / "encoder.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of what torch's exporter does without
        names = {"input_names": ["images", "used"], "output_names": ["rows"]}
        torch.onnx.export(parts.program("encoder"), dynamo=True, verbose=False, **names).save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for clip in made_up_drive(parts.system.config, parts.cameras, seed=0):
        with torch.inference_mode():
            device = parts.system.mean.device
            rows = parts.modules["encoder"](clip.images.to(device), clip.used.to(device))["rows"].cpu()
        (told,) = session.run(["rows"], {"images": clip.images.numpy(), "used": clip.used.numpy()})
        found.append(differ((None, rows), (None, torch.from_numpy(told))))
    difference = Difference(max(d.largest for d in found), max(d.mean for d in found))
    if not difference.mean <= TOLERANCE:
        raise ValueError(
            f"export: what ONNX Runtime says is not what eager says: {difference}, allowed {TOLERANCE:.0e}"
        )
    return difference
