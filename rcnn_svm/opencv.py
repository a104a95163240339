"""The one door to OpenCV: any of its four packages serves, and a failed import says what to install."""

from __future__ import annotations

from rcnn_svm.errors import DependencyError

try:
    import cv2
except ImportError as error:
    raise DependencyError(
        f"OpenCV cannot be imported ({error}). On a machine without a screen run "
        "`pip uninstall -y opencv-python` and `pip install opencv-python-headless`; elsewhere "
        "`pip install opencv-python`. Either contrib build serves as well."
    ) from error

__all__ = ["cv2"]
