"""The loop. What else happens in a training happens in `after_step`, which is given from outside."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..types import Clip, Occupancy
from .optimise import Optimiser, as_float32


@dataclass(frozen=True)
class Step:
    """What happened in one step of the optimiser."""

    number: int  # from 0
    terms: dict[str, float]  # of the loss, means over the step's batches of this process
    gradient: float  # its length before clipping
    seconds: float  # the whole step
    waited: float  # s of them, for data
    memory: Any  # what the system remembers after it

    @property
    def loss(self) -> float:
        return sum(self.terms.values())


def fit(
    forward: nn.Module,
    system: nn.Module,
    batches: Iterator[tuple[Clip, Occupancy]],
    ready: Callable[[int, Clip, Occupancy], tuple[Clip, Occupancy]],
    optimiser: Optimiser,
    steps: int,
    start: int = 0,
    memory: Any = None,
    remembers: bool = True,
    after_step: Callable[[Step], None] = lambda step: None,
) -> None:
    """Steps `start` to `steps` - 1. forward: the system as it is called, e.g. in DistributedDataParallel.

    ready: a batch's number, from 0 for the first of step 0, and the batch -> the batch on the device. memory: what the
    system remembers of the batch before the first. remembers: lanes go on from batch to batch; else each is by itself.
    FloatingPointError that names the terms for a loss that is not finite; the weights are then as before it.
    """
    accumulate = optimiser.settings.accumulate
    for number in range(start, steps):
        begin, waited, told = time.perf_counter(), 0.0, []
        for part in range(accumulate):
            asked = time.perf_counter()
            clip, truth = next(batches)
            waited += time.perf_counter() - asked
            clip, truth = ready(number * accumulate + part, clip, truth)
            last = part == accumulate - 1
            with nullcontext() if last or forward is system else forward.no_sync():
                with optimiser.precision():
                    output, memory = forward(clip, memory)
                memory = memory if remembers else None
                terms = system.loss(as_float32(output), truth)
                told.append(_finite(number, terms))
                optimiser.backward(torch.stack(list(terms.values())).sum())
        gradient = optimiser.step(number)
        means = {name: sum(t[name] for t in told) / accumulate for name in told[0]}
        after_step(Step(number, means, gradient, time.perf_counter() - begin, waited, memory))


def _finite(number: int, terms: dict[str, Tensor]) -> dict[str, float]:
    values = dict(zip(terms, torch.stack([t.detach() for t in terms.values()]).tolist()))
    bad = [name for name, value in values.items() if not abs(value) < float("inf")]
    if bad:
        raise FloatingPointError(
            f"step {number}: the loss is not finite in {', '.join(bad)} ("
            + ", ".join(f"{name} {value:g}" for name, value in values.items())
            + "); lower optimise.rate, or train in another optimise.precision"
        )
    return values
