"""What the README shows works as it is shown."""

import re
from pathlib import Path

import numpy as np
import torch
from test_voxelflow import GRID, message, packed, prediction

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_ten_lines_of_python_load_a_model_and_step_it(capsys):
    (code,) = [s for s in snippets() if "load(" in s]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 10
    exec(compile(code.replace("pattern.drive(24)", "pattern.drive(2)"), "README.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "voxels" in said[0]


def test_the_numpy_reader_reads_what_we_write():
    (code,) = [s for s in snippets() if "def read(m)" in s]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    truth = prediction(3)
    centres, labels, confidence, velocity, unobserved = names["read"](message(packed(truth)))
    cells, inside = GRID.index(torch.from_numpy(centres))
    at = tuple(cells.T)
    assert inside.all() and len(at[0]) == int((truth.labels != truth.classes.free).sum())
    assert np.array_equal(labels, truth.labels[at])
    assert np.allclose(velocity, truth.flow[at]) and np.allclose(confidence, truth.score[at], atol=0.003)
    assert np.array_equal(unobserved, truth.unobserved.numpy())
    bare = packed(truth) | {"confidence": np.empty(0, np.uint8), "unobserved": np.empty(0, np.uint8)}
    _, _, confidence, _, unobserved = names["read"](message(bare))
    assert (confidence == 1).all() and unobserved is None


def test_every_file_of_the_map_exists_and_every_module_is_on_the_map():
    (tree,) = re.findall(r"## Map\n\n```\n(.*?)```", README, re.DOTALL)
    named = set(re.findall(r"[\w/]+\.(?:py|md|yaml)", tree))
    for package in ("occflow_core", "occflow_ros"):
        for path in (ROOT / package).rglob("*.py"):
            if not path.name.startswith("__") and not path.stem.endswith(("_numba", "_triton")):
                assert path.name in named, f"the README's map does not show {path.relative_to(ROOT)}"
    there = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts}
    missing = {Path(name).name for name in named} - there
    assert not missing, f"the README's map shows files that do not exist: {missing}"


def test_nothing_waits_to_be_filled_in_and_every_picture_is_there():
    assert not re.findall(r"^[A-Z]{3,}$", README, re.MULTILINE)
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / name).is_file(), name


def test_both_commands_stand_in_the_readme():
    assert "make demo" in README and "make test" in README
