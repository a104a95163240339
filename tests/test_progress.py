"""What a run says on its way, with clocks of the tests' own."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcnn_svm import progress
from rcnn_svm.progress import Stages, spell, track


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def walk(clock: Clock, seconds: Iterable[float], **options: object) -> list[int]:
    """Go through a loop whose items take so many seconds each; return the items that came."""
    spans = list(seconds)
    came = []
    for i in track(range(len(spans)), "features", clock=clock, **options):  # type: ignore[arg-type]
        came.append(i)
        clock.now += spans[i]
    return came


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0:00:00"), (59.9, "0:00:59"), (60, "0:01:00"), (3599, "0:59:59"), (36061, "10:01:01")],
)
def test_durations(seconds: float, words: str) -> None:
    assert spell(seconds) == words


def test_each_stage_is_announced_with_the_time_of_the_run_and_its_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    stages = Stages(["proposals", "features"], clock=clock)
    clock.now += 3
    with stages("proposals", "in 7 images"):
        clock.now += 70
    with stages("features", "of 9 regions"):
        clock.now += 5
    stages.finish()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "0:00:03  1 of 2, proposals: in 7 images",
        "0:01:13  2 of 2, features: of 9 regions",
        "0:01:18  done",
    ]
    assert stages.seconds == {"proposals": 70.0, "features": 5.0}


def test_a_stage_that_fails_has_no_time() -> None:
    stages = Stages(["proposals"])
    with pytest.raises(RuntimeError), stages("proposals", "in 7 images"):
        raise RuntimeError
    assert stages.seconds == {}


def test_a_stage_that_was_not_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="not in tuple"), Stages(["proposals"])("features", "of 9 regions"):
        raise AssertionError


def test_a_long_loop_says_a_line_a_minute_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert walk(Clock(), [20.0] * 10) == list(range(10))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "         features: 3 of 10 in 0:01:00, about 0:02:20 left",
        "         features: 6 of 10 in 0:02:00, about 0:01:20 left",
        "         features: 9 of 10 in 0:03:00, about 0:00:20 left",
    ]


def test_a_loop_within_a_minute_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    walk(Clock(), [10.0] * 5)
    assert capsys.readouterr() == ("", "")


def test_a_loop_that_is_done_when_the_minute_is_over_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    walk(Clock(), [50.0, 50.0])
    assert capsys.readouterr() == ("", "")


def test_time_that_items_take_to_be_made_counts_as_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()

    def made() -> Iterable[int]:
        for i in range(3):
            clock.now += 90
            yield i

    assert list(track(made(), "fits", total=3, clock=clock)) == [0, 1, 2]
    assert capsys.readouterr().err.splitlines() == [
        "         fits: 1 of 3 in 0:01:30, about 0:03:00 left",
        "         fits: 2 of 3 in 0:03:00, about 0:01:30 left",
    ]


def test_a_loop_of_unknown_length_promises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    for _ in track(iter(range(3)), "batches", clock=clock):
        clock.now += 61
    assert capsys.readouterr().err.splitlines()[0] == "         batches: 1 in 0:01:01"


@given(st.lists(st.integers(0, 200), min_size=1, max_size=40))
def test_lines_come_every_minute_and_never_closer(seconds: list[int]) -> None:
    said: list[float] = []
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "say", lambda message: said.append(clock.now))
        assert walk(clock, seconds) == list(range(len(seconds)))
    times = [1000.0, *said, clock.now]
    assert all(later - earlier >= 60 for earlier, later in itertools.pairwise(times[:-1]))
    assert all(later - earlier < 60 + max(*seconds, 1) for earlier, later in itertools.pairwise(times))


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/null"])
def test_without_a_stderr_nothing_goes_to_stdout(redirect: str) -> None:
    code = "from rcnn_svm.progress import say, track; say('hush'); print(list(track(range(3), 'x')))"
    shell = f'"{sys.executable}" -c "{code}" {redirect}'
    result = subprocess.run(shell, shell=True, stdout=subprocess.PIPE, text=True, check=True)
    assert result.stdout == "[0, 1, 2]\n"


def test_on_a_terminal_a_loop_draws_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal: Callable[[], bool] = lambda: True  # noqa: E731
    monkeypatch.setattr(sys.stderr, "isatty", terminal)
    assert list(track(range(3), "features")) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert "features: 100%" in err
    assert "3/3" in err
