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
    from scipy.spatial.transform import Rotation

    matrix = a_from_b.detach().to("cpu", torch.float64)
    x, y, z, w = Rotation.from_matrix(matrix[:3, :3].numpy()).as_quat().tolist()
    return ([w, x, y, z] if w >= 0 else [-w, -x, -y, -z]), matrix[:3, 3].tolist()


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
    from scipy.spatial.transform import Rotation, Slerp

    ends = torch.stack([first, last]).detach().to("cpu", torch.float64)
    turns = Rotation.from_matrix(ends[:, :3, :3].numpy())
    between = torch.eye(4, dtype=torch.float64)
    between[:3, :3] = torch.from_numpy(Slerp([0.0, 1.0], turns)(fraction).as_matrix())
    between[:3, 3] = torch.lerp(*ends[:, :3, 3], fraction)
    return between


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
