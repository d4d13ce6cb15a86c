"""A model -> files that run without its Python: AOTInductor packages or TensorRT engines of its parts, or ONNX."""

import os
import re
import shutil
import warnings
from inspect import signature
from pathlib import Path
from typing import Literal

import torch
from torch.utils._pytree import tree_unflatten

from .backends import Parts, Run, build_aot, build_tensorrt, check_backend, known, loaded
from .cache import Unfit, write_manifest
from .load import Model
from .plain import plain

Format = Literal["aot", "onnx", "tensorrt"]


def export(model: Model, out: Path | str, backend: Format = "aot", cameras: int = 6) -> str:
    """Write a folder with the parts of a model (see `runtime.backends`) and a manifest; what was compared, as a text.

    aot, tensorrt: encoder.pt2 and decoder.pt2, for the machine and the device at hand. onnx: encoder.onnx and
    decoder.onnx, whose inputs and outputs have the names that `Encoder` and `Decoder` give them. Both parts are
    compared with eager, over made-up drives, before the folder appears, which is whole or not at all. ValueError where
    they say something else, the folder exists, or the format cannot be had.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"export: {out} exists already; name a folder that does not")
    check_backend(model, backend)
    parts = Parts.of(model.system, cameras)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        if backend == "onnx":
            runs = build_onnx(parts, beside)
        else:
            (build_aot if backend == "aot" else build_tensorrt)(parts, beside)
            runs = loaded(parts, beside, backend)
        _, difference = parts.compared(runs)
        write_manifest(beside, known(model, backend, cameras))
        files = ", ".join(f"{p.name} {p.stat().st_size / 1e6:.1f} MB" for p in sorted(beside.iterdir()))
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return f"{out}: {model.name}, {files}\ncompared with eager, encoder and decoder over made-up drives: {difference}"


def build_onnx(parts: Parts, folder: Path) -> dict[str, Run]:
    """Files encoder.onnx and decoder.onnx, and how ONNX Runtime runs them, on the processor.

    Lists and dicts are told flat: rows_0, rows_1, ... go in, points.0, points.1, ... come out. ValueError, in one
    sentence, where ONNX lacks an operator or ONNX Runtime cannot run a file.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter speaks it)
    except ImportError as problem:
        raise ValueError("export to onnx needs: pip install onnx onnxscript onnxruntime") from problem
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    runs = {}
    for part in parts.modules:
        path = folder / f"{part}.onnx"
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of what torch's exporters do without
            program = plain(parts.program(part))
            names = {"input_names": _inputs(parts, part), "output_names": _outputs(program)}
            try:
                torch.onnx.export(program, dynamo=True, verbose=False, **names).save(str(path))
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except Exception as problem:  # compilers fail in any way
                raise Unfit(f"export: the {part} cannot be had in ONNX: {_lacking(problem)}") from problem
        runs[part] = _run(session, parts.system.mean.device)
    return runs


def _inputs(parts: Parts, part: str) -> list[str]:
    given = zip(signature(parts.modules[part].forward).parameters, parts.inputs[part], strict=True)
    return [n for name, t in given for n in ([f"{name}_{i}" for i in range(len(t))] if isinstance(t, list) else [name])]


def _outputs(program: torch.export.ExportedProgram) -> list[str]:
    return list(tree_unflatten(program.graph_signature.user_outputs, program.call_spec.out_spec))


def _run(session, device: torch.device) -> Run:
    inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))

    def run(*given):
        flat = [tensor for value in given for tensor in (value if isinstance(value, list) else [value])]
        told = session.run(outputs, {name: t.cpu().numpy() for name, t in zip(inputs, flat, strict=True)})
        return {name: torch.from_numpy(value).to(device) for name, value in zip(outputs, told, strict=True)}

    return run


def _lacking(problem: BaseException | None) -> str:
    """What an exporter complains about, in a few words: the operator where it names one."""
    first = (str(problem).strip() or repr(problem)).split("\n")[0]
    while problem is not None:
        found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", str(problem))
        if found:
            return f"it has no operator for {found[1]}.{found[2]}"
        problem = problem.__cause__
    return first
