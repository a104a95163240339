"""Wall clock and peak memory of a stage."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Meter"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Meter:
    """Measure the block it wraps.

    Attributes:
        seconds: wall clock of the block.
        peak_rss_mb: largest resident memory of the process during the block, in 10^6 bytes. Where the
            system cannot forget an earlier peak (anything but Linux), of the process so far.
    """

    seconds: float = 0.0
    peak_rss_mb: float = 0.0

    def __enter__(self) -> Self:
        if _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text("5")  # proc(5): reset the peak resident set size
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._started
        self.peak_rss_mb = _peak_rss_mb()


def _peak_rss_mb() -> float:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024 / 1e6  # kB of the kernel's are 1024 bytes
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
