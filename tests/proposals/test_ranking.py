"""The diverse ranking: cues by hand, a slow twin of the selection, and the stated weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm.boxes import iou
from rcnn_svm.proposals import SelectiveSearchConfig, selective_search
from rcnn_svm.proposals.ranking import CUES, PENALTY, TOLERATED_IOU, WEIGHTS, cues, diverse_order


def test_cues_by_hand():
    boxes = np.array([[0, 0, 20, 10], [5, 0, 15, 10], [0, 0, 20, 10]], np.int32)
    values = cues(boxes, np.array([1.0, 4.0, 3.0]), np.array([1, 0]), (20, 40))
    whole = dict(zip(CUES, values[1], strict=True))
    assert whole["log best position"] == 0
    assert whole["mean log position"] == pytest.approx(np.log(3) / 2)
    assert whole["log copies"] == pytest.approx(np.log(2))
    assert whole["log area"] == pytest.approx(np.log(0.25))
    assert whole["log aspect"] == pytest.approx(np.log(2))
    assert whole["offset x squared"] == pytest.approx(0.0625)
    assert whole["offset y"] == pytest.approx(-0.25)
    assert [whole[f"touches {side}"] for side in ("left or right", "top", "bottom")] == [1, 1, 0]
    assert whole["width"] == whole["height"] == 0.5
    inner = dict(zip(CUES, values[0], strict=True))
    assert inner["touches left or right"] == inner["log copies"] == 0
    assert inner["log best position"] == pytest.approx(np.log(4))


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 50), st.booleans())
@settings(deadline=None, max_examples=40)
def test_order_equals_a_plain_loop(seed, n, n_taken, ties):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 30, (n, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 30, (n, 2))], axis=1).astype(np.int32)
    score = rng.integers(0, 3, n).astype(float) if ties else rng.normal(size=n)
    overlap = iou(boxes.astype(float), boxes.astype(float))
    order: list[int] = []
    while len(order) < n:
        nearest = overlap[:, order[:n_taken]].max(axis=1) if order else np.zeros(n)
        left = score - PENALTY * np.maximum(nearest - TOLERATED_IOU, 0) / (1 - TOLERATED_IOU)
        left[order] = -np.inf
        order.append(int(np.argmax(left)))
    np.testing.assert_array_equal(diverse_order(boxes, score, n_taken), order)


def test_ranking_reorders_the_same_boxes(rng):
    image = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    paper, diverse = (selective_search(image, SelectiveSearchConfig(ranking=r)) for r in ("paper", "diverse"))
    assert {tuple(b) for b in paper.boxes} == {tuple(b) for b in diverse.boxes}
    assert not np.array_equal(paper.boxes, diverse.boxes)
    assert (np.diff(diverse.priority) > 0).all()


def test_an_image_without_boxes():
    config = SelectiveSearchConfig(ranking="diverse", min_size=50)
    assert len(selective_search(np.zeros((9, 9, 3), np.uint8), config)) == 0


def test_weights_are_those_that_were_measured():
    path = Path(__file__).parents[2] / "results/benchmarks/proposal_ranking.json"
    (fit,) = [row for row in json.loads(path.read_text())["rows"] if row["what"] == "fit"]
    assert fit["weights"] == dict(zip(CUES, WEIGHTS.tolist(), strict=True))
    assert (fit["penalty"], fit["tolerated_iou"]) == (PENALTY, TOLERATED_IOU)
