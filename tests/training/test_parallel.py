"""Training in several processes: the steps of one, and a sentence where one of them ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torchvision.ops import stochastic_depth

from rcnn_svm.cli import main
from rcnn_svm.errors import ConfigError
from rcnn_svm.training.parallel import Part, lead, split_rows
from tests.learn_elsewhere import losses


def environment(rank: int, n: int, port: int) -> dict[str, str]:
    """What torchrun sets, without its own process."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {name: str(value) for name, value in own.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "none",
    }


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_two_processes_take_the_steps_of_one_and_a_lost_one_ends_it(tmp_path: Path, port: int) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.learn_elsewhere", str(tmp_path)],
            env=os.environ | environment(rank, 2, port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    one = losses(None, tmp_path / "one")
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 1], said
    told = json.loads((tmp_path / "told.json").read_text())
    two = told["losses"]
    assert set(one) == {
        "Training fc layers",
        "Training the box refiner",
        "Fine-tuning",
        "Tuning the trunk",
    }
    assert one.keys() == two.keys()
    for what, values in one.items():
        assert len(values) >= 6
        np.testing.assert_allclose(two[what], values, rtol=1e-4, err_msg=what)
    assert told["error"].startswith("torchrun: another process of this training has ended. See what it said")


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 9),
    st.integers(1, 4),
    st.sampled_from(["dropout", "dropout1d", "dropout2d", "depth"]),
    st.sampled_from([1, 3]),
    st.integers(0, 5),
)
def test_what_parts_draw_is_what_the_whole_draws(
    n_rows: int, n: int, kind: str, each: int, seed: int
) -> None:
    shape = {"dropout": (7,), "dropout1d": (5, 2)}.get(kind, (5, 4, 3))
    x = torch.randn(n_rows * each, *shape)
    if len(shape) == 3:
        x = x.contiguous(memory_format=torch.channels_last)

    def drop(rows: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(seed)
        if kind == "depth":
            return stochastic_depth(rows, 0.4, "row")
        once = getattr(functional, kind)(rows, 0.3)
        twice: torch.Tensor = getattr(functional, kind)(once, 0.5)
        return twice

    found = []
    for part in split_rows((np.arange(n_rows),), min(n, n_rows)):
        with part.drawing():
            found.append(drop(x[part.first * each : (part.first + part.n) * each]))
    assert torch.equal(torch.cat(found), drop(x))


def test_a_part_without_rows_draws_along() -> None:
    torch.manual_seed(0)
    functional.dropout(torch.ones(4, 3))
    expected = torch.rand(1)
    torch.manual_seed(0)
    with Part(None, 0, 2, 4).drawing():
        assert functional.dropout(torch.ones(0, 3)).shape == (0, 3)
    assert torch.equal(torch.rand(1), expected)


def test_a_step_has_something_for_each_process() -> None:
    with pytest.raises(ConfigError, match="must have an item for each process, got 2 for 3"):
        split_rows((np.zeros(2),), 3)


def test_a_command_that_torchrun_started_is_the_same_command(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = [
        *("finetune", "digits", "--backbone", "small_cnn", "--weights", "random", "--max-images", "2"),
        *(
            "--set",
            "finetune.n_steps=2",
            "--set",
            "finetune.batch_size=8",
            "--cache",
            str(tmp_path / "cache"),
        ),
    ]
    assert main([*words, "--out", str(tmp_path / "one.safetensors")]) == 0
    for name, value in environment(0, 1, port).items():
        monkeypatch.setenv(name, value)
    assert torch.distributed.is_torchelastic_launched()
    assert main([*words, "--out", str(tmp_path / "two.safetensors")]) == 0
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["propose", "x.png"]) == 2
    assert "torchrun starts processes that train layers and networks together" in capsys.readouterr().err


def test_lead_wants_torchrun_and_a_device_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="in processes that torchrun started"):
        lead(print)
    for name, value in environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="got the device 'meta'"):
        lead(print, "meta")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="must have a GPU of its own, got 0 for process 1"):
        lead(print, "cuda")
