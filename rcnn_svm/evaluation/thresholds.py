"""From which score on a detection is believed: one threshold per class, chosen on images held out.

numpy only: what is chosen is kept in the detector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import DataError
from rcnn_svm.evaluation.voc import HIT, IGNORED, Matches
from rcnn_svm.structures import Detections

__all__ = ["PRIOR_OBJECTS", "Thresholds", "choose_thresholds"]

PRIOR_OBJECTS = 10.0
"""All classes together weigh as much as so many objects in the choice for one: with few objects of a class
its own best threshold is chance."""


@dataclass(frozen=True, eq=False)
class Thresholds:
    """A threshold per class, and what it gave on the images that it was chosen on.

    Attributes:
        classes: K class names.
        scores: (K,) float32; a detection is believed when its score is >= that of its class.
        precision: (K,) share of the believed detections that were right; nan where none was believed.
        recall: (K,) share of the objects that were found; nan where there was none.
        n_objects: (K,) objects that it was chosen on.
        n_images: images that it was chosen on.
    """

    classes: tuple[str, ...]
    scores: NDArray[np.float32]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    n_objects: NDArray[np.int64]
    n_images: int

    def believed(self, found: Detections) -> Detections:
        """Return the detections that reach the threshold of their class."""
        return found[found.scores >= self.scores[found.labels]]

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain data; figures in percent, null where there are none."""

        def percent(value: float) -> float | None:
            return None if np.isnan(value) else 100 * float(value)

        return {
            "n_images": self.n_images,
            "classes": {
                name: {
                    "score": float(self.scores[k]),
                    "precision": percent(self.precision[k]),
                    "recall": percent(self.recall[k]),
                    "n_objects": int(self.n_objects[k]),
                }
                for k, name in enumerate(self.classes)
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], classes: Sequence[str], *, where: str) -> Self:
        """Read what `to_json` made.

        Args:
            values: the record.
            classes: the classes of the detector, which it must name.
            where: the file, for messages.

        Raises:
            DataError: a class or a figure is missing.
        """

        def share(value: float | None) -> float:
            return float("nan") if value is None else float(value) / 100

        try:
            rows = [values["classes"][name] for name in classes]
            return cls(
                tuple(classes),
                np.array([row["score"] for row in rows], np.float32),
                np.array([share(row["precision"]) for row in rows]),
                np.array([share(row["recall"]) for row in rows]),
                np.array([row["n_objects"] for row in rows], np.int64),
                int(values["n_images"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where}: the thresholds are damaged ({error}). Train it again.") from error


def choose_thresholds(matches: Matches, *, prior_objects: float = PRIOR_OBJECTS) -> Thresholds:
    """Choose the threshold of each class that gives the best F1.

    A class is judged by its own detections and, as `prior_objects` further objects, by those of all classes:
    with one class, or many objects of each, that changes nothing. A threshold lies halfway between the last
    score that is believed and the next one. Where nothing was ever right it lies above everything seen.

    Args:
        matches: of detections in images that the detector was not trained on.
        prior_objects: see there; 0 lets each class decide alone.
    """
    counted = matches.outcome != IGNORED
    score, label = matches.score[counted].astype(np.float64), matches.label[counted]
    hit = (matches.outcome[counted] == HIT).astype(np.float64)
    n_objects = matches.n_objects.sum(axis=0)
    order = np.argsort(-score, kind="stable")
    score, label, hit = score[order], label[order], hit[order]
    # Equal scores are believed together or not at all.
    last = np.flatnonzero(np.append(score[1:] < score[:-1], len(score) > 0))
    prior = prior_objects / max(int(n_objects.sum()), 1)
    n_classes = len(matches.classes)
    chosen = np.zeros(n_classes, np.float32)
    precision, recall = np.full(n_classes, np.nan), np.full(n_classes, np.nan)
    for k in range(n_classes):
        own = label == k
        right, believed = (np.cumsum(weight)[last] for weight in (hit * (own + prior), own + prior))
        total = n_objects[k] + prior_objects
        f1 = 2 * right / np.maximum(believed + total, 1e-12)
        if len(f1) and f1.max() > 0:
            best = int(f1.argmax())
            lower = score[last[best] + 1] if last[best] + 1 < len(score) else score[last[best]] - 1.0
            chosen[k] = (score[last[best]] + lower) / 2
        elif len(score):
            chosen[k] = score[0] + 1.0
        sure = own & (score >= chosen[k])
        if sure.any():
            precision[k] = hit[sure].mean()
        if n_objects[k]:
            recall[k] = hit[sure].sum() / n_objects[k]
    n_images = len(matches.n_objects)
    return Thresholds(matches.classes, chosen, precision, recall, n_objects.astype(np.int64), n_images)
