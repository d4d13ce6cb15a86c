"""Points drawn to the voxels that are occupied, and what those are: targets and losses that the OPUS systems share.

B batch, P points, V occupied voxels, K classes, X Y Z voxels of the grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..geometry import Grid
from ..types import Occupancy
from .losses import focal, mean_over_processes, smooth_l1

# ---- losses (`opus_head.py`; the numbers stand there as defaults, not in the configs)
POINTS_WEIGHT, NAMES_WEIGHT = 0.5, 2.0
FLOW_WEIGHT = 0.1  # ours: at 0.25 its few points drown what the names' many say
BETA = 0.2  # m, where the loss of a distance turns from a square into a line
NEAR = 0.2  # m: a voxel that the camera sees and whose nearest point is farther away counts FAR_WEIGHT times
FAR_WEIGHT, RARE_WEIGHT = 5.0, 10.0
# ours, where `Config.as_published` is off
STRAY = 0.35  # m along any axis: a point farther than this from the voxel nearest to it is told to be nothing ...
PULL = 0.8  # m: ... and farther than this it is not drawn there: what is nothing may be anywhere
HIDDEN = 0.1  # weight of what no camera sees: three of four points of a street, and nobody can know them
OUR_NAMES_WEIGHT = 8.0  # points begin spread over the whole box, so that names have more to say than places
RARE = ("others", "bicycle", "construction_vehicle", "traffic_cone")  # seen, they count RARE_WEIGHT times at least
NAME_WEIGHTS = {  # of a class's scores, whether they should be high or low
    "others": 10.0,
    "barrier": 5.0,
    "bicycle": 10.0,
    "bus": 5.0,
    "car": 5.0,
    "construction_vehicle": 10.0,
    "motorcycle": 10.0,
    "pedestrian": 5.0,
    "traffic_cone": 10.0,
    "trailer": 5.0,
    "truck": 5.0,
    "driveable_surface": 1.0,
    "other_flat": 5.0,
    "sidewalk": 1.0,
    "terrain": 1.0,
    "manmade": 2.0,
    "vegetation": 1.0,
}


@dataclass(frozen=True)
class Target:
    """The occupied voxels of one lane, V of them, and what cameras see."""

    grid: Grid
    seen: Tensor  # (X, Y, Z) bool
    visible: Tensor  # (V,) bool: `seen` of the occupied voxels
    centre: Tensor  # (V, 3) m
    label: Tensor  # (V,) int64
    flow: Tensor  # (V, 2) m/s; NaN where it is not known or the class does not move
    distance: Tensor  # (V,) what a wrong name costs more, the farther from the car: 1 to 1.5
    far: Tensor  # (V,) weight of a voxel that no point came near
    least: Tensor  # (V,) weight of a voxel at least
    weight: Tensor  # (K,) of each class's scores

    @staticmethod
    def of(truth: Occupancy, lane: int, rare: Sequence[str] = RARE) -> "Target":
        """rare: names of the classes whose voxels count RARE_WEIGHT times at least, where they are seen."""
        labels, classes, grid = truth.labels[lane], truth.classes, truth.grid
        index = (labels != classes.free).nonzero()
        where = index.unbind(1)
        label, seen = labels[where].long(), truth.seen[lane][where]
        centre = (index + 0.5) * labels.new_tensor(grid.voxel, dtype=torch.float32)
        centre = centre + centre.new_tensor(grid.low)
        moves = torch.isin(label, label.new_tensor(classes.moving_ids))
        known = truth.flow[lane][where] if truth.flow is not None else torch.full_like(centre[:, :2], torch.nan)
        is_rare = torch.isin(label, label.new_tensor([classes.id(name) for name in rare if name in classes.names]))
        return Target(
            grid=grid,
            seen=truth.seen[lane],
            visible=seen,
            centre=centre,
            label=label,
            flow=known.masked_fill(~moves[:, None], torch.nan),
            distance=1 + centre[:, :2].norm(dim=-1) / math.hypot(*grid.size[:2]),
            far=torch.where(seen, FAR_WEIGHT, 1.0),
            least=torch.where(seen & is_rare, RARE_WEIGHT, 1.0),
            weight=centre.new_tensor([NAME_WEIGHTS[name] for name in classes.names]),
        )


def points_loss(points: Tensor, targets: Sequence[Target], published: bool) -> tuple[Tensor, list[Tensor]]:
    """Points (B, P, 3) m -> the loss, and for each lane which voxel each of its points is nearest to, (P,) int64.

    Both ways: from every voxel to the point nearest to it, which draws points to what nobody tells yet, and from every
    point to the voxel nearest to it (ours: within PULL). A lane whose truth is empty has nothing to say; its points
    meet nobody.
    """
    missed, strayed, voxels, count, met = [], [], 0, 0, []
    for mine, target in zip(points, targets, strict=True):
        if not len(target.centre):
            met.append(torch.zeros(0, dtype=torch.int64, device=points.device))
            continue
        to_point, to_voxel = ops.nearest(target.centre, mine), ops.nearest(mine, target.centre)
        away = target.centre - mine[to_point]
        far = away.detach().norm(dim=-1) > NEAR
        weight = torch.maximum(torch.where(far, target.far, 1.0), target.least)
        off = mine - target.centre[to_voxel]
        drawn = torch.ones_like(off[:, 0])
        if not published:
            weight = torch.where(target.visible, weight, HIDDEN)
            drawn = (off.detach().norm(dim=-1) <= PULL).to(off)
        missed.append((weight * smooth_l1(away, BETA)).sum())
        strayed.append((drawn * smooth_l1(off, BETA)).sum())
        voxels, count = voxels + len(target.centre), count + len(mine)
        met.append(to_voxel)
    nothing = points.sum() * 0.0  # of the same graph: every process of a training has the same terms
    both = (
        sum(parts, nothing) / mean_over_processes(points.new_tensor(float(n)))
        for parts, n in ((missed, voxels), (strayed, count))
    )
    return POINTS_WEIGHT * sum(both), met


def names_loss(
    logits: Tensor, points: Tensor, targets: Sequence[Target], met: Sequence[Tensor], published: bool
) -> Tensor:
    """Logits (B, P, K) of points (B, P, 3): each is called what the voxel is called that it is nearest to (ours: or
    nothing, where that is farther than STRAY, and what no camera sees counts HIDDEN)."""
    total, count = logits.sum() * 0.0, 0
    for mine, where, target, voxel in zip(logits, points, targets, met, strict=True):
        if len(voxel):
            label, weight = target.label[voxel], target.distance[voxel]
            if not published:
                near = (where - target.centre[voxel]).abs().amax(dim=-1) <= STRAY
                label = torch.where(near, label, mine.shape[-1])
                index, inside = target.grid.index(where)
                weight = torch.where(inside & target.seen[index.unbind(1)], weight, HIDDEN * weight)
            costs = focal(mine, label) * target.weight
            total = total + (costs.sum(-1) * weight).sum()
            count += len(voxel)
    weight = NAMES_WEIGHT if published else OUR_NAMES_WEIGHT
    return weight * total / mean_over_processes(logits.new_tensor(float(count)))


def flow_loss(flow: Tensor, targets: Sequence[Target], met: Sequence[Tensor]) -> Tensor:
    """Velocities (B, P, 2), L1: each point that met a voxel of a class that moves is as fast as that. Ours."""
    total, count = flow.sum() * 0.0, 0
    for mine, target, voxel in zip(flow, targets, met, strict=True):
        if len(voxel):
            true = target.flow[voxel]
            known = true.isfinite().all(-1)
            total = total + (mine[known] - true[known]).abs().sum()
            count = count + known.sum()
    return FLOW_WEIGHT * total / mean_over_processes(torch.as_tensor(count, device=flow.device).to(flow))
