"""Logistic regression on frozen features: the softmax with a background class, and one against the rest."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.heads.assign import FINETUNE_RULE, LabelRule
from rcnn_svm.heads.base import (
    Fitted,
    HeadBase,
    RegionBlocks,
    Scorer,
    engine_of,
    read_features,
    reading,
    require_positive,
)
from rcnn_svm.heads.scorers import LinearScorer, SoftmaxScorer
from rcnn_svm.threads import allowed, in_order

__all__ = ["LogisticHead", "NetworkSoftmaxHead", "SoftmaxHead"]

R = TypeVar("R")

_SLAB_ROWS = 4096  # of a batch at once, so that temporaries stay small and threads share them
_MEMORY = 10  # pairs of steps that L-BFGS remembers
_ARMIJO = 1e-4

Labels = NDArray[Any]
"""Of a softmax (R,) classes 0 .. K, K the background, -1 ignored; one against the rest (R, K) +1, -1 or 0."""

Batch = tuple[NDArray[np.float32], Labels, float]
"""(R, D) features, their labels, and the weight that every one of these rows stands for."""

Pass = Callable[[Callable[[Batch], R]], Iterable[R]]
"""What is done with a slab -> what came of each slab, in order."""

Derivatives = tuple[NDArray[np.float64], NDArray[np.float64], float]


class _SmoothHead(HeadBase):
    """A linear head with a smooth loss, trained on every labelled region.

    A subclass says what the labels are and what the loss is; see there for all else.
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

    def fit_path(self, blocks: RegionBlocks, Cs: list[float]) -> list[Scorer]:
        """Train at every C, as `fit` would, with one sample for all; the head is left at the last.

        Raises:
            ConfigError: a parameter out of range.
            DataError: as `fit`.
        """
        own = {"tol": self.tol, "max_passes": self.max_passes, "max_bytes": self.max_bytes}
        require_positive(type(self).__name__, own)
        for C in Cs:
            require_positive(type(self).__name__, {"C": C})
        self._start(blocks)
        labels = self._labels(blocks)
        sample = self._sample(blocks, labels)
        whole = len(sample) == 1
        path: list[Scorer] = []
        for C in Cs:
            # Not from the C before: its gradient can be within the tolerance of the next C as it is.
            weights = np.zeros((self._n_outputs, self.n_features_in_ + 1))
            objective = _Objective(
                self._loss, C, weights.shape, lambda work: in_order(work, _slabs(sample), allowed())
            )
            scale = float(np.abs(objective.gradient_at_zero()).max())
            limit = self.max_passes if whole else 200  # over the sample, which is in memory
            weights, value, gradient, _ = _minimise(
                objective, weights, objective.preconditioner(weights), self.tol * scale, limit
            )
            if not whole:
                precondition = objective.preconditioner(weights)
                objective = _Objective(self._loss, C, weights.shape, partial(self._over_all, blocks, labels))
                weights, value, gradient, _ = _minimise(
                    objective, weights, precondition, self.tol * scale, self.max_passes
                )
            self.gradient_norm_ = float(np.abs(gradient).max()) / scale
            self.objective_, self.n_passes_ = value, objective.n_passes
            if self.gradient_norm_ > self.tol:
                warnings.warn(
                    f"{type(self).__name__}: the gradient is {self.gradient_norm_:.1e} of that at zero after "
                    f"{objective.n_passes} passes, above tol={self.tol}. Raise max_passes, or lower C.",
                    stacklevel=2,
                )
            self.coef_ = weights[:, :-1].astype(np.float32)
            self.intercept_ = weights[:, -1].astype(np.float32)
            self._scorer = self._scorer_of(self.coef_, self.intercept_)
            path.append(self._scorer)
        return path

    def fit_grid(self, blocks: RegionBlocks, settings: Sequence[Mapping[str, Any]]) -> Iterator[Fitted]:
        """Train with each of several settings, in order; costs share one sample."""
        if any(set(setting) != {"C"} for setting in settings):
            yield from super().fit_grid(blocks, settings)
            return
        path = self.fit_path(blocks, [setting["C"] for setting in settings])
        for setting, scorer in zip(settings, path, strict=True):
            yield Fitted(setting, scorer, {})

    @staticmethod
    def _loss(outputs: NDArray[np.floating], labels: Labels) -> Derivatives:
        """Return the gradient and the curvature, (R, M) each, and the summed loss of (R, M) outputs."""
        raise NotImplementedError

    @property
    def _n_outputs(self) -> int:
        raise NotImplementedError

    def _scorer_of(self, coef: NDArray[np.float32], intercept: NDArray[np.float32]) -> Scorer:
        raise NotImplementedError

    def _labels(self, blocks: RegionBlocks) -> list[Labels]:
        """Return the labels of every block; refuse a class, or the background, without a region."""
        raise NotImplementedError

    def _kinds(self, labels: Labels) -> NDArray[np.int64]:
        """Return (R,) 1 for positives, 0 for background, -1 for rows without a label."""
        raise NotImplementedError

    def _require(self, counts: Mapping[str, int], n_images: int) -> None:
        missing = [name for name, count in counts.items() if count == 0]
        if missing:
            raise DataError(
                f"{type(self).__name__}: every class needs a region, got none for {', '.join(missing)} in "
                f"{n_images} images. Leave the class out, or label some of it."
            )

    def _sample(self, blocks: RegionBlocks, labels: list[Labels]) -> list[Batch]:
        """Return all rows where they fit into memory, else all positives and a draw of background."""
        kinds = [self._kinds(part) for part in labels]
        n_positive, n_background = (sum(int((own == kind).sum()) for own in kinds) for kind in (1, 0))
        n_all = n_positive + n_background
        capacity = int(self.max_bytes // (4 * self.n_features_in_))
        rng = np.random.default_rng(self.random_state)
        share = 1.0 if n_all <= capacity else max(0.0, capacity - n_positive) / max(1, n_background)
        positive_share = 1.0 if n_positive <= capacity else capacity / 2 / n_positive
        if positive_share < 1:
            share = capacity / 2 / max(1, n_background)
        chosen: dict[bool, tuple[list[NDArray[np.float32]], list[Labels]]] = {True: ([], []), False: ([], [])}
        for i, (part, own_kinds) in enumerate(zip(labels, kinds, strict=True)):
            draw = rng.random(len(part))
            take = np.where(own_kinds == 1, draw < positive_share, (own_kinds == 0) & (draw < share))
            rows = np.flatnonzero(take)
            features = read_features(blocks, i, rows)
            is_positive = own_kinds[rows] == 1
            for kind, own in ((True, is_positive), (False, ~is_positive)):
                chosen[kind][0].append(features[own])
                chosen[kind][1].append(part[rows][own])
        positives, backgrounds = (
            (np.concatenate(chosen[kind][0]), np.concatenate(chosen[kind][1])) for kind in (True, False)
        )
        if share == positive_share == 1:
            joined = np.concatenate([positives[0], backgrounds[0]])
            return [(joined, np.concatenate([positives[1], backgrounds[1]]), 1.0)]
        return [(*positives, 1 / positive_share), (*backgrounds, 1 / share)]

    def _over_all(
        self, blocks: RegionBlocks, labels: list[Labels], work: Callable[[Batch], R]
    ) -> Iterator[R]:
        """Yield what comes of each slab of all labelled rows, image by image, from the blocks' engine."""
        labelled = ((i, part, np.flatnonzero(self._kinds(part) >= 0)) for i, part in enumerate(labels))
        images = ((part[rows], reading(blocks, i, rows)) for i, part, rows in labelled if len(rows))
        look, engine = partial(_over_image, work), engine_of(blocks)
        with contextlib.closing(engine.in_order(look, images, allowed())) as seen:
            for one in seen:
                yield from one

    coef_: NDArray[np.float32]
    intercept_: NDArray[np.float32]
    gradient_norm_: float
    objective_: float
    n_passes_: int


class SoftmaxHead(_SmoothHead):
    """Softmax over K classes and background: the last layer of a network, refitted on its features.

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

    @property
    def about(self) -> dict[str, Any]:
        """A softmax."""
        return {"family": "softmax", "kernel": None}

    @staticmethod
    def _loss(outputs: NDArray[np.floating], labels: Labels) -> Derivatives:
        z = outputs.astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        rows = np.arange(len(labels))
        own = z[rows, labels].copy()
        np.exp(z, out=z)
        total = z.sum(axis=1, keepdims=True)
        z /= total
        curvature = z * (1 - z)
        z[rows, labels] -= 1
        return z, curvature, float((np.log(total[:, 0]) - own).sum())

    @property
    def _n_outputs(self) -> int:
        return len(self.classes_) + 1

    def _scorer_of(self, coef: NDArray[np.float32], intercept: NDArray[np.float32]) -> Scorer:
        return SoftmaxScorer(coef, intercept)

    def _labels(self, blocks: RegionBlocks) -> list[Labels]:
        labels: list[Labels] = [self.rule.multiclass(blocks.truth(i)) for i in range(len(blocks))]
        names = (*self.classes_, "background")
        counts = sum(np.bincount(part[part >= 0], minlength=len(names)) for part in labels)
        needed = dict(zip(names, np.atleast_1d(counts), strict=True))
        if all(len(part) == 1 for part in labels):  # whole images have no background
            del needed["background"]
        self._require(needed, len(blocks))
        return labels

    def _kinds(self, labels: Labels) -> NDArray[np.int64]:
        return np.where(labels < 0, -1, (labels < len(self.classes_)).astype(np.int64))


class LogisticHead(_SmoothHead):
    """Logistic regression of each class against the rest, with the labels that an SVM would have.

    What an SVM is but for its loss: where that has the hinge, `-log p`. Minimises
    `1/2 |w|^2 + C * sum_i log(1 + exp(-y_i (w x_i + b)))` for each class. Arguments and attributes are those
    of `SoftmaxHead`, with K outputs.
    """

    @property
    def about(self) -> dict[str, Any]:
        """Neither an SVM nor a softmax."""
        return {"family": "other", "kernel": None}

    @staticmethod
    def _loss(outputs: NDArray[np.floating], labels: Labels) -> Derivatives:
        from scipy.special import expit

        y = labels.astype(np.float64)
        z = -y * outputs
        loss = np.where(labels != 0, np.logaddexp(0, z), 0.0)
        wrong = np.abs(y) * expit(z)  # the probability of the other label
        return -y * wrong, wrong * (1 - wrong), float(loss.sum())

    @property
    def _n_outputs(self) -> int:
        return len(self.classes_)

    def _scorer_of(self, coef: NDArray[np.float32], intercept: NDArray[np.float32]) -> Scorer:
        return LinearScorer(coef, intercept)

    def _labels(self, blocks: RegionBlocks) -> list[Labels]:
        labels: list[Labels] = [self.rule.per_class(blocks.truth(i)) for i in range(len(blocks))]
        positive = sum((part == 1).sum(axis=0) for part in labels)
        negative = sum((part == -1).sum(axis=0) for part in labels)
        counts = dict(zip(self.classes_, np.minimum(positive, 1) * np.atleast_1d(negative), strict=True))
        self._require(counts, len(blocks))
        return labels

    def _kinds(self, labels: Labels) -> NDArray[np.int64]:
        return np.where((labels == 1).any(axis=1), 1, np.where((labels == -1).any(axis=1), 0, -1))


def _slabs(batches: Iterable[Batch]) -> Iterator[Batch]:
    for features, labels, weight in batches:
        for start in range(0, len(labels), _SLAB_ROWS):
            own = slice(start, start + _SLAB_ROWS)
            yield features[own], labels[own], weight


def _over_image(
    work: Callable[[Batch], R], image: tuple[Labels, Callable[[], NDArray[np.float32]]]
) -> list[R]:
    labels, read = image
    return [work(slab) for slab in _slabs([(read(), labels, 1.0)])]


def _sums(
    loss: Callable[[NDArray[np.floating], Labels], Derivatives],
    coef: NDArray[np.float32],
    intercept: NDArray[np.float64],
    slab: Batch,
) -> tuple[float, float, NDArray[np.float32], NDArray[np.float64]]:
    """Return the weight of a slab's rows, their summed loss, and its gradient: (M, D), and (M,)."""
    features, labels, weight = slab
    residual, _, log_loss = loss(features @ coef.T + intercept, labels)
    return weight, log_loss, residual.T.astype(np.float32) @ features, residual.sum(axis=0)


def _hessian(
    loss: Callable[[NDArray[np.floating], Labels], Derivatives],
    C: float,
    coef: NDArray[np.float32],
    intercept: NDArray[np.float64],
    slab: Batch,
) -> NDArray[np.float32]:
    """Return (D + 1, D + 1) what a slab adds to the mean over the classes of the Hessian's blocks."""
    features, labels, weight = slab
    _, curvature, _ = loss(features @ coef.T + intercept, labels)
    scaled = np.sqrt(C * weight * curvature.mean(axis=1)).astype(np.float32)
    x = np.concatenate([features * scaled[:, None], scaled[:, None]], axis=1)
    product: NDArray[np.float32] = x.T @ x
    return product


class _Objective:
    """The penalised loss over slabs of rows; matrices are (M, D + 1), intercepts last."""

    def __init__(
        self,
        loss: Callable[[NDArray[np.floating], Labels], Derivatives],
        C: float,
        shape: tuple[int, int],
        over: Pass[Any],
    ) -> None:
        self._loss = loss
        self._C = C
        self._shape = shape
        self._over = over
        self.n_passes = 0

    def __call__(self, weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Return value and gradient, from one pass."""
        self.n_passes += 1
        value = 0.5 * float((weights[:, :-1] ** 2).sum())
        gradient = weights.copy()
        gradient[:, -1] = 0
        coef, intercept = weights[:, :-1].astype(np.float32), weights[:, -1]
        for weight, log_loss, slope, rise in self._over(partial(_sums, self._loss, coef, intercept)):
            value += self._C * weight * log_loss
            gradient[:, :-1] += self._C * weight * slope
            gradient[:, -1] += self._C * weight * rise
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
        for part in self._over(partial(_hessian, self._loss, self._C, coef, intercept)):
            hessian += part
        hessian[np.arange(n - 1), np.arange(n - 1)] += 1
        hessian[-1, -1] += 1e-6 * max(1.0, hessian[-1, -1])  # the intercept alone has no ridge
        factor = cho_factor(hessian, lower=True, overwrite_a=True)
        return lambda gradient: cho_solve(factor, gradient.T).T


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
