from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.evaluation.voc import FALSE, HIT, IGNORED, average_precision, evaluate_voc, match
from rcnn_svm.structures import Detections, GroundTruth

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "average_precision.json").read_text())["cases"]
BOX = [10, 10, 30, 30]


def found(*rows, image_id="a"):
    """Make Detections from (box, score, label) rows."""
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(image_id, list(boxes), list(scores), list(labels))


def random_split(rng, n_images=12, n_classes=3, n_found=25, n_objects=5):
    """Make detections that partly hit, with ties in the scores and every kind of object."""
    detections, truths = [], []
    for i in range(n_images):
        n = int(rng.integers(0, n_objects + 1))
        low = rng.integers(0, 60, (n, 2))
        boxes = np.concatenate([low, low + rng.integers(5, 40, (n, 2))], axis=1)
        truth = GroundTruth(
            boxes, rng.integers(0, n_classes, n), difficult=rng.random(n) < 0.2, crowd=rng.random(n) < 0.1
        )
        m = int(rng.integers(0, n_found + 1))
        low = rng.integers(0, 60, (m, 2))
        guesses = np.concatenate([low, low + rng.integers(5, 40, (m, 2))], axis=1)
        if n:
            near = rng.random(m) < 0.7
            shaken = boxes[rng.integers(0, n, m)] + rng.integers(-4, 5, (m, 4))
            guesses = np.where(near[:, None], shaken, guesses)
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        scores = np.round(rng.normal(size=m), 1)
        detections.append(Detections(str(i), guesses, scores, rng.integers(0, n_classes, m)))
        truths.append(truth)
    return detections, truths


def devkit_ap(detections, truths, label, min_iou, rule):
    """Compute AP as the devkit's text reads: loops, inclusive pixels with + 1, no shared code."""
    pool = [
        (score, i, box)
        for i, each in enumerate(detections)
        for box, score, of in zip(each.boxes.tolist(), each.scores.tolist(), each.labels, strict=True)
        if of == label
    ]
    pool.sort(key=lambda entry: -entry[0])
    n_positives = sum(
        int(of == label and not spared)
        for truth in truths
        for of, spared in zip(truth.labels, truth.difficult | truth.crowd, strict=True)
    )
    if n_positives == 0:
        return math.nan
    taken = set()
    tp, fp, points = 0, 0, []
    for _, i, (x1, y1, x2, y2) in pool:
        best, best_g = -1.0, -1
        for g, (u1, v1, u2, v2) in enumerate(truths[i].boxes.tolist()):
            if truths[i].labels[g] != label:
                continue
            w = min(x2, u2) - (max(x1, u1) + 1) + 1
            h = min(y2, v2) - (max(y1, v1) + 1) + 1
            if w > 0 and h > 0:
                union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - w * h
                if w * h / union > best:
                    best, best_g = w * h / union, g
        if best >= min_iou:
            if truths[i].difficult[best_g] or truths[i].crowd[best_g]:
                continue
            if (i, best_g) in taken:
                fp += 1
            else:
                tp += 1
                taken.add((i, best_g))
        else:
            fp += 1
        points.append((tp / n_positives, tp / (tp + fp)))
    if rule == "voc07":
        levels = [k * 0.1 for k in range(11)]
        return sum(max((p for r, p in points if r >= t), default=0.0) for t in levels) / 11
    if rule == "voc07-exact":
        return (
            sum(
                max((p for r, p in points if round(r * n_positives) * 10 >= k * n_positives), default=0.0)
                for k in range(11)
            )
            / 11
        )
    value, last = 0.0, 0.0
    for j, (r, _) in enumerate(points):
        value += (r - last) * max(p for _, p in points[j:])
        last = r
    return value


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden(case):
    hits = np.array([int(digit) for digit in case["hits"]], bool)
    value = average_precision(hits, case["n_positives"], case["rule"])
    assert value == pytest.approx(case["value"], abs=case["tolerance"])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("min_iou", [0.3, 0.5])
def test_equals_the_devkit_read_line_by_line(seed, min_iou):
    detections, truths = random_split(np.random.default_rng(seed))
    result = evaluate_voc(detections, truths, "xyz", min_iou=min_iou)
    for rule in ("voc07", "voc07-exact", "voc10"):
        expected = [devkit_ap(detections, truths, k, min_iou, rule) for k in range(3)]
        np.testing.assert_allclose(result.ap(rule), expected, atol=1e-12)
        assert result.map(rule) == pytest.approx(np.nanmean(expected))


def test_iou_equal_to_the_threshold_is_a_hit():
    truth = GroundTruth([[0, 0, 10, 10]], [0])
    assert evaluate_voc([found(([0, 0, 10, 5], 1, 0))], [truth], "x").map() == 1.0
    assert evaluate_voc([found(([0, 0, 10, 4], 1, 0))], [truth], "x").map() == 0.0


def test_second_detection_of_an_object_is_false_even_beside_a_free_one():
    truth = GroundTruth([[0, 0, 10, 10], [0, 3, 10, 13]], [0, 0])
    rows = [([0, 0, 10, 10], 0.9, 0), ([0, 1, 10, 11], 0.8, 0)]  # the second overlaps both by more than 0.5
    matches = match([found(*rows)], [truth], "x")
    assert matches.outcome.tolist() == [HIT, FALSE]
    assert matches.target.tolist() == [0, 0]


def test_first_of_equally_overlapped_objects_is_taken():
    truth = GroundTruth([[0, 0, 10, 10], [0, 0, 10, 10]], [0, 0])
    matches = match([found(([0, 0, 10, 10], 0.9, 0), ([0, 0, 10, 10], 0.8, 0))], [truth], "x")
    assert matches.target.tolist() == [0, 0]
    assert matches.outcome.tolist() == [HIT, FALSE]


@pytest.mark.parametrize("flag", ["difficult", "crowd"])
def test_difficult_and_crowd_are_neither_hit_nor_false_nor_wanted(flag):
    truth = GroundTruth([BOX, [50, 50, 70, 70]], [0, 0], **{flag: np.array([True, False])})
    result = evaluate_voc([found((BOX, 0.9, 0), (BOX, 0.8, 0), ([50, 50, 70, 70], 0.7, 0))], [truth], "x")
    assert result.matches.outcome.tolist() == [IGNORED, IGNORED, HIT]
    assert result.n_positives.tolist() == [1]
    assert result.map() == 1.0
    assert result.curves[0].scores.tolist() == pytest.approx([0.7])


def test_ties_keep_the_order_of_the_input():
    truths = [GroundTruth([BOX], [0]), GroundTruth.empty()]
    right, wrong = found((BOX, 0.5, 0), image_id="a"), found((BOX, 0.5, 0), image_id="b")
    assert evaluate_voc([right, wrong], truths, "x").map("voc10") == 1.0
    assert evaluate_voc([wrong, right], truths[::-1], "x").map("voc10") == 0.5


def test_class_without_objects_is_nan_and_left_out_of_the_mean():
    result = evaluate_voc([found((BOX, 0.5, 0), (BOX, 0.4, 1))], [GroundTruth([BOX], [0])], ["x", "y"])
    assert result.map() == 1.0
    assert np.isnan(result.ap()[1])
    assert len(result.curves[1].recall) == 0
    assert result.to_json()["measures"]["voc07"]["ap"] == {"x": 100.0, "y": None}
    assert json.loads(json.dumps(result.to_json(), allow_nan=False)) == result.to_json()


def test_nothing_to_find_and_nothing_found():
    empty = evaluate_voc([], [], ["x"])
    assert np.isnan(empty.map())
    assert empty.to_json()["measures"]["voc10"]["mAP"] is None
    missed = evaluate_voc([Detections.empty("a")], [GroundTruth([BOX], [0])], ["x"])
    assert missed.map() == 0.0
    idle = evaluate_voc([found((BOX, 1, 0))], [GroundTruth.empty()], ["x"])
    assert idle.matches.outcome.tolist() == [FALSE]


def test_curve():
    truth = GroundTruth([BOX, [50, 50, 70, 70]], [0, 0])
    rows = [(BOX, 0.9, 0), ([80, 80, 90, 90], 0.8, 0), ([50, 50, 70, 70], 0.7, 0)]
    curve = evaluate_voc([found(*rows)], [truth], "x").curves[0]
    np.testing.assert_allclose(curve.recall, [0.5, 0.5, 1.0])
    np.testing.assert_allclose(curve.precision, [1.0, 0.5, 2 / 3])


def test_rule_chooses_the_default_measure():
    hits = [(BOX, 0.9, 0)]
    truth = GroundTruth([BOX, [50, 50, 70, 70], [0, 50, 20, 70]], [0, 0, 0])
    result = evaluate_voc([found(*hits)], [truth], "x", rule="voc10")
    assert result.map() == pytest.approx(1 / 3)
    assert result.map("voc07") == pytest.approx(4 / 11)


def test_messages():
    with pytest.raises(
        ShapeError, match=r"^match: there must be one Detections per image, got 1 for 0 images\.$"
    ):
        match([Detections.empty("a")], [], "x")
    with pytest.raises(ConfigError, match=r"^match: min_iou must lie in \(0, 1\], got 0\.$"):
        match([], [], "x", min_iou=0)
    with pytest.raises(ShapeError, match=r"^Detections\('a'\): labels must lie in 0 \.\. 0, got 3 \.\. 3\.$"):
        match([found((BOX, 1, 3))], [GroundTruth.empty()], "x")
    with pytest.raises(ShapeError, match=r"^GroundTruth of image 'a': labels must lie in 0 \.\. 0, got -1"):
        match([Detections.empty("a")], [GroundTruth([BOX], [-1])], "x")
    with pytest.raises(ConfigError, match=r"^rule must be one of voc07, voc07-exact, voc10, got 'voc12'\.$"):
        evaluate_voc([], [], "x", rule="voc12")


seeds = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_strictly_monotone_maps_of_the_scores_change_nothing(seed):
    detections, truths = random_split(np.random.default_rng(seed), n_images=5)
    mapped = [Detections(d.image_id, d.boxes, np.exp(d.scores) * 3 - 7, d.labels) for d in detections]
    before, after = (evaluate_voc(each, truths, "xyz") for each in (detections, mapped))
    np.testing.assert_array_equal(before.ap_11point, after.ap_11point)
    np.testing.assert_array_equal(before.ap_all_point, after.ap_all_point)


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_perfect_output_scores_one(seed):
    rng = np.random.default_rng(seed)
    truths = []
    for _ in range(4):
        n = int(rng.integers(1, 5))
        low = rng.integers(0, 20, (n, 2)) + 40 * np.arange(n)[:, None]  # apart: no two overlap
        truths.append(GroundTruth(np.concatenate([low, low + 10], axis=1), rng.integers(0, 2, n)))
    perfect = [Detections(str(i), t.boxes, rng.normal(size=len(t)), t.labels) for i, t in enumerate(truths)]
    result = evaluate_voc(perfect, truths, "xy")
    assert result.map("voc07") == result.map("voc07-exact") == 1.0
    assert result.map("voc10") == pytest.approx(1.0)


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_a_last_false_detection_changes_nothing_and_a_first_one_never_helps(seed):
    detections, truths = random_split(np.random.default_rng(seed), n_images=5)
    base = evaluate_voc(detections, truths, "xyz")
    for score, compare in ((-1e6, np.testing.assert_array_equal), (1e6, None)):
        first = detections[0]
        worse = Detections(
            first.image_id,
            np.concatenate([first.boxes, [[900, 900, 910, 910]]]),
            np.append(first.scores, score),
            np.append(first.labels, 0),
        )
        result = evaluate_voc([worse, *detections[1:]], truths, "xyz")
        if compare is not None:
            compare(result.ap_all_point, base.ap_all_point)
            compare(result.ap_11point, base.ap_11point)
        elif base.n_positives[0]:
            assert result.ap_all_point[0] <= base.ap_all_point[0]
