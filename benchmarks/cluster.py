"""What a cluster changes and what it costs; writes results/benchmarks/cluster.json.

    RCNN_SVM_DATA=<folder with voc2007-mini> python benchmarks/cluster.py [--kills N] [--images N]
        [--rounds N] [--small N] [--training N]

- the same bytes: proposals, features, mined SVMs with their certificate, detections of digits in scenes, by
  one thread, by two and by 2 processes; without a network by 1 and 4 processes, by 2 of which one is
  killed at random moments, and by 2 of which one stands still for so long that it is given up;
- a scheduler in a network namespace of its own, workers and client in another: bytes on the wire between them
  (Linux, as root), CPU seconds of all processes against those of threads, memory of each process over many
  small images;
- what part of training the SVMs is the ascent, which stays in one process.

CPU seconds, since other work may run beside this one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dask.config
import numpy as np
import psutil

from rcnn_svm.datasets import load_splits
from rcnn_svm.datasets.digits import digits_splits
from rcnn_svm.detector import Detector, Model
from rcnn_svm.engine import THREADS, Cluster, Engine, connect
from rcnn_svm.experiment.config import ExperimentConfig, HeadsConfig
from rcnn_svm.experiment.parts import Run
from rcnn_svm.experiment.recipe import propose
from rcnn_svm.experiment.regions import SplitRegions, StoredBlocks
from rcnn_svm.features.build import FeatureConfig, build_featurizer
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.features.store import FeatureStore
from rcnn_svm.files import write_json
from rcnn_svm.heads.linear_svm import LinearSVMHead
from rcnn_svm.heads.solver.ascent import Ascent
from rcnn_svm.proposals import SelectiveSearchConfig, cached_proposals
from rcnn_svm.report.provenance import provenance
from rcnn_svm.structures import Dataset, GroundTruth, Sample
from rcnn_svm.threads import limit

OUT = Path(__file__).parents[1] / "results" / "benchmarks" / "cluster.json"
NAMESPACE, THERE, HERE, PORT = "rcnn-svm-bench", "10.77.0.2", "10.77.0.1", 8786
SCENES = ExperimentConfig(
    proposals=SelectiveSearchConfig(max_regions=100),
    features=FeatureConfig("small_cnn", "random", path="warped", taps="fc7"),
    heads=HeadsConfig(names=("linear-svm",)),
    learn="nothing",
)


_STILL_S, _GIVEN_UP = 12.0, {"distributed.scheduler.worker-ttl": "3s"}
QUIET = {
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "1s",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "2s",
}
"""What docs/cluster.md advises for schedulers and workers; `local:N` does so by itself."""


class Colours:
    """A featurizer that takes no time: mean colours."""

    key, n_features = {"mean": "colour"}, 3

    def __call__(self, image: Any, boxes: Any) -> Any:
        """Return (R, 3) numbers."""
        return np.tile(image.mean(axis=(0, 1)).astype(np.float32), (len(boxes), 1))

    def of_image(self, image: Any) -> Any:
        """Return the same for one image."""
        return lambda boxes: self(image, boxes)


def pixels(i: int) -> Any:
    return np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def small_images(n: int) -> list[Sample]:
    def made(i: int) -> Callable[[], Any]:
        return lambda: pixels(i)

    return [Sample(f"image{i}", (32, 32), GroundTruth.empty(), render=made(i)) for i in range(n)]


def everything(engine: Engine, folder: Path, n_jobs: int, *, network: bool) -> str:
    """From scenes to detections; return a digest of all that lies in the store, the weights, their proof.

    Without a network features are mean colours, and nothing is detected: workers start quicker.
    """
    splits, config = digits_splits(40, 8, 8, seed=0), SCENES
    parts, run = config.build(), Run(folder, n_jobs, engine=engine)
    proposals = propose(splits.trainval, parts.proposer, run)
    regions = SplitRegions.of(splits.trainval, proposals, with_truth=True)
    featurizer: Any = build_featurizer(config.features) if network else Colours()
    store = FeatureStore(folder / "features", featurizer, engine=engine)
    store.fill(regions.dataset.samples, regions.boxes)
    blocks, scaler = StoredBlocks(store, regions), FeatureScaler("l2")
    head = LinearSVMHead(C=1.0).fit(blocks.scaled(scaler))
    model = Model(head.scorer_, scaler)
    detector = Detector(
        "linear-svm", splits.test.classes, parts.proposer, None, config.features, None, featurizer, None,
        model, parts.postprocess, None, {},
    )  # fmt: skip
    digest = hashlib.sha256()
    for path in sorted(
        p for p in folder.rglob("*") if p.suffix in (".npy", ".npz") and "cluster" not in p.parts
    ):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    for array in (head.coef_, head.intercept_, head.gap_, head.objective_, np.array(head.mining_.passes)):
        digest.update(array.tobytes())
    for found in detector.detect_all(splits.test.samples, engine=engine) if network else ():
        digest.update(found.boxes.tobytes() + found.scores.tobytes() + found.labels.tobytes())
    return digest.hexdigest()[:16]


def children() -> list[psutil.Process]:
    """Return the processes of workers below this one, and those of scripts that started any."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
    return found


def cpu_seconds() -> float:
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


class Killing:
    """A cluster of whose workers one is killed at random moments.

    Args:
        cluster: of this machine.
        n: times.
        rng: of the moments, counted in results, and of the workers.
    """

    def __init__(self, cluster: Cluster, n: int, rng: random.Random) -> None:
        self._cluster, self._rng, self.left, self._due = cluster, rng, n, 0

    def in_order(self, work: Any, items: Any, n_threads: int) -> Any:
        """See `Engine`."""
        for result in self._cluster.in_order(work, items, n_threads):
            self._due -= 1
            # Mostly not one that is starting, which Dask does not start again.
            alive = children() if self._due < 0 and self.left else []
            if len(alive) > 1 and len(self._cluster._client.nthreads()) == len(alive):
                with contextlib.suppress(OSError):
                    os.kill(self._rng.choice(alive).pid, signal.SIGKILL)
                    self.left, self._due = self.left - 1, self._rng.randrange(40)
            yield result


def wake(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):  # it may have been ended meanwhile
        process.resume()


class Standing:
    """A cluster of whose workers one stands still, is given up, and goes on when another has done its work.

    Args:
        cluster: of this machine.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._due, self.until = cluster, 5, 0.0

    def in_order(self, work: Any, items: Any, n_threads: int) -> Any:
        """See `Engine`."""
        for result in self._cluster.in_order(work, items, n_threads):
            self._due -= 1
            if self._due == 0:
                one = children()[0]
                one.suspend()
                threading.Timer(_STILL_S, wake, [one]).start()
                self.until = time.monotonic() + _STILL_S
            yield result


def same_bytes(n_kills: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def row(how: str, engine: Engine, folder: Path, n_jobs: int = 1, *, network: bool = True) -> None:
        before = cpu_seconds()
        digest = everything(engine, folder, n_jobs, network=network)
        features = "a network's" if network else "mean colours, no detection"
        rows.append({"what": how, "features": features, "digest": digest, "cpu_s": cpu_seconds() - before})
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        row("one thread", THREADS, root / "network-serial")
        row("two threads", THREADS, root / "network-threads", 2)
        with connect("local:2", root / "network-local") as cluster:
            row("local:2", cluster, root / "network-local")
        row("one thread", THREADS, root / "serial", network=False)
        for n in (1, 4):
            with connect(f"local:{n}", root / f"local-{n}") as cluster:
                row(f"local:{n}", cluster, root / f"local-{n}", network=False)
        rng, left = random.Random(0), n_kills
        while left:
            folder = root / f"killed-{left}-{len(rows)}"
            # One each: a worker that dies while it starts is not started again, and one alone is not killed.
            with connect("local:2", folder) as cluster:
                cluster._client.wait_for_workers(2)
                killing = Killing(cluster, left, rng)
                row("local:2, a worker killed", killing, folder, network=False)
            rows[-1]["kills"], left = left - killing.left, killing.left
            del rows[-1]["cpu_s"]  # those of a killed process are gone
        with dask.config.set(_GIVEN_UP), connect("local:2", root / "late") as cluster:
            cluster._client.wait_for_workers(2)
            standing = Standing(cluster)
            row(f"local:2, a worker still for {_STILL_S:.0f} s", standing, root / "late", network=False)
            assert standing.until
            time.sleep(max(0.0, standing.until - time.monotonic()) + 1)
            del rows[-1]["cpu_s"]  # one that is given up is ended as well
    return rows


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def on_the_wire() -> int:
    """Return the bytes that went over the link so far, both ways, headers included."""
    folder = Path("/sys/class/net/rcnn-here/statistics")
    return sum(int((folder / name).read_text()) for name in ("rx_bytes", "tx_bytes"))


@contextlib.contextmanager
def two_networks(shared: Path, n_workers: int) -> Iterator[tuple[Cluster, psutil.Process]]:
    """A scheduler in a network of its own, linked by a pair of devices; workers and client are here."""
    python, processes = sys.executable, list[subprocess.Popen[bytes]]()
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    quiet["env"] = os.environ | QUIET
    try:
        ip("netns", "add", NAMESPACE)
        ip("link", "add", "rcnn-here", "type", "veth", "peer", "name", "rcnn-there", "netns", NAMESPACE)
        ip("addr", "add", f"{HERE}/24", "dev", "rcnn-here")
        ip("link", "set", "rcnn-here", "up")
        ip("-n", NAMESPACE, "addr", "add", f"{THERE}/24", "dev", "rcnn-there")
        ip("-n", NAMESPACE, "link", "set", "rcnn-there", "up")
        address = f"tcp://{THERE}:{PORT}"
        scheduler = [python, "-m", "distributed.cli.dask_scheduler", "--host", THERE, "--port", str(PORT)]
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", NAMESPACE, *scheduler, "--no-dashboard"], cwd=shared, **quiet
            )
        )
        worker = [python, "-m", "distributed.cli.dask_worker", address, "--nworkers", str(n_workers)]
        worker += ["--nthreads", "1", "--memory-limit", "0", "--no-dashboard", "--host", HERE]
        processes.append(subprocess.Popen([*worker, "--local-directory", str(shared)], cwd=shared, **quiet))
        time.sleep(5)
        with connect(address, shared) as cluster:
            yield cluster, psutil.Process(processes[0].pid)
    finally:
        for one in reversed(processes):
            one.terminate()
        for one in processes:
            one.wait()
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=False, capture_output=True)


def networks(photos: Sequence[Sample], n_small: int, n_rounds: int) -> dict[str, Any]:
    """Return what mapping photographs and small images takes in threads and over two networks."""
    proposer, told = SelectiveSearchConfig(), dict[str, Any]()

    def map_photos(engine: Engine, n: int) -> tuple[str, float, float]:
        before, started = cpu_seconds(), time.perf_counter()
        found = cached_proposals(photos[:n], proposer, None, n_jobs=2, engine=engine)
        digest = hashlib.sha256(b"".join(one.boxes.tobytes() + one.priority.tobytes() for one in found))
        return digest.hexdigest()[:16], cpu_seconds() - before, time.perf_counter() - started

    map_photos(THREADS, 8)  # what is loaded and compiled at the first image is not to be counted
    before = cpu_seconds()
    with tempfile.TemporaryDirectory() as name, two_networks(Path(name), 2) as (cluster, scheduler):
        cluster._client.wait_for_workers(2)
        map_photos(cluster, 8)
        told["start"] = {"cpu_s": cpu_seconds() - before, "n_images": 8}
        before = cpu_seconds()
        time.sleep(10)
        told["idle_cpu_s_per_s"] = (cpu_seconds() - before) / 10
        rounds: dict[str, list[tuple[str, float, float]]] = {"threads": [], "cluster": []}
        wire = 0
        for _ in range(n_rounds):
            rounds["threads"].append(map_photos(THREADS, len(photos)))
            wire -= on_the_wire()
            rounds["cluster"].append(map_photos(cluster, len(photos)))
            wire += on_the_wire()
        told["bytes_per_photo"] = wire / 2 / len(photos) / n_rounds
        for how, own in rounds.items():
            (digest,) = {one[0] for one in own}
            cpu, wall = ([one[i] for one in own] for i in (1, 2))
            told[how] = {"digest": digest, "cpu_s": cpu, "wall_s": wall, "n_images": len(photos)}
            print(how, told[how], flush=True)
        samples = small_images(n_small)
        boxes = [np.array([[0, 0, 16, 16], [8, 8, 32, 32]], np.float32)] * n_small
        store = FeatureStore(Path(name) / "features", Colours(), engine=cluster)
        memory, before, wire = [], cpu_seconds(), on_the_wire()
        for start in range(0, n_small, max(1, n_small // 8)):
            stop = start + max(1, n_small // 8)
            store.fill(samples[start:stop], boxes[start:stop])
            workers = [one.memory_info().rss / 1e6 for one in children()]
            memory.append(
                {
                    "n_images": min(stop, n_small),
                    "scheduler_mb": scheduler.memory_info().rss / 1e6,
                    "workers_mb": sorted(workers),
                    "client_mb": psutil.Process().memory_info().rss / 1e6,
                }
            )
            print(memory[-1], flush=True)
        told["small"] = {
            "n_images": n_small,
            "cpu_s_per_image": (cpu_seconds() - before) / n_small,
            "bytes_per_image": (on_the_wire() - wire) / 2 / n_small,
            "memory": memory,
        }
    return told


def ascent_share(dataset: Dataset, cache: Path) -> dict[str, float]:
    """Return the CPU seconds of training linear SVMs on all regions, and of the ascent in it."""
    config, cpu = ExperimentConfig(learn="nothing", heads=HeadsConfig(names=("linear-svm",))), {}
    run, parts = Run(cache), config.build()
    started = time.process_time()
    proposals = propose(dataset, parts.proposer, run)
    cpu["proposals"] = time.process_time() - started
    regions = SplitRegions.of(dataset, proposals, with_truth=True)
    store = FeatureStore(cache / "features", build_featurizer(parts.features))
    started = time.process_time()
    store.fill(dataset.samples, regions.boxes)
    cpu["features"] = time.process_time() - started
    blocks, ascent, optimise = (
        StoredBlocks(store, regions).scaled(FeatureScaler("l2")),
        [0.0],
        Ascent.optimise,
    )

    def timed(self: Ascent, goal: float) -> None:
        started = time.process_time()
        optimise(self, goal)
        ascent[0] += time.process_time() - started

    Ascent.optimise = timed  # type: ignore[method-assign]
    started = time.process_time()
    try:
        head = LinearSVMHead(C=0.1).fit(blocks)
    finally:
        Ascent.optimise = optimise  # type: ignore[method-assign]
    cpu["training"] = time.process_time() - started
    cpu["ascent"] = ascent[0]
    return {
        "n_images": len(dataset),
        "n_regions": sum(map(len, regions.boxes)),
        "n_classes": len(dataset.classes),
        "passes": head.mining_.passes,
        "largest_gap": float(head.gap_.max()),
        **{f"{name}_cpu_s": value for name, value in cpu.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3, help="times that they are mapped, each way")
    parser.add_argument("--small", type=int, default=4000)
    parser.add_argument("--training", type=int, default=120, help="photographs that SVMs are trained on")
    options = parser.parse_args()
    limit(1, asked=True)
    data = Path(os.environ["RCNN_SVM_DATA"]) / "voc2007-mini"
    splits = load_splits(data)
    shares = []
    with tempfile.TemporaryDirectory() as name:
        for n in (options.training // 4, options.training):
            dataset = Dataset("voc2007-mini", "trainval", splits.train.classes, splits.trainval.samples[:n])
            present = np.flatnonzero(dataset.counts())
            dataset = dataset.with_classes([dataset.classes[k] for k in present])
            shares.append(ascent_share(dataset, Path(name) / str(n)))
            print(shares[-1], flush=True)
    photos = [*splits.trainval.samples, *splits.test.samples][: options.images]
    told = networks(photos, options.small, options.rounds)
    rows = same_bytes(options.kills)
    right = {row["features"]: row["digest"] for row in reversed(rows) if row["what"] == "one thread"}
    n_different = sum(row["digest"] != right[row["features"]] for row in rows)
    n_different += told["threads"]["digest"] != told["cluster"]["digest"]
    n_kills = sum(row.get("kills", 0) for row in rows)
    threads, cluster, small, last = told["threads"], told["cluster"], told["small"], shares[-1]
    first, end = small["memory"][0], small["memory"][-1]
    ours, theirs = (statistics.median(one["cpu_s"]) for one in (cluster, threads))
    share = last["ascent_cpu_s"] / last["training_cpu_s"]

    def target(value: float, unit: str, n: int, ours: float, peer: float | None, name: str, how: str) -> Any:
        own = {"value": value, "unit": unit, "n": n, "ours": ours, "peer": peer}
        return own | {"peer_name": name, "how": how}

    targets = {
        "cluster_different_bytes": target(
            n_different, "runs", len(rows) + 1 - len(right), n_different, None, "",
            f"runs whose digest differs from that of one thread: proposals, features, mined SVMs with gaps "
            f"and objectives, detections of digits in scenes, by 2 threads and 2 processes; the same without "
            f"detections and with mean colours as features by 1 and 4 processes, by 2 of which one was "
            f"killed at random moments, {n_kills} times in all, and by 2 of which one stood still for "
            f"{_STILL_S:.0f} s and was given up after 3; proposals of {len(photos)} photographs in "
            f"two networks",
        ),
        "cluster_overhead": target(
            ours / theirs - 1, "fraction", options.rounds, ours, theirs, "two threads of one process",
            f"CPU seconds of client, scheduler and two workers for the proposals of {len(photos)} photo"
            f"graphs of VOC2007, over those of two threads, less 1; medians of {options.rounds} rounds, turn "
            f"about; all was running and loaded before, which took {told['start']['cpu_s']:.1f} s once. "
            f"Idle, they take {told['idle_cpu_s_per_s']:.3f} s a second, and a round of theirs took "
            f"{statistics.median(cluster['wall_s']):.0f} s of wall clock",
        ),
        "cluster_bytes_per_image": target(
            told["bytes_per_photo"], "bytes", len(photos), told["bytes_per_photo"], None, "",
            "bytes that a scheduler in a network of its own took in, or gave out, which is half of those on "
            "its link to client and workers, headers and heartbeats included, over the photographs whose "
            "proposals were found",
        ),
        "cluster_scheduler_memory_growth": target(
            end["scheduler_mb"] - first["scheduler_mb"], "MB", small["n_images"], end["scheduler_mb"],
            first["scheduler_mb"], f"after {first['n_images']} images",
            f"resident memory of the scheduler after {end['n_images']} small images, less that after "
            f"{first['n_images']}",
        ),
        "mining_share_of_ascent": target(
            share, "fraction", 1, last["ascent_cpu_s"], last["training_cpu_s"], "the whole training",
            f"CPU seconds of the ascent, which one process does, over those of training {last['n_classes']} "
            f"linear SVMs on all {last['n_regions']} regions of {last['n_images']} photographs: a cluster of "
            f"any size makes mining at most {1 / share:.1f} times faster",
        ),
    }  # fmt: skip
    all_rows = [*rows, *shares, told]
    about = provenance(seed=0)
    write_json(
        OUT, {"schema": 1, "benchmark": "cluster", "targets": targets, "rows": all_rows, "provenance": about}
    )


if __name__ == "__main__":
    main()
