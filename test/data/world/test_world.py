"""The laws of the synthetic world's truth, on four keyframes of a small one."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("embreex", reason="the synthetic world needs Embree (pip install embreex)")

from data.world.small import ARGUMENTS, KEYFRAMES, SIZE, Triangles, distance

from occflow_core.data.drives import write_scene_bag
from occflow_core.data.nuscenes import NuScenes
from occflow_core.data.world import render, rig, scene, tables, write, write_world
from occflow_core.data.world.models import models
from occflow_core.geometry import OCC3D_GRID, Cameras, rigid
from occflow_core.types import OCC3D, OPENOCC

pytestmark = pytest.mark.timeout(300)  # the first one makes the world, and compiles what makes it
LOW, VOXEL = np.array(OCC3D_GRID.low), np.array(OCC3D_GRID.voxel)
FREE = OCC3D.free


@pytest.fixture(scope="module")
def rows(folder) -> dict:
    return {name: json.loads((folder / "v1.0-world" / f"{name}.json").read_text()) for name in tables.TABLES}


def keyed(rows):
    return {row["token"]: row for row in rows}


def motion(row):
    return rigid.from_quaternion(row["rotation"], row["translation"]).numpy()


def keyframe(rows, k):
    """{channel: sample_data} of the k-th sample."""
    sensors, calibrated = keyed(rows["sensor"]), keyed(rows["calibrated_sensor"])
    own = [d for d in rows["sample_data"] if d["sample_token"] == rows["sample"][k]["token"] and d["is_key_frame"]]
    return {sensors[calibrated[d["calibrated_sensor_token"]]["sensor_token"]]["channel"]: d for d in own}


def world_from_sensor(rows, data):
    calibrated, poses = keyed(rows["calibrated_sensor"]), keyed(rows["ego_pose"])
    return motion(poses[data["ego_pose_token"]]) @ motion(calibrated[data["calibrated_sensor_token"]])


def lidar(folder, rows, k):
    """Points (P, 3) in the world and lidarseg ids (P,)."""
    data = keyframe(rows, k)["LIDAR_TOP"]
    points = np.fromfile(folder / data["filename"], np.float32).reshape(-1, 5)
    ids = np.fromfile(folder / f"lidarseg/v1.0-world/{data['token']}_lidarseg.bin", np.uint8)
    assert len(points) == len(ids) > 20_000
    pose = world_from_sensor(rows, data)
    return points[:, :3] @ pose[:3, :3].T + pose[:3, 3], ids


def labels(folder, rows, k):
    place = f"{rows['scene'][0]['name']}/{rows['sample'][k]['token']}/labels.npz"
    return np.load(folder / "gts" / place), np.load(folder / "openocc_v2" / place)


def overlaps(corners, middle, half):
    """Which triangles (F, 3, 3) meet a box: separating axes (Akenine-Möller, 2001)."""
    v = corners - middle
    edges = np.stack([v[:, 1] - v[:, 0], v[:, 2] - v[:, 1], v[:, 0] - v[:, 2]], 1)
    axes = [np.broadcast_to(e, (len(v), 3)) for e in np.eye(3)] + [np.cross(edges[:, 0], edges[:, 1])]
    axes += [np.cross(np.broadcast_to(e, (len(v), 3)), edges[:, k]) for e in np.eye(3) for k in range(3)]
    meet = np.ones(len(v), bool)
    for axis in axes:
        spans = (v * axis[:, None]).sum(2)
        reach = half * np.abs(axis).sum(1)
        meet &= (spans.min(1) <= reach) & (spans.max(1) >= -reach)
    return meet


# ---- the layout --------------------------------------------------------------------------------------------------


def test_every_token_is_unique_and_every_reference_leads_somewhere(rows):
    for name, table in rows.items():
        if name not in ("visibility", "lidarseg"):
            assert all(len(row["token"]) == 32 and int(row["token"], 16) >= 0 for row in table), name
        assert len(keyed(table)) == len(table), name
    for name, table in rows.items():
        for row in table:
            for field, value in row.items():
                there = field.removesuffix("_token").removeprefix("first_").removeprefix("last_")
                there = {"annotation": "sample_annotation"}.get(there, there)
                if field.endswith("_token") and there in rows:
                    assert value in keyed(rows[there]), (name, field)


def test_every_file_is_there_and_no_other(folder, rows):
    named = {row["filename"] for name in ("sample_data", "lidarseg", "map") for row in rows[name]}
    assert len(named) == len(rows["sample_data"]) + len(rows["lidarseg"]) + 1
    there = {
        str(p.relative_to(folder))
        for top in ("samples", "sweeps", "lidarseg", "maps")
        for p in (folder / top).rglob("*")
        if p.is_file()
    }
    assert named == there
    for row in rows["sample_data"]:
        if row["fileformat"] == "jpg":
            assert cv2.imread(str(folder / row["filename"])).shape == (*SIZE, 3)


def test_cameras_fire_at_12_hz_and_the_lidar_at_20_between_keyframes_at_2_hz(rows):
    stamps = {row["token"]: row["timestamp"] for row in rows["sample"]}
    assert np.diff(list(stamps.values())).tolist() == [500_000] * (KEYFRAMES - 1)
    for channel, data in keyframe(rows, 0).items():
        chain, at = [data], keyed(rows["sample_data"])
        assert data["prev"] == ""
        while chain[-1]["next"]:
            chain.append(at[chain[-1]["next"]])
            assert chain[-1]["prev"] == chain[-2]["token"]
        rate = 20 if channel == "LIDAR_TOP" else 12
        gaps = np.diff([row["timestamp"] for row in chain])
        assert len(chain) == (KEYFRAMES - 1) * rate // 2 + 1 and np.abs(gaps - 1e6 / rate).max() < 2
        for row in chain:  # everything belongs to the keyframe that follows
            late = stamps[row["sample_token"]] - row["timestamp"]
            assert 0 <= late < 500_000 + 43_000 and row["is_key_frame"] == (late < 43_000)


# ---- truth -------------------------------------------------------------------------------------------------------


def test_lidar_points_and_pixels_lie_on_surfaces(folder, rows, world):
    rng = np.random.default_rng(0)
    k = 2
    time = k / scene.KEYFRAMES
    surface = Triangles(world, time)
    points, _ = lidar(folder, rows, k)
    for point in points[rng.choice(len(points), 120, replace=False)]:
        assert distance(point, surface.corners[surface.near(point, 0.05)]) < 0.02
    data = keyframe(rows, k)
    calibrated = keyed(rows["calibrated_sensor"])
    for channel in ("CAM_FRONT", "CAM_BACK_LEFT"):
        number = world.plan.rig.names.index(channel)
        then = time + world.plan.rig.delays[number] / 1e6
        _, hits, _ = world.picture(number, then)
        matrix = np.array(calibrated[data[channel]["calibrated_sensor_token"]]["camera_intrinsic"])
        pose = world_from_sensor(rows, data[channel])
        surface = Triangles(world, then)
        for pixel in rng.choice(np.flatnonzero((hits.face >= 0) & (hits.t < 60)), 40, replace=False):
            y, x = divmod(int(pixel), SIZE[1])
            ray = pose[:3, :3] @ np.linalg.inv(matrix) @ [x + 0.5, y + 0.5, 1.0]
            point = pose[:3, 3] + hits.t[pixel] * ray / np.linalg.norm(ray)
            assert distance(point, surface.corners[surface.near(point, 0.05)]) < 0.005


def test_boxes_hold_the_points_of_their_class(folder, rows):
    instances, categories = keyed(rows["instance"]), keyed(rows["category"])
    met = set()
    for k in range(KEYFRAMES):
        points, ids = lidar(folder, rows, k)
        car = motion(keyed(rows["ego_pose"])[keyframe(rows, k)["LIDAR_TOP"]["ego_pose_token"]])
        held = np.zeros(len(points), bool)
        for row in rows["sample_annotation"]:
            if row["sample_token"] != rows["sample"][k]["token"]:
                continue
            index = categories[instances[row["instance_token"]]["category_token"]]["index"]
            pose, (width, length, height) = motion(row), row["size"]
            local = (points - pose[:3, 3]) @ pose[:3, :3]
            inside = (np.abs(local) <= np.array([length, width, height]) / 2).all(1) & (ids == index)
            assert inside.sum() >= row["num_lidar_pts"] * 0.98 - 1
            held |= inside
            met.add(index)
        close = np.linalg.norm(points[:, :2] - car[:2, 3], axis=1) < 70
        things = (ids > 0) & (ids < 24) & close
        assert things.sum() > 50 and held[things].mean() > 0.995
    assert len(met) >= 4


def test_an_occupied_voxel_has_a_surface_of_its_class_and_a_free_one_has_none_in_its_middle(folder, rows, world):
    rng = np.random.default_rng(1)
    k = 1
    semantics = labels(folder, rows, k)[0]["semantics"]
    car_from_world = np.linalg.inv(world.traffic.world_from_car(k / scene.KEYFRAMES))
    surface = Triangles(world, k / scene.KEYFRAMES, car_from_world, reach=60.0)
    corners, classes = surface.corners, surface.classes
    filled = np.argwhere(semantics != FREE)
    some = [filled[rng.choice(len(filled), 80, replace=False)]]
    some += [np.argwhere(semantics == kind)[:4] for kind in np.unique(semantics) if kind != FREE]
    for voxel in np.concatenate(some):
        middle = LOW + (voxel + 0.5) * VOXEL
        close = surface.near(middle, 0.2001)
        assert (overlaps(corners[close], middle, 0.2001) & (classes[close] == semantics[tuple(voxel)])).any()
    beside = np.zeros_like(semantics, bool)
    for axis in range(3):
        for step in (-1, 1):
            beside |= np.roll(semantics, step, axis) != FREE
    free = np.argwhere((semantics == FREE) & beside)
    for voxel in free[rng.choice(len(free), 120, replace=False)]:
        middle = LOW + (voxel + 0.5) * VOXEL
        close = surface.near(middle, 0.12)
        assert not overlaps(corners[close], middle, 0.12).any()


def test_flow_is_the_motion_of_the_boxes(folder, rows, world):
    seen, fast = 0, 0.0
    for k in range(KEYFRAMES):
        time, h = k / scene.KEYFRAMES, 0.05
        occ3d, openocc = labels(folder, rows, k)
        semantics, flow = occ3d["semantics"], openocc["flow"]
        assert not flow[~np.isin(semantics, OCC3D.moving_ids)].any() and np.isfinite(flow).all()
        car_from_world = np.linalg.inv(world.traffic.world_from_car(time))
        voxels = np.argwhere(np.isin(semantics, OCC3D.moving_ids))
        middles = LOW + (voxels + 0.5) * VOXEL
        owners = np.zeros(len(voxels), int)
        wanted, slack = np.zeros((len(voxels), 2)), np.zeros(len(voxels))
        for actor in [*world.traffic.actors, *world.scenery.things]:
            before, now, after = (car_from_world @ actor.world_from_actor(time + d) for d in (-h, 0.0, h))
            local = (middles - now[:3, 3]) @ now[:3, :3] - actor.model.middle
            mine = (np.abs(local) <= np.array(actor.model.size) / 2 + 0.35).all(1)  # half a voxel's diagonal
            owners += mine
            there = np.c_[local[mine] + actor.model.middle, np.ones(mine.sum())]
            wanted[mine] = (there @ (after - before)[:2].T) / (2 * h)
            turning = np.linalg.norm(after[:3, :3] - before[:3, :3]) / (2 * h)
            slack[mine] = 0.06 + 0.4 * turning
        lone = owners == 1
        got = flow[tuple(voxels[lone].T)]
        assert (np.linalg.norm(got - wanted[lone], axis=1) <= slack[lone]).all()
        assert (owners >= 1).all()
        seen, fast = seen + lone.sum(), max(fast, np.linalg.norm(got, axis=1).max(initial=0))
    assert seen > 100 and fast > 1.0


def test_both_label_files_say_the_same(folder, rows):
    for k in range(KEYFRAMES):
        occ3d, openocc = labels(folder, rows, k)
        assert {n: (occ3d[n].dtype, occ3d[n].shape) for n in occ3d.files} == dict.fromkeys(
            ("semantics", "mask_lidar", "mask_camera"), (np.dtype(np.uint8), OCC3D_GRID.shape)
        )
        assert openocc["flow"].dtype == np.float32 and openocc["flow"].shape == (*OCC3D_GRID.shape, 2)
        for name in OPENOCC.names:
            assert ((openocc["semantics"] == OPENOCC.id(name)) == (occ3d["semantics"] == OCC3D.id(name))).all()


def test_a_voxel_of_mask_camera_is_seen_by_a_camera(folder, rows):
    """By walking in small steps from the cameras of the tables to points of the voxel."""
    rng = np.random.default_rng(2)
    k = 3
    occ3d, _ = labels(folder, rows, k)
    data, calibrated = keyframe(rows, k), keyed(rows["calibrated_sensor"])
    car_from_world = np.linalg.inv(motion(keyed(rows["ego_pose"])[data["LIDAR_TOP"]["ego_pose_token"]]))
    names = [name for name in data if name != "LIDAR_TOP"]
    cameras = Cameras(
        torch.tensor([calibrated[data[n]["calibrated_sensor_token"]]["camera_intrinsic"] for n in names]).double(),
        torch.from_numpy(np.array([car_from_world @ world_from_sensor(rows, data[n]) for n in names])),
        *SIZE,
    )
    filled = occ3d["semantics"] != FREE
    mask = occ3d["mask_camera"] > 0
    assert not (mask & (occ3d["mask_lidar"] == 0)).any()

    def seen(voxel, how_many):
        points = LOW + (voxel + rng.uniform(0.02, 0.98, (60, 3))) * VOXEL
        inside, clear = cameras.sees(torch.from_numpy(points)).numpy(), []
        for camera, eye in enumerate(cameras.car_from_camera[:, :3, 3].numpy()):
            for point in points[inside[camera]]:
                steps = np.linspace(0, 1, int(np.linalg.norm(point - eye) / 0.04) + 2)[:, None]
                cells = np.floor((eye + steps * (point - eye) - LOW) / VOXEL).astype(int)
                clear.append(not filled[tuple(cells[(cells != voxel).any(1)].T)].any())
        return how_many(clear) if len(clear) >= 60 or how_many is any else False

    chosen = np.argwhere(mask)
    sure = [seen(v, any) for v in chosen[rng.choice(len(chosen), 60, replace=False)]]
    assert np.mean(sure) > 0.96  # a ray may cut a corner that no random point is near
    hidden = np.argwhere(~mask & (occ3d["mask_lidar"] > 0))
    assert np.mean([seen(v, all) for v in hidden[rng.choice(len(hidden), 60, replace=False)]]) < 0.04  # cut by a border


def test_labels_and_mask_lidar_hold_where_the_keyframe_s_points_are(folder, rows):
    k = 2
    occ3d, _ = labels(folder, rows, k)
    points, ids = lidar(folder, rows, k)
    car = motion(keyed(rows["ego_pose"])[keyframe(rows, k)["LIDAR_TOP"]["ego_pose_token"]])
    cells = np.floor(((points - car[:3, 3]) @ car[:3, :3] - LOW) / VOXEL).astype(int)
    inside = ((cells >= 0) & (cells < OCC3D_GRID.shape)).all(1)
    cells, ids = cells[inside], ids[inside]
    at = tuple(cells.T)
    filled = occ3d["semantics"][at] != FREE
    assert filled.mean() > 0.98  # noise may lift a point over a voxel's border
    assert occ3d["mask_lidar"][at][filled].mean() > 0.999
    classes = {"vehicle.car": "car", "human.pedestrian.adult": "pedestrian", "vehicle.truck": "truck"}
    classes |= {"static.manmade": "manmade", "flat.driveable_surface": "driveable_surface"}
    for category, name in classes.items():
        mine = ids == tables.CATEGORIES.index(category)
        if mine.sum() > 20:  # the rest shares its voxel with something larger: feet and tyres with the ground
            assert (occ3d["semantics"][at][mine] == OCC3D.id(name)).mean() > 0.75, name


def test_all_classes_are_there_at_plausible_sizes(world):
    assert {OCC3D.names[k] for k in np.unique(world.tracer.classes)} == set(OCC3D.names)
    sizes = {  # m: length, width, height, from and to
        "car": ((3.4, 1.6, 1.3), (6.0, 2.4, 2.6)),
        "truck": ((4.5, 1.8, 1.6), (10.0, 3.0, 4.0)),
        "bus": ((9.0, 2.3, 2.6), (19.0, 3.1, 3.8)),
        "trailer": ((2.5, 1.4, 0.8), (15.0, 2.8, 4.3)),
        "construction_vehicle": ((3.5, 1.7, 2.0), (10.0, 3.2, 4.5)),
        "motorcycle": ((1.8, 0.5, 1.0), (2.6, 1.1, 2.0)),
        "bicycle": ((1.5, 0.4, 0.9), (2.1, 0.9, 2.1)),
        "pedestrian": ((0.2, 0.3, 0.9), (1.3, 1.1, 2.1)),
        "barrier": ((0.2, 0.2, 0.6), (3.5, 3.5, 1.5)),
        "traffic_cone": ((0.2, 0.2, 0.4), (0.6, 0.6, 1.2)),
    }
    kinds = {model.kind for model in models().values()}
    assert kinds >= set(sizes)
    for model in models().values():
        low, high = sizes.get(model.kind, ((0.1,) * 3, (4.0,) * 3))
        assert (np.array(low) <= model.size).all() and (np.array(model.size) <= high).all(), (model.name, model.size)


# ---- bytes -------------------------------------------------------------------------------------------------------


def digest(folder: Path) -> dict[str, str]:
    """Of every file that was written; a reader's cache beside them is its own."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and ".occflow" not in p.parts)
    return {str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest() for p in files}


def test_a_killed_run_leaves_nothing_broken_and_goes_on_to_equal_bytes(folder, tmp_path, monkeypatch):
    out = tmp_path / "b"

    def killed(plan, making, share=(0, 1), step=None):
        (making / "samples").mkdir(parents=True)
        (making / "samples" / "half.jpg").write_bytes(b"half a pict")
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "make", killed)
    with pytest.raises(KeyboardInterrupt):
        write_world(out, 1, processes=1, **ARGUMENTS)
    assert not (out / "v1.0-world").exists() and not (out / "samples").exists()
    monkeypatch.undo()
    write_world(out, 1, processes=2, **ARGUMENTS)  # two processes share the scene
    assert digest(out) == digest(folder)
    monkeypatch.setattr(write, "make", killed)  # what is finished is not made again
    times = {path: path.stat().st_mtime_ns for path in (out / "v1.0-world").iterdir()}
    write_world(out, 1, processes=1, **ARGUMENTS)
    assert digest(out) == digest(folder)
    # nor are tables that others may be reading just now
    assert times == {path: path.stat().st_mtime_ns for path in (out / "v1.0-world").iterdir()}


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_bad_arguments_get_one_sentence(tmp_path):
    for arguments, words in (
        ({"weather": "hail"}, "clear, overcast, dusk, night, rain, fog"),
        ({"scenes": 0}, "at least 1 scene"),
        ({"keyframes": 1}, "2 keyframes"),
        ({"size": (4, 4)}, "too small"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            write_world(tmp_path / "x", **arguments)
        assert "\n" not in str(caught.value) and not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write a world"):
        write_world(tmp_path / "file" / "below")


def test_a_folder_of_another_world_is_left_alone(folder):
    before = digest(folder)
    with pytest.raises(ValueError, match="seed 6 instead of 7"):
        write_world(folder, 1, processes=1, **{**ARGUMENTS, "seed": 7})
    assert digest(folder) == before


def test_a_rig_that_lacks_a_field_is_named(tmp_path):
    path = tmp_path / "rig.json"
    camera = {"name": "FRONT", "intrinsic": [[300, 0, 176], [0, 300, 99], [0, 0, 1]], "translation": [1.5, 0, 1.5]}
    camera |= {"rotation": [0.5, -0.5, 0.5, -0.5], "delay_us": -20000}
    lidar = {"translation": [1, 0, 1.8], "rotation": [1, 0, 0, 0]}
    whole = {"width": 352, "height": 198, "lidar": lidar, "cameras": [camera]}
    path.write_text(json.dumps(whole))
    assert rig.read(path).names == ("FRONT",)
    for field in camera:
        path.write_text(json.dumps({**whole, "cameras": [{k: v for k, v in camera.items() if k != field}]}))
        with pytest.raises(ValueError, match=f"lacks the field '{field}'"):
            write_world(tmp_path / "x", rig=path)
    for field in whole:
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != field}))
        with pytest.raises(ValueError, match=f"lacks the field '{field}'"):
            rig.read(path)
    path.write_text(json.dumps({**whole, "cameras": [{**camera, "intrinsic": [[1, 2], [3, 4]]}]}))
    with pytest.raises(ValueError, match="intrinsic"):
        rig.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        rig.read(path)


def test_a_world_of_another_car_is_read_with_that_car_s_cameras(tmp_path):
    """With names of its own, two cameras, another size: what follows needs no word about it."""
    path = tmp_path / "rig.json"
    ahead = {"intrinsic": [[60, 0, 40], [0, 60, 24], [0, 0, 1]], "rotation": [0.5, -0.5, 0.5, -0.5], "delay_us": -20000}
    cameras = [{"name": "LEFT", "translation": [1.5, 0.5, 1.5], **ahead}]
    cameras += [{"name": "RIGHT", "translation": [1.5, -0.5, 1.5], **ahead}]
    lidar = {"translation": [1, 0, 1.8], "rotation": [0.7071068, 0, 0, -0.7071068]}
    path.write_text(json.dumps({"width": 80, "height": 48, "lidar": lidar, "cameras": cameras}))
    out = write_world(
        tmp_path / "out", 1, keyframes=2, size=(48, 80), rig=path, sweeps=False, processes=1, progress=False
    )
    reader = NuScenes(out, progress=False)
    (key, _) = reader.keyframes("scene-0000")
    frame = reader.frame(key, lidar=1)
    assert frame.names == ("LEFT", "RIGHT") and frame.used.all() and frame.images.shape == (2, 3, 48, 80)
    apart = frame.cameras.car_from_camera[0, :3, 3] - frame.cameras.car_from_camera[1, :3, 3]
    assert apart.tolist() == pytest.approx([0, 1, 0], abs=1e-3)  # it turns while the pictures wait
    assert reader.occupancy(key.sample, "occ3d").seen.any()
    done = write_scene_bag(out, "scene-0000", tmp_path / "bag", progress=False)
    assert (done.keyframes, done.pictures, done.holes, done.truths) == (2, 4, 0, 2)


def test_every_weather_has_light():
    for name in render.WEATHERS:
        assert render.weather(name, np.random.default_rng(0)).exposure > 0
