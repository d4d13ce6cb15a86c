import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from systems import small_v2
from systems.rig import drive, frame
from systems.small_v2 import CONFIG, PUBLISHED, authors_checkpoint, build
from torch.nn import functional as F

from occflow_core.geometry import OCC3D_GRID, OPENOCCUPANCY_GRID, Grid
from occflow_core.nn.points import FLOW_WEIGHT
from occflow_core.nn.starts import SHARES
from occflow_core.runtime import load
from occflow_core.runtime.convert import convert
from occflow_core.systems import opus_v2
from occflow_core.systems.base import load_strictly, seeded, translate
from occflow_core.types import OCC3D, OPENOCCUPANCY, Clip, Occupancy

CLOSE = 1e-5


def same(mine, theirs, leaves):
    """Values and, through one random cotangent, gradients, of numbers of the size of one."""
    assert torch.allclose(mine, theirs, atol=CLOSE, rtol=CLOSE), (mine - theirs).abs().max()
    cotangent = torch.randn_like(mine)
    for a, b in zip(*(torch.autograd.grad(y, leaves, cotangent, retain_graph=True) for y in (mine, theirs))):
        assert torch.allclose(a, b, atol=CLOSE, rtol=CLOSE), (a - b).abs().max()


# ---- sizes and names


def test_a_published_checkpoint_becomes_a_model_that_drives(tmp_path, monkeypatch):
    monkeypatch.setitem(opus_v2.PRESETS, "tiny", PUBLISHED)
    theirs = authors_checkpoint(PUBLISHED)
    torch.save({"state_dict": {f"module.{name}": t for name, t in theirs.items()}, "meta": {}}, tmp_path / "theirs.pth")
    convert("opus-v2-t", tmp_path / "theirs.pth", tmp_path / "ours.safetensors")
    model = load("opus-v2-tiny", tmp_path / "ours.safetensors")
    assert (model.name, model.resize) == ("opus-v2-tiny", "pillow")
    source = {translate(key, opus_v2.NAMES)[1]: key for key in theirs}
    for name, tensor in model.system.state_dict().items():
        assert torch.equal(tensor, theirs[source[name]]), name
    with torch.inference_mode():
        (prediction,) = model.system.decode(model.system(Clip.of(frame()), None)[0])
    assert (prediction.labels != prediction.classes.free).any() and prediction.flow is None


@pytest.mark.parametrize("wrong", ["pts_bbox_head.densifiers.2.pc_range", "pts_bbox_head.voxel_num"])
def test_weights_for_another_grid_are_refused(wrong):
    theirs = authors_checkpoint(PUBLISHED)
    theirs[wrong] = theirs[wrong] + 1
    with pytest.raises(ValueError, match=f"differs: {wrong}"):
        load_strictly(build(PUBLISHED), theirs, opus_v2.NAMES, build(PUBLISHED).constants())


def test_kernels_in_the_order_of_an_older_spconv_are_refused():
    theirs = authors_checkpoint(PUBLISHED)
    name = "pts_bbox_head.densifiers.0.cls_branch.0.weight"
    theirs[name] = theirs[name].permute(1, 2, 3, 4, 0)  # (x, y, z, in, out)
    with pytest.raises(ValueError, match=f"shape: {name}"):
        load_strictly(build(PUBLISHED), theirs, opus_v2.NAMES, build(PUBLISHED).constants())


def test_configs_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="classes must be one of"):
        replace(CONFIG, classes="mine")
    with pytest.raises(ValueError, match="7 cells are not even"):
        replace(CONFIG, cells=7)
    with pytest.raises(ValueError, match="must be positive"):
        replace(CONFIG, refines=())


# ---- the decoder


def test_a_look_is_the_middle_and_a_prototype_in_the_spread_and_an_offset():
    """The published rule; one point alone has a spread of a metre."""

    class Told:
        def sample(self, places, weights, as_published):
            self.places, self.weights = places, weights
            return places

    sampling, view = opus_v2.Sampling(CONFIG), Told()
    torch.nn.init.normal_(sampling.offset.weight)
    query, points = torch.randn(2, 5, 16), 3 * torch.randn(2, 5, 4, 3)
    for p in (4, 1):
        sampling(query, points[:, :, :p], view)
        for b, q, g, s in np.ndindex(2, 5, 4, 2):
            mine = points[b, q, :p]
            spread = ((mine - mine.mean(0)) ** 2).sum(0).div(p - 1).sqrt() if p > 1 else torch.ones(3)
            offset = sampling.offset(query[b, q]).view(4, 2, 3)[g, s]
            place = mine.mean(0) + sampling.prototype.weight.view(4, 2, 3)[g, s] * spread + offset
            assert torch.allclose(view.places[b, q, g, s], place, atol=1e-5)
    assert torch.allclose(view.weights.sum(-1), torch.ones(2, 5, 4, 2))


def test_where_nothing_learns_only_the_last_layer_names_voxels():
    system, clip = build(), Clip.of(frame())
    learning, _ = system(clip, None)
    with torch.no_grad():
        driving, _ = system(clip, None)
    assert [len(learning.voxels), len(driving.voxels)] == [3, 1]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(learning.points, driving.points))


def test_every_weight_gets_a_finite_gradient_that_is_not_zero():
    for config in (CONFIG, PUBLISHED):
        system = build(config).train()
        output, _ = system(Clip.of(drive(8, every=0.5)[::-1]), None)
        sum(system.loss(output, truth_of(config, 1)).values()).backward()
        for name, p in system.named_parameters():
            if not config.as_published and name == "queries.weight":
                continue  # a column stays where it stands
            assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name


# ---- points -> voxels


def densify_slowly(densifier: opus_v2.Densifier, points, told):
    """The published definition, dense: (B, K, X, Y, Z) logits, flow, and where voxels are named (B, X, Y, Z)."""
    grid, (nx, ny, nz) = densifier.grid, densifier.grid.shape
    b, q, p, _ = points.shape
    low, size, shape = (torch.tensor(v, dtype=points.dtype) for v in (grid.low, grid.size, grid.shape))
    cell = ((points.detach() - low) / size * shape).floor().long()
    cell = torch.stack([cell[..., i].clamp(0, n - 1) for i, n in enumerate(grid.shape)], dim=-1)
    middle = (cell + 0.5) / shape * size + low
    x = torch.cat([points - middle, points - points.mean(2, keepdim=True), told], dim=-1).view(b * q * p, -1)
    voxel = [(i // (q * p), *c) for i, c in enumerate(cell.view(-1, 3).tolist())]
    members: dict[tuple, list[int]] = {}
    for i, v in enumerate(voxel):
        members.setdefault(v, []).append(i)

    def layer(pool, x):
        norm, x = pool.norm, x @ pool.linear.weight.T
        mean, var = (x.mean(0), x.var(0, correction=0)) if norm.training else (norm.running_mean, norm.running_var)
        return torch.relu((x - mean) / (var + 1e-3).sqrt() * norm.weight + norm.bias)

    x = layer(densifier.pools[0], x)
    most = {v: x[rows].amax(0) for v, rows in members.items()}
    x = layer(densifier.pools[1], torch.cat([x, torch.stack([most[v] for v in voxel])], dim=1))
    most = {v: x[rows].amax(0) for v, rows in members.items()}
    where = torch.tensor(list(most)).unbind(1)
    volume = torch.zeros(b, nx, ny, nz, x.shape[1], dtype=x.dtype).index_put(where, torch.stack(list(most.values())))
    there = torch.zeros(b, 1, nx, ny, nz)
    there[where[0], 0, where[1], where[2], where[3]] = 1
    there = F.max_pool3d(there, 3, stride=1, padding=1) > 0

    def spread(kernel, volume):
        return F.conv3d(volume, kernel.weight.permute(0, 4, 1, 2, 3), kernel.bias, padding=1)

    volume = torch.relu(spread(densifier.spread, volume.permute(0, 4, 1, 2, 3))) * there
    return spread(densifier.name, volume), spread(densifier.flow, volume), there[:, 0]


@pytest.mark.parametrize("training", [False, True])
def test_the_densifier_is_its_dense_definition(training):
    torch.manual_seed(0)
    densifier = build().double().densifiers[0].train(training)
    grid = densifier.grid
    unit = torch.rand(2, 9, 5, 3, dtype=torch.float64) * 1.4 - 0.2  # some outside: they pile up on the border
    unit[:, :3] = unit[:, :3, :1] + 0.01 * torch.randn(2, 3, 5, 3)  # and some share voxels
    points, told = grid.metres(unit).requires_grad_(), torch.randn(2, 9, 5, 8, dtype=torch.float64).requires_grad_()
    logits, flow, there = densify_slowly(densifier, points, told)
    voxels = densifier(points, told)
    assert torch.equal(voxels.sites, there.nonzero()) and len(voxels.sites) > 500
    leaves = [points, told, *densifier.parameters()]
    read = voxels.sites.unbind(1)
    both = torch.cat([voxels.logits, voxels.flow], dim=1), torch.cat([logits, flow], dim=1).permute(0, 2, 3, 4, 1)[read]
    same(*both, leaves)


def test_float32_puts_points_into_the_voxels_that_the_published_code_does():
    """On and beside every border of Occ3D's grid: floor(fraction of the box * voxels), not floor((p - low) / voxel)."""
    grid = OCC3D_GRID
    borders = torch.arange(201, dtype=torch.float64) * 0.4 - 40
    x = torch.cat([borders.float(), torch.nextafter(borders.float(), torch.tensor(99.0))])
    points = torch.stack([x, x, torch.full_like(x, 0.1)], dim=1)[None, :, None]
    densifier = opus_v2.Densifier(replace(CONFIG, grid=grid)).eval()
    with torch.no_grad():
        sites = densifier(points, torch.zeros(1, len(x), 1, 8)).sites
    cells = ((x + 40) / 80 * 200).floor().clamp(0, 199).long()
    expected = torch.zeros(1, 1, *grid.shape)
    expected[0, 0, cells, cells, 2] = 1
    assert torch.equal(sites, (F.max_pool3d(expected, 3, 1, 1)[:, 0] > 0).nonzero())


def test_a_point_that_is_not_finite_says_nothing_and_spoils_its_own_corner_at_most():
    densifier = build().densifiers[0].eval()
    points, told = torch.rand(1, 6, 4, 3) * 5 + 2, torch.randn(1, 6, 4, 8)
    with torch.no_grad():
        alone = densifier(points[:, :5], told[:, :5])
        points[0, 5] = torch.tensor([float("nan"), float("inf"), 0.0])
        voxels = densifier(points, told)
    finite = voxels.logits.isfinite().all(-1)
    assert finite.sum() >= len(alone.sites) > (~finite).sum() > 0
    (prediction,) = build().decode(opus_v2.Output((points,), (voxels,)))
    assert (prediction.labels[tuple(voxels.sites[~finite][:, 1:].T)] == prediction.classes.free).all()


def test_the_cost_follows_the_points_and_not_the_grid():
    """On 10.5 million voxels, of which a dense map of 8 channels alone would hold 336 MB."""
    config = replace(CONFIG, grid=OPENOCCUPANCY_GRID, classes=OPENOCCUPANCY.table)
    densifier = opus_v2.Densifier(config).eval()
    points, told = OPENOCCUPANCY_GRID.metres(torch.rand(1, 100, 8, 3)), torch.randn(1, 100, 8, 8)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        voxels = densifier(points, told)
    assert 10_000 < len(voxels.sites) <= 27 * 800 and voxels.logits.shape[1] == 16
    assert max(event.cpu_memory_usage for event in profile.key_averages()) < 300e6


def test_voxels_above_the_threshold_are_occupied_lane_by_lane():
    torch.manual_seed(0)
    system, shape = build(), CONFIG.grid.shape
    named = torch.rand(3, *shape) < 0.2
    named[1] = False  # a lane that says nothing
    sites = named.nonzero()
    logits, flow = 2 * torch.randn(len(sites), 17) - 3, torch.randn(len(sites), 2)
    points = (torch.zeros(3, 1, 1, 3),)
    predictions = system.decode(opus_v2.Output(points, (opus_v2.Voxels(sites, logits, flow),)))
    labels, score = torch.full((3, *shape), 17), torch.zeros(3, *shape)
    speed = torch.zeros(3, *shape, 2)
    for (b, x, y, z), told, moving in zip(sites.tolist(), logits, flow):
        scores = [1 / (1 + math.exp(-float(s))) for s in told]
        if max(scores) > 0.25:
            labels[b, x, y, z], score[b, x, y, z] = scores.index(max(scores)), max(scores)
            speed[b, x, y, z] = moving
    assert len(predictions) == 3
    for b, prediction in enumerate(predictions):
        assert torch.equal(prediction.labels, labels[b].to(torch.uint8)) and torch.equal(prediction.flow, speed[b])
        assert torch.allclose(prediction.score, score[b], atol=1e-6)
    assert (labels[0] != 17).any() and (labels[1] == 17).all()


# ---- losses


def truth_of(config, lanes, seed=0, seen=0.5):
    generator, classes = torch.Generator().manual_seed(seed), config.table
    shape = (lanes, *config.grid.shape)
    labels = torch.randint(0, classes.free, shape, generator=generator)
    labels = torch.where(torch.rand(shape, generator=generator) < 0.1, labels, classes.free).to(torch.uint8)
    flow = torch.randn(*shape, 2, generator=generator)
    flow[torch.rand(shape, generator=generator) < 0.2] = torch.nan
    return Occupancy(config.grid, classes, labels, flow, torch.rand(shape, generator=generator) < seen)


# by hand from the published configs: the weights of Occ3D's 17 and OpenOccupancy's 16 classes
WEIGHTS = {
    OCC3D.table: [10, 5, 10, 5, 5, 10, 10, 5, 10, 5, 5, 1, 5, 1, 1, 2, 1],
    OPENOCCUPANCY.table: [5, 10, 5, 5, 10, 10, 5, 10, 5, 5, 1, 5, 1, 1, 2, 1],
}
EACH = pytest.mark.parametrize(
    "config",
    [CONFIG, PUBLISHED, replace(PUBLISHED, classes=OPENOCCUPANCY.table)],
    ids=["ours", "as published", "as published on OpenOccupancy"],
)


@EACH
def test_names_and_velocities_cost_what_their_definition_says(config):
    generator, truth, free = torch.Generator().manual_seed(1), truth_of(config, 2), config.table.free
    sites = (torch.rand(truth.labels.shape, generator=generator) < 0.1).nonzero()
    logits = 2 * torch.randn(len(sites), free, generator=generator)
    flow = torch.randn(len(sites), 2, generator=generator) if config.flow else None
    points = torch.rand(2, 3, 2, 3, generator=generator)
    terms = build(config).loss(opus_v2.Output((points,), (opus_v2.Voxels(sites, logits, flow),)), truth)
    names = speeds = occupied = moving = 0
    for i, site in enumerate(map(tuple, sites.tolist())):
        label = int(truth.labels[site])
        weight = 1.0 if config.as_published or bool(truth.seen[site]) else 0.1
        for c in range(free):
            score = 1 / (1 + math.exp(-float(logits[i, c])))
            cost = 0.25 * (1 - score) ** 2 * -math.log(score) if label == c else 0.75 * score**2 * -math.log(1 - score)
            names += weight * WEIGHTS[config.classes][c] * cost
        occupied += label != free
        if config.flow and label in config.table.moving_ids and bool(truth.flow[site].isfinite().all()):
            speeds, moving = speeds + float((flow[i] - truth.flow[site]).abs().sum()), moving + 1
    assert terms["names 0"].item() == pytest.approx(2.0 * names / occupied, rel=1e-4)
    assert ("flow 0" in terms) == config.flow
    if config.flow:
        assert moving > 10 and terms["flow 0"].item() == pytest.approx(FLOW_WEIGHT * speeds / moving, rel=1e-4)
    assert ("points begin" in terms) == config.as_published


@EACH
def test_rare_voxels_count_ten_times_by_number_as_published_and_by_name_in_ours(config):
    """Numbers 0, 2, 5, 8: others, bicycle, construction_vehicle, traffic_cone of Occ3D, and others in OpenOccupancy."""
    system, classes, costs = build(config), config.table, {}
    points = config.grid.centres()[10, 10, 4][None, None, None] + torch.tensor([0.1, 0.0, 0.0])
    nothing = opus_v2.Voxels(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, classes.free), None)
    for k, name in enumerate(classes.names):
        labels = torch.full((1, *config.grid.shape), classes.free, dtype=torch.uint8)
        labels[0, 10, 10, 4] = k
        truth = Occupancy(config.grid, classes, labels, None, torch.ones_like(labels, dtype=torch.bool))
        costs[name] = system.loss(opus_v2.Output((points,), (nothing,)), truth)["points 0"].item()
    common = min(costs.values())
    rare = {name for name, cost in costs.items() if cost > 2 * common}
    assert all(cost == pytest.approx(5.5 * common) for name, cost in costs.items() if name in rare)
    numbers = {"barrier", "bus", "motorcycle", "trailer"}
    names = {"others", "bicycle", "construction_vehicle", "traffic_cone"}
    assert rare == (numbers if classes is OPENOCCUPANCY else names)


# ---- how our own begins


def test_our_own_networks_begin_as_even_columns_and_each_class_at_its_share():
    ours, theirs, grid = opus_v2.OpusV2(CONFIG), opus_v2.OpusV2(PUBLISHED), CONFIG.grid
    begin = grid.metres(ours.queries.weight)
    quarters = ((begin[:, 0] > 0).int() * 2 + (begin[:, 1] > 0).int()).bincount(minlength=4)
    assert quarters.min() >= CONFIG.queries / 4 - 5 and theirs.queries.weight[:, 2].std() > 0.1
    assert torch.allclose(
        ours.densifiers[0].name.bias.sigmoid(), torch.tensor([SHARES[name] for name in OCC3D.names]), atol=1e-6
    )
    assert torch.allclose(theirs.densifiers[0].name.bias.sigmoid(), torch.tensor(0.01))


def test_an_untrained_nano_says_something_and_the_same_for_the_same_seed():
    config = replace(opus_v2.PRESETS["nano"], grid=Grid((-20.0, -20.0, -1.0), (0.8, 0.8, 0.8), (50, 50, 8)))
    nets = [seeded(opus_v2.OpusV2(config), seed).eval() for seed in (0, 0, 1)]
    clip = Clip.of(frame(128, 352, n=6))
    with torch.inference_mode():
        said = [net.decode(net(clip, None)[0])[0] for net in nets]
    assert torch.equal(said[0].labels, said[1].labels) and not torch.equal(said[0].labels, said[2].labels)
    assert int((said[0].labels != 17).sum()) > 100 and said[0].flow is not None


def test_the_numbers_of_the_parity_fixture_fill_the_system():
    system = small_v2.build(small_v2.PARITY)
    assert all(p.std() > 0 for p in system.parameters() if p.numel() > 1)


@pytest.mark.slow
def test_it_learns_four_places_by_heart():
    """Streets of a road, a pavement, a wall and a car that drives: 240 steps from nothing, with our own rules."""
    config = replace(CONFIG, refines=(4, 8), channels=32, cells=16, hidden=64, mixed=8, frames=1, threshold=0.3)
    config = replace(config, dropout=0.0)
    torch.manual_seed(0)
    system, clips, truths = opus_v2.OpusV2(config).train(), [Clip.of(f) for f in drive(4, every=0.5)], []
    for i in range(4):
        labels = torch.full((1, *config.grid.shape), OCC3D.free, dtype=torch.uint8)
        labels[..., 1] = OCC3D.id("driveable_surface")
        labels[:, :, : 6 + i, 1] = OCC3D.id("sidewalk")
        labels[:, 3 + 4 * i : 6 + 4 * i, 8:11, 2:4] = OCC3D.id("car")
        labels[:, :, 1, 2:6] = OCC3D.id("manmade")
        flow = torch.tensor([i - 1.5, 0.0]).expand(*labels.shape, 2)
        truths.append(Occupancy(config.grid, OCC3D, labels, flow, torch.rand(labels.shape) < 0.8))
    adam = torch.optim.AdamW(system.parameters())
    for step in range(240):
        output, _ = system(clips[step % 4], None)
        sum(system.loss(output, truths[step % 4]).values()).backward()
        adam.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / 240) + 1e-5
        adam.step()
        adam.zero_grad()
    with torch.no_grad():
        said = [system.eval().decode(system(clip, None)[0])[0] for clip in clips]
    told, true = torch.stack([p.labels for p in said]), torch.cat([t.labels for t in truths])
    for name, expected in (("driveable_surface", 0.9), ("sidewalk", 0.9), ("manmade", 0.9), ("car", 0.4)):
        mine, theirs = told == OCC3D.id(name), true == OCC3D.id(name)
        assert (mine & theirs).sum() / (mine | theirs).sum() > expected, name
    car = (told == OCC3D.id("car")) & (true == OCC3D.id("car"))
    apart = torch.stack([p.flow for p in said]) - torch.cat([t.flow for t in truths])
    assert apart.norm(dim=-1)[car].mean() < 0.5  # of 0.5 and 1.5 m/s
