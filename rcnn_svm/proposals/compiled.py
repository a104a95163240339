"""How kernels are compiled: once per machine, kept on disk, with one line that says so.

Importing this module imports numba. The rest of the package does it only when a selective
search is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from rcnn_svm.progress import say

__all__ = ["kernel"]

_announced = False

# glibc hands large blocks back to the system as soon as they are freed, and every search would
# touch its 25 MB for the first time again: a fifth of its time went into page faults. Freeing one
# block just below 32 MB makes glibc keep blocks up to that size (mallopt(3), "dynamic mmap
# threshold"), as any array of that size would. Elsewhere this does nothing.
np.empty(31 << 20, np.uint8)


def kernel(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for `signature` now, or load it from the disk cache.

    Kernels release the GIL and keep IEEE arithmetic (no fastmath), so that a result depends on
    neither the number of threads nor the width of the machine's vectors. The cache lies in
    `__pycache__`, or where `NUMBA_CACHE_DIR` says, or, where the package folder is read-only,
    in numba's folder under the user's cache; without any writable place the kernel is compiled
    anew in each process.
    """

    def compile_or_load(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            compiled = numba.njit(signature, cache=True, nogil=True, error_model="numpy")(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            _announce("no writable folder for compiled code, set NUMBA_CACHE_DIR to keep it")
            return numba.njit(signature, nogil=True, error_model="numpy")(function)
        if sum(compiled.stats.cache_misses.values()):
            _announce("kept on disk for the next start")
        return compiled

    return compile_or_load


def _announce(detail: str) -> None:
    global _announced
    if not _announced:
        _announced = True
        say(f"Compiling selective search for this machine: once, some seconds ({detail}).")
