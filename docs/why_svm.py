"""Draw the two figures of why-svm.md: what a loss asks for, and where three heads draw their boundaries.

python docs/why_svm.py [--out docs]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import SVC

from rcnn_svm import LinearSVM
from rcnn_svm.report import palette
from rcnn_svm.report.plots import style, svg

CLASSES = (palette.BLUE, palette.VERMILION, palette.GREEN)
ROWS_PER_CLASS = 40
COST = 1.0


def draw_losses() -> Figure:
    """Draw loss and slope over the margin, with the rows that a loss has done with shaded."""
    margin = np.linspace(-2.5, 4, 651)
    inside = np.maximum(0, 1 - margin)
    curves = {
        "hinge": (inside, np.where(margin < 1, -1.0, 0.0), palette.BLUE, "-"),
        "squared hinge": (inside**2, -2 * inside, palette.ORANGE, (0, (5, 2))),
        "logistic (softmax)": (
            np.log1p(np.exp(-margin)),
            -1 / (1 + np.exp(margin)),
            palette.GREEN,
            (0, (1.5, 1.5)),
        ),
    }
    with style():
        figure = Figure(figsize=(7.6, 3.7), layout="constrained")
        loss, slope = figure.subplots(1, 2)
        for name, (values, slopes, colour, dashes) in curves.items():
            loss.plot(margin, values, color=colour, linestyle=dashes, linewidth=2.4, label=name)
            slope.plot(margin, slopes, color=colour, linestyle=dashes, linewidth=2.4)
        loss.set(ylim=(-0.1, 4), title="loss")
        slope.set(ylim=(-3.1, 0.15), title="its slope")
        for axes in (loss, slope):
            axes.axvspan(1, 4, color=palette.FAINT, alpha=0.55, linewidth=0)
            axes.set(xlim=(-2.5, 4), xlabel="margin m = y (w·x + b)")
        loss.text(2.5, 3.2, "hinge:\nno loss,\nno pull", ha="center", va="center", color=palette.INK)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def rows_of_three_classes() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return (120, 2) rows of three clouds and their (120,) labels."""
    rng = np.random.default_rng(3)
    means = np.array([[-1.6, -0.8], [1.6, -0.8], [0.0, 1.7]])
    rows = [rng.normal(mean, 0.62, (ROWS_PER_CLASS, 2)) for mean in means]
    return np.concatenate(rows), np.repeat(np.arange(3), ROWS_PER_CLASS)


def draw_boundaries() -> Figure:
    """Draw the regions of a softmax, of linear SVMs and of RBF SVMs, each trained on the same rows."""
    rows, labels = rows_of_three_classes()
    side = np.linspace(-5, 5, 301)
    points = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    softmax = LogisticRegression(C=COST).fit(rows, labels)
    linear = LinearSVM(C=COST, loss="hinge").fit(rows, labels)
    rbf = OneVsRestClassifier(SVC(C=COST, gamma=0.5)).fit(rows, labels)
    with style():
        figure = Figure(figsize=(7.6, 2.8), layout="constrained")
        panels = figure.subplots(1, 3, sharex=True, sharey=True)
        probabilities = softmax.predict_proba(points)
        _regions(panels[0], side, probabilities.argmax(axis=1), None)
        panels[0].contour(
            side,
            side,
            probabilities.max(axis=1).reshape(301, 301),
            levels=[0.7, 0.95],
            colors=palette.INK,
            linewidths=0.8,
            linestyles=["dotted", "dashed"],
        )
        panels[0].set_title("softmax")
        for axes, name, scores in (
            (panels[1], "linear SVMs", linear.decision_function(points)),
            (panels[2], "RBF SVMs", rbf.decision_function(points)),
        ):
            _regions(axes, side, scores.argmax(axis=1), scores.max(axis=1) < 0)
            axes.set_title(name)
        supports = (
            np.zeros(0, np.int64),
            np.flatnonzero((_margins(linear.decision_function(rows), labels) <= 1 + 1e-3).any(axis=1)),
            np.unique(np.concatenate([part.support_ for part in rbf.estimators_])),
        )
        for axes, support in zip(panels, supports, strict=True):
            for k, colour in enumerate(CLASSES):
                axes.plot(*rows[labels == k].T, "o", markersize=3.6, color=colour)
            axes.plot(*rows[support].T, "o", markersize=7.5, fillstyle="none", color=palette.INK)
            axes.set(xlim=(-5, 5), ylim=(-5, 5), xticks=[], yticks=[], aspect="equal")
            axes.grid(visible=False)
    return figure


def _margins(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return y times the score of every row and class, from (n, K) scores."""
    return np.where(labels[:, None] == np.arange(scores.shape[1]), scores, -scores)


def _regions(
    axes: Axes, side: NDArray[np.float64], winner: NDArray[np.int64], none: NDArray[np.bool_] | None
) -> None:
    """Fill the plane with the colour of the highest class, and grey where no class is claimed."""
    shown = winner if none is None else np.where(none, 3, winner)
    colours = ListedColormap([*CLASSES, palette.GREY])
    extent = (side[0], side[-1], side[0], side[-1])
    axes.imshow(
        shown.reshape(len(side), len(side)),
        origin="lower",
        extent=extent,
        cmap=colours,
        vmin=0,
        vmax=3,
        alpha=0.28,
        interpolation="nearest",
    )


def main() -> None:
    """Write both figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    for name, figure in (("why-svm-losses", draw_losses()), ("why-svm-boundaries", draw_boundaries())):
        (options.out / f"{name}.svg").write_bytes(svg(figure))


if __name__ == "__main__":
    main()
