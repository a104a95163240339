"""CPU seconds of a training beside other work and alone; writes results/benchmarks/load.json.

    python benchmarks/load.py DATA [--repeats 2]

Two short trainings by the plain command, each in a process of its own, nothing cached: digits in scenes (a
network fine-tuned on crops) and photographs of fruit below DATA (shared convolutions, fc layers). Each runs
alone, and with a process in an endless loop for every core. Rows also hold the same with threads that wait as
the libraries have it when they are not told otherwise: in loops. Run it on a machine that does nothing else;
about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rcnn_svm.files import write_json
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance
from rcnn_svm.threads import usable_cores

SPINNING = {
    "GOMP_SPINCOUNT": "300000",  # libgomp's own
    "KMP_BLOCKTIME": "200",  # milliseconds, LLVM's own
    "OPENBLAS_THREAD_TIMEOUT": "26",
    "OPENBLAS_NUM_THREADS": str(usable_cores()),
}
DIGITS = ["digits", "--max-images", "16", "--set", "finetune.n_steps=40"]
FRUIT = ["--max-images", "20", "--no-choice", "--set", "fc.n_steps=60"]


class Spent(NamedTuple):
    """What a process took, in seconds: of all cores together, and on the clock."""

    cpu: float
    wall: float


def train(what: list[str], variables: dict[str, str]) -> Spent:
    """Train in a fresh process with an empty cache; what it prints is shown where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rcnn_svm", "train", *what]
        command += ["--out", f"{folder}/detector", "--cache", f"{folder}/cache"]
        log = Path(folder) / "log"
        started = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(
                command, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{log.read_text()}\n{' '.join(command)}: exit code {process.returncode}")
    return Spent(usage.ru_utime + usage.ru_stime, wall)


@contextlib.contextmanager
def other_work(n_cores: int) -> Iterator[None]:
    """Keep so many processes busy inside the block."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_cores)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def rows_of(name: str, runs: list[Spent]) -> list[dict[str, Any]]:
    rows = []
    for what, values in (("CPU", [run.cpu for run in runs]), ("wall", [run.wall for run in runs])):
        figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        row = {"name": f"{name}, {what}", "unit": "s", "n": len(runs)}
        rows.append(row | {key: round(value, 2) for key, value in figures.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the data set fruit")
    parser.add_argument(
        "--repeats", type=int, default=2, help="of all but waiting in loops beside other work"
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder of the results")
    options = parser.parse_args()
    trainings = {"digits": DIGITS, "fruit": [str(options.data / "fruit"), *FRUIT]}
    n_cores = usable_cores()
    rows: list[dict[str, Any]] = []
    cpu: dict[tuple[bool, bool], float] = {}
    for what in trainings.values():
        train(what, {})  # leaves compiled kernels behind
    runs: dict[tuple[bool, bool, str], list[Spent]] = {}
    for repeat in range(options.repeats):
        for loaded in (False, True):
            with other_work(n_cores if loaded else 0):
                for spinning in (False, True):
                    if loaded and spinning and repeat:
                        continue  # minutes of waiting, which once is enough to see
                    for name, what in trainings.items():
                        spent = train(what, SPINNING if spinning else {})
                        runs.setdefault((loaded, spinning, name), []).append(spent)
    for (loaded, spinning, name), spent in runs.items():
        waiting = "waiting in loops" if spinning else "waiting asleep"
        rows += rows_of(f"{name}, {'beside other work' if loaded else 'alone'}, {waiting}", spent)
        say(f"{rows[-2]['name']}: {rows[-2]['median']:.1f} s; wall {rows[-1]['median']:.1f} s")
        cpu[loaded, spinning] = cpu.get((loaded, spinning), 0.0) + rows[-2]["median"]
    ratio = cpu[True, False] / cpu[False, False]
    result = {
        "schema": 1,
        "benchmark": "load",
        "targets": {
            "cpu_seconds_under_load_ratio": {
                "value": round(ratio, 3),
                "unit": "x",
                "n": options.repeats,
                "ours": round(cpu[True, False], 1),
                "peer": round(cpu[False, False], 1),
                "peer_name": "the same alone, CPU s",
                "how": f"CPU seconds of two short trainings beside an endless loop for each of {n_cores} "
                f"cores, over those alone; with threads that wait in loops, as the libraries do untold, "
                f"{cpu[True, True]:.0f} over {cpu[False, True]:.0f} s.",
            }
        },
        "rows": rows,
        "provenance": provenance(seed=0),
    }
    write_json(options.out / "load.json", result)


if __name__ == "__main__":
    main()
