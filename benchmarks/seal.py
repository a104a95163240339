"""What checking the cache adds to reading features; writes results/benchmarks/seal.json.

    RCNN_SVM_DATA=<folder with fruit> python benchmarks/seal.py [--images N] [--rounds N]

Two readings, in CPU seconds with the checks and without:

- the bare one: features of N made-up images are stored, then each image is read six times, every row
  brought to single precision, and nothing is done with them. That is the least that reading can cost.
- a training's: `rcnn-svm train` on photographs of fruit with its features in the cache. It reads what it
  trains on twelve times, often only some rows of an image, what it chooses on six times and what it tests
  on once. Reading is all that goes to finding the files, bringing rows to memory and to single precision.

A process checks a file's seal once.
"""

from __future__ import annotations

import argparse
import collections
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rcnn_svm import files
from rcnn_svm.cli import main as rcnn_svm
from rcnn_svm.experiment import choosing, selection
from rcnn_svm.experiment.regions import StoredBlocks
from rcnn_svm.features import store as module
from rcnn_svm.features.store import FeatureStore, to_float32
from rcnn_svm.files import write_json
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance
from rcnn_svm.structures import GroundTruth, Sample

N_REGIONS, N_FEATURES, PASSES = 1000, 3456, 6


class MadeUp:
    """A featurizer of made-up rows: what is measured is the reading."""

    key, n_features = {"made": "up"}, N_FEATURES

    def __call__(self, image: Any, boxes: Any) -> Any:
        """Return (R, D) numbers."""
        return np.random.default_rng(len(boxes)).random((len(boxes), N_FEATURES), np.float32)

    def of_image(self, image: Any) -> Any:
        """Return the same for one image."""
        return lambda boxes: self(image, boxes)


def samples_of(n: int) -> list[Sample]:
    pixels = [np.full((8, 8, 3), i, np.uint8) for i in range(n)]
    return [
        Sample(f"image{i}", (8, 8), GroundTruth.empty(), render=lambda i=i: pixels[i])  # type: ignore[misc]
        for i in range(n)
    ]


def measure(n: int, rounds: int) -> list[dict[str, Any]]:
    """Return CPU seconds of reading with checks and without, in turns."""
    check = module.is_sealed
    with tempfile.TemporaryDirectory() as folder:
        boxes = np.tile(np.array([[0, 0, 4, 4]], np.float32), (N_REGIONS, 1))
        stored, samples = FeatureStore(Path(folder), MadeUp()), samples_of(n)
        stored.fill(samples, [boxes] * n)

        def read(checked: bool) -> float:
            files._checked.clear()  # as a later run finds them
            module.is_sealed = check if checked else lambda path, name: True
            started = time.process_time()
            for _ in range(PASSES):
                for sample in samples:
                    to_float32(stored.get(sample, boxes))
            return time.process_time() - started

        read(True)
        rows = [{"name": f"round {i}", "without_s": read(False), "with_s": read(True)} for i in range(rounds)]
        module.is_sealed = check
    return rows


class Spent:
    """CPU seconds and calls of functions that are replaced by themselves on a clock."""

    def __init__(self) -> None:
        self.seconds: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()

    def put(self, owner: Any, name: str, label: str) -> None:
        """Time the calls of `owner.name` under a label."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args)
            finally:
                self.seconds[label] += time.thread_time() - started
                self.calls[label] += 1

        setattr(owner, name, timed)


def train(data: Path) -> dict[str, Any]:
    """Train twice, so that the second finds its features in the cache; return what went to reading there."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", str(data / "fruit"), "--out", f"{folder}/detector"]
        rcnn_svm(command)
        files._checked.clear()
        spent = Spent()
        spent.put(module, "is_sealed", "checks")
        spent.put(FeatureStore, "_missing", "reading")
        spent.put(StoredBlocks, "features", "reading")
        for user in (choosing, selection):
            spent.put(user, "to_float32", "reading")
        started = time.process_time()
        rcnn_svm(command)
        all_s = time.process_time() - started
    with_s, check_s = spent.seconds["reading"], spent.seconds["checks"]
    return {
        "name": "training", "without_s": with_s - check_s, "with_s": with_s, "command_s": all_s,
        "n_reads": spent.calls["checks"], "n_files": len(files._checked),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/seal.json"))
    options = parser.parse_args()
    rows = measure(options.images, options.rounds)
    training = train(Path(os.environ["RCNN_SVM_DATA"]))
    checks = training["with_s"] - training["without_s"]
    targets = {
        "seal_cost_of_reading": target(
            *(min(row[key] for row in rows) for key in ("with_s", "without_s")),  # others only add
            n=len(rows),
            peer_name="reading without checks, CPU seconds",
            how=f"CPU seconds of reading {options.images} images of {N_REGIONS} x {N_FEATURES} features, "
            f"{PASSES} times each, as single precision, with the seals checked, over those without, "
            "less 1: the least of all rounds each. Nothing is done with the rows.",
        ),
        "seal_cost_of_a_trainings_reading": target(
            training["with_s"],
            training["without_s"],
            n=1,
            peer_name="the same less its checks, CPU seconds",
            how="CPU seconds of all reading of features in `rcnn-svm train` on fruit, features in the cache, "
            "over those without the checks of features, less 1.",
        ),
        "seal_cost_of_a_training": target(
            training["command_s"],
            training["command_s"] - checks,
            n=1,
            peer_name="the same less its checks, CPU seconds",
            how="CPU seconds of the whole command, over those without the checks of features, less 1.",
        ),
    }
    result = {"schema": 1, "benchmark": "seal", "targets": targets, "rows": [*rows, training]}
    write_json(options.out, {**result, "provenance": provenance(seed=0)})
    say(f"{options.out}: { {name: t['value'] for name, t in targets.items()} }")


def target(ours: float, peer: float, *, n: int, peer_name: str, how: str) -> dict[str, Any]:
    return {
        "value": round(ours / peer - 1, 4), "unit": "fraction", "n": n,
        "ours": ours, "peer": peer, "peer_name": peer_name, "how": how,
    }  # fmt: skip


if __name__ == "__main__":
    main()
