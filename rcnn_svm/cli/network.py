"""Verbs about the network: `layers`, `extract`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rcnn_svm.cli import options as shared
from rcnn_svm.config import choices
from rcnn_svm.errors import ConfigError, DataError, ShapeError
from rcnn_svm.features.build import FeatureConfig
from rcnn_svm.progress import say, track

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rcnn_svm.boxes import Boxes
    from rcnn_svm.features.store import Featurizer
    from rcnn_svm.structures import Sample

__all__ = ["add_extract", "add_layers", "read_regions"]


def add_layers(layers: argparse.ArgumentParser) -> None:
    """Add the options of `layers`."""
    layers.add_argument("backbone", help="such as vgg16, timm:hgnetv2_b0 or torchvision:resnet50")
    layers.set_defaults(run=_layers)


def add_extract(extract: argparse.ArgumentParser) -> None:
    """Add the options of `extract`."""
    extract.add_argument("images", type=Path, nargs="+", help="image files or folders")
    extract.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=".npy (one image) or .safetensors"
    )
    extract.add_argument("--backbone", default="efficientnet_lite2", metavar="NAME")
    extract.add_argument("--weights", default="default", metavar="FILE")
    extract.add_argument("--taps", default="", metavar="TAPS", help="default: the layer before the logits")
    extract.add_argument("--path", choices=choices(FeatureConfig, "path"), default="warped")
    extract.add_argument(
        "--boxes",
        type=Path,
        metavar="FILE",
        help="JSON of `rcnn-svm propose --out`; default: the whole image",
    )
    extract.add_argument("--seed", type=int, default=0, help="of random weights")
    shared.add_compute_options(extract)
    shared.add_cluster_option(extract, cache=True)
    extract.set_defaults(run=_extract)


def _layers(options: argparse.Namespace) -> None:
    from rcnn_svm.networks.layers import layer_table

    rows = layer_table(options.backbone)
    width = max(len(row.name) for row in rows)
    print(f"{'layer':<{width}}  {'output':>14}  {'matrix':>14}  {'weights':>12}  {'MB':>8}  {'GFLOP':>7}")
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        matrix = " x ".join(map(str, row.matrix)) if row.matrix else ""
        print(
            f"{row.name:<{width}}  {shape:>14}  {matrix:>14}  {row.n_weights:>12,}  {row.weights_mb:>8.2f}  "
            f"{row.gflop:>7.3f}"
        )
    total = sum(row.n_weights for row in rows)
    print(f"{total:,} weights, {4 * total / 1e6:.1f} MB; outputs are of one region, before the softmax")


def _extract(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.images import open_images
    from rcnn_svm.features.build import build_featurizer, taps_of
    from rcnn_svm.files import atomic_path
    from rcnn_svm.networks.backbone import Backbone
    from rcnn_svm.networks.detection import load_network
    from rcnn_svm.threads import images_at_once

    suffix = options.out.suffix
    if suffix not in (".npy", ".safetensors"):
        raise ConfigError(f"--out must end in .npy or .safetensors, got {options.out}.")
    samples = open_images(options.images)
    if suffix == ".npy" and len(samples) > 1:
        raise ConfigError(f"--out {options.out}: .npy holds one image, got {len(samples)}. Use .safetensors.")
    config = FeatureConfig(options.backbone, options.weights, options.path, options.taps)
    network = load_network(options.backbone, options.weights, seed=options.seed)
    if isinstance(network, Backbone) and not options.taps:
        config = replace(config, taps=list(network.layers)[-2])
    featurizer = build_featurizer(config, network, device=shared.device_of(options))
    regions = None if options.boxes is None else read_regions(options.boxes, samples)
    wanted = [(sample, _whole(sample) if regions is None else regions[sample.image_id]) for sample in samples]
    rows = shared.engine_of(options).in_order(partial(_rows, featurizer), wanted, images_at_once())
    found = zip(samples, track(rows, "extract", total=len(samples)), strict=True)
    arrays = {sample.image_id: own for sample, own in found}
    with atomic_path(options.out) as temporary, open(temporary, "wb") as stream:
        if suffix == ".npy":
            np.save(stream, next(iter(arrays.values())), allow_pickle=False)
        else:
            from safetensors.numpy import save

            stream.write(save(arrays))
    n, taps = sum(map(len, arrays.values())), config.taps or taps_of(featurizer)
    say(f"{options.out}: {taps} of {options.backbone}, {n} x {featurizer.n_features} float32")


def _whole(sample: Sample) -> Boxes:
    height, width = sample.size
    return np.array([[0, 0, width, height]], np.float32)


def _rows(featurizer: Featurizer, wanted: tuple[Sample, Boxes]) -> NDArray[np.float32]:
    sample, boxes = wanted
    return featurizer(sample.read(), boxes)


def read_regions(path: Path, samples: Sequence[Sample]) -> dict[str, Boxes]:
    """Read the JSON of `rcnn-svm propose --out`.

    Args:
        path: of the file.
        samples: the images whose regions are wanted.

    Returns:
        The (R, 4) regions by image id, each inside its image and of positive area.

    Raises:
        DataError: the file is no such JSON, lacks an image, or holds what is no region of it.
    """
    from rcnn_svm.boxes import plain_boxes
    from rcnn_svm.files import read_json
    from rcnn_svm.structures import RegionSet

    values = read_json(path)
    if not isinstance(values, dict):
        raise DataError(f'{path}: must be a JSON object {{"image": [[x1, y1, x2, y2], ...]}}.')
    regions = {}
    for sample in samples:
        if sample.image_id not in values:
            raise DataError(f"{path}: holds no boxes of {sample.image_id!r}.")
        try:
            boxes = plain_boxes(values[sample.image_id])
            priority = np.arange(len(boxes), dtype=np.float32)
            regions[sample.image_id] = RegionSet(sample.image_id, sample.size, boxes, priority).boxes
        except ShapeError as error:
            raise DataError(f"{path}: {sample.image_id}: {error}") from error
    return regions
