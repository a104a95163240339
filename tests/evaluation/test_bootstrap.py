from __future__ import annotations

import json

import numpy as np
import pytest

from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.bootstrap import paired_bootstrap
from rcnn_svm.evaluation.voc import evaluate_voc
from rcnn_svm.structures import Detections, GroundTruth

CLASSES = ("x", "y", "z")


def split(seed=0, n_images=30):
    """Make truths and a function that makes detections with a given share of hits."""
    rng = np.random.default_rng(seed)
    truths = []
    for _ in range(n_images):
        n = int(rng.integers(0, 4))
        low = rng.integers(0, 80, (n, 2))
        truths.append(GroundTruth(np.hstack([low, low + 20]), rng.integers(0, 2, n)))  # none of class z

    def detector(seed, skill):
        rng = np.random.default_rng(seed)
        result = []
        for i, truth in enumerate(truths):
            low = rng.integers(0, 80, (12, 2))
            boxes, labels = np.hstack([low, low + 20]), rng.integers(0, 3, 12)
            scores = rng.normal(size=12)
            if len(truth):
                pick = rng.integers(0, len(truth), 12)
                near = rng.random(12) < skill
                boxes = np.where(near[:, None], truth.boxes[pick] + rng.integers(-2, 3, (12, 4)), boxes)
                labels = np.where(near, truth.labels[pick], labels)
                scores = scores + near
            result.append(Detections(str(i), boxes, scores, labels))
        return result

    return truths, detector


@pytest.mark.parametrize("rule", ["voc07", "voc07-exact", "voc10"])
def test_equals_evaluating_every_resample_anew(rule):
    truths, detector = split()
    detections = detector(1, 0.3)
    result = paired_bootstrap(
        {"a": evaluate_voc(detections, truths, CLASSES)}, n_resamples=20, seed=5, rule=rule
    )
    weights = np.random.default_rng(5).multinomial(
        len(truths), np.full(len(truths), 1 / len(truths)), size=20
    )
    for b, weight in enumerate(weights):
        drawn = np.repeat(np.arange(len(truths)), weight)
        fresh = evaluate_voc([detections[i] for i in drawn], [truths[i] for i in drawn], CLASSES, rule=rule)
        assert result.samples["a"][b] == pytest.approx(fresh.map(), abs=1e-12)


def test_many_hits_span_several_blocks():
    truth = [GroundTruth(np.tile([[0, 0, 9, 9]], (40, 1)) + 20 * np.arange(40)[:, None], np.zeros(40))] * 20
    rng = np.random.default_rng(0)
    found = []
    for i, each in enumerate(truth):
        boxes = np.concatenate([each.boxes, each.boxes + 9])
        found.append(Detections(str(i), boxes, rng.normal(size=80), np.zeros(80)))
    evaluation = evaluate_voc(found, truth, "x", rule="voc10")
    result = paired_bootstrap({"a": evaluation}, n_resamples=3, seed=1)
    weights = np.random.default_rng(1).multinomial(20, np.full(20, 1 / 20), size=3)
    for b, weight in enumerate(weights):
        drawn = np.repeat(np.arange(20), weight)
        fresh = evaluate_voc([found[i] for i in drawn], [truth[i] for i in drawn], "x", rule="voc10")
        assert result.samples["a"][b] == pytest.approx(fresh.map(), abs=1e-12)


def test_a_better_detector_is_told_apart_and_a_copy_is_not():
    truths, detector = split()
    good, bad = (evaluate_voc(detector(1, skill), truths, CLASSES) for skill in (0.8, 0.2))
    result = paired_bootstrap({"good": good, "bad": bad, "copy": good}, n_resamples=300)
    better = result.difference("good", "bad")
    assert better.supported
    assert better.mean.low > 0
    assert better.flip_share < 0.01
    assert better.mean.value == pytest.approx(good.map() - bad.map())
    worse = result.difference("bad", "good")
    assert (worse.mean.low, worse.mean.high) == (-better.mean.high, -better.mean.low)
    assert worse.per_class["x"].value == -better.per_class["x"].value
    same = result.difference("good", "copy")
    assert (same.mean.value, same.mean.low, same.mean.high) == (0, 0, 0)
    assert not same.supported
    assert same.flip_share == 0.5
    assert result.mean["good"].low < result.mean["good"].value < result.mean["good"].high


def test_resamples_do_not_depend_on_the_company():
    truths, detector = split()
    a, b = (evaluate_voc(detector(seed, 0.5), truths, CLASSES) for seed in (1, 2))
    alone = paired_bootstrap({"a": a}, n_resamples=50, seed=9)
    together = paired_bootstrap({"b": b, "a": a}, n_resamples=50, seed=9)
    np.testing.assert_array_equal(alone.samples["a"], together.samples["a"])


def test_class_without_objects_has_no_interval():
    truths, detector = split()
    result = paired_bootstrap({"a": evaluate_voc(detector(1, 0.5), truths, CLASSES)}, n_resamples=20)
    assert np.isnan(result.per_class["a"]["z"].low)
    value = result.to_json()
    assert value["ap"]["a"]["z"] == {"value": None, "low": None, "high": None}
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_split_without_objects_is_nan():
    result = paired_bootstrap(
        {name: evaluate_voc([Detections.empty("a")], [GroundTruth.empty()], "x") for name in "ab"},
        n_resamples=5,
    )
    assert np.isnan(result.mean["a"].value)
    assert np.isnan(result.difference("a", "b").flip_share)


def test_messages():
    truths, detector = split()
    result = evaluate_voc(detector(1, 0.5), truths, CLASSES)
    other = evaluate_voc(detector(1, 0.5)[:9], truths[:9], CLASSES)
    with pytest.raises(ConfigError, match=r"^paired_bootstrap: results must hold at least one detector"):
        paired_bootstrap({})
    with pytest.raises(ConfigError, match=r"^paired_bootstrap: n_resamples must be at least 1, got 0\.$"):
        paired_bootstrap({"a": result}, n_resamples=0)
    with pytest.raises(ConfigError, match=r"but 'b' and 'a' differ in classes or objects\. Evaluate both"):
        paired_bootstrap({"a": result, "b": other})
    with pytest.raises(ConfigError, match=r"must have at least one image, got none\.$"):
        paired_bootstrap({"a": evaluate_voc([], [], CLASSES)})
    with pytest.raises(ConfigError, match=r"got 'a' and 'c'; compared were a\.$"):
        paired_bootstrap({"a": result}, n_resamples=2).difference("a", "c")
