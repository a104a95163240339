from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest

from rcnn_svm.boxes import area
from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.evaluation.coco import evaluate_coco
from rcnn_svm.structures import Detections, GroundTruth

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def pycocotools_summary(detections, truths, n_classes):
    coco_module = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    annotations = []
    for i, truth in enumerate(truths):
        for box, label, crowd, size in zip(
            truth.boxes.astype(float), truth.labels, truth.crowd, truth.area, strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": int(label) + 1,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": float(size),
                    "iscrowd": int(crowd),
                }
            )
    results = [
        {
            "image_id": i + 1,
            "category_id": int(label) + 1,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": float(score),
        }
        for i, found in enumerate(detections)
        for box, score, label in zip(found.boxes.astype(float), found.scores, found.labels, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        reference = coco_module.COCO()
        reference.dataset = {
            "info": {},
            "images": [{"id": i + 1} for i in range(len(truths))],
            "annotations": annotations,
            "categories": [{"id": k + 1} for k in range(n_classes)],
        }
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = np.array(evaluation.stats)
    stats[stats == -1] = np.nan
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # (T, recall levels, K)
    precision = np.where(precision == -1, np.nan, precision).mean(axis=1)
    return stats, precision


def random_split(seed, n_classes=4, n_images=25):
    rng = np.random.default_rng(seed)
    detections, truths = [], []
    for i in range(n_images):
        n = int(rng.integers(0, 7))
        low = rng.integers(0, 200, (n, 2))
        boxes = np.concatenate([low, low + rng.integers(6, 140, (n, 2))], axis=1)
        crowd, areas = rng.random(n) < 0.15, area(boxes) * rng.choice([0, 0.2, 0.9, 1], n)
        truths.append(GroundTruth(boxes, rng.integers(0, n_classes, n), crowd=crowd, area=areas))
        m = int(rng.integers(0, 60))
        low = rng.integers(0, 200, (m, 2))
        guesses = np.concatenate([low, low + rng.integers(6, 140, (m, 2))], axis=1)
        labels = rng.integers(0, n_classes, m)
        if n:
            pick = rng.integers(0, n, m)
            near = rng.random(m) < 0.8
            guesses = np.where(near[:, None], boxes[pick] + rng.integers(-9, 10, (m, 4)), guesses)
            labels = np.where(near & (rng.random(m) < 0.8), truths[-1].labels[pick], labels)
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        detections.append(Detections(str(i), guesses, np.round(rng.normal(size=m), 1), labels))
    return detections, truths


@pytest.mark.parametrize("seed", range(12))
def test_equals_pycocotools_on_random_splits(seed):
    detections, truths = random_split(seed)
    result = evaluate_coco(detections, truths, "wxyz")
    stats, per_class = pycocotools_summary(detections, truths, 4)
    assert tuple(result.summary()) == NAMES
    np.testing.assert_allclose(list(result.summary().values()), stats, atol=1e-6)
    np.testing.assert_allclose(result.ap(), per_class.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(result.ap_at(0.75), per_class[5], atol=1e-6)


def test_equals_pycocotools_with_more_than_a_hundred_detections():
    rng = np.random.default_rng(3)
    areas = np.array([900.0, 5000.0])
    truth = GroundTruth([[10, 10, 80, 80], [100, 100, 130, 130]], [0, 0], area=areas)
    truths = [truth, GroundTruth.empty()]
    detections = []
    for i in range(2):
        boxes = np.array([[10, 10, 80, 80]]) + rng.integers(-9, 10, (150, 4))
        boxes[rng.random(150) < 0.3] = [100, 101, 130, 131]
        detections.append(Detections(str(i), boxes, rng.normal(size=150), np.zeros(150)))
    result = evaluate_coco(detections, truths, "x")
    stats, _ = pycocotools_summary(detections, truths, 1)
    np.testing.assert_allclose(list(result.summary().values()), stats, atol=1e-6)


@pytest.mark.data
def test_equals_pycocotools_on_annotated_photographs(data_root):
    annotations = json.loads((data_root / "tiny-coco/annotations/instances_val2017.json").read_text())
    labels = {each["id"]: k for k, each in enumerate(annotations["categories"])}
    rng = np.random.default_rng(11)
    detections, truths = [], []
    for image in annotations["images"]:
        mine = [each for each in annotations["annotations"] if each["image_id"] == image["id"]]
        boxes = np.array([each["bbox"] for each in mine], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        truth = GroundTruth(
            boxes,
            [labels[each["category_id"]] for each in mine],
            crowd=np.array([each["iscrowd"] for each in mine], bool),
            area=np.array([each["area"] for each in mine]),
        )
        pick = np.repeat(np.arange(len(mine)), 4)
        guesses = truth.boxes[pick] + rng.normal(0, 6, (len(pick), 4))
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        found = Detections(str(image["id"]), guesses, rng.normal(size=len(pick)), truth.labels[pick])
        detections.append(found)
        truths.append(truth)
    assert sum(truth.crowd.sum() for truth in truths) > 0
    result = evaluate_coco(detections, truths, [str(k) for k in range(len(labels))])
    stats, _ = pycocotools_summary(detections, truths, len(labels))
    np.testing.assert_allclose(list(result.summary().values()), stats, atol=1e-6)


def test_difficult_objects_are_not_wanted():
    truth = GroundTruth([[0, 0, 50, 50], [60, 60, 99, 99]], [0, 0], difficult=np.array([True, False]))
    found = Detections("a", [[0, 0, 50, 50], [60, 60, 99, 99]], [0.9, 0.8], [0, 0])
    assert evaluate_coco([found], [truth], "x").summary()["AP"] == pytest.approx(1.0)


def test_size_ranges_share_their_edges():
    truth = GroundTruth([[0, 0, 32, 32]], [0])
    summary = evaluate_coco([Detections("a", [[0, 0, 32, 32]], [1], [0])], [truth], "x").summary()
    assert summary["APs"] == summary["APm"] == pytest.approx(1.0)
    assert np.isnan(summary["APl"])


def test_size_is_the_objects_own_area_not_its_boxs():
    """The annotated area decides for objects, the box's for detections, as in cocodataset/cocoapi#36."""
    truth = GroundTruth([[2, 2, 42, 42], [44, 20, 94, 70]], [0, 0], area=[900, 2500])
    summary = evaluate_coco([Detections("a", [[2, 2, 42, 42]], [1], [0])], [truth], "x").summary()
    assert summary["APs"] == summary["ARs"] == pytest.approx(1.0)
    assert summary["APm"] == summary["ARm"] == 0.0
    assert np.isnan([summary["APl"], summary["ARl"]]).all()


def test_loose_boxes_show_in_ap75():
    truth, found = GroundTruth([[0, 0, 50, 60]], [0]), Detections("a", [[0, 0, 50, 40]], [1], [0])
    result = evaluate_coco([found], [truth], "x")
    assert result.ap_at(0.5).tolist() == result.ap_at(0.65).tolist() == [pytest.approx(1.0)]
    assert result.ap_at(0.7).tolist() == [0.0]
    assert (result.summary()["AP50"], result.summary()["AP75"]) == (pytest.approx(1.0), 0.0)
    assert result.summary()["AP"] == pytest.approx(0.4)
    with pytest.raises(ConfigError, match=r"^ap_at: min_iou must be one of 0\.5, .* got 0\.72\.$"):
        result.ap_at(0.72)


def test_nothing_found_is_zero_and_nothing_to_find_is_nan():
    result = evaluate_coco([Detections.empty("a")], [GroundTruth([[0, 0, 9, 9]], [0])], ["x", "y"])
    assert result.summary()["AP"] == result.summary()["AR100"] == 0.0
    assert np.isnan(result.ap()[1])
    assert result.to_json()["ap"] == {"x": 0.0, "y": None}
    assert result.to_json()["summary"]["APl"] is None
    assert np.isnan(evaluate_coco([], [], "x").summary()["AP"])


def test_messages():
    with pytest.raises(ShapeError, match=r"one record per image, got 1 detections and 0 truths\.$"):
        evaluate_coco([Detections.empty("a")], [], "x")
    with pytest.raises(ShapeError, match=r"labels of image 'a' must lie in 0 \.\. 0, got 2 \.\. 2\.$"):
        evaluate_coco([Detections("a", [[0, 0, 1, 1]], [1], [2])], [GroundTruth.empty()], "x")
