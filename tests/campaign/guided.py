"""Broken files that are found by what they reach: each reader under libFuzzer, by way of atheris.

An input is two bytes, which name the file and settle the chances of the reader, and the content of the file.
Half of the inputs are mutated by bytes, half by what their format means (`mutations`); what reaches code that
nothing has reached before is mutated further. The oracle is that of `fuzz`. libFuzzer ends its process, so
each reader has one of its own, forked from one in which all code was instrumented as it was imported:
`python -m tests.campaign.guided SEED RUNS SECONDS LIMIT FOLDER READER ...`, which `guided` runs.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Self

from tests.campaign.tally import Defect, Tally, forked

__all__ = ["Coverage", "guided", "missing"]

_GUIDING = ["rcnn_svm", "PIL", "yaml"]
"""Packages whose Python code guides."""
# Functions that are compiled cannot be instrumented.
_COMPILED = [
    f"rcnn_svm.{name}"
    for name in (
        *(
            "boxes",
            "compiled",
            "evaluation.coco",
            "features.roi_pool",
            "heads.kernels",
            "heads.solver.kernels",
        ),
        *("proposals.planes", "proposals.grouping", "proposals.spreading", "proposals.segment"),
    )
]
_STARTING = 120.0
"""Seconds in which a reader must be ready."""
_SECONDS = 30.0
"""An input must be done with after so long: what is watched at every step is many times slower."""
_LONGEST = 1 << 24
"""Bytes of an input."""
_MOST_STARTS = 5
_LINE = re.compile(
    r"^#(\d+)\s+(INITED|NEW|REDUCE|pulse|DONE)\s+cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE
)
_STATE = struct.Struct("<QQQQ")
"""Inputs that were read, refused and wrong, and the length of the one that is tried, which follows."""


@dataclass(frozen=True)
class Coverage:
    """What the inputs of a reader reached in our code and in that of Pillow and PyYAML.

    Attributes:
        edges: branches that the good files reach, and that all inputs reach.
        features: the same, told apart by how often they are taken.
        corpus: inputs that reached something new, the good files among them.
    """

    edges: tuple[int, int]
    features: tuple[int, int]
    corpus: int

    def to_json(self) -> dict[str, Any]:
        names = ("start", "end")
        return {
            "edges": dict(zip(names, self.edges, strict=True)),
            "features": dict(zip(names, self.features, strict=True)),
            "corpus": self.corpus,
        }

    @classmethod
    def of(cls, log: str) -> Self:
        """Return what libFuzzer printed."""
        found = [(int(one[3]), int(one[4]), int(one[5])) for one in _LINE.finditer(log)]
        edges, features, corpus = zip(*found, strict=True)
        return cls((edges[0], max(edges)), (features[0], max(features)), corpus[-1])


def missing() -> str:
    """Return why this part cannot run here; empty where it can."""
    if importlib.util.find_spec("atheris") is None:
        return "atheris is not installed (pip install '.[fuzz]')"
    return ""


def guided(
    readers: Sequence[str],
    seed: int,
    folder: Path,
    *,
    runs: int = 0,
    seconds: float = 60.0,
    limit: float = 3600.0,
) -> tuple[Tally, dict[str, Coverage]]:
    """Try inputs on each reader, one after the other.

    Args:
        readers: of `fuzz.READERS`.
        seed: of libFuzzer; the same inputs come again where it ends by `runs`.
        folder: one of this name is made.
        runs: inputs of each reader; 0 for as many as there is time for.
        seconds: for each reader at most, beside what it takes to start.
        limit: in seconds, after which no reader is begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [str(number) for number in (seed, runs, int(seconds), int(limit))]
    command = [sys.executable, "-m", __spec__.name, *numbers, str(folder), *readers]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"The campaign itself fails:\n{done.stderr[-3000:]}")
    tally, coverage = Tally(), {}
    for reader in readers:
        place = folder / reader
        if place.exists():
            coverage[reader] = Coverage.of((place / "log").read_text())
            read, refused, _, _ = _STATE.unpack((place / "state").read_bytes()[: _STATE.size])
            tally.counts[reader] = Counter(read=read, refused=refused)
            for line in (place / "defects").read_text().splitlines():
                what, words, example = json.loads(line)
                tally.add(
                    reader, what, Defect(reader, what, f"{seed}/{reader}", words, bytes.fromhex(example))
                )
    return tally, coverage


def _main() -> None:
    """Import what is read with, instrumented, and try each reader in children."""
    seed, runs, seconds, limit = map(int, sys.argv[1:5])
    folder, readers = Path(sys.argv[5]), sys.argv[6:]
    started = time.monotonic()

    import atheris

    with atheris.instrument_imports(include=_GUIDING, exclude=_COMPILED):
        import tests.campaign.fuzz  # noqa: F401

    for reader in readers:
        if time.monotonic() - started < limit:
            _try(reader, seed, runs, seconds, folder / reader)


def _try(reader: str, seed: int, runs: int, seconds: int, folder: Path) -> None:
    """Try one reader, again where an input ends its process."""
    for name in ("corpus", "files", "work"):
        (folder / name).mkdir(parents=True)
    (folder / "defects").touch()
    (folder / "state").touch()
    os.truncate(folder / "state", _STATE.size + _LONGEST)
    left = float(seconds)
    for start in range(_MOST_STARTS):
        shutil.rmtree(folder / "files")
        (folder / "files").mkdir()
        done = forked(
            lambda start=start, left=left: _fuzz(reader, seed + start, runs, int(left), folder),  # type: ignore[misc]
            folder / "work",
            limit_s=left + _STARTING,
        )
        with open(folder / "log", "a") as log:
            log.write(done.err)
        if done.code == 0:
            return
        content = (folder / "state").read_bytes()
        *_, n = _STATE.unpack(content[: _STATE.size])
        if "INITED" not in done.err and not n:
            raise AssertionError(f"{reader}: its good files could not be made\n{done.err[-3000:]}")
        what = "a hang" if done.code == -1 else f"the process ended with {done.code}"
        _found(folder, what, done.err[-500:], content[_STATE.size : _STATE.size + n])
        left -= done.seconds
        if left < 1:
            return


def _found(folder: Path, what: str, words: str, example: bytes) -> None:
    with open(folder / "defects", "a") as stream:
        stream.write(json.dumps([what, words, example[:100_000].hex()]) + "\n")


def _fuzz(reader: str, seed: int, runs: int, seconds: int, folder: Path) -> int:
    """Hand this process to libFuzzer."""
    import atheris

    from tests.campaign.fuzz import judge, settle
    from tests.campaign.mutations import mutate

    made = settle(reader, folder / "files")
    names = sorted(made.seeds)
    for k, name in enumerate(names):
        (folder / "corpus" / f"good-{k}").write_bytes(bytes([k, 0]) + made.seeds[name])
    with open(folder / "state", "r+b") as stream:
        state = mmap.mmap(stream.fileno(), 0)
    counts = list(_STATE.unpack(state[: _STATE.size]))
    known: set[str] = set()

    def parts(data: bytes) -> tuple[str, int, bytes]:
        """Return the name of the file, what settles the chances, and the content."""
        head = data[:2].ljust(2, b"\0")
        return names[head[0] % len(names)], head[1], data[2:]

    def try_one(data: bytes) -> None:
        state[_STATE.size : _STATE.size + len(data)] = data
        counts[3] = len(data)
        state[: _STATE.size] = _STATE.pack(*counts)
        name, chance, content = parts(data)
        outcome, words = judge(lambda: made.read(name, content, Random(chance)), _SECONDS)
        counts[{"read": 0, "refused": 1}.get(outcome, 2)] += 1
        state[: _STATE.size] = _STATE.pack(*counts)
        if outcome not in ("read", "refused") and outcome not in known:
            known.add(outcome)
            _found(folder, outcome, words[:2000], f"{name}: ".encode() + content)

    def changed(data: bytes, most: int, number: int) -> bytes:
        rng = Random(number)
        name, _, content = parts(data)
        if rng.random() < 0.5:
            try:
                made_of_it = data[:2].ljust(2, b"\0") + mutate(name, content, rng)
            except Exception:  # it is no longer of its format, which is what mutations know
                made_of_it = b""
            if 2 < len(made_of_it) <= most:
                return made_of_it
        return bytes(atheris.Mutate(data, most))

    options = {
        "seed": seed + 1,  # 0 is a random one
        "runs": runs or -1,
        "max_total_time": seconds,
        "max_len": min(_LONGEST, max(4096, 2 * max(map(len, made.seeds.values())))),
        "len_control": 0,
        "timeout": 600,  # never: `judge` bounds time, and an alarm of 0 s goes off in every slow input
        "rss_limit_mb": 0,
        "malloc_limit_mb": 0,
        "reload": 0,
        "artifact_prefix": f"{folder}/",
    }
    words = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *words, str(folder / "corpus")], try_one, custom_mutator=changed)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    _main()
