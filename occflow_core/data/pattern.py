"""A generated drive for the demo and the tests: six staggered cameras of a car on a ring road, among boxes.

The pictures are true to their cameras, stamps and poses, and to nothing else: there is no truth about what fills the
voxels, so nothing can be measured with them. Frames: world x, y, z with z up and the road at z = 0; the car frame lies
on the road.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from ..geometry import Cameras, rigid
from ..types import NANO, Frame

# Cameras like those of nuScenes' cars. Focal length and centre in pixels of 1600 x 900; place in m; yaw in degrees from
# ahead, counter-clockwise; delay in s within a set, as the cameras fire one after the other.
_CAMERAS = {
    "CAM_FRONT": (1266.0, (816.0, 491.0), (1.70, 0.02, 1.51), 0.0, 0.008),
    "CAM_FRONT_RIGHT": (1260.0, (807.0, 501.0), (1.55, -0.49, 1.50), -55.0, 0.016),
    "CAM_FRONT_LEFT": (1272.0, (826.0, 479.0), (1.52, 0.49, 1.51), 55.0, 0.000),
    "CAM_BACK": (809.0, (829.0, 481.0), (0.03, 0.00, 1.57), 180.0, 0.033),
    "CAM_BACK_LEFT": (1256.0, (792.0, 492.0), (1.04, 0.48, 1.56), 108.0, 0.043),
    "CAM_BACK_RIGHT": (1259.0, (807.0, 501.0), (1.02, -0.48, 1.56), -110.0, 0.024),
}
NAMES = tuple(_CAMERAS)
BEGIN = 1_700_000_000 * NANO  # ns, when every drive begins
SPEED = 8.0  # m/s, of the car
RADIUS = 60.0  # m, of the lane in which it drives, counter-clockwise around the world's origin
_LANE = 3.5  # m; the other lane lies outside of ours
_SKY, _HAZE = (222, 196, 158), (226, 214, 200)  # BGR, as all colours below
_TEXEL = 0.08  # m
_REACH = 100.0  # m, half of the painted ground


@dataclass(frozen=True)
class _Box:
    """A coloured box that stands on the ground at a distance from the middle and goes around it."""

    size: tuple[float, float, float]  # length (along its way), width, height, m
    radius: float  # m
    angle: float  # rad, at the beginning
    speed: float  # m/s, counter-clockwise
    colour: tuple[int, int, int]
    above: float = 0.0  # m between ground and box


def rig(height: int = 450, width: int = 800) -> Cameras:
    """The mounting, base_from_camera, of six cameras with pictures of this size."""
    matrices, poses = [], []
    for focal, (cx, cy), place, yaw, _ in _CAMERAS.values():
        matrices.append([[focal, 0.0, cx], [0.0, focal, cy], [0.0, 0.0, 1.0]])
        half = math.radians(yaw) / 2
        body_from_optical = rigid.from_quaternion([0.5, -0.5, 0.5, -0.5], [0.0, 0.0, 0.0])
        poses.append(rigid.from_quaternion([math.cos(half), 0.0, 0.0, math.sin(half)], place) @ body_from_optical)
    return Cameras(torch.tensor(matrices, dtype=torch.float64), torch.stack(poses), 900, 1600).resized(height, width)


def drive(
    frames: int = 60, *, seed: int = 0, height: int = 450, width: int = 800, rate: float = 12.0
) -> Iterator[Frame]:
    """`frames` frames, `rate` a second, complete and in time order; the same seed gives the same drive.

    A frame's stamp is its newest picture's; each picture shows the world at its own stamp.
    """
    rng = np.random.default_rng(seed)
    mounting, ground, boxes = rig(height, width), _ground(rng), _boxes(rng)
    delays = [camera[-1] for camera in _CAMERAS.values()]
    for k in range(frames):
        jitter = rng.uniform(-3e-4, 3e-4, len(NAMES))
        stamps = [BEGIN + round((k / rate + delay + late + 3e-4) * NANO) for delay, late in zip(delays, jitter)]
        world_from_camera = torch.stack(
            [_world_from_car(stamp) @ pose for stamp, pose in zip(stamps, mounting.car_from_camera)]
        )
        world_from_car = _world_from_car(max(stamps))
        pictures = [
            _picture(matrix.numpy(), pose.numpy(), height, width, (stamp - BEGIN) / NANO, ground, boxes)
            for matrix, pose, stamp in zip(mounting.pixels_from_camera, world_from_camera, stamps)
        ]
        yield Frame(
            images=torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(),
            cameras=Cameras(
                mounting.pixels_from_camera, rigid.inverse(world_from_car) @ world_from_camera, height, width
            ),
            used=torch.ones(len(NAMES), dtype=torch.bool),
            stamps=torch.tensor(stamps),
            stamp=max(stamps),
            world_from_car=world_from_car,
            drive=f"pattern-{seed}",
            names=NAMES,
        )


def _world_from_car(stamp: int) -> torch.Tensor:
    angle = SPEED / RADIUS * (stamp - BEGIN) / NANO
    heading = (angle + math.pi / 2) / 2
    place = [RADIUS * math.cos(angle), RADIUS * math.sin(angle), 0.0]
    return rigid.from_quaternion([math.cos(heading), 0.0, 0.0, math.sin(heading)], place)


def _ground(rng) -> np.ndarray:
    """The world's floor from above, (S, S, 3) uint8 BGR; row = y, column = x."""
    size = round(2 * _REACH / _TEXEL)
    middle = (size // 2, size // 2)
    coarse = rng.integers(-14, 15, (size // 25, size // 25, 1)).astype(np.int16)  # fields of 2 m that differ a little
    fine = rng.integers(-9, 10, (size, size, 1), dtype=np.int16)
    noise = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_NEAREST)[..., None] + fine
    floor = np.empty((size, size, 3), np.uint8)
    floor[:] = (74, 122, 92)

    def ring(inner, outer, colour):
        radius, thick = (inner + outer) / 2 / _TEXEL, (outer - inner) / _TEXEL
        cv2.circle(floor, middle, round(radius), colour, max(1, round(thick)))

    left, right = RADIUS - _LANE / 2, RADIUS + 1.5 * _LANE
    ring(left - 3.0, right + 3.0, (158, 160, 164))  # sidewalks
    ring(left - 0.3, right + 0.3, (196, 198, 200))  # kerbs
    ring(left, right, (88, 86, 84))
    ring(left + 0.15, left + 0.3, (235, 235, 235))
    ring(right - 0.3, right - 0.15, (235, 235, 235))
    between = round((RADIUS + _LANE / 2) / _TEXEL)
    for start in range(0, 360, 4):  # dashes of 2.2 m every 4.3 m
        cv2.ellipse(floor, middle, (between, between), 0, start, start + 2, (90, 200, 235), 2)
    for angle in np.arange(0, 2 * math.pi, math.pi / 3):  # zebra crossings
        for r in np.arange(left + 0.5, right - 0.4, 0.9):
            bar = (np.array([[-1.5, -0.22], [1.5, -0.22], [1.5, 0.22], [-1.5, 0.22]]) + [0.0, r]) / _TEXEL
            turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            cv2.fillPoly(floor, [np.round(bar @ turn.T + middle).astype(np.int32)], (232, 232, 232))
    return (floor + noise).clip(0, 255).astype(np.uint8)


def _boxes(rng) -> list[_Box]:
    boxes, paint = [], [(60, 60, 200), (200, 130, 50), (235, 235, 235), (40, 40, 44), (60, 170, 230), (120, 160, 60)]
    for i, angle in enumerate((0.28, 0.62, -0.35, 1.6, 2.9, 4.2)):  # before and behind us, in our lane
        boxes.append(_Box((4.5, 1.9, 1.6), RADIUS, angle, SPEED * rng.uniform(0.9, 1.1), paint[i % 6]))
    for angle in np.arange(0.3, 2 * math.pi, 0.62):  # those that come towards us
        size = (9.5, 2.6, 3.2) if rng.random() < 0.2 else (4.4, 1.9, 1.55)
        boxes.append(_Box(size, RADIUS + _LANE, angle, -rng.uniform(6, 9), paint[rng.integers(6)]))
    for angle in np.arange(0.05, 2 * math.pi, 0.22):  # people on both sidewalks
        radius = RADIUS + (_LANE * 1.5 + 1.6 if rng.random() < 0.5 else -_LANE / 2 - 1.6)
        colour = tuple(int(v) for v in rng.integers(40, 220, 3))
        boxes.append(_Box((0.5, 0.6, rng.uniform(1.5, 1.9)), radius, angle, rng.uniform(-1.6, 1.6), colour))
    for angle in np.arange(0.0, 2 * math.pi, 0.16):  # houses outside
        size = (rng.uniform(7, 11), rng.uniform(6, 10), rng.uniform(5, 14))
        tone = int(rng.integers(120, 190))
        boxes.append(_Box(size, RADIUS + rng.uniform(18, 22), angle, 0.0, (tone - 40, tone - 15, tone + 15)))
    for angle in np.arange(0.07, 2 * math.pi, 0.15):  # trees inside, and some outside
        radius = RADIUS - rng.uniform(7, 16) if rng.random() < 0.7 else RADIUS + rng.uniform(10.5, 12)
        crown = rng.uniform(2.0, 3.4)
        boxes.append(_Box((0.4, 0.4, 2.2), radius, angle, 0.0, (50, 74, 96)))
        boxes.append(_Box((crown, crown, crown), radius, angle, 0.0, (52, int(rng.integers(105, 150)), 62), above=2.0))
    return boxes


def _picture(matrix, world_from_camera, height, width, time, ground, boxes) -> np.ndarray:
    """(H, W, 3) uint8 RGB: the world at a time in s, through one camera."""
    turn, eye = world_from_camera[:3, :3], world_from_camera[:3, 3]
    pixels_from_world = matrix @ turn.T @ np.hstack([np.eye(3), -eye[:, None]])
    world_from_texels = np.array([[_TEXEL, 0, -_REACH], [0, _TEXEL, -_REACH], [0, 0, 0], [0, 0, 1.0]])
    picture = cv2.warpPerspective(
        ground, pixels_from_world @ world_from_texels, (width, height), flags=cv2.INTER_LINEAR, borderValue=_HAZE
    )
    # how far the ground is along each pixel's ray; what lies above the horizon is sky
    rays = turn @ np.linalg.inv(matrix)
    sink = -(rays[2, 0] * np.arange(width)[None] + rays[2, 1] * np.arange(height)[:, None] + rays[2, 2])
    far = eye[2] / np.maximum(sink, 1e-3)
    haze = np.clip((far - 25.0) / 60.0, 0.0, 1.0).astype(np.float32)
    sky = np.clip(-sink * 2.0, 0.0, 1.0).astype(np.float32)[..., None]
    above = np.float32(_HAZE) + sky * (np.float32(_SKY) - np.float32(_HAZE))
    picture = cv2.blendLinear(picture, above.astype(np.uint8), 1.0 - haze, haze)
    here = [(np.hypot(*(c - eye)[:2]), box, c, heading) for box in boxes for c, heading in [_stands(box, time)]]
    for distance, box, centre, heading in sorted(here, key=lambda item: -item[0]):
        if distance < 75.0:
            _paint(picture, pixels_from_world, eye, box, centre, heading, distance)
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _stands(box: _Box, time: float) -> tuple[np.ndarray, float]:
    angle = box.angle + box.speed * time / box.radius
    centre = np.array([box.radius * math.cos(angle), box.radius * math.sin(angle), box.above + box.size[2] / 2])
    return centre, angle + (math.pi / 2 if box.speed >= 0 else -math.pi / 2)


def _paint(picture, pixels_from_world, eye, box: _Box, centre, heading, distance) -> None:
    """The faces of a box that look at the eye. Boxes are convex: their own faces never cover each other."""
    ahead = np.array([math.cos(heading), math.sin(heading), 0.0])
    axes = np.stack([ahead, [-ahead[1], ahead[0], 0.0], [0.0, 0.0, 1.0]])
    half = np.array(box.size) / 2
    haze = min(max((distance - 25.0) / 60.0, 0.0), 1.0)
    for axis, light in ((0, 0.8), (1, 0.65), (2, 1.0)):
        side = 1.0 if (eye - centre) @ axes[axis] > 0 else -1.0
        if abs((eye - centre) @ axes[axis]) <= half[axis]:
            continue
        first, second = (a for a in range(3) if a != axis)
        corners = [
            centre + side * half[axis] * axes[axis] + i * half[first] * axes[first] + j * half[second] * axes[second]
            for i, j in ((1, 1), (1, -1), (-1, -1), (-1, 1))
        ]
        seen = _before(np.array(corners) @ pixels_from_world[:, :3].T + pixels_from_world[:, 3])
        if len(seen) < 3:
            continue
        pixels = seen[:, :2] / seen[:, 2:]
        if (pixels.max(0) < 0).any() or (pixels.min(0) > picture.shape[1::-1]).any():
            continue
        colour = [c * light * (1 - haze) + h * haze for c, h in zip(box.colour, _HAZE)]
        # 4 fractional bits; what lies far outside is cut so that OpenCV's 32-bit corners cannot overflow
        cv2.fillConvexPoly(picture, np.round(pixels.clip(-1e5, 1e5) * 16).astype(np.int32), colour, cv2.LINE_AA, 4)


def _before(corners: np.ndarray, near: float = 0.2) -> np.ndarray:
    """The part of a polygon (V, 3) = (u d, v d, d) with depth d of at least `near` m."""
    kept = []
    for a, b in zip(corners, np.roll(corners, -1, axis=0)):
        if a[2] >= near:
            kept.append(a)
        if (a[2] >= near) != (b[2] >= near):
            kept.append(a + (near - a[2]) / (b[2] - a[2]) * (b - a))
    return np.array(kept).reshape(-1, 3)
