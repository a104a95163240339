"""`detect`: what it takes and what it leaves, with a detector of random weights."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from rcnn_svm.evaluation.exchange import DetectionLines, read_detections
from rcnn_svm.structures import Detections
from tests.campaign.scene import CLASSES, picture, save_detector
from tests.cli.conftest import Run
from tests.cli.test_bad_input import sentence

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "detector"
    save_detector(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "photos"
    (folder / "more").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(picture(i)).save(folder / ("more" if i == 2 else "") / f"p{i}.png")
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_format_at_once_and_what_was_cut_short_ends_the_same(
    run: Run, detector: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["detect", detector, photos, "--all", "--crops", "--label-studio-root", photos]
    words += ["--format", "json,coco,yolo,voc,csv,labelstudio", "--max-detections", "3", "--out"]
    assert run(*words, tmp_path / "whole") == 0
    written = names(tmp_path / "whole")
    for i in range(3):
        assert {f"p{i}.png", f"yolo/labels/p{i}.txt", f"voc/p{i}.xml"} < written
    shared = {"detections.json", "detections.csv", "coco/results.json", "coco/data.json"}
    assert shared | {"yolo/classes.txt", "labelstudio/tasks.json", "labelstudio/config.xml"} < written
    _, found = read_detections(tmp_path / "whole" / "detections.json")
    assert [len(one) for one in found] == [3, 3, 3]
    assert sum(name.startswith("crops/") for name in written) == 9
    for one in found:
        for k in set(one.labels.tolist()):
            with Image.open(tmp_path / "whole" / "crops" / CLASSES[k] / f"{one.image_id}-1.png") as crop:
                x1, y1, x2, y2 = one.boxes[one.labels == k][0]
                assert crop.size == (np.ceil(x2) - np.floor(x1), np.ceil(y2) - np.floor(y1))
    add, calls = DetectionLines.add, []

    def interrupted(self: DetectionLines, one: Detections, image: str) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(one.image_id)
        add(self, one, image)

    monkeypatch.setattr(DetectionLines, "add", interrupted)
    assert run(*words, tmp_path / "cut") == 130
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "detections.json").exists()
    assert run(*words, tmp_path / "cut") == 0
    assert names(tmp_path / "cut") == written
    for name in written:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_evidence_of_the_surest_is_what_explain_says(
    run: Run, detector: Path, photos: Path, tmp_path: Path
) -> None:
    words = [photos / "p0.png", "--threshold", "-99", "--out"]
    out = tmp_path / "out"
    assert run("detect", detector, *words, out, "--explain", "1", "--no-pictures") == 0
    assert run("explain", detector, *words, tmp_path / "why", "--top", "1") == 0
    files = {"index.html", "evidence-1.svg", "evidence.json"}
    assert names(out) == {"detections.json"} | {f"explain/p0/{name}" for name in files}
    for name in files:
        assert (out / "explain" / "p0" / name).read_bytes() == (tmp_path / "why" / name).read_bytes()
    assert run("detect", detector, photos / "p0.png", "--threshold", "99", "--out", out, "--explain") == 0
    assert not (out / "explain" / "p0" / "evidence.json").exists()


def test_classes_and_thresholds(
    run: Run, detector: Path, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    words = ["detect", detector, photos / "p0.png", "--out", out, "--no-pictures", "--crops"]
    assert run(*words, "--all", "--classes", "dog") == 0
    _, (only,) = read_detections(out / "detections.json")
    assert set(only.labels.tolist()) == {1}
    n_crops = len(only)
    assert len(list((out / "crops" / "dog").iterdir())) == n_crops > 1
    least = str(float(only.scores[1]))
    assert run(*words, "--classes", "dog", "--threshold", least) == 0
    _, (fewer,) = read_detections(out / "detections.json")
    assert len(fewer) == (only.scores >= np.float32(least)).sum()
    assert len(list((out / "crops" / "dog").iterdir())) == len(fewer)
    capsys.readouterr()
    assert run(*words, "--threshold", "99", "--classes", "dog") == 0
    said = capsys.readouterr().err.splitlines()
    surest = f"dog at {only.scores[0]:.3f} in p0. Lower --threshold."
    assert said[-1] == f"Nothing reaches the threshold: the surest of all is {surest}"
    assert list((out / "crops" / "dog").iterdir()) == []


def test_patterns_and_a_list_on_standard_input(
    run: Run, detector: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def found() -> list[str]:
        return [one.image_id for one in read_detections(tmp_path / "out" / "detections.json")[1]]

    words = ["--out", tmp_path / "out", "--no-pictures"]
    assert run("detect", detector, photos / "**" / "p[12].png", *words) == 0
    assert found() == ["p2", "p1"]
    listed = f"{photos / 'p1.png'}\n\n{photos / 'more'}\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed.encode())))
    assert run("detect", detector, "-", *words) == 0
    assert found() == ["p1", "p2"]
    capsys.readouterr()
    assert run("detect", detector, photos / "x*.png", *words) == 3
    assert sentence(capsys).endswith("x*.png: matches no file or folder.")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert run("detect", detector, "-", *words) == 3
    assert sentence(capsys).endswith("standard input: must name an image or a folder a line, got nothing.")


def test_wrong_words(run: Run, detector: Path, photos: Path, tmp_path: Path, capsys: Capture) -> None:
    def says(*more: str | Path, image: Path = photos / "p0.png") -> tuple[int, str]:
        return run("detect", detector, image, "--out", tmp_path / "out", *more), sentence(capsys)

    known = f"cat, dog, bird, the classes of {detector}"
    assert says("--classes", "zebra") == (2, f"rcnn-svm: --classes: must be some of {known}, got zebra.")
    code, text = says("--format", "yolo,pdf")
    assert (code, text.endswith("json, coco, yolo, voc, csv, labelstudio, got ['pdf'].")) == (2, True)
    assert says("--max-detections", "0") == (2, "rcnn-svm: --max-detections must be at least 1, got 0.")
    assert says("--explain", "0") == (2, "rcnn-svm: --explain must be at least 1, got 0.")
    code, text = says("--format", "labelstudio", "--label-studio-root", tmp_path)
    assert (code, "--label-studio-root" in text) == (2, True)
    code, text = says(image=tmp_path / "nothing.mp4")
    assert (code, text.endswith("nothing.mp4: no such file or folder.")) == (3, True)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve frames, four a second, as Motion JPEG: a container that can be read though its end is gone."""
    path = tmp_path_factory.mktemp("video") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 4.0, (64, 48))
    assert writer.isOpened()
    for i in range(12):
        writer.write(np.ascontiguousarray(picture(i)[:, :, ::-1]))
    writer.release()
    return path


def test_a_video_leaves_a_line_a_frame_and_a_video(
    run: Run, detector: Path, photos: Path, video: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    words = ["detect", detector, photos / "p0.png", video, "--out", out, "--max-detections", "2"]
    assert run(*words) == 0
    assert "24 detections in 12 frames" in capsys.readouterr().out
    assert names(out) == {"detections.json", "p0.png", "clip.frames.jsonl", "clip.mp4"}
    head, *frames = map(json.loads, (out / "clip.frames.jsonl").read_text().splitlines())
    assert head["classes"] == list(CLASSES)
    assert head["made_by"]["frames_per_second"] == 4
    assert [frame["image_id"] for frame in frames] == [f"{i:06d}" for i in range(12)]
    assert all(len(frame["boxes"]) == len(frame["scores"]) == 2 for frame in frames)
    drawn = cv2.VideoCapture(str(out / "clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 12
    assert drawn.get(cv2.CAP_PROP_FPS) == 4
    drawn.release()
    lines = (out / "clip.frames.jsonl").read_text().splitlines(keepends=True)
    (out / "clip.frames.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # as a kill may leave it
    assert run(*words) == 0
    assert (out / "clip.frames.jsonl").read_text() == "".join(lines)


def test_a_video_that_breaks_off_keeps_its_frames(
    run: Run, detector: Path, video: Path, tmp_path: Path, capsys: Capture
) -> None:
    content = video.read_bytes()
    cut, none = tmp_path / "cut.avi", tmp_path / "none.mp4"
    cut.write_bytes(content[: len(content) // 2])
    none.write_bytes(b"\0\0\0\x18ftypmp42 and no more")
    out = tmp_path / "out"
    assert run("detect", detector, none, cut, "--out", out) == 3
    said = capsys.readouterr().err
    assert f"{none}: is no video that can be read, or is cut off. Replace it." in said
    frames = (out / "cut.frames.jsonl").read_text().splitlines()[1:]
    assert 3 < len(frames) < 8
    assert f"{cut}: breaks off after {len(frames)} of 12 frames." in said
    assert said.splitlines()[-1].startswith("rcnn-svm: 2 of 2 videos could not be read to their end.")
    assert "Traceback" not in said
    drawn = cv2.VideoCapture(str(out / "cut.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == len(frames)
    drawn.release()
    assert run("detect", detector, video, "--out", out, "--crops") == 2
    assert "--format, --crops and --explain are of images." in sentence(capsys)
    assert run("detect", detector, video, "--out", out, "--no-pictures") == 0
    assert not (out / "clip.mp4").exists()
