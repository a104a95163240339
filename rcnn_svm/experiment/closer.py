"""A closer look at three heads of a study: how far their probabilities can be believed, and their mistakes.

The heads are trained on `train` with the settings that the study chose; curves that make probabilities of
margins, and thresholds, come from `val`, and all is measured on `test`, without box regression: what is
compared are scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.detector import Detector, Model
from rcnn_svm.evaluation.calibration import (
    Calibrator,
    IsotonicScaling,
    PlattScaling,
    Reliability,
    equal_mass_edges,
    equal_width_edges,
    measure_reliability,
)
from rcnn_svm.evaluation.diagnosis import Diagnosis, diagnose
from rcnn_svm.evaluation.thresholds import Thresholds, choose_thresholds
from rcnn_svm.evaluation.voc import HIT, IGNORED, Matches, evaluate_voc
from rcnn_svm.experiment.learning import Representation
from rcnn_svm.experiment.recipe import Prepared, detector_of
from rcnn_svm.experiment.regions import StoredBlocks
from rcnn_svm.experiment.selection import ScoredImage, detected, score_images
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.heads.recipe import HeadRecipe
from rcnn_svm.postprocess import Postprocess

__all__ = ["Belief", "CloserLook", "Probabilities", "look_closer", "probabilities_of"]

_REGIONS = 100
"""Regions of an image whose probabilities are judged, drawn at random: a few hundred images say enough."""
_BINS, _DRAWN_BINS = 15, 10
_POSITIVE_IOU = 0.5

Judged: TypeAlias = tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]
"""(N,) margins, whether what they say is so, the class of each, and its image."""


@dataclass(frozen=True, eq=False)
class Belief:
    """Probabilities against what was so.

    Attributes:
        measured: their errors, in bins that hold as many probabilities each, nearly all of which are close to
            0.
        drawn: in bins of equal width, for a diagram from 0 to 1.
    """

    measured: Reliability
    drawn: Reliability


@dataclass(frozen=True, eq=False)
class Probabilities:
    """How far probabilities can be believed, by how they are made of scores.

    Attributes:
        regions: of regions, one for each class: does it overlap an object of the class with IoU >= 0.5?
        detections: of detections after NMS: is it a hit?
    """

    regions: Mapping[str, Belief]
    detections: Mapping[str, Belief]


@dataclass(frozen=True, eq=False, kw_only=True)
class CloserLook(Diagnosis):
    """One head, trained on `train`, diagnosed on test.

    Attributes:
        thresholds: with the best F1 on val, from which `least` is.
        probabilities: made of its scores.
        detector: what made the detections, to look at further regions with it.
    """

    thresholds: Thresholds
    probabilities: Probabilities
    detector: Detector


def look_closer(
    name: str,
    recipe: HeadRecipe,
    settings: Mapping[str, object],
    ready: Prepared,
    learned: Representation,
    scaler: FeatureScaler | None,
    detect: Postprocess,
) -> CloserLook:
    """Train a head once more and look at what it says of val and of test.

    Args:
        name: for people.
        recipe: the head.
        settings: that were chosen for it.
        ready: the splits: trained on is `train`, curves and thresholds come from `val`, `test` is looked at.
        learned: their rows, from `train`.
        scaler: fitted on `train`.
        detect: from scores to detections.
    """
    train, val, test = (learned.blocks(split) for split in (ready.train, ready.val, ready.test))
    (fitted,) = recipe.fit(train.scaled(scaler), [settings], n_jobs=ready.run.n_jobs)
    support = None if fitted.support is None else train.told(fitted.support)
    model = Model(fitted.scorer, scaler, support=support)
    classes, truths, parts = test.classes, test.regions.truths, ready.parts
    seed, rule = parts.seed, parts.rule
    judged, found, matches = {}, {}, {}
    for split, blocks in (("val", val), ("test", test)):
        scored = list(score_images(blocks, model))
        judged[split] = _judged_regions(blocks, scored, seed)
        found[split] = detected(blocks, scored, detect)
        own = evaluate_voc(found[split], blocks.regions.truths, classes, rule=rule)
        matches[split] = own.matches
    evaluation = own
    is_softmax = recipe.head.about["family"] == "softmax"
    resampling = {"n_images": len(test), "n_resamples": parts.n_bootstrap, "seed": seed}
    probabilities = Probabilities(
        probabilities_of(judged["val"], judged["test"], len(classes), is_softmax, **resampling),
        probabilities_of(
            _judged_detections(matches["val"]),
            _judged_detections(matches["test"]),
            len(classes),
            is_softmax,
            **resampling,
        ),
    )
    thresholds = choose_thresholds(matches["val"])
    diagnosis = diagnose(name, found["test"], truths, evaluation, thresholds.scores)
    return CloserLook(
        **vars(diagnosis),
        thresholds=thresholds,
        probabilities=probabilities,
        detector=detector_of(name, parts, learned, model, detect, thresholds, classes),
    )


def probabilities_of(
    val: Judged,
    test: Judged,
    n_classes: int,
    is_softmax: bool,
    *,
    n_images: int,
    n_resamples: int,
    seed: int,
) -> dict[str, Belief]:
    """Make probabilities of margins in several ways, curves fitted on val, and judge them on test.

    Args:
        val: margins on the split that curves are fitted on.
        test: on the one that is measured.
        n_classes: K.
        is_softmax: the margins are log-odds of probabilities of its own, which are judged too.
        n_images: of test.
        n_resamples: of the intervals.
        seed: of the resamples.
    """
    margins, outcomes, labels, _ = val
    ways: dict[str, Calibrator] = {}
    if is_softmax:
        ways["as it is"] = PlattScaling(np.ones(n_classes), np.zeros(n_classes), np.ones(n_classes, bool))
    ways["Platt"] = PlattScaling.fit(margins, outcomes, labels, n_classes)
    ways["isotonic"] = IsotonicScaling.fit(margins, outcomes, labels, n_classes)
    margins, outcomes, labels, images = test
    judged = {}
    for name, calibrator in ways.items():
        probabilities = calibrator(margins, labels)
        judged[name] = Belief(
            *(
                measure_reliability(
                    probabilities,
                    outcomes,
                    images,
                    edges,
                    n_images=n_images,
                    n_resamples=n_resamples,
                    seed=seed,
                )
                for edges in (equal_mass_edges(probabilities, _BINS), equal_width_edges(_DRAWN_BINS))
            )
        )
    return judged


def _judged_regions(blocks: StoredBlocks, scored: Sequence[ScoredImage], seed: int) -> Judged:
    """Draw regions of each image; each is judged for every class."""
    columns: list[tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]] = []
    for i, image in enumerate(scored):
        n_gt = blocks.regions.n_gt[i]
        overlap = blocks.truth(i).overlap[n_gt:]
        rows = np.random.default_rng([seed, i]).permutation(len(overlap))[:_REGIONS]
        margins = image.scores[rows]
        labels = np.broadcast_to(np.arange(margins.shape[1]), margins.shape)
        columns.append(
            (
                margins.ravel(),
                (overlap[rows] >= _POSITIVE_IOU).ravel(),
                labels.ravel(),
                np.full(margins.size, i, np.int64),
            )
        )
    margins, outcomes, labels, images = (np.concatenate(own) for own in zip(*columns, strict=True))
    return margins, outcomes, labels, images


def _judged_detections(matches: Matches) -> Judged:
    counted = matches.outcome != IGNORED
    return (
        matches.score[counted],
        matches.outcome[counted] == HIT,
        matches.label[counted],
        matches.image[counted],
    )
