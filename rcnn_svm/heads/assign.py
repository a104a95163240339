"""From overlaps to labels: which regions are positives, negatives or neither, for each class.

A `RegionTruth` describes the regions of one training image once; a `LabelRule` turns it into
labels, so that heads that disagree about the rule still share everything else. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes, area, as_boxes, iou
from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.structures import GroundTruth

__all__ = ["FINETUNE_RULE", "SVM_RULE", "LabelRule", "RegionTruth", "describe_regions"]


@dataclass(frozen=True, eq=False)
class RegionTruth:
    """How the R regions of one image lie to its labelled objects, for K classes.

    Crowd regions are no objects: they never match, they only fill `crowd`.

    Attributes:
        boxes: (R, 4) the regions, ground-truth rows first where there are any.
        overlap: (R, K) float32, largest IoU with an object of each class, difficult ones included.
        crowd: (R, K) float32, largest share of the region's own area that lies in one crowd
            region of each class.
        own: (R, K) bool, the classes of which a row is an object itself.
        label: (R,) int64, class of the object of largest IoU (the first of equals; its own class
            for a ground-truth row), -1 where no object overlaps.
        target: (R, 4) that object's box, zeros where `label` is -1.
        best_iou: (R,) float32, the IoU with it.
        difficult: (R,) bool, whether that object is marked as difficult.
    """

    boxes: Boxes
    overlap: NDArray[np.float32]
    crowd: NDArray[np.float32]
    own: NDArray[np.bool_]
    label: NDArray[np.int64]
    target: Boxes
    best_iou: NDArray[np.float32]
    difficult: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def is_gt(self) -> NDArray[np.bool_]:
        """(R,) bool, rows that are objects themselves."""
        return np.asarray(self.own.any(axis=1), np.bool_)

    def rows(self, rows: NDArray[np.int64]) -> RegionTruth:
        """Return the description of some of the regions."""
        columns = (getattr(self, field.name)[rows] for field in fields(self))
        return RegionTruth(*columns)


def describe_regions(
    boxes: NDArray[np.floating], truth: GroundTruth, n_classes: int, n_gt: int = 0, *, whole: bool = False
) -> RegionTruth:
    """Describe how `boxes` overlap the objects of their image.

    Args:
        boxes: (R, 4) regions; the first `n_gt` rows are `truth.boxes`.
        truth: the objects of the image. Difficult ones overlap like any other, as in R-CNN.
        n_classes: K; every label is below it.
        n_gt: 0 (proposals alone) or `len(truth)` (ground-truth rows prepended).
        whole: labels are of whole images: a region is an object of each class whose box is its own.

    Raises:
        ShapeError: `n_gt` is neither, or the first rows are not the ground truth.

    References:
        rbgirshick/rcnn, imdb/roidb_from_voc.m (rows prepended), rcnn_train.m (overlaps).
    """
    boxes = as_boxes(boxes, where="describe_regions")
    if n_gt not in (0, len(truth)) or not np.array_equal(boxes[:n_gt], truth.boxes[:n_gt]):
        raise ShapeError(
            f"describe_regions: n_gt must be 0, or {len(truth)} with truth.boxes as the first rows, "
            f"got n_gt={n_gt}. Prepend every ground-truth box in order, or none."
        )
    if len(truth) and not (truth.labels.min() >= 0 and truth.labels.max() < n_classes):
        raise ShapeError(
            f"describe_regions: labels must lie in 0 .. {n_classes - 1}, got {truth.labels.min()} .. "
            f"{truth.labels.max()}. Give the number of classes of the data set."
        )
    n = len(boxes)
    objects, crowds = truth[~truth.crowd], truth[truth.crowd]
    overlap, crowd = np.zeros((n, n_classes), np.float32), np.zeros((n, n_classes), np.float32)
    label, target = np.full(n, -1, np.int64), np.zeros((n, 4), np.float32)
    best_iou, difficult, own = np.zeros(n, np.float32), np.zeros(n, bool), np.zeros((n, n_classes), bool)
    if len(objects):
        pairs = iou(boxes, objects.boxes)  # (R, G)
        for k in np.unique(objects.labels):
            overlap[:, k] = pairs[:, objects.labels == k].max(axis=1)
        match = pairs.argmax(axis=1)
        best_iou = pairs[np.arange(n), match].astype(np.float32)
        hit = best_iou > 0
        label[hit], target[hit] = objects.labels[match[hit]], objects.boxes[match[hit]]
        difficult[hit] = objects.difficult[match[hit]]
    for k in np.unique(crowds.labels):
        crowd[:, k] = _inside(boxes, crowds.boxes[crowds.labels == k]).max(axis=1)
    if n_gt:
        # Two objects may share one box: each row stands for its own, whichever comes first.
        gt = np.flatnonzero(~truth.crowd)
        label[gt], target[gt], difficult[gt] = truth.labels[gt], truth.boxes[gt], truth.difficult[gt]
        own[gt, truth.labels[gt]] = True
    if whole:
        own |= overlap == 1
    return RegionTruth(boxes, overlap, crowd, own, label, target, best_iou, difficult)


def _inside(boxes: Boxes, regions: Boxes) -> NDArray[np.float64]:
    """(R, M) share of each box that lies inside each region."""
    low = np.maximum(boxes[:, None, :2].astype(np.float64), regions[None, :, :2])
    high = np.minimum(boxes[:, None, 2:].astype(np.float64), regions[None, :, 2:])
    sides = np.maximum(high - low, 0)
    own = area(boxes)[:, None]
    share = np.zeros(sides.shape[:2])
    np.divide(sides[..., 0] * sides[..., 1], own, out=share, where=own > 0)
    return share


@dataclass(frozen=True)
class LabelRule:
    """Which regions are positives and which are negatives; the others are ignored.

    Attributes:
        positive_iou: a region is a positive when its IoU is >= this; None takes the
            ground-truth boxes alone.
        negative_iou: a region is a negative when its IoU is < this (strictly), and no crowd
            region of the class holds this share of it.
        negative_low: and its IoU is >= this.
        skip_difficult: a positive whose best object is difficult is ignored. R-CNN learns from difficult
            objects; without them Fast R-CNN gained a point of mAP.

    References:
        Girshick, Fast R-CNN, arXiv 1504.08083, section 4.3 (difficult objects).

    Raises:
        ConfigError: not 0 <= negative_low <= negative_iou <= positive_iou <= 1.
    """

    positive_iou: float | None
    negative_iou: float
    negative_low: float = 0.0
    skip_difficult: bool = False

    def __post_init__(self) -> None:
        top = 1.0 if self.positive_iou is None else self.positive_iou
        if not 0 <= self.negative_low <= self.negative_iou <= top <= 1:
            raise ConfigError(
                f"LabelRule: must have 0 <= negative_low <= negative_iou <= positive_iou <= 1, got "
                f"{self.negative_low}, {self.negative_iou}, {self.positive_iou}."
            )

    def per_class(self, regions: RegionTruth) -> NDArray[np.int8]:
        """Return (R, K) int8: +1 positive, -1 negative, 0 ignored, each class on its own."""
        overlap = regions.overlap
        labels = np.zeros(overlap.shape, np.int8)
        negative = (overlap < self.negative_iou) & (overlap >= self.negative_low)
        labels[negative & (regions.crowd < self.negative_iou)] = -1
        if self.positive_iou is None:
            labels[regions.own] = 1
        else:
            labels[overlap >= self.positive_iou] = 1
        if self.skip_difficult:
            rows = np.flatnonzero(regions.difficult)
            own = labels[rows, regions.label[rows]]
            labels[rows, regions.label[rows]] = np.minimum(own, 0)
        return labels

    def multiclass(self, regions: RegionTruth) -> NDArray[np.int64]:
        """Return (R,) int64: class 0 .. K-1 of the best object, K background, -1 ignored."""
        n_classes = regions.overlap.shape[1]
        best = regions.best_iou
        labels = np.full(len(regions), -1, np.int64)
        background = (best < self.negative_iou) & (best >= self.negative_low)
        labels[background & (regions.crowd < self.negative_iou).all(axis=1)] = n_classes
        positive = regions.is_gt if self.positive_iou is None else best >= self.positive_iou
        positive = positive & (regions.label >= 0)
        labels[positive] = regions.label[positive]
        if self.skip_difficult:
            labels[positive & regions.difficult] = -1
        return labels


SVM_RULE = LabelRule(positive_iou=None, negative_iou=0.3)
"""The rule of R-CNN's SVMs, ground truth against IoU < 0.3 (arXiv 1311.2524v5, section 2.3)."""

FINETUNE_RULE = LabelRule(positive_iou=0.5, negative_iou=0.5)
"""The rule of R-CNN's fine-tuning, IoU >= 0.5 against the rest (the same section)."""
