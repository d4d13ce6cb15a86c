"""Engines on disk: found by what they were built from, whole or not there. No compiler is needed here."""

import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from occflow_core.runtime import cache
from occflow_core.runtime.cache import MANIFEST, Unfit, engine, key

FACTS = {"weights": "a" * 64, "config": {"refines": [1, 2]}, "device": "that one"}


class Builder:
    """Writes two files, the second with the number of the build, and counts."""

    def __init__(self):
        self.builds = 0

    def build(self, folder):
        assert list(folder.iterdir()) == []
        self.builds += 1
        (folder / "encoder.pt2").write_bytes(b"e" * 1000)
        (folder / "decoder.pt2").write_text(f"build {self.builds}")

    @staticmethod
    def use(folder):
        return (folder / "decoder.pt2").read_text()

    def __call__(self, folder, facts=FACTS):
        return engine(folder, facts, self.build, self.use)


@pytest.fixture
def builder():
    return Builder()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "engines"


def test_what_was_built_once_is_used_again(folder, builder, caplog):
    assert [builder(folder) for _ in range(3)] == ["build 1"] * 3
    assert builder.builds == 1 and caplog.messages == []
    assert sorted(p.name for p in (folder / key(FACTS)).iterdir()) == ["decoder.pt2", "encoder.pt2", MANIFEST]
    assert folder.stat().st_mode & 0o077 == 0, "engines are code: nobody else writes there"


def test_other_facts_are_another_engine_and_tuples_are_lists(folder, builder):
    assert builder(folder) == "build 1"
    assert builder(folder, FACTS | {"device": "another"}) == "build 2"
    assert builder(folder, FACTS | {"config": {"refines": (1, 2)}}) == "build 1"


def cut(place):
    (place / "encoder.pt2").write_bytes(b"e" * 999)


def spoil(place):
    (place / "encoder.pt2").write_bytes(b"e" * 999 + b"f")


def lose(place):
    (place / "encoder.pt2").unlink()


def no_json(place):
    (place / MANIFEST).write_text('{"facts": ')


def no_table(place):
    (place / MANIFEST).write_text("[]")


def no_manifest(place):
    (place / MANIFEST).unlink()


def foreign(place):
    told = json.loads((place / MANIFEST).read_text())
    (place / MANIFEST).write_text(json.dumps(told | {"facts": FACTS | {"device": "another car's"}}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut, "encoder.pt2 is not what was written"),
        (spoil, "encoder.pt2 is not what was written"),
        (lose, "encoder.pt2 cannot be read"),
        (no_json, "cannot be read"),
        (no_table, "cannot be read"),
        (no_manifest, "cannot be read"),
        (foreign, "built from something else (device)"),
    ],
)
def test_an_unfit_engine_is_built_again_once_with_one_line(folder, builder, caplog, change, words):
    builder(folder)
    change(folder / key(FACTS))
    assert [builder(folder) for _ in range(3)] == ["build 2"] * 3
    (line,) = caplog.messages
    assert words in line and "built again" in line


def test_an_engine_that_its_user_refuses_is_built_again_once_and_a_new_one_is_not_kept(folder, builder, caplog):
    builder(folder)

    def use(at):
        if Builder.use(at) == "build 1":
            raise Unfit("it says something else")
        return Builder.use(at)

    assert engine(folder, FACTS, builder.build, use) == "build 2" and len(caplog.messages) == 1
    never = pytest.raises(Unfit, match="never good")
    with never:
        engine(folder, {}, builder.build, lambda at: (_ for _ in ()).throw(Unfit("never good")))
    assert not (folder / key({})).exists()


def test_an_old_engine_stays_until_the_new_one_is_good(folder, builder):
    builder(folder)
    place = folder / key(FACTS)
    cut(place)
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    with pytest.raises(ZeroDivisionError):
        engine(folder, FACTS, lambda at: 1 / 0, Builder.use)
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
    assert builder(folder) == "build 2"


CHILD = """
import os, shutil, signal, sys
from pathlib import Path
from occflow_core.runtime import cache
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
def build(at):
    (at / "encoder.pt2").write_bytes(b"e" * 1000)
    (at / "decoder.pt2").write_text("the child's")
    {building}
{patch}
cache.engine(Path(sys.argv[1]), {facts!r}, build, lambda at: (at / "decoder.pt2").read_text())
"""
HALF = "cache.shutil.copytree = lambda a, b: (Path(b).mkdir(), shutil.copy(a / 'encoder.pt2', b), die())"
BETWEEN = "replace = os.replace; cache.os.replace = lambda a, b: die() if '.new' in str(a) else replace(a, b)"


def child(folder, building="pass", patch="", **how):
    code = textwrap.dedent(CHILD).format(building=building, patch=patch, facts=FACTS)
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], **how)


@pytest.mark.parametrize("there", [False, True], ids=["nothing there", "an unfit one there"])
@pytest.mark.parametrize(
    "when", [{"building": "die()"}, {"patch": HALF}, {"patch": BETWEEN}], ids=["building", "copying", "renaming"]
)
def test_a_process_killed_at_any_time_leaves_a_cache_that_works(folder, builder, when, there):
    if there:
        builder(folder)
        cut(folder / key(FACTS))
    assert child(folder, **when).wait(60) == -signal.SIGKILL
    count = builder.builds
    assert [builder(folder) for _ in range(2)] == [f"build {count + 1}"] * 2
    left = {p.name for p in folder.iterdir()}
    assert left == {key(FACTS), f".{key(FACTS)}.lock"}, "nothing half-made stays"


def test_two_processes_do_not_build_at_once(folder, builder, caplog, tmp_path):
    begun, go = tmp_path / "begun", tmp_path / "go"

    class Goes(logging.Handler):
        """Lets the child end what it builds once this process says that it waits."""

        def emit(self, record):
            if "waiting for another process" in record.getMessage():
                go.touch()

    # at most 60 s: where nobody says so, the test is to fail and not to wait for ever
    waits = f"import time; [time.sleep(0.02) for _ in range(3000) if not Path({str(go)!r}).exists()]"
    other = child(folder, building=f"Path({str(begun)!r}).touch(); {waits}")
    while not begun.exists():
        assert other.poll() is None
        time.sleep(0.02)
    goes = Goes()
    logging.getLogger("occflow").addHandler(goes)
    try:
        assert builder(folder) == "the child's" and builder.builds == 0
    finally:
        logging.getLogger("occflow").removeHandler(goes)
        go.touch()
    assert other.wait(60) == 0 and "waiting for another process" in caplog.text


def test_with_a_new_engine_those_go_that_nobody_asked_for_in_a_long_time(folder, builder):
    facts = [FACTS | {"device": name} for name in ("old", "used", "held", "new")]
    for each in facts[:3]:
        builder(folder, each)
    long_ago = time.time() - (cache.UNUSED + 1) * 86400
    for each in facts[:3]:
        os.utime(folder / key(each), (long_ago, long_ago))
    builder(folder, facts[1])
    with cache._lock(folder, key(facts[2])).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builder(folder, facts[3])
    assert [(folder / key(each)).exists() for each in facts] == [False, True, True, True]


def test_without_locks_an_engine_is_built_for_the_process_alone(folder, builder, caplog, monkeypatch):
    """As on some file systems of a network."""

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache.fcntl, "flock", none)
    assert [builder(folder) for _ in range(2)] == ["build 1", "build 2"]
    assert all("No locks available; the engine is built for this process alone" in line for line in caplog.messages)


def test_a_cache_that_cannot_be_written_is_said_and_the_engine_works(tmp_path, builder, caplog):
    (tmp_path / "file").touch()
    assert builder(tmp_path / "file" / "engines") == "build 1"
    (line,) = caplog.messages
    assert "for this process alone" in line


def test_a_full_disk_is_said_and_the_engine_works(folder, builder, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.shutil, "copytree", full)
    assert builder(folder) == "build 1"
    (line,) = caplog.messages
    assert "No space left" in line and "next start" in line
    monkeypatch.undo()
    assert builder(folder) == "build 2" == builder(folder)


def test_a_cache_that_others_may_write_is_not_used(folder, builder, caplog):
    builder(folder)
    folder.chmod(0o777)
    assert builder(folder) == "build 2" and "others may write it" in caplog.text


def test_the_users_cache_directory_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.home() == tmp_path / "occflow" / "engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache.home() == tmp_path / "me" / ".cache" / "occflow" / "engines"


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.WARNING, logger="occflow")
