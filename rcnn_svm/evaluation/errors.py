"""What kind of mistake each false detection is: the four types of Hoiem, Chodpathumwan and Dai."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import iou
from rcnn_svm.evaluation.voc import HIT, IGNORED, Matches
from rcnn_svm.structures import Detections, GroundTruth

__all__ = ["CORRECT", "ERROR_TYPES", "FalsePositives", "false_positive_types"]

ERROR_TYPES = ("localisation", "similar class", "other class", "background")
"""In the order in which they are tested."""
CORRECT = -1

# D. Hoiem, Y. Chodpathumwan, Q. Dai, "Diagnosing error in object detectors", ECCV 2012, section 2.
_SIMILAR_SETS = (
    frozenset({"aeroplane", "bicycle", "boat", "bus", "car", "motorbike", "train"}),
    frozenset({"bird", "cat", "cow", "dog", "horse", "person", "sheep"}),
    frozenset({"chair", "diningtable", "sofa"}),
    frozenset({"aeroplane", "bird"}),
)
_MIN_TOUCH = 0.1


@dataclass(frozen=True, eq=False)
class FalsePositives:
    """The types of the false detections among the surest of each class.

    Attributes:
        classes: K class names.
        n_correct: (K,) int64, hits among the detections looked at.
        counts: (K, 4) int64, false detections by `ERROR_TYPES`.
        image: (F,) int64, position of the image of each detection looked at.
        row: (F,) int64, its row in that image's `Detections`.
        kind: (F,) int64, index into `ERROR_TYPES`, or CORRECT.
    """

    classes: tuple[str, ...]
    n_correct: NDArray[np.int64]
    counts: NDArray[np.int64]
    image: NDArray[np.int64]
    row: NDArray[np.int64]
    kind: NDArray[np.int64]

    def to_json(self) -> dict[str, Any]:
        """Return the counts by class and type."""
        return {
            name: {"correct": int(self.n_correct[k])}
            | dict(zip(ERROR_TYPES, self.counts[k].tolist(), strict=True))
            for k, name in enumerate(self.classes)
        }


def false_positive_types(
    matches: Matches, detections: Sequence[Detections], truths: Sequence[GroundTruth]
) -> FalsePositives:
    """Sort the false ones among the N surest detections of each class, N its number of objects.

    In this order: *localisation*: the detection overlaps an object of its class with IoU >= 0.1 (so it is
    loose, or a duplicate); *similar class*: IoU >= 0.1 with an object of a similar class; *other class*:
    with any other object; *background*: the rest. Similar classes are known for the names of Pascal VOC;
    between all others a confusion counts as other class. Difficult objects and crowds can be touched too;
    detections that the evaluation ignores are not looked at.

    Args:
        matches: of the same detections and labels.
        detections: one record per image.
        truths: one record per image.

    References:
        Hoiem et al., ECCV 2012, section 2; Girshick et al., arXiv 1311.2524v5, figure 5.
    """
    n_classes = len(matches.classes)
    similar = np.array([[_are_similar(a, b) for b in matches.classes] for a in matches.classes], bool)
    chosen = []
    for k in range(n_classes):
        rows = np.arange(len(matches.label))[matches.of_class(k)]
        rows = rows[matches.outcome[rows] != IGNORED]
        chosen.append(rows[: matches.n_objects[:, k].sum()])
    looked_at = np.concatenate([*chosen, np.zeros(0, np.int64)])
    kind = np.full(len(looked_at), CORRECT)
    for f in np.flatnonzero(matches.outcome[looked_at] != HIT):
        d = looked_at[f]
        truth = truths[matches.image[d]]
        box = detections[matches.image[d]].boxes[matches.row[d]]
        touched = truth.labels[iou(box[None], truth.boxes)[0] >= _MIN_TOUCH]
        label = matches.label[d]
        tests = ((touched == label).any(), similar[label, touched].any(), len(touched) > 0, True)
        kind[f] = tests.index(True)
    label = matches.label[looked_at]
    counts = np.zeros((n_classes, len(ERROR_TYPES)), np.int64)
    wrong = kind != CORRECT
    np.add.at(counts, (label[wrong], kind[wrong]), 1)
    n_correct = np.bincount(label[~wrong], minlength=n_classes)
    return FalsePositives(
        matches.classes, n_correct, counts, matches.image[looked_at], matches.row[looked_at], kind
    )


def _are_similar(first: str, second: str) -> bool:
    return first != second and any(first in group and second in group for group in _SIMILAR_SETS)
