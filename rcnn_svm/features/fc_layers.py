"""fc6 and fc7 of our own on top of any features, for networks that have no fully connected layers.

`FcLayers` is the trained result, plain arrays. Calling it gives the last hidden layer, after
its ReLU and before the softmax, which is what the SVMs read; the softmax and the box regression that it was
trained with are there as well. `rcnn_svm.training.fc.train_fc_layers` makes one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import CacheError, ShapeError
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.files import bytes_digest
from rcnn_svm.structures import require_finite

__all__ = ["FcLayers", "HiddenLayer", "RowScaling"]

RowScaling = Literal["none", "l2", "sqrt-l2"]
_MAX_ROWS = 4096
"""Rows at a time through the layers: bounds the memory of a call."""


@dataclass(frozen=True, eq=False)
class FcLayers:
    """Trained fully connected layers with their softmax and box regression.

    Attributes:
        weights: one (outputs, inputs) float32 matrix a layer.
        biases: one (outputs,) float32 vector a layer.
        class_weight: (H, K + 1) of the softmax, background last; `class_bias` (K + 1,).
        box_weight: (H, 4 K) of the box deltas, class by class; `box_bias` (4 K,).
        scaling: of rows before the first layer.
        n_scaled: it is of so many of the first columns, the others stay as they are; None for all of them.

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
    n_scaled: int | None = None

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

    @property
    def scaler(self) -> FeatureScaler:
        """What scales rows before the first layer."""
        return FeatureScaler(self.scaling, self.n_scaled)

    @cached_property
    def key(self) -> dict[str, Any]:
        """Identity; equal keys promise equal results."""
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
        return self._hidden(features, len(self.weights))

    def _hidden(self, features: NDArray[Any], depth: int) -> NDArray[np.float32]:
        if features.ndim != 2 or features.shape[1] != self.n_features_in:
            raise ShapeError(
                f"FcLayers: features must have shape (R, {self.n_features_in}), got {features.shape}."
            )
        from rcnn_svm.networks.products import linear_relu

        scale = self.scaler
        out = np.empty((len(features), len(self.biases[depth - 1])), np.float32)
        for start in range(0, len(features), _MAX_ROWS):
            x = scale(features[start : start + _MAX_ROWS])
            for weight, bias in zip(self.weights[:depth], self.biases, strict=False):
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
        if self.n_scaled is not None:
            arrays["n_scaled"] = np.array([self.n_scaled])
        return arrays | {
            "class.weight": self.class_weight,
            "class.bias": self.class_bias,
            "box.weight": self.box_weight,
            "box.bias": self.box_bias,
            "scaling": np.array([get_args(RowScaling).index(self.scaling)]),
        }

    @classmethod
    def averaged(cls, groups: Sequence[Self]) -> Self:
        """Return the layers whose logits and deltas are the means of those of some, up to rounding.

        Args:
            groups: at least one, of as many layers and classes each, which scale rows alike. Their units lie
                side by side: deeper layers are zero between those of different ones.
        """
        if len(groups) == 1:
            return groups[0]
        first, n = groups[0], np.float32(len(groups))

        def shared(parts: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
            return np.asarray(np.concatenate(list(parts)) / n, np.float32)

        deeper = [_side_by_side(own) for own in zip(*(one.weights[1:] for one in groups), strict=True)]
        return replace(
            first,
            weights=(np.concatenate([one.weights[0] for one in groups]), *deeper),
            biases=tuple(np.concatenate(own) for own in zip(*(one.biases for one in groups), strict=True)),
            class_weight=shared(one.class_weight for one in groups),
            class_bias=np.sum([one.class_bias for one in groups], axis=0) / n,
            box_weight=shared(one.box_weight for one in groups),
            box_bias=np.sum([one.box_bias for one in groups], axis=0) / n,
        )

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
            n_scaled = int(arrays["n_scaled"][0]) if "n_scaled" in arrays else None
            class_weight, class_bias = arrays["class.weight"], arrays["class.bias"]
            box_weight, box_bias = arrays["box.weight"], arrays["box.bias"]
        except (KeyError, IndexError) as error:
            raise CacheError(f"FcLayers: the saved arrays lack {error}. Train the layers again.") from error
        whole = cls(weights, biases, class_weight, class_bias, box_weight, box_bias, scaling, n_scaled)
        named = whole.to_arrays()
        named.pop("scaling")
        named.pop("n_scaled", None)
        ranks = {name: 2 if name.endswith("weight") else 1 for name in named}
        fits = bool(weights) and (n_scaled is None or 0 <= n_scaled <= whole.n_features_in)
        fits = fits and all(v.ndim == ranks[k] and v.dtype == np.float32 for k, v in named.items())
        if fits:
            hidden, n = class_weight.shape
            fits = (
                [weight.shape[0] for weight in weights]
                == [weight.shape[1] for weight in weights[1:]] + [hidden]
                and [len(bias) for bias in biases] == [len(weight) for weight in weights]
                and box_weight.shape == (hidden, 4 * (n - 1))
                and (len(class_bias), len(box_bias)) == (n, 4 * (n - 1))
            )
        if not fits:
            raise CacheError("FcLayers: the saved arrays do not fit together. Train the layers again.")
        return whole


def _side_by_side(blocks: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return a matrix with these along its diagonal and zeros elsewhere."""
    whole = np.zeros(np.sum([block.shape for block in blocks], axis=0), np.float32)
    row = column = 0
    for block in blocks:
        n_rows, n_columns = block.shape
        whole[row : row + n_rows, column : column + n_columns] = block
        row, column = row + n_rows, column + n_columns
    return whole


@dataclass(frozen=True, eq=False)
class HiddenLayer:
    """What one of the layers gives, after its ReLU: a transform of rows as `FcLayers` is, cut short.

    Attributes:
        layers: trained.
        depth: how many of them are run, 1 for fc6.
    """

    layers: FcLayers
    depth: int

    @property
    def key(self) -> dict[str, Any]:
        """Identity; equal keys promise equal results."""
        return {**self.layers.key, "depth": self.depth}

    @property
    def n_features(self) -> int:
        """Length of the rows that it returns."""
        return len(self.layers.biases[self.depth - 1])

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (R, H) float32 of (R, D) rows, as the layers were trained on."""
        return self.layers._hidden(features, self.depth)
