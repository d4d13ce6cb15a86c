"""The published systems, one file each. This dict is the only place where a word becomes a class."""

from .opus import Opus
from .opus_fusion import OpusFusion
from .opus_v2 import OpusV2

SYSTEMS = {"opus": Opus, "opus-v2": OpusV2, "opus-fusion": OpusFusion}
