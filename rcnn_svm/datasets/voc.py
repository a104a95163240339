"""Pascal VOC: one XML per image, splits as lists of image ids or as folders.

The pixel rule lives here: VOC counts from 1 and includes both ends, so `xmin` and `ymin` lose 1 and
`xmax` and `ymax` stay. Labelling tools write a click without a drag as `xmin = xmax`; such a box counts
as one of no area, though VOC's own reading would make it one pixel wide.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from rcnn_svm.datasets.layout import (
    WHOLE,
    Files,
    OutsideError,
    is_image,
    name_parts,
    read_lines,
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
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.files import read_text

__all__ = ["VocSource", "parse_annotation"]

_CLASS_FILES = ("classes.txt", "label_list.txt")
_LONGEST_XML = 1 << 26  # bytes; the largest known annotation has less than a hundredth
_STATED = dict.fromkeys(("1", "true", "yes"), True) | dict.fromkeys(("0", "false", "no"), False)
_FLAGS = _STATED | {"unspecified": False, "": False}


@dataclass
class VocSource:
    """A VOC data set: XMLs in `Annotations/`, beside the images or in any folder, and lists of ids.

    Splits are the lists in `ImageSets/Main`, else in `ImageSets`, else those at the root that are named
    after a part (`train.txt`). Where there are only lists of one class (`cat_train.txt`), all of a split
    make it. Without lists, folders named after a part (`train/`, `valid/`) are the splits, else there is one
    split, `all`. The image of an XML is the one of its name, any image suffix, else the one that its
    `<filename>` names, else, where `files` allow it, the one outside that its `<path>` names. Classes are
    those of `classes.txt` where there is one, else all that occur in the XMLs of any split, sorted.

    Attributes:
        root: the folder that holds `Annotations`, or all the XMLs.
        files: of the data set.
    """

    root: Path
    files: Files
    _xmls: dict[str, list[Path]] = field(default_factory=dict, repr=False)
    _parsed: dict[Path, LabelledImage | Defect] = field(default_factory=dict, repr=False)
    _splits: dict[str, list[Path]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for xml in self.files.of(".xml"):
            self._xmls.setdefault(xml.stem, []).append(xml)

    @classmethod
    def find(cls, files: Files) -> VocSource | None:
        """Return the VOC data set that `files` hold (`VOC2007`, `VOCdevkit/VOC2007`), None without one.

        Raises:
            ConfigError: they hold several.
        """
        tops: dict[Path, None] = {}
        for xml in files.of(".xml"):
            folders = files.folders_of(xml)
            lowered = [folder.lower() for folder in folders]
            if "annotations" in lowered:
                tops[files.root.joinpath(*folders[: lowered.index("annotations")])] = None
            elif _looks_like_annotation(xml):
                tops[files.root] = None
        several = [top for top in tops if not role_among(top.relative_to(files.root).parts)]
        if len(several) > 1:
            names = ", ".join(sorted(top.name for top in several))
            raise ConfigError(
                f"{files.root}: must be one VOC folder, holds several ({names}). Name one of them."
            )
        if not tops:
            return None
        return cls(next(iter(tops)) if len(tops) == 1 else files.root, files)

    def splits(self) -> tuple[str, ...]:
        """Return the split names, sorted; the per-class lists (`cat_train.txt`) are none of them."""
        if self._splits is None:
            self._splits = self._find_splits()
        return tuple(sorted(self._splits))

    def class_names(self, report: Report) -> tuple[str, ...]:
        """Return the class names: from `classes.txt`, else sorted from the XMLs of all splits."""
        for file in self.files.named(*_CLASS_FILES)[:1]:
            return tuple(line for _, line in read_lines(file))
        names: set[str] = set()
        for split in self.splits():
            for _, image in self._entries(split):
                # A broken XML is reported when its split is read.
                if isinstance(image, LabelledImage):
                    names.update(thing.name for thing in image.objects)
        return tuple(sorted(names))

    def place(self, split: str) -> str:
        """Return the list or the folder of one split."""
        return str(next(iter(self._lists(split)), self.root))

    def paths(self, split: str) -> list[Path]:
        """Return the image files of one split that are found."""
        return [image.path for _, image in self._entries(split) if isinstance(image, LabelledImage)]

    def read(self, split: str, report: Report) -> list[LabelledImage]:
        """Return the images of one split in the order of its list.

        Reported are broken or missing XMLs, missing images and images without an XML.
        """
        images = []
        for _, image in self._entries(split):
            if isinstance(image, Defect):
                report(image)
            else:
                images.append(image)
        if not self._lists(split):
            xmls = [xml for one in self._xmls.values() for xml in one]
            used = {path for xml in xmls for path in self.files.images_of(xml)}
            used |= {path for one in self.splits() for path in self.paths(one)}
            folders = {path.parent for path in used}
            for path in self.files.images:
                if path not in used and path.parent in folders and _role_folder(self.files, path) == split:
                    message = f"{path}: has no XML and is no image of the data set."
                    report(Defect("unlabelled", path, message))
        return images

    def _find_splits(self) -> dict[str, list[Path]]:
        """Return the lists of each split, none for a split that is a folder."""
        texts = self.files.of(".txt")
        sets = [t for t in texts if "imagesets" in map(str.lower, self.files.folders_of(t))]
        main = [t for t in sets if t.parent.name.lower() == "main"]
        direct = [t for t in sets if t.parent.name.lower() == "imagesets"]
        near = [t for t in texts if t.parent in (self.root, self.files.root) and role_of(_list_name(t))]
        lists = main or direct or near
        plain = [t for t in lists if not _is_per_class(t)]
        splits: dict[str, list[Path]] = {}
        for file in plain:
            folder = role_among(self.files.folders_of(file))
            splits.setdefault(folder or _list_name(file), []).append(file)
        for file in lists:
            part = file.stem.rpartition("_")[2]
            if file not in plain and not any(_list_name(one) == part for one in plain):
                splits.setdefault(part, []).append(file)
        if splits:
            return splits
        return {_role_folder(self.files, xml): [] for xmls in self._xmls.values() for xml in xmls}

    def _lists(self, split: str) -> list[Path]:
        self.splits()
        return (self._splits or {}).get(split, [])

    def _entries(self, split: str) -> Iterator[tuple[Path, LabelledImage | Defect]]:
        """Yield each XML of a split, and what it holds."""
        lists = self._lists(split)
        if not lists:
            for xml in sorted(path for xmls in self._xmls.values() for path in xmls):
                if _role_folder(self.files, xml) == split:
                    yield xml, self._parse(xml)
        seen: set[Path] = set()
        for file in lists:
            per_class = _is_per_class(file)
            for number, line in read_lines(file):
                try:
                    found = self._listed(file, line, split)
                except OutsideError as error:
                    yield file, Defect("labels", file, str(error))
                    continue
                if found is None:
                    message = f"{file}: line {number} names {short(line)}, there is no XML of this name."
                    yield file, Defect("labels", file, message)
                elif not (per_class and found in seen):
                    seen.add(found)
                    yield found, self._parse(found)

    def _listed(self, file: Path, line: str, split: str) -> Path | None:
        """Return the XML that a line of a list names: an id, with or without suffix, folders, label."""
        label = re.fullmatch(r"(.+?)\s+[-+]?[01]", line)
        words = [word.strip("\"'") for word in re.split(r"[\s,]+", line)]
        forms = [line, *([label[1]] if label else []), *words[:1]]
        for form in forms:
            parts = name_parts(form.strip("\"'"))
            if not parts:
                continue
            *folders, last = parts
            stem = Path(last).stem if is_image(Path(last)) or last.lower().endswith(".xml") else last
            found = self.files.nearest(self._xmls.get(stem, []), folders, by=file, split=split)
            if found:
                return found[0]
        for form in (line, *words):
            if form.lower().endswith(".xml"):
                outside = self.files.outside(form, file.parent, self.root, by=file)
                if outside is not None:
                    return outside
        return None

    def _parse(self, xml: Path) -> LabelledImage | Defect:
        if xml not in self._parsed:
            self._parsed[xml] = self._read_xml(xml)
        return self._parsed[xml]

    def _read_xml(self, xml: Path) -> LabelledImage | Defect:
        try:
            name, path, image = parse_annotation(xml)
        except DataError as error:
            return Defect("labels", xml, str(error))
        found = self.files.images_of(xml)
        if name and len(found) != 1:
            named = self.files.nearest(
                self.files.image_named(name, by=xml), self.files.folders_of(xml), by=xml
            )
            found = [path for path in found if path in named] or found or named
        if len(found) > 1:
            names = ", ".join(str(path) for path in found)
            return Defect("image", xml, f"{xml}: must be of one image, there are {names}. Remove one.")
        if not found:
            try:
                outside = [self.files.outside(one, xml.parent, by=xml) for one in (name, path) if one]
            except OutsideError as error:
                return Defect("image", xml, str(error))
            found = [one for one in outside if one is not None]
        if not found:
            also = f" (nor {short(name)}, which it names)" if name and Path(name).stem != xml.stem else ""
            expected = self.root / "JPEGImages" / f"{xml.stem}.jpg"
            message = f"{expected}: no such image file{also}, though {xml} labels it."
            return Defect("image", expected, message)
        return LabelledImage(found[0], xml, image.size, image.objects, image.faults)


def _list_name(file: Path) -> str:
    return file.stem.removesuffix("_list")


def _role_folder(files: Files, path: Path) -> str:
    return role_among(files.folders_of(path)) or WHOLE


def _is_per_class(file: Path) -> bool:
    """Tell whether a list is one of a single class: `cat_train.txt`, each line an id and -1, 0 or 1."""
    class_name, _, split = file.stem.rpartition("_")
    return bool(class_name and role_of(split)) and all(
        re.search(r"\s[-+]?[01]$", line) for _, line in read_lines(file)
    )


def _looks_like_annotation(xml: Path) -> bool:
    try:
        with open(xml, "rb") as stream:
            return b"annotation" in stream.read(4096).replace(b"\0", b"").lower()
    except OSError:
        return False


def parse_annotation(file: Path) -> tuple[str, str, LabelledImage]:
    """Read one VOC XML.

    Tolerated are namespaces, coordinates with decimals, a missing or zero `size`, a missing `difficult`, and
    `part`s inside objects, which are not objects. A polygon or a turned box without a `bndbox` is read as the
    box around it.

    Args:
        file: the XML.

    Returns:
        What it says is the image's file name, what its path, each empty where it says nothing, and its
        objects; `path` of the latter is the XML's own.

    Raises:
        DataError: the file is missing, no XML or none of an annotation.
    """
    tree = _parse_xml(file)
    for element in tree.iter():
        element.tag = element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
    if tree.tag.lower() != "annotation":
        raise DataError(f"{file}: must have the root element <annotation>, got <{short(tree.tag)[1:-1]}>.")
    sides = []
    for side in ("height", "width"):
        try:
            sides.append(parse_number(tree.findtext(f"size/{side}") or "0"))
        except ValueError:
            sides.append(0.0)  # "Unspecified" and the like: the picture knows
    objects, faults = [], []
    for number, element in enumerate(tree.iterfind("object"), start=1):
        try:
            objects.append(_object(element, f"object {number}"))
        except DataError as error:
            faults.append(Defect("malformed", file, f"{file}: object {number}{error}"))
    if not objects and not faults and any(e.tag.lower() in ("object", "bndbox") for e in tree.iter()):
        raise DataError(f"{file}: must have its <object>s directly in <annotation>, got them elsewhere.")
    size = (int(sides[0]), int(sides[1])) if 1 <= min(sides) <= max(sides) < 2**31 else None
    name, path = ((tree.findtext(tag) or "").strip() for tag in ("filename", "path"))
    return name, path, LabelledImage(file, file, size, tuple(objects), tuple(faults))


def _parse_xml(file: Path) -> ElementTree.Element:
    try:
        if file.stat().st_size > _LONGEST_XML:
            raise DataError(f"{file}: must have at most {_LONGEST_XML >> 20} MB, it is no annotation.")
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
    try:
        return ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        text = _decoded(file, content)
        if text is not None:
            try:
                return ElementTree.fromstring(text)
            except ElementTree.ParseError:
                pass  # the first error tells more
        line, column = error.position
        raise DataError(
            f"{file}: must be XML, got a syntax error at line {line}, column {column}. It may be truncated."
        ) from error
    except (ValueError, LookupError) as error:
        text = _decoded(file, content)
        try:
            return ElementTree.fromstring(text or "")
        except ElementTree.ParseError:
            raise DataError(
                f"{file}: must be XML in a known encoding ({error}). Save it as UTF-8."
            ) from error


def _decoded(file: Path, content: bytes) -> str | None:
    """Return the text of an XML that expat cannot decode, without its declaration; None for plain ASCII."""
    declared = re.match(rb"\s*<\?xml[^>]*encoding=[\"']([A-Za-z0-9._-]+)[\"']", content)
    try:
        text = content.decode(declared[1].decode()) if declared else None
    except (LookupError, ValueError):
        text = None
    if text is None:
        if content.isascii():
            return None
        text = read_text(file)
    return re.sub(r"^\s*<\?xml[^>]*\?>", "", text)


def _object(element: ElementTree.Element, place: str) -> LabelledObject:
    """Read one object.

    Raises:
        DataError: what is missing; the message goes on after the number of the object.
    """
    name = (element.findtext("name") or "").strip()
    if not name:
        raise DataError(" must have a <name>.")
    box, written, turned = _box(element, f" ({short(name)[1:-1]})")
    flag = (element.findtext("difficult") or "").strip().lower()
    if flag not in _FLAGS:
        raise DataError(f" ({name}) must have 0 or 1 as <difficult>, got {short(flag)}.")
    # Nothing but groups of a breakdown depends on these: a word that tools write for "unknown" is no fault.
    stated = {tag: (element.findtext(tag) or "").strip().lower() for tag in ("truncated", "occluded")}
    flags = {tag: _STATED[word] for tag, word in stated.items() if word in _STATED}
    return LabelledObject(name, box, written, place, _FLAGS[flag], turned=turned, flags=flags)


def _box(element: ElementTree.Element, where: str) -> tuple[tuple[float, float, float, float], str, bool]:
    """Return the half-open box, how it is written, and whether it is around a turned one."""
    polygon, turned = element.find("polygon"), element.find("robndbox")
    if element.find("bndbox") is None and polygon is not None:
        # x1 y1 x2 y2 as tags (LabelMe's converters, Roboflow), or a <pt> with x and y each.
        xs = [_number(one, one.tag, where) for one in polygon.iter() if re.fullmatch(r"x\d*", one.tag)]
        ys = [_number(one, one.tag, where) for one in polygon.iter() if re.fullmatch(r"y\d*", one.tag)]
        if len(xs) != len(ys) or len(xs) < 3:
            raise DataError(f"{where} must have 3 or more points in its <polygon>, got {len(xs)}.")
        written = f"a polygon from {min(xs):g} {min(ys):g} to {max(xs):g} {max(ys):g}"
        return (min(xs) - 1, min(ys) - 1, max(xs), max(ys)), written, False
    if element.find("bndbox") is None and turned is not None:
        values = [_number(turned.find(tag), tag, where) for tag in ("cx", "cy", "w", "h", "angle")]
        return around(*values), f"a turned box {values}", True
    corners = ("xmin", "ymin", "xmax", "ymax")
    xmin, ymin, xmax, ymax = (_number(element.find(f"bndbox/{tag}"), tag, where) for tag in corners)
    # The corner that would become a positive width only through the pixel rule is left where it is.
    box = (xmin - 1 if xmax > xmin else xmin, ymin - 1 if ymax > ymin else ymin, xmax, ymax)
    return box, f"xmin {xmin:g}, ymin {ymin:g}, xmax {xmax:g}, ymax {ymax:g}", False


def _number(element: ElementTree.Element | None, tag: str, where: str) -> float:
    text = None if element is None else element.text
    try:
        return parse_number(text or "")
    except ValueError as error:
        got = "nothing" if text is None else short(text.strip())
        raise DataError(f"{where} must have a number as <{tag}>, got {got}.") from error
