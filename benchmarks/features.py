"""How near feature extraction comes to what the machine can do; writes results/benchmarks/features.json.

    python benchmarks/features.py [--threads 1] [--quick]

Every ratio is taken in one run, its two sides measured in turn. Times are CPU seconds of the whole process
where one thread is used, so that other programs on the machine disturb less, and wall clock otherwise.
`rcnn-svm bench` is the short form for users.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcnn_svm.datasets.images import read_image
from rcnn_svm.experiment.speed import (
    IMAGE_SIZE,
    PRODUCT_GFLOP,
    Figure,
    matrix_products,
    measure_stages,
    photograph,
    random_regions,
    time_in_turn,
)
from rcnn_svm.features.featurizers import SharedFeatures, WarpedFeatures
from rcnn_svm.features.store import FeatureStore
from rcnn_svm.files import read_json, write_json
from rcnn_svm.networks.backbone import Backbone, load_backbone
from rcnn_svm.networks.layers import layer_table
from rcnn_svm.opencv import cv2
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance
from rcnn_svm.structures import GroundTruth, Sample

N_REGIONS = 2000
TAPS = {"alexnet": "fc7", "vgg16": "fc7", "mobilenet_v2": "penultimate"}
BATCH_SIZES = {"alexnet": (32, 64), "vgg16": (4, 8), "mobilenet_v2": (2, 4, 8)}
N_CROPS = {"alexnet": 128, "vgg16": 16, "mobilenet_v2": 128}


class Bench:
    """Measures, keeps every raw figure as a row, and turns pairs of rows into targets."""

    def __init__(self, threads: int, rounds: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.targets: dict[str, dict[str, Any]] = {}
        self.threads, self.rounds = threads, rounds
        self.clock = time.process_time if threads == 1 else time.perf_counter

    def seconds(self, work: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Time pieces of work in turn and return medians by name."""
        gc.collect()
        times = time_in_turn(work, rounds=self.rounds, clock=self.clock)
        figures = [Figure(name, "s", tuple(values), self.threads) for name, values in times.items()]
        for figure in figures:
            self.rows.append(figure.row())
            say(f"{figure.name}: {figure.median:.3f} s")
        return {figure.name: figure.median for figure in figures}

    def target(
        self, name: str, value: float, unit: str, *, ours: float, peer: float, peer_name: str, how: str
    ) -> None:
        """Keep a headline figure."""
        figures = {"value": round(value, 4), "unit": unit, "n": self.rounds}
        self.targets[name] = {**figures, "ours": ours, "peer": peer, "peer_name": peer_name, "how": how}
        say(f"  {name} = {value:.3f} {unit}")


def sample_on_disk(folder: Path) -> Sample:
    path = folder / "image.jpg"
    cv2.imwrite(str(path), photograph()[..., ::-1])
    return Sample("image", IMAGE_SIZE, GroundTruth.empty(), path=path, reader=read_image)


def gemm_gflops(bench: Bench) -> float:
    """The machine's best rate in float32 matrix products of about the size of fc6."""
    a, b = (np.random.default_rng(0).standard_normal((2048, 4096), np.float32) for _ in range(2))
    products = {**matrix_products(), "numpy": lambda: a @ b.T}
    seconds = bench.seconds({f"gemm, {name}": product for name, product in products.items()})
    return PRODUCT_GFLOP / min(seconds.values())


def bare_network(backbone: Backbone, layer: str, n_crops: int, batch_size: int) -> Callable[[], object]:
    """The network alone, folded and fused, on crops that lie ready in memory."""
    side = backbone.crop_size
    crops = torch.randn(batch_size, side, side, 3).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(n_crops // batch_size):
            backbone(crops, (layer,))

    return run


def measure_warped(bench: Bench, name: str, gemm: float, quick: bool) -> None:
    """The warped path from files to files, beside the bare network and the matrix product."""
    layer = TAPS[name]
    backbone = load_backbone(name, "random")
    n_crops = N_CROPS[name] // (2 if quick else 1)
    fused = backbone.for_inference()
    sizes = [size for size in BATCH_SIZES[name] if size <= n_crops]
    bare = {f"{name} bare network, batch {b}": bare_network(fused, layer, n_crops, b) for b in sizes}
    features = WarpedFeatures(backbone, layer)
    with tempfile.TemporaryDirectory() as folder:
        samples, boxes = [sample_on_disk(Path(folder))], [random_regions(n_crops)]
        counter = iter(range(1_000))
        end_to_end = f"{name} warped, files to store"

        def extract() -> None:
            FeatureStore(Path(folder) / str(next(counter)), features).fill(samples, boxes)

        seconds = bench.seconds({**bare, end_to_end: extract})
    best = min(seconds[key] for key in bare)
    rates = n_crops / seconds[end_to_end], n_crops / best
    bench.target(
        f"warped_fraction_of_network_{name}",
        rates[0] / rates[1],
        "fraction",
        ours=rates[0],
        peer=rates[1],
        peer_name="the same network on ready tensors at its best batch size, crops/s",
        how="Crops/s of reading, cropping, warping, the network and storing, over those of the network; "
        f"one image of {n_crops} regions.",
    )
    if name == "mobilenet_v2":
        return
    gflop = sum(row.gflop for row in layer_table(name) if row.name != "logits")
    bench.target(
        f"network_fraction_of_gemm_{name}",
        rates[1] * gflop / gemm,
        "fraction",
        ours=rates[1] * gflop,
        peer=gemm,
        peer_name="float32 matrix product 2048 x 4096 x 2048, the best library, GFLOP/s",
        how=f"GFLOP/s of the bare network to fc7 ({gflop:.2f} GFLOP a crop) over a matrix product's.",
    )


def measure_shared(bench: Bench, quick: bool) -> None:
    """AlexNet to fc7 for 2000 regions of one image: warped and shared."""
    backbone = load_backbone("alexnet", "random")
    image, boxes = photograph(), random_regions(N_REGIONS)
    warped, shared = WarpedFeatures(backbone, "fc7"), SharedFeatures(backbone, "fc7")
    part = N_REGIONS // (16 if quick else 8)
    names = f"alexnet fc7 warped, {part} regions", "alexnet fc7 shared, 2000 regions"
    work = [lambda: warped(image, boxes[:part]), lambda: shared(image, boxes)]
    seconds = bench.seconds(dict(zip(names, work, strict=True)))
    peer = seconds[names[0]] * N_REGIONS / part
    bench.target(
        "shared_speedup_alexnet",
        peer / seconds[names[1]],
        "x",
        ours=seconds[names[1]],
        peer=peer,
        peer_name="the warped path, s/image",
        how=f"Seconds for fc7 of 2000 regions of a 500 x 375 image, longer side 480; the warped path ran on "
        f"{part} of the regions and was scaled up.",
    )


def measure_default_features(bench: Bench) -> None:
    """Where the time of the default features goes: 2000 regions of one image."""
    stages = measure_stages(N_REGIONS, bench.threads, rounds=bench.rounds, clock=bench.clock)
    bench.rows += [stage.row() for stage in stages]
    image, boxes = photograph(), random_regions(N_REGIONS)
    backbone = load_backbone("mobilenet_v2", "random")
    features = SharedFeatures(backbone, "block13@3x3,block17@1x1,block17@1x1*1.8")
    crop = WarpedFeatures(backbone, "penultimate")
    bench.seconds(
        {
            "mobilenet_v2 shared, 2000 regions": lambda: features(image, boxes),
            "mobilenet_v2 crops of 224 pixels, 64": lambda: [
                None for _ in crop._batches(crop.backbone.normalise(image), boxes[:64])
            ],
        }
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw milliseconds a region of every path, on one thread."""
    import matplotlib.pyplot as plt

    seconds = {row["name"]: row["median"] for row in rows if row.get("threads") == 1}
    bars = {f"{name}, warped": seconds[f"{name} warped, files to store"] / n for name, n in N_CROPS.items()}
    bars["alexnet, shared"] = seconds["alexnet fc7 shared, 2000 regions"] / N_REGIONS
    bars["mobilenet_v2, shared"] = seconds["mobilenet_v2 shared, 2000 regions"] / N_REGIONS
    ordered = sorted(bars.items(), key=lambda item: item[1])
    figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
    drawn = axes.barh([name for name, _ in ordered], [value * 1e3 for _, value in ordered], color="#4878a8")
    axes.bar_label(drawn, fmt="%.3g ms", padding=3)
    axes.set(xscale="log", xlabel="CPU milliseconds a region, one core (lower is better)")
    axes.set_xlim(right=2.5 * ordered[-1][1] * 1e3)
    axes.spines[["top", "right"]].set_visible(False)
    plt.rcParams["svg.hashsalt"] = "features"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer crops and rounds, for a first look")
    parser.add_argument("--figure", type=Path, help="also draw the milliseconds a region, as SVG")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/features.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    bench = Bench(options.threads, 2 if options.quick else options.rounds)
    gemm = gemm_gflops(bench)
    measure_default_features(bench)
    for name in TAPS:
        measure_warped(bench, name, gemm, options.quick)
    measure_shared(bench, options.quick)
    # Figures of other runs (other threads, whole experiments) stay beside those that were measured now.
    old = read_json(options.out) if options.out.exists() else {"targets": {}, "rows": []}
    rows = [row for row in old["rows"] if row.get("threads") != options.threads]
    targets = bench.targets if options.threads == 1 else {}
    result = {
        "schema": 1,
        "benchmark": "features",
        "targets": {**old["targets"], **targets},
        "rows": rows + bench.rows,
        "provenance": provenance(seed=0),
    }
    write_json(options.out, result)
    say(f"Written to {options.out}.")
    if options.figure is not None and not options.quick:
        draw(result["rows"], options.figure)


if __name__ == "__main__":
    main()
