"""How fast the heads train and score beside scikit-learn; writes results/benchmarks/heads.json.

    python benchmarks/heads.py [--quick] [--data VOC_FOLDER] [--cache FOLDER] [--only SECTION ...]

Both sides of a ratio are measured in one run, in turn, on one thread, in CPU seconds of the process, so
that other programs on the machine disturb little. scikit-learn's per-class solvers are timed on a few
classes and multiplied by 20: every class has as many positives as any other. The synthetic features are
like fc7: 4096 numbers, ReLU, a quarter above zero, mean norm 20. The section on real features needs --data;
scikit-learn-intelex is measured where it is installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import importlib.util
import statistics
import time
import tracemalloc
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import SVC, LinearSVC
from threadpoolctl import threadpool_limits

from rcnn_svm.cache import default_cache
from rcnn_svm.detector import Model
from rcnn_svm.evaluation.voc import evaluate_voc
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig
from rcnn_svm.experiment.data import load_data
from rcnn_svm.experiment.measure import Meter
from rcnn_svm.experiment.parts import Run
from rcnn_svm.experiment.recipe import propose
from rcnn_svm.experiment.regions import SplitRegions, StoredBlocks
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.features.store import FeatureStore, to_float32
from rcnn_svm.files import read_json, write_json
from rcnn_svm.heads.assign import SVM_RULE, RegionTruth
from rcnn_svm.heads.base import ALL, ArrayBlocks, RegionBlocks, Rows
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.kernel_solver import solve_pairs
from rcnn_svm.heads.kernel_svm import KernelSVMHead, NystroemSVMHead, gather_rows, hardest_regions
from rcnn_svm.heads.kernels import RBF, rbf_kernel, squared_distances
from rcnn_svm.heads.linear_svm import PATH_TOL, LinearSVMHead
from rcnn_svm.heads.mining import BlocksSource, PaperMining
from rcnn_svm.heads.scorers import KernelScorer
from rcnn_svm.heads.solver import BlockSolver, MatrixSource, Solution
from rcnn_svm.postprocess import PostprocessConfig, postprocess
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance

N_CLASSES, N_FEATURES, N_POSITIVES = 20, 4096, 200
C, POSITIVE_WEIGHT, BIAS_SCALE = 1e-3, 2.0, 10.0
SECTIONS = ("linear", "path", "mining", "rbf", "real", "all", "paper")
# Every sixth image of voc2007-mini's trainval: the thinnest choice that has some objects of each class.
STEP = 6

Floats = NDArray[np.float32]


class Bench:
    """Measures, keeps every raw figure as a row, and turns pairs of rows into targets."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.targets: dict[str, dict[str, Any]] = {}

    def seconds(self, work: Mapping[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
        """Do every piece of work in turn, `rounds` times; return medians of CPU seconds by name."""
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(rounds):
            for name, call in work.items():
                gc.collect()
                started = time.process_time()
                call()
                times[name].append(time.process_time() - started)
        for name, values in times.items():
            spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            self.row(name, unit="CPU s", n=rounds, **spread)
        return {name: statistics.median(values) for name, values in times.items()}

    def row(self, name: str, **figures: Any) -> None:
        """Keep figures that are no target."""
        self.rows.append({"name": name, **figures})
        say(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, float)))

    def target(
        self,
        name: str,
        value: float,
        unit: str,
        n: int,
        ours: float,
        peer: float | None,
        peer_name: str,
        how: str,
    ) -> None:
        """Keep a headline figure."""
        self.targets[name] = {
            "value": value, "unit": unit, "n": n, "ours": ours, "peer": peer, "peer_name": peer_name,
            "how": how,
        }  # fmt: skip
        say(f"  {name} = {value:.4g} {unit}")


def synthetic(n: int, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    """(n, 4096) features and (n,) labels 0 .. 19, or 20 for background."""
    rng = np.random.default_rng(seed)
    latent = 48
    centres = rng.normal(size=(N_CLASSES, latent)).astype(np.float32) * 1.13
    y = np.full(n, N_CLASSES)
    order = rng.permutation(n)
    for k in range(N_CLASSES):
        y[order[k * N_POSITIVES : (k + 1) * N_POSITIVES]] = k
    mixing = (rng.normal(size=(latent, N_FEATURES)) / np.sqrt(latent)).astype(np.float32)
    x = np.empty((n, N_FEATURES), np.float32)
    for start in range(0, n, 4096):
        own = y[start : start + 4096]
        z = rng.standard_normal((len(own), latent), np.float32)
        objects = own < N_CLASSES
        z[objects] = 0.8 * z[objects] + centres[own[objects]]
        slab = z @ mixing
        slab += 0.6 * rng.standard_normal(slab.shape, np.float32) - 0.7
        np.maximum(slab, 0, out=x[start : start + 4096])
    x *= 20 / np.linalg.norm(x[:2000], axis=1).mean()
    return x, y


def one_against_rest(y: NDArray[np.int64], n_classes: int = N_CLASSES) -> NDArray[np.int8]:
    return np.where(y[:, None] == np.arange(n_classes), 1, -1).astype(np.int8)


def ours(x: Floats, labels: NDArray[np.int8], loss: str) -> Solution:
    solver = BlockSolver(
        MatrixSource(x, labels), squared=loss == "squared_hinge", positive_weight=POSITIVE_WEIGHT,
        bias_scale=BIAS_SCALE,
    )  # fmt: skip
    return solver.solve(np.full(labels.shape[1], C))


def linear_svc(loss: str, **options: Any) -> LinearSVC:
    weights = {"class_weight": {1: POSITIVE_WEIGHT}, **options}
    return LinearSVC(C=C, loss=loss, intercept_scaling=BIAS_SCALE, random_state=0, **weights)


def objective(x: Floats, y: NDArray[np.int8], w: NDArray[Any], b: float, loss: str, cost: float = C) -> float:
    """The primal objective of one class in float64 sums."""
    short = np.maximum(0, 1 - y * (x @ w.astype(np.float32) + np.float32(b)).astype(np.float64)) * (y != 0)
    losses = short**2 if loss == "squared_hinge" else short
    half = 0.5 * (float((w.astype(np.float64) ** 2).sum()) + (b / BIAS_SCALE) ** 2)
    return half + cost * float((np.where(y > 0, POSITIVE_WEIGHT, 1.0) * losses).sum())


def peak_extra(work: Callable[[], object], n_bytes: int) -> float:
    """Peak of what is allocated during `work`, over `n_bytes`."""
    gc.collect()
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / n_bytes


def bench_linear(bench: Bench, n: int, tag: str, rounds: int) -> None:
    x, y = synthetic(n)
    labels = one_against_rest(y)
    for loss in ("squared_hinge", "hinge"):
        models: dict[str, Any] = {}

        def fit_ours(loss: str = loss, models: dict[str, Any] = models) -> None:
            models["ours"] = ours(x, labels, loss)

        def fit_class(loss: str = loss, models: dict[str, Any] = models, **options: Any) -> None:
            models["class"] = linear_svc(loss, **options).fit(x, labels[:, 0])

        names = {
            "ours": f"{loss}, {tag}: block solver, 20 classes",
            "auto": f"{loss}, {tag}: LinearSVC as it comes, 1 class",
            "dual": f"{loss}, {tag}: LinearSVC(dual=True), 1 class",
        }
        work: dict[str, Callable[[], object]] = {names["ours"]: fit_ours, names["auto"]: fit_class}
        if loss == "squared_hinge":
            work[names["dual"]] = lambda fit=fit_class: fit(dual=True)
            work[names["auto"]] = lambda fit=fit_class: fit(dual="auto")
        seconds = bench.seconds(work, rounds)
        solution, single = models["ours"], models["class"]
        reached = objective(x, labels[:, 0], solution.coef[0], float(solution.intercept[0]), loss)
        peer = objective(x, labels[:, 0], single.coef_[0], float(single.intercept_[0]), loss)
        bench.row(
            f"{loss}, {tag}: objective of the first class", ours=reached, peer=peer,
            relative=reached / peer - 1,
            gap=float(solution.gap.max()), epochs=solution.epochs, passes=solution.passes,
        )  # fmt: skip
        if loss != "squared_hinge":
            continue
        loop, fast, own = 20 * seconds[names["auto"]], 20 * seconds[names["dual"]], seconds[names["ours"]]
        bench.target(
            f"linear_svm_speedup_over_loop_{tag}", loop / own, "x", rounds, own, loop,
            "20 fits of LinearSVC(dual='auto'), one per class (one timed)",
            f"CPU seconds on one thread, {n} x 4096 float32, squared hinge, equal objective within 1e-3; "
            f"against LinearSVC(dual=True) it is {fast / own:.1f}",
        )  # fmt: skip
        wide = one_against_rest(y, N_CLASSES + 1)
        weights = {k: POSITIVE_WEIGHT for k in range(N_CLASSES + 1)}
        both = {
            f"{loss}, {tag}: block solver, 21 classes": lambda wide=wide, loss=loss: ours(x, wide, loss),
            f"{loss}, {tag}: LinearSVC, one multiclass fit of 21": lambda weights=weights, loss=loss: (
                linear_svc(loss, class_weight=weights).fit(x, y)
            ),
        }
        pair = list(bench.seconds(both, 1).values())
        bench.target(
            f"linear_svm_speedup_over_multiclass_{tag}", pair[1] / pair[0], "x", 1, pair[0], pair[1],
            "one LinearSVC fit of 20 classes and background",
            f"CPU seconds on one thread, {n} x 4096 float32, squared hinge, background as a 21st class",
        )  # fmt: skip
        if tag == "60k":
            bench.target(
                "linear_svm_duality_gap", float(solution.gap.max()), "fraction", 1,
                float(solution.gap.max()), None, "",
                "largest certified relative duality gap of 20 classes at the default tolerance, 60k rows",
            )  # fmt: skip
            extra = peak_extra(fit_ours, x.nbytes)
            bench.target(
                "linear_svm_extra_memory", extra, "fraction", 1, extra, None, "",
                "peak of numpy's allocations during training over the bytes of the float32 matrix, 60k rows",
            )  # fmt: skip


def bench_path(bench: Bench, n: int) -> None:
    """Five values of C on one matrix as `fit_path` does them, against one fit."""
    x, y = synthetic(n)
    labels = one_against_rest(y)
    costs = [C * 10 ** (step / 2) for step in range(-2, 3)]

    def fit(values: list[float], loss: str, tol: float) -> None:
        solver = BlockSolver(
            MatrixSource(x, labels), squared=loss == "squared_hinge", positive_weight=POSITIVE_WEIGHT,
            bias_scale=BIAS_SCALE,
        )  # fmt: skip
        for value in values:
            solver.solve(np.full(N_CLASSES, value), tol=tol)

    for loss in ("squared_hinge", "hinge"):
        names = [f"C path, {loss}: one fit at C = {value:.1e}" for value in costs]
        work: dict[str, Callable[[], object]] = {
            name: lambda value=value, loss=loss: fit([value], loss, 1e-3)
            for name, value in zip(names, costs, strict=True)
        }
        work[f"C path, {loss}: five C, warm"] = lambda loss=loss: fit(costs, loss, PATH_TOL)
        *fits, path = bench.seconds(work, 3).values()
        one = statistics.mean(fits)
        bench.target(
            "c_path_cost" if loss == "hinge" else f"c_path_cost_{loss}", path / one, "x", 3, path, one,
            "one fit to a gap of 1e-3, mean over the five C",
            f"CPU seconds of five warm-started C, 1e-4 to 1e-2, each to a gap of {PATH_TOL}, over those of "
            f"one fit ({min(fits):.2f} to {max(fits):.2f} s), {loss}, {n} x 4096; to stay below 2",
        )  # fmt: skip


def as_blocks(x: Floats, y: NDArray[np.int64], per_image: int) -> ArrayBlocks:
    """Cut rows into images whose ground truth they are, so that the SVM rule gives back the labels."""
    blocks, truths = [], []
    for start in range(0, len(x), per_image):
        own = y[start : start + per_image]
        n = len(own)
        is_gt = own < N_CLASSES
        overlap = np.zeros((n, N_CLASSES), np.float32)
        overlap[is_gt, own[is_gt]] = 1
        boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (n, 1))
        label = np.where(is_gt, own, -1)
        best = is_gt.astype(np.float32)
        easy = np.zeros(n, bool)
        truths.append(RegionTruth(boxes, overlap, np.zeros_like(overlap), is_gt, label, boxes, best, easy))
        blocks.append(x[start : start + per_image])
    return ArrayBlocks.from_arrays(blocks, truths, [f"class{k}" for k in range(N_CLASSES)])


def bench_mining(bench: Bench, blocks: RegionBlocks, cost: float, tag: str, name: str = "") -> None:
    """The fixed point beside the paper's schedule on LinearSVC, and the proof."""
    source = BlocksSource(blocks, SVM_RULE)
    ours_head = LinearSVMHead(C=cost)
    paper_head = LinearSVMHead(C=cost, solver="liblinear", mining=PaperMining(), tol=1e-4)
    labels = {
        "ours": f"mining, {tag}: to the fixed point",
        "paper": f"mining, {tag}: the paper's schedule, LinearSVC",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = bench.seconds(
            {labels["ours"]: lambda: ours_head.fit(blocks), labels["paper"]: lambda: paper_head.fit(blocks)},
            1,
        )
    excess = []
    for k in range(3):
        parts = [(source.features(i), source.labels(i)[:, k]) for i in range(len(source))]
        x = np.concatenate([features[own != 0] for features, own in parts])
        y = np.concatenate([own[own != 0] for _, own in parts])
        direct = LinearSVC(
            C=cost, loss="hinge", dual=True, tol=1e-5, intercept_scaling=BIAS_SCALE, random_state=0,
            class_weight={1: POSITIVE_WEIGHT, -1: 1.0}, max_iter=20_000,
        ).fit(x, y)  # fmt: skip
        values = {
            "direct": objective(x, y, direct.coef_[0], float(direct.intercept_[0]), "hinge", cost),
            "ours": objective(x, y, ours_head.coef_[k], float(ours_head.intercept_[k]), "hinge", cost),
            "paper": objective(x, y, paper_head.coef_[k], float(paper_head.intercept_[k]), "hinge", cost),
        }
        excess.append(values["ours"] / values["direct"] - 1)
        bench.row(f"mining, {tag}: objective of class {k} over all regions", **values)
        if name:
            loop = bench_loop(bench, x, y, cost, tag)
            bench.target(
                f"linear_svm_speedup_over_loop{name}", 20 * loop / seconds[labels["ours"]], "x", 1,
                seconds[labels["ours"]], 20 * loop,
                "20 fits of LinearSVC on all regions in memory, one per class (one timed)",
                f"CPU seconds on one thread, hinge, {tag}, ours read from the store and mined",
            )  # fmt: skip
            break  # a direct solution on real regions takes minutes a class
    bench.row(
        f"mining, {tag}: what it took", passes_ours=ours_head.mining_.passes,
        passes_paper=paper_head.mining_.passes, cached_ours=float(ours_head.mining_.n_cached.max()),
        cached_paper=float(paper_head.mining_.n_cached.sum()),
        certified_gap=float(ours_head.gap_.max()),
    )  # fmt: skip
    if name:
        bench_passes(bench, blocks, source, ours_head, paper_head, cost, tag)
    bench.target(
        f"mining_objective_gap{name}", max(excess), "fraction", len(excess), max(excess), None,
        "LinearSVC on all regions, tol 1e-5",
        f"largest excess of the mined SVM's objective over the direct solution on all regions, {tag}",
    )  # fmt: skip
    times = list(seconds.values())
    bench.target(
        f"mining_speedup_over_paper_schedule{name}", times[1] / times[0], "x", 1, times[0], times[1],
        "R-CNN's schedule on LinearSVC, one pass", f"CPU seconds on one thread, 20 classes, hinge, {tag}",
    )  # fmt: skip


def bench_passes(
    bench: Bench,
    blocks: RegionBlocks,
    source: BlocksSource,
    ours: LinearSVMHead,
    once: LinearSVMHead,
    cost: float,
    tag: str,
) -> None:
    """How often each schedule reads the features, and how far from the optimum that leaves it."""
    twice = LinearSVMHead(C=cost, solver="liblinear", mining=PaperMining(epochs=2), tol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twice.fit(blocks)
    reached = objectives(source, ours, cost)
    bound = reached * (1 - ours.gap_)  # no solution lies below
    heads = {"ours": ours, "the paper's schedule": once, "the paper's schedule, going round twice": twice}
    worst = []
    for label, head in heads.items():
        values = objectives(source, head, cost)
        worst.append(float((values / bound - 1).max()))
        bench.row(
            f"mining, {tag}: excess over the dual bound, {label}", passes=float(head.mining_.passes),
            sum=float(values.sum() / bound.sum() - 1), worst_class=worst[-1],
        )  # fmt: skip
    passes = [float(head.mining_.passes) for head in heads.values()]
    bench.target(
        "mining_passes", passes[0], "passes", 1, passes[0], passes[1], "R-CNN's schedule, unproved",
        f"rows read over rows there are, {tag}; worst class above the dual bound: ours {worst[0]:.2g}, "
        f"the paper's schedule {worst[1]:.2g}, with a second pass {worst[2]:.2g}",
    )  # fmt: skip


def bench_loop(bench: Bench, x: Floats, y: NDArray[np.int8], cost: float, tag: str) -> float:
    """CPU seconds of LinearSVC as it comes on one class of real regions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge in its 1000 rounds
        model = LinearSVC(
            C=cost, loss="hinge", intercept_scaling=BIAS_SCALE, random_state=0,
            class_weight={1: POSITIVE_WEIGHT, -1: 1.0},
        )  # fmt: skip
        name = f"hinge, {tag}: LinearSVC as it comes, 1 class of {len(x)} regions"
        seconds = bench.seconds({name: lambda: model.fit(x, y)}, 1)[name]
    reached = objective(x, y, model.coef_[0], float(model.intercept_[0]), "hinge", cost)
    bench.row(f"hinge, {tag}: objective of LinearSVC as it comes, class 0", value=reached)
    return seconds


def intelex_svc() -> tuple[Any, str] | None:
    """scikit-learn-intelex's SVC and its version, where it is installed."""
    if importlib.util.find_spec("sklearnex") is None:
        say("scikit-learn-intelex is not installed: no rows for it")
        return None
    version = importlib.metadata.version("scikit-learn-intelex")
    return importlib.import_module("sklearnex.svm").SVC, version


def bench_intelex(
    bench: Bench, x: Floats, y: NDArray[np.int8], queries: Floats, gamma: float, cost: float, tag: str
) -> None:
    """The same class on scikit-learn-intelex; it has no LinearSVC to compare with."""
    found = intelex_svc()
    if found is None:
        return
    svc, version = found
    model = svc(C=cost, gamma=gamma, class_weight={1: POSITIVE_WEIGHT})
    name = f"RBF, {tag}: scikit-learn-intelex {version}, SVC, class 0"
    bench.seconds(
        {
            name: lambda: model.fit(x, y),
            f"{name}, 2000 regions": lambda: model.decision_function(queries),
        },
        1,
    )


def bench_rbf(
    bench: Bench,
    x: Floats,
    labels: NDArray[np.int8],
    queries: Floats,
    gamma: float,
    tag: str,
    suffix: str = "",
) -> None:
    """Training on mined rows, of which a class may ignore some, and scoring 2000 regions, 20 classes."""
    n, cost = len(x), 1.0
    used = [np.flatnonzero(labels[:, k]) for k in range(N_CLASSES)]
    duals = np.zeros((N_CLASSES, n))
    biases = np.zeros(N_CLASSES)

    def train() -> None:
        kernel = squared_distances(x)
        rbf_kernel(kernel, gamma, out=kernel)
        for k in range(N_CLASSES):
            y = labels[used[k], k]
            bounds = np.where(y > 0, POSITIVE_WEIGHT * cost, cost)
            alpha = np.zeros(len(y))
            biases[k], *_ = solve_pairs(kernel, used[k], y, bounds, alpha, 1e-3, 10**7)
            duals[k, used[k]] = alpha * y

    models: dict[int, SVC] = {}

    def train_svc(k: int) -> None:
        models[k] = SVC(C=cost, gamma=gamma, class_weight={1: POSITIVE_WEIGHT}).fit(
            x[used[k]], labels[used[k], k]
        )

    one, first, second = bench.seconds(
        {
            f"RBF, {tag}: shared kernel, 20 classes": train,
            f"RBF, {tag}: SVC, class 0": lambda: train_svc(0),
            f"RBF, {tag}: SVC, class 1": lambda: train_svc(1),
        },
        1,
    ).values()
    bench.target(
        f"rbf_training_speedup{suffix}", 10 * (first + second) / one, "x", 1, one, 10 * (first + second),
        "20 fits of SVC (two timed)",
        f"CPU seconds on one thread, {tag}, same C, gamma and tolerance",
    )  # fmt: skip
    support = np.flatnonzero(duals.any(axis=0))
    scorer = KernelScorer(x[support], duals[:, support], biases, RBF(gamma))
    scores: dict[str, NDArray[Any]] = {}

    def score() -> None:
        scores["ours"] = scorer.decision_function(queries)

    def score_svc() -> None:
        for k in (0, 1):
            scores[str(k)] = models[k].decision_function(queries)

    fast, slow = bench.seconds(
        {
            f"RBF, {tag}: union of support vectors, 2000 regions": score,
            f"RBF, {tag}: SVC, 2 classes": score_svc,
        },
        3,
    ).values()
    bench.row(
        f"RBF, {tag}: support vectors",
        union=float(len(support)),
        of_class_0=float(models[0].n_support_.sum()),
    )
    bench.target(
        f"rbf_scoring_speedup{suffix}", 10 * slow / fast, "x", 3, fast, 10 * slow,
        "20 SVC.decision_function (two timed)",
        f"CPU seconds on one thread, {tag}, 2000 regions, {len(support)} support vectors in all, "
        f"{(duals != 0).sum() / N_CLASSES:.0f} a class in the mean",
    )  # fmt: skip
    own = used[0]
    bench_intelex(bench, x[own], labels[own, 0], queries, gamma, cost, tag)
    same = KernelScorer(
        models[0].support_vectors_, models[0].dual_coef_, models[0].intercept_, RBF(gamma)
    ).decision_function(queries)[:, 0]
    difference = float(np.abs(same - scores["0"]).max())
    bench.row(
        f"RBF, {tag}: trained apart, largest difference of scores",
        value=float(np.abs(scores["ours"][:, 0] - scores["0"]).max()),
    )
    bench.target(
        f"rbf_scoring_max_difference{suffix}", difference, "score", 1, difference, None,
        "SVC.decision_function",
        "largest difference over 2000 regions for the same support vectors and coefficients",
    )  # fmt: skip


class Some:
    """Region blocks of some images of others."""

    def __init__(self, blocks: RegionBlocks, images: range) -> None:
        self._blocks, self._images = blocks, images
        self.classes, self.n_features = blocks.classes, blocks.n_features

    def __len__(self) -> int:
        return len(self._images)

    def features(self, i: int, rows: Rows = ALL) -> NDArray[Any]:
        """(R, D) features of an image, or of some rows of it."""
        return self._blocks.features(self._images[i], rows)

    def truth(self, i: int) -> RegionTruth:
        """The description of its regions."""
        return self._blocks.truth(self._images[i])


def real_regions(data: str, cache: Path) -> tuple[StoredBlocks, StoredBlocks, FeatureScaler]:
    """Regions of trainval, scaled, and of test, not scaled, of a labelled data set.

    ImageNet features as the default experiment reads them, brought to R-CNN's mean norm of 20, for
    which its C was chosen.
    """
    config = ExperimentConfig(data=DataConfig(path=data), learn="nothing")
    parts, run = config.build(), Run(cache)
    splits = load_data(config.data, seed=config.seed)
    blocks = []
    for split, with_truth in ((splits.trainval, True), (splits.test, False)):
        proposals = propose(split, parts.proposer, run)
        regions = SplitRegions.of(split, proposals, with_truth=with_truth)
        network = parts.learner.prepare(parts, regions, proposals, run)
        store = FeatureStore(cache / "features", network.featurizer, precision=config.features.precision)
        store.fill(regions.dataset.samples, regions.boxes, f"features of {split.split}")
        blocks.append(StoredBlocks(store, regions))
    train, test = blocks
    scaler = FeatureScaler("mean-norm-20").fit(train)
    return train.scaled(scaler), test, scaler


def mean_ap(test: StoredBlocks, n_images: int, model: Model) -> float:
    """The mAP in percent on the first images of the test split, NMS at 0.3, no box voting."""
    found = []
    for i, sample in enumerate(test.regions.dataset.samples[:n_images]):
        rows = to_float32(test.features(i))
        found.append(
            postprocess(
                sample.image_id, sample.size, test.regions.boxes[i], model.scores(rows), model.deltas(rows),
                PostprocessConfig(vote_iou=None),
            )
        )  # fmt: skip
    return 100 * evaluate_voc(found, test.regions.truths[:n_images], test.classes).map("voc07")


def objectives(source: BlocksSource, head: LinearSVMHead, cost: float) -> NDArray[np.float64]:
    """(K,) primal objectives, hinge, of a fitted head over all regions of a source."""
    coef, intercept = head.coef_.astype(np.float64), head.intercept_.astype(np.float64)
    total = 0.5 * ((coef**2).sum(axis=1) + (intercept / BIAS_SCALE) ** 2)
    for i in range(len(source)):
        labels = source.labels(i)
        margins = source.features(i) @ head.coef_.T + head.intercept_
        short = np.maximum(0, 1 - labels * margins.astype(np.float64)) * (labels != 0)
        total += cost * (np.where(labels > 0, POSITIVE_WEIGHT, 1.0) * short).sum(axis=0)
    return np.asarray(total)


def bench_all_regions(
    bench: Bench, train: StoredBlocks, test: StoredBlocks, scaler: FeatureScaler, tag: str, with_paper: bool
) -> None:
    """Every region of trainval mined, beside the paper's schedule if asked for; what box regression adds."""
    source = BlocksSource(train, SVM_RULE)
    n_rows, n_images = source.first_row(len(source)), len(test)
    heads = {"to the fixed point": LinearSVMHead(C=C)}
    if with_paper:
        heads["the paper's schedule, LinearSVC"] = LinearSVMHead(
            C=C, solver="liblinear", mining=PaperMining(), tol=1e-4
        )
    figures: dict[str, dict[str, float]] = {}
    for name, head in heads.items():
        with Meter() as meter:
            seconds = bench.seconds(
                {f"mining, {tag}, all {n_rows} regions: {name}": lambda head=head: head.fit(train)}, 1
            )
        figures[name] = {
            "cpu_s": next(iter(seconds.values())),
            "passes": float(head.mining_.passes),
            "objective": float(objectives(source, head, C).sum()),
            "mAP": mean_ap(test, n_images, Model(head.scorer_, scaler)),
            "peak_rss_mb": meter.peak_rss_mb,
        }
        bench.row(f"mining, {tag}, all {n_rows} regions: {name}, what it took", **figures[name])
    ours, *papers = figures.values()
    for paper in papers:
        bench.target(
            "mining_all_regions_speedup", paper["cpu_s"] / ours["cpu_s"], "x", 1, ours["cpu_s"],
            paper["cpu_s"], "R-CNN's schedule on LinearSVC, one pass",
            f"CPU seconds on one thread, {tag}, all {n_rows} regions x {train.n_features} of {len(train)} "
            f"images, 20 classes, the paper's constants; sum of objectives {ours['objective']:.5g} against "
            f"{paper['objective']:.5g}, mAP {ours['mAP']:.1f} against {paper['mAP']:.1f}",
        )  # fmt: skip
    bench.target(
        "mining_all_regions_memory", ours["peak_rss_mb"], "MB", 1, ours["peak_rss_mb"], None, "",
        f"peak resident memory of the process while all {n_rows} regions of {tag} are mined to the fixed "
        f"point, to stay below 3000; {ours['cpu_s']:.0f} CPU s, {ours['passes']:.1f} passes",
    )  # fmt: skip
    scorer = heads["to the fixed point"].scorer_
    coarse = LinearSVMHead().fit_path(train, [C])[0]
    bench.row(
        f"C path, {tag}: mAP of one C at a gap of {PATH_TOL}, and of 1e-3",
        coarse=mean_ap(test, n_images, Model(coarse, scaler)), fine=ours["mAP"],
    )  # fmt: skip
    regressor = BoxRegressor().fit(train)
    refined = mean_ap(test, n_images, Model(scorer, scaler, regressor, scaler))
    bench.target(
        "bbox_regression_gain", refined - ours["mAP"], "mAP", 1, refined, ours["mAP"], "the same without",
        f"points of mAP on {n_images} test images, {tag}, linear SVM, ridge strength 1000 as in the paper",
    )  # fmt: skip


def bench_nystroem(
    bench: Bench, blocks: RegionBlocks, test: StoredBlocks, scaler: FeatureScaler, n_test: int, tag: str
) -> None:
    """What landmarks lose against the exact kernel machine on the same images."""
    gamma = 1 / 400  # for rows of mean norm 20, as 1 for rows of length 1
    miner = LinearSVMHead(C=C).fit(blocks)
    heads = {
        "exact, 8000 mined regions": KernelSVMHead(kernel=RBF(gamma), max_rows=8000, miner=miner),
        "Nystroem, 1000 landmarks": NystroemSVMHead(
            kernel=RBF(gamma), n_landmarks=1000, miner=miner, tol=1e-2
        ),
    }
    ap = {"linear": mean_ap(test, n_test, Model(miner.scorer_, scaler))}
    for name, head in heads.items():
        bench.seconds({f"RBF, {tag}: {name}": lambda head=head: head.fit(blocks)}, 1)
        ap[name] = mean_ap(test, n_test, Model(head.scorer_, scaler))
    bench.row(f"RBF, {tag}: mAP on {n_test} test images", **ap)
    linear, exact, approximate = ap.values()
    bench.target(
        "nystroem_loss", exact - approximate, "mAP", 1, approximate, exact,
        "KernelSVMHead on 8000 mined regions",
        f"points of mAP lost by 1000 landmarks, trained on all regions of {tag}, {n_test} test images; the "
        f"linear SVM has {linear:.1f}",
    )  # fmt: skip


def warm_up() -> None:
    """Compile everything once."""
    x, y = synthetic(4400, seed=1)
    labels = one_against_rest(y)
    for loss in ("hinge", "squared_hinge"):
        ours(x[:600], labels[:600], loss)
    alpha = np.zeros(20)
    kernel = rbf_kernel(squared_distances(x[:20]), 1e-3)
    solve_pairs(
        kernel, np.arange(20), np.resize(np.array([1, -1], np.int8), 20), np.ones(20), alpha, 1e-3, 100
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: is everything in order?")
    parser.add_argument("--data", help="a labelled data set for the section on real features")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="proposals and features of --data"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="some sections")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/heads.json"))
    options = parser.parse_args()
    bench = Bench()
    warm_up()
    if "linear" in options.only:
        for n, tag in (
            ((5_000, "20k"), (8_000, "60k")) if options.quick else ((20_000, "20k"), (60_000, "60k"))
        ):
            bench_linear(bench, n, tag, 1 if options.quick else 3)
    if "path" in options.only:
        bench_path(bench, 5_000 if options.quick else 20_000)
    if "mining" in options.only:
        x, y = synthetic(6_000 if options.quick else 30_000)
        bench_mining(bench, as_blocks(x, y, 500), C, f"{len(x)} x 4096 in {len(x) // 500} images")
        del x, y
    if "rbf" in options.only:
        n = 4_500 if options.quick else 8_000
        x, y = synthetic(20_000)
        order = np.argsort(y == N_CLASSES, kind="stable")  # objects first
        hard, queries = order[:n], x[order[-2000:]]
        # Rows have mean norm 20: as 2 would be on rows of length 1.
        bench_rbf(bench, x[hard], one_against_rest(y[hard]), queries, 2 / 400, f"{n} x 4096")
        del x, y
    if options.data and {"real", "all", "paper"} & set(options.only):
        train, test, scaler = real_regions(options.data, options.cache)
        name = Path(options.data).name
        if "real" in options.only:
            few = Some(train, range(0, len(train), STEP))
            tag = f"{name}, {len(few)} images"
            bench_mining(bench, few, C, tag, "_real")
            source = BlocksSource(few, SVM_RULE)
            linear = LinearSVMHead(C=C).fit(few)
            n = 3_000 if options.quick else 8_000
            x, labels = gather_rows(source, hardest_regions(source, linear.decision_function, n))
            queries = np.concatenate([source.features(i) for i in range(2)])[:2000]
            bench_rbf(bench, x, labels, queries, 1 / 400, f"{tag}, {len(x)} mined x {x.shape[1]}", "_real")
            del x, labels
            bench_nystroem(bench, few, test, scaler, min(100, len(test)), tag)
        if {"all", "paper"} & set(options.only) and not options.quick:
            bench_all_regions(bench, train, test, scaler, name, "paper" in options.only)
    if options.quick:
        return
    made = provenance(seed=0)
    old = read_json(options.out) if options.out.exists() and tuple(options.only) != SECTIONS else {}
    if old and old["provenance"]["commit"] != made["commit"]:
        old = {}  # one file states figures of one commit
    if old:
        made["command"] = f"{old['provenance']['command']} && {made['command']}"
    write_json(
        options.out,
        {
            "schema": 1,
            "benchmark": "heads",
            "targets": {**old.get("targets", {}), **bench.targets},
            "rows": [
                *(r for r in old.get("rows", []) if r["name"] not in {b["name"] for b in bench.rows}),
                *bench.rows,
            ],
            "provenance": made,
        },
    )
    say(f"{options.out} written")


if __name__ == "__main__":
    with threadpool_limits(limits=1):
        main()
