"""Evidence for detections as pictures, a page and numbers that anyone can add up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from rcnn_svm.boxes import Boxes, clip, widen
from rcnn_svm.evidence import Cells, Evidence
from rcnn_svm.files import atomic_path, remove_marker, write_json, write_text
from rcnn_svm.networks.taps import TapSpec
from rcnn_svm.report import palette
from rcnn_svm.report.draw import cut
from rcnn_svm.report.html import environment, inline
from rcnn_svm.report.plots import style, svg
from rcnn_svm.structures import Image, TrainingRegions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AGAINST",
    "FOR",
    "Explained",
    "crops_of",
    "evidence_figure",
    "evidence_files",
    "strongest",
    "terms_of",
    "words_of",
    "write_evidence",
]

FOR, AGAINST = palette.BLUE, palette.ORANGE
"""Colours of what speaks for a class and against it."""
_N_SHOWN = 5
"""Support vectors on either side that are shown one by one."""
_MOST_NUMBERS = 49
"""Cells of a grid that have room for their numbers."""
_PICTURE, _CROP = 480, 200  # pixels, longer side


@dataclass(frozen=True, eq=False)
class Explained:
    """A detection and the evidence for it.

    Attributes:
        box: (4,) where the detection ended up.
        score: of the detection; below that of its region where soft-NMS or refinement lowered it.
        evidence: for the region that was scored.
    """

    box: NDArray[np.float32]
    score: float
    evidence: Evidence


def strongest(evidence: Evidence) -> tuple[list[int], list[int]]:
    """Return the support vectors that add most and those that take most, five each, strongest first."""
    terms = evidence.support if evidence.support is not None else np.zeros(0)
    order = np.argsort(-terms, kind="stable")
    most, least = order[:_N_SHOWN], order[::-1][:_N_SHOWN]
    return most[terms[most] > 0].tolist(), least[terms[least] < 0].tolist()


def terms_of(evidence: Evidence) -> list[tuple[str, float]]:
    """Return what a score is the sum of, by words: a term a tap, or a term a group of support vectors."""
    terms = [(words_of(cells), float(cells.shares.sum())) for cells in evidence.cells]
    if evidence.support is not None:
        values = evidence.support
        for rows, group, sign in zip(strongest(evidence), ("for", "against"), (1, -1), strict=True):
            others = np.setdiff1d(np.flatnonzero(sign * values > 0), rows)
            terms.append((f"the {len(rows)} strongest {group}", float(values[rows].sum())))
            terms.append((f"all {len(others)} others {group}", float(values[others].sum())))
    return terms + list(evidence.constants.items())


def words_of(cells: Cells) -> str:
    """Return which layer the cells are of, and of how much of the image."""
    tap, n = TapSpec.parse(cells.tap), cells.shares.size
    if np.isinf(tap.widen):
        where = "the whole image"
    else:
        where = "the region" if tap.widen == 1 else f"{tap.widen:g} times the region"
    return f"{tap.layer}, {where}" + (f", {n} cells" if n > 1 else "")


def evidence_figure(
    image: Image,
    explained: Explained,
    classes: Sequence[str],
    *,
    regions: TrainingRegions | None = None,
    crops: Mapping[int, Image] | None = None,
) -> Figure:
    """Draw the evidence for one detection: blue speaks for the class, orange against it.

    Args:
        image: (H, W, 3) uint8 RGB.
        explained: the detection.
        classes: K names.
        regions: which training regions the support vectors are; None where that is not known.
        crops: pixels of training regions by support vector; one that is missing is told in words.
    """
    from matplotlib.figure import Figure

    with style():
        if explained.evidence.support is None:
            figure = Figure(figsize=(11.1, 4.4), layout="constrained")
            _draw_cells(figure, image, explained)
        else:
            figure = Figure(figsize=(11.1, 7.2), layout="constrained")
            _draw_support(figure, image, explained, classes, regions, crops or {})
    return figure


def _draw_cells(figure: Figure, image: Image, explained: Explained) -> None:
    evidence = explained.evidence
    grids = [c for c in evidence.cells if c.shares.size > 1] or list(evidence.cells[:1])
    ratios = [1.0] * (1 + len(grids)) + [1.35]
    first, *panels, bars = figure.subplots(1, len(ratios), gridspec_kw={"width_ratios": ratios})
    _draw_place(first, image, explained)
    largest = max(float(np.abs(c.shares).max()) for c in grids) or 1.0
    for axes, cells in zip(panels, grids, strict=True):
        _draw_grid(axes, image, cells, largest)
    _draw_bars(bars, evidence)


def _draw_place(axes: Axes, image: Image, explained: Explained) -> None:
    """Draw where in the picture the region lies, and, dashed, where the detection ended up."""
    axes.imshow(_thumbnail(image, _PICTURE), extent=_extent(image), interpolation="none")
    for box, line in ((explained.evidence.box, "-"), (explained.box, "--")):
        for colour, width in ((palette.INK, 4.0), ("white", 1.8)):
            axes.add_patch(_rectangle(box, fill=False, edgecolor=colour, linewidth=width, linestyle=line))
    _bare(axes, "line: the region\ndashed: the detection")


def _draw_grid(axes: Axes, image: Image, cells: Cells, largest: float) -> None:
    """Draw a region in grey with its cells tinted, the strongest of the figure in full."""
    from matplotlib.patheffects import withStroke

    height, width = image.shape[:2]
    around = clip(widen(cells.box[None], 1.15), (height, width))[0]
    pixels, place = cut(image, around)
    grey = PillowImage.fromarray(_thumbnail(pixels, _PICTURE)).convert("L")
    extent = (place[0], place[2], place[3], place[1])
    axes.imshow(grey, extent=extent, cmap="gray", vmin=-60, vmax=300, interpolation="none")
    rows, columns = cells.shares.shape
    left, top, right, bottom = (float(value) for value in cells.box)
    x, y = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
    for (i, j), share in np.ndenumerate(cells.shares):
        box = np.array([x[j], y[i], x[j + 1], y[i + 1]])
        colour, strength = FOR if share > 0 else AGAINST, abs(share) / largest
        axes.add_patch(_rectangle(box, facecolor=colour, alpha=0.75 * strength, linewidth=0))
        axes.add_patch(_rectangle(box, fill=False, edgecolor="white", linewidth=0.8))
        if cells.shares.size <= _MOST_NUMBERS:
            axes.text(
                (x[j] + x[j + 1]) / 2,
                (y[i] + y[i + 1]) / 2,
                _signed(share),
                ha="center",
                va="center",
                fontsize=11 if max(rows, columns) <= 4 else 7,
                fontweight="bold",
                clip_on=True,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
    axes.set_xlim(extent[:2])
    axes.set_ylim(extent[2:])
    _bare(axes, words_of(cells))


def _draw_support(
    figure: Figure,
    image: Image,
    explained: Explained,
    classes: Sequence[str],
    regions: TrainingRegions | None,
    crops: Mapping[int, Image],
) -> None:
    evidence = explained.evidence
    assert evidence.support is not None
    grid = figure.add_gridspec(3, 1 + _N_SHOWN, height_ratios=(1, 1, 0.95))
    _draw_place(figure.add_subplot(grid[0, 0]), image, explained)
    axes = figure.add_subplot(grid[1, 0])
    _draw_pixels(axes, cut(image, clip(evidence.box[None], image.shape[:2])[0])[0])
    _bare(axes, "the region")
    for row, (group, colour) in enumerate(zip(strongest(evidence), (FOR, AGAINST), strict=True)):
        for column, s in enumerate(group, 1):
            axes = figure.add_subplot(grid[row, column])
            if s in crops:
                _draw_pixels(axes, crops[s])
            else:
                axes.set_facecolor(palette.FAINT)
                axes.set_box_aspect(1)
            _bare(axes, f"{_signed(float(evidence.support[s]))}\n{_label(regions, s, classes)}")
            for spine in axes.spines.values():
                spine.set(visible=True, color=colour, linewidth=3)
    _draw_bars(figure.add_subplot(grid[2, :]), evidence)


def _label(regions: TrainingRegions | None, s: int, classes: Sequence[str]) -> str:
    """Return what a support vector shows, and of which image it is."""
    if regions is None:
        return f"support vector {s}"
    label, overlap = int(regions.labels[s]), float(regions.overlaps[s])
    shows = "no object" if label < 0 else classes[label] + ("" if overlap == 1 else f", IoU {overlap:.2f}")
    return f"{shows}\n{regions.image_ids[s]}"


def _draw_pixels(axes: Axes, pixels: Image) -> None:
    axes.imshow(_thumbnail(pixels, _CROP), interpolation="none")


def _draw_bars(axes: Axes, evidence: Evidence) -> None:
    """Draw a bar a term, and the score below them."""
    terms = terms_of(evidence)
    values = [value for _, value in terms] + [evidence.total]
    names = [name for name, _ in terms] + ["sum: the score"]
    colours = [FOR if value > 0 else AGAINST for value in values[:-1]] + [palette.INK]
    span = max(0.0, *values) - min(0.0, *values) or 1.0
    for y, (value, colour) in enumerate(zip(values, colours, strict=True)):
        axes.barh(-y, value, color=colour, height=0.66)
        side = 1 if value >= 0 else -1
        weight = "bold" if y == len(terms) else "normal"
        axes.text(
            value + side * 0.02 * span,
            -y,
            _signed(value),
            va="center",
            ha="left" if side > 0 else "right",
            fontsize=10,
            fontweight=weight,
        )
    axes.axvline(0, color=palette.INK, linewidth=0.8)
    axes.set_yticks([-y for y in range(len(values))], names, parse_math=False, fontsize=10)
    axes.set_xlim(min(0.0, *values) - 0.24 * span, max(0.0, *values) + 0.24 * span)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="x", labelsize=9)
    axes.tick_params(axis="y", length=0)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _bare(axes: Axes, words: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_xlabel(words, fontsize=9, parse_math=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _rectangle(box: NDArray[np.floating], **look: Any) -> Any:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = (float(value) for value in box)
    return Rectangle((x1, y1), x2 - x1, y2 - y1, **look)


def _extent(image: Image) -> tuple[float, float, float, float]:
    return 0, image.shape[1], image.shape[0], 0


def _thumbnail(pixels: Image, longer_side: int) -> Image:
    picture = PillowImage.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((longer_side, longer_side))
    return np.asarray(picture)


def crops_of(
    sample_pixels: Mapping[str, Image], regions: TrainingRegions, rows: Sequence[int]
) -> dict[int, Image]:
    """Return the pixels of training regions by their row, out of images by id."""
    return {s: cut(sample_pixels[regions.image_ids[s]], regions.boxes[s])[0] for s in rows}


def evidence_files(folder: Path, n: int) -> list[Path]:
    """Return the files that `write_evidence` writes for `n` detections."""
    return [folder / "index.html", *_pictures(folder, n), folder / "evidence.json"]


def _pictures(folder: Path, n: int) -> list[Path]:
    return [folder / f"evidence-{i}.svg" for i in range(1, n + 1)]


def write_evidence(
    folder: Path,
    image: Image,
    explained: Sequence[Explained],
    classes: Sequence[str],
    about: Mapping[str, Any],
    *,
    regions: TrainingRegions | None = None,
    crops: Mapping[int, Image] | None = None,
) -> None:
    """Write `index.html`, `evidence-1.svg` and so on, and last `evidence.json`, which holds every term.

    Args:
        folder: made if need be.
        image: (H, W, 3) uint8 RGB.
        explained: detections of it.
        classes: K names.
        about: `image`, its id; `head`, the detector's; and what else goes into `evidence.json`.
        regions: as in `evidence_figure`.
        crops: as in `evidence_figure`.

    Raises:
        DataError: the folder cannot be written to.
        DiskSpaceError: the disk is full.
    """
    remove_marker(folder / "evidence.json")  # where it lies, the rest is whole
    shown = []
    for path, each in zip(_pictures(folder, len(explained)), explained, strict=True):
        picture = svg(evidence_figure(image, each, classes, regions=regions, crops=crops))
        with atomic_path(path) as temporary:
            temporary.write_bytes(picture)
        shown.append(_shown(each, classes) | {"src": inline("svg+xml", picture), "file": path.name})
    template = environment().get_template("evidence.html.jinja")
    kernel = any(each.evidence.support is not None for each in explained)
    text = template.render(about=about, shown=shown, kernel=kernel, colours=(FOR, AGAINST))
    write_text(folder / "index.html", text)
    numbers = [_numbers(each, classes, regions) for each in explained]
    write_json(
        folder / "evidence.json",
        {"schema": 1, **about, "classes": list(classes), "detections": numbers},
    )


def _shown(each: Explained, classes: Sequence[str]) -> dict[str, Any]:
    """Return one detection as the page tells it."""
    evidence = each.evidence
    rivals = []
    if evidence.rivals is not None:
        names = [*classes, "background"]
        order = [int(j) for j in np.argsort(-evidence.rivals) if evidence.rivals[j] >= 0.005]
        rivals = [f"{names[j]} {100 * evidence.rivals[j]:.0f} %" for j in order]
    return {
        "class": classes[evidence.label],
        "score": each.score,
        "of_region": evidence.score,
        "lowered": each.score < evidence.score - 1e-4,
        "total": evidence.total,
        "terms": terms_of(evidence),
        "rivals": rivals,
    }


def _numbers(each: Explained, classes: Sequence[str], regions: TrainingRegions | None) -> dict[str, Any]:
    """Return every term of one detection as plain data."""
    evidence = each.evidence
    found: dict[str, Any] = {
        "class": classes[evidence.label],
        "box": _rounded(each.box),
        "score": each.score,
        "region": _rounded(evidence.box),
        "score_of_region": evidence.score,
        "sum": evidence.total,
        "constants": dict(evidence.constants),
        "cells": [
            {"tap": c.tap, "box": _rounded(c.box), "shares": c.shares.tolist()} for c in evidence.cells
        ],
    }
    if evidence.rivals is not None:
        found["rivals"] = dict(zip([*classes, "background"], evidence.rivals.tolist(), strict=True))
    if evidence.support is not None:
        found["support"] = list(_support(evidence.support, classes, regions))
    return found


def _support(
    terms: NDArray[np.float64], classes: Sequence[str], regions: TrainingRegions | None
) -> Iterator[dict[str, Any]]:
    """Yield the terms that are not zero, largest first."""
    for s in np.argsort(-terms, kind="stable").tolist():
        if terms[s] == 0:
            continue
        line: dict[str, Any] = {"support_vector": s, "share": float(terms[s])}
        if regions is not None:
            label = int(regions.labels[s])
            line |= {
                "image": regions.image_ids[s],
                "box": _rounded(regions.boxes[s]),
                "object": None if label < 0 else classes[label],
                "iou": float(regions.overlaps[s]),
            }
        yield line


def _rounded(box: Boxes) -> list[float]:
    return [round(float(value), 2) for value in box]
