"""Learning curves: draws, and a run from end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from rcnn_svm.experiment.curve import draw_images
from rcnn_svm.structures import Dataset, GroundTruth, Sample
from tests.cli.conftest import Run, digits_folder, run  # noqa: F401


def dataset(labels: list[list[int]], n_classes: int) -> Dataset:
    samples = tuple(
        Sample(f"{i}", (9, 9), GroundTruth(np.tile(np.float32([[0, 0, 5, 5]]), (len(own), 1)), np.array(own)))
        for i, own in enumerate(labels)
    )
    return Dataset("made up", "train", tuple("abcdefgh"[:n_classes]), samples)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_draw_holds_enough_of_each_class_and_few_more(n: int) -> None:
    rng = np.random.default_rng(n)
    labels = [sorted(set(rng.integers(0, 4, 2).tolist())) for _ in range(60)]
    data = dataset(labels, 4)
    draw = draw_images(data, n, np.random.default_rng(0))
    counts = np.bincount(np.concatenate([s.truth.labels for s in draw]), minlength=4)
    assert (counts >= n).all()
    assert len(draw) <= 4 * n
    again = draw_images(data, n, np.random.default_rng(0))
    assert [s.image_id for s in again] == [s.image_id for s in draw]
    other = draw_images(data, n, np.random.default_rng(1))
    assert [s.image_id for s in other] != [s.image_id for s in draw]


def test_a_class_in_few_images_gives_all_of_them() -> None:
    draw = draw_images(dataset([[0], [0], [1]], 2), 2, np.random.default_rng(0))
    assert len(draw) == 3


@pytest.mark.slow
def test_a_curve_from_images_to_a_forecast(run: Run, digits_folder: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    words = ["--backbone", "small_cnn", "--weights", "random", "--path", "warped", "--taps", "fc7"]
    words += ["--set", "proposals.max_regions=30", "--set", "proposals.min_size=10", "--draws", "2"]
    words += ["--set", "n_bootstrap=40", "--cache", tmp_path / "c"]
    assert run("curve", digits_folder, "--out", tmp_path / "s", *words) == 0
    curve = json.loads((tmp_path / "s" / "curve.json").read_text())
    assert "\n".join(curve["verdict"]) in capsys.readouterr().out
    points = list(csv.DictReader((tmp_path / "s" / "curve.csv").read_text().splitlines()))
    assert {row["head"] for row in points} == {"linear SVM", "RBF SVM", "softmax"}
    sizes = [float(row["n_images"]) for row in points if row["head"] == "softmax"]
    assert sizes == sorted(sizes)
    assert points[-1]["images_of_each_class"] == "all"
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        "README.md",
        "curve.csv",
        "curve.json",
        "curve.svg",
    }
    assert run("curve", digits_folder, "--out", tmp_path / "t", *words) == 0  # all of it is kept
    assert (tmp_path / "t" / "curve.csv").read_bytes() == (tmp_path / "s" / "curve.csv").read_bytes()
    assert run("curve", digits_folder, "--out", tmp_path / "s", "--draws", "0") == 2
