"""Take boxes by score, each one lowering the scores of those that overlap it. Needs numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from rcnn_svm.compiled import kernel

__all__ = ["take_apart"]


@kernel("(f8[:,::1], f8[::1], f8, f8, f8[::1], i8[::1])")
def take_apart(boxes: Any, score: Any, penalty: float, tolerated: float, left: Any, taken: Any) -> None:
    """Fill `taken` with rows in the order in which they are taken.

    Args:
        boxes: (R, 4).
        score: (R,).
        penalty: what a box equal to one that was taken loses.
        tolerated: an IoU up to this costs nothing; beyond it the loss grows linearly.
        left: (R,), a copy of `score`; lowered in place.
        taken: (T,), T <= R.
    """
    n = len(boxes)
    nearest = np.zeros(n)
    gone = np.zeros(n, np.uint8)
    for step in range(len(taken)):
        i = -1
        for j in range(n):
            if gone[j] == 0 and (i < 0 or left[j] > left[i]):
                i = j
        taken[step] = i
        gone[i] = 1
        x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        area = (x2 - x1) * (y2 - y1)
        for j in range(n):
            w = min(x2, boxes[j, 2]) - max(x1, boxes[j, 0])
            h = min(y2, boxes[j, 3]) - max(y1, boxes[j, 1])
            if w <= 0 or h <= 0:
                continue
            other = (boxes[j, 2] - boxes[j, 0]) * (boxes[j, 3] - boxes[j, 1])
            iou = w * h / (area + other - w * h)
            if iou > nearest[j]:
                nearest[j] = iou
                left[j] = score[j] - penalty * max(0.0, iou - tolerated) / (1 - tolerated)
