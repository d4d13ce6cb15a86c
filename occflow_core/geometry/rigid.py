"""4x4 rigid motions, named `a_from_b`: they take the coordinates of a point in b to its coordinates in a.

Quaternions enter and leave here only. Poses are float64 until they become relative: map coordinates are too large
for float32 (at 2 km one float32 step is 0.1 mm, and a product of three such poses is off by centimetres).
"""

import math

import torch
from torch import Tensor


def from_quaternion(wxyz, translation) -> Tensor:
    """The (4, 4) float64 motion of a quaternion (w, x, y, z) and a translation (3,) in metres.

    The quaternion need not be of unit length. ValueError when it is zero or anything is not finite.
    """
    q, t = [float(v) for v in wxyz], [float(v) for v in translation]
    square = sum(v * v for v in q)
    if len(q) != 4 or len(t) != 3 or not all(map(math.isfinite, (square, *t))) or square < 1e-18:
        raise ValueError(
            f"a pose needs a finite, non-zero quaternion (w x y z) and a finite translation, got {q} and {t}"
        )
    (w, x, y, z), (tx, ty, tz) = q, t
    s = 2.0 / square  # written out: /tf brings thousands a second, and pyquaternion takes ten times as long
    return torch.tensor(
        [
            [1 - s * (y * y + z * z), s * (x * y - w * z), s * (x * z + w * y), tx],
            [s * (x * y + w * z), 1 - s * (x * x + z * z), s * (y * z - w * x), ty],
            [s * (x * z - w * y), s * (y * z + w * x), 1 - s * (x * x + y * y), tz],
            [0.0, 0.0, 0.0, 1.0],
        ],
        dtype=torch.float64,
    )


def to_quaternion(a_from_b: Tensor) -> tuple[list[float], list[float]]:
    """Quaternion (w, x, y, z), w >= 0, and translation (x, y, z) of one (4, 4) motion."""
    matrix = a_from_b.detach().to("cpu", torch.float64)
    rows = matrix[:3, :3].tolist()
    if not _orthonormal(rows):  # float32, or a calibration written with a few digits
        rows = closest_rotation(matrix[:3, :3])[0].tolist()
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rows
    # four times the products of the largest part of (w, x, y, z) with all four: no small number is divided by
    trace = xx + yy + zz
    products = (
        (1 + trace, zy - yz, xz - zx, yx - xy),
        (zy - yz, 1 + 2 * xx - trace, xy + yx, xz + zx),
        (xz - zx, xy + yx, 1 + 2 * yy - trace, yz + zy),
        (yx - xy, xz + zx, yz + zy, 1 + 2 * zz - trace),
    )
    line = products[max(range(4), key=lambda i: products[i][i])]
    length = math.copysign(math.hypot(*line), line[0])
    return [v / length for v in line], matrix[:3, 3].tolist()


def _orthonormal(rows: list[list[float]]) -> bool:
    """Is a 3x3 a proper rotation to the last digits of float64?"""
    (a, b, c), (d, e, f), (g, h, i) = rows
    # of a proper rotation the third row is the cross product of the other two
    off = (a * a + b * b + c * c - 1, d * d + e * e + f * f - 1, a * d + b * e + c * f)
    off += (b * f - c * e - g, c * d - a * f - h, a * e - b * d - i)
    return all(abs(v) < 1e-12 for v in off)


def closest_rotation(matrix: Tensor) -> tuple[Tensor, float]:
    """The rotation nearest to a (3, 3) matrix, and the largest entry by which they differ."""
    u, _, v = torch.linalg.svd(matrix)
    sign = torch.diag(torch.tensor([1.0, 1.0, torch.sign(torch.linalg.det(u @ v)).item()], dtype=matrix.dtype))
    rotation = u @ sign @ v
    return rotation, float((rotation - matrix).abs().max())


def inverse(a_from_b: Tensor) -> Tensor:
    """b_from_a of rigid motions (..., 4, 4), exactly: the rotation is transposed, not inverted."""
    rotation, shift = a_from_b[..., :3, :3], a_from_b[..., :3, 3:]
    upper = torch.cat([rotation.mT, -rotation.mT @ shift], dim=-1)
    return torch.cat([upper, a_from_b[..., 3:, :]], dim=-2)


def apply(a_from_b: Tensor, points: Tensor) -> Tensor:
    """Points (..., P, 3) in b, given in a, for motions (..., 4, 4) whose leading axes broadcast with the points'."""
    return points @ a_from_b[..., :3, :3].mT + a_from_b[..., None, :3, 3]


def interpolate(first: Tensor, last: Tensor, fraction: float) -> Tensor:
    """The (4, 4) float64 motion between two: translation linear, rotation by slerp the short way (as TF does)."""
    q0, p0 = to_quaternion(first)
    q1, p1 = to_quaternion(last)
    if sum(a * b for a, b in zip(q0, q1, strict=True)) < 0:
        q1 = [-v for v in q1]
    angle = 2 * math.atan2(math.dist(q0, q1), math.hypot(*(a + b for a, b in zip(q0, q1, strict=True))))
    # slerp is exact at any angle; pyquaternion's is linear below 3.6 degrees and off by a millionth of a radian there
    w0, w1 = 1 - fraction, fraction
    if (sine := math.sin(angle)) > 0:
        w0, w1 = math.sin(w0 * angle) / sine, math.sin(w1 * angle) / sine
    between = [a * w0 + b * w1 for a, b in zip(q0, q1, strict=True)]
    return from_quaternion(between, [a + (b - a) * fraction for a, b in zip(p0, p1, strict=True)])


def difference(first: Tensor, last: Tensor) -> tuple[float, float]:
    """How far two (4, 4) motions are apart: metres between their origins, rad between their directions."""
    first_from_last = inverse(first) @ last
    # by the sine of half the angle: the arc cosine of a trace loses small angles
    skew = (first_from_last[:3, :3] - torch.eye(3, dtype=last.dtype, device=last.device)).norm() / 8**0.5
    return float(first_from_last[:3, 3].norm()), float(2 * skew.clamp_max(1).arcsin())


def is_rigid(a_from_b: Tensor, tolerance: float = 1e-3) -> bool:
    """Finite, last row 0 0 0 1, and a proper rotation within the tolerance."""
    matrix = a_from_b.to(torch.float64)
    if matrix.shape[-2:] != (4, 4) or not torch.isfinite(matrix).all():
        return False
    rotation = matrix[..., :3, :3]
    eye = torch.eye(3, dtype=torch.float64, device=matrix.device)
    last_row = matrix.new_tensor([0.0, 0.0, 0.0, 1.0])
    return bool(
        ((rotation @ rotation.mT - eye).abs() < tolerance).all()
        and (torch.linalg.det(rotation) > 0).all()
        and ((matrix[..., 3, :] - last_row).abs() < 1e-9).all()
    )
