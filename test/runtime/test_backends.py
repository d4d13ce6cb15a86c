"""Every backend says what eager says, or is refused.

Compilers are slow: here one small OPUS is built, once, as a package. `pytest -m big` has it compiled, too, and builds
the nano preset of every system with every backend that runs on a CPU.
"""

import logging
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from systems import small, small_sparse, small_v2
from systems.rig import drive, frame
from torch import nn

from occflow_core.nn import BACKBONES
from occflow_core.runtime import Model, Stream, backends, built, load
from occflow_core.runtime.backends import ENGINE, Difference, Engine, Parts, differ, known
from occflow_core.runtime.cache import Unfit, key
from occflow_core.runtime.export import export
from occflow_core.systems.base import seeded
from occflow_core.systems.sparseocc import SparseOcc4D

CAMERAS, HALF = 3, ("bf16", "fp16")


def opus(seed=0) -> Model:
    system = small.build(small.BRIEF, seed)
    with torch.no_grad():  # else what an unused camera sees is zero even where it is looked into
        for convolution in system.neck.output:
            convolution.bias += 0.5
    return Model(system, "opus-small", False, "fast", None)


SMALL = {
    "opus": opus,
    "opus-v2": lambda: Model(small_v2.build(), "opus-v2-small", False, "fast", None),
    "sparseocc4d": lambda: Model(
        seeded(SparseOcc4D(small_sparse.CONFIG), 0).eval(), "sparseocc4d-small", False, "fast", None
    ),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "engines"


@pytest.fixture(scope="module")
def engine(cache) -> Model:
    """The smallest OPUS as an engine."""
    return built(opus(), "aot", CAMERAS, cache=cache)


def equal_on_a_drive(eager: Model, other: Model, frames, within=1e-3):
    """Frames of a drive, so that there is a memory: labels, scores and velocities are those of eager."""
    mine, theirs = Stream(eager), Stream(other)
    for f in frames:
        alike(mine.step(f), theirs.step(f), within)
    assert len(theirs.memory.lanes[0]) > 1


def alike(expected, told, within):
    filled = (expected.labels != expected.classes.free) | (told.labels != told.classes.free)
    assert filled.sum() > 20, "nothing is said: nothing is compared"
    assert (expected.labels != told.labels).sum() <= within * filled.sum()
    assert (expected.score - told.score).abs()[filled].mean() < within
    assert (expected.flow - told.flow).abs()[filled].mean() < 10 * within
    assert torch.equal(expected.unobserved, told.unobserved) or within > 1e-3


# ---- what becomes a program


@pytest.mark.slow
@pytest.mark.parametrize("system", SMALL)
def test_each_system_is_two_programs_that_say_what_it_says(system):
    model = SMALL[system]()
    parts = Parts.of(model.system, CAMERAS)
    programs = {name: parts.program(name) for name in ("encoder", "decoder")}
    made, difference = parts.compared({name: program.module() for name, program in programs.items()})
    assert difference.mean < 1e-5, difference
    equal_on_a_drive(model, replace(model, system=made), drive(4, every=0.5))


@pytest.mark.parametrize("system", SMALL)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_that_says_something_else_is_refused(system, part):
    parts = Parts.of(SMALL[system]().system, CAMERAS)

    def wrong(*inputs):
        return {name: t * 1.01 if t.is_floating_point() else t for name, t in parts.modules[part](*inputs).items()}

    with pytest.raises(Unfit, match="not what eager says"):
        parts.compared({**parts.modules, part: wrong})
    assert parts.compared(dict(parts.modules))[1] == Difference(0.0, 0.0)


def test_an_output_of_nan_or_of_another_shape_is_never_equal():
    ones = torch.ones(2, 3)
    assert differ((None, ones), (None, ones)).mean == 0
    assert differ((None, ones), (None, ones[:1])).mean == float("inf")
    assert differ((None, ones), (None, ones / torch.tensor([1, 0, 1]) * torch.tensor([1, 0, 1]))).mean == float("inf")


def test_one_number_that_is_none_is_enough_to_differ():
    """Also at a place that one of them alone tells of, and whatever else is compared."""
    places, values = torch.tensor([[0], [1]]), torch.ones(2, 3)
    more = torch.tensor([[0], [1], [2]]), torch.cat([values, torch.full((1, 3), torch.nan)])
    for pair in (((places, values), more), (more, (places, values)), ((None, values), (None, values * torch.nan))):
        assert differ(*pair).mean == float("inf")


def test_rows_are_compared_by_their_places():
    places, values = torch.tensor([[0, 1], [0, 5], [2, 2]]), torch.tensor([[1.0], [2.0], [3.0]])
    order = torch.tensor([2, 0, 1])
    assert differ((places, values), (places[order], values[order])) == Difference(0.0, 0.0)
    assert differ((places, values), (places[order], values)).mean > 0.5
    assert differ((places, values), (places[:2], values[:2])).mean == pytest.approx(0.5), "what one alone tells"
    other = torch.tensor([[0, 1], [0, 5], [2, 3]])
    assert differ((places, values), (other, values)).mean == pytest.approx(1.0)


# ---- precisions


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("system", SMALL)
def test_in_half_precision_it_says_nearly_what_float32_says_over_a_drive(system, precision):
    model = SMALL[system]()
    made = built(model, "eager", CAMERAS, precision)
    assert (made.backend, made.precision) == ("eager", precision)
    frames = drive(4, every=0.3)
    frames[3] = frame(at=0.9, seed=3, x=3.6, yaw=0.09, used=[True, False, True])
    if system != "sparseocc4d":  # untrained, its masks are so alike that the least change takes another for each voxel
        equal_on_a_drive(model, made, frames, within=0.1)


@pytest.mark.parametrize("precision", HALF)
def test_what_goes_between_the_parts_is_not_half_but_rounded_on_its_way(precision):
    half, exact = (Parts.of(opus().system, CAMERAS, word) for word in (precision, "float32"))
    for part, inputs in exact.inputs.items():
        with torch.inference_mode():
            told, expected = half.modules[part](*inputs), exact.modules[part](*inputs)
        assert {name: t.dtype for name, t in told.items()} == {name: t.dtype for name, t in expected.items()}
        assert max(differ((None, expected[name]), (None, told[name])).mean for name in told) > 1e-4


@pytest.mark.parametrize("precision", HALF)
def test_a_drive_goes_on_in_another_precision(precision):
    models = (opus(), built(opus(), "eager", CAMERAS, precision))
    *past, now = drive(4, every=0.5)
    for first, second in (models, models[::-1]):
        one, other = Stream(first), Stream(second)
        for f in past:
            one.step(f)
        other.memory, other.last = one.memory, one.last
        told = other.step(now)
        alike(one.step(now), told, within=0.1)
        assert not torch.equal(Stream(second).step(now).score, told.score), "what is remembered says something"


def test_a_precision_in_which_numbers_overflow_is_refused():
    """Two layers in a row, one a million times larger and the next as much smaller: the same function."""
    model, much = opus(), 1e6
    with torch.no_grad():
        for first, second in zip(model.system.neck.lateral, model.system.neck.output):
            first.weight *= much
            first.bias *= much
            second.weight /= much
    built(model, "eager", CAMERAS, "bf16")
    with pytest.raises(ValueError, match="in fp16 on cpu: what it says is not what eager says"):
        built(model, "eager", CAMERAS, "fp16")


@pytest.mark.parametrize("name", ["resnet18-half", "efficientnet-lite0"])
def test_norms_are_folded_into_the_convolutions_before_them(name):
    backbone = BACKBONES[name]()
    for i, norm in enumerate(m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
        generator = torch.Generator().manual_seed(i)
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    made = backends.folded(backbone.eval(), small.BRIEF)
    assert not [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)]
    pictures = torch.rand(2, 3, small.BRIEF.height, small.BRIEF.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for expected, told in zip(backbone(pictures), made(pictures), strict=True):
            assert torch.allclose(told, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


class Doubled(nn.Module):
    """What its convolution gives is read by the norm and once more."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.norm.running_var.fill_(4.0)

    def forward(self, pictures):
        given = self.convolution(pictures)
        return [self.norm(given) + given]


def test_a_norm_whose_convolution_somebody_else_reads_is_not_folded():
    with pytest.raises(ValueError, match="norms of Doubled cannot be folded"):
        backends.folded(Doubled(), small.BRIEF)


@pytest.mark.slow
@pytest.mark.parametrize("precision", HALF)
def test_programs_round_as_the_parts_do(precision):
    parts = Parts.of(opus().system, CAMERAS, precision)
    for part, inputs in parts.inputs.items():
        with torch.inference_mode():
            told, expected = parts.program(part).module()(*inputs), parts.modules[part](*inputs)
        assert all(torch.equal(told[name], value) for name, value in expected.items())


# ---- backends


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_engine_says_what_eager_says_over_a_drive(engine):
    frames = drive(5, every=0.3)
    frames[3] = frame(at=0.9, seed=3, x=3.6, yaw=0.09, used=[True, False, True])
    equal_on_a_drive(opus(), engine, frames)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_engine_in_half_precision_has_a_place_of_its_own_and_says_nearly_the_same(engine, cache):
    made = built(opus(), "aot", CAMERAS, "bf16", cache)
    places = [cache / key(known(opus(), "aot", CAMERAS, precision)) for precision in ("float32", "bf16")]
    sizes = [(place / ("encoder" + ENGINE)).stat().st_size for place in places]
    assert sizes[1] < sizes[0], "its weights are half as long"
    equal_on_a_drive(opus(), made, drive(3, every=0.5), within=0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_start_builds_nothing(engine, cache, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, logger="occflow")
    monkeypatch.setattr(backends, "build_aot", lambda *_: pytest.fail("it is built again"))
    again = built(opus(), "aot", CAMERAS, cache=cache)
    assert caplog.messages == []
    equal_on_a_drive(engine, again, drive(2, every=0.5))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_engine_runs_without_the_models_python(engine, cache, tmp_path):
    parts = Parts.of(opus().system, CAMERAS)
    pictures, used = parts.inputs["encoder"]
    torch.save([pictures, used], tmp_path / "inputs.pt")
    path = cache / key(known(opus(), "aot", CAMERAS)) / ("encoder" + ENGINE)
    code = (
        "import sys, torch; run = torch._inductor.aoti_load_package(sys.argv[1]);"
        "torch.save(run(*torch.load(sys.argv[2], weights_only=True))['rows'], sys.argv[3]);"
        "assert 'occflow_core' not in sys.modules"
    )
    files = [str(path), str(tmp_path / "inputs.pt"), str(tmp_path / "rows.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = parts.modules["encoder"](pictures, used)["rows"]
    assert torch.allclose(torch.load(tmp_path / "rows.pt", weights_only=True), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_engine_of_something_else_in_its_place_is_built_again(engine, cache, tmp_path, monkeypatch, caplog):
    """Even where manifest and digests agree: what it says decides."""
    import shutil

    caplog.set_level(logging.WARNING, logger="occflow")
    other, mine = opus(seed=1), known(opus(), "aot", CAMERAS)
    monkeypatch.setattr(backends, "known", lambda *_: mine)  # as if two weights had one key
    copied, builds = tmp_path / "copied", []
    shutil.copytree(cache, copied, copy_function=shutil.copy)
    copied.chmod(0o700)
    monkeypatch.setattr(backends, "build_aot", lambda parts, folder: builds.append(folder) or 1 / 0)
    with pytest.raises(ValueError, match="division by zero"):
        built(other, "aot", CAMERAS, cache=copied)
    assert len(builds) == 1 and "not what eager says" in caplog.text


def test_an_engine_that_loads_and_cannot_run_is_built_again_once(tmp_path, monkeypatch, caplog):
    """As after another driver was installed."""
    caplog.set_level(logging.WARNING, logger="occflow")
    builds = []

    def build(parts, folder):
        builds.append(1)
        (folder / "built").write_text(str(len(builds)))

    def load_package(parts, folder, backend):
        def fails(*_):
            raise RuntimeError(problem)

        return dict(parts.modules) if (folder / "built").read_text() == good else {"encoder": fails, "decoder": fails}

    monkeypatch.setattr(backends, "build_aot", build)
    monkeypatch.setattr(backends, "loaded", load_package)
    good, problem = "1", "no kernel image is available for execution on the device"
    made = built(opus(), "aot", CAMERAS, cache=tmp_path / "engines")
    good = "2"
    again = built(opus(), "aot", CAMERAS, cache=tmp_path / "engines")
    assert len(builds) == 2 and "it cannot be run (no kernel image is available" in caplog.text
    equal_on_a_drive(made, again, drive(2, every=0.5))
    good = "none"
    with pytest.raises(ValueError, match="it cannot be run"):
        built(opus(), "aot", CAMERAS, cache=tmp_path / "engines")
    problem = "CUDA error: out of memory"  # another build would not help
    with pytest.raises(ValueError, match="out of memory"):
        built(opus(), "aot", CAMERAS, cache=tmp_path / "engines")
    assert len(builds) == 3


def test_a_clip_of_other_cameras_is_refused_in_one_sentence():
    model = opus()
    parts = Parts.of(model.system, CAMERAS)
    stream = Stream(replace(model, system=Engine(parts, dict(parts.modules))))
    with pytest.raises(ValueError, match=r"built for pictures \(1, 1, 3, 3, 64, 96\), got \(1, 1, 4, 3, 64, 96\)"):
        stream.step(frame(n=4))


@pytest.mark.big
@pytest.mark.timeout(1200)
def test_compiled_says_what_eager_says_over_a_drive():
    model, counts = opus(), torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    made = built(model, "compiled", CAMERAS)
    assert counts["unique_graphs"] == before + 2, "each part once"
    equal_on_a_drive(model, made, drive(4, every=0.5))
    assert counts["unique_graphs"] == before + 2, "compiled again while driving"


@pytest.mark.big
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", ["aot", "compiled"])
@pytest.mark.parametrize("name", ["opus-nano", "opus-demo", "opus-v2-nano", "sparseocc4d-nano"])
def test_each_system_with_each_backend_says_what_eager_says(name, backend, tmp_path):
    model = load(name)
    made = built(model, backend, 6, cache=tmp_path / "engines")
    frames = drive(4, every=0.5, height=128, width=352, n=6)
    equal_on_a_drive(model, made, frames, within=1e-2 if "sparse" in name else 1e-3)


# ---- what cannot be had


def test_what_cannot_be_had_is_one_sentence(tmp_path, monkeypatch):
    model = opus()
    assert built(model) is model is built(model, "eager", 99)
    with pytest.raises(ValueError, match="backend must be one of eager, compiled, aot, tensorrt, got 'fast'"):
        built(model, "fast")
    with pytest.raises(ValueError, match="precision must be one of float32, bf16, fp16, got 'half'"):
        built(model, precision="half")
    with pytest.raises(ValueError, match="opus-fusion-nano .* eager alone, in float32"):
        built(load("opus-fusion-nano"), precision="bf16")
    with pytest.raises(ValueError, match="tensorrt needs an NVIDIA GPU, the model is on cpu"):
        built(model, "tensorrt")
    with pytest.raises(ValueError, match="opus-fusion-nano .* eager alone"):
        built(load("opus-fusion-nano"), "aot")
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="backend aot of opus-small on cpu: division by zero"):
        built(model, "aot", CAMERAS, cache=tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_tensorrt_is_asked_for_packages_and_compared_like_any_other(tmp_path, monkeypatch):
    """There is no GPU here: what stands in for torch_tensorrt keeps the program as it is."""
    asked = []

    def save(module, path, output_format, arg_inputs, retrace):
        assert output_format == "aot_inductor" and retrace and isinstance(module, nn.Module)
        asked.append(path.rsplit("/")[-1])

    compile_ = lambda program, arg_inputs: program.module()  # noqa: E731
    fake = types.SimpleNamespace(dynamo=types.SimpleNamespace(compile=compile_), save=save)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    parts = Parts.of(opus().system, CAMERAS)
    backends.build_tensorrt(parts, tmp_path)
    assert asked == ["encoder.pt2", "decoder.pt2"]
    with pytest.raises(Unfit, match="cannot be loaded"):
        backends.loaded(parts, tmp_path, "tensorrt")


# ---- the key


def test_every_part_of_what_an_engine_is_built_from_changes_its_key(monkeypatch):
    model = opus()
    facts = known(model, "aot", CAMERAS)
    assert key(facts) == key(known(opus(), "aot", CAMERAS)), "the same again"
    others = [
        known(opus(seed=1), "aot", CAMERAS),
        known(replace(model, name="another"), "aot", CAMERAS),
        known(replace(model, system=small.build(replace(small.BRIEF, threshold=0.6))), "aot", CAMERAS),
        known(replace(model, system=small.build(replace(small.BRIEF, height=96))), "aot", CAMERAS),
        known(model, "tensorrt", CAMERAS),
        known(model, "aot", 4),
        *(known(model, "aot", CAMERAS, precision) for precision in HALF),
    ]
    for name, value in (
        ("_device", lambda _: "another GPU"),
        ("_version", lambda package: "9.9" if package == "torch" else None),
        ("_version", lambda package: "9.9" if package == "tensorrt" else torch.__version__),
        ("_code", lambda: "mended"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(backends, name, value)
            others.append(known(model, "aot", CAMERAS))
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9000")
        others.append(known(model, "aot", CAMERAS))
    assert len({key(facts), *map(key, others)}) == 1 + len(others)


def test_one_weight_is_enough_to_be_another_engine():
    model = opus()
    before = known(model, "aot", CAMERAS)["weights"]
    with torch.no_grad():
        model.system.layers[0].norm1.bias[3] += 1e-6
    assert known(model, "aot", CAMERAS)["weights"] != before


def test_all_code_that_becomes_a_program_is_in_the_key(monkeypatch):
    """Each module of ours that backends import, below the floors of data and training."""
    code = (
        "import sys, occflow_core.runtime.backends, occflow_core.systems as s; s.SYSTEMS;"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'occflow_core' and m.__file__))"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    read, whole = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(str(path)) or whole(path))
    backends._code()
    empty = {str(Path(backends.__file__).parents[1] / "__init__.py")}
    assert len(told) > 30 and set(told) - set(read) <= empty


# ---- files


def test_an_export_that_is_not_equal_leaves_nothing(tmp_path, monkeypatch):
    from occflow_core.runtime import export as module

    def wrong(parts, folder):
        (folder / ("encoder" + ENGINE)).touch()

    monkeypatch.setattr(module, "build_aot", wrong)
    with pytest.raises(ValueError, match="cannot be loaded"):
        export(opus(), tmp_path / "out", "aot", CAMERAS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_export_is_what_was_built_with_a_manifest(engine, cache, tmp_path, monkeypatch):
    import json
    import shutil

    from occflow_core.runtime import export as module

    facts = known(opus(), "aot", CAMERAS)

    def copy(parts, folder):  # of the fixture's: one build is enough
        for part in parts.modules:
            shutil.copy(cache / key(facts) / (part + ENGINE), folder)

    monkeypatch.setattr(module, "build_aot", copy)
    said = export(opus(), tmp_path / "out", "aot", CAMERAS)
    assert "encoder and decoder over made-up drives" in said and "decoder.pt2" in said
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["facts"]["weights"] == facts["weights"] and set(manifest["files"]) == {"encoder.pt2", "decoder.pt2"}
