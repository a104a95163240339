"""The verbs `data review`, which labels to look at again, and `data next`, which images to label next."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rcnn_svm.cli import options as shared
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.progress import emit, say, track

if TYPE_CHECKING:
    Actions = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_next", "add_review"]


def add_review(actions: Actions) -> None:
    """Add the options of `data review`."""
    review = actions.add_parser(
        "review", help="a page and a CSV of labels, suspicious ones first, and of copies between splits"
    )
    review.add_argument("data", help=shared.DATA_HELP)
    review.add_argument("--out", type=Path, required=True, metavar="DIR", help="index.html, review.csv")
    review.add_argument(
        "--folds", type=int, default=5, metavar="K", help="judge each of K parts by the others (default 5)"
    )
    shared.add_experiment_options(review, without=("choice", "learn"))
    review.set_defaults(run=_review, resumes=True)


def add_next(actions: Actions) -> None:
    """Add the options of `data next`."""
    following = actions.add_parser(
        "next", help="which unlabelled images to label next: those the detector is unsure of, all different"
    )
    following.add_argument("detector", type=Path, help="a folder that `rcnn-svm train` made")
    following.add_argument("images", type=Path, nargs="+", help="image files or folders without labels")
    following.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="index.html, next.csv, next.txt"
    )
    following.add_argument("--n", type=int, default=20, metavar="N", help="so many (default 20)")
    shared.add_compute_options(following)
    following.set_defaults(run=_next)


def _review(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.training import configured
    from rcnn_svm.experiment.data import for_these_data, load_data
    from rcnn_svm.experiment.review import KINDS, review_labels
    from rcnn_svm.report.provenance import typed
    from rcnn_svm.report.review import write_review

    config = replace(configured(options, choose=False), learn="nothing")
    config = replace(
        config, data=for_these_data(config.data), heads=replace(config.heads, names=("linear-svm",))
    )
    splits = load_data(config.data, seed=config.seed)
    parts, given = config.build(), (splits.train, splits.val, splits.test)
    review = review_labels(parts, given, shared.run_of(options), n_folds=options.folds)
    command = " ".join(["rcnn-svm", *map(typed, options.words)])
    write_review(options.out, review, {"data": splits.train.name, "command": command})
    for rank, one in enumerate(review.findings[:10], 1):
        image = review.images.samples[one.image].image_id
        emit(f"{rank}. {image}: {KINDS[one.kind]}: {one.reason}")
    say(f"{len(review.findings)} findings, the most suspicious first: {options.out / 'index.html'}")


def _next(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.images import open_images, refuse_to_overwrite
    from rcnn_svm.datasets import SplitRecord
    from rcnn_svm.detector import load_detector
    from rcnn_svm.experiment.next_images import choose_images, look_for_doubt
    from rcnn_svm.report.next_images import NEXT_FILES, ToLabel, write_next
    from rcnn_svm.report.provenance import typed

    if options.n < 1:
        raise ConfigError(f"--n must be at least 1, got {options.n}.")
    samples = open_images(options.images)
    refuse_to_overwrite([options.out / name for name in NEXT_FILES], [one.path for one in samples])
    detector = load_detector(options.detector, device=shared.device_of(options))
    record = SplitRecord.read(options.detector)
    known = frozenset() if record is None else record.known
    new = [sample for sample in samples if sample.digest() not in known]
    if len(new) < len(samples):
        say(f"{len(samples) - len(new)} of {len(samples)} images are labelled: the detector knows them.")
    if not new:
        raise DataError("There must be an image that the detector was not made with, there is none.")
    if detector.thresholds is None:
        say("This detector was trained without held-out images: 0 is taken for the threshold of each class.")
    doubts = [look_for_doubt(detector, one.read(), one.image_id) for one in track(new, "look")]
    chosen = [ToLabel(new[i], doubts[i]) for i in choose_images(doubts, options.n)]
    if len(chosen) < options.n:
        say(f"There are only {len(chosen)} images, which are all listed.")
    command = " ".join(["rcnn-svm", *map(typed, options.words)])
    about = {"detector": detector.head, "n_images": len(new), "command": command}
    write_next(options.out, chosen, detector.classes, about)
    for rank, one in enumerate(chosen[:10], 1):
        emit(f"{rank}. {one.sample.image_id}: {one.words(detector.classes) or 'nothing near its threshold'}")
    say(f"{len(chosen)} of {len(new)} images: {options.out / 'index.html'}")
