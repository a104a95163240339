"""Recall and average best overlap against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.proposals import proposal_recall
from rcnn_svm.proposals.recall import best_overlaps
from rcnn_svm.structures import GroundTruth


def truth(*rows):
    """Rows of x1 y1 x2 y2 label difficult crowd."""
    a = np.array(rows, np.float32).reshape(-1, 7)
    return GroundTruth(a[:, :4], a[:, 4].astype(int), a[:, 5].astype(bool), a[:, 6].astype(bool))


def test_values_by_hand():
    truths = [
        truth((0, 0, 10, 10, 0, 0, 0), (0, 0, 20, 10, 1, 0, 0), (5, 5, 9, 9, 1, 1, 0), (5, 5, 9, 9, 1, 0, 1)),
        truth((0, 0, 8, 10, 0, 0, 0)),
    ]
    boxes = [np.array([[0, 0, 10, 5], [0, 0, 10, 10]], np.float32), np.zeros((0, 4), np.float32)]
    result = proposal_recall(boxes, truths, 3, budgets=(1, 2, 50))
    np.testing.assert_allclose(result.overlap, [[0.5, 1, 1], [0.25, 0.5, 0.5], [0, 0, 0]])
    np.testing.assert_allclose(result.recall(0.5), [1 / 3, 2 / 3, 2 / 3])  # equality counts
    np.testing.assert_allclose(result.abo(), [[0.25, 0.5, 0.5], [0.25, 0.5, 0.5], [np.nan] * 3])
    np.testing.assert_allclose(result.mabo(), [0.25, 0.5, 0.5])
    np.testing.assert_array_equal(result.image, [0, 0, 1])
    assert result.n_boxes == 1.0


def test_no_object_at_all_is_nan():
    result = proposal_recall([np.zeros((0, 4), np.float32)], [GroundTruth.empty()], 2, budgets=(5,))
    assert result.overlap.shape == (0, 1)
    assert np.isnan(result.recall(0.5)).all()
    assert np.isnan(result.mabo()).all()
    assert proposal_recall([], [], 2, budgets=(5,)).n_boxes == 0


def test_overlap_never_falls_with_more_boxes(rng):
    corner = rng.integers(0, 50, (40, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 40, (40, 2))], axis=1).astype(np.float32)
    overlap = best_overlaps(boxes, boxes[:7], (1, 3, 10, 40, 100))
    assert (np.diff(overlap, axis=1) >= 0).all()
    np.testing.assert_array_equal(overlap[:, -1], 1)


@pytest.mark.parametrize("budgets", [(), (0, 5), (5, 5), (9, 3)])
def test_budgets_that_do_not_rise(budgets):
    with pytest.raises(ConfigError) as caught:
        proposal_recall([], [], 1, budgets=budgets)
    assert str(caught.value) == f"proposal_recall: budgets must rise from at least 1, got {budgets}."


def test_images_that_do_not_match():
    with pytest.raises(ShapeError) as caught:
        proposal_recall([np.zeros((0, 4), np.float32)], [], 1)
    assert str(caught.value) == "proposal_recall: proposals and truths must be of the same images."
