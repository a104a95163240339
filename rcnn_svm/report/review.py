"""The list of labels to look at again, as a page with pictures and a CSV."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rcnn_svm.boxes import widen
from rcnn_svm.experiment.review import KINDS, Finding, Review
from rcnn_svm.files import csv_text, remove_marker, write_text
from rcnn_svm.report import palette
from rcnn_svm.report.draw import Mark, corners, cut, draw_marks, rgb
from rcnn_svm.report.html import environment, photograph
from rcnn_svm.structures import Image

__all__ = ["REVIEW_FILES", "review_table", "write_review"]

REVIEW_FILES = ("index.html", "review.csv")

_LABEL, _INSTEAD = palette.ORANGE, palette.BLUE
_TOP = 60  # findings with a picture of their surroundings
_PER_CLASS = 24  # crops of each class
_PICTURE, _CROP = 320, 150  # pixels, longer side
_READ_ONCE = 32  # images kept in memory

_COLUMNS = (
    *(
        "rank",
        "suspicion",
        "kind",
        "image",
        "split",
        "file",
        "class",
        "x1",
        "y1",
        "x2",
        "y2",
        "suggested_class",
    ),
    *("better_x1", "better_y1", "better_x2", "better_y2", "other_image"),
    *("own", "other", "seen", "distance", "reason"),
)


def write_review(folder: Path, review: Review, about: Mapping[str, Any]) -> None:
    """Write `index.html`, one file without requests, and last `review.csv`, which holds the whole list.

    The page shows the 60 most suspicious findings in their surroundings, and of each class the 24 most
    suspicious objects as crops.

    Args:
        folder: made if need be.
        review: the list.
        about: `data`, its name, and `command`.

    Raises:
        DataError: the folder cannot be written to, or an image cannot be read.
        DiskSpaceError: the disk is full.
    """
    remove_marker(folder / "review.csv")  # where it lies, the page is of the same list
    images, classes = review.images.samples, review.images.classes

    @functools.lru_cache(maxsize=_READ_ONCE)
    def pixels(i: int) -> Image:
        return images[i].read()

    top = [_picture(review, one, pixels) | {"rank": n} for n, one in enumerate(review.findings[:_TOP], 1)]
    by_class = []
    for k, name in enumerate(classes):
        own = [one for one in review.findings if one.label == k]
        crops = [
            photograph(_cut(pixels(one.image), one, _CROP, 1.1))
            | {"image": images[one.image].image_id, "suspicion": one.suspicion, "reason": one.reason}
            for one in own[:_PER_CLASS]
        ]
        by_class.append({"name": name, "n": len(own), "crops": crops})
    counts = Counter(one.kind for one in review.findings[:_TOP])
    page = (
        environment()
        .get_template("review.html.jinja")
        .render(
            about=about,
            top=top,
            by_class=by_class,
            counts=[(KINDS[kind], counts[kind]) for kind in KINDS if counts[kind]],
            n_images=len(images),
            n_objects=sum(one.row is not None for one in review.findings),
            n_regions=sum(one.kind == "unlabelled" for one in review.findings),
            n_copies=sum(one.other is not None for one in review.findings),
            n_folds=review.n_folds,
            n_unjudged=review.n_unjudged,
            colours={"label": _LABEL, "instead": _INSTEAD},
        )
    )
    write_text(folder / "index.html", page)
    write_text(folder / "review.csv", review_table(review))


def review_table(review: Review) -> str:
    """Return the list as a CSV, a line a finding; boxes are half-open pixels, what is unknown is empty."""
    rows = []
    images, classes = review.images.samples, review.images.classes
    for rank, one in enumerate(review.findings, 1):
        sample = images[one.image]
        row: dict[str, Any] = {
            "rank": rank,
            "suspicion": round(float(one.suspicion), 4),
            "kind": one.kind,
            "image": sample.image_id,
            "split": review.split_of[one.image],
            "file": str(sample.path or ""),
            "reason": one.reason,
        }
        row |= {name: round(float(value), 4) for name, value in one.scores.items()}
        for prefix, box in (("", one.box), ("better_", one.better_box)):
            if box is not None:
                names = (f"{prefix}{corner}" for corner in ("x1", "y1", "x2", "y2"))
                row |= dict(zip(names, (round(value, 3) for value in box.tolist()), strict=True))
        if one.label is not None:
            row["class"] = classes[one.label]
        if one.suggested is not None:
            row["suggested_class"] = classes[one.suggested]
        if one.other is not None:
            row["other_image"] = images[one.other].image_id
        rows.append(row)
    return csv_text(rows, _COLUMNS)


def _picture(review: Review, one: Finding, pixels: Callable[[int], Image]) -> dict[str, Any]:
    """Return a finding as the page tells it, with its pictures."""
    images, classes = review.images.samples, review.images.classes
    shown = [one.image] if one.other is None else [one.image, one.other]
    if one.box is None:
        pictures = [draw_marks(pixels(i), [], longer_side=_PICTURE) for i in shown]
    else:
        pictures = [_cut(pixels(one.image), one, _PICTURE, 1.8, classes)]
    return {
        "pictures": [photograph(picture) for picture in pictures],
        "what": KINDS[one.kind],
        "suspicion": one.suspicion,
        "reason": one.reason,
        "image": images[one.image].image_id,
        "split": review.split_of[one.image],
    }


def _cut(
    image: Image, one: Finding, longer_side: int, around: float, classes: tuple[str, ...] | None = None
) -> Image:
    """Cut out a finding with its surroundings.

    Args:
        image: pixels.
        one: of an object or region.
        longer_side: of the result.
        around: how much larger than the boxes it is.
        classes: names for marks, the label in dashes and what it may be instead in full lines; None for none.
    """
    assert one.box is not None
    boxes = np.stack([one.box, one.box if one.better_box is None else one.better_box])
    hull = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    pixels, (x1, y1, _, _) = cut(image, widen(hull[None], around)[0])
    origin = np.array([x1, y1, x1, y1], np.float32)
    marks = []
    if classes is not None:
        instead = classes[one.suggested] if one.suggested is not None else ""
        if one.label is not None:
            marks.append(Mark(corners(one.box - origin), rgb(_LABEL), classes[one.label], dashed=True))
        if one.label is None or one.better_box is not None:
            better = one.box if one.better_box is None else one.better_box
            marks.append(Mark(corners(better - origin), rgb(_INSTEAD), instead))
    return draw_marks(np.ascontiguousarray(pixels), marks, longer_side=longer_side)
