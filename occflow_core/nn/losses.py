"""Losses: pure functions of numbers and targets. C classes, D coordinates; `...` any leading axes.

Each gives one value an element (or a row) and leaves sums and normalisers to the caller, who knows what is counted.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def mean_over_processes(count: Tensor) -> Tensor:
    """A normaliser as all processes of a training see it: its mean over them, so that a mean of gradients is the
    gradient of the whole batch. Without `torch.distributed` the count itself; never below 1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = count.detach().clone()
        torch.distributed.all_reduce(count)
        # not clamped before the division: two processes, one of which has nothing, share one count
        return count.clamp_min(1) / torch.distributed.get_world_size()
    return count.clamp_min(1)


def focal(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (arXiv 1708.02002, equation 5) of every class on its own: logits (..., C) -> (..., C).

    target (...) int64: the class that is true, C or more for none of them.
    """
    is_true = F.one_hot(target.clamp_max(logits.shape[-1]), logits.shape[-1] + 1)[..., :-1].to(logits)
    missed = torch.where(is_true > 0, -logits, logits).sigmoid()  # 1 - p of what is right
    weight = torch.where(is_true > 0, alpha, 1 - alpha) * missed**gamma
    return weight * F.binary_cross_entropy_with_logits(logits, is_true, reduction="none")


def smooth_l1(difference: Tensor, beta: float) -> Tensor:
    """0.5 d^2 / beta where |d| < beta, |d| - beta / 2 beyond (arXiv 1504.08083, section 2.3): (..., D) -> (...)."""
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none", beta=beta).sum(-1)
