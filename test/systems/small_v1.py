"""The numbers of OPUS V1's parity fixture: weights, and points so crowded that every rule of the votes has a say.

What is seen and what is true are those of `small_v2`. Numbers come from NumPy's RandomState, whose streams never
change.
"""

from dataclasses import replace

import numpy as np
from systems import small, small_v2
from systems.small_v2 import LANES

from occflow_core.systems import opus
from occflow_core.systems.base import load_strictly

# what the authors' code lets be small; the rest stands in it
PARITY = replace(
    small.PUBLISHED,
    queries=8,
    refines=(1, 3, 4),
    heads=8,
    mixed=32,
    hidden=512,
    frames=4,
    dropout=0.0,
    grid=small_v2.PARITY.grid,
)


def as_theirs(config=PARITY) -> opus.Opus:
    """The system that speaks with the numbers of `small.authors_checkpoint`, in float64."""
    system = opus.Opus(config).eval()
    load_strictly(system, small.authors_checkpoint(config), opus.NAMES, system.constants())
    return system.double()


def said(system: opus.Opus) -> opus.Output:
    """What the decoder makes of `small_v2.view`."""
    begin = system.queries.weight.expand(LANES, -1, -1)
    layers = system.layers.train()  # as where it learns: all are named, not the last alone
    return opus.refined(layers, begin, small_v2.view(), system.config)


def crowd(seed=7, queries=80, points=14) -> tuple[np.ndarray, np.ndarray]:
    """Points (LANES, Q, P, 3) m and logits (LANES, Q, P, K): some outside, some far from their query, and voxels in
    which 28 points of two queries do not agree."""
    random, grid, k = np.random.RandomState(seed), PARITY.grid, len(PARITY.table.names)
    where = (random.uniform(size=(LANES, queries, 1, 3)) * 1.1 - 0.05) * grid.size + grid.low
    where = where + 1.1 * random.standard_normal((LANES, queries, points, 3))
    favourite = np.broadcast_to(random.randint(0, 4, size=(LANES, queries, 1)), where.shape[:3]).copy()
    packed = np.indices((2, 5, 1, 2)).reshape(4, -1).T[:, :3] * [7, 3, 0] + [5.5, 3.5, 6.5]  # voxels, each twice
    where[:, ::4] = (packed * grid.voxel + grid.low)[:, None] + 0.1 * random.standard_normal(where[:, ::4].shape)
    favourite[:, ::4] = random.randint(0, 2, size=favourite[:, ::4].shape)
    logits = random.standard_normal((*where.shape[:3], k)) - 2.5
    return where, logits + 4.0 * np.eye(k)[favourite]
