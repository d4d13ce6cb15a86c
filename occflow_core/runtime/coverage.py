"""How much of a model TensorRT would run: the operators of its programs against torch_tensorrt's converters.

Where torch_tensorrt is installed its own registry is asked, node by node; else `tensorrt_converters.txt`, by names
alone. What no converter is for stays with PyTorch, and cuts an engine in two.
"""

import math
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import Node

from .backends import Parts, check_backend
from .load import Model
from .plain import plain

LIST = Path(__file__).with_name("tensorrt_converters.txt")
aten = torch.ops.aten


def _var(values: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False):
    away = values - values.mean(dim, keepdim=True)
    count = math.prod(values.shape[d] for d in (range(values.ndim) if dim is None else dim))
    return (away * away).sum(dim, keepdim=keepdim) / (count - (1 if correction is None else correction))


# torch_tensorrt (2.13.0: its disabled decompositions, attention, a pass that makes poolings whole again) takes whole:
WHOLE = (
    *(aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default, aten._softmax.default),
    *(aten.max_pool2d.default, aten.all.dim, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec),
)
# and in parts, beside what core ATen has not:
IN_PARTS = torch._decomp.get_decompositions([aten.linalg_vector_norm, aten.repeat, aten.clamp_min, aten.clamp_max]) | {
    aten.var.correction: _var,
    aten.alias.default: lambda values: values,
    aten.full_like.default: lambda values, fill, dtype=None, **_: values.new_full(values.shape, fill, dtype=dtype),
}
# checks of sizes and types: it takes them out
CHECKS = (
    *(aten._assert_scalar.default, aten._assert_tensor_metadata.default),
    *(aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default),
)
Asked = Callable[[Node], bool]


@dataclass(frozen=True)
class Coverage:
    """The operators of a program, and those that no converter is for: how many nodes of each."""

    nodes: Counter[str]
    missing: Counter[str]

    def __str__(self):
        kinds, nodes = len(self.nodes), self.nodes.total()
        known, run = kinds - len(self.missing), nodes - self.missing.total()
        left = ", ".join(f"{count} {name}" for name, count in sorted(self.missing.items()))
        share = math.floor(1000 * run / max(nodes, 1)) / 10  # 100 % is all of them
        told = f"{known} of {kinds} kinds of operators, {run} of {nodes} nodes ({share} %)"
        return told + (f"; PyTorch runs {left}" if left else "")


def coverage(model: Model, cameras: int = 6) -> str:
    """What TensorRT would run of a model's encoder and decoder, as a text. Nothing is built, and no GPU is needed.

    ValueError for a model that is not exported.
    """
    check_backend(model, "aot")
    parts = Parts.of(model.system, cameras)
    asked, source = converters()
    told = [f"{part}: {covered(lowered(plain(parts.program(part))), asked)}" for part in parts.modules]
    return "\n".join([f"{model.name} in TensorRT, by {source}; nothing was run", *told])


def converters() -> tuple[Asked, str]:
    """Whether a node can be converted, and who says so."""
    try:
        import torch_tensorrt
        from torch_tensorrt.dynamo import CompilationSettings
        from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS
    except Exception:  # it raises anything where it is installed without TensorRT
        names = set(LIST.read_text().splitlines())
        return lambda node: name_of(node) in names, "the names of torch_tensorrt 2.13.0's converters"
    DYNAMO_CONVERTERS.set_compilation_settings(CompilationSettings(device=None))  # it would ask for a GPU
    return lambda node: node in DYNAMO_CONVERTERS, f"the converters of torch_tensorrt {torch_tensorrt.__version__}"


def lowered(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """In the operators that torch_tensorrt sees: core ATen, but for what it takes whole, in parts or out."""
    table = torch.export.default_decompositions()
    table.update(IN_PARTS)
    for whole in WHOLE:
        table.pop(whole, None)
    program = program.run_decompositions(table)
    for node in list(program.graph.nodes):
        if node.target in CHECKS:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    return program


def covered(program: torch.export.ExportedProgram, asked: Asked) -> Coverage:
    """Of what depends on the inputs (the rest is computed once, before an engine is built) and computes something."""
    given = set(program.graph_signature.user_inputs)
    nodes, missing, moving = Counter(), Counter(), set()
    for node in program.graph.nodes:
        if node.name in given or any(i in moving for i in node.all_input_nodes):
            moving.add(node)
        if node in moving and node.op == "call_function" and node.target is not operator.getitem:
            nodes[name_of(node)] += 1
            missing[name_of(node)] += not asked(node)
    return Coverage(nodes, +missing)


def name_of(node: Node) -> str:
    """aten.add.Tensor, operator.add, torch.sym_min."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{target.__module__.lstrip('_')}.{target.__name__}"
