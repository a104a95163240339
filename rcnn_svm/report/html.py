"""One self-contained page about a comparison of heads: finding first, then evidence, pictures, provenance.

Pictures and styles are inside the file; it loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from rcnn_svm.boxes import clip, iou, widen
from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.bootstrap import BootstrapResult
from rcnn_svm.evaluation.errors import ERROR_TYPES, FalsePositives, false_positive_types
from rcnn_svm.evaluation.voc import HIT, IGNORED, RULE_NAMES, EvalResult
from rcnn_svm.files import write_text
from rcnn_svm.report.draw import Colour, Mark, draw_marks
from rcnn_svm.report.findings import findings
from rcnn_svm.report.plots import (
    class_ap_figure,
    error_type_figure,
    head_colours,
    map_figure,
    precision_recall_figure,
    score_figure,
    svg,
)
from rcnn_svm.report.tables import (
    LOCALISATION,
    comparison_table,
    ranked_differences,
    ranked_heads,
    threshold_table,
)
from rcnn_svm.structures import Dataset, Detections, Image

__all__ = ["write_html_report"]

_FOUND: Colour = (0, 158, 115)
_FALSE: Colour = (213, 94, 0)
_MISSED: Colour = (240, 228, 66)
_LEFT_OUT: Colour = (170, 178, 186)
_PICTURE, _CROP = 480, 240  # pixels, longer side: sharp at twice the density of the page's columns
_MIN_PRECISION = 0.5


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
    page = _Page(metrics, evals, detections, dataset, bootstrap, config)
    path = folder / "report.html"
    write_text(path, page.render())
    return path


@dataclass(frozen=True, eq=False)
class _Shown:
    """The detections of one head that pictures show, and how well they do image by image."""

    limit: NDArray[np.float64]  # (K,) lowest score shown
    f1: NDArray[np.float64]  # (n_images,); nan without objects and detections
    hits: NDArray[np.int64]
    false: NDArray[np.int64]
    n_objects: NDArray[np.int64]
    found: frozenset[tuple[int, int]]  # (image, row of the object)


class _Page:
    def __init__(
        self,
        metrics: Mapping[str, Any],
        evals: Mapping[str, EvalResult],
        detections: Mapping[str, Sequence[Detections]],
        dataset: Dataset,
        bootstrap: BootstrapResult,
        config: Mapping[str, Any] | None,
    ) -> None:
        heads = set(metrics["heads"])
        for what, names in (("evals", evals), ("detections", detections), ("bootstrap", bootstrap.mean)):
            if set(names) != heads:
                raise ConfigError(
                    f"write_html_report: {what} must be of the heads {', '.join(sorted(heads))}, "
                    f"got {', '.join(sorted(names))}."
                )
        for name in heads:
            if len(detections[name]) != len(dataset) or len(evals[name].matches.n_objects) != len(dataset):
                raise ConfigError(
                    f"write_html_report: head {name!r} must have results for the {len(dataset)} images of "
                    f"{dataset.name}, got {len(detections[name])}."
                )
        self.metrics, self.evals, self.detections = metrics, evals, detections
        self.dataset, self.bootstrap, self.config = dataset, bootstrap, config
        self.names = ranked_heads(metrics)
        self.best = self.names[0]
        self.colours = head_colours(metrics["heads"])
        self.truths = [sample.truth for sample in dataset]
        self.errors: dict[str, FalsePositives] = {
            name: false_positive_types(evals[name].matches, detections[name], self.truths)
            for name in self.names
        }
        self.shown = {name: _shown(evals[name], metrics["heads"][name]) for name in self.names}
        # One column per family of heads in pictures: its better version.
        families: dict[str, str] = {}
        for name in self.names:
            families.setdefault(metrics["heads"][name]["about"]["base"], name)
        self.columns = list(families.values())[:4]

    def render(self) -> str:
        css = resources.files("rcnn_svm.report").joinpath("report.css").read_text(encoding="utf-8")
        title = f"{self.metrics['experiment']}: heads compared"
        sections = [
            self._table(),
            self._differences(),
            self._classes(),
            self._mistakes(),
            self._side_by_side(),
            self._best_and_worst(),
            self._missed(),
            self._origin(),
        ]
        links = {
            "heads": "Heads",
            "differences": "Differences",
            "classes": "Classes",
            "mistakes": "Mistakes",
            "pictures": "Pictures",
            "extremes": "Best and worst",
            "missed": "Missed objects",
            "origin": "Configuration",
        }
        nav = "".join(f'<a href="#{key}">{label}</a>' for key, label in links.items())
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<header>\n"
            f"<h1>{escape(title)}</h1>\n{self._facts()}"
            f'<nav aria-label="Sections">{nav}</nav>\n</header>\n'
            f"<main>\n{self._headline()}{''.join(sections)}</main>\n"
            "<footer>Written by rcnn_svm. Every picture and number is inside this file.</footer>\n"
            "</body>\n</html>\n"
        )

    def _facts(self) -> str:
        m = self.metrics
        n_objects = int(self.evals[self.best].n_positives.sum())
        rule = RULE_NAMES[m["rule"]]
        facts = (
            f"{m['dataset']}: {len(self.dataset.classes)} classes, trained on {m['n_train_images']} images "
            f"({m['train_split']}), measured on {m['n_test_images']} images with {n_objects} objects "
            f"({m['test_split']}) by the rule of {rule}."
        )
        return f'<p class="facts">{escape(facts)}</p>\n'

    def _headline(self) -> str:
        found = findings(self.metrics, self.bootstrap)
        if not found:
            value = self.metrics["heads"][self.best]["mAP"]
            text = f"{self.best} reaches {_percent(value)} mAP. There is no other head to compare it with."
            if value is None:
                text = "The test split has no objects: there is nothing to measure."
            return f'<div class="headline"><p>{escape(text)}</p></div>\n'
        first, *rest = found
        items = "".join(
            f"<li><h3>{escape(each.question)}</h3><p>{self._sentence(each.answer)}</p>{_badge(each.supported)}</li>"
            for each in rest
        )
        caution = (
            "The intervals say how far the figures would move with other test images. They do not cover "
            "another training run, and the best of several heads always looks a little better than it is."
        )
        return (
            f'<div class="headline"><p>{self._sentence(first.answer)}</p></div>\n'
            f'<ul class="findings">{items}</ul>\n<p class="note">{caution}</p>\n'
        )

    def _table(self) -> str:
        head, lines = comparison_table(self.metrics, self.bootstrap)
        body = [(self._name(name), list(map(_number, cells))) for name, *cells in lines]
        stages = self.metrics.get("stages_s") or {}
        spent = ", ".join(f"{name} {_seconds(value)}" for name, value in stages.items() if value is not None)
        heads = self.metrics["heads"]
        min_iou = self.evals[self.best].matches.min_iou
        explained = (
            "Average precision (AP) rewards finding all objects of a class (recall) with few false "
            "detections before them (precision), whatever the scale of the scores. A detection counts as "
            f"found when it overlaps a free object of its class with an IoU of at least {min_iou:g}. mAP is "
            "the mean over the classes."
        )
        alt = "Bar chart of mAP: " + ", ".join(f"{n} {_percent(heads[n]['mAP'])}" for n in self.names) + "."
        return (
            _section("heads", "Heads by mean average precision")
            + f"<p>{explained}</p>\n"
            + self._localisation()
            + _figure(
                map_figure(self.metrics),
                alt,
                "Black lines: 95 % bootstrap intervals over the test images, centred on the value measured. "
                "Two heads can differ reliably although their intervals overlap: see the paired differences.",
            )
            + _table_html(
                [each.title for each in head],
                body,
                "Training time is what belongs to the head alone; times and memory are of this machine.",
                0,
            )
            + (f'<p class="note">Shared stages, all images: {escape(spent)}.</p>\n' if spent else "")
        )

    def _localisation(self) -> str:
        """Say how closely boxes fit; nothing where COCO's measures are not known."""
        coco = self.metrics["heads"][self.best].get("coco", {})
        if coco.get("AP75") is None:
            return ""
        found = f"{self.best} has an AP50 of {coco['AP50']:.1f} and an AP75 of {coco['AP75']:.1f}."
        return f"<p>{LOCALISATION} {self._sentence(found)}</p>\n"

    def _differences(self) -> str:
        order = ranked_differences(self.bootstrap)
        if not order:
            return (
                _section("differences", "Differences between heads") + "<p>There is nothing to compare.</p>\n"
            )
        body = []
        for each in order:
            low, high = 100 * each.mean.low, 100 * each.mean.high
            cells = [
                f"{100 * each.mean.value:+.1f}",
                f"{low:+.1f} to {high:+.1f}",
                f"{100 * each.flip_share:.1f} %",
            ]
            names = f"{self._name(each.first)} &minus; {escape(each.second)}"
            body.append((names, [*cells, _badge(each.supported)]))
        n_supported = sum(each.supported for each in order)
        text = (
            f"Each of {self.bootstrap.n_resamples} resamples draws the test images with replacement and "
            "measures all heads on the same draw, so what makes an image hard for every head cancels out. A "
            f"difference is supported when its 95 % interval excludes zero: {n_supported} of {len(order)} "
            "are. Even if no two heads differed, about one pair in twenty would look supported."
        )
        head = ["difference in mAP", "points", "95 % interval", "resamples with the other sign", "verdict"]
        table = _table_html(head, body, "")
        if len(body) > 8:
            table = _table_html(head, body[:6], "The six largest.") + (
                f"<details><summary>All {len(body)} pairs</summary>{table}</details>\n"
            )
        return _section("differences", "Differences between heads") + f"<p>{text}</p>\n" + table

    def _classes(self) -> str:
        ap = {name: 100 * self.evals[name].ap() for name in self.names}
        counts = self.evals[self.best].n_positives
        body = []
        for k, label in enumerate(self.dataset.classes):
            values = [ap[name][k] for name in self.names]
            top = np.nanmax(values) if not np.isnan(values).all() else np.nan
            cells = [str(counts[k])]
            cells += [
                "none"
                if np.isnan(v)
                else f"<strong>{v:.1f}</strong>"
                if round(v, 1) == round(top, 1)
                else f"{v:.1f}"
                for v in values
            ]
            body.append((escape(label), cells))
        head = ["AP by class", "objects", *self.names]
        best = ", ".join(
            f"{label} {value:.0f}"
            for label, value in zip(self.dataset.classes, ap[self.best], strict=True)
            if value == value
        )
        return (
            _section("classes", "Class by class")
            + _figure(
                class_ap_figure(self.evals, self.metrics["heads"]),
                f"Dots of AP per class and head. {self.best}: {best}.",
                "Round: with box regression; diamonds: without. The grey band spans the heads.",
            )
            + _table_html(head, body, "Average precision in percent; the best of each class in bold.")
            + self._thresholds()
            + _figure(
                precision_recall_figure(self.evals, self.metrics["heads"]),
                "Precision-recall curves per class, one line per head.",
                "Precision against recall, in brackets the number of objects. Each curve shows the best "
                "precision that can still be had at that recall; dashed: without box regression.",
            )
        )

    def _thresholds(self) -> str:
        found = threshold_table(self.metrics, self.best)
        if found is None:
            return ""
        words, head, lines = found
        body = [(escape(label), list(map(_number, cells))) for label, *cells in lines]
        return f"<p>{self._sentence(words)}</p>\n" + _table_html(head, body, "")

    def _mistakes(self) -> str:
        words = []
        for name in self.columns[:1]:
            counts = self.errors[name].counts.sum(axis=0)
            total = counts.sum()
            if total:
                main = int(counts.argmax())
                words.append(
                    f"Of the false ones among the surest detections of {name}, "
                    f"{100 * counts[main] / total:.0f} % are of the type {ERROR_TYPES[main]}."
                )
        explained = (
            "A false detection is a <em>localisation</em> error when it touches an object of its class (IoU "
            "of at least 0.1) but fits loosely or repeats it; else it is a mix-up with a <em>similar "
            "class</em> or with an <em>other class</em> that it touches; else <em>background</em>."
        )
        alt = "; ".join(
            f"{name}: {self.errors[name].n_correct.sum()} correct, "
            + ", ".join(
                f"{n} {kind}"
                for n, kind in zip(self.errors[name].counts.sum(axis=0), ERROR_TYPES, strict=True)
            )
            for name in self.names
        )
        return (
            _section("mistakes", "What the mistakes are")
            + f"<p>{escape(' '.join(words))} {explained}</p>\n"
            + _figure(
                error_type_figure({name: self.errors[name] for name in self.names}),
                f"Stacked bars of hits and types of mistakes. {alt}.",
                "After Hoiem, Chodpathumwan and Dai, “Diagnosing error in object detectors”, ECCV 2012.",
            )
            + _figure(
                score_figure({name: self.evals[name] for name in self.metrics["heads"]}),
                "Histograms of the scores of hits and of false detections, one panel per head.",
                "How well a score tells hits from false detections, on a logarithmic count. All scores are "
                "margins or log-odds, whatever suppresses rivals; 0 is where a head is undecided.",
            )
        )

    def _side_by_side(self) -> str:
        f1 = np.array([self.shown[name].f1 for name in self.columns])
        usable = np.flatnonzero(~np.isnan(f1).any(axis=0))
        spread = f1[:, usable].std(axis=0)
        far = usable[np.argsort(-spread, kind="stable")][:4]
        middle = (
            np.abs(f1[:, usable].mean(axis=0) - np.median(f1[:, usable].mean(axis=0))) if len(usable) else []
        )
        typical = [i for i in usable[np.argsort(middle, kind="stable")] if i not in far][:2]
        parts = []
        for title, images in (("Typical images", typical), ("Where the heads disagree most", far.tolist())):
            if not len(images):
                continue
            parts.append(f"<h3>{title}</h3>\n")
            for i in images:
                pixels = self.dataset.samples[i].read()
                figures = [self._picture(int(i), name, pixels, self._name(name)) for name in self.columns]
                parts.append(f'<div class="pictures">{"".join(figures)}</div>\n')
        legend = (
            (_FOUND, "solid", "✓ found"),
            (_FALSE, "solid", "✗ false"),
            (_MISSED, "dashed", "missed"),
            (_LEFT_OUT, "solid", "not counted (difficult)"),
        )
        key = "".join(
            f'<span class="box" style="border-color:rgb{colour};border-style:{style}"></span><b>{text}</b>'
            for colour, style, text in legend
        )
        key = f'<p class="key">{key}</p>\n'
        text = (
            "<p>The same photograph, one head beside the other. Scores of heads are not comparable, so each "
            "head shows what reaches its own thresholds (without any, what scores above where half of a "
            "class is right).</p>\n"
        )
        return _section("pictures", "Detections side by side") + text + key + "".join(parts)

    def _best_and_worst(self) -> str:
        shown = self.shown[self.best]
        usable = np.flatnonzero(~np.isnan(shown.f1) & (shown.n_objects > 0))
        best = sorted(usable, key=lambda i: (-shown.f1[i], -shown.n_objects[i], i))[:4]
        worst = sorted(
            (i for i in usable if i not in best),
            key=lambda i: (shown.f1[i], -shown.n_objects[i] - shown.false[i], i),
        )[:4]
        parts = [_section("extremes", f"Best and worst images of {self.best}")]
        for title, images in (("Best", best), ("Worst", worst)):
            if images:
                figures = "".join(
                    self._picture(
                        int(i),
                        self.best,
                        self.dataset.samples[i].read(),
                        escape(self.dataset.samples[i].image_id),
                    )
                    for i in images
                )
                parts.append(f'<h3>{title}</h3>\n<div class="pictures even">{figures}</div>\n')
        return "".join(parts)

    def _missed(self) -> str:
        found_by = {name: self.shown[name].found for name in self.names}
        missed = []
        for i, truth in enumerate(self.truths):
            for g in np.flatnonzero(~(truth.difficult | truth.crowd)).tolist():
                if (i, g) not in found_by[self.best]:
                    others = sum((i, g) in found_by[name] for name in self.names)
                    missed.append((others, i, g))
        n_objects = int(self.evals[self.best].n_positives.sum())
        n_never = sum(others == 0 for others, *_ in missed)
        text = (
            f"{self.best} misses {len(missed)} of {n_objects} objects at the scores shown above; {n_never} "
            "of them are found by no head. First the ones that no head finds."
        )
        parts = [_section("missed", "Missed objects"), f"<p>{escape(text)}</p>\n"]
        chosen = _spread_over(missed, 12)
        figures = []
        for others, i, g in chosen:
            sample, truth = self.dataset.samples[i], self.truths[i]
            box, label = truth.boxes[g], truth.labels[g]
            found = self.detections[self.best][i]
            same = found[found.labels == label] if len(found) else found
            reach = float(iou(box[None], same.boxes).max()) if len(same) else 0.0
            name = self.dataset.classes[label]
            if reach >= self.evals[self.best].matches.min_iou:
                reason = f"a box fits (IoU {reach:.2f}) but its score is too low, or another object took it"
            elif reach > 0:
                reason = f"the closest box fits too loosely (IoU {reach:.2f})"
            else:
                reason = "no box of this class touches it"
            width, height = box[2:] - box[:2]
            who = "" if others == 0 else f" Found by {others} other head{'s' if others > 1 else ''}."
            caption = f"<b>{escape(name)}</b>, {width:.0f} × {height:.0f} px: {reason}.{who}"
            alt = f"A {name} in image {sample.image_id} that was missed: {reason}."
            crop = _crop(sample.read(), box, name)
            figures.append(_inline(crop, alt, caption))
        if figures:
            parts.append(f'<div class="pictures crops">{"".join(figures)}</div>\n')
        return "".join(parts)

    def _origin(self) -> str:
        origin = self.metrics.get("provenance") or {}
        rows = []
        for key in ("command", "commit", "date", "seed"):
            if key in origin:
                rows.append((key, escape(str(origin[key]))))
        machine = origin.get("machine") or {}
        if machine:
            text = (
                f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('ram_gb')} GB, "
                f"GPU: {machine.get('gpu') or 'none'}"
            )
            rows.append(("machine", escape(text)))
        versions = origin.get("versions") or {}
        if versions:
            rows.append(
                ("versions", escape(", ".join(f"{name} {value}" for name, value in versions.items())))
            )
        body = "".join(f'<tr><th scope="row">{key}</th><td>{cell}</td></tr>' for key, cell in rows)
        details = {name: self.metrics["heads"][name].get("details") or {} for name in self.names}
        blocks = [("Settings of each head", details)]
        if self.config is not None:
            blocks.insert(0, ("Resolved configuration", dict(self.config)))
        shown = "".join(
            f"<details><summary>{title}</summary>"
            f"<pre>{escape(json.dumps(value, indent=2, default=str))}</pre></details>\n"
            for title, value in blocks
            if any(value.values())
        )
        return (
            _section("origin", "Configuration and provenance")
            + f'<div class="wide"><table class="plain"><tbody>{body}</tbody></table></div>\n'
            + shown
        )

    def _sentence(self, text: str) -> str:
        """Escape a sentence and keep the names of heads in it on one line each."""
        longest_first = sorted(map(escape, self.names), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        return re.sub(pattern, lambda match: f'<span class="name">{match[0]}</span>', escape(text))

    def _name(self, name: str) -> str:
        colour = self.colours[name]
        return f'<span class="swatch" style="background:{colour}"></span>{escape(name)}'

    def _picture(self, i: int, name: str, pixels: Image, caption: str) -> str:
        """Draw one image with what one head found, took wrongly and missed."""
        shown, matches, truth = self.shown[name], self.evals[name].matches, self.truths[i]
        classes, found = self.dataset.classes, self.detections[name][i]
        marks = [
            Mark(_tuple(truth.boxes[g]), _MISSED, classes[truth.labels[g]], dashed=True)
            for g in np.flatnonzero(~(truth.difficult | truth.crowd))
            if (i, int(g)) not in shown.found
        ]
        mine = np.flatnonzero((matches.image == i) & (matches.score >= shown.limit[matches.label]))
        for d in mine[np.argsort(matches.score[mine], kind="stable")]:
            outcome = matches.outcome[d]
            colour = _FOUND if outcome == HIT else _LEFT_OUT if outcome == IGNORED else _FALSE
            sign = "✓ " if outcome == HIT else "" if outcome == IGNORED else "✗ "
            marks.append(Mark(_tuple(found.boxes[matches.row[d]]), colour, sign + classes[matches.label[d]]))
        drawn = draw_marks(pixels, marks, longer_side=_PICTURE)
        tally = f"{shown.hits[i]} of {shown.n_objects[i]} found, {shown.false[i]} false"
        image_id = self.dataset.samples[i].image_id
        return _inline(drawn, f"{name} on image {image_id}: {tally}.", f"{caption}<br>{tally}")


def _shown(result: EvalResult, head: Mapping[str, Any]) -> _Shown:
    """Decide which detections pictures show: those that `detect` shows.

    Where the head has no thresholds they are shown down to the score where precision falls below one half.
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
    return _Shown(limit, f1, hits, wrong, n_objects, found)


def _spread_over(missed: Sequence[tuple[int, int, int]], n: int) -> list[tuple[int, int, int]]:
    """Take `n`, those that fewest heads found first, spread evenly over the images."""
    ordered = sorted(missed)
    fewest = [each for each in ordered if each[0] == ordered[0][0]]
    if len(fewest) < n:
        return ordered[:n]
    return [fewest[int(j)] for j in np.linspace(0, len(fewest) - 1, n).round()]


def _crop(pixels: Image, box: NDArray[np.float32], name: str) -> Image:
    """Cut out an object with as much surrounding again, so that it can be recognised."""
    height, width = pixels.shape[:2]
    around = clip(widen(box[None], 2.0), (height, width))[0]
    x1, y1 = np.floor(around[:2]).astype(int)
    x2, y2 = np.ceil(around[2:]).astype(int)
    corners = _tuple(box - np.array([x1, y1, x1, y1], np.float32))
    return draw_marks(
        np.ascontiguousarray(pixels[y1:y2, x1:x2]),
        [Mark(corners, _MISSED, "", dashed=True)],
        longer_side=_CROP,
    )


def _tuple(box: NDArray[np.floating]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1, y1, x2, y2


def _inline(pixels: Image, alt: str, caption: str) -> str:
    stream = io.BytesIO()
    PillowImage.fromarray(pixels).save(stream, format="JPEG", quality=84, optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    height, width = pixels.shape[:2]
    return (
        f'<figure><img alt="{escape(alt)}" width="{width}" height="{height}" '
        f'src="data:image/jpeg;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _figure(figure: Any, alt: str, caption: str) -> str:
    data = base64.b64encode(svg(figure)).decode()
    return (
        f'<figure class="chart"><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def _section(key: str, title: str) -> str:
    return f'<h2 id="{key}">{escape(title)}</h2>\n'


def _table_html(
    head: Sequence[str], body: Sequence[tuple[str, Sequence[str]]], caption: str, top: int | None = None
) -> str:
    """Return a table; names of rows and cells are HTML already, heads of columns are text."""
    columns = "".join(f'<th scope="col">{_breakable(text)}</th>' for text in head)
    lines = []
    for i, (name, cells) in enumerate(body):
        mark = ' class="top"' if i == top else ""
        data = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr{mark}><th scope="row">{name}</th>{data}</tr>\n')
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide" tabindex="0"><table>{above}<thead><tr>{columns}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody></table></div>\n"
    )


def _badge(supported: bool) -> str:
    kind, text = ("yes", "supported") if supported else ("no", "not decided")
    return f'<span class="verdict {kind}">{text}</span>'


def _number(text: str) -> str:
    """Write a figure with true minus signs."""
    return escape(text).replace("-", "−")


def _breakable(text: str) -> str:
    """Let the long name of a head break in the head of a narrow column."""
    return escape(text).replace("-", "-<wbr>").replace("+", "<wbr>+")


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value < 1:
        return f"{1000 * value:.1f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
