"""Real lenses: where they put a ray that a pinhole camera would put elsewhere. Arrays of numpy, float64.

A ray is (x / z, y / z) in the optical frame. `Lens.bent` says where the lens lets it cross that plane, and
`pixels_from_camera` of the real camera where that is in its picture; pixels as in `cameras.py`.

Models and coefficients are those of sensor_msgs/CameraInfo (`distortion_models.hpp`), which are OpenCV's:
docs.opencv.org, "Camera Calibration and 3D Reconstruction" (`plumb_bob`, `rational_polynomial`) and "Fisheye camera
model" (`equidistant`; Kannala and Brandt, 2006).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

COUNTS = {"plumb_bob": (4, 5), "rational_polynomial": (8, 12, 14), "equidistant": (4,)}  # coefficients of each model
LARGEST = 1e9  # a coefficient beyond it is no lens
WIDEST = 100.0  # of a ray: 89.4 degrees from the axis. No pinhole picture reaches farther
MOST_ZOOM = 4.0  # beyond it a sixteenth of the wanted picture would be left


@dataclass(frozen=True)
class Lens:
    """A model of distortion. ValueError for one that is not known, or has not the coefficients it must have."""

    model: str
    coefficients: tuple[float, ...]

    def __post_init__(self):
        if self.model not in COUNTS:
            raise ValueError(f"distortion model {self.model!r}, expected one of {', '.join(COUNTS)}")
        found, counts = len(self.coefficients), COUNTS[self.model]
        if found not in counts:
            raise ValueError(
                f"{self.model} with {found} coefficients of distortion, expected {' or '.join(map(str, counts))}"
            )
        if not all(abs(c) <= LARGEST for c in self.coefficients):  # NaN is not either
            raise ValueError(f"{self.model} distortion {list(self.coefficients)}, expected finite coefficients")
        if any(self.coefficients[12:]):
            raise ValueError(f"{self.model} with a tilted sensor (tau_x, tau_y) {self.coefficients[12:]}, expected 0")

    def bent(self, rays: np.ndarray) -> np.ndarray:
        """Rays (..., 2) -> where the lens lets them cross the same plane, (..., 2)."""
        x, y = rays[..., 0], rays[..., 1]
        square = x * x + y * y
        if self.model == "equidistant":
            return rays * _equidistant(np.sqrt(square), self.coefficients)[..., None]
        p1, p2, s1, s2, s3, s4 = self._sideways
        scale = self._scale(square)
        across = 2 * p1 * x * y + p2 * (square + 2 * x * x) + (s1 + s2 * square) * square
        down = p1 * (square + 2 * y * y) + 2 * p2 * x * y + (s3 + s4 * square) * square
        return np.stack([x * scale + across, y * scale + down], axis=-1)

    def holds(self, rays: np.ndarray) -> np.ndarray:
        """Is no other ray nearer to the axis put on the same place? (...,) bool for rays (..., 2).

        Beyond some radius a polynomial turns round and would show the same part of the picture again, mirrored. There
        it says nothing of the real lens.
        """
        x, y = rays[..., 0], rays[..., 1]
        square = x * x + y * y
        near = square < self.fold**2
        if self.model == "equidistant":
            return near
        # the terms that are not radial: the determinant of the derivative of `bent` must not have changed its sign
        p1, p2, s1, s2, s3, s4 = self._sideways
        scale, steeper = self._scale(square), self._scale_slope(square)
        xx = scale + 2 * x * x * steeper + 2 * p1 * y + 6 * p2 * x + 2 * x * (s1 + 2 * s2 * square)
        xy = 2 * x * y * steeper + 2 * p1 * x + 2 * p2 * y + 2 * y * (s1 + 2 * s2 * square)
        yx = 2 * x * y * steeper + 2 * p1 * x + 2 * p2 * y + 2 * x * (s3 + 2 * s4 * square)
        yy = scale + 2 * y * y * steeper + 6 * p1 * y + 2 * p2 * x + 2 * y * (s3 + 2 * s4 * square)
        return near & (xx * yy - xy * yx > 0)

    @cached_property
    def fold(self) -> float:
        """Length of the rays at which the radial part of the model turns round; WIDEST where it does not before."""
        if self.model == "equidistant":
            k1, k2, k3, k4 = self.coefficients
            angle = _first_root([1, 3 * k1, 5 * k2, 7 * k3, 9 * k4], (np.pi / 2) ** 2) ** 0.5
            return float(min(np.tan(angle), WIDEST)) if angle < np.pi / 2 else WIDEST
        above, below = self._above_and_below
        # d/dr of r A(s) / B(s) with s = r^2: its sign is that of A B + 2 s (A' B - A B')
        slope = np.convolve(_slope(above), below) - np.convolve(above, _slope(below))
        turns = np.convolve(above, below).astype(float)
        turns[1:] += 2 * slope
        return min(_first_root(turns, WIDEST**2) ** 0.5, _first_root(below, WIDEST**2) ** 0.5, WIDEST)

    @property
    def _above_and_below(self) -> tuple[list[float], list[float]]:
        """The radial part as a fraction of polynomials in the square of the radius, lowest power first."""
        k1, k2, _, _, k3, k4, k5, k6 = (*self.coefficients, *[0.0] * 4)[:8]
        return [1, k1, k2, k3], [1, k4, k5, k6]

    @property
    def _sideways(self) -> tuple[float, ...]:
        """Tangential p1, p2 and thin prism s1 to s4."""
        return (*self.coefficients[2:4], *(*self.coefficients[8:12], 0.0, 0.0, 0.0, 0.0)[:4])

    def _scale(self, square: np.ndarray) -> np.ndarray:
        above, below = (_polynomial(p, square) for p in self._above_and_below)
        return above / below

    def _scale_slope(self, square: np.ndarray) -> np.ndarray:
        (a, b), (above, below) = self._above_and_below, (_polynomial(p, square) for p in self._above_and_below)
        return (_polynomial(_slope(a), square) * below - above * _polynomial(_slope(b), square)) / (below * below)


def real_pixels(
    lens: Lens,
    real_pixels_from_camera: np.ndarray,  # (3, 3), of the picture that the lens made
    pixels_from_camera: np.ndarray,  # (3, 3), of a pinhole camera at the same place
    pixels: np.ndarray,  # (..., 2), of the pinhole camera
) -> tuple[np.ndarray, np.ndarray]:
    """Where the lens's picture shows what the pinhole camera has at `pixels`: pixels (..., 2), and whether the lens's
    model `holds` there (...,) bool."""
    rays = _through(np.linalg.inv(pixels_from_camera), pixels)
    with np.errstate(all="ignore"):  # beyond the fold numbers may be anything
        return _through(real_pixels_from_camera, lens.bent(rays)), lens.holds(rays)


def zoomed(pixels_from_camera: np.ndarray, zoom: float) -> np.ndarray:
    """The same camera with its focal length `zoom` times as large, about its principal point."""
    return pixels_from_camera * np.array([[zoom, zoom, 1.0], [zoom, zoom, 1.0], [1.0, 1.0, 1.0]])


def least_zoom(
    lens: Lens,
    real_pixels_from_camera: np.ndarray,  # (3, 3)
    real_size: tuple[int, int],  # height, width
    pixels_from_camera: np.ndarray,  # (3, 3), of the pinhole camera that is wanted
    size: tuple[int, int],  # height, width
) -> float:
    """By how much the wanted camera must be zoomed in so that its whole picture lies within the lens's picture and
    where the lens's model holds: 1 where it does as it is. ValueError where MOST_ZOOM does not do it."""
    height, width = size
    # the border, where it fails first, and some points within
    u, v = np.meshgrid(np.linspace(0, width, 33), np.linspace(0, height, 33))
    across, down = np.arange(width + 1.0), np.arange(height + 1.0)
    border = [(across, 0 * across), (across, 0 * across + height), (0 * down, down), (0 * down + width, down)]
    points = np.concatenate([np.stack(p, axis=-1) for p in [(u.ravel(), v.ravel()), *border]])

    def within(zoom: float) -> bool:
        place, holds = real_pixels(lens, real_pixels_from_camera, zoomed(pixels_from_camera, zoom), points)
        return bool((holds & (place >= 0).all(-1) & (place <= real_size[::-1]).all(-1)).all())

    if within(1.0):
        return 1.0
    low, high = 1.0, MOST_ZOOM
    if not within(high):
        raise ValueError(
            f"the {lens.model} lens {[round(c, 6) for c in lens.coefficients]} leaves no pinhole picture: even one of "
            f"{MOST_ZOOM:g} times the focal length would reach beyond its picture or beyond where its model holds"
        )
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return high


def _equidistant(radius: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """Bent over straight radius of a fisheye lens: theta (1 + k1 theta^2 + ...) / tan theta."""
    theta = np.arctan(radius)
    bent = theta * _polynomial([1.0, *coefficients], theta * theta)
    return np.divide(bent, radius, out=np.ones_like(radius), where=radius > 0)


def _through(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 2) through an affine (3, 3) whose last row is 0 0 1."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def _polynomial(coefficients, at: np.ndarray) -> np.ndarray:
    """Lowest power first."""
    value = np.full_like(at, coefficients[-1], dtype=np.float64)
    for c in coefficients[-2::-1]:
        value = value * at + c
    return value


def _slope(coefficients) -> np.ndarray:
    """The derivative of a polynomial, lowest power first."""
    return np.arange(1, len(coefficients)) * np.asarray(coefficients[1:], np.float64)


def _first_root(coefficients, last: float) -> float:
    """The first positive root of a polynomial, lowest power first; infinity where there is none before `last`."""
    powers = np.asarray(coefficients, np.float64)
    powers = np.where(np.abs(powers) * last ** np.arange(len(powers)) < 1e-12, 0.0, powers)  # no weight before `last`
    roots = np.roots(powers[::-1])
    # a root that is double in truth is a pair with tiny imaginary parts in floating point
    real = roots.real[(np.abs(roots.imag) <= 1e-6 * np.abs(roots)) & (roots.real > 0)]
    return float(real.min()) if len(real) and real.min() < last else float("inf")
