"""Recipes: functions that return a complete Run. Installed as the package `occflow_recipes`."""

from functools import partial

from .demo import demo
from .opus import FAMILIES, SIZES, opus_fusion_world, opus_v2_world, opus_world, published

RECIPES = {
    "demo": demo,
    "opus_world": opus_world,
    "opus_v2_world": opus_v2_world,
    "opus_fusion_world": opus_fusion_world,
    # opus_tiny, opus_v2_tiny, opus_fusion_tiny, ...
    **{f"{family.replace('-', '_')}_{size}": partial(published, family, size) for family in FAMILIES for size in SIZES},
}
