"""The car's side of the library: load a model, feed it frames, get predictions."""

from .backends import built
from .load import Model, load, save, shipped, stored
from .stream import Stream

__all__ = ["Model", "Stream", "built", "load", "save", "shipped", "stored"]
