"""Faults of the machine: full disks, folders that cannot be written to, no files, no memory, streams that are
closed or full, signals, damaged caches.

What must hold: one sentence and the right exit code, no traceback, finished work kept, and the bytes of an
undisturbed run where the command succeeds, also once the fault is over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.campaign.kills import Kills
from tests.campaign.scene import VERBS, Scene, copied, snapshot
from tests.campaign.tally import Defect, Finished, Tally, forked

__all__ = ["FAULTS", "Faults"]

_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class Faults:
    """Makes commands meet faults.

    Args:
        scene: inputs.
        kills: knows the undisturbed runs.
        folder: to work in.
    """

    def __init__(self, scene: Scene, kills: Kills, folder: Path) -> None:
        self._scene, self._kills, self._folder = scene, kills, folder

    def try_one(self, fault: str, seed: int, number: int, tally: Tally) -> None:
        """Let one command meet a fault that the numbers choose, and note what is wrong."""
        rng = Random(f"{seed}/{fault}/{number}")
        place = self._folder / "fault"
        copied({}, place)
        verb, done, what = FAULTS[fault](self, rng, place)
        tally.add(f"{fault}, {verb}", _outcome(done.code)) if not what else tally.add(
            f"{fault}, {verb}",
            "",
            Defect(fault, f"{verb}: {what}", f"{seed}/{fault}/{number}", done.err[-600:]),
        )
        shutil.rmtree(place, ignore_errors=True)

    def _verb(self, rng: Random) -> str:
        return rng.choice(VERBS)

    def _again(self, verb: str, place: Path, *, anew: bool = False) -> str:
        """Return what is wrong with the command once the fault is over; empty where nothing is."""
        if anew:
            shutil.rmtree(place / "out", ignore_errors=True)
        done = forked(self._scene.job(verb), place, limit_s=300)
        if done.faults(0):
            return f"once the fault is over: {done.faults(0)}: {done.err[-200:]}"
        return self._same(verb, place)

    def _same(self, verb: str, place: Path) -> str:
        found = snapshot(place)
        for name, digest in self._kills.undisturbed(verb, 0).files.items():
            if found.get(name) != digest:
                return f"ends with another {Path(name).name}"
        return ""

    def _judge(self, verb: str, done: Finished, place: Path, *codes: int) -> str:
        """Return what is wrong with an end under a fault, and with the command once it is over."""
        what = done.faults(0, *codes)
        if what:
            return what
        litter = [name for name in snapshot(place, parts=True) if name.endswith(".part")]
        if litter:
            return f"an unfinished file stays: {Path(litter[0]).name.partition('@')[0]}"
        return self._same(verb, place) if done.code == 0 else self._again(verb, place)

    def full_disk_by_number(self, rng: Random, place: Path) -> tuple[str, Finished, str]:
        """The n-th step of file work says that the disk is full, and so do all after it."""
        verb = self._verb(rng)
        n = rng.randint(1, self._kills.undisturbed(verb, 0).n_steps)
        number = rng.choice((errno.ENOSPC, errno.EDQUOT, errno.EIO))
        done = forked(self._scene.job(verb, before=_failing(n, number)), place, limit_s=300)
        return verb, done, self._judge(verb, done, place, 3)

    def full_disk(self, rng: Random, place: Path) -> tuple[str, Finished, str]:
        """Output or cache lie on a small disk."""
        verb = rng.choice(("train", "detect", "propose", "extract", "finetune", "compare", "digits"))
        where = place / rng.choice(("out", "cache"))
        size = rng.choice((40, 100, 300, 1000, 2000, 4000))
        with _small_disk(where, f"size={size}k") as mounted:
            if not mounted:
                return self.full_disk_by_number(rng, place)
            done = forked(self._scene.job(verb), place, limit_s=300)
            what = done.faults(0, 2, 3) if verb == "digits" else done.faults(0, 3)
            litter = [name for name in snapshot(place, parts=True) if name.endswith(".part")]
            if not what and litter:
                what = "an unfinished file stays"
        return verb, done, what or self._again(verb, place)

    def read_only(self, rng: Random, place: Path) -> tuple[str, Finished, str]:
        """Output or cache cannot be written to, or are no folder."""
        verb = self._verb(rng)
        where = place / rng.choice(("out", "cache"))
        way = rng.choice(("ro", "file", "files are folders"))
        if way == "file":
            where.write_text("in the way")
            done = forked(self._scene.job(verb), place, limit_s=300)
            if where.read_text() != "in the way":
                return verb, done, "a file of the user was replaced"
            where.unlink()
        elif way == "ro":
            with _small_disk(where, "size=1m,ro") as mounted:
                if not mounted:
                    return self.full_disk_by_number(rng, place)
                done = forked(self._scene.job(verb), place, limit_s=300)
        else:
            for name in self._kills.undisturbed(verb, 0).files:
                if name.startswith("out/"):
                    (place / name).mkdir(parents=True, exist_ok=True)
            done = forked(self._scene.job(verb), place, limit_s=300)
            what = done.faults(2, 3)
            return verb, done, what or self._again(verb, place, anew=True)
        what = done.faults(0, 2, 3)
        if not what and done.code == 0:  # what could not be used was not needed
            return verb, done, self._same(verb, place)
        return verb, done, what or self._again(verb, place)

    def few_files(self, rng: Random, place: Path) -> tuple[str, Finished, str]:
        """There are few file handles."""
        verb, n = self._verb(rng), rng.choice((6, 8, 10, 12, 16, 24, 64))

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))

        done = forked(self._scene.job(verb, before=limit), place, limit_s=300)
        return verb, done, self._judge(verb, done, place, 3)

    def little_memory(self, rng: Random, place: Path) -> tuple[str, Finished, str]:
        """There is little memory."""
        verb, megabytes = self._verb(rng), rng.choice((1, 4, 10, 20, 40, 80, 150, 300))

        def limit() -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            bound = pages * resource.getpagesize() + (megabytes << 20)
            resource.setrlimit(resource.RLIMIT_AS, (bound, bound))

        done = forked(self._scene.job(verb, before=limit), place, limit_s=120)
        if done.code == 134 and "LLVM ERROR: out of memory" in done.err:  # it ends the process itself
            return verb, done, self._again(verb, place)
        return verb, done, self._judge(verb, done, place, 3)

    def signals(self, rng: Random, place: Path) -> tuple[str, Finished, str]:
        """A signal comes at any moment, and perhaps a second one."""
        verb, number = self._verb(rng), rng.choice(tuple(_CODES))
        moment = rng.random() * 1.05 * self._kills.undisturbed(verb, 0).seconds
        done = forked(self._scene.job(verb), place, limit_s=300, meanwhile=[(moment, number)])
        # Before our code runs, and when it is done, the system's way holds: the same code, no words.
        if done.code == _CODES[number] and not done.err:
            return verb, done, self._again(verb, place)
        return verb, done, self._judge(verb, done, place, _CODES[number])

    def starting(self, rng: Random, place: Path) -> tuple[str, Finished, str]:
        """A signal comes while the command starts, from its first line on."""
        verb, number = self._verb(rng), rng.choice(tuple(_CODES))
        script = "import sys, rcnn_svm.cli as c; print('on', flush=True); sys.exit(c.main())"
        child = subprocess.Popen(
            [sys.executable, "-c", script, *self._scene.words(verb)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in _CODES],
        )
        assert child.stdout is not None
        child.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.005 + rng.random() ** 2 * 3)
        child.send_signal(number)
        out, err = child.communicate(timeout=120)
        code = 128 - child.returncode if child.returncode < 0 else child.returncode
        done = Finished(code, out, err, 0.0)
        if code == _CODES[number] and "rcnn-svm:" not in err and "Traceback" not in err:
            return verb, done, ""  # as above
        return verb, done, done.faults(0, _CODES[number])

    def streams(self, rng: Random, place: Path) -> tuple[str, Finished, str]:
        """stdout or stderr are closed, full, or their reader has left."""
        verb = self._verb(rng)
        name, way = rng.choice(("stdout", "stderr")), rng.choice(("closed", "full", "left"))

        def change() -> None:
            number = 1 if name == "stdout" else 2
            if way == "closed":
                os.close(number)
                setattr(sys, name, None)
                return
            if way == "full":
                handle = os.open("/dev/full", os.O_WRONLY)
            else:
                reader, handle = os.pipe()
                os.close(reader)
            os.dup2(handle, number)
            os.close(handle)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115

        done = forked(self._scene.job(verb, before=change), place, limit_s=300)
        codes = {"closed": (0,), "full": (0, 3), "left": (0, 141)}[way] if name == "stdout" else (0,)
        return verb, done, done.faults(*codes) or self._same(verb, place)

    def damaged_cache(self, rng: Random, place: Path) -> tuple[str, Finished, str]:
        """Files of a cache were damaged: they are made again, and the result is the same."""
        verb = rng.choice(("train", "compare", "propose", "finetune"))
        copied([self._kills.undisturbed(verb, 0).place / "cache"], place)
        kept = [
            p for p in sorted((place / "cache").rglob("*")) if p.is_file() and p.suffix in (".npy", ".npz")
        ]
        way = rng.choice(("flip", "zero tail", "cut", "swap", "empty", "folder"))
        for path in rng.sample(kept, min(len(kept), rng.choice((1, 3, 100)))):
            _damage(path, way, [p for p in kept if p.suffix == path.suffix], rng)
        done = forked(self._scene.job(verb), place, limit_s=300)
        if way == "folder":
            return verb, done, done.faults(0, 3)
        return verb, done, done.faults(0) or self._same(verb, place)


FAULTS: dict[str, Callable[[Faults, Random, Path], tuple[str, Finished, str]]] = {
    "disk full": Faults.full_disk,
    "disk full at a step": Faults.full_disk_by_number,
    "output cannot be written": Faults.read_only,
    "few file handles": Faults.few_files,
    "little memory": Faults.little_memory,
    "signal": Faults.signals,
    "signal at the start": Faults.starting,
    "streams": Faults.streams,
    "damaged cache": Faults.damaged_cache,
}
"""The faults by name."""


def _outcome(code: int) -> str:
    return {0: "done"}.get(code, f"exit code {code}")


def _failing(n: int, number: int) -> Callable[[], None]:
    """Return what makes the n-th step of file work, and all after it, fail with an error of the system."""

    def install() -> None:
        done = 0

        def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
            def step(*arguments: Any, **options: Any) -> Any:
                nonlocal done
                done += 1
                if done >= n:
                    raise OSError(number, os.strerror(number))
                return real(*arguments, **options)

            return step

        for name in ("replace", "mkdir", "fsync", "rename"):
            setattr(os, name, wrapped(getattr(os, name)))
        tempfile.mkstemp = wrapped(tempfile.mkstemp)

    return install


@contextlib.contextmanager
def _small_disk(folder: Path, options: str) -> Iterator[bool]:
    """Mount a disk in memory on a folder; yield whether the system allows it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = (
        shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def _damage(path: Path, way: str, others: list[Path], rng: Random) -> None:
    content = bytearray(path.read_bytes()) if path.is_file() else bytearray(b"x")
    at = rng.randrange(len(content))
    if way == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif way == "zero tail":
        content[at:] = bytes(len(content) - at)
    elif way == "cut":
        del content[at:]
    elif way == "empty":
        content.clear()
    elif way == "swap":
        other = rng.choice(others)
        content = bytearray(other.read_bytes()) if other.is_file() else content
    path.unlink() if path.is_file() else path.rmdir()
    path.mkdir() if way == "folder" else path.write_bytes(content)
