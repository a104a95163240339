"""What `data review` finds of planted label errors, and what `data next` brings; writes results/label-loop.

    python benchmarks/label_loop.py review DATA [--seeds N] [--rates 0.05,0.1]
    python benchmarks/label_loop.py next DATA [--draws N] [--sizes 10,20,40,80]

DATA is a labelled data set; both parts look at its training images, `next` measures on its test images.

Review: of the objects that are neither difficult nor crowds a share is spoilt, a third each gets another
class, a box of IoU 0.3 to 0.6 with its own, or loses its label. The first 5 % of the list, in the number of
labelled objects, are looked at. A changed label is found where its line is among them, a removed one where a
region of IoU 0.5 or more with it is.

Next: from the same first images both ways go on, by random order and by `data next`; a linear SVM on frozen
features is trained at each size. Thresholds come from two folds of the labelled images.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rcnn_svm.boxes import Boxes, clip, iou
from rcnn_svm.cache import default_cache
from rcnn_svm.datasets import Splits, draw_folds
from rcnn_svm.evaluation.thresholds import choose_thresholds
from rcnn_svm.evaluation.voc import EvalResult, evaluate_voc
from rcnn_svm.experiment.choosing import Scalers, without_boxes
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig, HeadsConfig
from rcnn_svm.experiment.curve import draw_images
from rcnn_svm.experiment.data import load_data
from rcnn_svm.experiment.next_images import choose_images, doubt_of
from rcnn_svm.experiment.parts import Parts, Run
from rcnn_svm.experiment.recipe import propose
from rcnn_svm.experiment.regions import SplitRegions, StoredBlocks
from rcnn_svm.experiment.review import REGIONS, Review, review_labels
from rcnn_svm.features.store import FeatureStore, to_float32
from rcnn_svm.files import read_json, write_json, write_text
from rcnn_svm.heads.base import ArrayBlocks, Scorer
from rcnn_svm.postprocess import PAPER
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance
from rcnn_svm.structures import Dataset

SPOILT = ("swapped", "moved", "removed")
LOOKED_AT = 0.05
WAYS = ("random", "next")


def parts_of() -> Parts:
    """Return what `train --learn nothing` with the linear SVM is made of."""
    return ExperimentConfig(learn="nothing", heads=HeadsConfig(names=("linear-svm",))).build()


# Review


def another_box(box: NDArray[np.float32], size: tuple[int, int], rng: np.random.Generator) -> Boxes | None:
    """Return (4,) a box inside the image with IoU 0.3 to 0.6 with this one; None where none was drawn."""
    for _ in range(1000):
        sides = box[2:] - box[:2]
        centre = (box[:2] + box[2:]) / 2 + rng.uniform(-0.6, 0.6, 2) * sides
        half = sides * np.exp(rng.uniform(-0.5, 0.5, 2)) / 2
        other = clip(np.concatenate([centre - half, centre + half])[None].astype(np.float32), size)
        if ((other[0, 2:] - other[0, :2]) >= 4).all() and 0.3 <= iou(other, box[None])[0, 0] < 0.6:
            return other[0]
    return None


def spoil(dataset: Dataset, rate: float, rng: np.random.Generator) -> tuple[Dataset, list[dict[str, Any]]]:
    """Spoil a share of the labels.

    Returns:
        The data, and of each error its `kind`, `image` (position), `row` in the new truth or None, `box` and
        `label` as they were.
    """
    objects = [
        (i, j)
        for i, sample in enumerate(dataset)
        for j in np.flatnonzero(~(sample.truth.difficult | sample.truth.crowd)).tolist()
    ]
    picked = [objects[k] for k in rng.permutation(len(objects))[: round(rate * len(objects))]]
    kind_of = {place: SPOILT[n % len(SPOILT)] for n, place in enumerate(picked)}
    samples, errors = [], []
    for i, sample in enumerate(dataset):
        truth = sample.truth
        boxes, labels, kept = truth.boxes.copy(), truth.labels.copy(), np.ones(len(truth), bool)
        own = []
        for j in range(len(truth)):
            kind = kind_of.get((i, j))
            if kind is None:
                continue
            if kind == "swapped":
                labels[j] = (labels[j] + 1 + rng.integers(len(dataset.classes) - 1)) % len(dataset.classes)
            elif kind == "moved":
                box = another_box(boxes[j], sample.size, rng)
                if box is None:
                    continue
                boxes[j] = box
            else:
                kept[j] = False
            own.append((j, kind))
        row = np.cumsum(kept) - 1
        for j, kind in own:
            errors.append(
                {
                    "kind": kind,
                    "image": i,
                    "row": int(row[j]) if kept[j] else None,
                    "box": truth.boxes[j],
                    "label": int(truth.labels[j]),
                }
            )
        changed = replace(truth, boxes=boxes, labels=labels, area=np.zeros(0))[kept]
        samples.append(replace(sample, truth=changed))
    return replace(dataset, samples=tuple(samples)), errors


def lines_of(error: dict[str, Any], review: Review) -> list[int]:
    """Return which lines of the list, counted from 0, are about a planted error."""
    lines = []
    for n, one in enumerate(review.findings):
        if one.image != error["image"] or one.other is not None:
            continue
        if error["row"] is not None:
            about = one.row == error["row"]
        else:
            assert one.box is not None
            about = one.row is None and iou(one.box[None], error["box"][None])[0, 0] >= 0.5
        if about:
            lines.append(n)
    return lines


def review_once(parts: Parts, dataset: Dataset, run: Run, rate: float, seed: int) -> dict[str, Any]:
    """Plant errors, review, and say what was found."""
    planted, errors = spoil(dataset, rate, np.random.default_rng([seed, round(1000 * rate)]))
    started = time.perf_counter()
    review = review_labels(parts, [planted], run)
    seconds = time.perf_counter() - started
    n_objects = sum(int((~(s.truth.difficult | s.truth.crowd)).sum()) for s in planted)
    n_looked = math.ceil(LOOKED_AT * n_objects)
    row: dict[str, Any] = {
        "rate": rate,
        "seed": seed,
        "n_objects": n_objects,
        "n_lines": len(review.findings),
        "n_looked_at": n_looked,
        "seconds": round(seconds, 1),
    }
    places = [lines_of(error, review) for error in errors]
    for kind in (*SPOILT, "all"):
        own = [
            (error, lines)
            for error, lines in zip(errors, places, strict=True)
            if kind in (error["kind"], "all")
        ]
        found = [(error, lines) for error, lines in own if lines and lines[0] < n_looked]
        row[kind] = {
            "n": len(own),
            "found": len(found),
            "by_chance": sum(min(1.0, len(lines) * n_looked / len(review.findings)) for _, lines in own),
        }
        if kind == "swapped":
            row[kind]["named"] = sum(
                review.findings[lines[0]].suggested == error["label"] for error, lines in found
            )
    about = {n for lines in places for n in lines}
    row["planted_among_looked_at"] = sum(n in about for n in range(n_looked))
    return row


def run_review(options: argparse.Namespace, parts: Parts, splits: Splits, run: Run) -> dict[str, Any]:
    """Return the rows of every rate and seed, and sums over the seeds."""
    rows = []
    for rate in options.rates:
        for seed in range(options.seeds):
            rows.append(review_once(parts, splits.trainval, run, rate, seed))
            say(json.dumps(rows[-1]))
    summary = {}
    for rate in options.rates:
        own = [row for row in rows if row["rate"] == rate]
        shares = {}
        for kind in (*SPOILT, "all"):
            n = sum(row[kind]["n"] for row in own)
            shares[kind] = {
                "n": n,
                "found": sum(row[kind]["found"] for row in own) / n,
                "by_chance": sum(row[kind]["by_chance"] for row in own) / n,
            }
        looked = sum(row["n_looked_at"] for row in own)
        shares["planted_among_looked_at"] = sum(row["planted_among_looked_at"] for row in own) / looked
        shares["most_possible"] = min(1.0, looked / shares["all"]["n"])
        summary[f"{rate:g}"] = shares
    return {"n_images": len(splits.trainval), "rows": rows, "summary": summary}


# Next


class Loop:
    """A data set in memory, and what is trained and measured on parts of it."""

    def __init__(self, parts: Parts, splits: Splits, run: Run) -> None:
        self.parts, self.run, self.pool, self.test = parts, run, splits.trainval, splits.test
        regions = [
            SplitRegions.of(part, propose(part, parts.proposer, run), with_truth=truth).limited(REGIONS)
            for part, truth in ((self.pool, True), (self.test, False))
        ]
        network = parts.learner.prepare(parts, regions[0], {}, run)
        store = FeatureStore(run.cache / "features", network.featurizer, precision=parts.features.precision)
        for part in regions:
            store.fill(part.dataset.samples, part.boxes, "features")
        self.pool_regions, self.test_regions = regions
        scaler = Scalers(StoredBlocks(store, regions[0])).get(parts.heads[0].scaling)
        blocks, tests = (StoredBlocks(store, part).scaled(scaler) for part in regions)
        self.rows = [to_float32(blocks.features(i)) for i in range(len(blocks))]
        self.truths = [blocks.truth(i) for i in range(len(blocks))]
        self.test_rows = [to_float32(tests.features(i)) for i in range(len(tests))]

    def train(self, chosen: Sequence[int]) -> Scorer:
        """Train on some of the images."""
        recipe, order = self.parts.heads[0], sorted(chosen)
        blocks = ArrayBlocks.from_arrays(
            [self.rows[i] for i in order], [self.truths[i] for i in order], self.pool.classes
        )
        (fitted,) = recipe.fit(blocks, [recipe.settled()], n_jobs=self.run.n_jobs)
        return fitted.scorer

    def evaluate(self, scorers: dict[int, Scorer] | Scorer) -> EvalResult:
        """Measure on the test images, or each scorer on the image of the pool that it is given for."""
        detect, found, truths = without_boxes(PAPER), [], []
        if isinstance(scorers, dict):
            places = [(i, self.pool, self.rows[i][self.pool_regions.n_gt[i] :]) for i in sorted(scorers)]
        else:
            places = [(i, self.test, rows) for i, rows in enumerate(self.test_rows)]
        for i, dataset, rows in places:
            of_test = dataset is self.test
            boxes = self.test_regions.boxes[i] if of_test else self.pool_boxes(i)
            scorer = scorers[i] if isinstance(scorers, dict) else scorers
            sample = dataset.samples[i]
            scores = scorer.decision_function(rows)
            found.append(detect(sample.image_id, sample.size, boxes, scores, None))
            truths.append(sample.truth)
        return evaluate_voc(found, truths, self.pool.classes, rule=self.parts.rule)

    def pool_boxes(self, i: int) -> Boxes:
        """Return the proposals of an image of the pool."""
        return self.pool_regions.boxes[i][self.pool_regions.n_gt[i] :]

    def thresholds(self, chosen: Sequence[int], seed: int) -> NDArray[np.float64]:
        """Return the threshold of each class from two folds of the labelled images."""
        place = {sample.image_id: i for i, sample in enumerate(self.pool)}
        labelled = replace(self.pool, samples=tuple(self.pool.samples[i] for i in sorted(chosen)))
        judges: dict[int, Scorer] = {}
        for fold in draw_folds(labelled, 2, np.random.default_rng(seed)):
            held = {place[sample.image_id] for sample in fold}
            judges |= dict.fromkeys(held, self.train([i for i in chosen if i not in held]))
        if not judges:
            return np.zeros(len(self.pool.classes))
        return np.asarray(choose_thresholds(self.evaluate(judges).matches).scores, np.float64)

    def following(self, chosen: Sequence[int], scorer: Scorer, n: int, seed: int) -> list[int]:
        """Return what `data next` chooses of the images that are not labelled."""
        thresholds = self.thresholds(chosen, seed)
        left = [i for i in range(len(self.pool)) if i not in set(chosen)]
        doubts = []
        for i in left:
            rows = self.rows[i][self.pool_regions.n_gt[i] :]
            doubts.append(doubt_of(self.pool_boxes(i), rows, scorer.decision_function(rows), thresholds))
        return [left[k] for k in choose_images(doubts, n)]


def run_next(options: argparse.Namespace, parts: Parts, splits: Splits, run: Run) -> dict[str, Any]:
    """Return the mAP of each draw, way and size, and means with intervals over the draws."""
    loop, sizes = Loop(parts, splits, run), options.sizes
    place = {sample.image_id: i for i, sample in enumerate(loop.pool)}
    rows = []
    for draw in range(options.draws):
        rng = np.random.default_rng([0, draw])
        first = [place[sample.image_id] for sample in draw_images(loop.pool, 1, rng)]
        rest = [i for i in rng.permutation(len(loop.pool)).tolist() if i not in set(first)]
        first, rest = first + rest[: max(0, sizes[0] - len(first))], rest[max(0, sizes[0] - len(first)) :]
        start = loop.train(first)
        begun = 100 * loop.evaluate(start).map(parts.rule)
        for way in WAYS:
            chosen, scorer, value = list(first), start, begun
            for size in sizes:
                if size > len(chosen):
                    n = size - len(chosen)
                    chosen += (
                        [i for i in rest if i not in set(chosen)][:n]
                        if way == "random"
                        else loop.following(chosen, scorer, n, draw)
                    )
                    scorer = loop.train(chosen)
                    value = 100 * loop.evaluate(scorer).map(parts.rule)
                n_objects = sum(len(loop.pool.samples[i].truth) for i in chosen)
                row = {"draw": draw, "way": way, "size": size, "mAP": value, "n_objects": n_objects}
                rows.append(row | {"n_images": len(chosen)})
                say(json.dumps(rows[-1]))
    summary = []
    for size in sizes:
        values = {way: [r["mAP"] for r in rows if r["size"] == size and r["way"] == way] for way in WAYS}
        objects = {
            way: [r["n_objects"] for r in rows if r["size"] == size and r["way"] == way] for way in WAYS
        }
        line: dict[str, Any] = {"size": size}
        for way in WAYS:
            line[way] = {"mAP": interval(values[way]), "n_objects": float(np.mean(objects[way]))}
        change = np.subtract(values["next"], values["random"])
        summary.append(line | {"change": interval(change.tolist())})
    return {"n_images": len(loop.pool), "n_test_images": len(loop.test), "rows": rows, "summary": summary}


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean and the ends of its 95 % interval by Student's t over draws."""
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


# Page


def page(results: Sequence[dict[str, Any]]) -> str:
    """Return the README of the results: a table for each file."""
    lines = [
        "# The label loop, measured",
        "",
        "Written by `benchmarks/label_loop.py`, which says how; the JSON files beside it hold every row.",
    ]
    for result in results:
        name, made = result["dataset"], result["provenance"]
        lines += ["", f"## {result['part']}, {name}", ""]
        if result["part"] == "review":
            n_seeds = len({row["seed"] for row in result["rows"]})
            lines += [
                f"{result['n_images']} images, {n_seeds} plantings for each share. Found among "
                "the first 5 % of the list, in brackets what a list in random order finds:",
                "",
                "| spoilt | all | swapped | moved | removed | most possible | planted of the first 5 % |",
                "|---|---|---|---|---|---|---|",
            ]
            for rate, shares in result["summary"].items():
                cells = [
                    f"{100 * shares[k]['found']:.0f} % ({100 * shares[k]['by_chance']:.0f} %)"
                    for k in ("all", *SPOILT)
                ]
                cells += [
                    f"{100 * shares['most_possible']:.0f} %",
                    f"{100 * shares['planted_among_looked_at']:.0f} %",
                ]
                lines.append(f"| {100 * float(rate):g} % | {' | '.join(cells)} |")
        else:
            n_draws = len({row["draw"] for row in result["rows"]})
            lines += [
                f"mAP on {result['n_test_images']} test images, of {result['n_images']} to choose from; "
                f"means of {n_draws} draws of the first images with 95 % intervals:",
                "",
                "| images | random | `data next` | change | objects, random | objects, next |",
                "|---|---|---|---|---|---|",
            ]
            for line in result["summary"]:
                cells = [_interval(line[way]["mAP"]) for way in WAYS]
                change = line["change"]
                cells.append(f"{change['mean']:+.1f} [{change['low']:+.1f}, {change['high']:+.1f}]")
                cells += [f"{line[way]['n_objects']:.0f}" for way in WAYS]
                lines.append(f"| {line['size']} | {' | '.join(cells)} |")
        lines += ["", f"`{made['command']}`, commit {made['commit'][:12]}, {made['machine']['cpu']}."]
    return "\n".join(lines) + "\n"


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.1f} [{value['low']:.1f}, {value['high']:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("review", "next"))
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=lambda text: [float(v) for v in text.split(",")], default=[0.05, 0.1])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument(
        "--sizes", type=lambda text: [int(v) for v in text.split(",")], default=[10, 20, 40, 80]
    )
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/label-loop"))
    options = parser.parse_args()
    if options.draws < 2:
        parser.error("--draws must be 2 or more: intervals are over draws.")
    about = provenance(seed=0)
    splits = load_data(DataConfig(path=str(options.data)), seed=0)
    run = Run(options.cache, options.jobs)
    part = {"review": run_review, "next": run_next}[options.part]
    found = part(options, parts_of(), splits, run)
    name = options.data.name
    head = {"schema": 1, "experiment": "label-loop", "part": options.part, "dataset": name}
    write_json(options.out / f"{options.part}-{name}.json", {**head, **found, "provenance": about})
    results = [read_json(path) for path in sorted(options.out.glob("*.json"))]
    write_text(options.out / "README.md", page(sorted(results, key=lambda one: one["part"] == "next")))
    say(f"{options.out / 'README.md'} written")


if __name__ == "__main__":
    main()
