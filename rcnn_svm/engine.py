"""Where work on images is done: in threads of this process, or by the workers of a Dask cluster.

Both are one protocol, `Engine`: a pure function is mapped over images, and what it returns comes back in the
images' order. A stage does not know which of the two it has, and its bytes are the same with both.

What is large goes through a folder that every machine sees, the *shared folder*: arrays and weights are
written there, their names travel. So a scheduler sees some hundred bytes of an image, whatever its size and
the network's. Files that outlive the map, such as features, are written by the worker where they belong.

A worker computes only where it has the same package, libraries and arithmetic as this process: it says so
with each call, so that one that joins late is asked as well. A call is tried again elsewhere where a worker
was killed, or ran out of memory or disk; one whose image is at fault ends the map, as it does in threads.

Importing this module imports the standard library only, and so does using `Threads`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import importlib
import io
import itertools
import logging
import os
import pickle
import shutil
import sys
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar

from rcnn_svm.errors import (
    ClusterError,
    ConfigError,
    DataError,
    DependencyError,
    RcnnSvmError,
)
from rcnn_svm.files import atomic_path, bytes_digest, digest
from rcnn_svm.progress import say
from rcnn_svm.threads import in_order, limit, share_of_each, take_share

__all__ = ["THREADS", "Cluster", "Engine", "Threads", "connect"]

T = TypeVar("T")
R = TypeVar("R")

_LARGE = 1024
"""Bytes from which on an array of an item or a result goes through the shared folder."""
_ALIGNED = 64
"""Bytes to whose multiples arrays are put."""
_MAPPED = 1 << 20
"""Bytes from which on an array is mapped into memory instead of being read."""
_AHEAD = 4
"""Calls that are under way for each thread of the workers: one that is late holds up none of the others for
long, and the scheduler knows of so many at a time."""
_CALL_S, _MOST_ITEMS = 0.5, 32
"""Seconds that a call should take: it gets several items where they are quick, and at most so many."""
_KEPT_WORKS = 8
"""Functions that a worker keeps between calls, with the weights in them."""
_WORKERS_TRIED = 2
"""Workers that fail with a call, for they cannot read or write, before that is taken for its own fault."""
_FIRST_WORKER_S, _NO_WORKER_S = 60.0, 300.0
"""Seconds that are waited for the first worker, and for another one where all have gone."""
_ANSWER_S = 15.0
"""Seconds that a scheduler has to answer."""
_LOOK_EVERY_S = 5.0
_MMAP_THRESHOLD, _TRIM_THRESHOLD = (-3, 32 << 20), (-1, 64 << 20)
"""glibc's names of two of its limits, and what it raises them to by itself where nobody sets one."""
_QUIET = {
    "distributed.worker.profile.enabled": False,  # looks at all frames a hundred times a second
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "2s",
}
"""How often Dask looks at itself, in clusters that we start."""


class Engine(Protocol):
    """Who maps work over images: `Threads`, or `Cluster`."""

    def in_order(self, work: Callable[[T], R], items: Iterable[T], n_threads: int) -> Generator[R]:
        """Yield `work(item)` of each item in their order; a bounded number of items is taken ahead.

        The first error ends it all. What is part of many items is sent to a cluster once if its class has
        `sent_once = True`; it must not change meanwhile.

        Args:
            work: a pure function, safe to call in several threads, which a process elsewhere can be sent. It
                may write files that are the same whoever writes them.
            items: taken one by one.
            n_threads: among how many threads of this process torch's are shared out; a cluster has threads of
                its own, and gives each what one of these would have, on which bytes may depend.
        """
        ...


class Threads:
    """The threads of this process."""

    def in_order(self, work: Callable[[T], R], items: Iterable[T], n_threads: int) -> Generator[R]:
        """See `Engine`."""
        return in_order(work, items, n_threads)


THREADS: Engine = Threads()


class _Call(NamedTuple):
    """What travels to a worker."""

    folder: str  # the shared one
    work: str  # name of the function's file there
    n_torch: int  # threads that torch has
    about: str  # digest of what the worker must be; empty where it is a child of the sender
    sender: str  # the process
    items: bytes = b""


class _Answer(NamedTuple):
    """What a worker returns."""

    kind: str  # `done`, `failed` (so it would elsewhere), `elsewhere` (perhaps not there), or `refused`
    worker: str
    content: Any  # the packed results, the error, or why
    files: tuple[str, ...] = ()  # of the results
    seconds: float = 0.0  # of an item


@dataclass(eq=False)
class _Sent:
    """Items under way."""

    items: Sequence[Any]
    files: tuple[str, ...]  # of theirs, in the shared folder
    future: Any
    workers: frozenset[str] | None  # that may do it; None for all
    without: frozenset[str]  # workers that failed on them


class Cluster:
    """The workers of a Dask cluster.

    Made by `connect`. Used as a context manager, or closed in the end: that removes what lies in the shared
    folder for it alone, and ends the cluster where `connect` started it.

    Args:
        client: a `distributed.Client`.
        shared: a folder that all machines see under this name; made where missing.
        owned: what is closed with it, last first, the client included where it is ours.
        own_children: workers are children of this process: same package, same libraries, same machine.

    Raises:
        ClusterError: there is no worker, one does not see the folder, or one would compute other bytes.
    """

    def __init__(
        self, client: Any, shared: Path, *, owned: Sequence[Any] = (), own_children: bool = False
    ) -> None:
        self._client, self._owned = client, owned
        self._address = str(client.scheduler.address)
        self._plane = _Plane(Path(shared).absolute() / "cluster" / uuid.uuid4().hex[:20])
        self._about: Mapping[str, str] = {}
        self._refused: set[str] = set()
        self._known, self._looked = dict[str, int](), -_LOOK_EVERY_S
        try:
            self._meet(own_children)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Threads, ()  # a worker that is sent one does its work itself

    def __repr__(self) -> str:
        return f"cluster {self._address}"

    def close(self) -> None:
        """Remove what lies in the shared folder for this cluster alone; end what was started for it."""
        self._plane.remove()
        for one in reversed(self._owned):
            with contextlib.suppress(*_lost()):
                one.close()

    def in_order(self, work: Callable[[T], R], items: Iterable[T], n_threads: int) -> Generator[R]:
        """See `Engine`.

        Raises:
            ClusterError: the scheduler is lost, or no worker is left.
            DataError: several workers were killed by the same image.
        """
        call = _Call(
            str(self._plane.folder),
            self._plane.keep(work),
            share_of_each(n_threads),
            _digest_of(self._about),
            _this_process(),
        )
        upcoming = iter(items)
        ahead: deque[_Sent] = deque()
        answers: list[_Answer] = []
        size = 1
        try:
            while True:
                room = _AHEAD * max(2, self._threads())
                while len(ahead) < room and (taken := list(itertools.islice(upcoming, size))):
                    ahead.append(self._submit(call, taken))
                for answer in answers:
                    yield from answer.content
                    size = max(1, min(_MOST_ITEMS, int(_CALL_S / max(answer.seconds, 1e-6))))
                if not ahead:
                    return
                self._wait(call, ahead)
                answers = self._take(call, ahead)
        finally:
            left = [sent.future for sent in ahead]
            if left and self._client.status == "running":
                with contextlib.suppress(*_lost()):
                    done = [one for one in left if one.status == "finished"]
                    for packed in self._client.gather(done, errors="skip"):
                        self._plane.forget(_Answer(*pickle.loads(packed)).files)
                    self._client.cancel(left, force=True)
            for sent in ahead:
                self._plane.forget(sent.files)

    def _submit(self, call: _Call, items: Sequence[Any], without: frozenset[str] = frozenset()) -> _Sent:
        """Send items to a worker, but for some that failed on them or are refused."""
        packed, files = self._plane.pack(items)
        payload, workers = pickle.dumps(tuple(call._replace(items=packed))), None
        if without | self._refused:
            workers = [worker for worker in self._workers() if worker not in without]
        if workers == []:
            raise ClusterError(f"{self}: no worker is left that can do the work.")
        with self._watched():
            future = self._client.submit(
                _at_worker, payload, pure=False, workers=workers, priority=1 if without else 0
            )
        return _Sent(items, files, future, None if workers is None else frozenset(workers), without)

    def _wait(self, call: _Call, ahead: deque[_Sent]) -> None:
        """Wait until the first call under way is done, and not for ever where there is nobody to do it."""
        left = _NO_WORKER_S
        while left > 0:
            with self._watched(), self._client.as_current():
                try:
                    _distributed().wait([ahead[0].future], timeout=_LOOK_EVERY_S)
                    return
                except TimeoutError:
                    first, known = ahead[0], self._workers(fresh=True)
                    left = _NO_WORKER_S if known else left - _LOOK_EVERY_S
                    gone = first.workers is not None and not first.workers & known.keys()
                    again = gone and bool(known.keys() - first.without)
                    if again:  # Dask would wait for them for ever
                        self._client.cancel([first.future], force=True)
            if again:
                self._plane.forget(first.files)
                ahead[0] = self._submit(call, first.items, first.without)
        raise ClusterError(
            f"{self}: had no worker for {_NO_WORKER_S:.0f} s. Start some, and give the same command again: "
            f"what is finished is kept."
        )

    def _take(self, call: _Call, ahead: deque[_Sent]) -> list[_Answer]:
        """Take those that are done off what is under way, from the first on, which is; return their results.

        It ends at the first one that is not done, or did not do its work.
        """
        ready = list(itertools.takewhile(lambda sent: sent.future.status == "finished", ahead))
        first = ahead[0]
        if not ready:
            if first.future.status == "error":
                self._failed(call, ahead)
            return []  # or its worker was killed right after: it is waited for once more
        with self._watched():
            packed = self._client.gather([sent.future for sent in ready])
        answers = []
        for sent, one in zip(ready, packed, strict=True):
            answer = _Answer(*pickle.loads(one))
            if answer.kind != "done":
                if sent is first:  # else those before it are taken before it
                    self._again(call, ahead, answer)
                break
            answers.append(answer._replace(content=self._plane.unpack(answer.content)))
            self._plane.forget((*sent.files, *answer.files))
            ahead.popleft()
        return answers

    def _again(self, call: _Call, ahead: deque[_Sent], answer: _Answer) -> None:
        """Let another worker do what one could not."""
        first = ahead[0]
        without = first.without
        if answer.kind == "refused":
            if answer.worker not in self._refused:
                say(f"Worker {answer.worker} {answer.content}. It gets no work.")
            self._refused.add(answer.worker)
            self._workers(fresh=True)  # perhaps one has come that can
        elif len(first.items) > 1:
            self._apart(call, ahead)
            return
        else:
            without = without | {answer.worker}
            tried = answer.kind == "failed" or len(without) >= _WORKERS_TRIED
            if tried or not self._has_others(without):
                raise answer.content
        self._plane.forget(first.files)
        ahead[0] = self._submit(call, first.items, without)

    def _apart(self, call: _Call, ahead: deque[_Sent]) -> None:
        """Send items one by one of which one is at fault."""
        first = ahead.popleft()
        self._plane.forget(first.files)
        ahead.extendleft(reversed([self._submit(call, [item]) for item in first.items]))

    def _failed(self, call: _Call, ahead: deque[_Sent]) -> None:
        """Raise what the first of those under way ended with."""
        first = ahead[0]
        with self._watched():
            error: BaseException = first.future.exception()
        if not isinstance(error, _distributed().KilledWorker):
            raise error
        if len(first.items) > 1:
            self._apart(call, ahead)
            return
        raise DataError(
            f"{_name(first.items[0])}: several workers were killed, each while it worked on this one. It may "
            f"need more memory than a worker has."
        )

    def _has_others(self, without: frozenset[str]) -> bool:
        """Whether there is another worker than these; one that starts again is waited for a bit."""
        until = time.monotonic() + _LOOK_EVERY_S
        while True:
            others = self._workers(fresh=True).keys() - without
            if others or time.monotonic() > until:
                return bool(others)
            time.sleep(0.2)

    def _threads(self) -> int:
        """Return how many threads the workers have, as of some seconds ago."""
        return sum(self._workers().values())

    def _workers(self, *, fresh: bool = False) -> Mapping[str, int]:
        """Return the threads of each worker that is not refused, as of some seconds ago or as of now."""
        now = time.monotonic()
        if fresh or now - self._looked >= _LOOK_EVERY_S:
            with self._watched():
                self._known, self._looked = dict(self._client.nthreads()), now
        return {worker: n for worker, n in self._known.items() if worker not in self._refused}

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Tell in one sentence that the scheduler is lost."""
        try:
            yield
        except Exception as error:
            if self._client.status == "running" and not isinstance(error, _lost()):
                raise
            raise ClusterError(
                f"{self}: its scheduler is lost ({type(error).__name__}). What is finished "
                f"is kept: give the same command again once there is one."
            ) from error

    def _meet(self, own_children: bool) -> None:
        """Wait for a worker, and ask all that are there what they are."""
        with self._watched():
            try:
                self._client.wait_for_workers(1, timeout=_FIRST_WORKER_S)
            except TimeoutError as error:
                raise ClusterError(
                    f"{self}: must have a worker, got none within {_FIRST_WORKER_S:.0f} s. Start some with "
                    f"`dask worker {self._address}`."
                ) from error
        self._about = {} if own_children else _about()
        mark = self._plane.folder / "mark"
        with atomic_path(mark, durable=False) as temporary:
            temporary.write_text(self._plane.folder.name, encoding="utf-8")
        with self._watched():
            told = self._client.run(_objection, str(mark), self._about, on_error="return")
        mark.unlink()
        for worker, objection in told.items():
            if isinstance(objection, BaseException):
                objection = f"cannot load rcnn_svm ({objection}). Install the same version there"
            if objection is not None:
                raise ClusterError(f"{self}: worker {worker} {objection}.")
        link = self._client.dashboard_link
        say(
            f"{self}: {len(told)} workers, {self._threads()} threads"
            f"{f', dashboard {link}' if link and not own_children else ''}"
        )


def connect(where: str | Any, shared: Path) -> Cluster:
    """Return the cluster that a text names, or that a client is of.

    Args:
        where: `local:N` starts N workers on this machine, each a process with one thread; else the address of
            a scheduler, such as `tcp://10.0.0.1:8786`, or its `--scheduler-file`, which ends in `.json`; or a
            `distributed.Client`, which stays open.
        shared: a folder that all machines see under this name. The cache is one.

    Raises:
        ConfigError: no such form of address, or a folder that is no folder of a file system.
        ClusterError: nobody answers there, or as `Cluster`.
        DependencyError: Dask is not installed.
    """
    if "://" in str(shared) or str(shared).partition("/")[0].endswith(":"):
        raise ConfigError(
            f"--cluster: what machines share must be a folder that is mounted on all, got {str(shared)!r}."
        )
    if not isinstance(where, str):
        return Cluster(where, shared)
    kind, _, rest = where.rpartition(":")
    n_workers = int(rest) if kind == "local" and rest.isdecimal() else 0
    is_file = where.endswith(".json")
    # A scheme is one of Dask's, a host may be an IPv6 address in brackets, a port is a number.
    if not n_workers and not is_file and (not kind or kind == "local" or not rest.isdecimal()):
        raise ConfigError(
            f"--cluster must be local:N, a scheduler's address such as tcp://10.0.0.1:8786, or its "
            f"scheduler file, which ends in .json, got {where!r}."
        )
    distributed = _distributed()
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # it speaks of what we tell in a sentence
    if n_workers:
        with importlib.import_module("dask.config").set(_QUIET):
            cluster = distributed.LocalCluster(
                n_workers=n_workers,
                threads_per_worker=1,
                memory_limit=0,
                # Any port that is free: of several clusters each needs its own.
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
            )
            client = distributed.Client(cluster)
        return Cluster(client, shared, owned=(cluster, client), own_children=True)
    try:
        if is_file:
            if not Path(where).is_file():
                raise ClusterError(f"{where}: no such scheduler file. Start `dask scheduler` with it first.")
            client = distributed.Client(scheduler_file=where, timeout=_ANSWER_S)
        else:
            client = distributed.Client(where, timeout=_ANSWER_S)
    except (OSError, ValueError, TimeoutError) as error:
        raise ClusterError(f"--cluster {where}: no scheduler answers there ({error}).") from error
    return Cluster(client, shared, owned=(client,))


class _Place(NamedTuple):
    """Where an array lies that is sent once."""

    name: str  # of the file
    start: int  # bytes before it
    dtype: Any
    length: int


class _Plane:
    """The folder through which arrays travel, and what they are in.

    A value becomes a pickle of some hundred bytes and a file of all large arrays in it: unpickled is only
    what came through Dask itself, or has the digest that did.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: set[str] = set()
        self._once: dict[int, tuple[Any, str]] = {}  # parts of items, by their ids

    def pack(self, value: Any) -> tuple[bytes, tuple[str, ...]]:
        """Return a value to be sent once, and the files that go with it."""
        name, arrays, end = f"{uuid.uuid4().hex}.bin", [], 0

        def write(array: Any) -> _Place:
            nonlocal end
            place = _Place(name, -end % _ALIGNED + end, array.dtype, len(array))
            arrays.append((place.start, array))
            end = place.start + array.nbytes
            return place

        packed = _dumped(value, _LARGE, write, self._keep_once)
        if not arrays:
            return packed, ()
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / name, "wb") as stream:  # nobody is told of it before it is whole
            for start, array in arrays:
                stream.seek(start)
                stream.write(array.view("u1").data)
        return packed, (name,)

    def unpack(self, packed: bytes) -> Any:
        """Return the value; its arrays are read, and do not need their file any longer."""

        @functools.cache
        def content(name: str) -> Any:
            import numpy as np

            path = self.folder / name
            if path.stat().st_size >= _MAPPED:
                return np.asarray(np.memmap(path, "u1", "c"))
            return np.fromfile(path, "u1")

        def read(place: _Place) -> Any:
            stop = place.start + place.length * place.dtype.itemsize
            return content(place.name)[place.start : stop].view(place.dtype)

        return _loaded(packed, read, lambda name: _work(self, name))

    def keep(self, value: Any) -> str:
        """Put a value there for all workers, until the end; return its name."""

        def write(array: Any) -> str:
            name = f"{hashlib.sha256(array.view('u1')).hexdigest()}.npy"
            if name not in self._kept:
                self._write(name, array)
                self._kept.add(name)
            return name

        packed = _dumped(value, _MAPPED, write, lambda thing: None)
        name = f"{hashlib.sha256(packed).hexdigest()}.pickle"
        if name not in self._kept:
            with atomic_path(self.folder / name, durable=False) as temporary:
                temporary.write_bytes(packed)
            self._kept.add(name)
        return name

    def kept(self, name: str) -> Any:
        """Return a value that `keep` put there.

        Raises:
            OSError: it is not there, or not what its name says.
        """

        def read(file: str) -> Any:
            array = self._read(file)
            if hashlib.sha256(array.view("u1")).hexdigest() != file.partition(".")[0]:
                raise OSError(f"{self.folder / file}: is damaged.")
            return array

        packed = (self.folder / name).read_bytes()
        if hashlib.sha256(packed).hexdigest() != name.partition(".")[0]:
            raise OSError(f"{self.folder / name}: is damaged.")
        return _loaded(packed, read, self.kept)

    def _keep_once(self, thing: Any) -> str | None:
        """Keep what says of itself that it is the same in many items; return its name."""
        if not getattr(type(thing), "sent_once", False):
            return None
        if id(thing) not in self._once:
            self._once[id(thing)] = thing, self.keep(thing)
        return self._once[id(thing)][1]

    def forget(self, files: Iterable[str]) -> None:
        """Remove files of what was sent once."""
        for name in files:
            (self.folder / name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another cluster's things lie there too
            self.folder.parent.rmdir()

    def _write(self, name: str, array: Any) -> None:
        import numpy as np

        with atomic_path(self.folder / name, durable=False) as temporary, open(temporary, "wb") as stream:
            np.save(stream, array, allow_pickle=False)

    def _read(self, name: str) -> Any:
        import numpy as np

        return np.asarray(np.load(self.folder / name, mmap_mode="c", allow_pickle=False))


def _dumped(value: Any, large: int, write: Callable[[Any], Any], keep: Callable[[Any], str | None]) -> bytes:
    """Pickle a value without its arrays of at least `large` bytes, which `write` writes.

    What `keep` names is left out as well.

    torch's tensors go by their storage, so that strides stay, on which its choice of kernels depends.
    Relative paths become absolute: elsewhere the working directory is another one.
    """
    import cloudpickle  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import numpy as np

    torch: Any = sys.modules.get("torch")

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc, unused-ignore]
        def persistent_id(self, thing: Any) -> tuple[Any, ...] | None:
            if isinstance(thing, np.ndarray):
                plain = thing.nbytes >= large and not thing.dtype.hasobject
                # What is neither way contiguous would be copied, and is a view of something that is sent.
                if plain and (thing.flags.c_contiguous or thing.flags.f_contiguous):
                    order: Literal["C", "F"] = "C" if thing.flags.c_contiguous else "F"
                    return "array", write(np.asarray(thing).ravel(order)), thing.shape, order
            elif torch is not None and isinstance(thing, torch.storage.TypedStorage):
                storage = thing._untyped_storage
                if storage.device.type == "cpu" and storage.nbytes() >= large:
                    flat = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
                    return "storage", write(flat), thing.dtype
            elif isinstance(thing, Path) and not thing.is_absolute():
                return "path", os.path.abspath(thing)
            elif (name := keep(thing)) is not None:
                return "kept", name
            return None

    stream = io.BytesIO()
    Pickler(stream, protocol=5).dump(value)
    return stream.getvalue()


def _loaded(packed: bytes, read: Callable[[Any], Any], kept: Callable[[str], Any]) -> Any:
    """Return what `_dumped` pickled; `read` and `kept` return what was left out by what stands for it."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, told: tuple[Any, ...]) -> Any:
            kind, name, *rest = told
            if kind == "path":
                return Path(name)
            if kind == "kept":
                return kept(name)
            array = read(name)
            if kind == "array":
                shape, order = rest
                return array.reshape(shape, order=order)
            import torch

            typed: Any = torch.storage.TypedStorage
            storage = torch.from_numpy(array).untyped_storage()
            return typed(wrap_storage=storage, dtype=rest[0], _internal=True)

    return Unpickler(io.BytesIO(packed)).load()


def _at_worker(payload: bytes) -> bytes:
    """Do one call in a worker; return an `_Answer`."""
    call = _Call(*pickle.loads(payload))
    here, plane = _distributed().get_worker().address, _Plane(Path(call.folder))
    if call.sender != _this_process():
        _limit_pools(call.n_torch)
        _keep_memory()
    answer: tuple[Any, ...]
    try:
        if call.about and call.about != _digest_of(_about()):
            answer = _Answer("refused", here, "joined, and is not as those that were there")
        else:
            work, items = _work(plane, call.work), plane.unpack(call.items)
            take_share(call.n_torch)
            started = time.perf_counter()
            packed, files = plane.pack([work(item) for item in items])
            answer = _Answer("done", here, packed, files, (time.perf_counter() - started) / len(items))
    except (DataError, OSError, MemoryError) as error:
        answer = _Answer("elsewhere", here, error)
    except RcnnSvmError as error:
        answer = _Answer("failed", here, error)
    return pickle.dumps(tuple(answer))


@functools.cache
def _limit_pools(n: int) -> None:
    """Give every pool of a worker's process no more threads than one of ours has.

    Args:
        n: threads; that a worker was given so many already is remembered.
    """
    limit(n, asked=True)


@functools.cache
def _keep_memory() -> None:
    """Let glibc keep freed memory for the next image, as it does by itself.

    Dask starts workers so that it goes back to the system at once, and every image would have its pages
    fetched anew: ten thousand of them in a selective search.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is not None and "MALLOC_TRIM_THRESHOLD_" in os.environ:
        for limit_of in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            change(*limit_of)


_works: OrderedDict[tuple[Path, str], Any] = OrderedDict()
_works_lock = threading.RLock()


def _work(plane: _Plane, name: str) -> Any:
    """Return a function that the sender put into the shared folder; its weights are read once a worker."""
    key = (plane.folder, name)
    with _works_lock:
        if key not in _works:
            try:
                _works[key] = plane.kept(name)
            except (ImportError, AttributeError) as error:
                raise ClusterError(
                    f"cluster: a worker cannot load what it is sent ({error}). Put your own parts into a "
                    f"module that all workers can import."
                ) from error
        _works.move_to_end(key)
        while len(_works) > _KEPT_WORKS:
            _works.popitem(last=False)
        return _works[key]


def _objection(mark: str, about: Mapping[str, str]) -> str | None:
    """Say, in a worker, why it must not be given work; None where it may."""
    path = Path(mark)
    try:
        seen = path.read_text(encoding="utf-8") == path.parent.name
    except OSError:
        seen = False
    if not seen:
        return f"does not see the folder {path.parent.parent.parent}. Name one with --cache that all share"
    own = _about() if about else {}
    for name, version in about.items():
        if own[name] != version:
            return f"has {name} {own[name]}, here it is {version}: bytes could differ. Install the same there"
    return None


@functools.cache
def _about() -> Mapping[str, str]:
    """Return all that the bytes of a result hang on beside its input, by name."""
    import importlib.metadata

    import cv2
    import numpy as np
    import PIL
    import scipy  # type: ignore[import-untyped, unused-ignore]
    import torch
    import torchvision

    sources, package = hashlib.sha256(), Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        sources.update(str(path.relative_to(package)).encode() + path.read_bytes())
    modules = (np, scipy, torch, torchvision, cv2, PIL)
    # As built: which libraries are loaded by now differs from process to process.
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[call-overload, unused-ignore]
    return {
        "rcnn-svm": f"{importlib.metadata.version('rcnn-svm')} ({sources.hexdigest()[:8]})",
        "python": ".".join(map(str, sys.version_info[:2])),
        **{module.__name__: str(module.__version__) for module in modules},
        "numba": importlib.metadata.version("numba"),  # which `compiled` alone imports
        "BLAS": f"{blas.get('name')} {blas.get('version')}",
        "arithmetic": _arithmetic(),
    }


def _arithmetic() -> str:
    """Return a digest of what this machine makes of some products, on which two machines may differ."""
    import cv2
    import numpy as np
    import torch
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((256, 384)).astype(np.float32) for _ in range(2))
    image = torch.from_numpy(rng.standard_normal((1, 32, 48, 64)).astype(np.float32))
    kernels = torch.from_numpy(rng.standard_normal((64, 32, 3, 3)).astype(np.float32))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), threadpool_limits(limits=1):
            results = [
                a @ b.T,
                torch.nn.functional.linear(torch.from_numpy(a), torch.from_numpy(b)).numpy(),
                torch.nn.functional.conv2d(image, kernels).numpy(),
                torch.nn.functional.conv2d(image.to(memory_format=torch.channels_last), kernels).numpy(),
                cv2.resize(a, (100, 70), interpolation=cv2.INTER_AREA),
                np.exp(a),
            ]
    finally:
        torch.set_num_threads(n_threads)
    return bytes_digest(*(np.ascontiguousarray(one).tobytes() for one in results))[:8]


def _digest_of(about: Mapping[str, str]) -> str:
    return digest(dict(about)) if about else ""


def _this_process() -> str:
    return f"{os.uname().nodename}:{os.getpid()}"


def _name(item: Any) -> str:
    """Return the image that an item is of, for messages."""
    parts = item if isinstance(item, tuple) else (item,)
    return next((str(part.image_id) for part in parts if hasattr(part, "image_id")), "an image")


def _distributed() -> Any:
    """Return Dask's module, without types: mypy judges the same whether it is installed or not."""
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise DependencyError(
            "--cluster needs Dask, which is not installed. Install it with `pip install 'rcnn-svm[cluster]'`."
        ) from error


def _lost() -> tuple[type[Exception], ...]:
    """Return what Dask raises where nobody is at the other end."""
    return OSError, concurrent.futures.CancelledError, _distributed().client.ClosedClientError
