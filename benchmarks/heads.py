"""How fast the heads train and score beside scikit-learn; writes results/benchmarks/heads.json.

    python benchmarks/heads.py [--quick] [--data VOC_FOLDER --cache FOLDER] [--only SECTION ...]

Both sides of a ratio are measured in one run, in turn, on one thread, in CPU seconds of the process, so
that other programs on the machine disturb little. scikit-learn's per-class solvers are timed on a few
classes and multiplied by 20: every class has as many positives as any other. The synthetic features are
like fc7: 4096 numbers, ReLU, a quarter above zero, mean norm 20.
"""

from __future__ import annotations

import argparse
import gc
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

from rcnn_svm.files import read_json, write_json
from rcnn_svm.heads.assign import SVM_RULE, RegionTruth
from rcnn_svm.heads.base import ArrayBlocks, RegionBlocks
from rcnn_svm.heads.block_solver import BlockSolver, MatrixSource, Solution
from rcnn_svm.heads.kernel_solver import rbf_kernel, solve_pairs, squared_distances
from rcnn_svm.heads.linear_svm import PATH_TOL, LinearSVMHead
from rcnn_svm.heads.mining import BlocksSource, PaperMining
from rcnn_svm.heads.rbf_svm import gather_rows, hardest_regions
from rcnn_svm.heads.scorers import RBFScorer
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance

N_CLASSES, N_FEATURES, N_POSITIVES = 20, 4096, 200
C, POSITIVE_WEIGHT, BIAS_SCALE = 1e-3, 2.0, 10.0
SECTIONS = ("linear", "path", "mining", "rbf", "real")

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
        middle, last, path = bench.seconds(
            {
                f"C path, {loss}: one fit at the middle C": lambda loss=loss: fit([C], loss, 1e-3),
                f"C path, {loss}: one fit at the largest C": lambda loss=loss: fit(costs[-1:], loss, 1e-3),
                f"C path, {loss}: five C, warm": lambda loss=loss: fit(costs, loss, PATH_TOL),
            },
            3,
        ).values()
    bench.target(
        "c_path_cost", path / last, "x", 3, path, last, "one fit at the largest C, to a gap of 1e-3",
        f"CPU seconds of five warm-started C, 1e-4 to 1e-2, each to a gap of {PATH_TOL}, hinge, {n} x 4096; "
        f"a fit at the middle C takes {middle:.2f}",
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
        truths.append(RegionTruth(boxes, overlap, np.zeros_like(overlap), is_gt, label, boxes, best))
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
            break  # a direct solution on real regions takes minutes a class
    bench.row(
        f"mining, {tag}: what it took", passes_ours=ours_head.mining_.passes,
        passes_paper=paper_head.mining_.passes, cached_ours=float(ours_head.mining_.n_cached.max()),
        cached_paper=float(paper_head.mining_.n_cached.sum()),
        certified_gap=float(ours_head.gap_.max()),
    )  # fmt: skip
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
    scorer = RBFScorer(x[support], duals[:, support], biases, gamma)
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
    same = RBFScorer(
        models[0].support_vectors_, models[0].dual_coef_, models[0].intercept_, gamma
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


def real_blocks(data: str, cache: Path, max_images: int) -> RegionBlocks:
    """Regions of a labelled data set, on ImageNet features as the default experiment reads them.

    A few images only: LinearSVC on all regions, the peer of the proof, takes 20 bytes a feature.
    """
    from rcnn_svm.experiment.config import DataConfig, ExperimentConfig
    from rcnn_svm.experiment.data import load_data
    from rcnn_svm.experiment.recipe import propose
    from rcnn_svm.experiment.regions import SplitRegions, StoredBlocks
    from rcnn_svm.experiment.representation import prepare_network
    from rcnn_svm.features.scaling import FeatureScaler
    from rcnn_svm.features.store import FeatureStore

    config = ExperimentConfig(data=DataConfig(path=data, max_images=max_images), learn="nothing")
    splits = load_data(config.data, seed=config.seed)
    proposals = propose(splits.trainval, config, cache, n_jobs=1)
    regions = SplitRegions.of(splits.trainval, proposals, with_truth=True)
    network = prepare_network(config, regions, proposals, cache)
    store = FeatureStore(cache / "features", network.featurizer, precision=config.features.precision)
    store.fill(regions.dataset.samples, regions.boxes, "features of trainval")
    blocks = StoredBlocks(store, regions)
    return blocks.scaled(FeatureScaler("l2").fit(blocks))


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
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="proposals and features of --data")
    parser.add_argument("--images", type=int, default=30, help="of train and of val of --data")
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
    if "real" in options.only and options.data:
        name = Path(options.data).name
        blocks = real_blocks(options.data, options.cache, options.images)
        bench_mining(bench, blocks, 0.3, name, "_real")
        source = BlocksSource(blocks, SVM_RULE)
        linear = LinearSVMHead(C=0.3).fit(blocks)
        keys = hardest_regions(source, linear.decision_function, 8_000)
        x, labels = gather_rows(source, keys)
        queries = np.concatenate([source.features(i) for i in range(2)])[:2000]
        bench_rbf(bench, x, labels, queries, 1.0, f"{name}, {len(x)} mined x {x.shape[1]}", "_real")
    if options.quick:
        return
    old = read_json(options.out) if options.out.exists() and tuple(options.only) != SECTIONS else {}
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
            "provenance": provenance(seed=0),
        },
    )
    say(f"{options.out} written")


if __name__ == "__main__":
    with threadpool_limits(limits=1):
        main()
