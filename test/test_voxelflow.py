"""VoxelFlow arrays: there and back is the identity, and broken messages are refused by name."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from occflow_core.geometry import Grid
from occflow_core.types import OCC3D, OPENOCC, Prediction
from occflow_core.voxelflow import NO_IMAGE, pack, unpack

GRID = Grid((-2.0, -1.2, -1.0), (0.4, 0.4, 0.4), (10, 6, 5))
CAMERAS = ["front", "left", "back"]


def prediction(seed=0, classes=OPENOCC, flow=True) -> Prediction:
    """Random labels; moving classes move at 1 to 3 m/s, all else stands still; scores are multiples of 1/255."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes.free + 1, GRID.shape, generator=rng, dtype=torch.uint8)
    filled = labels != classes.free
    score = torch.randint(1, 256, GRID.shape, generator=rng) / 255 * filled
    moving = torch.isin(labels, torch.tensor(classes.moving_ids, dtype=torch.uint8))
    velocity = (torch.rand(*GRID.shape, 2, generator=rng) + 1) * moving[..., None]
    mask = torch.rand(GRID.shape, generator=rng) < 0.5
    return Prediction(GRID, classes, labels, score.float(), velocity if flow else None, mask)


def message(fields: dict, low=GRID.low) -> SimpleNamespace:
    position = SimpleNamespace(x=low[0], y=low[1], z=low[2])
    return SimpleNamespace(origin=SimpleNamespace(position=position), **fields)


def packed(p: Prediction) -> dict:
    return pack(p, CAMERAS, [True, False, True], [0, None, 12_345], "opus-nano (untrained)")


@pytest.mark.parametrize("classes", [OCC3D, OPENOCC], ids=lambda c: c.table)
def test_there_and_back_is_the_identity(classes):
    before = prediction(1, classes)
    after = unpack(message(packed(before)))
    assert after.grid == before.grid and after.classes == before.classes
    for name in ("labels", "flow", "unobserved"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    assert torch.allclose(after.score, before.score, atol=1e-6)


def test_the_index_runs_along_x_first_then_y_then_z():
    labels = torch.full(GRID.shape, OCC3D.free, dtype=torch.uint8)
    labels[3, 0, 0], labels[0, 2, 0], labels[1, 4, 2] = 4, 7, 11
    fields = packed(Prediction(GRID, OCC3D, labels, (labels != OCC3D.free).float()))
    assert fields["index"].tolist() == [3, 10 * 2, 1 + 10 * (4 + 6 * 2)]
    assert fields["label"].tolist() == [4, 7, 11]


def test_the_readers_formula_of_the_readme_gives_the_voxels_centre():
    fields = packed(prediction(2))
    nx, ny, _ = fields["grid_size"].astype(int)
    i = fields["index"].astype(int)
    xyz = (np.stack([i % nx, i // nx % ny, i // (nx * ny)], 1) + 0.5) * fields["voxel_size"] + GRID.low
    cells, inside = GRID.index(torch.from_numpy(xyz))
    assert inside.all()
    assert torch.equal(prediction(2).labels[tuple(cells.T)], torch.from_numpy(fields["label"]))


def test_cameras_are_told_by_bits_and_ages():
    fields = packed(prediction())
    assert (fields["cameras_expected"], fields["cameras_used"]) == (0b111, 0b101)
    assert fields["camera_age_us"].tolist() == [0, NO_IMAGE, 12_345]


def test_only_moving_classes_above_the_speed_carry_a_velocity_and_nan_never_does():
    labels = torch.full(GRID.shape, OPENOCC.free, dtype=torch.uint8)
    flow = torch.zeros(*GRID.shape, 2)
    car, road = OPENOCC.id("car"), OPENOCC.id("driveable_surface")
    for x, (label, vx) in enumerate([(car, 2.0), (car, 0.1), (road, 5.0), (car, float("nan")), (car, -0.2)]):
        labels[x, 0, 0], flow[x, 0, 0, 0] = label, vx
    fields = packed(Prediction(GRID, OPENOCC, labels, (labels != OPENOCC.free).float(), flow))
    assert fields["flow_index"].tolist() == [0, 4]
    assert fields["flow_velocity"].tolist() == pytest.approx([2.0, 0.0, -0.2, 0.0])


def test_without_flow_or_mask_the_arrays_are_empty_not_zero():
    p = prediction(flow=False)
    fields = packed(Prediction(p.grid, p.classes, p.labels, p.score))
    assert fields["flow_index"].size == fields["flow_velocity"].size == fields["unobserved"].size == 0
    assert unpack(message(fields)).unobserved is None


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("index", [5, 3], "ascending"),
        ("index", [3, 300], "below 300"),
        ("label", [1, 2, 3], "as long as index"),
        ("flow_index", [2], "below 2"),
        ("flow_velocity", [1.0], "two numbers"),
        ("flow_velocity", [1.0, float("nan")], "finite"),
        ("unobserved", [0], "38 bytes"),
        ("label", [1, 16], "name in label_set"),
        ("label_set", "klingon", "label_set is one of"),
    ],
)
def test_a_broken_message_is_refused_by_name(field, value, rule):
    labels = torch.full(GRID.shape, OPENOCC.free, dtype=torch.uint8)
    labels[3, 0, 0] = labels[5, 0, 0] = 0
    flow = torch.zeros(*GRID.shape, 2)
    flow[3, 0, 0] = 1.0
    fields = packed(Prediction(GRID, OPENOCC, labels, (labels < 16).float(), flow, labels < 16))
    unpack(message(fields))
    with pytest.raises(ValueError, match=rule):
        unpack(message({**fields, field: value}))
