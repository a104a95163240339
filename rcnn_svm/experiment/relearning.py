"""The SVMs of a detector trained again on corrected images, all else left as it is: seconds on kept features.

Nothing is chosen and nothing measured: cost and thresholds stay, and what they promised is forgotten.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rcnn_svm.cache import CacheLimit
from rcnn_svm.detector import Detector
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.experiment.joining import Kept, own_recipe
from rcnn_svm.experiment.parts import Run
from rcnn_svm.experiment.recipe import propose
from rcnn_svm.experiment.regions import SplitRegions, StoredBlocks
from rcnn_svm.features.store import FeatureStore
from rcnn_svm.heads.scorers import LinearScorer
from rcnn_svm.structures import Dataset

__all__ = ["relearned", "require_relearnable"]


def require_relearnable(detector: Detector, where: str) -> None:
    """Refuse a detector whose head cannot be trained on its features alone, or not on its own images.

    Args:
        detector: that is to be trained again.
        where: its folder, for the message.

    Raises:
        ConfigError: its scores are not those of linear SVMs, or classes have joined it.
    """
    if type(detector.model.scorer) is not LinearScorer:
        raise ConfigError(
            f"{where}: linear SVMs can be trained again within seconds, this detector's head is "
            f"{detector.head}. Train it with --head linear-svm."
        )
    if "added" in detector.info:
        raise ConfigError(
            f"{where}: classes have joined this detector from data in which the others are not labelled. To "
            f"train it again, train it anew on data that label all."
        )


def relearned(detector: Detector, images: Dataset, config: ExperimentConfig, run: Run) -> Detector:
    """Train the SVMs of all classes again, on the rows that a detector reads.

    The cost is that which was chosen when it was trained. Box regression stays; so do thresholds, whose
    promises go, and the detector is no longer calibrated: both were measured with other weights.

    Args:
        detector: see `require_relearnable`.
        images: labelled with its classes, each of which has an object.
        config: that it was trained with.
        run: cache, threads and device.

    Raises:
        ConfigError: a head that has no name.
        DataError: an image cannot be read, or a class has no object.
    """
    recipe = own_recipe(detector, config)
    room = CacheLimit(run.cache, run.cache_limit)
    regions = SplitRegions.of(images, propose(images, detector.proposer, run), with_truth=True)
    base = FeatureStore(
        run.cache / "features", detector.featurizer, precision=detector.features.precision, engine=run.engine
    )
    store = Kept(detector).rows(base)
    store.fill(images.samples, regions.boxes)
    blocks = StoredBlocks(store, regions, detector.model.scaler)
    (fitted,) = recipe.fit(blocks, recipe.settings(), n_jobs=run.n_jobs)
    room.hold(finished=True)
    thresholds = detector.thresholds
    if thresholds is not None:
        unknown = np.full(len(detector.classes), np.nan)
        thresholds = replace(thresholds, precision=unknown, recall=unknown, false_alarms=None, promised={})
    return replace(
        detector,
        model=replace(detector.model, scorer=fitted.scorer),
        thresholds=thresholds,
        calibration=None,
    )
