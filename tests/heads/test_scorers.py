from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from rcnn_svm.errors import CacheError, DataError, ShapeError
from rcnn_svm.heads import scorers
from rcnn_svm.heads.kernels import RBF
from rcnn_svm.heads.scorers import KernelScorer, LinearScorer, SoftmaxScorer, scorer_from_arrays


def _scorers(rng: np.random.Generator) -> list[LinearScorer | SoftmaxScorer | KernelScorer]:
    return [
        LinearScorer(rng.normal(size=(3, 5)), rng.normal(size=3)),
        SoftmaxScorer(rng.normal(size=(4, 5)), rng.normal(size=4)),
        KernelScorer(rng.normal(size=(7, 5)), rng.normal(size=(3, 7)), rng.normal(size=3), RBF(0.3)),
    ]


def test_shapes_dtypes_and_round_trip(rng: np.random.Generator) -> None:
    for scorer in _scorers(rng):
        x = rng.normal(size=(6, 5)).astype(np.float16)
        scores = scorer.decision_function(x)
        assert scores.shape == (6, 3)
        assert scores.dtype == np.float32
        assert scorer.decision_function(x[:0]).shape == (0, 3)
        again = scorer_from_arrays(scorer.kind, scorer.to_arrays())
        np.testing.assert_array_equal(again.decision_function(x), scores)


def test_rbf_agrees_with_the_definition_in_any_chunk(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Far from the origin, where |x|^2 + |v|^2 - 2 x.v would cancel in float32.
    support, x = rng.normal(size=(40, 8)) + 50, rng.normal(size=(30, 8)) + 50
    dual, bias = rng.normal(size=(2, 40)), rng.normal(size=2)
    scorer = KernelScorer(support, dual, bias, RBF(0.2))
    distances = ((x[:, None].astype(np.float32) - support[None].astype(np.float32)) ** 2).sum(-1)
    expected = np.exp(-0.2 * distances.astype(np.float64)) @ dual.T + bias
    np.testing.assert_allclose(scorer.decision_function(x), expected, atol=1e-4)
    whole = scorer.decision_function(x)
    monkeypatch.setattr(scorers, "_CHUNK_ELEMENTS", 120)
    np.testing.assert_allclose(scorer.decision_function(x), whole, atol=1e-5)


def test_rbf_without_support_vectors_is_its_intercept() -> None:
    scorer = KernelScorer(np.zeros((0, 4)), np.zeros((2, 0)), np.array([1.0, -1.0]), RBF(1.0))
    np.testing.assert_array_equal(scorer.decision_function(np.ones((3, 4))), [[1, -1]] * 3)


def test_softmax_ranks_as_its_probabilities_without_their_ties(rng: np.random.Generator) -> None:
    scorer = SoftmaxScorer(np.eye(3) * 40, np.zeros(3))
    x = np.array([[1, 0, 0], [0.8, 0, 0], [0.6, 0, 0], [0, 0, 0]])
    scores, probabilities = scorer.decision_function(x)[:, 0], scorer.probabilities(x)[:, 0]
    assert probabilities[0] == probabilities[1] == 1  # rounded
    assert (np.diff(scores) < 0).all()
    moderate = SoftmaxScorer(rng.normal(size=(4, 3)), rng.normal(size=4))
    x = rng.normal(size=(50, 3))
    p = moderate.probabilities(x)
    np.testing.assert_allclose(moderate.decision_function(x), np.log(p / (1 - p)), rtol=1e-3, atol=1e-4)
    assert (p.sum(axis=1) < 1 + 1e-6).all()


def test_messages(rng: np.random.Generator) -> None:
    linear = _scorers(rng)[0]
    with pytest.raises(ShapeError) as shape_error:
        linear.decision_function(np.zeros((2, 4)))
    assert str(shape_error.value) == "LinearScorer: features must have shape (R, 5), got (2, 4)."
    with pytest.raises(DataError, match=r"the head 'tree', which is not one of rcnn_svm's: bring it with"):
        scorer_from_arrays("tree", {})
    with pytest.raises(CacheError, match=r"^scorer: array 'intercept' is missing"):
        scorer_from_arrays("linear", {"coef": np.zeros((1, 2))})
    with pytest.raises(ShapeError, match="dual_coef must have 2 columns, one per support vector, got 3"):
        KernelScorer(np.zeros((2, 4)), np.zeros((1, 3)), np.zeros(1), RBF(1.0))


def test_what_is_not_finite_is_refused(rng: np.random.Generator) -> None:
    for scorer in _scorers(rng):
        arrays = scorer.to_arrays()
        for name, array in arrays.items():
            broken = array.copy()
            broken.flat[-1] = np.nan
            with pytest.raises(
                DataError, match=f"^{type(scorer).__name__}: {name} must be finite, got 1 of "
            ):
                scorer_from_arrays(scorer.kind, {**arrays, name: broken})


def test_scoring_needs_neither_sklearn_nor_torch_nor_numba() -> None:
    code = (
        "import sys, rcnn_svm.heads.scorers, rcnn_svm.heads.bbox_regressor\n"
        "print([m for m in ('sklearn', 'torch', 'numba', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
