"""Contrasts of a factorial design: what the cells were made with is what comes out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.bootstrap import Interval, paired_bootstrap
from rcnn_svm.evaluation.effects import (
    Effect,
    Measured,
    Table,
    effects_of,
    holm,
    holm_corrected,
    interactions_of,
    measure,
    shares,
)
from rcnn_svm.evaluation.voc import EvalResult, evaluate_voc
from rcnn_svm.structures import Detections, GroundTruth

LEVELS = {"a": ("a1", "a2", "a3"), "b": ("b1", "b2"), "c": ("c1", "c2")}


def table_of(values: dict[tuple[str, ...], float], spread: float = 0.01) -> Table:
    rng = np.random.default_rng(0)
    cells = {}
    for key, value in values.items():
        own = np.array([value, value])  # one class, whose AP is the mAP
        cells[key] = Measured(own, own[:, None] + spread * rng.standard_normal((2, 500)))
    return Table(tuple(LEVELS), cells)


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4))
@settings(max_examples=30, deadline=None)
def test_effects_that_add_up_are_found_and_nothing_interacts(changes: list[float]) -> None:
    a2, a3, b2, c2 = changes
    worth = {"a2": a2, "a3": a3, "b2": b2, "c2": c2}
    table = table_of(
        {key: sum(worth.get(level, 0) for level in key) for key in itertools.product(*LEVELS.values())}
    )
    found = {(e.factor, e.first, e.second): e for e in effects_of(table)}
    assert len(found) == 3 + 1 + 1
    assert found["a", "a1", "a2"].change.value == pytest.approx(-a2, abs=1e-9)
    assert found["a", "a2", "a3"].change.value == pytest.approx(a2 - a3, abs=1e-9)
    assert found["b", "b1", "b2"].n_pairs == 6
    assert all(e.per_class[0].value == pytest.approx(e.change.value) for e in found.values())
    crossed = interactions_of(table)
    assert len(crossed) == 3 + 3 + 1
    assert all(e.change.value == pytest.approx(0, abs=1e-9) for e in crossed)
    *parts, whole = shares(table, ("a2", "b2", "c2"), ("a1", "b1", "c1"))
    assert [p.change.value for p in parts] == pytest.approx([a2, b2, c2], abs=1e-9)
    assert whole.factor == "all"
    assert whole.change.value == pytest.approx(a2 + b2 + c2, abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=12, max_size=12))
@settings(max_examples=30, deadline=None)
def test_shares_add_up_whatever_interacts(values: list[float]) -> None:
    table = table_of(dict(zip(itertools.product(*LEVELS.values()), values, strict=True)))
    *parts, whole = shares(table, ("a3", "b2", "c1"), ("a1", "b1", "c1"))
    assert [part.factor for part in parts] == ["a", "b"]  # c is the same in both
    assert sum(part.change.value for part in parts) == pytest.approx(whole.change.value, abs=1e-9)
    reached = table.cells["a3", "b2", "c1"].value[0] - table.cells["a1", "b1", "c1"].value[0]
    assert whole.change.value == pytest.approx(reached)


def test_an_interaction_is_how_one_change_differs_between_levels_of_another() -> None:
    keys = itertools.product(*LEVELS.values())
    table = table_of({key: 0.3 if key[:2] == ("a2", "b2") else 0.0 for key in keys}, spread=0.0)
    found = {(e.first, e.second): e.change.value for e in interactions_of(table) if e.factor == "a x b"}
    assert found["a1 and b1", "a2 and b2"] == pytest.approx(0.3)
    assert found["a1 and b1", "a3 and b2"] == pytest.approx(0)


def test_cells_that_are_missing_are_left_out_of_pairs_and_named_in_shares() -> None:
    keys = [key for key in itertools.product(*LEVELS.values()) if key != ("a2", "b1", "c1")]
    table = table_of(dict.fromkeys(keys, 0.5))
    by_name = {(e.first, e.second): e for e in effects_of(table)}
    assert by_name["a1", "a2"].n_pairs == 3
    assert by_name["a1", "a3"].n_pairs == 4
    with pytest.raises(
        ConfigError, match=r"^shares: every cell on the way is needed, got none for a2 / b1 / c1\.$"
    ):
        shares(table, ("a2", "b2", "c1"), ("a1", "b1", "c1"))


def test_holms_correction_by_hand() -> None:
    one = Effect("a", "x", "y", Interval(0, 0, 0), (), 1, 0.0, 0.0, 0.0)
    given_p = [replace(one, p=p) for p in (0.01, 0.04, 0.03, 0.005)]
    np.testing.assert_allclose([e.p_holm for e in holm(given_p)], [0.03, 0.06, 0.06, 0.02])
    assert holm_corrected([0.9, 0.8]) == [1.0, 1.0]


def test_a_p_value_is_that_of_the_normal_distribution() -> None:
    values = {key: 0.02 if key[1] == "b2" else 0.0 for key in itertools.product(*LEVELS.values())}
    (effect,) = (e for e in effects_of(table_of(values)) if e.factor == "b")
    error = effect.detectable / 2.8
    assert error == pytest.approx(0.01 * np.sqrt(2 / 6), rel=0.1)
    from scipy.stats import norm

    assert effect.p == pytest.approx(2 * norm.sf(0.02 / error), rel=1e-6)


def evaluated(luck: np.ndarray, quality: float) -> EvalResult:
    truth = [GroundTruth(np.float32([[0, 0, 10, 10]]), np.array([0]))] * len(luck)
    box, score, label = np.float32([[0, 0, 10, 10]]), np.float32([1.0]), np.array([0])
    found = [
        Detections(str(i), box[:n], score[:n], label[:n]) for i, n in enumerate((luck < quality).astype(int))
    ]
    return evaluate_voc(found, truth, ["a"], rule="voc10")


def test_one_seed_is_measured_as_the_paired_bootstrap_does() -> None:
    luck = np.random.default_rng(0).random(100)
    one, other = evaluated(luck, 0.4), evaluated(luck, 0.6)
    mine = measure({("x",): [one], ("y",): [other]}, n_resamples=200, seed=3, rule="voc10")
    theirs = paired_bootstrap({"x": one, "y": other}, n_resamples=200, seed=3)
    for name in "xy":
        assert mine[name,].interval == theirs.mean[name]


def test_seeds_that_differ_widen_the_interval_and_equal_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    luck = rng.random(400)
    same = evaluated(luck, 0.5)
    others = [evaluated(luck, quality) for quality in (0.3, 0.5, 0.7)]
    found = measure({("same",): [same] * 3, ("other",): others}, n_resamples=400, seed=0, rule="voc10")
    alone = measure({("same",): [same]}, n_resamples=400, seed=0, rule="voc10")
    assert found["same",].interval.value == alone["same",].interval.value
    np.testing.assert_allclose(found["same",].samples, alone["same",].samples)
    assert found["other",].interval.value == pytest.approx(np.mean([o.map("voc10") for o in others]))
    # Their spread: that of the mean of three, of values whose standard deviation is .2.
    spread = found["other",].samples[0].std()
    assert spread == pytest.approx(np.hypot(0.2 / np.sqrt(3), found["same",].samples[0].std()), rel=0.15)


def test_cells_need_the_same_number_of_seeds() -> None:
    one = evaluated(np.zeros(3), 0.5)
    with pytest.raises(ConfigError, match=r"^effects: every cell needs as many seeds as any other"):
        measure({("x",): [one], ("y",): [one, one]}, n_resamples=10, seed=0, rule="voc10")
