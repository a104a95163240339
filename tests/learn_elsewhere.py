"""What two processes train in the tests of training in several, and what is trained there alone."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcnn_svm.errors import ClusterError
from rcnn_svm.networks.backbone import load_backbone
from rcnn_svm.structures import Dataset, Sample
from rcnn_svm.training.crops import finetune
from rcnn_svm.training.fc import train_fc_layers
from rcnn_svm.training.loop import Trainer
from rcnn_svm.training.parallel import Ranks, Replica, lead
from rcnn_svm.training.refine import train_refiner
from tests.training import test_finetune, test_refine, test_trunk


def losses(ranks: Ranks | None, folder: Path) -> dict[str, list[float]]:
    """Train all that can be trained, with dropout and batches that two do not divide; return the losses."""
    step, told = Trainer.step, dict[str, list[float]]()

    def kept(trainer: Trainer, batch: Any, number: int) -> tuple[float, int, int]:
        done = step(trainer, batch, number)
        told.setdefault(trainer._what, []).append(done[0])
        return done

    Trainer.step = kept  # type: ignore[method-assign]
    try:
        fc = dataclasses.replace(test_finetune.FC, hidden=(48, 16), dropout=0.5, n_steps=6, batch_size=65)
        train_fc_layers(test_finetune.Blocks(), fc, ranks=ranks)
        refine = dataclasses.replace(test_refine.CONFIG, dropout=0.5, n_steps=6, batch_size=63)
        train_refiner(test_refine.Scenes(8, 0), refine, ranks=ranks)
        scenes = [
            Sample(str(i), (100, 100), test_finetune.OBJECTS, render=test_finetune.scene(i)) for i in range(3)
        ]
        finetune(
            load_backbone("small_cnn", "random", n_outputs=4),
            Dataset("toy", "train", ("red", "green"), tuple(scenes)),
            [np.clip(test_finetune.regions(i), 0, 100) for i in range(3)],
            dataclasses.replace(test_finetune.NET, n_steps=6, batch_size=17),
            ranks=ranks,
        )
        trunk = dataclasses.replace(test_trunk.TRUNK, n_steps=6, images=3, learning_rate=1e-6)
        test_trunk.Setting().tune(folder, trunk, ranks=ranks)
    finally:
        Trainer.step = step  # type: ignore[method-assign]
    return told


def _in_the_first(ranks: Ranks) -> None:
    folder = Path(sys.argv[1])
    told: dict[str, Any] = {"losses": losses(ranks, folder)}
    try:
        train_fc_layers(test_finetune.Blocks(), test_finetune.FC, ranks=ranks)
    except ClusterError as error:
        told["error"] = str(error)
    (folder / "told.json").write_text(json.dumps(told))


def _dying() -> None:
    """Let this process end in the midst of the last training."""
    step = Replica.step

    def last(replica: Replica, part: Any, factor: float) -> tuple[float, int]:
        if replica.optimizer.param_groups[0]["lr"] == test_finetune.FC.learning_rate and part.n_whole == 64:
            os._exit(1)
        return step(replica, part, factor)

    Replica.step = last  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ["RANK"] == "1":
        _dying()
    lead(_in_the_first)
