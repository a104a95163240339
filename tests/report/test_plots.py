from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from rcnn_svm.evaluation.errors import false_positive_types
from rcnn_svm.report.plots import (
    class_ap_figure,
    error_type_figure,
    head_colours,
    headline_figure,
    precision_recall_figure,
    score_figure,
    svg,
)


def figures(comparison):
    errors = {
        name: false_positive_types(result.matches, comparison.detections[name], comparison.truths)
        for name, result in comparison.evals.items()
    }
    return {
        "map": headline_figure(comparison.metrics),
        "class": class_ap_figure(comparison.evals, comparison.metrics["heads"]),
        "curves": precision_recall_figure(comparison.evals, comparison.metrics["heads"]),
        "errors": error_type_figure(errors),
        "scores": score_figure(comparison.evals),
    }


def test_every_figure_names_its_heads_and_is_reproducible(comparison):
    first, second = figures(comparison), figures(comparison)
    for name, figure in first.items():
        text = svg(figure)
        assert text == svg(second[name])
        written = " ".join(ElementTree.fromstring(text).itertext())
        for head in comparison.evals:
            assert head in written, (name, head)


def test_figures_of_a_split_without_objects(build_comparison):
    nothing = build_comparison({"a": 0.5}, objects=False)
    for figure in figures(nothing).values():
        assert svg(figure).startswith(b"<?xml")


def test_curves_end_at_the_recall_reached(comparison):
    figure = precision_recall_figure(comparison.evals, comparison.metrics["heads"])
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == f"cat & dog ({comparison.evals['rbf-svm'].n_positives[0]})"
    assert len(axes.lines) == len(comparison.evals)
    for line, result in zip(axes.lines, comparison.evals.values(), strict=True):
        recall, precision = line.get_data()
        assert max(recall) == pytest.approx(result.curves[0].recall[-1])
        assert (np.diff(precision) <= 0).all()


def test_colours_are_stable_and_pale_without_regression(about_head):
    def colours(*names):
        return head_colours({name: {"about": about_head(name)} for name in names})

    both = colours("linear-svm", "linear-svm+bbox", "mine")
    assert len(set(both.values())) == 3
    assert colours("linear-svm")["linear-svm"] == both["linear-svm+bbox"]
    assert colours("mine", "yours")["mine"] == both["mine"]
    assert len(set(colours(*(f"head {i}" for i in range(6))).values())) == 6


def test_report_modules_load_no_plotting_library_nor_torch():
    code = (
        "import sys, rcnn_svm.report.html, rcnn_svm.report.tables; "
        "print(sorted({'matplotlib', 'torch', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
