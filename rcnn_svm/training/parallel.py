"""Training in several processes, each with a device of its own, as `torchrun` starts them.

The first process, rank 0, does the work; the others wait until it trains something. Then they get a copy of
the module, and for each step their rows of the batch and the state of the random numbers. torch's
`DistributedDataParallel` averages gradients, weighed by rows here, and each process draws the dropout of the
whole batch. So a step is that of a single process but for the order in which sums are rounded.

The others need no data set, no features and no cache: whatever they learn from is sent to them.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import cloudpickle  # type: ignore[import-untyped]
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from rcnn_svm.errors import ClusterError, ConfigError

__all__ = ["Loss", "Part", "Ranks", "Replica", "lead", "shares", "split_rows"]

B = TypeVar("B")
R = TypeVar("R")

_FOR_EVER = datetime.timedelta(days=365)
"""Others wait so long for the first process to train something; they notice at once when it has ended."""
_DROPOUTS = (functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)


class Part(NamedTuple, Generic[B]):
    """What one process has of a batch.

    Attributes:
        content: of its rows.
        n: its rows.
        first: rows of the whole batch before them.
        n_whole: rows of the whole batch.
    """

    content: B
    n: int
    first: int
    n_whole: int

    def drawing(self) -> contextlib.AbstractContextManager[object]:
        """Draw dropout as for the whole batch, inside a `with` block."""
        return contextlib.nullcontext() if self.n == self.n_whole else _WholeBatch(self)


Loss: TypeAlias = Callable[[Any, Part[Any]], tuple[Tensor, int]]
"""Module and part of a batch -> mean loss of its rows, and how many got the right class."""


def split_rows(arrays: Sequence[Any], n: int) -> list[Part[tuple[Any, ...]]]:
    """Return the parts of a batch that is some arrays of the same rows, for each of `n` processes."""
    n_rows = len(arrays[0])
    return [
        Part(tuple(array[own.start : own.stop] for array in arrays), len(own), own.start, n_rows)
        for own in shares(n_rows, n)
    ]


def shares(n_items: int, n: int) -> list[range]:
    """Return which of some items each of `n` processes gets, as evenly as can be.

    Raises:
        ConfigError: there are fewer items.
    """
    if n_items < n:
        raise ConfigError(
            f"A training step must have an item for each process, got {n_items} for {n}. Start fewer "
            f"processes, or give a step more regions or images."
        )
    return [range(n_items * rank // n, n_items * (rank + 1) // n) for rank in range(n)]


class _WholeBatch(TorchFunctionMode):
    """Draws for all rows of a batch, and gives those of a part their own."""

    def __init__(self, part: Part[Any]) -> None:
        super().__init__()
        self._part = part

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DROPOUTS:
            return self._dropped(func, *args, **(kwargs or {}))
        if func is torch.Tensor.bernoulli_:  # stochastic depth, in networks of libraries
            drawn = self._whole(args[0], torch.empty).bernoulli_(*args[1:], **(kwargs or {}))
            return args[0].copy_(self._own(drawn, args[0]))
        return func(*args, **(kwargs or {}))

    def _dropped(
        self, func: Any, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        return x * self._own(func(self._whole(x, torch.ones), p, True), x) if training and p else x

    def _whole(self, x: Tensor, make: Callable[..., Tensor]) -> Tensor:
        """Return a tensor as `x` would be for the whole batch, laid out alike: so drawing goes."""
        shape = (self._part.n_whole * self._each(x), *x.shape[1:])
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        return make(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=layout)

    def _own(self, whole: Tensor, x: Tensor) -> Tensor:
        start = self._part.first * self._each(x)
        return whole[start : start + len(x)]

    def _each(self, x: Tensor) -> int:
        """Return how many rows `x` has for one of the batch: several where a network looks at windows."""
        return len(x) // self._part.n if self._part.n else 1


class _Mean(nn.Module):
    """The loss as a module, as `DistributedDataParallel` wants it."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self._loss = module, loss

    def forward(self, part: Part[Any]) -> tuple[Tensor, int]:
        return self._loss(self.module, part)


class Replica:
    """What is trained, as one process has it.

    Args:
        module: on the device of this process.
        loss: of a part of a batch; a process elsewhere can be sent it.
        optimizer: of the module's parameters.
    """

    def __init__(self, module: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer
        self._mean: nn.Module = _Mean(module, loss)
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._others: _Others | None = None

    def join(self, others: _Others) -> None:
        """Average gradients with other processes from now on, which do the same at this moment."""
        self._mean = DistributedDataParallel(self._mean)
        self._others = others

    def step(self, part: Part[Any], factor: float) -> tuple[float, int]:
        """Follow the gradient of a batch's mean loss, unless that is not finite.

        Args:
            part: of the batch, that of this process.
            factor: of every learning rate.

        Returns:
            The mean loss of the whole batch, and how many of its rows got the right class.
        """
        loss, n_right = self._mean(part)
        value = loss.item()
        if self._others is not None:
            share = part.n / part.n_whole
            value, n_right = self._others.sum_up(value * share, n_right)
            loss = loss * (share * self._others.n)  # of gradients comes the mean
        if math.isfinite(value):
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        return value, n_right


class _Begin(NamedTuple):
    """What starts a training in the other processes."""

    replica: bytes


class _Step(NamedTuple):
    """What they do at each step."""

    part: Part[Any]
    factor: float
    random: Tensor


class _Others:
    """The way from a process to the others.

    Attributes:
        n: all processes.
        device: of this one.
    """

    def __init__(self, n: int, device: str) -> None:
        self.n, self.device = n, device
        # Words go over the CPU, where waiting costs nothing; gradients go as the device likes it.
        self._words: Any = distributed.new_group(backend="gloo", timeout=_FOR_EVER)

    def tell(self, messages: Sequence[Any] | None) -> Any:
        """Hand out a message to each process, from the first one, which gives them; return this one's."""
        own: list[Any] = [None]
        distributed.scatter_object_list(own, messages, src=0, group=self._words)
        return own[0]

    def sum_up(self, value: float, n: int) -> tuple[float, int]:
        """Return the sums over all processes."""
        sums = torch.tensor([value, n], dtype=torch.float64)
        distributed.all_reduce(sums, group=self._words)
        return float(sums[0]), int(sums[1])


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Tell in one sentence that another process is lost."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise ClusterError(
            "torchrun: another process of this training has ended. See what it said, and give the same "
            "command again: what is finished is kept."
        ) from error


class Ranks:
    """The processes that train together, as the first one sees them; `lead` makes it.

    Attributes:
        n: how many, this one included.
        device: where torch runs in this one.
    """

    def __init__(self, others: _Others) -> None:
        self.n, self.device = others.n, others.device
        self._others = others
        self._replica: Replica | None = None
        self._listening = True

    def step(self, replica: Replica, parts: Sequence[Part[Any]], factor: float) -> tuple[float, int]:
        """Take one step of a training in all processes, see `Replica.step`.

        Args:
            replica: of this process; another one than before starts another training.
            parts: of the batch, for each process.
            factor: of every learning rate.

        Raises:
            ClusterError: a process is lost.
        """
        self._listening = False
        with _watched():
            if replica is not self._replica:
                stream = io.BytesIO()
                torch.save(replica, stream, pickle_module=cloudpickle)
                self._others.tell([_Begin(stream.getvalue())] * self.n)
                replica.join(self._others)
                self._replica = replica
            random = _random_state(self.device)
            self._others.tell([_Step(part, factor, random) for part in parts])
            done = replica.step(parts[0], factor)
        self._listening = True
        return done

    def close(self) -> None:
        """Let the others end; those that are in the midst of a step find out that this one does."""
        if self._listening:
            with contextlib.suppress(ClusterError), _watched():  # nobody is needed any longer
                self._others.tell([None] * self.n)


def _random_state(device: str) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.startswith("cuda") else torch.get_rng_state()


def _follow(others: _Others) -> None:
    """Train with the first process whatever it trains, until it is done."""
    replica: Replica | None = None
    while (told := others.tell(None)) is not None:
        if isinstance(told, _Begin):
            # What is loaded was written by this package's first process.
            replica = torch.load(io.BytesIO(told.replica), map_location=others.device, weights_only=False)
            replica.join(others)
            continue
        assert replica is not None  # a training begins before its steps
        if others.device.startswith("cuda"):
            torch.cuda.set_rng_state(told.random, others.device)
        else:
            torch.set_rng_state(told.random)
        replica.step(told.part, told.factor)


def lead(work: Callable[[Ranks], R], device: str = "cpu") -> R | None:
    """Do work in the first of the processes that `torchrun` started; the others train with it meanwhile.

    Every process must call it. Gradients go over gloo on CPUs, over nccl between GPUs.

    Args:
        work: is called in the first process; what it trains with the given `Ranks` all train.
        device: where torch runs; `cuda` gives each process of a machine a GPU of its own.

    Returns:
        What the work returned; None in the others, once it is done.

    Raises:
        ConfigError: `torchrun` did not start this process, or there is no GPU for it.
        ClusterError: another process has ended before.
    """
    try:
        rank, n, here = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "lead: must be called in processes that torchrun started, got another one. Start them with "
            "`torchrun --nproc-per-node 2`."
        ) from error
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"lead: several processes train on CPUs or GPUs, got the device {device!r}.")
    if kind == "cuda":
        if here >= torch.cuda.device_count():
            raise ConfigError(
                f"lead: each process must have a GPU of its own, got {torch.cuda.device_count()} for process "
                f"{here + 1} of this machine. Start fewer."
            )
        device = f"cuda:{here}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        others = _Others(n, device)
        if rank:
            with _watched():
                _follow(others)
            return None
        ranks = Ranks(others)
        try:
            return work(ranks)
        finally:
            ranks.close()
    finally:
        distributed.destroy_process_group()
