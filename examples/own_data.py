"""Your own images and labels: anything that can be read or drawn becomes a data set."""

import numpy as np

from rcnn_svm import Dataset, GroundTruth, Sample, Splits


def scene(seed: int) -> Sample:
    """A grey image with a bright square and a dark disc of chance sizes and places."""
    rng = np.random.default_rng(seed)
    sides, places = rng.integers(24, 44, 2), rng.integers([0, 64], [20, 84], 2)
    boxes = [[x, 20, x + side, 20 + side] for x, side in zip(places, sides, strict=True)]

    def draw() -> np.ndarray:
        image = np.full((96, 128, 3), 127, np.uint8) + rng.integers(0, 9, (96, 128, 3), np.uint8)
        (x, y, right, bottom), (left, top, *_), radius = *boxes, sides[1] / 2
        image[y:bottom, x:right] = 230
        rows, columns = np.mgrid[:96, :128]
        image[np.hypot(columns - left - radius, rows - top - radius) < radius] = 20
        return image

    return Sample(f"scene{seed}", (96, 128), GroundTruth(np.float32(boxes), np.array([0, 1])), render=draw)


def part(split: str, first: int, n: int) -> Dataset:
    """Scenes from number `first` on."""
    return Dataset("scenes", split, ("square", "disc"), tuple(scene(first + i) for i in range(n)))


splits = Splits(part("train", 0, 12), part("val", 12, 4), part("trainval", 0, 16), part("test", 16, 6))

if __name__ == "__main__":
    from rcnn_svm import ExperimentConfig, train_detector

    result = train_detector(splits, ExperimentConfig(folds=0).build())
    print(result)
