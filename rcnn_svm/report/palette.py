"""The colours of figures and pictures, as `#rrggbb`."""

from __future__ import annotations

from rcnn_svm.evaluation.errors import ERROR_TYPES

INK, SOFT, FAINT, GREY = "#1f2933", "#52606d", "#dde3e9", "#aab2ba"

# Okabe and Ito's colours, told apart by the colour-blind too.
BLUE, VERMILION, GREEN, ORANGE, YELLOW = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#f0e442"
PURPLE = "#9e4a8c"

HEADS = {"linear-svm": BLUE, "rbf-svm": VERMILION, "softmax-refit": GREEN, "softmax-finetuned": PURPLE}
"""Of the heads that have a name; others take `MORE_HEADS` in turn."""
THREE_HEADS = {"linear SVM": BLUE, "RBF SVM": VERMILION, "softmax": GREEN}
"""Of the heads of a study that are looked at closer."""
MORE_HEADS = ("#b8860b", "#3b9fd4", "#5a5a5a", "#a23b3b", "#5b6abf", "#4f7f2f")

FOUND, FALSE, MISSED, LEFT_OUT = GREEN, VERMILION, YELLOW, GREY
"""Of boxes on photographs: what a detection turned out to be, an object without one, what does not count."""
OUTCOMES = dict(
    zip(("correct", *ERROR_TYPES), ("#4c9f70", "#f0b24b", "#e0793b", "#c4567a", "#9aa3ad"), strict=True)
)
"""Paler, of areas: hits and the four types of mistakes."""

SPLITS = {"train": BLUE, "val": ORANGE, "test": GREEN}
"""Of the splits of a data set, by what their names begin with; others take `PURPLE`."""
