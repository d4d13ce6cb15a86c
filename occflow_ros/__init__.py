"""The ROS 2 side of OccFlow: a node that translates. The mathematics lives in `occflow_core`."""

import os

# Before PyTorch loads OpenMP: its threads spin at barriers by default, and where other processes want the same cores
# (cameras, DDS, a replay) a network's step took 1.3 to 9 s instead of 0.4 s (2 cores, see docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
