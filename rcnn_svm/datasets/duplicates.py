"""Images that are there twice: the same file, or nearly the same picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image as pillow

from rcnn_svm.progress import track
from rcnn_svm.structures import Image, Sample

__all__ = ["Duplicate", "find_duplicates"]

_SIDE = 16
_MOST_BITS = 0.1  # of the hash may differ: re-encoded, scaled or brightened copies stay below
_MOST_LEVELS = 24.0  # of 255, in the mean over a thumbnail: pictures without edges have the same hash
_BLOCK = 1024


@dataclass(frozen=True)
class Duplicate:
    """Two images that show the same.

    Attributes:
        first: position of one.
        second: position of the other, which comes later.
        distance: share of the bits of their difference hashes that differ; 0 for the same content.
        identical: the files are the same byte for byte, or the rendered pixels are.
    """

    first: int
    second: int
    distance: float
    identical: bool


def find_duplicates(samples: Sequence[Sample]) -> list[Duplicate]:
    """Return all pairs of images that are the same or nearly so, in the order of their positions.

    Nearly the same are pictures whose difference hashes (16 x 16 bits: is a pixel of the shrunken grey image
    brighter than its left neighbour?) differ in 10 % of the bits or less, and whose thumbnails differ by 24
    of 255 levels or less in the mean. Copies that were encoded anew, scaled or brightened are found;
    mirrored, turned or cropped ones are not. Every image is decoded.

    Args:
        samples: N images; time and memory grow with N squared divided by a block of 1024.

    Raises:
        DataError: an image cannot be read.

    References:
        The difference hash: N. Krawetz, "Kind of like that", 2013.
    """
    thumbnails = [_thumbnail(sample.read()) for sample in track(samples, "look for duplicates")]
    if not thumbnails:
        return []
    grey = np.stack(thumbnails).mean(axis=3)
    signs = np.where(grey[:, :, 1:] > grey[:, :, :-1], 1, -1).astype(np.float32).reshape(len(grey), -1)
    levels = np.stack(thumbnails)[:, :, 1:].reshape(len(grey), -1)
    digests = [sample.digest() for sample in samples]
    found = []
    for start in range(0, len(signs), _BLOCK):
        distance = 0.5 - 0.5 * (signs[start : start + _BLOCK] @ signs.T) / signs.shape[1]
        for row, j in zip(*np.nonzero(distance <= _MOST_BITS), strict=True):
            i = start + int(row)
            if i >= j:
                continue
            identical = digests[i] == digests[j]
            if identical or np.abs(levels[i] - levels[j]).mean() <= _MOST_LEVELS:
                found.append(Duplicate(i, int(j), float(distance[row, j]), identical))
    return found


def _thumbnail(image: Image) -> NDArray[np.float32]:
    """Return (16, 17, 3) mean colours."""
    small = pillow.fromarray(image).resize((_SIDE + 1, _SIDE), pillow.Resampling.BOX)
    return np.asarray(small, np.float32)
