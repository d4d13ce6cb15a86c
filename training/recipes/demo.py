"""The weights that ship: a small OPUS with flow, learned from the synthetic world alone."""

from dataclasses import replace
from pathlib import Path

from occflow_core.engine import Data, Optimise, Run, World
from occflow_core.systems.opus import PRESETS
from occflow_core.types import OPENOCC


def demo() -> Run:
    """Made and trained on any machine: the world is generated first."""
    return Run(
        model="opus-nano",
        config=replace(PRESETS["nano"], classes=OPENOCC.table),
        data=Data(
            root=Path("out/train/world"),
            world=World(scenes=36, seed=100),
            train="world_train",
            val="world_val",
            cache=8.0,
        ),
        optimise=Optimise(
            rates=(("backbone.*", 0.1), ("layers.*.sampling.offset.*", 0.1)),
            warm_up=200,
            average=0.999,
        ),
        steps=4000,
        batch=4,
    )
