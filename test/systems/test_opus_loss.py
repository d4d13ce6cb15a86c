"""The losses of OPUS against their definition as loops (arXiv 2409.09350, `opus_head.loss_single` at dde4209)."""

import math
from dataclasses import replace

import pytest
import torch
from systems.small import CONFIG, PUBLISHED, build

from occflow_core.nn.points import FLOW_WEIGHT, NAME_WEIGHTS
from occflow_core.nn.starts import GROUND, SHARES
from occflow_core.systems import opus
from occflow_core.types import OCC3D, OPENOCC, Occupancy

# by hand from the published head: column weights of Occ3D's 17 classes
WEIGHTS = [10, 5, 10, 5, 5, 10, 10, 5, 10, 5, 5, 1, 5, 1, 1, 2, 1]


def truth_of(config, lanes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (lanes, *config.grid.shape)
    labels = torch.randint(0, 17, shape, generator=generator)
    labels = torch.where(torch.rand(shape, generator=generator) < 0.03, labels, 17).to(torch.uint8)
    flow = torch.randn(*shape, 2, generator=generator)
    flow[torch.rand(shape, generator=generator) < 0.2] = torch.nan
    return Occupancy(config.grid, OCC3D, labels, flow, torch.rand(shape, generator=generator) < 0.5)


def output_of(config, lanes, seed=1, flow=True):
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(config.grid.size)
    points, logits, speeds = [], [], []
    for p in config.refines:
        unit = torch.rand(lanes, config.queries, p, 3, generator=generator) * 1.1 - 0.05  # some lie outside
        points.append(unit * size + torch.tensor(config.grid.low))
        logits.append(2 * torch.randn(lanes, config.queries, p, 17, generator=generator))
        speeds.append(torch.randn(lanes, config.queries, p, 2, generator=generator))
    return opus.Output(tuple(points), tuple(logits), tuple(speeds) if flow else None)


def slow_l1(d):
    return sum(0.5 * abs(x) ** 2 / 0.2 if abs(x) < 0.2 else abs(x) - 0.1 for x in d)


def defined(points, logits, speeds, truth, published):
    """(points, names, flow) of one layer: points (B, P, 3), logits (B, P, 17), speeds (B, P, 2)."""
    points, logits, speeds = points.detach(), logits.detach(), speeds.detach()
    low, voxel = torch.tensor(truth.grid.low), torch.tensor(truth.grid.voxel)
    far_corner = math.hypot(truth.grid.size[0], truth.grid.size[1])
    missed = strayed = names = flow = 0.0
    voxels = count = moving = 0
    for b in range(len(points)):
        where = (truth.labels[b] != 17).nonzero()
        centre = (where + 0.5) * voxel + low
        labels = [int(truth.labels[b][tuple(w)]) for w in where]
        distance = torch.cdist(centre.double(), points[b].double())
        for v, w in enumerate(where):
            d = (centre[v] - points[b][distance[v].argmin()]).tolist()
            seen = bool(truth.seen[b][tuple(w)])
            weight = 5.0 if seen and math.hypot(*d) > 0.2 else 1.0
            weight = max(weight, 10.0) if seen and labels[v] in (0, 2, 5, 8) else weight
            weight = weight if seen or published else 0.1
            missed, voxels = missed + weight * slow_l1(d), voxels + 1
        for p in range(len(points[b])):
            v = int(distance[:, p].argmin())
            d = (points[b][p] - centre[v]).tolist()
            strayed += slow_l1(d) if published or math.hypot(*d) <= 0.8 else 0.0
            inside = [math.floor((float(points[b][p][k]) - float(low[k])) / float(voxel[k])) for k in range(3)]
            seen = all(0 <= i < n for i, n in zip(inside, truth.grid.shape)) and bool(truth.seen[b][tuple(inside)])
            weight = 1.0 if seen or published else 0.1
            for c in range(17):
                score = 1 / (1 + math.exp(-float(logits[b, p, c])))
                right = labels[v] == c and (published or max(map(abs, d)) <= 0.35)
                cost = 0.25 * (1 - score) ** 2 * -math.log(score) if right else 0.75 * score**2 * -math.log(1 - score)
                names += weight * WEIGHTS[c] * (1 + math.hypot(*centre[v, :2].tolist()) / far_corner) * cost
            true = truth.flow[b][tuple(where[v])]
            if labels[v] in OCC3D.moving_ids and bool(true.isfinite().all()):
                flow, moving = flow + float((speeds[b, p] - true).abs().sum()), moving + 1
            count += 1
    names *= 2.0 if published else 8.0
    return 0.5 * (missed / voxels + strayed / count), names / count, FLOW_WEIGHT * flow / max(moving, 1)


@pytest.mark.parametrize("config", [CONFIG, PUBLISHED], ids=["ours", "as published"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_every_term_is_what_its_definition_says(config, lanes):
    config = replace(config, queries=12, refines=(1, 3))
    system, truth, output = build(config), truth_of(config, lanes), output_of(config, lanes, flow=config.flow)
    terms = system.loss(output, truth)
    for k in range(2):
        flow = torch.zeros_like(output.points[k][..., :2]) if output.flow is None else output.flow[k]
        parts = (output.points[k].flatten(1, 2), output.logits[k].flatten(1, 2), flow.flatten(1, 2))
        points, names, speeds = defined(*parts, truth, config.as_published)
        assert terms[f"points {k}"].item() == pytest.approx(points, rel=1e-4)
        assert terms[f"names {k}"].item() == pytest.approx(names, rel=1e-4)
        if config.flow:
            assert terms[f"flow {k}"].item() == pytest.approx(speeds, rel=1e-4)
    assert (f"flow {0}" in terms) == config.flow
    assert ("points begin" in terms) == config.as_published == system.queries.weight.requires_grad
    if not config.as_published:
        return
    begin = config.grid.metres(system.queries.weight).expand(lanes, -1, -1)
    assert terms["points begin"].item() == pytest.approx(
        defined(begin, torch.zeros(lanes, 12, 17), torch.zeros(lanes, 12, 2), truth, True)[0], rel=1e-4
    )


def test_a_point_that_strays_from_every_voxel_learns_to_be_nothing_and_is_drawn_nowhere():
    config = replace(CONFIG, queries=1, refines=(3,))
    labels = torch.full((1, *config.grid.shape), 17, dtype=torch.uint8)
    labels[0, 10, 10, 4] = 4
    truth = Occupancy(config.grid, OCC3D, labels, None, torch.ones_like(labels, dtype=torch.bool))
    centre = config.grid.centres()[10, 10, 4]
    above = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.6], [0.0, 0.0, 0.9]])
    points = (centre + above)[None, None].requires_grad_()
    logits = torch.zeros(1, 1, 3, 17, requires_grad=True)
    terms = build(config).loss(opus.Output((points,), (logits,), None), truth)
    (terms["names 0"] + terms["points 0"]).backward()
    assert logits.grad[0, 0, 0, 4] < 0 < logits.grad[0, 0, 1, 4]  # the car's point, and the one above it
    assert (logits.grad[0, 0, 1:] > 0).all()
    assert points.grad[0, 0, 1, 2] > 0 == points.grad[0, 0, 2, 2]  # 0.6 m off is near enough to be drawn, 0.9 is not


def test_what_no_camera_sees_says_little():
    config = replace(CONFIG, queries=1, refines=(1,))
    labels = torch.full((1, *config.grid.shape), 17, dtype=torch.uint8)
    labels[0, 10, 10, 4] = 4
    points, logits = config.grid.centres()[10, 10, 4][None, None, None] + 0.1, torch.zeros(1, 1, 1, 17)
    said = []
    for seen in (True, False):
        truth = Occupancy(config.grid, OCC3D, labels, None, torch.full_like(labels, seen, dtype=torch.bool))
        said.append(build(config).loss(opus.Output((points,), (logits,), None), truth)["names 0"])
    assert said[1] == pytest.approx(0.1 * said[0])


def test_the_class_weights_go_by_name_in_every_table():
    assert [NAME_WEIGHTS[name] for name in OCC3D.names] == WEIGHTS
    assert {*OPENOCC.names} < set(NAME_WEIGHTS) and set(SHARES) == set(OCC3D.names)


@pytest.mark.parametrize("queries, refines", [(64, (16, 40)), (50, (1, 7))])
def test_our_own_networks_begin_as_even_columns_and_each_class_at_its_share(queries, refines):
    config = replace(CONFIG, queries=queries, refines=refines)
    ours, grid = opus.Opus(config), config.grid
    begin = grid.metres(ours.queries.weight)
    quarters = ((begin[:, 0] > 0).int() * 2 + (begin[:, 1] > 0).int()).bincount(minlength=4)
    assert quarters.min() >= queries / 4 - 5
    centre = begin[:, None]
    for layer, after in zip(ours.layers, refines, strict=True):  # as `Layer.forward` moves them before it learned
        points = centre + opus.STEP * layer.move[-1].bias.detach().view(after, 3)
        assert points[..., 2].min() == pytest.approx(0.0, abs=1e-4) and points[..., 2].max() < grid.high[2]
        centre = points.mean(dim=1, keepdim=True)
        assert torch.allclose(centre[..., :2], begin[:, None, :2], atol=0.3 * grid.size[0] / queries**0.5)
    # no place in the box is far from a point
    edge = (grid.size[0] * grid.size[1] * (grid.high[2] - GROUND) / (queries * refines[-1])) ** (1 / 3)
    asked = torch.rand(2000, 3) * torch.tensor([*grid.size[:2], grid.high[2]]) + torch.tensor([*grid.low[:2], 0.0])
    assert torch.cdist(asked, points.flatten(0, 1)).amin(1).max() < 1.6 * edge
    shares = ours.layers[0].name[-1].bias.view(-1, 17)[0].sigmoid()
    assert torch.allclose(shares, torch.tensor([SHARES[name] for name in OCC3D.names]), atol=1e-6)
    theirs = opus.Opus(PUBLISHED)
    assert torch.allclose(theirs.layers[0].name[-1].bias.sigmoid(), torch.tensor(0.01))
    assert theirs.queries.weight[:, 2].std() > 0.1
