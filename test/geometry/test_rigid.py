"""Rigid motions: there and back is the identity, and what is no motion is refused."""

import math

import numpy as np
import pytest
import torch

from occflow_core.geometry import rigid


def motions(count=50, seed=0, far=2000.0) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [rigid.from_quaternion(rng.normal(size=4), rng.uniform(-far, far, 3)) for _ in range(count)]


def test_there_and_back_is_the_identity():
    for a_from_b in motions():
        assert torch.allclose(rigid.inverse(a_from_b) @ a_from_b, torch.eye(4, dtype=torch.float64), atol=1e-9)
    stack = torch.stack(motions()).reshape(5, 10, 4, 4)
    points = torch.randn(5, 10, 7, 3, dtype=torch.float64)
    assert torch.allclose(rigid.apply(rigid.inverse(stack), rigid.apply(stack, points)), points, atol=1e-9)


def test_the_inverse_is_the_matrix_inverse():
    stack = torch.stack(motions(far=50.0))
    assert torch.allclose(rigid.inverse(stack), torch.linalg.inv(stack), atol=1e-9)


def test_quaternion_there_and_back_is_the_identity_and_w_is_not_negative():
    for a_from_b in motions():
        wxyz, shift = rigid.to_quaternion(a_from_b)
        assert wxyz[0] >= 0 and math.hypot(*wxyz) == pytest.approx(1.0)
        assert torch.allclose(rigid.from_quaternion(wxyz, shift), a_from_b, atol=1e-9)


def test_the_length_and_the_sign_of_a_quaternion_mean_nothing():
    q = [0.2, -0.4, 0.1, 0.9]
    for scale in (7.0, 1e-3, -1.0):
        assert torch.allclose(
            rigid.from_quaternion(q, [1, 2, 3]), rigid.from_quaternion([scale * v for v in q], [1, 2, 3])
        )


def test_quarter_turns_are_counter_clockwise_seen_from_above():
    left = rigid.from_quaternion([math.sqrt(0.5), 0, 0, math.sqrt(0.5)], [0, 0, 0])
    assert torch.allclose(
        rigid.apply(left, torch.tensor([[1.0, 0, 0]], dtype=torch.float64))[0, :2], torch.tensor([0.0, 1.0]).double()
    )


def test_apply_is_the_homogeneous_product():
    a_from_b, points = torch.stack(motions(6)), torch.randn(6, 9, 3, dtype=torch.float64)
    homogeneous = torch.cat([points, torch.ones(6, 9, 1)], -1)
    assert torch.allclose(rigid.apply(a_from_b, points), (a_from_b[:, None] @ homogeneous[..., None])[..., :3, 0])


def test_interpolation_begins_and_ends_at_its_ends_and_halves_the_turn():
    first, last = motions(2, seed=3)
    assert torch.allclose(rigid.interpolate(first, last, 0.0), first, atol=1e-9)
    assert torch.allclose(rigid.interpolate(first, last, 1.0), last, atol=1e-9)
    half = rigid.interpolate(first, last, 0.5)
    assert torch.allclose(half[:3, 3], (first[:3, 3] + last[:3, 3]) / 2)
    once, rest = (rigid.inverse(a) @ b for a, b in ((first, half), (half, last)))
    assert torch.allclose(once[:3, :3], rest[:3, :3], atol=1e-9), "both halves turn alike"


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-6, 0.05, 1.0, 3.1])
def test_a_third_of_a_turn_takes_a_third_of_its_angle_however_small(angle):
    def turn(by):
        return rigid.from_quaternion((math.cos(by / 2), 0, 0, -math.sin(by / 2)), (0, 0, 0))

    start = motions(1, seed=5)[0]
    third = rigid.interpolate(start, start @ turn(angle), 1 / 3)
    assert torch.allclose((rigid.inverse(start) @ third)[:3, :3], turn(angle / 3)[:3, :3], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("wxyz", "shift"),
    [
        ([0, 0, 0, 0], [0, 0, 0]),
        ([1, 0, 0, math.nan], [0, 0, 0]),
        ([1, 0, 0, 0], [0, math.inf, 0]),
        ([1, 0, 0], [0, 0, 0]),
    ],
)
def test_a_pose_that_is_none_is_refused(wxyz, shift):
    with pytest.raises(ValueError, match="a pose needs a finite, non-zero quaternion"):
        rigid.from_quaternion(wxyz, shift)


def test_only_rigid_motions_pass_for_rigid():
    for a_from_b in motions(10):
        assert rigid.is_rigid(a_from_b) and rigid.is_rigid(a_from_b.float())
    mirror, scaled, nan, row = (torch.eye(4, dtype=torch.float64) for _ in range(4))
    mirror[0, 0], scaled[0, 0], nan[1, 3], row[3, 0] = -1.0, 1.01, math.nan, 0.1
    for wrong in (mirror, scaled, nan, row, torch.eye(3)):
        assert not rigid.is_rigid(wrong)
    assert not rigid.is_rigid(torch.stack([torch.eye(4), mirror.float()])), "one wrong one in a stack"


def test_the_closest_rotation_of_a_rotation_is_itself():
    for a_from_b in motions(10):
        rotation, off = rigid.closest_rotation(a_from_b[:3, :3])
        assert off < 1e-9 and torch.allclose(rotation, a_from_b[:3, :3], atol=1e-9)
        bent, off = rigid.closest_rotation(a_from_b[:3, :3] * 1.02)
        assert torch.allclose(bent, a_from_b[:3, :3], atol=1e-9) and off > 1e-3


@pytest.mark.parametrize("angle", [0.0, 1e-8, 1e-3, 0.5, 3.0, math.pi])
def test_two_motions_differ_by_the_way_and_the_angle_between_them(angle):
    axis = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    turn = rigid.from_quaternion([math.cos(angle / 2), *(math.sin(angle / 2) * axis).tolist()], [0.3, 0.0, -0.4])
    for first in motions(5):
        shifted, turned = rigid.difference(first, first @ turn)
        assert shifted == pytest.approx(0.5, abs=1e-9) and turned == pytest.approx(angle, abs=1e-7)
