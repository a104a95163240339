"""Trained heads as plain arrays: all that detection needs, numpy only, float32 throughout, all finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import CacheError, ShapeError
from rcnn_svm.heads.base import Scorer, check_features
from rcnn_svm.structures import require_finite

__all__ = ["SCORERS", "LinearScorer", "RBFScorer", "SoftmaxScorer", "scorer_from_arrays"]

# 64 MB of float32: the largest temporary that scoring makes.
_CHUNK_ELEMENTS = 1 << 24


def _matrix(value: Any, where: str) -> NDArray[np.float32]:
    array = np.ascontiguousarray(value, np.float32)
    if array.ndim != 2:
        raise ShapeError(f"{where} must be a matrix, got shape {array.shape}.")
    return array


def _vector(value: Any, n: int, where: str) -> NDArray[np.float32]:
    array = np.ascontiguousarray(value, np.float32)
    if array.shape != (n,):
        raise ShapeError(f"{where} must have shape ({n},), got {array.shape}.")
    return array


@dataclass(frozen=True, eq=False)
class _AffineScorer:
    """What is a matrix product: `X @ coef.T + intercept`, with n rows of `coef`."""

    coef: NDArray[np.float32]
    intercept: NDArray[np.float32]

    def __post_init__(self) -> None:
        where = type(self).__name__
        object.__setattr__(self, "coef", _matrix(self.coef, f"{where}: coef"))
        intercept = _vector(self.intercept, len(self.coef), f"{where}: intercept")
        object.__setattr__(self, "intercept", intercept)
        require_finite(where, self.to_arrays())

    @property
    def n_features(self) -> int:
        """D."""
        return int(self.coef.shape[1])

    def _product(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        check_features(type(self).__name__, features, self.n_features)
        product = np.asarray(features, np.float32) @ self.coef.T
        product += self.intercept
        return product

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        return {"coef": self.coef, "intercept": self.intercept}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild a scorer from `to_arrays`."""
        return cls(arrays["coef"], arrays["intercept"])


class LinearScorer(_AffineScorer):
    """Scores `X @ coef.T + intercept`.

    Attributes:
        coef: (K, D) float32.
        intercept: (K,) float32.
    """

    kind: ClassVar[str] = "linear"

    def decision_function(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, K) float32 scores of (R, D) features."""
        return self._product(features)


class SoftmaxScorer(_AffineScorer):
    """Softmax over K classes and background; the last row of `coef` is the background's.

    Attributes:
        coef: (K + 1, D) float32.
        intercept: (K + 1,) float32.
    """

    kind: ClassVar[str] = "softmax"

    def logits(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, K + 1) float32 inputs of the softmax, background last."""
        return self._product(features)

    def probabilities(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, K) float32 probabilities, the background's column dropped."""
        logits = self.logits(features).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
        return logits[:, :-1].astype(np.float32)

    def decision_function(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, K) float32 log-odds `log(p / (1 - p))` of each class.

        They rank as the probabilities do, class by class, but a float32 probability rounds to 1
        for every sure region and so invents ties, which move the average precision.
        """
        logits = self.logits(features).astype(np.float64)
        rows, best = np.arange(len(logits)), logits.argmax(axis=1)
        shifted = logits - logits[rows, best][:, None]
        exponentials = np.exp(shifted)
        # What all others sum up to. Where the class itself is the largest, it is left out before the sum,
        # which is then taken from the largest of the rest: subtracting would leave nothing of it.
        others = exponentials.sum(axis=1, keepdims=True) - exponentials
        shifted[rows, best] = -np.inf
        second = shifted.max(axis=1)
        others[rows, best] = np.exp(shifted - second[:, None]).sum(axis=1)
        odds = logits - logits[rows, best][:, None] - np.log(others)
        odds[rows, best] -= second
        return np.asarray(odds[:, :-1], np.float32)


@dataclass(frozen=True, eq=False)
class RBFScorer:
    """Scores of K kernel machines over the union of their support vectors.

    One kernel product `exp(-gamma |x - v|^2)` serves all classes: a vector that supports several
    of them is met once.

    Attributes:
        support: (S, D) float32, the union.
        dual_coef: (K, S) float32, signed; zero where a vector does not support a class.
        intercept: (K,) float32.
        gamma: > 0.
    """

    kind: ClassVar[str] = "rbf"
    support: NDArray[np.float32]
    dual_coef: NDArray[np.float32]
    intercept: NDArray[np.float32]
    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "support", _matrix(self.support, "RBFScorer: support"))
        object.__setattr__(self, "dual_coef", _matrix(self.dual_coef, "RBFScorer: dual_coef"))
        n_classes, n_support = self.dual_coef.shape
        if n_support != len(self.support):
            raise ShapeError(
                f"RBFScorer: dual_coef must have {len(self.support)} columns, one per support vector, "
                f"got {n_support}."
            )
        object.__setattr__(self, "intercept", _vector(self.intercept, n_classes, "RBFScorer: intercept"))
        require_finite("RBFScorer", self.to_arrays())
        # Distances are taken from the common centre: |x|^2 + |v|^2 - 2 x.v cancels far less there.
        centre = self.support.mean(axis=0) if n_support else np.zeros(self.n_features, np.float32)
        centred = self.support - centre
        object.__setattr__(self, "_centre", centre)
        object.__setattr__(self, "_centred_t", centred.T)
        object.__setattr__(self, "_norms", np.einsum("sd,sd->s", centred, centred))

    @property
    def n_features(self) -> int:
        """D."""
        return int(self.support.shape[1])

    def decision_function(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, K) float32 scores of (R, D) features."""
        check_features("RBFScorer", features, self.n_features)
        centre: NDArray[np.float32] = self._centre  # type: ignore[attr-defined]
        vectors: NDArray[np.float32] = self._centred_t  # type: ignore[attr-defined]
        norms: NDArray[np.float32] = self._norms  # type: ignore[attr-defined]
        scores = np.empty((len(features), len(self.intercept)), np.float32)
        step = max(1, _CHUNK_ELEMENTS // max(1, len(norms)))
        for start in range(0, len(features), step):
            x = np.asarray(features[start : start + step], np.float32) - centre
            kernel = x @ vectors  # (r, S)
            kernel *= 2
            kernel -= np.einsum("rd,rd->r", x, x)[:, None]
            kernel -= norms
            np.minimum(kernel, 0, out=kernel)
            kernel *= np.float32(self.gamma)
            np.exp(kernel, out=kernel)
            scores[start : start + step] = kernel @ self.dual_coef.T
        scores += self.intercept
        return scores

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        return {
            "support": self.support,
            "dual_coef": self.dual_coef,
            "intercept": self.intercept,
            "gamma": np.array([self.gamma], np.float64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild a scorer from `to_arrays`."""
        return cls(arrays["support"], arrays["dual_coef"], arrays["intercept"], float(arrays["gamma"][0]))


SCORERS: dict[str, type[LinearScorer] | type[SoftmaxScorer] | type[RBFScorer]] = {
    "linear": LinearScorer,
    "softmax": SoftmaxScorer,
    "rbf": RBFScorer,
}
"""The scorers that can be read back, by their kind."""


def scorer_from_arrays(kind: str, arrays: Mapping[str, NDArray[Any]]) -> Scorer:
    """Rebuild the scorer whose `kind` and `to_arrays()` were saved.

    Raises:
        CacheError: no such kind, or an array is missing.
        DataError: an array is not finite.
    """
    if kind not in SCORERS:
        raise CacheError(f"scorer: kind must be one of {', '.join(SCORERS)}, got {kind!r}.")
    try:
        return SCORERS[kind].from_arrays(arrays)
    except KeyError as error:
        raise CacheError(f"scorer: array {error} is missing. The file is of another version.") from error
