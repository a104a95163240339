"""Pictures of proposals: the levels of a grouping, boxes by rank, recall curves.

Each function returns a figure that touches no screen; matplotlib is imported inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes, iou
from rcnn_svm.proposals.recall import ProposalRecall
from rcnn_svm.proposals.selective_search import Grouping, SelectiveSearchConfig, groupings
from rcnn_svm.structures import Image, RegionSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["boxes_figure", "levels_figure", "recall_figure"]

# Okabe and Ito's colours, told apart by the colour-blind too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#9e4a8c", "#5a5a5a", "#b8860b", "#3b9fd4")
_INK, _FAINT = "#1f2933", "#dde3e9"
_DPI = 110


def levels_figure(
    image: Image, config: SelectiveSearchConfig | None = None, *, levels: Sequence[int] = (120, 40, 12, 4)
) -> Figure:
    """Draw how regions grow: a row per colour space, from its segments to a few regions.

    Args:
        image: (H, W, 3) uint8 RGB.
        config: settings; the smallest k and the first mix of each colour space are drawn.
        levels: numbers of regions left, one column each, after the column of the segments.
    """
    config = config or SelectiveSearchConfig()
    rows: dict[str, Grouping] = {}
    for found in groupings(image, config):
        rows.setdefault(found.colour, found)
    figure, axes = _panels(len(rows), 2 + len(levels), image)
    for axis_row, (colour, found) in zip(axes, rows.items(), strict=True):
        name = {"hsv": "HSV", "lab": "Lab", "rgi": "RGI", "h": "hue"}.get(colour, colour)
        axis_row[0].imshow(image)
        axis_row[0].set_ylabel(f"{name}, k = {found.k}", fontsize=9, color=_INK)
        for axis, level in zip(axis_row[1:], (None, *levels), strict=True):
            labels = found.labels(level)
            axis.imshow(_painted(image, labels))
    titles = ["image", f"{len(next(iter(rows.values())).segment_boxes)} segments"]
    for axis, title in zip(axes[0], titles + [f"{level} regions" for level in levels], strict=True):
        axis.set_title(title, fontsize=9, color=_INK)
    for axis_row, found in list(zip(axes, rows.values(), strict=True))[1:]:
        axis_row[1].set_title(f"{len(found.segment_boxes)} segments", fontsize=9, color=_INK)
    return figure


def boxes_figure(
    image: Image,
    regions: RegionSet,
    truth: Boxes | None = None,
    *,
    budgets: Sequence[int] = (20, 100, 500),
) -> Figure:
    """Draw the first boxes, and for each labelled object the best of them.

    Args:
        image: (H, W, 3) uint8 RGB.
        regions: its proposals; the better a box's rank, the brighter it is drawn.
        truth: (G, 4) labelled objects, drawn dashed with the IoU of the best box.
        budgets: numbers of boxes, one panel each.
    """
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke

    figure, axes = _panels(1, len(budgets), image, width=3.7)
    grey = (255 - (255 - image.mean(axis=2, keepdims=True)) * 0.65).astype(np.uint8).repeat(3, axis=2)
    for axis, budget in zip(axes[0], budgets, strict=True):
        best = regions.top(budget)
        axis.imshow(grey)
        shade = colormaps["plasma"]
        for rank in range(len(best) - 1, -1, -1):
            colour = shade(0.9 * rank / max(len(best) - 1, 1))
            _rectangle(axis, best.boxes[rank], colour, 0.7, alpha=max(0.12, min(0.9, 12 / len(best))))
        if truth is not None and len(truth) and len(best):
            overlap = iou(truth, best.boxes)
            for row, box in enumerate(truth):
                winner = best.boxes[int(overlap[row].argmax())]
                _rectangle(axis, box, "white", 2.6)
                _rectangle(axis, box, _INK, 1.2, linestyle=(0, (4, 3)))
                _rectangle(axis, winner, "#00d084", 1.8)
                text = axis.text(
                    float(winner[0]) + 3, float(winner[1]) + 4, f"{overlap[row].max():.2f}",
                    color="white", fontsize=8, weight="bold", va="top",
                )  # fmt: skip
                text.set_path_effects([withStroke(linewidth=2.2, foreground=_INK)])
        axis.set_title(f"first {len(best)} of {len(regions)} boxes", fontsize=10, color=_INK)
    return figure


def recall_figure(curves: Mapping[str, ProposalRecall]) -> Figure:
    """Draw recall at IoU 0.5, 0.7 and 0.8 and the mean average best overlap by number of boxes.

    Args:
        curves: a measurement per name, in the order of the legend; a name that ends in ``(...)``
            says so in the legend.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.1, 3.4), dpi=_DPI, layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, (title, measure) in zip(axes, _MEASURES.items(), strict=True):
        for (name, result), colour in zip(curves.items(), _COLOURS * len(curves), strict=False):
            ours = not name.startswith(("OpenCV", "grid"))
            reached = [
                i for i, b in enumerate(result.budgets) if i == 0 or result.budgets[i - 1] < result.n_boxes
            ]
            axis.plot(
                np.array(result.budgets)[reached], measure(result)[reached], label=name, color=colour,
                linewidth=2.0 if ours else 1.3, linestyle="-" if ours else "--", marker="o", markersize=2.6,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xticks([10, 100, 1000, 10000], ["10", "100", "1000", "10000"])
        axis.minorticks_off()
        axis.set_ylim(0, 1)
        axis.set_title(title, fontsize=10, color=_INK, loc="left")
        axis.set_xlabel("boxes per image", fontsize=9, color=_INK)
        axis.grid(color=_FAINT, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8, colors=_INK, length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    return figure


_MEASURES: dict[str, Any] = {
    "recall at IoU 0.5": lambda r: r.recall(0.5),
    "recall at IoU 0.7": lambda r: r.recall(0.7),
    "recall at IoU 0.8": lambda r: r.recall(0.8),
    "mean average best overlap": lambda r: r.mabo(),
}


def _panels(n_rows: int, n_columns: int, image: Image, width: float = 2.3) -> tuple[Figure, NDArray[Any]]:
    from matplotlib.figure import Figure

    height = width * image.shape[0] / image.shape[1]
    figure = Figure(
        figsize=(width * n_columns, (height + 0.35) * n_rows),
        dpi=_DPI,
        layout="constrained",
        facecolor="white",
    )
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(False)
    return figure, axes


def _painted(image: Image, labels: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Paint each region in its mean colour, with a thin pale line between regions."""
    flat = labels.ravel()
    sizes = np.maximum(np.bincount(flat), 1)
    means = np.stack([np.bincount(flat, image[:, :, c].ravel()) / sizes for c in range(3)], axis=1)
    painted = means[labels]
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    painted[border] = 0.25 * painted[border] + 0.75 * 255
    return painted.astype(np.uint8)


def _rectangle(axis: Axes, box: Any, colour: Any, line: float, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = (float(v) for v in box)
    axis.add_patch(
        Rectangle(
            (x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=line, **style
        )
    )
