"""The readers on photographs from outside, against the counts that their makers state."""

from __future__ import annotations

import numpy as np
import pytest

from rcnn_svm.datasets import (
    check_dataset,
    coco_category_ids,
    detect_format,
    load_dataset,
    load_splits,
    write_dataset,
)
from rcnn_svm.errors import DataError

pytestmark = pytest.mark.data

# Images and objects of train, val, trainval and test.
VOC_COUNTS = {
    "fruit": ((192, 373), (48, 92), (240, 465), (60, 117)),
    "bccd": ((205, 2804), (87, 1137), (292, 3941), (72, 945)),  # without the two boxes of no area
    "raccoon": ((128, 138), (32, 35), (160, 173), (40, 44)),
    "voc2007-mini": ((480, 1492), (120, 355), (600, 1847), (400, 1232)),
}


def count(part):
    return len(part), int(part.counts().sum())


@pytest.mark.parametrize("name", VOC_COUNTS)
def test_counts(data_root, name, capsys):
    splits = load_splits(data_root / name, drop_bad_boxes=name == "bccd")
    assert tuple(map(count, (splits.train, splits.val, splits.trainval, splits.test))) == VOC_COUNTS[name]
    assert splits.notes == ()
    assert splits.train.name == name
    assert capsys.readouterr().err.startswith("Dropped 2 bad boxes") == (name == "bccd")
    for sample in splits.test.samples[:5]:
        assert sample.read().shape[:2] == sample.size


def test_per_class_counts_and_flags(data_root):
    test = load_dataset(data_root / "voc2007-mini", "test")
    assert dict(zip(test.classes, test.counts().tolist(), strict=True))["person"] == 321
    assert len(test.classes) == 20
    assert sum((~sample.truth.difficult).sum() for sample in test) == 992


def test_boxes_of_no_area_are_named(data_root):
    with pytest.raises(
        DataError, match="must have a positive area, got xmin 181, ymin 329, xmax 181, ymax 329"
    ):
        load_dataset(data_root / "bccd", "train")
    found = [one for one in check_dataset(data_root / "bccd", decode=False).defects if one.kind == "no-area"]
    assert sorted(one.file.stem for one in found) == ["BloodImage_00338", "BloodImage_00343"]


def test_mislabelled_suffixes(data_root):
    images = {sample.image_id: sample for sample in load_dataset(data_root / "fruit", "trainval")}
    images |= {sample.image_id: sample for sample in load_dataset(data_root / "fruit", "test")}
    for name in ("banana_57", "apple_1", "banana_90", "orange_85", "orange_92"):
        assert images[name].read().shape == (*images[name].size, 3)
    np.testing.assert_array_equal(images["banana_57"].read()[0, 0], 255)


def test_equal_files_are_found(data_root):
    report = check_dataset(data_root / "raccoon", decode=False)
    assert [one.kind for one in report.defects] == ["duplicate"] * 4


def test_coco(data_root):
    folder = data_root / "tiny-coco"
    assert detect_format(folder) == "coco"
    train, val = load_dataset(folder, "train"), load_dataset(folder, "val2017")
    assert (count(train), count(val)) == ((50, 470), (50, 382))
    assert [int(sum(s.truth.crowd.sum() for s in part)) for part in (train, val)] == [5, 5]
    assert [s.image_id for s in val if not len(s.truth)] == ["000000226111", "000000058636"]
    assert len(train.classes) == 80
    ids = coco_category_ids(folder)
    assert (ids["person"], ids["toothbrush"], min(ids.values()), max(ids.values())) == (1, 90, 1, 90)
    assert train.counts()[train.classes.index("bottle")] == 45
    splits = load_splits(folder)
    assert [len(part) for part in (splits.train, splits.val, splits.trainval, splits.test)] == [
        40,
        10,
        50,
        50,
    ]
    assert len(splits.notes) == 2


@pytest.mark.parametrize("format", ["voc", "coco", "yolo"])
def test_photographs_survive_a_round_trip(data_root, tmp_path, format):
    old = load_splits(data_root / "fruit", max_images=6)
    new = load_splits(write_dataset([old.train, old.val, old.test], tmp_path / "out", format))
    copies = {sample.image_id: sample for sample in new.test}
    for sample in old.test:
        copy = copies[sample.image_id]
        assert copy.path.read_bytes() == sample.path.read_bytes()
        np.testing.assert_array_equal(copy.truth.boxes, sample.truth.boxes)
