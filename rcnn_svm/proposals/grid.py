"""A regular grid of boxes: what proposals cost nothing and must be beaten by. Needs numpy only."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.config import Count, check
from rcnn_svm.errors import ConfigError
from rcnn_svm.structures import Image, RegionSet

__all__ = ["GridConfig", "dense_grid"]

_ASPECTS = (0.5, 1.0, 2.0)  # width / height
_COARSEST_STEP = 64.0  # box sides between neighbours: every pyramid is down to one box a level
_FINEST_STEP = 1 / 512


@dataclass(frozen=True)
class GridConfig:
    """Settings of `dense_grid`.

    Attributes:
        n_boxes: at most so many boxes an image.
        smallest: side of the smallest square, in pixels.
    """

    n_boxes: Count = 2000
    smallest: Count = 32

    def __post_init__(self) -> None:
        check(self, where="GridConfig")

    def key(self) -> dict[str, Any]:
        """Return all that the boxes of an image depend on, as JSON-able values."""
        return {"proposer": "grid", "version": 1, **dataclasses.asdict(self)}

    def propose(self, image: Image) -> RegionSet:
        """Run `dense_grid` on the image's size."""
        height, width = image.shape[:2]
        return dense_grid((height, width), self.n_boxes, smallest=self.smallest)


def dense_grid(size: tuple[int, int], n_boxes: int, *, smallest: int = 32, image_id: str = "") -> RegionSet:
    """Cover an image with sliding windows, large ones first.

    Windows have areas of `smallest` squared times a power of two up to the image's, and aspect
    ratios 1:2, 1:1 and 2:1. Their step, the same fraction of the side everywhere, is the finest
    that gives at most `n_boxes` boxes; the whole image comes first.

    Args:
        size: (height, width) of the image.
        n_boxes: at least 1.
        smallest: side in pixels.
        image_id: carried into the result.

    Raises:
        ConfigError: a number is below 1.
    """
    GridConfig(n_boxes, smallest)
    if min(size) < 1:
        raise ConfigError(f"dense_grid({image_id!r}): size must be at least 1 x 1, got {size}.")
    coarse, fine = _COARSEST_STEP, _FINEST_STEP
    for _ in range(24):
        middle = (coarse * fine) ** 0.5
        if sum(len(xs) * len(ys) for xs, ys in _windows(size, middle, smallest)) < n_boxes:
            coarse = middle
        else:
            fine = middle
    height, width = size
    rows = [np.array([[0, 0, width, height]])]
    for xs, ys in _windows(size, coarse, smallest):
        y, x = np.meshgrid(np.arange(len(ys)), np.arange(len(xs)), indexing="ij")
        rows.append(
            np.concatenate([xs[x.ravel(), :1], ys[y.ravel(), :1], xs[x.ravel(), 1:], ys[y.ravel(), 1:]], 1)
        )
    boxes = np.concatenate(rows)
    _, first = np.unique(boxes, axis=0, return_index=True)
    boxes = boxes[np.sort(first)][:n_boxes]
    return RegionSet(image_id, size, boxes.astype(np.float32), np.arange(len(boxes), dtype=np.float32))


def _windows(
    size: tuple[int, int], step: float, smallest: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return for each window shape its (start, end) columns and rows, largest area first."""
    height, width = size
    n_levels = max(1, int(np.log2(max(height * width / smallest**2, 1))) + 1)
    shapes = []
    for level, aspect in itertools.product(range(n_levels - 1, -1, -1), _ASPECTS):
        area = float(smallest**2 * 2**level)
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 1 <= w <= width and 1 <= h <= height:
            shapes.append((_spans(width, w, step), _spans(height, h, step)))
    return shapes


def _spans(length: int, side: int, step: float) -> NDArray[np.int64]:
    """Spread windows of `side` evenly over `length`, at most `step` sides apart."""
    n = 1 + round((length - side) / (step * side))
    starts = np.rint(np.linspace(0, length - side, n) if n > 1 else [(length - side) / 2]).astype(np.int64)
    starts = np.unique(starts)
    return np.stack([starts, starts + side], axis=1)
