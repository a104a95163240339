"""The training loop of a network's last blocks together with fc6 and fc7, on maps of whole images.

The blocks before `first_layer` are frozen: what they make of an image and of its mirror image is computed
once and kept on disk, memory-mapped, so that a step costs the trained blocks only. RoIAlign is a matrix
product here, whose gradient autograd knows.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rcnn_svm.boxes import MIRRORED_DELTAS, Boxes, flip_horizontally
from rcnn_svm.cache import note_use
from rcnn_svm.errors import ConfigError
from rcnn_svm.features.fc_layers import FcLayers
from rcnn_svm.features.featurizers import SharedFeatures, seen_part
from rcnn_svm.features.roi_pool import roi_align, roi_align_matrix
from rcnn_svm.features.sizes import resize
from rcnn_svm.files import atomic_path, bytes_digest, digest, is_sealed, seal
from rcnn_svm.heads.base import RegionBlocks
from rcnn_svm.networks.backbone import Backbone
from rcnn_svm.networks.fusing import absorb_batch_norm
from rcnn_svm.networks.taps import TapSpec
from rcnn_svm.progress import say
from rcnn_svm.structures import Sample, mirror_image
from rcnn_svm.training.config import FcConfig, TrunkConfig
from rcnn_svm.training.draws import RegionIndex, split_batch
from rcnn_svm.training.fc import FcModule, train_fc_module
from rcnn_svm.training.loop import Checkpoints, Progress, Trainer, cosine, groups_of, train_in_chunks
from rcnn_svm.training.parallel import Part, Ranks, shares

__all__ = ["FrozenMaps", "Seen", "View", "frozen_layer", "train_on_maps", "tune_trunk"]


class View(NamedTuple):
    """Regions drawn from one image for one step.

    Attributes:
        image: its number.
        mirrored: whether its mirror image is looked at; `boxes` and `deltas` are of the image itself.
        boxes: (R, 4) half-open pixels.
        labels: (R,) int64 in 0 .. K, K is background.
        deltas: (R, 4) float32 targets of the box regression; zeros for background.
    """

    image: int
    mirrored: bool
    boxes: Boxes
    labels: NDArray[np.int64]
    deltas: NDArray[np.float32]


class Seen(NamedTuple):
    """What training reads of a view.

    Attributes:
        map: (h, w, C) float16, of the blocks that stay.
        cells: of each tap (R, 4), or (1, 4) where all regions see the same, in cells of its layer.
        labels: (R,) int64 in 0 .. K.
        deltas: (R, 4) float32 targets in the image as it is looked at.
    """

    map: NDArray[np.float16]
    cells: tuple[Boxes, ...]
    labels: NDArray[np.int64]
    deltas: NDArray[np.float32]


def frozen_layer(features: SharedFeatures, first_layer: str) -> str:
    """Return the last layer that stays as it is when training starts at `first_layer`, or the network's own.

    Raises:
        ConfigError: `first_layer` is no map layer, a tap is read before it, or there are several scales.
    """
    network = features.backbone
    names = list(network.maps)
    first_layer = network.aliases.get(first_layer, first_layer) or network.trunk_from
    if network.layers[network.entry].n_prefix is not None:
        raise ConfigError(
            f"learn=trunk trains on maps of rows and columns, which {network.name} has not: it goes on with "
            f"tokens. Set learn=fc."
        )
    if first_layer not in names[1:]:
        raise ConfigError(
            f"trunk.first_layer must be a map layer of {network.name} after its first, got "
            f"{first_layer!r}. Choose one of {', '.join(names[1:])}."
        )
    layer = names[names.index(first_layer) - 1]
    early = [tap for tap in features.taps if tap.layer not in names[names.index(layer) :]]
    if early:
        raise ConfigError(
            f"learn=trunk reads map layers from {layer} on, got the tap {early[0]}. "
            f"Choose other features.taps, or another trunk.first_layer."
        )
    if len(features.longer_sides) > 1:
        raise ConfigError(
            f"learn=trunk reads images at one scale, got features.longer_sides={features.longer_sides}."
        )
    return layer


class FrozenMaps:
    """What the frozen blocks make of images and their mirror images, computed on demand, kept on disk.

    Args:
        features: the network, its taps, and the size of images.
        first_layer: the first layer that is trained; the maps are those of the layer before it.
        samples: the images.
        folder: of one file an image and side; a file appears by atomic rename.

    Raises:
        ConfigError: see `frozen_layer`.
    """

    def __init__(
        self, features: SharedFeatures, first_layer: str, samples: Sequence[Sample], folder: Path
    ) -> None:
        self._network, self._samples, self._device = features.backbone, samples, features.device
        self._taps = features.taps
        self.layer = frozen_layer(features, first_layer)
        self._side = features.longer_sides[0]
        identity = {
            "backbone": self._network.name,
            "weights": self._network.digest,
            "layer": self.layer,
            "side": self._side,
        }
        self._folder = Path(folder) / digest(identity)

    def size(self, image: int) -> tuple[int, int]:
        """Return (height, width) that an image is brought to."""
        height, width = self._samples[image].size
        scale = self._side / max(height, width)
        return max(round(height * scale), 1), max(round(width * scale), 1)

    def regions(self, view: View) -> Boxes:
        """Return (R, 4) a view's boxes in the resized, possibly mirrored, image."""
        (height, width), size = self._samples[view.image].size, self.size(view.image)
        boxes = view.boxes * np.array([size[1] / width, size[0] / height] * 2)
        return flip_horizontally(boxes, size[1]) if view.mirrored else boxes.astype(np.float32)

    def seen(self, view: View) -> Seen:
        """Return what training reads of a view."""
        regions, size = self.regions(view), self.size(view.image)
        layers = self._network.layers_on(size)
        return Seen(
            self.get(view.image, view.mirrored),
            tuple(layers[tap.layer].cells(seen_part(regions, tap.widen, size)) for tap in self._taps),
            view.labels,
            view.deltas * (MIRRORED_DELTAS if view.mirrored else 1),
        )

    def get(self, image: int, mirrored: bool) -> NDArray[np.float16]:
        """Return the (h, w, C) map of an image or its mirror image; one that is damaged is made again."""
        sample = self._samples[image]
        path = self._folder / f"{sample.digest()}{'-mirrored' if mirrored else ''}.npy"
        name = bytes_digest(self._folder.name.encode(), path.stem.encode())
        if note_use(path):
            try:
                if is_sealed(path, name):
                    stored: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
                    return stored
                say(f"{path}: damaged; the map is computed again.")
            except FileNotFoundError:
                pass  # another process made room since the line before
        resized, _ = resize(sample.read(), self._side / max(sample.size))
        source = mirror_image(resized) if mirrored else resized
        x = torch.from_numpy(self._network.normalise(source)[None]).permute(0, 3, 1, 2)
        with torch.inference_mode():
            value = self._network.run_maps(x.to(self._device), (self.layer,))[self.layer][0].cpu()
        computed = value.permute(1, 2, 0).numpy().astype(np.float16)
        with atomic_path(path, durable=False) as temporary:
            with open(temporary, "wb") as stream:
                np.save(stream, computed, allow_pickle=False)
            seal(temporary, name)
        return computed


class _TrunkModule(nn.Module):
    """The trained blocks, RoIAlign at the taps, and the fc layers.

    Args:
        backbone: whose blocks after `frozen` are trained; others are left out.
        taps: resolved.
        frozen: the last layer that stays, whose maps are read.
        fc: reads the taps of a region side by side.
    """

    def __init__(self, backbone: Backbone, taps: Sequence[TapSpec], frozen: str, fc: FcModule) -> None:
        super().__init__()
        names = list(backbone.maps)
        last = max(names.index(tap.layer) for tap in taps)
        self._names = names[names.index(frozen) + 1 : last + 1]
        # Names of layers may hold dots, those of modules not.
        self.blocks = nn.ModuleDict(OrderedDict((n.replace(".", "/"), backbone.maps[n]) for n in self._names))
        self.fc = fc
        self._taps, self._frozen = taps, frozen

    def forward(self, views: Sequence[Seen]) -> Tensor:
        """Return the (sum of R, ...) outputs of `FcModule`; the views have maps of one size."""
        device = next(self.parameters()).device
        if not views:  # another process has them all
            nothing: Tensor = self.fc(torch.zeros(0, len(self.fc.shift), device=device))
            return nothing
        stored = np.stack([view.map for view in views])
        x = torch.from_numpy(stored.astype(np.float32)).permute(0, 3, 1, 2).to(device)
        outputs = {self._frozen: x}
        for name, block in zip(self._names, self.blocks.values(), strict=True):
            x = block(x)
            outputs[name] = x
        rows = [
            torch.cat(
                [
                    self._pool(outputs[tap.layer][i], cells, tap).expand(len(view.labels), -1)
                    for cells, tap in zip(view.cells, self._taps, strict=True)
                ],
                dim=1,
            )
            for i, view in enumerate(views)
        ]
        result: Tensor = self.fc(torch.cat(rows))
        return result

    def _pool(self, value: Tensor, cells: Boxes, tap: TapSpec) -> Tensor:
        """Return (R, C * rows * columns) of one (C, h, w) map."""
        assert tap.grid is not None  # resolved
        channels, height, width = value.shape
        if tap.layer == self._frozen:  # nothing wants a gradient, and this is quicker
            rows = roi_align(np.ascontiguousarray(value.permute(1, 2, 0).cpu().numpy()), cells, tap.grid)
            return torch.from_numpy(rows).to(value.device)
        matrix = torch.from_numpy(roi_align_matrix(cells, (height, width), tap.grid)).to(value.device)
        pooled = matrix @ value.permute(1, 2, 0).reshape(height * width, channels)
        return pooled.view(len(cells), -1, channels).transpose(1, 2).reshape(len(cells), -1)


def train_on_maps(
    features: SharedFeatures,
    backbone: Backbone,
    fc: FcModule,
    maps: FrozenMaps,
    prepare: Callable[[int, int], Sequence[Sequence[View]]],
    config: TrunkConfig,
    *,
    seed: int,
    identity: str,
    checkpoint: Path | None,
    ranks: Ranks | None = None,
) -> tuple[Backbone, FcModule, list[Progress]]:
    """Train copies of a network's last blocks and of fc layers on its taps; the arguments are left alone.

    Args:
        features: names the taps, and the device where torch runs.
        backbone: where the blocks start from.
        fc: trained on the taps of `backbone`.
        maps: of the blocks that stay.
        prepare: (chunk number, steps in it) -> the views of each step; must depend on its arguments alone.
        config: the schedule.
        seed: of dropout.
        identity: of everything that the result depends on; a checkpoint of another identity is refused.
        checkpoint: file that is written between chunks and resumed from if it exists; None keeps nothing.
        ranks: the processes that train together; None for this one alone.

    Returns:
        The tuned network, the tuned layers, and one entry of progress a chunk.

    Raises:
        CacheError: the checkpoint is damaged or of another training.
        DataError: the loss became infinite.
    """
    net = copy.deepcopy(backbone.net).eval()
    tuned = Backbone(backbone.architecture, net, backbone.classes)
    module = _TrunkModule(tuned, features.taps, maps.layer, copy.deepcopy(fc))
    absorb_batch_norm(module.blocks)
    # Statistics stay those of pre-training: a step has too few images for its own.
    module.blocks.eval().requires_grad_(True)
    module.to(device=features.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.fc.train()
    for part in module.blocks.modules():
        if isinstance(part, nn.BatchNorm2d) and part.weight is not None:
            part.weight.requires_grad_(False)  # its scale is the convolution's
    trainer = Trainer(
        module,
        _loss,
        [
            *groups_of(module.blocks.parameters(), config.learning_rate, config.weight_decay),
            *groups_of(
                module.fc.parameters(), config.learning_rate * config.layers_rate, config.layers_decay
            ),
        ],
        cosine(config.n_steps, warm_up=config.warm_up),
        optimizer="adam",
        what="Tuning the trunk",
        remedy="Lower trunk.learning_rate.",
        split=functools.partial(_by_size, maps),
        ranks=ranks,
    )
    history = train_in_chunks(
        trainer,
        prepare,
        Checkpoints(checkpoint, identity, config.checkpoint_every),
        n_steps=config.n_steps,
        per_chunk=config.checkpoint_every,
        seed=seed,
        device=features.device,
    )
    net.requires_grad_(True).cpu()
    # A new object: its digest is that of the new weights.
    return Backbone(backbone.architecture, net, backbone.classes).eval(), module.fc, history


def _by_size(maps: FrozenMaps, views: Sequence[View], n: int) -> list[Part[list[Part[list[Seen]]]]]:
    """Group the views of a step by the size of their images, and share them out among processes.

    Each process has its part of every group, which may be nothing: dropout is drawn group by group.
    """
    groups: dict[tuple[int, int], list[View]] = {}
    for view in views:
        groups.setdefault(maps.size(view.image), []).append(view)
    n_whole = sum(len(view.labels) for view in views)
    parts: list[Part[list[Part[list[Seen]]]]] = []
    for own in shares(len(views), n):
        content, start = [], 0
        for group in groups.values():
            first, stop = max(own.start - start, 0), max(own.stop - start, 0)
            before, rows, whole = (
                sum(len(view.labels) for view in some) for some in (group[:first], group[first:stop], group)
            )
            content.append(Part([maps.seen(view) for view in group[first:stop]], rows, before, whole))
            start += len(group)
        parts.append(Part(content, sum(part.n for part in content), sum(part.n for part in parts), n_whole))
    return parts


def _loss(module: _TrunkModule, part: Part[list[Part[list[Seen]]]]) -> tuple[Tensor, int]:
    outputs = []
    for group in part.content:
        with group.drawing():
            outputs.append(module(group.content))
    result, seen = torch.cat(outputs), [view for group in part.content for view in group.content]
    labels, deltas = (np.concatenate(column) for column in list(zip(*seen, strict=True))[2:])
    return module.fc.loss(result, labels, deltas), module.fc.n_right(result, labels)


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
    ranks: Ranks | None = None,
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
        ranks: the processes that train together; None for this one alone.

    Returns:
        The tuned network, and the layers that read its taps.

    Raises:
        ConfigError: see `FrozenMaps`.
        DataError: there is no positive or no background region, or the loss became infinite.
        CacheError: a checkpoint is damaged.

    References:
        Girshick, Fast R-CNN, arXiv 1504.08083, section 2.3.
    """
    maps = FrozenMaps(features, config.first_layer, samples, folder / "maps")
    fc = train_fc_module(blocks, fc_config, seed, features.device, ranks)
    truths = (blocks.truth(i) for i in range(len(blocks)))
    index = RegionIndex(truths, fc_config.rule, len(blocks.classes), "tune_trunk")
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
        ranks=ranks,
    )
    return tuned, layers.to_layers()


class _Views:
    """Draws images, and regions from them, for the steps of a chunk."""

    def __init__(
        self,
        index: RegionIndex,
        boxes: Sequence[Boxes],
        fc_config: FcConfig,
        config: TrunkConfig,
        seed: int,
    ) -> None:
        self._index, self._boxes, self._config, self._seed = index, boxes, config, seed
        self._counts = split_batch(config.regions, fc_config.positive_share)

    def prepare(self, number: int, n_steps: int) -> list[list[View]]:
        """Return the views of a chunk's steps; they depend on the seed and the arguments alone."""
        rng = np.random.default_rng([self._seed, number])
        return [[self._view(rng) for _ in range(self._config.images)] for _ in range(n_steps)]

    def _view(self, rng: np.random.Generator) -> View:
        draw = self._index.draw_from_one_image(rng, *self._counts)
        image = int(draw.image[0])
        mirrored = bool(self._config.flip and rng.random() < 0.5)
        return View(image, mirrored, self._boxes[image][draw.row], draw.label, draw.delta)
