"""Whole images in a table: a CSV with a line per image, its file and class, and its split if there is one."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rcnn_svm.datasets.folders import class_order, whole_image
from rcnn_svm.datasets.images import IMAGE_SUFFIXES
from rcnn_svm.datasets.layout import WHOLE, Files, role_of, shown
from rcnn_svm.datasets.records import Defect, LabelledImage, LabelledObject, Report, short
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.files import read_text

__all__ = ["TABLE_SUFFIXES", "ListSource"]

TABLE_SUFFIXES = (".csv", ".tsv")

# What columns are called, in lower case and with underscores; the first that is there is taken.
_IMAGE = tuple(
    [
        "image",
        "file",
        "filename",
        "file_name",
        "path",
        "filepath",
        "file_path",
        "image_path",
        "image_name",
        "image_id",
        "img",
    ]
)
_CLASS = ("class", "class_name", "label", "label_name", "category")
_SPLIT = ("split", "set", "subset")
_BOX = frozenset({"xmin", "x_min", "x1", "x", "left", "bbox", "box"})
_DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True)
class _Table:
    """A CSV whose header names a column of images and one of classes."""

    file: Path
    lines: tuple[tuple[int, tuple[str, ...]], ...]
    columns: tuple[int, int, int | None]

    @classmethod
    def read(cls, file: Path, *, insist: bool) -> _Table | None:
        """Return the table in a file, None where it is none of whole images and need not be one.

        Raises:
            DataError: it is none, or no text, and must be one.
        """
        try:
            text = read_text(file)
        except DataError:
            if insist:
                raise
            return None
        first = text.lstrip("\r\n").split("\n", 1)[0]
        header: list[str] = []
        delimiter = ","
        for each in _DELIMITERS:
            names = _cells(first, each)
            if len(names) > len(header):
                header, delimiter = names, each
        plain = [name.strip().lower().replace(" ", "_").replace("-", "_") for name in header]
        image, label, split = (
            next((plain.index(name) for name in known if name in plain), None)
            for known in (_IMAGE, _CLASS, _SPLIT)
        )
        if image is None or label is None or not _BOX.isdisjoint(plain):
            if not insist:
                return None
            boxes = _BOX.intersection(plain)
            why = (
                f"has the column {min(boxes)} of boxes"
                if boxes
                else f"has {', '.join(map(short, header)) or 'none'}"
            )
            raise DataError(
                f"{file}: must have a line that names its columns, among them image (or file, filename, "
                f"path) and label (or class, category), and no boxes; it {why}."
            )
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        lines = []
        try:
            for row in reader:
                if any(cell.strip() for cell in row):
                    lines.append((reader.line_num, tuple(cell.strip() for cell in row)))
        except csv.Error as error:
            raise DataError(f"{file}: line {reader.line_num} is no line of a CSV ({error}).") from error
        return cls(file, tuple(lines[1:]), (image, label, split))


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


@dataclass
class ListSource:
    """A data set of whole images that a CSV lists.

    Columns are found by name: `image`, `file`, `filename` or `path`; `class`, `label` or `category`; and,
    where there is one, `split`. Commas, semicolons or tabs part them. Several CSVs are one data set where
    each is called after a part, `train.csv` and `test.csv`. An image of several lines has the classes of all.

    Attributes:
        root: the folder of the CSV.
        files: of the data set.
        tables: the CSV, by split where there are several; of one with a column of splits the key is `all`.
    """

    root: Path
    files: Files
    tables: Mapping[str, _Table]

    @classmethod
    def find(cls, files: Files, only: Path | None = None, *, insist: bool = False) -> ListSource | None:
        """Return the data set in `files`, None where there is none.

        Args:
            files: of the data set.
            only: the CSV to go by.
            insist: it is known to be of this format.

        Raises:
            ConfigError: several CSVs could be it.
            DataError: it is none, where it must be.
        """
        paths = files.of(*TABLE_SUFFIXES) if only is None else [only]
        insist = only is not None or (insist and len(paths) == 1)
        tables = [one for path in paths if (one := _Table.read(path, insist=insist)) is not None]
        if not tables or not files.images:
            return None
        parts = {one.file.stem: one for one in tables if role_of(one.file.stem)}
        if len(tables) == 1:
            return cls(tables[0].file.parent, files, {WHOLE: tables[0]})
        if len(parts) < len(tables):
            names = ", ".join(one.file.relative_to(files.root).as_posix() for one in tables)
            raise ConfigError(
                f"{files.root}: must have one CSV of images and classes, or one for each of train, val and "
                f"test, has {names}. Name one."
            )
        return cls(files.root, files, parts)

    def splits(self) -> tuple[str, ...]:
        """Return the names in the column of splits, or of the CSVs where there are several, else `all`."""
        if len(self.tables) > 1:
            return tuple(self.tables)
        ((_, table),) = self.tables.items()
        return tuple(dict.fromkeys(_split_of(table, row) for _, row in table.lines)) or (WHOLE,)

    def class_names(self, report: Report) -> tuple[str, ...]:
        """Return all classes, numbers by value, then by name."""
        names = {
            shown(row[table.columns[1]])
            for table in self.tables.values()
            for _, row in table.lines
            if len(row) > table.columns[1] and row[table.columns[1]]
        }
        return tuple(sorted(names, key=class_order))

    def place(self, split: str) -> str:
        """Return the CSV of one split."""
        return str(self._table(split).file)

    def paths(self, split: str) -> list[Path]:
        """Return the images of one split; where there is none of a name, the place where it should be."""
        file = self._table(split).file
        ways = ((name, self._image(file, name, split)) for name, _, _ in self._rows(split))
        return list(dict.fromkeys(_place(file, name, found) for name, found in ways if len(found) < 2))

    def read(self, split: str, report: Report) -> list[LabelledImage]:
        """Return the images of one split in the order of their first lines.

        Reported are lines that lack a cell and images that cannot be told from others.
        """
        table, objects = self._table(split), dict[Path, list[LabelledObject]]()
        for number, row in table.lines:
            if len(self.tables) == 1 and _split_of(table, row) != split:
                continue
            if len(row) <= max(table.columns[:2]) or not all(row[column] for column in table.columns[:2]):
                got = short(" ".join(row))
                message = f"{table.file}: line {number} must name an image and its class, got {got}."
                report(Defect("labels", table.file, message))
        for name, label, number in self._rows(split):
            found = self._image(table.file, name, split)
            if len(found) > 1:
                which = ", ".join(str(path.relative_to(self.files.root)) for path in found[:3])
                message = f"{table.file}: line {number} must name one image, {short(name)} may be {which}."
                report(Defect("labels", table.file, message))
                continue
            path = _place(table.file, name, found)
            objects.setdefault(path, []).append(whole_image(shown(label), f"line {number}"))
        several = [path for path, own in objects.items() if len({one.name for one in own}) > 1]
        if several:
            others = f" and {len(several) - 1} other images have" if len(several) > 1 else " has"
            message = f"{table.file}: {several[0].name}{others} several classes, all of which count."
            report(Defect("several-classes", table.file, message))
        return [LabelledImage(path, table.file, None, tuple(own)) for path, own in objects.items()]

    def _table(self, split: str) -> _Table:
        return self.tables[split] if len(self.tables) > 1 else next(iter(self.tables.values()))

    def _rows(self, split: str) -> list[tuple[str, str, int]]:
        """Return image, class and line of what one split lists, whole lines alone."""
        table = self._table(split)
        image, label, _ = table.columns
        return [
            (row[image], row[label], number)
            for number, row in table.lines
            if len(row) > max(image, label)
            and row[image]
            and row[label]
            and (len(self.tables) > 1 or _split_of(table, row) == split)
        ]

    def _image(self, file: Path, name: str, split: str) -> Sequence[Path]:
        """Return the images that a cell may mean; a suffix may be left out."""
        role = split if role_of(split) else None
        for suffix in ("", *sorted(IMAGE_SUFFIXES)):
            if found := self.files.image_named(name + suffix, by=file, split=role):
                return found
        return []


def _place(file: Path, name: str, found: Sequence[Path]) -> Path:
    """Return the image that a cell of a CSV means, or where it should be."""
    return found[0] if found else file.parent / name.replace("\0", "").replace("\\", "/")


def _split_of(table: _Table, row: Sequence[str]) -> str:
    column = table.columns[2]
    return row[column] if column is not None and len(row) > column and row[column] else WHOLE
