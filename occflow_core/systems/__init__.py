"""The published systems, one file each. This dict is the only place where a word becomes a class."""

from .opus import Opus
from .opus_fusion import OpusFusion
from .opus_v2 import OpusV2
from .sparseocc import SparseOcc, SparseOcc4D

SYSTEMS = {
    "opus": Opus,
    "opus-v2": OpusV2,
    "opus-fusion": OpusFusion,
    "sparseocc": SparseOcc,
    "sparseocc4d": SparseOcc4D,
}
