"""What a detector gets right and wrong on a split, all measures of it in one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.evaluation.breakdown import (
    COCO_SIZES,
    Breakdown,
    Disagreement,
    aspect_terciles,
    break_down,
    compare_images,
    labelled_flags,
    size_terciles,
)
from rcnn_svm.evaluation.errors import FalsePositives, false_positive_types
from rcnn_svm.evaluation.tide import TideResult, evaluate_tide
from rcnn_svm.evaluation.voc import FALSE, HIT, EvalResult
from rcnn_svm.structures import Detections, GroundTruth

__all__ = ["BelievedCounts", "Diagnosis", "diagnose", "disagreement"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Diagnosis:
    """A detector on a split.

    Attributes:
        name: for people.
        least: (K,) from which score on a detection of each class is believed.
        detections: one record per image, believed or not.
        evaluation: of them.
        tide: what each type of mistake costs.
        false_positives: the types of Hoiem and others among the surest.
        by: recall and AP by groups of objects: sizes, aspects, and flags that a label has.
    """

    name: str
    least: NDArray[np.floating]
    detections: Sequence[Detections]
    evaluation: EvalResult
    tide: TideResult
    false_positives: FalsePositives
    by: Mapping[str, Breakdown]

    def believed(self) -> BelievedCounts:
        """Count what believing the detections comes to."""
        matches, n_classes = self.evaluation.matches, len(self.evaluation.classes)
        sure = matches.score >= self.least[matches.label]
        hit = sure & (matches.outcome == HIT)
        false = sure & (matches.outcome == FALSE)
        again = false & (matches.overlap >= matches.min_iou)

        def counts(which: NDArray[np.bool_]) -> NDArray[np.int64]:
            return np.bincount(matches.label[which], minlength=n_classes)

        return BelievedCounts(
            matches.n_objects.sum(axis=0), counts(hit), counts(again), counts(false & ~again)
        )


@dataclass(frozen=True, eq=False)
class BelievedCounts:
    """What the detections of a split that are believed come to, class by class.

    Attributes:
        n_objects: (K,) int64, objects that count.
        found: (K,) those that a detection hit.
        duplicates: (K,) false detections that reach an object which another detection hit.
        false: (K,) all other false detections.
    """

    n_objects: NDArray[np.int64]
    found: NDArray[np.int64]
    duplicates: NDArray[np.int64]
    false: NDArray[np.int64]

    @property
    def missed(self) -> NDArray[np.int64]:
        """(K,) objects that were not found."""
        return self.n_objects - self.found

    def precision(self) -> NDArray[np.float64]:
        """Return (K,) the share of the detections that are right; nan where none is believed."""
        return _share(self.found, self.found + self.duplicates + self.false)

    def recall(self) -> NDArray[np.float64]:
        """Return (K,) the share of the objects that were found; nan where there is none."""
        return _share(self.found, self.n_objects)

    def f1(self) -> NDArray[np.float64]:
        """Return (K,) the harmonic mean of precision and recall; nan without objects and detections."""
        return _share(2 * self.found, self.found + self.duplicates + self.false + self.n_objects)


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def diagnose(
    name: str,
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    evaluation: EvalResult,
    least: NDArray[np.floating],
) -> Diagnosis:
    """Measure all that `Diagnosis` holds.

    Args:
        name: for people.
        detections: one record per image.
        truths: one record per image.
        evaluation: of them.
        least: (K,) from which score on a detection of each class is believed.
    """
    classes, matches = evaluation.classes, evaluation.matches
    groupings = [COCO_SIZES]
    if matches.n_objects.any():
        groupings += [size_terciles(truths), aspect_terciles(truths), *labelled_flags(truths)]
    return Diagnosis(
        name=name,
        least=least,
        detections=detections,
        evaluation=evaluation,
        tide=evaluate_tide(detections, truths, classes),
        false_positives=false_positive_types(matches, detections, truths),
        by={g.name: break_down(matches, detections, truths, g, rule=evaluation.rule) for g in groupings},
    )


def disagreement(first: Diagnosis, second: Diagnosis) -> Disagreement:
    """Return how two detectors differ image by image, each at its thresholds."""
    return compare_images((first.evaluation.matches, first.least), (second.evaluation.matches, second.least))
