"""Box geometry on plain arrays.

A box is `x1 y1 x2 y2` in half-open pixels: x to the right, y down, pixel columns
`x1 .. x2 - 1` are inside, so that width is `x2 - x1` with no `+ 1` anywhere. Readers convert
at the border (Pascal VOC's 1-based inclusive `xmin` loses 1, `xmax` stays). Boxes are stored
as float32 and compared in float64. This module needs numpy; numba is loaded by the first suppression.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rcnn_svm.errors import ShapeError

__all__ = [
    "MIRRORED_DELTAS",
    "Boxes",
    "area",
    "as_boxes",
    "clip",
    "decode_deltas",
    "draw_to_regions",
    "encode_deltas",
    "flip_horizontally",
    "iou",
    "is_number",
    "nms",
    "plain_boxes",
    "round_half_away",
    "soft_nms",
    "vote_boxes",
    "widen",
]

Boxes: TypeAlias = NDArray[np.float32]
"""float32 (N, 4), half-open pixels `x1 y1 x2 y2`."""

_NEAR_REGION, _REGION_SOFTNESS = 0.5, 0.05
"""IoU from which on a region draws a box, and the difference of IoU that is worth a factor of e."""

# exp(4) = 55 times the proposal's side: far beyond any useful regression, short of overflow.
_MAX_LOG_SCALE = 4.0


def as_boxes(value: ArrayLike, *, where: str = "boxes") -> Boxes:
    """Return `value` as finite float32 (N, 4); an empty input becomes (0, 4).

    Raises:
        ShapeError: wrong shape, or a coordinate that is NaN or infinite.
    """
    boxes = np.asarray(value, dtype=np.float32)
    if boxes.size == 0:
        return np.zeros((0, 4), np.float32)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ShapeError(f"{where}: boxes must have shape (N, 4), got {boxes.shape}.")
    bad = np.flatnonzero(~np.isfinite(boxes).all(axis=1))
    if len(bad):
        raise ShapeError(f"{where}: boxes must be finite, got {len(bad)} bad rows (first: row {bad[0]}).")
    return boxes


def plain_boxes(value: Any, *, where: str = "boxes") -> Boxes:
    """Return boxes that a JSON holds: lists of four numbers, neither texts nor bools, of no negative side.

    Raises:
        ShapeError: it is none, or a number is not finite in float32.
    """
    rows: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(row, list) and len(row) == 4 and all(map(is_number, row)) for row in rows):
        raise ShapeError(f"{where}: boxes must be lists of four numbers x1 y1 x2 y2.")
    try:
        with np.errstate(over="ignore"):
            boxes = as_boxes(rows, where=where)
    except OverflowError as error:  # a whole number of hundreds of digits
        raise ShapeError(f"{where}: boxes must be finite.") from error
    if (boxes[:, 2:] < boxes[:, :2]).any():
        row = int(np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(axis=1))[0])
        raise ShapeError(f"{where}: boxes must have x1 <= x2 and y1 <= y2, got {boxes[row]} in row {row}.")
    return boxes


def is_number(value: object) -> bool:
    """Tell whether a value of a JSON is a number, which `true` is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def area(boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return (N,) float64 areas in square pixels; a box of negative side has area 0."""
    sides = np.maximum(boxes[:, 2:].astype(np.float64) - boxes[:, :2], 0)
    return sides[:, 0] * sides[:, 1]


def iou(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Intersection over union of every box of `first` with every box of `second`.

    Args:
        first: (N, 4) boxes.
        second: (M, 4) boxes.

    Returns:
        (N, M) float64 in [0, 1]; 0 where both boxes have no area.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    # One axis at a time: two (N, M) temporaries are much faster than (N, M, 2) ones.
    width = np.minimum(a[:, None, 2], b[:, 2]) - np.maximum(a[:, None, 0], b[:, 0])
    height = np.minimum(a[:, None, 3], b[:, 3]) - np.maximum(a[:, None, 1], b[:, 1])
    intersection = np.maximum(width, 0) * np.maximum(height, 0)  # (N, M)
    union = area(a)[:, None] + area(b) - intersection
    overlaps: NDArray[np.float64] = np.zeros_like(union)
    np.divide(intersection, union, out=overlaps, where=union > 0)
    return overlaps


def clip(boxes: NDArray[np.floating], size: tuple[int, int]) -> Boxes:
    """Clip boxes to an image of `size` (height, width); a box outside loses its area."""
    height, width = size
    limit = np.array([width, height, width, height], np.float32)
    clipped: Boxes = np.minimum(np.maximum(boxes, 0), limit).astype(np.float32)
    return clipped


def flip_horizontally(boxes: NDArray[np.floating], width: float) -> Boxes:
    """Mirror boxes in an image `width` pixels wide (an involution)."""
    flipped = np.array(boxes, np.float32)
    flipped[:, 0], flipped[:, 2] = width - boxes[:, 2], width - boxes[:, 0]
    return flipped


def widen(boxes: NDArray[np.floating], factor: float) -> Boxes:
    """Scale boxes about their centres by `factor`; the result is not clipped."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) * (factor / 2)
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


MIRRORED_DELTAS = np.array([-1, 1, 1, 1], np.float32)
"""What (dx, dy, dw, dh) are multiplied by when the image is mirrored."""


def round_half_away(values: ArrayLike) -> NDArray[np.int64]:
    """Round to the nearest integer, halves away from zero, as MATLAB and C `round` do."""
    array = np.asarray(values, np.float64)
    return (np.sign(array) * np.floor(np.abs(array) + 0.5)).astype(np.int64)


def encode_deltas(proposals: NDArray[np.floating], targets: NDArray[np.floating]) -> NDArray[np.float64]:
    """Express `targets` relative to `proposals`: the inverse of `decode_deltas`.

    Columns are (Gx - Px) / Pw, (Gy - Py) / Ph, log(Gw / Pw), log(Gh / Ph) with box centres.

    Args:
        proposals: (N, 4) boxes of positive area.
        targets: (N, 4) boxes of positive area.

    Raises:
        ShapeError: the two differ in length, or a box has no area.

    References:
        Girshick et al., arXiv 1311.2524v5, appendix C.
    """
    if proposals.shape != targets.shape:
        raise ShapeError(
            f"encode_deltas: proposals {proposals.shape} and targets {targets.shape} must be alike."
        )
    if (area(proposals) <= 0).any() or (area(targets) <= 0).any():
        raise ShapeError("encode_deltas: every box must have a positive area.")
    p, g = proposals.astype(np.float64), targets.astype(np.float64)
    p_side, g_side = p[:, 2:] - p[:, :2], g[:, 2:] - g[:, :2]
    shift = (g[:, :2] + g[:, 2:] - p[:, :2] - p[:, 2:]) / (2 * p_side)
    return np.concatenate([shift, np.log(g_side / p_side)], axis=1)


def decode_deltas(boxes: NDArray[np.floating], deltas: NDArray[np.floating]) -> Boxes:
    """Move and scale `boxes` by `deltas` (N, 4): the inverse of `encode_deltas`.

    The two log-scales are limited to +-4, a factor of 55, against overflow.
    """
    b, d = boxes.astype(np.float64), deltas.astype(np.float64)
    side = b[:, 2:] - b[:, :2]
    centre = (b[:, :2] + b[:, 2:]) / 2 + d[:, :2] * side
    half = side / 2 * np.exp(np.clip(d[:, 2:], -_MAX_LOG_SCALE, _MAX_LOG_SCALE))
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


def nms(
    boxes: NDArray[np.floating],
    scores: NDArray[np.floating],
    max_iou: float,
    *,
    labels: NDArray[np.integer] | None = None,
    limit: int | None = None,
) -> NDArray[np.int64]:
    """Greedy non-maximum suppression: keep a box unless a better kept one overlaps it too much.

    Args:
        boxes: (N, 4).
        scores: (N,), larger is better, no NaN.
        max_iou: in [0, 1]; a box is dropped when its IoU with a kept box is > `max_iou`.
        labels: (N,), 0 or more: only boxes of one label are rivals. None for one label.
        limit: at most so many are kept, the best of all labels; None for all.

    Returns:
        (M,) indices into `boxes` by falling score; ties keep input order. Empty gives (0,).

    Raises:
        ShapeError: boxes, scores and labels differ in length, or a score is NaN.

    References:
        rbgirshick/rcnn, nms/nms.m: survivors have IoU <= threshold.
    """
    own = _labels_of_rivals("nms", boxes, scores, labels)
    if np.isnan(scores).any():
        raise ShapeError("nms: scores must not be NaN.")
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    n = len(boxes) if limit is None else min(limit, len(boxes))
    survivors = _compiled(_suppress)(np.asarray(boxes, np.float64)[order], own[order], float(max_iou), n)
    kept: NDArray[np.int64] = order[survivors]
    return kept


def soft_nms(
    boxes: NDArray[np.floating],
    scores: NDArray[np.floating],
    sigma: float,
    *,
    labels: NDArray[np.integer] | None = None,
    limit: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Gaussian soft-NMS: every box is kept, and decayed by exp(-IoU^2 / sigma) of each better one.

    Args:
        boxes: (N, 4).
        scores: (N,) non-negative, such as probabilities; no NaN.
        sigma: > 0; the smaller, the harder rivals are hit.
        labels: (N,), 0 or more: only boxes of one label are rivals. None for one label.
        limit: at most so many are returned, the best of all labels; None for all.

    Returns:
        (M,) indices into `boxes` in the order in which they were the best left, ties in input order, and
        their decayed scores, which fall.

    Raises:
        ShapeError: boxes, scores and labels differ in length, or a score is NaN or negative.

    References:
        Bodla et al., arXiv 1704.04503.
    """
    own = _labels_of_rivals("soft_nms", boxes, scores, labels)
    if not (np.asarray(scores) >= 0).all():
        raise ShapeError("soft_nms: scores must not be NaN or negative.")
    rows = np.argsort(own, kind="stable")  # label by label
    starts = np.concatenate([[0], np.flatnonzero(np.diff(own[rows])) + 1, [len(rows)]])
    n = len(boxes) if limit is None else min(limit, len(boxes))
    order: NDArray[np.int64] = np.empty(n, np.int64)
    decayed: NDArray[np.float64] = np.empty(n)
    columns = np.asarray(boxes, np.float64)[rows].T.copy()
    _compiled(_decay)(
        columns, np.asarray(scores, np.float64)[rows], rows, starts, float(sigma), order, decayed
    )
    return order, decayed


def _labels_of_rivals(
    where: str,
    boxes: NDArray[np.floating],
    scores: NDArray[np.floating],
    labels: NDArray[np.integer] | None,
) -> NDArray[np.int64]:
    if len(boxes) != len(scores):
        raise ShapeError(
            f"{where}: boxes and scores must be alike in length, got {len(boxes)} and {len(scores)}."
        )
    if labels is not None and len(boxes) != len(labels):
        raise ShapeError(
            f"{where}: boxes and labels must be alike in length, got {len(boxes)} and {len(labels)}."
        )
    return np.zeros(len(boxes), np.int64) if labels is None else np.asarray(labels, np.int64)


def vote_boxes(
    kept: NDArray[np.floating],
    boxes: NDArray[np.floating],
    weights: NDArray[np.floating],
    min_iou: float,
) -> Boxes:
    """Replace each kept box by the weighted mean of the candidates that overlap it.

    Args:
        kept: (M, 4) survivors of NMS, each of which is one of `boxes`.
        boxes: (N, 4) all candidates of the class in the image.
        weights: (N,) non-negative.
        min_iou: a candidate votes when its IoU with the kept box is >= `min_iou`.

    Returns:
        (M, 4); a kept box whose voters have no weight stays as it is.

    Raises:
        ShapeError: boxes and weights differ in length.

    References:
        Gidaris and Komodakis, arXiv 1505.01749, section 5.
    """
    kept, boxes = np.asarray(kept, np.float64), np.asarray(boxes, np.float64)
    if len(boxes) != len(weights):
        raise ShapeError(
            f"vote_boxes: boxes and weights must be alike in length, got {len(boxes)} and {len(weights)}."
        )
    voted: NDArray[np.float64] = _compiled(_vote)(
        kept, boxes, np.asarray(weights, np.float64), float(min_iou)
    )
    return voted.astype(np.float32)


def draw_to_regions(boxes: NDArray[np.floating], regions: NDArray[np.floating], share: float) -> Boxes:
    """Move boxes a share of the way to the mean of the regions that overlap them.

    Regions whose IoU with a box is >= 0.5 count, each with the weight exp(IoU / 0.05), so that the nearest
    few decide. Proposals of a selective search have their sides on borders of segments, which box regression
    does not see.

    Args:
        boxes: (M, 4).
        regions: (N, 4).
        share: in [0, 1].

    Returns:
        (M, 4) float32 pixels; a box that no region overlaps so much stays.

    References:
        Ours; the constants are of trials on val: docs/boxes.md, "Drawn to segments".
    """
    overlaps = iou(boxes, regions)
    near = overlaps >= _NEAR_REGION
    found = np.flatnonzero(near.any(axis=1))
    moved = np.array(boxes, np.float32)
    if not len(found):
        return moved
    nearest = overlaps[found].max(axis=1, keepdims=True)
    weights = np.where(near[found], np.exp((overlaps[found] - nearest) / _REGION_SOFTNESS), 0.0)
    means = weights @ regions.astype(np.float64) / weights.sum(axis=1, keepdims=True)
    moved[found] = (1 - share) * boxes[found].astype(np.float64) + share * means
    return moved


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on first use, so that importing this module loads numpy only."""
    from rcnn_svm.compiled import kernel

    return kernel()(function)


# The loops below are on the path of every detection: some 20 classes times 100 to 2000 boxes an image.
# In numpy they cost ten calls per kept box, or temporaries of M x N.


def _suppress(
    boxes: NDArray[np.float64], labels: NDArray[np.int64], max_iou: float, limit: int
) -> NDArray[np.int64]:
    """Return which of (N, 4) `boxes`, best first, greedy suppression keeps: the first `limit` of them."""
    kept = np.empty(limit, np.int64)
    n_kept = 0
    # The kept boxes of a label form a chain, from its last one to the one before, and so on.
    last = np.full(labels.max() + 1 if len(labels) else 0, -1)
    before = np.empty(len(boxes), np.int64)
    for j in range(len(boxes)):
        if n_kept == limit:
            break
        x1, y1, x2, y2 = boxes[j, 0], boxes[j, 1], boxes[j, 2], boxes[j, 3]
        other = (x2 - x1) * (y2 - y1)
        i = last[labels[j]]
        while i >= 0:
            width = min(x2, boxes[i, 2]) - max(x1, boxes[i, 0])
            height = min(y2, boxes[i, 3]) - max(y1, boxes[i, 1])
            if width > 0.0 and height > 0.0:
                common = width * height
                own = (boxes[i, 2] - boxes[i, 0]) * (boxes[i, 3] - boxes[i, 1])
                if common / (own + other - common) > max_iou:
                    break
            i = before[i]
        if i < 0:
            before[j] = last[labels[j]]
            last[labels[j]] = j
            kept[n_kept] = j
            n_kept += 1
    return kept[:n_kept]


def _decay(
    columns: NDArray[np.float64],
    scores: NDArray[np.float64],
    rows: NDArray[np.int64],
    starts: NDArray[np.int64],
    sigma: float,
    order: NDArray[np.int64],
    decayed: NDArray[np.float64],
) -> None:
    """Take the best box that is left, `len(order)` times, and decay the others of its label.

    Args:
        columns: (4, N) boxes, label by label.
        scores: (N,), changed in place.
        rows: (N,) numbers of the boxes: of equal scores the smallest is the better one.
        starts: (L + 1,) where each label begins.
        sigma: of the decay.
        order: (M,), filled with the numbers of the boxes taken.
        decayed: (M,), filled with their scores.
    """
    x1, y1, x2, y2 = columns[0], columns[1], columns[2], columns[3]
    first = starts[:-1].copy()  # of the boxes of a label that are left
    best = np.full(len(first), -1)
    for label in range(len(first)):
        for j in range(first[label], starts[label + 1]):
            b = best[label]
            if b < 0 or scores[j] > scores[b]:
                best[label] = j
    for taken in range(len(order)):
        top = -1
        for label in range(len(best)):
            b = best[label]
            if b >= 0 and (
                top < 0
                or scores[b] > scores[best[top]]
                or (scores[b] == scores[best[top]] and rows[b] < rows[best[top]])
            ):
                top = label
        b, f = best[top], first[top]
        order[taken], decayed[taken] = rows[b], scores[b]
        left, upper, right, lower = x1[b], y1[b], x2[b], y2[b]
        own = (right - left) * (lower - upper)
        # The first one left moves to where the best was.
        x1[b], y1[b], x2[b], y2[b], scores[b], rows[b] = x1[f], y1[f], x2[f], y2[f], scores[f], rows[f]
        first[top] += 1
        b = -1
        for j in range(first[top], starts[top + 1]):
            width = min(right, x2[j]) - max(left, x1[j])
            height = min(lower, y2[j]) - max(upper, y1[j])
            if width > 0.0 and height > 0.0:
                common = width * height
                overlap = common / (own + (x2[j] - x1[j]) * (y2[j] - y1[j]) - common)
                scores[j] *= np.exp(-overlap * overlap / sigma)
            if b < 0 or scores[j] > scores[b] or (scores[j] == scores[b] and rows[j] < rows[b]):
                b = j
        best[top] = b


def _vote(
    kept: NDArray[np.float64], boxes: NDArray[np.float64], weights: NDArray[np.float64], min_iou: float
) -> NDArray[np.float64]:
    """Return (M, 4): `kept`, each replaced by the weighted mean of the boxes that reach `min_iou`."""
    voted = kept.copy()
    for i in range(len(kept)):
        x1, y1, x2, y2 = kept[i, 0], kept[i, 1], kept[i, 2], kept[i, 3]
        own = max(x2 - x1, 0.0) * max(y2 - y1, 0.0)
        total, a, b, c, d = 0.0, 0.0, 0.0, 0.0, 0.0
        for j in range(len(boxes)):
            u1, v1, u2, v2 = boxes[j, 0], boxes[j, 1], boxes[j, 2], boxes[j, 3]
            common = max(min(x2, u2) - max(x1, u1), 0.0) * max(min(y2, v2) - max(y1, v1), 0.0)
            union = own + max(u2 - u1, 0.0) * max(v2 - v1, 0.0) - common
            overlap = common / union if union > 0.0 else 0.0
            if overlap >= min_iou:
                weight = weights[j]
                total += weight
                a += weight * u1
                b += weight * v1
                c += weight * u2
                d += weight * v2
        if total > 0.0:
            voted[i, 0], voted[i, 1], voted[i, 2], voted[i, 3] = a / total, b / total, c / total, d / total
    return voted
