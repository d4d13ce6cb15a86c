"""The CPU's compiled sampling equals the definition, and runs only where nobody asks for gradients or looks inside."""

import importlib
from dataclasses import replace

import pytest
import torch
from ops.test_sample_triton import PICTURE, WORLDS, compare
from systems import small
from systems.rig import drive
from torch.utils.flop_counter import FlopCounterMode

from occflow_core.ops import sample
from occflow_core.runtime import Model, Stream

pytest.importorskip("numba", reason="needs numba")
home = importlib.import_module("occflow_core.ops.sample")  # the package has a function of that name
kernels = importlib.import_module("occflow_core.ops.sample_numba")
INPUTS = ("rows", "sizes", "matrix", "used", "points", "weights", "published")


def look(world):
    rows, sizes, matrix, used, points, weights, published = (world[name] for name in INPUTS)
    return sample(rows, sizes, PICTURE, matrix, used, points, weights, published)


def defined(monkeypatch, world):
    with monkeypatch.context() as patch:
        patch.setattr(home, "_numba", lambda: None)
        return look(world)


@pytest.mark.parametrize("world", WORLDS)
def test_the_compiled_loop_equals_the_definition(monkeypatch, world):
    with torch.no_grad():
        compare([look(WORLDS[world])], [defined(monkeypatch, WORLDS[world])], single=2e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(monkeypatch, threads):
    world = WORLDS["float32, ours"]
    whole = look(world)
    monkeypatch.setattr(kernels, "_FEW", 7)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(look(world), whole)
    finally:
        torch.set_num_threads(before)


def test_tensors_that_lie_in_memory_in_another_order_are_read_right():
    world = dict(WORLDS["float32, published"])
    whole = look(world)
    for name in ("points", "weights", "matrix"):
        world[name] = world[name].transpose(1, 2).contiguous().transpose(1, 2)
    world["rows"] = [[row.mT.contiguous().mT for row in lane] for lane in world["rows"]]
    assert torch.equal(look(world), whole)


@pytest.mark.parametrize("rules", ["ours", "published"])
def test_a_feature_that_is_not_finite_reaches_every_point_that_a_camera_sees_there(monkeypatch, rules):
    """As in the definition; of what no camera sees the definition says NaN too, the loop zero."""
    world = dict(WORLDS[f"float32, {rules}"])
    ones = {"rows": [[torch.ones_like(r) for r in lane] for lane in world["rows"]], "weights": world["weights"] * 0 + 1}
    seen = defined(monkeypatch, world | ones) != 0
    world["rows"] = [
        [row.clone().index_fill_(1, torch.tensor([0]), torch.nan) for row in lane] for lane in world["rows"]
    ]
    mine, expected = look(world), defined(monkeypatch, world)
    assert expected[seen].isnan().any() and not expected[seen].isnan().all()
    assert torch.allclose(mine[seen], expected[seen], atol=2e-6, equal_nan=True)
    unseen = expected if rules == "published" else torch.zeros_like(mine)  # the authors let it look past the border
    assert torch.equal(mine[~seen].nan_to_num(9.0), unseen[~seen].nan_to_num(9.0))


def test_what_could_have_gradients_is_read_where_nobody_asks_for_them():
    world = dict(WORLDS["float32, ours"])
    whole = look(world)
    for name in ("points", "weights"):
        world[name] = torch.nn.Parameter(world[name].clone())
    world["rows"] = [[torch.nn.Parameter(row.clone()) for row in lane] for lane in world["rows"]]
    with torch.no_grad():
        assert torch.equal(look(world), whole)


def test_it_is_chosen_where_nobody_asks_for_gradients_or_looks_inside(monkeypatch):
    world, asked = WORLDS["float32, ours"], []
    monkeypatch.setattr(kernels, "sample", lambda *given: asked.append(1) or torch.zeros(()))
    look(world)
    with torch.inference_mode():
        look(world)
    moving = world | {"points": world["points"].clone().requires_grad_()}
    with torch.no_grad():
        look(moving)
    assert len(asked) == 3
    assert look(moving).requires_grad
    with FlopCounterMode(display=False):  # sees no operation of a compiled loop
        look(world)
    look(
        {k: [[row.half() for row in lane] for lane in v] if k == "rows" else v for k, v in world.items()}
        | halves(world)
    )
    assert len(asked) == 3


def halves(world):
    return {name: world[name].half() for name in ("matrix", "points", "weights")}


def test_a_stream_says_the_same_by_either(monkeypatch):
    model = Model(small.build(replace(small.BRIEF, threshold=0.3)), "opus-small", False, "fast", None)
    fast, slow = Stream(model), Stream(model)
    for frame in drive(3, every=0.5):
        mine = fast.step(frame)
        with monkeypatch.context() as patch:
            patch.setattr(home, "_numba", lambda: None)
            theirs = slow.step(frame)
        assert (mine.labels != mine.classes.free).sum() > 20
        assert torch.equal(mine.labels, theirs.labels)
        assert torch.allclose(mine.score, theirs.score, atol=1e-4)
