"""Selective search: the boxes of every region in several greedy groupings of an image.

The paper's fast and quality modes, as R-CNN ran them. How it works, and why it is fast:
docs/proposals.md. Numba is imported at the first search, not with this module.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.config import Count, Interval, Seed, check
from rcnn_svm.errors import ShapeError
from rcnn_svm.proposals.ranking import WEIGHTS, cues, diverse_order
from rcnn_svm.structures import Image, RegionSet

__all__ = ["ALGORITHM_VERSION", "Grouping", "SelectiveSearchConfig", "groupings", "selective_search"]

ALGORITHM_VERSION = 1
"""Raised whenever the same image and settings give other boxes; part of every cache key."""

Mode = Literal["fast", "quality"]
Ranking = Literal["paper", "diverse"]

# Colour spaces, thresholds k and similarity mixes: arXiv 1311.2524 by way of rbgirshick/rcnn,
# selective_search_boxes.m, and Uijlings et al., IJCV 2013, table 4.
_COLOURS = ("hsv", "lab", "rgi", "h", "intensity")
_THRESHOLDS = (50, 100, 150, 300)
_COLOUR, _TEXTURE, _SIZE, _FILL = 1, 2, 4, 8
_MIXES = (_COLOUR | _TEXTURE | _SIZE | _FILL, _TEXTURE | _SIZE | _FILL, _FILL, _SIZE)

# (space computed, its planes)
_PLANES = {
    "hsv": (0, (0, 1, 2)),
    "lab": (1, (0, 1, 2)),
    "rgi": (2, (0, 1, 2)),
    "h": (0, (0,)),
    "intensity": (2, (2,)),
}


@dataclass(frozen=True)
class SelectiveSearchConfig:
    """What a selective search does; the defaults are the paper's fast mode.

    Attributes:
        mode: `fast`: HSV and Lab, k = 50 and 100, two similarity mixes: 8 groupings. `quality`:
            also RGI, hue and intensity, k = 150 and 300, fill alone and size alone: 80 groupings.
        sigma: of the Gaussian blur before segmentation, in pixels.
        min_size: boxes with a width or height < `min_size` are dropped.
        ranking: `paper`: grouping position x a uniform random number. `diverse`: a fitted score, then
            boxes unlike those before them (`rcnn_svm.proposals.ranking`); more recall for few boxes.
        seed: of the random part of the paper's ranking.
        max_width: images wider than this are shrunk before the search and boxes scaled back;
            None (the paper's setting on Pascal VOC) never shrinks.
        max_regions: only the best so many boxes are returned; None returns all.
    """

    mode: Mode = "fast"
    sigma: Annotated[float, Interval(0, 10)] = 0.8
    min_size: Count = 20
    ranking: Ranking = "paper"
    seed: Seed = 0
    max_width: Count | None = None
    max_regions: Count | None = None

    def __post_init__(self) -> None:
        check(self, where="proposals")

    @property
    def colours(self) -> tuple[str, ...]:
        """The colour spaces that are segmented."""
        return _COLOURS[:2] if self.mode == "fast" else _COLOURS

    @property
    def thresholds(self) -> tuple[int, ...]:
        """The k of each segmentation, which is its smallest segment too."""
        return _THRESHOLDS[:2] if self.mode == "fast" else _THRESHOLDS

    @property
    def mixes(self) -> tuple[int, ...]:
        """The similarities of each grouping, as sums of 1 colour, 2 texture, 4 size, 8 fill."""
        return _MIXES[:2] if self.mode == "fast" else _MIXES

    def key(self) -> dict[str, Any]:
        """Return all that the boxes of an image depend on, as JSON-able values."""
        return {"proposer": "selective search", "version": ALGORITHM_VERSION, **dataclasses.asdict(self)}

    def whole(self) -> SelectiveSearchConfig:
        """Return the same settings without `max_regions`, which only cuts the list."""
        return dataclasses.replace(self, max_regions=None)

    def propose(self, image: Image) -> RegionSet:
        """Run `selective_search` with these settings."""
        return selective_search(image, self)


def selective_search(
    image: Image, config: SelectiveSearchConfig | None = None, *, image_id: str = ""
) -> RegionSet:
    """Propose the boxes of an image in which an object may be, best first.

    The same image, settings and seed give the same bytes, in any thread, on any run. The GIL is
    released almost throughout.

    Args:
        image: (H, W, 3) uint8 RGB, at least one pixel.
        config: settings; None stands for the paper's fast mode.
        image_id: carried into the result.

    Returns:
        The regions: boxes of whole pixels, unique, with both sides >= `config.min_size`, by
        rising priority: what the ranking multiplied, or under `diverse` the row number.

    Raises:
        ShapeError: the image is no uint8 (H, W, 3) array, or is empty.

    References:
        Uijlings et al., Selective Search for Object Recognition, IJCV 2013.
    """
    config = config or SelectiveSearchConfig()
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ShapeError(
            f"selective_search({image_id!r}): image must be uint8 (H, W, 3) with at least one pixel, "
            f"got {image.dtype} {image.shape}. Repeat a grey image three times, drop alpha."
        )
    size = image.shape[:2]
    boxes, order, priority, chosen = ranked_regions(image, config)
    priority = priority[chosen]
    if config.ranking == "diverse":
        score = cues(boxes, order, chosen, size) @ WEIGHTS
        chosen = chosen[diverse_order(boxes[chosen], score)]
        priority = np.arange(len(chosen), dtype=np.float64)
    chosen, priority = chosen[: config.max_regions], priority[: config.max_regions]
    return RegionSet(image_id, size, boxes[chosen].astype(np.float32), priority.astype(np.float32))


def ranked_regions(
    image: Image, config: SelectiveSearchConfig
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return the boxes of all groupings that are large enough, and the paper's choice among them.

    Returns:
        boxes: (M, 4), copies included.
        order: (M,) their position in their grouping, 1 = merged last.
        priority: (M,) position times a uniform random number.
        chosen: (R,) rows of the distinct boxes by rising priority.
    """
    height, width = image.shape[:2]
    scale = 1.0
    if config.max_width is not None and width > config.max_width:
        image, scale = _shrink(image, config.max_width)
    boxes, order = _all_regions(image, config)
    if scale != 1:
        boxes = np.rint(boxes * scale).astype(np.int32)
        boxes = np.minimum(boxes, np.array([width, height, width, height], np.int32))
    priority = order * _uniform(len(order), config.seed)
    large = ((boxes[:, 2:] - boxes[:, :2]) >= config.min_size).all(axis=1)
    boxes, order, priority = boxes[large], order[large], priority[large]
    ranked = np.argsort(priority, kind="stable")
    return boxes, order, priority, ranked[_first_of_each(boxes[ranked])]


@dataclass(frozen=True, eq=False)
class Grouping:
    """One hierarchy of regions of an image.

    Attributes:
        colour: the colour space.
        k: the threshold of the segmentation that it starts from.
        mix: the similarities, as a sum of 1 colour, 2 texture, 4 size, 8 fill.
        clusters: (H, W), groups of pixels that are never told apart.
        segments: the segment of each cluster, 0 .. n-1.
        segment_boxes: (n, 4).
        merged: (n - 1, 4), the box of each merge in order.
        parents: (n - 1, 2), the regions of each merge; the result takes the lower number.
    """

    colour: str
    k: int
    mix: int
    clusters: NDArray[np.int32]
    segments: NDArray[np.int32]
    segment_boxes: NDArray[np.int32]
    merged: NDArray[np.int32]
    parents: NDArray[np.int32]

    def labels(self, n_regions: int | None = None) -> NDArray[np.int32]:
        """Return (H, W), the region of each pixel when `n_regions` are left (None: the segments)."""
        n = len(self.segment_boxes)
        number = np.arange(n, dtype=np.int32)
        for low, high in self.parents[
            : n - max(n_regions, 1) if n_regions is not None and n_regions < n else 0
        ]:
            number[number == high] = low
        return number[self.segments[self.clusters]]


@functools.cache
def _keep_freed_blocks() -> None:
    """Make glibc keep memory that a search frees for the next one; elsewhere this does nothing.

    It hands large blocks back to the system at once, and every search would touch its 25 MB for the first
    time again: a fifth of its time went into page faults. Freeing one block just below 32 MB makes it keep
    blocks up to that size (mallopt(3), "dynamic mmap threshold"), as any array of that size would.
    """
    np.empty(31 << 20, np.uint8)


def groupings(image: Image, config: SelectiveSearchConfig) -> Iterator[Grouping]:
    """Yield every grouping of an image, by colour space, then threshold, then mix.

    This is all that a selective search computes; `selective_search` keeps the boxes. `max_width`
    does not apply.
    """
    from rcnn_svm.proposals import grouping, planes, segment

    _keep_freed_blocks()
    image = np.ascontiguousarray(image)
    height, width = image.shape[:2]
    taps = planes.smoothing_taps(config.sigma)
    linear, root = planes.lab_tables()
    raw: dict[int, NDArray[np.uint8]] = {}
    smoothed: dict[int, NDArray[np.float32]] = {}
    codes: dict[int, NDArray[np.uint32]] = {}
    for colour in config.colours:
        space, rows = _PLANES[colour]
        if space not in raw:
            raw[space] = np.empty((3, height, width), np.uint8)
            planes.colour_planes(image, space, linear, root, raw[space])
            smoothed[space] = np.empty((3, height, width), np.float32)
            codes[space] = np.empty((3, height, width), np.uint32)
            for c in range(3):
                planes.smooth(raw[space][c], taps, smoothed[space][c])
                planes.plane_codes(raw[space][c], smoothed[space][c], codes[space][c])
        chosen = slice(rows[0], rows[-1] + 1)
        clusters, *graph = segment.contract(smoothed[space][chosen], min(config.thresholds))
        segmentations = [segment.segment(*graph, k, k) for k in config.thresholds]
        # histograms are made once, of the cells in which all segmentations agree
        cells = segmentations[0][0].copy()
        n_cells = int(cells.max()) + 1
        for numbers, _ in segmentations[1:]:
            n_cells = grouping.refine(cells, n_cells, numbers)
        cell_boxes = np.empty((n_cells, 4), np.int32)
        cell_counts = np.empty((n_cells, grouping.CHANNEL_BINS * len(rows)), np.int32)
        grouping.describe(clusters, cells, codes[space][chosen], cell_boxes, cell_counts)
        for k, (numbers, pairs) in zip(config.thresholds, segmentations, strict=True):
            n = int(numbers.max()) + 1
            boxes = np.empty((n, 4), np.int32)
            counts = np.empty((n, cell_counts.shape[1]), np.int32)
            grouping.assemble(cells, numbers, cell_boxes, cell_counts, boxes, counts)
            for mix in config.mixes:
                merged = np.empty((n - 1, 4), np.int32)
                parents = np.empty((n - 1, 2), np.int32)
                grouping.group(pairs, boxes, counts, len(rows), height * width, mix, merged, parents)
                yield Grouping(colour, k, mix, clusters, numbers, boxes, merged, parents)


def _all_regions(
    image: Image, config: SelectiveSearchConfig
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Return boxes (M, 4) of every region of every grouping and their position, 1 = merged last."""
    boxes: list[NDArray[np.int32]] = []
    order: list[NDArray[np.int64]] = []
    for found in groupings(image, config):
        n = len(found.segment_boxes)
        boxes.append(found.merged)
        order.append(np.arange(n - 1, 0, -1))
        if found.mix == config.mixes[-1]:  # segments count once for all mixes, as in the authors' code
            boxes.append(found.segment_boxes)
            order.append(np.full(n, n))
    return np.concatenate(boxes), np.concatenate(order).astype(np.float64)


def _uniform(n: int, seed: int) -> NDArray[np.float64]:
    """Return n pseudo-random numbers in (0, 1], the same under every version of numpy (SplitMix64)."""
    with np.errstate(over="ignore"):
        step = np.uint64(0x9E3779B97F4A7C15)
        z = np.arange(1, n + 1, dtype=np.uint64) * step + np.uint64(seed % 2**64) * np.uint64(
            0xD1342543DE82EF95
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53


def _first_of_each(boxes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the rows of the first of each group of equal boxes, in order."""
    low = boxes[:, 0].astype(np.int64) << 32 | boxes[:, 1]
    high = boxes[:, 2].astype(np.int64) << 32 | boxes[:, 3]
    order = np.lexsort((high, low))  # stable: equal boxes stay in order
    low, high = low[order], high[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    return np.sort(order[fresh])


def _shrink(image: Image, width: int) -> tuple[Image, float]:
    """Resize to `width` by averaging areas; return the image and the factor back."""
    from rcnn_svm.opencv import cv2

    scale = image.shape[1] / width
    height = max(1, round(image.shape[0] / scale))
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(resized, np.uint8), scale
