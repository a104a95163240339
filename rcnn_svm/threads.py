"""Threads: how many there are, and that they sleep while they wait.

Libraries bring pools of threads of their own: OpenMP (torch, with oneDNN and MKL in it, and scikit-learn),
OpenBLAS (numpy, scipy), numba, OpenCV. Left to themselves each takes all cores, and its threads wait for each
other in loops that burn a core: beside other work they wait for longer than they work. A pool reads the
environment when its library is loaded, so the command sets it first: `wait_asleep` before numpy is loaded,
`limit` once `--jobs` is known. What the user has set stays. A program that uses the package as a library
keeps its own pools.

`in_order` divides work by images: threads that share nothing wait for nobody.

Importing this module imports the standard library only.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = [
    "allowed",
    "images_at_once",
    "in_order",
    "limit",
    "limit_torch",
    "share_of_each",
    "take_share",
    "usable_cores",
    "wait_asleep",
]

T = TypeVar("T")
R = TypeVar("R")

_BEFORE_NUMPY = {
    "OMP_WAIT_POLICY": "PASSIVE",  # every OpenMP: sleep at once
    "KMP_BLOCKTIME": "0",  # the same for those of LLVM and Intel that go by it
    "OPENBLAS_THREAD_TIMEOUT": "4",  # the logarithm of clock ticks; OpenBLAS takes no smaller one
    # Threads of one product wait for each other in a loop that no setting ends. We divide work above it.
    "OPENBLAS_NUM_THREADS": "1",
}
_COUNTS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENCV_FOR_THREADS_NUM", "VECLIB_MAXIMUM_THREADS")
_COUNTS_OF_THEIR_OWN = ("MKL_NUM_THREADS", "BLIS_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Where these are not set, OMP_NUM_THREADS counts."""

_MOST_IMAGES = 8
_allowed: int | None = None
_here = threading.local()


def wait_asleep() -> bool:
    """Make pools of libraries that are loaded from now on wait asleep.

    Returns:
        Whether that was done. In a process that has loaded numpy already the pools are somebody else's, who
        calls the command from Python: nothing is changed there.
    """
    if "numpy" in sys.modules:
        return False
    for name, value in _BEFORE_NUMPY.items():
        os.environ.setdefault(name, value)
    return True


def limit(n: int, *, asked: bool) -> None:
    """Give every pool of this process `n` threads, those of libraries to come as well.

    Call it after `wait_asleep`, before torch, scikit-learn and numba are loaded.

    Args:
        n: at least 1.
        asked: whether the user said so. Then a variable of the user's that says more is lowered to it;
            otherwise it stays as it is.
    """
    global _allowed
    _allowed = n
    cv2 = sys.modules.get("cv2")  # came with the options, as numpy did
    if cv2 is not None and (asked or "OPENCV_FOR_THREADS_NUM" not in os.environ):
        cv2.setNumThreads(min(n, cv2.getNumThreads()))
    for name in _COUNTS:
        os.environ.setdefault(name, str(n))
    if asked:
        for name in (*_COUNTS, *_COUNTS_OF_THEIR_OWN):
            theirs = os.environ.get(name, "1").split(",")[0]  # OpenMP takes one number for each level
            if not theirs.isdecimal() or int(theirs) > n:
                os.environ[name] = str(n)
        from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

        for library in ThreadpoolController().lib_controllers:
            library.set_num_threads(min(n, library.num_threads))


def limit_torch() -> None:
    """Limit torch's pool between operators too, which no variable does; in a library leave it alone."""
    import torch

    if _allowed is not None and torch.get_num_interop_threads() != _allowed:
        torch.set_num_interop_threads(_allowed)


def allowed() -> int:
    """Return how many threads `limit` gave; 1 in a library, where products are the pools' affair."""
    return _allowed or 1


def images_at_once() -> int:
    """Return how many images shall share torch's threads: one each, and eight at most: each takes memory.

    Where torch is not loaded they share those that `limit` gave.
    """
    torch = sys.modules.get("torch")
    return min(allowed() if torch is None else torch.get_num_threads(), _MOST_IMAGES)


def share_of_each(n_threads: int) -> int:
    """Return how many of torch's threads each of `n_threads` of ours gets; 1 where torch is not loaded."""
    torch = sys.modules.get("torch")
    return 1 if torch is None else max(1, torch.get_num_threads() // n_threads)


def take_share(n_torch: int) -> None:
    """Make this thread one of several: torch has `n_torch` threads in it, and its calls start no others."""
    _here.shares = True
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != n_torch:
        torch.set_num_threads(n_torch)  # counts in the thread that says it, and in those that start later


def usable_cores() -> int:
    """Return how many cores this process may use: affinity and the quota of its control group, rounded up."""
    import joblib

    return int(joblib.cpu_count())


def in_order(work: Callable[[T], R], items: Iterable[T], n_threads: int) -> Generator[R]:
    """Yield `work(item)` of each item in their order, from threads that stay at most two items each ahead.

    torch's threads are shared out among them. A single thread is the caller's own; so it is for calls from
    one of these threads. The first error ends it all.

    Args:
        work: must be safe to call in several threads.
        items: taken one by one.
        n_threads: at least 1.
    """
    if n_threads == 1 or getattr(_here, "shares", False):
        yield from map(work, items)
        return
    torch = sys.modules.get("torch")
    n_torch = torch.get_num_threads() if torch is not None else 1
    ahead: deque[Future[R]] = deque()
    upcoming = iter(items)
    with ThreadPoolExecutor(n_threads, initializer=take_share, initargs=(share_of_each(n_threads),)) as pool:
        try:
            while True:
                for item in upcoming:
                    ahead.append(pool.submit(work, item))
                    if len(ahead) == 2 * n_threads:
                        break
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
            if torch is not None:
                torch.set_num_threads(n_torch)
