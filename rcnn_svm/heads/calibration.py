"""Scores turned into probabilities, so that one threshold means the same for every class. numpy only.

Calibrate on regions that the head was not trained on. Both maps rise with the score: within a
class no ranking changes, and no average precision (isotonic steps may tie scores).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import CacheError, ConfigError, DataError, ShapeError

__all__ = ["IsotonicCalibrator", "PlattCalibrator", "calibrator_from_arrays", "fit_calibrator"]

_MAX_NEWTON = 100


@dataclass(frozen=True, eq=False)
class PlattCalibrator:
    """Probability `1 / (1 + exp(-(slope * score + offset)))`, class by class.

    Attributes:
        slope: (K,) float64, >= 0.
        offset: (K,) float64.
    """

    kind: ClassVar[str] = "platt"
    slope: NDArray[np.float64]
    offset: NDArray[np.float64]

    def probabilities(self, scores: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, K) float32 probabilities of (R, K) scores."""
        _check_scores(scores, len(self.slope))
        z = scores.astype(np.float64) * self.slope + self.offset
        return (0.5 * (1 + np.tanh(0.5 * z))).astype(np.float32)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        return {"slope": self.slope, "offset": self.offset}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild a calibrator from `to_arrays`."""
        return cls(arrays["slope"], arrays["offset"])


@dataclass(frozen=True, eq=False)
class IsotonicCalibrator:
    """A rising step function per class, linear between its knots, constant beyond them.

    Attributes:
        knots: (n,) float64 scores, rising within each class, the classes one after another.
        values: (n,) float64 probabilities there.
        starts: (K + 1,) int64 first knot of each class, and n.
    """

    kind: ClassVar[str] = "isotonic"
    knots: NDArray[np.float64]
    values: NDArray[np.float64]
    starts: NDArray[np.int64]

    def probabilities(self, scores: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, K) float32 probabilities of (R, K) scores."""
        n_classes = len(self.starts) - 1
        _check_scores(scores, n_classes)
        result = np.empty(scores.shape, np.float32)
        for k in range(n_classes):
            own = slice(self.starts[k], self.starts[k + 1])
            result[:, k] = np.interp(scores[:, k], self.knots[own], self.values[own])
        return result

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        return {"knots": self.knots, "values": self.values, "starts": self.starts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild a calibrator from `to_arrays`."""
        return cls(arrays["knots"], arrays["values"], arrays["starts"])


def _check_scores(scores: NDArray[np.floating], n_classes: int) -> None:
    if scores.ndim != 2 or scores.shape[1] != n_classes:
        raise ShapeError(f"calibrator: scores must have shape (R, {n_classes}), got {scores.shape}.")


def fit_calibrator(
    scores: NDArray[np.floating],
    labels: NDArray[np.int8],
    classes: tuple[str, ...],
    method: Literal["platt", "isotonic"] = "platt",
) -> PlattCalibrator | IsotonicCalibrator:
    """Fit one map per class on held-out regions.

    Args:
        scores: (R, K) of a head.
        labels: (R, K) +1, -1, or 0 = ignored, as `LabelRule.per_class` gives them.
        classes: K names, for messages.
        method: `platt` (two numbers per class, safe with few positives) or `isotonic`.

    Raises:
        ConfigError: no such method.
        ShapeError: scores and labels differ in shape.
        DataError: a class has no positive or no negative here, or a score is not finite.

    References:
        Platt, Probabilistic outputs for support vector machines, 1999, with the targets and the
        Newton method of Lin, Lin, Weng, Machine Learning 68 (2007); Zadrozny and Elkan, KDD 2002.
    """
    if method not in ("platt", "isotonic"):
        raise ConfigError(f"fit_calibrator: method must be one of platt, isotonic, got {method!r}.")
    if scores.shape != labels.shape or scores.ndim != 2 or scores.shape[1] != len(classes):
        raise ShapeError(
            f"fit_calibrator: scores and labels must have shape (R, {len(classes)}), got "
            f"{scores.shape} and {labels.shape}."
        )
    if not np.isfinite(scores).all():
        raise DataError("fit_calibrator: scores must be finite.")
    maps = []
    for k, name in enumerate(classes):
        rows = np.flatnonzero(labels[:, k])
        positive = labels[rows, k] > 0
        if positive.all() or not positive.any():
            raise DataError(
                f"fit_calibrator: class {name!r} needs positive and negative regions, got "
                f"{int(positive.sum())} and {int((~positive).sum())}. Calibrate on more images."
            )
        fit = _platt if method == "platt" else _isotonic
        maps.append(fit(scores[rows, k].astype(np.float64), positive))
    first, second = zip(*maps, strict=True)
    if method == "platt":
        return PlattCalibrator(np.array(first), np.array(second))
    starts = np.concatenate([[0], np.cumsum([len(knots) for knots in first])])
    return IsotonicCalibrator(np.concatenate(first), np.concatenate(second), starts)


def _platt(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> tuple[float, float]:
    """Return slope and offset of the logistic curve of largest likelihood, by damped Newton steps."""
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    # Bayesian targets: with few positives the curve must not become a step.
    target = np.where(positive, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    centre, scale = scores.mean(), max(scores.std(), 1e-12)
    x = np.stack([(scores - centre) / scale, np.ones_like(scores)], axis=1)
    theta = np.array([0.0, np.log((n_positive + 1) / (n_negative + 1))])

    def loss(parameters: NDArray[np.float64]) -> float:
        z = x @ parameters
        return float((np.logaddexp(0, z) - target * z).sum())

    value = loss(theta)
    for _ in range(_MAX_NEWTON):
        p = 0.5 * (1 + np.tanh(0.5 * (x @ theta)))
        gradient = x.T @ (p - target)
        if np.abs(gradient).max() < 1e-9 * len(scores):
            break
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        length = 1.0
        while length > 1e-10 and loss(theta - length * step) > value - 1e-4 * length * gradient @ step:
            length /= 2
        theta = theta - length * step
        value = loss(theta)
    slope = max(theta[0] / scale, 0.0)  # a head worse than chance must not have its ranking reversed
    return slope, float(theta[1] - slope * centre)


def _isotonic(
    scores: NDArray[np.float64], positive: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return knots and values of the rising function of least squares: pool adjacent violators."""
    knots, inverse = np.unique(scores, return_inverse=True)
    weight = np.bincount(inverse).astype(np.float64)
    mean = np.bincount(inverse, weights=positive) / weight
    means: list[float] = []
    weights: list[float] = []
    sizes: list[int] = []
    for value, w in zip(mean.tolist(), weight.tolist(), strict=True):
        size = 1
        while means and means[-1] >= value:
            total = weights[-1] + w
            value = (means.pop() * weights.pop() + value * w) / total
            w = total
            size += sizes.pop()
        means.append(value)
        weights.append(w)
        sizes.append(size)
    values = np.repeat(means, sizes)
    # Inside a level only its two ends matter.
    ends = np.cumsum(sizes) - 1
    keep = np.unique(np.concatenate([ends - np.array(sizes) + 1, ends]))
    return knots[keep], values[keep]


_KINDS: dict[str, type[PlattCalibrator] | type[IsotonicCalibrator]] = {
    "platt": PlattCalibrator,
    "isotonic": IsotonicCalibrator,
}


def calibrator_from_arrays(
    kind: str, arrays: Mapping[str, NDArray[Any]]
) -> PlattCalibrator | IsotonicCalibrator:
    """Rebuild the calibrator whose `kind` and `to_arrays()` were saved.

    Raises:
        CacheError: no such kind, or an array is missing.
    """
    if kind not in _KINDS:
        raise CacheError(f"calibrator: kind must be one of {', '.join(_KINDS)}, got {kind!r}.")
    try:
        return _KINDS[kind].from_arrays(arrays)
    except KeyError as error:
        raise CacheError(f"calibrator: array {error} is missing. The file is of another version.") from error
