"""OccFlow's library: surround cameras in, semantic occupancy with flow out. Pure PyTorch, no ROS."""
