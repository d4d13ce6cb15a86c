"""How the loops of this project are compiled: once on a machine, for whichever process asks first."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from numba import njit
from numba.core.compiler_lock import global_compiler_lock


def compiled(function: Callable) -> Callable:
    """`function` by numba, compiled when it is first called; it releases the interpreter lock.

    The result is kept beside the function's file or in numba's cache folder (NUMBA_CACHE_DIR). Processes that need it
    at the same time, as workers that were spawned together do, compile it once: the others wait and take that. Where
    nothing can be kept, each process compiles for itself.
    """
    try:
        kernel = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # "no locator available": nowhere to write
        return njit(nogil=True)(function)
    compile_or_load = kernel.compile

    def alone(signature):
        # numba's own lock first: a thread that has it compiles what it calls too, and would wait here for one that
        # waits for it. Between processes nobody can wait in a circle, as what is called never calls back.
        with global_compiler_lock, _held(Path(kernel.stats.cache_path) / f".{function.__qualname__}.lock"):
            return compile_or_load(signature)

    kernel.compile = alone
    return kernel


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """A lock between processes; none where the file system has no such thing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError:
        yield
        return
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
