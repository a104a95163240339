"""Broken files that are found by what they reach: each reader under libFuzzer, by way of atheris.

An input is two bytes, which name the file and settle the chances of the reader, and the content of the file.
Half of the inputs are mutated by bytes, half by what their format means (`mutations`); what reaches code that
nothing has reached before is mutated further. The oracle is that of `fuzz`. libFuzzer ends its process, so
each reader has one of its own: `python -m tests.campaign.guided READER SEED RUNS SECONDS FOLDER`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import mmap
import os
import re
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.campaign.tally import Defect, Tally

__all__ = ["Coverage", "guided", "missing"]

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
_LONGEST = 1 << 20
"""Bytes of an input."""
_MOST_STARTS = 5
_LINE = re.compile(
    r"^#(\d+)\s+(INITED|NEW|REDUCE|pulse|DONE)\s+cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE
)
_STATE = struct.Struct("<QQQQ")
"""Inputs that were read, refused and wrong, and the length of the one that is tried, which follows."""


@dataclass
class Coverage:
    """What the inputs of a reader reached in our code.

    Attributes:
        edges: branches that the good files reach, and that all inputs reach.
        features: the same, told apart by how often they are taken.
        corpus: inputs that reached something new, the good files among them.
    """

    edges: list[int] = field(default_factory=lambda: [0, 0])
    features: list[int] = field(default_factory=lambda: [0, 0])
    corpus: int = 0

    def to_json(self) -> dict[str, Any]:
        names = ("start", "end")
        return {
            "edges": dict(zip(names, self.edges, strict=True)),
            "features": dict(zip(names, self.features, strict=True)),
            "corpus": self.corpus,
        }

    def note(self, log: str) -> None:
        """Take in what libFuzzer printed."""
        found = [tuple(map(int, (one[3], one[4], one[5]))) for one in _LINE.finditer(log)]
        if found:
            if not self.edges[0]:
                self.edges[0], self.features[0], _ = found[0]
            self.edges[1] = max(self.edges[1], *(edges for edges, _, _ in found))
            self.features[1] = max(self.features[1], *(features for _, features, _ in found))
            self.corpus = found[-1][2]


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
    deadline: float = math.inf,
) -> tuple[Tally, dict[str, Coverage]]:
    """Try inputs on each reader, one after the other.

    Args:
        readers: of `fuzz.READERS`.
        seed: of libFuzzer; the same inputs come again where it ends by `runs`.
        folder: an empty one.
        runs: inputs of each reader; 0 for as many as there is time for.
        seconds: for each reader at most, beside what it takes to start.
        deadline: after which no reader is begun.
    """
    tally, coverage = Tally(), {}
    for reader in readers:
        if time.monotonic() < deadline:
            coverage[reader] = _one(reader, seed, runs, seconds, folder / reader, tally)
    return tally, coverage


def _one(reader: str, seed: int, runs: int, seconds: float, folder: Path, tally: Tally) -> Coverage:
    """Try one reader, again where an input ends the process."""
    (folder / "corpus").mkdir(parents=True)
    (folder / "defects").touch()
    state, coverage = folder / "state", Coverage()
    state.write_bytes(bytes(_STATE.size + _LONGEST))
    left, begun = float(seconds), 0
    while left >= 1 and begun < _MOST_STARTS:
        command = [
            sys.executable,
            "-m",
            __spec__.name,
            reader,
            str(seed + begun),
            str(runs),
            str(int(left)),
            str(folder),
        ]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        started = time.monotonic()
        with open(folder / "log", "w+") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                code = child.wait(_STARTING + left + 60)
                what = f"the process ended with {code}"
            except subprocess.TimeoutExpired:
                child.kill()
                code, what = child.wait(), "a hang"
        words = (folder / "log").read_text(errors="replace")
        coverage.note(words)
        if code == 0:
            break
        content = state.read_bytes()
        *_, n = _STATE.unpack(content[: _STATE.size])
        if not coverage.edges[0] and not n:
            raise AssertionError(f"{reader}: its good files could not be made\n{words[-3000:]}")
        example = content[_STATE.size : _STATE.size + n]
        tally.add(reader, what, Defect(reader, what, f"{seed + begun}/{reader}", words[-500:], example))
        left -= time.monotonic() - started
        begun += 1
    read, refused, _, _ = _STATE.unpack(state.read_bytes()[: _STATE.size])
    tally.counts.setdefault(reader, Counter()).update(read=read, refused=refused)
    for line in (folder / "defects").read_text().splitlines():
        what, told, example = json.loads(line)
        tally.add(reader, what, Defect(reader, what, f"{seed}/{reader}", told, bytes.fromhex(example)))
    return coverage


def _main() -> None:
    reader, seed, runs, seconds, place = sys.argv[1:]
    folder = Path(place)

    import atheris

    with atheris.instrument_imports(include=["rcnn_svm"], exclude=_COMPILED):
        from tests.campaign.fuzz import judge, settle
        from tests.campaign.mutations import mutate

    (folder / "files").mkdir(exist_ok=True)
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
        outcome, words = judge(lambda: made.read(name, content, Random(chance)))
        counts[{"read": 0, "refused": 1}.get(outcome, 2)] += 1
        state[: _STATE.size] = _STATE.pack(*counts)
        if outcome not in ("read", "refused") and outcome not in known:
            known.add(outcome)
            example = f"{name}: ".encode() + content[:100_000]
            with open(folder / "defects", "a") as stream:
                stream.write(json.dumps([outcome, words[:2000], example.hex()]) + "\n")

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
        "seed": int(seed) + 1,  # 0 is a random one
        "runs": int(runs) or -1,
        "max_total_time": seconds,
        "max_len": min(_LONGEST, max(4096, 2 * max(map(len, made.seeds.values())))),
        "len_control": 0,
        "timeout": 0,  # time and memory are bounded by `settle`
        "rss_limit_mb": 0,
        "malloc_limit_mb": 0,
        "reload": 0,
        "artifact_prefix": f"{folder}/",
    }
    words = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *words, str(folder / "corpus")], try_one, custom_mutator=changed)
    atheris.Fuzz()


if __name__ == "__main__":
    _main()
