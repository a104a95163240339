"""What outsiders read in the same files: torchvision, pycocotools, supervision, OpenCV and Pillow."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from rcnn_svm.datasets import load_dataset, read_image
from rcnn_svm.datasets.write import write_dataset
from rcnn_svm.structures import Dataset, GroundTruth, Sample

CLASSES = ("disc", "bar")


def sample(i: int) -> Sample:
    rng = np.random.default_rng(i)
    corner = rng.integers(0, 30, (2, 2)).astype(np.float32)
    boxes = np.concatenate([corner, corner + rng.integers(5, 30, (2, 2))], axis=1).astype(np.float32)
    pixels = rng.integers(0, 256, (60, 80, 3), np.uint8)
    return Sample(f"im{i}", (60, 80), GroundTruth(boxes, np.array([i % 2, 1])), render=lambda: pixels)


@pytest.fixture(scope="module")
def parts() -> list[Dataset]:
    return [
        Dataset("made", split, CLASSES, tuple(sample(i) for i in ids))
        for split, ids in (("train", range(4)), ("test", range(4, 6)))
    ]


def by_name(boxes, names) -> list[tuple]:
    return sorted((str(name), *np.round(box, 3).tolist()) for box, name in zip(boxes, names, strict=True))


def ours(one: Sample, classes) -> list[tuple]:
    return by_name(one.truth.boxes, [classes[k] for k in one.truth.labels])


def test_voc_as_torchvision_parses_it(parts, tmp_path: Path) -> None:
    from torchvision.datasets import VOCDetection

    root = tmp_path / "VOCdevkit" / "VOC2007"
    write_dataset(parts, root.parent, "voc", encoding="jpg")
    theirs = VOCDetection(str(tmp_path), year="2007", image_set="train")
    dataset = load_dataset(root, "train")
    assert len(theirs) == len(dataset)
    for (picture, target), own in zip(theirs, dataset, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), own.read())
        objects = target["annotation"]["object"]
        # Theirs are the numbers of the file, 1-based and inclusive.
        boxes = [[float(o["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
        half_open = np.array(boxes) - [1, 1, 0, 0]
        assert by_name(half_open, [o["name"] for o in objects]) == ours(own, dataset.classes)


def test_coco_as_pycocotools_parses_it(parts, tmp_path: Path) -> None:
    coco_module = pytest.importorskip("pycocotools.coco")
    write_dataset(parts, tmp_path, "coco")
    (file,) = (tmp_path / "annotations").glob("*train*.json")
    theirs, dataset = coco_module.COCO(str(file)), load_dataset(tmp_path, "train")
    names = {one["id"]: one["name"] for one in theirs.loadCats(theirs.getCatIds())}
    images = {Path(one["file_name"]).stem: one["id"] for one in theirs.loadImgs(theirs.getImgIds())}
    assert sorted(images) == sorted(own.image_id for own in dataset)
    for own in dataset:
        found = theirs.loadAnns(theirs.getAnnIds(images[own.image_id]))
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in found)]
        assert by_name(boxes, [names[one["category_id"]] for one in found]) == ours(own, dataset.classes)


@pytest.mark.parametrize("format", ["coco", "yolo", "voc"])
def test_as_supervision_parses_it(parts, tmp_path: Path, format: str) -> None:
    supervision = pytest.importorskip("supervision")
    root = write_dataset(parts, tmp_path, format)
    dataset = load_dataset(root, "train")
    if format == "coco":
        (file,) = (tmp_path / "annotations").glob("*train*.json")
        theirs = supervision.DetectionDataset.from_coco(str(tmp_path / "images"), str(file))
    elif format == "yolo":
        folders = (str(tmp_path / kind / "train") for kind in ("images", "labels"))
        theirs = supervision.DetectionDataset.from_yolo(*folders, str(tmp_path / "data.yaml"))
    else:
        pytest.skip("supervision takes 1 off all four corners of VOC boxes, which then are a pixel short")
    own = {one.image_id: ours(one, dataset.classes) for one in dataset}
    for path, _, found in theirs:
        names = [theirs.classes[k] for k in found.class_id]
        close = by_name(found.xyxy, names)
        for mine, other in zip(own[Path(path).stem], close, strict=True):
            assert mine[0] == other[0]
            np.testing.assert_allclose(mine[1:], other[1:], atol=0.01)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_pixels_as_pillow_turns_them(tmp_path: Path, suffix: str, orientation: int) -> None:
    rng = np.random.default_rng(orientation)
    picture = Image.fromarray(rng.integers(0, 256, (20, 34, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    picture.save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    np.testing.assert_array_equal(read_image(path), expected)


def test_pixels_as_opencv_reads_them(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (21, 33, 3), np.uint8)
    for suffix in (".png", ".bmp", ".ppm", ".tiff"):
        path = tmp_path / f"a{suffix}"
        assert cv2.imwrite(str(path), pixels)
        np.testing.assert_array_equal(read_image(path), cv2.imread(str(path))[:, :, ::-1])
