"""What the presets reach and what they cost, by the plain command; writes results/benchmarks/presets.json.

    python benchmarks/accuracy.py DATA [--only SECTION ...] [--sets NAME ...] [--checkout DIR]

DATA is the folder of `voc2007-mini`, `fruit`, `bccd`, `raccoon` and `tiny-coco`. Every figure is that of a
`rcnn-svm train` in a process of its own, nothing cached, all cores, from start to a saved and evaluated
detector; sections that are run replace their rows, others stay.

default  `rcnn-svm train DATA`.
quick    `rcnn-svm train DATA --preset quick`.
best     `rcnn-svm train DATA --preset best`.
trunk    the same with `--learn trunk` (the views that it cannot take left out).
choice   the default preset with `--choice`: what trying grids on val buys; boxes are not refined there.
former   what the default was before 2026-11-26: MobileNetV2, linear SVM, 1500 steps, 2000 regions, everything
         chosen on val; on today's code.
checkout `train DATA` of an older checkout of this repository, which `--checkout` names: that of 1aee549.

All settings were chosen on folds of train and val. On another machine scale what is matrix products by the
GFLOP/s that `rcnn-svm bench` prints, stated for this one. A row whose `alone` is false was measured with
`--busy`, beside other work: its mAP counts, its seconds are a few percent too many.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rcnn_svm.detector import load_detector
from rcnn_svm.experiment.config import DataConfig
from rcnn_svm.experiment.data import load_data
from rcnn_svm.experiment.speed import measure_product
from rcnn_svm.files import read_json, write_json
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance

SETS = ("voc2007-mini", "fruit", "bccd", "raccoon", "tiny-coco")
DATA_OPTIONS = {
    "bccd": ["--drop-bad-boxes"],  # two boxes without area
    "tiny-coco": ["--drop-bad-boxes", "--skip-absent-classes"],  # 80 classes in 50 images
}
FORMER = [
    *("--backbone", "mobilenet_v2", "--head", "linear-svm", "--choice"),
    *("--set", "proposals.max_regions=2000", "--set", "fc.n_steps=1500"),
    *("--set", "heads.box_steps=[1.0]", "--set", "detect.box_step=1.0"),
]
TRUNK = ["--preset", "best", "--learn", "trunk", "--set", "fc.mirror=false", "--set", "fc.other_sides=[]"]
SECTIONS: dict[str, tuple[list[str], tuple[str, ...], tuple[int, ...]]] = {
    "default": ([], SETS, (0,)),
    "quick": (["--preset", "quick"], SETS, (0,)),
    "best": (["--preset", "best"], SETS, (0,)),
    "trunk": (TRUNK, ("voc2007-mini",), (0,)),
    "choice": (["--choice"], ("fruit", "voc2007-mini"), (0,)),
    "former": (FORMER, ("fruit", "voc2007-mini"), (0,)),
    "checkout": ([], ("fruit", "voc2007-mini"), (0,)),
}
"""Options, data sets and seeds of each section."""
N_TIMED = 40

Row = dict[str, Any]
Targets = dict[str, dict[str, Any]]


def train(data: Path, options: list[str], seed: int, checkout: Path | None = None) -> Row:
    """Run the command, of another checkout if one is named; return what it reached and cost."""
    with tempfile.TemporaryDirectory() as folder:
        out, cache = Path(folder) / "detector", Path(folder) / "cache"
        words = ["train", str(data), *options, *DATA_OPTIONS.get(data.name, [])]
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "rcnn_svm", *words, "--out", out, "--cache", cache, "--seed", str(seed)],
            check=True,
            stdout=subprocess.DEVNULL,
            env={k: v for k, v in os.environ.items() if not k.endswith("NUM_THREADS")}
            | ({} if checkout is None else {"PYTHONPATH": str(checkout)}),
            cwd=checkout,
        )
        wall = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        metrics = json.loads((out / "evaluation" / "metrics.json").read_text())
        if checkout is not None:  # its detectors have a format of their own
            head = metrics["heads"]["linear-svm+bbox"]
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            return {
                "head": "linear-svm+bbox",
                "seed": seed,
                "mAP": head["mAP"],
                "cpu_s": spent,
                "wall_s": wall,
            }
        detector = load_detector(out)
        head = metrics["heads"][detector.head]
        sure = head["details"].get("at_threshold", {})
        return {
            "head": detector.head,
            "seed": seed,
            "mAP": head["mAP"],
            "mAP_interval": head["mAP_interval"],
            **{f"coco_{name}": value for name, value in head["coco"].items()},
            "mAP_other_variant": next(h["mAP"] for n, h in metrics["heads"].items() if n != detector.head),
            "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "wall_s": wall,
            "stages_s": metrics["stages_s"],
            "peak_rss_mb": head["peak_rss_mb"],
            "cache_mb": sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()) / 1e6,
            "n_images": metrics["n_train_images"] + metrics["n_test_images"],
            "boxes_per_image": sure.get("boxes_per_image"),
            "objects_per_image": sure.get("objects_per_image"),
            "precision": sure.get("precision"),
            "recall": sure.get("recall"),
            "detect_s_per_image": detect_seconds(data, detector),
        }


def detect_seconds(data: Path, detector: Any) -> float:
    """Return the wall clock of an image, from file to detections, proposals included, all cores."""
    names = {"drop_bad_boxes": True, "skip_absent_classes": True}
    samples = load_data(DataConfig(str(data), **names), seed=0).test.samples[: N_TIMED + 3]
    for sample in samples[:3]:  # warm up
        detector.detect(sample.read(), sample.image_id)
    started = time.perf_counter()
    for sample in samples[3:]:
        detector.detect(sample.read(), sample.image_id)
    return (time.perf_counter() - started) / (len(samples) - 3)


def targets_of(rows: list[Row]) -> Targets:
    """Return the headline figures that these rows give."""

    def of(section: str, data: str, key: str) -> list[float]:
        return [row[key] for row in rows if (row["section"], row["data"]) == (section, data)]

    found: Targets = {}

    def target(name: str, unit: str, ours: list[float], peer: list[float], peer_name: str, how: str) -> None:
        if ours and (peer or not peer_name):
            mine = statistics.mean(ours)
            other = statistics.mean(peer) if peer else None
            value = mine if other is None else other / mine if unit == "x" else mine - other
            found[name] = {
                "value": round(value, 4), "unit": unit, "n": len(ours), "ours": mine, "peer": other,
                "peer_name": peer_name, "how": how,
            }  # fmt: skip

    plain, former = "`rcnn-svm train DATA`, nothing cached", "the former default's recipe on today's code"
    older = "the same command at commit 1aee549"
    unchosen = "the default, which chooses nothing"
    for data in ("fruit", "voc2007-mini"):
        name = data.replace("-", "_")
        new, chosen = ("default", data), ("choice", data)
        for section, key, peer in (("checkout", "default", older), ("former", "recipe", former)):
            before = (section, data)
            speed, gain = f"default_speedup_over_old_{key}_{name}", f"default_map_minus_old_{key}_{name}"
            target(speed, "x", of(*new, "cpu_s"), of(*before, "cpu_s"), peer, f"CPU seconds of {plain}")
            target(gain, "mAP", of(*new, "mAP"), of(*before, "mAP"), peer, "mAP on test of the same runs")
        target(f"default_{name}_map", "mAP", of(*new, "mAP"), [], "", f"{plain}: mAP on test")
        how = f"{plain}: wall clock on all cores, from start to a saved, evaluated detector"
        target(f"default_{name}_wall_s", "s", of(*new, "wall_s"), [], "", how)
        how = f"{plain}: CPU seconds of all threads, the test split included"
        target(f"default_{name}_cpu_s", "s", of(*new, "cpu_s"), [], "", how)
        how = "with settings chosen on val and boxes not refined, less without the choice and refined"
        bought, paid = f"choice_map_gain_{name}", f"choice_cpu_s_{name}"
        target(bought, "mAP", of(*chosen, "mAP"), of(*new, "mAP"), unchosen, f"mAP on test {how}")
        target(paid, "s", of(*chosen, "cpu_s"), of(*new, "cpu_s"), unchosen, f"CPU seconds {how}")
    how = "`rcnn-svm train DATA --preset best`: mAP on test"
    target("best_voc2007_mini_map", "mAP", of("best", "voc2007-mini", "mAP"), [], "", how)
    how = f"`rcnn-svm train DATA {' '.join(TRUNK)}`: mAP on test"
    target("best_trunk_voc2007_mini_map", "mAP", of("trunk", "voc2007-mini", "mAP"), [], "", how)
    for data in SETS:
        name = f"detect_boxes_per_image_default_{data.replace('-', '_')}"
        shown, true = of("default", data, "boxes_per_image"), of("default", data, "objects_per_image")
        target(name, "boxes", shown, true, "objects an image", "boxes that `detect` shows, less the objects")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=["default", "quick", "former"])
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, default=SETS, metavar="NAME", help="some data sets"
    )
    parser.add_argument(
        "--busy", action="store_true", help="say in each row that other work ran on the machine meanwhile"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of 0")
    parser.add_argument("--checkout", type=Path, help="of the section of this name")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/presets.json"))
    options = parser.parse_args()
    if "checkout" in options.only and options.checkout is None:
        parser.error("the section checkout wants --checkout DIR")
    gflops = {f"{n}_threads": measure_product(n, 3.0).median for n in (1, 2)}
    about = provenance(seed=0)
    old = read_json(options.out)["rows"] if options.out.exists() else []
    for section in options.only:
        words, sets, seeds = SECTIONS[section]
        for name in [name for name in sets if name in options.sets]:
            for seed in options.seeds or seeds:
                row = {"name": f"{name}, {section}, seed {seed}", "section": section, "data": name}
                checkout = options.checkout.resolve() if section == "checkout" else None
                row |= train(options.data.resolve() / name, words, seed, checkout)
                row["alone"] = not options.busy
                row |= {"gflops": gflops, "commit": about["commit"], "command": about["command"]}
                say(str({k: row[k] for k in ("name", "head", "mAP", "cpu_s", "wall_s")}))
                old = [*(one for one in old if one["name"] != row["name"]), row]
                result = {"schema": 1, "benchmark": "presets", "targets": targets_of(old), "rows": old}
                write_json(options.out, {**result, "provenance": about})  # a run that is cut keeps its rows
    say(f"{options.out} written")


if __name__ == "__main__":
    main()
