"""The ROS 2 side of OccFlow: a node that translates. The mathematics lives in `occflow_core`."""
