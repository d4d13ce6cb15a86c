"""The whole decoder of OPUS-V2 beside the authors' own, with their numbers.

`opus_v2_parity.npz` holds what their `OPUSV2Transformer` and `OPUSV2Head` (github.com/w1394945493/OPUS, a fork that
holds the authors' history, at 216dc539) said on a CPU in float64: weights of `small_v2.authors_checkpoint` loaded by
name, inputs of `small_v2.seen` and `truth`; first as in tests, then as in training, without dropout. mmcv's and mmdet's
parts (attention, feed-forward block, losses, nearest neighbours), torch-scatter and spconv were replaced by what they
compute, the last by dense convolutions masked to the dilated voxels. `small_v2.brief` shortens the rows, and gradients
are mixed down to two numbers each.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from systems import small_v2
from systems.small_v2 import PARITY

from occflow_core.systems import opus_v2
from occflow_core.systems.base import translate

STORED = np.load(Path(__file__).with_name("opus_v2_parity.npz"))
CLOSE = 1e-5  # of numbers of the size of one


def close(mine, theirs) -> bool:
    mine = mine.detach().numpy() if isinstance(mine, torch.Tensor) else np.asarray(mine)
    return mine.shape == theirs.shape and bool((abs(mine - theirs) <= CLOSE * (1 + abs(theirs))).all())


@torch.no_grad()
def said(**changes) -> opus_v2.Output:
    system = small_v2.build(PARITY)
    config = replace(PARITY, **changes)
    system.config = config
    for layer in system.layers:
        layer.config = layer.sampling.config = config
    return system.double().look(small_v2.view())


def test_points_voxels_and_scores_are_the_authors():
    output = said()
    for i, points in enumerate(output.points):
        assert close(points, STORED[f"points {i}"]), i
    (voxels,) = output.voxels
    assert np.array_equal(voxels.sites.numpy(), STORED["sites"])
    assert close(small_v2.brief(voxels.logits), STORED["logits"])
    for b, prediction in enumerate(small_v2.build(PARITY).decode(output)):
        assert np.array_equal(prediction.labels.numpy(), STORED[f"labels {b}"])
        assert 100 < (prediction.labels != 17).sum() < 2000


def test_without_the_published_rules_the_points_are_others():
    """Level weights by their own group, cells that tile the picture, and nothing from where no camera looks."""
    output = said(as_published=False)
    assert abs(output.points[0].numpy() - STORED["points 0"]).max() > 0.01


def test_losses_and_gradients_are_the_authors():
    system, truth = small_v2.build(PARITY).double().train(), small_v2.truth()
    output = system.look(small_v2.view())
    for i, voxels in enumerate(output.voxels):
        assert np.array_equal(voxels.sites.numpy(), STORED[f"sites {i}"])
        assert close(small_v2.brief(voxels.logits), STORED[f"logits {i}"])
    terms = system.loss(output, truth)
    assert terms.keys() == {name.removeprefix("loss ") for name in STORED if name.startswith("loss ")}
    for name, value in terms.items():
        assert value.item() == pytest.approx(float(STORED[f"loss {name}"]), rel=1e-5), name
    sum(terms.values()).backward()
    parameters, compared = dict(system.named_parameters()), set()
    for name in STORED:
        if name.startswith("gradient "):
            ours = translate(name.removeprefix("gradient "), opus_v2.NAMES)[1]
            mixed = parameters[ours].grad.flatten().numpy() @ np.random.RandomState(4).standard_normal(
                (parameters[ours].numel(), 2)
            )
            assert close(mixed, STORED[name]), name
            compared.add(ours)
    assert compared == {name for name in parameters if not name.startswith(("backbone.", "neck."))}
