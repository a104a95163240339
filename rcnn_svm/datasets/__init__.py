"""Labelled photographs from disk, and digits in scenes from none."""

from __future__ import annotations

from rcnn_svm.datasets.coco import coco_category_ids, coco_image_ids
from rcnn_svm.datasets.images import image_size, read_image
from rcnn_svm.datasets.loading import (
    Splits,
    detect_format,
    list_splits,
    load_dataset,
    load_splits,
    read_classes,
)

__all__ = [
    "Splits",
    "coco_category_ids",
    "coco_image_ids",
    "detect_format",
    "image_size",
    "list_splits",
    "load_dataset",
    "load_splits",
    "read_classes",
    "read_image",
]
