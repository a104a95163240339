"""A report on a data set: what is in it, and everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rcnn_svm.boxes import area
from rcnn_svm.datasets.images import read_image
from rcnn_svm.datasets.layout import ROLES, role_of
from rcnn_svm.datasets.loading import Classes, Format, distinct_splits, open_source
from rcnn_svm.datasets.records import WARNINGS, Collector, Defect, Report
from rcnn_svm.errors import DataError
from rcnn_svm.files import file_digest
from rcnn_svm.progress import track
from rcnn_svm.structures import Dataset, Sample

__all__ = ["CheckReport", "check_dataset"]

_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_SHOWN = 8  # defects of one kind that the text spells out
_KINDS = {
    "split": "splits that cannot be read",
    "foreign": "splits that lie outside of the data set",
    "no-labels": "splits without label files",
    "labels": "label files, or lines of them, that cannot be read",
    "image": "images that cannot be read",
    "size": "images of another size than labelled",
    "malformed": "objects that cannot be read",
    "no-area": "boxes of no area",
    "outside": "boxes that reach out of their image",
    "unknown-class": "objects of unknown classes",
    "twice": "images listed twice",
    "leakage": "images that several splits share",
    "duplicate": "identical images within a split",
    "contradiction": "identical images of different classes",
    "doubled": "objects labelled twice",
    "unlabelled": "images without a label file",
    "orphan": "label files without an image",
    "no-object": "splits without an object",
    "missing-class": "splits without an object of some class",
    "empty-split": "splits without an image",
    "other-class": "objects of classes that were not asked for",
    "category": "categories that only group others",
    "similar": "classes whose names differ in case or spaces only",
    "stray": "images in the folder of no class",
    "empty-class": "folders without an image",
    "several-classes": "lists of images with several classes",
    "link": "links that are not followed",
    "unused": "files that were not used",
}


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What `check_dataset` found.

    Attributes:
        path: the data set.
        format: of `FORMATS`.
        datasets: each split with all that is good in it.
        defects: all that is not, in the order of `to_text`.
    """

    path: Path
    format: Format
    datasets: tuple[Dataset, ...]
    defects: tuple[Defect, ...]

    @property
    def errors(self) -> tuple[Defect, ...]:
        """The defects that loading stops at, and leakage, which is more than a warning."""
        return tuple(one for one in self.defects if one.kind not in WARNINGS or one.kind == "leakage")

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names."""
        return self.datasets[0].classes

    @property
    def distinct(self) -> list[Dataset]:
        """The splits without those that only join others, as trainval does."""
        return distinct_splits(self.datasets)

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
        whole = _sizes([sample for part in self.distinct for sample in part])
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
    path: str | Path,
    *,
    format: str | None = None,
    classes: Classes = None,
    allow_outside: bool = False,
    decode: bool = True,
) -> CheckReport:
    """Read every split of a data set and collect all its defects.

    Defects are broken label files, bad boxes (as `load_dataset` defines them), missing, truncated or
    unreadable images, sizes that differ from the labels, identical image files within a split and, which
    is leakage, across splits (`trainval` and its parts aside), identical images that are labelled as a whole
    with different classes, classes without an object in a split, and splits without an image.

    Args:
        path: the folder, or the file to go by.
        format: of `FORMATS`; None detects it.
        classes: as in `load_dataset`.
        allow_outside: as in `load_dataset`.
        decode: decode all pixels; without, only headers are read and truncation stays unseen.

    Raises:
        DataError: there is no data set, or the file that describes it cannot be read.
        ConfigError: an unknown format or a bad class list.
    """
    opened = open_source(path, format, allow_outside=allow_outside)
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
    _compare_images(distinct_splits(parts), digests, collector)
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
    """Report files of the same content, within a split, across splits, and of different classes."""
    groups: dict[str, dict[tuple[str, Path], None]] = {}
    names = {
        sample.path: tuple(sorted(part.classes[k] for k in sample.truth.labels))
        for part in parts
        for sample in part
        if part.whole and sample.path is not None
    }
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
            named = {file: names[file] for _, file in group if file in names}
            if len(set(named.values())) > 1:
                listed = ", ".join(f"{' and '.join(own)} in {file}" for file, own in named.items())
                report(
                    Defect("contradiction", first, f"{first.parent}: the same image is labelled {listed}.")
                )


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


def _usual_order(split: str) -> tuple[int, str]:
    """Sort train, val, trainval, test, then the others by name; a year may follow."""
    role = role_of(split)
    return ROLES.index(role) if role else len(ROLES), split
