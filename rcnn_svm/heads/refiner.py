"""A second stage for boxes: where a detection's box should lie, and how well it lies now.

Box regression of region proposals reads the region itself; where an object goes on outside of it, or ends
inside, is seen by cells that reach over its border. `BoxRefiner` reads such rows of a few detections, each
for its own class. It needs numpy only; `rcnn_svm.training.refine` trains one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import ShapeError
from rcnn_svm.heads.base import check_features
from rcnn_svm.structures import require_finite

__all__ = ["BoxRefiner"]


@dataclass(frozen=True, eq=False)
class BoxRefiner:
    """One hidden layer, then for each class four box deltas and the log-odds of the IoU with the object.

    Attributes:
        hidden_weight: (H, D) float32; rows are standardised by it.
        hidden_bias: (H,) float32.
        weight: (K, 5, H) float32: the deltas of `boxes.decode_deltas`, then the log-odds of the IoU.
        bias: (K, 5) float32.

    Raises:
        ShapeError: the arrays do not fit together.
        DataError: they are not finite.

    References:
        Gidaris and Komodakis, arXiv 1505.01749 (boxes regressed anew from where they were moved to); Jiang et
        al., IoU-Net, arXiv 1807.11590 (confidence of localisation).
    """

    hidden_weight: NDArray[np.float32]
    hidden_bias: NDArray[np.float32]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def __post_init__(self) -> None:
        for name in ("hidden_weight", "hidden_bias", "weight", "bias"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), np.float32))
        shapes = (self.hidden_weight.shape, self.hidden_bias.shape, self.weight.shape, self.bias.shape)
        n_hidden, n_classes = len(self.hidden_bias), len(self.bias)
        fit = (shapes[0][:1], (n_hidden,), (n_classes, 5, n_hidden), (n_classes, 5))
        if self.hidden_weight.ndim != 2 or shapes[0][0] != n_hidden or shapes[1:] != fit[1:]:
            raise ShapeError(f"BoxRefiner: the arrays must fit together, got shapes {shapes}.")
        require_finite("BoxRefiner", self.to_arrays())

    @property
    def n_features(self) -> int:
        """D."""
        return int(self.hidden_weight.shape[1])

    def __call__(
        self, rows: NDArray[np.floating], labels: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return (M, 4) deltas and (M,) estimated IoUs, in (0, 1), of boxes with a class each.

        Args:
            rows: (M, D) of the boxes as they lie.
            labels: (M,) class of each.

        Raises:
            ShapeError: rows of another length than in training.
        """
        check_features("BoxRefiner", rows, self.n_features)
        hidden = np.asarray(rows, np.float32) @ self.hidden_weight.T
        hidden += self.hidden_bias
        np.maximum(hidden, 0, out=hidden)
        out = np.empty((len(rows), 5), np.float32)
        for k in np.unique(labels):
            own = labels == k
            out[own] = hidden[own] @ self.weight[k].T + self.bias[k]
        overlaps = 1 / (1 + np.exp(-np.clip(out[:, 4], -30, 30)))
        return out[:, :4], np.asarray(overlaps, np.float32)

    def of_others(self, n: int) -> Self:
        """Return the refiner of `n` classes that it has not seen: the mean of those that it has."""
        return type(self)(
            self.hidden_weight,
            self.hidden_bias,
            np.repeat(self.weight.mean(axis=0, keepdims=True), n, axis=0),
            np.repeat(self.bias.mean(axis=0, keepdims=True), n, axis=0),
        )

    def joined(self, other: Self) -> Self:
        """Return the refiner of both their classes, which share the hidden layer of this one."""
        weight, bias = np.concatenate([self.weight, other.weight]), np.concatenate([self.bias, other.bias])
        return type(self)(self.hidden_weight, self.hidden_bias, weight, bias)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        return {
            "hidden_weight": self.hidden_weight,
            "hidden_bias": self.hidden_bias,
            "weight": self.weight,
            "bias": self.bias,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild a refiner from `to_arrays`."""
        return cls(arrays["hidden_weight"], arrays["hidden_bias"], arrays["weight"], arrays["bias"])
