"""What a user reads before, while and after a training, off a terminal and on one."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest

from rcnn_svm import load_splits
from rcnn_svm.cli import build_parser, training, using, words
from rcnn_svm.experiment.config import HEADS, ExperimentConfig, demo_config, paper_config
from tests.cli.conftest import TINY, Run

STAGES = ["proposals", "network", "features", "choose", "train", "detect", "report"]
LABELS = ["Data", "Network", "Trained", "Settings", "Results"]


def command(data: Path, folder: Path) -> list[str]:
    verb = ["train", str(data), "--out", "out", "--cache", str(folder / "cache")]
    return [sys.executable, "-m", "rcnn_svm", *verb, *TINY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def off_terminal(digits_folder: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(digits_folder, folder), cwd=folder, capture_output=True, text=True, check=True
    )


def labels_of(lines: list[str]) -> list[str]:
    return [found[1] for line in lines if (found := re.match(r"([A-Z][A-Za-z ]*): ", line))]


def stages_of(lines: list[str]) -> list[tuple[str, str]]:
    """Return (place, name) of each stage that is announced."""
    pattern = r"\d+:\d\d:\d\d  (\d+ of \d+), (\w+): \S"
    return [(found[1], found[2]) for line in lines if (found := re.match(pattern, line))]


@pytest.mark.slow
def test_off_a_terminal_every_stage_is_told(off_terminal: subprocess.CompletedProcess[str]) -> None:
    lines = off_terminal.stderr.splitlines()
    assert labels_of(lines)[:5] == LABELS
    assert lines[0].startswith("Data:     yolo; 14 train, 5 val and 5 test images; ")
    assert stages_of(lines) == [(f"{i} of 7", name) for i, name in enumerate(STAGES, start=1)]
    assert max(map(len, lines)) <= 120
    assert "\r" not in off_terminal.stderr
    assert len(lines) < 40


def test_stdout_holds_the_tables_alone(off_terminal: subprocess.CompletedProcess[str]) -> None:
    lines = off_terminal.stdout.splitlines()
    assert stages_of(lines) == []
    assert labels_of(lines) == []  # but for sentences on columns and thresholds
    assert "linear-svm+bbox" in off_terminal.stdout


def test_the_end_says_where_how_good_and_what_next(
    off_terminal: subprocess.CompletedProcess[str], folder: Path
) -> None:
    lines = off_terminal.stderr.splitlines()
    end = lines[[line.endswith("  done") for line in lines].index(True) + 1 :]
    assert labels_of(end)[:5] == ["Detector", "Quality", "Boxes", "Shown", "Scores"]
    assert {"Next", "Cache"} < set(labels_of(end))
    assert re.search(r"\d mAP on the 5 images of test", end[1])
    assert (folder / "out" / "evaluation" / "report.html").exists()
    assert "rcnn-svm detect out IMAGES --out FOLDER" in "\n".join(end)
    assert "rcnn-svm evaluate out LABELLED_IMAGES" in "\n".join(end)
    # Fourteen scenes hold no twenty of each digit, and sixty regions of a scene miss some.
    tips = [line for line in end if line.startswith("To try:")]
    assert 1 <= len(tips) <= 3
    assert any(re.search(r"max_regions=120: no proposal reaches \d+ %", tip) for tip in tips)
    assert any(re.search(r"more labels of \d \(\d+\)", tip) for tip in tips)


def test_the_whole_configuration_is_in_a_file(
    off_terminal: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert "every setting of this run is in out/config.json" in off_terminal.stderr
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["proposals"]["max_regions"] == 60
    assert config["heads"]["names"] == ["linear-svm"]


@pytest.mark.slow
def test_on_a_terminal_the_same_is_told_and_loops_have_bars(
    off_terminal: subprocess.CompletedProcess[str], digits_folder: Path, folder: Path
) -> None:
    main_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    child = subprocess.Popen(
        command(digits_folder, folder), cwd=folder, stdout=terminal, stderr=terminal, stdin=terminal
    )
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(main_end, 4096):
            shown += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(main_end)
    assert child.wait() == 0
    screen = re.split(r"[\r\n]+|\x1b\[A", shown.decode())
    assert labels_of(screen)[:5] == LABELS
    assert [name for _, name in stages_of(screen)] == STAGES
    assert any("linear-svm on test: 100%" in line for line in screen)
    assert max(len(line) for line in screen if not line.startswith("|")) <= 100


@pytest.mark.parametrize(
    "config",
    [
        ExperimentConfig(),
        ExperimentConfig(learn="trunk", choose=False),
        paper_config(ExperimentConfig()),
        demo_config(),
        replace(ExperimentConfig(learn="nothing"), heads=replace(ExperimentConfig().heads, names=HEADS[:1])),
    ],
    ids=["default", "trunk", "paper", "demo", "nothing"],
)
def test_the_first_lines_fit_every_experiment(config: ExperimentConfig, digits_folder: Path) -> None:
    splits = load_splits(digits_folder)
    lines = words.opening(config, splits, Path("out"))
    assert labels_of(lines) == LABELS
    assert len(lines) <= 9
    assert max(map(len, lines)) <= 120
    text = " ".join(" ".join(lines).split())
    assert config.features.backbone in text
    assert ("measuring on val" in text) == config.choose
    assert {
        "nothing": "Trained: linear-svm with",
        "fc": "Trained: fc6 on what it reads",
        "trunk": "with the end of the network",
        "network": "Trained: the whole network",
    }[config.learn] in text


def test_the_first_lines_of_finetune(digits_folder: Path) -> None:
    train = load_splits(digits_folder).train
    lines = words.opening_of_finetuning(demo_config(), train, Path("w.safetensors"), Path("w.config.json"))
    assert labels_of(lines) == LABELS
    assert "w.config.json" in lines[-1]


def interrupt(options: argparse.Namespace) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("verb", ["train", "detect", "evaluate"])
def test_interrupting_promises_what_is_true(
    run: Run, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "_train", interrupt)
    monkeypatch.setattr(using, "_detect", interrupt)
    monkeypatch.setattr(using, "_evaluate", interrupt)
    arguments = ["digits"] if verb == "train" else [tmp_path, tmp_path]
    assert run(verb, *arguments, "--out", tmp_path / "out") == 130
    kept = " Finished work is kept: the same command goes on from there." if verb != "evaluate" else ""
    assert capsys.readouterr().err == f"rcnn-svm: interrupted.{kept}\n"


def test_verbs_that_keep_finished_work() -> None:
    given = {
        "demo": [],
        "train": ["d", "--out", "o"],
        "compare": ["d", "--out", "o"],
        "study": ["d", "--out", "o"],
        "finetune": ["d", "--out", "o"],
        "propose": ["d"],
        "detect": ["d", "i", "--out", "o"],
        "evaluate": ["d", "i"],
        "data": ["digits", "--out", "o"],
        "layers": ["vgg16"],
        "extract": ["i", "--out", "o"],
        "bench": [],
    }
    parser = build_parser()
    resume = {verb for verb, more in given.items() if parser.parse_args([verb, *more]).resumes}
    assert resume == {"demo", "train", "compare", "study", "finetune", "propose", "detect"}
