"""Lenses: as OpenCV has them where their model holds, and no picture is claimed where it does not."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occflow_core.geometry import lenses
from occflow_core.geometry.lenses import Lens, least_zoom, real_pixels, zoomed

LENSES = [
    Lens("plumb_bob", (-0.32, 0.11, 0.001, -0.002)),
    Lens("plumb_bob", (-0.32, 0.11, 0.001, -0.002, -0.02)),
    Lens("rational_polynomial", (0.6, 0.2, 0.001, 0.0005, 0.02, 0.9, 0.3, 0.04)),
    Lens("rational_polynomial", (0.6, 0.2, 0.001, 0.0005, 0.02, 0.9, 0.3, 0.04, 0.004, 0.001, -0.003, 0.002)),
    Lens("rational_polynomial", (0.6, 0.2, 0.001, 0.0005, 0.02, 0.9, 0.3, 0.04, 0.004, 0.001, -0.003, 0.002, 0, 0)),
    Lens("equidistant", (0.02, -0.01, 0.003, -0.001)),
]
IDS = [f"{lens.model} {len(lens.coefficients)}" for lens in LENSES]
K = np.array([[800.0, 0.0, 810.0], [0.0, 790.0, 440.0], [0.0, 0.0, 1.0]])


def by_opencv(lens: Lens, rays: np.ndarray, k: np.ndarray = K) -> np.ndarray:
    """Pixels (P, 2) of rays (P, 2)."""
    points = np.concatenate([rays, np.ones((len(rays), 1))], axis=1)[None]
    project = cv2.fisheye.projectPoints if lens.model == "equidistant" else cv2.projectPoints
    return project(points, np.zeros(3), np.zeros(3), k, np.array(lens.coefficients))[0].reshape(-1, 2)


@pytest.mark.parametrize("lens", LENSES, ids=IDS)
def test_rays_fall_where_opencv_puts_them(lens):
    rays = np.random.default_rng(0).uniform(-1.2, 1.2, (500, 2))
    rays[0] = 0.0
    pinhole = zoomed(K, 0.7)
    pixels = rays @ pinhole[:2, :2].T + pinhole[:2, 2]
    mine, _ = real_pixels(lens, K, pinhole, pixels)
    assert np.abs(mine - by_opencv(lens, rays)).max() < 1e-9


@pytest.mark.parametrize(
    ("lens", "fold"),
    [
        (Lens("plumb_bob", (-0.3, 0, 0, 0)), (1 / 0.9) ** 0.5),  # r - 0.3 r^3 is steepest down from there on
        (Lens("plumb_bob", (0.3, 0.1, 0, 0)), lenses.WIDEST),
        (Lens("equidistant", (-0.5, 0, 0, 0)), np.tan((1 / 1.5) ** 0.5)),
        (Lens("equidistant", (0, 0, 0, 0)), lenses.WIDEST),
        (Lens("rational_polynomial", (0, 0, 0, 0, 0, 1.0, 0, 0)), 1.0),  # r / (1 + r^2)
        (Lens("rational_polynomial", (0, 0, 0, 0, 0, -0.25, 0, 0)), 2.0),  # a pole at 2
    ],
)
def test_the_radius_at_which_a_lens_turns_round_is_known(lens, fold):
    assert lens.fold == pytest.approx(fold)
    around = np.array([[0.999 * min(fold, 50.0), 0.0], [0.0, 1.001 * fold]])
    assert lens.holds(around).tolist() == [True, False]


COEFFICIENT = st.floats(-0.6, 0.6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(["plumb_bob", "rational_polynomial", "equidistant"]), st.lists(COEFFICIENT, min_size=8, max_size=8)
)
def test_where_a_lens_holds_its_picture_grows_with_the_angle(model, numbers):
    coefficients = (*numbers[:2], 0.0, 0.0, *numbers[4:])[: lenses.COUNTS[model][0]]
    lens = Lens(model, coefficients)
    radius = np.linspace(0, min(lens.fold, 5.0), 2000, endpoint=False)
    bent = lens.bent(np.stack([0 * radius, radius], axis=-1))
    assert (np.diff(bent[:, 1]) > 0).all() and not bent[:, 0].any()
    if lens.fold < 5.0:  # and just beyond, it does not
        beyond = lens.bent(np.array([[0.0, lens.fold * 1.001], [0.0, lens.fold * 1.002]]))[:, 1]
        assert beyond[1] < beyond[0] or beyond[0] < 0 or abs(beyond[1] - beyond[0]) < 1e-4


def test_tangential_terms_count_where_the_picture_folds():
    lens = Lens("rational_polynomial", (-0.1, 0.02, 0.15, -0.1, 0, 0, 0, 0, 0.05, 0.02, -0.04, 0.03))
    rays, step = np.random.default_rng(0).uniform(-1.5, 1.5, (2000, 2)), 1e-6
    sides = [(lens.bent(rays + d) - lens.bent(rays - d)) / (2 * step) for d in step * np.eye(2)]
    upright = np.linalg.det(np.stack(sides, axis=-1)) > 0
    near = np.linalg.norm(rays, axis=-1) < lens.fold
    assert np.array_equal(lens.holds(rays), upright & near) and 0.1 < upright[near].mean() < 0.9


def all_within(lens, k, size, pinhole, to_size) -> bool:
    v, u = np.meshgrid(np.arange(to_size[0] + 1.0), np.arange(to_size[1] + 1.0), indexing="ij")
    place, holds = real_pixels(lens, k, pinhole, np.stack([u, v], axis=-1))
    return bool((holds & (place >= 0).all(-1) & (place <= size[::-1]).all(-1)).all())


@pytest.mark.parametrize(
    ("lens", "wide", "zooms"),
    [
        (LENSES[0], 1.0, False),  # a barrel: the pinhole picture of the same K lies within
        (LENSES[0], 0.6, True),  # its optimal camera matrix would show black corners
        (Lens("plumb_bob", (0.2, 0.05, 0.001, 0.0)), 1.0, True),  # a cushion
        (Lens("plumb_bob", (-0.35, 0, 0, 0)), 0.9, True),  # folds within the picture
        (LENSES[3], 0.5, True),
        (LENSES[5], 0.3, True),
    ],
)
def test_a_picture_is_zoomed_in_as_little_as_makes_every_pixel_real(lens, wide, zooms):
    size, wanted = (900, 1600), zoomed(K, wide)
    wanted = np.diag([0.2, 0.2, 1.0]) @ wanted
    zoom = least_zoom(lens, K, size, wanted, (180, 320))
    assert (zoom > 1) == zooms
    assert all_within(lens, K, size, zoomed(wanted, zoom), (180, 320))
    assert not zooms or not all_within(lens, K, size, zoomed(wanted, zoom * 0.999), (180, 320))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(["plumb_bob", "rational_polynomial", "equidistant"]),
    st.lists(COEFFICIENT, min_size=8, max_size=8),
    st.floats(0.3, 1.5),
    st.floats(-0.4, 0.4),
)
def test_whatever_the_lens_every_pixel_is_within_its_picture_or_it_is_refused(model, numbers, wide, aside):
    tangential = [0.05 * n for n in numbers[2:4]]
    lens = Lens(model, (*numbers[:2], *tangential, *numbers[4:])[: lenses.COUNTS[model][0]])
    k = K + np.array([[0, 0, 800 * aside], [0, 0, 0], [0, 0, 0]])
    wanted = np.diag([0.1, 0.1, 1.0]) @ zoomed(k, wide)
    try:
        zoom = least_zoom(lens, k, (900, 1600), wanted, (90, 160))
    except ValueError as problem:
        assert "leaves no pinhole picture" in str(problem)
        return
    assert 1 <= zoom <= lenses.MOST_ZOOM and all_within(lens, k, (900, 1600), zoomed(wanted, zoom), (90, 160))


def test_a_lens_that_leaves_no_picture_is_refused():
    with pytest.raises(ValueError, match="leaves no pinhole picture: even one of 4 times the focal length"):
        least_zoom(Lens("plumb_bob", (-20.0, 0, 0, 0)), K, (900, 1600), K, (900, 1600))


@pytest.mark.parametrize(
    ("model", "coefficients", "words"),
    [
        ("", (0.1,) * 5, "distortion model '', expected one of plumb_bob, rational_polynomial, equidistant"),
        ("fov", (0.9,), "distortion model 'fov'"),
        ("plumb_bob", (0.1,) * 3, "plumb_bob with 3 coefficients of distortion, expected 4 or 5"),
        ("equidistant", (0.1,) * 5, "equidistant with 5 coefficients of distortion, expected 4"),
        ("rational_polynomial", (0.1,) * 5, "expected 8 or 12 or 14"),
        ("plumb_bob", (0.1, float("nan"), 0, 0, 0), "expected finite"),
        ("plumb_bob", (0.1, float("inf"), 0, 0, 0), "expected finite"),
        ("rational_polynomial", (0.1,) * 12 + (0.02, 0.0), r"tilted sensor \(tau_x, tau_y\) \(0.02, 0.0\), expected 0"),
    ],
)
def test_what_is_no_lens_is_refused_by_name(model, coefficients, words):
    with pytest.raises(ValueError, match=words):
        Lens(model, coefficients)
