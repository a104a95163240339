"""A sample of the campaign: a few of everything, from a seed. `make campaign` tries all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.tally import Tally

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("campaign")  # one process that has imported everything

SAMPLE = """
import os, sys
os.environ["OMP_NUM_THREADS"] = "1"
from pathlib import Path
from tests.campaign.{module} import *
from tests.campaign.tally import Tally
folder = Path(sys.argv[1])
{body}
print(tally.summary())
sys.exit(bool(tally.defects) or not tally.n)
"""
FUZZ = "tally = fuzz({names}, {n}, 0, folder)"
SCENE = """
from tests.campaign.scene import Scene
from tests.campaign.kills import Kills
for name in ("scene", "work"):
    (folder / name).mkdir()
scene = Scene(folder / "scene")
kills = Kills(scene, folder / "work")
tally = Tally()
"""


def sample(module: str, body: str, folder: Path) -> None:
    """Run a piece of the campaign in a process of its own, which forks: here threads may be running."""
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE.format(module=module, body=body), str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


QUICK = [
    *("voc", "coco", "yolo", "detections", "detection-lines", "comp4", "coco-results", "boxes", "config"),
    *("splits", "images", "feature-cache", "proposal-cache", "checkpoint"),
]


@pytest.mark.slow
def test_broken_files_are_read_sanely_or_refused(tmp_path: Path) -> None:
    sample("fuzz", FUZZ.format(names=QUICK, n=60), tmp_path)


@pytest.mark.slow
def test_broken_detectors_and_weights_are_refused(tmp_path: Path) -> None:
    sample("fuzz", FUZZ.format(names=["detector", "weights"], n=60), tmp_path)


@pytest.mark.slow
def test_killed_commands_lose_nothing_and_end_the_same(tmp_path: Path) -> None:
    body = SCENE + 'for n in range(4):\n    for verb in ("detect", "extract", "finetune"):\n'
    sample("kills", body + "        kills.try_one(verb, 0, n, tally)", tmp_path)


@pytest.mark.slow
def test_a_training_killed_over_an_older_detector_leaves_one_of_the_two(tmp_path: Path) -> None:
    # Seeds 0/train/N of which the first ones work over an older output.
    body = SCENE + "from random import Random\n"
    body += "over = [n for n in range(50) if Random(f'0/train/{n}').random() < 0.4]\n"
    sample("kills", body + "for n in over[:2]:\n    kills.try_one('train', 0, n, tally)", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["disk full at a step", "output cannot be written", "few file handles", "streams", "signal"]
)
def test_faults_end_with_one_sentence(fault: str, tmp_path: Path) -> None:
    only = "f.VERBS = ('extract', 'detect', 'check', 'digits')\n"  # the quick ones
    body = SCENE + "import tests.campaign.faults as f\n" + only
    body += f"for n in range(3):\n    Faults(scene, kills, folder / 'work').try_one({fault!r}, 0, n, tally)"
    sample("faults", body, tmp_path)


GUIDED = """
tally, coverage = guided(["detections"], 0, folder, runs=300, seconds=20)
one = coverage["detections"]
assert one.edges[1] > one.edges[0] > 0 and one.features[1] > one.features[0] > 0, one
"""


@pytest.mark.slow
def test_inputs_that_are_found_by_what_they_reach(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="fuzzing by coverage needs atheris: pip install '.[fuzz]'")
    sample("guided", GUIDED, tmp_path)


@pytest.fixture
def tally() -> Tally:
    return Tally()


def test_a_tally_keeps_the_smallest_input_of_each_defect(tally: Tally) -> None:
    from tests.campaign.tally import Defect

    tally.add("voc", "read")
    for example in (b"long input", b"short"):
        tally.add("voc", "", Defect("voc", "KeyError in x", "0/voc/1", "words", example))
    value = tally.to_json()
    assert value["tried"] == 3
    assert value["outcomes"] == {"voc": {"defect": 2, "read": 1}}
    (defect,) = value["defects"]
    assert (defect["example_bytes"], defect["times"]) == (5, 2)
