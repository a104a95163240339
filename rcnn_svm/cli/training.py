"""Verbs that train: `demo`, `train`, `compare`, `finetune`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcnn_svm.cache import CacheLimit
from rcnn_svm.cli import options as shared
from rcnn_svm.cli import words
from rcnn_svm.config import to_dict
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.config import HEADS, ExperimentConfig, demo_config
from rcnn_svm.files import remove_marker, write_json
from rcnn_svm.progress import Stages, say

if TYPE_CHECKING:
    from rcnn_svm.datasets import Splits
    from rcnn_svm.evaluation.bootstrap import BootstrapResult
    from rcnn_svm.experiment.recipe import Experiment, HeadResult

__all__ = ["add_verbs"]

_HEAD = "linear-svm"
"""What `train` trains unless told otherwise."""

Verbs = Any  # argparse keeps the type of its subparsers to itself


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs of this module."""
    demo = verbs.add_parser(
        "demo", help="digits in scenes: train a network from nothing, compare all heads, write a report"
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    demo.set_defaults(
        run=_demo,
        resumes=True,
        paper=False,
        config=None,
        set=[],
        backbone=None,
        weights=None,
        taps=None,
        path=None,
        learn=None,
        no_choice=False,
        no_pictures=False,
    )
    demo.add_argument("--quick", action="store_true", help="a first look: few scenes, short training")
    shared.add_run_options(demo)

    train = verbs.add_parser("train", help="from labelled images to a trained, evaluated, saved detector")
    train.add_argument("data", help="a VOC, COCO or YOLO data set, or `digits`")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="the detector goes here")
    train.add_argument(
        "--head", choices=HEADS, help=f"(default: as configured, {_HEAD}); `compare` trains several"
    )
    train.add_argument("--no-bbox", action="store_true", help="save the detector without box regression")
    train.add_argument("--dry-run", action="store_true", help="say what it would cost, and stop")
    shared.add_experiment_options(train)
    train.set_defaults(run=_train, resumes=True)

    compare = verbs.add_parser("compare", help="the same regions and features through every head")
    compare.add_argument("data", help="a VOC, COCO or YOLO data set, or `digits`")
    compare.add_argument("--out", type=Path, required=True, metavar="DIR", help="tables and report go here")
    compare.add_argument(
        "--heads", metavar="A,B", help=f"of {', '.join(HEADS)} (default: as configured, all)"
    )
    compare.add_argument(
        "--no-pictures", action="store_true", help="no report.html, which shows photographs of the data set"
    )
    shared.add_experiment_options(compare)
    compare.set_defaults(run=_compare, resumes=True)

    finetune = verbs.add_parser("finetune", help="train a network on warped regions by R-CNN's recipe")
    finetune.add_argument("data", help="a VOC, COCO or YOLO data set, or `digits`")
    finetune.add_argument("--out", type=Path, required=True, metavar="FILE", help="weights, as .safetensors")
    finetune.add_argument("--device", default="cpu", help="where torch runs, such as cuda")
    shared.add_experiment_options(finetune)
    finetune.set_defaults(run=_finetune, resumes=True)


def _demo(options: argparse.Namespace) -> None:
    _run_and_report(options, shared.experiment_config(options, demo_config()))


def _compare(options: argparse.Namespace) -> None:
    names = tuple(name.strip() for name in options.heads.split(",")) if options.heads is not None else ()
    _run_and_report(options, _config(options, HEADS, names))


def _config(
    options: argparse.Namespace, heads: tuple[str, ...], wanted: tuple[str, ...] = ()
) -> ExperimentConfig:
    """Return the configuration for the data that the options name; the digits have one of their own.

    Args:
        options: of the command line.
        heads: that are trained where neither the configuration nor an option says otherwise.
        wanted: the heads that an option names; empty where none does.
    """
    base = demo_config() if options.data == "digits" else ExperimentConfig()
    config = shared.experiment_config(options, replace(base, heads=replace(base.heads, names=heads)))
    data = shared.data_config(options, options.data, config.data)
    return replace(config, data=data, heads=replace(config.heads, names=wanted or config.heads.names))


def _run_and_report(options: argparse.Namespace, config: ExperimentConfig) -> None:
    from rcnn_svm.datasets import SplitRecord
    from rcnn_svm.report.tables import markdown

    html = not options.no_pictures
    experiment, metrics, bootstrap = _run(options, config, options.out, html=html)
    SplitRecord.of(experiment.splits, seed=config.seed).write(options.out)
    print(markdown(metrics, bootstrap), flush=True)
    page = options.out / ("report.html" if html else "README.md")
    for line in words.closing_of_comparison(metrics, bootstrap, page):
        say(line)


def _command(options: argparse.Namespace) -> str:
    """Return the command line as somebody else can type it."""
    from rcnn_svm.report.provenance import typed

    return " ".join(["rcnn-svm", *map(typed, options.words)])


def _run(
    options: argparse.Namespace,
    config: ExperimentConfig,
    folder: Path,
    *,
    html: bool = True,
    finished: Callable[[HeadResult, Splits], None] | None = None,
) -> tuple[Experiment, dict[str, Any], BootstrapResult]:
    """Run an experiment and write its report to `folder`; return it with its metrics and their intervals."""
    from rcnn_svm.experiment.data import load_data
    from rcnn_svm.experiment.recipe import run_experiment, stages_of
    from rcnn_svm.report.experiment import write_experiment

    limit = shared.cache_limit_of(options)
    stages = Stages((*stages_of(config), "report"))
    splits = load_data(config.data, seed=config.seed)
    remove_marker(options.out / "metrics.json")  # where one lies, the rest of the folder belongs to it
    write_json(options.out / "config.json", to_dict(config, finite=True))
    for line in words.opening(config, splits, options.out):
        say(line)
    keep = None if finished is None else lambda result: finished(result, splits)
    experiment = run_experiment(
        config,
        splits,
        options.cache,
        n_jobs=shared.n_jobs_of(options),
        cache_limit=limit,
        finished=keep,
        stages=stages,
    )
    with stages("report", "intervals, tables and figures"):
        metrics, bootstrap = write_experiment(folder, experiment, command=_command(options), html=html)
    stages.finish()
    return experiment, metrics, bootstrap


def _train(options: argparse.Namespace) -> None:
    config = _config(options, (_HEAD,), (options.head,) if options.head is not None else ())
    head, *others = config.heads.names
    if others:
        raise ConfigError(
            f"heads.names: `train` saves the detector of one head, got {', '.join(config.heads.names)}. "
            f"Name one with --head, or train them all with `rcnn-svm compare`."
        )
    if options.dry_run:
        _estimate(options, config)
        return
    wanted = head if options.no_bbox else f"{head}+bbox"

    def save(result: HeadResult, splits: Splits) -> None:
        if result.detector.head == wanted:
            SplitRecord.of(splits, seed=config.seed).write(options.out)
            result.detector.save(options.out)

    from rcnn_svm.datasets import SplitRecord
    from rcnn_svm.report.tables import markdown

    folder = options.out / "evaluation"
    experiment, metrics, bootstrap = _run(options, config, folder, finished=save)
    print(markdown(metrics, bootstrap), flush=True)
    for line in words.closing_of_training(experiment, metrics, wanted, options.out, folder):
        say(line)


def _estimate(options: argparse.Namespace, config: ExperimentConfig) -> None:
    from rcnn_svm.experiment.data import load_data
    from rcnn_svm.experiment.recipe import estimate_experiment

    splits = load_data(config.data, seed=config.seed)
    for estimate in estimate_experiment(config, splits, options.cache):
        print(estimate)


def _finetune(options: argparse.Namespace) -> None:
    from rcnn_svm.experiment.data import load_data
    from rcnn_svm.experiment.recipe import propose
    from rcnn_svm.features.backbone import load_backbone
    from rcnn_svm.finetune import finetune

    if options.out.suffix != ".safetensors":
        raise ConfigError(f"--out must name a .safetensors file, got {options.out}.")
    room = CacheLimit(options.cache, shared.cache_limit_of(options))
    config = _config(options, HEADS)
    stages = Stages(("proposals", "finetune"))
    train = load_data(config.data, seed=config.seed).train
    settings = options.out.with_suffix(".config.json")
    write_json(settings, to_dict(config, finite=True))
    for line in words.opening_of_finetuning(config, train, options.out, settings):
        say(line)
    with stages("proposals", f"boxes in which an object may be, in {len(train)} images"):
        regions = propose(train, config, options.cache, n_jobs=shared.n_jobs_of(options))
    room.hold(finished=True)
    with stages("finetune", f"{config.features.backbone} on {len(train)} images of {train.split}"):
        result = finetune(
            load_backbone(config.features.backbone, config.features.weights, seed=config.seed),
            train,
            [regions[sample.image_id].boxes for sample in train],
            config.finetune,
            seed=config.seed,
            checkpoint=options.out.with_suffix(".checkpoint"),
            device=options.device,
        )
    result.save(options.out)
    stages.finish()
    say(f"Weights: {options.out}. Read features from them with:")
    say(f"  --backbone {config.features.backbone} --weights {options.out}")
