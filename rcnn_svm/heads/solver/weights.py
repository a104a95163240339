"""What is optimised, the weights of K classes, and the objectives that certify them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.heads.solver import kernels
from rcnn_svm.heads.solver.rows import Floats

__all__ = ["Costs", "Weights", "relative_gap"]


class Costs:
    """What a row costs: the bounds of the dual variables, and their own part of the dual objective.

    Attributes:
        table: (K, 2) of a negative and of a positive.
        squared: squared hinge instead of hinge.
    """

    def __init__(self, table: Floats, squared: bool) -> None:
        self.table = table
        self.squared = squared

    def bounds(self, labels: NDArray[np.int8], sample_weight: Floats) -> Floats:
        """Return (n, K) the costs of n rows."""
        bounds: Floats = np.where(labels > 0, self.table[:, 1], self.table[:, 0]) * sample_weight[:, None]
        return bounds

    def linear(self, alpha: Floats, labels: NDArray[np.int8], sample_weight: Floats) -> NDArray[np.float64]:
        """Return (K,) all terms of the dual but |w|^2, of some rows."""
        terms = alpha.astype(np.float64)
        if self.squared:
            terms -= terms**2 / (4 * self.bounds(labels, sample_weight))
        total: NDArray[np.float64] = terms.sum(axis=0)
        return total


class Weights:
    """Weights, and the biases, which primal and dual see apart while they move.

    Attributes:
        w: (K, D), always sum_i alpha_i y_i x_i.
        balance: (K,) float64, the sum of alpha_i y_i: the dual's bias is bias_scale^2 times this.
        bias: (K,) float64, the primal's, which is free.
        bias_scale: value of the constant feature.
        moved: whether the weights changed since somebody set this to False.
    """

    def __init__(self, n_classes: int, n_features: int, bias_scale: float, dtype: Any) -> None:
        self.w: Floats = np.zeros((n_classes, n_features), dtype)
        self.balance = np.zeros(n_classes)
        self.bias = np.zeros(n_classes)
        self.bias_scale = bias_scale
        self.moved = False

    @property
    def dual_bias(self) -> NDArray[np.float64]:
        """(K,) the bias at the optimum of the dual."""
        return self.bias_scale**2 * self.balance

    def margins(self, matrix: Floats, index: NDArray[np.int64]) -> Floats:
        """Return (m, K) the margins of some rows of a matrix."""
        out = np.empty((len(self.w), len(index)), self.w.dtype)
        kernels.products(matrix, index, self.w, out)
        margins = np.ascontiguousarray(out.T)
        margins += self.bias.astype(self.w.dtype)
        return margins

    def scale(self, factors: Floats) -> None:
        """Multiply those of each class by its factor, as the dual variables are."""
        self.w *= factors[:, None]
        self.balance *= factors
        self.bias *= factors

    def primal_norm(self) -> NDArray[np.float64]:
        """(K,) 1/2 |w|^2 of the primal, with the bias in use."""
        return self._half_norm(self.bias / self.bias_scale)

    def dual_norm(self) -> NDArray[np.float64]:
        """(K,) 1/2 |w|^2 of the dual."""
        return self._half_norm(self.bias_scale * self.balance)

    def _half_norm(self, constant: NDArray[np.float64]) -> NDArray[np.float64]:
        half: NDArray[np.float64] = 0.5 * (
            np.einsum("kd,kd->k", self.w, self.w, dtype=np.float64) + constant**2
        )
        return half


def relative_gap(primal: NDArray[np.float64], dual: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `(primal - dual) / primal`, 0 where both are 0."""
    scale = np.where(primal > 0, primal, 1)
    gap: NDArray[np.float64] = np.maximum(primal - dual, 0) / scale
    return gap
