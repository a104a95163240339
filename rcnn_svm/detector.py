"""A trained detector: image in, detections out, and the folder that holds it.

The folder has `detector.json` (what it is), `head.DIGEST.safetensors` (scores and box regression),
`backbone.DIGEST.safetensors` (the network) and, where another network finds regions,
`proposer.DIGEST.safetensors`, no pickle, and is all that `detect` needs: scikit-learn is
not loaded. `detector.json` names the others with their hashes, and is written last: a save that is
interrupted leaves the detector that was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import MIRRORED_DELTAS, Boxes, flip_horizontally
from rcnn_svm.config import from_dict, to_dict
from rcnn_svm.engine import THREADS, Engine
from rcnn_svm.errors import ConfigError, DataError, ShapeError
from rcnn_svm.evaluation.calibration import ClassCurves
from rcnn_svm.evaluation.thresholds import Thresholds
from rcnn_svm.features.build import FeatureConfig, build_featurizer, taps_of
from rcnn_svm.features.fc_layers import FcLayers
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.features.store import Featurizer, RowReader, readers_of
from rcnn_svm.files import atomic_path, bytes_digest, file_digest, read_json, write_json
from rcnn_svm.heads.base import Scorer
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.refiner import BoxRefiner
from rcnn_svm.heads.scorers import (
    EstimatorScorer,
    KernelScorer,
    LinearScorer,
    SoftmaxScorer,
    part_named,
    scorer_from_arrays,
)
from rcnn_svm.postprocess import (
    Postprocess,
    PostprocessConfig,
    candidates_to_refine,
    moved_regions,
    postprocess_traced,
    refined,
    snapped,
)
from rcnn_svm.proposals import (
    GridConfig,
    Proposer,
    RpnConfig,
    RpnProposals,
    SelectiveSearchConfig,
    WholeImage,
    regions_of,
)
from rcnn_svm.structures import Detections, Image, Sample, TrainingRegions, mirror_image, require_finite
from rcnn_svm.threads import images_at_once

if TYPE_CHECKING:
    from rcnn_svm.networks.detection import Network

__all__ = [
    "Detector",
    "Look",
    "Model",
    "Refinement",
    "checked_files",
    "load_detector",
    "look_at",
    "restored",
]

_FORMAT = 4
_READ = (3, _FORMAT)
"""The formats that are read: before the fourth no detector was calibrated."""
_PROPOSERS: Mapping[str, type[SelectiveSearchConfig | GridConfig | WholeImage]] = {
    "selective-search": SelectiveSearchConfig,
    "grid": GridConfig,
    "whole-image": WholeImage,
}
"""Our proposers that need no file, by the names that files know them by."""
_PROPOSER = "proposer"
"""What the file of a network that finds regions, and not features, is called."""

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
class Refinement:
    """A second stage for the boxes of detections: its features, and what reads them.

    Attributes:
        featurizer: boxes of an image -> (M, D) rows.
        refiner: reads them.
    """

    featurizer: Featurizer
    refiner: BoxRefiner


@dataclass(frozen=True, eq=False)
class Model:
    """What reads feature rows: class scores, and box regression where there is any.

    Attributes:
        scorer: (R, D) rows -> (R, K) scores.
        scaler: feature scaling that `scorer` was trained with; None reads the rows as they are.
        regressor: (R, D) rows -> (R, K, 4) deltas, or None.
        regressor_scaler: feature scaling that `regressor` was trained with, or None.
        support: the training regions that are the support vectors of a kernel machine, in their order; None
            for other scorers, and where that is not known.
        refinement: moves and ranks the boxes of detections once more, as configured; None where nothing does.

    Raises:
        ShapeError: `support` tells of more or fewer regions than there are support vectors.
    """

    scorer: Scorer
    scaler: FeatureScaler | None
    regressor: BoxRegressor | None = None
    regressor_scaler: FeatureScaler | None = None
    support: TrainingRegions | None = None
    refinement: Refinement | None = None

    def __post_init__(self) -> None:
        n = len(self.scorer.support) if isinstance(self.scorer, KernelScorer) else 0
        if self.support is not None and len(self.support) != n:
            raise ShapeError(f"Model: support must tell of {n} regions, got {len(self.support)}.")

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
        postprocess: Postprocess,
        look: Look,
        fine: RowReader | None = None,
    ) -> tuple[Detections, Boxes | None]:
        """Turn scored regions into detections, after a second look at some of them as configured.

        Args:
            image_id: copied into the result.
            size: (height, width) of the image.
            boxes: (R, 4) proposals.
            scores: (R, K), as `read` returns them.
            deltas: (R, K, 4) or None.
            postprocess: from scores to detections.
            look: boxes -> (rows, mirrored) as `read` takes them; called for a second look only.
            fine: boxes -> rows of `refinement`; None to let boxes be.

        Returns:
            M detections, and (M, 4) the region that each has its score from; None where the post-processing
            is not ours and does not tell.
        """
        if not isinstance(postprocess, PostprocessConfig):
            return postprocess(image_id, size, boxes, scores, deltas), None
        proposals = boxes
        boxes, scores, deltas = self.looked_again(size, boxes, scores, deltas, postprocess, look)
        if self.refinement is None or fine is None or deltas is None or not postprocess.refined:
            found, rows = postprocess_traced(image_id, size, boxes, scores, deltas, postprocess)
            return snapped(found, proposals, postprocess), boxes[rows]
        first, regions = candidates_to_refine(image_id, size, boxes, scores, deltas, postprocess)
        moves, overlaps = self.refinement.refiner(fine(first.boxes), first.labels)
        found, rows = refined(first, moves, overlaps, size, scores.shape[1], postprocess)
        return snapped(found, proposals, postprocess), boxes[regions[rows]]

    def looked_again(
        self,
        size: tuple[int, int],
        boxes: Boxes,
        scores: NDArray[np.float32],
        deltas: NDArray[np.float32] | None,
        config: PostprocessConfig,
        look: Look,
    ) -> tuple[Boxes, NDArray[np.float32], NDArray[np.float32] | None]:
        """Return boxes, scores and deltas with those of a second look, as configured, behind them."""
        if not config.second_look or deltas is None or config.regression == "off":
            return boxes, scores, deltas
        more = moved_regions(boxes, scores, deltas, size, config)
        if not len(more):
            return boxes, scores, deltas
        more_scores, more_deltas = self.read(*look(more), config.min_score)
        assert more_deltas is not None
        return (
            np.concatenate([boxes, more]),
            np.concatenate([scores, more_scores]),
            np.concatenate([deltas, more_deltas]),
        )


@dataclass(frozen=True, eq=False)
class Detector:
    """R-CNN at test time.

    Attributes:
        head: name of the head, such as `linear-svm+bbox`.
        classes: K class names.
        proposer: how regions are found.
        n_proposals: only so many of the best are looked at; None for all.
        features: what is read out of the network.
        backbone: the network that the featurizer was made from, saved with the detector; None where the
            featurizer is not ours.
        featurizer: regions of an image -> (R, D) features.
        layers: learned fc6 and fc7 on top of them, or None.
        model: reads the rows that `layers` return.
        postprocess: caps, NMS, box voting.
        thresholds: from which score on a detection of each class is believed; None where none was chosen.
        info: where it comes from: provenance and figures, for people.
        calibration: makes scores into probabilities; None where it is not calibrated.
    """

    head: str
    classes: tuple[str, ...]
    proposer: Proposer
    n_proposals: int | None
    features: FeatureConfig
    backbone: Network | None
    featurizer: Featurizer
    layers: FcLayers | None
    model: Model
    postprocess: Postprocess
    thresholds: Thresholds | None
    info: Mapping[str, Any]
    calibration: ClassCurves | None = None

    def __repr__(self) -> str:
        network = self.backbone.name if self.backbone is not None else type(self.featurizer).__name__
        return (
            f"Detector({self.head}, {len(self.classes)} classes, {type(self.proposer).__name__}, {network})"
        )

    @property
    def whole_images(self) -> bool:
        """Whether it classifies images: their only region is the image, and every class gets a score."""
        return isinstance(self.proposer, WholeImage)

    @property
    def least_scores(self) -> NDArray[np.float32]:
        """(K,) from which score on a detection of each class is believed; 0 where no threshold was chosen."""
        if self.thresholds is None:
            return np.zeros(len(self.classes), np.float32)
        return self.thresholds.scores

    def detect(self, image: Image, image_id: str = "image") -> Detections:
        """Find objects in one image, uint8 (H, W, 3) RGB.

        Unlikely ones are among them; `thresholds.believed` returns those that are worth showing. They have
        probabilities where the detector is calibrated.
        """
        return self._finish(image_id, image, self._proposals(image, image_id))[0]

    __call__ = detect

    def detect_all(
        self,
        samples: Iterable[Sample],
        *,
        unreadable: Callable[[DataError], None] | None = None,
        engine: Engine = THREADS,
    ) -> Iterator[Detections]:
        """Find objects in many images, several at once where torch has several threads, or on a cluster.

        Args:
            samples: the images.
            unreadable: told why an image cannot be read, which is then left out; None stops there.
            engine: looks at them; what it finds does not depend on it.

        Raises:
            DataError: an image cannot be read.
        """
        for found in engine.in_order(self._look, samples, images_at_once()):
            if isinstance(found, Detections):
                yield found
            elif unreadable is None:
                raise found
            else:
                unreadable(found)

    def _look(self, sample: Sample) -> Detections | DataError:
        try:
            image = sample.read()
            boxes = self._proposals(image, sample.image_id)
        except DataError as error:
            return error
        return self._finish(sample.image_id, image, boxes)[0]

    def trace(self, image: Image, image_id: str = "image") -> tuple[Detections, Boxes]:
        """Find objects in one image, and say which region each detection has its score from.

        Box regression, voting, refinement and snapping move a detection away from the region that was scored.

        Args:
            image: uint8 (H, W, 3) RGB.
            image_id: copied into the result.

        Returns:
            What `detect` returns, M detections, and (M, 4) their regions.

        Raises:
            ConfigError: the post-processing is not ours and does not tell.
        """
        if not isinstance(self.postprocess, PostprocessConfig):
            raise ConfigError(
                f"Detector.trace: post-processing must be ours to tell which region a detection is of, got "
                f"{_name(self.postprocess)}. Name the regions yourself, as rcnn_svm.evidence.explain takes "
                f"them."
            )
        found, regions = self._finish(image_id, image, self._proposals(image, image_id))
        assert regions is not None  # ours tells
        return found, regions

    def views(self, image: Image) -> list[Image]:
        """Return the images whose scores are averaged: the image and, as configured, its mirror image."""
        return [image, mirror_image(image)] if self.features.mirror else [image]

    def _proposals(self, image: Image, image_id: str) -> Boxes:
        return regions_of(self.proposer, image, image_id).boxes[: self.n_proposals]

    def _finish(self, image_id: str, image: Image, boxes: Boxes) -> tuple[Detections, Boxes | None]:
        (look, fine), size, postprocess = self.looks(image), image.shape[:2], self.postprocess
        least = postprocess.min_score if isinstance(postprocess, PostprocessConfig) else -np.inf
        scores, deltas = self.model.read(*look(boxes), least)
        found, regions = self.model.detect(image_id, size, boxes, scores, deltas, postprocess, look, fine)
        return self._calibrated(found), regions

    def _calibrated(self, found: Detections) -> Detections:
        if self.calibration is None:
            return found
        likely = self.calibration(found.scores, found.labels).astype(np.float32)
        return replace(found, probabilities=likely)

    def looks(self, image: Image) -> tuple[Look, RowReader | None]:
        """Return what reads regions of an image, and boxes that are to be refined; the network runs once."""
        first, *others = self.views(image)
        refinement = self.model.refinement
        fine = [] if refinement is None else [refinement.featurizer]
        read, *further = readers_of([self.featurizer, *fine], first)
        readers = [read, *(self.featurizer.of_image(view) for view in others)]
        look = look_at([self._layered(one) for one in readers], image.shape[1])
        return look, further[0] if further else None

    def _layered(self, read: RowReader) -> RowReader:
        layers = self.layers
        return read if layers is None else lambda boxes: layers(read(boxes))

    def settings(self) -> dict[str, Any]:
        """Return all but the network and what reads its rows, as plain data that `restored` reads.

        A part that is not ours has no `settings`, only its name.
        """
        return {
            "head": self.head,
            "classes": list(self.classes),
            "proposals": (
                {"kind": RpnProposals.name, "settings": to_dict(self.proposer.config)}
                if isinstance(self.proposer, RpnProposals)
                else _described(self.proposer, _PROPOSERS)
            ),
            "n_proposals": self.n_proposals,
            "features": to_dict(self.features),
            "detect": _described(self.postprocess, {_OURS: PostprocessConfig}),
            "thresholds": self.thresholds and self.thresholds.to_json(),
            "info": dict(self.info),
        }

    def save(self, folder: Path) -> None:
        """Write the detector to `folder`, in place of one that lies there.

        The files of arrays get names of their own, `detector.json`, which names them, is replaced in one
        step, and what the older detector had goes last. Whenever this is interrupted, the old or the new
        detector is there.

        Raises:
            ConfigError: a scorer that passes for one of ours, as which it would be read back.
            DataError: the folder cannot be written to, or an array is not finite; then nothing is written.
            DiskSpaceError: the disk is full.
        """
        from safetensors.numpy import save_file

        folder = Path(folder)
        model = self.model
        ours = (LinearScorer, SoftmaxScorer, KernelScorer, EstimatorScorer)
        if isinstance(model.scorer, ours) and type(model.scorer) not in ours:
            base = next(kind for kind in ours if isinstance(model.scorer, kind))
            if model.scorer.kind in (LinearScorer.kind, SoftmaxScorer.kind):
                raise ConfigError(
                    f"Detector {self.head}: {type(model.scorer).__name__} would be read back as "
                    f"{base.__name__}. Give it a `kind` of its own."
                )
        if model.refinement is not None and self.backbone is None:
            raise ConfigError(
                f"Detector {self.head}: what refines boxes reads a network that is not saved with it. Leave "
                f"it out."
            )
        parts: dict[str, Mapping[str, NDArray[Any]]] = {"scorer": model.scorer.to_arrays()}
        if model.regressor is not None:
            parts["regressor"] = model.regressor.to_arrays()
        if self.layers is not None:
            parts["layers"] = self.layers.to_arrays()
        if model.support is not None:
            parts["support"] = model.support.to_arrays()
        if model.refinement is not None:
            parts["refiner"] = model.refinement.refiner.to_arrays()
        if self.calibration is not None:
            parts["calibration"] = self.calibration.to_arrays()
        arrays = {
            f"{part}.{name}": np.ascontiguousarray(array)
            for part, named in parts.items()
            for name, array in named.items()
        }
        require_finite(f"Detector {self.head}", arrays)
        # Named after their content: what an older detector needs is not touched before it is replaced.
        content = [part for name in sorted(arrays) for part in (name.encode(), arrays[name].tobytes())]
        paths = {"head": folder / f"head.{bytes_digest(*content)[:12]}.safetensors"}
        with atomic_path(paths["head"], apart=True) as temporary:
            save_file(arrays, temporary)
        if self.backbone is not None:
            paths["backbone"] = folder / f"backbone.{self.backbone.digest[:12]}.safetensors"
            self.backbone.save(paths["backbone"])
        if isinstance(self.proposer, RpnProposals):
            network = self.proposer.network
            if self.backbone is None or network.digest != self.backbone.digest:
                paths[_PROPOSER] = folder / f"{_PROPOSER}.{network.digest[:12]}.safetensors"
                network.save(paths[_PROPOSER])
        files = {kind: {"name": path.name, "sha256": file_digest(path)} for kind, path in paths.items()}
        write_json(
            folder / "detector.json",
            {
                "format": _FORMAT,
                "files": files,
                "scorer": model.scorer.kind,
                "network": self.backbone.name if self.backbone is not None else _name(self.featurizer),
                "refiner_taps": model.refinement and taps_of(model.refinement.featurizer),
                "scaler": model.scaler and model.scaler.to_dict(),
                "regressor_scaler": model.regressor_scaler and model.regressor_scaler.to_dict(),
                **self.settings(),
            },
        )
        for kind in ("head", "backbone", _PROPOSER):
            for path in folder.glob(f"{kind}.*.safetensors"):
                if path not in paths.values():
                    path.unlink(missing_ok=True)


def load_detector(
    folder: str | Path, *, parts: Mapping[str, Any] | None = None, device: str = "cpu"
) -> Detector:
    """Read a detector that `Detector.save` wrote.

    Args:
        folder: where it lies.
        parts: what it was made with and is not ours, by the names that it was saved under: a proposer, an
            `Architecture`, a featurizer, a kernel, an estimator (or its class, where that has `from_arrays`),
            post-processing. Nothing that a file names is ever imported.
        device: where torch runs.

    Raises:
        DataError: no detector lies there, a file is damaged, another version wrote it, or a part is missing.
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
    if not isinstance(values, dict) or values.get("format") not in _READ:
        raise DataError(
            f"{manifest}: must be a detector of format {_READ[0]} or {_FORMAT}, got "
            f"{values.get('format') if isinstance(values, dict) else type(values).__name__}. Train it again."
        )
    files = checked_files(manifest, values, "head", "Train it again.")
    try:
        arrays = load_file(files["head"])
    except (OSError, SafetensorError) as error:
        raise DataError(f"{files['head']}: cannot be read ({error}). Train the detector again.") from error
    parts, where = parts or {}, str(manifest)
    try:
        detector = _read(values, files, arrays, parts, device, where)
        _probe(detector)
    except KeyError as error:
        raise DataError(f"{folder}: {error} is missing from the detector. Train it again.") from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:  # ConfigErrors too
        raise DataError(f"{manifest}: holds what is no detector ({error}). Train it again.") from error
    return detector


def _read(
    values: Mapping[str, Any],
    files: Mapping[str, Path],
    arrays: Mapping[str, NDArray[Any]],
    parts: Mapping[str, Any],
    device: str,
    where: str,
) -> Detector:
    """Return what the files of a detector describe; raise anything where they are damaged."""
    features = from_dict(FeatureConfig, values["features"], where=where)
    backbone, featurizer = _featurizer(
        files.get("backbone"), values["network"], features, parts, device, where=where
    )
    if values["proposals"]["kind"] == RpnProposals.name and "settings" in values["proposals"]:
        rpn = from_dict(RpnConfig, values["proposals"]["settings"], where=where)
        parts = {**parts, RpnProposals.name: _rpn(rpn, files.get(_PROPOSER), backbone).on(device)}
    settings = restored(values, parts, where=where)
    refinement = None
    if part := _part(arrays, "refiner"):
        if backbone is None:
            raise ValueError("its refinement has no network to read")
        fine = replace(features, taps=str(values["refiner_taps"]))
        refinement = Refinement(build_featurizer(fine, backbone, device=device), BoxRefiner.from_arrays(part))
    return Detector(
        **settings,
        backbone=backbone,
        featurizer=featurizer,
        layers=FcLayers.from_arrays(part) if (part := _part(arrays, "layers")) else None,
        model=Model(
            scorer=scorer_from_arrays(values["scorer"], _part(arrays, "scorer"), parts),
            scaler=_scaler(values["scaler"]),
            regressor=BoxRegressor.from_arrays(part) if (part := _part(arrays, "regressor")) else None,
            regressor_scaler=_scaler(values["regressor_scaler"]),
            support=TrainingRegions.from_arrays(part) if (part := _part(arrays, "support")) else None,
            refinement=refinement,
        ),
        calibration=ClassCurves.from_arrays(part) if (part := _part(arrays, "calibration")) else None,
    )


def restored(values: Mapping[str, Any], parts: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return what `Detector.settings` described, by the names of `Detector`'s attributes.

    Args:
        values: as read from a file, which may hold anything.
        parts: as `load_detector` takes them.
        where: the file, for messages.

    Raises:
        DataError: a part is missing.
        KeyError, TypeError, ValueError, AttributeError: the values are damaged.
    """
    classes, n_proposals, thresholds = values["classes"], values["n_proposals"], values["thresholds"]
    if not isinstance(classes, list) or not all(isinstance(name, str) and name for name in classes):
        raise TypeError(f"its classes are {classes!r:.80}")
    if len(set(classes)) < len(classes) or not classes:
        raise ValueError(f"its classes must be one or more, each once, got {classes!r:.80}")
    if n_proposals is not None and (type(n_proposals) is not int or n_proposals < 1):
        raise TypeError(f"n_proposals is {n_proposals!r:.80}")
    return {
        "head": str(values["head"]),
        "classes": tuple(classes),
        "proposer": _restored(values["proposals"], _PROPOSERS, "proposer", parts, where),
        "n_proposals": n_proposals,
        "features": from_dict(FeatureConfig, values["features"], where=where),
        "postprocess": _restored(
            values["detect"], {_OURS: PostprocessConfig}, "post-processing", parts, where
        ),
        "thresholds": None if thresholds is None else Thresholds.from_json(thresholds, classes, where=where),
        "info": dict(values["info"]),
    }


def _probe(detector: Detector) -> None:
    """Check that the parts of a detector fit together, by one row through all of them.

    Raises:
        ShapeError: they do not.
    """
    rows = np.ones((1, detector.featurizer.n_features), np.float32)
    with np.errstate(all="ignore"):
        scores, deltas = detector.model.read(rows if detector.layers is None else detector.layers(rows), None)
    n_classes, refinement = len(detector.classes), detector.model.refinement
    if refinement is not None:
        refinement.refiner(
            np.ones((1, refinement.featurizer.n_features), np.float32), np.array([n_classes - 1])
        )
    curves = detector.calibration
    if curves is not None and len(curves.kinds) != n_classes:
        raise ShapeError(f"its {n_classes} classes have {len(curves.kinds)} curves of probabilities")
    if scores.shape != (1, n_classes) or (deltas is not None and deltas.shape != (1, n_classes, 4)):
        raise ShapeError(f"its {n_classes} classes get scores of shape {scores.shape}")


def checked_files(manifest: Path, values: Mapping[str, Any], needed: str, remedy: str) -> dict[str, Path]:
    """Return the files that a manifest names, which lie beside it, each found to be what it says.

    Args:
        manifest: the file.
        values: that it holds: `files` has a name and a SHA-256 for each kind of file.
        needed: the kind that must be there.
        remedy: how a whole folder is made again, in words.

    Raises:
        DataError: one is missing, damaged, or of another detector.
    """
    named = values.get("files")
    if not isinstance(named, dict) or not all(isinstance(one, dict) for one in named.values()):
        raise DataError(f"{manifest}: must name its files, got {named!r}. {remedy}")
    found = {}
    for kind, one in named.items():
        path = manifest.parent / Path(str(one.get("name"))).name  # nothing outside the folder
        sha256 = file_digest(path)
        if sha256 != one.get("sha256"):
            raise DataError(
                f"{path}: must have the SHA-256 {str(one.get('sha256'))[:12]}... of {manifest.name}, got "
                f"{sha256[:12]}... It is damaged or of another detector. {remedy[:-1]}, or copy it anew."
            )
        found[str(kind)] = path
    if needed not in found:
        raise DataError(f"{manifest}: must name the file of its {needed}. {remedy}")
    return found


_OURS = "rcnn_svm"


def _described(part: Any, ours: Mapping[str, type]) -> dict[str, Any]:
    """Return a part as plain data: the settings of one of ours, else its name."""
    for kind, known in ours.items():
        if type(part) is known:
            return {"kind": kind, "settings": to_dict(part, finite=True)}
    return {"kind": _name(part)}


def _name(part: Any) -> str:
    """Return what a file calls a part that is not ours."""
    return str(getattr(part, "name", None) or getattr(part, "__name__", type(part).__name__))


def _restored(
    values: Mapping[str, Any], ours: Mapping[str, type], what: str, parts: Mapping[str, Any], where: str
) -> Any:
    """Return the part that `_described` described."""
    kind = values["kind"]
    if kind in ours:
        return from_dict(ours[kind], values["settings"], where=where)
    return part_named(kind, what, parts)


def _featurizer(
    weights: Path | None,
    network: str,
    features: FeatureConfig,
    parts: Mapping[str, Any],
    device: str,
    *,
    where: str,
) -> tuple[Network | None, Featurizer]:
    """Return the network of a saved detector, and what reads features from it."""
    from rcnn_svm.networks.architectures import Architecture
    from rcnn_svm.networks.detection import load_network
    from rcnn_svm.networks.libraries import is_named

    part: Any = network if is_named(network) else part_named(network, "network or featurizer", parts)
    if not isinstance(part, str | Architecture):
        return None, part
    if weights is None:
        raise DataError(f"{where}: must name the file of the network {network}. Train the detector again.")
    backbone = load_network(part, weights)
    return backbone, build_featurizer(features, backbone, device=device)


def _rpn(config: RpnConfig, weights: Path | None, backbone: Network | None) -> RpnProposals:
    """Return what finds the regions of a saved detector: a network of its own, or that of its features."""
    from rcnn_svm.networks.detection import DetectionNetwork, load_detection_network

    if weights is not None:
        return RpnProposals(config, load_detection_network(config.network, weights))
    if not isinstance(backbone, DetectionNetwork):
        raise ValueError(f"it names no file of {config.network}, which finds its regions")
    return RpnProposals(config, backbone)


def _part(arrays: Mapping[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def _scaler(values: Mapping[str, Any] | None) -> FeatureScaler | None:
    return None if values is None else FeatureScaler.from_dict(values)
