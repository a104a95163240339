"""What campaigns found, each by its smallest input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rcnn_svm.boxes import plain_boxes
from rcnn_svm.cli import main
from rcnn_svm.cli.images import refuse_to_overwrite
from rcnn_svm.config import with_overrides
from rcnn_svm.datasets import check_dataset
from rcnn_svm.detector import load_detector
from rcnn_svm.errors import ConfigError, DataError, RcnnSvmError, ShapeError, WeightsError
from rcnn_svm.evaluation.exchange import read_coco_results, read_comp4, read_detections
from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.files import atomic_path, csv_text, file_digest
from rcnn_svm.networks.backbone import load_backbone
from rcnn_svm.report.tables import markdown_table
from tests.campaign.scene import picture, save_detector
from tests.datasets import cases


@pytest.mark.parametrize("line", ['""', "''", ' "" ', "' '"])
def test_a_line_that_holds_quotes_alone_holds_nothing(line: str, tmp_path: Path) -> None:
    cases.voc(tmp_path / "voc")
    (tmp_path / "voc/classes.txt").write_text(f"disc\n{line}\nbar\n")
    assert check_dataset(tmp_path / "voc").classes == ("disc", "bar")
    cases.yolo(tmp_path / "yolo", "images", "labels", entry=None)
    (tmp_path / "yolo/classes.txt").write_text(f"{line}\ndisc\nbar\n")
    report = check_dataset(tmp_path / "yolo")
    assert (report.classes, report.defects) == (("disc", "bar"), ())
    cases.yolo(tmp_path / "names", names="[disc, ' ']")
    with pytest.raises(DataError, match="'names' must be texts"):
        check_dataset(tmp_path / "names")
    with pytest.raises(ConfigError, match="must name one or more classes"):
        check_dataset(tmp_path / "voc", classes=["disc", ""])


def detections(**changes: Any) -> str:
    image = {"image_id": "a", "boxes": [[0, 0, 5, 5]], "scores": [0.5], "labels": [0]}
    classes = changes.pop("classes", ["cat"])
    return json.dumps({"schema": 1, "classes": classes, "images": [image | changes]})


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ["cat", "cat"]},
        {"classes": [1]},
        {"classes": [""]},
        {"image_id": 5},
        {"boxes": [[5, 0, 0, 5]]},
        {"boxes": [["0", "0", "5", "5"]]},
        {"boxes": [[True, 0, 5, 5]]},
        {"boxes": [[0, 0, 1e300, 5]]},
        {"boxes": [[0, 0, 10**400, 5]]},
        {"boxes": {"a": 1}},
        {"scores": [True]},
        {"scores": [10**400]},
        {"scores": "5"},
        {"labels": [10**400]},
        {"labels": [True]},
        {"labels": None},
    ],
)
def test_detections_that_are_none_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(detections())
    assert len(read_detections(path)[1]) == 1
    path.write_text(detections(**changes))
    with pytest.raises(DataError):
        read_detections(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_id": []},
        {"category_id": {}},
        {"category_id": "x"},
        {"score": True},
        {"score": 10**400},
        {"bbox": [0, 0, -1, 5]},
        {"bbox": [0, 0, 1e39, 5]},
        {"bbox": ["0", 0, 5, 5]},
    ],
)
def test_results_that_are_none_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    entry = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 5, 5], "score": 0.5}
    path.write_text(json.dumps([entry]))
    assert len(read_coco_results(path, [3], ["1"])[0]) == 1
    path.write_text(json.dumps([entry | changes]))
    with pytest.raises(DataError):
        read_coco_results(path, [3], ["1"])


@pytest.mark.parametrize("line", ["a 1 9 1 2 9", "a 1e39 1 1 9 9", "a nan 1 1 9 9"])
def test_comp4_lines_that_are_no_detections_are_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "comp4_det_test_cat.txt").write_text(line)
    with pytest.raises(DataError, match="line 1"):
        read_comp4(tmp_path, ["cat"], ["a"])


def test_boxes_of_a_json_are_lists_of_four_numbers() -> None:
    assert plain_boxes([[0, 0.5, 5, 5]]).tolist() == [[0, 0.5, 5, 5]]
    assert plain_boxes([]).shape == (0, 4)
    for value in (None, 5, [5], [[1, 2, 3]], [[1, 2, 3, None]], [[float("nan"), 0, 1, 1]], [[3, 0, 1, 1]]):
        with pytest.raises(ShapeError):
            plain_boxes(value)


@pytest.mark.parametrize("text", ["seed = " + "9" * 5000, "a = " + "[" * 3000, "seed = " + "9" * 400])
def test_settings_that_are_no_toml_or_too_large(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    for call in (lambda: with_overrides(ExperimentConfig(), path), lambda: ExperimentConfig(seed=10**400)):
        with pytest.raises(RcnnSvmError):
            call()
    with pytest.raises(ConfigError):
        with_overrides(ExperimentConfig(), None, [text.replace(" ", "")])


def test_a_message_is_one_printable_line_of_bounded_length() -> None:
    for text in ("a\nb", "\x1b[31m", "\u202e", "\ud800" * 9000, "x" * 100_000):
        message = str(DataError(text))
        assert message.isprintable()
        assert 0 < len(message) < 5000


def _changed(folder: Path, change: str, value: Any) -> None:
    manifest = json.loads((folder / "detector.json").read_text())
    if change in manifest:
        manifest[change] = value
    else:
        (path,) = folder.glob("head.*.safetensors")
        save_file({**load_file(path), change: value}, path)
        manifest["files"]["head"]["sha256"] = file_digest(path)
    (folder / "detector.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("classes", "abc"),
        ("classes", None),
        ("classes", ["a", "a", "b"]),
        ("classes", [1, 2, 3]),
        ("classes", ["a", "b", "c", "d"]),
        ("features", "x"),
        ("scaler", 5),
        ("scaler", {"scaling": "mean-norm-20", "factor": "x"}),
        ("scorer", []),
        ("n_proposals", "x"),
        ("n_proposals", -1),
        ("proposals", {"kind": {}}),
        ("info", 5),
        ("scorer.coef", np.zeros((3, 5), np.float32)),
        ("scorer.coef", np.zeros(3, np.float32)),
        ("regressor.coef", np.zeros((3, 4), np.float32)),
        ("regressor.intercept", np.full((3, 4), np.nan, np.float32)),
        ("layers.class.bias", np.zeros((4, 1), np.float32)),
        ("layers.scaling", np.zeros(0, np.int64)),
    ],
)
def test_a_detector_whose_parts_make_no_sense_is_refused(tmp_path: Path, change: str, value: Any) -> None:
    save_detector(tmp_path)
    load_detector(tmp_path)
    _changed(tmp_path, change, value)
    with pytest.raises(RcnnSvmError) as caught:
        load_detector(tmp_path)
    assert caught.value.exit_code == 3


def test_weights_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    backbone = load_backbone("small_cnn", "random", n_outputs=2)
    state = backbone.net.state_dict()
    for name, value in (
        ("logits.weight", torch.tensor(1.0)),
        ("logits.weight", torch.zeros(0, 256)),
        ("conv1.bias", torch.zeros(16, dtype=torch.int64)),
        ("conv1.bias", torch.full((16,), 1e300, dtype=torch.float64)),
    ):
        torch.save({**state, name: value}, tmp_path / "w.pth")
        with pytest.raises(WeightsError):
            load_backbone("small_cnn", tmp_path / "w.pth")


def test_what_killed_writers_left_goes_with_the_next_write(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom rcnn_svm.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1]) / 'a.json') as path:\n    os._exit(137)\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=False)
    (left,) = tmp_path.iterdir()
    (tmp_path / ".mine.part").write_text("not ours")
    with atomic_path(tmp_path / "b.json") as path:
        path.write_text("{}")
    assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.part", "b.json"]


def test_no_output_takes_the_place_of_an_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    photo = tmp_path / "a.png"
    Image.fromarray(picture()).save(photo)
    before = photo.read_bytes()
    (tmp_path / "link.json").symlink_to(photo)
    for out in (photo, tmp_path / "link.json"):
        assert main(["propose", str(photo), "--out", str(out), "--cache", str(tmp_path / "cache")]) == 2
        assert "must not take the place of a file that is read" in capsys.readouterr().err
    assert photo.read_bytes() == before
    refuse_to_overwrite([tmp_path / "b.png"], [photo, None])


def test_names_are_no_formulas_and_no_markup() -> None:
    rows = [{"class": "=1+cmd|calc!A0", "ap": -1.5}, {"class": "@x", "ap": 2}, {"class": "cat", "ap": None}]
    assert csv_text(rows).splitlines()[1:] == ["'=1+cmd|calc!A0,-1.5", "'@x,2", "cat,"]
    assert csv_text([], ("a", "b")) == "a,b\n"
    assert csv_text([{"b": 1}], ("a", "b")) == "a,b\n,1\n"
    table = markdown_table(["AP"], [["a|b <script>\x1b[31m"]])
    assert "a\\|b &lt;script&gt;\\x1b[31m" in table


def test_dollars_in_class_names_are_drawn_as_dollars(tmp_path: Path) -> None:
    from rcnn_svm.datasets import write_dataset
    from rcnn_svm.structures import Dataset
    from tests.campaign.scene import tiny_dataset

    names = ("$_$", "a$\\x$b", "$1 - $5")
    samples = tiny_dataset("train", 2).samples
    write_dataset([Dataset("d", "train", names, samples)], tmp_path / "d", "yolo")
    assert main(["data", "check", str(tmp_path / "d"), "--plot", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").stat().st_size > 1000
