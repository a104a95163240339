"""`kill -9` of verbs that take long, at steps of their file work and at any moment, and the same again.

What must hold after a kill: every file that has its final name is whole, of this run or of the one before; a
detector is the old one or the new one; where a folder's marker lies (`detector.json`, `metrics.json`,
`detections.json`), the rest is of the same run. After the second run: the bytes of an undisturbed one.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rcnn_svm.detector import load_detector
from rcnn_svm.errors import RcnnSvmError
from tests.campaign.scene import Scene, copied, is_unfinished, snapshot
from tests.campaign.tally import Defect, Finished, Tally, forked

__all__ = ["KILLED", "Kills"]

KILLED = ("propose", "extract", "train", "compare", "detect", "finetune")
"""The verbs that are killed."""
_STEPS = ("replace", "unlink", "mkdir", "rmdir", "fsync", "rename", "link")
_MARKERS = ("out/detector.json", "out/metrics.json", "out/evaluation/metrics.json", "out/detections.json")
_GROWING = ("out/detections.jsonl", "out/config.json")


def _at_step(n: int, *, after: bool, count: Path | None = None) -> Callable[[], None]:
    """Return what makes this process end, as by `kill -9`, at the n-th step of its file work.

    Args:
        n: of the step, from 1 on; 0 for none.
        after: the step is done first.
        count: a file to which the number of steps is written.
    """

    def install() -> None:
        done = 0

        def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
            def step(*arguments: Any, **options: Any) -> Any:
                nonlocal done
                done += 1
                if count is not None:
                    count.write_text(str(done))
                if done == n and not after:
                    os._exit(137)
                result = real(*arguments, **options)
                if done == n:
                    os._exit(137)
                return result

            return step

        for name in _STEPS:
            setattr(os, name, wrapped(getattr(os, name)))
        tempfile.mkstemp = wrapped(tempfile.mkstemp)

    return install


@dataclass(frozen=True)
class _Whole:
    """An undisturbed run: its files, its steps and how long it took."""

    place: Path
    files: dict[str, str]
    n_steps: int
    seconds: float


class Kills:
    """Kills commands and looks at what they leave.

    Args:
        scene: inputs.
        folder: to work in.
    """

    def __init__(self, scene: Scene, folder: Path) -> None:
        self._scene, self._folder = scene, folder
        self._whole: dict[tuple[str, int], _Whole] = {}

    def undisturbed(self, verb: str, seed: int) -> _Whole:
        """Return a whole run of a verb, made once."""
        if (verb, seed) not in self._whole:
            place = self._folder / f"whole-{verb}-{seed}"
            copied({}, place)
            count = self._folder / f"{verb}.count"
            done = forked(
                self._scene.job(verb, seed=seed, before=_at_step(0, after=False, count=count)),
                place,
                limit_s=300,
            )
            if done.code:
                raise AssertionError(f"{verb} fails undisturbed: {done.err[-2000:]}")
            self._whole[verb, seed] = _Whole(place, snapshot(place), int(count.read_text()), done.seconds)
        return self._whole[verb, seed]

    def try_one(self, verb: str, seed: int, number: int, tally: Tally) -> None:
        """Kill one command, at a moment that the numbers say, run it again, and note what is wrong."""
        rng = Random(f"{seed}/{verb}/{number}")
        over = rng.random() < 0.4 and verb != "finetune"  # whose checkpoint of other settings is refused
        new, old = self.undisturbed(verb, 0), self.undisturbed(verb, 1) if over else None
        place = self._folder / "killed"
        copied([old.place / "out", old.place / "cache"] if old else {}, place)
        if rng.random() < 0.6:
            n, after = rng.randint(1, new.n_steps), rng.random() < 0.5
            done = forked(self._scene.job(verb, before=_at_step(n, after=after)), place, limit_s=300)
            how = f"{'after' if after else 'before'} step {n}"
        else:
            moment = rng.random() * new.seconds
            done = forked(self._scene.job(verb), place, limit_s=300, meanwhile=[(moment, signal.SIGKILL)])
            how = f"after {moment:.2f} s"
        what = self._wrong_after_kill(done, place, new, old)
        again = forked(self._scene.job(verb), place, limit_s=300) if not what else None
        if again is not None:
            what = self._wrong_after_rerun(again, place, new, old)
        where = f"{verb}, {'over an older output' if over else 'new output'}"
        name = f"{seed}/{verb}/{number}"
        words = f"killed {how}; {(again or done).err[-300:]}"
        tally.add(where, "same bytes" if done.code else "ended before the kill")
        if what:
            tally.counts[where]["same bytes" if done.code else "ended before the kill"] -= 1
            tally.add(where, "", Defect(where, what, name, words))
        shutil.rmtree(place, ignore_errors=True)

    def _wrong_after_kill(self, done: Finished, place: Path, new: _Whole, old: _Whole | None) -> str:
        if done.code not in (0, 137):
            return done.faults(0, 137)
        found = snapshot(place)
        runs = [run.files for run in (new, old) if run is not None]
        for name, digest in found.items():
            known = [run[name] for run in runs if name in run]
            # A checkpoint of fewer steps and lines of fewer images are whole for what they are; the settings
            # of a run are written before it, and again with its report.
            if digest not in known and name not in _GROWING and not name.endswith(".checkpoint"):
                return f"{Path(name).name} is neither of this run nor of the older one"
        for marker in _MARKERS:
            if marker not in found:
                continue
            run = next(run for run in runs if run.get(marker) == found[marker])
            folder = marker.rpartition("/")[0] + "/"
            for name, digest in run.items():
                beside = name.startswith(folder) and "/" not in name.removeprefix(folder)
                optional = name.endswith("splits.json")  # a detector without it is known to tell nothing
                if beside and marker != "out/detector.json" and found.get(name) != digest and not optional:
                    return f"{marker} lies there, and {Path(name).name} is not of its run"
        if "out/detector.json" in found:
            try:
                load_detector(place / "out")
            except RcnnSvmError as error:
                return f"the detector cannot be loaded: {type(error).__name__}"
            run = next(run for run in runs if run.get("out/detector.json") == found["out/detector.json"])
            if found.get("out/splits.json") not in (None, run["out/splits.json"]):
                return "splits.json is of another run than the detector"
        return ""

    def _wrong_after_rerun(self, done: Finished, place: Path, new: _Whole, old: _Whole | None) -> str:
        if done.faults(0):
            return f"the second run: {done.faults(0)}"
        found = snapshot(place, parts=True)
        litter = [name for name in found if is_unfinished(name)]
        if litter:
            return f"a {Path(litter[0]).suffix} file stays for ever in {litter[0].split('/')[0]}"
        for name, digest in new.files.items():
            if found.get(name) != digest:
                return f"the second run ends with another {Path(name).name}"
        left = found.keys() - new.files.keys() - (old.files.keys() if old else set())
        return f"the second run leaves {sorted(left)[0]}" if left else ""
