"""Training in chunks of steps, with checkpoints between them.

A chunk's random numbers depend on the seed and the chunk alone, and checkpoints lie between chunks, so that a
resumed run ends with the same bytes as an undisturbed one. While one chunk is trained on, a thread prepares
what the next one needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rcnn_svm.cache import note_use
from rcnn_svm.errors import CacheError, DataError
from rcnn_svm.files import atomic_path
from rcnn_svm.progress import track

__all__ = ["Checkpoints", "Progress", "require_finite_weights", "train_in_chunks"]

T = TypeVar("T")


class Progress(NamedTuple):
    """How training went over one chunk.

    Attributes:
        step: steps done at its end.
        loss: mean loss.
        accuracy: share of regions of the right class.
    """

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often the state of a training is kept.

    Attributes:
        path: a file that is written between chunks and resumed from if it exists; None keeps nothing.
        identity: of everything that the result depends on; a checkpoint of another identity is refused.
        every: steps between checkpoints, at least.
    """

    path: Path | None
    identity: str
    every: int


def train_in_chunks(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    prepare: Callable[[int, int], T],
    train: Callable[[T, int, Any], Progress],
    checkpoints: Checkpoints,
    *,
    n_steps: int,
    per_chunk: int,
    seed: int,
    device: str = "cpu",
) -> list[Progress]:
    """Train `module` in place.

    Args:
        module: what is trained; its whole state is kept in checkpoints.
        optimizer: of its parameters.
        prepare: (chunk number, steps in it) -> what `train` gets; must depend on its arguments alone.
        train: (prepared chunk, first step, progress bar to be advanced once a step) -> its figures.
        checkpoints: where to keep the state.
        n_steps: steps in all.
        per_chunk: steps of a chunk.
        seed: of dropout.
        device: where torch runs.

    Returns:
        One entry a chunk.

    Raises:
        CacheError: the checkpoint is damaged or of another training.
        DataError: a chunk left a weight that is not finite, which is not kept.
    """
    path = checkpoints.path
    history: list[Progress] = []
    if path is not None and note_use(path):
        history = _resume(path, module, optimizer, checkpoints.identity, device)
    starts = list(range(0, n_steps, per_chunk))
    lengths = [min(per_chunk, n_steps - start) for start in starts]
    last_saved = history[-1].step if history else 0
    with ThreadPoolExecutor(1) as pool, torch.random.fork_rng():
        bar = track(range(last_saved, n_steps), "fine-tuning", unit="step")
        upcoming = pool.submit(prepare, len(history), lengths[len(history)]) if last_saved < n_steps else None
        for c in range(len(history), len(starts)):
            assert upcoming is not None
            chunk = upcoming.result()
            if c + 1 < len(starts):
                upcoming = pool.submit(prepare, c + 1, lengths[c + 1])
            torch.manual_seed(int(np.random.default_rng([seed, c]).integers(2**62)))
            history.append(train(chunk, starts[c], bar))
            done = history[-1].step
            require_finite_weights(module, "Fine-tuning", done)
            if path is not None and (done - last_saved >= checkpoints.every or done == n_steps):
                _save(path, module, optimizer, checkpoints.identity, history)
                last_saved = done
    return history


def require_finite_weights(module: nn.Module, where: str, step: int) -> None:
    """Check the weights after the last step, which the loss before it says nothing of.

    Raises:
        DataError: a parameter holds NaN or infinity.
    """
    if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
        raise DataError(
            f"{where}: the weights are no longer finite after step {step}. Lower the learning rate."
        )


def _save(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, identity: str, history: list[Progress]
) -> None:
    tensors = {f"net.{k}": v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{i}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    metadata = {"identity": identity, "history": json.dumps(history)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _resume(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, identity: str, device: str
) -> list[Progress]:
    try:
        with safe_open(path, framework="pt", device=device) as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except FileNotFoundError:  # another process made room in the cache that it lay in
        return []
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path}: is no readable checkpoint ({error}). Delete it to start anew.") from error
    if metadata.get("identity") != identity:
        raise CacheError(
            f"{path}: is the checkpoint of another training (other data, network or settings). "
            f"Delete it to start anew, or name another file."
        )
    module.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            like = parameters[int(i)]
            # Fused optimizers go through memory as it lies: moments must lie as their parameter does.
            laid = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
            state.setdefault(int(i), {})[key] = laid
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return [Progress(*entry) for entry in json.loads(metadata["history"])]
