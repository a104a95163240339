"""The training loop of `FcLayers`: softmax and box regression over mini-batches of stored features."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rcnn_svm.features.fc_layers import FcConfig, FcLayers
from rcnn_svm.features.products import linear
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.progress import track

__all__ = ["Batch", "train_on_batches"]

_TARGET_STD = (0.1, 0.1, 0.2, 0.2)
"""Box deltas are divided by these, so that the four weigh about alike (Fast R-CNN's released code)."""


class Batch(NamedTuple):
    """One step's regions.

    Attributes:
        features: (B, D) float16 or float32.
        labels: (B,) int64 in 0 .. K, K is background.
        deltas: (B, 4) float32 targets of the box regression; read for positives only.
    """

    features: NDArray[Any]
    labels: NDArray[np.int64]
    deltas: NDArray[np.float32]


def train_on_batches(batches: Iterator[Batch], config: FcConfig, n_classes: int, seed: int) -> FcLayers:
    """Train on `config.n_steps` batches.

    Args:
        batches: as many as there are steps; the statistics of the first ones standardise the features.
        config: sizes and schedule.
        n_classes: K.
        seed: of initial weights and dropout.
    """
    scale = FeatureScaler(config.scaling)
    probes = list(itertools.islice(batches, min(32, config.n_steps)))
    mean, inverse_std = _statistics(np.concatenate([scale(batch.features) for batch in probes]))
    sizes = [len(mean), *config.hidden]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        head = nn.Linear(config.hidden[-1], n_classes + 1 + 4 * n_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        optimizer = _optimizer([p for layer in (*layers, head) for p in layer.parameters()], config)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / config.n_steps))
        )
        std = torch.tensor(_TARGET_STD)
        shift, factor = torch.from_numpy(mean), torch.from_numpy(inverse_std)
        steps = itertools.chain(probes, batches)
        for batch in track(steps, "fc layers", total=config.n_steps, unit="step"):
            x = (torch.from_numpy(scale(batch.features)) - shift) * factor
            for layer in layers:
                x = functional.dropout(functional.relu(linear(x, layer)), config.dropout)
            outputs = linear(x, head)
            labels, targets = torch.from_numpy(batch.labels), torch.from_numpy(batch.deltas) / std
            loss = _loss(outputs, labels, targets, n_classes, config.box_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return _to_numpy(layers, head, mean, inverse_std, n_classes, config)


def _statistics(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and inverse deviation of every dimension; one that (almost) never varies is switched off."""
    mean = rows.mean(axis=0, dtype=np.float64)
    std = rows.std(axis=0, dtype=np.float64)
    floor = 1e-3 * float(np.sqrt(np.mean(std**2)))
    inverse = np.divide(1.0, std, out=np.zeros_like(std), where=std > floor)
    return mean.astype(np.float32), inverse.astype(np.float32)


def _optimizer(parameters: list[nn.Parameter], config: FcConfig) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def _loss(outputs: Tensor, labels: Tensor, targets: Tensor, n_classes: int, box_weight: float) -> Tensor:
    """Cross entropy plus the smooth L1 loss of the true class's deltas, both per region of the batch."""
    loss = functional.cross_entropy(outputs[:, : n_classes + 1], labels)
    positive = labels < n_classes
    if box_weight and bool(positive.any()):
        deltas = outputs[positive, n_classes + 1 :].view(-1, n_classes, 4)
        own = deltas[torch.arange(len(deltas)), labels[positive]]  # (P, 4)
        loss = loss + box_weight / len(labels) * functional.smooth_l1_loss(
            own, targets[positive], reduction="sum"
        )
    return loss


def _to_numpy(
    layers: list[nn.Linear],
    head: nn.Linear,
    mean: NDArray[np.float32],
    inverse_std: NDArray[np.float32],
    n_classes: int,
    config: FcConfig,
) -> FcLayers:
    """Fold the standardisation into the first layer and the targets' scale into the last."""
    weights = [layer.weight.detach().numpy().astype(np.float64) for layer in layers]
    biases = [layer.bias.detach().numpy().astype(np.float64) for layer in layers]
    weights[0] = weights[0] * inverse_std
    biases[0] = biases[0] - weights[0] @ mean.astype(np.float64)
    last, last_bias = head.weight.detach().numpy().T, head.bias.detach().numpy()
    std = np.tile(np.array(_TARGET_STD, np.float32), n_classes)

    def single(array: NDArray[np.floating]) -> NDArray[np.float32]:
        return np.ascontiguousarray(array, np.float32)

    return FcLayers(
        weights=tuple(map(single, weights)),
        biases=tuple(map(single, biases)),
        class_weight=single(last[:, : n_classes + 1]),
        class_bias=single(last_bias[: n_classes + 1]),
        box_weight=single(last[:, n_classes + 1 :] * std),
        box_bias=single(last_bias[n_classes + 1 :] * std),
        scaling=config.scaling,
    )
