"""Files that are either whole or absent: atomic writes, hashes, JSON, disk space.

Every artefact of the package is written through `atomic_path`, so that a full disk, a
Ctrl-C or a `kill -9` never leaves something half-written that passes for whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rcnn_svm.errors import DataError, DiskSpaceError

__all__ = [
    "atomic_path",
    "bytes_digest",
    "digest",
    "file_digest",
    "free_space",
    "read_json",
    "remove_marker",
    "require_free_space",
    "scratch_file",
    "write_json",
    "write_text",
]

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` once the block succeeds.

    Several processes may write the same path at once: each has a temporary name of its own
    and the last rename wins. On any exception the temporary file is removed. A killed process
    can leave a hidden `.part` file behind, never a half-written `path`.

    Args:
        path: where the file shall be.
        durable: also wait until the bytes are on the disk, so that a power cut cannot undo
            the write. Caches, whose loss costs only time, go without.

    Raises:
        DiskSpaceError: the disk filled up while writing.
        DataError: the folder cannot be written to.
    """
    try:
        temporary = _temporary_beside(path)
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            raise _write_error(path, error) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_beside(path: Path) -> Path:
    attempts = 3
    while True:
        attempts -= 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        except (FileNotFoundError, FileExistsError):  # another process tidied the empty folder away meanwhile
            if not attempts:
                raise
        else:
            os.close(handle)
            return Path(name)


@contextlib.contextmanager
def scratch_file(folder: Path) -> Iterator[IO[bytes]]:
    """Yield an empty file without a name in `folder`, to be written and read inside the block.

    Raises:
        DiskSpaceError: the disk filled up.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            yield file
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            raise _write_error(folder, error) from error
        raise


def remove_marker(path: Path) -> None:
    """Remove the file that marks its folder as whole, before anything else in the folder changes.

    Raises:
        DataError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> DataError:
    if error.errno in _OUT_OF_SPACE:
        return DiskSpaceError(
            f"{path}: the disk is full. Free some space and run the same command again: "
            f"finished work is kept."
        )
    return DataError(f"{path}: cannot be written ({error.strerror}). Choose another folder.")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically.

    Raises:
        ValueError: `value` holds a NaN or an infinity, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, unreadable or no JSON; the message names line and column.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be UTF-8 text ({error.reason}).") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: must be JSON, got a syntax error at line {error.lineno}, "
            f"column {error.colno} ({error.msg}). The file may be truncated."
        ) from error


def digest(value: Any) -> str:
    """Return 20 hexadecimal digits of SHA-256 over the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return bytes_digest(text.encode())


def bytes_digest(*parts: bytes | memoryview) -> str:
    """Return 20 hexadecimal digits of SHA-256 over the parts in order."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()[:20]


def file_digest(path: Path) -> str:
    """Return the full SHA-256 of a file as hexadecimal digits, read in blocks.

    Raises:
        DataError: the file is missing or unreadable.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def free_space(folder: Path) -> int:
    """Return the bytes that are free where `folder` lies or will lie."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Refuse work whose output cannot fit.

    Raises:
        DiskSpaceError: fewer than `needed_bytes` are free where `folder` lies or will lie.
    """
    free = free_space(folder)
    if free < needed_bytes:
        raise DiskSpaceError(
            f"{folder}: needs {needed_bytes / 1e9:.2f} GB, only {free / 1e9:.2f} GB are free. "
            f"Free some space or choose another folder."
        )
