"""`data review` and `data next` from the command line."""

from __future__ import annotations

import csv

import pytest

from rcnn_svm.datasets.digits import digits_in_scenes
from rcnn_svm.datasets.write import write_dataset
from tests.cli.conftest import TINY


def test_review_lists_every_object(run, detector_folder, digits_folder, tmp_path, capsys):
    tiny = [word for word in TINY if word not in ("--learn", "nothing")]
    out = tmp_path / "review"
    cache = detector_folder.parent / "cache"  # of the same proposals
    words = ["data", "review", digits_folder, "--out", out, "--cache", cache, "--folds", "2", *tiny]
    assert run(*words) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("1. ")
    with open(out / "review.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    assert len(rows) >= sum(row["class"] != "" for row in rows) > 24
    assert f"{len(rows)} findings" in printed.err


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    scenes = digits_in_scenes("train", 6, seed=77)
    return write_dataset([scenes], tmp_path_factory.mktemp("new") / "voc", "voc") / "VOC2007" / "JPEGImages"


def test_next_lists_new_images_alone(run, detector_folder, digits_folder, unlabelled, tmp_path, capsys):
    out = tmp_path / "next"
    assert run("data", "next", detector_folder, unlabelled, digits_folder, "--out", out, "--n", "4") == 0
    assert "24 of 30 images are labelled: the detector knows them." in capsys.readouterr().err
    with open(out / "next.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert (out / "next.txt").read_text().splitlines() == [row["file"] for row in rows]
    assert all(str(unlabelled) in row["file"] for row in rows)
    assert (out / "index.html").read_text().count("<figure>") == 4
    assert run("data", "next", detector_folder, unlabelled, "--out", out, "--n", "40") == 0
    assert "There are only 6 images, which are all listed." in capsys.readouterr().err
    assert (out / "next.txt").read_text().splitlines()[:4] == [row["file"] for row in rows]


def test_next_without_an_image_to_label(run, detector_folder, digits_folder, tmp_path, capsys):
    assert run("data", "next", detector_folder, digits_folder, "--out", tmp_path / "a", "--n", "0") == 2
    assert "--n must be at least 1, got 0." in capsys.readouterr().err
    assert run("data", "next", detector_folder, digits_folder, "--out", tmp_path / "a") == 3
    assert "There must be an image that the detector was not made with" in capsys.readouterr().err
