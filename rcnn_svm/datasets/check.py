"""A report on a data set: what is in it, and everything that is wrong with it, in words and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes, area
from rcnn_svm.datasets.images import read_image
from rcnn_svm.datasets.layout import ROLES, role_of
from rcnn_svm.datasets.loading import Classes, Format, open_source
from rcnn_svm.datasets.records import WARNINGS, Collector, Defect, Report
from rcnn_svm.errors import DataError
from rcnn_svm.files import atomic_path, file_digest
from rcnn_svm.progress import track
from rcnn_svm.structures import Dataset, Image, Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CheckReport", "check_dataset"]

_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_SHOWN = 8  # defects of one kind that the text spells out
_KINDS = {
    "split": "splits that cannot be read",
    "no-labels": "splits without label files",
    "labels": "label files that cannot be read",
    "image": "images that cannot be read",
    "size": "images of another size than labelled",
    "malformed": "objects that cannot be read",
    "no-area": "boxes of no area",
    "outside": "boxes that reach out of their image",
    "unknown-class": "objects of unknown classes",
    "twice": "images listed twice",
    "leakage": "images that several splits share",
    "duplicate": "identical images within a split",
    "doubled": "objects labelled twice",
    "unlabelled": "images without a label file",
    "orphan": "label files without an image",
    "no-object": "splits without an object",
    "missing-class": "splits without an object of some class",
    "empty-split": "splits without an image",
    "other-class": "objects of classes that were not asked for",
    "category": "categories that only group others",
    "similar": "classes whose names differ in case or spaces only",
    "link": "links that are not followed",
    "unused": "files that were not used",
}


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What `check_dataset` found.

    Attributes:
        path: the data set.
        format: `voc`, `coco` or `yolo`.
        datasets: each split with all that is good in it.
        defects: all that is not, in the order of `to_text`.
    """

    path: Path
    format: Format
    datasets: tuple[Dataset, ...]
    defects: tuple[Defect, ...]

    @property
    def errors(self) -> tuple[Defect, ...]:
        """The defects that loading stops at, and leakage: what is more than a warning."""
        return tuple(one for one in self.defects if one.kind not in WARNINGS or one.kind == "leakage")

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names."""
        return self.datasets[0].classes

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-able values; percentiles are those of 0, 5, 25, 50, 75, 95, 100."""
        return {
            "path": str(self.path),
            "format": self.format,
            "classes": list(self.classes),
            "splits": {part.split: _describe(part) for part in self.datasets},
            "defects": [
                {"kind": one.kind, "file": str(one.file), "message": one.message} for one in self.defects
            ],
        }

    def to_text(self) -> str:
        """Return the report in words and tables, for a terminal."""
        content = self.to_json()
        lines = [
            f"{self.path}: {self.format.upper()}, {len(self.classes)} classes, {len(self.datasets)} splits",
            "",
        ]
        rows = [["split", "images", "without objects", "objects", "difficult", "crowd"]]
        for name, one in content["splits"].items():
            rows.append([name, *(str(one[key]) for key in _COUNTS)])
        lines += [*_table(rows), "", "Objects per class (images with the class)"]
        rows = [["class", *content["splits"]]]
        for name in self.classes:
            counts = [one["classes"][name] for one in content["splits"].values()]
            rows.append([name, *(f"{count['objects']} ({count['images']})" for count in counts)])
        lines += [*_table(rows), "", "Sizes, as percentiles over all splits, in pixels"]
        whole = _sizes(_all_samples(self.datasets))
        rows = [
            ["", *(f"{p} %" if p not in (0, 100) else {0: "least", 100: "most"}[p] for p in _PERCENTILES)]
        ]
        for name, key in _SIZES.items():
            rows.append([name, *(f"{value:.4g}" for value in whole[key])])
        lines += [*_table(rows), ""]
        if not self.defects:
            return "\n".join([*lines, "No defects were found.", ""])
        lines.append(f"{len(self.defects)} defects")
        for kind, what in _KINDS.items():
            found = [one.message for one in self.defects if one.kind == kind]
            if found:
                lines += ["", f"{len(found)} x {what}"]
                lines += [f"  - {message}" for message in found[:_SHOWN]]
                lines += [f"  - and {len(found) - _SHOWN} more"] * (len(found) > _SHOWN)
        return "\n".join([*lines, ""])

    def plot(self, path: str | Path, *, n_examples: int = 8, seed: int = 0) -> None:
        """Write a picture: counts, box sizes, shapes, and example images with their boxes.

        Args:
            path: of the PNG.
            n_examples: images in the mosaic.
            seed: of their choice.

        Raises:
            DataError: an example image cannot be read, or `path` cannot be written.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        n_rows = -(-n_examples // 4)
        figure = Figure(
            figsize=(13, 5.2 + 2.6 * n_rows),
            layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08),
            facecolor="white",
        )
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2, 1, height_ratios=(4.6, 2.6 * n_rows))
        charts, mosaic = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
        figure.suptitle(f"{self.datasets[0].name}: {_sentence(self.datasets)}", fontsize=14, weight="bold")
        axes = charts.subplots(1, 3, width_ratios=(1.25, 1, 1))
        colours = _palette(len(self.classes))
        self._plot_counts(axes[0])
        self._plot_sizes(axes[1], colours)
        self._plot_shapes(axes[2])
        tiles = np.ravel(mosaic.subplots(n_rows, 4, squeeze=False))
        for tile in tiles:
            tile.set_axis_off()
        for tile, (sample, image) in zip(tiles, self._examples(n_examples, seed), strict=False):
            _draw(tile, sample, image, self.classes, colours)
        with atomic_path(Path(path)) as temporary:
            figure.savefig(temporary, dpi=110, format="png")

    def _plot_counts(self, ax: Axes) -> None:
        """Stack the objects of each class over the splits; the 24 largest classes."""
        parts = _disjoint(self.datasets)
        counts = np.stack([part.counts() for part in parts])
        order = np.argsort(-counts.sum(axis=0), kind="stable")[:24]
        rows, left = np.arange(len(order)), np.zeros(len(order))
        for part, count in zip(parts, counts, strict=True):
            ax.barh(
                rows, count[order], left=left, label=part.split, color=_split_colour(part.split), height=0.75
            )
            left += count[order]
        ax.set_yticks(
            rows, [textwrap.shorten(self.classes[i], 18, placeholder="...") for i in order], parse_math=False
        )
        ax.tick_params(axis="y", labelsize=9 if len(order) <= 12 else 7)
        ax.invert_yaxis()
        title = (
            f"The 24 largest of {len(self.classes)} classes"
            if len(self.classes) > 24
            else "Objects per class"
        )
        _label(ax, title, "objects", "")
        ax.legend(
            frameon=False,
            fontsize=9,
            ncols=len(parts),
            loc="lower right",
            bbox_to_anchor=(1.0, 0.995),
            borderaxespad=0,
            columnspacing=1.0,
            handlelength=1.0,
        )

    def _plot_sizes(self, ax: Axes, colours: NDArray[np.floating]) -> None:
        """Scatter width against height of all boxes."""
        boxes, labels = _all_boxes(self.datasets)
        sides = boxes[:, 2:] - boxes[:, :2]
        few = np.random.default_rng(0).permutation(len(sides))[:4000]  # more only darkens the picture
        ax.scatter(sides[few, 0], sides[few, 1], s=9, alpha=0.45, c=colours[labels[few]], linewidths=0)
        if len(sides):
            limit = float(sides.max()) * 1.15, max(float(sides.min()) * 0.85, 0.8)
            ax.plot(limit, limit, color="0.6", lw=0.8, ls="--", zorder=0)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter("{x:g}")
        _label(ax, f"Sizes of {len(sides)} boxes", "width in pixels", "height in pixels")

    def _plot_shapes(self, ax: Axes) -> None:
        """Histogram of aspect ratios on a logarithmic axis."""
        boxes, _ = _all_boxes(self.datasets)
        sides = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64)
        ratios = sides[:, 0] / sides[:, 1] if len(sides) else np.ones(0)
        edges = 2.0 ** np.linspace(-4, 4, 41)
        ax.hist(np.clip(ratios, edges[0], edges[-1]), bins=edges, color="#4c78a8")  # type: ignore[arg-type]
        ax.set_xscale("log", base=2)
        ticks = 2.0 ** np.arange(-4, 5, 2)
        ax.set_xticks(ticks, ["1:16", "1:4", "1:1", "4:1", "16:1"])
        ax.axvline(1, color="0.6", lw=0.8, ls="--")
        _label(ax, "Aspect ratios", "width : height", "boxes")

    def _examples(self, n: int, seed: int) -> Iterable[tuple[Sample, Image]]:
        """Draw images with objects that can be read."""
        samples = [sample for sample in _all_samples(self.datasets) if len(sample.truth)]
        broken = {one.file for one in self.defects if one.kind in ("image", "size")}
        good = [sample for sample in samples if sample.path not in broken]
        for i in np.random.default_rng(seed).permutation(len(good))[:n]:
            yield good[i], good[i].read()


_COUNTS = ("images", "images_without_objects", "objects", "difficult", "crowd")
_SIZES = {
    "box width": "box_widths",
    "box height": "box_heights",
    "box area, square root": "box_sizes",
    "box width / height": "aspect_ratios",
    "image width": "image_widths",
    "image height": "image_heights",
}


def check_dataset(
    path: str | Path, *, format: str | None = None, classes: Classes = None, decode: bool = True
) -> CheckReport:
    """Read every split of a data set and collect all its defects.

    Defects are broken label files, bad boxes (as `load_dataset` defines them), missing, truncated or
    unreadable images, sizes that differ from the labels, identical image files within a split and, which
    is leakage, across splits (`trainval` and its parts aside), classes without an object in a split, and
    splits without an image.

    Args:
        path: the folder, or YOLO's YAML file.
        format: `voc`, `coco` or `yolo`; None detects it.
        classes: as in `load_dataset`.
        decode: decode all pixels; without, only headers are read and truncation stays unseen.

    Raises:
        DataError: there is no data set, or the file that describes it cannot be read.
        ConfigError: an unknown format or a bad class list.
    """
    opened = open_source(path, format)
    collector = Collector()
    names = opened.class_names(classes, collector)
    root = opened.source.root
    parts = []
    for split in sorted(opened.source.splits(), key=_usual_order):
        part = opened.load(split, collector)
        if not part:
            message = f"{root}: split {split!r} has no image that can be read."
            collector(Defect("empty-split", root, message))
        missing = [name for name, count in zip(names, part.counts(), strict=True) if not count]
        if missing and part:
            some = ", ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else ".")
            message = f"{root}: split {split!r} lacks objects of: {some}"
            collector(Defect("missing-class", root, message))
        parts.append(part)
    files = {sample.path: sample.size for part in parts for sample in part if sample.path is not None}
    digests = _look_at_images(files, decode, collector)
    _compare_images(_disjoint(parts), digests, collector)
    order = list(_KINDS)
    defects = sorted(collector.defects, key=lambda one: order.index(one.kind))
    return CheckReport(opened.path, opened.format, tuple(parts), tuple(defects))


def _look_at_images(files: Mapping[Path, tuple[int, int]], decode: bool, report: Report) -> dict[Path, str]:
    """Return the hash of each image file that can be read; report the others."""
    digests = {}
    for file, size in track(files.items(), "check images", total=len(files)):
        try:
            digests[file] = file_digest(file)
            if decode:
                read_image(file, labelled_size=size)
        except DataError as error:
            report(Defect("image", file, str(error)))
    return digests


def _compare_images(parts: Sequence[Dataset], digests: Mapping[Path, str], report: Report) -> None:
    """Report files of the same content, within a split and across splits."""
    groups: dict[str, dict[tuple[str, Path], None]] = {}
    for part in parts:
        for sample in part:
            if sample.path is not None and sample.path in digests:
                groups.setdefault(digests[sample.path], {})[part.split, sample.path] = None
    for group in groups.values():
        if len(group) > 1:
            kind = "leakage" if len({split for split, _ in group}) > 1 else "duplicate"
            (_, first), *_ = group
            listed = ", ".join(f"{file.name} ({split})" for split, file in group)
            report(Defect(kind, first, f"{first.parent}: the same image is {listed}."))


def _disjoint(parts: Sequence[Dataset]) -> list[Dataset]:
    """Return the splits without those that only join others, as trainval does."""
    ids = [{sample.path for sample in part} for part in parts]
    joins = [
        any(ids[i] > other for other in ids if other)
        and ids[i] == set().union(*(other for other in ids if other < ids[i]))
        for i in range(len(parts))
    ]
    return [part for part, join in zip(parts, joins, strict=True) if not join]


def _all_samples(parts: Sequence[Dataset]) -> list[Sample]:
    return [sample for part in _disjoint(parts) for sample in part]


def _all_boxes(parts: Sequence[Dataset]) -> tuple[Boxes, NDArray[np.int64]]:
    truths = [sample.truth for sample in _all_samples(parts)]
    boxes = [truth.boxes for truth in truths] or [np.zeros((0, 4), np.float32)]
    labels = [truth.labels for truth in truths] or [np.zeros(0, np.int64)]
    return np.concatenate(boxes), np.concatenate(labels)


def _describe(part: Dataset) -> dict[str, Any]:
    """Return counts and percentiles of one split as JSON-able values."""
    truths = [sample.truth for sample in part]
    images = np.zeros(len(part.classes), np.int64)
    for truth in truths:
        images[np.unique(truth.labels)] += 1
    classes = {
        name: {"objects": int(n), "images": int(m)}
        for name, n, m in zip(part.classes, part.counts(), images, strict=True)
    }
    return {
        "images": len(part),
        "images_without_objects": sum(not len(truth) for truth in truths),
        "objects": sum(map(len, truths)),
        "difficult": int(sum(truth.difficult.sum() for truth in truths)),
        "crowd": int(sum(truth.crowd.sum() for truth in truths)),
        "classes": classes,
        **_sizes(part.samples),
    }


def _sizes(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Return percentiles of box and image sizes; no boxes, no figures."""
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(sample.truth.boxes for sample in samples)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64).T
    images = np.array([sample.size for sample in samples], np.float64).reshape(-1, 2)
    values = (width, height, np.sqrt(area(boxes)), width / height, images[:, 1], images[:, 0])
    return {
        key: np.percentile(value, _PERCENTILES).round(3).tolist() if len(value) else []
        for key, value in zip(_SIZES.values(), values, strict=True)
    }


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first to the left, the others to the right."""
    n = max(map(len, rows))
    full = [[*row, *[""] * (n - len(row))] for row in rows]
    widths = [max(len(row[i]) for row in full) for i in range(n)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, n))]).rstrip()
        for row in full
    ]


def _sentence(parts: Sequence[Dataset]) -> str:
    """Return the size of the data set in words."""
    images = " + ".join(f"{len(part)} {part.split}" for part in _disjoint(parts))
    n = len(parts[0].classes)
    return f"{images} images, {len(_all_boxes(parts)[0])} objects of {n} class{'es' * (n > 1)}"


def _usual_order(split: str) -> tuple[int, str]:
    """Sort train, val, trainval, test, then the others by name; a year may follow."""
    role = role_of(split)
    return ROLES.index(role) if role else len(ROLES), split


_SPLIT_COLOURS = {"train": "#4c78a8", "val": "#f2a541", "test": "#54a06e", "trainval": "#4c78a8"}


def _split_colour(split: str) -> str:
    return next((c for name, c in _SPLIT_COLOURS.items() if split.startswith(name)), "#9a8fb8")


def _palette(n: int) -> NDArray[np.floating]:
    """Return (n, 4) colours as different as n allows."""
    from matplotlib import colormaps

    if n <= 10:
        return np.array(colormaps["tab10"](np.arange(n)))
    return np.array(colormaps["hsv"](np.arange(n) / n)) * (0.85, 0.85, 0.85, 1)


def _label(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=11, loc="left", weight="bold")
    ax.set(xlabel=x, ylabel=y)
    ax.spines[["top", "right"]].set_visible(False)


def _draw(
    ax: Axes, sample: Sample, image: Image, classes: tuple[str, ...], colours: NDArray[np.floating]
) -> None:
    """Show an image with its boxes; class names where they do not crowd the picture."""
    from matplotlib.patches import Rectangle

    ax.imshow(image, interpolation="antialiased")
    ax.set_title(
        textwrap.shorten(sample.image_id, 32, placeholder="..."), fontsize=8, color="0.35", parse_math=False
    )
    for box, label in zip(sample.truth.boxes, sample.truth.labels, strict=True):
        x, y, width, height = box[0] - 0.5, box[1] - 0.5, box[2] - box[0], box[3] - box[1]
        ax.add_patch(Rectangle((x, y), width, height, fill=False, lw=1.4, edgecolor=colours[label]))
        if len(sample.truth) <= 8:
            style = {"facecolor": colours[label], "edgecolor": "none", "pad": 0.8, "alpha": 0.9}
            ax.text(
                x,
                y,
                classes[label],
                fontsize=6.5,
                color="white",
                va="bottom",
                bbox=style,
                clip_on=True,
                parse_math=False,
            )
