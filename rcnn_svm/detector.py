"""A trained detector: image in, detections out, and the folder that holds it.

The folder has `detector.json` (what it is), `head.safetensors` (scores and box regression) and
`backbone.safetensors` (the network), no pickle, and is all that `detect` needs: scikit-learn is
not loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import MIRRORED_DELTAS, Boxes, flip_horizontally
from rcnn_svm.config import from_dict, to_dict
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.features.backbone import Backbone, load_backbone
from rcnn_svm.features.build import FeatureConfig, build_featurizer
from rcnn_svm.features.fc_layers import FcLayers
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.features.store import RowReader
from rcnn_svm.files import atomic_path, read_json, remove_marker, write_json
from rcnn_svm.heads.base import Scorer
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.scorers import SCORERS, scorer_from_arrays
from rcnn_svm.postprocess import PostprocessConfig, moved_regions, postprocess
from rcnn_svm.proposals import SelectiveSearchConfig, selective_search
from rcnn_svm.structures import Detections, Image, Sample, mirror_image, require_finite

if TYPE_CHECKING:
    from rcnn_svm.features.build import ImageFeaturizer

__all__ = ["Detector", "Look", "Model", "load_detector", "look_at"]

_FORMAT = 1

Look: TypeAlias = Callable[[Boxes], tuple[NDArray[np.float32], NDArray[np.float32] | None]]
"""Boxes of one image -> their unscaled rows, and those of the mirror image where it is read too."""


def look_at(readers: Sequence[RowReader], width: float) -> Look:
    """Return what reads regions of an image from the image itself and, where there is one, its mirror image.

    Args:
        readers: of the image, and of its mirror image if that is read too.
        width: of the image, in pixels.
    """
    own, *mirrored = readers

    def look(boxes: Boxes) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        return own(boxes), mirrored[0](flip_horizontally(boxes, width)) if mirrored else None

    return look


@dataclass(frozen=True, eq=False)
class Model:
    """What reads feature rows: class scores, and box regression where there is any.

    Attributes:
        scorer: (R, D) rows -> (R, K) scores.
        scaler: feature scaling that `scorer` was trained with; None reads the rows as they are.
        regressor: (R, D) rows -> (R, K, 4) deltas, or None.
        regressor_scaler: feature scaling that `regressor` was trained with, or None.
    """

    scorer: Scorer
    scaler: FeatureScaler | None
    regressor: BoxRegressor | None = None
    regressor_scaler: FeatureScaler | None = None

    def scores(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (R, K) scores of unscaled rows."""
        return self.scorer.decision_function(rows if self.scaler is None else self.scaler(rows))

    def deltas(self, rows: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Return (R, K, 4) box regression of unscaled rows, or None where there is no regressor."""
        if self.regressor is None:
            return None
        return self.regressor.predict(rows if self.regressor_scaler is None else self.regressor_scaler(rows))

    def read(
        self, rows: NDArray[np.float32], mirrored: NDArray[np.float32] | None, min_score: float = -np.inf
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return (R, K) scores and (R, K, 4) deltas or None, averaged over an image and its mirror image.

        Args:
            rows: (R, D) unscaled rows of the regions.
            mirrored: their rows in the mirror image, or None to read the image alone.
            min_score: deltas of a region that scores lower for every class are left at zero.
        """
        scores = self.scores(rows)
        if mirrored is not None:
            scores = np.asarray((scores + self.scores(mirrored)) / 2, np.float32)
        if self.regressor is None:
            return scores, None
        kept = np.flatnonzero((scores >= min_score).any(axis=1))
        own = self.deltas(rows[kept])
        assert own is not None
        if mirrored is not None:
            other = self.deltas(mirrored[kept])
            assert other is not None
            own = np.asarray((own + other * MIRRORED_DELTAS) / 2, np.float32)
        deltas = np.zeros((*scores.shape, 4), np.float32)
        deltas[kept] = own
        return scores, deltas

    def detect(
        self,
        image_id: str,
        size: tuple[int, int],
        boxes: Boxes,
        scores: NDArray[np.float32],
        deltas: NDArray[np.float32] | None,
        config: PostprocessConfig,
        look: Look,
    ) -> Detections:
        """Turn scored regions into detections, after a second look at some of them as configured.

        Args:
            image_id: copied into the result.
            size: (height, width) of the image.
            boxes: (R, 4) proposals.
            scores: (R, K), as `read` returns them.
            deltas: (R, K, 4) or None.
            config: see there.
            look: boxes -> (rows, mirrored) as `read` takes them; called for a second look only.
        """
        if config.second_look and deltas is not None and config.regression != "off":
            more = moved_regions(boxes, scores, deltas, size, config)
            if len(more):
                more_scores, more_deltas = self.read(*look(more), config.min_score)
                assert more_deltas is not None
                boxes = np.concatenate([boxes, more])
                scores, deltas = np.concatenate([scores, more_scores]), np.concatenate([deltas, more_deltas])
        return postprocess(image_id, size, boxes, scores, deltas, config)


@dataclass(frozen=True, eq=False)
class Detector:
    """R-CNN at test time.

    Attributes:
        head: name of the head, such as `linear-svm+bbox`.
        classes: K class names.
        proposals: how regions are found.
        features: what is read out of the network.
        backbone: the network that the featurizer was made from, saved with the detector.
        featurizer: regions of an image -> (R, D) features.
        layers: learned fc6 and fc7 on top of them, or None.
        model: reads the rows that `layers` return.
        detect_config: caps, NMS, box voting.
        info: where it comes from: provenance and figures, for people.
    """

    head: str
    classes: tuple[str, ...]
    proposals: SelectiveSearchConfig
    features: FeatureConfig
    backbone: Backbone
    featurizer: ImageFeaturizer
    layers: FcLayers | None
    model: Model
    detect_config: PostprocessConfig
    info: Mapping[str, Any]

    def detect(self, image: Image, image_id: str = "image") -> Detections:
        """Find objects in one image, uint8 (H, W, 3) RGB."""
        return self._finish(image_id, image, selective_search(image, self.proposals, image_id=image_id).boxes)

    def detect_all(
        self, samples: Iterable[Sample], *, unreadable: Callable[[DataError], None] | None = None
    ) -> Iterator[Detections]:
        """Find objects in many images; the next one is read and searched for regions meanwhile.

        Args:
            samples: the images.
            unreadable: told why an image cannot be read, which is then left out; None stops there.

        Raises:
            DataError: an image cannot be read.
        """

        def prepare(sample: Sample) -> tuple[str, Image, Boxes]:
            image = sample.read()
            return (
                sample.image_id,
                image,
                selective_search(image, self.proposals, image_id=sample.image_id).boxes,
            )

        def finish(prepared: Future[tuple[str, Image, Boxes]]) -> Iterator[Detections]:
            try:
                image_id, image, boxes = prepared.result()
            except DataError as error:
                if unreadable is None:
                    raise
                unreadable(error)
            else:
                yield self._finish(image_id, image, boxes)

        with ThreadPoolExecutor(1) as ahead:
            waiting = None
            for sample in samples:
                following = ahead.submit(prepare, sample)
                if waiting is not None:
                    yield from finish(waiting)
                waiting = following
            if waiting is not None:
                yield from finish(waiting)

    def _finish(self, image_id: str, image: Image, boxes: Boxes) -> Detections:
        look, size, config = self._look(image), image.shape[:2], self.detect_config
        scores, deltas = self.model.read(*look(boxes), config.min_score)
        return self.model.detect(image_id, size, boxes, scores, deltas, config, look)

    def _look(self, image: Image) -> Look:
        views = [image, mirror_image(image)] if self.features.mirror else [image]
        return look_at([self._reader(view) for view in views], image.shape[1])

    def _reader(self, image: Image) -> RowReader:
        read, layers = self.featurizer.of_image(image), self.layers
        return read if layers is None else lambda boxes: layers(read(boxes))

    def save(self, folder: Path) -> None:
        """Write the detector to `folder`; `detector.json` goes first and comes last: it marks a whole one.

        Raises:
            ConfigError: a scorer that `load_detector` could not read back.
            DataError: the folder cannot be written to, or an array is not finite; then nothing is written.
            DiskSpaceError: the disk is full.
        """
        from safetensors.numpy import save_file

        folder = Path(folder)
        model = self.model
        if SCORERS.get(model.scorer.kind) is not type(model.scorer):
            raise ConfigError(
                f"Detector {self.head}: a saved one must score with {', '.join(SCORERS)}, got "
                f"{type(model.scorer).__name__}. Keep its arrays (to_arrays) yourself."
            )
        parts: dict[str, Mapping[str, NDArray[Any]]] = {"scorer": model.scorer.to_arrays()}
        if model.regressor is not None:
            parts["regressor"] = model.regressor.to_arrays()
        if self.layers is not None:
            parts["layers"] = self.layers.to_arrays()
        arrays = {
            f"{part}.{name}": np.ascontiguousarray(array)
            for part, named in parts.items()
            for name, array in named.items()
        }
        require_finite(f"Detector {self.head}", arrays)
        remove_marker(folder / "detector.json")
        self.backbone.save(folder / "backbone.safetensors")
        with atomic_path(folder / "head.safetensors") as temporary:
            save_file(arrays, temporary)
        write_json(
            folder / "detector.json",
            {
                "format": _FORMAT,
                "head": self.head,
                "scorer": model.scorer.kind,
                "classes": list(self.classes),
                "proposals": to_dict(self.proposals),
                "features": to_dict(self.features),
                "scaler": model.scaler and model.scaler.to_dict(),
                "regressor_scaler": model.regressor_scaler and model.regressor_scaler.to_dict(),
                "detect": to_dict(self.detect_config, finite=True),
                "info": dict(self.info),
            },
        )


def load_detector(folder: str | Path) -> Detector:
    """Read a detector that `Detector.save` wrote.

    Raises:
        DataError: no detector lies there, a file is damaged, or another version wrote it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    manifest = folder / "detector.json"
    if not manifest.exists():
        raise DataError(
            f"{folder}: holds no trained detector (there is no detector.json). "
            f"Make one with `rcnn-svm train DATA --out {folder}`."
        )
    values = read_json(manifest)
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise DataError(
            f"{manifest}: must be a detector of format {_FORMAT}, got "
            f"{values.get('format') if isinstance(values, dict) else type(values).__name__}. Train it again."
        )
    try:
        arrays = load_file(folder / "head.safetensors")
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{folder / 'head.safetensors'}: cannot be read ({error}). Train the detector again."
        ) from error
    try:
        features = from_dict(FeatureConfig, values["features"], where=str(manifest))
        backbone = load_backbone(features.backbone, folder / "backbone.safetensors")
        return Detector(
            head=values["head"],
            classes=tuple(values["classes"]),
            proposals=from_dict(SelectiveSearchConfig, values["proposals"], where=str(manifest)),
            features=features,
            backbone=backbone,
            featurizer=build_featurizer(features, backbone),
            layers=FcLayers.from_arrays(part) if (part := _part(arrays, "layers")) else None,
            model=Model(
                scorer=scorer_from_arrays(values["scorer"], _part(arrays, "scorer")),
                scaler=_scaler(values["scaler"]),
                regressor=BoxRegressor.from_arrays(part) if (part := _part(arrays, "regressor")) else None,
                regressor_scaler=_scaler(values["regressor_scaler"]),
            ),
            detect_config=from_dict(PostprocessConfig, values["detect"], where=str(manifest)),
            info=values["info"],
        )
    except KeyError as error:
        raise DataError(f"{folder}: {error} is missing from the detector. Train it again.") from error


def _part(arrays: Mapping[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def _scaler(values: Mapping[str, Any] | None) -> FeatureScaler | None:
    return None if values is None else FeatureScaler.from_dict(values)
