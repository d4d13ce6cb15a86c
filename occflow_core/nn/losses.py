"""Losses: pure functions of numbers and targets. C classes, D coordinates, V voxels, Q queries, M segments; `...` any
leading axes.

Each gives one value an element (or a row) and leaves sums and normalisers to the caller, who knows what is counted;
those that are of a whole set (Lovász, affinities) give one value.
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


# ---- of voxels that were kept (SparseOcc, github.com/MCG-NJU/SparseOcc, `models/loss_utils.py` at 550b12a and fe9a966)


def balanced(logits: Tensor, true: Tensor, group: Tensor) -> Tensor:
    """Binary cross-entropy in which every group that occurs weighs the same: logits (V,), true (V,) bool -> (V,).

    group (V,) int64, from 0 on; a voxel weighs V over how many are of its group.
    """
    count = group.bincount()
    weight = len(group) / count[group]
    return weight * F.binary_cross_entropy_with_logits(logits, true.to(logits), reduction="none")


def lovasz_softmax(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Lovász extension of 1 - IoU, the mean over classes that occur (arXiv 1705.08790): (V, C), (V,) int64 -> scalar.

    A label that is no class is a wrong answer for all of them.
    """
    costs = []
    for c in labels.unique().tolist():
        if c < probabilities.shape[1]:
            is_true = labels == c
            error, order = (is_true.to(probabilities) - probabilities[:, c]).abs().sort(descending=True)
            costs.append(error @ _lovasz_gradient(is_true[order]).to(error))
    return torch.stack(costs).mean() if costs else probabilities.sum() * 0.0


def _lovasz_gradient(is_true: Tensor) -> Tensor:
    """How much 1 - IoU grows with each further error, in the order of the errors: (V,) bool -> (V,) float64."""
    total = is_true.sum()  # whole numbers: their running sums are exact on any device
    lost = 1 - (total - is_true.cumsum(0)).double() / (total + (~is_true).cumsum(0))
    return torch.cat([lost[:1], lost[1:] - lost[:-1]])


def affinity(probability: Tensor, true: Tensor) -> Tensor:
    """-log of precision, recall and specificity of one class, added up (MonoScene, arXiv 2112.00726, section 3.4).

    probability (V,), true (V,) bool -> scalar. What cannot be told, because nothing is true or everything, costs
    nothing.
    """
    is_true = true.to(probability)
    hit, cost = (probability * is_true).sum(), probability.sum() * 0.0
    if not true.any():
        return cost
    right = (1 - probability) @ (1 - is_true)
    for part, whole in ((hit, probability.sum()), (hit, is_true.sum()), (right, (1 - is_true).sum())):
        if not whole <= 0:  # a NaN must come as far as the loss, where whoever trains names it
            cost = cost - (part / whole).clamp_min(1e-38).log()
    return cost


def geometric_affinity(probabilities: Tensor, labels: Tensor) -> Tensor:
    """`affinity` of being filled: probabilities (V, C), of which the last is of being free, labels (V,) -> scalar."""
    return affinity(1 - probabilities[:, -1], labels != probabilities.shape[1] - 1)


def semantic_affinity(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The mean `affinity` of the classes that occur: probabilities (V, C), labels (V,) int64 below C -> scalar."""
    there = labels.unique().tolist()
    costs = [affinity(probabilities[:, c], labels == c) for c in there]
    return torch.stack(costs).mean() if costs else probabilities.sum() * 0.0


# ---- of masks (Mask2Former, arXiv 2112.01527, section 3.3)


def dice(logits: Tensor, true: Tensor) -> Tensor:
    """1 - twice the overlap of two masks over their sizes, one added to both; logits and 0 or 1, (..., V) -> (...)."""
    p = logits.sigmoid()
    return 1 - (2 * (p * true).sum(-1) + 1) / (p.sum(-1) + true.sum(-1) + 1)


@torch.no_grad()
def matched(
    logits: Tensor, names: Tensor, true: Tensor, label: Tensor, weights: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """Which query tells which segment, so that all together cost the least (the Hungarian method): (query, segment),
    int64 each, as many as there are segments or queries, whichever are fewer.

    logits (Q, V) of masks, names (Q, C) logits of classes, true (M, V) of 0 and 1, label (M,) int64. weights: what the
    class costs (the difference of both focal losses), the mask (cross-entropy, its mean), and its `dice`.
    """
    from scipy.optimize import linear_sum_assignment

    class_weight, mask_weight, dice_weight = weights
    p = names.sigmoid()
    naming = (0.25 * (1 - p) ** 2 * F.softplus(-names) - 0.75 * p**2 * F.softplus(names))[:, label]
    # softplus(-x) where true, softplus(x) where not: the second everywhere, less x where true
    masking = (F.softplus(logits).sum(-1)[:, None] - logits @ true.T) / logits.shape[1]
    p = logits.sigmoid()
    overlap = 1 - (2 * p @ true.T + 1) / (p.sum(-1)[:, None] + true.sum(-1) + 1)
    cost = class_weight * naming + mask_weight * masking + dice_weight * overlap
    # a NaN must come as far as the loss, where whoever trains names it
    query, segment = linear_sum_assignment(cost.nan_to_num().cpu().numpy())
    return torch.as_tensor(query, device=logits.device), torch.as_tensor(segment, device=logits.device)
