"""The whole decoder of OPUS V1 beside the authors' own, with their numbers.

`opus_parity.npz` holds what their `OPUSTransformer` and `OPUSHead` (github.com/jbwang1997/OPUS at dde42095) said on a
CPU in float64: weights of `small.authors_checkpoint` loaded by name, inputs of `small_v2.seen` and `truth`; first as
in tests, lane by lane where they make voxels; then as in training, without dropout. Votes and losses are also those of
`small_v1.crowd`. mmcv's and mmdet's parts (attention, feed-forward block, losses, nearest neighbours, the first ten
points of a voxel) were replaced by what they compute; pictures were looked into by their own PyTorch, not by their
kernel. `small_v2.brief` shortens the rows, and gradients are mixed down to two numbers each.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from systems import parity, small_v1, small_v2
from systems.parity import close
from systems.small_v1 import PARITY

from occflow_core import ops
from occflow_core.nn import decoder, points, voxels
from occflow_core.systems import opus

STORED = np.load(Path(__file__).with_name("opus_parity.npz"))


def are_theirs(output: opus.Output) -> bool:
    layers = enumerate(zip(output.points, output.logits, strict=True))
    return all(
        close(where, STORED[f"points {i}"]) and close(small_v2.brief(logits), STORED[f"logits {i}"])
        for i, (where, logits) in layers
    )


@torch.no_grad()
def test_points_scores_and_voxels_are_the_authors():
    system = small_v1.as_theirs()
    output = small_v1.said(system)
    assert are_theirs(output)
    for b, prediction in enumerate(system.decode(output)):
        assert np.array_equal(prediction.labels.numpy(), STORED[f"labels {b}"])
        assert (prediction.labels != 17).sum() > 10


@torch.no_grad()
@pytest.mark.parametrize("rule", parity.RULES)
def test_without_a_published_rule_the_points_are_others(rule, monkeypatch):
    system = small_v1.as_theirs()
    parity.without(rule, monkeypatch, system.layers, decoder)
    output = small_v1.said(system)
    assert not are_theirs(output)
    assert max(abs(mine.numpy() - STORED[f"points {i}"]).max() for i, mine in enumerate(output.points)) > 1e-3


@torch.no_grad()
def test_the_published_sampling_in_few_words_gives_the_authors_points_too(monkeypatch):
    monkeypatch.setattr(ops, "sample", lambda *given: parity.sampled(*given[:-1]))
    assert are_theirs(small_v1.said(small_v1.as_theirs()))


# ---- votes


def voted(config=PARITY, backwards=False) -> list[np.ndarray]:
    """The labels of the crowd."""
    where, logits = (torch.as_tensor(numbers) for numbers in small_v1.crowd())
    if backwards:
        where, logits = where.flip(1), logits.flip(1)
    output = opus.Output((where,), (logits,), None)
    return [prediction.labels.numpy() for prediction in decoder.predictions(output, config)]


def are_their_votes(labels) -> bool:
    return all(np.array_equal(mine, STORED[f"crowd {b}"]) for b, mine in enumerate(labels))


def test_the_votes_of_a_crowd_are_the_authors():
    labels = voted()
    assert are_their_votes(labels) and all(500 < (mine != 17).sum() < 1500 for mine in labels)


@pytest.mark.parametrize("far", [1.0, 1e9])
def test_points_far_from_their_query_would_change_them(monkeypatch, far):
    monkeypatch.setattr(voxels, "CENTRE_DISTANCE", far)
    assert not are_their_votes(voted())


@pytest.mark.parametrize("cap", [9, 11, 10**6])
def test_another_number_of_points_that_count_would_change_them(monkeypatch, cap):
    monkeypatch.setattr(voxels, "CAP", cap)
    assert not are_their_votes(voted())


def test_so_would_other_ten_points_another_threshold_and_gaps_left_open():
    assert not are_their_votes(voted(backwards=True))
    assert not are_their_votes(voted(replace(PARITY, threshold=0.4)))
    assert not are_their_votes(voted(replace(PARITY, closing=False)))


# ---- losses


def terms_of(system: opus.Opus, truth=None) -> dict[str, torch.Tensor]:
    return system.loss(small_v1.said(system), truth or small_v2.truth())


def wrong(terms) -> set[str]:
    return parity.wrong(terms, STORED)


def test_losses_and_gradients_are_the_authors():
    system = small_v1.as_theirs().train()
    terms = terms_of(system)
    assert not wrong(terms)
    sum(terms.values()).backward()
    compared, unequal = parity.gradients(system, STORED, opus.NAMES)
    assert not unequal
    assert compared == {name for name, _ in system.named_parameters() if not name.startswith(("backbone.", "neck."))}


@pytest.mark.parametrize(
    ("name", "value", "which"),
    [
        ("NEAR", 2.0, "points"),
        ("FAR_WEIGHT", 1.0, "points"),
        ("RARE_WEIGHT", 5.0, "points"),
        ("BETA", 1.0, "points"),
        ("POINTS_WEIGHT", 1.0, "points"),
        ("NAMES_WEIGHT", 1.0, "names"),
        ("NAME_WEIGHTS", dict.fromkeys(points.NAME_WEIGHTS, 5.0), "names"),
    ],
)
@torch.no_grad()
def test_another_number_in_the_losses_would_change_them(monkeypatch, name, value, which):
    monkeypatch.setattr(points, name, value)
    assert {term.split()[0] for term in wrong(terms_of(small_v1.as_theirs()))} == {which}


@pytest.mark.parametrize("near, same", [(points.NEAR, True), (0.17, False), (0.23, False)])
def test_a_crowd_costs_what_it_costs_the_authors_and_near_is_a_fifth_of_a_metre(monkeypatch, near, same):
    monkeypatch.setattr(points, "NEAR", near)
    where, logits = (torch.as_tensor(numbers) for numbers in small_v1.crowd())
    terms = small_v1.as_theirs().loss(opus.Output((where,), (logits,), None), small_v2.truth())
    assert terms["names 0"].item() == pytest.approx(float(STORED["crowd loss names"]), rel=parity.CLOSE)
    assert (terms["points 0"].item() == pytest.approx(float(STORED["crowd loss points"]), rel=parity.CLOSE)) == same


@torch.no_grad()
def test_so_would_no_price_of_distance_and_eyes_everywhere(monkeypatch):
    truth = small_v2.truth()
    seen = replace(truth, seen=torch.ones_like(truth.seen))
    assert {term.split()[0] for term in wrong(terms_of(small_v1.as_theirs(), seen))} == {"points"}
    made = points.Target.of

    def flat(truth, lane):
        target = made(truth, lane)
        return replace(target, distance=torch.ones_like(target.distance))

    monkeypatch.setattr(points.Target, "of", staticmethod(flat))
    assert {term.split()[0] for term in wrong(terms_of(small_v1.as_theirs()))} == {"names"}
