"""Labels of a whole data set: resumed, shared out, counted where the input is bad."""

import json

import numpy as np
import pytest
from data import layout

from occflow_core import make_labels as maker
from occflow_core.data.nuscenes import LIDAR, NuScenes
from occflow_core.labels import agreement
from occflow_core.types import OCC3D

QUIET = {"progress": False, "scales": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two scenes of two keyframes, labelled: (dataroot, out, report)."""
    root = layout.write(tmp_path_factory.mktemp("labels") / "set", scenes=2, keyframes=2, lidarseg=True)
    out = root.parent / "out"
    return root, out, maker.make_labels(root, out, **QUIET)


def labels(out):
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("labels.npz"))


def test_every_keyframe_gets_both_files_and_keeps_them(made):
    root, out, report = made
    assert (report.made, report.there, report.failed) == (4, 0, [])
    assert len(labels(out)) == 8
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.npz")}
    again = maker.make_labels(root, out, **QUIET)
    assert (again.made, again.there) == (0, 4)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.npz")} == before


def test_a_run_that_was_broken_off_is_taken_up_where_it_ended(made):
    root, out, _ = made
    lost = next(out.rglob("gts/scene-0002/*/labels.npz"))
    before = lost.read_bytes()
    lost.unlink()
    report = maker.make_labels(root, out, **QUIET)
    assert (report.made, report.there) == (1, 3)
    with np.load(lost) as file:
        assert file["semantics"].shape == (200, 200, 16)
    assert lost.read_bytes() == before


def test_shards_share_the_scenes_out(made, tmp_path):
    root, out, _ = made
    reports = [maker.make_labels(root, tmp_path, shard=f"{i}/3", **QUIET) for i in range(3)]
    assert [report.made for report in reports] == [2, 2, 0]
    assert labels(tmp_path) == labels(out)


@pytest.mark.slow
def test_processes_make_the_same(made, tmp_path):
    root, out, _ = made
    assert maker.make_labels(root, tmp_path, processes=2, **QUIET).made == 4
    for name in labels(out):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_labels_agree_with_themselves(made):
    root, out, _ = made
    (out / "v1.0-mini").symlink_to(root / "v1.0-mini")
    tallies = maker.compare(out, out, progress=False)
    (out / "v1.0-mini").unlink()
    assert [t.frames for t in tallies] == [4] * 4 and tallies[0].occupied() == 1.0
    assert "**100.0 %**" in agreement.table(tallies)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shard": "2/2"}, "0 to 1"),
        ({"shard": "half"}, "expected i/n"),
        ({"scenes": ["scene-9"]}, "no scene scene-9"),
        ({"every": 0}, "must be 1 or more"),
        ({"processes": 0}, "must be 1 or more"),
    ],
)
def test_a_mistake_is_named(made, given, words):
    with pytest.raises(ValueError, match=words):
        maker.make_labels(made[0], made[1], **QUIET, **given)


def test_every_second_sweep_is_used_and_all_keyframes(made):
    dataset = NuScenes(made[0], progress=False)
    stamps = [sweep.stamp for sweep in maker.sweeps(dataset, "scene-0001", every=2)]
    rows = dataset.sweeps("scene-0001", LIDAR)
    assert stamps == [dataset.data(row).stamp for row in rows][::2] and len(stamps) == 6
    told = list(maker.sweeps(dataset, "scene-0001", every=4))
    assert [sweep.labels is not None for sweep in told] == [True, False, False, True]
    kinds = [OCC3D.id("driveable_surface"), OCC3D.id("car"), 255]  # lidarseg's 24, 17 and 0: noise
    assert told[0].labels.tolist() == kinds


def test_tracks_are_the_annotated_objects_by_their_class(tmp_path):
    root = layout.write(tmp_path, keyframes=3, files=False)
    police = {"vehicle.car": "vehicle.emergency.police"}
    layout.edit(root, "category", lambda rows: [row | {"name": police.get(row["name"], row["name"])} for row in rows])
    tracks = {track.name: track for track in maker.tracks(NuScenes(root, progress=False), "scene-0001")}
    assert set(tracks) == {"others", "pedestrian"}  # a police car is none of Occ3D's cars
    walker = tracks["pedestrian"]
    assert walker.size == (4.5, 1.9, 1.6) and len(walker.stamps) == 3
    assert np.allclose(walker.motion(walker.stamps[0])[0][:2], [2.0, 0.0])


def test_bad_input_ends_the_work_or_is_counted(tmp_path):
    root = layout.write(tmp_path / "set", scenes=1, keyframes=2, lidarseg=True)
    rows = json.loads((root / "v1.0-mini" / "sample_data.json").read_text())
    swept = [root / r["filename"] for r in rows if "sweeps/LIDAR_TOP" in r["filename"]]
    for path in swept:
        path.write_bytes(b"half a point")
    with pytest.raises(ValueError, match="no whole number of points"):
        maker.make_labels(root, tmp_path / "out", **QUIET)
    report = maker.make_labels(root, tmp_path / "out", keep_going=True, **QUIET)
    assert report.made == 2 and len(report.failed) == 4 and "no whole number of points" in str(report)
    assert str(report).startswith("2 keyframes labelled, 0 were there already, 4 failures")


def test_a_lidar_sweep_whose_pose_jumps_ends_the_work_or_is_counted(tmp_path):
    root = layout.write(tmp_path / "set", scenes=1, keyframes=2, lidarseg=True)
    rows = json.loads((root / "v1.0-mini" / "sample_data.json").read_text())
    lost = [r for r in rows if "sweeps/LIDAR_TOP" in r["filename"]][1]  # the second of those between

    def away(rows):
        (pose,) = (row for row in rows if row["token"] == lost["ego_pose_token"])
        pose["translation"][1] += 100.0

    layout.edit(root, "ego_pose", away)
    dataset = NuScenes(root, progress=False)
    words = f"ego_pose: a gap: the pose of sample_data {lost['token']} .LIDAR_TOP. lies .*ego_pose.json"
    with pytest.raises(ValueError, match=words):
        maker.make_labels(root, tmp_path / "out", every=1, **QUIET)
    report = maker.make_labels(root, tmp_path / "out", every=1, keep_going=True, **QUIET)
    assert report.made == 2 and len(report.failed) == 1 and lost["token"] in report.failed[0]
    whole = list(maker.sweeps(dataset, dataset.scenes[0], 1, []))
    assert len(whole) == len(dataset.sweeps(dataset.scenes[0], LIDAR)) - 1, "the others follow each other"
    last = dataset.keyframes(dataset.scenes[0])[1]
    with pytest.raises(ValueError, match=words):
        dataset.cloud(last, 10)
    assert len(dataset.cloud(last, 1)) > 0


def test_without_lidarseg_labels_are_made_from_boxes_and_height(tmp_path):
    root = layout.write(tmp_path / "set", keyframes=2)
    assert maker.make_labels(root, tmp_path / "out", **QUIET).made == 2
