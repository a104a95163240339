from __future__ import annotations

import numpy as np
import pytest

from rcnn_svm.datasets import detect_format, list_splits, load_dataset
from rcnn_svm.errors import DataError

ADVICE = " Correct the label, or leave such objects out with --drop-bad-boxes."


def test_boxes_polygons_and_images_without_labels(make_yolo):
    rows = "1 0.5 0.5 0.5 0.25\n\n0 0.1 0.2 0.3 0.2 0.3 0.7 0.2 0.9\n"
    root = make_yolo({"train": {"a": rows, "b": "", "c": None}})
    assert detect_format(root) == "yolo"
    assert detect_format(root / "data.yaml") == "yolo"
    data = load_dataset(root, "train")
    assert data.classes == ("cat", "dog")
    assert [sample.image_id for sample in data] == ["a", "b", "c"]
    assert [len(sample.truth) for sample in data] == [2, 0, 0]
    np.testing.assert_allclose(data.samples[0].truth.boxes, [[15, 15, 45, 25], [6, 8, 18, 36]], rtol=1e-6)
    assert data.samples[0].truth.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "yaml",
    [
        "path: .\ntrain: images/train\nnames: {1: dog, 0: cat}\n",
        "path: /no/such/folder\ntrain: ../images/train\nnames: [cat, dog]\nnc: 2\nval:\n",
        "train: [images/train]\nnames: [cat, dog]\n",
        "train: list.txt\nnames: [cat, dog]\n",
    ],
)
def test_the_ways_to_name_a_split(make_yolo, yaml):
    root = make_yolo({"train": {"b": "0 .5 .5 .5 .5", "a": "1 .5 .5 .5 .5"}}, yaml)
    (root / "list.txt").write_text("./images/train/a.png\nimages/train/b.png\n")
    assert list_splits(root) == ("train",)
    data = load_dataset(root, "train")
    assert data.classes == ("cat", "dog")
    assert [sample.image_id for sample in data] == ["a", "b"]
    assert data.counts().tolist() == [1, 1]


def test_equal_names_in_subfolders_keep_their_folder(make_yolo, put):
    root = make_yolo({"train": {"p/a": "0 .5 .5 .5 .5", "q/a": ""}})
    assert [sample.image_id for sample in load_dataset(root, "train")] == ["p/a", "q/a"]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ("0 0.5 0.5 0 0.5", "(cat) of image 'a' must have a positive area, got 0 0.5 0.5 0 0.5."),
        ("0 0.9 0.5 0.5 0.5", "(cat) of image 'a' must lie inside the 60 x 40 image, got 0 0.9 0.5 0.5 0.5."),
        ("2 .5 .5 .5 .5", "(class 2) of image 'a' must be of a known class (cat, dog), got 'class 2'."),
    ],
)
def test_a_bad_box_is_an_error_unless_dropped(make_yolo, capsys, row, rule):
    root = make_yolo({"train": {"a": f"1 .5 .5 .5 .5\n{row}\n"}})
    message = f"{root}/labels/train/a.txt: line 2 {rule}"
    with pytest.raises(DataError) as caught:
        load_dataset(root, "train")
    assert str(caught.value) == f"{message}{ADVICE}"
    assert len(load_dataset(root, "train", drop_bad_boxes=True).samples[0].truth) == 1
    assert capsys.readouterr().err == f"Dropped 1 bad box, the first: {message}\n"


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ("0 .5 .5 .5 x", "must hold numbers, got '0 .5 .5 .5 x'."),
        ("0 nan .5 .5 .5", "must hold numbers, got '0 nan .5 .5 .5'."),
        ("0 .5 .5 .5 1_0", "must hold numbers, got '0 .5 .5 .5 1_0'."),
        (
            "0 .5 .5 .5 .5 .9",
            "must hold a class and 4 numbers of a box or 3 or more points of a polygon, got 6 numbers.",
        ),
        ("0", "must hold a class and 4 numbers of a box or 3 or more points of a polygon, got 1 numbers."),
    ],
)
def test_rows_that_are_no_labels(make_yolo, row, rule):
    root = make_yolo({"train": {"a": f"\n{row}\n"}})
    with pytest.raises(DataError) as caught:
        load_dataset(root, "train")
    assert str(caught.value) == f"{root}/labels/train/a.txt: line 2 {rule}{ADVICE}"


@pytest.mark.parametrize(
    ("yaml", "rule"),
    [
        ("names: [a\n", "must be YAML, got a syntax error at line 2, column 1."),
        ("train: x\n", "must have the class names under 'names', a list or a mapping from 0."),
        ("just text", "must have the class names under 'names', a list or a mapping from 0."),
        ("names: {1: a, 2: b}\n", "'names' must number the classes 0 to 1, got '1', '2'."),
    ],
)
def test_broken_yaml(make_yolo, yaml, rule):
    root = make_yolo({"train": {"a": ""}}, yaml)
    with pytest.raises(DataError) as caught:
        load_dataset(root, "train")
    assert str(caught.value) == f"{root}/data.yaml: {rule}"


def test_missing_folders_images_and_double_classes(make_yolo):
    root = make_yolo({"train": {"a": ""}}, "train: nowhere\nval: list.txt\ntest: labels\nnames: [cat, dog]\n")
    (root / "labels").mkdir(exist_ok=True)
    (root / "list.txt").write_text("images/train/zz.png\n")
    cases = {
        "train": f"{root}/data.yaml: names 'nowhere', there is no such folder or file. Where it is a path "
        "of another machine, name it from the folder of data.yaml on.",
        "val": f"{root}/list.txt: names 'images/train/zz.png', there is no such image file. --skip-bad "
        "leaves such images out.",
        "test": f"{root}: split 'test' has no image. Add images to it or name another split.",
    }
    for split, message in cases.items():
        with pytest.raises(DataError) as caught:
            load_dataset(root, split)
        assert str(caught.value) == message
    (root / "data.yaml").write_text("train: images/train\nnames: [cat, cat]\n")
    with pytest.raises(DataError) as caught:
        load_dataset(root, "train")
    assert str(caught.value) == f"{root}: must name each class once, got 'cat' twice."
