"""The loops of `aggregate` and `voxelise` compiled for the CPU: equal to their plain definitions, which stand there.

All kernels are in one file, because numba's cache looks at the file of a kernel only. They release the interpreter
lock: threads are the caller's. P points, R rays, M boxes, S sweeps, V voxels, C classes.
"""

import numpy as np

from ..ops.compiled_numba import compiled


@compiled
def inside(points, wanted, box_from_local, half, kinds, grow, ring, box, depth):
    """`aggregate.inside` for points (P, 3) float32 and boxes (M, 4, 4), (M, 3); fills box (P,) and depth (P,)."""
    boxes = len(half)
    middle, reach = np.empty((boxes, 3)), np.empty(boxes)
    for m in range(boxes):
        for i in range(3):
            middle[m, i] = 0.0
            for j in range(3):
                middle[m, i] -= box_from_local[m, j, i] * box_from_local[m, j, 3]
        reach[m] = (half[m, 0] ** 2 + half[m, 1] ** 2 + half[m, 2] ** 2) ** 0.5 + 2 * ring
    for p in range(len(points)):
        x, y, z = points[p, 0], points[p, 1], points[p, 2]
        best = 1e9
        for m in range(boxes):
            if abs(x - middle[m, 0]) > reach[m] or abs(y - middle[m, 1]) > reach[m]:
                continue
            out = -1e9
            for i in range(3):
                row = box_from_local[m, i]
                out = max(out, abs(row[0] * x + row[1] * y + row[2] * z + row[3]) - half[m, i])
            if out > ring or (out > grow and wanted[p] != kinds[m] and wanted[p] != 255):
                continue
            rank = out - (1000.0 if wanted[p] == kinds[m] else 0.0)
            if rank < best:
                best, box[p], depth[p] = rank, m, out


@compiled
def nearest(points, limit, heads, keys, links, refs, kinds, cell, low, steps, ground, label):
    """Class of the nearest reference within limit (P,) m; see `aggregate.nearest`. heads, keys: an open hash table of
    cells, links: the next reference in the same cell."""
    mask = len(heads) - 1
    for p in range(len(points)):
        x, y, z = points[p, 0], points[p, 1], points[p, 2]
        best = limit[p] * limit[p]
        if best <= 0:
            continue
        r = limit[p]
        cx0, cx1 = int((x - r - low[0]) // cell), int((x + r - low[0]) // cell)
        cy0, cy1 = int((y - r - low[1]) // cell), int((y + r - low[1]) // cell)
        cz0, cz1 = int((z - r - low[2]) // cell), int((z + r - low[2]) // cell)
        hx, hy, hz = int((x - low[0]) // cell), int((y - low[1]) // cell), int((z - low[2]) // cell)
        for turn in range(2):  # its own cell first: what is found there rules most others out
            for cx in range(cx0, cx1 + 1):
                for cy in range(cy0, cy1 + 1):
                    for cz in range(cz0, cz1 + 1):
                        home = cx == hx and cy == hy and cz == hz
                        there = 0 <= cx < steps[0] and 0 <= cy < steps[1] and 0 <= cz < steps[2]
                        if home == (turn == 1) or not there:
                            continue
                        dx = max(low[0] + cx * cell - x, x - (low[0] + (cx + 1) * cell), 0.0)
                        dy = max(low[1] + cy * cell - y, y - (low[1] + (cy + 1) * cell), 0.0)
                        dz = max(low[2] + cz * cell - z, z - (low[2] + (cz + 1) * cell), 0.0)
                        if dx * dx + dy * dy + dz * dz >= best:
                            continue
                        key = (np.int64(cx) * steps[1] + cy) * steps[2] + cz
                        slot = _slot(key, mask)
                        while heads[slot] >= 0 and keys[slot] != key:
                            slot = (slot + 1) & mask
                        at = heads[slot]
                        while at >= 0:
                            ax, ay, az = refs[at, 0] - x, refs[at, 1] - y, refs[at, 2] - z
                            square = ax * ax + ay * ay + az * az
                            if square < best and (
                                not ground[kinds[at]] or abs(az) <= 0.15 + 0.1 * (ax * ax + ay * ay) ** 0.5
                            ):
                                best, label[p] = square, kinds[at]
                            at = links[at]


@compiled
def _slot(key, mask):
    return np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)) & mask


@compiled
def table(cells, heads, keys, links):
    """Fills the hash table of `nearest` from the cell (n,) of each reference."""
    mask = len(heads) - 1
    for i in range(len(cells)):
        slot = _slot(cells[i], mask)
        while heads[slot] >= 0 and keys[slot] != cells[i]:
            slot = (slot + 1) & mask
        keys[slot], links[i] = cells[i], heads[slot]
        heads[slot] = i


@compiled
def fill(height, kind, reach, slope, out_height, out_kind):
    """`aggregate.filled` for maps (X, Y): height NaN where nothing is."""
    nx, ny = height.shape
    ways = ((1, 0), (0, 1), (1, 1), (1, -1))
    for x in range(nx):
        for y in range(ny):
            if not np.isnan(height[x, y]):
                continue
            best = 2 * reach + 1
            for way in range(4):
                dx, dy = ways[way]
                a = 0
                for i in range(1, reach + 1):
                    u, v = x + i * dx, y + i * dy
                    if not (0 <= u < nx and 0 <= v < ny):
                        break
                    if not np.isnan(height[u, v]):
                        a = i
                        break
                if a == 0:
                    continue
                for i in range(1, min(reach, best - a - 1) + 1):
                    u, v = x - i * dx, y - i * dy
                    if not (0 <= u < nx and 0 <= v < ny):
                        break
                    if np.isnan(height[u, v]):
                        continue
                    one, two = height[x + a * dx, y + a * dy], height[u, v]
                    if abs(one - two) <= slope * (a + i) + 0.1:
                        best = a + i
                        out_height[x, y] = (one * i + two * a) / (a + i)
                        out_kind[x, y] = kind[x + a * dx, y + a * dy] if a <= i else kind[u, v]
                    break


@compiled
def crossings(ends, eye, box_from_local, half, ray, box, enter, leave):
    """`aggregate.crossings`: fills the four (room,) and returns how many there are."""
    n = 0
    for m in range(len(half)):
        ox = np.empty(3)
        for i in range(3):
            row = box_from_local[m, i]
            ox[i] = row[0] * eye[0] + row[1] * eye[1] + row[2] * eye[2] + row[3]
        for r in range(len(ends)):
            x, y, z = ends[r, 0] - eye[0], ends[r, 1] - eye[1], ends[r, 2] - eye[2]
            near, far = 0.0, 1.0
            for i in range(3):
                row = box_from_local[m, i]
                d = row[0] * x + row[1] * y + row[2] * z
                if d == 0.0:
                    if abs(ox[i]) > half[m, i]:
                        far = -1.0
                    continue
                a, b = (-half[m, i] - ox[i]) / d, (half[m, i] - ox[i]) / d
                if a > b:
                    a, b = b, a
                near, far = max(near, a), min(far, b)
                if near >= far:
                    break
            if near < far:
                if n < len(ray):
                    ray[n], box[n], enter[n], leave[n] = r, m, near, far
                n += 1
    return n


@compiled
def vote(points, classes, when, now, voxels_from_local, shape, owner, ground, bits, hits):
    """`voxelise.vote`: marks in bits (V, C) uint64 which of the 4 x 4 x 4 parts of a voxel hold a point of a class."""
    nx, ny, nz = shape
    m = voxels_from_local
    for p in range(len(points)):
        if when[p] != -1 and when[p] != now:
            continue
        x, y, z = points[p, 0], points[p, 1], points[p, 2]
        u = m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + m[0, 3]
        if not 0 <= u < nx:
            continue
        v = m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + m[1, 3]
        if not 0 <= v < ny:
            continue
        w = m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + m[2, 3]
        if not 0 <= w < nz:
            continue
        if not ground[classes[p]] and owner[int(2 * u), int(2 * v), int(2 * w)] >= 0:
            continue
        i, j, k = int(u), int(v), int(w)
        at = (i * ny + j) * nz + k
        part = (int(4 * (u - i)) * 4 + int(4 * (v - j))) * 4 + int(4 * (w - k))
        bits[at, classes[p]] |= np.uint64(1) << np.uint64(part)
        hits[at] += 1


@compiled
def carve(starts, ends, parts_from_local, free):
    """`voxelise.carve`: marks in free (X, Y, Z) what segments cross before the part that they end in.

    starts (R, 3) or (1, 3) for all.
    """
    nx, ny, nz = free.shape
    size = (float(nx), float(ny), float(nz))
    flat = free.ravel()
    m = parts_from_local
    a, b, way = np.empty(3), np.empty(3), np.empty(3)
    for r in range(len(ends)):
        s = r if len(starts) > 1 else 0
        near, far = 0.0, 1.0
        for i in range(3):
            a[i] = m[i, 0] * starts[s, 0] + m[i, 1] * starts[s, 1] + m[i, 2] * starts[s, 2] + m[i, 3]
            b[i] = m[i, 0] * ends[r, 0] + m[i, 1] * ends[r, 1] + m[i, 2] * ends[r, 2] + m[i, 3]
            way[i] = b[i] - a[i]
            if way[i] == 0.0:
                if not 0 <= a[i] < size[i]:
                    far = -1.0
                continue
            one, two = -a[i] / way[i], (size[i] - a[i]) / way[i]
            near, far = max(near, min(one, two)), min(far, max(one, two))
        if near >= far:
            continue
        x = min(max(int(np.floor(a[0] + near * way[0])), 0), nx - 1)
        y = min(max(int(np.floor(a[1] + near * way[1])), 0), ny - 1)
        z = min(max(int(np.floor(a[2] + near * way[2])), 0), nz - 1)
        ex, ey, ez = int(np.floor(b[0])), int(np.floor(b[1])), int(np.floor(b[2]))
        sx, sy, sz = 1 if way[0] >= 0 else -1, 1 if way[1] >= 0 else -1, 1 if way[2] >= 0 else -1
        bx = np.inf if way[0] == 0 else (x + (sx > 0) - a[0]) / way[0]
        by = np.inf if way[1] == 0 else (y + (sy > 0) - a[1]) / way[1]
        bz = np.inf if way[2] == 0 else (z + (sz > 0) - a[2]) / way[2]
        ax = np.inf if way[0] == 0 else sx / way[0]
        ay = np.inf if way[1] == 0 else sy / way[1]
        az = np.inf if way[2] == 0 else sz / way[2]
        at, right, ahead = (x * ny + y) * nz + z, sx * ny * nz, sy * nz
        while x != ex or y != ey or z != ez:
            flat[at] = True
            if bx < by and bx < bz:
                if bx >= 1.0:
                    break
                x += sx
                if x < 0 or x >= nx:
                    break
                at += right
                bx += ax
            elif by < bz:
                if by >= 1.0:
                    break
                y += sy
                if y < 0 or y >= ny:
                    break
                at += ahead
                by += ay
            else:
                if bz >= 1.0:
                    break
                z += sz
                if z < 0 or z >= nz:
                    break
                at += sz
                bz += az
