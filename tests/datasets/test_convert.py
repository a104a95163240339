"""From format to format and back, and data sets divided anew."""

from __future__ import annotations

import csv
import errno
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rcnn_svm.cli import main
from rcnn_svm.datasets import digits_splits, load_splits, write_dataset
from rcnn_svm.datasets.convert import convert_dataset
from rcnn_svm.datasets.dividing import divide_dataset, groups_by_pattern, groups_in_table, stratified
from rcnn_svm.datasets.duplicates import find_duplicates
from rcnn_svm.datasets.loading import load_all_splits
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.structures import Dataset, GroundTruth, Sample

CLASSES = ("zebra", "ant & bee", "never seen")
SIZE = (37, 53)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)


@st.composite
def parts(draw):
    """Two or three splits of a few images with whole boxes, some crowded or difficult."""
    made, n = {}, 0
    for name in ("train", "val", "test")[: draw(st.integers(2, 3))]:
        samples = []
        for _ in range(draw(st.integers(1, 2))):
            corners = draw(
                st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=3, unique=True)
            )
            low = np.array(corners, np.float32).reshape(-1, 2)
            boxes = np.concatenate([low, low + np.array([11, 6])], axis=1)
            labels = [draw(st.integers(0, 1)) for _ in corners]
            flags = np.array([draw(st.booleans()) for _ in corners], bool)
            truth = GroundTruth(boxes, labels, flags)
            samples.append(Sample(f"im{n}", SIZE, truth, render=functools.partial(noise, n)))
            n += 1
        made[name] = Dataset("d", name, CLASSES, tuple(samples))
    return made


@settings(deadline=None, max_examples=8)
@given(parts(), st.permutations(["voc", "coco", "yolo"]))
def test_there_and_back_keeps_splits_classes_and_boxes(made, route):
    with tempfile.TemporaryDirectory() as folder:
        root = write_dataset(made, Path(folder) / "start", route[0])
        for i, format in enumerate([*route[1:], route[0]]):
            convert_dataset(root, format, Path(folder) / str(i))
            root = Path(folder) / str(i)
        back = load_all_splits(root)
        pixels = {one.image_id: one.read() for part in back.values() for one in part}
    assert set(back) == set(made)
    for name, part in made.items():
        assert back[name].classes == CLASSES
        assert [one.image_id for one in back[name]] == [one.image_id for one in part]
        for old, new in zip(part, back[name], strict=True):
            np.testing.assert_array_equal(pixels[old.image_id], old.read())
            np.testing.assert_allclose(new.truth.boxes, old.truth.boxes, rtol=0, atol=1e-4)
            np.testing.assert_array_equal(new.truth.labels, old.truth.labels)
            assert not new.truth.difficult.any()  # YOLO was on the way


def test_what_a_format_cannot_hold_is_said(tmp_path, capsys):
    truth = GroundTruth([[0.4, 1, 10, 9], [2, 2, 8, 8]], [0, 1], crowd=[False, True], area=[5, 36])
    one = Sample("a", SIZE, truth, render=functools.partial(noise, 0))
    coco = write_dataset([Dataset("d", "default", CLASSES, (one,))], tmp_path / "coco", "coco")
    convert_dataset(coco, "voc", tmp_path / "voc")
    said = capsys.readouterr().err
    assert "VOC has whole pixels: 1 of 2 boxes are rounded, by 0.4 pixels at most." in said
    assert "VOC has no crowds: 1 become difficult objects." in said
    assert "VOC has no area but the box's: that of 1 of 2 objects is lost." in said
    convert_dataset(coco, "yolo", tmp_path / "yolo")
    said = capsys.readouterr().err
    assert "The split default becomes train, which tools that read YOLO look for." in said
    assert "1 difficult or crowd objects were written as plain ones" in said


def test_flags_stay_in_voc_and_are_said_to_be_lost_elsewhere(tmp_path, capsys):
    flags = {"occluded": [False, False], "truncated": [True, False]}
    truth = GroundTruth([[1, 1, 9, 9], [2, 2, 8, 8]], [0, 1], flags=flags)
    one = Sample("a", SIZE, truth, render=functools.partial(noise, 0))
    voc = write_dataset([Dataset("d", "train", CLASSES, (one,))], tmp_path / "voc", "voc")
    convert_dataset(voc, "voc", tmp_path / "again")
    back = load_all_splits(tmp_path / "again")["train"].samples[0].truth
    assert {name: flag.tolist() for name, flag in back.flags.items()} == flags
    assert "flags" not in capsys.readouterr().err
    for format in ("coco", "yolo"):
        convert_dataset(voc, format, tmp_path / format)
        said = capsys.readouterr().err
        assert f"{format.upper()} has no flags such as truncated: those of 1 of 2 objects are lost." in said


def test_splits_without_a_name_in_yolo(tmp_path):
    truth = GroundTruth([[1, 1, 9, 9]], [0])
    both = [
        Dataset("d", name, CLASSES, (Sample(name, SIZE, truth, render=functools.partial(noise, 1)),))
        for name in ("monday", "tuesday")
    ]
    root = write_dataset(both, tmp_path / "voc", "voc")
    with pytest.raises(
        ConfigError, match="YOLO knows the splits train, val and test, must have one for each"
    ):
        convert_dataset(root, "yolo", tmp_path / "yolo")
    assert not (tmp_path / "yolo").exists()


def test_whole_images_are_not_converted(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(noise(3)).save(tmp_path / "data" / name / f"{name}.png")
    assert (
        main(["data", "convert", str(tmp_path / "data"), "--to", "coco", "--out", str(tmp_path / "out")]) == 2
    )
    assert (
        "must label boxes to be written as VOC, COCO or YOLO, labels whole images" in capsys.readouterr().err
    )


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_stratified_parts_have_their_shares(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    counts = (rng.random((data.draw(st.integers(30, 80)), 4)) < [0.5, 0.3, 0.2, 0.1]).astype(np.int64)
    shares = np.array([0.6, 0.2, 0.2])
    part = stratified(counts, np.ones(len(counts), np.int64), shares, rng)
    assert set(part) <= {0, 1, 2}
    for p in range(3):
        assert abs((part == p).sum() - shares[p] * len(counts)) <= 4
        off = counts[part == p].sum(axis=0) - shares[p] * counts.sum(axis=0)
        assert np.abs(off).max() <= 4


def photographs(n: int) -> Dataset:
    """Images of four to a camera; 3 is a copy of 2, 5 is 4 brightened, the last a copy of the first."""
    samples = []
    for i in range(n):
        pixels = noise({3: 2, 5: 4, n - 1: 0}.get(i, i))
        if i == 5:
            pixels = np.clip(pixels.astype(int) + 8, 0, 255).astype(np.uint8)
        truth = GroundTruth([[1, 1, 9, 9]], [i % 2])
        samples.append(Sample(f"cam{i // 4}-{i}", SIZE, truth, render=lambda pixels=pixels: pixels))
    return Dataset("d", "all", CLASSES[:2], tuple(samples))


def test_copies_are_found():
    found = find_duplicates(photographs(9).samples)
    assert [(one.first, one.second, one.identical) for one in found] == [
        (0, 8, True),
        (2, 3, True),
        (4, 5, False),
    ]
    assert find_duplicates([]) == []


def test_pictures_without_edges_are_told_by_their_colour():
    def plain(grey: int) -> Sample:
        pixels = np.full((*SIZE, 3), grey, np.uint8)
        return Sample(str(grey), SIZE, GroundTruth.empty(), render=lambda: pixels)

    found = find_duplicates([plain(10), plain(20), plain(200)])
    assert [(one.first, one.second) for one in found] == [(0, 1)]


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 100), st.integers(16, 40))
def test_groups_and_copies_stay_on_one_side(seed, n):
    dataset = photographs(n)
    division = divide_dataset(dataset, (50, 25, 25), groups_by_pattern(dataset, r"cam\d+"), seed=seed)
    side = {one.image_id: name for name, part in division.parts.items() for one in part}
    assert sorted(side) == sorted(one.image_id for one in dataset)
    for camera in set(division.groups.values()):
        assert len({side[name] for name, group in division.groups.items() if group == camera}) == 1
    assert side["cam0-0"] == side[f"cam{(n - 1) // 4}-{n - 1}"]


@pytest.mark.parametrize("format", ["coco", "yolo"])
def test_supervision_reads_links(tmp_path, format):
    supervision = pytest.importorskip("supervision")
    root = write_dataset([photographs(8)], tmp_path / "start", format)
    out = tmp_path / "out"
    assert main(["data", "split", str(root), "--out", str(out), "--shares", "1,1,0"]) == 0
    if format == "coco":
        file = out / "annotations" / "instances_train.json"
        theirs = supervision.DetectionDataset.from_coco(str(out / "images"), str(file))
    else:
        folders = [str(out / name / "train") for name in ("images", "labels")]
        theirs = supervision.DetectionDataset.from_yolo(*folders, str(out / "data.yaml"))
    boxes = {Path(name).stem: found.xyxy for name, _, found in theirs}
    ours = load_all_splits(out)["train"]
    assert set(boxes) == {one.image_id for one in ours}
    for one in ours:
        np.testing.assert_allclose(boxes[one.image_id], one.truth.boxes, atol=0.01)


def test_groups_that_are_none(tmp_path):
    dataset = photographs(4)
    with pytest.raises(ConfigError, match=r"matches none, such as 'cam0-0'"):
        groups_by_pattern(dataset, "patient")
    with pytest.raises(ConfigError, match="must be a regular expression"):
        groups_by_pattern(dataset, "(")
    table = tmp_path / "groups.csv"
    table.write_text("image,site\ncam0-0,north\n")
    with pytest.raises(DataError, match="lacks group, has image, site"):
        groups_in_table(dataset, table, "group")
    with pytest.raises(DataError, match="lacks cam0-1"):
        groups_in_table(dataset, table, "site")
    with pytest.raises(DataError, match="test gets no image: there are only 1 groups"):
        divide_dataset(dataset, (1, 0, 1), dict.fromkeys((s.image_id for s in dataset), "x"))
    with pytest.raises(ConfigError, match="three numbers"):
        divide_dataset(dataset, (1, -1, 1))


@pytest.mark.parametrize("copy", [False, True])
def test_a_divided_data_set_is_read_back(tmp_path, copy, capsys):
    splits = digits_splits(10, 4, 4, seed=3)
    root = write_dataset([splits.train, splits.val, splits.test], tmp_path / "coco", "coco")
    out = tmp_path / "out"
    command = ["data", "split", root, "--out", out, "--shares", "1,0,1", "--seed", "1", *["--copy"] * copy]
    assert main([str(word) for word in command]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("train: 9 images, with 0 ")
    back = load_splits(out)
    assert (len(back.trainval), len(back.test)) == (9, 9)
    files = [one.path for one in (*back.trainval, *back.test)]
    assert all((file.stat().st_nlink == 1) == copy for file in files)
    with open(out / "splits.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["image"] for row in rows if row["split"] == "test"} == {one.image_id for one in back.test}
    assert main(["data", "split", str(root), "--out", str(tmp_path / "no"), "--shares", "1,two,3"]) == 2


def test_another_file_system_is_told(tmp_path, monkeypatch):
    root = write_dataset([photographs(4)], tmp_path / "start", "voc")

    def refuse(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(ConfigError, match=r"cam0-0.png: cannot be linked .*Copy the images \(--copy\)"):
        write_dataset(load_all_splits(root), tmp_path / "out", "voc", link=True)
    assert not (tmp_path / "out").exists()
