from __future__ import annotations

import csv
import json
from typing import get_args

import pytest

from rcnn_svm.config import from_dict
from rcnn_svm.evaluation.bootstrap import Interval
from rcnn_svm.evaluation.voc import Rule
from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.report import experiment, html
from rcnn_svm.report.tables import (
    comparison_rows,
    head_metrics,
    markdown,
    ranked_differences,
    ranked_heads,
    signed_interval,
    write_tables,
)


@pytest.mark.parametrize("rule", get_args(Rule))
def test_every_rule_can_be_asked_for_and_has_its_names(rule):
    assert from_dict(ExperimentConfig, {"rule": rule}).rule == rule
    assert rule in experiment._RULES
    assert rule in html._RULES


def test_rows_are_ranked_and_hold_the_paired_difference(comparison):
    rows = comparison_rows(comparison.metrics, comparison.bootstrap)
    assert [row["head"] for row in rows] == ranked_heads(comparison.metrics)
    assert [row["mAP"] for row in rows] == sorted((row["mAP"] for row in rows), reverse=True)
    assert rows[0]["minus_best"] is None
    for row in rows[1:]:
        assert row["minus_best"] == pytest.approx(row["mAP"] - rows[0]["mAP"])
        assert row["minus_best_low"] <= row["minus_best"] <= row["minus_best_high"]
    assert {row["n_support_vectors"] for row in rows} == {None, 1234}


def test_differences_are_better_minus_worse(comparison):
    ranked = ranked_differences(comparison.bootstrap)
    values = [each.mean.value for each in ranked]
    assert len(ranked) == 15
    assert values == sorted(values, reverse=True)
    assert values[-1] >= 0


def test_markdown_is_aligned_and_complete(comparison):
    text = markdown(comparison.metrics, comparison.bootstrap)
    tables = text.strip().split("\n\n")
    assert len(tables) == 3
    for table in tables:
        assert len({len(line) for line in table.splitlines()}) == 1
    best = ranked_heads(comparison.metrics)[0]
    assert tables[0].splitlines()[2].startswith(f"| {best} ")
    assert len(tables[2].splitlines()) == 2 + 15
    assert "support vectors" in tables[0]
    alone = markdown(comparison.metrics)
    assert "minus best" not in alone
    assert len(alone.strip().split("\n\n")) == 2


def test_files_agree_with_the_metrics(comparison, tmp_path):
    paths = write_tables(tmp_path, comparison.metrics, comparison.bootstrap)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    with open(tmp_path / "per_class.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["class"] for row in rows] == ["cat & dog", "car", "ghost", "mean"]
    head = comparison.metrics["heads"]["linear-svm"]
    assert float(rows[0]["linear-svm"]) == pytest.approx(head["ap"]["cat & dog"])
    assert rows[2]["linear-svm"] == ""
    assert float(rows[3]["linear-svm"]) == pytest.approx(head["mAP"])
    value = json.loads((tmp_path / "comparison.json").read_text())
    assert len(value["heads"]) == 6
    assert len(value["bootstrap"]["differences"]) == 15
    with open(tmp_path / "comparison.csv", newline="") as stream:
        assert [row["head"] for row in csv.DictReader(stream)] == ranked_heads(comparison.metrics)


def test_head_metrics_are_percent_and_null_where_undefined(comparison, build_comparison):
    head = comparison.metrics["heads"]["rbf-svm"]
    assert head["mAP"] == pytest.approx(100 * comparison.evals["rbf-svm"].map())
    assert head["mAP_interval"][0] <= head["mAP"] <= head["mAP_interval"][1]
    assert head["ap"]["ghost"] is None
    nothing = build_comparison({"a": 0.5}, objects=False)
    entry = head_metrics(
        nothing.evals["a"], nothing.bootstrap.mean["a"], train_s=0, score_s_per_image=0, peak_rss_mb=0
    )
    assert (entry["mAP"], entry["mAP_interval"]) == (None, None)


def test_signed_interval():
    assert signed_interval(Interval(0.0123, -0.004, 0.03)) == "+1.2 [-0.4, +3.0]"
    assert signed_interval(Interval(-0.0001, -0.02, 0.0)) == "0.0 [-2.0, 0.0]"
