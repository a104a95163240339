"""What the study of a network's parts leaves behind: a verdict, tables, and pictures of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rcnn_svm.evaluation.bootstrap import Interval
from rcnn_svm.experiment.cnn_study import FACTORS, CnnFactor, CnnStudy, Comparison
from rcnn_svm.files import atomic_path, csv_text, remove_marker, write_json, write_text
from rcnn_svm.report import palette
from rcnn_svm.report.plots import style, svg
from rcnn_svm.report.provenance import provenance
from rcnn_svm.report.tables import signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["changes_figure", "cnn_verdict", "curves_figure", "write_cnn_study"]

_BUSY = 1.1
"""A training that takes so many times its CPU seconds by the clock shared its core with other work."""


def cnn_verdict(study: CnnStudy) -> list[str]:
    """Return a sentence or two for each part, which claim no more than the intervals."""
    sentences = []
    for name, factor in FACTORS.items():
        own = [one for one in study.comparisons if one.variant.factor == name]
        lost = [one for one in own if _n_diverged(one)]
        whole = [one for one in own if not _n_diverged(one)]
        decided, open_ = ([one for one in whole if one.decided == kind] for kind in (True, False))
        words = [f"{factor.question} Against `{factor.base}`:"] if own else []
        words += [
            f"`{one.variant.level}` {_moved(one.change.mean)} (p = {one.p_holm:.3g}, corrected)."
            for one in decided
            if one.change is not None
        ]
        if open_:
            found = [(one, one.change) for one in open_ if one.change is not None]
            least = max(change.detectable for _, change in found)
            listed = ", ".join(f"`{one.variant.level}` {_change(change.mean)}" for one, change in found)
            words.append(
                f"Not decided: {listed}; {100 * least:.1f} points would be found in four of five studies."
            )
        words += [
            f"`{one.variant.level}` diverged in {_n_diverged(one)} of {len(one.runs)} trainings at the rate "
            f"that held-out digits chose."
            for one in lost
        ]
        if words:
            sentences.append(" ".join(words))
    return sentences


def _n_diverged(one: Comparison) -> int:
    return sum("-" in run.predictions for run in one.runs)


def _moved(change: Interval) -> str:
    low, high = sorted((abs(change.low), abs(change.high)))
    verb = "gains" if change.value > 0 else "loses"
    return f"{verb} {100 * abs(change.value):.1f} points ({100 * low:.1f} to {100 * high:.1f})"


def _change(change: Interval) -> str:
    return f"{signed(100 * change.value)} ({signed(100 * change.low)} to {signed(100 * change.high)})"


def write_cnn_study(folder: Path, study: CnnStudy, *, command: str) -> list[str]:
    """Write README.md, variants.csv, curves.csv, changes.svg, curves.svg and last study.json.

    Args:
        folder: is made if need be.
        study: finished.
        command: that made it, for the record.

    Returns:
        The verdict.
    """
    remove_marker(folder / "study.json")
    variants, points = [_row(one) for one in study.comparisons], list(_points(study))
    write_text(folder / "variants.csv", csv_text(variants))
    write_text(folder / "curves.csv", csv_text(points))
    for name, figure in (("changes.svg", changes_figure(study)), ("curves.svg", curves_figure(study))):
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(svg(figure))
    about, words = provenance(seed=study.design.seed, command=command), cnn_verdict(study)
    busy = _beside_other_work(study)
    write_text(folder / "README.md", _readme(study, words, variants, about, busy))
    write_json(
        folder / "study.json",
        {
            "schema": 1,
            "experiment": folder.name,
            "dataset": "handwritten digits of scikit-learn",
            "design": asdict(study.design),
            "n_train_images": study.design.per_class * 10,
            "n_test_images": study.n_test,
            "verdict": words,
            "variants": variants,
            "seconds_beside_other_work": busy,
            "provenance": about,
        },
    )
    return words


def _beside_other_work(study: CnnStudy) -> bool:
    runs = [run for one in study.comparisons for run in one.runs]
    return sum(run.wall_s for run in runs) > _BUSY * sum(run.cpu_s for run in runs)


def _row(one: Comparison) -> dict[str, Any]:
    accuracy, change, runs = one.accuracy.mean, one.change, one.runs
    moved = None if change is None else change.mean
    return {
        "factor": one.variant.factor or "base",
        "level": one.variant.level,
        "accuracy": 100 * accuracy.value,
        "accuracy_low": max(0.0, 100 * accuracy.low),
        "accuracy_high": min(100.0, 100 * accuracy.high),
        "change": None if moved is None else 100 * moved.value,
        "change_low": None if moved is None else 100 * moved.low,
        "change_high": None if moved is None else 100 * moved.high,
        "p": None if change is None else change.p,
        "p_holm": None if change is None else one.p_holm,
        "detectable": None if change is None else 100 * change.detectable,
        "setting": runs[0].setting,
        "setting_at_edge": one.at_edge,
        "diverged": _n_diverged(one),
        "n_parameters": round(float(np.mean([run.n_parameters for run in runs]))),
        "memory_mb": float(np.mean([run.memory_mb for run in runs])),
        "wall_s": float(np.mean([run.wall_s for run in runs])),
        "cpu_s": float(np.mean([run.cpu_s for run in runs])),
    }


def _points(study: CnnStudy) -> Iterator[dict[str, Any]]:
    for one in study.comparisons:
        for run in one.runs:
            for epoch, loss, learned, accuracy in run.curve:
                yield {
                    "factor": one.variant.factor or "base",
                    "level": one.variant.level,
                    "seed": run.seed,
                    "epoch": epoch,
                    "loss": loss,
                    "training_accuracy": 100 * learned,
                    "test_accuracy": 100 * accuracy,
                }


def _readme(
    study: CnnStudy,
    words: Sequence[str],
    variants: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    busy: bool,
) -> str:
    design, base = study.design, study.comparisons[0]
    edges = [f"{row['factor']}: {row['level']}" for row in variants if row["setting_at_edge"]]
    names = {name: factor.base for name, factor in FACTORS.items()}
    rows = []
    for row in variants:
        change = ("", "", "")
        if row["change"] is not None:
            interval = f"{signed(row['change_low'])} to {signed(row['change_high'])}"
            change = (signed(row["change"]), interval, f"{row['p_holm']:.3g}")
        lost = f"; {row['diverged']} diverged" if row["diverged"] else ""
        span = f"{row['accuracy_low']:.1f} to {row['accuracy_high']:.1f}"
        rows.append(
            f"| {row['factor']} | {row['level']} | {row['accuracy']:.1f} | {span} | "
            f"{' | '.join(change)} | {row['setting']}{lost} | {row['n_parameters']:,} | "
            f"{row['memory_mb']:.1f} | {row['cpu_s']:.1f} |\n"
        )
    seconds = (
        "They were measured beside other work, which costs them some: compare them roughly."
        if busy
        else "No other work ran on that core."
    )
    levels = ", ".join(f"{name} {level}" for name, level in names.items())
    value, n_runs = base.accuracy.mean, design.n_seeds
    return (
        "# What the parts of a small network are worth\n\n"
        f"`small_cnn` with one part exchanged at a time, learned from {design.per_class} handwritten digits "
        f"of each class. As it is, it gets {100 * value.value:.1f} % of the test digits right "
        f"({100 * value.low:.1f} to {100 * value.high:.1f}).\n\n"
        + "".join(f"- {sentence}\n" for sentence in words)
        + "\n![What each exchange does](changes.svg)\n\n"
        "![Accuracy on test during training](curves.svg)\n\n"
        "| part | in its place | accuracy | 95 % interval | change | 95 % interval | p, corrected | chosen | "
        "parameters | MB | s |\n|---|---|--:|--:|--:|--:|--:|---|--:|--:|--:|\n"
        + "".join(rows)
        + f"\n`{base.variant.level}` is {levels}. MB is what a training step on {design.batch_size} digits "
        "holds: weights, gradients, the optimizer's state and what the way back needs. Seconds are those of "
        f"one core for one training. {seconds} All rows are in [variants.csv](variants.csv), all points in "
        "[curves.csv](curves.csv), every prediction in [runs.jsonl](runs.jsonl).\n\n"
        "## How it was measured\n\n"
        f"The 8 x 8 digits are enlarged to 32 x 32 pixels. Each of {n_runs} seeds has "
        f"{10 * design.per_class} training digits of its own, no digit in two, and weights of its own; "
        f"{design.n_epochs} passes in steps of {design.batch_size}, rates falling along a cosine, no weight "
        "decay. With thousands of digits everything would come close to 100 % and nothing could be told "
        f"apart. All are tested on the same {study.n_test} digits, of other writers.\n\n"
        f"Every variant, the network as it is included, chooses from the same learning rates, "
        f"{', '.join(f'{rate:g}' for rate in design.rates)}; SVMs choose their cost from seven. "
        f"Trainings without {10 * design.held_out} digits of each seed choose by these, on "
        f"{design.n_choosing} of the seeds together; of equal ones the first is taken.\n\n"
        "A change is that of accuracy on the same digits and seeds. Networks and digits are both samples, so "
        "its interval is that of a two-way layout with both random (Hillis 2007): neither the next training "
        f"nor the next digits are taken as known. All {len(variants) - 1} changes are one family; p values "
        "are corrected for it by Holm's method.\n\n"
        "## What it does not say\n\n"
        "- One part is exchanged at a time: what two do together is unknown.\n"
        "- It holds for few small grey images, a short training and this one network. Dropout, normalisation "
        "and augmentation do other things to large ones.\n"
        "- Rates stand a factor of three apart and few digits choose among them, so that part of a "
        "difference may be one of the rate"
        + (f"; the first or last setting on offer was chosen by {', '.join(edges)}" if edges else "")
        + ".\n- A training that diverged counts as one that gets nothing right.\n"
        "- SVMs read the network that was trained with the softmax; they inherit its rate.\n"
        f"- {n_runs} networks of a variant leave as few as {n_runs - 1} degrees of freedom: what is not "
        "decided is unknown, not equal.\n\n"
        f"Made by `{about['command']}` at commit {about['commit'][:12]} on {about['date']}, seed "
        f"{about['seed']}, {about['machine']['cpu']} with {about['machine']['cores']} cores.\n"
    )


def _panels(study: CnnStudy) -> list[tuple[str, CnnFactor, list[Comparison]]]:
    """Return the factors that the study has, each with its variants."""
    found = [
        (name, factor, [one for one in study.comparisons if one.variant.factor == name])
        for name, factor in FACTORS.items()
    ]
    return [panel for panel in found if panel[2]]


def changes_figure(study: CnnStudy) -> Figure:
    """Draw each change as a dot with its interval, by part; those that stand are full, others hollow.

    Variants with a training that diverged are left out.
    """
    from matplotlib.figure import Figure

    panels = _panels(study)
    n_rows = -(-len(panels) // 2)
    pairs = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    heights = [max(len(panel[2]) for panel in pair) + 1.2 for pair in pairs]
    with style():
        figure = Figure(figsize=(13.2, 0.36 * sum(heights) + 1.0), layout="constrained")
        grid = figure.subplots(n_rows, 2, squeeze=False, sharex=True, height_ratios=heights)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (name, factor, tried) in zip(grid.flat, panels, strict=False):
            own = [one for one in tried if not _n_diverged(one)]
            axes.axvline(0, color=palette.GREY, linewidth=1)
            for y, one in enumerate(own[::-1]):
                assert one.change is not None
                change = one.change.mean
                colour = palette.BLUE if one.decided else palette.SOFT
                axes.plot([100 * change.low, 100 * change.high], [y, y], color=colour, linewidth=2.2)
                face = colour if one.decided else "white"
                axes.plot([100 * change.value], [y], "o", color=colour, markerfacecolor=face, markersize=8)
            levels = [one.variant.level for one in own[::-1]]
            axes.set_yticks(range(len(own)), levels, parse_math=False)
            axes.set_ylim(-0.6, len(own) - 0.4)
            axes.set_title(f"{name}: against {factor.base}", fontsize=13, loc="left", parse_math=False)
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        figure.supxlabel(
            "points of accuracy, 95 % interval; full: corrected p < 0.05", fontsize=12, color=palette.INK
        )
    return figure


def curves_figure(study: CnnStudy) -> Figure:
    """Draw accuracy on test against epochs, mean over the seeds that did not diverge, one panel a part."""
    from matplotlib.figure import Figure

    panels = [
        (name, factor, [one for one in own if not one.variant.machines])
        for name, factor, own in _panels(study)
    ]
    n_columns = min(4, len(panels))
    n_rows = -(-len(panels) // n_columns)
    colours = (palette.BLUE, palette.VERMILION, palette.GREEN, palette.ORANGE, palette.PURPLE, "#5a5a5a")
    with style():
        figure = Figure(figsize=(3.3 * n_columns, 3.4 * n_rows + 0.4), layout="constrained")
        grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (name, factor, own) in zip(grid.flat, panels, strict=False):
            _curve(axes, study.comparisons[0], factor.base, palette.INK, 2.6)
            for colour, one in zip(colours, own, strict=False):
                _curve(axes, one, one.variant.level, colour, 1.8)
            axes.set_title(name, fontsize=13, loc="left", parse_math=False)
            axes.set_ylim(0, 100)
            legend = axes.legend(loc="lower right", fontsize=10.5, frameon=False, handlelength=1.2)
            for text in legend.get_texts():
                text.set_parse_math(False)
        figure.supxlabel("epoch", fontsize=12, color=palette.INK)
        figure.supylabel("accuracy on test in percent", fontsize=12, color=palette.INK)
    return figure


def _curve(axes: Axes, one: Comparison, label: str, colour: str, width: float) -> None:
    whole = [run.curve for run in one.runs if "-" not in run.predictions]
    if not whole:
        return
    if len(whole) < len(one.runs):
        label += f" ({len(whole)} of {len(one.runs)})"
    epochs = [point[0] for point in whole[0]]
    accuracy = 100 * np.mean([[point[3] for point in curve] for curve in whole], axis=0)
    axes.plot(epochs, accuracy, "o-", color=colour, linewidth=width, markersize=4, label=label)
