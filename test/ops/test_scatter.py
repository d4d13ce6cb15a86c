import pytest
import torch

from occflow_core.ops import scatter_max, scatter_mean


def test_a_mean_and_a_maximum_of_each_place():
    rows = torch.tensor([[1.0, -4.0], [3.0, -2.0], [-7.0, 5.0]])
    place = torch.tensor([2, 2, 0])
    assert scatter_mean(rows, place, 4).tolist() == [[-7, 5], [0, 0], [2, -3], [0, 0]]
    assert scatter_max(rows, place, 4).tolist() == [[-7, 5], [0, 0], [3, -2], [0, 0]]


def test_the_maximum_of_integers_is_exact():
    rows = torch.tensor([[2**62 + 1], [2**62], [torch.iinfo(torch.int64).min]])
    assert scatter_max(rows, torch.tensor([0, 0, 1]), 2).tolist() == [[2**62 + 1], [torch.iinfo(torch.int64).min]]


@pytest.mark.parametrize("scatter", [scatter_mean, scatter_max])
def test_gradients_are_those_of_finite_differences(scatter):
    rows = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    place = torch.tensor([3, 0, 0, 3, 1, 3, 4, 0, 4])
    assert torch.autograd.gradcheck(lambda rows: scatter(rows, place, 6), rows)


def test_equal_rows_share_the_gradient_of_their_maximum():
    rows = torch.tensor([[0.0], [0.0], [-1.0]]).requires_grad_()
    scatter_max(rows, torch.tensor([0, 0, 0]), 1).backward(torch.ones(1, 1))
    assert rows.grad.tolist() == [[0.5], [0.5], [0.0]]


@pytest.mark.parametrize("scatter", [scatter_mean, scatter_max])
def test_nothing_is_brought_nowhere(scatter):
    assert scatter(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 0).shape == (0, 3)
    assert scatter(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2).tolist() == [[0.0] * 3] * 2
