"""How loops are compiled: once per machine, kept on disk, with one line that says so.

Importing this module imports numba, and it is the only one that does: what a machine allows, and what a
result may depend on, is decided here for every kernel of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import numba

from rcnn_svm.progress import say

__all__ = ["kernel"]

_announced = False


def kernel(
    signature: str | None = None, *, fastmath: Set[str] = frozenset()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function, or load it from the disk cache: now for `signature`, else at each first call.

    Kernels release the GIL, divide as numpy does, and keep IEEE arithmetic unless told otherwise, so that
    a result depends on neither the number of threads nor the width of the machine's vectors. The cache
    lies in `__pycache__`, or where `NUMBA_CACHE_DIR` says, or, where the package folder is read-only,
    in numba's folder under the user's cache; without any writable place the kernel is compiled
    anew in each process.

    Args:
        signature: the types that it takes, in numba's words; None compiles for those that come.
        fastmath: LLVM's flags of what rounding may do, such as `reassoc`, for sums that may be reordered.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}

    def compile_or_load(function: Callable[..., Any]) -> Callable[..., Any]:
        dispatcher: Any
        try:
            dispatcher = numba.njit(cache=True, **options)(function)
            kept = "kept on disk for the next start"
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            dispatcher = numba.njit(**options)(function)
            kept = "no writable folder for compiled code, set NUMBA_CACHE_DIR to keep it"
        compile_quietly = dispatcher.compile

        def compile_and_say(types: Any) -> Any:
            entry = compile_quietly(types)
            if dispatcher.stats.cache_path is None or sum(dispatcher.stats.cache_misses.values()):
                _announce(kept)
            return entry

        dispatcher.compile = compile_and_say
        if signature is not None:
            dispatcher.compile(signature)
            dispatcher.disable_compile()
        compiled: Callable[..., Any] = dispatcher
        return compiled

    return compile_or_load


def _announce(detail: str) -> None:
    global _announced
    if not _announced:
        _announced = True
        say(f"Compiling loops for this machine: once, some seconds ({detail}).")
