"""Blocks that two systems or more use, under the parameter names of the weights that the public shares."""

from .backbones import ResNet
from .necks import FPN

__all__ = ["FPN", "ResNet"]
