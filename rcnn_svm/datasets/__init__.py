"""Labelled photographs from disk, and digits in scenes from none.

`load_dataset` and `load_splits` read Pascal VOC, COCO and YOLO folders, and whole images in a folder per
class or in a CSV; `write_dataset` writes the first three, `check_dataset` reports on all. `digits_in_scenes`
and `digits_images` are embedded data sets.
"""

from __future__ import annotations

from rcnn_svm.datasets.check import CheckReport, check_dataset
from rcnn_svm.datasets.coco import coco_category_ids, coco_image_ids
from rcnn_svm.datasets.digits import digits_images, digits_in_scenes, digits_splits
from rcnn_svm.datasets.drawing import draw_folds
from rcnn_svm.datasets.held_out import images_to_measure
from rcnn_svm.datasets.images import image_size, read_image
from rcnn_svm.datasets.loading import (
    Splits,
    detect_format,
    holds_dataset,
    labels_whole_images,
    list_splits,
    load_dataset,
    load_splits,
    read_classes,
)
from rcnn_svm.datasets.split_record import SplitRecord
from rcnn_svm.datasets.write import write_dataset

__all__ = [
    "CheckReport",
    "SplitRecord",
    "Splits",
    "check_dataset",
    "coco_category_ids",
    "coco_image_ids",
    "detect_format",
    "digits_images",
    "digits_in_scenes",
    "digits_splits",
    "draw_folds",
    "holds_dataset",
    "image_size",
    "images_to_measure",
    "labels_whole_images",
    "list_splits",
    "load_dataset",
    "load_splits",
    "read_classes",
    "read_image",
    "write_dataset",
]
