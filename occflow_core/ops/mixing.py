"""Adaptive mixing: what a query saw goes through matrices of the query's own making (AdaMixer, arXiv 2203.16507).

B batch, Q queries, G groups, P points taken, O points given, C channels of a group.

What is written here is the definition, on any device; on a GPU `mixing_triton` does the same in one kernel.
"""

from torch import Tensor
from torch.nn import functional as F

from . import gpu


def mix(sampled: Tensor, matrices: Tensor, given: int) -> Tensor:
    """Channels mixed, then points, each followed by a norm over both and a ReLU: (B, Q, G, O, C).

    sampled: (B, Q, G, P, C). matrices: (B, Q, G*(C*C + O*P)), of each group one for its channels (in, out), then one
    for its points (out, in). given: O. The norms have no weights (AdaMixer's, over points and channels together).
    """
    b, q, g, p, c = sampled.shape
    assert matrices.shape == (b, q, g * (c * c + given * p)), matrices.shape
    fast = _fast(sampled, matrices, given)
    if fast is not None:
        return fast.mix(sampled, matrices, given)
    by_channel, by_point = matrices.view(b, q, g, c * c + given * p).split([c * c, given * p], dim=-1)
    x = sampled @ by_channel.reshape(b, q, g, c, c)
    x = F.relu(F.layer_norm(x, (p, c)))
    x = by_point.reshape(b, q, g, given, p) @ x
    return F.relu(F.layer_norm(x, (given, c)))


def _fast(sampled: Tensor, matrices: Tensor, given: int):
    """The file whose `mix` is made for such tensors, or None where the definition runs."""
    if not gpu.serves(sampled.device):
        return None
    from . import mixing_triton

    return mixing_triton if mixing_triton.fits(sampled, matrices, given) else None
