from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from rcnn_svm.errors import DataError, DiskSpaceError
from rcnn_svm.files import (
    atomic_path,
    digest,
    file_digest,
    read_json,
    require_free_space,
    scratch_file,
    write_json,
)


def test_a_failed_write_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})

    def interrupted() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert read_json(target) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_another_process_tidies_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, make, emptied = tmp_path / "new" / "a.json", tempfile.mkstemp, []

    def disturbed(**where: Any) -> tuple[int, str]:
        if len(emptied) < 2:
            emptied.append(where["dir"])
            where["dir"].rmdir()
        return make(**where)

    monkeypatch.setattr(tempfile, "mkstemp", disturbed)
    write_json(target, 1)
    assert read_json(target) == 1
    assert len(emptied) == 2


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskSpaceError, match=r"out\.bin: the disk is full\. Free some space"),
        atomic_path(tmp_path / "out.bin"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_json(tmp_path / "file" / "a.json", {})


def test_work_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(DiskSpaceError, match=r"needs 1000000000\.00 GB, only .* GB are free"):
        require_free_space(tmp_path, 10**18)


def test_broken_json_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2')
    with pytest.raises(DataError, match=r"a\.json: must be JSON, got a syntax error at line 1, column 12"):
        read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="must be UTF-8 text"):
        read_json(path)
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_digests(tmp_path: Path) -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_scratch_file_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with scratch_file(folder) as file:
        file.write(b"abc")
        file.seek(1)
        assert file.read() == b"bc"
    assert list(folder.iterdir()) == []


def test_a_scratch_file_on_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(DiskSpaceError, match="the disk is full"), scratch_file(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_writer_that_makes_files_of_its_own_leaves_none(tmp_path: Path) -> None:
    """safetensors writes a file of a name of its own first: a kill would leave it among the user's files."""
    target = tmp_path / "weights.safetensors"
    with atomic_path(target, apart=True) as temporary:
        (temporary.parent / ".tmpabcdef").write_text("half")
        temporary.write_text("whole")
        assert [path.name for path in tmp_path.iterdir()] == [temporary.parent.name]
        assert temporary.parent.name.startswith(".")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
    assert target.read_text() == "whole"
    with contextlib.suppress(KeyError), atomic_path(target, apart=True) as temporary:
        temporary.write_text("other")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
    assert target.read_text() == "whole"
