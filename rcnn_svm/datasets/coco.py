"""COCO JSON: one file per split, boxes as 0-based `[x, y, width, height]`.

COCO's category ids have gaps; labels here are 0 .. K-1 by rising id. `coco_category_ids` and
`coco_image_ids` give the way back for writing results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcnn_svm.datasets.records import Defect, LabelledImage, LabelledObject, Report
from rcnn_svm.errors import DataError
from rcnn_svm.files import read_json

__all__ = ["CocoSource", "coco_category_ids", "coco_image_ids"]

# Files of COCO's other tasks, which lie in the same folder.
_OTHER_TASKS = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")


@dataclass
class CocoSource:
    """A COCO folder: `annotations/instances_SPLIT.json` or `SPLIT/_annotations.coco.json`.

    Images are looked for in `SPLIT/`, `images/SPLIT/`, `images/`, beside the JSON and in the folder itself.
    Image ids are file names without suffix.

    Attributes:
        root: the folder that the user named.
        files: the JSON file of each split.
    """

    root: Path
    files: dict[str, Path]
    _content: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    @classmethod
    def find(cls, path: Path) -> CocoSource | None:
        """Return the COCO folder that `path` is, None where it is none."""
        files = {
            file.stem.removeprefix("instances_"): file
            for file in sorted((path / "annotations").glob("*.json"))
            if not file.stem.startswith(_OTHER_TASKS)
        }
        files |= {file.parent.name: file for file in sorted(path.glob("*/_annotations.coco.json"))}
        return cls(path, files) if files else None

    def splits(self) -> tuple[str, ...]:
        """Return the split names, sorted, as the files name them (`train2017`)."""
        return tuple(sorted(self.files))

    def class_names(self, report: Report) -> tuple[str, ...]:
        """Return the category names by rising id, those of all splits that can be read."""
        categories: dict[int, str] = {}
        for split in self.splits():
            try:
                categories |= self._categories(split)
            except DataError as error:
                report(Defect("labels", self.files[split], str(error)))
        return tuple(categories[number] for number in sorted(categories))

    def category_ids(self) -> dict[str, int]:
        """Return COCO's id of each class name."""
        return {name: number for split in self.splits() for number, name in self._categories(split).items()}

    def image_ids(self, split: str) -> dict[str, int | str]:
        """Return COCO's id of each image id of `split`."""
        return {_image_id(record): record["id"] for record in self._load(split)["images"]}

    def read(self, split: str, report: Report) -> list[LabelledImage]:
        """Return the images of one split in the order of the file, with and without annotations.

        Reported are a broken file, annotations of unknown images or categories, and missing images.
        """
        file = self.files[split]
        try:
            content, categories = self._load(split), self._categories(split)
        except DataError as error:
            report(Defect("labels", file, str(error)))
            return []
        objects: dict[Any, list[LabelledObject]] = {record["id"]: [] for record in content["images"]}
        for number, annotation in enumerate(content["annotations"], start=1):
            try:
                objects[annotation["image_id"]].append(_object(annotation, categories))
            except (KeyError, TypeError, ValueError, AttributeError):
                message = (
                    f"{file}: annotation {number} must have a known image_id, a category_id, a bbox of four "
                    f"numbers and, if any, an area of 0 or more, got {_short(annotation)}."
                )
                report(Defect("labels", file, message))
        images = []
        for record in content["images"]:
            found = self._image(split, record["file_name"])
            if found is None:
                message = (
                    f"{self.root / split / record['file_name']}: no such image file, though {file} names it."
                )
                report(Defect("image", self.root / split / record["file_name"], message))
                continue
            size = (record.get("height") or 0, record.get("width") or 0)
            known_size = size if min(size) >= 1 else None
            images.append(
                LabelledImage(_image_id(record), found, file, known_size, tuple(objects[record["id"]]))
            )
        return images

    def _load(self, split: str) -> dict[str, Any]:
        if split not in self._content:
            file = self.files[split]
            content = read_json(file)
            if not isinstance(content, dict) or not all(
                isinstance(content.get(key, []), list) for key in ("images", "annotations", "categories")
            ):
                raise DataError(f"{file}: must hold the lists images, annotations and categories of COCO.")
            for key in ("images", "categories"):
                if key not in content:
                    raise DataError(
                        f"{file}: must hold the list {key!r} of COCO, got {_short(list(content))}."
                    )
            for key, fields in (("images", ("id", "file_name")), ("categories", ("id", "name"))):
                for record in content[key]:
                    if not isinstance(record, dict) or not all(name in record for name in fields):
                        raise DataError(
                            f"{file}: each of {key!r} must have {fields[0]!r} and {fields[1]!r}, "
                            f"got {_short(record)}."
                        )
            content.setdefault("annotations", [])
            self._content[split] = content
        return self._content[split]

    def _categories(self, split: str) -> dict[int, str]:
        return {record["id"]: str(record["name"]) for record in self._load(split)["categories"]}

    def _image(self, split: str, name: str) -> Path | None:
        folders = (
            self.root / split,
            self.root / "images" / split,
            self.root / "images",
            self.files[split].parent,
            self.root,
        )
        return next((folder / name for folder in folders if (folder / name).is_file()), None)


def coco_category_ids(path: str | Path) -> dict[str, int]:
    """Return COCO's category id of each class name of the COCO folder `path`.

    Raises:
        DataError: `path` is no COCO folder, or a JSON file is broken.
    """
    return _source(path).category_ids()


def coco_image_ids(path: str | Path, split: str) -> dict[str, int | str]:
    """Return COCO's image id, a number as a rule, of each `Sample.image_id` of one split, named as its file.

    Raises:
        DataError: `path` is no COCO folder, has no such split, or the JSON file is broken.
    """
    source = _source(path)
    if split not in source.files:
        raise DataError(f"{path}: has no split {split!r}, only {', '.join(source.splits())}.")
    return source.image_ids(split)


def _source(path: str | Path) -> CocoSource:
    source = CocoSource.find(Path(path))
    if source is None:
        raise DataError(f"{path}: must be a COCO folder with annotations/instances_SPLIT.json.")
    return source


def _image_id(record: Mapping[str, Any]) -> str:
    return Path(record["file_name"]).with_suffix("").as_posix()


def _object(annotation: Mapping[str, Any], categories: Mapping[int, str]) -> LabelledObject:
    x, y, width, height = (float(value) for value in annotation["bbox"])
    category = annotation["category_id"]
    box = (x, y, x + max(width, 0.0), y + max(height, 0.0))
    area = None if annotation.get("area") is None else float(annotation["area"])
    if area is not None and not 0 <= area < math.inf:
        raise ValueError(f"area {area}")
    return LabelledObject(
        name=categories.get(category, f"category {category}"),
        box=box if all(map(math.isfinite, box)) else (x, y, x, y),
        written=f"bbox [{x:g}, {y:g}, {width:g}, {height:g}]",
        difficult=bool(annotation.get("difficult", 0)),
        crowd=bool(annotation.get("iscrowd", 0)),
        area=area,
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
