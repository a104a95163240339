"""Where the files of a data set lie: one walk over its folder, and how names find files in it.

Formats and layouts do not multiply because of this module: it knows folders, splits and names, and no
format; the readers know formats, and ask here which image a name or a label file stands for.

Two rules hold for every lookup. Only files below the root are found, so a name like `../../photo.jpg`, a
link or a path of another machine never leads out of the data set, unless the user allows it. And folders must
not contradict: a label in `train/` never gets a picture in `val/`, nor one of `cam 1/` a picture in `cam 2/`;
of several pictures that would do, the nearest is taken, and a tie is an error of the data set.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from rcnn_svm.datasets.images import IMAGE_SUFFIXES
from rcnn_svm.errors import DataError
from rcnn_svm.files import read_text

__all__ = [
    "ROLES",
    "WHOLE",
    "Files",
    "OutsideError",
    "common_folders",
    "image_ids",
    "is_image",
    "name_parts",
    "read_lines",
    "role_among",
    "role_of",
    "shown",
]

ROLES = ("train", "val", "trainval", "test")
"""The parts that splits can play."""

WHOLE = "all"
"""The only split of a data set that names none."""

# The names that people give to the parts; a year may follow.
_ROLE_NAMES = {
    "train": re.compile(r"train(ing)?(set)?[-_]?\d*"),
    "val": re.compile(r"(val|valid|validation)(set)?[-_]?\d*"),
    "trainval": re.compile(r"train[-_]?val[-_]?\d*"),
    "test": re.compile(r"test(ing)?(set)?[-_]?\d*"),
}
IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages", "data", "obj_train_data"})
LABEL_FOLDERS = frozenset({"labels", "label", "annotations", "annotation", "annots", "anns", "xml", "xmls"})
_MOST_FILES = 5_000_000


def shown(text: object) -> str:
    """Return a name as it can be printed and stored: what is no Unicode is escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def role_of(name: str) -> str | None:
    """Return the part that a split of this name plays, in any case; None for none."""
    return next((role for role, pattern in _ROLE_NAMES.items() if pattern.fullmatch(name.lower())), None)


def role_among(folders: Iterable[str]) -> str | None:
    """Return the first of some folder names that names a part, as it is written; None for none."""
    return next((folder for folder in folders if role_of(folder)), None)


def name_parts(name: str) -> list[str]:
    """Return folders and file of a path as any system writes it; drives, `.` and `..` are left out."""
    parts = name.strip().replace("\\", "/").split("/")
    return [part for part in parts if part not in ("", ".", "..") and not part.endswith(":")]


def is_image(path: Path) -> bool:
    """Tell by its suffix whether a file is an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Return (number, text) of the lines of a text file that hold something, without quotes around them.

    Raises:
        DataError: the file cannot be read.
    """
    texts = (re.sub(r'^(["\'])(.*)\1$', r"\2", line.strip()).strip() for line in read_text(file).split("\n"))
    return [(number, text) for number, text in enumerate(texts, start=1) if text]


def image_ids(paths: Iterable[Path]) -> dict[Path, str]:
    """Return a name for each image: the stem of its file, and more of its path where stems are shared.

    Images of one stem are told apart by the folders that differ, and by suffix where folders do not.
    """
    stems: dict[str, dict[Path, None]] = {}
    for path in paths:
        stems.setdefault(path.stem, {})[path] = None
    ids = {}
    for stem, group in stems.items():
        if len(group) == 1:
            ids[next(iter(group))] = shown(stem)
            continue
        base = os.path.commonpath([os.path.abspath(path.parent) for path in group])
        names = [Path(os.path.relpath(path, base)) for path in group]
        bare = [name.with_suffix("").as_posix() for name in names]
        for path, name, short in zip(group, names, bare, strict=True):
            ids[path] = shown(short if bare.count(short) == 1 else name.as_posix())
    return ids


class OutsideError(DataError):
    """A file of the data set names a place outside of it, and the user has not allowed that."""


@dataclass(frozen=True, eq=False)
class Files:
    """The files of a data set.

    Hidden files and folders, which `._name` of macOS are, do not count. A link is followed where it leads to
    a place below the root, or anywhere where the user allows it.

    Attributes:
        root: the folder.
        paths: its files, sorted, each below `root`.
        links: links that lead out of the data set or nowhere, which are not followed.
        allow_outside: places outside of the root may be read where links or files of the data set name them.
    """

    root: Path
    paths: tuple[Path, ...]
    links: tuple[Path, ...]
    allow_outside: bool = False

    @classmethod
    def walk(cls, root: Path, *, allow_outside: bool = False) -> Files:
        """Find the files below `root`.

        Args:
            root: the folder.
            allow_outside: follow links out of it as well.

        Raises:
            DataError: a folder cannot be listed, or there are more than five million files.
        """
        inside, paths, links = os.path.realpath(root), [], []
        todo: list[tuple[str, tuple[str, ...]]] = [(str(root), (inside,))]
        while todo:
            folder, above = todo.pop()
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                raise DataError(f"{shown(folder)}: cannot be read ({error.strerror}).") from error
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                real = os.path.realpath(entry.path) if entry.is_symlink() else ""
                outside = real and not allow_outside and not _is_below(real, inside)
                if outside or (real and not os.path.exists(real)):
                    links.append(Path(entry.path))
                elif entry.is_dir():
                    place = real or os.path.join(above[-1], entry.name)
                    if place not in above:  # a link to a folder around it has no end
                        todo.append((entry.path, (*above, place)))
                elif entry.is_file():
                    paths.append(Path(entry.path))
            if len(paths) > _MOST_FILES:
                raise DataError(f"{root}: must hold at most {_MOST_FILES} files. Name one data set in it.")
        return cls(root, tuple(sorted(paths)), tuple(sorted(links)), allow_outside)

    def may_read(self, path: Path) -> bool:
        """Tell whether a place lies below the root once all links are followed, or need not."""
        return self.allow_outside or self._is_inside(path)

    def places(self, name: str, *bases: Path) -> list[Path]:
        """Return the files and folders that a name means as it is written, from any of `bases` on.

        They exist, and may lie outside; those that lie inside are given from the root on.
        """
        plain = name.strip().replace("\\", "/")
        found = [Path(os.path.normpath(base / plain)) for base in bases]
        return [self._from_root(place) for place in found if _exists(place)]

    def outside(self, name: str, *bases: Path, by: Path) -> Path | None:
        """Return the file outside of the root that a name means, for which there is none inside.

        Args:
            name: a path.
            bases: the folders that it may start from.
            by: the file that names it.

        Returns:
            The file; None where there is none.

        Raises:
            OutsideError: there is one, and the user has not allowed to read it.
        """
        places = [place for place in self.places(name, *bases) if place.is_file()]
        found = next((place for place in places if not self._is_inside(place)), None)
        if found is not None and not self.allow_outside:
            raise self.refusal(name, found, by=by)
        return found

    def refusal(self, name: str, place: Path, *, by: Path) -> OutsideError:
        """Return the error of a place outside of the root that `by` names."""
        written = shown(repr(name if len(name) <= 80 else f"{name[:77]}..."))
        return OutsideError(
            f"{by}: names {written}, which is {shown(os.path.realpath(place))} and lies outside of the data "
            f"set {self.root}. Name a folder that holds both, or allow it with --allow-outside."
        )

    def of(self, *suffixes: str) -> list[Path]:
        """Return the files with one of these suffixes, in any case."""
        return [path for path in self.paths if path.suffix.lower() in suffixes]

    def named(self, *names: str) -> list[Path]:
        """Return the files with one of these names, in any case, those nearest to the root first."""
        found = [path for path in self.paths if path.name.lower() in names]
        return sorted(found, key=lambda path: len(path.parts))

    def folders_of(self, path: Path) -> list[str]:
        """Return the names of the folders between the root and a file; none of a file that lies outside."""
        return list(path.relative_to(self.root).parts[:-1]) if self.root in path.parents else []

    @cached_property
    def _real_root(self) -> str:
        return os.path.realpath(self.root)

    def _from_root(self, place: Path) -> Path:
        if self.root in (place, *place.parents) or not self._is_inside(place):
            return place
        return self.root / os.path.relpath(os.path.realpath(place), self._real_root)

    def _is_inside(self, path: Path) -> bool:
        return _is_below(os.path.realpath(path), self._real_root)

    @cached_property
    def images(self) -> list[Path]:
        """The image files, by suffix."""
        return [path for path in self.paths if is_image(path)]

    @cached_property
    def _wrapping(self) -> list[str]:
        """The folders around all images."""
        return common_folders([self.folders_of(path) for path in self.images])

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        names: dict[str, list[Path]] = {}
        for path in self.images:
            names.setdefault(path.name.lower(), []).append(path)
        return names

    @cached_property
    def _by_stem(self) -> dict[str, list[Path]]:
        stems: dict[str, list[Path]] = {}
        for path in self.images:
            stems.setdefault(path.stem.lower(), []).append(path)
        return stems

    def image_named(self, name: str, *, by: Path, split: str | None = None) -> list[Path]:
        """Return the images that a name stands for: one, none, or several that do equally well.

        Args:
            name: a file name or a path of any system, or an address.
            by: the file that names it.
            split: that it is listed in.
        """
        parts = name_parts(name)
        if not parts:
            return []
        *folders, last = parts
        for form in (last, unquote(last), last.split("?")[0], unquote(last.split("?")[0])):
            found = self._by_name.get(form.lower(), [])
            if found:
                exact = [path for path in found if path.name == form]
                return self.nearest(exact or found, folders, by=by, split=split)
        return []

    def images_of(self, label: Path) -> list[Path]:
        """Return the images that a label file stands for by its name, as `image_named`."""
        if self.root not in label.parents:
            return []
        found = self._by_stem.get(label.stem.lower(), [])
        exact = [path for path in found if path.stem == label.stem]
        return self.nearest(exact or found, self.folders_of(label), by=label)

    def nearest(
        self, candidates: Sequence[Path], folders: Sequence[str], *, by: Path, split: str | None = None
    ) -> list[Path]:
        """Return those of `candidates` that fit best to what names them, none where all contradict it.

        Args:
            candidates: files below the root.
            folders: that the name has.
            by: the file that names them.
            split: that they shall belong to.
        """
        wanted = [folder.lower() for folder in folders]
        near = [folder.lower() for folder in self.folders_of(by)]
        role = split and role_of(split)
        scores: dict[Path, tuple[int, int, bool, int]] = {}
        for path in candidates:
            there = self.folders_of(path)
            own = [folder.lower() for folder in there]
            bare = [folder.lower() for folder in there[len(self._wrapping) :]]
            if not _agree(_telling(wanted), _telling(bare)) or not _same_role(role, bare):
                continue
            scores[path] = (
                _n_common(own[::-1], wanted[::-1]),
                _n_common(own, near) + (split is not None and split.lower() in own),
                not IMAGE_FOLDERS.isdisjoint(own),
                -len(own),
            )
        best = max(scores.values(), default=None)
        return [path for path, score in scores.items() if score == best]


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def common_folders(folders: Sequence[list[str]]) -> list[str]:
    """Return the folders that several lists of them, one at least, begin with."""
    first, last = min(folders), max(folders)
    return first[: _n_common(first, last)]


def _telling(folders: Sequence[str]) -> list[str]:
    return [folder for folder in folders if folder not in IMAGE_FOLDERS | LABEL_FOLDERS]


def _agree(a: Sequence[str], b: Sequence[str]) -> bool:
    """Tell whether one of two paths holds the folders of the other, in order."""
    short, long = sorted((a, b), key=len)
    rest = iter(long)
    return all(folder in rest for folder in short)


def _same_role(role: str | None, folders: Sequence[str]) -> bool:
    roles = {found for found in map(role_of, folders) if found}
    fitting = {role, "trainval"} if role in ("train", "val") else {role}
    return not role or not roles or role == "trainval" or not roles.isdisjoint(fitting)


def _n_common(a: Sequence[str], b: Sequence[str]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
