"""What checking the cache adds to reading features; writes results/benchmarks/seal.json.

    python benchmarks/seal.py [--images N] [--rounds N]

Features of N made-up images are stored, then read as a training reads them: each image six times, every
row brought to single precision. A process checks a file's seal once; the figure is what the checks
add to the CPU time of the reading.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rcnn_svm import files
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


def measure(n: int) -> dict[str, float]:
    """Return CPU seconds of reading with checks and without."""
    seconds, check = {}, module.is_sealed
    with tempfile.TemporaryDirectory() as folder:
        boxes = np.tile(np.array([[0, 0, 4, 4]], np.float32), (N_REGIONS, 1))
        stored, samples = FeatureStore(Path(folder), MadeUp()), samples_of(n)
        stored.fill(samples, [boxes] * n)
        for name, checked in (("warm_up", True), ("without_s", False), ("with_s", True)):
            files._checked.clear()  # as a later run finds them
            module.is_sealed = check if checked else lambda path, name: True
            started = time.process_time()
            for _ in range(PASSES):
                for sample in samples:
                    to_float32(stored.get(sample, boxes))
            seconds[name] = time.process_time() - started
        module.is_sealed = check
    return {name: seconds[name] for name in ("without_s", "with_s")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/seal.json"))
    options = parser.parse_args()
    rows = [{"name": f"round {i}", **measure(options.images)} for i in range(options.rounds)]
    with_checks, without = (statistics.median(row[key] for row in rows) for key in ("with_s", "without_s"))
    target = {
        "value": round(with_checks / without - 1, 4), "unit": "fraction", "n": len(rows),
        "ours": with_checks, "peer": without, "peer_name": "reading without checks, CPU seconds",
        "how": f"CPU seconds of reading {options.images} images of {N_REGIONS} x {N_FEATURES} features, "
        f"{PASSES} times each, as single precision, with the seals checked, over those without, less 1.",
    }  # fmt: skip
    result = {"schema": 1, "benchmark": "seal", "targets": {"seal_cost_of_reading": target}, "rows": rows}
    write_json(options.out, {**result, "provenance": provenance(seed=0)})
    say(f"{options.out}: {target['value']}")


if __name__ == "__main__":
    main()
