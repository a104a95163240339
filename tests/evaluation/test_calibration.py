"""Probabilities: measures and curves against scikit-learn, intervals by brute force."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss, log_loss

from rcnn_svm.errors import ConfigError, DataError, ShapeError
from rcnn_svm.evaluation.bootstrap import resampled_images
from rcnn_svm.evaluation.calibration import (
    EPSILON,
    ISOTONIC_POSITIVES,
    PLATT_POSITIVES,
    ClassCurves,
    IsotonicScaling,
    PlattScaling,
    TemperatureScaling,
    equal_mass_edges,
    equal_width_edges,
    measure_reliability,
)


def drawn(seed, n=400, n_images=20):
    """Make probabilities, among them 0 and 1 and equal ones, outcomes and images."""
    rng = np.random.default_rng(seed)
    p = np.round(rng.beta(0.4, 0.8, n), 2)
    return p, rng.random(n) < p**1.3, rng.integers(0, n_images, n)


def margins_of(seed, n=600, n_classes=2):
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    return (rng.normal(size=n) + 2 * y).astype(np.float32), y, rng.integers(0, n_classes, n)


@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_bins_are_those_of_scikit_learn(strategy):
    p, y, image = drawn(0)
    p += np.random.default_rng(1).random(len(p)) * 1e-3  # its quantile bins do not join equal values
    p = np.clip(p, 0, 1)
    edges = equal_width_edges(10) if strategy == "uniform" else equal_mass_edges(p, 10)
    result = measure_reliability(p, y, image, edges, n_images=20, n_resamples=10)
    share, probability = calibration_curve(y, p, n_bins=10, strategy=strategy)
    present = result.count > 0
    np.testing.assert_allclose(result.share[present], share)
    np.testing.assert_allclose(result.probability[present], probability)
    assert result.count.sum() == len(p)
    expected = np.sum(result.count[present] * np.abs(share - probability)) / len(p)
    assert result.measures["calibration_error"].value == pytest.approx(expected)


def test_brier_score_and_log_loss_are_those_of_scikit_learn():
    p, y, image = drawn(2)
    p[:2], y[:2] = [0.0, 1.0], [True, False]  # both are surely wrong
    measures = measure_reliability(p, y, image, equal_width_edges(5), n_images=20, n_resamples=10).measures
    assert measures["brier_score"].value == pytest.approx(brier_score_loss(y, p))
    assert measures["log_loss"].value == pytest.approx(log_loss(y, np.clip(p, EPSILON, 1 - EPSILON)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n_bins=st.integers(1, 30))
def test_bins_of_equal_mass_hold_equally_many(seed, n_bins):
    p, y, image = drawn(seed)
    rough = measure_reliability(p, y, image, equal_mass_edges(p, n_bins), n_images=20, n_resamples=1)
    assert rough.count.sum() == len(p)
    smooth = np.random.default_rng(seed).random(400)
    edges = equal_mass_edges(smooth, n_bins)
    count = measure_reliability(smooth, y, image, edges, n_images=20, n_resamples=1).count
    assert len(count) == n_bins
    assert np.ptp(count) <= 2


def test_a_resample_is_measured_as_if_it_were_the_split():
    p, y, image = drawn(3, n=60, n_images=6)
    edges = equal_width_edges(4)
    result = measure_reliability(p, y, image, edges, n_images=6, n_resamples=5, seed=7)
    for b, weights in enumerate(resampled_images(6, 5, 7)):
        rows = np.concatenate([np.flatnonzero(image == i) for i in range(6) for _ in range(weights[i])])
        alone = measure_reliability(p[rows], y[rows], image[rows], edges, n_images=6, n_resamples=1)
        for name, value in alone.measures.items():
            assert result.samples[name][b] == pytest.approx(value.value)


def test_intervals_hold_the_value_and_widen_with_clusters():
    p, y, _ = drawn(4, n=2000)
    alone = measure_reliability(p, y, np.arange(2000), equal_width_edges(8), n_images=2000)
    order = np.argsort((p - y) ** 2)  # images that are all good or all bad
    together = np.empty(2000, int)
    together[order] = np.arange(2000) // 100
    clustered = measure_reliability(p, y, together, equal_width_edges(8), n_images=20)
    for result in (alone, clustered):
        for interval in result.measures.values():
            assert interval.low <= interval.value <= interval.high
        assert ((result.low <= result.share) & (result.share <= result.high)).all()
    narrow, wide = (r.measures["brier_score"] for r in (alone, clustered))
    assert narrow.value == pytest.approx(wide.value)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_differences_are_paired():
    p, y, image = drawn(5)
    first = measure_reliability(p, y, image, equal_width_edges(8), n_images=20)
    worse = measure_reliability(1 - p, y, image, equal_width_edges(8), n_images=20)
    assert all((of.value, of.low, of.high) == (0, 0, 0) for of in first.less(first).values())
    gain = worse.less(first)["log_loss"]
    assert gain.value == pytest.approx(worse.measures["log_loss"].value - first.measures["log_loss"].value)
    assert 0 < gain.low < gain.value < gain.high
    other = measure_reliability(p, y, image, equal_width_edges(8), n_images=21)
    with pytest.raises(ConfigError, match="the same number of images"):
        first.less(other)


def test_no_probability_at_all():
    nothing = measure_reliability([], [], [], equal_mass_edges([], 5), n_images=3, n_resamples=4).to_json()
    assert nothing["measures"]["log_loss"] == {"value": None, "low": None, "high": None}
    assert nothing["bins"] == [{"count": 0, "probability": None, "share": None, "low": None, "high": None}]


@pytest.mark.parametrize(
    ("arguments", "named", "words"),
    [
        (
            ([0.5, 1.2], [True, False], [0, 0], [0, 1]),
            {},
            r"in \[0, 1\], got 1 others \(first: 1.2 in row 1\)",
        ),
        (([np.nan], [True], [0], [0, 1]), {}, "got 1 others"),
        (([0.5], [True, False], [0], [0, 1]), {}, "one shape"),
        (([0.5], [True], [3], [0, 1]), {}, "images must lie in 0 .. 2, got 3 .. 3"),
        (([0.5], [True], [0], [0, 0.5, 0.5, 1]), {}, "edges must rise from 0 to 1"),
        (([0.5], [True], [0], [0, 1]), {"n_resamples": 0}, "n_resamples must be at least 1"),
        (([0.5], [True], [0], [0, 1]), {"n_images": 0}, "n_images must be at least 1"),
    ],
)
def test_bad_probabilities(arguments, named, words):
    with pytest.raises(ConfigError, match=words):
        measure_reliability(*arguments, **({"n_images": 3} | named))
    for edges in (equal_width_edges, lambda n: equal_mass_edges([0.5], n)):
        with pytest.raises(ConfigError, match="n_bins must be at least 1, got 0"):
            edges(0)


def test_the_sigmoid_is_that_of_platt():
    margins, y, _ = margins_of(0)
    own = PlattScaling.fit(margins, y, np.zeros(600, int), 1)
    slope, intercept = own.slope[0], own.intercept[0]
    n_positives, n_negatives = y.sum(), (~y).sum()
    target = np.where(y, (n_positives + 1) / (n_positives + 2), 1 / (n_negatives + 2))
    p = own(margins, np.zeros(600, int))
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-(slope * margins.astype(float) + intercept))))
    # Where the likelihood is highest, both sums are zero.
    assert np.sum(p - target) == pytest.approx(0, abs=1e-4)
    assert np.sum((p - target) * margins) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_sigmoid_does_not_depend_on_the_scale_of_margins(scale):
    margins, y, label = margins_of(1)
    once = PlattScaling.fit(margins, y, label, 2)
    again = PlattScaling.fit(margins * np.float32(scale) + np.float32(3 * scale), y, label, 2)
    np.testing.assert_allclose(again.slope * scale, once.slope, rtol=1e-4)


def test_margins_that_never_err_get_a_finite_sigmoid():
    margins = np.linspace(-1, 1, 40)
    own = PlattScaling.fit(margins, margins > 0, np.zeros(40, int), 1)
    assert own.own.all()
    assert 1 < own.slope[0] < 100
    none_right = PlattScaling.fit(margins, np.zeros(40, bool), np.zeros(40, int), 1)
    np.testing.assert_allclose(none_right(margins, np.zeros(40, int)), 1 / 42, rtol=1e-6)


def test_steps_are_those_of_scikit_learn():
    margins, y, label = margins_of(2)
    own = IsotonicScaling.fit(margins, y, label, 2)
    assert own.own.all()
    asked = np.linspace(-9, 9, 500)
    for k in range(2):
        theirs = IsotonicRegression(out_of_bounds="clip").fit(margins[label == k], y[label == k])
        np.testing.assert_allclose(own(asked, np.full(500, k)), theirs.predict(asked), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 300))
def test_steps_never_fall_and_are_probabilities(seed, n):
    margins, y, label = margins_of(seed, n)
    margins = np.round(margins, 1)
    if np.ptp(margins) == 0:
        return
    p = IsotonicScaling.fit(margins, y, label, 2)(np.linspace(-99, 99, 400), np.array(1))
    assert (np.diff(p) >= 0).all()
    assert 0 <= p[0] <= p[-1] <= 1


@pytest.mark.parametrize(
    ("kind", "least"), [(PlattScaling, PLATT_POSITIVES), (IsotonicScaling, ISOTONIC_POSITIVES)]
)
def test_a_class_with_few_positives_takes_the_curve_of_all(kind, least):
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1, 2], 300)
    y = np.tile(np.arange(300), 3) < np.repeat([least, least - 1, 300 - least + 1], 300)
    margins = rng.normal(size=900) + 2 * y
    fitted = kind.fit(margins, y, label, 4)
    assert fitted.own.tolist() == [True, False, False, False]
    pooled = kind.fit(margins, y, np.zeros(900, int), 1)
    asked = np.linspace(-2, 4, 50)
    for k in (1, 2, 3):
        np.testing.assert_allclose(fitted(asked, np.array(k)), pooled(asked, np.array(0)))
    assert not np.allclose(fitted(asked, np.array(0)), pooled(asked, np.array(0)))


@pytest.mark.parametrize("kind", [PlattScaling, IsotonicScaling])
def test_a_curve_serves_detections_and_regions_and_comes_back_from_its_arrays(kind):
    fitted = kind.fit(*margins_of(3), 2)
    again = kind.from_arrays({name: array.copy() for name, array in fitted.to_arrays().items()})
    scores = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
    p = again(scores, np.arange(2))
    assert p.shape == (7, 2)
    np.testing.assert_array_equal(p, fitted(scores, np.arange(2)))
    np.testing.assert_array_equal(p[:, 1], again(scores[:, 1], np.full(7, 1)))


@pytest.mark.parametrize("kind", [PlattScaling, IsotonicScaling])
def test_bad_margins(kind):
    name = kind.__name__
    with pytest.raises(DataError, match=f"{name}.fit: there must be margins that differ, got 2 without"):
        kind.fit([1.0, 1.0], [True, False], [0, 0], 1)
    with pytest.raises(DataError, match="got 0 without"):
        kind.fit([], [], [], 1)
    with pytest.raises(ShapeError, match="margins must be finite, got 1 that are not"):
        kind.fit([1.0, np.inf], [True, False], [0, 0], 1)
    with pytest.raises(ShapeError, match=r"labels must lie in 0 \.\. 0, got 0 \.\. 1"):
        kind.fit([1.0, 2.0], [True, False], [0, 1], 1)
    with pytest.raises(ShapeError, match="one shape"):
        kind.fit([1.0, 2.0], [True], [0, 0], 1)


def test_damaged_curves():
    ones = np.ones(2)
    with pytest.raises(DataError, match="slope must be finite"):
        PlattScaling(np.array([np.nan, 1]), ones, ones > 0)
    with pytest.raises(ShapeError, match="one shape"):
        PlattScaling(np.ones(3), ones, ones > 0)
    with pytest.raises(ShapeError, match="a probability for each of 2 knots"):
        IsotonicScaling(ones, ones, np.array([0, 1]), ones > 0)
    with pytest.raises(ConfigError, match="above 0, got 0"):
        TemperatureScaling(0.0)


def test_the_temperature_of_logits_that_are_too_sure_is_found():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(4000, 4)) * 2
    odds = np.exp(true)
    cumulative = np.cumsum(odds / odds.sum(axis=1, keepdims=True), axis=1)
    target = (rng.random(4000)[:, None] > cumulative).sum(axis=1)
    fitted = TemperatureScaling.fit(3 * true, target)
    assert fitted.temperature == pytest.approx(3, rel=0.1)
    p = fitted(3 * true)
    assert p.shape == (4000, 3)
    full = np.column_stack([p, 1 - p.sum(axis=1)])
    for other in (0.98, 1.02):
        moved = TemperatureScaling(fitted.temperature * other)(3 * true)
        assert log_loss(target, full) < log_loss(target, np.column_stack([moved, 1 - moved.sum(axis=1)]))
    assert TemperatureScaling.from_arrays(fitted.to_arrays()) == fitted


def test_at_temperature_one_probabilities_are_those_of_the_softmax_and_of_its_log_odds():
    from rcnn_svm.heads.scorers import SoftmaxScorer

    rng = np.random.default_rng(0)
    scorer = SoftmaxScorer(rng.normal(size=(4, 5)), rng.normal(size=4))
    rows = rng.normal(size=(30, 5)).astype(np.float32)
    own = scorer.probabilities(rows)
    np.testing.assert_allclose(TemperatureScaling(1.0)(scorer.logits(rows)), own, rtol=1e-5)
    as_they_are = PlattScaling(np.ones(3), np.zeros(3), np.ones(3, bool))
    np.testing.assert_allclose(as_they_are(scorer.decision_function(rows), np.arange(3)), own, rtol=1e-4)


@pytest.mark.parametrize(
    ("logits", "target", "error", "words"),
    [
        (np.zeros((0, 3)), [], DataError, "got none"),
        (np.zeros((2, 3)), [0], ShapeError, r"got \(2, 3\) and \(1,\)"),
        (np.full((1, 3), np.nan), [0], ShapeError, "must be finite"),
        (np.zeros((1, 3)), [3], ShapeError, r"in 0 \.\. 2, got 3"),
    ],
)
def test_bad_logits(logits, target, error, words):
    with pytest.raises(error, match=words):
        TemperatureScaling.fit(logits, target)


def graded(seed: int, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins, outcomes and labels: so many right ones of each class, and twice as many false ones."""
    rng = np.random.default_rng(seed)
    parts = []
    for k, n in enumerate(sizes):
        margins = np.concatenate([rng.normal(1.0, 1.0, n), rng.normal(-1.0, 1.0, 2 * n)])
        parts.append((margins, np.arange(3 * n) < n, np.full(3 * n, k)))
    m, y, label = (np.concatenate(column) for column in zip(*parts, strict=True))
    return m, y, label


def test_each_class_has_the_curve_that_what_was_seen_of_it_allows() -> None:
    m, y, label = graded(3, [520, 40, 4])
    curves = ClassCurves.fit(m, y, label, 3, n_images=80)
    assert curves is not None
    assert curves.kinds == ("steps", "sigmoid", "shared sigmoid")
    grid = np.linspace(-3, 3, 50)
    steps = IsotonicScaling.fit(m, y, label, 3)
    np.testing.assert_array_equal(curves(grid, np.zeros(50, np.int64)), steps(grid, np.zeros(50, np.int64)))
    sigmoids = PlattScaling.fit(m, y, label, 3)
    for k in (1, 2):
        own = np.full(50, k)
        np.testing.assert_array_equal(curves(grid, own), sigmoids(grid, own))
    again = ClassCurves.from_arrays(curves.to_arrays())
    assert (again.kinds, again.n_images) == (curves.kinds, 80)
    np.testing.assert_array_equal(again(grid[:, None], np.arange(3)), curves(grid[:, None], np.arange(3)))


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(0, 130) | st.just(500), min_size=1, max_size=4),
    worse=st.booleans(),
)
def test_a_probability_never_falls_with_the_score(seed: int, sizes: list[int], worse: bool) -> None:
    m, y, label = graded(seed, [*sizes, 30])
    m = np.where((label == 0) & worse, -m, m)  # a head that is worse than chance for a class
    curves = ClassCurves.fit(m, y, label, len(sizes) + 1, n_images=10)
    if curves is None:
        assert worse
        return
    found = curves(np.linspace(-9, 9, 200)[:, None], np.arange(len(sizes) + 1))
    assert ((found >= 0) & (found <= 1)).all()
    assert (np.diff(found, axis=0) >= 0).all()


def test_with_too_little_there_are_no_curves() -> None:
    m, y, label = graded(1, [9])
    assert ClassCurves.fit(m, y, label, 1, n_images=9) is None  # nine right ones
    m, y, label = graded(1, [40])
    assert ClassCurves.fit(np.zeros_like(m), y, label, 1, n_images=9) is None
    assert ClassCurves.fit(-m, y, label, 1, n_images=9) is None  # the surer, the less right
    assert ClassCurves.fit(m, y, label, 1, n_images=9) is not None
