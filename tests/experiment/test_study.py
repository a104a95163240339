"""What a factor does: the design, the contrasts, their correction, and a run from end to end."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rcnn_svm.contracts import example_blocks
from rcnn_svm.datasets.digits import digits_splits
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.evaluation.breakdown import COCO_SIZES, aspect_terciles, size_terciles
from rcnn_svm.evaluation.voc import evaluate_voc
from rcnn_svm.experiment.config import ExperimentConfig, demo_config, digits_images_config
from rcnn_svm.experiment.curve import learning_curve
from rcnn_svm.experiment.design import FACTORS, Cell, Design, design, three_heads
from rcnn_svm.experiment.learning import FcOnFrozen, Frozen
from rcnn_svm.experiment.parts import Run
from rcnn_svm.experiment.study import Study, analyse, run_study
from rcnn_svm.heads.base import DrawnBlocks
from rcnn_svm.proposals import GridConfig
from rcnn_svm.report.study import verdict
from rcnn_svm.structures import Detections, GroundTruth
from rcnn_svm.training.config import FcConfig
from tests.cli.conftest import Run as Verb
from tests.cli.conftest import digits_folder, run  # noqa: F401

PARTS = ExperimentConfig().build()


def test_a_design_holds_every_combination_once() -> None:
    plan = design(["label", "negatives", "loss", "kernel"], PARTS, thorough=True)
    # 3 x 3 x 4 of the first plane; of the kernels the linear one is in it.
    assert len(plan.cells) == 36 + 2
    assert all(key == cell.key for key, cell in plan.cells.items())
    out = [cell for cell in plan.cells.values() if cell.recipe is None]
    assert len(out) == 3 * 2  # mined once, with the losses that have no margin
    assert {cell.left_out for cell in out} == {
        "R-CNN's schedule of hard negatives asks for a margin, which only linear SVMs have"
    }
    assert {len(cell.recipe.settings()) for cell in plan.trained if cell.recipe is not None} == {6}
    assert plan.home["proposals"] == "1000"


def test_cells_of_the_same_rows_stand_together_and_planes_share_cells() -> None:
    parts = ExperimentConfig(fc=FcConfig(hidden=(64, 32))).build()
    plan = design(list(FACTORS), parts, thorough=True)
    rows = [(cell.levels["proposals"], cell.levels["layer"]) for cell in plan.trained]
    assert len(set(rows)) == len([1 for _ in itertools.groupby(rows)]) == 3 + 3
    assert len(plan.cells) == 36 + (3 * 3 - 1) + (3 - 1) * 2 + (4 - 1) * 2
    dense = next(cell for cell in plan.trained if cell.levels["proposals"].startswith("grid"))
    assert plan.parts_of(dense, PARTS).proposer == GridConfig(10_000)
    few = next(cell for cell in plan.trained if cell.levels["proposals"] == "300")
    assert plan.parts_of(few, PARTS).test_regions == 300


def test_the_slow_kernel_is_there_where_all_is_thorough() -> None:
    for thorough, names in ((False, ["RBF", "linear"]), (True, ["RBF", "intersection", "linear"])):
        plan = design(["kernel", "rows"], PARTS, thorough=thorough)
        assert sorted(cell.levels["kernel"] for cell in plan.trained) == sorted(3 * names)


def test_a_cell_takes_the_seed_in_all_that_is_random() -> None:
    plan = design(["negatives", "loss"], PARTS)
    for cell in plan.trained:
        recipe = cell.head(7)
        assert recipe.seed == 7
        assert recipe.head.get_params().get("random_state", 7) == 7


@pytest.mark.parametrize("names", [[], ["label", "label"], ["label", "colour"]])
def test_factors_that_there_are_not(names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^--factors must be some of label, negatives, loss, kernel, rows"):
        design(names, PARTS)


def test_a_factor_of_one_level_is_refused() -> None:
    frozen = ExperimentConfig(learn="nothing").build()
    with pytest.raises(
        ConfigError, match=r"^--factors: layer has one level alone .* pooled, frozen\. Leave it"
    ):
        design(["layer"], frozen)


def test_one_layer_is_not_studied_as_two() -> None:
    for hidden, names in (((64,), ["fc7", "pooled"]), ((64, 32), ["fc7", "fc6", "pooled"])):
        parts = ExperimentConfig(fc=FcConfig(hidden=hidden)).build()
        assert [name.split(",")[0] for name in design(["layer"], parts).factors["layer"].levels] == names


def test_a_network_that_is_trained_stands_beside_layers_that_are_and_none() -> None:
    for whole in (False, True):
        config = demo_config() if not whole else digits_images_config()
        parts = replace(config, learn="network").build()
        layers = design(["layer"], parts).factors["layer"].levels
        learners = [layer.learner for layer in layers.values()]
        assert learners[0] is None  # that of the experiment
        assert isinstance(learners[1], FcOnFrozen)
        assert learners[1].has_boxes is not whole
        assert learners[2] == Frozen()


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


def made_up(plan: Design, quality: Callable[[Cell], float], n_images: int = 200) -> Study:
    """Analyse cells that find each object with a probability of their own, on the same images."""
    truths = [GroundTruth(np.float32([[0, 0, 10, 10]]), np.array([0]))] * n_images
    luck, outcomes = np.random.default_rng(0).random(n_images), {}
    for cell in plan.trained:
        there = (luck < quality(cell)).astype(int)
        found = [
            Detections(str(i), np.float32([[0, 0, 10, 10]])[:n], np.float32([1.0])[:n], np.array([0])[:n])
            for i, n in enumerate(there)
        ]
        result = evaluate_voc(found, truths, ["a"], rule="voc10")
        outcomes[cell.key, 0] = SimpleNamespace(
            evaluations={False: result, True: result}, classification=None
        )
    parts = SimpleNamespace(n_bootstrap=400, seed=0, rule="voc10")
    splits = SimpleNamespace(test=range(n_images))
    return analyse(parts, splits, plan, [0], outcomes, {})  # type: ignore[arg-type]


def test_effects_are_what_the_cells_were_made_with() -> None:
    def quality(cell: Cell) -> float:
        # The label rule is worth .2, random negatives cost .1 with one rule alone, boxes do nothing.
        rule = 0.2 if cell.levels["label"].startswith("IoU >= 0.5") else 0.0
        costly = cell.levels["negatives"] == "random" and cell.levels["label"].startswith("IoU >= 0.7")
        return 0.5 + rule - 0.1 * costly

    study = made_up(design(["label", "negatives"], PARTS), quality)
    by_name = {(e.factor, e.first, e.second): e for e in study.effects}
    assert len(study.effects) == 3 + 1 + 1
    rule = by_name["label", "objects against IoU < 0.3", "IoU >= 0.5 against the rest"]
    assert rule.n_pairs == 4
    assert rule.change.value == pytest.approx(-0.2, abs=0.06)
    assert rule.decided
    boxes = by_name["boxes", "as proposed", "regressed"]
    assert boxes.change.value == 0
    assert not boxes.decided
    negatives = by_name["negatives", "all", "random"]
    assert negatives.change.value == pytest.approx(0.1 / 3, abs=0.02)  # in the mean over the rules
    crossed = {(e.first, e.second): e for e in study.interactions if e.factor == "label x negatives"}
    told = crossed["IoU >= 0.5 against the rest and all", "IoU >= 0.7 against IoU < 0.3 and random"]
    assert told.change.value == pytest.approx(-0.1, abs=0.05)
    assert not study.shares  # the loss was not crossed
    assert not study.edges
    words = verdict(study)
    assert "`IoU >= 0.5 against the rest` is ahead of" in words[0]
    assert any("The study would have found a difference of" in sentence for sentence in words)


def test_the_question_is_answered_by_what_each_factor_has_of_the_difference() -> None:
    def quality(cell: Cell) -> float:
        return 0.5 + 0.15 * (cell.levels["loss"] == "hinge") + 0.1 * (cell.levels["negatives"] == "all")

    study = made_up(design(["label", "negatives", "loss"], PARTS), quality)
    *parts, whole = study.shares[True]
    assert [part.factor for part in parts] == ["label", "negatives", "loss"]
    assert parts[0].change.value == pytest.approx(0, abs=1e-9)
    assert sum(part.change.value for part in parts) == pytest.approx(whole.change.value)
    assert len(study.edges) == 3 * 4
    for edge in study.edges:
        assert edge.n_pairs == 2  # without and with boxes
        worth = {"label": 0.0, "negatives": 0.1, "loss": 0.15}[edge.factor.partition(",")[0]]
        assert edge.change.value == pytest.approx(worth, abs=0.05)
    assert verdict(study)[4].startswith(
        "`hinge` less `softmax`, all else equal: with `objects against IoU < 0.3 "
    )


@pytest.mark.slow
def test_a_study_from_images_to_a_verdict(
    run: Verb,  # noqa: F811
    digits_folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--backbone", "small_cnn", "--weights", "random", "--path", "warped", "--taps", "fc7"]
    words += ["--learn", "nothing", "--set", "proposals.max_regions=40", "--set", "proposals.min_size=10"]
    words += [
        "--set",
        "n_bootstrap=50",
        "--set",
        "heads.ridge_strengths=[3]",
        "--factors",
        "negatives,loss",
        "--seeds",
        "1",
        "--no-curve",
    ]
    assert run("study", digits_folder, "--out", tmp_path / "s", "--cache", tmp_path / "c", *words) == 0
    said = capsys.readouterr().out
    study = json.loads((tmp_path / "s" / "study.json").read_text())
    assert "\n".join(study["verdict"]) in said
    cells = list(csv.DictReader((tmp_path / "s" / "cells.csv").read_text().splitlines()))
    assert len(cells) == 2 * 4 * 2 == len(study["cells"])
    assert all(float(cell["peak_rss_mb"]) > 10 for cell in cells)
    assert {cell["loss"] for cell in cells} == set(FACTORS["loss"].levels)
    names = {"README.md", "config.json", "report.html", "study.json"} | {
        f"{name}.csv"
        for name in (
            "cells",
            "effects",
            "effects_by_class",
            "probabilities",
            "reliability",
            "mistakes",
            "groups",
        )
    }
    pictures = {"effects.svg", "mistakes.svg", "reliability_regions.svg", "reliability_detections.svg"}
    assert {path.name for path in (tmp_path / "s").iterdir()} == names | pictures

    # What is kept is met again, damage is seen, and the end is the same.
    kept = sorted((tmp_path / "c" / "study").glob("*.npz"))
    assert len(kept) == 8
    kept[0].write_bytes(kept[0].read_bytes()[:-50])
    assert run("study", digits_folder, "--out", tmp_path / "t", "--cache", tmp_path / "c", *words) == 0
    told = capsys.readouterr().err
    assert "1 cells, 7 more are kept from before" in told
    assert f"{kept[0]}: damaged; it is trained again." in told
    assert (tmp_path / "t" / "effects.csv").read_bytes() == (tmp_path / "s" / "effects.csv").read_bytes()

    # A second seed trains with what was chosen with the first.
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("nothing is chosen again")

    monkeypatch.setattr("rcnn_svm.experiment.study.choose_head", fail)
    words += ["--seeds", "2"]
    assert run("study", digits_folder, "--out", tmp_path / "u", "--cache", tmp_path / "c", *words) == 0
    assert len(list((tmp_path / "c" / "study").glob("*.npz"))) == 16
    again = list(csv.DictReader((tmp_path / "u" / "cells.csv").read_text().splitlines()))
    assert [cell["C"] for cell in again] == [f"{cell['C']} {cell['C']}" for cell in cells]
    assert [cell["mAP"] for cell in again] != [cell["mAP"] for cell in cells]
    assert run("study", digits_folder, "--out", tmp_path / "s", "--factors", "magic") == 2
    assert run("study", digits_folder, "--out", tmp_path / "s", "--seeds", "0") == 2


def test_what_is_kept_of_a_cell_depends_on_its_head_in_full() -> None:
    from rcnn_svm.experiment.study import _what

    plan = design(["negatives", "loss"], PARTS)
    kept = [str(_what(cell, seed, None)) for cell in plan.trained for seed in (0, 1)]
    assert len(set(kept)) == len(kept)
    assert all("C" in text and "LabelRule" in text for text in kept)
    assert not any(" at 0x" in text for text in kept)  # the next process finds it again


def test_a_test_split_without_objects_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    splits = digits_splits(4, 2, 3)
    bare = tuple(replace(sample, truth=GroundTruth.empty()) for sample in splits.test)
    splits = replace(splits, test=replace(splits.test, samples=bare))
    cache = Run(tmp_path)
    plan = design(["loss"], PARTS)
    for start in (
        lambda: run_study(PARTS, splits, cache, plan),
        lambda: learning_curve(PARTS, splits, cache, three_heads()),
    ):
        with pytest.raises(
            DataError, match=r"^digits: the split 'test' must have an object to be measured on"
        ):
            start()
    assert list(tmp_path.iterdir()) == []


def test_groups_of_a_closer_look_have_names_of_their_own() -> None:
    truths = [GroundTruth(np.float32([[0, 0, 10, 10], [0, 0, 50, 20]]), np.array([0, 0]))]
    names = [g.name for g in (COCO_SIZES, size_terciles(truths), aspect_terciles(truths))]
    assert len(set(names)) == 3
