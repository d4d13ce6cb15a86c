"""What the node says about itself is true at every moment of the steady clock."""

from collections import Counter

import numpy as np

from occflow_ros.health import ERROR, OK, WARN, Health, resident_mb


def running(until=10.0, cameras=("a", "b")) -> Health:
    health = Health(cameras, "net")
    for k in range(int(until * 10) + 1):
        for name in cameras:
            health.image(name, k / 10)
            health.used(name, k / 10)
        health.served(k / 10)
    return health


def level(health, now):
    return {s.name: s.level for s in health.report(now)}


def test_a_running_node_is_ok_and_tells_each_cameras_rate():
    health = running()
    assert level(health, 10.0) == {"occupancy": OK, "a": OK, "b": OK}
    assert health.report(10.0)[1].values["rate Hz"] == 10.0


def test_before_anything_came_it_warns_and_gives_the_latest_reason():
    health = Health(["a"], "net")
    health.dropped("a", "no CameraInfo", "/a/camera_info: nothing yet")
    whole, camera = health.report(0.0)
    assert whole.level == WARN and "no output yet" in whole.message
    assert "nothing yet" in camera.message and camera.values["dropped: no CameraInfo"] == 1


def test_a_silent_camera_is_an_error_of_its_own_and_a_warning_of_the_whole():
    health = running()
    for k in range(101, 140):
        health.image("b", k / 10)
        health.used("b", k / 10)
        health.served(k / 10)
    assert level(health, 13.9) == {"occupancy": WARN, "a": ERROR, "b": OK}
    assert "running without a" in health.report(13.9)[0].message


def test_silence_of_the_output_is_an_error():
    assert level(running(), 15.0)["occupancy"] == ERROR


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
        for name in ("a", "b"):
            health.image(name, k / 10)
        health.used("b", k / 10)
        health.dropped("a", "broken image", "/a/image: refused: a broken JPEG")
        health.served(k / 10)
    assert level(health, 13.9) == {"occupancy": WARN, "a": ERROR, "b": OK}
    assert "none of them can be used (latest: /a/image: refused: a broken JPEG)" in health.report(13.9)[1].message


def test_a_camera_whose_images_are_refused_is_a_warning_at_once_an_error_when_it_lasts_and_well_with_the_next():
    health, sentence = running(), "/a/image: refused: the camera is frozen"
    for k in range(101, 140):
        health.refused("a", "frozen: same picture", sentence)
        health.image("b", k / 10)
        health.used("b", k / 10)
        health.served(k / 10)
        told = health.report(k / 10)[1]
        assert told.level == (WARN if k <= 120 else ERROR) and sentence in told.message
    assert told.values["dropped: frozen: same picture"] == 39
    assert level(health, 13.9) == {"occupancy": WARN, "a": ERROR, "b": OK}
    health.image("a", 14.0)
    health.used("a", 14.0)
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
    health = Health(["a"], "net", lidar=True)
    whole, _, lidar = health.report(0.0)
    assert (lidar.name, lidar.level) == ("LiDAR", WARN) and "no scan yet" in lidar.message and whole.level == WARN
    for k in range(50):
        for name in ("a", "LiDAR"):
            health.image(name, k / 10)
            health.used(name, k / 10)
        health.served(k / 10)
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
    assert whole.values == {"model": "net", "TF age s": 0.3, "sets complete": 1} and "TF age s" not in camera.values


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
    health.doubted("a", "2 publishers on /a/image")
    assert level(health, 10.0) == {"occupancy": WARN, "a": WARN, "b": OK}
    whole, camera, _ = health.report(10.0)
    assert whole.message == camera.message == "2 publishers on /a/image"
    assert level(health, 15.0)["a"] == ERROR  # silence is worse
    health.doubted("a", "")
    assert level(health, 10.0) == {"occupancy": OK, "a": OK, "b": OK}


def test_an_explanation_is_shown_and_counts_nothing():
    health = Health(["a"], "net")
    health.explain("a", "/a: a publisher offers reliability BEST_EFFORT, we ask for RELIABLE")
    camera = health.report(0.0)[1]
    assert "no image yet (latest: /a: a publisher offers" in camera.message and camera.values == {}
