"""Training of a `BoxRefiner` on regions around objects."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss

from rcnn_svm.errors import DataError
from rcnn_svm.features.store import to_float32
from rcnn_svm.heads.base import RegionBlocks
from rcnn_svm.heads.refiner import BoxRefiner
from rcnn_svm.progress import track
from rcnn_svm.training.config import RefineConfig
from rcnn_svm.training.fc import TARGET_STD, statistics
from rcnn_svm.training.loop import Trainer, cosine, groups_of
from rcnn_svm.training.parallel import Part, Ranks

__all__ = ["train_refiner"]

_MAX_LOG_SCALE = 2.0
"""How far the logarithm of a side may move in a step of training."""


class _Rows:
    """The regions that a refiner learns from, all in memory.

    Attributes:
        features: (n, D), as stored.
        boxes: (n, 4); targets: (n, 4) the object of each.
        labels: (n,) its class.
        overlaps: (n,) the IoU with it.
    """

    def __init__(self, blocks: RegionBlocks, config: RefineConfig, rng: np.random.Generator) -> None:
        places, columns = [], []
        for i in range(len(blocks)):
            truth = blocks.truth(i)
            rows = np.flatnonzero((truth.best_iou >= config.overlap_from) & ~truth.difficult)
            places.append(np.stack([np.full(len(rows), i), rows], axis=1))
            columns.append((truth.boxes[rows], truth.target[rows], truth.label[rows], truth.best_iou[rows]))
        if not places or not any(map(len, places)):
            raise DataError(
                f"BoxRefiner: needs regions with IoU >= {config.overlap_from} to an object, got none in "
                f"{len(blocks)} images. Check the proposals."
            )
        place = np.concatenate(places)
        boxes, targets, labels, overlaps = map(np.concatenate, zip(*columns, strict=True))
        kept = _capped(labels, config.max_rows, rng)
        self.boxes, self.targets = boxes[kept], targets[kept]
        self.labels, self.overlaps = labels[kept], overlaps[kept]
        images, starts = np.unique(place[kept, 0], return_index=True)
        groups = np.split(place[kept, 1], starts[1:])
        self.features: NDArray[Any] = np.concatenate(
            [np.asarray(blocks.features(int(i), own)) for i, own in zip(images, groups, strict=True)]
        )


def _capped(labels: NDArray[np.int64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the indices of at most `n` regions, no class with more than its share while others have less."""
    kept = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    left, chosen = n, []
    for done, own in enumerate(sorted(kept, key=len)):
        share = left // (len(kept) - done)
        chosen.append(own if len(own) <= share else rng.choice(own, share, replace=False))
        left -= len(chosen[-1])
    return np.sort(np.concatenate(chosen))


class _Module(nn.Module):
    shift: Tensor
    factor: Tensor

    def __init__(self, rows: NDArray[np.float32], config: RefineConfig, n_classes: int) -> None:
        super().__init__()
        mean, inverse_std = statistics(rows)
        self.register_buffer("shift", torch.from_numpy(mean))
        self.register_buffer("factor", torch.from_numpy(inverse_std))
        self.hidden = nn.Linear(len(mean), config.hidden)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
        nn.init.zeros_(self.hidden.bias)
        # The last row serves all classes: what few objects of a class say is added to what all say.
        self.last = nn.Linear(config.hidden, 5 * (n_classes + 1))
        nn.init.normal_(self.last.weight, std=0.01)
        nn.init.zeros_(self.last.bias)
        self._dropout, self._n_classes = config.dropout, n_classes

    def forward(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (R, 4) deltas over `TARGET_STD`, and (R,) log-odds of the IoU."""
        x = functional.relu(self.hidden((rows - self.shift) * self.factor))
        x = self.last(functional.dropout(x, self._dropout, self.training)).view(-1, self._n_classes + 1, 5)
        own = x[torch.arange(len(x), device=x.device), labels] + x[:, -1]
        return own[:, :4], own[:, 4]

    def to_refiner(self) -> BoxRefiner:
        """Fold the standardisation into the hidden layer, and what serves all classes into each."""
        factor = self.factor.cpu().numpy().astype(np.float64)
        weight = self.hidden.weight.detach().cpu().numpy() * factor
        bias = self.hidden.bias.detach().cpu().numpy() - weight @ self.shift.cpu().numpy().astype(np.float64)
        last = self.last.weight.detach().cpu().numpy().reshape(self._n_classes + 1, 5, -1)
        last_bias = self.last.bias.detach().cpu().numpy().reshape(self._n_classes + 1, 5)
        unit = np.array([*TARGET_STD, 1.0], np.float32)
        return BoxRefiner(
            np.asarray(weight, np.float32),
            np.asarray(bias, np.float32),
            (last[:-1] + last[-1]) * unit[:, None],
            (last_bias[:-1] + last_bias[-1]) * unit,
        )


def train_refiner(
    blocks: RegionBlocks,
    config: RefineConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    ranks: Ranks | None = None,
) -> BoxRefiner:
    """Train on regions around objects: generalised IoU of the moved box, cross entropy of the IoU.

    Args:
        blocks: the regions, read once; at most `config.max_rows` of their rows are held in memory, in the
            precision that they are stored in.
        config: sizes and schedule.
        seed: of draws, initial weights and dropout.
        device: where torch runs.
        ranks: the processes that train together; None for this one alone.

    Raises:
        DataError: no region overlaps an object, or the training diverged.
        ClusterError: a process that trains with this one is lost.

    References:
        Rezatofighi et al., Generalized Intersection over Union, arXiv 1902.09630.
    """
    rng, n_classes = np.random.default_rng(seed), len(blocks.classes)
    rows, n_steps = _Rows(blocks, config, rng), config.steps(len(blocks.classes))
    good = rows.overlaps >= config.boxes_from
    by_class = [own for k in range(n_classes) if len(own := np.flatnonzero(good & (rows.labels == k)))]
    others = np.flatnonzero(~good)
    if not by_class:
        raise DataError(
            f"BoxRefiner: needs regions with IoU >= {config.boxes_from} to an object, got none in "
            f"{len(blocks)} images. Check the proposals."
        )
    n_others = config.batch_size // 4 if len(others) else 0
    n_good = config.batch_size - n_others
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sample = rng.choice(len(rows.labels), min(4096, len(rows.labels)), replace=False)
        module = _Module(to_float32(rows.features[np.sort(sample)]), config, n_classes).to(device)
        trainer = Trainer(
            module,
            functools.partial(_loss, n_good),
            groups_of(module.parameters(), config.learning_rate, config.weight_decay),
            cosine(n_steps),
            optimizer="adam",
            what="Training the box refiner",
            remedy="Lower refine.learning_rate.",
            ranks=ranks,
        )
        for step in track(range(n_steps), "box refiner", total=n_steps, unit="step"):
            classes = rng.integers(len(by_class), size=n_good)
            picked = np.array([by_class[k][rng.integers(len(by_class[k]))] for k in classes], np.int64)
            picked = np.concatenate([picked, others[rng.integers(max(len(others), 1), size=n_others)]])
            columns = (rows.labels, rows.overlaps, rows.boxes, rows.targets)
            batch = (to_float32(rows.features[picked]), *(column[picked] for column in columns))
            trainer.step(batch, step)
    trainer.require_finite(n_steps)
    return module.to_refiner()


def _loss(n_good: int, module: _Module, part: Part[tuple[NDArray[Any], ...]]) -> tuple[Tensor, int]:
    """Return the loss of a part of a batch whose first `n_good` rows, of the whole, are to be moved."""
    features, labels, overlaps, boxes, targets = (
        torch.from_numpy(column).to(module.shift.device) for column in part.content
    )
    with part.drawing():
        deltas, quality = module(features, labels)
    loss = functional.binary_cross_entropy_with_logits(quality, overlaps)
    own = max(n_good - part.first, 0)
    moved = generalized_box_iou_loss(_moved(boxes[:own], deltas[:own]), targets[:own], reduction="sum")
    return loss + moved / (n_good * part.n / part.n_whole), 0  # parts are weighed by all of their rows


def _moved(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Return what `boxes.decode_deltas` does, differentiable; the logarithms of sides move by 2 at most."""
    deltas = deltas * torch.tensor(TARGET_STD, device=deltas.device)
    side = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + deltas[:, :2] * side
    half = side / 2 * deltas[:, 2:].clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE).exp()
    return torch.cat([centre - half, centre + half], dim=1)
