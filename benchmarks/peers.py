"""What people train instead, on the same images: mAP against CPU minutes.

    python benchmarks/peers.py DATA [--only SECTION ...] [--sets NAME ...] [--busy]

Writes results/benchmarks/peers.json. DATA is the folder of `fruit`, `voc2007-mini` and `raccoon`. Everything
that has a network has MobileNetV2 with the same ImageNet weights. All is trained on trainval and measured on
test by our evaluation, mAP of VOC2007. Each section runs in a process of its own; its rows replace those of
the same name as they come, others stay.

ours         `rcnn-svm train DATA --backbone mobilenet_v2`, nothing cached, all cores.
presets      the same with `--preset best`: more time than the default.
tuning       torchvision's Faster R-CNN for a few minutes on train with each of several rates, mAP on val; on
             no bill.
faster-rcnn  the same with the best rate on trainval, looked at every few minutes.
heads        linear and RBF SVMs on our regions and features, by our solvers and by scikit-learn's.
dlib         its detector of one class, HOG with a structural SVM, where dlib is installed (`dlib-bin`).

CPU seconds are those of all threads from the start of the process, imports and test images included. A
Faster R-CNN is billed its training so far and one pass over the test images. It runs on one thread.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from accuracy import train as train_ours
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import mobilenet_v2
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.misc import FrozenBatchNorm2d

from rcnn_svm.boxes import Boxes
from rcnn_svm.datasets import Splits
from rcnn_svm.evaluation.voc import evaluate_voc
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig
from rcnn_svm.experiment.data import load_data
from rcnn_svm.experiment.parts import Run
from rcnn_svm.experiment.recipe import run_experiment
from rcnn_svm.files import read_json, write_json
from rcnn_svm.heads.base import Fitted, HeadBase, RegionBlocks
from rcnn_svm.heads.kernel_svm import KernelSVMHead
from rcnn_svm.heads.linear_svm import LinearSVMHead
from rcnn_svm.heads.mining import PaperMining
from rcnn_svm.heads.recipe import HeadRecipe
from rcnn_svm.networks.weights import find_weights, load_weights, read_weights
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance
from rcnn_svm.structures import Dataset, Detections, GroundTruth, Image, Sample
from rcnn_svm.threads import limit, usable_cores

SETS = ("fruit", "voc2007-mini")
NETWORK = "mobilenet_v2"
OURS = ["--backbone", NETWORK]
N_SEEDS = 2
PRESETS = ("best",)

SHORT, LONG = 320, 480
"""Pixels of the shorter side of an image that Faster R-CNN and dlib see, and at most of the longer one."""
BATCH = 2
WARM_UP = 100
"""Steps in which the rate rises to its value."""
MEMORY = 500
"""Steps over which weights are averaged: what is measured has the effect of a rate that was lowered."""
MAX_NORM = 10.0
"""Gradients are cut to this length: none of the rates shall fail by one bad step."""
TRIED = (("sgd", 0.01), ("adamw", 2e-4), ("adamw", 5e-4))
TRIED_S = {"fruit": 100.0, "voc2007-mini": 200.0}
"""CPU seconds of each trial."""
BUDGET_S = {"fruit": (900.0, 150.0), "voc2007-mini": (1500.0, 300.0)}
"""CPU seconds of training, and from one look at test to the next."""
DLIB_COSTS = (0.3, 1.0, 3.0)
"""Values of C that are tried on val."""

Row = dict[str, Any]
Put = Callable[[Row], None]


@dataclass(frozen=True)
class Task:
    """A section on a data set, and where its rows go.

    Attributes:
        section: one of `SECTIONS`.
        data: folder of the data set.
        out: the file of results.
        about: provenance of the run.
        alone: whether nothing else ran on the machine.
    """

    section: str
    data: Path
    out: Path
    about: Mapping[str, Any]
    alone: bool

    def put(self, row: Row) -> None:
        """Keep a row, in place of one of its name, and the targets that all rows give."""
        row = {"name": "", "section": self.section, "data": self.data.name, **row, "alone": self.alone}
        row["name"] = f"{self.data.name}, {self.section}, {row.pop('what')}"
        row |= {"commit": self.about["commit"], "command": self.about["command"]}
        say(str({k: v for k, v in row.items() if k in ("name", "mAP", "mAP_val", "cpu_s")}))
        rows = [*(one for one in rows_of(self.out) if one["name"] != row["name"]), row]
        result = {"schema": 1, "benchmark": "peers", "targets": targets_of(rows), "rows": rows}
        write_json(self.out, {**result, "provenance": dict(self.about)})


def rows_of(out: Path) -> list[Row]:
    rows: list[Row] = read_json(out)["rows"] if out.exists() else []
    return rows


def mean_ap(found: Sequence[Detections], dataset: Dataset) -> float:
    """Return mAP in percent by the rule of VOC2007."""
    return 100 * evaluate_voc(found, [sample.truth for sample in dataset], dataset.classes).map("voc07")


def splits_of(data: Path) -> Splits:
    return load_data(DataConfig(str(data)), seed=0)


def shrunk(sample: Sample) -> tuple[Image, float]:
    """Return an image at the size that peers see, and the factor that it was resized by."""
    image = sample.read()
    scale = min(SHORT / min(sample.size), LONG / max(sample.size))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=how), np.uint8), scale


def wanted(truth: GroundTruth) -> GroundTruth:
    """Return the objects that are learned from, as ours are."""
    return truth[~(truth.difficult | truth.crowd)]


# ---- ours


def run_ours(task: Task) -> None:
    for seed in range(N_SEEDS):
        task.put({"what": f"seed {seed}", **train_ours(task.data, OURS, seed)})


def run_presets(task: Task) -> None:
    for name in PRESETS:
        task.put({"what": name, **train_ours(task.data, [*OURS, "--preset", name], 0)})


# ---- torchvision's Faster R-CNN


def faster_rcnn(n_classes: int) -> FasterRCNN:
    """Build it as torchvision builds its small ones, on the last blocks at stride 16 and 32.

    The pyramid has 128 channels, half of the usual, and 128 regions of an image are learned from, a quarter
    of torchvision's: with the usual numbers a step takes more than twice as long. BatchNorm is frozen, and so
    is what lies before stride 8.
    """
    network = mobilenet_v2(norm_layer=FrozenBatchNorm2d)
    state = read_weights(find_weights(NETWORK, "default"))
    load_weights(network, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, NETWORK)
    blocks = network.features[:18]
    for block in blocks[:4]:
        for parameter in block.parameters():
            parameter.requires_grad_(False)
    sizes, ratios = ((32, 64, 128), (64, 128, 256), (128, 256, 400)), ((0.5, 1.0, 2.0),) * 3
    return FasterRCNN(
        BackboneWithFPN(blocks, {"13": "0", "17": "1"}, [96, 320], 128),
        n_classes + 1,
        min_size=SHORT,
        max_size=LONG,
        rpn_anchor_generator=AnchorGenerator(sizes, ratios),
        rpn_pre_nms_top_n_train=1000,
        rpn_post_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=500,
        rpn_post_nms_top_n_test=300,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 7, 2),
        box_batch_size_per_image=128,
        box_score_thresh=0.01,
    )


def as_tensor(image: Image) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float().div_(255)


def batches(
    dataset: Dataset, rng: np.random.Generator
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Yield images and objects without end, half of them mirrored; images are read once."""
    kept = []
    for sample in dataset:
        image, scale = shrunk(sample)
        truth = wanted(sample.truth)
        kept.append((image, truth.boxes * scale, truth.labels + 1))
    while True:
        order = rng.permutation(len(kept))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            images, targets = [], []
            for i in order[start : start + BATCH]:
                image, boxes, labels = kept[i]
                if rng.random() < 0.5:
                    image = np.ascontiguousarray(image[:, ::-1])
                    boxes = np.stack(
                        [
                            image.shape[1] - boxes[:, 2],
                            boxes[:, 1],
                            image.shape[1] - boxes[:, 0],
                            boxes[:, 3],
                        ],
                        1,
                    )
                images.append(as_tensor(image))
                targets.append({"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)})
            yield images, targets


def look(model: nn.Module, dataset: Dataset) -> list[Detections]:
    """Detect in every image."""
    model.eval()
    found = []
    with torch.inference_mode():
        for sample in dataset:
            image, scale = shrunk(sample)
            (one,) = model([as_tensor(image)])
            boxes, scores, labels = (one[name].numpy() for name in ("boxes", "scores", "labels"))
            found.append(Detections(sample.image_id, boxes / scale, scores, labels - 1))
    return found


def learn(
    train: Dataset,
    test: Dataset,
    how: str,
    rate: float,
    budget_s: float,
    every_s: float,
    started: float = 0.0,
) -> Iterator[Row]:
    """Train, and yield what is reached every so many CPU seconds of the process, to the end of the budget."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = faster_rcnn(len(train.classes)).to(memory_format=torch.channels_last)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser: torch.optim.Optimizer
    if how == "sgd":
        optimiser = torch.optim.SGD(learned, rate, momentum=0.9, weight_decay=1e-4)
    else:
        optimiser = torch.optim.AdamW(learned, rate, weight_decay=1e-2)
    warm = torch.optim.lr_scheduler.LinearLR(optimiser, 0.01, total_iters=WARM_UP)

    def averaged(mean: Tensor, new: Tensor, n: Tensor | int) -> Tensor:
        return mean + (new - mean) * max(1 / MEMORY, 9 / (10 + float(n)))

    mean = AveragedModel(model, avg_fn=averaged)
    looks = itertools.count(1)
    due, losses = every_s * next(looks), []
    stream = batches(train, np.random.default_rng(0))
    for step in itertools.count(1):
        images, targets = next(stream)
        model.train()
        loss = sum(model(images, targets).values())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, MAX_NORM)
        optimiser.step()
        warm.step()
        mean.update_parameters(model)
        losses.append(float(loss.detach()))
        spent = time.process_time() - started
        if spent < due:
            continue
        reached = mean_ap(look(mean, test), test)
        own = time.process_time() - started - spent
        started += own  # is on the bill of this look alone
        yield {
            "what": f"{how} {rate:g}, {due:.0f} s",
            "optimiser": how,
            "rate": rate,
            "budget_s": due,
            "mAP": reached,
            "cpu_s": spent + own,
            "look_s": own,
            "steps": step,
            "epochs": step * BATCH / len(train),
            "loss": statistics.mean(losses),
        }
        losses.clear()
        due = every_s * next(looks)
        if due > budget_s:
            return


def tune_faster_rcnn(task: Task) -> None:
    splits, budget = splits_of(task.data), TRIED_S[task.data.name]
    for how, rate in TRIED:
        started = time.process_time()
        for row in learn(splits.train, splits.val, how, rate, budget, budget, started):
            row["mAP_val"] = row.pop("mAP")
            task.put(row)


def run_faster_rcnn(task: Task) -> None:
    trials = [row for row in rows_of(task.out) if (row["section"], row["data"]) == ("tuning", task.data.name)]
    if not trials:
        raise SystemExit(f"{task.out}: holds no row of tuning on {task.data.name}. Run --only tuning first.")
    best = max(trials, key=lambda row: float(row["mAP_val"]))
    splits = splits_of(task.data)
    for row in learn(
        splits.trainval, splits.test, best["optimiser"], best["rate"], *BUDGET_S[task.data.name]
    ):
        task.put(row)


# ---- scikit-learn's solvers


class Timed(HeadBase):
    """Adds the CPU seconds of each training to what a head reports."""

    def fit_grid(self, blocks: RegionBlocks, settings: Sequence[Mapping[str, Any]]) -> Iterator[Fitted]:
        """Train as the head does."""
        started = time.process_time()
        for fitted in super().fit_grid(blocks, settings):
            yield replace(fitted, details={**fitted.details, "fit_cpu_s": time.process_time() - started})
            started = time.process_time()


class TimedLinear(Timed, LinearSVMHead):
    """A linear SVM."""


class TimedKernel(Timed, KernelSVMHead):
    """A kernel SVM."""


def run_heads(task: Task) -> None:
    """Train four heads in one experiment; a run of its own costs what all share, and its own training."""
    limit(usable_cores(), asked=False)
    base = ExperimentConfig(data=DataConfig(str(task.data)), folds=0)
    base = replace(base, features=replace(base.features, backbone=NETWORK))
    heads = [
        HeadRecipe("linear-svm", TimedLinear(C=0.3)),
        HeadRecipe("rbf-svm", TimedKernel(C=10.0)),
        HeadRecipe("SVC", TimedKernel(C=10.0, solver="libsvm")),
        HeadRecipe("LinearSVC", TimedLinear(C=0.3, solver="liblinear", mining=PaperMining())),
    ]
    with tempfile.TemporaryDirectory() as folder:
        # One job: what other processes compute would be on no bill.
        done = run_experiment(base.build(heads=heads), splits_of(task.data), Run(Path(folder)))
    results = {head.name: done.heads[f"{head.name}+bbox"] for head in heads}
    fits = {name: float(result.details["fit_cpu_s"]) for name, result in results.items()}
    shared = time.process_time() - sum(fits.values())
    for name, result in results.items():
        row = {"what": name, "mAP": 100 * result.evaluation.map("voc07"), "cpu_s": shared + fits[name]}
        task.put(row | {"fit_cpu_s": fits[name]})


# ---- dlib


def of_one_shape(boxes: Boxes, aspect: float) -> Boxes:
    """Return boxes of the same centres and areas with one aspect ratio: dlib refuses others."""
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    width = np.sqrt(size.prod(axis=1) * aspect)
    half = np.stack([width, width / aspect], 1) / 2
    return np.concatenate([centre - half, centre + half], 1)


def run_dlib(task: Task) -> None:
    """Choose C on val, then train on trainval; the choice is on no bill."""
    dlib = importlib.import_module("dlib")

    def reached(train: Dataset, test: Dataset, cost: float) -> float:
        objects = np.concatenate([wanted(sample.truth).boxes for sample in train])
        sizes = objects[:, 2:] - objects[:, :2]
        aspect = math.exp(float(np.log(sizes[:, 0] / sizes[:, 1]).mean()))
        images, boxes = [], []
        for sample in train:
            image, scale = shrunk(sample)
            images.append(image)
            rounded = of_one_shape(wanted(sample.truth).boxes * scale, aspect).round().astype(int).tolist()
            boxes.append([dlib.rectangle(x1, y1, x2 - 1, y2 - 1) for x1, y1, x2, y2 in rounded])
        options = dlib.simple_object_detector_training_options()
        options.C, options.num_threads, options.add_left_right_image_flips = cost, 1, True
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "detector.svm")
            dlib.train_simple_object_detector(images, boxes, options).save(path)
            detector = dlib.fhog_object_detector(path)  # whose scores can be had
        found = []
        for sample in test:
            image, scale = shrunk(sample)
            rects, scores, _ = detector.run(image, 0, -1.0)
            corners = np.array(
                [[r.left(), r.top(), r.right() + 1, r.bottom() + 1] for r in rects], np.float32
            )
            found.append(
                Detections(
                    sample.image_id, corners.reshape(-1, 4) / scale, scores, np.zeros(len(scores), int)
                )
            )
        return mean_ap(found, test)

    splits = splits_of(task.data)
    tried = {cost: reached(splits.train, splits.val, cost) for cost in DLIB_COSTS}
    best = max(tried, key=lambda cost: tried[cost])
    started = time.process_time()
    row = {"what": f"C {best:g}", "mAP": reached(splits.trainval, splits.test, best)}
    val = {f"{cost:g}": value for cost, value in tried.items()}
    task.put(row | {"cpu_s": time.process_time() - started, "mAP_val_by_C": val})


# ---- what it comes to


def minutes_to(goal: float, looks: Sequence[Row]) -> tuple[float, bool]:
    """Return the CPU seconds at which a peer reaches `goal`, linear between looks, and whether it does."""
    looks = sorted(looks, key=lambda row: float(row["cpu_s"]))
    before, best = 0.0, 0.0
    for row in looks:
        if row["mAP"] >= goal:
            share = (goal - best) / (row["mAP"] - best)
            return before + share * (row["cpu_s"] - before), True
        before, best = float(row["cpu_s"]), max(best, float(row["mAP"]))
    return before, False


def targets_of(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return the headline figures that these rows give."""

    def of(section: str, data: str) -> list[Row]:
        return [row for row in rows if (row["section"], row["data"]) == (section, data)]

    found: dict[str, dict[str, Any]] = {}

    def target(name: str, unit: str, n: int, ours: float, peer: float, peer_name: str, how: str) -> None:
        value = peer / ours if unit == "x" else ours - peer
        found[name] = {
            "value": round(value, 4), "unit": unit, "n": n, "ours": ours, "peer": peer,
            "peer_name": peer_name, "how": how,
        }  # fmt: skip

    for data in (*SETS, "raccoon"):
        tag, ours = data.replace("-", "_"), of("ours", data)
        if not ours:
            continue
        goal, cost = (statistics.mean(float(row[key]) for row in ours) for key in ("mAP", "cpu_s"))
        looks, peer = of("faster-rcnn", data), "torchvision's Faster R-CNN, MobileNetV2 with FPN"
        if looks:
            seconds, reached = minutes_to(goal, looks)
            best = max(float(row["mAP"]) for row in looks)
            how = f"CPU seconds to {goal:.1f} mAP on test, which ours has with {' '.join(OURS)}"
            how += "" if reached else f"; at least: its last look was there, its best was {best:.1f}"
            target(f"{tag}_time_advantage", "x", len(ours), cost, seconds, peer, how)
            most = max(float(row["cpu_s"]) for row in looks) / 60
            how = f"mAP on test, of the peer the best of all looks in {most:.0f} CPU minutes"
            target(f"{tag}_map_minus_faster_rcnn", "mAP", len(ours), goal, best, peer, how)
        heads = {row["name"].split(", ")[-1]: row for row in of("heads", data)}
        for mine, theirs in (("linear-svm", "LinearSVC"), ("rbf-svm", "SVC")):
            if mine in heads and theirs in heads:
                a, b = heads[mine], heads[theirs]
                how = f"CPU seconds of training the head; mAP {a['mAP']:.1f} against {b['mAP']:.1f}"
                name = f"{tag}_{mine.replace('-', '_')}_training_speedup"
                target(name, "x", 1, a["fit_cpu_s"], b["fit_cpu_s"], f"scikit-learn's {theirs}", how)
                how = f"CPU seconds from nothing to detections on test, features and all; mAP {a['mAP']:.1f} "
                how += f"against {b['mAP']:.1f}"
                name = f"{tag}_{mine.replace('-', '_')}_run_speedup"
                target(name, "x", 1, a["cpu_s"], b["cpu_s"], f"the same with scikit-learn's {theirs}", how)
        for row in of("dlib", data):
            peer = "dlib's HOG detector with a structural SVM"
            how = f"mAP on test; CPU seconds {cost:.0f} against {row['cpu_s']:.0f}"
            target(f"{tag}_map_minus_dlib", "mAP", len(ours), goal, row["mAP"], peer, how)
    return found


SECTIONS: dict[str, tuple[Callable[[Task], None], tuple[str, ...]]] = {
    "ours": (run_ours, (*SETS, "raccoon")),
    "presets": (run_presets, SETS),
    "tuning": (tune_faster_rcnn, SETS),
    "faster-rcnn": (run_faster_rcnn, SETS),
    "heads": (run_heads, SETS),
    "dlib": (run_dlib, ("raccoon",)),
}
"""What is run, and on which data sets."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS))
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="some data sets")
    parser.add_argument(
        "--busy", action="store_true", help="say in each row that other work ran on the machine meanwhile"
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/peers.json"))
    options = parser.parse_args()
    about = provenance(seed=0)
    for section in options.only:
        work, sets = SECTIONS[section]
        for name in [name for name in sets if options.sets is None or name in options.sets]:
            task = Task(section, options.data.resolve() / name, options.out, about, alone=not options.busy)
            process = multiprocessing.get_context("spawn").Process(target=work, args=(task,))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{section} on {name} ended with {process.exitcode}.")
    say(f"{options.out} written")


if __name__ == "__main__":
    main()
