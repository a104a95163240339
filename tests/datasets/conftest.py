"""Builders of small data sets on disk."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Box = tuple[str, float, float, float, float]


def put_image(path: Path, size: tuple[int, int] = (40, 60), colour: int = 90) -> Path:
    """Write a plain image of (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), colour, np.uint8)).save(path)
    return path


def voc_xml(objects: list[Box], size: tuple[int, int] | None = (40, 60), difficult: int | None = 0) -> str:
    """Return an annotation; boxes as VOC writes them."""
    parts = ["<annotation>"]
    if size is not None:
        parts.append(f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>")
    for name, xmin, ymin, xmax, ymax in objects:
        flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
        parts.append(
            f"<object><name>{name}</name>{flag}<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin>"
            f"<xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>"
        )
    return "".join([*parts, "</annotation>"])


@pytest.fixture
def make_voc(tmp_path: Path) -> Callable[..., Path]:
    """Return a builder of a VOC folder: XML texts by id, ids by split."""

    def build(annotations: Mapping[str, str], splits: Mapping[str, list[str]] | None = None) -> Path:
        root = tmp_path / "set" / "VOC2007"
        (root / "Annotations").mkdir(parents=True)
        for image_id, text in annotations.items():
            (root / "Annotations" / f"{image_id}.xml").write_text(text)
            put_image(root / "JPEGImages" / f"{image_id}.jpg", colour=zlib.crc32(image_id.encode()) % 256)
        if splits is not None:
            (root / "ImageSets" / "Main").mkdir(parents=True)
            for name, ids in splits.items():
                (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(ids) + "\n")
        return root

    return build


@pytest.fixture
def make_coco(tmp_path: Path) -> Callable[..., Path]:
    """Return a builder of a COCO folder: per split a list of annotations by image name."""

    def build(
        splits: Mapping[str, Mapping[str, list[dict[str, Any]]]], categories: Mapping[int, str]
    ) -> Path:
        root = tmp_path / "coco"
        (root / "annotations").mkdir(parents=True)
        for split, images in splits.items():
            content: dict[str, list[dict[str, Any]]] = {
                "images": [],
                "annotations": [],
                "categories": [{"id": number, "name": name} for number, name in categories.items()],
            }
            for image_id, (name, objects) in enumerate(images.items(), start=101):
                put_image(root / split / name)
                content["images"].append({"id": image_id, "file_name": name, "height": 40, "width": 60})
                content["annotations"] += [{"image_id": image_id, **one} for one in objects]
            (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        return root

    return build


@pytest.fixture
def make_yolo(tmp_path: Path) -> Callable[..., Path]:
    """Return a builder of a YOLO folder: per split the label text by image stem, None for no file."""

    def build(splits: Mapping[str, Mapping[str, str | None]], yaml: str | None = None) -> Path:
        root = tmp_path / "yolo"
        for split, images in splits.items():
            for stem, text in images.items():
                put_image(root / "images" / split / f"{stem}.png")
                if text is not None:
                    file = root / "labels" / split / f"{stem}.txt"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(text)
        lines = [f"{split}: images/{split}\n" for split in splits]
        (root / "data.yaml").write_text(yaml or "".join([*lines, "names: [cat, dog]\n"]))
        return root

    return build


@pytest.fixture
def xml() -> Callable[..., str]:
    return voc_xml


@pytest.fixture
def put() -> Callable[..., Path]:
    return put_image
