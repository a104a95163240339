"""Fine-tuning of a whole network on warped region proposals, as in R-CNN."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rcnn_svm.boxes import Boxes
from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.features.warp import warp_crops
from rcnn_svm.files import bytes_digest, digest, write_json
from rcnn_svm.heads.assign import describe_regions
from rcnn_svm.networks.backbone import Backbone, with_new_outputs
from rcnn_svm.structures import Dataset
from rcnn_svm.training.config import FinetuneConfig
from rcnn_svm.training.draws import RegionIndex, split_batch
from rcnn_svm.training.loop import Checkpoints, Group, Progress, Trainer, decayed, groups_of, train_in_chunks
from rcnn_svm.training.parallel import Part, Ranks

__all__ = ["BACKGROUND", "Chunk", "FinetuneResult", "finetune", "n_steps_per_chunk", "train_on_crops"]

BACKGROUND = "background"
"""Name of the last output of a fine-tuned network."""

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
    ranks: Ranks | None = None,
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
        ranks: the processes that train together; None for this one alone.

    Returns:
        One entry a chunk.

    Raises:
        CacheError: the checkpoint is damaged or of another training.
        DataError: the loss became infinite.
    """
    backbone.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    _set_mode(backbone, config.first_layer)
    trainer = Trainer(
        backbone.net,
        functools.partial(_loss, backbone),
        _groups(backbone, config),
        decayed(config.n_steps, config.decay_at),
        optimizer=config.optimizer,
        momentum=config.momentum,
        what="Fine-tuning",
        remedy="Lower finetune.learning_rate.",
        ranks=ranks,
    )
    history = train_in_chunks(
        trainer,
        lambda number, n_steps: list(zip(*prepare(number, n_steps), strict=True)),
        Checkpoints(checkpoint, identity, config.checkpoint_every),
        n_steps=config.n_steps,
        per_chunk=n_steps_per_chunk(config, backbone.crop_size),
        seed=seed,
        device=device,
    )
    backbone.eval().requires_grad_(True)
    backbone.to("cpu")
    return history


def _loss(backbone: Backbone, net: nn.Module, part: Part[tuple[NDArray[Any], ...]]) -> tuple[Tensor, int]:
    crops, labels = part.content
    device = next(backbone.parameters()).device
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in backbone.mean_std)
    pixels = torch.from_numpy(crops).to(device).permute(0, 3, 1, 2)  # channels-last
    x = pixels.float().sub_(mean).div_(std)
    target = torch.from_numpy(labels).to(device)
    # bfloat16 pays on GPUs only.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"), part.drawing():
        logits: Tensor = backbone(x, ("logits",))["logits"]
    n_right = int((logits.argmax(1) == target).sum())
    return functional.cross_entropy(logits.float(), target), n_right


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


def _groups(backbone: Backbone, config: FinetuneConfig) -> list[Group]:
    """Group parameters by their rate: the head learns faster, biases twice as fast and without decay."""
    head = {id(p) for p in backbone.regions["logits"].parameters()}
    groups = []
    for in_head in (False, True):
        members = [p for p in backbone.net.parameters() if (id(p) in head) == in_head]
        rate = config.learning_rate * (config.head_rate if in_head else 1)
        groups += groups_of(members, rate, config.weight_decay, bias_rate=2.0)
    return groups


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
    ranks: Ranks | None = None,
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
        ranks: the processes that train together; None for this one alone.

    Raises:
        ShapeError: images and lists of regions differ in number.
        DataError: there is no positive or no background region, or the loss became infinite.
        CacheError: the checkpoint is damaged or belongs to another training.
        ClusterError: a process that trains with this one is lost.

    References:
        Girshick et al., arXiv 1311.2524v5, section 2.3; BVLC/caffe, window_data_layer.cpp.
    """
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
    where = f"finetune: {dataset.name} {dataset.split}"
    index = RegionIndex(described, config.rule, n_classes, where, config.positive_share)
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
        ranks=ranks,
    )
    done = type(tuned)(
        tuned.architecture, tuned.net, tuned.classes
    ).eval()  # its digest is that of the new weights
    return FinetuneResult(done, config, tuple(map(tuple, history)), time.perf_counter() - started)  # type: ignore[arg-type]


class _Crops:
    """Cuts the crops of a chunk of training steps, reading every image once a chunk."""

    def __init__(
        self,
        backbone: Backbone,
        dataset: Dataset,
        boxes: Sequence[Boxes],
        index: RegionIndex,
        config: FinetuneConfig,
        seed: int,
    ) -> None:
        self._size, self._padding, self._fill = backbone.crop_size, backbone.padding, backbone.mean_pixel
        self._samples, self._boxes, self._index = dataset.samples, boxes, index
        self._config, self._seed = config, seed

    def prepare(self, number: int, n_steps: int) -> Chunk:
        """Return the crops of a chunk; they depend on the seed and the arguments alone."""
        config = self._config
        rng = np.random.default_rng([self._seed, number])
        n_positive, n_background = split_batch(config.batch_size, config.positive_share)
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
