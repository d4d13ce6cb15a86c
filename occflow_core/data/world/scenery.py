"""What never moves: ground, markings, houses, trees, furniture, parked cars, building sites.

Ground is made on the sheet in patches of at most 2 m, whose corners the bend then takes along; everything that stands
on it is placed as a rigid whole. Nothing lies under houses, islands and sidewalks, so that no voxel holds two grounds.
"""

from dataclasses import dataclass

import numpy as np

from . import meshes as m
from .meshes import Mesh
from .models import Model, models
from .streets import BIKE, CORNER, HEADINGS, KERB, LANE, PARKING, STOP, ZEBRA, Road, Town
from .traffic import Actor, Traffic, colours

PATCH = 2.0  # m
_NEAR, _FAR = 85.0, 170.0  # m from the ego car's way: everything is built; only ground and houses are


@dataclass(frozen=True)
class Scenery:
    """Static triangles with their class (occ3d-nuscenes name), what is annotated among it, and lamps."""

    parts: tuple[tuple[Mesh, str], ...]  # in the world
    things: tuple[Actor, ...]  # parked cars, cones: each an instance of its own
    facades: np.ndarray  # (A, 8): see `_facade`
    lamps: np.ndarray  # (L, 3) m, world: where street lamps shine from
    signals: np.ndarray  # (S, 4): column, row, approach of each signal head, whether it is for those on foot


class _Yard:
    """Collects parts of the sheet and takes them to the world."""

    def __init__(self, town: Town, rng):
        self.town, self.rng = town, rng
        self.parts: list[tuple[Mesh, str]] = []
        self.things: list[Actor] = []
        self.facades, self.lamps, self.signals = [], [], []

    def ground(self, mesh: Mesh, kind: str) -> None:
        """A mesh given on the sheet (third coordinate: m above ground), bent vertex by vertex."""
        self.parts.append((Mesh(self.town.bend(mesh.vertices), mesh.faces, mesh.kind, mesh.colour, mesh.aux), kind))

    def pose(self, u, v, yaw=0.0, lift=0.0, upright=True) -> np.ndarray:
        pose = self.town.bend.frames(np.array([[u, v, lift]]), np.array([yaw]))[0]
        if upright:
            x = pose[:3, 0] * [1, 1, 0]
            x /= np.linalg.norm(x)
            pose[:3, :3] = np.stack([x, [-x[1], x[0], 0], [0, 0, 1]], 1)
        return pose

    def put(self, mesh: Mesh, kind: str, u, v, yaw=0.0, lift=0.0) -> None:
        """A mesh as a rigid whole."""
        pose = self.pose(u, v, yaw, lift)
        vertices = mesh.vertices @ pose[:3, :3].T + pose[:3, 3]
        self.parts.append((Mesh(vertices, mesh.faces, mesh.kind, mesh.colour, mesh.aux), kind))

    def thing(self, model: Model | str, u, v, yaw=0.0, lift=0.0, parked=False) -> None:
        model = models()[model] if isinstance(model, str) else model
        pose = self.pose(u, v, yaw, lift, upright=not parked)
        self.things.append(Actor(model, colours(model, self.rng), pose=pose, parked=parked))

    def fill(self, u0, v0, u1, v1, lift, kind, name, colour, *, keep=None) -> None:
        """A rectangle of the sheet in patches; `keep` (points (N, 2)) -> which patches stay."""
        if u1 - u0 < 1e-6 or v1 - v0 < 1e-6:
            return
        nu, nv = (max(1, int(np.ceil(d / PATCH - 1e-9))) for d in (u1 - u0, v1 - v0))
        us, vs = np.linspace(u0, u1, nu + 1), np.linspace(v0, v1, nv + 1)
        grid = np.stack([*np.meshgrid(us, vs, indexing="ij"), np.full((nu + 1, nv + 1), lift)], -1).reshape(-1, 3)
        i, j = (a.reshape(-1) for a in np.meshgrid(np.arange(nu), np.arange(nv), indexing="ij"))
        if keep is not None:
            chosen = keep(np.stack([(us[i] + us[i + 1]) / 2, (vs[j] + vs[j + 1]) / 2], 1))
            i, j = i[chosen], j[chosen]
        a = i * (nv + 1) + j
        b, c, d = a + nv + 1, a + nv + 2, a + 1
        faces = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
        if len(faces):
            self.ground(m.mesh(grid, faces, kind, colour), name)

    def ribbon(self, outer: np.ndarray, inner: np.ndarray, kind, name, colour) -> None:
        """Between two closed lines (N, 3) of the sheet with as many points."""
        n = len(outer)
        i, j = np.arange(n), (np.arange(n) + 1) % n
        faces = np.concatenate([np.stack([i, j, j + n], 1), np.stack([i, j + n, i + n], 1)])
        self.ground(m.mesh(np.concatenate([outer, inner]), faces, kind, colour), name)

    def stripe(self, u0, v0, u1, v1, colour) -> None:
        """A line of paint on the road."""
        self.fill(u0, v0, u1, v1, 0.004, m.MARKING, "driveable_surface", colour)


def build(traffic: Traffic, rng, *, leaves: np.ndarray, duration: float) -> Scenery:
    """Everything static around the way of the ego car in `duration` s; `leaves` (3,): sRGB of the season's foliage."""
    town = traffic.town
    yard = _Yard(town, rng)
    times = np.array([traffic.motion(t) for t in np.arange(-1, duration + 1.1, 0.5)])
    way = traffic.ego.at(np.unique(times))

    def away(u0, v0, u1, v1):
        inside = np.clip(way, [u0, v0], [u1, v1])
        return np.linalg.norm(way - inside, axis=1).min()

    tint = np.array(rng.uniform(0.30, 0.38) * np.array([1.0, 1.0, 1.02]))
    _roads(yard, tint, away)
    for i in range(len(town.columns) - 1):
        for j in range(len(town.rows) - 1):
            gap = away(*town.block(i, j))
            if gap < _FAR:
                _block(yard, i, j, gap < _NEAR, leaves)
    for i in range(len(town.columns)):
        for j in range(len(town.rows)):
            if away(*town.middle(i, j), *town.middle(i, j)) < _NEAR + 20:
                _signals(yard, i, j)
    return Scenery(
        tuple(yard.parts),
        tuple(yard.things),
        np.array(yard.facades, dtype=np.float32).reshape(-1, 8),
        np.array(yard.lamps).reshape(-1, 3),
        np.array(yard.signals, dtype=np.int64).reshape(-1, 4),
    )


_WHITE, _YELLOW, _KERB = (0.86, 0.86, 0.84), (0.88, 0.68, 0.16), (0.62, 0.61, 0.59)


def _roads(yard: _Yard, tint, away) -> None:
    town, rng = yard.town, yard.rng
    green = (0.16, 0.36, 0.26) if rng.random() < 0.4 else None

    def flat(along_v, a0, b0, a1, b1):
        """(along, across) of a road -> u0, v0, u1, v1."""
        return (b0, a0, b1, a1) if along_v else (a0, b0, a1, b1)

    for along_v, roads, crossing in ((True, town.columns, town.rows), (False, town.rows, town.columns)):
        for road in roads:
            for first, second in zip(crossing, crossing[1:]):
                a0, a1 = first.at + first.half, second.at - second.half
                if away(*flat(along_v, a0, road.at - road.half, a1, road.at + road.half)) > _FAR:
                    continue
                m0, m1 = a0 + STOP + 6, a1 - STOP - 6  # where an island can be
                strips = [(road.inner, road.half), (-road.half, -road.inner)]
                for lo, hi in strips:
                    if hi > lo:
                        yard.fill(
                            *flat(along_v, a0, road.at + lo, a1, road.at + hi), 0, m.ASPHALT, "driveable_surface", tint
                        )
                if road.median:
                    for c0, c1 in ((a0, m0), (m1, a1)):
                        box = flat(along_v, c0, road.at - road.inner, c1, road.at + road.inner)
                        yard.fill(*box, 0, m.ASPHALT, "driveable_surface", tint)
                    _island(yard, flat(along_v, m0, road.at - road.inner, m1, road.at + road.inner))
                _markings(yard, road, along_v, a0, a1, flat, green)
    for column in town.columns:
        for row in town.rows:
            u0, v0, u1, v1 = column.at - column.half, row.at - row.half, column.at + column.half, row.at + row.half
            if away(u0, v0, u1, v1) < _FAR:
                yard.fill(u0, v0, u1, v1, 0, m.ASPHALT, "driveable_surface", tint)
                for su, sv in ((u1, v1), (u0, v1), (u0, v0), (u1, v0)):  # what rounded kerbs leave of each corner
                    du, dv = np.sign(su - column.at), np.sign(sv - row.at)
                    t = np.linspace(0, np.pi / 2, 9)
                    arc = np.stack([su + du * CORNER * (1 - np.sin(t)), sv + dv * CORNER * (1 - np.cos(t))], 1)
                    fan = np.concatenate([[[su, sv]], arc])
                    faces = np.stack([np.zeros(8, int), np.arange(1, 9), np.arange(2, 10)], 1)
                    yard.ground(m.mesh(np.c_[fan, np.zeros(10)], faces, m.ASPHALT, tint), "driveable_surface")


def _island(yard: _Yard, corners) -> None:
    """A raised strip between the two ways of a road."""
    u0, v0, u1, v1 = corners
    style = yard.rng.random()
    kind, colour = (m.PAVING, (0.55, 0.54, 0.52)) if style < 0.6 else (m.GRASS, (0.25, 0.36, 0.14))
    yard.fill(u0, v0, u1, v1, KERB, kind, "other_flat", colour)
    n = max(2, int(max(u1 - u0, v1 - v0) / PATCH))
    ring = _rounded(u0, v0, u1, v1, 0.3, n)
    yard.ribbon(
        np.c_[ring, np.zeros(len(ring))], np.c_[ring, np.full(len(ring), KERB)], m.CONCRETE, "other_flat", _KERB
    )
    long_v = v1 - v0 > u1 - u0
    if style > 0.75:
        for s in np.arange(4, max(u1 - u0, v1 - v0) - 4, 9.0):
            u, v = ((u0 + u1) / 2, v0 + s) if long_v else (u0 + s, (v0 + v1) / 2)
            yard.put(_bush(yard.rng, 0.7, np.array([0.2, 0.33, 0.12])), "vegetation", u, v, 0, KERB)


def _rounded(u0, v0, u1, v1, r, n) -> np.ndarray:
    """A rectangle with round corners, (N, 2) counter-clockwise, sides cut into n pieces."""
    line = []
    corners = ((u1 - r, v1 - r), (u0 + r, v1 - r), (u0 + r, v0 + r), (u1 - r, v0 + r))
    for k, (cu, cv) in enumerate(corners):
        angle = np.pi / 2 * (k + np.linspace(0, 1, 9))
        arc = np.stack([cu + r * np.cos(angle), cv + r * np.sin(angle)], 1)
        nu, nv = corners[(k + 1) % 4]
        last = np.pi / 2 * (k + 1)
        end = np.array([nu + r * np.cos(last), nv + r * np.sin(last)])
        line += [arc, arc[-1] + np.linspace(0, 1, n + 1)[1:-1, None] * (end - arc[-1])]
    return np.concatenate(line)


def _markings(yard: _Yard, road: Road, along_v, a0, a1, flat, green) -> None:
    """Lines, stop lines, crossings of one stretch of road."""

    def stripe(s0, s1, across, width, colour):
        yard.stripe(*flat(along_v, s0, road.at + across - width / 2, s1, road.at + across + width / 2), colour)

    b0, b1 = a0 + STOP, a1 - STOP
    if not road.median:
        for side in (-0.14, 0.14):
            stripe(b0, b1, side, 0.12, _YELLOW)
    for way in (-1, 1):
        for lane in range(1, road.lanes):
            for s in np.arange(b0, b1 - 3, 9.0):
                stripe(s, s + 3, way * (road.inner + lane * LANE), 0.12, _WHITE)
        edge = road.inner + road.lanes * LANE
        if road.bike:
            stripe(b0, b1, way * edge, 0.15, _WHITE)
            stripe(b0, b1, way * (edge + BIKE), 0.10, _WHITE)
            if green:
                box = flat(along_v, b0, road.at + way * (edge + 0.1), b1, road.at + way * (edge + BIKE - 0.1))
                u0, u1 = sorted((box[0], box[2]))
                v0, v1 = sorted((box[1], box[3]))
                yard.fill(u0, v0, u1, v1, 0.003, m.MARKING, "driveable_surface", green)
        elif road.parking:
            stripe(b0, b1, way * edge, 0.10, _WHITE)
        # who drives ahead along +s keeps to the right: across < 0 on rows, > 0 on columns
        ahead = way > 0 if along_v else way < 0
        line = a1 - STOP if ahead else a0 + STOP
        low, high = sorted((way * road.inner, way * (edge + road.bike * BIKE)))
        u = flat(along_v, line - 0.2, road.at + low + 0.1, line + 0.2, road.at + high - 0.1)
        yard.stripe(*u, _WHITE)
    for z0, z1 in ((a0 + ZEBRA[0], a0 + ZEBRA[1]), (a1 - ZEBRA[1], a1 - ZEBRA[0])):
        for across in np.arange(-road.half + 0.6, road.half - 0.5, 1.0):
            stripe(z0, z1, across, 0.5, _WHITE)


# ---- blocks ------------------------------------------------------------------------------------------------------


def _block(yard: _Yard, i: int, j: int, near: bool, leaves) -> None:
    town, rng = yard.town, yard.rng
    u0, v0, u1, v1 = town.block(i, j)
    wide = town.sidewalks[i, j]
    n = int(np.ceil((max(u1 - u0, v1 - v0) - 2 * CORNER) / PATCH))
    outer = _rounded(u0, v0, u1, v1, CORNER, n)
    rim = _rounded(u0 + 0.18, v0 + 0.18, u1 - 0.18, v1 - 0.18, CORNER - 0.18, n)
    inner = _rounded(u0 + wide, v0 + wide, u1 - wide, v1 - wide, 1e-3, n)
    tone = rng.uniform(0.46, 0.62) * np.array([1.0, 0.98, 0.95])

    def at(ring, lift):
        return np.c_[ring, np.full(len(ring), lift)]

    yard.ribbon(at(outer, 0), at(outer, KERB), m.CONCRETE, "sidewalk", _KERB)
    yard.ribbon(at(outer, KERB), at(rim, KERB), m.CONCRETE, "sidewalk", _KERB)
    yard.ribbon(at(rim, KERB), at(inner, KERB), m.PAVING, "sidewalk", tone)
    w0, z0, w1, z1 = u0 + wide, v0 + wide, u1 - wide, v1 - wide
    style = rng.choice(["houses", "houses", "houses", "towers", "park", "yard", "site"])
    if style == "park":
        _park(yard, w0, z0, w1, z1, near, leaves)
    elif style == "site":
        _site(yard, w0, z0, w1, z1, near)
    else:
        _houses(yard, w0, z0, w1, z1, near, leaves, style)
    if near:
        _furniture(yard, i, j, leaves)


def _facade(yard: _Yard, height: float, style: str) -> int:
    """A row of the table that the painter reads: window width, height and spacing of both, wall kind, seed, tints."""
    rng = yard.rng
    if style == "towers" and rng.random() < 0.6:
        row = [1.35, 2.5, 1.6, 3.4, 2, rng.random(), 0.0, rng.uniform(0.2, 0.5)]  # glass
    else:
        row = [rng.uniform(0.9, 1.6), rng.uniform(1.3, 1.9), rng.uniform(2.4, 3.6), rng.uniform(2.9, 3.5)]
        row += [int(rng.integers(0, 2)), rng.random(), float(rng.random() < 0.5), rng.uniform(0.05, 0.3)]
    yard.facades.append(row)
    return len(yard.facades) - 1


_WALLS = [(0.56, 0.33, 0.26), (0.62, 0.42, 0.32), (0.72, 0.66, 0.56), (0.62, 0.61, 0.60), (0.80, 0.76, 0.68)]
_WALLS += [(0.46, 0.30, 0.25), (0.70, 0.56, 0.42), (0.55, 0.57, 0.60), (0.85, 0.83, 0.80), (0.50, 0.42, 0.38)]


def _house(yard: _Yard, u, v, yaw, length, depth, height, style) -> None:
    """Front at y = -depth / 2, which faces the street."""
    rng = yard.rng
    wall = np.clip(np.array(_WALLS[rng.integers(len(_WALLS))]) * rng.uniform(0.85, 1.1), 0, 1)
    kind = _facade(yard, height, style)
    gable = style == "houses" and height < 9 and rng.random() < 0.6
    parts = [m.box((length, depth, height + 1.5), (0, 0, -1.5), m.FACADE, wall, floor=False, lid=not gable, aux=kind)]
    front = -depth / 2
    if gable:
        rise, over = depth * rng.uniform(0.28, 0.42), 0.4
        a, b, z = length / 2 + over, depth / 2 + over, height - 0.15
        roof = np.array([[-a, -b, z], [a, -b, z], [a, b, z], [-a, b, z], [-a, 0, z + rise], [a, 0, z + rise]])
        tile = ((0.42, 0.22, 0.16), (0.3, 0.28, 0.28), (0.36, 0.26, 0.2))[rng.integers(3)]
        parts.append(m.mesh(roof, [[0, 1, 5], [0, 5, 4], [2, 3, 4], [2, 4, 5]], m.ROOF, tile))
        parts.append(m.mesh(roof * [0.95, 0.95, 1], [[1, 2, 5], [3, 0, 4]], m.PLAIN, wall))
        parts.append(
            m.box((0.7, 0.7, 1.6), (length * 0.25, depth * 0.2, height + rise * 0.3), m.BRICK, (0.5, 0.3, 0.25))
        )
    else:
        for sy in (-1, 1):
            parts.append(m.box((length + 0.3, 0.35, 0.7), (0, sy * depth / 2, height - 0.1), m.PLAIN, wall * 0.85))
        for sx in (-1, 1):
            parts.append(m.box((0.35, depth, 0.7), (sx * length / 2, 0, height - 0.1), m.PLAIN, wall * 0.85))
        parts.append(m.box((3, 2.4, 1.6), (rng.uniform(-3, 3), 1, height), m.METAL, (0.6, 0.6, 0.6)))
    # the ground floor: doors, sometimes shops with awnings
    if style != "yard" and rng.random() < 0.55 and length > 8:
        shop = (0.08, 0.09, 0.10)
        for x in np.arange(-length / 2 + 2.2, length / 2 - 1.8, 4.2):
            parts.append(m.box((3.5, 0.12, 2.5), (x, front, 0.35), m.GLASS, shop))
            cloth = ((0.6, 0.1, 0.1), (0.1, 0.3, 0.2), (0.15, 0.2, 0.4), (0.75, 0.7, 0.6))[rng.integers(4)]
            if rng.random() < 0.7:
                awning = np.array([[-1.8, 0, 3.3], [1.8, 0, 3.3], [1.8, -1.1, 2.7], [-1.8, -1.1, 2.7]]) + [x, front, 0]
                parts.append(m.quad(awning[::-1], m.CLOTH, cloth))
            parts.append(m.box((3.6, 0.14, 0.5), (x, front, 3.35), m.PLAIN, cloth))
    else:
        x = rng.uniform(-length * 0.3, length * 0.3)
        door = ((0.3, 0.12, 0.1), (0.12, 0.2, 0.16), (0.2, 0.2, 0.24), (0.42, 0.3, 0.2))[rng.integers(4)]
        parts.append(m.box((1.2, 0.14, 2.3), (x, front, 0.2), m.PLAIN, door))
        parts.append(m.box((1.9, 1.2, 0.18), (x, front - 0.5, 2.55), m.PLAIN, wall * 0.7))
        parts.append(m.box((1.8, 0.9, 0.2), (x, front - 0.45, -0.02), m.CONCRETE, (0.6, 0.6, 0.58)))
    yard.put(m.join(parts), "manmade", u, v, yaw, KERB)


def _houses(yard: _Yard, u0, v0, u1, v1, near, leaves, style) -> None:
    """Houses around a court, with a strip before them."""
    rng = yard.rng
    strip = rng.choice([0.0, 0.0, 2.5, 4.0]) if style != "yard" else 5.0
    feet = []
    for side in range(4):
        # along the side: s from 0 to L; the house's front looks outward
        if side % 2 == 0:
            length, depth_room = u1 - u0, v1 - v0
        else:
            length, depth_room = v1 - v0, u1 - u0
        depth = min(rng.uniform(10, 14), depth_room * 0.3)
        s = 0.0 if side % 2 == 0 else depth + strip + 2.0
        last = length if side % 2 == 0 else length - depth - strip - 2.0
        s += strip
        last -= strip
        while s < last - 6:
            long = min(rng.uniform(9, 24), last - s)
            if last - s - long < 6:
                long = last - s
            low, high = {"houses": (5.5, 16), "towers": (18, 42), "yard": (5, 8)}[style]
            height = rng.uniform(low, high)
            middle, back = s + long / 2, strip + depth / 2
            u, v, yaw = {
                0: (u0 + middle, v0 + back, 0.0),
                1: (u1 - back, v0 + middle, np.pi / 2),
                2: (u1 - middle, v1 - back, np.pi),
                3: (u0 + back, v1 - middle, -np.pi / 2),
            }[side]
            if style != "yard" or rng.random() < 0.7:
                _house(yard, u, v, yaw, long - 0.2, depth, height, style)
                du, dv = (long / 2, depth / 2) if side % 2 == 0 else (depth / 2, long / 2)
                feet.append((u - du, v - dv, u + du, v + dv))
            s += long + (0.0 if rng.random() < 0.55 else rng.uniform(2, 5))
    feet = np.array(feet).reshape(-1, 4)

    def keep(p):
        inside = (p[:, None] > feet[:, :2] + 1.2) & (p[:, None] < feet[:, 2:] - 1.2)
        return ~inside.all(2).any(1)

    court = rng.random()
    if strip and court < 0.75:
        kind, name, colour = m.GRASS, "terrain", (0.24, 0.34, 0.13)
    elif court < 0.2:
        kind, name, colour = m.SOIL, "terrain", (0.42, 0.35, 0.26)
    else:
        kind, name, colour = m.PAVING, "sidewalk", (0.5, 0.48, 0.46)
    if style == "yard":
        kind, name, colour = m.CONCRETE, "other_flat", (0.5, 0.49, 0.47)
    yard.fill(u0, v0, u1, v1, KERB, kind, name, colour, keep=keep)
    if strip and near:
        shade = leaves * rng.uniform(0.7, 1.0)
        for side in range(4):
            length = (u1 - u0) if side % 2 == 0 else (v1 - v0)
            if rng.random() < 0.5:
                for s in np.arange(3, length - 3, 3.0):
                    if rng.random() < 0.75:
                        u, v = _on_side((u0, v0, u1, v1), side, s, 0.6)
                        high = rng.uniform(0.9, 1.4)
                        yard.put(_hedge(rng, 2.9, 0.7, high, shade), "vegetation", u, v, side * np.pi / 2, KERB)
            elif rng.random() < 0.6:
                for s in np.arange(2, length - 2, 2.5):
                    u, v = _on_side((u0, v0, u1, v1), side, s, 0.4)
                    yard.put(_fence(2.5), "manmade", u, v, side * np.pi / 2, KERB)
            for s in np.arange(5, length - 5, 11.0):
                if rng.random() < 0.3:
                    u, v = _on_side((u0, v0, u1, v1), side, s, strip * 0.6)
                    yard.put(_bush(rng, rng.uniform(0.5, 0.9), shade), "vegetation", u, v, 0, KERB)
    if style == "yard" and near:
        for _ in range(6):
            u, v = rng.uniform(u0 + 16, u1 - 16), rng.uniform(v0 + 16, v1 - 16)
            yard.thing(
                rng.choice(["lorry", "semitrailer", "van", "tipper", "debris"]), u, v, rng.uniform(0, 6), KERB, True
            )


def _on_side(box, side: int, s: float, inset: float) -> tuple[float, float]:
    u0, v0, u1, v1 = box
    return ((u0 + s, v0 + inset), (u1 - inset, v0 + s), (u1 - s, v1 - inset), (u0 + inset, v1 - s))[side]


def _park(yard: _Yard, u0, v0, u1, v1, near, leaves) -> None:
    rng = yard.rng
    pond = rng.random() < 0.5
    cu, cv, ru, rv = (u0 + u1) / 2, (v0 + v1) / 2, (u1 - u0) / 5, (v1 - v0) / 5
    path = 1.6

    def wet(p):
        return pond & ((np.abs(p[:, 0] - cu) < ru) & (np.abs(p[:, 1] - cv) < rv))

    def way(p):
        return (np.abs(p[:, 0] - u0 - 8) < path) | (np.abs(p[:, 1] - v1 + 8) < path)

    green = np.array((0.22, 0.36, 0.11)) * rng.uniform(0.85, 1.1)
    yard.fill(u0, v0, u1, v1, KERB, m.GRASS, "terrain", green, keep=lambda p: ~wet(p) & ~way(p))
    yard.fill(u0, v0, u1, v1, KERB, m.PAVING, "sidewalk", (0.62, 0.56, 0.46), keep=lambda p: ~wet(p) & way(p))
    if pond:
        yard.fill(
            u0, v0, u1, v1, KERB - 0.05, m.WATER, "other_flat", (0.12, 0.2, 0.22), keep=lambda p: wet(p) & ~way(p)
        )
    for _ in range(34 if near else 12):
        p = np.array([[rng.uniform(u0 + 2, u1 - 2), rng.uniform(v0 + 2, v1 - 2)]])
        if not wet(p)[0] and not way(p)[0]:
            yard.put(_tree(rng, leaves, rng.uniform(5, 10)), "vegetation", *p[0], rng.uniform(0, 6), KERB)
    if near:
        for _ in range(10):
            p = np.array([[rng.uniform(u0 + 1, u1 - 1), rng.uniform(v0 + 1, v1 - 1)]])
            if not wet(p)[0] and not way(p)[0]:
                yard.put(_bush(rng, rng.uniform(0.5, 1.1), leaves), "vegetation", *p[0], 0, KERB)
        for s in np.arange(6, v1 - v0 - 6, 14):
            yard.put(_bench(), "manmade", u0 + 10.3, v0 + s, np.pi / 2, KERB)


def _site(yard: _Yard, u0, v0, u1, v1, near) -> None:
    """A building site behind barriers, with diggers and a shell of a house."""
    rng = yard.rng
    yard.fill(u0, v0, u1, v1, KERB, m.SOIL, "terrain", (0.46, 0.38, 0.28))
    if not near:
        return
    style = rng.choice(["jersey", "red", "white", "board"])
    long = models()[style].size[0] + 0.12
    for side in range(4):
        length = (u1 - u0) if side % 2 == 0 else (v1 - v0)
        for s in np.arange(1.5, length - 1.5, long):
            if rng.random() < 0.92:
                u, v = _on_side((u0, v0, u1, v1), side, s, 0.6)
                name = style if style != "white" or int(s / long) % 2 else "red"
                yard.thing(name, u, v, side * np.pi / 2 + rng.normal(0, 0.02), KERB)
    for k in range(3):
        u, v = rng.uniform(u0 + 7, u1 - 7), rng.uniform(v0 + 7, v1 - 7)
        near_edge = k % 2
        if near_edge:
            v = v0 + 6.5 if rng.random() < 0.5 else v1 - 6.5
        yard.thing(("excavator", "loader", "tipper")[k], u, v, rng.uniform(0, 6), KERB, True)
    for _ in range(5):
        u, v = rng.uniform(u0 + 4, u1 - 4), rng.uniform(v0 + 4, v1 - 4)
        mound = m.ball(
            (rng.uniform(1, 2.4), rng.uniform(1, 2.4), rng.uniform(0.6, 1.5)), kind=m.SOIL, colour=(0.44, 0.36, 0.26)
        )
        yard.put(mound, "terrain", u, v, rng.uniform(0, 6), KERB)
        yard.thing(rng.choice(["debris", "worker", "worker"]), u + 3.2, v, rng.uniform(0, 6), KERB)
    u, v = (u0 + u1) / 2, (v0 + v1) / 2
    shell = [m.box((16, 12, 0.3), (0, 0, 3.3 * k), m.CONCRETE, (0.6, 0.59, 0.57)) for k in range(1, 4)]
    shell += [
        m.box((0.5, 0.5, 9.9), (x, y, 0), m.CONCRETE, (0.58, 0.57, 0.55))
        for x in (-7, -2.4, 2.4, 7)
        for y in (-5, 0, 5)
    ]
    yard.put(m.join(shell), "manmade", u, v, 0, KERB)


# ---- what stands about -------------------------------------------------------------------------------------------


def _tree(rng, leaves, height: float) -> Mesh:
    trunk = height * rng.uniform(0.30, 0.40)
    thick = 0.05 + 0.022 * height
    parts = [
        m.cylinder(thick, trunk + 0.6, (0, 0, -0.1), m.BARK, (0.30, 0.24, 0.18), top=thick * 0.7, sides=8, floor=False)
    ]
    shade = np.clip(leaves * rng.uniform(0.75, 1.15) + rng.uniform(-0.02, 0.02, 3), 0.02, 1)
    if rng.random() < 0.2:  # a fir
        for k in range(4):
            z = trunk * 0.5 + k * (height - trunk * 0.5) / 4.6
            r = (height - z) * 0.32
            parts.append(m.cylinder(r, (height - z) * 0.55, (0, 0, z), m.FOLIAGE, shade * 0.7, top=0.02, sides=11))
        return m.join(parts)
    wide = height * rng.uniform(0.22, 0.30)
    for k in range(int(rng.integers(4, 7))):
        a, out = rng.uniform(0, 2 * np.pi), wide * rng.uniform(0.25, 0.75) * (k > 0)
        at = (out * np.cos(a), out * np.sin(a), trunk + (height - trunk) * rng.uniform(0.30, 0.72))
        r = wide * rng.uniform(0.62, 0.95)
        parts.append(
            m.ball((r, r, r * 0.85), at, m.FOLIAGE, shade * rng.uniform(0.88, 1.08), detail=2, rng=rng, rough=0.13)
        )
    for _ in range(3):
        a = rng.uniform(0, 2 * np.pi)
        tip = (wide * 0.6 * np.cos(a), wide * 0.6 * np.sin(a), trunk + 0.3 * (height - trunk))
        parts.append(m.rod((0, 0, trunk * 0.85), tip, thick * 0.45, m.BARK, (0.30, 0.24, 0.18), end=thick * 0.2))
    return m.join(parts)


def _bush(rng, size: float, leaves) -> Mesh:
    shade = np.clip(leaves * rng.uniform(0.8, 1.1), 0.02, 1)
    parts = []
    for _ in range(3):
        at = (*rng.uniform(-0.4, 0.4, 2) * size, size * 0.45)
        parts.append(m.ball(size * rng.uniform(0.55, 0.8), at, m.FOLIAGE, shade, detail=1, rng=rng, rough=0.16))
    return m.join(parts)


def _hedge(rng, length, width, height, leaves) -> Mesh:

    body = m.ball(1.0, kind=m.FOLIAGE, colour=leaves, detail=2)
    p = body.vertices
    cube = np.sign(p) * np.abs(p) ** 0.35
    cube = cube / np.abs(cube).max(0)
    cube = cube * (1 + rng.uniform(-0.06, 0.06, (len(p), 1)))

    return Mesh(
        cube * [length / 2, width / 2, height / 2] + [0, 0, height / 2], body.faces, body.kind, body.colour, body.aux
    )


def _fence(length: float) -> Mesh:
    dark = (0.1, 0.11, 0.11)
    parts = [m.box((0.07, 0.07, 1.25), (-length / 2, 0, 0), m.METAL, dark)]
    parts += [m.box((length, 0.04, 0.05), (0, 0, z), m.METAL, dark) for z in (0.2, 1.1)]
    parts += [
        m.box((0.03, 0.03, 1.0), (x, 0, 0.18), m.METAL, dark, floor=False)
        for x in np.arange(-length / 2 + 0.2, length / 2, 0.2)
    ]
    return m.join(parts)


def _bench() -> Mesh:
    wood = (0.45, 0.31, 0.19)
    parts = [m.box((1.7, 0.12, 0.04), (0, y, 0.44), m.PLAIN, wood) for y in (-0.16, 0, 0.16)]
    parts += [m.box((1.7, 0.04, 0.12), (0, 0.26, z), m.PLAIN, wood) for z in (0.6, 0.78)]
    parts += [m.box((0.06, 0.46, 0.44), (x, 0.02, 0), m.METAL, (0.15, 0.15, 0.16)) for x in (-0.7, 0.7)]
    parts += [m.box((0.06, 0.05, 0.5), (x, 0.28, 0.44), m.METAL, (0.15, 0.15, 0.16)) for x in (-0.7, 0.7)]
    return m.join(parts)


def _lamp(height=7.2) -> Mesh:
    """Its arm reaches to +y."""
    grey = (0.32, 0.34, 0.35)
    return m.join(
        [
            m.cylinder(0.09, height, kind=m.METAL, colour=grey, top=0.055, sides=8),
            m.cylinder(0.16, 0.5, kind=m.METAL, colour=grey, sides=8),
            m.rod((0, 0, height - 0.1), (0, 1.7, height + 0.15), 0.045, m.METAL, grey),
            m.box((0.3, 0.75, 0.12), (0, 1.9, height + 0.08), m.METAL, grey),
            m.box((0.24, 0.6, 0.03), (0, 1.9, height + 0.05), m.STREETLAMP, (0.95, 0.92, 0.82)),
        ]
    )


def _sign(rng) -> Mesh:
    parts = [m.cylinder(0.035, 2.6, kind=m.METAL, colour=(0.5, 0.5, 0.52), sides=6)]
    style = rng.integers(3)
    if style == 0:
        parts += [m.disc(0.33, (0, -0.05, 2.4), -1, m.PLAIN, (0.75, 0.08, 0.08), sides=16)]
        parts += [m.disc(0.24, (0, -0.055, 2.4), -1, m.PLAIN, (0.92, 0.92, 0.9), sides=16)]
        parts += [m.disc(0.33, (0, -0.045, 2.4), 1, m.PLAIN, (0.4, 0.4, 0.42), sides=16)]
    elif style == 1:
        parts += [m.box((0.6, 0.03, 0.6), (0, -0.05, 2.1), m.PLAIN, (0.1, 0.25, 0.6))]
        parts += [m.box((0.2, 0.034, 0.36), (0, -0.05, 2.2), m.PLAIN, (0.92, 0.92, 0.92))]
    else:
        parts += [m.disc(0.38, (0, -0.05, 2.35), -1, m.PLAIN, (0.78, 0.06, 0.07), sides=8)]
        parts += [m.disc(0.38, (0, -0.04, 2.35), 1, m.PLAIN, (0.4, 0.4, 0.42), sides=8)]
    return m.join(parts)


def _shelter() -> Mesh:
    """A bus stop, open to -y."""
    frame = (0.25, 0.27, 0.28)
    parts = [m.box((3.8, 1.5, 0.1), (0, 0, 2.4), m.METAL, frame)]
    parts += [m.box((0.08, 0.08, 2.4), (x, y, 0), m.METAL, frame) for x in (-1.8, 1.8) for y in (-0.6, 0.65)]
    parts += [m.box((3.5, 0.03, 1.9), (0, 0.66, 0.3), m.GLASS, (0.25, 0.3, 0.32))]
    parts += [m.box((0.06, 1.1, 1.9), (1.8, 0.0, 0.3), m.PLAIN, (0.75, 0.3, 0.2))]
    parts += [m.box((2.4, 0.4, 0.05), (0, 0.35, 0.45), m.METAL, (0.5, 0.5, 0.5))]
    return m.join(parts)


def _furniture(yard: _Yard, i: int, j: int, leaves) -> None:
    """Along the four sides of a block's sidewalk, and in the parking lanes before it."""
    town, rng = yard.town, yard.rng
    u0, v0, u1, v1 = box = town.block(i, j)
    roads = (town.rows[j], town.columns[i + 1], town.rows[j + 1], town.columns[i])
    wide = town.sidewalks[i, j]
    trees = rng.random() < 0.6
    shade = leaves * rng.uniform(0.85, 1.1)
    for side, road in enumerate(roads):
        length = (u1 - u0) if side % 2 == 0 else (v1 - v0)
        yaw = side * np.pi / 2
        for s in np.arange(CORNER + rng.uniform(1, 5), length - CORNER, 24.0):
            u, v = _on_side(box, side, s, 0.5)
            yard.put(_lamp(), "manmade", u, v, yaw + np.pi, KERB)
            pose = yard.pose(u, v, yaw + np.pi, KERB)
            yard.lamps.append((pose @ [0, 1.9, 7.2, 1])[:3])
        for s in np.arange(CORNER + 3, length - CORNER - 3, rng.uniform(7.5, 11)):
            if trees and wide > 3.0 and rng.random() < 0.85:
                u, v = _on_side(box, side, s + 1.5, 0.85)
                yard.put(_tree(rng, shade, rng.uniform(4.5, 7.5)), "vegetation", u, v, rng.uniform(0, 6), KERB)
        for s in np.arange(CORNER + 2, length - CORNER - 2, 8.0):
            roll = rng.random()
            u, v = _on_side(box, side, s, 0.45)
            if roll < 0.14:
                yard.put(_sign(rng), "manmade", u, v, yaw + np.pi / 2 * rng.choice([-1, 1]), KERB)
            elif roll < 0.20:
                hydrant = m.join(
                    [
                        m.cylinder(0.13, 0.6, kind=m.PLAIN, colour=(0.75, 0.1, 0.1)),
                        m.ball(0.14, (0, 0, 0.62), m.PLAIN, (0.75, 0.1, 0.1)),
                    ]
                )
                yard.put(hydrant, "manmade", u, v, 0, KERB)
            elif roll < 0.28:
                yard.thing("bin", *_on_side(box, side, s, wide - 0.5), yaw, KERB)
            elif roll < 0.33:
                yard.put(
                    m.box((0.9, 0.45, 1.3), kind=m.METAL, colour=(0.35, 0.42, 0.36)),
                    "manmade",
                    *_on_side(box, side, s, wide - 0.4),
                    yaw,
                    KERB,
                )
            elif roll < 0.38:
                yard.thing("rack", *_on_side(box, side, s, 0.6), yaw, KERB)
                for dx in (-0.8, 0.0, 0.8):
                    if rng.random() < 0.6:
                        uu, vv = _on_side(box, side, s + dx + 0.2, 0.75)
                        yard.thing("bicycle", uu, vv, yaw + np.pi / 2, KERB)
            elif roll < 0.43:
                yard.put(_bench(), "manmade", *_on_side(box, side, s, wide - 0.5), yaw, KERB)
            elif roll < 0.46:
                yard.thing("motorcycle", *_on_side(box, side, s, 0.8), yaw + 1.2, KERB)
            elif roll < 0.48:
                yard.thing("pram", *_on_side(box, side, s, wide * 0.7), yaw, KERB)
        if rng.random() < 0.3 and wide > 3.2:
            yard.put(_shelter(), "manmade", *_on_side(box, side, length / 2, wide - 0.95), yaw, KERB)
        works = rng.random() < 0.22
        if works:
            _roadworks(yard, box, side, length, road)
        if road.parking:
            _parked(yard, box, side, length, (0.0, length / 2) if works else (0.0, length))


def _parked(yard: _Yard, box, side, length, stretch) -> None:
    rng = yard.rng
    names = ["sedan", "hatch", "suv", "wagon", "van", "coupe", "pickup", "lorry"]
    odds = [0.22, 0.22, 0.2, 0.12, 0.08, 0.06, 0.07, 0.03]
    yaw = side * np.pi / 2 + np.pi  # on the right of those who drive there: the block lies to their right
    s, last = stretch[0] + STOP + 3, stretch[1] - STOP - 3
    full = rng.uniform(0.35, 0.9)
    while s < last - 6:
        name = names[rng.choice(8, p=odds)]
        long = models()[name].size[0]
        if s + long > last:
            break
        if rng.random() < full:
            u, v = _on_side(box, side, s + long / 2, -PARKING / 2 + rng.uniform(-0.1, 0.1))
            turn = rng.normal(0, 0.02) + (np.pi if rng.random() < 0.05 else 0)
            yard.thing(name, u, v, yaw + turn, 0.0, True)
        s += long + rng.uniform(0.7, 1.8)


def _roadworks(yard: _Yard, box, side, length, road: Road) -> None:
    """Cones and boards around a hole at the kerb: in the parking lane, or on the sidewalk where there is none."""
    rng = yard.rng
    deep = -PARKING + 0.3 if road.parking else 1.0
    lift = 0.0 if road.parking else KERB
    s0, s1 = length * 0.55, min(length * 0.55 + rng.uniform(10, 18), length - STOP - 3)
    for s in np.arange(s0, s1, 2.0):
        yard.thing("cone", *_on_side(box, side, s, deep), rng.uniform(0, 6), lift)
    yaw = side * np.pi / 2
    for s in (s0 - 1.2, s1 + 0.6):
        yard.thing("board", *_on_side(box, side, s, deep / 2), yaw + np.pi / 2, lift)
    for s in np.arange(s0 + 2, s1 - 2, 1.7):
        if rng.random() < 0.5:
            yard.thing(rng.choice(["red", "white"]), *_on_side(box, side, s, deep * 0.45), yaw, lift)
    yard.thing("worker", *_on_side(box, side, s0 + 1.0, deep * 0.5), rng.uniform(0, 6), lift)
    if road.parking and s1 - s0 > 13:
        yard.thing("debris", *_on_side(box, side, s1 - 1.0, deep * 0.5), yaw, lift)


def _signals(yard: _Yard, i: int, j: int) -> None:
    """A pole with an arm on the far right of each approach, and lights for those on foot."""
    town = yard.town
    for approach, (du, dv) in enumerate(HEADINGS):
        road = town.road(approach, i, j)
        d, right = np.array([du, dv], dtype=float), np.array([dv, -du], dtype=float)
        place = town.middle(i, j) + d * (town.edge(approach, i, j) + CORNER * 0.35 + 0.9) + right * (road.half + 1.3)
        place = place + d * 0.6
        yaw = np.arctan2(dv, du)
        reach = min(road.half - road.inner * 0.5, 6.5) + 0.8
        grey = (0.16, 0.17, 0.17)
        parts = [
            m.cylinder(0.11, 5.9, kind=m.METAL, colour=grey, top=0.08, sides=8),
            m.rod((0, 0, 5.7), (0, reach, 5.9), 0.06, m.METAL, grey),
        ]
        number = len(yard.signals)
        yard.signals.append((i, j, approach, 0))
        for y, z in ((reach - 0.3, 5.25), (0.0, 3.3)):
            x = -0.2
            parts.append(m.box((0.22, 0.36, 1.05), (x, y, z), m.PLAIN, (0.05, 0.05, 0.05)))
            for k, colour in enumerate(((0.9, 0.05, 0.05), (0.9, 0.6, 0.05), (0.05, 0.8, 0.3))):
                eye = m.disc(0.125, (0, 0, 0), -1, m.SIGNAL, colour, sides=12).moved(yaw=-np.pi / 2)
                lamp = Mesh(
                    eye.vertices, eye.faces, eye.kind, eye.colour, np.full(len(eye.faces), number * 3.0 + k, np.float32)
                )
                parts.append(lamp.moved((x - 0.115, y, z + 0.86 - 0.33 * k)))
        yard.put(m.join(parts), "manmade", *place, yaw, KERB)
