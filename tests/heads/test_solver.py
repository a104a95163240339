from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from rcnn_svm.heads.solver import BlockSolver, MatrixSource, Solution


class _Parts(MatrixSource):
    """The same rows as if they came from a store: in parts of 64, copied into the working set."""

    _STEP = 64

    def __init__(self, matrix: np.ndarray, labels: np.ndarray) -> None:
        super().__init__(matrix, labels)
        self.matrix = None


def _problem(n: int = 300, d: int = 30, k: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(n, d)), 0)
    scores = x @ rng.normal(size=(d, k)) + rng.normal(size=(n, k))
    labels = np.where(scores > np.quantile(scores, 0.9, axis=0), 1, -1).astype(np.int8)
    labels[rng.random((n, k)) < 0.1] = 0
    labels[:2] = [[1], [-1]]
    return x, labels


def _objective(
    x: np.ndarray, labels: np.ndarray, solution: Solution, costs: np.ndarray, squared: bool, bias_scale: float
) -> np.ndarray:
    """The primal objective, written down a second time."""
    coef, intercept = solution.coef.astype(np.float64), solution.intercept.astype(np.float64)
    short = np.maximum(0, 1 - labels * (x @ coef.T + intercept)) * (labels != 0)
    loss = short**2 if squared else short
    cost = np.where(labels > 0, 2 * costs, costs)
    return 0.5 * (coef**2).sum(1) + 0.5 * (intercept / bias_scale) ** 2 + (cost * loss).sum(0)


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge"])
@pytest.mark.parametrize("source", [MatrixSource, _Parts])
def test_same_optimum_as_linear_svc(loss: str, source: type[MatrixSource]) -> None:
    x, labels = _problem()
    squared = loss == "squared_hinge"
    costs = np.array([0.01, 0.1, 1.0, 0.3])
    solver = BlockSolver(
        source(x, labels), squared=squared, positive_weight=2, bias_scale=3, tol=1e-7, dtype=np.float64
    )
    solution = solver.solve(costs)
    assert solution.converged
    np.testing.assert_allclose(solution.primal, _objective(x, labels, solution, costs, squared, 3), rtol=1e-9)
    for k in range(4):
        rows = labels[:, k] != 0
        oracle = LinearSVC(
            C=costs[k], loss=loss, dual=True, tol=1e-9, intercept_scaling=3,
            class_weight={1: 2, -1: 1}, max_iter=10**6, random_state=0,
        ).fit(x[rows], labels[rows, k])  # fmt: skip
        scores = x @ solution.coef[k] + solution.intercept[k]
        np.testing.assert_allclose(scores, oracle.decision_function(x), atol=2e-3)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("source", [MatrixSource, _Parts])
def test_many_idle_rows_change_nothing(source: type[MatrixSource], squared: bool) -> None:
    x, labels = _problem(n=400, seed=6)
    rng = np.random.default_rng(0)
    costs = np.full(4, 0.1)
    options = {
        "squared": squared,
        "positive_weight": 2.0,
        "bias_scale": 3.0,
        "tol": 1e-6,
        "dtype": np.float64,
    }
    few = BlockSolver(MatrixSource(x, labels), **options).solve(costs)
    # Rows far outside every margin, and rows just outside, which are looked at again and again.
    scores = x @ few.coef.T + few.intercept
    easy = np.flatnonzero((labels * scores > 1.001).all(axis=1))
    copies = np.concatenate([easy] * 60)
    order = rng.permutation(len(x) + len(copies))
    many_x, many_labels = (
        np.concatenate([x, x[copies]])[order],
        np.concatenate([labels, labels[copies]])[order],
    )
    assert len(many_x) > 2000
    many = BlockSolver(source(many_x, many_labels), **options).solve(costs)
    assert many.converged
    np.testing.assert_allclose(many.primal, few.primal, rtol=1e-5)
    np.testing.assert_allclose(
        many.primal, _objective(many_x, many_labels, many, costs, squared, 3), rtol=1e-9
    )


@pytest.mark.parametrize("squared", [False, True])
def test_float32_gap_is_a_true_bound(squared: bool) -> None:
    x, labels = _problem(seed=1)
    costs = np.full(4, 0.05)
    options = {"squared": squared, "positive_weight": 2.0, "bias_scale": 10.0}
    best = BlockSolver(MatrixSource(x, labels), **options, tol=1e-6, dtype=np.float64).solve(costs)
    found = BlockSolver(MatrixSource(x.astype(np.float32), labels), **options).solve(costs)
    assert found.coef.dtype == np.float32
    assert (found.gap <= 1e-3).all()
    assert (found.dual <= best.primal * (1 + 1e-5)).all()
    excess = _objective(x, labels, found, costs, squared, 10) / best.primal - 1
    assert (excess <= found.gap + 1e-5).all()
    assert (excess > -1e-6).all()


def test_a_tiny_cache_reaches_the_same_optimum() -> None:
    x, labels = _problem(seed=2)
    costs = np.full(4, 0.3)
    options = {"positive_weight": 2.0, "bias_scale": 3.0, "tol": 1e-5, "dtype": np.float64}
    for squared in (False, True):
        whole = BlockSolver(MatrixSource(x, labels), squared=squared, **options).solve(costs)
        small = BlockSolver(
            _Parts(x, labels), squared=squared, **options, max_bytes=64 * 600, max_passes=500
        ).solve(costs)
        assert small.converged
        assert small.n_working < 150  # of 300, of which more support some class
        np.testing.assert_allclose(small.primal, whole.primal, rtol=2e-5)


def test_a_warm_start_needs_fewer_epochs_and_ends_alike() -> None:
    x, labels = _problem(seed=3)
    options = {"squared": False, "positive_weight": 2.0, "bias_scale": 3.0, "dtype": np.float64, "tol": 1e-5}
    warm = BlockSolver(MatrixSource(x, labels), **options)
    first = warm.solve(np.full(4, 0.1))
    second = warm.solve(np.full(4, 0.12))
    cold = BlockSolver(MatrixSource(x, labels), **options).solve(np.full(4, 0.12))
    np.testing.assert_allclose(second.primal, cold.primal, rtol=1e-5)
    assert second.epochs - first.epochs < cold.epochs
    lower = warm.solve(np.full(4, 0.1))
    np.testing.assert_allclose(lower.primal, first.primal, rtol=1e-5)


def test_bitwise_the_same_on_any_number_of_threads() -> None:
    x, labels = _problem(n=700, d=300, seed=4)
    results = []
    for threads in (1, 2, 2):
        with threadpool_limits(threads):
            solver = BlockSolver(
                MatrixSource(x.astype(np.float32), labels), squared=True, positive_weight=2, bias_scale=10
            )
            results.append(solver.solve(np.full(4, 0.1)))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].coef, other.coef)
        np.testing.assert_array_equal(results[0].primal, other.primal)


def test_the_seed_matters_only_within_the_tolerance() -> None:
    x, labels = _problem(seed=5)
    a, b = (
        BlockSolver(
            MatrixSource(x.astype(np.float32), labels),
            squared=True,
            positive_weight=1,
            bias_scale=1,
            seed=seed,
        ).solve(np.full(4, 0.1))
        for seed in (0, 1)
    )
    assert not np.array_equal(a.coef, b.coef)
    np.testing.assert_allclose(a.primal, b.primal, rtol=2e-3)


def test_awkward_rows() -> None:
    """Zero rows, constant columns, duplicates with opposite labels, a single positive."""
    x = np.zeros((300, 6), np.float32)
    x[:, 0] = 5
    x[100:, 1] = np.linspace(-1, 1, 200)
    labels = np.full((300, 2), -1, np.int8)
    labels[299, 0] = 1
    labels[::2, 1] = 1
    for squared in (False, True):
        solution = BlockSolver(
            MatrixSource(x, labels), squared=squared, positive_weight=2, bias_scale=10
        ).solve(np.full(2, 0.1))
        assert solution.converged
        assert np.isfinite(solution.coef).all()


def test_stopping_early_is_told() -> None:
    x, labels = _problem(seed=6)
    solution = BlockSolver(
        MatrixSource(x, labels), squared=False, positive_weight=1, bias_scale=1, tol=1e-12, max_passes=1
    ).solve(np.full(4, 1.0))
    assert not solution.converged
    assert np.isfinite(solution.primal).all()


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32 - 1), st.integers(2, 90), st.integers(1, 8), st.booleans(), st.floats(-3, 1),
)  # fmt: skip
def test_weak_duality_and_convergence(seed: int, n: int, d: int, squared: bool, log_cost: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    labels = rng.integers(-1, 2, (n, 2)).astype(np.int8)
    labels[0], labels[-1] = 1, -1
    solution = BlockSolver(
        MatrixSource(x, labels), squared=squared, positive_weight=2, bias_scale=1, dtype=np.float64
    ).solve(np.full(2, 10**log_cost))
    assert (solution.dual <= solution.primal + 1e-9).all()
    assert solution.converged


@pytest.mark.parametrize("squared", [False, True])
def test_a_bias_that_ties_all_rows_together(squared: bool) -> None:
    """Rows of length 1 beside a constant feature of 10: what defeats plain coordinate ascent."""
    x, labels = _problem(n=600, d=40, seed=7)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for source in (MatrixSource, _Parts):
        solution = BlockSolver(
            source(x.astype(np.float32), labels), squared=squared, positive_weight=2, bias_scale=10
        ).solve(np.full(4, 1.0))
        assert solution.converged
        assert solution.epochs < 300
        best = LinearSVC(
            C=1.0, loss="squared_hinge" if squared else "hinge", dual=True, tol=1e-6, intercept_scaling=10,
            class_weight={1: 2, -1: 1}, max_iter=10**6, random_state=0,
        ).fit(x[labels[:, 0] != 0], labels[labels[:, 0] != 0, 0])  # fmt: skip
        oracle = Solution(best.coef_, best.intercept_, np.zeros(1), np.zeros(1), 0, 0, 0, True)
        least = _objective(x, labels[:, :1], oracle, np.ones(1), squared, 10)[0]
        assert least * (1 - 1e-4) <= solution.primal[0] <= least * (1 + 1.1e-3)
