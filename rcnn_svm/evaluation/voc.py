"""Average precision as the Pascal VOC devkit computes it, in half-open pixels.

Detections meet objects once, in `match`; precision-recall curves, average precision, the bootstrap
and the analysis of errors all read the resulting `Matches`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import iou
from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.structures import Detections, GroundTruth

__all__ = [
    "FALSE",
    "HIT",
    "IGNORED",
    "RECALL_GRID",
    "RULE_NAMES",
    "Curve",
    "EvalResult",
    "Matches",
    "Rule",
    "average_precision",
    "evaluate_voc",
    "match",
    "mean_precision",
]

Rule: TypeAlias = Literal["voc07", "voc07-exact", "voc10"]
"""How a precision-recall curve becomes one number; see `average_precision`."""

RULE_NAMES: Mapping[Rule, str] = {
    "voc07": "Pascal VOC 2007 (11 points)",
    "voc07-exact": "Pascal VOC 2007 (11 exact points)",
    "voc10": "Pascal VOC 2010 (all points)",
}
"""What people call the rules."""

HIT, FALSE, IGNORED = 1, 0, -1
"""What a detection turned out to be: the values of `Matches.outcome`."""

# The grid of the reference implementations in Python, written as they write it: its fourth level is
# 0.30000000000000004, which a recall of 3/10 does not reach. "voc07-exact" counts in integers instead.
RECALL_GRID: NDArray[np.float64] = np.arange(0.0, 1.1, 0.1)


@dataclass(frozen=True, eq=False)
class Matches:
    """How the detections of a split met its objects: all that the measures need to know.

    The D detections are in order of class, then of falling score; ties keep the order of the images
    and, within an image, of its `Detections`.

    Attributes:
        classes: K class names.
        min_iou: a detection reaches an object when their IoU is >= `min_iou`.
        label: (D,) int64, class of the detection.
        score: (D,) float32.
        image: (D,) int64, position of its image in the split.
        row: (D,) int64, its row in the `Detections` of that image.
        overlap: (D,) float64, the largest IoU with an object of the class, difficult ones included.
        target: (D,) int64, the row of that object in the image's `GroundTruth`; -1 where there is none.
        outcome: (D,) int8: HIT, FALSE or IGNORED.
        n_objects: (n_images, K) int64, objects that count: neither difficult nor crowd.
    """

    classes: tuple[str, ...]
    min_iou: float
    label: NDArray[np.int64]
    score: NDArray[np.float32]
    image: NDArray[np.int64]
    row: NDArray[np.int64]
    overlap: NDArray[np.float64]
    target: NDArray[np.int64]
    outcome: NDArray[np.int8]
    n_objects: NDArray[np.int64]

    def of_class(self, index: int) -> slice:
        """Return where the detections of one class lie, surest first."""
        low, high = np.searchsorted(self.label, [index, index + 1])
        return slice(int(low), int(high))


@dataclass(frozen=True, eq=False)
class Curve:
    """Precision and recall of one class after each detection that counts, surest first.

    Attributes:
        recall: (M,) float64, rising; empty where the class has no object.
        precision: (M,) float64.
        scores: (M,) float32, falling.
    """

    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    scores: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class EvalResult:
    """Average precision of one detector on one split.

    All values are fractions in [0, 1]; `to_json` gives percent.

    Attributes:
        classes: K class names.
        rule: the one that `ap` and `map` use by default.
        n_positives: (K,) int64, objects that count.
        ap_11point: (K,) float64, rule "voc07"; nan where the class has no object.
        ap_11point_exact: (K,) float64, rule "voc07-exact".
        ap_all_point: (K,) float64, rule "voc10".
        curves: K precision-recall curves.
        matches: what the figures were computed from.
    """

    classes: tuple[str, ...]
    rule: Rule
    n_positives: NDArray[np.int64]
    ap_11point: NDArray[np.float64]
    ap_11point_exact: NDArray[np.float64]
    ap_all_point: NDArray[np.float64]
    curves: tuple[Curve, ...]
    matches: Matches

    def __repr__(self) -> str:
        size = f"{len(self.classes)} classes, {len(self.matches.n_objects)} images"
        return f"EvalResult({100 * self.map():.1f} mAP by {self.rule}: {size})"

    def ap(self, rule: Rule | None = None) -> NDArray[np.float64]:
        """Return (K,) average precision by `rule`; nan where the class has no object."""
        rule = self.rule if rule is None else rule
        _check_rule(rule)
        values = {
            "voc07": self.ap_11point,
            "voc07-exact": self.ap_11point_exact,
            "voc10": self.ap_all_point,
        }
        return values[rule]

    def map(self, rule: Rule | None = None) -> float:
        """Return the mean of `ap` over the classes that have objects; nan where none has."""
        ap = self.ap(rule)
        present = self.n_positives > 0
        return float(ap[present].mean()) if present.any() else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Return the figures, in percent, with null where a class has no object."""

        def percent(value: float) -> float | None:
            return None if np.isnan(value) else 100 * float(value)

        return {
            "rule": self.rule,
            "min_iou": self.matches.min_iou,
            "n_images": len(self.matches.n_objects),
            "n_detections": len(self.matches.label),
            "n_positives": dict(zip(self.classes, self.n_positives.tolist(), strict=True)),
            "measures": {
                rule: {
                    "mAP": percent(self.map(rule)),
                    "ap": dict(zip(self.classes, map(percent, self.ap(rule)), strict=True)),
                }
                for rule in get_args(Rule)
            },
        }


def evaluate_voc(
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    classes: Sequence[str],
    *,
    min_iou: float = 0.5,
    rule: Rule = "voc07",
) -> EvalResult:
    """Measure detections against the labels of a split by the rules of the VOC devkit.

    Detections of a class are pooled over the images and taken by falling score. Each looks at the
    object of its class in its image that it overlaps most (the first of equals), whether or not that
    object is taken already. With an IoU >= `min_iou` it is a hit if the object is free and false if
    an earlier detection took it; it is ignored if the object is difficult (or a COCO crowd). Below
    `min_iou` it is false.

    Args:
        detections: one record per image.
        truths: the labels of the same images in the same order.
        classes: K names that the labels index.
        min_iou: in (0, 1].
        rule: what `EvalResult.ap` and `.map` give by default; all three rules are computed.

    Raises:
        ShapeError: the two sequences differ in length, or a label is no class.
        ConfigError: `min_iou` or `rule` is impossible.

    References:
        VOC2007 devkit, VOCevaldet.m; with half-open boxes there is no `+ 1` on widths.

    Example:
        >>> truth = GroundTruth([[0, 0, 10, 10]], [0])
        >>> found = Detections("a", [[0, 0, 10, 8], [50, 50, 60, 60]], [0.9, 0.4], [0, 0])
        >>> evaluate_voc([found], [truth], ["apple"]).map("voc07")
        1.0
    """
    _check_rule(rule)
    matches = match(detections, truths, classes, min_iou=min_iou)
    n_positives = matches.n_objects.sum(axis=0)
    curves = []
    ap = {each: np.empty(len(matches.classes)) for each in get_args(Rule)}
    for k, n in enumerate(n_positives.tolist()):
        rows = matches.of_class(k)
        counted = matches.outcome[rows] != IGNORED
        hits = matches.outcome[rows][counted] == HIT
        for each in get_args(Rule):
            ap[each][k] = average_precision(hits, n, each)
        n_hits = np.cumsum(hits)
        recall = n_hits / n if n else np.zeros(0)
        precision = n_hits / np.arange(1, len(hits) + 1) if n else np.zeros(0)
        curves.append(Curve(recall, precision, matches.score[rows][counted][: len(recall)]))
    return EvalResult(
        matches.classes,
        rule,
        n_positives,
        ap["voc07"],
        ap["voc07-exact"],
        ap["voc10"],
        tuple(curves),
        matches,
    )


def match(
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    classes: Sequence[str],
    *,
    min_iou: float = 0.5,
) -> Matches:
    """Decide for every detection whether it is a hit, false or ignored; see `evaluate_voc`.

    Raises:
        ShapeError: the two sequences differ in length, or a label is no class.
        ConfigError: `min_iou` lies outside (0, 1].
    """
    if len(detections) != len(truths):
        raise ShapeError(
            f"match: there must be one Detections per image, got {len(detections)} for {len(truths)} images."
        )
    if not 0 < min_iou <= 1:
        raise ConfigError(f"match: min_iou must lie in (0, 1], got {min_iou}.")
    n_classes, n_images = len(classes), len(truths)
    n_objects = np.zeros((n_images, n_classes), np.int64)
    sizes = [len(found) for found in detections]
    overlap = np.zeros(sum(sizes))
    target = np.full(sum(sizes), -1)
    spared = np.zeros(sum(sizes), bool)  # the most overlapped object does not count
    start = 0
    for i, (found, truth) in enumerate(zip(detections, truths, strict=True)):
        _check_labels(found.labels, n_classes, f"Detections({found.image_id!r})")
        _check_labels(truth.labels, n_classes, f"GroundTruth of image {found.image_id!r}")
        ignored = truth.difficult | truth.crowd
        n_objects[i] = np.bincount(truth.labels[~ignored], minlength=n_classes)
        stop = start + len(found)
        if len(found) and len(truth):
            same = found.labels[:, None] == truth.labels[None, :]
            overlaps = np.where(same, iou(found.boxes, truth.boxes), -1.0)  # (M, G)
            best = overlaps.argmax(axis=1)
            best_iou = overlaps[np.arange(len(found)), best]
            overlap[start:stop] = np.maximum(best_iou, 0.0)
            target[start:stop] = np.where(best_iou > 0, best, -1)
            spared[start:stop] = ignored[best]
        start = stop

    label = _joined([found.labels for found in detections], np.int64)
    score = _joined([found.scores for found in detections], np.float32)
    image = np.repeat(np.arange(n_images), sizes)
    row = _joined([np.arange(size) for size in sizes], np.int64)
    order = np.lexsort((-score, label))  # stable: ties keep input order
    label, score, image, row = label[order], score[order], image[order], row[order]
    overlap, target, spared = overlap[order], target[order], spared[order]

    reached = overlap >= min_iou
    outcome = np.where(reached & spared, IGNORED, FALSE).astype(np.int8)
    rivals = np.flatnonzero(reached & ~spared)
    most_objects = max((len(truth) for truth in truths), default=0)
    _, first = np.unique(image[rivals] * most_objects + target[rivals], return_index=True)
    outcome[rivals[first]] = HIT
    return Matches(tuple(classes), min_iou, label, score, image, row, overlap, target, outcome, n_objects)


def average_precision(hits: NDArray[np.bool_], n_positives: int, rule: Rule) -> float:
    """Turn a ranked list of hits and false detections into one number.

    - "voc07": mean over the recall levels 0, 0.1 .. 1 of the best precision at that recall or above
      (0 where it is never reached), with the floating-point levels of the reference implementations.
    - "voc07-exact": the same with exact levels: recall 3/10 reaches 0.3.
    - "voc10": area under the precision-recall curve after making precision fall with recall.

    Args:
        hits: (M,) bool by falling score, ignored detections left out.
        n_positives: objects of the class that count.
        rule: see above.

    Returns:
        A fraction in [0, 1]; nan when there is no object.

    Raises:
        ConfigError: unknown rule.

    Example:
        >>> average_precision(np.array([True, False, True]), 2, "voc10")
        0.8333333333333333
    """
    _check_rule(rule)
    if n_positives == 0:
        return float("nan")
    if rule == "voc07":
        return mean_precision(hits, n_positives, RECALL_GRID)
    envelope = _envelope(hits)
    if rule == "voc10":
        return float(envelope.sum() / n_positives)
    n_hits = np.arange(1, len(envelope) + 1)
    first = np.searchsorted(10 * n_hits, np.arange(11) * n_positives, side="left")
    return float(np.append(envelope, 0.0)[first].mean())


def mean_precision(hits: NDArray[np.bool_], n_positives: int, levels: NDArray[np.float64]) -> float:
    """Return the mean over recall levels of the best precision at that recall or above, 0 beyond the last.

    Args:
        hits: (M,) bool by falling score, ignored detections left out.
        n_positives: objects of the class that count, one or more.
        levels: of recall; one is reached when hits / `n_positives`, in double precision, is >= it.
    """
    envelope = _envelope(hits)
    first = np.searchsorted(np.arange(1, len(envelope) + 1) / n_positives, levels, side="left")
    return float(np.append(envelope, 0.0)[first].mean())


def _envelope(hits: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the best precision at each hit or after it; in between it is never better."""
    at = np.flatnonzero(hits)
    precision = np.arange(1, len(at) + 1) / (at + 1)
    return np.maximum.accumulate(precision[::-1])[::-1]


def _check_rule(rule: str) -> None:
    if rule not in get_args(Rule):
        raise ConfigError(f"rule must be one of {', '.join(get_args(Rule))}, got {rule!r}.")


def _check_labels(labels: NDArray[np.int64], n_classes: int, where: str) -> None:
    if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
        raise ShapeError(
            f"{where}: labels must lie in 0 .. {n_classes - 1}, got {labels.min()} .. {labels.max()}."
        )


def _joined(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate([*parts, np.zeros(0, dtype)]).astype(dtype, copy=False)
