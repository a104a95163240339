"""What the verbs that train say before and after, in lines no wider than the terminal."""

from __future__ import annotations

import argparse
import shlex
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.networks import trained_to_detect

if TYPE_CHECKING:
    from rcnn_svm.datasets import Splits
    from rcnn_svm.detector import Detector
    from rcnn_svm.evaluation.bootstrap import BootstrapResult
    from rcnn_svm.experiment.recipe import Experiment, HeadResult
    from rcnn_svm.report.advice import WeakClass
    from rcnn_svm.structures import Dataset

__all__ = [
    "closing_of_comparison",
    "closing_of_joining",
    "closing_of_training",
    "command",
    "opening",
    "opening_of_finetuning",
    "paragraph",
    "wrapped",
]

_WIDTH = 120
_INDENT = 10
_NAMED_CLASSES = 6


def opening(config: ExperimentConfig, splits: Splits, out: Path) -> list[str]:
    """Say what an experiment is about to do: data, network, training, settings, results.

    Args:
        config: of the experiment.
        splits: its images.
        out: the folder of its results, where `config.json` lies.
    """
    whole = splits.whole
    train, val, test = (f"{len(part)} {part.split}" for part in (splits.train, splits.val, splits.test))
    objects = _objects(splits.trainval, splits.test)
    if config.choose:
        settings = (
            "chosen by training on train and measuring on val; the final training is on both, "
            "and test is looked at once, at the end"
        )
    else:
        settings = "those that did well on folds of other data; " + (
            "one training on train and val, then one look at test"
            if config.folds == 0 or whole
            else "thresholds and how far boxes move are decided on images held out of a first training"
        )
    return [
        *_item("Data", f"{splits.train.name}; {train}, {val} and {test} images; {objects}"),
        *_item("Network", f"{_network(config)}; of each region it reads {_reading(config)}"),
        *(_item("Regions", "each image is one: no proposals, NMS and box regression") if whole else []),
        *(_item("Regions", f"of the RPN of {_rpn(config)}") if config.proposer == "rpn" else []),
        *_item("Trained", _learned(config) + ("" if whole else " with box regression")),
        *_item("Settings", settings),
        *_item("Results", f"{out}; every setting of this run is in {out / 'config.json'}"),
    ]


def opening_of_finetuning(
    config: ExperimentConfig, train: Dataset, weights: Path, settings: Path
) -> list[str]:
    """Say what the verb `finetune` is about to do.

    Args:
        config: of the training.
        train: its images.
        weights: the file that they go to.
        settings: the file of the configuration.
    """
    steps = f"{config.finetune.n_steps} steps of {config.finetune.batch_size} regions"
    return [
        *_item("Data", f"{train.name}; {len(train)} {train.split} images; {_objects(train)}"),
        *_item("Network", _network(config)),
        *_item("Trained", f"the whole network on warped regions, {steps}"),
        *_item("Settings", "as configured, none is chosen"),
        *_item("Results", f"{weights}; every setting of this run is in {settings}"),
    ]


def closing_of_training(
    experiment: Experiment,
    config: ExperimentConfig,
    metrics: Mapping[str, Any],
    head: str,
    out: Path,
    evaluation: Path,
    cache: str,
) -> list[str]:
    """Say where a trained detector is, how good it is, and what to do next.

    Args:
        experiment: with the one head, without and with box regression.
        config: of the experiment.
        metrics: of the experiment, as in `metrics.json`.
        head: the one that was saved.
        out: the detector's folder.
        evaluation: the folder of tables and report.
        cache: a line on what it holds.
    """
    from rcnn_svm.report.advice import TrainingObjects, advice, weak_class

    result, measured = experiment.heads[head], metrics["heads"][head]
    n_objects = dict(zip(result.evaluation.classes, result.evaluation.n_positives.tolist(), strict=True))
    weak = weak_class(measured["ap"], n_objects)
    objects = TrainingObjects.of(experiment.splits.trainval, experiment.coverage)
    as_read = replace(config, features=result.detector.features)
    return [
        *_item("Detector", f"{out} ({head})"),
        *_item("Quality", _quality(measured, weak, f"the {metrics['n_test_images']} images of test")),
        *_crossed(metrics, config, head),
        *_boxes(result),
        *_believed(result.detector, measured),
        *_scores(result.detector),
        *_item("Report", f"{evaluation / 'report.html'}, tables beside it"),
        *_commands(
            f"rcnn-svm detect {_typed(out)} IMAGES --out FOLDER",
            f"rcnn-svm evaluate {_typed(out)} LABELLED_IMAGES",
        ),
        *_item(*cache.split(": ", 1)),
        *(line for one in advice(objects, weak, as_read) for line in _item("To try", one)),
    ]


def closing_of_comparison(
    metrics: Mapping[str, Any], bootstrap: BootstrapResult, page: Path, cache: str
) -> list[str]:
    """Say what a comparison of heads found, and where it can be read.

    Args:
        metrics: of the experiment, as in `metrics.json`.
        bootstrap: over its heads.
        page: the report.
        cache: a line on what it holds.
    """
    from rcnn_svm.report.findings import findings

    answers = [finding.answer for finding in findings(metrics, bootstrap)]
    return [
        *(line for one in answers for line in _item("Found", one)),
        *_item("Report", str(page)),
        *_item(*cache.split(": ", 1)),
    ]


def command(options: argparse.Namespace) -> str:
    """Return the command line as somebody else can type it."""
    from rcnn_svm.report.provenance import typed

    return " ".join(["rcnn-svm", *map(typed, options.words)])


def closing_of_joining(
    detector: Detector, result: HeadResult, n_before: int, out: Path, same: str | None
) -> list[str]:
    """Say which classes have joined a detector, and what has become of the others.

    Args:
        detector: with the new classes.
        result: of these on test of their data.
        n_before: classes that there were before.
        out: the detector's folder.
        same: the SHA-256 of what these depend on, where it is the same before and after; None where they were
            trained again.
    """
    evaluation = result.evaluation
    new = ", ".join(
        f"{name} ({'no object on test' if ap != ap else f'AP {100 * ap:.1f}'})"
        for name, ap in zip(evaluation.classes, evaluation.ap().tolist(), strict=True)
    )
    n_test = len(evaluation.matches.n_objects)
    older = (
        f"the weights of the {n_before} classes that it had are bit for bit the same (SHA-256 {same[:16]} "
        f"before and after)"
        if same is not None
        else f"the {n_before} classes that it had were trained again with the new images"
    )
    return [
        *_item("Detector", f"{out} ({len(detector.classes)} classes)"),
        *_item("Joined", f"{new}, on the {n_test} test images of their data"),
        *_item("Others", older),
        *_scores(detector),
    ]


def _crossed(metrics: Mapping[str, Any], config: ExperimentConfig, head: str) -> list[str]:
    """Say what folds reach, where they were asked for."""
    found = metrics["cross_validation"].get(head)
    if found is None or config.folds is None or found["mAP"]["value"] is None:
        return []
    mean = found["mAP"]
    span = "" if mean["low"] is None else f" (95 % interval {mean['low']:.1f} to {mean['high']:.1f})"
    return _item(
        "Folds",
        f"{mean['value']:.1f} mAP{span} on {found['n_images']} images, each found by one of "
        f"{found['n_folds']} trainings that had not seen it: evaluation/out_of_fold/{head}.json",
    )


def _boxes(result: HeadResult) -> list[str]:
    """Say how closely boxes fit, and where held-out images spoke against box regression."""
    if result.coco is None:
        return []
    coco = result.coco.summary()
    words = [f"COCO AP {100 * coco['AP']:.1f}, AP50 {100 * coco['AP50']:.1f}, AP75 {100 * coco['AP75']:.1f}"]
    if coco["AP75"] < 0.5 * coco["AP50"]:
        words.append("they fit loosely")
    if not result.detector.head.endswith("+bbox") and result.preferred:
        words.append("box regression is left out, since images held out did better without it")
    return _item("Boxes", "; ".join(words))


def _believed(detector: Detector, measured: Mapping[str, Any]) -> list[str]:
    """Say what `detect` will show."""
    if detector.thresholds is None:
        return []
    from rcnn_svm.report.tables import promise_words

    sure, chosen = measured["details"]["at_threshold"], detector.thresholds
    asked = " and ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in chosen.aim.items())
    promised = f"; {promise_words(chosen.to_json())}" if asked else ""
    words = (
        f"by `detect`: what reaches the threshold of its class, chosen on {chosen.n_images} images held out"
        f"{f' for {asked}' if asked else ''}{promised}; "
        f"on test {_share(sure['precision'])} of that is right and "
        f"{_share(sure['recall'])} of the objects are found "
        f"({sure['boxes_per_image']:.1f} boxes an image, {sure['objects_per_image']:.1f} objects)"
    )
    return _item("Shown", words)


def _scores(detector: Detector) -> list[str]:
    """Say whether scores have probabilities."""
    curves = detector.calibration
    if curves is None:
        return _item("Scores", "not calibrated, too little was found in images held out: no probabilities")
    return _item("Scores", f"with probabilities, calibrated on {curves.n_images} images held out")


def _share(percent: float | None) -> str:
    return "none" if percent is None else f"{percent:.0f} %"


def wrapped(page: str) -> str:
    """Return a page of tables with its sentences broken at the width of the terminal."""
    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
    lines = (line if line.startswith("|") else textwrap.fill(line, width) for line in page.splitlines())
    return "\n".join(lines)


def paragraph(text: str) -> str:
    """Return a text broken at the width of the terminal, all lines but the first indented."""
    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
    return textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _quality(measured: Mapping[str, Any], weak: WeakClass | None, images: str) -> str:
    if measured["mAP"] is None:
        return f"cannot be told, {images} hold no object"
    words, interval = f"{measured['mAP']:.1f} mAP on {images}, where 100 is perfect", measured["mAP_interval"]
    if "classification" in measured:
        own = measured["classification"]
        words, interval = f"{own['accuracy']:.1f} % accuracy on {images}", own["accuracy_interval"]
    if interval is not None:
        words += f" (95 % interval {interval[0]:.1f} to {interval[1]:.1f})"
    if "classification" in measured:
        words += f"; balanced {own['balanced_accuracy']:.1f} %, {measured['mAP']:.1f} mAP"
    if weak is not None:
        words += f"; {weak.name} is far behind: {weak.ap:.1f} AP (median of the others: {weak.others:.1f})"
    return words


def _objects(*parts: Dataset) -> str:
    n, classes = sum(int(part.counts().sum()) for part in parts), parts[0].classes
    named = ", ".join(classes[:_NAMED_CLASSES])
    if len(classes) > _NAMED_CLASSES:
        named += f" and {len(classes) - _NAMED_CLASSES} others"
    what, kinds = "labels" if parts[0].whole else "objects", "class" if len(classes) == 1 else "classes"
    return f"{n} {what} of {len(classes)} {kinds} ({named})"


def _rpn(config: ExperimentConfig) -> str:
    return f"{config.rpn.network}, weights {config.rpn.weights}" if config.rpn.network else "the same network"


def _network(config: ExperimentConfig) -> str:
    return f"{config.features.backbone}, weights {config.features.weights}"


def _reading(config: ExperimentConfig) -> str:
    taps = config.features.taps.replace(",", ", ") or "its own layers"
    if config.features.path == "warped":
        return f"{taps}, from a crop of the region alone"
    if trained_to_detect(config.features.backbone):
        return f"{taps}, from its own maps"
    both = (config.features.sides, config.features.small_objects_sides)
    sides, small = (" and ".join(map(str, own)) for own in both)
    decided = config.features.longer_sides is None and config.learn == "fc" and not config.choose
    where = f" ({small} if objects are small)" if decided else ""
    return f"{taps}, in one pass at {sides} pixels{where}"


def _learned(config: ExperimentConfig) -> str:
    heads, layers = (
        ", ".join(config.heads.names),
        " and ".join(f"fc{6 + i}" for i in range(len(config.fc.hidden))),
    )
    before = {
        "nothing": "",
        "fc": f"{layers} on what it reads, then ",
        "trunk": f"{layers} on what it reads, with the end of the network, then ",
        "network": "the whole network on crops of regions, then ",
    }[config.learn]
    return f"{before}{heads}"


def _commands(*lines: str) -> list[str]:
    """Return commands to type next; they are never broken."""
    return [f"{'Next:' if i == 0 else '':<{_INDENT}}{line}" for i, line in enumerate(lines)]


def _item(label: str, text: str) -> list[str]:
    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
    return textwrap.wrap(
        f"{label + ':':<{_INDENT}}{text}",
        width,
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _typed(path: Path) -> str:
    return shlex.quote(str(path))
