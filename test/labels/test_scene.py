"""Tracks between and around their annotations; what is refused."""

import numpy as np
import pytest
import torch
from labels.tiny import FAR_AWAY, Thing, World, stamp

from occflow_core.labels import Keyframe, Sweep, Track
from occflow_core.types import OCC3D

BRAKES = Thing("car", (4.5, 1.8, 1.5), (3.0, 4.0, 0.9), yaw=0.4, speed=10.0, gains=-2.0, turns=0.3)


def track(thing: Thing, seconds: float = 3.0) -> Track:
    return World((thing,)).tracks(seconds)[0]


def with_poses(track: Track, poses) -> Track:
    return Track(track.instance, track.name, track.size, track.stamps, poses)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.25, 0.4, 1.3, 2.75, 3.0])
def test_between_annotations_a_box_that_brakes_and_turns_is_where_it_is(t):
    pose, true = track(BRAKES).at(stamp(t)), BRAKES.pose(t)
    assert np.linalg.norm(pose[:3, 3] - FAR_AWAY - true[:3, 3]) < 0.015
    assert np.abs(pose[:3, :3] - true[:3, :3]).max() < 2e-3
    straight = (1 - (t % 0.5) / 0.5) * BRAKES.pose(t - t % 0.5) + (t % 0.5) / 0.5 * BRAKES.pose(t - t % 0.5 + 0.5)
    if t == 0.25:  # a straight line would not do
        assert np.linalg.norm(straight[:3, 3] - true[:3, 3]) > 0.05


@pytest.mark.parametrize("t", [0.0, 0.5, 1.5, 3.0, 1.2])
def test_motion_is_that_of_the_object_also_at_the_ends_of_its_track(t):
    velocity, spin = track(BRAKES).motion(stamp(t))
    true = BRAKES.velocity(BRAKES.pose(t)[None, :3, 3], t)[0]
    assert np.linalg.norm(velocity[:2] - true) < (0.15 if t in (0.0, 3.0) else 0.07)
    assert np.allclose(spin, [0, 0, 0.3], atol=0.01)


def test_a_track_is_carried_on_a_little_and_no_further():
    it = track(BRAKES)
    assert it.at(stamp(3.0) + 10**8) is None and it.at(stamp(0) - 10**8) is None
    carried = it.at(stamp(3.0) + 10**8, beyond=0.5)
    assert np.linalg.norm(carried[:3, 3] - FAR_AWAY - BRAKES.pose(3.1)[:3, 3]) < 0.05
    assert np.isnan(it.motion(stamp(3.0) + 10**8)[0]).all()


def test_an_object_annotated_once_has_a_place_then_and_no_motion():
    whole = track(BRAKES)
    once = Track("once", "car", whole.size, whole.stamps[:1], whole.world_from_box[:1])
    assert np.allclose(once.at(stamp(0)), whole.world_from_box[0])
    assert once.at(stamp(0.25), beyond=0.5) is None
    assert all(np.isnan(v).all() for v in once.motion(stamp(0)))


def test_nothing_is_known_in_a_gap_of_poses():
    poses = track(BRAKES, 5.0).world_from_box.clone()
    poses[3:7] = torch.nan  # 1.5 to 3.0 s: 2.5 s between what is left
    it = with_poses(track(BRAKES, 5.0), poses)
    for t in (1.5, 2.0, 3.0):
        assert it.at(stamp(t)) is None and np.isnan(it.motion(stamp(t))[0]).all()
    assert it.at(stamp(1.0)) is not None and np.isfinite(it.motion(stamp(1.0))[0]).all()
    nowhere = with_poses(track(BRAKES, 5.0), torch.full_like(poses, torch.nan))
    assert nowhere.at(stamp(1.0)) is None and np.isnan(nowhere.motion(stamp(1.0))[0]).all()


def test_one_missing_annotation_is_bridged():
    poses = track(BRAKES).world_from_box.clone()
    poses[2] = torch.nan
    pose = with_poses(track(BRAKES), poses).at(stamp(1.0))
    assert np.linalg.norm(pose[:3, 3] - FAR_AWAY - BRAKES.pose(1.0)[:3, 3]) < 0.05


EYE = torch.eye(4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sweep(torch.zeros(5, 2), EYE, EYE, 7), "points must be"),
        (lambda: Sweep(torch.zeros(5, 5), EYE * torch.nan, EYE, 7), "at 7 ns: its pose"),
        (lambda: Sweep(torch.zeros(5, 5), EYE, EYE, 7, torch.zeros(4, dtype=torch.uint8)), "expected 5 labels"),
        (lambda: Sweep(torch.zeros(5, 5), EYE, EYE, 7, torch.zeros(5)), "expected 5 labels uint8"),
        (
            lambda: Sweep(torch.zeros(1, 5), EYE, EYE, 7, torch.tensor([OCC3D.free], dtype=torch.uint8)),
            "label 17 is no id",
        ),
        (lambda: Track("t", "horse", (1, 1, 1), (1,), EYE[None]), "'horse' is no class"),
        (lambda: Track("t", "car", (1, 0, 1), (1,), EYE[None]), "three edges"),
        (lambda: Track("t", "car", (1, 1, 1), (1, 2), EYE[None]), "2 stamps with poses"),
        (lambda: Track("t", "car", (1, 1, 1), (2, 1), EYE.expand(2, 4, 4)), "must rise"),
        (lambda: Track("t", "car", (1, 1, 1), (1,), 2 * EYE[None]), "no rigid motion"),
        (lambda: Track("t", "car", (1, 1, 1), (), EYE.expand(0, 4, 4)), "0 stamps"),
        (lambda: Keyframe("k", 1, EYE * torch.nan), "keyframe k: its pose"),
    ],
)
def test_a_mistake_is_named_in_one_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def sometimes(thing: Thing, times) -> Track:
    poses = torch.from_numpy(np.stack([thing.pose(t) for t in times]))
    return Track("t", thing.name, thing.size, tuple(stamp(t) for t in times), poses)


def test_what_stands_is_there_while_nobody_sees_it():
    parked = Thing("car", (4.5, 1.8, 1.5), (3.0, 4.0, 0.9))
    it = sometimes(parked, [0.0, 0.5, 9.0, 9.5])
    for t in (-4.0, 4.5, 13.0):
        assert np.allclose(it.at(stamp(t)), parked.pose(0)) and np.array_equal(it.motion(stamp(t)), np.zeros((2, 3)))
    assert it.at(stamp(-6.0)) is None and it.at(stamp(15.0)) is None


def test_what_drove_on_while_nobody_saw_it_is_nowhere():
    leaves = Thing("car", (4.5, 1.8, 1.5), (3.0, 4.0, 0.9), gains=2.0)
    assert sometimes(leaves, [0.0, 6.0]).at(stamp(3.0)) is None
    drives = sometimes(Thing("car", (4.5, 1.8, 1.5), (3.0, 4.0, 0.9), speed=1.0), [0.0, 0.5])
    assert drives.at(stamp(1.0)) is None and np.isnan(drives.motion(stamp(1.0))[0]).all()
