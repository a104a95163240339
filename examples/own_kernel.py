"""Your own kernel: a function of two matrices. A polynomial and an intersection kernel are ready-made."""

import numpy as np
from own_data import splits
from scipy.spatial.distance import cdist

from rcnn_svm import (
    ExperimentConfig,
    HeadRecipe,
    HistogramIntersection,
    KernelSVMHead,
    Polynomial,
    Run,
    load_detector,
    run_experiment,
)


def laplacian(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """exp(-|x - v| / 4) by the sum of absolute differences."""
    return np.exp(-cdist(x, v, "cityblock") / 4)


kernels = [Polynomial(degree=3), HistogramIntersection(), laplacian]
heads = [HeadRecipe(name, KernelSVMHead(kernel=kernel, max_rows=800))
         for name, kernel in zip(("cubic", "intersection", "laplacian"), kernels, strict=True)]  # fmt: skip
experiment = run_experiment(ExperimentConfig(folds=0).build(heads=heads), splits, Run("kernels-cache"))
for name, result in experiment.heads.items():
    result.detector.save(f"{name}-detector")
    again = load_detector(f"{name}-detector", parts={"laplacian": laplacian})
    print(name, result, again)
