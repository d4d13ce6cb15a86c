"""One sweep of a LiDAR with 32 beams, like nuScenes' Velodyne HDL-32E. R rays, P points.

All rays of a sweep are cast at its stamp: nothing moves while it turns (the car's and the actors' motion within the
50 ms is left out).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import shade_numba as loops
from .meshes import GLASS, GRASS, MARKING, METAL, PAINT, SIGNAL, SOIL, WATER
from .tracer import Tracer
from .traffic import Actor

BEAMS, TURNS = 32, 1084  # rays: nuScenes' sweeps have 34,688
_LOW, _HIGH = -30.67, 10.67  # degrees, of the lowest and the highest beam
NEAREST, FARTHEST = 1.0, 100.0  # m
_NOISE, _WORST = 0.007, 0.016  # m, deviation of a range and where it is cut


@dataclass(frozen=True)
class Sweep:
    """What came back, in the order of the rays."""

    points: np.ndarray  # (P, 5) float32: x y z in the LiDAR's frame, intensity 0..255, ring 0..31
    face: np.ndarray  # (P,) int32, in the tables of `Tracer`
    actor: np.ndarray  # (P,) int32: number among the actors that were handed in, -1 for what never moves


def rays() -> tuple[np.ndarray, np.ndarray]:
    """Directions (R, 3) in the LiDAR's frame (x right, y ahead, z up) and rings (R,); one turn from behind."""
    up = np.radians(np.linspace(_LOW, _HIGH, BEAMS))
    around = -np.pi / 2 - np.arange(TURNS) * 2 * np.pi / TURNS
    a, e = (x.reshape(-1) for x in np.meshgrid(around, up, indexing="ij"))
    directions = np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], 1)
    return directions, np.tile(np.arange(BEAMS), TURNS)


def sweep(
    tracer: Tracer,
    actors: Sequence[Actor],
    poses: np.ndarray,
    time: float,
    world_from_lidar: np.ndarray,
    wet: float,
    rng,
) -> Sweep:
    """Cast, measured with noise, some lost: far, dark, wet or mirroring things answer less often."""
    local, ring = rays()
    directions = loops.turned(local, world_from_lidar[:3, :3].copy(), np.zeros(3)).astype(np.float32)
    origins = np.broadcast_to(world_from_lidar[:3, 3].astype(np.float32), directions.shape).copy()
    hits = tracer.cast(origins, directions, actors, poses, time)
    noise, luck, spark = rng.normal(0, _NOISE, len(local)), rng.random(len(local)), rng.normal(0, 3.0, len(local))
    met = np.flatnonzero((hits.face >= 0) & (hits.t > NEAREST) & (hits.t < FARTHEST))
    face, distance = hits.face[met], hits.t[met]
    kind = tracer.kinds[face]
    normal = tracer.normals[face].mean(1)
    lone = hits.actor[met] >= 0
    for number in np.unique(hits.actor[met][lone]):
        mine = hits.actor[met] == number
        normal[mine] = normal[mine] @ poses[number][:3, :3].T.astype(np.float32)
    facing = np.abs((normal * directions[met]).sum(1)) / np.maximum(np.linalg.norm(normal, axis=1), 1e-6)
    bright = tracer.colours[face].mean(1) ** 0.45
    answer = bright * (0.35 + 0.65 * facing)
    answer[(kind == MARKING) | (kind == SIGNAL) | (kind == METAL)] *= 2.0
    answer[(kind == GRASS) | (kind == SOIL)] *= 1.3
    lost = 0.02 + 0.35 * np.clip((distance - 45) / 55, 0, 1) + 0.45 * (kind == GLASS) * (facing < 0.9)
    lost = lost + 0.6 * (kind == WATER) + 0.25 * wet * np.clip(distance / 40, 0, 1) * (normal[:, 2] > 0.9)
    lost = lost + 0.12 * (kind == PAINT) * (bright < 0.3)
    kept = luck[met] > lost
    met, distance, answer = met[kept], distance[kept], answer[kept]
    distance = distance + np.clip(noise[met], -_WORST, _WORST)
    intensity = np.clip(70 * answer * np.exp(-distance / 90) + spark[met], 0, 255).round()
    points = np.concatenate([local[met] * distance[:, None], intensity[:, None], ring[met][:, None]], 1)
    return Sweep(points.astype(np.float32), hits.face[met], hits.actor[met])
