"""What is trained before the heads: nothing, fc6 and fc7 of our own, last blocks too, or a whole network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from rcnn_svm.config import to_dict
from rcnn_svm.detector import Refinement
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.measure import Meter
from rcnn_svm.experiment.parts import Parts, Run
from rcnn_svm.experiment.regions import JoinedBlocks, SplitRegions, StoredBlocks
from rcnn_svm.features.build import build_featurizer
from rcnn_svm.features.fc_layers import FcLayers
from rcnn_svm.features.featurizers import SharedFeatures
from rcnn_svm.features.store import DerivedStore, FeatureStore, Featurizer, fill_together
from rcnn_svm.files import bytes_digest, digest
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.scorers import SoftmaxScorer
from rcnn_svm.networks import detection
from rcnn_svm.networks.backbone import Backbone
from rcnn_svm.progress import say
from rcnn_svm.proposals import WholeImage
from rcnn_svm.structures import Dataset, RegionSet
from rcnn_svm.training.config import FcConfig, FinetuneConfig, TrunkConfig
from rcnn_svm.training.crops import finetune
from rcnn_svm.training.fc import train_fc_layers
from rcnn_svm.training.trunk import frozen_layer, tune_trunk

__all__ = [
    "FcOnFrozen",
    "FineTuned",
    "Frozen",
    "Learner",
    "Network",
    "Representation",
    "TunedTrunk",
    "rows_around_objects",
    "settled",
]


@dataclass(frozen=True, eq=False)
class Network:
    """The network that features are read from.

    Attributes:
        backbone: as loaded or fine-tuned; None where a featurizer of one's own needs none.
        featurizer: regions of an image -> rows.
        softmax: the fine-tuned network's own last layer, or None.
        finetune_s: wall clock of fine-tuning.
        peak_rss_mb: largest memory meanwhile.
    """

    backbone: detection.Network | None
    featurizer: Featurizer
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
        refinement: what refines boxes, where that is there already; None where it is trained with the heads.
    """

    network: Network
    store: FeatureStore
    layers: FcLayers | None
    softmax: SoftmaxScorer | None
    regressor: BoxRegressor | None
    learn_s: float
    peak_rss_mb: float
    refinement: Refinement | None = None

    def blocks(self, regions: SplitRegions) -> StoredBlocks:
        """Return the rows of a split, unscaled."""
        return StoredBlocks(self.store, regions, softmax=self.softmax)

    def fill(self, regions: SplitRegions) -> None:
        """Compute and keep the rows of a split, so that training reads them from disk."""
        self.store.fill(regions.dataset.samples, regions.boxes, f"rows of {regions.dataset.split}")


class Learner(Protocol):
    """What is trained before the heads.

    Attributes:
        has_softmax: whether a softmax is trained, which can be a head of its own.
        has_boxes: whether box regression is trained.
        tunes_network: whether features wait for a network that is fine-tuned on regions first.
        reads_first: whether it learns from the features of the network as it is prepared.
    """

    @property
    def has_softmax(self) -> bool:
        """See above."""
        ...

    @property
    def has_boxes(self) -> bool:
        """See above."""
        ...

    tunes_network: ClassVar[bool]
    reads_first: ClassVar[bool]

    def check(self, parts: Parts) -> None:
        """Refuse parts that it cannot work with, before anything is computed.

        Raises:
            ConfigError: it cannot.
        """
        ...

    def prepare(
        self, parts: Parts, train: SplitRegions, proposals: Mapping[str, RegionSet], run: Run
    ) -> Network:
        """Load or train the network, on the images of `train` at most.

        Like R-CNN on VOC2010 and later, fine-tuning sees `train` alone, so that `val` stays unseen for
        the choice of everything after it [arXiv 1311.2524v5, section 2.4].

        Raises:
            ConfigError: a network that it cannot train.
            WeightsError: the weights are missing, damaged or of another network.
        """
        ...

    def views(
        self, parts: Parts, network: Network, base: FeatureStore, regions: SplitRegions
    ) -> list[StoredBlocks]:
        """Return the rows of the network that are read while layers are learned from a training split."""
        ...

    def learn(
        self, parts: Parts, network: Network, base: FeatureStore, regions: SplitRegions, run: Run
    ) -> Representation:
        """Learn what comes between the network and the heads, from the regions of a training split."""
        ...


def _start(parts: Parts) -> detection.Network:
    """Return the network before anything is learned: the one handed in, or the one that its words name."""
    features = parts.features
    return parts.backbone or detection.load_network(features.backbone, features.weights, seed=parts.seed)


def _loaded(parts: Parts, device: str) -> Network:
    """Return the network as it is."""
    if parts.featurizer is not None:
        return Network(None, parts.featurizer, None, 0.0, 0.0)
    backbone = _start(parts)
    return Network(backbone, build_featurizer(parts.features, backbone, device=device), None, 0.0, 0.0)


def _require_trainable(parts: Parts, what: str) -> None:
    """See that there is a network that can be trained."""
    if parts.featurizer is not None:
        raise ConfigError(
            f"learn={what} trains a network, which a featurizer of your own has not. Set learn=fc."
        )
    if parts.reads_detection:
        raise ConfigError(
            f"learn={what} trains a network that classifies, got one that was trained to detect, which is "
            f"read as it is. Set learn=fc or learn=nothing."
        )


@dataclass(frozen=True)
class Frozen:
    """Nothing is trained: features as they are."""

    has_softmax: ClassVar[bool] = False
    has_boxes: ClassVar[bool] = False
    tunes_network: ClassVar[bool] = False
    reads_first: ClassVar[bool] = True

    def check(self, parts: Parts) -> None:
        """See `Learner`."""

    def prepare(
        self, parts: Parts, train: SplitRegions, proposals: Mapping[str, RegionSet], run: Run
    ) -> Network:
        """See `Learner`."""
        return _loaded(parts, run.device)

    def views(
        self, parts: Parts, network: Network, base: FeatureStore, regions: SplitRegions
    ) -> list[StoredBlocks]:
        """See `Learner`."""
        return [StoredBlocks(base, regions)]

    def learn(
        self, parts: Parts, network: Network, base: FeatureStore, regions: SplitRegions, run: Run
    ) -> Representation:
        """See `Learner`."""
        return Representation(
            network, base, None, network.softmax, None, network.finetune_s, network.peak_rss_mb
        )


@dataclass(frozen=True)
class FcOnFrozen:
    """fc6 and fc7 of our own are trained on the features of a network that stays as it is.

    Attributes:
        fc: how.
    """

    fc: FcConfig
    has_softmax: ClassVar[bool] = True
    tunes_network: ClassVar[bool] = False
    reads_first: ClassVar[bool] = True

    @property
    def has_boxes(self) -> bool:
        """Whether box regression is trained."""
        return self.fc.box_weight > 0

    def check(self, parts: Parts) -> None:
        """See `Learner`."""
        if self.fc.other_sides and (parts.features.path != "shared" or parts.featurizer is not None):
            path = "a featurizer of your own" if parts.featurizer is not None else "features.path=warped"
            raise ConfigError(f"fc.other_sides needs the shared path, got {self.fc.other_sides} with {path}.")
        if self.fc.other_sides and parts.reads_detection:
            raise ConfigError(
                f"fc.other_sides must be empty with a network that was trained to detect, which resizes "
                f"images by itself, got {self.fc.other_sides}. Set fc.other_sides=[]."
            )

    def prepare(
        self, parts: Parts, train: SplitRegions, proposals: Mapping[str, RegionSet], run: Run
    ) -> Network:
        """See `Learner`."""
        return _loaded(parts, run.device)

    def views(
        self, parts: Parts, network: Network, base: FeatureStore, regions: SplitRegions
    ) -> list[StoredBlocks]:
        """Return the images, and as configured their mirror images and other sizes."""
        few = _few(self.fc, parts, regions)
        seen = few.mirrored(with_truth=True) if self.fc.mirror else few
        views = [StoredBlocks(base, regions if parts.reads_all_rows else few)]
        if self.fc.mirror:
            views.append(StoredBlocks(base, seen))
        for side in self.fc.other_sides or ():
            assert isinstance(network.featurizer, SharedFeatures)
            assert network.backbone is not None  # `check` saw to both
            features = replace(parts.features, longer_sides=(side,))
            featurizer = build_featurizer(features, network.backbone, device=network.featurizer.device)
            store = FeatureStore(base.root, featurizer, precision=features.precision, engine=base.engine)
            views.append(StoredBlocks(store, seen))
        return views

    def learn(
        self, parts: Parts, network: Network, base: FeatureStore, regions: SplitRegions, run: Run
    ) -> Representation:
        """See `Learner`."""
        with Meter() as meter:
            views = self.views(parts, network, base, regions)
            around = [rows_around_objects(parts, network, regions, run)] if parts.refines else []
            fill_together([view.wanted for view in (*views, *around)], f"features of {regions.dataset.split}")
            layers = train_fc_layers(
                JoinedBlocks(views),
                self.fc,
                seed=parts.seed,
                device=run.device,
                ranks=run.ranks,
                n_own=_own_columns(network.featurizer),
            )
        return _with_layers(network, base, layers, self.fc, meter)


_SMALL = 1 / 3
"""Half of the objects have sides below this share of the image's: most would be read far below the 224 pixels
that networks were trained on."""


def settled(parts: Parts, trainval: Dataset) -> Parts:
    """Return the parts with what hangs on the training images decided, and say so where it is out of the way.

    Images with small objects are read at two sizes, see `FeatureConfig.longer_sides`, and fc6 and fc7 learn
    from few images in another way, see `FcConfig.for_images`, where that can be done: on shared maps of a
    network that classifies, and not of whole images.

    Args:
        parts: of an experiment.
        trainval: what it trains on.
    """
    learner, features = parts.learner, parts.features
    if features.path != "shared" or parts.featurizer is not None or parts.reads_detection:
        return parts
    sides = features.sides
    if not isinstance(learner, FcOnFrozen) or isinstance(parts.proposer, WholeImage):
        return replace(parts, features=replace(features, longer_sides=sides))
    n_images, objects = len(trainval), trainval.relative_sides()
    fc = learner.fc.for_images(n_images, len(trainval.classes), max(sides))
    if fc.other_sides and learner.fc.other_sides is None:
        others = " and ".join(map(str, fc.other_sides))
        say(f"{n_images} images are few: they are learned from with longer sides of {others} pixels too.")
    if features.longer_sides is None and not parts.choose and len(objects) and np.median(objects) < _SMALL:
        sides = features.small_objects_sides
        say(
            f"Half of the objects are smaller than {np.median(objects):.0%} of the image's longer side: "
            f"images are read with longer sides of {' and '.join(map(str, sides))} pixels."
        )
    features = replace(features, longer_sides=sides)
    return replace(parts, features=features, learner=replace(learner, fc=fc))


@dataclass(frozen=True)
class TunedTrunk:
    """fc6 and fc7 of our own, then together with the last blocks of the network, on whole images.

    Attributes:
        fc: the first part.
        trunk: the second.
    """

    fc: FcConfig
    trunk: TrunkConfig
    has_softmax: ClassVar[bool] = True
    tunes_network: ClassVar[bool] = False
    reads_first: ClassVar[bool] = False

    @property
    def has_boxes(self) -> bool:
        """Whether box regression is trained."""
        return self.fc.box_weight > 0

    def check(self, parts: Parts) -> None:
        """See `Learner`."""
        _require_trainable(parts, "trunk")
        if self.fc.scaling not in (None, "none"):
            raise ConfigError(
                f"fc.scaling must be none with learn=trunk, which trains through unscaled rows, "
                f"got {self.fc.scaling!r}."
            )
        if (self.fc.groups or 1) > 1:
            raise ConfigError(
                f"fc.groups must be 1 with learn=trunk, which trains one, got {self.fc.groups}."
            )
        if self.fc.mirror or self.fc.other_sides:
            raise ConfigError(
                "fc.mirror and fc.other_sides must be off with learn=trunk, which sees mirror images later. "
                "Set trunk.flip instead."
            )

    def prepare(
        self, parts: Parts, train: SplitRegions, proposals: Mapping[str, RegionSet], run: Run
    ) -> Network:
        """See `Learner`."""
        network = _loaded(parts, run.device)
        frozen_layer(_shared(network.featurizer), self.trunk.first_layer)  # refused now, before the work
        return network

    def views(
        self, parts: Parts, network: Network, base: FeatureStore, regions: SplitRegions
    ) -> list[StoredBlocks]:
        """Return what the first part reads."""
        return [StoredBlocks(base, _few(self.fc, parts, regions))]

    def learn(
        self, parts: Parts, network: Network, base: FeatureStore, regions: SplitRegions, run: Run
    ) -> Representation:
        """See `Learner`."""
        assert isinstance(network.backbone, Backbone)  # `check` saw to it
        with Meter() as meter:
            (view,) = self.views(parts, network, base, regions)
            few = view.regions
            base.fill(few.dataset.samples, few.boxes, f"features of {few.dataset.split}")
            backbone, layers = tune_trunk(
                view,
                few.dataset.samples,
                few.boxes,
                _shared(network.featurizer),
                network.backbone,
                self.fc,
                self.trunk,
                folder=run.cache / "tuned",
                seed=parts.seed,
                ranks=run.ranks,
            )
            featurizer = build_featurizer(parts.features, backbone, device=run.device)
            tuned = Network(backbone, featurizer, None, network.finetune_s, network.peak_rss_mb)
            store = FeatureStore(
                base.root, featurizer, precision=parts.features.precision, engine=base.engine
            )
        return _with_layers(tuned, store, layers, self.fc, meter)


@dataclass(frozen=True)
class FineTuned:
    """R-CNN's fine-tuning of the whole network on warped region proposals.

    Attributes:
        finetune: how.
    """

    finetune: FinetuneConfig
    has_softmax: ClassVar[bool] = True
    has_boxes: ClassVar[bool] = False
    tunes_network: ClassVar[bool] = True
    reads_first: ClassVar[bool] = True

    def check(self, parts: Parts) -> None:
        """See `Learner`."""
        _require_trainable(parts, "network")

    def prepare(
        self, parts: Parts, train: SplitRegions, proposals: Mapping[str, RegionSet], run: Run
    ) -> Network:
        """See `Learner`; also refuses taps that do not end before the softmax."""
        start = _start(parts)
        assert isinstance(start, Backbone)  # `check` saw to it
        _ = start.softmax_layer()  # a network that has none is refused before it is trained
        boxes = [proposals[sample.image_id].boxes for sample in train.dataset]
        identity = {
            "start": start.digest,
            "finetune": to_dict(self.finetune),
            "regions": bytes_digest(*(np.ascontiguousarray(own).tobytes() for own in boxes)),
            "images": [sample.digest() for sample in train.dataset],
            "seed": parts.seed,
        }
        checkpoint = run.cache / "finetuned" / f"{digest(identity)}.checkpoint"
        with Meter() as meter:
            tuned = finetune(
                start,
                train.dataset,
                boxes,
                self.finetune,
                seed=parts.seed,
                checkpoint=checkpoint,
                device=run.device,
                ranks=run.ranks,
            ).backbone
        featurizer = build_featurizer(parts.features, tuned, device=run.device)
        weight, bias = tuned.softmax_layer()
        if weight.shape[1] != featurizer.n_features:
            raise ConfigError(
                f"features.taps: a fine-tuned network is read at the layer before its softmax, which has "
                f"{weight.shape[1]} numbers, got {parts.features.taps!r} with {featurizer.n_features}."
            )
        return Network(tuned, featurizer, SoftmaxScorer(weight, bias), meter.seconds, meter.peak_rss_mb)

    def views(
        self, parts: Parts, network: Network, base: FeatureStore, regions: SplitRegions
    ) -> list[StoredBlocks]:
        """See `Learner`."""
        return [StoredBlocks(base, regions)]

    def learn(
        self, parts: Parts, network: Network, base: FeatureStore, regions: SplitRegions, run: Run
    ) -> Representation:
        """See `Learner`: all was learned when the network was prepared."""
        return Frozen().learn(parts, network, base, regions, run)


def _with_layers(
    network: Network, store: FeatureStore, layers: FcLayers, config: FcConfig, meter: Meter
) -> Representation:
    softmax = SoftmaxScorer(layers.class_weight.T, layers.class_bias)
    regressor = _own_regressor(layers) if config.box_weight > 0 else None
    return Representation(
        network, DerivedStore(store, layers), layers, softmax, regressor, meter.seconds, meter.peak_rss_mb
    )


def rows_around_objects(parts: Parts, network: Network, regions: SplitRegions, run: Run) -> StoredBlocks:
    """Return the regions around the objects of a split, as what refines boxes reads them."""
    backbone, reader, refine = network.backbone, network.featurizer, parts.refine
    assert backbone is not None  # `Parts` saw to it
    features = replace(parts.features, taps=refine.taps or backbone.fine_taps)
    if isinstance(reader, SharedFeatures):  # one pass is for both
        features = replace(features, longer_sides=reader.longer_sides)
    featurizer = build_featurizer(features, backbone, device=run.device)
    store = FeatureStore(run.cache / "features", featurizer, precision=features.precision, engine=run.engine)
    around = regions.around_objects(refine.overlap_from, refine.near, refine.jitter, seed=parts.seed)
    return StoredBlocks(store, around)


def _few(config: FcConfig, parts: Parts, regions: SplitRegions) -> SplitRegions:
    """Leave out background that will not be drawn, and would be pooled and stored for nothing."""
    return regions.thinned(config.rule, config.background, seed=parts.seed)


def _own_columns(featurizer: Featurizer) -> int | None:
    """Return how many columns say what is inside a region, before those of its surroundings; None for all."""
    if not isinstance(featurizer, SharedFeatures):
        return None
    around = [columns.start for tap, columns in featurizer.columns.items() if tap.widen != 1]
    return min(around, default=None)


def _shared(featurizer: Featurizer) -> SharedFeatures:
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
