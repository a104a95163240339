"""Average precision and recall as COCO defines them: ten IoU levels, object sizes, crowds, detection caps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import area, iou
from rcnn_svm.errors import ShapeError
from rcnn_svm.structures import Detections, GroundTruth

__all__ = ["AREA_RANGES", "IOU_LEVELS", "MAX_DETECTIONS", "CocoResult", "evaluate_coco"]

IOU_LEVELS: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)
AREA_RANGES: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""Square pixels, both ends inside, so that an object of exactly 32 x 32 is small and medium."""
MAX_DETECTIONS = (1, 10, 100)
"""The best so many detections of a class in an image take part."""

_RECALL_GRID = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, eq=False)
class CocoResult:
    """COCO's measures as fractions in [0, 1]; nan where no object of that class and size exists.

    Sizes: A area ranges, T IoU levels, K classes, M detection caps.

    Attributes:
        classes: K class names.
        precision: (A, T, K) average precision at 100 detections per image.
        recall: (M, A, T, K) final recall.
    """

    classes: tuple[str, ...]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

    def ap(self) -> NDArray[np.float64]:
        """Return (K,) AP over all sizes, averaged over the ten IoU levels."""
        value: NDArray[np.float64] = self.precision[0].mean(axis=0)
        return value

    def summary(self) -> dict[str, float]:
        """Return COCO's twelve headline numbers under their usual short names."""
        precision, recall = self.precision, self.recall
        return {
            "AP": _mean(precision[0]),
            "AP50": _mean(precision[0, 0]),
            "AP75": _mean(precision[0, 5]),
            "APs": _mean(precision[1]),
            "APm": _mean(precision[2]),
            "APl": _mean(precision[3]),
            "AR1": _mean(recall[0, 0]),
            "AR10": _mean(recall[1, 0]),
            "AR100": _mean(recall[2, 0]),
            "ARs": _mean(recall[2, 1]),
            "ARm": _mean(recall[2, 2]),
            "ARl": _mean(recall[2, 3]),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the figures, in percent, with null where there is no object."""

        def percent(value: float) -> float | None:
            return None if np.isnan(value) else 100 * float(value)

        return {
            "rule": "coco",
            "summary": {name: percent(value) for name, value in self.summary().items()},
            "ap": {name: percent(value) for name, value in zip(self.classes, self.ap(), strict=True)},
        }


def evaluate_coco(
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    classes: Sequence[str],
    *,
    areas: Sequence[NDArray[np.floating]] | None = None,
) -> CocoResult:
    """Measure detections against the labels of a split by COCO's rules for boxes.

    At each IoU level, detections of a class in an image choose by falling score the free object that
    they overlap most (the last of equals) with IoU >= the level. Objects that are crowds, difficult or
    outside the area range are chosen only when no other is in reach, and such a detection is left out,
    as is an unmatched one outside the range. A crowd takes any number of detections, each by the share
    of its own area that lies inside.

    Args:
        detections: one record per image.
        truths: the labels of the same images in the same order.
        classes: K names that the labels index.
        areas: per image (G,) areas of the objects in square pixels where they are not the boxes' own:
            COCO's annotations state the area of the segment.

    Raises:
        ShapeError: the sequences differ in length, or a label is no class.

    References:
        cocodataset/cocoapi, PythonAPI/pycocotools/cocoeval.py.
    """
    n_classes = len(classes)
    if areas is None:
        areas = [area(truth.boxes) for truth in truths]
    if not len(detections) == len(truths) == len(areas):
        raise ShapeError(
            f"evaluate_coco: there must be one record per image, got {len(detections)} detections, "
            f"{len(truths)} truths and {len(areas)} areas."
        )
    n_positives = np.zeros((len(AREA_RANGES), n_classes), np.int64)
    pools: list[list[_Matched]] = [[] for _ in range(n_classes)]
    for found, truth, sizes in zip(detections, truths, areas, strict=True):
        for labels in (found.labels, truth.labels):
            if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
                raise ShapeError(
                    f"evaluate_coco: labels of image {found.image_id!r} must lie in 0 .. {n_classes - 1}, "
                    f"got {labels.min()} .. {labels.max()}."
                )
        counts = _counts_in_range(truth, np.asarray(sizes, np.float64))  # (A, G)
        for k in range(n_classes):
            rows = np.flatnonzero(found.labels == k)[: MAX_DETECTIONS[-1]]
            objects = truth.labels == k
            n_positives[:, k] += counts[:, objects].sum(axis=1)
            if len(rows):
                pools[k].append(_match(found[rows], truth[objects], ~counts[:, objects]))

    shape = (len(AREA_RANGES), len(IOU_LEVELS), n_classes)
    precision, recall = np.full(shape, np.nan), np.full((len(MAX_DETECTIONS), *shape), np.nan)
    for k, pool in enumerate(pools):
        present = n_positives[:, k] > 0
        precision[present, :, k] = 0.0
        recall[:, present, :, k] = 0.0
        if pool and present.any():
            _accumulate(pool, n_positives[:, k], precision[..., k], recall[..., k])
    return CocoResult(tuple(classes), precision, recall)


@dataclass(frozen=True, eq=False)
class _Matched:
    """The detections of one class in one image after matching."""

    scores: NDArray[np.float32]  # (D,) falling
    hit: NDArray[np.bool_]  # (A, T, D)
    false: NDArray[np.bool_]  # (A, T, D); neither hit nor false: left out


def _counts_in_range(truth: GroundTruth, sizes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (A, G): whether each object counts in each area range."""
    low, high = np.array(list(AREA_RANGES.values())).T
    inside = (sizes >= low[:, None]) & (sizes <= high[:, None])
    return np.asarray(inside & ~(truth.difficult | truth.crowd))


def _match(found: Detections, truth: GroundTruth, spared: NDArray[np.bool_]) -> _Matched:
    """Match the detections of one class in one image at all levels and areas at once.

    Args:
        found: D detections.
        truth: G objects.
        spared: (A, G) objects that do not count.
    """
    levels = np.minimum(IOU_LEVELS, 1 - 1e-10)
    hit = np.zeros((len(spared), len(levels), len(found)), bool)
    left_out = np.zeros_like(hit)
    if len(truth):
        overlaps = iou(found.boxes, truth.boxes)  # (D, G)
        if truth.crowd.any():
            overlaps[:, truth.crowd] = _share_inside(found, truth[truth.crowd])
        taken = np.zeros((*hit.shape[:2], len(truth)), bool)  # (A, T, G)
        # Most detections reach nothing even at the lowest level: only the others need a turn.
        for d in np.flatnonzero(overlaps.max(axis=1) >= levels[0]):
            open_to = (overlaps[d] >= levels[:, None]) & ~taken  # (A, T, G)
            counting = open_to & ~spared[:, None, :]
            choice = np.where(counting.any(axis=2, keepdims=True), counting, open_to)
            value = np.where(choice, overlaps[d], -1.0)[..., ::-1]
            best = len(truth) - 1 - value.argmax(axis=2)  # the last of equals
            matched = choice.any(axis=2)
            a, t = np.nonzero(matched)
            g = best[a, t]
            taken[a, t, g] = ~truth.crowd[g]
            hit[a, t, d] = ~spared[a, g]
            left_out[a, t, d] = spared[a, g]
    low, high = np.array(list(AREA_RANGES.values())).T[:, :, None, None]
    size = area(found.boxes)
    outside = (size < low) | (size > high)  # (A, 1, D)
    return _Matched(found.scores, hit, ~hit & ~left_out & ~outside)


def _share_inside(found: Detections, crowds: GroundTruth) -> NDArray[np.float64]:
    """Return (D, G): the share of each detection's area that lies in each crowd."""
    a, b = found.boxes.astype(np.float64), crowds.boxes.astype(np.float64)
    width = np.minimum(a[:, None, 2], b[:, 2]) - np.maximum(a[:, None, 0], b[:, 0])
    height = np.minimum(a[:, None, 3], b[:, 3]) - np.maximum(a[:, None, 1], b[:, 1])
    common = np.maximum(width, 0) * np.maximum(height, 0)
    share: NDArray[np.float64] = np.zeros_like(common)
    own = np.broadcast_to(area(a)[:, None], common.shape)
    np.divide(common, own, out=share, where=own > 0)
    return share


def _accumulate(
    pool: Sequence[_Matched],
    n_positives: NDArray[np.int64],
    precision: NDArray[np.float64],
    recall: NDArray[np.float64],
) -> None:
    """Fill one class's precision (A, T) and recall (M, A, T) from its images."""
    scores = np.concatenate([each.scores for each in pool])
    rank = np.concatenate([np.arange(len(each.scores)) for each in pool])
    hit = np.concatenate([each.hit for each in pool], axis=2)
    false = np.concatenate([each.false for each in pool], axis=2)
    for m, cap in enumerate(MAX_DETECTIONS):
        n_found = hit[:, :, rank < cap].sum(axis=2)
        for a in np.flatnonzero(n_positives):
            recall[m, a] = n_found[a] / n_positives[a]
    order = np.argsort(-scores, kind="stable")
    n_hit = np.cumsum(hit[:, :, order], axis=2)
    n_false = np.cumsum(false[:, :, order], axis=2)
    curve = n_hit / np.maximum(n_hit + n_false, 1)
    envelope = np.maximum.accumulate(curve[..., ::-1], axis=2)[..., ::-1]
    for a in np.flatnonzero(n_positives):
        for t in range(len(IOU_LEVELS)):
            first = np.searchsorted(n_hit[a, t] / n_positives[a], _RECALL_GRID, side="left")
            precision[a, t] = np.append(envelope[a, t], 0.0)[first].mean()


def _mean(values: NDArray[np.float64]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")
