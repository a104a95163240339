"""Pascal VOC folders: one XML per image, splits as lists of image ids.

The pixel rule lives here: VOC counts from 1 and includes both ends, so `xmin` and `ymin` lose 1 and
`xmax` and `ymax` stay. Labelling tools write a click without a drag as `xmin = xmax`; such a box counts
as one of no area, though VOC's own reading would make it one pixel wide.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from rcnn_svm.datasets.images import IMAGE_SUFFIXES
from rcnn_svm.datasets.records import Defect, LabelledImage, LabelledObject, Report
from rcnn_svm.errors import ConfigError, DataError

__all__ = ["VocSource", "parse_annotation"]

_WHOLE = "all"  # the only split of a folder without ImageSets


@dataclass
class VocSource:
    """A VOC folder: `Annotations/*.xml`, `JPEGImages/` and `ImageSets/Main/SPLIT.txt`.

    Without `ImageSets` there is one split, `all`. Image ids are file names without suffix; the image of
    an id may have any image suffix. Classes are those of `classes.txt` where the folder has one, else all
    that occur in the XMLs of any split, sorted.

    Attributes:
        root: the folder that holds `Annotations`.
    """

    root: Path
    _parsed: dict[str, LabelledImage | Defect] = field(default_factory=dict, repr=False)
    _images: dict[str, Path] | None = field(default=None, repr=False)

    @classmethod
    def find(cls, path: Path) -> VocSource | None:
        """Return the VOC folder that `path` is or holds (`VOC2007`, `VOCdevkit/VOC2007`), None without one.

        Raises:
            ConfigError: `path` holds several.
        """
        for pattern in ("Annotations", "*/Annotations", "VOCdevkit/*/Annotations"):
            found = sorted(folder.parent for folder in path.glob(pattern) if any(folder.glob("*.xml")))
            if len(found) == 1:
                return cls(found[0])
            if found:
                names = ", ".join(folder.name for folder in found)
                raise ConfigError(
                    f"{path}: must be one VOC folder, holds several ({names}). Name one of them."
                )
        return None

    def splits(self) -> tuple[str, ...]:
        """Return the split names, sorted; the per-class lists (`cat_train.txt`) are none of them."""
        stems = {file.stem for file in (self.root / "ImageSets" / "Main").glob("*.txt")}
        per_class = {stem for stem in stems for other in stems if stem.endswith(f"_{other}")}
        return tuple(sorted(stems - per_class)) or (_WHOLE,)

    def class_names(self, report: Report) -> tuple[str, ...]:
        """Return the class names: from `classes.txt`, else sorted from the XMLs of all splits."""
        file = self.root / "classes.txt"
        if file.exists():
            return tuple(line.strip() for line in _read_lines(file))
        names: set[str] = set()
        for split in self.splits():
            for image_id in self._ids(split):
                # A broken XML is reported when its split is read.
                image = self._parse(image_id)
                if isinstance(image, LabelledImage):
                    names.update(thing.name for thing in image.objects)
        return tuple(sorted(names))

    def read(self, split: str, report: Report) -> list[LabelledImage]:
        """Return the images of one split in the order of its list.

        Reported are broken or missing XMLs and missing images.
        """
        images = []
        for image_id in self._ids(split):
            image = self._parse(image_id)
            if isinstance(image, Defect):
                report(image)
            elif image_id not in self._image_files():
                message = f"{image.path}: no such image file, though {image.labels} labels it."
                report(Defect("image", image.path, message))
            else:
                images.append(image)
        return images

    def _ids(self, split: str) -> list[str]:
        file = self.root / "ImageSets" / "Main" / f"{split}.txt"
        if split == _WHOLE and not file.exists():
            return sorted(xml.stem for xml in (self.root / "Annotations").glob("*.xml"))
        return _read_lines(file)

    def _image_files(self) -> dict[str, Path]:
        if self._images is None:
            folder = self.root / "JPEGImages"
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            parts = [os.path.splitext(name) for name in names]
            self._images = {
                stem: folder / f"{stem}{suffix}" for stem, suffix in parts if suffix.lower() in IMAGE_SUFFIXES
            }
        return self._images

    def _parse(self, image_id: str) -> LabelledImage | Defect:
        if image_id not in self._parsed:
            file = self.root / "Annotations" / f"{image_id}.xml"
            path = self._image_files().get(image_id, self.root / "JPEGImages" / f"{image_id}.jpg")
            try:
                self._parsed[image_id] = parse_annotation(file, image_id, path)
            except DataError as error:
                self._parsed[image_id] = Defect("labels", file, str(error))
        return self._parsed[image_id]


def _read_lines(file: Path) -> list[str]:
    """Return the lines that hold something, stripped.

    Raises:
        DataError: the file is missing or no text.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: must be UTF-8 text ({error.reason}).") from error
    return [line.strip() for line in lines if line.strip()]


def parse_annotation(file: Path, image_id: str, path: Path) -> LabelledImage:
    """Read one VOC XML.

    Tolerated are coordinates with decimals, a missing or zero `size`, a missing `difficult`, and `part`s
    inside objects, which are not objects.

    Args:
        file: the XML.
        image_id: of its image.
        path: of its image.

    Raises:
        DataError: the file is missing or no XML, or an object lacks its name or a corner.
    """
    try:
        tree = ElementTree.parse(file).getroot()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
    except ElementTree.ParseError as error:
        line, column = error.position
        raise DataError(
            f"{file}: must be XML, got a syntax error at line {line}, column {column}. It may be truncated."
        ) from error
    height, width = (_number(tree, f"size/{side}", f"{file}: size", 0.0) for side in ("height", "width"))
    objects = []
    for number, element in enumerate(tree.iterfind("object"), start=1):
        name = (element.findtext("name") or "").strip()
        if not name:
            raise DataError(f"{file}: object {number} must have a <name>.")
        where = f"{file}: object {number} ({name})"
        xmin, ymin, xmax, ymax = (
            _number(element, f"bndbox/{corner}", where) for corner in ("xmin", "ymin", "xmax", "ymax")
        )
        # The corner that would become a positive width only through the pixel rule is left where it is.
        box = (xmin - 1 if xmax > xmin else xmin, ymin - 1 if ymax > ymin else ymin, xmax, ymax)
        written = f"xmin {xmin:g}, ymin {ymin:g}, xmax {xmax:g}, ymax {ymax:g}"
        difficult = _number(element, "difficult", where, 0.0) == 1
        objects.append(LabelledObject(name, box, written, difficult))
    size = (int(height), int(width)) if 1 <= min(height, width) <= max(height, width) < 2**31 else None
    return LabelledImage(image_id, path, file, size, tuple(objects))


def _number(element: ElementTree.Element, tag: str, where: str, default: float | None = None) -> float:
    text = element.findtext(tag)
    if default is not None and (text is None or not text.strip()):
        return default
    try:
        return float(text or "")
    except ValueError as error:
        got = "nothing" if text is None else repr(text.strip())
        raise DataError(f"{where} must have a number as <{tag.split('/')[-1]}>, got {got}.") from error
