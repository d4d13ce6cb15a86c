import math

import pytest
import torch
from torch.nn import functional as F

from occflow_core.nn import losses
from occflow_core.nn.losses import focal, mean_over_processes, smooth_l1


def test_focal_loss_is_the_formula_of_the_paper():
    logits = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
    p = logits.sigmoid()[0]
    expected = [-0.75 * p[0] ** 2 * (1 - p[0]).log(), -0.25 * (1 - p[1]) ** 2 * p[1].log()]
    expected.append(-0.75 * p[2] ** 2 * (1 - p[2]).log())
    assert torch.allclose(focal(logits, torch.tensor([1]))[0], torch.stack(expected))


def test_focal_loss_without_focus_is_half_the_cross_entropy():
    logits, target = torch.randn(7, 4), torch.randint(0, 4, (7,))
    plain = F.binary_cross_entropy_with_logits(logits, F.one_hot(target, 4).float(), reduction="none")
    assert torch.allclose(focal(logits, target, alpha=0.5, gamma=0.0), plain / 2)


def test_a_target_beyond_the_classes_is_none_of_them():
    logits = torch.randn(5, 3)
    assert torch.equal(focal(logits, torch.full((5,), 3)), focal(logits, torch.full((5,), 9)))
    assert (focal(torch.full((1, 3), -30.0), torch.tensor([3])) < 1e-9).all()


def test_a_sure_mistake_costs_much_and_has_a_gradient():
    logits = torch.tensor([[60.0, -60.0]], requires_grad=True)
    loss = focal(logits, torch.tensor([1])).sum()
    loss.backward()
    assert loss > 30 and torch.isfinite(logits.grad).all() and logits.grad[0, 0] > 0 > logits.grad[0, 1]


@pytest.mark.parametrize(("d", "cost"), [(0.1, 0.025), (0.2, 0.1), (-0.5, 0.4), (3.0, 2.9)])
def test_smooth_l1_turns_from_a_square_into_a_line(d, cost):
    assert math.isclose(smooth_l1(torch.tensor([[d, 0.0, 0.0]]), 0.2).item(), cost, rel_tol=1e-6)
    assert math.isclose(smooth_l1(torch.tensor([[d, 0.1, -d]]), 0.2).item(), 2 * cost + 0.025, rel_tol=1e-6)


def test_one_process_counts_for_itself_and_never_divides_by_nothing():
    assert mean_over_processes(torch.tensor(7.0)) == 7
    assert mean_over_processes(torch.tensor(0.0)) == 1


# ---- of voxels. Numbers: the published functions (SparseOcc, `models/loss_utils.py` at 550b12a and fe9a966), run once

LOGITS = torch.tensor([[2.0, 0, -1], [0, 1, 0], [-1, 0, 2], [0, 0, 1], [1, 0, 0]])
LABELS = torch.tensor([0, 1, 2, 2, 1])


def near(value):
    return pytest.approx(value, abs=2e-6)


def test_lovasz_and_affinities_are_the_published_ones():
    p = LOGITS.softmax(-1)
    assert losses.lovasz_softmax(p, LABELS).item() == near(0.430015)
    assert losses.geometric_affinity(p, LABELS).item() == near(0.717453)
    assert losses.semantic_affinity(p, LABELS).item() == near(1.201622)


def test_lovasz_of_sure_answers_is_one_less_the_mean_iou():
    told, labels = torch.randint(0, 4, (200,)), torch.randint(0, 4, (200,))
    p = F.one_hot(told, 5).double()
    ious = [((told == c) & (labels == c)).sum() / ((told == c) | (labels == c)).sum() for c in range(4)]
    assert losses.lovasz_softmax(p, labels).item() == near(1 - float(torch.stack(ious).mean()))
    labels[:50] = 255  # what is no class is nobody's
    ious = [((told == c) & (labels == c)).sum() / ((told == c) | (labels == c)).sum() for c in range(4)]
    assert losses.lovasz_softmax(p, labels).item() == near(1 - float(torch.stack(ious).mean()))


def test_an_affinity_is_nothing_only_where_all_is_right_and_finite_where_all_is_wrong():
    true = torch.tensor([True, True, False])
    assert losses.affinity(true.double(), true) == 0
    p = (~true).double().requires_grad_()
    cost = losses.affinity(p, true)
    cost.backward()
    assert cost.item() == pytest.approx(-3 * math.log(1e-38)) and p.grad.isfinite().all()
    assert losses.affinity(torch.full((3,), torch.nan), true).isnan()  # and does not stop with an error of its own
    assert losses.affinity(torch.rand(3), torch.zeros(3, dtype=torch.bool)) == 0
    assert losses.affinity(torch.ones(3), torch.ones(3, dtype=torch.bool)) == 0


@pytest.mark.parametrize("kind", ["lovasz_softmax", "semantic_affinity", "geometric_affinity"])
def test_no_voxels_cost_nothing(kind):
    p = torch.zeros(0, 3, requires_grad=True)
    getattr(losses, kind)(p, torch.zeros(0, dtype=torch.int64)).backward()


def test_in_a_balanced_loss_the_rare_weigh_as_much_as_the_many():
    logits, label = torch.tensor([2.0, -1.0, 0.5, -0.5, 1.0]), torch.tensor([0, 17, 4, 17, 4])
    costs = losses.balanced(logits, label != 17, label)
    assert costs.mean().item() == near(0.914267)
    plain = losses.balanced(logits, label != 17, torch.zeros(5, dtype=torch.int64))
    assert torch.allclose(costs / plain, torch.tensor([5, 2.5, 2.5, 2.5, 2.5]))


# ---- of masks

MASKS = torch.tensor([[2.0, 2, -2, -2], [-1, 1, 1, -1], [0, 0, 0, 0]])
NAMES = torch.tensor([[1.0, -1], [-1, 1], [0, 0]])
TRUE, LABEL = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0]]), torch.tensor([0, 1])


def test_a_mask_that_is_surely_right_has_no_dice_loss_and_a_wrong_one_nearly_one():
    sure = 60 * (2 * TRUE - 1)
    assert losses.dice(sure, TRUE).abs().max() < 1e-6
    assert torch.allclose(losses.dice(-sure, TRUE), torch.tensor([1 - 1 / 5, 1 - 1 / 5]))
    # of two masks, as published: 5 times their sum over two segments
    assert (5 * losses.dice(MASKS[:2], TRUE).sum() / 2).item() == near(1.199583)


def test_each_segment_finds_the_query_that_costs_least_whatever_their_order():
    query, segment = losses.matched(MASKS, NAMES, TRUE, LABEL, (4.0, 5.0, 5.0))
    assert query.tolist() == [0, 1] and segment.tolist() == [0, 1]
    turned = losses.matched(MASKS.flip(0), NAMES.flip(0), TRUE, LABEL, (4.0, 5.0, 5.0))
    assert dict(zip(*(part.tolist() for part in turned))) == {2: 0, 1: 1}
    query, segment = losses.matched(MASKS[:1], NAMES[:1], TRUE, LABEL, (4.0, 5.0, 5.0))
    assert (query.tolist(), segment.tolist()) == ([0], [0])  # fewer queries than segments
    none = losses.matched(MASKS, NAMES, TRUE[:0], LABEL[:0], (4.0, 5.0, 5.0))
    assert [len(part) for part in none] == [0, 0]


def test_the_costs_of_a_match_are_the_losses_it_will_cost():
    """By hand, for all pairs: the matching with the least sum of them is the one that is found."""
    from itertools import permutations

    generator = torch.Generator().manual_seed(0)
    logits, names = torch.randn(4, 30, generator=generator), torch.randn(4, 5, generator=generator)
    true = F.one_hot(torch.randint(0, 4, (30,), generator=generator), 4).T.float()[:3]
    label = torch.tensor([4, 0, 4])

    def cost(q, m):
        p = names[q, label[m]].sigmoid()
        naming = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
        masking = F.binary_cross_entropy_with_logits(logits[q], true[m])
        return 4 * naming + 5 * masking + 5 * losses.dice(logits[q], true[m])

    best = min(permutations(range(4), 3), key=lambda qs: float(sum(cost(q, m) for m, q in enumerate(qs))))
    query, segment = losses.matched(logits, names, true, label, (4.0, 5.0, 5.0))
    assert dict(zip(segment.tolist(), query.tolist())) == dict(enumerate(best))
