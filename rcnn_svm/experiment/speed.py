"""How fast this machine is at what the package does: matrix products, both paths, every stage of an image.

`rcnn-svm bench` and the scripts in `benchmarks/` measure with it. Weights are random: speed does not depend
on them. The picture is one of scikit-learn's photographs, since proposals take longer where there is more
to see.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from rcnn_svm.boxes import Boxes
from rcnn_svm.datasets import read_image
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.features.build import FeatureConfig, build_featurizer
from rcnn_svm.features.fc_layers import FcLayers
from rcnn_svm.features.featurizers import SharedFeatures
from rcnn_svm.networks.backbone import Backbone, load_backbone
from rcnn_svm.networks.products import FusedLinear
from rcnn_svm.opencv import cv2
from rcnn_svm.progress import track
from rcnn_svm.structures import Image
from rcnn_svm.training.config import FcConfig

__all__ = [
    "IMAGE_SIZE",
    "PRODUCT_GFLOP",
    "Figure",
    "MachineSpeed",
    "limited_threads",
    "matrix_products",
    "measure_machine",
    "measure_path",
    "measure_product",
    "measure_stages",
    "photograph",
    "random_regions",
    "time_in_turn",
]

IMAGE_SIZE = (375, 500)
"""(height, width) of the picture: VOC's most frequent."""
_PRODUCT = (2048, 4096, 2048)
PRODUCT_GFLOP = 2 * math.prod(_PRODUCT) / 1e9
"""Work of one of `matrix_products`, about that of fc6."""
_MIN_CROPS = 16
"""Crops that stand for all regions of an image on the warped path, at least, and at least two batches."""
_ROUNDS = 9
"""A measurement ends after so many rounds even where there is time for more."""

FeaturePath: TypeAlias = Literal["warped", "shared"]
Work: TypeAlias = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Figure:
    """One thing, measured several times.

    Attributes:
        name: what was measured.
        unit: of the values, such as `s` or `images/s`.
        values: one a round.
        threads: that were allowed to work.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    threads: int

    @property
    def median(self) -> float:
        """The value that is stated."""
        return statistics.median(self.values)

    def row(self) -> dict[str, Any]:
        """Return the figure as results are written: median, extremes and number of rounds."""
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "n": len(self.values),
            "threads": self.threads,
        }


@dataclass(frozen=True)
class MachineSpeed:
    """What `measure_machine` found.

    Attributes:
        products: GFLOP/s of a float32 matrix product, on one thread and on all.
        paths: images/s of every backbone and path that it can take, by (backbone, path).
        layers: the layer that was read, by backbone.
        stages: seconds an image of each stage of the default features, in order.
    """

    products: tuple[Figure, ...]
    paths: Mapping[tuple[str, FeaturePath], Figure]
    layers: Mapping[str, str]
    stages: tuple[Figure, ...]

    @property
    def figures(self) -> tuple[Figure, ...]:
        """All of them."""
        return (*self.products, *self.paths.values(), *self.stages)


@contextlib.contextmanager
def limited_threads(n: int) -> Iterator[None]:
    """Let torch, OpenCV and BLAS work with `n` threads inside the block."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(n)
    cv2.setNumThreads(n)
    try:
        with threadpool_limits(n):
            yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def time_in_turn(
    work: Work,
    *,
    rounds: int = _ROUNDS,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time pieces of work in turn, so that a busy moment of the machine strikes all of them alike.

    Args:
        work: by name; each is called once to warm up, then once a round.
        rounds: at most.
        seconds: of wall clock after which no other round begins; one is always made.
        clock: what is read before and after each call.

    Returns:
        For each name the seconds of every round.
    """
    started = time.perf_counter()
    for call in work.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in work}
    for n in range(rounds):
        if n and time.perf_counter() - started > seconds:
            break
        for name, call in work.items():
            before = clock()
            call()
            times[name].append(clock() - before)
    return times


def photograph(size: tuple[int, int] = IMAGE_SIZE) -> Image:
    """Return a photograph of (height, width) pixels, uint8 (H, W, 3) RGB."""
    from sklearn.datasets import load_sample_image

    shrunk = cv2.resize(load_sample_image("china.jpg"), size[::-1], interpolation=cv2.INTER_AREA)
    return np.asarray(shrunk, np.uint8)


def random_regions(n: int, size: tuple[int, int] = IMAGE_SIZE, *, seed: int = 0) -> Boxes:
    """Return (n, 4) boxes of 20 pixels to the whole image, small ones more often, as proposals are."""
    rng = np.random.default_rng(seed)
    limit = np.array([size[1], size[0]])
    sides = 20 * (limit / 20) ** rng.uniform(0, 1, (n, 2))
    low = rng.uniform(0, 1, (n, 2)) * (limit - sides)
    return np.concatenate([low, low + sides], axis=1).astype(np.float32)


def matrix_products() -> dict[str, Callable[[], object]]:
    """Return the float32 matrix product of `PRODUCT_GFLOP`, by torch and as our layers make it."""
    rows, inner, columns = _PRODUCT
    a, b = torch.randn(rows, inner), torch.randn(columns, inner)
    layer = FusedLinear(torch.nn.Linear(inner, columns), relu=False)
    return {"torch": lambda: a @ b.T, "ours (oneDNN where there is one)": lambda: layer(a)}


def measure_product(threads: int, seconds: float) -> Figure:
    """Return GFLOP/s of the matrix product of the faster library."""
    with limited_threads(threads):
        times = time_in_turn(matrix_products(), seconds=seconds)
    name = min(times, key=lambda library: statistics.median(times[library]))
    rates = tuple(PRODUCT_GFLOP / value for value in times[name])
    return Figure(f"matrix product, {name}", "GFLOP/s", rates, threads)


def measure_path(
    backbone: Backbone, path: FeaturePath, n_regions: int, threads: int, seconds: float
) -> Figure:
    """Return images/s from pixels to the layer before the logits.

    Args:
        backbone: the network.
        path: `shared` runs on all regions; `warped` on a few of them, and is scaled up.
        n_regions: of an image.
        threads: for torch.
        seconds: to spend.

    Raises:
        ConfigError: the network cannot take this path.
    """
    layer = list(backbone.layers)[-2]
    featurizer = build_featurizer(FeatureConfig(backbone.name, "random", path, layer), backbone)
    image, boxes = photograph(), random_regions(n_regions)
    if path == "warped":
        boxes = boxes[: max(_MIN_CROPS, 2 * backbone.batch_size)]
    with limited_threads(threads):
        times = time_in_turn({"image": lambda: featurizer(image, boxes)}, seconds=seconds)
    rates = tuple(len(boxes) / n_regions / value for value in times["image"])
    return Figure(f"{backbone.name} {layer}, {path}", "images/s", rates, threads)


def measure_stages(
    n_regions: int,
    threads: int,
    *,
    rounds: int = _ROUNDS,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Figure, ...]:
    """Return the seconds that an image takes with the default features, stage by stage.

    RoIAlign is what the features take beyond resizing and convolutions. Proposals use one thread, images
    being shared out among threads.

    Args:
        n_regions: of the image.
        threads: for everything else.
        rounds: as in `time_in_turn`.
        seconds: as in `time_in_turn`.
        clock: as in `time_in_turn`.
    """
    defaults = ExperimentConfig()
    features = build_featurizer(
        FeatureConfig(weights="random"), load_backbone(FeatureConfig().backbone, "random")
    )
    assert isinstance(features, SharedFeatures)
    image, boxes = photograph(), random_regions(n_regions)
    layers = _random_layers(defaults.fc, features.n_features)
    rows = features(image, boxes)
    with tempfile.TemporaryDirectory() as folder, limited_threads(threads):
        file = Path(folder) / "image.jpg"
        cv2.imwrite(str(file), image[..., ::-1])
        ready = _prepared(features, image)
        times = time_in_turn(
            {
                "reading the file": lambda: read_image(file),
                "proposals": lambda: defaults.proposals.propose(image),
                "resizing": lambda: _prepared(features, image),
                "convolutions": lambda: _convolutions(features, ready),
                "features": lambda: features(image, boxes),
                "fc layers": lambda: layers.scores(layers(rows)),
            },
            rounds=rounds,
            seconds=seconds,
            clock=clock,
        )
    whole = zip(times.pop("features"), times["resizing"], times["convolutions"], strict=True)
    times["RoIAlign"] = [max(all_of_it - resizing - maps, 0.0) for all_of_it, resizing, maps in whole]
    order = ("reading the file", "proposals", "resizing", "convolutions", "RoIAlign", "fc layers")
    return tuple(
        Figure(name, "s", tuple(times[name]), 1 if name in ("reading the file", "proposals") else threads)
        for name in order
    )


def measure_machine(backbones: Sequence[str], *, n_regions: int, n_jobs: int, seconds: float) -> MachineSpeed:
    """Measure all of it within about `seconds` of wall clock, networks being made not counted.

    Each measurement is made at least once after one call to warm up, so that the time is exceeded where it
    is too short for that.

    Args:
        backbones: names of `BACKBONES`.
        n_regions: of an image.
        n_jobs: threads of everything but the first matrix product and the proposals.
        seconds: to spend.

    Raises:
        ConfigError: an unknown backbone.
    """
    counts = sorted({1, n_jobs})
    networks = [load_backbone(name, "random") for name in dict.fromkeys(backbones)]
    paths = [
        (network, path) for network in networks for path in get_args(FeaturePath) if _takes(network, path)
    ]
    share = seconds / (len(counts) + len(paths) + 1)
    products = tuple(measure_product(n, share) for n in counts)
    rates = {
        (network.name, path): measure_path(network, path, n_regions, n_jobs, share)
        for network, path in track(paths, "networks", unit="path")
    }
    layers = {network.name: list(network.layers)[-2] for network in networks}
    return MachineSpeed(products, rates, layers, measure_stages(n_regions, n_jobs, seconds=share))


def _takes(network: Backbone, path: FeaturePath) -> bool:
    try:
        FeatureConfig(network.name, path=path)
    except ConfigError:
        return False
    return True


def _prepared(features: SharedFeatures, image: Image) -> NDArray[np.float32]:
    """Return the image as the convolutions read it: (h, w, 3) normalised, at the first scale."""
    scale = features.longer_sides[0] / max(image.shape[:2])
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return features.backbone.normalise(np.asarray(resized, np.uint8))


@torch.inference_mode()
def _convolutions(features: SharedFeatures, ready: NDArray[np.float32]) -> None:
    features.backbone.run_maps(
        torch.from_numpy(ready[None]).permute(0, 3, 1, 2), {tap.layer for tap in features.taps}
    )


def _random_layers(config: FcConfig, n_features: int, n_classes: int = 20) -> FcLayers:
    rng = np.random.default_rng(0)
    sizes = [n_features, *config.hidden]
    matrices = [rng.standard_normal((b, a), np.float32) for a, b in itertools.pairwise(sizes)]
    outputs = rng.standard_normal((sizes[-1], n_classes + 1), np.float32)
    boxes = rng.standard_normal((sizes[-1], 4 * n_classes), np.float32)
    return FcLayers(
        weights=tuple(matrices),
        biases=tuple(np.zeros(len(matrix), np.float32) for matrix in matrices),
        class_weight=outputs,
        class_bias=np.zeros(outputs.shape[1], np.float32),
        box_weight=boxes,
        box_bias=np.zeros(boxes.shape[1], np.float32),
        scaling=config.scaler(None).scaling,  # type: ignore[arg-type]
    )
