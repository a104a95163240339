"""Options that several verbs share, and the configuration they add up to."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from rcnn_svm.config import to_dict, with_overrides
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig, paper_config, quick_config
from rcnn_svm.progress import say

__all__ = [
    "add_data_options",
    "add_experiment_options",
    "add_run_options",
    "data_config",
    "experiment_config",
    "n_jobs_of",
    "say_config",
]


def default_cache() -> Path:
    """Return where proposals and features are kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home) / "rcnn_svm" if home else Path.home() / ".cache" / "rcnn_svm"


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which labelled images."""
    group = parser.add_argument_group("data")
    group.add_argument("--format", choices=("auto", "voc", "coco", "yolo"), default="auto")
    group.add_argument("--classes", metavar="A,B,C", default="", help="learn these classes, in this order")
    group.add_argument(
        "--drop-bad-boxes", action="store_true", help="leave broken boxes out instead of stopping"
    )
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out images that are missing, damaged or have bad labels",
    )
    group.add_argument(
        "--skip-absent-classes", action="store_true", help="leave out classes without a training object"
    )
    group.add_argument("--max-images", type=int, metavar="N", help="at most N images of each split")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how to run."""
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    group.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="threads; 0 (default) takes all cores"
    )
    group.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        metavar="DIR",
        help="proposals and features are kept here",
    )


def add_experiment_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a whole experiment."""
    add_data_options(parser)
    group = parser.add_argument_group("features")
    group.add_argument("--backbone", metavar="NAME", help="the network (see `rcnn-svm layers`)")
    group.add_argument("--weights", metavar="FILE", help="default, offline, random, or a file")
    group.add_argument(
        "--taps", metavar="TAPS", help="layers to read, such as fc7 or block13@3x3,block17@1x1"
    )
    group.add_argument(
        "--path", choices=("shared", "warped"), help="convolutions once per image, or per region"
    )
    group.add_argument(
        "--learn", choices=("nothing", "fc", "trunk", "network"), help="what is trained before the heads"
    )
    group = parser.add_argument_group("configuration")
    group.add_argument("--config", type=Path, metavar="FILE", help="a TOML file over the defaults")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one key, such as heads.loss=squared_hinge",
    )
    group.add_argument(
        "--no-choice",
        action="store_true",
        help="train once, with settings that do well in general, instead of choosing them on val",
    )
    group.add_argument("--paper", action="store_true", help="every constant as in the paper")
    group.add_argument("--quick", action="store_true", help="a first look: few images, regions and settings")
    add_run_options(parser)


def data_config(options: argparse.Namespace, path: str) -> DataConfig:
    """Return the data configuration that the options name."""
    names = tuple(name.strip() for name in options.classes.split(",") if name.strip())
    if options.max_images is not None and options.max_images < 1:
        raise ConfigError(f"--max-images must be at least 1, got {options.max_images}.")
    return DataConfig(
        path=path,
        format=options.format,
        classes=names,
        drop_bad_boxes=options.drop_bad_boxes,
        skip_bad=options.skip_bad,
        skip_absent_classes=options.skip_absent_classes,
        max_images=options.max_images,
    )


def experiment_config(options: argparse.Namespace, base: ExperimentConfig) -> ExperimentConfig:
    """Put the options over `base`: presets first, then the file, then `--set`, then single options."""
    config = base
    if options.paper:
        config = paper_config(config)
    if options.quick:
        config = quick_config(config)
    config = with_overrides(config, options.config, options.set)
    features = {
        key: getattr(options, key)
        for key in ("backbone", "weights", "taps", "path")
        if getattr(options, key) is not None
    }
    config = replace(config, seed=options.seed, features=replace(config.features, **features))
    config = replace(config, choose=config.choose and not options.no_choice)
    return replace(config, learn=options.learn) if options.learn else config


def n_jobs_of(options: argparse.Namespace) -> int:
    """Return the number of threads; 0 means every core that this process may use."""
    if options.jobs < 0:
        raise ConfigError(f"--jobs must be 0 or more, got {options.jobs}.")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return int(options.jobs or cores)


def say_config(config: ExperimentConfig) -> None:
    """Print the resolved configuration, one line a stage."""
    for stage, value in to_dict(config, finite=True).items():
        if isinstance(value, dict):
            say(f"{stage:>10}: " + "  ".join(f"{key}={_short(item)}" for key, item in value.items()))
        else:
            say(f"{stage:>10}: {value}")


def _short(value: object) -> str:
    if isinstance(value, list):
        return ",".join(str(item) for item in value) or "-"
    return str(value)
