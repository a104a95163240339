"""Everything that an experiment leaves behind: metrics, tables, figures, detections, the page."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcnn_svm.evaluation.bootstrap import BootstrapResult, paired_accuracy, paired_bootstrap
from rcnn_svm.evaluation.exchange import write_detections
from rcnn_svm.evaluation.voc import RULE_NAMES
from rcnn_svm.experiment.choosing import HeldOut
from rcnn_svm.experiment.ladder import Climb
from rcnn_svm.experiment.parts import Parts
from rcnn_svm.experiment.recipe import Experiment
from rcnn_svm.files import remove_marker, write_json, write_text
from rcnn_svm.report.html import write_html_report
from rcnn_svm.report.provenance import portable_path, provenance
from rcnn_svm.report.tables import difference_rows, head_metrics, markdown, write_tables

__all__ = ["cross_validated", "experiment_metrics", "write_experiment"]


def cross_validated(held_out: HeldOut, *, seed: int, n_bootstrap: int) -> dict[str, Any]:
    """Return what several trainings reach together, each on the images that it had not seen, as plain data.

    Their detections are pooled: AP ranks the scores of all trainings together.

    Args:
        held_out: of two folds or more.
        seed: of the resamples.
        n_bootstrap: how many resamples.
    """
    evaluation = held_out.evaluation
    found = paired_bootstrap({"": evaluation}, n_resamples=n_bootstrap, seed=seed, rule=evaluation.rule)
    return {
        "n_folds": held_out.n_folds,
        "n_images": len(held_out.images),
        "mAP": found.mean[""].in_percent(),
        "ap": {name: of.in_percent() for name, of in found.per_class[""].items()},
    }


def experiment_metrics(
    name: str,
    experiment: Experiment,
    bootstrap: BootstrapResult,
    *,
    command: str,
    climbed: Climb | None = None,
) -> dict[str, Any]:
    """Return the figures of an experiment in the form of `metrics.json`.

    Args:
        name: of the experiment.
        experiment: finished.
        bootstrap: over its heads.
        command: what made it.
        climbed: the recipes that were tried, where a time was set; None where none was.
    """
    splits, parts = experiment.splits, experiment.parts
    classified = {
        head: result.classification
        for head, result in experiment.heads.items()
        if result.classification is not None
    }
    accuracy = (
        paired_accuracy(classified, n_resamples=parts.n_bootstrap, seed=parts.seed) if classified else {}
    )
    return {
        "schema": 1,
        "experiment": name,
        "dataset": splits.train.name,
        "train_split": splits.trainval.split,
        "test_split": splits.test.split,
        "rule": parts.rule,
        "n_train_images": len(splits.trainval),
        "n_test_images": len(splits.test),
        "heads": {
            head: head_metrics(
                result.evaluation,
                result.coco,
                bootstrap.mean[head],
                classification=result.classification,
                accuracy={name: paired.mean[head] for name, paired in accuracy.items()},
                about=result.about,
                train_s=result.train_s,
                score_s_per_image=result.score_s_per_image,
                peak_rss_mb=result.peak_rss_mb,
                measures=result.measures,
                details=result.details,
            )
            for head, result in experiment.heads.items()
        },
        "cross_validation": {
            head: cross_validated(held_out, seed=parts.seed, n_bootstrap=parts.n_bootstrap)
            for head, held_out in _crossed(experiment).items()
        },
        **({"accuracy_differences": difference_rows(accuracy["accuracy"].differences)} if accuracy else {}),
        **({} if climbed is None else {"minutes": climbed.to_json()}),
        "stages_s": experiment.stages_s,
        "provenance": provenance(seed=parts.seed, command=command),
    }


def write_experiment(
    folder: str | Path,
    experiment: Experiment,
    *,
    command: str,
    html: bool = True,
    climbed: Climb | None = None,
) -> tuple[dict[str, Any], BootstrapResult]:
    """Write `metrics.json`, `config.json`, tables, README and, if wanted, `report.html`.

    Where a time was set, `climbed` are the recipes that were tried, `experiment` among them. Where folds were
    held out, `out_of_fold/HEAD.json` holds what was found in each image unseen.

    Returns:
        The metrics, and the bootstrap over the heads.

    Raises:
        DataError: the folder cannot be written to.
        DiskSpaceError: the disk is full.
    """
    folder, parts = Path(folder), experiment.parts
    evals = {head: result.evaluation for head, result in experiment.heads.items()}
    bootstrap = paired_bootstrap(evals, n_resamples=parts.n_bootstrap, seed=parts.seed, rule=parts.rule)
    metrics = experiment_metrics(folder.name, experiment, bootstrap, command=command, climbed=climbed)
    values = copy.deepcopy(dict(parts.described))
    remove_marker(folder / "metrics.json")  # of an earlier run: where it lies, the rest is whole
    values["data"]["path"] = portable_path(values["data"]["path"])
    write_json(folder / "config.json", values)
    write_tables(folder, metrics, bootstrap)
    if html:
        write_html_report(
            folder,
            metrics,
            evals,
            {head: result.detections for head, result in experiment.heads.items()},
            experiment.splits.test,
            bootstrap,
            config=values,
        )
    for head, held_out in _crossed(experiment).items():
        write_detections(
            folder / "out_of_fold" / f"{head}.json", held_out.detections, held_out.images.classes
        )
    write_text(folder / "README.md", _readme(metrics, bootstrap, parts, experiment.splits.notes))
    write_json(folder / "metrics.json", metrics)
    return metrics, bootstrap


def _crossed(experiment: Experiment) -> dict[str, HeldOut]:
    """Return what the heads that are taken found in folds of the images, where folds were held out."""
    return {
        head: result.held_out
        for head, result in experiment.heads.items()
        if result.preferred and result.held_out is not None and result.held_out.n_folds > 1
    }


def _readme(
    metrics: Mapping[str, Any], bootstrap: BootstrapResult, parts: Parts, notes: tuple[str, ...]
) -> str:
    source = metrics["provenance"]
    caveats = "".join(f"- {note}\n" for note in notes)
    return (
        f"# {metrics['experiment']}\n\n"
        f"Trained on {metrics['n_train_images']} images ({metrics['train_split']}) of {metrics['dataset']}, "
        f"measured once on {metrics['n_test_images']} ({metrics['test_split']}). "
        f"{' '.join(_choices(parts, climbed='minutes' in metrics))} "
        + ("Each image is its only region, and each class ranks all images. " if parts.boxes is None else "")
        + f"mAP and the AP of classes are by the rule of {RULE_NAMES[parts.rule]}, in percent, with 95 % "
        f"intervals of a paired bootstrap over the test images.\n\n"
        f"{markdown(metrics, bootstrap)}\n"
        f"Made by `{source['command']}` at commit {source['commit'][:12]} on {source['date']}, "
        f"seed {source['seed']}, {source['machine']['cpu']} with {source['machine']['cores']} cores.\n"
        + (f"\n{caveats}" if caveats else "")
    )


def _choices(parts: Parts, *, climbed: bool) -> list[str]:
    """Return one sentence on each thing that was settled before the look at test, and by what.

    Args:
        parts: of the experiment.
        climbed: whether it is the best of several recipes on held-out images.
    """
    if parts.choose:
        return ["Settings were chosen by training on train and measuring on val."]
    fixed = "No setting was chosen on these images: all were fixed beforehand."
    decided = [
        *(["the recipe"] if climbed else []),
        *([] if parts.folds == 0 or parts.boxes is None else ["thresholds of scores", "how far boxes move"]),
    ]
    if not decided:
        return [fixed]
    *others, last = decided
    named = f"{', '.join(others)} and {last}" if others else last
    return [
        f"{fixed[:-1]}, but for {named}.",
        "These were decided on images held out of a first training; the final one is on all of them.",
    ]
