"""Whole images on the command line, from labels to a report, and what makes no sense for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn_svm import load_detector, load_splits, read_image, train_detector
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig, HeadsConfig
from rcnn_svm.features.build import FeatureConfig
from rcnn_svm.training.config import FcConfig
from tests.cli.conftest import TINY, Run

RED, GREEN = (200, 40, 40), (40, 180, 60)


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that any network can tell apart: 12 mostly red, 9 mostly green."""
    root, rng = tmp_path_factory.mktemp("whole") / "balls", np.random.default_rng(0)
    for name, colour, n in (("red", RED, 12), ("green", GREEN, 9)):
        (root / name).mkdir(parents=True)
        for i in range(n):
            noise = rng.integers(-30, 30, (24, 32, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}{i}.png")
    return root


def test_a_folder_per_class_is_compared_reported_and_used(run: Run, balls: Path, tmp_path: Path) -> None:
    heads = ["--heads", "linear-svm,rbf-svm,softmax-refit", "--cache", tmp_path / "cache"]
    assert run("compare", balls, "--out", tmp_path / "compared", *heads, *TINY) == 0
    metrics = json.loads((tmp_path / "compared" / "metrics.json").read_text())
    assert set(metrics["heads"]) == {"linear-svm", "rbf-svm", "softmax-refit"}  # none with boxes regressed
    for head in metrics["heads"].values():
        own = head["classification"]
        assert "coco" not in head
        assert own["accuracy"] == own["balanced_accuracy"] == head["mAP"] == 100
        assert np.trace(own["confusion"]) == metrics["n_test_images"] == 4
    assert len(metrics["accuracy_differences"]) == 3
    table = (tmp_path / "compared" / "comparison.md").read_text()
    for words in (
        "| accuracy |",
        "balanced accuracy",
        "taken for",
        "difference in accuracy",
        "difference in mAP",
    ):
        assert words in table
    assert "COCO" not in table
    page = (tmp_path / "compared" / "report.html").read_text()
    for words in ("Heads by accuracy", "What images are taken for", "images of each class"):
        assert words in page or words.capitalize() in page
    for words in ("Missed objects", "Best and worst", "similar class"):
        assert words not in page


def test_a_classifier_is_trained_saved_and_used(
    run: Run, balls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = tmp_path / "detector"
    assert run("train", balls, "--out", detector, "--cache", tmp_path / "cache", *TINY) == 0
    said = capsys.readouterr()
    assert "Regions:  each image is one: no proposals, NMS and box regression" in said.err
    assert "Quality:  100.0 % accuracy on the 4 images of test" in said.err
    assert run("detect", detector, balls, "--out", tmp_path / "found") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert all(f": {Path(line.split(':')[0]).parent.name} " in line for line in lines)  # the class, its score
    found = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert all(one["boxes"] == [[0, 0, 32, 24]] for one in found["images"])
    words = ["--all", "--no-pictures", "--format", "yolo,labelstudio", "--label-studio-root", balls]
    assert run("detect", detector, balls, "--out", tmp_path / "all", *words) == 0
    texts = sorted((tmp_path / "all" / "yolo" / "labels").rglob("*.txt"))
    assert all(
        line.split()[1:5] == ["0.5", "0.5", "1.0", "1.0"] for line in texts[0].read_text().splitlines()
    )
    found = json.loads((tmp_path / "all" / "detections.json").read_text())
    assert all(sorted(one["labels"]) == [0, 1] for one in found["images"])
    capsys.readouterr()
    report = tmp_path / "report"
    assert run("evaluate", detector, balls, "--out", tmp_path / "evaluation", "--report", report) == 0
    assert 'id="confusion"' in (report / "report.html").read_text()
    assert "Accuracy 100.0 %, balanced 100.0 %, 4 images" in capsys.readouterr().out
    values = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert set(values) == {"voc", "classification"}
    assert load_detector(detector).whole_images


def test_in_python_too(balls: Path) -> None:
    splits = load_splits(balls)
    tiny = ExperimentConfig(
        data=DataConfig(whole_images=True),
        features=FeatureConfig("small_cnn", "random", "warped", "fc7"),
        fc=FcConfig(hidden=(16,), n_steps=20),
        heads=HeadsConfig(names=("softmax-finetuned",)),
        n_bootstrap=10,
    )
    result = train_detector(splits, tiny.build())  # fc layers, which have no background to learn from
    assert result.coco is None
    assert result.classification is not None
    assert result.classification.accuracy == 1
    assert "Classification(100.0 % of 4 images)" in repr(result)
    sample = splits.test.samples[0]
    assert sample.path is not None
    found = result.detector.detect(read_image(sample.path))
    assert (len(found), found.labels[0]) == (2, sample.truth.labels[0])
    with pytest.raises(ConfigError, match="labels whole images, whose only region is the image"):
        train_detector(splits, ExperimentConfig().build())


def test_boxes_can_say_which_classes_an_image_has(
    run: Run, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", tmp_path / "d", "--cache", tmp_path / "cache", "--skip-absent-classes", *TINY]
    assert run("train", digits_folder, "--whole-images", *options) == 0
    head = json.loads((tmp_path / "d" / "evaluation" / "metrics.json").read_text())["heads"]["linear-svm"]
    assert "classification" not in head  # several classes an image
    assert "thresholds" in head["details"]
    capsys.readouterr()
    assert run("evaluate", tmp_path / "d", digits_folder) == 0
    out = capsys.readouterr().out
    assert f"mean{head['mAP']:>14.1f}"[-6:] in out
    assert "Accuracy" not in out


def test_the_digits_are_studied_by_what_makes_a_difference(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cache", tmp_path / "cache", "--max-images", "30", *TINY]
    once = ["--factors", "loss", "--seeds", "1", "--no-curve"]
    assert run("study", "digits-images", "--out", tmp_path / "study", *once, *options) == 0
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    assert {effect["factor"] for effect in study["effects"]} == {"loss"}  # and not boxes
    assert {effect["kind"] for effect in study["effects"]} == {"effect", "effect on accuracy"}
    assert {row["head"] for row in study["probabilities"]} == {"linear SVM", "softmax"}
    assert all(cell["accuracy_low"] <= cell["accuracy"] <= cell["accuracy_high"] for cell in study["cells"])
    frozen = [word for word in options if word not in ("--learn", "nothing")]  # as curves are anyway
    assert run("curve", "digits-images", "--out", tmp_path / "curve", "--draws", "1", *frozen) == 0
    curve = json.loads((tmp_path / "curve" / "curve.json").read_text())
    assert all(0 <= point["balanced_accuracy"] <= 100 for point in curve["points"])
    assert "| accuracy | 95 % interval |" in (tmp_path / "curve" / "README.md").read_text()
    assert run("study", "digits-images", "--out", tmp_path / "no", "--factors", "label,loss", *options) == 2
    assert "must make a difference on whole images" in capsys.readouterr().err
    assert run("train", "digits-images", "--out", tmp_path / "no", "--set", "learn=trunk") == 2
    assert "learn=trunk draws many regions of an image, whole images have one" in capsys.readouterr().err
