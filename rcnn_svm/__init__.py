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
    from rcnn_svm.datasets.write import write_dataset as write_dataset
    from rcnn_svm.detector import Detector as Detector
    from rcnn_svm.detector import load_detector as load_detector
    from rcnn_svm.evaluation.coco import evaluate_coco as evaluate_coco
    from rcnn_svm.evaluation.exchange import write_coco_results as write_coco_results
    from rcnn_svm.evaluation.exchange import write_detections as write_detections
    from rcnn_svm.evaluation.voc import evaluate_voc as evaluate_voc
    from rcnn_svm.experiment.config import DataConfig as DataConfig
    from rcnn_svm.experiment.config import ExperimentConfig as ExperimentConfig
    from rcnn_svm.experiment.parts import Parts as Parts
    from rcnn_svm.experiment.parts import Run as Run
    from rcnn_svm.experiment.recipe import run_experiment as run_experiment
    from rcnn_svm.experiment.recipe import train_detector as train_detector
    from rcnn_svm.features.build import FeatureConfig as FeatureConfig
    from rcnn_svm.features.featurizers import SharedFeatures as SharedFeatures
    from rcnn_svm.features.featurizers import WarpedFeatures as WarpedFeatures
    from rcnn_svm.features.scaling import FeatureScaler as FeatureScaler
    from rcnn_svm.heads.assign import LabelRule as LabelRule
    from rcnn_svm.heads.bbox_regressor import BoxRegressor as BoxRegressor
    from rcnn_svm.heads.estimator import LinearSVM as LinearSVM
    from rcnn_svm.heads.estimator_head import EstimatorHead as EstimatorHead
    from rcnn_svm.heads.kernel_svm import KernelSVMHead as KernelSVMHead
    from rcnn_svm.heads.kernel_svm import NystroemSVMHead as NystroemSVMHead
    from rcnn_svm.heads.kernels import RBF as RBF
    from rcnn_svm.heads.kernels import HistogramIntersection as HistogramIntersection
    from rcnn_svm.heads.kernels import Polynomial as Polynomial
    from rcnn_svm.heads.linear_svm import LinearSVMHead as LinearSVMHead
    from rcnn_svm.heads.recipe import HeadRecipe as HeadRecipe
    from rcnn_svm.heads.softmax import LogisticHead as LogisticHead
    from rcnn_svm.heads.softmax import NetworkSoftmaxHead as NetworkSoftmaxHead
    from rcnn_svm.heads.softmax import SoftmaxHead as SoftmaxHead
    from rcnn_svm.networks.architectures import Architecture as Architecture
    from rcnn_svm.networks.backbone import load_backbone as load_backbone
    from rcnn_svm.postprocess import PostprocessConfig as PostprocessConfig
    from rcnn_svm.proposals import GridConfig as GridConfig
    from rcnn_svm.proposals import SelectiveSearchConfig as SelectiveSearchConfig
    from rcnn_svm.proposals import selective_search as selective_search
    from rcnn_svm.structures import Dataset as Dataset
    from rcnn_svm.structures import Detections as Detections
    from rcnn_svm.structures import GroundTruth as GroundTruth
    from rcnn_svm.structures import RegionSet as RegionSet
    from rcnn_svm.structures import Sample as Sample

__version__ = "0.1.0"

_HOMES = {
    "Architecture": "networks.architectures",
    "BoxRegressor": "heads.bbox_regressor",
    "DataConfig": "experiment.config",
    "Dataset": "structures",
    "Detections": "structures",
    "Detector": "detector",
    "EstimatorHead": "heads.estimator_head",
    "ExperimentConfig": "experiment.config",
    "FeatureConfig": "features.build",
    "FeatureScaler": "features.scaling",
    "GridConfig": "proposals",
    "GroundTruth": "structures",
    "HeadRecipe": "heads.recipe",
    "HistogramIntersection": "heads.kernels",
    "KernelSVMHead": "heads.kernel_svm",
    "LabelRule": "heads.assign",
    "LinearSVM": "heads.estimator",
    "LinearSVMHead": "heads.linear_svm",
    "LogisticHead": "heads.softmax",
    "NetworkSoftmaxHead": "heads.softmax",
    "NystroemSVMHead": "heads.kernel_svm",
    "Parts": "experiment.parts",
    "Polynomial": "heads.kernels",
    "PostprocessConfig": "postprocess",
    "RBF": "heads.kernels",
    "RegionSet": "structures",
    "Run": "experiment.parts",
    "Sample": "structures",
    "SelectiveSearchConfig": "proposals",
    "SharedFeatures": "features.featurizers",
    "SoftmaxHead": "heads.softmax",
    "Splits": "datasets",
    "WarpedFeatures": "features.featurizers",
    "evaluate_coco": "evaluation.coco",
    "evaluate_voc": "evaluation.voc",
    "load_backbone": "networks.backbone",
    "load_dataset": "datasets",
    "load_detector": "detector",
    "load_splits": "datasets",
    "read_image": "datasets",
    "run_experiment": "experiment.recipe",
    "selective_search": "proposals",
    "train_detector": "experiment.recipe",
    "write_coco_results": "evaluation.exchange",
    "write_dataset": "datasets.write",
    "write_detections": "evaluation.exchange",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
