"""Where a number comes from: command, commit, date, seed, package versions and machine.

This module imports the standard library only, so that every result can carry it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["portable_path", "provenance", "typed"]

_PACKAGES = (
    "distributed",
    "joblib",
    "matplotlib",
    "numba",
    "numpy",
    "onnx",
    "onnxruntime",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
    "opencv-python",
    "opencv-python-headless",
    "pillow",
    "pycocotools",
    "rcnn-svm",
    "safetensors",
    "scikit-learn",
    "scipy",
    "timm",
    "torch",
    "torchvision",
)


def provenance(*, seed: int, command: str | None = None) -> dict[str, Any]:
    """Describe how the result that is about to be written was made.

    Args:
        seed: of the run.
        command: as the user can type it again; by default the running command line, with the
            interpreter written as `python`, and paths relative to the working directory or to the
            folder that the environment variable `RCNN_SVM_DATA` names.

    Returns:
        A JSON-able dictionary: `command`, `commit` (40 hexadecimal digits, `-dirty` appended where
        tracked files differ from it, `unknown` outside a repository), `date` (UTC, ISO 8601), `seed`,
        `versions` of the installed packages that matter, and `machine` (`cpu`, `cores`, `ram_gb`,
        `gpu`). The GPU is named through torch when torch is loaded already, else through `nvidia-smi`;
        torch is never loaded for it.
    """
    return {
        "command": _command_line(sys.argv) if command is None else command,
        "commit": _commit(Path(__file__).resolve()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "versions": _versions(),
        "machine": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
            "ram_gb": _ram_gb(),
            "gpu": _gpu_name(),
        },
    }


def _command_line(argv: list[str]) -> str:
    program = Path(argv[0])
    if program.name == "__main__.py":
        words = ["python", "-m", program.parent.name]
    elif program.suffix == ".py":
        words = ["python", _relative(argv[0])]
    else:
        words = [program.name]
    return " ".join([shlex.join(words), *(typed(word) for word in argv[1:])])


def portable_path(word: str) -> str:
    """Write a path into the data folder in terms of its variable, others relative where they are near."""
    data = os.environ.get("RCNN_SVM_DATA")
    if data and word and not word.startswith("-"):
        path, root = Path(word).absolute().resolve(), Path(data).resolve()
        if path.is_relative_to(root):
            return f"$RCNN_SVM_DATA/{path.relative_to(root).as_posix()}"
    return _relative(word)


def typed(word: str) -> str:
    """Return a word of a command line as somebody else can type it."""
    portable = portable_path(word)
    return f'"{portable}"' if portable.startswith("$RCNN_SVM_DATA/") else shlex.quote(portable)


def _relative(word: str) -> str:
    """Write an absolute path below or beside the working directory relative to it; keep other words."""
    if not os.path.isabs(word):
        return word
    relative = os.path.relpath(word)
    return word if relative.startswith(os.path.join("..", "..", "..")) else relative


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit(file: Path) -> str:
    """Return the commit of the repository that tracks `file`.

    A copy installed below somebody else's repository (in its .venv) is tracked by none.
    """
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return "unknown"
    commit = _git(file.parent, "rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/results")
    return commit + ("" if changes == "" else "-dirty")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_name() -> str:
    if sys.platform == "linux":
        try:
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        for line in text.splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _ram_gb() -> float:
    """Return the physical memory in units of 10^9 bytes; 0 where the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        total = 0
    return round(total / 1e9, 1)


def _gpu_name() -> str | None:
    torch = sys.modules.get("torch")
    if torch is not None:
        return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
