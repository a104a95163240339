"""One self-contained page about a study: verdict first, then figures, tables, and pictures to move through.

What is shown is chosen here, `study.html.jinja` says how, `study.js` moves it: sorting and filtering tables,
a slider over scores, boxes by head, the pictures behind a confusion. Without scripts everything but that can
be read. Styles, script and pictures are inside the file; it loads nothing from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rcnn_svm.evaluation.voc import RULE_NAMES
from rcnn_svm.experiment.study import Study
from rcnn_svm.files import write_text
from rcnn_svm.report.evidence import AGAINST, FOR
from rcnn_svm.report.html import environment, inline
from rcnn_svm.report.looks import Row, Table, by_mistake, cell_text, looked_at, table_of
from rcnn_svm.report.study_evidence import evidence_shown
from rcnn_svm.report.tables import signed

__all__ = ["write_study_page"]


def write_study_page(
    folder: Path,
    study: Study,
    words: Sequence[str],
    tables: Mapping[str, Sequence[Row]],
    figures: Mapping[str, bytes],
    *,
    config: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Path:
    """Write `report.html` into `folder`.

    Args:
        folder: made if need be.
        study: finished; the pictures that are shown are read from its test split.
        words: the verdict.
        tables: rows by the name of the CSV file that holds them.
        figures: SVG by the name of the file.
        config: the resolved configuration, shown at the end.
        about: where the numbers come from, as `provenance` tells it.

    Returns:
        The file written.

    Raises:
        DataError: a picture cannot be read, or the folder not be written to.
        DiskSpaceError: the disk is full.
    """
    test = study.splits.test
    text = (
        environment()
        .get_template("study.html.jinja")
        .render(
            study=study,
            train=study.splits.train.name,
            n_trainval=len(study.splits.trainval),
            n_test=len(test),
            whole=test.whole,
            rule=RULE_NAMES[study.parts.rule],
            words=words,
            tables=_tables(tables),
            charts={name: inline("svg+xml", picture) for name, picture in figures.items()},
            **looked_at(study.looks, test, "chosen on val"),
            missed=None,
            sides=(FOR, AGAINST),
            evidence=evidence_shown(study.looks, study.splits.train, test) if len(study.looks) > 1 else [],
            left_out=[
                {"levels": " / ".join(cell.levels.values()), "why": cell.left_out}
                for cell in study.design.cells.values()
                if cell.recipe is None
            ],
            config=json.dumps(config, indent=2, default=str),
            about=about,
        )
    )
    path = folder / "report.html"
    write_text(path, text)
    return path


def _tables(tables: Mapping[str, Sequence[Row]]) -> dict[str, Table]:
    """Make tables for people of the rows of CSV files, those that the page shows."""
    shown: dict[str, Table] = {}
    for kind in ("effect", "interaction", "all else equal", "effect on accuracy"):
        measure = "accuracy" if kind.endswith("accuracy") else "mAP"
        shown[kind] = table_of(_effect(row, measure) for row in tables["effects"] if row["kind"] == kind)
    shown["classes"] = table_of(
        {"factor": r["factor"], "change": f"{r['first']} less {r['second']}", "class": r["class"]}
        | _change(r)
        for r in tables["effects_by_class"]
    )
    shown["shares"] = table_of(
        {"boxes": r["boxes"], "factor": r["factor"], "SVM less softmax": f"{r['first']} less {r['second']}"}
        | _change(r)
        for r in tables.get("shares", [])
    )
    shown["probabilities"] = table_of(map(_with_intervals, tables.get("probabilities", [])))
    shown["mistakes"] = table_of(by_mistake(tables.get("mistakes", [])))
    shown["cells"] = table_of(_different(tables["cells"]))
    for name in ("groups", "flips", "curve"):
        shown[name] = table_of(tables.get(name, []))
    return {name: table for name, table in shown.items() if table.rows}


def _different(cells: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield cells without the words that all of them share, measures in one cell with their intervals."""
    shared = {name for name, value in cells[0].items() if all(cell[name] == value for cell in cells[1:])}
    for cell in cells:
        shown: dict[str, Any] = {}
        for name, value in cell.items():
            if f"{name}_low" in cell:
                low, high = (cell_text(cell[f"{name}_{end}"]) for end in ("low", "high"))
                shown[name] = f"{cell_text(value)} ({low} to {high})"
            elif not name.endswith(("_low", "_high")) and not (name in shared and isinstance(value, str)):
                shown[name] = value
        yield shown


def _change(row: Row, measure: str = "mAP") -> dict[str, str]:
    if row["change"] is None:
        return {measure: "none", "95 % interval": "none"}
    bounds = f"{signed(row['low'])} to {signed(row['high'])}"
    return {measure: signed(row["change"]).replace("-", "−"), "95 % interval": bounds.replace("-", "−")}


def _effect(row: Row, measure: str) -> dict[str, Any]:
    return {
        "factor": row["factor"],
        "change": f"{row['first']} less {row['second']}",
        **_change(row, measure),
        "pairs": row["n_pairs"],
        "p, corrected": f"{row['p_holm']:.2g}",
        "would be found": row["detectable"],
    }


def _with_intervals(row: Row) -> dict[str, Any]:
    """Join a measure with its bounds in one cell; three decimals, as they are fractions and nats."""
    joined: dict[str, Any] = {}
    for name, value in row.items():
        if f"{name}_low" in row:
            joined[name] = f"{value:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"
        elif not name.endswith(("_low", "_high")):
            joined[name] = value
    return joined
