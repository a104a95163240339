from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from rcnn_svm import cache, files
from rcnn_svm.boxes import Boxes
from rcnn_svm.errors import CacheError, DiskSpaceError, ShapeError
from rcnn_svm.features.store import (
    DerivedStore,
    FeatureStore,
    Featurizer,
    RowReader,
    Wanted,
    fill_together,
    to_float32,
)
from rcnn_svm.structures import GroundTruth, Image, Sample


class MeanColour:
    """A featurizer of three numbers a region, slow enough to be interrupted."""

    n_features = 3

    def __init__(self, gain: float = 1.0, delay_s: float = 0.0) -> None:
        self.key = {"gain": gain}
        self.gain = gain
        self.delay_s = delay_s
        self.calls = 0

    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        self.calls += 1
        time.sleep(self.delay_s)
        rows = [
            image[int(y1) : int(y2), int(x1) : int(x2)].mean(axis=(0, 1)) * self.gain
            for x1, y1, x2, y2 in boxes
        ]
        return np.array(rows, np.float32).reshape(len(boxes), 3)


class Double:
    key = {"double": 1}  # noqa: RUF012
    n_features = 3

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return features * 2


def sample(i: int) -> Sample:
    pixels = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    return Sample(f"image-{i}", (20, 30), GroundTruth.empty(), render=lambda: pixels)


def regions(i: int, n: int = 5) -> np.ndarray:
    corner = np.random.default_rng(1000 + i).integers(0, 10, (n, 2))
    return np.concatenate([corner, corner + 8], axis=1).astype(np.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.npy")}


def test_rows_are_computed_once_and_mapped_after(tmp_path: Path) -> None:
    featurizer = MeanColour()
    store = FeatureStore(tmp_path, featurizer, precision="float32")
    samples, boxes = [sample(i) for i in range(4)], [regions(i) for i in range(4)]
    store.fill(samples, boxes)
    assert featurizer.calls == 4
    rows = store.get(samples[2], boxes[2])
    assert isinstance(rows, np.memmap)
    np.testing.assert_array_equal(rows, MeanColour()(samples[2].read(), boxes[2]))
    rows[:] = 0
    assert (store.get(samples[2], boxes[2]) != 0).any(), "writing to the array must not reach the file"
    store.fill(samples, boxes)
    assert featurizer.calls == 4


class Layered:
    """Colours times a factor, off an image that those of one factor's sign open once for all."""

    n_features = 3

    def __init__(self, factor: float) -> None:
        self.factor, self.opened = factor, 0

    @property
    def key(self) -> dict[str, float]:
        return {"factor": self.factor}

    def __call__(self, image: Image, boxes: Boxes) -> np.ndarray:
        return self.of_image(image)(boxes)

    def of_image(self, image: Image) -> RowReader:
        return self.of_image_with(image)[0]

    def reads_with(self, other: Featurizer) -> bool:
        return isinstance(other, Layered) and (other.factor > 0) == (self.factor > 0)

    def of_image_with(self, image: Image, *others: Layered) -> list[RowReader]:
        self.opened += 1
        return [partial(MeanColour(one.factor), image) for one in (self, *others)]


def test_an_image_that_several_stores_want_is_opened_once(tmp_path: Path) -> None:
    kinds = [Layered(factor) for factor in (1.0, -1.0, 2.0, -2.0, 3.0)]
    stores = [FeatureStore(tmp_path / "together", kind) for kind in kinds]
    samples = [sample(i) for i in range(4)]
    # Each wants its own images, and its own regions of them.
    wanted = [
        Wanted(store, samples[i % 2 :], [regions(s + i) for s in range(4)][i % 2 :])
        for i, store in enumerate(stores)
    ]
    fill_together(wanted)
    assert [kind.opened for kind in kinds] == [4, 3, 0, 0, 0]
    for kind, (store, own, boxes) in zip(kinds, wanted, strict=True):
        alone = FeatureStore(tmp_path / "alone", Layered(kind.factor))
        alone.fill(own, boxes)
        assert contents(alone.folder) == contents(store.folder)
    fill_together(wanted)
    assert sum(kind.opened for kind in kinds) == 7


def test_half_precision_is_the_rounded_single(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MeanColour())
    rows = store.get(sample(0), regions(0))
    assert rows.dtype == np.float16
    np.testing.assert_array_equal(rows, MeanColour()(sample(0).read(), regions(0)).astype(np.float16))


def test_conversion_is_exact() -> None:
    every_half = np.arange(65536, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(to_float32(every_half), every_half.astype(np.float32))
    assert to_float32(np.zeros((0, 3), np.float16)).shape == (0, 3)


def test_every_part_of_the_identity_changes_the_place(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MeanColour())
    places = {
        store.path(sample(0), regions(0)),
        store.path(sample(1), regions(0)),
        store.path(sample(0), regions(1)),
        FeatureStore(tmp_path, MeanColour(2.0)).path(sample(0), regions(0)),
        FeatureStore(tmp_path, MeanColour(), precision="float32").path(sample(0), regions(0)),
    }
    assert len(places) == 5


def test_an_image_without_regions_has_an_empty_file(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MeanColour())
    none = np.zeros((0, 4), np.float32)
    assert store.get(sample(0), none).shape == (0, 3)
    assert store.get(sample(0), none).shape == (0, 3)


def test_a_damaged_file_is_said_and_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FeatureStore(tmp_path, MeanColour())
    before = np.array(store.get(sample(0), regions(0)))
    path = store.path(sample(0), regions(0))
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(store.get(sample(0), regions(0)), before)
    assert "damaged" in capsys.readouterr().err


def _flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


@pytest.mark.parametrize("damage", ["shape", "bit", "tail", "swap", "zeros", "empty", "seal"])
def test_every_damage_is_found_and_mended(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FeatureStore(tmp_path, MeanColour())
    before = [np.array(store.get(sample(i), regions(i))) for i in (0, 1)]
    path, other = (store.path(sample(i), regions(i)) for i in (0, 1))
    whole = path.read_bytes()
    damaged = {
        "bit": _flip(whole, 130),
        "tail": whole[:140] + bytes(len(whole) - 140),
        "swap": other.read_bytes(),
        "zeros": bytes(len(whole)),
        "empty": b"",
        "seal": whole[:-32],
    }
    path.unlink()  # a file that is written anew is another one to the system
    if damage == "shape":
        np.save(path, np.zeros((2, 2), np.float16))
    else:
        path.write_bytes(damaged[damage])
    np.testing.assert_array_equal(store.get(sample(0), regions(0)), before[0])
    assert f"{path}: damaged" in capsys.readouterr().err
    assert path.read_bytes() == whole
    np.testing.assert_array_equal(store.get(sample(1), regions(1)), before[1])
    assert capsys.readouterr().err == ""


def test_a_file_is_read_through_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    checksum = files._checksum
    monkeypatch.setattr(files, "_checksum", lambda content: checked.append(1) or checksum(content))
    store = FeatureStore(tmp_path, MeanColour())
    store.get(sample(0), regions(0))
    path = store.path(sample(0), regions(0))
    assert len(checked) == 2  # one makes the seal, one looks at it
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))  # by another program
    store.get(sample(0), regions(0))
    assert len(checked) == 3
    monkeypatch.setattr(cache, "_PRECISION_S", -1.0)  # each use is noted in the file's time
    for _ in range(3):
        store.get(sample(0), regions(0))
    assert path.stat().st_mtime > an_hour_ago + 3000
    assert len(checked) == 3
    path.write_bytes(_flip(path.read_bytes(), 130))
    store.get(sample(0), regions(0))
    assert len(checked) == 6  # found, sealed anew, looked at


def test_nan_features_name_their_image(tmp_path: Path) -> None:
    featurizer = MeanColour()
    featurizer.gain = float("nan")
    with pytest.raises(CacheError, match=r"image 'image-0' has features that are NaN"):
        FeatureStore(tmp_path, featurizer).get(sample(0), regions(0))


def test_lengths_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="1 images but 2 lists of boxes"):
        FeatureStore(tmp_path, MeanColour()).fill([sample(0)], [regions(0), regions(1)])


def test_a_disk_too_small_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    featurizer = MeanColour()
    store = FeatureStore(tmp_path, featurizer)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(DiskSpaceError, match=r"needs 0\.00 GB, only 0\.00 GB are free"):
        store.fill([sample(0)], [regions(0)])
    assert featurizer.calls == 0


def test_the_estimate_counts_only_what_is_missing(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MeanColour())
    samples, boxes = [sample(i) for i in range(4)], [regions(i) for i in range(4)]
    store.get(samples[0], boxes[0])
    estimate = store.estimate(samples, boxes)
    assert estimate.n_images == 3
    store.fill(samples, boxes)
    written = sum(store.path(s, b).stat().st_size for s, b in zip(samples[1:], boxes[1:], strict=True))
    assert estimate.n_bytes == written
    assert store.estimate(samples, boxes).n_images == 0


def test_derived_features_are_kept_too(tmp_path: Path) -> None:
    base = FeatureStore(tmp_path, MeanColour(), precision="float32")
    derived = DerivedStore(base, Double())
    samples, boxes = [sample(0), sample(1)], [regions(0), regions(1)]
    derived.fill(samples, boxes)
    np.testing.assert_array_equal(derived.get(samples[1], boxes[1]), base.get(samples[1], boxes[1]) * 2)
    assert derived.folder != base.folder


def run_child(folder: Path) -> subprocess.Popen[bytes]:
    """Fill a store in a process of its own, which can be killed."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_store import *\n"
        f"store = FeatureStore(Path({str(folder)!r}), MeanColour(delay_s=0.002))\n"
        "store.fill([sample(i) for i in range(120)], [regions(i) for i in range(120)])\n"
    )
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    FeatureStore(undisturbed, MeanColour()).fill(
        [sample(i) for i in range(120)], [regions(i) for i in range(120)]
    )
    folder = tmp_path / "killed"
    moments = random.Random(0)
    kills = 0
    started = time.perf_counter()
    assert run_child(tmp_path / "timing").wait() == 0
    whole_run_s = time.perf_counter() - started
    while kills < 50:
        two = [run_child(folder), run_child(folder)]  # two writers at once
        time.sleep(moments.uniform(0.5, 1.0) * whole_run_s)
        for child in two:
            if child.poll() is None:
                os.kill(child.pid, signal.SIGKILL)
                kills += 1
            child.wait()
        for name, data in contents(folder).items():
            assert data == contents(undisturbed)[name], "a half-written file passes for whole"
        if len(contents(folder)) == 120:
            for path in sorted(folder.rglob("*.npy"))[:100]:  # start over, so that kills hit real work
                path.unlink()
    assert run_child(folder).wait() == 0
    assert contents(folder) == contents(undisturbed)
