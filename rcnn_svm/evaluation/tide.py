"""What each kind of mistake costs: the six error types of TIDE, and the AP that mending each would bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import iou
from rcnn_svm.errors import ShapeError
from rcnn_svm.evaluation.coco import share_inside
from rcnn_svm.evaluation.voc import mean_precision
from rcnn_svm.structures import Detections, GroundTruth

__all__ = ["SPECIAL_TYPES", "TIDE_TYPES", "TideResult", "evaluate_tide"]

TIDE_TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")
"""In the order of the reference implementation: Cls, Loc, Both, Dupe, Bkg, Miss."""
SPECIAL_TYPES = ("false positives", "false negatives")
"""What all false detections, and all objects that were not found, cost: FalsePos and FalseNeg."""

_CLASSIFICATION, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND, _MISSED = range(len(TIDE_TYPES))
_FOREGROUND_IOU = 0.5
_BACKGROUND_IOU = 0.1
_MAX_DETECTIONS = 100
_RECALL_GRID = np.arange(101) / 100


@dataclass(frozen=True, eq=False)
class TideResult:
    """The mistakes of a detector on a split, and what each type of them costs.

    AP is a fraction in [0, 1]: the mean precision at 101 levels of recall, at IoU 0.5.

    Attributes:
        classes: K class names.
        ap: (K,) float64; nan where the class has no object.
        mended: by type, of `TIDE_TYPES` and `SPECIAL_TYPES`: (K,) AP with all mistakes of that type mended
            and no other; nan where the class has no object, or nothing is left of it.
        counts: (K, 6) int64, mistakes by the class of the detection, in the last column of the object.
        image: (E,) int64, position of the image of each mistake.
        row: (E,) int64, its row in that image's `Detections`; of one that was missed, in its `GroundTruth`.
        kind: (E,) int64, index into `TIDE_TYPES`.
    """

    classes: tuple[str, ...]
    ap: NDArray[np.float64]
    mended: Mapping[str, NDArray[np.float64]]
    counts: NDArray[np.int64]
    image: NDArray[np.int64]
    row: NDArray[np.int64]
    kind: NDArray[np.int64]

    def map(self) -> float:
        """Return the mean of `ap` over the classes that have objects; nan where none has."""
        return _mean(self.ap)

    def costs(self) -> dict[str, float]:
        """Return dAP by type: how much mAP rises when all mistakes of the type are mended.

        As in the reference implementation, it is never below 0 for the six types. They do not add up to what
        is missing to an AP of 1.
        """
        gains = {name: _mean(ap) - self.map() for name, ap in self.mended.items()}
        return {name: max(gain, 0.0) if name in TIDE_TYPES else gain for name, gain in gains.items()}

    def to_json(self) -> dict[str, Any]:
        """Return mAP, dAP by type, in percent, null where there is no object, and the counts by class."""
        return {
            "mAP": _percent(self.map()),
            "dAP": {name: _percent(cost) for name, cost in self.costs().items()},
            "counts": {
                name: dict(zip(TIDE_TYPES, self.counts[k].tolist(), strict=True))
                for k, name in enumerate(self.classes)
            },
        }


def evaluate_tide(
    detections: Sequence[Detections], truths: Sequence[GroundTruth], classes: Sequence[str]
) -> TideResult:
    """Sort mistakes into the types of TIDE and measure what mending each type would bring.

    In each image its 100 surest detections take, by falling score, the free object of their class that they
    overlap most (the first of equals) with IoU >= 0.5. One that gets none is left out of AP where it
    overlaps a difficult object of its class with IoU >= 0.5, or at least half of it lies in a crowd of its
    class. Any other is a mistake, of the first of these types that fits:

    - *localisation*: its largest IoU with an object of its class lies in [0.1, 0.5];
    - *classification*: IoU >= 0.5 with an object of another class;
    - *duplicate*: IoU >= 0.5 with an object of its class that another detection took;
    - *background*: IoU <= 0.1 with every object;
    - *both*: the rest: loose, and of another class.

    *missed* is an object that no detection took and no mistake of the first two types is about. Mending takes
    duplicates, background and both away, and objects that were missed off the number of objects. The surest
    mistake of localisation or classification about a free object becomes a hit of the object's class, its
    score kept; others about the same object are taken away. Without *false positives* every hit stands
    before every false detection; without *false negatives* only objects that were found count.

    Args:
        detections: one record per image.
        truths: the labels of the same images in the same order.
        classes: K names that the labels index.

    Raises:
        ShapeError: the sequences differ in length, or a label is no class.

    References:
        Bolya, Foley, Hays, Hoffman, "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV
        2020, arXiv 2008.08115; its package tidecv 1.0.1, whose figures these are but for three edges: equal
        scores keep the order of the images; classes without objects are left out of the means, where tidecv
        counts them as 0; and a detection that lies exactly half in a crowd is left out, as COCO does it.
    """
    if len(detections) != len(truths):
        raise ShapeError(
            f"evaluate_tide: there must be one record per image, got {len(detections)} detections and "
            f"{len(truths)} truths."
        )
    n_classes = len(classes)
    n_objects, n_found, n_missed = (np.zeros(n_classes, np.int64) for _ in range(3))
    sorted_images, missed_image, missed_row = [], [], []
    for i, (found, truth) in enumerate(zip(detections, truths, strict=True)):
        for labels in (found.labels, truth.labels):
            if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
                raise ShapeError(
                    f"evaluate_tide: labels of image {found.image_id!r} must lie in 0 .. {n_classes - 1}, "
                    f"got {labels.min()} .. {labels.max()}."
                )
        entries, taken, missed = _sort_image(i, found[:_MAX_DETECTIONS], truth)
        sorted_images.append(entries)
        missed_image += [i] * len(missed)
        missed_row += missed.tolist()
        n_objects += np.bincount(truth.labels[~(truth.difficult | truth.crowd)], minlength=n_classes)
        n_found += np.bincount(truth.labels[taken], minlength=n_classes)
        n_missed += np.bincount(truth.labels[missed], minlength=n_classes)
    entries = np.concatenate([np.zeros(0, _ENTRY), *sorted_images])
    counted = entries["hit"] | ~entries["ignored"]
    exists = n_objects > 0

    mended = {}
    for kind, name in enumerate(TIDE_TYPES[:_MISSED]):
        wrong = ~entries["hit"] & (entries["kind"] == kind)
        becomes_hit = wrong & (entries["becomes"] >= 0)
        after = entries.copy()
        after["label"][becomes_hit] = entries["becomes"][becomes_hit]
        after["hit"] |= becomes_hit
        mended[name] = _ap(after[(counted & ~wrong) | becomes_hit], n_objects, exists)
    mended[TIDE_TYPES[_MISSED]] = _ap(entries[counted], n_objects - n_missed, exists)
    mended[SPECIAL_TYPES[0]] = _ap(entries[entries["hit"]], n_objects, exists)
    mended[SPECIAL_TYPES[1]] = _ap(entries[counted], n_found, exists)

    mistakes = entries[counted & ~entries["hit"]]
    counts = np.zeros((n_classes, len(TIDE_TYPES)), np.int64)
    np.add.at(counts, (mistakes["label"], mistakes["kind"]), 1)
    counts[:, _MISSED] = n_missed
    return TideResult(
        tuple(classes),
        _ap(entries[counted], n_objects, exists),
        mended,
        counts,
        np.append(mistakes["image"], missed_image).astype(np.int64),
        np.append(mistakes["row"], missed_row).astype(np.int64),
        np.append(mistakes["kind"], [_MISSED] * len(missed_row)).astype(np.int64),
    )


# One detection: what it is, of which kind if it is a mistake, and the class in which it becomes a hit when
# that kind is mended, -1 for none.
_ENTRY = np.dtype(
    [
        ("image", np.int64),
        ("row", np.int64),
        ("label", np.int64),
        ("score", np.float32),
        ("hit", np.bool_),
        ("ignored", np.bool_),
        ("kind", np.int64),
        ("becomes", np.int64),
    ]
)


def _sort_image(
    i: int, found: Detections, truth: GroundTruth
) -> tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.int64]]:
    """Sort the detections of one image.

    Returns:
        (D,) entries, the rows of the objects that were taken, and of those that were missed.
    """
    objects = np.flatnonzero(~(truth.difficult | truth.crowd))
    overlaps = iou(found.boxes, truth.boxes[objects])  # (D, G)
    same = found.labels[:, None] == truth.labels[objects]
    own, other = np.where(same, overlaps, 0.0), np.where(same, 0.0, overlaps)
    taken = _take(own)
    used = np.isin(np.arange(len(objects)), taken)

    entries = np.zeros(len(found), _ENTRY)
    entries["image"], entries["row"] = i, np.arange(len(found))
    entries["label"], entries["score"] = found.labels, found.scores
    entries["hit"], entries["ignored"] = taken >= 0, (taken < 0) & _on_spared(found, truth)
    entries["kind"], entries["becomes"] = _BACKGROUND, -1
    if len(objects) and len(found):
        nearest = own.max(axis=1)
        tests = {
            _LOCALISATION: (nearest >= _BACKGROUND_IOU) & (nearest <= _FOREGROUND_IOU),
            _CLASSIFICATION: other.max(axis=1) >= _FOREGROUND_IOU,
            _DUPLICATE: (own * used).max(axis=1) >= _FOREGROUND_IOU,
            _BACKGROUND: overlaps.max(axis=1) <= _BACKGROUND_IOU,
        }
        entries["kind"] = np.select(list(tests.values()), list(tests), _BOTH)
        about = np.where(entries["kind"] == _LOCALISATION, own.argmax(axis=1), other.argmax(axis=1))
        # Detections that are left out of AP take part here, as in the reference implementation.
        could = np.isin(entries["kind"], (_LOCALISATION, _CLASSIFICATION)) & ~entries["hit"] & ~used[about]
        target, surest = np.unique(about[could], return_index=True)
        entries["becomes"][np.flatnonzero(could)[surest]] = truth.labels[objects[target]]
        reached = used | np.isin(np.arange(len(objects)), target)
    else:
        reached = used
    return entries, objects[used], objects[~reached]


def _take(overlaps: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return (D,) the object that each detection takes, -1 for none; (D, G) overlaps are by falling score."""
    taken = np.full(len(overlaps), -1)
    left = overlaps.copy()
    for d in np.flatnonzero((overlaps >= _FOREGROUND_IOU).any(axis=1)):
        best = left[d].argmax()
        if left[d, best] >= _FOREGROUND_IOU:
            taken[d] = best
            left[:, best] = 0
    return taken


def _on_spared(found: Detections, truth: GroundTruth) -> NDArray[np.bool_]:
    """Return (D,): whether each detection lies on a difficult object or a crowd of its class."""
    overlaps = iou(found.boxes, truth.boxes)
    overlaps[:, truth.crowd] = share_inside(found.boxes, truth.boxes[truth.crowd])
    spared = (truth.difficult | truth.crowd) & (found.labels[:, None] == truth.labels)
    reached: NDArray[np.bool_] = ((overlaps >= _FOREGROUND_IOU) & spared).any(axis=1)
    return reached


def _ap(
    entries: NDArray[np.void], n_objects: NDArray[np.int64], exists: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return (K,) AP; nan where `exists` is not, or neither an object nor a detection is left of a class."""
    order = np.lexsort((-entries["score"], entries["label"]))  # stable: ties keep the order of images
    label, hit = entries["label"][order], entries["hit"][order]
    of_class = np.searchsorted(label, np.arange(len(n_objects) + 1))
    ap = np.full(len(n_objects), np.nan)
    for k in np.flatnonzero(exists):
        hits = hit[of_class[k] : of_class[k + 1]]
        if n_objects[k]:
            ap[k] = mean_precision(hits, int(n_objects[k]), _RECALL_GRID)
        elif len(hits):  # false detections of a class whose objects are all taken off
            ap[k] = 0.0
    return ap


def _mean(ap: NDArray[np.float64]) -> float:
    present = ap[~np.isnan(ap)]
    return float(present.mean()) if len(present) else float("nan")


def _percent(value: float) -> float | None:
    return None if np.isnan(value) else 100 * value
