"""Voxel grids: metres <-> indices, index order x, y, z."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..transfer import numbers


@dataclass(frozen=True)
class Grid:
    """An axis-aligned box of equal voxels in the car frame."""

    low: tuple[float, float, float]  # m, the corner of voxel (0, 0, 0)
    voxel: tuple[float, float, float]  # m, edge lengths
    shape: tuple[int, int, int]  # voxels along x, y, z

    def __post_init__(self):
        for name, kind in (("low", float), ("voxel", float), ("shape", int)):
            values = tuple(kind(v) for v in getattr(self, name))
            if len(values) != 3:
                raise ValueError(f"grid: {name} needs three values (x, y, z), got {values}")
            object.__setattr__(self, name, values)
        if min(self.voxel) <= 0 or min(self.shape) < 1:
            raise ValueError(f"grid: voxels {self.voxel} m and shape {self.shape} must be positive")

    @property
    def high(self) -> tuple[float, float, float]:
        """The far corner, m."""
        return tuple(lo + edge * n for lo, edge, n in zip(self.low, self.voxel, self.shape, strict=True))

    @property
    def size(self) -> tuple[float, float, float]:
        """Edge lengths of the whole box, m."""
        return tuple(edge * n for edge, n in zip(self.voxel, self.shape, strict=True))

    def __len__(self) -> int:
        """Number of voxels."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def index(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points (..., 3) in metres -> voxel indices (..., 3) int64 and whether they lie inside (...) bool.

        Computed in the points' own precision, as the published voxelisers do: floor((p - low) / voxel). Points that
        are not finite lie outside.
        """
        cell = torch.floor((points - numbers(self.low, points)) / numbers(self.voxel, points))
        inside = ((cell >= 0) & (cell < numbers(self.shape, cell))).all(-1)
        # a float beyond int64's range has no defined integer: outside points get voxel 0 and say `inside` = False
        return torch.where(inside[..., None], cell, torch.zeros_like(cell)).long(), inside

    def centres(self, dtype=torch.float32, device=None) -> Tensor:
        """Centres of all voxels, (X, Y, Z, 3) in metres."""
        axes = [
            lo + (torch.arange(n, dtype=torch.float64) + 0.5) * edge
            for lo, edge, n in zip(self.low, self.voxel, self.shape, strict=True)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).to(device=device, dtype=dtype)

    def unit(self, points: Tensor) -> Tensor:
        """Metres -> fractions of the box, (..., 3); outside it they leave [0, 1]."""
        return (points - numbers(self.low, points)) / numbers(self.size, points)

    def metres(self, unit: Tensor) -> Tensor:
        """Fractions of the box -> metres; the inverse of `unit`."""
        return unit * numbers(self.size, unit) + numbers(self.low, unit)

    def coarser(self, factor: int) -> "Grid":
        """The same box in voxels `factor` times as long. ValueError where the shape does not divide."""
        if any(n % factor for n in self.shape):
            raise ValueError(f"grid: shape {self.shape} does not divide by {factor}")
        return Grid(self.low, tuple(v * factor for v in self.voxel), tuple(n // factor for n in self.shape))


# Occ3D-nuScenes and OpenOcc v2 (arXiv 2304.14365, section 3): 80 x 80 x 6.4 m around the car
OCC3D_GRID = Grid(low=(-40.0, -40.0, -1.0), voxel=(0.4, 0.4, 0.4), shape=(200, 200, 16))
# OpenOccupancy (arXiv 2303.03991): 102.4 x 102.4 x 8 m around the LiDAR
OPENOCCUPANCY_GRID = Grid(low=(-51.2, -51.2, -5.0), voxel=(0.2, 0.2, 0.2), shape=(512, 512, 40))
