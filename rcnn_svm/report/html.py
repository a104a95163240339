"""One self-contained page about a comparison of heads: finding first, then evidence, pictures, provenance.

What is shown is chosen here, `report.html.jinja` says how. Pictures and styles are inside the file; it loads
nothing from anywhere.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image as PillowImage

from rcnn_svm.boxes import clip, iou, widen
from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.bootstrap import BootstrapResult
from rcnn_svm.evaluation.errors import ERROR_TYPES, FalsePositives, false_positive_types
from rcnn_svm.evaluation.voc import HIT, IGNORED, RULE_NAMES, EvalResult
from rcnn_svm.files import write_text
from rcnn_svm.report import palette
from rcnn_svm.report.draw import Mark, corners, draw_marks, rgb
from rcnn_svm.report.findings import findings
from rcnn_svm.report.plots import (
    class_ap_figure,
    confusion_figure,
    error_type_figure,
    head_colours,
    headline_figure,
    precision_recall_figure,
    score_figure,
    svg,
)
from rcnn_svm.report.tables import (
    DIFFERENCES,
    LOCALISATION,
    comparison_table,
    confusion_table,
    difference_cells,
    headline,
    is_classified,
    judged,
    minutes_table,
    per_class_rows,
    percent,
    ranked_differences,
    ranked_heads,
    threshold_table,
)
from rcnn_svm.structures import Dataset, Detections, Image

__all__ = ["environment", "inline", "missed_object", "photograph", "write_html_report"]

_PICTURE, _CROP = 480, 240  # pixels, longer side: sharp at twice the density of the page's columns
_MIN_PRECISION = 0.5
_MISTAKEN = 12
_COLUMNS = 4  # heads side by side in pictures


def write_html_report(
    folder: Path,
    metrics: Mapping[str, Any],
    evals: Mapping[str, EvalResult],
    detections: Mapping[str, Sequence[Detections]],
    dataset: Dataset,
    bootstrap: BootstrapResult,
    *,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write `report.html` into `folder`.

    Args:
        folder: made if need be.
        metrics: what `metrics.json` holds.
        evals: one evaluation by head, on `dataset`.
        detections: by head, one record per image of `dataset`.
        dataset: the test split; the pictures that are shown are read from it.
        bootstrap: of `evals`.
        config: the resolved configuration, shown at the end.

    Returns:
        The file written.

    Raises:
        ConfigError: heads or images are not the same everywhere.
        DataError: a picture cannot be read, or the folder not be written to.
    """
    heads = metrics["heads"]
    _require_results_of_all(heads, evals, detections, dataset, bootstrap)
    names = ranked_heads(metrics)
    best = evals[names[0]]
    truths = [sample.truth for sample in dataset]
    errors = {
        name: false_positive_types(evals[name].matches, detections[name], truths)
        for name in names
        if not dataset.whole  # where nothing can be in the wrong place
    }
    classified = is_classified(metrics)
    compared = {"accuracy": judged(metrics, bootstrap)} if classified else {}
    compared["mAP"] = bootstrap
    columns, lines = comparison_table(metrics, bootstrap)
    details = {name: heads[name].get("details") or {} for name in names}
    settings = {"Resolved configuration": dict(config or {}), "Settings of each head": details}
    pictures = None if dataset.whole else _Pictures(metrics, evals, detections, dataset)
    path = folder / "report.html"
    template = _with_filters(names).get_template("report.html.jinja")
    text = template.render(
        metrics=metrics,
        heads=heads,
        names=names,
        best=names[0],
        whole=dataset.whole,
        measure="accuracy" if classified else "mAP",
        judged={name: headline(head) for name, head in heads.items()},
        confusion=confusion_table(metrics, names[0]) if classified else None,
        mistaken=_mistaken(detections[names[0]], dataset) if classified else [],
        rule=RULE_NAMES[metrics["rule"]],
        classes=dataset.classes,
        n_objects=int(best.n_positives.sum()),
        min_iou=best.matches.min_iou,
        findings=findings(metrics, bootstrap),
        columns=columns,
        lines=lines,
        stages={name: s for name, s in metrics["stages_s"].items() if s is not None},
        localisation=LOCALISATION,
        n_resamples=bootstrap.n_resamples,
        difference_titles=DIFFERENCES[1:],
        differences={
            measure: [(each, difference_cells(each)) for each in ranked_differences(found)]
            for measure, found in compared.items()
        },
        ap=_class_lines(metrics, best.n_positives),
        thresholds=threshold_table(metrics, names[0]),
        minutes=minutes_table(metrics),
        error_types=ERROR_TYPES,
        errors={name: (found.n_correct.sum(), found.counts.sum(axis=0)) for name, found in errors.items()},
        charts=_charts(metrics, evals, errors),
        colours=head_colours(heads),
        key=(
            (palette.FOUND, "solid", "✓ found"),
            (palette.FALSE, "solid", "✗ false"),
            (palette.MISSED, "dashed", "missed"),
            (palette.LEFT_OUT, "solid", "not counted (difficult)"),
        ),
        side_by_side={} if pictures is None else pictures.side_by_side(),
        extremes={} if pictures is None else pictures.extremes(),
        missed={} if pictures is None else pictures.missed(),
        settings={
            title: json.dumps(v, indent=2, default=str) for title, v in settings.items() if any(v.values())
        },
    )
    write_text(path, text)
    return path


def _require_results_of_all(
    heads: Mapping[str, Any],
    evals: Mapping[str, EvalResult],
    detections: Mapping[str, Sequence[Detections]],
    dataset: Dataset,
    bootstrap: BootstrapResult,
) -> None:
    for what, known in (("evals", evals), ("detections", detections), ("bootstrap", bootstrap.mean)):
        if set(known) != set(heads):
            raise ConfigError(
                f"write_html_report: {what} must be of the heads {', '.join(sorted(heads))}, "
                f"got {', '.join(sorted(known))}."
            )
    for name in heads:
        if len(detections[name]) != len(dataset) or len(evals[name].matches.n_objects) != len(dataset):
            raise ConfigError(
                f"write_html_report: head {name!r} must have results for the {len(dataset)} images of "
                f"{dataset.name}, got {len(detections[name])}."
            )


def environment() -> Environment:
    """Return the template engine: all text is escaped, a name that is not there is an error."""
    loader = PackageLoader("rcnn_svm.report", "")
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _with_filters(names: Sequence[str]) -> Environment:
    """Return the template engine with what the page about heads of these names writes."""
    made = environment()
    longest_first = sorted(names, key=len, reverse=True)
    known = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
    made.filters["split_names"] = known.split  # every second part is the name of a head
    made.filters["breakable"] = re.compile(r"(?<=-)|(?=\+)").split
    made.filters["percent"] = percent
    made.filters["seconds"] = _seconds
    return made


def _seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.1f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def _charts(
    metrics: Mapping[str, Any], evals: Mapping[str, EvalResult], errors: Mapping[str, FalsePositives]
) -> dict[str, str]:
    """Return the figures by name, as addresses of images that hold them."""
    heads = metrics["heads"]
    figures = {
        "heads": headline_figure(metrics),
        "classes": class_ap_figure(evals, heads),
        "curves": precision_recall_figure(evals, heads),
        "scores": score_figure({name: evals[name] for name in heads}),
    }
    if errors:
        figures["errors"] = error_type_figure(errors)
    if is_classified(metrics):
        figures["confusion"] = confusion_figure(metrics, ranked_heads(metrics)[0])
    return {name: inline("svg+xml", svg(figure)) for name, figure in figures.items()}


def _mistaken(detections: Sequence[Detections], dataset: Dataset) -> list[dict[str, Any]]:
    """Return pictures of images that were taken for another class, the surest mistakes first."""
    wrong = [
        (float(found.scores[0]), i)
        for i, (found, sample) in enumerate(zip(detections, dataset, strict=True))
        if found.labels[0] != sample.truth.labels[0]
    ]
    pictures = []
    for _, i in sorted(wrong, reverse=True)[:_MISTAKEN]:
        sample = dataset.samples[i]
        pictures.append(
            photograph(draw_marks(sample.read(), [], longer_side=_CROP))
            | {
                "image_id": sample.image_id,
                "class": dataset.classes[sample.truth.labels[0]],
                "taken_for": dataset.classes[detections[i].labels[0]],
            }
        )
    return pictures


def _class_lines(metrics: Mapping[str, Any], n_objects: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return a record per class: its name, its number of objects, its APs by head, the highest of them."""
    lines = []
    for row, n in zip(per_class_rows(metrics), n_objects.tolist(), strict=True):
        values = {name: row[name] for name in metrics["heads"]}
        top = max((value for value in values.values() if value is not None), default=None)
        lines.append({"name": row["class"], "n_objects": n, "ap": values, "top": percent(top)})
    return lines


@dataclass(frozen=True, eq=False)
class _Shown:
    """The detections of one head that pictures show, and how well they do image by image."""

    limit: NDArray[np.float64]  # (K,) lowest score shown
    f1: NDArray[np.float64]  # (n_images,); nan without objects and detections
    hits: NDArray[np.int64]
    false: NDArray[np.int64]
    n_objects: NDArray[np.int64]
    found: frozenset[tuple[int, int]]  # (image, row of the object)

    @classmethod
    def of(cls, result: EvalResult, head: Mapping[str, Any]) -> _Shown:
        """Decide which detections pictures show: those that `detect` shows.

        Where the head has no thresholds they are shown down to the score where precision falls below one
        half.
        """
        matches, thresholds = result.matches, head.get("details", {}).get("thresholds")
        limit = np.full(len(result.classes), np.inf)
        for k, curve in enumerate(result.curves):
            good = np.flatnonzero(curve.precision >= _MIN_PRECISION)
            if thresholds is not None:
                limit[k] = thresholds["classes"][result.classes[k]]["score"]
            elif len(good):
                limit[k] = curve.scores[good[-1]]
        n_images = len(matches.n_objects)
        shown = matches.score >= limit[matches.label]
        hit = shown & (matches.outcome == HIT)
        false = shown & (matches.outcome != HIT) & (matches.outcome != IGNORED)
        hits = np.bincount(matches.image[hit], minlength=n_images)
        wrong = np.bincount(matches.image[false], minlength=n_images)
        n_objects = matches.n_objects.sum(axis=1)
        total = hits + wrong + n_objects
        f1 = np.where(total > 0, 2 * hits / np.maximum(total, 1), np.nan)
        found = frozenset(zip(matches.image[hit].tolist(), matches.target[hit].tolist(), strict=True))
        return cls(limit, f1, hits, wrong, n_objects, found)


class _Pictures:
    """Photographs that are worth a look, with what heads found in them."""

    def __init__(
        self,
        metrics: Mapping[str, Any],
        evals: Mapping[str, EvalResult],
        detections: Mapping[str, Sequence[Detections]],
        dataset: Dataset,
    ) -> None:
        self._names = ranked_heads(metrics)
        self._best = self._names[0]
        self._evals, self._detections, self._dataset = evals, detections, dataset
        self._truths = [sample.truth for sample in dataset]
        self._shown = {name: _Shown.of(evals[name], metrics["heads"][name]) for name in self._names}
        # One column for each head, without or with box regression: its better version.
        better: dict[str, str] = {}
        for name in self._names:
            better.setdefault(metrics["heads"][name]["about"]["base"], name)
        self._columns = list(better.values())[:_COLUMNS]

    def side_by_side(self) -> dict[str, list[list[dict[str, Any]]]]:
        """Return rows of a photograph with a picture per head: typical ones, and where the heads disagree."""
        f1 = np.array([self._shown[name].f1 for name in self._columns])
        usable = np.flatnonzero(~np.isnan(f1).any(axis=0))
        mean, spread = f1[:, usable].mean(axis=0), f1[:, usable].std(axis=0)
        far = usable[np.argsort(-spread, kind="stable")][:4].tolist()
        middle = np.abs(mean - np.median(mean)) if len(usable) else mean
        typical = [i for i in usable[np.argsort(middle, kind="stable")].tolist() if i not in far][:2]
        chosen = {"Typical images": typical, "Where the heads disagree most": far}
        return {title: [self._row(i, self._columns) for i in rows] for title, rows in chosen.items() if rows}

    def extremes(self) -> dict[str, list[dict[str, Any]]]:
        """Return the pictures in which the best head does best and worst."""
        shown = self._shown[self._best]
        usable = np.flatnonzero(~np.isnan(shown.f1) & (shown.n_objects > 0)).tolist()
        best = sorted(usable, key=lambda i: (-shown.f1[i], -shown.n_objects[i], i))[:4]
        worst = sorted(
            (i for i in usable if i not in best),
            key=lambda i: (shown.f1[i], -shown.n_objects[i] - shown.false[i], i),
        )[:4]
        chosen = {"Best": best, "Worst": worst}
        return {
            title: [picture for i in images for picture in self._row(i, [self._best])]
            for title, images in chosen.items()
            if images
        }

    def missed(self) -> dict[str, Any]:
        """Return how many objects the best head misses, how many all of them, and pictures of some."""
        found_by = {name: self._shown[name].found for name in self._names}
        missed = []
        for i, truth in enumerate(self._truths):
            for g in np.flatnonzero(~(truth.difficult | truth.crowd)).tolist():
                if (i, g) not in found_by[self._best]:
                    missed.append((sum((i, g) in found for found in found_by.values()), i, g))
        return {
            "n": len(missed),
            "n_by_all": sum(others == 0 for others, *_ in missed),
            "pictures": [self._missed(*each) for each in _spread_over(missed, 12)],
        }

    def _missed(self, others: int, i: int, g: int) -> dict[str, Any]:
        min_iou = self._evals[self._best].matches.min_iou
        return missed_object(self._dataset, i, g, self._detections[self._best][i], min_iou) | {
            "others": others
        }

    def _row(self, i: int, names: Iterable[str]) -> list[dict[str, Any]]:
        """Draw one image with what each head found, took wrongly and missed."""
        sample = self._dataset.samples[i]
        pixels = sample.read()
        row = []
        for name in names:
            shown = self._shown[name]
            tally = f"{shown.hits[i]} of {shown.n_objects[i]} found, {shown.false[i]} false"
            drawn = draw_marks(pixels, self._marks(i, name), longer_side=_PICTURE)
            row.append(photograph(drawn) | {"head": name, "image_id": sample.image_id, "tally": tally})
        return row

    def _marks(self, i: int, name: str) -> list[Mark]:
        shown, matches, truth = self._shown[name], self._evals[name].matches, self._truths[i]
        classes, found = self._dataset.classes, self._detections[name][i]
        missed = rgb(palette.MISSED)
        marks = [
            Mark(corners(truth.boxes[g]), missed, classes[truth.labels[g]], dashed=True)
            for g in np.flatnonzero(~(truth.difficult | truth.crowd)).tolist()
            if (i, g) not in shown.found
        ]
        mine = np.flatnonzero((matches.image == i) & (matches.score >= shown.limit[matches.label]))
        looks = {HIT: (palette.FOUND, "✓ "), IGNORED: (palette.LEFT_OUT, "")}
        for d in mine[np.argsort(matches.score[mine], kind="stable")]:
            colour, sign = looks.get(int(matches.outcome[d]), (palette.FALSE, "✗ "))
            box = corners(found.boxes[matches.row[d]])
            marks.append(Mark(box, rgb(colour), sign + classes[matches.label[d]]))
        return marks


def missed_object(dataset: Dataset, i: int, g: int, found: Detections, min_iou: float) -> dict[str, Any]:
    """Cut out an object that was missed, and say how close detections come.

    Args:
        dataset: of the image.
        i: position of the image.
        g: row of the object.
        found: all detections of the image.
        min_iou: from which a detection reaches an object.

    Returns:
        A `photograph` with `class`, `image_id`, `size` and `reason` in words.

    Raises:
        DataError: the image cannot be read.
    """
    sample = dataset.samples[i]
    box, label = sample.truth.boxes[g], sample.truth.labels[g]
    same = found[found.labels == label] if len(found) else found
    reach = float(iou(box[None], same.boxes).max()) if len(same) else 0.0
    if reach >= min_iou:
        reason = f"a box fits (IoU {reach:.2f}) but its score is too low, or another object took it"
    elif reach > 0:
        reason = f"the closest box fits too loosely (IoU {reach:.2f})"
    else:
        reason = "no box of this class touches it"
    width, height = box[2:] - box[:2]
    return photograph(_crop(sample.read(), box)) | {
        "class": dataset.classes[label],
        "image_id": sample.image_id,
        "size": f"{width:.0f} × {height:.0f} px",
        "reason": reason,
    }


def _spread_over(missed: Sequence[tuple[int, int, int]], n: int) -> list[tuple[int, int, int]]:
    """Take `n`, those that fewest heads found first, spread evenly over the images."""
    ordered = sorted(missed)
    fewest = [each for each in ordered if each[0] == ordered[0][0]]
    if len(fewest) < n:
        return ordered[:n]
    return [fewest[int(j)] for j in np.linspace(0, len(fewest) - 1, n).round()]


def _crop(pixels: Image, box: NDArray[np.float32]) -> Image:
    """Cut out an object with as much surrounding again, so that it can be recognised."""
    height, width = pixels.shape[:2]
    around = clip(widen(box[None], 2.0), (height, width))[0]
    x1, y1 = np.floor(around[:2]).astype(int)
    x2, y2 = np.ceil(around[2:]).astype(int)
    mark = Mark(corners(box - np.array([x1, y1, x1, y1], np.float32)), rgb(palette.MISSED), dashed=True)
    return draw_marks(np.ascontiguousarray(pixels[y1:y2, x1:x2]), [mark], longer_side=_CROP)


def photograph(pixels: Image, *, quality: int = 84) -> dict[str, Any]:
    """Return the address of a JPEG that holds an (H, W, 3) uint8 RGB picture as `src`, with its size."""
    stream = io.BytesIO()
    PillowImage.fromarray(pixels).save(stream, format="JPEG", quality=quality, optimize=True)
    height, width = pixels.shape[:2]
    return {"src": inline("jpeg", stream.getvalue()), "width": width, "height": height}


def inline(kind: str, data: bytes) -> str:
    """Return the address of an image that holds it, such as of kind `svg+xml`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
