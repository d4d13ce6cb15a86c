"""Kernels where there is no GPU: run by Triton's interpreter, or compiled for a GPU that need not be there."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="kernels for a GPU need Triton: pip install triton (Linux)"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def child(code: str, *arguments, **variables) -> str:
    """Runs code in a Python of its own: Triton reads how it shall compile when it is first imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def interpreted(folder: Path, name: str, worlds: dict, **constants) -> dict:
    """What the kernels of ops/NAME_triton.py make of all worlds, by `answer` of test_NAME_triton.py, in one process.

    constants: of the kernels' file, changed for small worlds.
    """
    torch.save((worlds, constants), folder / "worlds.pt")
    child(
        "import sys\nsys.path.insert(0, 'test')\nfrom ops.interpreter import _answers\n_answers(*sys.argv[1:])\n",
        *(name, folder / "worlds.pt", folder / "answers.pt"),
        TRITON_INTERPRET="1",
    )
    return torch.load(folder / "answers.pt", weights_only=True)


def _answers(name: str, given: str, told: str) -> None:
    home, kernels = parts(name)
    worlds, constants = torch.load(given, weights_only=True)
    for constant, value in constants.items():
        setattr(kernels, constant, value)
    home._fast = lambda *tensors: kernels  # for tensors of the CPU too
    answer = importlib.import_module(f"ops.test_{name}_triton").answer
    torch.save({world: answer(worlds[world]) for world in worlds}, told)


def parts(name: str):
    """ops/NAME.py and ops/NAME_triton.py."""
    return (importlib.import_module(f"occflow_core.ops.{name}{end}") for end in ("", "_triton"))


def to(device: str, thing):
    """A world somewhere else."""
    if isinstance(thing, dict):
        return {key: to(device, value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing)(to(device, value) for value in thing)
    return thing.to(device) if isinstance(thing, torch.Tensor) else thing


def atomics(ptx: str) -> list[str]:
    return re.findall(r"\b(?:atom|red)\.\S+", ptx)


def compiled(name: str, kernels: dict, types: dict, folder: Path, warps: int = 4) -> list[tuple[str, int]]:
    """Kernels of ops/NAME_triton.py down to the machine code of an A100: of each its PTX and bytes of shared memory.

    kernels: name, or name and a remark -> its constants. types: text of names -> Triton's type.
    """
    child(
        "import json, sys\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource, compile\n"
        f"from occflow_core.ops import {name}_triton as home\n"
        f"types = {{n: kind for names, kind in {types}.items() for n in names.split()}}\n"
        "told = []\n"
        f"for name, constants in {kernels}.items():\n"
        "    kernel = getattr(home, name.split()[0])\n"
        "    given = {n: 'constexpr' if n in constants else types[n] for n in kernel.arg_names}\n"
        "    source = ASTSource(kernel, given, constexprs=constants)\n"
        f"    made = compile(source, target=GPUTarget('cuda', 80, 32), options={{'num_warps': {warps}}})\n"
        "    assert made.asm['cubin']\n"
        "    told.append((made.asm['ptx'], made.metadata.shared))\n"
        "json.dump(told, open(sys.argv[1], 'w'))\n",
        folder / "told.json",
        TRITON_CACHE_DIR=str(folder),
    )
    return json.loads((folder / "told.json").read_text())
