"""OPUS, OPUS-V2, OPUS-V1-Fusion and SparseOcc at every published size: built, filled from tensors laid out as
published, and run forward and backward with two small pictures a camera."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from systems import small, small_fusion, small_sparse, small_v2
from systems.rig import cloud, frame
from torch.utils.checkpoint import checkpoint

from occflow_core.geometry import OCC3D_GRID, OPENOCCUPANCY_GRID
from occflow_core.systems import SYSTEMS
from occflow_core.systems.base import load_strictly
from occflow_core.systems.sparseocc import SparseOcc
from occflow_core.types import Clip, Occupancy

LAYOUT = {
    "opus": (small.authors_tensors, 627),
    "opus-v2": (small_v2.authors_tensors, 674),
    "opus-fusion": (small_fusion.authors_tensors, 838),
    "sparseocc": (small_sparse.authors_tensors, 462),
}
FIRST = (
    6  # tensors more in the first generation of SparseOcc: on each scale it tells what is filled by a head of its own
)
NUMBERS = {  # of parameters, counted from the authors' modules
    "opus": {"tiny": 77_707_068, "small": 73_804_692, "medium": 73_466_572, "large": 73_391_532},
    "opus-v2": {
        "tiny": 71_158_349,
        "small": 67_294_929,
        "medium": 66_717_799,
        "large": 66_434_634,
        "tiny-openoccupancy": 71_149_704,
        "small-openoccupancy": 67_286_284,
        "medium-openoccupancy": 66_709_154,
        "large-openoccupancy": 66_425_989,
    },
    "opus-fusion": {"tiny": 89_406_852, "small": 75_587_508, "medium": 75_245_788, "large": 75_163_548},
    "sparseocc": {
        **dict.fromkeys(("8f", "8f-pano", "v1.0-8f", "v1.0-8f-pano", "512"), 80_349_899),  # 17 + 1 is 18
        "16f": 115_820_235,
    },
}
SIZES = ("tiny", "small", "medium", "large")


def test_these_are_all_that_are_as_published():
    theirs = {name: {p for p, c in made.PRESETS.items() if c.as_published} for name, made in SYSTEMS.items()}
    ours = {name: presets for name, presets in theirs.items() if presets}  # a test's own system may be among them
    assert ours == {name: set(presets) for name, presets in NUMBERS.items()}


@pytest.mark.parametrize("system, preset", [(s, p) for s, presets in NUMBERS.items() for p in presets])
def test_tensors_laid_out_as_published_fill_every_size(system, preset):
    made, (authors_tensors, count) = SYSTEMS[system], LAYOUT[system]
    config = made.PRESETS[preset]
    with torch.device("meta"):
        empty = made(config)
        theirs = {name: torch.empty(shape) for name, shape in authors_tensors(config).items()}
    count += FIRST * preset.startswith("v1.0")
    assert len(theirs) == count
    assert sum(p.numel() for p in empty.parameters()) == NUMBERS[system][preset]
    theirs |= empty.constants()
    assert len(theirs) == count
    load_strictly(empty, theirs, made.NAMES, empty.constants())
    last = (opus_is_as_published if system.startswith("opus") else sparseocc_is_as_published)(system, preset, empty)

    theirs[last] = torch.empty(len(theirs[last]) + 3, device="meta")
    del theirs["img_neck.fpn_convs.3.conv.bias"]
    with pytest.raises(ValueError, match=rf"shape: {last}: .*\n  missing here: neck.output.3.bias$"):
        load_strictly(empty, theirs, made.NAMES, empty.constants())


def opus_is_as_published(system, preset, net) -> str:
    """Returns the last bias of the authors'."""
    config = net.config
    grid = OPENOCCUPANCY_GRID if preset.endswith("openoccupancy") else OCC3D_GRID
    assert config.grid == grid and config.threshold == (0.25 if system == "opus-v2" else 0.5)
    assert config.queries * config.refines[-1] == 76_800
    if system == "opus-fusion":
        assert sum(p.numel() for p in net.lidar.parameters()) == 8_451_024
    return f"pts_bbox_head.transformer.decoder.decoder_layers.{len(config.refines) - 1}.reg_branch.4.bias"


def sparseocc_is_as_published(system, preset, net) -> str:
    """Returns the last bias of the authors'."""
    config, first = net.config, preset.startswith("v1.0")
    assert (config.grid, config.classes, config.threshold, config.queries) == (OCC3D_GRID, "occ3d-nuscenes", 0.3, 100)
    assert config.iterations == (4 if first else 2) and config.kept == (2000, 8000, 32000)
    assert config.kept_in_training == ((2000, 8000, 32000) if first else (4000, 16000, 64000))
    assert config.panoptic == preset.endswith("pano")
    assert (config.height, config.width) == ((512, 1408) if preset == "512" else (256, 704))
    if config.frames == 8:
        masks = sum(
            p.numel() for name, p in net.masks.named_parameters() if not name.startswith(("begin.", "position."))
        )
        assert masks == 17_436_801
        for scale, number in zip(net.scales, (17_436_536, 10_069_824, 6_910_236), strict=True):
            heads = ("lift.", "filled.", "name.")
            assert sum(p.numel() for name, p in scale.named_parameters() if not name.startswith(heads)) == number
            assert sum(p.numel() for p in scale.lift.parameters()) == 526_336
    return "pts_bbox_head.transformer.decoder.decoder_layer.classifier.bias"


@pytest.mark.parametrize("preset", ["8f", "v1.0-8f"])
def test_tensors_of_sparseocc_tell_their_generation_and_with_it_what_they_do_not_hold(preset):
    config = SparseOcc.PRESETS[preset]
    theirs = dict.fromkeys(small_sparse.authors_tensors(config))
    for begin in ("8f", "v1.0-8f"):
        assert SparseOcc.adapted(SparseOcc.PRESETS[begin], theirs) == config


def said_and_lost(net, filled):
    """What a network says of two times, and its losses where that many voxels are filled."""
    generator, config = torch.Generator().manual_seed(0), net.config
    now, before = (frame(64, 176, n=6, at=at, seed=i) for i, at in enumerate((0.5, 0.0)))
    now = replace(now, points=cloud(generator, scans=2, points=6000))
    output, _ = net(Clip.of([now, before]), None)

    labels = torch.full((1, *config.grid.shape), config.table.free, dtype=torch.uint8)
    where = tuple(torch.randint(0, n, (filled,), generator=generator) for n in config.grid.shape)
    labels[0, where[0], where[1], where[2]] = torch.randint(0, 17, (filled,), generator=generator).to(torch.uint8)
    return output, net.loss(output, Occupancy(config.grid, config.table, labels, None, labels < config.table.free))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "size", [pytest.param(s, marks=pytest.mark.big) if s in ("medium", "large") else s for s in SIZES]
)
@pytest.mark.parametrize("system", [name for name in LAYOUT if name.startswith("opus")])
def test_every_size_learns_from_what_it_says(system, size):
    """Two times of 64x176, every other number as published."""
    torch.manual_seed(0)
    made = SYSTEMS[system]
    config = replace(made.PRESETS[size], frames=2, height=64, width=176)
    net = made(config).train()
    if size in ("medium", "large"):
        for layer in net.layers:  # computed again for its gradients: it keeps matrices of (heads, Q, Q) numbers
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    output, terms = said_and_lost(net, 500)
    assert [tuple(points.shape) for points in output.points] == [(1, config.queries, p, 3) for p in config.refines]
    assert all(term.isfinite() and term > 0 for term in terms.values())
    sum(terms.values()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        # one point has no spread, so that its offsets cannot matter; OPUS-V2's are in metres
        alone = [i for i, points in enumerate((1, *config.refines)) if points == 1 and system != "opus-v2"]
        silent = name in {f"layers.{i}.sampling.offset.{kind}" for i in alone for kind in ("weight", "bias")}
        assert p.grad.any() != silent, name


def in_parts(mixing, sampled, query):
    """A mixing of 2000 voxels at a time, computed again for its gradients: each voxel makes matrices of its own."""
    parts = zip(sampled.split(2000, dim=1), query.split(2000, dim=1), strict=True)
    return torch.cat([checkpoint(mixing, *part, use_reentrant=False) for part in parts], dim=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", ["v1.0-8f", pytest.param("8f", marks=pytest.mark.big)])  # it keeps twice as many
def test_both_generations_learn_from_what_they_say(preset):
    """Two times of 64x176, every other number as published."""
    torch.manual_seed(0)
    net = SparseOcc(replace(SparseOcc.PRESETS[preset], frames=2, height=64, width=176)).train()
    for scale in net.scales:
        scale.mixing.forward = partial(in_parts, scale.mixing.forward)
    output, terms = said_and_lost(net, 5000)
    assert [tuple(kept.where.shape) for kept in output.kept] == [(1, k, 3) for k in net.config.kept_in_training]
    assert all(term.isfinite() and term > 0 for term in terms.values())
    sum(terms.values()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
