"""What a study leaves behind: cells and effects as tables, a picture of the effects, and a verdict."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcnn_svm.evaluation.bootstrap import Interval
from rcnn_svm.experiment.study import BOXES, FACTORS, Effect, Study
from rcnn_svm.files import atomic_path, remove_marker, write_json, write_text
from rcnn_svm.report.plots import style, svg
from rcnn_svm.report.provenance import portable_path, provenance
from rcnn_svm.report.tables import csv_text, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["effects_figure", "verdict", "write_study"]

_QUESTIONS = {factor.name: factor.question for factor in (*FACTORS.values(), BOXES)}


def verdict(study: Study) -> list[str]:
    """Return one sentence for each question that the study put, which claims no more than its interval."""
    n_images = len(study.experiment.splits.test)
    sentences = []
    for name, question in _QUESTIONS.items():
        own = [effect for effect in study.effects if effect.factor == name]
        if not own:
            continue
        decided = sorted((e for e in own if e.decided), key=lambda e: -abs(e.change.value))
        if decided:
            sentences += [f"{question} {_decided(effect, n_images)}" for effect in decided[:1]]
            continue
        least = max(effect.detectable for effect in own)
        sentences.append(
            f"{question} These {n_images} images do not decide it: {_undecided(own)}. The study would have "
            f"found a difference of {100 * least:.1f} points in four of five cases."
        )
    best, value = max(study.values.items(), key=lambda item: item[1].value)
    sentences.append(
        f"The best cell is {best[0]}{' with box regression' if best[1] else ''}: {_span(value)} mAP."
    )
    return sentences


def _decided(effect: Effect, n_images: int) -> str:
    ahead, behind, sign = effect.first, effect.second, 1
    if effect.change.value < 0:
        ahead, behind, sign = behind, ahead, -1
    low, high = sorted((sign * effect.change.low, sign * effect.change.high))
    gap, span = 100 * abs(effect.change.value), f"{100 * low:.1f} to {100 * high:.1f}"
    return (
        f"On these {n_images} images `{ahead}` is ahead of `{behind}` by {gap:.1f} mAP, {span}, in the mean "
        f"over {effect.n_pairs} pairs of cells that differ in nothing else (p = {effect.p_holm:.3g}, "
        f"corrected)."
    )


def _undecided(effects: Sequence[Effect]) -> str:
    return ", ".join(
        f"`{e.first}` less `{e.second}` is {signed(100 * e.change.value)} "
        f"({signed(100 * e.change.low)} to {signed(100 * e.change.high)})"
        for e in effects
    )


def _span(value: Interval) -> str:
    return f"{100 * value.value:.1f} ({100 * value.low:.1f} to {100 * value.high:.1f})"


def write_study(folder: str | Path, study: Study, *, command: str) -> list[str]:
    """Write `study.json`, `cells.csv`, `effects.csv`, `effects.svg` and README; return the verdict.

    Raises:
        DataError: the folder cannot be written to.
        DiskSpaceError: the disk is full.
    """
    folder, parts = Path(folder), study.experiment.parts
    remove_marker(folder / "study.json")  # where it lies, the rest is whole
    cells, effects = list(_cells(study)), list(_effects(study))
    write_text(folder / "cells.csv", csv_text(cells))
    write_text(folder / "effects.csv", csv_text(effects))
    with atomic_path(folder / "effects.svg") as temporary:
        temporary.write_bytes(svg(effects_figure(study)))
    values = copy.deepcopy(dict(parts.described))
    values["data"]["path"] = portable_path(values["data"]["path"])
    write_json(folder / "config.json", values)
    about, words = provenance(seed=parts.seed, command=command), verdict(study)
    write_text(folder / "README.md", _readme(study, words, cells, effects, about))
    splits = study.experiment.splits
    write_json(
        folder / "study.json",
        {
            "schema": 1,
            "experiment": folder.name,
            "dataset": splits.train.name,
            "n_train_images": len(splits.trainval),
            "n_test_images": len(splits.test),
            "rule": parts.rule,
            "verdict": words,
            "cells": cells,
            "left_out": [dict(c.levels) | {"why": c.left_out} for c in study.cells if c.recipe is None],
            "effects": effects,
            "stages_s": study.experiment.stages_s,
            "provenance": about,
        },
    )
    return words


def _cells(study: Study) -> Iterator[dict[str, Any]]:
    for cell in study.cells:
        if cell.recipe is None:
            continue
        for level, boxed in BOXES.levels.items():
            if (cell.recipe.name, boxed) not in study.values:
                continue
            result = study.experiment.heads[cell.recipe.name + ("+bbox" if boxed else "")]
            coco = {} if result.coco is None else result.coco.summary()
            value = study.values[cell.recipe.name, boxed]
            yield {
                **cell.levels,
                BOXES.name: level,
                "mAP": 100 * value.value,
                "mAP_low": 100 * value.low,
                "mAP_high": 100 * value.high,
                **{f"coco_{name}": 100 * coco[name] for name in ("AP", "AP50", "AP75") if coco},
                "val_mAP": result.details["val_map"],
                "C": result.details["settings"].get("C"),
                "train_s": result.train_s,
            }


def _effects(study: Study) -> Iterator[dict[str, Any]]:
    for kind, effects in (("effect", study.effects), ("interaction", study.interactions)):
        for effect in effects:
            yield {
                "kind": kind,
                "factor": effect.factor,
                "first": effect.first,
                "second": effect.second,
                "change": 100 * effect.change.value,
                "low": 100 * effect.change.low,
                "high": 100 * effect.change.high,
                "n_pairs": effect.n_pairs,
                "p": effect.p,
                "p_holm": effect.p_holm,
                "detectable": 100 * effect.detectable,
            }


def _readme(
    study: Study,
    words: Sequence[str],
    cells: Sequence[dict[str, Any]],
    effects: Sequence[dict[str, Any]],
    about: dict[str, Any],
) -> str:
    splits, n_left = study.experiment.splits, sum(cell.recipe is None for cell in study.cells)
    best = sorted(cells, key=lambda cell: -cell["mAP"])[:10]
    names = [
        name for name in best[0] if name not in ("mAP_low", "mAP_high", "coco_AP50", "val_mAP", "train_s")
    ]
    reasons = dict.fromkeys(cell.left_out for cell in study.cells if cell.recipe is None)
    left = f" {n_left} combinations were left out: {'; '.join(reasons)}." if n_left else ""
    main = [effect for effect in effects if effect["kind"] == "effect"]
    return (
        f"# {splits.train.name}: why SVMs and not the softmax?\n\n"
        + "".join(f"- {sentence}\n" for sentence in words)
        + f"\nTrained on {len(splits.trainval)} images, measured once on {len(splits.test)}: "
        f"{len(study.cells) - n_left} heads on the same regions and features, each without and with box "
        f"regression, each with five costs to choose from on val.{left} A change is the mean over all pairs "
        f"of cells that differ in this alone, with a 95 % interval of a paired bootstrap over the test "
        f"images; p values are corrected for all effects and interactions by Holm's method.\n\n"
        f"![What each change does](effects.svg)\n\n"
        f"| factor | change | mAP | 95 % interval | pairs | p, corrected | would be found |\n"
        f"|---|---|--:|--:|--:|--:|--:|\n"
        + "".join(
            f"| {e['factor']} | {e['first']} less {e['second']} | {signed(e['change'])} | "
            f"{signed(e['low'])} to {signed(e['high'])} | {e['n_pairs']} | {e['p_holm']:.3g} | "
            f"{e['detectable']:.1f} |\n"
            for e in main
        )
        + "\nInteractions are in [effects.csv](effects.csv), all cells in [cells.csv](cells.csv); the best "
        "ten:\n\n"
        + f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
        + "".join(f"| {' | '.join(_cell(row[name]) for name in names)} |\n" for row in best)
        + f"\nMade by `{about['command']}` at commit {about['commit'][:12]} on {about['date']}, seed "
        f"{about['seed']}, {about['machine']['cpu']} with {about['machine']['cores']} cores.\n"
    )


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def effects_figure(study: Study) -> Figure:
    """Draw every effect of a factor as a dot with its interval; those that stand are full, others hollow."""
    from matplotlib.figure import Figure

    effects = list(study.effects)[::-1]
    with style():
        figure = Figure(figsize=(11.1, 0.42 * len(effects) + 1.2), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color="#9aa3ad", linewidth=1)
        for y, effect in enumerate(effects):
            low, value, high = (100 * v for v in (effect.change.low, effect.change.value, effect.change.high))
            colour = "#0072b2" if effect.decided else "#9aa3ad"
            axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
            face = colour if effect.decided else "white"
            axes.plot([value], [y], "o", color=colour, markerfacecolor=face, markersize=8)
        names = [f"{e.factor}: {e.first} less {e.second}" for e in effects]
        axes.set_yticks(range(len(effects)), names, parse_math=False)
        axes.set_ylim(-0.6, len(effects) - 0.4)
        axes.set_xlabel("points of mAP, 95 % interval; full: corrected p < 0.05")
        axes.grid(axis="y", visible=False)
    return figure
