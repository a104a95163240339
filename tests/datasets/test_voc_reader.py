from __future__ import annotations

import numpy as np
import pytest

from rcnn_svm.datasets import detect_format, list_splits, load_dataset
from rcnn_svm.errors import ConfigError, DataError

ADVICE = " Correct the label, or leave such objects out with --drop-bad-boxes."
MEND = " --skip-bad leaves such images out."


def test_the_pixel_rule_and_all_fields(make_voc, xml):
    root = make_voc(
        {"a": xml([("dog", 1, 2, 60, 40), ("cat", 5.5, 6, 20.25, 30)], difficult=1)}, {"train": ["a"]}
    )
    for path in (root, root.parent):
        data = load_dataset(path, "train")
        assert (data.name, data.split, data.classes) == ("set", "train", ("cat", "dog"))
        (sample,) = data
        assert (sample.image_id, sample.size) == ("a", (40, 60))
        np.testing.assert_array_equal(sample.truth.boxes, [[0, 1, 60, 40], [4.5, 5, 20.25, 30]])
        np.testing.assert_array_equal(sample.truth.labels, [1, 0])
        assert sample.truth.difficult.all()
        assert not sample.truth.crowd.any()
        assert sample.read().shape == (40, 60, 3)
    assert detect_format(root.parent) == "voc"


def test_missing_fields_and_parts_are_tolerated(make_voc, xml):
    text = xml([("dog", 1, 1, 9, 9)], size=None, difficult=None)
    box = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>4</xmax><ymax>4</ymax></bndbox>"
    part = f"<part><name>head</name>{box}</part>"
    root = make_voc({"a": text.replace("</object>", f"{part}{part}</object>"), "b": xml([], size=(0, 0))})
    data = load_dataset(root, "all")
    assert data.classes == ("dog",)
    assert [len(sample.truth) for sample in data] == [1, 0]
    assert [sample.size for sample in data] == [(40, 60), (40, 60)]  # from the headers
    assert not data.samples[0].truth.difficult.any()


def test_per_class_lists_are_no_splits(make_voc, xml):
    root = make_voc(
        {"a": xml([("dog", 1, 1, 9, 9)])},
        {"train": ["a"], "val": ["a"], "dog_train": ["a  1"], "dog_val": ["a -1"]},
    )
    assert list_splits(root) == ("train", "val")


def test_classes_come_from_all_splits_or_are_given(make_voc, xml, tmp_path):
    annotations = {"a": xml([("dog", 1, 1, 9, 9)]), "b": xml([("cat", 1, 1, 9, 9)])}
    root = make_voc(annotations, {"train": ["a"], "test": ["b"]})
    assert load_dataset(root, "train").classes == ("cat", "dog")
    names = tmp_path / "names.txt"
    names.write_text("dog\n\ncat\nbird\n")
    for classes in (["dog", "cat", "bird"], names, str(names)):
        data = load_dataset(root, "train", classes=classes)
        assert data.classes == ("dog", "cat", "bird")
        assert data.samples[0].truth.labels.tolist() == [0]
    (root / "classes.txt").write_text("dog\ncat\n")
    assert load_dataset(root, "train").classes == ("dog", "cat")


def test_up_to_one_pixel_outside_is_clipped(make_voc, xml):
    root = make_voc({"a": xml([("dog", 0, 0, 61, 41)])})
    np.testing.assert_array_equal(load_dataset(root, "all").samples[0].truth.boxes, [[0, 0, 60, 40]])


@pytest.mark.parametrize(
    ("box", "classes", "rule"),
    [
        ((5, 6, 5, 6), None, "must have a positive area, got xmin 5, ymin 6, xmax 5, ymax 6."),
        ((5, 6, 20, 6), None, "must have a positive area, got xmin 5, ymin 6, xmax 20, ymax 6."),
        ((9, 6, 5, 16), None, "must have a positive area, got xmin 9, ymin 6, xmax 5, ymax 16."),
        ((5, 6, 62, 20), None, "must lie inside the 60 x 40 image, got xmin 5, ymin 6, xmax 62, ymax 20."),
        ((-1, 6, 9, 20), None, "must lie inside the 60 x 40 image, got xmin -1, ymin 6, xmax 9, ymax 20."),
        ((5, 6, 9, 20), ["cat"], "must be of a known class (cat), got 'dog'."),
    ],
)
def test_a_bad_box_is_an_error_unless_dropped(make_voc, xml, capsys, box, classes, rule):
    good = ("dog" if classes is None else "cat", 1, 1, 9, 9)
    root = make_voc({"a": xml([good, ("dog", *box)])})
    if classes is not None:
        (root / "classes.txt").write_text("cat\n")
    message = f"{root}/Annotations/a.xml: object 2 (dog) of image 'a' {rule}"
    with pytest.raises(DataError) as caught:
        load_dataset(root, "all", classes=classes)
    assert str(caught.value) == message + ADVICE
    assert caught.value.exit_code == 3
    data = load_dataset(root, "all", classes=classes, drop_bad_boxes=True)
    assert len(data.samples[0].truth) == 1
    assert capsys.readouterr().err == f"Dropped 1 bad box, the first: {message}\n"


def test_broken_and_incomplete_xml(make_voc, xml):
    text = xml([("dog", 1, 1, 9, 9)])
    cases = {
        text[:60]: "must be XML, got a syntax error at line 1, column 54. It may be truncated.",
        "": "must be XML, got a syntax error at line 1, column 0. It may be truncated.",
        text.replace("dog", ""): "object 1 must have a <name>.",
        text.replace("<xmax>9</xmax>", ""): "object 1 (dog) must have a number as <xmax>, got nothing.",
        text.replace("<xmax>9", "<xmax>nine"): "object 1 (dog) must have a number as <xmax>, got 'nine'.",
        text.replace("<xmax>9", "<xmax>nan"): "object 1 (dog) must have a number as <xmax>, got 'nan'.",
        text.replace("cult>0", "cult>?"): "object 1 (dog) must have 0 or 1 as <difficult>, got '?'.",
        text.replace("annotation", "page"): "must have the root element <annotation>, got <page>.",
        text.replace("<object>", "<objects><object>").replace("</object>", "</object></objects>"): (
            "must have its <object>s directly in <annotation>, got them elsewhere."
        ),
    }
    root = make_voc({"a": text})
    file = root / "Annotations" / "a.xml"
    for broken, message in cases.items():
        file.write_text(broken)
        with pytest.raises(DataError) as caught:
            load_dataset(root, "all", classes=["dog"])
        assert str(caught.value) == f"{file}: {message}{ADVICE if message[:6] == 'object' else MEND}"


def test_missing_files_and_empty_splits(make_voc, xml):
    root = make_voc(
        {"a": xml([("dog", 1, 1, 9, 9)]), "b": xml([])},
        {"train": ["a"], "val": ["b"], "test": ["c"], "extra": ["a", "a"], "none": [" "]},
    )
    (root / "JPEGImages" / "b.jpg").unlink()
    cases = {
        "val": f"{root}/JPEGImages/b.jpg: no such image file, "
        f"though {root}/Annotations/b.xml labels it.{MEND}",
        "test": f"{root}/ImageSets/Main/test.txt: line 1 names 'c', there is no XML of this name.{MEND}",
        "extra": f"{root}/Annotations/a.xml: image 'a' comes twice in split 'extra'. Remove one.{MEND}",
        "none": f"{root}: split 'none' has no image. Add images to it or name another split.",
    }
    for split, message in cases.items():
        with pytest.raises(DataError) as caught:
            load_dataset(root, split)
        assert str(caught.value) == message
    with pytest.raises(ConfigError) as missing:
        load_dataset(root, "tst")
    assert str(missing.value) == (
        f"{root}: has no split 'tst', only extra, none, test, train, val. Did you mean 'test'?"
    )


def test_a_size_that_contradicts_the_image(make_voc, xml):
    root = make_voc({"a": xml([("dog", 1, 1, 9, 9)], size=(50, 80))})
    with pytest.raises(DataError) as caught:
        load_dataset(root, "all")
    assert str(caught.value) == (
        f"{root}/Annotations/a.xml: says 80 x 50 pixels, {root}/JPEGImages/a.jpg has 60 x 40. "
        f"One of the two is wrong.{MEND}"
    )


def test_no_data_set_several_or_no_object(tmp_path, make_voc, xml):
    with pytest.raises(DataError) as caught:
        detect_format(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: must be a data set with VOC's Annotations/*.xml, COCO's annotations/*.json or YOLO's "
        "data.yaml, or whole images in a folder for each of two or more classes or in a CSV of images and "
        "labels, found none of it."
    )
    with pytest.raises(DataError) as caught:
        list_splits(tmp_path, format="voc")
    assert (
        str(caught.value) == f"{tmp_path}: must be a VOC data set with Annotations/*.xml, found none of it."
    )
    with pytest.raises(DataError) as caught:
        detect_format(tmp_path / "nothing")
    assert str(caught.value) == f"{tmp_path / 'nothing'}: no such file or folder."
    with pytest.raises(ConfigError) as wrong:
        list_splits(tmp_path, format="vox")
    assert str(wrong.value) == "format must be one of voc, coco, yolo, csv, folders, got 'vox'."
    root = make_voc({"a": xml([])})
    with pytest.raises(DataError) as caught:
        load_dataset(root, "all")
    assert str(caught.value) == f"{root}: must label at least one object, no class was found."
    second = root.parent / "VOC2012" / "Annotations"
    second.mkdir(parents=True)
    (second / "a.xml").write_text(xml([]))
    with pytest.raises(ConfigError) as several:
        detect_format(root.parent)
    assert str(several.value) == (
        f"{root.parent}: must be one VOC folder, holds several (VOC2007, VOC2012). Name one of them."
    )


def test_bad_class_lists(make_voc, xml, tmp_path):
    root = make_voc({"a": xml([("dog", 1, 1, 9, 9)])})
    with pytest.raises(ConfigError) as caught:
        load_dataset(root, "all", classes=["dog", "dog"])
    assert str(caught.value) == "classes: must name one or more classes, each once, got ['dog', 'dog']."
    with pytest.raises(DataError, match="must be a text file with one class name a line"):
        load_dataset(root, "all", classes=tmp_path / "no.txt")


def test_flags_are_read_where_they_are_stated(make_voc, xml):
    def flagged(**flags):
        words = "".join(f"<{name}>{word}</{name}>" for name, word in flags.items())
        return xml([("dog", 1, 2, 60, 40)]).replace("<difficult>", f"{words}<difficult>")

    texts = {
        "a": flagged(truncated=1, occluded="Unspecified"),
        "b": flagged(truncated="true", occluded=0),
        "c": flagged(),
    }
    data = load_dataset(make_voc(texts, {"train": list(texts)}), "train")
    told = [{name: flag.tolist() for name, flag in sample.truth.flags.items()} for sample in data]
    assert told == [{"truncated": [True]}, {"occluded": [False], "truncated": [True]}, {}]
