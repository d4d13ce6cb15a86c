"""Pictures: weather, light and shadows around what `Tracer` meets. H W pixels, M actors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import shade_numba as loops
from .scenery import Scenery
from .streets import Town
from .tracer import Hits, Tracer
from .traffic import Actor

WEATHERS = ("clear", "overcast", "dusk", "night", "rain", "fog")
_ROUGH = 0.065  # difference of neighbours (square root of light) from which a pixel gets more rays
_MORE = ((-0.28, -0.16), (0.30, -0.12), (0.0, 0.32))  # where in the pixel, of its middle
_SHADOW, _SHADED = 8.0, 80.0  # m: how far a shadow is looked for beside its caster, and how far from the eye
_SOFT = 0.2  # spread of shadow rays from which they are smoothed
_CELL = 16.0  # m, of the map of lamps


@dataclass(frozen=True)
class Weather:
    """Light of one scene; colours are linear RGB."""

    name: str
    sun: np.ndarray  # (3,) towards it
    sunlight: np.ndarray  # (3,)
    sky: np.ndarray  # (4, 3): zenith, horizon, sun's colour, (cloud cover, cloud light, sun's disc)
    ambient: np.ndarray  # (2, 3) from above, from below
    fog: np.ndarray  # (3,)
    haze: float  # 1/m
    spread: float  # of shadow rays: 0 sharp
    lift: float  # how far shadow rays lean to the zenith
    night: float
    wet: float
    rain: float
    exposure: float
    grain: float
    leaves: np.ndarray  # (3,) sRGB of the season


def weather(name: str, rng) -> Weather:
    """One of WEATHERS with a sun, haze and season of its own. ValueError for another name."""
    if name not in WEATHERS:
        raise ValueError(f"weather {name!r} is not known; there are: {', '.join(WEATHERS)}")
    azimuth = rng.uniform(-np.pi, np.pi)
    height = np.radians({"clear": rng.uniform(22, 58), "dusk": rng.uniform(5, 11)}.get(name, rng.uniform(35, 60)))
    sun = np.array([np.cos(azimuth) * np.cos(height), np.sin(azimuth) * np.cos(height), np.sin(height)])
    season = np.array([(0.20, 0.33, 0.10), (0.26, 0.36, 0.10), (0.16, 0.28, 0.10), (0.42, 0.33, 0.08)][rng.integers(4)])
    cloud = rng.uniform(0.0, 0.45)
    a = np.array
    table = {
        "clear": {
            "sunlight": a([2.9, 2.65, 2.3]),
            "sky": a([[0.20, 0.38, 0.80], [0.66, 0.76, 0.90], [1, 0.95, 0.85], [cloud, 1.1, 1]]),
            "ambient": a([[0.62, 0.74, 0.95], [0.34, 0.32, 0.29]]),
            "fog": a([0.68, 0.76, 0.88]),
            "haze": rng.uniform(0.0006, 0.0022),
            "spread": 0.008,
            "lift": 0.0,
            "night": 0.0,
            "wet": 0.0,
            "rain": 0.0,
            "exposure": 0.62,
            "grain": 4.0,
        },
        "overcast": {
            "sunlight": a([0.22, 0.22, 0.22]),
            "sky": a([[0.62, 0.66, 0.72], [0.86, 0.88, 0.90], [1, 1, 1], [0.95, 1.0, 0]]),
            "ambient": a([[1.05, 1.08, 1.12], [0.42, 0.41, 0.40]]),
            "fog": a([0.80, 0.83, 0.86]),
            "haze": rng.uniform(0.001, 0.004),
            "spread": 1.5,
            "lift": 0.6,
            "night": 0.0,
            "wet": 0.0,
            "rain": 0.0,
            "exposure": 0.80,
            "grain": 4.0,
        },
        "dusk": {
            "sunlight": a([1.9, 0.95, 0.42]),
            "sky": a([[0.16, 0.22, 0.46], [0.95, 0.55, 0.34], [1, 0.6, 0.3], [cloud, 0.9, 1]]),
            "ambient": a([[0.34, 0.36, 0.52], [0.20, 0.16, 0.15]]),
            "fog": a([0.70, 0.48, 0.38]),
            "haze": rng.uniform(0.001, 0.003),
            "spread": 0.02,
            "lift": 0.0,
            "night": 0.45,
            "wet": 0.0,
            "rain": 0.0,
            "exposure": 1.0,
            "grain": 7.0,
        },
        "night": {
            "sunlight": a([0.012, 0.014, 0.02]),
            "sky": a([[0.006, 0.008, 0.016], [0.035, 0.03, 0.03], [1, 1, 1], [cloud, 0.12, 0]]),
            "ambient": a([[0.030, 0.032, 0.045], [0.015, 0.013, 0.011]]),
            "fog": a([0.03, 0.027, 0.026]),
            "haze": rng.uniform(0.001, 0.003),
            "spread": 0.5,
            "lift": 0.3,
            "night": 1.0,
            "wet": float(rng.random() < 0.3),
            "rain": 0.0,
            "exposure": 1.7,
            "grain": 16.0,
        },
        "rain": {
            "sunlight": a([0.12, 0.12, 0.13]),
            "sky": a([[0.42, 0.46, 0.52], [0.62, 0.65, 0.68], [1, 1, 1], [1.0, 0.9, 0]]),
            "ambient": a([[0.72, 0.76, 0.82], [0.30, 0.30, 0.30]]),
            "fog": a([0.58, 0.61, 0.64]),
            "haze": rng.uniform(0.006, 0.012),
            "spread": 1.5,
            "lift": 0.6,
            "night": 0.3,
            "wet": 1.0,
            "rain": 1.0,
            "exposure": 0.95,
            "grain": 7.0,
        },
        "fog": {
            "sunlight": a([0.15, 0.15, 0.15]),
            "sky": a([[0.70, 0.72, 0.74], [0.78, 0.79, 0.80], [1, 1, 1], [0.9, 1.0, 0]]),
            "ambient": a([[0.95, 0.97, 1.0], [0.42, 0.42, 0.42]]),
            "fog": a([0.74, 0.75, 0.77]),
            "haze": rng.uniform(0.018, 0.035),
            "spread": 1.5,
            "lift": 0.6,
            "night": 0.2,
            "wet": 0.2,
            "rain": 0.0,
            "exposure": 0.82,
            "grain": 5.0,
        },
    }
    return Weather(name, sun, leaves=season, **table[name])


class Painter:
    """Takes pictures of one scene."""

    def __init__(self, tracer: Tracer, scenery: Scenery, town: Town, light: Weather, seed: int):
        self.tracer, self.scenery, self.town, self.light, self.seed = tracer, scenery, town, light, seed
        self.lamps = scenery.lamps.astype(np.float64)
        self.facades = np.concatenate([scenery.facades, np.zeros((1, 8), np.float32)])
        self.corner, self.cells = _cells(self.lamps)
        self._fans: dict = {}  # a rig's cameras stay the same

    def _fan(self, matrix: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rays (H W, 3) through the middles of a camera's pixels, and their columns and rows (H W,)."""
        key = (matrix.tobytes(), size)
        if key not in self._fans:
            v, u = np.divmod(np.arange(size[0] * size[1]), size[1])
            self._fans[key] = _rays(matrix, u + 0.5, v + 0.5), u, v
        return self._fans[key]

    def picture(
        self,
        matrix: np.ndarray,
        world_from_camera: np.ndarray,
        size: tuple[int, int],
        actors: Sequence[Actor],
        poses: np.ndarray,
        time: float,
        world_from_car: np.ndarray,
        number: int,
    ) -> tuple[np.ndarray, Hits]:
        """(H, W, 3) uint8 BGR, and what each pixel's middle met.

        matrix (3, 3) pixels_from_camera; size (H, W); poses (M, 4, 4) of the actors at `time` s; number: of the
        picture, for its grain.
        """
        height, width = size
        light = self.light
        eye = world_from_camera[:3, 3].astype(np.float32)
        # who cannot be in the picture is not looked for, nor is a shadow that cannot fall into it
        seen = within(matrix, world_from_camera, size, actors, poses, 0.5)
        shadow = light.sunlight.max() > 0.05
        casts = within(matrix, world_from_camera, size, actors, poses, _SHADOW) if shadow else []
        casts = [k for k in casts if np.linalg.norm(poses[k][:3, 3] - eye) < _SHADED]
        casters, caster_poses = [actors[k] for k in casts], poses[casts]
        who = np.array(seen, np.int32)
        seen, seen_poses = [actors[k] for k in seen], poses[seen]
        table = _Table(self, seen, seen_poses, time, world_from_car)
        rays, u, v = self._fan(matrix, size)
        turn, stay = world_from_camera[:3, :3].astype(np.float32), np.zeros(3, np.float32)
        directions = loops.turned(rays, turn, stay)
        origins = np.broadcast_to(eye, directions.shape).copy()
        pixel = 1.0 / matrix[0, 0]
        hits = self.tracer.cast(origins, directions, seen, seen_poses, time)
        lit = self._lit(eye, directions, hits, casters, caster_poses, time)
        soft = light.spread > _SOFT
        if soft:  # one ray a pixel is too few for a wide sky: neighbours on the same surface share theirs
            lit = loops.smooth(lit, hits.t, hits.face, height, width)
        colour = self._shade(eye, directions, hits, lit, table, pixel)
        chosen = loops.rough(colour, height, width, np.float32(light.exposure), np.float32(_ROUGH))
        if len(chosen):
            total = colour[chosen].copy()
            bright = 4.0 / light.exposure  # one glint must not outshine the pixel
            np.minimum(total, bright, out=total)
            for du, dv in _MORE:
                more = loops.turned(_rays(matrix, u[chosen] + 0.5 + du, v[chosen] + 0.5 + dv), turn, stay)
                again = self.tracer.cast(origins[: len(chosen)], more, seen, seen_poses, time)
                light_here = lit[chosen] if soft else self._lit(eye, more, again, casters, caster_poses, time)
                shade = self._shade(eye, more, again, light_here, table, pixel)
                total += np.minimum(shade, bright)
            colour[chosen] = total / (1 + len(_MORE))
        grain = np.float32(light.grain)
        out = loops.develop(
            colour,
            height,
            width,
            np.float32(light.exposure),
            grain,
            np.float32(light.rain),
            (self.seed + number) & 0xFFFF,
        )
        # those who were looked for, by their number among all
        actor = np.where(hits.actor >= 0, np.append(who, -1)[hits.actor], np.int32(-1)).astype(np.int32)
        return out, replace(hits, actor=actor)

    def _lit(self, eye, directions, hits: Hits, actors, poses, time) -> np.ndarray:
        """(N,) float32: does the sun (or, where it is not seen, the zenith) shine on the hits?"""
        light = self.light
        lit = np.zeros(len(directions), np.float32)
        if light.sunlight.max() > 0.05:
            solid = np.flatnonzero((hits.face >= 0) & (hits.t < 160)).astype(np.int64)
            if len(solid):
                start = np.empty((len(solid), 3), np.float32)
                rays = loops.towards(
                    start,
                    eye,
                    directions[solid],
                    hits.t[solid],
                    hits.face[solid],
                    light.sun.astype(np.float32),
                    np.float32(light.spread),
                    np.float32(light.lift),
                    self.seed & 0xFFFF,
                )
                lit[solid] = ~self.tracer.blocked(start, rays, actors, poses, time)
            lit[hits.t >= 160] = 1.0
        return lit

    def _shade(self, eye, directions, hits: Hits, lit, table, pixel) -> np.ndarray:
        light = self.light
        out = np.empty((len(directions), 3), np.float32)
        tracer = self.tracer
        loops.shade(
            out,
            eye,
            directions,
            hits.t,
            hits.face,
            hits.actor,
            hits.u,
            hits.v,
            lit,
            pixel,
            tracer.normals,
            tracer.kinds,
            tracer.colours,
            tracer.aux,
            table.turns,
            table.shifts,
            table.paints,
            table.braking,
            self.facades,
            table.signals,
            self.lamps,
            self.cells,
            self.corner,
            light.sky,
            light.sun,
            light.sunlight,
            light.ambient,
            light.night,
            light.wet,
            light.haze,
            light.fog,
            table.headlights,
            self.seed & 0xFFFF,
        )
        return out


class _Table:
    """What the painter looks up for actors and signals at one time."""

    def __init__(self, painter: Painter, actors, poses, time, world_from_car):
        m = max(len(actors), 1)
        self.turns, self.shifts = np.zeros((m, 3, 3)), np.zeros((m, 3))
        self.paints, self.braking = np.ones((m, 2, 3)), np.zeros(m, np.float32)
        for k, (actor, pose) in enumerate(zip(actors, poses)):
            self.turns[k], self.shifts[k] = pose[:3, :3], pose[:3, 3]
            self.paints[k] = actor.colours**2.2
            if actor.moves and actor.model.kind not in ("bicycle", "pedestrian"):
                speed, later = actor.motion.speed(time), actor.motion.speed(time + 0.3)
                self.braking[k] = 1.0 if later < speed - 0.25 or speed < 0.2 else 0.3 * painter.light.night
        rows = painter.scenery.signals
        self.signals = np.zeros(3 * len(rows) + 3, np.float32)
        for k, (i, j, approach, _) in enumerate(rows):
            town = painter.town
            if town.green(i, j, approach, time):
                lamp = 2
            elif town.green(i, j, approach, time - 1.5):
                lamp = 1  # amber while those who are late still pass
            else:
                lamp = 0
            self.signals[3 * k + lamp] = 1.0
        strength = 900.0 * painter.light.night
        place = world_from_car @ [3.9, 0, 0.7, 1]
        aim = world_from_car[:3, :3] @ [0.998, 0, -0.045]
        self.headlights = np.array([*place[:3], *aim, strength])


def within(matrix, world_from_camera, size, actors, poses, margin: float) -> list[int]:
    """Numbers of the actors whose ball, `margin` m larger, reaches into the picture's pyramid."""
    if not len(actors):
        return []
    height, width = size
    middles = np.array([a.model.middle for a in actors])
    radii = np.array([a.model.reach for a in actors]) + margin
    world = np.einsum("mij,mj->mi", poses[:, :3, :3], middles) + poses[:, :3, 3]
    places = (world - world_from_camera[:3, 3]) @ world_from_camera[:3, :3]  # x right, y down, z ahead
    inside = places[:, 2] > -radii
    corner = np.linalg.inv(matrix) @ np.array([[0, width], [0, height], [1, 1]])  # upper left, lower right at z = 1
    for axis, side, sign in ((0, 0, 1), (0, 1, -1), (1, 0, 1), (1, 1, -1)):
        slope = corner[axis, side]
        away = sign * (places[:, axis] - slope * places[:, 2]) / np.hypot(1, slope)
        inside &= away > -radii
    return np.flatnonzero(inside).tolist()


def _rays(matrix, u, v) -> np.ndarray:
    """(N, 3) float32 of length one in the camera's frame, through pixel coordinates u, v (N,)."""
    inverse = np.linalg.inv(matrix)
    rays = u[:, None] * inverse[:, 0] + v[:, None] * inverse[:, 1] + inverse[:, 2]
    rays /= np.sqrt((rays * rays).sum(1, keepdims=True))
    return rays.astype(np.float32)


def _cells(lamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A map of which lamps reach which cell: its corner (2,) and (C, C, 8) int32."""
    if not len(lamps):
        return np.zeros(2), np.full((1, 1, 1), -1, np.int32)
    corner = lamps[:, :2].min(0) - 2 * _CELL
    size = np.ceil((lamps[:, :2].max(0) + 2 * _CELL - corner) / _CELL).astype(int)
    cells = np.full((*size, 8), -1, np.int32)
    middles = corner + (np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1) + 0.5) * _CELL
    far = np.linalg.norm(middles[:, :, None] - lamps[:, :2], axis=3)  # (C, C, L)
    order = np.argsort(far, axis=2)[:, :, :8]
    reach = np.take_along_axis(far, order, 2) < 32
    cells[:, :, : order.shape[2]] = np.where(reach, order, -1)
    return corner, cells
