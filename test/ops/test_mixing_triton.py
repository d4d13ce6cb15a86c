"""The GPU's mixing equals the definition, values and gradients; without a GPU under Triton's interpreter."""

import re
from types import SimpleNamespace

import pytest
import torch
from ops.interpreter import atomics, compiled, interpreted, needs_gpu, needs_triton, parts, to

from occflow_core.ops import gpu, mix

pytestmark = pytest.mark.timeout(300)  # Pythons of their own, which import torch and Triton: slow on a busy machine


def world(b=1, q=2, g=2, p=5, c=3, given=7, kind=torch.float64, matrices=None) -> dict:
    rng = torch.Generator().manual_seed(p + c + given)
    numbers = [torch.randn(b, q, g, p, c, generator=rng, dtype=torch.float64)]
    numbers += [torch.randn(b, q, g * (c * c + given * p), generator=rng, dtype=torch.float64)]
    back = torch.randn(b, q, g, given, c, generator=rng, dtype=torch.float64)
    kinds = kind, matrices or kind
    return {"given": [n.to(k) for n, k in zip(numbers, kinds)], "points": given, "back": back, "auto": matrices}


def worlds() -> dict:
    """One has sizes at which blocks are full; in one all that was sampled is the same, so that norms divide by nearly
    nothing, and ReLUs sit at zero."""
    still = world(p=4, c=4, given=4)
    still["given"][0][:] = 1.0
    still["given"][1][:] = 0.5
    return {
        "odd": world(b=2),
        "full": world(q=1, p=16, c=16, given=32),
        "more than a block": world(q=1, g=1, p=18, c=20, given=36),
        "one of each": world(p=1, c=1, given=1),
        "all the same": still,
        "no queries": world(q=0),
        "float32": world(p=18, c=16, given=20, kind=torch.float32),
        "float16 under autocast": world(p=18, c=16, given=20, kind=torch.float32, matrices=torch.float16),
    }


WORLDS = worlds()
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2}


def answer(world):
    """What is mixed, and the gradients of what was sampled and of the matrices."""
    given = [t.detach().requires_grad_() for t in world["given"]]
    with torch.autocast(given[0].device.type, world["auto"], enabled=world["auto"] is not None):
        mixed = mix(*given, world["points"])
    mixed.backward(world["back"].to(mixed))
    return [mixed.detach(), *(t.grad for t in given)]


def compare(mine, theirs):
    """Within a bound that follows the least exact of the numbers."""
    least = min((t.dtype for t in theirs), key=lambda kind: -BOUNDS[kind])
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(
            a.double(), b.double(), atol=BOUNDS[least] * (1 + b.abs().max().item() if b.numel() else 1)
        )


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return interpreted(tmp_path_factory.mktemp("triton"), "mixing", WORLDS)


def defined(monkeypatch, world):
    home, _ = parts("mixing")
    with monkeypatch.context() as patch:
        patch.setattr(home, "_fast", lambda *tensors: None)
        return answer(world)


@needs_triton
@pytest.mark.parametrize("world", WORLDS)
def test_the_interpreted_kernels_equal_the_definition_and_its_gradients(monkeypatch, told, world):
    compare(told[world], defined(monkeypatch, WORLDS[world]))


@needs_triton
@needs_gpu
@pytest.mark.parametrize("world", ["float32", "float16 under autocast"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_on_a_gpu_the_kernels_equal_the_definition_and_its_gradients(monkeypatch, world, half):
    on_gpu = to("cuda", WORLDS[world])
    if on_gpu["auto"] is not None:
        on_gpu |= {"auto": half, "given": [on_gpu["given"][0], on_gpu["given"][1].to(half)]}
    home, kernels = parts("mixing")
    assert home._fast(*on_gpu["given"], on_gpu["points"]) is kernels
    mine = answer(on_gpu)
    theirs = defined(monkeypatch, on_gpu)
    assert [t.dtype for t in mine] == [t.dtype for t in theirs]
    if on_gpu["auto"] is None:
        compare(mine, theirs)
    else:  # on the whole: where halves round to the other side of a ReLU a number is another
        for a, b in zip(mine, theirs, strict=True):
            assert (a - b).abs().mean() < (0.05 if half is torch.bfloat16 else 0.01) * b.abs().mean()


@needs_triton
@pytest.mark.parametrize("numbers", ["fp32", "fp16"])
def test_the_largest_kernels_compile_for_a_gpu_fit_into_it_and_add_nothing_by_atomics(tmp_path, numbers):
    types = {"sampled of_sampled mixed gradient": "*fp32", "matrices of_matrices": f"*{numbers}"}
    sizes = {"TAKEN": 32, "GIVEN": 128, "C": 64, "BLOCK_TAKEN": 32, "BLOCK_GIVEN": 128, "BLOCK_C": 64}
    constants = sizes | {"EPS": 1e-5, "PRECISION": "ieee"}
    for ptx, shared in compiled("mixing", {"_mix": constants, "_mix_back": constants}, types, tmp_path, warps=8):
        assert shared <= 99 * 1024 and not atomics(ptx)
        assert not re.search(r"\b(max|min)\.(?!NaN)f(16|32|64)", ptx), "of a number and NaN these give the number"


@needs_triton
def test_the_kernels_are_chosen_for_what_they_can_hold_on_a_gpu_and_for_nothing_else(monkeypatch):
    monkeypatch.setattr(gpu, "_launches", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    home, kernels = parts("mixing")

    def chosen(p=32, c=64, given=32, kind=torch.float32, matrices=torch.float32, device="cuda"):
        sampled = SimpleNamespace(shape=(1, 600, 4, p, c), dtype=kind, device=torch.device(device))
        return home._fast(sampled, SimpleNamespace(dtype=matrices), given)

    assert {chosen(), chosen(given=128), chosen(p=60, given=60), chosen(matrices=torch.bfloat16)} == {kernels}
    assert {chosen(device="cpu"), chosen(c=128), chosen(p=64, given=128), chosen(p=65)} == {None}
    assert {chosen(kind=torch.float64, matrices=torch.float64), chosen(kind=torch.float16)} == {None}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chosen() is None
