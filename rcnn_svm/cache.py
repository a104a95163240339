"""The folder of what runs compute and may need again: what lies there, and how much of it stays.

Proposals, features, fine-tuned networks and maps of frozen blocks are kept below one folder under names that
are hashes, so that a file of ours is known by its place and name. Nothing else is ever counted or removed,
and no link is followed. A file's modification time is the time of its last use, to a minute (`note_use`):
every file system keeps it, and what was used least recently goes first, what was trained after all else.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.files import free_space, touch
from rcnn_svm.progress import say

__all__ = [
    "KINDS",
    "LIMIT_VARIABLE",
    "CacheLimit",
    "KeptFile",
    "Pruned",
    "counted",
    "default_cache",
    "describe",
    "in_words",
    "kept_files",
    "note_use",
    "parse_size",
    "prune",
    "size_limit",
]

LIMIT_VARIABLE = "RCNN_SVM_CACHE_LIMIT"
"""Environment variable that holds a size limit."""

_UNFINISHED = "unfinished"
_PRECISION_S = 60.0
"""Uses are noted to this many seconds: reading a file in a loop then costs one write a minute."""
_STALE_S = 24 * 3600.0
"""Nobody writes one file for longer: an unfinished file of this age is a killed writer's."""
_DEFAULT_SHARE = 10
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B", re.IGNORECASE)


_WRITER = "[0-9a-f]{8}-[0-9]+-[a-z0-9_]+"


class _Place(NamedTuple):
    """Where files of one kind lie: patterns of the folders from the root on, and of file names."""

    kind: str
    folders: tuple[re.Pattern[str], ...]
    names: re.Pattern[str]
    unfinished: re.Pattern[str]


def _place(kind: str, folders: str, names: str) -> _Place:
    # What `files.atomic_path` calls its temporary files.
    unfinished = re.compile(rf"\.({names})@{_WRITER}\.part")
    return _Place(kind, tuple(map(re.compile, folders.split("/"))), re.compile(names), unfinished)


_HASH = "[0-9a-f]{20}"
_IDENTITY = "identity.json"
_PLACES = (
    _place("proposals", "proposals/[0-9a-f]{2}", rf"{_HASH}\.npz"),
    _place("features", f"features/{_HASH}", rf"{_HASH}\.npy|{re.escape(_IDENTITY)}"),
    _place("fine-tuned networks", "finetuned", rf"{_HASH}\.checkpoint"),
    _place("tuned trunks", "tuned", rf"{_HASH}\.checkpoint"),
    _place("cells of studies", "study", rf"{_HASH}\.npz"),
    _place("sent to clusters", f"cluster/{_HASH}", r"[0-9a-f]+\.(npy|pickle|bin)|mark"),
    _place("maps of frozen blocks", f"tuned/maps/{_HASH}", rf"{_HASH}(-mirrored)?\.npy"),
)

KINDS = (*(place.kind for place in _PLACES), _UNFINISHED)
"""Kinds of files; an unfinished one is being written, or its writer was killed."""


_TRAINED = {"fine-tuned networks", "tuned trunks", "cells of studies"}
"""What takes minutes to make again and little room: it goes after all that takes seconds and much."""


class KeptFile(NamedTuple):
    """A file of the cache.

    Attributes:
        used: POSIX time of the last use, to a minute.
        path: of the file.
        kind: one of `KINDS`.
        n_bytes: its size.
    """

    used: float
    path: str
    kind: str
    n_bytes: int


class Pruned(NamedTuple):
    """What `prune` did.

    Attributes:
        n_files: files that it removed.
        n_bytes: their size.
        n_refused: files that the system did not let it remove.
        n_bytes_left: size of what stays.
    """

    n_files: int
    n_bytes: int
    n_refused: int
    n_bytes_left: int


def default_cache() -> Path:
    """Return where things are kept between runs unless another folder is named."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home) / "rcnn_svm" if home else Path.home() / ".cache" / "rcnn_svm"


def note_use(path: Path) -> bool:
    """Note that a file of a cache is used now, and return whether it is there.

    It costs no more than `path.exists()`, but for a change of the file's modification time at most once a
    minute. Another process may remove the file right after: whoever opens it must be ready for that.
    """
    try:
        used = path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return False
    if abs(time.time() - used) > _PRECISION_S:  # also where a clock once ran ahead
        with contextlib.suppress(OSError):  # others' files, which may only be read, serve as well
            touch(path)
    return True


def kept_files(folder: Path) -> Iterator[KeptFile]:
    """Yield every file of the cache in `folder`, in no order; nothing where there is no such folder.

    Only files at the places and with the names that this package gives them, and none behind a link. What
    other users do not let us see is left out.

    Raises:
        DataError: `folder` is no folder or cannot be read.
    """
    try:
        os.scandir(folder).close()
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(
            f"{folder}: must be a folder that can be read, to hold the cache ({error.strerror}). "
            f"Name another with --cache."
        ) from error
    for place in _PLACES:
        for found in _folders(str(folder), place.folders):
            yield from _files(found, place)


def _folders(folder: str, patterns: tuple[re.Pattern[str], ...]) -> Iterator[str]:
    if not patterns:
        yield folder
        return
    for entry in _entries(folder):
        if patterns[0].fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            yield from _folders(entry.path, patterns[1:])


def _files(folder: str, place: _Place) -> Iterator[KeptFile]:
    newest, identity = 0.0, None
    for entry in _entries(folder):
        kind = place.kind if place.names.fullmatch(entry.name) else _UNFINISHED
        if kind == _UNFINISHED and not place.unfinished.fullmatch(entry.name):
            continue
        try:
            if not entry.is_file(follow_symlinks=False):
                continue
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # gone since the folder was listed
            continue
        file = KeptFile(status.st_mtime, entry.path, kind, status.st_size)
        if entry.name == _IDENTITY:
            identity = file
            continue
        if kind != _UNFINISHED:
            newest = max(newest, file.used)
        yield file
    if identity is not None:  # nobody reads it: it goes after the last file that it tells about
        yield identity._replace(used=newest or identity.used)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # gone meanwhile, or another user's
        return []


def prune(
    folder: Path, limit: int, *, older_than: float = float("-inf"), spared_from: float = float("inf")
) -> Pruned:
    """Remove files until what stays takes at most `limit` bytes, what was used least recently first.

    What was trained goes last, after all features and proposals. Files of killed writers go in any case. What
    is being written stays, and may exceed the limit.

    Args:
        folder: of the cache.
        limit: bytes.
        older_than: POSIX time; what was used before goes even where there is room.
        spared_from: POSIX time; what was used then or later stays even where there is no room.

    Raises:
        DataError: see `kept_files`.
    """
    files = sorted(kept_files(folder), key=lambda file: (file.kind in _TRAINED, file))
    left = sum(file.n_bytes for file in files)
    n_files = n_bytes = n_refused = 0
    emptied = set()
    now = time.time()
    for file in files:
        if file.kind == _UNFINISHED:
            stays = now - file.used <= _STALE_S
        else:
            stays = file.used >= spared_from or (left <= limit and file.used >= older_than)
        if stays:
            continue
        try:
            os.unlink(file.path)
        except FileNotFoundError:  # another process was quicker
            left -= file.n_bytes
            continue
        except OSError:
            n_refused += 1
            continue
        left -= file.n_bytes
        n_files += 1
        n_bytes += file.n_bytes
        emptied.add(os.path.dirname(file.path))
    for place in emptied:
        # The folders of the kinds stay: a process may be about to write into them.
        if Path(place).parent != folder:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(place)
    return Pruned(n_files, n_bytes, n_refused, left)


class CacheLimit:
    """Holds a cache within a size limit while this process works with it.

    What was used since this object was made stays until the work is finished, whatever it takes.

    Args:
        folder: of the cache.
        limit: bytes; None keeps everything.

    Raises:
        DataError: see `kept_files`.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self._folder, self._limit = folder, limit
        # Twice: once for uses that were noted shortly before, once for a network disk with another clock.
        self._started = time.time() - 2 * _PRECISION_S
        self._warned = False
        self.hold()

    def hold(self, *, finished: bool = False) -> None:
        """Make room where the limit is exceeded, and say so in a line.

        Args:
            finished: nothing that was used is needed any more.
        """
        if self._limit is None or sum(file.n_bytes for file in kept_files(self._folder)) <= self._limit:
            return
        spared_from = float("inf") if finished else self._started
        pruned = prune(self._folder, self._limit, spared_from=spared_from)
        if pruned.n_files:
            say(
                f"{self._folder}: removed {counted(pruned.n_files, pruned.n_bytes)}, used least recently, to "
                f"hold the cache within its limit of {in_words(self._limit)}."
            )
        if pruned.n_bytes_left > self._limit and not finished and not self._warned:
            say(
                f"{self._folder}: what this run uses takes {in_words(pruned.n_bytes_left)}, more than the "
                f"cache's limit of {in_words(self._limit)}. It stays to the end of the run; a larger "
                f"--cache-limit keeps it for the next."
            )
            self._warned = True


def size_limit(folder: Path) -> int:
    """Return the bytes that the cache in `folder` may take where nothing else is asked for.

    It is what the environment variable `RCNN_SVM_CACHE_LIMIT` says, or a tenth of the disk space that would
    be free if the cache were empty.

    Raises:
        ConfigError: the variable holds no size.
        DataError: see `kept_files`.
    """
    text = os.environ.get(LIMIT_VARIABLE)
    if text:
        return parse_size(text, LIMIT_VARIABLE)
    taken = sum(file.n_bytes for file in kept_files(folder))
    return (free_space(folder) + taken) // _DEFAULT_SHARE


def parse_size(text: str, name: str) -> int:
    """Return the bytes that a text such as `2GB`, `1.5 TB` or `500MB` says; a kB has 1000 bytes.

    Args:
        text: a number and one of B, kB, MB, GB, TB, in any case.
        name: of what was given, for the message.

    Raises:
        ConfigError: it is no such text.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{name} must be a size such as 2GB or 500MB, got {text!r}.")
    return int(Decimal(found[1]) * 1000 ** ("", "k", "m", "g", "t").index(found[2].lower()))


def in_words(n_bytes: int) -> str:
    """Return a size in kB, MB or GB (10^3, 10^6, 10^9 bytes)."""
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:.0f} kB"
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def counted(n_files: int, n_bytes: int) -> str:
    """Return a number of files and their size in words."""
    return f"{n_files} file{'' if n_files == 1 else 's'} ({in_words(n_bytes)})"


def describe(folder: Path, limit: int) -> str:
    """Return one line: how much the cache holds, its limit in bytes as given, and how to empty it."""
    taken = sum(file.n_bytes for file in kept_files(folder))
    where = "" if folder == default_cache() else f" --cache {shlex.quote(str(folder))}"
    return (
        f"Cache: {folder} holds {in_words(taken)} of at most {in_words(limit)}. "
        f"`rcnn-svm cache prune --all{where}` empties it."
    )
