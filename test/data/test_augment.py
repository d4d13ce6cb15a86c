"""After any augmentation the cameras, the poses and the truth are still true for each other."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occflow_core.data import augment, pattern
from occflow_core.geometry import Cameras, Grid, rigid
from occflow_core.types import OPENOCC, Clip, Frame, Occupancy

HEIGHT, WIDTH = 180, 320


def spotted(points: torch.Tensor, cameras: Cameras) -> torch.Tensor:
    """(N, 3, H, W) pictures that are black but for a soft spot where each camera sees its point (N, 3)."""
    pixels, _ = cameras.project(points[:, None])
    v, u = torch.meshgrid(torch.arange(cameras.height) + 0.5, torch.arange(cameras.width) + 0.5, indexing="ij")
    far = (u - pixels[:, 0, 0, None, None]) ** 2 + (v - pixels[:, 0, 1, None, None]) ** 2
    return (250 * torch.exp(-far / (2 * 5.0**2)))[:, None].expand(-1, 3, -1, -1).round().to(torch.uint8)


def spots(images: torch.Tensor) -> torch.Tensor:
    """(N, 2) where the spots are: centres of mass, pixels."""
    grey = images[:, 0].double()
    grey = torch.where(grey > 20, grey, 0.0)
    mass = grey.sum((1, 2))
    u = (grey.sum(1) * (torch.arange(grey.shape[2]) + 0.5)).sum(1) / mass
    v = (grey.sum(2) * (torch.arange(grey.shape[1]) + 0.5)).sum(1) / mass
    return torch.stack([u, v], dim=1)


@pytest.fixture(scope="module")
def scene():
    """A frame that shows one spot a camera, and the points (N, 3) that cause them."""
    frame = next(iter(pattern.drive(1, height=HEIGHT, width=WIDTH)))
    # in the middle and low: there no crop of the published views cuts it off
    pixels = torch.tensor([[[WIDTH / 2 + 7.0, HEIGHT * 0.66]]], dtype=torch.float64).expand(6, 1, 2)
    points = frame.cameras.unproject(pixels, torch.full((6, 1), 12.0, dtype=torch.float64))[:, 0]
    return replace(frame, images=spotted(points, frame.cameras)), points


def agree(frame: Frame, points: torch.Tensor, tolerance=0.35):
    pixels, _ = frame.cameras.project(points[:, None])
    assert (spots(frame.images) - pixels[:, 0]).abs().max() < tolerance


@pytest.mark.parametrize(
    "view",
    [
        augment.View((180, 320), 0, 0, 180, 320),
        augment.View((90, 200), 0, 0, 90, 200),
        augment.View((360, 512), 0, 0, 360, 512),
        augment.View((180, 320), 40, 30, 120, 260),
        augment.View((180, 320), -20, -50, 230, 420),
        augment.View((180, 320), 0, 0, 180, 320, mirror=True),
        augment.View((180, 320), 0, 0, 180, 320, turn=7.0),
        augment.View((120, 250), 11, 17, 100, 211, mirror=True, turn=-12.0),
    ],
    ids=lambda view: f"{view.resized} {view.top} {view.left} {view.mirror} {view.turn}",
)
def test_a_point_falls_where_the_changed_picture_shows_it(scene, view):
    frame, points = scene
    agree(frame, points)
    seen = augment.seen(frame, view)
    assert seen.images.shape == (6, 3, view.height, view.width) and seen.images.dtype == torch.uint8
    agree(seen, points)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_picture_turned_by_a_quarter_moves_every_pixel_to_its_place(quarters):
    """To the very edges: a picture spans [0, width], not the middles of its outer pixels."""
    images = torch.rand((2, 3, 40, 40)) * 255
    turned = augment.View((40, 40), 0, 0, 40, 40, turn=90.0 * quarters).of(images)
    assert torch.allclose(turned, torch.rot90(images, quarters, (-2, -1)), atol=0.05)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_points_stay_true_through_any_published_draw(scene, seed):
    """OPUS: one view for all cameras; STCOcc: one each. On pictures of any size the same share is shown."""
    frame, points = scene
    rng = np.random.default_rng(seed)
    one = augment.opus_view(rng, (HEIGHT, WIDTH), (102, 281))
    many = [augment.stcocc_view(rng, (HEIGHT, WIDTH), (102, 281)) for _ in range(6)]
    assert len(set(many)) == 6 and one == augment.opus_view(np.random.default_rng(seed), (HEIGHT, WIDTH), (102, 281))
    for views in (one, many):
        seen = augment.seen(frame, views)
        inside = seen.cameras.project(points[:, None])[0][:, 0]
        # a crop may cut a spot off: only those that are wholly inside can be measured
        whole = ((inside > 25) & (inside < torch.tensor([281 - 25, 102 - 25]))).all(1)
        pixels, there = spots(seen.images), inside
        assert (pixels - there)[whole].abs().max() < 0.5 if whole.any() else True


def test_opus_draws_scales_and_edges_in_its_ranges():
    views = [augment.opus_view(rng) for rng in [np.random.default_rng(0)] for _ in range(400)]
    scales = np.array([view.resized[1] / 1600 for view in views])
    assert 0.379 < scales.min() < 0.39 and 0.54 < scales.max() <= 0.55
    assert all(view.top == view.resized[0] - 256 and 0 <= view.left <= max(0, view.resized[1] - 704) for view in views)
    assert 150 < sum(view.mirror for view in views) < 250 and all(view.turn == 0 for view in views)
    turns = [augment.stcocc_view(np.random.default_rng(i)).turn for i in range(200)]
    assert -5.4 <= min(turns) < -4.5 and 4.5 < max(turns) <= 5.4


def test_what_a_crop_finds_outside_is_black(scene):
    frame, _ = scene
    white = replace(frame, images=torch.full_like(frame.images, 255))
    seen = augment.seen(white, augment.View((180, 320), -10, -20, 200, 350)).images
    assert not seen[..., :10, :].any() and not seen[..., :20].any() and not seen[..., 190:, :].any()
    assert (seen[..., 10:190, 20:340] == 255).all()


def test_views_must_be_as_many_as_cameras_and_of_one_size(scene):
    view = augment.View((180, 320), 0, 0, 180, 320)
    with pytest.raises(ValueError, match="6 cameras need as many views of one size"):
        augment.seen(scene[0], [view] * 5)
    with pytest.raises(ValueError, match="6 cameras need"):
        augment.seen(scene[0], [view] * 5 + [replace(view, height=100)])


# ---- the world

GRID = Grid((-4.0, -4.0, -1.0), (0.5, 0.5, 0.5), (16, 16, 4))


@pytest.fixture(scope="module")
def lane():
    """A clip of three frames with points, and a truth of random voxels."""
    frames = list(pattern.drive(4, height=36, width=64))[::-1]
    generator = torch.Generator().manual_seed(0)
    points = torch.randn((50, 5), generator=generator) * 3
    clip = Clip.of([replace(frames[0], points=points), *frames[1:3]], after=frames[3])
    labels = torch.randint(0, 17, GRID.shape, generator=generator).to(torch.uint8)
    flow = torch.randn((*GRID.shape, 2), generator=generator)
    flow[labels == 3] = torch.nan
    seen = torch.rand(GRID.shape, generator=generator) < 0.5
    instances = torch.arange(1, len(GRID) + 1, dtype=torch.int32).view(GRID.shape)  # where each voxel comes from
    return clip, Occupancy(GRID, OPENOCC, labels, flow, seen, instances)


def same(a: Clip, b: Clip, atol=1e-5):
    assert torch.equal(a.images, b.images)
    for x, y in (
        (a.cameras.car_from_camera, b.cameras.car_from_camera),
        (a.now_from_then, b.now_from_then),
        (a.now_from_last, b.now_from_last),
        (a.points[0], b.points[0]),
    ):
        assert torch.allclose(x, y, atol=atol)


def same_truth(a: Occupancy, b: Occupancy):
    assert torch.equal(a.labels, b.labels) and torch.equal(a.seen, b.seen) and torch.equal(a.instances, b.instances)
    assert torch.allclose(a.flow, b.flow, equal_nan=True, atol=1e-6)


@pytest.mark.parametrize("matrix", [augment.flip(x=True), augment.flip(y=True), augment.flip(x=True, y=True)])
def test_a_world_mirrored_twice_is_the_world(lane, matrix):
    clip, truth = lane
    once, moved_truth = augment.moved(clip, truth, matrix)
    assert not torch.equal(moved_truth.labels, truth.labels)
    twice, truth_again = augment.moved(once, moved_truth, matrix)
    same(twice, clip)
    same_truth(truth_again, truth)


def test_a_world_turned_by_four_quarters_is_the_world(lane):
    clip, truth = lane
    moved, moved_truth = clip, truth
    for _ in range(4):
        moved, moved_truth = augment.moved(moved, moved_truth, augment.turn(90))
    same(moved, clip)
    same_truth(moved_truth, truth)
    assert torch.equal(augment.turn(-270), augment.turn(90)) and torch.equal(
        augment.turn(180), augment.flip(True, True)
    )


MOVES = {
    "x": augment.flip(x=True),
    "y": augment.flip(y=True),
    "quarter": augment.turn(90),
    "both": augment.turn(90) @ augment.flip(y=True),
}


@pytest.mark.parametrize("name", MOVES)
def test_the_clip_moved_is_the_truth_moved(lane, name):
    """What a voxel held before is now in the voxel where its centre went, with its flow; and every camera of every
    time sees both at the same pixel."""
    clip, truth = lane
    matrix = MOVES[name]
    moved, moved_truth = augment.moved(clip, truth, matrix)
    centres = GRID.centres(torch.float64).reshape(-1, 3)
    index, inside = GRID.index(rigid.apply(matrix, centres))
    assert inside.all()
    x, y, z = index.unbind(1)
    assert torch.equal(moved_truth.labels[x, y, z], truth.labels.reshape(-1))
    assert torch.equal(moved_truth.seen[x, y, z], truth.seen.reshape(-1))
    assert torch.equal(moved_truth.instances[x, y, z], truth.instances.reshape(-1))
    flow = truth.flow.reshape(-1, 2).double() @ matrix[:2, :2].mT
    assert torch.allclose(moved_truth.flow[x, y, z].double(), flow, equal_nan=True, atol=1e-5)

    then_from_now = torch.linalg.inv(clip.now_from_then.double())[:, :, None]
    moved_then_from_now = torch.linalg.inv(moved.now_from_then.double())[:, :, None]
    before, depth = double(clip.cameras).project(rigid.apply(then_from_now, centres))
    there = rigid.apply(moved_then_from_now, rigid.apply(matrix, centres))
    after, depth_after = double(moved.cameras).project(there)
    near = (depth.abs() > 0.3) & (depth.abs() < 20)
    assert torch.allclose(depth, depth_after, atol=1e-3)
    assert torch.allclose(before[near], after[near], atol=0.05)
    assert torch.allclose(
        moved.points[0][:, :3].double(), rigid.apply(matrix, clip.points[0][:, :3].double()), atol=1e-5
    )
    assert torch.equal(moved.points[0][:, 3:], clip.points[0][:, 3:])


def double(cameras: Cameras) -> Cameras:
    return cameras.to(torch.float64)


@pytest.mark.parametrize(
    ("grid", "quick"),
    [
        (GRID, True),
        (Grid((-4.0, -4.0, -1.0), (0.5, 1.0, 0.5), (16, 8, 4)), False),  # not square: only mirrors are quick
        (Grid((-4.0, -3.0, -1.0), (0.5, 0.5, 0.5), (16, 16, 4)), False),  # the car is not in the middle
    ],
)
@pytest.mark.parametrize("name", MOVES)
def test_mirrors_and_quarters_are_moved_without_indices_to_the_same_places(lane, grid, quick, name, monkeypatch):
    clip, whole = lane
    shape = grid.shape
    volumes = (whole.labels, whole.flow, whole.seen, whole.instances)
    truth = Occupancy(grid, OPENOCC, *(t.flatten(0, 2)[: len(grid)].unflatten(0, shape) for t in volumes))
    assert augment._onto_itself(grid, MOVES[name]) == (quick or (name in "xy" and grid.low[1] == -4))
    _, one = augment.moved(clip, truth, MOVES[name])
    monkeypatch.setattr(augment, "_onto_itself", lambda *_: False)
    _, other = augment.moved(clip, truth, MOVES[name])
    same_truth(one, other)


def test_a_place_of_the_clip_before_is_followed_by_the_matrix_of_that_clip(lane):
    clip, _ = lane
    now, last = augment.flip(y=True), augment.turn(90)
    moved, _ = augment.moved(clip, None, now, last)
    point = torch.tensor([[3.0, 1.0, 0.5]], dtype=torch.float64)
    expected = rigid.apply(now, rigid.apply(clip.now_from_last[0].double(), point))
    assert torch.allclose(rigid.apply(moved.now_from_last[0].double(), rigid.apply(last, point)), expected, atol=1e-5)
    fresh = replace(clip, now_from_last=torch.full((1, 4, 4), torch.nan), fresh=torch.tensor([True]))
    assert torch.isnan(augment.moved(fresh, None, now)[0].now_from_last).any()


def test_voxels_that_come_from_outside_are_free_not_seen_and_of_no_instance(lane):
    clip, truth = lane
    truth = replace(truth, seen=torch.ones_like(truth.seen))
    _, moved = augment.moved(clip, truth, augment.turn(45))
    corner = moved.labels[0, 0], moved.seen[0, 0], moved.flow[0, 0]
    assert (corner[0] == OPENOCC.free).all() and not corner[1].any() and torch.isnan(corner[2]).all()
    assert (moved.labels[7:9, 7:9] != OPENOCC.free).any()
    here = moved.instances.flatten()
    came = here > 0
    assert not moved.instances[0, 0].any() and came.float().mean() > 0.7
    assert torch.equal(moved.labels.flatten()[came], truth.labels.flatten()[here[came].long() - 1])


def test_moves_that_are_none_of_the_car_are_refused(lane):
    clip, truth = lane
    stretched, lifted = torch.eye(4), torch.eye(4)
    stretched[0, 0], lifted[2, 3] = 2.0, 1.0
    for matrix in (stretched, lifted):
        with pytest.raises(ValueError, match="mirrored and turned about z"):
            augment.moved(clip, truth, matrix)


# ---- colours


def test_colours_agree_with_opencv():
    """Hue, saturation and value of float pictures, there and back, within a grey level of a hundredth."""
    rng = np.random.default_rng(0)
    picture = rng.uniform(1, 255, (40, 50, 3)).astype(np.float32)
    ours = augment._hsv(torch.from_numpy(picture).permute(2, 0, 1)[None])
    theirs = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)
    for mine, channel, scale in zip(ours, cv2.split(theirs), (360.0, 1.0, 255.0)):
        assert np.abs(mine[0].numpy() - channel).max() < 1e-4 * scale
    shifted = (ours[0] + 17) % 360, ours[1] * 0.7, ours[2]
    back = cv2.cvtColor(np.dstack([channel[0].numpy() for channel in shifted]), cv2.COLOR_HSV2RGB)
    assert np.abs(augment._rgb(*shifted)[0].permute(1, 2, 0).numpy() - back).max() < 0.02


def test_without_any_strength_only_channels_change_places():
    images = torch.randint(0, 256, (2, 3, 4, 3, 8, 9), dtype=torch.uint8)
    still = {"brightness": 0.0, "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": 0.0}
    changed = augment.photometric(images, np.random.default_rng(0), **still)
    assert changed.shape == images.shape and changed.dtype == torch.float32
    assert torch.allclose(changed.sort(3).values, images.sort(3).values.float(), atol=0.01)
    orders = {tuple(np.round(p.flatten(1).mean(1).argsort().numpy())) for p in changed.flatten(0, 2)}
    assert len(orders) > 1, "each picture has draws of its own"


def test_the_same_generator_gives_the_same_colours_and_each_step_does_something():
    images = torch.randint(0, 256, (24, 3, 8, 9), dtype=torch.uint8)
    a, b, c = (augment.photometric(images, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.max() > 255 and a.min() < 0, "nothing is clipped"
    none = {"brightness": 0.0, "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": 0.0}
    still = augment.photometric(images, np.random.default_rng(1), **none)
    for name, strength in (("brightness", 32.0), ("contrast", (0.5, 1.5)), ("saturation", (0.5, 1.5)), ("hue", 18.0)):
        moved = augment.photometric(images, np.random.default_rng(1), **{**none, name: strength})
        changed = (moved - still).abs().amax((1, 2, 3)) > 0.5
        assert 4 < changed.sum() < 20, f"{name} happens every other time"


def test_contrast_is_changed_every_other_time_be_it_before_or_after_the_colours():
    images = torch.full((400, 3, 2, 2), 50, dtype=torch.uint8)
    none = {"brightness": 0.0, "saturation": (1.0, 1.0), "hue": 0.0}
    doubled = augment.photometric(images, np.random.default_rng(0), contrast=(2.0, 2.0), **none)[:, 0, 0, 0]
    assert set(doubled.round().tolist()) == {50.0, 100.0} and 160 < (doubled > 75).sum() < 240
