"""How the last blocks of a network are tuned on shared maps; plain data: reading it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from rcnn_svm.errors import ConfigError

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
    n_steps: int = 500
    images: int = 8
    regions: int = 64
    flip: bool = True
    learning_rate: float = 2e-4
    layers_rate: float = 1.5
    warm_up: float = 0.1
    weight_decay: float = 1e-4
    layers_decay: float = 6.0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name, least in (
            ("n_steps", 1),
            ("images", 1),
            ("regions", 2),
            ("checkpoint_every", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"TrunkConfig: {name} must be at least {least}, got {getattr(self, name)}.")
        for name in ("learning_rate", "layers_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"TrunkConfig: {name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.warm_up < 1 or self.weight_decay < 0 or self.layers_decay < 0:
            raise ConfigError(
                f"TrunkConfig: warm_up must be in [0, 1), weight_decay and layers_decay not negative, got "
                f"{self.warm_up}, {self.weight_decay} and {self.layers_decay}."
            )
