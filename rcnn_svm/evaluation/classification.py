"""Whole images of one class each: accuracy, balanced accuracy, and which class is taken for which.

Average precision needs nothing of its own: where each image is its only region, VOC's classification task is
its detection task, and `evaluate_voc` measures it, with images left out whose only objects are difficult.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import ShapeError
from rcnn_svm.structures import Detections, GroundTruth

__all__ = ["Classification", "classify", "labels_of"]


@dataclass(frozen=True, eq=False)
class Classification:
    """The class of each of N images, and the one that it was taken for.

    Attributes:
        classes: K names.
        actual: (N,) int64 in 0 .. K-1.
        predicted: (N,) int64 in 0 .. K-1, the class of the highest score.
    """

    classes: tuple[str, ...]
    actual: NDArray[np.int64]
    predicted: NDArray[np.int64]

    def __repr__(self) -> str:
        return f"Classification({100 * self.accuracy:.1f} % of {len(self.actual)} images)"

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) bool, the images whose class was found."""
        return np.asarray(self.actual == self.predicted, np.bool_)

    @property
    def accuracy(self) -> float:
        """Share of the images whose class was found; nan without images."""
        return float(self.correct.mean()) if len(self.actual) else float("nan")

    @property
    def recall(self) -> NDArray[np.float64]:
        """(K,) share of the images of each class that was found; nan where there is none."""
        confusion = self.confusion
        n = confusion.sum(axis=1)
        shares = np.full(len(n), np.nan)
        np.divide(np.diag(confusion), n, out=shares, where=n > 0)
        return shares

    @property
    def balanced_accuracy(self) -> float:
        """Mean of `recall` over the classes that have images; nan without images."""
        recall = self.recall
        present = ~np.isnan(recall)
        return float(recall[present].mean()) if present.any() else float("nan")

    @property
    def confusion(self) -> NDArray[np.int64]:
        """(K, K) numbers of images, by actual class (rows) and predicted class (columns)."""
        n = len(self.classes)
        return np.bincount(self.actual * n + self.predicted, minlength=n * n).reshape(n, n)

    def to_json(self) -> dict[str, Any]:
        """Return the figures, in percent, and the numbers of images by actual and by predicted class."""
        return {
            "classes": list(self.classes),
            "n_images": len(self.actual),
            "accuracy": 100 * self.accuracy,
            "balanced_accuracy": 100 * self.balanced_accuracy,
            "confusion": self.confusion.tolist(),
        }


def labels_of(truths: Sequence[GroundTruth]) -> NDArray[np.int64] | None:
    """Return (N,) int64 the class of each image, None where some image has none or several."""
    labels = [np.unique(truth.labels) for truth in truths]
    return np.concatenate([np.zeros(0, np.int64), *labels]) if all(len(own) == 1 for own in labels) else None


def classify(
    detections: Sequence[Detections], truths: Sequence[GroundTruth], classes: Sequence[str]
) -> Classification | None:
    """Return what each image was taken for: the class of its surest detection, the first of equals.

    Args:
        detections: one record per image, with a detection at least.
        truths: the labels of the same images in the same order.
        classes: K names that labels index.

    Returns:
        None where some image has no class or several: accuracy is not defined there.

    Raises:
        ShapeError: the two sequences differ in length, or an image has no detection.
    """
    if len(detections) != len(truths):
        raise ShapeError(
            f"classify: there must be one Detections per image, got {len(detections)} for {len(truths)}."
        )
    actual = labels_of(truths)
    if actual is None:
        return None
    empty = next((found.image_id for found in detections if not len(found)), None)
    if empty is not None:
        raise ShapeError(f"classify: every image must have a score for its classes, got none for {empty!r}.")
    return Classification(
        tuple(classes), actual, np.array([found.labels[0] for found in detections], np.int64)
    )
