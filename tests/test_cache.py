from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm import cache as module
from rcnn_svm.cache import (
    KINDS,
    CacheLimit,
    describe,
    kept_files,
    note_use,
    parse_size,
    prune,
    size_limit,
)
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.features.store import FeatureStore
from rcnn_svm.proposals import GridConfig, proposals_of
from rcnn_svm.structures import GroundTruth, Sample

NOW = time.time()
DAY = 24 * 3600.0

OURS = {
    "proposals": "proposals/{n:02x}/{n:020x}.npz",
    "features": "features/{group:020x}/{n:020x}.npy",
    "fine-tuned networks": "finetuned/{n:020x}.checkpoint",
    "tuned trunks": "tuned/{n:020x}.checkpoint",
    "cells of studies": "study/{n:020x}.npz",
    "maps of frozen blocks": "tuned/maps/{group:020x}/{n:020x}-mirrored.npy",
    "sent to clusters": "cluster/{group:020x}/{n:064x}.npy",
}
FOREIGN = [
    "thesis.tex",
    "proposals/offer.npz",
    "proposals/00/offer.npz",
    "proposals/2024/00000000000000000000.npz",
    "features/readme.md",
    "features/00000000000000000000/notes.npy",
    "features/00000000000000000000/00000000000000000000.npy.bak",
    "features/film/00000000000000000000.npy",
    "finetuned/best.checkpoint",
    "tuned/piano.wav",
    "tuned/maps/00000000000000000000/.hidden.part",
    "photos/features/00000000000000000000/00000000000000000000.npy",
    "opencv-contrib/pyvenv.cfg",
]


def put(path: Path, n_bytes: int, used: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * n_bytes)
    os.utime(path, (used, used))
    return path


def unfinished(path: Path) -> Path:
    """Name a temporary file as `atomic_path` does."""
    return path.with_name(f".{path.name}@0123abcd-7-ab_c1234.part")


def turn(path: Path, used: float) -> tuple[bool, float, str]:
    """Return by what it is decided which of two files goes first: what was trained goes last."""
    return path.suffix == ".checkpoint" or path.parent.name == "study", used, str(path)


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def taken(folder: Path) -> int:
    return sum(file.n_bytes for file in kept_files(folder))


caches = st.lists(
    st.tuples(
        st.sampled_from(sorted(OURS)),
        st.integers(0, 3),  # group
        st.integers(0, 5),  # n
        st.integers(0, 400),  # bytes
        st.integers(0, 40),  # days since use
    ),
    max_size=20,
)


def build(folder: Path, items: list[tuple[str, int, int, int, int]]) -> dict[Path, float]:
    """Write the files of ours, and return when each was used."""
    used = {}
    for kind, group, n, n_bytes, days in items:
        path = put(folder / OURS[kind].format(group=group, n=n), n_bytes, NOW - days * DAY)
        used[path] = path.stat().st_mtime
    return used


@settings(max_examples=40, deadline=None)
@given(items=caches, limit=st.integers(0, 3000))
def test_prune_stays_below_the_limit_and_takes_what_was_trained_last(items, limit) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        used = build(folder, items)
        foreign = {put(folder / place, 10, 0.0) for place in FOREIGN}
        sizes = {path: path.stat().st_size for path in used}
        before = sum(sizes.values())
        done = prune(folder, limit)
        left = files(folder) - foreign
        assert foreign <= files(folder)
        assert taken(folder) == done.n_bytes_left == before - done.n_bytes <= limit
        assert left <= set(used)
        assert done.n_files == len(used) - len(left)
        gone = set(used) - left
        if gone and left:
            assert max(turn(path, used[path]) for path in gone) < min(turn(path, used[path]) for path in left)
        if gone:  # no more than had to go
            last = max(gone, key=lambda path: turn(path, used[path]))
            assert done.n_bytes_left + sizes[last] > limit


@settings(max_examples=40, deadline=None)
@given(items=caches, older=st.integers(0, 40), spared=st.integers(0, 40))
def test_age_removes_and_spares(items, older, spared) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        used = build(folder, items)
        older_than, spared_from = NOW - (older + 0.5) * DAY, NOW - (spared + 0.5) * DAY
        prune(folder, 10**9, older_than=older_than, spared_from=spared_from)
        assert files(folder) == {p for p, at in used.items() if at >= older_than or at >= spared_from}
        prune(folder, 0, spared_from=spared_from)
        assert all(used[path] >= spared_from or not path.stat().st_size for path in files(folder))
        assert {path for path, at in used.items() if at >= spared_from} <= files(folder)


def test_everything_goes_with_its_folders_and_the_kinds_stay(tmp_path: Path) -> None:
    build(tmp_path, [(kind, 1, 2, n, n) for n, kind in enumerate(OURS)])
    put(tmp_path / "features" / f"{1:020x}" / "identity.json", 5, NOW)
    assert {file.kind for file in kept_files(tmp_path)} == set(KINDS) - {"unfinished"}
    prune(tmp_path, 0, older_than=float("inf"))
    assert files(tmp_path) == set()
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {
        *("proposals", "features", "finetuned", "tuned", "tuned/maps", "study", "cluster")
    }


def test_the_identity_of_a_store_goes_after_its_last_file(tmp_path: Path) -> None:
    folder = tmp_path / "features" / f"{1:020x}"
    identity = put(folder / "identity.json", 5, NOW - 30 * DAY)
    old, new = put(folder / f"{1:020x}.npy", 100, NOW - 9 * DAY), put(folder / f"{2:020x}.npy", 100, NOW)
    prune(tmp_path, 150)
    assert files(tmp_path) == {identity, new}
    assert not old.exists()
    prune(tmp_path, 4)
    assert not folder.exists()


def test_links_are_neither_followed_nor_removed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    kept = [
        put(outside / f"{1:020x}.npy", 100, 0.0),
        put(outside / f"{2:020x}" / f"{1:020x}.npy", 100, 0.0),
        put(outside / "00" / f"{1:020x}.npz", 100, 0.0),
    ]
    folder = tmp_path / "cache"
    (folder / "features" / f"{3:020x}").mkdir(parents=True)
    (folder / "features" / f"{1:020x}").symlink_to(outside, target_is_directory=True)
    (folder / "features" / f"{3:020x}" / f"{1:020x}.npy").symlink_to(kept[0])
    (folder / "proposals").symlink_to(outside, target_is_directory=True)
    own = put(folder / "features" / f"{3:020x}" / f"{2:020x}.npy", 100, 0.0)
    links = {path for path in files(folder) if path.is_symlink()}
    assert [file.path for file in kept_files(folder)] == [str(own)]
    assert prune(folder, 0, older_than=float("inf")).n_files == 1
    assert all(path.exists() for path in kept)
    assert files(folder) == links
    assert len(links) == 3


def test_a_cache_that_is_itself_behind_a_link_is_found(tmp_path: Path) -> None:
    build(tmp_path / "disk", [("features", 0, 0, 10, 0)])
    (tmp_path / "cache").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert taken(tmp_path / "cache") == 10


def test_unfinished_files_of_killed_writers_go_and_others_stay(tmp_path: Path) -> None:
    places = [tmp_path / pattern.format(group=1, n=1) for pattern in OURS.values()]
    stale = [put(unfinished(place), 100, NOW - 1.1 * DAY) for place in places]
    writing = {put(unfinished(place.with_stem(f"{2:020x}")), 100, NOW - 0.9 * DAY) for place in places}
    assert {file.kind for file in kept_files(tmp_path)} == {"unfinished"}
    assert prune(tmp_path, 10**9).n_files == len(stale)
    assert files(tmp_path) == writing
    assert prune(tmp_path, 0, older_than=float("inf")).n_bytes_left == 100 * len(OURS)
    assert files(tmp_path) == writing


def test_a_file_that_the_system_keeps_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, [("features", 0, 0, 10, 0), ("proposals", 0, 0, 20, 1)])

    def refuse(path: str) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(os, "unlink", refuse)
    assert prune(tmp_path, 0) == (0, 0, 2, 30)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert list(kept_files(tmp_path / "not yet")) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"file: must be a folder that can be read.*Name another with --cache"
    ):
        list(kept_files(tmp_path / "file"))


def test_use_is_noted_once_a_minute(tmp_path: Path) -> None:
    path = put(tmp_path / "a", 1, time.time() - 59)
    before = path.stat().st_mtime
    assert note_use(path)
    assert path.stat().st_mtime == before
    for used in (time.time() - 61, time.time() + DAY):  # a clock may have run ahead
        put(path, 1, used)
        assert note_use(path)
        assert abs(path.stat().st_mtime - time.time()) < 10
    assert not note_use(tmp_path / "b")
    assert not note_use(path / "below a file")


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("2GB", 2 * 10**9),
        ("500MB", 5 * 10**8),
        ("1.5 tb", 15 * 10**11),
        ("0.3kB", 300),
        (" 7B ", 7),
        ("0MB", 0),
    ],
)
def test_sizes_are_read(text: str, n_bytes: int) -> None:
    assert parse_size(text, "--limit") == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "2", "-1GB", "1e9B", "2GiB", "2 G B", "nan", "1.GB", "inf MB"])
def test_a_size_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text, "--limit")
    assert str(caught.value) == f"--limit must be a size such as 2GB or 500MB, got {text!r}."


def test_the_limit_does_not_shrink_as_the_cache_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = 1_000_000
    monkeypatch.setattr(module, "free_space", lambda folder: disk - taken(folder))
    monkeypatch.delenv("RCNN_SVM_CACHE_LIMIT", raising=False)
    assert size_limit(tmp_path / "new") == 100_000
    build(tmp_path, [("features", 0, n, 5000, 0) for n in range(6)])
    assert size_limit(tmp_path) == 100_000
    monkeypatch.setenv("RCNN_SVM_CACHE_LIMIT", "3GB")
    assert size_limit(tmp_path) == 3 * 10**9
    monkeypatch.setenv("RCNN_SVM_CACHE_LIMIT", "much")
    with pytest.raises(ConfigError, match="RCNN_SVM_CACHE_LIMIT must be a size"):
        size_limit(tmp_path)


def test_what_a_run_uses_stays_until_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = build(tmp_path, [("features", 0, n, 100, 1 + n) for n in range(5)])
    room = CacheLimit(tmp_path, 350)
    assert taken(tmp_path) == 300
    assert "removed 2 files (0 kB), used least recently" in capsys.readouterr().err
    oldest = min(files(tmp_path), key=lambda path: old[path])
    assert note_use(oldest)
    new = [put(tmp_path / OURS["features"].format(group=9, n=n), 100, time.time()) for n in range(6)]
    for _ in range(2):
        room.hold()
        assert files(tmp_path) == {oldest, *new}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, "a removal and one warning, not one a stage"
    assert "what this run uses takes 1 kB, more than the cache's limit of 0 kB" in lines[1]
    room.hold(finished=True)
    assert taken(tmp_path) == 300


def test_no_limit_keeps_everything(tmp_path: Path) -> None:
    old = build(tmp_path, [("features", 0, 0, 100, 400)])
    CacheLimit(tmp_path, None).hold(finished=True)
    assert files(tmp_path) == set(old)


def test_the_line_at_the_end_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build(tmp_path / "my cache", [("features", 0, 0, 123_456, 0)])
    assert describe(tmp_path / "my cache", 2 * 10**9) == (
        f"Cache: {tmp_path}/my cache holds 123 kB of at most 2.0 GB. "
        f"`rcnn-svm cache prune --all --cache '{tmp_path}/my cache'` empties it."
    )
    assert "prune --all` empties" in describe(tmp_path / "rcnn_svm", 10**9)


class Mean:
    """A featurizer of one number a region."""

    key: dict[str, int] = {}  # noqa: RUF012
    n_features = 1

    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        return np.full((len(boxes), 1), image.mean(), np.float32)


def test_what_another_process_removes_is_computed_again(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from rcnn_svm.cache import prune\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    prune(Path(sys.argv[1]), 0, older_than=float('inf'))\n"
    )
    pixels = [np.full((30, 40, 3), i, np.uint8) for i in range(20)]
    samples = [
        Sample(str(i), (30, 40), GroundTruth.empty(), render=lambda p=p: p) for i, p in enumerate(pixels)
    ]
    regions = GridConfig(50).propose(pixels[0]).boxes
    store = FeatureStore(tmp_path / "features", Mean())
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"  # its imports take seconds on a busy machine
            starts, rounds, missing = time.monotonic(), 0, 0
            while (took := time.monotonic() - starts) < 2.0 or (took < 60.0 and (rounds <= 3 or not missing)):
                rounds += 1
                for i, sample in enumerate(samples):
                    found = proposals_of(sample, GridConfig(50), tmp_path / "proposals")
                    np.testing.assert_array_equal(found.boxes, regions)
                    np.testing.assert_array_equal(store.get(sample, regions), np.full((len(regions), 1), i))
                store.fill(samples, [regions] * len(samples))
                missing += sum(not store.path(sample, regions).exists() for sample in samples)
            assert other.poll() is None
        finally:
            other.kill()
    assert rounds > 3
    assert missing > 0, "the other process removed nothing"


def test_files_that_vanish_between_the_look_and_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every reader says that the file is there, and then it is not."""
    import rcnn_svm.features.store
    import rcnn_svm.proposals.cache

    for reader in (rcnn_svm.features.store, rcnn_svm.proposals.cache):
        monkeypatch.setattr(reader, "note_use", lambda path: path.unlink(missing_ok=True) or True)
    image = np.full((30, 40, 3), 7, np.uint8)
    sample = Sample("a", (30, 40), GroundTruth.empty(), render=lambda: image)
    regions = proposals_of(sample, GridConfig(50), tmp_path).boxes
    np.testing.assert_array_equal(
        FeatureStore(tmp_path, Mean()).get(sample, regions), np.full((len(regions), 1), 7)
    )
    assert capsys.readouterr().err == ""
