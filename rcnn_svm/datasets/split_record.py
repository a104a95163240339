"""Which images a detector learned from and which were held out: the file `splits.json` beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from rcnn_svm.datasets.loading import Splits
from rcnn_svm.errors import DataError
from rcnn_svm.files import read_json, remove_marker, write_json
from rcnn_svm.structures import Sample

__all__ = ["SplitRecord"]

_FILE = "splits.json"
_FORMAT = 1
_PARTS = ("train", "val", "trainval", "test")


@dataclass(frozen=True)
class SplitRecord:
    """The images of an experiment, by id and by content.

    Attributes:
        data: name of the data set.
        seed: of the draws.
        notes: those of `Splits`.
        parts: for each of train, val, trainval and test the digest (`Sample.digest`) of each image id.
        added: the same of data from which further classes were learned later.
    """

    data: str
    seed: int
    notes: tuple[str, ...]
    parts: Mapping[str, Mapping[str, str]]
    added: tuple[SplitRecord, ...] = ()

    @classmethod
    def of(cls, splits: Splits, *, seed: int) -> Self:
        """Return the record of `splits`.

        Raises:
            DataError: an image cannot be read.
        """
        parts = {
            name: {sample.image_id: sample.digest() for sample in getattr(splits, name)} for name in _PARTS
        }
        return cls(splits.train.name, seed, splits.notes, parts)

    @cached_property
    def learned_from(self) -> frozenset[str]:
        """The digests of all images that were trained on or that settings were chosen on."""
        parts = (one.parts[name] for one in (self, *self.added) for name in _PARTS if name != "test")
        return frozenset(digest for part in parts for digest in part.values())

    @cached_property
    def known(self) -> frozenset[str]:
        """The digests of all images, those of added data aside."""
        return frozenset(digest for part in self.parts.values() for digest in part.values())

    def with_learned(self, data: str, samples: Sequence[Sample], *, seed: int) -> SplitRecord:
        """Return the record with further images that are learned from, in place of earlier ones of this name.

        Args:
            data: name of what they come from.
            samples: the images.
            seed: of the training.

        Raises:
            DataError: an image cannot be read.
        """
        learned = {sample.image_id: sample.digest() for sample in samples}
        parts = {"train": learned, "val": {}, "trainval": learned, "test": {}}
        others = (one for one in self.added if one.data != data)
        return replace(self, added=(*others, SplitRecord(data, seed, (), parts)))

    def write(self, folder: Path) -> None:
        """Write `splits.json` into `folder`.

        Raises:
            DataError: the folder cannot be written to.
            DiskSpaceError: the disk is full.
        """
        added = {"added": [one._plain() for one in self.added]} if self.added else {}
        write_json(folder / _FILE, self._plain() | added)

    def _plain(self) -> dict[str, Any]:
        head = {"format": _FORMAT, "data": self.data, "seed": self.seed, "notes": list(self.notes)}
        return head | {name: dict(self.parts[name]) for name in _PARTS}

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove the record that lies in `folder`, if any.

        Raises:
            DataError: it cannot be removed.
        """
        remove_marker(folder / _FILE)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return what `write` wrote into `folder`, or None where there is no `splits.json`.

        Raises:
            DataError: the file is damaged, or another version wrote it.
        """
        file = folder / _FILE
        if not file.exists():
            return None
        values = read_json(file)
        added = values.get("added", []) if isinstance(values, dict) else []
        if not isinstance(added, list) or not all(map(_is_record, (values, *added))):
            raise DataError(
                f"{file}: must be of format {_FORMAT} and tell the digest of each image of "
                f"{', '.join(_PARTS)}. Train the detector again."
            )
        first, *others = (
            cls(one["data"], one["seed"], tuple(one["notes"]), {name: one[name] for name in _PARTS})
            for one in (values, *added)
        )
        return replace(first, added=tuple(others))


def _is_record(values: Any) -> bool:
    return (
        isinstance(values, dict)
        and values.get("format") == _FORMAT
        and isinstance(values.get("data"), str)
        and isinstance(values.get("seed"), int)
        and _all_text(values.get("notes"), list)
        and all(_all_text(values.get(name), dict) for name in _PARTS)
    )


def _all_text(value: Any, kind: type[list[Any]] | type[dict[str, Any]]) -> bool:
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, kind) and all(isinstance(item, str) for item in items)
