from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from rcnn_svm.boxes import decode_deltas, iou
from rcnn_svm.errors import CacheError, ConfigError, DataError, ShapeError
from rcnn_svm.heads.assign import FINETUNE_RULE, LabelRule, describe_regions
from rcnn_svm.heads.base import ALL
from rcnn_svm.networks.backbone import load_backbone, random_backbone
from rcnn_svm.structures import Dataset, GroundTruth, Sample
from rcnn_svm.training import crops as crop_training
from rcnn_svm.training.config import FcConfig, FinetuneConfig
from rcnn_svm.training.crops import finetune
from rcnn_svm.training.fc import train_fc_layers
from rcnn_svm.training.loop import Trainer, decayed

OBJECTS = GroundTruth(np.array([[10, 10, 50, 50], [60, 60, 90, 90]], np.float32), np.array([0, 1]))
SEVERAL = GroundTruth(np.concatenate([OBJECTS.boxes, [[5, 60, 40, 95]]]), np.array([0, 1, 0]))
FC = FcConfig(hidden=(48,), n_steps=150, batch_size=64, dropout=0.0, learning_rate=3e-3)
NET = FinetuneConfig(n_steps=24, batch_size=16, optimizer="adam", checkpoint_every=6, head_rate=1.0)


def regions(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    far = rng.uniform(0, 60, (60, 4))
    far[:, 2:] = far[:, :2] + rng.uniform(5, 40, (60, 2))
    near = np.repeat(OBJECTS.boxes, 20, axis=0) + rng.uniform(-6, 6, (40, 4))
    return np.concatenate([near, far]).astype(np.float32)


class Blocks:
    """Features that tell where a box lies."""

    classes = ("red", "green")
    n_features = 12

    def __init__(self, n_images=4, truth=OBJECTS):
        self.visits = 0
        self.truths, self.rows = [], []
        for i in range(n_images):
            boxes = np.concatenate([truth.boxes, regions(i)])
            self.truths.append(describe_regions(boxes, truth, 2, len(truth)))
            noise = np.random.default_rng(i).normal(size=(len(boxes), 12)) * 0.1
            noise[:, :4] += boxes / 50
            self.rows.append(noise.astype(np.float16))

    def __len__(self):
        return len(self.rows)

    def features(self, i, rows=ALL):
        self.visits += 1
        return self.rows[i][rows]

    def truth(self, i):
        return self.truths[i]


def test_fc_layers_learn_classes_and_boxes():
    blocks = Blocks()
    layers = train_fc_layers(blocks, dataclasses.replace(FC, n_steps=500), seed=1)
    assert (layers.n_features_in, layers.n_features, layers.n_classes) == (12, 48, 2)
    truth = blocks.truth(0)
    hidden = layers(blocks.features(0))
    labels = FINETUNE_RULE.multiclass(truth)
    assert (layers.scores(hidden).argmax(axis=1) == labels).mean() > 0.85
    positive = np.flatnonzero(labels < 2)
    moved = decode_deltas(truth.boxes[positive], layers.deltas(hidden)[positive, labels[positive]])
    before = np.diag(iou(truth.boxes[positive], truth.target[positive])).mean()
    assert np.diag(iou(moved, truth.target[positive])).mean() > before + 0.02
    assert blocks.visits <= 1 + len(blocks) * 6 * 2  # a few passes, however many steps


@pytest.mark.parametrize(
    ("rate", "n_steps", "message"),
    [
        (
            100.0,
            60,
            r"^Training fc layers: the loss is no longer finite at step \d+\. Lower fc\.learning_rate\.$",
        ),
        # One step: its loss is that of the initial weights, and only what it leaves behind is infinite.
        (
            1e38,
            1,
            r"^Training fc layers: the weights are no longer finite after step 1\. Lower fc\.learning_rate",
        ),
    ],
)
def test_a_diverging_training_of_fc_layers_is_no_detector(rate, n_steps, message):
    config = dataclasses.replace(FC, optimizer="sgd", learning_rate=rate, weight_decay=1e4, n_steps=n_steps)
    with pytest.raises(DataError, match=message):
        train_fc_layers(Blocks(), config)


def test_fc_layers_repeat_and_every_setting_matters():
    one_difficult = dataclasses.replace(SEVERAL, difficult=np.array([False, False, True]))
    blocks = Blocks(truth=one_difficult)
    short = dataclasses.replace(FC, n_steps=12)
    reference = train_fc_layers(blocks, short).key
    assert train_fc_layers(blocks, short).key == reference
    changes = {
        "hidden": (48, 16),
        "scaling": "l2",
        "groups": 2,
        "dropout": 0.3,
        "positive_iou": 0.7,
        "negative_iou": 0.3,
        "negative_low": 0.1,
        "batch_size": 40,
        "positive_share": 0.5,
        "balanced": False,
        "skip_difficult": False,
        "n_steps": 13,
        "optimizer": "sgd",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "box_weight": 0.0,
    }
    elsewhere = {"background", "mirror", "other_sides"}  # the experiment reads them
    assert changes.keys() | elsewhere == {field.name for field in dataclasses.fields(FcConfig)}
    keys = [
        train_fc_layers(blocks, dataclasses.replace(short, **{field: value})).key["weights"]
        for field, value in changes.items()
    ]
    keys += [reference["weights"], train_fc_layers(blocks, short, seed=1).key["weights"]]
    assert len(set(keys)) == len(keys)


def test_groups_share_the_units_and_learn_each_by_itself():
    blocks = Blocks()
    whole = train_fc_layers(blocks, dataclasses.replace(FC, n_steps=500, groups=2), seed=1)
    alone = train_fc_layers(blocks, dataclasses.replace(FC, n_steps=500, hidden=(24,)), seed=1)
    assert (FC.hidden, whole.n_features) == ((48,), 48)
    np.testing.assert_array_equal(whole.weights[0][:24], alone.weights[0])  # the first has the seed itself
    assert np.abs(whole.weights[0][24:] - alone.weights[0]).max() > 0.1
    labels = FINETUNE_RULE.multiclass(blocks.truth(0))
    assert (whole.scores(whole(blocks.features(0))).argmax(axis=1) == labels).mean() > 0.85


def test_batches_hold_the_stated_share_of_labelled_rows():
    from rcnn_svm.training.draws import RegionIndex
    from rcnn_svm.training.fc import _stored_batches

    blocks = Blocks()
    index = RegionIndex((blocks.truth(i) for i in range(4)), LabelRule(0.6, 0.4), 2, "here")
    config = dataclasses.replace(FC, n_steps=30, batch_size=40)
    rows = {row.tobytes(): (i, r) for i in range(4) for r, row in enumerate(blocks.rows[i])}
    batches = list(_stored_batches(blocks, index, config, np.random.default_rng(0)))
    assert len(batches) == 30
    for batch in batches:
        assert (batch.labels < 2).sum() == 10
        assert len(batch.labels) == 40
        for row, label in zip(batch.features, batch.labels, strict=True):
            i, r = rows[row.tobytes()]
            best = blocks.truth(i).best_iou[r]
            assert best >= 0.6 if label < 2 else best < 0.4
            assert label == 2 or label == blocks.truth(i).label[r]


def test_fc_layers_need_objects():
    with pytest.raises(DataError) as caught:
        train_fc_layers(Blocks(truth=GroundTruth.empty()), FC)
    assert str(caught.value) == (
        "train_fc_layers: there is no positive region to train on, got 4 images. "
        "Check that the data set has labelled objects and the images have proposals."
    )
    with pytest.raises(DataError, match="there is no positive region to train on, got 0 images"):
        train_fc_layers(Blocks(0), FC)


def scene(seed):
    def render():
        image = np.random.default_rng(seed).integers(0, 60, (100, 100, 3), dtype=np.uint8)
        image[10:50, 10:50, 0] = 220
        image[60:90, 60:90, 1] = 220
        return image

    return render


@pytest.fixture
def dataset():
    samples = tuple(Sample(str(i), (100, 100), OBJECTS, render=scene(i)) for i in range(3))
    return Dataset("toy", "train", ("red", "green"), samples)


@pytest.fixture
def proposals():
    return [np.clip(regions(i), 0, 100) for i in range(3)]


@pytest.fixture
def start():
    return load_backbone("small_cnn", "random", n_outputs=4)


def test_finetuning_learns_and_is_loaded_again(tmp_path, dataset, proposals, start):
    before = start.digest
    result = finetune(start, dataset, proposals, NET, seed=3)
    assert start.digest == before == load_backbone("small_cnn", "random", n_outputs=4).digest
    assert result.backbone.classes == ("red", "green", "background")
    assert not result.backbone.training
    assert [step for step, _, _ in result.history] == [6, 12, 18, 24]
    assert result.history[-1][1] < 0.8 * result.history[0][1]
    path = tmp_path / "tuned.safetensors"
    result.save(path)
    loaded = load_backbone("small_cnn", path)
    assert loaded.digest == result.backbone.digest
    assert loaded.classes == result.backbone.classes
    assert loaded.n_outputs == 3
    assert json.loads((tmp_path / "tuned.json").read_text())["config"]["n_steps"] == 24


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, dataset, proposals, start):
    whole = finetune(start, dataset, proposals, NET, seed=3)
    checkpoint = tmp_path / "checkpoint.safetensors"
    step, calls = Trainer.step, []

    def interrupted(trainer, batch, number):
        calls.append(number)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return step(trainer, batch, number)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(start, dataset, proposals, NET, seed=3, checkpoint=checkpoint)
    resumed = finetune(start, dataset, proposals, NET, seed=3, checkpoint=checkpoint)
    assert calls == [*range(13), *range(12, 24)]  # the first two chunks are not trained again
    assert resumed.history == whole.history
    for path, result in (("a.safetensors", whole), ("b.safetensors", resumed)):
        result.backbone.save(tmp_path / path)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    # A finished training is read from its checkpoint.
    again = finetune(start, dataset, proposals, NET, seed=3, checkpoint=checkpoint)
    assert again.backbone.digest == whole.backbone.digest
    assert len(calls) == 13 + 12


def test_half_of_the_crops_are_mirrored(monkeypatch, dataset, proposals, start):
    chunks = {}
    for flip in (False, True):
        monkeypatch.setattr(
            crop_training,
            "train_on_crops",
            lambda _, prepare, *a, flip=flip, **k: chunks.update({flip: prepare(0, 6)}) or [],
        )
        finetune(start, dataset, proposals, dataclasses.replace(NET, flip=flip))
    plain, mixed = (chunks[flip].crops.reshape(-1, 40, 40, 3) for flip in (False, True))
    np.testing.assert_array_equal(chunks[True].labels, chunks[False].labels)
    mirrored = np.array([not np.array_equal(a, b) for a, b in zip(plain, mixed, strict=True)])
    np.testing.assert_array_equal(mixed[mirrored], plain[mirrored, :, ::-1])
    assert 0.3 < mirrored.mean() < 0.7


def test_checkpoints_of_another_training_are_refused(tmp_path, dataset, proposals, start):
    checkpoint = tmp_path / "checkpoint.safetensors"
    short = dataclasses.replace(NET, n_steps=4)
    finetune(start, dataset, proposals, short, checkpoint=checkpoint)
    with pytest.raises(CacheError) as caught:
        finetune(start, dataset, proposals, short, seed=9, checkpoint=checkpoint)
    assert str(caught.value) == (
        f"{checkpoint}: is the checkpoint of another training (other data, network or settings). "
        f"Delete it to start anew, or name another file."
    )
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(CacheError, match="is no readable checkpoint"):
        finetune(start, dataset, proposals, short, checkpoint=checkpoint)


def test_layers_before_the_first_one_stay(dataset, proposals, start):
    config = dataclasses.replace(NET, n_steps=3, first_layer="fc6", optimizer="sgd")
    tuned = finetune(start, dataset, proposals, config).backbone.net.state_dict()
    changed = {
        k for k, v in start.net.state_dict().items() if v.shape == tuned[k].shape and (v != tuned[k]).any()
    }
    assert changed == {"fc6.2.weight", "fc6.2.bias", "fc7.1.weight", "fc7.1.bias"}
    with pytest.raises(ConfigError, match="first_layer must be a layer of small_cnn, got 'conv9'"):
        finetune(start, dataset, proposals, dataclasses.replace(NET, first_layer="conv9"))


def test_the_learning_rate_falls_and_the_head_learns_faster():
    backbone = random_backbone("small_cnn", 3)
    config = FinetuneConfig(n_steps=100, decay_at=(0.5, 0.9))
    groups = crop_training._groups(backbone, config)
    np.testing.assert_allclose([group.rate for group in groups], [1e-3, 2e-3, 1e-2, 2e-2])  # then the head
    assert [group.decay for group in groups] == [5e-4, 0, 5e-4, 0]
    factors = [decayed(config.n_steps, config.decay_at)(step) for step in (0, 49, 50, 90)]
    np.testing.assert_allclose(factors, [1, 1, 0.1, 0.01])


def test_the_papers_schedule():
    paper = FinetuneConfig.paper()
    assert (paper.batch_size, paper.positive_share) == (128, 0.25)
    assert [round(f * paper.n_steps) for f in paper.decay_at] == [20_000, 40_000, 60_000]


def test_errors(dataset, proposals, start, tmp_path):
    with pytest.raises(ShapeError, match=r"finetune: got 3 images but 2 lists of regions."):
        finetune(start, dataset, proposals[:2], NET)
    bare = tuple(dataclasses.replace(s, truth=GroundTruth.empty()) for s in dataset)
    with pytest.raises(DataError, match="finetune: toy train: there is no positive region to train on"):
        finetune(start, dataclasses.replace(dataset, samples=bare), proposals, NET)
    with pytest.raises(
        DataError, match=r"the loss is no longer finite at step .* Lower finetune.learning_rate."
    ):
        finetune(start, dataset, proposals, dataclasses.replace(NET, optimizer="sgd", learning_rate=1e30))
    one = dataclasses.replace(NET, optimizer="sgd", learning_rate=1e38, weight_decay=1e4, n_steps=1)
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(
        DataError, match=r"the weights are no longer finite after step 1\. Lower finetune\.learning_rate"
    ):
        finetune(start, dataset, proposals, one, checkpoint=checkpoint)
    assert not checkpoint.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_steps", 0),
        ("batch_size", 1),
        ("positive_share", 1.5),
        ("optimizer", "lbfgs"),
        ("learning_rate", -1.0),
        ("head_rate", 0.0),
        ("decay_at", (1.5,)),
        ("momentum", 1.0),
        ("checkpoint_every", 0),
    ],
)
def test_config(field, value):
    with pytest.raises(ConfigError, match=rf"^finetune\.{field} must .*, got "):
        FinetuneConfig(**{field: value})
