"""Pools of threads: set up before libraries are loaded, limited by `--jobs`, left alone in a library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rcnn_svm import threads
from rcnn_svm.threads import in_order

NAMES = (
    "OMP_WAIT_POLICY",
    "KMP_BLOCKTIME",
    "OPENBLAS_THREAD_TIMEOUT",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "OPENCV_FOR_THREADS_NUM",
)

# What the command leaves to a verb, told by a verb of its own once every library is loaded.
TELL = """
import json, os, sys
import rcnn_svm.cli as cli
build = cli.build_parser
def tell(options):
    before = sorted({"torch", "sklearn", "numba"} & set(sys.modules))
    from rcnn_svm.networks.backbone import load_backbone
    load_backbone("small_cnn", "random")
    import cv2, numba, scipy.linalg, sklearn.svm, torch
    from threading import Thread
    from threadpoolctl import threadpool_info
    in_thread = []
    thread = Thread(target=lambda: in_thread.append(torch.get_num_threads()))
    thread.start(); thread.join()
    print(json.dumps({
        "environment": dict(os.environ), "loaded before": before,
        "pools": {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()},
        "torch": [torch.get_num_threads(), torch.get_num_interop_threads(), *in_thread],
        "numba": numba.get_num_threads(), "opencv": cv2.getNumThreads(),
    }))
def build_parser():
    parser = build()
    parse = parser.parse_args
    def parse_args(words):
        options = parse(words)
        options.run = tell
        return options
    parser.parse_args = parse_args
    return parser
cli.build_parser = build_parser
sys.exit(cli.main(["extract", "image", "--out", "x.npy", *sys.argv[1:]]))
"""
LIBRARY = f"""
import os
def ours():  # OpenCV's import has variables of its own
    return {{name: os.environ.get(name) for name in {NAMES}}}
before = ours()
import rcnn_svm
from rcnn_svm import ExperimentConfig, load_detector
import rcnn_svm.cli, torch, cv2
import rcnn_svm.networks.backbone
assert ours() == before
threads = torch.get_num_threads(), torch.get_num_interop_threads(), cv2.getNumThreads()
assert rcnn_svm.cli.main(["layers", "small_cnn"]) == 0
assert ours() == before
assert (torch.get_num_threads(), torch.get_num_interop_threads(), cv2.getNumThreads()) == threads
"""


def run(code: str, *arguments: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[1])} | variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def told(*arguments: str, **variables: str) -> dict:
    return json.loads(run(TELL, *arguments, **variables))


def test_one_job_is_one_thread_in_every_pool() -> None:
    found = told("--jobs", "1", OMP_NUM_THREADS="3", MKL_NUM_THREADS="3", OPENBLAS_NUM_THREADS="3")
    assert found["loaded before"] == []  # the environment was set before they read it
    assert len(found["pools"]) >= 3  # torch's, scikit-learn's, numpy's
    assert set(found["pools"].values()) == {1}
    assert found["torch"] == [1, 1, 1]
    assert found["numba"] == found["opencv"] == 1
    assert found["environment"]["MKL_NUM_THREADS"] == "1"


def test_jobs_count_and_threads_wait_asleep() -> None:
    found = told("--jobs", "3")
    torchs = min(3, threads.usable_cores())  # torch itself takes no more
    assert found["torch"] == [torchs, 3, torchs]
    assert {found["environment"][name] for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")} == {"3"}
    assert found["environment"]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert found["environment"]["KMP_BLOCKTIME"] == "0"
    blas = {path: n for path, n in found["pools"].items() if "openblas" in path}
    assert set(blas.values()) <= {1}  # work is divided above it


def test_what_the_user_has_set_stays() -> None:
    theirs = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "7"}
    found = told(**theirs)
    assert theirs.items() <= found["environment"].items()
    assert found["torch"][0] == 1
    assert found["numba"] == 7
    # `--jobs` is their word too: what is more is lowered, what is less stays.
    found = told("--jobs", "3", **theirs)
    assert found["torch"][0] == 1
    assert found["numba"] == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_a_process_on_one_core_has_one_thread() -> None:
    pinned = "import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])\n"
    found = json.loads(run(pinned + TELL))
    assert set(found["pools"].values()) == {1}
    assert found["torch"] == [1, 1, 1]


def test_a_library_leaves_pools_and_environment_alone() -> None:
    run(LIBRARY)


def test_results_come_in_order_from_several_threads() -> None:
    meet = threading.Barrier(2, timeout=20)  # breaks unless two are at work at once

    def work(i: int) -> int:
        meet.wait()
        return i * i

    assert list(in_order(work, range(8), 2)) == [i * i for i in range(8)]


def test_work_is_taken_as_it_is_wanted() -> None:
    taken: list[int] = []
    results = in_order(lambda i: i, (taken.append(i) or i for i in range(100)), 2)
    assert next(results) == 0
    results.close()
    assert len(taken) <= 5


@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_first_error_ends_it(n_threads: int) -> None:
    results = in_order(lambda i: 1 // (i - 2), range(50), n_threads)
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_torch_is_shared_out_and_put_back() -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert set(in_order(lambda _: torch.get_num_threads(), range(6), 2)) == {2}
        nested = in_order(lambda _: list(in_order(lambda _: threading.get_ident(), range(3), 2)), range(4), 2)
        assert all(len(set(idents)) == 1 for idents in nested)
        fresh: list[int] = []
        thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *fresh] == [4, 4]
    finally:
        torch.set_num_threads(before)


def test_kernel_scores_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from rcnn_svm.heads.kernels import RBF
    from rcnn_svm.heads.scorers import KernelScorer

    rng = np.random.default_rng(0)
    support, dual = rng.normal(size=(40, 9)).astype(np.float32), rng.normal(size=(3, 40)).astype(np.float32)
    scorer = KernelScorer(support, dual, np.zeros(3, np.float32), RBF(0.1))
    rows = rng.normal(size=(101, 9)).astype(np.float32)
    whole = scorer.decision_function(rows)
    monkeypatch.setattr(threads, "_allowed", 3)
    np.testing.assert_allclose(scorer.decision_function(rows), whole, rtol=1e-5, atol=1e-5)
    assert scorer.decision_function(rows[:0]).shape == (0, 3)
