"""The examples are what they promise: each runs as it stands, in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SAID = {
    "own_data": "HeadResult(softmax-finetuned",
    "own_proposals": "Detections('image': ",
    "own_network": ", SelectiveSearchConfig, mine)",
    "own_head": "Detector(nearest-mean",
    "own_kernel": "laplacian+bbox HeadResult(laplacian+bbox",
    "own_metric": "| count error |",
    "own_postprocess": "Detections('image': ",
}


def test_every_example_is_tried() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SAID.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_an_example_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert SAID[name].replace(" ", "") in done.stdout.replace(" ", "")
