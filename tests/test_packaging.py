"""What a source distribution holds, and the versions that it names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import yaml

import rcnn_svm

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "examples", "rcnn_svm", "results", "scripts", "tests")


def build(kind: str, folder: Path) -> Path:
    """Build a distribution of the project in `folder` and return its file."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True)
    (packed,) = (folder / "dist").iterdir()
    return packed


def test_a_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "rcnn_svm", tmp_path / "rcnn_svm", ignore=shutil.ignore_patterns("__pycache__", "*.py[cod]")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    expected = {
        path.relative_to(tmp_path).as_posix() for path in (tmp_path / "rcnn_svm").rglob("*") if path.is_file()
    }
    with zipfile.ZipFile(build("wheel", tmp_path)) as archive:
        assert expected - set(archive.namelist()) == set()
    assert "rcnn_svm/report/report.html.jinja" in expected


def test_a_source_distribution_holds_all_that_its_tests_read(tmp_path: Path) -> None:
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.py[cod]")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, tmp_path)
    expected = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert expected - names == set()


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert rcnn_svm.__version__ == project["version"] == citation["version"]
