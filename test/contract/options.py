"""For each system: what makes its nano preset small enough for tests, and another value of every option."""

from occflow_core.geometry import Grid
from occflow_core.types import OPENOCC

SMALL = {
    "opus": {"queries": 60, "refines": (2, 4, 8), "channels": 32, "hidden": 64, "mixed": 4},
    "opus-v2": {"queries": 60, "refines": (2, 4, 8), "channels": 32, "hidden": 64, "mixed": 4, "told": 8, "cells": 8},
}
OPTIONS = {  # each of them must change something
    "opus": {
        "height": 96,
        "width": 128,
        "queries": 50,
        "refines": (2, 4, 6),
        "samples": 3,
        "backbone": "resnet18",
        "levels": 3,
        "channels": 48,
        "groups": 2,
        "heads": 4,
        "mixed": 8,
        "hidden": 32,
        "frames": 3,
        "dropout": 0.5,
        "threshold": 0.6,
        "closing": False,
        "flow": False,
        "as_published": True,
        "grid": Grid((-12.0, -10.0, -1.0), (0.8, 1.0, 0.8), (24, 20, 8)),
        "classes": OPENOCC.table,
    },
    "opus-v2": {
        "height": 96,
        "width": 128,
        "queries": 50,
        "refines": (2, 4, 6),
        "samples": 3,
        "backbone": "resnet18",
        "levels": 3,
        "channels": 48,
        "groups": 2,
        "heads": 4,
        "mixed": 8,
        "hidden": 32,
        "told": 4,
        "cells": 4,
        "frames": 3,
        "dropout": 0.5,
        "threshold": 0.6,
        "flow": False,
        "as_published": True,
        "grid": Grid((-12.0, -10.0, -1.0), (0.8, 1.0, 0.8), (24, 20, 8)),
        "classes": OPENOCC.table,
    },
}
