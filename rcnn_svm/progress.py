"""Progress bars with rate and time left on a terminal; silence everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

__all__ = ["say", "track"]

T = TypeVar("T")


def track(items: Iterable[T], what: str, *, total: int | None = None, unit: str = "img") -> Iterator[T]:
    """Yield `items` while a bar named `what` shows rate and time left on stderr.

    Nothing is drawn where stderr is no terminal, so that logs stay readable.
    """
    return iter(
        tqdm(items, desc=what, total=total, unit=unit, dynamic_ncols=True, disable=not sys.stderr.isatty())
    )


def say(message: str) -> None:
    """Print one line for the user on stderr, above any running progress bar."""
    tqdm.write(message, file=sys.stderr)
