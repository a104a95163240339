from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rcnn_svm.report import provenance as module
from rcnn_svm.report.provenance import provenance


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_has_the_fields_of_the_schema_and_is_json():
    record = provenance(seed=7, command="make demo")
    assert json.loads(json.dumps(record)) == record
    assert set(record) == {"command", "commit", "date", "seed", "versions", "machine"}
    assert set(record["machine"]) == {"cpu", "cores", "ram_gb", "gpu"}
    assert record["command"] == "make demo"
    assert record["seed"] == 7
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["ram_gb"] > 0
    assert {"python", "numpy", "scikit-learn", "torch"} <= set(record["versions"])
    assert record["date"].endswith("+00:00")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["scripts/compare_heads.py", "--seed", "3"], "python scripts/compare_heads.py --seed 3"),
        (["/usr/lib/python3/rcnn_svm/__main__.py", "demo"], "python -m rcnn_svm demo"),
        (["/some/.venv/bin/rcnn-svm", "detect", "two words"], "rcnn-svm detect 'two words'"),
    ],
)
def test_command_can_be_typed_again(argv, expected, monkeypatch):
    monkeypatch.delenv("RCNN_SVM_DATA", raising=False)
    assert module._command_line(argv) == expected


def test_command_names_files_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("RCNN_SVM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert module._command_line(["rcnn-svm", str(tmp_path / "data")]) == "rcnn-svm data"


def test_command_names_data_by_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("RCNN_SVM_DATA", str(tmp_path))
    command = module._command_line(["rcnn-svm", "train", str(tmp_path / "fruit"), "--seed", "1"])
    assert command == 'rcnn-svm train "$RCNN_SVM_DATA/fruit" --seed 1'


def test_commit_is_marked_when_tracked_files_changed(tmp_path):
    git(tmp_path, "init", "-q")
    file = tmp_path / "module.py"
    file.write_text("x = 1\n")
    assert module._commit(file) == "unknown"
    git(tmp_path, "add", "module.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    clean = module._commit(file)
    assert len(clean) == 40
    (tmp_path / "untracked.txt").write_text("")
    assert module._commit(file) == clean
    file.write_text("x = 2\n")
    assert module._commit(file) == clean + "-dirty"


def test_results_being_written_do_not_make_the_tree_dirty(tmp_path):
    git(tmp_path, "init", "-q")
    file, result = tmp_path / "module.py", tmp_path / "results" / "metrics.json"
    result.parent.mkdir()
    file.write_text("x = 1\n")
    result.write_text("{}\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    result.write_text('{"schema": 1}\n')
    assert not module._commit(file).endswith("-dirty")


def test_does_not_load_torch():
    code = (
        "import sys; from rcnn_svm.report.provenance import provenance; provenance(seed=0); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
