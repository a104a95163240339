"""Images that a verb is given without labels: single files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rcnn_svm.datasets import image_size, read_image
from rcnn_svm.datasets.images import IMAGE_SUFFIXES
from rcnn_svm.errors import DataError
from rcnn_svm.structures import GroundTruth, Sample

__all__ = ["open_images"]


def open_images(paths: Sequence[Path]) -> list[Sample]:
    """Return the images that are named or lie in the named folders, in order, without labels.

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
        samples += [
            Sample(file.stem, image_size(file), GroundTruth.empty(), path=file, reader=read_image)
            for file in files
        ]
    names = [sample.image_id for sample in samples]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise DataError(
            f"{sorted(twice)[0]}: two of the images have this name, and results are kept by name. "
            f"Give them in two calls."
        )
    return samples
