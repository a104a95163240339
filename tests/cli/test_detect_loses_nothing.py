"""`detect` keeps what it has: past readers that leave, interruptions and bad images; inputs stay."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rcnn_svm.evaluation.exchange import DetectionLines, read_detections
from rcnn_svm.structures import Detections
from tests.cli.conftest import Run


@pytest.fixture
def photos(digits_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    shutil.copytree(digits_folder / "images" / "test", folder)
    return folder


def test_an_output_that_is_an_input_is_refused_before_anything_is_written(
    run: Run, detector_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in photos.iterdir()}
    assert run("detect", detector_folder, photos, "--out", photos) == 2
    assert "The output must not take the place of a file that is read, got" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in photos.iterdir()} == before
    assert run("detect", detector_folder, photos, "--out", photos, "--no-pictures") == 0


def test_what_was_cut_short_goes_on_and_ends_the_same(
    run: Run, detector_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run("detect", detector_folder, photos, "--out", whole) == 0
    add, calls = DetectionLines.add, []

    def interrupted(self: DetectionLines, found: Detections, image: str) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(found.image_id)
        add(self, found, image)

    monkeypatch.setattr(DetectionLines, "add", interrupted)
    assert run("detect", detector_folder, photos, "--out", out) == 130
    monkeypatch.undo()
    lines = out / "detections.jsonl"
    assert len(lines.read_text().splitlines()) == 3
    lines.write_text(lines.read_text() + '{"image_id": "cut')  # as a kill may leave it
    capsys.readouterr()
    assert run("detect", detector_folder, photos, "--out", out) == 0
    said = capsys.readouterr()
    assert "2 of 5 images were looked at before and are not looked at again." in said.err
    assert len(said.out.splitlines()) == 3
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_other_work_starts_anew(
    run: Run, detector_folder: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    DetectionLines(out / "detections.jsonl", ["other"], {"detector": "another"}).add(
        Detections.empty(sorted(photos.iterdir())[0].stem), "digest"
    )
    assert run("detect", detector_folder, photos, "--out", out, "--no-pictures") == 0
    said = capsys.readouterr()
    assert "looked at before" not in said.err
    assert len(read_detections(out / "detections.json")[1]) == 5


def test_an_image_that_changed_is_looked_at_again(
    run: Run, detector_folder: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    first, second, *_ = sorted(photos.iterdir())
    assert run("detect", detector_folder, first, "--out", out, "--no-pictures") == 0
    whole = json.loads((out / "detections.json").read_text())
    assert len(whole["images"]) == 1
    shutil.copy(second, first)
    assert run("detect", detector_folder, first, "--out", out, "--no-pictures") == 0
    assert json.loads((out / "detections.json").read_text()) != whole


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_the_work(
    detector_folder: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-u",
        "-m",
        "rcnn_svm",
        "detect",
        detector_folder,
        photos,
        "--out",
        out,
        "--no-pictures",
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr is not None
    with child.stderr:
        errors = child.stderr.read()
    assert child.wait() == 0, errors
    assert "Traceback" not in errors
    assert len(read_detections(out / "detections.json")[1]) == 5


def test_names_with_slashes_and_dots_stay_inside(tmp_path: Path) -> None:
    from rcnn_svm.evaluation.exchange import read_comp4, write_comp4
    from rcnn_svm.files import inside

    for text in ("../../victim", "/etc/passwd", "a/../../b", "..", ".hidden", "con:x", "a\0b", "a%2Fb"):
        path = inside(tmp_path, text, ".png")
        assert path.resolve().is_relative_to(tmp_path.resolve())
        assert path.name.endswith(".png")
    classes = ["/../../../escaped/x", "car/truck", "car%2Ftruck", "plain"]
    found = [Detections("a", [[0, 0, 5, 5]] * 4, [4.0, 3.0, 2.0, 1.0], [0, 1, 2, 3])]
    paths = write_comp4(tmp_path / "comp4", found, classes)
    assert len(set(paths)) == 4
    assert all(path.parent == tmp_path / "comp4" for path in paths)
    (again,) = read_comp4(tmp_path / "comp4", classes, ["a"])
    assert again.labels.tolist() == [0, 1, 2, 3]
