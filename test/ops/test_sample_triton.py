"""The GPU's sampling equals the definition, values and gradients; without a GPU under Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch
from ops.interpreter import atomics, compiled, interpreted, needs_gpu, needs_triton, parts, to
from systems.rig import ring

from occflow_core.ops import flatten_levels, gpu, sample

pytestmark = pytest.mark.timeout(300)  # Pythons of their own, which import torch and Triton: slow on a busy machine
PICTURE = (32, 64)
SIZES = ((8, 16), (4, 8))


def around(b=1, t=2, n=3, g=2, c=3, q=5, s=2, sizes=SIZES, kind=torch.float64) -> dict:
    """All random, the points around the car."""
    rng = torch.Generator().manual_seed(b + t + n + g + q)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    rows, _ = flatten_levels([normal(b, t, n, g * c, *size) for size in sizes])
    matrix = ring(n, *PICTURE).pixels_from_car().double().expand(b, t, n, 3, 4).clone()
    matrix[..., 3] += normal(b, t, n, 3)  # every time and lane has its own
    points = (torch.rand(b, q, g, s, 3, generator=rng, dtype=torch.float64) - 0.5) * torch.tensor([20.0, 20.0, 6.0])
    return {
        "rows": [[row.to(kind) for row in lane] for lane in rows],
        "sizes": sizes,
        "matrix": matrix.to(kind),
        "used": torch.ones(b, t, n, dtype=torch.bool),
        "points": points.to(kind),
        "weights": normal(b, q, g, s, len(sizes)).to(kind),
        "back": normal(b, q, g, t * s, c).to(kind),
        "still": [],  # places in rows of those that have no gradient
    }


def borders(kind) -> dict:
    """Cameras with a pixel a metre at a depth of one, one looking ahead, one beside it whose picture overlaps with the
    first's, one looking back: points on borders and corners of pictures and cells and in the middle of cells, at the
    least depth and behind. All numbers are exact."""
    world = around(t=1, n=3, g=1, c=2, q=1, s=1, kind=kind)
    ahead = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], dtype=kind)
    beside = torch.tensor([[1.0, 0, 16, 0], [0, 1, 0, 0], [0, 0, 1, 0]], dtype=kind)
    back = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 0]], dtype=kind)
    x = torch.tensor([-1.0, 0, 0.5, 2, 4, 6, 31, 32, 62, 63.5, 64, 65], dtype=kind)
    y = torch.tensor([0.0, 1, 2, 4, 15, 16, 31.5, 32], dtype=kind)
    z = torch.tensor([1.0, 2, -1, 0, 2**-20], dtype=kind)
    # nearer than the least depth, where one at the least depth would be in the picture
    near = torch.tensor([[2**-18, 2**-19, 2**-20], [2**-15, 2**-16, 0], [2**-14, 2**-15, -(2**-20)]], dtype=kind)
    points = torch.cat([torch.cartesian_prod(x, y, z), near])
    rng = torch.Generator().manual_seed(0)
    total = sum(h * w for h, w in SIZES)
    world |= {
        "rows": [[torch.randint(-4, 5, (3, total, 2), generator=rng).to(kind)]],
        "matrix": torch.stack([ahead, beside, back])[None, None],
        "points": points.view(1, -1, 1, 1, 3),
        "weights": torch.randint(0, 3, (1, len(points), 1, 1, 2), generator=rng).to(kind) / 2,
        "back": torch.randint(-2, 3, (1, len(points), 1, 1, 2), generator=rng).to(kind),
    }
    return world


def worlds() -> dict:
    unused = around(b=2)
    unused["used"][:, 1, 0] = False
    unused["used"][1, :, 2] = False
    blind = around()
    blind["used"][:] = False
    memory = around(t=3)
    memory["rows"][0][2] = memory["rows"][0][1]  # a drive begins: the oldest instant stands for older ones
    memory["still"] = [(0, 1), (0, 2)]
    lost = around(kind=torch.float32)
    lost["points"][0, 0] = torch.tensor([1e30, -1e30, 1e30])
    lost["points"][0, 1] = torch.inf
    lost["points"][0, 2] = torch.nan
    every = {
        "unused cameras": unused,
        "no camera is used": blind,
        "one camera, one time, one level": around(t=1, n=1, g=1, s=1, sizes=SIZES[:1]),
        "more times than groups": around(t=3, g=2, q=2, s=1),
        "more groups than times": around(t=1, g=3, q=3, c=1),
        "no points": around(q=0),
        "a memory": memory,
        "float32": around(q=30, t=1, kind=torch.float32),
        "borders": borders(torch.float32),
        "points that are nowhere": lost,
    }
    return {
        f"{name}, {rules}": world | {"published": rules == "published"}
        for name, world in every.items()
        for rules in ("published", "ours")
    }


WORLDS = worlds()


def answer(world):
    """What is sampled, and the gradients of points, weights and rows."""
    used = {(i, j): row.detach() for i, lane in enumerate(world["rows"]) for j, row in enumerate(lane)}
    for at, row in used.items():
        row.requires_grad_(at not in world["still"])
    rows = [[used[i, j] for j in range(len(lane))] for i, lane in enumerate(world["rows"])]
    points, weights = (world[name].detach().requires_grad_() for name in ("points", "weights"))
    sampled = sample(rows, world["sizes"], PICTURE, world["matrix"], world["used"], points, weights, world["published"])
    if not points.isfinite().all():  # then those of rows are not, and say nothing
        return [sampled.detach()]
    sampled.backward(world["back"])
    of_rows = [row.grad for row in used.values() if row.grad is not None]
    return [sampled.detach(), points.grad, weights.grad, *of_rows]


def compare(mine, theirs, single=1e-5):
    """Within 1e-12 of the largest number in float64, in float32 within `single`."""
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        bound = 1e-12 if b.dtype == torch.float64 else single
        largest = b.nan_to_num(0, 0, 0).abs().max().item() if b.numel() else 0
        assert torch.allclose(a, b, rtol=0, atol=bound * (1 + largest), equal_nan=True)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return interpreted(tmp_path_factory.mktemp("triton"), "sample", WORLDS, _NUMBERS=256)


def defined(monkeypatch, world):
    home, _ = parts("sample")
    with monkeypatch.context() as patch:
        patch.setattr(home, "_fast", lambda *tensors: None)
        return answer(world)


@needs_triton
@pytest.mark.parametrize("world", WORLDS)
def test_the_interpreted_kernels_equal_the_definition_and_its_gradients(monkeypatch, told, world):
    compare(told[world], defined(monkeypatch, WORLDS[world]))


@pytest.mark.parametrize("rules", ["published", "ours"])
def test_the_worlds_have_points_of_every_kind(monkeypatch, rules):
    """Else the comparisons above would say little."""
    for name in ("unused cameras", "float32", "borders"):
        sampled, of_points, of_weights, *of_rows = defined(monkeypatch, WORLDS[f"{name}, {rules}"])
        seen = sampled.abs().sum(-1) > 0
        assert seen.any() and not seen.all()
        assert all(gradient.abs().sum() > 0 for gradient in (of_points, of_weights, *of_rows))


@needs_triton
@needs_gpu
@pytest.mark.parametrize("world", WORLDS)
def test_on_a_gpu_the_kernels_equal_the_definition_and_its_gradients(monkeypatch, world):
    on_gpu = to("cuda", WORLDS[world])
    compare(
        answer(on_gpu), defined(monkeypatch, on_gpu), single=1e-4
    )  # its divisions by a picture's size are not exact


@needs_triton
def test_the_kernels_compile_for_a_gpu_and_only_gradients_of_rows_are_added_by_atomics(tmp_path):
    names = "rows pixels points weights sampled gradient of_rows of_points of_weights"
    sizes = "lane time times cameras queries groups samples channels total height width"
    types = {names: "*fp32", "used": "*u8", sizes: "i32"}
    constants = {"SIZES": (64, 176, 32, 88, 16, 44, 8, 22), "PUBLISHED": True, "EPS": 1e-5}
    constants |= {"BLOCK": 8, "CHANNELS": 64}
    back = {f"_look_back {rows}": constants | {"ROWS": rows} for rows in (True, False)}
    (ptx, _), (adds, _), (does_not, _) = compiled("sample", {"_look": constants} | back, types, tmp_path)
    assert "div.rn.f32" in ptx and "div.full" not in ptx and not atomics(ptx)
    assert set(atomics(adds)) == {"atom.global.gpu.relaxed.add.f32"} and not atomics(does_not)


@needs_triton
def test_the_kernels_are_chosen_for_one_kind_of_numbers_on_a_gpu_and_for_nothing_else(monkeypatch):
    monkeypatch.setattr(gpu, "_launches", lambda _: True)
    home, kernels = parts("sample")

    def chosen(device="cuda", rows=torch.float32, others=torch.float32, moves=False):
        row, other = SimpleNamespace(dtype=rows), SimpleNamespace(dtype=others, device=torch.device(device))
        return home._fast([[row]], SimpleNamespace(dtype=others, requires_grad=moves), other, other)

    assert {chosen(), chosen(rows=torch.float64, others=torch.float64)} == {kernels}
    assert {chosen("meta"), chosen(rows=torch.float16), chosen(moves=True)} == {None}
    assert chosen(rows=torch.float16, others=torch.float16) is None
