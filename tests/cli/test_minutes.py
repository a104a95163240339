"""`train --minutes`: a whole detector in any case, the best on held-out images, and the curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rcnn_svm import load_detector
from rcnn_svm.cli import main
from tests.cli.conftest import TINY, Run
from tests.cli.test_bad_input import sentence

# The number of steps is left to the presets: it is what tells them apart here.
LEARNED = ["--learn", "fc", "--set", "fc.hidden=[16]", "--set", "fc.batch_size=32", "--folds", "1"]


@pytest.fixture(scope="module")
def trained(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the detector of minutes enough, and the cache that its training left."""
    folder = tmp_path_factory.mktemp("minutes")
    words = ["train", digits_folder, "--out", folder / "out", "--cache", folder / "cache", "--minutes", "20"]
    assert main([str(word) for word in [*words, *TINY, *LEARNED, "--head", "softmax-finetuned"]]) == 0
    return folder


def test_the_detector_on_disk_is_the_one_that_is_best_on_held_out_images(trained: Path) -> None:
    metrics = json.loads((trained / "out" / "evaluation" / "metrics.json").read_text())
    climbed = metrics["minutes"]
    curve = climbed["curve"]
    assert [step["recipe"] for step in curve] == ["quick", "default"]  # best needs shared maps
    assert climbed["ended"] == "All recipes were tried."
    best = max(curve, key=lambda step: step["held_out"])
    assert (climbed["asked"], climbed["recipe"]) == (20, best["recipe"])
    detector = load_detector(trained / "out")
    assert detector.info["details"]["held_out"] == best["held_out"]
    assert detector.info["figures"]["mAP"]["value"] == pytest.approx(best["test_mAP"])
    assert metrics["heads"][detector.head]["mAP"] == pytest.approx(best["test_mAP"])
    assert all((step["test_mAP"] is None) != step["kept"] for step in curve)
    minutes = [step["minutes"] for step in curve]
    assert minutes == sorted(minutes)
    assert (trained / "out" / "splits.json").exists()
    steps = {"quick": 200, "default": None}[best["recipe"]]
    for config in (trained / "out" / "config.json", trained / "out" / "evaluation" / "config.json"):
        values = json.loads(config.read_text())
        assert values["fc"]["n_steps"] == steps
        assert values["data"]["max_images"] is None


def test_the_curve_stands_in_the_pages(trained: Path) -> None:
    folder = trained / "out" / "evaluation"
    table = "| recipe  | done after minutes | held out | mAP on test |"
    assert table in (folder / "README.md").read_text()
    assert (
        "but for the recipe, thresholds of scores and how far boxes move."
        in (folder / "README.md").read_text()
    )
    page = (folder / "report.html").read_text()
    assert '<h2 id="minutes">What the time gave</h2>' in page
    assert "Test decided nothing" in page


def test_too_little_time_still_gives_a_whole_detector(
    run: Run, digits_folder: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", tmp_path / "out", "--cache", trained / "cache", "--minutes", "0.0001", *TINY, *LEARNED]
    assert run("train", digits_folder, *words, "--no-bbox") == 0
    said = capsys.readouterr().err
    assert "best is not tried, it does not go with the other options: fc.other_sides needs" in said
    assert "default was not begun: it would take about" in said
    assert load_detector(tmp_path / "out").head == "softmax-finetuned"
    metrics = json.loads((tmp_path / "out" / "evaluation" / "metrics.json").read_text())
    assert metrics["minutes"]["recipe"] == "quick"


REFUSED = {
    "zero": (["--minutes", "0"], "--minutes must be above 0, got 0."),
    "negative": (["--minutes", "-3"], "--minutes must be above 0, got -3."),
    "nan": (["--minutes", "nan"], "--minutes must be above 0, got nan."),
    "preset": (
        ["--preset", "default"],
        "--minutes tries recipes of its own, got --preset as well. Leave out",
    ),
    "quick": (
        ["--quick"],
        "--minutes tries recipes of its own, got --preset as well. Leave out one of the two.",
    ),
    "choice": (
        ["--choice"],
        "--minutes tries recipes of its own, got --choice as well. Leave out one of the",
    ),
    "paper": (
        ["--paper"],
        "--minutes tries recipes of its own, got --paper as well. Leave out one of the two.",
    ),
    "dry run": (["--dry-run"], "--minutes tries recipes of its own, got --dry-run as well. Leave out one of"),
    "folds": (
        ["--folds", "0"],
        "--minutes judges recipes on images held out of a training, got folds=0. Set",
    ),
    "choose": (
        ["--set", "choose=true"],
        "--minutes judges recipes on images held out of a training, got choose",
    ),
    "trunk": (
        ["--learn", "trunk"],
        "--minutes cannot foresee how long a network is tuned, got learn=trunk. Set",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_is_refused_in_one_sentence(
    case: str, run: Run, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = REFUSED[case]
    assert run("train", digits_folder, "--out", tmp_path / "out", "--minutes", "5", *words) == 2
    assert sentence(capsys).startswith(f"rcnn-svm: {expected}")
    assert not (tmp_path / "out").exists()


def test_a_run_without_minutes_says_nothing_of_them(detector_folder: Path) -> None:
    folder = detector_folder / "evaluation"
    assert "minutes" not in json.loads((folder / "metrics.json").read_text())
    assert "What the time gave" not in (folder / "report.html").read_text()
