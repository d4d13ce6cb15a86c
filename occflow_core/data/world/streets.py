"""The plan of a town: roads, lanes, junctions, blocks, signals, and the bend that makes its straight lines streets.

Everything is planned on a flat sheet (u, v) in metres where roads run along the axes; `Bend` takes the sheet into the
world (x, y, z) so gently that lengths and right angles nearly stay. Traffic keeps to the right.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .meshes import rotation

LANE, BIKE, PARKING, MEDIAN = 3.4, 1.6, 2.2, 2.0  # m, widths
KERB, CORNER = 0.15, 6.0  # m: height of a sidewalk, radius of a kerb at a junction
STOP, ZEBRA = 7.6, (3.0, 6.4)  # m before a junction's edge: stop line; crossing
GREEN, CLEAR, WALK = 8.0, 2.0, 8.0  # s: one road has green, then the other, then those on foot
CYCLE = 2 * (GREEN + CLEAR) + WALK
HEADINGS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # of driving, counter-clockwise; an approach is named by its heading


@dataclass(frozen=True)
class Bend:
    """Sheet -> world: shallow waves sideways (streets curve) and up (hills)."""

    waves: np.ndarray  # (3, 2, 4): for x, y, z two waves each: amplitude m, wave numbers along u and v 1/m, phase
    turn: float  # rad, of the whole town

    @staticmethod
    def random(rng) -> "Bend":
        waves = np.zeros((3, 2, 4))
        for axis in range(2):
            for k in range(2):
                length = rng.uniform(55, 110)  # m / rad
                waves[axis, k] = [rng.uniform(-0.055, 0.055) * length, 0, 0, rng.uniform(0, 2 * np.pi)]
                waves[axis, k, 2 - axis] = 1 / length  # x swings along v, y along u: shear without stretching
        for k in range(2):
            length, angle = rng.uniform(50, 110), rng.uniform(0, np.pi)
            waves[2, k] = [0.010 * length, np.cos(angle) / length, np.sin(angle) / length, rng.uniform(0, 2 * np.pi)]
        return Bend(waves, rng.uniform(-np.pi, np.pi))

    def __call__(self, sheet: np.ndarray) -> np.ndarray:
        """Points (..., 2) or (..., 3) of the sheet (the third: m above its ground) -> (..., 3) in the world."""
        u, v = sheet[..., 0, None], sheet[..., 1, None]
        amplitude, ku, kv, phase = (self.waves[..., k] for k in range(4))  # (3, 2) each
        out = (amplitude * np.sin(ku * u[..., None] + kv * v[..., None] + phase)).sum(-1)
        out[..., :2] += sheet[..., :2]
        if sheet.shape[-1] == 3:
            out[..., 2] += sheet[..., 2]
        return out @ rotation(self.turn).T

    def frames(self, sheet: np.ndarray, yaw: np.ndarray) -> np.ndarray:
        """World poses (N, 4, 4) of things that stand at (N, 3) of the sheet, headed along yaw (N,) there."""
        sheet, yaw = np.asarray(sheet, dtype=float), np.asarray(yaw, dtype=float)
        ahead = np.stack([np.cos(yaw), np.sin(yaw)], -1) * 0.5
        left = np.stack([-np.sin(yaw), np.cos(yaw)], -1) * 0.5
        along = self(sheet[:, :2] + ahead) - self(sheet[:, :2] - ahead)
        across = self(sheet[:, :2] + left) - self(sheet[:, :2] - left)
        return frames(self(sheet), along, across)


def frames(places: np.ndarray, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """(N, 4, 4) from places, directions ahead and rough directions to the left (N, 3)."""
    x = along / np.linalg.norm(along, axis=-1, keepdims=True)
    z = np.cross(x, across)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    out = np.zeros((len(places), 4, 4))
    out[:, :3, 0], out[:, :3, 1], out[:, :3, 2], out[:, :3, 3] = x, np.cross(z, x), z, places
    out[:, 3, 3] = 1
    return out


@dataclass(frozen=True)
class Road:
    """A straight road of the sheet."""

    at: float  # m, its middle
    lanes: int  # each way
    bike: bool
    parking: bool
    median: bool

    @property
    def inner(self) -> float:
        """m from the middle to the first lane."""
        return MEDIAN / 2 if self.median else 0.0

    @property
    def half(self) -> float:
        """m from the middle to the kerb."""
        return self.inner + self.lanes * LANE + self.bike * BIKE + self.parking * PARKING

    def offset(self, lane: int) -> float:
        """m from the middle to the middle of a lane (0 is the innermost; `lanes` is the bicycles')."""
        if lane == self.lanes:
            return self.inner + self.lanes * LANE + BIKE / 2
        return self.inner + (lane + 0.5) * LANE


@dataclass(frozen=True)
class Path:
    """A way through the sheet by its length, 0.2 m from point to point."""

    sheet: np.ndarray  # (K, 2) m
    stops: tuple[tuple[float, int, int, int], ...]  # (m along, junction i, junction j, approach)

    SPACING = 0.2

    @cached_property
    def length(self) -> float:
        return (len(self.sheet) - 1) * self.SPACING

    @cached_property
    def limit(self) -> np.ndarray:
        """(K,) m/s at which a turn is still comfortable (2.2 m/s2), braking for it in time (1.8 m/s2)."""
        d = np.gradient(self.sheet, self.SPACING, axis=0)
        heading = np.unwrap(np.arctan2(d[:, 1], d[:, 0]))
        bend = np.abs(np.gradient(heading, self.SPACING))
        bend = np.convolve(np.pad(bend, 5, mode="edge"), np.ones(11) / 11, mode="valid")
        speed = np.sqrt(2.2 / np.maximum(bend, 1e-4))
        for k in range(len(speed) - 2, -1, -1):
            speed[k] = min(speed[k], np.sqrt(speed[k + 1] ** 2 + 2 * 1.8 * self.SPACING))
        return speed

    def at(self, s) -> np.ndarray:
        """Points (..., 2) at lengths (...) m; straight on beyond both ends."""
        s = np.asarray(s, dtype=float)
        k = np.clip(np.floor(s / self.SPACING).astype(int), 0, len(self.sheet) - 2)
        part = (s / self.SPACING - k)[..., None]
        return self.sheet[k] * (1 - part) + self.sheet[k + 1] * part


@dataclass(frozen=True)
class Town:
    """Roads along u and v, the blocks between them, the signals at their junctions."""

    bend: Bend
    columns: tuple[Road, ...]  # run along v, `at` is their u
    rows: tuple[Road, ...]  # run along u
    sidewalks: np.ndarray  # (columns - 1, rows - 1) m, width of each block's
    offsets: np.ndarray  # (columns, rows) s, when the signals' cycle began

    @staticmethod
    def random(rng, size: int = 6) -> "Town":
        def line():
            at, roads = -0.5 * (size - 1) * 82.0, []
            for _ in range(size):
                lanes = int(rng.choice([1, 1, 2]))
                roads.append(
                    Road(
                        at,
                        lanes,
                        bool(rng.random() < 0.55),
                        bool(rng.random() < 0.75),
                        lanes == 2 and rng.random() < 0.6,
                    )
                )
                at += rng.uniform(68, 98)
            return tuple(roads)

        return Town(
            Bend.random(rng),
            line(),
            line(),
            rng.uniform(2.6, 4.6, (size - 1, size - 1)),
            rng.uniform(0, CYCLE, (size, size)),
        )

    def block(self, i: int, j: int) -> tuple[float, float, float, float]:
        """u0, v0, u1, v1 of the kerbs around block (i, j), m."""
        a, b, c, d = self.columns[i], self.columns[i + 1], self.rows[j], self.rows[j + 1]
        return a.at + a.half, c.at + c.half, b.at - b.half, d.at - d.half

    def road(self, heading: int, i: int, j: int) -> Road:
        """The road on which one passes junction (i, j) with a heading."""
        return self.rows[j] if heading % 2 == 0 else self.columns[i]

    def edge(self, heading: int, i: int, j: int) -> float:
        """m from the middle of junction (i, j) to where the crossing road begins."""
        return (self.columns[i] if heading % 2 == 0 else self.rows[j]).half

    def middle(self, i: int, j: int) -> np.ndarray:
        return np.array([self.columns[i].at, self.rows[j].at])

    def green(self, i: int, j: int, approach: int, time: float) -> bool:
        """May those who come with this heading drive at a time in s?"""
        phase = (time - self.offsets[i, j]) % CYCLE
        return approach % 2 * (GREEN + CLEAR) <= phase < approach % 2 * (GREEN + CLEAR) + GREEN

    def walk(self, i: int, j: int, after: float) -> float:
        """When those on foot may next begin to cross, s."""
        begin = self.offsets[i, j] + 2 * (GREEN + CLEAR)
        return begin + CYCLE * np.ceil((after - begin) / CYCLE)

    def route(
        self, rng, start: tuple[int, int], heading: int, turns: float, lane: int | None, junctions: int = 8
    ) -> Path:
        """A way from halfway before junction `start` through `junctions` of them, turning with probability `turns`.

        `lane`: counted from the middle; None = any. Bicycles (lane = lanes of the road) only go straight on.
        """
        i, j = start
        road = self.road(heading, i, j)
        lane = int(rng.integers(road.lanes)) if lane is None else lane
        points, stops, length = [], [], 0.0

        def add(more):
            nonlocal length
            more = np.asarray(more, dtype=float)
            if points:
                length += np.linalg.norm(more[0] - points[-1][-1])
            length += np.linalg.norm(np.diff(more, axis=0), axis=1).sum()
            points.append(more)

        def on_lane(heading, road, i, j, lane, ahead):
            """The point `ahead` m beyond the middle of junction (i, j) on a lane."""
            d = np.array(HEADINGS[heading], dtype=float)
            return self.middle(i, j) + d * ahead + np.array([d[1], -d[0]]) * road.offset(lane)

        def inside(i, j):
            return 0 < i < len(self.columns) - 1 and 0 < j < len(self.rows) - 1

        add([on_lane(heading, road, i, j, lane, -45.0)])
        for _ in range(junctions):
            edge = self.edge(heading, i, j)
            choices = [0]
            if lane == 0 or road.lanes == 1:
                choices.append(1)
            if lane == road.lanes - 1:
                choices.append(-1)
            if lane == road.lanes:
                choices = [0]
            step = HEADINGS[heading]
            straight_ok = inside(i + step[0], j + step[1])
            wish = [c for c in choices if c] if rng.random() < turns else [0]
            wish = [
                c
                for c in (wish or choices)
                if inside(i + HEADINGS[(heading + c) % 4][0], j + HEADINGS[(heading + c) % 4][1])
            ]
            if not wish:
                wish = [0] if straight_ok or lane == road.lanes else [c for c in choices if c] or [0]
            way = int(rng.choice(wish))
            add([on_lane(heading, road, i, j, lane, -edge - STOP)])
            stops.append((length, i, j, heading))
            after = (heading + way) % 4
            if way == 0:
                add([on_lane(heading, road, i, j, lane, edge + 8.0)])
            else:
                new = self.road(after, i, j)
                new_lane = 0 if way == 1 else new.lanes - 1
                back = CORNER if way == -1 else 1.0
                a = on_lane(heading, road, i, j, lane, -edge - back)
                b = on_lane(after, new, i, j, new_lane, self.edge(after, i, j) + back)
                d0, d1 = np.array(HEADINGS[heading], dtype=float), np.array(HEADINGS[after], dtype=float)
                reach = 0.56 * np.array([abs((b - a) @ d0), abs((b - a) @ d1)])
                t = np.linspace(0, 1, 60)[:, None]
                p, q = a + d0 * reach[0], b - d1 * reach[1]
                add((1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * p + 3 * (1 - t) * t**2 * q + t**3 * b)
                heading, road, lane = after, new, new_lane
            i, j = i + HEADINGS[heading][0], j + HEADINGS[heading][1]
            if not (0 <= i < len(self.columns) and 0 <= j < len(self.rows)):
                break
        add([points[-1][-1] + 60.0 * np.array(HEADINGS[heading])])
        line = np.concatenate(points)
        line = line[np.concatenate([[True], np.linalg.norm(np.diff(line, axis=0), axis=1) > 1e-6])]
        along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
        s = np.arange(0, along[-1], Path.SPACING)
        return Path(np.stack([np.interp(s, along, line[:, k]) for k in range(2)], 1), tuple(stops))

    def around(self, i: int, j: int, inset: float, backwards: bool) -> Path:
        """Around block (i, j) on its sidewalk, `inset` m from the kerb, eight times."""
        u0, v0, u1, v1 = np.array(self.block(i, j)) + np.array([inset, inset, -inset, -inset])
        r = max(CORNER - inset, 0.8)
        line = []
        for cu, cv, first in (
            (u1 - r, v1 - r, 0.0),
            (u0 + r, v1 - r, 0.5),
            (u0 + r, v0 + r, 1.0),
            (u1 - r, v0 + r, 1.5),
        ):
            angle = np.pi * (first + np.linspace(0, 0.5, 12))
            line.append(np.stack([cu + r * np.cos(angle), cv + r * np.sin(angle)], 1))
        line = np.concatenate(line)
        line = np.concatenate([*[line[::-1] if backwards else line] * 8])
        along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
        s = np.arange(0, along[-1], Path.SPACING)
        return Path(np.stack([np.interp(s, along, line[:, k]) for k in range(2)], 1), ())
