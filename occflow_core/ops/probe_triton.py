"""The smallest kernel: `gpu.serves` asks with it whether any can be launched."""

import torch
import triton
import triton.language as tl


def launch() -> None:
    """On the current GPU. RuntimeError where the kernel ran and did nothing; else what Triton raises."""
    told = torch.zeros(1, device="cuda")
    _one[(1,)](told)
    if told.item() != 1:
        raise RuntimeError("a kernel that writes 1 wrote nothing")


@triton.jit
def _one(told):
    tl.store(told, 1.0)
