"""The generated drive: true to its cameras, stamps and poses, and the same for the same seed."""

import pytest
import torch

from occflow_core.data import pattern
from occflow_core.geometry import rigid


@pytest.fixture(scope="module")
def frames():
    return list(pattern.drive(5, height=180, width=320))


def test_the_same_seed_gives_the_same_drive_and_another_seed_another():
    first, again, other = (next(pattern.drive(1, seed=s, height=90, width=160)) for s in (1, 1, 2))
    assert torch.equal(first.images, again.images) and torch.equal(first.stamps, again.stamps)
    assert not torch.equal(first.images, other.images)


def test_sets_are_twelve_a_second_staggered_as_real_cameras_are(frames):
    for before, after in zip(frames, frames[1:]):
        assert (after.stamp - before.stamp) / 1e9 == pytest.approx(1 / 12, abs=1e-3)
        assert int(after.stamps.min()) > before.stamp, "sets do not overlap"
    for frame in frames:
        assert frame.stamp == int(frame.stamps.max()) and frame.used.all()
        assert 0.040 < (frame.stamp - int(frame.stamps.min())) / 1e9 < 0.046


def test_each_camera_stands_where_the_car_was_at_its_stamp(frames):
    """The mounting taken off, every camera gives the same smooth path of the car."""
    mount = rigid.inverse(pattern.rig(180, 320).car_from_camera)
    path = {}
    for frame in frames:
        for stamp, pose in zip(frame.stamps.tolist(), frame.world_from_car @ frame.cameras.car_from_camera @ mount):
            path[stamp] = pose
        assert torch.allclose(path[frame.stamp], frame.world_from_car, atol=1e-9)
    stamps = sorted(path)
    for a, b in zip(stamps, stamps[1:]):
        seconds = (b - a) / 1e9
        if seconds > 1e-3:
            moved = rigid.inverse(path[a]) @ path[b]
            assert moved[0, 3] / seconds == pytest.approx(pattern.SPEED, rel=1e-3), "ahead"
            assert moved[1, 3] > 0, "a curve to the left"


def test_what_stands_still_in_the_world_stays_on_its_pixels(frames):
    """The ground near the car, looked up at the projections of fixed points, keeps its colours from set to set."""
    rng = torch.Generator().manual_seed(0)
    agree, compared = 0, 0
    for i in (0, 3):
        a, b = frames[0], frames[4]
        points = torch.rand(3000, 3, generator=rng, dtype=torch.float64) - 0.5
        points *= torch.tensor([16.0, 8.0, 0.0])  # around the car, on the ground
        world = rigid.apply(a.world_from_car, points)
        colours = []
        for frame in (a, b):
            there = rigid.apply(rigid.inverse(frame.world_from_car), world)
            pixels, _ = frame.cameras[i].project(there)
            seen = frame.cameras[i].sees(there)
            u, v = pixels.nan_to_num(0).clamp(0, 10_000).long().unbind(1)
            colours.append((seen, frame.images[i][:, v.clamp(max=179), u.clamp(max=319)].float()))
        both = colours[0][0] & colours[1][0]
        difference = (colours[0][1] - colours[1][1]).abs().mean(0)[both]
        agree, compared = agree + int((difference < 25).sum()), compared + int(both.sum())
    assert compared > 100 and agree / compared > 0.9


def test_any_size_shows_the_same_scene():
    small, large = (next(pattern.drive(1, height=h, width=w)) for h, w in ((90, 160), (360, 640)))
    shrunk = torch.nn.functional.interpolate(large.images.float(), (90, 160), mode="area")
    assert (shrunk - small.images.float()).abs().mean() < 8
