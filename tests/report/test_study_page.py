"""The page of a study: what is on it, that it asks for nothing, and that a browser can work it."""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcnn_svm.datasets import Splits
from rcnn_svm.detector import Detector, Model
from rcnn_svm.evaluation.classification import classify
from rcnn_svm.evaluation.diagnosis import diagnose
from rcnn_svm.evaluation.thresholds import choose_thresholds
from rcnn_svm.evaluation.voc import HIT, evaluate_voc
from rcnn_svm.experiment.closer import CloserLook, Probabilities, probabilities_of
from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.experiment.design import design
from rcnn_svm.experiment.study import Outcome, Study, analyse
from rcnn_svm.features.build import FeatureConfig, build_featurizer
from rcnn_svm.heads.kernels import RBF
from rcnn_svm.heads.scorers import KernelScorer, LinearScorer, SoftmaxScorer
from rcnn_svm.networks.backbone import load_backbone
from rcnn_svm.postprocess import PAPER
from rcnn_svm.proposals import GridConfig
from rcnn_svm.report import study_page
from rcnn_svm.report.looks import confusion_of
from rcnn_svm.report.study import write_study
from rcnn_svm.report.study_evidence import evidence_shown, telling_regions
from rcnn_svm.structures import Dataset, Detections, GroundTruth, Sample, TrainingRegions
from tests.report.conftest import Browse
from tests.report.test_html import Page

EVIL = "\"'><script>x</script>&amp;"
NAMES = ("linear SVM", "RBF SVM", "softmax")
SUPPORT = ("im<3>", "im<4>")


def look(name: str, detections: list[Detections], test: Dataset) -> CloserLook:
    """Look closer at made-up detections, thresholds and curves from themselves."""
    truths = [sample.truth for sample in test]
    result = evaluate_voc(detections, truths, test.classes)
    m = result.matches
    judged = (m.score, m.outcome == HIT, m.label, m.image)
    words: dict[str, Any] = {"n_images": len(test), "n_resamples": 20, "seed": 0}
    ways = probabilities_of(judged, judged, len(test.classes), name == "softmax", **words)
    thresholds = choose_thresholds(m)
    diagnosis = diagnose(name, detections, truths, result, thresholds.scores)
    return CloserLook(
        **vars(diagnosis),
        thresholds=thresholds,
        probabilities=Probabilities(ways, ways),
        detector=detector(name, test.classes),
    )


def detector(name: str, classes: tuple[str, ...]) -> Detector:
    """Return a head of random weights, on cells of 2 x 2 of a small network."""
    rng, n = np.random.default_rng(0), len(classes)
    features = FeatureConfig("small_cnn", "random", "warped", "conv3@2x2")
    network = load_backbone("small_cnn", "random", n_outputs=n + 1, seed=0)
    featurizer = build_featurizer(features, network)
    weights = rng.normal(size=(n, featurizer.n_features)).astype(np.float32)
    bias, support = np.zeros(n, np.float32), None
    scorer: Any = LinearScorer(weights, bias)
    if name == "softmax":
        scorer = SoftmaxScorer(np.vstack([weights, weights[:1]]), np.zeros(n + 1, np.float32))
    if name == "RBF SVM":
        scorer = KernelScorer(weights[:2], np.array([[1.0, -0.5]] * n, np.float32), bias, RBF(0.01))
        boxes = np.array([[0, 0, 20, 20], [5, 5, 30, 30]], np.float32)
        support = TrainingRegions(SUPPORT, boxes, np.array([0, -1]), np.array([0.8, 0.0], np.float32))
    model = Model(scorer, None, support=support)
    return Detector(
        name, classes, GridConfig(), None, features, network, featurizer, None, model, PAPER, None, {}
    )


def made_up(test: Dataset, found: list[list[Detections]], factors: list[str]) -> Study:
    """Make a study whose cells and looks have these detections in turn."""
    parts = replace(ExperimentConfig().build(), n_bootstrap=20)
    plan, truths = design(factors, parts), [sample.truth for sample in test]
    by_head = [evaluate_voc(own, truths, test.classes) for own in found]
    coco = {"AP": 0.1, "AP50": 0.3, "AP75": 0.1}
    ways = (False,) if test.whole else (False, True)
    outcomes = {
        (cell.key, 0): Outcome(
            {"C": 1.0},
            [{"val_map": 50.0}],
            1.5,
            100.0,
            {},
            dict.fromkeys(ways, by_head[i % len(found)]),
            classify(found[i % len(found)], truths, test.classes) if test.whole else None,
            dict.fromkeys(ways, coco),
        )
        for i, cell in enumerate(plan.trained)
    }
    study = analyse(parts, Splits(test, test, test, test), plan, [0], outcomes, {"seed 0": 12.3})
    looks = [look(name, own, test) for name, own in zip(NAMES, found, strict=False)]
    return replace(study, looks=looks)


Make = Callable[..., Study]


@pytest.fixture(scope="module")
def make(build_comparison: Any) -> Make:
    def call(factors: list[str], **words: Any) -> Study:
        made = build_comparison({"a": 0.9, "b": 0.7, "c": 0.4}, **words)
        return made_up(made.dataset, list(made.detections.values()), factors)

    return call


@pytest.fixture(scope="module")
def page(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, make(["label", "negatives", "loss"]), command="rcnn-svm study x")
    return folder / "report.html"


def test_the_page_is_whole_and_asks_for_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parsed = Page(
        re.sub(
            r"<(rect|text|image)([^>]*)/>", r"<\1\2></\1>", text.replace("<input", "<img src='data:image/'")
        )
    )
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(link[1:] in parsed.ids or link.startswith("data:image/jpeg") for link in parsed.links)
    assert all(image["src"].startswith("data:image/") for image in parsed.images)
    without_data = re.sub(r'"data:[^"]*"', "", text)
    assert not re.search(r"https?://|url\(|@import|<link|<script src", without_data)
    for path in page.parent.glob("*.svg"):
        assert base64.b64encode(path.read_bytes()).decode() in text, path.name
    order = [
        parsed.ids.index(name) for name in ("effects", "interactions", "probabilities", "sizes", "mistakes")
    ]
    order += [
        parsed.ids.index(name) for name in ("scores", "pictures", "confusion", "evidence", "cells", "origin")
    ]
    assert order == sorted(order)
    study = json.loads((page.parent / "study.json").read_text())
    words = "".join(parsed.text)
    assert all(sentence.replace("`", "") in words for sentence in study["verdict"])
    assert words.index(study["verdict"][0]) < words.index("What makes the difference")
    assert "rcnn-svm study x" in words


def test_names_are_never_markup(make: Make, tmp_path: Path) -> None:
    study = make(["loss"], classes=(EVIL, "car", "ghost"), image_id=EVIL + "{}")
    study = replace(study, looks=[study.looks[0], study.looks[2]])  # of support vectors there are names
    write_study(tmp_path, study, command=EVIL)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>x" not in text
    assert text.count("</script>") == 2
    live = json.loads(re.findall(r'id="live">(.*?)</script>', text)[0])
    assert live["classes"][0] == EVIL


def test_pages_of_little(make: Make, tmp_path: Path) -> None:
    study = make(["loss"])
    write_study(tmp_path / "no looks", replace(study, looks=()), command="x")
    text = (tmp_path / "no looks" / "report.html").read_text()
    assert 'id="explorer"' not in text
    assert 'id="effects"' in text
    one = replace(study, looks=study.looks[:1])
    write_study(tmp_path / "one", one, command="x")
    assert "ahead of softmax" not in (tmp_path / "one" / "report.html").read_text()


def test_whole_images_have_no_boxes(tmp_path: Path) -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    full = np.array([[0, 0, 20, 20]], np.float32)
    samples = tuple(
        Sample(str(i), (20, 20), GroundTruth(full, np.array([i % 2])), render=lambda: pixels)
        for i in range(8)
    )
    test = Dataset("whole", "test", ("a", "b"), samples, whole=True)
    found = [
        Detections(str(i), np.repeat(full, 2, axis=0), np.array([1.0 + (i == 3), 1.5]), np.array([0, 1]))
        for i in range(8)
    ]
    right = [own if i != 3 else found[5] for i, own in enumerate(found)]
    study = made_up(test, [found, right], ["loss"])
    counts, events = confusion_of(study.looks[0], test)
    np.testing.assert_array_equal(counts, [[0, 4, 0], [1, 3, 0], [0, 0, 0]])
    assert len(events) == 8
    write_study(tmp_path, study, command="x")
    text = (tmp_path / "report.html").read_text()
    assert 'id="pictures"' not in text
    assert 'id="confusion"' in text
    assert ">no object<" not in text
    assert "Effects on accuracy" in text
    (cell, other, *_) = csv.DictReader((tmp_path / "cells.csv").read_text().splitlines())
    assert (float(cell["accuracy"]), float(other["accuracy"])) == (37.5, 50.0)
    assert float(cell["balanced_accuracy"]) == 37.5
    words = json.loads((tmp_path / "study.json").read_text())["verdict"]
    assert any("Not decided by accuracy" in sentence for sentence in words)


def test_every_object_and_every_believed_detection_is_in_the_confusion_once() -> None:
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], np.float32)
    truth = GroundTruth(boxes, np.array([0, 1, 1]), difficult=np.array([False, False, True]))
    test = Dataset("d", "test", ("a", "b"), (Sample("i", (60, 60), truth),))
    there = np.concatenate([boxes, boxes[:2], [[0, 30, 10, 40]]]).astype(np.float32)
    # A hit, b taken for a, b on the difficult one, a's object once more as b, as a, and nothing.
    found = Detections("i", there, np.array([9.0, 8, 7, 6, 5, 4]), np.array([0, 0, 1, 1, 0, 1]))
    own = look("softmax", [found], test)
    own = replace(own, least=np.array([4.5, 4.0], np.float32))
    counts, events = confusion_of(own, test)
    np.testing.assert_array_equal(counts, [[1, 0, 0], [1, 0, 0], [1, 2, 0]])
    assert len(events) == counts.sum()
    nothing = [found[:0]]
    none = evaluate_voc(nothing, [truth], test.classes)
    missed, _ = confusion_of(replace(own, detections=nothing, evaluation=none), test)
    np.testing.assert_array_equal(missed, [[0, 0, 1], [0, 0, 1], [0, 0, 0]])


def test_what_speaks_for_a_region_adds_up_to_its_score(make: Make) -> None:
    study = make(["loss"])
    looks, test = study.looks, study.splits.test
    regions = telling_regions(looks[0], looks[-1])
    assert len({each.image for each in regions}) == len(regions) > 2
    assert {each.words.split(" of ")[0].split(" by ")[0] for each in regions} <= {"found", "a false alarm"}
    shown = evidence_shown(looks, test, test)
    for each in shown:
        assert [head["name"] for head in each["heads"]] == list(NAMES)
        for head in each["heads"]:
            assert head["total"] == pytest.approx(head["score"], abs=1e-4)
            assert sum(value for _, value in head["terms"]) == pytest.approx(head["total"])
            cells = [cell for grid in head["grids"] for cell in grid["cells"]]
            assert len(cells) == (0 if head["name"] == "RBF SVM" else 4)
        told = [one["shows"] for side in each["heads"][1]["support"] for one in side["regions"]]
        assert told == [test.classes[0], "no object"]


def test_contrast_is_that_of_wcag_aa_in_both_themes() -> None:
    def light(colour: str) -> float:
        whole = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
        share = np.frombuffer(bytes.fromhex(whole[1:]), np.uint8) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(a: str, b: str) -> float:
        low, high = sorted((light(a), light(b)))
        return (high + 0.05) / (low + 0.05)

    folder = Path(study_page.__file__).parent
    house, own = ((folder / name).read_text() for name in ("report.css", "study.css"))
    variables = r"--(\w+): (#\w+)"
    day = dict(re.findall(variables, house)) | dict(re.findall(variables, own.split("@media")[0]))
    night = day | dict(re.findall(variables, own.split("@media")[1]))
    assert set(re.findall(variables, own.split("@media")[1])).isdisjoint(day.items())
    for theme in (day, night):
        for paper in ("paper", "pale", "field"):
            assert all(contrast(theme[ink], theme[paper]) >= 4.5 for ink in ("ink", "soft", "accent"))
            assert contrast(theme["strong"], theme[paper]) >= 3  # borders of controls


# What a reader would do; see `browse`.
DRIVE = """
const table = ask("#cells ~ .wide table.sortable")[0];
const at = [...table.tHead.rows[0].cells].findIndex((head) => head.textContent === "mAP");
const column = () => [...table.tBodies[0].rows].map((row) => parseFloat(row.cells[at].textContent));
press(table.tHead.rows[0].cells[at].firstChild);
told.rising = column();
press(table.tHead.rows[0].cells[at].firstChild);
told.falling = column();
told.sort = table.tHead.rows[0].cells[at].getAttribute("aria-sort");
change(table.parentElement.previousElementSibling.querySelector("input"), "softmax regressed", "input");
told.left = [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.textContent);
const slider = document.getElementById("slider");
change(slider, 0, "input");
told.first = document.getElementById("told").textContent;
told.thumbs = ask("#strip img").map((img) => img.src.slice(0, 11));
change(slider, slider.max, "input");
told.last = document.getElementById("told").textContent;
change(document.getElementById("class"), 2, "change");
told.ghost = document.getElementById("told").textContent;
const box = ask("[data-toggles='1']")[0];
const shown = () => ask("[data-layer='1']").map((g) => getComputedStyle(g).display);
told.before = shown();
press(box);
told.after = shown();
press(ask(".confusion:not([hidden]) .pick")[0]);
told.behind = ask("#behind img").length;
change(document.getElementById("confused"), 1, "change");
told.matrices = ask(".confusion").map((each) => each.hidden);
"""


@pytest.mark.slow
def test_a_browser_can_work_it(page: Path, browse: Browse) -> None:
    told = browse(page, DRIVE)
    assert told["errors"] == []
    assert told["rising"] == sorted(told["rising"])
    assert told["falling"] == told["rising"][::-1]
    assert told["rising"] != told["falling"]
    assert told["sort"] == "descending"
    assert told["left"]
    assert all("softmax" in row and "regressed" in row for row in told["left"])
    assert told["first"].startswith("Score ")
    assert told["first"] != told["last"]
    assert set(told["thumbs"]) == {"data:image/"}
    assert told["ghost"] == "There is no object of this class."
    assert set(told["before"]) == {"inline"}
    assert set(told["after"]) == {"none"}
    assert told["focus"]
    assert told["behind"] > 0
    assert told["matrices"] == [True, False, True]
    assert not told["wide"]
