from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm.boxes import iou
from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.heads.assign import FINETUNE_RULE, SVM_RULE, LabelRule, describe_regions
from rcnn_svm.structures import GroundTruth

# 10 x 10 object; the columns cut off leave IoU 1, 0.7, 0.5, 0.3, 0.2 and 0.
OBJECT = np.array([[0, 0, 10, 10]], np.float32)
CUTS = np.array(
    [[0, 0, 10, 10], [0, 0, 7, 10], [0, 0, 5, 10], [0, 0, 3, 10], [0, 0, 2, 10], [50, 50, 60, 60]], np.float32
)


def test_overlaps_of_one_object() -> None:
    regions = describe_regions(CUTS, GroundTruth(OBJECT, np.array([1])), 2)
    np.testing.assert_allclose(regions.overlap[:, 1], [1, 0.7, 0.5, 0.3, 0.2, 0], rtol=1e-6)
    assert not regions.overlap[:, 0].any()
    assert regions.label.tolist() == [1, 1, 1, 1, 1, -1]
    assert not regions.is_gt.any()
    np.testing.assert_array_equal(regions.target[5], 0)


def test_svm_rule_takes_ground_truth_and_what_is_strictly_below_the_threshold() -> None:
    boxes = np.concatenate([OBJECT, CUTS])
    regions = describe_regions(boxes, GroundTruth(OBJECT, np.array([0])), 2, 1)
    # IoU 0.3 is not below 0.3: ignored. Every row is a negative of the class that is absent.
    assert SVM_RULE.per_class(regions)[:, 0].tolist() == [1, 0, 0, 0, 0, -1, -1]
    assert SVM_RULE.per_class(regions)[:, 1].tolist() == [-1] * 7
    assert SVM_RULE.multiclass(regions).tolist() == [0, -1, -1, -1, -1, 2, 2]


def test_finetune_rule_includes_equality() -> None:
    regions = describe_regions(CUTS, GroundTruth(OBJECT, np.array([0])), 1)
    assert FINETUNE_RULE.multiclass(regions).tolist() == [0, 0, 0, 1, 1, 1]
    assert FINETUNE_RULE.per_class(regions)[:, 0].tolist() == [1, 1, 1, -1, -1, -1]


def test_lower_bound_of_negatives_is_inclusive() -> None:
    rule = LabelRule(0.5, 0.5, negative_low=0.2)
    regions = describe_regions(CUTS, GroundTruth(OBJECT, np.array([0])), 1)
    low = regions.overlap[4, 0]
    assert LabelRule(0.5, 0.5, negative_low=float(low)).multiclass(regions)[4] == 1
    assert rule.multiclass(regions).tolist()[5] == -1


def test_difficult_objects_count() -> None:
    truth = GroundTruth(OBJECT, np.array([0]), difficult=np.array([True]))
    regions = describe_regions(OBJECT, truth, 1, 1)
    assert SVM_RULE.per_class(regions).tolist() == [[1]]


def test_crowds_are_never_positives_and_hide_negatives_of_their_class() -> None:
    truth = GroundTruth(
        np.array([[0, 0, 100, 100], [200, 0, 210, 10]], np.float32),
        np.array([0, 1]),
        crowd=np.array([True, False]),
    )
    boxes = np.concatenate([truth.boxes, [[10, 10, 20, 20], [200, 0, 210, 9], [300, 300, 310, 310]]])
    regions = describe_regions(boxes.astype(np.float32), truth, 2, 2)
    assert SVM_RULE.per_class(regions).tolist() == [[0, -1], [-1, 1], [0, -1], [-1, 0], [-1, -1]]
    assert SVM_RULE.multiclass(regions).tolist() == [-1, 1, -1, -1, 2]
    assert FINETUNE_RULE.multiclass(regions).tolist() == [-1, 1, -1, 1, 2]


def test_two_objects_in_one_box_are_both_positives() -> None:
    truth = GroundTruth(np.concatenate([OBJECT, OBJECT]), np.array([0, 1]))
    labels = SVM_RULE.per_class(describe_regions(truth.boxes, truth, 2, 2))
    assert labels.tolist() == [[1, 0], [0, 1]]


def test_difficult_objects_can_be_skipped() -> None:
    truth = GroundTruth(
        np.array([[0, 0, 100, 100], [200, 0, 300, 100]], np.float32),
        np.array([0, 1]),
        difficult=np.array([True, False]),
    )
    near = np.array([[0, 0, 100, 80], [200, 0, 300, 80], [0, 0, 100, 25], [400, 0, 500, 9]], np.float32)
    regions = describe_regions(np.concatenate([truth.boxes, near]), truth, 2, 2)
    assert regions.difficult.tolist() == [True, False, True, False, True, False]
    for rule, first in ((SVM_RULE, 0), (FINETUNE_RULE, 0)):
        skipping = replace(rule, skip_difficult=True)
        with_all, without = rule.multiclass(regions), skipping.multiclass(regions)
        assert with_all[0] == first
        np.testing.assert_array_equal(
            without, np.where(regions.difficult & (with_all == first), -1, with_all)
        )
        with_all, without = rule.per_class(regions), skipping.per_class(regions)
        assert with_all[0].tolist() == [1, -1]
        assert without[0].tolist() == [0, -1]
        assert (without[with_all < 1] == with_all[with_all < 1]).all()
        assert without[1].tolist() == [-1, 1]


def test_empty_shapes() -> None:
    regions = describe_regions(np.zeros((0, 4), np.float32), GroundTruth.empty(), 3)
    assert len(regions) == 0
    assert regions.overlap.shape == (0, 3)
    assert SVM_RULE.per_class(regions).shape == (0, 3)
    assert SVM_RULE.multiclass(regions).shape == (0,)
    background = describe_regions(CUTS, GroundTruth.empty(), 3)
    assert (SVM_RULE.per_class(background) == -1).all()


def test_messages() -> None:
    truth = GroundTruth(OBJECT, np.array([4]))
    with pytest.raises(ShapeError) as error:
        describe_regions(CUTS, truth, 3)
    assert str(error.value) == (
        "describe_regions: labels must lie in 0 .. 2, got 4 .. 4. Give the number of classes of the data set."
    )
    with pytest.raises(ShapeError, match=r"n_gt must be 0, or 1 with truth\.boxes as the first rows"):
        describe_regions(CUTS[1:], truth, 5, 1)
    with pytest.raises(ConfigError) as config_error:
        LabelRule(0.3, 0.5)
    assert str(config_error.value) == (
        "LabelRule: must have 0 <= negative_low <= negative_iou <= positive_iou <= 1, got 0.0, 0.5, 0.3."
    )


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4), st.integers(0, 12))
def test_description_agrees_with_brute_force(seed: int, n_objects: int, n_boxes: int) -> None:
    rng = np.random.default_rng(seed)

    def draw(n: int) -> np.ndarray:
        corner, side = rng.integers(0, 20, (n, 2)), rng.integers(1, 15, (n, 2))
        return np.concatenate([corner, corner + side], axis=1).astype(np.float32)

    truth = GroundTruth(draw(n_objects), rng.integers(0, 3, n_objects))
    boxes = draw(n_boxes)
    regions = describe_regions(boxes, truth, 3)
    for r in range(n_boxes):
        pairs = iou(boxes[r : r + 1], truth.boxes)[0]
        for k in range(3):
            expected = max([p for p, label in zip(pairs, truth.labels, strict=True) if label == k], default=0)
            assert regions.overlap[r, k] == np.float32(expected)
        assert regions.best_iou[r] == np.float32(max(pairs, default=0))
        if regions.label[r] >= 0:
            assert iou(boxes[r : r + 1], regions.target[r : r + 1])[0, 0] == max(pairs)
    labels = SVM_RULE.per_class(regions)
    assert not (labels == 1).any()
    np.testing.assert_array_equal(labels == -1, regions.overlap < 0.3)


def test_a_whole_image_is_an_object_of_each_of_its_classes() -> None:
    truth = GroundTruth(np.concatenate([OBJECT, OBJECT]), np.array([2, 0]))
    regions = describe_regions(OBJECT, truth, 3, whole=True)
    assert regions.is_gt.tolist() == [True]
    for rule in (SVM_RULE, FINETUNE_RULE):
        assert rule.per_class(regions).tolist() == [[1, -1, 1]]
        assert rule.multiclass(regions).tolist() == [2]  # the first
    none = describe_regions(OBJECT, GroundTruth.empty(), 3, whole=True)
    assert SVM_RULE.per_class(none).tolist() == [[-1, -1, -1]]
    assert not describe_regions(OBJECT, truth, 3).is_gt.any()
