"""Options that several verbs share, and the configuration they add up to.

An option that is absent is None and leaves what is configured; one that is given has the last word.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcnn_svm.cache import LIMIT_VARIABLE, default_cache, parse_size, size_limit
from rcnn_svm.config import choices, with_overrides
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.config import PRESETS, DataConfig, ExperimentConfig, paper_config
from rcnn_svm.features.build import FeatureConfig
from rcnn_svm.threads import usable_cores

if TYPE_CHECKING:
    from rcnn_svm.engine import Engine
    from rcnn_svm.experiment.parts import Run

__all__ = [
    "DATA_HELP",
    "add_cluster_option",
    "add_compute_options",
    "add_data_options",
    "add_experiment_options",
    "add_jobs_option",
    "add_label_options",
    "add_outside_option",
    "add_run_options",
    "cache_limit_of",
    "data_config",
    "device_of",
    "engine_of",
    "experiment_config",
    "given",
    "n_jobs_of",
    "names_of",
    "run_in_the_first",
    "run_of",
]


DATA_HELP = (
    "a VOC, COCO or YOLO data set, images in a folder per class or in a CSV, `digits` or `digits-images`"
)
"""What can be learned from, for every verb that learns."""


def add_label_options(parser: argparse.ArgumentParser, classes: str) -> argparse._ArgumentGroup:
    """Add the options that say how labels are read; `classes` says what `--classes` is for."""
    group = parser.add_argument_group("data")
    group.add_argument("--format", choices=choices(DataConfig, "format"), help="default: auto")
    group.add_argument("--classes", metavar="A,B,C", help=classes)
    group.add_argument(
        "--drop-bad-boxes",
        action="store_true",
        default=None,
        help="leave broken boxes out instead of stopping",
    )
    add_outside_option(group)
    return group


def add_outside_option(parser: argparse._ActionsContainer) -> None:
    """Add the option that lets a data set lead out of its folder."""
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        default=None,
        help="read what lies outside of the folder where lists, labels or links in it lead there",
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which labelled images are learned from."""
    group = add_label_options(parser, "learn these classes, in this order")
    group.add_argument(
        "--skip-bad",
        action="store_true",
        default=None,
        help="leave out images that are missing, damaged or have bad labels",
    )
    group.add_argument(
        "--skip-absent-classes",
        action="store_true",
        default=None,
        help="leave out classes without a training object",
    )
    group.add_argument("--max-images", type=int, metavar="N", help="at most N images of each split")
    group.add_argument(
        "--whole-images",
        action="store_true",
        default=None,
        help="classify images: boxes only say which classes an image has",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how to run; what lies in the cache is not computed again."""
    parser.set_defaults(resumes=True)
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, help="of everything random (default: as configured, 0)")
    add_compute_options(group)
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


def add_compute_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that say what computes: how many threads, and where torch runs."""
    add_jobs_option(parser)
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="where torch runs, such as cuda (default: cpu)"
    )


def add_cluster_option(parser: argparse.ArgumentParser, *, cache: bool = False) -> None:
    """Add the option that lets other machines do the work; with `cache` the folder that they share too."""
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--cluster",
        metavar="WHERE",
        help="share the images out among the workers of a Dask cluster: a scheduler's address or file, or "
        "local:N for N processes here (see docs/cluster.md)",
    )
    if cache:
        group.add_argument(
            "--cache",
            type=Path,
            default=default_cache(),
            metavar="DIR",
            help="with --cluster: a folder that all its machines see",
        )


def engine_of(options: argparse.Namespace) -> Engine:
    """Return what maps work over images: threads, or the cluster that is asked for, until the command ends.

    Raises:
        ConfigError: it is asked to work on another device.
        ClusterError: it is not there.
        DependencyError: Dask is not installed.
    """
    from rcnn_svm.engine import THREADS, connect

    where: str | None = given(options, "cluster").get("cluster")
    if where is None:
        return THREADS
    if options.device != "cpu":
        raise ConfigError(f"--cluster: its workers compute on CPUs, got --device {options.device}.")
    return options.closing.enter_context(connect(where, options.cache))  # type: ignore[no-any-return]


def device_of(options: argparse.Namespace) -> str:
    """Return where torch runs.

    Raises:
        ConfigError: no such device, or none here.
    """
    name: str = options.device
    if name == "cpu":
        return name  # known without loading torch
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(n_cuda))])
        raise ConfigError(f"--device must be a device of this machine ({here}), got {name!r}.") from error
    return name


def run_of(options: argparse.Namespace) -> Run:
    """Return how an experiment is run: cache, threads, device, cluster."""
    from rcnn_svm.experiment.parts import Run

    device, limit = device_of(options), cache_limit_of(options)
    return Run(options.cache, n_jobs_of(options), device, limit, engine_of(options), options.ranks)


def run_in_the_first(options: argparse.Namespace) -> None:
    """Run a verb in the first of the processes that torchrun started; the others train with it.

    Raises:
        ConfigError: a verb that trains nothing that several could.
        ClusterError: another process has ended before.
    """
    from rcnn_svm.training.parallel import Ranks, lead

    if not options.learns:
        raise ConfigError(
            f"torchrun starts processes that train layers and networks together, which {options.verb} does "
            f"not. Leave out torchrun."
        )

    def run(ranks: Ranks) -> None:
        options.ranks, options.device = ranks, ranks.device
        options.run(options)

    lead(run, device_of(options))


def add_jobs_option(parser: argparse._ActionsContainer) -> None:
    """Add the option that limits threads."""
    parser.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="threads; 0 (default) takes all cores that the process may use",
    )


def add_experiment_options(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """Add the options of a whole experiment.

    Args:
        parser: of the verb.
        without: those of `taps`, `path`, `learn`, `choice` that would change nothing of what the verb does.
    """
    parser.set_defaults(learns=True)
    add_data_options(parser)
    group = parser.add_argument_group("features")
    group.add_argument("--backbone", metavar="NAME", help="the network, also timm:NAME or torchvision:NAME")
    group.add_argument("--weights", metavar="FILE", help="default, offline, random, or a file")
    if "taps" not in without:
        group.add_argument(
            "--taps", metavar="TAPS", help="layers to read, such as fc7 or block13@3x3,block17@1x1"
        )
    if "path" not in without:
        group.add_argument(
            "--path",
            choices=choices(FeatureConfig, "path"),
            help="convolutions once per image, or per region",
        )
    group.add_argument(
        "--proposer",
        choices=choices(ExperimentConfig, "proposer"),
        help="what finds regions; rpn: the network, if it was trained to detect, or --set rpn.network=NAME",
    )
    if "learn" not in without:
        group.add_argument(
            "--learn", choices=choices(ExperimentConfig, "learn"), help="what is trained before the heads"
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
        "--preset", choices=tuple(PRESETS), help="a recipe (default: default; see `rcnn-svm presets`)"
    )
    group.add_argument(
        "--quick", dest="preset", action="store_const", const="quick", help="the same as --preset quick"
    )
    if "choice" not in without:
        group.add_argument(
            "--choice",
            action=argparse.BooleanOptionalAction,
            help="choose settings on val, or take those that do well in general (default: as configured)",
        )
    group.add_argument("--paper", action="store_true", help="every constant as in the paper")
    add_run_options(parser)


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return those of the named options that the verb has and the command line gives, by name."""
    values = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def data_config(options: argparse.Namespace, path: str, base: DataConfig | None = None) -> DataConfig:
    """Put the options of `add_data_options` over `base`, and the data set's path."""
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
    if given(options, "paper").get("paper"):
        config = paper_config(config)
    config = PRESETS[options.preset or "default"].apply(config)
    whole = given(options, "config", "set")
    config = with_overrides(config, whole.get("config"), whole.get("set", ()))
    features = replace(config.features, **given(options, "backbone", "weights", "taps", "path"))
    choose = given(options, "choice").get("choice", config.choose)
    return replace(config, features=features, choose=choose, **given(options, "proposer", "learn", "seed"))


def n_jobs_of(options: argparse.Namespace) -> int:
    """Return the number of threads; 0 means every core that this process may use."""
    if options.jobs < 0:
        raise ConfigError(f"--jobs must be 0 or more, got {options.jobs}.")
    return int(options.jobs or usable_cores())


def cache_limit_of(options: argparse.Namespace) -> int:
    """Return the bytes that the cache may take."""
    given: str | None = options.cache_limit
    return size_limit(options.cache) if given is None else parse_size(given, "--cache-limit")
