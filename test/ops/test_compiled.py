"""A loop is compiled once on a machine, also where processes ask for it at the same moment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

from occflow_core.ops import compiled_numba

LOOP = """
import math, sys, time
from pathlib import Path
from compiled_numba import compiled  # by its folder: without PyTorch it begins at once

@compiled
def inner(x):
    return math.sin(x) + math.sqrt(abs(x)) ** 1.5

@compiled
def loop(n):
    total = 0.0
    for i in range(n):
        total += inner(i * 0.5) * math.exp(-i / n) + (i % 7) ** 3 // (1 + i % 3)
    return total

if __name__ == "__main__":
    mine = Path(sys.argv[1])
    mine.touch()
    while len(list(mine.parent.glob("ready*"))) < int(sys.argv[2]):  # all begin together
        time.sleep(0.001)
    total = loop(1000)
    print(sum(loop.stats.cache_misses.values()), sum(loop.stats.cache_hits.values()), total)
"""


def said(folder: Path, processes: int) -> list[list[str]]:
    """Misses, hits and result of each."""
    (folder / "loop.py").write_text(LOOP)
    for ready in folder.glob("ready*"):
        ready.unlink()
    beside = Path(compiled_numba.__file__).parent
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(beside)}
    command = [sys.executable, str(folder / "loop.py")]
    running = [
        subprocess.Popen([*command, str(folder / f"ready{i}"), str(processes)], env=environment, stdout=subprocess.PIPE)
        for i in range(processes)
    ]
    return [process.communicate(timeout=100)[0].decode().split() for process in running]


def test_processes_that_begin_together_compile_once_and_share_it(tmp_path):
    first = said(tmp_path, 2)
    assert sorted(words[:2] for words in first) == [["0", "1"], ["1", "0"]]
    assert len({words[2] for words in first}) == 1
    assert said(tmp_path, 1) == [["0", "1", first[0][2]]], "and keep it"


def test_without_a_place_for_the_lock_work_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    with compiled_numba._held(tmp_path / "file" / "below" / "lock"):
        pass
