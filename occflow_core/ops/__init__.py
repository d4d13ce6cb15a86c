"""Heavy operations, each with a plain PyTorch definition; a faster twin is chosen inside, once."""

from .clouds import farthest, voxel_means
from .mixing import mix
from .nearest import nearest
from .raycast import cast, swept
from .sample import flatten_levels, sample
from .scatter import scatter_max, scatter_mean
from .sparse_conv import convolve, dense, regular_taps, submanifold_taps
from .visibility import observed
