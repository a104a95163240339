"""What a learning curve leaves behind: a table, a picture, a forecast, and what may be said of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rcnn_svm.evaluation.bootstrap import Interval
from rcnn_svm.experiment.curve import Curve
from rcnn_svm.files import atomic_path, csv_text, remove_marker, write_json, write_text
from rcnn_svm.report.plots import svg
from rcnn_svm.report.provenance import provenance
from rcnn_svm.report.study_plots import curve_figure
from rcnn_svm.report.tables import in_columns, signed, span
from rcnn_svm.structures import Dataset

__all__ = ["curve_json", "curve_sentences", "point_rows", "write_curve"]


def curve_sentences(curve: Curve) -> list[str]:
    """Return what the curve decides: who leads where, where they cross, and what more images would bring."""
    words = []
    for (first, second), own in itertools.groupby(curve.differences(), key=lambda d: (d.first, d.second)):
        leads = [
            (first if one.change.value > 0 else second, f"{_size(one.size)} ({_signed(one.change)})")
            for one in own
            if one.decided
        ]
        if not leads:
            words.append(f"{first} against {second}: no size decides between them.")
            continue
        told = [
            f"{ahead} is ahead at {', '.join(where for _, where in same)}"
            for ahead, same in itertools.groupby(leads, key=lambda lead: lead[0])
        ]
        crossing = "; the curves cross" if len(told) > 1 else ""
        words.append(f"{first} less {second}, mAP: {'; '.join(told)}; undecided elsewhere{crossing}.")
    for name, forecast in curve.forecasts.items():
        n, said, measured = forecast.held_out
        within = "within its interval" if said.low <= measured <= said.high else "outside its interval"
        ahead_words = ", ".join(
            f"{span(value)} with {x:.0f}" for x, value in zip(forecast.n, forecast.values, strict=True)
        )
        words.append(
            f"{name}: if the law holds, {ahead_words} images. From the smaller sizes it would have said "
            f"{span(said)} for {n:.0f} images, where {100 * measured:.1f} was measured, {within}."
        )
    return words


def _size(size: int | None) -> str:
    return "all images" if size is None else f"{size} image{'s' if size > 1 else ''} a class"


def _signed(value: Interval) -> str:
    return f"{signed(100 * value.value)}, {signed(100 * value.low)} to {signed(100 * value.high)}"


def point_rows(curve: Curve) -> Iterator[dict[str, Any]]:
    """Yield a row for each head and size, mAP and, of whole images, accuracy in percent."""
    for name in curve.heads:
        for at, size in enumerate(curve.sizes):
            value = curve.points[name][at].interval
            yield {
                "head": name,
                "images_of_each_class": "all" if size is None else size,
                "n_images": curve.n_images[at],
                "n_objects": curve.n_objects[at],
                "mAP": 100 * value.value,
                "mAP_low": 100 * value.low,
                "mAP_high": 100 * value.high,
                **{
                    column: 100 * number
                    for measure, by_head in curve.accuracy.items()
                    for column, number in in_columns(measure, by_head[name][at].interval).items()
                },
            }


def curve_json(curve: Curve) -> dict[str, Any]:
    """Return a curve as plain data, mAP in percent."""
    return {
        "n_draws": curve.n_draws,
        "points": list(point_rows(curve)),
        "settings": {name: list(map(dict, own)) for name, own in curve.settings.items()},
        "differences": [
            {"first": one.first, "second": one.second, "images_of_each_class": one.size or "all"}
            | one.change.in_percent()
            | {"p_holm": one.p_holm}
            for one in curve.differences()
        ],
        "forecasts": {
            name: {
                "law": {"limit": f.law.limit, "gain": f.law.gain, "rate": f.law.rate},
                "ahead": [{"n_images": n} | v.in_percent() for n, v in zip(f.n, f.values, strict=True)],
                "held_out": {
                    "n_images": f.held_out[0],
                    "measured": 100 * f.held_out[2],
                    **f.held_out[1].in_percent(),
                },
            }
            for name, f in curve.forecasts.items()
        },
    }


def write_curve(folder: str | Path, curve: Curve, dataset: Dataset, *, command: str, seed: int) -> list[str]:
    """Write `curve.json`, `curve.csv`, `curve.svg` and README; return what the curve decides.

    Args:
        folder: made where missing.
        curve: as measured.
        dataset: the test split.
        command: that made it.
        seed: of the draws.

    Raises:
        DataError: the folder cannot be written to.
        DiskSpaceError: the disk is full.
    """
    folder = Path(folder)
    remove_marker(folder / "curve.json")  # where it lies, the rest is whole
    words, about = curve_sentences(curve), provenance(seed=seed, command=command)
    write_text(folder / "curve.csv", csv_text(list(point_rows(curve))))
    with atomic_path(folder / "curve.svg") as temporary:
        temporary.write_bytes(svg(curve_figure(curve)))
    measures = ["mAP", *(name.replace(" ", "_") for name in curve.accuracy)]
    lines = "".join(
        f"| {row['head']} | {row['images_of_each_class']} | {row['n_images']:.0f} | {row['n_objects']:.0f} |"
        + "".join(f" {row[m]:.1f} | {row[f'{m}_low']:.1f} to {row[f'{m}_high']:.1f} |" for m in measures)
        + "\n"
        for row in point_rows(curve)
    )
    head = "".join(f" {name} | 95 % interval |" for name in ("mAP", *curve.accuracy))
    write_text(
        folder / "README.md",
        f"# {dataset.name}: how many images do I need?\n\n"
        + "".join(f"- {sentence}\n" for sentence in words)
        + "\n![mAP against the number of images](curve.svg)\n\n"
        f"| head | images of each class | images | objects |{head}\n"
        f"|---|--:|--:|--:|{'--:|--:|' * len(measures)}\n"
        + lines
        + f"\nHeads on the features of the network as it is, 300 regions of a test image. "
        f"{curve.n_draws} draws of each size, the same "
        f"for all heads; measured on {len(dataset)} test images. Intervals: draws and test images are "
        f"resampled; what is said of differences is corrected for all pairs and sizes by Holm's method.\n"
        f"\nMade by `{about['command']}` at commit {about['commit'][:12]} on {about['date']}.\n",
    )
    write_json(
        folder / "curve.json",
        {
            "schema": 1,
            "experiment": folder.name,
            "dataset": dataset.name,
            "n_test_images": len(dataset),
            "verdict": words,
            **curve_json(curve),
            "provenance": about,
        },
    )
    return words
