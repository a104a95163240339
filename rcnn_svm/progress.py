"""What a run says on its way, on stderr: its stages, and how far its long loops are.

Both speak on a terminal and off it. A loop draws a bar on a terminal; off it, where a bar would fill a log
with rubbish, it prints a line a minute, and nothing if it is done within one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from typing import TypeVar

from rcnn_svm.errors import printable

__all__ = ["Stages", "emit", "note", "printable", "say", "spell", "track"]

T = TypeVar("T")

_LINE_EVERY = 60.0
"""Seconds between two lines of a loop off a terminal."""


def say(message: str) -> None:
    """Print one line for the user on stderr, above any running progress bar.

    Where stderr is closed or takes no more, nothing is said: the work is worth more than words about it.
    """
    if sys.stderr is not None:
        tqdm = sys.modules.get("tqdm")  # where it is not loaded there is no bar
        with suppress(OSError):
            if tqdm is None:
                print(printable(message), file=sys.stderr)
            else:
                tqdm.tqdm.write(printable(message), file=sys.stderr)


def emit(line: str) -> None:
    """Print a line of a result that stands in a file too: where stdout takes no more, work goes on without.

    Its reader may have left, as `head` does, or the disk that it leads to may be full, which is said.
    """
    try:
        print(printable(line), flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            say(f"stdout: cannot be written ({error.strerror}). Nothing more is printed there.")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process


def note(message: str) -> None:
    """Print one line about the stage under way, indented below the line that announced it."""
    say(f"{'':7}  {message}")


def spell(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds, rounded down.

    Example:
        >>> spell(247.9)
        '0:04:07'
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Stages:
    """The stages of one run: each is announced when it begins, with the time that the run has taken so far.

    Attributes:
        names: of all stages.
        seconds: wall clock of each finished stage, by name.

    Args:
        names: of all stages, in the order in which they will come.
        clock: returns seconds that never fall; read now, for the start of the run.
        before: called before each stage; what it raises ends the run there.

    Example:
        >>> stages = Stages(["proposals", "features"])
        >>> with stages("proposals", "boxes that may hold an object"):
        ...     pass
        >>> list(stages.seconds)
        ['proposals']
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        clock: Callable[[], float] = time.perf_counter,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.names = tuple(names)
        self.seconds: dict[str, float] = {}
        self._clock, self._before = clock, before
        self._started = clock()

    @contextmanager
    def __call__(self, name: str, words: str) -> Iterator[None]:
        """Announce a stage and take the time of the block; one that fails has no time.

        Args:
            name: one of `names`.
            words: what is done, and with how much.
        """
        self._before()
        self._say(f"{self.names.index(name) + 1} of {len(self.names)}, {name}: {words}")
        started = self._clock()
        yield
        self.seconds[name] = self._clock() - started

    def finish(self) -> None:
        """Say that the run is done."""
        self._say("done")

    def _say(self, message: str) -> None:
        say(f"{spell(self._clock() - self._started)}  {message}")


def track(
    items: Iterable[T],
    what: str,
    *,
    total: int | None = None,
    unit: str = "img",
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[T]:
    """Yield `items` and show on stderr how far they are, and how long the rest will take at this rate.

    Args:
        items: one is done when the next is asked for.
        what: name of the loop.
        total: number of items; None where `items` know it themselves, or nobody does.
        unit: of an item, for the bar.
        clock: returns seconds that never fall; a bar on a terminal has its own.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        from tqdm import tqdm

        return iter(tqdm(items, desc=what, total=total, unit=unit, dynamic_ncols=True))
    if total is None and isinstance(items, Sized):
        total = len(items)
    return _with_lines(items, what, total, clock, clock())


def _with_lines(
    items: Iterable[T], what: str, total: int | None, clock: Callable[[], float], started: float
) -> Iterator[T]:
    due = started + _LINE_EVERY
    for done, item in enumerate(items, start=1):
        yield item
        now = clock()
        if now < due or done == total:
            continue
        due, spent = now + _LINE_EVERY, now - started
        of, left = "", ""
        if total is not None:
            of, left = f" of {total}", f", about {spell(spent / done * (total - done))} left"
        note(f"{what}: {done}{of} in {spell(spent)}{left}")
