"""From the host's memory to the device of a network, without waiting."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device; itself where it lies there already.

    A GPU fetches what lies in the host's memory by itself, from pages that stay where they are: the host waits neither
    for the copy nor for what the GPU was told before. Those pages are not given away before they were read.
    """
    fetches = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    if not fetches or torch.compiler.is_compiling():  # a program keeps what it is sent as a constant
        return tensor.to(device)
    if not tensor.is_pinned():
        # in its own order of axes; what was expanded is written out
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def numbers(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor of the type of another and beside it; `new_tensor` would wait until a GPU has them."""
    if torch.compiler.is_compiling():  # they become constants of the program
        return like.new_tensor(values)
    return sent(torch.tensor(values, dtype=like.dtype), like.device)


def fetchable(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Memory of the host for uint8 that a device will be `sent`, not filled: pinned for a GPU, so that nobody copies
    it on the way."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
