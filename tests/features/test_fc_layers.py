from __future__ import annotations

import itertools

import numpy as np
import pytest

from rcnn_svm.errors import CacheError, ConfigError, DataError, ShapeError
from rcnn_svm.features.fc_layers import FcLayers
from rcnn_svm.training.config import FcConfig


def make(rng, sizes=(6, 5, 4), k=3, scaling="none", n_scaled=None):
    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    pairs = list(itertools.pairwise(sizes))
    return FcLayers(
        tuple(normal(b, a) for a, b in pairs),
        tuple(normal(b) for _, b in pairs),
        normal(sizes[-1], k + 1),
        normal(k + 1),
        normal(sizes[-1], 4 * k),
        normal(4 * k),
        scaling,
        n_scaled,
    )


def test_values(rng):
    layers = make(rng)
    x = rng.normal(size=(7, 6)).astype(np.float16)
    w, b = layers.weights, layers.biases
    fc6 = np.maximum(x.astype(np.float32) @ w[0].T + b[0], 0)
    hidden = np.maximum(fc6 @ w[1].T + b[1], 0)
    got = layers(x)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, hidden, rtol=1e-5, atol=1e-6)
    scores = layers.scores(got)
    assert scores.shape == (7, 4)
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(scores.argmax(axis=1), layers.logits(got).argmax(axis=1))
    assert layers.deltas(got).shape == (7, 3, 4)
    np.testing.assert_allclose(
        layers.deltas(got)[:, 1],
        hidden @ layers.box_weight[:, 4:8] + layers.box_bias[4:8],
        rtol=1e-4,
        atol=1e-5,
    )
    assert (layers.n_features_in, layers.n_features, layers.n_classes) == (6, 4, 3)


@pytest.mark.parametrize("sizes", [(6, 5), (6, 5, 4), (6, 5, 4, 3)])
@pytest.mark.parametrize("n_groups", [1, 2, 3])
def test_averaged_layers_say_the_mean_of_what_their_groups_say(rng, sizes, n_groups):
    groups = [make(rng, sizes, scaling="l2", n_scaled=4) for _ in range(n_groups)]
    whole = FcLayers.averaged(groups)
    x = rng.normal(size=(7, 6)).astype(np.float32)
    assert (whole.scaling, whole.n_scaled) == ("l2", 4)
    assert (whole.n_features, whole.n_classes) == (n_groups * sizes[-1], 3)
    own = np.concatenate([one(x) for one in groups], axis=1)
    np.testing.assert_allclose(whole(x), own, rtol=1e-5, atol=1e-6)
    logits = np.mean([one.logits(one(x)) for one in groups], axis=0)
    np.testing.assert_allclose(whole.logits(whole(x)), logits, rtol=1e-4, atol=1e-5)
    deltas = np.mean([one.deltas(one(x)) for one in groups], axis=0)
    np.testing.assert_allclose(whole.deltas(whole(x)), deltas, rtol=1e-4, atol=1e-5)
    assert FcLayers.from_arrays(whole.to_arrays()).key == whole.key


def test_many_rows_are_cut_into_pieces(rng):
    layers = make(rng)
    x = rng.normal(size=(5000, 6)).astype(np.float32)
    np.testing.assert_allclose(layers(x)[4990:], layers(x[4990:]), rtol=1e-5, atol=1e-6)
    assert layers(x[:0]).shape == (0, 4)


def test_scaling_comes_first(rng):
    x = rng.normal(size=(3, 6)).astype(np.float32)
    layers = make(rng, scaling="l2")
    np.testing.assert_allclose(layers(x * 7), layers(x), rtol=1e-5, atol=1e-6)


def test_some_columns_alone_are_scaled(rng):
    x = rng.normal(size=(3, 6)).astype(np.float32)
    longer = np.concatenate([7 * x[:, :4], x[:, 4:]], axis=1)
    layers = make(rng, scaling="l2", n_scaled=4)
    np.testing.assert_allclose(layers(longer), layers(x), rtol=1e-5, atol=1e-6)
    assert np.abs(layers(7 * x) - layers(x)).max() > 0.1
    unit = np.concatenate([x[:, :4] / np.linalg.norm(x[:, :4], axis=1)[:, None], x[:, 4:]], axis=1)
    np.testing.assert_allclose(layers.scaler(x), unit, rtol=1e-6)
    np.testing.assert_allclose(layers.scaler(x, out=x), unit, rtol=1e-6)


@pytest.mark.parametrize(("scaling", "n_scaled"), [("none", None), ("sqrt-l2", None), ("l2", 4), ("l2", 0)])
def test_arrays_round_trip(rng, scaling, n_scaled):
    layers = make(rng, scaling=scaling, n_scaled=n_scaled)
    again = FcLayers.from_arrays(layers.to_arrays())
    assert again.key == layers.key
    assert (again.scaling, again.n_scaled) == (scaling, n_scaled)
    x = rng.normal(size=(3, 6)).astype(np.float32)
    np.testing.assert_array_equal(again(x), layers(x))
    assert make(rng).key != layers.key


def test_broken_arrays(rng):
    arrays = make(rng).to_arrays()
    with pytest.raises(CacheError, match=r"the saved arrays lack 'class.bias'. Train the layers again."):
        FcLayers.from_arrays({k: v for k, v in arrays.items() if k != "class.bias"})
    with pytest.raises(CacheError, match="do not fit together"):
        FcLayers.from_arrays({**arrays, "fc7.weight": arrays["fc7.weight"][:2]})
    with pytest.raises(CacheError, match="do not fit together"):
        FcLayers.from_arrays({**arrays, "n_scaled": np.array([7])})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(rng, value):
    arrays = make(rng).to_arrays()
    for name in sorted(arrays.keys() - {"scaling"}):
        broken = arrays[name].copy()
        broken.flat[-1] = value
        with pytest.raises(DataError) as caught:
            FcLayers.from_arrays({**arrays, name: broken})
        assert str(caught.value).startswith(
            f"FcLayers: {name} must be finite, got 1 of {broken.size} numbers that are NaN or infinite."
        )


def test_wrong_rows(rng):
    with pytest.raises(ShapeError) as caught:
        make(rng)(np.zeros((2, 5), np.float32))
    assert str(caught.value) == "FcLayers: features must have shape (R, 6), got (2, 5)."


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden", (), "hold at least one value, got none."),
        ("hidden", (8, 0), "be at least 1, got 0."),
        ("scaling", "l1", "be one of 'none', 'l2', 'sqrt-l2', 'region-l2' or none, got 'l1'."),
        ("groups", 0, "be at least 1, got 0."),
        ("groups", 1025, "be at most the units of each layer, 1024, got 1025."),
        ("optimizer", "lbfgs", "be one of 'adam', 'sgd', got 'lbfgs'."),
        ("dropout", 1.0, "lie in [0, 1), got 1.0."),
        ("positive_share", 0.0, "lie in (0, 1], got 0.0."),
        ("batch_size", 1, "be at least 2, got 1."),
        ("n_steps", 0, "be at least 1, got 0."),
        ("learning_rate", 0.0, "be positive, got 0.0."),
        ("weight_decay", -1.0, "not be negative, got -1.0."),
    ],
)
def test_config(field, value, message):
    with pytest.raises(ConfigError) as caught:
        FcConfig(**{field: value})
    assert str(caught.value) == f"fc.{field} must {message}"
