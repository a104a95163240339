"""The long campaign: `python -m tests.campaign --out results/campaign/campaign.json`, under an hour.

It writes what was tried and what was found, and ends with 1 where a defect was found. `--parts` runs some of
its parts; what the file says about the others stays.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked: no pool of threads may be running

from rcnn_svm.files import write_json
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance
from tests.campaign.faults import FAULTS, Faults
from tests.campaign.fuzz import READERS, fuzz
from tests.campaign.guided import guided, missing
from tests.campaign.kills import KILLED, Kills
from tests.campaign.scene import Scene
from tests.campaign.tally import Tally

_PARTS = ("fuzz", "guided", "kills", "faults")
# Runs of train and compare take ten times as long as the others.
_OFTEN = {"propose": 50, "extract": 30, "train": 40, "compare": 40, "detect": 80, "finetune": 60}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default=",".join(_PARTS), help="(default: all)")
    parser.add_argument("--inputs", type=int, default=1300, help="of each reader (default 1300)")
    parser.add_argument("--guided", type=float, default=35, help="seconds for each reader (default 35)")
    parser.add_argument("--kills", type=float, default=1.0, help="times 300 (default 1)")
    parser.add_argument("--faults", type=int, default=120, help="(default 120)")
    parser.add_argument("--note", default="", help="on the machine, such as that others work on it")
    parser.add_argument("--minutes", type=float, default=25, help="for each part at most (default 25)")
    return parser.parse_args()


def _kills(seed: int, times: float, kills: Kills, deadline: float) -> Tally:
    tally = Tally()
    for verb in KILLED:
        for number in range(round(_OFTEN[verb] * times)):
            if time.monotonic() < deadline:
                kills.try_one(verb, seed, number, tally)
        say(f"{verb}: {tally.n} kills so far, {len(tally.defects)} kinds of defects")
    return tally


def _faults(seed: int, n: int, faults: Faults, deadline: float) -> Tally:
    tally, rng = Tally(), Random(seed)
    names = list(FAULTS)
    for number in range(n):
        name = names[number % len(names)] if number < 5 * len(names) else rng.choice(names)
        faults.try_one(name, seed, number, tally)
        if time.monotonic() > deadline:
            break
    return tally


def main() -> int:
    """Run the campaign and return the exit code."""
    options = _options()
    known: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    parts = known.get("parts", {})
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        folder = Path(name)
        for part in options.parts.split(","):
            started = time.monotonic()
            deadline = started + 60 * options.minutes
            more: dict[str, Any] = {}
            if part == "fuzz":
                tally = fuzz(list(READERS), options.inputs, options.seed, folder / "fuzz", deadline=deadline)
            elif part == "guided" and missing():
                tally, more = Tally(), {"not_run": missing()}
            elif part == "guided":
                tally, coverage = guided(
                    list(READERS),
                    options.seed,
                    folder / "guided",
                    seconds=options.guided,
                    limit=60 * options.minutes,
                )
                more = {
                    "by": f"atheris {version('atheris')}",
                    "seconds_per_reader": options.guided,
                    "coverage": {reader: one.to_json() for reader, one in coverage.items()},
                }
            else:
                (folder / f"scene-{part}").mkdir()
                (folder / part).mkdir()
                scene = Scene(folder / f"scene-{part}")
                kills = Kills(scene, folder / part)
                if part == "kills":
                    tally = _kills(options.seed, options.kills, kills, deadline)
                else:
                    tally = _faults(
                        options.seed, options.faults, Faults(scene, kills, folder / part), deadline
                    )
            about = provenance(seed=options.seed)
            seconds = round(time.monotonic() - started)
            if options.note:
                more["note"] = options.note
            parts[part] = {"commit": about["commit"], "seconds": seconds, **more, **tally.to_json()}
            value = {"schema": 1, "campaign": "trust", "parts": parts, "provenance": about}
            write_json(options.out, value)
            say(f"{part}: {more.get('not_run', f'{tally.n} tried')}\n{tally.summary()}")
    return int(any(one["defects"] for one in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
