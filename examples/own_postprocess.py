"""Your own post-processing: from the scored regions of an image to detections."""

import numpy as np
from own_data import splits

from rcnn_svm import Detections, ExperimentConfig, load_detector, train_detector


def best_of_each(image_id, size, boxes, scores, deltas) -> Detections:
    """One box of each class: the region that scores highest, where it is surer than not."""
    if len(boxes) == 0:
        return Detections.empty(image_id)
    rows, labels = scores.argmax(axis=0), np.arange(scores.shape[1])
    sure = scores[rows, labels] > 0
    return Detections(image_id, boxes[rows[sure]], scores[rows, labels][sure], labels[sure])


result = train_detector(splits, ExperimentConfig(folds=0).build(postprocess=best_of_each))
result.detector.save("best-detector")
detector = load_detector("best-detector", parts={"best_of_each": best_of_each})
print(result, detector.detect(splits.test.samples[0].read()))
