"""fc6 and fc7 of our own on top of any features, for networks that have no fully connected layers.

`FcLayers` is the trained result, plain arrays. Calling it gives the last hidden layer, after
its ReLU and before the softmax, which is what the SVMs read; the softmax and the box regression that it was
trained with are there as well. `rcnn_svm.finetune.train_fc_layers` makes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import CacheError, ConfigError, ShapeError
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.files import bytes_digest
from rcnn_svm.structures import require_finite

__all__ = ["FcConfig", "FcLayers", "RowScaling"]

RowScaling = Literal["none", "l2", "sqrt-l2"]
_MAX_ROWS = 4096
"""Rows at a time through the layers: bounds the memory of a call."""


@dataclass(frozen=True)
class FcConfig:
    """How fc6 and fc7 of our own are trained.

    Attributes:
        hidden: units of each layer, `(1024,)` for fc6 alone, `(1024, 1024)` for fc6 and fc7.
        scaling: of rows before the first layer; every dimension is standardised after it.
        dropout: share of each layer's outputs that is dropped while training.
        positive_iou: a region is a positive of its best object's class when its IoU is >= this.
        negative_iou: a region is background when its best IoU is < this and >= `negative_low`.
        negative_low: see there; 0 takes all of the background, as R-CNN does.
        skip_difficult: do not learn from objects that are marked as difficult.
        mirror: learn from mirror images as well, which doubles the work of features; not where the
            network is trained too.
        other_sides: learn from the images (mirrored with `mirror`) at these sizes of their longer sides
            as well; on the shared path, and not where the network is trained too.
        background: so many background regions of an image can be drawn at all, themselves drawn once;
            all of them where the heads need every region's features anyway.
        batch_size: regions a step.
        positive_share: share of positives in a batch (R-CNN: 32 of 128).
        balanced: draw positives evenly over classes instead of evenly over regions.
        n_steps: training steps.
        optimizer: `adam` (with decoupled weight decay) or `sgd` (momentum 0.9).
        learning_rate: at the start; it falls to zero along a cosine.
        weight_decay: of weights, not of biases. With adam it is decoupled: a step takes the share
            `learning_rate * weight_decay` off a weight, 1.5 times the weight over the default schedule,
            which was worth 2 mAP on voc2007-mini. With sgd a thousandth of it is strong.
        box_weight: of the smooth L1 loss of box regression; 0 leaves the boxes out of the training.
    """

    hidden: tuple[int, ...] = (1024,)
    scaling: RowScaling = "none"
    dropout: float = 0.5
    positive_iou: float = 0.5
    negative_iou: float = 0.5
    negative_low: float = 0.0
    skip_difficult: bool = True
    mirror: bool = False
    other_sides: tuple[int, ...] = ()
    background: int = 256
    batch_size: int = 512
    positive_share: float = 0.25
    balanced: bool = True
    n_steps: int = 1500
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 2.0
    box_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.hidden or min(self.hidden) < 1:
            raise ConfigError(f"FcConfig: hidden must name one or more positive sizes, got {self.hidden}.")
        if self.scaling not in get_args(RowScaling):
            raise ConfigError(f"FcConfig: scaling must be none, l2 or sqrt-l2, got {self.scaling!r}.")
        if self.optimizer not in ("adam", "sgd"):
            raise ConfigError(f"FcConfig: optimizer must be adam or sgd, got {self.optimizer!r}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"FcConfig: dropout must be in [0, 1), got {self.dropout}.")
        if not 0 < self.positive_share < 1:
            raise ConfigError(f"FcConfig: positive_share must be in (0, 1), got {self.positive_share}.")
        if self.batch_size < 2 or self.n_steps < 1 or self.background < 1:
            raise ConfigError(
                f"FcConfig: batch_size must be at least 2, n_steps and background at least 1, got "
                f"{self.batch_size}, {self.n_steps} and {self.background}."
            )
        if not self.learning_rate > 0 or self.weight_decay < 0 or self.box_weight < 0:
            raise ConfigError(
                f"FcConfig: learning_rate must be positive, weight_decay and box_weight not negative, got "
                f"{self.learning_rate}, {self.weight_decay} and {self.box_weight}."
            )


@dataclass(frozen=True, eq=False)
class FcLayers:
    """Trained fully connected layers with their softmax and box regression.

    Attributes:
        weights: one (outputs, inputs) float32 matrix a layer.
        biases: one (outputs,) float32 vector a layer.
        class_weight: (H, K + 1) of the softmax, background last; `class_bias` (K + 1,).
        box_weight: (H, 4 K) of the box deltas, class by class; `box_bias` (4 K,).
        scaling: of rows before the first layer.

    Raises:
        DataError: an array holds NaN or infinity, which the ReLU would pass on as zeros.
    """

    weights: tuple[NDArray[np.float32], ...]
    biases: tuple[NDArray[np.float32], ...]
    class_weight: NDArray[np.float32]
    class_bias: NDArray[np.float32]
    box_weight: NDArray[np.float32]
    box_bias: NDArray[np.float32]
    scaling: RowScaling = "none"

    def __post_init__(self) -> None:
        require_finite("FcLayers", self.to_arrays())

    @property
    def n_features_in(self) -> int:
        """D, the length of the rows that it reads."""
        return int(self.weights[0].shape[1])

    @property
    def n_features(self) -> int:
        """H, the length of the rows that it returns."""
        return int(self.weights[-1].shape[0])

    @property
    def n_classes(self) -> int:
        """K, without the background."""
        return int(self.class_weight.shape[1]) - 1

    @cached_property
    def key(self) -> dict[str, Any]:
        """Identity: equal keys promise equal results."""
        parts = [(k, v) for k, v in sorted(self.to_arrays().items())]
        content = [b for k, v in parts for b in (k.encode(), str(v.shape).encode(), v.tobytes())]
        return {"layers": "fc", "weights": bytes_digest(*content)}

    def __call__(self, features: NDArray[Any]) -> NDArray[np.float32]:
        """Return (R, H) float32: the last hidden layer, after its ReLU and before the softmax.

        Args:
            features: (R, D) float rows, as the layers were trained on.

        Raises:
            ShapeError: rows of another length.
        """
        if features.ndim != 2 or features.shape[1] != self.n_features_in:
            raise ShapeError(
                f"FcLayers: features must have shape (R, {self.n_features_in}), got {features.shape}."
            )
        from rcnn_svm.features.products import linear_relu

        scale = FeatureScaler(self.scaling)
        out = np.empty((len(features), self.n_features), np.float32)
        for start in range(0, len(features), _MAX_ROWS):
            x = scale(features[start : start + _MAX_ROWS])
            for weight, bias in zip(self.weights, self.biases, strict=True):
                x = linear_relu(x, weight, bias)
            out[start : start + _MAX_ROWS] = x
        return out

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (R, K + 1) what the softmax is taken of, background last, from `__call__`'s result."""
        return np.asarray(hidden @ self.class_weight + self.class_bias, np.float32)

    def scores(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (R, K + 1) softmax probabilities, background last, from `__call__`'s result."""
        logits = self.logits(hidden)
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
        return logits

    def deltas(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (R, K, 4) box deltas of every class for `boxes.decode_deltas`, from `__call__`'s result."""
        flat = np.asarray(hidden @ self.box_weight + self.box_bias, np.float32)
        return flat.reshape(len(hidden), self.n_classes, 4)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return named arrays that `from_arrays` turns back into the same layers."""
        arrays: dict[str, NDArray[Any]] = {}
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            arrays[f"fc{6 + i}.weight"], arrays[f"fc{6 + i}.bias"] = weight, bias
        return arrays | {
            "class.weight": self.class_weight,
            "class.bias": self.class_bias,
            "box.weight": self.box_weight,
            "box.bias": self.box_bias,
            "scaling": np.array([get_args(RowScaling).index(self.scaling)]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Restore layers from `to_arrays`.

        Raises:
            CacheError: an array is missing or the shapes do not fit together.
            DataError: an array is not finite.
        """
        try:
            n_layers = sum(name.startswith("fc") and name.endswith(".weight") for name in arrays)
            weights = tuple(arrays[f"fc{6 + i}.weight"] for i in range(n_layers))
            biases = tuple(arrays[f"fc{6 + i}.bias"] for i in range(n_layers))
            scaling: RowScaling = get_args(RowScaling)[int(arrays["scaling"][0])]
            class_weight, class_bias = arrays["class.weight"], arrays["class.bias"]
            box_weight, box_bias = arrays["box.weight"], arrays["box.bias"]
        except (KeyError, IndexError) as error:
            raise CacheError(f"FcLayers: the saved arrays lack {error}. Train the layers again.") from error
        sizes = [weight.shape[1] for weight in weights[1:]] + [class_weight.shape[0]]
        if not weights or [weight.shape[0] for weight in weights] != sizes:
            raise CacheError("FcLayers: the saved arrays do not fit together. Train the layers again.")
        return cls(weights, biases, class_weight, class_bias, box_weight, box_bias, scaling)
