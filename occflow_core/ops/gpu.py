"""Whether the kernels in the files `*_triton.py` serve a device."""

import warnings
from functools import cache

import torch


def serves(device: torch.device) -> bool:
    """True for a GPU on which Triton can launch kernels, but for programs that are being compiled or exported: those
    are made of the definitions."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and _launches(device)


@cache
def _launches(device: torch.device) -> bool:
    """Tried once a GPU, on a kernel of one number; again where its memory was too full for that, which is raised.

    To be importable is not enough: a first launch compiles a C file against Python's headers, and a vehicle computer
    may have neither a compiler nor them. That is said once, and the definitions run there.
    """
    try:
        from . import probe_triton
    except ImportError:
        return False
    try:
        probe_triton.launch(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        warnings.warn(
            f"Triton cannot launch kernels on {device} ({type(error).__name__}: {error}); slower definitions in "
            "PyTorch run instead. Most often a C compiler or Python's headers are missing: apt install gcc python3-dev",
            stacklevel=2,
        )
        return False
    return True
