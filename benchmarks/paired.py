"""This checkout against an older one, the same command in turns; writes results/benchmarks/paired.json.

    python benchmarks/paired.py DATA --checkout DIR [--rounds N]

DATA is a labelled data set; DIR is a checkout of an older commit. Each round runs `rcnn-svm train DATA`,
nothing cached, by the one and then by the other, in processes of their own on all cores. A change that is to
leave speed as it was keeps the ratio of CPU seconds within a twentieth of 1, and finds the same.
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

from rcnn_svm.files import write_json
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance

HERE = Path(__file__).parents[1]


def train(data: Path, checkout: Path) -> dict[str, Any]:
    """Run the command of a checkout; return what it reached and cost."""
    with tempfile.TemporaryDirectory() as folder:
        out, cache = Path(folder) / "detector", Path(folder) / "cache"
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "rcnn_svm", "train", data, "--out", out, "--cache", cache],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            cwd=checkout,
        )
        wall = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        heads = json.loads((out / "evaluation" / "metrics.json").read_text())["heads"]
        return {
            "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "wall_s": wall,
            "mAP": {name: head["mAP"] for name, head in heads.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/paired.json"))
    options = parser.parse_args()
    old = options.checkout.resolve()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=old, check=True, capture_output=True, text=True
    ).stdout.strip()
    about, rows = provenance(seed=0), []
    for round_ in range(options.rounds):
        for which, tree in (("new", HERE), ("old", old)):
            rows.append({"name": f"{options.data.name}, {which}, {round_}", "which": which})
            rows[-1] |= train(options.data.resolve(), tree)
            say(str(rows[-1]))
    seconds = {
        which: statistics.median(row["cpu_s"] for row in rows if row["which"] == which)
        for which in ("new", "old")
    }
    target = {
        "value": round(seconds["new"] / seconds["old"], 4), "unit": "x", "n": options.rounds,
        "ours": seconds["new"], "peer": seconds["old"], "peer_name": f"commit {commit[:12]}",
        "how": f"CPU seconds of `rcnn-svm train {options.data.name}`, nothing cached, medians of runs in "
        "turns; 1 is as fast as before",
    }  # fmt: skip
    result = {"schema": 1, "benchmark": "paired", "targets": {"train_cpu_ratio_to_before": target}}
    write_json(options.out, {**result, "rows": rows, "provenance": about})
    say(f"{options.out} written")


if __name__ == "__main__":
    main()
