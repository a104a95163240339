from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm.boxes import encode_deltas, iou
from rcnn_svm.errors import ConfigError
from rcnn_svm.postprocess import PostprocessConfig, postprocess

PLAIN = PostprocessConfig(vote_iou=None)


def scene(seed: int, n: int = 40, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 40, (n, 2))], axis=1).astype(np.float32)
    return boxes, rng.normal(size=(n, k)).astype(np.float32)


def logit(probabilities: list[list[float]]) -> np.ndarray:
    p = np.array(probabilities)
    return np.log(p / (1 - p)).astype(np.float32)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_without_regression_it_is_torchvision_nms_per_class(seed: int) -> None:
    boxes, scores = scene(seed)
    found = postprocess("a", (100, 100), boxes, scores, None, PLAIN)
    for label in range(3):
        expected = torchvision.ops.nms(torch.tensor(boxes), torch.tensor(scores[:, label]), 0.3).numpy()
        mine = found.labels == label
        np.testing.assert_array_equal(found.boxes[mine], boxes[expected])
        np.testing.assert_array_equal(found.scores[mine], scores[expected, label])


def test_no_regions_give_no_detections() -> None:
    empty = np.zeros((0, 4), np.float32)
    found = postprocess("a", (10, 10), empty, np.zeros((0, 3), np.float32), None, PLAIN)
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)


def test_regression_moves_clips_and_drops_what_has_no_area() -> None:
    boxes = np.array([[10, 10, 20, 20], [50, 50, 60, 60]], np.float32)
    target = np.array([[12, 8, 26, 20], [200, 50, 210, 60]], np.float32)  # the second leaves the image
    deltas = encode_deltas(boxes, target).astype(np.float32)[:, None, :]
    scores = np.array([[1.0], [2.0]], np.float32)
    found = postprocess("a", (100, 100), boxes, scores, deltas, PLAIN)
    np.testing.assert_allclose(found.boxes, target[:1], atol=1e-4)
    off = PostprocessConfig(vote_iou=None, regression="off")
    np.testing.assert_array_equal(postprocess("a", (100, 100), boxes, scores, deltas, off).boxes, boxes[::-1])


def test_regression_before_nms_merges_what_regression_after_keeps() -> None:
    boxes = np.array([[0, 0, 20, 20], [15, 0, 35, 20]], np.float32)
    target = np.array([[8, 0, 28, 20], [8, 0, 28, 20]], np.float32)
    deltas = encode_deltas(boxes, target).astype(np.float32)[:, None, :]
    scores = np.array([[1.0], [0.5]], np.float32)
    counts = {
        when: len(postprocess("a", (100, 100), boxes, scores, deltas, PostprocessConfig(regression=when)))
        for when in ("before-nms", "after-nms")
    }
    assert counts == {"before-nms": 1, "after-nms": 2}


def test_caps_keep_the_best_and_ties_keep_input_order() -> None:
    boxes = np.array([[i * 10, 0, i * 10 + 5, 5] for i in range(9)], np.float32)
    scores = np.array([[1], [2], [2], [2], [3], [1], [0], [2], [5]], np.float32)
    config = PostprocessConfig(vote_iou=None, max_candidates=4)
    found = postprocess("a", (10, 100), boxes, scores, None, config)
    np.testing.assert_array_equal(found.boxes[:, 0], [80, 40, 10, 20])
    limited = PostprocessConfig(vote_iou=None, max_detections=2)
    assert len(postprocess("a", (10, 100), boxes, scores, None, limited)) == 2
    strict = PostprocessConfig(vote_iou=None, min_score=3)
    assert len(postprocess("a", (10, 100), boxes, scores, None, strict)) == 2


def test_voting_is_the_weighted_mean_of_overlapping_candidates() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 12, 10], [50, 50, 60, 60]], np.float32)
    scores = logit([[0.6], [0.2], [0.5]])
    found = postprocess("a", (99, 99), boxes, scores, None, PostprocessConfig(vote_iou=0.5))
    np.testing.assert_allclose(found.boxes[0], [0, 0, (0.6 * 10 + 0.2 * 12) / 0.8, 10], rtol=1e-5)
    np.testing.assert_array_equal(found.boxes[1], boxes[2])


def test_soft_nms_keeps_every_box_and_decays_rivals() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 60, 60]], np.float32)
    scores = logit([[0.9], [0.8], [0.5]])
    config = PostprocessConfig(vote_iou=None, soft_nms_sigma=0.5)
    found = postprocess("a", (99, 99), boxes, scores, None, config)
    overlap = iou(boxes[:1], boxes[1:2])[0, 0]
    assert len(found) == 3
    np.testing.assert_allclose(found.scores, [0.9, 0.5, 0.8 * np.exp(-(overlap**2) / 0.5)], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_iou": 1.5}, r"detect\.max_iou must lie in \[0, 1\], got 1\.5\."),
        ({"vote_iou": -0.1}, r"detect\.vote_iou must lie in \[0, 1\], got -0\.1\."),
        ({"soft_nms_sigma": 0.0}, r"detect\.soft_nms_sigma must be positive, got 0\.0\."),
        ({"max_candidates": 0}, r"detect\.max_candidates must be at least 1, got 0\."),
    ],
)
def test_bad_settings_are_explained(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PostprocessConfig(**arguments)
