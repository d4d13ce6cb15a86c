"""The GPU's means and maxima equal the definition, values and gradients; without a GPU under Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch
from ops.interpreter import atomics, compiled, interpreted, needs_gpu, needs_triton, parts, to

from occflow_core.ops import gpu, scatter_max, scatter_mean

pytestmark = pytest.mark.timeout(300)  # Pythons of their own, which import torch and Triton: slow on a busy machine


def world(rows=50, numbers=5, places=13, kind=torch.float64, whole=False) -> dict:
    """The last place stays empty. whole: small numbers, of which many are equal."""
    rng = torch.Generator().manual_seed(rows)
    given = torch.randn(rows, numbers, generator=rng, dtype=torch.float64)
    given = (given * 2).round() if whole else given
    place = torch.randint(max(1, places - 1), (rows,), generator=rng)
    back = torch.randn(places, numbers, generator=rng, dtype=torch.float64)
    return {"rows": given.to(kind), "place": place, "places": places, "back": back}


WORLDS = {
    "float64": world(),
    "float32": world(kind=torch.float32),
    "many equal": world(kind=torch.float32, whole=True),
    "half": world(kind=torch.float16),
    "all in one place": world(places=2),
    "wide rows": world(rows=7, numbers=130, places=3),
    "integers": world(kind=torch.int32, whole=True),
    "long integers": world(kind=torch.int64, whole=True),
    "no rows": world(rows=0),
    "no places": world(rows=0, places=0),
}
WORLDS["no numbers among them"] = world()
WORLDS["no numbers among them"]["rows"][::7] = float("nan")
EXACT = "float64", "float32", "many equal", "all in one place", "wide rows", "integers", "long integers"


def answer(world):
    """Maxima and means with the gradients of the rows; of integers maxima alone."""
    told = []
    for scatter in (scatter_max, scatter_mean):
        rows = world["rows"].detach()
        if rows.is_floating_point():
            rows = rows.requires_grad_()
            out = scatter(rows, world["place"], world["places"])
            out.backward(world["back"].to(out))
            told += [out.detach(), rows.grad.nan_to_num()]
            rows.grad = None
        elif scatter is scatter_max:
            told.append(scatter(rows, world["place"], world["places"]))
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return interpreted(tmp_path_factory.mktemp("triton"), "scatter", WORLDS, _NUMBERS=64)


def defined(monkeypatch, world):
    home, _ = parts("scatter")
    with monkeypatch.context() as patch:
        patch.setattr(home, "_fast", lambda rows: None)
        return answer(world)


@needs_triton
@pytest.mark.parametrize("world", WORLDS)
def test_the_interpreted_kernels_equal_the_definition_and_its_gradients(monkeypatch, told, world):
    """To the last bit, but for sums of halves, which the definition rounds each time."""
    bound = 0.0 if world in EXACT else 1e-2 if world == "half" else 1e-12
    for mine, theirs in zip(told[world], defined(monkeypatch, WORLDS[world]), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.allclose(mine, theirs, rtol=0, atol=bound, equal_nan=True)


@needs_triton
@needs_gpu
@pytest.mark.parametrize("world", WORLDS)
def test_on_a_gpu_the_kernels_equal_the_definition_and_its_gradients(monkeypatch, world):
    on_gpu = to("cuda", WORLDS[world])
    first, again = answer(on_gpu), answer(on_gpu)
    for mine, same, theirs in zip(first, again, defined(monkeypatch, on_gpu), strict=True):
        assert torch.equal(mine.nan_to_num(), same.nan_to_num()), "differs from run to run"
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-2 if world == "half" else 1e-6, equal_nan=True)


@needs_triton
def test_the_kernels_compile_for_a_gpu_and_add_nothing_by_atomics(tmp_path):
    types = {"rows told gradient of_rows": "*fp32", "order begin place": "*i64", "shared": "*i32"}
    kernels = {
        f"{kernel} {how}": {"MAX": how == "max", "BLOCK": 16, "WIDTH": 64}
        for kernel in ("_gather", "_spread")
        for how in ("max", "mean")
    }
    for ptx, _ in compiled("scatter", kernels, types | {"places number count": "i32"}, tmp_path):
        assert not atomics(ptx)


@needs_triton
def test_the_kernels_are_chosen_for_gpus_and_for_nothing_else(monkeypatch):
    monkeypatch.setattr(gpu, "_launches", lambda _: True)
    home, kernels = parts("scatter")
    chosen = [home._fast(SimpleNamespace(device=torch.device(kind))) for kind in ("cuda", "cpu", "meta")]
    assert chosen == [kernels, None, None]
