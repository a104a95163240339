"""The block solver as a plain scikit-learn classifier: for any data, not only regions."""

from __future__ import annotations

import warnings
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from rcnn_svm.errors import ConfigError
from rcnn_svm.heads.base import require_positive
from rcnn_svm.heads.solver import BlockSolver, MatrixSource, Solution

__all__ = ["LinearSVM"]


class LinearSVM(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Linear SVM, one class against the rest, all classes trained together.

    Reaches the optimum of scikit-learn's `LinearSVC` with the same C, loss and
    `intercept_scaling`, and proves it by the duality gap. float32 input is neither copied nor
    widened; float64 input is solved in float64.

    Attributes:
        classes_: (K,) the labels.
        coef_: (1, D) for two classes, else (K, D).
        intercept_: (1,) or (K,).
        gap_: (1,) or (K,) certified relative duality gaps.
        objective_: (1,) or (K,) objectives.
        n_iter_: sweeps over the working set.
        n_features_in_: D.

    Args:
        C: cost of a row.
        loss: `hinge` or `squared_hinge`.
        positive_weight: the cost of a row of the class itself is this times C.
        bias_scale: value of the constant feature that carries the bias (`intercept_scaling`).
        tol: largest relative duality gap of a class.
        max_passes: passes over all rows before giving up on `tol`.
        random_state: seed of the order of coordinates; the same on any number of threads.

    See Also:
        sklearn.svm.LinearSVC: the better choice for sparse input, or a few hundred rows.
    """

    def __init__(
        self,
        *,
        C: float = 1.0,
        loss: Literal["hinge", "squared_hinge"] = "squared_hinge",
        positive_weight: float = 1.0,
        bias_scale: float = 1.0,
        tol: float = 1e-3,
        max_passes: int = 20,
        random_state: int = 0,
    ) -> None:
        self.C = C
        self.loss = loss
        self.positive_weight = positive_weight
        self.bias_scale = bias_scale
        self.tol = tol
        self.max_passes = max_passes
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Train on (n, D) rows and (n,) labels.

        Raises:
            ConfigError: a parameter out of range.
            ValueError: X or y cannot be used, fewer than two classes among it.
        """
        for name in ("C", "positive_weight", "bias_scale", "tol", "max_passes"):
            require_positive("LinearSVM", {name: getattr(self, name)})
        if self.loss not in ("hinge", "squared_hinge"):
            raise ConfigError(f"LinearSVM: loss must be one of hinge, squared_hinge, got {self.loss!r}.")
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64], order="C")
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        n_classes = len(self.classes_)
        if n_classes < 2:
            raise ValueError(
                f"LinearSVM: y must hold at least two classes, got one class: {self.classes_[0]}."
            )
        columns = np.arange(n_classes) if n_classes > 2 else np.array([1])
        labels = np.where(index[:, None] == columns, 1, -1).astype(np.int8)
        solution = self._solve(X, labels)
        self.coef_, self.intercept_ = solution.coef, solution.intercept
        self.gap_, self.objective_, self.n_iter_ = solution.gap, solution.primal, solution.epochs
        return self

    def _solve(self, X: NDArray[Any], labels: NDArray[np.int8]) -> Solution:
        solver = BlockSolver(
            MatrixSource(X, labels),
            squared=self.loss == "squared_hinge",
            positive_weight=self.positive_weight,
            bias_scale=self.bias_scale,
            tol=self.tol,
            max_passes=self.max_passes,
            seed=self.random_state,
            dtype=X.dtype,
        )
        solution = solver.solve(np.full(labels.shape[1], self.C))
        if not solution.converged:
            warnings.warn(
                f"LinearSVM: the relative duality gap is {solution.gap.max():.1e} after "
                f"{solution.epochs} epochs, above tol={self.tol}. Raise max_passes, or scale the features.",
                ConvergenceWarning,
                stacklevel=3,
            )
        return solution

    def decision_function(self, X: Any) -> NDArray[Any]:
        """Return (n,) scores of the second class for two classes, else (n, K)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        scores: NDArray[Any] = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> NDArray[Any]:
        """Return (n,) labels of the highest scores."""
        scores = self.decision_function(X)
        index = (scores > 0).astype(np.int64) if scores.ndim == 1 else scores.argmax(axis=1)
        labels: NDArray[Any] = self.classes_[index]
        return labels
