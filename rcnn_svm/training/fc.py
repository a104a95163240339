"""fc6 and fc7 of our own, trained on stored features with a softmax and box regression."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rcnn_svm.features.fc_layers import FcLayers
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.heads.base import RegionBlocks
from rcnn_svm.networks.products import linear
from rcnn_svm.progress import track
from rcnn_svm.training.config import FcConfig
from rcnn_svm.training.draws import RegionIndex, split_batch
from rcnn_svm.training.loop import Trainer, cosine, groups_of
from rcnn_svm.training.parallel import Part, Ranks

__all__ = [
    "TARGET_STD",
    "Batch",
    "FcModule",
    "statistics",
    "train_fc_layers",
    "train_fc_module",
    "train_on_batches",
]

_BUFFER_ROWS = 32_768
"""Feature rows that are shuffled together: bounds memory, whatever the number of images."""
_PASSES = 6
"""Visits to each image while training on stored features."""

TARGET_STD = (0.1, 0.1, 0.2, 0.2)
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
        config: sizes and dropout.
        n_classes: K, without the background.
        scaler: what has scaled the rows.
    """

    shift: Tensor
    factor: Tensor

    def __init__(
        self, rows: NDArray[np.float32], config: FcConfig, n_classes: int, scaler: FeatureScaler
    ) -> None:
        super().__init__()
        mean, inverse_std = statistics(rows)
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
        self._config, self._n_classes, self._scaler = config, n_classes, scaler

    def forward(self, rows: Tensor) -> Tensor:
        """Return (R, K + 1 + 4 K) logits, background last, and box deltas over `TARGET_STD`."""
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
            wanted = torch.from_numpy(deltas).to(device)[positive] / torch.tensor(TARGET_STD, device=device)
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
        std = np.tile(np.array(TARGET_STD, np.float32), self._n_classes)
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
            scaling=self._scaler.scaling,  # type: ignore[arg-type]  # of `FcConfig.scaler`
            n_scaled=self._scaler.n_columns,
        )


def _loss(module: FcModule, part: Part[tuple[NDArray[Any], ...]]) -> tuple[Tensor, int]:
    rows, labels, deltas = part.content
    with part.drawing():
        outputs = module(torch.from_numpy(rows).to(module.shift.device))
    return module.loss(outputs, labels, deltas), module.n_right(outputs, labels)


def train_on_batches(
    batches: Iterator[Batch],
    config: FcConfig,
    n_classes: int,
    seed: int,
    device: str = "cpu",
    ranks: Ranks | None = None,
    *,
    n_own: int | None = None,
) -> FcModule:
    """Train on `config.steps` batches; the statistics of the first ones standardise the features.

    Args:
        batches: as many as there are steps.
        config: sizes and schedule.
        n_classes: K.
        seed: of initial weights and dropout.
        device: where torch runs; the result lies there.
        ranks: the processes that train together; None for this one alone.
        n_own: see `train_fc_layers`.

    Raises:
        DataError: the loss or a weight became infinite.
    """
    scale, n_steps = config.scaler(n_own), config.steps(n_classes)
    probes = list(itertools.islice(batches, min(32, n_steps)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = np.concatenate([scale(batch.features) for batch in probes])
        module = FcModule(rows, config, n_classes, scale).to(device)
        trainer = Trainer(
            module,
            _loss,
            groups_of(module.parameters(), config.learning_rate, config.weight_decay),
            cosine(n_steps),
            optimizer=config.optimizer,
            what="Training fc layers",
            remedy="Lower fc.learning_rate.",
            ranks=ranks,
        )
        steps = itertools.chain(probes, batches)
        for step, batch in enumerate(track(steps, "fc layers", total=n_steps, unit="step")):
            trainer.step((scale(batch.features), batch.labels, batch.deltas), step)
    trainer.require_finite(n_steps)
    return module


def statistics(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and inverse deviation, (D,), of each dimension of (R, D) rows.

    One that (almost) never varies is switched off by an inverse deviation of 0.
    """
    mean = rows.mean(axis=0, dtype=np.float64)
    std = rows.std(axis=0, dtype=np.float64)
    floor = 1e-3 * float(np.sqrt(np.mean(std**2)))
    inverse = np.divide(1.0, std, out=np.zeros_like(std), where=std > floor)
    return mean.astype(np.float32), inverse.astype(np.float32)


def train_fc_layers(
    blocks: RegionBlocks,
    config: FcConfig | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    ranks: Ranks | None = None,
    n_own: int | None = None,
) -> FcLayers:
    """Train fc6 and fc7 of our own on stored features, with a softmax and class-specific box regression.

    Rows are read image by image and a bounded number is held at once, once more for every group of units.

    Args:
        blocks: the regions of the training images, ground-truth rows included.
        config: sizes, label rule and schedule.
        seed: of draws, initial weights and dropout.
        device: where torch runs.
        ranks: the processes that train together; None for this one alone.
        n_own: so many of the first columns say what is inside a region, the others what is around it; None
            where all do.

    Raises:
        DataError: there is no positive or no background region, or the training diverged.
        ClusterError: a process that trains with this one is lost.
    """
    config = config or FcConfig()
    # The first group's seed is the given one: one group alone is what there was without groups.
    seeds = [seed, *np.random.SeedSequence(seed).generate_state((config.groups or 1) - 1).tolist()]
    return FcLayers.averaged(
        [
            train_fc_module(blocks, config.of_group(), own, device, ranks, n_own=n_own).to_layers()
            for own in seeds
        ]
    )


def train_fc_module(
    blocks: RegionBlocks,
    config: FcConfig | None,
    seed: int,
    device: str,
    ranks: Ranks | None,
    *,
    n_own: int | None = None,
) -> FcModule:
    """Train as `train_fc_layers` does; return the module, which can be trained further."""
    config = config or FcConfig()
    truths = (blocks.truth(i) for i in range(len(blocks)))
    index = RegionIndex(truths, config.rule, len(blocks.classes), "train_fc_layers", config.positive_share)
    batches = _stored_batches(blocks, index, config, np.random.default_rng(seed))
    return train_on_batches(batches, config, len(blocks.classes), seed, device, ranks, n_own=n_own)


def _stored_batches(
    blocks: RegionBlocks, index: RegionIndex, config: FcConfig, rng: np.random.Generator
) -> Iterator[Batch]:
    """Yield batches of stored rows; each pass over the images draws its share of all batches at once."""
    n_positive, n_background = split_batch(config.batch_size, config.positive_share)
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
            n_batches = len(pools[0][1]) // n_positive
            if n_background:
                n_batches = min(n_batches, len(pools[1][1]) // n_background)
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
