"""A picture of a data set: counts, box sizes, shapes, and example images with their boxes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.datasets import CheckReport
from rcnn_svm.files import atomic_path
from rcnn_svm.report import palette
from rcnn_svm.report.draw import Mark, class_colours, corners, draw_marks
from rcnn_svm.report.plots import style
from rcnn_svm.structures import Dataset, Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_dataset_picture"]

_MOST_CLASSES = 24
_NAMED_BOXES = 8  # more names crowd a small picture
_TILE = 480  # pixels, longer side


def write_dataset_picture(
    path: str | Path, report: CheckReport, *, n_examples: int = 8, seed: int = 0
) -> None:
    """Write a picture: counts, box sizes, shapes, and example images with their boxes.

    Args:
        path: of the PNG.
        report: of `check_dataset`.
        n_examples: images in the mosaic.
        seed: of their choice.

    Raises:
        DataError: an example image cannot be read, or `path` cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    n_rows = -(-n_examples // 4)
    samples = [sample for part in report.distinct for sample in part]
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(sample.truth.boxes for sample in samples)])
    sides = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64)
    labels = np.concatenate([np.zeros(0, np.int64), *(sample.truth.labels for sample in samples)])
    with style():
        layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
        figure = Figure(figsize=(13, 5.2 + 2.6 * n_rows), layout=layout, facecolor="white")
        grid = figure.add_gridspec(2, 1, height_ratios=(4.6, 2.6 * n_rows))
        charts, mosaic = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
        images = " + ".join(f"{len(part)} {part.split}" for part in report.distinct)
        n = len(report.classes)
        title = (
            f"{report.datasets[0].name}: {images} images, {len(boxes)} objects of {n} class{'es' * (n > 1)}"
        )
        figure.suptitle(title, fontsize=14, weight="bold", parse_math=False)
        counts, sizes, shapes = charts.subplots(1, 3, width_ratios=(1.25, 1, 1))
        _plot_counts(counts, report.distinct)
        _plot_sizes(sizes, sides, np.array(class_colours(n))[labels] / 255)
        _plot_shapes(shapes, sides)
        tiles = np.ravel(mosaic.subplots(n_rows, 4, squeeze=False))
        for tile in tiles:
            tile.set_axis_off()
        for tile, sample in zip(tiles, _examples(report, samples, n_examples, seed), strict=False):
            _show(tile, sample, report.classes)
        with atomic_path(Path(path)) as temporary:
            figure.savefig(temporary, dpi=110, format="png")


def _plot_counts(axes: Axes, parts: Sequence[Dataset]) -> None:
    """Stack the objects of each class over the splits; the 24 largest classes."""
    classes = parts[0].classes
    counts = np.stack([part.counts() for part in parts])
    order = np.argsort(-counts.sum(axis=0), kind="stable")[:_MOST_CLASSES]
    rows, left = np.arange(len(order)), np.zeros(len(order))
    for part, count in zip(parts, counts, strict=True):
        known = (colour for name, colour in palette.SPLITS.items() if part.split.startswith(name))
        colour = next(known, palette.PURPLE)
        axes.barh(rows, count[order], left=left, label=part.split, color=colour, height=0.75)
        left += count[order]
    axes.set_yticks(
        rows, [textwrap.shorten(classes[i], 18, placeholder="...") for i in order], parse_math=False
    )
    axes.tick_params(axis="y", labelsize=9 if len(order) <= 12 else 7)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    few = len(classes) <= _MOST_CLASSES
    title = "Objects per class" if few else f"The {_MOST_CLASSES} largest of {len(classes)} classes"
    _label(axes, title, "objects", "")
    axes.legend(
        frameon=False,
        fontsize=9,
        ncols=len(parts),
        loc="lower right",
        bbox_to_anchor=(1.0, 0.995),
        borderaxespad=0,
        columnspacing=1.0,
        handlelength=1.0,
    )


def _plot_sizes(axes: Axes, sides: NDArray[np.float64], colours: NDArray[np.float64]) -> None:
    """Scatter width against height of all boxes."""
    few = np.random.default_rng(0).permutation(len(sides))[:4000]  # more only darkens the picture
    axes.scatter(sides[few, 0], sides[few, 1], s=9, alpha=0.45, c=colours[few], linewidths=0)
    if len(sides):
        limit = float(sides.max()) * 1.15, max(float(sides.min()) * 0.85, 0.8)
        axes.plot(limit, limit, color=palette.GREY, lw=0.8, ls="--", zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
    _label(axes, f"Sizes of {len(sides)} boxes", "width in pixels", "height in pixels")


def _plot_shapes(axes: Axes, sides: NDArray[np.float64]) -> None:
    """Histogram of aspect ratios on a logarithmic axis."""
    edges = 2.0 ** np.linspace(-4, 4, 41)
    ratios = np.clip(sides[:, 0] / sides[:, 1], edges[0], edges[-1])
    axes.hist(ratios, bins=edges.tolist(), color=palette.BLUE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(2.0 ** np.arange(-4, 5, 2), ["1:16", "1:4", "1:1", "4:1", "16:1"])
    axes.axvline(1, color=palette.GREY, lw=0.8, ls="--")
    _label(axes, "Aspect ratios", "width : height", "boxes")


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", weight="bold")
    axes.set(xlabel=x, ylabel=y)


def _examples(report: CheckReport, samples: Sequence[Sample], n: int, seed: int) -> Iterator[Sample]:
    """Draw images with objects that can be read."""
    broken = {one.file for one in report.defects if one.kind in ("image", "size")}
    good = [sample for sample in samples if len(sample.truth) and sample.path not in broken]
    for i in np.random.default_rng(seed).permutation(len(good))[:n]:
        yield good[i]


def _show(axes: Axes, sample: Sample, classes: tuple[str, ...]) -> None:
    """Show an image with its boxes; class names where they do not crowd the picture."""
    truth, colours = sample.truth, class_colours(len(classes))
    marks = [
        Mark(corners(box), colours[label], classes[label] if len(truth) <= _NAMED_BOXES else "")
        for box, label in zip(truth.boxes, truth.labels, strict=True)
    ]
    axes.imshow(draw_marks(sample.read(), marks, longer_side=_TILE), interpolation="antialiased")
    title = textwrap.shorten(sample.image_id, 32, placeholder="...")
    axes.set_title(title, fontsize=8, color=palette.SOFT, parse_math=False)
