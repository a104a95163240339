"""Trained heads as plain arrays: all that detection needs, numpy only, float32 throughout, all finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import CacheError, DataError, ShapeError
from rcnn_svm.heads.base import Scorer, check_features
from rcnn_svm.heads.kernels import KERNELS, Kernel, kernel_name, prepared, settings
from rcnn_svm.structures import require_finite
from rcnn_svm.threads import allowed, in_order

__all__ = [
    "EstimatorScorer",
    "KernelScorer",
    "LinearScorer",
    "SoftmaxScorer",
    "part_named",
    "scorer_from_arrays",
]

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
class KernelScorer:
    """Scores of K kernel machines over the union of their support vectors.

    One kernel product serves all classes: a vector that supports several of them is met once.

    Attributes:
        support: (S, D) float32, the union.
        dual_coef: (K, S) float32, signed; zero where a vector does not support a class.
        intercept: (K,) float32.
        kernel: of rows and support vectors, nothing in it left to be settled.
    """

    support: NDArray[np.float32]
    dual_coef: NDArray[np.float32]
    intercept: NDArray[np.float32]
    kernel: Kernel

    def __post_init__(self) -> None:
        object.__setattr__(self, "support", _matrix(self.support, "KernelScorer: support"))
        object.__setattr__(self, "dual_coef", _matrix(self.dual_coef, "KernelScorer: dual_coef"))
        n_classes, n_support = self.dual_coef.shape
        if n_support != len(self.support):
            raise ShapeError(
                f"KernelScorer: dual_coef must have {len(self.support)} columns, one per support vector, "
                f"got {n_support}."
            )
        object.__setattr__(self, "intercept", _vector(self.intercept, n_classes, "KernelScorer: intercept"))
        require_finite("KernelScorer", self.to_arrays())
        object.__setattr__(self, "_against", prepared(self.kernel, self.support))

    @property
    def kind(self) -> str:
        """`kernel:` and the kernel's name."""
        return _KERNEL_KIND + kernel_name(self.kernel)

    @property
    def n_features(self) -> int:
        """D."""
        return int(self.support.shape[1])

    def decision_function(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, K) float32 scores of (R, D) features."""
        check_features("KernelScorer", features, self.n_features)
        against = self._against  # type: ignore[attr-defined]
        scores = np.empty((len(features), len(self.intercept)), np.float32)
        n_threads = allowed()
        rows = _CHUNK_ELEMENTS // n_threads // max(1, len(self.support))
        step = max(1, min(rows, -(-len(features) // n_threads)))

        def score(start: int) -> None:
            x = np.asarray(features[start : start + step], np.float32)
            scores[start : start + step] = against(x) @ self.dual_coef.T

        for _ in in_order(score, range(0, len(features), step), n_threads):
            pass
        scores += self.intercept
        return scores

    def terms(self, features: NDArray[np.floating], label: int) -> NDArray[np.float64]:
        """Return (R, S) what each support vector adds to the score of a class, the intercept left out.

        Args:
            features: (R, D).
            label: the class, in 0 .. K-1.
        """
        check_features("KernelScorer", features, self.n_features)
        against = self._against  # type: ignore[attr-defined]
        terms: NDArray[np.float64] = against(np.asarray(features, np.float32)).astype(np.float64)
        terms *= self.dual_coef[label]
        return terms

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, those settings of one of our kernels among them."""
        arrays = {"support": self.support, "dual_coef": self.dual_coef, "intercept": self.intercept}
        return arrays | {f"kernel.{k}": np.array([value]) for k, value in settings(self.kernel).items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], kernel: Callable[..., Any]) -> Self:
        """Rebuild a scorer from `to_arrays`.

        Args:
            arrays: as `to_arrays` returned them.
            kernel: one of the classes in `KERNELS`, whose settings are among the arrays, or a kernel.
        """
        require_finite("KernelScorer", arrays)  # settings of the kernel among them
        if kernel in KERNELS.values():
            own = {k.partition(".")[2]: v for k, v in arrays.items() if k.startswith("kernel.")}
            kernel = kernel(**{name: value[0].item() for name, value in own.items()})
        return cls(arrays["support"], arrays["dual_coef"], arrays["intercept"], kernel)


class EstimatorScorer:
    """Scores of an estimator that is not ours.

    Args:
        kind: what a file calls it.
        estimator: its `decision_function` gives (R, K) scores, or (R, K + 1) with the background last,
            whose score is then taken off each class's.
        n_classes: K.
    """

    def __init__(self, kind: str, estimator: Any, n_classes: int) -> None:
        self.kind, self.estimator, self.n_classes = kind, estimator, n_classes

    def decision_function(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, K) float32 scores of (R, D) features.

        Raises:
            ShapeError: the estimator gives another shape.
        """
        if len(features) == 0:
            return np.zeros((0, self.n_classes), np.float32)
        found = np.asarray(self.estimator.decision_function(np.asarray(features, np.float32)), np.float32)
        n, k = len(features), self.n_classes
        if found.shape == (n,) and k == 1:  # two classes: the score of the second, the background
            return -found[:, None]
        if found.shape == (n, k + 1):
            return found[:, :-1] - found[:, -1:]
        if found.shape != (n, k):
            raise ShapeError(
                f"{self.kind}: decision_function must return shape {(n, k)}, or {(n, k + 1)} with the "
                f"background last, got {found.shape}."
            )
        return found

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the estimator's own arrays; none where it has no `to_arrays`."""
        own: dict[str, NDArray[Any]] = (
            self.estimator.to_arrays() if hasattr(self.estimator, "to_arrays") else {}
        )
        return {"n_classes": np.array([self.n_classes]), **own}

    @classmethod
    def from_arrays(cls, kind: str, arrays: Mapping[str, NDArray[Any]], estimator: Any) -> Self:
        """Rebuild a scorer from `to_arrays`.

        Args:
            kind: what the file calls it.
            arrays: as `to_arrays` returned them.
            estimator: a class with `from_arrays`, or the trained estimator itself.
        """
        own = {name: array for name, array in arrays.items() if name != "n_classes"}
        if hasattr(estimator, "from_arrays"):
            estimator = estimator.from_arrays(own)
        return cls(kind, estimator, int(arrays["n_classes"][0]))


_KERNEL_KIND = "kernel:"


def scorer_from_arrays(
    kind: str, arrays: Mapping[str, NDArray[Any]], parts: Mapping[str, Any] | None = None
) -> Scorer:
    """Rebuild the scorer whose `kind` and `to_arrays()` were saved.

    Args:
        kind: `linear`, `softmax`, `kernel:` and the name of a kernel, or the name of a head that is not ours.
        arrays: as saved.
        parts: what is not ours, by the name that the file knows it by: kernels, and estimators or classes of
            them, see `EstimatorScorer.from_arrays`.

    Raises:
        DataError: the file names what is not ours and is not among the parts, or an array is not finite.
        CacheError: an array is missing.
    """
    parts = parts or {}
    name = kind.removeprefix(_KERNEL_KIND)
    try:
        if kind.startswith(_KERNEL_KIND):
            return KernelScorer.from_arrays(arrays, KERNELS.get(name) or part_named(name, "kernel", parts))
        if kind in (LinearScorer.kind, SoftmaxScorer.kind):
            return (LinearScorer if kind == LinearScorer.kind else SoftmaxScorer).from_arrays(arrays)
        part = part_named(name, "head", parts)
        if "n_classes" not in arrays and hasattr(part, "from_arrays"):  # a scorer itself
            scorer: Scorer = part.from_arrays(arrays)
            return scorer
        return EstimatorScorer.from_arrays(kind, arrays, part)
    except KeyError as error:
        raise CacheError(f"scorer: array {error} is missing. The file is of another version.") from error


def part_named(name: str, what: str, parts: Mapping[str, Any]) -> Any:
    """Return a part that is not ours, which the caller must have brought.

    Args:
        name: what the file calls it.
        what: kernel, head, network and the like.
        parts: by name.

    Raises:
        DataError: it is not among the parts.
    """
    if name not in parts:
        brought = ", ".join(parts) or "none"
        raise DataError(
            f"This detector was made with the {what} {name!r}, which is not one of rcnn_svm's: bring it with "
            f"load_detector(folder, parts={{{name!r}: ...}}), got the parts {brought}."
        )
    return parts[name]
