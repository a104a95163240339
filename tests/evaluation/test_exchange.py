from __future__ import annotations

import json

import numpy as np
import pytest

from rcnn_svm.errors import ConfigError, DataError, ShapeError
from rcnn_svm.evaluation.exchange import (
    read_coco_results,
    read_comp4,
    read_detections,
    write_coco_results,
    write_comp4,
    write_detections,
)
from rcnn_svm.structures import Detections

CLASSES = ("cat", "dog")


@pytest.fixture
def detections(rng):
    result = []
    for i, n in enumerate([7, 0, 12]):
        low = rng.uniform(0, 300, (n, 2))
        boxes = np.concatenate([low, low + rng.uniform(1, 200, (n, 2))], axis=1)
        result.append(Detections(f"00{i}", boxes, rng.normal(size=n), rng.integers(0, 2, n)))
    return result


def assert_same(first, second, rtol=0.0):
    assert [each.image_id for each in first] == [each.image_id for each in second]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.scores, b.scores)
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_allclose(a.boxes, b.boxes, rtol=rtol)


def one_image(**changes):
    entry = {"image_id": "i", "boxes": [[1, 2, 3, 4]], "scores": [1], "labels": [0]} | changes
    return json.dumps({"schema": 1, "classes": ["a"], "images": [entry]})


def test_comp4_reads_back_the_same(tmp_path, detections):
    paths = write_comp4(tmp_path, detections, CLASSES)
    assert [path.name for path in paths] == ["comp4_det_test_cat.txt", "comp4_det_test_dog.txt"]
    assert_same(read_comp4(tmp_path, CLASSES, ["000", "001", "002"]), detections)


def test_comp4_has_the_pixels_of_the_devkit(tmp_path):
    one = Detections("2007 a", [[0, 9, 20, 30]], [0.1], [1])
    write_comp4(tmp_path, [one], CLASSES, split="val")
    assert (tmp_path / "comp4_det_val_cat.txt").read_text() == ""
    assert (tmp_path / "comp4_det_val_dog.txt").read_text() == "2007 a 0.1 1 10 20 30\n"
    assert_same(read_comp4(tmp_path, CLASSES, ["2007 a"], split="val"), [one])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("000 0.5 1 1 10", "line 1: must be `image_id score xmin ymin xmax ymax`, got '000 0.5 1 1 10'"),
        ("000 high 1 1 10 10", "line 1: must hold finite numbers, got 'high'"),
        ("\nxyz 0.5 1 1 10 10", "line 2: image xyz is not in the split"),
        ("000 inf 1 1 10 10", "line 1: must hold finite numbers, got 'inf'"),
    ],
)
def test_comp4_bad_lines(tmp_path, line, message):
    (tmp_path / "comp4_det_test_cat.txt").write_text(line)
    with pytest.raises(DataError) as caught:
        read_comp4(tmp_path, ["cat"], ["000"])
    assert message in str(caught.value)


def test_comp4_missing_class(tmp_path):
    with pytest.raises(
        DataError, match=r"comp4_det_test_cat.txt: no such file; there must be one for each class"
    ):
        read_comp4(tmp_path, ["cat"], ["000"])


def test_coco_results_read_back_the_same(tmp_path, detections):
    path = tmp_path / "results.json"
    write_coco_results(path, detections, [17, 18])
    first = json.loads(path.read_text())[0]
    assert first["image_id"] == 0
    assert first["category_id"] in (17, 18)
    x1, y1, x2, y2 = detections[0].boxes[0].astype(float)
    assert first["bbox"] == [x1, y1, x2 - x1, y2 - y1]
    assert_same(read_coco_results(path, [17, 18], ["000", "001", "002"]), detections, rtol=1e-7)


def test_coco_results_with_named_images(tmp_path):
    one = Detections("left", [[1, 2, 3, 4]], [0.5], [0])
    path = tmp_path / "results.json"
    with pytest.raises(ConfigError, match=r"^COCO results: image 'left' must have a number\."):
        write_coco_results(path, [one], [1])
    assert not path.exists()
    write_coco_results(path, [one], [1], {"left": 44})
    assert_same(read_coco_results(path, [1], ["left"], {"left": 44}), [one])
    write_coco_results(path, [one], [1], {"left": "img_44"})
    assert json.loads(path.read_text())[0]["image_id"] == "img_44"
    assert_same(read_coco_results(path, [1], ["left"], {"left": "img_44"}), [one])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "must be a list of results, got an object."),
        ([3], "result 0: must be an object, got 3."),
        ([{"image_id": 0}], "result 0: must have the key 'category_id', got image_id."),
        (
            [{"image_id": 0, "category_id": 1, "bbox": [1, 2], "score": 1}],
            "bbox must be [x, y, width, height]",
        ),
        ([{"image_id": 0, "category_id": 9, "bbox": [0, 0, 1, 1], "score": 1}], "category_id 9 is not one"),
        (
            [{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}],
            "image 7 is not in the split",
        ),
        (
            [{"image_id": 0, "category_id": 1, "bbox": [0, 0, 1, 1], "score": None}],
            "finite numbers, got None",
        ),
    ],
)
def test_coco_results_bad_files(tmp_path, value, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError) as caught:
        read_coco_results(path, [1], ["000"])
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_own_format_reads_back_the_same(tmp_path, detections):
    path = tmp_path / "detections.json"
    write_detections(path, detections, CLASSES)
    classes, read = read_detections(path)
    assert classes == CLASSES
    assert_same(read, detections)
    assert set(json.loads(path.read_text())) == {"schema", "classes", "images"}
    write_detections(path, [], CLASSES)
    assert read_detections(path) == (CLASSES, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", 'must be a detections file with "schema": 1.'),
        ('{"schema": 1, "classes": ["a"]}', 'must hold the lists "classes" and "images".'),
        (
            '{"schema": 1, "classes": ["a"], "images": [{}]}',
            "image 0: must be the detections of one image: the key",
        ),
        (one_image(boxes=[[1, 2]]), "boxes must be lists of four numbers"),
        (one_image(labels=[4]), "labels of image 'i' must lie in 0 .. 0, got 4 .. 4."),
        (one_image(labels=[0.5]), "labels must be integers, got [0.5]."),
        (one_image(scores=[1, 2]), "scores must have shape (1,) like the boxes, got (2,)."),
        ('{"schema": 1, "cla', "must be JSON, got a syntax error at line 1"),
    ],
)
def test_own_format_bad_files(tmp_path, text, message):
    path = tmp_path / "detections.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_detections(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder, found: write_comp4(folder, found, CLASSES),
        lambda folder, found: write_coco_results(folder / "r.json", found, [1, 2]),
        lambda folder, found: write_detections(folder / "d.json", found, CLASSES),
    ],
)
def test_what_cannot_be_written_leaves_no_file(tmp_path, write):
    with pytest.raises(ShapeError, match="must be finite, got an infinite one"):
        write(tmp_path, [Detections("1", [[0, 0, 1, 1]], [np.inf], [0])])
    with pytest.raises(ShapeError, match=r"must lie in 0 \.\. 1, got 2 \.\. 2"):
        write(tmp_path, [Detections("1", [[0, 0, 1, 1]], [1], [2])])
    assert list(tmp_path.iterdir()) == []
