"""The GPU's walk equals the definition on every ray; on machines without a GPU under Triton's interpreter."""

import math
from types import SimpleNamespace

import pytest
import torch
from ops.interpreter import compiled, needs_gpu, needs_triton
from ops.interpreter import interpreted as run_interpreted

from occflow_core.ops import cast, gpu, raycast, swept

ROOT_HALF = math.sqrt(0.5)
STRAIGHT, DIAGONAL, SPACE = (1.5, 0.5, 0.5), (1.5, 1.5, 0.5), (1.5, 1.5, 1.5)
WORKED = [  # occupied, origin, end -> distance, voxel, in a grid of 4 x 3 x 2
    ((2, 0, 0), (0.5, 0.5, 0.5), STRAIGHT, 2.5, (2, 0, 0)),
    (None, (0.5, 0.5, 0.5), DIAGONAL, 5 * ROOT_HALF, (2, 2, 0)),
    ((0, 1, 0), (0.5, 0.5, 0.5), DIAGONAL, ROOT_HALF, (0, 1, 0)),  # the tie goes through y
    ((1, 0, 0), (0.5, 0.5, 0.5), DIAGONAL, 5 * ROOT_HALF, (2, 2, 0)),  # and not through x
    (None, (0.5, 0.5, 0.5), SPACE, 1.5 * math.sqrt(3), (1, 1, 1)),
    ((0, 0, 0), (0.5, 0.5, 0.5), STRAIGHT, 0.5, (0, 0, 0)),
    (None, (2.5, 0.5, 0.5), (1.5, 0.5, 0.5), 2.5, (0, 0, 0)),
    (None, (2.5, 0.5, 0.5), (-7.5, 0.5, 0.5), 2.5, (0, 0, 0)),
    ((0, 0, 0), (-2.5, 0.5, 0.5), (-1.5, 0.5, 0.5), 3.5, (0, 0, 0)),
    ((0, 0, 0), (0.5, -3.5, 0.5), (1.5, -3.5, 0.5), -1.0, (0, 0, 0)),  # never inside
    ((0, 0, 0), (0.5, -0.4, 0.5), (1.5, -0.4, 0.5), 0.5, (0, 0, 0)),  # cut toward zero
]


def worlds() -> dict[str, tuple]:
    """Name -> (filled, origins, directions)."""
    rng = torch.Generator().manual_seed(1)
    shape = (11, 7, 5)
    size = torch.tensor(shape)
    origins = (torch.rand(600, 3, generator=rng, dtype=torch.float64) * 1.6 - 0.3) * size  # inside and outside
    anywhere = torch.randn(600, 3, generator=rng, dtype=torch.float64)
    # along axes and diagonals, from corners, edges and middles of voxels: borders that are reached at once
    ties = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * 3)
    ties = ties[ties.abs().sum(1) > 0].repeat(20, 1)
    halves = (origins[: len(ties)] * 2).round() / 2
    sparse, dense = (torch.rand(shape, generator=rng) < density for density in (0.08, 0.3))
    empty = torch.zeros(shape, dtype=torch.bool)
    # up to one voxel below the grid counts as inside: every voxel of the first layers is hit there
    below = torch.rand(300, 3, generator=rng, dtype=torch.float64) * 2 - 1.4
    corridor = torch.zeros(4, 1, 1, dtype=torch.bool)
    corridor[0] = True
    far = [[-1000.5, 0.5, 0.5], [-1001.5, 0.5, 0.5], [1e300, 0.5, 0.5], [-1e18, 0.5, 0.5], [1.5, -0.4, 0.5]]
    flat = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [-1.0, 1e-300, 0.0], [1.0, 0.0, 0.0], [-1.0, 1e-16, -1e-9]]
    return {
        "sparse": (sparse, origins, anywhere),
        "dense": (dense, origins, anywhere),
        "empty": (empty, origins, anywhere),
        "ties": (sparse, halves, ties),
        "ties in an empty grid": (empty, halves, ties),
        "origins below the grid": (dense, below, anywhere[:300]),
        "slices of other tensors": (dense.transpose(0, 2), origins.flip(1)[::9], anywhere[::9]),
        "very far": (corridor, torch.tensor(far, dtype=torch.float64), torch.tensor(flat, dtype=torch.float64)),
        "no rays": (sparse, origins[:0], anywhere[:0]),
        **{f"worked {i}": worked(*row[:3]) for i, row in enumerate(WORKED)},
    }


def worked(occupied, origin, end):
    filled = torch.zeros(4, 3, 2, dtype=torch.bool)
    if occupied:
        filled[occupied] = True
    origin, end = torch.tensor([origin], dtype=torch.float64), torch.tensor([end], dtype=torch.float64)
    return filled, origin, end - origin


WORLDS = worlds()
pytestmark = pytest.mark.timeout(300)  # Pythons of their own, which import torch and Triton: slow on a busy machine


def answer(world):
    """Of the worlds of few rays only where these end: one of them walks a thousand steps, slow in the interpreter."""
    return *cast(*world), *([] if 0 < len(world[1]) < 10 else [swept(*world)])


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What the kernel makes of all worlds, in blocks of 512: the interpreter costs by program, not by ray."""
    return run_interpreted(tmp_path_factory.mktemp("triton"), "raycast", WORLDS, _BLOCK=512)


def define(monkeypatch, world):
    with monkeypatch.context() as patch:
        patch.setattr(raycast, "_fast", lambda filled: None)
        return answer(world)


@needs_triton
@pytest.mark.parametrize("world", WORLDS)
def test_the_interpreted_kernel_equals_the_definition_on_every_ray(monkeypatch, interpreted, world):
    assert all(map(torch.equal, interpreted[world], define(monkeypatch, WORLDS[world])))


@needs_triton
@pytest.mark.parametrize("row", range(len(WORKED)))
def test_the_interpreted_kernel_gives_the_worked_rays_of_the_published_tracer(interpreted, row):
    *_, distance, voxel = WORKED[row]
    got, index = interpreted[f"worked {row}"]
    assert got.item() == pytest.approx(distance, abs=1e-12) and tuple(index[0].tolist()) == voxel


def test_the_worlds_have_rays_of_every_kind(monkeypatch):
    """Else the comparisons above would say little."""
    filled, *_ = WORLDS["sparse"]
    distance, index, _ = define(monkeypatch, WORLDS["sparse"])
    never, stopped = distance == -1, filled[tuple(index.unbind(1))] & (distance != -1)
    assert never.sum() > 50 and stopped.sum() > 50 and (~never & ~stopped).sum() > 50
    distance, *_ = define(monkeypatch, WORLDS["very far"])
    assert (distance[:2] > 0).tolist() == [True, False], "step 1001 is the first inside, or is not"


@needs_triton
def test_the_kernel_compiles_for_a_gpu_and_rounds_as_the_definition_does(tmp_path):
    """Down to the machine code of a GPU that need not be there; a fused product and sum would round once, not twice."""
    types = {"voxel step index": "*i64", "border across distance": "*fp64", "filled crossed": "*u8"}
    kernels = {f"_cast {way}": {"SWEPT": way == "swept", "STEPS": 1001, "BLOCK": 32} for way in ("cast", "swept")}
    for ptx, _ in compiled("raycast", kernels, types | {"rays nx ny nz": "i32"}, tmp_path, warps=1):
        assert "add.f64" in ptx or "add.rn.f64" in ptx, "distances are no longer added in float64"
        assert not {word for word in ptx.split() if word.startswith(("fma.", "mul.f", "mul.rn.f", "div."))}


@needs_triton
@needs_gpu
@pytest.mark.parametrize("world", WORLDS)
def test_on_a_gpu_the_kernel_equals_the_definition_on_every_ray(monkeypatch, world):
    on_gpu = [tensor.cuda() for tensor in WORLDS[world]]
    assert all(map(torch.equal, answer(on_gpu), define(monkeypatch, on_gpu)))


@needs_triton
def test_the_kernel_is_chosen_for_gpus_and_for_nothing_else(monkeypatch):
    monkeypatch.setattr(gpu, "_launches", lambda _: True)
    chosen = {kind: raycast._fast(SimpleNamespace(device=torch.device(kind))) for kind in ("cuda", "cpu", "meta")}
    assert chosen["cuda"].__name__ == "occflow_core.ops.raycast_triton"
    assert chosen["cpu"] is not chosen["cuda"] and chosen["meta"] is None
