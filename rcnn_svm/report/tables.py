"""The comparison of heads as a table: for people (Markdown), spreadsheets (CSV) and programs (JSON)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rcnn_svm.evaluation.bootstrap import BootstrapResult, Difference, Interval
from rcnn_svm.evaluation.coco import CocoResult
from rcnn_svm.evaluation.voc import EvalResult
from rcnn_svm.files import write_json, write_text
from rcnn_svm.progress import printable

__all__ = [
    "LOCALISATION",
    "comparison_rows",
    "comparison_table",
    "head_metrics",
    "markdown",
    "ranked_differences",
    "ranked_heads",
    "signed_interval",
    "threshold_table",
    "write_tables",
]


LOCALISATION = (
    "COCO AP is the mean over ten IoUs from 0.5 to 0.95; where AP75, at 0.75, lies far below AP50, at 0.5, "
    "objects are found but their boxes fit loosely."
)
"""What the columns of COCO say, in one sentence for every page that shows them."""
_COCO = ("AP", "AP50", "AP75")


def head_metrics(
    result: EvalResult,
    coco: CocoResult,
    interval: Interval,
    *,
    train_s: float,
    score_s_per_image: float,
    peak_rss_mb: float,
    measures: Mapping[str, float] | None = None,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make one head's entry in `metrics["heads"]`, in percent; null where there is nothing to measure.

    Args:
        result: its evaluation; mAP and AP are by its own rule.
        coco: its evaluation by COCO's rules.
        interval: of the mAP, from the paired bootstrap.
        train_s: seconds, all that belongs to this head alone.
        score_s_per_image: seconds.
        peak_rss_mb: 10^6 bytes.
        measures: of the experiment's own evaluators; each gets a column.
        details: anything more; `n_support_vectors` gets a column.
    """
    voc = result.to_json()["measures"][result.rule]
    summary = coco.to_json()["summary"]
    known = interval.low == interval.low  # not nan
    return {
        "mAP": voc["mAP"],
        "mAP_interval": [100 * interval.low, 100 * interval.high] if known else None,
        "ap": voc["ap"],
        "coco": {name: summary[name] for name in _COCO},
        "train_s": train_s,
        "score_s_per_image": score_s_per_image,
        "peak_rss_mb": peak_rss_mb,
        "measures": dict(measures or {}),
        "details": dict(details or {}),
    }


def ranked_heads(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the heads by falling mAP; ties keep the order of the file."""
    heads = metrics["heads"]
    return sorted(heads, key=lambda name: -(heads[name]["mAP"] or 0.0))


def ranked_differences(bootstrap: BootstrapResult) -> list[Difference]:
    """Return all differences that are defined, each as better minus worse, the largest first."""
    upright = [
        bootstrap.difference(each.second, each.first) if each.mean.value < 0 else each
        for each in bootstrap.differences
        if each.mean.value == each.mean.value  # not nan
    ]
    return sorted(upright, key=lambda each: -each.mean.value)


def comparison_rows(
    metrics: Mapping[str, Any], bootstrap: BootstrapResult | None = None
) -> list[dict[str, Any]]:
    """Return one flat record per head by falling mAP, with its distance to the best."""
    names = ranked_heads(metrics)
    rows = []
    for name in names:
        head = metrics["heads"][name]
        low, high = head.get("mAP_interval") or (None, None)
        row = {"head": name, "mAP": head["mAP"], "mAP_low": low, "mAP_high": high}
        if bootstrap is not None:
            gap = None if name == names[0] else bootstrap.difference(name, names[0])
            row |= {
                "minus_best": None if gap is None else 100 * gap.mean.value,
                "minus_best_low": None if gap is None else 100 * gap.mean.low,
                "minus_best_high": None if gap is None else 100 * gap.mean.high,
            }
        coco = head.get("coco", {})  # older files have none
        row |= {f"coco_{key}": coco.get(key) for key in _COCO}
        row |= dict(head.get("measures", {}))
        row |= {key: head.get(key) for key in ("train_s", "score_s_per_image", "peak_rss_mb")}
        row["n_support_vectors"] = head.get("details", {}).get("n_support_vectors")
        rows.append(row)
    return rows


def comparison_table(
    metrics: Mapping[str, Any], bootstrap: BootstrapResult | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return the comparison for people: heads of columns, and a line of cells per head by falling mAP.

    A column without a single figure is left out.
    """
    best, lines = ranked_heads(metrics)[0], []
    measures = {name: head.get("measures", {}) for name, head in metrics["heads"].items()}
    for row in comparison_rows(metrics, bootstrap):
        gap = None
        if bootstrap is not None and row["head"] != best:
            gap = bootstrap.difference(row["head"], best).mean
        score = row["score_s_per_image"]
        lines.append(
            {
                "head": row["head"],
                "mAP": "none" if row["mAP"] is None else _number(row["mAP"], 1),
                "95 % interval": _span(row["mAP_low"], row["mAP_high"]),
                "minus best": "" if gap is None else signed_interval(gap),
                "COCO AP": _number(row["coco_AP"], 1),
                "AP50": _number(row["coco_AP50"], 1),
                "AP75": _number(row["coco_AP75"], 1),
                **{key: _number(value, 3) for key, value in measures[row["head"]].items()},
                "training s": _number(row["train_s"], 1),
                "scoring ms/image": _number(None if score is None else 1000 * score, 1),
                "peak MB": _number(row["peak_rss_mb"], 0),
                "support vectors": _number(row["n_support_vectors"], 0),
            }
        )
    shown = [key for key in lines[0] if any(line[key] for line in lines)]
    return shown, [[line[key] for key in shown] for line in lines]


def threshold_table(metrics: Mapping[str, Any], name: str) -> tuple[str, list[str], list[list[str]]] | None:
    """Return what the thresholds of a head say: a sentence, heads of columns, a line per class; None without.

    Args:
        metrics: as in `metrics.json`.
        name: of the head.
    """
    details = metrics["heads"][name].get("details", {})
    if "thresholds" not in details:
        return None
    chosen, sure = details["thresholds"], details["at_threshold"]
    words = (
        f"{name}: `detect` shows what scores at least the threshold of its class, which gave the best F1 on "
        f"{chosen['n_images']} images held out (where a class has few objects, those of all count too). "
        f"On test {_number(sure['precision'], 0) or 'none'} % of what is shown is right and "
        f"{_number(sure['recall'], 0) or 'none'} % of the objects are found, in "
        f"{sure['boxes_per_image']:.1f} boxes an image ({sure['objects_per_image']:.1f} objects)."
    )
    lines = [
        [
            label,
            f"{row['score']:.2f}",
            _number(row["precision"], 0),
            _number(row["recall"], 0),
            str(row["n_objects"]),
        ]
        for label, row in chosen["classes"].items()
    ]
    return words, ["threshold of", "score", "precision %", "recall %", "objects held out"], lines


def markdown(metrics: Mapping[str, Any], bootstrap: BootstrapResult | None = None) -> str:
    """Return the comparison as Markdown, aligned so that it reads well on a terminal too.

    The heads by falling mAP; AP of each class; the thresholds of the best; all differences between two heads.
    """
    names = ranked_heads(metrics)
    head, body = comparison_table(metrics, bootstrap)
    parts = [_table(head, body)]
    if "AP75" in head:
        parts.append(f"{LOCALISATION}\n")
    classes = list(metrics["heads"][names[0]]["ap"]) if names else []
    per_class = [
        [label, *(_number(metrics["heads"][name]["ap"].get(label), 1) for name in names)] for label in classes
    ]
    parts.append(_table(["AP", *names], per_class))
    if names and (thresholds := threshold_table(metrics, names[0])) is not None:
        words, columns, lines = thresholds
        parts += [f"{words}\n", _table(columns, lines)]
    if bootstrap is not None and bootstrap.differences:
        lines = [_difference_line(each) for each in ranked_differences(bootstrap)]
        parts.append(
            _table(["difference in mAP", "points", "95 % interval", "flips", "interval excludes 0"], lines)
        )
    return "\n".join(parts)


def write_tables(
    folder: Path, metrics: Mapping[str, Any], bootstrap: BootstrapResult | None = None
) -> list[Path]:
    """Write `comparison.md`, `comparison.csv`, `comparison.json` and `per_class.csv` into `folder`.

    Returns:
        The files written.
    """
    rows = comparison_rows(metrics, bootstrap)
    names = [row["head"] for row in rows]
    classes = list(metrics["heads"][names[0]]["ap"]) if names else []
    per_class = [
        {"class": label} | {name: metrics["heads"][name]["ap"].get(label) for name in names}
        for label in classes
    ]
    per_class.append({"class": "mean"} | {name: metrics["heads"][name]["mAP"] for name in names})
    write_text(folder / "comparison.md", markdown(metrics, bootstrap))
    write_text(folder / "comparison.csv", _csv(rows))
    write_text(folder / "per_class.csv", _csv(per_class))
    value: dict[str, Any] = {"heads": rows}
    if bootstrap is not None:
        value["bootstrap"] = bootstrap.to_json()
    write_json(folder / "comparison.json", value)
    return [folder / name for name in ("comparison.md", "comparison.csv", "per_class.csv", "comparison.json")]


def signed_interval(interval: Interval) -> str:
    """Return a difference in points of percent with its interval: `+1.2 [-0.3, +2.5]`."""
    return f"{_signed(interval.value)} [{_signed(interval.low)}, {_signed(interval.high)}]"


def _difference_line(each: Difference) -> list[str]:
    mean = each.mean
    return [
        f"{each.first} - {each.second}",
        _signed(mean.value),
        f"[{_signed(mean.low)}, {_signed(mean.high)}]",
        f"{100 * each.flip_share:.1f} %",
        "yes" if each.supported else "no",
    ]


def _signed(fraction: float) -> str:
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _span(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.1f}, {high:.1f}]"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with padded columns: names to the left, numbers to the right."""
    head, *body = [[_cell(text) for text in row] for row in [head, *body]]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, body)]) + "\n"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _inert(value) for key, value in row.items()} for row in rows)
    return stream.getvalue()


def _cell(text: str) -> str:
    """Return a text that Markdown shows as it stands and that does not end its cell."""
    return printable(text).translate(_MARKS)


def _inert(value: Any) -> Any:
    """Return a cell of a spreadsheet; a text that it would run as a formula is marked as a text."""
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        else value
    )


_MARKS = str.maketrans({"|": "\\|", "<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ", "\t": " "})
