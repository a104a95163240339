"""Power laws through learning curves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.forecast import PowerLaw, forecast

N = [20.0, 40.0, 60.0, 100.0, 200.0, 500.0]


@given(st.floats(0.3, 0.95), st.floats(0.1, 2.0), st.sampled_from([0.25, 0.5, 1.0]))
@settings(max_examples=30, deadline=None)
def test_a_law_is_found_again(limit: float, gain: float, rate: float) -> None:
    law = PowerLaw(limit, gain, rate)
    found = PowerLaw.fit(N, law(N))
    np.testing.assert_allclose(found(N), law(N), atol=1e-9)
    np.testing.assert_allclose(found([1000, 4000]), law([1000, 4000]), atol=1e-6)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_no_law_falls_or_leaves_the_measure(values: list[float]) -> None:
    law = PowerLaw.fit(N[:4], values)
    far = law(np.geomspace(20, 1e6, 30))
    assert (np.diff(far) >= 0).all()
    assert law.limit <= 1


def test_a_forecast_holds_out_the_largest_point() -> None:
    law = PowerLaw(0.8, 1.5, 0.5)
    rng = np.random.default_rng(0)
    samples = law(N)[:, None] + 0.005 * rng.standard_normal((len(N), 300))
    found = forecast(N, law(N), samples, [1000.0])
    n, said, measured = found.held_out
    assert (n, measured) == (500.0, pytest.approx(float(law(500))))
    assert said.low < measured < said.high
    assert found.values[0].value == pytest.approx(float(law(1000)), abs=1e-3)
    assert found.values[0].low < float(law(1000)) < found.values[0].high


def test_too_few_points() -> None:
    with pytest.raises(ConfigError, match=r"^PowerLaw\.fit: needs three points or more"):
        PowerLaw.fit([1, 2], [0.1, 0.2])
    with pytest.raises(ConfigError, match=r"^forecast: needs four points or more, got 3\.$"):
        forecast(N[:3], [0.1, 0.2, 0.3], np.zeros((3, 5)), [100])
