"""Flow, coarser grids, a scene's labels and their files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from labels.tiny import Thing, World, ring_of_cameras, street
from recorded import shared

from occflow_core.data.nuscenes import read_label
from occflow_core.geometry import Grid
from occflow_core.labels import Keyframe, Label, Track, finished, label_keyframe, label_scene, make, write
from occflow_core.labels.aggregate import aggregate
from occflow_core.labels.agreement import Agreement, occ3d_of_openocc, table
from occflow_core.labels.coarse import coarser, coarser_flow, coarser_mask
from occflow_core.labels.flow import flow_of
from occflow_core.types import OCC3D, OPENOCC

CAR, ROAD, WALL = (OCC3D.id(n) for n in ("car", "driveable_surface", "manmade"))


# ---- flow


def one_voxel(track: Track | None, label: int, keyframe: Keyframe):
    labels = np.full((1, 1, 1), label, np.uint8)
    grid = Grid((9.0, 1.0, 0.0), (1.0, 1.0, 1.0), (1, 1, 1))  # around (9.5, 1.5, 0.5)
    place = np.full((1, 1, 1), -1 if track is None else 0)
    return flow_of(labels, place, [] if track is None else [track], keyframe, grid)[0, 0, 0]


def test_flow_is_the_velocity_of_the_point_over_ground_seen_from_the_car():
    """The car itself drives 5 m/s and is turned: neither adds anything; the object's turning does."""
    thing = Thing("car", (4.0, 2.0, 1.5), (11.0, 3.0, 1.0), speed=4.0, turns=0.5)
    world = World((thing,))
    turned = world.keyframe(1.0)
    pose = turned.world_from_car.clone()
    pose[:3, :3] = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # looks along y
    turned = Keyframe("k", turned.stamp, pose)
    flow = one_voxel(world.tracks(2.0)[0], CAR, turned)
    point = np.array([[-1.5 + world.car(1.0)[0, 3], 9.5, 0.5]])  # of the voxel, in the world
    vx, vy = thing.velocity(point, 1.0)[0]
    assert np.allclose(flow, [vy, -vx], atol=0.06)
    assert np.linalg.norm(flow - thing.velocity(thing.pose(1.0)[None, :3, 3], 1.0)[0]) > 1


def test_flow_is_zero_for_what_cannot_move_and_unknown_where_nobody_knows():
    world = World((Thing("car", (4, 2, 1.5), (9.5, 1.5, 0.5), speed=3.0),))
    track, keyframe = world.tracks(2.0)[0], world.keyframe(0.0)
    assert one_voxel(track, WALL, keyframe).tolist() == [0, 0]
    assert one_voxel(None, OCC3D.free, keyframe).tolist() == [0, 0]
    assert np.isnan(one_voxel(None, CAR, keyframe)).all()
    once = Track("t", "car", track.size, track.stamps[:1], track.world_from_box[:1])
    assert np.isnan(one_voxel(once, CAR, keyframe)).all()


def test_a_track_that_is_known_once_gives_filled_voxels_of_unknown_flow():
    world = World((Thing("car", (4.4, 1.8, 1.5), (10.0, 3.0, 1.0)),), speed=0.0, columns=360)
    tracks = [Track(t.instance, t.name, t.size, t.stamps[:1], t.world_from_box[:1]) for t in world.tracks(0.0)]
    label = label_keyframe(aggregate([world.sweep(0.0, True)], tracks), world.keyframe(0.0))
    cars = label.occ3d == CAR
    assert cars.any() and torch.isnan(label.flow[cars]).all() and (label.flow[~cars] == 0).all()


# ---- coarser


@pytest.mark.parametrize("factor", [2, 4])
def test_coarser_labels_equal_the_published_loop(factor):
    rng = np.random.default_rng(factor)
    labels = rng.choice([CAR, ROAD, WALL, OCC3D.free], (8, 8, 8), p=[0.02, 0.02, 0.02, 0.94]).astype(np.uint8)
    coarse = coarser(labels, OCC3D, factor)
    for x, y, z in np.ndindex(coarse.shape):
        block = labels[tuple(slice(i * factor, (i + 1) * factor) for i in (x, y, z))].ravel()
        votes = np.bincount(block, minlength=OCC3D.free + 1)
        mostly = votes[OCC3D.free] > 0.95 * factor**3
        assert coarse[x, y, z] == (OCC3D.free if mostly else votes[: OCC3D.free].argmax())
    assert len(np.unique(coarse)) > 2


def test_coarser_counts_equal_those_of_the_published_tool_on_a_real_label():
    """11,098, 2,276 and 429 filled blocks, as STCOcc's `generate_ms_occ.py` makes of this file."""
    file = shared() / "occ_labels" / "occ3d_challenge2023.npz"
    if not file.exists():
        pytest.skip(f"needs {file}")
    labels = np.load(file)["semantics"]
    assert [(coarser(labels, OCC3D, f) != OCC3D.free).sum() for f in (2, 4, 8)] == [11098, 2276, 429]


def test_coarser_flow_is_the_mean_of_its_own_class_and_unknown_only_if_all_is():
    labels = np.full((2, 2, 6), OCC3D.free, np.uint8)
    flow = np.zeros((2, 2, 6, 2), np.float32)
    labels[..., 0], labels[0, 0, 1], labels[0, 0, 2], labels[0, 0, 4] = CAR, 7, CAR, WALL
    flow[..., 0, :] = [2.0, 1.0]
    flow[0, 0, 0], flow[0, 0, 1], flow[0, 0, 2] = np.nan, [9, 9], np.nan
    coarse = coarser(labels, OCC3D, 2)
    assert coarse[0, 0].tolist() == [CAR, CAR, WALL]
    mean = coarser_flow(flow, labels, coarse, OCC3D, 2)[0, 0]
    assert mean[0].tolist() == [2, 1] and np.isnan(mean[1]).all() and mean[2].tolist() == [0, 0]


def test_a_block_is_seen_if_what_fills_it_is_or_if_half_of_its_free_space_is():
    labels = np.full((2, 2, 8), OCC3D.free, np.uint8)
    labels[0, 0, 0] = labels[0, 0, 2] = CAR
    mask = np.zeros((2, 2, 8), bool)
    mask[0, 0, 0] = True  # what fills the first block
    mask[1, 1, 2] = True  # free space beside what fills the second
    mask[:, :, 4] = True  # half of the third
    mask[0, :, 6] = True  # a quarter of the fourth
    coarse = coarser(labels, OCC3D, 2)
    assert coarser_mask(mask, labels, coarse, OCC3D, 2)[0, 0].tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match="does not divide by 3"):
        coarser(labels, OCC3D, 3)


# ---- a scene, its files, its table


@pytest.fixture(scope="module")
def labels() -> list[Label]:
    world = replace(street(), columns=180)
    keys = [world.keyframe(t, ring_of_cameras()) for t in (0.0, 0.5, 1.0)]
    return list(label_scene(world.sweeps(1.0), world.tracks(1.0), keys, threads=2))


def test_labels_come_in_the_order_of_keyframes_whatever_the_threads(labels):
    assert [label.token for label in labels] == ["key-0.0", "key-0.5", "key-1.0"]
    world = replace(street(), columns=180)
    alone = list(label_scene(world.sweeps(1.0), world.tracks(1.0), [world.keyframe(0.5, ring_of_cameras())], threads=1))
    for name in ("occ3d", "openocc", "flow", "mask_lidar", "mask_camera"):
        assert torch.equal(getattr(alone[0], name).nan_to_num(-1), getattr(labels[1], name).nan_to_num(-1)), name


def test_both_tables_agree_by_name_and_others_become_the_second_choice():
    """Half a voxel of 'others' above half a voxel of road: OpenOcc v2 has no such class."""
    from labels.test_voxelise import GRID, cloud_of

    points = [[2.05 + 0.1 * i, 2.05, 0.5] for i in range(3)] + [[2.05, 2.25, 0.5], [-2, 2, 0.5], [-2, -2, 0.5]]
    cloud = cloud_of(points, [0, 0, 0, ROAD, 0, CAR])
    label = label_keyframe(cloud, Keyframe("k", 0, torch.eye(4, dtype=torch.float64)), GRID)
    spots = GRID.index(torch.tensor([[2.1, 2.1, 0.5], [-2, 2, 0.5], [-2, -2, 0.5]], dtype=torch.float64))[0].unbind(1)
    assert label.occ3d[spots].tolist() == [0, 0, CAR]
    assert label.openocc[spots].tolist() == [OPENOCC.id("driveable_surface"), OPENOCC.free, OPENOCC.id("car")]


def test_files_are_what_readers_of_the_two_formats_expect(labels, tmp_path):
    write(labels[1], tmp_path, "scene-1")
    occ3d, openocc = make.paths(tmp_path, "scene-1", "key-0.5")
    assert occ3d == tmp_path / "gts" / "scene-1" / "key-0.5" / "labels.npz"
    assert openocc == tmp_path / "openocc_v2" / "scene-1" / "key-0.5" / "labels.npz"
    with np.load(occ3d) as file:
        assert sorted(file.files) == ["mask_camera", "mask_lidar", "semantics"]
        assert all(file[n].shape == (200, 200, 16) and file[n].dtype == np.uint8 for n in file.files)
        assert np.array_equal(file["mask_lidar"].astype(bool), labels[1].mask_lidar.numpy())
    one, two = read_label(occ3d, OCC3D), read_label(openocc, OPENOCC)
    assert torch.equal(one.labels, labels[1].occ3d) and torch.equal(one.seen, labels[1].mask_camera)
    assert torch.equal(two.labels, labels[1].openocc) and torch.equal(two.flow.isnan(), labels[1].flow.isnan())
    assert torch.equal(two.flow.nan_to_num(), labels[1].flow.nan_to_num())
    for folder in (occ3d.parent, openocc.parent):
        assert sorted(p.name for p in folder.iterdir()) == [
            "labels.npz", "labels_1_2.npz", "labels_1_4.npz", "labels_1_8.npz",
        ]  # fmt: skip
        with np.load(folder / "labels_1_4.npz") as file:
            assert file["semantics"].shape == (50, 50, 4) and file["flow"].shape == (50, 50, 4, 2)
            assert file["mask_camera"].any() and file["mask_lidar"].sum() >= file["mask_camera"].sum()


def test_what_is_there_is_not_written_over_and_what_is_half_there_is_not_finished(labels, tmp_path):
    token = labels[0].token
    foreign = make.paths(tmp_path, "s", token)[0]
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"from elsewhere")
    assert not finished(tmp_path, "s", token)
    write(labels[0], tmp_path, "s", scales=())
    assert foreign.read_bytes() == b"from elsewhere" and finished(tmp_path, "s", token)
    write(labels[0], tmp_path, "s", scales=(), overwrite=True)
    assert torch.equal(read_label(foreign, OCC3D).labels, labels[0].occ3d)


def test_a_write_that_fails_leaves_nothing_that_looks_finished(labels, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "savez_compressed", lambda file, **_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(labels[0], tmp_path, "s")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_agreement_counts_what_it_says(labels):
    ours = labels[0].occ3d.numpy()
    everywhere = np.ones_like(ours, bool)
    same = Agreement("same")
    same.add(ours, ours, everywhere, np.nan_to_num(labels[0].flow.numpy()), labels[0].flow.numpy())
    assert same.occupied() == same.mean() == 1.0 and same.flow_error() == 0.0
    true = np.array([[[CAR, CAR, ROAD, OCC3D.free]]], np.uint8)
    told = np.array([[[CAR, ROAD, ROAD, CAR]]], np.uint8)
    some, flow = Agreement(), np.zeros((1, 1, 4, 2))
    some.add(true, told, np.ones_like(true, bool), flow, flow + [3.0, 4.0])
    assert some.occupied() == 3 / 4 and some.mean() == (1 / 3 + 1 / 2) / 2 and some.flow_error() == 5.0
    some.merge(same)
    assert some.frames == 2 and some.worst == 5.0
    assert "| car |" in table([some, same]) and "**100.0 %**" in table([same])
    assert (occ3d_of_openocc(np.arange(17)) == [OCC3D.id(n) for n in OPENOCC.names] + [OCC3D.free]).all()
