"""What a stranger types first, with nothing else said: presets, thresholds, what held-out images decide."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rcnn_svm import load_detector
from rcnn_svm.cli import main
from rcnn_svm.evaluation.exchange import read_detections
from rcnn_svm.structures import Detections
from tests.cli.conftest import TINY, Run
from tests.cli.test_bad_input import sentence

LEARNED = ["--learn", "fc", "--set", "fc.n_steps=60", "--set", "fc.hidden=[32]"]


@pytest.fixture(scope="module")
def trained(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector with the head that `train` takes by itself."""
    folder = tmp_path_factory.mktemp("straight")
    words = [
        "train",
        digits_folder,
        "--out",
        folder / "detector",
        "--cache",
        folder / "cache",
        *TINY,
        *LEARNED,
    ]
    assert main([str(word) for word in words]) == 0
    return folder / "detector"


def test_a_threshold_per_class_is_kept_with_what_it_gave(trained: Path) -> None:
    detector = load_detector(trained)
    assert detector.head.startswith("softmax-finetuned")
    assert detector.thresholds is not None
    assert detector.thresholds.classes == detector.classes
    assert (
        detector.thresholds.n_images == 19
    )  # all of trainval: val holds too few objects, so folds were held out
    assert np.isfinite(detector.thresholds.scores).all()
    metrics = json.loads((trained / "evaluation" / "metrics.json").read_text())
    details = metrics["heads"][detector.head]["details"]
    assert set(details["thresholds"]["classes"]) == set(detector.classes)
    assert details["at_threshold"]["objects_per_image"] == pytest.approx(3.6)
    for page in ("README.md", "comparison.md"):
        assert "threshold of" in (trained / "evaluation" / page).read_text()
    assert "best F1 on 19 images held out" in (trained / "evaluation" / "report.html").read_text()


def shown(folder: Path) -> dict[str, list[float]]:
    values = json.loads((folder / "detections.json").read_text())
    return {one["image_id"]: one["scores"] for one in values["images"]}


def test_detect_writes_a_probability_beside_each_score(
    run: Run, trained: Path, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, detector = digits_folder / "images" / "test", load_detector(trained)
    assert detector.calibration is not None
    assert detector.calibration.n_images == 19
    assert run("detect", trained, images, "--out", tmp_path / "f", "--all", "--no-pictures") == 0
    assert "not calibrated" not in capsys.readouterr().err
    classes, found = read_detections(tmp_path / "f" / "detections.json")
    assert classes == detector.classes
    for one in found:
        expected = detector.calibration(one.scores, one.labels).astype(np.float32)
        np.testing.assert_array_equal(one.probabilities, expected)
    from rcnn_svm import load_dataset

    image = load_dataset(digits_folder, "test").samples[0]
    np.testing.assert_array_equal(
        detector(image.read()).probabilities,
        next(one for one in found if one.image_id == image.image_id).probabilities,
    )
    few = found[0][:2]
    np.testing.assert_array_equal(few.probabilities, found[0].probabilities[:2])


def test_a_detector_of_the_format_before_probabilities_is_read(
    run: Run, trained: Path, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = tmp_path / "older"
    detector = load_detector(trained)
    replace(detector, calibration=None).save(older)
    values = json.loads((older / "detector.json").read_text())
    values["format"] = 3
    for key in ("aim", "promised"):
        del values["thresholds"][key]
    for row in values["thresholds"]["classes"].values():
        del row["false_alarms"]
    (older / "detector.json").write_text(json.dumps(values))
    images = digits_folder / "images" / "test"
    assert run("detect", older, images, "--out", tmp_path / "f", "--no-pictures") == 0
    assert "this detector is not calibrated: no probabilities" in capsys.readouterr().err
    _, found = read_detections(tmp_path / "f" / "detections.json")
    assert all(one.probabilities is None for one in found)
    np.testing.assert_array_equal(load_detector(older).thresholds.scores, detector.thresholds.scores)


def test_thresholds_are_chosen_for_what_is_asked(
    run: Run, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--cache", tmp_path / "cache", *TINY]
    out = tmp_path / "d"
    assert run("train", digits_folder, "--out", out, *words, "--false-alarms", "0.5", "--folds", "2") == 0
    chosen = load_detector(out).thresholds
    assert chosen.aim == {"false_alarms": 0.5}
    assert 0 < chosen.false_alarms.sum() <= 0.5
    said = " ".join(capsys.readouterr().err.split())
    assert "chosen on 19 images held out for false alarms 0.5; there " in said
    page = (out / "evaluation" / "README.md").read_text()
    assert "lets at most 0.5 false detections an image pass on 19 images held out" in page
    assert run("train", digits_folder, "--out", tmp_path / "e", *words, "--false-alarms", "0.05") == 2
    assert "at least 20 images must be held out, got 19" in sentence(capsys)
    assert not (tmp_path / "e" / "detector.json").exists()
    assert run("train", digits_folder, "--out", tmp_path / "e", *words, "--precision", "0.99999") == 2
    assert "no score reaches it on the 19 images held out" in sentence(capsys)
    unheld = ["--precision", "0.5", "--folds", "0"]
    assert run("train", digits_folder, "--out", tmp_path / "e", *words, *unheld) == 2
    assert "precision: needs images that are held out" in sentence(capsys)


def test_detect_shows_what_reaches_the_thresholds(
    run: Run, trained: Path, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = digits_folder / "images" / "test"
    detector = load_detector(trained)
    assert run("detect", trained, images, "--out", tmp_path / "all", "--all", "--no-pictures") == 0
    assert run("detect", trained, images, "--out", tmp_path / "some", "--no-pictures") == 0
    assert (
        run("detect", trained, images, "--out", tmp_path / "one", "--threshold", "-2.5", "--no-pictures") == 0
    )
    everything, some, one = (shown(tmp_path / name) for name in ("all", "some", "one"))
    assert sum(map(len, some.values())) < sum(map(len, everything.values()))
    for image_id, scores in everything.items():
        assert one[image_id] == [score for score in scores if score >= -2.5]
    lowest = float(detector.thresholds.scores.min())
    assert all(score >= lowest for scores in some.values() for score in scores)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run("detect", trained, images, "--out", tmp_path / "x", "--all", "--threshold", "1")
    assert stop.value.code == 2
    assert run("detect", trained, images, "--out", tmp_path / "x", "--threshold", "nan") == 2
    assert sentence(capsys) == "rcnn-svm: --threshold must be a number, got nan."


def test_a_detector_without_held_out_images_says_so(
    run: Run, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", tmp_path / "d", "--cache", tmp_path / "cache", *TINY, "--set", "folds=0"]
    assert run("train", digits_folder, *words) == 0
    assert load_detector(tmp_path / "d").thresholds is None
    assert (
        load_detector(tmp_path / "d").head == "linear-svm+bbox"
    )  # nothing is learned before it, nothing held out
    capsys.readouterr()
    images = digits_folder / "images" / "test"
    assert run("detect", tmp_path / "d", images, "--out", tmp_path / "f", "--no-pictures") == 0
    assert "shown is what scores at least 0" in capsys.readouterr().err


def test_scores_are_on_one_scale_whatever_suppresses(trained: Path, digits_folder: Path) -> None:
    """Soft-NMS changes no score of a box without rivals, and none to a probability."""
    from rcnn_svm import load_dataset

    detector = load_detector(trained)
    image = load_dataset(digits_folder, "test").samples[0].read()

    def found(**settings: object) -> Detections:
        config = replace(detector.postprocess, vote_iou=None, **settings)
        return replace(detector, postprocess=config).detect(image)

    soft, hard = found(soft_nms_sigma=0.2), found(soft_nms_sigma=None)
    assert soft.scores.max() == hard.scores.max()
    assert soft.scores.min() < 0


def test_box_regression_that_does_harm_is_left_out(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    """The variant that did better on held-out images is saved, whichever it is."""
    words = ["--out", tmp_path / "d", "--cache", tmp_path / "cache", *TINY, *LEARNED]
    assert run("train", digits_folder, *words) == 0
    metrics = json.loads((tmp_path / "d" / "evaluation" / "metrics.json").read_text())
    value = {name: head["details"]["held_out"] for name, head in metrics["heads"].items()}
    better = max(value, key=lambda name: (value[name], name.endswith("+bbox")))
    assert load_detector(tmp_path / "d").head == better
    assert run("train", digits_folder, *words, "--no-bbox") == 0
    assert load_detector(tmp_path / "d").head == "softmax-finetuned"


def test_presets_are_shown_with_what_tells_them_apart(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("presets") == 0
    text = capsys.readouterr().out
    assert [line.split(":")[0] for line in text.splitlines() if not line.startswith((" ", "`"))] == [
        "quick",
        "default",
        "best",
    ]
    assert "    features.resolution = 640  (default: 480)" in text


def test_presets_stand_below_the_file_and_single_settings() -> None:
    from rcnn_svm.cli import build_parser, training

    def resolved(*words: str):
        options = build_parser().parse_args(["train", "photos", "--out", "out", *words])
        return training.configured(options, ("linear-svm",))

    assert resolved("--preset", "best").features.sides == (640,)
    assert resolved("--preset", "best", "--set", "features.longer_sides=[96]").features.longer_sides == (96,)
    assert resolved("--quick") == resolved("--preset", "quick")
    assert not resolved().choose
    assert resolved("--choice").choose


def test_every_network_trains_with_nothing_else_said(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    words = ["--set", "features.longer_sides=[64]", "--set", "fc.n_steps=3", "--set", "fc.hidden=[8]"]
    words += ["--set", "proposals.max_regions=20", "--set", "folds=0", "--set", "n_bootstrap=20"]
    for name in ("resnet18", "efficientnet_lite0"):
        out = tmp_path / name
        network = ["--backbone", name, "--weights", "random", "--cache", tmp_path / "cache"]
        assert run("train", digits_folder, "--out", out, *network, *words) == 0
        assert load_detector(out).features.taps.count(",") == 3  # written out, so that it stays what it was
