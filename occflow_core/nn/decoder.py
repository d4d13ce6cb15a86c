"""The decoder of OPUS V1 and V1-Fusion: layers in which queries look around, talk, move their points and name them;
what their points cost and what is made of them.

B batch, Q queries, P points of a query, G groups, S sampled points of a group, C channels, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..types import Occupancy, Prediction
from .points import Target, flow_loss, names_loss, points_loss
from .queries import STEP, Attention, Mixing, branch
from .voxels import decode


@dataclass(frozen=True)
class Output:
    """What the decoder layers say, first layer first; P differs from layer to layer. Names and velocities are those of
    every layer where it learns, else of the last alone: nobody asks for the others."""

    points: tuple[Tensor, ...]  # (B, Q, P, 3) m, car frame now
    logits: tuple[Tensor, ...]  # (B, Q, P, K)
    flow: tuple[Tensor, ...] | None  # (B, Q, P, 2) m/s over ground, car frame now
    sight: Any = None  # `sight.Sight` of a network whose points look for themselves

    def told(self) -> list[tuple[Tensor | None, Tensor]]:
        """Everything said, to be compared: values, and places (M, D) that rows (M, C) belong to; None: their order."""
        seen = () if self.sight is None else (self.sight.ranges, self.sight.names)
        return [(None, values) for values in (*self.points, *self.logits, *(self.flow or ()), *seen)]


class Looks(Protocol):
    """What a layer looks into, e.g. `instants.View`."""

    def sample(self, points: Tensor, weights: Tensor, as_published: bool) -> Tensor:
        """Features (B, Q, G, `looked`, C/G) of points (B, Q, G, S, 3) in metres, levels weighed by (B, Q, G, S, L)."""


class Layer(nn.Module):
    """Look, mix, talk to the other queries, move and name the points."""

    def __init__(self, config: Any, before: int, after: int, looked: int):
        """config: that of a system (`opus.Config`). before, after: points of a query. looked: as `Looks` gives them."""
        super().__init__()
        c, self.config, self.after = config.channels, config, after
        self.position = nn.Sequential(
            nn.Linear(3 * before, c), nn.LayerNorm(c), nn.ReLU(), nn.Linear(c, c), nn.LayerNorm(c), nn.ReLU()
        )
        self.sampling = Sampling(config)
        self.mixing = Mixing(c, config.groups, looked, config.mixed)
        self.attention = Attention(c, config.heads, config.dropout)
        self.feed = nn.Sequential(
            *(nn.Linear(c, config.hidden), nn.ReLU(), nn.Dropout(config.dropout)),
            *(nn.Linear(config.hidden, c), nn.Dropout(config.dropout)),
        )
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(c), nn.LayerNorm(c), nn.LayerNorm(c)
        self.name = nn.Sequential(
            *(nn.Linear(c, c), nn.LayerNorm(c), nn.ReLU()),
            *(nn.Linear(c, c), nn.LayerNorm(c), nn.ReLU()),
            nn.Linear(c, after * len(config.table.names)),
        )
        self.move = branch(c, 3 * after)
        self.flow = branch(c, 2 * after) if config.flow else None

    @torch.no_grad()
    def initialise(self, prior: Tensor) -> None:
        self.sampling.initialise()
        self.mixing.initialise()
        self.attention.initialise()
        self.name[-1].bias.copy_(prior.logit().repeat(self.after))

    def forward(self, query: Tensor, unit: Tensor, view: Looks) -> tuple[Tensor, Tensor]:
        """Queries (B, Q, C) with points (B, Q, P, 3), fractions of the box -> both anew."""
        grid = self.config.grid
        b, q, _, _ = unit.shape
        points = grid.metres(unit)
        centre = points.mean(dim=2)  # (B, Q, 3)
        query = query + self.position(unit.flatten(2))
        query = self.norm1(self.mixing(self.sampling(query, points, view), query))
        query = self.norm2(self.attention(query, centre))
        query = self.norm3(query + self.feed(query))
        return query, grid.unit(centre[:, :, None] + STEP * self.move(query).view(b, q, self.after, 3))

    def named(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries (B, Q, C) -> logits of their points (B, Q, P, K) and velocities (B, Q, P, 2), if it tells them."""
        shape = (*query.shape[:2], self.after, -1)
        return self.name(query).view(shape), None if self.flow is None else self.flow(query).view(shape)


class Sampling(nn.Module):
    """Where to look, and in which levels."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.offset = nn.Linear(config.channels, config.groups * config.samples * 3)
        self.levels = nn.Linear(config.channels, config.groups * config.samples * config.levels)

    @torch.no_grad()
    def initialise(self) -> None:
        nn.init.zeros_(self.offset.weight)
        nn.init.uniform_(self.offset.bias, -0.5, 0.5)

    def forward(self, query: Tensor, points: Tensor, view: Looks) -> Tensor:
        """Queries (B, Q, C) with points (B, Q, P, 3) in metres -> what they look at, (B, Q, G, `looked`, C/G)."""
        c = self.config
        b, q, p, _ = points.shape
        if p > 1:
            spread = points.std(dim=2, keepdim=True)
        else:  # the authors look at one place then; see the departures of the systems
            spread = torch.full_like(points, 0.0 if c.as_published else 1.0)
        offset = self.offset(query).view(b, q, c.groups * c.samples, 3)
        places = (points.mean(dim=2, keepdim=True) + offset * spread).view(b, q, c.groups, c.samples, 3)
        weights = self.levels(query).view(b, q, c.groups, c.samples, c.levels).softmax(dim=-1)
        return view.sample(places, weights, c.as_published)


def refined(layers: Sequence[Layer], begin: Tensor, view: Looks, config: Any) -> Output:
    """What the layers make, one after the other, of queries that begin at (B, Q, 3), fractions of the grid's box."""
    unit = begin[:, :, None]  # (B, Q, 1, 3)
    query = unit.new_zeros(*begin.shape[:2], config.channels)
    learns = torch.is_grad_enabled() or layers[-1].training
    points, named = [], []
    for layer in layers:
        query, unit = layer(query, unit.detach(), view)
        points.append(config.grid.metres(unit))
        if learns or layer is layers[-1]:
            named.append(layer.named(query))
    logits, flow = zip(*named, strict=True)
    return Output(tuple(points), logits, flow if config.flow else None)


def targets(truth: Occupancy, config: Any) -> list[Target]:
    """One a lane. ValueError where the truth is told in another grid or in other classes than the config's."""
    if (truth.grid, truth.classes) != (config.grid, config.table):
        raise ValueError(
            f"the truth is told in {truth.classes.table} on {truth.grid}, the network speaks {config.classes} on "
            f"{config.grid}"
        )
    return [Target.of(truth, lane) for lane in range(len(truth.labels))]


def losses(output: Output, targets: Sequence[Target], published: bool) -> dict[str, Tensor]:
    """Scalars to be added up: of each layer where its points are, and of those that are named what they are called and
    how fast they are.

    Card of the authors' losses: `opus_head.loss_single` (arXiv 2409.09350, section 3.4).
    """
    terms, met = {}, []
    for k, points in enumerate(output.points):
        terms[f"points {k}"], voxel = points_loss(points.flatten(1, 2), targets, published)
        met.append(voxel)
    first = len(output.points) - len(output.logits)  # of the layers that are named
    for k, logits in enumerate(output.logits, start=first):
        points = output.points[k].flatten(1, 2).detach()
        terms[f"names {k}"] = names_loss(logits.flatten(1, 2), points, targets, met[k], published)
        if output.flow is not None:
            terms[f"flow {k}"] = flow_loss(output.flow[k - first].flatten(1, 2), targets, met[k])
    return terms


@torch.no_grad()
def predictions(output: Output, config: Any) -> list[Prediction]:
    """One a lane, from the last layer (`opus_head.get_occ`)."""
    flow = [None] * len(output.points[-1]) if output.flow is None else output.flow[-1]
    lanes = zip(output.points[-1], output.logits[-1], flow, strict=True)
    return [decode(*lane, config.grid, config.table, config.threshold, config.closing) for lane in lanes]
