"""A synthetic world in nuScenes' own layout: streets, traffic, six cameras, a LiDAR, and exact truth."""

from .write import demo_scene, write_world

__all__ = ["demo_scene", "write_world"]
