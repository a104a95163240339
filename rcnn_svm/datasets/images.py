"""Image files to pixels, by content and not by name. Needs Pillow and numpy only.

Two decisions are made here for the whole package:

* **Transparency is laid on white**, the colour of the page or viewer in which people see such
  pictures when they label them. Dropping alpha instead shows whatever lies under it, often black.
* **EXIF orientation is applied**: the image is upright, as viewers and labelling tools show it. An
  orientation outside 1 to 8 means none. Labels that were made on the stored, unturned pixels announce
  themselves by the size that they state, and `read_image(path, labelled_size=...)` follows it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image as pillow
from PIL import UnidentifiedImageError, features

from rcnn_svm.errors import DataError
from rcnn_svm.memory import free_memory, gigabytes
from rcnn_svm.structures import Image

__all__ = ["IMAGE_SUFFIXES", "header_sizes", "image_size", "read_image"]

# What is decoded, and the file name endings that mark it when a folder is listed. An explicit list: Pillow
# knows formats that start other programs (EPS) and decoders that nobody asked for.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".mpo",),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
}
# Pillow may have been built without these, or be too old for them.
_OPTIONAL = [kind for kind in ("webp", "avif") if not (kind in features.modules and features.check(kind))]
_FORMATS = tuple(kind for kind in _SUFFIXES if kind.lower() not in _OPTIONAL)
_DECODERS = tuple(kind for kind in _FORMATS if kind != "MPO")  # the one of JPEG reads these as well
IMAGE_SUFFIXES = frozenset(suffix for kind in _FORMATS for suffix in _SUFFIXES[kind])
"""File name endings, in lower case, that mark an image when a folder is listed."""

_ORIENTATION_TAG = 0x0112
# What makes each stored orientation upright (EXIF 2.3, tag 0x0112).
_TURN = {
    2: pillow.Transpose.FLIP_LEFT_RIGHT,
    3: pillow.Transpose.ROTATE_180,
    4: pillow.Transpose.FLIP_TOP_BOTTOM,
    5: pillow.Transpose.TRANSPOSE,
    6: pillow.Transpose.ROTATE_270,
    7: pillow.Transpose.TRANSVERSE,
    8: pillow.Transpose.ROTATE_90,
}
_BYTES_PER_PIXEL = 7
"""Pillow's four and the three of the array; transparency takes more than twice as much."""
_LARGE = 100_000_000
"""Bytes from which on it is worth asking what is free."""
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def read_image(path: Path, *, labelled_size: tuple[int, int] | None = None) -> Image:
    """Decode an image file of any common kind.

    Grey, palette, CMYK, 16-bit and transparent images are converted: 16 bits by their upper 8 bits,
    transparency by laying it on white. Animations give their first frame.

    Args:
        path: the file; its suffix does not matter.
        labelled_size: (height, width) that the labels state. Where only the stored pixels have it and
            the upright image has not, orientation is not applied.

    Returns:
        uint8 (H, W, 3), RGB, contiguous and writable.

    Raises:
        DataError: the file is missing, truncated, damaged or no image, or takes more memory than is free.
    """
    with _opened(path) as image:
        needed = _BYTES_PER_PIXEL * image.width * image.height
        free = free_memory() if needed >= _LARGE else None
        if free is not None and needed > free:
            raise MemoryError
        stored, upright = image.size, _upright_size(image)
        orient = labelled_size is None or labelled_size[::-1] == upright or labelled_size[::-1] != stored
        orientation = _orientation(image)
        image.load()
        if image.mode in _SIXTEEN_BIT:
            wide = np.asarray(image).astype(np.int64)
            image = pillow.fromarray((np.clip(wide, 0, 65535) >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise DataError(
                f"{path}: must have 8 or 16 bits per channel, got floating point. Convert it to PNG or JPEG."
            )
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            white = pillow.new("RGBA", image.size, "white")
            image = pillow.alpha_composite(white, image)
        image = image.convert("RGB")
        if orient and orientation != 1:
            image = image.transpose(_TURN[orientation])
        return np.array(image)


def image_size(path: Path) -> tuple[int, int]:
    """Return (height, width) of the upright image from the file's header, decoding no pixels.

    Raises:
        DataError: the file is missing or no image. A truncated file is found by `read_image` only.
    """
    return header_sizes(path)[0]


def header_sizes(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (height, width) of the upright image and of the stored pixels, from the file's header.

    Raises:
        DataError: as `image_size`.
    """
    with _opened(path) as image:
        return _upright_size(image)[::-1], image.size[::-1]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pillow.Image]:
    """Open an image; every failure to open or to decode inside the block is one clear DataError.

    Pillow gets the open file and not its name: by name it maps some TIFFs into memory and forgets to turn
    them.
    """
    image: pillow.Image | None = None
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise DataError(f"{path}: must be a regular file. Replace it.")  # a pipe would wait for ever
        # Pillow warns about damaged metadata, large images and palettes: none of them harms the pixels.
        with warnings.catch_warnings(), open(path, "rb") as stream:
            warnings.simplefilter("ignore")
            with pillow.open(stream, formats=_DECODERS) as opened:
                image = cast(pillow.Image, opened)
                yield image
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file.") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: must be an image, its content is none that is known. Replace it."
        ) from error
    except pillow.DecompressionBombError as error:
        n_pixels = int((re.findall(r"\d+", str(error)) or ["0"])[0])
        limit = 2 * (pillow.MAX_IMAGE_PIXELS or 0)
        raise DataError(
            f"{path}: must have at most {limit / 1e6:.0f} megapixels, has {n_pixels / 1e6:.0f}. "
            f"Make it smaller."
        ) from error
    except MemoryError as error:
        width, height = image.size if image is not None else (0, 0)
        needed = gigabytes(_BYTES_PER_PIXEL * width * height)
        free = free_memory()
        there = "" if free is None else f", {gigabytes(free)} are free"
        raise DataError(
            f"{path}: needs {needed} or more of memory for {width} x {height} pixels{there}. Make it smaller."
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
        raise DataError(f"{path}: is a damaged image ({error}). Replace it.") from error
    except Exception as error:  # decoders raise anything on damaged files
        raise DataError(
            f"{path}: is a damaged image ({error or type(error).__name__}). Replace it."
        ) from error


def _orientation(image: pillow.Image) -> int:
    """Return EXIF's orientation 1 to 8; 1 where there is none or an invalid one.

    Pillow turns TIFF files by itself, and would decode a PNG without EXIF to look for it at the end.
    """
    if "exif" not in image.info or image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata, of which Pillow raises anything
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright_size(image: pillow.Image) -> tuple[int, int]:
    """Return (width, height) after orientation; the codes 5 to 8 swap the sides."""
    return image.size[::-1] if _orientation(image) >= 5 else image.size
