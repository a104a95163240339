"""Boxes and their names on photographs, legible from thumbnails to full frames."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from rcnn_svm.errors import ConfigError, DependencyError
from rcnn_svm.files import atomic_path, file_name, inside, remove_marker
from rcnn_svm.structures import Detections, GroundTruth, Image, Sample

__all__ = [
    "Colour",
    "CropWriter",
    "Mark",
    "PictureWriter",
    "class_colours",
    "corners",
    "cut",
    "draw_detections",
    "draw_marks",
    "rgb",
    "save_picture",
]

Colour = tuple[int, int, int]
"""Red, green, blue in 0 .. 255."""

_Place = tuple[int, int, int, int]  # left, top, right, bottom of a tag

_TRUTH: Colour = (255, 255, 255)
_GOLDEN_ANGLE = 0.618033988749895
_LEGIBLE = 480  # pixels: smaller pictures are enlarged, so that names fit


def rgb(colour: str) -> Colour:
    """Return red, green, blue of `#rrggbb`."""
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def corners(box: NDArray[np.floating]) -> tuple[float, float, float, float]:
    """Return the (4,) corners of a box as a `Mark` takes them."""
    x1, y1, x2, y2 = box.tolist()
    return x1, y1, x2, y2


@dataclass(frozen=True)
class Mark:
    """One box to draw.

    Attributes:
        box: x1, y1, x2, y2 in half-open pixels of the image.
        colour: of outline and tag.
        text: on the tag; empty for no tag.
        dashed: for what is not a detection: an object of the labels.
    """

    box: tuple[float, float, float, float]
    colour: Colour
    text: str = ""
    dashed: bool = False


def class_colours(n_classes: int) -> tuple[Colour, ...]:
    """Return one bright colour per class, neighbours far apart in hue, always the same."""
    colours = []
    for k in range(n_classes):
        value = 0.95 if k % 2 == 0 else 0.82
        r, g, b = colorsys.hsv_to_rgb((0.57 + k * _GOLDEN_ANGLE) % 1.0, 0.78, value)
        colours.append((round(255 * r), round(255 * g), round(255 * b)))
    return tuple(colours)


def draw_detections(
    image: Image,
    found: Detections,
    classes: Sequence[str],
    *,
    truth: GroundTruth | None = None,
    min_score: float | NDArray[np.floating] = -np.inf,
    longer_side: int | None = None,
) -> Image:
    """Draw the detections of one image, and its labels as dashed boxes when given.

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        found: what to draw; the surest lie on top.
        classes: K names.
        truth: labelled objects.
        min_score: detections with a score >= this are drawn; one value, or (K,) one per class.
        longer_side: see `draw_marks`.

    Returns:
        A new RGB image.
    """
    colours = class_colours(len(classes))
    marks = []
    if truth is not None:
        marks += [
            Mark(corners(box), _TRUTH, "" if len(found) else classes[label], dashed=True)
            for box, label in zip(truth.boxes, truth.labels, strict=True)
        ]
    limit = np.broadcast_to(np.asarray(min_score, np.float64), (len(classes),))
    shown = found[found.scores >= limit[found.labels]] if len(found) else found
    for box, score, label in list(zip(shown.boxes, shown.scores, shown.labels, strict=True))[::-1]:
        marks.append(Mark(corners(box), colours[label], f"{classes[label]} {score:.2f}"))
    return draw_marks(image, marks, longer_side=longer_side)


def draw_marks(image: Image, marks: Iterable[Mark], *, longer_side: int | None = None) -> Image:
    """Draw boxes with name tags; line and letter sizes follow the size of the picture.

    A tag stands above its box, or where that leaves the picture or covers another tag, inside or below.

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        marks: later ones lie on top.
        longer_side: of the result in pixels; the picture is scaled first, so that lines stay sharp. By
            default its own size, enlarged by a whole factor to at least 480 pixels.

    Raises:
        ConfigError: `longer_side` is below 1.
    """
    height, width = image.shape[:2]
    if longer_side is None:
        scale = float(max(1, -(-_LEGIBLE // max(height, width))))
    elif longer_side < 1:
        raise ConfigError(f"draw_marks: longer_side must be at least 1, got {longer_side}.")
    else:
        scale = longer_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = PillowImage.fromarray(image)
    if picture.size != size:
        picture = picture.resize(size, PillowImage.Resampling.LANCZOS)
    canvas = ImageDraw.Draw(picture)
    line = 2 + max(size) // 400
    font = _font(10 + max(size) // 75)
    scaled = [(mark, [value * scale for value in mark.box]) for mark in marks]
    for mark, (x1, y1, x2, y2) in scaled:
        left, top = round(x1), round(y1)
        right, bottom = max(round(x2) - 1, left), max(round(y2) - 1, top)
        _outline(canvas, (left, top, right, bottom), mark, line)
    tagged = [(mark, box) for mark, box in scaled if mark.text]
    places: list[_Place] = []
    for mark, box in reversed(tagged):  # the topmost choose first ...
        places.append(_free_place(box, mark.text, font, size, places))
    for (mark, _), place in zip(tagged, reversed(places), strict=True):  # ... and are drawn last
        _tag(canvas, place, mark, font)
    return np.asarray(picture)


def _outline(canvas: ImageDraw.ImageDraw, box: tuple[int, int, int, int], mark: Mark, line: int) -> None:
    x1, y1, x2, y2 = box
    shade = (0, 0, 0)
    canvas.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=shade)  # visible on any background
    if not mark.dashed:
        canvas.rectangle(box, outline=mark.colour, width=line)
        return
    canvas.rectangle(box, outline=shade, width=line)
    dash = 4 * line
    for x in range(x1, x2 + 1, 2 * dash):
        end = min(x + dash, x2)
        canvas.rectangle((x, y1, end, min(y1 + line - 1, y2)), fill=mark.colour)
        canvas.rectangle((x, max(y2 - line + 1, y1), end, y2), fill=mark.colour)
    for y in range(y1, y2 + 1, 2 * dash):
        end = min(y + dash, y2)
        canvas.rectangle((x1, y, min(x1 + line - 1, x2), end), fill=mark.colour)
        canvas.rectangle((max(x2 - line + 1, x1), y, x2, end), fill=mark.colour)


def _free_place(
    box: Sequence[float],
    text: str,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    taken: Sequence[_Place],
) -> _Place:
    """Return where the tag of a box can stand without covering another, or else above the box."""
    ascent, descent = font.getmetrics()
    margin = _margin(font)
    width, height = round(font.getlength(text)) + 2 * margin, ascent + descent + margin // 2
    x1, y1, _, y2 = (round(value) for value in box)
    left = max(0, min(x1, size[0] - width))
    places = []
    for top in (y1 - height, y1, y2, y2 - height, y1 + height):
        top = max(0, min(top, size[1] - height))
        places.append((left, top, left + width, top + height))
    return next((each for each in places if not any(_overlap(each, other) for other in taken)), places[0])


def _tag(canvas: ImageDraw.ImageDraw, place: _Place, mark: Mark, font: ImageFont.FreeTypeFont) -> None:
    canvas.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=mark.colour)
    red, green, blue = mark.colour
    ink = (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
    margin = _margin(font)
    canvas.text((place[0] + margin, place[1] + margin // 4), mark.text, fill=ink, font=font)


def _margin(font: ImageFont.FreeTypeFont) -> int:
    return max(2, font.getmetrics()[0] // 4)


def _overlap(a: _Place, b: _Place) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@functools.lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return the sans-serif font that matplotlib ships: the same letters on every machine."""
    try:
        import matplotlib
    except ImportError as error:
        raise DependencyError(
            f"Pictures are written in a font of matplotlib, which cannot be imported ({error}): "
            f"`pip install matplotlib`, or draw nothing (`--no-pictures`)."
        ) from error
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    return ImageFont.truetype(str(path), size)


def cut(image: Image, box: NDArray[np.float32]) -> tuple[Image, tuple[int, int, int, int]]:
    """Return the pixels of an (H, W, 3) image that a box touches, at least one, and their place."""
    height, width = image.shape[:2]
    x1, y1 = (int(value) for value in np.floor(box[:2]))
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    x2, y2 = (int(value) for value in np.ceil(box[2:]))
    x2, y2 = min(max(x2, x1 + 1), width), min(max(y2, y1 + 1), height)
    return image[y1:y2, x1:x2], (x1, y1, x2, y2)


def save_picture(path: Path, picture: Image) -> None:
    """Write an RGB picture as PNG, atomically.

    Raises:
        DataError: the folder cannot be written to.
        DiskSpaceError: the disk is full.
    """
    with atomic_path(path) as temporary:
        PillowImage.fromarray(picture).save(temporary, format="PNG")


@dataclass(frozen=True)
class PictureWriter:
    """A `formats.DetectionWriter` of `IMAGE.png`, the image with its detections drawn on it.

    Attributes:
        folder: where pictures go.
        classes: K names.
    """

    folder: Path
    classes: Sequence[str]

    def files(self, samples: Sequence[Sample]) -> list[Path]:
        """Return the picture of each image."""
        return [inside(self.folder, sample.image_id, ".png") for sample in samples]

    def add(self, sample: Sample, found: Detections) -> None:
        """Write the picture of an image."""
        drawn = draw_detections(sample.read(), found, self.classes)
        save_picture(self.files([sample])[0], drawn)

    def finish(self, images: Sequence[tuple[Sample, Detections]]) -> None:
        """Write nothing."""


@dataclass(frozen=True)
class CropWriter:
    """A `formats.DetectionWriter` of `crops/CLASS/IMAGE-1.png` and so on: the pixels of each detection.

    Those of an image and class are numbered from the surest on.

    Attributes:
        folder: where `crops` goes.
        classes: K names.
    """

    folder: Path
    classes: Sequence[str]

    def files(self, samples: Sequence[Sample]) -> list[Path]:
        """Return none: how many there will be is not known.

        Raises:
            ConfigError: an image is a crop itself.
        """
        crops = (self.folder / "crops").resolve()
        for sample in samples:
            if sample.path is not None and crops in sample.path.resolve().parents:
                raise ConfigError(
                    f"{sample.path}: must not lie in {self.folder / 'crops'}, where crops are written. "
                    f"Choose another --out."
                )
        return []

    def add(self, sample: Sample, found: Detections) -> None:
        """Write the crops of an image; what an earlier run had more of them goes."""
        pixels = sample.read() if len(found) else np.zeros((1, 1, 3), np.uint8)
        for k, name in enumerate(self.classes):
            folder = self.folder / "crops" / file_name(name)
            boxes = found.boxes[found.labels == k]
            for i, box in enumerate(boxes, start=1):
                crop = np.ascontiguousarray(cut(pixels, box)[0])
                save_picture(inside(folder, sample.image_id, f"-{i}.png"), crop)
            older = len(boxes) + 1
            while (path := inside(folder, sample.image_id, f"-{older}.png")).exists():
                remove_marker(path)
                older += 1

    def finish(self, images: Sequence[tuple[Sample, Detections]]) -> None:
        """Write nothing."""
