"""What is stated is what was measured: `results/` keeps its form and the README says the same."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from rcnn_svm.report.tables import signed

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "results").glob("*/metrics.json"))
STUDIES = sorted((ROOT / "results").glob("*/study.json"))
CURVES = sorted((ROOT / "results").glob("*/curve.json"))
BENCHMARKS = [
    *sorted((ROOT / "results" / "benchmarks").glob("*.json")),
    ROOT / "results/thresholds/thresholds.json",
]


def check_provenance(value: dict) -> None:
    assert set(value) >= {"command", "commit", "date", "seed", "versions", "machine"}
    assert not value["commit"].endswith("-dirty"), "a result must come from committed code"
    assert set(value["machine"]) >= {"cpu", "cores", "ram_gb", "gpu"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.parent.name)
def test_experiments_have_the_form_that_programs_read(path: Path) -> None:
    metrics = json.loads(path.read_text())
    assert metrics["schema"] == 1
    assert metrics["experiment"] == path.parent.name
    assert metrics["heads"]
    for head in metrics["heads"].values():
        values = [value for value in head["ap"].values() if value is not None]
        assert math.isclose(sum(values) / len(values), head["mAP"], abs_tol=1e-9)
        assert head["mAP_interval"][0] <= head["mAP"] <= head["mAP_interval"][1]
        if "coco" in head:  # files of older versions have none
            assert set(head["coco"]) == {"AP", "AP50", "AP75"}
            assert all(0 <= value <= 100 for value in head["coco"].values())
        assert min(head["train_s"], head["score_s_per_image"], head["peak_rss_mb"]) >= 0
    assert set(metrics["stages_s"]) >= {"proposals", "features", "train", "detect"}
    check_provenance(metrics["provenance"])
    for name in ("per_class.csv", "config.json", "README.md"):
        assert (path.parent / name).exists()


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.parent.name)
def test_studies_have_the_form_that_programs_read(path: Path) -> None:
    study = json.loads(path.read_text())
    assert study["schema"] == 1
    assert study["experiment"] == path.parent.name
    assert study["verdict"]
    page = (path.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"- {sentence}\n" in page for sentence in study["verdict"])
    for table in path.parent.glob("*.svg"):
        assert f"]({table.name})" in page
    check_provenance(study["provenance"])


@pytest.mark.parametrize("path", CURVES, ids=lambda p: p.parent.name)
def test_curves_have_the_form_that_programs_read(path: Path) -> None:
    curve = json.loads(path.read_text())
    assert curve["schema"] == 1
    assert curve["experiment"] == path.parent.name
    page = (path.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"- {sentence}\n" in page for sentence in curve["verdict"])
    for point in curve["points"]:
        assert 0 <= point["mAP_low"] <= point["mAP"] <= point["mAP_high"] <= 100
    check_provenance(curve["provenance"])


def test_the_page_says_what_the_study_of_photographs_found() -> None:
    page = (ROOT / "docs" / "why-svm.md").read_text(encoding="utf-8")
    table = ROOT / "results" / "study-voc2007-mini" / "effects.csv"
    rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    edges = [row for row in rows if row["kind"] == "all else equal"]
    assert len(edges) == 12
    for edge in edges:
        change, low, high = (signed(float(edge[name])) for name in ("change", "low", "high"))
        assert f"| {change} | {low} to {high} |" in page


def test_the_study_of_a_network_says_what_its_predictions_do() -> None:
    from rcnn_svm.datasets.digits import single_digits

    folder = ROOT / "results" / "study-cnn"
    study = json.loads((folder / "study.json").read_text())
    truth = "".join(map(str, single_digits("val", "test")[1]))
    right: dict[str, list[int]] = {}
    for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()[1:]:
        run = json.loads(line)
        if "predictions" in run:
            hits = sum(a == b for a, b in zip(run["predictions"], truth, strict=True))
            right.setdefault(run["variant"], []).append(hits)
    base = study["variants"][0]
    for row in study["variants"]:
        name = row["level"] if row["factor"] == "base" else f"{row['factor']}: {row['level']}"
        accuracy = 100 * sum(right[name]) / (study["design"]["n_seeds"] * study["n_test_images"])
        assert math.isclose(row["accuracy"], accuracy, abs_tol=1e-9)
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        if row["change"] is not None:
            assert math.isclose(row["change"], row["accuracy"] - base["accuracy"], abs_tol=1e-9)
            assert row["change_low"] <= row["change"] <= row["change_high"]


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.stem)
def test_benchmarks_have_the_form_that_programs_read(path: Path) -> None:
    result = json.loads(path.read_text())
    assert result["schema"] == 1
    assert result["benchmark"] == path.stem
    assert result["rows"]
    for target in result["targets"].values():
        assert set(target) >= {"value", "unit", "n", "ours", "peer", "peer_name", "how"}
        assert math.isfinite(target["value"])
    check_provenance(result["provenance"])


def test_the_summary_shows_cocos_measures_where_a_file_has_them() -> None:
    spec = importlib.util.spec_from_file_location("summary", ROOT / "benchmarks" / "summary.py")
    assert spec is not None
    assert spec.loader is not None
    summary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(summary)
    entry = {"mAP": 60.0, "mAP_interval": [50.0, 70.0], "train_s": 1.0}
    older = {
        "heads": {"svm": entry, "svm+bbox": entry},
        "stages_s": {},
        "n_train_images": 1,
        "n_test_images": 1,
    }
    row = "| svm | 60.0 [50.0, 70.0] | 60.0 [50.0, 70.0] | 1.0 |"
    assert summary.experiment("x", "words", older)[-1] == row
    coco = {"AP": 31.25, "AP50": 61.0, "AP75": 14.0}
    newer = older | {"heads": {"svm": entry, "svm+bbox": entry | {"coco": coco}}}
    *_, head, rule, row = summary.experiment("x", "words", newer)
    assert head.split(" | ")[3] == "its COCO AP, AP50, AP75"
    assert row == "| svm | 60.0 [50.0, 70.0] | 60.0 [50.0, 70.0] | 31.2, 61.0, 14.0 | 1.0 |"
    assert head.count("|") == rule.count("|") == row.count("|")


def test_the_readme_says_what_the_results_hold() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "summary.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
