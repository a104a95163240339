from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC

from rcnn_svm.errors import ConfigError, DataError, NotFittedError, ShapeError
from rcnn_svm.heads.assign import SVM_RULE
from rcnn_svm.heads.base import ArrayBlocks
from rcnn_svm.heads.linear_svm import LinearSVMHead
from rcnn_svm.heads.mining import BlocksSource, FixedPointMining, PaperMining, mine_as_in_the_paper


def _all_rows(blocks: ArrayBlocks) -> tuple[np.ndarray, np.ndarray]:
    features = np.concatenate([np.asarray(b, np.float64) for b in blocks.blocks])
    return features, np.concatenate([SVM_RULE.per_class(t) for t in blocks.truths])


def _objective(
    head: LinearSVMHead, coef: np.ndarray, intercept: np.ndarray, x: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    short = np.maximum(0, 1 - labels * (x @ coef.T + intercept)) * (labels != 0)
    loss = short**2 if head.loss == "squared_hinge" else short
    cost = np.where(labels > 0, head.positive_weight, 1) * head.C
    norm = (coef**2).sum(1) + (intercept / head.bias_scale) ** 2
    return 0.5 * norm + (cost * loss).sum(0)


def _replaced(blocks: ArrayBlocks, i: int, features: np.ndarray) -> ArrayBlocks:
    changed = list(blocks.blocks)
    changed[i] = features
    return ArrayBlocks(tuple(changed), blocks.truths, blocks.classes)


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge"])
@pytest.mark.parametrize("max_bytes", [1 << 30, 30_000])
def test_mining_ends_at_the_svm_over_all_negatives(blocks: ArrayBlocks, loss: str, max_bytes: int) -> None:
    head = LinearSVMHead(C=0.1, loss=loss, mining=FixedPointMining(max_passes=200, max_bytes=max_bytes))
    head.fit(blocks)
    x, labels = _all_rows(blocks)
    reached = _objective(head, head.coef_.astype(float), head.intercept_.astype(float), x, labels)
    np.testing.assert_allclose(reached, head.objective_, rtol=1e-4)
    for k in range(3):
        rows = labels[:, k] != 0
        direct = LinearSVC(
            C=0.1, loss=loss, dual=True, tol=1e-8, intercept_scaling=10, class_weight={1: 2},
            max_iter=10**6, random_state=0,
        ).fit(x[rows], labels[rows, k])  # fmt: skip
        best = _objective(head, direct.coef_, direct.intercept_, x, labels[:, [k]])[0]
        assert best * (1 - 1e-4) <= reached[k] <= best * (1 + 1e-3)
        assert reached[k] - best <= head.gap_[k] * reached[k] + 1e-4 * best


def test_average_precision_as_linear_svc(blocks: ArrayBlocks) -> None:
    """At the default tolerance: within 0.1 points of AP, class by class."""
    head = LinearSVMHead(C=0.1).fit(blocks)
    x, labels = _all_rows(blocks)
    scores = head.decision_function(x)
    for k in range(3):
        rows = labels[:, k] != 0
        direct = LinearSVC(
            C=0.1, loss="hinge", dual=True, tol=1e-8, intercept_scaling=10, class_weight={1: 2},
            max_iter=10**6, random_state=0,
        ).fit(x[rows], labels[rows, k])  # fmt: skip
        truth = labels[rows, k] > 0
        ours, theirs = (
            average_precision_score(truth, each)
            for each in (scores[rows, k], direct.decision_function(x[rows]))
        )
        assert abs(ours - theirs) <= 1e-3


def test_float16_and_float32_blocks_give_nearly_the_same(blocks: ArrayBlocks) -> None:
    half = ArrayBlocks(tuple(b.astype(np.float16) for b in blocks.blocks), blocks.truths, blocks.classes)
    a, b = LinearSVMHead(C=0.1).fit(blocks), LinearSVMHead(C=0.1).fit(half)
    x = blocks.features(0)
    np.testing.assert_allclose(a.decision_function(x), b.decision_function(x), atol=0.05)


def test_the_path_ends_where_single_fits_do(blocks: ArrayBlocks) -> None:
    path = LinearSVMHead().fit_path(blocks, [0.01, 0.1, 1.0], tol=1e-5)
    x = blocks.features(1)
    for scorer, C in zip(path, [0.01, 0.1, 1.0], strict=True):
        single = LinearSVMHead(C=C, tol=1e-5).fit(blocks)
        np.testing.assert_allclose(scorer.decision_function(x), single.decision_function(x), atol=0.03)


def test_one_cost_per_class(blocks: ArrayBlocks) -> None:
    mixed = LinearSVMHead(C=[0.01, 0.1, 1.0], tol=1e-5).fit(blocks)
    x = blocks.features(1)
    for k, C in enumerate([0.01, 0.1, 1.0]):
        single = LinearSVMHead(C=C, tol=1e-5).fit(blocks)
        difference = mixed.decision_function(x)[:, k] - single.decision_function(x)[:, k]
        assert np.abs(difference).max() < 0.03


def _slow_paper_schedule(
    blocks: ArrayBlocks, schedule: PaperMining, train: Callable
) -> tuple[np.ndarray, list[int]]:
    """The schedule a second time: whole copies, nothing shared."""
    x = [np.asarray(b) for b in blocks.blocks]
    labels = [SVM_RULE.per_class(t) for t in blocks.truths]
    n_classes = labels[0].shape[1]
    coef, intercept = np.zeros((n_classes, x[0].shape[1])), np.zeros(n_classes)
    cache: list[list[tuple[int, int]]] = [[] for _ in range(n_classes)]
    added, trained = [0] * n_classes, [0] * n_classes
    for i in range(len(x)):
        for k in range(n_classes):
            scores = x[i] @ coef[k] + intercept[k]
            for r in range(len(x[i])):
                if labels[i][r, k] == -1 and (i == 0 or scores[r] > schedule.hard):
                    cache[k].append((i, r))
                    added[k] += 1
        for k in range(n_classes):
            if i == 0 or added[k] > schedule.retrain_after or i == len(x) - 1:
                positives = [(j, r) for j in range(len(x)) for r in np.flatnonzero(labels[j][:, k] == 1)]
                rows = np.stack([x[j][r] for j, r in positives + cache[k]])
                y = np.array([1] * len(positives) + [-1] * len(cache[k]), np.int8)
                coef[k], intercept[k] = train(k, rows, y)
                cache[k] = [(j, r) for j, r in cache[k] if x[j][r] @ coef[k] + intercept[k] >= schedule.evict]
                added[k], trained[k] = 0, trained[k] + 1
    return coef, trained


def test_paper_schedule_agrees_with_a_slow_twin(blocks: ArrayBlocks) -> None:
    def train(k: int, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
        scatter = x.T @ x + np.eye(x.shape[1])  # any deterministic learner shows the schedule
        weights = np.linalg.solve(scatter, x.T @ y)
        return weights.astype(np.float32), (-0.8)

    schedule = PaperMining(retrain_after=25)
    expected, trained = _slow_paper_schedule(blocks, schedule, train)
    coef, intercept, log = mine_as_in_the_paper(BlocksSource(blocks, SVM_RULE), schedule, train)
    np.testing.assert_allclose(coef, expected, atol=1e-5)
    assert log.trainings == pytest.approx(np.mean(trained))
    assert intercept.tolist() == pytest.approx([-0.8] * 3)
    assert 1 < log.passes < 1.1  # the positives, and every row once


def test_paper_schedule_runs_on_both_solvers(blocks: ArrayBlocks) -> None:
    ours = LinearSVMHead(C=0.1, mining=PaperMining(), tol=1e-5).fit(blocks)
    theirs = LinearSVMHead(C=0.1, solver="liblinear", tol=1e-6).fit(blocks)
    parallel = LinearSVMHead(C=0.1, solver="liblinear", tol=1e-6, n_jobs=2).fit(blocks)
    x = blocks.features(0)
    np.testing.assert_allclose(ours.decision_function(x), theirs.decision_function(x), atol=0.02)
    np.testing.assert_array_equal(theirs.coef_, parallel.coef_)
    assert np.isnan(theirs.gap_).all()


def test_a_single_positive_trains(make_blocks: Callable[..., ArrayBlocks]) -> None:
    blocks = make_blocks(n_images=1, n_classes=1, seed=3)
    labels = SVM_RULE.per_class(blocks.truth(0))
    keep = np.r_[np.flatnonzero(labels[:, 0] > 0)[:1], np.flatnonzero(labels[:, 0] < 0)]
    truth = blocks.truth(0)
    fields = {name: getattr(truth, name)[keep] for name in truth.__dataclass_fields__}
    single = ArrayBlocks.from_arrays([blocks.features(0)[keep]], [type(truth)(**fields)], ["one"])
    head = LinearSVMHead(C=1.0, loss="squared_hinge").fit(single)
    assert head.decision_function(single.features(0))[:, 0].argmax() == 0


def test_bad_features_are_named_with_their_image(blocks: ArrayBlocks) -> None:
    broken = blocks.features(7).copy()
    broken[[4, 9], 2] = [np.nan, np.inf]
    with pytest.raises(DataError) as error:
        LinearSVMHead().fit(_replaced(blocks, 7, broken))
    assert str(error.value) == (
        "features of image 7: must be finite, got NaN or infinity in 2 rows (first: row 4). "
        "Compute the features of this image again."
    )


def test_messages(blocks: ArrayBlocks) -> None:
    none = ArrayBlocks(blocks.blocks, blocks.truths, blocks.classes)
    with pytest.raises(NotFittedError, match=r"^LinearSVMHead: must be fitted before use\. Call fit"):
        LinearSVMHead().decision_function(np.zeros((1, 24)))
    with pytest.raises(ConfigError, match=r"^LinearSVMHead: C must be a finite number > 0, got -1\.0\.$"):
        LinearSVMHead(C=-1).fit(none)
    with pytest.raises(
        ConfigError, match=r"^LinearSVMHead: loss must be one of hinge, squared_hinge, got 'l1'"
    ):
        LinearSVMHead(loss="l1").fit(none)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="FixedPointMining needs solver='block', got 'liblinear'"):
        LinearSVMHead(solver="liblinear", mining=FixedPointMining()).fit(none)
    with pytest.raises(ConfigError, match="got parameter 'c'"):
        LinearSVMHead().set_params(c=1)
    with pytest.raises(
        ShapeError, match=r"^LinearSVMHead: features must have shape \(R, 24\), got \(2, 3\)\.$"
    ):
        LinearSVMHead(C=0.1).fit(blocks).decision_function(np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedPointMining(max_passes=0), "FixedPointMining.max_passes must be at least 1, got 0."),
        (
            lambda: FixedPointMining(max_bytes=1e9),
            "FixedPointMining.max_bytes must be int, got 1000000000.0.",
        ),
        (lambda: PaperMining(epochs=0), "PaperMining.epochs must be at least 1, got 0."),
        (lambda: PaperMining(retrain_after=-1), "PaperMining.retrain_after must not be negative, got -1."),
        (
            lambda: PaperMining(evict=0),
            "PaperMining.evict must be at most PaperMining.hard, -1.0001, got 0.0.",
        ),
    ],
)
def test_schedules_that_cannot_work_are_refused_at_once(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message


def test_a_class_without_positives_is_named(make_blocks: Callable[..., ArrayBlocks]) -> None:
    blocks = make_blocks(n_images=1, n_classes=9)
    with pytest.raises(DataError, match=r"^SVM: every class needs a positive region, got none for class\d"):
        LinearSVMHead().fit(blocks)


def test_parameters_in_the_manner_of_scikit_learn() -> None:
    head = LinearSVMHead(C=0.5).set_params(loss="squared_hinge", tol=0.1)
    assert head.get_params()["C"] == 0.5
    assert head.get_params()["loss"] == "squared_hinge"
    assert "tol=0.1" in repr(head)


def test_every_parameter_changes_the_result(blocks: ArrayBlocks) -> None:
    base = LinearSVMHead(C=0.1).fit(blocks).coef_
    for change in (
        {"C": 0.2}, {"loss": "squared_hinge"}, {"positive_weight": 1.0}, {"bias_scale": 1.0},
        {"mining": PaperMining()}, {"solver": "liblinear"}, {"tol": 1e-6}, {"random_state": 1},
    ):  # fmt: skip
        other = LinearSVMHead(**{"C": 0.1, **change}).fit(blocks).coef_
        assert not np.array_equal(base, other), change
