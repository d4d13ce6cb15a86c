"""The collector's laws: no set mixes two sweeps, every image is used or counted, stamps of sets go forward."""

import itertools
import random
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from occflow_core.geometry import rigid
from occflow_ros.assemble import BLOCK, Calibration, Cloud, Collector, ImageSet, Mailbox, Scans, Shot, Watch, frame_of

MS = 1_000_000
PERIOD = 1 / 12
SWEEP = 83 * MS
START = 1_000_000 * MS


def sweep(k: int, camera: int, stagger=0) -> int:
    return START + k * SWEEP + camera * stagger


def feed(collector, events):
    """events: (now s, camera, stamp) in order of arrival; the picture is (camera, stamp)."""
    sets = []
    for now, camera, stamp in events:
        sets += collector.poll(now)
        sets += collector.add(camera, stamp, (camera, stamp), now)
    return sets + collector.poll(float("inf"))


def steady_rig(sweeps, cameras=6, lose=lambda k, c: False, stagger=0, delay=lambda k, c: 0.01):
    events = [
        (k * SWEEP / 1e9 + c * stagger / 1e9 + delay(k, c), c, sweep(k, c, stagger))
        for k in range(sweeps)
        for c in range(cameras)
        if not lose(k, c)
    ]
    return sorted(events)


def test_a_healthy_rig_gives_a_complete_set_for_every_sweep():
    sets = feed(Collector(6, PERIOD), steady_rig(50))
    assert len(sets) == 50 and all(s.complete for s in sets)
    assert [s.stamp for s in sets] == [sweep(k, 0) for k in range(50)]


def test_the_reference_stamp_is_that_of_the_newest_used_image():
    offsets = [0.0, 0.008, 0.016]
    collector = Collector(3, PERIOD, offsets)
    (images,) = feed(collector, [(0.0, 0, START), (0.01, 2, START + 16 * MS), (0.02, 1, START + 8 * MS)])
    assert images.stamp == START + 16 * MS
    assert images.without(2).stamp == START + 8 * MS and not images.without(2).complete


def test_a_set_leaves_at_once_when_it_is_complete():
    collector = Collector(2, PERIOD)
    assert collector.add(0, START, "a", 0.0) == []
    (images,) = collector.add(1, START + MS, "b", 0.001)
    assert images.pictures == ("a", "b")


def test_a_dead_camera_makes_sets_partial_at_the_deadline_and_says_which():
    sets = feed(Collector(6, PERIOD), steady_rig(30, lose=lambda k, c: c == 4 and k >= 10))
    assert len(sets) == 30
    assert [s.complete for s in sets] == [True] * 10 + [False] * 20
    assert all([p is None for p in s.pictures] == [False, False, False, False, True, False] for s in sets[10:])


def test_the_deadline_runs_on_the_callers_clock():
    collector = Collector(2, PERIOD, deadline=0.12)
    collector.add(0, START, "a", 5.0)
    assert collector.poll(5.119) == []
    (images,) = collector.poll(5.121)
    assert images.pictures == ("a", None)


@pytest.mark.parametrize("seed", range(5))
def test_lost_late_and_reordered_images_never_mix_two_sweeps_and_are_used_or_counted(seed):
    rng = random.Random(seed)
    stagger = 7 * MS  # as in nuScenes: six cameras trigger within 43 ms
    collector = Collector(6, PERIOD, [c * 0.007 for c in range(6)])
    events = steady_rig(200, 6, lambda k, c: rng.random() < 0.05, stagger, lambda k, c: rng.uniform(0, 0.06))
    sets = feed(collector, events)
    for images in sets:
        sweeps = {round((s - c * stagger - START) / SWEEP) for c, s in enumerate(images.stamps) if s is not None}
        assert len(sweeps) == 1
        assert all(p is None or p == (c, images.stamps[c]) for c, p in enumerate(images.pictures))
    used = sum(p is not None for images in sets for p in images.pictures)
    assert used + sum(collector.dropped.values()) == len(events)
    assert len(sets) == 200
    stamps = [s.stamp for s in sets]
    assert stamps == sorted(stamps)


# one image: how many sweeps after the one before, camera, ms beside its sweep, s of silence before it comes
ARRIVALS = st.tuples(
    st.sampled_from([0, 0, 0, 0, 0, 1, 1, 1, 2, -1, -4, -15, 30]),
    st.integers(0, 3),
    st.one_of(st.just(0), st.integers(-50, 50)),
    st.sampled_from([0.0, 0.0, 0.01, 0.05, 0.13]),
)


@settings(max_examples=250, deadline=None)
@given(
    cameras=st.integers(1, 4),
    offsets=st.lists(st.sampled_from([0.0, 0.02, 0.043]), min_size=4, max_size=4),
    least=st.integers(1, 4),
    arrivals=st.lists(ARRIVALS | st.just("clear"), max_size=50),
)
@example(2, [0.043, 0.0, 0.0, 0.0], 1, [(0, 0, 0, 0.0), (0, 1, 34, 0.0)])  # the younger set has the older stamp
@example(2, [0.043, 0.0, 0.0, 0.0], 1, [(0, 0, 0, 0.0), (0, 1, 43, 0.0)])  # two sets have the same stamp
def test_whatever_comes_no_set_mixes_sweeps_stamps_go_forward_and_each_image_is_used_or_counted_once(
    cameras, offsets, least, arrivals
):
    """Any interleaving, loss, repetition, reordering and jump."""
    collector = Collector(cameras, PERIOD, offsets[:cameras], min_cameras=min(least, cameras))
    sets, sent, k, now = [], [0] * cameras, 100, 0.0

    def check():
        for camera in range(cameras):
            used = [images.pictures[camera] for images in sets if images.pictures[camera] is not None]
            waiting = sum(camera in s.pictures for s in collector._open)
            dropped = sum(n for (c, _), n in collector.dropped.items() if c == camera)
            assert len(set(used)) == len(used)
            assert len(used) + waiting + dropped == sent[camera]

    for arrival in arrivals:
        if arrival == "clear":
            collector.clear()
        else:
            sweeps, camera, beside, silence = arrival
            k, camera, now = k + sweeps, camera % cameras, now + silence
            stamp = sweep(k, 0) + beside * MS + collector.offsets[camera]
            sets += collector.poll(now)
            sent[camera] += 1
            sets += collector.add(camera, stamp, (camera, stamp, sum(sent)), now)
        check()
    sets += collector.poll(float("inf"))
    check()
    assert not collector.waiting
    for images in sets:
        here = [c for c in range(cameras) if images.pictures[c] is not None]
        assert len(here) >= collector.min_cameras
        assert all(images.pictures[c][:2] == (c, images.stamps[c]) for c in here)
        references = [images.stamps[c] - collector.offsets[c] for c in here]
        assert any(all(abs(r - s) <= collector.tolerance for s in references) for r in references)
    for before, after in itertools.pairwise(sets):
        assert before.lap < after.lap or (before.lap == after.lap and before.stamp < after.stamp)


def test_sets_that_leave_together_leave_oldest_first():
    sets = feed(Collector(2, PERIOD), [(0.0, 0, sweep(1, 0)), (0.0, 1, sweep(0, 1))])
    assert [s.stamp for s in sets] == [sweep(0, 0), sweep(1, 0)]


def test_without_offsets_a_wide_stagger_is_not_forced_into_one_set():
    sets = feed(Collector(2, PERIOD), [(0.0, 0, START), (0.05, 1, START + 50 * MS)])
    assert [s.complete for s in sets] == [False, False]


def test_one_image_of_one_percent_lost_costs_no_set():
    rng = random.Random(1)
    sets = feed(Collector(6, PERIOD), steady_rig(720, lose=lambda k, c: rng.random() < 0.01))
    assert len(sets) == 720 and 600 < sum(s.complete for s in sets) < 720


def test_stamps_that_go_back_begin_a_new_lap_and_nothing_of_the_old_one_survives():
    collector = Collector(2, PERIOD)
    events = [(k * 0.083, c, sweep(k, c)) for k in range(20) for c in range(2) if (k, c) != (19, 1)]
    again = [(2.0 + now, c, stamp) for now, c, stamp in events]
    sets = feed(collector, events + again)
    laps = [s.lap for s in sets]
    assert laps == sorted(laps) and set(laps) == {0, 1}
    assert laps.count(0) == 20 and laps.count(1) == 20  # the half-filled last set of lap 0 left by its deadline
    assert [s.stamp for s in sets if s.lap == 1] == [s.stamp for s in sets if s.lap == 0]


def test_open_sets_of_the_old_lap_are_counted_not_given_out():
    collector = Collector(2, PERIOD)
    collector.add(0, sweep(100, 0), "old", 0.0)
    assert collector.add(0, sweep(0, 0), "new", 0.01) == []
    assert collector.dropped[0, "clock jump"] == 1 and collector.lap == 1


@pytest.mark.parametrize("step", [0.05, 0.083, 0.3, 0.9])  # s: less than a clock jump
@pytest.mark.parametrize("who", [range(6), [2]], ids=["all cameras", "one camera"])
def test_after_a_small_step_back_images_are_late_until_time_has_caught_up_and_no_lap_begins(step, who):
    def clock(c, stamp):
        return stamp - round(step * 1e9) if c in who and stamp >= sweep(30, 0) else stamp

    events = [(now, c, clock(c, stamp)) for now, c, stamp in steady_rig(60)]
    collector = Collector(6, PERIOD)
    sets = feed(collector, events)
    stamps = [s.stamp for s in sets]
    assert stamps == sorted(set(stamps)) and {s.lap for s in sets} == {0}
    late = sum(collector.dropped.values())
    assert late + sum(p is not None for s in sets for p in s.pictures) == len(events)
    assert all(reason in ("late", "same stamp again") and camera in who for camera, reason in collector.dropped)
    if len(who) == 1:  # the others go on as if nothing had been
        assert len(sets) == 60 and all(sum(p is not None for p in s.pictures) >= 5 for s in sets)
    else:  # whole sets again as soon as stamps pass the last one that left
        assert late % 6 == 0 and late // 6 == 60 - len(sets) <= np.ceil((step + 0.4 * PERIOD) / PERIOD)
        assert all(s.complete for s in sets)


def test_a_small_step_back_of_the_clock_is_late_images_not_a_new_lap():
    collector = Collector(1, PERIOD)
    assert len(collector.add(0, sweep(10, 0), "a", 0.0)) == 1
    assert collector.add(0, sweep(4, 0), "b", 0.1) == []
    assert collector.lap == 0 and collector.dropped[0, "late"] == 1


@pytest.mark.parametrize(
    ("stamps", "reason"), [([0], "no stamp"), ([START, START], "same stamp again"), ([-5], "no stamp")]
)
def test_impossible_and_repeated_stamps_are_dropped_and_counted(stamps, reason):
    collector = Collector(2, PERIOD)
    for stamp in stamps:
        assert collector.add(0, stamp, "x", 0.0) == []
    assert collector.dropped[0, reason] == 1


@pytest.mark.parametrize("skew", [-2.0, -0.5, -0.2, 0.2, 0.5, 2.0])
def test_one_camera_with_a_wrong_clock_costs_that_camera_only(skew):
    def clock(c):
        return round(skew * 1e9) if c == 2 else 0

    events = [(now, c, stamp + clock(c)) for now, c, stamp in steady_rig(120)]
    collector = Collector(6, PERIOD)
    sets = feed(collector, events)
    good = [s for s in sets if sum(p is not None for p in s.pictures) >= 5 and s.pictures[2] is None]
    assert len(good) >= 115  # the first sets form before the others have spoken
    assert collector.lap == 0
    assert sum(collector.dropped[2, reason] for reason in ("late", "clock ahead of the other cameras")) >= 115


def test_after_a_pause_of_all_cameras_no_set_is_lost():
    before = steady_rig(10)
    after = [(now + 5.0, c, stamp + 5_000 * MS) for now, c, stamp in before]
    sets = feed(Collector(6, PERIOD), before + after)
    assert len(sets) == 20 and all(s.complete for s in sets)


@pytest.mark.parametrize("dead", [3, 4])
def test_dead_cameras_do_not_judge_the_clocks_of_those_that_live(dead):
    collector, sets, now = Collector(6, 0.1, deadline=0.12), [], 0.0
    for k in range(40):
        for camera in range(6 if k < 10 else 6 - dead):
            now = k * 0.1 + camera * 1e-3
            stepped = 1000 * MS if k >= 12 else 0  # all clocks were set ahead by a second
            sets += collector.poll(now) + collector.add(camera, START + k * 100 * MS + stepped, "picture", now)
    sets += collector.poll(now + 1.0)
    # at the step itself they cannot be told from clocks that run ahead: that costs a set or two, not all that follow
    assert len(sets) >= 38 and sum(collector.dropped.values()) <= 6, collector.dropped
    assert all(s.stamps[: 6 - dead] == (s.stamp,) * (6 - dead) for s in sets[-20:])


@pytest.mark.parametrize("rate", [0.2, 2.0, 5.0])
def test_at_any_speed_of_a_replay_a_gap_costs_no_camera(rate):
    """Stamps run faster or slower than arrivals do: that makes no clock run ahead of the others'."""
    collector, sets = Collector(6, 0.1, deadline=0.12), []
    for k in (0, 1, 2, 8, 9, 10, 30, 31):
        for camera in range(6):
            played = k * 0.1 + camera * 1e-3
            sets += collector.add(camera, START + k * 100 * MS, "picture", played / rate, START / 1e9 + played)
    assert len(sets) == 8 and all(s.complete for s in sets) and not collector.dropped


def test_sets_below_the_minimum_are_dropped_and_counted():
    collector = Collector(3, PERIOD, min_cameras=2)
    collector.add(0, START, "a", 0.0)
    assert collector.poll(1.0) == []
    assert collector.dropped[None, "too few cameras"] == 1


def test_a_collector_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="min_cameras"):
        Collector(2, PERIOD, min_cameras=3)
    with pytest.raises(ValueError, match="offset for each"):
        Collector(2, PERIOD, [0.0])


def night(k: int, size=3 * 320 * 180) -> np.ndarray:
    """A dark picture of a parked car: black, but for noise of one grey level."""
    return np.random.default_rng(k).integers(0, 2, size, dtype=np.uint8)


@pytest.mark.parametrize("rate", [5.0, 12.0, 30.0])
@pytest.mark.parametrize("what", ["stamp", "picture"])
def test_a_frozen_camera_is_found_within_a_second_said_and_back_with_its_first_new_image(rate, what):
    watch, first, back = Watch(0.8), 20, 50
    faults = []
    for k in range(60):
        stands = first if first <= k < back else k
        stamp, shown = (stands, k) if what == "stamp" else (k, stands)
        stamp = START + round(stamp / rate * 1e9)
        faults.append(watch.fault(stamp, night(shown), k / rate, clock=stamp))
    found = next(k for k, fault in enumerate(faults) if fault is not None)
    assert 0.8 <= (found - first) / rate <= 1.0
    assert all(faults[found:back]) and not any(faults[:found] + faults[back:])
    reason, sentence = faults[found]
    assert reason == f"frozen: same {what}"
    since = (START + round(first / rate * 1e9)) / 1e9
    assert f"the {what} of {since:.3f} s came {found - first} more times" in sentence


def test_a_parked_car_at_night_is_not_frozen_nor_is_a_picture_that_differs_in_its_last_byte():
    watch = Watch(0.8)
    assert not any(watch.fault(START + k * SWEEP, night(k), k / 12, clock=0) for k in range(120))
    black = [np.zeros(200_001, np.uint8) for _ in range(120)]
    for k, picture in enumerate(black):
        picture[-1] = k % 2
    assert not any(watch.fault(START + k * SWEEP, picture, 20 + k / 12, 0) for k, picture in enumerate(black))
    shorter = [np.zeros(BLOCK + k % 2, np.uint8) for k in range(120)]
    assert not any(watch.fault(START + k * SWEEP, picture, 40 + k / 12, 0) for k, picture in enumerate(shorter))


@pytest.mark.parametrize("frozen_after", [0.0, 0.8])
def test_a_stamp_of_the_future_is_refused_with_both_numbers_and_a_recording_is_not(frozen_after):
    clock = START + 3600 * 1000 * MS
    watch = Watch(frozen_after)
    reason, sentence = watch.fault(clock + 1001 * MS, night(0, 9), 0.0, clock)
    assert reason == "stamp far from the clock"
    assert "4601.001 s is 1.001 s ahead of the ROS clock, 4600.000 s, expected at most 1.0 s" in sentence
    assert watch.fault(clock + 1000 * MS, night(1, 9), 0.1, clock) is None  # /clock comes in steps
    assert watch.fault(START, night(2, 9), 0.2, clock) is None  # played without its clock
    assert watch.fault(clock + 5000 * MS, night(3, 9), 0.3, 0) is None  # a simulated clock that has not begun


@pytest.mark.parametrize("cameras", [2, 6])
def test_a_camera_whose_clock_is_an_hour_ahead_and_which_speaks_first_costs_no_other_image(cameras):
    collector, watches = Collector(cameras, PERIOD), [Watch(0.8) for _ in range(cameras)]
    sets = []
    for k, (now, camera, stamp) in enumerate(steady_rig(30, cameras)):
        clock, stamp = stamp + 10 * MS, stamp + (3600 * 1000 * MS if camera == 0 else 0)
        sets += collector.poll(now)
        if watches[camera].fault(stamp, night(k, 900), now, clock) is None:
            sets += collector.add(camera, stamp, (camera, stamp), now)
    sets += collector.poll(float("inf"))
    assert len(sets) == 30 and not collector.dropped
    assert all([c for c, p in enumerate(s.pictures) if p is None] == [0] for s in sets)


def test_zero_turns_the_watch_off_and_less_is_refused():
    watch = Watch(0.0)
    assert not any(watch.fault(START + k * SWEEP, np.zeros(9, np.uint8), k / 12, 0) for k in range(120))
    with pytest.raises(ValueError, match="frozen_after >= 0 s, got -1"):
        Watch(-1)


def test_sets_go_on_without_a_frozen_camera():
    collector, watches = Collector(6, PERIOD), [Watch(0.8) for _ in range(6)]
    sets = []
    for now, camera, stamp in steady_rig(60):
        shown = 10 if camera == 3 and stamp >= sweep(10, 0) else stamp
        sets += collector.poll(now)
        if watches[camera].fault(stamp, night(shown, 900), now, clock=stamp) is None:
            sets += collector.add(camera, stamp, (camera, stamp), now)
    sets += collector.poll(float("inf"))
    assert len(sets) == 60
    missing = [k for k, images in enumerate(sets) if not images.complete]
    assert missing == list(range(missing[0], 60)) and 10 < missing[0] <= 22
    assert all([c for c, p in enumerate(sets[k].pictures) if p is None] == [3] for k in missing)


def until_waiting(box: Mailbox) -> None:
    end = time.monotonic() + 10
    while not box._waits and time.monotonic() < end:
        time.sleep(0.001)
    assert box._waits


def test_in_the_mailbox_the_newest_letter_wins_and_closing_wakes_the_reader():
    box = Mailbox()
    assert box.put("first") is None
    assert box.put("second") == "first"
    assert box.take() == "second"
    got = []
    reader = threading.Thread(target=lambda: got.append(box.take()), daemon=True)
    reader.start()
    until_waiting(box)
    box.close()
    reader.join(timeout=2)
    assert got == [None]


def test_a_reader_who_waits_gets_both_of_two_letters_that_come_at_once():
    """A partial set often leaves because a younger one completed: an idle worker must answer both."""
    box, got = Mailbox(), []
    reader = threading.Thread(target=lambda: got.extend([box.take(), box.take()]), daemon=True)
    reader.start()
    until_waiting(box)
    with box._condition:  # the reader cannot come in between
        assert box.put("partial") is None
        assert box.put("complete") is None
    reader.join(timeout=2)
    assert got == ["partial", "complete"]
    reader = threading.Thread(target=lambda: got.append(box.take()), daemon=True)
    reader.start()
    until_waiting(box)
    assert box.put(None) is None  # how a letter is taken back: nothing for the reader
    assert box.put("next") is None
    reader.join(timeout=2)
    assert got[-1] == "next"


def scan(stamp: int) -> Cloud:
    return Cloud(np.zeros((1, 5), np.float32), "lidar", stamp)


def test_a_set_gets_the_newest_scans_that_were_not_after_it():
    scans = Scans("/lidar", count=3, period=0.05)
    for k in (0, 2, 1, 3, 5, 4, 5):  # in any order, one of them twice
        scans.add(scan(START + 50 * k * MS))
    taken = [cloud.stamp - START for cloud in scans.take(START + 160 * MS, 0.0)]
    assert taken == [150 * MS, 100 * MS, 50 * MS]
    # a scan's stamp may be that of its end: half a period ahead is still of this set
    assert scans.take(START + 226 * MS, 0.0)[0].stamp == START + 250 * MS
    assert scans.take(START + 224 * MS, 0.0)[0].stamp == START + 200 * MS
    assert scans.newest() == START + 250 * MS


def test_scans_that_are_too_old_are_none_and_a_late_one_is_waited_for():
    scans = Scans("/lidar", count=3, period=0.05, gap=0.5)
    assert scans.newest() is None and scans.take(START, 0.0) == []
    scans.add(scan(START))
    assert len(scans.take(START + 500 * MS, 0.0)) == 1 and scans.take(START + 501 * MS, 0.0) == []
    comes = threading.Timer(0.05, lambda: scans.add(scan(START + 400 * MS)))
    comes.start()
    assert [c.stamp for c in scans.take(START + 410 * MS, 5.0)] == [START + 400 * MS, START]
    comes.join()


def test_a_clock_that_is_turned_back_forgets_scans_and_few_are_kept():
    scans = Scans("/lidar", count=2, period=0.1)
    for k in range(100):
        scans.add(scan(START + 100 * k * MS))
    assert len(scans._clouds) == 22  # what a set needs, and two seconds
    scans.add(scan(START))
    assert scans.newest() == START and len(scans.take(START, 0.0)) == 1


def test_a_frame_carries_the_cars_motion_between_each_cameras_stamp_and_the_sets():
    calibration = Calibration(np.array([[500.0, 0, 80], [0, 500.0, 45], [0, 0, 1]]), 90, 160, "cam")
    images = ImageSet((Shot("a", calibration), None, Shot("c", calibration)), (START, None, START + 40 * MS), lap=3)
    forward = torch.eye(4, dtype=torch.float64)
    forward[0, 3] = 0.4  # 10 m/s for 40 ms
    mount = rigid.from_quaternion((0.5, -0.5, 0.5, -0.5), (1.7, 0.0, 1.5))
    world_then = rigid.from_quaternion((0.9, 0.0, 0.0, 0.4), (600.0, 1647.0, 0.0))
    world_now = world_then @ forward
    frame = frame_of(
        images,
        ["a", "b", "c"],
        torch.zeros(3, 90, 160, 3, dtype=torch.uint8),
        [mount, None, mount],
        [world_then, None, world_now],
        world_now,
    )
    # the car moved forward after camera a looked, so a looks from 0.4 m behind where it is now
    assert torch.allclose(frame.cameras.car_from_camera[0, :3, 3], mount[:3, 3] - torch.tensor([0.4, 0, 0]).double())
    assert torch.allclose(frame.cameras.car_from_camera[2], mount)
    assert frame.used.tolist() == [True, False, True]
    assert frame.stamp == START + 40 * MS and frame.drive == "lap 3"
