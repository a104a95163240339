from __future__ import annotations

import numpy as np
import pytest

from rcnn_svm.boxes import decode_deltas, encode_deltas, iou
from rcnn_svm.errors import ConfigError, DataError, NotFittedError
from rcnn_svm.heads.base import ArrayBlocks
from rcnn_svm.heads.bbox_regressor import BoxRegressor


def _pairs(blocks: ArrayBlocks, k: int) -> tuple[np.ndarray, np.ndarray]:
    xs, ys = [], []
    for features, truth in zip(blocks.blocks, blocks.truths, strict=True):
        rows = np.flatnonzero((truth.best_iou > 0.6) & (truth.label == k))
        xs.append(features[rows].astype(np.float64))
        ys.append(encode_deltas(truth.boxes[rows], truth.target[rows]))
    return np.concatenate(xs), np.concatenate(ys)


@pytest.mark.parametrize("max_bytes", [1 << 30, 1])
def test_agrees_with_the_formula_of_the_paper(blocks: ArrayBlocks, max_bytes: int) -> None:
    regressor = BoxRegressor(strength=10.0, max_bytes=max_bytes).fit(blocks)
    for k in range(3):
        x, y = _pairs(blocks, k)
        x1 = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        mean = y.mean(axis=0)
        values, vectors = np.linalg.eigh((y - mean).T @ (y - mean) / len(y))
        whiten = vectors @ np.diag(1 / np.sqrt(values + 0.001)) @ vectors.T
        beta = np.linalg.solve(x1.T @ x1 + 10 * np.eye(x1.shape[1]), x1.T @ (y - mean) @ whiten)
        expected = x1 @ beta @ np.linalg.inv(whiten) + mean
        np.testing.assert_allclose(regressor.predict(x)[:, k], expected, atol=1e-4)
        assert regressor.n_pairs_[k] == len(x)


def test_boxes_improve_where_features_tell_the_offset(rng: np.random.Generator, blocks: ArrayBlocks) -> None:
    telling = []
    for truth in blocks.truths:
        deltas = np.zeros((len(truth), 4))
        hit = truth.label >= 0
        deltas[hit] = encode_deltas(truth.boxes[hit], truth.target[hit])
        telling.append((deltas + 0.01 * rng.normal(size=deltas.shape)).astype(np.float32))
    informed = ArrayBlocks(tuple(telling), blocks.truths, blocks.classes)
    regressor = BoxRegressor(strength=0.01).fit(informed)
    truth = blocks.truth(0)
    rows = np.flatnonzero((truth.best_iou > 0.6) & ~truth.is_gt)
    deltas = regressor.predict(telling[0][rows])[np.arange(len(rows)), truth.label[rows]]
    moved = decode_deltas(truth.boxes[rows], deltas)
    assert np.diag(iou(moved, truth.target[rows])).mean() > truth.best_iou[rows].mean() + 0.1


def test_path_equals_single_fits_and_round_trip(blocks: ArrayBlocks) -> None:
    path = BoxRegressor().fit_path(blocks, [1.0, 100.0])
    x = blocks.features(0)
    for strength, regressor in zip([1.0, 100.0], path, strict=True):
        single = BoxRegressor(strength=strength).fit(blocks)
        np.testing.assert_array_equal(regressor.predict(x), single.predict(x))
        again = BoxRegressor.from_arrays(single.to_arrays())
        np.testing.assert_array_equal(again.predict(x), single.predict(x))
    assert path[0].predict(x[:0]).shape == (0, 3, 4)
    assert np.abs(path[1].coef_).sum() < np.abs(path[0].coef_).sum()


def test_a_class_without_pairs_leaves_boxes_alone(blocks: ArrayBlocks) -> None:
    more = ArrayBlocks(blocks.blocks, blocks.truths, (*blocks.classes, "absent"))
    regressor = BoxRegressor().fit(more)
    assert regressor.n_pairs_[3] == 0
    assert not regressor.predict(blocks.features(0))[:, 3].any()


def test_it_scores_nothing(blocks: ArrayBlocks) -> None:
    regressor = BoxRegressor(strength=3.0)
    assert regressor.get_params() == {"strength": 3.0, "min_iou": 0.6, "max_bytes": 1 << 30}
    for fitted in (regressor, regressor.fit(blocks)):
        assert not hasattr(fitted, "decision_function")
        assert not hasattr(fitted, "scorer_")


def test_messages(blocks: ArrayBlocks) -> None:
    with pytest.raises(NotFittedError, match=r"^BoxRegressor: must be fitted before use"):
        BoxRegressor().predict(np.zeros((1, 2)))
    with pytest.raises(ConfigError, match=r"^BoxRegressor: strength must be a finite number > 0, got 0\.$"):
        BoxRegressor(strength=0).fit(blocks)
    with pytest.raises(ConfigError, match=r"^BoxRegressor: min_iou must lie in \[0, 1\), got 1\.$"):
        BoxRegressor(min_iou=1).fit(blocks)
    lonely = ArrayBlocks(
        tuple(b[-5:] for b in blocks.blocks),
        tuple(
            type(t)(**{n: getattr(t, n)[t.best_iou < 0.5][:5] for n in t.__dataclass_fields__})
            for t in blocks.truths
        ),
        blocks.classes,
    )
    with pytest.raises(
        DataError, match=r"^BoxRegressor: needs regions with IoU > 0\.6 to an object, got none"
    ):
        BoxRegressor().fit(lonely)
