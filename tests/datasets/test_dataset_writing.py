from __future__ import annotations

import errno
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rcnn_svm.datasets import digits_splits, load_dataset, load_splits, write, write_dataset
from rcnn_svm.datasets.images import read_image
from rcnn_svm.errors import ConfigError, DataError, DiskSpaceError
from rcnn_svm.structures import Dataset, GroundTruth, Sample

CLASSES = ("zebra", "ant & bee", "7", "never seen")
SIZE = (37, 53)


def plain(colour):
    return np.full((*SIZE, 3), colour, np.uint8)


def boxes_in(draw, whole):
    """Draw one box inside the image, of 2 pixels a side or more where it is whole."""
    corner = st.integers if whole else functools.partial(st.floats, width=32)
    sides = []
    for length in (SIZE[1], SIZE[0]):
        low = draw(corner(0, length - 3))
        high = draw(corner(1, length)) if not whole else draw(st.integers(low + 2, length))
        sides.append((low, max(high, low + 1)))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


@st.composite
def datasets(draw, whole=False):
    samples = []
    for i in range(draw(st.integers(1, 3))):
        n = draw(st.integers(0, 3))
        boxes = np.array([boxes_in(draw, whole) for _ in range(n)], np.float32).reshape(-1, 4)
        labels = np.array([draw(st.integers(0, 2)) for _ in range(n)], np.int64)
        flags = np.array([draw(st.booleans()) for _ in range(n)], bool)
        areas = np.array([draw(st.floats(0, 5000)) for _ in range(n)])
        truth = GroundTruth(boxes, labels, flags, ~flags if whole is None else np.zeros(n, bool), areas)
        samples.append(Sample(f"{i}-ü", SIZE, truth, render=functools.partial(plain, i)))
    return Dataset("d", "train", CLASSES, tuple(samples))


def round_trip(dataset, format):
    with tempfile.TemporaryDirectory() as folder:
        root = write_dataset([dataset], Path(folder) / "out", format)
        back = load_dataset(root, "train")
        pixels = [sample.read() for sample in back]
    assert back.classes == dataset.classes
    assert [sample.image_id for sample in back] == [sample.image_id for sample in dataset]
    for old, new, image in zip(dataset, back, pixels, strict=True):
        assert new.size == old.size
        np.testing.assert_array_equal(image, old.read())
        # Next to zero a box relative to the image's size keeps absolute precision only.
        np.testing.assert_allclose(
            new.truth.boxes, old.truth.boxes, rtol=0, atol=1e-12 if format == "yolo" else 0
        )
        np.testing.assert_array_equal(new.truth.labels, old.truth.labels)
    return back


@settings(deadline=None, max_examples=15)
@given(datasets(whole=True))
def test_voc_returns_whole_boxes_and_flags(dataset):
    back = round_trip(dataset, "voc")
    for old, new in zip(dataset, back, strict=True):
        np.testing.assert_array_equal(new.truth.difficult, old.truth.difficult)


@settings(deadline=None, max_examples=15)
@given(datasets(whole=False))
def test_coco_returns_every_float_flag_and_area(dataset):
    back = round_trip(dataset, "coco")
    for old, new in zip(dataset, back, strict=True):
        np.testing.assert_array_equal(new.truth.difficult, old.truth.difficult)
        np.testing.assert_array_equal(new.truth.crowd, old.truth.crowd)
        np.testing.assert_array_equal(new.truth.area, old.truth.area)


@settings(deadline=None, max_examples=15)
@given(datasets(whole=False))
def test_yolo_returns_every_float(dataset):
    round_trip(dataset, "yolo")


@pytest.mark.parametrize("format", ["voc", "coco", "yolo"])
def test_all_splits_return(tmp_path, format):
    splits = digits_splits(4, 2, 3, seed=9)
    parts = {"train": splits.train, "val": splits.val, "trainval": splits.trainval, "test": splits.test}
    back = load_splits(write_dataset(parts, tmp_path / "out", format))
    assert back.notes == ()
    for name, part in parts.items():
        new = {sample.image_id: sample for sample in getattr(back, name)}
        assert set(new) == {sample.image_id for sample in part}
        for sample in part:
            np.testing.assert_array_equal(new[sample.image_id].truth.boxes, sample.truth.boxes)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 9


def test_voc_rounds_and_keeps_two_pixels():
    truth = GroundTruth([[0.4, 1.5, 10.49, 9.5], [51.6, 36.5, 53, 37], [3, 3, 3.2, 3.2]], [0, 0, 0])
    sample = Sample("a", SIZE, truth)
    np.testing.assert_array_equal(
        write.whole_pixels(sample), [[0, 2, 10, 10], [51, 35, 53, 37], [3, 3, 5, 5]]
    )
    with pytest.raises(DataError) as caught:
        write.whole_pixels(Sample("a", (1, 9), GroundTruth([[0, 0, 1, 1]], [0])))
    assert str(caught.value) == "Sample('a'): must be 2 or more pixels wide and high for VOC, got (1, 9)."


def test_flags_that_a_format_lacks(tmp_path, capsys):
    flags = {"occluded": [False, True], "truncated": [True, False]}
    truth = GroundTruth([[1, 1, 9, 9], [2, 2, 8, 8]], [0, 1], [False, False], [True, False], flags=flags)
    data = Dataset("d", "train", CLASSES, (Sample("a", SIZE, truth, render=functools.partial(plain, 3)),))
    voc = load_dataset(write_dataset([data], tmp_path / "v", "voc"), "train").samples[0].truth
    assert voc.difficult.tolist() == [True, False]
    assert {name: flag.tolist() for name, flag in voc.flags.items()} == flags
    assert capsys.readouterr().err == ""
    load_dataset(write_dataset([data], tmp_path / "y", "yolo"), "train")
    assert capsys.readouterr().err == (
        "YOLO has no flags: 1 difficult or crowd objects were written as plain ones.\n"
    )


def test_files_are_copied_byte_for_byte(tmp_path, put):
    path = put(tmp_path / "sub" / "x.JPG", SIZE)
    data = Dataset(
        "d", "train", CLASSES, (Sample("sub/x", SIZE, GroundTruth([[1, 1, 9, 9]], [0]), path=path),)
    )
    for format in ("voc", "coco", "yolo"):
        (sample,) = load_dataset(write_dataset([data], tmp_path / format, format), "train")
        assert sample.image_id == "sub_x"
        assert sample.path.read_bytes() == path.read_bytes()


def test_unturned_labels_stay_right_in_yolo(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    reader = functools.partial(read_image, labelled_size=SIZE)
    old = Sample("x", SIZE, GroundTruth([[1, 1, 9, 9]], [0]), path=tmp_path / "x.png", reader=reader)
    data = Dataset("d", "train", CLASSES, (old,))
    for format in ("voc", "coco", "yolo"):
        (sample,) = load_dataset(write_dataset([data], tmp_path / format, format), "train")
        np.testing.assert_array_equal(sample.read(), old.read())


def test_jpeg_is_close_and_smaller(tmp_path):
    splits = digits_splits(1, 1, 1)
    data = load_dataset(write_dataset([splits.train], tmp_path / "j", "coco", encoding="jpg"), "train")
    (sample,) = data
    difference = sample.read().astype(int) - splits.train.samples[0].read()
    assert np.abs(difference).mean() < 4
    assert sample.path.suffix == ".jpg"


def test_what_is_refused(tmp_path, put):
    truth = GroundTruth.empty()
    one = Sample("a", SIZE, truth, render=functools.partial(plain, 0))
    other = Sample("a", SIZE, truth, render=functools.partial(plain, 1))
    train, val = Dataset("d", "train", CLASSES, (one,)), Dataset("d", "val", CLASSES, (other,))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    cases = [
        (
            ([train], tmp_path / "a", "vox"),
            "write_dataset: format must be one of voc, coco, yolo, got 'vox'.",
        ),
        (
            ([train], tmp_path / "full"),
            f"{tmp_path}/full: must be an empty or a new folder, is not. Remove it or choose another one.",
        ),
        (([], tmp_path / "a"), "write_dataset: splits must name at least one data set, got none."),
        (
            ([train, val], tmp_path / "a"),
            "write_dataset: image id 'a' must stand for one image, stands for two.",
        ),
        (
            ([train, Dataset("d", "val", ("x",), ())], tmp_path / "a"),
            "write_dataset: the splits train, val must have the same classes.",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ConfigError) as caught:
            write_dataset(*arguments)
        assert str(caught.value) == message
    with pytest.raises(ConfigError) as caught:
        write_dataset([train], tmp_path / "a", encoding="gif")
    assert str(caught.value) == "write_dataset: encoding must be png or jpg, got 'gif'."
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("failure", ["full", "gone", "interrupted"])
def test_nothing_half_written_is_left(tmp_path, monkeypatch, failure):
    def fail():
        if failure == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise KeyboardInterrupt

    good = Sample("a", SIZE, GroundTruth.empty(), render=functools.partial(plain, 0))
    gone = Sample("b", SIZE, GroundTruth.empty(), path=tmp_path / "gone.png")
    bad = gone if failure == "gone" else Sample("b", SIZE, GroundTruth.empty(), render=fail)
    data = Dataset("d", "train", CLASSES, (good, bad))
    kind = {"full": DiskSpaceError, "gone": DataError, "interrupted": KeyboardInterrupt}[failure]
    with pytest.raises(kind) as caught:
        write_dataset([data], tmp_path / "out", "voc")
    messages = {
        "full": f"{tmp_path}/out: the disk is full; nothing was kept. Free some space or choose another "
        "folder.",
        "gone": f"{tmp_path}/gone.png: no such image file.",
        "interrupted": "",
    }
    assert str(caught.value) == messages[failure]
    assert list(tmp_path.iterdir()) == []
