"""A picture of one instant: six cameras, the voxels from above and from behind the car, what moves and how fast.

Colours are nuScenes'. Everything is RGB until a file is written. N cameras, X Y Z voxels, H W pixels.
"""

import datetime
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..data import bag as bags
from ..types import NANO, Classes, Prediction
from ..voxelflow import NO_IMAGE, unpack

TILE = (640, 360)  # a camera, width x height
VIEW = 800  # height of the two views of the voxels, and width of the one from above
GAP = 8
_PAPER, _INK, _FAINT = (246, 247, 249), (28, 32, 38), (132, 140, 150)
_UNSEEN = (188, 184, 200)  # space that no camera of this set looked into
_ARROW = (20, 20, 24)
_CAR = ((-1.0, -0.95, 0.3), (3.7, 0.95, 1.0)), ((-0.6, -0.8, 1.0), (2.0, 0.8, 1.65))  # low, high corners, m
_CAR_TONES = (250, 250, 252), (60, 66, 76)
_EYE, _LOOK, _OPENING = (-24.0, 0.0, 15.0), (6.0, 0.0, 0.0), 60.0  # view from behind: m, m, degrees across
_SUN = np.array([-0.35, 0.55, 0.76])  # towards it
SAME = NANO // 20  # ns, 50 ms: truth and prediction of one instant; a set's newest camera is that near to the LiDAR
SLOW = 0.3  # m/s, below which nothing gets an arrow


def picture(
    images: Tensor,
    names: Sequence[str],
    used: Sequence[bool],
    prediction: Prediction,
    *,
    stamp: int,
    model: str,
    truth: Prediction | None = None,
) -> np.ndarray:
    """(H, W, 3) uint8 RGB of one instant.

    images (N, 3, H, W) uint8 RGB with names and `used` flags (what is not used is not looked at); prediction: what is
    to be drawn, its `unobserved` tinted where it has one; stamp: ns; model: what the title calls the model; truth:
    drawn below the prediction, in the same form.
    """
    if len(images) != len(names) or len(images) != len(used):
        raise ValueError(f"picture: {len(images)} images with {len(names)} names and {len(used)} used flags")
    cameras = _cameras(images, names, used)
    width = cameras.shape[1]
    rows = [_title(width, stamp, model, names, used), cameras]
    for told, words in ((prediction, ""), (truth, "truth, ")):
        if told is not None:
            moving, side = _moving(told), width - VIEW - GAP
            views = _above(told, moving, words), _paper(VIEW, GAP), _behind(told, moving, side, words)
            rows += [_paper(GAP, width), np.hstack(views)]
    return np.vstack([*rows, _legend(width, [p for p in (prediction, truth) if p is not None])])


def write(picture: np.ndarray, path: Path | str) -> None:
    """RGB -> a PNG, written beside and renamed."""
    path = Path(path)
    done, file = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 4])
    assert done
    beside = path.with_name(f".{path.name}.part")
    beside.write_bytes(file.tobytes())
    beside.rename(path)


def show_bag(
    inputs: Path | str,
    outputs: Path | str,
    folder: Path | str,
    *,
    image_topic: str = "/{}/image_raw/compressed",
    progress: bool = True,
) -> list[Path]:
    """A PNG for each VoxelFlow message of the bag `outputs`, with the images of the bag `inputs` it was made from.

    The images are those whose own stamps the message tells (its stamp minus the camera's age). Where `inputs` itself
    carries VoxelFlow, it is truth: the one nearest in time is drawn below the prediction. In `image_topic` {} stands
    for the camera's name. Returns the files. FileNotFoundError, ValueError: a bag or topic that is not there.
    """
    from tqdm import tqdm

    topics = _voxel_topics(outputs)
    if len(topics) != 1:
        raise ValueError(f"{outputs}: expected one topic of occflow_msgs/msg/VoxelFlow, got {topics or 'none'}")
    there = bags.topics_of(inputs)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for _, _, message in tqdm(
        bags.read_bag(outputs, topics), desc="pictures", unit="picture", disable=None if progress else True
    ):
        stamp = message.header.stamp.sec * NANO + message.header.stamp.nanosec
        wanted = {
            image_topic.format(name): stamp - int(age) * 1000
            for name, age in zip(message.cameras, message.camera_age_us)
            if age != NO_IMAGE
        }
        missing = [topic for topic in wanted if topic not in there]
        if missing:
            raise ValueError(f"{inputs}: no topic {', '.join(missing)}; the bag has {', '.join(there)}")
        images, used = _images(inputs, wanted, [image_topic.format(name) for name in message.cameras])
        drawn = picture(
            images,
            list(message.cameras),
            used,
            unpack(message),
            stamp=stamp,
            model=message.model_name,
            truth=_truth(inputs, stamp),
        )
        files.append(folder / f"{stamp // NANO}.{stamp % NANO // 1_000_000:03d}.png")
        write(drawn, files[-1])
    return files


def _voxel_topics(bag) -> list[str]:
    return [topic for topic, kind in bags.topics_of(bag).items() if kind == "occflow_msgs/msg/VoxelFlow"]


def _truth(inputs, stamp: int) -> Prediction | None:
    """What a recording tells as truth of an instant (ns), if it tells anything within SAME."""
    topics, near = _voxel_topics(inputs), []
    if topics:
        for _, at, message in bags.read_bag(inputs, topics, stamp - SAME, stamp + SAME + 1):
            near.append((abs(at - stamp), message))
    return unpack(min(near, key=lambda pair: pair[0])[1]) if near else None


def _images(inputs, wanted: dict[str, int], topics: list[str]) -> tuple[Tensor, list[bool]]:
    """The wanted pictures (by topic, stamp in ns) as (N, 3, H, W), black where there is none, and which there are."""
    found = {}
    if wanted:
        # a recorder's clock runs behind the cameras' stamps by the transport, hence the longer reach forward
        window = min(wanted.values()) - NANO // 10, max(wanted.values()) + NANO
        for topic, _, message in bags.read_bag(inputs, list(wanted), *window):
            stamp = message.header.stamp.sec * NANO + message.header.stamp.nanosec
            if abs(stamp - wanted[topic]) <= 1000:  # ages are told in whole microseconds
                decoded = cv2.imdecode(np.asarray(message.data, np.uint8), cv2.IMREAD_COLOR)
                if decoded is not None:
                    small = cv2.resize(decoded, TILE, interpolation=cv2.INTER_AREA)
                    found[topic] = cv2.cvtColor(small, cv2.COLOR_BGR2RGB)
    black = np.zeros((TILE[1], TILE[0], 3), np.uint8)
    pictures = np.stack([found.get(topic, black) for topic in topics])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), [topic in found for topic in topics]


# ---- parts of the picture


def _cameras(images: Tensor, names: Sequence[str], used: Sequence[bool]) -> np.ndarray:
    """Tiles in rows of three, those ahead above those behind, left to the left."""

    def place(i):
        name = names[i].lower()
        return ("back" in name or "rear" in name, "left" not in name, "right" in name, i)

    tiles = []
    for i in sorted(range(len(names)), key=place):
        if used[i]:
            tile = cv2.resize(images[i].permute(1, 2, 0).contiguous().cpu().numpy(), TILE, interpolation=cv2.INTER_AREA)
        else:
            tile = np.full((TILE[1], TILE[0], 3), 52, np.uint8)
            cv2.line(tile, (0, 0), TILE, (72, 72, 76), 2, cv2.LINE_AA)
            cv2.line(tile, (0, TILE[1]), (TILE[0], 0), (72, 72, 76), 2, cv2.LINE_AA)
            _text(tile, "no image in this set", (TILE[0] // 2, TILE[1] // 2 + 8), 0.8, (255, 196, 120), centred=True)
        label = names[i].lower().replace("cam_", "").replace("_", " ")
        (w, _), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, 0.65, 1)
        tile[:30, : w + 22] = tile[:30, : w + 22] // 3
        _text(tile, label, (10, 21), 0.65, (255, 255, 255))
        tiles.append(tile)
    while len(tiles) % 3:
        tiles.append(_paper(TILE[1], TILE[0]))
    lines = [np.hstack([tiles[i], _paper(TILE[1], GAP), tiles[i + 1], _paper(TILE[1], GAP), tiles[i + 2]])
             for i in range(0, len(tiles), 3)]  # fmt: skip
    gap = _paper(GAP, lines[0].shape[1])
    return np.vstack([part for line in lines for part in (line, gap)][:-1])


def _title(width: int, stamp: int, model: str, names: Sequence[str], used: Sequence[bool]) -> np.ndarray:
    bar = _paper(52, width)
    when = datetime.datetime.fromtimestamp(stamp // NANO, datetime.timezone.utc)
    x = _text(bar, "OccFlow", (16, 35), 0.95, _INK, 2)
    x = _text(bar, model, (x + 28, 35), 0.7, (196, 84, 30))
    x = _text(bar, f"{when:%Y-%m-%d %H:%M:%S}.{stamp % NANO // 1_000_000:03d} UTC", (x + 28, 35), 0.7, _INK)
    absent = [n.lower().replace("cam_", "").replace("_", " ") for n, u in zip(names, used) if not u]
    count = f"{len(names) - len(absent)} of {len(names)} cameras"
    without = f", without {', '.join(absent)}" if absent else ""
    _text(bar, count + without, (x + 28, 35), 0.7, (190, 40, 40) if absent else _FAINT)
    return bar


def _legend(width: int, told: Sequence[Prediction]) -> np.ndarray:
    """Names of all classes that are there; tables may differ, a name has one colour."""
    found: dict[str, tuple[int, int, int]] = {}
    for p in told:
        count = torch.bincount(p.labels.flatten().long(), minlength=p.classes.free + 1)[: p.classes.free]
        for i in count.nonzero()[:, 0].tolist():
            found.setdefault(p.classes.names[i].replace("_", " "), p.classes.colours[i])
    items = list(found.items())
    items += [] if all(p.unobserved is None for p in told) else [("not observed", _UNSEEN)]
    lines, x, y = [], 16, 30
    for name, colour in items:
        (w, _), _ = cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, 0.62, 1)
        if x + w + 40 > width - 400:
            x, y = 16, y + 34
        lines.append((name, colour, x, y))
        x += w + 62
    bar = _paper(y + 18, width)
    for name, colour, x, y in lines:
        cv2.rectangle(bar, (x, y - 15), (x + 22, y + 3), colour, -1)
        cv2.rectangle(bar, (x, y - 15), (x + 22, y + 3), tuple(c // 2 for c in colour), 1)
        _text(bar, name, (x + 30, y), 0.62, _INK)
    if any(p.flow is not None for p in told):
        note = "where it will be in a second"
        (w, _), _ = cv2.getTextSize(note, cv2.FONT_HERSHEY_SIMPLEX, 0.62, 1)
        _arrow(bar, (width - w - 76, 25), (width - w - 26, 25))
        _text(bar, note, (width - w - 14, 30), 0.62, _INK)
    return bar


def _moving(prediction: Prediction) -> list[tuple[np.ndarray, np.ndarray]]:
    """Things that move: (place (3,) m at their top, velocity (2,) m/s). A thing = neighbouring columns of one class."""
    if prediction.flow is None:
        return []
    labels, flow = prediction.labels.cpu().numpy(), prediction.flow.cpu().numpy()
    fast = (np.hypot(flow[..., 0], flow[..., 1]) > SLOW) & np.isin(labels, prediction.classes.moving_ids)
    low, edge = np.array(prediction.grid.low), np.array(prediction.grid.voxel)
    things = []
    for c in np.unique(labels[fast]):
        mine = fast & (labels == c)
        count, parts = cv2.connectedComponents(mine.any(2).astype(np.uint8), connectivity=8)
        voxels = np.argwhere(mine)
        part = parts[voxels[:, 0], voxels[:, 1]]
        for p in range(1, count):
            own = voxels[part == p]
            velocity = np.median(flow[tuple(own.T)], axis=0)
            top = np.append(own[:, :2].mean(0) + 0.5, own[:, 2].max() + 1.0)
            things.append((low + top * edge, velocity))
    return things


def _above(prediction: Prediction, moving, words: str = "") -> np.ndarray:
    """The grid from above, ahead is up: the highest voxel of each column, brighter the higher, lit from the left."""
    grid, free = prediction.grid, prediction.classes.free
    labels = prediction.labels.cpu().numpy()
    filled = labels != free
    nz = labels.shape[2]
    top = np.where(filled.any(2), nz - 1 - filled[:, :, ::-1].argmax(2), -1)
    label = np.take_along_axis(labels, top.clip(0)[..., None], 2)[..., 0]
    colour = _palette(prediction.classes)[np.where(top < 0, free, label)]
    # hills: a column throws light or shade by its height against its neighbours ahead and to the left
    rise = np.zeros(top.shape, np.float32)
    rise[:-1] += np.clip(top[:-1] - top[1:], -3, 3)
    rise[:, :-1] += np.clip(top[:, :-1] - top[:, 1:], -3, 3)
    light = np.where(top < 0, 1.0, 0.86 + 0.22 * top / nz + 0.035 * rise)
    colour = colour * light[..., None]
    if prediction.unobserved is not None:
        colour = _veiled(colour, _column_unseen(prediction), top >= 0)
    image = colour.clip(0, 255).astype(np.uint8)[::-1, ::-1]  # x up, y to the left
    scale = VIEW / max(image.shape[:2])
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    inner = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST)
    view = _paper(VIEW, VIEW)
    left, above = (VIEW - size[0]) // 2, (VIEW - size[1]) // 2
    view[above : above + size[1], left : left + size[0]] = inner

    def pixel(point):
        ahead = (grid.high[0] - point[0]) / grid.size[0] * size[1]
        return int(left + (grid.high[1] - point[1]) / grid.size[1] * size[0]), int(above + ahead)

    here, overlay = pixel((0.0, 0.0)), view.copy()
    rings = range(10, round(grid.high[0]), 10)
    for metres in rings:
        cv2.circle(overlay, here, round(metres / grid.size[0] * size[1]), _INK, 1, cv2.LINE_AA)
    view = cv2.addWeighted(overlay, 0.45, view, 0.55, 0.0)
    for metres in rings:
        _tag(view, f"{metres} m", (here[0] - 22, pixel((metres, 0.0))[1] + 6), 0.42)
    for (low, high), tone in zip(_CAR, _CAR_TONES):
        cv2.rectangle(view, pixel(high), pixel(low), tone, -1, cv2.LINE_AA)
        cv2.rectangle(view, pixel(high), pixel(low), _INK, 1, cv2.LINE_AA)
    for place, velocity in moving:
        _arrow(view, pixel(place), pixel(place[:2] + velocity))
    _caption(view, f"{words}from above")
    return view


def _behind(prediction: Prediction, moving, width: int, words: str = "") -> np.ndarray:
    """The grid as seen from above and behind the car: rays through every pixel to the first filled voxel. P pixels."""
    grid, height = prediction.grid, VIEW
    low, edge, eye = np.array(grid.low), np.array(grid.voxel), np.array(_EYE)
    ahead = np.array(_LOOK) - eye
    ahead /= np.linalg.norm(ahead)
    right = np.cross(ahead, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(ahead, right)
    focal = width / 2 / math.tan(math.radians(_OPENING) / 2)
    u, v = (np.arange(width) + 0.5 - width / 2) / focal, (np.arange(height) + 0.5 - height / 2) / focal
    rays = [(ahead[k] + v[:, None] * down[k] + u[None] * right[k]).ravel() for k in range(3)]  # 3 x (P,), depth 1

    def project(point):
        seen = np.asarray(point) - eye
        depth = seen @ ahead
        if depth < 1.0:
            return None
        return int(width / 2 + focal * (seen @ right) / depth), int(height / 2 + focal * (seen @ down) / depth)

    # paper, and the floor of the grid on it
    colour = np.repeat(np.linspace((226, 234, 244), _PAPER, height, dtype=np.float32), width, axis=0)  # (P, 3)
    depth = np.full(len(colour), np.inf)
    falling = np.flatnonzero(rays[2] < -1e-6)
    fall = (low[2] - eye[2]) / rays[2][falling]
    x, y = ((eye[k] + fall * rays[k][falling] - low[k]) / edge[k] for k in range(2))
    on = (x >= 0) & (x < grid.shape[0]) & (y >= 0) & (y < grid.shape[1])
    x, y, falling = x[on].astype(np.int32), y[on].astype(np.int32), falling[on]
    field = (x * edge[0] // 4 + y * edge[1] // 4) % 2  # of 4 m
    floor = np.float32([(226, 229, 234), (233, 235, 239)])[field.astype(np.int32)]
    if prediction.unobserved is not None:
        floor = _veiled(floor, _column_unseen(prediction)[x, y], np.zeros(len(x), bool))
    colour[falling] = floor
    _voxels(prediction, eye, rays, focal, colour, depth)
    for (near, far), tone in zip(_CAR, _CAR_TONES):
        _solid(near, far, tone, eye, rays, colour, depth)
    view = colour.clip(0, 255).astype(np.uint8).reshape(height, width, 3)
    for place, velocity in sorted(moving, key=lambda thing: -(thing[0] - eye) @ ahead):
        begin, end = place + [0, 0, 0.3], place + [*velocity, 0.3]
        if project(begin) and project(end):
            _arrow(view, project(begin), project(end))
    _caption(view, f"{words}from behind the car")
    return view


def _slabs(low, high, start, rays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """When rays enter and leave a box, in their own lengths, and along which axis they enter, each (P,)."""
    enter, leave, axis = np.full(len(rays[0]), -np.inf), np.full(len(rays[0]), np.inf), np.zeros(len(rays[0]), np.int8)
    for k in range(3):
        with np.errstate(divide="ignore", invalid="ignore"):
            a, b = (low[k] - start[k]) / rays[k], (high[k] - start[k]) / rays[k]
        first = np.fmin(a, b)
        axis[first > enter] = k
        enter, leave = np.fmax(enter, first), np.fmin(leave, np.fmax(a, b))
    return enter, leave, axis


def _voxels(prediction: Prediction, eye, rays, focal: float, colour, depth) -> None:
    """Paints the filled voxels that the rays meet into colour (P, 3) and depth (P,)."""
    filled = prediction.labels.cpu() != prediction.classes.free
    if not filled.any():
        return
    top = int(filled.any(0).any(0).nonzero().max()) + 1
    filled = filled[:, :, :top].contiguous()
    labels = prediction.labels.cpu()[:, :, :top].contiguous().numpy().ravel()
    edge, size = np.array(prediction.grid.voxel), np.array(filled.shape)
    start, ways = (eye - np.array(prediction.grid.low)) / edge, [ray / e for ray, e in zip(rays, edge)]
    # only rays that meet the box of what is filled, from where they enter it
    enter, leave, _ = _slabs(np.zeros(3), size, start, ways)
    pixels = np.flatnonzero(leave > enter.clip(0))
    way = np.stack([w[pixels] for w in ways], 1)
    inside = (start + enter[pixels].clip(0)[:, None] * way).clip(0, np.nextafter(size.astype(float), 0))
    _, index = ops.cast(filled, torch.from_numpy(inside), torch.from_numpy(way))
    flat = index.numpy() @ [size[1] * size[2], size[2], 1]
    hit = np.flatnonzero(filled.numpy().ravel()[flat])
    pixels, flat = pixels[hit], flat[hit]
    ways, index = np.ascontiguousarray(way[hit].T), np.ascontiguousarray(index.numpy()[hit].T)
    # the face: that through which the ray came in
    far, _, axis = _slabs(index, index + 1, start, ways)
    facing = np.where(np.choose(axis, ways) > 0, -1, 1)
    # light: by the face, less in corners, and less where something stands between the face and the sun
    face = axis * 2 + (facing > 0)
    light = np.array([0.84, 0.7, 0.76, 0.76, 0.5, 1.0])[face]
    room = torch.nn.functional.pad(filled[None].float(), (1, 1, 1, 1, 1, 1))
    for kernel in ((5, 1, 1), (1, 5, 1), (1, 1, 3)):
        room = torch.nn.functional.avg_pool3d(room, kernel, 1, tuple(n // 2 for n in kernel))
    stride = np.array([(size[1] + 2) * (size[2] + 2), size[2] + 2, 1])
    before = stride @ (index + 1) + facing * stride[axis]  # the free voxel before the face
    light *= 1.08 - 0.5 * room.numpy().ravel()[before]
    light[_shaded(filled, flat, face)] *= 0.74
    # thin lines between voxels, as long as one is some pixels wide
    rim = np.full(len(far), np.inf)
    for k in range(3):
        place = start[k] + far * ways[k] - index[k]
        rim = np.where(axis == k, rim, np.minimum(rim, np.minimum(place, 1 - place)))
    light[(rim < 0.7 * far / focal / edge.min()) & (far < 60.0)] *= 0.86
    own = _palette(prediction.classes)[labels[flat]] * light[:, None].astype(np.float32)
    if prediction.unobserved is not None:
        unseen = prediction.unobserved.cpu()[:, :, :top].contiguous().numpy().ravel()[flat]
        own[unseen] = own[unseen] * 0.62 + np.float32(_UNSEEN) * 0.38
    mist = np.clip((far - 45.0) / 70.0, 0.0, 0.5)[:, None].astype(np.float32)
    colour[pixels] = own * (1 - mist) + np.float32(_PAPER) * mist
    depth[pixels] = far


def _shaded(filled: Tensor, flat: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Which of the faces (voxel, 2 * axis + upper) the sun does not reach: one ray from the middle of each."""
    size = np.array(filled.shape)
    table = np.zeros(filled.numel() * 6, bool)
    key = flat * 6 + face
    table[key] = True
    faces = np.flatnonzero(table)
    middle = np.stack(np.unravel_index(faces // 6, filled.shape), 1) + 0.5
    middle[np.arange(len(faces)), faces % 6 // 2] += np.where(faces % 2 == 1, 0.501, -0.501)
    outside = ((middle < 0) | (middle >= size)).any(1)
    sun = torch.from_numpy(np.broadcast_to(_SUN, middle.shape).copy())
    _, end = ops.cast(filled, torch.from_numpy(middle.clip(0, size - 1e-6)), sun)
    table[faces] = filled.numpy()[tuple(end.numpy().T)] & ~outside
    return table[key]


def _solid(low, high, tone, eye, rays, colour, depth) -> None:
    """Paints a box in front of what is farther."""
    enter, leave, axis = _slabs(low, high, eye, rays)
    hit = np.flatnonzero((enter > 0) & (enter < leave) & (enter < depth))
    colour[hit] = np.float32(tone) * np.float32([0.8, 0.7, 1.0])[axis[hit], None]
    depth[hit] = enter[hit]


# ---- small helpers


def _palette(classes: Classes) -> np.ndarray:
    """(C + 1, 3) float32 RGB; free is paper."""
    return np.array([*classes.colours, _PAPER], np.float32)


def _column_unseen(prediction: Prediction) -> np.ndarray:
    """(X, Y): which part of a column, up to 3 m above the grid's floor, nobody looked into."""
    upto = max(1, min(prediction.grid.shape[2], round(3.0 / prediction.grid.voxel[2])))
    return prediction.unobserved[:, :, :upto].float().mean(2).cpu().numpy()


def _veiled(colour, unseen, something):
    """Colours under the tint of what was not observed; what is predicted there shows through."""
    veil = (unseen * np.where(something, 0.38, 1.0))[..., None]
    return colour * (1 - veil) + np.float32(_UNSEEN) * veil


def _arrow(view: np.ndarray, begin, end) -> None:
    length = math.dist(begin, end)
    if length < 2.0:
        return
    tip = max(0.12, min(0.5, 9.0 / length))
    cv2.arrowedLine(view, begin, end, (255, 255, 255), 5, cv2.LINE_AA, tipLength=tip)
    cv2.arrowedLine(view, begin, end, _ARROW, 2, cv2.LINE_AA, tipLength=tip)


def _caption(view: np.ndarray, text: str) -> None:
    _tag(view, text, (12, 28), 0.65)


def _tag(view: np.ndarray, text: str, at, size: float) -> None:
    """A line of text on a piece of paper that lets some of the picture through."""
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
    x, y = max(at[0] - 6, 0), max(at[1] - height - 6, 0)
    piece = view[y : at[1] + 7, x : at[0] + width + 6]
    piece[:] = (piece * 0.25 + np.float32(_PAPER) * 0.75).astype(np.uint8)
    _text(view, text, at, size, _INK)


def _text(view, text: str, at, size: float, colour, thick: int = 1, centred: bool = False) -> int:
    """Writes a line; returns where it ends."""
    text = text.encode("ascii", "replace").decode()  # the font has no others
    (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, thick)
    x = at[0] - width // 2 if centred else at[0]
    cv2.putText(view, text, (x, at[1]), cv2.FONT_HERSHEY_SIMPLEX, size, colour, thick, cv2.LINE_AA)
    return x + width


def _paper(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), _PAPER, np.uint8)
