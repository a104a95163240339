"""What is free is the least of all limits, and errors of libraries tell what they wanted."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn_svm.datasets import images
from rcnn_svm.datasets.images import image_size, read_image
from rcnn_svm.errors import DataError
from rcnn_svm.memory import asked_for, free_memory, gigabytes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("message", "n"),
    [
        ("Unable to allocate 3.10 GiB for an array with shape (5, 7) and data type float64", 3.1 * GIB),
        ("Unable to allocate 256. PiB for an array", 256 * 1024**5),
        ("Unable to allocate 120. bytes for an array", 120),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12", 4096),
        ("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB", 20 << 20),
        (
            "(-4:Insufficient memory) Failed to allocate 538230000 bytes in function 'OutOfMemoryError'",
            538230000,
        ),
        ("std::bad_alloc", None),
        ("can't start new thread", None),
        ("cannot allocate memory", None),
        ("", None),
    ],
)
def test_messages_tell_what_was_asked_for(message: str, n: float | None) -> None:
    assert asked_for(message) == (None if n is None else int(n))


def machine(
    root: Path,
    *,
    available: int = 8 * GIB,
    swap: int = 0,
    cgroup: str = "0::/\n",
    groups: dict[str, str] | None = None,
) -> Path:
    """Write the files of a system in which 1 GiB of addresses are in use."""
    texts = {
        "proc/self/status": "Name:\tx\nVmSize:\t 1048576 kB\nThreads:\t1\n",
        "proc/meminfo": f"MemTotal: 9 kB\nMemAvailable:   {available >> 10} kB\nSwapFree: {swap >> 10} kB\n",
        "proc/self/cgroup": cgroup,
        **(groups or {}),
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The limit of the process, none at first."""
    set_to = {"as": resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (set_to["as"], set_to["as"]))
    return set_to


def test_what_is_free_is_the_least_of_all_limits(tmp_path: Path, limit: dict[str, int]) -> None:
    assert free_memory(root=machine(tmp_path / "plain")) == 8 * GIB
    assert free_memory(root=machine(tmp_path / "swap", swap=GIB)) == 9 * GIB
    limit["as"] = 3 * GIB
    assert free_memory(root=machine(tmp_path / "limit")) == 2 * GIB
    limit["as"] = GIB // 2
    assert free_memory(root=machine(tmp_path / "over")) == 0


@pytest.mark.parametrize(
    ("cgroup", "folder", "names"),
    [
        ("0::/\n", "", ("memory.max", "memory.current", "inactive_file")),
        ("0::/a/b\n", "a/b", ("memory.max", "memory.current", "inactive_file")),
        ("0::/a/b\n", "a", ("memory.max", "memory.current", "inactive_file")),
        ("0::/docker/of/the/host\n", "", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:cpu:/x\n4:memory:/x\n",
            "memory/x",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_control_groups_of_both_versions_and_above(
    cgroup: str, folder: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    limit, use, cached = names
    place = f"sys/fs/cgroup/{folder}".rstrip("/")
    groups = {
        f"{place}/{limit}": f"{4 * GIB}\n",
        f"{place}/{use}": f"{3 * GIB}\n",
        f"{place}/memory.stat": f"anon 5\n{cached} {GIB // 2}\nfile 9\n",
    }
    assert free_memory(root=machine(tmp_path, cgroup=cgroup, groups=groups)) == 1.5 * GIB
    for none in ("max\n", f"{2**63 - 4096}\n"):
        (tmp_path / place / limit).write_text(none)
        assert free_memory(root=tmp_path) == 8 * GIB


def test_without_anything_that_tells_nothing_is_said(tmp_path: Path) -> None:
    assert free_memory(root=tmp_path) is None
    assert free_memory("of which 1.50 GiB is free. Including", root=tmp_path) == 1.5 * GIB
    assert (free_memory() or 0) > 1_000_000
    assert [gigabytes(n) for n in (0, 999_000_000, 10**9)] == ["0 MB", "999 MB", "1.0 GB"]


def test_an_image_that_does_not_fit_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.zeros((4000, 5000), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "free_memory", lambda: 139_999_999)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    words = (
        r"a\.png: needs 140 MB or more of memory for 5000 x 4000 pixels, 140 MB are free\. Make it smaller"
    )
    with pytest.raises(DataError, match=words):
        read_image(tmp_path / "a.png")
    assert image_size(tmp_path / "a.png") == (4000, 5000)
    monkeypatch.undo()
    monkeypatch.setattr(images, "free_memory", lambda: None)
    assert read_image(tmp_path / "a.png").shape == (4000, 5000, 3)
