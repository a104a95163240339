"""The page of an evaluation: its numbers against those of others, and that a browser can work it."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcnn_svm.evaluation.coco import evaluate_coco
from rcnn_svm.evaluation.diagnosis import Diagnosis, diagnose
from rcnn_svm.evaluation.thresholds import choose_thresholds
from rcnn_svm.evaluation.voc import evaluate_voc
from rcnn_svm.report.evaluation import evaluation_files, write_evaluation
from rcnn_svm.structures import Dataset, Detections, GroundTruth, Sample
from tests.report.conftest import Browse
from tests.report.test_html import Page

EVIL = "\"'><script>x</script>&amp;"
ABOUT = {
    "command": "rcnn-svm evaluate <x>",
    "commit": "abc",
    "date": "2026",
    "machine": {"cpu": "c", "cores": 2, "ram_gb": 4, "gpu": None},
    "versions": {"a": "1"},
}


def diagnosed(found: list[Detections], dataset: Dataset, least: Any = None) -> Diagnosis:
    truths = [sample.truth for sample in dataset]
    voc = evaluate_voc(found, truths, dataset.classes)
    least = choose_thresholds(voc.matches).scores if least is None else np.array(least, np.float32)
    return diagnose("made <up>", found, truths, voc, least)


def written(folder: Path, found: list[Detections], dataset: Dataset, least: Any = None) -> Path:
    truths = [sample.truth for sample in dataset]
    coco = None if dataset.whole else evaluate_coco(found, truths, dataset.classes)
    diagnosis = diagnosed(found, dataset, least)
    return write_evaluation(folder, diagnosis, coco, dataset, chosen="of <b>", about=ABOUT)


def rows(page: Path, name: str) -> list[dict[str, str]]:
    with (page.parent / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def made(build_comparison: Any) -> tuple[list[Detections], Dataset]:
    built = build_comparison({"a": 0.7})
    return built.detections["a"], built.dataset


@pytest.fixture(scope="module")
def page(made: tuple[list[Detections], Dataset], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("evaluation"), *made)


def test_the_page_is_whole_and_asks_for_nothing(page: Path) -> None:
    assert all(path.exists() for path in evaluation_files(page.parent))
    text = page.read_text(encoding="utf-8")
    closed = re.sub(
        r"<(rect|text)([^>]*)/>", r"<\1\2></\1>", text.replace("<input", "<img src='data:image/'")
    )
    parsed = Page(closed)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(link[1:] in parsed.ids for link in parsed.links)
    assert all(image["src"].startswith("data:image/") for image in parsed.images)
    assert not re.search(r"https?://|url\(|@import|<link|<script src", re.sub(r'"data:[^"]*"', "", text))
    names = [
        "classes",
        "thresholds",
        "sizes",
        "mistakes",
        "scores",
        "pictures",
        "missed",
        "confusion",
        "origin",
    ]
    assert [name for name in parsed.ids if name in names] == names


def test_the_tables_agree_with_each_other_and_with_the_measures(
    page: Path, made: tuple[list[Detections], Dataset]
) -> None:
    found = diagnosed(*made)
    result, believed = found.evaluation, found.believed()
    classes = rows(page, "classes")
    assert [row["class"] for row in classes] == list(made[1].classes)
    measured = choose_thresholds(result.matches).measure(result.matches)
    assert 100 * believed.found.sum() / believed.n_objects.sum() == pytest.approx(measured["recall"])
    total = sum((believed.found, believed.duplicates, believed.false)).sum()
    assert 100 * believed.found.sum() / total == pytest.approx(measured["precision"])
    confusion: Counter[tuple[str, str]] = Counter()
    for row in rows(page, "confusion"):
        confusion[row["object"], row["taken_for"]] += int(row["count"])
    images = rows(page, "images")
    for k, row in enumerate(classes):
        name = row["class"]
        assert int(row["found"]) == confusion[name, name] == believed.found[k]
        assert int(row["objects"]) == sum(n for (actual, _), n in confusion.items() if actual == name)
        wrong = sum(n for (actual, said), n in confusion.items() if said == name != actual)
        assert int(row["duplicates"]) + int(row["other_false"]) == wrong
        if row["AP"]:
            assert float(row["AP"]) == pytest.approx(100 * result.ap()[k])
        # At the threshold itself the curve says the same as the counts.
        own = [each for each in rows(page, "thresholds") if each["class"] == name]
        above = [each for each in own if float(each["score"]) >= found.least[k]]
        if above:
            for measure in ("precision", "recall", "F1"):
                assert float(above[-1][measure]) == pytest.approx(float(row[measure]))
    for column in ("found", "missed", "duplicates", "other_false"):
        assert sum(int(row[column]) for row in images) == sum(int(row[column]) for row in classes)
    for row in rows(page, "mistakes"):
        assert float(row["cost"]) == pytest.approx(100 * found.tide.costs()[row["mistake"]])


def test_duplicates_are_told_from_other_false_detections() -> None:
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)
    truth = GroundTruth(boxes, np.array([0, 0]))
    data = Dataset("d", "test", ("a",), (Sample("i", (60, 60), truth),))
    there = np.concatenate([boxes[:1], boxes[:1], [[40, 40, 50, 50], [20, 0, 30, 10]]]).astype(np.float32)
    found = [Detections("i", there, np.array([4.0, 3, 2, 1]), np.zeros(4, np.int64))]
    counts = diagnosed(found, data, [1.5]).believed()
    assert [v.tolist() for v in (counts.found, counts.missed, counts.duplicates, counts.false)] == [
        [1],
        [1],
        [1],
        [1],
    ]
    assert counts.precision().tolist() == [1 / 3]
    assert counts.recall().tolist() == [0.5]
    assert counts.f1().tolist() == [0.4]


def test_names_are_never_markup(build_comparison: Any, tmp_path: Path) -> None:
    built = build_comparison({"a": 0.7}, classes=(EVIL, "car", "ghost"), image_id=EVIL + "{}")
    text = written(tmp_path, built.detections["a"], built.dataset).read_text(encoding="utf-8")
    assert "<script>x" not in text
    assert text.count("</script>") == 2


def test_nothing_to_see(
    build_comparison: Any, made: tuple[list[Detections], Dataset], tmp_path: Path
) -> None:
    nothing = [Detections.empty(one.image_id) for one in made[0]]
    text = written(tmp_path / "none", nothing, made[1]).read_text(encoding="utf-8")
    assert "no detection is believed, and 0 of" in text
    built = build_comparison({"a": 0.7}, objects=False)
    text = written(tmp_path / "empty", built.detections["a"], built.dataset).read_text(encoding="utf-8")
    assert "there is nothing to measure" in text


def test_whole_images_have_no_boxes(tmp_path: Path) -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    full = np.array([[0, 0, 20, 20]], np.float32)
    samples = tuple(
        Sample(str(i), (20, 20), GroundTruth(full, np.array([i % 2])), render=lambda: pixels)
        for i in range(8)
    )
    data = Dataset("whole", "test", ("a", "b"), samples, whole=True)
    found = [
        Detections(str(i), np.repeat(full, 2, axis=0), np.array([1.0 + (i == 3), 1.5]), np.array([0, 1]))
        for i in range(8)
    ]
    page = written(tmp_path, found, data)
    text = page.read_text(encoding="utf-8")
    assert 'id="confusion"' in text
    assert not any(f'id="{name}"' in text for name in ("pictures", "missed", "mistakes", "sizes"))
    assert not (tmp_path / "mistakes.csv").exists()


DRIVE = """
const slider = document.getElementById("slider");
change(slider, 0, "input");
told.first = document.getElementById("told").textContent;
told.thumbs = ask("#strip img").length;
change(document.getElementById("class"), 2, "change");
told.ghost = document.getElementById("told").textContent;
told.hidden = ["head", "confused"].map((id) => document.getElementById(id).offsetParent === null);
press(ask("[data-toggles='1']")[0]);
told.layer = ask("[data-layer='1']").map((g) => getComputedStyle(g).display);
press(ask(".pick")[0]);
told.behind = ask("#behind img").length;
press(ask("#classes ~ .wide th button")[1]);
const sorted = [...ask("#classes ~ .wide table")[0].tBodies[0].rows];
told.sorted = sorted.map((row) => Number(row.cells[1].textContent));
told.reached = ask("a, button, select, input, summary, [tabindex]").every((e) => e.tabIndex >= 0);
"""


def test_a_browser_can_work_it(page: Path, browse: Browse) -> None:
    told = browse(page, DRIVE)
    assert told["errors"] == []
    assert re.fullmatch(r"Score .*: precision .* %, recall .* %, F1 .* %; \d+ objects; .*", told["first"])
    assert "the threshold, of <b>, is" in told["first"]
    assert told["thumbs"] > 0
    assert told["ghost"] == "There is no object of this class."
    assert told["hidden"] == [True, True]
    assert set(told["layer"]) == {"none"}
    assert told["focus"]
    assert told["behind"] > 0
    assert told["sorted"] == sorted(told["sorted"])
    assert told["reached"]
    assert not told["wide"]
