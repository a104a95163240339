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

from rcnn_svm.errors import DataError
from rcnn_svm.features.chunks import require_finite_weights
from rcnn_svm.features.fc_layers import FcConfig, FcLayers
from rcnn_svm.features.products import linear
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.progress import track

__all__ = ["Batch", "FcModule", "train_on_batches"]

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


class FcModule(nn.Module):
    """fc6 and fc7 with their softmax and box regression, as they are trained: rows are standardised first.

    Args:
        rows: (R, D) float32, a sample whose statistics standardise every dimension.
        config: sizes, dropout, scaling.
        n_classes: K, without the background.
    """

    shift: Tensor
    factor: Tensor

    def __init__(self, rows: NDArray[np.float32], config: FcConfig, n_classes: int) -> None:
        super().__init__()
        mean, inverse_std = _statistics(rows)
        self.register_buffer("shift", torch.from_numpy(mean))
        self.register_buffer("factor", torch.from_numpy(inverse_std))
        sizes = [len(mean), *config.hidden]
        self._layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.hidden = nn.ModuleList(self._layers)
        for layer in self._layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.last = nn.Linear(config.hidden[-1], n_classes + 1 + 4 * n_classes)
        nn.init.normal_(self.last.weight, std=0.01)
        nn.init.zeros_(self.last.bias)
        self._config, self._n_classes = config, n_classes

    def forward(self, rows: Tensor) -> Tensor:
        """Return (R, K + 1 + 4 K) logits, background last, and box deltas over `_TARGET_STD`."""
        x = (rows - self.shift) * self.factor
        for layer in self._layers:
            x = functional.dropout(functional.relu(linear(x, layer)), self._config.dropout, self.training)
        return linear(x, self.last)

    def loss(self, outputs: Tensor, labels: NDArray[np.int64], deltas: NDArray[np.float32]) -> Tensor:
        """Cross entropy plus the smooth L1 loss of the true class's deltas, both per region of the batch."""
        n_classes, device = self._n_classes, outputs.device
        target = torch.from_numpy(labels).to(device)
        loss = functional.cross_entropy(outputs[:, : n_classes + 1], target)
        positive = target < n_classes
        if self._config.box_weight and bool(positive.any()):
            predicted = outputs[positive, n_classes + 1 :].view(-1, n_classes, 4)
            own = predicted[torch.arange(len(predicted), device=device), target[positive]]  # (P, 4)
            wanted = torch.from_numpy(deltas).to(device)[positive] / torch.tensor(_TARGET_STD, device=device)
            distance = functional.smooth_l1_loss(own, wanted, reduction="sum")
            loss = loss + self._config.box_weight / len(target) * distance
        return loss

    def n_right(self, outputs: Tensor, labels: NDArray[np.int64]) -> int:
        """Return how many regions get their own class."""
        best = outputs[:, : self._n_classes + 1].argmax(dim=1).cpu().numpy()
        return int((best == labels).sum())

    def to_layers(self) -> FcLayers:
        """Fold the standardisation into the first layer and the targets' scale into the last."""
        weights = [layer.weight.detach().cpu().numpy().astype(np.float64) for layer in self._layers]
        biases = [layer.bias.detach().cpu().numpy().astype(np.float64) for layer in self._layers]
        weights[0] = weights[0] * self.factor.cpu().numpy()
        biases[0] = biases[0] - weights[0] @ self.shift.cpu().numpy().astype(np.float64)
        last = self.last.weight.detach().cpu().numpy().T
        last_bias = self.last.bias.detach().cpu().numpy()
        std = np.tile(np.array(_TARGET_STD, np.float32), self._n_classes)
        split = self._n_classes + 1

        def single(array: NDArray[np.floating]) -> NDArray[np.float32]:
            return np.ascontiguousarray(array, np.float32)

        return FcLayers(
            weights=tuple(map(single, weights)),
            biases=tuple(map(single, biases)),
            class_weight=single(last[:, :split]),
            class_bias=single(last_bias[:split]),
            box_weight=single(last[:, split:] * std),
            box_bias=single(last_bias[split:] * std),
            scaling=self._config.scaling,
        )


def train_on_batches(
    batches: Iterator[Batch], config: FcConfig, n_classes: int, seed: int, device: str = "cpu"
) -> FcModule:
    """Train on `config.steps` batches; the statistics of the first ones standardise the features.

    Args:
        batches: as many as there are steps.
        config: sizes and schedule.
        n_classes: K.
        seed: of initial weights and dropout.
        device: where torch runs; the result lies there.

    Raises:
        DataError: the loss or a weight became infinite.
    """
    scale, n_steps = FeatureScaler(config.scaling), config.steps(n_classes)
    probes = list(itertools.islice(batches, min(32, n_steps)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = np.concatenate([scale(batch.features) for batch in probes])
        module = FcModule(rows, config, n_classes).to(device)
        optimizer = _optimizer(list(module.parameters()), config)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / n_steps))
        )
        steps = itertools.chain(probes, batches)
        for step, batch in enumerate(track(steps, "fc layers", total=n_steps, unit="step"), 1):
            outputs = module(torch.from_numpy(scale(batch.features)).to(device))
            loss = module.loss(outputs, batch.labels, batch.deltas)
            if not math.isfinite(loss.item()):
                raise DataError(
                    f"Training fc layers: the loss is no longer finite at step {step}. "
                    f"Lower fc.learning_rate."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    require_finite_weights(module, "Training fc layers", n_steps)
    return module


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
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
