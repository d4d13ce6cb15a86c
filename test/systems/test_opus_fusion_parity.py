"""The whole decoder of OPUS-V1-Fusion beside the authors' own, with their numbers.

`opus_fusion_parity.npz` holds what their `OPUSV1FusionTransformer` and `OPUSV1FusionHead` (github.com/w1394945493/OPUS,
a fork that holds the authors' history, at 216dc539) said on a CPU in float64: weights of
`small_fusion.authors_checkpoint` loaded by name, inputs of `small_v2.seen` and `truth` and of `small_fusion.scans` and
`above`; first as in tests, lane by lane where they make voxels, then as in training, without dropout. mmcv's, mmdet's
and mmdet3d's parts (attention, feed-forward block, losses, nearest neighbours, farthest points, the first ten points of
a voxel) were replaced by what they compute. The branch that makes the map is held to dense convolutions in
`test/nn/test_lidar.py`. `small_v2.brief` shortens the rows, and gradients are mixed down to two numbers each.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from systems import parity, small_fusion, small_v2
from systems.parity import close
from systems.small_fusion import PARITY
from torch.nn import functional as F

from occflow_core import ops
from occflow_core.nn import decoder, points
from occflow_core.systems import opus_fusion

STORED = np.load(Path(__file__).with_name("opus_fusion_parity.npz"))


def are_theirs(output: opus_fusion.Output) -> bool:
    layers = enumerate(zip(output.points, output.logits, strict=True))
    return all(
        close(where, STORED[f"points {i}"]) and close(small_v2.brief(logits), STORED[f"logits {i}"])
        for i, (where, logits) in layers
    )


def begin() -> torch.Tensor:
    return torch.stack([opus_fusion._begin(torch.as_tensor(scan), PARITY.queries) for scan in small_fusion.scans()])


@torch.no_grad()
def test_queries_points_scores_and_voxels_are_the_authors():
    assert close(begin(), STORED["begin"])
    system = small_fusion.as_theirs()
    output = small_fusion.said(system)
    assert are_theirs(output)
    for b, prediction in enumerate(system.decode(output)):
        assert np.array_equal(prediction.labels.numpy(), STORED[f"labels {b}"])
        assert (prediction.labels != 17).sum() > 10


@torch.no_grad()
@pytest.mark.parametrize("rule", parity.RULES)
def test_without_a_published_rule_the_points_are_others(rule, monkeypatch):
    system = small_fusion.as_theirs()
    parity.without(rule, monkeypatch, system.layers, decoder)
    output = small_fusion.said(system)
    assert not are_theirs(output)
    assert max(abs(mine.numpy() - STORED[f"points {i}"]).max() for i, mine in enumerate(output.points)) > 1e-3


@torch.no_grad()
def test_without_the_maps_outer_cells_on_the_grids_border_they_are_others(monkeypatch):
    look = F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda *given, **how: look(*given, **how | {"align_corners": False}))
    assert not are_theirs(small_fusion.said(small_fusion.as_theirs()))


@torch.no_grad()
def test_the_published_sampling_in_few_words_gives_the_authors_points_too(monkeypatch):
    monkeypatch.setattr(ops, "sample", lambda *given: parity.sampled(*given[:-1]))
    assert are_theirs(small_fusion.said(small_fusion.as_theirs()))


def test_another_first_point_would_begin_elsewhere(monkeypatch):
    farthest = ops.farthest
    monkeypatch.setattr(ops, "farthest", lambda points, count: (farthest(points.roll(1, 0), count) - 1) % len(points))
    assert not close(begin(), STORED["begin"])


# ---- losses


def wrong(terms) -> set[str]:
    return parity.wrong(terms, STORED)


def test_losses_and_gradients_are_the_authors():
    system = small_fusion.as_theirs().train()
    terms = system.loss(small_fusion.said(system), small_v2.truth())
    assert not wrong(terms)
    sum(terms.values()).backward()
    compared, unequal = parity.gradients(system, STORED, opus_fusion.NAMES)
    assert not unequal
    assert compared == {name for name, _ in system.named_parameters() if name.startswith("layers.")}


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
    system = small_fusion.as_theirs()
    terms = system.loss(small_fusion.said(system), small_v2.truth())
    assert {term.split()[0] for term in wrong(terms)} == {which}


@torch.no_grad()
def test_so_would_eyes_everywhere():
    system, truth = small_fusion.as_theirs(), small_v2.truth()
    terms = system.loss(small_fusion.said(system), replace(truth, seen=torch.ones_like(truth.seen)))
    assert {term.split()[0] for term in wrong(terms)} == {"points"}
