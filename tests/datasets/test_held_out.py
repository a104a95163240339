"""What a detector is measured on: the images it has not seen, and a word where it has."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from rcnn_svm.datasets import SplitRecord, images_to_measure, load_dataset, load_splits
from rcnn_svm.errors import ConfigError, DataError

NAMES = [f"im{i}" for i in range(10)]


def ids(dataset):
    return [sample.image_id for sample in dataset]


def paint(folder, seed=0):
    """Give each image a content of its own."""
    rng = np.random.default_rng(seed)
    for file in sorted(folder.rglob("*.jpg")):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(file)


@pytest.fixture
def photos(make_voc, xml):
    """A data set with a single split."""
    root = make_voc({name: xml([("dog", 1, 1, 9, 9)]) for name in NAMES})
    paint(root)
    return root


@pytest.fixture
def record(photos):
    return SplitRecord.of(load_splits(photos, seed=3), seed=3)


@pytest.fixture
def others(photos, tmp_path):
    """Other photographs under the same names."""
    root = tmp_path / "others"
    shutil.copytree(photos, root)
    paint(root, seed=1)
    return root


def test_the_record_reads_back_the_same(photos, record, tmp_path):
    splits = load_splits(photos, seed=3)
    assert (record.data, record.seed, record.notes) == ("set", 3, splits.notes)
    for part in ("train", "val", "trainval", "test"):
        assert record.parts[part] == {s.image_id: s.digest() for s in getattr(splits, part)}
    record.write(tmp_path / "detector")
    assert SplitRecord.read(tmp_path / "detector") == record
    assert record.learned_from.isdisjoint(record.parts["test"].values())
    assert len(record.known) == len(NAMES)
    assert SplitRecord.read(tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"data": None},
        {"seed": "3"},
        {"notes": "none"},
        {"test": ["im1"]},
        {"train": {"im1": 7}},
    ],
)
def test_a_damaged_record_is_refused(record, tmp_path, change):
    record.write(tmp_path)
    file = tmp_path / "splits.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError) as caught:
        SplitRecord.read(tmp_path)
    assert str(caught.value) == (
        f"{file}: must be of format 1 and tell the digest of each image of train, val, trainval, test. "
        "Train the detector again."
    )


@pytest.mark.parametrize("split", [None, "test"])
def test_without_a_test_split_it_is_what_training_held_out(photos, record, split):
    dataset, notes = images_to_measure(photos, split, record)
    assert ids(dataset) == list(record.parts["test"])
    assert dataset.split == "test"
    assert notes == (f"{photos}: measured on the 2 images held out from the detector.",)


def test_other_parts_of_training_have_their_names(photos, record):
    dataset, notes = images_to_measure(photos, "val", record)
    assert ids(dataset) == list(record.parts["val"])
    assert notes == (
        f"{photos}: measured on the 2 images that were val in its training.",
        "2 of 2 images were trained on: this AP says nothing about new images.",
    )


def test_all_images_and_how_many_were_trained_on(photos, record):
    dataset, notes = images_to_measure(photos, "all", record)
    assert ids(dataset) == NAMES
    assert notes == ("8 of 10 images were trained on: this AP says nothing about new images.",)


def test_new_photographs_in_the_folder_do_not_join_the_held_out_ones(photos, record, xml):
    shutil.copy(photos / "Annotations" / "im0.xml", photos / "Annotations" / "new.xml")
    Image.new("RGB", (60, 40)).save(photos / "JPEGImages" / "new.jpg")
    assert ids(images_to_measure(photos, None, record)[0]) == list(record.parts["test"])
    assert "new" in ids(images_to_measure(photos, "all", record)[0])


def test_a_held_out_image_that_changed_or_is_gone_is_refused(photos, record):
    first, second = record.parts["test"]
    Image.new("RGB", (60, 40)).save(photos / "JPEGImages" / f"{second}.jpg")
    advice = "Put them back, or name a split with --split; all is every image."
    with pytest.raises(DataError) as caught:
        images_to_measure(photos, None, record)
    assert str(caught.value) == (
        f"{photos}: must hold the 2 images held out from the detector, got 0 missing and 1 changed "
        f"(the first: {second!r}). {advice}"
    )
    (photos / "Annotations" / f"{first}.xml").unlink()
    with pytest.raises(DataError) as caught:
        images_to_measure(photos, None, record)
    assert str(caught.value) == (
        f"{photos}: must hold the 2 images held out from the detector, got 1 missing and 1 changed "
        f"(the first: {first!r}). {advice}"
    )
    assert len(images_to_measure(photos, "all", record)[0]) == 9


def test_other_photographs_under_the_same_names_are_other_data(others, record):
    dataset, notes = images_to_measure(others, None, record)
    assert ids(dataset) == NAMES
    assert dataset.split == "all"
    assert notes == (
        f"{others}: none of its images is known to the detector; measured on all of its 10 images, as it "
        "has no test split.",
        "0 of 10 images were trained on.",
    )
    with pytest.raises(ConfigError) as caught:
        images_to_measure(others, "test", record)
    assert str(caught.value) == (
        f"{others}: has no split 'test', only all. Name one that it has, such as 'all'."
    )


def test_other_data_are_measured_on_their_test_split(make_coco, record):
    one = {"category_id": 1, "bbox": [1, 2, 10, 20]}
    root = make_coco(
        {"train2017": {"a.jpg": [one], "im0.jpg": [one]}, "test2017": {"c.jpg": [one]}}, {1: "dog"}
    )
    paint(root, seed=2)
    dataset, notes = images_to_measure(root, None, record)
    assert (ids(dataset), dataset.split) == (["c"], "test")
    assert notes == (
        f"{root}: none of its images is known to the detector; measured on its test split, 1 image.",
    )
    whole, notes = images_to_measure(root, "all", record)
    assert sorted(ids(whole)) == ["a", "c", "im0"]
    assert notes == ("0 of 3 images were trained on.",)


def test_a_detector_that_does_not_tell_what_it_was_trained_on(photos):
    dataset, notes = images_to_measure(photos, None, None)
    assert len(dataset) == 10
    assert notes == (
        f"{photos}: the detector has no splits.json that tells which images it was trained on; measured on "
        "all of its 10 images, as it has no test split.",
    )


def test_a_split_that_the_data_name_is_that_split_and_its_overlap_is_said(make_voc, xml):
    root = make_voc(
        {name: xml([("dog", 1, 1, 9, 9)]) for name in NAMES},
        {"train": NAMES[:4], "val": NAMES[4:6], "test": NAMES[6:]},
    )
    paint(root)
    record = SplitRecord.of(load_splits(root), seed=0)
    assert images_to_measure(root, "test", record)[1] == ()
    assert ids(images_to_measure(root, None, record)[0]) == NAMES[6:]
    # One of the test images comes to be a copy of one that was trained on.
    shutil.copy(root / "JPEGImages" / "im1.jpg", root / "JPEGImages" / "im8.jpg")
    dataset, notes = images_to_measure(root, "test", record)
    assert ids(dataset) == NAMES[6:]
    assert notes == ("1 of 4 images was trained on: this AP is not that of new images.",)
    # Images of several splits are read once.
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(NAMES[:6]))
    assert sorted(ids(images_to_measure(root, "all", record)[0])) == NAMES


def test_ids_that_several_splits_share_get_their_split(make_yolo):
    row = "0 0.5 0.5 0.2 0.2\n"
    root = make_yolo({"train": {"a": row, "b": row}, "val": {"c": row}, "test": {"a": row}})
    for i, file in enumerate(sorted(root.rglob("*.png"))):
        Image.new("RGB", (60, 40), (i, i, i)).save(file)
    record = SplitRecord.of(load_splits(root), seed=0)
    dataset, notes = images_to_measure(root, None, record)
    assert dataset.samples[0].path == root / "images" / "test" / "a.png"
    dataset, notes = images_to_measure(root, "all", record)
    assert ids(dataset) == ["train/a", "train/b", "val/c", "test/a"]
    assert notes == ("3 of 4 images were trained on: this AP says nothing about new images.",)


def test_boxes_of_images_that_are_not_measured_are_not_judged(photos, record, xml, capsys):
    trained, held_out = next(iter(record.parts["train"])), next(iter(record.parts["test"]))
    (photos / "Annotations" / f"{trained}.xml").write_text(xml([("dog", 5, 5, 5, 5)]))
    assert len(images_to_measure(photos, None, record)[0]) == 2
    with pytest.raises(DataError, match="must have a positive area"):
        images_to_measure(photos, "all", record)
    (photos / "Annotations" / f"{held_out}.xml").write_text(xml([("dog", 5, 5, 5, 5)]))
    with pytest.raises(DataError, match="must have a positive area"):
        images_to_measure(photos, None, record)
    dataset, _ = images_to_measure(photos, None, record, drop_bad_boxes=True)
    assert [len(sample.truth) for sample in dataset] == [0, 1]
    assert capsys.readouterr().err.startswith("Dropped 1 bad box")
    assert len(load_dataset(photos, "all", drop_bad_boxes=True)) == 10
