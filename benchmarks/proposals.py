"""Measure selective search against OpenCV's: speed, recall, scaling, cold start.

    RCNN_SVM_DATA=<folder with voc2007-mini> python benchmarks/proposals.py
    RCNN_SVM_DATA=<folder with voc2007-mini> python benchmarks/proposals.py rank

The first writes `results/benchmarks/proposals.json` and the figure of `docs/proposals.md`. OpenCV's
contrib build is installed into an environment of its own, since it shares files with the package's
OpenCV. The second fits the diverse ranking on the training split, compares it with the paper's on
the validation split and writes `results/benchmarks/proposal_ranking.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import iou
from rcnn_svm.datasets import load_dataset
from rcnn_svm.errors import ConfigError
from rcnn_svm.files import write_json
from rcnn_svm.progress import say, track
from rcnn_svm.proposals import (
    ProposalRecall,
    SelectiveSearchConfig,
    cached_proposals,
    dense_grid,
    proposal_recall,
    selective_search,
)
from rcnn_svm.report.provenance import provenance
from rcnn_svm.structures import Sample

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
MEGAPIXELS = (0.1, 0.3, 1.0, 3.0, 12.0)
SEED = 0

# Runs under the other environment: one JSON line in, one out.
PEER = """
import cv2, json, sys, time
cv2.setNumThreads(1)
for line in sys.stdin:
    task = json.loads(line)
    image = cv2.imread(task["path"])
    start, cpu = time.perf_counter(), time.process_time()
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(image)
    getattr(search, "switchToSelectiveSearch" + task["mode"])()
    boxes = search.process()
    answer = {"s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    print(json.dumps({**answer, "boxes": boxes.tolist(), "version": cv2.__version__}), flush=True)
"""

ONE_SEARCH = """
import resource, sys, time
start = time.perf_counter()
import numpy as np
from rcnn_svm.proposals import selective_search
image = np.load(sys.argv[1])
selective_search(image[:64, :64])
if len(sys.argv) > 2:
    start = time.perf_counter()
    selective_search(image)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
"""


class Peer:
    """OpenCV's selective search in a process and an environment of its own."""

    def __init__(self, python: Path):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [str(python), "-c", PEER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, path: Path, mode: str) -> dict[str, Any]:
        """Search one image in mode `Fast` or `Quality`; return seconds, boxes (R, 4) and version."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"path": str(path), "mode": mode}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        boxes = np.array(answer["boxes"], np.float32).reshape(-1, 4)  # x y w h
        boxes[:, 2:] += boxes[:, :2]
        return {**answer, "boxes": boxes}

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def peer_python(folder: Path) -> Path:
    """Return the interpreter of an environment with OpenCV's contrib build, made where missing."""
    python = folder / "bin/python"
    check = [str(python), "-c", "import cv2; cv2.ximgproc.segmentation"]
    if not python.exists() or subprocess.run(check, check=False, capture_output=True).returncode:
        say(f"Installing OpenCV's contrib build into {folder}")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "--upgrade", "pip"], check=True)
        subprocess.run([*pip, "--only-binary", ":all:", "opencv-contrib-python-headless"], check=True)
    return python


def spread(what: str, values: Sequence[float], unit: str = "s", **more: Any) -> dict[str, Any]:
    """Return one row of the raw figures."""
    return {
        "what": what,
        "unit": unit,
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
        **more,
    }


def target(
    value: float, unit: str, n: int, ours: float, peer: float | None, peer_name: str, how: str
) -> dict[str, Any]:
    return {
        "value": value,
        "unit": unit,
        "n": n,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "how": how,
    }


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    start, cpu = time.perf_counter(), time.thread_time()
    result = call()
    return time.perf_counter() - start, time.thread_time() - cpu, result


def path_of(sample: Sample) -> Path:
    if sample.path is None:
        raise ConfigError(f"benchmark: {sample.image_id} must have a file. Use a data set on disk.")
    return sample.path


def measure_speed(
    samples: Sequence[Sample], peer: Peer
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, dict[str, NDArray[np.float32]]]]:
    """Time both modes of both, image by image in turn."""
    rows, targets = [], {}
    seconds: dict[str, list[float]] = {}
    boxes: dict[str, dict[str, NDArray[np.float32]]] = {"Fast": {}, "Quality": {}}
    version = ""
    for sample in track(samples, "speed"):
        image = sample.read()
        for mode, config in (
            ("Fast", SelectiveSearchConfig("fast")),
            ("Quality", SelectiveSearchConfig("quality")),
        ):
            wall, cpu, _ = timed(lambda image=image, config=config: selective_search(image, config))
            theirs = peer(path_of(sample), mode)
            version = theirs["version"]
            boxes[mode][sample.image_id] = theirs["boxes"]
            for key, value in (
                (f"ours {mode}", wall),
                (f"ours {mode} cpu", cpu),
                (f"OpenCV {mode}", theirs["s"]),
                (f"OpenCV {mode} cpu", theirs["cpu_s"]),
            ):
                seconds.setdefault(key, []).append(value)
    for mode in ("Fast", "Quality"):
        medians = {who: statistics.median(seconds[f"{who} {mode}"]) for who in ("ours", "OpenCV")}
        for who in ("ours", "OpenCV"):
            cpu_s = statistics.median(seconds[f"{who} {mode} cpu"])
            rows.append(spread(f"{who}, {mode.lower()} mode", seconds[f"{who} {mode}"], median_cpu_s=cpu_s))
        targets[f"selective_search_{mode.lower()}_speedup"] = target(
            medians["OpenCV"] / medians["ours"], "x", len(samples), medians["ours"], medians["OpenCV"],
            f"OpenCV {version} ximgproc, {mode.lower()} mode, one thread",
            "median seconds an image, both in turn on each image, one thread each, pixels to boxes",
        )  # fmt: skip
    return rows, targets, boxes


def peer_fast_boxes(
    samples: Sequence[Sample], python: Path, known: dict[str, NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """Return OpenCV's fast boxes of every sample, two processes computing the missing ones."""
    missing = [s for s in samples if s.image_id not in known]

    def work(part: Sequence[Sample]) -> None:
        peer = Peer(python)
        for sample in part:
            known[sample.image_id] = peer(path_of(sample), "Fast")["boxes"]
        peer.close()

    say(f"OpenCV's boxes of {len(missing)} more images")
    threads = [threading.Thread(target=work, args=(missing[i::2],)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [known[s.image_id] for s in samples]


def measure_recall(
    samples: Sequence[Sample],
    n_classes: int,
    fast: Sequence[NDArray[np.float32]],
    quality: dict[str, NDArray[np.float32]],
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, ProposalRecall]]:
    """Compare the boxes of both, of the diverse ranking and of a grid."""

    def measured(boxes: Sequence[NDArray[np.float32]], part: Sequence[Sample] = samples) -> ProposalRecall:
        return proposal_recall(boxes, [s.truth for s in part], n_classes, budgets=BUDGETS)

    def ours(**settings: Any) -> ProposalRecall:
        found = cached_proposals(samples, SelectiveSearchConfig(**settings), None, n_jobs=2)
        return measured([f.boxes for f in found])

    some = [s for s in samples if s.image_id in quality]
    curves = {
        "fast": ours(),
        "fast, diverse ranking": ours(ranking="diverse"),
        "quality": ours(mode="quality"),
        "OpenCV fast": measured(fast),
        f"OpenCV quality ({len(some)} images)": measured([quality[s.image_id] for s in some], some),
        "grid": grid_recall(samples, n_classes),
    }
    rows = [
        {
            "what": f"recall, {name}",
            "unit": "fraction",
            "n": int(result.image.max()) + 1,
            "boxes_per_image": result.n_boxes,
            "budgets": list(result.budgets),
            "mabo": result.mabo().tolist(),
            **{f"recall_{t}": result.recall(t).tolist() for t in (0.5, 0.7, 0.8)},
        }
        for name, result in curves.items()
    ]
    at = BUDGETS.index(2000)
    mine, theirs = (float(curves[name].mabo()[at]) for name in ("fast", "OpenCV fast"))
    gain = target(
        mine - theirs, "fraction", len(samples), mine, theirs, "OpenCV ximgproc, fast mode",
        "mean average best overlap with the first 2000 boxes, ours in the paper's fast mode and order",
    )  # fmt: skip
    return rows, {"selective_search_fast_mabo_gain": gain}, curves


def grid_recall(samples: Sequence[Sample], n_classes: int) -> ProposalRecall:
    """Measure a grid made for each budget, which is fairer to it than the start of a large one."""
    parts = [
        proposal_recall(
            [dense_grid(s.size, budget).boxes for s in samples],
            [s.truth for s in samples],
            n_classes,
            budgets=[budget],
        )
        for budget in BUDGETS
    ]
    overlap = np.concatenate([p.overlap for p in parts], axis=1)
    return ProposalRecall(BUDGETS, overlap, parts[0].labels, parts[0].image, n_classes, parts[-1].n_boxes)


def measure_two_cores(
    samples: Sequence[Sample], repeats: int = 5
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Compare one thread with two on the same images, in turn."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for n_jobs in (1, 2):
            wall, _, _ = timed(
                lambda n=n_jobs: cached_proposals(samples, SelectiveSearchConfig(), None, n_jobs=n)
            )
            seconds[n_jobs].append(len(samples) / wall)
    one, two = (statistics.median(seconds[n]) for n in (1, 2))
    rows = [
        spread(f"{n} threads, files to boxes", v, "images/s", images=len(samples)) for n, v in seconds.items()
    ]
    how = "median images a second with two threads over that with one, in turn, reading included"
    return rows, {
        "selective_search_two_core_scaling": target(two / one, "x", repeats, two, one, "one thread", how)
    }


def run_one(image: Path, *more: str, cache: Path | None = None) -> tuple[float, float]:
    environment = dict(os.environ) if cache is None else {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", ONE_SEARCH, str(image), *more]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
    seconds, megabytes = done.stdout.split()
    return float(seconds), float(megabytes)


def measure_start(folder: Path, image: Path, repeats: int = 3) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time a new process from its first import to its first boxes, without and with compiled code on disk."""
    cold, warm = [], []
    for i in range(repeats):
        cache = folder / f"cache-{i}"
        cold.append(run_one(image, cache=cache)[0])
        warm.append(run_one(image, cache=cache)[0])
    how = "median seconds from the first import to the first boxes in a new process that has to compile"
    value = statistics.median(cold)
    rows = [spread("cold start", cold), spread("warm start", warm)]
    return rows, {"selective_search_cold_start": target(value, "s", repeats, value, None, "none", how)}


def mosaic(samples: Sequence[Sample], megapixels: float) -> NDArray[np.uint8]:
    """Return photographs side by side, cut to 4:3 and a number of pixels."""
    height = round((megapixels * 1e6 * 0.75) ** 0.5)
    width = round(height / 0.75)
    canvas = np.zeros((height, width, 3), np.uint8)
    pictures = itertools.cycle(samples)
    y = 0
    while y < height:
        x, step = 0, 10**9
        while x < width:
            picture = next(pictures).read()[: height - y, : width - x]
            canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
            x, step = x + picture.shape[1], min(step, picture.shape[0])
        y += step
    return canvas


def measure_sizes(folder: Path, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Time mosaics of photographs of growing size, each in a new process, and note its peak memory."""
    rows = []
    for megapixels in MEGAPIXELS:
        path = folder / "mosaic.npy"
        image = mosaic(samples, megapixels)
        np.save(path, image)
        seconds, megabytes = run_one(path, "timed")
        actual = image.shape[0] * image.shape[1] / 1e6
        rows.append(
            spread(
                f"{megapixels} megapixels",
                [seconds],
                s_per_megapixel=seconds / actual,
                peak_rss_mb=megabytes,
            )
        )
    return rows


def compare(arguments: argparse.Namespace) -> None:
    """Measure everything and write the result."""
    dataset = load_dataset(arguments.data / "voc2007-mini", "test")
    samples = dataset.samples[: arguments.images]
    python = peer_python(arguments.venv)
    selective_search(samples[0].read())  # compiled or loaded before anything is timed
    peer = Peer(python)
    peer(path_of(samples[0]), "Fast")
    rows, targets, boxes = measure_speed(samples[: arguments.timed], peer)
    peer.close()
    fast = peer_fast_boxes(samples, python, boxes["Fast"])
    more_rows, more_targets, curves = measure_recall(samples, len(dataset.classes), fast, boxes["Quality"])
    rows += more_rows
    targets.update(more_targets)
    more_rows, more_targets = measure_two_cores(samples[:60])
    rows += more_rows
    targets.update(more_targets)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "first.npy", samples[0].read())
        more_rows, more_targets = measure_start(folder, folder / "first.npy")
        rows += more_rows + measure_sizes(folder, samples)
        targets.update(more_targets)
    from rcnn_svm.proposals.plot import recall_figure

    recall_figure(curves).savefig(arguments.figure)
    result = {
        "schema": 1,
        "benchmark": "proposals",
        "targets": targets,
        "rows": rows,
        "provenance": provenance(seed=SEED),
    }
    write_json(arguments.results / "proposals.json", result)
    for name, entry in targets.items():
        say(f"{name}: {entry['value']:.3f} {entry['unit']} (ours {entry['ours']:.4g}, peer {entry['peer']})")


Candidate = tuple[NDArray[np.int32], NDArray[np.float64], Sample]


def candidates(samples: Sequence[Sample]) -> list[Candidate]:
    """Return the distinct boxes of each image in the paper's order, and their cues."""
    from rcnn_svm.proposals.ranking import cues
    from rcnn_svm.proposals.selective_search import ranked_regions

    result = []
    for sample in track(samples, "candidates"):
        boxes, order, _, first = ranked_regions(sample.read(), SelectiveSearchConfig())
        result.append((boxes[first], cues(boxes, order, first, sample.size), sample))
    return result


def rank(arguments: argparse.Namespace) -> None:
    """Fit the diverse ranking on train, compare it with the paper's on val and on test."""
    from sklearn.linear_model import LogisticRegression

    from rcnn_svm.proposals import ranking

    splits = {name: load_dataset(arguments.data / "voc2007-mini", name) for name in ("train", "val", "test")}
    n_classes = len(splits["train"].classes)
    train = candidates(splits["train"].samples)
    x = np.concatenate([values for _, values, _ in train])
    y = np.concatenate([best_overlap(boxes, sample) > 0.6 for boxes, _, sample in train])
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    model = LogisticRegression(max_iter=500).fit((x - mean) / deviation, y)
    weights = np.round(model.coef_[0] / deviation, 3)

    def recall(
        part: Sequence[Candidate], order: Callable[[Candidate], NDArray[np.int64]] | None
    ) -> ProposalRecall:
        boxes = [c[0] if order is None else c[0][order(c)] for c in part]
        return proposal_recall(
            [b.astype(np.float32) for b in boxes], [s.truth for _, _, s in part], n_classes, budgets=BUDGETS
        )

    def diverse(candidate: Candidate) -> NDArray[np.int64]:
        return ranking.diverse_order(candidate[0], candidate[1] @ weights)

    rows: list[dict[str, Any]] = []
    grid = []
    for penalty in (2.0, 3.0, 4.0, 6.0):
        for tolerated in (0.2, 0.3, 0.4, 0.5):
            ranking.PENALTY, ranking.TOLERATED_IOU = penalty, tolerated
            result = recall(train[::3], diverse)
            at = [BUDGETS.index(b) for b in (100, 200, 500, 1000)]
            value = float(np.mean([m[at] for m in measures(result).values()]))
            grid.append((value, penalty, tolerated))
            rows.append(
                {"what": "choice", "penalty": penalty, "tolerated_iou": tolerated, "mean_measure": value}
            )
    _, ranking.PENALTY, ranking.TOLERATED_IOU = max(grid)
    rows.append(
        {
            "what": "fit",
            "weights": dict(zip(ranking.CUES, weights.tolist(), strict=True)),
            "penalty": ranking.PENALTY,
            "tolerated_iou": ranking.TOLERATED_IOU,
            "n": len(train),
        }
    )
    targets = {}
    for split in ("val", "test"):
        part = candidates(splits[split].samples)
        paper, ours = recall(part, None), recall(part, diverse)
        for budget in (100, 200, 500, 1000, 2000):
            row: dict[str, Any] = {"what": f"{split}, {budget} boxes", "n": len(part)}
            for name, (low, gain, high) in gains(paper, ours, BUDGETS.index(budget)).items():
                row[name] = {
                    "paper": float(measures(paper)[name][BUDGETS.index(budget)]),
                    "gain": gain,
                    "interval": [low, high],
                }
            rows.append(row)
            if split == "val" and budget < 2000:
                mine, theirs = (float(r.recall(0.5)[BUDGETS.index(budget)]) for r in (ours, paper))
                targets[f"diverse_ranking_recall_gain_{budget}"] = target(
                    mine - theirs, "fraction", len(part), mine, theirs, "the paper's order of the same boxes",
                    f"recall at IoU 0.5 with {budget} boxes on val; settings fitted on train",
                )  # fmt: skip
    report = {
        "schema": 1,
        "benchmark": "proposal_ranking",
        "targets": targets,
        "rows": rows,
        "provenance": provenance(seed=SEED),
    }
    write_json(arguments.results / "proposal_ranking.json", report)
    for row in rows:
        say(json.dumps(row))


def best_overlap(boxes: NDArray[np.int32], sample: Sample) -> NDArray[np.float64]:
    """Return (R,) the IoU of each box with the best object that counts."""
    counted = sample.truth[~(sample.truth.difficult | sample.truth.crowd)]
    return iou(boxes.astype(np.float32), counted.boxes).max(axis=1) if len(counted) else np.zeros(len(boxes))


def measures(result: ProposalRecall) -> dict[str, NDArray[np.float64]]:
    return {"mabo": result.mabo(), **{f"recall_{t}": result.recall(t) for t in (0.5, 0.7, 0.8)}}


def gains(
    paper: ProposalRecall, ours: ProposalRecall, at: int, n_resamples: int = 2000
) -> dict[str, tuple[float, float, float]]:
    """Return the 2.5 % point, the value and the 97.5 % point of each gain, images resampled in pairs."""
    rng = np.random.default_rng(SEED)
    n_images = int(paper.image.max()) + 1
    draws: dict[str, list[float]] = {name: [] for name in measures(paper)}
    for _ in range(n_resamples):
        times = np.bincount(rng.integers(0, n_images, n_images), minlength=n_images)
        rows = np.repeat(np.arange(len(paper.image)), times[paper.image])
        for name, mine in one_budget(ours, rows, at).items():
            draws[name].append(mine - one_budget(paper, rows, at)[name])
    everything = np.arange(len(paper.image))
    value = {n: v - one_budget(paper, everything, at)[n] for n, v in one_budget(ours, everything, at).items()}
    return {
        name: (float(np.quantile(d, 0.025)), value[name], float(np.quantile(d, 0.975)))
        for name, d in draws.items()
    }


def one_budget(result: ProposalRecall, rows: NDArray[np.int64], at: int) -> dict[str, float]:
    overlap, labels = result.overlap[rows, at], result.labels[rows]
    per_class = np.bincount(labels, overlap, minlength=result.n_classes)
    count = np.bincount(labels, minlength=result.n_classes)
    mabo = float((per_class[count > 0] / count[count > 0]).mean())
    return {"mabo": mabo, **{f"recall_{t}": float((overlap >= t).mean()) for t in (0.5, 0.7, 0.8)}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("compare", "rank"), default="compare")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("RCNN_SVM_DATA"), help="holds voc2007-mini"
    )
    parser.add_argument("--images", type=int, default=400, help="test images whose recall is measured")
    parser.add_argument("--timed", type=int, default=100, help="how many of them are timed")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument(
        "--venv", type=Path, default=cache / "rcnn_svm/opencv-contrib", help="OpenCV's environment"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "results/benchmarks", help="folder of the JSON"
    )
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/proposals-recall.png")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("name the data with --data or RCNN_SVM_DATA")
    arguments.data = Path(arguments.data)
    {"compare": compare, "rank": rank}[arguments.what](arguments)


if __name__ == "__main__":
    main()
