"""Options that several verbs share, and the configuration they add up to.

An option that is absent is None and leaves what is configured; one that is given has the last word.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rcnn_svm.cache import LIMIT_VARIABLE, default_cache, parse_size, size_limit
from rcnn_svm.config import with_overrides
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig, paper_config, quick_config

__all__ = [
    "add_data_options",
    "add_experiment_options",
    "add_label_options",
    "add_run_options",
    "cache_limit_of",
    "data_config",
    "experiment_config",
    "given",
    "n_jobs_of",
    "names_of",
]


def add_label_options(parser: argparse.ArgumentParser, classes: str) -> argparse._ArgumentGroup:
    """Add the options that say how labels are read; `classes` says what `--classes` is for."""
    group = parser.add_argument_group("data")
    group.add_argument("--format", choices=("auto", "voc", "coco", "yolo"), help="default: auto")
    group.add_argument("--classes", metavar="A,B,C", help=classes)
    group.add_argument(
        "--drop-bad-boxes",
        action="store_true",
        default=None,
        help="leave broken boxes out instead of stopping",
    )
    return group


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which labelled images are learned from."""
    group = add_label_options(parser, "learn these classes, in this order")
    group.add_argument(
        "--skip-absent-classes",
        action="store_true",
        default=None,
        help="leave out classes without a training object",
    )
    group.add_argument("--max-images", type=int, metavar="N", help="at most N images of each split")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how to run; what lies in the cache is not computed again."""
    parser.set_defaults(resumes=True)
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, help="of everything random (default: as configured, 0)")
    group.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="threads; 0 (default) takes all cores"
    )
    group.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        metavar="DIR",
        help="proposals and features are kept here (see `rcnn-svm cache`)",
    )
    group.add_argument(
        "--cache-limit",
        metavar="SIZE",
        help=f"what may stay there, such as 2GB (default: as {LIMIT_VARIABLE} says, else a tenth of the disk "
        f"space that is free but for the cache)",
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


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return those of the named options that the command line has, by name."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def data_config(options: argparse.Namespace, path: str, base: DataConfig | None = None) -> DataConfig:
    """Put the options of `add_data_options` over `base`, and the data set's path."""
    if options.max_images is not None and options.max_images < 1:
        raise ConfigError(f"--max-images must be at least 1, got {options.max_images}.")
    values = given(options, *(f.name for f in fields(DataConfig) if f.name not in ("path", "classes")))
    if options.classes is not None:
        values["classes"] = names_of(options)
    return replace(base or DataConfig(), path=path, **values)


def names_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the class names of `--classes`; none where it was not given."""
    return tuple(name.strip() for name in (options.classes or "").split(",") if name.strip())


def experiment_config(options: argparse.Namespace, base: ExperimentConfig) -> ExperimentConfig:
    """Put the options over `base`: presets first, then the file, then `--set`, then single options."""
    config = base
    if options.paper:
        config = paper_config(config)
    if options.quick:
        config = quick_config(config)
    config = with_overrides(config, options.config, options.set)
    features = replace(config.features, **given(options, "backbone", "weights", "taps", "path"))
    choose = config.choose and not options.no_choice
    return replace(config, features=features, choose=choose, **given(options, "learn", "seed"))


def n_jobs_of(options: argparse.Namespace) -> int:
    """Return the number of threads; 0 means every core that this process may use."""
    if options.jobs < 0:
        raise ConfigError(f"--jobs must be 0 or more, got {options.jobs}.")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return int(options.jobs or cores)


def cache_limit_of(options: argparse.Namespace) -> int:
    """Return the bytes that the cache may take."""
    given: str | None = options.cache_limit
    return size_limit(options.cache) if given is None else parse_size(given, "--cache-limit")
