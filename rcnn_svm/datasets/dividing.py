"""Train, val and test out of one set of images: by groups, by classes, copies on one side."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.datasets.duplicates import Duplicate, find_duplicates
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.files import read_text
from rcnn_svm.structures import Dataset

__all__ = ["PARTS", "Division", "divide_dataset", "groups_by_pattern", "groups_in_table", "stratified"]

PARTS = ("train", "val", "test")
"""What images are divided into."""


@dataclass(frozen=True, eq=False)
class Division:
    """Images, divided.

    Attributes:
        parts: by name, those of `PARTS` that have a share.
        groups: name of the group of each image id; an image without one is a group of its own.
        duplicates: pairs of positions in the whole that were kept on one side.
    """

    parts: Mapping[str, Dataset]
    groups: Mapping[str, str]
    duplicates: Sequence[Duplicate]

    def lines(self) -> list[str]:
        """Say how many images each part has, and how many of them show each class."""
        lines = []
        for name, part in self.parts.items():
            shown = Counter(k for sample in part for k in set(sample.truth.labels.tolist()))
            each = ", ".join(f"{part.classes[k]} {shown[k]}" for k in range(len(part.classes)))
            lines.append(f"{name}: {len(part)} images, with {each}")
        return lines

    def table(self) -> str:
        """Return a CSV of all images: id, file, part and group."""
        stream = io.StringIO(newline="")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "file", "split", "group"])
        for name, part in self.parts.items():
            for one in part:
                writer.writerow([one.image_id, one.path or "", name, self.groups.get(one.image_id, "")])
        return stream.getvalue()


def groups_by_pattern(dataset: Dataset, pattern: str) -> dict[str, str]:
    """Return the group of each image: what a regular expression finds in its id.

    Args:
        dataset: the images.
        pattern: searched for in the id; its first group is the name where it has one, else the whole match.
            An image without a match is a group of its own.

    Raises:
        ConfigError: no regular expression, or one that no image matches.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--group-by must be a regular expression, got {pattern!r} ({error}).") from error
    found = {sample.image_id: compiled.search(sample.image_id) for sample in dataset}
    groups = {
        name: match.group(1 if compiled.groups else 0) or ""
        for name, match in found.items()
        if match is not None
    }
    if not groups:
        example = dataset.samples[0].image_id
        raise ConfigError(
            f"--group-by must match the ids of some images, {pattern!r} matches none, such as {example!r}."
        )
    return groups


def groups_in_table(dataset: Dataset, file: Path, column: str) -> dict[str, str]:
    """Return the group of each image as a CSV names it.

    Args:
        dataset: the images.
        file: its first line names its columns: `image`, the id or file name of an image, and `column`.
        column: of the groups.

    Raises:
        DataError: the file cannot be read, lacks a column, or does not name some image.
    """
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""))
    columns = reader.fieldnames or []
    if missing := [name for name in ("image", column) if name not in columns]:
        raise DataError(
            f"{file}: must have the columns image and {column}, lacks {' and '.join(missing)}, has "
            f"{', '.join(columns) or 'none'}."
        )
    table = {row["image"]: row[column] for row in reader}
    groups = {}
    for sample in dataset:
        names = [sample.image_id, sample.path.name if sample.path is not None else sample.image_id]
        known = [table[name] for name in names if name in table]
        if not known or known[0] is None:
            raise DataError(f"{file}: must name the group of every image, lacks {sample.image_id}.")
        groups[sample.image_id] = known[0]
    return groups


def divide_dataset(
    dataset: Dataset, shares: Sequence[float], groups: Mapping[str, str] | None = None, *, seed: int = 0
) -> Division:
    """Divide images so that each class has its share of every part.

    Images of a group stay together, and so do copies (see `find_duplicates`) and, with them, their groups.

    Args:
        dataset: all images.
        shares: of train, val and test, not negative; 0 leaves a part out.
        groups: the group of image ids; those that it does not name are alone.
        seed: of the order in which equals are dealt out.

    Raises:
        ConfigError: shares that are none.
        DataError: an image cannot be read, or a part would have no image: there are too few groups.
    """
    given = np.asarray(shares, np.float64)
    if given.shape != (3,) or not np.isfinite(given).all() or (given < 0).any() or (given > 0).sum() < 2:
        raise ConfigError(
            f"shares must be three numbers for train, val and test, none negative and two above 0, got "
            f"{', '.join(f'{value:g}' for value in given.ravel())}."
        )
    groups = groups or {}
    duplicates = find_duplicates(dataset.samples)
    unit = _units(dataset, groups, duplicates)
    counts = np.zeros((unit.max(initial=-1) + 1, len(dataset.classes)), np.int64)
    for sample, own in zip(dataset, unit, strict=True):
        counts[own, np.unique(sample.truth.labels[~sample.truth.crowd])] += 1
    used = np.flatnonzero(given)
    part_of = stratified(counts, np.bincount(unit), given[used] / given.sum(), np.random.default_rng(seed))[
        unit
    ]
    parts = {}
    for p, role in enumerate(used):
        name = PARTS[role]
        samples = tuple(s for s, own in zip(dataset, part_of, strict=True) if own == p)
        if not samples:
            raise DataError(
                f"{dataset.name}: {name} gets no image: there are only {len(counts)} groups of images that "
                f"must stay together. Take smaller groups, or fewer parts."
            )
        parts[name] = replace(dataset, split=name, samples=samples)
    return Division(parts, dict(groups), duplicates)


def _units(dataset: Dataset, groups: Mapping[str, str], duplicates: Sequence[Duplicate]) -> NDArray[np.int64]:
    """Return for each image the number of what must stay together with it, in order of appearance."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first: dict[str, int] = {}
    pairs = [(one.first, one.second) for one in duplicates]
    for i, sample in enumerate(dataset):
        if sample.image_id in groups:
            pairs.append((first.setdefault(groups[sample.image_id], i), i))
    ends = np.array(pairs, np.int64).reshape(-1, 2)
    n = len(dataset)
    graph = coo_array((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(n, n))
    labels: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return labels


def stratified(
    counts: NDArray[np.int64], sizes: NDArray[np.int64], shares: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Deal units out to parts so that every part gets its share of every class.

    Iterative stratification: the units of the class that fewest images are left of go first, the largest
    before others, each to the part that lacks most images of that class; of equals to the one that lacks most
    images, then to the first.

    Args:
        counts: (U, K) images of each unit that show a class.
        sizes: (U,) images of each unit.
        shares: (P,) of the parts, together 1.
        rng: orders units of equal size.

    Returns:
        (U,) int64, the part of each unit.

    References:
        Sechidis, Tsoumakas, Vlahavas, "On the stratification of multi-label data", ECML PKDD 2011.
    """
    wanted = shares[:, None] * counts.sum(axis=0)
    room = shares * sizes.sum()
    order = rng.permutation(len(counts))
    order = order[np.argsort(-sizes[order], kind="stable")]
    part = np.full(len(counts), -1, np.int64)
    left = np.ones(len(counts), bool)
    while left.any():
        remaining = counts[left].sum(axis=0)
        k = (
            int(np.argmin(np.where(remaining > 0, remaining, np.iinfo(np.int64).max)))
            if remaining.any()
            else -1
        )
        for u in order[left[order]]:
            if k >= 0 and not counts[u, k]:
                continue
            lack = wanted[:, k] if k >= 0 else room
            p = int(np.lexsort((np.arange(len(shares)), -room, -lack))[0])
            part[u], left[u] = p, False
            wanted[p] -= counts[u]
            room[p] -= sizes[u]
    return part
