"""What a study leaves behind: cells and effects as tables, pictures of the effects, and a verdict."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcnn_svm.evaluation.bootstrap import Interval
from rcnn_svm.evaluation.diagnosis import disagreement
from rcnn_svm.evaluation.effects import Effect
from rcnn_svm.experiment.curve import Curve
from rcnn_svm.experiment.design import BOXES, SOFTMAX, SVM, Factor
from rcnn_svm.experiment.study import Study
from rcnn_svm.files import atomic_path, csv_text, remove_marker, write_json, write_text
from rcnn_svm.report.curve import curve_json, curve_sentences, point_rows
from rcnn_svm.report.looks import group_rows, mistake_rows
from rcnn_svm.report.plots import svg
from rcnn_svm.report.provenance import portable_path, provenance
from rcnn_svm.report.study_page import write_study_page
from rcnn_svm.report.study_plots import (
    curve_figure,
    effects_figure,
    mistakes_figure,
    reliability_figure,
    shares_figure,
)
from rcnn_svm.report.tables import in_columns, signed, span

__all__ = ["verdict", "write_study"]


_PICTURES = {
    "curve": ("mAP against the number of images", "curve"),
    "reliability_detections": ("Can its probabilities be believed? Of detections", "reliability"),
    "reliability_regions": ("The same of regions", "reliability"),
    "mistakes": ("What mending each type of mistake would bring", "mistakes"),
}
"""Title of a figure, and the table that it shows."""


def verdict(study: Study, curve: Curve | None = None) -> list[str]:
    """Return the answer, a sentence for each question, which claims no more than its interval."""
    words = [_question(study, boxed) for boxed in study.shares]
    words += _all_else_equal(study.edges)
    for factor in (*study.design.factors.values(), BOXES):
        for measure, effects in (("mAP", study.effects), ("accuracy", study.accuracy_effects)):
            words += _answers(factor, [e for e in effects if e.factor == factor.name], measure)
    words += _probable(study)
    if curve is not None:
        words += curve_sentences(curve)
    (levels, boxed), best = max(study.values.items(), key=lambda item: item[1].value[0])
    right = "".join(f", {span(own[levels].interval)} {name}" for name, own in study.accuracy.items())
    words.append(
        f"The best of {len(study.values)} cells is {_named(study, levels)}"
        f"{', boxes regressed' if boxed else ''}: {span(best.interval)} mAP{right}. The best of many is "
        f"better by luck too: what it would reach on other images is less."
    )
    return words


def _answers(factor: Factor, effects: Sequence[Effect], measure: str) -> list[str]:
    """Say what a factor does to a measure: its two largest effects that are decided, or all."""
    if not effects:
        return []
    decided = sorted((e for e in effects if e.decided), key=lambda e: -abs(e.change.value))
    if decided:
        return [f"{factor.question} {_decided(effect, measure)}" for effect in decided[:2]]
    by = "" if measure == "mAP" else f" by {measure}"
    least = max(effect.detectable for effect in effects)
    return [
        f"{factor.question} Not decided{by}: {_undecided(effects)}. The study would have found a difference "
        f"of {100 * least:.1f} points in four of five cases."
    ]


def _question(study: Study, boxed: bool) -> str:
    """Answer the question that the study is named after."""
    *parts, whole = study.shares[boxed]
    low, high = whole.change.low, whole.change.high
    n_images, seeds = len(study.splits.test), len(study.seeds)
    where = f"on these {n_images} images" + (f", over {seeds} seeds" if seeds > 1 else "")
    boxes = "with box regression" if boxed else "without box regression"
    shown = "; ".join(f"{share.factor} {_signed(share.change)}" for share in parts)
    if low <= 0 <= high:
        return (
            f"Why SVMs and not the softmax? {boxes.capitalize()} {where} R-CNN's SVM less its softmax is "
            f"{_signed(whole.change)} mAP: neither is shown to be ahead. In the mean over all orders of the "
            f"changes: {shown}."
        )
    ahead, behind = ("SVM", "softmax") if low > 0 else ("softmax", "SVM")
    return (
        f"Why SVMs and not the softmax? {boxes.capitalize()} {where} R-CNN's {ahead} is ahead of its "
        f"{behind} by {100 * abs(whole.change.value):.1f} mAP, {_bounds(whole.change)}. Of SVM less softmax, "
        f"{signed(100 * whole.change.value)}, in the mean over all orders of the changes: {shown}."
    )


def _all_else_equal(edges: Sequence[Effect]) -> Iterator[str]:
    """Take the difference apart: a change may do one thing here and another there."""
    for (first, second), own in itertools.groupby(edges, key=lambda edge: (edge.first, edge.second)):
        shown = "; ".join(
            f"with `{edge.factor.partition(', with ')[2]}` {_signed(edge.change)}"
            f"{', decided' if edge.decided else ''}"
            for edge in own
        )
        yield f"`{first}` less `{second}`, all else equal: {shown}."


def _probable(study: Study) -> Iterator[str]:
    """Say how the softmax's own probabilities compare with those that curves make of margins."""
    by_name = {look.name: look for look in study.looks}
    if "softmax" not in by_name or len(by_name) < 2:
        return
    own = by_name["softmax"].probabilities.regions["as it is"].measured
    for name, look in by_name.items():
        if name == "softmax":
            continue
        # Of regions, which are the same for all; each head has detections of its own.
        change = look.probabilities.regions["Platt"].measured.less(own)["log_loss"]
        side = "undecided" if change.low <= 0 <= change.high else "less" if change.value < 0 else "more"
        yield (
            f"Probabilities of regions: the log loss of the {name} with Platt's curve less that of the "
            f"softmax as it is is {change.value:+.4f} ({change.low:+.4f} to {change.high:+.4f}): {side}."
        )


def _bounds(change: Interval) -> str:
    low, high = sorted((100 * abs(change.low), 100 * abs(change.high)))
    return f"{low:.1f} to {high:.1f}"


def _decided(effect: Effect, measure: str) -> str:
    ahead, behind = effect.first, effect.second
    if effect.change.value < 0:
        ahead, behind = behind, ahead
    return (
        f"`{ahead}` is ahead of `{behind}` by {100 * abs(effect.change.value):.1f} {measure}, "
        f"{_bounds(effect.change)}, in the mean over {_pairs(effect)} that differ in nothing else "
        f"(p = {effect.p_holm:.2g}, corrected)."
    )


def _pairs(effect: Effect) -> str:
    return f"{effect.n_pairs} pairs of cells" if effect.n_pairs > 1 else "the one pair of cells"


def _undecided(effects: Sequence[Effect]) -> str:
    return ", ".join(f"`{e.first}` less `{e.second}` is {_signed(e.change)}" for e in effects)


def _signed(value: Interval) -> str:
    return f"{signed(100 * value.value)} ({signed(100 * value.low)} to {signed(100 * value.high)})"


def _named(study: Study, levels: Sequence[str]) -> str:
    """Name a cell by what differs from the first levels, or by those that planes cross."""
    home = study.design.home
    named = [
        level
        for name, level in zip(home, levels, strict=True)
        if level != home[name] or any(name in plane.about for plane in study.design.planes)
    ]
    return " / ".join(named)


def write_study(folder: str | Path, study: Study, curve: Curve | None = None, *, command: str) -> list[str]:
    """Write the study as JSON, tables, figures, page and README; return the verdict.

    Args:
        folder: made where missing.
        study: finished.
        curve: the learning curve that goes with it.
        command: that made it.

    Raises:
        DataError: the folder cannot be written to, or a test image not be read.
        DiskSpaceError: the disk is full.
    """
    folder, parts = Path(folder), study.parts
    remove_marker(folder / "study.json")  # where it lies, the rest is whole
    cells, effects, classes = list(_cells(study)), list(_effects(study)), list(_by_class(study))
    tables = {"cells": cells, "effects": effects, "effects_by_class": classes}
    figures = {"effects": effects_figure(study.effects)}
    if study.shares:
        tables["shares"] = list(_shares(study))
        figures["shares"] = shares_figure(study.shares)
    if study.looks:
        tables |= {
            "probabilities": list(_probabilities(study)),
            "reliability": list(_bins(study)),
            "mistakes": list(mistake_rows(study.looks)),
            "groups": list(group_rows(study.looks)),
        }
        figures["mistakes"] = mistakes_figure(study.looks)
        for what in ("regions", "detections"):
            figures[f"reliability_{what}"] = reliability_figure(study.looks, what)
    if len(study.looks) > 1:
        tables["flips"] = list(_flips(study))
    if curve is not None:
        tables["curve"] = list(point_rows(curve))
        figures["curve"] = curve_figure(curve)
    for name, rows in tables.items():
        write_text(folder / f"{name}.csv", csv_text(rows))
    pictures = {name: svg(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        with atomic_path(folder / f"{name}.svg") as temporary:
            temporary.write_bytes(picture)
    values = copy.deepcopy(dict(parts.described))
    values["data"]["path"] = portable_path(values["data"]["path"])
    write_json(folder / "config.json", values)
    about, words = provenance(seed=parts.seed, command=command), verdict(study, curve)
    write_text(folder / "README.md", _readme(study, words, tables, figures, about))
    write_study_page(folder, study, words, tables, pictures, config=values, about=about)
    splits = study.splits
    write_json(
        folder / "study.json",
        {
            "schema": 1,
            "experiment": folder.name,
            "dataset": splits.train.name,
            "n_train_images": len(splits.trainval),
            "n_test_images": len(splits.test),
            "seeds": list(study.seeds),
            "rule": parts.rule,
            "verdict": words,
            "shares": list(_shares(study)),
            "cells": cells,
            "left_out": [
                dict(cell.levels) | {"why": cell.left_out}
                for cell in study.design.cells.values()
                if cell.recipe is None
            ],
            "effects": effects,
            "probabilities": tables.get("probabilities", []),
            "mistakes": tables.get("mistakes", []),
            "groups": tables.get("groups", []),
            "curve": None if curve is None else curve_json(curve),
            "stages_s": dict(study.seconds),
            "cells_kept_from_an_earlier_run": study.n_kept,
            "provenance": about,
        },
    )
    return words


def _cells(study: Study) -> Iterator[dict[str, Any]]:
    for cell in study.design.trained:
        own = [study.outcomes[cell.key, seed] for seed in study.seeds]
        for level, boxed in BOXES.levels.items():
            if (cell.key, boxed) not in study.values:
                continue
            value = study.values[cell.key, boxed].interval
            yield {
                **cell.levels,
                BOXES.name: level,
                "mAP": 100 * value.value,
                "mAP_low": 100 * value.low,
                "mAP_high": 100 * value.high,
                **{
                    column: 100 * number
                    for measure, measured in study.accuracy.items()
                    for column, number in in_columns(measure, measured[cell.key].interval).items()
                },
                **{
                    f"coco_{name}": 100 * sum(outcome.coco[boxed][name] for outcome in own) / len(own)
                    for name in ("AP", "AP50", "AP75")
                },
                "val_mAP": sum(max(t["val_map"] for t in outcome.tried) for outcome in own) / len(own),
                "C": " ".join(f"{outcome.settings['C']:g}" for outcome in own),
                "train_s": sum(outcome.train_s for outcome in own) / len(own),
                "peak_rss_mb": _largest([outcome.peak_rss_mb for outcome in own]),
            }


def _largest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known, default=None)


def _effects(study: Study) -> Iterator[dict[str, Any]]:
    kinds = {
        "effect": study.effects,
        "interaction": study.interactions,
        "all else equal": study.edges,
        "effect on accuracy": study.accuracy_effects,
    }
    for kind, effects in kinds.items():
        for effect in effects:
            yield {
                "kind": kind,
                "factor": effect.factor,
                "first": effect.first,
                "second": effect.second,
                **_change(effect.change),
                "n_pairs": effect.n_pairs,
                "p": effect.p,
                "p_holm": effect.p_holm,
                "detectable": 100 * effect.detectable,
            }


def _by_class(study: Study) -> Iterator[dict[str, Any]]:
    for effect in study.effects:
        for name, change in zip(study.splits.test.classes, effect.per_class, strict=True):
            yield {
                "factor": effect.factor,
                "first": effect.first,
                "second": effect.second,
                "class": name,
                **_change(change),
            }


def _shares(study: Study) -> Iterator[dict[str, Any]]:
    for boxed, shares in study.shares.items():
        for share in shares:
            yield {
                "boxes": next(level for level, value in BOXES.levels.items() if value == boxed),
                "factor": share.factor,
                "first": SVM.get(share.factor, "SVM"),
                "second": SOFTMAX.get(share.factor, "softmax"),
                **_change(share.change),
            }


def _probabilities(study: Study) -> Iterator[dict[str, Any]]:
    """Yield what is measured of probabilities: fractions, and nats for the log loss."""
    for look in study.looks:
        for what in ("regions", "detections"):
            for way, judged in getattr(look.probabilities, what).items():
                row: dict[str, Any] = {"head": look.name, "of": what, "made": way}
                for name, value in judged.measured.measures.items():
                    row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
                yield row


def _bins(study: Study) -> Iterator[dict[str, Any]]:
    for look in study.looks:
        for what in ("regions", "detections"):
            for way, judged in getattr(look.probabilities, what).items():
                drawn = judged.drawn
                for b in np.flatnonzero(drawn.count):
                    yield {
                        "head": look.name,
                        "of": what,
                        "made": way,
                        "from": float(drawn.edges[b]),
                        "to": float(drawn.edges[b + 1]),
                        "count": int(drawn.count[b]),
                        **{n: float(getattr(drawn, n)[b]) for n in ("probability", "share", "low", "high")},
                    }


def _flips(study: Study) -> Iterator[dict[str, Any]]:
    """Yield the test images, those first in which the first head is furthest ahead of the softmax."""
    first, second = study.looks[0], study.looks[-1]
    found = disagreement(first, second)
    ids = [sample.image_id for sample in study.splits.test]
    for row, at in enumerate(found.image):
        yield {
            "image": ids[at],
            "n_objects": int(found.n_objects[row]),
            **{
                f"{what} by {look.name}": int(getattr(found, name)[row, side])
                for what, name in (
                    ("found", "found"),
                    ("found only", "only"),
                    ("false alarms", "false_alarms"),
                )
                for side, look in enumerate((first, second))
            },
        }


def _change(value: Interval) -> dict[str, float | None]:
    number = value.in_percent()
    return {"change": number["value"], "low": number["low"], "high": number["high"]}


def _readme(
    study: Study,
    words: Sequence[str],
    tables: Mapping[str, Sequence[dict[str, Any]]],
    figures: Collection[str],
    about: dict[str, Any],
) -> str:
    cells, effects = tables["cells"], tables["effects"]
    splits, left = study.splits, [c for c in study.design.cells.values() if c.recipe is None]
    best = sorted(cells, key=lambda cell: -cell["mAP"])[:10]
    hidden = {"coco_AP50", "val_mAP", "train_s", "peak_rss_mb"} | {
        name
        for name in cells[0]
        if name.endswith(("_low", "_high"))
        or (name in study.design.factors and len({cell[name] for cell in cells}) == 1)
    }
    names = [name for name in best[0] if name not in hidden]
    reasons = dict.fromkeys(cell.left_out for cell in left)
    why = f" {len(left)} combinations were left out: {'; '.join(reasons)}." if left else ""
    seeds = f", with each of {len(study.seeds)} seeds" if len(study.seeds) > 1 else ""
    again, first = (" and of the seeds", " with the first seed") if seeds else ("", "")
    main = [effect for effect in effects if effect["kind"] == "effect"]
    right = [effect for effect in effects if effect["kind"] == "effect on accuracy"]
    equal = [effect for effect in effects if effect["kind"] == "all else equal"]
    n_crossed = sum(effect["kind"] == "interaction" for effect in effects)
    return (
        f"# {splits.train.name}: why SVMs and not the softmax?\n\n"
        + "".join(f"- {sentence}\n" for sentence in words)
        + f"\nTrained on {len(splits.trainval)} images, measured once on {len(splits.test)}: "
        f"{len(study.design.trained)} cells on the same regions and features, each without and with box "
        f"regression{seeds}, each with six settings to choose from on val{first}.{why} A change is the mean "
        f"over all pairs of cells that differ in this alone, with a 95 % interval of a paired bootstrap over "
        f"the test images{again}; p values are corrected by Holm's method, for all {len(main)} effects, and "
        f"apart from them for all {n_crossed} interactions"
        + (f" and all {len(right)} effects on accuracy" if right else "")
        + ".\n\n"
        + ("![Where the difference comes from](shares.svg)\n\n" if study.shares else "")
        + "![What each change does](effects.svg)\n\n"
        + _effect_table(main, "mAP")
        + (_effect_table(equal, "mAP") if equal else "")
        + (_effect_table(right, "accuracy") if right else "")
        + "Interactions are in [effects.csv](effects.csv), the classes in "
        "[effects_by_class.csv](effects_by_class.csv), all cells in [cells.csv](cells.csv); the best ten:\n\n"
        + f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
        + "".join(f"| {' | '.join(_cell(row[name]) for name in names)} |\n" for row in best)
        + "".join(
            f"\n## {title}\n\n![{title}]({name}.svg)\n\nThe numbers: [{table}.csv]({table}.csv).\n"
            for name, (title, table) in _PICTURES.items()
            if name in figures
        )
        + f"\nMade by `{about['command']}` at commit {about['commit'][:12]} on {about['date']}, seed "
        f"{about['seed']}, {about['machine']['cpu']} with {about['machine']['cores']} cores.\n"
    )


def _effect_table(effects: Sequence[dict[str, Any]], measure: str) -> str:
    return (
        f"| factor | change | {measure} | 95 % interval | pairs | p, corrected | would be found |\n"
        "|---|---|--:|--:|--:|--:|--:|\n"
        + "".join(
            f"| {e['factor']} | {e['first']} less {e['second']} | {signed(e['change'])} | "
            f"{signed(e['low'])} to {signed(e['high'])} | {e['n_pairs']} | {e['p_holm']:.2g} | "
            f"{e['detectable']:.1f} |\n"
            for e in effects
        )
        + "\n"
    )


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
