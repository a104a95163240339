from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rcnn_svm.cli import main

# Seconds instead of minutes: a random small network, few regions, one setting of everything.
TINY = [
    *("--backbone", "small_cnn", "--weights", "random", "--path", "warped", "--taps", "fc7"),
    *("--learn", "nothing"),
    *("--set", "proposals.max_regions=60"),
    *("--set", "proposals.min_size=10"),
    *("--set", "heads.linear_costs=[1]"),
    *("--set", "heads.rbf_costs=[1]"),
    *("--set", "heads.rbf_gammas=[1]"),
    *("--set", "heads.softmax_costs=[1]"),
    *("--set", "heads.ridge_strengths=[3]"),
    *("--set", "heads.max_ious=[0.3]"),
    *("--set", "n_bootstrap=50"),
    *("--set", "detect.refined=0"),
]

Run = Callable[..., int]


def array_file(detector: Path, kind: str = "head") -> Path:
    """Return the file of a saved detector's head or backbone."""
    (path,) = detector.glob(f"{kind}.*.safetensors")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the command in this process with a cache of its own."""

    def call(*arguments: str | Path) -> int:
        return main([str(argument) for argument in arguments])

    return call


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOLO data set of a few scenes with digits."""
    folder = tmp_path_factory.mktemp("digits") / "yolo"
    sizes = ["--train", "14", "--val", "5", "--test", "5"]
    assert main(["data", "digits", "--out", str(folder), "--format", "yolo", *sizes]) == 0
    return folder


@pytest.fixture(scope="session")
def detector_folder(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    arguments = ["train", digits_folder, "--out", folder / "detector", "--cache", folder / "cache", *TINY]
    arguments += ["--set", "features.precision=float32"]
    assert main([str(a) for a in arguments]) == 0
    return folder / "detector"
