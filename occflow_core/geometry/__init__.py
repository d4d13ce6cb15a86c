"""Rigid motions, cameras and voxel grids. Sees nothing above it."""

from .cameras import Cameras
from .grid import OCC3D_GRID, OPENOCCUPANCY_GRID, Grid

__all__ = ["OCC3D_GRID", "OPENOCCUPANCY_GRID", "Cameras", "Grid"]
