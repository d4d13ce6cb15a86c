import math

import pytest
import torch
from torch.nn import functional as F

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
