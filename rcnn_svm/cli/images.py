"""Images that a verb is given without labels: single files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rcnn_svm.datasets import image_size, read_image
from rcnn_svm.datasets.images import IMAGE_SUFFIXES
from rcnn_svm.datasets.layout import Files, image_ids
from rcnn_svm.errors import DataError
from rcnn_svm.structures import GroundTruth, Sample

__all__ = ["open_images"]


def open_images(paths: Sequence[Path]) -> list[Sample]:
    """Return the images that are named or lie in or below the named folders, in order, without labels.

    Each is known by its file name, and by as much of its path or suffix as tells it from the others.

    Raises:
        DataError: a path is missing, a folder holds no image, or a file is none.
    """
    files: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            found = Files.walk(path, leave=True).images
            if not found:
                raise DataError(f"{path}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            files |= dict.fromkeys(found)
        elif path.exists():
            files[path] = None
        else:
            raise DataError(f"{path}: no such file or folder.")
    ids = image_ids(files)
    return [
        Sample(ids[file], image_size(file), GroundTruth.empty(), path=file, reader=read_image)
        for file in files
    ]
