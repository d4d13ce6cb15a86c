"""Who moves, where and when: drivers who keep their distance and obey signals, people on foot, the ego car.

Everybody follows a path of the sheet by its length s(t). Cars take their speed from the Intelligent Driver Model
(Treiber, Hennecke, Helbing: Congested traffic states, 2000), simulated in steps of 0.1 s; in between s is a cubic.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .models import PHASES, STEP, Model, models
from .streets import CLEAR, CYCLE, GREEN, HEADINGS, KERB, ZEBRA, Path, Town, frames

DT = 0.1  # s, of the simulation
WARM = 12.0  # s before a scene may begin, in which queues form
WHEELBASE = 2.75  # m, of the ego car; its frame is at the middle of the rear axle
_EGO = (-1.0, 3.7, 1.9)  # m: rear and front bumper in that frame, width
_SLOW = 0.2  # m/s, below which a vehicle counts as stopped


@dataclass(frozen=True)
class Motion:
    """s(t): lengths and speeds at equal steps of DT from `begin`, cubic in between."""

    begin: float  # s
    s: np.ndarray  # (K,) m
    v: np.ndarray  # (K,) m/s

    def __call__(self, time: float) -> float:
        x = (time - self.begin) / DT
        k = int(np.clip(np.floor(x), 0, len(self.s) - 2))
        f = x - k
        a, b, va, vb = self.s[k], self.s[k + 1], self.v[k] * DT, self.v[k + 1] * DT
        return float(
            (2 * f**3 - 3 * f**2 + 1) * a + (f**3 - 2 * f**2 + f) * va + (3 * f**2 - 2 * f**3) * b + (f**3 - f**2) * vb
        )

    def speed(self, time: float) -> float:
        return (self(time + 0.02) - self(time - 0.02)) / 0.04


@dataclass(frozen=True)
class Actor:
    """One thing of a model: it follows a path, or stands at a pose."""

    model: Model
    colours: np.ndarray  # (2, 3) sRGB
    pose: np.ndarray | None = None  # (4, 4) world_from_actor of what never moves
    path: Path | None = None
    motion: Motion | None = None
    lift: float = 0.0  # m above the sheet's ground: on a sidewalk
    parked: bool = False
    town: Town | None = field(default=None, repr=False)

    @property
    def moves(self) -> bool:
        return self.motion is not None

    @property
    def feet(self) -> tuple[float, float]:
        """m: x of the two points that are on the path."""
        front, rear = self.model.axles
        return (front, rear) if front - rear > 0.2 else (0.15, -0.15)

    def world_from_actor(self, time: float) -> np.ndarray:
        """(4, 4) float64."""
        if self.pose is not None:
            return self.pose
        front, rear = self.feet
        s = self.motion(time)
        a, b = self.path.at(np.array([s + front, s + rear]))
        upright = np.array([self.model.kind == "pedestrian"])
        return _stand(self.town, a[None], b[None], np.array([self.lift]), np.array([rear]), upright)[0]

    def shape(self, time: float) -> int:
        """Which of the model's meshes it shows."""
        if len(self.model.meshes) == 1 or not self.moves or self.motion.speed(time) < 0.1:
            return 0
        return 1 + int(self.motion(time) / STEP * PHASES) % PHASES

    def attribute(self, time: float) -> str | None:
        """Its nuScenes attribute."""
        kind, moving = self.model.kind, self.moves and self.motion.speed(time) > _SLOW
        if kind == "pedestrian":
            return "pedestrian.moving" if moving else "pedestrian.standing"
        if kind in ("bicycle", "motorcycle"):
            return "cycle.with_rider" if self.model.name.endswith("cyclist") else "cycle.without_rider"
        if kind in ("car", "truck", "bus", "trailer", "construction_vehicle"):
            return "vehicle.parked" if self.parked else "vehicle.moving" if moving else "vehicle.stopped"
        return None


def _stand(town: Town, front, rear, lift, back, upright) -> np.ndarray:
    """(N, 4, 4) of what has two points (N, 2) on the sheet, the rear one `back` (N,) m ahead of its origin; people
    (`upright`) do not lean with a slope."""
    ahead = front - rear
    left = np.stack([-ahead[:, 1], ahead[:, 0]], 1)
    middle = (front + rear) / 2
    n = len(front)
    world = town.bend(
        np.concatenate([np.c_[np.concatenate([front, rear]), np.tile(lift, 2)], np.c_[middle + left, lift]])
    )
    world = np.concatenate([world, (world[:n] + world[n : 2 * n])[None].reshape(-1, 3) / 2])
    a, b, side, centre = world[:n], world[n : 2 * n], world[2 * n : 3 * n], world[3 * n :]
    along, across = a - b, side - centre
    along[upright, 2] = 0
    across[upright, 2] = 0
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    return frames(b - back[:, None] * along, along, across)


@dataclass(frozen=True)
class Traffic:
    """All that follows paths, and the ego car among it."""

    town: Town
    ego: Path
    motion: Motion
    actors: tuple[Actor, ...]

    def world_from_car(self, time: float) -> np.ndarray:
        """(4, 4) float64: the ego frame of nuScenes (rear axle, on the ground)."""
        s = self.motion(time)
        a, b = self.ego.at(np.array([s + WHEELBASE, s]))
        return _stand(self.town, a[None], b[None], np.zeros(1), np.zeros(1), np.zeros(1, bool))[0]

    def poses(self, time: float) -> np.ndarray:
        """(A, 4, 4) world_from_actor of all actors, at once."""
        t = self._stacked
        x = np.clip((time - t["begin"]) / DT, 0, t["steps"] - 1.000001)
        k = np.floor(x).astype(int)
        f, row = x - k, np.arange(len(k))
        s0, s1, v0, v1 = t["s"][row, k], t["s"][row, k + 1], t["v"][row, k] * DT, t["v"][row, k + 1] * DT
        s = (
            (2 * f**3 - 3 * f**2 + 1) * s0
            + (f**3 - 2 * f**2 + f) * v0
            + (3 * f**2 - 2 * f**3) * s1
            + (f**3 - f**2) * v1
        )
        ends = (s[:, None] + t["feet"]) / Path.SPACING  # (A, 2)
        n = np.clip(np.floor(ends).astype(int), 0, t["count"][:, None] - 2)
        part = (ends - n)[..., None]
        at = t["first"][:, None] + n
        sheet = t["sheets"][at] * (1 - part) + t["sheets"][at + 1] * part
        return _stand(self.town, sheet[:, 0], sheet[:, 1], t["lift"], t["feet"][:, 1], t["upright"])

    @cached_property
    def _stacked(self) -> dict[str, np.ndarray]:
        paths = [a.path.sheet for a in self.actors]
        count = np.array([len(p) for p in paths])
        return {
            "begin": np.array([a.motion.begin for a in self.actors]),
            "steps": np.array([len(a.motion.s) for a in self.actors]),
            "s": _padded([a.motion.s for a in self.actors]),
            "v": _padded([a.motion.v for a in self.actors]),
            "feet": np.array([a.feet for a in self.actors]),
            "lift": np.array([a.lift for a in self.actors]),
            "upright": np.array([a.model.kind == "pedestrian" for a in self.actors]),
            "sheets": np.concatenate(paths),
            "count": count,
            "first": np.cumsum(count) - count,
        }


def _padded(rows) -> np.ndarray:
    out = np.zeros((len(rows), max(len(r) for r in rows)))
    for k, row in enumerate(rows):
        out[k, : len(row)] = row
    return out


_PAINTS = np.array(
    [(0.93, 0.93, 0.93), (0.75, 0.76, 0.78), (0.45, 0.46, 0.48), (0.1, 0.1, 0.11), (0.16, 0.2, 0.32), (0.55, 0.08, 0.1)]
    + [(0.2, 0.35, 0.6), (0.3, 0.33, 0.28), (0.72, 0.66, 0.55), (0.8, 0.45, 0.1), (0.12, 0.3, 0.22), (0.9, 0.78, 0.2)]
)
_CLOTHES = np.array(
    [(0.15, 0.16, 0.2), (0.7, 0.7, 0.72), (0.55, 0.12, 0.12), (0.15, 0.25, 0.5), (0.3, 0.4, 0.25), (0.8, 0.7, 0.5)]
    + [(0.45, 0.3, 0.5), (0.9, 0.6, 0.2), (0.25, 0.5, 0.55), (0.35, 0.25, 0.18)]
)
_TROUSERS = np.array([(0.12, 0.14, 0.22), (0.1, 0.1, 0.1), (0.25, 0.3, 0.42), (0.45, 0.4, 0.32), (0.3, 0.3, 0.3)])
_COATS = np.array([(0.85, 0.75, 0.1), (0.7, 0.12, 0.12), (0.12, 0.3, 0.6), (0.9, 0.9, 0.88), (0.15, 0.45, 0.3)])


def colours(model: Model, rng) -> np.ndarray:
    """(2, 3): what an actor of this model wears."""
    if model.kind == "pedestrian" or model.name.endswith("cyclist"):
        first = _CLOTHES[rng.integers(len(_CLOTHES))] if "worker" not in model.name else np.array([0.95, 0.45, 0.05])
        return np.stack([first, _TROUSERS[rng.integers(len(_TROUSERS))]])
    first = _PAINTS[rng.choice(12, p=[0.2, 0.16, 0.14, 0.16, 0.08, 0.06, 0.06, 0.03, 0.04, 0.02, 0.03, 0.02])]
    if model.kind == "bus":
        first = _COATS[rng.integers(len(_COATS))]
    return np.clip(np.stack([first, _COATS[rng.integers(len(_COATS))]]) + rng.uniform(-0.03, 0.03, (2, 3)), 0.02, 0.97)


class _Drivers:
    """Vehicles on their paths while they are simulated."""

    def __init__(self, town: Town, people):
        self.town, self.people = town, people  # people: time -> (M, 2) on the sheet
        self.paths, self.s, self.v, self.front, self.rear, self.half, self.wish = [], [], [], [], [], [], []
        self._first = []

    def add(self, path, s, v, front, rear, half, wish) -> None:
        for name, value in zip(
            ("paths", "s", "v", "front", "rear", "half", "wish"), (path, s, v, front, rear, half, wish)
        ):
            getattr(self, name).append(value)

    def circles(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Round stand-ins for all bodies: places (M, 2), radii (M,), whose they are (M,)."""
        from . import traffic_numba

        if len(self._first) != len(self.paths):
            self._count = np.array([len(p.sheet) for p in self.paths])
            self._first = np.cumsum(self._count) - self._count
            self._sheets = np.concatenate([p.sheet for p in self.paths])
            rows = [
                np.linspace(rear, front, max(2, int(np.ceil((front - rear) / 2.0)) + 1))
                for front, rear in zip(self.front, self.rear)
            ]
            self._offset = np.concatenate(rows)
            self._owner = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        s = np.array(self.s, dtype=float)
        places = traffic_numba.along(self._sheets, self._first, self._count, Path.SPACING, s, self._owner, self._offset)
        return places, np.array(self.half)[self._owner], self._owner

    def step(self, time: float) -> None:
        from . import traffic_numba

        places, radii, owner = self.circles()
        walkers = self.people(time)
        places = np.concatenate([places, walkers])
        radii = np.concatenate([radii, np.full(len(walkers), 0.5)])
        owner = np.concatenate([owner, np.full(len(walkers), -1)])
        s, v, front, half = (np.array(x, dtype=float) for x in (self.s, self.v, self.front, self.half))
        gaps = traffic_numba.gaps(
            self._sheets, self._first, self._count, Path.SPACING, s, front, v, half, places, radii, owner
        )
        for k, path in enumerate(self.paths):
            v, nose, gap = self.v[k], self.s[k] + self.front[k], gaps[k]
            for stop, i, j, approach in path.stops:
                left = stop - nose
                if -0.5 < left < 40 and not self.town.green(i, j, approach, time) and v * v / (2 * 3.5) < left + 0.5:
                    gap = min(gap, max(left + 1.2, 0.05))
            wish = min(self.wish[k], path.limit[int(np.clip(self.s[k] / path.SPACING, 0, len(path.limit) - 1))])
            space = 2.0 + max(0.0, v * 1.1 + v * v / (2 * np.sqrt(1.8 * 2.2)) * (gap < 60))
            a = 1.8 * (1 - (v / max(wish, 0.3)) ** 4 - (min(space / max(gap, 0.1), 6.0)) ** 2)
            after = max(0.0, v + min(max(a, -6.0), 1.8) * DT)
            move = (v + after) / 2 * DT
            if move > max(gap - 0.6, 0.0):  # never into anybody
                move, after = 0.0, 0.0
            self.s[k] += move
            self.v[k] = after


def simulate(town: Town, rng, duration: float, *, vehicles: int = 46, cyclists: int = 9, walkers: int = 70) -> Traffic:
    """Traffic around an ego car for `duration` s from time zero (and a little before and after)."""
    size = len(town.columns)
    library = models()
    middle = size // 2
    begin, spare = -WARM, 14.0
    end = duration + spare + 1.0
    ego_heading = int(rng.integers(4))
    start = (middle - (ego_heading in (0, 1)), middle - (ego_heading in (0, 1)))
    ego = town.route(rng, start, ego_heading, 0.6, None)
    _welcome(town, ego, rng, begin)

    on_foot = _walkers(town, rng, ego, begin, end, walkers)
    feet = [(a, a.path, a.motion) for a in on_foot if a.lift == 0.0]

    def people(time):
        return np.array([path.at(motion(time)) for _, path, motion in feet]).reshape(-1, 2)

    drivers = _Drivers(town, people)
    drivers.add(ego, 0.0, 5.0, _EGO[1], _EGO[0], _EGO[2] / 2, rng.uniform(8.5, 12.0))
    fleet = _fleet(town, rng, library, vehicles, cyclists, drivers)
    steps = int(round((end - begin) / DT)) + 1
    s, v = np.zeros((steps, len(drivers.paths))), np.zeros((steps, len(drivers.paths)))
    for k in range(steps):
        s[k], v[k] = drivers.s, drivers.v
        drivers.step(begin + k * DT)
    # the stretch of the drive that shows most: turns first, then distance
    best, shift = -1.0, 0.0
    for candidate in np.arange(0.0, spare + 0.1, 2.0):
        a, b = (int(round((candidate + t - begin) / DT)) for t in (0.0, duration))
        line = np.diff(ego.at(s[a : b + 1, 0]), axis=0)
        line = line[np.linalg.norm(line, axis=1) > 0.05]
        heading = np.unwrap(np.arctan2(line[:, 1], line[:, 0])) if len(line) else np.zeros(1)
        score = min(np.ptp(heading), 3.5) + 0.015 * (s[b, 0] - s[a, 0]) - 0.02 * candidate
        if score > best:
            best, shift = score, candidate
    begin -= shift
    town = Town(town.bend, town.columns, town.rows, town.sidewalks, town.offsets - shift)
    actors = []
    for model, index, drop in fleet:
        motion = Motion(begin, s[:, index] - drop, v[:, index])
        actors.append(Actor(model, colours(model, rng), path=drivers.paths[index], motion=motion, town=town))
    for a in on_foot:
        motion = Motion(begin, a.motion.s, a.motion.v)
        actors.append(Actor(a.model, a.colours, path=a.path, motion=motion, lift=a.lift, town=town))
    return Traffic(town, ego, Motion(begin, s[:, 0], v[:, 0]), tuple(actors))


def _welcome(town: Town, ego: Path, rng, begin: float) -> None:
    """Set the signals on the ego car's way so that most are green, or soon will be, when it comes."""
    for stop, i, j, approach in ego.stops:
        arrival = begin + stop / 7.0
        early = rng.uniform(1.0, GREEN - 2.5) if rng.random() < 0.7 else -rng.uniform(1.0, 5.0)
        town.offsets[i, j] = arrival - early - approach % 2 * (GREEN + CLEAR) - CYCLE


def _fleet(town, rng, library, vehicles, cyclists, drivers):
    """Put vehicles on the roads where nobody stands yet; (model, driver, m by which it trails its driver)."""
    names = [
        "sedan",
        "hatch",
        "suv",
        "wagon",
        "van",
        "coupe",
        "pickup",
        "lorry",
        "tipper",
        "bus",
        "tractor",
        "motorcyclist",
    ]
    odds = np.array([0.17, 0.15, 0.15, 0.08, 0.06, 0.04, 0.07, 0.06, 0.03, 0.06, 0.05, 0.08])
    fleet, size = [], len(town.columns)
    # near the ego car's way there is more to see: its junctions count three times
    junctions = [(i, j) for i in range(1, size - 1) for j in range(1, size - 1)]
    junctions += [(i, j) for _, i, j, _ in drivers.paths[0].stops[:4]] * 3
    for k in range(vehicles + cyclists):
        bicycle = k >= vehicles
        model = library["cyclist" if bicycle else names[rng.choice(len(names), p=odds / odds.sum())]]
        for _ in range(12):
            heading = int(rng.integers(4))
            i, j = junctions[rng.integers(len(junctions))]
            road = town.road(heading, i, j)
            if bicycle and not road.bike:
                continue
            path = town.route(rng, (i, j), heading, 0.35, road.lanes if bicycle else None)
            front, rear = model.size[0] / 2, -model.size[0] / 2
            drop = 0.0
            trailer = None
            if model.name == "tractor":
                trailer = library["semitrailer"]
            elif model.name in ("pickup", "suv") and rng.random() < 0.25:
                trailer = library["small_trailer"]
            if trailer:
                hitch = -0.6 if model.name != "tractor" else 0.5
                point = model.axles[1] + hitch if model.name == "tractor" else rear - 0.1
                drop = trailer.axles[0] - point
                rear = -drop - trailer.size[0] / 2
            s = float(rng.uniform(-rear, 36.0 if rng.random() < 0.6 else 110.0))
            body = path.at(s + np.linspace(rear - 2, front + 2, 12))
            places, radii, _ = drivers.circles()
            free = np.linalg.norm(body[:, None] - places, axis=2) > radii + model.size[1] / 2 + 0.5
            ahead = np.linalg.norm(body[:, None] - drivers.paths[0].sheet[:900:10], axis=2).min() < 2.0
            if free.all() and not (ahead and rng.random() < 0.8):  # the ego car shall not stand in a queue all day
                wish = rng.uniform(3.5, 5.5) if bicycle else rng.uniform(8.0, 13.0)
                drivers.add(path, s, 0.5 * wish, front, rear, model.size[1] / 2, wish)
                fleet.append((model, len(drivers.paths) - 1, 0.0))
                if trailer:
                    fleet.append((trailer, len(drivers.paths) - 1, drop))
                break
    return fleet


def _walkers(town, rng, ego, begin, end, count) -> list[Actor]:
    """People around blocks, people who stand, people who cross when they may."""
    library = models()
    names = ["man", "woman", "hiker", "elder", "tourist", "child"]
    times = np.arange(begin, end + 2 * DT, DT)
    near = ego.sheet[:: int(5 / Path.SPACING)]
    blocks = []
    for i in range(len(town.columns) - 1):
        for j in range(len(town.rows) - 1):
            u0, v0, u1, v1 = town.block(i, j)
            away = np.linalg.norm(near - [(u0 + u1) / 2, (v0 + v1) / 2], axis=1).min()
            if away < 90:
                blocks.append((i, j))
    actors = []
    for _ in range(count):
        model = library[names[rng.integers(len(names))]]
        i, j = blocks[rng.integers(len(blocks))]
        path = town.around(i, j, rng.uniform(1.4, town.sidewalks[i, j] - 0.4), bool(rng.random() < 0.5))
        speed = 0.0 if rng.random() < 0.2 else rng.uniform(0.9, 1.6)
        s0 = rng.uniform(1, path.length / 8)
        motion = Motion(begin, s0 + speed * (times - begin), np.full(len(times), speed))
        actors.append(Actor(model, colours(model, rng), path=path, motion=motion, lift=KERB, town=town))
    for _, i, j, _ in ego.stops[:6]:
        for _ in range(int(rng.integers(2, 6))):
            actors.append(_crosser(town, rng, library[names[rng.integers(len(names))]], i, j, times))
    return actors


def _crosser(town, rng, model, i, j, times) -> Actor:
    """Crosses one arm of a junction when those on foot may."""
    heading = int(rng.integers(4))
    d = np.array(HEADINGS[heading], dtype=float)
    road = town.road(heading, i, j)
    along = -(town.edge(heading, i, j) + rng.uniform(ZEBRA[0] + 0.5, ZEBRA[1] - 0.5))
    side = np.array([-d[1], d[0]]) * (1 if rng.random() < 0.5 else -1)
    a = town.middle(i, j) + d * along - side * (road.half - 0.45)
    length = 2 * road.half - 0.9
    s = np.arange(0, length + 2, Path.SPACING)[:, None]
    path = Path(a + side * s, ())
    speed = rng.uniform(1.2, 1.7)
    go = town.walk(i, j, times[0]) + rng.uniform(0.0, 1.0)
    # smooth start and stop, so that velocities exist
    raw = np.clip((times - go) * speed, 0, length)
    moved = np.convolve(np.pad(raw, 4, mode="edge"), np.ones(9) / 9, mode="valid")
    return Actor(
        model, colours(model, rng), path=path, motion=Motion(times[0], moved, np.gradient(moved, DT)), town=town
    )
