"""Recipes: functions that return a complete Run. Installed as the package `occflow_recipes`."""

from .demo import demo

RECIPES = {"demo": demo}
