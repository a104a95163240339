"""Which of the many voices of a configuration is heard: presets, the file, `--set`, single options."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcnn_svm.cli import build_parser, training
from rcnn_svm.experiment.config import ExperimentConfig
from tests.cli.conftest import Run
from tests.cli.test_bad_input import sentence

# TOML that says it, the option that says something else, how to read it, both values.
SINGLE = {
    "seed": ("seed = 7", "--seed 9", lambda c: c.seed, 7, 9),
    "learn": ('learn = "trunk"', "--learn nothing", lambda c: c.learn, "trunk", "nothing"),
    "format": ('[data]\nformat = "coco"', "--format yolo", lambda c: c.data.format, "coco", "yolo"),
    "classes": ('[data]\nclasses = ["a"]', "--classes b,c", lambda c: c.data.classes, ("a",), ("b", "c")),
    "max-images": ("[data]\nmax_images = 7", "--max-images 9", lambda c: c.data.max_images, 7, 9),
    "bad": ("[data]\ndrop_bad_boxes = true", "", lambda c: c.data.drop_bad_boxes, True, True),
    "absent": ("[data]\nskip_absent_classes = true", "", lambda c: c.data.skip_absent_classes, True, True),
    "backbone": (
        '[features]\nbackbone = "vgg16"',
        "--backbone a",
        lambda c: c.features.backbone,
        "vgg16",
        "a",
    ),
    "weights": ('[features]\nweights = "random"', "--weights f", lambda c: c.features.weights, "random", "f"),
    "taps": ('[features]\ntaps = "fc6"', "--taps fc7", lambda c: c.features.taps, "fc6", "fc7"),
    "path": ('[features]\npath = "warped"', "--path shared", lambda c: c.features.path, "warped", "shared"),
    "choice": ("choose = false", "", lambda c: c.choose, False, False),
    "heads": ('[heads]\nnames = ["rbf-svm"]', "", lambda c: c.heads.names, ("rbf-svm",), ("rbf-svm",)),
}


def resolved(*words: str) -> ExperimentConfig:
    options = build_parser().parse_args(["compare", "photos", "--out", "out", *words])
    names = tuple(options.heads.split(",")) if options.heads is not None else ()
    return training.configured(options, ("linear-svm", "rbf-svm"), names)


@pytest.mark.parametrize("preset", [[], ["--quick"]], ids=["full", "quick"])
@pytest.mark.parametrize("key", SINGLE)
def test_an_absent_option_leaves_what_is_configured_and_a_given_one_wins(
    key: str, preset: list[str], tmp_path: Path
) -> None:
    toml, option, read, configured, wanted = SINGLE[key]
    file = tmp_path / "c.toml"
    file.write_text(toml)
    assert read(resolved(*preset, "--config", str(file))) == configured
    assert read(resolved(*preset, "--config", str(file), *option.split())) == wanted


def test_set_is_over_the_file_and_an_option_over_both(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('seed = 7\n[heads]\nnames = ["rbf-svm"]')
    words = ["--config", str(file), "--set", "seed=8", "--set", 'heads.names=["softmax-refit"]']
    assert (resolved(*words).seed, resolved(*words).heads.names) == (8, ("softmax-refit",))
    words += ["--seed", "0", "--heads", "linear-svm"]
    assert (resolved(*words).seed, resolved(*words).heads.names) == (0, ("linear-svm",))


def test_train_saves_the_head_that_is_configured(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    from rcnn_svm import load_detector
    from tests.cli.conftest import TINY

    words = ["--cache", tmp_path / "cache", *TINY, "--no-choice", "--set", 'heads.names=["softmax-refit"]']
    assert run("train", digits_folder, "--out", tmp_path / "a", *words) == 0
    assert load_detector(tmp_path / "a").head == "softmax-refit+bbox"
    words += ["--head", "linear-svm", "--no-bbox"]
    assert run("train", digits_folder, "--out", tmp_path / "b", *words) == 0
    assert load_detector(tmp_path / "b").head == "linear-svm"


def test_train_refuses_two_heads(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = 'heads.names=["linear-svm", "softmax-refit"]'
    assert run("train", tmp_path, "--out", tmp_path / "out", "--set", names) == 2
    assert sentence(capsys) == (
        "rcnn-svm: heads.names: `train` saves the detector of one head, got linear-svm, softmax-refit. "
        "Name one with --head, or train them all with `rcnn-svm compare`."
    )
    assert not (tmp_path / "out").exists()
