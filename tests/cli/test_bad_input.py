"""Every wrong input: one clear sentence, the right exit code, nothing half-written."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn_svm import cli
from rcnn_svm.cli import main
from tests.cli.conftest import TINY, Run, array_file


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the last line of stderr, which must be the only one that speaks of an error."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("rcnn-svm: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A copy of a small VOC data set that a test may break."""
    folder = tmp_path / "voc"
    sizes = ["--train", "14", "--val", "3", "--test", "3"]
    assert main(["data", "digits", "--out", str(folder), *sizes]) == 0
    return folder


@pytest.fixture(scope="module")
def detector(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    arguments = ["train", digits_folder, "--out", folder / "out", "--cache", folder / "cache", *TINY]
    assert main([str(argument) for argument in [*arguments, "--no-choice"]]) == 0
    return folder / "out"


def train(run: Run, data: Path, tmp_path: Path) -> int:
    return run("train", data, "--out", tmp_path / "out", "--cache", tmp_path / "cache", *TINY)


def test_a_missing_image(run: Run, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = sorted(voc.rglob("*.png"))[0]
    victim.unlink()
    assert train(run, voc, tmp_path) == 3
    assert victim.stem in sentence(capsys)
    assert not (tmp_path / "out" / "detector.json").exists()


def test_a_truncated_image(run: Run, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = sorted(voc.rglob("*.png"))[0]
    victim.write_bytes(victim.read_bytes()[:2000])
    assert train(run, voc, tmp_path) == 3
    assert victim.name in sentence(capsys)


def test_bad_images_are_left_out_if_asked(
    run: Run, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, cut = sorted(voc.rglob("train-*.png"))[:2]
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:2000])
    out = tmp_path / "out"
    assert run("train", voc, "--out", out, "--skip-bad", "--skip-absent-classes", "--dry-run", *TINY) == 0
    assert "Left out 2 images, the first: " in capsys.readouterr().err


def test_a_page_of_html_among_the_images_is_named(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_text("<html>404</html>")
    assert run("propose", tmp_path, "--out", tmp_path / "boxes.json", "--cache", tmp_path / "cache") == 3
    assert "b.jpg: must be an image" in sentence(capsys)


def test_broken_xml(run: Run, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = sorted(voc.rglob("*.xml"))[0]
    victim.write_text(victim.read_text()[:80])
    assert train(run, voc, tmp_path) == 3
    assert victim.name in sentence(capsys)


def test_broken_json(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "coco"
    sizes = ["--train", "3", "--val", "2", "--test", "2"]
    assert run("data", "digits", "--out", folder, "--format", "coco", *sizes) == 0
    victim = sorted(folder.rglob("*.json"))[0]
    victim.write_text(victim.read_text()[:50])
    assert train(run, folder, tmp_path) == 3
    assert victim.name in sentence(capsys)


def test_a_class_without_a_positive(
    run: Run, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (voc / "VOC2007" / "classes.txt").write_text("\n".join("0123456789") + "\nzebra\n")
    assert train(run, voc, tmp_path) == 3
    text = sentence(capsys)
    assert "every class needs an object" in text
    assert "--skip-absent-classes" in text


def test_a_split_without_images(
    run: Run, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (voc / "VOC2007" / "ImageSets" / "Main" / "train.txt").write_text("")
    assert train(run, voc, tmp_path) == 3
    assert "no image" in sentence(capsys)


def test_no_data_set(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(run, tmp_path / "nowhere", tmp_path) == 3
    assert "nowhere" in sentence(capsys)


@pytest.mark.parametrize(
    ("content", "name"), [(b"not weights", "w.pth"), (b"", "w.pth"), (b"\x10\x00\x00", "w.safetensors")]
)
def test_unreadable_weights(
    run: Run, tmp_path: Path, content: bytes, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "a.png"
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(image)
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "f.npy"
    assert run("extract", image, "--weights", tmp_path / name, "--out", out) == 3
    assert name in sentence(capsys)
    assert not out.exists()


def test_an_unknown_key_names_its_nearest_match(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "digits", "--out", tmp_path / "out", "--set", "heads.los=hinge") == 2
    assert "Did you mean 'loss'?" in sentence(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-images", "0"], "data.max_images must be at least 1, got 0."),
        (["--backbone", "vgg17"], "vgg17"),
        (["--set", "heads.names=[]"], "heads.names must hold at least one value, got none."),
        (["--jobs", "-1"], "--jobs must be 0 or more"),
        (["--seed", "-1"], "seed must not be negative, got -1."),
        (["--set", "rule=voc11"], "rule must be one of 'voc07', 'voc07-exact', 'voc10', got 'voc11'."),
        (["--config", "none.toml"], "none.toml"),
    ],
)
def test_bad_options(
    run: Run, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--cache", tmp_path / "cache", *TINY] if "--backbone" not in arguments else []
    code = run("train", "digits", "--out", tmp_path / "out", *quick, "--max-images", "14", *arguments)
    assert code == (3 if "--config" in arguments else 2)
    assert words in sentence(capsys)


def test_unknown_verbs_and_options_end_with_2() -> None:
    for arguments in (["fly"], ["train", "x", "--out", "y", "--head", "tree"], []):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_a_folder_that_is_no_detector(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("detect", tmp_path, tmp_path, "--out", tmp_path / "out") == 3
    assert "holds no trained detector" in sentence(capsys)


def test_a_damaged_detector(run: Run, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(run, voc, tmp_path) == 0
    detector = tmp_path / "out"
    image = sorted(voc.rglob("*.png"))[0]

    def detect(folder: Path) -> int:
        return run("detect", folder, image, "--out", tmp_path / "found")

    names = [array_file(detector, kind).name for kind in ("head", "backbone")]
    for name in (*names, "detector.json"):
        broken = tmp_path / f"broken-{name}"
        shutil.copytree(detector, broken)
        (broken / name).write_bytes((broken / name).read_bytes()[:30])
        assert detect(broken) == 3
        assert name in sentence(capsys)
    values = json.loads((detector / "detector.json").read_text())
    del values["classes"]
    (detector / "detector.json").write_text(json.dumps(values))
    assert detect(detector) == 3
    assert "'classes' is missing" in sentence(capsys)


def test_a_full_disk_keeps_finished_work(
    run: Run,
    voc: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = np.save
    written = 0

    def full_after_three(*arguments: object, **options: object) -> None:
        nonlocal written
        written += 1
        if written > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(np, "save", full_after_three)
    assert train(run, voc, tmp_path) == 3
    assert "the disk is full" in sentence(capsys)
    features = list((tmp_path / "cache" / "features").rglob("*.npy"))
    assert len(features) == 3
    assert not list((tmp_path / "cache").rglob("*.part"))
    monkeypatch.undo()
    assert train(run, voc, tmp_path) == 0


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("keep", [2000, 3])  # a whole header, and none
def test_one_bad_image_costs_one_image(
    run: Run, detector: Path, tmp_path: Path, last: bool, keep: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    names = ["a", "b", "z"]
    for name in names:
        Image.fromarray(pixels).save(folder / f"{name}.png")
    victim = names.pop(2 if last else 0)
    content = (folder / f"{victim}.png").read_bytes()
    (folder / f"{victim}.png").write_bytes(content[:keep])
    out = tmp_path / "found"
    assert run("detect", detector, folder, "--out", out) == 3
    told = sentence(capsys)
    assert told.startswith("rcnn-svm: 1 of 3 images could not be read and were left out. The first: ")
    assert f"{victim}.png" in told
    found = json.loads((out / "detections.json").read_text())
    assert [image["image_id"] for image in found["images"]] == names
    assert sorted(path.stem for path in out.glob("*.png")) == names


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["train", "photos", "--out", "out"], True),
        (["compare", "photos", "--out", "out"], True),
        (["demo"], True),
        (["finetune", "photos", "--out", "out"], True),
        (["propose", "photos"], True),
        (["detect", "detector", "photos", "--out", "out"], True),
        (["evaluate", "detector", "photos"], False),
        (["extract", "photos", "--out", "out"], False),
        (["bench"], False),
        (["data", "check", "photos"], False),
        (["layers", "vgg16"], False),
    ],
)
def test_an_interrupted_verb_promises_what_it_keeps(
    words: list[str], kept: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = cli.build_parser()
    parse = parser.parse_args

    def interrupted(given: list[str]) -> argparse.Namespace:
        def stop(options: argparse.Namespace) -> None:
            raise KeyboardInterrupt

        return argparse.Namespace(**{**vars(parse(given)), "run": stop})

    monkeypatch.setattr(parser, "parse_args", interrupted)
    monkeypatch.setattr(cli, "build_parser", lambda: parser)
    assert main(words) == 130
    promise = " Finished work is kept: the same command goes on from there." if kept else ""
    assert capsys.readouterr().err == f"rcnn-svm: interrupted.{promise}\n"


@pytest.mark.slow
def test_interrupted_work_goes_on_and_ends_the_same(voc: Path, tmp_path: Path) -> None:
    def command(name: str) -> list[str]:
        out = ["--out", str(tmp_path / name), "--cache", str(tmp_path / f"cache-{name}")]
        return [sys.executable, "-m", "rcnn_svm", "train", str(voc), *out, *TINY]

    subprocess.run(command("whole"), check=True, capture_output=True)
    child = subprocess.Popen(
        command("cut"),
        stderr=subprocess.PIPE,
        text=True,
        # A shell ignores SIGINT in what it runs in the background, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list((tmp_path / "cache-cut").rglob("*.npy")):
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate()
    assert child.returncode == 130, errors
    assert errors.strip().splitlines()[-1].startswith("rcnn-svm: interrupted. Finished work is kept")
    subprocess.run(command("cut"), check=True, capture_output=True)
    for kind in ("head", "backbone"):
        cut, whole = (array_file(tmp_path / name, kind) for name in ("cut", "whole"))
        assert (cut.name, cut.read_bytes()) == (whole.name, whole.read_bytes())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--path", "warped"], "features.path=shared"),
        (["--set", "trunk.first_layer=conv0"], "after its first"),
        (["--taps", "block6@2x2"], "block6"),
    ],
)
def test_features_that_a_trunk_cannot_be_tuned_on(
    run: Run,
    voc: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    network = ["--backbone", "mobilenet_v2", "--weights", "random", "--path", "shared", "--learn", "trunk"]
    taps = ["--taps", "block17@1x1", *network, *options]
    arguments = ["train", voc, "--out", tmp_path / "out", "--cache", tmp_path / "cache", *TINY, *taps]
    assert run(*arguments) == 2
    assert words in sentence(capsys)
    assert not (tmp_path / "cache" / "features").exists()


def test_a_device_that_is_not_there_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("cuda:77", "warp-drive"):
        assert run("detect", tmp_path, tmp_path, "--out", tmp_path / "out", "--device", name) == 2
        assert "--device must be a device of this machine (cpu" in capsys.readouterr().err
