"""How well boxes fit, and where it is lost; writes results/benchmarks/boxes.json.

    python benchmarks/boxes.py DATA [--sets NAME ...] [--preset NAME] [--heads NAME ...]
                               [--trials NAME ...] [--on val|test]

DATA is the folder of `voc2007-mini`, `fruit`, `bccd` and `raccoon`; sets that are run replace their rows. For
each set a detector is trained on `train` and looks at `val`: with boxes as proposed, regressed half and all
of the way, each of these refined, and refined and drawn to the region proposals around them, whose sides are
borders of segments, as `train` decides on such images. The oracles say what perfect ranking of the
same boxes, and perfect boxes for the same scores, would reach there. `--trials` does the same with a setting
changed, without oracles, and leaves other rows. `--heads` does it with SVMs on the same fc6, for which the
estimated IoU counts less than for the softmax; a row has it count as much. With `--on test` the recipe with
refinement and the one without are instead trained on trainval as `rcnn-svm train` does, and measured on test.

A row whose `alone` is false was measured with `--busy`, beside other work: its seconds are too many.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes, clip, decode_deltas, encode_deltas, iou
from rcnn_svm.cache import CacheLimit
from rcnn_svm.detector import Model
from rcnn_svm.evaluation.bootstrap import paired_bootstrap
from rcnn_svm.evaluation.coco import evaluate_coco
from rcnn_svm.evaluation.voc import HIT, EvalResult, evaluate_voc
from rcnn_svm.experiment.choosing import Variant, detect_all, settle, train_heads, views_of
from rcnn_svm.experiment.config import PRESETS, DataConfig, ExperimentConfig
from rcnn_svm.experiment.data import load_data
from rcnn_svm.experiment.parts import Parts, Run
from rcnn_svm.experiment.recipe import prepare, stages_of, train_detector
from rcnn_svm.experiment.regions import StoredBlocks
from rcnn_svm.experiment.selection import Choice
from rcnn_svm.features.store import to_float32
from rcnn_svm.files import read_json, write_json
from rcnn_svm.postprocess import OVERLAP_POWER, REFINED, PostprocessConfig
from rcnn_svm.progress import Stages, say
from rcnn_svm.report.provenance import provenance
from rcnn_svm.structures import Detections, GroundTruth

SETS = ("voc2007-mini", "fruit", "bccd", "raccoon")
ORACLE = PostprocessConfig(regression="off", max_iou=0.5, vote_iou=None, max_candidates=1000)
"""Suppression that perfectly ranked boxes meet."""
SOFTMAX = "softmax-finetuned"
HEADS = (SOFTMAX, "linear-svm", "rbf-svm")
LOOKS = 40
"""Images of test that the cost of one is measured on."""
SNAP = max(ExperimentConfig().heads.snaps)
"""How far refined boxes are drawn to region proposals, where `train` draws them."""


def with_sides(*sides: int) -> Callable[[ExperimentConfig], ExperimentConfig]:
    """Return what changes the sizes that images are read at."""
    return lambda config: replace(config, features=replace(config.features, longer_sides=sides))


TRIALS: dict[str, Callable[[ExperimentConfig], ExperimentConfig]] = {
    "rows as read": lambda config: replace(config, fc=replace(config.fc, scaling="none")),
    "mirrored": lambda config: replace(config, fc=replace(config.fc, mirror=True)),
    "at 480 pixels": with_sides(480),
    "at 320 and 640 pixels": with_sides(320, 640),
    "at 400 and 800 pixels": with_sides(400, 800),
}
Row = dict[str, Any]


def cpu_seconds() -> float:
    """Return what this process and its children have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measured(found: Sequence[Detections], truths: Sequence[GroundTruth], classes: Sequence[str]) -> Row:
    """Return COCO's numbers in percent, VOC's mAP, and the share of hits that lie well."""
    coco = evaluate_coco(found, truths, classes)
    voc = evaluate_voc(found, truths, classes)
    tight = evaluate_voc(found, truths, classes, min_iou=0.7)
    hits, tight_hits = (int((one.matches.outcome == HIT).sum()) for one in (voc, tight))
    return {
        "mAP": 100 * voc.map("voc07"),
        **{f"coco_{name}": percent(value) for name, value in coco.summary().items()},
        "share_of_hits_from_0.7": tight_hits / max(hits, 1),
        "coco_AP_by_class": dict(zip(classes, map(percent, coco.ap().tolist()), strict=True)),
    }


def percent(value: float) -> float | None:
    """Return a fraction in percent, None where there was no object of that size or class."""
    return None if np.isnan(value) else 100 * value


def intervals(
    runs: dict[str, list[Detections]], truths: Sequence[GroundTruth], classes: Sequence[str]
) -> Row:
    """Return, against the first run, the difference of mAP at IoU 0.5 and 0.75 of each with its interval."""
    rows: Row = {name: {} for name in runs}
    for level in (0.5, 0.75):
        results: dict[str, EvalResult] = {
            name: evaluate_voc(found, truths, classes, min_iou=level) for name, found in runs.items()
        }
        base = next(iter(results))
        for name in list(results)[1:]:
            pair = paired_bootstrap({base: results[base], name: results[name]}, n_resamples=1000)
            change = pair.difference(name, base).mean
            rows[name][f"mAP_at_{level}_change"] = [100 * v for v in (change.value, change.low, change.high)]
    return rows


def best_objects(
    boxes: Boxes, truth: GroundTruth, n_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Return the (R, K) IoU of boxes with the best object of each class, and the (R, K, 4) box of it."""
    overlaps = np.zeros((len(boxes), n_classes))
    targets = np.repeat(boxes[:, None], n_classes, axis=1)
    counted = truth[~truth.crowd]
    for k in np.unique(counted.labels):
        own = counted.boxes[counted.labels == k]
        pairs = iou(boxes, own)
        overlaps[:, k], targets[:, k] = pairs.max(axis=1), own[pairs.argmax(axis=1)]
    return overlaps, targets


def oracles(blocks: StoredBlocks, model: Model, detect: PostprocessConfig) -> dict[str, list[Detections]]:
    """Return detections of a split if ranking, or boxes, were perfect.

    `ranked N`: the first N proposals, not moved, ranked by their IoU. `ranked regressed`: each class's
    regressed boxes, ranked by theirs. `boxes`: today's scores, with each region from IoU 0.5 on where its
    object lies.
    """
    found: dict[str, list[Detections]] = {}
    n_classes = len(blocks.classes)
    for i, sample in enumerate(blocks.regions.dataset):
        n_gt, truth = blocks.regions.n_gt[i], sample.truth
        boxes = blocks.regions.boxes[i][n_gt:]
        scores, deltas = model.read(to_float32(blocks.features(i, slice(n_gt, None))), None)
        assert deltas is not None
        overlaps, targets = best_objects(boxes, truth, n_classes)

        def ranked(
            boxes: Boxes, values: NDArray[np.float64], moves: NDArray[np.float32] | None
        ) -> Detections:
            config = ORACLE if moves is None else replace(ORACLE, regression="before-nms")
            surest = np.where(values > 0, values, -1).astype(np.float32)
            return config(sample.image_id, sample.size, boxes, surest, moves)  # noqa: B023 - called at once

        one: dict[str, Detections] = {
            f"ranked {n}": ranked(boxes[:n], overlaps[:n], None) for n in (300, 1000) if n <= 1000
        }
        moved = np.zeros_like(overlaps)
        for k in np.unique(truth.labels):
            places = clip(decode_deltas(boxes, detect.box_step * deltas[:, k]), sample.size)
            moved[:, k] = best_objects(places, truth, n_classes)[0][:, k]
        one["ranked regressed"] = ranked(boxes, moved, detect.box_step * deltas)
        perfect = np.zeros_like(deltas)
        for k in np.unique(truth.labels):
            own = overlaps[:, k] >= 0.5
            if own.any():
                perfect[own, k] = encode_deltas(boxes[own], targets[own, k])
        whole = replace(detect, box_step=1.0, vote_iou=None, refined=0)
        one["boxes"] = whole(sample.image_id, sample.size, boxes, scores, perfect)
        for name, detections in one.items():
            found.setdefault(name, []).append(detections)
    return found


def ladder(parts: Parts, data: Path, cache: Path, trial: str | None = None) -> list[Row]:
    """Train on `train`, look at `val` in every way; return a row each, and those of the oracles.

    Args:
        parts: of the experiment, with one head. What goes on with its boxes and the oracles are looked at for
            the softmax.
        data: the data set.
        cache: of its features.
        trial: the name of what is changed in `parts`, which rows begin with; None for the recipe itself.
    """
    splits = load_data(DataConfig(str(data), drop_bad_boxes=True), seed=parts.seed)
    run, plain = Run(cache), trial is None and parts.heads[0].name == SOFTMAX
    ready = prepare(parts, splits, run, Stages(stages_of(parts)), CacheLimit(cache, None))
    parts = ready.parts
    learned = ready.learn(ready.train)
    (settled,) = settle(parts, learned)
    assert settled.with_boxes is not None
    detect = settled.with_boxes.detect
    assert isinstance(detect, PostprocessConfig)
    (head,) = train_heads(parts, learned, ready.train, [settled], run)
    views = [learned.blocks(view) for view in views_of(parts, ready.val)]
    for view in views:
        learned.fill(view.regions)

    def variant(name: str, **changes: Any) -> Variant:
        return Variant(Choice({"name": name}, None, ()), replace(detect, **changes), with_boxes=True)

    variants = [variant("as proposed", regression="off", refined=0)]
    for step, words in ((0.5, "half of the way"), (1.0, "all of the way")):
        variants.append(variant(words, box_step=step, refined=0))
        for snap, more in ((0.0, ""), (SNAP, ", snapped")):
            variants.append(variant(f"{words}, refined{more}", box_step=step, refined=REFINED, snap=snap))
    if detect.overlap_power != OVERLAP_POWER:
        words = "half of the way, refined, IoU as beside log-odds"
        variants.append(variant(words, box_step=0.5, refined=REFINED, overlap_power=OVERLAP_POWER))
    runs = detect_all(head.name, head.model, views, variants)
    found = {str(v.choice.settings["name"]): one.detections for v, one in zip(variants, runs, strict=True)}
    truths, classes = ready.val.truths, splits.val.classes
    base = {"half of the way": found["half of the way"], **found}
    changes = intervals(base, truths, classes)
    rows = [
        {
            "recipe": name if trial is None else f"{trial}: {name}",
            "n_images": len(truths),
            **measured(own, truths, classes),
            **changes[name],
        }
        for name, own in found.items()
    ]
    if not plain:
        return rows
    for name, own in oracles(views[0], head.model, replace(detect, refined=0)).items():
        rows.append({"recipe": f"oracle: {name}", "n_images": len(truths), **measured(own, truths, classes)})
    return rows


def on_test(parts: Parts, data: Path) -> Row:
    """Train as `rcnn-svm train` does, nothing cached, and measure on test once."""
    splits = load_data(DataConfig(str(data), drop_bad_boxes=True), seed=parts.seed)
    before = cpu_seconds()
    result = train_detector(splits, parts)
    assert result.coco is not None
    seconds = cpu_seconds() - before
    own = measured(result.detections, [sample.truth for sample in splits.test], splits.test.classes)
    images = [sample.read() for sample in splits.test.samples[:LOOKS]]
    result.detector.detect(images[0])
    before = cpu_seconds()
    for image in images:
        result.detector.detect(image)
    detect_s = (cpu_seconds() - before) / len(images)
    return {
        "n_images": len(splits.test),
        "chosen": dict(result.details["settings"]) | {"boxes": result.about["boxes"]},
        "train_cpu_s": seconds,
        "detect_cpu_s_per_image": detect_s,
        **own,
    }


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=[SOFTMAX])
    parser.add_argument("--trials", nargs="+", choices=TRIALS)
    parser.add_argument("--on", choices=("val", "test"), default="val")
    parser.add_argument("--busy", action="store_true", help="say that other work ran beside it")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/boxes.json"))
    options = parser.parse_args()
    if options.on == "test" and (options.trials or options.heads != [SOFTMAX]):
        parser.error("--on test: recipes are chosen on val. Leave out --trials and --heads.")
    rows: list[Row] = read_json(options.out)["rows"] if options.out.exists() else []
    make: Callable[[ExperimentConfig], ExperimentConfig] = PRESETS[options.preset].apply
    config = make(ExperimentConfig())
    plain = replace(config, detect=replace(config.detect, refined=0))
    for name in options.sets:
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            common = {"data": name, "preset": options.preset, "alone": not options.busy}
            new: list[Row] = []
            if options.on == "test":
                for recipe, made in (("without refinement", plain), ("with refinement", config)):
                    row = on_test(made.build(heads=[SOFTMAX]), options.data / name)
                    new.append({**common, "head": SOFTMAX, "split": "test", "recipe": recipe, **row})
            else:
                for trial, head in itertools.product(options.trials or [None], options.heads):
                    tried = config if trial is None else TRIALS[trial](config)
                    own = ladder(tried.build(heads=[head]), options.data / name, cache, trial)
                    new += [{**common, "head": head, "split": "val", **row} for row in own]
        about = provenance(seed=config.seed)
        again = {group_of(row) for row in new}
        rows = [row for row in rows if group_of(row) not in again]
        rows += [{**row, "commit": about["commit"], "command": about["command"]} for row in new]
        for row in new:
            say(
                f"{name} {row['split']} {row['recipe']}: AP {row['coco_AP']:.1f}, AP75 {row['coco_AP75']:.1f}"
            )
        write_json(
            options.out,
            {
                "schema": 1,
                "benchmark": "boxes",
                "targets": targets_of(rows),
                "rows": rows,
                "provenance": about,
            },
        )


def group_of(row: Row) -> tuple[str | None, ...]:
    """Return what the rows that are measured together, and replaced together, have in common."""
    trial = next((name for name in TRIALS if row["recipe"].startswith(f"{name}: ")), None)
    return row["data"], row["preset"], row["head"], row["split"], trial


def targets_of(rows: list[Row]) -> dict[str, Row]:
    """Return the headline figures that these rows give."""
    targets: dict[str, Row] = {}
    for name in SETS:
        test = {
            r["recipe"]: r for r in rows if (r["data"], r["preset"], r["split"]) == (name, "default", "test")
        }
        if len(test) < 2:
            continue
        ours, before = test["with refinement"], test["without refinement"]
        for key, words in (("coco_AP", "ap"), ("coco_AP75", "ap75"), ("mAP", "map")):
            targets[f"boxes_{name.replace('-', '_')}_{words}"] = {
                "value": ours[key],
                "unit": "AP" if words != "map" else "mAP",
                "n": 1,
                "ours": ours[key],
                "peer": before[key],
                "peer_name": "the same without refinement",
                "how": f"{key} on test, `train DATA` against `train DATA --set detect.refined=0`",
            }
    return targets


if __name__ == "__main__":
    main()
