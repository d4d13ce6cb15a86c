"""Blocks that two systems or more use, under the parameter names of the weights that the public shares."""

from .backbones import BACKBONES, EfficientNetLite, ResNet
from .lidar import Second, SecondFPN, SparseEncoder
from .necks import FPN

__all__ = ["BACKBONES", "FPN", "EfficientNetLite", "ResNet", "Second", "SecondFPN", "SparseEncoder"]
