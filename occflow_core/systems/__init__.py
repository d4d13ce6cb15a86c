"""The published systems, one file each. This dict is the only place where a word becomes a class."""

from .opus import Opus

SYSTEMS = {"opus": Opus}
