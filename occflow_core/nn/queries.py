"""Blocks of a decoder whose queries look around, mix what they saw and talk to each other (AdaMixer, SparseBEV, OPUS).

B batch, Q queries, C channels, G groups, P points.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops

STEP = 0.5  # m by which an output of a `branch` of moves moves a point (configs, `scales`)


class Mixing(nn.Module):
    """Sampled points mixed by matrices that the query makes (AdaMixer, arXiv 2203.16507), added to the query."""

    def __init__(self, channels: int, groups: int, taken: int, given: int):
        super().__init__()
        self.groups, self.taken, self.given, self.inner = groups, taken, given, channels // groups
        self.matrices = nn.Linear(channels, groups * (self.inner**2 + taken * given))
        self.out = nn.Linear(given * channels, channels)

    @torch.no_grad()
    def initialise(self) -> None:
        nn.init.zeros_(self.matrices.weight)

    def forward(self, sampled: Tensor, query: Tensor) -> Tensor:
        assert sampled.shape[2:] == (self.groups, self.taken, self.inner), sampled.shape
        mixed = ops.mix(sampled, self.matrices(query), self.given)
        return query + self.out(mixed.flatten(2))


class Attention(nn.Module):
    """Queries attend to each other, the less the farther apart, each head with a reach of the query's own choice."""

    def __init__(self, channels: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.taken = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.reach = nn.Linear(channels, heads)

    @torch.no_grad()
    def initialise(self) -> None:
        nn.init.xavier_uniform_(self.taken.weight)  # as torch.nn.MultiheadAttention, which the authors use
        nn.init.zeros_(self.taken.bias)
        nn.init.zeros_(self.out.bias)
        nn.init.zeros_(self.reach.weight)
        nn.init.uniform_(self.reach.bias, 0.0, 2.0)

    def forward(self, query: Tensor, centre: Tensor) -> Tensor:
        """Queries (B, Q, C) at (B, Q, 3) metres."""
        b, q, c = query.shape
        distance = distances(centre.detach())
        mask = -distance[:, None] * self.reach(query).mT[..., None]  # (B, heads, Q, Q): the row's reach counts
        parts = self.taken(query).view(b, q, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        talked = F.scaled_dot_product_attention(*parts, attn_mask=mask, dropout_p=dropout)
        return query + self.out(talked.transpose(1, 2).reshape(b, q, c))


def distances(centre: Tensor) -> Tensor:
    """(B, Q, 3) -> (B, Q, Q) m, by differences: the quick way through products loses centimetres in float32."""
    return torch.cdist(centre, centre, compute_mode="donot_use_mm_for_euclid_dist")


def branch(channels: int, out: int) -> nn.Sequential:
    """What a query says in numbers, without a norm on the way: how its points move, how fast they are."""
    c = channels
    return nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c), nn.ReLU(), nn.Linear(c, out))
