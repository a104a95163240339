"""Verbs that train: `demo`, `train`, `compare`, `finetune`."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcnn_svm.cli import options as shared
from rcnn_svm.config import to_dict
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.config import HEADS, ExperimentConfig, demo_config
from rcnn_svm.files import write_json
from rcnn_svm.progress import say

if TYPE_CHECKING:
    from rcnn_svm.experiment.recipe import Experiment, HeadResult

__all__ = ["add_verbs"]

Verbs = Any  # argparse keeps the type of its subparsers to itself


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs of this module."""
    demo = verbs.add_parser(
        "demo", help="digits in scenes: train a network from nothing, compare all heads, write a report"
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    demo.set_defaults(
        run=_demo,
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
    train.add_argument("--head", choices=HEADS, default="linear-svm")
    train.add_argument("--no-bbox", action="store_true", help="save the detector without box regression")
    train.add_argument("--dry-run", action="store_true", help="say what it would cost, and stop")
    shared.add_experiment_options(train)
    train.set_defaults(run=_train)

    compare = verbs.add_parser("compare", help="the same regions and features through every head")
    compare.add_argument("data", help="a VOC, COCO or YOLO data set, or `digits`")
    compare.add_argument("--out", type=Path, required=True, metavar="DIR", help="tables and report go here")
    compare.add_argument(
        "--heads", default=",".join(HEADS), metavar="A,B", help=f"of {', '.join(HEADS)} (default: all)"
    )
    compare.add_argument(
        "--no-pictures", action="store_true", help="no report.html, which shows photographs of the data set"
    )
    shared.add_experiment_options(compare)
    compare.set_defaults(run=_compare)

    finetune = verbs.add_parser("finetune", help="train a network on warped regions by R-CNN's recipe")
    finetune.add_argument("data", help="a VOC, COCO or YOLO data set, or `digits`")
    finetune.add_argument("--out", type=Path, required=True, metavar="FILE", help="weights, as .safetensors")
    finetune.add_argument("--device", default="cpu", help="where torch runs, such as cuda")
    shared.add_experiment_options(finetune)
    finetune.set_defaults(run=_finetune)


def _demo(options: argparse.Namespace) -> None:
    _run_and_report(options, shared.experiment_config(options, demo_config()))


def _compare(options: argparse.Namespace) -> None:
    names = tuple(name.strip() for name in options.heads.split(","))
    _run_and_report(options, _config(options, names))


def _config(options: argparse.Namespace, heads: tuple[str, ...]) -> ExperimentConfig:
    """Return the configuration for the data that the options name; the digits have one of their own."""
    base = demo_config() if options.data == "digits" else ExperimentConfig()
    data, names = shared.data_config(options, options.data), replace(base.heads, names=heads)
    return shared.experiment_config(options, replace(base, data=data, heads=names))


def _run_and_report(options: argparse.Namespace, config: ExperimentConfig) -> None:
    from rcnn_svm.report.experiment import write_experiment
    from rcnn_svm.report.tables import markdown

    started = time.perf_counter()
    experiment = _run(options, config)
    html = not options.no_pictures
    metrics, bootstrap = write_experiment(options.out, experiment, command=_command(options), html=html)
    print(markdown(metrics, bootstrap))
    page = options.out / ("report.html" if html else "README.md")
    say(f"Report: {page} ({time.perf_counter() - started:.0f} s in all)")


def _command(options: argparse.Namespace) -> str:
    """Return the command line as somebody else can type it."""
    from rcnn_svm.report.provenance import typed

    return " ".join(["rcnn-svm", *map(typed, options.words)])


def _run(options: argparse.Namespace, config: ExperimentConfig, finished: Any = None) -> Experiment:
    from rcnn_svm.experiment.data import load_data, too_small
    from rcnn_svm.experiment.recipe import run_experiment

    shared.say_config(config)
    splits = load_data(config.data, seed=config.seed)
    say(
        f"{splits.train.name}: {len(splits.train)} train, {len(splits.val)} val, "
        f"{len(splits.test)} test images, {len(splits.train.classes)} classes"
    )
    warning = too_small(splits.trainval, config.proposals.min_size)
    if warning:
        say(warning)
    write_json(options.out / "config.json", to_dict(config, finite=True))
    return run_experiment(config, splits, options.cache, n_jobs=shared.n_jobs_of(options), finished=finished)


def _train(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    config = _config(options, (options.head,))
    if options.dry_run:
        _estimate(options, config)
        return
    wanted = options.head if options.no_bbox else f"{options.head}+bbox"

    def save(result: HeadResult) -> None:
        if result.detector.head == wanted:
            result.detector.save(options.out)

    from rcnn_svm.report.experiment import write_experiment
    from rcnn_svm.report.tables import markdown

    experiment = _run(options, config, save)
    metrics, bootstrap = write_experiment(options.out / "evaluation", experiment, command=_command(options))
    print(markdown(metrics, bootstrap))
    say(
        f"Detector: {options.out} ({wanted}; {time.perf_counter() - started:.0f} s in all). "
        f"Use it with `rcnn-svm detect {options.out} IMAGES --out FOLDER`."
    )


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
    config = _config(options, HEADS)
    shared.say_config(config)
    train = load_data(config.data, seed=config.seed).train
    regions = propose(train, config, options.cache, n_jobs=shared.n_jobs_of(options))
    start = load_backbone(config.features.backbone, config.features.weights, seed=config.seed)
    result = finetune(
        start,
        train,
        [regions[sample.image_id].boxes for sample in train],
        config.finetune,
        seed=config.seed,
        checkpoint=options.out.with_suffix(".checkpoint"),
        device=options.device,
    )
    result.save(options.out)
    say(
        f"Weights: {options.out} ({result.seconds:.0f} s). Read features from them with "
        f"`--backbone {config.features.backbone} --weights {options.out}`."
    )
