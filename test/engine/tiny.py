"""A very small system with a memory, a dropout and a batch norm, a data set to train it on, and its command line.

Run as a program, under torchrun too: python test/engine/tiny.py MODEL OUT ROOT field=value ..., where MODEL is "tiny",
"opus", "opus-v2" or "opus-fusion". DIES=RANK:STEP in the environment takes that process away after that step, as a
power cut would, once.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import torch
from torch import nn

TEST = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(TEST)

from data import layout  # noqa: E402
from systems import small, small_fusion, small_sparse, small_v2  # noqa: E402

from occflow_core.data.nuscenes import NuScenes  # noqa: E402
from occflow_core.engine import Data, Optimise, Run  # noqa: E402
from occflow_core.engine.loader import Batches  # noqa: E402
from occflow_core.geometry import Cameras, Grid  # noqa: E402
from occflow_core.systems import SYSTEMS  # noqa: E402
from occflow_core.types import OPENOCC, Classes, Prediction  # noqa: E402

OPUS_GRID = Grid((-6.0, -6.0, -1.0), (0.4, 0.4, 0.4), (30, 30, 16))
GRID = Grid((-2.0, -2.0, -1.0), (0.4, 0.4, 0.4), (10, 10, 4))  # a part of the labels' own


@dataclass(frozen=True)
class Config:
    height: int = 16
    width: int = 32
    frames: int = 3
    channels: int = 4
    dropout: float = 0.1
    grid: Grid = field(default=GRID)
    classes: str = OPENOCC.table
    as_published: bool = False
    sweeps: ClassVar[int] = 0
    panoptic: ClassVar[bool] = False

    @property
    def table(self) -> Classes:
        return OPENOCC


@dataclass(frozen=True)
class Entry:
    features: torch.Tensor  # (C,)
    cameras: Cameras
    age: float


@dataclass(frozen=True)
class Memory:
    lanes: tuple[tuple[Entry, ...], ...]


class Tiny(nn.Module):
    """Names every voxel from the mean colour now and of the last three clips."""

    PRESETS, NAMES = {"preset": Config()}, {}

    def __init__(self, config: Config):
        super().__init__()
        self.config, c = config, config.channels
        self.backbone = nn.Sequential(nn.Conv2d(3, c, 3, stride=4), nn.BatchNorm2d(c), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(2 * c, 16), nn.Dropout(config.dropout), nn.Linear(16, len(config.grid)))

    def forward(self, clip, memory: Memory | None) -> tuple[torch.Tensor, Memory]:
        expected = (self.config.height, self.config.width)
        assert clip.images.shape[-2:] == expected, clip.images.shape
        maps = self.backbone(clip.images.flatten(0, 2).float() / 255)
        now = maps.mean((2, 3)).unflatten(0, clip.images.shape[:3]).mean((1, 2))  # (B, C)
        lanes, past = [], []
        for b, fresh in enumerate(clip.fresh.tolist()):
            before = () if memory is None or fresh else memory.lanes[b]
            past.append(torch.stack([e.features for e in before]).mean(0) if before else torch.zeros_like(now[b]))
            entry = Entry(now[b].detach(), clip.cameras[b, 0], float(clip.age[b, 0]))
            lanes.append((entry, *(replace(e, age=e.age + float(clip.since_last[b])) for e in before))[:3])
        x = torch.cat([now, torch.stack(past)], dim=1)
        return self.head(x).view(len(x), *self.config.grid.shape), Memory(tuple(lanes))

    def loss(self, output, truth):
        filled = (truth.labels != truth.classes.free).float()
        wrong = nn.functional.binary_cross_entropy_with_logits(output, filled, reduction="none")
        return {"filled": wrong[truth.seen].mean(), "size": 1e-3 * output.square().mean()}

    def decode(self, output):
        labels = torch.where(output > 0, 0, OPENOCC.free).to(torch.uint8)
        return [Prediction(GRID, OPENOCC, lane, (lane != OPENOCC.free).float()) for lane in labels]


SYSTEMS["tiny"] = Tiny


def world(root: Path, scenes: int = 3, keyframes: int = 7) -> Path:
    """A data set with noise for pictures and half-filled labels, different in every keyframe; splits "train", "val"."""
    layout.write(root, scenes, keyframes)
    (root / "v1.0-mini" / "splits.json").write_text(
        json.dumps({"train": [f"scene-{s + 1:04d}" for s in range(scenes)], "val": ["scene-0001"]})
    )
    rng = np.random.default_rng(0)
    for path in sorted((root / "samples").glob("CAM*/*.jpg")):
        noise = rng.integers(0, 256, (layout.HEIGHT, layout.WIDTH, 3))
        cv2.imwrite(str(path), cv2.imread(str(path)) // 2 + (noise // 2).astype(np.uint8))
    data = NuScenes(root, progress=False)
    for scene in data.scenes:
        for sample in data.samples(scene):
            path = data.label_path(sample, "openocc")
            path.parent.mkdir(parents=True)
            labels = np.full((200, 200, 16), OPENOCC.free, np.uint8)
            where = rng.random((30, 30, 16)) < 0.5
            labels[85:115, 85:115][where] = rng.integers(0, OPENOCC.free, where.sum())
            flow = np.zeros((200, 200, 16, 2), np.float32)
            flow[100, 100, 4] = 1.0, 2.0
            flow[101, 101, 4] = np.nan
            np.savez_compressed(path, semantics=labels, flow=flow)
    return root


def run(root: Path, model: str = "tiny") -> Run:
    config = Config()
    if model != "tiny":
        those = {s: of.CONFIG for s, of in (("opus", small), ("opus-v2", small_v2), ("opus-fusion", small_fusion))}
        those["sparseocc4d"] = small_sparse.CONFIG
        config = replace(those[model], grid=OPUS_GRID, classes=OPENOCC.table)
    return Run(
        model="tiny-preset" if model == "tiny" else f"{model}-nano",
        config=config,
        data=Data(root=root, parts=1, cache=0.1),
        optimise=Optimise(rate=1e-2, rates=(("backbone.*", 0.5),), warm_up=4, average=0.9),
        steps=12,
        batch=2,
        save_every=4,
    )


class Killed(Batches):
    """A worker that the kernel takes away, as it does when memory is short."""

    def __getitem__(self, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


class Wrong(Batches):
    """A worker that fails by a mistake of ours."""

    def __getitem__(self, number):
        return {}["no such key"]


def main() -> int:
    from occflow_core.engine import with_settings
    from occflow_core.engine.train import train

    model, out, root, *settings = sys.argv[1:]
    rank, _, last = os.environ.get("DIES", "-1:0").partition(":")
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def dies(step, _):
        if first_life and os.environ.get("RANK", "0") == rank and step.number == int(last):
            (Path(out) / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        train(with_settings(run(Path(root), model), settings), out, "cpu", after_step=[dies], progress=False)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as problem:
        print(f"tiny: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
