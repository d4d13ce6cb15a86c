"""A data set in nuScenes' layout is read as it is: what stands in the tables and files comes out, or a sentence."""

import pytest
import torch
from data import layout

from occflow_core.data.nuscenes import NuScenes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return layout.write(tmp_path_factory.mktemp("world") / "data", scenes=2, keyframes=5, lidarseg=True)


@pytest.fixture(scope="module")
def world(root):
    return NuScenes(root, progress=False)


def test_a_keyframe_has_the_pictures_and_the_pose_of_its_tables(world):
    moment = world.keyframes("scene-0002")[3]
    frame = world.frame(moment)
    assert frame.stamp == (layout.BEGIN + 100_000_000 + 1_500_000) * 1000
    for camera, picture in enumerate(frame.images):
        expected = torch.tensor(layout.colour(camera, 18))[:, None, None]
        assert (picture.int() - expected).abs().max() <= 3, layout.CAMERAS[camera]
