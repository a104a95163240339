"""From a folder to data sets: which format it has, which splits, and who plays train, val and test."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from rcnn_svm.datasets.coco import CocoSource
from rcnn_svm.datasets.drawing import classes_to_train, draw_parts
from rcnn_svm.datasets.records import (
    BOX_DEFECTS,
    Collector,
    LabelledImage,
    Report,
    Source,
    build,
    strict,
)
from rcnn_svm.datasets.voc import VocSource
from rcnn_svm.datasets.yolo import YoloSource
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.structures import Dataset

__all__ = [
    "FORMATS",
    "Chooser",
    "Classes",
    "Format",
    "Splits",
    "dataset_name",
    "detect_format",
    "find_split",
    "list_splits",
    "load_chosen",
    "load_dataset",
    "load_splits",
    "open_source",
    "read_classes",
]

Format: TypeAlias = Literal["voc", "coco", "yolo"]
FORMATS: tuple[Format, ...] = ("voc", "coco", "yolo")

Classes: TypeAlias = Sequence[str] | Path | str | None
"""Class names in the order of their labels, a text file with one name a line, or None for the data's own."""

Chooser: TypeAlias = Callable[[Mapping[str, Sequence[LabelledImage]]], Sequence[LabelledImage]]
"""From the images of each split, as their label files state them, to those that are wanted."""

# The names that people give to the parts; a year may follow.
_ROLES = {
    "train": re.compile(r"train(ing)?\d*"),
    "val": re.compile(r"(val|valid|validation)\d*"),
    "trainval": re.compile(r"trainval\d*"),
    "test": re.compile(r"test(ing)?\d*"),
}
_FINDERS: dict[Format, Callable[[Path], Source | None]] = {
    "voc": VocSource.find,
    "coco": CocoSource.find,
    "yolo": YoloSource.find,
}
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
        kept = classes_to_train(self.train)
        lost = [name for name in classes_to_train(before) if name not in kept]
        if not lost:
            return self
        words = "this class is" if len(lost) == 1 else "these classes are"
        note = (
            f"The draw of {len(self.train)} from {len(before)} images for train has no object of "
            f"{', '.join(lost)}, though the data have: {words} left out, a larger draw keeps more."
        )
        rest = [name for name in self.train.classes if name not in lost]
        return replace(self.with_classes(rest), notes=(*self.notes, note))


def detect_format(path: str | Path) -> Format:
    """Return the format of the data set in `path`.

    VOC has a folder `Annotations` (in `path` or one or two levels below), COCO has
    `annotations/*.json` or `SPLIT/_annotations.coco.json`, YOLO has a YAML file (or is named by it).

    Raises:
        DataError: `path` does not exist or holds none of the three.
        ConfigError: `path` holds several VOC folders.
    """
    return _find(Path(path), None)[0]


def list_splits(path: str | Path, *, format: str | None = None) -> tuple[str, ...]:
    """Return the names of the splits of a data set, as its files name them.

    Raises:
        DataError: as `detect_format`, or the file that names the splits is broken.
        ConfigError: an unknown `format`.
    """
    return open_source(path, format).splits()


def load_dataset(
    path: str | Path,
    split: str,
    *,
    format: str | None = None,
    classes: Classes = None,
    drop_bad_boxes: bool = False,
) -> Dataset:
    """Read the labels of one split; pixels are read when a sample is asked for them.

    Args:
        path: the folder, or YOLO's YAML file.
        split: a name of `list_splits`, or `train`, `val`, `trainval`, `test` where one split plays that
            part (`train` finds `train2017`).
        format: `voc`, `coco` or `yolo`; None detects it.
        classes: the class list; None takes the data's own, which is the same for all its splits.
        drop_bad_boxes: leave out boxes of no area, boxes that reach out of their image by more than one
            pixel and objects of unknown classes, and say so in one line. Up to one pixel is clipped.

    Raises:
        DataError: something is missing or broken, a box is bad, or the split has no image.
        ConfigError: no such split, an unknown format, or a bad class list.
    """
    source = open_source(path, format)
    collector = Collector(BOX_DEFECTS) if drop_bad_boxes else None
    names = _class_names(source, classes)
    dataset = _load(source, Path(path), _resolve(source, split), names, collector or strict)
    if collector:
        collector.say_summary()
    return dataset


def load_chosen(
    path: str | Path,
    name: str,
    choose: Chooser,
    *,
    format: str | None = None,
    drop_bad_boxes: bool = False,
) -> Dataset:
    """Read the labels of chosen images, whatever splits they are of.

    The boxes of all other images are not judged.

    Args:
        path: as in `load_dataset`.
        name: of the new split.
        choose: is given all images by split and returns those to read.
        format: as in `load_dataset`.
        drop_bad_boxes: as in `load_dataset`.

    Returns:
        The images with the data's own classes; empty where none was chosen.

    Raises:
        DataError: a label file of any split is broken, a box of a chosen image is bad, or an id comes twice.
        ConfigError: an unknown format.
    """
    source = open_source(path, format)
    collector = Collector(BOX_DEFECTS) if drop_bad_boxes else None
    report = collector or strict
    images = choose({split: source.read(split, report) for split in source.splits()})
    dataset = build(dataset_name(Path(path)), name, _class_names(source, None), images, report)
    if collector:
        collector.say_summary()
    return dataset


def load_splits(
    path: str | Path,
    *,
    format: str | None = None,
    classes: Classes = None,
    drop_bad_boxes: bool = False,
    seed: int = 0,
    max_images: int | None = None,
) -> Splits:
    """Read a whole data set as train, val, trainval and test.

    Splits that are given are used as given. What is missing is made, and noted:

    * no trainval: train and val together;
    * no test, but val: val becomes the test set and a seeded fifth of train the validation set;
    * no val: a seeded fifth of the training images;
    * a single split: seeded 60 % train, 20 % val, 20 % test.

    A draw keeps an object of every class in train where it can, then in test, then in val. Where train is
    too small for all, the classes that it has no object of are left out and noted.

    Args:
        path: the folder, or YOLO's YAML file.
        format: as in `load_dataset`.
        classes: as in `load_dataset`.
        drop_bad_boxes: as in `load_dataset`.
        seed: of all draws.
        max_images: at most so many images of train, val and test each, drawn likewise; for a quick look.

    Raises:
        DataError: as `load_dataset`; or the splits are none that the rules above cover.
        ConfigError: as `load_dataset`, or `max_images` is below 1.
    """
    if max_images is not None and max_images < 1:
        raise ConfigError(f"load_splits: max_images must be at least 1, got {max_images}.")
    source = open_source(path, format)
    collector = Collector(BOX_DEFECTS) if drop_bad_boxes else None
    names = _class_names(source, classes)
    parts = {
        role: _load(source, Path(path), given, names, collector or strict)
        for role, given in _roles(source).items()
    }
    if collector:
        collector.say_summary()
    splits = _complete(parts, seed, str(path))
    return splits if max_images is None else _limit(splits, max_images, seed)


def open_source(path: str | Path, format: str | None = None) -> Source:
    """Return the data set in `path`, its files found but not read.

    Raises:
        DataError: there is no data set of this or any format.
        ConfigError: an unknown `format`.
    """
    return _find(Path(path), format)[1]


def read_classes(classes: Sequence[str] | Path | str) -> tuple[str, ...]:
    """Return a class list given as names or as a text file with one name a line.

    Raises:
        ConfigError: the list is empty or names a class twice.
        DataError: the file cannot be read.
    """
    if isinstance(classes, str | Path):
        where = str(classes)
        try:
            lines = Path(classes).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{classes}: must be a text file with one class name a line ({error})."
            ) from error
        names = [line.strip() for line in lines if line.strip()]
    else:
        where, names = "classes", list(classes)
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"{where}: must name one or more classes, each once, got {names}.")
    return tuple(names)


def _find(path: Path, format: str | None) -> tuple[Format, Source]:
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder.")
    for name in FORMATS:
        if format in (None, name):
            source = _FINDERS[name](path)
            if source is not None:
                return name, source
    what = {
        None: "a data set with VOC's Annotations/*.xml, COCO's annotations/*.json or YOLO's data.yaml",
        "voc": "a VOC data set with Annotations/*.xml",
        "coco": "a COCO data set with annotations/instances_SPLIT.json or SPLIT/_annotations.coco.json",
        "yolo": "a YOLO data set with data.yaml",
    }[format]
    raise DataError(f"{path}: must be {what}, found none of it.")


def _class_names(source: Source, classes: Classes) -> tuple[str, ...]:
    names = source.class_names(strict) if classes is None else read_classes(classes)
    if not names:
        raise DataError(f"{source.root}: must label at least one object, no class was found.")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{source.root}: must name each class once, got {twice!r} twice.")
    return names


def dataset_name(path: Path) -> str:
    """Return what to call a data set: its folder, skipping VOC's standard ones."""
    folders = [part.name for part in (path.resolve(), *path.resolve().parents) if not part.suffix]
    return next((name for name in folders if name and not re.fullmatch(r"VOC\d*|VOCdevkit", name)), "data")


def _load(source: Source, path: Path, split: str, classes: tuple[str, ...], report: Report) -> Dataset:
    dataset = build(dataset_name(path), split, classes, source.read(split, report), report)
    if not dataset:
        raise DataError(
            f"{source.root}: split {split!r} has no image. Add images to it or name another split."
        )
    return dataset


def _roles(source: Source) -> dict[str, str]:
    """Return the split that plays each part, for the parts that are given."""
    splits = source.splits()
    roles = {}
    for role, pattern in _ROLES.items():
        named = [split for split in splits if pattern.fullmatch(split)]
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


def find_split(splits: Sequence[str], name: str) -> str | None:
    """Return which of `splits` the name means: the one of this name, or the only one that plays this part.

    None where there is none.
    """
    if name in splits:
        return name
    named = [split for split in splits if name in _ROLES and _ROLES[name].fullmatch(split)]
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
            raise DataError(f"{where}: must have 3 or more images to be split in three, got {len(whole)}.")
        n_test = _share(len(whole), _TEST_SHARE)
        n_val = _share(len(whole) - n_test, _VAL_SHARE / (1 - _TEST_SHARE))
        train, test, val = draw_parts(whole, [len(whole) - n_test - n_val, n_test, n_val], rng)
        drawn_from = whole
        parts = {"train": train, "val": val, "trainval": _without(whole, test), "test": test}
        notes.append(
            f"Only one split is given ({whole.split}): it was divided with seed {seed} into {len(train)} "
            f"images for train, {len(val)} for val and {len(test)} for test."
        )
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
        if len(whole) < 2:
            raise DataError(f"{where}: must have 2 or more training images to set some aside for validation.")
        n_val = _share(len(whole), _VAL_SHARE)
        parts["train"], parts["val"] = draw_parts(whole, [len(whole) - n_val, n_val], rng)
        parts["trainval"] = drawn_from = whole
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
