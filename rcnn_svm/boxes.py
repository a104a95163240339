"""Box geometry on plain arrays.

A box is `x1 y1 x2 y2` in half-open pixels: x to the right, y down, pixel columns
`x1 .. x2 - 1` are inside, so that width is `x2 - x1` with no `+ 1` anywhere. Readers convert
at the border (Pascal VOC's 1-based inclusive `xmin` loses 1, `xmax` stays). Boxes are stored
as float32 and compared in float64. This module needs numpy only.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rcnn_svm.errors import ShapeError

__all__ = [
    "Boxes",
    "area",
    "as_boxes",
    "clip",
    "decode_deltas",
    "encode_deltas",
    "flip_horizontally",
    "iou",
    "nms",
    "round_half_away",
    "vote_boxes",
    "widen",
]

Boxes: TypeAlias = NDArray[np.float32]
"""float32 (N, 4), half-open pixels `x1 y1 x2 y2`."""

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
    low = np.maximum(a[:, None, :2], b[None, :, :2])  # (N, M, 2)
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.maximum(high - low, 0)
    intersection = sides[..., 0] * sides[..., 1]  # (N, M)
    union = area(a)[:, None] + area(b)[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def clip(boxes: NDArray[np.floating], size: tuple[int, int]) -> Boxes:
    """Clip boxes to an image of `size` (height, width); a box outside loses its area."""
    height, width = size
    limit = np.array([width, height, width, height], np.float32)
    return np.clip(boxes, 0, limit).astype(np.float32)


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


def nms(boxes: NDArray[np.floating], scores: NDArray[np.floating], max_iou: float) -> NDArray[np.int64]:
    """Greedy non-maximum suppression: keep a box unless a better kept one overlaps it too much.

    Args:
        boxes: (N, 4).
        scores: (N,), larger is better, no NaN.
        max_iou: in [0, 1]; a box is dropped when its IoU with a kept box is > `max_iou`.

    Returns:
        (M,) indices into `boxes` by falling score; ties keep input order. Empty gives (0,).

    Raises:
        ShapeError: boxes and scores differ in length, or a score is NaN.

    References:
        rbgirshick/rcnn, nms/nms.m: survivors have IoU <= threshold.
    """
    if len(boxes) != len(scores):
        raise ShapeError(
            f"nms: boxes and scores must be alike in length, got {len(boxes)} and {len(scores)}."
        )
    if np.isnan(scores).any():
        raise ShapeError("nms: scores must not be NaN.")
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    ordered = np.ascontiguousarray(boxes, np.float64)[order]
    x1, y1, x2, y2 = np.ascontiguousarray(ordered.T)
    areas = area(ordered)
    alive = np.ones(len(order), bool)
    kept = []
    for i in range(len(order)):
        if not alive[i]:
            continue
        kept.append(i)
        rest = i + 1 + np.flatnonzero(alive[i + 1 :])
        w = np.minimum(x2[i], x2[rest]) - np.maximum(x1[i], x1[rest])
        h = np.minimum(y2[i], y2[rest]) - np.maximum(y1[i], y1[rest])
        intersection = np.maximum(w, 0) * np.maximum(h, 0)
        alive[rest[intersection > max_iou * (areas[i] + areas[rest] - intersection)]] = False
    return order[np.array(kept, np.int64)]


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

    References:
        Gidaris and Komodakis, arXiv 1505.01749, section 5.
    """
    votes = np.where(iou(kept, boxes) >= min_iou, weights[None, :], 0.0)  # (M, N)
    total = votes.sum(axis=1, keepdims=True)
    mean = (votes @ boxes.astype(np.float64)) / np.where(total > 0, total, 1)
    return np.where(total > 0, mean, kept).astype(np.float32)
