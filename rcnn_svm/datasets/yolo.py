"""YOLO: classes and splits in a YAML, in darknet's `obj.data` or in folders; one text of labels per image.

A row is `class cx cy w h`, relative to the image's size, or `class x y x y x y ...`, a polygon or a turned
box by its corners, of which the surrounding box is taken. Rows of poses begin with their box; they are told
from polygons by the YAML's `kpt_shape`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rcnn_svm.datasets.layout import (
    IMAGE_FOLDERS,
    LABEL_FOLDERS,
    WHOLE,
    Files,
    OutsideError,
    is_image,
    name_parts,
    read_lines,
    role_among,
    role_of,
)
from rcnn_svm.datasets.records import Defect, LabelledImage, LabelledObject, Report, parse_number, short
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.files import read_text

__all__ = ["YoloSource"]

_CLASS_FILES = ("classes.txt", "obj.names", "classes.names", "_darknet.labels", "predefined_classes.txt")
# Texts that lie beside labels and are none.
_NO_LABELS = frozenset({*_CLASS_FILES, "readme.txt", "notes.txt", "labels.txt"})
_DEEPEST_YAML = 20
_MOST_YAML_VALUES = 100_000


@dataclass
class YoloSource:
    """A YOLO data set.

    A YAML names the classes (`names`, a list or a mapping from 0) and each split (`train`, `val`, `test`):
    a folder of images, a text file that lists images, or a list of those; `obj.data` of darknet does the
    same. What they name outside of the root is read where `files` allow it. Without either, `classes.txt` or
    `obj.names` has the classes, and folders or lists named after a part are the splits. The label file of
    `.../images/a.jpg` is `.../labels/a.txt`, or lies beside the image; an empty one says that there are no
    objects, a missing one is reported.

    Attributes:
        root: the folder that holds the YAML.
        file: the YAML, `obj.data` or list of class names.
        files: of the data set.
    """

    root: Path
    file: Path
    files: Files
    _config: dict[str, Any] | None = field(default=None, repr=False)
    _folders: dict[Path, list[dict[str, Path]]] = field(default_factory=dict, repr=False)
    _listed: dict[str, list[Path | Defect]] = field(default_factory=dict, repr=False)

    @classmethod
    def find(cls, files: Files, only: Path | None = None) -> YoloSource | None:
        """Return the YOLO data set in `files`, None where there is none; `only` names the file to go by.

        Raises:
            ConfigError: several files could describe it.
        """
        if only is not None:
            return cls(files.root, only, files)
        yamls = sorted(files.of(".yaml", ".yml"), key=lambda file: len(file.parts))
        usual = [file for file in yamls if file.stem.lower() in ("data", "dataset")]
        for group in (usual, [file for file in yamls if _is_data_yaml(file)], files.named("obj.data")):
            nearest = [file for file in group if len(file.parts) == len(group[0].parts)]
            if len({file.parent for file in nearest}) == 1 and group is usual:
                nearest = nearest[:1]  # data.yaml before dataset.yaml
            if len(nearest) > 1:
                names = ", ".join(file.relative_to(files.root).as_posix() for file in nearest)
                raise ConfigError(
                    f"{files.root}: must have one file with splits and classes, has {names}. Name one."
                )
            if nearest:
                return cls(nearest[0].parent, nearest[0], files)
        found = files.named(*_CLASS_FILES)
        if found and any(path.name.lower() not in _NO_LABELS for path in files.of(".txt")):
            return cls(files.root, found[0], files)
        return None

    def splits(self) -> tuple[str, ...]:
        """Return the split names in the order of the YAML: the keys that name a part and hold something.

        Raises:
            DataError: the YAML is broken.
        """
        splits = tuple(k for k, value in self._load().items() if value and (role_of(k) or k == WHOLE))
        if not splits:
            raise DataError(
                f"{self.file}: must say where images are under 'train', 'val' or 'test', says nothing."
            )
        return splits

    def class_names(self, report: Report) -> tuple[str, ...]:
        """Return the class names by their numbers."""
        return tuple(self._load()["names"])

    def place(self, split: str) -> str:
        """Return what the YAML names as one split."""
        return f"{self.file}: {short(self._load()[split])}"

    def paths(self, split: str) -> list[Path]:
        """Return the images of one split, as far as its entries are found."""
        try:
            return [path for path in self._images(split) if isinstance(path, Path)]
        except DataError:
            return []  # reported where the split is read

    def read(self, split: str, report: Report) -> list[LabelledImage]:
        """Return the images of one split, sorted by path, or in the order of its text file.

        Reported are missing images, images without a label file, label files without an image, rows that
        are no labels, and what lies outside of the root and must not be read.
        """
        try:
            paths = self._images(split)
        except DataError as error:
            kind = "foreign" if isinstance(error, OutsideError) else "split"
            report(Defect(kind, self.file, str(error)))
            return []
        names = self.class_names(report)
        images, unlabelled, used = [], [], set()
        for path in paths:
            if isinstance(path, Defect):
                report(path)
                continue
            file = self._label_file(path)
            objects: list[LabelledObject] = []
            faults = []
            if file is None:
                unlabelled.append(path)
            else:
                used.add(file)
                try:
                    rows = read_lines(file)
                except DataError as error:
                    report(Defect("labels", file, str(error)))
                    continue
                for number, row in rows:
                    try:
                        objects.append(self._object(row, names, f"line {number}"))
                    except ValueError as error:
                        faults.append(Defect("malformed", file, f"{file}: line {number} must {error}"))
            images.append(LabelledImage(path, file or path, None, tuple(objects), tuple(faults)))
        if unlabelled and not used:
            message = (
                f"{unlabelled[0].parent}: none of the {len(unlabelled)} images of split {split!r} has a "
                f"label file, neither beside it nor in labels/ in place of images/. An empty one says that "
                f"there is no object."
            )
            report(Defect("no-labels", unlabelled[0].parent, message))
            return []
        for path in unlabelled:
            message = f"{path}: has no label file and counts as an image without objects."
            report(Defect("unlabelled", path, message))
        known = {self._label_file(path) for one in self.splits() for path in self.paths(one)}
        for file in [file for folder in sorted({file.parent for file in used}) for file in folder.iterdir()]:
            if _may_be_label(file) and file not in known and not self.files.images_of(file):
                report(Defect("orphan", file, f"{file}: is a label file, there is no image of its name."))
        return images

    def _load(self) -> dict[str, Any]:
        if self._config is None:
            suffix = self.file.suffix.lower()
            if suffix in (".yaml", ".yml"):
                self._config = _read_yaml(self.file)
            elif suffix == ".data":
                self._config = self._read_darknet()
            else:
                self._config = self._read_folders()
        return self._config

    def _read_darknet(self) -> dict[str, Any]:
        """Read `obj.data`: lines `train = list.txt`, `valid = ...`, `names = obj.names`."""
        pairs = [line.partition("=") for _, line in read_lines(self.file) if not line.startswith("#")]
        config: dict[str, Any] = {key.strip(): value.strip() for key, _, value in pairs}
        names = self._place(str(config.get("names", "obj.names")))
        if names is None or not names.is_file():
            raise DataError(
                f"{self.file}: must name the file of class names as 'names = obj.names', which exists."
            )
        return config | {"names": [line for _, line in read_lines(names)], "path": ""}

    def _read_folders(self) -> dict[str, Any]:
        """Take the classes from a list and the splits from lists or folders named after a part."""
        names, *others = ([line for _, line in read_lines(file)] for file in self.files.named(*_CLASS_FILES))
        if any(other != names for other in others):
            raise DataError(
                f"{self.root}: must have one list of classes, has several that differ. Remove one."
            )
        lists = {
            file.stem: file.name
            for file in self.files.of(".txt")
            if file.parent == self.root and role_of(file.stem)
        }
        for path in () if lists else self.files.images:
            self._listed.setdefault(role_among(self.files.folders_of(path)) or WHOLE, []).append(path)
        return {"names": names, **(lists or dict.fromkeys(self._listed, "."))}

    def _images(self, split: str) -> list[Path | Defect]:
        """Return the image files of one split, and what is wrong where an image cannot be had."""
        if split not in self._listed:
            entries = self._load()[split]
            paths: list[Path | Defect] = []
            for entry in entries if isinstance(entries, list) else [entries]:
                paths += self._named(entry)
            self._listed[split] = paths
        return self._listed[split]

    def _named(self, entry: str) -> list[Path | Defect]:
        """Return the images that one entry of the YAML names."""
        found = self._place(entry)
        if found is None:
            raise DataError(
                f"{self.file}: names {short(entry)}, there is no such folder or file. Where it is a path of "
                f"another machine, name it from the folder of {self.file.name} on."
            )
        if found.is_dir():
            inside = [path for path in self.files.images if found in path.parents]
            return [*(inside or Files.walk(found, allow_outside=self.files.allow_outside).images)]
        if is_image(found):
            return [found]
        return [self._listed_image(found, line) for _, line in read_lines(found)]

    def _listed_image(self, file: Path, line: str) -> Path | Defect:
        """Return the image of a line of a list."""
        places = self.files.places(line, file.parent, self._base(), self.root)
        found = [place for place in places if self.files.may_read(place)][:1]
        found = found or self.files.image_named(line, by=file)
        if len(found) == 1:
            return found[0]
        if places:
            return Defect("image", file, str(self.files.refusal(line, places[0], by=file)))
        there = f"there are {len(found)} images of this name" if found else "there is no such image file"
        return Defect("image", file, f"{file}: names {short(line)}, {there}.")

    def _base(self) -> Path:
        return self.root / str(self._load().get("path") or ".").replace("\\", "/")

    def _place(self, entry: str) -> Path | None:
        """Return the folder or file that an entry names, below the root or, where that is allowed, outside.

        Archives name folders of another machine, or one folder too high (`../train/images`). Leading folders
        are left out until something is found, but never the last that is named after a part.

        Raises:
            OutsideError: it is outside alone, and that is not allowed.
        """
        parts = name_parts(entry)
        last = max((k for k, part in enumerate(parts) if role_of(Path(part).stem)), default=len(parts) - 1)
        places = self.files.places
        tails = ["/".join(parts[k:]) for k in range(last + 1)]
        higher = tails[:1] if entry.startswith(("../", "..\\")) else []
        base = self._base() if self._config is not None else self.root
        candidates = [place for tail in higher for place in places(tail, self.root)]
        candidates += places(entry, base, self.root)
        candidates += [place for tail in tails for place in places(tail, self.root)]
        found = next((place for place in candidates if self.files.may_read(place)), None)
        if found is None and candidates:
            raise self.files.refusal(entry, candidates[0], by=self.file)
        return found

    def _label_file(self, image: Path) -> Path | None:
        folder = image.parent
        if folder not in self._folders:
            places = _label_folders(folder, self.files.root)
            self._folders[folder] = [self._labels_in(place) for place in places if self.files.may_read(place)]
        stems = image.stem, image.stem.lower()
        return next((found[s] for s in stems for found in self._folders[folder] if s in found), None)

    def _labels_in(self, folder: Path) -> dict[str, Path]:
        """Return the label files of a folder by stem; in lower case as well, where that is no other's."""
        texts = [folder / name for name in _names_in(folder) if name.lower().endswith(".txt")]
        files = {file.stem: file for file in texts if not file.is_symlink() or self.files.may_read(file)}
        return {stem.lower(): file for stem, file in files.items()} | files

    def _object(self, row: str, names: Sequence[str], place: str) -> LabelledObject:
        """Read one row; raise ValueError with what it must do instead."""
        try:
            first, *values = (parse_number(value) for value in row.split())
        except ValueError as error:
            raise ValueError(f"hold numbers, got {short(row)}.") from error
        n_pose = self._load().get("kpt_shape")
        if len(values) == 4 or (n_pose is not None and len(values) == 4 + n_pose):
            cx, cy, w, h = values[:4]
            corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        elif n_pose is None and len(values) >= 6 and len(values) % 2 == 0:
            xs, ys = values[0::2], values[1::2]
            corners = (min(xs), min(ys), max(xs), max(ys))
        else:
            pose = (
                f", and {n_pose} of key points" if n_pose is not None else " or 3 or more points of a polygon"
            )
            raise ValueError(f"hold a class and 4 numbers of a box{pose}, got {len(values) + 1} numbers.")
        known = first.is_integer() and 0 <= first < len(names)
        written = row if len(row) <= 60 else row[:57] + "..."
        name = names[int(first)] if known else f"class {first:g}"
        return LabelledObject(name, corners, written, place, relative=True, turned=len(values) == 8)


def _may_be_label(file: Path) -> bool:
    return (
        file.suffix.lower() == ".txt"
        and not file.name.startswith(".")
        and file.name.lower() not in _NO_LABELS
        and role_of(file.stem) is None
    )


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):  # not there, no folder, or no possible name
        return []


def _label_folders(images: Path, root: Path) -> list[Path]:
    """Return where labels of the images in a folder may lie: in place of an images folder, in it, beside."""
    parts = images.parts
    found: list[Path] = []
    least = len(root.parts) if root in (images, *images.parents) else 1
    instead = [
        place for place in range(len(parts) - 1, least - 1, -1) if parts[place].lower() in IMAGE_FOLDERS
    ]
    # In place of images/, else for train/a.jpg also labels/train/a.txt and train/labels/a.txt.
    for place, rest in [(k, k + 1) for k in instead] + [(k, k) for k in range(least, len(parts) + 1)]:
        above = Path(*parts[:place])
        found += [above.joinpath(n, *parts[rest:]) for n in _names_in(above) if n.lower() in LABEL_FOLDERS]
    return [*dict.fromkeys(found), images]


def _is_data_yaml(file: Path) -> bool:
    try:
        return "names" in _plain_yaml(file)
    except DataError:
        return False


def _plain_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML as mappings, lists and texts: nothing is converted, so `no` is a name and no bool.

    Raises:
        DataError: no YAML, a key twice, or nested or repeated beyond any data set.
    """
    text = read_text(file)
    deep = 0
    for bracket in re.findall(r"[\[{\]}]", text):
        deep += 1 if bracket in "[{" else -1
        if deep > _DEEPEST_YAML:
            raise DataError(f"{file}: must not nest lists more than {_DEEPEST_YAML} deep.")
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise DataError(f"{file}: must be YAML, got a syntax error{where}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: must be YAML, got what none can be ({type(error).__name__}).") from error
    n_values = 0

    def value_of(one: yaml.Node, depth: int) -> Any:
        nonlocal n_values
        n_values += 1
        if depth > _DEEPEST_YAML or n_values > _MOST_YAML_VALUES:
            raise DataError(
                f"{file}: must be the description of a data set, is nested or repeated too often."
            )
        if isinstance(one, yaml.SequenceNode):
            return [value_of(item, depth + 1) for item in one.value]
        if not isinstance(one, yaml.MappingNode):
            return "" if one.value in ("~", "null") else str(one.value)
        values: dict[str, Any] = {}
        for key, value in one.value:
            name = str(value_of(key, depth + 1))
            if name in values:
                raise DataError(f"{file}: must have each key once, got {short(name)} twice.")
            values[name] = value_of(value, depth + 1)
        return values

    content = value_of(node, 0) if node is not None else {}
    return content if isinstance(content, dict) else {}


def _read_yaml(file: Path) -> dict[str, Any]:
    config = _plain_yaml(file)
    names = config.get("names")
    if not isinstance(names, list | dict) or not names:
        raise DataError(f"{file}: must have the class names under 'names', a list or a mapping from 0.")
    if isinstance(names, Mapping):
        numbered = {str(number): names.get(str(number)) for number in range(len(names))}
        if set(numbered) != set(names):
            keys = ", ".join(map(short, list(names)[:8]))
            raise DataError(f"{file}: 'names' must number the classes 0 to {len(names) - 1}, got {keys}.")
        names = list(numbered.values())
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"{file}: 'names' must be texts, got {short(names)}.")
    if str(config.get("nc", len(names))) != str(len(names)):
        raise DataError(
            f"{file}: must name as many classes as nc says, got {len(names)} and nc {short(config['nc'])}."
        )
    for key, value in config.items():
        entries = value if isinstance(value, list) else [value]
        if role_of(key) and not all(isinstance(entry, str) for entry in entries):
            raise DataError(f"{file}: {key!r} must name folders or lists of images, got {short(value)}.")
    if not isinstance(config.get("path", ""), str):
        raise DataError(f"{file}: 'path' must name a folder, got {short(config['path'])}.")
    if "kpt_shape" in config:
        shape = config["kpt_shape"]
        try:
            n, each = (int(parse_number(value)) for value in shape)
        except (TypeError, ValueError) as error:
            raise DataError(f"{file}: 'kpt_shape' must be two numbers, got {short(shape)}.") from error
        config["kpt_shape"] = n * each
    return config | {"names": [name.strip() for name in names]}
