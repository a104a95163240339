"""The training loop of a network's last blocks together with fc6 and fc7, on maps of whole images.

The blocks before `first_layer` are frozen: what they make of an image and of its mirror image is computed
once and kept on disk, memory-mapped, so that a step costs the trained blocks only. RoIAlign is a matrix
product here, whose gradient autograd knows.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rcnn_svm.boxes import MIRRORED_DELTAS, Boxes, flip_horizontally
from rcnn_svm.cache import note_use
from rcnn_svm.errors import CacheError, ConfigError, DataError
from rcnn_svm.features.backbone import Backbone
from rcnn_svm.features.chunks import Checkpoints, Progress, train_in_chunks
from rcnn_svm.features.fc_training import FcModule
from rcnn_svm.features.featurizers import SharedFeatures, resize, seen_part
from rcnn_svm.features.fusing import absorb_batch_norm
from rcnn_svm.features.roi_pool import roi_align, roi_align_matrix
from rcnn_svm.features.taps import TapSpec
from rcnn_svm.features.trunk_config import TrunkConfig
from rcnn_svm.files import atomic_path, digest
from rcnn_svm.structures import Sample, mirror_image

__all__ = ["FrozenMaps", "View", "frozen_layer", "train_on_maps"]


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


def frozen_layer(features: SharedFeatures, first_layer: str) -> str:
    """Return the last layer that stays as it is when training starts at `first_layer`, or the network's own.

    Raises:
        ConfigError: `first_layer` is no map layer, a tap is read before it, or there are several scales.
    """
    network = features.backbone
    names = list(network.maps)
    first_layer = first_layer or network.trunk_from
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
        self._network, self._samples, self.device = features.backbone, samples, features.device
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

    def get(self, image: int, mirrored: bool) -> NDArray[np.float16]:
        """Return the (h, w, C) map of an image or its mirror image.

        Raises:
            CacheError: a stored file is damaged.
        """
        sample = self._samples[image]
        path = self._folder / f"{sample.digest()}{'-mirrored' if mirrored else ''}.npy"
        if note_use(path):
            try:
                stored: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
                return stored
            except FileNotFoundError:
                pass  # another process made room since the line before
            except (ValueError, OSError, EOFError) as error:
                raise CacheError(f"{path}: is damaged ({error}). Delete it and run again.") from error
        resized, _ = resize(sample.read(), self._side / max(sample.size))
        source = mirror_image(resized) if mirrored else resized
        x = torch.from_numpy(self._network.normalise(source)[None]).permute(0, 3, 1, 2)
        with torch.inference_mode():
            value = self._network.run_maps(x.to(self.device), (self.layer,))[self.layer][0].cpu()
        computed = value.permute(1, 2, 0).numpy().astype(np.float16)
        with atomic_path(path, durable=False) as temporary, open(temporary, "wb") as stream:
            np.save(stream, computed, allow_pickle=False)
        return computed


class _TrunkModule(nn.Module):
    """The trained blocks, RoIAlign at the taps, and the fc layers.

    Args:
        backbone: whose blocks after the layer of `maps` are trained; others are left out.
        taps: resolved.
        maps: of the frozen blocks.
        fc: reads the taps of a region side by side.
    """

    def __init__(self, backbone: Backbone, taps: Sequence[TapSpec], maps: FrozenMaps, fc: FcModule) -> None:
        super().__init__()
        names = list(backbone.maps)
        last = max(names.index(tap.layer) for tap in taps)
        self.blocks = nn.ModuleDict(
            OrderedDict((n, backbone.maps[n]) for n in names[names.index(maps.layer) + 1 : last + 1])
        )
        self.fc = fc
        self._layers_on, self._taps, self._maps = backbone.layers_on, taps, maps
        self._device = maps.device

    def forward(self, views: Sequence[View]) -> Tensor:
        """Return the (sum of R, ...) outputs of `FcModule`; the views have images of one size."""
        stored = np.stack([self._maps.get(view.image, view.mirrored) for view in views])
        x = torch.from_numpy(stored.astype(np.float32)).permute(0, 3, 1, 2).to(self._device)
        outputs = {self._maps.layer: x}
        for name, block in self.blocks.items():
            x = block(x)
            outputs[name] = x
        rows = [
            torch.cat([self._pool(outputs[tap.layer][i], view, tap) for tap in self._taps], dim=1)
            for i, view in enumerate(views)
        ]
        result: Tensor = self.fc(torch.cat(rows))
        return result

    def _pool(self, value: Tensor, view: View, tap: TapSpec) -> Tensor:
        """Return (R, C * rows * columns) of one (C, h, w) map."""
        assert tap.grid is not None  # resolved
        channels, height, width = value.shape
        regions = self._maps.regions(view)
        size = self._maps.size(view.image)
        seen = seen_part(regions, tap.widen, size)
        cells = self._layers_on(size)[tap.layer].cells(seen)
        if tap.layer == self._maps.layer:  # frozen: nothing wants a gradient, and this is quicker
            rows = roi_align(np.ascontiguousarray(value.permute(1, 2, 0).cpu().numpy()), cells, tap.grid)
            return torch.from_numpy(rows).to(self._device).expand(len(regions), -1)
        matrix = torch.from_numpy(roi_align_matrix(cells, (height, width), tap.grid)).to(self._device)
        pooled = matrix @ value.permute(1, 2, 0).reshape(height * width, channels)
        pooled = pooled.view(len(cells), -1, channels).transpose(1, 2).reshape(len(cells), -1)
        return pooled.expand(len(regions), -1)


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

    Returns:
        The tuned network, the tuned layers, and one entry of progress a chunk.

    Raises:
        CacheError: the checkpoint is damaged or of another training.
        DataError: the loss became infinite.
    """
    net = copy.deepcopy(backbone.net).eval()
    tuned = Backbone(backbone.name, net, backbone.classes)
    module = _TrunkModule(tuned, features.taps, maps, copy.deepcopy(fc))
    absorb_batch_norm(module.blocks)
    # Statistics stay those of pre-training: a step has too few images for its own.
    module.blocks.eval().requires_grad_(True)
    module.to(device=features.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.fc.train()
    for part in module.blocks.modules():
        if isinstance(part, nn.BatchNorm2d) and part.weight is not None:
            part.weight.requires_grad_(False)  # its scale is the convolution's
    optimizer = _optimizer(module, config)
    history = train_in_chunks(
        module,
        optimizer,
        prepare,
        lambda chunk, start, bar: _train_chunk(module, optimizer, chunk, start, config, bar),
        Checkpoints(checkpoint, identity, config.checkpoint_every),
        n_steps=config.n_steps,
        per_chunk=config.checkpoint_every,
        seed=seed,
        device=features.device,
    )
    net.requires_grad_(True).cpu()
    # A new object: its digest is that of the new weights.
    return Backbone(backbone.name, net, backbone.classes).eval(), module.fc, history


def _train_chunk(
    module: _TrunkModule,
    optimizer: torch.optim.Optimizer,
    chunk: Sequence[Sequence[View]],
    start: int,
    config: TrunkConfig,
    bar: Any,
) -> Progress:
    losses, hits, n_regions = [], 0, 0
    for s, views in enumerate(chunk):
        _set_rate(optimizer, config, start + s)
        by_size: dict[tuple[int, int], list[View]] = {}
        for view in views:
            by_size.setdefault(module._maps.size(view.image), []).append(view)
        ordered = [view for group in by_size.values() for view in group]
        labels = np.concatenate([view.labels for view in ordered])
        deltas = np.concatenate([view.deltas * (MIRRORED_DELTAS if view.mirrored else 1) for view in ordered])
        outputs = torch.cat([module(group) for group in by_size.values()])
        loss = module.fc.loss(outputs, labels, deltas)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise DataError(
                f"Tuning the trunk: the loss is no longer finite at step {start + s + 1}. "
                f"Lower trunk.learning_rate."
            )
        hits += module.fc.n_right(outputs, labels)
        n_regions += len(labels)
        next(bar, None)
    return Progress(start + len(losses), float(np.mean(losses)), hits / n_regions)


def _optimizer(module: _TrunkModule, config: TrunkConfig) -> torch.optim.Optimizer:
    groups = []
    for part, rate, weight_decay in (
        (module.blocks, config.learning_rate, config.weight_decay),
        (module.fc, config.learning_rate * config.layers_rate, config.layers_decay),
    ):
        trained = [p for p in part.parameters() if p.requires_grad]
        for is_bias, decay in ((False, weight_decay), (True, 0.0)):
            members = [p for p in trained if (p.ndim == 1) == is_bias]
            groups.append({"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def _set_rate(optimizer: torch.optim.Optimizer, config: TrunkConfig, step: int) -> None:
    rise = min(1.0, (step + 1) / max(1.0, config.warm_up * config.n_steps))
    factor = rise * 0.5 * (1 + math.cos(math.pi * step / config.n_steps))
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
