"""The OPUS family: its published trainings on nuScenes with Occ3D's labels, and small ones on the synthetic world."""

from dataclasses import replace
from pathlib import Path

from occflow_core.engine import Data, Optimise, Run
from occflow_core.systems import SYSTEMS
from occflow_core.types import OPENOCC

from .demo import demo

FAMILIES, SIZES = ("opus", "opus-v2", "opus-fusion"), ("tiny", "small", "medium", "large")
BATCH = 8  # the authors' eight GPUs, one lane each
SMALL_STEPS = 250  # of two lanes: 500 keyframes
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


def opus_world() -> Run:
    """OPUS V1 as small as V2 and Fusion beside it, to compare the three: a quarter of an hour on two cores each."""
    return _small("opus", queries=600, samples=8, refines=(16, 48))


def opus_v2_world() -> Run:
    """OPUS V2, as `opus_world`; most of its time goes into voxels, so that fewer points reach as far."""
    return _small("opus-v2", queries=600, samples=8, refines=(4, 8))


def opus_fusion_world() -> Run:
    """OPUS V1-Fusion, as `opus_world`, with the newest LiDAR scan."""
    return _small("opus-fusion", queries=600, samples=8, refines=(16, 48), sweeps=1)


def _small(family: str, **changes) -> Run:
    """The demo's world, pictures and encoder, a few hundred steps; only decoders differ, and whether LiDAR is read."""
    config = replace(
        SYSTEMS[family].PRESETS["nano"],
        backbone="efficientnet-lite0",
        levels=3,
        heads=4,
        frames=2,
        dropout=0.0,
        threshold=0.2,
        classes=OPENOCC.table,
        **changes,
    )
    run = demo()
    optimise = replace(run.optimise, warm_up=50, average=0.99)
    return replace(run, model=f"{family}-nano", config=config, optimise=optimise, steps=SMALL_STEPS)
