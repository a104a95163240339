"""`explain`: pictures, a page and numbers that add up, for heads with cells and with support vectors."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rcnn_svm.cli import main
from rcnn_svm.datasets import load_splits
from rcnn_svm.detector import load_detector
from rcnn_svm.heads.scorers import KernelScorer
from rcnn_svm.structures import Sample
from tests.cli.conftest import TINY, Run
from tests.cli.test_bad_input import sentence


@pytest.fixture(scope="module")
def kernel_folder(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector with an RBF SVM."""
    folder = tmp_path_factory.mktemp("kernel")
    arguments = ["train", digits_folder, "--out", folder / "detector", "--cache", folder / "cache", *TINY]
    arguments += [
        "--head",
        "rbf-svm",
        "--no-choice",
        "--set",
        "features.precision=float32",
        "--set",
        "folds=0",
    ]
    assert main([str(a) for a in arguments]) == 0
    return folder / "detector"


@pytest.fixture(scope="module")
def photo(digits_folder: Path) -> Path:
    return sorted((digits_folder / "images" / "test").iterdir())[0]


def read(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "evidence.json").read_text())
    return values


def test_cells_of_a_linear_head_add_up(
    run: Run, detector_folder: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("explain", detector_folder, photo, "--out", tmp_path, "--threshold", "-9", "--top", "2") == 0
    values = read(tmp_path)
    printed = capsys.readouterr().out.split()
    assert printed[::2] == [one["class"] for one in values["detections"]]
    assert len(values["detections"]) == 2
    for one in values["detections"]:
        (cells,) = one["cells"]
        assert cells["tap"] == "fc7"
        assert np.shape(cells["shares"]) == (5, 5)
        total = np.sum(cells["shares"]) + math.fsum(one["constants"].values())
        assert total == pytest.approx(one["score_of_region"], abs=1e-4)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"index.html", "evidence.json", "evidence-1.svg", "evidence-2.svg"}
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "http" not in page.replace("https://www.w3.org", "")


def test_training_regions_that_spoke_are_shown(
    run: Run,
    kernel_folder: Path,
    digits_folder: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("explain", kernel_folder, photo, "--threshold", "-9", "--top", "1", "--out")
    assert run(*words, tmp_path / "shown", "--data", digits_folder) == 0
    assert run(*words, tmp_path / "named") == 0
    assert "--data DATA shows them" in capsys.readouterr().err
    values = read(tmp_path / "shown")
    assert values == read(tmp_path / "named")
    (one,) = values["detections"]
    total = math.fsum([term["share"] for term in one["support"]]) + one["constants"]["bias"]
    assert total == pytest.approx(one["score_of_region"], abs=1e-4)
    shown, named = ((tmp_path / name / "evidence-1.svg").read_text() for name in ("shown", "named"))
    assert shown.count("<image") == named.count("<image") + 10
    assert one["support"][0]["image"] in named


def test_support_vectors_are_the_regions_that_they_are_told_to_be(
    kernel_folder: Path, digits_folder: Path
) -> None:
    detector = load_detector(kernel_folder)
    scorer, told, scaler = detector.model.scorer, detector.model.support, detector.model.scaler
    assert isinstance(scorer, KernelScorer)
    assert told is not None
    assert scaler is not None
    samples: dict[str, Sample] = {s.image_id: s for s in load_splits(digits_folder).trainval}
    for s in range(0, len(told), max(1, len(told) // 6)):
        sample = samples[told.image_ids[s]]
        row = scaler(detector.featurizer(sample.read(), told.boxes[s : s + 1]))[0]
        np.testing.assert_allclose(row, scorer.support[s], atol=1e-5)
        if told.overlaps[s] == 1:
            assert told.labels[s] in sample.truth.labels
    positive = scorer.dual_coef > 0
    assert positive.any()
    for k, s in np.argwhere(positive):  # the labels of R-CNN's rule: objects themselves
        assert told.labels[s] == k
        assert told.overlaps[s] == 1


def test_wrong_words(
    run: Run, detector_folder: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(*more: str | Path, image: Path = photo) -> tuple[int, str]:
        code = run("explain", detector_folder, image, "--out", tmp_path / "out", *more)
        return code, sentence(capsys)

    code, text = says("--threshold", "1000")
    assert code == 3
    assert "got no object that scores enough; the surest is" in text
    code, text = says("--class", "zebra")
    assert (code, "--class must be one of 0, 1, 2" in text) == (2, True)
    code, text = says("--class", "7", "--threshold", "1000")
    assert (code, "got no 7 that scores enough; the surest is 7 at" in text) == (3, True)
    assert says("--top", "0") == (2, "rcnn-svm: --top must be at least 1, got 0.")
    code, text = says(image=tmp_path / "nothing.png")
    assert (code, "nothing.png: no such file" in text) == (3, True)
    code, text = says(image=photo.parent)
    assert (code, "must be an image file, got a folder" in text) == (2, True)
    (tmp_path / "empty.png").write_text("")
    assert says(image=tmp_path / "empty.png")[0] == 3
    assert not (tmp_path / "out").exists()


def test_an_image_in_which_nothing_is_found(
    run: Run, detector_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(tmp_path / "dot.png")
    code = run(
        "explain", detector_folder, tmp_path / "dot.png", "--out", tmp_path / "out", "--threshold", "99"
    )
    assert code == 3
    assert "dot.png: must show something" in sentence(capsys)


def test_training_images_that_are_gone_are_told(
    run: Run,
    kernel_folder: Path,
    digits_folder: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("explain", photo, "--out", tmp_path / "out", "--threshold", "-9", "--data")
    other = tmp_path / "other"
    assert (
        run("data", "digits", "--out", other, "--train", "3", "--val", "1", "--test", "1", "--seed", "9") == 0
    )
    capsys.readouterr()
    bare = tmp_path / "detector"
    shutil.copytree(kernel_folder, bare)
    (bare / "splits.json").unlink()
    for detector in (kernel_folder, bare):
        assert run(words[0], detector, *words[1:], other) == 3
        assert "must hold the" in sentence(capsys)
    assert not (tmp_path / "out").exists()
