"""`--paper`, from images to a report, on a network and a schedule that take seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rcnn_svm import load_detector
from rcnn_svm.postprocess import PAPER
from tests.cli.conftest import Run


@pytest.mark.slow
def test_the_paper_runs_end_to_end(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    small = ["--backbone", "small_cnn", "--weights", "random", "--set", "proposals.max_regions=60"]
    small += ["--set", "proposals.min_size=10", "--set", "finetune.n_steps=30", "--set", "n_bootstrap=20"]
    small += ["--set", "finetune.batch_size=32", "--cache", str(tmp_path / "cache"), "--paper"]
    out = tmp_path / "compared"
    assert run("compare", digits_folder, "--out", out, "--no-pictures", *small) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    bases = ("linear-svm", "rbf-svm", "softmax-refit", "softmax-finetuned")
    assert list(metrics["heads"]) == [name + end for name in bases for end in ("", "+bbox")]
    for name, head in metrics["heads"].items():
        assert head["mAP"] is not None, name
        # Nothing was left to be chosen but the costs of heads that are not the paper's.
        assert head["details"]["settings"].items() >= {"max_iou": 0.3, "vote_iou": 0.0}.items()
    linear = metrics["heads"]["linear-svm+bbox"]["details"]
    assert linear["settings"]["C"] == 1e-3
    assert linear["box_regression"] == {"strength": 1000.0}
    config = json.loads((out / "config.json").read_text())
    assert (config["learn"], config["heads"]["mining"], config["features"]["path"]) == (
        "network",
        "paper",
        "warped",
    )
    assert run("train", digits_folder, "--out", tmp_path / "d", "--head", "linear-svm", *small) == 0
    assert load_detector(tmp_path / "d").postprocess in (PAPER, _without_boxes())


def _without_boxes() -> object:
    from dataclasses import replace

    return replace(PAPER, regression="off")
