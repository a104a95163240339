from __future__ import annotations

import numpy as np
import pytest

from rcnn_svm.errors import ShapeError
from rcnn_svm.evaluation.crossed import crossed_mean


def test_without_an_effect_of_columns_it_is_the_t_interval_over_rows() -> None:
    from scipy.stats import ttest_1samp

    rows = np.array([0.3, 0.1, 0.4, -0.1, 0.2])
    got = crossed_mean(np.repeat(rows[:, None], 50, axis=1))
    expected = ttest_1samp(rows, 0)
    low, high = expected.confidence_interval()
    assert (got.mean.value, got.mean.low, got.mean.high) == pytest.approx((rows.mean(), low, high))
    assert got.p == pytest.approx(expected.pvalue)


def test_without_an_effect_of_rows_it_is_the_normal_interval_over_columns(rng: np.random.Generator) -> None:
    columns = rng.normal(0.1, 1, 400)
    got = crossed_mean(np.repeat(columns[None], 5, axis=0))
    half = 1.96 * columns.std(ddof=1) / np.sqrt(400)
    assert got.mean.high - got.mean.value == pytest.approx(half, rel=1e-3)
    assert got.detectable == pytest.approx(half * 2.8 / 1.96, rel=1e-3)
    many = crossed_mean(np.repeat(columns[None], 5, axis=0), n_tests=20)
    assert (many.p, many.mean) == (got.p, got.mean)
    assert many.detectable == pytest.approx(half * (3.023 + 0.842) / 1.96, rel=1e-3)


def test_intervals_hold_the_truth_as_often_as_they_say_where_both_vary(rng: np.random.Generator) -> None:
    n, held = 1000, 0
    for _ in range(n):
        rows, columns = rng.normal(0, 0.1, (5, 1)), rng.normal(0, 1, (1, 60))
        interval = crossed_mean(rows + columns + rng.normal(0, 1, (5, 60))).mean
        held += interval.low <= 0 <= interval.high
    assert 0.93 <= held / n <= 0.98


def test_nothing_that_varies_leaves_no_doubt() -> None:
    assert crossed_mean(np.zeros((3, 4))).p == 1
    always = crossed_mean(np.ones((3, 4)))
    assert (always.mean.low, always.mean.high, always.p) == (1, 1, 0)
    with pytest.raises(ShapeError, match=r"2 or more of each, got shape \(1, 9\)"):
        crossed_mean(np.zeros((1, 9)))
