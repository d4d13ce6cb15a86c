"""SparseOcc and SparseOcc4D: which voxels are kept, where masks are looked at, what both cost and what they become."""

import math
from dataclasses import replace

import pytest
import torch
from systems import small_sparse
from systems.rig import drive

from occflow_core.geometry import OCC3D_GRID, Grid
from occflow_core.nn import losses
from occflow_core.nn.points import HIDDEN
from occflow_core.systems import sparseocc
from occflow_core.systems.base import seeded
from occflow_core.systems.sparseocc import Kept, SparseOcc, SparseOcc4D
from occflow_core.types import OCC3D, OPENOCC, Clip, Occupancy

BASE = small_sparse.CONFIG
GRID = BASE.grid
NEWER = replace(BASE, generation="v1.1", iterations=2)
BOTH = pytest.mark.parametrize("config", [BASE, NEWER], ids=["v1.0", "v1.1"])
CAR, ROAD, WALL = (OPENOCC.id(name) for name in ("car", "driveable_surface", "manmade"))


def build(config=BASE, seed=0) -> SparseOcc4D:
    return seeded(SparseOcc4D(config), seed).eval()


def clip(frames=2) -> Clip:
    return Clip.of(drive(frames, every=0.5)[::-1])


def truth(config=BASE, seed=0) -> Occupancy:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, *config.grid.shape)
    labels = torch.randint(0, config.table.free, shape, generator=generator).to(torch.uint8)
    labels[torch.rand(shape, generator=generator) < 0.8] = config.table.free
    flow = torch.randn(*shape, 2, generator=generator)
    return Occupancy(config.grid, config.table, labels, flow, torch.rand(shape, generator=generator) < 0.7)


# ---- voxels


@BOTH
@torch.no_grad()
def test_of_all_children_the_likeliest_are_kept_each_once_and_inside(config):
    net, told = build(config), []
    for scale in net.scales:
        head = scale.name if scale.filled is None else scale.filled
        head.register_forward_hook(lambda module, taken, given: told.append(given))
    output, _ = net(clip(), None)
    scores = [t[0, :, 0] if t.shape[-1] == 1 else 1 - t[0].softmax(-1)[:, -1] for t in told]
    for kept, score, number, edge in zip(output.kept, scores, config.kept, (4, 2, 1), strict=True):
        where = kept.where[0][kept.inside[0]]
        assert kept.edge == edge and kept.where.shape == (1, number, 3)
        assert len(where.unique(dim=0)) == len(where) and len(score) >= number
        assert (where * edge < torch.tensor(GRID.shape)).all() and (where >= 0).all()
    # the last scale's children, told by the voxels kept before: none that is left out scores more than one that is kept
    before, last = output.kept[1], output.kept[2]
    children = (before.where[0][:, None] * 2 + sparseocc.CHILDREN).flatten(0, 1)
    inside = (children < torch.tensor(GRID.shape)).all(-1)
    mine = {tuple(w) for w in last.where[0].tolist()}
    is_kept = torch.tensor([tuple(c) in mine for c in children.tolist()])
    assert is_kept.sum() == config.kept[2] and scores[2][is_kept].min() >= scores[2][~is_kept & inside].max()


@torch.no_grad()
def test_on_the_grid_of_occ3d_all_numbers_are_the_published_ones():
    net = build(replace(BASE, grid=OCC3D_GRID, kept=(2000, 8000, 32000)))
    output, _ = net(clip(), None)
    assert [kept.where.shape[1] for kept in output.kept] == [2000, 8000, 32000]
    for kept, most in zip(output.kept, ([49, 49, 3], [99, 99, 7], [199, 199, 15]), strict=True):
        assert (kept.where >= 0).all() and (kept.where <= torch.tensor(most)).all()
    assert all(kept.inside.all() for kept in output.kept)
    assert [len(output.masks), len(output.names)] == [5, 5] and output.masks[-1].shape == (1, 12, 32000)


def test_children_come_in_the_published_order():
    told = (torch.tensor([8, 16, 0]) + 4 * sparseocc.CHILDREN).tolist()
    assert told == [
        [8, 16, 0], [12, 16, 0], [8, 20, 0], [8, 16, 4], [12, 20, 0], [12, 16, 4], [8, 20, 4], [12, 20, 4],
    ]  # fmt: skip


@torch.no_grad()
def test_a_voxel_looks_around_its_middle_in_steps_of_its_edge(monkeypatch):
    """The voxel (8, 16, 8) of edge 8 on Occ3D's grid; offsets 0 and (0.5, -0.5, 0.25)."""
    scale, seen = build(replace(BASE, grid=OCC3D_GRID, groups=1, samples=4)).scales[0], {}
    scale.sampling.offset.bias[:6] = torch.tensor([0, 0, 0, 0.5, -0.5, 0.25])
    scale.sampling.offset.weight.zero_()
    monkeypatch.setattr(scale.position, "forward", lambda unit: seen.update(unit=unit) or torch.zeros(1, 1, 32))

    class Looked:
        def sample(self, points, weights, as_published):
            seen["points"] = points
            return torch.zeros(1, 1, 1, 2 * 4, 32)

    scale(torch.zeros(1, 1, 32), torch.tensor([[[8, 16, 8]]]), 8, Looked())
    assert torch.allclose(seen["unit"], torch.tensor([0.04, 0.08, 0.5]))
    expected = torch.tensor([[-35.2, -32.0, 3.8], [-33.6, -33.6, 4.6]])
    assert torch.allclose(seen["points"][0, 0, 0, :2], expected, atol=1e-5)


def test_a_scale_does_not_teach_those_before_it():
    net = build()
    output, _ = net(clip(), None)
    terms = net.loss(output, truth())
    assert {f"flow {i}" for i in range(3)} | {f"filled {i}" for i in range(3)} <= terms.keys()
    terms["flow 2"].backward(retain_graph=True)
    assert all(p.grad is None for scale in net.scales[:2] for p in scale.parameters())
    assert net.scales[2].flow[0].weight.grad.any()
    terms["masks 4"].backward()  # masks are made of the last scale's features
    assert net.scales[2].lift.weight.grad.any() and net.scales[1].lift.weight.grad is None


@pytest.mark.parametrize("scales", range(4))
def test_the_last_scales_tell_flow_and_are_told_of_it(scales):
    net = build(replace(BASE, flow=scales))
    output, _ = net(clip(), None)
    assert [kept.flow is not None for kept in output.kept] == [i >= 3 - scales for i in range(3)]
    assert sum(name.startswith("flow") for name in net.loss(output, truth())) == scales
    assert (net.decode(output)[0].flow is None) == (scales == 0)


# ---- where masks are looked at


def masks_of(places, published, queries=3, samples=2, iterations=1):
    config = replace(
        BASE, grid=OCC3D_GRID, queries=queries, groups=1, samples=4, iterations=iterations, as_published=published
    )
    masks = build(config).masks
    masks.draws, masks.anywhere = masks.draws[..., :samples], masks.anywhere[..., :samples, :]
    where = torch.tensor(places)[None]
    inside = torch.ones(1, len(places), dtype=torch.bool)
    return masks, Kept(1, where, inside, None, torch.zeros(1, len(places), 17), None)


VOXELS = [(0, 0, 0), (10, 20, 3), (1, 1, 1), (50, 60, 7), (100, 100, 8)]
COVERS = torch.tensor([[-1.0, 1, -1, 1, -1], [-1] * 5, [-1, -1, -1, -1, 1]])[None]


def test_the_published_draws_take_voxels_by_their_corners():
    """Numbers: `make_sample_points_from_mask` of the authors, run once with torch.manual_seed(0)."""
    masks, kept = masks_of(VOXELS, published=True)
    torch.manual_seed(0)
    masks.draws, drawn = torch.rand(1, 3, 2), torch.rand(1, 2, 3)
    masks.anywhere[0, 1] = drawn[0]
    places = masks._places(COVERS, kept, 0)[0]
    assert torch.allclose(places[0], torch.tensor([[-36, -32, 0.2], [-20, -16, 1.8]]), atol=1e-4)
    expected = torch.tensor([[-0.7925, 31.7156, 1.9160], [10.5845, -12.0885, 1.5710]])
    assert torch.allclose(places[1], expected, atol=2e-4)
    assert torch.allclose(places[2], torch.tensor([[0, 0, 2.2]] * 2), atol=1e-4)
    # no query covers anything: all look into the first voxel
    lost = masks._places(-torch.ones(1, 3, 5), kept, 0)[0]
    assert torch.allclose(lost, masks.anywhere[0] * 0.4 + torch.tensor([-40, -40, -1.0]), atol=1e-4)


def test_ours_take_their_middles_and_no_other_and_anywhere_is_everywhere():
    masks, kept = masks_of(VOXELS, published=False, samples=4)
    places = masks._places(COVERS, kept, 0)[0]
    index, inside = OCC3D_GRID.index(places)
    assert inside.all()
    middles = (index + 0.5) * 0.4 + torch.tensor([-40, -40, -1.0])
    assert torch.allclose(places[[0, 2]], middles[[0, 2]], atol=1e-4)
    assert {tuple(i) for i in index[0].tolist()} == {VOXELS[1], VOXELS[3]}  # of four even draws both voxels get two
    assert {tuple(i) for i in index[2].tolist()} == {VOXELS[4]}
    lost = masks._places(-torch.ones(1, 3, 5), kept, 0)[0]
    assert (lost.amax((0, 1)) - lost.amin((0, 1)) > 0.4 * torch.tensor(OCC3D_GRID.size)).all()
    outside = replace(kept, inside=torch.tensor([[True, False, True, True, True]]))
    index, _ = OCC3D_GRID.index(masks._places(COVERS, outside, 0)[0])
    assert {tuple(i) for i in index[0].tolist()} == {VOXELS[3]}


def test_in_half_precision_places_are_as_exact():
    masks, kept = masks_of(VOXELS, published=False, samples=4)
    assert torch.equal(masks._places(COVERS.bfloat16(), kept, 0), masks._places(COVERS, kept, 0))


def test_the_tables_are_spread_evenly_and_never_reach_one():
    draws, anywhere = sparseocc.tables(4, 100, 16)
    assert draws.shape == (4, 100, 16) and anywhere.shape == (4, 100, 16, 3)
    assert min(draws.min(), anywhere.min()) >= 0 and max(draws.max(), anywhere.max()) < 1
    assert ((draws * 16).floor() == torch.arange(16)).all()  # every sixteenth of a mask once
    assert len(draws[..., 0].unique()) == 400  # each query and iteration elsewhere
    eighths = (anywhere.flatten(0, 2) * 2).long() @ torch.tensor([4, 2, 1])
    assert (eighths.bincount() - 800).abs().max() < 40


def test_a_number_just_below_one_is_the_last_voxel_of_a_large_mask():
    masks, kept = masks_of([(i % 200, i // 200, 0) for i in range(20000)], published=True, queries=1)
    masks.draws = torch.tensor([[[0.0, 1 - 2**-24]]])
    places = masks._places(torch.ones(1, 1, 20000), kept, 0)[0, 0]
    assert OCC3D_GRID.index(places + 0.1)[0].tolist() == [[0, 0, 0], [199, 99, 0]]


@torch.no_grad()
def test_the_same_frame_says_the_same_whatever_was_drawn_before():
    net = build()
    first, _ = net(clip(), None)
    torch.rand(7)
    second, _ = net(clip(), None)
    assert all(torch.equal(a, b) for a, b in zip(first.masks, second.masks))


# ---- what it costs

TWO = Grid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (4, 2, 2))  # at edge 2: two cells


def two_cells(**kinds) -> Kept:
    kinds = {"filled": None, "names": torch.zeros(1, 2, 17), "flow": None} | kinds
    return Kept(2, torch.tensor([[[0, 0, 0], [1, 0, 0]]]), torch.ones(1, 2, dtype=torch.bool), **kinds)


def street(labels: dict, flow: dict | None = None, unseen=()) -> Occupancy:
    full = torch.full((1, *TWO.shape), OPENOCC.free, dtype=torch.uint8)
    speed = torch.full((1, *TWO.shape, 2), torch.nan)
    seen = torch.ones(1, *TWO.shape, dtype=torch.bool)
    for at, label in labels.items():
        full[0][at] = label
    for at, values in (flow or {}).items():
        speed[0][at] = torch.tensor(values)
    for at in unseen:
        seen[0][at] = False
    return Occupancy(TWO, OPENOCC, full, speed, seen)


def fine(kept, truth, config=BASE):
    return sparseocc.Fine.of(kept.where, kept.inside, kept.edge, truth, config.as_published)


def costs(kept, truth, config):
    terms = sparseocc.names_losses(kept, fine(kept, truth, config), config)
    if kept.filled is not None:
        terms["filled"] = sparseocc.filled_loss(kept.filled, fine(kept, truth, config), OPENOCC)
    return terms


def test_flow_costs_the_mean_square_over_what_moves_and_is_known():
    """A cell that tells (1, 0) and holds cars of (1, 2) and (4, 0), one of unknown speed, and a road that has one."""
    kept = two_cells(flow=torch.tensor([[[1.0, 0.0], [9.0, 9.0]]]))
    cars = {(0, 0, 0): CAR, (0, 1, 0): CAR, (0, 1, 1): CAR, (1, 0, 0): ROAD}
    speeds = {(0, 0, 0): (1.0, 2.0), (0, 1, 0): (4.0, 0.0), (1, 0, 0): (50.0, 50.0)}

    def cost(kept, truth):
        return sparseocc.flow_loss(kept.flow, fine(kept, truth), OPENOCC).item()

    assert cost(kept, street(cars, speeds)) == pytest.approx((4 + 9) / 4)
    assert cost(kept, street({(1, 0, 0): ROAD}, speeds)) == 0
    assert cost(kept, replace(street(cars), flow=None)) == 0
    assert cost(replace(kept, inside=torch.tensor([[False, True]])), street(cars, speeds)) == 0


def test_a_cell_costs_what_the_finest_labels_in_it_make_it_cost():
    """v1.0: 5 voxels of one class weigh as much as 11 free ones; names are asked of the filled alone."""
    names = torch.zeros(1, 2, 16)
    names[0, 0, ROAD] = 2.0
    kept = two_cells(filled=torch.tensor([[1.0, -1.0]]), names=names)
    wide = {(x, y, 0): ROAD for x in range(2) for y in range(2)} | {(2, 0, 0): ROAD}
    terms = costs(kept, street(wide), BASE)
    on, off = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    # first cell: 4 filled, 4 free; second: 1 filled, 7 free
    expected = (16 / 5 * (4 * on + off) + 16 / 11 * (4 * off + 7 * on)) / 16
    assert terms["filled"].item() == pytest.approx(expected)
    sure = -torch.log_softmax(names[0], -1)[:, ROAD]
    assert terms["names"].item() == pytest.approx(float(4 * sure[0] + sure[1]) / 5)


def test_what_is_not_kept_learns_that_it_should_have_been():
    """Ours; as published only what is kept is asked."""
    for published in (False, True):
        net = build(replace(BASE, as_published=published))
        output, _ = net(clip(), None)
        last = output.kept[2]
        assert (last.asked is None) == published
        if not published:
            where, inside, filled = last.asked
            assert filled.shape == (1, 8 * BASE.kept[1]) and inside.sum() > BASE.kept[2]
            full = replace(truth(), labels=torch.full_like(truth().labels, ROAD))
            (gradient,) = torch.autograd.grad(net.loss(output, full)["filled 2"], filled)
            assert (gradient[inside] < 0).all() and not gradient[~inside].any()


def test_what_no_camera_sees_hardly_counts():
    kept = two_cells(filled=torch.tensor([[1.0, 3.0]]), names=torch.zeros(1, 2, 16))
    hidden = [(2 + x, y, z) for x in range(2) for y in range(2) for z in range(2)]
    terms = costs(kept, street({(0, 0, 0): ROAD}, unseen=hidden), BASE)
    price = [losses.balanced(torch.tensor([x]), torch.tensor([False]), torch.tensor([0])).item() for x in (1.0, 3.0)]
    weight, road = 16 / 15, 16 * losses.balanced(torch.tensor([1.0]), torch.tensor([True]), torch.tensor([0])).item()
    expected = (road + weight * (7 * price[0] + HIDDEN * 8 * price[1])) / (8 + HIDDEN * 8)
    assert terms["filled"].item() == pytest.approx(expected, rel=1e-5)
    published = costs(kept, street({(0, 0, 0): ROAD}, unseen=hidden), replace(BASE, as_published=True))
    assert published["filled"].item() == pytest.approx((road + weight * (7 * price[0] + 8 * price[1])) / 16, rel=1e-5)


def test_what_no_camera_sees_is_named_a_little_and_counts_in_no_whole_set():
    generator = torch.Generator().manual_seed(0)
    kept = two_cells(names=torch.randn(1, 2, 17, generator=generator))
    hidden = [(2 + x, y, z) for x in range(2) for y in range(2) for z in range(2)]
    one, other = (street({(0, 0, 0): ROAD, (3, 0, 0): label}, unseen=hidden) for label in (CAR, WALL))
    terms, others = (costs(kept, truth, NEWER) for truth in (one, other))
    assert {name for name in terms if terms[name] != others[name]} == {"names"}
    blind = costs(kept, street({(0, 0, 0): ROAD}, unseen=[(slice(None),) * 3]), NEWER)
    assert {name for name, term in blind.items() if term} == {"names"}
    published = replace(NEWER, as_published=True)
    terms, others = (costs(kept, truth, published) for truth in (one, other))
    assert {name for name in terms if terms[name] != others[name]} == {"names", "lovász", "names' affinity"}


@BOTH
def test_who_says_the_truth_pays_next_to_nothing(config):
    labels = {(0, 0, 0): ROAD, (0, 1, 0): ROAD, (2, 0, 1): CAR}
    true = street(labels)
    where = torch.cartesian_prod(*(torch.arange(n) for n in TWO.shape))[None]
    label = true.labels[0].flatten().long()
    wide = 17 if config.generation == "v1.1" else 16
    names = 40.0 * torch.nn.functional.one_hot(label, 17)[None, :, :wide].float()
    filled = None if wide == 17 else torch.where(label < 16, 40.0, -40.0)[None]
    kept = Kept(1, where, torch.ones(1, len(label), dtype=torch.bool), filled, names, None)
    queries = torch.where(torch.stack([label == ROAD, label == CAR, label == 99]), 40.0, -40.0)[None]
    named = torch.full((1, 3, 16), -40.0)
    named[0, 0, ROAD] = named[0, 1, CAR] = 40.0
    output = sparseocc.Output((kept,), (queries,), (named,))
    net = build(replace(config, grid=TWO, flow=0))
    assert sum(net.loss(output, true).values()) < 1e-4
    (said,) = net.decode(output)
    assert torch.equal(said.labels, true.labels[0])
    assert torch.equal(said.score > 0.9, true.labels[0] < 16)
    wrong = net.loss(output, street({**labels, (2, 0, 1): WALL}))
    assert all(wrong[f"{name} 0"] > 0.1 for name in ("names", "classes"))


def test_segments_are_classes_and_those_without_a_kept_voxel_are_none():
    kept = Kept(1, torch.tensor([[[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 1, 1]]]), torch.tensor([[True] * 3 + [False]]),
                None, torch.zeros(1, 4, 17), None)  # fmt: skip
    masks, label = sparseocc.segments_of(
        kept, street({(0, 0, 0): ROAD, (2, 0, 0): ROAD, (1, 0, 0): CAR, (0, 1, 0): WALL, (3, 1, 1): WALL}), 0, False
    )
    assert {int(c): m.tolist() for c, m in zip(label, masks)} == {CAR: [0, 1, 0, 0], ROAD: [1, 0, 1, 0]}


def test_rare_classes_are_named_whichever_table_they_stand_in():
    """Both generations learn either table, v1.1 too."""
    for table in (OCC3D.table, OPENOCC.table):
        config = replace(NEWER, classes=table)
        net = build(config)
        output, _ = net(clip(), None)
        terms = net.loss(output, truth(config))
        assert all(t.isfinite() for t in terms.values())
        assert {name.split()[0] for name in terms} >= {"lovász", "filled", "names", "names'"}


# ---- what is made of it


def test_masks_add_up_and_a_faint_sum_or_an_unsure_query_is_free():
    config = replace(BASE, grid=TWO, flow=1)
    where = torch.tensor([(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)])
    inside = torch.tensor([True, True, True, False])
    names = torch.full((3, 16), -9.0)
    names[0, CAR], names[1, WALL], names[2, WALL] = 1.0, 0.5, -1.0  # the third scores 0.27: nothing
    masks = torch.tensor([[2.0, -1, -9, 9], [1.0, 1, -9, 9], [9.0, 9, 9, 9]])
    flow = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    said = sparseocc.decoded(where, inside, masks, names, flow, config)
    assert said.labels[:, 0, 0].tolist() == [CAR, WALL, OPENOCC.free, OPENOCC.free]
    expected = torch.tensor([1.0, 2.0]).sigmoid().prod()
    assert said.score[0, 0, 0].item() == pytest.approx(expected.item(), abs=1e-3)
    assert said.flow[:, 0, 0].tolist() == [[1, 2], [0, 0], [0, 0], [0, 0]] and said.score[2:].sum() == 0
    assert (said.labels != OPENOCC.free).sum() == 2


def test_things_are_numbered_one_by_one_and_stuff_by_class():
    """Two cars and two walls; the second car loses too much of what it covers to the first wall."""
    said = torch.zeros(5, 16)
    for q, c in enumerate((CAR, CAR, WALL, WALL, CAR)):
        said[q, c] = 0.9 - 0.01 * q
    covered = torch.full((5, 10), 0.1)
    covered[0, :2] = covered[1, 2:4] = covered[2, 4:8] = covered[3, 8:9] = 0.95
    covered[4, 4:6] = 0.6
    for published, last in ((True, OPENOCC.free), (False, WALL)):
        label, number = sparseocc.segments_told(said, covered, OPENOCC, published)
        assert label.tolist() == [CAR] * 4 + [WALL] * 4 + [last, OPENOCC.free]
        assert number.tolist() == [1, 1, 2, 2, 3, 3, 3, 3, 3, 0]
    nothing = sparseocc.segments_told(said[:0], covered[:0], OPENOCC, True)
    assert nothing[0].tolist() == [OPENOCC.free] * 10 and not nothing[1].any()


# ---- networks that become others


@torch.no_grad()
def test_twice_the_frames_each_there_twice_say_what_they_said():
    net = build()
    more = net.grown(replace(BASE, frames=4))
    changed = {n for n, t in more.state_dict().items() if t.shape != net.state_dict()[n].shape}
    parts = ("matrices.weight", "matrices.bias", "out.weight")
    voxels = {f"scales.{i}.mixing.{part}" for i in range(3) for part in parts}
    assert changed == voxels | {f"masks.mixing.{part}" for part in parts[:2]}
    frames = drive(2, every=0.5)[::-1]
    _, memory = net(Clip.of(frames), None)
    window = memory.lanes[0]
    sizes = ((16, 24), (8, 12), (4, 6), (2, 3))
    views = [sparseocc.View.of([list(entries)], sizes) for entries in (window, [*window, *window])]
    before, after = net.answer(views[0]), more.answer(views[1])
    assert (before.masks[-1] - after.masks[-1]).abs().max() < 1e-4
    assert all((a.flow - b.flow).abs().max() < 1e-4 for a, b in zip(before.kept, after.kept))
    with pytest.raises(ValueError, match="4 frames does not shrink to 2"):
        more.grown(BASE)
    with pytest.raises(ValueError, match="only pictures and frames"):
        net.grown(replace(BASE, frames=4, queries=3))


@BOTH
def test_a_grown_network_learns_from_its_new_frames(config):
    more = build(config).train().grown(replace(config, frames=3))
    output, _ = more(clip(3), None)
    sum(more.loss(output, truth(config)).values()).backward()
    assert more.training and all(p.grad is not None and p.grad.isfinite().all() for p in more.parameters())
    block = more.scales[0].mixing
    gained = block.out.weight.grad.view(32, block.groups, block.given, block.inner)[:, :, -block.given // 3 :]
    assert gained.any()


def test_the_names_in_a_file_tell_its_generation():
    first = {"pts_bbox_head.transformer.voxel_decoder.occ_pred_heads.0.weight": torch.zeros(1)}
    newer, older = SparseOcc.PRESETS["8f"], SparseOcc.PRESETS["v1.0-8f"]
    assert SparseOcc.adapted(newer, first) == older and SparseOcc.adapted(newer, {}) == newer
    assert SparseOcc.adapted(older, {}) == newer and SparseOcc.adapted(older, first) == older


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": "bare17"}, "classes must be one of"),
        ({"generation": "v2"}, "generation v1.0 or v1.1, got .*'v2'"),
        ({"backbone": "vgg"}, "got 4 of 'vgg'"),
        ({"channels": 30}, "do not divide 30 channels"),
        ({"kept": (10, 20)}, "kept needs 3 numbers"),
        ({"flow": 4}, "flow at most 3"),
        ({"samples": 6}, "divide by 4, got 6"),
        ({"queries": 0}, "must be positive"),
    ],
)
def test_a_config_that_cannot_be_is_one_sentence(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(BASE, **changes)
