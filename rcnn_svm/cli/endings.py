"""How a command ends: with an exit code and, unless all went well, one sentence on stderr.

| what ends it | exit code |
|---|--:|
| it is done | 0 |
| an error of ours | 2 usage, 3 data |
| the system has no memory, files, disk space or permission for it | 3 |
| Ctrl-C, SIGTERM, SIGHUP | 130, 143, 129 |
| the reader of its output has left, as `head` does | 141 |

Whatever else there is to catch is a mistake in this package and keeps its traceback.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import re
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from rcnn_svm.errors import RcnnSvmError, printable
from rcnn_svm.memory import asked_for, free_memory, gigabytes

__all__ = ["Ending", "Stopped"]

_NO_MEMORY = re.compile(
    "alloc.*memory|(insufficient|out of) memory|bad.?alloc|start new thread|failed to map|"
    "failed to load glyph|error return without exception set",
    re.IGNORECASE,
)
"""What torch, OpenCV and Python say with errors of other kinds where there is no memory."""


_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """The system, or somebody, asked this process to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Ending:
    """Runs a command inside a `with` block and settles how it ends.

    SIGTERM and SIGHUP end the block as Ctrl-C does, so that temporary files are removed. Signals that are
    ignored, as under `nohup`, stay so. Both outputs exist inside the block, though the caller may have closed
    them.

    Attributes:
        code: the exit code, once the block is done.
        resumes: whether finished work is kept, and the same command goes on from there.

    Args:
        last: the process ends after the block: once it is stopped, a second signal ends it at once.
    """

    def __init__(self, *, last: bool = False) -> None:
        self.code = 0
        self.resumes = False
        self._last = last
        self._handlers: dict[int, Any] = {}
        self._unraisable = sys.unraisablehook
        self._over = False

    def __enter__(self) -> Self:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed: the next file that is opened would take its place
                setattr(sys, name, open(os.devnull, "w"))
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.getsignal(number) for number in _STOPPING}
            for number in (signal.SIGTERM, signal.SIGHUP):
                if self._handlers[number] == signal.SIG_DFL:
                    signal.signal(number, _stop)
            sys.unraisablehook = self._raised_in_vain
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._over = True
        sys.unraisablehook = self._unraisable
        stopped = isinstance(error, KeyboardInterrupt | Stopped)
        for number, handler in self._handlers.items():
            at_once = stopped and self._last and handler != signal.SIG_IGN
            signal.signal(number, signal.SIG_DFL if at_once else handler)
        unwritten = _flushed()
        if isinstance(error, SystemExit):  # of the parser, which has said what there is to say
            return False
        if error is None or isinstance(error, OSError):
            error = unwritten or error
        if error is None:
            return True
        told = self._told(error)
        if told is None:
            return False
        self.code, sentence = told
        if sentence:
            with contextlib.suppress(OSError):  # there is nobody to tell
                print(f"rcnn-svm: {sentence}", file=sys.stderr, flush=True)
        return True

    def _raised_in_vain(self, lost: Any) -> None:
        """Send a signal again that came while Python could not stop, as in the midst of freeing an object."""
        number = lost.exc_value.number if isinstance(lost.exc_value, Stopped) else signal.SIGINT
        if isinstance(lost.exc_value, Stopped | KeyboardInterrupt):
            # A thread by its bare name: starting one of `threading` waits, and this may be lost in the wait.
            _thread.start_new_thread(self._send_again, (number,))
        else:
            self._unraisable(lost)

    def _send_again(self, number: int) -> None:
        """Send a signal until it arrives: not at once, which is still that moment, then every second."""
        pause = 0.05
        while not self._over:
            time.sleep(pause)
            if not self._over:
                os.kill(os.getpid(), number)
            pause = 1.0

    def _told(self, error: BaseException) -> tuple[int, str] | None:
        """Return exit code and sentence of an error; None for a mistake of ours."""
        kept = " Finished work is kept: the same command goes on from there." if self.resumes else ""
        if isinstance(error, RcnnSvmError):
            return error.exit_code, str(error)
        if isinstance(error, KeyboardInterrupt):
            return 128 + signal.SIGINT, f"interrupted.{kept}"
        if isinstance(error, Stopped):
            return 128 + error.number, f"stopped by {signal.Signals(error.number).name}.{kept}"
        if _is_out_of_memory(error):
            return (
                3,
                f"{_shortage(error)} Take fewer --jobs or smaller images, or set proposals.max_width.{kept}",
            )
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE, ""
        if isinstance(error, OSError):
            where = "the output" if error.filename is None else str(error.filename)
            advice = " Allow more open files with `ulimit -n`." if error.errno == errno.EMFILE else ""
            return 3, printable(f"{where}: cannot be used ({error.strerror or error}).{advice}{kept}")
        return None


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _flushed() -> OSError | None:
    """Write out what was printed; return what prevents it, after which nothing more is tried."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python would try again when it ends, and complain.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def _shortage(error: BaseException) -> str:
    """Say how much memory was asked for, as far as that is known, and how much is free."""
    try:
        asked, free = asked_for(str(error)), free_memory(str(error))
        if asked is not None and free is not None:
            return f"needs {gigabytes(asked)} of memory at once, {gigabytes(free)} are free."
        if asked is not None:
            return f"needs {gigabytes(asked)} of memory at once."
        if free is not None:
            return f"needs more memory than the {gigabytes(free)} that are free."
    except MemoryError:  # there is none to look
        pass
    return "needs more memory than there is."


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's errors are RuntimeErrors, OpenCV's are its own, and libraries may be loaded as late as now.
    named = isinstance(error, RuntimeError | ImportError | SystemError) or type(error).__module__ == "cv2"
    try:
        return isinstance(error, MemoryError) or (named and _NO_MEMORY.search(str(error)) is not None)
    except MemoryError:  # there is none to look at the words
        return True
