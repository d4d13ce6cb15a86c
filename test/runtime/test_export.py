"""What is exported says what eager says, or nothing is written; what TensorRT would run is counted without it."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from runtime.test_backends import CAMERAS, equal_on_a_drive, opus
from systems.rig import drive
from torch import nn
from torch.nn import functional as F

from occflow_core.runtime import Model, coverage, load
from occflow_core.runtime import export as module
from occflow_core.runtime.backends import Engine, Parts
from occflow_core.runtime.export import export
from occflow_core.runtime.plain import OPERATORS, plain

aten = torch.ops.aten


def onnx_of(model, folder, cameras) -> Model:
    """The model as the files of a folder, by ONNX Runtime and the names that are promised."""
    ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    encoder, decoder = (ort.InferenceSession(str(folder / f"{part}.onnx")) for part in ("encoder", "decoder"))

    def encode(images, used):
        (rows,) = encoder.run(["rows"], {"images": images.numpy(), "used": used.numpy()})
        return {"rows": torch.from_numpy(rows)}

    def decode(rows, *others):
        names = ("pixels_from_now", "used", "pixels_from_camera", "car_from_camera")
        given = dict(zip(names, others, strict=True)) | {f"rows_{i}": r for i, r in enumerate(rows)}
        told = decoder.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        return {o.name: torch.from_numpy(t) for o, t in zip(decoder.get_outputs(), told, strict=True)}

    parts = Parts.of(model.system, cameras)
    return replace(model, system=Engine(parts, {"encoder": encode, "decoder": decode}))


# ---- ONNX


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_whole_opus_as_onnx_says_what_eager_says_over_a_drive(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    model, out = opus(), tmp_path / "out"
    said = export(model, out, "onnx", CAMERAS)
    assert "encoder and decoder over made-up drives: largest difference" in said
    assert sorted(p.name for p in out.iterdir()) == ["decoder.onnx", "encoder.onnx", "manifest.json"]
    assert set(json.loads((out / "manifest.json").read_text())["files"]) == {"decoder.onnx", "encoder.onnx"}
    equal_on_a_drive(model, onnx_of(model, out, CAMERAS), drive(5, every=0.3))
    with pytest.raises(ValueError, match="exists already"):
        export(model, out, "onnx", CAMERAS)


@pytest.mark.big
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["opus-nano", "opus-demo", "opus-v2-nano", "sparseocc4d-nano"])
def test_each_system_as_onnx_says_what_eager_says(name, tmp_path):
    model = load(name)
    export(model, tmp_path / "out", "onnx")
    frames = drive(4, every=0.5, height=128, width=352, n=6)
    equal_on_a_drive(model, onnx_of(model, tmp_path / "out", 6), frames, within=1e-2 if "sparse" in name else 1e-3)


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")

    class Digits(nn.Module):
        def forward(self, x):
            return {"told": x.polygamma(2)}

    parts = Parts.of(opus().system, CAMERAS)
    parts = replace(parts, modules={"decoder": Digits()}, inputs={"decoder": (torch.rand(3),)})
    with pytest.raises(ValueError, match="the decoder cannot be had in ONNX: it has no operator for aten.polygamma"):
        module.build_onnx(parts, tmp_path)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_that_says_something_else_in_onnx_leaves_nothing(tmp_path, monkeypatch, part):
    def wrong(parts, folder):
        (folder / "encoder.onnx").touch()

        def off(*inputs):
            said = parts.modules[part](*inputs)
            return {name: t * 1.01 if t.is_floating_point() else t for name, t in said.items()}

        return {**parts.modules, part: off}

    monkeypatch.setattr(module, "build_onnx", wrong)
    with pytest.raises(ValueError, match="not what eager says"):
        export(opus(), tmp_path / "out", "onnx", CAMERAS)
    assert list(tmp_path.iterdir()) == []


def test_what_other_runtimes_lack_is_said_without_it_and_equal():
    """Values that repeat, lie outside and stand at either end; lengths that are not known before."""

    class All(nn.Module):
        def forward(self, a, b, index, share, table, ordered, wanted, rows, asked, many):
            ids, place = many.unique(return_inverse=True)
            counts = place.bincount(minlength=ids.shape[0])
            return (
                torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"),
                F.embedding_bag(index, table, mode="sum", per_sample_weights=share),
                torch.searchsorted(ordered, wanted),
                torch.searchsorted(ordered, wanted, side="right", out_int32=True),
                torch.searchsorted(rows, asked, right=True),
                torch.searchsorted(ids, wanted),
                counts,
            )

    torch.manual_seed(0)
    ordered = torch.randint(0, 9, (12,)).sort().values
    rows = torch.randint(0, 5, (2, 3, 7), dtype=torch.int32).sort(-1).values
    given = (
        *(torch.randn(2, n, 3) for n in (5, 4)),
        torch.randint(0, 6, (10, 4)),
        torch.rand(10, 4),
        torch.randn(6, 3),
        ordered,
        torch.arange(-2, 12).view(2, 7),
        rows,
        torch.randint(-1, 7, (2, 3, 4), dtype=torch.int32),
        torch.randint(0, 9, (40,)),
    )
    program = torch.export.export(All(), given, strict=False)
    said = plain(program)
    kinds = {str(node.target) for node in said.graph.nodes}
    assert not kinds & {str(operator) for operator in OPERATORS} and not [
        k for k in kinds if "cdist" in k or "bag" in k
    ]
    for expected, told in zip(All()(*given), said.module()(*given), strict=True):
        assert expected.dtype == told.dtype and torch.allclose(expected, told, atol=1e-6)


# ---- TensorRT, which is not here


class Sums(nn.Module):
    def forward(self, x):
        scale = torch.arange(3.0).exp().erfinv()  # of constants: computed once, before
        x, where = (x * scale).max(dim=1)
        return x.erfinv() + x.erfinv(), where


def lowered():
    return coverage.lowered(torch.export.export(Sums(), (torch.rand(2, 3),)))


def without_torch_tensorrt(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "torch_tensorrt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)  # an ImportError


def test_without_torch_tensorrt_operators_are_looked_up_in_the_list_that_ships(monkeypatch):
    without_torch_tensorrt(monkeypatch)
    asked, source = coverage.converters()
    assert "names" in source and "2.13.0" in source
    found = coverage.covered(lowered(), asked)
    assert found.nodes == {"aten.mul.Tensor": 1, "aten.max.dim": 1, "aten.erfinv.default": 2, "aten.add.Tensor": 1}
    assert found.missing == {"aten.erfinv.default": 2}
    assert str(found) == "3 of 4 kinds of operators, 3 of 5 nodes (60.0 %); PyTorch runs 2 aten.erfinv.default"


def test_with_torch_tensorrt_its_registry_is_asked_node_by_node(monkeypatch):
    class Converters:
        settings = None

        def set_compilation_settings(self, settings):
            self.settings = settings

        def __contains__(self, node):
            assert isinstance(node, torch.fx.Node) and self.settings == "the usual"
            return node.target is aten.erfinv.default

    there = {
        "torch_tensorrt": {},
        "torch_tensorrt.dynamo": {"CompilationSettings": lambda device: "the usual"},
        "torch_tensorrt.dynamo.conversion": {"DYNAMO_CONVERTERS": Converters()},
    }
    for name, holds in there.items():
        stand_in = types.ModuleType(name)
        vars(stand_in).update(holds, __path__=[], __version__="9.9")
        monkeypatch.setitem(sys.modules, name, stand_in)
    asked, source = coverage.converters()
    assert source == "the converters of torch_tensorrt 9.9"
    found = coverage.covered(lowered(), asked)
    assert found.missing == {"aten.mul.Tensor": 1, "aten.max.dim": 1, "aten.add.Tensor": 1}


def test_the_list_that_ships_is_sorted_and_names_operators_of_pytorch():
    names = [line for line in coverage.LIST.read_text().splitlines() if not line.startswith("#")]
    assert names == sorted(set(names)) and len(names) > 200
    for name in names:
        room, *rest = name.split(".")
        if room in ("aten", "prims"):
            packet, overload = rest
            assert hasattr(getattr(getattr(torch.ops, room), packet), overload), name


@pytest.mark.slow
def test_the_coverage_of_a_model_tells_encoder_and_decoder_and_writes_nothing(tmp_path, monkeypatch):
    without_torch_tensorrt(monkeypatch)
    monkeypatch.chdir(tmp_path)
    first, encoder, decoder = coverage.coverage(opus(), CAMERAS).splitlines()
    assert first.startswith("opus-small in TensorRT") and "nothing was run" in first
    assert encoder.startswith("encoder: ") and decoder.startswith("decoder: ")
    assert encoder.endswith("(100.0 %)") and decoder.endswith("(100.0 %)")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="eager alone"):
        coverage.coverage(load("opus-fusion-nano"))
