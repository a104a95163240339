"""How well proposals cover the objects: recall at an overlap, average best overlap. Needs numpy only."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes, iou
from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.structures import GroundTruth

__all__ = ["BUDGETS", "ProposalRecall", "best_overlaps", "proposal_recall"]

BUDGETS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
"""Numbers of boxes per image at which curves are drawn."""


@dataclass(frozen=True, eq=False)
class ProposalRecall:
    """Best overlaps of G counted objects at B budgets, and the measures made from them.

    Attributes:
        budgets: (B,) boxes per image, rising.
        overlap: (G, B) float64, IoU of each object with the best of the first `budgets[b]` boxes.
        labels: (G,) class of each object.
        image: (G,) index of its image, for resampling by image.
        n_classes: K, classes of the labels.
        n_boxes: mean number of boxes an image offered in all.
    """

    budgets: tuple[int, ...]
    overlap: NDArray[np.float64]
    labels: NDArray[np.int64]
    image: NDArray[np.int64]
    n_classes: int
    n_boxes: float

    def recall(self, min_iou: float) -> NDArray[np.float64]:
        """Return (B,) the fraction of objects with an overlap >= `min_iou`; NaN without objects."""
        if not len(self.overlap):
            return np.full(len(self.budgets), np.nan)
        return np.asarray((self.overlap >= min_iou).mean(axis=0), np.float64)

    def abo(self) -> NDArray[np.float64]:
        """Return (K, B) the average best overlap of each class; NaN where a class has no object."""
        result = np.full((self.n_classes, len(self.budgets)), np.nan)
        for label in np.unique(self.labels):
            result[label] = self.overlap[self.labels == label].mean(axis=0)
        return result

    def mabo(self) -> NDArray[np.float64]:
        """Return (B,) the mean of `abo` over the classes that occur; NaN without objects."""
        abo = self.abo()[np.unique(self.labels)]
        return np.asarray(abo.mean(axis=0), np.float64) if len(abo) else np.full(len(self.budgets), np.nan)


def best_overlaps(boxes: Boxes, truth: Boxes, budgets: Sequence[int]) -> NDArray[np.float64]:
    """Return (G, B): for each of G objects the IoU of the best among the first `budgets[b]` boxes.

    Args:
        boxes: (R, 4), best first; fewer than a budget count as all there are.
        truth: (G, 4).
        budgets: B numbers of boxes, each at least 1.
    """
    if not len(boxes):
        return np.zeros((len(truth), len(budgets)))
    running = np.maximum.accumulate(iou(truth, boxes), axis=1)  # (G, R)
    return running[:, np.minimum(budgets, len(boxes)) - 1]


def proposal_recall(
    proposals: Iterable[Boxes],
    truths: Iterable[GroundTruth],
    n_classes: int,
    *,
    budgets: Sequence[int] = BUDGETS,
) -> ProposalRecall:
    """Measure how well proposals cover the objects that count: neither difficult nor crowd.

    Args:
        proposals: (R, 4) boxes of each image, best first.
        truths: of the same images in the same order.
        n_classes: K; labels lie in 0 .. K-1.
        budgets: boxes per image, rising.

    Raises:
        ConfigError: budgets do not rise, or start below 1.
        ShapeError: there are more images on one side than on the other.

    References:
        Uijlings et al., IJCV 2013, section 5: average best overlap (ABO) and its mean (MABO).
    """
    if not len(budgets) or budgets[0] < 1 or any(b <= a for a, b in itertools.pairwise(budgets)):
        raise ConfigError(f"proposal_recall: budgets must rise from at least 1, got {tuple(budgets)}.")
    overlap, labels, image, sizes = [np.zeros((0, len(budgets)))], [], [], []
    try:
        for i, (boxes, truth) in enumerate(zip(proposals, truths, strict=True)):
            counted = truth[~(truth.difficult | truth.crowd)]
            overlap.append(best_overlaps(boxes, counted.boxes, budgets))
            labels.append(counted.labels)
            image.append(np.full(len(counted), i))
            sizes.append(len(boxes))
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise ShapeError("proposal_recall: proposals and truths must be of the same images.") from error
    none = [np.zeros(0, np.int64)]
    return ProposalRecall(
        tuple(budgets),
        np.concatenate(overlap),
        np.concatenate(none + labels),
        np.concatenate(none + image),
        n_classes,
        float(np.mean(sizes)) if sizes else 0.0,
    )
