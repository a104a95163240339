from __future__ import annotations

import functools

import numpy as np
import pytest

from rcnn_svm.evaluation.bootstrap import BootstrapResult, Difference, Interval
from rcnn_svm.report.findings import findings


@pytest.fixture
def made_up(about_head):
    return functools.partial(_made_up, about_head)


def _made_up(about, values, half_width):
    """A comparison in which every difference has an interval of the given half width."""
    names = list(values)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    differences = []
    for a, b in pairs:
        gap = (values[a] - values[b]) / 100
        interval = Interval(gap, gap - half_width / 100, gap + half_width / 100)
        differences.append(Difference(a, b, interval, {}, 0.1))
    metrics = {"n_test_images": 60, "heads": {n: {"mAP": v, "about": about(n)} for n, v in values.items()}}
    flat = {name: Interval(0, 0, 0) for name in names}
    samples = {name: np.zeros(1) for name in names}
    return metrics, BootstrapResult("voc07", 1, 0, flat, {}, tuple(differences), samples)


def test_a_supported_winner_is_called_one(made_up):
    (first,) = findings(*made_up({"a": 60.0, "b": 70.5}, 3))
    assert first.question == "Which head wins?"
    assert first.answer == (
        "b wins with 70.5 mAP, 10.5 points ahead of a, more than the choice of the 60 test images explains "
        "(95 % interval +7.5 to +13.5)."
    )
    assert first.supported


def test_an_unsupported_winner_is_not(made_up):
    (first,) = findings(*made_up({"a": 70.0, "b": 70.5}, 3))
    assert first.answer == (
        "No clear winner: b comes first with 70.5 mAP, 0.5 points ahead of a, but 60 test images do not "
        "settle it (95 % interval −2.5 to +3.5, which includes zero)."
    )
    assert not first.supported


def test_questions_of_the_project(made_up):
    values = {
        "linear-svm": 60.0,
        "linear-svm+bbox": 66.0,
        "rbf-svm": 63.0,
        "rbf-svm+bbox": 67.0,
        "softmax-refit": 50.0,
    }
    found = {each.question: each for each in findings(*made_up(values, 5))}
    assert list(found) == [
        "Which head wins?",
        "SVM or softmax?",
        "Is a kernel worth it?",
        "What does box regression add?",
    ]
    assert found["SVM or softmax?"].answer.startswith(
        "rbf-svm+bbox reaches 67.0, softmax-refit 50.0, each the best of its kind: 17.0 points apart, more "
    )
    assert found["SVM or softmax?"].supported
    assert found["Is a kernel worth it?"].answer.startswith(
        "rbf-svm+bbox is 1.0 points ahead of linear-svm+bbox, but"
    )
    regression = found["What does box regression add?"]
    assert regression.answer == (
        "Change in mAP by box regression: +4.0 for rbf-svm (not decided) and +6.0 for linear-svm."
    )
    assert not regression.supported


def test_heads_are_known_by_what_they_are_not_by_their_names(made_up):
    metrics, bootstrap = made_up({"one": 60.0, "two": 66.0, "three": 50.0, "svm-like": 70.0}, 5)
    kinds = {"one": ("svm", "linear"), "two": ("svm", "polynomial"), "three": ("softmax", None)}
    for name, (family, kernel) in kinds.items():
        metrics["heads"][name]["about"] |= {"family": family, "kernel": kernel}
    metrics["heads"]["svm-like"]["about"]["family"] = "other"
    found = {each.question: each.answer for each in findings(metrics, bootstrap)}
    assert found["SVM or softmax?"].startswith("two reaches 66.0, three 50.0")
    assert found["Is a kernel worth it?"].startswith("two is 6.0 points ahead of one")


@pytest.mark.parametrize("values", [{"a": 60.0}, {"a": None, "b": None}, {}])
def test_nothing_is_said_without_a_comparison(values, made_up):
    metrics, _ = made_up({name: value or 0.0 for name, value in values.items()}, 1)
    for name, value in values.items():
        metrics["heads"][name]["mAP"] = value
    assert findings(metrics, made_up({"a": 1.0}, 1)[1]) == []
