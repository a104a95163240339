"""Multinomial logistic regression with a background class: the softmax refitted on frozen features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.heads.assign import FINETUNE_RULE, LabelRule
from rcnn_svm.heads.base import Fitted, HeadBase, RegionBlocks, read_features, require_positive
from rcnn_svm.heads.scorers import SoftmaxScorer

__all__ = ["NetworkSoftmaxHead", "SoftmaxHead"]

_MEMORY = 10  # pairs of steps that L-BFGS remembers
_ARMIJO = 1e-4

Batch = tuple[NDArray[np.float32], NDArray[np.int64], float]
"""(R, D) features, (R,) labels 0 .. K, and the weight that every one of these rows stands for."""


class SoftmaxHead(HeadBase):
    """Softmax over K classes and background, trained on every labelled region.

    Minimises `1/2 |W|^2 + C * sum_i -log p(y_i | x_i)` over all rows that the rule labels; the
    intercepts are free. A first solution on a sample that fits into memory (all positives, a
    seeded draw of background) gives start and preconditioner; L-BFGS over full passes follows.

    Attributes:
        coef_: (K + 1, D) float32, background last.
        intercept_: (K + 1,) float32.
        gradient_norm_: largest absolute entry of the full gradient at the end, relative to that
            at zero.
        objective_: at the end, over all rows.
        n_passes_: passes over the features.

    Args:
        C: cost of a region; the inverse of the ridge penalty, as in scikit-learn.
        rule: positives, background and ignored regions.
        tol: `gradient_norm_` to reach.
        max_passes: passes over the features before giving up on it.
        max_bytes: bound of the sample in memory.
        random_state: seed of the sample.

    References:
        Nocedal and Wright, Numerical Optimization, 2nd edition, section 7.2 (L-BFGS).
    """

    def __init__(
        self,
        *,
        C: float = 1e-2,
        rule: LabelRule = FINETUNE_RULE,
        tol: float = 1e-3,
        max_passes: int = 200,
        max_bytes: int = 1 << 29,
        random_state: int = 0,
    ) -> None:
        self.C = C
        self.rule = rule
        self.tol = tol
        self.max_passes = max_passes
        self.max_bytes = max_bytes
        self.random_state = random_state

    def fit(self, blocks: RegionBlocks) -> Self:
        """Train on all labelled regions.

        Raises:
            ConfigError: a parameter out of range.
            DataError: no image, a class or the background without a region, or features that are
                not finite (named with their image).
        """
        self.fit_path(blocks, [self.C])
        return self

    def fit_path(self, blocks: RegionBlocks, Cs: list[float]) -> list[SoftmaxScorer]:
        """Train at every C, as `fit` would, with one sample for all; the head is left at the last.

        Raises:
            ConfigError: a parameter out of range.
            DataError: as `fit`.
        """
        require_positive("SoftmaxHead", {"tol": self.tol, "max_passes": self.max_passes})
        require_positive("SoftmaxHead", {"max_bytes": self.max_bytes})
        for C in Cs:
            require_positive("SoftmaxHead", {"C": C})
        self._start(blocks)
        labels = self._labels(blocks)
        sample = self._sample(blocks, labels)
        whole = len(sample) == 1
        path = []
        for C in Cs:
            # Not from the C before: its gradient can be within the tolerance of the next C as it is.
            weights = np.zeros((len(self.classes_) + 1, self.n_features_in_ + 1))
            objective = _Objective(C, weights.shape, lambda: iter(sample))
            scale = float(np.abs(objective.gradient_at_zero()).max())
            limit = self.max_passes if whole else 200  # over the sample, which is in memory
            weights, value, gradient, _ = _minimise(
                objective, weights, objective.preconditioner(weights), self.tol * scale, limit
            )
            if not whole:
                precondition = objective.preconditioner(weights)
                objective = _Objective(C, weights.shape, lambda: _all_rows(blocks, labels))
                weights, value, gradient, _ = _minimise(
                    objective, weights, precondition, self.tol * scale, self.max_passes
                )
            self.gradient_norm_ = float(np.abs(gradient).max()) / scale
            self.objective_, self.n_passes_ = value, objective.n_passes
            if self.gradient_norm_ > self.tol:
                warnings.warn(
                    f"SoftmaxHead: the gradient is {self.gradient_norm_:.1e} of that at zero after "
                    f"{objective.n_passes} passes, above tol={self.tol}. Raise max_passes, or lower C.",
                    stacklevel=2,
                )
            self.coef_ = weights[:, :-1].astype(np.float32)
            self.intercept_ = weights[:, -1].astype(np.float32)
            self._scorer = SoftmaxScorer(self.coef_, self.intercept_)
            path.append(self._scorer)
        return path

    @property
    def about(self) -> dict[str, Any]:
        """A softmax."""
        return {"family": "softmax", "kernel": None}

    def fit_grid(self, blocks: RegionBlocks, settings: Sequence[Mapping[str, Any]]) -> Iterator[Fitted]:
        """Train with each of several settings, in order; costs share one sample."""
        if any(set(setting) != {"C"} for setting in settings):
            yield from super().fit_grid(blocks, settings)
            return
        path = self.fit_path(blocks, [setting["C"] for setting in settings])
        for setting, scorer in zip(settings, path, strict=True):
            yield Fitted(setting, scorer, {})

    def _labels(self, blocks: RegionBlocks) -> list[NDArray[np.int64]]:
        labels = [self.rule.multiclass(blocks.truth(i)) for i in range(len(blocks))]
        names = (*self.classes_, "background")
        counts = sum(np.bincount(part[part >= 0], minlength=len(names)) for part in labels)
        missing = [name for name, count in zip(names, np.atleast_1d(counts), strict=True) if count == 0]
        if all(len(part) == 1 for part in labels):  # whole images have no background
            missing = [name for name in missing if name != "background"]
        if missing:
            raise DataError(
                f"SoftmaxHead: every class needs a region, got none for {', '.join(missing)} in "
                f"{len(blocks)} images. Leave the class out, or label some of it."
            )
        return labels

    def _sample(self, blocks: RegionBlocks, labels: list[NDArray[np.int64]]) -> list[Batch]:
        """Return all rows where they fit into memory, else all positives and a draw of background."""
        background = len(self.classes_)
        n_all = sum(int((part >= 0).sum()) for part in labels)
        n_positive = sum(int(((part >= 0) & (part < background)).sum()) for part in labels)
        capacity = int(self.max_bytes // (4 * self.n_features_in_))
        rng = np.random.default_rng(self.random_state)
        share = 1.0 if n_all <= capacity else max(0.0, capacity - n_positive) / max(1, n_all - n_positive)
        positive_share = 1.0 if n_positive <= capacity else capacity / 2 / n_positive
        if positive_share < 1:
            share = capacity / 2 / max(1, n_all - n_positive)
        chosen: dict[bool, tuple[list[NDArray[np.float32]], list[NDArray[np.int64]]]] = {
            True: ([], []),
            False: ([], []),
        }
        for i, part in enumerate(labels):
            draw = rng.random(len(part))
            is_positive = (part >= 0) & (part < background)
            take = np.where(is_positive, draw < positive_share, (part == background) & (draw < share))
            rows = np.flatnonzero(take)
            features = read_features(blocks, i, rows)
            for kind, own in ((True, is_positive[rows]), (False, ~is_positive[rows])):
                chosen[kind][0].append(features[own])
                chosen[kind][1].append(part[rows][own])
        positives, backgrounds = (
            (np.concatenate(chosen[kind][0]), np.concatenate(chosen[kind][1])) for kind in (True, False)
        )
        if share == positive_share == 1:
            joined = np.concatenate([positives[0], backgrounds[0]])
            return [(joined, np.concatenate([positives[1], backgrounds[1]]), 1.0)]
        return [(*positives, 1 / positive_share), (*backgrounds, 1 / share)]

    coef_: NDArray[np.float32]
    intercept_: NDArray[np.float32]
    gradient_norm_: float
    objective_: float
    n_passes_: int


def _all_rows(blocks: RegionBlocks, labels: list[NDArray[np.int64]]) -> Iterator[Batch]:
    for i, part in enumerate(labels):
        rows = np.flatnonzero(part >= 0)
        if len(rows):
            yield read_features(blocks, i, rows), part[rows], 1.0


class _Objective:
    """The penalised log-loss over batches; matrices are (K + 1, D + 1), intercepts last."""

    def __init__(self, C: float, shape: tuple[int, int], batches: Callable[[], Iterator[Batch]]) -> None:
        self._C = C
        self._shape = shape
        self._batches = batches
        self.n_passes = 0

    def __call__(self, weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Return value and gradient, from one pass."""
        self.n_passes += 1
        value = 0.5 * float((weights[:, :-1] ** 2).sum())
        gradient = weights.copy()
        gradient[:, -1] = 0
        coef, intercept = weights[:, :-1].astype(np.float32), weights[:, -1]
        for features, labels, weight in self._slabs():
            residual, log_loss = _residual(features @ coef.T + intercept, labels)
            value += self._C * weight * log_loss
            gradient[:, :-1] += self._C * weight * (residual.T.astype(np.float32) @ features)
            gradient[:, -1] += self._C * weight * residual.sum(axis=0)
        return value, gradient

    def gradient_at_zero(self) -> NDArray[np.float64]:
        """Return the gradient where all weights are 0."""
        gradient: NDArray[np.float64] = self(np.zeros(self._shape))[1]
        return gradient

    def preconditioner(
        self, weights: NDArray[np.float64]
    ) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
        """Return a solver of the mean over the classes of the Hessian's diagonal blocks."""
        from scipy.linalg import cho_factor, cho_solve

        n = self._shape[1]
        hessian = np.zeros((n, n))
        coef, intercept = weights[:, :-1].astype(np.float32), weights[:, -1]
        for features, labels, weight in self._slabs():
            residual, _ = _residual(features @ coef.T + intercept, labels)
            residual[np.arange(len(labels)), labels] += 1  # probabilities
            curvature = (residual * (1 - residual)).mean(axis=1)
            scaled = np.sqrt(self._C * weight * curvature).astype(np.float32)
            x = np.concatenate([features * scaled[:, None], scaled[:, None]], axis=1)
            hessian += x.T @ x
        hessian[np.arange(n - 1), np.arange(n - 1)] += 1
        hessian[-1, -1] += 1e-6 * max(1.0, hessian[-1, -1])  # the intercept alone has no ridge
        factor = cho_factor(hessian, lower=True, overwrite_a=True)
        return lambda gradient: cho_solve(factor, gradient.T).T

    def _slabs(self) -> Iterator[Batch]:
        """Cut batches into slabs, so that temporaries stay small."""
        for features, labels, weight in self._batches():
            for start in range(0, len(labels), 4096):
                yield features[start : start + 4096], labels[start : start + 4096], weight


def _residual(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
    """Return (R, K + 1) probabilities minus the one-hot labels, and the summed log-loss."""
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    own = z[rows, labels].copy()
    np.exp(z, out=z)
    total = z.sum(axis=1, keepdims=True)
    z /= total
    z[rows, labels] -= 1
    return z, float((np.log(total[:, 0]) - own).sum())


def _minimise(
    function: Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]],
    start: NDArray[np.float64],
    precondition: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    tol: float,
    max_evaluations: int,
) -> tuple[NDArray[np.float64], float, NDArray[np.float64], int]:
    """Minimise a smooth convex function by preconditioned L-BFGS with backtracking.

    Stops when the largest absolute entry of the gradient is <= `tol`, after `max_evaluations`, or
    when rounding hides any further descent. Returns the best point, its value, its gradient and the
    number of evaluations: a trial step that does not descend is never taken.
    """
    x = start
    value, gradient = function(x)
    evaluations = 1
    steps: list[tuple[NDArray[np.float64], NDArray[np.float64], float]] = []
    while np.abs(gradient).max() > tol and evaluations < max_evaluations:
        direction = -gradient
        weights = []
        for s, y, curvature in reversed(steps):
            a = float((s * direction).sum()) / curvature
            weights.append(a)
            direction = direction - a * y
        direction = precondition(direction)
        for (s, y, curvature), a in zip(steps, reversed(weights), strict=True):
            direction = direction + s * (a - float((y * direction).sum()) / curvature)
        slope = float((gradient * direction).sum())
        length = 1.0
        while True:
            candidate = x + length * direction
            new_value, new_gradient = function(candidate)
            evaluations += 1
            if new_value <= value + _ARMIJO * length * slope:
                break
            if evaluations >= max_evaluations or length < 1e-6:  # float32 products resolve no smaller descent
                return x, value, gradient, evaluations
            length /= 2
        s, y = candidate - x, new_gradient - gradient
        curvature = float((s * y).sum())
        if curvature > 0:
            steps = [*steps[-_MEMORY + 1 :], (s, y, curvature)]
        x, value, gradient = candidate, new_value, new_gradient
    return x, value, gradient, evaluations


class NetworkSoftmaxHead(HeadBase):
    """The softmax that layers or a network were trained with: it is taken as it is.

    The blocks that it is fitted on must bring it along, as those of an experiment do.
    """

    reads_rows = False

    @property
    def about(self) -> dict[str, Any]:
        """A softmax."""
        return {"family": "softmax", "kernel": None}

    def fit(self, blocks: RegionBlocks) -> Self:
        """Take the softmax that `blocks` bring.

        Raises:
            ConfigError: they bring none, as nothing was trained before the heads.
        """
        softmax: SoftmaxScorer | None = getattr(blocks, "softmax", None)
        if softmax is None:
            raise ConfigError(
                "NetworkSoftmaxHead: needs something that is fine-tuned. Set learn=fc or learn=network, or "
                "leave the head out."
            )
        self._start(blocks)
        self._scorer = softmax
        return self
