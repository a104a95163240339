"""Whole images, a folder per class: `root/cat/1.jpg`, or `root/train/cat/1.jpg` with splits by folder.

Needs no label file: an image is of the class whose folder it lies in, however deep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rcnn_svm.datasets.layout import (
    IMAGE_FOLDERS,
    LABEL_FOLDERS,
    WHOLE,
    Files,
    common_folders,
    role_among,
    role_of,
    shown,
)
from rcnn_svm.datasets.records import Defect, LabelledImage, LabelledObject, Report
from rcnn_svm.errors import DataError

__all__ = ["FolderSource", "class_order", "whole_image"]


def class_order(name: str) -> tuple[bool, int, str]:
    """Sort class names: numbers by value, then the others by name."""
    number = int(name) if name.isascii() and name.isdigit() else None
    return number is None, number or 0, name


def whole_image(name: str, place: str) -> LabelledObject:
    """Return the label of an image of the class `name`: an object that covers it."""
    return LabelledObject(name, (0.0, 0.0, 1.0, 1.0), name, place, relative=True)


@dataclass
class FolderSource:
    """A data set of whole images with a folder per class.

    Folders around all of them do not count. Where the next ones are called train, val or test and hold
    further folders with images, they are the splits and these the classes; else they are the classes
    themselves, and folders in them belong to the class. There a folder called `train` deeper down makes a
    split only if every image lies in one like it.

    Attributes:
        root: the folder.
        found: class and split of each image, by path.
        stray: images that lie in no class.
        empty: folders beside those of the classes that hold no image.
    """

    root: Path
    found: Mapping[Path, tuple[str, str]]
    stray: tuple[Path, ...]
    empty: tuple[Path, ...]

    @classmethod
    def find(cls, files: Files, *, insist: bool = False) -> FolderSource | None:
        """Return the data set in `files`, None where there is none.

        Args:
            files: of the data set.
            insist: it is known to be of this format: folders that are called as those of other formats are
                classes too.

        Raises:
            DataError: fewer than two classes, where it must be of this format.
        """
        inside = {path: folders for path in files.images if (folders := files.folders_of(path))}
        found: dict[Path, tuple[str, str]] = {}
        places: set[Path] = set()
        if inside:
            around = common_folders(list(inside.values()))
            if len(around) == max(map(len, inside.values())):
                around = around[:-1]  # one folder with all images, the only class
            base = files.root.joinpath(*around)
            below = {
                path: folders[len(around) :] for path, folders in inside.items() if len(folders) > len(around)
            }
            top = {folders[0] for folders in below.values()}
            parts = {one[0] for one in below.values() if len(one) > 1 and role_of(one[0])}
            if parts and (parts == top or any(role_of(one) in ("train", "trainval") for one in parts)):
                places = {base / part for part in parts}
                found = {
                    path: (one[1], one[0]) for path, one in below.items() if one[0] in parts and len(one) > 1
                }
            else:
                places = {base}
                named = {path: role_among(one[1:]) for path, one in below.items()}
                told = all(named.values())
                found = {path: (one[0], (told and named[path]) or WHOLE) for path, one in below.items()}
        classes = {name for name, _ in found.values()}
        if len(classes) < 2:
            if not insist:
                return None
            raise DataError(
                f"{files.root}: must have a folder of images for each of two or more classes, got "
                f"{', '.join(map(shown, sorted(classes))) or 'none'}."
            )
        if not insist and _others(files, classes):
            return None
        empty = sorted(
            folder
            for place in places
            for folder in place.iterdir()
            if folder.is_dir()
            and not folder.name.startswith((".", "__MACOSX"))
            and not any(folder in path.parents for path in inside)
        )
        return cls(files.root, found, tuple(p for p in files.images if p not in found), tuple(empty))

    def splits(self) -> tuple[str, ...]:
        """Return the names of the folders that are splits, else `all`."""
        return tuple(dict.fromkeys(split for _, split in self.found.values()))

    def class_names(self, report: Report) -> tuple[str, ...]:
        """Return the names of the folders, numbers by value; reported is what belongs to none."""
        for path in self.stray:
            report(Defect("stray", path, f"{path}: lies in the folder of no class and is left out."))
        for folder in self.empty:
            report(Defect("empty-class", folder, f"{folder}: holds no image and is left out."))
        names = {shown(name) for name, _ in self.found.values()}
        return tuple(sorted(names, key=class_order))

    def place(self, split: str) -> str:
        """Return the folder of the classes."""
        return str(self.root)

    def paths(self, split: str) -> list[Path]:
        """Return the images of one split, sorted."""
        return [path for path, (_, own) in self.found.items() if own == split]

    def read(self, split: str, report: Report) -> list[LabelledImage]:
        """Return the images of one split, sorted by path."""
        return [
            LabelledImage(path, path, None, (whole_image(shown(self.found[path][0]), "its folder"),))
            for path in self.paths(split)
        ]


def _others(files: Files, classes: set[str]) -> bool:
    """Tell whether folders are no classes: called after images or parts, or beside labels of boxes."""
    folders = {folder.lower() for path in files.paths for folder in files.folders_of(path)}
    stems = {path.with_suffix("") for path in files.images}
    beside = any(path.with_suffix("") in stems for path in files.of(".txt", ".xml", ".json"))
    called_so = not IMAGE_FOLDERS.isdisjoint(name.lower() for name in classes) or all(map(role_of, classes))
    return beside or called_so or not LABEL_FOLDERS.isdisjoint(folders)
