"""Work shared out over the processes that `distributed.joined` connected, if it did.

What they tell each other are numbers and JSON, never objects.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def process() -> tuple[int, int]:
    """(number of this process, how many there are); (0, 1) where there is only one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mine(items: Sequence[T]) -> list[T]:
    """This process' part of the items: every n-th."""
    number, all_ = process()
    return list(items[number::all_])


def told(value: Any) -> list[Any]:
    """What each process says, in their order, on every process. value: anything that JSON can hold."""
    if process()[1] == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
    length = torch.tensor([len(text)], device=text.device)
    lengths = [torch.zeros_like(length) for _ in range(process()[1])]
    dist.all_gather(lengths, length)
    longest = int(max(lengths))
    padded = torch.zeros(longest, dtype=torch.uint8, device=text.device)
    padded[: len(text)] = text
    texts = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(t[: int(n)].cpu().numpy())) for t, n in zip(texts, lengths)]


def added(counts: Tensor) -> Tensor:
    """The sum of every process' counts (integers), on every process."""
    if process()[1] == 1:
        return counts
    there = counts.to(_device())
    dist.all_reduce(there)
    return there.to(counts.device)


def all_or_none(work: Callable[[], T]) -> T:
    """`work()` on every process; where it fails by bad input on one, all fail with its sentence, and none waits.

    `work` must not speak with other processes.
    """
    result, problem = None, None
    try:
        result = work()
    except (ValueError, OSError, ArithmeticError) as error:
        problem = error
    failed = [sentence for sentence in told(None if problem is None else str(problem)) if sentence is not None]
    if problem is not None:
        raise problem
    if failed:
        raise ValueError(f"another process ended: {failed[0]}")
    return result


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
