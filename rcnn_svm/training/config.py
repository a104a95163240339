"""How fc layers, last blocks and whole networks are trained: plain data, whose reading needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from rcnn_svm.config import Count, Interval, NotNegative, Positive, Share, Values, check
from rcnn_svm.errors import ConfigError
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.heads.assign import LabelRule

__all__ = ["FEW_IMAGES", "FcConfig", "FinetuneConfig", "RefineConfig", "TrunkConfig"]


FEW_IMAGES = 100
"""With fewer to train on, fc6 and fc7 learn in groups and from other sizes of them, unless told otherwise."""

_GROUPS = 4
"""Of the units, with few images."""
_NEGATIVE_IOU, _FEW_NEGATIVE_IOU = 0.5, 0.3
"""Background lies below the second with no more images than classes, else below the first."""


@dataclass(frozen=True)
class FcConfig:
    """How fc6 and fc7 of our own are trained.

    Attributes:
        hidden: units of each layer, `(1024,)` for fc6 alone, `(1024, 1024)` for fc6 and fc7.
        scaling: of rows before the first layer; every dimension is standardised after it. `region-l2` gives
            length 1 to what is read of a region itself (the taps before the first that is widened), and
            leaves what is around it as it is. None is `region-l2` where regions are read on shared maps of a
            network that classifies, and `none` elsewhere and with `learn=trunk`.
        groups: so many parts of each layer's units learn by themselves, from draws of their own, and what
            they say is averaged: as large a network, which few labels fool less. None is 4 with fewer than
            `FEW_IMAGES` on the shared path, else 1.
        dropout: share of each layer's outputs that is dropped while training.
        positive_iou: a region is a positive of its best object's class when its IoU is >= this.
        negative_iou: a region is background when its best IoU is < this and >= `negative_low`. None is 0.3
            with no more images than classes on the shared path, where what lies half on one of few objects
            says little, else 0.5.
        negative_low: see there; 0 takes all of the background, as R-CNN does.
        skip_difficult: do not learn from objects that are marked as difficult.
        mirror: learn from mirror images as well, which doubles the work of features; not where the
            network is trained too.
        other_sides: learn from the images (mirrored with `mirror`) at these sizes of their longer sides
            as well; on the shared path, and not where the network is trained too. None takes none, and with
            fewer than `FEW_IMAGES` on the shared path 0.8 and 1.33 times the larger of `FeatureConfig.sides`.
        background: so many background regions of an image can be drawn at all, themselves drawn once;
            all of them where the heads need every region's features anyway.
        batch_size: regions a step.
        positive_share: share of positives in a batch (R-CNN: 32 of 128); 1 trains without background, which
            whole images have none of.
        balanced: draw positives evenly over classes instead of evenly over regions.
        n_steps: training steps; None takes 200 and 20 for every class, at most 1000.
        optimizer: `adam` (with decoupled weight decay) or `sgd` (momentum 0.9).
        learning_rate: at the start; it falls to zero along a cosine.
        weight_decay: of weights, not of biases. With adam it is decoupled: a step takes the share
            `learning_rate * weight_decay` off a weight, 1.5 times the weight over the default schedule,
            which was worth 2 mAP on voc2007-mini. With sgd a thousandth of it is strong.
        box_weight: of the smooth L1 loss of box regression; 0 leaves the boxes out of the training.
    """

    hidden: Annotated[tuple[Count, ...], Values(least=1)] = (1024,)
    scaling: Literal["none", "l2", "sqrt-l2", "region-l2"] | None = None
    groups: Count | None = None
    dropout: Annotated[float, Interval(0, 1, "left")] = 0.5
    positive_iou: Share = 0.5
    negative_iou: Share | None = None
    negative_low: Share = 0.0
    skip_difficult: bool = True
    mirror: bool = False
    other_sides: tuple[Count, ...] | None = None
    background: Count = 256
    batch_size: Annotated[int, Interval(2)] = 512
    positive_share: Annotated[float, Interval(0, 1, "right")] = 0.25
    balanced: bool = True
    n_steps: Count | None = None
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 2.0
    box_weight: NotNegative = 1.0

    def __post_init__(self) -> None:
        check(self, where="fc")
        if (self.groups or 1) > min(self.hidden):
            raise ConfigError(
                f"fc.groups must be at most the units of each layer, {min(self.hidden)}, got {self.groups}."
            )
        _ = self.rule  # one that contradicts itself is refused now

    @property
    def rule(self) -> LabelRule:
        """Which regions are positives and which background."""
        negative_iou = _NEGATIVE_IOU if self.negative_iou is None else self.negative_iou
        return LabelRule(self.positive_iou, negative_iou, self.negative_low, self.skip_difficult)

    def scaler(self, n_own: int | None) -> FeatureScaler:
        """Return what scales rows whose first `n_own` columns are the region's; None where all are."""
        if self.scaling == "region-l2":
            return FeatureScaler("l2", n_own)
        return FeatureScaler(self.scaling or "none")

    def steps(self, n_classes: int) -> int:
        """Return the number of training steps for so many classes."""
        return self.n_steps or min(200 + 20 * n_classes, 1000)

    def for_images(self, n_images: int, n_classes: int, side: int) -> Self:
        """Return the same with what hangs on the number of images decided, on the shared path.

        Args:
            n_images: to train on.
            n_classes: K.
            side: pixels of the longer side that images are read at.
        """
        few = n_images < FEW_IMAGES
        clear = few and n_images <= n_classes and self.negative_low < _FEW_NEGATIVE_IOU <= self.positive_iou
        sides = (round(0.8 * side), round(4 / 3 * side)) if few else ()
        return replace(
            self,
            other_sides=sides if self.other_sides is None else self.other_sides,
            scaling=self.scaling or "region-l2",
            groups=self.groups or (min(_GROUPS, *self.hidden) if few else 1),
            negative_iou=_FEW_NEGATIVE_IOU if clear and self.negative_iou is None else self.negative_iou,
        )

    def of_group(self) -> Self:
        """Return how one of the groups learns: with its share of the units of each layer, rounded down."""
        groups = self.groups or 1
        return replace(self, hidden=tuple(n // groups for n in self.hidden), groups=1)


@dataclass(frozen=True)
class TrunkConfig:
    """The recipe for tuning the end of a network together with fc6 and fc7 of our own, on whole images.

    Label rule, share of positives, dropout and the weight of box regression are those of `FcConfig`.

    Attributes:
        first_layer: train from this map layer on; the ones before it stay, and their maps are computed
            once and kept on disk. Empty for the network's own (`Architecture.trunk_from`).
        n_steps: training steps.
        images: a step; each is drawn for one class, all classes alike.
        regions: drawn from each of them.
        flip: take the mirror image with probability one half.
        learning_rate: of the network; it rises over `warm_up`, then falls to zero along a cosine.
        layers_rate: how many times faster fc6, fc7 and what follows them learn.
        warm_up: fraction of the schedule over which the learning rate rises.
        weight_decay: of the network's weights, not of biases; decoupled.
        layers_decay: the same of fc6, fc7 and what follows them. As in `FcConfig` it takes a large one to
            matter.
        checkpoint_every: steps between checkpoints.
    """

    first_layer: str = ""
    n_steps: Count = 500
    images: Count = 8
    regions: Annotated[int, Interval(2)] = 64
    flip: bool = True
    learning_rate: Positive = 2e-4
    layers_rate: Positive = 1.5
    warm_up: Annotated[float, Interval(0, 1, "left")] = 0.1
    weight_decay: NotNegative = 1e-4
    layers_decay: NotNegative = 6.0
    checkpoint_every: Count = 100

    def __post_init__(self) -> None:
        check(self, where="trunk")


@dataclass(frozen=True)
class RefineConfig:
    """How the refiner of boxes is trained, which `detect.refined` asks for.

    Attributes:
        taps: layers that it reads, see `FeatureConfig`; empty for the network's own
            (`Backbone.fine_taps`), whose cells reach over the border of a box.
        hidden: units of its layer.
        dropout: share of its outputs that is dropped while training.
        jitter: boxes drawn around each object, each side moved by up to a quarter of the object's.
        near: so many of an image's proposals around objects at most.
        overlap_from: it learns to tell the IoU of regions whose IoU is >= this,
        boxes_from: and to move those whose IoU is >= this.
        max_rows: of regions in memory at once, the rarer classes whole.
        batch_size: regions a step, a quarter of them below `boxes_from`.
        n_steps: training steps; None takes 300 and 20 for every class, at most 700.
        learning_rate: at the start; it falls to zero along a cosine.
        weight_decay: of weights, decoupled, see `FcConfig`.
    """

    taps: str = ""
    hidden: Count = 256
    dropout: Annotated[float, Interval(0, 1, "left")] = 0.5
    jitter: Annotated[int, Interval(0)] = 16
    near: Annotated[int, Interval(0)] = 64
    overlap_from: Annotated[float, Interval(0, 1, "neither")] = 0.3
    boxes_from: Annotated[float, Interval(0, 1, "neither")] = 0.5
    max_rows: Count = 30_000
    batch_size: Annotated[int, Interval(4)] = 256
    n_steps: Count | None = None
    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 2.0

    def __post_init__(self) -> None:
        check(self, where="refine")
        if self.boxes_from < self.overlap_from:
            raise ConfigError(
                f"refine.boxes_from must be at least refine.overlap_from, {self.overlap_from}, got "
                f"{self.boxes_from}."
            )

    def steps(self, n_classes: int) -> int:
        """Return the number of training steps for so many classes."""
        return self.n_steps or min(300 + 20 * n_classes, 700)


@dataclass(frozen=True)
class FinetuneConfig:
    """The recipe of R-CNN's fine-tuning, on a shorter schedule; `paper()` is the published one.

    Attributes:
        n_steps: training steps.
        batch_size: crops a step.
        positive_share: share of positives in a batch (R-CNN: 32 of 128); 1 trains without background, which
            whole images have none of.
        positive_iou: a region is a positive of its best object's class when its IoU is >= this.
        negative_iou: a region is background when its best IoU is < this.
        flip: mirror each crop with probability one half.
        optimizer: `sgd` with momentum, or `adam`.
        learning_rate: of weights; biases learn twice as fast and do not decay.
        head_rate: how many times faster the new last layer learns.
        decay_at: fractions of the schedule at which the learning rate falls to a tenth.
        momentum: of `sgd`.
        weight_decay: of weights.
        first_layer: train from this layer on and leave the ones before it as they are; empty trains all.
        checkpoint_every: steps between checkpoints.
    """

    n_steps: Count = 1000
    batch_size: Annotated[int, Interval(2)] = 128
    positive_share: Annotated[float, Interval(0, 1, "right")] = 0.25
    positive_iou: Share = 0.5
    negative_iou: Share = 0.5
    flip: bool = True
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: Positive = 1e-3
    head_rate: Positive = 10.0
    decay_at: tuple[Annotated[float, Interval(0, 1, "neither")], ...] = (0.7,)
    momentum: Annotated[float, Interval(0, 1, "left")] = 0.9
    weight_decay: NotNegative = 5e-4
    first_layer: str = ""
    checkpoint_every: Count = 250

    def __post_init__(self) -> None:
        check(self, where="finetune")
        _ = self.rule

    @property
    def rule(self) -> LabelRule:
        """Which regions are positives and which background."""
        return LabelRule(self.positive_iou, self.negative_iou)

    @classmethod
    def paper(cls) -> Self:
        """Return the published schedule: 70,000 steps, a tenth of the rate after each 20,000.

        References:
            Girshick et al., arXiv 1311.2524v5, section 2.3; rbgirshick/rcnn, finetuning/voc_2007_trainval.
        """
        return cls(n_steps=70_000, decay_at=(2 / 7, 4 / 7, 6 / 7), checkpoint_every=1000)

    @classmethod
    def from_scratch(cls) -> Self:
        """Return a schedule for `small_cnn` with random weights: about a minute on two cores."""
        return cls(n_steps=800, optimizer="adam", learning_rate=1.5e-3, head_rate=1.0, decay_at=(0.6, 0.85))
