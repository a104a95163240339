"""How the last blocks of a network are tuned on shared maps; plain data: reading it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rcnn_svm.config import Count, Interval, NotNegative, Positive, check

__all__ = ["TrunkConfig"]


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
