"""Verbs that train: `demo`, `train`, `compare`, `finetune`."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcnn_svm.cache import CacheLimit, describe
from rcnn_svm.cli import options as shared
from rcnn_svm.cli import words
from rcnn_svm.config import to_dict
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.config import (
    COMPARED,
    HEADS,
    PRESETS,
    ExperimentConfig,
    HeadName,
    demo_config,
    digits_images_config,
)
from rcnn_svm.files import remove_marker, write_json
from rcnn_svm.progress import Stages, say

if TYPE_CHECKING:
    from rcnn_svm.datasets import Splits
    from rcnn_svm.evaluation.bootstrap import BootstrapResult
    from rcnn_svm.experiment.ladder import Rung
    from rcnn_svm.experiment.parts import Parts
    from rcnn_svm.experiment.recipe import Experiment, HeadResult

__all__ = ["add_compare", "add_demo", "add_finetune", "add_presets", "add_train", "configured"]

_HEAD: HeadName = "softmax-finetuned"
"""What `train` trains unless told otherwise: the softmax that fc layers were trained with reaches more on
folds than SVMs on the same layers, and takes less time (docs/presets.md)."""
_HEAD_OF_NOTHING: HeadName = "linear-svm"
"""The same where nothing is trained before the head."""


def add_demo(demo: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    demo.set_defaults(run=_demo, resumes=True, learns=True, no_pictures=False)
    demo.add_argument(
        "--quick",
        dest="preset",
        action="store_const",
        const="quick",
        default="default",
        help="a first look: few scenes, short training",
    )
    shared.add_run_options(demo)


def add_train(train: argparse.ArgumentParser) -> None:
    """Add the options of `train`."""
    train.add_argument("data", help=shared.DATA_HELP)
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="the detector goes here")
    train.add_argument(
        "--head", choices=HEADS, help=f"(default: as configured, {_HEAD}); `compare` trains several"
    )
    asked = train.add_mutually_exclusive_group()
    asked.add_argument(
        "--false-alarms",
        type=float,
        metavar="R",
        help="choose thresholds that at most R false detections an image reach, such as 0.05 for one in 20 "
        "images (default: the best F1)",
    )
    asked.add_argument(
        "--precision",
        type=float,
        metavar="P",
        help="choose thresholds so that at least this share of what reaches them is right, such as 0.9",
    )
    train.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="train K times without a K-th of the images, too: cross-validated mAP, thresholds and "
        "probabilities, and what was found in each image unseen (default: val, or 3 where it is small)",
    )
    train.add_argument("--no-bbox", action="store_true", help="save the detector without box regression")
    train.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="the best detector that N minutes give: presets of rising cost one after the other, each saved "
        "if it is better on held-out images than those before",
    )
    train.add_argument("--dry-run", action="store_true", help="say what it would cost, and stop")
    shared.add_experiment_options(train)
    shared.add_cluster_option(train)
    train.set_defaults(run=_train, resumes=True)


def add_compare(compare: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    compare.add_argument("data", help=shared.DATA_HELP)
    compare.add_argument("--out", type=Path, required=True, metavar="DIR", help="tables and report go here")
    compare.add_argument(
        "--heads", metavar="A,B", help=f"of {', '.join(HEADS)} (default: as configured, the first four)"
    )
    compare.add_argument(
        "--no-pictures", action="store_true", help="no report.html, which shows photographs of the data set"
    )
    shared.add_experiment_options(compare)
    shared.add_cluster_option(compare)
    compare.set_defaults(run=_compare, resumes=True)


def add_presets(presets: argparse.ArgumentParser) -> None:
    """Add the options of `presets`."""
    presets.set_defaults(run=_presets)


def add_finetune(finetune: argparse.ArgumentParser) -> None:
    """Add the options of `finetune`."""
    finetune.add_argument("data", help=shared.DATA_HELP)
    finetune.add_argument("--out", type=Path, required=True, metavar="FILE", help="weights, as .safetensors")
    shared.add_experiment_options(finetune, without=("taps", "path", "learn", "choice"))
    finetune.set_defaults(run=_finetune, resumes=True)


def _demo(options: argparse.Namespace) -> None:
    _run_and_report(options, shared.experiment_config(options, demo_config()))


def _compare(options: argparse.Namespace) -> None:
    names = tuple(name.strip() for name in options.heads.split(",")) if options.heads is not None else ()
    # A fair comparison tries as much for each head.
    _run_and_report(options, configured(options, COMPARED, names, choose=True))


def configured(
    options: argparse.Namespace,
    heads: tuple[HeadName, ...] = COMPARED,
    wanted: tuple[HeadName, ...] = (),
    *,
    choose: bool = False,
) -> ExperimentConfig:
    """Return the configuration for the data that the options name; the digits have one of their own.

    Args:
        options: of the command line.
        heads: that are trained where neither the configuration nor an option says otherwise.
        wanted: the heads that an option names; empty where none does.
        choose: settings are chosen on val where neither says otherwise.
    """
    embedded = {"digits": demo_config, "digits-images": digits_images_config}
    base = embedded[options.data]() if options.data in embedded else ExperimentConfig(choose=choose)
    config = shared.experiment_config(options, replace(base, heads=replace(base.heads, names=heads)))
    data = shared.data_config(options, options.data, config.data)
    return replace(config, data=data, heads=replace(config.heads, names=wanted or config.heads.names))


def _run_and_report(options: argparse.Namespace, config: ExperimentConfig) -> None:
    from rcnn_svm.datasets import SplitRecord
    from rcnn_svm.report.tables import markdown

    html = not options.no_pictures
    experiment, metrics, bootstrap = _run(options, config, options.out, html=html)
    SplitRecord.of(experiment.splits, seed=config.seed).write(options.out)
    print(words.wrapped(markdown(metrics, bootstrap)), flush=True)
    page = options.out / ("report.html" if html else "README.md")
    cache = describe(options.cache, shared.cache_limit_of(options))
    for line in words.closing_of_comparison(metrics, bootstrap, page, cache):
        say(line)


def _run(
    options: argparse.Namespace,
    config: ExperimentConfig,
    folder: Path,
    *,
    html: bool = True,
    finished: Callable[[HeadResult, Splits], None] | None = None,
) -> tuple[Experiment, dict[str, Any], BootstrapResult]:
    """Run an experiment and write its report to `folder`; return it with its metrics and their intervals."""
    from rcnn_svm.experiment.data import for_these_data
    from rcnn_svm.experiment.recipe import run_experiment, stages_of
    from rcnn_svm.report.experiment import write_experiment

    config = replace(config, data=for_these_data(config.data))
    parts, run = config.build(), shared.run_of(options)
    stages = Stages((*stages_of(parts), "report"))
    splits = _open(options, config, folder)
    keep = None if finished is None else lambda result: finished(result, splits)
    experiment = run_experiment(parts, splits, run, finished=keep, stages=stages)
    with stages("report", "intervals, tables and figures"):
        metrics, bootstrap = write_experiment(folder, experiment, command=words.command(options), html=html)
    stages.finish()
    return experiment, metrics, bootstrap


def _open(options: argparse.Namespace, config: ExperimentConfig, folder: Path) -> Splits:
    """Load the images and say what is about to be done with them; `folder` is that of the report."""
    from rcnn_svm.experiment.data import load_data, too_small

    splits = load_data(config.data, seed=config.seed)
    remove_marker(folder / "metrics.json")  # where one lies, the rest of the folder belongs to it
    if config.proposer == "selective-search":
        warning = too_small(splits.trainval, config.proposals.min_size)
        if warning:
            say(warning)
    write_json(options.out / "config.json", to_dict(config, finite=True))
    for line in words.opening(config, splits, options.out):
        say(line)
    return splits


def _configured_training(options: argparse.Namespace) -> ExperimentConfig:
    """Return the configuration of `train`, which is of one head."""
    config = configured(options, (_HEAD,), (options.head,) if options.head is not None else ())
    if config.learn == "nothing" and config.heads.names == (_HEAD,) and options.head is None:
        config = replace(config, heads=replace(config.heads, names=(_HEAD_OF_NOTHING,)))
    config = replace(config, **shared.given(options, "false_alarms", "precision", "folds"))
    if len(config.heads.names) > 1:
        raise ConfigError(
            f"heads.names: `train` saves the detector of one head, got {', '.join(config.heads.names)}. "
            f"Name one with --head, or train them all with `rcnn-svm compare`."
        )
    return config


def _train(options: argparse.Namespace) -> None:
    if options.cluster is not None and (options.minutes is not None or options.dry_run):
        option = "--dry-run" if options.dry_run else "--minutes"
        raise ConfigError(
            f"{option} foretells what this machine takes, got --cluster as well. Leave out one."
        )
    if options.minutes is not None:
        _train_for(options, options.minutes)
        return
    config = _configured_training(options)
    if options.dry_run:
        _estimate(options, config)
        return
    saved: list[str] = []

    def save(result: HeadResult, splits: Splits) -> None:
        if _taken(options, config, result):
            if result.unreached is not None:
                raise result.unreached
            saved.append(result.detector.head)
            _save(options, config, result, splits)

    folder = options.out / "evaluation"
    experiment, metrics, bootstrap = _run(options, config, folder, finished=save)
    _close(options, config, saved[0], experiment, metrics, bootstrap)


def _train_for(options: argparse.Namespace, minutes: float) -> None:
    """Train the best detector that so many minutes give."""
    from rcnn_svm.experiment.ladder import climb, seconds_of_features
    from rcnn_svm.experiment.recipe import run_experiment, stages_of
    from rcnn_svm.report.experiment import write_experiment

    started = time.perf_counter()
    rungs = _rungs(options, minutes)
    configs = {rung.name: config for rung, config in rungs}
    first, run, folder = rungs[0][1], shared.run_of(options), options.out / "evaluation"
    splits = _open(options, first, folder)

    def train(parts: Parts, in_time: Callable[[], None]) -> Experiment:
        return run_experiment(parts, splits, run, stages=Stages(stages_of(parts), before=in_time))

    def save(rung: Rung, experiment: Experiment, result: HeadResult) -> None:
        _save(options, configs[rung.name], result, experiment.splits)
        write_json(options.out / "config.json", to_dict(configs[rung.name], finite=True))

    climbed = climb(
        [rung for rung, _ in rungs],
        60 * minutes,
        foresee=lambda parts: seconds_of_features(parts, splits, run),
        train=train,
        taken=lambda result: _taken(options, first, result),
        save=save,
        started=started,
    )
    say(climbed.ended)
    experiment, config = climbed.experiment, configs[climbed.recipe]
    metrics, bootstrap = write_experiment(folder, experiment, command=words.command(options), climbed=climbed)
    head = next(name for name, result in experiment.heads.items() if _taken(options, config, result))
    _close(options, config, head, experiment, metrics, bootstrap)


def _rungs(options: argparse.Namespace, minutes: float) -> list[tuple[Rung, ExperimentConfig]]:
    """Return the recipes that `--minutes` tries, the fastest first, with their configurations.

    They differ in nothing that decides which images are held out. One that the other options make the same as
    the one before is left out, and so is, with a word, one whose parts do not work together with them.
    """
    from rcnn_svm.experiment.data import for_these_data
    from rcnn_svm.experiment.ladder import LADDER, Rung

    if not 0 < minutes < math.inf:
        raise ConfigError(f"--minutes must be above 0, got {minutes:g}.")
    for option, value in (
        ("--preset", options.preset),
        ("--choice", options.choice),
        ("--paper", options.paper),
        ("--dry-run", options.dry_run),
    ):
        if value:
            raise ConfigError(
                f"--minutes tries recipes of its own, got {option} as well. Leave out one of the two."
            )
    base = _configured_training(options)
    if base.choose or base.folds == 0:
        got = "choose=true" if base.choose else "folds=0"
        raise ConfigError(
            f"--minutes judges recipes on images held out of a training, got {got}. Set "
            f"choose=false, and folds to 1 or more."
        )
    if base.learn not in ("nothing", "fc"):
        raise ConfigError(
            f"--minutes cannot foresee how long a network is tuned, got learn={base.learn}. Set "
            f"learn=fc, or name a recipe with --preset."
        )
    data = for_these_data(base.data)
    # Of whole images none would be held out, since nothing but the choice of the recipe hangs on them.
    folds = 3 if data.whole_images and base.folds is None else base.folds
    rungs: list[tuple[Rung, ExperimentConfig]] = []
    growth, unfit = 1.0, None
    for name, own in LADDER.items():
        growth *= own
        preset = _configured_training(argparse.Namespace(**{**vars(options), "preset": name}))
        config = replace(preset, data=data, folds=folds, n_bootstrap=base.n_bootstrap)
        if rungs and config == rungs[-1][1]:
            continue
        try:
            rungs.append((Rung(name, config.build(), growth), config))
        except ConfigError as error:
            unfit = error
            say(f"{name} is not tried, it does not go with the other options: {error}")
            continue
        growth = 1.0
    if not rungs and unfit is not None:
        raise unfit
    return rungs


def _taken(options: argparse.Namespace, config: ExperimentConfig, result: HeadResult) -> bool:
    """Whether this result of the head is the detector."""
    return result.detector.head == config.heads.names[0] if options.no_bbox else result.preferred


def _save(options: argparse.Namespace, config: ExperimentConfig, result: HeadResult, splits: Splits) -> None:
    """Save a detector with its card and the images that it was measured on, in the place of an older one."""
    from rcnn_svm.datasets import SplitRecord
    from rcnn_svm.report.card import figures_of, remove_card, write_card
    from rcnn_svm.report.provenance import provenance

    record = SplitRecord.of(splits, seed=config.seed)
    record.remove(options.out)  # of an older detector: it must never lie beside this one
    remove_card(options.out)
    figures = figures_of(
        result,
        len(splits.trainval),
        seed=config.seed,
        n_bootstrap=config.n_bootstrap,
        provenance=provenance(seed=config.seed, command=words.command(options)),
    )
    detector = replace(result.detector, info={**result.detector.info, "figures": figures})
    detector.save(options.out)
    record.write(options.out)
    write_card(options.out, detector)


def _close(
    options: argparse.Namespace,
    config: ExperimentConfig,
    head: str,
    experiment: Experiment,
    metrics: dict[str, Any],
    bootstrap: BootstrapResult,
) -> None:
    """Print the tables of a training, and where its detector is and what to do next."""
    from rcnn_svm.report.tables import markdown

    print(words.wrapped(markdown(metrics, bootstrap)), flush=True)
    folder, cache = options.out / "evaluation", describe(options.cache, shared.cache_limit_of(options))
    for line in words.closing_of_training(experiment, config, metrics, head, options.out, folder, cache):
        say(line)


def _estimate(options: argparse.Namespace, config: ExperimentConfig) -> None:
    from rcnn_svm.experiment.data import for_these_data, load_data
    from rcnn_svm.experiment.recipe import estimate_experiment

    config = replace(config, data=for_these_data(config.data))
    splits = load_data(config.data, seed=config.seed)
    for estimate in estimate_experiment(config.build(), splits, shared.run_of(options)):
        print(estimate)


def _presets(options: argparse.Namespace) -> None:
    """Print each preset and the settings in which it differs from the default one."""
    default = _flat(to_dict(ExperimentConfig()))
    for name, preset in PRESETS.items():
        print(f"{name}: {preset.words}")
        for key, value in _flat(to_dict(preset.apply(ExperimentConfig()))).items():
            if value != default[key]:
                print(f"    {key} = {_toml(value)}  (default: {_toml(default[key])})")
    print(f"`train` trains the head {_HEAD} unless --head names another.")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted keys, as `--set` takes them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        flat |= inner
    return flat


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value)


def _finetune(options: argparse.Namespace) -> None:
    from rcnn_svm.experiment.data import for_these_data, load_data
    from rcnn_svm.experiment.learning import FineTuned
    from rcnn_svm.experiment.recipe import propose
    from rcnn_svm.networks.backbone import load_backbone
    from rcnn_svm.training.crops import finetune

    if options.out.suffix != ".safetensors":
        raise ConfigError(f"--out must name a .safetensors file, got {options.out}.")
    run = shared.run_of(options)
    room = CacheLimit(run.cache, run.cache_limit)
    config = replace(configured(options, COMPARED), learn="network")
    config = replace(config, data=for_these_data(config.data))
    parts = config.build()
    assert isinstance(parts.learner, FineTuned)  # as learn says
    stages = Stages(("proposals", "finetune"))
    train = load_data(config.data, seed=config.seed).train
    settings = options.out.with_suffix(".config.json")
    write_json(settings, to_dict(config, finite=True))
    for line in words.opening_of_finetuning(config, train, options.out, settings):
        say(line)
    with stages("proposals", f"boxes in which an object may be, in {len(train)} images"):
        regions = propose(train, parts.proposer, run)
    room.hold(finished=True)
    with stages("finetune", f"{config.features.backbone} on {len(train)} images of {train.split}"):
        result = finetune(
            load_backbone(config.features.backbone, config.features.weights, seed=config.seed),
            train,
            [regions[sample.image_id].boxes for sample in train],
            parts.learner.finetune,
            seed=config.seed,
            checkpoint=options.out.with_suffix(".checkpoint"),
            device=run.device,
            ranks=run.ranks,
        )
    result.save(options.out)
    stages.finish()
    say(f"Weights: {options.out}. Read features from them with:")
    say(f"  --backbone {config.features.backbone} --weights {options.out}")
