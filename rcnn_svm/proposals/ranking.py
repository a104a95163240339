"""A better order than the paper's: cheap cues of an object, then boxes that differ from those before.

The paper's order says nothing about shape, and puts many near-copies of a box side by side. Here a
linear score of what the groupings know about a box anyway (when it was made, how often, how large,
where) comes first; then boxes are taken one by one, each time the one whose score, less a penalty
for its overlap with the boxes taken, is largest. The weights were fitted on the training split of
voc2007-mini by `benchmarks/proposals.py rank`, which also measures the gain.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CUES", "PENALTY", "TOLERATED_IOU", "WEIGHTS", "cues", "diverse_order"]

CUES = (
    "log best position",
    "mean log position",
    "log copies",
    "log area",
    "log area squared",
    "log aspect",
    "log aspect squared",
    "offset x squared",
    "offset y",
    "offset y squared",
    "touches left or right",
    "touches top",
    "touches bottom",
    "width",
    "width squared",
    "height",
    "height squared",
)
"""Position: 1 for the last merge of a grouping. Copies: groupings that made the box. Areas and
sides are fractions of the image; offsets are from its centre, in image sides."""

# fmt: off
WEIGHTS = np.array([
    -0.057, -0.315, 0.206, 0.369, -0.047, -0.163, -0.397, -1.203, 1.412,
    -11.179, -0.57, -0.708, 0.193, 0.445, 0.616, 2.993, -2.256,
])
# fmt: on
"""Log-odds of an overlap above 0.6 with an object, per unit of each cue."""

PENALTY = 4.0
TOLERATED_IOU = 0.4
"""A box loses `PENALTY * (IoU - TOLERATED_IOU) / (1 - TOLERATED_IOU)`, IoU being its largest with
a box that was taken before it, where that is above the tolerated one."""

_MAX_TAKEN = 2000  # boxes behind these keep the order that their penalised scores have by then


def cues(
    boxes: NDArray[np.int32], order: NDArray[np.float64], first: NDArray[np.int64], size: tuple[int, int]
) -> NDArray[np.float64]:
    """Return (R, 17), the `CUES` of each distinct box.

    Args:
        boxes: (M, 4) of all groupings, copies included.
        order: (M,) their positions, 1 = merged last.
        first: (R,) a row of each distinct box.
        size: (height, width) of the image.
    """
    height, width = size
    key = (boxes[:, 0].astype(np.int64) * (height + 1) + boxes[:, 1]) * (width + 1) + boxes[:, 2]
    tail = boxes[:, 3].astype(np.int64)
    sorted_rows = np.lexsort((tail, key))
    fresh = np.ones(len(boxes), bool)
    a, b = sorted_rows[1:], sorted_rows[:-1]
    fresh[1:] = (key[a] != key[b]) | (tail[a] != tail[b])
    label = np.empty(len(boxes), np.int64)
    label[sorted_rows] = np.cumsum(fresh) - 1
    row_of = np.empty(int(fresh.sum()), np.int64)
    row_of[label[first]] = np.arange(len(first))
    row = row_of[label]  # the distinct box of each row
    log_order = np.log(order)
    best = np.full(len(first), np.inf)
    np.minimum.at(best, row, log_order)
    copies = np.bincount(row, minlength=len(first))
    mean = np.bincount(row, log_order, minlength=len(first)) / copies
    x1, y1, x2, y2 = boxes[first].T.astype(np.float64)
    w, h = (x2 - x1) / width, (y2 - y1) / height
    area, aspect = np.log(w * h), np.log((x2 - x1) / (y2 - y1))
    dx, dy = (x1 + x2) / (2 * width) - 0.5, (y1 + y2) / (2 * height) - 0.5
    sides = (x1 == 0) * 1.0 + (x2 == width)
    columns = [best, mean, np.log(copies), area, area**2, aspect, aspect**2, dx**2, dy, dy**2]
    columns += [sides, (y1 == 0) * 1.0, (y2 == height) * 1.0, w, w**2, h, h**2]
    return np.stack(columns, axis=1)


def diverse_order(
    boxes: NDArray[np.int32], score: NDArray[Any], n_taken: int = _MAX_TAKEN
) -> NDArray[np.int64]:
    """Return the rows of `boxes` (R, 4), best first: high scores, few near-copies.

    Args:
        boxes: distinct boxes.
        score: (R,), larger is better; among equals the lower row goes first.
        n_taken: so many are taken one by one; the rest follow by penalised score.
    """
    from rcnn_svm.proposals.spreading import take_apart

    taken = np.empty(min(n_taken, len(boxes)), np.int64)
    left = np.array(score, np.float64)
    take_apart(boxes.astype(np.float64), np.array(score, np.float64), PENALTY, TOLERATED_IOU, left, taken)
    rest = np.ones(len(boxes), bool)
    rest[taken] = False
    others = np.flatnonzero(rest)
    return np.concatenate([taken, others[np.argsort(-left[others], kind="stable")]])
