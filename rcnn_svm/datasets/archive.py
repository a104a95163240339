"""A data set in a zip archive: its files of interest, unpacked for as long as the process runs."""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from rcnn_svm.datasets.images import IMAGE_SUFFIXES
from rcnn_svm.errors import DataError, DiskSpaceError

__all__ = ["unpack"]

_LABEL_SUFFIXES = {".xml", ".json", ".txt", ".yaml", ".yml", ".names", ".data", ".labels", ".csv", ".tsv"}
_MOST_FILES = 1_000_000
# Pictures hardly shrink and labels by ten or twenty; an archive that grows a hundredfold is a bomb.
_MOST_GROWTH, _ALWAYS_ALLOWED = 100, 256 << 20  # times, bytes
_unpacked: dict[tuple[Path, int, int], tempfile.TemporaryDirectory[str]] = {}


def unpack(archive: Path) -> Path:
    """Return a folder with the images and label files of a zip archive.

    It lasts until the process ends and has the name of the archive, so that messages tell where things are.

    Raises:
        DataError: the archive is damaged or encrypted, names a place outside of itself or a file twice, holds
            a link, or grows beyond what labels and pictures do.
        DiskSpaceError: there is no room for it.
    """
    known = archive.resolve(), archive.stat().st_size, archive.stat().st_mtime_ns
    if known not in _unpacked:
        folder = tempfile.TemporaryDirectory(prefix="rcnn_svm-")
        try:
            with zipfile.ZipFile(archive) as opened:
                _extract(archive, opened, Path(folder.name, archive.name))
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:
            folder.cleanup()
            raise DataError(f"{archive}: cannot be unpacked ({error}). Unpack it yourself.") from error
        except DataError:
            folder.cleanup()
            raise
        _unpacked[known] = folder
    return Path(_unpacked[known].name, archive.name)


def _extract(archive: Path, opened: zipfile.ZipFile, folder: Path) -> None:
    folder.mkdir()
    members, names = [], set()
    for member in opened.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in str(path):
            raise DataError(f"{archive}: must not name files outside of it, got {member.filename[:80]!r}.")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise DataError(f"{archive}: must not hold links, got {member.filename[:80]!r}.")
        if path.suffix.lower() in _LABEL_SUFFIXES | IMAGE_SUFFIXES and not member.is_dir():
            if path in names:
                raise DataError(f"{archive}: must hold each file once, got {member.filename[:80]!r} twice.")
            names.add(path)
            members.append((member, path))
    total = sum(member.file_size for member, _ in members)
    if len(members) > _MOST_FILES or total > max(_MOST_GROWTH * archive.stat().st_size, _ALWAYS_ALLOWED):
        raise DataError(
            f"{archive}: must be pictures and labels, would be {len(members)} files of {total / 1e9:.1f} GB."
        )
    if total > shutil.disk_usage(folder).free:
        raise DiskSpaceError(
            f"{archive}: needs {total / 1e9:.1f} GB in {folder.parent.parent}. Free some space."
        )
    for member, path in members:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with opened.open(member) as source, open(target, "wb") as stream:
            shutil.copyfileobj(source, stream)  # stops at the size that the archive states
