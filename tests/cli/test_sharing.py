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
from rcnn_svm.experiment.joining import digest_of, read_by
from rcnn_svm.experiment.selection import Choice
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.heads.linear_svm import LinearSVMHead
from rcnn_svm.heads.recipe import HeadRecipe
from rcnn_svm.heads.scorers import SoftmaxScorer
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


@pytest.fixture(scope="module")
def sevens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in which the digit 7 is labelled as a class of another name."""
    folder = tmp_path_factory.mktemp("sevens") / "data"
    parts = []
    for split, n in (("train", 6), ("val", 3), ("test", 3)):
        scenes = digits_in_scenes(split, 40, seed=11).with_classes(["7"])
        kept = tuple(sample for sample in scenes if len(sample.truth))[:n]
        parts.append(replace(scenes, classes=("seven",), samples=kept, split=split))
    write_dataset(parts, folder)
    return folder


def test_a_class_joins_and_the_others_stay_bit_for_bit(
    run: Run,
    folded: Path,
    sevens: Path,
    digits_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, cache = tmp_path / "grown", folded.parent / "cache"
    assert run("add-class", folded, sevens, "--out", out, "--cache", cache) == 0
    said = " ".join(capsys.readouterr().err.split())
    before, after = load_detector(folded), load_detector(out)
    assert after.classes == (*before.classes, "seven")
    old, new = before.model.scorer, after.model.scorer
    assert new.coef[:10].tobytes() == old.coef.tobytes()
    assert new.intercept[:10].tobytes() == old.intercept.tobytes()
    assert new.coef[10].any()
    digest = digest_of(before, 10)
    assert digest_of(after, 10) == digest
    assert (
        f"the weights of the 10 classes that it had are bit for bit the same (SHA-256 {digest[:16]}" in said
    )
    np.testing.assert_array_equal(after.thresholds.scores[:10], before.thresholds.scores)
    card = (out / "README.md").read_text()
    assert "seven joined later, learned from 9 images of data" in card
    # What is found of the older classes is what was found before, but for the cap on all classes together.
    images = digits_in_scenes("test", 3, seed=2)
    for sample in images:
        image = sample.read()
        one = before.detect(image)
        two = after.detect(image).with_classes(after.classes, before.classes)
        n = min(len(one), len(two)) // 2
        np.testing.assert_allclose(two.scores[:n], one.scores[:n], rtol=1e-4, atol=1e-4)
    # Both data sets are known to the detector: each is measured on what was held out of it.
    for data, n in ((digits_folder, 5), (sevens, 3)):
        capsys.readouterr()
        assert run("evaluate", out, data) == 0
        assert f"measured on the {n} images held out from the detector" in capsys.readouterr().err
    assert run("add-class", out, sevens, "--cache", cache) == 2
    assert "labels seven, which" in capsys.readouterr().err


def test_older_classes_see_the_new_images_where_that_is_asked(
    run: Run, folded: Path, sevens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, cache = tmp_path / "grown", folded.parent / "cache"
    assert run("add-class", folded, sevens, "--out", out, "--cache", cache, "--negatives") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the 10 classes that it had were trained again with the new images" in said
    before, after = load_detector(folded), load_detector(out)
    assert after.classes == (*before.classes, "seven")
    assert digest_of(after, 10) != digest_of(before, 10)
    assert after.info["figures"]["n_train_images"] == 19 + 9
    assert run("add-class", out, sevens, "--cache", cache, "--negatives") == 2
    assert "classes have joined it before" in capsys.readouterr().err


def test_classes_join_learned_layers_as_they_are(
    run: Run, digits_folder: Path, sevens: Path, tmp_path: Path
) -> None:
    """Box regression learned with the layers reads unscaled rows; that of the new class is made to.

    What refines boxes knows nothing of the new class, whose boxes are refined as the mean of the others.
    """
    learned = ["--learn", "fc", "--set", "fc.n_steps=40", "--set", "fc.hidden=[32]", "--set", "folds=0"]
    learned += ["--backbone", "mobilenet_v2", "--path", "shared", "--taps", "block6@1x1"]
    learned += ["--set", "features.longer_sides=[96]"]
    learned += ["--set", "detect.refined=12", "--set", "refine.n_steps=3", "--set", "refine.hidden=8"]
    words = ["--cache", tmp_path / "cache", *TINY, *learned]
    assert run("train", digits_folder, "--out", tmp_path / "d", *words, "--head", "linear-svm") == 0
    before = load_detector(tmp_path / "d")
    assert before.layers is not None
    assert before.model.regressor_scaler is None
    assert run("add-class", tmp_path / "d", sevens, "--cache", tmp_path / "cache") == 0
    after = load_detector(tmp_path / "d")
    assert digest_of(after, 10) == digest_of(before, 10)
    boxes = after.model.regressor
    rows = np.abs(np.random.default_rng(0).normal(size=(20, 32))).astype(np.float32)
    assert np.abs(boxes.predict(rows)[:, 10]).max() < 1.5
    assert after.model.regressor_scaler is None
    assert before.postprocess.refined == 12
    old, new = before.model.refinement.refiner, after.model.refinement.refiner
    np.testing.assert_array_equal(new.weight[:10], old.weight)
    np.testing.assert_array_equal(new.weight[10], old.weight.mean(axis=0))
    assert len(after.detect(digits_in_scenes("test", 1, seed=2).samples[0].read())) > 0


def test_classes_that_share_what_was_learned_cannot_be_joined(
    run: Run, folded: Path, sevens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = load_detector(folded)
    scorer = detector.model.scorer
    shared = SoftmaxScorer(np.vstack([scorer.coef, scorer.coef[:1]]), np.append(scorer.intercept, 0))
    replace(detector, head="softmax-refit", model=replace(detector.model, scorer=shared)).save(tmp_path / "s")
    assert run("add-class", tmp_path / "s", sevens) == 2
    assert "this detector's head is softmax-refit" in capsys.readouterr().err


def test_joining_without_settings_is_one_sentence(
    run: Run,
    folded: Path,
    sevens: Path,
    digits_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load_detector(folded).save(tmp_path / "bare")
    assert run("add-class", tmp_path / "bare", sevens) == 3
    assert "config.json: no such file; it holds the settings" in capsys.readouterr().err
    assert run("add-class", folded, digits_folder) == 2
    assert "Name the new ones with --classes" in capsys.readouterr().err


def test_rows_are_read_by_the_scaler_that_a_detector_has() -> None:
    rng = np.random.default_rng(1)
    rows, coef = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)
    own, other = (FeatureScaler.from_dict({"scaling": "mean-norm-20", "factor": f}) for f in (0.7, 3.0))
    for theirs in (other, None):
        seen = rows if theirs is None else theirs(rows)
        np.testing.assert_allclose(
            seen @ read_by(coef, own, theirs).T, own(rows) @ coef.T, rtol=1e-4, atol=1e-5
        )
    np.testing.assert_array_equal(read_by(coef, FeatureScaler("l2"), FeatureScaler("l2")), coef)
