"""The verbs in the order in which a user meets them, on a data set of a few scenes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn_svm.errors import ConfigError
from rcnn_svm.report.tables import LOCALISATION
from tests.cli.conftest import TINY, Run, array_file


def test_train_leaves_a_whole_detector_and_its_figures(detector_folder: Path) -> None:
    assert {p.name.partition(".")[0] for p in detector_folder.iterdir()} == {
        "README",
        "backbone",
        "config",
        "detector",
        "evaluation",
        "head",
        "splits",
    }
    metrics = json.loads((detector_folder / "evaluation" / "metrics.json").read_text())
    assert metrics["schema"] == 1
    assert set(metrics["heads"]) == {"linear-svm", "linear-svm+bbox"}
    for head in metrics["heads"].values():
        assert 0 <= head["mAP"] <= 100
        low, high = head["mAP_interval"]
        assert low <= head["mAP"] <= high
        assert all(0 <= head["coco"][name] <= 100 for name in ("AP", "AP50", "AP75"))
    page = (detector_folder / "evaluation" / "README.md").read_text()
    assert "These were decided on images held out of a first training" in page
    assert LOCALISATION in page
    assert set(metrics["stages_s"]) >= {"proposals", "features", "train", "detect"}
    assert (detector_folder / "evaluation" / "report.html").stat().st_size > 10_000


def test_detect_draws_and_writes_what_evaluate_reads(
    run: Run, detector_folder: Path, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = digits_folder / "images" / "test"
    assert run("detect", detector_folder, images, "--out", tmp_path / "found", "--all") == 0
    found = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert len(found["images"]) == 5
    assert len(list((tmp_path / "found").glob("*.png"))) == 5
    capsys.readouterr()
    assert run("evaluate", detector_folder, digits_folder, "--out", tmp_path / "a") == 0
    by_detector = capsys.readouterr().out
    lines = by_detector.splitlines()
    assert lines[0].split() == ["class", "VOC07", "VOC10", "COCO", "AP", "AP50", "AP75"]
    assert len({len(line) for line in lines[:12]}) == 1
    (summary,) = [line.split() for line in lines if line.startswith("COCO: ")]
    mean = lines[11].split()
    assert mean[0] == "mean"
    assert mean[3:] == [summary[summary.index(name) + 1] for name in ("AP", "AP50", "AP75")]
    assert run("evaluate", tmp_path / "found" / "detections.json", digits_folder) == 0
    assert capsys.readouterr().out == by_detector
    assert run("evaluate", tmp_path / "a" / "comp4", digits_folder) == 0
    assert capsys.readouterr().out == by_detector


def test_a_saved_detector_finds_what_the_trained_one_found(
    detector_folder: Path, digits_folder: Path, tmp_path: Path
) -> None:
    """Nothing of test is rounded; where other crops are multiplied together their last bits differ."""
    from rcnn_svm import load_dataset, load_detector
    from rcnn_svm.evaluation.voc import evaluate_voc

    dataset = load_dataset(digits_folder, "test")
    detector = load_detector(detector_folder)
    found = list(detector.detect_all(dataset.samples))
    value = 100 * evaluate_voc(found, [s.truth for s in dataset], dataset.classes).map()
    metrics = json.loads((detector_folder / "evaluation" / "metrics.json").read_text())
    assert value == pytest.approx(metrics["heads"]["linear-svm+bbox"]["mAP"], abs=0.5)
    one = detector.detect(dataset.samples[0].read(), dataset.samples[0].image_id)
    np.testing.assert_array_equal(one.boxes, found[0].boxes)


def test_a_detector_that_is_not_finite_is_not_saved(detector_folder: Path, tmp_path: Path) -> None:
    from rcnn_svm import load_detector
    from rcnn_svm.errors import DataError

    detector = load_detector(detector_folder)
    broken = detector.model.scorer.coef.copy()
    broken[0, 0] = np.inf
    object.__setattr__(detector.model.scorer, "coef", broken)
    with pytest.raises(DataError, match=r"^Detector linear-svm.*: scorer\.coef must be finite, got 1 of"):
        detector.save(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_detector_that_could_not_be_read_back_is_not_saved(detector_folder: Path, tmp_path: Path) -> None:

    from rcnn_svm import load_detector
    from rcnn_svm.heads.scorers import LinearScorer

    class Own(LinearScorer):
        pass

    class NearestMean(Own):
        kind = "nearest-mean"

    detector = load_detector(detector_folder)
    arrays = detector.model.scorer.to_arrays()
    own = replace(detector, model=replace(detector.model, scorer=Own.from_arrays(arrays)))
    with pytest.raises(
        ConfigError, match=r"Own would be read back as LinearScorer\. Give it a `kind` of its"
    ):
        own.save(tmp_path / "own")
    assert not (tmp_path / "own").exists()
    named = replace(detector, model=replace(detector.model, scorer=NearestMean.from_arrays(arrays)))
    named.save(tmp_path / "named")
    again = load_detector(tmp_path / "named", parts={"nearest-mean": NearestMean})
    assert type(again.model.scorer) is NearestMean


def test_a_save_that_is_cut_short_leaves_the_old_detector_or_the_new_one(
    detector_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each rename and each removal, over a detector of other classes and arrays."""
    from dataclasses import replace as changed

    from rcnn_svm import load_detector

    old = load_detector(detector_folder)
    arrays = {name: 2 * array for name, array in old.model.scorer.to_arrays().items()}
    scorer = type(old.model.scorer).from_arrays(arrays)
    classes = tuple(f"new {k}" for k in old.classes)
    new = changed(old, classes=classes, thresholds=None, model=changed(old.model, scorer=scorer))
    real_replace, real_unlink, outcomes = os.replace, Path.unlink, []
    for n_steps in range(12):
        folder, left = tmp_path / str(n_steps), [n_steps]
        shutil.copytree(detector_folder, folder)

        def step(left: list[int] = left) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1

        def cut_replace(source: object, target: object, step: object = step) -> None:
            step()  # type: ignore[operator]
            real_replace(source, target)  # type: ignore[arg-type]

        def cut_unlink(path: Path, missing_ok: bool = False, step: object = step) -> None:
            if not path.name.startswith("."):
                step()  # type: ignore[operator]
            real_unlink(path, missing_ok=missing_ok)

        monkeypatch.setattr(os, "replace", cut_replace)
        monkeypatch.setattr(Path, "unlink", cut_unlink)
        with contextlib.suppress(KeyboardInterrupt):
            new.save(folder)
        monkeypatch.undo()
        found = load_detector(folder)
        assert found.classes in (old.classes, new.classes)
        wanted = old if found.classes == old.classes else new
        np.testing.assert_array_equal(found.model.scorer.coef, wanted.model.scorer.coef)
        outcomes.append(found.classes == new.classes)
    assert outcomes == sorted(outcomes)
    assert not outcomes[0]
    assert outcomes[-1]
    assert len(list(folder.glob("head.*"))) == 1


def test_an_interrupted_comparison_leaves_no_figures_of_an_earlier_one(
    run: Run, digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rcnn_svm.experiment import recipe
    from rcnn_svm.report import experiment

    def stop(*arguments: object, **words: object) -> None:
        raise KeyboardInterrupt

    words = ["compare", digits_folder, "--out", tmp_path / "out", "--cache", tmp_path / "cache", *TINY]
    words += ["--heads", "linear-svm", "--no-choice", "--no-pictures"]
    for module, name in ((experiment, "write_tables"), (recipe, "propose")):
        assert run(*words) == 0
        assert (tmp_path / "out" / "metrics.json").exists()
        with monkeypatch.context() as context:
            context.setattr(module, name, stop)
            assert run(*words) == 130
        assert not (tmp_path / "out" / "metrics.json").exists()


def test_detecting_loads_no_scikit_learn(detector_folder: Path, digits_folder: Path) -> None:
    image = sorted((digits_folder / "images" / "test").iterdir())[0]
    code = (
        "import sys\n"
        "from rcnn_svm import load_detector, read_image\n"
        f"found = load_detector({str(detector_folder)!r}).detect(read_image({str(image)!r}))\n"
        "print(len(found) > 0, 'sklearn' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]


def test_compare_reports_every_head(
    run: Run, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = "linear-svm,rbf-svm,softmax-refit"
    arguments = ["--heads", heads, "--out", tmp_path / "c", "--cache", tmp_path / "cache", *TINY]
    assert run("compare", digits_folder, *arguments) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("Found:") for line in lines)
    assert f"Report: {tmp_path / 'c' / 'report.html'}" in " ".join(" ".join(lines).split())
    assert any(line.startswith("Cache:") for line in lines)
    metrics = json.loads((tmp_path / "c" / "metrics.json").read_text())
    assert set(metrics["heads"]) == {h + s for h in heads.split(",") for s in ("", "+bbox")}
    assert metrics["heads"]["rbf-svm+bbox"]["about"] == {
        "family": "svm",
        "kernel": "rbf",
        "boxes": True,
        "base": "rbf-svm",
    }
    for name in (
        "comparison.md",
        "comparison.csv",
        "per_class.csv",
        "README.md",
        "report.html",
        "config.json",
    ):
        assert (tmp_path / "c" / name).stat().st_size > 0


def test_the_same_command_gives_the_same_results(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    values = []
    for name in ("a", "b"):
        arguments = ["--out", tmp_path / name, "--cache", tmp_path / f"cache-{name}", *TINY]
        assert run("train", digits_folder, *arguments) == 0
        values.append(array_file(tmp_path / name).read_bytes())
    assert values[0] == values[1]


def test_data_check_writes_words_a_picture_and_json(
    run: Run, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, values = tmp_path / "report.png", tmp_path / "report.json"
    assert run("data", "check", digits_folder, "--plot", picture, "--json", values) == 0
    words = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    defects = json.loads(values.read_text())["defects"]
    assert {one["kind"] for one in defects} == {"missing-class"}
    assert all(one["message"] in words for one in defects)


def test_extract_is_one_line(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    image = sorted((digits_folder / "images" / "test").iterdir())[0]
    network = ["--backbone", "small_cnn", "--weights", "random"]
    assert run("extract", image, *network, "--taps", "fc7", "--out", tmp_path / "fc7.npy") == 0
    assert np.load(tmp_path / "fc7.npy").shape == (1, 256)
    boxes = tmp_path / "boxes.json"
    assert run("propose", image, "--out", boxes, "--max-regions", "7", "--cache", tmp_path / "cache") == 0
    out = tmp_path / "all.safetensors"
    assert run("extract", image, *network, "--boxes", boxes, "--out", out) == 0
    from safetensors.numpy import load_file

    assert load_file(out)[image.stem].shape == (7, 256)


def test_propose_reports_recall(
    run: Run, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("propose", digits_folder, "--min-size", "10", "--cache", tmp_path) == 0
    text = capsys.readouterr().out
    assert text.startswith("5 images, ")
    assert "MABO" in text


def test_layers_names_the_famous_matrix(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("layers", "vgg16") == 0
    assert "25088 x 4096" in capsys.readouterr().out


def test_images_are_read_whatever_they_are(run: Run, detector_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    grey = np.random.default_rng(0).integers(0, 255, (60, 80), dtype=np.uint8)
    Image.fromarray(grey).save(folder / "grey.jpg")
    Image.fromarray(np.dstack([grey] * 4)).save(folder / "alpha.png")
    (folder / "alpha.png").rename(folder / "named-wrongly.jpg")
    Image.fromarray(grey[:1, :1]).save(folder / "pixel.png")
    assert run("detect", detector_folder, folder, "--out", tmp_path / "found") == 0
    found = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert [image["image_id"] for image in found["images"]] == ["grey", "named-wrongly", "pixel"]


def test_a_folder_shows_every_image_that_can_be_read(tmp_path: Path) -> None:
    from rcnn_svm.cli.images import open_images
    from rcnn_svm.datasets.images import IMAGE_SUFFIXES

    pixels = Image.fromarray(np.zeros((3, 4, 3), np.uint8))
    for suffix in IMAGE_SUFFIXES:
        pixels.save(tmp_path / f"{suffix[1:]}{suffix.upper()}", format="PNG")
    (tmp_path / "notes.txt").touch()
    assert {sample.image_id for sample in open_images([tmp_path])} == {s[1:] for s in IMAGE_SUFFIXES}


def test_the_scripts_are_the_command() -> None:
    for script, verb in (("train_svm.py", "train"), ("compare_heads.py", "compare")):
        path = Path(__file__).parents[2] / "scripts" / script
        result = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True)
        assert f" {verb} " in result.stdout


def test_a_dry_run_costs_nothing(
    run: Run, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", tmp_path / "out", "--cache", tmp_path / "cache", *TINY, "--dry-run"]
    assert run("train", digits_folder, *arguments) == 0
    text = capsys.readouterr().out
    assert "MB on disk" in text
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_an_estimate_counts_every_view(digits_folder: Path, tmp_path: Path) -> None:
    from rcnn_svm import ExperimentConfig, load_splits
    from rcnn_svm.config import with_overrides
    from rcnn_svm.experiment.parts import Run
    from rcnn_svm.experiment.recipe import estimate_experiment

    network = ["features.backbone=small_cnn", "features.weights=random", "features.path=warped"]
    settings = [*network, "features.taps=fc7", "proposals.max_regions=60", "fc.background=9999"]
    splits, n_bytes = load_splits(digits_folder), []
    single = ['heads.names=["softmax-finetuned"]', "choose=false"]
    for more in ([], ["fc.mirror=true"], ["test_regions=10"], single):
        config = with_overrides(ExperimentConfig(), None, [*settings, *more])
        n_bytes.append([e.n_bytes for e in estimate_experiment(config.build(), splits, Run(tmp_path))])
    (images, test), (both, _), (_, few), (_, once) = n_bytes
    assert once == 0 < few
    assert images < both <= 2 * images  # ignored regions are not mirrored
    assert both > 1.8 * images
    assert few < test / 3


def test_finetuned_weights_are_read_back(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "tuned.safetensors"
    network = ["--backbone", "small_cnn", "--weights", "random", "--set", "features.path=warped"]
    few = [
        "--set",
        "finetune.n_steps=3",
        "--set",
        "finetune.batch_size=8",
        "--set",
        "proposals.max_regions=40",
    ]
    assert run("finetune", digits_folder, "--out", weights, "--cache", tmp_path, *network, *few) == 0
    image = sorted((digits_folder / "images" / "test").iterdir())[0]
    out = tmp_path / "logits.npy"
    assert (
        run(
            "extract",
            image,
            "--backbone",
            "small_cnn",
            "--weights",
            weights,
            "--taps",
            "logits",
            "--out",
            out,
        )
        == 0
    )
    assert np.load(out).shape == (1, 11)
    config = json.loads((tmp_path / "tuned.config.json").read_text())
    assert config["finetune"]["n_steps"] == 3


def test_proposals_are_drawn(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    assert (
        run("propose", digits_folder, "--max-images", "1", "--plot", tmp_path / "p", "--cache", tmp_path) == 0
    )
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert len(names) == 3
    assert names[0] == "recall.png"


def test_ten_lines_of_python(digits_folder: Path, tmp_path: Path) -> None:
    from rcnn_svm import ExperimentConfig, load_detector, load_splits, read_image, train_detector
    from rcnn_svm.config import with_overrides

    settings = [text for flag, text in itertools.pairwise(TINY) if flag == "--set"]
    network = ["features.backbone=small_cnn", "features.weights=random", "features.path=warped"]
    config = with_overrides(
        ExperimentConfig(), None, [*network, "features.taps=fc7", "learn=nothing", *settings]
    )
    splits = load_splits(digits_folder)
    result = train_detector(splits, config.build(heads=["linear-svm"]))
    result.detector.save(tmp_path / "detector")
    image = read_image(sorted((digits_folder / "images" / "test").iterdir())[0])
    detector = load_detector(tmp_path / "detector")
    assert detector.info["data"] == splits.train.name
    found = detector.detect(image)
    assert len(found) > 0
    assert (np.diff(found.scores) <= 0).all()


def test_tuning_the_trunk_without_choosing_leaves_a_detector_that_reads_mirror_images(
    run: Run, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rcnn_svm import load_detector

    small = ["--backbone", "mobilenet_v2", "--weights", "random", "--path", "shared", "--learn", "trunk"]
    small += ["--taps", "block16@1x1,block17@1x1", "--set", "features.longer_sides=[64]"]
    small += ["--set", "fc.n_steps=3", "--set", "fc.hidden=[8]", "--set", "trunk.first_layer=block17"]
    small += ["--set", "trunk.n_steps=2", "--set", "trunk.images=2", "--set", "folds=0"]
    small += ["--set", "features.mirror=true", "--set", "features.precision=float32"]
    small += ["--set", "test_regions=30", "--set", "detect.second_look=10"]
    out = tmp_path / "out"
    small += ["--head", "linear-svm"]
    arguments = ["train", digits_folder, "--out", out, "--cache", tmp_path / "cache", *TINY, *small]
    assert run(*arguments) == 0
    metrics = json.loads((out / "evaluation" / "metrics.json").read_text())
    assert metrics["heads"]["linear-svm+bbox"]["details"]["val_map"] is None
    page = (out / "evaluation" / "README.md").read_text()
    assert "No setting was chosen on these images: all were fixed beforehand." in page
    assert "measuring on val" not in page
    assert metrics["stages_s"]["choose"] < 1
    assert load_detector(out).n_proposals == 30
    # The saved detector finds what the experiment found from stored features.
    assert run("evaluate", out, digits_folder) == 0
    (mean,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("mean")]
    assert float(mean[1]) == pytest.approx(metrics["heads"]["linear-svm+bbox"]["mAP"], abs=0.06)


def test_a_saved_detector_refines_boxes_as_the_experiment_did(digits_folder: Path, tmp_path: Path) -> None:
    from rcnn_svm import ExperimentConfig, Run, load_detector, load_splits, train_detector
    from rcnn_svm.config import with_overrides
    from rcnn_svm.proposals import regions_of

    small = ["features.backbone=mobilenet_v2", "features.weights=random", "features.taps=block17@1x1"]
    small += ["features.longer_sides=[64]", "features.mirror=true", "features.precision=float32"]
    small += ["fc.n_steps=3", "fc.hidden=[8]", "folds=0", "proposals.max_regions=40", "detect.refined=12"]
    config = with_overrides(ExperimentConfig(), None, [*small, "refine.hidden=8", "refine.n_steps=3"])
    splits = load_splits(digits_folder)
    result = train_detector(splits, config.build(heads=["softmax-finetuned"]), run=Run(tmp_path / "cache"))
    result.detector.save(tmp_path / "detector")
    detector = load_detector(tmp_path / "detector")
    assert detector.model.refinement is not None
    for sample, expected in zip(splits.test, result.detections, strict=True):
        found = detector.detect(sample.read(), sample.image_id)
        assert 0 < len(found) <= 12
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)
        traced, regions = detector.trace(sample.read(), sample.image_id)
        np.testing.assert_array_equal(traced.boxes, found.boxes)
        np.testing.assert_array_equal(traced.scores, found.scores)
        proposals = {
            tuple(box) for box in regions_of(detector.proposer, sample.read(), sample.image_id).boxes
        }
        assert {tuple(box) for box in regions} <= proposals


def test_learning_from_other_views_with_no_head_that_reads_all_regions(
    run: Run, digits_folder: Path, tmp_path: Path
) -> None:
    from rcnn_svm import load_splits

    small = ["--backbone", "mobilenet_v2", "--weights", "random", "--path", "shared", "--learn", "fc"]
    small += ["--taps", "block17@1x1", "--set", "features.longer_sides=[64]", "--set", "fc.n_steps=3"]
    small += ["--set", "fc.hidden=[8]", "--set", "fc.background=5", "--set", "folds=0"]
    splits = load_splits(digits_folder)
    found = []
    for n_views, settings in (
        (1, ["--set", "fc.other_sides=[]"]),
        (2, ["--set", "fc.mirror=true", "--set", "fc.other_sides=[]"]),
        (3, ["--set", "fc.mirror=true", "--set", "fc.other_sides=[96]"]),
    ):
        cache, out = tmp_path / f"cache{n_views}", tmp_path / f"out{n_views}"
        arguments = ["train", digits_folder, "--out", out, "--cache", cache, *TINY, *small, *settings]
        assert run(*arguments, "--head", "softmax-finetuned") == 0
        found.append(json.loads((out / "evaluation" / "metrics.json").read_text())["heads"])
        # Every view of trainval; no rows of all its background, and none of test, which is read once.
        n_files = len(list((cache / "features").rglob("*.npy")))
        assert n_files == n_views * len(splits.trainval)
    assert all(set(heads) == {"softmax-finetuned", "softmax-finetuned+bbox"} for heads in found)
    assert len({array_file(tmp_path / f"out{n}").read_bytes() for n in (1, 2, 3)}) == 3
