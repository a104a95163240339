"""Invariants of the working set, which hold whatever comes and goes, in memory and from a store."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm.heads.solver import BlockSolver, MatrixSource, Tuning
from rcnn_svm.heads.solver.ascent import Ascent
from rcnn_svm.heads.solver.tuning import FROM_STORE, IN_MEMORY
from rcnn_svm.heads.solver.weights import Costs
from rcnn_svm.heads.solver.working_set import FromStore, InMemory, WorkingSet

K, D, STEP = 3, 5, 40


class _Slabs(MatrixSource):
    _STEP = STEP


def _source(seed: int, n: int, in_memory: bool) -> tuple[_Slabs, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D))
    labels = rng.integers(-1, 2, (n, K)).astype(np.int8)
    labels[0], labels[-1] = 1, -1
    weight = rng.choice([0.5, 1.0, 3.0], n)
    source = _Slabs(x, labels, weight)
    if not in_memory:
        source.matrix = None
    return source, x, labels, weight


def _working_set(source: _Slabs, costs: Costs, max_rows: int, tuning: Tuning) -> WorkingSet:
    matrix = source.matrix
    dtype = np.dtype(np.float64)
    storage = FromStore(source, max_rows, dtype) if matrix is None else InMemory(source, matrix)
    return WorkingSet(source, storage, costs, max_rows, tuning)


def _variables(working: WorkingSet, n: int) -> np.ndarray:
    """(n, K) variables of all rows of the source; no row may be both in and out."""
    working.join()
    alpha = np.zeros((n, K))
    owner = np.zeros(n, int)
    own = working.rows.part * STEP + working.rows.row
    np.add.at(owner, own, 1)
    alpha[own] = working.rows.alpha
    for part, (rows, kept) in working.kept.items():
        assert (np.diff(rows) > 0).all()
        assert (kept != 0).any(axis=1).all()
        owner[part * STEP + rows] += 1
        alpha[part * STEP + rows] = kept
    assert owner.max() <= 1
    assert len(own) == working.size <= working.max_rows
    return alpha


def _check(working: WorkingSet, x: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    alpha, costs = _variables(working, len(x)), working.costs
    assert (alpha >= 0).all()
    assert (alpha[labels == 0] == 0).all()
    if not costs.squared:
        assert (alpha <= costs.bounds(labels, weight) * (1 + 1e-15)).all()  # scaling may round up
    own = working.rows.part * STEP + working.rows.row
    np.testing.assert_array_equal(working.features(np.arange(working.size)), x[own])
    np.testing.assert_array_equal(working.rows.labels, labels[own])
    np.testing.assert_array_equal(working.rows.sample_weight, weight[own])
    kept = np.zeros(K)
    for part, (rows, variables) in working.kept.items():
        kept += costs.linear(variables, labels[part * STEP + rows], weight[part * STEP + rows])
    np.testing.assert_allclose(working.kept_linear, kept, atol=1e-9)
    np.testing.assert_allclose(working.linear(), costs.linear(alpha, labels, weight), atol=1e-9)
    return alpha


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.integers(0, 12))
def test_rows_come_and_go_with_their_variables(
    seed: int, in_memory: bool, squared: bool, n_steps: int
) -> None:
    """Random admissions, values, evictions and changes of costs."""
    source, x, labels, weight = _source(seed, 130, in_memory)
    rng = np.random.default_rng(seed)
    costs = Costs(rng.uniform(0.1, 2, (K, 2)), squared)
    working = _working_set(source, costs, 60, IN_MEMORY if in_memory else FROM_STORE)
    expected = np.zeros((len(x), K))
    for _ in range(n_steps):
        part = int(rng.integers(len(source)))
        inside = working.rows.row[working.rows.part == part]
        outside = np.setdiff1d(np.arange(len(source.labels(part))), inside)
        rows = outside[rng.random(len(outside)) < 0.5][: working.max_rows - working.size]
        features = source.features(part)
        working.admit(part, rows, source.labels(part), features.__getitem__ if rng.random() < 0.5 else None)
        np.testing.assert_array_equal(_check(working, x, labels, weight), expected)
        own = working.rows.part * STEP + working.rows.row
        highest = costs.bounds(working.rows.labels, working.rows.sample_weight)
        values = rng.choice([0.0, 0.4, 1.0], highest.shape) * highest * (working.rows.labels != 0)
        working.rows.alpha[:] = expected[own] = values
        working.rows.nearest[:] = rng.uniform(0, 2, len(own))
        working.rows.hot[:] = (values != 0).any(axis=1)
        working.evict(int(rng.integers(10, 61)))
        np.testing.assert_array_equal(_check(working, x, labels, weight), expected)
        ratio = rng.uniform(0.3, 3, K)
        costs.table = costs.table * ratio[:, None]
        expected *= working.rescale(ratio, rng.uniform(0, 2, K))
        scaled = _check(working, x, labels, weight)
        np.testing.assert_allclose(scaled, expected, rtol=1e-12)
        expected = scaled


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.sampled_from([1.0, 10.0]))
def test_weights_are_the_sum_of_the_rows(
    seed: int, in_memory: bool, squared: bool, bias_scale: float
) -> None:
    """After every optimisation of a solver whose working set is too small, along a path of costs."""
    source, x, labels, weight = _source(seed, 300, in_memory)
    checked = []

    class Checked(Ascent):
        def optimise(self, goal: float) -> None:
            super().optimise(goal)
            alpha = _check(self._working, x, labels, weight)
            np.testing.assert_allclose(self._weights.w, (alpha * labels).T @ x, atol=1e-8)
            np.testing.assert_allclose(self._weights.balance, (alpha * labels).sum(axis=0), atol=1e-8)
            checked.append(goal)

    options: dict[str, Any] = {"positive_weight": 2, "bias_scale": bias_scale, "dtype": np.float64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rcnn_svm.heads.solver.solve.Ascent", Checked)
        solver = BlockSolver(
            source, squared=squared, **options, max_bytes=90 * 400, max_passes=8,
            tuning=Tuning(
                seed_rows=40, growth_rows=20, block_rows=8, trusts_epochs=in_memory, polish_every=1,
                polish_every_warm=1, polish_work=1e9,
            ),
        )  # fmt: skip
        for cost in (0.1, 0.5, 0.2):
            solution = solver.solve(np.full(K, cost))
            assert not solution.converged or (solution.dual <= solution.primal + 1e-9).all()
    assert len(checked) > 3
