"""COCO JSON: one file per split, boxes as 0-based `[x, y, width, height]`.

COCO's category ids have gaps; labels here are 0 .. K-1 by rising id, and categories are matched by name.
`coco_category_ids` and `coco_image_ids` give the way back for writing results.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from rcnn_svm.datasets.layout import (
    LABEL_FOLDERS,
    WHOLE,
    Files,
    OutsideError,
    image_ids,
    role_among,
    role_of,
)
from rcnn_svm.datasets.records import (
    Defect,
    LabelledImage,
    LabelledObject,
    Report,
    around,
    parse_number,
    short,
)
from rcnn_svm.errors import DataError
from rcnn_svm.files import read_json

__all__ = ["CocoSource", "coco_category_ids", "coco_image_ids", "is_label_studio"]

Id: TypeAlias = int | str
"""What COCO's records are known by: a whole number, or a text in some exports."""

# Files of COCO's other tasks, which lie in the same folder.
_OTHER_TASKS = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")
# What file names say beside the split.
_NOISE = frozenset(
    {"instances", "instance", "annotations", "annotation", "coco", "labels", "label", "result", "results"}
)
_LISTS = ("images", "annotations", "categories")
_MOST_CANDIDATES = 1000


@dataclass
class CocoSource:
    """A COCO data set: `annotations/instances_SPLIT.json`, `SPLIT/_annotations.coco.json` or others alike.

    The split is what the name of the JSON says beside words such as `instances`, else its folder, else
    `all`. Images are found by `file_name` anywhere below the root and, where `files` allow it, outside.

    Attributes:
        root: the folder that the user named.
        files: of the data set.
        jsons: the JSON file of each split.
        others: JSON files among the labels that are none of COCO's.
    """

    root: Path
    files: Files
    jsons: dict[str, Path]
    others: tuple[Path, ...] = ()
    _content: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    @classmethod
    def find(cls, files: Files, only: Path | None = None) -> CocoSource | None:
        """Return the COCO data set in `files`, None where there is none; `only` names its one JSON."""
        names = [file for file in files.of(".json") if not file.stem.startswith(_OTHER_TASKS)]
        found, others = [], []
        for file in ([only] if only else names)[:_MOST_CANDIDATES]:
            if only or _is_coco(file, files):
                found.append(file)
            elif file.parent.name.lower() in LABEL_FOLDERS:  # elsewhere lie results, settings and so on
                others.append(file)
        if not found:
            return None
        splits = [_split_name(file, files) for file in found]
        # Where two files would be one split, their full names tell them apart.
        jsons = {
            split
            if splits.count(split) == 1
            else file.relative_to(files.root).with_suffix("").as_posix(): file
            for split, file in zip(splits, found, strict=True)
        }
        return cls(files.root, files, jsons, tuple(others))

    def splits(self) -> tuple[str, ...]:
        """Return the split names, sorted, as the files name them (`train2017`)."""
        return tuple(sorted(self.jsons))

    def class_names(self, report: Report) -> tuple[str, ...]:
        """Return the category names by rising id, those of all splits that can be read.

        A category without objects that is only the group of others, as exports add it, is left out; so is
        one whose name a category with objects has as well.
        """
        for file in self.others:
            report(Defect("unused", file, f"{file}: is no JSON of COCO and was skipped."))
        order: dict[str, tuple[bool, Id]] = {}
        used: set[str] = set()
        groups: set[str] = set()
        for split in self.splits():
            try:
                content, names = self._load(split), self._categories(split)
            except DataError as error:
                report(Defect("split", self.jsons[split], str(error)))
                continue
            for number, name in names.items():
                order[name] = min((isinstance(number, str), number), order.get(name, (True, "\U0010ffff")))
            used |= {names[k] for k in _category_ids_used(content) if k in names}
            groups |= {
                str(one["supercategory"])
                for one in content["categories"]
                if one.get("supercategory") not in (None, one["name"])
            }
        left_out = [name for name in order if name in groups and name not in used and len(used) > 0]
        for name in left_out:
            message = f"{self.root}: the category {name!r} has no objects and only groups others: left out."
            report(Defect("category", self.root, message))
        return tuple(sorted(order.keys() - left_out, key=lambda name: order[name]))

    def category_ids(self) -> dict[str, Any]:
        """Return COCO's id of each class name."""
        ids: dict[str, Any] = {}
        for split in self.splits():
            used = _category_ids_used(self._load(split))
            for record in self._load(split)["categories"]:
                if record["name"] not in ids or _as_id(record["id"]) in used:
                    ids[str(record["name"])] = record["id"]
        return ids

    def image_ids(self, split: str) -> dict[str, int | str]:
        """Return COCO's id of each image id of `split`."""
        ids = image_ids(path for one in self.splits() for path in self.paths(one))
        found = ((self._image(split, record), record["id"]) for record in self._load(split)["images"])
        return {ids[path]: number for path, number in found if isinstance(path, Path)}

    def place(self, split: str) -> str:
        """Return the JSON of one split."""
        return str(self.jsons[split])

    def paths(self, split: str) -> list[Path]:
        """Return the image files of one split that are found."""
        try:
            found = [self._image(split, record) for record in self._load(split)["images"]]
        except DataError:
            return []  # reported where the split is read
        return [path for path in found if isinstance(path, Path)]

    def read(self, split: str, report: Report) -> list[LabelledImage]:
        """Return the images of one split in the order of the file, with and without annotations.

        Reported are a broken file, annotations of unknown images or categories, and missing images.
        """
        file = self.jsons[split]
        try:
            content, names = self._load(split), self._categories(split)
        except DataError as error:
            report(Defect("split", file, str(error)))
            return []
        objects: dict[Id, list[LabelledObject]] = {_as_id(one["id"]): [] for one in content["images"]}
        for number, annotation in enumerate(content["annotations"], start=1):
            try:
                image, thing = _object(annotation, names, f"annotation {number}")
                objects[image].append(thing)
            except ValueError as error:
                message = f"{file}: annotation {number} must have {error}, got {short(annotation)}."
                report(Defect("malformed", file, message))
            except KeyError:
                image_id = short(annotation["image_id"])
                message = f"{file}: annotation {number} is of image {image_id}, which is not listed."
                report(Defect("malformed", file, message))
        images = []
        for record in content["images"]:
            path = self._image(split, record)
            if isinstance(path, Defect):
                report(path)
                continue
            try:
                size = _size(record)
            except ValueError:
                sides = f"{short(record.get('width'))} and {short(record.get('height'))}"
                message = (
                    f"{file}: image {short(record['file_name'])} must have a whole width and height, "
                    f"got {sides}."
                )
                report(Defect("labels", file, message))
                continue
            images.append(LabelledImage(path, file, size, tuple(objects[_as_id(record["id"])])))
        return images

    def _load(self, split: str) -> dict[str, Any]:
        if split not in self._content:
            file = self.jsons[split]
            content = read_json(file)
            if not isinstance(content, dict) or not all(
                isinstance(content.get(key, []), list) for key in _LISTS
            ):
                raise DataError(f"{file}: must hold the lists images, annotations and categories of COCO.")
            for key in ("images", "categories"):
                if key not in content:
                    raise DataError(
                        f"{file}: must hold the list {key!r} of COCO, got {short(list(content))}."
                    )
            content.setdefault("annotations", [])
            for key, name in (("images", "file_name"), ("categories", "name")):
                seen: set[Id] = set()
                for record in content[key]:
                    try:
                        number = _as_id(record["id"])
                        valid = isinstance(record[name], str) and bool(record[name].strip())
                    except (KeyError, TypeError, ValueError):
                        valid = False
                    if not valid:
                        raise DataError(
                            f"{file}: each of {key!r} must have a whole number or a text as 'id' and "
                            f"a text as {name!r}, got {short(record)}."
                        )
                    if number in seen:
                        raise DataError(
                            f"{file}: each of {key!r} must have an id of its own, {number!r} comes twice."
                        )
                    seen.add(number)
            self._content[split] = content
        return self._content[split]

    def _categories(self, split: str) -> dict[Id, str]:
        """Return the name of each category id.

        Raises:
            DataError: two categories with objects share a name.
        """
        content = self._load(split)
        names = {_as_id(record["id"]): record["name"].strip() for record in content["categories"]}
        used: dict[str, Id] = {}
        for number in _category_ids_used(content) & names.keys():
            other = used.setdefault(names[number], number)
            if other != number:
                raise DataError(
                    f"{self.jsons[split]}: each category must have its own name, {other!r} and {number!r} "
                    f"are both {names[number]!r} and both have objects. Rename one."
                )
        return names

    def _image(self, split: str, record: Mapping[str, Any]) -> Path | Defect:
        name, file = record["file_name"], self.jsons[split]
        found = self.files.image_named(name, by=file, split=split)
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(path) for path in found[:3])
            message = f"{file}: file_name {short(name)} must be of one image, there are {names}. Remove one."
            return Defect("image", file, message)
        try:
            outside = self.files.outside(name, file.parent, self.root, by=file)
        except OutsideError as error:
            return Defect("image", file, str(error))
        message = f"{file}: names {short(name)}, there is no such image file below {self.root}."
        return outside or Defect("image", file, message)


def coco_category_ids(path: str | Path, *, allow_outside: bool = False) -> dict[str, Any]:
    """Return COCO's category id of each class name of the COCO folder `path`.

    Args:
        path: the folder.
        allow_outside: as in `load_dataset`.

    Raises:
        DataError: `path` is no COCO folder, or a JSON file is broken.
    """
    return _source(path, allow_outside).category_ids()


def coco_image_ids(path: str | Path, split: str, *, allow_outside: bool = False) -> dict[str, int | str]:
    """Return COCO's image id, a number as a rule, of each image id of one split, named as in `load_dataset`.

    Args:
        path: the folder.
        split: of it.
        allow_outside: as in `load_dataset`.

    Raises:
        DataError: `path` is no COCO folder, has no such split, or the JSON file is broken.
    """
    source = _source(path, allow_outside)
    named = [name for name in source.jsons if role_of(name) == split]
    if split not in source.jsons and len(named) == 1:
        split = named[0]
    if split not in source.jsons:
        raise DataError(f"{path}: has no split {split!r}, only {', '.join(source.splits())}.")
    return source.image_ids(split)


def is_label_studio(file: Path) -> bool:
    """Tell whether a file is Label Studio's own JSON, a list of tasks, which no reader takes."""
    try:
        content = read_json(file)
    except DataError:
        return False
    kinds = ("annotations", "predictions", "completions")
    return isinstance(content, list) and any(
        isinstance(task, dict) and "data" in task and any(kind in task for kind in kinds)
        for task in content[:1]
    )


def _source(path: str | Path, allow_outside: bool) -> CocoSource:
    folder = Path(path)
    source = CocoSource.find(Files.walk(folder, allow_outside=allow_outside)) if folder.is_dir() else None
    if source is None:
        raise DataError(f"{path}: must be a COCO folder with annotations/instances_SPLIT.json.")
    return source


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[-_. ]+", name) if word and word.lower() not in _NOISE]


def _split_name(file: Path, files: Files) -> str:
    words, folders = _words(file.stem), files.folders_of(file)
    role = [word for word in words if role_of(word)]
    if len(role) == 1:
        return role[0]
    if words:
        return file.stem.removeprefix("instances_")
    return role_among(reversed(folders)) or next((f for f in reversed(folders) if _words(f)), WHOLE)


def _is_coco(file: Path, files: Files) -> bool:
    """Tell whether a JSON is one of COCO's, or is named like one and broken."""
    meant = file.stem.lower().startswith(("instances_", "_annotations.coco")) or (
        file.parent.name.lower() == "annotations" and role_among(_words(file.stem)) is not None
    )
    if not meant:
        try:
            content = read_json(file)
        except DataError:
            return (
                len(_words(file.stem)) < len(re.split(r"[-_. ]+", file.stem))
                or file.parent.name.lower() == "annotations"
            )
        return isinstance(content, dict) and all(
            isinstance(content.get(key), list) for key in ("images", "categories")
        )
    return True


def _as_id(value: object) -> Id:
    """Return an id such that 2 and "2" are the same; raise ValueError for what can be none."""
    if isinstance(value, bool) or not isinstance(value, int | str | float) or value == "":
        raise ValueError(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(value)
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"0|-?[1-9][0-9]{0,18}", value):
        return int(value)
    return value


def _category_ids_used(content: Mapping[str, Any]) -> set[Id]:
    used = set()
    for annotation in content["annotations"]:
        # What has none is reported where the split is read.
        with contextlib.suppress(KeyError, TypeError, ValueError):
            used.add(_as_id(annotation["category_id"]))
    return used


def _size(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (height, width) that an image states, None for none."""
    sides = [parse_number(record.get(key) or 0) for key in ("height", "width")]
    if any(not side.is_integer() for side in sides):
        raise ValueError(sides)
    return (int(sides[0]), int(sides[1])) if min(sides) >= 1 else None


def _object(annotation: Any, names: Mapping[Id, str], place: str) -> tuple[Id, LabelledObject]:
    """Return the image id and the object of an annotation; raise ValueError with what it must have."""
    try:
        image, category = _as_id(annotation["image_id"]), _as_id(annotation["category_id"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("an image_id and a category_id") from error
    crowd, difficult = annotation.get("iscrowd") or 0, annotation.get("difficult") or 0
    if crowd not in (0, 1) or difficult not in (0, 1):
        raise ValueError("0 or 1 as iscrowd and difficult")
    area = annotation.get("area")
    try:
        area = None if area is None else parse_number(_no_text(area))
    except ValueError:
        area = -1.0
    if area is not None and area < 0:
        raise ValueError("an area of 0 or more")
    box, written, turned = _box(annotation)
    name = names.get(category, f"category {category}")
    return image, LabelledObject(
        name, box, written, place, bool(difficult), bool(crowd), area=area, turned=turned
    )


def _box(annotation: Mapping[str, Any]) -> tuple[tuple[float, float, float, float], str, bool]:
    """Return the half-open box of `bbox`, or of the polygons, how it is written, whether it is turned."""
    given = annotation.get("bbox")
    try:
        if given:
            x, y, width, height = (parse_number(_no_text(value)) for value in given)
        else:
            points = [[parse_number(_no_text(v)) for v in part] for part in annotation["segmentation"]]
            if not points or any(len(part) < 6 or len(part) % 2 for part in points):
                raise ValueError(points)
            xs, ys = ([v for part in points for v in part[k::2]] for k in (0, 1))
            x, y, width, height = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("a bbox of four finite numbers or polygons") from error
    written = f"bbox [{x:g}, {y:g}, {width:g}, {height:g}]"
    more = annotation.get("attributes")
    turn = more.get("rotation") if isinstance(more, dict) else None
    if turn:  # degrees; CVAT writes the box before it is turned
        try:
            angle = math.radians(parse_number(turn))
        except ValueError as error:
            raise ValueError("a number as rotation") from error
        return (
            around(x + width / 2, y + height / 2, width, height, angle),
            f"{written} turned by {turn}",
            True,
        )
    return (x, y, x + max(width, 0.0), y + max(height, 0.0)), written, False


def _no_text(value: object) -> object:
    if isinstance(value, str):
        raise ValueError(value)
    return value
