"""Video files frame by frame, decoded by OpenCV."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from rcnn_svm.errors import DataError
from rcnn_svm.files import atomic_path
from rcnn_svm.structures import GroundTruth, Image, Sample

__all__ = ["VIDEO_SUFFIXES", "Video", "writing_video"]

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
"""File name endings, in lower case, that mark a video."""
_PLAIN_RATE = 25.0  # frames a second, where a file does not say


class Video:
    """A video that is read from its first frame to its last, inside a `with` block.

    Attributes:
        path: of the file.
        rate: frames a second.
        n_frames: that the file announces; 0 where it does not say.
        n_read: frames that were decoded so far.

    Raises:
        DataError: the file is missing or no video.
    """

    def __init__(self, path: Path) -> None:
        from rcnn_svm.opencv import cv2

        if not path.is_file():
            raise DataError(f"{path}: no such video file.")
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # it would write to stderr by itself
        self.path, self.n_read = path, 0
        self._capture = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG)  # a full path is no address
        if not self._capture.isOpened():
            raise DataError(f"{path}: is no video that can be read, or is cut off. Replace it.")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = float(rate) if np.isfinite(rate) and 0 < rate <= 1000 else _PLAIN_RATE
        self.n_frames = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.release()

    def frames(self) -> Iterator[Sample]:
        """Yield the frames that are left, known by their number from 000000 on."""
        while True:
            there, pixels = self._capture.read()
            if not there:
                return
            frame = np.ascontiguousarray(pixels[:, :, ::-1], np.uint8)
            name = f"{self.n_read:06d}"
            self.n_read += 1
            yield Sample(name, frame.shape[:2], GroundTruth.empty(), render=_constant(frame))

    def broken_off(self) -> str | None:
        """Say where a video that was read ended too early; None where it did not.

        What files announce is an estimate in some formats: up to a second of it may be missing.
        """
        if not self.n_read:
            return f"{self.path}: holds no frame that can be read. Replace it."
        if self.n_frames - self.n_read <= self.rate:
            return None
        return f"{self.path}: breaks off after {self.n_read} of {self.n_frames} frames."


def _constant(frame: Image) -> Callable[[], Image]:
    return lambda: frame


@contextlib.contextmanager
def writing_video(path: Path, rate: float) -> Iterator[Callable[[Image], None]]:
    """Yield what adds a frame, uint8 (H, W, 3) RGB, all of one size, to an MP4; it is there after the block.

    Args:
        path: of the file.
        rate: frames a second.

    Raises:
        DataError: this OpenCV cannot encode, or the folder cannot be written to.
        DiskSpaceError: the disk is full.
    """
    from rcnn_svm.opencv import cv2

    with atomic_path(path, apart=True) as temporary:
        working = temporary.with_name("working.mp4")  # the suffix says how it is encoded
        writer = cv2.VideoWriter()

        def add(frame: Image) -> None:
            size = (frame.shape[1], frame.shape[0])
            if not writer.isOpened():
                writer.open(str(working), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
            if not writer.isOpened():
                raise DataError(f"{path}: this OpenCV cannot encode videos. Run it with --no-pictures.")
            writer.write(np.ascontiguousarray(frame[:, :, ::-1]))

        try:
            yield add
        finally:
            writer.release()
        os.replace(working, temporary)
