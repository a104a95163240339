"""Everything that an experiment leaves behind: metrics, tables, figures, detections, the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcnn_svm.config import to_dict
from rcnn_svm.evaluation.bootstrap import BootstrapResult, paired_bootstrap
from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.experiment.recipe import Experiment
from rcnn_svm.files import remove_marker, write_json, write_text
from rcnn_svm.report.html import write_html_report
from rcnn_svm.report.provenance import portable_path, provenance
from rcnn_svm.report.tables import head_metrics, markdown, write_tables

__all__ = ["experiment_metrics", "write_experiment"]

_RULES = {
    "voc07": "VOC2007 (11 points)",
    "voc07-exact": "VOC2007 (11 exact points)",
    "voc10": "VOC2010 (all points)",
    "coco": "COCO",
}


def experiment_metrics(
    name: str, experiment: Experiment, bootstrap: BootstrapResult, *, command: str
) -> dict[str, Any]:
    """Return the figures of an experiment in the form of `metrics.json`.

    Args:
        name: of the experiment.
        experiment: finished.
        bootstrap: over its heads.
        command: what made it.
    """
    splits = experiment.splits
    return {
        "schema": 1,
        "experiment": name,
        "dataset": splits.train.name,
        "train_split": splits.trainval.split,
        "test_split": splits.test.split,
        "rule": experiment.config.rule,
        "n_train_images": len(splits.trainval),
        "n_test_images": len(splits.test),
        "heads": {
            head: head_metrics(
                result.evaluation,
                result.coco,
                bootstrap.mean[head],
                train_s=result.train_s,
                score_s_per_image=result.score_s_per_image,
                peak_rss_mb=result.peak_rss_mb,
                details=result.details,
            )
            for head, result in experiment.heads.items()
        },
        "stages_s": experiment.stages_s,
        "provenance": provenance(seed=experiment.config.seed, command=command),
    }


def write_experiment(
    folder: Path, experiment: Experiment, *, command: str, html: bool = True
) -> tuple[dict[str, Any], BootstrapResult]:
    """Write `metrics.json`, `config.json`, tables, README and, if wanted, `report.html`.

    Returns:
        The metrics, and the bootstrap over the heads.

    Raises:
        DataError: the folder cannot be written to.
        DiskSpaceError: the disk is full.
    """
    config = experiment.config
    evals = {head: result.evaluation for head, result in experiment.heads.items()}
    bootstrap = paired_bootstrap(evals, n_resamples=config.n_bootstrap, seed=config.seed, rule=config.rule)
    metrics = experiment_metrics(folder.name, experiment, bootstrap, command=command)
    values = to_dict(config, finite=True)
    remove_marker(folder / "metrics.json")  # of an earlier run: where it lies, the rest is whole
    values["data"]["path"] = portable_path(config.data.path)
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
    write_text(folder / "README.md", _readme(metrics, bootstrap, config, experiment.splits.notes))
    write_json(folder / "metrics.json", metrics)
    return metrics, bootstrap


def _readme(
    metrics: Mapping[str, Any], bootstrap: BootstrapResult, config: ExperimentConfig, notes: tuple[str, ...]
) -> str:
    source = metrics["provenance"]
    rule = _RULES[metrics["rule"]]
    caveats = "".join(f"- {note}\n" for note in notes)
    return (
        f"# {metrics['experiment']}\n\n"
        f"Trained on {metrics['n_train_images']} images ({metrics['train_split']}) of {metrics['dataset']}, "
        f"measured once on {metrics['n_test_images']} ({metrics['test_split']}). "
        f"{' '.join(_choices(config))} mAP and the AP of classes are by the rule of {rule}, in percent, with "
        f"95 % intervals of a paired bootstrap over the test images.\n\n"
        f"{markdown(metrics, bootstrap)}\n"
        f"Made by `{source['command']}` at commit {source['commit'][:12]} on {source['date']}, "
        f"seed {source['seed']}, {source['machine']['cpu']} with {source['machine']['cores']} cores.\n"
        + (f"\n{caveats}" if caveats else "")
    )


def _choices(config: ExperimentConfig) -> list[str]:
    """Return one sentence on each thing that was settled before the look at test, and by what."""
    if config.choose:
        return ["Settings were chosen by training on train and measuring on val."]
    return ["No setting was chosen on these images: all were fixed beforehand."]
