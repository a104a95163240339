"""Average precision and recall as COCO defines them: ten IoU levels, object sizes, crowds, detection caps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes, area, iou
from rcnn_svm.compiled import kernel
from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.evaluation.voc import FALSE, HIT, IGNORED, mean_precision
from rcnn_svm.structures import Detections, GroundTruth

__all__ = ["AREA_RANGES", "IOU_LEVELS", "MAX_DETECTIONS", "CocoResult", "evaluate_coco", "share_inside"]

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

_LEVELS = np.minimum(IOU_LEVELS, 1 - 1e-10)  # as the reference implementation compares
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

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {100 * self.summary()[name]:.1f}" for name in ("AP", "AP50", "AP75"))
        return f"CocoResult({shown}: {len(self.classes)} classes)"

    def ap(self) -> NDArray[np.float64]:
        """Return (K,) AP over all sizes, averaged over the ten IoU levels."""
        value: NDArray[np.float64] = self.precision[0].mean(axis=0)
        return value

    def ap_at(self, min_iou: float) -> NDArray[np.float64]:
        """Return (K,) AP over all sizes at one of `IOU_LEVELS`.

        Raises:
            ConfigError: `min_iou` is none of them.
        """
        level = np.flatnonzero(np.isclose(IOU_LEVELS, min_iou))
        if len(level) == 0:
            raise ConfigError(f"ap_at: min_iou must be one of 0.5, 0.55 .. 0.95, got {min_iou}.")
        value: NDArray[np.float64] = self.precision[0, level[0]]
        return value

    def summary(self) -> dict[str, float]:
        """Return COCO's twelve headline numbers under their usual short names."""
        precision, recall = self.precision, self.recall
        return {
            "AP": _mean(precision[0]),
            "AP50": _mean(self.ap_at(0.5)),
            "AP75": _mean(self.ap_at(0.75)),
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
    detections: Sequence[Detections], truths: Sequence[GroundTruth], classes: Sequence[str]
) -> CocoResult:
    """Measure detections against the labels of a split by COCO's rules for boxes.

    At each IoU level, detections of a class in an image choose by falling score the free object that
    they overlap most (the last of equals) with IoU >= the level. Objects that are crowds, difficult or
    outside the area range are chosen only when no other is in reach, and such a detection is left out,
    as is an unmatched one outside the range. A crowd takes any number of detections, each by the share
    of its own area that lies inside. The size of an object is its `GroundTruth.area`, that of a detection
    its box's.

    Args:
        detections: one record per image.
        truths: the labels of the same images in the same order.
        classes: K names that the labels index.

    Raises:
        ShapeError: the sequences differ in length, or a label is no class.

    References:
        cocodataset/cocoapi, PythonAPI/pycocotools/cocoeval.py.
    """
    if len(detections) != len(truths):
        raise ShapeError(
            f"evaluate_coco: there must be one record per image, got {len(detections)} detections and "
            f"{len(truths)} truths."
        )
    n_classes, n_ranges = len(classes), len(AREA_RANGES)
    n_positives = np.zeros((n_ranges, n_classes), np.int64)
    start = np.cumsum([0, *map(len, detections)])
    outcome = np.empty((n_ranges, len(IOU_LEVELS), start[-1]), np.int8)
    for found, truth, low, high in zip(detections, truths, start[:-1], start[1:], strict=True):
        for labels in (found.labels, truth.labels):
            if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
                raise ShapeError(
                    f"evaluate_coco: labels of image {found.image_id!r} must lie in 0 .. {n_classes - 1}, "
                    f"got {labels.min()} .. {labels.max()}."
                )
        counts = _in_ranges(truth.area) & ~(truth.difficult | truth.crowd)  # (A, G)
        np.add.at(n_positives.T, truth.labels, counts.T)
        outcome[..., low:high] = _match(_overlaps(found, truth), ~counts, truth.crowd, _LEVELS)

    label = np.concatenate([np.zeros(0, np.int64), *(found.labels for found in detections)])
    score = np.concatenate([np.zeros(0, np.float32), *(found.scores for found in detections)])
    sizes = np.concatenate([np.zeros(0), *(area(found.boxes) for found in detections)])
    outcome[(outcome == FALSE) & ~_in_ranges(sizes)[:, None]] = IGNORED
    rank = _ranks(np.repeat(np.arange(len(detections)), np.diff(start)) * n_classes + label)
    order = np.lexsort((-score, label))  # stable: ties keep the order of images, and that within an image
    order = order[rank[order] < MAX_DETECTIONS[-1]]

    shape = (n_ranges, len(IOU_LEVELS), n_classes)
    precision, recall = np.full(shape, np.nan), np.full((len(MAX_DETECTIONS), *shape), np.nan)
    of_class = np.searchsorted(label[order], np.arange(n_classes + 1))
    for k, a in zip(*np.nonzero(n_positives.T), strict=True):
        rows, n = order[of_class[k] : of_class[k + 1]], n_positives[a, k]
        hits, counted = outcome[a][:, rows] == HIT, outcome[a][:, rows] != IGNORED  # (T, D)
        precision[a, :, k] = [
            mean_precision(h[c], n, _RECALL_GRID) for h, c in zip(hits, counted, strict=True)
        ]
        for m, cap in enumerate(MAX_DETECTIONS):
            recall[m, a, :, k] = hits[:, rank[rows] < cap].sum(axis=1) / n
    return CocoResult(tuple(classes), precision, recall)


def _in_ranges(sizes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (A, N): whether each of N sizes lies in each area range."""
    low, high = np.array(list(AREA_RANGES.values())).T[:, :, None]
    return np.asarray((sizes >= low) & (sizes <= high))


def _ranks(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (N,): how many of the elements before each one are of its group."""
    order = np.argsort(groups, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.searchsorted(groups[order], groups[order])
    return rank


def _overlaps(found: Detections, truth: GroundTruth) -> NDArray[np.float64]:
    """Return (D, G) by how much each detection reaches each object of an image; -1 for other classes.

    It is the IoU, for crowds the share of the detection's area that lies inside.
    """
    overlaps = iou(found.boxes, truth.boxes)
    if truth.crowd.any():
        overlaps[:, truth.crowd] = share_inside(found.boxes, truth.boxes[truth.crowd])
    return np.where(found.labels[:, None] == truth.labels, overlaps, -1.0)


def share_inside(boxes: Boxes, crowds: Boxes) -> NDArray[np.float64]:
    """Return (D, G): the share of each of D boxes' area that lies in each of G crowds; 0 for an empty box."""
    a, b = boxes.astype(np.float64), crowds.astype(np.float64)
    width = np.minimum(a[:, None, 2], b[:, 2]) - np.maximum(a[:, None, 0], b[:, 0])
    height = np.minimum(a[:, None, 3], b[:, 3]) - np.maximum(a[:, None, 1], b[:, 1])
    common = np.maximum(width, 0) * np.maximum(height, 0)
    share: NDArray[np.float64] = np.zeros_like(common)
    own = np.broadcast_to(area(a)[:, None], common.shape)
    np.divide(common, own, out=share, where=own > 0)
    return share


@kernel()
def _match(
    overlaps: NDArray[np.float64],
    spared: NDArray[np.bool_],
    crowd: NDArray[np.bool_],
    levels: NDArray[np.float64],
) -> NDArray[np.int8]:
    """Decide at all levels and area ranges at once what the detections of one image are.

    Args:
        overlaps: (D, G) of D detections by falling score with G objects; -1 where classes differ.
        spared: (A, G) objects that do not count.
        crowd: (G,) objects that any number of detections may take.
        levels: (T,) rising.

    Returns:
        (A, T, D): HIT, FALSE or IGNORED.
    """
    n_found, n_objects = overlaps.shape
    outcome = np.full((len(spared), len(levels), n_found), FALSE, np.int8)
    taken = np.zeros((len(spared), len(levels), n_objects), np.bool_)
    for d in range(n_found):
        if (overlaps[d] < levels[0]).all():
            continue
        for a in range(len(spared)):
            for t in range(len(levels)):
                for left_out in (False, True):  # spared objects only where no other is in reach
                    best, most = -1, levels[t]
                    for g in range(n_objects):
                        free = crowd[g] or not taken[a, t, g]
                        if spared[a, g] == left_out and free and overlaps[d, g] >= most:
                            best, most = g, overlaps[d, g]
                    if best >= 0:
                        taken[a, t, best] = True
                        outcome[a, t, d] = IGNORED if left_out else HIT
                        break
    return outcome


def _mean(values: NDArray[np.float64]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")
