"""Compiling loops: one door, the one line that says so, and machines where nothing can be kept."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rcnn_svm import compiled

PACKAGE = Path(compiled.__file__).parent
SOURCE = """
def twice(x):
    return 2 * x

def thrice(x):
    return 3 * x

def mean(x):
    total = 0.0
    for value in x:
        total += value
    return total / len(x)

def of_both(x):
    return mean(x) + mean(2 * x)
"""
NOT_KEPT = (
    "Compiling loops for this machine: once, some seconds "
    "(no writable folder for compiled code, set NUMBA_CACHE_DIR to keep it).\n"
)


@pytest.fixture
def scope(monkeypatch):
    """Functions that numba finds no place for: they stand in no file that it could cache beside."""
    monkeypatch.setattr(compiled, "_announced", False)
    names: dict[str, object] = {}
    exec(SOURCE, names)
    return names


def test_works_where_compiled_code_cannot_be_kept(capsys, scope):
    assert compiled.kernel("i8(i8)")(scope["twice"])(21) == 42
    assert compiled.kernel("i8(i8)")(scope["thrice"])(14) == 42
    assert capsys.readouterr().err == NOT_KEPT


def test_without_a_signature_it_compiles_for_what_comes_and_says_so_then(capsys, scope):
    mean = scope["mean"] = compiled.kernel(fastmath={"reassoc"})(scope["mean"])
    of_both = compiled.kernel()(scope["of_both"])
    assert capsys.readouterr().err == ""
    assert of_both(np.arange(4.0)) == 4.5  # and calls another kernel
    assert capsys.readouterr().err == NOT_KEPT
    assert mean(np.arange(3, dtype=np.float32)) == 1.0
    assert np.isnan(mean(np.zeros(0)))  # divides as numpy does
    assert capsys.readouterr().err == ""


def test_numba_has_one_door():
    doors = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "numba" for name in names):
                doors.add(path.relative_to(PACKAGE).as_posix())
    assert doors == {"compiled.py"}


@pytest.mark.slow
def test_every_kernel_works_where_compiled_code_cannot_be_kept():
    code = (
        "import numpy as np\n"
        "from numba.core.caching import CompileResultCacheImpl\n"
        "CompileResultCacheImpl._locator_classes = []\n"  # as on a machine without a writable folder
        "import rcnn_svm.heads.solver, rcnn_svm.heads.kernel_solver, rcnn_svm.proposals.spreading\n"
        "from rcnn_svm.boxes import nms\n"
        "from rcnn_svm.features.roi_pool import roi_align\n"
        "box = np.array([[0, 0, 4, 4]], np.float32)\n"
        "print(nms(box, np.ones(1), 0.5), roi_align(np.ones((5, 5, 1), np.float32), box, (1, 1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[0] [[1.]]\n"
    assert done.stderr == NOT_KEPT


@pytest.mark.slow
def test_first_start_says_so_and_the_next_one_is_silent(tmp_path):
    code = (
        "import numpy as np; from rcnn_svm.proposals import selective_search;"
        "from rcnn_svm.boxes import nms;"
        "found = selective_search(np.zeros((40, 40, 3), np.uint8));"
        "print(len(nms(found.boxes, found.priority, 0.5)))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=PACKAGE.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout == "1\n"
    assert runs[0].stderr == (
        "Compiling loops for this machine: once, some seconds (kept on disk for the next start).\n"
    )
    assert runs[1].stderr == ""
