"""One scene, from a seed to files: traffic, scenery, pictures, sweeps, labels, annotations."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from ...geometry import Cameras, rigid
from ...types import OCC3D
from . import lidar, render, scenery, tables, traffic, truth
from .rig import Rig
from .streets import Town
from .tracer import Hits, Tracer
from .traffic import Actor

MICRO = 1_000_000
BEGIN = 1_600_000_000 * MICRO  # us, stamp of scene 0's first keyframe; scenes are 1000 s apart
KEYFRAMES, CAMERA, LIDAR = 2, 12, 20  # Hz
_SIGHT = 130.0  # m from the car, within which actors are looked for
_ANNOTATED = 75.0  # m, how far nuScenes-like annotations reach
_QUALITY = 90  # of JPEG


@dataclass(frozen=True)
class Plan:
    """What a scene is made of; equal plans give equal bytes."""

    seed: int
    number: int
    keyframes: int
    rig: Rig
    weather: str
    sweeps: bool  # 12 Hz pictures and 20 Hz LiDAR between keyframes
    vehicles: int = 46
    walkers: int = 70

    @property
    def name(self) -> str:
        return f"scene-{self.number:04d}"


class World:
    """A scene's geometry and traffic, ready to be looked at. Times are s after the first keyframe."""

    def __init__(self, plan: Plan):
        self.plan = plan
        streams = np.random.SeedSequence([plan.seed, plan.number]).spawn(4)
        light, plans, moves, builds = (np.random.default_rng(s) for s in streams)
        self.light = render.weather(plan.weather, light)
        town = Town.random(plans)
        duration = (plan.keyframes - 1) / KEYFRAMES
        self.traffic = traffic.simulate(town, moves, duration, vehicles=plan.vehicles, walkers=plan.walkers)
        self.town = self.traffic.town
        self.scenery = scenery.build(self.traffic, builds, leaves=self.light.leaves, duration=duration)
        self.ids = {name: k for k, name in enumerate(OCC3D.names)}
        self.tracer = Tracer(self.scenery, self.ids)
        seed = int(np.random.SeedSequence([plan.seed, plan.number, 1]).generate_state(1)[0] & 0x7FFFFFFF)
        self.painter = render.Painter(self.tracer, self.scenery, self.town, self.light, seed)

    def present(self, time: float) -> tuple[list[int], list[Actor], np.ndarray]:
        """Moving actors near the car at a time: their numbers, themselves, their poses (M, 4, 4)."""
        car = self.traffic.world_from_car(time)[:3, 3]
        poses = self.traffic.poses(time)
        near = np.flatnonzero(np.linalg.norm(poses[:, :3, 3] - car, axis=1) < _SIGHT)
        return near.tolist(), [self.traffic.actors[k] for k in near], poses[near]

    def picture(self, camera: int, time: float) -> tuple[np.ndarray, Hits, list[int]]:
        """(H, W, 3) uint8 BGR of a camera at its own time, what its pixels met, and who `Hits.actor` numbers."""
        rig = self.plan.rig
        car = self.traffic.world_from_car(time)
        who, actors, poses = self.present(time)
        size = (rig.cameras.height, rig.cameras.width)
        matrix = rig.cameras.pixels_from_camera[camera].numpy()
        world_from_camera = car @ rig.cameras.car_from_camera[camera].numpy()
        number = camera * 7919 + round(time * 1000) * 13
        picture, hits = self.painter.picture(matrix, world_from_camera, size, actors, poses, time, car, number)
        return picture, hits, who

    def sweep(self, time: float) -> truth.Shot:
        """A LiDAR sweep."""
        who, actors, poses = self.present(time)
        pose = self.traffic.world_from_car(time) @ self.plan.rig.car_from_lidar
        rng = np.random.default_rng([self.plan.seed, self.plan.number, 2, round(time * 1000) + 1000])
        sweep = lidar.sweep(self.tracer, actors, poses, time, pose, self.light.wet, rng)
        return truth.Shot(time, sweep, pose, who, poses)

    def cameras(self, time: float) -> Cameras:
        """The rig in the car frame of a keyframe at `time`, each camera at its own stamp."""
        rig = self.plan.rig
        car_from_world = rigid.inverse(torch.from_numpy(self.traffic.world_from_car(time)))
        moved = torch.stack(
            [car_from_world @ torch.from_numpy(self.traffic.world_from_car(time + d / MICRO)) for d in rig.delays]
        )
        return rig.cameras.moved(moved)


@dataclass
class Part:
    """What one process made of a scene: rows of some keyframes in their order, and drafts of their annotations."""

    channels: dict[str, list[dict]]  # sample_data by channel, not yet chained
    poses: list[dict]
    lidarseg: list[dict]
    drafts: dict[int, dict[tuple[str, int], dict]]  # keyframe -> ("thing" | "actor", number) -> draft


def make(plan: Plan, out: Path, share: tuple[int, int] = (0, 1), step: Callable[[], None] = lambda: None) -> Part:
    """Write the files of a share (i, n) of a scene's keyframes below `out`: the i-th of n stretches.

    `step` is called after each keyframe. Whatever the shares, the files are the same.
    """
    writer = _Writer(World(plan), out)
    first, last = (plan.keyframes * k // share[1] for k in (share[0], share[0] + 1))
    # processes that begin together compile different kernels first and then have each other's
    labels_first = (plan.number + share[0]) % 2 == 1
    for k in range(first, last):
        writer.keyframe(k, labels_first)
        step()
    return writer.part


def finish(plan: Plan, parts: Sequence[Part]) -> dict[str, list[dict]]:
    """The scene's rows of nuScenes' tables, from all its parts in order."""
    rows: dict[str, list[dict]] = {name: [] for name in tables.TABLES}
    for channel in (*plan.rig.names, "LIDAR_TOP"):
        rows["sample_data"] += tables.chain([row for part in parts for row in part.channels[channel]])
    rows["ego_pose"] = [row for part in parts for row in part.poses]
    rows["lidarseg"] = [row for part in parts for row in part.lidarseg]
    _scene_rows(plan, rows)
    drafts = {k: near for part in parts for k, near in part.drafts.items()}
    for key in sorted({key for near in drafts.values() for key in near}):
        _instance_rows(plan, key, drafts, rows)
    return rows


def _token(plan: Plan, *names) -> str:
    return tables.token(plan.seed, plan.name, *names)


def _stamp(plan: Plan, time: float) -> int:
    """us of a time in s."""
    return BEGIN + plan.number * 1000 * MICRO + round(time * MICRO)


def _scene_rows(plan: Plan, rows: dict[str, list[dict]]) -> None:
    samples = [
        {
            "token": _token(plan, "sample", k),
            "timestamp": _stamp(plan, k / KEYFRAMES),
            "scene_token": _token(plan, "scene"),
        }
        for k in range(plan.keyframes)
    ]
    rows["sample"] = tables.chain(samples)
    rows["scene"].append(
        {
            "token": _token(plan, "scene"),
            "log_token": _token(plan, "log"),
            "nbr_samples": len(samples),
            "first_sample_token": samples[0]["token"],
            "last_sample_token": samples[-1]["token"],
            "name": plan.name,
            "description": f"synthetic street, {plan.weather}",
        }
    )
    day = {"logfile": f"world-{plan.number:04d}", "vehicle": "world", "date_captured": "2020-09-13"}
    rows["log"].append({"token": _token(plan, "log"), **day, "location": "world"})
    for channel, matrix, pose in zip(
        (*plan.rig.names, "LIDAR_TOP"),
        [*plan.rig.cameras.pixels_from_camera.tolist(), []],
        [*plan.rig.cameras.car_from_camera, torch.from_numpy(plan.rig.car_from_lidar)],
    ):
        rotation, place = rigid.to_quaternion(pose)
        rows["calibrated_sensor"].append(
            {
                "token": _token(plan, "calibrated_sensor", channel),
                "sensor_token": tables.token("sensor", channel),
                "translation": place,
                "rotation": rotation,
                "camera_intrinsic": matrix,
            }
        )


def _instance_rows(plan: Plan, key, drafts, rows) -> None:
    """Boxes of what a ray or a picture met, from the first such keyframe to the last."""
    met = [k for k, near in drafts.items() if key in near and near[key]["met"]]
    if not met:
        return
    instance, own = _token(plan, "instance", *key), []
    for k in range(min(met), max(met) + 1):
        if key in drafts[k]:
            draft = dict(drafts[k][key])
            del draft["met"]
            category = draft.pop("category")
            names = {"token": _token(plan, "sample_annotation", *key, k), "sample_token": _token(plan, "sample", k)}
            own.append({**names, "instance_token": instance, **draft})
    rows["sample_annotation"] += tables.chain(own)
    rows["instance"].append(
        {
            "token": instance,
            "category_token": tables.token("category", category),
            "nbr_annotations": len(own),
            "first_annotation_token": own[0]["token"],
            "last_annotation_token": own[-1]["token"],
        }
    )


class _Writer:
    def __init__(self, world: World, out: Path):
        self.world, self.plan, self.out = world, world.plan, out
        self.part = Part({name: [] for name in (*self.plan.rig.names, "LIDAR_TOP")}, [], [], {})
        self.sweeps = [world.sweep(k / KEYFRAMES) for k in range(self.plan.keyframes)]

    def keyframe(self, k: int, labels_first: bool) -> None:
        """Everything of keyframe k; in which order says `labels_first`, the files are the same."""
        time = k / KEYFRAMES
        if labels_first:
            self._labels(k, time)
        shown = self._pictures(k, time)
        self._lidar(k, time)
        if not labels_first:
            self._labels(k, time)
        self.part.drafts[k] = self._drafts(k, time, shown)

    # ---- sensors -------------------------------------------------------------------------------------------------

    def _data(self, channel: str, k: int, time: float, key: bool, suffix: str, size) -> dict:
        """A row of sample_data and its ego pose; k is the keyframe it belongs to (itself, or the one that follows)."""
        stamp = _stamp(self.plan, time)
        name = _token(self.plan, "sample_data", channel, stamp)
        folder = "samples" if key else "sweeps"
        rotation, place = rigid.to_quaternion(torch.from_numpy(self.world.traffic.world_from_car(time)))
        self.part.poses.append({"token": name, "timestamp": stamp, "rotation": rotation, "translation": place})
        return {
            "token": name,
            "sample_token": _token(self.plan, "sample", k),
            "ego_pose_token": name,
            "calibrated_sensor_token": _token(self.plan, "calibrated_sensor", channel),
            "timestamp": stamp,
            "fileformat": "pcd" if suffix == "pcd.bin" else suffix,
            "is_key_frame": key,
            "height": size[0],
            "width": size[1],
            "filename": f"{folder}/{channel}/world-{self.plan.number:04d}__{channel}__{stamp}.{suffix}",
        }

    def _file(self, row_or_name) -> Path:
        path = self.out / (row_or_name if isinstance(row_or_name, str) else row_or_name["filename"])
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _pictures(self, k: int, time: float) -> list[tuple[Hits, list[int]]]:
        """The pictures since the last keyframe and those of this one; returns what this one's met, camera by camera."""
        rig, shown = self.plan.rig, []
        size = (rig.cameras.height, rig.cameras.width)
        per = CAMERA // KEYFRAMES
        between = range(1, per) if self.plan.sweeps and k > 0 else ()
        for camera, (channel, delay) in enumerate(zip(rig.names, rig.delays)):
            for j in (*between, per):
                then = time - (per - j) / CAMERA + delay / MICRO
                picture, hits, who = self.world.picture(camera, then)
                row = self._data(channel, k, then, j == per, "jpg", size)
                done, file = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
                assert done
                self._file(row).write_bytes(file.tobytes())
                self.part.channels[channel].append(row)
            shown.append((hits, who, then))
        return shown

    def _lidar(self, k: int, time: float) -> None:
        rows = self.part.channels["LIDAR_TOP"]
        per = LIDAR // KEYFRAMES
        for j in range(1, per) if self.plan.sweeps and k > 0 else ():
            then = time - (per - j) / LIDAR
            row = self._data("LIDAR_TOP", k, then, False, "pcd.bin", (0, 0))
            self.world.sweep(then).sweep.points.tofile(self._file(row))
            rows.append(row)
        row = self._data("LIDAR_TOP", k, time, True, "pcd.bin", (0, 0))
        sweep = self.sweeps[k].sweep
        actors = [self.world.traffic.actors[n] for n in self.sweeps[k].who]
        sweep.points.tofile(self._file(row))
        rows.append(row)
        tracer, things = self.world.tracer, self.world.scenery.things
        surface = np.array([tables.lidarseg_id(n) if n in tables._SURFACES else 0 for n in OCC3D.names], np.uint8)
        ids = surface[tracer.classes[sweep.face]]
        numbers = tracer.instance[sweep.face]
        of_things = np.array([tables.CATEGORIES.index(t.model.category) for t in things] + [0], np.uint8)
        ids = np.where(numbers >= 0, of_things[numbers], ids)
        of_actors = np.array([tables.CATEGORIES.index(a.model.category) for a in actors] + [0], np.uint8)
        ids = np.where(sweep.actor >= 0, of_actors[sweep.actor], ids).astype(np.uint8)
        name = f"lidarseg/{tables.VERSION}/{row['token']}_lidarseg.bin"
        ids.tofile(self._file(name))
        self.part.lidarseg.append({"token": row["token"], "sample_data_token": row["token"], "filename": name})

    # ---- truth ---------------------------------------------------------------------------------------------------

    def _labels(self, k: int, time: float) -> None:
        world = self.world
        car = world.traffic.world_from_car(time)
        semantics, flow = truth.occupancy(world.tracer, world.traffic, time, car)
        poses = world.traffic.poses(time)
        mask_lidar, mask_camera = truth.masks(semantics, self.sweeps, time, poses, car, world.cameras(time))
        labels = truth.Labels(semantics, flow, mask_lidar, mask_camera)
        place = f"{self.plan.name}/{_token(self.plan, 'sample', k)}/labels.npz"
        masks = {"mask_lidar": mask_lidar, "mask_camera": mask_camera}
        np.savez_compressed(self._file(f"gts/{place}"), semantics=semantics, **masks)
        np.savez_compressed(self._file(f"openocc_v2/{place}"), semantics=labels.openocc, flow=flow)

    def _drafts(self, k: int, time: float, shown) -> dict[tuple[str, int], dict]:
        """Annotations of what stands near at a keyframe, and whether a ray or a picture met it."""
        world = self.world
        car = world.traffic.world_from_car(time)
        sweep, who = self.sweeps[k].sweep, self.sweeps[k].who
        points: dict = {}
        static = world.tracer.instance[sweep.face[sweep.actor < 0]]
        for number, count in zip(*np.unique(static[static >= 0], return_counts=True)):
            points["thing", int(number)] = int(count)
        for number, count in zip(*np.unique(sweep.actor[sweep.actor >= 0], return_counts=True)):
            points["actor", who[number]] = int(count)
        then = [(world.traffic.poses(t), world.traffic.world_from_car(t)) for _, _, t in shown]
        poses = world.traffic.poses(time)
        keys, actors = zip(*self._everything())
        standing = np.array([t.pose for t in world.scenery.things]).reshape(-1, 4, 4)
        framed = []  # by camera: who can be in its picture
        for matrix, mounting, (places, car_then) in zip(
            self.plan.rig.cameras.pixels_from_camera.numpy(), self.plan.rig.cameras.car_from_camera.numpy(), then
        ):
            size = (self.plan.rig.cameras.height, self.plan.rig.cameras.width)
            everywhere = np.concatenate([standing, places])
            within = render.within(matrix, car_then @ mounting, size, actors, everywhere, 0.0)
            framed.append({keys[n] for n in within})
        drafts = {}
        for key, actor in zip(keys, actors):
            pose = poses[key[1]] if key[0] == "actor" else actor.pose
            if np.linalg.norm(pose[:2, 3] - car[:2, 3]) > _ANNOTATED:
                continue
            count, part = points.get(key, 0), self._visible(key, actor, shown, then, framed)
            rotation, _ = rigid.to_quaternion(torch.from_numpy(pose))
            attribute = actor.attribute(time)
            length, width, height = actor.model.size
            drafts[key] = {
                "visibility_token": tables.visibility_token(part),
                "attribute_tokens": [tables.token("attribute", attribute)] if attribute else [],
                "translation": (pose[:3, :3] @ actor.model.middle + pose[:3, 3]).tolist(),
                "size": [width, length, height],
                "rotation": rotation,
                "num_lidar_pts": count,
                "num_radar_pts": 0,
                "met": bool(count or part),
                "category": actor.model.category,
            }
        return drafts

    def _everything(self):
        yield from ((("thing", k), a) for k, a in enumerate(self.world.scenery.things))
        yield from ((("actor", k), a) for k, a in enumerate(self.world.traffic.actors))

    def _visible(self, key, actor: Actor, shown, around, framed) -> float:
        """Part of the points on a thing's near sides that the keyframe's pictures show."""
        rig, world = self.plan.rig, self.world
        total = seen = 0
        for camera, (hits, who, then) in enumerate(shown):
            if key not in framed[camera]:
                continue
            poses, car = around[camera]
            pose = poses[key[1]] if key[0] == "actor" else actor.pose
            camera_from_thing = np.linalg.inv(car @ rig.cameras.car_from_camera[camera].numpy()) @ pose
            mesh = world.tracer.shape(actor, then)[1]
            chosen = mesh.faces[:: max(1, len(mesh.faces) // 160)]
            corners = mesh.vertices[chosen]
            middles = corners.mean(1)
            normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
            eye = np.linalg.inv(camera_from_thing)[:3, 3]
            middles = middles[((eye - middles) * normal).sum(1) > 0]
            places = middles @ camera_from_thing[:3, :3].T + camera_from_thing[:3, 3]
            places = places[places[:, 2] > 0.3]
            if not len(places):
                continue
            pixels = places @ rig.cameras.pixels_from_camera[camera].numpy().T
            x, y = np.floor(pixels[:, :2] / pixels[:, 2:]).astype(int).T
            inside = (x >= 0) & (x < rig.cameras.width) & (y >= 0) & (y < rig.cameras.height)
            if inside.any():
                at = y[inside] * rig.cameras.width + x[inside]
                if key[0] == "actor":
                    number = who.index(key[1]) if key[1] in who else -2
                    mine = hits.actor[at] == number
                else:
                    mine = (hits.actor[at] < 0) & (hits.face[at] >= 0)
                    mine &= world.tracer.instance[np.maximum(hits.face[at], 0)] == key[1]
                # what it hides itself counts as seen with the rest of it: compare with its share that is met at all
                total += len(places)
                seen += int(mine.sum())
        return min(1.0, 1.25 * seen / total) if total else 0.0


def dump(rows: dict[str, list[dict]], path: Path) -> None:
    """Rows of a scene as JSON, written beside and renamed."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(rows))
    beside.rename(path)
