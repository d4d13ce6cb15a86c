"""Compiled loops of `truth`: surfaces into voxels, rays through voxels. V vertices, F faces, S classes, P points."""

import math

import numpy as np

from ...ops.compiled_numba import compiled


@compiled
def stamp(vertices, faces, classes, low, voxel, spacing, area):
    """Add to area (X, Y, Z, S) float32 the m2 of surface of each class in each voxel.

    vertices (V, 3) m in the frame of the grid; every face is sampled at points at most `spacing` m apart along both
    its edges, each standing for its share of the face.
    """
    nx, ny, nz = area.shape[:3]
    hx, hy, hz = low[0] + nx * voxel[0], low[1] + ny * voxel[1], low[2] + nz * voxel[2]
    for f in range(len(faces)):
        i, j, k = faces[f]
        ax, ay, az = vertices[i]
        bx, by, bz = vertices[j]
        cx, cy, cz = vertices[k]
        if max(ax, bx, cx) < low[0] or max(ay, by, cy) < low[1] or max(az, bz, cz) < low[2]:
            continue
        if min(ax, bx, cx) >= hx or min(ay, by, cy) >= hy or min(az, bz, cz) >= hz:
            continue
        ux, uy, uz, vx, vy, vz = bx - ax, by - ay, bz - az, cx - ax, cy - ay, cz - az
        nu = max(1, math.ceil(math.sqrt(ux * ux + uy * uy + uz * uz) / spacing))
        nv = max(1, math.ceil(math.sqrt(vx * vx + vy * vy + vz * vz) / spacing))
        px, py, pz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        count = 0
        for m in range(nu):
            count += _row(m, nu, nv)
        share = 0.5 * math.sqrt(px * px + py * py + pz * pz) / count
        s = classes[f]
        for m in range(nu):
            a = (m + 0.5) / nu
            for n in range(_row(m, nu, nv)):
                b = (n + 0.5) / nv
                if a + b > 1:
                    b = max((n / nv + 1 - a) / 2, 0.0)
                x = math.floor((ax + a * ux + b * vx - low[0]) / voxel[0])
                y = math.floor((ay + a * uy + b * vy - low[1]) / voxel[1])
                z = math.floor((az + a * uz + b * vz - low[2]) / voxel[2])
                if 0 <= x < nx and 0 <= y < ny and 0 <= z < nz:
                    area[x, y, z, s] += share


@compiled
def stamp_motion(vertices, speeds, faces, classes, low, voxel, spacing, labels, weight, motion):
    """Add to weight (X, Y, Z) and motion (X, Y, Z, 2) the samples whose class is the label of their voxel.

    speeds (V, 2) m/s of the vertices; between them speed is linear, as it is on what turns as a whole.
    """
    nx, ny, nz = labels.shape
    for f in range(len(faces)):
        i, j, k = faces[f]
        a0, b0, c0 = vertices[i], vertices[j], vertices[k]
        u0, v0 = b0 - a0, c0 - a0
        nu = max(1, math.ceil(math.sqrt(u0[0] ** 2 + u0[1] ** 2 + u0[2] ** 2) / spacing))
        nv = max(1, math.ceil(math.sqrt(v0[0] ** 2 + v0[1] ** 2 + v0[2] ** 2) / spacing))
        count = 0
        for m in range(nu):
            count += _row(m, nu, nv)
        px, py = u0[1] * v0[2] - u0[2] * v0[1], u0[2] * v0[0] - u0[0] * v0[2]
        pz = u0[0] * v0[1] - u0[1] * v0[0]
        share = 0.5 * math.sqrt(px * px + py * py + pz * pz) / count
        for m in range(nu):
            a = (m + 0.5) / nu
            for n in range(_row(m, nu, nv)):
                b = (n + 0.5) / nv
                if a + b > 1:
                    b = max((n / nv + 1 - a) / 2, 0.0)
                x = math.floor((a0[0] + a * u0[0] + b * v0[0] - low[0]) / voxel[0])
                y = math.floor((a0[1] + a * u0[1] + b * v0[1] - low[1]) / voxel[1])
                z = math.floor((a0[2] + a * u0[2] + b * v0[2] - low[2]) / voxel[2])
                if 0 <= x < nx and 0 <= y < ny and 0 <= z < nz and labels[x, y, z] == classes[f]:
                    weight[x, y, z] += share
                    for c in range(2):
                        speed = (1 - a - b) * speeds[i, c] + a * speeds[j, c] + b * speeds[k, c]
                        motion[x, y, z, c] += share * speed


@compiled
def _row(m, nu, nv):
    """How many samples lie in row m of a triangle cut into nu x nv."""
    return max(1, math.ceil((1 - (m + 0.5) / nu) * nv - 1e-9))


@compiled
def winners(area, free):
    """The class with the largest area in each voxel (the lowest id where two are equal), `free` where there is none."""
    nx, ny, nz, classes = area.shape
    out = np.full((nx, ny, nz), free, np.uint8)
    for x in range(nx):
        for y in range(ny):
            for z in range(nz):
                best = np.float32(0)
                for s in range(classes):
                    if area[x, y, z, s] > best:
                        best = area[x, y, z, s]
                        out[x, y, z] = s
    return out


@compiled
def observe(origin, points, empty, seen, low, voxel):
    """Mark in seen (X, Y, Z) the empty voxels between an origin and points (P, 3) and the filled ones of the points."""
    shape = seen.shape
    start, ray = np.empty(3), np.empty(3)
    cell, step = np.empty(3, np.int64), np.empty(3, np.int64)
    border, across = np.empty(3), np.empty(3)
    for p in range(len(points)):
        enter, leave = 0.0, 1.0
        for k in range(3):
            start[k] = (origin[k] - low[k]) / voxel[k]
            ray[k] = (points[p, k] - low[k]) / voxel[k] - start[k]
            if ray[k] == 0:
                if start[k] < 0 or start[k] >= shape[k]:
                    leave = -1.0
            else:
                a, b = -start[k] / ray[k], (shape[k] - start[k]) / ray[k]
                enter, leave = max(enter, min(a, b)), min(leave, max(a, b))
        if enter >= leave:
            continue
        inside = True
        for k in range(3):
            cell[k] = min(max(math.floor(start[k] + (enter + 1e-9) * ray[k]), 0), shape[k] - 1)
            step[k] = 1 if ray[k] >= 0 else -1
            if ray[k] == 0:
                border[k], across[k] = 1e30, 1e30
            else:
                border[k] = (cell[k] + (step[k] > 0) - start[k]) / ray[k]
                across[k] = step[k] / ray[k]
        while True:
            k = 0
            if border[1] < border[k]:
                k = 1
            if border[2] < border[k]:
                k = 2
            last = border[k] >= 1.0
            if last:
                if not empty[cell[0], cell[1], cell[2]]:
                    seen[cell[0], cell[1], cell[2]] = True
                break
            if empty[cell[0], cell[1], cell[2]]:
                seen[cell[0], cell[1], cell[2]] = True
            cell[k] += step[k]
            border[k] += across[k]
            inside = 0 <= cell[k] < shape[k]
            if not inside:
                break
