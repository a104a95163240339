"""What a comparison of heads shows, in sentences that say no more than the intervals allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rcnn_svm.evaluation.bootstrap import BootstrapResult, Difference
from rcnn_svm.report.tables import headline, is_classified, judged, ranked_heads, signed

__all__ = ["Finding", "findings"]


@dataclass(frozen=True)
class Finding:
    """One question that the comparison answers, or leaves open.

    Attributes:
        question: in a few words.
        answer: one or two sentences.
        supported: whether the 95 % interval of every difference named excludes zero.
    """

    question: str
    answer: str
    supported: bool


def findings(metrics: Mapping[str, Any], bootstrap: BootstrapResult) -> list[Finding]:
    """Answer the project's questions as far as the heads at hand allow, the headline first.

    Which head wins; SVM or softmax; linear or a kernel; what box regression adds. A question whose heads
    are not all there is left out; nothing is said about a single head or a split without objects.
    """
    names = ranked_heads(metrics)
    about = {name: metrics["heads"][name]["about"] for name in names}
    value = {name: headline(metrics["heads"][name]) for name in names}
    if len(names) < 2 or None in value.values():
        return []
    n_images, compared = metrics["n_test_images"], judged(metrics, bootstrap)
    measure = "% accuracy" if is_classified(metrics) else "mAP"
    first = compared.difference(names[0], names[1])
    if first.supported:
        lead = f"{names[0]} wins with {value[names[0]]:.1f} {measure}, "
        lead += f"{_points(first)} points ahead of {names[1]}"
    else:
        lead = (
            f"No clear winner: {names[0]} comes first with {value[names[0]]:.1f} {measure}, "
            f"{_points(first)} points ahead of {names[1]}"
        )
    found = [Finding("Which head wins?", lead + _weight(first, n_images), first.supported)]
    svm, softmax = (
        next((name for name in names if about[name]["family"] == family), None)
        for family in ("svm", "softmax")
    )
    if svm is not None and softmax is not None:
        better, worse = sorted((svm, softmax), key=names.index)
        gap = compared.difference(better, worse)
        text = (
            f"{better} reaches {value[better]:.1f}, {worse} {value[worse]:.1f}, each the best of its kind: "
            f"{_points(gap)} points apart"
        )
        found.append(Finding("SVM or softmax?", text + _weight(gap, n_images), gap.supported))
    for boxes in (True, False):
        svms = {name: one for name, one in about.items() if (one["family"], one["boxes"]) == ("svm", boxes)}
        linear = [name for name, one in svms.items() if one["kernel"] == "linear"]
        curved = [name for name in svms if name not in linear]
        if linear and curved:
            better, worse = sorted((linear[0], curved[0]), key=names.index)
            gap = compared.difference(better, worse)
            text = f"{better} is {_points(gap)} points ahead of {worse}"
            found.append(Finding("Is a kernel worth it?", text + _weight(gap, n_images), gap.supported))
            break
    with_boxes = {one["base"]: name for name, one in about.items() if one["boxes"]}
    families = [name for name, one in about.items() if not one["boxes"] and one["base"] in with_boxes]
    if families:
        gaps = [compared.difference(with_boxes[about[name]["base"]], name) for name in families]
        parts = [
            f"{_change(gap.mean.value)} for {name}" + ("" if gap.supported else " (not decided)")
            for name, gap in zip(families, gaps, strict=True)
        ]
        text = f"Change in mAP by box regression: {_joined(parts)}."
        found.append(Finding("What does box regression add?", text, all(gap.supported for gap in gaps)))
    return found


def _weight(gap: Difference, n_images: int) -> str:
    """Say how much a difference weighs: the second half of a sentence."""
    span = f"95 % interval {_change(gap.mean.low)} to {_change(gap.mean.high)}"
    if gap.supported:
        return f", more than the choice of the {n_images} test images explains ({span})."
    return f", but {n_images} test images do not settle it ({span}, which includes zero)."


def _points(gap: Difference) -> str:
    return f"{100 * gap.mean.value:.1f}"


def _change(fraction: float) -> str:
    return signed(100 * fraction).replace("-", "−")


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
