"""The comparison of heads as a table: for people (Markdown), spreadsheets (CSV) and programs (JSON)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rcnn_svm.evaluation.bootstrap import BootstrapResult, Difference, Interval, Paired
from rcnn_svm.evaluation.calibration import ClassCurves
from rcnn_svm.evaluation.classification import Classification
from rcnn_svm.evaluation.coco import CocoResult
from rcnn_svm.evaluation.voc import EvalResult
from rcnn_svm.files import csv_text, write_json, write_text
from rcnn_svm.progress import printable

__all__ = [
    "DIFFERENCES",
    "LOCALISATION",
    "Column",
    "aim_words",
    "calibration_words",
    "comparison_rows",
    "comparison_table",
    "confusion_table",
    "difference_cells",
    "difference_rows",
    "head_metrics",
    "headline",
    "in_columns",
    "is_classified",
    "judged",
    "markdown",
    "markdown_table",
    "markdown_text",
    "per_class_rows",
    "percent",
    "promise_words",
    "ranked_differences",
    "ranked_heads",
    "signed",
    "span",
    "threshold_table",
    "write_tables",
]


LOCALISATION = (
    "COCO AP is the mean over ten IoUs from 0.5 to 0.95; where AP75, at 0.75, lies far below AP50, at 0.5, "
    "objects are found but their boxes fit loosely."
)
"""What the columns of COCO say, in one sentence for every page that shows them."""
DIFFERENCES = ("difference in mAP", "points", "95 % interval", "resamples with the other sign", "verdict")
"""The heads of columns of a table of differences; `difference_cells` has the cells of all but the first."""


def percent(value: float | None, digits: int = 1) -> str:
    """Return percent without their sign, or `none` where there is nothing to measure."""
    return "none" if value is None else f"{value:,.{digits}f}"


def signed(points: float) -> str:
    """Return a difference in points of percent with its sign; a rounded zero has none."""
    text = f"{points:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def span(value: Interval) -> str:
    """Return a fraction in percent with its interval."""
    return f"{100 * value.value:.1f} ({100 * value.low:.1f} to {100 * value.high:.1f})"


def in_columns(name: str, value: Interval) -> dict[str, float]:
    """Return a measure and its interval in three columns, named for programs."""
    column = name.replace(" ", "_")
    return {column: value.value, f"{column}_low": value.low, f"{column}_high": value.high}


@dataclass(frozen=True)
class Column:
    """A column of the comparison: the same in Markdown, CSV, JSON and on the page.

    Attributes:
        title: its head, for people.
        fields: what programs call its values -> where they lie in a head's entry of `metrics["heads"]`.
        show: from these values to a cell, where all of them are known.
        says: what it tells.
        unknown: the cell elsewhere.
    """

    title: str
    fields: Mapping[str, tuple[str | int, ...]]
    show: Callable[..., str]
    says: str
    unknown: str = ""

    def cell(self, row: Mapping[str, Any]) -> str:
        """Return the cell of one of `comparison_rows`."""
        values = [row[field] for field in self.fields]
        return self.unknown if None in values else self.show(*values)


def _columns(metrics: Mapping[str, Any], bootstrap: BootstrapResult | None) -> list[Column]:
    """Return all columns: whatever shows the comparison reads them here."""
    tenths, whole = "{:,.1f}".format, "{:,.0f}".format
    gap = Column(
        "minus best",
        {f"minus_best{end}": ("minus_best", i) for i, end in enumerate(("", "_low", "_high"))},
        lambda value, low, high: f"{signed(value)} [{signed(low)}, {signed(high)}]",
        "its mAP less that of the best head, with the 95 % interval of this difference",
    )
    if classified := is_classified(metrics):
        gap = replace(gap, says=gap.says.replace("mAP", "accuracy"))
    own = dict.fromkeys(name for head in metrics["heads"].values() for name in head.get("measures", {}))
    measures = (
        Column(name, {f"measure_{name}": ("measures", name)}, "{:,.3f}".format, "of an evaluator of your own")
        for name in own
    )
    measured = [
        Column(title, {field: ("classification", field)}, tenths, says)
        for title, field, says in (
            ("accuracy", "accuracy", "share of the images whose class was found"),
            ("balanced accuracy", "balanced_accuracy", "the same for each class, and the mean of that"),
        )
    ]
    spread = Column(
        "95 % interval",
        {
            f"accuracy_{end}": ("classification", "accuracy_interval", i)
            for i, end in enumerate(("low", "high"))
        },
        "[{:.1f}, {:.1f}]".format,
        "of the accuracy, by a bootstrap over the test images",
    )
    gaps = [] if bootstrap is None else [gap]
    first = [measured[0], spread, *gaps, measured[1]] if classified else []
    return [
        Column("head", {"head": ("head",)}, str, "what scores the regions"),
        *first,
        Column("mAP", {"mAP": ("mAP",)}, tenths, "average precision, mean over the classes", unknown="none"),
        Column(
            "95 % interval",
            {"mAP_low": ("mAP_interval", 0), "mAP_high": ("mAP_interval", 1)},
            "[{:.1f}, {:.1f}]".format,
            "of the mAP, by a bootstrap over the test images",
        ),
        *([] if classified else gaps),
        Column("COCO AP", {"coco_AP": ("coco", "AP")}, tenths, "by COCO's rules, mean over IoUs"),
        Column("AP50", {"coco_AP50": ("coco", "AP50")}, tenths, "by COCO's rules, at an IoU of 0.5"),
        Column("AP75", {"coco_AP75": ("coco", "AP75")}, tenths, "by COCO's rules, at an IoU of 0.75"),
        *measures,
        Column("training s", {"train_s": ("train_s",)}, tenths, "seconds, for the head alone"),
        Column(
            "scoring ms/image",
            {"score_s_per_image": ("score_s_per_image",)},
            lambda seconds: tenths(1000 * seconds),
            "scores, boxes and suppression of an image's regions",
        ),
        Column("peak MB", {"peak_rss_mb": ("peak_rss_mb",)}, whole, "memory of the process in training"),
        Column(
            "support vectors",
            {"n_support_vectors": ("details", "n_support_vectors")},
            whole,
            "what each region is compared with",
        ),
    ]


def is_classified(metrics: Mapping[str, Any]) -> bool:
    """Tell whether heads were measured on whole images of one class each, by their accuracy."""
    return any("classification" in head for head in metrics["heads"].values())


def head_metrics(
    result: EvalResult,
    coco: CocoResult | None,
    interval: Interval,
    *,
    classification: Classification | None = None,
    accuracy: Mapping[str, Interval] | None = None,
    about: Mapping[str, Any],
    train_s: float,
    score_s_per_image: float,
    peak_rss_mb: float,
    measures: Mapping[str, float] | None = None,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make one head's entry in `metrics["heads"]`, in percent; null where there is nothing to measure.

    Args:
        result: its evaluation; mAP and AP are by its own rule.
        coco: its evaluation by COCO's rules; None for whole images.
        interval: of the mAP, from the paired bootstrap.
        classification: of whole images of one class each.
        accuracy: intervals of `accuracy` and `balanced accuracy`, where there is a classification.
        about: what it is, see `HeadResult.about`.
        train_s: seconds, all that belongs to this head alone.
        score_s_per_image: seconds.
        peak_rss_mb: 10^6 bytes.
        measures: of the experiment's own evaluators; each gets a column.
        details: anything more; `n_support_vectors` gets a column.
    """
    voc = result.to_json()["measures"][result.rule]
    known = interval.low == interval.low  # not nan
    further: dict[str, Any] = {}
    if coco is not None:
        summary = coco.to_json()["summary"]
        further["coco"] = {name: summary[name] for name in ("AP", "AP50", "AP75")}
    if classification is not None:
        further["classification"] = {"confusion": classification.confusion.tolist()}
        for name, own in (accuracy or {}).items():
            key = name.replace(" ", "_")
            further["classification"][key] = 100 * own.value
            further["classification"][f"{key}_interval"] = [100 * own.low, 100 * own.high]
    return {
        "mAP": voc["mAP"],
        "mAP_interval": [100 * interval.low, 100 * interval.high] if known else None,
        "ap": voc["ap"],
        **further,
        "about": dict(about),
        "train_s": train_s,
        "score_s_per_image": score_s_per_image,
        "peak_rss_mb": peak_rss_mb,
        "measures": dict(measures or {}),
        "details": dict(details or {}),
    }


def ranked_heads(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the heads by what they are judged by, falling; ties keep the order of the file."""
    heads = metrics["heads"]
    return sorted(heads, key=lambda name: -(headline(heads[name]) or 0.0))


def headline(head: Mapping[str, Any]) -> float | None:
    """Return what a head is judged by, in percent: accuracy where it classified images, else mAP."""
    value: float | None = head.get("classification", head).get("accuracy", head["mAP"])
    return value


def difference_rows(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """Return differences as plain data, in percent."""
    return [
        {
            "first": each.first,
            "second": each.second,
            "value": 100 * each.mean.value,
            "low": 100 * each.mean.low,
            "high": 100 * each.mean.high,
            "flip_share": each.flip_share,
        }
        for each in differences
    ]


def judged(metrics: Mapping[str, Any], bootstrap: BootstrapResult) -> BootstrapResult | Paired:
    """Return the intervals and differences of what heads are judged by, see `headline`."""
    if "accuracy_differences" not in metrics:
        return bootstrap
    intervals = {
        name: _fraction(head["classification"]["accuracy"], *head["classification"]["accuracy_interval"])
        for name, head in metrics["heads"].items()
    }
    differences = tuple(
        Difference(
            one["first"],
            one["second"],
            _fraction(one["value"], one["low"], one["high"]),
            {},
            one["flip_share"],
        )
        for one in metrics["accuracy_differences"]
    )
    return Paired(intervals, differences)


def _fraction(*percents: float) -> Interval:
    return Interval(*(value / 100 for value in percents))


def ranked_differences(bootstrap: BootstrapResult | Paired) -> list[Difference]:
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
    """Return one flat record per head, the best first, with its distance to the best."""
    names = ranked_heads(metrics)
    columns, rows = _columns(metrics, bootstrap), []
    compared = bootstrap and judged(metrics, bootstrap)
    for name in names:
        entry = {"head": name, **metrics["heads"][name]}
        if compared is not None and name != names[0]:
            gap = compared.difference(name, names[0]).mean
            if gap.value == gap.value:  # not nan
                entry["minus_best"] = [100 * value for value in (gap.value, gap.low, gap.high)]
        rows.append({field: _at(entry, way) for each in columns for field, way in each.fields.items()})
    return rows


def comparison_table(
    metrics: Mapping[str, Any], bootstrap: BootstrapResult | None = None
) -> tuple[list[Column], list[list[str]]]:
    """Return the comparison for people: columns, and a line of cells per head, the best first.

    A column without a single figure is left out.
    """
    rows = comparison_rows(metrics, bootstrap)
    shown = [each for each in _columns(metrics, bootstrap) if any(each.cell(row) for row in rows)]
    return shown, [[each.cell(row) for each in shown] for row in rows]


def _at(entry: Any, way: Sequence[str | int]) -> Any:
    """Follow keys and indices; None where they lead nowhere, as older files do not hold everything."""
    for step in way:
        if entry is None:
            return None
        entry = entry[step] if isinstance(step, int) else entry.get(step)
    return entry


def per_class_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a record per class: `class`, and AP in percent by head, the best head first."""
    names = ranked_heads(metrics)
    classes = metrics["heads"][names[0]]["ap"] if names else {}
    return [
        {"class": label} | {name: metrics["heads"][name]["ap"].get(label) for name in names}
        for label in classes
    ]


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
    promised = promise_words(chosen)
    words = (
        f"{name}: `detect` shows what scores at least the threshold of its class, which {aim_words(chosen)}. "
        f"{promised[:1].upper()}{promised[1:]}{'. ' if promised else ''}"
        f"On test {percent(sure['precision'], 0)} % of what is shown is right and "
        f"{percent(sure['recall'], 0)} % of the objects are found, in "
        f"{sure['boxes_per_image']:.1f} boxes an image ({sure['objects_per_image']:.1f} objects)."
    )
    lines = [
        [
            label,
            f"{row['score']:.2f}",
            percent(row["precision"], 0),
            percent(row["recall"], 0),
            "" if row.get("false_alarms") is None else f"{row['false_alarms']:.3f}",
            str(row["n_objects"]),
        ]
        for label, row in chosen["classes"].items()
    ]
    titles = ["threshold of", "score", "precision %", "recall %", "false an image", "objects held out"]
    return words, titles, lines


def minutes_table(metrics: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]] | None:
    """Return what a time gave: sentences, heads of columns, a line per recipe; None where none was set.

    Args:
        metrics: as in `metrics.json`.
    """
    climbed = metrics.get("minutes")
    if climbed is None:
        return None
    words = (
        f"Recipes of rising cost were trained for {climbed['asked']:g} minutes and judged on held-out images "
        f"(mean of mAP and COCO AP, of whole images mAP); {climbed['recipe']} is the best and is saved. "
        f"Test decided nothing: its mAP is that of each detector when it was saved. {climbed['ended']}"
    )
    lines = [
        [
            step["recipe"],
            f"{step['minutes']:.1f}",
            percent(step["held_out"]),
            percent(step["test_mAP"]) if step["kept"] else "",
            "saved" if step["kept"] else "not better",
        ]
        for step in climbed["curve"]
    ]
    return words, ["recipe", "done after minutes", "held out", "mAP on test", "detector"], lines


def aim_words(chosen: Mapping[str, Any]) -> str:
    """Return what thresholds were chosen for, and on how many images, after "the threshold, which".

    Args:
        chosen: as `Thresholds.to_json` returns them.
    """
    aim, n = chosen.get("aim", {}), chosen["n_images"]
    if "false_alarms" in aim:
        return f"lets at most {aim['false_alarms']:g} false detections an image pass on {n} images held out"
    if "precision" in aim:
        return f"makes {100 * aim['precision']:g} % of what is shown right on {n} images held out"
    return f"gave the best F1 on {n} images held out (where a class has few objects, those of all count too)"


def promise_words(chosen: Mapping[str, Any]) -> str:
    """Return what thresholds promise for new images, with 95 % intervals; nothing where it was not taken.

    Args:
        chosen: as `Thresholds.to_json` returns them.
    """
    promised = chosen.get("promised", {})
    if not promised:
        return ""
    right, found, false = (promised[name] for name in ("precision", "recall", "false_alarms"))
    return (
        f"there {_spanned(right)} % of that is right, {_spanned(found)} % of the objects are found, and "
        f"{false['value']:.3f} [{false['low']:.3f}, {false['high']:.3f}] false detections come an image"
    )


def _spanned(of: Mapping[str, Any]) -> str:
    if of["low"] is None:
        return percent(of["value"], 0)
    return f"{percent(of['value'], 0)} [{of['low']:.0f}, {of['high']:.0f}]"


def calibration_words(curves: ClassCurves | None) -> str:
    """Return where the probabilities of a detector come from, or that it has none."""
    if curves is None:
        return (
            "margins or log-odds; not calibrated: too few images were held out, or too little was found in "
            "them, to make probabilities of scores"
        )
    counts = Counter(curves.kinds)
    ways = {"steps": "by steps", "sigmoid": "by a sigmoid", "shared sigmoid": "by the sigmoid of all classes"}
    kinds = ", ".join(f"{counts[kind]} {words}" for kind, words in ways.items() if counts[kind])
    return (
        f"margins or log-odds, and the probability that a detection is right, by a curve per class ({kinds}) "
        f"from {curves.n_images} images held out"
    )


def markdown(metrics: Mapping[str, Any], bootstrap: BootstrapResult | None = None) -> str:
    """Return the comparison as Markdown, aligned so that it reads well on a terminal too.

    The heads, the best first; AP of each class; what the best takes images for, where it classified them; its
    thresholds; all differences between two heads.
    """
    names = ranked_heads(metrics)
    columns, lines = comparison_table(metrics, bootstrap)
    titles = [each.title for each in columns]
    parts = [markdown_table(titles, lines)]
    if (climbed := minutes_table(metrics)) is not None:
        words, titles_of_recipes, recipes = climbed
        parts += [f"{words}\n", markdown_table(titles_of_recipes, recipes)]
    if "AP75" in titles:
        parts.append(f"{LOCALISATION}\n")
    rows = per_class_rows(metrics)
    parts.append(
        markdown_table(["AP", *names], [[r["class"], *(percent(r[n]) for n in names)] for r in rows])
    )
    if is_classified(metrics):
        titles, lines = confusion_table(metrics, names[0])
        parts += [f"What {names[0]} takes the images of each class for:\n", markdown_table(titles, lines)]
    if names and (thresholds := threshold_table(metrics, names[0])) is not None:
        words, titles, lines = thresholds
        parts += [f"{words}\n", markdown_table(titles, lines)]
    if bootstrap is not None and bootstrap.differences:
        shown: dict[str, BootstrapResult | Paired] = {"mAP": bootstrap}
        if is_classified(metrics):
            shown = {"accuracy": judged(metrics, bootstrap), **shown}
        for measure, found in shown.items():
            lines = [
                [f"{one.first} - {one.second}", *difference_cells(one)] for one in ranked_differences(found)
            ]
            parts.append(markdown_table([f"difference in {measure}", *DIFFERENCES[1:]], lines))
    return "\n".join(parts)


def confusion_table(metrics: Mapping[str, Any], name: str) -> tuple[list[str], list[list[str]]]:
    """Return what a head takes the images of each class for: heads of columns, and a line per class."""
    head = metrics["heads"][name]
    classes, counts = list(head["ap"]), head["classification"]["confusion"]
    lines = [[label, *map(str, row)] for label, row in zip(classes, counts, strict=True)]
    return ["taken for", *classes], lines


def write_tables(
    folder: Path, metrics: Mapping[str, Any], bootstrap: BootstrapResult | None = None
) -> list[Path]:
    """Write `comparison.md`, `comparison.csv`, `comparison.json` and `per_class.csv` into `folder`.

    Returns:
        The files written.
    """
    rows = comparison_rows(metrics, bootstrap)
    mean = {row["head"]: row["mAP"] for row in rows}
    per_class = [*per_class_rows(metrics), {"class": "mean"} | mean]
    write_text(folder / "comparison.md", markdown(metrics, bootstrap))
    write_text(folder / "comparison.csv", csv_text(rows))
    write_text(folder / "per_class.csv", csv_text(per_class))
    value: dict[str, Any] = {"heads": rows}
    if bootstrap is not None:
        value["bootstrap"] = bootstrap.to_json()
    write_json(folder / "comparison.json", value)
    return [folder / name for name in ("comparison.md", "comparison.csv", "per_class.csv", "comparison.json")]


def difference_cells(each: Difference) -> list[str]:
    """Return what a table says of a difference between two heads; see `DIFFERENCES`."""
    return [
        signed(100 * each.mean.value),
        f"{signed(100 * each.mean.low)} to {signed(100 * each.mean.high)}",
        f"{100 * each.flip_share:.1f} %",
        "supported" if each.supported else "not decided",
    ]


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with padded columns: names to the left, numbers to the right."""
    head, *body = [[markdown_text(text) for text in row] for row in [head, *body]]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, body)]) + "\n"


def markdown_text(text: str) -> str:
    """Return a text that Markdown shows as it stands and that does not end its cell."""
    return printable(text).translate(_MARKS)


_MARKS = str.maketrans({"|": "\\|", "<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ", "\t": " "})
