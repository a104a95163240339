"""What a campaign tried and what it found, and children in which things may go wrong."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Defect", "Finished", "Tally", "fault_in", "forked", "is_one_sentence", "within"]


@dataclass(frozen=True)
class Defect:
    """Something that must not happen.

    Attributes:
        where: reader, verb or fault.
        what: its kind, such as `traceback`, and the place in our code where there is one.
        seed: with which it comes again.
        detail: the last words of the program.
        example: the smallest input that was met.
    """

    where: str
    what: str
    seed: str
    detail: str
    example: bytes = b""

    def to_json(self) -> dict[str, Any]:
        shown = self.example[:400]
        return {
            "where": self.where,
            "what": self.what,
            "seed": self.seed,
            "detail": self.detail[:500],
            "example_bytes": len(self.example),
            "example": base64.b64encode(shown).decode(),
        }


@dataclass
class Tally:
    """Counts of outcomes by what was tried, and one defect of each kind, the one with the smallest input."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    defects: dict[tuple[str, str], Defect] = field(default_factory=dict)
    times: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, where: str, outcome: str, defect: Defect | None = None) -> None:
        self.counts.setdefault(where, Counter())[outcome if defect is None else "defect"] += 1
        if defect is not None:
            key = defect.where, defect.what
            self.times[key] += 1
            known = self.defects.get(key)
            if known is None or len(defect.example) < len(known.example):
                self.defects[key] = defect

    @property
    def n(self) -> int:
        return sum(sum(counts.values()) for counts in self.counts.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "tried": self.n,
            "outcomes": {where: dict(sorted(c.items())) for where, c in sorted(self.counts.items())},
            "defects": [{**d.to_json(), "times": self.times[key]} for key, d in sorted(self.defects.items())],
        }

    def summary(self) -> str:
        """Return what was found, for the message of a test that fails."""
        lines = [f"{d.where}: {d.what} (seed {d.seed}): {d.detail[-300:]}" for d in self.defects.values()]
        return "\n".join(lines)


def is_one_sentence(text: str) -> bool:
    """Tell whether a message is one printable line that somebody can read."""
    return 0 < len(text) < 5000 and text.isprintable()


def fault_in(error: BaseException) -> str:
    """Return the kind of an exception and the last place in our code that it went through."""
    places = [
        f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if "rcnn_svm" in Path(frame.filename).parts
    ]
    return f"{type(error).__name__} in {places[-1] if places else 'no code of ours'}"


@dataclass(frozen=True)
class Finished:
    """How a child ended: `code` as a shell tells it (137 for `kill -9`), and what it printed."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def sentences(self) -> list[str]:
        """The lines of stderr that speak of the end."""
        return [line for line in self.err.splitlines() if line.startswith("rcnn-svm: ")]

    def faults(self, *codes: int) -> str:
        """Return what is wrong with an end that should have one of these codes; empty where nothing is."""
        if self.code not in codes:
            return f"exit code {self.code}, not {' or '.join(map(str, codes))}"
        if "Traceback" in self.err or "Exception ignored" in self.err:
            return "traceback"
        if self.code in (2, 3, 129, 130, 143) and len(self.sentences) != 1:
            return f"{len(self.sentences)} sentences"
        if any(not is_one_sentence(line) for line in self.sentences):
            return "a sentence that is no printable line"
        return ""


@contextlib.contextmanager
def within(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def forked(
    work: Callable[[], int],
    folder: Path,
    *,
    limit_s: float = 60.0,
    meanwhile: Iterable[tuple[float, int]] = (),
) -> Finished:
    """Run `work` in a child that shares all that is imported here, and wait for its end.

    Args:
        work: returns the exit code.
        folder: where it runs; its outputs go to files beside it.
        limit_s: after which it is killed, and its code is -1.
        meanwhile: (seconds, signal) to be sent, in order.
    """
    out, err = (folder.parent / f"{folder.name}.{name}" for name in ("out", "err"))
    for path in (out, err):  # of the child before: this one may end before it has its own
        path.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.chdir(folder)
            for path, number in ((out, 1), (err, 2)):
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(handle, number)
                os.close(handle)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(
                    number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                )
            code = work()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            code = 1
            with contextlib.suppress(OSError, ValueError):
                traceback.print_exc(file=sys.stderr)
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    code = _wait(pid, started, limit_s, list(meanwhile))
    texts = [path.read_text(errors="replace") if path.exists() else "" for path in (out, err)]
    return Finished(code, *texts, time.monotonic() - started)


def _wait(pid: int, started: float, limit_s: float, signals: list[tuple[float, int]]) -> int:
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code
        spent = time.monotonic() - started
        if signals and spent >= signals[0][0]:
            os.kill(pid, signals.pop(0)[1])
        if spent > limit_s:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -1
        time.sleep(0.002)
