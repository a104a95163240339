"""What a factor does: the design, the contrasts, their correction, and a run from end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rcnn_svm.contracts import example_blocks
from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.voc import evaluate_voc
from rcnn_svm.experiment.study import FACTORS, _holm, analyse, design
from rcnn_svm.heads.base import DrawnBlocks
from rcnn_svm.report.study import verdict
from rcnn_svm.structures import Detections, GroundTruth
from tests.cli.conftest import Run, digits_folder, run  # noqa: F401


def test_a_design_holds_every_combination_once() -> None:
    cells = design(["label", "loss", "kernel"])
    assert len(cells) == 3 * 3 * 3
    assert len({tuple(cell.levels.values()) for cell in cells}) == 27
    out = [cell for cell in cells if cell.recipe is None]
    assert len(out) == 3 * 2 * 2  # both other losses with both kernels
    assert {cell.left_out for cell in out} == {"kernel machines are trained with the hinge loss alone"}
    assert len({tuple(cell.recipe.grid["C"]) for cell in cells if cell.recipe is not None}) == 1


@pytest.mark.parametrize("names", [[], ["label", "label"], ["label", "colour"]])
def test_factors_that_there_are_not(names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^--factors must be some of label, negatives, loss, kernel, rows"):
        design(names)


def test_random_negatives_keep_objects_and_few_others() -> None:
    blocks = example_blocks()
    drawn = DrawnBlocks(blocks, 5)
    for i in range(len(blocks)):
        truth, own = blocks.truth(i), drawn.truth(i)
        near = (truth.best_iou >= 0.5) | truth.is_gt
        assert len(own) == near.sum() + 5
        assert own.is_gt.sum() == truth.is_gt.sum()
        assert drawn.features(i).shape == (len(own), blocks.n_features)
        np.testing.assert_array_equal(drawn.features(i, [1, 0]), drawn.features(i)[[1, 0]])
    again = DrawnBlocks(blocks, 5)
    np.testing.assert_array_equal(again.features(3), drawn.features(3))


def _experiment(names, quality, n_images: int = 200):
    """Heads that find each object with a probability of their own, on the same images."""
    truths = [GroundTruth(np.float32([[0, 0, 10, 10]]), np.array([0]))] * n_images
    luck, results = np.random.default_rng(0).random(n_images), {}
    for name in names:
        found = [
            Detections(str(i), np.float32([[0, 0, 10, 10]])[: int(luck[i] < quality(name))],
                       np.float32([1.0])[: int(luck[i] < quality(name))],
                       np.array([0])[: int(luck[i] < quality(name))])
            for i in range(n_images)
        ]  # fmt: skip
        results[name] = SimpleNamespace(evaluation=evaluate_voc(found, truths, ["a"], rule="voc10"))
    parts = SimpleNamespace(n_bootstrap=400, seed=0, rule="voc10")
    return SimpleNamespace(heads=results, parts=parts, splits=SimpleNamespace(test=range(n_images)))


def test_effects_are_what_the_cells_were_made_with() -> None:
    cells = design(["label", "negatives"])
    names = [cell.recipe.name + end for cell in cells for end in ("", "+bbox")]  # type: ignore[union-attr]

    def quality(name: str) -> float:
        # The label rule is worth .2, random negatives cost .1 with one rule alone, boxes do nothing.
        rule = 0.2 if name.startswith("IoU >= 0.5") else 0.0
        random = -0.1 if "random" in name and name.startswith("IoU >= 0.7") else 0.0
        return 0.5 + rule + random

    study = analyse(cells, _experiment(names, quality))
    by_name = {(e.factor, e.first, e.second): e for e in study.effects}
    assert len(study.effects) == 3 + 1 + 1
    rule = by_name["label", "objects against IoU < 0.3", "IoU >= 0.5 against the rest"]
    assert rule.n_pairs == 4
    assert rule.change.value == pytest.approx(-0.2, abs=0.06)
    assert rule.decided
    boxes = by_name["boxes", "as proposed", "regressed"]
    assert boxes.change.value == 0
    assert not boxes.decided
    negatives = by_name["negatives", "all, mined", "random"]
    assert negatives.change.value == pytest.approx(0.1 / 3, abs=0.02)  # in the mean over the rules
    crossed = {(e.first, e.second): e for e in study.interactions if e.factor == "label x negatives"}
    assert len(crossed) == 3
    told = crossed["IoU >= 0.5 against the rest and all, mined", "IoU >= 0.7 against IoU < 0.3 and random"]
    assert told.change.value == pytest.approx(-0.1, abs=0.05)
    words = verdict(study)
    assert "`IoU >= 0.5 against the rest` is ahead of" in words[0]
    assert any("These 200 images do not decide it" in sentence for sentence in words)


def test_holms_correction_by_hand() -> None:
    from dataclasses import replace

    from rcnn_svm.evaluation.bootstrap import Interval
    from rcnn_svm.experiment.study import Effect

    one = Effect("a", "x", "y", Interval(0, 0, 0), 1, 0.0, 0.0, 0.0)
    given = [replace(one, p=p) for p in (0.01, 0.04, 0.03, 0.005)]
    np.testing.assert_allclose([e.p_holm for e in _holm(given)], [0.03, 0.06, 0.06, 0.02])


@pytest.mark.slow
def test_a_study_from_images_to_a_verdict(run: Run, digits_folder: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    words = ["--backbone", "small_cnn", "--weights", "random", "--path", "warped", "--taps", "fc7"]
    words += ["--learn", "nothing", "--set", "proposals.max_regions=40", "--set", "proposals.min_size=10"]
    words += ["--set", "n_bootstrap=50", "--set", "heads.ridge_strengths=[3]", "--factors", "negatives,loss"]
    assert run("study", digits_folder, "--out", tmp_path / "s", "--cache", tmp_path / "c", *words) == 0
    said = capsys.readouterr().out
    study = json.loads((tmp_path / "s" / "study.json").read_text())
    assert "\n".join(study["verdict"]) in said
    cells = list(csv.DictReader((tmp_path / "s" / "cells.csv").open()))
    assert len(cells) == 2 * 3 * 2 == len(study["cells"])
    assert {cell["loss"] for cell in cells} == set(FACTORS["loss"].levels)
    assert {"README.md", "cells.csv", "config.json", "effects.csv", "effects.svg", "study.json"} == {
        path.name for path in (tmp_path / "s").iterdir()
    }
    assert run("study", digits_folder, "--out", tmp_path / "s", "--factors", "magic") == 2
