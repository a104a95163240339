"""What a trained detector is, for people: the model card in its folder, and what `rcnn-svm info` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from rcnn_svm.datasets import Splits
from rcnn_svm.detector import Detector
from rcnn_svm.evaluation.bootstrap import paired_bootstrap
from rcnn_svm.evaluation.voc import RULE_NAMES
from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.experiment.recipe import HeadResult
from rcnn_svm.files import remove_marker, write_text
from rcnn_svm.networks.weights import licence_of
from rcnn_svm.progress import printable, say
from rcnn_svm.proposals import RpnProposals, SelectiveSearchConfig, WholeImage
from rcnn_svm.report.experiment import cross_validated
from rcnn_svm.report.html import environment
from rcnn_svm.report.tables import (
    aim_words,
    calibration_words,
    markdown_table,
    markdown_text,
    percent,
    promise_words,
)

__all__ = [
    "about",
    "added_figures",
    "class_table",
    "figures_of",
    "quality_words",
    "relearned_info",
    "remove_card",
    "write_card",
]

_CARD = "README.md"
_MARK = "library_name: rcnn_svm\n"
_NAMED_CLASSES = 6


def remove_card(folder: Path) -> None:
    """Remove the card of an older detector; a README.md that is no such card stays.

    Raises:
        DataError: it cannot be removed.
    """
    if _is_ours(folder / _CARD):
        remove_marker(folder / _CARD)


def write_card(folder: Path, detector: Detector) -> None:
    """Write the model card, `README.md`, into the folder of a detector.

    A README.md that is no such card stays, with a word.

    Raises:
        DataError: the folder cannot be written to.
        DiskSpaceError: the disk is full.
    """
    path = folder / _CARD
    if path.exists() and not _is_ours(path):
        say(f"{path}: is none of rcnn_svm's model cards and stays; the card of this detector is not written.")
        return
    named = ", ".join(detector.classes[:_NAMED_CLASSES])
    more = len(detector.classes) - _NAMED_CLASSES
    what = "Tells images of" if detector.whole_images else "Finds"
    text = (
        environment()
        .get_template("card.md.jinja")
        .render(
            title=_plain(folder.resolve().name or "detector"),
            folder=_plain(folder.name or "detector"),
            opening=_plain(
                f"{what} {named}{f' and {more} other classes' if more > 0 else ''} in photographs."
            ),
            head=detector.head,
            whole=detector.whole_images,
            calibrated=detector.calibration is not None,
            classes=Markup(markdown_table(*class_table(detector))),
            figures=[_plain(words) for words in quality_words(detector)],
            about=[(label, _plain(words)) for label, words in about(detector, folder)],
        )
    )
    write_text(path, text)


def _plain(text: str) -> Markup:
    return Markup(markdown_text(text))  # it is escaped for Markdown, which the engine leaves as it is


def _is_ours(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return _MARK in stream.read(200)
    except FileNotFoundError:
        return False


def figures_of(
    result: HeadResult, n_train_images: int, *, seed: int, n_bootstrap: int, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a detector was measured to reach, as plain data, for its `info`.

    Args:
        result: of the head that is saved.
        n_train_images: that it was trained on.
        seed: of the resamples.
        n_bootstrap: how many resamples.
        provenance: where the numbers come from; its date is left out, as the same run gives the same bytes.
    """
    evaluation = result.evaluation
    found = paired_bootstrap({"": evaluation}, n_resamples=n_bootstrap, seed=seed, rule=evaluation.rule)
    figures: dict[str, Any] = {
        "rule": evaluation.rule,
        "n_train_images": n_train_images,
        "n_test_images": len(evaluation.matches.n_objects),
        "mAP": found.mean[""].in_percent(),
        "ap": {name: of.in_percent() for name, of in found.per_class[""].items()},
        "provenance": {name: value for name, value in provenance.items() if name != "date"},
    }
    if result.coco is not None:
        figures["coco"] = {name: _finite(100 * value) for name, value in result.coco.summary().items()}
    if result.held_out is not None and result.held_out.n_folds > 1:
        figures["cross_validation"] = cross_validated(result.held_out, seed=seed, n_bootstrap=n_bootstrap)
    return figures


def added_figures(
    detector: Detector,
    result: HeadResult,
    splits: Splits,
    config: ExperimentConfig,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the `info` of a detector with what classes that have joined it were measured to reach.

    Args:
        detector: before they did.
        result: of the new classes.
        splits: that they were learned from.
        config: whose seed and number of resamples are taken.
        provenance: see `figures_of`.
    """
    own = figures_of(
        result,
        len(splits.trainval),
        seed=config.seed,
        n_bootstrap=config.n_bootstrap,
        provenance=provenance,
    )
    info = dict(detector.info)
    figures = info.get("figures")
    if figures is not None:
        info["figures"] = {**figures, "ap": figures["ap"] | own["ap"]}
    joined = {"data": splits.train.name, "classes": list(splits.train.classes), "figures": own}
    info["added"] = [*info.get("added", []), joined]
    return info


def relearned_info(detector: Detector, n_images: int, n_corrected: int) -> dict[str, Any]:
    """Return the `info` of a detector whose SVMs were trained again: what it was measured to reach is gone.

    Args:
        detector: whose they are.
        n_images: that they were trained on.
        n_corrected: so many of them people have corrected.
    """
    info = {name: value for name, value in detector.info.items() if name != "figures"}
    return info | {"relearned": {"n_images": n_images, "n_corrected": n_corrected}}


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _span(of: Mapping[str, Any]) -> str:
    if of["value"] is None:
        return ""
    ends = "" if of["low"] is None else f" [{of['low']:.1f}, {of['high']:.1f}]"
    return f"{of['value']:.1f}{ends}"


def class_table(detector: Detector) -> tuple[list[str], list[list[str]]]:
    """Return heads of columns and a line per class: AP with its interval, threshold, what it promises.

    What is not known is left empty.
    """
    ap = detector.info.get("figures", {}).get("ap", {})
    chosen = {} if detector.thresholds is None else detector.thresholds.to_json()["classes"]
    lines = []
    for k, name in enumerate(detector.classes):
        own = chosen.get(name)
        cells = [""] * 4
        if own is not None:
            alarms = own["false_alarms"]
            cells = [
                f"{own['score']:.2f}",
                percent(own["precision"], 0),
                percent(own["recall"], 0),
                "" if alarms is None else f"{alarms:.3f}",
            ]
        kind = "none" if detector.calibration is None else detector.calibration.kinds[k]
        lines.append([name, _span(ap[name]) if name in ap else "", *cells, kind])
    titles = ["class", "AP on test", "threshold", "precision %", "recall %", "false an image", "probability"]
    return titles, lines


def quality_words(detector: Detector) -> list[str]:
    """Return sentences on what it reached, what its thresholds promise, and what its scores are."""
    figures, words = detector.info.get("figures"), []
    if (again := detector.info.get("relearned")) is not None:
        words.append(
            f"Its SVMs were trained again on {again['n_images']} images, {again['n_corrected']} of them "
            f"corrected in Label Studio; what it reaches since then is not measured."
        )
    elif figures is None:
        words.append("What it reaches was not kept with it.")
    else:
        coco = figures.get("coco", {}).get("AP")
        words.append(
            f"Trained on {figures['n_train_images']} images. "
            f"{_span(figures['mAP']) or 'No'} mAP by the rule of {RULE_NAMES[figures['rule']]} on "
            f"{figures['n_test_images']} test images, looked at once"
            + (f"; COCO AP {coco:.1f}" if coco is not None else "")
            + ". Brackets hold 95 % intervals over the images."
        )
    if (crossed := (figures or {}).get("cross_validation")) is not None:
        words.append(
            f"{_span(crossed['mAP'])} mAP on {crossed['n_images']} training images, each found by one of "
            f"{crossed['n_folds']} trainings that had not seen it."
        )
    for joined in detector.info.get("added", []):
        own = joined["figures"]
        words.append(
            f"{', '.join(joined['classes'])} joined later, learned from {own['n_train_images']} images of "
            f"{joined['data']}; their AP is that on {own['n_test_images']} test images of these data."
        )
    if detector.thresholds is None:
        words.append("No thresholds were chosen: no images were held out.")
    else:
        chosen = detector.thresholds.to_json()
        promised = promise_words(chosen)
        words.append(
            f"Shown is what reaches the threshold of its class, which {aim_words(chosen)}"
            f"{': ' if promised else ''}{promised}."
        )
    words.append(f"Scores are {calibration_words(detector.calibration)}.")
    return words


def about(detector: Detector, folder: Path) -> list[tuple[str, str]]:
    """Return label and words of what a detector is made of and where it comes from.

    Args:
        detector: as it was loaded from `folder`.
        folder: where it lies.
    """
    features, info = detector.features, detector.info
    network = type(detector.featurizer).__name__ if detector.backbone is None else detector.backbone.name
    own = detector.backbone is None or network != features.backbone
    known = "not known: the network is one's own" if own else licence_of(network, features.weights)
    layers = "" if detector.layers is None else ", through fc layers of its own"
    source = info.get("figures", {}).get("provenance", {})
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    lines = [
        ("Head", detector.head),
        ("Network", f"{network}, weights {Path(features.weights).name}; {features.path} features{layers}"),
        ("Licence of the weights", known),
        ("Regions", _regions(detector)),
        ("Data", str(info.get("data", "not known"))),
        ("Seed", str(info.get("seed", "not known"))),
        ("Size", ", ".join(f"{name.partition('.')[0]} {size / 1e6:.1f} MB" for name, size in sizes.items())),
    ]
    if source:
        lines.append(("Made by", f"`{source['command']}` at commit {str(source['commit'])[:12]}"))
    return [(label, printable(words)) for label, words in lines]


def _regions(detector: Detector) -> str:
    proposer, n = detector.proposer, detector.n_proposals
    if isinstance(proposer, WholeImage):
        return "each image is its only one"
    if isinstance(proposer, SelectiveSearchConfig):
        most = min((value for value in (proposer.max_regions, n) if value is not None), default=None)
        width = "" if proposer.max_width is None else f", in images at most {proposer.max_width} pixels wide"
        return f"selective search ({proposer.mode}), {'all' if most is None else f'{most} at most'}{width}"
    if isinstance(proposer, RpnProposals):
        most = min((value for value in (proposer.max_regions, n) if value is not None), default=None)
        whose, weights = proposer.network.name, proposer.config.weights
        return (
            f"RPN of {whose}, weights {Path(weights).name} (licence: {licence_of(whose, weights)}), "
            f"{'all' if most is None else f'{most} at most'}"
        )
    return f"{type(proposer).__name__}{'' if n is None else f', {n} at most'}"
