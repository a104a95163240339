from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.heads.assign import FINETUNE_RULE, SVM_RULE, LabelRule
from rcnn_svm.heads.base import ArrayBlocks
from rcnn_svm.heads.softmax import LogisticHead, SoftmaxHead, _minimise


@pytest.mark.parametrize("max_bytes", [1 << 29, 30_000, 4_000])
def test_same_optimum_as_scikit_learn(blocks: ArrayBlocks, max_bytes: int) -> None:
    head = SoftmaxHead(C=0.1, tol=1e-4, max_bytes=max_bytes).fit(blocks)
    assert head.gradient_norm_ <= 1e-4
    labels = np.concatenate([FINETUNE_RULE.multiclass(t) for t in blocks.truths])
    x = np.concatenate(blocks.blocks).astype(np.float64)
    oracle = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(x[labels >= 0], labels[labels >= 0])
    scores = blocks.features(0)
    np.testing.assert_allclose(
        head.scorer_.probabilities(scores), oracle.predict_proba(scores)[:, :-1], atol=5e-3
    )


@pytest.mark.parametrize("rule", [SVM_RULE, FINETUNE_RULE])
@pytest.mark.parametrize("max_bytes", [1 << 29, 4_000])
def test_one_against_the_rest_is_scikit_learns_optimum_of_each_class(
    blocks: ArrayBlocks, rule: LabelRule, max_bytes: int
) -> None:
    head = LogisticHead(C=0.1, tol=1e-4, rule=rule, max_bytes=max_bytes).fit(blocks)
    assert head.gradient_norm_ <= 1e-4
    labels = np.concatenate([rule.per_class(t) for t in blocks.truths])
    x = np.concatenate(blocks.blocks).astype(np.float64)
    for k in range(len(blocks.classes)):
        known = labels[:, k] != 0
        oracle = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(x[known], labels[known, k])
        np.testing.assert_allclose(head.decision_function(x)[:, k], oracle.decision_function(x), atol=2e-2)


def test_one_against_the_rest_needs_both_labels_of_each_class(blocks: ArrayBlocks) -> None:
    with pytest.raises(DataError, match=r"^LogisticHead: every class needs a region, got none for"):
        LogisticHead(rule=LabelRule(0.0, 0.0)).fit(blocks)


@pytest.mark.parametrize("max_bytes", [1 << 29, 4_000])
def test_every_c_of_a_path_is_trained_as_it_is_alone(blocks: ArrayBlocks, max_bytes: int) -> None:
    costs = [0.1, 0.3, 1.0]
    path = SoftmaxHead(max_bytes=max_bytes).fit_path(blocks, costs)
    for cost, scorer in zip(costs, path, strict=True):
        alone = SoftmaxHead(C=cost, max_bytes=max_bytes).fit(blocks)
        np.testing.assert_array_equal(scorer.coef, alone.coef_)
    assert not any(np.array_equal(a.coef, b.coef) for a, b in itertools.pairwise(path))


def test_the_rule_matters_and_shapes_hold(blocks: ArrayBlocks) -> None:
    a, b = SoftmaxHead(rule=SVM_RULE).fit(blocks), SoftmaxHead(rule=FINETUNE_RULE).fit(blocks)
    assert a.coef_.shape == (4, 24)
    assert a.decision_function(blocks.features(0)[:0]).shape == (0, 3)
    assert not np.allclose(a.coef_, b.coef_)


@pytest.mark.parametrize("max_evaluations", range(1, 12))
def test_however_early_it_stops_the_minimiser_never_climbs(max_evaluations: int) -> None:
    def quartic(x: np.ndarray) -> tuple[float, np.ndarray]:
        return float((x**4).sum()), 4 * x**3

    start = np.array([[10.0, -3.0]])  # a whole step along the gradient is far too long
    x, value, gradient, evaluations = _minimise(quartic, start, lambda g: g, 1e-9, max_evaluations)
    assert value <= quartic(start)[0]
    assert value == quartic(x)[0]
    np.testing.assert_array_equal(gradient, quartic(x)[1])
    assert evaluations <= max_evaluations


def test_messages(blocks: ArrayBlocks) -> None:
    with pytest.raises(ConfigError, match=r"^SoftmaxHead: C must be a finite number > 0, got 0\.$"):
        SoftmaxHead(C=0).fit(blocks)
    with pytest.raises(
        DataError, match=r"^SoftmaxHead: every class needs a region, got none for background in"
    ):
        SoftmaxHead(rule=LabelRule(0.0, 0.0)).fit(blocks)
    with pytest.warns(UserWarning, match="Raise max_passes, or lower C"):
        SoftmaxHead(C=10.0, tol=1e-9, max_passes=2, max_bytes=4_000).fit(blocks)
