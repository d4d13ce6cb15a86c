"""Recordings and generated pictures as Frames, and Frames as rosbag2."""
