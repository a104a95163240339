"""What few labels reach: 1, 3 and 10 images a class; writes results/benchmarks/few.json.

    python benchmarks/few.py DATA [--data-set NAME] [--on val|test] [--recipes NAME ...]
                             [--heads NAME ...] [--sizes K ...] [--draws N] [--processes N]

DATA is the folder of the data sets. Images are drawn from trainval until every class is in K of them, N
times for each K, and the draw is all that a detector is trained on, as `rcnn-svm train` does with a folder
that holds no more; it is measured on the whole of test. With `--on val` draws are from train and measured
on val: recipes are chosen there. Several heads share a training of fc6; the features of the images that are
measured on are then computed once for all draws, and kept. Rows that are run replace those of the same data,
recipe, head, split and size, and each has its command and commit. A row is written anew after every draw:
what a stop leaves is a mean of fewer, and says so. Draws are trained in several processes of one thread each,
so that seconds are theirs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rcnn_svm.datasets.loading import divide
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig
from rcnn_svm.experiment.curve import draw_images
from rcnn_svm.experiment.data import load_data
from rcnn_svm.experiment.parts import Run
from rcnn_svm.experiment.recipe import run_experiment
from rcnn_svm.files import read_json, write_json
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance

HEADS = ("softmax-finetuned", "linear-svm", "rbf-svm")
Row = dict[str, Any]
Draw = dict[str, float]
WANTED = {1: 28.0, 3: 42.0, 10: 55.0}
"""AP at IoU 0.5, the mean of ten draws, that voc2007-mini is to reach, by images of a class."""


def unrefined(config: ExperimentConfig) -> ExperimentConfig:
    """Return the recipe without the second stage of boxes."""
    return replace(config, detect=replace(config.detect, refined=0))


def with_fc(**changes: Any) -> Callable[[ExperimentConfig], ExperimentConfig]:
    """Return what changes how fc6 is learned."""
    return lambda config: replace(config, fc=replace(config.fc, **changes))


def at_480_pixels(config: ExperimentConfig) -> ExperimentConfig:
    """Return the recipe with images at one size, whatever their objects'."""
    return replace(config, features=replace(config.features, longer_sides=(480,)))


RECIPES: dict[str, Callable[[ExperimentConfig], ExperimentConfig]] = {
    "default": lambda config: config,
    "without refinement": unrefined,
    "at one size": with_fc(other_sides=()),
    "in one group": with_fc(groups=1),
    "background below 0.3": with_fc(negative_iou=0.3),
    "background below 0.5": with_fc(negative_iou=0.5),
    "mirrored": with_fc(mirror=True),
    "rows as read": with_fc(scaling="none"),
    "at 480 pixels": at_480_pixels,
}


def train_on_draw(
    data: Path,
    recipe: str,
    heads: Sequence[str],
    size: int,
    d: int,
    on: Literal["val", "test"],
    cache: Path,
) -> tuple[int, dict[str, Draw]]:
    """Train on one draw of a size; return its number and what each head reached."""
    torch.set_num_threads(1)
    config = ExperimentConfig(n_bootstrap=100)
    splits = load_data(DataConfig(str(data), drop_bad_boxes=True), seed=0)
    pool, measured = (splits.train, splits.val) if on == "val" else (splits.trainval, splits.test)
    draw = draw_images(pool, size, np.random.default_rng([config.seed, size, d]))
    own = divide(replace(draw, split="trainval"), test=replace(measured, split="test"), seed=config.seed)
    started = time.perf_counter()
    parts = RECIPES[recipe](config).build(heads=list(heads))
    results = run_experiment(parts, own, Run(cache)).heads.values()
    taken = {str(result.about["base"]): result for result in results if result.preferred}
    return d, {
        head: {
            "mAP": 100 * result.evaluation.map("voc07"),
            "coco_AP": 100 * float(result.coco.summary()["AP"]) if result.coco is not None else np.nan,
            "n_images": len(draw),
            "wall_s": time.perf_counter() - started,
        }
        for head, result in taken.items()
    }


def measure(
    data: Path,
    recipe: str,
    heads: Sequence[str],
    size: int,
    draws: int,
    on: Literal["val", "test"],
    cache: Path,
    processes: int,
) -> Iterator[Row]:
    """Train on draws of a size; yield after each what every head has reached in those so far."""
    done: dict[int, dict[str, Draw]] = {}
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawned) as pool:
        tasks = [pool.submit(train_on_draw, data, recipe, heads, size, d, on, cache) for d in range(draws)]
        for task in as_completed(tasks):
            d, reached = task.result()
            done[d] = reached
            shown = ", ".join(f"{head} {own['mAP']:.1f}" for head, own in reached.items())
            say(f"{recipe}, {size} of a class, draw {d}: mAP of {shown}")
            for head in reached:
                yield _row(data.name, recipe, head, size, on, [done[d][head] for d in sorted(done)])


def _row(data: str, recipe: str, head: str, size: int, on: str, draws: list[Draw]) -> Row:
    found = [draw["mAP"] for draw in draws]
    error = float(np.std(found, ddof=1) / np.sqrt(len(draws))) if len(draws) > 1 else None
    return {
        "data": data,
        "recipe": recipe,
        "head": head,
        "images_of_a_class": size,
        "on": on,
        "n_draws": len(draws),
        "n_images": float(np.mean([draw["n_images"] for draw in draws])),
        "mAP": float(np.mean(found)),
        "mAP_standard_error": error,
        "mAP_of_draws": found,
        "coco_AP": float(np.mean([draw["coco_AP"] for draw in draws])),
        "wall_s": float(np.mean([draw["wall_s"] for draw in draws])),
    }


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--data-set", default="voc2007-mini")
    parser.add_argument("--on", choices=("val", "test"), default="test")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["default"])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS[:1])
    parser.add_argument("--sizes", nargs="+", type=int, default=list(WANTED))
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/few.json"))
    options = parser.parse_args()
    rows: list[Row] = read_json(options.out)["rows"] if options.out.exists() else []
    about = provenance(seed=0)
    same = ("data", "recipe", "head", "images_of_a_class", "on")
    with tempfile.TemporaryDirectory() as folder:
        for recipe in options.recipes:
            for size in options.sizes:
                data = options.data / options.data_set
                for row in measure(
                    data,
                    recipe,
                    options.heads,
                    size,
                    options.draws,
                    options.on,
                    Path(folder),
                    options.processes,
                ):
                    rows = [r for r in rows if any(r[key] != row[key] for key in same)]
                    rows.append({**row, "commit": about["commit"], "command": about["command"]})
                    write_json(
                        options.out,
                        {
                            "schema": 1,
                            "benchmark": "few",
                            "targets": targets_of(rows),
                            "rows": rows,
                            "provenance": about,
                        },
                    )


def targets_of(rows: list[Row]) -> dict[str, Row]:
    """Return the headline figures: of the recipe of `train`, on test of voc2007-mini."""
    return {
        f"voc2007_mini_{row['images_of_a_class']}_images_a_class": {
            "value": row["mAP"],
            "unit": "mAP",
            "n": row["n_draws"],
            "ours": row["mAP"],
            "peer": None,
            "peer_name": None,
            "how": "`rcnn-svm train` on so many images of each class, mean of draws; AP at IoU 0.5 "
            "(11 points) on the 400 images of test",
        }
        for row in rows
        if (row["data"], row["recipe"], row["head"], row["on"])
        == ("voc2007-mini", "default", HEADS[0], "test")
    }


if __name__ == "__main__":
    main()
