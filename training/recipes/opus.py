"""The OPUS family: its published trainings on nuScenes with Occ3D's labels, and small ones on the synthetic world."""

from dataclasses import replace
from pathlib import Path

from occflow_core.engine import Data, Optimise, Run, World
from occflow_core.systems import SYSTEMS
from occflow_core.types import OPENOCC

from .demo import demo

FAMILIES, SIZES = ("opus", "opus-v2", "opus-fusion"), ("tiny", "small", "medium", "large")
BATCH = 8  # the authors' eight GPUs, one lane each
EPOCH = 3517  # steps: 28,130 keyframes in batches of eight


def published(family: str, size: str) -> Run:
    """The authors' configs of 100 epochs (`configs/opusv1_nusc-occ3d/` and beside it, at 216dc53), for data/nuscenes.

    Their rate falls after each epoch, ours after each step; they look at pictures (and LiDAR) in fp16 and decode in
    float32. Their LiDAR blocks begin with those of DAL (ECCV 2024), ours at random; see `Run.weights`.
    """
    return Run(
        model=f"{family}-{size}",
        config=SYSTEMS[family].PRESETS[size],
        data=Data(
            root=Path("data/nuscenes"),
            version="v1.0-trainval",
            labels="occ3d",
            camera_mask=True,
            window="window",
            flips=family == "opus-v2",
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


def opus_v2_world() -> Run:
    """The demo's training with another system: made and trained on any machine."""
    return _as_demo("opus-v2")


def opus_fusion_world() -> Run:
    """As the demo's, in a world of fewer drives with LiDAR between its keyframes, too."""
    run = _as_demo("opus-fusion")
    swept = World(scenes=24, seed=100, keyframes=12, sweeps=True)
    return replace(run, data=replace(run.data, root=Path("out/train/world-sweeps"), world=swept))


def _as_demo(family: str) -> Run:
    nano = SYSTEMS[family].PRESETS["nano"]
    config = replace(nano, backbone="efficientnet-lite0", levels=3, frames=2, classes=OPENOCC.table)
    return replace(demo(), model=f"{family}-nano", config=config)
