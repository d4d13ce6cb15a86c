"""The smallest kernel: `gpu.serves` asks with it whether any can be launched."""

import torch
import triton
import triton.language as tl


def launch(device: torch.device) -> None:
    """On a GPU. RuntimeError where the kernel ran and did nothing; else what PyTorch and Triton raise."""
    told = torch.zeros(1, device=device)
    with torch.cuda.device(device):  # Triton launches on the current one
        _one[(1,)](told)
    if told.item() != 1:
        raise RuntimeError("a kernel that writes 1 wrote nothing")


@triton.jit
def _one(told):
    tl.store(told, 1.0)
