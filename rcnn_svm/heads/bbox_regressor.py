"""Class-specific box regression: ridge from region features to box deltas, in bounded memory.

Each class has one linear map to the four deltas of `boxes.encode_deltas`. The normal equations
are summed over the blocks, so that memory grows with D squared and not with the regions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import encode_deltas
from rcnn_svm.errors import ConfigError, DataError, NotFittedError, ShapeError
from rcnn_svm.heads.base import RegionBlocks, Trainable, check_features, read_features, require_positive
from rcnn_svm.structures import require_finite

__all__ = ["BoxRegressor"]

# rcnn_train_bbox_regressor.m adds it to the eigenvalues of the targets' covariance.
_WHITENING_EPS = 0.001
_BATCH_ROWS = 1024


class BoxRegressor(Trainable):
    """Ridge regression of box deltas, one per class, on whitened targets.

    A region trains class k when its best object (over all classes) is of class k and their IoU
    is > `min_iou`; ground-truth rows belong to it, with a target of zero. The constant column is
    penalised like every other. A class without a pair leaves boxes where they are.

    Attributes:
        coef_: (K, 4, D) float32, whitening undone.
        intercept_: (K, 4) float32.
        n_pairs_: (K,) int64 training pairs of each class.

    Args:
        strength: the ridge penalty, added to the unnormalised X'X; 1000 in the paper, for
            features of mean norm 20.
        min_iou: a pair needs an IoU strictly above it.
        max_bytes: largest sum of normal equations held at once; classes that do not fit into it
            wait for another pass over their rows.

    References:
        Girshick et al., arXiv 1311.2524v5, appendix C; rbgirshick/rcnn,
        bbox_regression/rcnn_train_bbox_regressor.m.
    """

    def __init__(self, *, strength: float = 1000.0, min_iou: float = 0.6, max_bytes: int = 1 << 30) -> None:
        self.strength = strength
        self.min_iou = min_iou
        self.max_bytes = max_bytes

    def fit(self, blocks: RegionBlocks) -> Self:
        """Fit every class.

        Raises:
            ConfigError: a parameter out of range.
            DataError: no image, no pair at all, or a feature that is not finite.
        """
        fitted = self.fit_path(blocks, [self.strength])[0]
        self.__dict__.update(fitted.__dict__)
        return self

    def fit_path(self, blocks: RegionBlocks, strengths: Sequence[float]) -> list[BoxRegressor]:
        """Fit one regressor per ridge strength; the normal equations are summed only once.

        Raises:
            ConfigError: a parameter out of range.
            DataError: no image, no pair at all, or a feature that is not finite.
        """
        require_positive("BoxRegressor", {"max_bytes": self.max_bytes})
        for strength in strengths:
            require_positive("BoxRegressor", {"strength": strength})
        if not 0 <= self.min_iou < 1:
            raise ConfigError(f"BoxRegressor: min_iou must lie in [0, 1), got {self.min_iou!r}.")
        self._start(blocks)
        n_classes, n_features = len(blocks.classes), blocks.n_features
        path = []
        for strength in strengths:
            regressor = BoxRegressor(strength=strength, min_iou=self.min_iou, max_bytes=self.max_bytes)
            regressor._start(blocks)
            regressor.coef_ = np.zeros((n_classes, 4, n_features), np.float32)
            regressor.intercept_ = np.zeros((n_classes, 4), np.float32)
            regressor.n_pairs_ = np.zeros(n_classes, np.int64)
            path.append(regressor)
        group = int(max(1, self.max_bytes // (8 * (n_features + 1) ** 2)))
        for first in range(0, n_classes, group):
            classes = range(first, min(first + group, n_classes))
            sums = {k: _NormalEquations(n_features) for k in classes}
            self._accumulate(blocks, sums)
            for k, equations in sums.items():
                equations.flush()
                for regressor in path:
                    regressor.n_pairs_[k] = equations.n
                    if equations.n:
                        coef, intercept = equations.solve(regressor.strength)
                        regressor.coef_[k], regressor.intercept_[k] = coef, intercept
        if not path or not path[0].n_pairs_.any():
            raise DataError(
                f"BoxRegressor: needs regions with IoU > {self.min_iou} to an object, got none in "
                f"{len(blocks)} images. Check the proposals, or lower min_iou."
            )
        return path

    def _accumulate(self, blocks: RegionBlocks, sums: Mapping[int, _NormalEquations]) -> None:
        for i in range(len(blocks)):
            truth = blocks.truth(i)
            paired = (truth.best_iou > self.min_iou) & np.isin(truth.label, list(sums))
            rows = np.flatnonzero(paired)
            if len(rows) == 0:
                continue
            features = read_features(blocks, i, rows)
            deltas = encode_deltas(truth.boxes[rows], truth.target[rows])  # (r, 4)
            for k in np.unique(truth.label[rows]):
                own = truth.label[rows] == k
                sums[int(k)].add(features[own], deltas[own])

    def predict(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, K, 4) float32 deltas of (R, D) features, for `boxes.decode_deltas`.

        Raises:
            NotFittedError: `fit` was not called.
            ShapeError: features of another width than in training.
        """
        if not hasattr(self, "coef_"):
            raise NotFittedError("BoxRegressor: must be fitted before use. Call fit(blocks) first.")
        n_classes, _, n_features = self.coef_.shape
        check_features("BoxRegressor", features, n_features)
        flat = np.asarray(features, np.float32) @ self.coef_.reshape(n_classes * 4, n_features).T
        deltas: NDArray[np.float32] = flat.reshape(-1, n_classes, 4) + self.intercept_
        return deltas

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that `predict` needs, by name."""
        if not hasattr(self, "coef_"):
            raise NotFittedError("BoxRegressor: must be fitted before use. Call fit(blocks) first.")
        return {"coef": self.coef_, "intercept": self.intercept_}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild a regressor that can predict from `to_arrays`.

        Raises:
            ShapeError: the arrays do not fit together.
            DataError: they are not finite.
        """
        regressor = cls()
        regressor.coef_ = np.ascontiguousarray(arrays["coef"], np.float32)
        regressor.intercept_ = np.ascontiguousarray(arrays["intercept"], np.float32)
        if regressor.coef_.ndim != 3 or regressor.coef_.shape[:2] != (len(regressor.coef_), 4):
            raise ShapeError(f"BoxRegressor: coef must have shape (K, 4, D), got {regressor.coef_.shape}.")
        if regressor.intercept_.shape != regressor.coef_.shape[:2]:
            raise ShapeError(
                f"BoxRegressor: intercept must have shape {regressor.coef_.shape[:2]}, got "
                f"{regressor.intercept_.shape}."
            )
        require_finite("BoxRegressor", regressor.to_arrays())
        regressor.n_features_in_ = regressor.coef_.shape[2]
        return regressor

    coef_: NDArray[np.float32]
    intercept_: NDArray[np.float32]
    n_pairs_: NDArray[np.int64]


class _NormalEquations:
    """X'X, X'Y and the moments of Y of one class; the last column of X is 1."""

    def __init__(self, n_features: int) -> None:
        self.n = 0
        self.gram = np.zeros((n_features + 1, n_features + 1))
        self.cross = np.zeros((n_features + 1, 4))
        self.target_sum = np.zeros(4)
        self.target_gram = np.zeros((4, 4))
        self._waiting: list[NDArray[np.float32]] = []
        self._n_waiting = 0

    def add(self, features: NDArray[np.float32], deltas: NDArray[np.float64]) -> None:
        x = np.concatenate([features, np.ones((len(features), 1), np.float32)], axis=1)
        self.n += len(x)
        self.cross += x.T @ deltas
        self.target_sum += deltas.sum(axis=0)
        self.target_gram += deltas.T @ deltas
        self._waiting.append(x)
        self._n_waiting += len(x)
        if self._n_waiting >= _BATCH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Add the waiting rows to X'X: many at once make one fast float32 product."""
        if self._waiting:
            x = np.concatenate(self._waiting)
            self.gram += x.T @ x
            self._waiting, self._n_waiting = [], 0

    def solve(self, strength: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (4, D) coefficients and (4,) intercepts, whitening undone."""
        from scipy.linalg import cho_factor, cho_solve

        mean = self.target_sum / self.n
        covariance = self.target_gram / self.n - np.outer(mean, mean)
        values, vectors = np.linalg.eigh(covariance)
        root = np.sqrt(np.maximum(values, 0) + _WHITENING_EPS)
        whiten = (vectors / root) @ vectors.T
        colour = (vectors * root) @ vectors.T
        centred = self.cross - np.outer(self.gram[-1], mean)  # X'(Y - mean); the last row of X'X is 1'X
        ridge = self.gram + strength * np.eye(len(self.gram))
        beta = cho_solve(cho_factor(ridge, lower=True, overwrite_a=True), centred @ whiten) @ colour
        return beta[:-1].T, beta[-1] + mean
