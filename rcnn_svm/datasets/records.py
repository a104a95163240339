"""What a label file says, before it is judged, and the one place where it is judged.

The readers of all formats turn files into `LabelledImage`s and know nothing of rules; `build` applies
the rules that hold for every format. Both tell a `Report` what is wrong: loading stops or drops there,
checking collects. This module knows no file format.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from rcnn_svm.boxes import area
from rcnn_svm.datasets.images import IMAGE_SUFFIXES, image_size, read_image
from rcnn_svm.errors import DataError
from rcnn_svm.progress import say
from rcnn_svm.structures import Dataset, GroundTruth, Sample

__all__ = [
    "BOX_DEFECTS",
    "Collector",
    "Defect",
    "LabelledImage",
    "LabelledObject",
    "Report",
    "Source",
    "build",
    "images_in",
    "strict",
]

BOX_DEFECTS = frozenset({"no-area", "outside", "unknown-class"})
"""The kinds of defect that concern one object, which a reader may be told to drop."""

# Files written with 0-based corners where 1-based ones are due, or the reverse, are off by one pixel.
_TOLERANCE = 1.0


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing that is wrong with a data set.

    Attributes:
        kind: a short name: one of `BOX_DEFECTS`, `labels`, `image`, `size` or `twice`.
        file: where it is.
        message: the whole sentence, file included.
    """

    kind: str
    file: Path
    message: str


Report: TypeAlias = Callable[[Defect], None]
"""Receives each defect; raises where it must not be survived."""


def strict(defect: Defect) -> None:
    """Stop at any defect: the `Report` of loading.

    Raises:
        DataError: always.
    """
    advice = " Correct the label, or ask for bad boxes to be dropped." if defect.kind in BOX_DEFECTS else ""
    raise DataError(defect.message + advice)


@dataclass
class Collector:
    """A `Report` that keeps defects of some kinds and stops at all others.

    Attributes:
        kinds: the kinds to keep; None keeps all.
        defects: what was kept, in order.
    """

    kinds: frozenset[str] | None = None
    defects: list[Defect] = field(default_factory=list)

    def __call__(self, defect: Defect) -> None:
        """Keep `defect`, or stop at it."""
        if self.kinds is not None and defect.kind not in self.kinds:
            strict(defect)
        if defect not in self.defects:  # trainval repeats those of train and val
            self.defects.append(defect)

    def say_summary(self) -> None:
        """Print one line with the number of dropped boxes and the first of them, if there is one."""
        if self.defects:
            n = len(self.defects)
            say(f"Dropped {n} bad {'boxes' if n > 1 else 'box'}, the first: {self.defects[0].message}")


@dataclass(frozen=True, slots=True)
class LabelledObject:
    """One object as its file states it.

    Attributes:
        name: of the class.
        box: half-open pixels x1 y1 x2 y2, not yet judged.
        written: the box as it stands in the file, for messages.
        difficult: VOC's flag.
        crowd: COCO's flag.
        area: of the segment in square pixels; None where the file states none, and the box's own will do.
    """

    name: str
    box: tuple[float, float, float, float]
    written: str
    difficult: bool = False
    crowd: bool = False
    area: float | None = None


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image as its label file states it.

    Attributes:
        image_id: unique within the split.
        path: the image file.
        labels: the file that the objects come from.
        size: (height, width) that the labels state, None where they state none.
        objects: in file order.
    """

    image_id: str
    path: Path
    labels: Path
    size: tuple[int, int] | None
    objects: tuple[LabelledObject, ...]


class Source(Protocol):
    """A data set on disk in one format, opened but not read."""

    root: Path

    def splits(self) -> tuple[str, ...]:
        """Return the names of its splits."""

    def class_names(self, report: Report) -> tuple[str, ...]:
        """Return the names of its classes in the order of their labels."""

    def read(self, split: str, report: Report) -> list[LabelledImage]:
        """Return the images of one of its splits."""


def images_in(folder: Path) -> list[Path]:
    """Return the image files under `folder` by their suffix, sorted; none where there is no folder."""
    found = [
        Path(base, name)
        for base, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
    ]
    return sorted(found)


def build(
    name: str, split: str, classes: Sequence[str], images: Iterable[LabelledImage], report: Report
) -> Dataset:
    """Judge labelled images and turn them into a data set; pixels stay unread.

    Reported are: boxes of no area, boxes that reach out of their image by more than one pixel (up to one
    pixel they are clipped), classes outside `classes`, image ids that come twice, images without a
    readable header where the labels state no size. What was reported and survived is left out.

    Args:
        name: of the data set.
        split: of these images.
        classes: K names; an object's label is the position of its class.
        images: in file order.
        report: told of each defect.

    Returns:
        The data set, which may be empty.
    """
    labels = {class_name: label for label, class_name in enumerate(classes)}
    seen: set[str] = set()
    samples = []
    for image in images:
        if image.image_id in seen:
            message = f"{image.labels}: image {image.image_id!r} comes twice in split {split!r}. Remove one."
            report(Defect("twice", image.labels, message))
            continue
        seen.add(image.image_id)
        size = image.size
        if size is None:
            try:
                size = image_size(image.path)
            except DataError as error:
                report(Defect("image", image.path, str(error)))
                continue
        truth = _truth(image, size, labels, report)
        reader = functools.partial(read_image, labelled_size=size)
        samples.append(Sample(image.image_id, size, truth, path=image.path, reader=reader))
    return Dataset(name, split, tuple(classes), tuple(samples))


def _truth(
    image: LabelledImage, size: tuple[int, int], labels: dict[str, int], report: Report
) -> GroundTruth:
    height, width = size
    boxes, rows, difficult, crowd, areas = [], [], [], [], []
    for number, thing in enumerate(image.objects, start=1):
        x1, y1, x2, y2 = thing.box
        inside = (
            min(max(x1, 0), width),
            min(max(y1, 0), height),
            min(max(x2, 0), width),
            min(max(y2, 0), height),
        )
        moved = max(abs(a - b) for a, b in zip(inside, thing.box, strict=True))
        where = f"{image.labels}: object {number} ({thing.name}) of image {image.image_id!r}"
        if thing.name not in labels:
            known = ", ".join(list(labels)[:8]) + (", ..." if len(labels) > 8 else "")
            message = f"{where} must be of a known class ({known}), got {thing.name!r}."
            report(Defect("unknown-class", image.labels, message))
        elif not all(map(math.isfinite, thing.box)) or x2 <= x1 or y2 <= y1:
            message = f"{where} must have a positive area, got {thing.written}."
            report(Defect("no-area", image.labels, message))
        elif moved > _TOLERANCE or inside[2] <= inside[0] or inside[3] <= inside[1]:
            message = f"{where} must lie inside the {width} x {height} image, got {thing.written}."
            report(Defect("outside", image.labels, message))
        else:
            box = np.array(inside, np.float32)
            if box[0] == box[2] or box[1] == box[3]:  # thinner than float32 can tell
                message = f"{where} must have a positive area, got {thing.written}."
                report(Defect("no-area", image.labels, message))
                continue
            boxes.append(inside)
            rows.append(labels[thing.name])
            difficult.append(thing.difficult)
            crowd.append(thing.crowd)
            areas.append(area(box[None]).item() if thing.area is None else thing.area)
    if not boxes:
        return GroundTruth.empty()
    return GroundTruth(
        np.array(boxes, np.float32),
        np.array(rows),
        np.array(difficult, bool),
        np.array(crowd, bool),
        np.array(areas, np.float64),
    )
