"""What thresholds and probabilities promise, and what comes of it on test; writes results/thresholds/.

    python benchmarks/thresholds.py DATA [--sets NAME ...] [--folds K ...]

DATA is the folder of `fruit`, `raccoon`, `bccd` and `voc2007-mini`. A default training per data set (head
softmax-finetuned), features from the cache. Thresholds are chosen, and curves of probabilities fitted, on
what a training without them found in the images held out: val (`folds=1`), and three folds of trainval
(`folds=3`). The detector that is then trained on all of trainval is looked at on test once, and every promise
is held against that. Data sets that are run replace their rows, others stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rcnn_svm.cache import default_cache, size_limit
from rcnn_svm.datasets import Splits
from rcnn_svm.evaluation.calibration import (
    ISOTONIC_POSITIVES,
    STEPS_POSITIVES,
    ClassCurves,
    PlattScaling,
    equal_mass_edges,
    measure_reliability,
)
from rcnn_svm.evaluation.thresholds import (
    Aim,
    Thresholds,
    UnreachedError,
    choose_thresholds,
    limit_false_alarms,
    reach_precision,
)
from rcnn_svm.evaluation.voc import HIT, IGNORED, Matches
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig, HeadsConfig
from rcnn_svm.experiment.data import load_data
from rcnn_svm.experiment.parts import Run
from rcnn_svm.experiment.recipe import run_experiment
from rcnn_svm.files import read_json, write_json, write_text
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance
from rcnn_svm.threads import usable_cores

SETS = ("fruit", "raccoon", "bccd", "voc2007-mini")
FOLDS = (1, 3)
AIMS: dict[str, Aim] = {
    "best F1": choose_thresholds,
    **{f"false alarms {r:g}": partial(limit_false_alarms, per_image=r) for r in (0.05, 0.1, 0.5)},
    **{f"precision {p:g}": partial(reach_precision, share=p) for p in (0.7, 0.8, 0.9, 0.95)},
}
OUT = Path("results/thresholds")

Row = dict[str, Any]


def rows_of(name: str, config: ExperimentConfig, splits: Splits, run: Run) -> list[Row]:
    """Train, look at test, and hold every promise against what came of it."""
    experiment = run_experiment(config.build(), splits, run)
    result = next(one for one in experiment.heads.values() if one.preferred)
    assert result.held_out is not None
    held, test = result.held_out.evaluation.matches, result.evaluation.matches
    about = {
        "data": name,
        "folds": config.folds,
        "head": result.detector.head,
        "n_held_out": len(held.n_objects),
        "n_test": len(test.n_objects),
        "mAP": 100 * result.evaluation.map(),
    }
    rows = []
    for aim, choose in AIMS.items():
        row: Row = {"name": f"{name}, folds {config.folds}, {aim}", "aim": aim, **about}
        try:
            chosen = choose(held)
        except UnreachedError as error:
            rows.append({**row, "unreached": str(error)})
            continue
        found = chosen.judged(test)
        rows.append({**row, "promised": _plain(chosen), "found": _plain(found)})
    reliability = {kind: _reliability(likely, held, test) for kind, likely in PROBABILITIES.items()}
    return [
        *rows,
        {"name": f"{name}, folds {config.folds}, probabilities", **about, "reliability": reliability},
    ]


def _plain(thresholds: Thresholds) -> Row:
    values = thresholds.to_json()
    return {**values["promised"], "classes": {k: v["false_alarms"] for k, v in values["classes"].items()}}


def _fitted(held: Matches) -> tuple[Any, ...]:
    counted = held.outcome != IGNORED
    return held.score[counted], held.outcome[counted] == HIT, held.label[counted], len(held.classes)


def _curves(held: Matches, steps_from: int = STEPS_POSITIVES) -> Callable[..., Any]:
    curves = ClassCurves.fit(*_fitted(held), n_images=len(held.n_objects), steps_from=steps_from)
    assert curves is not None
    return curves


def _plain_sigmoid(held: Matches) -> Callable[..., Any]:
    n = len(held.classes)
    return PlattScaling(np.ones(n), np.zeros(n), np.ones(n, bool))


PROBABILITIES: dict[str, Callable[[Matches], Callable[..., Any]]] = {
    "as saved": _curves,
    "steps from 100": partial(_curves, steps_from=ISOTONIC_POSITIVES),
    "sigmoids alone": lambda held: PlattScaling.fit(*_fitted(held)),
    "sigmoid of the score": _plain_sigmoid,
}
"""What makes probabilities of scores: a detector's curves, with steps from fewer right ones on, without any,
and nothing that was fitted."""


def _reliability(make: Callable[[Matches], Callable[..., Any]], held: Matches, test: Matches) -> Row:
    counted = test.outcome != IGNORED
    likely = make(held)(test.score[counted], test.label[counted])
    of = measure_reliability(
        likely,
        test.outcome[counted] == HIT,
        test.image[counted],
        equal_mass_edges(likely, 15),
        n_images=len(test.n_objects),
    )
    return {k: {"value": m.value, "low": m.low, "high": m.high} for k, m in of.measures.items()}


def targets_of(rows: list[Row]) -> dict[str, Row]:
    """Return how often, and how far, what was promised came."""
    held = [row for row in rows if "found" in row]
    targets = {}
    for kind, words in (("false_alarms", "false alarms"), ("precision", "precision")):
        mine = [row for row in held if row["aim"].startswith(words)]
        asked = [float(row["aim"].rpartition(" ")[2]) * (100 if kind == "precision" else 1) for row in mine]
        found = [row["found"][kind]["value"] for row in mine]
        inside = [
            row["found"][kind]["low"] <= row["promised"][kind]["high"]
            and row["promised"][kind]["low"] <= row["found"][kind]["high"]
            for row in mine
        ]
        if not mine:
            continue
        ratio = [f / a for f, a in zip(found, asked, strict=True)]
        for target, value, how in (
            (f"{kind}_found_over_asked", float(np.mean(ratio)), "mean over data sets, folds and demands"),
            (f"{kind}_intervals_that_meet", float(np.mean(inside)), "share in which promise and test agree"),
        ):
            unit = "x" if "over" in target else "fraction"
            targets[target] = {
                "value": value, "unit": unit, "n": len(mine), "ours": value, "peer": None, "peer_name": "",
                "how": how,
            }  # fmt: skip
    return targets


def page(rows: list[Row], about: Row) -> str:
    """Return the figures as Markdown."""

    def span(of: Row, digits: int) -> str:
        if of["value"] is None:
            return "none"
        ends = "" if of["low"] is None else f" [{of['low']:.{digits}f}, {of['high']:.{digits}f}]"
        return f"{of['value']:.{digits}f}{ends}"

    lines = [
        "# What thresholds and probabilities promise, and what came of it",
        "",
        "Default trainings. Thresholds are chosen on images that a training left out (val, or three folds",
        "of trainval) and held against test with the detector that was trained on all of trainval. 95 %",
        "intervals over the images. False alarms are those of all classes an image; precision is in percent.",
        "",
        "| data | held out | aim | false alarms promised | on test | precision promised | on test | recall |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "aim" not in row:
            continue
        held = f"{row['n_held_out']}, {'val' if row['folds'] == 1 else str(row['folds']) + ' folds'}"
        cells = [row["data"], held, row["aim"]]
        if "found" in row:
            for kind, digits in (("false_alarms", 3), ("precision", 0)):
                cells += [span(row[part][kind], digits) for part in ("promised", "found")]
            cells.append(span(row["found"]["recall"], 0))
        else:
            cells += ["not reached", "", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "How far probabilities of the detections on test can be believed: expected calibration error in 15",
        "bins of equal mass, then log loss in nats.",
        "",
        f"| data | held out | {' | '.join(PROBABILITIES)} |",
        f"|---|---|{'---|' * len(PROBABILITIES)}",
    ]
    for row in rows:
        if "reliability" in row:
            cells = [
                row["data"],
                f"{row['n_held_out']}, {'val' if row['folds'] == 1 else str(row['folds']) + ' folds'}",
            ]
            for kind in PROBABILITIES:
                of = row["reliability"][kind]
                cells.append(f"{of['calibration_error']['value']:.4f}, {of['log_loss']['value']:.4f}")
            lines.append(f"| {' | '.join(cells)} |")
    commits = ", ".join(sorted({str(row["commit"])[:12] for row in rows}))
    made = f"Made by `{about['command']}` and its like at commit {commits}, seed {about['seed']}"
    lines += ["", f"{made}, {about['machine']['cpu']} with {about['machine']['cores']} cores.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of the data sets")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, metavar="NAME")
    parser.add_argument("--folds", nargs="+", type=int, choices=FOLDS, default=FOLDS)
    parser.add_argument("--cache", type=Path, default=default_cache())
    options = parser.parse_args()
    about = provenance(seed=0)
    run = Run(options.cache, usable_cores(), cache_limit=size_limit(options.cache))
    file = OUT / "thresholds.json"
    for name in options.sets:
        data = DataConfig(str(options.data.resolve() / name), drop_bad_boxes=True)
        config = ExperimentConfig(data=data, heads=HeadsConfig(names=("softmax-finetuned",)))
        splits = load_data(data, seed=0)
        for folds in options.folds:
            new = rows_of(name, replace(config, folds=folds), splits, run)
            new = [{**row, "commit": about["commit"]} for row in new]
            rows = read_json(file)["rows"] if file.exists() else []  # another run may have written meanwhile
            rows = [*(row for row in rows if (row["data"], row["folds"]) != (name, folds)), *new]
            rows.sort(key=lambda row: (SETS.index(row["data"]), row["folds"]))
            result = {"schema": 1, "benchmark": "thresholds", "targets": targets_of(rows), "rows": rows}
            write_json(file, {**result, "provenance": about})
            write_text(OUT / "README.md", page(rows, about))
            say(f"{name}, folds {folds}: {file} written")


if __name__ == "__main__":
    main()
