"""Everything that can move or be annotated: cars, trucks, buses, cycles, people, barriers, cones. Metres.

A model is one or more meshes (a walking person has a mesh for each phase of the step) in a frame with x ahead, y left,
z up and the origin on the ground below the middle of its box. Faces of kind PAINT and CLOTH take their colour from the
actor: aux 0 its first colour, aux 1 its second.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from .meshes import (
    CLOTH,
    CONCRETE,
    GLASS,
    HEADLAMP,
    METAL,
    PAINT,
    PLAIN,
    STRIPES,
    TAILLAMP,
    Mesh,
    ball,
    box,
    cylinder,
    disc,
    hull,
    join,
    loft,
    pane,
    quad,
    rod,
    taper,
)

PAD = 0.03  # m by which a box is larger than the mesh on each side, so that no point of the surface falls out of it
PHASES = 8  # meshes of one walking person
STEP = 1.4  # m walked in one full cycle of both legs
_BLACK, _TYRE, _DARK, _WINDOW = (0.03, 0.03, 0.035), (0.09, 0.09, 0.095), (0.15, 0.15, 0.16), (0.11, 0.13, 0.16)
_SKIN = ((0.93, 0.76, 0.65), (0.80, 0.60, 0.46), (0.55, 0.38, 0.28), (0.36, 0.25, 0.19))


@dataclass(frozen=True)
class Model:
    """A thing that can stand or move in the world."""

    name: str
    kind: str  # its class in the table occ3d-nuscenes
    category: str  # its nuScenes category
    meshes: tuple[Mesh, ...]
    size: tuple[float, float, float]  # m: length, width, height of its box
    axles: tuple[float, float] = (0.0, 0.0)  # m: x of the points that follow a path, front and rear
    middle: tuple[float, float, float] = (0.0, 0.0, 0.0)  # m: middle of its box

    @property
    def reach(self) -> float:
        """Radius of a ball around `middle` that holds the box, m."""
        return float(np.linalg.norm(self.size)) / 2


def _model(name, kind, category, meshes, axles=(0.0, 0.0)) -> Model:
    low = np.min([m.bounds()[0] for m in meshes], axis=0) - PAD
    high = np.max([m.bounds()[1] for m in meshes], axis=0) + PAD
    shift = np.array([-(low[0] + high[0]) / 2, -(low[1] + high[1]) / 2, 0.0])
    meshes = tuple(m.moved(shift) for m in meshes)
    size = tuple(float(v) for v in high - low)
    centre = (0.0, 0.0, float(low[2] + high[2]) / 2)
    return Model(name, kind, category, meshes, size, (axles[0] + shift[0], axles[1] + shift[0]), centre)


def _section(w, low, side, top) -> list[tuple[float, float]]:
    """A car's cross-section: half width at the sides, heights of floor, shoulder and bonnet or belt."""
    sill = low + 0.16
    half = [(0.86 * w, low), (w, sill), (w, side), (0.93 * w, top)]
    return half + [(-y, z) for y, z in reversed(half)]


def wheels(axles, half: float, radius: float, wide: float = 0.22, *, double: bool = False) -> list[Mesh]:
    """A wheel at both sides of each axle; `half` is half the distance between the outer faces."""
    out = []
    for x in axles:
        for side in (-1, 1):
            y0 = half - (2 * wide if double else wide)
            shape = cylinder(radius, half - y0, (x, y0, radius), PLAIN, _TYRE, sides=16, axis="y")
            hub = disc(0.62 * radius, (x, half + 0.006, radius), 1, METAL, (0.55, 0.56, 0.58), sides=12)
            nut = disc(0.2 * radius, (x, half + 0.01, radius), 1, METAL, (0.25, 0.25, 0.27), sides=8)
            for part in (shape, hub, nut):
                out.append(part if side > 0 else replace(part, vertices=part.vertices * [1, -1, 1]))
    return out


def _arches(axles, half: float, radius: float) -> list[Mesh]:
    """The dark rings that show where a body leaves room for its wheels."""
    return [
        disc(1.17 * radius, (x, s * (half + 0.004), radius), s, PLAIN, _BLACK, sides=12, begin=-0.1, end=np.pi + 0.1)
        for x in axles
        for s in (-1, 1)
    ]


def _cabin(
    rear, front, roof_rear, roof_front, low_half, high_half, belt, height, *, pillars=(0.46, 0.54)
) -> list[Mesh]:
    """A cabin with windows: x of its lower and upper edges, half widths below and above, heights."""
    bottom = np.array([[rear, -low_half], [front, -low_half], [front, low_half], [rear, low_half]])
    top = np.array([[roof_rear, -high_half], [roof_front, -high_half], [roof_front, high_half], [roof_rear, high_half]])
    b, t = np.c_[bottom, np.full(4, belt)], np.c_[top, np.full(4, height)]
    crown = t * [0.97, 0.8, 1] + [0, 0, 0.05]
    out = [hull(b, t, PAINT, (1, 1, 1), floor=False, lid=False), hull(t, crown, PAINT, (1, 1, 1), floor=False)]
    sides = {"right": (b[0], b[1], t[1], t[0]), "left": (b[2], b[3], t[3], t[2])}
    for name, wall in sides.items():
        first, second = pillars if name == "right" else (1 - pillars[1], 1 - pillars[0])
        out.append(pane(wall, GLASS, _WINDOW, left=0.06, right=1 - first, low=0.06, high=0.1))
        out.append(pane(wall, GLASS, _WINDOW, left=second, right=0.06, low=0.06, high=0.1))
    out.append(pane((b[1], b[2], t[2], t[1]), GLASS, _WINDOW, left=0.05, right=0.05, low=0.02, high=0.06))
    out.append(pane((b[3], b[0], t[0], t[3]), GLASS, _WINDOW, left=0.07, right=0.07, low=0.08, high=0.1))
    return out


# length, width, height, belt; bonnet and boot heights; cabin and roof from rear to front as parts of the length
_CARS = {
    "sedan": (4.65, 1.84, 1.46, 0.93, 0.82, 0.98, (0.12, 0.74), (0.28, 0.57)),
    "hatch": (4.05, 1.76, 1.50, 0.95, 0.86, 0.95, (0.025, 0.74), (0.10, 0.56)),
    "suv": (4.75, 1.95, 1.76, 1.10, 1.02, 1.10, (0.02, 0.72), (0.075, 0.56)),
    "wagon": (4.70, 1.82, 1.50, 0.94, 0.82, 0.94, (0.02, 0.73), (0.07, 0.56)),
    "van": (5.10, 1.98, 2.15, 1.18, 1.05, 1.18, (0.01, 0.86), (0.02, 0.70)),
    "coupe": (4.40, 1.86, 1.32, 0.86, 0.78, 0.92, (0.14, 0.72), (0.34, 0.54)),
}


def car(name: str) -> Model:
    """A passenger car of one of the shapes in `_CARS`."""
    length, width, height, belt, bonnet, boot, cabin, roof = _CARS[name]
    half, radius = width / 2, 0.33 if height < 1.7 else 0.37

    def x(part):
        return (part - 0.5) * length

    stations = [
        (x(0.0), _section(0.82 * half, 0.38, 0.64, 0.55 * boot + 0.2)),
        (x(0.035), _section(0.95 * half, 0.26, 0.74, boot - 0.05)),
        (x(0.12), _section(half, 0.22, 0.80 * belt + 0.06, boot)),
        (x(0.40), _section(half, 0.20, 0.80 * belt + 0.06, belt)),
        (x(0.70), _section(half, 0.20, 0.80 * belt + 0.04, belt - 0.02)),
        (x(0.84), _section(0.98 * half, 0.22, 0.78 * bonnet, bonnet)),
        (x(0.955), _section(0.92 * half, 0.25, 0.76 * bonnet, bonnet - 0.10)),
        (x(1.0), _section(0.76 * half, 0.36, 0.66 * bonnet, bonnet - 0.24)),
    ]
    axles = (x(0.815), x(0.19))
    parts = [loft(stations)]
    parts += _cabin(
        x(cabin[0]), x(cabin[1]), x(roof[0]), x(roof[1]), 0.93 * half, 0.72 * half, belt - 0.02, height - 0.05
    )
    parts += wheels(axles, half + 0.005, radius) + _arches(axles, half, radius)
    for side in (-1, 1):
        parts += [
            box((0.10, 0.36, 0.15), (x(0.972), side * 0.62 * half, 0.72 * bonnet - 0.06), HEADLAMP, (0.92, 0.93, 0.95)),
            box((0.08, 0.34, 0.17), (x(0.018), side * 0.66 * half, 0.70 * boot - 0.06), TAILLAMP, (0.62, 0.04, 0.05)),
            box((0.14, 0.16, 0.13), (x(0.655), side * (half + 0.05), belt - 0.04), PAINT, (1, 1, 1)),
        ]
    parts += [
        box((0.05, 0.62 * width, 0.13), (x(0.992), 0, 0.38), PLAIN, _BLACK),
        quad(
            [(x(0) - 0.006, y, z) for y, z in ((0.26, 0.66), (-0.26, 0.66), (-0.26, 0.54), (0.26, 0.54))][::-1],
            PLAIN,
            (0.86, 0.86, 0.82),
        ),
    ]
    return _model(name, "car", "vehicle.car", [join(parts)], axles)


def pickup() -> Model:
    """A truck in nuScenes' table."""
    half = 1.0
    axles = (1.85, -1.65)
    stations = [
        (-2.8, _section(0.97 * half, 0.45, 0.9, 1.05)),
        (-0.75, _section(half, 0.42, 0.95, 1.06)),
        (1.2, _section(half, 0.42, 0.95, 1.10)),
        (2.5, _section(0.96 * half, 0.42, 0.90, 1.06)),
        (2.8, _section(0.85 * half, 0.50, 0.75, 0.95)),
    ]
    parts = [loft(stations), *_cabin(-0.75, 1.4, -0.55, 0.75, 0.93, 0.76, 1.06, 1.83)]
    parts += wheels(axles, half + 0.01, 0.4, 0.25) + _arches(axles, half, 0.4)
    for side in (-1, 1):
        parts += [
            box((2.05, 0.08, 0.28), (-1.77, side * 0.94, 1.05), PAINT),
            box((0.08, 0.34, 0.18), (2.77, side * 0.66, 0.78), HEADLAMP, (0.92, 0.93, 0.95)),
            box((0.06, 0.16, 0.32), (-2.80, side * 0.86, 0.78), TAILLAMP, (0.62, 0.04, 0.05)),
        ]
    parts += [box((0.08, 1.9, 0.28), (-2.76, 0, 1.05), PAINT), box((1.9, 1.78, 0.02), (-1.77, 0, 1.06), PLAIN, _DARK)]
    parts += [box((0.06, 1.9, 0.2), (2.8, 0, 0.46), METAL, (0.6, 0.6, 0.62))]
    return _model("pickup", "truck", "vehicle.truck", [join(parts)], axles)


def _tractor(x: float, width: float, height: float, deep: float) -> list[Mesh]:
    """A cab over its engine whose front stands at x; painted, with windows, lamps and a grille."""
    half, low = width / 2, 0.55
    b = np.array([[x - deep, -half, low], [x, -half, low], [x, half, low], [x - deep, half, low]])
    t = b * [1, 0.95, 0] + [0, 0, height] + np.array([[0, 0, 0], [-0.25, 0, 0], [-0.25, 0, 0], [0, 0, 0]])
    front, right, left = (b[1], b[2], t[2], t[1]), (b[0], b[1], t[1], t[0]), (b[2], b[3], t[3], t[2])
    parts = [
        hull(b, t, PAINT, (1, 1, 1)),
        pane(front, GLASS, _WINDOW, left=0.06, right=0.06, low=0.50, high=0.12),
        pane(front, PLAIN, _BLACK, left=0.2, right=0.2, low=0.14, high=0.62),
        pane(right, GLASS, _WINDOW, left=0.45, right=0.08, low=0.48, high=0.14),
        pane(left, GLASS, _WINDOW, left=0.08, right=0.45, low=0.48, high=0.14),
        box((0.18, width, 0.32), (x - 0.02, 0, 0.36), PLAIN, _DARK),
    ]
    for side in (-1, 1):
        parts += [
            box((0.06, 0.36, 0.18), (x + 0.02, side * 0.72 * half, 0.66), HEADLAMP, (0.92, 0.93, 0.95)),
            box((0.16, 0.10, 0.42), (x - 0.25, side * (half + 0.1), 1.55), PLAIN, _BLACK),
        ]
    return parts


def lorry(boxed: bool = True) -> Model:
    """A rigid truck with a box or a flat bed with sides."""
    axles = (2.6, -2.2)
    parts = [*_tractor(3.8, 2.3, 2.5, 1.8), box((6.9, 0.9, 0.3), (-0.3, 0, 0.55), PLAIN, _DARK)]
    if boxed:
        parts.append(box((5.6, 2.4, 2.35), (-1.0, 0, 0.95), PAINT, aux=1))
        parts.append(box((0.02, 2.2, 2.1), (-3.81, 0, 1.05), METAL, (0.68, 0.68, 0.7)))
    else:
        parts += [box((5.6, 0.06, 0.6), (-1.0, s * 1.17, 0.95), PAINT, aux=1) for s in (-1, 1)]
        parts += [box((0.06, 2.4, 0.6), (x, 0, 0.95), PAINT, aux=1) for x in (-3.77, 1.77)]
        parts += [box((5.6, 2.4, 0.08), (-1.0, 0, 0.9), PLAIN, _DARK)]
        parts += [taper((4.6, 2.0), (2.4, 0.9), 0.6, (-1.0, 0, 0.96), PLAIN, (0.42, 0.34, 0.25))]
    parts += wheels(axles[:1], 1.16, 0.48, 0.28) + wheels(axles[1:], 1.18, 0.48, 0.28, double=True)
    parts += [box((0.06, 0.3, 0.14), (-3.8, s * 0.95, 0.68), TAILLAMP, (0.62, 0.04, 0.05)) for s in (-1, 1)]
    parts += [box((1.4, 0.04, 0.35), (0.2, s * 1.12, 0.5), PLAIN, _DARK) for s in (-1, 1)]
    return _model("lorry" if boxed else "tipper", "truck", "vehicle.truck", [join(parts)], axles)


def semi() -> tuple[Model, Model]:
    """A tractor and the trailer that it pulls: (truck, trailer)."""
    axles = (2.1, -1.5)
    parts = [*_tractor(3.1, 2.45, 3.1, 2.2), box((5.8, 0.9, 0.3), (-0.1, 0, 0.6), PLAIN, _DARK)]
    parts += [taper((1.6, 2.2), (0.8, 2.0), 0.5, (1.7, 0, 3.1), PAINT, shift=-0.4)]
    parts += wheels(axles[:1], 1.2, 0.5, 0.3) + wheels((-1.0, -2.2), 1.22, 0.5, 0.3, double=True)
    parts += [cylinder(0.32, 1.1, (0.1, s * 0.98, 0.75), METAL, (0.7, 0.7, 0.72), sides=12, axis="x") for s in (-1, 1)]
    parts += [box((0.06, 0.3, 0.14), (-2.95, s * 0.9, 0.7), TAILLAMP, (0.62, 0.04, 0.05)) for s in (-1, 1)]
    tractor = _model("tractor", "truck", "vehicle.truck", [join(parts)], axles)
    body = [
        box((10.5, 2.5, 2.65), (0, 0, 1.2), PAINT, aux=1),
        box((10.4, 1.0, 0.2), (0, 0, 1.0), PLAIN, _DARK),
        box((0.02, 2.3, 2.4), (-5.27, 0, 1.32), METAL, (0.7, 0.7, 0.72)),
        *wheels((-2.6, -3.8), 1.24, 0.5, 0.3, double=True),
    ]
    body += [box((0.06, 0.34, 0.14), (-5.26, s * 1.0, 1.0), TAILLAMP, (0.62, 0.04, 0.05)) for s in (-1, 1)]
    body += [box((3.2, 0.05, 0.5), (0.4, s * 1.2, 0.6), METAL, (0.6, 0.6, 0.62)) for s in (-1, 1)]
    body += [box((0.12, 0.12, 1.0), (2.6, s * 0.5, 0.0), PLAIN, _DARK) for s in (-1, 1)]
    return tractor, _model("semitrailer", "trailer", "vehicle.trailer", [join(body)], (4.2, -3.2))


def small_trailer() -> Model:
    """What a car or pickup pulls."""
    parts = [
        box((2.6, 1.6, 0.12), (0, 0, 0.5), PLAIN, _DARK),
        *(box((2.6, 0.05, 0.5), (0, s * 0.8, 0.55), METAL, (0.6, 0.61, 0.63)) for s in (-1, 1)),
        *(box((0.05, 1.6, 0.5), (s * 1.28, 0, 0.55), METAL, (0.6, 0.61, 0.63)) for s in (-1, 1)),
        taper((2.4, 1.4), (1.5, 0.7), 0.7, (0, 0, 0.62), CLOTH, (1, 1, 1)),
        rod((1.3, 0, 0.5), (2.1, 0, 0.5), 0.05),
        *wheels((-0.2,), 0.98, 0.32),
        *(box((0.05, 0.18, 0.12), (-1.32, s * 0.65, 0.5), TAILLAMP, (0.62, 0.04, 0.05)) for s in (-1, 1)),
    ]
    return _model("small_trailer", "trailer", "vehicle.trailer", [join(parts)], (2.1, -0.2))


def bus() -> Model:
    length, width, height = 11.8, 2.55, 3.05
    half, x1, x0 = width / 2, length / 2, -length / 2
    axles = (3.1, -3.0)
    b = np.array([[x0, -half, 0.32], [x1, -half, 0.32], [x1, half, 0.32], [x0, half, 0.32]])
    t = b * [0.985, 0.94, 0] + [0, 0, height]
    front, back = (b[1], b[2], t[2], t[1]), (b[3], b[0], t[0], t[3])
    right, left = (b[0], b[1], t[1], t[0]), (b[2], b[3], t[3], t[2])
    parts = [hull(b, t, PAINT, (1, 1, 1)), box((4.2, 1.5, 0.25), (-1.5, 0, height), PAINT)]
    parts += [
        pane(front, GLASS, _WINDOW, left=0.05, right=0.05, low=0.28, high=0.16),
        pane(front, PLAIN, (0.95, 0.72, 0.15), left=0.25, right=0.25, low=0.86, high=0.03),
        pane(back, GLASS, _WINDOW, left=0.15, right=0.15, low=0.5, high=0.15),
    ]
    for wall in (right, left):
        for k in range(7):
            a = 0.03 + k * 0.135
            parts.append(pane(wall, GLASS, _WINDOW, left=a, right=1 - a - 0.122, low=0.4, high=0.12))
        parts.append(pane(wall, PAINT, (1, 1, 1), left=0.0, right=0.0, low=0.1, high=0.75, aux=1))
    for a in (0.90, 0.52):  # doors on the right
        parts.append(pane(right, GLASS, _WINDOW, left=a - 0.055, right=1 - a - 0.055, low=0.03, high=0.12, lift=0.015))
    parts += wheels(axles, half + 0.005, 0.5, 0.3) + _arches(axles, half, 0.5)
    for side in (-1, 1):
        parts += [
            box((0.06, 0.36, 0.2), (x1, side * 0.75 * half, 0.6), HEADLAMP, (0.92, 0.93, 0.95)),
            box((0.06, 0.2, 0.5), (x0, side * 0.82 * half, 0.7), TAILLAMP, (0.62, 0.04, 0.05)),
            box((0.14, 0.12, 0.5), (x1 + 0.12, side * (half + 0.1), 1.9), PLAIN, _BLACK),
        ]
    return _model("bus", "bus", "vehicle.bus.rigid", [join(parts)], axles)


_YELLOW = (0.93, 0.66, 0.08)


def excavator() -> Model:
    parts = []
    for s in (-1, 1):
        track = loft([(s * 1.2 - 0.3, _ring(1.8, 0.45)), (s * 1.2 + 0.3, _ring(1.8, 0.45))], PLAIN, _TYRE)
        parts.append(track.moved(yaw=-np.pi / 2))
    parts += [
        cylinder(0.7, 0.25, (0, 0, 0.8), PLAIN, _DARK, sides=14),
        box((3.2, 2.4, 0.95), (-0.55, 0, 1.0), PLAIN, _YELLOW),
        box((0.8, 2.3, 0.5), (-1.85, 0, 1.15), PLAIN, _DARK),
        box((1.5, 0.95, 1.0), (0.4, 0.75, 1.9), PLAIN, _YELLOW),
    ]
    b, t = (
        np.array([[x, y, z] for x, y in ((-0.35, 0.28), (1.15, 0.28), (1.15, 1.22), (-0.35, 1.22))]) for z in (2.0, 2.9)
    )
    for i, j in ((0, 1), (1, 2), (2, 3)):
        parts.append(pane((b[i], b[j], t[j], t[i]), GLASS, _WINDOW, left=0.08, right=0.08, low=0.1, high=0.12))
    elbow, wrist, tip = (3.2, -0.35, 3.9), (5.0, -0.35, 1.9), (4.3, -0.35, 0.6)
    parts += [
        rod((0.7, -0.35, 1.7), elbow, 0.26, PLAIN, _YELLOW, sides=4, end=0.2),
        rod(elbow, wrist, 0.2, PLAIN, _YELLOW, sides=4, end=0.15),
        rod((1.4, -0.35, 1.5), (2.4, -0.35, 2.9), 0.08),
        taper((0.9, 1.0), (0.4, 1.0), 1.1, (tip[0], tip[1], tip[2]), METAL, (0.3, 0.29, 0.28), shift=0.35),
    ]
    return _model("excavator", "construction_vehicle", "vehicle.construction", [join(parts)])


def _ring(length: float, height: float) -> list[tuple[float, float]]:
    """A track from the side, counter-clockwise."""
    low = [(-length + 0.35, 0.02), (length - 0.35, 0.02), (length, height), (length - 0.3, 2 * height)]
    return low + [(-length + 0.3, 2 * height), (-length, height)]


def loader() -> Model:
    axles = (1.5, -1.4)
    parts = [
        box((2.6, 1.7, 1.0), (-1.6, 0, 0.75), PLAIN, _YELLOW),
        box((1.6, 1.2, 0.8), (0.6, 0, 0.7), PLAIN, _YELLOW),
        box((1.3, 1.4, 0.4), (-0.5, 0, 1.7), PLAIN, _YELLOW),
        box((1.4, 1.5, 0.12), (-0.5, 0, 3.15), PLAIN, _YELLOW),
        *(box((0.08, 0.08, 1.1), (-0.5 + sx * 0.6, sy * 0.65, 2.1), PLAIN, _BLACK) for sx in (-1, 1) for sy in (-1, 1)),
        box((1.15, 1.25, 1.0), (-0.5, 0, 2.12), GLASS, _WINDOW),
        *(rod((0.3, s * 0.5, 1.6), (2.7, s * 0.5, 0.7), 0.12, PLAIN, _YELLOW, sides=4) for s in (-1, 1)),
        taper((0.5, 2.5), (1.1, 2.5), 0.9, (3.0, 0, 0.25), METAL, (0.32, 0.31, 0.3), shift=0.1),
        *wheels(axles, 1.2, 0.72, 0.5),
    ]
    return _model("loader", "construction_vehicle", "vehicle.construction", [join(parts)], axles)


def _person(
    phase: float | None, *, tall=1.0, vest=False, skin=_SKIN[0], hair=_BLACK, bag=False, skirt=False
) -> list[Mesh]:
    """Legs and arms swing with `phase` (rad; None: standing); 1.75 m times `tall`."""
    swing = 0.0 if phase is None else 0.34 * np.sin(phase)
    parts = []
    for side, angle in ((1, swing), (-1, -swing)):
        hip = np.array([0, side * 0.10, 0.90])
        knee = hip + 0.44 * np.array([np.sin(angle), 0, -np.cos(angle)])
        bend = angle - 0.5 * max(0.0, -np.sin(angle) * 1.5) if phase is not None else 0.0
        foot = knee + 0.43 * np.array([np.sin(bend), 0, -np.cos(bend)])
        foot[2] = max(foot[2], 0.05)
        parts += [
            rod(hip, knee, 0.095, CLOTH, (1, 1, 1), sides=7, end=0.065),
            rod(knee, foot, 0.065, CLOTH, (1, 1, 1), sides=7, end=0.05),
            box((0.26, 0.10, 0.09), (foot[0] + 0.06, foot[1], foot[2] - 0.05), PLAIN, _BLACK),
        ]
        for leg in range(1, 3):
            parts[-leg - 1] = replace(parts[-leg - 1], aux=np.ones_like(parts[-leg - 1].aux))
        shoulder = np.array([0, side * 0.22, 1.42])
        elbow = shoulder + 0.28 * np.array([np.sin(-angle * 0.9), side * 0.12, -np.cos(angle)])
        hand = elbow + 0.26 * np.array([np.sin(-angle * 0.9 + 0.35), 0.0, -np.cos(-angle * 0.9 + 0.35)])
        parts += [
            rod(shoulder, elbow, 0.058, CLOTH, (1, 1, 1), sides=6, end=0.048),
            rod(elbow, hand, 0.046, CLOTH, (1, 1, 1), sides=6, end=0.035),
            ball((0.05, 0.04, 0.06), hand, PLAIN, skin, detail=0),
        ]
    torso = [(0.88, 0.115, 0.155), (1.1, 0.12, 0.165), (1.32, 0.135, 0.205), (1.45, 0.10, 0.19), (1.5, 0.06, 0.08)]
    angle = np.arange(10) * 2 * np.pi / 10
    rings = [np.c_[a * np.cos(angle), b * np.sin(angle), np.full(10, z)] for z, a, b in torso]
    parts += [
        hull(lo, hi, CLOTH, (1, 1, 1), floor=k == 0, lid=k == 3) for k, (lo, hi) in enumerate(zip(rings, rings[1:]))
    ]
    if vest:
        for z in (1.05, 1.25):
            ring = np.c_[0.142 * np.cos(angle), 0.2 * np.sin(angle), np.full(10, z)]
            parts.append(hull(ring, ring + [0, 0, 0.05], METAL, (0.95, 0.95, 0.9), floor=False, lid=False))
        parts.append(ball((0.14, 0.13, 0.11), (0, 0, 1.70), PLAIN, (0.95, 0.85, 0.1)))
    if skirt:
        ring = np.c_[np.cos(angle), np.sin(angle), np.zeros(10)]
        dress = hull(
            ring * [0.26, 0.26, 1] + [0, 0, 0.5], ring * [0.13, 0.16, 1] + [0, 0, 1.0], CLOTH, (1, 1, 1), lid=False
        )
        parts.append(dress)
    if bag:
        parts.append(box((0.18, 0.32, 0.42), (-0.19, 0, 1.02), PLAIN, (0.14, 0.16, 0.26)))
    parts += [
        cylinder(0.055, 0.1, (0, 0, 1.47), PLAIN, skin, sides=7),
        ball((0.10, 0.085, 0.125), (0.01, 0, 1.635), PLAIN, skin),
        ball((0.108, 0.095, 0.10), (-0.015, 0, 1.68), PLAIN, hair),
    ]
    return [join(parts).moved(scale=tall)]


def person(name: str, category: str, **looks) -> Model:
    """Somebody who walks: mesh 0 stands, the rest are the phases of a step."""
    meshes = _person(None, **looks)
    for k in range(PHASES):
        meshes += _person(2 * np.pi * k / PHASES, **looks)
    return _model(name, "pedestrian", category, meshes)


def _seated(at, lean: float, reach: float, skin=_SKIN[1], helmet=(0.85, 0.85, 0.88)) -> list[Mesh]:
    """A rider on a saddle at (x, z) leaning ahead by `lean` rad, hands `reach` m ahead."""
    x, z = at
    up = np.array([np.sin(lean), 0, np.cos(lean)])
    hip = np.array([x, 0, z + 0.08])
    chest = hip + 0.5 * up
    parts = [rod(hip - 0.05 * up, chest, 0.16, CLOTH, (1, 1, 1), sides=8, end=0.19)]
    for s in (-1, 1):
        knee = np.array([x + 0.42, s * 0.16, z - 0.12])
        foot = np.array([x + 0.25, s * 0.14, z - 0.55])
        legs = [
            rod(hip + [0, s * 0.1, 0], knee, 0.09, CLOTH, (1, 1, 1), end=0.07),
            rod(knee, foot, 0.065, CLOTH, (1, 1, 1), end=0.05),
        ]
        parts += [replace(leg, aux=np.ones_like(leg.aux)) for leg in legs]
        shoulder, hand = chest + [0, s * 0.2, -0.05], np.array([x + reach, s * 0.27, z + 0.22])
        parts.append(rod(shoulder, hand, 0.055, CLOTH, (1, 1, 1), end=0.04))
    head = chest + 0.22 * up
    return parts + [
        ball((0.11, 0.09, 0.13), head, PLAIN, skin),
        ball((0.14, 0.12, 0.11), head + [0, 0, 0.07], PLAIN, helmet),
    ]


def _hoop(x: float, radius: float, tube: float, kind, colour) -> Mesh:
    """A standing wheel of a cycle: a ring of short rods."""
    angle = np.arange(15) * 2 * np.pi / 14
    points = np.c_[x + radius * np.cos(angle), np.zeros(15), radius + tube + radius * np.sin(angle)]
    return join([rod(a, b, tube, kind, colour, sides=4) for a, b in zip(points, points[1:])])


def bicycle(rider: bool) -> Model:
    tube = 0.022
    parts = [_hoop(x, 0.32, 0.02, PLAIN, _TYRE) for x in (0.52, -0.52)]
    crank, seat, head, fork = (-0.08, 0, 0.3), (-0.22, 0, 0.88), (0.34, 0, 0.88), (0.52, 0, 0.34)
    frame = [(crank, seat), (crank, (0.36, 0, 0.72)), (seat, head), (fork, (0.34, 0, 0.92)), (crank, (-0.52, 0, 0.34))]
    frame += [((-0.52, 0, 0.34), (-0.2, 0, 0.8))]
    parts += [rod(a, b, tube, PAINT, (1, 1, 1)) for a, b in frame]
    parts += [rod((0.32, -0.27, 1.0), (0.32, 0.27, 1.0), 0.018, PLAIN, _BLACK), rod(head, (0.32, 0, 1.0), 0.018)]
    parts += [box((0.26, 0.13, 0.06), (-0.24, 0, 0.9), PLAIN, _BLACK)]
    parts += [rod((0.0, 0.12, 0.18), (-0.16, 0.12, 0.18), 0.03, PLAIN, _BLACK)]
    if rider:
        parts += _seated((-0.24, 0.9), 0.45, 0.55)
    name = "cyclist" if rider else "bicycle"
    return _model(name, "bicycle", "vehicle.bicycle", [join(parts)], (0.52, -0.52))


def motorcycle(rider: bool) -> Model:
    parts = [cylinder(0.32, 0.14, (x, -0.07, 0.32), PLAIN, _TYRE, sides=16, axis="y") for x in (0.72, -0.68)]
    parts += [disc(0.2, (x, s * 0.075, 0.32), s, METAL, (0.5, 0.5, 0.52)) for x in (0.72, -0.68) for s in (-1, 1)]
    parts += [
        ball((0.32, 0.17, 0.17), (0.18, 0, 0.86), PAINT, (1, 1, 1)),
        box((0.5, 0.32, 0.36), (0.02, 0, 0.36), METAL, (0.32, 0.32, 0.34)),
        taper((0.75, 0.28), (0.6, 0.22), 0.12, (-0.42, 0, 0.76), PLAIN, _BLACK),
        box((0.34, 0.2, 0.14), (-0.8, 0, 0.72), PAINT, (1, 1, 1)),
        rod((0.72, 0.09, 0.32), (0.42, 0.09, 0.98), 0.035),
        rod((0.72, -0.09, 0.32), (0.42, -0.09, 0.98), 0.035),
        rod((0.40, -0.36, 1.04), (0.40, 0.36, 1.04), 0.022, PLAIN, _BLACK),
        ball((0.1, 0.13, 0.13), (0.56, 0, 0.94), HEADLAMP, (0.92, 0.93, 0.95)),
        box((0.04, 0.14, 0.08), (-0.98, 0, 0.74), TAILLAMP, (0.62, 0.04, 0.05)),
        rod((0.1, -0.17, 0.3), (-0.9, -0.19, 0.4), 0.05),
    ]
    if rider:
        parts += _seated((-0.32, 0.86), 0.35, 0.7, helmet=(0.12, 0.12, 0.14))
    name = "motorcyclist" if rider else "motorcycle"
    return _model(name, "motorcycle", "vehicle.motorcycle", [join(parts)], (0.72, -0.68))


def cone() -> Model:
    parts = [box((0.38, 0.38, 0.04), (0, 0, 0), PLAIN, _DARK)]
    for low, high, a, b, colour in (
        (0.04, 0.28, 0.14, 0.10, (0.95, 0.32, 0.06)),
        (0.28, 0.46, 0.10, 0.068, (0.95, 0.95, 0.93)),
        (0.46, 0.72, 0.068, 0.028, (0.95, 0.32, 0.06)),
    ):
        parts.append(cylinder(a, high - low, (0, 0, low), PLAIN, colour, top=b, sides=12, floor=False))
    return _model("cone", "traffic_cone", "movable_object.trafficcone", [join(parts)])


def barrier(name: str) -> Model:
    """What keeps cars out: a concrete segment, a striped board on feet, or a water-filled plastic one."""
    if name == "jersey":
        profile = [(-0.3, 0.0), (0.3, 0.0), (0.26, 0.12), (0.12, 0.35), (0.08, 0.85)]
        profile += [(-0.08, 0.85), (-0.12, 0.35), (-0.26, 0.12)]
        parts = [loft([(-1.25, profile), (1.25, profile)], CONCRETE, (0.66, 0.65, 0.62))]
    elif name == "board":
        parts = [box((1.8, 0.05, 0.28), (0, 0, z), STRIPES, (0.9, 0.1, 0.08)) for z in (0.72, 0.32)]
        parts += [box((0.06, 0.06, 1.02), (x, 0, 0), METAL, (0.5, 0.5, 0.52)) for x in (-0.7, 0.7)]
        parts += [box((0.12, 0.6, 0.06), (x, 0, 0), PLAIN, _DARK) for x in (-0.7, 0.7)]
    else:
        colour = (0.88, 0.25, 0.12) if name == "red" else (0.92, 0.92, 0.9)
        parts = [taper((1.5, 0.48), (1.44, 0.2), 0.85, (0, 0, 0), PLAIN, colour)]
    return _model(name, "barrier", "movable_object.barrier", [join(parts)])


def thing(name: str) -> Model:
    """What Occ3D calls others: bins, racks, pallets, a pram."""
    if name == "bin":
        parts = [
            taper((0.55, 0.5), (0.72, 0.66), 0.95, (0, 0, 0.06), PAINT),
            box((0.76, 0.7, 0.07), (0, 0, 1.0), PLAIN, _DARK),
            *(cylinder(0.08, 0.06, (-0.28, s * 0.22, 0.08), PLAIN, _BLACK, axis="y") for s in (-1, 1)),
        ]
        return _model(name, "others", "movable_object.pushable_pullable", [join(parts)])
    if name == "rack":
        parts = []
        for k in range(4):
            x = (k - 1.5) * 0.8
            parts += [rod((x, s * 0.35, 0), (x, s * 0.35, 0.8), 0.03) for s in (-1, 1)]
            parts += [rod((x, -0.35, 0.8), (x, 0.35, 0.8), 0.03)]
        return _model(name, "others", "static_object.bicycle_rack", [join(parts)])
    if name == "pram":
        parts = [
            taper((0.6, 0.4), (0.8, 0.5), 0.35, (0, 0, 0.45), PAINT),
            ball((0.3, 0.26, 0.3), (0.2, 0, 0.8), PAINT, (1, 1, 1)),
            rod((-0.35, 0, 0.6), (-0.75, 0, 1.05), 0.03),
            *wheels((0.3, -0.3), 0.3, 0.15, 0.06),
        ]
        return _model(name, "others", "human.pedestrian.stroller", [join(parts)])
    rng = np.random.default_rng(7)
    parts = [box((1.2, 0.8, 0.14), (0, 0, 0), PLAIN, (0.6, 0.45, 0.28))]
    parts += [
        box((0.5, 0.35, 0.3), (x, y, 0.14), PLAIN, (0.62 + rng.uniform(-0.1, 0.1), 0.48, 0.32))
        for x, y in ((-0.28, -0.18), (0.3, -0.15), (-0.25, 0.2), (0.28, 0.22))
    ]
    return _model("debris", "others", "movable_object.debris", [join(parts)])


@cache
def models() -> dict[str, Model]:
    """All models by name."""
    tractor, semitrailer = semi()
    everything = [car(name) for name in _CARS]
    everything += [
        pickup(),
        lorry(True),
        lorry(False),
        tractor,
        semitrailer,
        small_trailer(),
        bus(),
        excavator(),
        loader(),
    ]
    everything += [bicycle(True), bicycle(False), motorcycle(True), motorcycle(False), cone()]
    everything += [barrier(name) for name in ("jersey", "board", "red", "white")]
    everything += [thing(name) for name in ("bin", "rack", "pram", "debris")]
    adult, child, worker = (f"human.pedestrian.{name}" for name in ("adult", "child", "construction_worker"))
    everything += [
        person("man", adult, tall=1.03, skin=_SKIN[0], hair=(0.2, 0.14, 0.09)),
        person("woman", adult, tall=0.95, skin=_SKIN[1], hair=(0.3, 0.2, 0.08), skirt=True),
        person("hiker", adult, tall=1.0, skin=_SKIN[2], bag=True),
        person("elder", adult, tall=0.97, skin=_SKIN[0], hair=(0.7, 0.7, 0.7)),
        person("tourist", adult, tall=0.98, skin=_SKIN[3], bag=True),
        person("child", child, tall=0.68, skin=_SKIN[1]),
        person("worker", worker, tall=1.02, skin=_SKIN[1], vest=True),
    ]
    return {m.name: m for m in everything}
