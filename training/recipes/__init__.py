"""Recipes: functions that return a complete Run. Installed as the package `occflow_recipes`."""

from .demo import demo
from .opus_fusion import opus_fusion_large, opus_fusion_medium, opus_fusion_small, opus_fusion_tiny, opus_fusion_world
from .opus_v2 import opus_v2_large, opus_v2_medium, opus_v2_small, opus_v2_tiny, opus_v2_world

RECIPES = {
    made.__name__: made
    for made in (
        *(demo, opus_v2_tiny, opus_v2_small, opus_v2_medium, opus_v2_large, opus_v2_world),
        *(opus_fusion_tiny, opus_fusion_small, opus_fusion_medium, opus_fusion_large, opus_fusion_world),
    )
}
