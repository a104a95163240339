"""The threshold of each class: by brute force, with few objects, with nothing to choose from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rcnn_svm.errors import DataError
from rcnn_svm.evaluation.thresholds import (
    Thresholds,
    UnreachedError,
    choose_thresholds,
    limit_false_alarms,
    reach_precision,
)
from rcnn_svm.evaluation.voc import match
from rcnn_svm.structures import Detections, GroundTruth

BOX = np.array([[0, 0, 10, 10]], np.float32)
FAR = np.array([[50, 50, 60, 60]], np.float32)


def split(seed: int, n_images: int = 30, n_classes: int = 2) -> tuple[list[Detections], list[GroundTruth]]:
    """One object an image, found with a high score or a low one, and false detections beside it."""
    rng = np.random.default_rng(seed)
    found, truths = [], []
    for i in range(n_images):
        label = int(rng.integers(n_classes))
        truths.append(GroundTruth(BOX, np.array([label])))
        labels = np.array([label, int(rng.integers(n_classes))])
        scores = np.round(rng.normal([1.0, -1.0], 1.2), 1).astype(np.float32)
        found.append(Detections(f"{i}", np.concatenate([BOX, FAR]), scores, labels))
    return found, truths


def f1(found: list[Detections], truths: list[GroundTruth], label: int, threshold: float) -> float:
    n_right = sum(int(((d.labels == label) & (d.scores >= threshold) & (d.boxes[:, 0] == 0)).any() and
                      (t.labels == label).any()) for d, t in zip(found, truths, strict=True))  # fmt: skip
    n_found = sum(int(((d.labels == label) & (d.scores >= threshold)).sum()) for d in found)
    n_objects = sum(int((t.labels == label).sum()) for t in truths)
    return 2 * n_right / max(n_found + n_objects, 1)


@settings(deadline=None)
@given(seed=st.integers(0, 500))
def test_alone_a_class_gets_its_best_f1(seed: int) -> None:
    found, truths = split(seed)
    chosen = choose_thresholds(match(found, truths, ("a", "b")), prior_objects=0)
    every = np.unique(np.concatenate([d.scores for d in found]))
    for k in range(2):
        best = max(f1(found, truths, k, t) for t in (*every, 99.0))
        assert f1(found, truths, k, float(chosen.scores[k])) == pytest.approx(best)


def test_precision_and_recall_are_those_of_the_threshold() -> None:
    found, truths = split(3)
    chosen = choose_thresholds(match(found, truths, ("a", "b")))
    for k in range(2):
        sure = [chosen.believed(d) for d in found]
        mine = [(d.boxes[:, 0] == 0)[d.labels == k] for d in sure]
        right = sum(int(m.any() and (t.labels == k).any()) for m, t in zip(mine, truths, strict=True))
        assert chosen.precision[k] == pytest.approx(right / sum(map(len, mine)))
        assert chosen.recall[k] == pytest.approx(right / chosen.n_objects[k])


def test_a_class_with_few_objects_leans_on_all() -> None:
    """One object of b, found with a freak score: alone it would take that score as its threshold."""
    found, truths = split(1, n_classes=1)
    found.append(Detections("b", BOX, np.array([9.0], np.float32), np.array([1])))
    truths.append(GroundTruth(BOX, np.array([1])))
    matches = match(found, truths, ("a", "b"))
    alone, together = (choose_thresholds(matches, prior_objects=n).scores for n in (0, 10))
    assert alone[1] > 4
    assert together[1] == pytest.approx(together[0], abs=0.5)
    assert together[0] == pytest.approx(alone[0], abs=0.5)


def test_nothing_to_choose_from() -> None:
    empty = choose_thresholds(match([Detections.empty("0")], [GroundTruth(BOX, np.array([0]))], ("a",)))
    assert np.isfinite(empty.scores).all()
    assert np.isnan(empty.precision[0])
    assert empty.recall[0] == 0
    wrong = Detections("0", FAR, np.array([2.0], np.float32), np.array([0]))
    chosen = choose_thresholds(match([wrong], [GroundTruth(BOX, np.array([0]))], ("a",)))
    assert len(chosen.believed(wrong)) == 0


def test_thresholds_are_kept_as_plain_data() -> None:
    found, truths = split(5)
    chosen = choose_thresholds(match(found, truths, ("a", "b")))
    again = Thresholds.from_json(chosen.to_json(), ("a", "b"), where="detector.json")
    np.testing.assert_array_equal(again.scores, chosen.scores)
    np.testing.assert_allclose(again.precision, chosen.precision)
    np.testing.assert_allclose(again.false_alarms, chosen.false_alarms)
    for name, of in chosen.promised.items():
        assert vars(again.promised[name]) == pytest.approx(vars(of))
    assert again.n_images == chosen.n_images == 30
    with pytest.raises(DataError, match=r"detector.json: the thresholds are damaged \('c'\)"):
        Thresholds.from_json(chosen.to_json(), ("a", "c"), where="detector.json")


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 500), per_image=st.floats(0.04, 2.0), digits=st.integers(0, 3))
def test_no_more_false_alarms_than_allowed_are_believed(seed: int, per_image: float, digits: int) -> None:
    found, truths = split(seed)
    found = [replace(d, scores=np.round(d.scores, digits)) for d in found]
    matches = match(found, truths, ("a", "b"))
    best = max(float(d.scores.max()) for d in found)
    at_best = sum(int(((d.scores == best) & (d.boxes[:, 0] > 0)).sum()) for d in found)
    try:
        chosen = limit_false_alarms(matches, per_image)
    except UnreachedError:
        assume(at_best > per_image * 30)  # else one is enough
        return
    n_false = sum(int((chosen.believed(d).boxes[:, 0] > 0).sum()) for d in found)
    n_false += sum(max(int((chosen.believed(d).boxes[:, 0] == 0).sum()) - 1, 0) for d in found)  # found twice
    wrong_class = sum(
        int(((b := chosen.believed(d)).labels[b.boxes[:, 0] == 0] != t.labels[0]).sum())
        for d, t in zip(found, truths, strict=True)
    )
    assert n_false + wrong_class == round(chosen.false_alarms.sum() * 30)
    assert chosen.false_alarms.sum() <= per_image + 1e-9
    promised = chosen.promised["false_alarms"]
    assert promised.low <= promised.value <= promised.high
    assert promised.value == pytest.approx(chosen.false_alarms.sum())
    assert chosen.aim == {"false_alarms": per_image}


def test_allowed_false_alarms_are_spent() -> None:
    """As many as are allowed lie above the thresholds: on average so many come in new images."""
    rates = []
    for seed in range(30):
        matches = match(*split(seed, 60), ("a", "b"))
        chosen = limit_false_alarms(matches, 0.1)
        rates.append(chosen.false_alarms.sum())
        new = chosen.measure(match(*split(seed + 1000, 60), ("a", "b")))
        rates[-1] = (rates[-1], new["false_alarms_per_image"])
    promised, came = np.mean(rates, axis=0)
    assert promised == pytest.approx(0.1, abs=0.005)
    assert came == pytest.approx(0.1, abs=0.03)


def test_too_few_images_to_tell_so_few_false_alarms() -> None:
    matches = match(*split(1, 12), ("a", "b"))
    with pytest.raises(UnreachedError, match=r"at least 20 images must be held out, got 12\. Allow more"):
        limit_false_alarms(matches, 0.05)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 500), share=st.floats(0.05, 0.97))
def test_a_demanded_precision_holds_where_it_was_chosen(seed: int, share: float) -> None:
    matches = match(*split(seed), ("a", "b"))
    try:
        chosen = reach_precision(matches, share)
    except UnreachedError:
        n = 60  # detections: all being right would be enough
        assume(share > 0.5 * n / (n + 1))
        return
    measured = chosen.measure(matches)
    assert measured["precision"] > 100 * share
    assert chosen.promised["precision"].value == pytest.approx(measured["precision"] / 100)
    assert chosen.promised["precision"].low <= chosen.promised["precision"].value


def test_a_precision_that_no_score_reaches_is_one_sentence() -> None:
    matches = match(*split(1), ("a", "b"))
    with pytest.raises(
        UnreachedError, match=r"precision=0\.999: no score reaches it on the 30 images held out"
    ):
        reach_precision(matches, 0.999)
    nothing = match([Detections.empty("0")], [GroundTruth(BOX, np.array([0]))], ("a",))
    with pytest.raises(UnreachedError, match=r"where the most is 0\.00"):
        reach_precision(nothing, 0.5)


def test_what_an_older_detector_kept_is_read() -> None:
    values = choose_thresholds(match(*split(5), ("a", "b"))).to_json()
    for key in ("aim", "promised"):
        del values[key]
    for row in values["classes"].values():
        del row["false_alarms"]
    older = Thresholds.from_json(values, ("a", "b"), where="detector.json")
    assert older.false_alarms is None
    assert older.promised == older.aim == {}
