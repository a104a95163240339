from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression

from rcnn_svm.errors import CacheError, ConfigError, DataError, ShapeError
from rcnn_svm.heads.calibration import calibrator_from_arrays, fit_calibrator


def _data(seed: int = 0, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n, 2)).round(2)
    p = 1 / (1 + np.exp(-(np.array([2.0, 0.7]) * scores + [-1, 0.5])))
    labels = np.where(rng.random((n, 2)) < p, 1, -1).astype(np.int8)
    labels[:3] = [[0], [1], [-1]]
    return scores, labels


def test_platt_finds_the_largest_likelihood() -> None:
    scores, labels = _data()
    fitted = fit_calibrator(scores, labels, ("a", "b"))
    for k in range(2):
        rows = labels[:, k] != 0
        s, positive = scores[rows, k], labels[rows, k] > 0
        target = np.where(positive, (positive.sum() + 1) / (positive.sum() + 2), 1 / ((~positive).sum() + 2))

        def loss(t: np.ndarray, s: np.ndarray = s, target: np.ndarray = target) -> float:
            z = t[0] * s + t[1]
            return float((np.logaddexp(0, z) - target * z).sum())

        best = minimize(loss, [0.0, 0.0], tol=1e-12)
        np.testing.assert_allclose([fitted.slope[k], fitted.offset[k]], best.x, atol=1e-3)


def test_isotonic_agrees_with_scikit_learn() -> None:
    scores, labels = _data(1)
    fitted = fit_calibrator(scores, labels, ("a", "b"), "isotonic")
    probabilities = fitted.probabilities(scores)
    for k in range(2):
        rows = labels[:, k] != 0
        oracle = IsotonicRegression(out_of_bounds="clip").fit(scores[rows, k], labels[rows, k] > 0)
        np.testing.assert_allclose(probabilities[:, k], oracle.predict(scores[:, k]), atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["platt", "isotonic"]), st.integers(4, 60))
def test_probabilities_rise_with_the_score(seed: int, method: str, n: int) -> None:
    scores, labels = _data(seed, n)
    fitted = fit_calibrator(scores, labels, ("a", "b"), method)  # type: ignore[arg-type]
    grid = np.linspace(-6, 6, 101)[:, None].repeat(2, axis=1)
    p = fitted.probabilities(grid)
    assert (np.diff(p, axis=0) >= 0).all()
    assert (p >= 0).all()
    assert (p <= 1).all()
    again = calibrator_from_arrays(fitted.kind, fitted.to_arrays())
    np.testing.assert_array_equal(again.probabilities(grid), p)


def test_perfectly_separated_scores_do_not_become_a_step() -> None:
    scores = np.concatenate([np.full(20, -1.0), np.full(2, 1.0)])[:, None]
    labels = np.where(scores > 0, 1, -1).astype(np.int8)
    p = fit_calibrator(scores, labels, ("a",)).probabilities(np.array([[-1.0], [1.0]]))
    np.testing.assert_allclose(p[:, 0], [1 / 22, 3 / 4], atol=1e-3)


def test_messages() -> None:
    scores, labels = _data()
    with pytest.raises(
        ConfigError, match=r"^fit_calibrator: method must be one of platt, isotonic, got 'x'\.$"
    ):
        fit_calibrator(scores, labels, ("a", "b"), "x")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"must have shape \(R, 1\), got \(400, 2\) and \(400, 2\)"):
        fit_calibrator(scores, labels, ("a",))
    with pytest.raises(DataError, match=r"class 'b' needs positive and negative regions, got 0 and 400"):
        fit_calibrator(scores, np.stack([labels[:, 0], np.full(400, -1)], axis=1), ("a", "b"))
    with pytest.raises(CacheError, match="kind must be one of platt, isotonic"):
        calibrator_from_arrays("x", {})
    with pytest.raises(ShapeError, match=r"scores must have shape \(R, 2\), got \(3, 1\)"):
        fit_calibrator(scores, labels, ("a", "b")).probabilities(np.zeros((3, 1)))
