from __future__ import annotations

import numpy as np
import pytest
from sklearn.svm import SVC

from rcnn_svm.errors import ConfigError
from rcnn_svm.heads.assign import SVM_RULE
from rcnn_svm.heads.base import ArrayBlocks
from rcnn_svm.heads.kernel_solver import solve_pairs
from rcnn_svm.heads.kernel_svm import KernelSVMHead, NystroemSVMHead, hardest_regions
from rcnn_svm.heads.kernels import RBF, rbf_kernel, squared_distances
from rcnn_svm.heads.linear_svm import LinearSVMHead
from rcnn_svm.heads.mining import BlocksSource
from rcnn_svm.heads.recipe import HeadRecipe
from rcnn_svm.heads.scorers import KernelScorer


def test_distances_are_symmetric_and_right(rng: np.random.Generator) -> None:
    x = (rng.normal(size=(1500, 6)) + 30).astype(np.float32)
    distances = squared_distances(x)
    expected = ((x[:, None].astype(np.float64) - x[None]) ** 2).sum(-1)
    np.testing.assert_allclose(distances, expected, atol=1e-4)
    np.testing.assert_array_equal(distances, distances.T)
    assert not distances.diagonal().any()


@pytest.mark.parametrize("C", [0.1, 1.0, 100.0])
def test_pairs_solve_the_problem_of_libsvm(rng: np.random.Generator, C: float) -> None:
    x = rng.normal(size=(200, 5)).astype(np.float32)
    y = np.where(x[:, 0] + 0.5 * rng.normal(size=200) > 0.8, 1, -1).astype(np.int8)
    kernel = rbf_kernel(squared_distances(x), 0.3)
    bounds, alpha = np.where(y > 0, 2 * C, C), np.zeros(200)
    bias, violation, _ = solve_pairs(kernel, np.arange(200), y, bounds, alpha, 1e-6, 10**6)
    oracle = SVC(C=C, gamma=0.3, class_weight={1: 2}, tol=1e-6).fit(x, y)
    assert violation < 1e-6
    assert abs(alpha @ y) < 1e-9 * max(1, C)
    assert (alpha >= 0).all()
    assert (alpha <= bounds).all()
    np.testing.assert_allclose(kernel @ (alpha * y) + bias, oracle.decision_function(x), atol=1e-4)


def test_head_equals_twenty_lines_of_svc(blocks: ArrayBlocks) -> None:
    miner = LinearSVMHead(C=0.1).fit(blocks)
    ours = KernelSVMHead(max_rows=300, tol=1e-5, miner=miner).fit(blocks)
    theirs = KernelSVMHead(max_rows=300, tol=1e-5, miner=miner, solver="libsvm").fit(blocks)
    threads = KernelSVMHead(max_rows=300, tol=1e-5, miner=miner, n_jobs=2).fit(blocks)
    x = blocks.features(0)
    np.testing.assert_allclose(ours.decision_function(x), theirs.decision_function(x), atol=1e-4)
    np.testing.assert_array_equal(ours.decision_function(x), threads.decision_function(x))
    assert ours.n_rows_ <= 300
    assert ours.n_support_.shape == (3,)


def test_the_grid_ends_where_single_fits_do(blocks: ArrayBlocks) -> None:
    miner = LinearSVMHead(C=0.1).fit(blocks)
    settings = [{"kernel": kernel, "C": C} for kernel in (RBF(0.02), RBF()) for C in (0.1, 1.0)]
    grid = list(KernelSVMHead(max_rows=300, miner=miner, tol=1e-5).fit_grid(blocks, settings))
    assert [fitted.settings for fitted in grid] == settings
    x = blocks.features(2)
    for fitted in grid:
        single = KernelSVMHead(**fitted.settings, max_rows=300, miner=miner, tol=1e-5).fit(blocks)
        np.testing.assert_allclose(fitted.scorer.decision_function(x), single.decision_function(x), atol=1e-3)


def test_a_value_that_the_grid_names_twice_changes_no_other(blocks: ArrayBlocks) -> None:
    miner = LinearSVMHead(C=0.1).fit(blocks)
    head, x = KernelSVMHead(max_rows=300, miner=miner, tol=1e-5), blocks.features(2)
    first = RBF(0.1)
    settings = [{"kernel": kernel} for kernel in (first, RBF(0.5), first, RBF(0.1))]
    for fitted, wanted in zip(list(head.fit_grid(blocks, settings)), settings, strict=True):
        (single,) = head.fit_grid(blocks, [wanted])
        np.testing.assert_array_equal(fitted.scorer.decision_function(x), single.scorer.decision_function(x))


def test_hardest_regions_hold_all_positives_and_the_top_negatives(blocks: ArrayBlocks) -> None:
    source = BlocksSource(blocks, SVM_RULE)
    score = LinearSVMHead(C=0.1).fit(blocks).decision_function
    keys = hardest_regions(source, score, 150)
    assert 140 < len(keys) <= 150
    chosen = {tuple(key) for key in keys.tolist()}
    for i in range(len(source)):
        for row in np.flatnonzero((source.labels(i) > 0).any(axis=1)):
            assert (i, int(row)) in chosen
    everything = [
        (float(score(source.features(i))[row, 0]), i, int(row))
        for i in range(len(source))
        for row in np.flatnonzero(source.labels(i)[:, 0] < 0)
    ]
    for _, i, row in sorted(everything, reverse=True)[:10]:
        assert (i, row) in chosen
    with pytest.raises(ConfigError, match=r"max_rows must hold the \d+ positive regions, got 5"):
        hardest_regions(source, score, 5)


def test_nystroem_ranks_as_the_exact_machine(blocks: ArrayBlocks) -> None:
    exact = KernelSVMHead(max_rows=2000).fit(blocks)
    approximate = NystroemSVMHead(n_landmarks=400, kernel=exact.kernel_, tol=1e-2).fit(blocks)
    few = NystroemSVMHead(n_landmarks=50, kernel=exact.kernel_, tol=1e-2).fit(blocks)
    x = np.concatenate(blocks.blocks)
    for k in range(3):
        a, b = exact.decision_function(x)[:, k], approximate.decision_function(x)[:, k]
        assert np.corrcoef(a, b)[0, 1] > 0.97
        assert np.corrcoef(a, few.decision_function(x)[:, k])[0, 1] > 0.8
    assert len(few.scorer_.to_arrays()["support"]) == 50


def test_messages(blocks: ArrayBlocks) -> None:
    with pytest.raises(ConfigError, match=r"^RBF\.gamma must be positive, got -1\.0\.$"):
        KernelSVMHead(kernel=RBF(-1))
    with pytest.raises(ConfigError, match=r"^KernelSVMHead: solver must be one of smo, libsvm, got 'x'\.$"):
        KernelSVMHead(solver="x").fit(blocks)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="n_landmarks must be a finite number > 0"):
        NystroemSVMHead(n_landmarks=0).fit(blocks)


@pytest.mark.parametrize("random_negatives", [None, 20])
@pytest.mark.parametrize(
    "head",
    [KernelSVMHead(max_rows=300, tol=1e-2), NystroemSVMHead(n_landmarks=40, tol=1e-2)],
    ids=["exact", "nystroem"],
)
def test_a_fitted_machine_says_which_regions_its_support_vectors_are(
    blocks: ArrayBlocks, head: KernelSVMHead | NystroemSVMHead, random_negatives: int | None
) -> None:
    recipe = HeadRecipe("kernel", head, {"C": [0.1, 1.0]}, random_negatives=random_negatives)
    for fitted in recipe.fit(blocks, recipe.settings()):
        assert isinstance(fitted.scorer, KernelScorer)
        assert fitted.support is not None
        assert len(fitted.support) == len(fitted.scorer.support) > 10
        rows = [blocks.features(i)[row] for i, row in fitted.support.tolist()]
        np.testing.assert_array_equal(fitted.scorer.support, np.asarray(rows, np.float32))
    linear = HeadRecipe("linear", LinearSVMHead(C=0.1), random_negatives=random_negatives)
    (fitted,) = linear.fit(blocks, [{}])
    assert fitted.support is None
