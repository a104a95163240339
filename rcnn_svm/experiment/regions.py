"""One split with its region proposals, and its features as the blocks that heads train on."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes, clip, flip_horizontally
from rcnn_svm.engine import Engine
from rcnn_svm.features.store import FeatureStore, Featurizer, RowReader, Wanted, to_float32
from rcnn_svm.heads.assign import LabelRule, RegionTruth, describe_regions
from rcnn_svm.heads.base import ALL, Rows
from rcnn_svm.heads.scorers import SoftmaxScorer
from rcnn_svm.proposals import ProposalRecall, proposal_recall
from rcnn_svm.structures import (
    Dataset,
    GroundTruth,
    Image,
    RegionSet,
    Sample,
    TrainingRegions,
    mirror_image,
)

__all__ = ["JoinedBlocks", "SplitRegions", "StoredBlocks"]


@dataclass(frozen=True, eq=False)
class SplitRegions:
    """The images of one split with the boxes whose features are wanted.

    Attributes:
        dataset: the images and their labels.
        boxes: per image, the ground-truth boxes first (training splits only), then the proposals; where
            labels are of whole images the proposals alone, which are the objects.
        n_gt: per image, how many of the first rows are ground truth; scoring leaves them out.
    """

    dataset: Dataset
    boxes: tuple[Boxes, ...]
    n_gt: tuple[int, ...]

    @classmethod
    def of(cls, dataset: Dataset, proposals: Mapping[str, RegionSet], *, with_truth: bool) -> SplitRegions:
        """Join a split with its proposals.

        Args:
            dataset: the split.
            proposals: image id -> its regions.
            with_truth: put the ground-truth boxes first, as R-CNN's training does
                [roidb_from_voc.m]; a split that is only looked at in the end has none.
        """
        boxes, n_gt = [], []
        for sample in dataset:
            regions = proposals[sample.image_id].boxes
            n = len(sample.truth) if with_truth and not dataset.whole else 0
            boxes.append(np.concatenate([sample.truth.boxes[:n], regions]))
            n_gt.append(n)
        return cls(dataset, tuple(boxes), tuple(n_gt))

    def part(self, dataset: Dataset) -> SplitRegions:
        """Return the regions of some of the images, such as `val` of `trainval`; boxes are not copied."""
        rows = {sample.image_id: i for i, sample in enumerate(self.dataset)}
        kept = [rows[sample.image_id] for sample in dataset]
        return SplitRegions(dataset, tuple(self.boxes[i] for i in kept), tuple(self.n_gt[i] for i in kept))

    def only(self, i: int) -> SplitRegions:
        """Return the regions of image `i` alone."""
        dataset = replace(self.dataset, samples=(self.dataset.samples[i],))
        return SplitRegions(dataset, (self.boxes[i],), (self.n_gt[i],))

    def limited(self, n: int | None) -> SplitRegions:
        """Return the ground-truth rows and the `n` best proposals of each image; None for all of them."""
        if n is None:
            return self
        boxes = tuple(own[: n_gt + n] for own, n_gt in zip(self.boxes, self.n_gt, strict=True))
        return replace(self, boxes=boxes)

    def thinned(self, rule: LabelRule, n_background: int, *, seed: int) -> SplitRegions:
        """Return the objects, all positives, and some of the background of each image, for training.

        Args:
            rule: which regions are positives and which background.
            n_background: background regions of an image that stay, drawn without replacement.
            seed: of the draw, which is an image's own: in every split that has the image it is the same.
        """
        n_classes = len(self.dataset.classes)
        boxes = []
        for sample, own, n in zip(self.dataset, self.boxes, self.n_gt, strict=True):
            labels = rule.multiclass(
                describe_regions(own, sample.truth, n_classes, n, whole=self.dataset.whole)
            )
            keep = (labels >= 0) & (labels < n_classes)
            keep[:n] = True
            others = np.flatnonzero((labels == n_classes) & ~keep)
            rng = np.random.default_rng([seed, zlib.crc32(sample.image_id.encode())])
            keep[rng.permutation(others)[:n_background]] = True
            boxes.append(own[keep])
        return SplitRegions(self.dataset, tuple(boxes), self.n_gt)

    def around_objects(self, overlap_from: float, n_near: int, n_jitter: int, *, seed: int) -> SplitRegions:
        """Return the objects, some proposals near them, and boxes drawn around them, for training.

        Args:
            overlap_from: proposals are near an object when their IoU with it is >= this.
            n_near: so many of them an image at most, drawn without replacement.
            n_jitter: boxes drawn for each object: each side moves by at most a share of the object's width or
                height, itself drawn from 2 to 25 %.
            seed: of the draws, which are an image's own: in every split that has the image they are the same.
        """
        boxes, n_classes = [], len(self.dataset.classes)
        for sample, own, n in zip(self.dataset, self.boxes, self.n_gt, strict=True):
            truth = describe_regions(own, sample.truth, n_classes, n, whole=self.dataset.whole)
            near = np.flatnonzero((truth.best_iou >= overlap_from) & ~truth.difficult)
            near = near[near >= n]
            rng = np.random.default_rng([seed, zlib.crc32(sample.image_id.encode())])
            near = np.sort(rng.permutation(near)[:n_near])
            objects = sample.truth.boxes[~(sample.truth.difficult | sample.truth.crowd)]
            drawn = _jittered(objects, n_jitter, sample.size, rng)
            boxes.append(np.concatenate([own[:n], own[near], drawn]))
        return SplitRegions(self.dataset, tuple(boxes), self.n_gt)

    def mirrored(self, *, with_truth: bool = False) -> SplitRegions:
        """Return the mirror images with the regions as they lie there.

        Args:
            with_truth: keep labels and ground-truth rows, for training; else there are none.
        """
        samples, boxes = [], []
        for s, own, n in zip(self.dataset, self.boxes, self.n_gt, strict=True):
            truth = GroundTruth.empty()
            if with_truth:
                truth = replace(s.truth, boxes=flip_horizontally(s.truth.boxes, s.size[1]))
            samples.append(Sample(s.image_id, s.size, truth, render=partial(_mirrored_pixels, s)))
            boxes.append(flip_horizontally(own if with_truth else own[n:], s.size[1]))
        n_gt = self.n_gt if with_truth else (0,) * len(boxes)
        return SplitRegions(replace(self.dataset, samples=tuple(samples)), tuple(boxes), n_gt)

    def coverage(self) -> ProposalRecall:
        """Measure how well all the proposals of each image cover its objects: recall at one budget."""
        proposals = [own[n:] for own, n in zip(self.boxes, self.n_gt, strict=True)]
        most = max(1, *map(len, proposals))
        return proposal_recall(proposals, self.truths, len(self.dataset.classes), budgets=(most,))

    @property
    def truths(self) -> tuple[GroundTruth, ...]:
        """Per image its labelled objects."""
        return tuple(sample.truth for sample in self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)


def _jittered(boxes: Boxes, n: int, size: tuple[int, int], rng: np.random.Generator) -> Boxes:
    """Return `n` boxes around each of some, at least two pixels wide and high inside the image."""
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], (1, 2))[:, None]
    moves = rng.uniform(-1, 1, (len(boxes), n, 4)) * rng.uniform(0.02, 0.25, (len(boxes), n, 1))
    drawn = clip((boxes[:, None] + moves * sides).reshape(-1, 4).astype(np.float32), size)
    return drawn[(drawn[:, 2:] - drawn[:, :2] >= 2).all(axis=1)]


def _mirrored_pixels(sample: Sample) -> Image:
    return mirror_image(sample.read())


class Scaler(Protocol):
    """Scales feature rows; fitted on a training split."""

    def __call__(
        self, features: NDArray[np.float32], *, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Return the scaled rows, in `out` where it is given."""


class StoredBlocks:
    """Region blocks (see `heads.base.RegionBlocks`) read image by image from a feature store.

    Args:
        store: holds or computes the features.
        regions: which images and boxes.
        scaler: applied to rows as they are read; None leaves them as stored.
        softmax: what the rows were learned with, a head of its own; None where nothing was learned.
    """

    def __init__(
        self,
        store: FeatureStore,
        regions: SplitRegions,
        scaler: Scaler | None = None,
        softmax: SoftmaxScorer | None = None,
    ) -> None:
        self.store = store
        self.regions = regions
        self.scaler = scaler
        self.softmax = softmax

    def scaled(self, scaler: Scaler | None) -> StoredBlocks:
        """Return the same blocks read through `scaler`."""
        return StoredBlocks(self.store, self.regions, scaler, self.softmax)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names."""
        return self.regions.dataset.classes

    @property
    def n_features(self) -> int:
        """D, the length of a feature row."""
        return self.store.n_features

    def __len__(self) -> int:
        return len(self.regions)

    @property
    def engine(self) -> Engine:
        """What fills the store, and may read it."""
        return self.store.engine

    @property
    def wanted(self) -> Wanted:
        """All the rows, for the store to be filled."""
        return Wanted(self.store, self.regions.dataset.samples, self.regions.boxes)

    def only(self, i: int) -> StoredBlocks:
        """Return the block of image `i` alone, for its rows."""
        return StoredBlocks(self.store, self.regions.only(i), self.scaler)

    def features(self, i: int, rows: Rows = ALL) -> NDArray[Any]:
        """Return (R, D) features of image `i`, ground-truth rows first, or of some rows of it."""
        stored = self.store.get(self.regions.dataset.samples[i], self.regions.boxes[i])[rows]
        if self.scaler is None:
            return stored
        single = to_float32(stored)
        return self.scaler(single, out=None if single is stored else single)

    def readers(self, i: int, *others: Featurizer) -> list[RowReader]:
        """Return what computes the unscaled features of any boxes of image `i`, and other ones of it."""
        return self.store.readers(self.regions.dataset.samples[i], *others)

    def told(self, keys: NDArray[np.int64]) -> TrainingRegions:
        """Return where regions lie and what they show, given by (n, 2) image and row."""
        truths = {i: self.truth(i) for i in np.unique(keys[:, 0]).tolist()}
        places = [(truths[i], row) for i, row in keys.tolist()]
        return TrainingRegions(
            tuple(self.regions.dataset.samples[i].image_id for i in keys[:, 0].tolist()),
            np.array([truth.boxes[row] for truth, row in places], np.float32).reshape(-1, 4),
            np.array([truth.label[row] for truth, row in places], np.int64),
            np.array([truth.best_iou[row] for truth, row in places], np.float32),
        )

    def truth(self, i: int) -> RegionTruth:
        """Return how the regions of image `i` lie to its objects."""
        regions, n_classes = self.regions, len(self.classes)
        truth, whole = regions.dataset.samples[i].truth, regions.dataset.whole
        return describe_regions(regions.boxes[i], truth, n_classes, regions.n_gt[i], whole=whole)


class JoinedBlocks:
    """The blocks of several `StoredBlocks` one after the other, as of images and their mirror images.

    Args:
        parts: of the same classes and features.
    """

    def __init__(self, parts: Sequence[StoredBlocks]) -> None:
        self._places = [(part, i) for part in parts for i in range(len(part))]
        self.classes, self.n_features = parts[0].classes, parts[0].n_features

    def __len__(self) -> int:
        return len(self._places)

    def features(self, i: int, rows: Rows = ALL) -> NDArray[Any]:
        """Return (R, D) features of block `i`, or of some rows of it."""
        part, own = self._places[i]
        return part.features(own, rows)

    def truth(self, i: int) -> RegionTruth:
        """Return how the regions of block `i` lie to the objects of their image."""
        part, own = self._places[i]
        return part.truth(own)
