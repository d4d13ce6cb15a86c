"""/diagnostics tells the truth over real DDS while a recording is slow, fast, paused and begins anew."""

import os
import time

import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")

from ros.fake import BEGIN, CAMERAS, Network, Stage  # noqa: E402

from occflow_core.geometry import Grid  # noqa: E402
from occflow_core.types import NANO  # noqa: E402
from occflow_ros.health import ERROR, OK, SPEED, WARN  # noqa: E402

pytestmark = [pytest.mark.dds, pytest.mark.timeout(120)]
DOMAIN = 21 + os.getpid() % 20  # of this process alone, so that parallel runs do not hear each other
RATE = 6.0  # Hz of each camera by its stamps: at double speed a busy computer still hears all
PERIOD = round(NANO / RATE)
TICK = 0.02  # s from one /clock to the next


class Player:
    """Plays sweeps on a stage, with /clock, at any speed. A computer that stalls makes it late, not hasty."""

    def __init__(self, stage: Stage):
        self.stage, self.clock, self.sweep = stage, BEGIN, BEGIN + PERIOD
        self.rate = 0.0  # of /clock at the end of the last play, as it was
        self.sent: dict[str, int] = {}  # camera -> ns, of the last sweep

    def play(self, rate: float, seconds: float, without=()) -> list[dict]:
        """So many seconds of the recording; gives the reports that were heard meanwhile."""
        self.stage.heard.diagnostics.clear()
        end = self.clock + round(seconds * NANO)
        due = time.monotonic()
        ticks = [(due, self.clock)]  # s, steady; ns
        while self.clock < end:
            before, self.clock = self.clock, min(self.clock + round(TICK * rate * NANO), self.sweep)
            step = (self.clock - before) / NANO / rate
            due = max(due + step, time.monotonic() + step / 2)
            if self.clock == self.sweep:
                self.taken()
                self.stage.car.sweep(self.sweep, without)
                self.sent = {name: self.sweep for name in CAMERAS if name not in without}
                self.sweep += PERIOD
            else:
                self.stage.car.tick(self.clock)
            self.stage.spin(max(0.0, due - time.monotonic()))
            ticks.append((time.monotonic(), self.clock))
        at, clock = next(tick for tick in ticks if ticks[-1][0] - tick[0] <= SPEED)
        self.rate = (ticks[-1][1] - clock) / NANO / (ticks[-1][0] - at)
        return self.reports()

    def pause(self, seconds: float) -> list[dict]:
        self.stage.heard.diagnostics.clear()
        self.stage.spin(seconds)
        return self.reports()

    def taken(self) -> None:
        """Waits for the node to have the last sweep: a next one may push it out, a lap makes it one of the future."""
        heard = self.stage.node.health._stamps
        self.stage.until(lambda: all(stamp in heard[name] for name, stamp in self.sent.items()))

    def turn_back(self) -> None:
        """/clock and TF begin a second before the images."""
        self.taken()
        self.clock, self.sweep = BEGIN - NANO, BEGIN + PERIOD
        self.stage.car.tick(self.clock)
        self.stage.car.move(self.clock)

    def reports(self) -> list[dict]:
        """Each as name -> (level, message, values)."""
        self.stage.until(lambda: self.stage.heard.diagnostics)
        return [
            {
                status.name.removeprefix("occflow: "): (
                    int.from_bytes(status.level, "little"),
                    status.message,
                    {pair.key: pair.value for pair in status.values},
                )
                for status in message.status
            }
            for message in self.stage.heard.diagnostics
        ]


@pytest.fixture(scope="module")
def player():
    with pytest.MonkeyPatch.context() as patch:
        network = Network(grid=Grid((-8.0, -8.0, -1.0), (0.8, 0.8, 0.8), (20, 20, 8)))  # small, for the same reason
        with Stage(patch, DOMAIN, network, reliable_images=True, camera_rate=RATE, set_deadline=0.2) as stage:
            yield Player(stage.start())


def worst(reports) -> int:
    return max(level for report in reports for level, _, _ in report.values())


def said(reports) -> list:
    """What was not well, for whoever reads the failure."""
    return [(name, *state[:2]) for report in reports for name, state in report.items() if state[0] != OK]


def levels(report) -> dict[str, int]:
    return {name: level for name, (level, _, _) in report.items()}


def assert_true(report, rate: float) -> None:
    """Every camera's own rate and its age by the ROS clock, whose speed is `rate`."""
    whole = report["occupancy"][2]
    assert float(whole["clock speed"]) == pytest.approx(rate, rel=0.15)
    assert whole["use_sim_time"] == "true" and abs(float(whole["TF age s"])) < 0.5
    for name in CAMERAS:
        values = report[name][2]
        assert float(values["rate Hz"]) == pytest.approx(RATE, rel=0.1), (name, values)
        assert 0 <= float(values["age s"]) < 0.5


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_at_half_and_double_speed_only_a_dead_camera_is_an_error(player, rate):
    player.play(rate, 0.3)
    reports = player.play(rate, (SPEED + 0.2) * rate)
    assert worst(reports) < ERROR, said(reports)
    assert_true(reports[-1], player.rate)
    dead = player.play(rate, 2.3 * max(1.0, rate), without=["cam_back"])
    assert max(report[name][0] for report in dead for name in CAMERAS if name != "cam_back") < ERROR
    assert any(report["cam_back"][:2] == (WARN, "missing from the newest set") for report in dead)
    words = "no image for "  # the newest report may be of a moment before
    player.stage.until(lambda: player.reports()[-1]["cam_back"][1].startswith(words))
    newest = player.reports()[-1]
    level, message, values = newest["cam_back"]
    assert level == ERROR and float(message.removeprefix(words).split()[0]) >= 2.0 and values["rate Hz"] == "0.0"
    whole = newest["occupancy"]
    assert whole[0] == WARN and "running without" in whole[1] and "cam_back" in whole[1]
    assert levels(player.play(rate, 0.5 * max(1.0, rate))[-1])["cam_back"] == OK


def test_a_pause_is_told_and_is_no_error_and_a_lap_begins_anew(player):
    player.play(1.0, 1.0)
    player.pause(3.0)
    player.stage.until(lambda: player.reports()[-1]["occupancy"][1].startswith("paused"))
    paused = player.reports()
    assert worst(paused) == WARN
    whole, front = paused[-1]["occupancy"], paused[-1]["cam_front"]
    assert whole[1].startswith("paused: /clock has stood still for ") and front[:2] == (OK, "paused")
    still = [report for report in paused if report["occupancy"][1].startswith("paused")]
    assert len({report["cam_front"][2]["age s"] for report in still}) == 1 and float(front[2]["age s"]) < 0.5
    assert worst(player.play(1.0, 0.5)) < ERROR
    lap = int(player.reports()[-1]["occupancy"][2]["lap"])
    player.turn_back()
    reports = player.play(2.0, 1.0 + 2.0 * SPEED)
    assert worst(reports) < ERROR, said(reports)
    for report in reports:
        assert all(0 <= float(report[name][2]["age s"]) < 2.0 for name in CAMERAS), report
        assert report["occupancy"][2]["TF age s"] == "none" or abs(float(report["occupancy"][2]["TF age s"])) < 1.0
    assert_true(reports[-1], player.rate)
    whole = reports[-1]["occupancy"][2]
    assert int(whole["lap"]) == lap + 1 and float(whole["active s"]) > 5.0
    assert 0.5 < float(whole["share of sets answered"]) <= 1.0


def test_a_second_node_of_the_same_name_is_a_warning_until_it_goes(player, capfd):
    def whole() -> str:
        player.play(1.0, 0.2)
        return player.reports()[-1]["occupancy"][1]

    player.stage.until(lambda: "nodes" not in whole())
    other = rclpy.create_node("occflow", context=player.stage.context)
    player.stage.until(lambda: "2 nodes are named /occflow" in whole())
    player.play(1.0, 0.5)
    assert capfd.readouterr().err.count("2 nodes are named") == 1
    other.destroy_node()
    player.stage.until(lambda: "nodes" not in whole())
