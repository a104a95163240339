"""What the heads read: features as they are, fc6 and fc7 of our own, or a fine-tuned network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rcnn_svm.config import to_dict
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.experiment.measure import Meter
from rcnn_svm.experiment.regions import JoinedBlocks, SplitRegions, StoredBlocks
from rcnn_svm.features.backbone import Backbone, load_backbone
from rcnn_svm.features.build import build_featurizer
from rcnn_svm.features.fc_layers import FcLayers
from rcnn_svm.features.featurizers import SharedFeatures
from rcnn_svm.features.shared_training import frozen_layer
from rcnn_svm.features.store import DerivedStore, FeatureStore
from rcnn_svm.files import digest
from rcnn_svm.finetune import finetune, label_rule, train_fc_layers, tune_trunk
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.scorers import SoftmaxScorer
from rcnn_svm.structures import RegionSet

if TYPE_CHECKING:
    from rcnn_svm.features.build import ImageFeaturizer

__all__ = ["Network", "Representation", "learn_layers", "learning_views", "prepare_network"]


@dataclass(frozen=True, eq=False)
class Network:
    """The network that features are read from.

    Attributes:
        backbone: as loaded or fine-tuned.
        featurizer: regions of an image -> rows.
        softmax: the fine-tuned network's own last layer, or None.
        finetune_s: wall clock of fine-tuning.
        peak_rss_mb: largest memory meanwhile.
    """

    backbone: Backbone
    featurizer: ImageFeaturizer
    softmax: SoftmaxScorer | None
    finetune_s: float
    peak_rss_mb: float


@dataclass(frozen=True, eq=False)
class Representation:
    """The rows that heads are trained on.

    Attributes:
        network: whose features the rows are made of.
        store: of the rows.
        layers: learned on top of the network's features, or None.
        softmax: what learned the representation, as a head of its own; None where nothing was learned.
        regressor: the box regression that was learned with it, or None.
        learn_s: wall clock of learning.
        peak_rss_mb: largest memory meanwhile.
    """

    network: Network
    store: FeatureStore
    layers: FcLayers | None
    softmax: SoftmaxScorer | None
    regressor: BoxRegressor | None
    learn_s: float
    peak_rss_mb: float

    def blocks(self, regions: SplitRegions) -> StoredBlocks:
        """Return the rows of a split, unscaled."""
        return StoredBlocks(self.store, regions)

    def fill(self, regions: SplitRegions) -> None:
        """Compute and keep the rows of a split, so that training reads them from disk."""
        self.store.fill(regions.dataset.samples, regions.boxes, f"rows of {regions.dataset.split}")


def prepare_network(
    config: ExperimentConfig, train: SplitRegions, proposals: Mapping[str, RegionSet], cache: Path
) -> Network:
    """Load the network, fine-tuned on `train` by R-CNN's recipe where the configuration says so.

    Like R-CNN on VOC2010 and later, fine-tuning sees `train` alone, so that `val` stays unseen for
    the choice of everything after it [arXiv 1311.2524v5, section 2.4].

    Raises:
        ConfigError: the taps of a fine-tuned network do not end before its softmax, or `learn=trunk` cannot
            be trained on these features.
        WeightsError: the weights are missing, damaged or of another network.
    """
    start = load_backbone(config.features.backbone, config.features.weights, seed=config.seed)
    if config.learn != "network":
        featurizer = build_featurizer(config.features, start)
        if config.learn == "trunk":  # refused now, before anything is computed
            frozen_layer(_shared(featurizer), config.trunk.first_layer)
        return Network(start, featurizer, None, 0.0, 0.0)
    boxes = [proposals[sample.image_id].boxes for sample in train.dataset]
    identity = {
        "start": start.digest,
        "finetune": to_dict(config.finetune),
        "proposals": to_dict(config.proposals),
        "images": [sample.digest() for sample in train.dataset],
        "seed": config.seed,
    }
    checkpoint = cache / "finetuned" / f"{digest(identity)}.checkpoint"
    with Meter() as meter:
        tuned = finetune(
            start, train.dataset, boxes, config.finetune, seed=config.seed, checkpoint=checkpoint
        ).backbone
    featurizer = build_featurizer(config.features, tuned)
    weight, bias = tuned.softmax_layer()
    if weight.shape[1] != featurizer.n_features:
        raise ConfigError(
            f"features.taps: a fine-tuned network is read at the layer before its softmax, which has "
            f"{weight.shape[1]} numbers, got {config.features.taps!r} with {featurizer.n_features}."
        )
    return Network(tuned, featurizer, SoftmaxScorer(weight, bias), meter.seconds, meter.peak_rss_mb)


def learn_layers(
    config: ExperimentConfig, network: Network, base: FeatureStore, regions: SplitRegions, cache: Path
) -> Representation:
    """Learn what comes between the network and the heads, from the regions of a training split.

    Raises:
        ConfigError: `learn=trunk` with features that it cannot be trained on.
    """
    if config.learn in ("nothing", "network"):
        seconds, peak = network.finetune_s, network.peak_rss_mb
        return Representation(network, base, None, network.softmax, None, seconds, peak)
    store = base
    with Meter() as meter:
        if config.learn == "trunk":
            network, layers = _tuned(config, network, base, regions, cache)
            store = FeatureStore(base.root, network.featurizer, precision=config.features.precision)
        else:
            views = learning_views(config, network.backbone, base, regions)
            for view in views:
                part = view.regions
                view.store.fill(part.dataset.samples, part.boxes, f"features of {part.dataset.split}")
            layers = train_fc_layers(JoinedBlocks(views), config.fc, seed=config.seed)
    softmax = SoftmaxScorer(layers.class_weight.T, layers.class_bias)
    regressor = _own_regressor(layers) if config.fc.box_weight > 0 else None
    return Representation(
        network, DerivedStore(store, layers), layers, softmax, regressor, meter.seconds, meter.peak_rss_mb
    )


def _few(config: ExperimentConfig, regions: SplitRegions) -> SplitRegions:
    """Leave out background that will not be drawn, and would be pooled and stored for nothing."""
    return regions.thinned(label_rule(config.fc), config.fc.background, seed=config.seed)


def learning_views(
    config: ExperimentConfig, backbone: Backbone, base: FeatureStore, regions: SplitRegions
) -> list[StoredBlocks]:
    """Return what `learn=fc` learns from: images, and as configured their mirror images and other sizes."""
    few = _few(config, regions)
    seen = few.mirrored(with_truth=True) if config.fc.mirror else few
    views = [StoredBlocks(base, regions if config.reads_all_rows else few)]
    if config.fc.mirror:
        views.append(StoredBlocks(base, seen))
    for side in config.fc.other_sides:
        features = replace(config.features, longer_sides=(side,))
        store = FeatureStore(base.root, build_featurizer(features, backbone), precision=features.precision)
        views.append(StoredBlocks(store, seen))
    return views


def _tuned(
    config: ExperimentConfig, network: Network, base: FeatureStore, regions: SplitRegions, cache: Path
) -> tuple[Network, FcLayers]:
    few = _few(config, regions)
    base.fill(few.dataset.samples, few.boxes, f"features of {few.dataset.split}")
    backbone, layers = tune_trunk(
        StoredBlocks(base, few),
        few.dataset.samples,
        few.boxes,
        _shared(network.featurizer),
        network.backbone,
        config.fc,
        config.trunk,
        folder=cache / "tuned",
        seed=config.seed,
    )
    featurizer = build_featurizer(config.features, backbone)
    return Network(backbone, featurizer, None, network.finetune_s, network.peak_rss_mb), layers


def _shared(featurizer: ImageFeaturizer) -> SharedFeatures:
    if not isinstance(featurizer, SharedFeatures):
        raise ConfigError("learn=trunk trains on shared maps. Set features.path=shared, or learn=network.")
    return featurizer


def _own_regressor(layers: FcLayers) -> BoxRegressor:
    """Dress the box regression that was trained with the layers as a `BoxRegressor`."""
    n_classes, n_features = layers.n_classes, layers.n_features
    coef = layers.box_weight.T.reshape(n_classes, 4, n_features)
    return BoxRegressor.from_arrays(
        {"coef": np.ascontiguousarray(coef), "intercept": layers.box_bias.reshape(n_classes, 4)}
    )
