"""OPUS-V2: its published training on nuScenes with Occ3D's labels, and one on the synthetic world for any machine."""

from dataclasses import replace
from pathlib import Path

from occflow_core.engine import Data, Optimise, Run, World
from occflow_core.systems.opus_v2 import PRESETS
from occflow_core.types import OPENOCC

BATCH = 8  # the authors' eight GPUs, one lane each
EPOCH = 3517  # steps: 28,130 keyframes in batches of eight


def _published(preset: str) -> Run:
    """The authors' configs of 100 epochs (`configs/opusv2_nusc-occ3d/` at 216dc53), for nuScenes in data/nuscenes.

    Their rate falls after each epoch, ours after each step; they read pictures in fp16 and decode in float32.
    """
    return Run(
        model=f"opus-v2-{preset}",
        config=PRESETS[preset],
        data=Data(
            root=Path("data/nuscenes"),
            version="v1.0-trainval",
            labels="occ3d",
            camera_mask=True,
            window="window",
            flips=True,
            workers=4,
        ),
        optimise=Optimise(
            rates=(("backbone.*", 0.1), ("layers.*.sampling.offset.*", 0.1)),
            precision="bf16",
        ),
        steps=100 * EPOCH,
        batch=BATCH,
        resize="pillow",
        # nuImages' Cascade Mask R-CNN, from the model zoo of MMDetection3D
        backbone="data/cascade_mask_rcnn_r50_fpn_coco-20e_20e_nuim_20201009_124951-40963960.pth",
        frozen=("backbone.conv1.*", "backbone.bn1.*", "backbone.layer1.*"),
        checkpointing=("backbone",),
        frozen_norms=True,
        save_every=EPOCH,
    )


def opus_v2_tiny() -> Run:
    return _published("tiny")


def opus_v2_small() -> Run:
    return _published("small")


def opus_v2_medium() -> Run:
    return _published("medium")


def opus_v2_large() -> Run:
    return _published("large")


def opus_v2_world() -> Run:
    """Made and trained on any machine: the world is made first. The backbone begins with photographs."""
    return Run(
        model="opus-v2-nano",
        config=replace(PRESETS["nano"], backbone="efficientnet-lite0", levels=3, frames=2, classes=OPENOCC.table),
        data=Data(
            root=Path("out/train/world"),
            world=World(scenes=72, seed=100, keyframes=12),
            train="world_train",
            val="world_val",
            camera_mask=True,
            parts=4,  # three keyframes in a row, then another street
            view=False,
            flips=True,
            colours=False,
            cache=4.0,
        ),
        optimise=Optimise(
            rate=2e-3,
            rates=(("backbone.*", 0.1), ("layers.*.sampling.offset.*", 0.1)),
            betas=(0.9, 0.99),
            warm_up=100,
            average=0.998,
        ),
        steps=2400,
        batch=2,
        backbone="imagenet",
        frozen=("backbone.stem.*", "backbone.blocks.[0-4].*"),
        frozen_norms=True,
        half=True,
        save_every=250,
    )
