"""What trainings found, kept in the cache: a study that was cut short goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcnn_svm.cache import note_use
from rcnn_svm.datasets import Splits
from rcnn_svm.experiment.parts import Parts
from rcnn_svm.files import atomic_path, bytes_digest, digest, is_sealed, seal
from rcnn_svm.progress import say
from rcnn_svm.structures import Dataset, Detections

__all__ = ["Kept"]

_VERSION = 1
"""Of what a training does: a higher number makes all that is kept unknown."""
_NO_MATTER = ("data", "heads", "detect", "n_bootstrap", "choose", "rule", "seed")
"""What a training does not depend on, of a configuration: the data are known by their content."""

Found = Mapping[str, Sequence[Detections]]
"""Detections of a split, one record per image, by a name such as `regressed`."""


class Kept:
    """Trainings of one experiment, each under a hash of all that it depends on.

    Parts of one's own have a name at most, which does not tell what they do: with them nothing is met again.

    Args:
        folder: of the cache.
        splits: that are trained on and looked at.
        parts: of the experiment, its seed among them.
    """

    def __init__(self, folder: Path, splits: Splits, parts: Parts) -> None:
        self._folder, self._test = folder, splits.test
        own = {name: value for name, value in parts.described.items() if name not in _NO_MATTER}
        self._foreign = "own" in own
        self._identity = {
            "version": _VERSION,
            "parts": own,
            "seed": parts.seed,
            "images": [_digest(dataset) for dataset in (splits.train, splits.val, splits.test)],
        }

    def _path(self, what: Mapping[str, Any]) -> Path:
        return self._folder / "study" / f"{digest({**self._identity, 'what': dict(what)})}.npz"

    def read(self, what: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[Detections]]] | None:
        """Return what a training said of itself, and what it found; None where it is not kept, or damaged."""
        path = self._path(what)
        if self._foreign or not note_use(path):
            return None
        try:
            if not is_sealed(path, path.stem):
                say(f"{path}: damaged; it is trained again.")
                return None
            with np.load(path, allow_pickle=False) as stored:
                about = json.loads(bytes(stored["about"]))
                return about["about"], {name: self._unpacked(stored, name) for name in about["found"]}
        except FileNotFoundError:  # another process made room since the line before
            return None

    def write(self, what: Mapping[str, Any], about: Mapping[str, Any], found: Found) -> None:
        """Keep a training.

        Args:
            what: tells it from others of the experiment, as plain data.
            about: plain data to keep with it.
            found: on test.
        """
        text = json.dumps({"about": dict(about), "found": list(found)})
        arrays: dict[str, Any] = {"about": np.frombuffer(text.encode(), np.uint8)}
        for name, own in found.items():
            arrays[f"{name} counts"] = np.array([len(image) for image in own])
            for column in ("boxes", "scores", "labels"):
                arrays[f"{name} {column}"] = np.concatenate([getattr(image, column) for image in own])
        path = self._path(what)
        with atomic_path(path, durable=False) as temporary:
            with open(temporary, "wb") as stream:
                np.savez(stream, **arrays)
            seal(temporary, path.stem)

    def _unpacked(self, stored: Mapping[str, Any], name: str) -> list[Detections]:
        ends = np.cumsum(stored[f"{name} counts"])[:-1]
        columns = (np.split(stored[f"{name} {column}"], ends) for column in ("boxes", "scores", "labels"))
        return [Detections(s.image_id, *own) for s, *own in zip(self._test, *columns, strict=True)]


def _digest(dataset: Dataset) -> str:
    """Return a hash of all pixels and labels of a split."""
    parts = ["/".join((dataset.split, *dataset.classes)).encode()]
    for sample in dataset:
        truth = sample.truth
        parts.append(sample.digest().encode())
        columns = (truth.boxes, truth.labels, truth.difficult, truth.crowd, truth.area)
        parts += [np.ascontiguousarray(column).tobytes() for column in columns]
    return bytes_digest(*parts)
