"""Region features on disk: computed once, memory-mapped after, never all in memory.

One `.npy` file holds the features of one image's regions. Its name is a hash of everything
that the numbers depend on: the image's content, the boxes, and the featurizer's identity
(backbone, weights, taps, path, sizes) with the precision. Files appear by atomic rename, so
several processes may fill one store, a killed run loses only the image it was at, and a resumed
run ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes
from rcnn_svm.cache import note_use
from rcnn_svm.engine import THREADS, Engine
from rcnn_svm.errors import CacheError, ShapeError
from rcnn_svm.files import (
    SEAL_BYTES,
    atomic_path,
    bytes_digest,
    digest,
    is_sealed,
    require_free_space,
    seal,
    write_json,
)
from rcnn_svm.progress import say, track
from rcnn_svm.structures import Image, Sample
from rcnn_svm.threads import images_at_once

__all__ = [
    "DerivedStore",
    "Estimate",
    "FeatureStore",
    "Featurizer",
    "Precision",
    "RowReader",
    "Transform",
    "Wanted",
    "fill_together",
    "readers_of",
    "to_float32",
]

Precision = Literal["float16", "float32"]

RowReader: TypeAlias = Callable[[Boxes], NDArray[np.float32]]
"""(R, 4) boxes of one image -> (R, D) features."""


def to_float32(features: NDArray[Any]) -> NDArray[np.float32]:
    """Return rows in single precision; from half precision five times faster than numpy converts."""
    if features.dtype != np.float16:
        return np.asarray(features, np.float32)
    import torch

    converted: NDArray[np.float32] = torch.from_numpy(np.ascontiguousarray(features)).float().numpy()
    return converted


class Featurizer(Protocol):
    """Anything that turns regions of an image into one feature row each.

    One that has `reads_with` and `of_image_with` besides, as `SharedFeatures`, shares its pass over an image
    with others of the same network, see `readers_of`.
    """

    @property
    def key(self) -> Mapping[str, Any]:
        """JSON-able identity; equal keys promise equal features."""

    @property
    def n_features(self) -> int:
        """D, the length of a feature row."""

    def __call__(self, image: Image, boxes: Boxes) -> NDArray[np.float32]:
        """Return (R, D) float32 features of the R boxes."""

    def of_image(self, image: Image) -> RowReader:
        """Return the same for one image, which may be called again and computes once what regions share."""


def readers_of(featurizers: Sequence[Featurizer], image: Image) -> list[RowReader]:
    """Return what `of_image` of each does; the network of those that `reads_with` says runs once for all."""
    readers: dict[int, RowReader] = {}
    left = list(range(len(featurizers)))
    while left:
        first = featurizers[left[0]]
        shares: Callable[[Featurizer], bool] = getattr(first, "reads_with", lambda _: False)
        own = [left[0], *(i for i in left[1:] if shares(featurizers[i]))]
        others = [featurizers[i] for i in own[1:]]
        found = first.of_image_with(image, *others) if others else [first.of_image(image)]  # type: ignore[attr-defined]
        readers.update(zip(own, found, strict=True))
        left = [i for i in left if i not in own]
    return [readers[i] for i in range(len(featurizers))]


class Transform(Protocol):
    """Anything that turns feature rows into other feature rows, such as learned layers."""

    @property
    def key(self) -> Mapping[str, Any]:
        """JSON-able identity; equal keys promise equal results."""

    @property
    def n_features(self) -> int:
        """Length of a row after the transform."""

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the transformed rows, float32."""


class Estimate:
    """What filling a store will cost, measured on a few of its own images.

    Attributes:
        n_images: images that are not in the store yet.
        seconds: expected wall clock of the remaining work.
        n_bytes: exact size of the files to be written.
        peak_bytes: the largest single image's features, the only part held in memory at once.
    """

    def __init__(self, n_images: int, seconds: float, n_bytes: int, peak_bytes: int) -> None:
        self.n_images = n_images
        self.seconds = seconds
        self.n_bytes = n_bytes
        self.peak_bytes = peak_bytes

    def __str__(self) -> str:
        return (
            f"{self.n_images} images to do: about {self.seconds:.0f} s, {self.n_bytes / 1e6:.1f} MB on disk, "
            f"at most {self.peak_bytes / 1e6:.1f} MB of features in memory at a time"
        )


class FeatureStore:
    """Features of image regions under `folder`, filled on demand.

    Args:
        folder: where files go; created when the first one is written.
        featurizer: computes what is not there yet.
        precision: stored dtype. float16 halves the disk; its rounding (3 decimal digits) has not
            been seen to move AP.
        engine: fills it; on a cluster every machine must see the folder.
    """

    sent_once: ClassVar[bool] = True  # to the workers of a cluster, see `Engine`

    def __init__(
        self,
        folder: Path,
        featurizer: Featurizer,
        *,
        precision: Precision = "float16",
        engine: Engine = THREADS,
    ) -> None:
        self.featurizer, self.engine = featurizer, engine
        self._open(folder, featurizer.key, featurizer.n_features, precision)

    def _open(self, root: Path, key: Mapping[str, Any], n_features: int, precision: str) -> None:
        self._identity = {"featurizer": dict(key), "precision": precision, "sealed": True}
        self.root = Path(root)
        self.folder = self.root / digest(self._identity)
        self.n_features = n_features
        self.dtype = np.dtype(precision)

    def _compute(self, sample: Sample, boxes: Boxes) -> NDArray[np.float32]:
        return self.featurizer(sample.read(), boxes)

    def readers(self, sample: Sample, *others: Featurizer) -> list[RowReader]:
        """Return what computes the features of any boxes of an image, and other ones of it; none are kept.

        Args:
            sample: the image, which is read once.
            others: their network runs once with that of these features where it is the same.

        Raises:
            DataError: the image cannot be read.
        """
        return readers_of([self.featurizer, *others], sample.read())

    def path(self, sample: Sample, boxes: Boxes) -> Path:
        """Return where the features of these boxes of this image lie or will lie."""
        name = bytes_digest(sample.digest().encode(), np.ascontiguousarray(boxes, np.float32).tobytes())
        return self.folder / f"{name}.npy"

    def get(self, sample: Sample, boxes: Boxes) -> NDArray[Any]:
        """Return (R, D) features, memory-mapped; compute and keep them if absent.

        The mapping is private (copy on write): what is done to the array never reaches the file. Rows whose
        file another process removes at once, to make room, are returned as they were computed.

        Raises:
            DataError: the image cannot be read.
            DiskSpaceError: the disk is full.
        """
        path = self.path(sample, boxes)
        stored = self._read(path, len(boxes))
        if stored is not None:
            return stored
        computed = self._write(path, sample, boxes, self._compute(sample, boxes))
        stored = self._read(path, len(boxes))
        return computed if stored is None else stored

    def fill(self, samples: Sequence[Sample], boxes: Sequence[Boxes], what: str = "features") -> None:
        """Compute what is missing, see `fill_together`.

        Args:
            samples: the images.
            boxes: for each image the (R, 4) regions, in the order that `get` will be asked with.
            what: name of the progress bar.

        Raises:
            DiskSpaceError: refused before the work starts, or the disk filled up meanwhile.
        """
        fill_together([Wanted(self, samples, boxes)], what)

    def estimate(self, samples: Sequence[Sample], boxes: Sequence[Boxes], *, n_probes: int = 3) -> Estimate:
        """Time a few missing images without keeping them, and add up what all will take."""
        todo = [i for i, _ in self._missing(samples, boxes)]
        probes = todo[:: max(1, len(todo) // n_probes)][:n_probes]
        if probes:
            self._compute(samples[probes[0]], boxes[probes[0]])  # warm up
        started = time.perf_counter()
        for i in probes:
            self._compute(samples[i], boxes[i])
        spent = time.perf_counter() - started
        rows = sum(len(boxes[i]) for i in probes)
        seconds = spent * sum(len(boxes[i]) for i in todo) / rows if rows else 0.0
        sizes = [self._n_bytes(len(boxes[i])) for i in todo]
        peak = max((len(boxes[i]) * self.n_features * 4 for i in todo), default=0)
        return Estimate(len(todo), seconds, sum(sizes), peak)

    def _missing(self, samples: Sequence[Sample], boxes: Sequence[Boxes]) -> list[tuple[int, Path]]:
        if len(samples) != len(boxes):
            raise ShapeError(f"FeatureStore: {len(samples)} images but {len(boxes)} lists of boxes.")
        paths = [self.path(sample, regions) for sample, regions in zip(samples, boxes, strict=True)]
        return [(i, path) for i, path in enumerate(paths) if self._read(path, len(boxes[i])) is None]

    def _n_bytes(self, n_rows: int) -> int:
        return n_rows * self.n_features * self.dtype.itemsize + 128 + SEAL_BYTES

    def _read(self, path: Path, n_rows: int) -> NDArray[Any] | None:
        if not note_use(path):
            return None
        try:
            if is_sealed(path, self._seal_of(path)):
                # An empty array cannot be mapped; there is nothing to save on it either.
                stored: NDArray[Any] = np.load(path, mmap_mode="c" if n_rows else None, allow_pickle=False)
                if (stored.shape, stored.dtype) == ((n_rows, self.n_features), self.dtype):
                    return stored
        except FileNotFoundError:  # another process made room since the line before
            return None
        except (ValueError, OSError, EOFError) as error:
            say(f"{path}: damaged ({error}); its features are computed again.")
            return None
        say(f"{path}: damaged; its features are computed again.")
        return None

    def _write(self, path: Path, sample: Sample, boxes: Boxes, features: NDArray[np.float32]) -> NDArray[Any]:
        if features.shape != (len(boxes), self.n_features):
            raise ShapeError(
                f"FeatureStore: the featurizer must return {(len(boxes), self.n_features)}, "
                f"got {features.shape} for image {sample.image_id!r}."
            )
        stored = features.astype(self.dtype)
        if not np.isfinite(stored).all():
            raise CacheError(
                f"FeatureStore: image {sample.image_id!r} has features that are NaN, infinite or beyond "
                f"{self.dtype}. Check the weights, or store float32 (features.precision=float32)."
            )
        with atomic_path(path, durable=False) as temporary:
            with open(temporary, "wb") as stream:
                np.save(stream, stored, allow_pickle=False)
            seal(temporary, self._seal_of(path))
        return stored

    def _seal_of(self, path: Path) -> str:
        """Return what a file is: which regions of which image, by which featurizer."""
        return bytes_digest(self.folder.name.encode(), path.stem.encode())


class DerivedStore(FeatureStore):
    """Features that a transform makes of another store's, kept on disk in the same way.

    Args:
        base: the store that the transform reads; filled first where it lacks an image.
        transform: applied to one image's rows at a time.
    """

    def __init__(self, base: FeatureStore, transform: Transform) -> None:
        self.base, self.engine = base, base.engine
        self.transform = transform
        key = {"base": base._identity, "transform": dict(transform.key)}
        self._open(base.root, key, transform.n_features, base.dtype.name)

    def readers(self, sample: Sample, *others: Featurizer) -> list[RowReader]:
        """See `FeatureStore.readers`."""
        read, *further = self.base.readers(sample, *others)
        return [lambda boxes: self.transform(read(boxes)), *further]

    def _compute(self, sample: Sample, boxes: Boxes) -> NDArray[np.float32]:
        return self.transform(to_float32(self.base.get(sample, boxes)))


class Wanted(NamedTuple):
    """Rows that a store shall hold.

    Attributes:
        store: where they go.
        samples: the images.
        boxes: for each image the (R, 4) regions, in the order that `get` will be asked with.
    """

    store: FeatureStore
    samples: Sequence[Sample]
    boxes: Sequence[Boxes]


class _Missing(NamedTuple):
    """Rows of one image that are not there yet."""

    store: FeatureStore
    boxes: Boxes
    path: Path


def fill_together(wanted: Sequence[Wanted], what: str = "features") -> None:
    """Compute what is missing, several images at once where torch has several threads, or on a cluster.

    An image of which several stores want rows is read once, and its network runs once where it is theirs.

    Args:
        wanted: by which stores; the first one's engine does the work.
        what: name of the progress bar.

    Raises:
        DiskSpaceError: refused before the work starts, or the disk filled up meanwhile.
    """
    images: dict[str, tuple[Sample, list[_Missing]]] = {}
    for store, samples, boxes in wanted:
        todo = store._missing(samples, boxes)
        if not todo:
            continue
        require_free_space(store.folder, sum(store._n_bytes(len(boxes[i])) for i, _ in todo))
        write_json(store.folder / "identity.json", store._identity)
        for i, path in todo:
            _, missing = images.setdefault(samples[i].digest(), (samples[i], []))
            missing.append(_Missing(store, boxes[i], path))
    if images:
        made = wanted[0].store.engine.in_order(_fill_image, images.values(), images_at_once())
        for _ in track(made, what, total=len(images)):
            pass


def _fill_image(item: tuple[Sample, Sequence[_Missing]]) -> None:
    sample, missing = item
    if len(missing) == 1 or any(isinstance(one.store, DerivedStore) for one in missing):
        for store, boxes, path in missing:
            store._write(path, sample, boxes, store._compute(sample, boxes))
        return
    readers = readers_of([one.store.featurizer for one in missing], sample.read())
    for (store, boxes, path), read in zip(missing, readers, strict=True):
        store._write(path, sample, boxes, read(boxes))
