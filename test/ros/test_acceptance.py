"""Short forms of the acceptance checks, and that the README tells of the same ones."""

import re
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from acceptance import checks, run  # noqa: E402

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


@pytest.mark.dds
@pytest.mark.parametrize(
    ("check", "less"),
    [
        (checks.dead_camera, {"domain": 81, "cameras": ("cam_back",), "dead": 21, "back": 6, "spared": 2}),
        (checks.random_loss, {"domain": 82, "sweeps": 60, "share": 0.05, "spared": 2}),
        (checks.laps, {"domain": 83, "sweeps": 24, "silent": 1.0, "count": 2}),
        (checks.overload, {"domain": 84, "seconds": 5.0, "slack": 0.5}),
        (checks.soak, {"domain": 85, "sets": 300, "growth": 0.03, "spared": 2}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_short_form_is_reached(check, less):
    outcome = check(**less)
    assert outcome.reached, outcome


def test_the_readme_has_a_row_for_each_check_with_the_same_words():
    _, _, section = README.partition("## What was checked")
    rows = re.findall(
        r"^\| ([^|]+?) \| ([^|]+?) \| [^|]+ \| ([^|]+?) \| ([^|]+?) \|$", section.partition("\n## ")[0], re.M
    )
    rows = [row for row in rows if row[0] != "#"]
    assert [row[:3] for row in rows] == [(c.number, c.what, c.best) for c in run.CHECKS]
    assert {row[3] for row in rows} <= set(run.WORDS.values())


def test_what_breaks_is_missed_told_and_stops_nothing(tmp_path, monkeypatch, capsys):
    def breaks() -> checks.Outcome:
        raise RuntimeError("no such | thing")

    three = [
        run.Check("1", "breaks", "nobody", breaks),
        run.Check("2", "holds", "nobody", lambda: checks.Outcome("fine", True, {"n": 1})),
        run.Check("3", "is not here", "nobody", lambda: checks.Outcome("no GPU", None)),
    ]
    monkeypatch.setattr(run, "CHECKS", three)
    assert run.main(["--out", str(tmp_path / "all")]) == 1
    table = (tmp_path / "all" / "table.md").read_text()
    assert "| 1 | breaks | broke: RuntimeError: no such / thing | nobody | **no** |" in table
    assert "| 2 | holds | fine | nobody | yes |" in table and "| no GPU | nobody | not measured |" in table
    assert "cores" in table and '"reached": false' in (tmp_path / "all" / "figures.json").read_text()
    assert run.main(["--out", str(tmp_path / "some"), "--only", "2,3"]) == 0
    with pytest.raises(SystemExit):
        run.main(["--only", "7"])
    assert "no check 7" in capsys.readouterr().err
