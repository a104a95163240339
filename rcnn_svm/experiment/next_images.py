"""Which unlabelled images to label next: many detections near the threshold, and unlike one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rcnn_svm.boxes import Boxes, nms
from rcnn_svm.detector import Detector
from rcnn_svm.errors import ConfigError
from rcnn_svm.features.store import to_float32
from rcnn_svm.heads.scorers import SoftmaxScorer
from rcnn_svm.proposals import regions_of
from rcnn_svm.structures import Image

__all__ = ["Doubt", "choose_images", "doubt_of", "look_for_doubt"]

_MARGINS, _LOG_ODDS = 0.5, 2.0  # width of the band on either side of a threshold where scores say little
_MAX_IOU = 0.3
_MOST = 20  # regions of an image
_LEAST = 1e-6  # images without doubt differ by their looks alone


@dataclass(frozen=True, eq=False)
class Doubt:
    """How unsure a detector is of an image.

    Attributes:
        value: sum over the regions of how near each is to the threshold of its class: 1 on it, 0 from
            `width` away.
        feature: (D,) float32 of length 1, what the image looks like: the mean of the rows of its regions,
            weighted by the exponentials of their scores.
        boxes: (M, 4) the regions, best first; none overlaps a better one with IoU above 0.3.
        scores: (M,) float32, of the class that is furthest above, or least below, its threshold.
        labels: (M,) int64, that class.
        near: (M,) bool, whether a region adds to `value`.
    """

    value: float
    feature: NDArray[np.float32]
    boxes: Boxes
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    near: NDArray[np.bool_]


def doubt_of(
    boxes: Boxes,
    rows: NDArray[np.float32],
    scores: NDArray[np.float32],
    thresholds: ArrayLike,
    width: float = _MARGINS,
) -> Doubt:
    """Sum up how unsure a detector is of the regions of one image; the 20 best count.

    Args:
        boxes: (R, 4) proposals, at least one.
        rows: (R, D) their features.
        scores: (R, K).
        thresholds: (K,) from which score on a detection of each class is believed.
        width: how far from its threshold a score is beyond doubt: half a margin of an SVM.
    """
    above = scores - np.asarray(thresholds, np.float32)
    best, label = above.max(axis=1), above.argmax(axis=1)
    kept = nms(boxes, best, _MAX_IOU)[:_MOST]
    doubt = np.clip(1 - np.abs(best[kept]) / width, 0, None)
    weights = np.exp(best[kept] - best[kept].max())
    mean = (weights[:, None] * rows[kept]).sum(axis=0)
    feature = (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)
    return Doubt(float(doubt.sum()), feature, boxes[kept], scores[kept, label[kept]], label[kept], doubt > 0)


def look_for_doubt(detector: Detector, image: Image, image_id: str) -> Doubt:
    """Look at one image with a detector; box regression, mirror images and soft-NMS play no part.

    Args:
        detector: one that has chosen thresholds; without them 0 is taken, the middle of the margin. Doubt
            ends half a margin from the threshold; of a softmax, whose scores are log-odds, 2 from it.
        image: uint8 (H, W, 3) RGB.
        image_id: by which the proposer knows it.
    """
    boxes = regions_of(detector.proposer, image, image_id).boxes[: detector.n_proposals]
    rows = to_float32(detector.featurizer.of_image(image)(boxes))
    if detector.layers is not None:
        rows = detector.layers(rows)
    width = _LOG_ODDS if isinstance(detector.model.scorer, SoftmaxScorer) else _MARGINS
    return doubt_of(boxes, rows, detector.model.scores(rows), detector.least_scores, width)


def choose_images(doubts: Sequence[Doubt], n: int) -> list[int]:
    """Choose images of much doubt that are unlike one another; nothing is drawn at random.

    The first is the one of most doubt. Each further one has the largest product of its doubt and its
    distance, 1 less the cosine of the features, to the nearest before it. Equals go to the earlier image.

    Args:
        doubts: of all images.
        n: how many; all where there are fewer.

    Returns:
        Positions, in the order of choice.

    Raises:
        ConfigError: `n` is below 1.
    """
    if n < 1:
        raise ConfigError(f"n must be at least 1, got {n}.")
    values = np.array([doubt.value for doubt in doubts]) + _LEAST
    features = np.stack([doubt.feature for doubt in doubts]) if doubts else np.zeros((0, 1), np.float32)
    distance, left = np.ones(len(doubts)), np.ones(len(doubts), bool)
    chosen: list[int] = []
    for _ in range(min(n, len(doubts))):
        i = int(np.argmax(np.where(left, values * distance, -1.0)))
        chosen.append(i)
        left[i] = False
        distance = np.minimum(distance, np.clip(1 - features @ features[i], 0, None))
    return chosen
