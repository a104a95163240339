"""New classes join a detector whose network and layers stay as they are: linear SVMs know nothing of another.

What was learned before, weights of the older classes included, is kept bit for bit; `digest_of` proves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.datasets import Splits
from rcnn_svm.detector import Detector, Model, Refinement
from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.thresholds import Thresholds
from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.experiment.learning import Frozen, Network, Representation
from rcnn_svm.experiment.parts import BoxRecipe, Parts, PostprocessGrid, Run
from rcnn_svm.experiment.recipe import HeadResult, run_experiment
from rcnn_svm.experiment.regions import SplitRegions
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.features.store import DerivedStore, FeatureStore
from rcnn_svm.files import bytes_digest
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.recipe import HeadRecipe
from rcnn_svm.heads.refiner import BoxRefiner
from rcnn_svm.heads.scorers import LinearScorer
from rcnn_svm.postprocess import PostprocessConfig
from rcnn_svm.structures import Dataset, RegionSet

__all__ = ["Kept", "add_classes", "digest_of", "more_images", "own_recipe", "read_by", "require_joinable"]


@dataclass(frozen=True, eq=False)
class Kept(Frozen):
    """The network and layers of a detector, as they are: nothing is trained before the heads.

    Attributes:
        detector: whose they are.
    """

    detector: Detector

    def prepare(
        self, parts: Parts, train: SplitRegions, proposals: Mapping[str, RegionSet], run: Run
    ) -> Network:
        """See `Learner`."""
        return Network(self.detector.backbone, self.detector.featurizer, None, 0.0, 0.0)

    def learn(
        self, parts: Parts, network: Network, base: FeatureStore, regions: SplitRegions, run: Run
    ) -> Representation:
        """See `Learner`."""
        refinement, classes = self.detector.model.refinement, regions.dataset.classes
        if refinement is not None and classes != self.detector.classes:
            refinement = replace(refinement, refiner=_refiner(refinement).of_others(len(classes)))
        return Representation(
            network, self.rows(base), self.detector.layers, None, None, 0.0, 0.0, refinement
        )

    def rows(self, base: FeatureStore) -> FeatureStore:
        """Return what the detector's heads read of the features of its network."""
        layers = self.detector.layers
        return base if layers is None else DerivedStore(base, layers)


def own_recipe(detector: Detector, config: ExperimentConfig) -> HeadRecipe:
    """Return the head of a detector with the one setting that was chosen for it.

    Args:
        detector: made by `train`.
        config: that it was trained with.

    Raises:
        ConfigError: its head has no name of ours.
    """
    heads = replace(config.heads, names=(detector.head.partition("+")[0],))  # type: ignore[arg-type]
    (recipe,) = heads.build(seed=config.seed)
    chosen = detector.info.get("details", {}).get("settings", {})
    return replace(recipe, grid={key: [chosen.get(key, value)] for key, value in recipe.settled().items()})


def require_joinable(detector: Detector, where: str) -> None:
    """Refuse a detector whose classes depend on each other.

    Args:
        detector: that classes are to join.
        where: its folder, for the message.

    Raises:
        ConfigError: it has no linear SVMs, or classifies whole images.
    """
    if type(detector.model.scorer) is not LinearScorer:
        raise ConfigError(
            f"{where}: classes can join linear SVMs, each of which is its own; this detector's head is "
            f"{detector.head}, whose classes share what was learned. Train it with --head linear-svm."
        )
    if detector.whole_images:
        raise ConfigError(
            f"{where}: classes can join a detector of objects, this one classifies whole images."
        )


def add_classes(detector: Detector, splits: Splits, config: ExperimentConfig, run: Run) -> HeadResult:
    """Train linear SVMs for new classes on what a detector reads, and put them behind its own.

    Thresholds and curves of probabilities of the new classes come from images of `splits` that are held out,
    where that can be done, else they are believed from a score of 0 on, and the detector is no longer
    calibrated. Where boxes are refined, those of a new class are as the mean of the older classes has it.

    Args:
        detector: see `require_joinable`.
        splits: labelled with the new classes alone.
        config: that the detector was trained with.
        run: cache, threads and device.

    Returns:
        The result of the new classes on test of `splits`; its detector knows the older classes too.

    Raises:
        ConfigError: parts that do not work together.
        DataError: as `run_experiment`.
    """
    result = _trained(detector, splits, config, run)
    return replace(result, detector=_joined(detector, detector, result.detector))


def more_images(
    detector: Detector, before: Splits, more: Splits, config: ExperimentConfig, run: Run
) -> HeadResult:
    """Train the SVMs of all classes of a detector again, on further images as well.

    Args:
        detector: see `require_joinable`.
        before: the images that it was trained on.
        more: further ones, whose objects of its classes are all labelled. Both labelled with its classes.
        config: that it was trained with.
        run: cache, threads and device.

    Returns:
        The result on test of `before`.

    Raises:
        ConfigError: parts that do not work together.
        DataError: as `run_experiment`.
    """
    known = {sample.image_id for part in (before.trainval, before.test) for sample in part}

    def together(first: Dataset, second: Dataset) -> Dataset:
        further = [
            replace(sample, image_id=f"{second.name}/{sample.image_id}")
            if sample.image_id in known
            else sample
            for sample in second
        ]
        return replace(first, samples=(*first.samples, *further))

    splits = Splits(
        together(before.train, more.train),
        together(before.val, more.val),
        together(before.trainval, more.trainval),
        before.test,
        before.notes,
    )
    result = _trained(detector, splits, config, run)
    joined = replace(_joined(detector, result.detector, None), info=result.detector.info)
    return replace(result, detector=joined)


def digest_of(detector: Detector, n_classes: int) -> str:
    """Return the SHA-256 of all numbers that scores and boxes of the first `n_classes` classes depend on."""
    scorer, regressor = detector.model.scorer, detector.model.regressor
    assert isinstance(scorer, LinearScorer)
    arrays = [scorer.coef[:n_classes], scorer.intercept[:n_classes]]
    if regressor is not None:
        arrays += [regressor.coef_[:n_classes], regressor.intercept_[:n_classes]]
    if detector.model.refinement is not None:
        refiner = _refiner(detector.model.refinement)
        arrays += [refiner.hidden_weight, refiner.hidden_bias]
        arrays += [refiner.weight[:n_classes], refiner.bias[:n_classes]]
    if detector.layers is not None:
        arrays += [array for _, array in sorted(detector.layers.to_arrays().items())]
    network = "" if detector.backbone is None else detector.backbone.digest
    return bytes_digest(network.encode(), *(np.ascontiguousarray(array).tobytes() for array in arrays))


def _trained(detector: Detector, splits: Splits, config: ExperimentConfig, run: Run) -> HeadResult:
    """Train SVMs on the rows of a detector, with the settings of its own."""
    postprocess, boxes = detector.postprocess, None
    if detector.model.regressor is not None:
        strengths, scaling = (
            sorted(set(config.heads.ridge_strengths)),
            _scaling(detector.model.regressor_scaler),
        )
        if scaling == "none":  # of learned layers: R-CNN's strength, for rows of the length that it has them
            strengths, scaling = [1000.0], "mean-norm-20"
        boxes = BoxRecipe(strengths, scaling, config.heads.ridge_min_iou)
    step, snap = 1.0, 0.0
    if isinstance(postprocess, PostprocessConfig):
        step, snap = postprocess.box_step, postprocess.snap
    parts = replace(config, choose=False, learn="nothing").build(
        proposer=detector.proposer,
        features=detector.features,
        learner=Kept(detector),
        heads=[replace(own_recipe(detector, config), scaling=_scaling(detector.model.scaler))],
        boxes=boxes,
        postprocess=postprocess,
        tried=PostprocessGrid(box_steps=(step,), snaps=(snap,), unrefined=False),
        test_regions=detector.n_proposals,
    )
    experiment = run_experiment(parts, splits, run)
    return next(result for result in experiment.heads.values() if result.preferred)


def _refiner(refinement: Refinement) -> BoxRefiner:
    assert isinstance(refinement.refiner, BoxRefiner)  # others come with an export, which has no network
    return refinement.refiner


def _scaling(scaler: FeatureScaler | None) -> str:
    return "none" if scaler is None else scaler.scaling


def _factor(scaler: FeatureScaler | None) -> float:
    """Return what a scaler multiplies all rows with; 1 for one that looks at each row by itself."""
    return 1.0 if scaler is None or scaler.factor_ is None else scaler.factor_


def read_by(coef: NDArray[np.float32], own: FeatureScaler | None, other: FeatureScaler | None) -> Any:
    """Return weights for rows that `own` scales as weights for rows that `other` scales.

    Args:
        coef: of any shape.
        own: None for rows as they are. A scaler that looks at each row by itself must be the same as `other`.
        other: the same.
    """
    return np.asarray(coef * np.float32(_factor(own) / _factor(other)), np.float32)


def _joined(detector: Detector, first: Detector, second: Detector | None) -> Detector:
    """Return a detector with the classes of one or two others, whose weights its scalers are to serve."""
    parts = [part for part in (first, second) if part is not None]
    scorers = [part.model.scorer for part in parts]
    model = detector.model
    coefs, intercepts = [], []
    for part, scorer in zip(parts, scorers, strict=True):
        assert isinstance(scorer, LinearScorer)
        same = part is detector  # not touched, not even multiplied by one
        coefs.append(scorer.coef if same else read_by(scorer.coef, part.model.scaler, model.scaler))
        intercepts.append(scorer.intercept)
    regressor = None if model.regressor is None else _joined_boxes(detector, parts)
    refinement = model.refinement
    if refinement is not None and second is not None:
        refiner = _refiner(refinement)
        refinement = replace(refinement, refiner=refiner.joined(refiner.of_others(len(second.classes))))
    classes = tuple(name for part in parts for name in part.classes)
    return replace(
        detector,
        classes=classes,
        model=Model(
            LinearScorer(np.concatenate(coefs), np.concatenate(intercepts)),
            model.scaler,
            regressor,
            model.regressor_scaler,
            refinement=refinement,
        ),
        thresholds=_joined_thresholds(parts),
        calibration=_joined_curves(parts),
    )


def _joined_boxes(detector: Detector, parts: list[Detector]) -> BoxRegressor:
    """Return the box regression of several; one without leaves boxes where they are."""
    scaler = detector.model.regressor_scaler
    n_features = detector.model.regressor.coef_.shape[2]  # type: ignore[union-attr]
    coefs, intercepts = [], []
    for part in parts:
        own = part.model.regressor
        if own is None:
            coefs.append(np.zeros((len(part.classes), 4, n_features), np.float32))
            intercepts.append(np.zeros((len(part.classes), 4), np.float32))
            continue
        same = part is detector
        coefs.append(own.coef_ if same else read_by(own.coef_, part.model.regressor_scaler, scaler))
        intercepts.append(own.intercept_)
    return BoxRegressor.from_arrays({"coef": np.concatenate(coefs), "intercept": np.concatenate(intercepts)})


def _joined_thresholds(parts: list[Detector]) -> Thresholds | None:
    """Return the thresholds of several; what they promise of all classes together nobody has measured."""
    if len(parts) == 1 or parts[0].thresholds is None:
        return parts[0].thresholds
    held = [_threshold_of(part) for part in parts]
    first, second = held
    alarms = None
    if first.false_alarms is not None and second.false_alarms is not None:
        alarms = np.concatenate([first.false_alarms, second.false_alarms])
    return Thresholds(
        (*first.classes, *second.classes),
        np.concatenate([first.scores, second.scores]),
        np.concatenate([first.precision, second.precision]),
        np.concatenate([first.recall, second.recall]),
        np.concatenate([first.n_objects, second.n_objects]),
        min(first.n_images, second.n_images),
        alarms,
        {},
        first.aim if dict(first.aim) == dict(second.aim) else {},
    )


def _threshold_of(part: Detector) -> Thresholds:
    """Return the thresholds of a detector; a margin of 0 where no image could be held out."""
    if part.thresholds is not None:
        return part.thresholds
    n, unknown = len(part.classes), np.full(len(part.classes), np.nan)
    return Thresholds(part.classes, np.zeros(n, np.float32), unknown, unknown, np.zeros(n, np.int64), 0)


def _joined_curves(parts: list[Detector]) -> Any:
    """Return the curves of several; None where one of them is not calibrated."""
    curves = [part.calibration for part in parts]
    if any(one is None for one in curves):
        return None
    joined = curves[0]
    for one in curves[1:]:
        joined = joined.joined(one)  # type: ignore[union-attr, arg-type]
    return joined
