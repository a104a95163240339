"""Digits from what scikit-learn ships: in scenes, an embedded detection data set, and as whole images.

Real handwritten digits (8 x 8 pixels, Alpaydin and Kaynak, UCI 1998) are upsampled to smooth strokes and
painted onto crops of scikit-learn's two sample photographs, among things that are no digits. No file is
downloaded or kept. Image i of a split depends on (seed, split, i) alone, and the splits share neither a
handwritten digit nor a background pixel.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes, area
from rcnn_svm.datasets.loading import Splits, divide
from rcnn_svm.errors import ConfigError
from rcnn_svm.structures import Dataset, GroundTruth, Image, Sample

__all__ = [
    "DIGIT_CLASSES",
    "DIGIT_SIZE",
    "digits_images",
    "digits_in_scenes",
    "digits_splits",
    "single_digits",
]

DIGIT_CLASSES = tuple("0123456789")
DIGIT_SIZE = (240, 320)
"""(height, width) of every scene."""


@dataclass(frozen=True)
class _Difficulty:
    """What makes scenes hard. Ranges are (low, high), drawn uniformly, sizes in pixels."""

    n_digits: tuple[int, int] = (1, 6)
    height: tuple[float, float] = (30, 84)  # of a digit, drawn uniformly in its logarithm
    aspect: tuple[float, float] = (0.8, 1.25)
    rotation: float = 12.0  # degrees either way: far from turning a 6 into a 9
    shear: float = 0.15
    stroke: tuple[float, float] = (0.44, 0.54)  # threshold of the ink: low is bold
    max_cover: float = 0.12  # of the smaller of two boxes by their intersection
    opacity: tuple[float, float] = (0.8, 1.0)
    min_contrast: tuple[float, float] = (75, 120)  # distance to the mean colour beneath, of 255
    n_impostors: tuple[int, int] = (0, 1)  # mirrored and scrambled digits, letters
    n_shapes: tuple[int, int] = (0, 4)  # lines, arcs, blobs and rectangles beneath
    n_scratches: tuple[int, int] = (0, 1)  # thin lines across everything
    background_blur: float = 2.0  # largest sigma
    blur: float = 1.0  # largest sigma over the finished scene
    noise: tuple[float, float] = (2.0, 8.0)  # sigma, of 255


_DIFFICULTY = _Difficulty()


@dataclass(frozen=True)
class _Part:
    """What a split may use: digits by index, and a column band of both photographs by share of width.

    The digits come in the order in which writers filled their forms, so that ranges also part writers.
    """

    code: int
    digits: tuple[int, int]
    band: tuple[float, float]


_PARTS = {
    "train": _Part(0, (0, 1078), (0.0, 0.42)),
    "val": _Part(1, (1078, 1348), (0.42, 0.62)),
    "test": _Part(2, (1348, 1797), (0.62, 1.0)),
}

_FIELD = 48  # side of an ink field: 8 x 8 pixels in a frame of 2, four times enlarged
_INK = 32.0  # of which the digit's own pixels take so much
_BOX_ALPHA = 0.5  # ink counts as visible above
_KEPT = 1000  # scenes in memory, a quarter of a megabyte each: a copy takes a hundredth of the rendering
_MARGIN = 1  # pixels between a box and the edge of the scene

# Strokes of capitals that resemble no digit in any hand: polylines in a unit square.
_LETTERS: tuple[tuple[tuple[tuple[float, float], ...], ...], ...] = (
    (((0, 1), (0.5, 0), (1, 1)), ((0.22, 0.6), (0.78, 0.6))),  # A
    (((1, 0), (0, 0), (0, 1), (1, 1)), ((0, 0.5), (0.8, 0.5))),  # E
    (((1, 0), (0, 0), (0, 1)), ((0, 0.5), (0.8, 0.5))),  # F
    (((0, 0), (0, 1)), ((1, 0), (1, 1)), ((0, 0.5), (1, 0.5))),  # H
    (((0, 0), (0, 1)), ((1, 0), (0, 0.55), (1, 1))),  # K
    (((0, 1), (0, 0), (0.5, 0.6), (1, 0), (1, 1)),),  # M
    (((0, 1), (0, 0), (1, 1), (1, 0)),),  # N
    (((0, 0), (1, 0)), ((0.5, 0), (0.5, 1))),  # T
    (((0, 0), (0.25, 1), (0.5, 0.4), (0.75, 1), (1, 0)),),  # W
    (((0, 0), (1, 1)), ((1, 0), (0, 1))),  # X
    (((0, 0), (0.5, 0.5), (1, 0)), ((0.5, 0.5), (0.5, 1))),  # Y
)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_MIRRORED = (3, 4, 6, 7, 9)  # digits whose mirror image is none
_SCRAMBLED = (0, 2, 3, 4, 5, 6, 8, 9)  # digits whose quarters, exchanged crosswise, make none


@dataclass(frozen=True)
class _Assets:
    """Read-only raw material.

    Attributes:
        ink: (1797, 48, 48) float32 in [0, 1], smoothly upsampled digits.
        labels: (1797,) int64.
        letters: (n, 48, 48) float32 in [0, 1].
        photographs: uint8 (H, W, 3) RGB each.
    """

    ink: NDArray[np.float32]
    labels: NDArray[np.int64]
    letters: NDArray[np.float32]
    photographs: tuple[Image, ...]


@dataclass(frozen=True)
class _Glyph:
    """Ink at its place in a scene.

    Attributes:
        ink: (48, 48) field.
        matrix: (2, 3) from the field to the patch.
        corner: (x, y) of the patch in the scene.
        shape: (width, height) of the patch.
        level: threshold of the ink.
        softness: half the width of the threshold's ramp.
    """

    ink: NDArray[np.float32]
    matrix: NDArray[np.float64]
    corner: tuple[int, int]
    shape: tuple[int, int]
    level: float
    softness: float

    def alpha(self) -> NDArray[np.float32]:
        """Return the (h, w) coverage of the patch in [0, 1]."""
        from rcnn_svm.opencv import cv2

        warped = cv2.warpAffine(self.ink, self.matrix, self.shape, flags=cv2.INTER_LINEAR)
        ramp = (warped - np.float32(self.level - self.softness)) / np.float32(2 * self.softness)
        coverage: NDArray[np.float32] = np.clip(ramp, 0, 1)
        return coverage


def digits_in_scenes(split: str, n_images: int, *, seed: int = 0) -> Dataset:
    """Return `n_images` scenes of a split; boxes are known at once, pixels are rendered when first read.

    A box is the tight box of a digit's ink (coverage above one half) before others are painted over it.
    Scenes have 1 to 6 digits of varied size, slant, stroke, colour and contrast, and as distractors
    mirrored and scrambled digits, letters, lines and blobs.

    Args:
        split: `train`, `val` or `test`; they share neither digits nor background pixels.
        n_images: 1 or more; a longer data set begins with the shorter one.
        seed: 0 or more.

    Raises:
        ConfigError: an unknown split, or a number out of range.
    """
    if split not in _PARTS:
        raise ConfigError(f"digits_in_scenes: split must be one of {', '.join(_PARTS)}, got {split!r}.")
    if n_images < 1:
        raise ConfigError(f"digits_in_scenes: n_images must be 1 or more, got {n_images}.")
    if seed < 0:
        raise ConfigError(f"digits_in_scenes: seed must be 0 or more, got {seed}.")
    samples = []
    for i in range(n_images):
        _, truth = _layout(split, seed, i)
        render = functools.partial(_pixels, split, seed, i)
        samples.append(Sample(f"{split}-{i:05d}", DIGIT_SIZE, truth, render=render))
    return Dataset("digits", split, DIGIT_CLASSES, tuple(samples))


def digits_splits(n_train: int, n_val: int, n_test: int, *, seed: int = 0) -> Splits:
    """Return digits in scenes as train, val, trainval and test.

    Raises:
        ConfigError: a number out of range.
    """
    train = digits_in_scenes("train", n_train, seed=seed)
    val = digits_in_scenes("val", n_val, seed=seed)
    trainval = Dataset("digits", "trainval", DIGIT_CLASSES, train.samples + val.samples)
    return Splits(train, val, trainval, digits_in_scenes("test", n_test, seed=seed))


def digits_images(*, seed: int = 0, max_images: int | None = None) -> Splits:
    """Return the 1797 digits themselves, 8 x 8 pixels each, as whole images of ten classes.

    They are divided at random, so that digits of one writer are in several parts.

    Args:
        seed: of the division into 60 % train, 20 % val and 20 % test.
        max_images: at most so many images of train, val and test each, drawn likewise.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    ink = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    samples = []
    for i, (pixels, label) in enumerate(zip(ink, digits.target.tolist(), strict=True)):
        truth = GroundTruth(np.array([[0, 0, 8, 8]], np.float32), np.array([label]))
        render = functools.partial(np.repeat, pixels[:, :, None], 3, axis=2)
        samples.append(Sample(f"digit-{i:04d}", (8, 8), truth, render=render))
    whole = Dataset("digits-images", "all", DIGIT_CLASSES, tuple(samples), whole=True)
    return divide(whole, seed=seed, max_images=max_images)


def single_digits(*splits: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the handwritten digits that scenes of some splits are painted from, as scikit-learn has them.

    Args:
        splits: some of `train`, `val`, `test`. Each has writers of its own.

    Returns:
        (N, 8, 8) ink in [0, 1], and (N,) labels.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = np.concatenate([np.arange(*_PARTS[split].digits) for split in splits])
    return (digits.images[rows] / 16).astype(np.float32), digits.target[rows].astype(np.int64)


@functools.cache
def _assets() -> _Assets:
    from sklearn.datasets import load_digits, load_sample_images

    from rcnn_svm.opencv import cv2

    digits = load_digits()
    framed = np.pad((digits.images / 16).astype(np.float32), ((0, 0), (2, 2), (2, 2)))
    ink = np.stack([cv2.resize(one, (_FIELD, _FIELD), interpolation=cv2.INTER_CUBIC) for one in framed])
    letters = np.zeros((len(_LETTERS), _FIELD, _FIELD), np.float32)
    first = (_FIELD - _INK) / 2
    for letter, strokes in zip(letters, _LETTERS, strict=True):
        for stroke in strokes:
            # Letters as narrow and as blurred as the digits, so that neither tells them apart.
            points = np.array(stroke) * (0.6 * _INK, 0.9 * _INK) + (first + 0.2 * _INK, first + 0.05 * _INK)
            cv2.polylines(letter, [points.round().astype(np.int32)], False, 1.0, 4, cv2.LINE_AA)
        letter[:] = np.minimum(cv2.GaussianBlur(letter, (0, 0), 1.8) * 1.2, 1)
    photographs = tuple(np.asarray(image, np.uint8) for image in load_sample_images().images)
    return _Assets(ink, digits.target.astype(np.int64), letters, photographs)


def _rng(split: str, seed: int, index: int, stage: int) -> np.random.Generator:
    return np.random.default_rng([seed, _PARTS[split].code, index, stage])


def _layout(split: str, seed: int, index: int) -> tuple[list[_Glyph], GroundTruth]:
    """Place the impostors and then the digits of one scene; truth covers the digits."""
    rng, hard, assets = _rng(split, seed, index, 0), _DIFFICULTY, _assets()
    first, last = _PARTS[split].digits
    pool = assets.labels[first:last]
    digits: list[_Glyph] = []
    impostors: list[_Glyph] = []
    boxes = np.zeros((0, 4), np.float32)
    labels = []

    def one_of(classes: tuple[int, ...]) -> tuple[int, NDArray[np.float32]]:
        label = int(rng.choice(classes))
        return label, assets.ink[first + rng.choice(np.flatnonzero(pool == label))]

    for _ in range(rng.integers(*hard.n_digits, endpoint=True)):
        label, ink = one_of(tuple(range(10)))
        placed = _place(ink, boxes, rng)
        if placed is not None:
            digits.append(placed[0])
            boxes = np.concatenate([boxes, placed[1][None]])
            labels.append(label)
    taken = boxes
    for _ in range(rng.integers(*hard.n_impostors, endpoint=True)):
        kind = rng.integers(3)
        if kind == 0:
            ink = np.ascontiguousarray(one_of(_MIRRORED)[1][:, ::-1])
        elif kind == 1:
            frame = int(_FIELD - _INK) // 2
            core = one_of(_SCRAMBLED)[1][frame:-frame, frame:-frame]
            ink = np.pad(np.roll(core, (int(_INK) // 2, int(_INK) // 2), (0, 1)), frame)
        else:
            ink = assets.letters[rng.integers(len(assets.letters))]
        placed = _place(ink, taken, rng)
        if placed is not None:
            impostors.append(placed[0])
            taken = np.concatenate([taken, placed[1][None]])
    return impostors + digits, GroundTruth(boxes, np.array(labels, np.int64))


def _place(
    ink: NDArray[np.float32], taken: Boxes, rng: np.random.Generator
) -> tuple[_Glyph, NDArray[np.float32]] | None:
    """Draw a shape for `ink` and a place that covers little of the boxes in `taken`; None if none is found.

    Returns:
        The glyph and its box (4,) in scene pixels, whole numbers.
    """
    hard = _DIFFICULTY
    size = math.exp(rng.uniform(*np.log(hard.height)))
    scale, aspect = size / _INK, rng.uniform(*hard.aspect)
    turn = math.radians(rng.uniform(-hard.rotation, hard.rotation))
    shear = rng.uniform(-hard.shear, hard.shear)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    linear = (
        rotation
        @ np.array([[1, shear], [0, 1]])
        @ np.diag([scale * math.sqrt(aspect), scale / math.sqrt(aspect)])
    )
    half = np.abs(linear) @ np.full(2, _FIELD / 2)
    width, height = (2 * np.ceil(half) + 1).astype(int).tolist()
    centre = np.array([width, height]) / 2 + rng.uniform(-0.5, 0.5, 2)
    matrix = np.column_stack([linear, centre - linear @ np.full(2, _FIELD / 2)])
    # A ramp a little softer than a pixel, so that loops too narrow for the threshold still show as a shade.
    softness = min(0.3, max(0.16, 4.5 / size))
    glyph = _Glyph(ink, matrix, (0, 0), (width, height), rng.uniform(*hard.stroke), softness)
    visible = glyph.alpha() > _BOX_ALPHA
    columns, rows = np.flatnonzero(visible.any(0)), np.flatnonzero(visible.any(1))
    if len(columns) < 4 or len(rows) < 8:
        return None
    x1, y1, x2, y2 = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    scene_height, scene_width = DIGIT_SIZE
    for _ in range(40):
        x = int(rng.integers(_MARGIN, scene_width - _MARGIN - (x2 - x1), endpoint=True))
        y = int(rng.integers(_MARGIN, scene_height - _MARGIN - (y2 - y1), endpoint=True))
        box = np.array([x, y, x + x2 - x1, y + y2 - y1], np.float32)
        if _cover(box, taken) <= hard.max_cover:
            placed = _Glyph(ink, matrix, (x - x1, y - y1), glyph.shape, glyph.level, glyph.softness)
            return placed, box
    return None


def _cover(box: NDArray[np.float32], taken: Boxes) -> float:
    """Return the largest share of the smaller box that `box` and one of `taken` have in common."""
    if not len(taken):
        return 0.0
    sides = np.minimum(box[2:], taken[:, 2:]) - np.maximum(box[:2], taken[:, :2])
    shared = np.maximum(sides, 0).prod(axis=1)
    return float((shared / np.minimum(area(box[None]), area(taken))).max())


def _pixels(split: str, seed: int, index: int) -> Image:
    """Return the pixels of one scene, the caller's own."""
    return _render(split, seed, index).copy()


@functools.lru_cache(maxsize=_KEPT)
def _render(split: str, seed: int, index: int) -> Image:
    """Return the pixels of one scene."""
    from rcnn_svm.opencv import cv2

    rng, hard = _rng(split, seed, index, 1), _DIFFICULTY
    glyphs, _ = _layout(split, seed, index)
    scene = _background(_PARTS[split].band, rng)
    overlay = scene.copy()
    for _ in range(rng.integers(*hard.n_shapes, endpoint=True)):
        _draw_shape(overlay, rng)
    share = rng.uniform(0.5, 0.95)
    scene += np.float32(share) * (overlay - scene)
    for glyph in glyphs:
        _paint(scene, glyph, rng)
    for _ in range(rng.integers(*hard.n_scratches, endpoint=True)):
        ends = rng.uniform(0, 1, (2, 2)) * DIGIT_SIZE[::-1]
        start, end = ((int(x), int(y)) for x, y in ends)
        cv2.line(scene, start, end, _colour(rng), 1, cv2.LINE_AA)
    sigma = rng.uniform(0, hard.blur)
    if sigma > 0.3:  # less is invisible
        cv2.GaussianBlur(scene, (0, 0), sigma, dst=scene)
    scene += rng.standard_normal(scene.shape, np.float32) * np.float32(rng.uniform(*hard.noise))
    pixels: Image = np.clip(scene + 0.5, 0, 255).astype(np.uint8)
    return pixels


def _background(band: tuple[float, float], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a crop of one photograph's band, flipped, tinted, faded and blurred: float32 (H, W, 3)."""
    from rcnn_svm.opencv import cv2

    photograph = _assets().photographs[rng.integers(len(_assets().photographs))]
    left, right = (round(share * photograph.shape[1]) for share in band)
    region = photograph[:, left:right]
    height, width = DIGIT_SIZE
    largest = min(region.shape[0] / height, region.shape[1] / width)
    zoom = rng.uniform(0.55, 1.0) * largest
    crop_height, crop_width = int(zoom * height), int(zoom * width)
    y = int(rng.integers(region.shape[0] - crop_height, endpoint=True))
    x = int(rng.integers(region.shape[1] - crop_width, endpoint=True))
    crop = region[y : y + crop_height, x : x + crop_width]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    scene = cv2.resize(np.ascontiguousarray(crop), (width, height), interpolation=cv2.INTER_CUBIC)
    sigma = rng.uniform(0, _DIFFICULTY.background_blur)
    if sigma > 0.3:
        scene = cv2.GaussianBlur(scene, (0, 0), sigma)
    tint = rng.uniform(0.75, 1.25, 3)
    contrast, middle = rng.uniform(0.5, 1.1), rng.uniform(90, 165)
    tinted = (scene.astype(np.float32) * tint - 128) * contrast + middle
    return np.clip(tinted, 0, 255).astype(np.float32)


def _colour(rng: np.random.Generator) -> tuple[float, float, float]:
    """Draw an RGB colour, rather lively than grey."""
    hue, saturation, value = rng.random(), rng.uniform(0.15, 0.95), rng.uniform(0.1, 1.0)
    # The usual hexagon: each channel falls off with its distance from the hue.
    wheel = np.clip(np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    red, green, blue = (255 * value * (1 - saturation + saturation * wheel)).tolist()
    return red, green, blue


def _draw_shape(scene: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Draw a line, an arc, a blob or a rectangle into `scene`."""
    from rcnn_svm.opencv import cv2

    height, width = DIGIT_SIZE
    x, y = int(rng.integers(width)), int(rng.integers(height))
    colour, thickness = _colour(rng), int(rng.integers(2, 8))
    extent = rng.uniform(10, 60, 2)
    a, b = int(extent[0]), int(extent[1])
    turn = float(rng.uniform(0, 180))
    kind = int(rng.integers(5))
    if kind == 0:
        dx, dy = (rng.uniform(-1, 1, 2) * 120).astype(int).tolist()
        cv2.line(scene, (x, y), (x + dx, y + dy), colour, thickness, cv2.LINE_AA)
    elif kind == 1:
        span = float(rng.uniform(60, 200))
        cv2.ellipse(scene, (x, y), (a, b), turn, 0, span, colour, thickness, cv2.LINE_AA)
    elif kind == 2:
        cv2.ellipse(scene, (x, y), (a // 2, b // 2), turn, 0, 360, colour, -1, cv2.LINE_AA)
    else:
        corners = cv2.boxPoints(((float(x), float(y)), (float(a), float(b)), turn)).round().astype(np.int32)
        if kind == 3:
            cv2.fillConvexPoly(scene, corners, colour, cv2.LINE_AA)
        else:
            cv2.polylines(scene, [corners], True, colour, thickness // 2 + 1, cv2.LINE_AA)


def _paint(scene: NDArray[np.float32], glyph: _Glyph, rng: np.random.Generator) -> None:
    """Lay one glyph on the scene, in two shades of a colour that its ground contrasts with."""
    hard = _DIFFICULTY
    alpha = glyph.alpha()
    (left, top), (width, height) = glyph.corner, glyph.shape
    x1, y1 = max(left, 0), max(top, 0)
    x2, y2 = min(left + width, scene.shape[1]), min(top + height, scene.shape[0])
    alpha = alpha[y1 - top : y2 - top, x1 - left : x2 - left, None]
    ground = scene[y1:y2, x1:x2]
    mean = (ground * alpha).sum(axis=(0, 1)) / alpha.sum()
    wanted = rng.uniform(*hard.min_contrast)
    colour = _contrasting(mean, wanted, rng)
    shade = np.clip(colour * rng.uniform(0.75, 1.2), 0, 255)
    slope = np.linspace(0, 1, y2 - y1, dtype=np.float32)[:, None, None]
    fill = colour * (1 - slope) + shade * slope  # (h, 1, 3)
    cover = alpha * np.float32(rng.uniform(*hard.opacity))
    ground += cover * (fill - ground)


def _contrasting(mean: NDArray[np.floating], wanted: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw a colour whose luma is `wanted` or more away from that of `mean`; after 20 draws the best one."""
    best, furthest = np.zeros(3, np.float32), -1.0
    for _ in range(20):
        colour = np.array(_colour(rng), np.float32)
        distance = abs(float((colour - mean) @ _LUMA))
        if distance > furthest:
            best, furthest = colour, distance
        if distance >= wanted:
            break
    return best
