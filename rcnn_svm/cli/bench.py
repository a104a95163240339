"""The verb `bench`: how fast this machine is, and what a data set would take on it."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcnn_svm.cli import options as shared
from rcnn_svm.errors import ConfigError
from rcnn_svm.progress import say

if TYPE_CHECKING:
    from rcnn_svm.experiment.recipe import SplitEstimate
    from rcnn_svm.experiment.speed import MachineSpeed

__all__ = ["add_bench"]

_BACKBONES = "alexnet,mobilenet_v2,vgg16"
_REGIONS = 2000


def add_bench(bench: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    bench.add_argument(
        "--backbone", default=_BACKBONES, metavar="A,B", help=f"networks to time (default {_BACKBONES})"
    )
    bench.add_argument(
        "--regions", type=int, default=_REGIONS, metavar="N", help=f"of an image (default {_REGIONS})"
    )
    bench.add_argument(
        "--seconds", type=float, default=30, metavar="S", help="to spend measuring, about (default 30)"
    )
    bench.add_argument("--data", metavar="FOLDER", help="also say what this data set would take")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    shared.add_jobs_option(bench)
    bench.add_argument("--seed", type=int, default=0, help="of the split of the data set")
    shared.add_data_options(bench)
    bench.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> None:
    if options.regions < 1:
        raise ConfigError(f"--regions must be at least 1, got {options.regions}.")
    if not 0 < options.seconds < float("inf"):
        raise ConfigError(f"--seconds must be a finite number > 0, got {options.seconds}.")
    n_jobs = shared.n_jobs_of(options)
    backbones = [name.strip() for name in options.backbone.split(",")]
    from rcnn_svm.experiment.speed import measure_machine
    from rcnn_svm.report.provenance import provenance

    data = [] if options.data is None else _estimate(options)  # first: a wrong folder shows at once
    speed = measure_machine(backbones, n_regions=options.regions, n_jobs=n_jobs, seconds=options.seconds)
    about = provenance(seed=options.seed)
    print(_text(speed, options.regions, n_jobs, about["machine"]))
    for estimate in data:
        print(estimate)
    if options.json is not None:
        from rcnn_svm.files import write_json

        rows = [figure.row() for figure in speed.figures]
        result = {"schema": 1, "benchmark": "bench", "n_regions": options.regions, "rows": rows}
        write_json(options.json, result | {"data": [asdict(e) for e in data], "provenance": about})
        say(f"Figures: {options.json}")


def _estimate(options: argparse.Namespace) -> list[SplitEstimate]:
    """Estimate the default experiment on a data set of which nothing is cached; leaves nothing behind."""
    from rcnn_svm.experiment.config import ExperimentConfig
    from rcnn_svm.experiment.data import for_these_data, load_data
    from rcnn_svm.experiment.parts import Run
    from rcnn_svm.experiment.recipe import estimate_experiment

    config = ExperimentConfig(data=for_these_data(shared.data_config(options, options.data)))
    config = replace(config, features=replace(config.features, weights="random"))
    splits = load_data(config.data, seed=options.seed)
    with tempfile.TemporaryDirectory() as cache:
        return estimate_experiment(config.build(), splits, Run(Path(cache)))


def _text(speed: MachineSpeed, n_regions: int, n_jobs: int, machine: dict[str, Any]) -> str:
    from rcnn_svm.experiment.speed import IMAGE_SIZE
    from rcnn_svm.features.build import FeatureConfig

    defaults = FeatureConfig()
    image = f"{IMAGE_SIZE[1]} x {IMAGE_SIZE[0]} pixels, {n_regions} regions"
    threads = _threads(n_jobs)
    lines = [f"{machine['cpu']}, cores: {machine['cores']}, {machine['ram_gb']} GB"]
    products = ", ".join(f"{p.median:.0f} GFLOP/s on {_threads(p.threads)}" for p in speed.products)
    lines += [f"Matrix product, float32: {products}", ""]

    width = max(map(len, speed.layers))
    lines += [f"Images a second, {image}, {threads}:"]
    lines += [f"  {'network':<{width}}  {'to layer':<11}  {'warped':>8}  {'shared':>8}"]
    for name, layer in speed.layers.items():
        cells = [
            f"{speed.paths[name, path].median:>8.3g}" if (name, path) in speed.paths else f"{'-':>8}"
            for path in ("warped", "shared")
        ]
        lines.append(f"  {name:<{width}}  {layer:<11}  {'  '.join(cells)}")

    total = sum(stage.median for stage in speed.stages)
    what = f"default features ({defaults.backbone}, {defaults.path})"
    lines += ["", f"The time of an image with the {what}, {n_regions} regions, {threads}:"]
    for stage in speed.stages:
        alone = ", one thread" if stage.threads < n_jobs else ""
        lines.append(
            f"  {stage.name:<16}  {1e3 * stage.median:>7.1f} ms  {stage.median / total:>4.0%}{alone}"
        )
    lines.append(f"  {'in all':<16}  {1e3 * total:>7.1f} ms")
    return "\n".join(lines)


def _threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"
