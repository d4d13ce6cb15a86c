"""The nouns refuse what they are not, naming what came; a Clip tells motion and age as they were."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from occflow_core.data import pattern
from occflow_core.geometry import Cameras, Grid, rigid
from occflow_core.types import OCC3D, OPENOCC, Classes, Clip, Occupancy, Prediction

GRID = Grid((-2.0, -2.0, -1.0), (0.4, 0.4, 0.4), (10, 10, 5))


@pytest.fixture(scope="module")
def frames():
    return list(pattern.drive(5, height=36, width=64))


# ---- classes


def test_the_tables_are_those_of_the_data_sets():
    assert len(OCC3D.names) == OCC3D.free == 17 and len(OPENOCC.names) == OPENOCC.free == 16
    assert OCC3D.names[0] == "others" and OCC3D.id("car") == 4 and OCC3D.id("driveable_surface") == 11
    assert OPENOCC.names[0] == "car" and OPENOCC.id("vegetation") == 15
    for table in (OCC3D, OPENOCC):
        assert {table.names[i] for i in table.moving_ids} == set(table.moving) and len(table.moving) == 8
        assert table.colours[table.id("car")] == (255, 158, 0)


def test_a_table_that_contradicts_itself_is_refused():
    for names, moving, colours in (
        (("a", "a"), (), ((0, 0, 0),) * 2),
        (("a", "b"), ("c",), ((0, 0, 0),) * 2),
        (("a", "b"), (), ((0, 0, 0),)),
    ):
        with pytest.raises(ValueError, match="classes mine"):
            Classes("mine", names, moving, colours)


# ---- frames


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: {"images": f.images.float()}, r"must be \(N, 3, H, W\) uint8, got \(6, 3, 36, 64\) float32"),
        (lambda f: {"images": f.images[0]}, r"got \(3, 36, 64\) uint8"),
        (lambda f: {"images": f.images[:5]}, r"5 pictures of 64 x 36 with cameras \(6,\)"),
        (lambda f: {"images": f.images[:, :, :30]}, r"6 pictures of 64 x 30 with cameras \(6,\) of 64 x 36"),
        (lambda f: {"used": f.used[:5]}, r"used: expected \(6,\) bool, got \(5,\) bool"),
        (lambda f: {"used": f.used.int()}, r"used: expected \(6,\) bool, got \(6,\) int32"),
        (lambda f: {"stamps": f.stamps.double()}, r"stamps: expected \(6,\) int64, got \(6,\) float64"),
        (lambda f: {"world_from_car": f.world_from_car.float()}, r"expected \(4, 4\) float64, got \(4, 4\) float32"),
        (lambda f: {"names": f.names[:5] + f.names[:1]}, "6 different camera names"),
        (lambda f: {"world_from_car": f.world_from_car * float("nan")}, "rigid motions"),
        (lambda f: {"points": torch.zeros(7, 3)}, r"x y z intensity age, got \(7, 3\)"),
    ],
)
def test_a_frame_refuses_what_does_not_fit_and_says_what_came(frames, change, says):
    with pytest.raises(ValueError, match=says):
        replace(frames[0], **change(frames[0]))


def test_a_frame_refuses_a_camera_whose_place_is_not_a_motion(frames):
    cameras = frames[0].cameras
    scaled = cameras.car_from_camera.clone()
    scaled[2, :3, :3] *= 1.5
    with pytest.raises(ValueError, match="rigid motions"):
        replace(frames[0], cameras=replace(cameras, car_from_camera=scaled))


def test_what_you_hold_does_not_change_under_you(frames):
    with pytest.raises(dataclasses.FrozenInstanceError):
        frames[0].stamp = 0


# ---- clips


def test_a_clip_tells_where_the_car_was_and_how_long_ago(frames):
    window = frames[3::-1]
    clip = Clip.of(window)
    assert clip.images.shape == (1, 4, 6, 3, 36, 64) and clip.images.dtype == torch.uint8
    assert torch.equal(clip.now_from_then[0, 0], torch.eye(4)) and clip.age[0, 0] == 0
    for t, then in enumerate(window):
        assert clip.age[0, t].item() == pytest.approx((window[0].stamp - then.stamp) / 1e9, abs=1e-6)
        # a fixed point of the world, told in both car frames
        world = torch.tensor([[70.0, 5.0, 1.0]], dtype=torch.float64)
        there = rigid.apply(rigid.inverse(then.world_from_car), world).float()
        now = rigid.apply(rigid.inverse(window[0].world_from_car), world).float()
        assert torch.allclose(rigid.apply(clip.now_from_then[0, t], there), now, atol=1e-4)
    assert torch.equal(clip.used[0, 2], window[2].used)
    assert torch.allclose(clip.cameras.car_from_camera[0, 1], window[1].cameras.car_from_camera.float())


def test_relative_motion_is_exact_far_from_the_maps_origin(frames):
    """Poses are float64 until relative: 100 km away nothing may change but the last digits."""
    far = torch.eye(4, dtype=torch.float64)
    far[:2, 3] = 1e5
    window = frames[2::-1]
    near = Clip.of(window).now_from_then
    away = Clip.of([replace(f, world_from_car=far @ f.world_from_car) for f in window]).now_from_then
    assert (near - away).abs().max() < 1e-6


def test_a_fresh_lane_knows_nothing_of_the_last_clip(frames):
    fresh, follows = Clip.of(frames[1]), Clip.of(frames[1], after=frames[0])
    assert fresh.fresh.tolist() == [True] and follows.fresh.tolist() == [False]
    assert fresh.now_from_last.isnan().all() and fresh.since_last.isnan().all()
    moved = rigid.inverse(frames[1].world_from_car) @ frames[0].world_from_car
    assert torch.allclose(follows.now_from_last[0], moved.float())
    assert follows.now_from_last[0, 0, 3] < -0.5, "the car drove ahead: then lies behind now"
    assert follows.since_last.item() == pytest.approx(1 / 12, abs=1e-3)


def test_a_batch_is_its_clips_side_by_side(frames):
    clips = [Clip.of(frames[1::-1]), Clip.of(frames[2:0:-1], after=frames[0])]
    batch = Clip.batch(clips)
    for b, clip in enumerate(clips):
        for field in dataclasses.fields(Clip):
            together, alone = getattr(batch, field.name), getattr(clip, field.name)
            if isinstance(alone, torch.Tensor):
                assert torch.equal(together[b].nan_to_num(-7), alone[0].nan_to_num(-7)), field.name
            elif isinstance(alone, Cameras):
                assert torch.equal(together[b].pixels_from_car(), alone[0].pixels_from_car())
    assert batch.fresh.tolist() == [True, False]


def test_points_travel_with_the_newest_frame_of_their_lane(frames):
    cloud = torch.rand(11, 5)
    with_points = Clip.of([replace(frames[1], points=cloud), frames[0]])
    assert torch.equal(Clip.batch([with_points, with_points]).points[1], cloud)
    with pytest.raises(ValueError, match="every lane brings points or none"):
        Clip.batch([with_points, Clip.of(frames[1::-1])])


def test_windows_that_are_not_one_drive_newest_first_are_refused(frames):
    with pytest.raises(ValueError, match="newest first"):
        Clip.of(frames[:2])
    with pytest.raises(ValueError, match="share their drive"):
        Clip.of([frames[1], replace(frames[0], drive="another")])
    with pytest.raises(ValueError, match="does not follow"):
        Clip.of(frames[1], after=replace(frames[0], drive="another"))
    with pytest.raises(ValueError, match="does not follow"):
        Clip.of(frames[0], after=frames[1])


@pytest.mark.parametrize(
    ("field", "shape", "says"),
    [
        ("used", (1, 1, 5), r"used: expected \(1, 2, 6\) bool, got \(1, 1, 5\) float32"),
        ("age", (1, 3), r"age: expected \(1, 2\), got \(1, 3\)"),
        ("now_from_then", (1, 2, 3, 4), r"now_from_then: expected \(1, 2, 4, 4\), got \(1, 2, 3, 4\)"),
        ("now_from_last", (2, 4, 4), r"now_from_last: expected \(1, 4, 4\), got \(2, 4, 4\)"),
        ("since_last", (), r"since_last: expected \(1,\), got \(\)"),
        ("fresh", (1,), r"fresh: expected \(1,\) bool, got \(1,\) float32"),
        ("images", (2, 6, 3, 36, 64), r"images must be \(B, T, N, 3, H, W\)"),
    ],
)
def test_a_clip_refuses_wrong_shapes_naming_expected_and_got(frames, field, shape, says):
    with pytest.raises(ValueError, match=says):
        replace(Clip.of(frames[1::-1]), **{field: torch.zeros(shape)})


# ---- occupancy and predictions


def prediction(**changes) -> Prediction:
    labels = torch.full(GRID.shape, OCC3D.free, dtype=torch.uint8)
    labels[1, 2, 3], labels[9, 0, 4] = 4, 16
    score = (labels != OCC3D.free).float()
    flow = torch.zeros(*GRID.shape, 2)
    flow[1, 2, 3] = torch.tensor([3.0, -1.0])
    return replace(Prediction(GRID, OCC3D, labels, score, flow), **changes)


def test_the_sparse_form_is_the_filled_voxels_in_the_order_of_their_index():
    index, labels, score, flow = prediction().sparse()
    assert index.tolist() == [[1, 2, 3], [9, 0, 4]] and labels.tolist() == [4, 16] and score.tolist() == [1.0, 1.0]
    assert flow.tolist() == [[3.0, -1.0], [0.0, 0.0]]
    assert prediction(flow=None).sparse()[3] is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": torch.zeros(3, 3, 3, dtype=torch.uint8)}, r"last axes \(10, 10, 5\), got \(3, 3, 3\) uint8"),
        ({"labels": torch.zeros(GRID.shape)}, "got .* float32"),
        ({"score": torch.zeros(10, 10)}, r"score: expected \(10, 10, 5\), got \(10, 10\)"),
        ({"flow": torch.zeros(*GRID.shape, 3)}, r"flow: expected \(10, 10, 5, 2\), got \(10, 10, 5, 3\)"),
        ({"unobserved": torch.zeros(GRID.shape)}, r"mask: expected \(10, 10, 5\) bool, got .* float32"),
        ({"instances": torch.zeros(GRID.shape, dtype=torch.int64)}, r"instances: expected .* int32, got .* int64"),
    ],
)
def test_a_prediction_refuses_what_does_not_fit_its_grid(changes, says):
    with pytest.raises(ValueError, match=says):
        prediction(**changes)


def test_what_is_true_may_come_in_batches():
    labels = torch.zeros(3, *GRID.shape, dtype=torch.uint8)
    Occupancy(GRID, OCC3D, labels, torch.zeros(*labels.shape, 2), labels == 0)
    with pytest.raises(ValueError, match="flow: expected"):
        Occupancy(GRID, OCC3D, labels, torch.zeros(*GRID.shape, 2), labels == 0)
    told = Occupancy(GRID, OCC3D, labels, None, labels == 0, labels.int()).to("meta")
    assert told.instances.is_meta and told.instances.dtype == torch.int32
    with pytest.raises(ValueError, match=r"occupancy: instances: expected \(3, 10, 10, 5\) int32, got \(10, 10, 5\)"):
        Occupancy(GRID, OCC3D, labels, None, labels == 0, labels[0].int())
