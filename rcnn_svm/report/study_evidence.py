"""Why heads differ: their scores of the same regions as exact sums, for the page of a study.

Regions are picked by a rule, not by hand: from the images in which two heads differ most, the surest object
that one of them alone found, else the surest false alarm of the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from rcnn_svm.evaluation.diagnosis import disagreement
from rcnn_svm.evaluation.voc import FALSE, HIT
from rcnn_svm.evidence import Cells, Evidence, explain
from rcnn_svm.experiment.closer import CloserLook
from rcnn_svm.report import palette
from rcnn_svm.report.draw import Mark, corners, cut, draw_marks, rgb
from rcnn_svm.report.evidence import AGAINST, FOR, strongest, terms_of, words_of
from rcnn_svm.report.html import photograph
from rcnn_svm.structures import Dataset, Image

__all__ = ["Telling", "evidence_shown", "telling_regions"]

_EACH_WAY = 3
"""Regions for either head that is ahead."""
_SCENE, _REGION, _CROP = 300, 170, 96  # pixels, longer side
_WIDE, _HIGH, _LEGIBLE = 190, 230, 7.5
"""Pixels that a grid has on the page (`study.css`), and of the letters that can be read there."""


@dataclass(frozen=True, eq=False)
class Telling:
    """A region on which two heads differ.

    Attributes:
        image: position in the test split.
        box: (4,) a detection of one of them.
        label: its class.
        words: how they differ on it.
    """

    image: int
    box: NDArray[np.float32]
    label: int
    words: str


def telling_regions(first: CloserLook, second: CloserLook) -> list[Telling]:
    """Return the regions to explain, those where `first` is ahead before others; one of an image at most."""
    found = disagreement(first, second)
    ahead = found.ahead()
    ways = (
        (first, second, found.image[ahead > 0]),
        (second, first, found.image[ahead < 0][::-1]),
    )
    return [
        telling
        for better, worse, images in ways
        for telling in [_surest(better, worse, i) for i in images[:_EACH_WAY].tolist()]
        if telling is not None
    ]


def _surest(better: CloserLook, worse: CloserLook, image: int) -> Telling | None:
    found = set(worse.evaluation.matches.target[_believed(worse, image, HIT)].tolist())
    own = _believed(better, image, HIT)
    missed = [d for d in own.tolist() if better.evaluation.matches.target[d] not in found]
    false = _believed(worse, image, FALSE).tolist()
    if not missed and not false:
        return None
    look, d = (better, missed[0]) if missed else (worse, false[0])
    words = f"found by {better.name} alone" if missed else f"a false alarm of {worse.name}"
    matches = look.evaluation.matches
    box = look.detections[image].boxes[matches.row[d]]
    return Telling(image, box, int(matches.label[d]), words)


def _believed(look: CloserLook, image: int, outcome: int) -> NDArray[np.int64]:
    """Return the detections of an image that come out so, surest of their class first, at the thresholds."""
    matches = look.evaluation.matches
    own = np.flatnonzero((matches.image == image) & (matches.outcome == outcome))
    over = matches.score[own] - look.least[matches.label[own]]
    order = np.argsort(-over, kind="stable")
    return own[order][over[order] >= 0]


def evidence_shown(looks: Sequence[CloserLook], train: Dataset, test: Dataset) -> list[dict[str, Any]]:
    """Return what the page shows of every region: the picture, and by head its score as a sum.

    Args:
        looks: two heads at least; regions are those on which the first and the last differ.
        train: images that the heads were trained on.
        test: those that were looked at.

    Raises:
        DataError: a picture cannot be read.
    """
    place = {sample.image_id: i for i, sample in enumerate(train)}
    pixels_of: dict[int, Image] = {}

    def crop(name: str, box: NDArray[np.float32]) -> str:
        i = place[name]
        if i not in pixels_of:
            pixels_of[i] = train.samples[i].read()
        return _picture(cut(pixels_of[i], box)[0], _CROP)

    shown = []
    for telling in telling_regions(looks[0], looks[-1]):
        sample = test.samples[telling.image]
        pixels = sample.read()
        mark = Mark(corners(telling.box), rgb(palette.YELLOW))
        heads = []
        for look in looks:
            (evidence,) = explain(look.detector, pixels, telling.box[None], [telling.label])
            threshold = float(look.least[telling.label])
            head: dict[str, Any] = {
                "name": look.name,
                "score": evidence.score,
                "total": evidence.total,
                "threshold": threshold if np.isfinite(threshold) else None,
                "believed": evidence.score >= threshold,
                "terms": terms_of(evidence),
                "grids": list(_grids(evidence, pixels)),
                "support": [],
            }
            regions = look.detector.model.support
            if evidence.support is not None and regions is not None:
                for side, rows in zip(("for", "against"), strongest(evidence), strict=True):
                    head["support"].append(
                        {
                            "side": side,
                            "colour": FOR if side == "for" else AGAINST,
                            "regions": [
                                {
                                    "src": crop(regions.image_ids[s], regions.boxes[s]),
                                    "share": float(evidence.support[s]),
                                    "shows": "no object"
                                    if regions.labels[s] < 0
                                    else test.classes[regions.labels[s]],
                                    "overlap": float(regions.overlaps[s]),
                                    "image": regions.image_ids[s],
                                }
                                for s in rows
                            ],
                        }
                    )
            heads.append(head)
        shown.append(
            {
                "image": sample.image_id,
                "class": test.classes[telling.label],
                "words": telling.words,
                **photograph(draw_marks(pixels, [mark], longer_side=_SCENE), quality=78),
                "heads": heads,
            }
        )
    return shown


def _grids(evidence: Evidence, pixels: Image) -> Iterator[dict[str, Any]]:
    """Yield the cells of each tap as places in the pixels of the region, tinted by what they add."""
    grids = [cells for cells in evidence.cells if cells.shares.size > 1]
    largest = max((float(np.abs(cells.shares).max()) for cells in grids), default=0.0) or 1.0
    for cells in grids:
        part, (left, top, right, bottom) = cut(pixels, cells.box)
        yield {
            "tap": words_of(cells),
            "src": _picture(_pale(part), _REGION),
            "view": (left, top, right - left, bottom - top),
            "cells": list(_cells(cells, largest)),
            "letters": _letters(cells, (right - left, bottom - top)),
        }


def _cells(cells: Cells, largest: float) -> Iterator[dict[str, Any]]:
    rows, columns = cells.shares.shape
    x = np.linspace(cells.box[0], cells.box[2], columns + 1)
    y = np.linspace(cells.box[1], cells.box[3], rows + 1)
    for (i, j), share in np.ndenumerate(cells.shares):
        yield {
            "x": round(float(x[j]), 1),
            "y": round(float(y[i]), 1),
            "w": round(float(x[j + 1] - x[j]), 1),
            "h": round(float(y[i + 1] - y[i]), 1),
            "colour": FOR if share > 0 else AGAINST,
            "strength": round(0.8 * abs(float(share)) / largest, 3),
            "share": float(share),
        }


def _letters(cells: Cells, size: tuple[int, int]) -> float | None:
    """Return the height of letters that fit a cell, in pixels of the image; None where they are too small."""
    rows, columns = cells.shares.shape
    width, height = cells.box[2:] - cells.box[:2]
    letters = float(min(width / columns / 3.9, height / rows / 2.4))
    return round(letters, 2) if letters * min(_WIDE / size[0], _HIGH / size[1]) >= _LEGIBLE else None


def _pale(pixels: Image) -> Image:
    """Return the picture in light grey, on which a tint of either colour shows."""
    grey = 80 + 0.68 * np.asarray(PillowImage.fromarray(np.ascontiguousarray(pixels)).convert("L"))
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _picture(pixels: Image, longer_side: int) -> str:
    small = draw_marks(np.ascontiguousarray(pixels), [], longer_side=longer_side)
    address: str = photograph(small, quality=74)["src"]
    return address
