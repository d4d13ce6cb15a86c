"""OPUS-V1-Fusion: its published training on nuScenes with Occ3D's labels, and one on the synthetic world."""

from dataclasses import replace
from pathlib import Path

from occflow_core.engine import Data, Optimise, Run, World
from occflow_core.systems.opus_fusion import PRESETS
from occflow_core.types import OPENOCC

BATCH = 8  # the authors' eight GPUs, one lane each
EPOCH = 3517  # steps: 28,130 keyframes in batches of eight


def _published(preset: str) -> Run:
    """The authors' configs of 100 epochs (`configs/opusv1-fusion_nusc-occ3d/` at 216dc53), for data/nuscenes.

    Their rate falls after each epoch, ours after each step; they look at pictures and LiDAR in fp16 and decode in
    float32. Their LiDAR blocks begin with those of DAL (ECCV 2024), ours at random; see `Run.weights`.
    """
    return Run(
        model=f"opus-fusion-{preset}",
        config=PRESETS[preset],
        data=Data(
            root=Path("data/nuscenes"),
            version="v1.0-trainval",
            labels="occ3d",
            camera_mask=True,
            window="window",
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


def opus_fusion_tiny() -> Run:
    return _published("tiny")


def opus_fusion_small() -> Run:
    return _published("small")


def opus_fusion_medium() -> Run:
    return _published("medium")


def opus_fusion_large() -> Run:
    return _published("large")


def opus_fusion_world() -> Run:
    """Made and trained on any machine: the world, with LiDAR between its keyframes, is made first."""
    return Run(
        model="opus-fusion-nano",
        config=replace(PRESETS["nano"], backbone="efficientnet-lite0", levels=3, frames=2, classes=OPENOCC.table),
        data=Data(
            root=Path("out/train/world-sweeps"),
            world=World(scenes=24, seed=100, keyframes=12, sweeps=True),
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
