"""Images that a verb is given without labels: single files and folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rcnn_svm.datasets import image_size, read_image
from rcnn_svm.datasets.images import IMAGE_SUFFIXES
from rcnn_svm.datasets.layout import Files, image_ids
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.structures import GroundTruth, Sample

__all__ = ["open_images", "refuse_to_overwrite"]


def open_images(
    paths: Sequence[Path], *, unreadable: Callable[[DataError], None] | None = None
) -> list[Sample]:
    """Return the images that are named or lie in or below the named folders, in order, without labels.

    Each is known by its file name, and by as much of its path or suffix as tells it from the others.

    Args:
        paths: files and folders.
        unreadable: told why a file is no image, which is then left out; None stops there.

    Raises:
        DataError: a path is missing, a folder holds no image, or a file is none.
    """
    files: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            found = Files.walk(path, allow_outside=True).images
            if not found:
                raise DataError(f"{path}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            files |= dict.fromkeys(found)
        elif path.exists():
            files[path] = None
        else:
            raise DataError(f"{path}: no such file or folder.")
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
