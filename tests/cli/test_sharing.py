"""Detectors that are handed on: the model card, `info`, folds, and trainings on a handful of images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcnn_svm import load_detector, write_dataset
from rcnn_svm.cli import main
from rcnn_svm.datasets.digits import digits_in_scenes
from rcnn_svm.evaluation.exchange import read_detections
from rcnn_svm.evaluation.voc import evaluate_voc
from rcnn_svm.experiment.choosing import Chosen, Variant
from rcnn_svm.experiment.selection import Choice
from rcnn_svm.heads.linear_svm import LinearSVMHead
from rcnn_svm.heads.recipe import HeadRecipe
from rcnn_svm.networks.weights import licence_of
from rcnn_svm.postprocess import PostprocessConfig
from tests.cli.conftest import TINY, Run


@pytest.fixture(scope="module")
def folded(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector that two folds were held out for."""
    folder = tmp_path_factory.mktemp("sharing")
    words = ["train", digits_folder, "--out", folder / "digits", "--cache", folder / "cache", *TINY]
    assert main([str(word) for word in [*words, "--folds", "2", "--set", "features.precision=float32"]]) == 0
    return folder / "digits"


def test_folds_give_what_was_found_in_images_unseen(folded: Path, digits_folder: Path) -> None:
    from rcnn_svm import load_splits

    metrics = json.loads((folded / "evaluation" / "metrics.json").read_text())
    ((head, crossed),) = metrics["cross_validation"].items()
    assert head == load_detector(folded).head
    assert (crossed["n_folds"], crossed["n_images"]) == (2, 19)
    assert crossed["mAP"]["low"] <= crossed["mAP"]["value"] <= crossed["mAP"]["high"]
    classes, found = read_detections(folded / "evaluation" / "out_of_fold" / f"{head}.json")
    truths = {sample.image_id: sample.truth for sample in load_splits(digits_folder).trainval}
    assert {one.image_id for one in found} == set(truths)
    again = evaluate_voc(found, [truths[one.image_id] for one in found], classes)
    assert 100 * again.map() == pytest.approx(crossed["mAP"]["value"])


def test_the_card_says_what_the_detector_is(folded: Path) -> None:
    card = (folded / "README.md").read_text(encoding="utf-8")
    metrics = json.loads((folded / "evaluation" / "metrics.json").read_text())
    detector = load_detector(folded)
    measured = metrics["heads"][detector.head]
    low, high = measured["mAP_interval"]
    assert card.startswith("---\nlibrary_name: rcnn_svm\n")
    assert f"{measured['mAP']:.1f} [{low:.1f}, {high:.1f}] mAP" in card
    assert "each found by one of 2 trainings" in card
    assert "gave the best F1 on 19 images held out" in card
    assert "Licence of the weights: none of others" in card
    assert "rcnn-svm detect digits IMAGES --out found" in card
    assert 'load_detector("digits")(read_image("photo.jpg"))' in card
    for name in detector.classes:
        assert f"| {name} " in card
    assert "&#" not in card


def test_info_prints_the_same(run: Run, folded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", folded) == 0
    text = capsys.readouterr().out
    detector = load_detector(folded)
    assert [line.split()[1] for line in text.splitlines() if line.startswith("| ")][1:] == list(
        detector.classes
    )
    assert f"Head: {detector.head}" in text
    said = " ".join(text.split())
    assert "by a curve per class" in said
    assert "from 19 images held out" in said
    assert "false detections come an image" in said


def test_info_of_a_detector_that_says_little(
    run: Run, folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = load_detector(folded)
    bare = replace(detector, thresholds=None, calibration=None, info={})
    bare.save(tmp_path / "bare")
    assert run("info", tmp_path / "bare") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not calibrated" in said
    assert "No thresholds were chosen" in said
    assert "What it reaches was not kept with it." in said
    assert run("info", tmp_path) == 3


def test_a_readme_of_somebody_stays(folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rcnn_svm.report.card import remove_card, write_card

    detector = load_detector(folded)
    (tmp_path / "README.md").write_text("mine")
    remove_card(tmp_path)
    write_card(tmp_path, detector)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "stays" in capsys.readouterr().err
    remove_card(folded)
    assert not (folded / "README.md").exists()
    write_card(folded, detector)
    assert "# digits" in (folded / "README.md").read_text()


def test_licences_are_stated_where_they_are_known() -> None:
    assert licence_of("efficientnet_lite2", "default").startswith("Apache-2.0")
    assert licence_of("small_cnn", "random").startswith("none of others")
    assert "torchvision" in licence_of("resnet18", "default")
    assert "torchvision" in licence_of("resnet18", "IMAGENET1K_V1")
    assert licence_of("resnet18", "/somewhere/mine.pth") == "not known: they were read from the file mine.pth"


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_handful_of_images_trains(
    n: int, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = digits_in_scenes("train", n, seed=3)
    write_dataset([scenes], tmp_path / "data")
    words = ["--out", tmp_path / "d", "--cache", tmp_path / "cache", "--skip-absent-classes", *TINY]
    assert run("train", tmp_path / "data", *words) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert ("too few to set any aside" in said) == (n < 3)
    detector = load_detector(tmp_path / "d")
    metrics = json.loads((tmp_path / "d" / "evaluation" / "metrics.json").read_text())
    held = {name: head["details"]["held_out"] for name, head in metrics["heads"].items()}
    if None in held.values():  # nothing could be held out: nothing speaks for moving boxes
        assert detector.head == "linear-svm"
        assert detector.thresholds is None
    else:
        assert held[detector.head] == max(held.values())
    assert ("what is measured on them says nothing" in said) == (n < 3)
    if n == 1:
        assert set(held.values()) == {None}


values = st.one_of(st.none(), st.floats(0, 100))


@given(plain=values, boxed=values, assumed=st.booleans())
def test_what_did_worse_on_held_out_images_is_never_taken(
    plain: float | None, boxed: float | None, assumed: bool
) -> None:
    def variant(value: float | None, with_boxes: bool) -> Variant:
        return Variant(Choice({}, None, ()), PostprocessConfig(), with_boxes, value=value)

    recipe = HeadRecipe("linear-svm", LinearSVMHead())
    chosen = Chosen(
        recipe, Choice({}, None, ()), variant(plain, False), None, variant(boxed, True), assumed=assumed
    )
    taken, (worst, *_) = chosen.preferred, sorted((plain, boxed), key=lambda v: np.inf if v is None else v)
    if plain is not None and boxed is not None:
        assert taken.value == max(plain, boxed)
        assert taken.value >= worst
    elif not assumed:
        assert not taken.with_boxes
