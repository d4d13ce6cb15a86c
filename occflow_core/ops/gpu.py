"""Whether the kernels in the files `*_triton.py` serve a device."""

import warnings
from functools import cache

import torch


def serves(device: torch.device) -> bool:
    """True for a GPU on which Triton can launch kernels, but for programs that are being compiled or exported: those
    are made of the definitions."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and _launches()


@cache
def _launches() -> bool:
    """Tried once, on a kernel of one number.

    To be importable is not enough: a first launch compiles a C file against Python's headers, and a vehicle computer
    may have neither a compiler nor them. That is said once, and the definitions run there.
    """
    try:
        from . import probe_triton
    except ImportError:
        return False
    try:
        probe_triton.launch()
    except Exception as error:
        warnings.warn(
            f"Triton cannot launch kernels on this GPU ({type(error).__name__}: {error}); slower definitions "
            "in PyTorch run instead. It needs a C compiler and Python's headers: apt install gcc python3-dev",
            stacklevel=2,
        )
        return False
    return True
