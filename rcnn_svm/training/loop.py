"""One training loop for everything: parameter groups, schedule, checks, and checkpoints between chunks.

A `Trainer` takes single steps; `train_in_chunks` deals them out in chunks. A chunk's random numbers depend on
the seed and the chunk alone, and checkpoints lie between chunks, so that a resumed run ends with the same
bytes as an undisturbed one. While one chunk is trained on, a thread prepares what the next one needs.
Where several processes train together (`parallel`), a `Trainer` shares each step out among them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from rcnn_svm.cache import note_use
from rcnn_svm.errors import CacheError, DataError
from rcnn_svm.files import atomic_path
from rcnn_svm.progress import track
from rcnn_svm.training.parallel import Loss, Part, Ranks, Replica, split_rows

__all__ = [
    "Checkpoints",
    "Group",
    "Progress",
    "Schedule",
    "Trainer",
    "cosine",
    "decayed",
    "groups_of",
    "train_in_chunks",
]

_ABOUT = "training"
"""Key of what a checkpoint says about its training."""

Schedule: TypeAlias = Callable[[int], float]
"""Step, from 0 on -> the factor of every learning rate."""


def cosine(n_steps: int, *, warm_up: float = 0.0) -> Schedule:
    """Return a schedule that rises over a share `warm_up` of the steps, and falls to zero along a cosine."""

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(1.0, warm_up * n_steps))
        return rise * 0.5 * (1 + math.cos(math.pi * step / n_steps))

    return factor


def decayed(n_steps: int, at: Sequence[float]) -> Schedule:
    """Return a schedule that falls to a tenth at each of these shares of the steps."""
    return lambda step: float(0.1 ** sum(step >= share * n_steps for share in at))


class Group(NamedTuple):
    """Parameters that learn alike.

    Attributes:
        parameters: of the module.
        rate: learning rate, before the schedule.
        decay: weight decay.
    """

    parameters: list[nn.Parameter]
    rate: float
    decay: float


def groups_of(
    parameters: Iterable[nn.Parameter], rate: float, decay: float, *, bias_rate: float = 1.0
) -> list[Group]:
    """Return two groups: matrices, which decay, and vectors, which do not.

    Args:
        parameters: those that need no gradient are left out.
        rate: learning rate.
        decay: weight decay of matrices.
        bias_rate: how many times faster vectors learn.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices, vectors = ([p for p in trained if (p.ndim == 1) == flat] for flat in (False, True))
    return [Group(matrices, rate, decay), Group(vectors, rate * bias_rate, 0.0)]


class Trainer:
    """An optimizer with its schedule, which stops a training whose numbers are no longer finite.

    Args:
        module: what is trained.
        loss: of the module and a part of a batch.
        groups: its parameters; empty ones are left out.
        schedule: of the learning rates.
        optimizer: `adam` (with decoupled weight decay) or `sgd`.
        momentum: of `sgd`.
        what: the training, for messages.
        remedy: what to do where it diverges.
        split: a batch and a number of processes -> the part of each.
        ranks: the processes that train together; None for this one alone.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        groups: Iterable[Group],
        schedule: Schedule,
        *,
        optimizer: Literal["adam", "sgd"],
        momentum: float = 0.9,
        what: str,
        remedy: str,
        split: Callable[[Any, int], list[Part[Any]]] = split_rows,
        ranks: Ranks | None = None,
    ) -> None:
        self.module = module
        self._schedule, self._what, self._remedy = schedule, what, remedy
        self._split, self._ranks = split, ranks
        kept = [group for group in groups if group.parameters]
        named = [{"params": g.parameters, "lr": g.rate, "weight_decay": g.decay} for g in kept]
        self.optimizer: torch.optim.Optimizer
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(named, momentum=momentum, fused=True)
        else:
            self.optimizer = torch.optim.AdamW(named, fused=True)

        self._replica = Replica(module, loss, self.optimizer)

    def step(self, batch: Any, step: int) -> tuple[float, int, int]:
        """Follow the gradient of a batch's loss.

        Args:
            batch: of this step.
            step: steps before it.

        Returns:
            The loss, regions of the right class, and regions.

        Raises:
            ConfigError: the batch has no row for some process.
            DataError: the loss is not finite.
            ClusterError: a process that trains with this one is lost.
        """
        factor = self._schedule(step)
        if self._ranks is None:
            parts = self._split(batch, 1)
            value, n_right = self._replica.step(parts[0], factor)
        else:
            parts = self._split(batch, self._ranks.n)
            value, n_right = self._ranks.step(self._replica, parts, factor)
        if not math.isfinite(value):
            raise DataError(f"{self._what}: the loss is no longer finite at step {step + 1}. {self._remedy}")
        return value, n_right, parts[0].n_whole

    def require_finite(self, step: int) -> None:
        """Check the weights after the last of `step` steps, which the loss before it says nothing of.

        Raises:
            DataError: a parameter holds NaN or infinity.
        """
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.module.parameters()):
            raise DataError(
                f"{self._what}: the weights are no longer finite after step {step}. {self._remedy}"
            )


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
    trainer: Trainer,
    prepare: Callable[[int, int], Sequence[Any]],
    checkpoints: Checkpoints,
    *,
    n_steps: int,
    per_chunk: int,
    seed: int,
    device: str = "cpu",
) -> list[Progress]:
    """Train a module in place.

    Args:
        trainer: of the module, whose whole state is kept in checkpoints.
        prepare: (chunk number, steps in it) -> the batch of each step; must depend on its arguments alone.
        checkpoints: where to keep the state.
        n_steps: steps in all.
        per_chunk: steps of a chunk.
        seed: of dropout.
        device: where torch runs.

    Returns:
        One entry a chunk.

    Raises:
        CacheError: the checkpoint is damaged or of another training.
        DataError: the loss, or a weight that a chunk left, is not finite; it is not kept.
        ClusterError: a process that trains with this one is lost.
    """
    path = checkpoints.path
    history: list[Progress] = []
    if path is not None and note_use(path):
        history = _resume(path, trainer, checkpoints.identity, device)
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
            values: list[float] = []
            n_right = n_regions = 0
            for batch in chunk:
                value, right, regions = trainer.step(batch, starts[c] + len(values))
                values.append(value)
                n_right, n_regions = n_right + right, n_regions + regions
                next(bar, None)
            done = starts[c] + len(values)
            history.append(Progress(done, float(np.mean(values)), n_right / n_regions))
            trainer.require_finite(done)
            if path is not None and (done - last_saved >= checkpoints.every or done == n_steps):
                _save(path, trainer, checkpoints.identity, history)
                last_saved = done
    return history


def _save(path: Path, trainer: Trainer, identity: str, history: list[Progress]) -> None:
    module, optimizer = trainer.module, trainer.optimizer
    tensors = {f"net.{k}": v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{i}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    # One entry only: safetensors writes several in an order that differs from run to run.
    about = json.dumps({"identity": identity, "history": history})
    with atomic_path(path, apart=True) as temporary:
        save_file(tensors, temporary, metadata={_ABOUT: about})


def _resume(path: Path, trainer: Trainer, identity: str, device: str) -> list[Progress]:
    module, optimizer = trainer.module, trainer.optimizer
    try:
        with safe_open(path, framework="pt", device=device) as stream:
            about = json.loads((stream.metadata() or {}).get(_ABOUT, "{}"))
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        told = about.get("identity")
    except FileNotFoundError:  # another process made room in the cache that it lay in
        return []
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if told != identity:
        raise CacheError(
            f"{path}: is the checkpoint of another training (other data, network or settings). "
            f"Delete it to start anew, or name another file."
        )
    try:
        module.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                like = parameters[int(i)]
                if value.shape not in (like.shape, torch.Size()):
                    raise ValueError(f"{name} has shape {tuple(value.shape)}")
                # Fused optimizers go through memory as it lies: moments must lie as their parameter does.
                laid = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
                state.setdefault(int(i), {})[key] = laid
        if len({frozenset(kept) for kept in state.values()}) > 1:
            raise ValueError("it lacks a part of the optimizer's state")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        history = [Progress(*entry) for entry in about["history"]]
        if not all(map(math.isfinite, (number for entry in history for number in entry))):
            raise ValueError("its history is not finite")
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise _unreadable(path, error) from error
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise _unreadable(path, ValueError("it holds NaN or infinity"))
    return history


def _unreadable(path: Path, error: Exception) -> CacheError:
    return CacheError(f"{path}: is no readable checkpoint ({error}). Delete it to start anew.")
