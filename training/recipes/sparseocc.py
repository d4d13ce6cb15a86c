"""SparseOcc and SparseOcc4D: their published trainings on nuScenes, and a small one on the synthetic world."""

from dataclasses import replace
from pathlib import Path

from occflow_core.engine import Optimise, Run
from occflow_core.systems.sparseocc import PRESETS, PRESETS_4D

from .demo import demo
from .opus import BATCH, EPOCH, SMALL_STEPS, published

KEYFRAMES = BATCH * EPOCH  # of nuScenes' training split
RATES = (("backbone.*", 0.1), ("scales.*.sampling.offset.*", 0.1))


def sparseocc_8f() -> Run:
    """SparseOcc v1.1 in 24 epochs (`configs/r50_nuimg_704x256_8f.py` at fe9a966).

    Theirs stays at one rate and ends with two epochs at a fifth of it; ours falls as a cosine, as v1.0 did. What a
    turned world brings from beyond the labels (up to 13 % of the grid) is learned as free here, and unlabelled there.
    """
    run = published("opus", "tiny")  # of nuScenes too, from the same encoder
    return replace(
        run,
        model="sparseocc-8f",
        config=PRESETS["8f"],
        data=replace(run.data, camera_mask=False, flips=True, turn=22.5),
        optimise=Optimise(rate=5e-4, rates=RATES),
        steps=24 * EPOCH,
    )


def sparseocc_8f_60e() -> Run:
    """As `sparseocc_8f`, 60 epochs."""
    return replace(sparseocc_8f(), steps=60 * EPOCH)


def sparseocc_8f_pano() -> Run:
    """As `sparseocc_8f`, with masks of single things."""
    return replace(sparseocc_8f(), model="sparseocc-8f-pano", config=PRESETS["8f-pano"])


def sparseocc4d_8f() -> Run:
    """SparseOcc4D's first stage: 12 epochs of batches of two in half precision, colours varied on the GPU.

    The report begins with a ResNet-50 of COCO, this with one that learned nuImages after COCO, as SparseOcc itself; and
    here pictures are mirrored every other time, as v1.1 does and v1.0 did not.
    """
    run = sparseocc_8f()
    return replace(
        run,
        model="sparseocc4d-8f",
        config=PRESETS_4D["8f"],
        data=replace(run.data, labels="openocc", flips=False, turn=0.0),
        optimise=Optimise(rate=2e-4, rates=RATES, precision="fp16"),
        steps=12 * KEYFRAMES // 2,
        batch=2,
        save_every=KEYFRAMES // 2,
    )


def sparseocc4d_8f_ft() -> Run:
    """Its second stage: on from the first at half the rate. The report does not say how long; this is as long again."""
    run = sparseocc4d_8f()
    optimise = replace(run.optimise, rate=1e-4)
    first = Path("out/train/sparseocc4d_8f/weights.safetensors")
    return replace(run, optimise=optimise, weights=first, backbone=None)


def sparseocc4d_16f() -> Run:
    """The second stage with sixteen frames (`SparseOcc.grown`)."""
    return replace(sparseocc4d_8f_ft(), model="sparseocc4d-16f", config=PRESETS_4D["16f"])


def sparseocc4d_512() -> Run:
    """The second stage with pictures of 512 x 1408."""
    return replace(sparseocc4d_8f_ft(), model="sparseocc4d-512", config=PRESETS_4D["512"])


def sparseocc4d_world() -> Run:
    """As small as `opus_world` and beside it: the same world, pictures, encoder and steps; what decodes differs."""
    run = demo()
    return replace(
        run,
        model="sparseocc4d-nano",
        config=replace(PRESETS_4D["nano"], backbone="efficientnet-lite0", levels=3, frames=2),
        optimise=replace(run.optimise, rates=RATES, warm_up=50, average=0.99),
        steps=SMALL_STEPS,
    )
