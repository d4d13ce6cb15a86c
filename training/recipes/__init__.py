"""Recipes: functions that return a complete Run. Installed as the package `occflow_recipes`."""

from functools import partial

from .demo import demo
from .opus import FAMILIES, SIZES, opus_fusion_world, opus_v2_world, opus_world, published
from .sparseocc import (
    sparseocc4d_8f,
    sparseocc4d_8f_ft,
    sparseocc4d_16f,
    sparseocc4d_512,
    sparseocc4d_world,
    sparseocc_8f,
    sparseocc_8f_60e,
    sparseocc_8f_pano,
)

RECIPES = {
    "demo": demo,
    "opus_world": opus_world,
    "opus_v2_world": opus_v2_world,
    "opus_fusion_world": opus_fusion_world,
    "sparseocc4d_world": sparseocc4d_world,
    # opus_tiny, opus_v2_tiny, opus_fusion_tiny, ...
    **{f"{family.replace('-', '_')}_{size}": partial(published, family, size) for family in FAMILIES for size in SIZES},
    "sparseocc_8f": sparseocc_8f,
    "sparseocc_8f_60e": sparseocc_8f_60e,
    "sparseocc_8f_pano": sparseocc_8f_pano,
    "sparseocc4d_8f": sparseocc4d_8f,
    "sparseocc4d_8f_ft": sparseocc4d_8f_ft,
    "sparseocc4d_16f": sparseocc4d_16f,
    "sparseocc4d_512": sparseocc4d_512,
}
