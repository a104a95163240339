"""From a folder to data sets: which format it has, which splits, and who plays train, val and test."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np

from rcnn_svm.datasets.archive import unpack
from rcnn_svm.datasets.coco import CocoSource, is_label_studio
from rcnn_svm.datasets.drawing import classes_to_train, draw_parts
from rcnn_svm.datasets.folders import FolderSource
from rcnn_svm.datasets.layout import ROLES, Files, image_ids, read_lines, role_of
from rcnn_svm.datasets.listing import TABLE_SUFFIXES, ListSource
from rcnn_svm.datasets.records import (
    BOX_DEFECTS,
    FILE_DEFECTS,
    WARNINGS,
    Collector,
    Defect,
    LabelledImage,
    Report,
    Source,
    build,
)
from rcnn_svm.datasets.voc import VocSource
from rcnn_svm.datasets.yolo import YoloSource
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.progress import say
from rcnn_svm.structures import Dataset, Sample

__all__ = [
    "FORMATS",
    "Chooser",
    "Classes",
    "Format",
    "Splits",
    "dataset_name",
    "detect_format",
    "distinct_splits",
    "divide",
    "find_split",
    "holds_dataset",
    "labels_whole_images",
    "list_splits",
    "load_all_splits",
    "load_chosen",
    "load_dataset",
    "load_splits",
    "open_source",
    "read_classes",
]

Format: TypeAlias = Literal["voc", "coco", "yolo", "csv", "folders"]
FORMATS: tuple[Format, ...] = get_args(Format)
"""Those of boxes, then those of whole images: a CSV of images and classes, a folder of images per class."""
_WHOLE: frozenset[Format] = frozenset({"csv", "folders"})

Classes: TypeAlias = Sequence[str] | Path | str | None
"""Class names in the order of their labels, a text file with one name a line, or None for the data's own."""

Chooser: TypeAlias = Callable[[Mapping[str, Sequence[LabelledImage]]], Sequence[LabelledImage]]
"""From the images of each split, as their label files state them, to those that are wanted."""

_VAL_SHARE = 0.2  # of training images, where a validation split has to be made
_TEST_SHARE = 0.2
_NOTHING = Dataset("", "", (), ())


@dataclass(frozen=True, eq=False)
class Splits:
    """The parts of a data set as experiments use them.

    Attributes:
        train: settings are tried by training on this,
        val: and measuring on this.
        trainval: the final training; train and val together.
        test: looked at once.
        notes: sentences on what was not as given, for reports; empty where all was.
    """

    train: Dataset
    val: Dataset
    trainval: Dataset
    test: Dataset
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether labels are of whole images, see `Dataset`."""
        return self.train.whole

    def as_whole_images(self) -> Splits:
        """Return the same images labelled as a whole, see `Dataset.as_whole_images`."""
        parts = (self.train, self.val, self.trainval, self.test)
        train, val, trainval, test = (part.as_whole_images() for part in parts)
        return Splits(train, val, trainval, test, self.notes)

    def with_classes(self, names: Sequence[str]) -> Splits:
        """Return the same images with the objects of the classes `names` alone, labelled in their order."""
        parts = (self.train, self.val, self.trainval, self.test)
        train, val, trainval, test = (part.with_classes(names) for part in parts)
        return Splits(train, val, trainval, test, self.notes)

    def without_lost_classes(self, before: Dataset) -> Splits:
        """Leave out, and note, the classes that the draw of `train` has lost.

        Args:
            before: what `train` was drawn from; has an object to train on of each of these classes.
        """
        lost = _lost(before, self.train)
        if not lost:
            return self
        words = "this class is" if len(lost) == 1 else "these classes are"
        note = (
            f"The draw of {len(self.train)} from {len(before)} images for train has no object of "
            f"{', '.join(lost)}, though the data have: {words} left out, a larger draw keeps more."
        )
        rest = [name for name in self.train.classes if name not in lost]
        return replace(self.with_classes(rest), notes=(*self.notes, note))


def detect_format(path: str | Path, *, allow_outside: bool = False) -> Format:
    """Return the format of the data set in `path`.

    VOC has XMLs of annotations, COCO has JSONs with images and categories, YOLO has a YAML file with class
    names, an `obj.data` or a `classes.txt`; else a CSV may name images and their classes, or each class be a
    folder of images. It is the first of them that is found, in this order.

    Args:
        path: of it.
        allow_outside: as in `load_dataset`.

    Raises:
        DataError: `path` does not exist or holds none of them.
        ConfigError: `path` holds several VOC folders.
    """
    return open_source(path, allow_outside=allow_outside).format


def holds_dataset(path: str | Path, *, allow_outside: bool = False) -> bool:
    """Tell whether `path` is a data set with boxes, broken or not, and no file or folder of images.

    Args:
        path: of it.
        allow_outside: as in `load_dataset`.

    Raises:
        ConfigError: as `detect_format`.
    """
    try:
        return not open_source(path, allow_outside=allow_outside).whole
    except _NoDataset:
        return False


def labels_whole_images(path: str | Path, *, format: str | None = None) -> bool:
    """Tell whether a data set labels whole images and has no boxes.

    Raises:
        DataError: as `detect_format`.
        ConfigError: as `detect_format`, or an unknown `format`.
    """
    return open_source(path, format).whole


def list_splits(
    path: str | Path, *, format: str | None = None, allow_outside: bool = False
) -> tuple[str, ...]:
    """Return the names of the splits of a data set, as its files name them.

    Args:
        path: of it.
        format: as in `load_dataset`.
        allow_outside: as in `load_dataset`.

    Raises:
        DataError: as `detect_format`, or the file that names the splits is broken.
        ConfigError: an unknown `format`.
    """
    return open_source(path, format, allow_outside=allow_outside).source.splits()


def load_dataset(
    path: str | Path,
    split: str,
    *,
    format: str | None = None,
    classes: Classes = None,
    drop_bad_boxes: bool = False,
    skip_bad: bool = False,
    allow_outside: bool = False,
) -> Dataset:
    """Read the labels of one split; pixels are read when a sample is asked for them.

    What is worth a word and stops nothing, such as rows that come twice, is said in one line of its kind.

    Args:
        path: the folder, its zip archive, or the one JSON, YAML, `obj.data` or CSV to go by.
        split: a name of `list_splits`, or `train`, `val`, `trainval`, `test` where one split plays that
            part (`train` finds `train2017`).
        format: of `FORMATS`; None detects it.
        classes: the class list; None takes the data's own, which is the same for all its splits. Objects of
            other classes of the data are left out and counted.
        drop_bad_boxes: leave out boxes of no area, boxes that reach out of their image by more than one
            pixel, objects that cannot be read or are of unknown classes, and say so in one line. Up to one
            pixel is clipped.
        skip_bad: leave out images that are missing or damaged or whose label file is, and say so in one line.
            All pixels are decoded for it.
        allow_outside: read what lies outside of the data set's folder where its files name it or a link leads
            there. Otherwise that is an error, of an image one that `skip_bad` leaves out, and links are not
            followed. A file of that name inside is used in any case.

    Raises:
        DataError: something is missing or broken, a box is bad, or the split has no image.
        ConfigError: no such split, an unknown format, or a bad class list.
    """
    opened = open_source(path, format, allow_outside=allow_outside)
    collector = _collector(drop_bad_boxes, skip_bad)
    opened.class_names(classes, collector)
    dataset = opened.load(_resolve(opened.source, split), collector, decode=skip_bad)
    collector.say_summary()
    if not dataset:
        raise _no_image(opened.source, split)
    return dataset


def load_chosen(
    path: str | Path,
    name: str,
    choose: Chooser,
    *,
    format: str | None = None,
    drop_bad_boxes: bool = False,
    allow_outside: bool = False,
) -> Dataset:
    """Read the labels of chosen images, whatever splits they are of.

    The boxes of all other images are not judged.

    Args:
        path: as in `load_dataset`.
        name: of the new split.
        choose: is given all images by split and returns those to read.
        format: as in `load_dataset`.
        drop_bad_boxes: as in `load_dataset`.
        allow_outside: as in `load_dataset`.

    Returns:
        The images with the data's own classes; empty where none was chosen.

    Raises:
        DataError: a label file of any split is broken, a box of a chosen image is bad, or an id comes twice.
        ConfigError: an unknown format.
    """
    opened = open_source(path, format, allow_outside=allow_outside)
    collector = _collector(drop_bad_boxes, skip_bad=False)
    opened.class_names(None, collector)
    listed = {}
    for split in opened.source.splits():
        try:
            listed[split] = opened.images(split, collector)
        except _MissingSplit as error:
            say(f"The split {split} is not read. {error}")
    dataset = opened.build(name, choose(listed), collector)
    collector.say_summary()
    return dataset


def load_all_splits(
    path: str | Path,
    *,
    format: str | None = None,
    classes: Classes = None,
    drop_bad_boxes: bool = False,
    skip_bad: bool = False,
    allow_outside: bool = False,
) -> dict[str, Dataset]:
    """Read every split of a data set, by the name that its files give it.

    A split without an image is left out, and so is one that only joins others, as trainval does.

    Args:
        path: as in `load_dataset`.
        format: as in `load_dataset`.
        classes: as in `load_dataset`.
        drop_bad_boxes: as in `load_dataset`.
        skip_bad: as in `load_dataset`.
        allow_outside: as in `load_dataset`.

    Raises:
        DataError: as `load_dataset`; or no split has an image.
        ConfigError: an unknown format, or a bad class list.
    """
    opened = open_source(path, format, allow_outside=allow_outside)
    collector = _collector(drop_bad_boxes, skip_bad)
    opened.class_names(classes, collector)
    parts = [opened.load(split, collector, decode=skip_bad) for split in opened.source.splits()]
    collector.say_summary()
    if not any(parts):
        raise DataError(f"{opened.source.root}: must hold an image in some split, has none.")
    return {part.split: part for part in distinct_splits([part for part in parts if part])}


def distinct_splits(parts: Sequence[Dataset]) -> list[Dataset]:
    """Return the splits without those that only join others, as trainval does."""
    ids = [{sample.path for sample in part} for part in parts]
    joins = [
        any(ids[i] > other for other in ids if other)
        and ids[i] == set().union(*(other for other in ids if other < ids[i]))
        for i in range(len(parts))
    ]
    return [part for part, join in zip(parts, joins, strict=True) if not join]


def load_splits(
    path: str | Path,
    *,
    format: str | None = None,
    classes: Classes = None,
    drop_bad_boxes: bool = False,
    skip_bad: bool = False,
    allow_outside: bool = False,
    seed: int = 0,
    max_images: int | None = None,
) -> Splits:
    """Read a whole data set as train, val, trainval and test.

    Splits that are given are used as given. What is missing is made, and noted:

    * no trainval: train and val together;
    * no test, but val: val becomes the test set and a seeded fifth of train the validation set;
    * no val: a seeded fifth of the training images;
    * a single split: seeded 60 % train, 20 % val, 20 % test; of one or two images all play all parts;
    * training images are val as well where there is a single one, or where to set some aside would take all
      objects of a class; what is then decided on held-out images is decided on folds of them.

    A draw keeps an object of every class in train where it can, then in test, then in val. Where what test
    leaves is too small for all, the classes that it has no object of are left out and noted.

    A val or test split without an image counts as not given. Test images that are training images as well,
    and splits that play no part, are noted.

    Args:
        path: as in `load_dataset`.
        format: as in `load_dataset`.
        classes: as in `load_dataset`.
        drop_bad_boxes: as in `load_dataset`.
        skip_bad: as in `load_dataset`.
        allow_outside: as in `load_dataset`.
        seed: of all draws.
        max_images: at most so many images of train, val and test each, drawn likewise; for a quick look.

    Raises:
        DataError: as `load_dataset`; or the splits are none that the rules above cover.
        ConfigError: as `load_dataset`, or `max_images` is below 1.
    """
    if max_images is not None and max_images < 1:
        raise ConfigError(f"load_splits: max_images must be at least 1, got {max_images}.")
    opened = open_source(path, format, allow_outside=allow_outside)
    collector = _collector(drop_bad_boxes, skip_bad)
    opened.class_names(classes, collector)
    roles = _roles(opened.source)
    parts, notes = {}, []
    for role, split in roles.items():
        try:
            part = opened.load(split, collector, decode=skip_bad)
        except _MissingSplit as error:
            if role not in ("val", "test") or len(roles) == 1:
                raise
            notes.append(f"The split {split} is not used. {error}")
            continue
        if part:
            parts[role] = part
        elif role in ("val", "test"):
            place = opened.source.place(split)
            notes.append(f"The split {split} ({place}) has no image and counts as not given.")
        else:
            raise _no_image(opened.source, split)
    unused = [split for split in opened.source.splits() if split not in roles.values()]
    if unused:
        notes.append(
            f"Splits that play no part and are not used: {', '.join(unused)}. Names that do are "
            f"{', '.join(ROLES)} and their like."
        )
    collector.say_summary()
    splits = _complete(parts, seed, str(path))
    splits = splits if max_images is None else _limit(splits, max_images, seed)
    return replace(splits, notes=(*notes, *splits.notes, *_shared(splits)))


def divide(
    dataset: Dataset, *, test: Dataset | None = None, seed: int = 0, max_images: int | None = None
) -> Splits:
    """Divide one data set as `load_splits` divides a single split, or training images beside a test split."""
    parts = {"all": dataset} if test is None else {"trainval": dataset, "test": test}
    splits = _complete(parts, seed, dataset.name)
    return splits if max_images is None else _limit(splits, max_images, seed)


class _NoDataset(DataError):
    """There is no data set of any format."""


class _MissingSplit(DataError):
    """A file that describes a whole split, or the folder of one, is missing or cannot be read."""


@dataclass(eq=False)
class Opened:
    """A data set whose files are found.

    Attributes:
        path: as it was named.
        format: of `FORMATS`.
        source: its reader.
        warnings: what was noticed on the way.
        classes: the names that labels are positions in, once `class_names` was called.
    """

    path: Path
    format: Format
    source: Source
    warnings: tuple[Defect, ...]
    classes: tuple[str, ...] = ()
    _known: tuple[str, ...] = ()
    _ids: Mapping[Path, str] | None = None

    @property
    def whole(self) -> bool:
        """Whether labels are of whole images."""
        return self.format in _WHOLE

    def class_names(self, classes: Classes, report: Report) -> tuple[str, ...]:
        """Return the names of the classes: those that are asked for, else the data's own.

        Raises:
            DataError: the data have none, and nothing to report that explains it; or one twice.
            ConfigError: `classes` is empty or names a class twice.
        """
        for warning in self.warnings:
            report(warning)
        self._known = self.source.class_names(report)
        self.classes = self._known if classes is None else read_classes(classes)
        explained = [] if self.classes else self._all_defects(report)
        if not self.classes and not explained:
            raise DataError(f"{self.source.root}: must label at least one object, no class was found.")
        if len(set(self._known)) != len(self._known):
            twice = next(name for name in self._known if self._known.count(name) > 1)
            raise DataError(f"{self.source.root}: must name each class once, got {twice!r} twice.")
        plain: dict[str, str] = {}
        for name in self._known:
            other = plain.setdefault(" ".join(name.casefold().split()), name)
            if other != name:
                message = (
                    f"{self.source.root}: the classes {other!r} and {name!r} differ in case or spaces only."
                )
                report(Defect("similar", self.source.root, message))
        return self.classes

    def _all_defects(self, report: Report) -> list[Defect]:
        """Report what is wrong with the label files of all splits; return it."""
        collector = Collector()
        for split in self.source.splits():
            self.source.read(split, collector)
        defects = [defect for defect in collector.defects if defect.kind not in WARNINGS]
        for defect in defects:
            report(defect)
        return defects

    def images(self, split: str, report: Report) -> list[LabelledImage]:
        """Return the images of one split as their label files state them, each with an id of its own.

        Raises:
            DataError: what describes the split is missing or broken, and loading would stop there.
        """
        if self._ids is None:
            self._ids = image_ids(path for one in self.source.splits() for path in self.source.paths(one))

        def reported(defect: Defect) -> None:
            if defect.kind == "split" and isinstance(report, Collector) and report.kinds is not None:
                raise _MissingSplit(defect.message)
            report(defect)

        return [replace(one, image_id=self._ids[one.path]) for one in self.source.read(split, reported)]

    def build(
        self, split: str, images: Sequence[LabelledImage], report: Report, *, decode: bool = False
    ) -> Dataset:
        """Judge images and make them a split, which may be empty."""
        name = dataset_name(self.path)
        made = build(name, split, self.classes, images, report, known=self._known, decode=decode)
        return replace(made, whole=self.whole)

    def load(self, split: str, report: Report, *, decode: bool = False) -> Dataset:
        """Return one split, which may be empty."""
        return self.build(split, self.images(split, report), report, decode=decode)


def open_source(path: str | Path, format: str | None = None, *, allow_outside: bool = False) -> Opened:
    """Return the data set in `path`, its files found but not read.

    Args:
        path: of it.
        format: as in `load_dataset`.
        allow_outside: as in `load_dataset`.

    Raises:
        DataError: there is no data set of this or any format.
        ConfigError: an unknown `format`, or several data sets.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    try:
        exists = path.exists()
    except (OSError, ValueError):
        exists = False
    if not exists:
        raise DataError(f"{path}: no such file or folder.")
    only = None
    folder = path
    if path.is_file() and path.suffix.lower() == ".zip":
        folder = unpack(path)
    elif path.is_file():
        only, folder = path, path.parent
        if path.suffix.lower() == ".json" and folder.name.lower() in ("annotations", "labels"):
            folder = folder.parent
    files = Files.walk(folder, allow_outside=allow_outside)
    found: dict[Format, Source | None] = {}
    if only is None:
        if format in (None, "voc"):
            found["voc"] = VocSource.find(files)
        if format in (None, "coco"):
            found["coco"] = CocoSource.find(files)
        if format == "yolo" or (format is None and not any(found.values())):
            found["yolo"] = YoloSource.find(files)
        if format == "csv" or (format is None and not any(found.values())):
            found["csv"] = ListSource.find(files, insist=format == "csv")
        if format == "folders" or (format is None and not any(found.values())):
            found["folders"] = FolderSource.find(files, insist=format == "folders")
    elif only.suffix.lower() == ".json" and format in (None, "coco"):
        found["coco"] = None if is_label_studio(only) else CocoSource.find(files, only)
    elif only.suffix.lower() in (".yaml", ".yml", ".data") and format in (None, "yolo"):
        found["yolo"] = YoloSource.find(files, only)
    elif only.suffix.lower() in TABLE_SUFFIXES and format in (None, "csv"):
        found["csv"] = ListSource.find(files, only)
    sources = {name: source for name, source in found.items() if source is not None}
    if not sources:
        for file in files.of(".json") if only is None else [only]:
            if is_label_studio(file):
                raise _NoDataset(
                    f"{file}: must be labels in a format that is read, is Label Studio's own JSON. Export "
                    f"the project as COCO: of turned boxes and polygons that has the box around them."
                )
        what = {
            None: "a data set with VOC's Annotations/*.xml, COCO's annotations/*.json or YOLO's data.yaml, "
            "or whole images in a folder for each of two or more classes or in a CSV of images and labels",
            "voc": "a VOC data set with Annotations/*.xml",
            "coco": "a COCO data set with annotations/instances_SPLIT.json or SPLIT/_annotations.coco.json",
            "yolo": "a YOLO data set with data.yaml",
            "csv": "a CSV with columns of images and labels, and hold these images",
            "folders": "a folder with a folder of images for each class",
        }[format]
        raise _NoDataset(f"{path}: must be {what}, found none of it.")
    warnings = [
        Defect("link", link, f"{link}: is a link that leads nowhere.")
        if not os.path.exists(link)
        else Defect(
            "link",
            link,
            f"{link}: is a link that leads out of the data set, and is not followed. --allow-outside does.",
        )
        for link in files.links
    ]
    (name, source), *others = sources.items()
    for other, _ in others:
        message = (
            f"{path}: has labels of {name.upper()} and of {other.upper()}, the former are read. "
            f"--format {other} reads the latter."
        )
        warnings.append(Defect("unused", path, message))
    return Opened(path, name, source, tuple(warnings))


def read_classes(classes: Sequence[str] | Path | str) -> tuple[str, ...]:
    """Return a class list given as names or as a text file with one name a line.

    Raises:
        ConfigError: the list is empty, or a name is, or it names a class twice.
        DataError: the file cannot be read.
    """
    if isinstance(classes, str | Path):
        where = str(classes)
        try:
            names = [line for _, line in read_lines(Path(classes))]
        except DataError as error:
            raise DataError(
                f"{classes}: must be a text file with one class name a line ({error})."
            ) from error
    else:
        where, names = "classes", list(classes)
    if not names or not all(names) or len(set(names)) != len(names):
        raise ConfigError(f"{where}: must name one or more classes, each once, got {names}.")
    return tuple(names)


def dataset_name(path: Path) -> str:
    """Return what to call a data set: its archive or folder, skipping VOC's standard ones."""
    if path.suffix.lower() == ".zip":
        return path.stem
    folders = [part.name for part in (path.resolve(), *path.resolve().parents) if not part.suffix]
    return next((name for name in folders if name and not re.fullmatch(r"VOC\d*|VOCdevkit", name)), "data")


def _collector(drop_bad_boxes: bool, skip_bad: bool) -> Collector:
    kinds = WARNINGS | (BOX_DEFECTS if drop_bad_boxes else frozenset())
    return Collector(kinds | (FILE_DEFECTS if skip_bad else frozenset()))


def _no_image(source: Source, split: str) -> DataError:
    return DataError(f"{source.root}: split {split!r} has no image. Add images to it or name another split.")


def _roles(source: Source) -> dict[str, str]:
    """Return the split that plays each part, for the parts that are given."""
    splits = source.splits()
    roles = {}
    for role in ROLES:
        named = [split for split in splits if role_of(split) == role]
        if len(named) > 1 and role not in named:
            raise DataError(f"{source.root}: must have one {role} split, has {', '.join(named)}.")
        if named:
            roles[role] = role if role in named else named[0]
    if not roles:
        if len(splits) != 1:
            found = ", ".join(splits) or "none"
            raise DataError(
                f"{source.root}: must have splits named train, val, test or trainval, found {found}."
            )
        roles["all"] = splits[0]
    return roles


def _shared(splits: Splits) -> list[str]:
    """Say how many test images are images of trainval as well; copies count as well."""
    sizes: dict[int, list[Sample]] = {}
    for sample in splits.trainval:
        if sample.path is not None:
            sizes.setdefault(sample.path.stat().st_size, []).append(sample)
    shared = 0
    for sample in splits.test:
        same = sizes.get(sample.path.stat().st_size, []) if sample.path is not None else []
        shared += any(one.path == sample.path or one.digest() == sample.digest() for one in same)
    if not shared:
        return []
    return [
        f"{shared} of the {len(splits.test)} test images are also images to train or choose on: what is "
        f"measured on them says nothing."
    ]


def find_split(splits: Sequence[str], name: str) -> str | None:
    """Return which of `splits` the name means: the one of this name, or the only one that plays this part.

    None where there is none.
    """
    if name in splits:
        return name
    named = [split for split in splits if name in ROLES and role_of(split) == name]
    return named[0] if len(named) == 1 else None


def _resolve(source: Source, name: str) -> str:
    splits = source.splits()
    split = find_split(splits, name)
    if split is None:
        near = difflib.get_close_matches(name, splits, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Name one that it has, such as {splits[0]!r}."
        raise ConfigError(f"{source.root}: has no split {name!r}, only {', '.join(splits)}. {hint}")
    return split


def _complete(parts: dict[str, Dataset], seed: int, where: str) -> Splits:
    """Make the splits that are missing from those that are given."""
    rng = np.random.default_rng(seed)
    notes = []
    drawn_from = None
    if len(parts) == 1:
        (whole,) = parts.values()
        if len(whole) < 3:
            named = {role: replace(whole, split=role) for role in ("train", "val", "trainval", "test")}
            note = f"Images to be split in three: {len(whole)}, too few to set any aside; all play all parts."
            return Splits(**named, notes=(note,))
        n_test = _share(len(whole), _TEST_SHARE)
        n_val = _share(len(whole) - n_test, _VAL_SHARE / (1 - _TEST_SHARE))
        train, test, val = draw_parts(whole, [len(whole) - n_test - n_val, n_test, n_val], rng)
        drawn_from = whole
        trainval = _without(whole, test)
        parts = {"train": train, "val": val, "trainval": trainval, "test": test}
        notes.append(
            f"Only one split is given ({whole.split}): it was divided with seed {seed} into {len(train)} "
            f"images for train, {len(val)} for val and {len(test)} for test."
        )
        if lost := _lost(trainval, train):
            parts |= {"train": trainval, "val": trainval}
            notes.append(_too_few(trainval, lost))
    if "test" not in parts:
        if "val" not in parts:
            raise DataError(
                f"{where}: must have a test or a val split to measure on, has {', '.join(parts)}."
            )
        test = parts.pop("val")
        parts.setdefault("train", parts.get("trainval", test))
        parts.pop("trainval", None)
        parts["test"] = test
        notes.append(f"There is no test split: the given {test.split} ({len(test)} images) is the test set.")
    if "val" not in parts:
        whole = parts.get("trainval", parts.get("train", _NOTHING))
        if len(whole) == 0:
            raise DataError(f"{where}: must have training images, has {', '.join(parts)}.")
        if len(whole) == 1:
            parts |= {"train": whole, "val": whole, "trainval": whole}
            notes.append("One training image is too few to set some aside: it is val as well.")
    if "val" not in parts:
        n_val = _share(len(whole), _VAL_SHARE)
        parts["train"], parts["val"] = draw_parts(whole, [len(whole) - n_val, n_val], rng)
        parts["trainval"] = whole
        if lost := _lost(whole, parts["train"]):
            parts |= {"train": whole, "val": whole}
            notes.append(_too_few(whole, lost))
        else:
            notes.append(
                f"There is no val split beside it: {len(parts['val'])} of the {len(whole)} images of "
                f"{whole.split} were set aside with seed {seed}."
            )
    if "train" not in parts:
        outside = _without(parts.get("trainval", _NOTHING), parts["val"])
        if not outside:
            raise DataError(f"{where}: must have a train split, has {', '.join(parts)}.")
        parts["train"] = outside
    if "trainval" not in parts:
        parts["trainval"] = _together(parts["train"], parts["val"])
    named = {role: replace(parts[role], split=role) for role in ("train", "val", "trainval", "test")}
    splits = Splits(**named, notes=tuple(notes))
    return splits if drawn_from is None else splits.without_lost_classes(drawn_from)


def _lost(before: Dataset, part: Dataset) -> list[str]:
    """Return the classes that a part drawn from a data set has no object of, though that has."""
    kept = classes_to_train(part)
    return [name for name in classes_to_train(before) if name not in kept]


def _too_few(dataset: Dataset, lost: list[str]) -> str:
    return (
        f"The {len(dataset)} training images are too few to set some aside, which would leave none of "
        f"{', '.join(lost)}: they are val as well."
    )


def _share(n: int, share: float) -> int:
    """Return how many of `n` images, two or more, are a share of them: one at least, and not all."""
    return min(max(round(n * share), 1), n - 1)


def _without(dataset: Dataset, other: Dataset) -> Dataset:
    """Return the images of `dataset` that are not in `other`."""
    out = {sample.image_id for sample in other}
    return replace(dataset, samples=tuple(sample for sample in dataset if sample.image_id not in out))


def _together(train: Dataset, val: Dataset) -> Dataset:
    return replace(train, split="trainval", samples=train.samples + val.samples)


def _limit(splits: Splits, n: int, seed: int) -> Splits:
    """Keep at most `n` images of train, val and test each."""
    rng = np.random.default_rng(seed)
    train, val, test = (
        draw_parts(part, [n], rng)[0] if len(part) > n else part
        for part in (splits.train, splits.val, splits.test)
    )
    note = f"A quick look: at most {n} images of train, val and test each, drawn with seed {seed}."
    small = Splits(train, val, _together(train, val), test, (*splits.notes, note))
    return small.without_lost_classes(splits.train)
