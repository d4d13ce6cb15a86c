"""What pixels see and what they say of points, in worlds of one wall."""

import math
from dataclasses import replace

import pytest
import torch
from systems.rig import frame, ring

from occflow_core.geometry import OCC3D_GRID
from occflow_core.nn.decoder import Output
from occflow_core.nn.instants import View
from occflow_core.nn.points import NAME_WEIGHTS
from occflow_core.nn.sight import (
    FARTHEST,
    FLAT,
    NEAREST,
    RANGES,
    Look,
    Pixels,
    Sight,
    _evidence,
    _met,
    _step,
    _surfaces,
    filled,
    sight_losses,
)
from occflow_core.types import OCC3D, Clip, Occupancy, Prediction

SIZE, PICTURE, CLASSES = (8, 12), (64, 96), len(OCC3D.names)
CAR = OCC3D.id("car")


def wall(at=10.0, lanes=1):
    """A car as high as the world stands at x = `at`, across all of y; nothing else is."""
    labels = torch.full((lanes, *OCC3D_GRID.shape), OCC3D.free, dtype=torch.uint8)
    labels[:, int((at - OCC3D_GRID.low[0]) / OCC3D_GRID.voxel[0])] = CAR
    return Occupancy(OCC3D_GRID, OCC3D, labels, None, torch.ones_like(labels, dtype=torch.bool))


def cameras(lanes=1):
    one = Clip.of(frame(*PICTURE)).cameras[:, 0]
    return one if lanes == 1 else type(one)(*(t.repeat(lanes, 1, 1, 1) for t in matrices(one)), *PICTURE)


def matrices(c):
    return c.pixels_from_camera, c.car_from_camera


def sight(lanes=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cells = SIZE[0] * SIZE[1]
    ranges = torch.randn(lanes, 3, cells, RANGES + 1, generator=generator)
    names = torch.randn(lanes, 3, cells, CLASSES, generator=generator)
    return Sight(ranges, names, SIZE, cameras(lanes), torch.ones(lanes, 3, dtype=torch.bool))


def knowing(truth):
    """A sight that is sure of what the rays meet."""
    hit, step, label = _met(truth, 0, cameras()[0], SIZE)
    low, share = step.long(), step.frac()
    ranges = torch.full((len(hit), RANGES + 1), 1e-9)
    ranges[torch.arange(len(hit)), low] += 1 - share
    ranges[torch.arange(len(hit)), low + 1] += share
    ranges[~hit] = 1e-9
    ranges[~hit, RANGES] = 1.0
    names = 20.0 * torch.nn.functional.one_hot(torch.where(hit, label, 0), CLASSES)
    ranges, names = (t.view(1, 3, SIZE[0] * SIZE[1], -1) for t in (ranges.log(), names))
    return replace(sight(), ranges=ranges, names=names)


def view(lanes=1):
    """One instant of the same cameras, no features."""
    matrix = cameras(lanes).pixels_from_car()[:, None].float()
    rows = [[torch.zeros(3, SIZE[0] * SIZE[1], 4)] for _ in range(lanes)]
    return View(rows, (SIZE,), PICTURE, matrix, torch.ones(lanes, 1, 3, dtype=torch.bool))


def test_rays_meet_the_wall_where_it_stands():
    hit, step, label = (t.view(3, *SIZE) for t in _met(wall(), 0, cameras()[0], SIZE))
    ahead = ring(3, *PICTURE)
    for row, column in ((0, 6), (3, 0), (4, 11), (7, 5)):
        pixel = torch.tensor([[(column + 0.5) * 96 / 12, (row + 0.5) * 64 / 8]], dtype=torch.float64)
        begin = ahead[0].car_from_camera[:3, 3]
        way = ahead[0].unproject(pixel, torch.ones(1, dtype=torch.float64))[0] - begin
        meets = begin + way * (10.2 - begin[0]) / way[0]  # the middle of the wall's voxels
        inside = bool((meets > torch.tensor(OCC3D_GRID.low)).all() and (meets < torch.tensor(OCC3D_GRID.high)).all())
        assert bool(hit[0, row, column]) == inside
        if inside:
            assert label[0, row, column] == CAR
            # voxels are 0.4 m wide: their middle is 0.3 m from where the ray is there at most
            near, far = _step(meets - meets / meets[:2].norm() * 0.4), _step(meets + meets / meets[:2].norm() * 0.4)
            assert near < step[0, row, column] < far
    assert hit[0].any() and not hit[1, :, :1].any()  # the second camera looks back to the left


def test_to_know_costs_least():
    truth = wall()
    best, other = sight_losses(knowing(truth), truth), sight_losses(sight(), truth)
    assert best["pixels' names"] < 1e-4 < other["pixels' names"]
    hit, step, _ = _met(truth, 0, cameras()[0], SIZE)
    share = torch.stack([step.frac(), 1 - step.frac()])[:, hit]
    entropy = -(share * share.log()).nan_to_num().sum() / len(hit)  # of a range between two steps
    assert best["pixels' ranges"] == pytest.approx(float(0.3 * entropy), rel=1e-3)
    assert other["pixels' ranges"] > 2 * best["pixels' ranges"]


def test_names_cost_what_their_classes_weigh():
    truth, said, road = wall(), sight(), OCC3D.id("driveable_surface")
    labels = truth.labels.clone()
    labels[:, :, :, 0] = road
    truth = replace(truth, labels=labels)
    hit, _, label = _met(truth, 0, cameras()[0], SIZE)
    assert {CAR, road} == set(label[hit].tolist())
    logs = said.names[0].flatten(0, 1).log_softmax(-1)
    weighed = [(math.sqrt(NAME_WEIGHTS[OCC3D.names[k]]), -logs[i, k].item()) for i, k in enumerate(label) if hit[i]]
    expected = 0.2 * sum(w * cost for w, cost in weighed) / sum(w for w, _ in weighed)
    assert sight_losses(said, truth)["pixels' names"].item() == pytest.approx(expected, rel=1e-5)


def test_a_range_shorter_than_the_way_to_the_camera_fills_nothing():
    ranges = torch.full((1, 3, SIZE[0] * SIZE[1], RANGES + 1), -20.0)
    ranges[..., 0] = 20.0  # 1 m from the car's origin
    for at, some in ((0.5, True), (2.0, False)):  # m from there to the cameras
        poses = cameras().car_from_camera.clone()
        poses[..., :2, 3] *= at
        points, _, score = _surfaces(
            replace(sight(), ranges=ranges, cameras=replace(cameras(), car_from_camera=poses)), 0
        )
        assert bool(score.any()) == some and points.isfinite().all()


def test_a_ray_that_meets_nothing_counts_less():
    free = replace(wall(), labels=torch.full((1, *OCC3D_GRID.shape), OCC3D.free, dtype=torch.uint8))
    even = replace(sight(), ranges=torch.zeros(1, 3, SIZE[0] * SIZE[1], RANGES + 1))
    terms = sight_losses(even, free)
    assert terms["pixels' ranges"].item() == pytest.approx(0.3 * 0.3 * math.log(RANGES + 1), rel=1e-5)
    assert terms["pixels' names"] == 0


def test_lanes_are_averaged_and_unused_cameras_say_nothing():
    truth, both = wall(lanes=2), sight(lanes=2)
    together = sight_losses(both, truth)
    apart = [
        sight_losses(replace(both, ranges=both.ranges[b : b + 1], names=both.names[b : b + 1], cameras=cameras(),
                             used=both.used[:1]), wall())
        for b in range(2)
    ]  # fmt: skip
    for name, value in together.items():
        assert value == pytest.approx(float(sum(a[name] for a in apart)) / 2, rel=1e-5)
    one = sight()
    blind = replace(one, used=torch.tensor([[True, False, True]]))
    changed = replace(blind, ranges=one.ranges + torch.tensor([0, 50.0, 0])[None, :, None, None] * torch.randn(33))
    assert sight_losses(blind, wall()) == sight_losses(changed, wall())
    nobody = replace(one, ranges=one.ranges.requires_grad_(), used=torch.zeros(1, 3, dtype=torch.bool))
    terms = sight_losses(nobody, wall())
    assert all(t == 0 for t in terms.values())
    sum(terms.values()).backward()


def test_a_point_is_told_whether_it_lies_before_in_or_behind_the_wall():
    points = torch.tensor([[5.0, 0, 1.5], [10.2, 0, 1.5], [16.0, 0, 1.5], [10.2, 0, 60.0], [-10.0, 3, 1.0]])
    said = _evidence(points.view(1, 1, -1, 3), view(), knowing(wall()))[0, 0]
    here, before = said[:, 0], said[:, 1]
    assert here[1] > 0.4 and here[[0, 2]].max() < 1e-3
    assert before[0] < 1e-3 and before[2] > 0.99 and 0.3 < before[1] <= 1
    assert said[1, 5:5 + CLASSES].argmax() == CAR  # fmt: skip
    assert torch.allclose(said[:, 5 + CLASSES :], said[:, 5 : 5 + CLASSES] * here[:, None])
    assert not said[3, :2].any() and not said[3, 4:].any()  # no camera looks there


def empty():
    shape = OCC3D_GRID.shape
    labels = torch.full(shape, OCC3D.free, dtype=torch.uint8)
    return Prediction(OCC3D_GRID, OCC3D, labels, torch.zeros(shape), torch.zeros(*shape, 2))


def test_where_pixels_are_sure_of_a_surface_its_voxels_are_filled():
    before, at = empty(), int((10.0 - OCC3D_GRID.low[0]) / OCC3D_GRID.voxel[0])
    at_wall = torch.tensor([[10.2, -2.0, 1.0], [10.2, 2.0, 1.0]]), torch.tensor([[1.0, 0.0], [7.0, 2.0]])
    said = filled(before, knowing(wall()), 0, at_wall, 0.5)
    full = (said.labels != OCC3D.free).nonzero()
    assert len(full) > 40 and (full[:, 0] - at).abs().max() <= 1  # a range is told in steps, a wall in voxels
    assert (said.labels[full.unbind(1)] == CAR).all() and (said.score[full.unbind(1)] > 0.5).all()
    middle = OCC3D_GRID.shape[1] // 2
    flow = said.flow[full.unbind(1)]
    assert (flow[full[:, 1] < middle - 1] == at_wall[1][0]).all() and (flow[full[:, 1] > middle] == at_wall[1][1]).all()
    assert not said.flow[said.labels == OCC3D.free].any() and not before.flow.any()
    assert torch.equal(filled(before, knowing(wall()), 0, at_wall, 1.0).labels, before.labels)


def test_surfaces_are_read_more_densely_than_cells_lie(monkeypatch):
    dense = filled(empty(), knowing(wall()), 0, None, 0.5)
    monkeypatch.setattr("occflow_core.nn.sight.FINER", 1)
    once = filled(empty(), knowing(wall()), 0, None, 0.5)
    assert (dense.labels == CAR).sum() > 1.5 * (once.labels == CAR).sum() > 0


def test_of_pixels_that_see_one_voxel_the_surest_names_it():
    guess = replace(sight(), ranges=3 * sight().ranges, names=3 * sight(seed=1).names)
    points, label, score = _surfaces(guess, 0)
    index, inside = OCC3D_GRID.index(points)
    best = {}
    for at, name, sure in zip(index[inside].tolist(), label[inside].tolist(), score[inside].tolist(), strict=True):
        if sure > 0.3 and OCC3D.names[name] not in FLAT and sure > best.get(tuple(at), (0.0, 0))[0]:
            best[tuple(at)] = (sure, name)
    said = filled(empty(), guess, 0, None, 0.3)
    told = {tuple(at): int(said.labels[tuple(at)]) for at in (said.labels != OCC3D.free).nonzero().tolist()}
    assert told == {at: name for at, (_, name) in best.items()} and len(told) > 10
    assert all(said.score[at].item() == pytest.approx(sure) for at, (sure, _) in best.items())
    assert int((score > 0.3).sum()) > 2 * len(told)  # many see the same


def test_what_lies_flat_is_left_to_the_points():
    truth = wall()
    road = torch.where(truth.labels == CAR, OCC3D.id("driveable_surface"), truth.labels)
    assert torch.equal(filled(empty(), knowing(replace(truth, labels=road)), 0, None, 0.5).labels, empty().labels)


def test_what_points_say_stays_and_unused_cameras_fill_nothing():
    once = filled(empty(), knowing(wall()), 0, None, 0.5)
    assert not once.flow.any()
    other = replace(once, labels=torch.where(once.labels == CAR, 0, once.labels))
    assert torch.equal(filled(other, knowing(wall()), 0, None, 0.5).labels, other.labels)
    blind = replace(knowing(wall()), used=torch.zeros(1, 3, dtype=torch.bool))
    assert torch.equal(filled(empty(), blind, 0, None, 0.5).labels, empty().labels)


def test_between_two_steps_of_the_range_both_count_by_their_share():
    ranges = torch.full((1, 3, SIZE[0] * SIZE[1], RANGES + 1), 1e-9)
    ranges[..., 10], ranges[..., 11] = 0.75, 0.25
    away = NEAREST * (FARTHEST / NEAREST) ** (10.25 / (RANGES - 1))
    point = torch.tensor([[[[away, 0.0, 1.5]]]])
    assert _step(point).item() == pytest.approx(10.25, abs=1e-3)
    here, before = _evidence(point, view(), replace(sight(), ranges=ranges.log()))[0, 0, 0, :2]
    assert here.item() == pytest.approx(0.75 * 0.75 + 0.25 * 0.25, abs=1e-3)
    assert before.item() == pytest.approx(0.75 + 0.25 * 0.25, abs=1e-3)


def test_points_stay_what_their_queries_say_until_something_is_learned():
    torch.manual_seed(0)
    look = Look(4, 8, 1, CLASSES, flow=True)
    points = torch.rand(1, 5, 6, 3) * 20 - 10
    output = Output((points,), (torch.randn(1, 5, 6, CLASSES),), (torch.randn(1, 5, 6, 2),))
    look.initialise()
    same = look(output, view(), sight())
    assert torch.equal(same.logits[0], output.logits[0]) and torch.equal(same.flow[0], output.flow[0])
    torch.nn.init.normal_(look.say[-1].weight)
    other = look(output, view(), sight())
    assert not torch.equal(other.logits[0], output.logits[0]) and not torch.equal(other.flow[0], output.flow[0])
    assert other.points is output.points


def test_a_point_is_named_by_its_pixels_and_its_place():
    torch.manual_seed(0)
    look, points = Look(4, 8, 1, CLASSES, flow=False), torch.tensor([[[[8.0, 0, 1], [8.0, 2, 1], [20.0, 0, 2]]]])
    output = Output((points,), (torch.zeros(1, 1, 3, CLASSES),), None)
    empty, seen = view(), sight()
    bright = replace(empty, rows=[[torch.ones_like(rows) for rows in lane] for lane in empty.rows])
    said = look(output, bright, seen).logits[0]
    for other in (
        look(output, empty, seen),
        look(output, bright, replace(seen, ranges=seen.ranges.flip(-1))),
        look(output, bright, replace(seen, names=seen.names.flip(-1))),
    ):
        assert ((other.logits[0] - said).abs().amax(dim=-1) > 1e-4).all()
    torch.nn.init.zeros_(look.mix.weight[:, 8:])  # features alone: the same everywhere, but for the place
    said = look(output, bright, seen).logits[0][0, 0]
    assert (said[0] - said[1]).abs().max() > 1e-5 and (said[0] - said[2]).abs().max() > 1e-4


def test_each_lane_has_its_own_truth_cameras_and_pixels():
    truth, other = wall(), wall(at=20.0)
    both = replace(truth, labels=torch.cat([truth.labels, other.labels]), seen=torch.cat([truth.seen, other.seen]))
    used = torch.tensor([[True, True, True], [True, False, True]])
    one, turned = sight(), ring(3, *PICTURE).moved(torch.diag(torch.tensor([-1.0, -1, 1, 1], dtype=torch.float64)))
    two = sight(seed=3)
    pair = Sight(
        torch.cat([one.ranges, two.ranges]),
        torch.cat([one.names, two.names]),
        SIZE,
        type(turned)(*(torch.stack([a[0], b]) for a, b in zip(matrices(cameras()), matrices(turned))), *PICTURE),
        used,
    )
    alone = [Sight(pair.ranges[b:][:1], pair.names[b:][:1], SIZE, pair.cameras[b:][:1], used[b:][:1]) for b in range(2)]
    hits = [_met(both, b, pair.cameras[b][used[b]], SIZE)[0] for b in range(2)]
    told = [sight_losses(a, t) for a, t in zip(alone, (truth, other), strict=True)]
    cost = sum(t["pixels' ranges"] * len(h) for t, h in zip(told, hits, strict=True)) / sum(map(len, hits))
    assert sight_losses(pair, both)["pixels' ranges"].item() == pytest.approx(cost.item(), rel=1e-5)
    for b in range(2):
        assert torch.equal(filled(empty(), pair, b, None, 0.05).labels, filled(empty(), alone[b], 0, None, 0.05).labels)
    points = torch.rand(2, 4, 5, 3, generator=torch.Generator().manual_seed(0)) * 20 - 10
    looks = View([[torch.zeros(3, 96, 4)]] * 2, (SIZE,), PICTURE, pair.cameras.pixels_from_car()[:, None].float(),
                 used[:, None])  # fmt: skip
    for b in range(2):
        mine = replace(looks, rows=looks.rows[b:][:1], pixels_from_now=looks.pixels_from_now[b:][:1],
                       used=looks.used[b:][:1])  # fmt: skip
        assert torch.allclose(
            _evidence(points, looks, pair)[b], _evidence(points[b:][:1], mine, alone[b])[0], atol=1e-6
        )


def test_pixels_are_learned_from_rays():
    """Sixty steps on one picture of noise: its cells learn what is before them."""
    torch.manual_seed(0)
    pixels, rows, truth = Pixels(16, CLASSES), torch.randn(1, 3, SIZE[0] * SIZE[1], 16), wall()
    adam, costs = torch.optim.Adam(pixels.parameters(), 1e-2), []
    for _ in range(60):
        said = pixels(rows, SIZE, cameras(), torch.ones(1, 3, dtype=torch.bool))
        cost = sum(sight_losses(said, truth).values())
        adam.zero_grad()
        cost.backward()
        adam.step()
        costs.append(cost.item())
    assert costs[-1] < 0.2 * costs[0]
