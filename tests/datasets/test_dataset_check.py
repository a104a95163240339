from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from rcnn_svm.datasets import check_dataset, digits_splits, write_dataset
from rcnn_svm.errors import DataError


@pytest.fixture
def broken(make_voc, xml, put):
    """Return a data set with one defect of every kind."""
    good = xml([("dog", 1, 1, 9, 9), ("cat", 2, 2, 30, 30)])
    root = make_voc(
        {
            "good": good,
            "bad": xml([("dog", 5, 5, 5, 5), ("dog", 1, 1, 90, 9), ("cow", 1, 1, 9, 9)]),
            "xml": "<annotation>",
            "cut": good,
            "size": xml([("dog", 1, 1, 9, 9)], size=(50, 70)),
            "copy": good,
            "leak": xml([("dog", 1, 1, 9, 9)]),
            "gone": good,
        },
        {"train": ["good", "bad", "xml", "cut", "size", "copy", "gone", "good"], "test": ["leak"], "val": []},
    )
    (root / "classes.txt").write_text("cat\ndog\n")
    images = root / "JPEGImages"
    for name in ("good", "copy", "leak"):
        put(images / f"{name}.jpg")
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:1500])
    (images / "gone.jpg").unlink()
    return root


def test_every_defect_is_collected(broken):
    report = check_dataset(broken)
    where = f"{broken}/Annotations"
    images = f"{broken}/JPEGImages"
    messages = [(one.kind, one.message) for one in report.defects]
    truncated = next(message for kind, message in messages if kind == "image" and "cut.jpg" in message)
    assert truncated.startswith(f"{images}/cut.jpg: is a damaged image (image file is truncated")
    same = f"{images}: the same image is good.jpg (train), copy.jpg (train), leak.jpg (test)."
    assert [entry for entry in messages if entry[1] != truncated] == [
        (
            "labels",
            f"{where}/xml.xml: must be XML, got a syntax error at line 1, column 12. It may be truncated.",
        ),
        ("image", f"{images}/gone.jpg: no such image file, though {where}/gone.xml labels it."),
        (
            "size",
            f"{where}/size.xml: says 70 x 50 pixels, {images}/size.jpg has 60 x 40. One of the two is wrong.",
        ),
        (
            "no-area",
            f"{where}/bad.xml: object 1 (dog) of image 'bad' must have a positive area, "
            "got xmin 5, ymin 5, xmax 5, ymax 5.",
        ),
        (
            "outside",
            f"{where}/bad.xml: object 2 (dog) of image 'bad' must lie inside the 60 x 40 image, "
            "got xmin 1, ymin 1, xmax 90, ymax 9.",
        ),
        (
            "unknown-class",
            f"{where}/bad.xml: object 3 (cow) of image 'bad' must be of a known class (cat, dog), got 'cow'.",
        ),
        ("twice", f"{where}/good.xml: image 'good' comes twice in split 'train'. Remove one."),
        ("leakage", same),
        ("missing-class", f"{broken}: split 'test' lacks objects of: cat."),
        ("empty-split", f"{broken}: split 'val' has no image that can be read."),
    ]
    content = json.loads(json.dumps(report.to_json()))
    assert [one["message"] for one in content["defects"]] == [message for _, message in messages]
    assert content["splits"]["train"]["images"] == 4
    assert content["splits"]["train"]["images_without_objects"] == 1
    assert content["splits"]["train"]["classes"]["dog"] == {"objects": 3, "images": 3}
    assert content["splits"]["val"]["box_widths"] == []
    text = report.to_text()
    assert "\n11 defects\n" in text
    assert all(message in text for _, message in messages)


def test_headers_alone_miss_truncation_only(broken):
    kinds = [one.kind for one in check_dataset(broken, decode=False).defects]
    assert kinds.count("image") == 1
    assert kinds.count("size") == 1


def test_a_sound_data_set(tmp_path):
    splits = digits_splits(8, 8, 8)
    root = write_dataset([splits.train, splits.val, splits.test], tmp_path / "digits", "yolo")
    report = check_dataset(root)
    assert report.defects == ()
    text = report.to_text()
    assert text.startswith(f"{root}: YOLO, 10 classes, 3 splits\n")
    assert text.endswith("No defects were found.\n")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  ")}
    assert rows["train"] == ["8", "0", str(splits.train.counts().sum()), "0", "0"]
    widths = np.concatenate([s.truth.boxes[:, 2] - s.truth.boxes[:, 0] for s in splits.train])
    assert report.to_json()["splits"]["train"]["box_widths"][3] == pytest.approx(np.median(widths), abs=1e-3)


def test_a_class_without_objects_is_named(make_voc, xml):
    empty = make_voc({"a": xml([])})
    many = check_dataset(empty, classes=[f"class {i}" for i in range(30)])
    assert [one.kind for one in many.defects] == ["no-object", "missing-class"]
    assert many.defects[1].message == (
        f"{empty}: split 'all' lacks objects of: "
        "class 0, class 1, class 2, class 3, class 4, class 5, class 6, class 7 ..."
    )


def test_trainval_is_no_leak_but_a_shared_image_is(make_voc, xml, put):
    text = xml([("dog", 1, 1, 9, 9)])
    root = make_voc(
        {"a": text, "b": text, "c": text},
        {"train": ["a"], "val": ["b"], "trainval": ["a", "b"], "test": ["c"]},
    )
    for colour, name in enumerate("abc"):
        put(root / "JPEGImages" / f"{name}.jpg", colour=60 * colour)
    report = check_dataset(root)
    assert report.defects == ()
    assert [part.split for part in report.distinct] == ["train", "val", "test"]
    (root / "ImageSets" / "Main" / "test.txt").write_text("c\na\n")
    (leak,) = check_dataset(root).defects
    assert (leak.kind, leak.message) == (
        "leakage",
        f"{root}/JPEGImages: the same image is a.jpg (train), a.jpg (test).",
    )


def test_no_data_set_is_still_an_error(tmp_path):
    with pytest.raises(DataError, match="must be a data set with"):
        check_dataset(tmp_path)
