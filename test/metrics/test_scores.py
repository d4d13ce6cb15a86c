"""Tallies: the sum of parts is the whole, bit for bit; what is stored comes back; one sample, one voice."""

import json
import math
from dataclasses import replace

import pytest
import torch
from metrics.volumes import prediction, rays, truth

from occflow_core.geometry import Grid
from occflow_core.metrics import RayPq, Scores, hits
from occflow_core.metrics.scores import total
from occflow_core.types import OCC3D, OPENOCC

GRID = Grid((-8, -8, -1), (0.4, 0.4, 0.4), (40, 40, 16))
EYES = torch.tensor([[0.0, 0.0, 1.8], [1.0, 0.0, 1.8]], dtype=torch.float64)


def sample(seed, flow=True):
    """A random truth and a prediction that is partly right."""
    rng = torch.Generator().manual_seed(seed)
    empty = torch.rand(GRID.shape, generator=rng) < 0.97
    labels = torch.where(empty, OPENOCC.free, torch.randint(0, 16, GRID.shape, generator=rng)).to(torch.uint8)
    wrong = torch.rand(GRID.shape, generator=rng) < 0.2
    told = torch.where(wrong & ~empty, torch.randint(0, 17, GRID.shape, generator=rng), labels).to(torch.uint8)
    flows = [torch.randn(*GRID.shape, 2, generator=rng) for _ in range(2)]
    flows[0][torch.rand(GRID.shape, generator=rng) < 0.1] = math.nan
    seen = torch.rand(GRID.shape, generator=rng) < 0.5
    return prediction(told, OPENOCC, flows[1] if flow else None, GRID), truth(labels, OPENOCC, flows[0], seen, GRID)


def scored(seeds, flow=True, panoptic=False):
    scores = Scores(OPENOCC)
    for seed in seeds:
        volumes = sample(seed, flow)
        scores.add(f"sample {seed}", *(map(numbered, volumes) if panoptic else volumes), EYES)
    return scores


def numbered(volume):
    """With instances: blocks of two metres, told apart by their class."""
    x, y, _ = torch.meshgrid(*(torch.arange(n) // 5 for n in GRID.shape), indexing="ij")
    ids = (1 + volume.labels.long() + 20 * (x + 8 * y)) * (volume.labels != OPENOCC.free)
    return replace(volume, instances=ids.int())


def test_any_split_and_order_gives_the_same_bits():
    whole = scored(range(6), panoptic=True).result()
    assert 0.1 < whole["RayIoU"] < 1 and whole["mAVE"] > 0 and 0 < whole["OccScore"] < 1, "the test must say something"
    assert 0.1 < whole["RayPQ"] < 1
    for parts in ([[5, 0, 3], [1, 4, 2]], [[2], [], [0, 1, 5, 4, 3]]):
        again = total([scored(part, panoptic=True) for part in parts], OPENOCC).result()
        assert json.dumps(again) == json.dumps(whole)


def test_stored_tallies_go_on_where_they_ended():
    whole = scored(range(4), panoptic=True)
    half = Scores.from_json(json.loads(json.dumps(scored(range(2), panoptic=True).to_json())))
    for seed in (2, 3):
        half.add(f"sample {seed}", *map(numbered, sample(seed)), EYES)
    assert json.dumps(half.to_json()) == json.dumps(whole.to_json())
    assert half.result() == whole.result()


def test_truth_against_truth_is_a_hundred_percent():
    scores = Scores(OPENOCC)
    _, true = sample(0)
    known = true.flow.nan_to_num()
    told = prediction(true.labels, OPENOCC, known, GRID)
    true = truth(true.labels, OPENOCC, known, true.seen, GRID)
    scores.add("a", numbered(told), numbered(true), EYES)
    got = scores.result()
    assert got["mIoU"] == got["RayIoU"] == got["OccScore"] == got["RayPQ"] == 1.0 and got["mAVE"] == 0.0


def test_raypq_is_told_of_what_the_rays_met_where_both_have_instances():
    told, true = map(numbered, sample(0))
    both, by_hand = Scores(OPENOCC), RayPq(OPENOCC)
    both.add("a", told, true, EYES)
    met, stops = hits(told, EYES), hits(true, EYES)
    by_hand.add("a", met, stops, told.instances.flatten()[met.voxel], true.instances.flatten()[stops.voxel])
    got, expected = both.result(), by_hand.result()
    assert got["RayPQ"] == expected.raypq and got["panoptic"]["missed"]["car"] == list(expected.missed["car"])
    for one, other in ((replace(told, instances=None), true), (told, replace(true, instances=None))):
        alone = Scores(OPENOCC)
        alone.add("a", one, other, EYES)
        assert "RayPQ" not in alone.result() and "panoptic" not in alone.result()
        assert alone.result()["RayIoU"] == got["RayIoU"]


def test_a_truth_that_was_cast_before_gives_the_same():
    told, true = sample(1)
    one, other = Scores(OPENOCC), Scores(OPENOCC)
    one.add("a", told, true, EYES)
    other.add("a", told, true, EYES, hits(true, EYES))
    assert one.to_json() == other.to_json()


def test_a_prediction_without_flow_is_counted_and_has_no_occ_score():
    got = scored(range(2), flow=False).result()
    assert got["samples without predicted flow"] == 2 and "mAVE" not in got and "OccScore" not in got


def test_a_sample_may_stand_in_one_part_only():
    with pytest.raises(ValueError, match="1 samples stand in both, among them sample 1"):
        scored([0, 1]) + scored([1, 2])
    with pytest.raises(ValueError, match="count different things"):
        scored([0]) + Scores(OCC3D)
    with pytest.raises(ValueError, match="sample 0 is scored twice"):
        scored([0, 0])


def test_a_refused_sample_leaves_everything_as_it_was():
    told, true = sample(0)
    scores = scored([1])
    before = json.dumps(scores.to_json())
    beyond = told.labels.clone()
    beyond[0, 0, 0] = 30
    bad_flow = told.flow.clone()
    bad_flow[0, 0, 0] = math.nan
    other = truth(true.labels, OPENOCC, true.flow, true.seen, Grid((0, -8, -1), (0.4, 0.4, 0.4), GRID.shape))
    for wrong, against, words in (
        (prediction(beyond, OPENOCC, told.flow, GRID), true, "predicted label 30"),
        (prediction(told.labels, OPENOCC, bad_flow, GRID), true, "not finite"),
        (prediction(told.labels, OCC3D, told.flow, GRID), true, "share one table"),
        (told, other, "not the same volume"),
    ):
        with pytest.raises(ValueError, match=words):
            scores.add("bad", wrong, against, EYES)
        assert json.dumps(scores.to_json()) == before


def test_the_panoptic_tally_too_is_the_sum_of_its_parts():
    def tally(*seeds):
        out = RayPq(OCC3D)
        for seed in seeds:
            rng = torch.Generator().manual_seed(seed)
            labels, ids = (torch.randint(3, 6, (2, 300), generator=rng).numpy() for _ in range(2))
            distance = (torch.rand(300, generator=rng) * 5).tolist()
            true, told = rays(labels[0], [2.0] * 300, classes=OCC3D), rays(labels[0], distance, classes=OCC3D)
            out.add(str(seed), told, true, *torch.from_numpy(ids))
        return out

    whole = tally(0, 1, 2)
    assert repr(whole.result()) == repr((tally(2) + tally(1, 0)).result())
    stored = RayPq.from_json(json.loads(json.dumps(whole.to_json())))
    assert repr(stored.result()) == repr(whole.result()) and stored.to_json() == whole.to_json()


@pytest.mark.parametrize("change", [{"miou": {}}, {"rayiou": None}, {"raypq": None}, {"without_flow": None}])
def test_what_is_no_stored_tally_is_refused(change):
    with pytest.raises(ValueError, match="tall"):
        Scores.from_json(scored([0]).to_json() | change)
