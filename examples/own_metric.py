"""Your own metric: a function of detections and objects; the report gets a column of it."""

import numpy as np
from own_data import splits

from rcnn_svm import ExperimentConfig, Run, run_experiment
from rcnn_svm.report.experiment import write_experiment


def counts(detections, truths, classes):
    """By how many the number of sure boxes is off, in the mean over the images."""
    pairs = zip(detections, truths, strict=True)
    return {"count error": np.mean([abs((found.scores > 0).sum() - len(truth)) for found, truth in pairs])}


experiment = run_experiment(ExperimentConfig(folds=0).build(evaluators=[counts]), splits, Run("metric-cache"))
write_experiment("metric-report", experiment, command="python own_metric.py")
print(open("metric-report/README.md").read())
