"""What sharing convolutions costs in accuracy; adds its targets to results/benchmarks/features.json.

    python benchmarks/sharing.py DATA [--cache DIR]

DATA is the folder that holds `voc2007-mini` and `fruit`. A linear SVM with box regression on shared and on
warped features of MobileNetV2, of the same few regions an image; all settings are chosen on val.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from rcnn_svm.experiment.config import DataConfig, ExperimentConfig
from rcnn_svm.experiment.data import load_data
from rcnn_svm.experiment.parts import Run
from rcnn_svm.experiment.recipe import HeadResult, run_experiment
from rcnn_svm.files import read_json, write_json
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance

SHARING_REGIONS, CROP_SIZE = 300, 128
SHARED_TAPS = (
    "block13@3x3",
    "block13@3x3,block17@1x1,block17@1x1*1.8",
    "block13@3x3,block17@1x1,block17@1x1*1.8,block17@1x1*image",
)
WARPED_TAPS = ("block13@3x3,block17@1x1,penultimate",)

Targets = dict[str, dict[str, Any]]


def bench_sharing(data: Path, cache: Path, rows: list[dict[str, Any]]) -> Targets:
    """The best taps of each path, by mAP on val, beside each other on test."""

    def best(path: str, choices: tuple[str, ...]) -> tuple[str, HeadResult]:
        results = []
        for taps in choices:
            base = ExperimentConfig(data=DataConfig(str(data)), learn="nothing", choose=True)
            config = replace(
                base,
                proposals=replace(base.proposals, max_regions=SHARING_REGIONS),
                features=replace(
                    base.features,
                    backbone="mobilenet_v2",
                    path=path,  # type: ignore[arg-type]
                    taps=taps,
                    crop_size=CROP_SIZE if path == "warped" else None,
                ),
                heads=replace(base.heads, names=("linear-svm",)),
            )
            started = time.process_time()
            done = run_experiment(config.build(), load_data(config.data, seed=0), Run(cache))
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
    figure = {
        "value": round(values[0] - values[1], 4),
        "unit": "mAP",
        "n": 1,
        "ours": values[0],
        "peer": values[1],
        "peer_name": "the warped path, same regions and head",
        "how": f"linear SVM, boxes regressed, on ImageNet features of {SHARING_REGIONS} regions an image; "
        f"shared {taps} (best on val) against warped {warped_taps} at {CROP_SIZE} pixels",
    }
    say(f"  shared_minus_warped_map_{name} = {figure['value']:.3f} mAP")
    return {f"shared_minus_warped_map_{name}": figure}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of voc2007-mini and fruit")
    parser.add_argument("--cache", type=Path, help="proposals and features are kept here")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/features.json"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    targets: Targets = {}
    with tempfile.TemporaryDirectory() as scratch, threadpool_limits(limits=1):
        for name in ("fruit", "voc2007-mini"):
            targets |= bench_sharing(options.data / name, options.cache or Path(scratch), rows)
    about = provenance(seed=0)
    for figures in targets.values():
        figures |= {"commit": about["commit"], "command": about["command"]}
    old = read_json(options.out)
    kept = [row for row in old["rows"] if row["name"] not in {own["name"] for own in rows}]
    write_json(options.out, {**old, "targets": {**old["targets"], **targets}, "rows": kept + rows})
    say(f"{options.out} written")


if __name__ == "__main__":
    main()
