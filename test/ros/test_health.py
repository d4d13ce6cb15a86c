"""What the node says about itself is true at every moment of the steady clock, whatever /clock does meanwhile."""

from collections import Counter

import numpy as np
import pytest

from occflow_core.types import NANO
from occflow_ros.health import ERROR, OK, STALE, WARN, Health, resident_mb

AB = ("a", "b")


def active(cameras=AB, **options) -> Health:
    health = Health(cameras, "net", **options)
    health.activate(0.0)
    return health


def go_on(health, begin, end, speak=AB, used=None) -> None:
    """Ten times a second from begin to end: the cameras that speak, and an output of those that are used."""
    for k in range(round(begin * 10), round(end * 10) + 1):
        for name in speak:
            health.image(name, k / 10, k * NANO // 10)
        health.served(k / 10, speak if used is None else used)


def running(until=10.0) -> Health:
    health = active()
    go_on(health, 0.0, until)
    return health


def level(health, now):
    return {s.name: s.level for s in health.report(now)}


class Bag:
    """Plays a recording of 12 Hz cameras into a Health, and brings it both clocks."""

    def __init__(self, rate: float, cameras=AB, begin=1000.0, **options):
        self.health = active(cameras, **options)
        self.rate, self.begin, self.cameras = rate, begin, cameras
        self.steady, self.ros, self.next = 0.0, begin, 0
        self.worst = OK  # level of any status since the last look

    def play(self, seconds: float, silent=()) -> None:
        """So many seconds of the recording."""
        end, self.worst = self.ros + seconds, OK
        while self.ros < end:
            self.step(self.rate)
            while self.begin + self.next / 12 <= self.ros:
                stamp = round((self.begin + self.next / 12) * NANO)
                self.next += 1
                speak = [name for name in self.cameras if name not in silent]
                for name in speak:
                    self.health.image(name, self.steady, stamp)
                if speak:
                    self.health.served(self.steady, speak)
            self.look()

    def wait(self, seconds: float, rate: float = 0.0) -> None:
        """So many seconds of the steady clock without a message; the bag is paused, or /clock runs on alone."""
        end, self.worst = self.steady + seconds, OK
        while self.steady < end:
            self.step(rate)
            self.look()

    def turn_back(self, lead: float = 0.0) -> None:
        self.ros, self.next = self.begin - lead, 0

    def step(self, rate: float) -> None:
        self.steady, self.ros = self.steady + 0.02, self.ros + 0.02 * rate
        self.health.clock(self.steady, self.ros)

    def look(self) -> None:
        self.worst = max(self.worst, *(s.level for s in self.report()))
        for status in self.report()[1:]:
            assert 0 <= status.values.get("age s", 0.0) < 60.0, status

    def report(self):
        return self.health.report(self.steady)

    def rates(self) -> list[float]:
        return [status.values["rate Hz"] for status in self.report()[1:]]


def test_a_set_that_nobody_listens_to_is_as_good_as_an_output_and_is_not_asked_for_an_answer():
    health = active()
    for k in range(50):
        for name in AB:
            health.image(name, k / 10, k * NANO // 10)
        health.count("sets complete")
        health.served(k / 10, AB) if k < 10 else health.idle(k / 10)
    whole, *cameras = health.report(4.9)
    assert (whole.level, whole.message) == (OK, "idle: nobody listens") and {s.level for s in cameras} == {OK}
    assert whole.values["share of sets answered"] == 1.0 and whole.values["sets nobody listened to"] == 40
    assert health.report(7.0)[0].level == ERROR


def test_counts_go_on_over_activations_though_each_has_a_collector_of_its_own():
    health = active()
    health.collected(Counter({(0, "late"): 3, (None, "too few cameras"): 2}))
    health.collected(Counter({(0, "late"): 5, (None, "too few cameras"): 2}))
    health.activate(1.0)
    health.collected(Counter({(0, "late"): 1, (None, "too few cameras"): 1}))
    whole, first, _ = health.report(1.0)
    assert first.values["dropped: late"] == 6 and whole.values["sets dropped: too few cameras"] == 3


def test_what_the_node_cannot_go_on_with_is_an_error_whatever_else_is_true():
    health = running()
    health.fail("out of memory twice in a row")
    health.active = False
    assert [(s.level, s.message) for s in health.report(10.0)][0] == (ERROR, "out of memory twice in a row")


def test_a_running_node_is_ok_and_tells_each_cameras_rate():
    health = running()
    assert level(health, 10.0) == {"occupancy": OK, "a": OK, "b": OK}
    assert health.report(10.0)[1].values["rate Hz"] == 10.0 and health.report(10.5)[1].values["age s"] == 0.5


def test_before_anything_came_it_warns_and_gives_the_latest_reason():
    health = active(["a"])
    health.dropped("a", "no CameraInfo", "/a/camera_info: nothing yet")
    whole, camera = health.report(0.0)
    assert whole.level == WARN and "no output yet" in whole.message
    assert "nothing yet" in camera.message and camera.values["dropped: no CameraInfo"] == 1


def test_a_camera_missing_from_the_newest_set_warns_at_once_is_an_error_when_it_lasts_and_well_again_by_itself():
    health = running()
    go_on(health, 10.1, 10.1, ["b"])
    whole, camera, _ = health.report(10.1)
    assert (camera.level, camera.message) == (WARN, "missing from the newest set")
    assert (whole.level, whole.message) == (WARN, "running without a")
    go_on(health, 10.2, 13.9, ["b"])
    assert level(health, 13.9) == {"occupancy": WARN, "a": ERROR, "b": OK}
    whole, camera, _ = health.report(13.9)
    assert "running without a" in whole.message and "no image for 3.9 s" in camera.message
    assert camera.values["rate Hz"] == 0.0 and camera.values["age s"] == 3.9
    health.image("a", 14.0, 14 * NANO)
    assert level(health, 14.0)["a"] == WARN  # it is back, and no output has it yet
    go_on(health, 14.1, 14.2)
    assert level(health, 14.2) == {"occupancy": OK, "a": OK, "b": OK}
    assert health.report(14.2)[1].values["rate Hz"] == 10.0  # of what came since


def test_silence_of_all_is_a_warning_at_once_then_an_error_then_stale():
    health = running()
    assert health.report(10.2)[0].level == OK and health.report(10.4)[0].level == WARN
    assert "running without a, b" in health.report(10.4)[0].message
    assert level(health, 12.1) == {"occupancy": ERROR, "a": ERROR, "b": ERROR}
    assert level(health, 19.9)["occupancy"] == ERROR and level(health, 20.1) == {"occupancy": STALE, "a": 2, "b": 2}
    assert "no output for 10.1 s" in health.report(20.1)[0].message


def test_what_never_came_is_a_warning_then_an_error_and_the_time_before_activation_does_not_count():
    health = Health(AB, "net")
    health.activate(100.0)
    assert level(health, 101.9) == {"occupancy": WARN, "a": WARN, "b": WARN}
    assert level(health, 102.1) == {"occupancy": ERROR, "a": ERROR, "b": ERROR}
    assert health.report(102.1)[0].values["active s"] == 2.1
    go_on(health, 102.2, 104.0)
    health.active = False
    health.activate(500.0)
    assert level(health, 500.1) == {"occupancy": WARN, "a": WARN, "b": WARN}
    assert health.counts()["messages out"] == 19


def test_fewer_cameras_than_a_set_needs_are_counted_at_once_and_stay_the_reason():
    cameras = tuple("abcdef")
    health = active(cameras, least=3)
    go_on(health, 0.0, 10.0, cameras)
    for k in range(101, 140):
        for name in "ab":
            health.image(name, k / 10, k * NANO // 10)
        if k >= 104:
            assert "2 of 6 cameras, expected at least 3" in health.report(k / 10)[0].message
    assert "no output for 3.9 s (2 of 6 cameras" in health.report(13.9)[0].message
    assert health.report(10.4)[0].level == WARN and health.report(13.9)[0].level == ERROR
    go_on(health, 14.0, 14.1, cameras)
    assert set(level(health, 14.1).values()) == {OK}


def test_a_camera_whose_images_are_refused_is_not_one_of_those_a_set_needs():
    health = active(least=2)
    go_on(health, 0.0, 10.0)
    health.refused("a", 10.0, "frozen: same picture", "/a/image: refused")
    assert "1 of 2 cameras, expected at least 2" in health.report(10.0)[0].message


def test_a_stamp_that_comes_again_is_no_faster_camera():
    health = active()
    for k in range(50):
        for _ in range(2):
            health.image("a", k / 10, k * NANO // 10)
    assert health.report(4.9)[1].values["rate Hz"] == 10.0


def test_an_old_loss_does_not_explain_a_new_silence():
    health = active()
    health.dropped("sets", "no LiDAR scan", "/lidar: a set was refused")
    health.dropped("a", "broken image", "/a/image: refused")
    go_on(health, 0.0, 10.0)
    assert all("refused" not in status.message for status in health.report(15.0))


def test_the_share_of_sets_that_were_answered_counts_those_that_the_collector_dropped():
    health = active()
    for what in ["sets complete"] * 5 + ["sets partial"] * 2:
        health.count(what)
    health.collected(Counter({(None, "too few cameras"): 1, (0, "set had too few cameras"): 4}))
    for k in range(6):
        health.served(k / 10, AB)
    values = health.report(0.5)[0].values
    assert values["share of sets answered"] == 0.75
    assert [values[f"sets {what}"] for what in ("complete", "partial", "skipped")] == [5, 2, 0]


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0, 2.0, 8.0])
def test_at_any_speed_rates_are_the_sensors_own_and_a_dead_camera_is_found(rate):
    bag = Bag(rate)
    bag.play(10.0)
    assert bag.worst == OK or (rate == 0.1 and bag.worst == WARN)
    assert bag.rates() == [pytest.approx(12.0, 0.01)] * 2
    assert bag.report()[0].values["clock speed"] == pytest.approx(rate, abs=0.02)
    assert all(s.values["age s"] <= 0.1 + 0.02 * rate for s in bag.report()[1:])
    begin = bag.steady
    while level(bag.health, bag.steady)["a"] != ERROR:
        bag.play(0.1, silent=["a"])
    # `quiet`, 2 s, by the slower of the two clocks
    assert 2.0 <= (bag.steady - begin) * min(1.0, rate) <= 2.3
    assert {s.name: s.level for s in bag.report()} == {"occupancy": WARN, "a": ERROR, "b": OK}
    assert bag.rates() == [0.0, pytest.approx(12.0, 0.01)]
    bag.play(2.0)
    assert {s.level for s in bag.report()} == {OK}


def test_a_pause_is_no_fault_and_ages_stand_still():
    bag = Bag(1.0)
    bag.play(5.0)
    before = [s.values["age s"] for s in bag.report()[1:]]
    bag.wait(60.0)
    whole, *cameras = bag.report()
    assert bag.worst == WARN
    assert whole.message.startswith("paused: /clock has stood still for 60.") and whole.values["clock speed"] == 0.0
    assert [s.values["age s"] for s in cameras] == before and {s.message for s in cameras} == {"paused"}
    assert bag.rates() == [pytest.approx(12.0, 0.01)] * 2
    bag.play(0.1)
    assert bag.worst == OK and {s.message for s in bag.report()} == {"running"}


def test_what_was_dead_before_a_pause_stays_dead_in_it():
    bag = Bag(1.0)
    bag.play(5.0)
    bag.play(4.0, silent=["a"])
    bag.wait(10.0)
    assert [s.level for s in bag.report()] == [WARN, ERROR, OK]
    bag.wait(3.0, rate=1.0)  # /clock runs on alone: no pause
    assert [s.level for s in bag.report()] == [ERROR, ERROR, ERROR]


def test_a_clock_that_dies_while_images_go_on_is_no_pause():
    bag = Bag(1.0)
    bag.play(5.0)
    for _ in range(50):  # images are refused: their stamps are ahead of the clock
        bag.wait(0.08)
        for name in AB:
            bag.health.refused(name, bag.steady, "stamp far from the clock", "ahead of the ROS clock")
    whole, *cameras = bag.report()
    assert [s.level for s in (whole, *cameras)] == [ERROR] * 3
    assert "/clock has stood still for" in whole.message and "s, though messages come" in whole.message
    bag.play(0.1)
    assert {s.level for s in bag.report()} == {OK}


def test_no_clock_at_all_is_said_and_does_not_hide_silence():
    health = active()
    for k in range(100):
        health.clock(k / 10, 0.0)
        go_on(health, k / 10, k / 10)
    whole, *cameras = health.report(9.9)
    assert (whole.level, whole.message) == (WARN, "no /clock yet, though use_sim_time is on")
    assert {s.level for s in cameras} == {OK}
    for k in range(100, 140):
        health.clock(k / 10, 0.0)
        go_on(health, k / 10, k / 10, ["b"])
    assert [s.level for s in health.report(13.9)] == [WARN, ERROR, OK]


def test_a_recording_that_begins_long_after_the_node_is_no_fault():
    bag = Bag(1.0)
    for k in range(100):
        bag.steady = k / 10
        bag.health.clock(bag.steady, 0.0)
    assert {s.level for s in bag.report()} == {WARN}
    bag.wait(0.5, rate=1.0)
    assert bag.worst == WARN and bag.report()[0].values["clock speed"] < 1.0
    bag.play(3.0)
    assert {s.level for s in bag.report()} == {OK}


def test_images_about_the_ends_of_a_pause_do_not_make_the_clock_dead():
    bag = Bag(1.0)
    bag.play(5.0)
    bag.health.image("a", bag.steady, round(bag.ros * NANO))  # sent before the pause, heard in it
    bag.wait(10.0)
    assert bag.worst == WARN
    bag.health.image("a", bag.steady, round(bag.ros * NANO) + 1)  # heard before /clock is
    bag.look()
    assert bag.worst == WARN and "paused" in bag.report()[0].message


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0])
def test_a_new_lap_is_no_fault(rate):
    """The clock runs on for a second without images at the end, and runs for one before the first."""
    bag = Bag(rate)
    for _ in range(3):
        bag.play(20.0)
        assert bag.rates() == [pytest.approx(12.0, 0.01)] * 2
        bag.wait(1.5, rate)
        assert bag.worst <= WARN
        bag.turn_back(lead=1.5 * rate)
        bag.wait(1.4, rate)
        assert bag.worst <= WARN and all(s.values["age s"] < 4.0 for s in bag.report()[1:])
        bag.play(0.5)
        assert bag.worst <= WARN and bag.rates() == [pytest.approx(12.0, 0.01)] * 2
    assert {s.level for s in bag.report()} == {OK}


def test_the_speed_of_a_clock_that_was_turned_back_is_that_of_the_new_lap():
    health = active()
    for now, ros in enumerate((100.0, 101.0, 102.0, 50.1, 51.1)):
        health.clock(now, ros)
    assert health.report(4.0)[0].values["clock speed"] == 1.0


def test_a_camera_dead_through_several_short_laps_is_found():
    bag = Bag(1.0)
    bag.play(1.5)
    for _ in range(4):
        bag.turn_back()
        bag.play(1.5, silent=["a"])
    assert [s.level for s in bag.report()] == [WARN, ERROR, OK]


def test_a_jump_ahead_is_no_fault():
    bag = Bag(1.0)
    bag.play(5.0)
    bag.begin += 50.0
    bag.ros += 50.0
    bag.play(5.0)
    assert bag.worst == OK and bag.rates() == [pytest.approx(12.0, 0.01)] * 2


def test_latencies_are_percentiles_in_milliseconds():
    health = Health(["a"], "net")
    for k in range(1, 101):
        health.took("network", k / 1000)
    percentiles = health.latencies_ms()["network"]
    assert 50 <= percentiles["p50"] <= 51 and 95 <= percentiles["p95"] <= 96 and 99 <= percentiles["p99"] <= 100


def test_the_collectors_totals_replace_they_do_not_add():
    health = Health(["a"], "net")
    for _ in range(2):
        health.collected(Counter({(0, "late"): 3, (None, "too few cameras"): 1}))
    whole, camera = health.report(0.0)
    assert camera.values["dropped: late"] == 3 and whole.values["sets dropped: too few cameras"] == 1


def test_a_camera_whose_images_come_but_are_never_used_is_an_error():
    health = running()
    for k in range(101, 140):
        health.dropped("a", "broken image", "/a/image: refused: a broken JPEG")
        go_on(health, k / 10, k / 10, used=["b"])
    assert level(health, 13.9) == {"occupancy": WARN, "a": ERROR, "b": OK}
    message = health.report(13.9)[1].message
    assert "none of them was used for 3.9 s (latest: /a/image: refused: a broken JPEG)" in message


def test_the_first_images_are_no_error_before_the_first_output():
    health = active()
    health.image("a", 0.0, NANO)
    assert [s.level for s in health.report(0.5)] == [WARN] * 3
    for k in range(1, 30):
        health.image("a", k / 10, NANO + k * NANO // 10)
    assert health.report(1.9)[1].level == WARN and health.report(2.1)[1].level == ERROR


def test_a_camera_whose_images_are_refused_is_a_warning_at_once_an_error_when_it_lasts_and_well_with_the_next():
    health, sentence = running(), "/a/image: refused: the camera is frozen"
    for k in range(101, 140):
        health.refused("a", k / 10, "frozen: same picture", sentence)
        go_on(health, k / 10, k / 10, ["b"])
        told = health.report(k / 10)[1]
        assert k > 120 or told.message.startswith("the latest image was refused")
        assert told.level == (WARN if k <= 120 else ERROR) and sentence in told.message
    assert told.values["dropped: frozen: same picture"] == 39
    assert level(health, 13.9) == {"occupancy": WARN, "a": ERROR, "b": OK}
    go_on(health, 14.0, 14.0)
    assert level(health, 14.0) == {"occupancy": OK, "a": OK, "b": OK}


def test_an_inactive_node_is_silent_on_purpose():
    health = running()
    health.active = False
    assert set(level(health, 99.0).values()) == {OK}


def test_log_lines_are_throttled_by_key():
    health = Health(["a"], "net")
    assert [health.may_say("x", t) for t in (0.0, 4.9, 5.1)] == [True, False, True]
    assert health.may_say("y", 1.0)


def test_a_lidar_that_is_needed_is_told_of_like_a_camera():
    health = active(["a"], lidar=True)
    whole, _, lidar = health.report(0.0)
    assert (lidar.name, lidar.level) == ("LiDAR", WARN) and "no scan yet" in lidar.message and whole.level == WARN
    go_on(health, 0.0, 4.9, ["a", "LiDAR"])
    assert level(health, 4.9) == {"occupancy": OK, "a": OK, "LiDAR": OK}
    health.dropped("sets", "no LiDAR scan", "/lidar: a set was refused")
    whole, _, lidar = health.report(9.0)
    assert lidar.level == ERROR and "no scan for 4.1 s" in lidar.message
    assert whole.level == ERROR and "/lidar: a set was refused" in whole.message
    assert whole.values["sets dropped: no LiDAR scan"] == 1


def test_facts_of_the_whole_stand_beside_its_counts_and_the_newest_holds():
    health = Health(["a"], "net")
    health.tell("TF age s", 0.1)
    health.tell("TF age s", 0.3)
    health.count("sets complete")
    whole, camera = health.report(0.0)
    assert whole.values["model"] == "net" and whole.values["TF age s"] == 0.3 and whole.values["sets complete"] == 1
    assert whole.values["use_sim_time"] == "false" and "clock speed" not in whole.values
    assert "TF age s" not in camera.values


def test_resident_memory_grows_by_what_is_taken_and_touched():
    before = resident_mb()
    taken = np.ones(100_000_000, np.uint8)
    assert 90 < resident_mb() - before < 130 and taken[0]


def test_the_latest_of_each_stage_is_this_sets():
    health = Health(["a"], "net")
    for stage, seconds in (("decode", 0.1), ("network", 0.5), ("decode", 0.2)):
        health.took(stage, seconds)
    assert health.latest() == {"decode": 0.2, "network": 0.5}


def test_a_sensor_that_is_doubted_warns_while_it_runs_and_is_not_called_missing():
    health = running()
    assert health.doubted("a", "2 publishers on /a/image") and not health.doubted("a", "2 publishers on /a/image")
    assert level(health, 10.0) == {"occupancy": WARN, "a": WARN, "b": OK}
    whole, camera, _ = health.report(10.0)
    assert whole.message == camera.message == "2 publishers on /a/image"
    assert level(health, 15.0)["a"] == ERROR  # silence is worse
    assert "no output" in health.report(15.0)[0].message and "2 publishers" in health.report(15.0)[0].message
    health.doubted("a", "")
    assert level(health, 10.0) == {"occupancy": OK, "a": OK, "b": OK}


def test_a_doubt_about_the_node_itself_is_the_wholes_alone():
    health = running()
    health.doubted("name", "2 nodes are named /occflow")
    assert level(health, 10.0) == {"occupancy": WARN, "a": OK, "b": OK}
    go_on(health, 10.1, 10.1, ["b"])
    assert health.report(10.1)[0].message == "running without a; 2 nodes are named /occflow"
    health.doubted("name", "")
    go_on(health, 10.2, 10.2)
    assert level(health, 10.2)["occupancy"] == OK


def test_an_explanation_is_shown_and_counts_nothing():
    health = active(["a"])
    health.explain("a", "/a: a publisher offers reliability BEST_EFFORT, we ask for RELIABLE")
    camera = health.report(0.0)[1]
    assert "no image yet (latest: /a: a publisher offers" in camera.message and camera.values == {}
