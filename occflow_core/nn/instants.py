"""Instants: what the cameras saw at a time, remembered while the car drives on, and looked into from now.

B batch, T time (newest first), N cameras, L pyramid levels, R rows of a camera's pyramid, G channel groups, C channels,
Q queries, S points of a query's group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import ops
from ..geometry import Cameras, rigid
from ..types import Clip

SPACING = 0.5  # s between the times of a window: nuScenes' key frames
KEEP_EVERY = 0.25  # s: a frame enters the memory when the newest one there is this old
JITTER = 0.015  # s by which a camera's clock may be early


@dataclass(frozen=True)
class Entry:
    """One instant of one lane, as the network sees it."""

    rows: Tensor  # (N, R, C): each camera's pyramid
    cameras: Cameras  # (N), car frame of that instant
    used: Tensor  # (N,) bool
    now_from_then: Tensor  # (4, 4) float64
    age: float  # s before now


@dataclass(frozen=True)
class Memory:
    """Instants of the past, newest first, a tuple for each lane; `now` is that of the clip just seen."""

    lanes: tuple[tuple[Entry, ...], ...]


def encode(
    images: Tensor, used: Tensor, normal: tuple[Tensor, Tensor], backbone: nn.Module, neck: nn.Module
) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Pictures (B, T, N, 3, H, W) uint8 -> pyramids (B, T, N, R, C) and the sizes (H_l, W_l) of their levels.

    Pyramids are float32, under autocast too. used (B, T, N) bool. normal: mean and deviation of each colour, (3, 1, 1)
    each. The neck takes as many of the backbone's coarsest maps as it has levels.
    """
    mean, deviation = normal
    pictures = (images.flatten(0, 2) - mean) / deviation
    pictures = pictures * used.flatten()[:, None, None, None]  # in training, batch norm looks at all
    maps = backbone(pictures.contiguous(memory_format=torch.channels_last))
    rows, sizes = ops.flatten_levels(neck(maps[-len(neck.lateral) :]))
    return rows.float().unflatten(0, images.shape[:3]), sizes


def remember(clip: Clip, rows: Tensor, memory: Memory | None, frames: int) -> tuple[list[list[Entry]], Memory]:
    """The window of every lane, `frames` entries each, and what to remember.

    rows (B, T, N, R, C) are the pyramids of the clip (`encode`). A clip that brings `frames` times is the window; a
    shorter one is completed from memory.
    """
    if memory is not None and len(memory.lanes) != len(clip.fresh):
        raise ValueError(f"memory of {len(memory.lanes)} lanes for a clip of {len(clip.fresh)}")
    ages, since_last, fresh = clip.age.tolist(), clip.since_last.tolist(), clip.fresh.tolist()
    now_from_then, now_from_last = clip.now_from_then.double(), clip.now_from_last.double()
    windows, lanes = [], []
    for b, forget in enumerate(fresh):
        given = [
            Entry(rows[b, t], clip.cameras[b, t], clip.used[b, t], now_from_then[b, t], age)
            for t, age in enumerate(ages[b])
        ]
        past = []
        if memory is not None and not forget:
            past = [
                replace(e, now_from_then=now_from_last[b] @ e.now_from_then, age=e.age + since_last[b])
                for e in memory.lanes[b]
            ]
        if any(e.rows.shape != rows.shape[2:] for e in past):
            raise ValueError("the cameras or pictures of a lane changed without a fresh start")
        windows.append(given if len(given) == frames else _window(given + past, frames))
        for entry in reversed(given):  # oldest first
            if not past or past[0].age - entry.age >= KEEP_EVERY - JITTER:
                past = [replace(entry, rows=entry.rows.detach()), *past]
        lanes.append(tuple(past[: kept(frames)]))
    return windows, Memory(tuple(lanes))


def kept(frames: int) -> int:
    """How many instants a memory keeps: at KEEP_EVERY they reach back to the oldest time of a window."""
    return 1 + round((frames - 1) * SPACING / KEEP_EVERY)


def _window(entries: Sequence[Entry], frames: int) -> list[Entry]:
    """Now, and for each earlier time the entry nearest to it: the oldest again and again where a drive begins."""
    return [min(entries, key=lambda e: abs(e.age - k * SPACING)) if k else entries[0] for k in range(frames)]


def _pixels_from_now(entry: Entry) -> Tensor:
    """(N, 3, 4) float32, composed in float64."""
    cameras = entry.cameras.to(torch.float64)
    return (cameras.pixels_from_car() @ rigid.inverse(entry.now_from_then)).float()


@dataclass(frozen=True)
class View:
    """What can be looked into: the windows of all lanes, T instants each. See `ops.sample` for the shapes."""

    rows: list[list[Tensor]]
    sizes: tuple[tuple[int, int], ...]
    picture: tuple[int, int]  # height, width in pixels
    pixels_from_now: Tensor  # (B, T, N, 3, 4)
    used: Tensor  # (B, T, N) bool
    cameras: Cameras | None = None  # (B, N), of the newest instant, for those that follow rays

    @staticmethod
    def of(windows: Sequence[Sequence[Entry]], sizes: tuple[tuple[int, int], ...]) -> "View":
        """sizes: of the levels of every entry's rows."""
        now = [lane[0].cameras for lane in windows]
        cameras = Cameras(
            torch.stack([c.pixels_from_camera for c in now]),
            torch.stack([c.car_from_camera for c in now]),
            now[0].height,
            now[0].width,
        )
        return View(
            rows=[[entry.rows for entry in lane] for lane in windows],
            sizes=sizes,
            picture=(cameras.height, cameras.width),
            pixels_from_now=torch.stack([torch.stack([_pixels_from_now(e) for e in lane]) for lane in windows]),
            used=torch.stack([torch.stack([entry.used for entry in lane]) for lane in windows]),
            cameras=cameras,
        )

    def finest(self, change: Callable[[Tensor], Tensor]) -> "View":
        """The finest level alone, of every instant, each of its rows (N, H*W, C) changed."""
        height, width = self.sizes[0]
        rows = [[change(rows[:, : height * width]).float() for rows in lane] for lane in self.rows]
        return replace(self, rows=rows, sizes=self.sizes[:1])

    def now(self, rows: Tensor, size: tuple[int, int]) -> "View":
        """Other rows (B, N, H*W, C), of one level, in the place of the newest instant's; no other instant."""
        return View([[lane] for lane in rows], (size,), self.picture, self.pixels_from_now[:, :1], self.used[:, :1])

    def sample(self, points: Tensor, weights: Tensor, as_published: bool) -> Tensor:
        """Features (B, Q, G, T*S, C) of points (B, Q, G, S, 3) in metres, levels weighed by (B, Q, G, S, L)."""
        with torch.autocast(points.device.type, enabled=False):  # half a number is no place in a picture
            return ops.sample(
                self.rows,
                self.sizes,
                self.picture,
                self.pixels_from_now,
                self.used,
                points.to(self.pixels_from_now),
                weights.to(self.pixels_from_now),
                as_published,
            )


def see(system: nn.Module, clip: Clip, memory: Memory | None) -> tuple[View, Tensor, Memory]:
    """What a system looks into at a clip, the clip's own pyramids (B, T, N, R, C), and what to remember.

    system: has `config` (height, width, frames), `backbone`, `neck`, and `mean` and `std` of colours. A clip that
    brings all times is the window; a shorter one is completed from memory. ValueError for pictures of another size, or
    too many times.
    """
    config = system.config
    expected = (3, config.height, config.width)
    if clip.images.shape[3:] != expected or clip.images.shape[1] > config.frames:
        raise ValueError(
            f"the network takes at most {config.frames} times of pictures {expected}, got {tuple(clip.images.shape)}"
        )
    rows, sizes = encode(clip.images, clip.used, (system.mean, system.std), system.backbone, system.neck)
    windows, memory = remember(clip, rows, memory, config.frames)
    return View.of(windows, sizes), rows, memory
