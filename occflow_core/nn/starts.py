"""Where our own networks begin: as even columns of points, each class at its share.

The authors of the published ones draw all at random, and train on millions of samples.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..geometry import Grid

GROUND = 0.0  # m: the foot of the columns over which points begin spread
LOOK = 3**0.5  # a query looks as far around as its points lie, in their spread
# of the occupied voxels of streets (96 keyframes of the synthetic world; `others` is a guess): a point's first name
SHARES = {
    "others": 0.001,
    "barrier": 0.014,
    "bicycle": 0.0008,
    "bus": 0.004,
    "car": 0.045,
    "construction_vehicle": 0.004,
    "motorcycle": 0.0004,
    "pedestrian": 0.003,
    "traffic_cone": 0.0006,
    "trailer": 0.0013,
    "truck": 0.016,
    "driveable_surface": 0.22,
    "other_flat": 0.035,
    "sidewalk": 0.16,
    "terrain": 0.18,
    "manmade": 0.2,
    "vegetation": 0.11,
}


def even(count: int, long: float, wide: float) -> Tensor:
    """`count` places spread evenly over a rectangle `long` by `wide`, row after row: (count, 2), fractions of it."""
    rows = min(max(round(math.sqrt(count * long / wide)), 1), count)
    filled = [count * (row + 1) // rows - count * row // rows for row in range(rows)]
    return torch.tensor([((r + 0.5) / rows, (k + 0.5) / n) for r, n in enumerate(filled) for k in range(n)])


def column(count: int, edge: float, height: float) -> Tensor:
    """`count` places spread evenly over a column around 0, floor after floor from its foot: (count, 3) m."""
    step = (edge * edge * height / count) ** (1 / 3) if height > 0 else math.inf
    floors = min(max(round(height / step), 1), count)
    filled = [-(-(count - k) // floors) for k in range(floors)]  # what is left over stands on the lowest
    return torch.cat(
        [
            torch.cat([(even(n, edge, edge) - 0.5) * edge, torch.full((n, 1), k * height / floors)], dim=1)
            for k, n in enumerate(filled)
        ]
    )


@torch.no_grad()
def columns(begin: Tensor, layers: Sequence[nn.Module], grid: Grid, step: float) -> None:
    """Let each query stand in the middle of a column of its own, its points spread over that, in place.

    begin (Q, 3): where queries begin, fractions of the grid's box. Each layer has `after` points a query, moved by
    `step` metres times what `move` says from the middle of those before, and looks around by `sampling.offset`.
    """
    ground = min(max(GROUND, grid.low[2]), grid.high[2])
    edge = math.sqrt(grid.size[0] * grid.size[1] / len(begin))
    middle = torch.tensor([0.0, 0.0, (grid.high[2] - ground) / 2])  # m above its foot
    begin[:, :2] = even(len(begin), *grid.size[:2])
    begin[:, 2] = (ground + middle[2] - grid.low[2]) / grid.size[2]
    spread = torch.tensor([edge, edge, grid.high[2] - ground]) / 12**0.5  # of one point, which has none itself
    for layer in layers:
        points = column(layer.after, edge, grid.high[2] - ground)
        layer.move[-1].bias.copy_(((points - middle) / step).flatten())
        layer.sampling.offset.bias.view(-1, 3).uniform_(-LOOK, LOOK).mul_(spread)
        middle, spread = points.mean(dim=0), torch.ones(3)
