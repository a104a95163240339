"""Figures of a study: effects, learning curves, probabilities, what mistakes cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rcnn_svm.evaluation.bootstrap import Interval
from rcnn_svm.evaluation.calibration import Reliability
from rcnn_svm.evaluation.diagnosis import Diagnosis
from rcnn_svm.evaluation.effects import Effect, Share
from rcnn_svm.evaluation.tide import SPECIAL_TYPES, TIDE_TYPES
from rcnn_svm.experiment.closer import Belief, CloserLook
from rcnn_svm.experiment.curve import Curve
from rcnn_svm.experiment.design import SOFTMAX, SVM
from rcnn_svm.report import palette
from rcnn_svm.report.plots import WIDTH, grid, legend, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curve_figure", "effects_figure", "mistakes_figure", "reliability_figure", "shares_figure"]


def effects_figure(effects: Sequence[Effect]) -> Figure:
    """Draw every effect of a factor as a dot with its interval; those that stand are full, others hollow."""
    rows = [(f"{e.factor}: {e.first} less {e.second}", e.change, e.decided) for e in effects]
    return _dots(rows, "points of mAP, 95 % interval; full: corrected p < 0.05")


def shares_figure(shares: Mapping[bool, Sequence[Share]]) -> Figure:
    """Draw what each factor has of the difference between R-CNN's SVM and its softmax."""
    rows = []
    for boxed, own in shares.items():
        boxes = "boxes regressed" if boxed else "boxes as proposed"
        for share in own:
            name = "R-CNN's SVM less its softmax"
            if share.factor != "all":
                name = f"{share.factor}: {SVM[share.factor]} less {SOFTMAX[share.factor]}"
            decided = not share.change.low <= 0 <= share.change.high
            rows.append((f"{boxes}, {name}", share.change, decided))
    return _dots(rows, "points of mAP, SVM less softmax, 95 % interval; full: zero lies outside")


def _dots(rows: Sequence[tuple[str, Interval, bool]], label: str) -> Figure:
    with style():
        # Words stand above their dots and the figure is narrow, so that a telephone shows all of it.
        figure, ((axes,),) = grid(1, 1, (0.7 * WIDTH, 0.58 * len(rows) + 1.0))
        axes.axvline(0, color=palette.GREY, linewidth=1)
        for y, (name, change, full) in enumerate(rows[::-1]):
            low, value, high = (100 * v for v in (change.low, change.value, change.high))
            colour = palette.BLUE if full else palette.SOFT
            axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
            face = colour if full else "white"
            axes.plot([value], [y], "o", color=colour, markerfacecolor=face, markersize=8)
            edge = axes.get_yaxis_transform()  # x in shares of the axes
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
            axes.text(
                0.0, y + 0.24, name, transform=edge, va="bottom", fontsize=11, parse_math=False, bbox=box
            )
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-0.5, len(rows) - 0.2)
        axes.set_xlabel(label, loc="right")  # it may be longer than the axes
        axes.grid(axis="y", visible=False)
    return figure


def curve_figure(curve: Curve) -> Figure:
    """Draw mAP against the number of images, with 95 % bands, and the law that is fitted, dotted."""
    with style():
        figure, ((axes,),) = grid(1, 1, (WIDTH, 5.2))
        n = np.array(curve.n_images)
        for name in curve.heads:
            colour = palette.THREE_HEADS.get(name, palette.BLUE)
            spans = [point.interval for point in curve.points[name]]
            low, value, high = (
                100 * np.array([getattr(s, k) for s in spans]) for k in ("low", "value", "high")
            )
            axes.fill_between(n, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(n, value, "o-", color=colour, label=name, linewidth=2.2, markersize=7)
            if name in curve.forecasts:
                x = np.geomspace(n[0], 4 * n[-1], 60)
                axes.plot(x, 100 * curve.forecasts[name].law(x), ":", color=colour, linewidth=1.6)
        axes.set_xscale("log")
        ticks = [f"{size or 'all'}\n{images:.0f}" for size, images in zip(curve.sizes, n, strict=True)]
        axes.set_xticks(n, ticks)
        axes.set_xticks([], minor=True)
        axes.set_xlabel(
            "images of each class, and below it images in all; dotted: the power law that is fitted"
        )
        axes.set_ylabel("mAP in percent")
        axes.set_ylim(bottom=0)
        legend(figure, axes)
    return figure


def reliability_figure(looks: Sequence[CloserLook], what: str) -> Figure:
    """Draw how often what is said with a probability is so, one panel per head.

    Args:
        looks: the heads.
        what: `regions` or `detections`.
    """
    with style():
        figure, (panels,) = grid(1, len(looks), (WIDTH, WIDTH / max(3, len(looks)) + 1.1))
        for axes, look in zip(panels, looks, strict=True):
            axes.plot([0, 1], [0, 1], color=palette.GREY, linewidth=1)
            ways: Mapping[str, Belief] = getattr(look.probabilities, what)
            colours = {"as it is": palette.GREEN, "Platt": palette.BLUE, "isotonic": palette.ORANGE}
            for way, judged in ways.items():
                _reliability(axes, judged.drawn, way, colours[way])
            axes.set_title(look.name, fontsize=12, loc="left")
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1)
            axes.set_aspect("equal")
            axes.set_xlabel("probability said")
        panels[0].set_ylabel("share that is so")
        legend(figure, max(panels, key=lambda axes: len(axes.get_legend_handles_labels()[0])))
    return figure


def _reliability(axes: Axes, judged: Reliability, way: str, colour: str) -> None:
    there = judged.count > 0
    x, y = judged.probability[there], judged.share[there]
    spread = np.abs(np.stack([y - judged.low[there], judged.high[there] - y]))
    axes.errorbar(
        x, y, yerr=spread, fmt="o-", color=colour, label=way, markersize=4, linewidth=1.6, elinewidth=1
    )


def mistakes_figure(looks: Sequence[Diagnosis]) -> Figure:
    """Draw what mending each type of mistake would bring, one bar per head."""
    kinds = (*TIDE_TYPES, *SPECIAL_TYPES)
    with style():
        figure, ((axes,),) = grid(1, 1, (WIDTH, 4.4))
        width = 0.8 / len(looks)
        for i, look in enumerate(looks):
            costs = look.tide.costs()
            at = np.arange(len(kinds)) + (i - (len(looks) - 1) / 2) * width
            colour = palette.THREE_HEADS.get(look.name, palette.BLUE)
            axes.bar(at, [100 * costs[kind] for kind in kinds], width, color=colour, label=look.name)
        axes.set_xticks(range(len(kinds)), [kind.replace(" ", "\n") for kind in kinds])
        axes.set_ylabel("points of AP that mending it would bring")
        axes.grid(axis="x", visible=False)
        legend(figure, axes)
    return figure
