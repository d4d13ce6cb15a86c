"""mIoU counts as the published code does: its worked numbers, and what may not pass in silence."""

import math

import pytest
import torch
from metrics.volumes import challenge_label, openocc_of, prediction, shifted, truth

from occflow_core.geometry import Grid
from occflow_core.metrics import Miou, miou
from occflow_core.types import OCC3D, OPENOCC

FREE = OCC3D.free


@pytest.fixture(params=["definition", "numba"], autouse=True)
def count(request, monkeypatch):
    """Runs a test with each implementation."""
    if request.param == "numba":
        pytest.importorskip("numba", reason="the compiled count needs numba: pip install numba")
    else:
        monkeypatch.setattr(miou, "_numba", lambda: None)


def scored(told, true, **arguments):
    tally = Miou(OCC3D)
    tally.add("a", told, true)
    return tally.result(**arguments)


@pytest.mark.parametrize("absent", ["zero", "skip"])
def test_the_worked_row_of_eight_voxels(absent):
    true = truth([11, 11, 11, 4, 4, 17, 17, 255])
    got = scored(prediction([11, 11, 4, 4, 17, 17, 4, 11]), true, absent=absent)
    assert got.classes["car"] == 1 / 4 and got.classes["driveable_surface"] == 2 / 3 and got.free == 1 / 3
    assert round(100 * got.miou, 4) == 45.8333
    assert got.voxels == 7 and got.unlabelled == 1
    assert got.moving == 1 / 4 and got.static == 2 / 3
    assert got.occupied == 4 / 6


@pytest.mark.parametrize(
    ("by", "seen", "everywhere"), [(0, 100, 100), (1, 67.261173, 54.629998), (2, 58.085713, 45.973164)]
)
def test_the_challenges_label_against_itself_shifted(by, seen, everywhere):
    labels, mask = challenge_label()
    tally = Miou(OCC3D)
    tally.add("a", prediction(shifted(labels, by, FREE)), truth(labels, seen=mask))
    assert 100 * tally.result().miou == pytest.approx(seen, abs=5e-7)
    assert 100 * tally.result("all").miou == pytest.approx(everywhere, abs=5e-7)
    assert tally.result().voxels == 43355 and tally.result("unseen").voxels == 640_000 - 43355


def test_the_two_published_codes_differ_in_a_class_that_the_truth_never_has():
    labels, mask = challenge_label()
    cars_as_trucks = torch.where(labels == OCC3D.id("car"), OCC3D.id("truck"), labels)
    tally = Miou(OCC3D)
    tally.add("a", prediction(cars_as_trucks), truth(labels, seen=mask))
    assert 100 * tally.result().miou == pytest.approx(81.818182, abs=5e-7)  # the challenge's, the default
    assert 100 * tally.result(absent="skip").miou == pytest.approx(90.0, abs=1e-9)


def test_openocc_is_scored_without_masks_over_its_sixteen_classes():
    labels = openocc_of(challenge_label()[0])
    tally = Miou(OPENOCC)
    tally.add("a", prediction(labels, OPENOCC), truth(labels, OPENOCC))
    got = tally.result()
    assert got.miou == 1.0 and got.voxels == 640_000 and len(got.classes) == 16


def test_rings_part_the_voxels_by_their_distance_over_ground():
    grid = Grid((0, 0, 0), (10, 10, 1), (5, 1, 1))  # middles 5, 15, 25, 35, 45 m ahead, and 5 m aside
    true, told = truth([4, 4, 4, 4, 4], grid=grid), prediction([4, FREE, 4, 4, FREE], grid=grid)
    assert scored(told, true).rings == {"0-20 m": 1 / 2, "20-40 m": 1.0, "beyond 40 m": 0.0}


def test_visibility_parts_the_voxels():
    seen = torch.tensor([True, True, False, False, False])[:, None, None]
    true, told = truth([4, 4, 4, 4, 4], seen=seen), prediction([4, FREE, 4, 4, FREE])
    assert [scored(told, true, where=where).miou for where in ("seen", "unseen", "all")] == [1 / 2, 2 / 3, 3 / 5]


def test_counts_go_over_all_samples_before_one_division():
    tally = Miou(OCC3D)
    tally.add("a", prediction([4, 4, 4]), truth([4, 4, 4]))
    tally.add("b", prediction([4]), truth([FREE]))
    assert tally.result().miou == 3 / 4  # and not the mean of 1 and 0


def test_a_random_volume_is_counted_as_a_slow_loop_does():
    rng = torch.Generator().manual_seed(1)
    shape = (20, 30, 5)
    true, told = (torch.randint(0, FREE + 1, shape, generator=rng, dtype=torch.uint8) for _ in range(2))
    seen = torch.rand(shape, generator=rng) < 0.5
    got = scored(prediction(told), truth(true, seen=seen))
    for c, name in enumerate(OCC3D.names):
        t, p = (true == c) & seen, (told == c) & seen
        assert got.classes[name] == pytest.approx(((t & p).sum() / (t | p).sum()).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("told", "true", "words"),
    [
        (prediction([4, 18]), truth([4, 4]), "predicted label 18, expected 0 to 17"),
        (prediction([4, 4]), truth([4, 18]), "true labels beyond 17"),
        (prediction([4, 4]), truth([4, 4, 4]), "not the same volume"),
        (prediction([4, 4]), truth([4, 4], grid=Grid((1, 0, 0), (0.4, 0.4, 0.4), (2, 1, 1))), "not the same volume"),
        (prediction([4, 4], OPENOCC), truth([4, 4]), "openocc-v2 cannot be scored by Miou of occ3d-nuscenes"),
        (prediction([4, 4]), truth([4, 4], OPENOCC), "must share one table"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence_and_not_counted(told, true, words):
    tally = Miou(OCC3D)
    with pytest.raises(ValueError, match=words):
        tally.add("a", told, true)
    tally.add("a", prediction([4]), truth([4]))
    assert tally.result().voxels == 1


def test_a_sample_cannot_be_scored_twice_and_nothing_cannot_be_told():
    tally = Miou(OCC3D)
    with pytest.raises(ValueError, match="no sample"):
        tally.result()
    tally.add("a", prediction([4]), truth([4]))
    with pytest.raises(ValueError, match="sample a is scored twice"):
        tally.add("a", prediction([4]), truth([4]))
    assert tally.result().voxels == 1
    assert tally.missing(["c", "a", "b"]) == ["c", "b"]


def test_a_truth_without_a_filled_voxel_is_counted():
    tally = Miou(OCC3D)
    tally.add("a", prediction([FREE, 4]), truth([FREE, FREE]))
    tally.add("b", prediction([FREE, 4]), truth([FREE, 4]))
    assert tally.result().empty == 1
    assert math.isnan(tally.result("unseen").miou), "no voxel is not zero"
