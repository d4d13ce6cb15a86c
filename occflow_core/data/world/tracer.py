"""Rays into the world by Embree: one scene for what never moves, one small scene for each shape that can.

A moving shape keeps its scene; the rays that come near it are told in its frame. So nothing is rebuilt when it moves.
N rays, M actors, F faces of everything together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import shade_numba as loops
from .meshes import Mesh, join
from .models import models
from .scenery import Scenery
from .traffic import Actor

FAR = 1e4  # m


@dataclass(frozen=True)
class Hits:
    """Where rays end. `t` is FAR and `face` -1 where they meet nothing."""

    t: np.ndarray  # (N,) float32 m
    face: np.ndarray  # (N,) int32, in the tables of `Tracer`
    actor: np.ndarray  # (N,) int32, -1 for what never moves
    u: np.ndarray  # (N,) float32, barycentric
    v: np.ndarray  # (N,) float32


class Tracer:
    """The world as rays see it.

    Tables over all faces: `normals` (F, 3, 3), `kinds`, `colours` (F, 3) linear, `aux`, `classes` (F,) uint8 of
    occ3d-nuscenes, `instance` (F,) int32: number of the static thing that a static face belongs to, -1 none.
    """

    def __init__(self, scenery: Scenery, ids: dict[str, int]):
        static, classes, instance = [], [], []
        for mesh, kind in scenery.parts:
            static.append(mesh)
            classes.append(np.full(len(mesh.faces), ids[kind], np.uint8))
            instance.append(np.full(len(mesh.faces), -1, np.int32))
        for number, thing in enumerate(scenery.things):
            mesh = _stood(thing)
            static.append(mesh)
            classes.append(np.full(len(mesh.faces), ids[thing.model.kind], np.uint8))
            instance.append(np.full(len(mesh.faces), number, np.int32))
        self.static = join(static)
        self._scene = _embree(self.static)
        tables = [(self.static, _flat_normals(self.static), np.concatenate(classes), np.concatenate(instance))]
        first = len(self.static.faces)
        self.shapes = {}  # (model's name, shape) -> (first face, Embree scene, mesh)
        for model in models().values():
            for k, mesh in enumerate(model.meshes):
                self.shapes[model.name, k] = [first, None, mesh]
                first += len(mesh.faces)
                n = len(mesh.faces)
                kind = np.full(n, ids[model.kind], np.uint8)
                tables.append((mesh, mesh.corner_normals, kind, np.full(n, -1, np.int32)))
        # smooth normals for round static things too: those of their own models
        at = len(self.static.faces) - sum(len(m.faces) for m in static[len(scenery.parts) :])
        for thing in scenery.things:
            mesh = thing.model.meshes[0]
            turned = mesh.corner_normals @ thing.pose[:3, :3].T.astype(np.float32)
            tables[0][1][at : at + len(mesh.faces)] = turned
            at += len(mesh.faces)
        self.normals = np.ascontiguousarray(np.concatenate([t[1] for t in tables]), dtype=np.float32)
        self.kinds = np.concatenate([t[0].kind for t in tables])
        self.colours = np.concatenate([t[0].colour for t in tables]).astype(np.float32) ** np.float32(2.2)
        self.aux = np.concatenate([t[0].aux for t in tables])
        self.classes = np.concatenate([t[2] for t in tables])
        self.instance = np.concatenate([t[3] for t in tables])

    def shape(self, actor: Actor, time: float) -> tuple[int, Mesh]:
        """First face and mesh that an actor shows at a time."""
        first, _, mesh = self.shapes[actor.model.name, actor.shape(time)]
        return first, mesh

    def _shape_scene(self, actor: Actor, time: float):
        entry = self.shapes[actor.model.name, actor.shape(time)]
        if entry[1] is None:
            entry[1] = _embree(entry[2])
        return entry[0], entry[1]

    def cast(
        self, origins: np.ndarray, directions: np.ndarray, actors: Sequence[Actor], poses: np.ndarray, time: float
    ) -> Hits:
        """First hits of rays (N, 3) float32, directions of length one, among actors that stand at poses (M, 4, 4)."""
        hit = self._scene.run(origins, directions, output=1)
        face, t = hit["primID"], hit["tfar"]
        t = np.where(face < 0, np.float32(FAR), t)
        u, v = hit["u"].copy(), hit["v"].copy()
        face, actor = face.astype(np.int32), np.full(len(face), -1, np.int32)
        for number, (who, pose) in enumerate(zip(actors, poses)):
            centre = (pose[:3, :3] @ who.model.middle + pose[:3, 3]).astype(np.float32)
            chosen = loops.near(origins, directions, t, centre, np.float32(1.01 * who.model.reach))
            if len(chosen):
                o, d = loops.into(origins, directions, chosen, pose[:3, :3], pose[:3, 3])
                first, scene = self._shape_scene(who, time)
                new = scene.run(o, d, output=1)
                loops.merge(t, face, actor, u, v, chosen, new["tfar"], new["primID"], new["u"], new["v"], first, number)
        return Hits(t, face, actor, u, v)

    def blocked(
        self, origins: np.ndarray, directions: np.ndarray, actors: Sequence[Actor], poses: np.ndarray, time: float
    ) -> np.ndarray:
        """Does anything stand in the way of rays (N, 3)? (N,) bool."""
        out = self._scene.run(origins, directions, query="OCCLUDED") != -1
        limit = np.where(out, np.float32(-1), np.float32(FAR))
        for who, pose in zip(actors, poses):
            centre = (pose[:3, :3] @ who.model.middle + pose[:3, 3]).astype(np.float32)
            chosen = loops.near(origins, directions, limit, centre, np.float32(1.01 * who.model.reach))
            if len(chosen):
                o, d = loops.into(origins, directions, chosen, pose[:3, :3], pose[:3, 3])
                met = self._shape_scene(who, time)[1].run(o, d, query="OCCLUDED") != -1
                out[chosen] |= met
        return out


def _stood(thing: Actor) -> Mesh:
    """A static thing's mesh in the world, its paint fixed."""
    mesh = thing.model.meshes[0]
    from .meshes import CLOTH, PAINT

    painted = (mesh.kind == PAINT) | (mesh.kind == CLOTH)
    paint = thing.colours[(mesh.aux == 1).astype(int)]
    colour = np.where(painted[:, None], mesh.colour * paint, mesh.colour).astype(np.float32)
    vertices = mesh.vertices @ thing.pose[:3, :3].T + thing.pose[:3, 3]
    return Mesh(vertices, mesh.faces, mesh.kind, colour, mesh.aux)


def _flat_normals(mesh: Mesh) -> np.ndarray:
    a, b, c = (mesh.vertices[mesh.faces[:, i]] for i in range(3))
    normal = np.cross(b - a, c - a)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    return np.repeat(normal[:, None], 3, axis=1).astype(np.float32)


def _embree(mesh: Mesh):
    """ImportError with what to install where Embree is not there."""
    try:
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene
    except ImportError as error:
        raise ImportError("the synthetic world casts its rays with Embree: pip install embreex") from error
    scene = EmbreeScene()
    TriangleMesh(scene, mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32))
    return scene
