"""mAVE and the Occ Score: both published scorers' worked numbers."""

import math

import pytest
import torch
from metrics.volumes import EYES, challenge_label, openocc_of, prediction, rays, shifted, truth

from occflow_core.metrics import FlowError, RayIou, hits, occ_score
from occflow_core.types import OPENOCC

TRUE = rays(
    [0, 0, 0, 10, 10, 7, 1, 14],
    [10, 20, 30, 5, 6, 12, 15, 40],
    [(2, 0), (2, 0), (0, 0), (0, 0), (0, 0), (0, 1), (-3, 4), (0, 0)],
)
TOLD = rays(
    [0, 0, 0, 10, 12, 7, 16, 14],
    [10.5, 21.5, 33, 5, 6, 14, 15, 43.5],
    [(2, 0.25), (1.5, 0), (5, 0), (0, 0), (0, 0), (0, 0), (0, 0), (9, 9)],
)


def test_the_worked_rays():
    error, iou = FlowError(OPENOCC), RayIou(OPENOCC)
    error.add("a", TOLD, TRUE)
    iou.add("a", TOLD, TRUE)
    got = error.result()
    assert got.classes["car"] == 0.375 == got.mave and got.rays == 2
    assert [name for name, ave in got.classes.items() if not math.isnan(ave)] == ["car"]
    assert round(occ_score(iou.result().rayiou, got.mave), 6) == 0.3225
    packaged = error.result(over="all")
    assert round(packaged.classes["car"], 6) == 3.059740
    assert round(occ_score(iou.result().rayiou, packaged.mave), 6) == 0.26


@pytest.mark.parametrize(
    ("by", "rayiou", "at", "score", "packaged"),
    [
        (0, 1, (1, 1, 1), 0.95, (1, 0.070219)),
        (1, 0.818914, (0.799226, 0.822902, 0.834613), 0.787023, (0.818712, 0.089566)),
        (2, 0.682501, (0.619671, 0.704433, 0.723398), 0.664251, (0.682185, 0.105794)),
    ],
)
def test_the_challenges_label_with_wrong_speeds(by, rayiou, at, score, packaged):
    labels = openocc_of(challenge_label()[0])

    def moving(**speeds):
        flow = torch.zeros(*labels.shape, 2)
        for name, speed in speeds.items():
            flow[labels == OPENOCC.id(name)] = torch.tensor(speed)
        return flow

    true = hits(truth(labels, OPENOCC, moving(car=(3.0, 0.0), bus=(1.0, 1.0))), EYES)
    guess = shifted(moving(car=(2.5, 0.0), bus=(1.0, 0.0)), by, 0.0)
    told = hits(prediction(shifted(labels, by, OPENOCC.free), OPENOCC, guess), EYES)
    error, iou = FlowError(OPENOCC), RayIou(OPENOCC)
    error.add("a", told, true)
    iou.add("a", told, true)
    got = iou.result()
    assert got.rays == 21_732 and round(got.rayiou, 6) == rayiou
    assert tuple(round(got.at[t], 6) for t in (1, 2, 4)) == at
    ave = error.result()
    assert [ave.classes[name] for name in ("car", "bus", "motorcycle")] == [0.5, 1.0, 0.0] and ave.mave == 0.5
    assert round(occ_score(got.rayiou, ave.mave), 6) == score
    # as the packaged scorer reads them from files
    error, iou = FlowError(OPENOCC), RayIou(OPENOCC)
    error.add("a", told.half(), true.half())
    iou.add("a", told.half(), true.half())
    assert (round(iou.result().rayiou, 6), round(error.result(over="all").mave, 6)) == packaged


def test_a_velocity_that_nobody_knows_is_counted_and_not_compared():
    true = rays([0, 0], [10, 20], [(math.nan, 0), (1, 0)])
    error = FlowError(OPENOCC)
    error.add("a", rays([0, 0], [10, 20], [(9, 0), (2, 0)]), true)
    got = error.result()
    assert (got.mave, got.rays, got.unknown) == (1.0, 1, 1)


def test_nothing_right_is_nan_and_not_zero():
    error = FlowError(OPENOCC)
    error.add("a", rays([16], [10], [(0, 0)]), rays([0], [10], [(1, 0)]))
    assert math.isnan(error.result().mave) and math.isnan(occ_score(0.5, error.result().mave))


def test_a_very_wrong_flow_costs_a_tenth_and_no_more():
    assert occ_score(0.5, 7.0) == 0.45


@pytest.mark.parametrize(
    ("told", "true", "words"),
    [
        (rays([0], [5]), rays([0], [5], [(0, 0)]), "the prediction has no flow"),
        (rays([0], [5], [(0, 0)]), rays([0], [5]), "the truth has no flow"),
        (rays([0], [5], [(math.inf, 0)]), rays([0], [5], [(0, 0)]), "not finite"),
    ],
)
def test_flows_that_cannot_be_compared_are_refused(told, true, words):
    error = FlowError(OPENOCC)
    with pytest.raises(ValueError, match=words):
        error.add("a", told, true)
    assert not error.samples
