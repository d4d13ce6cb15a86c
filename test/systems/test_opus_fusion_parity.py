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
from systems import small_fusion, small_v2
from systems.small_fusion import PARITY

from occflow_core.systems import opus_fusion
from occflow_core.systems.base import translate

STORED = np.load(Path(__file__).with_name("opus_fusion_parity.npz"))
CLOSE = 1e-5  # of numbers of the size of one


def close(mine, theirs) -> bool:
    mine = mine.detach().numpy() if isinstance(mine, torch.Tensor) else np.asarray(mine)
    return mine.shape == theirs.shape and bool((abs(mine - theirs) <= CLOSE * (1 + abs(theirs))).all())


def test_queries_points_scores_and_voxels_are_the_authors():
    begin = [opus_fusion._begin(torch.as_tensor(points), PARITY.queries) for points in small_fusion.scans()]
    assert close(torch.stack(begin), STORED["begin"])
    system = small_fusion.as_theirs()
    with torch.no_grad():
        output = small_fusion.said(system)
    for i, (points, logits) in enumerate(zip(output.points, output.logits, strict=True)):
        assert close(points, STORED[f"points {i}"]), i
        assert close(small_v2.brief(logits), STORED[f"logits {i}"]), i
    for b, prediction in enumerate(system.decode(output)):
        assert np.array_equal(prediction.labels.numpy(), STORED[f"labels {b}"])
        assert (prediction.labels != 17).sum() > 10


@torch.no_grad()
def test_without_the_published_rules_the_points_are_others():
    system, config = small_fusion.as_theirs(), replace(PARITY, as_published=False)
    for layer in system.layers:
        layer.config = layer.sampling.config = config
    output = small_fusion.said(system, config)
    assert abs(output.points[0].numpy() - STORED["points 0"]).max() > 0.01


def test_losses_and_gradients_are_the_authors():
    system = small_fusion.as_theirs().train()
    terms = system.loss(small_fusion.said(system), small_v2.truth())
    assert terms.keys() == {name.removeprefix("loss ") for name in STORED if name.startswith("loss ")}
    for name, value in terms.items():
        assert value.item() == pytest.approx(float(STORED[f"loss {name}"]), rel=1e-5), name
    sum(terms.values()).backward()
    parameters, compared = dict(system.named_parameters()), set()
    for name in STORED:
        if name.startswith("gradient "):
            ours = translate(name.removeprefix("gradient "), opus_fusion.NAMES)[1]
            mixed = parameters[ours].grad.flatten().numpy() @ np.random.RandomState(4).standard_normal(
                (parameters[ours].numel(), 2)
            )
            assert close(mixed, STORED[name]), name
            compared.add(ours)
    assert compared == {name for name in parameters if name.startswith("layers.")}
