"""Training: a typed Run in, weights out. `run` says what, `train` does it, `fit` is the loop."""

from .run import Data, Optimise, Run, World, recipe, with_settings

__all__ = ["Data", "Optimise", "Run", "World", "recipe", "with_settings"]
