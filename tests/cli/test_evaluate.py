"""`evaluate`: which images, which classes, and what is refused."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rcnn_svm.cli import main
from rcnn_svm.datasets import load_dataset, write_dataset
from rcnn_svm.evaluation.exchange import write_coco_results, write_detections
from rcnn_svm.structures import Dataset, Detections, GroundTruth, Image, Sample
from tests.cli.conftest import TINY, Run

COLOURS = {"disc": (220, 40, 40), "bar": (30, 60, 220), "ring": (30, 150, 60)}
SIZE = (72, 96)


def paint(number: int, classes: Sequence[str]) -> Image:
    image = np.random.default_rng(number).integers(160, 220, (*SIZE, 3), dtype=np.uint8)
    for k, name in enumerate(classes):
        image[20:44, 32 * k + 4 : 32 * k + 28] = COLOURS[name]
    return image


def photographs(
    numbers: Sequence[int],
    split: str,
    classes: Sequence[str] = ("disc", "bar"),
    shown: Sequence[str] | None = None,
) -> Dataset:
    """Return images that show an object of each class of `shown`, by default of all."""
    shown = classes if shown is None else shown
    corners = [[32 * k + 4, 20, 32 * k + 28, 44] for k in range(len(shown))]
    truth = GroundTruth(np.array(corners, np.float32), np.array([list(classes).index(n) for n in shown]))
    samples = [
        Sample(f"im{i}", SIZE, truth, render=functools.partial(paint, i, tuple(shown))) for i in numbers
    ]
    return Dataset("photos", split, tuple(classes), tuple(samples))


def perfect(dataset: Dataset) -> list[Detections]:
    return [
        Detections(s.image_id, s.truth.boxes, np.full(len(s.truth), 0.9), s.truth.labels) for s in dataset
    ]


def means(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """Return the figures of the row `mean` and the lines of stderr."""
    captured = capsys.readouterr()
    (mean,) = [line.split()[1:] for line in captured.out.splitlines() if line.startswith("mean")]
    return mean, captured.err.splitlines()


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A COCO data set with two training and two test images."""
    return write_dataset(
        [photographs((0, 1), "train"), photographs((2, 3), "test")], tmp_path / "coco", "coco"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A detector, and the data set with a single split that it was trained on as README says."""
    folder = tmp_path_factory.mktemp("single")
    photos = write_dataset([photographs(range(10), "all")], folder / "photos", "voc")
    shutil.rmtree(photos / "VOC2007" / "ImageSets")
    out = ["--out", str(folder / "detector"), "--cache", str(folder / "cache"), "--no-choice"]
    assert main(["train", str(photos), *out, *TINY]) == 0
    return folder / "detector", photos


def test_the_split_travels_with_the_detector(
    run: Run, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector, photos = folders
    metrics = json.loads((detector / "evaluation" / "metrics.json").read_text())
    for more in ([], ["--split", "test"]):
        assert run("evaluate", detector, photos, "--out", tmp_path, *more) == 0
        mean, lines = means(capsys)
        assert float(mean[0]) == pytest.approx(metrics["heads"]["linear-svm+bbox"]["mAP"], abs=2)
        assert lines[0] == f"{photos}: measured on the 2 images held out from the detector."
    held_out = set(json.loads((detector / "splits.json").read_text())["test"])
    found = json.loads((tmp_path / "detections.json").read_text())["images"]
    assert {image["image_id"] for image in found} == held_out
    assert (tmp_path / "comp4" / "comp4_det_test_disc.txt").exists()
    assert run("evaluate", detector, photos, "--split", "all") == 0
    assert means(capsys)[1] == ["8 of 10 images were trained on: this AP says nothing about new images."]


def test_a_comparison_tells_its_images(run: Run, folders: tuple[Path, Path], tmp_path: Path) -> None:
    detector, photos = folders
    heads = ["--heads", "linear-svm", "--no-choice", "--no-pictures"]
    assert run("compare", photos, "--out", tmp_path / "c", "--cache", tmp_path / "cache", *heads, *TINY) == 0
    assert (tmp_path / "c" / "splits.json").read_bytes() == (detector / "splits.json").read_bytes()


def test_a_detector_that_knows_fewer_classes(
    run: Run, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = ("ring", "disc", "bar")
    parts = [photographs((20,), "train", classes), photographs((21, 22), "test", classes)]
    root = write_dataset(parts, tmp_path / "more", "coco")
    assert run("evaluate", folders[0], root, "--out", tmp_path / "out") == 0
    _, lines = means(capsys)
    assert lines[:2] == [
        f"{root}: none of its images is known to the detector; measured on its test split, 2 images.",
        f"{folders[0]}: does not know the class ring; objects of it that are left out: 2.",
    ]
    assert json.loads((tmp_path / "out" / "detections.json").read_text())["classes"] == ["disc", "bar"]
    assert run("evaluate", folders[0], root, "--classes", "disc") == 0
    assert "bar" not in capsys.readouterr().out
    assert run("evaluate", folders[0], root, "--classes", "ring,disc") == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"the classes of {folders[0]}, got ring.")


def test_data_without_a_class_that_the_detector_knows(
    run: Run, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_dataset([photographs((20,), "test", ("ring",))], tmp_path / "rings", "coco")
    assert run("evaluate", folders[0], root) == 3
    assert capsys.readouterr().err.splitlines()[-1].endswith("labels ring. Give the classes the same names.")


@pytest.mark.parametrize("order", [("disc", "bar"), ("bar", "disc")])
def test_classes_of_files_are_matched_by_name(
    run: Run, coco: Path, tmp_path: Path, order: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    test = load_dataset(coco, "test")
    file = tmp_path / "detections.json"
    write_detections(file, perfect(test.with_classes(("bar", "disc"))), ("bar", "disc"))
    assert run("evaluate", file, coco, "--classes", ",".join(order), "--out", tmp_path / "out") == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:4]]
    assert rows == ["class", *order, "mean"]
    # The labels are COCO's, so its results format is written too, with its numbers, and read back.
    assert run("evaluate", tmp_path / "out" / "coco_results.json", coco) == 0
    assert means(capsys)[0] == ["100.0"] * 5
    assert run("evaluate", tmp_path / "out" / "comp4", coco, "--classes", "bar") == 0
    assert means(capsys)[0] == ["100.0"] * 5
    assert run("evaluate", tmp_path / "out" / "detections.json", coco) == 0
    assert means(capsys)[0] == ["100.0"] * 5


@pytest.mark.parametrize("name", ["results.json", "detections.json"])
def test_a_class_that_there_is_not(
    run: Run, coco: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    test = load_dataset(coco, "test")
    write_coco_results(coco / "results.json", perfect(test), [1, 2], {"im2": 1, "im3": 2})
    write_detections(coco / "detections.json", perfect(test), test.classes)
    assert run("evaluate", coco / name, coco, "--classes", "disc,bar,zebra") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"rcnn-svm: --classes: must be some of disc, bar, the classes of {coco / name}, got zebra."
    )
    assert run("evaluate", coco / name, coco, "--classes", "disc,disc") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "detections.json", "data", "--max-images", "1"],
        ["evaluate", "detections.json", "data", "--skip-absent-classes"],
        ["propose", "data", "--skip-absent-classes"],
    ],
)
def test_options_without_an_effect_do_not_exist(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_an_image_that_is_listed_twice(run: Run, coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = load_dataset(coco, "test")
    file = coco / "detections.json"
    write_detections(file, [*perfect(test), Detections.empty("im2")], test.classes)
    assert run("evaluate", file, coco) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"rcnn-svm: {file}, image 2: must be an image of its own, got 'im2' once more. Remove one."
    )


def test_a_split_with_a_year_and_ids_that_are_texts(
    run: Run, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in sorted((coco / "annotations").iterdir()):
        content = json.loads(file.read_text())
        for record in content["images"]:
            record["id"] = f"img_{record['id']}"
        for annotation in content["annotations"]:
            annotation["image_id"] = f"img_{annotation['image_id']}"
        file.with_name(f"{file.stem}2017.json").write_text(json.dumps(content))
        file.unlink()
    test = json.loads((coco / "annotations" / "instances_test2017.json").read_text())
    keys = ("image_id", "category_id", "bbox")
    results = [{key: one[key] for key in keys} | {"score": 0.9} for one in test["annotations"]]
    (tmp_path / "results.json").write_text(json.dumps(results))
    for more in ([], ["--split", "test"], ["--split", "test2017"]):
        assert run("evaluate", tmp_path / "results.json", coco, *more) == 0
        assert means(capsys)[0] == ["100.0"] * 5


def test_files_want_a_split_that_there_is(
    run: Run, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, photos = folders
    everything = load_dataset(photos, "all")
    file = tmp_path / "detections.json"
    write_detections(file, perfect(everything), everything.classes)
    assert run("evaluate", file, photos) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("has no split 'test', only all. Name one that it has, such as 'all'.")
    assert run("evaluate", file, photos, "--split", "all") == 0
    assert means(capsys)[0] == ["100.0"] * 5


def test_a_quick_look_keeps_the_class_of_one_image(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = ("disc", "bar", "ring")
    train = photographs(range(4), "train", classes, ("disc", "bar"))
    ring = photographs((1,), "train", classes).samples
    train = Dataset("photos", "train", classes, (train.samples[0], *ring, *train.samples[2:]))
    parts = [train, photographs((4,), "val", classes), photographs((5,), "test", classes)]
    root = write_dataset(parts, tmp_path / "photos", "voc")
    out = tmp_path / "detector"
    few = ["--out", out, "--cache", tmp_path / "cache", "--no-choice", "--max-images", "2"]
    assert run("train", root, *few, *TINY) == 0
    assert "im1" in json.loads((out / "splits.json").read_text())["train"]
    assert json.loads((out / "detector.json").read_text())["classes"] == list(classes)


def test_a_report_about_somebody_elses_results(
    run: Run, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test, out = load_dataset(coco, "test"), tmp_path / "report"
    found = [replace(one, labels=one.labels[::-1]) if i else one for i, one in enumerate(perfect(test))]
    results = tmp_path / "theirs.json"
    write_coco_results(results, found, [1, 2], {"im2": 1, "im3": 2})
    assert run("evaluate", results, coco, "--report", out) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"Report: {out / 'report.html'}"
    page = (out / "report.html").read_text()
    assert "theirs.json on " in page
    assert "thresholds chosen on these very images (best F1)" in page
    confusion = (out / "confusion.csv").read_text().splitlines()
    assert sorted(confusion[1:]) == ["bar,bar,1", "bar,disc,1", "disc,bar,1", "disc,disc,1"]
    assert run("evaluate", results, coco, "--report", out, "--threshold", "7") == 0
    said = capsys.readouterr().err
    assert "No detection reaches --threshold 7: the surest is " in said
    assert (out / "confusion.csv").read_text().splitlines()[1:] == ["disc,missed,2", "bar,missed,2"]
    assert run("evaluate", results, coco, "--threshold", "7") == 2
    assert "--threshold is of the report: give --report DIR too." in capsys.readouterr().err


def test_labels_that_are_not_cocos_get_a_data_file_that_pycocotools_reads(
    run: Run, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco_module = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    assert run("evaluate", *folders, "--out", tmp_path, "--report", tmp_path / "report") == 0
    assert "of the detector" in (tmp_path / "report" / "report.html").read_text()
    truth = coco_module.COCO(str(tmp_path / "coco_data.json"))
    judged = cocoeval.COCOeval(truth, truth.loadRes(str(tmp_path / "coco_results.json")), "bbox")
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    own = json.loads((tmp_path / "evaluation.json").read_text())["coco"]["summary"]
    assert 100 * judged.stats[0] == pytest.approx(own["AP"], abs=1e-6)
