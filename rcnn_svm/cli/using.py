"""Verbs that use a trained detector: `detect`, `evaluate`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rcnn_svm.cli import options as shared
from rcnn_svm.errors import ConfigError, DataError, printable
from rcnn_svm.progress import emit, say, track

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rcnn_svm.detector import Detector
    from rcnn_svm.evaluation.classification import Classification
    from rcnn_svm.evaluation.coco import CocoResult
    from rcnn_svm.evaluation.voc import EvalResult
    from rcnn_svm.structures import Dataset, Detections

__all__ = ["add_detect", "add_evaluate", "least_scores"]


def add_detect(detect: argparse.ArgumentParser) -> None:
    """Add the options of `detect`."""
    detect.add_argument("detector", type=Path, help="a folder that `rcnn-svm train` made")
    detect.add_argument("images", type=Path, nargs="+", help="image files or folders")
    detect.add_argument("--out", type=Path, required=True, metavar="DIR")
    shown = detect.add_mutually_exclusive_group()
    shown.add_argument(
        "--threshold",
        type=float,
        metavar="S",
        help="show what scores at least this (default: the threshold of each class that training chose; of "
        "whole images of one class each the surest)",
    )
    shown.add_argument("--all", action="store_true", help="show everything, however unlikely")
    detect.add_argument("--no-pictures", action="store_true", help="write JSON only")
    shared.add_compute_options(detect)
    detect.set_defaults(run=_detect, resumes=True)


def add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    evaluate.add_argument(
        "detections",
        type=Path,
        help="a detector's folder, detections.json, COCO results JSON, or a folder of comp4 files",
    )
    evaluate.add_argument(
        "data", type=Path, help="a VOC, COCO or YOLO data set, images in a folder per class or in a CSV"
    )
    evaluate.add_argument(
        "--split",
        metavar="NAME",
        help="of the data, or `all`; by default what a detector was not trained on, and test for files",
    )
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="write figures and exchange formats here")
    shared.add_label_options(evaluate, "measure these classes, in this order (default: all that are known)")
    shared.add_compute_options(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _detect(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.images import open_images, refuse_to_overwrite
    from rcnn_svm.detector import load_detector
    from rcnn_svm.evaluation.exchange import DetectionLines, write_detections
    from rcnn_svm.files import file_digest, inside, remove_marker
    from rcnn_svm.report.draw import draw_detections, save_picture

    detector = load_detector(options.detector, device=shared.device_of(options))
    left_out: list[DataError] = []

    def leave_out(error: DataError) -> None:
        left_out.append(error)
        say(f"{error} It is left out.")

    samples = {sample.image_id: sample for sample in open_images(options.images, unreadable=leave_out)}
    pictures = {} if options.no_pictures else {name: inside(options.out, name, ".png") for name in samples}
    whole = options.out / "detections.json"
    refuse_to_overwrite([*pictures.values(), whole], [s.path for s in samples.values()])
    remove_marker(whole)  # where it lies, the rest is whole
    believed = _threshold(options, detector)
    made_by = {
        "detector": file_digest(options.detector / "detector.json"),
        "threshold": options.threshold,
        "all": options.all,
        "pictures": not options.no_pictures,
    }
    lines = DetectionLines(options.out / "detections.jsonl", detector.classes, made_by)
    done = {
        name: found
        for name, (image, found) in lines.done.items()
        if name in samples and image == samples[name].digest()
    }
    if done:
        say(f"{len(done)} of {len(samples)} images were looked at before and are not looked at again.")
    left = [sample for name, sample in samples.items() if name not in done]
    for everything in track(detector.detect_all(left, unreadable=leave_out), "detect", total=len(left)):
        detections = believed(everything)
        sample = samples[detections.image_id]
        if pictures:
            picture = draw_detections(sample.read(), detections, detector.classes)
            save_picture(pictures[sample.image_id], picture)
        lines.add(detections, sample.digest())
        done[sample.image_id] = detections
        emit(f"{sample.path}: {_words(detections, detector) or 'nothing'}")
    found = [done[name] for name in samples if name in done]
    write_detections(whole, found, detector.classes)
    lines.remove()
    n_found = sum(map(len, found))
    say(f"{n_found} detections in {len(found)} images, in {options.out}{_uncalibrated(detector)}")
    if left_out:
        raise DataError(
            f"{len(left_out)} of {len(found) + len(left_out)} images could not be read and were left out. "
            f"The first: {left_out[0]}"
        )


def _uncalibrated(detector: Detector) -> str:
    """Return what is to be said of scores that have no probabilities."""
    return "" if detector.calibration is not None else "; this detector is not calibrated: no probabilities"


def _words(found: Detections, detector: Detector) -> str:
    """Return the number of objects of each class; of a whole image its classes and their scores."""
    if detector.whole_images:
        scored = zip(found.labels, found.scores, strict=True)
        return ", ".join(f"{detector.classes[k]} {score:.2f}" for k, score in scored)
    names, counts = np.unique(found.labels, return_counts=True)
    return ", ".join(f"{n} {detector.classes[k]}" for k, n in zip(names, counts, strict=True))


def _threshold(options: argparse.Namespace, detector: Detector) -> Callable[[Detections], Detections]:
    """Return what keeps the detections that are to be shown."""
    if options.all:
        return lambda found: found
    if options.threshold is None and detector.thresholds is None and detector.whole_images:
        return lambda found: found[:1]
    least = least_scores(options.threshold, detector)
    return lambda found: found[found.scores >= least[found.labels]]


def least_scores(threshold: float | None, detector: Detector) -> NDArray[np.floating]:
    """Return from which score on a detection of each class is shown, (K,).

    Args:
        threshold: for all classes; None takes those that training chose.
        detector: what found them.

    Raises:
        ConfigError: the threshold is no number.
    """
    n_classes = len(detector.classes)
    if threshold is not None:
        if math.isnan(threshold):
            raise ConfigError("--threshold must be a number, got nan.")
        return np.full(n_classes, threshold, np.float32)  # as scores are, so that equals are equal
    if detector.thresholds is None:
        say("This detector was trained without held-out images: shown is what scores at least 0.")
        return np.zeros(n_classes, np.float32)
    return detector.thresholds.scores


def _evaluate(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.images import refuse_to_overwrite
    from rcnn_svm.evaluation.classification import classify
    from rcnn_svm.evaluation.coco import evaluate_coco
    from rcnn_svm.evaluation.exchange import write_comp4, write_detections
    from rcnn_svm.evaluation.voc import evaluate_voc
    from rcnn_svm.files import write_json

    if options.out is not None:
        written = [options.out / name for name in ("detections.json", "comp4", "evaluation.json")]
        refuse_to_overwrite(written, [options.detections])
    found, dataset = _read(options)
    truths = [sample.truth for sample in dataset]
    voc = evaluate_voc(found, truths, dataset.classes)
    coco = None if dataset.whole else evaluate_coco(found, truths, dataset.classes)
    classified = classify(found, truths, dataset.classes) if dataset.whole else None
    if options.out is not None:
        measured = {"voc": voc, "coco": coco, "classification": classified}
        values = {name: result.to_json() for name, result in measured.items() if result is not None}
        write_detections(options.out / "detections.json", found, dataset.classes)
        write_comp4(options.out / "comp4", found, dataset.classes, split=dataset.split)
        write_json(options.out / "evaluation.json", values)
        _write_coco_results(options, found, dataset)
        say(f"Figures and exchange formats in {options.out}")
    _print_table(voc, coco, classified)  # last: its reader may leave, as `head` does


def _write_coco_results(options: argparse.Namespace, found: Sequence[Detections], dataset: Dataset) -> None:
    """Write COCO's results format too where the labels are COCO's and say its numbers."""
    from rcnn_svm.datasets import coco_category_ids, coco_image_ids, detect_format, list_splits
    from rcnn_svm.evaluation.exchange import write_coco_results

    outside = bool(options.allow_outside)
    kind = _format(options) or detect_format(options.data, allow_outside=outside)
    if kind != "coco" or dataset.split not in list_splits(options.data, format=kind, allow_outside=outside):
        return
    numbers = coco_category_ids(options.data, allow_outside=outside)
    write_coco_results(
        options.out / "coco_results.json",
        found,
        [numbers[name] for name in dataset.classes],
        coco_image_ids(options.data, dataset.split, allow_outside=outside),
    )


def _print_table(voc: EvalResult, coco: CocoResult | None, classified: Classification | None) -> None:
    """Print a line per class, one of means, and COCO's twelve numbers or, of whole images, accuracy."""
    from rcnn_svm.report.tables import LOCALISATION

    columns = {
        "VOC07": (voc.ap("voc07"), voc.map("voc07")),
        "VOC10": (voc.ap("voc10"), voc.map("voc10")),
    }
    if classified is not None:
        columns["recall"] = (classified.recall, classified.balanced_accuracy)
    if coco is not None:
        summary = coco.summary()
        columns |= {
            "COCO AP": (coco.ap(), summary["AP"]),
            "AP50": (coco.ap_at(0.5), summary["AP50"]),
            "AP75": (coco.ap_at(0.75), summary["AP75"]),
        }
    width = max(map(len, (*voc.classes, "class")))
    print(f"{'class':<{width}}" + "".join(f"{head:>9}" for head in columns))
    for k, name in enumerate(voc.classes):
        values = "".join(f"{100 * ap[k]:9.1f}" for ap, _ in columns.values())
        print(f"{printable(name):<{width}}{values}")
    print(f"{'mean':<{width}}" + "".join(f"{100 * mean:9.1f}" for _, mean in columns.values()))
    if classified is not None:
        print(
            f"\nAccuracy {100 * classified.accuracy:.1f} %, balanced "
            f"{100 * classified.balanced_accuracy:.1f} %, {len(classified.actual)} images"
        )
    if coco is not None:
        print("\nCOCO: " + "  ".join(f"{key} {100 * value:.1f}" for key, value in summary.items()))
        print(LOCALISATION)


def _read(options: argparse.Namespace) -> tuple[list[Detections], Dataset]:
    """Return detections and the labelled images that they are of, both with the classes to measure."""
    from rcnn_svm.datasets import load_dataset

    path = options.detections
    if (path / "detector.json").exists():
        return _detected(options)
    split = options.split or "test"
    dataset = load_dataset(
        options.data,
        split,
        format=_format(options),
        drop_bad_boxes=bool(options.drop_bad_boxes),
        allow_outside=bool(options.allow_outside),
    )
    if path.is_dir():
        from rcnn_svm.evaluation.exchange import read_comp4

        classes = _classes_to_measure(options, dataset, dataset.classes, options.data)
        found = read_comp4(path, classes, [sample.image_id for sample in dataset], split=split)
        return found, replace(dataset.with_classes(classes), split=split)
    known, found = _listed(options, dataset)
    classes = _classes_to_measure(options, dataset, known, path)
    return [one.with_classes(known, classes) for one in found], replace(
        dataset.with_classes(classes), split=split
    )


def _detected(options: argparse.Namespace) -> tuple[list[Detections], Dataset]:
    """Return what a detector finds in the images that it is to be measured on, and these."""
    from rcnn_svm.datasets import SplitRecord, images_to_measure
    from rcnn_svm.detector import load_detector

    detector = load_detector(options.detections, device=shared.device_of(options))
    dataset, notes = images_to_measure(
        options.data,
        options.split,
        SplitRecord.read(options.detections),
        format=_format(options),
        drop_bad_boxes=bool(options.drop_bad_boxes),
        allow_outside=bool(options.allow_outside),
    )
    for note in notes:
        say(note)
    if detector.whole_images:
        dataset = dataset.as_whole_images()
    classes = _classes_to_measure(options, dataset, detector.classes, options.detections)
    found = [
        one.with_classes(detector.classes, classes)
        for one in track(detector.detect_all(dataset.samples), "detect", total=len(dataset))
    ]
    return found, dataset.with_classes(classes)


def _listed(options: argparse.Namespace, dataset: Dataset) -> tuple[tuple[str, ...], list[Detections]]:
    """Return the classes of a file of detections, and its detections of the images of `dataset`."""
    from rcnn_svm.datasets import coco_category_ids, coco_image_ids
    from rcnn_svm.evaluation.exchange import read_coco_results, read_detections
    from rcnn_svm.files import read_json

    path, ids = options.detections, [sample.image_id for sample in dataset]
    if isinstance(read_json(path), list):
        outside = bool(options.allow_outside)
        numbers = coco_category_ids(options.data, allow_outside=outside)
        categories = [numbers[name] for name in dataset.classes]
        images = coco_image_ids(options.data, dataset.split, allow_outside=outside)
        return dataset.classes, read_coco_results(path, categories, ids, images)
    classes, listed = read_detections(path)
    by_id = {one.image_id: one for one in listed}
    missing = [image_id for image_id in ids if image_id not in by_id]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ConfigError(
            f"{path}: must hold every image of the split {dataset.split!r}, got none for "
            f"{missing[0]!r}{others}."
        )
    return classes, [by_id[image_id] for image_id in ids]


def _classes_to_measure(
    options: argparse.Namespace, dataset: Dataset, known: Sequence[str], where: Path
) -> tuple[str, ...]:
    """Return the classes that are asked for, all of `known` by default; what this leaves out is said.

    Classes of detections, labels and the command are matched by name.
    """
    from rcnn_svm.datasets import read_classes

    asked = shared.names_of(options)
    asked = asked and read_classes(asked)
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ConfigError(
            f"--classes: must be some of {', '.join(known)}, the classes of {where}, "
            f"got {', '.join(unknown)}."
        )
    classes = asked or tuple(known)
    if not set(classes) & set(dataset.classes):
        raise DataError(
            f"{options.data}: must label one of the classes {', '.join(classes)}, labels "
            f"{', '.join(dataset.classes)}. Give the classes the same names."
        )
    for name, n in zip(dataset.classes, dataset.counts().tolist(), strict=True):
        if n and name not in known:
            say(f"{where}: does not know the class {name}; objects of it that are left out: {n}.")
    return classes


def _format(options: argparse.Namespace) -> str | None:
    return None if options.format in (None, "auto") else str(options.format)
