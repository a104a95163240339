"""Parts of pages that show what detectors found: sliders over scores, confusions, galleries, tables.

`looks.html.jinja` lays them out, `study.js` moves them. Every picture is made once, however often it is
shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes, iou, widen
from rcnn_svm.evaluation.diagnosis import Diagnosis, disagreement
from rcnn_svm.evaluation.tide import TIDE_TYPES
from rcnn_svm.evaluation.voc import FALSE, HIT, IGNORED
from rcnn_svm.report import palette
from rcnn_svm.report.draw import Mark, corners, cut, draw_marks, rgb
from rcnn_svm.report.html import photograph
from rcnn_svm.structures import Dataset, Image

__all__ = [
    "Row",
    "Table",
    "by_mistake",
    "cell_text",
    "confusion_of",
    "group_rows",
    "looked_at",
    "mistake_rows",
    "table_of",
]

_THUMBNAIL, _PICTURE = 160, 360  # pixels, longer side
_STRIPS = 360
"""Thumbnails beside all sliders together, at least two for each head and class."""
_CONFUSED = 360
"""Thumbnails behind all confusion matrices together."""
_EACH_CONFUSED = 4
"""Of them behind one number."""
_GALLERY = 12
"""Pictures of a gallery; there are four."""
_POINTS = 120
"""Of a curve, at most."""

Row: TypeAlias = Mapping[str, Any]
Counts: TypeAlias = NDArray[np.int64]


def looked_at(looks: Sequence[Diagnosis], test: Dataset, chosen: str) -> dict[str, Any]:
    """Return what the shared parts of the templates show of detectors on the same images.

    Args:
        looks: the detectors.
        test: the images; those that are shown are read.
        chosen: where the thresholds come from, in words that can follow "thresholds".

    Returns:
        `chosen`, `heads` (names and colours), `confusions`, `galleries` and `live`, the data of the script.

    Raises:
        DataError: a picture cannot be read.
    """
    album = _Album(test)
    heads = [{"name": look.name, "colour": _colour(look.name)} for look in looks]
    curves = [[_strip(look, k, album, len(looks)) for k in range(len(test.classes))] for look in looks]
    confusions = _confusions(looks, test, album)
    return {
        "chosen": chosen,
        "heads": heads,
        "confusions": confusions,
        "galleries": {} if test.whole or not looks else _galleries(looks, test),
        "live": {
            "chosen": chosen,
            "heads": heads,
            "classes": test.classes,
            "curves": curves,
            "confused": [each["behind"] for each in confusions],
            "pictures": album.pictures(),
        },
    }


def _colour(name: str) -> str:
    return palette.THREE_HEADS.get(name, palette.BLUE)


@dataclass(frozen=True)
class Table:
    """A table as the page shows it: titles, and rows of text."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]


def table_of(rows: Iterable[Row]) -> Table:
    """Return rows as the page shows them; the names of their values are the titles."""
    listed = list(rows)
    titles = list(listed[0]) if listed else []
    named = [title.replace("_", " ").replace("brier", "Brier").replace("coco", "COCO") for title in titles]
    return Table(named, [[cell_text(row[title]) for title in titles] for row in listed])


def cell_text(value: Any) -> str:
    """Return a value for people; percent and seconds, which are most, with one decimal."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.1f}".replace("-", "−")
    return str(value)


def mistake_rows(looks: Sequence[Diagnosis]) -> Iterator[dict[str, Any]]:
    """Yield what each type of mistake costs, in points of AP, and how many there are."""
    for look in looks:
        counts = dict(zip(TIDE_TYPES, look.tide.counts.sum(axis=0), strict=True))
        for kind, cost in look.tide.costs().items():
            n = counts.get(kind)
            yield {
                "head": look.name,
                "AP50": 100 * look.tide.map(),
                "mistake": kind,
                "cost": 100 * cost,
                "count": None if n is None else int(n),
            }


def group_rows(looks: Sequence[Diagnosis]) -> Iterator[dict[str, Any]]:
    """Yield recall and mAP by groups of objects, in percent; None where there is no object."""
    for look in looks:
        for by, broken in look.by.items():
            columns = (broken.grouping.groups, broken.n_objects.sum(axis=1), broken.recall(), broken.map())
            for group, n, recall, value in zip(*columns, strict=True):
                yield {
                    "head": look.name,
                    "by": by,
                    "group": group,
                    "n_objects": int(n),
                    "recall": _or_none(recall),
                    "mAP": _or_none(value),
                }


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else 100 * float(value)


def by_mistake(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    """Yield a row for each type, with what it costs each head, and how many there are."""
    for kind in dict.fromkeys(row["mistake"] for row in rows):
        own = [row for row in rows if row["mistake"] == kind]
        counts = ["" if row["count"] is None else f" ({row['count']:,})" for row in own]
        cells = (f"{cell_text(row['cost'])}{count}" for row, count in zip(own, counts, strict=True))
        yield {"mistake": kind, **dict(zip((row["head"] for row in own), cells, strict=True))}


@dataclass(eq=False)
class _Album:
    """Thumbnails of detections and objects, each made once however often it is shown."""

    dataset: Dataset
    _wanted: dict[tuple[int, tuple[float, ...]], int] = field(default_factory=dict)

    def want(self, image: int, box: NDArray[np.float32]) -> int:
        """Return the position in `pictures` of a box of an image."""
        key = (image, () if self.dataset.whole else corners(box))
        return self._wanted.setdefault(key, len(self._wanted))

    def pictures(self) -> list[str]:
        """Return the addresses of all that was wanted; every image is read once."""
        made: dict[int, str] = {}
        pixels, last = np.zeros((1, 1, 3), np.uint8), -1
        for (image, box), at in sorted(self._wanted.items()):
            if image != last:
                pixels, last = self.dataset.samples[image].read(), image
            made[at] = photograph(_thumbnail(pixels, box), quality=72)["src"]
        return [made[at] for at in range(len(made))]


def _thumbnail(pixels: Image, box: tuple[float, ...]) -> Image:
    """Cut out a box with some of what surrounds it; all of the image where there is no box."""
    if not box:
        return draw_marks(pixels, [], longer_side=_THUMBNAIL)
    place = np.array(box, np.float32)
    part, (x1, y1, _, _) = cut(pixels, widen(place[None], 1.6)[0])
    mark = Mark(corners(place - np.array([x1, y1, x1, y1], np.float32)), rgb(palette.YELLOW))
    return draw_marks(np.ascontiguousarray(part), [mark], longer_side=_THUMBNAIL)


_OUTCOMES = {HIT: "found", FALSE: "false", IGNORED: "not counted"}


def _strip(look: Diagnosis, k: int, album: _Album, n_heads: int) -> dict[str, Any]:
    """Return what a slider over the scores of one class moves through: a thinned curve, and thumbnails.

    Both end a little after the last hit: what lies below is false.
    """
    curve, matches = look.evaluation.curves[k], look.evaluation.matches
    rows = np.arange(len(matches.label))[matches.of_class(k)]
    rows = rows[matches.outcome[rows] != IGNORED][: len(curve.scores)]
    hits = np.flatnonzero(matches.outcome[rows] == HIT)
    reach = min(len(rows), (int(hits[-1]) * 5 // 4 if len(hits) else 0) + 10)
    ranks = _spread(reach, _POINTS // 2)
    ranks = np.unique(np.concatenate([ranks, hits[_even(len(hits), _POINTS // 2)]]))
    n_thumbnails = max(2, _STRIPS // (n_heads * len(look.evaluation.classes)))
    return {
        "n_objects": int(look.evaluation.n_positives[k]),
        "threshold": _rounded(look.least[k]),
        "points": [
            [_rounded(curve.scores[r]), _rounded(curve.precision[r]), _rounded(curve.recall[r])]
            for r in ranks.tolist()
        ],
        "thumbnails": [
            _thumb(look, int(rows[r]), album) for r in _spread(reach, min(12, n_thumbnails)).tolist()
        ],
    }


def _thumb(look: Diagnosis, d: int, album: _Album) -> dict[str, Any]:
    matches = look.evaluation.matches
    image = int(matches.image[d])
    found = look.detections[image]
    return {
        "picture": album.want(image, found.boxes[matches.row[d]]),
        "image": found.image_id,
        "score": _rounded(matches.score[d]),
        "said": _OUTCOMES[int(matches.outcome[d])],
    }


def _spread(n: int, most: int) -> NDArray[np.int64]:
    """Return at most so many ranks below `n`, denser at the top, where scores tell most."""
    if not n:
        return np.zeros(0, np.int64)
    return np.unique(np.geomspace(1, n, most).round().astype(np.int64) - 1)


def _even(n: int, most: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))


def _rounded(value: float) -> float | None:
    """Return four digits of a number, None for one that JSON cannot hold: nothing is believed."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def confusion_of(look: Diagnosis, test: Dataset) -> tuple[Counts, list[tuple[int, int, int, Boxes]]]:
    """Count what the objects of a split are taken for at the thresholds of a head.

    A hit is of its class. A false detection that overlaps an object of another class, which no hit took, with
    IoU >= that of the evaluation takes it, the surest first; others are taken for something where there is
    nothing: duplicates and loose boxes among them. What is left is missed. Of whole images of one class each
    the class with the highest score counts, whatever the threshold.

    Returns:
        (K + 1, K + 1) int64: rows are classes of objects, last what is none; columns are what they are taken
        for, last those that were missed. And for each count row, column, position of the image and (1, 4)
        box: of the detection, of the object where it was missed.
    """
    n_classes, events = len(test.classes), list(_events(look, test))
    counts = np.zeros((n_classes + 1, n_classes + 1), np.int64)
    for row, column, _, _ in events:
        counts[row, column] += 1
    return counts, events


def _events(look: Diagnosis, test: Dataset) -> Iterator[tuple[int, int, int, Boxes]]:
    matches, none = look.evaluation.matches, len(test.classes)
    if test.whole:
        for i, (found, sample) in enumerate(zip(look.detections, test, strict=True)):
            if len(found):
                yield int(sample.truth.labels[0]), int(found.labels[0]), i, found.boxes[:1]
        return
    believed = matches.score >= look.least[matches.label]
    order = np.argsort(matches.image, kind="stable")
    own_of = np.split(order, np.searchsorted(matches.image[order], np.arange(1, len(test))))
    for i, (found, sample, own) in enumerate(zip(look.detections, test, own_of, strict=True)):
        truth = sample.truth
        free = ~(truth.difficult | truth.crowd)
        own = own[believed[own] & (matches.outcome[own] != IGNORED)]
        for d in own[matches.outcome[own] == HIT].tolist():
            label, row = int(matches.label[d]), int(matches.row[d])
            free[matches.target[d]] = False
            yield label, label, i, found.boxes[row : row + 1]
        false = own[matches.outcome[own] == FALSE]
        for d in false[np.argsort(-matches.score[false], kind="stable")].tolist():
            label, row = int(matches.label[d]), int(matches.row[d])
            box = found.boxes[row : row + 1]
            overlap = np.where(free & (truth.labels != label), iou(box, truth.boxes)[0], -1.0)
            of = none
            if len(overlap) and overlap.max() >= matches.min_iou:
                taken = int(overlap.argmax())
                free[taken], of = False, int(truth.labels[taken])
            yield of, label, i, box
        for g in np.flatnonzero(free).tolist():
            yield int(truth.labels[g]), none, i, truth.boxes[g : g + 1]


def _confusions(looks: Sequence[Diagnosis], test: Dataset, album: _Album) -> list[dict[str, Any]]:
    """Return a matrix for each head, and the pictures behind its numbers, mistakes before hits."""
    if test.whole and any(len(sample.truth) != 1 for sample in test):
        return []
    made = []
    for look in looks:
        counts, events = confusion_of(look, test)
        behind: dict[str, list[dict[str, Any]]] = {}
        left = _CONFUSED // len(looks)
        for n_each in range(1, _EACH_CONFUSED + 1):
            for row, column, i, box in sorted(events, key=lambda event: event[0] == event[1]):
                cell = behind.setdefault(f"{row},{column}", [])
                if left and len(cell) < n_each and all(each["place"] != i for each in cell):
                    name = test.samples[i].image_id
                    cell.append({"picture": album.want(i, box[0]), "image": name, "place": i})
                    left -= 1
        end = len(test.classes) + (not test.whole)
        total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
        made.append(
            {
                "name": look.name,
                "columns": [*test.classes, "missed"][:end],
                "rows": [
                    (name, [(n, round(n / t, 3)) for n in line[:end]])
                    for name, line, (t,) in zip(
                        [*test.classes, "no object"][:end], counts.tolist(), total.tolist(), strict=False
                    )
                ],
                "behind": {key: pictures for key, pictures in behind.items() if pictures},
            }
        )
    return made


def _galleries(looks: Sequence[Diagnosis], test: Dataset) -> dict[str, list[dict[str, Any]]]:
    """Return pictures by title, each with the boxes of every head: best, worst, and where heads disagree."""
    first, last = looks[0], looks[-1]
    f1, n_objects = _f1(first), first.evaluation.matches.n_objects.sum(axis=1)
    usable = np.flatnonzero(n_objects > 0)
    ranked = usable[np.lexsort((usable, -n_objects[usable], -f1[usable]))]
    chosen = {}
    if len(looks) > 1:
        found = disagreement(first, last)
        ahead = found.ahead()
        chosen[f"{first.name} ahead of {last.name}"] = found.image[ahead > 0]
        chosen[f"{last.name} ahead of {first.name}"] = found.image[ahead < 0][::-1]
    chosen[f"Best of {first.name}"] = ranked[f1[ranked] > 0]
    chosen[f"Worst of {first.name}"] = ranked[::-1][f1[ranked[::-1]] < 1]
    shown: set[int] = set()
    galleries = {}
    for title, images in chosen.items():
        new = [i for i in images.tolist() if i not in shown][:_GALLERY]
        shown |= set(new)
        galleries[title] = [_scene(i, looks, test) for i in new]
    return {title: scenes for title, scenes in galleries.items() if scenes}


def _f1(look: Diagnosis) -> NDArray[np.float64]:
    """Return (n_images,) F1 of what is believed; 0 where there is neither object nor detection."""
    matches, n_images = look.evaluation.matches, len(look.evaluation.matches.n_objects)
    believed = (matches.score >= look.least[matches.label]) & (matches.outcome != IGNORED)
    hits = np.bincount(matches.image[believed & (matches.outcome == HIT)], minlength=n_images)
    total = np.bincount(matches.image[believed], minlength=n_images) + matches.n_objects.sum(axis=1)
    f1: NDArray[np.float64] = 2 * hits / np.maximum(total, 1)
    return f1


def _scene(i: int, looks: Sequence[Diagnosis], test: Dataset) -> dict[str, Any]:
    """Return a photograph, and layers of boxes to lay over it: the labels, then one for each head."""
    sample, classes = test.samples[i], test.classes
    truth, tallies, layers = sample.truth, [], []
    seen: set[int] = set()  # objects that a head found, whose names are on its boxes
    n_objects = int((~(truth.difficult | truth.crowd)).sum())
    for look in looks:
        matches = look.evaluation.matches
        own = np.flatnonzero((matches.image == i) & (matches.score >= look.least[matches.label]))
        hits, false = ((matches.outcome[own] == outcome).sum() for outcome in (HIT, FALSE))
        tallies.append(f"{look.name} {hits} of {n_objects} found, {false} false")
        seen |= set(matches.target[own[matches.outcome[own] == HIT]].tolist())
        signs = {HIT: "✓ ", FALSE: "✗ ", IGNORED: ""}
        boxes = [
            _box(
                look.detections[i].boxes[matches.row[d]],
                f"{signs[int(matches.outcome[d])]}{classes[matches.label[d]]}",
            )
            for d in own.tolist()
        ]
        layers.append({"colour": _colour(look.name), "boxes": boxes})
    labels = [
        _box(box, "" if g in seen else classes[k])
        for g, (box, k) in enumerate(zip(truth.boxes, truth.labels, strict=True))
    ]
    height, width = sample.size
    picture = photograph(draw_marks(sample.read(), [], longer_side=_PICTURE))
    return picture | {
        "image_id": sample.image_id,
        "place": i,
        "view": (width, height),
        "letters": round(width / 24, 1),  # pictures are equally wide
        "layers": [{"colour": "#ffffff", "boxes": labels}, *layers],
        "tallies": tallies,
    }


def _box(box: NDArray[np.float32], text: str) -> dict[str, Any]:
    x1, y1, x2, y2 = corners(box)
    places = {"x": x1, "y": y1, "w": x2 - x1, "h": y2 - y1}
    return {name: round(value, 1) for name, value in places.items()} | {"text": text}
