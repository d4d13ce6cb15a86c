"""nuScenes' tables: rows of one scene, and the whole written as JSON. Tokens are hashes of names: 32 hex digits."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from .rig import Rig

VERSION = "v1.0-world"
CATEGORIES = (  # in the order of lidarseg's ids
    "noise animal human.pedestrian.adult human.pedestrian.child human.pedestrian.construction_worker "
    "human.pedestrian.personal_mobility human.pedestrian.police_officer human.pedestrian.stroller "
    "human.pedestrian.wheelchair movable_object.barrier movable_object.debris movable_object.pushable_pullable "
    "movable_object.trafficcone static_object.bicycle_rack vehicle.bicycle vehicle.bus.bendy vehicle.bus.rigid "
    "vehicle.car vehicle.construction vehicle.emergency.ambulance vehicle.emergency.police vehicle.motorcycle "
    "vehicle.trailer vehicle.truck flat.driveable_surface flat.other flat.sidewalk flat.terrain static.manmade "
    "static.other static.vegetation vehicle.ego"
).split()
_SURFACES = {
    "driveable_surface": "flat.driveable_surface",
    "other_flat": "flat.other",
    "sidewalk": "flat.sidewalk",
    "terrain": "flat.terrain",
    "manmade": "static.manmade",
    "vegetation": "static.vegetation",
    "others": "static.other",
}
ATTRIBUTES = (
    "vehicle.moving vehicle.stopped vehicle.parked cycle.with_rider cycle.without_rider "
    "pedestrian.sitting_lying_down pedestrian.standing pedestrian.moving"
).split()
_VISIBILITY = ("v0-40", "v40-60", "v60-80", "v80-100")
TABLES = (
    "scene sample sample_data ego_pose calibrated_sensor sensor sample_annotation instance category attribute "
    "visibility log map lidarseg"
).split()


def token(*names) -> str:
    """32 hex digits that always belong to these names."""
    return hashlib.md5("/".join(map(str, names)).encode()).hexdigest()


def lidarseg_id(kind: str) -> int:
    """Id of a surface class of occ3d-nuscenes in lidarseg files."""
    return CATEGORIES.index(_SURFACES[kind])


def visibility_token(part: float) -> str:
    """nuScenes' four levels, from the part of a thing that the pictures show."""
    return str(1 + (part > 0.4) + (part > 0.6) + (part > 0.8))


def common(rig: Rig) -> dict[str, list[dict]]:
    """Rows that all scenes share."""
    sensors = [*((name, "camera") for name in rig.names), ("LIDAR_TOP", "lidar")]
    return {
        "category": [
            {"token": token("category", name), "name": name, "description": "", "index": k}
            for k, name in enumerate(CATEGORIES)
        ],
        "attribute": [{"token": token("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES],
        "visibility": [
            {"token": str(k + 1), "level": level, "description": f"visible part: {level[1:]} %"}
            for k, level in enumerate(_VISIBILITY)
        ],
        "sensor": [
            {"token": token("sensor", channel), "channel": channel, "modality": modality}
            for channel, modality in sensors
        ],
    }


def chain(rows: list[dict]) -> list[dict]:
    """prev and next of rows that follow each other."""
    for row, before, after in zip(rows, [None, *rows[:-1]], [*rows[1:], None]):
        row["prev"], row["next"] = before["token"] if before else "", after["token"] if after else ""
    return rows


def write(folder: Path, fragments: Iterable[dict[str, list[dict]]], rig: Rig) -> None:
    """All tables of the scenes' fragments, in their order, each written beside and renamed; one that stands there as it
    should be is left alone: others may be reading it, or finishing the same world."""
    merged: dict[str, list[dict]] = {name: [] for name in TABLES}
    merged.update(common(rig))
    for fragment in fragments:
        for name, rows in fragment.items():
            merged[name] += rows
    logs = [row["token"] for row in merged["log"]]
    merged["map"] = [
        {"token": token("map"), "category": "semantic_prior", "filename": "maps/world.png", "log_tokens": logs}
    ]
    names = [row["name"] for row in merged["scene"]]
    held = max(1, round(len(names) / 6)) if len(names) > 1 else 0
    splits = {"world_train": names[: len(names) - held], "world_val": names[len(names) - held :]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in [*merged.items(), ("splits", splits)]:
        path, text = folder / f"{name}.json", json.dumps(rows, indent=0)
        if path.is_file() and path.read_text() == text:
            continue
        beside = folder / f".{name}.{os.getpid()}.part"
        beside.write_text(text)
        beside.rename(path)
