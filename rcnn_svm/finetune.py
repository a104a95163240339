"""Train features by R-CNN's recipe: a whole network on warped regions, or layers of our own on stored ones.

Both draw mini-batches of positives and background in a fixed ratio, uniformly and with replacement from all
regions of all images, and train an (N + 1)-way softmax. torch is loaded when training starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes, encode_deltas
from rcnn_svm.errors import DataError, ShapeError
from rcnn_svm.features.crop_config import FinetuneConfig
from rcnn_svm.features.fc_layers import FcConfig, FcLayers
from rcnn_svm.features.trunk_config import TrunkConfig
from rcnn_svm.features.warp import warp_crops
from rcnn_svm.files import bytes_digest, digest, write_json
from rcnn_svm.heads.assign import LabelRule, RegionTruth, describe_regions
from rcnn_svm.heads.base import RegionBlocks
from rcnn_svm.structures import Dataset, Sample

if TYPE_CHECKING:
    from rcnn_svm.features.backbone import Backbone
    from rcnn_svm.features.crop_training import Chunk
    from rcnn_svm.features.fc_training import Batch, FcModule
    from rcnn_svm.features.featurizers import SharedFeatures
    from rcnn_svm.features.shared_training import View

__all__ = [
    "BACKGROUND",
    "FcConfig",
    "FinetuneConfig",
    "FinetuneResult",
    "TrunkConfig",
    "finetune",
    "label_rule",
    "train_fc_layers",
    "tune_trunk",
]

BACKGROUND = "background"
"""Name of the last output of a fine-tuned network."""

_BUFFER_ROWS = 32_768
"""Feature rows that are shuffled together: bounds memory, whatever the number of images."""
_PASSES = 6
"""Visits to each image while training on stored features."""


@dataclass(frozen=True, eq=False)
class _Draw:
    """Regions drawn for training.

    Attributes:
        image: (n,) int64.
        row: (n,) int64, its row within the image.
        label: (n,) int64 in 0 .. K, K is background.
        delta: (n, 4) float32 box targets; zeros for background.
    """

    image: NDArray[np.int64]
    row: NDArray[np.int64]
    label: NDArray[np.int64]
    delta: NDArray[np.float32]


class _RegionIndex:
    """All positives and all background regions of a training split, to draw from.

    Holds a few bytes a region; the regions' boxes and features stay where they are.
    """

    def __init__(self, regions: Iterable[RegionTruth], rule: LabelRule, n_classes: int, where: str) -> None:
        self.n_classes = n_classes
        self._background: list[NDArray[np.uint32]] = []
        image, row, label, delta = [], [], [], []
        for i, truth in enumerate(regions):
            labels = rule.multiclass(truth)
            self._background.append(np.flatnonzero(labels == n_classes).astype(np.uint32))
            positive = np.flatnonzero((labels >= 0) & (labels < n_classes))
            image.append(np.full(len(positive), i))
            row.append(positive)
            label.append(labels[positive])
            targets = encode_deltas(truth.boxes[positive], truth.target[positive])
            delta.append(targets.astype(np.float32))
        self._ends = np.cumsum([len(rows) for rows in self._background])
        if not image or not sum(map(len, row)) or not self._ends[-1]:
            kind = "background region" if image and sum(map(len, row)) else "positive region"
            raise DataError(
                f"{where}: there is no {kind} to train on, got {len(image)} images. "
                f"Check that the data set has labelled objects and the images have proposals."
            )
        self._image, self._row, self._label = map(np.concatenate, (image, row, label))
        self._delta = np.concatenate(delta)
        self._by_class = [rows for k in range(n_classes) if len(rows := np.flatnonzero(self._label == k))]

    def draw(self, rng: np.random.Generator, n_positive: int, n_background: int, balanced: bool) -> _Draw:
        """Draw positives, then background, uniformly with replacement (or evenly over classes)."""
        if balanced:
            classes = rng.integers(len(self._by_class), size=n_positive)
            at = rng.random(n_positive)
            sizes = np.array([len(rows) for rows in self._by_class])
            picked = np.array(
                [
                    self._by_class[k][j]
                    for k, j in zip(classes, (at * sizes[classes]).astype(int), strict=True)
                ],
                np.int64,
            )
        else:
            picked = rng.integers(len(self._label), size=n_positive)
        place = rng.integers(self._ends[-1], size=n_background)
        image = np.searchsorted(self._ends, place, side="right")
        first = self._ends[image] - np.array([len(rows) for rows in self._background])[image]
        row = np.array([self._background[i][j] for i, j in zip(image, place - first, strict=True)], np.int64)
        background = np.full(n_background, self.n_classes)
        return _Draw(
            np.concatenate([self._image[picked], image]),
            np.concatenate([self._row[picked], row]),
            np.concatenate([self._label[picked], background]),
            np.concatenate([self._delta[picked], np.zeros((n_background, 4), np.float32)]),
        )

    def draw_from_one_image(self, rng: np.random.Generator, n_positive: int, n_background: int) -> _Draw:
        """Draw an image with a class, all classes alike, then regions of it with replacement.

        Half of the positives are of that class, the others of any class in the image, all alike. An image
        without background gives positives only.
        """
        members = self._by_class[rng.integers(len(self._by_class))]
        images = np.unique(self._image[members])
        image = int(images[rng.integers(len(images))])
        first, last = np.searchsorted(self._image, (image, image + 1))
        own = np.arange(first, last)
        labels = self._label[own]
        wanted = np.full(n_positive, self._label[members[0]])
        wanted[n_positive // 2 :] = rng.choice(np.unique(labels), n_positive - n_positive // 2)
        picked = np.array([rng.choice(own[labels == k]) for k in wanted], np.int64)
        background = self._background[image]
        n_background = n_background if len(background) else 0
        row = background[rng.integers(max(len(background), 1), size=n_background)].astype(np.int64)
        return _Draw(
            np.full(n_positive + n_background, image),
            np.concatenate([self._row[picked], row]),
            np.concatenate([self._label[picked], np.full(n_background, self.n_classes)]),
            np.concatenate([self._delta[picked], np.zeros((n_background, 4), np.float32)]),
        )


def _split_batch(batch_size: int, positive_share: float) -> tuple[int, int]:
    n_positive = min(max(1, round(batch_size * positive_share)), batch_size - 1)
    return n_positive, batch_size - n_positive


def train_fc_layers(
    blocks: RegionBlocks, config: FcConfig | None = None, *, seed: int = 0, device: str = "cpu"
) -> FcLayers:
    """Train fc6 and fc7 of our own on stored features, with a softmax and class-specific box regression.

    Rows are read image by image and a bounded number is held at once.

    Args:
        blocks: the regions of the training images, ground-truth rows included.
        config: sizes, label rule and schedule.
        seed: of draws, initial weights and dropout.
        device: where torch runs.

    Raises:
        DataError: there is no positive or no background region, or the training diverged.
    """
    return _train_fc(blocks, config, seed, device).to_layers()


def label_rule(config: FcConfig) -> LabelRule:
    """Return which regions are positives and which background while fc layers are trained."""
    return LabelRule(config.positive_iou, config.negative_iou, config.negative_low, config.skip_difficult)


def _train_fc(blocks: RegionBlocks, config: FcConfig | None, seed: int, device: str) -> FcModule:
    from rcnn_svm.features.fc_training import train_on_batches

    config = config or FcConfig()
    rule = label_rule(config)
    truths = (blocks.truth(i) for i in range(len(blocks)))
    index = _RegionIndex(truths, rule, len(blocks.classes), "train_fc_layers")
    batches = _stored_batches(blocks, index, config, np.random.default_rng(seed))
    return train_on_batches(batches, config, len(blocks.classes), seed, device)


def tune_trunk(
    blocks: RegionBlocks,
    samples: Sequence[Sample],
    boxes: Sequence[Boxes],
    features: SharedFeatures,
    backbone: Backbone,
    fc_config: FcConfig,
    config: TrunkConfig,
    *,
    folder: Path,
    seed: int = 0,
) -> tuple[Backbone, FcLayers]:
    """Train fc6 and fc7 of our own, then go on with them and the last blocks of the network together.

    The first part reads the stored features of the network as it is, the second whole images: Fast R-CNN's
    training, but for the blocks before `config.first_layer`, which stay as they are.

    Args:
        blocks: the regions of the training images, ground-truth rows included.
        samples: the images.
        boxes: for each image, the (R, 4) boxes of the rows of its block.
        features: made of `backbone`; one scale, and map layers only.
        backbone: where training starts; it is left alone.
        fc_config: sizes, label rule and the schedule of the first part.
        config: the schedule of the second part.
        folder: of maps of the frozen blocks, and of checkpoints: where one of the same training lies, it
            goes on from there and ends with the same bytes as if it had never stopped.
        seed: of draws, initial weights and dropout.

    Returns:
        The tuned network, and the layers that read its taps.

    Raises:
        ConfigError: see `FrozenMaps`.
        DataError: there is no positive or no background region, or the loss became infinite.
        CacheError: a checkpoint or a stored map is damaged.

    References:
        Girshick, Fast R-CNN, arXiv 1504.08083, section 2.3.
    """
    from rcnn_svm.features.shared_training import FrozenMaps, train_on_maps

    maps = FrozenMaps(features, config.first_layer, samples, folder / "maps")
    fc = _train_fc(blocks, fc_config, seed, features.device)
    rule = label_rule(fc_config)
    truths = (blocks.truth(i) for i in range(len(blocks)))
    index = _RegionIndex(truths, rule, len(blocks.classes), "tune_trunk")
    identity = digest(
        {
            "features": features.key,
            "start": fc.to_layers().key,
            "config": asdict(config),
            "fc": asdict(fc_config),
            "seed": seed,
            "images": [sample.digest() for sample in samples],
            "regions": bytes_digest(*(np.ascontiguousarray(b).tobytes() for b in boxes)),
        }
    )
    tuned, layers, _ = train_on_maps(
        features,
        backbone,
        fc,
        maps,
        _Views(index, boxes, fc_config, config, seed).prepare,
        config,
        seed=seed,
        identity=identity,
        checkpoint=folder / f"{identity}.checkpoint",
    )
    return tuned, layers.to_layers()


class _Views:
    """Draws images, and regions from them, for the steps of a chunk."""

    def __init__(
        self,
        index: _RegionIndex,
        boxes: Sequence[Boxes],
        fc_config: FcConfig,
        config: TrunkConfig,
        seed: int,
    ) -> None:
        self._index, self._boxes, self._config, self._seed = index, boxes, config, seed
        self._counts = _split_batch(config.regions, fc_config.positive_share)

    def prepare(self, number: int, n_steps: int) -> list[list[View]]:
        """Return the views of a chunk's steps; they depend on the seed and the arguments alone."""
        rng = np.random.default_rng([self._seed, number])
        return [[self._view(rng) for _ in range(self._config.images)] for _ in range(n_steps)]

    def _view(self, rng: np.random.Generator) -> View:
        from rcnn_svm.features.shared_training import View

        draw = self._index.draw_from_one_image(rng, *self._counts)
        image = int(draw.image[0])
        mirrored = bool(self._config.flip and rng.random() < 0.5)
        return View(image, mirrored, self._boxes[image][draw.row], draw.label, draw.delta)


def _stored_batches(
    blocks: RegionBlocks, index: _RegionIndex, config: FcConfig, rng: np.random.Generator
) -> Iterator[Batch]:
    """Yield batches of stored rows; each pass over the images draws its share of all batches at once."""
    from rcnn_svm.features.fc_training import Batch

    n_positive, n_background = _split_batch(config.batch_size, config.positive_share)
    left = config.steps(index.n_classes)
    per_pass = -(-left // _PASSES)
    while left:
        steps = min(per_pass, left)
        draw = index.draw(rng, steps * n_positive, steps * n_background, config.balanced)
        waiting: tuple[list[Any], list[Any]] = ([], [])  # positives, background
        order = np.argsort(draw.image, kind="stable")
        images, starts = np.unique(draw.image[order], return_index=True)
        groups = np.split(order, starts[1:])
        n_waiting = 0
        visits = rng.permutation(len(images))
        for position, v in enumerate(visits):
            rows = groups[v]
            values = np.asarray(blocks.features(int(images[v]), draw.row[rows]))
            is_background = draw.label[rows] == index.n_classes
            for kind, members in enumerate((~is_background, is_background)):
                waiting[kind].append((values[members], draw.label[rows][members], draw.delta[rows][members]))
            n_waiting += len(rows)
            if n_waiting < _BUFFER_ROWS and position + 1 < len(visits):
                continue
            pools = [_shuffled(parts, rng) for parts in waiting]
            n_batches = min(len(pools[0][1]) // n_positive, len(pools[1][1]) // n_background)
            for b in range(n_batches):
                p = slice(b * n_positive, (b + 1) * n_positive)
                n = slice(b * n_background, (b + 1) * n_background)
                yield Batch(*(np.concatenate([x[p], y[n]]) for x, y in zip(*pools, strict=True)))
            used = (n_batches * n_positive, n_batches * n_background)
            waiting = tuple([tuple(x[k:] for x in pool)] for pool, k in zip(pools, used, strict=True))  # type: ignore[assignment]
            n_waiting = sum(len(part[0][1]) for part in waiting)
        left -= steps


def _shuffled(parts: list[tuple[NDArray[Any], ...]], rng: np.random.Generator) -> tuple[NDArray[Any], ...]:
    order = rng.permutation(sum(len(part[1]) for part in parts))
    return tuple(np.concatenate(column)[order] for column in zip(*parts, strict=True))


@dataclass(frozen=True, eq=False)
class FinetuneResult:
    """A fine-tuned network and how its training went.

    Attributes:
        backbone: in evaluation mode; its outputs are the classes, background last.
        config: of the training.
        history: one (step, mean loss, accuracy) a chunk of steps.
        seconds: of wall clock, this run only.
    """

    backbone: Backbone
    config: FinetuneConfig
    history: tuple[tuple[int, float, float], ...]
    seconds: float

    def save(self, path: Path) -> None:
        """Write the weights to `path` (safetensors, for `load_backbone`) and a JSON of the same name."""
        self.backbone.save(path)
        write_json(
            path.with_suffix(".json"),
            {
                "backbone": self.backbone.name,
                "classes": list(self.backbone.classes or ()),
                "config": asdict(self.config),
                "history": [dict(zip(("step", "loss", "accuracy"), h, strict=True)) for h in self.history],
            },
        )


def finetune(
    backbone: Backbone,
    dataset: Dataset,
    regions: Sequence[Boxes],
    config: FinetuneConfig | None = None,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    device: str = "cpu",
) -> FinetuneResult:
    """Fine-tune a network for the classes of a data set on warped regions; `backbone` is left alone.

    Its last layer is replaced by a random (N + 1)-way one, background last.

    Args:
        backbone: where training starts.
        dataset: N classes, training images.
        regions: for each image (R, 4) proposals; ground-truth boxes join them.
        config: the schedule.
        seed: of the new layer, draws, flips and dropout.
        checkpoint: a file that is kept up to date; where it exists, training goes on from it and ends with
            the same bytes as if it had never stopped. None keeps no checkpoint.
        device: where torch runs.

    Raises:
        ShapeError: images and lists of regions differ in number.
        DataError: there is no positive or no background region, or the loss became infinite.
        CacheError: the checkpoint is damaged or belongs to another training.

    References:
        Girshick et al., arXiv 1311.2524v5, section 2.3; BVLC/caffe, window_data_layer.cpp.
    """
    from rcnn_svm.features.backbone import with_new_outputs
    from rcnn_svm.features.crop_training import train_on_crops

    config = config or FinetuneConfig()
    if len(regions) != len(dataset):
        raise ShapeError(f"finetune: got {len(dataset)} images but {len(regions)} lists of regions.")
    started = time.perf_counter()
    boxes = [np.concatenate([s.truth.boxes, r]) for s, r in zip(dataset, regions, strict=True)]
    n_classes = len(dataset.classes)
    described = (
        describe_regions(b, sample.truth, n_classes, len(sample.truth))
        for b, sample in zip(boxes, dataset, strict=True)
    )
    rule = LabelRule(config.positive_iou, config.negative_iou)
    index = _RegionIndex(described, rule, n_classes, f"finetune: {dataset.name} {dataset.split}")
    tuned = with_new_outputs(backbone, (*dataset.classes, BACKGROUND), seed=seed)
    crops = _Crops(tuned, dataset, boxes, index, config, seed)
    identity = {
        "start": tuned.digest,
        "config": asdict(config),
        "seed": seed,
        "classes": list(dataset.classes),
        "images": [sample.image_id for sample in dataset],
        "regions": bytes_digest(*(b.tobytes() for b in boxes)),
    }
    history = train_on_crops(
        tuned,
        crops.prepare,
        config,
        seed=seed,
        identity=digest(identity),
        checkpoint=checkpoint,
        device=device,
    )
    done = type(tuned)(tuned.name, tuned.net, tuned.classes).eval()  # its digest is that of the new weights
    return FinetuneResult(done, config, tuple(map(tuple, history)), time.perf_counter() - started)  # type: ignore[arg-type]


class _Crops:
    """Cuts the crops of a chunk of training steps, reading every image once a chunk."""

    def __init__(
        self,
        backbone: Backbone,
        dataset: Dataset,
        boxes: Sequence[Boxes],
        index: _RegionIndex,
        config: FinetuneConfig,
        seed: int,
    ) -> None:
        self._size, self._padding, self._fill = backbone.crop_size, backbone.padding, backbone.mean_pixel
        self._samples, self._boxes, self._index = dataset.samples, boxes, index
        self._config, self._seed = config, seed

    def prepare(self, number: int, n_steps: int) -> Chunk:
        """Return the crops of a chunk; they depend on the seed and the arguments alone."""
        from rcnn_svm.features.crop_training import Chunk

        config = self._config
        rng = np.random.default_rng([self._seed, number])
        n_positive, n_background = _split_batch(config.batch_size, config.positive_share)
        draw = self._index.draw(rng, n_steps * n_positive, n_steps * n_background, balanced=False)
        # Drawn in one go, dealt out in steps: positives lead each batch.
        deal = np.concatenate(
            [
                np.arange(n_steps * n_positive).reshape(n_steps, n_positive),
                np.arange(n_steps * n_positive, n_steps * config.batch_size).reshape(n_steps, n_background),
            ],
            axis=1,
        ).ravel()
        image, row = draw.image[deal], draw.row[deal]
        mirrored = rng.random(len(deal)) < (0.5 if config.flip else 0.0)
        crops = np.empty((len(deal), self._size, self._size, 3), np.uint8)
        for i in np.unique(image):
            members = np.flatnonzero(image == i)
            cut = warp_crops(
                self._samples[i].read(),
                self._boxes[i][row[members]],
                self._size,
                padding=self._padding,
                fill=self._fill,
            )
            cut[mirrored[members]] = cut[mirrored[members], :, ::-1]
            crops[members] = cut
        shape = (n_steps, config.batch_size)
        return Chunk(crops.reshape(*shape, *crops.shape[1:]), draw.label[deal].reshape(shape))
