"""Work that tests of the engine give to processes of their own: little is loaded there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rcnn_svm.errors import DataError, DiskSpaceError, ShapeError


class MeanColour:
    n_features = 3
    key = {"mean": 1}  # noqa: RUF012

    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        means = [
            image[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1].mean(axis=(0, 1)) for x1, y1, x2, y2 in boxes
        ]
        return np.array(means, np.float32).reshape(-1, 3)

    def of_image(self, image: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return lambda boxes: self(image, boxes)


def first_time(mark: Path) -> bool:
    """Whether nobody came here before, of all processes."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


# Each takes an item (i, folder), in a process of its own.


def squared(item: tuple[int, Path]) -> int:
    return item[0] ** 2


def killed_at_three(item: tuple[int, Path]) -> int:
    if item[0] in (3, 17) and first_time(item[1] / f"killed-{item[0]}"):
        os.kill(os.getpid(), signal.SIGKILL)
    return item[0] ** 2


def late_at_three(item: tuple[int, Path]) -> int:
    """Return the square, but stand still for a second first where it is the third one's."""
    if item[0] == 3 and first_time(item[1] / "late"):
        own = os.getpid()
        os.spawnlp(os.P_NOWAIT, "sh", "sh", "-c", f"sleep 1; kill -CONT {own}")
        os.kill(own, signal.SIGSTOP)
    return item[0] ** 2


def bad_at_five(item: tuple[int, Path]) -> int:
    if item[0] == 5:
        raise DataError("five.jpg: is no image. Remove it.")
    return item[0] ** 2


def misshapen_at_five(item: tuple[int, Path]) -> int:
    if item[0] == 5:
        raise ShapeError("Features: must be (R, D), got (0,).")
    return item[0] ** 2


def full_disk_of_one(item: tuple[int, Path]) -> int:
    """Return the square, but in the process that comes first of all, whose disk is full."""
    i, folder = item
    mine = folder / f"full-{os.getpid()}"
    if mine.exists() or first_time(folder / "first"):
        mine.touch()
        raise DiskSpaceError(f"{folder}: the disk is full.")
    return i**2


def mistaken(item: tuple[int, Path]) -> int:
    raise KeyError("a mistake of ours")
