"""Detections in the files of other tools: what outsiders read in them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rcnn_svm.datasets import image_size, read_image
from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.coco import evaluate_coco
from rcnn_svm.evaluation.exchange import read_coco_results
from rcnn_svm.formats import (
    FORMATS,
    CocoWriter,
    CsvWriter,
    DetectionWriter,
    LabelStudioWriter,
    VocWriter,
    YoloWriter,
    confidences,
    write_coco_files,
)
from rcnn_svm.structures import Detections, GroundTruth, Sample

CLASSES = ("disc", 'a "b" & <c>', "=ring")
Found = list[tuple[Sample, Detections]]


@pytest.fixture
def found(tmp_path: Path, rng: np.random.Generator) -> Found:
    """Three images in two folders, one of them without a detection."""
    made = []
    for name, n in (("photos/a b.png", 5), ("photos/more/ü.png", 0), ("photos/c.d.png", 9)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).save(path)
        low = rng.uniform(0, (60, 40), (n, 2))
        boxes = np.hstack([low, low + rng.uniform(2, 20, (n, 2))])
        sample = Sample(path.stem, image_size(path), GroundTruth.empty(), path=path, reader=read_image)
        made.append((sample, Detections(path.stem, boxes, rng.normal(size=n), rng.integers(0, 3, n))))
    return made


def write(writer: DetectionWriter, found: Found) -> list[Path]:
    for sample, detections in found:
        writer.add(sample, detections)
    writer.finish(found)
    files = writer.files([sample for sample, _ in found])
    assert all(path.exists() for path in files)
    return files


def ours(detections: Detections) -> list[tuple]:
    rows = zip(detections.labels.tolist(), np.round(detections.boxes, 2).tolist(), strict=True)
    return sorted((label, *box) for label, box in rows)


def theirs(found: object) -> list[tuple]:
    rows = zip(found.class_id.tolist(), np.round(found.xyxy, 2).tolist(), strict=True)
    return sorted((label, *box) for label, box in rows)


def assert_close(first: list[tuple], second: list[tuple], within: float) -> None:
    assert [row[0] for row in first] == [row[0] for row in second]
    if first:
        np.testing.assert_allclose(np.array(first), np.array(second), atol=within)


def test_coco_as_pycocotools_reads_and_measures_it(tmp_path: Path, found: Found) -> None:
    coco_module = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    labelled = []
    for sample, detections in found:
        truth = GroundTruth(detections.boxes[::2], detections.labels[::2])
        labelled.append((Sample(sample.image_id, sample.size, truth, path=sample.path), detections))
    results, data = tmp_path / "results.json", tmp_path / "data.json"
    write_coco_files(results, data, labelled, CLASSES)
    truth = coco_module.COCO(str(data))
    judged = cocoeval.COCOeval(truth, truth.loadRes(str(results)), "bbox")
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    own = evaluate_coco([d for _, d in labelled], [s.truth for s, _ in labelled], CLASSES).summary()
    assert judged.stats[0] == pytest.approx(own["AP"], abs=1e-9)
    assert [truth.cats[i]["name"] for i in (1, 2, 3)] == list(CLASSES)


def test_coco_as_supervision_reads_it(tmp_path: Path, found: Found) -> None:
    supervision = pytest.importorskip("supervision")
    results, data = write(CocoWriter(tmp_path, CLASSES), found)
    content = json.loads(data.read_text())
    assert content["annotations"] == []
    numbered = [
        one | {"id": i, "area": 1, "iscrowd": 0} for i, one in enumerate(json.loads(results.read_text()), 1)
    ]
    joined = tmp_path / "joined.json"
    joined.write_text(json.dumps(content | {"annotations": numbered}))
    read = supervision.DetectionDataset.from_coco(str(tmp_path / "photos"), str(joined))
    by_name = {Path(path).stem: one for path, _, one in read}
    for sample, detections in found:
        assert_close(theirs(by_name[sample.image_id]), ours(detections), 0.02)
    ids = [sample.image_id for sample, _ in found]
    again = read_coco_results(results, [1, 2, 3], ids, {name: i for i, name in enumerate(ids, 1)})
    for (_, detections), one in zip(found, again, strict=True):
        np.testing.assert_array_equal(detections.scores, one.scores)


def test_yolo_as_supervision_reads_it(tmp_path: Path, found: Found) -> None:
    supervision = pytest.importorskip("supervision")
    flat = [found[0], found[2]]  # it looks into one folder
    *labels, classes = write(YoloWriter(tmp_path, CLASSES), flat)
    assert classes.read_text().splitlines() == list(CLASSES)
    (tmp_path / "data.yaml").write_text(json.dumps({"names": list(CLASSES)}))
    (tmp_path / "photos" / "more" / "ü.png").unlink()
    read = supervision.DetectionDataset.from_yolo(
        str(tmp_path / "photos"), str(labels[0].parent), str(tmp_path / "data.yaml")
    )
    by_name = {Path(path).stem: one for path, _, one in read}
    for (sample, detections), file in zip(flat, labels, strict=True):
        assert_close(theirs(by_name[sample.image_id]), ours(detections), 0.02)
        last = [float(line.split()[5]) for line in file.read_text().splitlines()]
        np.testing.assert_array_equal(last, confidences(detections))


def test_voc_as_supervision_reads_it(tmp_path: Path, found: Found) -> None:
    supervision = pytest.importorskip("supervision")
    flat = [found[0], found[2]]
    files = write(VocWriter(tmp_path, CLASSES), flat)
    (tmp_path / "photos" / "more" / "ü.png").unlink()
    read = supervision.DetectionDataset.from_pascal_voc(str(tmp_path / "photos"), str(tmp_path / "voc"))
    by_name = {Path(path).stem: one for path, _, one in read}
    for (sample, detections), file in zip(flat, files, strict=True):
        one = by_name[sample.image_id]
        names = [read.classes[k] for k in one.class_id]
        assert sorted(names) == sorted(CLASSES[k] for k in detections.labels)
        objects = ElementTree.parse(file).getroot().findall("object")
        sure = [float(each.findtext("confidence", "")) for each in objects]
        np.testing.assert_allclose(sure, confidences(detections), atol=1e-6)
        boxes = [
            [float(each.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")]
            for each in objects
        ]
        if boxes:
            np.testing.assert_allclose(np.array(boxes) - [1, 1, 0, 0], detections.boxes, atol=1.5)


def test_csv_as_the_csv_module_reads_it(tmp_path: Path, found: Found) -> None:
    (file,) = write(CsvWriter(tmp_path, CLASSES), found)
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 14
    assert {row["image"] for row in rows} == {str(s.path) for s, d in found if len(d)}
    assert [np.float32(row["score"]) for row in rows] == [score for _, d in found for score in d.scores]
    # A spreadsheet would run a name that begins with an equals sign.
    names = [CLASSES[k] for _, d in found for k in d.labels]
    assert [row["class"].removeprefix("'") for row in rows] == names
    write(CsvWriter(tmp_path, CLASSES), [found[1]])
    assert file.read_text() == "image,class,score,confidence,x1,y1,x2,y2\n"


def test_label_studio_gets_percent_and_scores_between_0_and_1(tmp_path: Path, found: Found) -> None:
    tasks, config = write(LabelStudioWriter(tmp_path, CLASSES, "linear-svm 123", tmp_path), found)
    labels = ElementTree.parse(config).getroot().findall("RectangleLabels/Label")
    assert [label.get("value") for label in labels] == list(CLASSES)
    content = json.loads(tasks.read_text())
    assert content[0]["data"]["image"] == "/data/local-files/?d=photos/a%20b.png"
    for task, (sample, detections) in zip(content, found, strict=True):
        (made,) = task["predictions"]
        assert made["model_version"] == "linear-svm 123"
        assert 0 <= made["score"] <= 1
        assert len({one["id"] for one in made["result"]}) == len(detections)
        for one, box, label in zip(made["result"], detections.boxes, detections.labels, strict=True):
            value, (height, width) = one["value"], sample.size
            assert (one["from_name"], one["to_name"], one["type"]) == ("label", "image", "rectanglelabels")
            assert value["rectanglelabels"] == [CLASSES[label]]
            assert 0 <= one["score"] <= 1
            corner = np.array([value["x"], value["y"]]) * (width, height) / 100
            far = corner + np.array([value["width"], value["height"]]) * (width, height) / 100
            np.testing.assert_allclose([*corner, *far], box, atol=1e-4)


def test_label_studio_wants_images_below_what_it_serves(tmp_path: Path, found: Found) -> None:
    writer = LabelStudioWriter(tmp_path, CLASSES, "m", tmp_path / "photos" / "more")
    with pytest.raises(ConfigError, match=r"a b\.png: must lie below .*more, .* with --label-studio-root\.$"):
        writer.files([sample for sample, _ in found])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=6))
def test_confidences_keep_the_order_and_lie_between_0_and_1(scores: list[float]) -> None:
    boxes = np.tile(np.array([[0, 0, 1, 1]], np.float32), (len(scores), 1))
    sure = confidences(Detections("i", boxes, np.array(scores, np.float32), np.zeros(len(scores), np.int64)))
    assert ((sure >= 0) & (sure <= 1)).all()
    assert (np.diff(sure) <= 0).all()


def test_a_probability_is_the_confidence_where_there_is_one() -> None:
    boxes, likely = np.array([[0, 0, 1, 1]] * 2, np.float32), np.array([0.25, 0.75], np.float32)
    found = Detections("i", boxes, np.array([5.0, 3.0]), np.zeros(2, np.int64), likely)
    assert confidences(found).tolist() == [0.25, 0.75]


@pytest.mark.parametrize("name", FORMATS)
def test_an_image_of_one_pixel_and_nothing_at_all(tmp_path: Path, name: str) -> None:
    pixels = np.zeros((1, 1, 3), np.uint8)
    dot = Sample("dot", (1, 1), GroundTruth.empty(), render=lambda: pixels)
    seen = Detections("dot", np.array([[0, 0, 1, 1]]), np.array([2.0]), np.array([1]))
    write(FORMATS[name](tmp_path, CLASSES), [(dot, seen)])
    write(FORMATS[name](tmp_path / "none", CLASSES), [])
