"""Memory of a whole training against the number of images; writes results/benchmarks/memory.json.

    python benchmarks/memory.py [--images 2500,5000,10000,20000] [--figure docs/memory.svg]

Every size is trained in a fresh process on one thread, nothing cached: proposals, features, fc layers, linear
SVMs mined to the fixed point and box regression, chosen on val and measured on test. Images are small shapes,
drawn whenever they are read. Resident memory (RSS) also counts pages of files that the system can take back
at any time; anonymous memory is what the program really holds. The peak of the largest size becomes the
target `train_peak_rss_mb` of results/benchmarks/features.json.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from rcnn_svm.datasets import Splits
from rcnn_svm.experiment.config import ExperimentConfig, HeadsConfig
from rcnn_svm.features.build import FeatureConfig
from rcnn_svm.files import read_json, write_json
from rcnn_svm.opencv import cv2
from rcnn_svm.progress import say
from rcnn_svm.proposals import SelectiveSearchConfig, proposals_of
from rcnn_svm.report.provenance import provenance
from rcnn_svm.structures import Dataset, GroundTruth, Image, Sample
from rcnn_svm.training.config import FcConfig

SIZE = (48, 72)
CLASSES = ("disc", "ring", "cross", "square")
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
CONFIG = ExperimentConfig(
    proposals=SelectiveSearchConfig(min_size=6, max_regions=60),
    features=FeatureConfig(weights="offline", taps="block7@2x2", longer_sides=(96,)),
    fc=FcConfig(hidden=(64,), n_steps=200, batch_size=256),
    heads=HeadsConfig(
        names=("linear-svm",),
        linear_costs=(1.0,),
        ridge_strengths=(3.0,),
        max_ious=(0.3,),
        soft_nms_sigmas=(),
        vote_ious=(0.5,),
    ),
)
N_POINTS = 60
"""Points of a curve that are kept."""


def truth_of(index: int) -> GroundTruth:
    """Return one to three objects that do not overlap, a third of the picture each."""
    rng = np.random.default_rng([index, 0])
    columns = rng.permutation(3)[: rng.integers(1, 4)]
    side = rng.integers(14, 23, len(columns))
    left = 24 * columns + rng.integers(0, 24 - side)
    top = rng.integers(0, SIZE[0] - side)
    boxes = np.stack([left, top, left + side, top + side], axis=1).astype(np.float32)
    return GroundTruth(boxes, rng.integers(len(CLASSES), size=len(columns)))


def draw_scene(index: int) -> Image:
    """Return the pixels: each object in a colour of its own on a smooth background."""
    rng = np.random.default_rng([index, 1])
    coarse = rng.integers(60, 200, (4, 6, 3), dtype=np.uint8)
    scene = cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC)
    truth = truth_of(index)
    for box, label in zip(truth.boxes.astype(int), truth.labels, strict=True):
        (x1, y1, x2, y2), colour = box.tolist(), rng.integers(0, 256, 3).tolist()
        middle, radius = ((x1 + x2) // 2, (y1 + y2) // 2), (x2 - x1) // 2 - 1
        if label == 0:
            cv2.circle(scene, middle, radius, colour, -1)
        elif label == 1:
            cv2.circle(scene, middle, radius - 2, colour, 4)
        elif label == 2:
            cv2.line(scene, (x1 + 2, y1 + 2), (x2 - 3, y2 - 3), colour, 4)
            cv2.line(scene, (x1 + 2, y2 - 3), (x2 - 3, y1 + 2), colour, 4)
        else:
            cv2.rectangle(scene, (x1, y1), (x2 - 1, y2 - 1), colour, -1)
    return np.asarray(scene, np.uint8)


class Watch:
    """Samples the memory of this process in a thread, with the number of images read so far."""

    def __init__(self, interval_s: float = 0.1) -> None:
        self.points: list[dict[str, float]] = []
        self._n_read = 0
        self._interval = interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = time.perf_counter()
        self.look()
        self._thread.start()

    def read(self, index: int) -> Image:
        """Draw a scene and count it."""
        self._n_read += 1
        return draw_scene(index)

    def stop(self) -> None:
        """End the sampling with one last look."""
        self._done.set()
        self._thread.join()
        self.look()

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            self.look()

    def look(self) -> None:
        """Take a sample."""
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        # The high-water mark sees peaks between two samples; stages set it back.
        kilobytes = (int(fields[key].split()[0]) for key in ("VmRSS", "RssAnon", "VmHWM"))
        rss, anonymous, peak = (1024 * size / 1e6 for size in kilobytes)
        point = {"s": time.perf_counter() - self._started, "images_read": self._n_read}
        self.points.append({**point, "rss_mb": rss, "anonymous_mb": anonymous, "peak_rss_mb": peak})


def splits_of(n_images: int, watch: Watch) -> Splits:
    ends = list(itertools.accumulate((round(share * n_images) for share in SHARES.values()), initial=0))
    parts = {
        split: tuple(
            Sample(f"{i:05d}", SIZE, truth_of(i), render=functools.partial(watch.read, i))
            for i in range(first, last)
        )
        for split, (first, last) in zip(SHARES, itertools.pairwise(ends), strict=True)
    }
    parts["trainval"] = parts["train"] + parts["val"]
    return Splits(**{split: Dataset("shapes", split, CLASSES, part) for split, part in parts.items()})


def measure(n_images: int) -> dict[str, Any]:
    """Train on `n_images` in this process; return peaks and the curve."""
    import torch

    from rcnn_svm.experiment.parts import Run
    from rcnn_svm.experiment.recipe import run_experiment

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    watch = Watch()
    with tempfile.TemporaryDirectory() as cache:
        splits = splits_of(n_images, watch)
        experiment = run_experiment(CONFIG.build(), splits, Run(Path(cache)))
        watch.stop()
        few = splits.trainval.samples[:: max(1, n_images // 500)]
        counts = [len(proposals_of(sample, CONFIG.proposals, Path(cache) / "proposals")) for sample in few]
    result, points = experiment.heads["linear-svm+bbox"], watch.points
    peak = max(point["peak_rss_mb"] for point in points)
    say(f"{n_images} images: peak {peak:.0f} MB in {points[-1]['s']:.0f} s, AP {result.evaluation.map():.3f}")
    # From the end backwards; what lies between proposals and features is the network being loaded.
    starts, end = {}, points[-1]["s"]
    for stage, seconds in reversed(experiment.stages_s.items()):
        end -= seconds
        starts[stage] = end
    starts["proposals"] = 0.0
    for point in points:
        point["stage"] = next(stage for stage, start in starts.items() if point["s"] >= start)
    return {
        "name": f"peak memory, {n_images} images",
        "unit": "MB",
        **dict.fromkeys(("median", "min", "max"), round(peak, 1)),
        "n": 1,
        "n_images": n_images,
        "regions_per_image": round(float(np.mean(counts)), 1),
        "start_rss_mb": round(points[0]["rss_mb"], 1),
        "start_anonymous_mb": round(points[0]["anonymous_mb"], 1),
        "peak_anonymous_mb": round(max(point["anonymous_mb"] for point in points), 1),
        "stages_s": {stage: round(seconds, 1) for stage, seconds in experiment.stages_s.items()},
        "voc07_ap": round(result.evaluation.map(), 4),
        "mining_passes": result.details["mining_passes"],
        "curve": [
            {key: round(value, 1) if isinstance(value, float) else value for key, value in point.items()}
            for point in points[:: max(1, len(points) // N_POINTS)]
        ],
    }


def growth(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how much anonymous memory one more image takes, from the smallest to the largest size."""
    small, large = rows[0], rows[-1]
    n = large["n_images"] - small["n_images"]
    value = (large["peak_anonymous_mb"] - small["peak_anonymous_mb"]) * 1024 / n
    row = {"name": "growth of peak anonymous memory", "unit": "kB/image"}
    return {**row, **dict.fromkeys(("median", "min", "max"), round(value, 2)), "n": 1}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the largest run over time, and the peaks of all runs over the number of images."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8, 3), layout="constrained", width_ratios=(2, 1), sharey=True
    )
    curve = rows[-1]["curve"]
    minutes = [point["s"] / 60 for point in curve]
    for key, label, colour in (
        ("rss_mb", "resident", "#4878a8"),
        ("anonymous_mb", "anonymous", "#c06040"),
    ):
        left.plot(minutes, [point[key] for point in curve], color=colour, label=label)
    for stage, points in itertools.groupby(curve, key=lambda point: point["stage"]):
        start = next(points)["s"] / 60
        left.axvline(start, color="0.8", linewidth=0.8, zorder=0)
        left.annotate(stage, (start, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=8)
    left.set(xlabel=f"minutes, {rows[-1]['n_images']:,} images", ylabel="MB", ylim=(0, None))
    sizes = [row["n_images"] for row in rows]
    right.plot(sizes, [row["median"] for row in rows], "o-", color="#4878a8", label="resident")
    right.plot(sizes, [row["peak_anonymous_mb"] for row in rows], "o-", color="#c06040", label="anonymous")
    right.set(xlabel="images", title="peak", xlim=(0, None))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    plt.rcParams["svg.hashsalt"] = "memory"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="2500,5000,10000,20000", help="sizes, separated by commas")
    parser.add_argument("--figure", type=Path, help="also draw the curves, as SVG")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder of the results")
    options = parser.parse_args()
    sizes = sorted(int(size) for size in options.images.split(","))
    rows = []
    for n_images in (50, *sizes):  # the first run leaves compiled kernels behind: compiling takes memory too
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            rows.append(fresh.submit(measure, n_images).result())
    rows = rows[1:]
    small, large = rows[0], rows[-1]
    result = {
        "schema": 1,
        "benchmark": "memory",
        "targets": {},
        "rows": [*rows, growth(rows)],
        "provenance": provenance(seed=0),
    }
    write_json(options.out / "memory.json", result)
    features = read_json(options.out / "features.json")
    features["targets"]["train_peak_rss_mb"] = {
        "value": large["median"],
        "unit": "MB",
        "n": 1,
        "ours": large["median"],
        "peer": small["median"],
        "peer_name": f"the same with {small['n_images']} images, MB",
        "how": f"Peak resident memory of a whole training with {large['n_images']} images of "
        f"{large['regions_per_image']:.0f} regions, {large['start_rss_mb']:.0f} MB of it the loaded "
        f"libraries; the peer is the same with {small['n_images']} images (results/benchmarks/memory.json).",
    }
    write_json(options.out / "features.json", features)
    if options.figure is not None:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
