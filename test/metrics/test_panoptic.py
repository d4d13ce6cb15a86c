"""RayPQ: the published code's worked numbers."""

import pytest
import torch
from metrics.volumes import EYES, challenge_label, prediction, rays, shifted, truth

from occflow_core.metrics import RayPq, hits
from occflow_core.types import OCC3D

FREE = OCC3D.free


def runs(*pairs):
    """(value, times) ... -> a list."""
    return [value for value, times in pairs for _ in range(times)]


def test_the_worked_forty_rays():
    true = rays(runs((4, 12), (4, 8), (11, 15), (16, 5)), [10.0] * 40, classes=OCC3D)
    far = [11.5, 11.5, *[10.0] * 18, 13.0, 13.0, *[10.0] * 18]
    told = rays(runs((4, 10), (4, 2), (10, 8), (11, 12), (17, 3), (16, 5)), far, classes=OCC3D)
    true_ids = torch.tensor(runs((1, 12), (2, 8), (3, 15), (4, 5)))
    ids = torch.tensor(runs((1, 10), (2, 2), (5, 8), (3, 12), (0, 3), (4, 5)))
    tally = RayPq(OCC3D)
    tally.add("a", told, true, ids, true_ids)
    got = tally.result()
    assert [round(got.at[t], 6) for t in (1, 2, 4)] == [0.719888, 0.807190, 0.877778]
    assert round(got.raypq, 6) == 0.801618
    assert [round(v, 6) for v in got.classes["car"]] == [0.571429, 0.833333, 0.833333]
    assert [round(v, 6) for v in got.classes["driveable_surface"]] == [0.588235, 0.588235, 0.8]
    assert got.classes["vegetation"] == (1, 1, 1)
    for name in ("car", "driveable_surface", "vegetation"):
        assert (got.matched[name], got.missed[name], got.wrong[name]) == ((1,) * 3, (0,) * 3, (0,) * 3)


def instances(labels):
    """Things: 26-connected parts of a class; one id for every other class."""
    ids, last = torch.zeros(labels.shape, dtype=torch.int64), 0
    for c in OCC3D.moving_ids:
        left = {tuple(v) for v in (labels == c).nonzero().tolist()}
        while left:
            last += 1
            edge = [left.pop()]
            while edge:
                x, y, z = edge.pop()
                ids[x, y, z] = last
                around = {(x + i, y + j, z + k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)} & left
                left -= around
                edge += around
    for c in range(FREE):
        if c not in OCC3D.moving_ids and (labels == c).any():
            last += 1
            ids[labels == c] = last
    return ids, last


@pytest.mark.parametrize(
    ("by", "raypq", "at"),
    [
        (0, 1.0, (1, 1, 1)),
        (1, 0.725686, (0.706890, 0.729806, 0.740362)),
        (2, 0.535627, (0.414681, 0.587799, 0.604400)),
    ],
)
def test_the_challenges_label_against_itself_shifted(by, raypq, at):
    labels, _ = challenge_label()
    ids, number = instances(labels)
    assert number == 21
    true, told = hits(truth(labels), EYES), hits(prediction(shifted(labels, by, FREE)), EYES)
    tally = RayPq(OCC3D)
    tally.add("a", told, true, shifted(ids, by, 0).reshape(-1)[told.voxel], ids.reshape(-1)[true.voxel])
    got = tally.result()
    assert round(got.raypq, 6) == raypq and tuple(round(got.at[t], 6) for t in (1, 2, 4)) == at


def test_segments_match_within_their_sample_only():
    one = rays([4] * 12, [10.0] * 12, classes=OCC3D)
    none = rays([11] * 12, [10.0] * 12, classes=OCC3D)
    ids, tally = torch.ones(12, dtype=torch.int64), RayPq(OCC3D)
    tally.add("a", none, one, ids, ids)
    tally.add("b", one, none, ids, ids)
    got = tally.result()
    assert got.matched["car"] == (0, 0, 0) and got.missed["car"] == got.wrong["car"] == (1, 1, 1) and got.raypq == 0


def test_an_instance_of_two_classes_is_none():
    """Its rays of a thing join those that have no instance."""
    true = rays([4] * 12 + [10] * 12, [10.0] * 24, classes=OCC3D)
    ids = torch.tensor([1] * 12 + [2] * 12)
    tally = RayPq(OCC3D)
    tally.add("a", true, true, torch.tensor([0] * 6 + [7] * 18), ids)  # 7 is half a car and a truck
    assert tally.result().raypq == 1.0


def test_segments_of_nine_rays_do_not_count_and_those_of_ten_do():
    for rays_of_it, missed in ((9, 0), (10, 1)):
        true = rays([4] * rays_of_it, [10.0] * rays_of_it, classes=OCC3D)
        told = rays([FREE] * rays_of_it, [10.0] * rays_of_it, classes=OCC3D)
        tally = RayPq(OCC3D)
        tally.add("a", told, true, torch.zeros(rays_of_it), torch.ones(rays_of_it))
        assert tally.result().missed["car"] == (missed,) * 3


def test_instances_of_other_rays_are_refused():
    one = rays([4] * 12, [10.0] * 12, classes=OCC3D)
    with pytest.raises(ValueError, match=r"instances \(3,\) and \(12,\) of 12 rays"):
        RayPq(OCC3D).add("a", one, one, torch.ones(3), torch.ones(12))
