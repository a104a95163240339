"""What `evaluate --report` leaves: a page about the detections of a split, its tables as CSV, its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcnn_svm.evaluation.coco import CocoResult
from rcnn_svm.evaluation.diagnosis import Diagnosis
from rcnn_svm.evaluation.voc import FALSE, HIT, RULE_NAMES
from rcnn_svm.files import atomic_path, csv_text, remove_marker, write_text
from rcnn_svm.report.html import environment, inline, missed_object
from rcnn_svm.report.looks import (
    Row,
    confusion_of,
    group_rows,
    looked_at,
    mistake_rows,
    table_of,
)
from rcnn_svm.report.plots import sampled, svg, threshold_figure
from rcnn_svm.report.study_plots import mistakes_figure
from rcnn_svm.structures import Dataset

__all__ = ["evaluation_files", "write_evaluation"]

_MISSED = 24
"""Pictures of objects that were missed."""
_POINTS = 500
"""Scores of a class in `thresholds.csv`, at most."""
_TABLES = ("classes", "confusion", "groups", "images", "mistakes", "thresholds")
_FIGURES = ("mistakes", "thresholds")


def evaluation_files(folder: Path) -> list[Path]:
    """Return the files that `write_evaluation` may write."""
    tables = [folder / f"{name}.csv" for name in _TABLES]
    return [*tables, *(folder / f"{name}.svg" for name in _FIGURES), folder / "report.html"]


def write_evaluation(
    folder: Path,
    found: Diagnosis,
    coco: CocoResult | None,
    dataset: Dataset,
    *,
    chosen: str,
    about: Mapping[str, Any],
) -> Path:
    """Write tables as CSV, figures as SVG, and last the page, `report.html`.

    Args:
        folder: made if need be.
        found: the detections of `dataset`.
        coco: COCO's measures of them; None for whole images.
        dataset: the images; those that are shown are read.
        chosen: where the thresholds come from, in words that can follow "thresholds".
        about: where the figures come from, as `provenance` tells it.

    Returns:
        The page.

    Raises:
        DataError: a picture cannot be read, or the folder not be written to.
        DiskSpaceError: the disk is full.
    """
    *_, page = evaluation_files(folder)
    remove_marker(page)  # where it lies, the rest is whole
    tables: dict[str, Sequence[Row]] = {
        "classes": list(_classes(found)),
        "thresholds": list(_thresholds(found)),
        "confusion": list(_confusion(found, dataset)),
    }
    figures = {"thresholds": threshold_figure(found.evaluation, found.least)}
    if not dataset.whole:
        tables |= {
            "groups": [_without_head(row) for row in group_rows([found])],
            "mistakes": [_without_head(row) for row in mistake_rows([found])],
            "images": list(_images(found, dataset)),
        }
        figures["mistakes"] = mistakes_figure([found])
    for name, rows in tables.items():
        write_text(folder / f"{name}.csv", csv_text(rows))
    pictures = {name: svg(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        with atomic_path(folder / f"{name}.svg") as temporary:
            temporary.write_bytes(picture)
    text = (
        environment()
        .get_template("evaluation.html.jinja")
        .render(
            name=found.name,
            data=dataset.name,
            split=dataset.split,
            n_images=len(dataset),
            n_objects=int(found.evaluation.n_positives.sum()),
            rule=RULE_NAMES[found.evaluation.rule],
            whole=dataset.whole,
            words=_words(found, coco, chosen),
            tables=_shown(tables, coco),
            charts={name: inline("svg+xml", picture) for name, picture in pictures.items()},
            missed=None if dataset.whole else _missed(found, dataset),
            about=about,
            **looked_at([found], dataset, chosen),
        )
    )
    write_text(page, text)
    return page


def _words(found: Diagnosis, coco: CocoResult | None, chosen: str) -> Iterator[str]:
    """Yield what comes first, a sentence each."""
    result = found.evaluation
    if not result.n_positives.sum():
        yield "There is no object of these classes: there is nothing to measure."
        return
    more = ""
    if coco is not None:
        summary = coco.summary()
        more = "; COCO " + ", ".join(f"{name} {_percent(summary[name])}" for name in ("AP", "AP50", "AP75"))
    yield f"{_percent(result.map())} mAP{more}."
    believed = found.believed()
    right, missed = int(believed.found.sum()), int(believed.missed.sum())
    again, false = int(believed.duplicates.sum()), int(believed.false.sum())
    total = right + again + false
    share = f"{right} of {total} detections are right" if total else "no detection is believed"
    yield (
        f"At thresholds {chosen}, {share}, and {right} of {right + missed} objects are found. {missed} are "
        f"missed; {again} detections repeat another, {false} are false in another way."
    )
    if coco is not None:
        costs = {kind: cost for kind, cost in found.tide.costs().items() if kind in found.tide.mended}
        kind = max(list(costs)[:6], key=lambda name: costs[name])
        if costs[kind] > 0:
            yield (
                f"What costs most is mistakes of the type {kind}: without them AP50 would be "
                f"{100 * costs[kind]:.1f} points higher."
            )


def _percent(value: float) -> str:
    return "none" if np.isnan(value) else f"{100 * value:.1f}"


def _shown(tables: Mapping[str, Sequence[Row]], coco: CocoResult | None) -> dict[str, Any]:
    """Return the tables that the page shows, for people."""
    shown = {
        "classes": [row | {"threshold": f"{row['threshold']:.3g}"} for row in map(dict, tables["classes"])],
        **{name: tables.get(name, []) for name in ("groups", "images", "mistakes")},
    }
    if coco is not None:
        summary = coco.summary().items()
        shown["coco"] = [{"measure": name, "percent": _or_none(value)} for name, value in summary]
    return {name: table_of(rows) for name, rows in shown.items() if rows}


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else 100 * float(value)


def _classes(found: Diagnosis) -> Iterator[Row]:
    """Yield a row per class; shares in percent, None where there is nothing to divide by."""
    believed, ap = found.believed(), found.evaluation.ap()
    precision, recall, f1 = believed.precision(), believed.recall(), believed.f1()
    for k, name in enumerate(found.evaluation.classes):
        yield {
            "class": name,
            "objects": int(believed.n_objects[k]),
            "AP": _or_none(ap[k]),
            "threshold": float(f"{found.least[k]:.4g}"),
            "precision": _or_none(precision[k]),
            "recall": _or_none(recall[k]),
            "F1": _or_none(f1[k]),
            "found": int(believed.found[k]),
            "missed": int(believed.missed[k]),
            "duplicates": int(believed.duplicates[k]),
            "other_false": int(believed.false[k]),
        }


def _without_head(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in ("head", "AP50")}


def _thresholds(found: Diagnosis) -> Iterator[Row]:
    """Yield precision, recall and F1 of each class at the scores that it has, thinned where they are many."""
    for name, curve in zip(found.evaluation.classes, found.evaluation.curves, strict=True):
        for i in sampled(curve, _POINTS).tolist():
            precision, recall = float(curve.precision[i]), float(curve.recall[i])
            f1 = 2 * precision * recall / max(precision + recall, 1e-12)
            row = {"precision": precision, "recall": recall, "F1": f1}
            yield {
                "class": name,
                "score": float(str(curve.scores[i])),
                **{k: 100 * v for k, v in row.items()},
            }


def _confusion(found: Diagnosis, dataset: Dataset) -> Iterator[Row]:
    """Yield how many objects of a class are taken for what; the last class is that there is none."""
    counts, _ = confusion_of(found, dataset)
    rows, columns = [*dataset.classes, "no object"], [*dataset.classes, "missed"]
    for i, j in np.argwhere(counts):
        yield {"object": rows[i], "taken_for": columns[j], "count": int(counts[i, j])}


def _images(found: Diagnosis, dataset: Dataset) -> Iterator[Row]:
    """Yield what is believed of each image, those with the most mistakes first."""
    matches = found.evaluation.matches
    sure = matches.score >= found.least[matches.label]
    hit, false = (sure & (matches.outcome == outcome) for outcome in (HIT, FALSE))
    again = false & (matches.overlap >= matches.min_iou)
    n_hit, n_again, n_false = (
        np.bincount(matches.image[which], minlength=len(dataset)) for which in (hit, again, false & ~again)
    )
    n_objects = matches.n_objects.sum(axis=1)
    wrong = n_objects - n_hit + n_again + n_false
    for i in np.argsort(-wrong, kind="stable"):
        yield {
            "image": dataset.samples[i].image_id,
            "objects": int(n_objects[i]),
            "found": int(n_hit[i]),
            "missed": int(n_objects[i] - n_hit[i]),
            "duplicates": int(n_again[i]),
            "other_false": int(n_false[i]),
        }


def _missed(found: Diagnosis, dataset: Dataset) -> dict[str, Any]:
    """Return how many objects are missed, and pictures of some, spread over the images."""
    matches = found.evaluation.matches
    hit = (matches.score >= found.least[matches.label]) & (matches.outcome == HIT)
    seen = set(zip(matches.image[hit].tolist(), matches.target[hit].tolist(), strict=True))
    missed = [
        (i, g)
        for i, sample in enumerate(dataset)
        for g in np.flatnonzero(~(sample.truth.difficult | sample.truth.crowd)).tolist()
        if (i, g) not in seen
    ]
    few = np.unique(np.linspace(0, len(missed) - 1, min(len(missed), _MISSED)).round().astype(int))
    return {
        "n": len(missed),
        "n_objects": int(matches.n_objects.sum()),
        "pictures": [
            missed_object(dataset, i, g, found.detections[i], matches.min_iou)
            for i, g in (missed[j] for j in few)
        ],
    }
