"""A small world with a turn and traffic, and its geometry as triangles, told by numpy alone."""

import numpy as np

# the car turns by 31 degrees; a car, a truck and bicycles drive within 30 m of it
KEYFRAMES, SIZE, SEED = 4, (54, 96), 6
ARGUMENTS = {"seed": SEED, "keyframes": KEYFRAMES, "size": SIZE, "weather": "clear", "progress": False}


class Triangles:
    """All triangles within `reach` m of the car at a time, told in a frame: corners (F, 3, 3) and classes (F,)."""

    def __init__(self, world, time, frame_from_world=None, reach=120.0):
        tracer, car = world.tracer, world.traffic.world_from_car(time)[:3, 3]
        corners, classes = [tracer.static.vertices[tracer.static.faces]], [tracer.classes[: len(tracer.static.faces)]]
        for actor in world.traffic.actors:
            first, mesh = tracer.shape(actor, time)
            pose = actor.world_from_actor(time)
            corners.append((mesh.vertices @ pose[:3, :3].T + pose[:3, 3])[mesh.faces])
            classes.append(tracer.classes[first : first + len(mesh.faces)])
        corners, classes = np.concatenate(corners), np.concatenate(classes)
        close = (np.abs(corners - car) < reach).all(2).any(1)
        self.corners, self.classes = corners[close], classes[close]
        if frame_from_world is not None:
            self.corners = self.corners @ frame_from_world[:3, :3].T + frame_from_world[:3, 3]
        self.low, self.high = self.corners.min(1), self.corners.max(1)

    def near(self, point, margin):
        """Numbers of the triangles whose boxes come within a margin of a point."""
        few = np.flatnonzero((self.low[:, 0] < point[0] + margin) & (self.high[:, 0] > point[0] - margin))
        low, high = self.low[few], self.high[few]
        return few[((low < point + margin) & (high > point - margin)).all(1)]


def distance(point, corners):
    """m from a point to the nearest of triangles (F, 3, 3), by projecting onto planes and edges."""
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    best = np.inf
    normal = np.cross(b - a, c - a)
    area = np.linalg.norm(normal, axis=1)
    solid = area > 1e-12
    unit = normal[solid] / area[solid, None]
    height = ((point - a[solid]) * unit).sum(1)
    foot = point - height[:, None] * unit
    inside = np.ones(len(foot), bool)
    for p, q in ((a, b), (b, c), (c, a)):
        inside &= (np.cross(q[solid] - p[solid], foot - p[solid]) * unit).sum(1) >= 0
    if inside.any():
        best = np.abs(height[inside]).min()
    for p, q in ((a, b), (b, c), (c, a)):
        along = np.clip(((point - p) * (q - p)).sum(1) / np.maximum(((q - p) ** 2).sum(1), 1e-12), 0, 1)
        best = min(best, np.linalg.norm(p + along[:, None] * (q - p) - point, axis=1).min())
    return best
