"""What labelling tools write is read rightly, or refused in a sentence; never wrong in silence."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rcnn_svm.cli import main
from rcnn_svm.datasets import check_dataset, load_dataset, load_splits
from rcnn_svm.datasets.records import BOX_DEFECTS, WARNINGS
from rcnn_svm.errors import DataError, RcnnSvmError
from tests.datasets import cases
from tests.datasets.cases import CASES, CLASSES, GREY


def read(path: Path):
    report = check_dataset(path)
    counts = {part.split: (len(part), int(part.counts().sum())) for part in report.datasets}
    return report, counts


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_read_as_it_is_meant(name, tmp_path, capsys):
    case = CASES[name]
    path = case.make(tmp_path) or tmp_path
    report, counts = read(path)
    assert counts == dict(case.splits), report.to_text()
    assert {one.kind for one in report.defects} == case.kinds, report.to_text()
    assert all(word in report.to_text() for word in case.words)
    errors = case.kinds - WARNINGS | case.kinds & {"leakage"}
    assert bool(report.errors) == bool(errors)
    assert main(["data", "check", str(path)]) == (3 if errors else 0)
    ids = [sample.image_id for part in report.datasets for sample in part]
    if "leakage" not in case.kinds:
        assert len(set(ids)) == len(ids)
    if not case.same:
        return
    for part in report.datasets:
        for sample in part:
            i = round(float(sample.read()[5, 5].mean()) / GREY)
            expected = {label: box for label, box in cases.objects(i) if label in part.classes}
            for box, label in zip(sample.truth.boxes, sample.truth.labels, strict=True):
                np.testing.assert_allclose(box, expected[part.classes[label]], atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].kinds & BOX_DEFECTS])
def test_bad_objects_stop_loading_unless_they_are_dropped(name, tmp_path, capsys):
    path = CASES[name].make(tmp_path) or tmp_path
    with pytest.raises(DataError, match="--drop-bad-boxes"):
        load_dataset(path, "train")
    load_dataset(path, "train", drop_bad_boxes=True)
    assert "Dropped " in capsys.readouterr().err


def test_bad_files_stop_loading_unless_they_are_left_out(tmp_path, capsys):
    cases.voc(tmp_path, numbers=range(8), splits={"train": range(6), "val": (6,), "test": (7,)})
    (tmp_path / "JPEGImages/im1.jpg").unlink()
    cut = tmp_path / "JPEGImages/im2.jpg"
    cut.write_bytes(cut.read_bytes()[:500])
    cases.write(tmp_path / "Annotations/im3.xml", "<annotation>")
    with pytest.raises(DataError, match=r"im1\.jpg: no such .* --skip-bad leaves such images out\.$"):
        load_splits(tmp_path)
    splits = load_splits(tmp_path, skip_bad=True)
    assert [sample.image_id for sample in splits.train] == ["im0", "im4", "im5"]
    assert capsys.readouterr().err.startswith("Left out 3 images, the first: ")
    cases.picture(tmp_path / "JPEGImages/im1.jpg", 1)
    cases.write(tmp_path / "Annotations/im3.xml", cases.voc_xml(3, "im3.jpg"))
    with pytest.raises(DataError, match=r"im2\.jpg: is a damaged .* --skip-bad leaves such images out\.$"):
        [sample.read() for sample in load_splits(tmp_path).train]


def test_a_subset_of_the_classes_counts_the_others(tmp_path, capsys):
    cases.voc(tmp_path)
    splits = load_splits(tmp_path, classes=["disc"])
    assert [int(part.counts().sum()) for part in (splits.train, splits.val, splits.test)] == [2, 1, 1]
    assert capsys.readouterr().err == "Left out 4 objects of classes that were not asked for: bar 4.\n"
    assert {one.kind for one in check_dataset(tmp_path, classes=["bar"]).defects} == {"other-class"}
    cases.write(tmp_path / "classes.txt", "disc\n")
    with pytest.raises(DataError, match="must be of a known class"):
        load_splits(tmp_path, classes=["disc"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        ("voc", "The split test ({root}/ImageSets/Main/test.txt) has no image and counts as not given."),
        (
            "coco",
            "The split test ({root}/annotations/instances_test.json) has no image and counts as not given.",
        ),
        ("yolo", "The split test ({root}/data.yaml: 'test/images') has no image and counts as not given."),
    ],
)
def test_an_empty_test_split_counts_as_not_given(tmp_path, make, words):
    if make == "voc":
        cases.voc(tmp_path, splits={**cases.SPLITS, "test": ()})
    elif make == "coco":
        cases.coco(tmp_path, only="test", edit=lambda c: c.update(images=[], annotations=[]))
    else:
        cases.yolo(tmp_path)
        (tmp_path / "test/images/im3.jpg").unlink()
    splits = load_splits(tmp_path)
    assert splits.notes[0] == words.format(root=tmp_path)
    assert [len(part) for part in (splits.trainval, splits.test)] == [2, 1]


def test_a_missing_test_split_and_one_without_a_part_are_noted(tmp_path):
    CASES["yolo test missing"].make(tmp_path)
    assert load_splits(tmp_path).notes[0].startswith(f"The split test is not used. {tmp_path}/data.yaml")
    cases.voc(tmp_path / "voc", splits={"train": (0, 1, 2), "dev": (3,), "holdout": (3,)})
    assert (
        load_splits(tmp_path / "voc")
        .notes[0]
        .startswith("Splits that play no part and are not used: dev, holdout. Names that do are train, val,")
    )


def test_test_images_that_are_trained_on_are_noted(tmp_path):
    CASES["yolo val is train"].make(tmp_path / "a")
    assert load_splits(tmp_path / "a").notes[-1].startswith("2 of the 2 test images are also images to train")
    cases.yolo(tmp_path / "b")
    cases.picture(tmp_path / "b/test/images/im3.jpg", 0)
    assert load_splits(tmp_path / "b").notes[-1].startswith("1 of the 1 test images are also")


def test_several_files_that_could_describe_one_data_set(tmp_path):
    cases.yolo(tmp_path)
    (tmp_path / "data.yaml").rename(tmp_path / "a.yaml")
    cases.write(tmp_path / "b.yaml", (tmp_path / "a.yaml").read_bytes())
    with pytest.raises(RcnnSvmError, match=r"has a\.yaml, b\.yaml\. Name one"):
        check_dataset(tmp_path)
    for name in "xy":
        cases.yolo(tmp_path / "two" / name)
        cases.coco(tmp_path / "twice" / name)
    with pytest.raises(RcnnSvmError, match=r"has x/data\.yaml, y/data\.yaml\. Name one"):
        check_dataset(tmp_path / "two")
    with pytest.raises(DataError, match="must have splits named train, val, test or trainval, found x/annot"):
        load_splits(tmp_path / "twice")


def test_a_folder_may_be_named_from_within(tmp_path, monkeypatch):
    for name, make in (("a", cases.voc), ("b", cases.coco), ("c", cases.yolo)):
        make(tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        assert check_dataset(".").defects == ()
        monkeypatch.chdir(tmp_path)
        assert check_dataset(name).defects == ()


def test_the_nearest_of_several_pictures_is_meant(tmp_path):
    cases.coco(tmp_path)
    cases.coco(tmp_path / "old", edit=lambda content: content["annotations"].clear())
    for sample in check_dataset(tmp_path).datasets[0]:
        assert (sample.path.parent == tmp_path / "images") == bool(len(sample.truth))


@pytest.mark.parametrize(
    ("yaml", "rule"),
    [
        ("names: [a]\ntrain: [1, {b: c}]\n", "'train' must name folders or lists of images"),
        ("names: [a, [b]]\n", "'names' must be texts"),
        ("names: {0: a, 0: b}\n", "must have each key once, got '0' twice"),
        ("names: [a]\nnc: 2\n", "must name as many classes as nc says"),
        ("names: [a]\nkpt_shape: x\n", "'kpt_shape' must be two numbers"),
        ("names: [a]\npath: [x]\n", "'path' must name a folder"),
        ("names: " + "[" * 3000, "must not nest lists"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{'bcdefgh'[k]}: &{'bcdefgh'[k]} [{','.join(['*' + 'abcdefg'[k]] * 9)}]\n" for k in range(7)
        ) + "names: *h\n", "nested or repeated too often"),
    ],
)  # fmt: skip
def test_yaml_is_bounded_and_plain(tmp_path, yaml, rule):
    cases.yolo(tmp_path)
    cases.write(tmp_path / "data.yaml", yaml)
    with pytest.raises(DataError, match=rule):
        load_splits(tmp_path)


@pytest.mark.parametrize("fault", ["escape", "absolute", "drive", "link", "twice", "bomb", "cut", "no zip"])
def test_archives_that_are_refused(tmp_path, fault):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("data.yaml", "names: [a]\n")
        name = {"escape": "../x.txt", "absolute": "/x.txt", "drive": "C:\\x.txt"}.get(fault, "x.txt")
        member = zipfile.ZipInfo(name)
        member.external_attr = (0o120777 << 16) if fault == "link" else 0
        opened.writestr(member, os.urandom(4000))
        if fault == "twice":
            with pytest.warns(UserWarning, match="Duplicate"):
                opened.writestr(name, "1")
        if fault == "bomb":
            with opened.open("y.txt", "w") as stream:
                for _ in range(300):
                    stream.write(bytes(1 << 20))
    if fault == "cut":
        content = archive.read_bytes()
        archive.write_bytes(content[:200] + bytes(500) + content[700:])
    if fault == "no zip":
        archive.write_bytes(b"PK")
    with pytest.raises(DataError, match=r"a\.zip: (must|cannot be unpacked)"):
        load_splits(archive)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip"]


SEEDS = {
    name: CASES[name] for name in ("voc plain", "coco plain", "yolo plain", "yolo darknet") if name in CASES
}
SEEDS["coco plain"] = CASES["coco annotations/instances_{}.json and images"]
SCRAPS = st.sampled_from([
    "", "\x00", "\ufeff", "<", "</object>", "<object/>", "&x;", "nan", "inf", "-1", "1e999", "true", "null",
    "[]", "{}", '"', "[" * 200, "9" * 5000, "\xe9", "../", "*a", "&a ", "- ", ": ", "!!python/object:os.sep ",
    "\\ud800", "/" * 300, "a" * 5000, "0", "\n", "\t", "~", "yes",
])  # fmt: skip


@pytest.mark.parametrize("name", SEEDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_label_file_says_there_is_no_traceback(name, tmp_path_factory, data):
    root = tmp_path_factory.mktemp("set")
    SEEDS[name].make(root)
    files = sorted(
        path for path in root.rglob("*") if path.suffix in (".xml", ".json", ".txt", ".yaml", ".data")
    )
    for _ in range(data.draw(st.integers(1, 3))):
        file = data.draw(st.sampled_from(files))
        content = file.read_bytes()
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(start + 40, len(content))))
        scrap = data.draw(SCRAPS | st.binary(max_size=4))
        file.write_bytes(
            content[:start] + (scrap.encode() if isinstance(scrap, str) else scrap) + content[end:]
        )
    with contextlib.suppress(RcnnSvmError):
        json.dumps(check_dataset(root).to_json())
    with contextlib.suppress(RcnnSvmError):
        load_splits(root, drop_bad_boxes=True, skip_bad=True)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_field_of_coco_holds_there_is_no_traceback(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("set")

    def edit(content):
        key = data.draw(st.sampled_from(sorted(content)))
        if data.draw(st.integers(0, 9)) == 0:
            content[key] = data.draw(JSON_VALUES)
        else:
            record = data.draw(st.sampled_from(content[key]))
            record[
                data.draw(st.sampled_from([*sorted(record), "segmentation", "attributes", "difficult"]))
            ] = data.draw(JSON_VALUES)

    cases.coco(root, only="train", edit=edit)
    with contextlib.suppress(RcnnSvmError):
        json.dumps(check_dataset(root).to_json())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    labels=st.sampled_from(["Annotations", "annotations", "xml", "labels", "."]),
    images=st.sampled_from(["JPEGImages", "images", "IMG", "."]),
    above=st.sampled_from(["", "a/", "a/b c/"]),
    below=st.sampled_from(["", "/cam 1", "/x/y"]),
    lists=st.sampled_from(["ImageSets/Main/{}.txt", "ImageSets/{}.txt"]),
    line=st.sampled_from(["{}", "{}.jpg", "{} 1", "JPEGImages/{}.jpg"]),
    name=st.sampled_from(["im{}", "{}", "a.b{}", "my photo {}", "ü{}"]),
)
def test_every_layout_of_voc_gives_the_same(
    tmp_path_factory, labels, images, above, below, lists, line, name
):
    root = tmp_path_factory.mktemp("set")
    cases.voc(root, above + labels + below, above + images + below, lists=above + lists, line=line, name=name)
    report, counts = read(root)
    assert counts == cases.USUAL
    assert report.defects == ()
    assert report.classes == tuple(sorted(CLASSES))


def test_boxes_around_polygons_and_turned_boxes(tmp_path):
    CASES["voc polygon and turned box"].make(tmp_path / "voc")
    first, second = (sample.truth.boxes[0] for sample in load_dataset(tmp_path / "voc", "train"))
    np.testing.assert_array_equal(first, [4, 5, 40, 36])
    np.testing.assert_array_equal(second, [20, 15, 40, 45])
    CASES["coco polygon without bbox"].make(tmp_path / "coco")
    np.testing.assert_array_equal(
        load_dataset(tmp_path / "coco", "train").samples[0].truth.boxes[2], [5, 6, 40, 36]
    )
    turned = cases.each("annotations", bbox=[30, 20, 20, 30], attributes={"rotation": 90.0})
    cases.coco(tmp_path / "turned", edit=turned)
    np.testing.assert_allclose(
        load_dataset(tmp_path / "turned", "train").samples[0].truth.boxes[0], [25, 25, 55, 45], atol=1e-4
    )
    CASES["yolo turned boxes"].make(tmp_path / "yolo")
    boxes = load_dataset(tmp_path / "yolo", "train").samples[0].truth.boxes
    np.testing.assert_allclose(boxes[0], [9.6, 7.2, 38.4, 36], atol=1e-4)
    np.testing.assert_allclose(boxes[1], [48, 36, 86.4, 64.8], atol=1e-4)
