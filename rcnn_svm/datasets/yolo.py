"""YOLO folders: a YAML file with class names and splits, one text file of labels per image.

A row is `class cx cy w h`, relative to the image's size, or `class x y x y x y ...`, a polygon, of which
the surrounding box is taken.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rcnn_svm.datasets.images import image_size
from rcnn_svm.datasets.records import Defect, LabelledImage, LabelledObject, Report, images_in
from rcnn_svm.errors import DataError

__all__ = ["YoloSource"]

_NOT_SPLITS = frozenset({"path", "names", "nc", "download", "roboflow", "yaml_file", "kpt_shape", "flip_idx"})


@dataclass
class YoloSource:
    """A YOLO data set described by a YAML file.

    The YAML names the classes (`names`, a list or a mapping from 0) and each split (`train`, `val`, `test`):
    a folder of images, a text file that lists images, or a list of those. The label file of
    `.../images/a.jpg` is `.../labels/a.txt`, without an `images` folder it lies beside the image; where it
    is empty or missing, the image has no objects. Image ids are file names without suffix.

    Attributes:
        root: the folder that holds the YAML.
        file: the YAML.
    """

    root: Path
    file: Path
    _config: dict[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def find(cls, path: Path) -> YoloSource | None:
        """Return the YOLO data set whose YAML `path` is or holds, None where there is none."""
        if path.is_file():
            return cls(path.parent, path) if path.suffix in (".yaml", ".yml") else None
        files = [path / "data.yaml", path / "dataset.yaml", *sorted(path.glob("*.y*ml"))]
        file = next((file for file in files if file.is_file()), None)
        return cls(path, file) if file is not None else None

    def splits(self) -> tuple[str, ...]:
        """Return the split names in the order of the YAML.

        Raises:
            DataError: the YAML is broken.
        """
        paths = {key: value for key, value in self._load().items() if key not in _NOT_SPLITS}
        return tuple(key for key, value in paths.items() if value and isinstance(value, str | list))

    def class_names(self, report: Report) -> tuple[str, ...]:
        """Return the class names by their numbers."""
        names = self._load()["names"]
        values = [names[key] for key in sorted(names)] if isinstance(names, dict) else names
        return tuple(str(name) for name in values)

    def read(self, split: str, report: Report) -> list[LabelledImage]:
        """Return the images of one split, sorted by path, or in the order of its text file.

        Reported are missing images, unreadable headers and rows that are no labels.
        """
        names = self.class_names(report)
        entries = self._load()[split]
        paths = [
            p for entry in (entries if isinstance(entries, list) else [entries]) for p in self._images(entry)
        ]
        base = Path(os.path.commonpath([path.parent for path in paths])) if paths else self.root
        stems = [path.stem for path in paths]
        unique = len(set(stems)) == len(stems)
        images = []
        for path in paths:
            image_id = path.stem if unique else path.relative_to(base).with_suffix("").as_posix()
            try:
                size = image_size(path)
            except DataError as error:
                report(Defect("image", path, str(error)))
                continue
            try:
                file, objects = _read_labels(path, size, names)
            except DataError as error:
                report(Defect("labels", _label_file(path), str(error)))
                continue
            images.append(LabelledImage(image_id, path, file, size, objects))
        return images

    def _load(self) -> dict[str, Any]:
        if self._config is None:
            self._config = _read_config(self.file)
        return self._config

    def _images(self, entry: str) -> list[Path]:
        """Return the images that one entry of the YAML names."""
        base = self.root / str(self._load().get("path") or ".")
        # Exported archives name folders on another machine, or one folder too high ("../train/images").
        candidates = (base / entry, self.root / entry, self.root / entry.removeprefix("../"))
        found = next((candidate for candidate in candidates if candidate.exists()), None)
        if found is None:
            raise DataError(
                f"{self.file}: names {entry!r}, there is no such folder or file ({candidates[0]})."
            )
        if found.is_dir():
            return images_in(found)
        try:
            lines = found.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{found}: must be a text file that lists images ({error}).") from error
        names = [Path(line.strip()) for line in lines if line.strip()]
        beside = [found.parent / name for name in names]
        return [path if path.exists() else base / name for path, name in zip(beside, names, strict=True)]


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: must be UTF-8 text ({error.reason}).") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise DataError(f"{file}: must be YAML, got a syntax error{where}.") from error
    names = config.get("names") if isinstance(config, dict) else None
    if not isinstance(names, list | dict) or not names:
        raise DataError(f"{file}: must have the class names under 'names', a list or a mapping from 0.")
    if isinstance(names, Mapping) and set(names) != set(range(len(names))):
        raise DataError(
            f"{file}: 'names' must number the classes 0 to {len(names) - 1}, got {sorted(names, key=str)}."
        )
    return dict(config)


def _label_file(image: Path) -> Path:
    parts = list(image.with_suffix(".txt").parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts)


def _read_labels(
    image: Path, size: tuple[int, int], names: tuple[str, ...]
) -> tuple[Path, tuple[LabelledObject, ...]]:
    """Return the label file of an image and its objects.

    Raises:
        DataError: the file cannot be read, or a row is no label; the message names file and line.
    """
    file = _label_file(image)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return file, ()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: must be UTF-8 text ({error.reason}).") from error
    rows = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    return file, tuple(_object(row, size, names, f"{file}: line {number}") for number, row in rows)


def _object(row: str, size: tuple[int, int], names: tuple[str, ...], where: str) -> LabelledObject:
    height, width = size
    try:
        first, *values = (float(value) for value in row.split())
    except ValueError as error:
        raise DataError(f"{where} must hold numbers, got {row[:60]!r}.") from error
    if len(values) == 4:
        cx, cy, w, h = values
        corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    elif len(values) >= 6 and len(values) % 2 == 0:
        xs, ys = values[0::2], values[1::2]
        corners = (min(xs), min(ys), max(xs), max(ys))
    else:
        raise DataError(
            f"{where} must hold a class and 4 numbers of a box or 3 or more points of a polygon, "
            f"got {len(values) + 1} numbers."
        )
    known = first.is_integer() and 0 <= first < len(names)
    x1, y1, x2, y2 = corners
    return LabelledObject(
        name=names[int(first)] if known else f"class {first:g}",
        box=(x1 * width, y1 * height, x2 * width, y2 * height),
        written=row if len(row) <= 60 else row[:57] + "...",
    )
