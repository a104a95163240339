"""R-CNN with per-class SVMs: region proposals, fc7 features, linear and RBF SVMs against a softmax.

Ten lines from photographs to detections:

    from rcnn_svm import load_detector, load_splits, read_image, train_detector

    splits = load_splits("fruit")
    result = train_detector(splits)
    print(result.evaluation.map())
    result.detector.save("fruit-detector")
    found = load_detector("fruit-detector").detect(read_image("photo.jpg"))
    print(found.boxes, found.scores, found.labels)

Everything here is loaded when it is first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcnn_svm.datasets import Splits as Splits
    from rcnn_svm.datasets import load_dataset as load_dataset
    from rcnn_svm.datasets import load_splits as load_splits
    from rcnn_svm.datasets import read_image as read_image
    from rcnn_svm.detector import Detector as Detector
    from rcnn_svm.detector import load_detector as load_detector
    from rcnn_svm.evaluation.voc import evaluate_voc as evaluate_voc
    from rcnn_svm.experiment.config import ExperimentConfig as ExperimentConfig
    from rcnn_svm.experiment.recipe import run_experiment as run_experiment
    from rcnn_svm.experiment.recipe import train_detector as train_detector
    from rcnn_svm.proposals import SelectiveSearchConfig as SelectiveSearchConfig
    from rcnn_svm.proposals import selective_search as selective_search
    from rcnn_svm.structures import Dataset as Dataset
    from rcnn_svm.structures import Detections as Detections
    from rcnn_svm.structures import GroundTruth as GroundTruth

__version__ = "0.1.0"

_HOMES = {
    "Dataset": "structures",
    "Detections": "structures",
    "Detector": "detector",
    "ExperimentConfig": "experiment.config",
    "GroundTruth": "structures",
    "SelectiveSearchConfig": "proposals",
    "Splits": "datasets",
    "evaluate_voc": "evaluation.voc",
    "load_dataset": "datasets",
    "load_detector": "detector",
    "load_splits": "datasets",
    "read_image": "datasets",
    "run_experiment": "experiment.recipe",
    "selective_search": "proposals",
    "train_detector": "experiment.recipe",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
