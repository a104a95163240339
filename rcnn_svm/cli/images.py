"""Images that a verb is given without labels: single files and folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rcnn_svm.datasets import image_size, read_image
from rcnn_svm.datasets.images import IMAGE_SUFFIXES
from rcnn_svm.errors import DataError
from rcnn_svm.structures import GroundTruth, Sample

__all__ = ["open_images"]


def open_images(
    paths: Sequence[Path], *, unreadable: Callable[[DataError], None] | None = None
) -> list[Sample]:
    """Return the images that are named or lie in the named folders, in order, without labels.

    Args:
        paths: files and folders.
        unreadable: told why a file is no image, which is then left out; None stops there.

    Raises:
        DataError: a path is missing, a folder holds no image, or a file is none.
    """
    samples: list[Sample] = []
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise DataError(f"{path}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        elif path.exists():
            files = [path]
        else:
            raise DataError(f"{path}: no such file or folder.")
        for file in files:
            try:
                size = image_size(file)
            except DataError as error:
                if unreadable is None:
                    raise
                unreadable(error)
            else:
                samples.append(Sample(file.stem, size, GroundTruth.empty(), path=file, reader=read_image))
    names = [sample.image_id for sample in samples]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise DataError(
            f"{sorted(twice)[0]}: two of the images have this name, and results are kept by name. "
            f"Give them in two calls."
        )
    return samples
