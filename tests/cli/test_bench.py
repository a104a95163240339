"""The verb `bench`, made quick: few regions, no time to repeat anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rcnn_svm.cli import main
from tests.cli.conftest import Run

QUICK = ["--backbone", "small_cnn,mobilenet_v2", "--regions", "20", "--seconds", "0.01", "--jobs", "1"]


def test_bench_tells_what_the_machine_and_a_data_set_take(
    run: Run, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    assert run("bench", *QUICK, "--data", digits_folder, "--json", out) == 0
    text = capsys.readouterr().out
    assert "GFLOP/s on 1 thread" in text
    assert "proposals" in text
    assert "test, from 5 of 5 images" in text

    result = json.loads(out.read_text())
    assert [row["name"].split(",")[0] for row in result["rows"]] == [
        "matrix product",
        "small_cnn fc7",
        "mobilenet_v2 penultimate",
        "mobilenet_v2 penultimate",
        "reading the file",
        "proposals",
        "resizing",
        "convolutions",
        "RoIAlign",
        "fc layers",
    ]
    for row in result["rows"]:
        assert row["n"] >= 1
        assert 0 <= row["min"] <= row["median"] <= row["max"]
    assert {estimate["split"] for estimate in result["data"]} == {"trainval", "test"}
    assert all(estimate["n_bytes"] > 0 for estimate in result["data"])
    assert result["provenance"]["machine"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--backbone", "vgg17"], 2, "vgg17"),
        (["--backbone", ""], 2, "name must be one of alexnet"),
        (["--regions", "0"], 2, "--regions must be at least 1, got 0."),
        (["--seconds", "nan"], 2, "--seconds must be a finite number > 0, got nan."),
        (["--jobs", "-1"], 2, "--jobs must be 0 or more"),
        (["--data", "no/such/folder"], 3, "no/such/folder"),
    ],
)
def test_bench_refuses_wrong_input(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == code
    captured = capsys.readouterr()
    assert words in captured.err.strip().splitlines()[-1]
    assert captured.out == ""


def test_threads_are_put_back() -> None:
    import torch

    from rcnn_svm.experiment.speed import limited_threads

    before = torch.get_num_threads()
    with limited_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
