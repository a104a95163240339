"""Where a detector is good: by size, shape and flags of objects, and in which images two detectors differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes, area
from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.coco import AREA_RANGES
from rcnn_svm.evaluation.voc import FALSE, HIT, Matches, Rule, average_precision
from rcnn_svm.structures import Detections, GroundTruth

__all__ = [
    "COCO_SIZES",
    "Breakdown",
    "Disagreement",
    "Grouping",
    "aspect_terciles",
    "break_down",
    "compare_images",
    "labelled_flags",
    "size_terciles",
]


_EVERY = -1
"""The group of what counts in all of them."""


@dataclass(frozen=True)
class Grouping:
    """How objects, and detections by their own boxes, are sorted into S groups by one number.

    Attributes:
        name: of the number.
        groups: S names, of the smallest numbers first.
        bounds: S - 1 numbers, not falling; one that equals a bound belongs to the group below it.
        of_objects: gives the numbers of G objects, (G,).
        of_boxes: gives the numbers of N boxes, (N,); None where boxes alone do not tell, and a false
            detection counts in every group.
    """

    name: str
    groups: tuple[str, ...]
    bounds: tuple[float, ...]
    of_objects: Callable[[GroundTruth], NDArray[np.float64]]
    of_boxes: Callable[[Boxes], NDArray[np.float64]] | None


def _size(truth: GroundTruth) -> NDArray[np.float64]:
    return truth.area


def _aspect(boxes: Boxes) -> NDArray[np.float64]:
    sides = boxes[:, 2:].astype(np.float64) - boxes[:, :2]
    aspect = np.full(len(boxes), np.inf)
    np.divide(sides[:, 0], sides[:, 1], out=aspect, where=sides[:, 1] > 0)
    return aspect


def _aspect_of_objects(truth: GroundTruth) -> NDArray[np.float64]:
    return _aspect(truth.boxes)


COCO_SIZES = Grouping(
    "COCO size",
    ("small", "medium", "large"),
    (AREA_RANGES["small"][1], AREA_RANGES["medium"][1]),
    _size,
    area,
)
"""Small up to 32 x 32, medium up to 96 x 96 square pixels, by `GroundTruth.area` and the area of a box. COCO
counts an object that is exactly so large in both groups, here it is in the smaller one."""


def size_terciles(truths: Sequence[GroundTruth]) -> Grouping:
    """Return the grouping by area into thirds of the objects that count.

    Raises:
        ConfigError: no object counts.
    """
    groups = ("smallest third", "middle third", "largest third")
    return Grouping("size", groups, _terciles(truths, _size), _size, area)


def aspect_terciles(truths: Sequence[GroundTruth]) -> Grouping:
    """Return the grouping by width over height into thirds of the objects that count.

    Raises:
        ConfigError: no object counts.
    """
    groups = ("tallest third", "middle third", "widest third")
    bounds = _terciles(truths, _aspect_of_objects)
    return Grouping("width / height", groups, bounds, _aspect_of_objects, _aspect)


def labelled_flags(truths: Sequence[GroundTruth]) -> list[Grouping]:
    """Return a grouping for each flag, such as `truncated`, that an object of a split has.

    An object of an image whose labels say nothing of it counts as one without.
    """
    names = sorted({name for truth in truths for name, flag in truth.flags.items() if flag.any()})
    return [Grouping(name, (f"not {name}", name), (0.5,), partial(_flag, name), None) for name in names]


def _flag(name: str, truth: GroundTruth) -> NDArray[np.float64]:
    return truth.flags[name].astype(np.float64) if name in truth.flags else np.zeros(len(truth))


def _terciles(
    truths: Sequence[GroundTruth], of_objects: Callable[[GroundTruth], NDArray[np.float64]]
) -> tuple[float, float]:
    values = np.concatenate([np.zeros(0), *(of_objects(t)[~(t.difficult | t.crowd)] for t in truths)])
    if not len(values):
        raise ConfigError("terciles: there must be objects that are neither difficult nor crowd, got none.")
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    return float(low), float(high)


@dataclass(frozen=True, eq=False)
class Breakdown:
    """Recall and average precision by groups of objects.

    Attributes:
        grouping: of S groups.
        classes: K class names.
        rule: of average precision.
        n_objects: (S, K) int64, objects that count.
        n_found: (S, K) int64, those of them that a detection hit, whatever its score.
        ap: (S, K) float64 fractions; nan where a class has no object of the group.
    """

    grouping: Grouping
    classes: tuple[str, ...]
    rule: Rule
    n_objects: NDArray[np.int64]
    n_found: NDArray[np.int64]
    ap: NDArray[np.float64]

    def recall(self) -> NDArray[np.float64]:
        """Return (S,) the share of the objects of each group that were found; nan where there is none."""
        n, found = self.n_objects.sum(axis=1), self.n_found.sum(axis=1)
        return np.where(n > 0, found / np.maximum(n, 1), np.nan)

    def map(self) -> NDArray[np.float64]:
        """Return (S,) the mean of AP over the classes that have objects of the group; nan where none has."""
        present = self.n_objects > 0
        total = np.where(present, self.ap, 0.0).sum(axis=1)
        n = present.sum(axis=1)
        return np.where(n > 0, total / np.maximum(n, 1), np.nan)

    def to_json(self) -> dict[str, Any]:
        """Return recall and AP by group, in percent, null where there is no object, and the bounds."""

        def percent(value: float) -> float | None:
            return None if np.isnan(value) else 100 * float(value)

        return {
            "by": self.grouping.name,
            "bounds": list(self.grouping.bounds),
            "rule": self.rule,
            "groups": {
                name: {
                    "n_objects": int(self.n_objects[s].sum()),
                    "recall": percent(self.recall()[s]),
                    "mAP": percent(self.map()[s]),
                    "ap": dict(zip(self.classes, map(percent, self.ap[s]), strict=True)),
                }
                for s, name in enumerate(self.grouping.groups)
            },
        }


def break_down(
    matches: Matches,
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    grouping: Grouping,
    *,
    rule: Rule = "voc07",
) -> Breakdown:
    """Measure each group of objects as if no other were there.

    Detections keep what they met. For the AP of a group, those that hit an object of another group are left
    out, as COCO does it for its area ranges, and so is a false one whose own box is of another group, where
    boxes tell. AP of groups is not the AP of the split shared out: with fewer objects among as many false
    detections it is lower.

    Args:
        matches: of the same detections and labels.
        detections: one record per image.
        truths: one record per image.
        grouping: of the objects.
        rule: of average precision.

    Raises:
        ConfigError: unknown rule.
    """
    n_groups, n_classes = len(grouping.groups), len(matches.classes)
    n_objects, n_found = (np.zeros((n_groups, n_classes), np.int64) for _ in range(2))
    group = np.full(len(matches.label), _EVERY)
    order = np.argsort(matches.image, kind="stable")
    of_image = np.searchsorted(matches.image[order], np.arange(len(truths) + 1))
    for i, (found, truth) in enumerate(zip(detections, truths, strict=True)):
        of_object = np.searchsorted(grouping.bounds, grouping.of_objects(truth), side="left")
        counted = ~(truth.difficult | truth.crowd)
        np.add.at(n_objects, (of_object[counted], truth.labels[counted]), 1)
        rows = order[of_image[i] : of_image[i + 1]]
        if grouping.of_boxes is not None:
            of_box = np.searchsorted(grouping.bounds, grouping.of_boxes(found.boxes), side="left")
            group[rows] = of_box[matches.row[rows]]
        hits = rows[matches.outcome[rows] == HIT]
        group[hits] = of_object[matches.target[hits]]
    hit, false = matches.outcome == HIT, matches.outcome == FALSE
    np.add.at(n_found, (group[hit], matches.label[hit]), 1)
    ap = np.empty((n_groups, n_classes))
    for k in range(n_classes):
        of_class = matches.of_class(k)
        for s in range(n_groups):
            own = (group[of_class] == s) | (group[of_class] == _EVERY)
            kept = (hit[of_class] | false[of_class]) & own
            ap[s, k] = average_precision(hit[of_class][kept], int(n_objects[s, k]), rule)
    return Breakdown(grouping, matches.classes, rule, n_objects, n_found, ap)


@dataclass(frozen=True, eq=False)
class Disagreement:
    """What two detectors found in each image, from where the first is furthest ahead to where the second is.

    An image is worth the objects that are found in it less its false alarms; ties keep the order of images.

    Attributes:
        image: (I,) int64, position of each image of the split, in the order told.
        n_objects: (I,) int64, objects that count.
        found: (I, 2) int64, those that the first and the second detector found.
        only: (I, 2) int64, those that it found and the other did not.
        false_alarms: (I, 2) int64.
    """

    image: NDArray[np.int64]
    n_objects: NDArray[np.int64]
    found: NDArray[np.int64]
    only: NDArray[np.int64]
    false_alarms: NDArray[np.int64]

    def ahead(self) -> NDArray[np.int64]:
        """Return (I,) by how much an image is worth more to the first detector; falling."""
        worth = self.found - self.false_alarms
        return worth[:, 0] - worth[:, 1]


def compare_images(
    first: tuple[Matches, NDArray[np.floating]], second: tuple[Matches, NDArray[np.floating]]
) -> Disagreement:
    """Compare what two detectors believe, image by image.

    Args:
        first: matches of all detections, and the (K,) scores from which on they are believed.
        second: of the other detector, on the same split.

    Raises:
        ConfigError: the matches are of different splits or classes.
    """
    truth, others = first[0], second[0]
    if truth.classes != others.classes or not np.array_equal(truth.n_objects, others.n_objects):
        raise ConfigError(
            "compare_images: both must be of one split, but they differ in classes or objects. Evaluate both "
            "on the same images."
        )
    n_images = len(truth.n_objects)
    objects, false_alarms = [], []
    for matches, least in (first, second):
        believed = matches.score >= least[matches.label]
        hits = believed & (matches.outcome == HIT)
        objects.append(set(zip(matches.image[hits].tolist(), matches.target[hits].tolist(), strict=True)))
        wrong = matches.image[believed & (matches.outcome == FALSE)]
        false_alarms.append(np.bincount(wrong, minlength=n_images))

    def per_image(found: set[tuple[int, int]]) -> NDArray[np.int64]:
        return np.bincount(np.array([image for image, _ in found], np.int64), minlength=n_images)

    a, b = objects
    unsorted = Disagreement(
        np.arange(n_images),
        truth.n_objects.sum(axis=1),
        np.stack([per_image(a), per_image(b)], axis=1),
        np.stack([per_image(a - b), per_image(b - a)], axis=1),
        np.stack(false_alarms, axis=1),
    )
    order = np.argsort(-unsorted.ahead(), kind="stable")
    return Disagreement(
        order, *(getattr(unsorted, name)[order] for name in ("n_objects", "found", "only", "false_alarms"))
    )
