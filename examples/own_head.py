"""Your own head: an estimator with `fit` and `decision_function`."""

import numpy as np
from own_data import splits

from rcnn_svm import EstimatorHead, ExperimentConfig, HeadRecipe, load_detector, train_detector


class NearestMean:
    """Scores each class by the distance to its mean; the background is the last class."""

    def fit(self, X, y):
        self.means = np.stack([X[y == k].mean(axis=0) for k in np.unique(y)])
        return self

    def decision_function(self, X):
        return -np.linalg.norm(X[:, None] - self.means, axis=2)

    def to_arrays(self):
        return {"means": self.means}

    @classmethod
    def from_arrays(cls, arrays):
        mine = cls()
        mine.means = arrays["means"]
        return mine


head = HeadRecipe("nearest-mean", EstimatorHead(name="nearest-mean", estimator=NearestMean()))
result = train_detector(splits, ExperimentConfig(folds=0).build(heads=[head]))
result.detector.save("nearest-mean-detector")
print(result, load_detector("nearest-mean-detector", parts={"nearest-mean": NearestMean}))
