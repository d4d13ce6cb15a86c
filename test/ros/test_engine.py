"""The node with an engine: a small network, built as a package by its real compiler, answers a car over real DDS.

Building takes tens of seconds, so it happens once; what is built again afterwards is a copy of it.
"""

import json
import os
import shutil

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

from rclpy.lifecycle import TransitionCallbackReturn as Result  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from ros.fake import Stage  # noqa: E402
from systems import small  # noqa: E402

from occflow_core.runtime import Model, backends  # noqa: E402
from occflow_core.runtime.cache import MANIFEST  # noqa: E402
from occflow_core.types import NANO  # noqa: E402
from occflow_ros import node  # noqa: E402

pytestmark = [pytest.mark.dds, pytest.mark.slow, pytest.mark.timeout(400)]
DOMAIN = 86 + os.getpid() % 10  # of this process alone, so that parallel runs do not hear each other


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def driven(home):
    """A stage whose node was configured with `backend: aot` and an empty cache."""
    with pytest.MonkeyPatch.context() as patch, Stage(patch, DOMAIN, backend="aot") as stage:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setattr(node, "load", lambda *_, **__: Model(small.build(small.BRIEF), "opus-small", True, "fast", None))
        yield stage.start()


def folder(home):
    """Of the one engine in the cache."""
    (found,) = [path for path in (home / "occflow/engines").iterdir() if path.is_dir()]
    return found


def lines(stage) -> list[str]:
    return [line for line in stage.heard.lines if "engine" in line]


def test_it_is_built_once_says_so_and_drives(driven, home):
    assert [line.startswith("building the aot engine of opus-small, once") for line in lines(driven)] == [True]
    assert driven.said("opus-small: aot ready after")
    for _ in range(3):
        assert driven.answer(period=0.5).cameras_used == 0b111111
    assert len(driven.heard.messages[-1].index) > 0, "a network that says nothing is compared with nothing"
    driven.until(lambda: driven.status()[2].get("backend") == "aot")
    assert sorted(path.name for path in folder(home).iterdir()) == ["decoder.pt2", "encoder.pt2", MANIFEST]


def test_it_says_what_eager_says(driven):
    def drive(backend):
        driven.stamp += 100 * NANO
        driven.again(backend=backend)
        driven.car.sent = 0  # the same pictures
        told = [driven.answer(period=0.5) for _ in range(3)]
        return [(list(m.index), list(m.label)) for m in told]

    engine, eager = drive("aot"), drive("eager")
    for (index, label), (expected_index, expected_label) in zip(engine, eager, strict=True):
        mine, theirs = dict(zip(index, label, strict=True)), dict(zip(expected_index, expected_label, strict=True))
        other = {voxel for voxel in mine.keys() | theirs.keys() if mine.get(voxel) != theirs.get(voxel)}
        assert len(other) <= 0.01 * len(theirs)


def test_the_next_start_takes_what_is_there(driven, monkeypatch):
    monkeypatch.setattr(backends, "build_aot", lambda *_: pytest.fail("it is built again"))
    driven.stamp += 100 * NANO
    driven.again(backend="aot")
    assert lines(driven) == []
    driven.answer()


def truncated(at):
    package = at / "decoder.pt2"
    package.write_bytes(package.read_bytes()[: package.stat().st_size // 2])


def foreign(at):
    """Somebody else's bytes, of the same length."""
    package = at / "encoder.pt2"
    package.write_bytes(bytes(package.stat().st_size))


def stale(at):
    """Of another version, as it would be after an update if the name did not tell."""
    manifest = json.loads((at / MANIFEST).read_text())
    manifest["facts"]["versions"]["torch"] = "1.0"
    (at / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (truncated, "decoder.pt2 is not what was written"),
        (foreign, "encoder.pt2 is not what was written"),
        (stale, "it was built from something else (versions)"),
    ],
)
def test_one_that_does_not_do_is_built_again_once_and_said_in_one_line(
    driven, home, tmp_path, monkeypatch, broken, words
):
    good, builds = tmp_path / "good", []
    shutil.copytree(folder(home), good)

    def build(parts, into):
        builds.append(into)
        for part in parts.modules:
            shutil.copy(good / f"{part}.pt2", into)

    monkeypatch.setattr(backends, "build_aot", build)
    broken(folder(home))
    driven.stamp += 100 * NANO
    driven.again(backend="aot")
    about = [line for line in lines(driven) if words in line]
    assert len(about) == 1 and about[0].endswith("it is built again") and len(builds) == 1
    driven.answer()
    driven.stamp += 100 * NANO
    driven.again(backend="aot")
    assert len(builds) == 1 and lines(driven) == [], "once"
    driven.answer()


def test_a_backend_that_cannot_be_had_is_one_sentence_and_the_next_configure_drives(driven):
    driven.unconfigure()
    driven.heard.lines.clear()
    driven.node.set_parameters([Parameter("backend", value="tensorrt")])
    assert driven.node.trigger_configure() == Result.FAILURE
    assert driven.said("configure failed: backend tensorrt needs an NVIDIA GPU, the model is on cpu")
    driven.stamp += 100 * NANO
    driven.again(backend="aot")
    driven.answer()
