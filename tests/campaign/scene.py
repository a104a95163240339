"""What the campaign works on: tiny pictures, a detector of random weights, and every verb on them."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as pillow

from rcnn_svm import files
from rcnn_svm.cli import main
from rcnn_svm.datasets import write_dataset
from rcnn_svm.detector import Detector, Model, load_detector
from rcnn_svm.evaluation.calibration import ClassCurves, IsotonicScaling, PlattScaling
from rcnn_svm.evaluation.thresholds import Thresholds
from rcnn_svm.experiment import measure
from rcnn_svm.features.build import FeatureConfig, build_featurizer
from rcnn_svm.features.fc_layers import FcLayers
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.scorers import LinearScorer
from rcnn_svm.networks.backbone import load_backbone
from rcnn_svm.postprocess import PostprocessConfig
from rcnn_svm.progress import Stages
from rcnn_svm.proposals import SelectiveSearchConfig
from rcnn_svm.report import provenance
from rcnn_svm.structures import Dataset, GroundTruth, Sample
from tests.cli.conftest import TINY

__all__ = ["CLASSES", "SIZE", "VERBS", "Scene", "picture", "save_detector", "snapshot", "tiny_dataset"]

CLASSES = ("cat", "dog", "bird")
SIZE = (48, 64)
_HEADS = "linear-svm,softmax-refit"
_SMALL = ["--backbone", "small_cnn", "--weights", "random"]


def picture(seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return (48, 64, 3) pixels with a bright rectangle where `tiny_dataset` has its first object."""
    noise = np.random.default_rng(seed).integers(0, 60, (*SIZE, 3), dtype=np.uint8)
    noise[6:40, 5:30] += 150
    return noise


def tiny_dataset(split: str, n: int) -> Dataset:
    """Return `n` pictures with an object of each of `CLASSES`."""
    boxes = np.array([[5, 6, 30, 40], [20, 10, 60, 45], [32, 2, 62, 20]], np.float32)
    truth = GroundTruth(boxes, np.array([0, 1, 2]))
    samples = tuple(
        Sample(f"{split}{i}", SIZE, truth, render=lambda i=i: picture(100 * len(split) + i)) for i in range(n)
    )
    return Dataset("seeds", split, CLASSES, samples)


def save_detector(folder: Path, seed: int = 0) -> None:
    """Write a detector of random weights, with all that a detector can have."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.asarray(rng.normal(size=shape) / 16, np.float32)

    features = FeatureConfig("small_cnn", "random", "warped", "fc7")
    backbone = load_backbone("small_cnn", "random", n_outputs=4, seed=seed)
    regressor = BoxRegressor.from_arrays({"coef": draw(3, 4, 12), "intercept": draw(3, 4)})
    layers = FcLayers(
        (draw(24, 256), draw(12, 24)), (draw(24), draw(12)), draw(12, 4), draw(4), draw(12, 12), draw(12)
    )
    ones = np.ones(3)
    Detector(
        head="linear-svm+bbox",
        classes=CLASSES,
        proposer=SelectiveSearchConfig(min_size=10, max_regions=10),
        n_proposals=8,
        features=features,
        backbone=backbone,
        featurizer=build_featurizer(features, backbone),
        layers=layers,
        model=Model(LinearScorer(draw(3, 12), draw(3)), FeatureScaler("l2"), regressor, FeatureScaler("l2")),
        postprocess=PostprocessConfig(soft_nms_sigma=0.2, box_step=0.5),
        thresholds=Thresholds(CLASSES, np.full(3, -9, np.float32), ones, ones, np.ones(3, np.int64), 3),
        info={"seed": seed},
        calibration=ClassCurves(PlattScaling(ones, ones, np.ones(3, bool)), _steps(), 3),
    ).save(folder)


def _steps() -> IsotonicScaling:
    """Return two steps for each of three classes."""
    return IsotonicScaling(
        np.tile([-1.0, 1.0], 3), np.tile([0.2, 0.9], 3), np.arange(0, 7, 2), np.ones(3, bool)
    )


class Scene:
    """Inputs in a folder that nothing changes.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data, self.photos, self.detector = folder / "voc", folder / "photos", folder / "detector"
        write_dataset((tiny_dataset("train", 5), tiny_dataset("val", 3), tiny_dataset("test", 3)), self.data)
        self.photos.mkdir()
        for i in range(4):
            pillow.fromarray(picture(i)).save(self.photos / f"p{i}.png")
        save_detector(self.detector)
        _load_libraries(self.detector)

    def words(self, verb: str, *, seed: int = 0) -> list[str]:
        """Return the command line of a verb; its outputs are `out` and `cache` where it runs."""
        cached = ["--cache", "cache", "--seed", str(seed), "--jobs", "1"]
        tiny = [*TINY, "--set", "n_bootstrap=20", *cached]
        data, photos = str(self.data), str(self.photos)
        steps = [f"finetune.{one}" for one in ("n_steps=4", "batch_size=8", "checkpoint_every=1")]
        steps += ["features.path=warped", "proposals.max_regions=60", "proposals.min_size=10"]
        network = ["--backbone", "small_cnn", "--weights", "random"]
        finetune = [word for step in steps for word in ("--set", step)]
        one_job = ["--jobs", "1"]
        return {
            "propose": ["propose", data, "--out", "out/boxes.json", "--plot", "out/plots", *cached],
            "extract": ["extract", photos, "--out", "out/f.safetensors", *_SMALL, "--taps", "fc7", *one_job],
            "train": ["train", data, "--out", "out", "--head", "linear-svm", "--no-choice", *tiny],
            "compare": ["compare", data, "--out", "out", "--heads", _HEADS, "--no-choice", *tiny],
            "finetune": ["finetune", data, "--out", "out/w.safetensors", *network, *finetune, *cached],
            "detect": ["detect", str(self.detector), photos, "--out", "out", *one_job],
            "evaluate": ["evaluate", str(self.detector), data, "--out", "out", *one_job],
            "check": ["data", "check", data, "--json", "out/check.json", "--plot", "out/check.png"],
            "digits": ["data", "digits", "--out", "out", "--train", "2", "--val", "1", "--test", "1"],
        }[verb]

    def job(self, verb: str, *, seed: int = 0, before: Callable[[], None] | None = None) -> Callable[[], int]:
        """Return what runs a verb in a child, where no clock goes: equal runs then have equal bytes.

        Args:
            verb: one of `VERBS`.
            seed: of the command.
            before: called in the child just before the command.
        """
        words = self.words(verb, seed=seed)

        def work() -> int:
            _stop_clocks()
            if before is not None:
                before()
            return main(words)

        return work


VERBS = ("propose", "extract", "train", "compare", "finetune", "detect", "evaluate", "check", "digits")
"""Every verb that writes something. What reads only is among the faults of streams."""


class _Never(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _Never:
        return cls(2000, 1, 1, tzinfo=tz)


class _Datetime:
    UTC = datetime.UTC
    datetime = _Never


def _load_libraries(detector: Path) -> None:
    """Load here, once, what children would load each for themselves: libraries and compiled loops.

    Where memory is short, LLVM ends the process and OpenBLAS waits for ever while they are loaded. Neither is
    in our hands, and what the campaign is after comes later.
    """
    for name in ("matplotlib.backends.backend_agg", "scipy.linalg", "sklearn.datasets", "sklearn.svm"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    load_detector(detector).detect(picture())


def _stop_clocks() -> None:
    os.fsync = lambda handle: None  # a power cut is not tried, and a busy disk takes seconds
    time.perf_counter = lambda: 0.0
    defaults = Stages.__init__.__kwdefaults__
    assert defaults is not None
    defaults["clock"] = lambda: 0.0
    provenance.datetime = _Datetime  # type: ignore[assignment]
    provenance._git = lambda *words: None
    measure._peak_rss_mb = lambda: 1.0
    files._checked.clear()
    torch.set_num_threads(1)


def is_unfinished(name: str) -> bool:
    """Tell whether a file, by its path, is a hidden one that is being written, or lies in such a folder."""
    return any(part.endswith(".part") for part in name.split("/"))


def snapshot(folder: Path, *, parts: bool = False) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder by its path; unfinished ones only if wanted."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.exists() else ():
        name = path.relative_to(folder).as_posix()
        if path.is_file() and (parts or not is_unfinished(name)):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def copied(folders: Mapping[str, Path] | Sequence[Path], place: Path) -> None:
    """Copy folders into a fresh `place` under their names."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    named = folders if isinstance(folders, Mapping) else {folder.name: folder for folder in folders}
    for name, folder in named.items():
        if folder.exists():
            shutil.copytree(folder, place / name)
