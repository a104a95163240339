"""Data sets back to disk, in the three formats of boxes that the readers read.

What a format cannot hold is said, not hidden:

* VOC has whole pixels: boxes are rounded, and kept two pixels wide and high, since the reader takes one
  pixel for a click without a drag. Crowd regions become `difficult`.
* COCO keeps all else; `difficult` is an extra field of the annotation.
* YOLO has neither `difficult` nor crowd: such objects become plain ones, with one line that counts them.
* VOC and YOLO have no area but the box's, COCO and YOLO no flags such as `truncated`.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args
from xml.etree import ElementTree

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image as pillow

from rcnn_svm.boxes import Boxes, round_half_away
from rcnn_svm.datasets.images import IMAGE_SUFFIXES, image_size
from rcnn_svm.errors import ConfigError, DataError, DiskSpaceError
from rcnn_svm.progress import say, track
from rcnn_svm.structures import Dataset, Sample

__all__ = ["BoxFormat", "coco_records", "voc_xml", "whole_pixels", "write_dataset", "yolo_rows"]

BoxFormat = Literal["voc", "coco", "yolo"]
Encoding = Literal["png", "jpg"]
_PutImage = Callable[..., Path]
"""(sample, stem, sized=) -> the file that it was written to."""
_JPEG_QUALITY = 95


def write_dataset(
    splits: Mapping[str, Dataset] | Iterable[Dataset],
    root: str | Path,
    format: BoxFormat = "voc",
    *,
    encoding: Encoding = "png",
    link: bool = False,
) -> Path:
    """Write splits as one data set that `load_splits` reads back.

    VOC goes to `root/VOC2007` with a `classes.txt` that keeps the order of classes, COCO to
    `annotations/instances_SPLIT.json` and `images/`, YOLO to `data.yaml`, `images/SPLIT` and
    `labels/SPLIT`. Image files are copied byte for byte, rendered images are encoded. A split
    `trainval` beside train and val is not written twice: readers put it together from the two.

    Args:
        splits: by name, or data sets whose `split` is their name; all of the same classes.
        root: a folder that is absent or empty. It appears only once everything in it is whole.
        format: `voc`, `coco` or `yolo`.
        encoding: of rendered images: `png` keeps every pixel, `jpg` (quality 95) is smaller.
        link: make hard links to image files instead of copies: the same file under a second name, which takes
            no room and stays where the first is removed.

    Returns:
        `root`.

    Raises:
        ConfigError: an unknown format or encoding, a folder that is not empty, no splits, classes that
            differ, or an id that stands for different images.
        DataError: an image cannot be read.
        DiskSpaceError: the disk is full.
    """
    formats = get_args(BoxFormat)
    if format not in formats:
        raise ConfigError(f"write_dataset: format must be one of {', '.join(formats)}, got {format!r}.")
    if encoding not in get_args(Encoding):
        raise ConfigError(f"write_dataset: encoding must be png or jpg, got {encoding!r}.")
    parts = dict(splits) if isinstance(splits, Mapping) else {part.split: part for part in splits}
    if {"train", "val"} <= parts.keys():
        parts.pop("trainval", None)
    root = Path(root)
    _check(parts, root)
    try:
        root.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{root.name}.", suffix=".part", dir=root.absolute().parent)
        )
    except OSError as error:
        raise _failure(root, error) from error
    put = functools.partial(_put_image, encoding=encoding, link=link)
    try:
        {"voc": _write_voc, "coco": _write_coco, "yolo": _write_yolo}[format](parts, temporary, put)
        os.chmod(temporary, 0o755)
        os.replace(temporary, root)  # takes the place of an empty folder
    except OSError as error:
        raise _failure(root, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def _failure(root: Path, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(
            f"{root}: the disk is full; nothing was kept. Free some space or choose another folder."
        )
    return DataError(f"{root}: cannot be written ({error.strerror or error}). Choose another folder.")


def _check(parts: Mapping[str, Dataset], root: Path) -> None:
    if not parts:
        raise ConfigError("write_dataset: splits must name at least one data set, got none.")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(
            f"{root}: must be an empty or a new folder, is not. Remove it or choose another one."
        )
    if len({part.classes for part in parts.values()}) > 1:
        raise ConfigError(f"write_dataset: the splits {', '.join(parts)} must have the same classes.")
    first: dict[str, Sample] = {}
    for part in parts.values():
        for sample in part:
            other = first.setdefault(_file_name(sample), sample)
            if other is not sample and (other.path is None or other.path != sample.path):
                raise ConfigError(
                    f"write_dataset: image id {sample.image_id!r} must stand for one image, stands for two."
                )


def _file_name(sample: Sample) -> str:
    """Return the id as one flat file name without suffix."""
    return sample.image_id.replace("/", "_").replace("\\", "_")


def _put_image(
    sample: Sample, stem: Path, *, encoding: Encoding, link: bool = False, sized: bool = True
) -> Path:
    """Copy, link or encode the image as `stem` plus suffix; written once where splits share it.

    Args:
        sample: the image.
        stem: of the new file, without suffix.
        encoding: of pixels that have no file.
        link: do not copy a file, link to it.
        sized: labels state the size; where they do not, a file whose upright size is another than the
            sample's is encoded anew.
    """
    suffix = sample.path.suffix if sample.path is not None else ""
    copied = suffix.lower() in IMAGE_SUFFIXES and sample.path is not None
    if copied and not sized and sample.path is not None:
        copied = image_size(sample.path) == sample.size
    target = stem.with_name(stem.name + (suffix if copied else f".{encoding}"))
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    if copied and sample.path is not None:
        try:
            if link:
                os.link(sample.path.resolve(strict=True), target)
            else:
                shutil.copyfile(sample.path, target)
        except FileNotFoundError as error:
            raise DataError(f"{sample.path}: no such image file.") from error
        except OSError as error:
            if not link or error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(
                f"{sample.path}: cannot be linked from {target.parent.parent.parent} ({error.strerror}), as "
                f"on another file system. Copy the images (--copy), or write to the same one."
            ) from error
    elif encoding == "png":
        pillow.fromarray(sample.read()).save(target, compress_level=1)
    else:
        pillow.fromarray(sample.read()).save(target, quality=_JPEG_QUALITY, subsampling=0)
    return target


def _write_voc(parts: Mapping[str, Dataset], root: Path, put: _PutImage) -> None:
    folder = root / "VOC2007"
    for name, part in parts.items():
        for sample in track(part, f"write {name}"):
            image = put(sample, folder / "JPEGImages" / _file_name(sample))
            truth = sample.truth
            names = [part.classes[k] for k in truth.labels]
            flags = {**truth.flags, "difficult": truth.difficult | truth.crowd}
            more = [{name: int(flag[g]) for name, flag in flags.items()} for g in range(len(truth))]
            text = voc_xml(image.name, sample.size, truth.boxes, names, more, least=2)
            _put(folder / "Annotations" / f"{_file_name(sample)}.xml", text)
        ids = [_file_name(sample) for sample in part]
        _put(folder / "ImageSets" / "Main" / f"{name}.txt", "\n".join(ids) + "\n")
    if {"train", "val"} <= parts.keys():
        both = sorted(_file_name(sample) for name in ("train", "val") for sample in parts[name])
        _put(folder / "ImageSets" / "Main" / "trainval.txt", "\n".join(both) + "\n")
    _put(folder / "classes.txt", "\n".join(next(iter(parts.values())).classes) + "\n")


def voc_xml(
    file_name: str,
    size: tuple[int, int],
    boxes: Boxes,
    names: Sequence[str],
    more: Sequence[Mapping[str, object]],
    *,
    least: int = 1,
) -> str:
    """Return the annotation of an image as Pascal VOC writes it: pixels are counted from 1, both ends inside.

    Args:
        file_name: of the image.
        size: (height, width).
        boxes: (N, 4) half-open pixels, which are rounded and kept inside the image.
        names: the class of each.
        more: further elements of each object, or others in place of those that it has.
        least: pixels that a box is kept wide and high.

    Raises:
        DataError: the image is smaller than that.
    """
    height, width = size
    tree = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, **children: object) -> None:
        for tag, value in children.items():
            ElementTree.SubElement(parent, tag).text = str(value)

    add(tree, folder="VOC2007", filename=file_name)
    add(ElementTree.SubElement(tree, "size"), width=width, height=height, depth=3)
    for box, name, own in zip(_whole_pixels(boxes, size, least, file_name), names, more, strict=True):
        element = ElementTree.SubElement(tree, "object")
        add(element, **({"name": name, "pose": "Unspecified", "truncated": 0, "difficult": 0} | dict(own)))
        x1, y1, x2, y2 = box.tolist()
        add(ElementTree.SubElement(element, "bndbox"), xmin=x1 + 1, ymin=y1 + 1, xmax=x2, ymax=y2)
    ElementTree.indent(tree)
    return ElementTree.tostring(tree, encoding="unicode") + "\n"


def whole_pixels(sample: Sample) -> NDArray[np.int64]:
    """Return the boxes of a sample as VOC gets them: (G, 4) whole half-open pixels, at least two each way."""
    return _whole_pixels(sample.truth.boxes, sample.size, 2, f"Sample({sample.image_id!r})")


def _whole_pixels(boxes: Boxes, size: tuple[int, int], least: int, image: str) -> NDArray[np.int64]:
    """Round boxes to whole pixels inside an image, at least so many each way; (N, 4) half-open."""
    whole = round_half_away(boxes).reshape(-1, 4)
    for low, high, side in ((0, 2, size[1]), (1, 3, size[0])):
        if len(whole) and side < least:
            raise DataError(f"{image}: must be {least} or more pixels wide and high for VOC, got {size}.")
        whole[:, low] = np.clip(whole[:, low], 0, max(side - least, 0))
        whole[:, high] = np.clip(whole[:, high], whole[:, low] + least, max(side, least))
    return whole


def _write_coco(parts: Mapping[str, Dataset], root: Path, put: _PutImage) -> None:
    for name, part in parts.items():
        files = [
            put(sample, root / "images" / _file_name(sample)).name for sample in track(part, f"write {name}")
        ]
        content = coco_records(part.samples, files, part.classes)
        _put(root / "annotations" / f"instances_{name}.json", json.dumps(content) + "\n")


def coco_records(
    samples: Iterable[Sample], files: Iterable[str], classes: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Return the images, annotations and categories of a COCO JSON; all three are numbered from 1.

    Args:
        samples: the images.
        files: the name of each image's file.
        classes: K names, of which label k is category k + 1.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for sample, file in zip(samples, files, strict=True):
        height, width = sample.size
        images.append({"id": len(images) + 1, "file_name": file, "height": height, "width": width})
        truth = sample.truth
        for box, label, difficult, crowd, area in zip(
            truth.boxes.astype(np.float64),
            truth.labels,
            truth.difficult,
            truth.crowd,
            truth.area,
            strict=True,
        ):
            x1, y1, x2, y2 = box.tolist()
            record: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": len(images),
                "category_id": int(label) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(area),
                "iscrowd": int(crowd),
            }
            annotations.append(record | ({"difficult": 1} if difficult else {}))
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _write_yolo(parts: Mapping[str, Dataset], root: Path, put: _PutImage) -> None:
    n_flagged = 0
    for name, part in parts.items():
        (root / "images" / name).mkdir(parents=True)
        for sample in track(part, f"write {name}"):
            stem = _file_name(sample)
            put(sample, root / "images" / name / stem, sized=False)
            text = yolo_rows(sample.truth.boxes, sample.truth.labels, sample.size)
            _put(root / "labels" / name / f"{stem}.txt", text)
            n_flagged += int((sample.truth.difficult | sample.truth.crowd).sum())
    config: dict[str, Any] = {name: f"images/{name}" for name in parts}
    config["names"] = dict(enumerate(next(iter(parts.values())).classes))
    _put(root / "data.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    if n_flagged:
        say(f"YOLO has no flags: {n_flagged} difficult or crowd objects were written as plain ones.")


def yolo_rows(
    boxes: Boxes,
    labels: NDArray[np.int64],
    size: tuple[int, int],
    confidences: NDArray[np.floating] | None = None,
) -> str:
    """Return a line for each of N boxes: class, centre and sides in shares of the image, and its confidence.

    Args:
        boxes: (N, 4) half-open pixels.
        labels: (N,).
        size: (height, width) of the image.
        confidences: (N,), or None for labels, which have none.
    """
    height, width = size
    b = boxes.astype(np.float64) / (width, height, width, height)
    columns = [(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]]
    if confidences is not None:
        columns.append(confidences.astype(np.float64)[:, None])
    rows = np.concatenate(columns, axis=1).tolist()
    return "".join(
        f"{label} {' '.join(map(repr, row))}\n" for label, row in zip(labels.tolist(), rows, strict=True)
    )


def _put(file: Path, text: str) -> None:
    """Write a text file into the folder that is not public yet; no further care is needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
