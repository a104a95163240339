"""The study of a network's parts: what is drawn and held equal, resumed, said and refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rcnn_svm.cli import main
from rcnn_svm.datasets.digits import single_digits
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.experiment.cnn_study import (
    BASE,
    FACTORS,
    Augmentation,
    CnnDesign,
    CnnFactor,
    CnnStudy,
    Variant,
    _draw,
    _train,
    run_cnn_study,
)
from rcnn_svm.report.cnn_study import cnn_verdict, write_cnn_study

TINY = CnnDesign(n_seeds=2, n_choosing=1, per_class=5, held_out=2, n_epochs=1, rates=(0.01, 10.0))
PARTS = {
    "activation": replace(FACTORS["activation"], variants=FACTORS["activation"].variants[:1]),
    "last layer": replace(FACTORS["last layer"], variants=FACTORS["last layer"].variants[1:]),
}
TIMES = ("wall_s", "cpu_s")


def records(folder: Path) -> list[dict]:
    lines = (folder / "runs.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CnnStudy]:
    folder = tmp_path_factory.mktemp("cnn")
    return folder, run_cnn_study(folder, TINY, factors=PARTS)


def test_every_seed_has_digits_of_its_own_and_of_every_class_as_many() -> None:
    drawn = _draw(CnnDesign())
    seen = {image.numpy().tobytes() for images, _ in drawn for image in images}
    assert len(seen) == 5 * 200
    for images, labels in drawn:
        assert images.shape == (200, 1, 32, 32)
        assert 0 <= images.min() <= images.max() <= 1
        assert labels[:20].tolist() == [*range(10)] * 2
    test, _ = single_digits("val", "test")
    assert len(test) == 719
    train = {one.tobytes() for one in single_digits("train")[0]}
    assert len(train & {one.tobytes() for one in test}) == 0


def test_only_the_part_that_is_studied_differs(finished: tuple[Path, CnnStudy]) -> None:
    for factor in FACTORS.values():
        for variant in factor.variants:
            own = {"factor", "level"}
            others = {name for name in vars(variant) if getattr(variant, name) != getattr(BASE, name)} - own
            assert len(others) == 1, variant.name
    _, study = finished
    shapes = {one.variant.name: one.runs[0].n_parameters for one in study.comparisons}
    assert shapes[BASE.name] - shapes["activation: ReLU"] == 16 + 48 + 96  # the slopes
    assert shapes["last layer: linear SVM on fc7"] == shapes[BASE.name]


def test_a_study_measures_what_its_predictions_say(finished: tuple[Path, CnnStudy]) -> None:
    _, study = finished
    truth = single_digits("val", "test")[1]
    by_name = {one.variant.name: one for one in study.comparisons}
    right = {
        name: np.array(
            [[int(a) == b for a, b in zip(run.predictions, truth, strict=True)] for run in one.runs]
        )
        for name, one in by_name.items()
    }
    for name, one in by_name.items():
        assert one.accuracy.mean.value == pytest.approx(right[name].mean())
        if one.change is not None:
            assert one.change.mean.value == pytest.approx(right[name].mean() - right[BASE.name].mean())
            assert one.p_holm >= one.change.p
        assert "-" not in one.runs[0].predictions  # the rate that diverges was not chosen
    assert by_name["last layer: RBF SVM on fc7"].accuracy.mean.value > 0.3  # on a network hardly trained


def test_a_killed_study_goes_on_where_it_was(finished: tuple[Path, CnnStudy], tmp_path: Path) -> None:
    whole = (finished[0] / "runs.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(lines[:-4]) + lines[-4][:30])
    again = run_cnn_study(tmp_path, TINY, factors=PARTS)
    assert records(tmp_path) == records(finished[0])
    assert cnn_verdict(again) == cnn_verdict(finished[1])
    more = replace(TINY, rates=(0.01, 0.02, 10.0))
    run_cnn_study(tmp_path, more, factors=PARTS)  # a finer grid trains what is new
    run_cnn_study(tmp_path, TINY, factors=PARTS)
    assert records(tmp_path) == records(finished[0])
    with pytest.raises(DataError, match=r"runs\.jsonl: must hold the runs of this study, got those of"):
        run_cnn_study(tmp_path, replace(TINY, seed=1), factors=PARTS)
    (tmp_path / "runs.jsonl").write_text(lines[0] + "{}\n")
    with pytest.raises(DataError, match="a line is damaged"):
        run_cnn_study(tmp_path, TINY, factors=PARTS)


def test_training_leaves_the_random_numbers_and_threads_of_others_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected, n_threads = torch.rand(1), torch.get_num_threads()
    torch.manual_seed(3)
    run_cnn_study(tmp_path, TINY, factors={})
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == n_threads


def test_a_training_that_diverges_gets_nothing_right(tmp_path: Path) -> None:
    digits = _draw(TINY)[0]
    trained = _train(
        replace(BASE, loss=lambda logits, labels: logits.sum() * float("nan")), 0.1, 0, TINY, digits
    )
    assert trained.diverged
    wild = CnnFactor(
        "?", "softmax", [Variant("last layer", "wild", loss=lambda a, b: a.sum() * float("nan"))]
    )
    study = run_cnn_study(tmp_path, TINY, factors={"last layer": wild})
    assert study.comparisons[1].accuracy.mean.value == 0
    write_cnn_study(tmp_path, study, command="rcnn-svm study cnn")
    assert json.loads((tmp_path / "study.json").read_text())["variants"][1]["diverged"] == 2


@pytest.mark.parametrize(
    ("augmentation", "moved"),
    [
        (Augmentation(), lambda x: x),
        (Augmentation(flip=1.0), lambda x: x.flip(3)),
    ],
)
def test_images_are_left_alone_or_mirrored(augmentation: Augmentation, moved) -> None:
    images = torch.rand(3, 1, 32, 32)
    got = augmentation(images, torch.Generator().manual_seed(0))
    assert torch.allclose(got, moved(images), atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [{"shift": 0.1}, {"rotation": 12.0}, {"scale": 0.15}, {"noise": 0.1}],
    ids=lambda how: next(iter(how)),
)
def test_images_are_changed_a_little_and_each_in_another_way(how: dict[str, float]) -> None:
    ramp = torch.linspace(0, 1, 16)
    square = torch.zeros(1, 1, 32, 32)
    square[..., 8:24, 8:24] = ramp[:, None] * ramp
    images = square.expand(40, -1, -1, -1)
    got = Augmentation(**how)(images, torch.Generator().manual_seed(0))
    rows = torch.arange(32.0)
    mass = got.sum((1, 2, 3))
    centre = (got.sum((1, 3)) * rows).sum(1) / mass
    assert not torch.allclose(got[0], got[1])
    assert (got - images).abs().mean() < 0.12
    if "shift" in how:  # up to a tenth of 32 pixels
        off = centre - (images.sum((1, 3)) * rows).sum(1) / images.sum((1, 2, 3))
        assert 2 < off.abs().max() < 3.3
    if "scale" in how:
        share = (mass / images.sum((1, 2, 3))).sqrt()
        assert 0.84 < share.min() < 0.95
        assert 1.05 < share.max() < 1.16


def test_what_is_left_behind(finished: tuple[Path, CnnStudy], capsys: pytest.CaptureFixture[str]) -> None:
    folder, study = finished
    words = write_cnn_study(folder, study, command="rcnn-svm study cnn --out x")
    kept = json.loads((folder / "study.json").read_text())
    assert kept["verdict"] == words
    assert len(words) == 2
    assert words[0].startswith("What does PReLU do? Against `PReLU`: ")
    with open(folder / "variants.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["level"] for row in rows] == [row["level"] for row in kept["variants"]]
    assert len(rows) == 1 + 1 + 3
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "changes.svg", "curves.csv", "curves.svg", "runs.jsonl", "study.json", "variants.csv")
    }
    page = (folder / "README.md").read_text()
    assert all(sentence in page for sentence in words)


def test_designs_and_options_that_cannot_work_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="held_out must be less than per_class, 20, got 20"):
        CnnDesign(held_out=20)
    with pytest.raises(ConfigError, match="n_choosing must be at most n_seeds, 5, got 6"):
        CnnDesign(n_choosing=6)
    with pytest.raises(ConfigError, match="n_seeds must be at least 2, got 1"):
        CnnDesign(n_seeds=1)
    with pytest.raises(ConfigError, match=r"must be at most \d+, the digits \d to train on, got 5 x 22"):
        _draw(CnnDesign(per_class=22))
    words = ["study", "cnn", "--out", str(tmp_path / "s")]
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--factors", "label"])
    assert "rcnn-svm study cnn: error: unrecognized arguments: --factors label" in capsys.readouterr().err
    assert main([*words, "--seed", "-1"]) == 2
    assert not (tmp_path / "s").exists()
