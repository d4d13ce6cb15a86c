"""Pinhole cameras whose matrices stay true for the pixels beside them, whatever was resized, cropped or flipped.

Optical frames follow REP 103 (x right, y down, z forward). A picture spans [0, width] x [0, height]: pixel (i, j)
covers the unit square whose upper left corner is (i, j), so resizing by r multiplies coordinates by exactly r.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import rigid


@dataclass(frozen=True)
class Cameras:
    """Any number of cameras that share one picture size; leading axes are the caller's (N, or B x T x N)."""

    pixels_from_camera: Tensor  # (..., 3, 3), pixels
    car_from_camera: Tensor  # (..., 4, 4), metres, car frame of the stamp of the frame they belong to
    height: int  # pixels
    width: int  # pixels

    def __post_init__(self):
        k, pose = self.pixels_from_camera, self.car_from_camera
        if k.shape[-2:] != (3, 3) or pose.shape[-2:] != (4, 4) or k.shape[:-2] != pose.shape[:-2]:
            raise ValueError(
                f"cameras: expected (..., 3, 3) and (..., 4, 4) with equal leading axes, got {tuple(k.shape)} and "
                f"{tuple(pose.shape)}"
            )
        if self.height < 1 or self.width < 1:
            raise ValueError(f"cameras: a picture of {self.width} x {self.height} pixels has no pixels")

    @property
    def shape(self) -> torch.Size:
        return self.pixels_from_camera.shape[:-2]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> "Cameras":
        return replace(
            self, pixels_from_camera=self.pixels_from_camera[index], car_from_camera=self.car_from_camera[index]
        )

    def to(self, *args, **kwargs) -> "Cameras":
        return replace(
            self,
            pixels_from_camera=self.pixels_from_camera.to(*args, **kwargs),
            car_from_camera=self.car_from_camera.to(*args, **kwargs),
        )

    def pixels_from_car(self) -> Tensor:
        """(..., 3, 4): homogeneous car coordinates -> (u d, v d, d), d the depth along the optical axis."""
        return self.pixels_from_camera @ rigid.inverse(self.car_from_camera)[..., :3, :]

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points (..., P, 3) in the car frame -> pixels (..., P, 2) and depths (..., P) in metres.

        Behind a camera (depth <= 0) the pixels mean nothing: look at the depth first, or ask `sees`.
        """
        matrix = self.pixels_from_car()
        seen = points @ matrix[..., :3].mT + matrix[..., None, :, 3]
        depth = seen[..., 2]
        return seen[..., :2] / depth.abs().clamp_min(1e-6).copysign(depth)[..., None], depth

    def unproject(self, pixels: Tensor, depth: Tensor) -> Tensor:
        """Pixels (..., P, 2) at depths (..., P) metres along the optical axis -> points (..., P, 3), car frame."""
        homogeneous = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
        rays = homogeneous @ torch.linalg.inv(self.pixels_from_camera).mT
        return rigid.apply(self.car_from_camera, rays * depth[..., None])

    def sees(self, points: Tensor) -> Tensor:
        """Is a point (..., P, 3) of the car frame inside the picture and in front of the camera? (..., P) bool."""
        pixels, depth = self.project(points)
        u, v = pixels.unbind(-1)
        return (depth > 1e-5) & (u > 0) & (u < self.width) & (v > 0) & (v < self.height)

    def resized(self, height: int, width: int) -> "Cameras":
        """Cameras of the pictures after a resize to height x width."""
        scale = self.pixels_from_camera.new_tensor([width / self.width, height / self.height, 1.0])
        return replace(self, pixels_from_camera=scale[:, None] * self.pixels_from_camera, height=height, width=width)

    def cropped(self, top: int, left: int, height: int, width: int) -> "Cameras":
        """Cameras of the window that begins at (top, left); it may reach outside the picture."""
        return replace(self, pixels_from_camera=self._shifted(-left, -top), height=height, width=width)

    def flipped(self) -> "Cameras":
        """Cameras of the mirrored pictures (u -> width - u)."""
        mirror = torch.diag(self.pixels_from_camera.new_tensor([-1.0, 1.0, 1.0]))
        mirror[0, 2] = self.width
        return replace(self, pixels_from_camera=mirror @ self.pixels_from_camera)

    def moved(self, new_from_car: Tensor) -> "Cameras":
        """The same cameras told in another car frame: new_from_car (..., 4, 4) broadcasts over the leading axes."""
        return replace(self, car_from_camera=new_from_car @ self.car_from_camera)

    def _shifted(self, right: float, down: float) -> Tensor:
        shift = torch.eye(3, dtype=self.pixels_from_camera.dtype, device=self.pixels_from_camera.device)
        shift[0, 2], shift[1, 2] = right, down
        return shift @ self.pixels_from_camera
