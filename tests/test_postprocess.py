from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rcnn_svm.boxes import clip, decode_deltas, draw_to_regions, encode_deltas, iou
from rcnn_svm.detector import Model
from rcnn_svm.errors import ConfigError
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.scorers import SoftmaxScorer
from rcnn_svm.postprocess import (
    PAPER,
    PostprocessConfig,
    candidates_to_refine,
    moved_regions,
    postprocess,
    postprocess_traced,
    refined,
)
from rcnn_svm.structures import Detections

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


@given(st.integers(0, 10_000), st.integers(1, 50))
@example(3298, 32)  # one of the surest regions moves out of the image
@settings(max_examples=25, deadline=None)
def test_moved_regions_are_the_surest_ones_after_regression(seed: int, n: int) -> None:
    boxes, scores = scene(seed)
    deltas = np.random.default_rng(seed).normal(size=(40, 3, 4)).astype(np.float32) / 3
    moved = moved_regions(boxes, scores, deltas, (100, 100), PostprocessConfig(second_look=n))
    assert len(moved) <= min(n, 40)
    assert (moved >= 0).all()
    assert (moved <= 100).all()
    assert (moved[:, 2:] - moved[:, :2] >= 1).all()
    # Detections without suppression, box by box, are these same boxes, but for those without any area.
    everything = PostprocessConfig(max_iou=1, vote_iou=None, max_candidates=40, max_detections=120)
    best = np.where(scores == scores.max(axis=1, keepdims=True), scores, -9).astype(np.float32)
    found = postprocess("a", (100, 100), boxes, best, deltas, everything)
    least = np.sort(scores.max(axis=1))[-min(n, 40)]
    expected = found.boxes[found.scores >= least]
    solid = (expected[:, 2:] - expected[:, :2] >= 1).all(axis=1)
    distance = np.abs(moved[:, None] - expected[None]).max(axis=2)
    assert (distance.min(axis=1) < 1e-3).all()
    assert (distance[:, solid].min(axis=0, initial=9) < 1e-3).all()


def test_a_second_look_reads_the_moved_regions_and_lets_them_compete() -> None:
    # Features of a region are its left edge and 1; the nearer that is to 10, the better.
    def look(boxes: np.ndarray) -> tuple[np.ndarray, None]:
        seen.append(boxes)
        return np.stack([boxes[:, 0] / 10, np.ones(len(boxes))], axis=1).astype(np.float32), None

    def scores(rows: np.ndarray) -> np.ndarray:
        return (-np.abs(rows[:, :1] - 1)).astype(np.float32)

    class Nearness(SoftmaxScorer):
        def decision_function(self, features: np.ndarray) -> np.ndarray:
            return scores(features)

    # Half a width to the right, whatever the region.
    regressor = BoxRegressor.from_arrays(
        {"coef": np.zeros((1, 4, 2), np.float32), "intercept": np.array([[0.25, 0, 0, 0]], np.float32)}
    )
    model = Model(Nearness(np.zeros((2, 2), np.float32), np.zeros(2, np.float32)), None, regressor)
    boxes = np.array([[5, 0, 25, 20], [60, 60, 90, 90]], np.float32)
    seen: list[np.ndarray] = []
    first = model.read(*look(boxes))
    found = {
        n: model.detect(
            "a", (100, 100), boxes, *first, PostprocessConfig(vote_iou=None, second_look=n), look
        )[0]
        for n in (0, 1)
    }
    assert len(seen) == 2  # the regions, and once more for the second detector
    np.testing.assert_allclose(seen[1], [[10, 0, 30, 20]])
    np.testing.assert_allclose(found[0].boxes[0], [10, 0, 30, 20])
    assert found[0].scores[0] == pytest.approx(-0.5)
    # Now the region that was moved scores 0 and moves on.
    np.testing.assert_allclose(found[1].boxes[0], [15, 0, 35, 20])
    assert found[1].scores[0] == 0
    off = PostprocessConfig(vote_iou=None, second_look=1, regression="off")
    model.detect("a", (100, 100), boxes, *first, off, look)
    nobody = PostprocessConfig(vote_iou=None, second_look=1, min_score=9)
    assert len(model.detect("a", (100, 100), boxes, *first, nobody, look)[0]) == 0
    nothing = [np.zeros((0, 4), np.float32), np.zeros((0, 1), np.float32), np.zeros((0, 1, 4), np.float32)]
    assert len(model.detect("a", (100, 100), *nothing, nobody, look)[0]) == 0
    assert len(seen) == 2


@given(st.integers(0, 10_000), st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_boxes_to_refine_are_the_surest_without_near_copies(seed: int, n: int) -> None:
    boxes, scores = scene(seed)
    deltas = np.random.default_rng(seed).normal(size=(40, 3, 4)).astype(np.float32) / 3
    found, rows = candidates_to_refine("a", (100, 100), boxes, scores, deltas, PostprocessConfig(refined=n))
    everything = PostprocessConfig(max_iou=0.7, vote_iou=None, max_detections=None)
    whole = postprocess("a", (100, 100), boxes, scores, deltas, everything)
    np.testing.assert_array_equal(found.scores, scores[rows, found.labels])
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name)[:n])


@given(st.integers(0, 10_000), st.sampled_from([None, 0.2]))
@settings(max_examples=25, deadline=None)
def test_refined_boxes_are_moved_ranked_and_suppressed(seed: int, sigma: float | None) -> None:
    boxes, scores = scene(seed)
    rng = np.random.default_rng(seed)
    config = PostprocessConfig(refined=20, soft_nms_sigma=sigma, overlap_power=2.0)
    still = np.zeros((40, 3, 4), np.float32)
    found, _ = candidates_to_refine("a", (100, 100), boxes, scores, still, config)
    moves = rng.normal(size=(len(found), 4)).astype(np.float32) / 10
    overlaps = rng.uniform(0.01, 0.99, len(found)).astype(np.float32)
    final, rows = refined(found, moves, overlaps, (100, 100), 3, config)
    moved = clip(decode_deltas(found.boxes, moves), (100, 100))
    gone = (moved[:, 2:] - moved[:, :2] < 1).any(axis=1)
    moved[gone] = found.boxes[gone]
    ranked = found.scores + 2 * np.log(overlaps)
    assert set(map(tuple, final.boxes.tolist())) <= set(map(tuple, moved.tolist()))
    np.testing.assert_array_equal(final.boxes, moved[rows])
    best = int(ranked.argmax())
    assert final.scores[0] == pytest.approx(ranked[best])
    assert final.labels[0] == found.labels[best]
    if sigma is None:
        for label in set(final.labels.tolist()):
            pairs = iou(*[final.boxes[final.labels == label]] * 2)
            assert (pairs[np.triu_indices_from(pairs, 1)] <= config.max_iou + 1e-6).all()


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=25, deadline=None)
def test_detections_are_drawn_to_proposals_after_all_else(seed: int, snap: float) -> None:
    boxes, scores = scene(seed)
    deltas = np.random.default_rng(seed).normal(size=(40, 3, 4)).astype(np.float32) / 3
    plain = postprocess("a", (100, 100), boxes, scores, deltas, PostprocessConfig())
    drawn = postprocess("a", (100, 100), boxes, scores, deltas, PostprocessConfig(snap=snap))
    np.testing.assert_array_equal(drawn.boxes, draw_to_regions(plain.boxes, boxes, snap))
    for name in ("scores", "labels"):
        np.testing.assert_array_equal(getattr(drawn, name), getattr(plain, name))


def test_one_refined_box_that_would_vanish_stays() -> None:
    found = Detections("a", np.array([[10, 10, 20, 20]], np.float32), np.array([1.0]), np.array([1]))
    shrunk = np.array([[0, 0, -4, -4]], np.float32)
    half = np.array([0.5], np.float32)
    final, _ = refined(found, shrunk, half, (50, 50), 2, PostprocessConfig(refined=1))
    np.testing.assert_array_equal(final.boxes, found.boxes)


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


def test_the_paper_caps_a_class_but_not_an_image() -> None:
    boxes = np.array([[10 * i, 10 * j, 10 * i + 5, 10 * j + 5] for i in range(12) for j in range(12)], float)
    scores = np.random.default_rng(0).normal(size=(144, 5)).astype(np.float32)
    found = postprocess("a", (200, 200), boxes.astype(np.float32), scores, None, PAPER)
    assert np.bincount(found.labels).tolist() == [100] * 5


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
    # On the scale of the scores: the log-odds of the decayed probability.
    np.testing.assert_allclose(
        found.scores, logit([[0.9], [0.5], [0.8 * np.exp(-(overlap**2) / 0.5)]])[:, 0], rtol=1e-5
    )


@settings(deadline=None)  # the first call compiles
@given(seed=st.integers(0, 999), sigma=st.floats(0.01, 2))
def test_soft_nms_speaks_the_scale_of_the_scores(seed: int, sigma: float) -> None:
    """No score rises, and one that meets no rival stays to the bit."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 60, (30, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 30, (30, 2))], axis=1).astype(np.float32)
    boxes[0] = [500, 500, 520, 520]
    scores = rng.normal(0, 20, (30, 1)).astype(np.float32)
    config = PostprocessConfig(vote_iou=None, soft_nms_sigma=sigma)
    found = postprocess("a", (999, 999), boxes, scores, None, config)
    by_place = {tuple(box): score for box, score in zip(boxes.tolist(), scores[:, 0], strict=True)}
    before = np.array([by_place[tuple(box)] for box in found.boxes.tolist()])
    assert (found.scores <= before + 1e-4).all()
    assert found.scores[found.boxes[:, 0] == 500] == scores[0]
    assert np.isfinite(found.scores).all()


def test_boxes_go_a_part_of_the_way() -> None:
    boxes, scores = np.array([[10, 10, 30, 30]], np.float32), np.ones((1, 1), np.float32)
    deltas = np.array([[[0.2, -0.1, 0.4, 0.0]]], np.float32)
    whole, half = (
        postprocess("a", (99, 99), boxes, scores, d, PostprocessConfig(vote_iou=None, box_step=step)).boxes
        for d, step in ((deltas / 2, 1.0), (deltas, 0.5))
    )
    np.testing.assert_allclose(half, whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_iou": 1.5}, r"detect\.max_iou must lie in \[0, 1\], got 1\.5\."),
        ({"vote_iou": -0.1}, r"detect\.vote_iou must lie in \[0, 1\], got -0\.1\."),
        ({"box_step": 0.0}, r"detect\.box_step must lie in \(0, 1\], got 0\.0\."),
        ({"soft_nms_sigma": 0.0}, r"detect\.soft_nms_sigma must be positive, got 0\.0\."),
        ({"max_candidates": 0}, r"detect\.max_candidates must be at least 1, got 0\."),
        ({"second_look": -1}, r"detect\.second_look must not be negative, got -1\."),
    ],
)
def test_bad_settings_are_explained(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PostprocessConfig(**arguments)


@given(
    st.integers(0, 10_000), st.sampled_from([None, 0.3]), st.sampled_from(["before-nms", "after-nms", "off"])
)
@settings(max_examples=25, deadline=None)
def test_each_detection_is_traced_to_the_region_that_it_has_its_score_from(
    seed: int, sigma: float | None, when: str
) -> None:
    boxes, scores = scene(seed)
    deltas = np.random.default_rng(seed).normal(size=(*scores.shape, 4)).astype(np.float32) / 10
    config = PostprocessConfig(soft_nms_sigma=sigma, regression=when, vote_iou=None, max_detections=30)
    found, rows = postprocess_traced("a", (100, 100), boxes, scores, deltas, config)
    assert len(rows) == len(found) > 0
    own = scores[rows, found.labels]
    if sigma is None:
        np.testing.assert_array_equal(own, found.scores)
    else:
        assert (own >= found.scores).all()
        assert own[0] == found.scores[0]
    for row, label, box in zip(rows, found.labels, found.boxes, strict=True):
        one = postprocess("a", (100, 100), boxes[[row]], scores[[row]], deltas[[row]], config)
        np.testing.assert_array_equal(one.boxes[one.labels == label], [box])
