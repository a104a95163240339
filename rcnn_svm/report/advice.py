"""What to try after a training, each suggestion with the number of one's own data that speaks for it.

Every reason is a function of its own that returns one line, or None where the data give no reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.features.build import FeatureConfig
from rcnn_svm.networks import trained_to_detect
from rcnn_svm.proposals import ProposalRecall, SelectiveSearchConfig
from rcnn_svm.structures import Dataset

__all__ = [
    "TrainingObjects",
    "WeakClass",
    "advice",
    "few_objects",
    "missed_objects",
    "small_objects",
    "weak_class",
]

_MOST = 3
"""Suggestions at most: more are read by nobody."""

_MIN_RECALL = 0.9
"""Share of the objects that proposals should reach. With the defaults it is 0.96 to 1 on photographs of VOC,
fruit and blood cells; an object without a proposal cannot be detected."""

_MIN_OBJECTS = 20
"""Objects of a class to learn from, at least."""

_SMALL = 48.0
"""Pixels: three cells of 16, the 3 x 3 cells of `block13@3x3` on its map. Below, cells share their pixels."""

_SMALL_SHARE = 0.1
"""Of the objects, from which on a second, larger size is worth its time: voc2007-mini has 0.13 at 480 pixels
(docs/boxes.md, small objects)."""

_FAR = 20.0
"""Points of AP below the median of the other classes."""

_MIN_TEST_OBJECTS = 10
"""With fewer objects of a class in the test split its AP is chance."""


@dataclass(frozen=True, eq=False)
class TrainingObjects:
    """The G objects that a detector was trained on: neither difficult nor crowd.

    Attributes:
        classes: K class names.
        labels: (G,) int64 in 0 .. K-1.
        short_sides: (G,) float64, the smaller of width and height, in pixels of the image.
        relative_sides: (G,) float64, square root of the area, as a fraction of the image's longer side.
        overlaps: (G,) float64, IoU with the best proposal.
        n_proposals: of an image, on average.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    short_sides: NDArray[np.float64]
    relative_sides: NDArray[np.float64]
    overlaps: NDArray[np.float64]
    n_proposals: float

    @classmethod
    def of(cls, dataset: Dataset, coverage: ProposalRecall) -> Self:
        """Describe the objects of a training split.

        Args:
            dataset: the split.
            coverage: of its objects by its proposals; the last budget counts.
        """
        truths = [s.truth[~(s.truth.difficult | s.truth.crowd)] for s in dataset]
        sides = [np.zeros((0, 2))] + [t.boxes[:, 2:].astype(np.float64) - t.boxes[:, :2] for t in truths]
        short, relative = np.concatenate(sides).min(axis=1), dataset.relative_sides()
        overlaps = coverage.overlap[:, -1]
        return cls(dataset.classes, coverage.labels, short, relative, overlaps, coverage.n_boxes)


@dataclass(frozen=True)
class WeakClass:
    """A class that a detector finds far worse than the others.

    Attributes:
        name: of the class.
        ap: in percent.
        others: median AP of the other classes, in percent.
    """

    name: str
    ap: float
    others: float


def advice(objects: TrainingObjects, weak: WeakClass | None, config: ExperimentConfig) -> list[str]:
    """Return up to three lines on what to try next, what matters most first; none without a reason.

    Args:
        objects: that were trained on.
        weak: what `weak_class` found.
        config: the training was made with.
    """
    few = few_objects(objects)
    searched = config.proposer == "selective-search"
    missed = missed_objects(objects, config.proposals) if searched else None
    small = None if trained_to_detect(config.features.backbone) else small_objects(objects, config.features)
    found = [missed, few, small]
    if weak is not None and weak.name not in _rare(objects):  # else it has been named already
        found.append(
            f"more labels of {weak.name}, or a look at its mistakes in report.html: it has "
            f"{weak.ap:.1f} AP (median of the others: {weak.others:.1f})"
        )
    return [line for line in found if line is not None][:_MOST]


def missed_objects(objects: TrainingObjects, proposals: SelectiveSearchConfig) -> str | None:
    """Suggest other proposals where fewer than 90 % of the objects have one with an IoU of at least 0.5.

    Smaller ones where most of the missed objects are narrower than `min_size`, else more of them where the
    limit is what keeps them few, else the thorough search; nothing where all of this is done already.
    """
    missed = objects.overlaps < 0.5
    if not len(missed) or 1 - missed.mean() >= _MIN_RECALL:
        return None
    reason = f"no proposal reaches {_percent(missed.mean())} of the training objects"
    limit = proposals.max_regions
    if np.mean(objects.short_sides[missed] < proposals.min_size) > 0.5:
        half = max(1, proposals.min_size // 2)
        return f"--set proposals.min_size={half}: {reason}, most are below {proposals.min_size} pixels"
    if limit is not None and objects.n_proposals >= 0.9 * limit:
        return f"--set proposals.max_regions={2 * limit}: {reason}, with {limit} an image"
    if proposals.mode == "fast":
        return f"--set proposals.mode=quality: {reason}"
    return None


def few_objects(objects: TrainingObjects) -> str | None:
    """Suggest to label more of the classes with fewer than 20 objects; the rarest three are named."""
    rare = _rare(objects)
    if not rare:
        return None
    named = ", ".join(f"{name} ({n})" for name, n in list(rare.items())[:3])
    others = f" and {len(rare) - 3} others" if len(rare) > 3 else ""
    return f"more labels of {named}{others}: fewer than {_MIN_OBJECTS} training objects teach little"


def small_objects(objects: TrainingObjects, features: FeatureConfig) -> str | None:
    """Suggest a further size where 10 % of the objects or more are below 48 pixels as the network sees them.

    Small regions are then read at twice the size, large ones as before. Not on the warped path, where every
    region has the same size.
    """
    if features.path != "shared" or not len(objects.labels):
        return None
    longest = max(features.sides)
    share = float(np.mean(objects.relative_sides * longest < _SMALL))
    if share < _SMALL_SHARE:
        return None
    sides = ",".join(map(str, (*features.sides, 2 * longest)))
    return (
        f"--set features.longer_sides=[{sides}], slower: {_percent(share)} of the training objects are below "
        f"{_SMALL:.0f} of {longest} pixels"
    )


def weak_class(ap: Mapping[str, float | None], n_objects: Mapping[str, int]) -> WeakClass | None:
    """Return the class with the lowest AP if it is 20 points or more below the median of the others.

    Args:
        ap: percent by class; None where there is nothing to measure.
        n_objects: of the test split, by class; classes with fewer than 10 are left out, on both sides.
    """
    known = {n: value for n, value in ap.items() if value is not None and n_objects[n] >= _MIN_TEST_OBJECTS}
    if len(known) < 2:
        return None
    name = min(known, key=lambda each: known[each])
    others = median(value for each, value in known.items() if each != name)
    return WeakClass(name, known[name], others) if others - known[name] >= _FAR else None


def _rare(objects: TrainingObjects) -> dict[str, int]:
    """Return the classes with too few objects and their numbers, the rarest first."""
    counts = np.bincount(objects.labels, minlength=len(objects.classes)).tolist()
    few = {name: n for name, n in zip(objects.classes, counts, strict=True) if n < _MIN_OBJECTS}
    return dict(sorted(few.items(), key=lambda pair: pair[1]))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
