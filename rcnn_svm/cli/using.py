"""Verbs that use a trained detector: `detect`, `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from rcnn_svm.cli import options as shared
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.progress import say, track

__all__ = ["add_verbs"]


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this module."""
    detect = verbs.add_parser("detect", help="find objects in images: JSON, and boxes drawn on them")
    detect.add_argument("detector", type=Path, help="a folder that `rcnn-svm train` made")
    detect.add_argument("images", type=Path, nargs="+", help="image files or folders")
    detect.add_argument("--out", type=Path, required=True, metavar="DIR")
    detect.add_argument(
        "--min-score",
        type=float,
        metavar="S",
        help="draw what scores at least this (default: 0)",
        default=0.0,
    )
    detect.add_argument("--no-pictures", action="store_true", help="write JSON only")
    detect.set_defaults(run=_detect)

    evaluate = verbs.add_parser(
        "evaluate", help="AP of a detector, or of detections in a file, on labelled images"
    )
    evaluate.add_argument(
        "detections",
        type=Path,
        help="a detector's folder, detections.json, COCO results JSON, or a folder of comp4 files",
    )
    evaluate.add_argument("data", type=Path, help="a VOC, COCO or YOLO data set")
    evaluate.add_argument("--split", default="test")
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="write figures and exchange formats here")
    shared.add_data_options(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _detect(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.images import open_images
    from rcnn_svm.detector import load_detector
    from rcnn_svm.evaluation.exchange import write_detections
    from rcnn_svm.report.draw import draw_detections, save_picture

    detector = load_detector(options.detector)
    left_out: list[DataError] = []

    def leave_out(error: DataError) -> None:
        left_out.append(error)
        say(f"{error} It is left out.")

    samples = {sample.image_id: sample for sample in open_images(options.images, unreadable=leave_out)}
    found = []
    results = detector.detect_all(samples.values(), unreadable=leave_out)
    for detections in track(results, "detect", total=len(samples)):
        sample = samples[detections.image_id]
        found.append(detections)
        sure = detections.scores >= options.min_score
        if not options.no_pictures:
            picture = draw_detections(
                sample.read(), detections, detector.classes, min_score=options.min_score
            )
            save_picture(options.out / f"{sample.image_id}.png", picture)
        names, counts = np.unique(detections.labels[sure], return_counts=True)
        words = ", ".join(f"{n} {detector.classes[k]}" for k, n in zip(names, counts, strict=True))
        print(f"{sample.path}: {words or 'nothing'}")
    write_detections(options.out / "detections.json", found, detector.classes)
    say(f"Detections of {len(found)} images in {options.out}")
    if left_out:
        raise DataError(
            f"{len(left_out)} of {len(found) + len(left_out)} images could not be read and were left out. "
            f"The first: {left_out[0]}"
        )


def _evaluate(options: argparse.Namespace) -> None:
    from rcnn_svm.evaluation.coco import evaluate_coco
    from rcnn_svm.evaluation.exchange import write_comp4, write_detections
    from rcnn_svm.evaluation.voc import evaluate_voc
    from rcnn_svm.files import write_json

    found, dataset = _read(options)
    truths = [sample.truth for sample in dataset]
    voc = evaluate_voc(found, truths, dataset.classes)
    coco = evaluate_coco(found, truths, dataset.classes)
    width = max(map(len, (*dataset.classes, "mean")))
    print(f"{'class':<{width}}  VOC07  VOC10   COCO")
    rows = [voc.ap("voc07"), voc.ap("voc10"), coco.ap()]
    for k, name in enumerate(dataset.classes):
        print(f"{name:<{width}} " + " ".join(f"{100 * row[k]:6.1f}" for row in rows))
    means = [voc.map("voc07"), voc.map("voc10"), coco.summary()["AP"]]
    print(f"{'mean':<{width}} " + " ".join(f"{100 * value:6.1f}" for value in means))
    print("COCO: " + "  ".join(f"{key} {100 * value:.1f}" for key, value in coco.summary().items()))
    if options.out is not None:
        write_detections(options.out / "detections.json", found, dataset.classes)
        write_comp4(options.out / "comp4", found, dataset.classes, split=options.split)
        write_json(options.out / "evaluation.json", {"voc": voc.to_json(), "coco": coco.to_json()})
        say(f"Figures and exchange formats in {options.out}")


def _read(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return detections and the split that they are of, classes in the data set's order."""
    from rcnn_svm.datasets import coco_category_ids, coco_image_ids, load_dataset
    from rcnn_svm.evaluation.exchange import read_coco_results, read_comp4, read_detections
    from rcnn_svm.files import read_json

    data, path = shared.data_config(options, str(options.data)), options.detections
    names = data.classes or None

    def dataset_of(classes: tuple[str, ...] | None) -> Any:
        return load_dataset(
            options.data,
            options.split,
            format=None if data.format == "auto" else data.format,
            classes=classes,
            drop_bad_boxes=data.drop_bad_boxes,
        )

    if (path / "detector.json").exists():
        from rcnn_svm.detector import load_detector

        detector = load_detector(path)
        dataset = dataset_of(names or detector.classes)
        if dataset.classes != detector.classes:
            raise ConfigError(
                f"{path}: the detector knows {', '.join(detector.classes)}; --classes must name the same, "
                f"got {', '.join(dataset.classes)}."
            )
        return list(track(detector.detect_all(dataset.samples), "detect", total=len(dataset))), dataset
    if path.is_dir():
        dataset = dataset_of(names)
        ids = [sample.image_id for sample in dataset]
        return read_comp4(path, dataset.classes, ids, split=options.split), dataset
    if isinstance(read_json(path), list):
        dataset = dataset_of(names)
        ids_of = coco_category_ids(options.data)
        categories = [ids_of[name] for name in dataset.classes]
        images = coco_image_ids(options.data, options.split)
        found = read_coco_results(path, categories, [s.image_id for s in dataset], images)
        return found, dataset
    classes, listed = read_detections(path)
    dataset = dataset_of(names or classes)
    by_id = {one.image_id: one for one in listed}
    missing = [s.image_id for s in dataset if s.image_id not in by_id]
    if missing:
        raise ConfigError(
            f"{path}: must hold every image of the split {options.split!r}, got none for {missing[0]!r}"
            f"{f' and {len(missing) - 1} others' if len(missing) > 1 else ''}."
        )
    return [by_id[sample.image_id] for sample in dataset], dataset
