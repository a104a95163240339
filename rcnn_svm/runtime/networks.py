"""ONNX graphs as featurizers, and an exported folder as a detector; see `rcnn_svm.runtime`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes, as_boxes
from rcnn_svm.detector import Detector, Model, Refinement, checked_files, restored
from rcnn_svm.errors import DataError, DependencyError, ShapeError
from rcnn_svm.evaluation.calibration import ClassCurves
from rcnn_svm.features.store import Featurizer, RowReader
from rcnn_svm.files import read_json
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.refiner import BoxRefiner, deltas_and_overlaps
from rcnn_svm.runtime import MANIFEST
from rcnn_svm.structures import Image, require_image

if TYPE_CHECKING:
    from rcnn_svm.features.warp import WarpMode

__all__ = ["FORMAT", "MAP", "Graph", "SharedNetwork", "WarpedNetwork", "find_export", "read_export"]

FORMAT = 1
MAP = "map."
"""What names of maps begin with, which `again` reads."""
_CROPS_AT_ONCE = 32
_INSIDE = "onnx"
"""The folder inside a detector's own that its export lies in."""
_OWN = {"format", "files", "scorer", "network", "refiner_taps", "scaler", "regressor_scaler"}
"""What `detector.json` says of its arrays, which are inside the graphs."""
_REMEDY = "Export it again."


class Graph:
    """An ONNX graph in ONNX Runtime, on the CPU.

    Attributes:
        inputs, outputs: names.
        n_classes: that it gives numbers of, for each region.

    Args:
        path: of the file.
        threads: of one run; 0 for every core. Several threads may call it at the same time.

    Raises:
        DependencyError: onnxruntime is missing.
        DataError: the file is no graph.
    """

    def __init__(self, path: Path, *, threads: int) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise DependencyError(
                f"onnxruntime cannot be imported ({error}): install it with `pip install onnxruntime`."
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # see `threads`
        options.log_severity_level = 3  # errors, which are raised
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has a class of its own for each of its codes
            raise DataError(f"{path}: must be an ONNX graph, got {error}. {_REMEDY}") from error
        self.inputs = [one.name for one in self._session.get_inputs()]
        shapes = {one.name: one.shape for one in self._session.get_outputs()}
        self.outputs = list(shapes)
        counted = next((shapes[name][1] for name in ("scores", "moves") if name in shapes), None)
        self.n_classes: int | None = counted

    def __call__(self, **inputs: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Return the outputs by name."""
        return dict(zip(self.outputs, self._session.run(self.outputs, inputs), strict=True))


class SharedNetwork:
    """Graphs of shared convolutions as a featurizer; a row is all that they say of a region.

    Args:
        whole: from image and boxes to rows, and to maps where there is `again`.
        again: from these maps and boxes to rows; None where regions are read once.
        n_features: of a row.
        longer_sides: sizes that the image's longer side is brought to, as of `SharedFeatures`.
        key: identity of the graphs.
        direct: whether `whole` says the same rows; otherwise its maps alone are of use.
    """

    def __init__(
        self,
        whole: Graph,
        again: Graph | None,
        n_features: int,
        longer_sides: Sequence[int],
        key: Mapping[str, Any],
        *,
        direct: bool = True,
    ) -> None:
        self._direct = direct
        self._whole, self._again, self._longer_sides = whole, again, longer_sides
        self.n_features, self.key = n_features, key

    def __call__(self, image: Image, boxes: Boxes) -> NDArray[np.float32]:
        """Return (R, n_features) float32 rows of (R, 4) boxes."""
        return self.of_image(image)(boxes)

    def of_image(self, image: Image) -> RowReader:
        """Return the same for one image; with `again` its convolutions run once."""
        return self.of_image_with(image)[0]

    def reads_with(self, other: Featurizer) -> bool:
        """Whether another one is of the same export: its graphs take the maps of this one's."""
        return isinstance(other, SharedNetwork) and other._longer_sides == self._longer_sides

    def of_image_with(self, image: Image, *others: SharedNetwork) -> list[RowReader]:
        """Return what `of_image` does for this and other networks, whose convolutions run once for all."""
        from rcnn_svm.features.sizes import resize, rows_of_scales

        require_image("runtime", image)
        size = np.array(image.shape[:2], np.int64)
        scales = [side / max(image.shape[:2]) for side in self._longer_sides]
        seen: dict[int, dict[str, NDArray[Any]]] = {}

        def at_scale(network: SharedNetwork, i: int, boxes: Boxes) -> NDArray[np.float32]:
            if i not in seen or network._again is None:
                resized, _ = resize(image, scales[i])
                found = self._whole(image=resized, size=size, boxes=boxes)
                maps = {name: value for name, value in found.items() if name.startswith(MAP)}
                seen[i] = {"size": size, "resized": np.array(resized.shape[:2], np.int64), **maps}
                if network._direct:
                    return _rows(found)
            assert network._again is not None
            kept = {name: value for name, value in seen[i].items() if name in network._again.inputs}
            return _rows(network._again(boxes=boxes, **kept))

        def read(network: SharedNetwork, boxes: Boxes) -> NDArray[np.float32]:
            boxes = as_boxes(boxes, where="SharedNetwork")
            out = np.empty((len(boxes), network.n_features), np.float32)
            for i, rows in rows_of_scales(boxes, scales):
                out[rows] = at_scale(network, i, boxes[rows])
            return out

        return [partial(read, network) for network in (self, *others)]


class WarpedNetwork:
    """A graph of the whole network as a featurizer, see `SharedNetwork`; every region is a crop of its own.

    Args:
        graph: from crops to rows.
        n_features: of a row.
        crop_size: side of the crops in pixels.
        padding: context in pixels of the crop.
        mode: of `warp_crops`.
        fill: (3,) colour, 0 .. 255, of what lies outside the image: the network's mean.
        key: identity of the graph.
    """

    def __init__(
        self,
        graph: Graph,
        n_features: int,
        *,
        crop_size: int,
        padding: int,
        mode: WarpMode,
        fill: Sequence[float],
        key: Mapping[str, Any],
    ) -> None:
        self._graph, self._size, self.key = graph, crop_size, key
        self._settings: dict[str, Any] = {"padding": padding, "mode": mode, "fill": fill}
        self.n_features = n_features

    def __call__(self, image: Image, boxes: Boxes) -> NDArray[np.float32]:
        """Return (R, n_features) float32 rows of (R, 4) boxes."""
        return self.of_image(image)(boxes)

    def of_image(self, image: Image) -> RowReader:
        """Return the same for one image."""
        from rcnn_svm.features.warp import warp_crops

        require_image("runtime", image)
        pixels = image.astype(np.float32)  # what is read between pixels is not rounded

        def read(boxes: Boxes) -> NDArray[np.float32]:
            boxes = as_boxes(boxes, where="WarpedNetwork")
            out = np.empty((len(boxes), self.n_features), np.float32)
            for start in range(0, len(boxes), _CROPS_AT_ONCE):
                rows = slice(start, start + _CROPS_AT_ONCE)
                crops = warp_crops(pixels, boxes[rows], self._size, **self._settings)
                out[rows] = _rows(self._graph(crops=crops))
            return out

        return read


def _rows(found: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return (R, D): all that a graph says of R regions, side by side."""
    said = [value.reshape(len(value), -1) for name, value in found.items() if not name.startswith(MAP)]
    return np.concatenate(said, axis=1)


class _Scores:
    """The scores of a row of a graph."""

    kind: ClassVar[str] = "onnx"

    def __init__(self, n_classes: int) -> None:
        self._n = n_classes

    def decision_function(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        return np.asarray(features[:, : self._n], np.float32)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        return {}


class _Deltas(BoxRegressor):
    """The box deltas of a row of a graph."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self._n = n_classes

    def predict(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        return np.asarray(features[:, self._n :], np.float32).reshape(-1, self._n, 4)


class _Moves(BoxRefiner):
    """What refines boxes, of a row of a graph."""

    def __init__(self) -> None:
        """Hold nothing: the arrays are in the graph."""

    def __call__(
        self, rows: NDArray[np.floating], labels: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        own = rows.reshape(len(rows), -1, 5)[np.arange(len(rows)), labels]
        return deltas_and_overlaps(np.asarray(own, np.float32))


def find_export(folder: Path) -> Path:
    """Return the folder of an export: this one, or `onnx` in the detector's own.

    Raises:
        DataError: neither is one.
    """
    for place in (folder, folder / _INSIDE):
        if (place / MANIFEST).exists():
            return place
    raise DataError(
        f"{folder}: holds no exported detector (there is no {MANIFEST}, nor {_INSIDE}/{MANIFEST}). Make one "
        f"with `rcnn-svm export DETECTOR`."
    )


def read_export(folder: Path, *, threads: int) -> Detector:
    """Do what `rcnn_svm.runtime.load` does."""
    manifest = find_export(folder) / MANIFEST
    values = read_json(manifest)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DataError(
            f"{manifest}: must be an exported detector of format {FORMAT}, got "
            f"{values.get('format') if isinstance(values, dict) else type(values).__name__}. {_REMEDY}"
        )
    _require_same_detector(manifest, values)
    files = checked_files(manifest, values, "detector", _REMEDY)
    graphs = {name: Graph(path, threads=threads) for name, path in files.items()}
    whole = graphs["detector"]
    try:
        settings = restored(values, {}, where=str(manifest))
        n, key = len(settings["classes"]), {"onnx": values["files"]["detector"]["sha256"]}
        boxes = "deltas" in whole.outputs
        n_features = 5 * n if boxes else n
        warped, curves, refinement = values["warped"], values["calibration"], None
        sides = settings["features"].sides
        if "refine" in graphs:
            fine = SharedNetwork(whole, graphs["refine"], 5 * n, sides, key, direct=False)
            refinement = Refinement(fine, _Moves())
        network = (
            SharedNetwork(whole, graphs.get("again"), n_features, sides, key)
            if warped is None
            else WarpedNetwork(whole, n_features, key=key, **warped)
        )
        detector = Detector(
            **settings,
            backbone=None,
            featurizer=network,
            layers=None,
            model=Model(_Scores(n), None, _Deltas(n) if boxes else None, refinement=refinement),
            calibration=None if curves is None else ClassCurves.from_arrays(_arrays(curves)),
        )
        for name, graph in graphs.items():  # do the parts fit?
            if graph.n_classes != n:
                raise ShapeError(f"its {n} classes are {graph.n_classes} of {name}")
        if ("crops" in whole.inputs) != (warped is not None):
            raise ShapeError(f"its graph reads {', '.join(whole.inputs)}")
    except DataError:
        raise
    except Exception as error:  # whatever damaged settings and onnxruntime raise
        raise DataError(f"{manifest}: holds what is no exported detector ({error}). {_REMEDY}") from error
    return detector


def _require_same_detector(manifest: Path, values: Mapping[str, Any]) -> None:
    """Check that an export is of the detector whose folder it lies in, which may have been trained again.

    Raises:
        DataError: it is of another.
    """
    described = manifest.parents[1] / "detector.json"
    if manifest.parent.name != _INSIDE or not described.exists():
        return
    own = read_json(described)
    if not isinstance(own, dict) or any(values.get(name) != own[name] for name in own if name not in _OWN):
        raise DataError(
            f"{manifest}: must be of the detector in {described.parent}, got another: that was trained again "
            f"since. {_REMEDY}"
        )


def _arrays(values: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    return {name: np.array(one["values"], one["dtype"]) for name, one in values.items()}
