"""Nearest neighbours in space, exactly. M points that ask, P points that are asked."""

import torch
from torch import Tensor

_PAIRS = 1 << 26  # distances held at a time, 256 MB


def nearest(points: Tensor, among: Tensor) -> Tensor:
    """For each of `points` (M, 3) the place in `among` (P, 3) of the one nearest to it, (M,) int64. Has no gradient.

    Of several that are equally near, the first. On the CPU `nearest_numba` answers by cells, elsewhere all distances
    are looked at, which is the definition: `nearest_plain`. ValueError where nobody can be asked.
    """
    if not len(among):
        raise ValueError(f"nearest: {len(points)} points ask for the nearest of none")
    if points.device.type == "cpu":
        from . import nearest_numba

        return nearest_numba.nearest(points.detach(), among.detach())
    return nearest_plain(points, among)


@torch.no_grad()
def nearest_plain(points: Tensor, among: Tensor) -> Tensor:
    """As `nearest`, by all distances."""
    if not len(points):
        return torch.zeros(0, dtype=torch.int64, device=points.device)
    rows = max(1, _PAIRS // len(among))
    # by differences: the quick way through products loses centimetres in float32
    asked = (torch.cdist(part, among, compute_mode="donot_use_mm_for_euclid_dist") for part in points.split(rows))
    return torch.cat([distances.argmin(1) for distances in asked])
