"""Compiling kernels: the one line that says so, and machines where nothing can be kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rcnn_svm.proposals import compiled


def test_works_where_compiled_code_cannot_be_kept(capsys, monkeypatch):
    monkeypatch.setattr(compiled, "_announced", False)
    scope: dict[str, object] = {}
    exec(
        "def twice(x):\n    return 2 * x\n\ndef thrice(x):\n    return 3 * x\n", scope
    )  # no file to cache beside
    assert compiled.kernel("i8(i8)")(scope["twice"])(21) == 42
    assert compiled.kernel("i8(i8)")(scope["thrice"])(14) == 42
    assert capsys.readouterr().err == (
        "Compiling selective search for this machine: once, some seconds "
        "(no writable folder for compiled code, set NUMBA_CACHE_DIR to keep it).\n"
    )


@pytest.mark.slow
def test_first_start_says_so_and_the_next_one_is_silent(tmp_path):
    code = (
        "import numpy as np; from rcnn_svm.proposals import selective_search;"
        "print(len(selective_search(np.zeros((40, 40, 3), np.uint8))))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    root = Path(compiled.__file__).parents[2]
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout == "1\n"
    assert runs[0].stderr == (
        "Compiling selective search for this machine: once, some seconds (kept on disk for the next start).\n"
    )
    assert runs[1].stderr == ""
