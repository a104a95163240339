"""How a whole network is fine-tuned on warped regions; plain data, so that reading it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from rcnn_svm.config import Count, Interval, NotNegative, Positive, Share, check

__all__ = ["FinetuneConfig"]


@dataclass(frozen=True)
class FinetuneConfig:
    """The recipe of R-CNN's fine-tuning, on a shorter schedule; `paper()` is the published one.

    Attributes:
        n_steps: training steps.
        batch_size: crops a step.
        positive_share: share of positives in a batch (R-CNN: 32 of 128).
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
    positive_share: Annotated[float, Interval(0, 1, "neither")] = 0.25
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
