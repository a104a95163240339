"""Files that are either whole or absent: atomic writes, hashes, JSON, disk space.

Every artefact of the package is written through `atomic_path`, so that a full disk, a
Ctrl-C or a `kill -9` never leaves something half-written that passes for whole.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from rcnn_svm.errors import DataError, DiskSpaceError
from rcnn_svm.progress import say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "SEAL_BYTES",
    "appending",
    "atomic_path",
    "bytes_digest",
    "csv_text",
    "digest",
    "file_digest",
    "file_name",
    "free_space",
    "inside",
    "is_sealed",
    "read_json",
    "read_text",
    "remove_marker",
    "require_free_space",
    "scratch_file",
    "seal",
    "touch",
    "write_json",
    "write_text",
]

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
_PART = ".part"
# Who writes it is in the name, so that what a killed process left can be told.
_PART_NAME = re.compile(r"\..*@([0-9a-f]{8})-([0-9]+)-[^.]*\.part", re.DOTALL)
_SEAL = b"seal"
_N_DIGITS = 20
_CHECKSUM_BYTES = 8
SEAL_BYTES = len(_SEAL) + _CHECKSUM_BYTES + _N_DIGITS
"""What `seal` appends to a file."""
_PAGE_WORDS = 512
_tidied: set[str] = set()
"""Folders that this process has cleared of what killed ones left."""


class _Identity(NamedTuple):
    """What tells that a file is the same as before, and that nobody wrote to it."""

    device: int
    inode: int
    size: int
    changed_ns: int


_checked: dict[_Identity, str] = {}
"""The names of the files whose seal was found whole."""


@contextlib.contextmanager
def atomic_path(path: Path, *, durable: bool = True, apart: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` once the block succeeds.

    Several processes may write the same path at once: each has a temporary name of its own
    and the last rename wins. On any exception the temporary file is removed. A killed process
    can leave a hidden `.part` file behind, never a half-written `path`; the next process that writes into
    the folder clears it.

    Args:
        path: where the file shall be.
        durable: also wait until the bytes are on the disk, so that a power cut cannot undo
            the write. Caches, whose loss costs only time, go without.
        apart: for writers that make further files beside the one that they write, as safetensors does: they
            get a hidden folder.

    Raises:
        DiskSpaceError: the disk filled up while writing.
        DataError: the folder cannot be written to, or `path` is a folder.
    """
    try:
        temporary = _temporary_beside(path, apart=apart)
    except (OSError, ValueError) as error:  # a NUL in the name, or half a surrogate pair
        raise _write_error(path, error) from error
    try:
        yield temporary
        try:
            if durable:
                _sync(temporary)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            if durable:
                _sync(path.parent)  # or a power cut undoes the rename
        except OSError as error:
            raise _write_error(path, error) from error
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            raise _write_error(path, error) from error
        raise
    except Exception as error:
        # safetensors says with an error of its own, which is no OSError, that the disk is full.
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            raise _write_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
        raise
    finally:
        if apart:
            shutil.rmtree(temporary.parent, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """Return the mask of permissions, which can be read only by setting it."""
    with _UMASK:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


_UMASK = threading.Lock()


def _remove_stale_parts(folder: str) -> None:
    """Remove what killed processes of this machine left half-written in a folder."""
    with os.scandir(folder) as entries:
        parts = [entry.path for entry in entries if _is_stale(entry.name)]
    for part in parts:
        with contextlib.suppress(OSError):  # another process clears it, or it is not ours to remove
            shutil.rmtree(part) if os.path.isdir(part) else os.unlink(part)


def _is_stale(name: str) -> bool:
    found = _PART_NAME.fullmatch(name)
    return found is not None and found[1] == _host() and not _alive(int(found[2]))


def _host() -> str:
    return bytes_digest(os.uname().nodename.encode())[:8]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def seal(path: Path, name: str) -> None:
    """Append a checksum of a file's bytes, and what the file is, so that `is_sealed` can tell.

    numpy reads an array from such a file as if nothing followed it.

    Args:
        path: a file that is not in use; not empty.
        name: 20 hexadecimal digits, as of `digest`.
    """
    with open(path, "r+b") as stream:
        mark = _mark(_mapped(stream), name)
        stream.seek(0, os.SEEK_END)
        stream.write(mark)


def is_sealed(path: Path, name: str) -> bool:
    """Return whether a file is as `seal` left it: no bit flipped, no tail lost, no other file in its place.

    A file is read through once in each process, and again where somebody else changed it or, with `touch`,
    its time; other calls only look whether it is the same one.

    Raises:
        OSError: the file cannot be read.
    """
    if _checked.get(_identity(os.stat(path))) == name:
        return True
    with open(path, "rb") as stream:
        identity = _identity(os.fstat(stream.fileno()))
        if identity.size <= SEAL_BYTES:
            return False
        content = _mapped(stream)
    whole = content[-SEAL_BYTES:].tobytes() == _mark(content[:-SEAL_BYTES], name)
    if whole:
        _checked[identity] = name
    return whole


def touch(path: Path) -> None:
    """Set a file's time of change to now; a seal that was found whole need not be checked again.

    Raises:
        OSError: the file is not there, or is not ours to touch.
    """
    name = _checked.pop(_identity(os.stat(path)), None)
    os.utime(path)
    if name is not None:
        _checked[_identity(os.stat(path))] = name


def _identity(status: os.stat_result) -> _Identity:
    return _Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _mapped(stream: IO[bytes]) -> NDArray[np.uint8]:
    import numpy as np

    return np.memmap(stream, np.uint8, "r")


def _mark(content: NDArray[np.uint8], name: str) -> bytes:
    checksum = _checksum(content).to_bytes(_CHECKSUM_BYTES, "little")
    return _SEAL + checksum + name[:_N_DIGITS].encode()


def _checksum(content: NDArray[np.uint8]) -> int:
    """Return the sum of a file's words of 8 bytes, each page weighed by its odd number, modulo 2^64.

    Any single bit that flips, a tail of zeros, and pages that change places are found; all is as fast as
    memory, where a cyclic redundancy check takes four times as long.
    """
    import numpy as np

    n_words = len(content) // 8
    n_pages = n_words // _PAGE_WORDS
    words = content[: 8 * n_words].view("<u8")
    with np.errstate(over="ignore"):
        pages = words[: n_pages * _PAGE_WORDS].reshape(n_pages, _PAGE_WORDS).sum(axis=1, dtype=np.uint64)
        weights = 2 * np.arange(n_pages, dtype=np.uint64) + np.uint64(1)
        total = int((pages * weights).sum(dtype=np.uint64))
        total += (2 * n_pages + 1) * int(words[n_pages * _PAGE_WORDS :].sum(dtype=np.uint64))
    total += (2 * n_pages + 3) * int.from_bytes(content[8 * n_words :].tobytes(), "little")
    return total % 2**64


def file_name(text: str) -> str:
    """Return a text as a name of a file that stays in its folder, a different one for each text.

    Slashes, percent signs, control characters and a leading dot become `%` and two digits, as in addresses;
    other texts stay.

    Example:
        >>> file_name("car/truck"), file_name("..")
        ('car%2Ftruck', '%2E.')
    """
    safe = "".join(f"%{ord(c):02X}" if c in "/\\%:" or ord(c) < 32 or ord(c) == 127 else c for c in text)
    return f"%2E{safe[1:]}" if safe.startswith(".") else safe


def inside(folder: Path, text: str, suffix: str) -> Path:
    """Return the file that a text names in or below a folder; each part between slashes is a `file_name`."""
    *folders, name = map(file_name, text.split("/"))
    return folder.joinpath(*folders, name + suffix)


def _temporary_beside(path: Path, *, apart: bool = False) -> Path:
    attempts = 3
    while True:
        attempts -= 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if str(path.parent) not in _tidied:
                _remove_stale_parts(str(path.parent))
                _tidied.add(str(path.parent))
            prefix = f".{path.name[:100]}@{_host()}-{os.getpid()}-"
            if apart:
                folder = tempfile.mkdtemp(prefix=prefix, suffix=_PART, dir=path.parent)
                return Path(folder) / (path.name + _PART)
            handle, name = tempfile.mkstemp(prefix=prefix, suffix=_PART, dir=path.parent)
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


@contextlib.contextmanager
def appending(path: Path) -> Iterator[IO[str]]:
    """Open a text file to be written to at its end.

    Raises:
        DiskSpaceError: the disk filled up.
        DataError: it cannot be written to.
    """
    try:
        with open(path, "a", encoding="utf-8") as stream:
            yield stream
    except OSError as error:
        raise _write_error(path, error) from error


def remove_marker(path: Path) -> None:
    """Remove the file that marks its folder as whole, before anything else in the folder changes.

    Raises:
        DataError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError | ValueError) -> DataError:
    if not isinstance(error, OSError):
        return DataError(f"{str(path)!r}: cannot be the name of a file. Choose another.")
    if error.errno in _OUT_OF_SPACE:
        return DiskSpaceError(
            f"{path}: the disk is full. Free some space and run the same command again: "
            f"finished work is kept."
        )
    return DataError(f"{path}: cannot be written ({error.strerror}). Choose another place.")


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


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Return records as CSV, one line each below their names.

    Args:
        rows: the records.
        columns: their names in order, which stand there without any record as well, and of which a record
            may lack some; empty for those of the first, which all have.
    """
    stream = io.StringIO()
    names = columns or (list(rows[0]) if rows else [])
    if names:
        writer = csv.DictWriter(stream, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _inert(value) for key, value in row.items()} for row in rows)
    return stream.getvalue()


def _inert(value: Any) -> Any:
    """Return a cell of a spreadsheet; a text that it would run as a formula is marked as a text."""
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        else value
    )


def read_text(path: Path) -> str:
    """Read a text file of any common encoding, without its byte order mark.

    UTF-16 and UTF-32 are known by their mark, or by the zero bytes of their first letters. What is neither
    one of them nor UTF-8 is taken for Windows-1252, and one line says so.

    Raises:
        DataError: the file is missing, unreadable or no text.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:  # a NUL or half a surrogate pair in the name
        raise DataError(f"{str(path)!r}: cannot be the name of a file.") from error
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if encoding != "utf-8" or b"\0" in content:
            raise DataError(f"{path}: must be UTF-8 text ({error.reason}).") from error
        say(f"{path}: is no UTF-8 text and was read as Windows-1252. Save it as UTF-8.")
        return content.decode("cp1252", errors="replace")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, unreadable or no JSON; the message names line and column.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: must be JSON, got a syntax error at line {error.lineno}, "
            f"column {error.colno} ({error.msg}). The file may be truncated."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: must be JSON, got a number too long or lists too deep to read.") from error


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
