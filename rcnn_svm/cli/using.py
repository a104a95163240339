"""Verbs that use a trained detector: `detect`, `evaluate`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from rcnn_svm.formats import DetectionWriter
    from rcnn_svm.structures import Dataset, Detections

__all__ = ["Shown", "Surest", "add_detect", "add_evaluate", "least_scores"]

_FORMATS = ("json", "coco", "yolo", "voc", "csv", "labelstudio")


def add_detect(detect: argparse.ArgumentParser) -> None:
    """Add the options of `detect`."""
    detect.add_argument("detector", type=Path, help="a folder that `rcnn-svm train` made")
    detect.add_argument(
        "images",
        type=Path,
        nargs="+",
        help="image files, folders, patterns such as 'photos/*.jpg', videos; - reads a list of them",
    )
    detect.add_argument("--out", type=Path, required=True, metavar="DIR")
    detect.add_argument(
        "--format",
        default="json",
        metavar="A,B",
        help=f"what else is written beside detections.json: some of {', '.join(_FORMATS)}",
    )
    detect.add_argument(
        "--label-studio-root",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="the folder whose files Label Studio serves (default: this one)",
    )
    shown = detect.add_mutually_exclusive_group()
    shown.add_argument(
        "--threshold",
        type=float,
        metavar="S",
        help="show what scores at least this (default: the threshold of each class that training chose; of "
        "whole images of one class each the surest)",
    )
    shown.add_argument("--all", action="store_true", help="show everything, however unlikely")
    detect.add_argument("--classes", metavar="A,B,C", help="show these classes alone")
    detect.add_argument("--max-detections", type=int, metavar="N", help="show the N surest of each image")
    detect.add_argument("--no-pictures", action="store_true", help="draw nothing")
    detect.add_argument(
        "--crops", action="store_true", help="cut each detection out, into a folder per class"
    )
    detect.add_argument(
        "--explain",
        type=int,
        nargs="?",
        const=5,
        metavar="N",
        help="write the evidence for the N surest of each image (default 5; see `rcnn-svm explain`)",
    )
    detect.add_argument(
        "--runtime",
        choices=("torch", "onnx"),
        default="torch",
        help="onnx: what `rcnn-svm export` made of the detector, in its folder `onnx`, without torch",
    )
    shared.add_compute_options(detect)
    shared.add_cluster_option(detect, cache=True)
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
    evaluate.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write report.html here: thresholds, sizes, mistakes, pictures, confusions; tables as CSV",
    )
    evaluate.add_argument(
        "--threshold",
        type=float,
        metavar="S",
        help="the report believes what scores at least this (default: the thresholds of the detector; of "
        "files those with the best F1 on these images)",
    )
    shared.add_label_options(evaluate, "measure these classes, in this order (default: all that are known)")
    shared.add_compute_options(evaluate)
    shared.add_cluster_option(evaluate, cache=True)
    evaluate.set_defaults(run=_evaluate)


@dataclass(frozen=True, eq=False)
class Shown:
    """Which of all detections are shown.

    Attributes:
        least: (K,) from which score on a detection of each class is shown; infinite for a class that is not.
        most: of an image; None for all.
    """

    least: NDArray[np.floating]
    most: int | None

    def rows(self, found: Detections) -> NDArray[np.intp]:
        """Return the rows of the detections that are shown, surest first."""
        return np.flatnonzero(found.scores >= self.least[found.labels])[: self.most]


def _detect(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.images import named
    from rcnn_svm.cli.video import detect_videos
    from rcnn_svm.datasets.video import VIDEO_SUFFIXES

    formats = _formats(options)
    for name, value in (("max-detections", options.max_detections), ("explain", options.explain)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}.")
    detector, digest = _detector(options)
    shown = _shown(options, detector)
    made_by = {
        "detector": digest,
        "threshold": options.threshold,
        "all": options.all,
        "classes": shared.names_of(options),
        "max_detections": options.max_detections,
        "pictures": not options.no_pictures,
    }
    paths = named(options.images)
    videos = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()]
    if videos and (formats or options.crops or options.explain):
        raise ConfigError(
            f"{videos[0]}: of a video there is a line of JSON a frame and the video with its detections; "
            f"--format, --crops and --explain are of images."
        )
    if videos and options.cluster is not None:
        raise ConfigError(
            f"{videos[0]}: a video is looked at by the machine that decodes it. Leave out --cluster."
        )
    images = [path for path in paths if path not in videos]
    if images:
        _detect_images(options, detector, shown, images, formats, made_by)
    if videos:
        detect_videos(videos, options.out, detector, shown, made_by)


def _detector(options: argparse.Namespace) -> tuple[Detector, str]:
    """Return the detector in the runtime that is asked for, and the digest of the file that describes it."""
    from rcnn_svm.files import file_digest

    if options.runtime == "onnx":
        from rcnn_svm.runtime import MANIFEST, load
        from rcnn_svm.runtime.networks import find_export

        if options.explain or options.device != "cpu" or options.cluster is not None:
            raise ConfigError(
                "--runtime onnx runs on the CPU of this machine and cannot --explain: leave --device, "
                "--cluster and --explain out, or it."
            )
        folder = find_export(options.detector)
        # Several images are looked at at once, each by one thread.
        return load(folder, threads=1), file_digest(folder / MANIFEST)
    from rcnn_svm.detector import load_detector

    detector = load_detector(options.detector, device=shared.device_of(options))
    return detector, file_digest(options.detector / "detector.json")


def _formats(options: argparse.Namespace) -> list[str]:
    """Return the formats beside JSON that are asked for."""
    asked = [name.strip() for name in options.format.split(",") if name.strip()]
    unknown = [name for name in asked if name not in _FORMATS]
    if unknown or not asked:
        raise ConfigError(
            f"--format must be some of {', '.join(_FORMATS)}, got {unknown or options.format!r}."
        )
    return [name for name in dict.fromkeys(asked) if name != "json"]


def _writers(
    options: argparse.Namespace, detector: Detector, shown: Shown, formats: Sequence[str], digest: str
) -> list[DetectionWriter]:
    """Return what writes the detections; last what says that all is written."""
    from rcnn_svm.cli.explaining import EvidenceWriter
    from rcnn_svm.formats import FORMATS, JsonWriter, LabelStudioWriter
    from rcnn_svm.report.draw import CropWriter, PictureWriter

    writers: list[DetectionWriter] = []
    if not options.no_pictures:
        writers.append(PictureWriter(options.out, detector.classes))
    if options.crops:
        writers.append(CropWriter(options.out, detector.classes))
    if options.explain:
        writers.append(
            EvidenceWriter(options.out / "explain", detector, options.detector, shown, options.explain)
        )
    for name in formats:
        if name == "labelstudio":
            made_by = f"{detector.head} {digest[:12]}"
            root = options.label_studio_root
            writers.append(LabelStudioWriter(options.out, detector.classes, made_by, root))
        else:
            writers.append(FORMATS[name](options.out, detector.classes))
    return [*writers, JsonWriter(options.out, detector.classes)]


def _detect_images(
    options: argparse.Namespace,
    detector: Detector,
    shown: Shown,
    paths: Sequence[Path],
    formats: Sequence[str],
    made_by: Mapping[str, Any],
) -> None:
    from rcnn_svm.cli.images import open_images, refuse_to_overwrite
    from rcnn_svm.evaluation.exchange import DetectionLines
    from rcnn_svm.files import remove_marker

    left_out: list[DataError] = []

    def leave_out(error: DataError) -> None:
        left_out.append(error)
        say(f"{error} It is left out.")

    samples = {sample.image_id: sample for sample in open_images(paths, unreadable=leave_out)}
    writers = _writers(options, detector, shown, formats, made_by["detector"])
    outputs = [path for writer in writers for path in writer.files(list(samples.values()))]
    refuse_to_overwrite(outputs, [s.path for s in samples.values()])
    remove_marker(outputs[-1])  # where it lies, the rest is whole
    more = {"formats": formats, "crops": options.crops, "explain": options.explain}
    lines = DetectionLines(options.out / "detections.jsonl", detector.classes, {**made_by, **more})
    done = {
        name: found
        for name, (image, found) in lines.done.items()
        if name in samples and image == samples[name].digest()
    }
    if done:
        say(f"{len(done)} of {len(samples)} images were looked at before and are not looked at again.")
    left = [sample for name, sample in samples.items() if name not in done]
    surest = Surest(shown, detector.classes)
    looked_at = detector.detect_all(left, unreadable=leave_out, engine=shared.engine_of(options))
    for everything in track(looked_at, "detect", total=len(left)):
        detections = everything[shown.rows(everything)]
        surest.see(everything)
        sample = samples[detections.image_id]
        for writer in writers:
            writer.add(sample, detections)
        lines.add(detections, sample.digest())
        done[sample.image_id] = detections
        emit(f"{sample.path}: {_words(detections, detector) or 'nothing'}")
    found = [(sample, done[name]) for name, sample in samples.items() if name in done]
    for writer in writers:
        writer.finish(found)
    lines.remove()
    n_found = sum(len(detections) for _, detections in found)
    say(f"{n_found} detections in {len(found)} images, in {options.out}{_uncalibrated(detector)}")
    if not n_found:
        surest.tell()
    if left_out:
        raise DataError(
            f"{len(left_out)} of {len(found) + len(left_out)} images could not be read and were left out. "
            f"The first: {left_out[0]}"
        )


class Surest:
    """Remembers the surest detection, to be told where nothing is shown.

    Args:
        shown: which are; of classes that are not, none is remembered.
        classes: K names.
    """

    def __init__(self, shown: Shown, classes: Sequence[str]) -> None:
        self._classes, self._asked = classes, ~np.isposinf(shown.least)
        self._score, self._words = -np.inf, ""

    def see(self, found: Detections) -> None:
        """Look at all detections of an image."""
        asked = found[self._asked[found.labels]]
        if len(asked) and asked.scores[0] > self._score:
            self._score = float(asked.scores[0])
            name = self._classes[asked.labels[0]]
            self._words = f"{name} at {self._score:.3f} in {found.image_id}"

    def tell(self) -> None:
        """Say which it was, if there was any."""
        if self._words:
            say(f"Nothing reaches the threshold: the surest of all is {self._words}. Lower --threshold.")


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


def _shown(options: argparse.Namespace, detector: Detector) -> Shown:
    """Return which detections are to be shown."""
    asked = _asked_classes(options, detector.classes, options.detector) or detector.classes
    least: NDArray[np.floating] = np.full(len(detector.classes), -np.inf)
    most = options.max_detections
    if not options.all:
        if options.threshold is None and detector.thresholds is None and detector.whole_images:
            most = 1
        else:
            least = least_scores(options.threshold, detector)
    known = np.array([name in asked for name in detector.classes])
    return Shown(np.where(known, least, np.inf), most)


def _asked_classes(options: argparse.Namespace, known: Sequence[str], where: Path) -> tuple[str, ...]:
    """Return the classes that are asked for, none where nothing is said.

    Raises:
        ConfigError: one of them is not known.
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
    return asked


def least_scores(threshold: float | None, detector: Detector) -> NDArray[np.floating]:
    """Return from which score on a detection of each class is shown, (K,).

    Args:
        threshold: for all classes; None takes those that training chose.
        detector: what found them.

    Raises:
        ConfigError: the threshold is no number.
    """
    if threshold is not None:
        if math.isnan(threshold):
            raise ConfigError("--threshold must be a number, got nan.")
        return np.full(len(detector.classes), threshold, np.float32)  # as scores are: equals are equal
    if detector.thresholds is None:
        say("This detector was trained without held-out images: shown is what scores at least 0.")
    return detector.least_scores


def _evaluate(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.images import refuse_to_overwrite
    from rcnn_svm.evaluation.classification import classify
    from rcnn_svm.evaluation.coco import evaluate_coco
    from rcnn_svm.evaluation.exchange import write_comp4, write_detections
    from rcnn_svm.evaluation.voc import evaluate_voc
    from rcnn_svm.files import write_json

    written = []
    if options.out is not None:
        names = ("detections.json", "comp4", "evaluation.json", "coco_results.json", "coco_data.json")
        written += [options.out / name for name in names]
    if options.report is not None:
        from rcnn_svm.report.evaluation import evaluation_files

        written += evaluation_files(options.report)
    elif options.threshold is not None:
        raise ConfigError("--threshold is of the report: give --report DIR too.")
    refuse_to_overwrite(written, [options.detections])
    found, dataset, thresholds = _read(options)
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
    if options.report is not None:
        _report(options, found, dataset, voc, coco, thresholds)
    _print_table(voc, coco, classified)  # last: its reader may leave, as `head` does


def _report(
    options: argparse.Namespace,
    found: Sequence[Detections],
    dataset: Dataset,
    voc: EvalResult,
    coco: CocoResult | None,
    thresholds: Mapping[str, float] | None,
) -> None:
    """Write the page about the detections, at the thresholds that are asked for or known."""
    from rcnn_svm.evaluation.diagnosis import diagnose
    from rcnn_svm.evaluation.thresholds import choose_thresholds
    from rcnn_svm.report.evaluation import write_evaluation
    from rcnn_svm.report.provenance import provenance, typed

    matches, chosen = voc.matches, "of --threshold"
    if options.threshold is not None:
        if math.isnan(options.threshold):
            raise ConfigError("--threshold must be a number, got nan.")
        least = np.full(len(dataset.classes), options.threshold, np.float32)
        if not (matches.score >= options.threshold).any() and len(matches.score):
            surest = int(matches.score.argmax())
            name = dataset.classes[matches.label[surest]]
            say(
                f"No detection reaches --threshold {options.threshold:g}: the surest is {name} at "
                f"{matches.score[surest]:.3f}. The report believes nothing."
            )
    elif thresholds is not None:
        chosen = "of the detector"
        least = np.array([thresholds.get(name, np.inf) for name in dataset.classes], np.float32)
    else:
        chosen = "chosen on these very images (best F1)"
        least = choose_thresholds(matches).scores
    truths = [sample.truth for sample in dataset]
    diagnosis = diagnose(options.detections.resolve().name, found, truths, voc, least)
    about = provenance(seed=0, command=" ".join(["rcnn-svm", *map(typed, options.words)]))
    page = write_evaluation(options.report, diagnosis, coco, dataset, chosen=chosen, about=about)
    say(f"Report: {page}")


def _write_coco_results(options: argparse.Namespace, found: Sequence[Detections], dataset: Dataset) -> None:
    """Write COCO's results: with the numbers of the labels where they are COCO's, else with a data file."""
    from rcnn_svm.datasets import coco_category_ids, coco_image_ids, detect_format, list_splits
    from rcnn_svm.evaluation.exchange import write_coco_results
    from rcnn_svm.formats import write_coco_files

    outside = bool(options.allow_outside)
    kind = _format(options) or detect_format(options.data, allow_outside=outside)
    results = options.out / "coco_results.json"
    if kind != "coco" or dataset.split not in list_splits(options.data, format=kind, allow_outside=outside):
        images = list(zip(dataset, found, strict=True))
        write_coco_files(results, options.out / "coco_data.json", images, dataset.classes)
        return
    numbers = coco_category_ids(options.data, allow_outside=outside)
    write_coco_results(
        results,
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


def _read(options: argparse.Namespace) -> tuple[list[Detections], Dataset, Mapping[str, float] | None]:
    """Return detections and the labelled images that they are of, both with the classes to measure.

    And from which score on a detector believes in a class, None where nothing has chosen that.
    """
    from rcnn_svm.datasets import load_dataset

    path = options.detections
    if (path / "detector.json").exists():
        return _detected(options)
    if options.cluster is not None:
        raise ConfigError(
            f"--cluster: no image is looked at where the detections are in a file, {path}. Leave it out."
        )
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
        return found, replace(dataset.with_classes(classes), split=split), None
    known, found = _listed(options, dataset)
    classes = _classes_to_measure(options, dataset, known, path)
    dataset = replace(dataset.with_classes(classes), split=split)
    return [one.with_classes(known, classes) for one in found], dataset, None


def _detected(options: argparse.Namespace) -> tuple[list[Detections], Dataset, Mapping[str, float] | None]:
    """Return what a detector finds in the images that it is to be measured on, these, and its thresholds."""
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
    looked_at = detector.detect_all(dataset.samples, engine=shared.engine_of(options))
    found = [
        one.with_classes(detector.classes, classes) for one in track(looked_at, "detect", total=len(dataset))
    ]
    thresholds = detector.thresholds
    scores = None if thresholds is None else dict(zip(detector.classes, thresholds.scores, strict=True))
    return found, dataset.with_classes(classes), scores


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
    classes = _asked_classes(options, known, where) or tuple(known)
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
