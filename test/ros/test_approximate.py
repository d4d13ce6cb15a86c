"""Sets by the rule of ApproximateTimeSynchronizer: what it gives, what it costs, and what is laid around it.

The same holds for message_filters' class where the distribution brings it.
"""

from importlib.util import find_spec

import pytest

from occflow_ros import approximate
from occflow_ros.approximate import Approximate, DistributionMatcher, Matcher
from occflow_ros.assemble import Collector

MS = 1_000_000
SWEEP = 83 * MS
START = 1_000_000 * MS


@pytest.fixture(autouse=True, params=[Matcher, DistributionMatcher] if find_spec("message_filters") else [Matcher])
def by(request, monkeypatch):
    monkeypatch.setattr(approximate, "matcher", lambda: request.param)


def feed(gatherer, images):
    """images: (camera, stamp), in order of arrival; the picture is the same."""
    return [s for camera, stamp in images for s in gatherer.add(camera, stamp, (camera, stamp), 0.0)]


def rig(sweeps, cameras=6, stagger=0, lose=lambda k, c: False):
    return [(c, START + k * SWEEP + c * stagger) for k in range(sweeps) for c in range(cameras) if not lose(k, c)]


def used(sets):
    return sum(len(s.pictures) for s in sets)


def test_a_healthy_rig_gives_each_sweep_at_once_and_nothing_waits():
    gatherer = Approximate(6, slop=0.04)
    sets = feed(gatherer, rig(30, stagger=7 * MS))
    assert [s.stamp for s in sets] == [START + k * SWEEP + 35 * MS for k in range(30)]
    assert all(s.complete and s.pictures == tuple(enumerate(s.stamps)) for s in sets)
    assert not gatherer.dropped and not gatherer.waiting and gatherer.poll(1e9) == []


def test_a_dead_camera_is_silence_where_the_collector_goes_on():
    images = rig(30, lose=lambda k, c: c == 4 and k >= 10)
    gatherer = Approximate(6, queue=5)
    assert len(feed(gatherer, images)) == 10
    assert gatherer.dropped == {(c, "queue full"): 15 for c in range(6) if c != 4}
    collector = Collector(6, 1 / 12)
    assert len(feed(collector, images) + collector.poll(float("inf"))) == 30


def test_a_set_that_is_exactly_as_wide_as_the_slop_is_none():
    assert feed(Approximate(2, slop=0.02), [(0, START), (1, START + 20 * MS)]) == []
    assert len(feed(Approximate(2, slop=0.02), [(0, START), (1, START + 20 * MS - 1)])) == 1


def test_a_slop_of_a_period_mixes_sweeps_after_one_image_was_lost_and_one_of_half_a_period_does_not():
    images = rig(100, stagger=7 * MS, lose=lambda k, c: (k, c) == (10, 2))

    def mixed(sets):
        return [len({(t - c * 7 * MS - START) // SWEEP for c, t in enumerate(s.stamps)}) > 1 for s in sets]

    wide, narrow = (feed(Approximate(6, slop=slop), images) for slop in (0.1, 0.041))
    assert len(wide) == 99 and sum(mixed(wide)) == 89
    assert len(narrow) == 99 and not any(mixed(narrow))


def test_the_nearest_images_are_taken_first_and_each_once():
    gatherer = Approximate(2, slop=0.05)
    (images,) = feed(gatherer, [(0, START), (0, START + 30 * MS), (1, START + 20 * MS)])
    assert images.stamps == (START + 30 * MS, START + 20 * MS)
    (images,) = feed(gatherer, [(1, START + 40 * MS)])  # with the one that is left
    assert images.stamps == (START, START + 40 * MS)


def test_offsets_bring_cameras_that_trigger_in_turn_together():
    images = rig(5, stagger=30 * MS)
    assert feed(Approximate(6, slop=0.02), images) == []
    sets = feed(Approximate(6, slop=0.02, offsets=[c * 0.03 for c in range(6)]), images)
    assert [s.stamps for s in sets] == [
        tuple(START + k * SWEEP + c * 30 * MS for c in range(6)) for k in range(5)
    ]  # the cameras' own stamps, not those they are compared by


def test_a_clock_that_is_turned_back_begins_a_lap_and_the_old_one_does_not_drain_the_new():
    gatherer = Approximate(2, queue=5)
    late = START + 100 * SWEEP
    images = [(0, late + k * SWEEP) for k in range(5)]  # camera 1 is silent at the end of the lap
    assert feed(gatherer, [(1, late - SWEEP), *images]) == []
    sets = feed(gatherer, rig(20, 2))
    assert len(sets) == 20 and {s.lap for s in sets} == {1}
    assert gatherer.dropped[0, "clock jump"] == 5 and gatherer.dropped[0, "queue full"] == 0


def test_a_small_step_back_is_no_lap_and_sets_go_forward():
    gatherer = Approximate(2, slop=0.02)
    assert len(feed(gatherer, [(0, START + SWEEP), (1, START + SWEEP)])) == 1
    assert feed(gatherer, [(0, START), (1, START)]) == []  # late, both of them
    assert gatherer.lap == 0
    assert gatherer.dropped == {
        (None, "not newer than the last"): 1,
        (0, "set was not newer than the last"): 1,
        (1, "set was not newer than the last"): 1,
    }


@pytest.mark.parametrize(("stamps", "reason"), [([0], "no stamp"), ([START, START], "same stamp again")])
def test_impossible_and_repeated_stamps_are_dropped_and_counted(stamps, reason):
    gatherer = Approximate(2)
    assert feed(gatherer, [(0, stamp) for stamp in stamps]) == []
    assert gatherer.dropped == {(0, reason): 1}


def test_a_stamp_that_comes_again_later_is_no_new_image():
    gatherer = Approximate(2)
    feed(gatherer, [(0, START), (0, START + SWEEP), (0, START)])
    assert gatherer.dropped == {(0, "same stamp again"): 1}


def test_who_clears_it_says_why():
    gatherer = Approximate(2)
    feed(gatherer, [(0, START), (0, START + SWEEP)])
    gatherer.clear("memory reset")
    assert gatherer.dropped == {(0, "memory reset"): 2} and gatherer.lap == 1
    assert feed(gatherer, [(1, START)]) == []


@pytest.mark.parametrize(
    ("settings", "words"), [({"queue": 0}, "queue"), ({"slop": 0.0}, "slop"), ({"offsets": [0.0]}, "offset")]
)
def test_what_cannot_work_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Approximate(2, **settings)
