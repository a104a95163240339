"""A detector that `rcnn-svm export` wrote, run without torch and scikit-learn.

    from rcnn_svm.runtime import load

    found = load("detector/onnx")(image)

The network, RoIAlign, scores and box regression are one ONNX graph, which ONNX Runtime runs. Proposals and
what makes detections of scores are the same code as ever. It needs numpy, numba, OpenCV and onnxruntime,
which are loaded with the first detector.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from rcnn_svm.detector import Detector

__all__ = ["MANIFEST", "REQUIREMENTS", "Precision", "load"]

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
MANIFEST = "runtime.json"
"""The file that makes a folder an exported detector; written last."""
REQUIREMENTS = (
    "numba>=0.60",
    "numpy>=1.26",
    "onnxruntime>=1.17",
    "opencv-python-headless>=4.8",
    "joblib>=1.3",
    "pillow>=10",
    "pyyaml>=6",
    "tqdm>=4.66",
)
"""All that is needed where torch is not: the first four from Python, the others by the command as well."""


def load(folder: str | Path, *, threads: int = 0) -> Detector:
    """Read a detector that `rcnn-svm export` wrote; it neither needs nor loads torch.

    Args:
        folder: of the export, or of the detector that has it in `onnx`.
        threads: that ONNX Runtime gives one image; 0 for every core.

    Returns:
        A `Detector` that finds what the one that was exported finds; it cannot be saved or explained.

    Raises:
        DataError: no export lies there, or a file of it is damaged.
        DependencyError: onnxruntime is missing.
    """
    from rcnn_svm.runtime.networks import read_export

    return read_export(Path(folder), threads=threads)
