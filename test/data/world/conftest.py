"""One small world for all tests of the world."""

from pathlib import Path

import pytest
from data.world.small import ARGUMENTS, KEYFRAMES, SEED, SIZE

from occflow_core.data.world import rig, scene, write_world


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world") / "a", 1, processes=1, **ARGUMENTS)


@pytest.fixture(scope="session")
def world() -> scene.World:
    """The generator's own knowledge of the same scene."""
    return scene.World(scene.Plan(SEED, 0, KEYFRAMES, rig.nuscenes().resized(*SIZE), "clear", True))
