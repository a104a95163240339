from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchvision.ops import box_iou
from torchvision.ops import nms as torchvision_nms

from rcnn_svm import boxes as geometry
from rcnn_svm.boxes import (
    area,
    as_boxes,
    clip,
    decode_deltas,
    draw_to_regions,
    encode_deltas,
    flip_horizontally,
    iou,
    nms,
    round_half_away,
    soft_nms,
    vote_boxes,
    widen,
)
from rcnn_svm.errors import ShapeError


@st.composite
def whole_boxes(draw, low=0, high=40, min_size=0, max_size=12):
    """Boxes with integer corners and a positive area."""
    n = draw(st.integers(min_size, max_size))
    corner = draw(arrays(np.int64, (n, 2), elements=st.integers(low, high - 1)))
    side = draw(arrays(np.int64, (n, 2), elements=st.integers(1, high)))
    return np.concatenate([corner, corner + side], axis=1).astype(np.float32)


def many(rng, n, size=300):
    low = rng.uniform(0, size, (n, 2))
    return np.concatenate([low, low + rng.uniform(5, size / 3, (n, 2))], axis=1).astype(np.float32)


modest = settings(deadline=None, max_examples=60)


def test_as_boxes_makes_float32_and_shapes_empty_input():
    assert as_boxes([[1, 2, 3, 4]]).dtype == np.float32
    assert as_boxes([]).shape == (0, 4)
    assert as_boxes(np.zeros((0, 7))).shape == (0, 4)


def test_as_boxes_messages():
    with pytest.raises(ShapeError, match=r"^boxes: boxes must have shape \(N, 4\), got \(4,\)\.$"):
        as_boxes([1, 2, 3, 4])
    with pytest.raises(ShapeError, match=r"^here: boxes must be finite, got 1 bad rows \(first: row 1\)\.$"):
        as_boxes([[0, 0, 1, 1], [0, np.nan, 1, 1]], where="here")


def test_area_of_an_inverted_box_is_zero():
    assert area(np.array([[0, 0, 4, 5], [4, 5, 0, 0], [3, 0, 3, 9]])).tolist() == [20, 0, 0]


@modest
@given(whole_boxes(), whole_boxes())
def test_iou_counts_pixels(first, second):
    for a, row in zip(first.astype(int), iou(first, second), strict=True):
        for b, value in zip(second.astype(int), row, strict=True):
            canvas = np.zeros((2, 80, 80), bool)
            for mask, (x1, y1, x2, y2) in zip(canvas, (a, b), strict=True):
                mask[y1:y2, x1:x2] = True
            assert value == (canvas[0] & canvas[1]).sum() / (canvas[0] | canvas[1]).sum()


@modest
@given(whole_boxes(), whole_boxes(), st.integers(-50, 50), st.sampled_from([0.5, 2.0, 4.0]))
def test_iou_is_symmetric_bounded_and_blind_to_shift_and_scale(first, second, shift, scale):
    value = iou(first, second)
    assert value.shape == (len(first), len(second))
    assert ((value >= 0) & (value <= 1)).all()
    np.testing.assert_array_equal(value, iou(second, first).T)
    np.testing.assert_array_equal(value, iou(first + shift, second + shift))
    np.testing.assert_array_equal(value, iou(first * scale, second * scale))
    np.testing.assert_array_equal(np.diag(iou(first, first)), 1.0)


def test_iou_equals_torchvision_and_the_inclusive_form(rng):
    first, second = (np.floor(many(rng, 150)) for _ in range(2))
    reference = box_iou(torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64))
    np.testing.assert_array_equal(iou(first, second), reference.numpy())
    # The same boxes in 1-based inclusive pixels, with the devkit's + 1 on every side.
    a, b = (each + np.array([1, 1, 0, 0]) for each in (first.astype(int), second.astype(int)))
    w = np.minimum(a[:, None, 2], b[:, 2]) - np.maximum(a[:, None, 0], b[:, 0]) + 1
    h = np.minimum(a[:, None, 3], b[:, 3]) - np.maximum(a[:, None, 1], b[:, 1]) + 1
    common = np.maximum(w, 0) * np.maximum(h, 0)
    sizes = [(each[:, 2] - each[:, 0] + 1) * (each[:, 3] - each[:, 1] + 1) for each in (a, b)]
    np.testing.assert_array_equal(iou(first, second), common / (sizes[0][:, None] + sizes[1] - common))


def test_iou_of_boxes_without_area_is_zero():
    assert iou(np.zeros((1, 4)), np.zeros((2, 4))).tolist() == [[0, 0]]
    assert iou(np.zeros((0, 4)), np.zeros((2, 4))).shape == (0, 2)


@modest
@given(whole_boxes(low=-30, high=60))
def test_clip_is_idempotent_and_stays_inside(boxes):
    once = clip(boxes, (20, 30))
    np.testing.assert_array_equal(clip(once, (20, 30)), once)
    assert (once >= 0).all()
    assert (once <= [30, 20, 30, 20]).all()
    assert once.dtype == np.float32


@modest
@given(whole_boxes())
def test_flip_is_an_involution_that_keeps_areas(boxes):
    flipped = flip_horizontally(boxes, 100)
    np.testing.assert_array_equal(flip_horizontally(flipped, 100), boxes)
    np.testing.assert_array_equal(area(flipped), area(boxes))


def test_widen_keeps_the_centre():
    assert widen(np.array([[10, 20, 30, 40]]), 2).tolist() == [[0, 10, 40, 50]]
    assert widen(np.array([[10, 20, 30, 40]]), 1).tolist() == [[10, 20, 30, 40]]


def test_round_half_away_from_zero():
    assert round_half_away([0.5, 1.5, 2.5, -0.5, -1.5, 0.49, -0.49]).tolist() == [1, 2, 3, -1, -2, 0, 0]


@modest
@given(whole_boxes(min_size=6, max_size=6), whole_boxes(min_size=6, max_size=6))
def test_decode_inverts_encode(proposals, targets):
    deltas = encode_deltas(proposals, targets)
    np.testing.assert_allclose(decode_deltas(proposals, deltas), targets, atol=1e-4)
    np.testing.assert_allclose(encode_deltas(proposals, proposals), 0, atol=1e-12)


def test_encode_by_hand():
    value = encode_deltas(np.array([[0, 0, 10, 20]]), np.array([[5, 0, 25, 10]]))
    np.testing.assert_allclose(value, [[1.0, -0.25, np.log(2), -np.log(2)]])


def test_decode_limits_the_scale():
    decoded = decode_deltas(np.array([[0, 0, 10, 10]]), np.array([[0, 0, 900, -900]]))
    assert np.isfinite(decoded).all()
    assert decoded[0, 2] - decoded[0, 0] == pytest.approx(10 * np.exp(4))


def test_encode_messages():
    with pytest.raises(
        ShapeError, match=r"^encode_deltas: proposals \(1, 4\) and targets \(2, 4\) must be alike\.$"
    ):
        encode_deltas(np.ones((1, 4)), np.ones((2, 4)))
    with pytest.raises(ShapeError, match=r"^encode_deltas: every box must have a positive area\.$"):
        encode_deltas(np.array([[0, 0, 1, 1]]), np.array([[0, 0, 0, 1]]))


@pytest.mark.parametrize("max_iou", [0.0, 0.3, 0.5, 1.0])
def test_nms_equals_torchvision(rng, max_iou):
    boxes, scores = many(rng, 500), rng.normal(size=500)
    reference = torchvision_nms(torch.tensor(boxes, dtype=torch.float64), torch.tensor(scores), max_iou)
    np.testing.assert_array_equal(nms(boxes, scores, max_iou), reference.numpy())


@modest
@given(whole_boxes(max_size=15), st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.75, 1.0]), st.integers(0, 2**31))
def test_nms_keeps_the_best_apart_and_drops_only_for_a_better_rival(boxes, max_iou, seed):
    scores = np.random.default_rng(seed).integers(0, 5, len(boxes)).astype(np.float32)
    kept = nms(boxes, scores, max_iou)
    assert (np.diff(scores[kept]) <= 0).all()
    overlaps = iou(boxes, boxes)
    for i, first in enumerate(kept):
        assert (overlaps[first, kept[i + 1 :]] <= max_iou).all()
    for loser in set(range(len(boxes))) - set(kept.tolist()):
        rivals = kept[overlaps[loser, kept] > max_iou]
        assert any(scores[r] > scores[loser] or (scores[r] == scores[loser] and r < loser) for r in rivals)
    again = nms(boxes[kept], scores[kept], max_iou)
    np.testing.assert_array_equal(again, np.arange(len(kept)))


def test_nms_keeps_at_equality_and_the_first_of_a_tie():
    half = np.array([[0, 0, 10, 10], [0, 0, 10, 5]], np.float32)
    assert nms(half, np.array([1.0, 1.0]), 0.5).tolist() == [0, 1]
    assert nms(half, np.array([1.0, 1.0]), 0.49).tolist() == [0]
    third = np.array([[0, 0, 10, 10], [0, 0, 10, 3]], np.float32)
    assert nms(third, np.array([1.0, 2.0]), 0.3).tolist() == [1, 0]
    assert nms(np.zeros((3, 4)), np.array([1.0, 3.0, 2.0]), 0.3).tolist() == [1, 2, 0]


def test_nms_of_nothing():
    assert nms(np.zeros((0, 4)), np.zeros(0), 0.3).shape == (0,)


def test_nms_messages():
    with pytest.raises(ShapeError, match=r"^nms: boxes and scores must be alike in length, got 1 and 2\.$"):
        nms(np.zeros((1, 4)), np.zeros(2), 0.3)
    with pytest.raises(ShapeError, match=r"^nms: boxes and labels must be alike in length, got 1 and 2\.$"):
        nms(np.zeros((1, 4)), np.zeros(1), 0.3, labels=np.zeros(2, int))
    with pytest.raises(ShapeError, match=r"^nms: scores must not be NaN\.$"):
        nms(np.zeros((1, 4)), np.array([np.nan]), 0.3)


@pytest.mark.parametrize("function", ["_suppress", "_vote"])
def test_compiled_loops_equal_their_python_text(rng, function):
    boxes = many(rng, 60).astype(np.float64)
    labels = rng.integers(0, 3, 60)
    arguments = {
        "_suppress": (boxes, labels, 0.3, 20),
        "_vote": (boxes[:9], boxes, rng.random(60), 0.5),
    }[function]
    plain = getattr(geometry, function)
    np.testing.assert_allclose(geometry._compiled(plain)(*arguments), plain(*arguments), rtol=1e-12)


@given(whole_boxes(max_size=20), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 22))
@settings(deadline=None)  # compiles at first
def test_labels_and_limit_are_those_of_each_label_apart(boxes, seed, value, limit):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 6, len(boxes)) / 6, rng.integers(0, 4, len(boxes))  # with ties
    for name in ("nms", "soft_nms"):
        function, setting = getattr(geometry, name), value if name == "nms" else value + 0.1

        def both(rows, found, name=name):  # -> indices of the whole, scores at the end
            kept, after = (found, scores[rows][found]) if name == "nms" else found
            return rows[kept], after

        parts = [
            both(rows, function(boxes[rows], scores[rows], setting))
            for rows in (np.flatnonzero(labels == k) for k in range(4))
        ]
        kept, after = (np.concatenate(column) for column in zip(*parts, strict=True))
        everything = np.arange(len(boxes))
        for most in (None, limit):
            found, final = both(everything, function(boxes, scores, setting, labels=labels, limit=most))
            assert len(found) == min(len(kept), len(boxes) if most is None else most)
            np.testing.assert_array_equal(final, np.sort(after)[::-1][: len(found)])
            # Among equals of several labels the order is free; each label's own is as it is alone.
            own = dict(zip(kept.tolist(), after, strict=True))
            assert [own[i] for i in found.tolist()] == final.tolist()
            for k in range(4):
                mine = found[labels[found] == k].tolist()
                assert mine == kept[labels[kept] == k].tolist()[: len(mine)]


@given(whole_boxes(max_size=8), st.integers(0, 1000), st.sampled_from([0.1, 0.5, 2.0]))
@settings(deadline=None)  # compiles at first
def test_soft_nms_equals_its_definition(boxes, seed, sigma):
    scores = np.random.default_rng(seed).integers(0, 4, len(boxes)) / 4  # with ties
    order, decayed = soft_nms(boxes, scores, sigma)
    left, rest = dict(enumerate(scores)), iou(boxes, boxes)
    for found, score in zip(order.tolist(), decayed, strict=True):
        best = max(left, key=lambda i: (left[i], -i))
        assert found == best
        assert score == pytest.approx(left.pop(best))
        left = {i: s * np.exp(-(rest[best, i] ** 2) / sigma) for i, s in left.items()}
    assert not left


def test_soft_nms_refuses_what_it_cannot_decay():
    box = np.zeros((1, 4), np.float32)
    with pytest.raises(
        ShapeError, match=r"^soft_nms: boxes and scores must be alike in length, got 1 and 2\.$"
    ):
        soft_nms(box, np.zeros(2), 0.5)
    for score in (np.nan, -0.1):
        with pytest.raises(ShapeError, match=r"^soft_nms: scores must not be NaN or negative\.$"):
            soft_nms(box, np.array([score]), 0.5)


def test_voting_equals_its_definition(rng):
    boxes, weights = many(rng, 200, size=80), rng.random(200)
    kept = boxes[nms(boxes, weights, 0.3)]
    votes = np.where(iou(kept, boxes) >= 0.5, weights, 0.0)
    expected = votes @ boxes.astype(np.float64) / votes.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(vote_boxes(kept, boxes, weights, 0.5), expected, rtol=1e-6)


def test_voting_at_equality_and_without_weight():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5]], np.float32)
    assert vote_boxes(boxes[:1], boxes, np.array([1.0, 1.0]), 0.5).tolist() == [[0, 0, 10, 7.5]]
    assert vote_boxes(boxes[:1], boxes, np.array([1.0, 1.0]), 0.51).tolist() == [[0, 0, 10, 10]]
    assert vote_boxes(boxes[:1], boxes, np.zeros(2), 0.5).tolist() == [[0, 0, 10, 10]]
    assert vote_boxes(boxes[:0], boxes, np.zeros(2), 0.5).shape == (0, 4)
    with pytest.raises(
        ShapeError, match=r"^vote_boxes: boxes and weights must be alike in length, got 2 and 1\.$"
    ):
        vote_boxes(boxes, boxes, np.zeros(1), 0.5)


@given(whole_boxes(min_size=1), whole_boxes(), st.floats(0, 1))
@modest
def test_boxes_are_drawn_to_the_mean_of_near_regions(boxes, regions, share):
    drawn = draw_to_regions(boxes, regions, share)
    assert drawn.dtype == np.float32
    assert drawn.shape == boxes.shape
    overlaps = iou(boxes, regions)
    for box, own, moved in zip(boxes.astype(np.float64), overlaps, drawn, strict=True):
        near = own >= 0.5
        expected = box
        if near.any():
            weights = np.exp(own[near] / 0.05)
            expected = (1 - share) * box + share * np.average(regions[near], axis=0, weights=weights)
        np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-4)


def test_a_region_that_half_overlaps_draws_and_one_that_does_less_does_not():
    boxes = np.array([[0, 0, 10, 10]], np.float32)
    half, less = np.array([[0, 0, 10, 5]], np.float32), np.array([[0, 0, 10, 4.9]], np.float32)
    assert draw_to_regions(boxes, half, 0.4).tolist() == [[0, 0, 10, 8]]
    assert draw_to_regions(boxes, np.concatenate([half, less]), 0.4).tolist() == [[0, 0, 10, 8]]
    for regions in (less, half[:0]):
        assert draw_to_regions(boxes, regions, 0.4).tolist() == boxes.tolist()
    assert draw_to_regions(boxes[:0], half, 0.4).shape == (0, 4)


def test_importing_loads_no_compiler():
    code = (
        "import sys, rcnn_svm.boxes, rcnn_svm.structures; "
        "print(sorted({'numba', 'torch', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
