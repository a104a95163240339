"""The images to label next, as a page, a CSV and a list of files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcnn_svm.experiment.next_images import Doubt
from rcnn_svm.files import csv_text, remove_marker, write_text
from rcnn_svm.report.draw import Mark, class_colours, corners, draw_marks
from rcnn_svm.report.html import environment, photograph
from rcnn_svm.structures import Sample

__all__ = ["NEXT_FILES", "ToLabel", "write_next"]

NEXT_FILES = ("index.html", "next.csv", "next.txt")
_COLUMNS = ("rank", "image", "file", "doubt", "near_the_threshold")
_PICTURE, _SHOWN = 400, 8  # pixels of the longer side; regions drawn on an image


@dataclass(frozen=True, eq=False)
class ToLabel:
    """An image to label.

    Attributes:
        sample: the image.
        doubt: what the detector makes of it.
    """

    sample: Sample
    doubt: Doubt

    def words(self, classes: Sequence[str]) -> str:
        """Return the classes of the regions that count, the most frequent first."""
        counts = Counter(classes[k] for k in self.doubt.labels[self.doubt.near].tolist())
        return ", ".join(f"{n} {name}" for name, n in counts.most_common())


def write_next(
    folder: Path, chosen: Sequence[ToLabel], classes: Sequence[str], about: Mapping[str, Any]
) -> None:
    """Write `index.html`, `next.txt` with a file a line, and last `next.csv`; in the order of choice.

    Args:
        folder: made if need be.
        chosen: the images.
        classes: K names.
        about: `detector`, `n_images`, how many were looked at, and `command`.

    Raises:
        DataError: the folder cannot be written to, or an image cannot be read.
        DiskSpaceError: the disk is full.
    """
    remove_marker(folder / "next.csv")  # where it lies, the rest is of the same choice
    colours = class_colours(len(classes))
    shown = []
    for one in chosen:
        doubt = one.doubt
        marks = []
        for i in doubt.near.nonzero()[0][:_SHOWN][::-1].tolist():
            k = int(doubt.labels[i])
            marks.append(Mark(corners(doubt.boxes[i]), colours[k], f"{classes[k]} {doubt.scores[i]:.2f}"))
        picture = draw_marks(one.sample.read(), marks, longer_side=_PICTURE)
        shown.append(
            photograph(picture)
            | {"image": one.sample.image_id, "doubt": doubt.value, "words": one.words(classes)}
        )
    page = environment().get_template("next.html.jinja").render(about=about, shown=shown)
    write_text(folder / "index.html", page)
    write_text(folder / "next.txt", "".join(f"{one.sample.path or one.sample.image_id}\n" for one in chosen))
    rows = [
        {
            "rank": rank,
            "image": one.sample.image_id,
            "file": str(one.sample.path or ""),
            "doubt": round(one.doubt.value, 4),
            "near_the_threshold": one.words(classes),
        }
        for rank, one in enumerate(chosen, 1)
    ]
    write_text(folder / "next.csv", csv_text(rows, _COLUMNS))
