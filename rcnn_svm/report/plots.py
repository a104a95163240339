"""Figures of a comparison, one colour per head throughout; nothing here touches a screen.

A head and its version with box regression share a colour: pale and dashed without it, full with it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.evaluation.errors import ERROR_TYPES, FalsePositives
from rcnn_svm.evaluation.voc import FALSE, HIT, Curve, EvalResult
from rcnn_svm.report import palette
from rcnn_svm.report.tables import is_classified, ranked_heads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "WIDTH",
    "class_ap_figure",
    "confusion_figure",
    "error_type_figure",
    "grid",
    "head_colours",
    "headline_figure",
    "legend",
    "precision_recall_figure",
    "sampled",
    "score_figure",
    "style",
    "svg",
    "threshold_figure",
]

WIDTH = 11.1  # inches: the text column of the page at 96 pixels per inch


_TELLING = 0.05
"""Precision below which a score is of no interest to somebody who looks for a threshold."""
_MOST_COUNTED = 24  # classes of a confusion matrix whose cells show numbers


def head_colours(heads: Mapping[str, Any]) -> dict[str, str]:
    """Return a colour per head of `metrics["heads"]` as `#rrggbb`; others get the next of six free ones."""
    colours = dict(palette.HEADS)
    free = iter(palette.MORE_HEADS * len(heads))
    for head in heads.values():
        if head["about"]["base"] not in colours:
            colours[head["about"]["base"]] = next(free)
    plain = _outdone(heads)
    return {
        name: _paler(colours[head["about"]["base"]]) if name in plain else colours[head["about"]["base"]]
        for name, head in heads.items()
    }


def _outdone(heads: Mapping[str, Any]) -> set[str]:
    """Return the heads without box regression that stand beside themselves with it."""
    with_boxes = {head["about"]["base"] for head in heads.values() if head["about"]["boxes"]}
    return {n for n, h in heads.items() if not h["about"]["boxes"] and h["about"]["base"] in with_boxes}


def headline_figure(metrics: Mapping[str, Any]) -> Figure:
    """Draw mAP, or the accuracy of images, by head, best on top, with 95 % intervals."""
    measure = "accuracy" if is_classified(metrics) else "mAP"
    heads = {
        name: head["classification"] if measure == "accuracy" else head
        for name, head in metrics["heads"].items()
    }
    names = ranked_heads(metrics)[::-1]
    colours = head_colours(metrics["heads"])
    with style():
        figure, ((axes,),) = grid(1, 1, (WIDTH, 0.44 * len(names) + 1.0))
        for y, name in enumerate(names):
            value = heads[name][measure] or 0.0
            axes.barh(y, value, color=colours[name], height=0.66)
            low, high = heads[name].get(f"{measure}_interval") or (value, value)
            low, high = (value, value) if low is None or high is None else (low, high)
            axes.plot([low, high], [y, y], color=palette.INK, linewidth=1.6, solid_capstyle="butt")
            axes.plot([low, high], [y, y], "|", color=palette.INK, markersize=8, markeredgewidth=1.6)
            axes.text(max(value, high) + 1, y, f"{value:.1f}", va="center", fontweight="bold")
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"{measure} in percent, with 95 % interval")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    return figure


def class_ap_figure(evals: Mapping[str, EvalResult], heads: Mapping[str, Any]) -> Figure:
    """Draw AP by class as one dot per head, easiest class on top."""
    names = list(heads)
    colours = head_colours(heads)
    classes = next(iter(evals.values())).classes
    ap = np.array([100 * evals[name].ap() for name in names])  # (heads, K)
    present = np.flatnonzero(~np.isnan(ap).any(axis=0))
    order = present[np.argsort(ap[:, present].mean(axis=0), kind="stable")]
    with style():
        figure, ((axes,),) = grid(1, 1, (WIDTH, 0.34 * len(order) + 1.5))
        for y, k in enumerate(order):
            axes.plot([ap[:, k].min(), ap[:, k].max()], [y, y], color=palette.FAINT, linewidth=6, zorder=1)
        for i, name in enumerate(names):
            axes.plot(
                ap[i, order],
                range(len(order)),
                linestyle="none",
                marker="o" if heads[name]["about"]["boxes"] else "D",
                markersize=8 if heads[name]["about"]["boxes"] else 6,
                color=colours[name],
                markeredgecolor="white",
                label=name,
                zorder=3,
            )
        axes.set_yticks(range(len(order)), [classes[k] for k in order], parse_math=False)
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.set_xlim(0, 100)
        axes.set_xlabel("AP in percent")
        axes.grid(axis="y", visible=False)
        legend(figure, axes)
    return figure


def confusion_figure(metrics: Mapping[str, Any], name: str) -> Figure:
    """Draw what a head takes the images of each class for, as shares of the class."""
    head = metrics["heads"][name]
    classes, counts = list(head["ap"]), np.array(head["classification"]["confusion"], np.float64)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n = len(classes)
    side = min(WIDTH, 0.55 * n + 3.0)
    with style():
        figure, ((axes,),) = grid(1, 1, (side + 1.0, side))
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(n), classes, rotation=90 if n > 8 else 30, ha="center", parse_math=False)
        axes.set_yticks(range(n), classes, parse_math=False)
        axes.set_xlabel("taken for")
        axes.set_ylabel("images of")
        axes.grid(visible=False)
        if n <= _MOST_COUNTED:
            for y, x in np.argwhere(counts > 0).tolist():
                colour = "white" if share[y, x] > 0.6 else palette.INK
                axes.text(x, y, f"{counts[y, x]:.0f}", ha="center", va="center", fontsize=10, color=colour)
    return figure


def precision_recall_figure(evals: Mapping[str, EvalResult], heads: Mapping[str, Any]) -> Figure:
    """Draw a precision-recall curve per class and head: at each recall, the best precision from there on."""
    names = list(heads)
    colours = head_colours(heads)
    plain, first = _outdone(heads), next(iter(evals.values()))
    shown = np.flatnonzero(first.n_positives > 0)
    n_columns = min(4, max(1, len(shown)))
    n_rows = max(1, -(-len(shown) // n_columns))
    width = WIDTH if n_columns > 1 else 5.6
    with style():
        figure, cells_of = grid(n_rows, n_columns, (width, width / n_columns * n_rows + 0.9))
        cells = [axes for row in cells_of for axes in row]
        for axes, k in zip(cells, shown, strict=False):
            for name in names:
                recall, precision = _envelope(evals[name], int(k))
                axes.plot(
                    recall,
                    precision,
                    color=colours[name],
                    linewidth=1.7,
                    linestyle=(0, (3, 1.2)) if name in plain else "-",
                    label=name,
                )
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1.03)
            axes.set_xticks([0, 0.5, 1])
            axes.set_yticks([0, 0.5, 1])
            title = f"{first.classes[k]} ({first.n_positives[k]})"
            axes.set_title(title, fontsize=12, loc="left", parse_math=False)
        for axes in cells[len(shown) :]:
            axes.set_visible(False)
        for row in cells_of:
            row[0].set_ylabel("precision")
        for axes in cells[max(0, len(shown) - n_columns) : len(shown)]:
            axes.set_xlabel("recall")
        if len(shown):
            legend(figure, cells[0])
    return figure


def sampled(curve: Curve, most: int) -> NDArray[np.intp]:
    """Return at most so many rows of a curve, rising, denser at the top, each the last of its score."""
    last = np.flatnonzero(np.append(np.diff(curve.scores) < 0, len(curve.scores) > 0))
    if len(last) <= most:
        return last
    even = np.linspace(0, len(last) - 1, most // 2).round().astype(np.intp)
    dense = np.geomspace(1, len(last), most // 2).round().astype(np.intp) - 1
    return last[np.union1d(even, dense)]


def threshold_figure(result: EvalResult, least: NDArray[np.floating]) -> Figure:
    """Draw precision, recall and F1 of each class against the score from which on detections are believed.

    Args:
        result: of a detector.
        least: (K,) the scores that were chosen; drawn where they lie among those of the class.

    Scores below which nearly everything is false, and no threshold lies, are left out.
    """
    shown = [k for k, curve in enumerate(result.curves) if len(curve.scores)]
    n_columns = min(4, max(1, len(shown)))
    n_rows = max(1, -(-len(shown) // n_columns))
    width = WIDTH if n_columns > 1 else 5.6
    colours = {"precision": palette.BLUE, "recall": palette.ORANGE, "F1": palette.INK}
    with style():
        figure, cells_of = grid(n_rows, n_columns, (width, width / n_columns * n_rows + 0.9))
        cells = [axes for row in cells_of for axes in row]
        for axes, k in zip(cells, shown, strict=False):
            curve = result.curves[k]
            rows = sampled(curve, 400)
            telling = rows[(curve.precision[rows] >= _TELLING) | (curve.scores[rows] >= least[k])]
            rows = telling if len(telling) > 1 else rows
            score, precision, recall = (v[rows] for v in (curve.scores, curve.precision, curve.recall))
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            for (name, colour), values in zip(colours.items(), (precision, recall, f1), strict=True):
                axes.plot(score, values, color=colour, linewidth=1.7, label=name)
            if score[-1] <= least[k] <= score[0]:
                axes.axvline(float(least[k]), color=palette.GREY, linestyle="--", linewidth=1.4)
            axes.set_ylim(0, 1.03)
            axes.set_yticks([0, 0.5, 1])
            axes.tick_params(axis="x", labelsize=10)
            axes.set_title(result.classes[k], fontsize=12, loc="left", parse_math=False)
        for axes in cells[len(shown) :]:
            axes.set_visible(False)
        for axes in cells[max(0, len(shown) - n_columns) : len(shown)]:
            axes.set_xlabel("score")
        if shown:
            legend(figure, cells[0])
    return figure


def error_type_figure(errors: Mapping[str, FalsePositives]) -> Figure:
    """Draw what the surest detections of each head were: hits and the four types of mistakes."""
    names = list(errors)[::-1]
    kinds = ("correct", *ERROR_TYPES)
    counts = np.array([[errors[n].n_correct.sum(), *errors[n].counts.sum(axis=0)] for n in names], np.float64)
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with style():
        figure, ((axes,),) = grid(1, 1, (WIDTH, 0.42 * len(names) + 1.4))
        left = np.zeros(len(names))
        for i, kind in enumerate(kinds):
            axes.barh(
                range(len(names)),
                share[:, i],
                left=left,
                color=palette.OUTCOMES[kind],
                height=0.7,
                label=kind,
            )
            for y in range(len(names)):
                if share[y, i] >= 5:
                    middle = left[y] + share[y, i] / 2
                    axes.text(middle, y, f"{share[y, i]:.0f}", ha="center", va="center", fontsize=11)
            left += share[:, i]
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.set_xlim(0, 100)
        axes.set_xlabel("percent of the N surest detections of each class, N its number of objects")
        axes.grid(visible=False)
        axes.tick_params(axis="y", length=0)
        legend(figure, axes)
    return figure


def score_figure(evals: Mapping[str, EvalResult]) -> Figure:
    """Draw how the scores of hits and of false detections are spread, one panel per head."""
    names = list(evals)
    n_columns = min(4, len(names))
    n_rows = -(-len(names) // n_columns)
    with style():
        figure, cells_of = grid(n_rows, n_columns, (WIDTH, 2.0 * n_rows + 0.8))
        cells = [axes for row in cells_of for axes in row]
        for axes, name in zip(cells, names, strict=False):
            matches = evals[name].matches
            hits, false = (matches.score[matches.outcome == kind] for kind in (HIT, FALSE))
            both = np.concatenate([hits, false]).astype(np.float64)
            if len(both):
                edges = np.linspace(*_spread(both), 41).tolist()
                for scores, colour, label in (
                    (false, palette.OUTCOMES["background"], "false"),
                    (hits, palette.OUTCOMES["correct"], "hits"),
                ):
                    axes.hist(
                        np.clip(scores, edges[0], edges[-1]), edges, color=colour, alpha=0.85, label=label
                    )
                axes.set_yscale("log")
            axes.set_title(name, fontsize=11.5, loc="left", parse_math=False)
            axes.tick_params(labelsize=10)
            axes.minorticks_off()
        for axes in cells[len(names) :]:
            axes.set_visible(False)
        for row in cells_of:
            row[0].set_ylabel("detections")
        legend(figure, cells[0])
    return figure


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG that is the same for the same data: no date, no random names."""
    import matplotlib

    stream = io.BytesIO()
    settings: Any = {"svg.hashsalt": "rcnn_svm", "svg.fonttype": "none"}
    with style(), matplotlib.rc_context(settings):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _envelope(result: EvalResult, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the corners of one class's interpolated curve, thinned to some 200 points."""
    curve = result.curves[k]
    changes = np.flatnonzero(np.diff(curve.recall, prepend=0.0) > 0)
    if not len(changes):
        return np.array([0.0]), np.array([0.0])
    recall = curve.recall[changes]
    precision = np.maximum.accumulate(curve.precision[changes][::-1])[::-1]
    keep = np.unique(np.linspace(0, len(recall) - 1, 200).round().astype(int))
    recall, precision = recall[keep], precision[keep]
    return np.concatenate([[0.0], recall, recall[-1:]]), np.concatenate([precision[:1], precision, [0.0]])


def _spread(scores: NDArray[np.float64]) -> tuple[float, float]:
    """Return a range that holds nearly all scores, whatever a few extreme ones do."""
    low, high = np.percentile(scores, [0.2, 99.9])
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def _paler(colour: str) -> str:
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(value + 0.5 * (255 - value)):02x}" for value in channels)


def grid(n_rows: int, n_columns: int, size: tuple[float, float]) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure of a size in inches, and its panels by row and column."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False)
    return figure, [list(row) for row in panels]


def legend(figure: Figure, axes: Axes) -> None:
    """Put the legend of some axes below the figure; names are no mathematics."""
    handles, labels = axes.get_legend_handles_labels()
    box = figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels) if len(labels) <= 5 else 4,
        frameon=False,
    )
    for text in box.get_texts():
        text.set_parse_math(False)


@contextmanager
def style() -> Iterator[None]:
    """Draw as all figures of reports are drawn, inside the block."""
    import matplotlib

    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "text.color": palette.INK,
        "axes.labelcolor": palette.INK,
        "axes.edgecolor": palette.GREY,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": palette.FAINT,
        "grid.linewidth": 0.8,
        "xtick.color": palette.SOFT,
        "ytick.color": palette.INK,
        "legend.fontsize": 11.5,
    }
    with matplotlib.rc_context(settings):
        yield
