"""Whole images: a folder per class, a CSV, the digits, and boxes that only say which classes an image has."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn_svm.datasets import (
    check_dataset,
    detect_format,
    digits_images,
    holds_dataset,
    labels_whole_images,
    list_splits,
    load_dataset,
    load_splits,
    write_dataset,
)
from rcnn_svm.datasets.drawing import draw_parts
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.structures import Dataset, GroundTruth, Sample


def picture(path: Path, shade: int = 0, size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 255 - shade, 90)).save(path, format="PNG")
    return path


def folders(root: Path, *names: str, n: int = 3) -> Path:
    for k, name in enumerate(names):
        for i in range(n):
            picture(root / name / f"{i}.png", shade=(50 * k + i) % 256)
    return root


def labels(dataset: Dataset) -> dict[str, list[str]]:
    return {s.image_id: [dataset.classes[k] for k in s.truth.labels] for s in dataset}


def kinds(path: Path) -> Counter[str]:
    return Counter(one.kind for one in check_dataset(path).defects)


def test_a_folder_per_class_is_a_data_set(tmp_path: Path) -> None:
    root = folders(tmp_path / "pets", "cat", "dog")
    assert detect_format(root) == "folders"
    assert labels_whole_images(root)
    assert not holds_dataset(root)  # for verbs that want boxes it is a folder of images
    dataset = load_dataset(root, "all")
    assert dataset.whole
    assert dataset.classes == ("cat", "dog")
    assert labels(dataset) == {f"{name}/{i}": [name] for name in ("cat", "dog") for i in range(3)}
    sample = dataset.samples[0]
    assert sample.size == (8, 12)
    assert sample.truth.boxes.tolist() == [[0, 0, 12, 8]]
    assert sample.read().shape == (8, 12, 3)
    assert check_dataset(root).defects == ()
    assert "FOLDERS, 2 classes" in check_dataset(root).to_text()


@pytest.mark.parametrize("around", ["", "archive/images"])
def test_folders_called_after_parts_are_splits(tmp_path: Path, around: str) -> None:
    base = tmp_path / around
    for part in ("train", "Valid", "test"):
        folders(base / part, "10", "9", n=2)
    assert list_splits(tmp_path) == ("Valid", "test", "train")
    splits = load_splits(tmp_path)
    assert splits.whole
    assert [len(p) for p in (splits.train, splits.val, splits.trainval, splits.test)] == [4, 4, 8, 4]
    assert splits.train.classes == ("9", "10")  # by value


def test_folders_in_a_class_belong_to_it(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "2023" / "A.JPEG")
    picture(tmp_path / "cat" / "b.PnG", 3)
    picture(tmp_path / "dog" / "deep" / "er" / "c.jpg", 9)
    picture(tmp_path / "train" / "engine.jpg", 20)  # a class, since no folder of it is one
    picture(tmp_path / "cat" / ".hidden.png")
    picture(tmp_path / ".thumbs" / "d.png")
    dataset = load_dataset(tmp_path, "all")
    assert labels(dataset) == {"A": ["cat"], "b": ["cat"], "c": ["dog"], "engine": ["train"]}
    for name in ("cat", "dog"):
        for part in ("train", "test"):
            picture(tmp_path / "other" / name / part / f"{name}-{part}.png")
    assert list_splits(tmp_path / "other") == ("test", "train")


def test_what_is_in_no_class_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folders(tmp_path, "cat", "Cat")
    picture(root / "stray.png", 99)
    (root / "bird").mkdir()
    assert kinds(root) == {"stray": 1, "empty-class": 1, "similar": 1}
    dataset = load_dataset(root, "all")
    assert dataset.classes == ("Cat", "cat")
    said = capsys.readouterr().err
    assert "stray.png: lies in the folder of no class and is left out." in said
    assert "bird: holds no image and is left out." in said
    assert "the classes 'Cat' and 'cat' differ in case or spaces only" in said


def test_one_image_in_two_classes_is_an_error_of_the_check(tmp_path: Path) -> None:
    root = folders(tmp_path, "cat", "dog")
    (root / "dog" / "again.png").write_bytes((root / "cat" / "1.png").read_bytes())
    report = check_dataset(root)
    assert Counter(one.kind for one in report.errors) == {"contradiction": 1}
    (error,) = report.errors
    assert "the same image is labelled cat in" in error.message
    assert "dog in" in error.message


def test_a_damaged_image_is_left_out_when_asked(tmp_path: Path) -> None:
    root = folders(tmp_path, "cat", "dog")
    (root / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png: must be an image.*--skip-bad"):
        load_splits(root)
    assert len(load_dataset(root, "all", skip_bad=True)) == 5


def test_other_formats_and_bare_images_are_not_taken_for_classes(tmp_path: Path) -> None:
    lone = folders(tmp_path / "lone", "cat")
    with pytest.raises(DataError, match="or whole images in a folder for each of two or more classes"):
        detect_format(lone)
    with pytest.raises(DataError, match="for each of two or more classes, got cat"):
        load_splits(lone, format="folders")
    yolo = folders(tmp_path / "yolo", "images", "labels")  # without a data.yaml
    with pytest.raises(DataError, match="found none of it"):
        detect_format(yolo)
    assert load_dataset(yolo, "all", format="folders").classes == ("images", "labels")
    beside = folders(tmp_path / "beside", "north", "south")
    (beside / "north" / "0.txt").write_text("0 .5 .5 1 1\n")
    with pytest.raises(DataError, match="found none of it"):
        detect_format(beside)
    parts = folders(tmp_path / "parts", "train", "test")  # without labels
    (parts / "boxes.csv").write_text("filename,class,xmin,ymin,xmax,ymax\n0.png,cat,1,1,5,5\n")
    with pytest.raises(DataError, match="found none of it"):
        detect_format(parts)
    splits = digits_images(max_images=4)
    for kind in ("voc", "coco", "yolo"):
        root = write_dataset([splits.train, splits.test], tmp_path / f"as-{kind}", kind)  # type: ignore[arg-type]
        folders(root / "photos", "a", "b")
        (root / "list.csv").write_text("image,label\n0.png,a\n")
        assert detect_format(root) == kind


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_csv_of_images_and_classes_is_a_data_set(tmp_path: Path, delimiter: str, encoding: str) -> None:
    names = ["a.png", "sub/b.png", "c.png", "d.png"]
    for k, name in enumerate(names):
        picture(tmp_path / "photos" / name, k)
    rows = [["id", "File Name", "Category", "Split"]]
    cells = ["photos/a.png", r"C:\old\photos\sub\b.png", "c", '"d.png"']
    rows += [[str(k), cell, f"köter{k % 2}", "train" if k < 3 else "test"] for k, cell in enumerate(cells)]
    text = "\n".join(delimiter.join(row) for row in rows) + "\n\n"
    (tmp_path / "list.csv").write_text(text, encoding=encoding)
    assert detect_format(tmp_path) == "csv"
    assert list_splits(tmp_path / "list.csv") == ("train", "test")
    dataset = load_dataset(tmp_path / "list.csv", "train")
    assert dataset.whole
    assert labels(dataset) == {"a": ["köter0"], "b": ["köter1"], "c": ["köter0"]}
    assert labels(load_dataset(tmp_path, "test")) == {"d": ["köter1"]}


def test_a_csv_for_each_part(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for i in range(4):
            picture(tmp_path / part / f"{i}.png", i)
        lines = "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(4))
        (tmp_path / f"{part}.csv").write_text("filename,class\n" + lines)
    splits = load_splits(tmp_path)
    assert {s.path.parent.name for s in splits.test if s.path} == {"test"}
    assert len(splits.trainval) == 4
    (tmp_path / "more.csv").write_text("filename,class\n0.png,a\n")
    with pytest.raises(ConfigError, match=r"one CSV of images and classes, .* has more\.csv, test\.csv"):
        load_splits(tmp_path)


def test_faults_of_a_csv_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png", "x/c.png", "y/c.png"):
        picture(tmp_path / name, len(name))
    table = tmp_path / "list.csv"
    table.write_text("image,label\na.png,cat\na.png,dog\na.png,dog\nb.png,\n,cat\nc.png,cat\ngone.png,dog\n")
    assert kinds(table) == {"labels": 3, "image": 1, "several-classes": 1, "doubled": 1}
    with pytest.raises(DataError, match=r"line 5 must name an image and its class, got 'b.png '.*--skip-bad"):
        load_dataset(table, "all")
    capsys.readouterr()
    assert labels(load_dataset(table, "all", skip_bad=True)) == {"a": ["cat", "dog"]}
    assert "a.png has several classes, all of which count." in capsys.readouterr().err
    table.write_text("a.png,cat\nb.png,dog\n")
    with pytest.raises(DataError, match=r"must have a line that names its columns, .* it has 'a.png', 'cat'"):
        load_dataset(table, "all")
    table.write_text("filename,class,xmin,ymin,xmax,ymax\na.png,cat,1,1,5,5\n")
    with pytest.raises(DataError, match="and no boxes; it has the column xmin of boxes"):
        load_dataset(table, "all")


def test_archives_hold_whole_images_too(tmp_path: Path) -> None:
    root = folders(tmp_path / "pets", "cat", "dog")
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for path in root.rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path))
    assert load_dataset(tmp_path / "pets.zip", "all").classes == ("cat", "dog")


def test_the_digits_are_whole_images() -> None:
    splits = digits_images(seed=3)
    assert splits.whole
    assert [len(p) for p in (splits.train, splits.val, splits.test)] == [1078, 360, 359]
    for part in (splits.train, splits.val, splits.test):
        share = part.counts() / len(part)
        np.testing.assert_allclose(share, 0.1, atol=0.012)  # each class has its share of every part
    sample = splits.test.samples[0]
    assert sample.read().shape == (8, 8, 3)
    assert sample.read().max() == 255
    ids = [{s.image_id for s in part} for part in (splits.train, splits.val, splits.test)]
    assert len(set.union(*ids)) == 1797
    again = digits_images(seed=3)
    assert [s.image_id for s in again.test] == [s.image_id for s in splits.test]


def test_a_draw_of_whole_images_keeps_the_shares_of_classes(rng: np.random.Generator) -> None:
    def sample(i: int, label: int) -> Sample:
        return Sample(f"{i}", (4, 4), GroundTruth(np.array([[0, 0, 4, 4]], np.float32), np.array([label])))

    counts = (80, 40, 20)
    kinds = [k for k, n in enumerate(counts) for _ in range(n)]
    samples = tuple(sample(i, k) for i, k in enumerate(kinds))
    whole = Dataset("d", "all", ("a", "b", "c"), samples, whole=True)
    for part in draw_parts(whole, [70, 35, 35], rng):
        expected = np.array(counts) * len(part) / 140
        assert np.abs(part.counts() - expected).max() <= 2


def test_boxes_say_which_classes_an_image_has() -> None:
    boxes = np.array([[0, 0, 5, 5], [2, 2, 9, 9], [0, 0, 9, 2], [1, 1, 3, 3], [5, 5, 9, 9]], np.float32)
    truth = GroundTruth(
        boxes,
        np.array([2, 1, 2, 0, 3]),
        difficult=np.array([True, False, False, True, False]),
        crowd=np.array([False, False, False, False, True]),
    )
    dataset = Dataset("d", "test", ("a", "b", "c", "d"), (Sample("i", (10, 12), truth),)).as_whole_images()
    assert dataset.whole
    assert dataset.as_whole_images() is dataset
    own = dataset.samples[0].truth
    assert own.boxes.tolist() == [[0, 0, 12, 10]] * 4
    assert own.labels.tolist() == [1, 2, 3, 0]  # the largest object first, then what does not count
    assert own.difficult.tolist() == [False, False, True, True]
    assert not own.crowd.any()
