"""The sizes that an image is read at on shared convolutions, and which of them a region is read at.

This module needs numpy and OpenCV only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes
from rcnn_svm.opencv import cv2
from rcnn_svm.structures import Image

__all__ = ["nearest_scales", "resize", "rows_of_scales"]

_PREFERRED_SIDE = 224.0
"""With several scales a region is read where its side comes nearest to this (SPP-net, section 4.1)."""


def resize(image: Image, scale: float) -> tuple[Image, NDArray[np.float64]]:
    """Return the resized image and the factors that bring (R, 4) boxes into it."""
    height, width = image.shape[:2]
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    # Averaging when shrinking keeps fine texture from turning into noise.
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized = np.asarray(cv2.resize(image, size, interpolation=method), np.uint8)
    # Each axis has a factor of its own: sizes are whole pixels.
    return resized, np.array([size[0] / width, size[1] / height] * 2)


def nearest_scales(boxes: Boxes, scales: Sequence[float]) -> NDArray[np.int64]:
    """Return (R,) which scale brings each region's side, the root of its area, nearest to 224 pixels."""
    side = np.sqrt(np.maximum(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), 1))  # (R,)
    ratios = side[:, None] * np.array(scales) / _PREFERRED_SIDE
    return np.asarray(np.abs(np.log(ratios)).argmin(axis=1), np.int64)


def rows_of_scales(boxes: Boxes, scales: Sequence[float]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each scale at which regions are read, by its place, with the rows of these regions."""
    choice = nearest_scales(boxes, scales)
    for i in np.unique(choice).tolist():
        yield i, np.flatnonzero(choice == i)
