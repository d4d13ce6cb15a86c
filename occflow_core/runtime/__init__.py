"""The car's side of the library: load a model, feed it frames, get predictions."""

from .load import Model, load, save, shipped, stored
from .stream import Stream

__all__ = ["Model", "Stream", "load", "save", "shipped", "stored"]
