"""What a label file says, before it is judged, and the one place where it is judged.

The readers of all formats turn files into `LabelledImage`s and know nothing of rules; `build` applies
the rules that hold for every format. Both tell a `Report` what is wrong: loading stops or drops there,
checking collects. This module knows no file format.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from rcnn_svm.boxes import area
from rcnn_svm.datasets.images import header_sizes, read_image
from rcnn_svm.datasets.layout import shown
from rcnn_svm.errors import DataError
from rcnn_svm.progress import say
from rcnn_svm.structures import Dataset, GroundTruth, Image, Sample

__all__ = [
    "BOX_DEFECTS",
    "FILE_DEFECTS",
    "WARNINGS",
    "Collector",
    "Defect",
    "LabelledImage",
    "LabelledObject",
    "Report",
    "Source",
    "around",
    "build",
    "parse_number",
    "short",
    "strict",
]

BOX_DEFECTS = frozenset({"malformed", "no-area", "outside", "unknown-class"})
"""The kinds of defect that concern one object, which a reader may be told to drop."""

FILE_DEFECTS = frozenset({"labels", "image", "size", "twice"})
"""The kinds of defect that concern one image and its labels, which a reader may be told to leave out."""

WARNINGS = frozenset(
    {
        "doubled",
        "unlabelled",
        "orphan",
        "no-object",
        "other-class",
        "category",
        "similar",
        "stray",
        "empty-class",
        "several-classes",
        "link",
        "unused",
        "leakage",
        "duplicate",
        "missing-class",
        "empty-split",
    }
)
"""The kinds that do not stop loading, which says them instead."""

# Files written with 0-based corners where 1-based ones are due, or the reverse, are off by one pixel.
_TOLERANCE = 1.0
_ADVICE = {
    kind: " Correct the label, or leave such objects out with --drop-bad-boxes." for kind in BOX_DEFECTS
}
_ADVICE |= {kind: " --skip-bad leaves such images out." for kind in FILE_DEFECTS}


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing that is wrong with a data set, or worth a word.

    Attributes:
        kind: a short name: one of `BOX_DEFECTS`, `FILE_DEFECTS` or `WARNINGS`; of a whole split `no-labels`,
            `foreign` where it lies outside of the data set, or `split` where what describes it is missing or
            broken.
        file: where it is.
        message: the whole sentence, file included.
        subject: what it is about where several are counted in one line: the class.
    """

    kind: str
    file: Path
    message: str
    subject: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", shown(self.message))


Report: TypeAlias = Callable[[Defect], None]
"""Receives each defect; raises where it must not be survived."""


def strict(defect: Defect) -> None:
    """Stop at any defect that is more than a warning: the strictest `Report`.

    Raises:
        DataError: always but for `WARNINGS`.
    """
    if defect.kind not in WARNINGS:
        raise DataError(defect.message + _ADVICE.get(defect.kind, ""))


@dataclass
class Collector:
    """A `Report` that keeps defects of some kinds and stops at all others.

    Attributes:
        kinds: the kinds to keep; None keeps all.
        found: what was kept, in order.
    """

    kinds: frozenset[str] | None = None
    found: dict[Defect, None] = field(default_factory=dict)

    @property
    def defects(self) -> list[Defect]:
        """What was kept, in order, each once though trainval repeats those of train and val."""
        return list(self.found)

    def __call__(self, defect: Defect) -> None:
        """Keep `defect`, or stop at it."""
        if self.kinds is not None and defect.kind not in self.kinds:
            strict(defect)
        self.found[defect] = None

    def say_summary(self) -> None:
        """Print one line for the dropped boxes, one for what was left out and one a kind of warning."""
        boxes = [one for one in self.found if one.kind in BOX_DEFECTS]
        files = [one for one in self.found if one.kind in FILE_DEFECTS]
        if boxes:
            n = len(boxes)
            say(f"Dropped {n} bad {'boxes' if n > 1 else 'box'}, the first: {boxes[0].message}")
        if files:
            n = len(files)
            say(f"Left out {n} image{'s' * (n > 1)}, the first: {files[0].message}")
        others = Counter(one.subject for one in self.found if one.kind == "other-class")
        if others:
            each = ", ".join(f"{name} {n}" for name, n in sorted(others.items()))
            say(f"Left out {others.total()} objects of classes that were not asked for: {each}.")
        for kind in sorted(WARNINGS - {"other-class"}):
            same = [one.message for one in self.found if one.kind == kind]
            if same:
                say(same[0] + (f" ({len(same) - 1} more like it.)" if len(same) > 1 else ""))


@dataclass(frozen=True, slots=True)
class LabelledObject:
    """One object as its file states it.

    Attributes:
        name: of the class.
        box: half-open x1 y1 x2 y2, not yet judged.
        written: the box as it stands in the file, for messages.
        place: where it stands in the file, such as `line 3`.
        difficult: VOC's flag.
        crowd: COCO's flag.
        relative: the box is in shares of the image and not in pixels.
        turned: the box was put around a turned one, and may leave the image where that does not.
        area: of the segment in square pixels; None where the file states none, and the box's own will do.
        flags: VOC's `truncated` and `occluded`, by name, those that the file states.
    """

    name: str
    box: tuple[float, float, float, float]
    written: str
    place: str
    difficult: bool = False
    crowd: bool = False
    relative: bool = False
    turned: bool = False
    area: float | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image as its label file states it.

    Attributes:
        path: the image file.
        labels: the file that the objects come from.
        size: (height, width) that the labels state, None where they state none.
        objects: in file order.
        faults: what was wrong with objects that could not be read.
        image_id: unique within the data set; given once all its images are known.
    """

    path: Path
    labels: Path
    size: tuple[int, int] | None
    objects: tuple[LabelledObject, ...]
    faults: tuple[Defect, ...] = ()
    image_id: str = ""


class Source(Protocol):
    """A data set on disk in one format, opened but not read."""

    root: Path

    def splits(self) -> tuple[str, ...]:
        """Return the names of its splits."""

    def class_names(self, report: Report) -> tuple[str, ...]:
        """Return the names of its classes in the order of their labels."""

    def place(self, split: str) -> str:
        """Return what describes one of its splits: a list, a JSON, a folder."""

    def paths(self, split: str) -> list[Path]:
        """Return the image files of one of its splits, as far as they are found."""

    def read(self, split: str, report: Report) -> list[LabelledImage]:
        """Return the images of one of its splits."""


def parse_number(value: object) -> float:
    """Return a finite number of JSON or text; raise ValueError for all else, bools included."""
    if isinstance(value, str):
        if len(value) > 60 or not re.fullmatch(
            r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*", value
        ):
            raise ValueError(value)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(value) from error
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def short(value: object) -> str:
    """Return at most 80 characters of the representation of a value, for messages."""
    text = ascii(value) if isinstance(value, bytes) else repr(value)
    return shown(text if len(text) <= 80 else text[:77] + "...")


def around(
    cx: float, cy: float, width: float, height: float, angle: float
) -> tuple[float, float, float, float]:
    """Return the upright box around a box that is turned by `angle` radians about its centre."""
    c, s = abs(math.cos(angle)), abs(math.sin(angle))
    w, h = (width * c + height * s) / 2, (width * s + height * c) / 2
    return cx - w, cy - h, cx + w, cy + h


def build(
    name: str,
    split: str,
    classes: Sequence[str],
    images: Iterable[LabelledImage],
    report: Report,
    *,
    known: Collection[str] = (),
    decode: bool = False,
) -> Dataset:
    """Judge labelled images and turn them into a data set; pixels stay unread.

    Reported are: boxes of no area, boxes that reach out of their image by more than one pixel (up to one
    pixel they are clipped), classes that neither `classes` nor `known` names, objects labelled twice, images
    that come twice, images without a readable header or of another size than their labels state. What was
    reported and survived is left out.

    Args:
        name: of the data set.
        split: of these images.
        classes: K names; an object's label is the position of its class.
        images: in file order.
        report: told of each defect.
        known: further classes that the data set has; their objects are left out and reported as such.
        decode: decode all pixels as well, to find truncated files.

    Returns:
        The data set, which may be empty.
    """
    labels = {class_name: label for label, class_name in enumerate(classes)}
    seen: dict[str, Path] = {}
    samples = []
    for image in images:
        image_id = image.image_id
        if image_id in seen:
            other = seen[image_id]
            named = f" ({other} and {image.path})" if other != image.path else ""
            message = f"{image.labels}: image {image_id!r} comes twice in split {split!r}{named}. Remove one."
            report(Defect("twice", image.labels, message))
            continue
        try:
            upright, stored = header_sizes(image.path)
            size = image.size or upright
            if decode:
                read_image(image.path, labelled_size=size)
        except DataError as error:
            report(Defect("image", image.path, str(error)))
            continue
        if size not in (upright, stored):
            message = (
                f"{image.labels}: says {size[1]} x {size[0]} pixels, {image.path} has {upright[1]} x "
                f"{upright[0]}. One of the two is wrong."
            )
            report(Defect("size", image.labels, message))
            continue
        seen[image_id] = image.path
        for fault in image.faults:
            report(fault)
        truth = _truth(image, image_id, size, labels, known, report)
        samples.append(
            Sample(image_id, size, truth, path=image.path, reader=functools.partial(_read, size=size))
        )
    if samples and not any(len(sample.truth) for sample in samples):
        first = next(iter(seen.values()))
        message = f"{first.parent}: none of the {len(samples)} images of split {split!r} has an object."
        report(Defect("no-object", first.parent, message))
    return Dataset(name, split, tuple(classes), tuple(samples))


def _read(path: Path, *, size: tuple[int, int]) -> Image:
    """Read an image of a data set; a damaged one is an error that tells how to go on without it."""
    try:
        return read_image(path, labelled_size=size)
    except DataError as error:
        raise DataError(f"{error}{_ADVICE['image']}") from error


def _truth(
    image: LabelledImage,
    image_id: str,
    size: tuple[int, int],
    labels: Mapping[str, int],
    known: Collection[str],
    report: Report,
) -> GroundTruth:
    height, width = size
    boxes, rows, difficult, crowd, areas, flags = [], [], [], [], [], []
    seen: dict[tuple[object, ...], str] = {}
    for thing in image.objects:
        scale = (width, height, width, height) if thing.relative else (1, 1, 1, 1)
        given = tuple(value * factor for value, factor in zip(thing.box, scale, strict=True))
        x1, y1, x2, y2 = given
        inside = (
            min(max(x1, 0), width),
            min(max(y1, 0), height),
            min(max(x2, 0), width),
            min(max(y2, 0), height),
        )
        moved = max(abs(a - b) for a, b in zip(inside, given, strict=True))
        where = f"{image.labels}: {thing.place} ({thing.name}) of image {image_id!r}"
        key = (thing.name, thing.crowd, *given)
        box = np.array(inside, np.float32)
        if thing.name not in labels:
            if thing.name in known:
                message = f"{where} is of a class that was not asked for."
                report(Defect("other-class", image.labels, message, thing.name))
                continue
            some = ", ".join(list(labels)[:8]) + (", ..." if len(labels) > 8 else "")
            message = f"{where} must be of a known class ({some}), got {thing.name!r}."
            report(Defect("unknown-class", image.labels, message))
        elif not all(map(math.isfinite, given)) or x2 <= x1 or y2 <= y1:
            message = f"{where} must have a positive area, got {thing.written}."
            report(Defect("no-area", image.labels, message))
        elif (moved > _TOLERANCE and not thing.turned) or inside[2] <= inside[0] or inside[3] <= inside[1]:
            message = f"{where} must lie inside the {width} x {height} image, got {thing.written}."
            report(Defect("outside", image.labels, message))
        elif box[0] == box[2] or box[1] == box[3]:  # thinner than float32 can tell
            message = f"{where} must have a positive area, got {thing.written}."
            report(Defect("no-area", image.labels, message))
        elif key in seen:
            message = f"{where} repeats {seen[key]} and was left out."
            report(Defect("doubled", image.labels, message))
        else:
            seen[key] = thing.place
            boxes.append(inside)
            rows.append(labels[thing.name])
            difficult.append(thing.difficult)
            crowd.append(thing.crowd)
            areas.append(area(box[None]).item() if thing.area is None else thing.area)
            flags.append(thing.flags)
    if not boxes:
        return GroundTruth.empty()
    return GroundTruth(
        np.array(boxes, np.float32),
        np.array(rows),
        np.array(difficult, bool),
        np.array(crowd, bool),
        np.array(areas, np.float64),
        # As with `difficult`, an object that is silent among others that are not has no flag.
        {name: np.array([own.get(name, False) for own in flags]) for name in sorted(set().union(*flags))},
    )
