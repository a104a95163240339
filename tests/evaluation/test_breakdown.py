"""Objects by size and shape, and images in which two detectors differ."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.breakdown import (
    COCO_SIZES,
    Grouping,
    aspect_terciles,
    break_down,
    compare_images,
    labelled_flags,
    size_terciles,
)
from rcnn_svm.evaluation.coco import evaluate_coco
from rcnn_svm.evaluation.thresholds import Thresholds, choose_thresholds
from rcnn_svm.evaluation.voc import evaluate_voc, match
from rcnn_svm.structures import Detections, GroundTruth

CLASSES = ("cat", "dog")


def split(seed, n_images=20):
    """Objects that do not touch each other, found by one detection each at most, beside false ones."""
    rng = np.random.default_rng(seed)
    detections, truths = [], []
    for i in range(n_images):
        n, m = int(rng.integers(0, 5)), int(rng.integers(0, 4))
        low = np.stack([200 * np.arange(n + m), np.zeros(n + m)], axis=1)
        boxes = np.concatenate([low, low + rng.integers(10, 150, (n + m, 2))], axis=1)
        labels = rng.integers(0, 2, n + m)
        truths.append(GroundTruth(boxes[:n], labels[:n], difficult=rng.random(n) < 0.2))
        there = (rng.random(n + m) < 0.7) | (np.arange(n + m) >= n)
        detections.append(
            Detections(str(i), boxes[there], rng.permutation(100)[: there.sum()], labels[there])
        )
    return detections, truths


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_groups_share_out_the_objects_and_what_is_found(seed):
    detections, truths = split(seed)
    if not sum((~truth.difficult).sum() for truth in truths):
        return
    result = evaluate_voc(detections, truths, CLASSES, rule="voc10")
    for grouping in (COCO_SIZES, size_terciles(truths), aspect_terciles(truths)):
        groups = break_down(result.matches, detections, truths, grouping, rule="voc10")
        assert groups.n_objects.sum(axis=0).tolist() == result.n_positives.tolist()
        assert groups.n_found.sum() == (result.matches.outcome == 1).sum()
    one = Grouping("all", ("all",), (), lambda truth: truth.area, lambda boxes: np.ones(len(boxes)))
    whole = break_down(result.matches, detections, truths, one, rule="voc10")
    np.testing.assert_array_equal(whole.ap[0], result.ap())
    np.testing.assert_allclose(whole.map()[0], result.map())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_recall_by_size_is_that_of_coco(seed):
    detections, truths = split(seed)
    # COCO counts what lies on a border on both sides of it.
    assume(not np.isin(np.concatenate([truth.area for truth in truths]), COCO_SIZES.bounds).any())
    groups = break_down(match(detections, truths, CLASSES), detections, truths, COCO_SIZES)
    coco = evaluate_coco(detections, truths, CLASSES)
    share = np.where(groups.n_objects > 0, groups.n_found / np.maximum(groups.n_objects, 1), np.nan)
    np.testing.assert_allclose(share, coco.recall[2, 1:, 0])


def test_each_group_is_measured_as_if_no_other_were_there():
    truth = GroundTruth([[0, 0, 10, 10], [100, 0, 200, 100]], [0, 0])
    small_false, large_false = [50, 50, 60, 60], [300, 0, 400, 100]
    boxes = [large_false, [100, 0, 200, 100], small_false, [0, 0, 10, 10]]
    found = Detections("a", boxes, [4, 3, 2, 1], [0, 0, 0, 0])
    only_small = Detections("a", boxes[2:], [2, 1], [0, 0])
    groups = break_down(match([found], [truth], CLASSES), [found], [truth], COCO_SIZES, rule="voc10")
    alone = break_down(match([only_small], [truth], CLASSES), [only_small], [truth], COCO_SIZES, rule="voc10")
    assert groups.ap[:, 0].tolist() == pytest.approx([0.5, np.nan, 0.5], nan_ok=True)
    assert alone.ap[:, 0].tolist() == pytest.approx([0.5, np.nan, 0.0], nan_ok=True)
    assert alone.recall().tolist() == pytest.approx([1, np.nan, 0], nan_ok=True)
    plain = alone.to_json()
    assert plain["bounds"] == [32**2, 96**2]
    assert plain["groups"]["small"] == {
        "n_objects": 1,
        "recall": 100.0,
        "mAP": 50.0,
        "ap": {"cat": 50.0, "dog": None},
    }
    assert plain["groups"]["medium"]["mAP"] is None


def test_what_equals_a_bound_belongs_to_the_group_below():
    truth = GroundTruth([[0, 0, 32, 32], [100, 0, 196, 96]], [0, 0])
    found = Detections.empty("a")
    groups = break_down(match([found], [truth], CLASSES), [found], [truth], COCO_SIZES)
    assert groups.n_objects[:, 0].tolist() == [1, 1, 0]


def test_terciles_hold_a_third_of_the_objects_that_count_each():
    rng = np.random.default_rng(0)
    sides = rng.integers(5, 90, (90, 2))
    truth = GroundTruth(np.concatenate([np.zeros((90, 2)), sides], axis=1), np.zeros(90))
    giant = GroundTruth([[0, 0, 900, 10]] * 50, [0] * 50, difficult=np.ones(50, bool))
    found = [Detections.empty(name) for name in "ab"]
    for terciles in (size_terciles, aspect_terciles):
        grouping = terciles([truth, giant])
        groups = break_down(match(found, [truth, giant], CLASSES), found, [truth, giant], grouping)
        assert np.abs(groups.n_objects[:, 0] - 30).max() <= 1
    with pytest.raises(ConfigError, match="neither difficult nor crowd, got none"):
        aspect_terciles([giant])


def thresholds(low):
    """Believe what scores at least `low`."""
    nothing = np.full(2, np.nan)
    return Thresholds(CLASSES, np.full(2, low, np.float32), nothing, nothing, np.zeros(2, np.int64), 3)


def test_images_are_sorted_from_those_of_the_first_to_those_of_the_second():
    box, far, other = [0, 0, 10, 10], [50, 50, 60, 60], [80, 0, 90, 10]
    truths = [GroundTruth([box, other], [0, 1]) for _ in range(3)]
    first = [
        Detections("0", [box, far], [9, 8], [0, 0]),  # one object and a false alarm
        Detections("1", [other, far], [9, 1], [1, 0]),  # the false alarm is not believed
        Detections("2", [box, other], [9, 8], [0, 1]),
    ]
    second = [
        Detections("0", [box, other], [0.9, 0.8], [0, 1]),
        Detections("1", [box], [0.9], [0]),
        Detections.empty("2"),
    ]
    both = [
        (match(found, truths, CLASSES), thresholds(low).scores) for found, low in ((first, 5), (second, 0.5))
    ]
    result = compare_images(*both)
    assert result.image.tolist() == [2, 1, 0]
    assert result.ahead().tolist() == [2, 0, -2]
    assert result.n_objects.tolist() == [2, 2, 2]
    assert result.found.tolist() == [[2, 0], [1, 1], [1, 2]]
    assert result.only.tolist() == [[2, 0], [1, 1], [0, 1]]
    assert result.false_alarms.tolist() == [[0, 0], [0, 0], [1, 0]]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_turned_comparison_says_the_same(seed):
    detections, truths = split(seed)
    generator = np.random.default_rng(seed)
    others = [found[generator.random(len(found)) < 0.5] for found in detections]
    first, second = (
        (matches, choose_thresholds(matches))
        for matches in (match(found, truths, CLASSES) for found in (detections, others))
    )
    a, b = ((matches, chosen.scores) for matches, chosen in (first, second))
    there, back = compare_images(a, b), compare_images(b, a)
    assert (np.diff(there.ahead()) <= 0).all()
    a, b = np.argsort(there.image), np.argsort(back.image)
    for name in ("found", "only", "false_alarms"):
        np.testing.assert_array_equal(getattr(there, name)[a], getattr(back, name)[b][:, ::-1])
    np.testing.assert_array_equal(there.found - there.only, (there.found - there.only)[:, ::-1])
    assert (there.found <= there.n_objects[:, None]).all()
    for matches, chosen in (first, second):
        column = 0 if matches is first[0] else 1
        measured = chosen.measure(matches)
        believed = there.found[:, column].sum() + there.false_alarms[:, column].sum()
        assert measured["boxes_per_image"] == pytest.approx(believed / 20)


def test_other_splits_cannot_be_compared():
    box = [0, 0, 10, 10]
    one = match([Detections.empty("a")], [GroundTruth([box], [0])], CLASSES)
    two = match([Detections.empty("a")], [GroundTruth([box], [1])], CLASSES)
    with pytest.raises(ConfigError, match="both must be of one split"):
        compare_images((one, thresholds(0).scores), (two, thresholds(0).scores))


def test_a_flag_parts_objects_and_leaves_false_detections_in_both():
    flags = {"truncated": [True, False], "occluded": [False, False]}
    truths = [
        GroundTruth([[0, 0, 10, 10], [100, 0, 200, 100]], [0, 0], flags=flags),
        GroundTruth([[0, 0, 10, 10]], [0]),
    ]
    found = [
        Detections("a", [[50, 50, 60, 60], [0, 0, 10, 10], [100, 0, 200, 100]], [3, 2, 1], [0, 0, 0]),
        Detections.empty("b"),
    ]
    (grouping,) = labelled_flags(truths)  # of what no object is there is no group
    groups = break_down(match(found, truths, CLASSES), found, truths, grouping, rule="voc10")
    assert grouping.groups == ("not truncated", "truncated")
    assert groups.n_objects[:, 0].tolist() == [2, 1]
    assert groups.recall().tolist() == [0.5, 1.0]
    assert groups.ap[:, 0].tolist() == [0.25, 0.5]  # the false one is first in both
    assert labelled_flags(truths[1:]) == []
