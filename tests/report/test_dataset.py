from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rcnn_svm.datasets import check_dataset, digits_splits, write_dataset
from rcnn_svm.errors import DataError
from rcnn_svm.report.dataset import write_dataset_picture
from rcnn_svm.structures import Dataset, GroundTruth, Sample


@pytest.fixture
def digits(tmp_path):
    """A sound data set on disk."""
    splits = digits_splits(8, 8, 8)
    return write_dataset([splits.train, splits.val, splits.test], tmp_path / "digits", "yolo")


def write_nothing(folder, classes):
    """Write a data set of one image without an object."""
    sample = Sample("a", (40, 60), GroundTruth.empty(), render=lambda: np.zeros((40, 60, 3), np.uint8))
    return write_dataset([Dataset("nothing", "train", classes, (sample,))], folder, "yolo")


def test_the_picture_of_a_data_set(digits, tmp_path):
    write_dataset_picture(tmp_path / "report.png", check_dataset(digits))
    picture = np.asarray(Image.open(tmp_path / "report.png").convert("RGB"))
    assert picture.shape[1] == 1430
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000


def test_images_that_cannot_be_read_are_no_examples(digits, tmp_path):
    broken = sorted((digits / "images").rglob("*.png"))[0]
    broken.write_bytes(broken.read_bytes()[:100])
    write_dataset_picture(tmp_path / "report.png", check_dataset(digits), n_examples=24)
    sound = check_dataset(digits, decode=False)  # which sees headers only
    with pytest.raises(DataError, match="is a damaged image"):
        write_dataset_picture(tmp_path / "report.png", sound, n_examples=24)


@pytest.mark.parametrize("classes", [("x",), tuple(f"class {i}" for i in range(30))], ids=["one", "many"])
def test_pictures_of_nothing_and_of_many_classes(classes, tmp_path):
    report = check_dataset(write_nothing(tmp_path / "data", classes))
    write_dataset_picture(tmp_path / "report.png", report, n_examples=3)
    assert (tmp_path / "report.png").stat().st_size > 5000
