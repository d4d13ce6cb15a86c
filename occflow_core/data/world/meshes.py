"""Triangle meshes and the shapes that everything is made of. V vertices, F faces; metres; colours are sRGB in 0..1.

A shape stands in its own frame: x ahead, y left, z up, the origin on the ground below its middle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

# How a face is painted (the numbers are known to `shade_numba` too)
PLAIN, PAINT, GLASS, HEADLAMP, TAILLAMP, ASPHALT, PAVING, GRASS, MARKING = range(9)
FACADE, FOLIAGE, BARK, CONCRETE, STRIPES, SIGNAL, STREETLAMP, SOIL, ROOF, BRICK, METAL, CLOTH, WATER = range(9, 22)


@dataclass(frozen=True)
class Mesh:
    """Triangles, how each is painted, and one number for the painter: which facade, which signal."""

    vertices: np.ndarray  # (V, 3) float64
    faces: np.ndarray  # (F, 3) int32, counter-clockwise seen from outside
    kind: np.ndarray  # (F,) uint8
    colour: np.ndarray  # (F, 3) float32
    aux: np.ndarray  # (F,) float32

    def moved(self, shift: Sequence[float] = (0, 0, 0), yaw: float = 0.0, pitch: float = 0.0, scale=1.0) -> "Mesh":
        """Scaled, then pitched (nose up, about y), then turned about z, then shifted."""
        turn = rotation(yaw, pitch)
        return replace(self, vertices=(self.vertices * np.asarray(scale)) @ turn.T + np.asarray(shift, dtype=float))

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Low and high corner, (3,) each."""
        return self.vertices.min(0), self.vertices.max(0)

    @cached_property
    def corner_normals(self) -> np.ndarray:
        """(F, 3, 3) float32: normals at the corners of each face, smooth where faces meet at less than 40 degrees."""
        a, b, c = (self.vertices[self.faces[:, i]] for i in range(3))
        area = np.cross(b - a, c - a)
        normal = area / np.maximum(np.linalg.norm(area, axis=1, keepdims=True), 1e-12)
        _, place = np.unique(np.round(self.vertices, 4), axis=0, return_inverse=True)
        corner = place.reshape(-1)[self.faces].reshape(-1)  # (3F,) place of each corner
        order = np.argsort(corner, kind="stable")
        counts = np.bincount(corner)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        mine = np.repeat(np.arange(len(corner)), counts[corner])
        within = np.arange(len(mine)) - np.repeat(np.cumsum(counts[corner]) - counts[corner], counts[corner])
        other = order[np.repeat(starts[corner], counts[corner]) + within]
        close = (normal[mine // 3] * normal[other // 3]).sum(1) > np.cos(np.radians(40.0))
        total = np.stack([np.bincount(mine[close], area[other[close] // 3, k], len(corner)) for k in range(3)], axis=1)
        length = np.linalg.norm(total, axis=1, keepdims=True)
        total = np.where(length > 1e-12, total / np.maximum(length, 1e-12), np.repeat(normal, 3, axis=0))
        return total.reshape(-1, 3, 3).astype(np.float32)


def rotation(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """(3, 3): turned left by yaw after the nose went up by pitch after the left side went up by roll, rad."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    turn = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1.0]])
    nose = np.array([[cp, 0, -sp], [0, 1, 0], [sp, 0, cp]])
    side = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return turn @ nose @ side


def join(meshes: Sequence[Mesh]) -> Mesh:
    """One mesh out of many."""
    offsets = np.cumsum([0] + [len(m.vertices) for m in meshes[:-1]])
    return Mesh(
        np.concatenate([m.vertices for m in meshes]),
        np.concatenate([m.faces + o for m, o in zip(meshes, offsets)]).astype(np.int32),
        *(np.concatenate([getattr(m, name) for m in meshes]) for name in ("kind", "colour", "aux")),
    )


def mesh(vertices, faces, kind: int, colour, aux: float = 0.0) -> Mesh:
    """A mesh of one kind and colour."""
    faces = np.asarray(faces, dtype=np.int32).reshape(-1, 3)
    n = len(faces)
    return Mesh(
        np.asarray(vertices, dtype=np.float64).reshape(-1, 3),
        faces,
        np.full(n, kind, np.uint8),
        np.broadcast_to(np.asarray(colour, np.float32), (n, 3)).copy(),
        np.full(n, aux, np.float32),
    )


def quad(corners, kind: int, colour, aux: float = 0.0) -> Mesh:
    """Two triangles through four corners (4, 3), counter-clockwise seen from outside."""
    return mesh(corners, [[0, 1, 2], [0, 2, 3]], kind, colour, aux)


def hull(bottom, top, kind: int, colour, *, floor: bool = True, lid: bool = True, aux: float = 0.0) -> Mesh:
    """Two rings of n corners (n, 3) each, counter-clockwise from above, with walls between; convex rings."""
    n = len(bottom)
    i, j = np.arange(n), (np.arange(n) + 1) % n
    faces = [np.stack([i, j, j + n], 1), np.stack([i, j + n, i + n], 1)]
    fan = np.stack([np.zeros(n - 2, int), np.arange(1, n - 1), np.arange(2, n)], 1)
    if floor:
        faces.append(fan[:, ::-1])
    if lid:
        faces.append(fan + n)
    return mesh(np.concatenate([bottom, top]), np.concatenate(faces), kind, colour, aux)


def rectangle(length: float, width: float, x: float, y: float, z: float) -> np.ndarray:
    """(4, 3): its corners, counter-clockwise from above."""
    a, b = length / 2, width / 2
    return np.array([[x - a, y - b, z], [x + a, y - b, z], [x + a, y + b, z], [x - a, y + b, z]])


def box(size, at=(0, 0, 0), kind: int = PLAIN, colour=(0.5, 0.5, 0.5), *, floor=True, lid=True, aux=0.0) -> Mesh:
    """size (length, width, height); `at` is the middle of its bottom."""
    bottom = rectangle(size[0], size[1], *at)
    return hull(bottom, bottom + [0, 0, size[2]], kind, colour, floor=floor, lid=lid, aux=aux)


def taper(low, high, height: float, at=(0, 0, 0), kind=PLAIN, colour=(0.5, 0.5, 0.5), *, shift=0.0, floor=True) -> Mesh:
    """A box whose bottom is low (length, width) and whose top is high (length, width), moved ahead by `shift`."""
    x, y, z = at
    bottom, top = rectangle(*low, x, y, z), rectangle(*high, x + shift, y, z + height)
    return hull(bottom, top, kind, colour, floor=floor)


def cylinder(
    radius: float,
    height: float,
    at=(0, 0, 0),
    kind=PLAIN,
    colour=(0.5, 0.5, 0.5),
    *,
    top=None,
    sides=10,
    axis="z",
    floor=True,
    lid=True,
) -> Mesh:
    """From `at` along an axis; `top` is the radius at its end (a cone where it is near zero)."""
    angle = np.arange(sides) * 2 * np.pi / sides
    ring = np.stack([np.cos(angle), np.sin(angle), np.zeros(sides)], 1)
    end = radius if top is None else max(top, 1e-3)
    out = hull(ring * radius, ring * end + [0, 0, height], kind, colour, floor=floor, lid=lid)
    if axis == "y":
        out = replace(out, vertices=out.vertices[:, [1, 2, 0]])
    if axis == "x":
        out = replace(out, vertices=out.vertices[:, [2, 0, 1]])
    return out.moved(at)


def disc(radius: float, at, outward: float, kind, colour, *, sides=10, begin=0.0, end=2 * np.pi) -> Mesh:
    """A (part of a) disc in the x-z plane whose face looks along y times `outward`."""
    angle = np.linspace(begin, end, sides + 1)
    rim = np.stack([radius * np.cos(angle), np.zeros(sides + 1), radius * np.sin(angle)], 1)
    vertices = np.concatenate([np.zeros((1, 3)), rim]) + np.asarray(at, dtype=float)
    i = np.arange(1, sides + 1)
    faces = np.stack([np.zeros(sides, int), i, i + 1], 1)
    return mesh(vertices, faces if outward < 0 else faces[:, ::-1], kind, colour)


def rod(a, b, radius: float, kind=METAL, colour=(0.4, 0.4, 0.42), *, sides=6, end=None) -> Mesh:
    """A stick between two points."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    along = (b - a) / np.linalg.norm(b - a)
    first = np.cross(along, [0, 0, 1.0] if abs(along[2]) < 0.9 else [1.0, 0, 0])
    first /= np.linalg.norm(first)
    second = np.cross(along, first)
    angle = np.arange(sides)[:, None] * 2 * np.pi / sides
    ring = np.cos(angle) * first + np.sin(angle) * second
    return hull(a + ring * radius, b + ring * (radius if end is None else end), kind, colour)


def ball(radius, at=(0, 0, 0), kind=PLAIN, colour=(0.5, 0.5, 0.5), *, detail=1, rng=None, rough=0.0) -> Mesh:
    """An icosphere with radius (a number or three), its vertices moved in and out by a random part `rough`."""
    g = (1 + 5**0.5) / 2
    vertices = [(-1, g, 0), (1, g, 0), (-1, -g, 0), (1, -g, 0), (0, -1, g), (0, 1, g), (0, -1, -g), (0, 1, -g)]
    vertices = np.array(vertices + [(g, 0, -1), (g, 0, 1), (-g, 0, -1), (-g, 0, 1)], dtype=float)
    faces = np.array(
        [(0, 11, 5), (0, 5, 1), (0, 1, 7), (0, 7, 10), (0, 10, 11), (1, 5, 9), (5, 11, 4), (11, 10, 2), (10, 7, 6)]
        + [(7, 1, 8), (3, 9, 4), (3, 4, 2), (3, 2, 6), (3, 6, 8), (3, 8, 9), (4, 9, 5), (2, 4, 11), (6, 2, 10)]
        + [(8, 6, 7), (9, 8, 1)]
    )
    for _ in range(detail):
        middles = np.concatenate([vertices[faces[:, [i, (i + 1) % 3]]].mean(1) for i in range(3)])
        n, f = len(vertices), len(faces)
        ab, bc, ca = n + np.arange(f), n + f + np.arange(f), n + 2 * f + np.arange(f)
        a, b, c = faces.T
        faces = np.concatenate([np.stack(t, 1) for t in ((a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca))])
        vertices, inverse = np.unique(np.round(np.concatenate([vertices, middles]), 9), axis=0, return_inverse=True)
        faces = inverse.reshape(-1)[faces]
    vertices = vertices / np.linalg.norm(vertices, axis=1, keepdims=True)
    if rough:
        vertices = vertices * (1 + rng.uniform(-rough, rough, (len(vertices), 1)))
    return mesh(vertices * np.asarray(radius) + np.asarray(at), faces, kind, colour)


def loft(stations, kind=PAINT, colour=(0.5, 0.5, 0.5)) -> Mesh:
    """A body along x through cross-sections, rear to front: x and (n, 2) of y and z, counter-clockwise from ahead."""
    rings = np.array([[(x, y, z) for y, z in section] for x, section in stations])
    m, n = rings.shape[:2]
    i, j = np.arange(n), (np.arange(n) + 1) % n
    faces = []
    for k in range(m - 1):
        a, b = k * n, (k + 1) * n
        faces += [np.stack([a + i, b + i, b + j], 1)[:, ::-1], np.stack([a + i, b + j, a + j], 1)[:, ::-1]]
    fan = np.stack([np.zeros(n - 2, int), np.arange(1, n - 1), np.arange(2, n)], 1)
    faces += [fan[:, ::-1], fan + (m - 1) * n]
    return mesh(rings.reshape(-1, 3), np.concatenate(faces), kind, colour)


def pane(corners, kind, colour, *, left=0.0, right=0.0, low=0.0, high=0.0, lift=0.008, aux=0.0) -> Mesh:
    """A window on a wall: the part of a quad (4, 3: low left, low right, high right, high left seen from outside) that
    remains after fractions are cut from its sides, lifted off it by `lift` m."""
    a, b, c, d = np.asarray(corners, dtype=float)
    normal = np.cross(b - a, d - a)
    normal /= np.linalg.norm(normal)

    def at(u, v):
        return (1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * d + u * c)

    ring = [at(left, low), at(1 - right, low), at(1 - right, 1 - high), at(left, 1 - high)]
    return quad(np.array(ring) + normal * lift, kind, colour, aux)
