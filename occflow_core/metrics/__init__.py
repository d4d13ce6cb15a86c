"""Scores of occupancy with flow, as the field's benchmarks count them: running tallies that can be added and stored.

Read `scores` first: it keeps all of them at once. `rays` holds what is shared by the measures along rays. Every rule
follows published code, which each file names; where two published codes differ, an argument named after the question
chooses, and its default is the challenge's.
"""

from .flow_error import FlowError, occ_score
from .miou import Miou
from .panoptic import RayPq
from .rayiou import RayIou
from .rays import Hits, directions, hits, origins
from .scores import Scores

__all__ = [
    "FlowError",
    "Hits",
    "Miou",
    "RayIou",
    "RayPq",
    "Scores",
    "directions",
    "hits",
    "occ_score",
    "origins",
]
