"""What the shared path reaches, and what it costs; adds its targets to results/benchmarks/features.json.

    python benchmarks/accuracy.py DATA [--only SECTION ...] [--jobs N] [--cache DIR]

DATA is the folder that holds `voc2007-mini` and `fruit`. Sections:

voc      fc layers on frozen features, trained on trainval of voc2007-mini, three seeds: mAP on test, CPU
         seconds of training with proposals and features included and nothing cached, CPU seconds an image.
detect   CPU seconds an image of that detector alone, one seed.
trunk    the same with the network's last blocks tuned.
fruit    `rcnn-svm train` on fruit, nothing cached: wall clock on all cores, mAP; seconds an image at test.
sharing  a linear SVM with box regression on shared and on warped features of the same few regions an image.

All settings were chosen on trainval. CPU seconds are of the whole process on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits

from rcnn_svm.datasets import Splits
from rcnn_svm.detector import Detector, load_detector
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig
from rcnn_svm.experiment.data import load_data
from rcnn_svm.experiment.recipe import HeadResult, run_experiment
from rcnn_svm.files import read_json, write_json
from rcnn_svm.opencv import cv2
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance
from rcnn_svm.structures import Dataset

SECTIONS = ("voc", "detect", "trunk", "fruit", "sharing")
SEEDS = (0, 1, 2)
N_TIMED = 40
FRUIT = (
    "--learn",
    "fc",
    "--head",
    "linear-svm",
    "--no-choice",
    "--set",
    "fc.n_steps=300",
    "--set",
    "proposals.max_regions=1000",
)
SHARING_REGIONS, CROP_SIZE = 300, 128
SHARED_TAPS = (
    "block13@3x3",
    "block13@3x3,block17@1x1,block17@1x1*1.8",
    "block13@3x3,block17@1x1,block17@1x1*1.8,block17@1x1*image",
)
WARPED_TAPS = ("block13@3x3,block17@1x1,penultimate",)

Targets = dict[str, dict[str, Any]]


def target(name: str, value: float, unit: str, n: int, ours: float, peer: float | None, how: str) -> Targets:
    """Return one headline figure by its name."""
    say(f"  {name} = {value:.3f} {unit}")
    return {
        name: {
            "value": round(value, 4),
            "unit": unit,
            "n": n,
            "ours": ours,
            "peer": peer,
            "peer_name": "" if peer is None else "the warped path, same regions and head",
            "how": how,
        }
    }


def voc_config(data: Path, seed: int) -> ExperimentConfig:
    """Return the recipe for voc2007-mini: frozen features of several views, fc layers of our own."""
    base = ExperimentConfig(data=DataConfig(str(data)), choose=False, seed=seed)
    return replace(
        base,
        test_regions=1000,
        features=replace(base.features, longer_sides=(640,), mirror=True),
        fc=replace(base.fc, n_steps=1300, mirror=True, other_sides=(800,)),
        heads=replace(base.heads, names=("softmax-finetuned",)),
        # Log-odds below -6, a quarter of a percent, moved nothing on folds of trainval but seconds.
        detect=replace(base.detect, soft_nms_sigma=0.2, vote_iou=0.55, min_score=-6.0, second_look=100),
    )


def trunk_config(data: Path, seed: int) -> ExperimentConfig:
    """Return the same with the network's last blocks tuned as well, from features of one view."""
    base = voc_config(data, seed)
    return replace(
        base,
        learn="trunk",
        fc=replace(base.fc, n_steps=900, mirror=False, other_sides=()),
        trunk=replace(base.trunk, n_steps=500),
    )


def detect_seconds(detector: Detector, dataset: Dataset) -> float:
    """Return CPU seconds an image, from file to detections, proposals included, on one thread."""
    samples = dataset.samples[: N_TIMED + 5]
    for sample in samples[:5]:  # warm up
        detector.detect(sample.read(), sample.image_id)
    started = time.process_time()
    for sample in samples[5:]:
        detector.detect(sample.read(), sample.image_id)
    return (time.process_time() - started) / (len(samples) - 5)


def single_threaded() -> None:
    """Keep OpenCV and torch to one thread."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def short_test(splits: Splits) -> Splits:
    """Return the splits with a single test image, so that a run is little but training."""
    return replace(splits, test=replace(splits.test, samples=splits.test.samples[:1]))


def one_seed(data: Path, seed: int, what: str, tuned: bool) -> dict[str, Any]:
    """Train from nothing cached, on one thread; then measure on test. Returns the row of results."""
    single_threaded()
    config = (trunk_config if tuned else voc_config)(data, seed)
    splits = load_data(config.data, seed=0)
    with tempfile.TemporaryDirectory() as cache, threadpool_limits(limits=1):
        started = time.process_time()
        run_experiment(config, short_test(splits), Path(cache), n_jobs=1)
        train_s = time.process_time() - started
        # Its features, or the tuned network, lie in the cache.
        results = run_experiment(config, splits, Path(cache), n_jobs=1).heads
        result = results["softmax-finetuned+bbox"]
        row = {
            "name": f"voc2007-mini, {what}, seed {seed}",
            "mAP": 100 * result.evaluation.map("voc07"),
            "mAP_all_points": 100 * result.evaluation.map("voc10"),
            "mAP_without_boxes": 100 * results["softmax-finetuned"].evaluation.map("voc07"),
            "train_cpu_s": train_s,
            "detect_cpu_s_per_image": detect_seconds(result.detector, splits.test),
        }
    say(str(row))
    return row


def bench_voc(data: Path, rows: list[dict[str, Any]], tuned: bool, jobs: int) -> Targets:
    """Train with three seeds and measure each on test."""
    what = "blocks 11 to 17 and fc layers tuned" if tuned else "frozen features, fc layers"
    found = Parallel(n_jobs=jobs)(delayed(one_seed)(data, seed, what, tuned) for seed in SEEDS)
    rows.extend(found)
    maps = [row["mAP"] for row in found]
    seconds = [row["train_cpu_s"] for row in found]
    per_image = [row["detect_cpu_s_per_image"] for row in found]
    n, suffix = len(SEEDS), "_trunk" if tuned else ""
    view = "640" if tuned else "640 and 800"
    at_test = "softmax, box regression, mirror images, soft-NMS, voting, a second look"
    recipe = f"{what} on trainval at {view} pixels, {at_test}"
    return {
        **target(
            f"voc2007_mini_test_map{suffix}", statistics.mean(maps), "mAP", n, statistics.mean(maps), None,
            f"VOC 11-point mAP on test, mean of {n} seeds ({', '.join(f'{m:.1f}' for m in maps)}); {recipe}",
        ),
        **target(
            f"voc2007_mini_train_cpu_s{suffix}", statistics.median(seconds), "s", n,
            statistics.median(seconds), None,
            "a training run with nothing cached, one thread: data, proposals, features, training",
        ),
        **detect_target(suffix, per_image),
    }  # fmt: skip


def detect_target(suffix: str, per_image: list[float]) -> Targets:
    """Return what the detectors take for an image."""
    median = statistics.median(per_image)
    return target(
        f"detect_s_per_image_voc2007_mini{suffix}", median, "s", len(per_image), median, None,
        f"one thread, from file to detections, proposals included, mean of {N_TIMED} test images",
    )  # fmt: skip


def bench_detect(data: Path) -> Targets:
    """Train once, and time the detector."""
    config = voc_config(data, SEEDS[0])
    splits = load_data(config.data, seed=0)
    with tempfile.TemporaryDirectory() as cache:
        trained = run_experiment(config, short_test(splits), Path(cache), n_jobs=1)
        detector = trained.heads["softmax-finetuned+bbox"].detector
        return detect_target("", [detect_seconds(detector, splits.test) for _ in range(3)])


def bench_fruit(data: Path, rows: list[dict[str, Any]]) -> Targets:
    """Run the command as a user would, with an empty cache, three times."""
    walls, values, per_image = [], [], []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "detector"
            command = [sys.executable, "-m", "rcnn_svm", "train", str(data), "--out", str(out), *FRUIT]
            started = time.perf_counter()
            subprocess.run(
                [*command, "--seed", str(seed), "--cache", str(Path(folder) / "cache")],
                check=True,
                stdout=subprocess.DEVNULL,
                env={k: v for k, v in os.environ.items() if not k.endswith("NUM_THREADS")},
            )
            walls.append(time.perf_counter() - started)
            metrics = json.loads((out / "evaluation" / "metrics.json").read_text())
            values.append(metrics["heads"]["linear-svm+bbox"]["mAP"])
            splits = load_data(DataConfig(str(data)), seed=0)
            per_image.append(detect_seconds(load_detector(out), splits.test))
        rows.append(
            {
                "name": f"fruit, rcnn-svm train, seed {seed}",
                "mAP": values[-1],
                "wall_s": walls[-1],
                "detect_cpu_s_per_image": per_image[-1],
            }
        )
        say(str(rows[-1]))
    n = len(SEEDS)
    return {
        **target(
            "fruit_train_wall_s", statistics.median(walls), "s", n, statistics.median(walls), None,
            f"`rcnn-svm train DATA {' '.join(FRUIT)}`, nothing cached, all cores, from start to a saved and "
            f"evaluated detector; mAP on test {', '.join(f'{v:.1f}' for v in values)}",
        ),
        **target(
            "detect_s_per_image", statistics.median(per_image), "s", n, statistics.median(per_image),
            None,
            f"fruit, one thread, from file to detections, proposals included, mean of {N_TIMED} test images",
        ),
    }  # fmt: skip


def bench_sharing(data: Path, cache: Path, rows: list[dict[str, Any]]) -> Targets:
    """The best taps of each path, by mAP on val, beside each other on test."""

    def best(path: str, choices: tuple[str, ...]) -> tuple[str, HeadResult]:
        results = []
        for taps in choices:
            base = ExperimentConfig(data=DataConfig(str(data)), learn="nothing")
            config = replace(
                base,
                proposals=replace(base.proposals, max_regions=SHARING_REGIONS),
                features=replace(
                    base.features,
                    path=path,  # type: ignore[arg-type]
                    taps=taps,
                    crop_size=CROP_SIZE if path == "warped" else None,
                ),
                heads=replace(base.heads, names=("linear-svm",)),
            )
            started = time.process_time()
            done = run_experiment(config, load_data(config.data, seed=0), cache, n_jobs=1)
            result = done.heads["linear-svm+bbox"]
            rows.append(
                {
                    "name": f"{data.name}, {path}, {taps}",
                    "mAP_val": result.details["val_map"],
                    "mAP": 100 * result.evaluation.map("voc07"),
                    "features_s": done.stages_s["features"],
                    "cpu_s": time.process_time() - started,
                }
            )
            say(str(rows[-1]))
            results.append((taps, result))
        return max(results, key=lambda pair: float(pair[1].details["val_map"]))

    taps, shared = best("shared", SHARED_TAPS)
    warped_taps, warped = best("warped", WARPED_TAPS)
    values = [100 * result.evaluation.map("voc07") for result in (shared, warped)]
    name = data.name.replace("-", "_")
    return target(
        f"shared_minus_warped_map_{name}", values[0] - values[1], "mAP", 1, values[0], values[1],
        f"linear SVM with box regression on ImageNet features of {SHARING_REGIONS} regions an image, test; "
        f"shared {taps} (best on val) against warped {warped_taps} at {CROP_SIZE} pixels",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of voc2007-mini and fruit")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="some sections")
    parser.add_argument("--sharing-data", nargs="+", default=["fruit", "voc2007-mini"], metavar="NAME")
    parser.add_argument("--cache", type=Path, help="proposals and features of the section on sharing")
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds at a time; more than 1 disturbs the timings"
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/features.json"))
    options = parser.parse_args()
    single_threaded()
    rows: list[dict[str, Any]] = []
    targets: Targets = {}
    with tempfile.TemporaryDirectory() as scratch, threadpool_limits(limits=1):
        if "voc" in options.only:
            targets |= bench_voc(options.data / "voc2007-mini", rows, tuned=False, jobs=options.jobs)
        if "detect" in options.only:
            targets |= bench_detect(options.data / "voc2007-mini")
        if "trunk" in options.only:
            targets |= bench_voc(options.data / "voc2007-mini", rows, tuned=True, jobs=options.jobs)
        if "fruit" in options.only:
            targets |= bench_fruit(options.data / "fruit", rows)
        if "sharing" in options.only:
            for name in options.sharing_data:
                targets |= bench_sharing(options.data / name, options.cache or Path(scratch), rows)
    about = provenance(seed=0)
    for figures in targets.values():
        figures["commit"] = about["commit"]
        figures["command"] = about["command"]
    old = read_json(options.out)
    kept = [row for row in old["rows"] if row["name"] not in {own["name"] for own in rows}]
    write_json(options.out, {**old, "targets": {**old["targets"], **targets}, "rows": kept + rows})
    say(f"{options.out} written")


if __name__ == "__main__":
    main()
