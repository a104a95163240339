"""Videos that `detect` is given: what is found in each frame, and the video with it drawn on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcnn_svm.cli.using import Shown, Surest
from rcnn_svm.errors import DataError
from rcnn_svm.progress import emit, say, track

if TYPE_CHECKING:
    from rcnn_svm.detector import Detector
    from rcnn_svm.structures import Detections, Sample

__all__ = ["detect_videos"]


def detect_videos(
    paths: Sequence[Path], out: Path, detector: Detector, shown: Shown, made_by: Mapping[str, Any]
) -> None:
    """Find objects in every frame of videos: `NAME.frames.jsonl`, and `NAME.mp4` with what was found.

    Frames that an earlier run finished are not looked at again. The frames of a video that breaks off are
    kept, and the next video follows.

    Args:
        paths: of the videos.
        out: where results go.
        detector: what looks.
        shown: which detections are shown.
        made_by: what they depend on but the frame; `pictures` says whether videos are drawn.

    Raises:
        ConfigError: a result would take the place of a video.
        DataError: a video cannot be read or breaks off; said once all are done.
    """
    from rcnn_svm.cli.images import refuse_to_overwrite
    from rcnn_svm.datasets.layout import image_ids
    from rcnn_svm.files import inside

    names = image_ids(paths)
    refuse_to_overwrite([inside(out, name, ".mp4") for name in names.values()], paths)
    broken = []
    for path in names:
        try:
            _detect_video(path, inside(out, names[path], ""), detector, shown, made_by)
        except DataError as error:
            say(f"{error}")
            broken.append(error)
    if broken:
        raise DataError(f"{len(broken)} of {len(names)} videos could not be read to their end. {broken[0]}")


def _detect_video(
    path: Path, stem: Path, detector: Detector, shown: Shown, made_by: Mapping[str, Any]
) -> None:
    from rcnn_svm.datasets.video import Video, writing_video
    from rcnn_svm.evaluation.exchange import DetectionLines
    from rcnn_svm.report.draw import draw_detections
    from rcnn_svm.threads import images_at_once, in_order

    with Video(path) as video:
        head = {**made_by, "frames_per_second": video.rate}
        lines = DetectionLines(stem.with_name(f"{stem.name}.frames.jsonl"), detector.classes, head)
        before = dict(lines.done)
        surest = Surest(shown, detector.classes)

        def look(sample: Sample) -> tuple[Sample, Detections, bool]:
            image, found = before.get(sample.image_id, ("", None))
            if found is not None and image == sample.digest():
                return sample, found, True
            return sample, detector.detect(sample.read(), sample.image_id), False

        n_found = 0
        with contextlib.ExitStack() as stack:
            draw = None
            if made_by["pictures"]:
                draw = stack.enter_context(writing_video(stem.with_name(f"{stem.name}.mp4"), video.rate))
            frames = in_order(look, video.frames(), images_at_once())
            for sample, everything, known in track(
                frames, "detect", total=video.n_frames or None, unit="frame"
            ):
                found = everything
                if not known:
                    surest.see(everything)
                    found = everything[shown.rows(everything)]
                    lines.add(found, sample.digest())
                if draw is not None:
                    draw(draw_detections(sample.read(), found, detector.classes))
                n_found += len(found)
            if not video.n_read:
                raise DataError(f"{path}: holds no frame that can be read. Replace it.")
        emit(f"{path}: {n_found} detections in {video.n_read} frames")
        if not n_found:
            surest.tell()
        if (words := video.broken_off()) is not None:
            raise DataError(words)
