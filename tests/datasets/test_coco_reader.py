from __future__ import annotations

import json

import numpy as np
import pytest

from rcnn_svm.datasets import coco_category_ids, coco_image_ids, detect_format, list_splits, load_dataset
from rcnn_svm.errors import DataError

ADVICE = " Correct the label, or leave such objects out with --drop-bad-boxes."
CATEGORIES = {90: "zebra", 3: "car", 17: "cat"}


def one(category=3, bbox=(1, 2, 10, 20), **more):
    return {"category_id": category, "bbox": list(bbox), **more}


def test_gaps_crowd_and_images_without_annotations(make_coco):
    root = make_coco(
        {"train2017": {"x.jpg": [one(), one(90, (0.5, 0, 3.25, 4), iscrowd=1)], "y.jpg": []}}, CATEGORIES
    )
    (root / "annotations" / "captions_train2017.json").write_text("{}")
    assert detect_format(root) == "coco"
    assert list_splits(root) == ("train2017",)
    data = load_dataset(root, "train")
    assert data.classes == ("car", "cat", "zebra")
    assert [sample.image_id for sample in data] == ["x", "y"]
    truth = data.samples[0].truth
    np.testing.assert_array_equal(truth.boxes, [[1, 2, 11, 22], [0.5, 0, 3.75, 4]])
    assert truth.labels.tolist() == [0, 2]
    assert truth.crowd.tolist() == [False, True]
    assert len(data.samples[1].truth) == 0
    assert coco_category_ids(root) == {"zebra": 90, "car": 3, "cat": 17}
    assert coco_image_ids(root, "train2017") == {"x": 101, "y": 102}


def test_the_area_is_the_annotations_where_it_states_one(make_coco):
    areas = ({"area": 63.5}, {}, {"area": None}, {"area": 0})
    boxes = [one(bbox=(k, 2, 10, 20), **area) for k, area in enumerate(areas)]
    root = make_coco({"train": {"x.jpg": boxes}}, CATEGORIES)
    assert load_dataset(root, "train").samples[0].truth.area.tolist() == [63.5, 200, 200, 0]


def test_exports_with_a_json_in_each_split(make_coco):
    root = make_coco({"valid": {"x.jpg": [one()]}}, CATEGORIES)
    (root / "annotations" / "instances_valid.json").rename(root / "valid" / "_annotations.coco.json")
    assert list_splits(root) == ("valid",)
    assert len(load_dataset(root, "val")) == 1


@pytest.mark.parametrize(
    ("annotation", "rule"),
    [
        (one(bbox=(5, 5, 0, 9)), "(car) of image 'x' must have a positive area, got bbox [5, 5, 0, 9]."),
        (one(bbox=(5, 5, -4, 9)), "(car) of image 'x' must have a positive area, got bbox [5, 5, -4, 9]."),
        (
            one(bbox=(55, 5, 9, 9)),
            "(car) of image 'x' must lie inside the 60 x 40 image, got bbox [55, 5, 9, 9].",
        ),
        (one(4), "(category 4) of image 'x' must be of a known class (car, cat, zebra), got 'category 4'."),
    ],
)
def test_a_bad_box_is_an_error_unless_dropped(make_coco, capsys, annotation, rule):
    root = make_coco({"train": {"x.jpg": [one(), annotation]}}, CATEGORIES)
    message = f"{root}/annotations/instances_train.json: annotation 2 {rule}"
    with pytest.raises(DataError) as caught:
        load_dataset(root, "train")
    assert str(caught.value) == f"{message}{ADVICE}"
    assert len(load_dataset(root, "train", drop_bad_boxes=True).samples[0].truth) == 1
    assert capsys.readouterr().err == f"Dropped 1 bad box, the first: {message}\n"


def test_broken_json(make_coco):
    root = make_coco({"train": {"x.jpg": [one()]}}, CATEGORIES)
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    cases = [
        (file.read_text()[:40], None),
        ("[]", "must hold the lists images, annotations and categories of COCO."),
        ('{"images": []}', "must hold the list 'categories' of COCO, got ['images']."),
        (
            json.dumps(content | {"images": [{"id": 1}]}),
            "each of 'images' must have a whole number or a text as 'id' and a text as 'file_name', "
            "got {'id': 1}.",
        ),
        (
            json.dumps(content | {"annotations": [{"image_id": 101, "category_id": 3}]}),
            "annotation 1 must have a bbox of four finite numbers or polygons, "
            f"got {{'image_id': 101, 'category_id': 3}}.{ADVICE}",
        ),
        (
            json.dumps(content | {"annotations": [one(image_id=7)]}),
            f"annotation 1 is of image 7, which is not listed.{ADVICE}",
        ),
        *(
            (
                json.dumps(content | {"annotations": [{"area": area, **one(image_id=101)}]}),
                f"annotation 1 must have an area of 0 or more, got {{'area': {area!r}, 'category_id': 3, "
                f"'bbox': [1, 2, 10, 20], 'image_id': 101}}.{ADVICE}",
            )
            for area in (-1, float("nan"), "large")
        ),
    ]
    for text, message in cases:
        file.write_text(text)
        with pytest.raises(DataError) as caught:
            load_dataset(root, "train")
        if message is None:
            assert "must be JSON, got a syntax error at line 1" in str(caught.value)
            assert str(caught.value).endswith("The file may be truncated.")
        else:
            assert str(caught.value) == f"{file}: {message}"


def test_missing_image_and_empty_split(make_coco):
    root = make_coco({"train": {"x.jpg": [one()]}, "val": {}}, CATEGORIES)
    (root / "train" / "x.jpg").unlink()
    with pytest.raises(DataError) as caught:
        load_dataset(root, "train")
    assert str(caught.value) == (
        f"{root}/annotations/instances_train.json: names 'x.jpg', there is no such image file below {root}. "
        "--skip-bad leaves such images out."
    )
    with pytest.raises(DataError) as caught:
        load_dataset(root, "val")
    assert str(caught.value) == f"{root}: split 'val' has no image. Add images to it or name another split."


def test_the_way_back_needs_a_coco_folder(tmp_path, make_coco):
    with pytest.raises(DataError) as caught:
        coco_category_ids(tmp_path)
    assert str(caught.value) == f"{tmp_path}: must be a COCO folder with annotations/instances_SPLIT.json."
    root = make_coco({"train": {"x.jpg": []}}, CATEGORIES)
    with pytest.raises(DataError) as caught:
        coco_image_ids(root, "val")
    assert str(caught.value) == f"{root}: has no split 'val', only train."


def test_label_studios_own_json_says_what_to_export(tmp_path):
    turned = {"x": 10, "y": 10, "width": 20, "height": 10, "rotation": 30, "rectanglelabels": ["a"]}
    result = [{"type": "rectanglelabels", "value": turned}, {"type": "polygonlabels", "value": {}}]
    file = tmp_path / "project-1.json"
    file.write_text(json.dumps([{"data": {"image": "x.jpg"}, "annotations": [{"result": result}]}]))
    for path in (tmp_path, file):
        with pytest.raises(DataError) as caught:
            load_dataset(path, "all")
        assert str(caught.value) == (
            f"{file}: must be labels in a format that is read, is Label Studio's own JSON. Export the "
            "project as COCO: of turned boxes and polygons that has the box around them."
        )
