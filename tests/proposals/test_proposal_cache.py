"""The proposal cache: keys, order, damage, threads."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from rcnn_svm.errors import ConfigError
from rcnn_svm.files import digest, seal
from rcnn_svm.proposals import (
    GridConfig,
    SelectiveSearchConfig,
    cached_proposals,
    iterate_proposals,
    proposals_of,
)
from rcnn_svm.structures import GroundTruth, Sample


def sample(i, size=(40, 60)):
    image = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Sample(str(i), size, GroundTruth.empty(), render=lambda: image)


class Counting:
    """A proposer that counts its calls."""

    def __init__(self):
        self.calls = 0
        self.lock = threading.Lock()

    def key(self):
        return {"proposer": "counting"}

    def propose(self, image):
        with self.lock:
            self.calls += 1
        return GridConfig(20).propose(image)


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_in_order_computed_once_and_equal_when_read_back(tmp_path, n_jobs):
    samples = [sample(i, (30 + i, 50)) for i in range(9)]
    proposer = Counting()
    first = cached_proposals(samples, proposer, tmp_path, n_jobs=n_jobs)
    again = cached_proposals(samples, proposer, tmp_path, n_jobs=n_jobs)
    assert proposer.calls == 9
    for s, a, b in zip(samples, first, again, strict=True):
        assert a.image_id == b.image_id == s.image_id
        assert a.size == b.size == s.size
        assert a.boxes.tobytes() == b.boxes.tobytes()
        assert a.priority.tobytes() == b.priority.tobytes()


def test_selective_search_files_do_not_depend_on_threads(tmp_path):
    samples = [sample(i) for i in range(4)]
    config = SelectiveSearchConfig(min_size=2)
    for n_jobs in (1, 2):
        cached_proposals(samples, config, tmp_path / str(n_jobs), n_jobs=n_jobs)
    files = [sorted((tmp_path / n).rglob("*.npz")) for n in ("1", "2")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    assert len(files[0]) == 4
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_content_and_settings_are_the_key(tmp_path):
    proposals_of(sample(1), SelectiveSearchConfig(), tmp_path)
    proposals_of(sample(1), SelectiveSearchConfig(seed=3), tmp_path)
    proposals_of(sample(2), SelectiveSearchConfig(), tmp_path)
    assert len(list(tmp_path.rglob("*.npz"))) == 3
    renamed = sample(1)
    renamed = Sample("other", renamed.size, renamed.truth, render=renamed.render)
    assert proposals_of(renamed, SelectiveSearchConfig(), tmp_path).image_id == "other"
    assert len(list(tmp_path.rglob("*.npz"))) == 3


def test_files_of_the_release_before_seals_are_not_called_damaged(tmp_path, capfd):
    one, proposer = sample(1), Counting()
    name = digest({"image": one.digest(), "proposer": proposer.key()})  # as that release named them
    older = tmp_path / name[:2] / f"{name}.npz"
    older.parent.mkdir()
    older.write_bytes(b"without a seal")
    proposals_of(one, proposer, tmp_path)
    assert proposer.calls == 1
    assert capfd.readouterr() == ("", "")
    assert older.read_bytes() == b"without a seal"


@pytest.mark.parametrize("ranking", ["paper", "diverse"])
def test_a_mere_cut_is_no_part_of_the_key(tmp_path, ranking, monkeypatch):
    image, searched = sample(1), []
    search = SelectiveSearchConfig.propose

    def counting(config, *arguments, **words):
        searched.append(config.max_regions)
        return search(config, *arguments, **words)

    monkeypatch.setattr(SelectiveSearchConfig, "propose", counting)
    whole = SelectiveSearchConfig(min_size=2, ranking=ranking)
    for n in (7, 3, None, 1, 100_000):
        config = replace(whole, max_regions=n)
        kept, fresh = proposals_of(image, config, tmp_path), search(config, image.read())
        assert len(kept) == min(n or 100_000, len(proposals_of(image, whole, tmp_path)))
        assert kept.boxes.tobytes() == fresh.boxes.tobytes()
        assert kept.priority.tobytes() == fresh.priority.tobytes()
    assert searched == [None]
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    assert proposals_of(image, replace(whole, max_regions=3), tmp_path).boxes.base is None


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 nonsense", None])
def test_a_damaged_file_is_computed_again_with_a_word(tmp_path, capsys, damage):
    proposer = Counting()
    whole = proposals_of(sample(1), proposer, tmp_path)
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:-30] if damage is None else damage)
    again = proposals_of(sample(1), proposer, tmp_path)
    assert proposer.calls == 2
    assert again.boxes.tobytes() == whole.boxes.tobytes()
    message = capsys.readouterr().err
    assert message.startswith(f"{path}: is damaged, or holds ")
    assert message.endswith("It is computed again.\n")
    proposals_of(sample(1), proposer, tmp_path)
    assert proposer.calls == 2


def test_a_file_of_another_image_is_computed_again(tmp_path, capsys):
    first, second = (proposals_of(sample(i), Counting(), tmp_path) for i in (1, 3))
    assert first.size == second.size
    one, other = sorted(tmp_path.rglob("*.npz"))
    content = one.read_bytes(), other.read_bytes()
    one.write_bytes(content[1])
    other.write_bytes(content[0])
    for i in (1, 3):
        proposals_of(sample(i), Counting(), tmp_path)
    assert capsys.readouterr().err.count("is damaged, or holds proposals of another image") == 2
    assert (one.read_bytes(), other.read_bytes()) == content


def test_a_file_of_another_size_is_computed_again(tmp_path, capsys):
    proposals_of(sample(1), Counting(), tmp_path)
    (path,) = tmp_path.rglob("*.npz")
    with open(path, "wb") as stream:
        np.savez(stream, size=np.array([4, 4]), boxes=np.zeros((0, 4)), priority=np.zeros(0))
    seal(path, path.stem)
    assert len(proposals_of(sample(1), Counting(), tmp_path)) > 0
    assert (
        f"{path}: must be of a (40, 60) image, got (4, 4). It is computed again." in capsys.readouterr().err
    )


def test_without_a_folder_nothing_is_kept(tmp_path):
    proposer = Counting()
    for _ in range(2):
        assert len(cached_proposals([sample(1)], proposer, None)) == 1
    assert proposer.calls == 2
    assert not list(tmp_path.iterdir())


def test_stays_close_ahead_of_a_slow_consumer():
    proposer = Counting()
    stream = iterate_proposals([sample(i) for i in range(30)], proposer, None, n_jobs=2)
    next(stream)
    stream.close()
    assert proposer.calls <= 4


def test_no_samples_and_no_threads(tmp_path):
    assert cached_proposals([], GridConfig(), tmp_path, n_jobs=2) == []
    with pytest.raises(ConfigError) as caught:
        cached_proposals([], GridConfig(), tmp_path, n_jobs=0)
    assert str(caught.value) == "proposals: n_jobs must be at least 1, got 0."
