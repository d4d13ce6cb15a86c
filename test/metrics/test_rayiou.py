"""RayIoU: the published rays, origins and worked numbers."""

import math

import pytest
import torch
from metrics.volumes import EYES, challenge_label, prediction, rays, shifted, truth

from occflow_core.geometry import rigid
from occflow_core.metrics import RayIou, directions, hits, origins
from occflow_core.types import OCC3D, OPENOCC

FREE = OCC3D.free
ELEVATIONS = """
    -45 -26.565051 -18.434949 -14.036243 -11.309932 -9.462322 -8.130102 -7.125016 -6.340192 -5.710593 -5.080995
    -4.451396 -3.821797 -3.192199 -2.562600 -1.933001 -1.303403 -0.673804 -0.044206 0.585393 1.214992 1.844590 2.474189
    3.103787 3.733386 4.362985 4.992583 5.622182 6.251780 6.881379 7.510978 8.140576 8.770175 9.399773 10.029372
    10.658971 11.288569 11.918168 12.547767"""


# ---- where rays begin and go


def test_the_rays_are_the_published_39_times_360():
    rays = directions().double()
    assert rays.shape == (14_040, 3) and directions().dtype == torch.float32
    assert torch.allclose(rays.norm(dim=1), torch.ones(14_040, dtype=torch.float64), atol=1e-7)
    by_elevation = torch.rad2deg(rays[:, 2].asin()).reshape(39, 360)
    told = torch.tensor([float(e) for e in ELEVATIONS.split()], dtype=torch.float64)
    assert torch.allclose(by_elevation, told[:, None].expand(-1, 360), atol=1e-5)
    ahead, left = rays[0], rays[90]
    assert ahead[0] > 0 and abs(ahead[1]) < 1e-7 and left[1] > 0 and abs(left[0]) < 1e-7, "counter-clockwise from x"


def worked_drive(frames=30):
    """5 m a frame along the map's x, turning by 2 degrees a frame; the LiDAR looks to the right of the car's x."""
    car_from_lidar = pose(-90, (0.985793, 0.0, 1.84019))
    return [pose(2 * k, (100.0 + 5 * k, 200.0, 0.0)) @ car_from_lidar for k in range(frames)], car_from_lidar


def pose(degrees, where):
    half = math.radians(degrees) / 2
    return rigid.from_quaternion((math.cos(half), 0.0, 0.0, math.sin(half)), where)


@pytest.mark.parametrize(
    ("reference", "frames"),
    [(0, range(8)), (15, (6, 8, 11, 13, 16, 18, 21, 23)), (29, (20, 21, 23, 24, 25, 26, 28, 29))],
)
def test_origins_of_the_worked_drive(reference, frames):
    poses, mount = worked_drive()
    got = origins(poses, reference, mount)
    assert got.dtype == torch.float64 and got.shape == (8, 3)
    lidar_from_world = rigid.inverse(poses[reference])
    there = torch.cat([rigid.apply(mount, (lidar_from_world @ poses[f])[None, :3, 3]) for f in frames])
    assert torch.allclose(got, there, atol=1e-5)


def test_origins_of_the_worked_drive_in_metres():
    poses, mount = worked_drive()
    first, middle = origins(poses, 0, mount), origins(poses, 15, mount)
    told = torch.tensor([(0.985793, 0, 1.84019), (5.985193, 0.034404, 1.84019), (35.956511, 0.238485, 1.84019)])
    assert torch.allclose(first[[0, 1, 7]], told.double(), atol=2e-6)
    told = torch.tensor([(-38.033597, 22.195374), (35.588622, -19.728279)])
    assert torch.allclose(middle[[0, 7], :2], told.double(), atol=2e-6)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (9, "0 1 2 3 5 6 7 8"), (10, "0 1 3 4 5 6 8 9"), (12, "0 2 3 5 6 8 9 11"), (16, "0 2 4 6 9 11 13 15"),
        (17, "0 2 5 7 9 11 14 16"), (40, "0 6 11 17 22 28 33 39"), (3, "0 1 2"),
    ],
)  # fmt: skip
def test_of_many_origins_eight_are_taken_evenly(there, taken):
    poses = [pose(0, (0.1 * k, 0, 0)) for k in range(there)]
    got = origins(poses, 0, torch.eye(4, dtype=torch.float64))
    assert (got[:, 0] / 0.1).round().int().tolist() == [int(k) for k in taken.split()]


def test_the_lidar_at_the_keyframe_itself_is_exactly_the_mounting():
    poses, mount = worked_drive(8)
    for degrees in range(0, 360, 7):
        far = [pose(degrees, (1234.5678, 3456.789, 40.1)) @ p for p in poses]
        assert all((origins(far, k, mount) == mount[:3, 3]).all(1).sum() == 1 for k in range(8))


def test_places_are_cut_to_float32_on_their_way_as_published():
    poses = [pose(0, (k / 3, k / 7, 0)) for k in range(5)]
    got = origins(poses, 0, torch.eye(4, dtype=torch.float64))
    assert torch.equal(got, got.float().double()) and got[1, 0] != 1 / 3


@pytest.mark.parametrize(
    ("poses", "reference", "words"),
    [
        ([torch.eye(4)], 0, "float32"),
        ([torch.eye(4, dtype=torch.float64) * 2], 0, "rigid"),
        ([torch.eye(4, dtype=torch.float64)], 1, "no number 1"),
    ],
)
def test_poses_that_are_none_are_refused(poses, reference, words):
    with pytest.raises(ValueError, match=words):
        origins(poses, reference, torch.eye(4, dtype=torch.float64))


# ---- where they end


def test_a_road_and_a_wall_stop_the_published_numbers_of_rays():
    labels = torch.full((200, 200, 16), FREE, dtype=torch.uint8)
    labels[:, :, 0], labels[125] = OCC3D.id("driveable_surface"), OCC3D.id("manmade")
    got = hits(truth(labels), EYES[:1])
    assert dict(zip(*(v.tolist() for v in got.label.unique(return_counts=True)))) == {11: 3602, 15: 4934, 17: 5504}
    at = {0: 3.697043, 90: 3.959796, 180: 3.656872, 360: 5.606046, 4 * 360 + 45: 12.691542, 18 * 360 + 180: 40.985813}
    for ray, metres in at.items():
        assert got.distance[ray].item() == pytest.approx(metres, abs=1e-6)


def test_the_challenges_label_stops_the_published_rays():
    labels, _ = challenge_label()
    got = hits(truth(labels), EYES)
    kept = got.label != FREE
    assert len(kept) == 28_080 and int((~kept).sum()) == 6_345
    there = dict(zip(*(v.tolist() for v in got.label[kept].unique(return_counts=True))))
    assert there == {
        0: 47, 1: 29, 3: 987, 4: 1078, 6: 25, 11: 3869, 13: 768, 14: 322, 15: 1658, 16: 12952
    }  # fmt: skip
    assert [int(part.sum()) for part in kept.reshape(2, -1)] == [11_011, 10_724]
    assert got.distance[kept].double().mean().item() == pytest.approx(13.399639, abs=1e-6)
    assert got.distance.max().item() == pytest.approx(56.651642, abs=1e-6)
    assert [round(d, 6) for d in got.distance[:3].tolist()] == pytest.approx([3.697043, 3.697604, 3.699295], abs=1e-6)


def test_a_ray_that_never_comes_inside_is_told_as_published():
    labels = torch.full((200, 200, 16), FREE, dtype=torch.uint8)
    labels[0, 0, 0] = 4
    got = hits(truth(labels), torch.tensor([[0.0, 0.0, 90.0]]))  # far above: only steep rays come down
    outside = got.distance < 0
    assert outside.any() and torch.allclose(got.distance[outside], torch.tensor(-0.4))
    assert (got.voxel[outside] == 0).all() and (got.label[outside] == 4).all()


def test_a_label_beyond_the_table_stops_rays_as_published():
    labels = torch.full((200, 200, 16), FREE, dtype=torch.uint8)
    labels[110] = 255
    assert 255 in hits(truth(labels), EYES[:1]).label


def test_velocities_are_those_of_the_voxel_that_stopped_the_ray():
    rng = torch.Generator().manual_seed(2)
    labels = torch.where(torch.rand(200, 200, 16, generator=rng) < 0.02, 4, FREE).to(torch.uint8)
    index = torch.arange(640_000.0).reshape(200, 200, 16)
    got = hits(prediction(labels, flow=torch.stack([index, -index], -1)), EYES)
    assert torch.equal(got.flow[:, 0].long(), got.voxel) and torch.equal(got.flow[:, 1], -got.flow[:, 0])
    assert torch.equal(labels.reshape(-1)[got.voxel], got.label)


@pytest.mark.parametrize(
    ("eyes", "words"),
    [(torch.zeros(0, 3), "K > 0"), (torch.zeros(3), "K > 0"), (torch.full((1, 3), math.nan), "finite origins")],
)
def test_origins_that_are_none_are_refused(eyes, words):
    with pytest.raises(ValueError, match=words):
        hits(prediction(torch.full((200, 200, 16), FREE)), eyes)


# ---- the score


def test_the_worked_rays():
    """Eight rays of OpenOcc: label, distance."""
    true = rays([0, 0, 0, 10, 10, 7, 1, 14], [10, 20, 30, 5, 6, 12, 15, 40])
    told = rays([0, 0, 0, 10, 12, 7, 16, 14], [10.5, 21.5, 33, 5, 6, 14, 15, 43.5])
    tally = RayIou(OPENOCC)
    tally.add("a", told, true)
    got = tally.result()
    assert [round(got.at[t], 6) for t in (1, 2, 4)] == [0.116667, 0.166667, 0.583333]
    assert round(got.rayiou, 6) == 0.288889
    assert got.classes["car"] == (0.2, 0.5, 1.0) and got.classes["driveable_surface"] == (0.5, 0.5, 0.5)
    assert got.classes["pedestrian"] == (0, 0, 1), "2.0 m is not less than 2 m"
    assert got.classes["truck"] == got.classes["sidewalk"] == (0, 0, 0) and got.classes["manmade"] == (0, 0, 1)
    assert sum(math.isnan(iou[0]) for iou in got.classes.values()) == 10
    assert got.rays == 8


def wrong_class(labels, true, told):
    return torch.where(labels == OCC3D.id(true), told, labels).to(torch.uint8)


@pytest.mark.parametrize(
    ("change", "rayiou", "at"),
    [
        (lambda labels: labels, 1, (1, 1, 1)),
        (lambda labels: shifted(labels, 1, FREE), 0.766280, (0.748538, 0.769873, 0.780430)),
        (lambda labels: shifted(labels, 2, FREE), 0.632829, (0.575419, 0.653084, 0.669984)),
        (lambda labels: shifted(labels, 3, FREE), 0.528725, (0.440432, 0.561963, 0.583780)),
        (lambda labels: shifted(labels, 6, FREE), 0.370522, (0.308067, 0.364527, 0.438970)),
        (lambda labels: wrong_class(labels, "car", OCC3D.id("truck")), 0.818182, (0.818182,) * 3),
        (lambda labels: wrong_class(labels, "driveable_surface", FREE), 0.817656, (0.817656,) * 3),
        (lambda labels: torch.full_like(labels, FREE), 0, (0, 0, 0)),
    ],
    ids="same +1 +2 +3 +6 car-truck driveable-free all-free".split(),
)
def test_the_challenges_label_against_worse_copies(change, rayiou, at):
    labels, _ = challenge_label()
    tally = RayIou(OCC3D)
    tally.add("a", hits(prediction(change(labels)), EYES), hits(truth(labels), EYES))
    got = tally.result()
    assert round(got.rayiou, 6) == rayiou and tuple(round(got.at[t], 6) for t in (1, 2, 4)) == at


def test_the_challenges_label_two_voxels_aside_class_by_class():
    labels, _ = challenge_label()
    tally = RayIou(OCC3D)
    tally.add("a", hits(prediction(shifted(labels, 2, FREE)), EYES), hits(truth(labels), EYES))
    told = {
        "car": (0.618, 0.726, 0.737), "bus": (0.799, 0.840, 0.844), "motorcycle": (0.355, 0.680, 0.680),
        "driveable_surface": (0.885, 0.906, 0.911), "manmade": (0.457, 0.554, 0.589),
        "vegetation": (0.630, 0.765, 0.852), "barrier": (0.462,) * 3,
    }  # fmt: skip
    got = tally.result().classes
    assert {name: tuple(round(v, 3) for v in got[name]) for name in told} == told
    assert all(math.isnan(got[name][0]) for name in ("bicycle", "pedestrian", "truck"))


def test_predictions_where_the_truth_stops_no_ray_cost_nothing():
    true, told = rays([16, 0], [50, 10]), rays([0, 0], [5, 10])
    tally = RayIou(OPENOCC)
    tally.add("a", told, true)
    assert tally.result().rayiou == 1.0


def test_a_truth_that_stops_no_ray_and_voxels_that_nobody_labelled_are_counted():
    tally = RayIou(OPENOCC)
    tally.add("a", rays([0, 16], [5, 10]), rays([16, 16], [50, 10]))
    tally.add("b", rays([0, 0], [5, 10]), rays([0, 255], [5, 10]))
    got = tally.result()
    assert (got.empty, got.unlabelled, got.rays) == (1, 1, 2)
    assert got.rayiou == 1 / 2, "as published: a prediction on what nobody labelled is a false positive"


@pytest.mark.parametrize(
    ("told", "true", "words"),
    [
        (rays([0], [5]), rays([0, 0], [5, 5]), "1 rays in the prediction, 2 in the truth"),
        (rays([17], [5]), rays([0], [5]), "predicted label 17, expected 0 to 16"),
        (rays([0], [5]), rays([17], [5]), "true labels beyond 16"),
        (rays([0], [5], classes=OCC3D), rays([0], [5]), "must share one table"),
    ],
)
def test_rays_that_cannot_be_compared_are_refused(told, true, words):
    tally = RayIou(OPENOCC)
    with pytest.raises(ValueError, match=words):
        tally.add("a", told, true)
    assert not tally.samples
