"""The verb `propose`: region proposals of images, and how well they cover the labelled objects."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rcnn_svm.cache import CacheLimit
from rcnn_svm.cli import options as shared
from rcnn_svm.config import choices
from rcnn_svm.errors import ConfigError
from rcnn_svm.progress import say
from rcnn_svm.proposals import RpnConfig, RpnProposals, SelectiveSearchConfig

if TYPE_CHECKING:
    from rcnn_svm.proposals import ProposalRecall
    from rcnn_svm.structures import RegionSet, Sample

__all__ = ["add_propose"]

_N_DRAWN = 4
"""Images that are drawn."""


def add_propose(propose: argparse.ArgumentParser) -> None:
    """Add the options of `propose`."""
    propose.add_argument("path", type=Path, help="an image, a folder of images, or a labelled data set")
    propose.add_argument("--split", default="test", help="of a data set (default test)")
    propose.add_argument("--mode", choices=choices(SelectiveSearchConfig, "mode"), help="default: fast")
    propose.add_argument(
        "--ranking",
        choices=choices(SelectiveSearchConfig, "ranking"),
        help="diverse: more recall for few boxes (default: paper)",
    )
    propose.add_argument("--min-size", type=int, metavar="PX", help="drop smaller boxes (default 20)")
    propose.add_argument("--max-width", type=int, metavar="PX", help="shrink wider images first")
    propose.add_argument(
        "--rpn",
        metavar="NAME",
        help="the regions of a network that was trained to detect, such as "
        "torchvision:fasterrcnn_mobilenet_v3_large_fpn, instead of a selective search",
    )
    propose.add_argument("--weights", metavar="FILE", help="of that network: default, random, or a file")
    propose.add_argument("--max-regions", type=int, metavar="N", help="keep the best N boxes")
    propose.add_argument("--out", type=Path, metavar="FILE", help="write the boxes as JSON")
    propose.add_argument("--plot", type=Path, metavar="DIR", help="draw segmentations, boxes and recall")
    group = shared.add_label_options(propose, "recall of these classes")
    group.add_argument("--skip-bad", action="store_true", help="leave out images that are missing or damaged")
    group.add_argument("--max-images", type=int, metavar="N", help="the first N images of the split")
    shared.add_run_options(propose)
    shared.add_cluster_option(propose)
    propose.set_defaults(run=_propose, skip_absent_classes=False, resumes=True)


def _propose(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.images import open_images, refuse_to_overwrite
    from rcnn_svm.datasets import holds_dataset, load_dataset
    from rcnn_svm.files import write_text
    from rcnn_svm.proposals import cached_proposals, proposal_recall

    proposer, kinds = _proposer(options), ["boxes"]
    if isinstance(proposer, SelectiveSearchConfig):
        kinds.append("segmentation")
    room = CacheLimit(options.cache, shared.cache_limit_of(options))
    truths = None
    classes: tuple[str, ...] = ()
    outside = bool(options.allow_outside)
    if options.format in (None, "auto") and not holds_dataset(options.path, allow_outside=outside):
        samples = open_images([options.path])
    else:
        data = shared.data_config(options, str(options.path))
        dataset = load_dataset(
            options.path,
            options.split,
            format=None if data.format == "auto" else data.format,
            classes=data.classes or None,
            drop_bad_boxes=data.drop_bad_boxes,
            skip_bad=data.skip_bad,
            allow_outside=outside,
        )
        samples = list(dataset.samples[: data.max_images])
        truths, classes = [sample.truth for sample in samples], dataset.classes
    written = [options.out] if options.out is not None else []
    if options.plot is not None:
        written += [_drawn(options.plot, sample, kind) for sample in samples[:_N_DRAWN] for kind in kinds]
    refuse_to_overwrite(written, [sample.path for sample in samples])
    regions = cached_proposals(
        samples,
        proposer,
        options.cache / "proposals",
        n_jobs=shared.n_jobs_of(options),
        engine=shared.engine_of(options),
    )
    room.hold(finished=True)
    counts = np.array([len(one) for one in regions])
    if options.out is not None:
        lines = [f"{json.dumps(one.image_id)}: {one.boxes.astype(np.float64).tolist()}" for one in regions]
        write_text(options.out, "{" + ",\n ".join(lines) + "}\n")
        say(f"Boxes (x1 y1 x2 y2, half-open pixels, best first): {options.out}")
    recall = None
    if truths is not None:
        recall = proposal_recall([one.boxes for one in regions], truths, len(classes))
    if options.plot is not None:
        _draw(options.plot, samples, regions, proposer, recall)
    # Last: the reader of what is printed may leave, as `head` does.
    print(f"{len(regions)} images, {counts.mean():.0f} boxes each ({counts.min()} to {counts.max()})")
    if recall is not None:
        print("boxes   recall@0.5  recall@0.7   MABO")
        for b, budget in enumerate(recall.budgets):
            at = [recall.recall(0.5)[b], recall.recall(0.7)[b], recall.mabo()[b]]
            print(f"{budget:>5}   {at[0]:10.3f}  {at[1]:10.3f}  {at[2]:.3f}")
        abo = recall.abo()[:, -1]
        print(
            "ABO of all boxes: "
            + ", ".join(f"{n} {v:.3f}" for n, v in zip(classes, abo, strict=True) if v == v)
        )


_SEARCH = ("mode", "ranking", "min_size", "max_width", "seed")
"""Options of a selective search."""


def _proposer(options: argparse.Namespace) -> SelectiveSearchConfig | RpnProposals:
    """Return what finds the regions.

    Raises:
        ConfigError: an option of the other one; no such device; what `load_detection_network` refuses.
    """
    cut, search = shared.given(options, "max_regions"), shared.given(options, *_SEARCH)
    if options.rpn is None:
        if options.weights is not None:
            raise ConfigError(f"--weights are of the network of --rpn, got {options.weights} without one.")
        if options.device != "cpu":
            raise ConfigError(f"--device is for the network of --rpn, got {options.device} without one.")
        return SelectiveSearchConfig(**search, **cut)
    from rcnn_svm.networks.detection import load_detection_network

    seed = search.pop("seed", 0)  # of random weights
    if search:
        raise ConfigError(
            f"--{next(iter(search)).replace('_', '-')} is of a selective search, got --rpn as well. Leave "
            f"out one of the two."
        )
    config = RpnConfig(options.rpn, **shared.given(options, "weights"), **cut)
    device = shared.device_of(options)
    return RpnProposals(config, load_detection_network(config.network, config.weights, seed=seed)).on(device)


def _draw(
    folder: Path,
    samples: Sequence[Sample],
    regions: Sequence[RegionSet],
    proposer: SelectiveSearchConfig | RpnProposals,
    recall: ProposalRecall | None,
) -> None:
    """Draw the first few images, and recall where there are labels."""
    from rcnn_svm.files import atomic_path
    from rcnn_svm.proposals.plot import boxes_figure, levels_figure, recall_figure

    figures = {}
    for sample, one in list(zip(samples, regions, strict=True))[:_N_DRAWN]:
        image = sample.read()
        truth = sample.truth.boxes if recall is not None else None
        if isinstance(proposer, SelectiveSearchConfig):
            figures[_drawn(folder, sample, "segmentation")] = levels_figure(image, proposer)
        figures[_drawn(folder, sample, "boxes")] = boxes_figure(image, one, truth)
    if recall is not None:
        how = (
            f"selective search ({proposer.mode})"
            if isinstance(proposer, SelectiveSearchConfig)
            else f"RPN of {proposer.network.name}"
        )
        figures[folder / "recall.png"] = recall_figure({how: recall})
    for path, figure in figures.items():
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")
    say(f"Pictures: {folder}")


def _drawn(folder: Path, sample: Sample, kind: str) -> Path:
    from rcnn_svm.files import inside

    return inside(folder, f"{sample.image_id}-{kind}", ".png")
