"""What OPUS-V1-Fusion does beyond the contract (`test/contract`) and beyond OPUS' decoder (`test_opus.py`)."""

from dataclasses import replace

import pytest
import torch
from systems.rig import drive, frame
from systems.small_fusion import CONFIG, authors_checkpoint, build

from occflow_core.geometry import Grid
from occflow_core.nn import BACKBONES
from occflow_core.runtime import Model, Stream, convert, load
from occflow_core.systems import opus_fusion
from occflow_core.systems.base import load_strictly
from occflow_core.types import Clip

# ---- weights


def test_a_checkpoint_of_theirs_becomes_a_file_of_ours(tmp_path, monkeypatch):
    monkeypatch.setitem(opus_fusion.PRESETS, "tiny", CONFIG)
    theirs = authors_checkpoint(CONFIG)
    torch.save({"state_dict": theirs, "meta": {"epoch": 100}}, tmp_path / "theirs.pth")
    convert.convert("opus-fusion-tiny", tmp_path / "theirs.pth", tmp_path / "ours.safetensors")
    model = load("opus-fusion-tiny", tmp_path / "ours.safetensors")
    assert model.trained and model.resize == "pillow"
    kernel = model.system.state_dict()["lidar.encoder.encoder_layers.encoder_layer3.2.0.weight"]
    assert torch.equal(kernel, theirs["pts_middle_encoder.encoder_layers.encoder_layer3.2.0.weight"])


def test_a_checkpoint_that_lacks_a_tensor_or_is_of_another_grid_is_refused():
    theirs, system = authors_checkpoint(CONFIG), build()
    load_strictly(system, theirs, opus_fusion.NAMES, system.constants())
    del theirs["final_conv.conv.bias"]
    theirs["pts_bbox_head.voxel_num"] = torch.tensor([200, 200, 16])
    with pytest.raises(ValueError, match=r"differs: pts_bbox_head.voxel_num(?s:.)*missing here: lidar.out.bias"):
        load_strictly(system, theirs, opus_fusion.NAMES, system.constants())


# ---- points


def test_queries_begin_at_points_of_the_newest_scan_that_lie_far_apart():
    system, now = build(), frame()
    scans = system._scans(now.points)
    begin = opus_fusion._begin(scans, 60)
    newest = now.points[now.points[:, 4] == 0][:, :3]
    assert torch.equal(begin[0], newest[0])
    at = (begin[:, None] == newest).all(-1)
    assert at.any(1).all() and len(at.int().argmax(1).unique()) == 60
    # every point is nearer to one of them than they are to each other
    apart = torch.cdist(begin, begin).fill_diagonal_(torch.inf).min()
    assert torch.cdist(newest, begin).amin(1).max() <= apart + 1e-5


def test_ages_count_from_the_newest_scan_and_older_ones_than_asked_for_are_left_out():
    system, now = build(replace(CONFIG, sweeps=2)), frame()
    late = now.points.clone()
    late[:, 4] += 0.033  # the newest picture came after the newest scan
    for points in (now.points, late):
        scans = system._scans(points)
        assert scans[:, 4].unique().tolist() == pytest.approx([0.0, 0.05]) and scans[0, 4] == 0
        assert len(scans) == 600
    slow = now.points.clone()
    slow[:, 4] *= 8.0  # scans of 2.5 Hz: the third is 0.8 s old
    assert system._scans(slow)[:, 4].unique().tolist() == pytest.approx([0.0, 0.4])
    assert build(replace(CONFIG, sweeps=9))._scans(slow)[:, 4].amax() == pytest.approx(0.4)
    outside = now.points.clone()
    outside[5, 2] = 5.5  # above the grid
    outside[6, 0] = -12.0  # on its border
    assert len(system._scans(outside)) == 598


def test_scans_that_cannot_begin_anything_are_refused():
    system, now = build(), frame()
    with pytest.raises(ValueError, match="brings no LiDAR points"):
        system(Clip.of(replace(now, points=None)), None)
    with pytest.raises(ValueError, match="brings no LiDAR point;"):
        system(Clip.of(replace(now, points=now.points[:0])), None)
    away = now.points.clone()
    away[away[:, 4] == 0, 2] = 50.0
    with pytest.raises(ValueError, match="no point of the newest LiDAR scan lies inside the grid"):
        system(Clip.of(replace(now, points=away)), None)
    for shape in ((25, 20, 8), (24, 21, 8)):
        with pytest.raises(ValueError, match="even along x and y"):
            replace(CONFIG, grid=Grid((-12.0, -10.0, -1.0), (1.0, 1.0, 0.8), shape))


def test_a_stream_that_meets_a_frame_without_points_says_so_and_goes_on_afterwards():
    stream, frames = Stream(Model(build(), "fusion", True, "fast", None)), drive(3, every=0.5)
    stream.step(frames[0])
    memory = stream.memory
    with pytest.raises(ValueError, match="LiDAR"):
        stream.step(replace(frames[1], points=None))
    assert stream.memory is memory
    assert stream.step(frames[2]).labels.shape == CONFIG.grid.shape


def test_warming_up_brings_points():
    stream = Stream(Model(build(), "fusion", True, "fast", None))
    stream.warm_up(["front", "back"], 64, 96)
    assert stream.memory is None


# ---- the map


def test_the_map_lies_under_the_grid():
    """A point's features are found where the point is: along y and x, row by column."""
    lidar = build().lidar
    for p in lidar.parameters():
        p.data.abs_()  # so that nothing is lost on the way
    points = torch.tensor([[-5.5, 4.5, 0.4, 30.0, 0.0]])  # in voxel 6, 14
    with torch.no_grad():
        change = (lidar([points]) - lidar([points[:0]])).sum((0, 1))
    row, column = (change == change.max()).nonzero()[0].tolist()
    assert change.shape == (20, 24) and change.max() > 0
    assert abs(row - 14) <= 1 and abs(column - 6) <= 1


@pytest.mark.parametrize("published", [True, False])
def test_the_decoder_looks_into_every_picture_and_once_into_the_map(published):
    """Values, one number at a time: bilinear, zero beyond the map, each group in its own channels."""
    torch.manual_seed(0)
    b, q, g, s, c, grid = 2, 5, 4, 3, 4, CONFIG.grid
    above = torch.randn(b, g * c, grid.shape[1], grid.shape[0], dtype=torch.float64)
    points = (torch.rand(b, q, g, s, 3, dtype=torch.float64) - 0.5) * torch.tensor([26.0, 22.0, 8.0])

    class Pictures:
        def sample(self, points, weights, as_published):
            return torch.full((b, q, g, 8 * s, c), 5.0, dtype=torch.float64)

    found = opus_fusion._View(Pictures(), above, grid).sample(points, None, published)
    assert found.shape == (b, q, g, 9 * s, c) and (found[..., : 8 * s, :] == 5).all()
    size = torch.tensor([grid.shape[0], grid.shape[1]], dtype=torch.float64)
    for i in range(b):
        for j in range(q):
            for k in range(g):
                for m in range(s):
                    unit = grid.unit(points[i, j, k, m])[:2]
                    x, y = (unit * (size - 1) if published else unit * size - 0.5).tolist()
                    expected = torch.zeros(c, dtype=torch.float64)
                    for row in range(grid.shape[1]):
                        for column in range(grid.shape[0]):
                            share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                            if share:
                                expected += share * above[i, k * c : (k + 1) * c, row, column]
                    assert torch.allclose(found[i, j, k, 8 * s + m], expected, atol=1e-9)


def test_lidar_matters_and_so_does_what_was_before():
    system, now = build(), frame()
    with torch.no_grad():
        said = system(Clip.of(now), None)[0].points[-1]
        alone = now.points[now.points[:, 4] == 0]
        newest = system(Clip.of(replace(now, points=alone)), None)[0].points[-1]
        moved = system(Clip.of(replace(now, points=now.points + 0.3)), None)[0].points[-1]
    assert (said - newest).abs().max() > 1e-6 and (said - moved).abs().max() > 1e-2


def test_published_sizes_are_built_of_known_backbones():
    assert {config.backbone for config in opus_fusion.PRESETS.values()} <= BACKBONES.keys()
    assert all(
        config.mixed == config.samples * (config.frames + 1)
        for config in opus_fusion.PRESETS.values()
        if config.as_published
    )
