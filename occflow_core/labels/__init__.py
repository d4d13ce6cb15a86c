"""Points, boxes and poses of a scene -> occupancy labels with flow. Sees no data set: `make_labels` does.

`scene` what goes in · `aggregate` sweeps -> one cloud · `voxelise` cloud -> classes, seen or not · `flow` how fast ·
`coarse` larger voxels · `make` a scene's labels and their files · `agreement` how well they fit a known truth.
"""

from .aggregate import Settings
from .make import Label, finished, label_keyframe, label_scene, write
from .scene import UNLABELLED, Keyframe, Sweep, Track
from .voxelise import Rule
