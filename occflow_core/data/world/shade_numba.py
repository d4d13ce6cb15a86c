"""Compiled loops over pixels and rays: which rays come near a thing, what colour a hit has, the picture's last touch.

N rays or pixels, F faces, A facades, L lamps. Colours are linear RGB here. Patterns are functions of place and fade
where they are finer than a pixel, so that they do not crawl.
"""

import math

import numpy as np

from ...ops.compiled_numba import compiled

# the kinds of `meshes`
PLAIN, PAINT, GLASS, HEADLAMP, TAILLAMP, ASPHALT, PAVING, GRASS, MARKING = range(9)
FACADE, FOLIAGE, BARK, CONCRETE, STRIPES, SIGNAL, STREETLAMP, SOIL, ROOF, BRICK, METAL, CLOTH, WATER = range(9, 22)


@compiled
def near(origins, directions, limit, centre, radius):
    """Indices of the rays that come within `radius` of `centre` before their `limit`. Directions of length one.

    All float32: it only has to be cautious, and it is what most rays pay for every thing that moves.
    """
    n = len(directions)
    out = np.empty(n, np.int32)
    count = 0
    cx, cy, cz, far = centre[0], centre[1], centre[2], radius * radius
    for i in range(n):
        x, y, z = cx - origins[i, 0], cy - origins[i, 1], cz - origins[i, 2]
        along = x * directions[i, 0] + y * directions[i, 1] + z * directions[i, 2]
        apart = x * x + y * y + z * z - along * along
        if apart < far and along > -radius and along - radius < limit[i]:
            out[count] = i
            count += 1
    return out[:count].copy()


@compiled
def into(origins, directions, chosen, turn, shift):
    """The chosen rays told in the frame of a thing: turn (3, 3) and shift (3,) are world_from_thing's."""
    m = len(chosen)
    o, d = np.empty((m, 3), np.float32), np.empty((m, 3), np.float32)
    for k in range(m):
        i = chosen[k]
        x, y, z = origins[i, 0] - shift[0], origins[i, 1] - shift[1], origins[i, 2] - shift[2]
        a, b, c = directions[i, 0], directions[i, 1], directions[i, 2]
        for r in range(3):
            o[k, r] = turn[0, r] * x + turn[1, r] * y + turn[2, r] * z
            d[k, r] = turn[0, r] * a + turn[1, r] * b + turn[2, r] * c
    return o, d


@compiled
def turned(points, turn, shift):
    """(N, 3): turn (3, 3) @ each point + shift (3,), in the points' own precision.

    numpy's product of so narrow matrices wakes a thread on every core, which other processes then miss.
    """
    out = np.empty_like(points)
    for i in range(len(points)):
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        for k in range(3):
            out[i, k] = turn[k, 0] * x + turn[k, 1] * y + turn[k, 2] * z + shift[k]
    return out


@compiled
def merge(t, face, actor, u, v, chosen, new_t, new_face, new_u, new_v, first_face, number):
    """Keep the nearer of old hits and those of one thing."""
    for k in range(len(chosen)):
        i = chosen[k]
        if new_face[k] >= 0 and new_t[k] < t[i]:
            t[i] = new_t[k]
            face[i] = first_face + new_face[k]
            actor[i] = number
            u[i] = new_u[k]
            v[i] = new_v[k]


@compiled
def _hash(x, y, z):
    h = (np.int64(x) * 374761393 + np.int64(y) * 668265263 + np.int64(z) * 2147483647) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 2246822519) & 0xFFFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFFFF) / 16777216.0


@compiled
def _noise(x, y, seed):
    """Smooth noise in [-1, 1] that varies over one unit."""
    i, j = math.floor(x), math.floor(y)
    a, b = x - i, y - j
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    low = _hash(i, j, seed) * (1 - a) + _hash(i + 1, j, seed) * a
    high = _hash(i, j + 1, seed) * (1 - a) + _hash(i + 1, j + 1, seed) * a
    return 2 * (low * (1 - b) + high * b) - 1


@compiled
def _octave(x, y, size, width, seed):
    """Noise that varies over `size` m, gone where a pixel is `width` m wide and sees an average."""
    fade = size / max(width, 1e-4) - 0.7
    if fade <= 0:
        return 0.0
    return _noise(x / size, y / size, seed) * min(fade, 1.0)


@compiled
def _lines(x, period, thick, width):
    """Share of a line of `thick` m every `period` m that a pixel of `width` m sees at x."""
    w = max(width, 1e-4)
    f = x - period * math.floor(x / period + 0.5)
    a, b = max(-thick / 2, f - w / 2), min(thick / 2, f + w / 2)
    share = max(b - a, 0.0) / w
    if w > period:
        share = thick / period
    return share


@compiled
def _sky(dx, dy, dz, sky, sun, seed):
    """Colour of the sky in a direction. sky: rows zenith, horizon, sun, [cloud cover, cloud light, sun's disc]."""
    up = max(dz, 0.0)
    k = math.pow(1 - min(up, 1.0), 3.0)
    r = sky[0, 0] * (1 - k) + sky[1, 0] * k
    g = sky[0, 1] * (1 - k) + sky[1, 1] * k
    b = sky[0, 2] * (1 - k) + sky[1, 2] * k
    s = dx * sun[0] + dy * sun[1] + dz * sun[2]
    cover = sky[3, 0]
    cloud = 0.0
    if up > 0.02:
        x, y = dx / (up + 0.12) * 1.3, dy / (up + 0.12) * 1.3
        n = _noise(x, y, seed) * 0.5 + _noise(x * 2.1, y * 2.1, seed + 1) * 0.27
        n += _noise(x * 4.3, y * 4.3, seed + 2) * 0.15 + _noise(x * 9.1, y * 9.1, seed + 3) * 0.08
        cloud = min(max((n + cover * 1.4 - 0.55) * 2.2, 0.0), 1.0) * min((up - 0.02) * 8, 1.0)
        shade = sky[3, 1] * (0.92 + 0.25 * n)
        r = r * (1 - cloud) + shade * (0.75 * sky[1, 0] + 0.25 * sky[2, 0]) * cloud
        g = g * (1 - cloud) + shade * (0.75 * sky[1, 1] + 0.25 * sky[2, 1]) * cloud
        b = b * (1 - cloud) + shade * (0.75 * sky[1, 2] + 0.25 * sky[2, 2]) * cloud
    if s > 0:
        glow = (math.pow(s, 60) * 0.25 + math.pow(s, 900) * 6.0) * sky[3, 2] * (1 - cloud)
        r, g, b = r + glow * sky[2, 0], g + glow * sky[2, 1], b + glow * sky[2, 2]
    return r, g, b


@compiled
def shade(
    out,  # (N, 3) float32, written
    origin,  # (3,) of all rays
    directions,  # (N, 3) float32, length one
    t,  # (N,) float32 m
    face,  # (N,) int32, -1: sky
    actor,  # (N,) int32, -1: static
    bary_u,  # (N,)
    bary_v,  # (N,)
    lit,  # (N,) float32: how much of the sun comes here
    pixel,  # rad, of one pixel
    normals,  # (F, 3, 3)
    kinds,  # (F,) uint8
    colours,  # (F, 3) linear
    aux,  # (F,)
    turns,  # (M, 3, 3) world_from_actor
    shifts,  # (M, 3)
    paints,  # (M, 2, 3) linear
    braking,  # (M,) float32: how bright its tail lamps are
    facades,  # (A, 8)
    signals,  # (3 S,) float32: is this lamp on?
    lamps,  # (L, 3)
    cells,  # (C, C, K) int32: lamps near each 16 m cell, -1
    corner,  # (2,) of the cells
    sky,  # (4, 3), see `_sky`
    sun,  # (3,) towards it
    sunlight,  # (3,)
    ambient,  # (2, 3) from above, from below
    night,  # 0..1: lamps are on
    wet,  # 0..1
    haze,  # 1/m
    fog,  # (3,)
    headlights,  # (7,): place, direction of the ego car's; strength
    seed,
):
    """Colours of hits."""
    base = np.int64(0)  # of the patterns' seeds: numba compiles a function anew for each literal that it is called with
    for p in range(len(out)):
        dx, dy, dz = directions[p, 0], directions[p, 1], directions[p, 2]
        f = face[p]
        if f < 0:
            r, g, b = _sky(dx, dy, dz, sky, sun, seed)
            thick = 1 - math.exp(-haze * 260.0 / (1 + 14 * max(dz, 0.0)))
            if dz < 0.0:
                thick = 1.0
            out[p, 0] = r * (1 - thick) + fog[0] * thick
            out[p, 1] = g * (1 - thick) + fog[1] * thick
            out[p, 2] = b * (1 - thick) + fog[2] * thick
            continue
        d = t[p]
        x, y, z = origin[0] + d * dx, origin[1] + d * dy, origin[2] + d * dz
        bu, bv = bary_u[p], bary_v[p]
        bw = 1 - bu - bv
        nx = bw * normals[f, 0, 0] + bu * normals[f, 1, 0] + bv * normals[f, 2, 0]
        ny = bw * normals[f, 0, 1] + bu * normals[f, 1, 1] + bv * normals[f, 2, 1]
        nz = bw * normals[f, 0, 2] + bu * normals[f, 1, 2] + bv * normals[f, 2, 2]
        lx, ly, lz = x, y, z  # where patterns live
        a = actor[p]
        if a >= 0:
            ex, ey, ez = x - shifts[a, 0], y - shifts[a, 1], z - shifts[a, 2]
            m = turns[a]
            lx, ly, lz = (
                m[0, 0] * ex + m[1, 0] * ey + m[2, 0] * ez,
                m[0, 1] * ex + m[1, 1] * ey + m[2, 1] * ez,
                m[0, 2] * ex + m[1, 2] * ey + m[2, 2] * ez,
            )
            nx, ny, nz = (
                m[0, 0] * nx + m[0, 1] * ny + m[0, 2] * nz,
                m[1, 0] * nx + m[1, 1] * ny + m[1, 2] * nz,
                m[2, 0] * nx + m[2, 1] * ny + m[2, 2] * nz,
            )
        length = math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9
        nx, ny, nz = nx / length, ny / length, nz / length
        facing = -(nx * dx + ny * dy + nz * dz)
        if facing < 0:
            nx, ny, nz, facing = -nx, -ny, -nz, -facing
        width = d * pixel / max(math.sqrt(max(facing, 0.0)), 0.12)
        kind = kinds[f]
        r, g, b = colours[f, 0], colours[f, 1], colours[f, 2]
        if a >= 0 and (kind in (PAINT, CLOTH)):
            w = 1 if aux[f] == 1.0 else 0
            r, g, b = r * paints[a, w, 0], g * paints[a, w, 1], b * paints[a, w, 2]
        mirror, er, eg, eb, wrap = 0.0, 0.0, 0.0, 0.0, 0.0
        if kind in (ASPHALT, MARKING):
            n = 0.22 * _octave(x, y, 0.06, width, base + 11) + 0.12 * _octave(x, y, 0.35, width, base + 12)
            n += 0.13 * _octave(x, y, 3.1, width, base + 13) + 0.12 * _octave(x, y, 14.0, width, base + 14)
            crack = _octave(x, y, 2.3, width, base + 15)
            if abs(crack) < 0.02 and width < 0.1:
                n -= 0.25 * (1 - width / 0.1)
            if kind == MARKING:
                wear = 1.15 + 1.2 * _octave(x, y, 0.25, width, base + 16) + 0.9 * _octave(x, y, 2.0, width, base + 17)
                wear = min(max(wear, 0.25), 1.0)
                r, g, b = r * wear + 0.09 * (1 - wear), g * wear + 0.09 * (1 - wear), b * wear + 0.09 * (1 - wear)
            r, g, b = r * (1 + n), g * (1 + n), b * (1 + n)
            puddle = min(max(0.55 + 1.3 * _octave(x, y, 2.6, width, base + 18), 0.0), 1.0)
            dark = 1 - 0.45 * wet
            r, g, b = r * dark, g * dark, b * dark
            mirror = wet * (0.12 + 0.5 * puddle)
        elif kind in (PAVING, CONCRETE):
            if kind == PAVING:
                i, j = math.floor(x / 0.75), math.floor(y / 0.75)
                fade = min(max(1.2 - width / 0.6, 0.0), 1.0)
                n = 0.10 * (_hash(i, j, base + 21) - 0.5) * fade
                gap = max(_lines(x, 0.75, 0.02, width), _lines(y, 0.75, 0.02, width))
                n -= 0.35 * gap
            else:
                n = 0.0
            n += 0.10 * _octave(x, y + z, 0.09, width, base + 22) + 0.10 * _octave(x, y + 2 * z, 1.7, width, base + 23)
            r, g, b = r * (1 + n), g * (1 + n), b * (1 + n)
            dark = 1 - 0.35 * wet
            r, g, b = r * dark, g * dark, b * dark
            mirror = 0.10 * wet * max(nz, 0.0)
        elif kind in (GRASS, SOIL):
            n = 0.35 * _octave(x, y, 0.05, width, base + 31) + 0.22 * _octave(x, y, 0.3, width, base + 32)
            warm = 0.25 * _octave(x, y, 2.4, width, base + 33) + 0.2 * _octave(x, y, 9.0, width, base + 34)
            n += 0.12 * _octave(x, y, 1.1, width, base + 35)
            r, g, b = r * (1 + n + warm), g * (1 + n), b * (1 + n - 0.3 * warm)
        elif kind == FOLIAGE:
            q = 0.7 * lx + 0.6 * ly
            s = lz + 0.35 * lx - 0.3 * ly
            n = 0.55 * _octave(q, s, 0.16, width, base + 41) + 0.35 * _octave(q, s, 0.5, width, base + 42)
            if a < 0:
                n += 0.12 * _octave(x, y, 3.0, width, base + 43)
            n += 0.3 * _octave(q * 1.7 + s, s * 1.3 - q, 0.07, width, base + 44)
            r, g, b = r * max(1 + n, 0.15), g * max(1 + n, 0.15), b * max(1 + 0.8 * n, 0.15)
            bump = 0.9
            nx += bump * _octave(q, s, 0.3, width, base + 45)
            ny += bump * _octave(s, q, 0.3, width, base + 46)
            nz += bump * _octave(q + s, s, 0.3, width, base + 47) + 0.15
            length = math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9
            nx, ny, nz = nx / length, ny / length, nz / length
            wrap = 0.35
        elif kind == BARK:
            n = 0.3 * _octave(lx * 3 + ly * 3, lz * 0.4, 0.08, width, base + 51)
            r, g, b = r * (1 + n), g * (1 + n), b * (1 + n)
        elif kind == STRIPES:
            k = math.floor((lx + lz) / 0.3)
            if k % 2 == 0:
                r, g, b = 0.8, 0.8, 0.78
        elif kind == ROOF:
            n = 0.12 * _octave(x + y, z * 3, 0.3, width, base + 61) - 0.25 * _lines(z * 1.6, 0.3, 0.05, width)
            r, g, b = r * (1 + n), g * (1 + n), b * (1 + n)
        elif kind in (FACADE, BRICK):
            row = facades[min(int(aux[f]), len(facades) - 1)]
            along = math.sqrt(nx * nx + ny * ny)
            if along < 0.5:  # a flat roof
                n = 0.15 * _octave(x, y, 1.0, width, base + 71)
                r, g, b = 0.22 * (1 + n), 0.21 * (1 + n), 0.2 * (1 + n)
            else:
                q = (-ny * x + nx * y) / along + row[5] * 50
                wall = row[4]
                n = 0.06 * _octave(q, z, 0.12, width, base + 72) + 0.10 * _octave(q, z, 2.3, width, base + 73)
                n += 0.10 * _octave(q * 2.0, z * 0.2, 1.1, width, base + 74)
                if wall == 1.0 or kind == BRICK:
                    level = math.floor(z / 0.075)
                    joint = max(_lines(z, 0.075, 0.012, width), _lines(q + 0.11 * (level % 2), 0.22, 0.012, width))
                    fade = min(max(1.3 - width / 0.12, 0.0), 1.0)
                    n += 0.25 * (_hash(math.floor((q + 0.11 * (level % 2)) / 0.22 + 0.5), level, 75) - 0.5) * fade
                    r, g, b = (
                        r * (1 - joint) + 0.45 * joint,
                        g * (1 - joint) + 0.43 * joint,
                        b * (1 - joint) + 0.4 * joint,
                    )
                r, g, b = r * (1 + n), g * (1 + n), b * (1 + n)
                if kind == FACADE:
                    su, sv = row[2], row[3]
                    i, j = math.floor(q / su), math.floor((z + 40.0) / sv)
                    fu, fv = q - (i + 0.5) * su, z + 40.0 - (j + 0.5) * sv
                    eu, ev = row[0] / 2 - abs(fu), row[1] / 2 - abs(fv)
                    w = max(width, 0.01)
                    pane = min(max(eu / w + 0.5, 0.0), 1.0) * min(max(ev / w + 0.5, 0.0), 1.0)
                    frame = 0.0
                    if wall != 2.0:
                        border = 0.10
                        outer = min(max((eu + border) / w + 0.5, 0.0), 1.0) * min(
                            max((ev + border) / w + 0.5, 0.0), 1.0
                        )
                        frame = outer - pane
                        cross = min(max((0.035 - abs(fu)) / w + 0.5, 0.0), 1.0) * pane * min(0.07 / w, 1.0)
                        pane -= cross
                        frame += cross
                    tone = 0.75 if row[6] > 0.5 else 0.16
                    tall = 1 - 0.25 * min(max((ev - row[1] + 0.3) / 0.3, 0.0), 1.0)
                    glass = 0.02 + 0.05 * _hash(i, j, base + 76)
                    curtain = 1.0 if _hash(i, j, base + 77) < row[7] else 0.0
                    cr, cg, cb = glass + 0.3 * curtain, glass + 0.29 * curtain, glass * 1.15 + 0.26 * curtain
                    rest = 1 - pane - frame
                    r = r * rest + tone * frame * tall + cr * pane
                    g = g * rest + tone * frame * tall + cg * pane
                    b = b * rest + tone * frame * tall + cb * pane
                    mirror = pane * (0.55 if wall == 2.0 else 0.35)
                    if night > 0 and _hash(i, j, base + 78) < 0.36:
                        warm = _hash(i, j, base + 79)
                        glow = night * pane * (0.35 + 0.5 * _hash(i, j, base + 80))
                        er, eg, eb = glow * 1.0, glow * (0.62 + 0.2 * warm), glow * (0.28 + 0.45 * warm)
        elif kind == PAINT:
            mirror = 0.30
        elif kind == GLASS:
            mirror = 0.55
        elif kind == METAL:
            mirror = 0.15
        elif kind == WATER:
            mirror = 0.8
            nx += 0.03 * _octave(x, y, 0.4, width, base + 91)
            ny += 0.03 * _octave(y, x, 0.4, width, base + 92)
        elif kind == HEADLAMP:
            er, eg, eb = 7.0 * night, 6.8 * night, 6.0 * night
            if a < 0:
                er, eg, eb = 0.0, 0.0, 0.0
            mirror = 0.4
        elif kind == TAILLAMP:
            glow = braking[a] * (0.55 + 0.7 * night) if a >= 0 else 0.0
            er, eg, eb = 1.6 * glow, 0.05 * glow, 0.04 * glow
            mirror = 0.3
        elif kind == STREETLAMP:
            er, eg, eb = 9.0 * night, 7.6 * night, 5.2 * night
        elif kind == SIGNAL:
            on = signals[int(aux[f] + 0.5)]
            er, eg, eb = 2.2 * r * on, 2.2 * g * on, 2.2 * b * on
            r, g, b = r * 0.08, g * 0.08, b * 0.08
        # light
        s = nx * sun[0] + ny * sun[1] + nz * sun[2]
        s = max((s + wrap) / (1 + wrap), 0.0) * lit[p]
        up = 0.5 + 0.5 * nz
        cover = 0.55 + 0.45 * lit[p] if sky[3, 0] > 0.8 else 0.80 + 0.20 * lit[p]
        cr = sunlight[0] * s + (ambient[0, 0] * up + ambient[1, 0] * (1 - up)) * cover
        cg = sunlight[1] * s + (ambient[0, 1] * up + ambient[1, 1] * (1 - up)) * cover
        cb = sunlight[2] * s + (ambient[0, 2] * up + ambient[1, 2] * (1 - up)) * cover
        if night > 0:
            i, j = int((x - corner[0]) / 16.0), int((y - corner[1]) / 16.0)
            if 0 <= i < cells.shape[0] and 0 <= j < cells.shape[1]:
                for k in range(cells.shape[2]):
                    lamp = cells[i, j, k]
                    if lamp < 0:
                        break
                    vx, vy, vz = lamps[lamp, 0] - x, lamps[lamp, 1] - y, lamps[lamp, 2] - z
                    q = vx * vx + vy * vy + vz * vz + 0.5
                    cosine = (nx * vx + ny * vy + nz * vz) / math.sqrt(q)
                    if cosine > 0 and vz > 0:
                        down = vz / math.sqrt(q)
                        e = night * 40.0 * cosine * (0.15 + 0.85 * down) / (q + 6.0)
                        cr, cg, cb = cr + e * 1.0, cg + e * 0.80, cb + e * 0.52
            vx, vy, vz = x - headlights[0], y - headlights[1], z - headlights[2]
            q = vx * vx + vy * vy + vz * vz + 1.0
            beam = (vx * headlights[3] + vy * headlights[4] + vz * headlights[5]) / math.sqrt(q)
            if beam > 0.80:
                cosine = -(nx * vx + ny * vy + nz * vz) / math.sqrt(q)
                e = headlights[6] * max(cosine + 0.02, 0.0) * math.pow((beam - 0.80) / 0.20, 2.0) / (q + 60.0)
                cr, cg, cb = cr + e, cg + 0.97 * e, cb + 0.88 * e
        r, g, b = max(r, 0.0) * cr + er, max(g, 0.0) * cg + eg, max(b, 0.0) * cb + eb
        if mirror > 0:
            k = 2 * (nx * dx + ny * dy + nz * dz)
            rx, ry, rz = dx - k * nx, dy - k * ny, dz - k * nz
            fresnel = 0.06 + 0.94 * math.pow(1 - min(max(facing, 0.0), 1.0), 5.0)
            share = mirror * fresnel + 0.08 * mirror
            if rz > -0.05:
                sr, sg, sb = _sky(rx, ry, max(rz, 0.02), sky, sun, seed)
                dim = 0.35 + 0.65 * min(max(rz * 2.5, 0.0), 1.0)
                sr, sg, sb = min(sr, 4.0) * dim, min(sg, 4.0) * dim, min(sb, 4.0) * dim
            else:
                sr, sg, sb = 0.10 * ambient[0, 0], 0.10 * ambient[0, 1], 0.10 * ambient[0, 2]
            r, g, b = r * (1 - share) + sr * share, g * (1 - share) + sg * share, b * (1 - share) + sb * share
        thick = 1 - math.exp(-haze * d)
        out[p, 0] = r * (1 - thick) + fog[0] * thick
        out[p, 1] = g * (1 - thick) + fog[1] * thick
        out[p, 2] = b * (1 - thick) + fog[2] * thick


@compiled
def towards(out, origin, directions, t, face, sun, spread, up, seed):
    """Rays from hits towards the light: out (N, 3) begins beside the surface, returns directions (N, 3)."""
    n = len(out)
    rays = np.empty((n, 3), np.float32)
    for p in range(n):
        d = t[p] - 0.012 - 2e-4 * t[p]
        for k in range(3):
            out[p, k] = origin[k] + d * directions[p, k]
        h = int(out[p, 0] * 512) * 31 + int(out[p, 2] * 512)
        a, b = _hash(p, h, seed) - 0.5, _hash(h, p, seed + 1) - 0.5
        x, y, z = sun[0] + spread * a, sun[1] + spread * b, sun[2] + up
        length = math.sqrt(x * x + y * y + z * z)
        rays[p, 0], rays[p, 1], rays[p, 2] = x / length, y / length, z / length
    return rays


@compiled
def smooth(lit, t, face, height, width):
    """(H W,) light shared by neighbours (5 x 5) at about the same distance."""
    out = np.empty_like(lit)
    for y in range(height):
        for x in range(width):
            p = y * width + x
            if face[p] < 0:
                out[p] = lit[p]
                continue
            total, count = np.float32(0), 0
            near = 0.06 * t[p] + 0.05
            for j in range(max(y - 2, 0), min(y + 3, height)):
                for i in range(max(x - 2, 0), min(x + 3, width)):
                    q = j * width + i
                    if abs(t[q] - t[p]) < near:
                        total += lit[q]
                        count += 1
            out[p] = total / count
    return out


@compiled
def rough(colour, height, width, exposure, threshold):
    """Pixels that differ visibly from a neighbour: indices (K,) int32 of a picture (H W, 3) in linear light."""
    n = height * width
    light = np.empty(n, np.float32)
    for p in range(n):
        c = 0.3 * colour[p, 0] + 0.55 * colour[p, 1] + 0.15 * colour[p, 2]
        light[p] = math.sqrt(min(max(c * exposure, 0.0), 4.0))
    out = np.empty(n, np.int32)
    count = 0
    for y in range(height):
        for x in range(width):
            p = y * width + x
            d = 0.0
            if x + 1 < width:
                d = max(d, abs(light[p] - light[p + 1]))
            if x > 0:
                d = max(d, abs(light[p] - light[p - 1]))
            if y + 1 < height:
                d = max(d, abs(light[p] - light[p + width]))
            if y > 0:
                d = max(d, abs(light[p] - light[p - width]))
            if d > threshold:
                out[count] = p
                count += 1
    return out[:count].copy()


@compiled
def develop(colour, height, width, exposure, grain, rain, seed):
    """Linear light (H W, 3) -> (H, W, 3) uint8 BGR: exposure, film curve, corners darker, grain, streaks of rain."""
    out = np.empty((height, width, 3), np.uint8)
    for y in range(height):
        for x in range(width):
            p = y * width + x
            dx, dy = (x + 0.5) / width - 0.5, (y + 0.5) / height - 0.5
            corner = 1 - 0.35 * (dx * dx + dy * dy)
            noise = (_hash(x, y, seed) + _hash(y, x, seed + 5) - 1.0) * grain
            streak = 0.0
            if rain > 0:
                column = math.floor(x * 0.6 + y * 0.05)
                h = _hash(column, seed, np.int64(3))
                phase = (y * (0.008 + 0.012 * h) * 400.0 / height + 17.0 * h) % 1.0
                if h > 0.84 and phase < 0.22:
                    streak = rain * (0.22 - phase) * 0.35
            for c in range(3):
                v = colour[p, c] * exposure * corner
                v = v * (2.51 * v + 0.03) / (v * (2.43 * v + 0.59) + 0.14)
                v = math.pow(min(max(v, 0.0), 1.0), 1 / 2.2) + streak
                v = v * 255.0 + noise * (0.6 + 0.8 * (1 - v))
                out[y, x, 2 - c] = np.uint8(min(max(v + 0.5, 0.0), 255.0))
    return out
