"""The cache as a user meets it: what a run leaves, its limit, and how to be rid of it."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest

from rcnn_svm.cache import in_words
from tests.cli.conftest import TINY, Run, array_file


def put(path: Path, n_bytes: int, days: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * n_bytes)
    os.utime(path, (time.time() - days * 24 * 3600,) * 2)
    return path


def feature(folder: Path, n: int) -> Path:
    return folder / "features" / f"{1:020x}" / f"{n:020x}.npy"


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def test_a_run_without_room_goes_on_and_ends_within_its_limit(
    run: Run,
    digits_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rcnn_svm import ExperimentConfig, load_splits, train_detector
    from rcnn_svm.config import with_overrides
    from rcnn_svm.experiment.parts import Run as Computing

    tight, wide, out = tmp_path / "tight", tmp_path / "wide", tmp_path / "out"
    for cache in (tight, wide):
        put(feature(cache, 1), 100_000, days=3)

    assert run("train", digits_folder, "--out", out, "--cache", wide, "--cache-limit", "500MB", *TINY) == 0
    assert feature(wide, 1).exists()
    end = (
        f"Cache: {wide} holds {in_words(size(wide))} of at most 500.0 MB. "
        f"`rcnn-svm cache prune --all --cache {wide}` empties it."
    )
    assert end in " ".join(capsys.readouterr().err.split()).replace("Cache: ", "Cache: ")

    monkeypatch.setenv("RCNN_SVM_CACHE_LIMIT", "50kB")
    settings = [text for flag, text in itertools.pairwise(TINY) if flag == "--set"]
    network = ["features.backbone=small_cnn", "features.weights=random", "features.path=warped"]
    config = with_overrides(
        ExperimentConfig(), None, [*network, "features.taps=fc7", "learn=nothing", *settings]
    )
    result = train_detector(
        load_splits(digits_folder), config.build(heads=["linear-svm"]), run=Computing(tight)
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(str(tight))]
    removed, warned, removed_at_the_end = lines
    assert removed == (
        f"{tight}: removed 1 file (100 kB), used least recently, to hold the cache within its limit of 50 kB."
    )
    assert "what this run uses takes" in warned
    assert removed_at_the_end.startswith(f"{tight}: removed ")
    assert size(tight) <= 50_000 < 200_000 < size(wide)
    result.detector.save(tmp_path / "other")
    assert array_file(tmp_path / "other").read_bytes() == array_file(out).read_bytes()

    n_bytes = size(wide)
    assert run("cache", "--cache", wide) == 0
    rows = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines()[2:-1]}
    assert rows["proposals"][0] == "24"
    assert rows["features"][0] == "21"  # one an image of trainval, the other run's, the store's identity
    assert rows["tuned trunks"] == ["0", "0.0", "-", "-"]
    assert float(rows["in all"][1]) == pytest.approx(n_bytes / 1e6, abs=0.051)
    assert rows["features"][2] < rows["features"][4]

    assert run("cache", "--cache", wide, "prune", "--older-than", "1", "--limit", "500MB") == 0
    assert capsys.readouterr().out == (
        f"{wide}: removed 1 file (100 kB); {in_words(n_bytes - 100_000)} stay.\n"
    )
    assert run("cache", "prune", "--cache", wide) == 0
    assert 20_000 < size(wide) <= 50_000
    assert run("cache", "prune", "--all", "--cache", wide) == 0
    assert files(wide) == set()
    assert capsys.readouterr().out.endswith("; 0 kB stay.\n")


def test_what_is_not_ours_stays(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = {
        put(tmp_path / name, 10, days=1000)
        for name in ("mail/inbox", "features/plan.md", "tuned/song.mp3", "proposals/00/draft.npz", ".profile")
    }
    assert run("cache", "prune", "--all", "--cache", tmp_path) == 0
    assert files(tmp_path) == home
    assert capsys.readouterr().out == f"{tmp_path}: removed 0 files (0 kB); 0 kB stay.\n"


def test_the_folder_may_be_named_before_or_after_the_action(run: Run, tmp_path: Path) -> None:
    for arguments in (("--cache", tmp_path, "prune"), ("prune", "--cache", tmp_path)):
        put(feature(tmp_path, 1), 100, days=1)
        newer = put(feature(tmp_path, 2), 100)
        assert run("cache", *arguments, "--limit", "150B") == 0
        assert files(tmp_path) == {newer}


def test_propose_holds_the_limit(run: Run, digits_folder: Path, tmp_path: Path) -> None:
    images = digits_folder / "images" / "test"
    assert run("propose", images, "--cache", tmp_path, "--cache-limit", "20kB") == 0
    assert 0 < size(tmp_path) <= 20_000


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["cache", "prune", "--limit", "much"],
            2,
            "--limit must be a size such as 2GB or 500MB, got 'much'.",
        ),
        (
            ["cache", "prune", "--older-than", "nan"],
            2,
            "--older-than must be a finite number of days >= 0, got nan.",
        ),
        (
            ["cache", "prune", "--all", "--limit", "1GB"],
            2,
            "--all leaves nothing. Name it alone, or --limit and --older-than without it.",
        ),
        (
            ["train", "digits", "--out", "out", "--cache-limit", "2"],
            2,
            "--cache-limit must be a size such as 2GB or 500MB, got '2'.",
        ),
        (
            ["cache", "--cache", "file"],
            3,
            "file: must be a folder that can be read, to hold the cache (Not a directory). Name another with "
            "--cache.",
        ),
    ],
)
def test_wrong_usage_is_one_sentence(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert run(*arguments) == code
    assert capsys.readouterr().err == f"rcnn-svm: {message}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
