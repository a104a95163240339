"""Proposals computed once: one file per image content and settings, whole or absent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rcnn_svm.boxes import Boxes, as_boxes
from rcnn_svm.cache import note_use
from rcnn_svm.engine import THREADS, Engine
from rcnn_svm.errors import CacheError, ConfigError, ShapeError
from rcnn_svm.files import atomic_path, digest, is_sealed, seal
from rcnn_svm.progress import say, track
from rcnn_svm.structures import Image, RegionSet, Sample

__all__ = [
    "CutProposer",
    "KeyedProposer",
    "Proposer",
    "cached_proposals",
    "iterate_proposals",
    "proposals_of",
    "regions_of",
]


class Proposer(Protocol):
    """Anything that knows where objects may be: `SelectiveSearchConfig`, `GridConfig`, or your own."""

    def propose(self, image: Image) -> RegionSet | Boxes:
        """Return the region proposals of an image, best first. Must be safe to call in several threads.

        Args:
            image: uint8 (H, W, 3) RGB.

        Returns:
            (R, 4) boxes inside the image, of positive area, or the same as a `RegionSet`.
        """
        ...


@runtime_checkable
class KeyedProposer(Proposer, Protocol):
    """A `Proposer` that says what its boxes depend on: they are kept on disk."""

    def key(self) -> dict[str, Any]:
        """Return all that the boxes of an image depend on, as JSON-able values."""
        ...


@runtime_checkable
class CutProposer(KeyedProposer, Protocol):
    """A `Proposer` that can cut a longer list to its best regions: the cache keeps the list, for any cut."""

    @property
    def max_regions(self) -> int | None:
        """How many regions are returned at most; None for all."""
        ...

    def whole(self) -> KeyedProposer:
        """Return the same without the cut, whose regions begin with those of this one."""
        ...


def cached_proposals(
    samples: Sequence[Sample],
    proposer: Proposer,
    folder: Path | None,
    *,
    n_jobs: int = 1,
    engine: Engine = THREADS,
) -> list[RegionSet]:
    """Return the regions of every sample, in the samples' order; see `iterate_proposals`."""
    return list(iterate_proposals(samples, proposer, folder, n_jobs=n_jobs, engine=engine))


def iterate_proposals(
    samples: Sequence[Sample],
    proposer: Proposer,
    folder: Path | None,
    *,
    n_jobs: int = 1,
    engine: Engine = THREADS,
) -> Iterator[RegionSet]:
    """Yield the regions of each sample in order, from the cache or computed and then cached.

    Work runs in `n_jobs` threads (a selective search releases the GIL and uses one core) that
    stay at most two images per thread ahead of the consumer, so that memory stays bounded.
    The result does not depend on `n_jobs`, nor on the engine. An interrupted run keeps what it finished.

    Args:
        samples: images; the cache goes by their content, so that a renamed file is known again.
        proposer: settings.
        folder: of the cache, made where missing; None computes without keeping.
        n_jobs: at least 1.
        engine: whose threads these are.

    Raises:
        ConfigError: `n_jobs` is below 1.
        DataError: an image cannot be read, or the folder cannot be written to.
    """
    if n_jobs < 1:
        raise ConfigError(f"proposals: n_jobs must be at least 1, got {n_jobs}.")
    work = partial(proposals_of, proposer=proposer, folder=folder)
    found = engine.in_order(work, samples, n_jobs)
    yield from track(found, "proposals", total=len(samples))


def proposals_of(sample: Sample, proposer: Proposer, folder: Path | None) -> RegionSet:
    """Return the regions of one sample, from the cache in `folder` or computed and then cached.

    A cache file that is damaged is computed again, with a line that says so. Where the proposer only cuts a
    list (`CutProposer`), the whole one is computed and cached; one without a `key` is asked anew each time.
    """
    if folder is None or not isinstance(proposer, KeyedProposer):
        return regions_of(proposer, sample.read(), sample.image_id)
    if isinstance(proposer, CutProposer) and proposer.max_regions is not None:
        return proposals_of(sample, proposer.whole(), folder).top(proposer.max_regions)
    name = digest({"image": sample.digest(), "proposer": proposer.key(), "sealed": True})
    path = folder / name[:2] / f"{name}.npz"
    if note_use(path):
        try:
            return _load(path, sample, name)
        except FileNotFoundError:
            pass  # another process made room since the line before
        except CacheError as error:
            say(f"{error} It is computed again.")
    regions = regions_of(proposer, sample.read(), sample.image_id)
    with atomic_path(path, durable=False) as temporary:
        with open(temporary, "wb") as stream:
            np.savez(stream, size=np.array(regions.size), boxes=regions.boxes, priority=regions.priority)
        seal(temporary, name)
    return regions


def regions_of(proposer: Proposer, image: Image, image_id: str) -> RegionSet:
    """Return the region proposals of an image as a record, whichever way the proposer gives them.

    Of boxes that are alike the first one stays.

    Raises:
        ShapeError: boxes that are no (R, 4), leave the image or have no area; the message names the proposer.
    """
    found = proposer.propose(image)
    if isinstance(found, RegionSet):
        return replace(found, image_id=image_id)
    where = f"{type(proposer).__name__}({image_id!r})"
    boxes = as_boxes(found, where=where)
    _, first = np.unique(boxes, axis=0, return_index=True)
    boxes = boxes[np.sort(first)]
    try:
        return RegionSet(image_id, image.shape[:2], boxes, np.arange(len(boxes), dtype=np.float32))
    except ShapeError as error:
        raise ShapeError(f"{where}: {str(error).partition(': ')[2]}") from error


def _load(path: Path, sample: Sample, name: str) -> RegionSet:
    try:
        if not is_sealed(path, name):
            raise CacheError(f"{path}: is damaged, or holds proposals of another image or other settings.")
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            height, width = (int(side) for side in stored["size"])
            regions = RegionSet(sample.image_id, (height, width), stored["boxes"], stored["priority"])
    except (FileNotFoundError, CacheError):
        raise
    except Exception as error:  # numpy and zipfile raise anything on damaged files
        raise CacheError(f"{path}: is no readable file of proposals ({error}).") from error
    if regions.size != sample.size:
        raise CacheError(f"{path}: must be of a {sample.size} image, got {regions.size}.")
    return regions
