"""Tuning the last blocks of a network together with fc6 and fc7."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rcnn_svm.errors import ConfigError
from rcnn_svm.features.featurizers import SharedFeatures
from rcnn_svm.heads.assign import FINETUNE_RULE, describe_regions
from rcnn_svm.heads.base import ALL
from rcnn_svm.networks.backbone import random_backbone
from rcnn_svm.networks.fusing import absorb_batch_norm
from rcnn_svm.structures import GroundTruth, Sample
from rcnn_svm.training import loop
from rcnn_svm.training import trunk as shared_training
from rcnn_svm.training.config import FcConfig, TrunkConfig
from rcnn_svm.training.draws import RegionIndex
from rcnn_svm.training.trunk import FrozenMaps, View, tune_trunk

TRUTH = GroundTruth(np.array([[8, 8, 40, 40], [44, 30, 90, 70]], np.float32), np.array([0, 1]))
TAPS = "block16@2x2,block17@1x1*1.5,block17@1x1*image"
FC = FcConfig(hidden=(16,), n_steps=20, batch_size=32)
TRUNK = TrunkConfig("block17", n_steps=6, images=2, regions=16, checkpoint_every=2, learning_rate=1e-3)


def sample(i: int, size: tuple[int, int] = (72, 96)) -> Sample:
    pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Sample(f"image{i}", size, TRUTH, render=lambda: pixels)


class Blocks:
    """Features of a few images, as a store would give them."""

    classes = ("red", "green")

    def __init__(self, features, samples):
        rng = np.random.default_rng(0)
        self.boxes = []
        for _ in samples:
            far = rng.uniform(0, 50, (30, 4))
            far[:, 2:] = far[:, :2] + rng.uniform(8, 40, (30, 2))
            near = np.repeat(TRUTH.boxes, 8, axis=0) + rng.uniform(-4, 4, (16, 4))
            self.boxes.append(np.concatenate([TRUTH.boxes, near, far]).astype(np.float32))
        self.rows = [features(s.read(), b) for s, b in zip(samples, self.boxes, strict=True)]
        self.n_features = features.n_features

    def __len__(self):
        return len(self.rows)

    def features(self, i, rows=ALL):
        return self.rows[i][rows]

    def truth(self, i):
        return describe_regions(self.boxes[i], TRUTH, 2, 2)


class Setting:
    def __init__(self):
        self.backbone = random_backbone("mobilenet_v2", seed=0).eval()
        self.features = SharedFeatures(self.backbone, TAPS, longer_sides=(96,))
        self.samples = [sample(0), sample(1, (96, 72)), sample(2)]
        self.blocks = Blocks(self.features, self.samples)

    def tune(self, folder, config=TRUNK, fc=FC, seed=0, ranks=None):
        return tune_trunk(
            self.blocks, self.samples, self.blocks.boxes, self.features, self.backbone, fc, config,
            folder=folder, seed=seed, ranks=ranks,
        )  # fmt: skip


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def test_absorbing_a_normalisation_leaves_the_function_and_the_names_alone():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, bias=True), torch.nn.BatchNorm2d(5))
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.1, 9)
    net[1].weight.data.normal_()
    net.eval()
    x = torch.randn(2, 3, 6, 6)
    before, names = net(x), list(net.state_dict())
    absorb_batch_norm(net)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    assert list(net.state_dict()) == names
    assert torch.equal(net[1].weight, torch.ones(5))


@pytest.mark.parametrize("first_layer", ["block16", "block17"])  # the second freezes what a tap reads
def test_rows_of_the_training_are_those_of_the_featurizer(setting, tmp_path, first_layer):
    maps = FrozenMaps(setting.features, first_layer, setting.samples, tmp_path)
    boxes = setting.blocks.boxes[1]
    seen = {}

    class Rows(torch.nn.Module):
        def forward(self, rows):
            seen["rows"] = rows.detach().numpy()
            return rows

    module = shared_training._TrunkModule(setting.backbone, setting.features.taps, maps.layer, Rows())
    module.eval()
    empty = np.zeros(len(boxes), np.int64), np.zeros((len(boxes), 4), np.float32)
    module([maps.seen(View(1, False, boxes, *empty))])
    np.testing.assert_allclose(seen["rows"], setting.blocks.rows[1], rtol=0.02, atol=2e-3)
    # The mirrored view is the view of the mirrored image.
    module([maps.seen(View(1, True, boxes, *empty))])
    width = setting.samples[1].size[1]
    mirrored = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    expected = setting.features(np.ascontiguousarray(setting.samples[1].read()[:, ::-1]), mirrored)
    np.testing.assert_allclose(seen["rows"], expected, rtol=0.02, atol=2e-3)


def test_a_map_or_checkpoint_that_vanishes_is_made_again(setting, tmp_path, monkeypatch):
    """Another process may make room in the cache between a look and the reading."""
    maps = FrozenMaps(setting.features, "block17", setting.samples, tmp_path / "maps")
    before = np.array(maps.get(0, True))
    config = dataclasses.replace(TRUNK, n_steps=2)
    whole = setting.tune(tmp_path, config)[0].digest
    for reader in (shared_training, loop):
        monkeypatch.setattr(reader, "note_use", lambda path: path.unlink(missing_ok=True) or True)
    np.testing.assert_array_equal(maps.get(0, True), before)
    assert setting.tune(tmp_path, config)[0].digest == whole


def test_only_the_last_blocks_and_the_layers_change(setting, tmp_path):
    tuned, layers = setting.tune(tmp_path)
    before, after = setting.backbone.net.state_dict(), tuned.net.state_dict()
    assert list(before) == list(after)
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"17"}
    assert layers.n_features_in == setting.features.n_features
    assert all(p.requires_grad for p in tuned.parameters())
    again, same = setting.tune(tmp_path / "other")
    assert again.digest == tuned.digest
    assert same.key == layers.key


def test_every_setting_matters(setting, tmp_path):
    digests = {setting.tune(tmp_path)[0].digest, setting.tune(tmp_path, seed=1)[0].digest}
    changes = {
        "first_layer": "block16",
        "n_steps": 4,
        "images": 3,
        "regions": 20,
        "flip": False,
        "learning_rate": 2e-3,
        "layers_rate": 1.0,
        "warm_up": 0.6,
        "weight_decay": 0.5,
        "layers_decay": 50.0,
    }
    assert changes.keys() | {"checkpoint_every"} == {field.name for field in dataclasses.fields(TrunkConfig)}
    features = SharedFeatures(setting.backbone, TAPS, longer_sides=(96,))
    for key, value in changes.items():
        other, _ = tune_trunk(
            setting.blocks, setting.samples, setting.blocks.boxes, features, setting.backbone, FC,
            dataclasses.replace(TRUNK, **{key: value}), folder=tmp_path,
        )  # fmt: skip
        digests.add(other.digest)
    assert len(digests) == len(changes) + 2


def test_a_killed_training_resumes_to_the_same_bytes(setting, tmp_path, monkeypatch):
    expected, layers = setting.tune(tmp_path / "undisturbed")
    step, calls = loop.Trainer.step, []

    def interrupted(trainer, batch, number):
        calls.append(number)
        if len(calls) == FC.n_steps + 5:
            raise KeyboardInterrupt
        return step(trainer, batch, number)

    monkeypatch.setattr(loop.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setting.tune(tmp_path / "killed")
    resumed, same = setting.tune(tmp_path / "killed")
    assert calls[FC.n_steps :] == [*range(5), *range(FC.n_steps), 4, 5]  # two chunks were kept
    assert resumed.digest == expected.digest
    assert same.key == layers.key


def test_bad_settings_and_damaged_maps_are_refused(setting, tmp_path):
    for layer in ("conv0", "nonsense"):
        with pytest.raises(ConfigError, match="must be a map layer"):
            setting.tune(tmp_path, dataclasses.replace(TRUNK, first_layer=layer))
    early = SharedFeatures(setting.backbone, "block6@2x2,block17@1x1", longer_sides=(96,))
    with pytest.raises(ConfigError, match="block6"):
        FrozenMaps(early, "block17", setting.samples, tmp_path)
    scales = SharedFeatures(setting.backbone, TAPS, longer_sides=(64, 96))
    with pytest.raises(ConfigError, match="one scale"):
        FrozenMaps(scales, "block17", setting.samples, tmp_path)
    maps = FrozenMaps(setting.features, "block17", setting.samples, tmp_path)
    whole = np.array(maps.get(0, False))
    (file,) = tmp_path.rglob("*.npy")
    for content in (b"nothing", file.read_bytes()[:-40] + bytes(40)):
        file.unlink()
        file.write_bytes(content)
        np.testing.assert_array_equal(maps.get(0, False), whole)
    for field, value in (("n_steps", 0), ("regions", 1), ("learning_rate", 0.0), ("warm_up", 1.0)):
        with pytest.raises(ConfigError, match=field):
            TrunkConfig(**{field: value})


def test_draws_come_from_one_image_and_start_with_its_positives(setting):
    blocks = setting.blocks
    index = RegionIndex((blocks.truth(i) for i in range(3)), FINETUNE_RULE, 2, "here")
    rng = np.random.default_rng(0)
    for _ in range(20):
        draw = index.draw_from_one_image(rng, 8, 12)
        image = draw.image[0]
        assert set(draw.image) == {image}
        truth = blocks.truth(image)
        assert (truth.best_iou[draw.row[:8]] >= 0.5).all()
        assert (truth.best_iou[draw.row[8:]] < 0.5).all()
        np.testing.assert_array_equal(draw.label[:8], truth.label[draw.row[:8]])
        assert (draw.label[8:] == 2).all()
        assert len(set(draw.label[:4])) == 1
