"""The whole decoder of OPUS-V2 beside the authors' own, with their numbers.

`opus_v2_parity.npz` holds what their `OPUSV2Transformer` and `OPUSV2Head` (github.com/w1394945493/OPUS, a fork that
holds the authors' history, at 216dc539) said on a CPU in float64: weights of `small_v2.authors_checkpoint` loaded by
name, inputs of `small_v2.seen` and `truth`; first as in tests, there also with every logit lower by `small_v2.FAINT`;
then as in training, without dropout. mmcv's and mmdet's parts (attention, feed-forward block, losses, nearest
neighbours), torch-scatter and spconv were replaced by what they compute, the last by dense convolutions masked to the
dilated voxels. `small_v2.brief` shortens the rows, and gradients are mixed down to two numbers each.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from systems import parity, small_v2
from systems.parity import close
from systems.small_v2 import PARITY

from occflow_core import ops
from occflow_core.nn import points
from occflow_core.systems import opus_v2

STORED = np.load(Path(__file__).with_name("opus_v2_parity.npz"))


def made() -> opus_v2.OpusV2:
    return small_v2.build(PARITY).double()


@torch.no_grad()
def said(system: opus_v2.OpusV2) -> opus_v2.Output:
    return system.answer(small_v2.view())


def points_are_theirs(output: opus_v2.Output) -> bool:
    return all(close(points, STORED[f"points {i}"]) for i, points in enumerate(output.points))


def names_are_theirs(voxels: opus_v2.Voxels, ending="") -> bool:
    same = np.array_equal(voxels.sites.numpy(), STORED["sites" + ending])
    return same and close(small_v2.brief(voxels.logits), STORED["logits" + ending])


def test_points_voxels_and_scores_are_the_authors():
    output = said(made())
    assert points_are_theirs(output) and len(output.voxels) == 1 and names_are_theirs(output.voxels[0])
    for b, prediction in enumerate(made().decode(output)):
        assert np.array_equal(prediction.labels.numpy(), STORED[f"labels {b}"])
        assert 100 < (prediction.labels != 17).sum() < 2000


@pytest.mark.parametrize("rule", [rule for rule in parity.RULES if rule != parity.ALONE])
def test_without_a_published_rule_the_points_are_others(rule, monkeypatch):
    system = made()
    parity.without(rule, monkeypatch, system.layers, opus_v2)
    output = said(system)
    assert not points_are_theirs(output)
    assert max(abs(mine.numpy() - STORED[f"points {i}"]).max() for i, mine in enumerate(output.points)) > 1e-3


def test_without_the_spread_of_a_metre_that_one_point_has_they_are_others():
    system = made()
    for layer in system.layers[:2]:  # PARITY's refines: one point comes into either
        torch.nn.init.zeros_(layer.sampling.prototype.weight)
    assert not points_are_theirs(said(system))


def test_the_published_sampling_in_few_words_gives_the_authors_points_too(monkeypatch):
    monkeypatch.setattr(ops, "sample", lambda *given: parity.sampled(*given[:-1]))
    assert points_are_theirs(said(made()))


# ---- points -> voxels


def stays_where_it_is(sites, shape, kernel, padding):
    return sites, shape, ops.submanifold_taps(sites, shape, kernel)


def test_without_voxels_around_those_of_points_names_are_others(monkeypatch):
    monkeypatch.setattr(ops, "regular_taps", stays_where_it_is)
    assert not names_are_theirs(said(made()).voxels[0])


@pytest.mark.parametrize("name, value", [("eps", 1e-5), ("momentum", 0.1), ("training", True)])
def test_norms_of_voxels_are_as_published(name, value):
    """A thousandth keeps them from blowing up; they forget one in a hundred; in tests they know what they learned."""
    system = made()
    for densifier in system.densifiers:
        for pool in densifier.pools:
            assert getattr(pool.norm, name) != value
            setattr(pool.norm, name, value)
    assert names_are_theirs(said(system).voxels[0]) == (name == "momentum")


@pytest.mark.parametrize("threshold", [0.2, 0.25, 0.3])
def test_voxels_that_are_hardly_sure_of_something_are_the_authors_with_their_threshold_alone(threshold):
    system = made()
    output = said(system)
    (voxels,) = output.voxels
    output = replace(output, voxels=(replace(voxels, logits=voxels.logits - small_v2.FAINT),))
    system.config = replace(PARITY, threshold=threshold)
    labels = [prediction.labels.numpy() for prediction in system.decode(output)]
    assert all(1 < (mine != 17).sum() < 336 for mine in labels)  # neither none nor all
    same = all(np.array_equal(mine, STORED[f"faint labels {b}"]) for b, mine in enumerate(labels))
    assert same == (threshold == PARITY.threshold)


# ---- losses


def wrong(terms) -> set[str]:
    return parity.wrong(terms, STORED)


def test_losses_and_gradients_are_the_authors():
    system = made().train()
    output = system.answer(small_v2.view())
    assert all(names_are_theirs(voxels, f" {i}") for i, voxels in enumerate(output.voxels))
    terms = system.loss(output, small_v2.truth())
    assert not wrong(terms)
    sum(terms.values()).backward()
    compared, unequal = parity.gradients(system, STORED, opus_v2.NAMES)
    assert not unequal
    assert compared == {name for name, _ in system.named_parameters() if not name.startswith(("backbone.", "neck."))}


@pytest.mark.parametrize(
    ("home", "name", "value", "which"),
    [
        (points, "NEAR", 2.0, "points"),
        (points, "FAR_WEIGHT", 1.0, "points"),
        (points, "RARE_WEIGHT", 5.0, "points"),
        (points, "BETA", 1.0, "points"),
        (points, "POINTS_WEIGHT", 1.0, "points"),
        (opus_v2, "RARE_NUMBERS", (0, 2, 5), "points"),
        (opus_v2, "NAMES_WEIGHT", 1.0, "names"),
        (opus_v2, "NAME_WEIGHTS", dict.fromkeys(points.NAME_WEIGHTS, 5.0), "names"),
    ],
)
def test_another_number_in_the_losses_would_change_them(monkeypatch, home, name, value, which):
    system = made().train()
    output = system.answer(small_v2.view())
    monkeypatch.setattr(home, name, value)
    assert {term.split()[0] for term in wrong(system.loss(output, small_v2.truth()))} == {which}


def test_so_would_eyes_everywhere_for_points_but_not_for_names():
    system, truth = made().train(), small_v2.truth()
    output = system.answer(small_v2.view())
    terms = system.loss(output, replace(truth, seen=torch.ones_like(truth.seen)))
    assert {term.split()[0] for term in wrong(terms)} == {"points"}
