"""Whatever ends a command, it ends with one sentence and the right exit code."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from rcnn_svm import cli
from rcnn_svm.cli import endings, main
from rcnn_svm.errors import ConfigError, DataError


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], int]:
    """Run the command with a function in place of its verb, and return the exit code."""

    def call(work: Callable[[], None]) -> int:
        def parse(given: list[str]) -> argparse.Namespace:
            return argparse.Namespace(run=lambda options: work(), resumes=True, jobs=0)

        parser = argparse.ArgumentParser()
        monkeypatch.setattr(parser, "parse_args", parse)
        monkeypatch.setattr(cli, "build_parser", lambda: parser)
        return main(["verb"])

    return call


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


KEPT = " Finished work is kept: the same command goes on from there."
MEMORY = "needs more memory than the "


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("a: must be b."), 2, "a: must be b."),
        (DataError("a:\n  must be \x1b[31mb"), 3, "a: must be \\x1b[31mb"),
        (KeyboardInterrupt(), 130, f"interrupted.{KEPT}"),
        (MemoryError(), 3, MEMORY),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 3100000000 bytes"
            ),
            3,
            "needs 3.1 GB of memory at once, ",
        ),
        (RuntimeError("can't start new thread"), 3, MEMORY),
        (ImportError("x.so: failed to map segment from shared object"), 3, MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 3, MEMORY),
        (OSError(errno.EMFILE, "Too many open files", "f.npy"), 3, "f.npy: cannot be used (Too many open"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "the output: cannot be used (No space left"),
    ],
)
def test_an_error_is_one_sentence(
    ended: Callable[..., int],
    error: BaseException,
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(raising(error)) == code
    said = capsys.readouterr().err
    assert said.startswith(f"rcnn-svm: {words}")
    assert said.count("\n") == 1


def test_libraries_say_how_much_memory_they_wanted(
    ended: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for work in (lambda: torch.empty(1 << 58), lambda: np.empty(1 << 60, np.uint8), lambda: cv2_of(1 << 60)):
        assert ended(work) == 3
        said = capsys.readouterr().err
        assert re.fullmatch(
            r"rcnn-svm: needs 115292150\d\.\d GB of memory at once, \d+(\.\d)? [GM]B are free\. Take .*\n",
            said,
        ), said


def cv2_of(n_bytes: int) -> None:
    """Raise what OpenCV raises; one cannot ask it for so much from Python."""
    raise cv2.error(
        "OpenCV(5.0.0) alloc.cpp:73: error: (-4:Insufficient memory) "
        f"Failed to allocate {n_bytes} bytes in function 'OutOfMemoryError'"
    )


def test_where_there_is_no_memory_to_look_the_sentence_goes_without_figures(
    ended: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(message: str) -> int:
        raise MemoryError

    monkeypatch.setattr(endings, "free_memory", none)
    assert ended(raising(MemoryError())) == 3
    assert capsys.readouterr().err.startswith("rcnn-svm: needs more memory than there is. Take ")


def test_a_mistake_of_ours_keeps_its_traceback(ended: Callable[..., int]) -> None:
    for error in (RuntimeError("x"), KeyError("x"), TypeError("x")):
        with pytest.raises(type(error)):
            ended(raising(error))


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_are_one_sentence_and_handlers_are_put_back(
    ended: Callable[..., int], name: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert ended(lambda: os.kill(os.getpid(), number)) == code
        assert capsys.readouterr().err == f"rcnn-svm: stopped by {name}.{KEPT}\n"
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_ignored(ended: Callable[..., int]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ended(lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


class _Refusing(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def flush(self) -> None:
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 141), (errno.ENOSPC, 3)])
def test_output_that_cannot_be_written_is_no_success(
    ended: Callable[..., int],
    number: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", _Refusing(number))
    assert ended(lambda: print("x")) == code
    assert bool(capsys.readouterr().err) == (code == 3)


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line in which `$R` is the command."""
    environment = {**os.environ, "R": f"{sys.executable} -m rcnn_svm"}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, text=True, capture_output=True, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "n_lines"),
    [
        ("$R presets > /dev/full", 3, 1),
        ("$R presets >&-", 0, 0),
        ("$R presets | true; exit ${PIPESTATUS[0]}", 141, 0),
        ("$R layers vgg17 2>&-", 2, 0),
        ("$R layers vgg17 2> /dev/full", 2, 0),
    ],
)
def test_streams_that_are_closed_or_full(tmp_path: Path, line: str, code: int, n_lines: int) -> None:
    done = shell(line, tmp_path)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == n_lines


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("delay", [0.0, 0.4])
def test_signals_while_the_command_starts(number: int, code: int, delay: float) -> None:
    script = (
        "import sys, rcnn_svm.cli as cli; sys.argv = ['rcnn-svm', 'bench'];"
        "print('ready', flush=True); sys.exit(cli.main())"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM)],
    )
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.05 + delay)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code, errors
    assert len(errors.splitlines()) == 1


def test_a_signal_that_comes_while_an_object_is_freed_is_not_lost() -> None:
    """What is raised there is lost: Python prints it and goes on."""
    script = (
        "import os, signal, sys, time, weakref\n"
        "from rcnn_svm.cli.endings import Ending\n"
        "class Thing: pass\n"
        "with Ending() as ending:\n"
        "    thing = Thing()\n"
        "    ref = weakref.ref(thing, lambda _: (os.kill(os.getpid(), signal.SIGTERM), sum(range(10**5))))\n"
        "    del thing\n"
        "    time.sleep(5)\n"
        "    print('not stopped')\n"
        "sys.exit(ending.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 143, done.stderr
    assert done.stderr == "rcnn-svm: stopped by SIGTERM.\n"
    assert done.stdout == ""
