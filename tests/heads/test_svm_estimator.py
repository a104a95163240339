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
@parametrize_with_checks(
    [LinearSVM()],
    # As scikit-learn says of LinearSVC: two fits of one problem agree to the tolerance, not to 1e-7.
    expected_failed_checks=lambda _: {"check_sample_weight_equivalence_on_dense_data": "tolerance"},
)
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


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge"])
@pytest.mark.parametrize("class_weight", [None, {2: 3.0, 7: 0.2}, "balanced"])
@pytest.mark.parametrize("n_classes", [2, 10])
def test_weights_as_linear_svc(
    loss: str, class_weight: Any, n_classes: int, rng: np.random.Generator
) -> None:
    x, y = load_digits(n_class=10, return_X_y=True)
    kept = np.flatnonzero(np.isin(y, [2, 7]) if n_classes == 2 else rng.random(len(y)) < 0.3)
    x, y = x[kept] / 16 + rng.normal(0, 0.3, (len(kept), 64)), y[kept]
    weight = rng.choice([0.0, 0.5, 1.0, 4.0], len(x))
    ours = LinearSVM(C=0.1, loss=loss, bias_scale=2.0, tol=1e-7, class_weight=class_weight, max_passes=100)
    theirs = LinearSVC(
        C=0.1, loss=loss, dual=True, tol=1e-8, intercept_scaling=2.0, max_iter=10**6, random_state=0,
        class_weight=class_weight,
    )  # fmt: skip
    ours.fit(x, y, sample_weight=weight)
    theirs.fit(x, y, sample_weight=weight)
    np.testing.assert_allclose(ours.decision_function(x), theirs.decision_function(x), atol=3e-3)
    assert (ours.gap_ <= 1e-7).all()
    plain = LinearSVC(C=0.1, loss=loss, dual=True, tol=1e-8, intercept_scaling=2.0, max_iter=10**6).fit(x, y)
    assert np.abs(plain.decision_function(x) - theirs.decision_function(x)).max() > 0.1


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge"])
def test_a_weight_of_two_is_the_row_twice_and_of_zero_no_row(loss: str, rng: np.random.Generator) -> None:
    x = rng.normal(size=(200, 8))
    y = (x[:, 0] + rng.normal(size=200) > 0).astype(int) + (x[:, 1] > 1)
    weight = rng.integers(0, 3, 200)
    options: dict[str, Any] = {"loss": loss, "tol": 1e-8, "max_passes": 100, "class_weight": "balanced"}
    weighted = LinearSVM(**options).fit(x, y, sample_weight=weight)
    repeated = LinearSVM(**options).fit(np.repeat(x, weight, axis=0), np.repeat(y, weight))
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, atol=1e-3)
    np.testing.assert_allclose(weighted.objective_, repeated.objective_, rtol=1e-6)


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
    with pytest.raises(
        ConfigError, match=r"^LinearSVM: class_weight\[0\] must be a finite number > 0, got 0\.0\.$"
    ):
        LinearSVM(class_weight={0: 0}).fit(x, y)
    with pytest.raises(ValueError, match="Negative values in data passed to `sample_weight`"):
        LinearSVM().fit(x, y, sample_weight=-np.ones(60))
    with pytest.warns(ConvergenceWarning, match="above tol=1e-15"):
        LinearSVM(tol=1e-15, max_passes=1).fit(x, y)
