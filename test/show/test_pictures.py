"""A picture tells what the prediction says, where it says it; files are whole or not there."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from occflow_core.data import bag as bags
from occflow_core.data import pattern
from occflow_core.geometry import Grid
from occflow_core.show import pictures
from occflow_core.types import OCC3D, Prediction
from occflow_core.voxelflow import pack

GRID = Grid((-20.0, -20.0, -1.0), (0.8, 0.8, 0.8), (50, 50, 8))
CAR, ROAD = OCC3D.id("car"), OCC3D.id("driveable_surface")


def world(grid: Grid = GRID, unobserved=None) -> Prediction:
    """A road everywhere, and one car ahead on the left that drives to the right at 5 m/s."""
    labels = torch.full(grid.shape, OCC3D.free, dtype=torch.uint8)
    labels[:, :, 0] = ROAD
    labels[36:42, 31:34, 1:3] = CAR  # x 8.8 to 13.6 m, y 4.8 to 7.2 m
    flow = torch.zeros(*grid.shape, 2)
    flow[labels == CAR] = torch.tensor([0.0, -5.0])
    return Prediction(grid, OCC3D, labels, (labels != OCC3D.free).float(), flow, unobserved)


def blank(count: int = 6, height: int = 45, width: int = 80) -> torch.Tensor:
    """Each camera of one grey of its own."""
    return (torch.arange(count, dtype=torch.uint8) * 30 + 40)[:, None, None, None].expand(count, 3, height, width)


def draw(prediction: Prediction, used=(True,) * 6, **more) -> np.ndarray:
    return pictures.picture(
        blank(), pattern.NAMES, used, prediction, stamp=1_700_000_000_250_000_000, model="m", **more
    )


def near(image: np.ndarray, colour, tolerance: int = 40) -> np.ndarray:
    """Where an image shows a colour in any light: its direction in RGB."""
    seen, want = image.astype(float) + 1e-6, np.array(colour, float)
    seen, want = seen / np.linalg.norm(seen, axis=-1, keepdims=True), want / np.linalg.norm(want)
    return (seen @ want > 0.985) & (image.max(-1) > tolerance)


def test_a_picture_has_its_parts_and_one_width():
    drawn = draw(world())
    assert drawn.dtype == np.uint8 and drawn.ndim == 3 and drawn.shape[2] == 3
    assert drawn.shape[1] == 3 * pictures.TILE[0] + 2 * pictures.GAP
    assert drawn.shape[0] > 2 * pictures.TILE[1] + pictures.VIEW


def test_cameras_are_laid_out_as_they_look():
    """The front left picture is up and left, the back right picture is down and right."""
    tiles = pictures._cameras(blank(), pattern.NAMES, [True] * 6)
    (w, h), grey = pictures.TILE, {n: 40 + 30 * i for i, n in enumerate(pattern.NAMES)}
    rows = (("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"), ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"))
    for r, row in enumerate(rows):
        for c, name in enumerate(row):
            middle = tiles[r * (h + pictures.GAP) + h // 2, c * (w + pictures.GAP) + w // 2]
            assert middle.tolist() == [grey[name]] * 3, name


def test_a_camera_that_is_not_used_is_not_shown_whatever_its_pixels_hold():
    used = [True] * 6
    used[3] = False
    tiles = pictures._cameras(blank(), pattern.NAMES, used)
    (w, h), x, y = pictures.TILE, pictures.TILE[0] + pictures.GAP, pictures.TILE[1] + pictures.GAP
    tile = tiles[y : y + h, x : x + w]
    assert (tile == 40 + 30 * 3).all(-1).mean() < 0.01, "its pixels"
    assert near(tile, (255, 196, 120)).sum() > 100, "the words that say so"
    title = pictures._title(1500, 0, "m", pattern.NAMES, used)
    assert near(title, (190, 40, 40)).sum() > 50 and not near(draw(world())[:52], (190, 40, 40)).any()


def test_from_above_ahead_is_up_and_left_is_left():
    view = pictures._above(world(), [])
    rows, columns = np.nonzero(near(view, OCC3D.colours[CAR]))
    scale = pictures.VIEW / 40.0  # pixels a metre
    assert rows.mean() == pytest.approx((20 - 11.2) * scale, abs=6)
    assert columns.mean() == pytest.approx((20 - 6.0) * scale, abs=6)
    assert len(rows) == pytest.approx(4.8 * 2.4 * scale**2, rel=0.1)


def test_from_behind_what_is_ahead_on_the_left_is_up_and_left_of_the_car():
    view = pictures._behind(world(), [], 900)
    rows, columns = np.nonzero(near(view, OCC3D.colours[CAR]))
    assert len(rows) > 300 and columns.max() < 450 and rows.max() < 430
    assert near(view, OCC3D.colours[ROAD]).mean() > 0.2


def test_what_stands_in_front_hides_what_is_behind():
    prediction = world()
    labels = prediction.labels.clone()
    labels[34, 25:40, 1:7] = OCC3D.id("manmade")
    hidden = Prediction(GRID, OCC3D, labels, (labels != OCC3D.free).float())
    before = near(pictures._behind(prediction, [], 900), OCC3D.colours[CAR]).sum()
    after = near(pictures._behind(hidden, [], 900), OCC3D.colours[CAR]).sum()
    assert after < 0.2 * before


def test_one_arrow_a_thing_from_its_middle_along_its_way():
    ((place, velocity),) = pictures._moving(world())
    assert place[:2].tolist() == pytest.approx([11.2, 6.0], abs=0.01) and velocity.tolist() == [0.0, -5.0]
    still, plain = pictures._above(world(), []), pictures._above(world(), pictures._moving(world()))
    rows, columns = np.nonzero((still != plain).any(-1))
    assert np.ptp(columns) == pytest.approx(5.0 * pictures.VIEW / 40, abs=14) and np.ptp(rows) < 40
    assert columns.min() > (20 - 6.0) * pictures.VIEW / 40 - 8, "from the car to the right"


def test_the_slow_the_unmoving_classes_and_the_unknown_have_no_arrow():
    prediction = world()
    for flow in (
        prediction.flow * 0.05,
        torch.where(prediction.labels[..., None] == ROAD, torch.ones(2), torch.zeros(2)),
        torch.full_like(prediction.flow, float("nan")),
    ):
        assert pictures._moving(Prediction(GRID, OCC3D, prediction.labels, prediction.score, flow)) == []
    assert pictures._moving(Prediction(GRID, OCC3D, prediction.labels, prediction.score)) == []


def test_unobserved_space_is_tinted_in_both_views():
    free = torch.full(GRID.shape, OCC3D.free, dtype=torch.uint8)
    unseen = torch.zeros(GRID.shape, dtype=torch.bool)
    unseen[:, 25:] = True  # the left half
    empty = Prediction(GRID, OCC3D, free, torch.zeros(GRID.shape), None, unseen)
    above, behind = pictures._above(empty, []), pictures._behind(empty, [], 900)
    tint = np.array(pictures._UNSEEN)
    assert (above[:, :390] == tint).all(-1).mean() > 0.95, "but for the rings"
    assert (above[:, 410:] == pictures._PAPER).all(-1).mean() > 0.95
    assert (behind[500:700, 50] == tint).all() and (behind[500:700, 850] > 215).all()


def test_an_empty_and_a_full_grid_can_be_drawn():
    for label in (OCC3D.free, ROAD):
        labels = torch.full(GRID.shape, label, dtype=torch.uint8)
        nothing = torch.zeros(GRID.shape, dtype=torch.bool)
        draw(Prediction(GRID, OCC3D, labels, torch.zeros(GRID.shape), torch.zeros(*GRID.shape, 2), nothing))


def test_the_legend_names_the_classes_that_are_there_and_no_others():
    bar = pictures._legend(1900, [world()])
    assert near(bar, OCC3D.colours[CAR]).sum() > 200 and near(bar, OCC3D.colours[ROAD]).sum() > 200
    assert not near(bar, OCC3D.colours[OCC3D.id("vegetation")]).any()


def test_numbers_of_pictures_and_names_that_differ_are_refused():
    with pytest.raises(ValueError, match="6 images with 5 names"):
        pictures.picture(blank(), pattern.NAMES[:5], [True] * 6, world(), stamp=0, model="m")


# ---- from bags


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A short drive and what a node would have said about it: the second camera's image is missing from set 1."""
    folder = tmp_path_factory.mktemp("show")
    frames = list(pattern.drive(2, height=90, width=160))
    bags.write_bag(folder / "in", frames, pattern.rig(90, 160), progress=False)
    with bags.BagWriter(folder / "out") as bag:
        bag.add("/occflow/occupancy", "occflow_msgs/msg/VoxelFlow")
        for k, frame in enumerate(frames):
            used = [not (k == 1 and i == 1) for i in range(6)]
            ages = [(frame.stamp - int(s)) // 1000 if u else None for s, u in zip(frame.stamps, used)]
            fields = pack(world(), [n.lower() for n in frame.names], used, ages, "opus-nano (untrained)")
            time = SimpleNamespace(sec=frame.stamp // 10**9, nanosec=frame.stamp % 10**9)
            origin = SimpleNamespace(
                position=SimpleNamespace(x=GRID.low[0], y=GRID.low[1], z=GRID.low[2]),
                orientation=SimpleNamespace(x=0.0, y=0.0, z=0.0, w=1.0),
            )
            header = SimpleNamespace(stamp=time, frame_id="base_link")
            bag.write("/occflow/occupancy", frame.stamp, SimpleNamespace(header=header, origin=origin, **fields))
    return folder, frames


def test_every_message_becomes_a_picture_with_the_images_of_its_own_set(recording, tmp_path):
    folder, frames = recording
    files = pictures.show_bag(folder / "in", folder / "out", tmp_path / "png", progress=False)
    assert files == sorted((tmp_path / "png").iterdir()) and len(files) == 2, "and no half-written file beside them"
    (w, h), gap = pictures.TILE, pictures.GAP
    for k, (file, frame) in enumerate(zip(files, frames)):
        drawn = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)[52:]
        for c, name in enumerate(("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT")):
            tile = drawn[40:h, c * (w + gap) : c * (w + gap) + w].astype(float)
            i = frame.names.index(name)
            errors = [
                np.abs(cv2.resize(f.images[i].permute(1, 2, 0).numpy(), (w, h))[40:].astype(float) - tile).mean()
                for f in frames
            ]
            if k == 1 and name == "CAM_FRONT_RIGHT":
                assert min(errors) > 20 and near(tile.astype(np.uint8), (255, 196, 120)).sum() > 100
            else:
                assert errors[k] < 6 and errors[k] < errors[1 - k], f"{name} of set {k} and not of the other"


def test_truth_of_the_same_instant_in_the_recording_is_drawn_below_the_prediction(recording, tmp_path):
    folder, frames = recording
    (_, _, told), *_ = bags.read_bag(folder / "out")
    with bags.BagWriter(tmp_path / "in") as bag:
        for topic, kind in bags.topics_of(folder / "in").items():
            bag.add(topic, kind)
        bag.add("/ground_truth/occupancy", "occflow_msgs/msg/VoxelFlow")
        for topic, stamp, message in bags.read_bag(folder / "in"):
            bag.write(topic, stamp, message)
        bag.write("/ground_truth/occupancy", frames[0].stamp + 30_000_000, told)  # 53 ms before the second set
    with_truth, without = pictures.show_bag(tmp_path / "in", folder / "out", tmp_path / "png", progress=False)
    tall, flat = cv2.imread(str(with_truth)), cv2.imread(str(without))
    assert tall.shape[0] == flat.shape[0] + pictures.VIEW + pictures.GAP and tall.shape[1] == flat.shape[1]
    above = tall[52 + 2 * pictures.TILE[1] + 2 * pictures.GAP :][: pictures.VIEW]
    below = tall[52 + 2 * pictures.TILE[1] + 3 * pictures.GAP + pictures.VIEW :][: pictures.VIEW]
    same = (above == below).all(-1).mean()  # the message is its own truth here: only the captions differ
    assert 0.95 < same < 1.0


def test_bags_without_what_is_needed_are_refused_by_name(recording, tmp_path):
    folder, _ = recording
    with pytest.raises(ValueError, match="expected one topic of occflow_msgs/msg/VoxelFlow, got none"):
        pictures.show_bag(folder / "in", folder / "in", tmp_path, progress=False)
    with pytest.raises(ValueError, match="no topic /cam_front/other.*; the bag has /cam_back"):
        pictures.show_bag(folder / "in", folder / "out", tmp_path, image_topic="/{}/other", progress=False)
    with pytest.raises(FileNotFoundError, match="no such bag"):
        pictures.show_bag(folder / "none", folder / "out", tmp_path, progress=False)
