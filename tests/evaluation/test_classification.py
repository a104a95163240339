"""Accuracy against scikit-learn, VOC's classification task against its devkit's own steps."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, recall_score

from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.evaluation.bootstrap import paired_accuracy
from rcnn_svm.evaluation.classification import Classification, classify, labels_of
from rcnn_svm.evaluation.voc import evaluate_voc
from rcnn_svm.structures import Detections, GroundTruth

CLASSES = ("a", "b", "c", "d")
BOX = np.array([[0, 0, 20, 10]], np.float32)


def image(scores: np.ndarray, name: str = "i") -> Detections:
    n = len(scores)
    return Detections(name, np.repeat(BOX, n, axis=0), scores.astype(np.float32), np.arange(n))


def truth(*labels: int, difficult: tuple[int, ...] = ()) -> GroundTruth:
    boxes = np.repeat(BOX, len(labels), axis=0)
    return GroundTruth(boxes, np.array(labels), np.isin(labels, difficult))


def test_accuracy_is_scikit_learns(rng: np.random.Generator) -> None:
    actual = rng.choice(3, size=200, p=[0.6, 0.3, 0.1])  # class d has no image
    scores = rng.normal(size=(200, 4)) + 1.5 * np.eye(4)[actual]
    found = classify([image(s) for s in scores], [truth(k) for k in actual], CLASSES)
    assert found is not None
    predicted = scores.astype(np.float32).argmax(axis=1)
    assert found.predicted.tolist() == predicted.tolist()
    assert found.accuracy == pytest.approx(accuracy_score(actual, predicted))
    np.testing.assert_array_equal(found.confusion, confusion_matrix(actual, predicted, labels=range(4)))
    recall = recall_score(actual, predicted, average=None, labels=range(3))
    np.testing.assert_allclose(found.recall[:3], recall)
    assert np.isnan(found.recall[3])
    assert found.balanced_accuracy == pytest.approx(recall.mean())
    kept = predicted < 3  # scikit-learn warns of predicted classes without images
    three = Classification(CLASSES[:3], actual[kept], predicted[kept])
    assert three.balanced_accuracy == pytest.approx(balanced_accuracy_score(actual[kept], predicted[kept]))


def test_equal_scores_go_to_the_first_class() -> None:
    found = classify([image(np.array([0.5, 0.5, 0.1, 0.5]))], [truth(1)], CLASSES)
    assert found is not None
    assert (found.predicted.tolist(), found.accuracy) == ([0], 0.0)


def test_accuracy_needs_one_class_an_image_and_a_score() -> None:
    assert labels_of([truth(1), truth(0, 2)]) is None
    assert labels_of([truth(1), GroundTruth.empty()]) is None
    assert classify([image(np.ones(4))], [truth(0, 2)], CLASSES) is None
    with pytest.raises(ShapeError, match="must have a score for its classes, got none for 'x'"):
        classify([Detections.empty("x")], [truth(1)], CLASSES)
    with pytest.raises(ShapeError, match="one Detections per image, got 0 for 1"):
        classify([], [truth(1)], CLASSES)


def voc_classification_ap(scores: np.ndarray, gt: np.ndarray) -> float:
    """VOC2007 devkit, VOCevalcls.m: rank images, leave those with gt 0 out, 11-point interpolation."""
    order = np.argsort(-scores, kind="stable")
    ranked = gt[order]
    tp, fp = np.cumsum(ranked > 0), np.cumsum(ranked < 0)
    recall = tp / (gt > 0).sum()
    precision = tp / np.maximum(tp + fp, 1)
    ap = 0.0
    for level in np.arange(0.0, 1.1, 0.1):
        reached = precision[recall >= level]
        ap += (reached.max() if len(reached) else 0.0) / 11
    return ap


def test_average_precision_is_that_of_vocs_classification_task(rng: np.random.Generator) -> None:
    gt = rng.choice([-1, 0, 1], size=(120, 4), p=[0.6, 0.1, 0.3])  # several classes an image, some difficult
    scores = (rng.normal(size=gt.shape) + gt).astype(np.float32)
    truths = []
    for row in gt:
        labels = np.flatnonzero(row >= 0).tolist()
        truths.append(
            truth(*labels, difficult=tuple(np.flatnonzero(row == 0))) if labels else GroundTruth.empty()
        )
    result = evaluate_voc([image(s) for s in scores], truths, CLASSES, rule="voc07")
    expected = [voc_classification_ap(scores[:, k].astype(float), gt[:, k]) for k in range(4)]
    np.testing.assert_allclose(result.ap(), expected, atol=1e-12)
    assert result.map() == pytest.approx(np.mean(expected))


def test_intervals_of_accuracy_are_paired(rng: np.random.Generator) -> None:
    actual = rng.choice(3, size=400, p=[0.7, 0.2, 0.1])
    wrong = (actual + 1) % 3
    first = Classification(CLASSES[:3], actual, np.where(rng.random(400) < 0.8, actual, wrong))
    second = Classification(CLASSES[:3], actual, np.where(rng.random(400) < 0.6, actual, wrong))
    found = paired_accuracy({"first": first, "second": second, "again": first}, n_resamples=2000, seed=1)
    assert list(found) == ["accuracy", "balanced accuracy"]
    for measure, value in (("accuracy", first.accuracy), ("balanced accuracy", first.balanced_accuracy)):
        own = found[measure].mean["first"]
        assert own.value == pytest.approx(value)
        assert own.low < own.value < own.high
        level = found[measure].difference("first", "again")
        assert (level.mean.value, level.mean.low, level.mean.high, level.supported) == (0, 0, 0, False)
        turned = found[measure].difference("second", "first")
        assert turned.supported
        assert turned.mean.value == pytest.approx(-found[measure].difference("first", "second").mean.value)
    spread = np.sqrt(first.accuracy * (1 - first.accuracy) / 400)  # of a mean of 0 and 1
    own = found["accuracy"].mean["first"]
    assert (own.high - own.low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.1)
    # Two images more right and none less decide nothing: a resample in seven holds neither of them.
    off = np.where(np.arange(400) < 2, wrong, actual)
    whole, less = (Classification(CLASSES[:3], actual, one) for one in (actual, off))
    gap = paired_accuracy({"whole": whole, "less": less}, n_resamples=2000)["accuracy"].differences[0]
    assert gap.mean.value == pytest.approx(2 / 400)
    assert (gap.mean.low, gap.supported) == (0, False)
    assert gap.flip_share == pytest.approx(np.exp(-2) / 2, abs=0.015)
    with pytest.raises(ConfigError, match="of the same images"):
        paired_accuracy({"first": first, "other": Classification(CLASSES[:3], wrong, wrong)})
    with pytest.raises(ConfigError, match="at least one detector"):
        paired_accuracy({})
