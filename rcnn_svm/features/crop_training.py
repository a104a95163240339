"""The training loop of a whole network on warped crops, as in R-CNN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.features.backbone import Backbone
from rcnn_svm.features.chunks import Checkpoints, Progress, train_in_chunks
from rcnn_svm.features.crop_config import FinetuneConfig

__all__ = ["Chunk", "n_steps_per_chunk", "train_on_crops"]

_CHUNK_BYTES = 1 << 28
"""Memory of a chunk's crops; there are two, the one trained on and the one being prepared."""


class Chunk(NamedTuple):
    """Crops of several steps.

    Attributes:
        crops: (S, B, H, W, 3) uint8.
        labels: (S, B) int64 in 0 .. K, K is background.
    """

    crops: NDArray[np.uint8]
    labels: NDArray[np.int64]


def n_steps_per_chunk(config: FinetuneConfig, crop_size: int) -> int:
    """Return how many steps a chunk has: limited by its memory and by the wish for checkpoints."""
    fitting = _CHUNK_BYTES // (config.batch_size * crop_size * crop_size * 3)
    return max(1, min(config.checkpoint_every, fitting))


def train_on_crops(
    backbone: Backbone,
    prepare: Callable[[int, int], Chunk],
    config: FinetuneConfig,
    *,
    seed: int,
    identity: str,
    checkpoint: Path | None,
    device: str,
) -> list[Progress]:
    """Train `backbone` in place.

    Args:
        backbone: its last layer has K + 1 outputs.
        prepare: (chunk number, steps in it) -> crops; must depend on its arguments alone.
        config: the schedule.
        seed: of dropout.
        identity: of everything that the result depends on; a checkpoint of another identity is refused.
        checkpoint: file that is written between chunks and resumed from if it exists; None keeps nothing.
        device: where torch runs.

    Returns:
        One entry a chunk.

    Raises:
        CacheError: the checkpoint is damaged or of another training.
        DataError: the loss became infinite.
    """
    backbone.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    _set_mode(backbone, config.first_layer)
    optimizer = _optimizer(backbone, config)
    history = train_in_chunks(
        backbone.net,
        optimizer,
        prepare,
        lambda chunk, start, bar: _train_chunk(backbone, optimizer, chunk, start, config, device, bar),
        Checkpoints(checkpoint, identity, config.checkpoint_every),
        n_steps=config.n_steps,
        per_chunk=n_steps_per_chunk(config, backbone.crop_size),
        seed=seed,
        device=device,
    )
    backbone.eval().requires_grad_(True)
    backbone.to("cpu")
    return history


def _train_chunk(
    backbone: Backbone,
    optimizer: torch.optim.Optimizer,
    chunk: Chunk,
    start: int,
    config: FinetuneConfig,
    device: str,
    bar: Any,
) -> Progress:
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in backbone.mean_std)
    kind = torch.device(device).type
    losses, hits = [], 0
    for s, (crops, labels) in enumerate(zip(*chunk, strict=True)):
        _set_rate(optimizer, config, start + s)
        pixels = torch.from_numpy(crops).to(device).permute(0, 3, 1, 2)  # channels-last
        x = pixels.float().sub_(mean).div_(std)
        target = torch.from_numpy(labels).to(device)
        # bfloat16 pays on GPUs only.
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            logits: Tensor = backbone(x, ("logits",))["logits"]
        loss = functional.cross_entropy(logits.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        hits += int((logits.argmax(1) == target).sum())
        if not np.isfinite(losses[-1]):
            raise DataError(
                f"Fine-tuning: the loss is no longer finite at step {start + s + 1}. Lower the learning rate."
            )
        next(bar, None)
    return Progress(start + len(losses), float(np.mean(losses)), hits / chunk.labels.size)


def _set_mode(backbone: Backbone, first_layer: str) -> None:
    """Dropout on; batch statistics stay those of pre-training, which crops of background would distort."""
    backbone.train().requires_grad_(True)
    for module in backbone.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    if not first_layer:
        return
    stages = {**backbone.maps, **backbone.regions}
    if first_layer not in stages:
        raise ConfigError(
            f"FinetuneConfig: first_layer must be a layer of {backbone.name}, got {first_layer!r}. "
            f"Its layers are {', '.join(stages)}."
        )
    for name, stage in stages.items():
        if name == first_layer:
            return
        stage.eval().requires_grad_(False)


def _optimizer(backbone: Backbone, config: FinetuneConfig) -> torch.optim.Optimizer:
    """Group parameters by their rate: the head learns faster, biases twice as fast and without decay."""
    head = {id(p) for p in backbone.regions["logits"].parameters()}
    groups = []
    for in_head in (False, True):
        for is_bias in (False, True):
            members = [
                p
                for p in backbone.net.parameters()
                if p.requires_grad and (id(p) in head) == in_head and (p.ndim == 1) == is_bias
            ]
            rate = config.learning_rate * (config.head_rate if in_head else 1) * (2 if is_bias else 1)
            decay = 0.0 if is_bias else config.weight_decay
            groups.append({"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay})
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adam":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.SGD(groups, momentum=config.momentum, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, config: FinetuneConfig, step: int) -> None:
    factor = 0.1 ** sum(step >= fraction * config.n_steps for fraction in config.decay_at)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
