"""The training loop of a whole network on warped crops: steps, checkpoints, resume.

Work is cut into chunks of steps. A chunk's random numbers depend on the seed and the chunk alone, and
checkpoints lie between chunks, so that a resumed run ends with the same bytes as an undisturbed one. While
the network trains on one chunk, a thread prepares the crops of the next.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from rcnn_svm.errors import CacheError, ConfigError, DataError
from rcnn_svm.features.backbone import Backbone
from rcnn_svm.features.crop_config import FinetuneConfig
from rcnn_svm.files import atomic_path
from rcnn_svm.progress import track

__all__ = ["Chunk", "Progress", "n_steps_per_chunk", "train_on_crops"]

_CHUNK_BYTES = 1 << 28
"""Memory of a chunk's crops; there are two, the one trained on and the one being prepared."""


class Chunk(NamedTuple):
    """Crops of several steps.

    Attributes:
        crops: (S, B, H, W, 3) uint8.
        labels: (S, B) int64 in 0 .. K, K is background.
        mirrored: (S, B) bool.
    """

    crops: NDArray[np.uint8]
    labels: NDArray[np.int64]
    mirrored: NDArray[np.bool_]


class Progress(NamedTuple):
    """How training went over one chunk.

    Attributes:
        step: steps done at its end.
        loss: mean cross entropy.
        accuracy: share of regions of the right class.
    """

    step: int
    loss: float
    accuracy: float


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
    history: list[Progress] = []
    if checkpoint is not None and checkpoint.exists():
        history = _resume(checkpoint, backbone, optimizer, identity, device)
    per_chunk = n_steps_per_chunk(config, backbone.crop_size)
    starts = list(range(0, config.n_steps, per_chunk))
    lengths = [min(per_chunk, config.n_steps - start) for start in starts]
    last_saved = history[-1].step if history else 0
    with ThreadPoolExecutor(1) as pool, torch.random.fork_rng():
        bar = track(range(last_saved, config.n_steps), "fine-tuning", unit="step")
        upcoming = (
            pool.submit(prepare, len(history), lengths[len(history)]) if last_saved < config.n_steps else None
        )
        for c in range(len(history), len(starts)):
            assert upcoming is not None
            chunk = upcoming.result()
            if c + 1 < len(starts):
                upcoming = pool.submit(prepare, c + 1, lengths[c + 1])
            torch.manual_seed(int(np.random.default_rng([seed, c]).integers(2**62)))
            history.append(_train_chunk(backbone, optimizer, chunk, starts[c], config, device, bar))
            done = history[-1].step
            if checkpoint is not None and (
                done - last_saved >= config.checkpoint_every or done == config.n_steps
            ):
                _save(checkpoint, backbone, optimizer, identity, history)
                last_saved = done
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
    for s, (crops, labels, mirrored) in enumerate(zip(*chunk, strict=True)):
        _set_rate(optimizer, config, start + s)
        pixels = torch.from_numpy(crops).to(device).permute(0, 3, 1, 2)
        x = (pixels.float() - mean) / std
        flip = torch.from_numpy(mirrored).to(device).view(-1, 1, 1, 1)
        x = torch.where(flip, x.flip(3), x).contiguous(memory_format=torch.channels_last)
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
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, momentum=config.momentum)


def _set_rate(optimizer: torch.optim.Optimizer, config: FinetuneConfig, step: int) -> None:
    factor = 0.1 ** sum(step >= fraction * config.n_steps for fraction in config.decay_at)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _save(
    path: Path,
    backbone: Backbone,
    optimizer: torch.optim.Optimizer,
    identity: str,
    history: list[Progress],
) -> None:
    tensors = {f"net.{k}": v.detach().cpu().contiguous() for k, v in backbone.net.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{i}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    metadata = {"identity": identity, "history": json.dumps(history)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _resume(
    path: Path, backbone: Backbone, optimizer: torch.optim.Optimizer, identity: str, device: str
) -> list[Progress]:
    try:
        with safe_open(path, framework="pt", device=device) as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path}: is no readable checkpoint ({error}). Delete it to start anew.") from error
    if metadata.get("identity") != identity:
        raise CacheError(
            f"{path}: is the checkpoint of another training (other data, network or settings). "
            f"Delete it to start anew, or name another file."
        )
    backbone.net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return [Progress(*entry) for entry in json.loads(metadata["history"])]
