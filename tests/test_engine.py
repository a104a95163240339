"""Work on images by threads and by a cluster: the same results, whatever happens to workers."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from PIL import Image

from rcnn_svm import engine
from rcnn_svm.cli import main
from rcnn_svm.datasets.digits import digits_splits
from rcnn_svm.engine import THREADS, Cluster, Threads, connect
from rcnn_svm.errors import (
    ClusterError,
    ConfigError,
    DataError,
    DependencyError,
    RcnnSvmError,
    ShapeError,
)
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig, HeadsConfig
from rcnn_svm.experiment.parts import Run
from rcnn_svm.experiment.recipe import run_experiment
from rcnn_svm.experiment.regions import SplitRegions, StoredBlocks
from rcnn_svm.features.build import FeatureConfig, build_featurizer
from rcnn_svm.features.store import FeatureStore
from rcnn_svm.heads.softmax import LogisticHead, SoftmaxHead
from rcnn_svm.proposals import GridConfig, cached_proposals
from rcnn_svm.structures import GroundTruth, Sample
from tests.work_elsewhere import (
    MeanColour,
    bad_at_five,
    full_disk_of_one,
    killed_at_three,
    late_at_three,
    misshapen_at_five,
    mistaken,
    squared,
)

KilledWorker = pytest.importorskip(
    "distributed", reason="a cluster needs Dask: pip install '.[cluster]'"
).KilledWorker

pytestmark = pytest.mark.xdist_group("cluster")  # of which one is started
N = 40


def sample(i: int) -> Sample:
    pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return Sample(f"image-{i}", (40, 60), GroundTruth.empty(), render=lambda: pixels)


class Ended:
    """A future that ended with an error."""

    def __init__(self, error: Exception) -> None:
        self.exception = lambda: error


class Posted:
    """What a cluster does to functions, items and results, in this process: each is sent and read back."""

    def __init__(self, folder: Path) -> None:
        self.plane = engine._Plane(folder)
        self.most = 0

    def in_order(self, work: Callable[[Any], Any], items: Iterable[Any], n_threads: int) -> Iterator[Any]:
        there = self.plane.kept(self.plane.keep(work))
        for item in items:
            packed, files = self.plane.pack(item)
            result, more = self.plane.pack(there(self.plane.unpack(packed)))
            yield self.plane.unpack(result)
            self.plane.forget((*files, *more))
            self.most = max(self.most, len(packed), len(result))


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.suffix in (".npy", ".npz") and "cluster" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with connect("local:2", tmp_path_factory.mktemp("shared")) as cluster:
        yield cluster


def collect(cluster: Cluster, work: Callable[[Any], int], folder: Path) -> tuple[list[int], Exception | None]:
    found = []
    try:
        for result in cluster.in_order(work, ((i, folder) for i in range(N)), 1):
            found.append(result)
    except Exception as error:
        return found, error
    return found, None


SQUARES = [i**2 for i in range(N)]


def test_proposals_and_features_are_the_same_bytes(two: Cluster, tmp_path: Path) -> None:
    samples, folders = [sample(i) for i in range(N)], [tmp_path / "threads", tmp_path / "workers"]
    for one, folder in zip((THREADS, two), folders, strict=True):
        regions = cached_proposals(samples, GridConfig(30), folder / "proposals", engine=one)
        FeatureStore(folder, MeanColour(), engine=one).fill(samples, [own.boxes for own in regions])
        assert [own.image_id for own in regions] == [s.image_id for s in samples]
    assert len(contents(folders[0])) == 2 * N
    assert contents(folders[0]) == contents(folders[1])


def test_a_killed_worker_costs_time_alone(two: Cluster, tmp_path: Path) -> None:
    assert collect(two, killed_at_three, tmp_path) == (SQUARES, None)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_worker_that_stands_still_holds_nobody_up_for_ever(two: Cluster, tmp_path: Path) -> None:
    two._client.wait_for_workers(2)  # the killed one is back
    assert collect(two, late_at_three, tmp_path) == (SQUARES, None)
    assert (tmp_path / "late").exists()


@pytest.mark.parametrize(
    ("work", "kind", "words"),
    [(bad_at_five, DataError, r"five\.jpg: is no image"), (misshapen_at_five, ShapeError, r"got \(0,\)")],
)
def test_a_bad_image_ends_it_as_in_threads(
    two: Cluster, tmp_path: Path, work: Callable[[Any], int], kind: type[Exception], words: str
) -> None:
    two._client.wait_for_workers(2)
    found, error = collect(two, work, tmp_path)
    assert found == SQUARES[:5]
    assert type(error) is kind
    with pytest.raises(kind, match=words) as here:
        list(THREADS.in_order(work, ((i, tmp_path) for i in range(N)), 1))
    assert str(here.value) == str(error)


def test_a_worker_whose_disk_is_full_leaves_its_work_to_others(two: Cluster, tmp_path: Path) -> None:
    two._client.wait_for_workers(2)  # the killed one is back
    assert collect(two, full_disk_of_one, tmp_path) == (SQUARES, None)
    assert (tmp_path / "first").exists()


def test_an_image_that_kills_every_worker_is_named(two: Cluster, tmp_path: Path) -> None:
    killed = engine._Sent([sample(3)], (), Ended(KilledWorker("x", None, 3)), None, frozenset())
    call = engine._Call("", "", 1, "", "")
    with pytest.raises(DataError, match=r"^image-3: several workers were killed"):
        two._failed(call, deque([killed]))


def test_a_mistake_of_ours_keeps_its_kind(two: Cluster, tmp_path: Path) -> None:
    found, error = collect(two, mistaken, tmp_path)
    assert found == []
    assert isinstance(error, KeyError)


def test_whoever_stops_early_leaves_nothing_behind(two: Cluster, tmp_path: Path) -> None:
    large = ((i, np.full(5000, i)) for i in itertools.count())
    results = two.in_order(squared, large, 1)  # type: ignore[arg-type]
    assert list(itertools.islice(results, 3)) == [0, 1, 4]
    results.close()  # type: ignore[attr-defined]
    kept = {path.suffix for path in two._plane.folder.iterdir() if not path.name.startswith(".")}
    assert kept == {".pickle"}


def test_a_worker_that_would_compute_other_bytes_is_refused(
    two: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_about", lambda: {"numpy": "0.9"})
    mark = tmp_path / "cluster" / "x" / "mark"
    mark.parent.mkdir(parents=True)
    mark.write_text("x")
    assert engine._objection(str(mark), {"numpy": "0.9"}) is None
    told = engine._objection(str(mark), {"numpy": "2.0"})
    assert told is not None
    assert told.startswith("has numpy 0.9, here it is 2.0: bytes could differ")
    told = engine._objection(str(mark.with_name("other")), {})
    assert told is not None
    assert told.startswith(f"does not see the folder {tmp_path}")


@pytest.mark.parametrize(
    ("where", "shared", "kind", "words"),
    [
        ("nonsense", "x", ConfigError, "must be local:N, a scheduler's address"),
        ("local:0", "x", ConfigError, "got 'local:0'"),
        ("local:many", "x", ConfigError, "got 'local:many'"),
        ("", "x", ConfigError, "got ''"),
        ("none.json", "x", ClusterError, "no such scheduler file"),
        ("tcp://127.0.0.1:9", "x", ClusterError, "no scheduler answers there"),
        ("local:1", "s3://bucket/x", ConfigError, "must be a folder"),
        ("local:1", "s3:/bucket/x", ConfigError, "must be a folder"),
    ],
)
def test_no_such_cluster_is_one_sentence(
    where: str, shared: str, kind: type[RcnnSvmError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_ANSWER_S", 1)
    with pytest.raises(kind, match=words):
        connect(where, Path(shared) if shared == "x" else shared)  # type: ignore[arg-type]


def test_without_dask_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(DependencyError, match=r"pip install 'rcnn-svm\[cluster\]'"):
        connect("local:1", tmp_path)


INSIDE = """
import sys
from pathlib import Path
from distributed import Client, LocalCluster
from rcnn_svm import engine
from rcnn_svm.errors import ClusterError

engine._about = lambda: {"numpy": "2.0"}  # loads nothing
scheduler = LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None)
client = Client(scheduler)
cluster = engine.connect(client, Path(sys.argv[1]))
assert list(cluster.in_order(abs, range(-9, 9), 1)) == list(map(abs, range(-9, 9)))

engine._about = lambda: {"numpy": "3.0"}  # as if that worker had gone and another had come
try:
    print(list(cluster.in_order(abs, range(9), 1)))
except ClusterError as error:
    print(error)
cluster._refused.clear()

engine._about = lambda: {"numpy": "2.0"}
results = cluster.in_order(abs, range(1000), 1)
assert [next(results) for _ in range(3)] == [0, 1, 2]
scheduler.close()
try:
    print(list(results))
except ClusterError as error:
    print(error)
cluster.close()
"""


def test_another_that_joins_gets_no_work_and_a_lost_scheduler_ends_it(tmp_path: Path) -> None:
    """A cluster of the user's own, in one process."""
    words = [sys.executable, "-c", INSIDE, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    refused, lost = done.stdout.splitlines()
    assert refused.endswith("no worker is left that can do the work.")
    assert done.stderr.count("It gets no work.") == 1
    assert "its scheduler is lost (" in lost
    assert lost.endswith("What is finished is kept: give the same command again once there is one.")
    assert not (tmp_path / "cluster").exists()


ARRAYS = nps.arrays(
    st.sampled_from([np.float16, np.float32, np.int64, np.uint8, np.bool_]),
    nps.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40),
)


def _layout(array: np.ndarray) -> list[int]:
    """Its strides, but for those that are never walked."""
    return [stride for stride, side in zip(array.strides, array.shape, strict=True) if side > 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(ARRAYS, max_size=3), st.booleans(), st.text(max_size=5))
@example([np.zeros((1, 2), np.float16)], True, "")
def test_whatever_is_sent_arrives(
    tmp_path_factory: pytest.TempPathFactory, arrays: list[np.ndarray], turned: bool, text: str
) -> None:
    plane = engine._Plane(tmp_path_factory.mktemp("plane"))
    arrays = [array.T if turned else array for array in arrays]
    packed, files = plane.pack({"arrays": arrays, "text": text})
    assert len(packed) < 400 + 1500 * len(arrays)
    assert len(files) == any(array.nbytes >= engine._LARGE for array in arrays)
    found = plane.unpack(packed)
    assert found["text"] == text
    for sent, arrived in zip(arrays, found["arrays"], strict=True):
        assert (sent.dtype, sent.shape) == (arrived.dtype, arrived.shape)
        assert _layout(sent) == _layout(arrived) or sent.size == 0
        assert sent.tobytes() == arrived.tobytes()
    plane.forget(files)
    assert list(plane.folder.iterdir()) == []


def test_a_network_arrives_with_its_layout_and_is_checked(tmp_path: Path) -> None:
    config = FeatureConfig(backbone="small_cnn", weights="random", path="warped", taps="fc7")
    featurizer, plane = build_featurizer(config), engine._Plane(tmp_path)
    name = plane.keep(featurizer)
    there, image = plane.kept(name), sample(0).read()
    boxes = np.array([[0, 0, 30, 30], [10, 5, 60, 40]], np.float32)
    assert np.array_equal(there(image, boxes), featurizer(image, boxes))
    strided = (
        torch.arange(2**19, dtype=torch.float32).view(4, 2, 256, 256).to(memory_format=torch.channels_last)
    )
    before = set(tmp_path.iterdir())
    again = plane.kept(plane.keep(strided))
    assert again.stride() == strided.stride()
    assert torch.equal(again, strided)
    (array,) = (path for path in set(tmp_path.iterdir()) - before if path.suffix == ".npy")
    array.write_bytes(array.read_bytes()[:-1] + b"\x01")
    with pytest.raises(OSError, match="is damaged"):
        plane.kept(plane.keep(strided))


def test_nothing_is_unpickled_that_another_wrote(tmp_path: Path) -> None:
    plane = engine._Plane(tmp_path)
    name = plane.keep(squared)
    (tmp_path / name).write_bytes(pickle.dumps(os.getpid))
    with pytest.raises(OSError, match="is damaged"):
        plane.kept(name)


def test_an_experiment_by_post_is_the_same(tmp_path: Path) -> None:
    """Every function, image and result of a training is sent as to a cluster, and all comes out the same."""
    splits = digits_splits(30, 6, 6, seed=0)
    config = ExperimentConfig(
        data=DataConfig("digits"),
        heads=HeadsConfig(names=("linear-svm",)),
        learn="nothing",
        folds=1,
        n_bootstrap=10,
    )
    parts, posted = config.build(proposer=GridConfig(60), featurizer=MeanColour()), Posted(tmp_path / "plane")
    results = []
    for name, one in (("threads", THREADS), ("post", posted)):
        experiment = run_experiment(parts, splits, Run(tmp_path / name, engine=one))
        (boxed,) = (result for result in experiment.heads.values() if result.preferred)
        boxed.detector.save(tmp_path / name / "detector")
        results.append((boxed.evaluation, [pickle.dumps(found) for found in boxed.detections]))
        assert all(
            a.scores.tobytes() == b.scores.tobytes()
            for a, b in zip(
                boxed.detector.detect_all(splits.test.samples, engine=one),
                boxed.detector.detect_all(splits.test.samples),
                strict=True,
            )
        )
    assert results[0][1] == results[1][1]
    assert contents(tmp_path / "threads") == contents(tmp_path / "post")
    heads = [list((tmp_path / name / "detector").glob("head.*")) for name in ("threads", "post")]
    assert heads[0][0].name == heads[1][0].name  # a hash of all arrays
    assert posted.most < 4000


@pytest.mark.parametrize("head", [SoftmaxHead, LogisticHead])
def test_a_softmax_refitted_by_post_is_the_same(tmp_path: Path, head: type[SoftmaxHead]) -> None:
    """Passes over all rows, of which no more than a few fit into memory."""
    dataset, posted = digits_splits(12, 2, 2, seed=0).train, Posted(tmp_path / "plane")
    present = np.flatnonzero(dataset.counts())
    dataset = dataset.with_classes([dataset.classes[k] for k in present])
    proposals = {own.image_id: own for own in cached_proposals(dataset.samples, GridConfig(60), None)}
    regions, fitted = SplitRegions.of(dataset, proposals, with_truth=True), []
    for name, one in (("threads", THREADS), ("post", posted)):
        store = FeatureStore(tmp_path / name, MeanColour(), engine=one)  # type: ignore[arg-type]
        fitted.append(head(C=1.0, tol=1e-4, max_bytes=2000).fit(StoredBlocks(store, regions)))
    assert fitted[0].n_passes_ > 2
    for name in ("coef_", "intercept_", "objective_", "gradient_norm_"):
        assert np.array_equal(getattr(fitted[0], name), getattr(fitted[1], name))
    assert posted.most < 4000


def test_an_engine_that_is_sent_stays_at_home(two: Cluster) -> None:
    assert type(pickle.loads(pickle.dumps(two))) is Threads


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "digits", "--out", "x", "--dry-run", "--cluster", "local:1"], "--dry-run foretells"),
        (["train", "digits", "--out", "x", "--minutes", "1", "--cluster", "local:1"], "--minutes foretells"),
        (["evaluate", "found.json", "data", "--cluster", "local:1"], "no image is looked at"),
        (["propose", "a.png", "--cluster", "nowhere"], "--cluster must be local:N"),
    ],
)
def test_where_there_is_nothing_to_share_out_it_says_so(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30)).save("a.png")
    assert main(words) in (2, 3)
    assert told in capsys.readouterr().err
