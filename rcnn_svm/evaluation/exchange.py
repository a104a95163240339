"""Detections as files: Pascal VOC's `comp4` text files, COCO's results JSON and a JSON of our own.

All three keep scores exactly; readers return boxes in half-open pixels. Every file is written atomically.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import as_boxes, is_number, plain_boxes
from rcnn_svm.errors import ConfigError, DataError, ShapeError
from rcnn_svm.files import appending, file_name, read_json, read_text, remove_marker, write_text
from rcnn_svm.structures import Detections

__all__ = [
    "DetectionLines",
    "read_coco_results",
    "read_comp4",
    "read_detections",
    "write_coco_results",
    "write_comp4",
    "write_detections",
]

_SCHEMA = 1
_LARGEST = float(np.finfo(np.float32).max)


def write_comp4(
    folder: Path, detections: Sequence[Detections], classes: Sequence[str], *, split: str = "test"
) -> list[Path]:
    """Write one `comp4_det_<split>_<class>.txt` per class, as the VOC devkit reads them.

    A line is `image_id score xmin ymin xmax ymax` in 1-based inclusive pixels, so `xmin` and `ymin`
    gain 1. A class without detections gives an empty file; what cannot stand in the name of one is written
    as `files.file_name` does.

    Returns:
        The files in the order of the classes.

    Raises:
        ShapeError: an infinite score, or a label that is no class.
        DataError: the folder cannot be written to.
    """
    lines: list[list[str]] = [[] for _ in classes]
    for found in detections:
        _check(found, len(classes), "write_comp4")
        for box, score, label in zip(
            found.boxes.astype(np.float64).tolist(), _short(found.scores), found.labels.tolist(), strict=True
        ):
            x1, y1, x2, y2 = box
            pixels = " ".join(f"{value:.17g}" for value in (x1 + 1, y1 + 1, x2, y2))
            lines[label].append(f"{found.image_id} {score} {pixels}\n")
    paths = []
    for name, text in zip(classes, lines, strict=True):
        path = folder / f"comp4_det_{split}_{file_name(name)}.txt"
        write_text(path, "".join(text))
        paths.append(path)
    return paths


def read_comp4(
    folder: Path, classes: Sequence[str], image_ids: Sequence[str], *, split: str = "test"
) -> list[Detections]:
    """Read what `write_comp4` or another detector wrote.

    Args:
        folder: holds one file per class.
        classes: K names.
        image_ids: the images of the split; the result has one record for each, in this order.
        split: part of the file names.

    Raises:
        DataError: a file is missing, a line is no detection, or an image is not of the split.
    """
    rows = _Rows(image_ids)
    for label, name in enumerate(classes):
        path = folder / f"comp4_det_{split}_{file_name(name)}.txt"
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: no such file; there must be one for each class. "
                "An empty file says that nothing was found."
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}).") from error
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            fields = line.rsplit(maxsplit=5)  # from the right: an image id may hold spaces
            if len(fields) != 6:
                raise DataError(
                    f"{where}: must be `image_id score xmin ymin xmax ymax`, got {line.strip()!r}. "
                    "The file may be truncated."
                )
            score, x1, y1, x2, y2 = (_number(field, where, text=True) for field in fields[1:])
            rows.add(fields[0].strip(), (x1 - 1, y1 - 1, x2, y2), score, label, where)
    return rows.detections()


def write_coco_results(
    path: Path,
    detections: Sequence[Detections],
    category_ids: Sequence[int],
    image_ids: Mapping[str, int | str] | None = None,
) -> None:
    """Write COCO's results format: a list of `image_id, category_id, bbox [x, y, w, h], score`.

    Args:
        path: of the JSON file.
        detections: one record per image.
        category_ids: (K,) COCO's id of each class.
        image_ids: COCO's id of each image id, a number as a rule; by default the image id itself, which
            then must be a number (`000000397133`).

    Raises:
        ConfigError: an image without a number.
        ShapeError: an infinite score, or a label that is no class.
    """
    lines = []
    for found in detections:
        _check(found, len(category_ids), "write_coco_results")
        coco_id = _coco_id(found.image_id, image_ids)
        boxes = found.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        for box, score, label in zip(
            boxes.tolist(), _short(found.scores), found.labels.tolist(), strict=True
        ):
            entry = {
                "image_id": coco_id,
                "category_id": int(category_ids[label]),
                "bbox": box,
                "score": score,
            }
            lines.append(json.dumps(entry, allow_nan=False))
    write_text(path, "[" + ",\n ".join(lines) + "]\n")


def read_coco_results(
    path: Path,
    category_ids: Sequence[int],
    images: Sequence[str],
    image_ids: Mapping[str, int | str] | None = None,
) -> list[Detections]:
    """Read COCO's results format; the inverse of `write_coco_results`.

    Args:
        path: of the JSON file.
        category_ids: (K,) COCO's id of each class.
        images: image ids of the split; the result has one record for each, in this order.
        image_ids: COCO's id of each image id; by default the image id itself, which then must be a number.

    Raises:
        DataError: the file is missing or no results list, or names an unknown image or category.
        ConfigError: an image without a number.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"{path}: must be a list of results, got {_kind(entries)}.")
    names = {_coco_id(image, image_ids): image for image in images}
    labels = {int(category): label for label, category in enumerate(category_ids)}
    rows = _Rows(images)
    for i, entry in enumerate(entries):
        where = f"{path}, result {i}"
        if not isinstance(entry, dict):
            raise DataError(f"{where}: must be an object, got {_kind(entry)}.")
        missing = [key for key in ("image_id", "category_id", "bbox", "score") if key not in entry]
        if missing:
            raise DataError(f"{where}: must have the key {missing[0]!r}, got {', '.join(entry) or 'none'}.")
        box = entry["bbox"]
        if not isinstance(box, list) or len(box) != 4:
            raise DataError(f"{where}: bbox must be [x, y, width, height], got {box!r}.")
        category, image = entry["category_id"], entry["image_id"]
        if not isinstance(category, int | float) or category not in labels:
            raise DataError(f"{where}: category_id {category!r} is not one of the classes.")
        x, y, width, height = (_number(value, where) for value in box)
        score = _number(entry["score"], where)
        known = names.get(image) if isinstance(image, int | str) else None
        rows.add(known or repr(image), (x, y, x + width, y + height), score, labels[int(category)], where)
    return rows.detections()


def write_detections(path: Path, detections: Sequence[Detections], classes: Sequence[str]) -> None:
    """Write our own format: `schema`, `classes` and, per image, `boxes`, `scores` and `labels`.

    With `probabilities` where the detector is calibrated. Boxes are half-open pixels `x1 y1 x2 y2`, labels
    index `classes`; one line per image.

    Raises:
        ShapeError: an infinite score, or a label that is no class.
    """
    lines = [json.dumps(_record(found, len(classes)), allow_nan=False) for found in detections]
    head = json.dumps({"schema": _SCHEMA, "classes": list(classes)})[:-1]
    write_text(path, head + ', "images": [\n ' + ",\n ".join(lines) + "\n]}\n")


def _record(found: Detections, n_classes: int) -> dict[str, Any]:
    _check(found, n_classes, "write_detections")
    likely = {} if found.probabilities is None else {"probabilities": _short(found.probabilities)}
    return {
        "image_id": found.image_id,
        "boxes": np.reshape(_short(found.boxes.ravel()), (-1, 4)).tolist(),
        "scores": _short(found.scores),
        **likely,
        "labels": found.labels.tolist(),
    }


class DetectionLines:
    """Detections as they come, a line of JSON an image, so that nothing is lost where the work is cut short.

    The first line says what made them. Where a file with the same first line lies there, its images are done
    already; a last line that was cut short is dropped.

    Attributes:
        done: image id -> digest of the image and what was found in it.

    Args:
        path: of the file.
        classes: K names.
        made_by: all that the detections depend on but the image, as JSON-able values.

    Raises:
        DataError: the file cannot be read or written.
    """

    def __init__(self, path: Path, classes: Sequence[str], made_by: Mapping[str, Any]) -> None:
        self._path, self._n_classes = path, len(classes)
        head = json.dumps({"schema": _SCHEMA, "classes": list(classes), "made_by": dict(made_by)}) + "\n"
        self.done: dict[str, tuple[str, Detections]] = {}
        whole = head
        if path.exists():
            whole = self._read(read_text(path), head)
        write_text(path, whole)

    def _read(self, text: str, head: str) -> str:
        """Take over what a file holds of the same work; return what stays of it."""
        if not text.startswith(head):
            return head
        kept = [head]
        for line in text[len(head) :].splitlines(keepends=True):
            try:
                entry = json.loads(line)
                found = _plain(entry, self._n_classes)
                self.done[found.image_id] = str(entry["image"]), found
            except (ValueError, KeyError, TypeError, RecursionError):
                break  # cut short; what follows, if anything, is no line of ours
            kept.append(line)
        return "".join(kept)

    def add(self, found: Detections, image: str) -> None:
        """Keep what was found in an image.

        Args:
            found: its detections.
            image: digest of the image.

        Raises:
            DataError: the file cannot be written to.
            DiskSpaceError: the disk is full.
        """
        line = json.dumps(_record(found, self._n_classes) | {"image": image}, allow_nan=False) + "\n"
        with appending(self._path) as stream:
            stream.write(line)
        self.done[found.image_id] = image, found

    def remove(self) -> None:
        """Remove the file: what it held stands elsewhere."""
        remove_marker(self._path)


def read_detections(path: Path) -> tuple[tuple[str, ...], list[Detections]]:
    """Read what `write_detections` wrote.

    Returns:
        The class names and one record per image.

    Raises:
        DataError: the file is missing, is not of this format, or lists an image twice.
    """
    value = read_json(path)
    if not isinstance(value, dict) or value.get("schema") != _SCHEMA:
        raise DataError(f'{path}: must be a detections file with "schema": {_SCHEMA}.')
    classes, images = value.get("classes"), value.get("images")
    if not isinstance(classes, list) or not isinstance(images, list):
        raise DataError(f'{path}: must hold the lists "classes" and "images".')
    if not all(isinstance(name, str) and name for name in classes) or len(set(classes)) < len(classes):
        raise DataError(f"{path}: classes must be texts, each once, got {classes}.")
    detections: dict[str, Detections] = {}
    for i, entry in enumerate(images):
        where = f"{path}, image {i}"
        try:
            found = _plain(entry, len(classes))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{where}: must be the detections of one image: {reason}") from error
        if found.image_id in detections:
            raise DataError(
                f"{where}: must be an image of its own, got {found.image_id!r} once more. Remove one."
            )
        detections[found.image_id] = found
    return tuple(classes), list(detections.values())


def _plain(entry: Any, n_classes: int) -> Detections:
    """Return what `_record` described.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    image_id, scores, labels = entry["image_id"], entry["scores"], entry["labels"]
    if not isinstance(image_id, str):
        raise ShapeError(f"image_id must be a text, got {image_id!r}.")
    if not isinstance(scores, list) or not all(map(is_number, scores)):
        raise ShapeError(f"scores must be numbers, got {scores!r}.")
    if not isinstance(labels, list) or not all(
        is_number(label) and isinstance(label, int) and abs(label) < 1 << 31 for label in labels
    ):
        raise ShapeError(f"labels must be integers, got {labels!r}.")
    likely = entry.get("probabilities")
    if likely is not None and not (isinstance(likely, list) and all(map(is_number, likely))):
        raise ShapeError(f"probabilities must be numbers, got {likely!r}.")
    with np.errstate(over="ignore"):
        numbers = np.array([float(min(max(score, -1e39), 1e39)) for score in scores], np.float32)
        shares = None if likely is None else np.array([min(max(p, -1), 2) for p in likely], np.float32)
    boxes = plain_boxes(entry["boxes"], where=image_id)
    found = Detections(image_id, boxes, numbers, np.array(labels, np.int64), shares)
    _check(found, n_classes, image_id)
    return found


class _Rows:
    """Collects detections that come in any order and groups them by image."""

    def __init__(self, image_ids: Sequence[str]) -> None:
        self._rows: dict[str, list[tuple[tuple[float, ...], float, int]]] = {i: [] for i in image_ids}

    def add(self, image: str, box: tuple[float, ...], score: float, label: int, where: str) -> None:
        if image not in self._rows:
            raise DataError(
                f"{where}: image {image} is not in the split. Check that the split is the right one."
            )
        if box[2] < box[0] or box[3] < box[1] or max(map(abs, (*box, score))) > _LARGEST:
            raise DataError(f"{where}: must be a box of no negative side and a score, got {box} and {score}.")
        self._rows[image].append((box, score, label))

    def detections(self) -> list[Detections]:
        result = []
        for image, rows in self._rows.items():
            boxes = as_boxes([box for box, _, _ in rows])
            scores = np.array([score for _, score, _ in rows], np.float32)
            result.append(Detections(image, boxes, scores, np.array([label for *_, label in rows], np.int64)))
        return result


def _check(found: Detections, n_classes: int, where: str) -> None:
    if np.isinf(found.scores).any():
        raise ShapeError(f"{where}: scores of image {found.image_id!r} must be finite, got an infinite one.")
    if len(found) and (found.labels.min() < 0 or found.labels.max() >= n_classes):
        raise ShapeError(
            f"{where}: labels of image {found.image_id!r} must lie in 0 .. {n_classes - 1}, "
            f"got {found.labels.min()} .. {found.labels.max()}."
        )


def _short(values: NDArray[np.float32]) -> list[float]:
    """Return Python floats with the fewest digits that read back as the same float32."""
    return [float(str(value)) for value in values]


def _number(value: Any, where: str, *, text: bool = False) -> float:
    try:
        number = float(value) if is_number(value) or text else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: must hold finite numbers, got {value!r}.")
    return number


def _coco_id(image_id: str, image_ids: Mapping[str, int | str] | None) -> int | str:
    if image_ids is not None and image_id in image_ids:
        return image_ids[image_id]
    if image_ids is None and image_id.isdecimal():
        return int(image_id)
    raise ConfigError(
        f"COCO results: image {image_id!r} must have a number. Give `image_ids`, COCO's id of each image."
    )


def _kind(value: object) -> str:
    return {"dict": "an object", "str": "a string", "list": "a list"}.get(type(value).__name__, repr(value))
