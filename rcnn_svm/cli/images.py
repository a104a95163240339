"""Images that a verb is given without labels: files, folders, patterns, or a list on standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rcnn_svm.datasets import image_size, read_image
from rcnn_svm.datasets.images import IMAGE_SUFFIXES
from rcnn_svm.datasets.layout import Files, image_ids
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.structures import GroundTruth, Sample

__all__ = ["named", "open_images", "refuse_to_overwrite"]


def named(paths: Sequence[Path]) -> list[Path]:
    """Return what paths name, in order.

    `-` is every line of standard input. A path that is not there is a pattern where it has one of `*?[`, with
    `**` for any folders, and stands for what matches, sorted.

    Raises:
        DataError: a path is missing, a pattern matches nothing, or standard input is empty.
    """
    found: list[Path] = []
    for path in paths:
        if path == Path("-"):
            lines = [line.rstrip(b"\r\n") for line in sys.stdin.buffer]
            if not any(lines):
                raise DataError("standard input: must name an image or a folder a line, got nothing.")
            found += named([Path(os.fsdecode(line)) for line in lines if line and line != b"-"])
        elif path.exists():
            found.append(path)
        elif glob.has_magic(str(path)):
            matches = sorted(glob.glob(str(path), recursive=True))
            if not matches:
                raise DataError(f"{path}: matches no file or folder.")
            found += map(Path, matches)
        else:
            raise DataError(f"{path}: no such file or folder.")
    return found


def open_images(
    paths: Sequence[Path], *, unreadable: Callable[[DataError], None] | None = None
) -> list[Sample]:
    """Return the images that are `named` or lie in or below the folders that are, in order, without labels.

    Each is known by its file name, and by as much of its path or suffix as tells it from the others.

    Args:
        paths: as `named` takes them.
        unreadable: told why a file is no image, which is then left out; None stops there.

    Raises:
        DataError: as `named`; a folder holds no image, or a file is none.
    """
    files: dict[Path, None] = {}
    for path in named(paths):
        if path.is_dir():
            found = Files.walk(path, allow_outside=True).images
            if not found:
                raise DataError(f"{path}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            files |= dict.fromkeys(found)
        else:
            files[path] = None
    ids = image_ids(files)
    samples = []
    for file in files:
        try:
            size = image_size(file)
        except DataError as error:
            if unreadable is None:
                raise
            unreadable(error)
        else:
            samples.append(Sample(ids[file], size, GroundTruth.empty(), path=file, reader=read_image))
    return samples


def refuse_to_overwrite(outputs: Iterable[Path], inputs: Iterable[Path | None]) -> None:
    """Refuse outputs that would take the place of inputs, whatever links lead there.

    Raises:
        ConfigError: one would; the message names it.
    """
    given = {os.path.realpath(path) for path in inputs if path is not None}
    for path in outputs:
        if os.path.realpath(path) in given:
            raise ConfigError(
                f"The output must not take the place of a file that is read, got {path}. Choose another."
            )
