"""The weights that ship: a small OPUS with flow, learned from the synthetic world alone."""

from pathlib import Path

from occflow_core.engine import Data, Optimise, Run, World
from occflow_core.systems.opus import PRESETS


def demo() -> Run:
    """Made and trained on any machine: the world is made first. Two lanes, so that two processes can share them."""
    return Run(
        model="opus-demo",
        config=PRESETS["demo"],
        data=Data(
            root=Path("out/train/world"),
            # many short drives: the same street seen again teaches less than another street
            world=World(scenes=72, seed=100, keyframes=12),
            train="world_train",
            val="world_val",
            camera_mask=True,
            # three keyframes in a row, then another street: what follows each other is too alike to learn much from
            parts=4,
            view=False,
            # traffic keeps right and drives ahead: in a mirrored world where a car is would not tell how fast it is
            flips=False,
            colours=False,  # an hour is too short to learn that colours do not matter; weather and light differ anyway
            cache=4.0,
        ),
        optimise=Optimise(
            rate=2e-3,
            rates=(("backbone.*", 0.1), ("layers.*.sampling.offset.*", 0.1)),
            betas=(0.9, 0.99),  # a short run: moments that forget within hundreds of steps, not thousands
            warm_up=100,
            clip=1.0,  # gradients are half as long; a single batch shall not undo what others taught
            average=0.998,
        ),
        steps=2160,
        batch=2,
        backbone="imagenet",
        # what sees edges sees them here too; and most of the work lies in these large maps
        frozen=("backbone.stem.*", "backbone.blocks.[0-4].*"),
        frozen_norms=True,
        half=True,
        save_every=250,
    )
