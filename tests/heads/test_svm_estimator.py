from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from rcnn_svm.errors import ConfigError
from rcnn_svm.heads.estimator import LinearSVM


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([LinearSVM()])
def test_convention(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge"])
def test_digits_as_linear_svc(loss: str) -> None:
    x, y = load_digits(return_X_y=True)
    x = x / 16
    ours = LinearSVM(C=0.1, loss=loss, bias_scale=2.0, tol=1e-6).fit(x, y)
    theirs = LinearSVC(
        C=0.1, loss=loss, dual=True, tol=1e-8, intercept_scaling=2.0, max_iter=10**6, random_state=0
    ).fit(x, y)
    np.testing.assert_allclose(ours.decision_function(x), theirs.decision_function(x), atol=0.01)
    assert (ours.predict(x) == theirs.predict(x)).mean() > 0.999
    assert (ours.gap_ <= 1e-6).all()


def test_binary_keeps_the_shapes_of_scikit_learn(rng: np.random.Generator) -> None:
    x = rng.normal(size=(60, 3)).astype(np.float32)
    model = LinearSVM().fit(x, np.where(x[:, 0] > 0, "yes", "no"))
    assert model.coef_.shape == (1, 3)
    assert model.coef_.dtype == np.float32
    assert model.decision_function(x).shape == (60,)
    assert set(model.predict(x)) == {"yes", "no"}


def test_messages(rng: np.random.Generator) -> None:
    x = rng.normal(size=(60, 3))
    y = np.where(x[:, 0] + rng.normal(size=60) > 0, 1, 0)
    with pytest.raises(ConfigError, match=r"^LinearSVM: C must be a finite number > 0, got 0\.$"):
        LinearSVM(C=0).fit(x, y)
    with pytest.raises(
        ValueError, match=r"^LinearSVM: y must hold at least two classes, got one class: 1\.$"
    ):
        LinearSVM().fit(x, np.ones(60, int))
    with pytest.warns(ConvergenceWarning, match="above tol=1e-15"):
        LinearSVM(tol=1e-15, max_passes=1).fit(x, y)
