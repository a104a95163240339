from __future__ import annotations

import copy
import csv
import json
from typing import get_args

import pytest

from rcnn_svm.config import from_dict
from rcnn_svm.evaluation.bootstrap import Difference, Interval
from rcnn_svm.evaluation.voc import RULE_NAMES, Rule
from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.report.tables import (
    LOCALISATION,
    comparison_rows,
    comparison_table,
    difference_cells,
    head_metrics,
    markdown,
    ranked_differences,
    ranked_heads,
    signed,
    write_tables,
)


@pytest.mark.parametrize("rule", get_args(Rule))
def test_every_rule_can_be_asked_for_and_has_a_name(rule):
    assert from_dict(ExperimentConfig, {"rule": rule}).rule == rule
    assert rule in RULE_NAMES


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
    assert tables.pop(1) == LOCALISATION
    assert len(tables) == 3
    for table in tables:
        assert len({len(line) for line in table.splitlines()}) == 1
    best = ranked_heads(comparison.metrics)[0]
    assert tables[0].splitlines()[2].startswith(f"| {best} ")
    assert len(tables[2].splitlines()) == 2 + 15
    assert "support vectors" in tables[0]
    alone = markdown(comparison.metrics)
    assert "minus best" not in alone
    assert len(alone.strip().split("\n\n")) == 3


def test_cocos_measures_stand_beside_the_map(comparison):
    columns, body = comparison_table(comparison.metrics, comparison.bootstrap)
    assert [each.title for each in columns][:7] == [
        "head",
        "mAP",
        "95 % interval",
        "minus best",
        "COCO AP",
        "AP50",
        "AP75",
    ]
    for name, *cells in body:
        summary = comparison.cocos[name].summary()
        assert cells[3:6] == [f"{100 * summary[key]:.1f}" for key in ("AP", "AP50", "AP75")]
    rows = comparison_rows(comparison.metrics)
    assert [row["coco_AP75"] for row in rows] == [
        pytest.approx(100 * comparison.cocos[row["head"]].summary()["AP75"]) for row in rows
    ]


def test_figures_that_no_head_has_get_no_column(comparison, build_comparison):
    """Files of older versions know nothing of COCO's measures."""
    metrics = copy.deepcopy(comparison.metrics)
    for head in metrics["heads"].values():
        del head["coco"]
    columns, body = comparison_table(metrics, comparison.bootstrap)
    assert [each.title for each in columns][3:5] == ["minus best", "training s"]
    assert all(len(line) == len(columns) for line in body)
    assert LOCALISATION not in markdown(metrics)
    assert comparison_rows(metrics)[0]["coco_AP75"] is None
    nothing = build_comparison({"a": 0.5, "b": 0.5}, objects=False)
    columns, body = comparison_table(nothing.metrics, nothing.bootstrap)
    titles = [each.title for each in columns]
    assert (titles[:3], body[0][:2]) == (["head", "mAP", "training s"], ["a", "none"])
    assert "nan" not in markdown(nothing.metrics, nothing.bootstrap)


def test_an_own_measure_gets_a_column_whatever_its_name(comparison):
    metrics = copy.deepcopy(comparison.metrics)
    best = ranked_heads(metrics)[0]
    metrics["heads"][best]["measures"] = {"mAP": 0.25, "x.y": 2.0}
    columns, body = comparison_table(metrics)
    titles = [each.title for each in columns]
    assert titles[titles.index("AP75") + 1 :][:2] == ["mAP", "x.y"]
    assert all(each.says for each in columns)
    assert body[0][titles.index("x.y") - 1 :][:2] == ["0.250", "2.000"]
    assert body[0][1] == f"{metrics['heads'][best]['mAP']:.1f}"
    assert [row["measure_x.y"] for row in comparison_rows(metrics)] == [2.0, *[None] * 5]


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
        nothing.evals["a"],
        nothing.cocos["a"],
        nothing.bootstrap.mean["a"],
        about={},
        train_s=0,
        score_s_per_image=0,
        peak_rss_mb=0,
    )
    assert (entry["mAP"], entry["mAP_interval"]) == (None, None)
    assert entry["coco"] == {"AP": None, "AP50": None, "AP75": None}


def test_a_difference_in_cells():
    gap = Difference("a", "b", Interval(0.0123, -0.004, 0.03), {}, 0.25)
    assert difference_cells(gap) == ["+1.2", "-0.4 to +3.0", "25.0 %", "not decided"]
    assert [signed(value) for value in (-0.01, 0.04, 0.05, -2)] == ["0.0", "0.0", "+0.1", "-2.0"]
